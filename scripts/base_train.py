"""Pretrain a base model into RUN_DIR/base, with the tokenizer of RUN_DIR/tokenizer; run again to resume.

accelerate launch scripts/base_train.py d12 [--depth 10 ...]
python scripts/base_train.py cpu-demo
"""

from nanochat_hf.cli import main

if __name__ == "__main__":
    main("pretrain")
