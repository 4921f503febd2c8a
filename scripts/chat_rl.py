"""RL with verifiable rewards (RLVR) of the newest model of RUN_DIR, into RUN_DIR/rl; run again to resume.

accelerate launch scripts/chat_rl.py d20 [--num_iterations 100 ...]
python scripts/chat_rl.py cpu-demo
"""

from nanochat_hf.cli import main

if __name__ == "__main__":
    main("rl")
