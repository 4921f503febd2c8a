"""Pretrain a base model into RUN_DIR/base, with the tokenizer of RUN_DIR/tokenizer; run again to resume.

accelerate launch scripts/base_train.py --config recipes/d12/base.yaml --run-dir runs/d12 [--depth 10 ...]
python scripts/base_train.py --config recipes/cpu-demo/base.yaml --run-dir runs/cpu-demo
"""

from nanochat_hf.config import script
from nanochat_hf.stages import run_base
from nanochat_hf.train.pretrain import PretrainConfig

if __name__ == "__main__":
    script(
        PretrainConfig,
        run_base,
        tokenizer="folder or Hub id of a tokenizer (default: that of the run folder)",
        model="folder or Hub id of weights to begin with",
        repo="Hub repository for a branch step-NNNNNN every push_every steps",
    )
