"""Train a tokenizer, the first stage of a recipe.

    python scripts/tok_train.py --config recipes/d12/tokenizer.yaml --run-dir runs/d12 [--vocab_size 65536]

It is written to RUN_DIR/tokenizer and loads with `AutoTokenizer.from_pretrained`.
"""

from nanochat_hf.data.tokenizer import TokenizerConfig, train_tokenizer
from nanochat_hf.errors import InputError
from nanochat_hf.run import Run, script


def main(config: TokenizerConfig, run: Run) -> None:
    if run.finished("tokenizer"):
        raise InputError(f"{run.folder('tokenizer')} is finished already; delete it or choose another --run-dir")
    train_tokenizer(config, run.folder("tokenizer"))
    metrics = run.metrics("tokenizer")
    folder, size = run.folder("tokenizer"), metrics["vocab_size"]
    print(f"{folder}: {size} tokens, {metrics['bytes_per_token']:.2f} bytes per token")


if __name__ == "__main__":
    script(TokenizerConfig, main)
