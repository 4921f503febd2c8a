"""Write conversations of a personality to a .jsonl that a recipe can mix in: by templates, or by a better model.

python scripts/make_identity.py --facts recipes/identity.yaml --output identity.jsonl
python scripts/make_identity.py --facts me.yaml --output identity.jsonl --endpoint http://127.0.0.1:8000 --rows 500

A recipe can name the .yaml itself, which does the same by templates. The endpoint is any server that speaks OpenAI's
chat protocol: text-generation-inference, vLLM, `transformers serve`, our own.
"""

import argparse
import json
import os
from pathlib import Path

from nanochat_hf.data.identity import ROWS, ask_for, conversations, read_facts
from nanochat_hf.errors import InputError, guarded
from nanochat_hf.serve.terminal_chat import Options, RemoteModel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--facts", required=True, help="YAML of a personality, such as recipes/identity.yaml")
    parser.add_argument("--output", required=True, type=Path, help="the .jsonl to write")
    parser.add_argument("--rows", type=int, default=ROWS, help=f"conversations (default: {ROWS})")
    parser.add_argument("--split", default="train", help="by templates: train, or test for the held-out wordings")
    parser.add_argument("--endpoint", help="URL of a server whose model writes them")
    parser.add_argument("--model", help="the model's name there")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.rows < 1:
        raise InputError(f"--rows is {args.rows}: ask for at least one conversation")
    facts = read_facts(args.facts)
    if args.endpoint:

        def ask(messages: list[dict]) -> str:
            writer = RemoteModel(args.endpoint, args.model)
            return "".join(writer.answer(messages, Options(temperature=1.0, max_new_tokens=1024)))

        rows, refused = ask_for(facts, ask, args.rows, args.seed)
        for reason, count in refused.most_common():
            print(f"left out {count}: {reason}")
    else:
        rows = list(conversations(facts, args.split, args.seed, args.rows))
    aside = args.output.with_name(f".{args.output.name}.{os.getpid()}")
    aside.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    os.replace(aside, args.output)
    print(f"{len(rows)} conversations of {facts.name} in {args.output}; mix them in: {{dataset: {args.output}}}")


if __name__ == "__main__":
    guarded(main)
