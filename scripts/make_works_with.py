"""Prints docs/works-with.md, where checkpoints run, from the table docs/works-with.yaml.

python scripts/make_works_with.py > docs/works-with.md
"""

from pathlib import Path

import yaml

TABLE = Path(__file__).parents[1] / "docs" / "works-with.yaml"
FIELDS = ("engine", "version", "generation_1", "generation_2", "tools", "shown", "date")
INTRO = """# Works with

Made by `python scripts/make_works_with.py` from [works-with.yaml](works-with.yaml).

- Generation 1 is of October 2025, generation 2 of 2026; it needs the token before (smear), which few engines keep.
- tools: what becomes of the model's calls of the calculator.
- shown: *tested* names a test that runs the engine itself, on a CPU; *ran* says what was run once; *read*: its source.
"""


def markdown() -> str:
    lines = [INTRO]
    for title, rows in yaml.safe_load(TABLE.read_text(encoding="utf-8")).items():
        lines += [f"## {title}", ""]
        lines += [f"| {' | '.join(FIELDS).replace('_', ' ')} |", "|---" * len(FIELDS) + "|"]
        for row in rows:
            cells = ["yes" if row[field] is True else str(row[field]) for field in FIELDS]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
