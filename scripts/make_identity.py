"""Write conversations of an identity to a .jsonl that a recipe can mix in: from phrasings, or by a better model.

python scripts/make_identity.py --identity recipes/identity.yaml --output identity.jsonl
python scripts/make_identity.py --identity me.yaml --output identity.jsonl --endpoint http://127.0.0.1:8000 --rows 500

A recipe can name the .yaml itself, which does the same from phrasings. The endpoint is any server that speaks OpenAI's
chat protocol: text-generation-inference, vLLM, `transformers serve`, our own.
"""

from nanochat_hf.cli import main

if __name__ == "__main__":
    main("identity")
