"""Direct preference optimization (DPO) of the newest chat model of RUN_DIR, into RUN_DIR/dpo; run again to resume.

accelerate launch scripts/chat_dpo.py d12 [--lora_r 16 ...]
python scripts/chat_dpo.py d12 --dataset pairs.jsonl
"""

from nanochat_hf.cli import main

if __name__ == "__main__":
    main("dpo")
