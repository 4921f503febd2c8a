"""Mid-training or SFT: teach the newest model of RUN_DIR to chat, into RUN_DIR/mid or /sft; run again to resume.

accelerate launch scripts/chat_sft.py --config recipes/d12/sft.yaml --run-dir runs/d12 [--lora_rank 16 ...]
python scripts/chat_sft.py --config recipes/cpu-demo/mid.yaml --run-dir runs/cpu-demo --stage mid
"""

from nanochat_hf.errors import InputError
from nanochat_hf.run import Run, script
from nanochat_hf.train.sft import ChatConfig, train_chat


def train(config: ChatConfig, run: Run, stage: str | None = None, model: str | None = None) -> None:
    stage = stage or "sft"
    if stage not in ("mid", "sft"):
        raise InputError(f"--stage is {stage!r}: use mid or sft")
    source = model or run.latest_model(before=stage)
    if source is None:
        raise InputError(f"{run.path} has no finished model to begin with: run scripts/base_train.py, or give --model")
    if run.finished(stage):
        raise InputError(f"{run.folder(stage)} is finished already; delete it or choose another --run-dir")
    train_chat(config, str(source), run.folder(stage))


if __name__ == "__main__":
    script(
        ChatConfig,
        train,
        stage="mid or sft: the folder that the result goes to (default: sft)",
        model="folder or Hub id of the model to begin with (default: the newest of the run folder)",
    )
