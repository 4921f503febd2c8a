"""RL with verifiable rewards (RLVR) of the newest model of RUN_DIR, into RUN_DIR/rl; run again to resume.

accelerate launch scripts/chat_rl.py --config recipes/d20/rl.yaml --run-dir runs/d20 [--num_iterations 100 ...]
python scripts/chat_rl.py --config recipes/cpu-demo/rl.yaml --run-dir runs/cpu-demo
"""

from nanochat_hf.cli import main

if __name__ == "__main__":
    main("rl")
