"""Pretrain a base model into RUN_DIR/base, with the tokenizer of RUN_DIR/tokenizer; run again to resume.

accelerate launch scripts/base_train.py --config recipes/d12/base.yaml --run-dir runs/d12 [--depth 10 ...]
python scripts/base_train.py --config recipes/cpu-demo/base.yaml --run-dir runs/cpu-demo
"""

from nanochat_hf.cli import main

if __name__ == "__main__":
    main("pretrain")
