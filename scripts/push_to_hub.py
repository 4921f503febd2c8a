"""Push a finished stage of a run to the Hub, with its card, and check it by loading it back.

    python scripts/push_to_hub.py --run-dir runs/d24 --repo you/nanochat-d24 [--stage sft] [--space] [--dry-run]

Log in first with `hf auth login`, or set HF_TOKEN. A dry run sends nothing and leaves the files in <run-dir>/hub/.
"""

import argparse

from nanochat_hf.errors import guarded
from nanochat_hf.hub.push import Push, push


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", required=True)
    parser.add_argument("--repo", required=True, help="owner/name on the Hub")
    parser.add_argument("--stage", default=Push.stage, help="base, mid, sft or rl")
    parser.add_argument("--private", action="store_true")
    parser.add_argument("--space", action="store_true", help="also make a Gradio Space that talks to the model")
    parser.add_argument("--dry-run", action="store_true", help="prepare everything, send nothing")
    parser.add_argument("--revision", help="push to this branch")
    parser.add_argument("--force", action="store_true", help="replace other contents of the repo")
    parser.add_argument("--license", default=Push.license)
    parser.add_argument("--language", default="en", help="comma-separated ISO codes")
    parser.add_argument("--base-model", help="Hub id of the model that this one continues")
    args = vars(parser.parse_args())
    run_dir, language = args.pop("run_dir"), tuple(args.pop("language").split(","))
    push(run_dir, Push(language=language, **args))


if __name__ == "__main__":
    guarded(main)
