"""Evaluate the finished stages of a run, or any causal LM of the Hub, with lm-eval.

    python scripts/run_evals.py --config recipes/cpu-demo/eval.yaml --run-dir runs/cpu-demo
    accelerate launch scripts/run_evals.py --config recipes/d24/eval.yaml --run-dir runs/d24 --stages sft,rl
    python scripts/run_evals.py --config recipes/d12/eval.yaml --run-dir runs/gpt2 --model openai-community/gpt2

`--key value` overrides a key of the YAML, for example `--core_bundle ~/eval_bundle --core_max_per_task 100`.
"""

from nanochat_hf.errors import InputError
from nanochat_hf.eval.harness import EvalConfig, evaluate
from nanochat_hf.eval.lm_eval_model import Generator
from nanochat_hf.run import MODEL_STAGES, Run, script
from nanochat_hf.serve.engine import Engine


def engine(model, tokenizer):
    """The fast engine for nanochat models on a GPU, transformers' forward for all others."""
    fast = model.device.type == "cuda" and model.config.model_type in ("nanochat", "nanochat_hf")
    return Engine(model, tokenizer) if fast else Generator(model, tokenizer)


def run_stage(config: EvalConfig, run: Run, stages: str | None = None, model: str | None = None) -> None:
    names = stages.split(",") if stages else [name for name in MODEL_STAGES if run.finished(name)]
    for name in names if not model else ():
        if name not in MODEL_STAGES or not run.finished(name):
            raise InputError(f"{name!r} is no finished stage with a model of {run.path}")
    models = {"base": model} if model else {name: str(run.folder(name)) for name in names}
    evaluate(config, models, run.folder("eval"), engine)


if __name__ == "__main__":
    script(EvalConfig, run_stage, stages="comma-separated stages; default: all", model="a folder or Hub id instead")
