"""Pretrain a base model into RUN_DIR/base, with the tokenizer of RUN_DIR/tokenizer; run again to resume.

accelerate launch scripts/base_train.py --config recipes/d12/base.yaml --run-dir runs/d12 [--depth 10 ...]
python scripts/base_train.py --config recipes/cpu-demo/base.yaml --run-dir runs/cpu-demo
"""

import os

from nanochat_hf.errors import InputError
from nanochat_hf.hub.push import checkpoint_pusher
from nanochat_hf.run import Run, script
from nanochat_hf.train.pretrain import PretrainConfig, pretrain


def train(
    config: PretrainConfig, run: Run, tokenizer: str | None = None, model: str | None = None, repo: str | None = None
):
    if not tokenizer and not run.finished("tokenizer"):
        raise InputError(f"{run.path} has no finished tokenizer: run scripts/tok_train.py first, or give --tokenizer")
    if run.finished("base"):
        raise InputError(f"{run.folder('base')} is finished already; delete it or choose another --run-dir")
    push = None
    if repo:  # every process takes part in writing the folder, one uploads it
        push = checkpoint_pusher(repo) if os.environ.get("RANK", "0") == "0" else lambda folder, step: None
    pretrain(config, tokenizer or str(run.folder("tokenizer")), run.folder("base"), model, push=push)


if __name__ == "__main__":
    script(
        PretrainConfig,
        train,
        tokenizer="folder or Hub id of a tokenizer (default: that of the run folder)",
        model="folder or Hub id of weights to begin with",
        repo="Hub repository for a branch step-NNNNNN every push_every steps",
    )
