"""Write conversations of an identity to a .jsonl that a recipe can mix in: from phrasings, or by a better model.

python scripts/make_identity.py --identity recipes/identity.yaml --output identity.jsonl
python scripts/make_identity.py --identity me.yaml --output identity.jsonl --endpoint http://127.0.0.1:8000 --rows 500

A recipe can name the .yaml itself, which does the same from phrasings. The endpoint is any server that speaks OpenAI's
chat protocol: text-generation-inference, vLLM, `transformers serve`, our own.
"""

import argparse
import json
import os
from pathlib import Path

from nanochat_hf.data.identity import NUM_CONVERSATIONS, conversations, generate_with_model, read_identity
from nanochat_hf.errors import InputError, guarded
from nanochat_hf.serve.terminal_chat import Options, RemoteModel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--identity", "--facts", required=True, help="YAML such as recipes/identity.yaml")
    parser.add_argument("--output", required=True, type=Path, help="the .jsonl to write")
    parser.add_argument("--rows", type=int, default=NUM_CONVERSATIONS, help="conversations (default: %(default)s)")
    parser.add_argument("--split", default="train", help="from phrasings: train, or test for the held-out ones")
    parser.add_argument("--endpoint", help="URL of a server whose model writes them")
    parser.add_argument("--model", help="the model's name there")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.rows < 1:
        raise InputError(f"--rows is {args.rows}: ask for at least one conversation")
    identity = read_identity(args.identity)
    if args.endpoint:

        def complete(messages: list[dict]) -> str:
            writer = RemoteModel(args.endpoint, args.model)
            return "".join(writer.answer(messages, Options(temperature=1.0, max_new_tokens=1024)))

        rows, refused = generate_with_model(identity, complete, args.rows, args.seed)
        for reason, count in refused.most_common():
            print(f"left out {count}: {reason}")
    else:
        rows = list(conversations(identity, args.split, args.seed, args.rows))
    temporary = args.output.with_name(f".{args.output.name}.{os.getpid()}")
    temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    os.replace(temporary, args.output)
    print(f"{len(rows)} conversations of {identity.name} in {args.output}; mix them in: {{dataset: {args.output}}}")


if __name__ == "__main__":
    guarded(main)
