"""Mid-training or SFT: teach the newest model of RUN_DIR to chat, into RUN_DIR/mid or /sft; run again to resume.

accelerate launch scripts/chat_sft.py --config recipes/d12/sft.yaml --run-dir runs/d12 [--lora_r 16 ...]
python scripts/chat_sft.py --config recipes/cpu-demo/mid.yaml --run-dir runs/cpu-demo --stage mid
accelerate launch scripts/chat_sft.py ... --chatcore_every 200 --eval recipes/d12/eval.yaml    # ChatCORE on the way
"""

import torch

from nanochat_hf.data.tokenizer import load_tokenizer
from nanochat_hf.distributed import partial_state
from nanochat_hf.errors import InputError
from nanochat_hf.eval.harness import EvalConfig, chatcore_metric
from nanochat_hf.eval.weights import origin
from nanochat_hf.run import Run, parse_config, script
from nanochat_hf.serve.engine import Engine
from nanochat_hf.train.sft import ChatConfig, train_chat


def train(
    config: ChatConfig, run: Run, stage: str | None = None, model: str | None = None, eval: str | None = None
) -> None:
    stage, chatcore = stage or "sft", None
    if stage not in ("mid", "sft"):
        raise InputError(f"--stage is {stage!r}: use mid or sft")
    source = model or run.latest_model(before=stage)
    if source is None:
        raise InputError(f"{run.path} has no finished model to begin with: run scripts/base_train.py, or give --model")
    if run.finished(stage):
        raise InputError(f"{run.folder(stage)} is finished already; delete it or choose another --run-dir")
    if eval:
        engine = Engine if torch.cuda.is_available() else None
        tasks = parse_config(EvalConfig, eval)
        chatcore = chatcore_metric(tasks, load_tokenizer(str(source)), run.folder(stage) / "state", engine)
    partial_state().print(origin(run, stage, source))
    train_chat(config, str(source), run.folder(stage), chatcore)


if __name__ == "__main__":
    script(
        ChatConfig,
        train,
        stage="mid or sft: the folder that the result goes to (default: sft)",
        model="folder or Hub id of the model to begin with (default: the newest of the run folder)",
        eval="eval.yaml whose chat tasks are asked every chatcore_every steps",
    )
