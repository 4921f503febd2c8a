"""Two sizes that the report card shows: of the project's own sources, and of text in a tokenizer's tokens.

bloat()                 # {"characters": 918123, "lines": 23132, "files": 160, ..., "dependencies": 16}
compression(tokenizer)  # {"books": {"ours": 4.4, "GPT-2": 4.2, "GPT-4": None}, "code": ...}
"""

import os
import tomllib
from collections.abc import Callable
from pathlib import Path

from transformers import AutoTokenizer

ROOT = Path(__file__).parents[2]
OTHERS = {"GPT-2": "openai-community/gpt2", "GPT-4": "Xenova/gpt-4"}
SOURCES = ("py", "md", "yaml", "toml", "jinja", "html")


def bloat(root: Path | None = None) -> dict[str, int] | None:
    """Size of the project's own sources: what a newcomer has to read. None outside of a checkout."""
    root = root or ROOT
    if not (root / "pyproject.toml").is_file():
        return None
    texts = []
    for folder, below, names in os.walk(root):
        below[:] = [
            name for name in below if not name.startswith(".") and name not in ("runs", "build", "__pycache__")
        ]
        texts += [Path(folder, n).read_text("utf-8", "replace") for n in names if n.rsplit(".", 1)[-1] in SOURCES]
    characters = sum(map(len, texts))
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    return {
        "characters": characters,
        "lines": sum(text.count("\n") for text in texts),
        "files": len(texts),
        "tokens": characters // 4,
        "dependencies": len(project["dependencies"]),
    }


def compression(tokenizer) -> dict[str, dict[str, float | None]]:
    """Bytes per token on a page of a book, code, Korean and mathematics (evals/texts), beside GPT-2's and GPT-4's
    tokenizers where the Hub's cache on this machine has them; None where not."""
    columns: dict[str, Callable] = {"ours": tokenizer}
    for name, place in OTHERS.items():
        try:
            columns[name] = AutoTokenizer.from_pretrained(place, local_files_only=True)
        except (OSError, ValueError):
            columns[name] = None
    table = {}
    for path in sorted((ROOT / "evals" / "texts").glob("*.txt")):
        text = path.read_text(encoding="utf-8")
        size = len(text.encode())
        counts = {name: t and len(t(text, add_special_tokens=False)["input_ids"]) for name, t in columns.items()}
        table[path.stem] = {name: size / count if count else None for name, count in counts.items()}
    return table
