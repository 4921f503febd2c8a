"""The whole pipeline, from text to a chat model with its report card.

    accelerate launch recipes/speedrun.py --recipe cpu-demo
    accelerate launch --config_file configs/accelerate/multi_gpu.yaml recipes/speedrun.py --recipe d24 \
        [--run-dir runs/d24] [--stages tokenizer,base,mid,sft,rl,eval,report] [base.depth=18 sft.num_epochs=2 ...]

A recipe is a folder with one YAML per stage. A finished stage is skipped, an interrupted one resumes, and a recipe
that changed since a stage finished is refused.
"""

from nanochat_hf.cli import main

if __name__ == "__main__":
    main("speedrun")
