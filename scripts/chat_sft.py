"""Mid-training or SFT: teach the newest model of RUN_DIR to chat, into RUN_DIR/mid or /sft; run again to resume.

accelerate launch scripts/chat_sft.py d12 [--lora_r 16 ...]
python scripts/chat_sft.py cpu-demo --stage mid
accelerate launch scripts/chat_sft.py ... --chatcore_every 200 --eval recipes/d12/eval.yaml    # ChatCORE on the way
"""

from nanochat_hf.cli import main

if __name__ == "__main__":
    main("sft")
