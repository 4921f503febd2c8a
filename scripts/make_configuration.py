"""Prints docs/configuration.md: every key of a recipe, from the classes in nanochat_hf/stage_configs.py.

python scripts/make_configuration.py > docs/configuration.md
"""

from nanochat_hf.config import keys_of
from nanochat_hf.stage_configs import (
    ChatConfig,
    DPOStageConfig,
    EvalConfig,
    PretrainConfig,
    RLConfig,
    StageConfig,
    TokenizerConfig,
    TrainingConfig,
)


def markdown() -> str:
    lines = [
        "# Configuration",
        "",
        "Every key of a recipe's YAML files, made by `python scripts/make_configuration.py`.",
    ]
    lines += [
        "In a YAML: `depth: 12`; for recipes/speedrun.py: `base.depth=12`; for a script of one stage: `--depth 12`."
    ]
    lines += [
        "All are checked before anything runs. true and false may be written yes and no, on and off, or 1 and 0;",
        "a whole number also as in YAML, 0x10 or 1_000.",
    ]
    stages = {"tokenizer": TokenizerConfig, "base": PretrainConfig, "mid, sft": ChatConfig, "rl": RLConfig}
    stages |= {
        "dpo": DPOStageConfig,
        "mid, sft, rl, dpo": StageConfig,
        "all but tokenizer": TrainingConfig,
        "eval": EvalConfig,
    }
    for names, cls in stages.items():
        lines += ["", f"## {names}", "", "| key | default | allowed | meaning |", "|---|---|---|---|"]
        for owner, key, default, values, text in keys_of(cls):
            if owner == cls.__name__ or key in cls.__annotations__:
                cells = [f"`{key}`", f"`{default or 'empty'}`", values, text]
                lines.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
