"""Train a tokenizer, the first stage of a recipe.

    python scripts/tok_train.py --config recipes/d12/tokenizer.yaml --run-dir runs/d12 [--vocab_size 65536]

It is written to RUN_DIR/tokenizer and loads with `AutoTokenizer.from_pretrained`.
"""

from nanochat_hf.cli import main

if __name__ == "__main__":
    main("tokenizer")
