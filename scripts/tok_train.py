"""Train a tokenizer, the first stage of a recipe.

    python scripts/tok_train.py d12 [--vocab_size 65536]

It is written to RUN_DIR/tokenizer and loads with `AutoTokenizer.from_pretrained`.
"""

from nanochat_hf.cli import main

if __name__ == "__main__":
    main("tokenizer")
