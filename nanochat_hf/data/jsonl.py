"""JSONL whose rows must have certain fields; a wrong line raises one DamagedFile with file, line and reason.

read_jsonl(Path("gsm8k_test.jsonl"), {"question": str, "answer": str})   # [{"question": ...}, ...]
"""

import json
from pathlib import Path


class DamagedFile(ValueError):
    """A file that is there and cannot be used, unlike one that is missing."""


def numbered_lines(path: Path) -> list[tuple[int, bytes]]:
    """(number from 1, bytes) of the lines that are not blank. Raises DamagedFile if there is none."""
    lines = [(number, line) for number, line in enumerate(path.read_bytes().split(b"\n"), 1) if line.strip()]
    if not lines:
        raise DamagedFile(f"{path} is empty: put the complete file there")
    return lines


def decode(path: Path, number: int, line: bytes) -> str:
    try:
        return line.decode("utf-8-sig").rstrip("\r")
    except UnicodeDecodeError as error:
        raise damaged(path, number, f"no UTF-8 at byte {error.start + 1}") from None


def parse_row(path: Path, number: int, line: bytes, fields: dict[str, type | tuple[type, ...]]) -> dict:
    """The row of one line; `fields` names what it must have, and of which type."""
    try:
        row = json.loads(decode(path, number, line))
    except json.JSONDecodeError as error:
        raise damaged(path, number, f"no JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise damaged(path, number, "nested too deeply") from None
    if not isinstance(row, dict):
        raise damaged(path, number, "no JSON object")
    for name, kind in fields.items():
        if name not in row:
            raise damaged(path, number, f"no field {name!r}")
        if not isinstance(row[name], kind):
            raise damaged(path, number, f"{name!r} is {json.dumps(row[name])[:40]}")
    return row


def damaged(path: Path, number: int, reason: str) -> DamagedFile:
    return DamagedFile(f"{path}, line {number}: {reason}; repair that line or take the complete file")


def read_jsonl(path: Path, fields: dict[str, type | tuple[type, ...]]) -> list[dict]:
    return [parse_row(path, number, line, fields) for number, line in numbered_lines(path)]
