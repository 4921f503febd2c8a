"""Push a finished stage of a run to the Hub, with its card, and check it by loading it back.

    python scripts/push_to_hub.py --run-dir runs/d24 --repo you/nanochat-d24 [--stage sft] [--space] [--dry-run]

Log in first with `hf auth login`, or set HF_TOKEN. A dry run sends nothing and leaves the files in <run-dir>/hub/.
"""

from nanochat_hf.cli import main

if __name__ == "__main__":
    main("push")
