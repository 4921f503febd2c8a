"""Preference training (DPO) of the newest chat model of RUN_DIR, into RUN_DIR/dpo; run again to resume. Optional.

accelerate launch scripts/chat_dpo.py --config recipes/d12/dpo.yaml --run-dir runs/d12 [--lora_r 16 ...]
python scripts/chat_dpo.py --config recipes/d12/dpo.yaml --run-dir runs/d12 --dataset pairs.jsonl
"""

from nanochat_hf.distributed import partial_state
from nanochat_hf.errors import InputError
from nanochat_hf.eval.weights import origin
from nanochat_hf.run import Run, script
from nanochat_hf.train.dpo import DPOStageConfig, train_preference


def train(config: DPOStageConfig, run: Run, model: str | None = None) -> None:
    source = model or run.latest_model()
    if source is None:
        raise InputError(f"{run.path} has no finished model to begin with: run scripts/chat_sft.py, or give --model")
    if (run.path / "dpo" / "metrics.json").exists():
        raise InputError(f"{run.path / 'dpo'} is finished already; delete it or choose another --run-dir")
    partial_state().print(origin(run, "dpo", source))
    train_preference(config, str(source), run.path / "dpo")


if __name__ == "__main__":
    script(
        DPOStageConfig,
        train,
        model="folder or Hub id of the model to begin with (default: the newest of the run folder)",
    )
