"""Writes docs/works-with.md, where checkpoints run, from the table docs/works-with.yaml.

python scripts/make_works_with.py [--run]    # --run: first the tests that the table names; those that pass date it
"""

import re
import subprocess
import sys
from datetime import date
from pathlib import Path

import yaml

TABLE = Path(__file__).parents[1] / "docs" / "works-with.yaml"
FIELDS = ("engine", "version", "generation_1", "generation_2", "tools", "shown", "date")
INTRO = """# Works with

Made by `python scripts/make_works_with.py` from [works-with.yaml](works-with.yaml).

- Generation 1 is of October 2025, generation 2 of 2026.
- Generation 2 needs the token before (smear), which few engines keep.
- tools: what becomes of the model's calls of the calculator.
- shown: *tested* names a test that runs the engine itself, on a CPU. It passed on the date.
  *ran* says what was run once. *read*: only its source was read.
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


def run_tests() -> None:
    """Run each test file that a row names, slow ones too; where all of it passed, today is the row's date."""
    for name in sorted(set(re.findall(r"tests/test_\w+\.py", TABLE.read_text(encoding="utf-8")))):
        pytest = [sys.executable, "-m", "pytest", "-o", "addopts=", "-q", "-m", "not gpu", name]
        result = subprocess.run(pytest, cwd=TABLE.parents[1], capture_output=True, text=True, check=False)
        summary = result.stdout.strip().rpartition("\n")[2]
        print(f"{name}: {summary}", flush=True)
        if result.returncode == 0 and "skipped" not in summary:  # what lacks its engine skips
            text = TABLE.read_text(encoding="utf-8")
            dated = re.sub(rf"({re.escape(name)}[^}}]*date: )[\d-]+", rf"\g<1>{date.today()}", text)
            TABLE.write_text(dated, encoding="utf-8")


if __name__ == "__main__":
    if "--run" in sys.argv:
        run_tests()
    TABLE.with_suffix(".md").write_text(markdown(), encoding="utf-8")
