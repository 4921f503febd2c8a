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

import argparse
from itertools import islice
from pathlib import Path

from nanochat_hf.convert.upstream import convert
from nanochat_hf.demo import corpus as primer
from nanochat_hf.errors import InputError, guarded
from nanochat_hf.run import load_json, model_fingerprint, save_json


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--tokenizer")
    parser.add_argument("--step", type=int)
    parser.add_argument("--to", choices=("hf", "native", "nanochat"), default="hf")
    args = parser.parse_args()
    texts = islice(primer.documents("train", seed=0), 5000)
    try:
        record = Path(args.output) / "metrics.json"  # of a run's stage, with the fingerprint of the folder
        describes = record.exists() and load_json(record).get("weights") == model_fingerprint(args.output)
        info = convert(args.source, args.output, args.to, args.tokenizer, args.step, texts)
        if describes:
            save_json(record, load_json(record) | {"weights": model_fingerprint(args.output)})
    except (ValueError, OSError) as error:  # OSError: of transformers, for a broken folder
        raise InputError(str(error).splitlines()[0]) from None
    print(f"{args.output}: generation {info['generation']}, {info['parameters']:,} parameters, step {info['step']}")
    if info["tokenizer_ids"] is None:
        print("weights only: give --tokenizer DIR to convert the tokenizer too")
    elif info["tokenizer_ids"]:
        print(f"tokenizer: {info['tokenizer_ids']:,} ids compared, all equal")


if __name__ == "__main__":
    guarded(main)
