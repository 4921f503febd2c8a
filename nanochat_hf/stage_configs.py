"""The keys of a recipe's YAML files: a dataclass per stage, with each key's type, range, default and text.

    PretrainConfig(depth=12)                  # raises InputError for a value that no run can have

Names are those of karpathy/nanochat where it has them. No large library is imported: wrong input is refused at once.
"""

import importlib.util
import re
from collections.abc import Collection
from dataclasses import field
from pathlib import Path
from typing import Annotated, Literal, Required

from annotated_types import Ge, Gt, Le, MinLen, MultipleOf
from pydantic import AfterValidator, StringConstraints, model_validator
from typing_extensions import TypedDict

from .config import STRICT, Count, Fraction, Length, NotNegative, Place, Seed, Size, Unique, parse_config, settings
from .data.transforms import TRANSFORMS
from .demo.corpus import CHAT_KINDS, KINDS, of_kinds
from .errors import InputError
from .run import MODEL_STAGES, STAGES, nearest, project_folder

RECIPES = project_folder("recipes")
SHAPE_KEYS = ("generation", "depth", "aspect_ratio", "head_dim", "max_seq_len", "window_pattern", "total_batch_size",
              "final_logit_softcapping")  # fmt: skip
SPELLING = {"nanochat_spellingbee", "nanochat_chatcore"}  # tasks whose words are of the text, or of `words`
MAX_STEPS = 10**9
MIN_VOCAB_SIZE = 256 + 9  # every byte is a token, so that any text can be encoded; and the special tokens


def installed(tracker: str) -> str:
    if tracker != "none" and importlib.util.find_spec(tracker) is None:
        raise ValueError(f"{tracker} is not installed; pip install {tracker}")
    return tracker


def known_task(name: str) -> str:
    """A task of lm-eval, which only an evaluation can check, or one of evals/tasks."""
    files = project_folder("evals", "tasks").glob("*.yaml") if name.startswith("nanochat_") else ()
    names = [line.split()[1] for file in files for line in file.read_text(encoding="utf-8").splitlines()
             if line.startswith(("task: ", "group: "))]  # fmt: skip
    if names and name not in names:
        raise ValueError(f"unknown task; {nearest(name, names)}")
    return name


def known_attention(name: str) -> str:
    kinds = ("auto", "eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4")
    if name not in kinds and not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(@[\w.-]+)?(:\w+)?", name):
        raise ValueError(f"transformers has no such attention; {nearest(name, kinds)}, or a kernel's Hub id")
    return name


OptionalCount = Literal[-1] | Count
OptionalSteps = Literal[-1] | Annotated[int, Ge(1), Le(MAX_STEPS)]
OptionalBatch = Literal[-1] | Annotated[int, Ge(1), Le(10**9)]  # tokens
Tokens = Annotated[int, Ge(1), Le(10**11)]  # of an evaluation
Rate = Annotated[float, Ge(0), Le(1000)]
Interval = Annotated[int, Ge(-1), Le(MAX_STEPS)]
Stages = Unique[Literal[MODEL_STAGES]]
Tracker = Annotated[Literal["none", "trackio", "wandb", "tensorboard"], AfterValidator(installed)]
Attention = Annotated[str, AfterValidator(known_attention)]


class TextDataset(TypedDict, total=False):
    """A part of a mixture of texts."""

    __pydantic_config__ = STRICT
    dataset: Required[Place]
    weight: Annotated[float, Gt(0), Le(10**15)]


TextMixture = Annotated[list[TextDataset], MinLen(1)]


class ChatDataset(TypedDict, total=False):
    """An entry of a mixture of conversations; data/mixture.py describes it."""

    __pydantic_config__ = STRICT
    dataset: Required[Annotated[Place, AfterValidator(of_kinds(CHAT_KINDS))]]
    split: Place
    subset: Place | None
    transform: Literal[tuple(TRANSFORMS)]
    rows: Annotated[int, Ge(1), Le(10**9)] | None
    epochs: Annotated[float, Gt(0), Le(1000)] | None


def rows_or_epochs(entry: dict) -> dict:
    if entry.get("rows") is not None and entry.get("epochs") is not None:
        raise ValueError("give rows or epochs, not both")
    return entry


ChatEntry = Annotated[ChatDataset, AfterValidator(rows_or_epochs)]
ChatMixture = Annotated[list[ChatEntry], MinLen(1)]


def whole_sequences(config):
    """`config`; raises ValueError if a step's tokens, packed, are no whole sequences."""
    size, length, packing = config.total_batch_size, config.max_seq_len, getattr(config, "packing", True)
    if packing and size > 0 and length > 0 and size % length:
        reason = f"with packing it must be a multiple of max_seq_len, {length} tokens"
        raise ValueError(f"total_batch_size is {size}: {reason}")
    return config


@settings
class TokenizerConfig:
    """Keys of tokenizer.yaml."""

    dataset: Place | TextMixture = "primer"
    """Text to train on: a Hub id, a folder of parquet files, a .jsonl file or `primer`; or a list of them, mixed by
    weight: [{dataset: ..., weight: 0.5}, ...] (data/documents.py)."""
    vocab_size: Annotated[int, Ge(MIN_VOCAB_SIZE), Le(2**24)] = 32768
    """Number of tokens, the nine special ones included."""
    max_chars: Count = 2_000_000_000
    """Stop after this many characters of text."""
    doc_cap: Count = 10_000
    """Characters that one document may give, so that a few very long ones do not decide the merges."""
    digit_group: Literal[1, 2, 3] = 2
    """Most digits in one token: 2, or 1 where arithmetic is to be learned."""
    normalization: Literal["", "nfc"] | None = ""
    """`nfc` to compose Unicode before encoding (Hangul, accents); empty keeps every byte as it is."""
    seed: Seed = 0
    """Seed of all that is drawn at random."""
    skip_bad_files: bool = False
    """Continue without files that cannot be read, instead of stopping."""


@settings
class TrainingConfig:
    """Keys of all stages that train a model."""

    embedding_lr: Rate | None = None
    """AdamW learning rate of the embedding at width 768 and the reference batch size; the next three likewise. null:
    the default of the model's generation."""
    unembedding_lr: Rate | None = None
    """AdamW learning rate of the head."""
    matrix_lr: Rate | None = None
    """Muon learning rate of the matrices."""
    scalar_lr: Rate | None = None
    """AdamW learning rate of the per-layer scalars."""
    keep_checkpoints: Size = 2
    """Checkpoints that stay on disk while the stage trains."""
    seed: Seed = 0
    """Seed of all that is drawn at random, in base of the weights and of the data order after the first epoch."""
    report_to: Tracker = "none"
    """Experiment tracker."""


@settings
class PretrainConfig(TrainingConfig):
    """Keys of base.yaml. null, where it is the default, means that of the model's generation (scaling.DEFAULTS)."""

    depth: Annotated[int, Ge(1), Le(1000)] = 12
    """Number of layers; everything that is not set follows from it."""
    generation: Literal[1, 2] = 2
    """Architecture and hyperparameters: 2 (2026) or 1 (October 2025)."""
    aspect_ratio: Annotated[int, Ge(1), Le(10_000)] = 64
    """Width of the model per layer."""
    head_dim: Annotated[int, Ge(2), Le(1024), MultipleOf(2)] = 128
    """Channels of an attention head, even because RoPE rotates pairs; the width is rounded up to whole heads."""
    max_seq_len: Annotated[int, Ge(2), Le(2**24)] = 2048
    """Tokens per sequence."""
    window_pattern: Annotated[str, StringConstraints(pattern="^[SL]+$")] | None = None
    """Attention tiled over the layers: S sliding window of a quarter of the sequence, L full."""
    final_logit_softcapping: Annotated[float, Gt(0), Le(10**6)] | None = 15.0
    """Logits are c * tanh(logits / c); null: not softcapped, as llama.cpp needs them (docs/checkpoints.md)."""
    num_iterations: OptionalSteps = -1
    """Optimizer steps; -1: from target_flops or the ratio."""
    target_flops: Literal[-1] | Annotated[float, Gt(0), Le(1e30)] = -1
    """Training FLOPs; -1: from the ratio."""
    target_param_data_ratio: Annotated[float, Gt(0), Le(10**6)] | None = None
    """Tokens per parameter (generation 2: of matrices and head)."""
    device_batch_size: Literal[-1] | Size = -1
    """Sequences per micro-batch on each device; -1: as free memory allows."""
    total_batch_size: OptionalBatch = -1
    """Tokens per optimizer step, over all devices; -1: from the depth."""
    weight_decay: Rate | None = None
    """Cautious weight decay of the matrices at the reference depth and batch size."""
    warmup_steps: Annotated[int, Ge(0), Le(MAX_STEPS)] | None = None
    """Steps of linear learning-rate warmup."""
    warmdown_ratio: Fraction | None = None
    """Fraction of the steps, at the end, of linear learning-rate decay."""
    final_lr_frac: Fraction | None = None
    """Final learning rate as a fraction of the peak."""
    eval_every: Interval = 250
    """Steps between evaluations of validation bits per byte; -1: only at the end, 0: never."""
    eval_tokens: Tokens = 80 * 524288
    """Tokens of validation text per evaluation."""
    core_metric_every: Interval = -1
    """Steps between evaluations of CORE; -1: never."""
    core_metric_max_per_task: OptionalCount = 500
    """Examples of each CORE task in such an evaluation."""
    sample_every: Interval = 2000
    """Steps between text samples; -1: only at the end."""
    save_every: Interval = 1000
    """Steps between checkpoints; -1: only when the run is interrupted."""
    save_optimizer: bool = False
    """Write the optimizer state to optimizer.pt, from which SFT can start (d24: 4 GB)."""
    push_every: Interval = -1
    """Steps between uploads to the Hub, where the caller can upload; -1: never."""
    fp8: bool | Literal["auto"] = False
    """FP8 matmuls (E4M3 forward, E5M2 gradients): true, false, or auto: on GPUs that have them (H100 and newer)."""
    dataset: Place | TextMixture = "primer"
    """Training text: a Hub id, a folder of parquet files, a .jsonl file or `primer`; or a weighted mixture of them:
    [{dataset: ..., weight: 0.5}, ...] (data/documents.py)."""
    skip_bad_files: bool = False
    """Skip files that cannot be read instead of stopping."""
    compile: bool = True
    """Compile with torch.compile (CUDA only)."""
    attn_implementation: Attention = "auto"
    """auto: this project's fused step; else the model's own forward with that attention of transformers."""
    max_loss_spike: NotNegative = 2.0
    """Nats above the median of the last steps at which a loss stops the run (LossSpikeDetector); 0: never."""
    log_every: Interval = -1
    """Steps between log lines, 1 for every step; -1: progress bar only."""

    step_is_whole_sequences = model_validator(mode="after")(whole_sequences)


@settings
class StageConfig(TrainingConfig):
    """Keys that mid.yaml, sft.yaml, rl.yaml and dpo.yaml have in common."""

    num_iterations: OptionalSteps = -1
    """Optimizer steps; -1: `num_epochs` passes over the data."""
    num_epochs: Annotated[float, Gt(0), Le(1000)] = 1
    """Passes over the data."""
    device_batch_size: Size = 16
    """Micro-batch size: sequences per device and forward pass; lowered where a step has fewer per device."""
    on_bad_example: Literal["skip", "error"] = "skip"
    """What to do with examples that cannot be used: `skip` and count them, or `error`."""
    init_lr_frac: Rate = 1.0
    """Factor on these learning rates."""
    warmup_ratio: Fraction = 0.0
    """Fraction of the steps with linear warmup."""
    warmdown_ratio: Fraction = 0.5
    """Fraction of the steps, at the end, with linear decay."""
    final_lr_frac: Fraction = 0.0
    """Fraction of the peak learning rate that the decay ends at."""
    weight_decay: Rate = 0.0
    """Cautious weight decay of the matrices."""
    max_grad_norm: NotNegative = 0.0
    """Gradient clipping norm; 0: no clipping."""
    lora_r: Annotated[int, Ge(0), Le(10_000)] = 0
    """Rank of LoRA adapters, merged into the weights at the end; 0: train all weights."""
    lora_alpha: Size = 32
    """Scale of the adapters: lora_alpha / lora_r."""
    lora_lr: Rate = 1e-3
    """AdamW learning rate of the adapters."""
    eval_every: Interval = -1
    """Steps between evaluations; -1: only at the ends."""
    save_every: Interval = -1
    """Steps between checkpoints; -1: only one after the last step, before the final evaluation."""
    attn_implementation: Attention | None = None
    """null: the fused forward where it can be, else sdpa; or an attention of transformers."""


@settings
class ChatConfig(StageConfig):
    """Keys of mid.yaml and sft.yaml, besides those of StageConfig."""

    mixture: ChatMixture = field(default_factory=lambda: [{"dataset": "primer"}])
    """Datasets to train on; data/mixture.py describes an entry."""
    validation: list[ChatEntry] = field(default_factory=list)
    """Datasets of the validation loss, likewise; empty: none."""
    assistant_only_loss: bool = True
    """Train on assistant tokens only; false for mid-training."""
    max_seq_len: Literal[-1] | Annotated[int, Ge(2), Le(2**24)] = -1
    """Tokens per sequence; -1: as the model was pretrained."""
    packing: bool = True
    """Pack whole conversations into a sequence; false: one conversation per sequence."""
    total_batch_size: OptionalBatch = -1
    """Global batch size in tokens (without packing: in conversations); -1: one micro-batch per device."""
    load_optimizer: bool = True
    """Begin with the optimizer state in the source's optimizer.pt, if there is one."""
    chatcore_every: Interval = -1
    """Steps between measurements of ChatCORE on the tasks of eval.yaml; -1: never."""
    chatcore_max_per_task: OptionalCount = 32
    """Questions per task of such a measurement; -1: all."""
    examples: list[Annotated[str, StringConstraints(pattern=r"\S")]] = field(default_factory=list)
    """Questions that chat pages offer to begin with; the tokenizer of this and of later stages keeps them."""
    compile: bool = False
    """Compile the network with torch.compile (CUDA)."""

    step_is_whole_sequences = model_validator(mode="after")(whole_sequences)


@settings
class RLConfig(StageConfig):
    """Keys of rl.yaml, besides those of StageConfig."""

    dataset: Annotated[Place, AfterValidator(of_kinds(KINDS))] = "openai/gsm8k"
    """Prompts: `primer:KIND` (or KIND+KIND), or GSM8K's format as a Hub id, a folder or `path/of_{split}.jsonl`."""
    subset: Place | None = "main"
    """Subset of a Hub dataset."""
    examples_per_step: Size = 16
    """Prompts per step, over all devices."""
    num_samples: Annotated[int, Ge(2), Le(10_000)] = 16
    """Completions sampled per prompt, two at least: the advantage is against their mean reward."""
    updates_per_batch: Size = 1
    """Optimizer steps on each batch of completions (TRL: num_iterations). eval_every and save_every are rounded up to
    multiples of it."""
    max_new_tokens: Length = 256
    """Tokens per completion, tool results included."""
    temperature: Annotated[float, Gt(0), Le(5)] = 1.0
    """Of sampling."""
    top_k: Literal[0] = 0
    """0 only, which samples among all tokens: the gradient is that of the full softmax."""
    eval_examples: Count = 400
    """Test prompts of the evaluations."""
    eval_samples: Annotated[int, Ge(1), Le(10_000)] = 4
    """Completions per test prompt, for pass@k."""
    early_stopping_patience: OptionalCount = -1
    """Evaluations in a row without a better pass@1 that end the training; it keeps the best weights. -1: never."""
    warmdown_ratio: Fraction = 1.0
    init_lr_frac: Rate = 0.05
    enabled: bool = True
    """false: run this stage only when --stages names it."""

    @model_validator(mode="after")
    def keys_agree(self):
        if self.early_stopping_patience > 0 and self.eval_every < 1:
            raise ValueError("early_stopping_patience counts evaluations: give eval_every, too, the steps between")
        return self


@settings
class DPOStageConfig(StageConfig):
    """Keys of dpo.yaml, besides those of StageConfig."""

    dataset: Place = "HuggingFaceH4/ultrafeedback_binarized"
    """Rows {"chosen", "rejected"} of whole conversations, or with a "prompt" before them: a Hub id or a .jsonl."""
    split: Place = "train_prefs"
    """Split of a Hub dataset."""
    num_eval_pairs: Count = 200
    """Pairs held out for validation."""
    examples_per_step: Size = 32
    """Pairs per step, over all devices."""
    max_seq_len: Literal[-1] | Annotated[int, Ge(2), Le(2**24)] = -1
    """Tokens per conversation; longer ones cannot be used. -1: as the model was pretrained."""
    beta: Annotated[float, Gt(0), Le(1000)] = 0.1
    """DPO's beta: the higher, the closer the model stays to the reference model."""
    init_lr_frac: Rate = 0.02
    warmdown_ratio: Fraction = 1.0
    enabled: bool = False
    """true: run this stage also when --stages does not name it."""


@settings
class EvalConfig:
    """Keys of eval.yaml."""

    tasks: Unique[Annotated[Place, AfterValidator(known_task)]] = field(default_factory=lambda: ["nanochat_demo"])
    """Tasks or groups for the chat stages: ours (evals/tasks) or any of lm-eval's."""
    chat_stages: Stages = field(default_factory=lambda: ["mid", "sft", "rl", "dpo"])
    """Stages that answer `tasks`; those that a run does not have are left out."""
    text_stages: Stages | None = None
    """Stages that answer those of `tasks` that are plain text, such as the Korean ones; null: chat_stages."""
    max_per_task: Count | None = None
    """Questions per chat task; null for all."""
    chat_data: Place | None = None
    """Folder with local files of the chat tasks (gsm8k_test.jsonl, ...); other files come from the Hub."""
    words: Place | None = None
    """Words for SpellingBee: a .txt file with one word per line, or a dataset of text; null: `dataset`."""
    core_bundle: Place | None = None
    """CORE's data: a folder, `download` for the official bundle (cached), null for no CORE."""
    core_stages: Stages = field(default_factory=lambda: ["base"])
    """Stages that CORE is computed for."""
    core_max_per_task: Count | None = None
    """Examples per CORE task; null for all."""
    dataset: Place | TextMixture | None = "primer"
    """Text for bits per byte, its validation split; null for none. Parts of a mixture are also measured alone."""
    bpb_tokens: Tokens = 65536
    """Tokens of it."""
    bpb_stages: Stages = field(default_factory=lambda: ["base", "mid", "sft", "rl", "dpo"])
    """Stages that bits per byte are computed for."""
    batch_size: Size = 128
    """Answers generated together."""
    batch_tokens: Count | None = None
    """Positions per batch (CORE, multiple choice, bits per byte); null for what fits into memory."""
    max_new_tokens: Length | None = None
    """Longest answer; null: the task's own limit."""
    num_samples: Annotated[int, Ge(1), Le(10_000)] = 1
    """Answers per question; more than 1 gives pass@k and needs a temperature."""
    temperature: Annotated[float, Ge(0), Le(5)] = 0.0
    """Of sampling; 0: greedy."""
    top_k: Annotated[int, Ge(0), Le(2**24)] = 50
    """Sample among this many tokens; 0: among all."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto (bfloat16 on CUDA, float32 elsewhere), float32 or bfloat16."""
    allow_unsandboxed_code: bool = False
    """Run generated code (HumanEval) also where it could use all files of this user, such as tokens."""
    log_samples: bool = True
    """Save every question with its answer in eval/samples."""
    seed: Seed = 0
    """Seed of all that is drawn at random."""

    @model_validator(mode="after")
    def keys_agree(self):
        if isinstance(self.dataset, list) and not self.words and SPELLING & set(self.tasks):
            raise ValueError("words is null: SpellingBee takes words from one dataset, and dataset is a mixture")
        if self.num_samples > 1 and self.temperature == 0:
            raise ValueError(f"num_samples is {self.num_samples}: it needs a temperature above 0")
        return self


STAGE_CONFIGS = {
    "tokenizer": TokenizerConfig, "base": PretrainConfig, "mid": ChatConfig, "sft": ChatConfig, "rl": RLConfig,
    "dpo": DPOStageConfig, "eval": EvalConfig,
}  # fmt: skip


UNUSED = (  # a key, one that wins over it, and the value that switches that one off
    ("num_epochs", "num_iterations", -1), ("target_flops", "num_iterations", -1),
    ("target_param_data_ratio", "num_iterations", -1), ("target_param_data_ratio", "target_flops", -1),
    *((key, "lora_r", 0) for key in ("embedding_lr", "unembedding_lr", "matrix_lr", "scalar_lr", "weight_decay")),
)  # fmt: skip


NEEDED = {  # a key -> another one without which it does nothing
    "chatcore_max_per_task": "chatcore_every", "core_metric_max_per_task": "core_metric_every",
    "core_max_per_task": "core_bundle", "core_stages": "core_bundle", "bpb_tokens": "dataset", "bpb_stages": "dataset",
    "top_k": "temperature", "eval_every": "validation", "final_lr_frac": "warmdown_ratio",
}  # fmt: skip


def refuse_unused_keys(stage: str, config, keys: Collection[str]) -> None:
    """Raise InputError if a command line names a key that its config does not use."""
    if "words" in keys and not SPELLING & set(config.tasks):
        raise InputError(f"eval.words: none of its tasks uses it; those that do: {', '.join(sorted(SPELLING))}")
    if "subset" in keys and config.dataset.startswith("primer:"):
        raise InputError(f"{stage}.subset is of a Hub dataset, and {config.dataset} has none: leave it out")
    steps = getattr(config, "num_iterations", -1)
    if "warmup_steps" in keys and 0 < steps < (config.warmup_steps or 0):
        raise InputError(f"{stage}.warmup_steps is {config.warmup_steps}, and the run has {steps} steps: lower it")
    for key, other, off in UNUSED:
        if key in keys and getattr(config, key) not in (-1, None) and (value := getattr(config, other, -1)) > 0:
            raise InputError(f"{stage}.{key} is not used, as {other} is {value:g}: give {stage}.{other}={off}, too")
    for key, other in ((key, other) for key, other in NEEDED.items() if key in keys and getattr(config, key) != -1):
        if (value := getattr(config, other, True)) in (-1, 0, []) or (value is None and stage == "eval"):
            raise InputError(f"{stage}.{key} is not used, as {other} is {value or 'none'}: give {stage}.{other}, too")
    if {"lora_alpha", "lora_lr"} & {*keys} and not config.lora_r:
        raise InputError(f"{stage}: lora_alpha and lora_lr are of adapters: give {stage}.lora_r, too, for example 16")


def find_recipe(name: str) -> Path:
    """The folder of a recipe, by its path or its name below recipes/."""
    for folder in (Path(name), RECIPES / name):
        if (folder / "base.yaml").is_file():
            return folder
    names = sorted(path.parent.name for path in RECIPES.glob("*/base.yaml"))
    if depth := re.fullmatch(r"d(\d+)", name):
        others = filter(re.compile(r"d\d+").fullmatch, names)
        near = min(others, key=lambda other: abs(int(other[1:]) - int(depth[1])))
        raise InputError(f"no recipe {name!r}: take {near}, the nearest one, with base.depth={depth[1]}")
    raise InputError(f"no recipe {name!r} (a folder with base.yaml); {nearest(name, names)}")


def read_recipe(recipe: Path, stages: list[str] | None, overrides: list[str]) -> tuple[list[str], dict]:
    """The stages to run, in order, and each stage's config. Raises InputError for an unknown stage, key or value.

    `stages` None: all of the recipe that are `enabled`, and the report; `overrides` are STAGE.KEY=VALUE.
    """
    present = [stage for stage in STAGES if (recipe / f"{stage}.yaml").is_file()]
    for path in (recipe / f"{stage}.yaml" for stage in STAGES if stage not in present):
        if path.is_symlink() or path.exists():  # else its stage would be left out
            raise InputError(f"{path} is no file, or a link to none")

    def check(stage: str, names: list[str]) -> None:
        if stage not in names:
            others = [path.parent.name for path in sorted(RECIPES.glob(f"*/{stage}.yaml"))]
            advice = f"; {others[0]} has one: copy its {stage}.yaml, or run that with --run-dir" if others else ""
            raise InputError(f"recipe {recipe.name} has no stage {stage!r}; {nearest(stage, names)}{advice}")

    values: dict[str, dict] = {stage: {} for stage in present}
    for word in overrides:
        key, equals, value = word.partition("=")
        stage, dot, key = key.partition(".")
        if not (equals and dot):
            raise InputError(f"expected STAGE.KEY=VALUE, for example base.depth=6, got {word!r}")
        check(stage, present)
        if key in values[stage]:
            raise InputError(f"{stage}.{key} is given twice")
        values[stage][key] = value
    for stage in stages or []:
        check(stage, [*present, "report"])
    configs = {stage: parse_config(STAGE_CONFIGS[stage], recipe / f"{stage}.yaml", values[stage]) for stage in present}
    chosen = stages or [*(stage for stage in present if getattr(configs[stage], "enabled", True)), "report"]
    for stage, config in configs.items():
        refuse_unused_keys(stage, config, values[stage])
    wants_core = "core_metric_every" in values["base"] and configs["base"].core_metric_every > 0
    if wants_core and not getattr(configs.get("eval"), "core_bundle", None):
        raise InputError("base.core_metric_every is of CORE: give eval.core_bundle, too, a folder or download")
    if "rl" in chosen and (length := configs["rl"].max_new_tokens) >= (context := configs["base"].max_seq_len):
        raise InputError(f"rl.max_new_tokens is {length}: a prompt needs room, too, in base.max_seq_len, {context}")
    return [stage for stage in STAGES if stage in chosen], configs
