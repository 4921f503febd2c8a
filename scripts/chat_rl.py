"""Reinforcement learning: practise on questions with checkable answers, into RUN_DIR/rl; run again to resume.

accelerate launch scripts/chat_rl.py --config recipes/d20/rl.yaml --run-dir runs/d20 [--num_iterations 100 ...]
python scripts/chat_rl.py --config recipes/cpu-demo/rl.yaml --run-dir runs/cpu-demo
"""

import torch

from nanochat_hf.distributed import partial_state
from nanochat_hf.errors import InputError
from nanochat_hf.eval.lm_eval_model import Generator
from nanochat_hf.eval.weights import origin
from nanochat_hf.run import Run, script
from nanochat_hf.serve.engine import Engine
from nanochat_hf.train.grpo import RLConfig, train_rl


def train(config: RLConfig, run: Run, model: str | None = None) -> None:
    source = model or run.latest_model(before="rl")
    if source is None:
        raise InputError(f"{run.path} has no finished model to begin with: run scripts/chat_sft.py, or give --model")
    if run.finished("rl"):
        raise InputError(f"{run.folder('rl')} is finished already; delete it or choose another --run-dir")
    partial_state().print(origin(run, "rl", source))
    train_rl(config, str(source), run.folder("rl"), engine=Engine if torch.cuda.is_available() else Generator)


if __name__ == "__main__":
    script(
        RLConfig, train, model="folder or Hub id of the model to begin with (default: the newest of the run folder)"
    )
