"""Convert checkpoints between karpathy/nanochat, this project and transformers' own `nanochat`.

    python scripts/convert_checkpoint.py --source DIR --output DIR [--tokenizer DIR] [--step N]
                                         [--to hf|native|nanochat]

`--source` is a folder of karpathy/nanochat (model_NNNNNN.pt and meta_NNNNNN.json, of October 2025 or July 2026; the
last step unless --step says another), or a folder saved by `save_pretrained`. `--tokenizer` is the folder with its
tokenizer.pkl (~/.cache/nanochat/tokenizer) or tokenizer.json; without one only weights are written, unless the source
has its own. `--to hf` (the default) writes a folder for from_pretrained, `native` one that needs no remote code (first
generation only), `nanochat` files that karpathy/nanochat loads. Both tokenizers are checked to give equal ids.
If `--output` is `--source`, a folder of ours is renewed in place: class names, code and templates, but not weights.
"""

from nanochat_hf.cli import main

if __name__ == "__main__":
    main("convert")
