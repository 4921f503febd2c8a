"""Where the rows of a mixture come from: any data set as a sequence of rows that are read by number.

A Hub id, .jsonl or .parquet files or a folder of them, words of a list or of a text, conversations that are made here
(the primer, a personality). Conversations.py shuffles the numbers, so only what a run needs is read.

    rows = open_rows(Entry("openai/gsm8k", subset="main"), seed=0)
    len(rows), rows[7]
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from glob import escape
from itertools import islice
from pathlib import Path
from zlib import crc32

from ..errors import InputError
from . import personality, primer
from .corpus import DocumentStream
from .corpus_files import files_below, is_hub_id, local_path, say
from .splits import SUFFIXES, has_suffix, listed, row_files, split_of, tells, unread_files
from .transforms import TRANSFORMS, WORD_TRANSFORMS, BadRow

WORD_CHARACTERS = 20_000_000  # of a text that a spelling transform takes its words from
MAX_WORDS = 200_000


@dataclass
class Entry:
    """One entry of a mixture; the fields are its YAML keys, the rest counts what was yielded."""

    dataset: str
    split: str = "train"
    subset: str | None = None
    transform: str = "messages"
    rows: int | None = None
    epochs: float | None = None
    num_rows: int = field(default=0, init=False)
    num_bad: int = field(default=0, init=False)
    num_tokens: int = field(default=0, init=False)  # filled in by whoever tokenizes
    first_bad: dict | None = field(default=None, init=False)  # a row that cannot be used, and why

    @classmethod
    def read(cls, entry: dict) -> "Entry":
        """From YAML. Raises InputError for a missing data set, an unknown key or transform, rows beside epochs."""
        if not isinstance(entry, dict) or not isinstance(entry.get("dataset"), str):
            raise InputError(f"an entry of the mixture needs a dataset: {entry}")
        name, known = entry["dataset"], [f.name for f in fields(cls) if f.init]
        if unknown := [key for key in entry if key not in known]:
            raise InputError(f"unknown key {unknown[0]!r} in the mixture's entry for {name}: use {', '.join(known)}")
        made = cls(**entry)
        if made.transform not in TRANSFORMS:
            raise InputError(f"unknown transform {made.transform!r} for {name}: use one of {', '.join(TRANSFORMS)}")
        if made.rows is not None and made.epochs is not None:
            raise InputError(f"{name}: give rows or epochs, not both")
        for key, kind in (("rows", int), ("epochs", int | float)):
            value = getattr(made, key)
            if value is not None and (not isinstance(value, kind) or isinstance(value, bool) or value <= 0):
                raise InputError(f"{name}: {key} is {value!r}, not a positive number")
        return made

    @property
    def name(self) -> str:
        return ":".join(part for part in (self.dataset, self.subset, self.transform) if part and part != "messages")

    def count(self, source: Sequence) -> int:
        """How many of the rows of `source` it takes. Raises InputError when there are too few."""
        if not len(source):
            raise InputError(f"dataset {self.dataset} has no rows in split {self.split}")
        if self.rows is None:
            return round(len(source) * (1 if self.epochs is None else self.epochs))
        if self.rows > len(source) and self.transform not in WORD_TRANSFORMS:
            raise InputError(f"{self.dataset} has {len(source)} rows, not {self.rows}: lower rows, or use epochs")
        return self.rows


class JsonLines(Sequence):
    """The lines of .jsonl files by number, read when asked for; only their places are in memory."""

    def __init__(self, paths: list[Path]):
        self.places: list[tuple[int, int]] = []  # (file, byte)
        self.files = [path.open("rb") for path in paths]
        for number, file in enumerate(self.files):
            position = 0
            for line in file:
                if line.strip():
                    self.places.append((number, position))
                position += len(line)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> dict:
        number, position = self.places[index]
        self.files[number].seek(position)
        try:
            return json.loads(self.files[number].readline())
        except (ValueError, RecursionError) as error:  # also JSONDecodeError and UnicodeDecodeError
            raise BadRow("not JSON") from error


def open_rows(entry: Entry, seed: int) -> Sequence:
    """The rows of an entry's data set, by number. Raises InputError when it is missing or cannot be read."""
    path = local_path(entry.dataset)
    if entry.dataset.partition(":")[0] == "primer" or path.suffix in (".yaml", ".yml"):
        return _made_rows(entry, seed)
    if entry.transform in WORD_TRANSFORMS:
        return [{"word": word} for word in _words(entry, path)]
    if path.exists():
        files = _files(entry, path)
        kinds = {p.suffix.lower() for p in files}
        if kinds == {".jsonl"}:
            return JsonLines(files)
        if kinds != {".parquet"}:
            raise InputError(f"{path} is neither .jsonl nor .parquet (a folder must hold one kind only)")
        # The library takes names for patterns: star* would be starfish, too.
        arguments = {"path": "parquet", "data_files": [escape(str(p.absolute())) for p in files], "split": "train"}
    elif is_hub_id(entry.dataset) and entry.dataset.count("/") == 1:
        arguments = {"path": entry.dataset, "name": entry.subset, "split": entry.split}
    else:
        raise InputError(f"no such dataset: {entry.dataset} is no file, no folder and no Hub id")
    from datasets import load_dataset  # takes a second to import, and the demo does without

    try:
        return load_dataset(**arguments)
    except Exception as error:  # its errors have no common type: missing, offline, no such split, broken file
        raise InputError(f"cannot read dataset {entry.dataset}: {str(error).splitlines()[0][:200]}") from error


def _files(entry: Entry, path: Path) -> list[Path]:
    """The files of an entry's split in a folder, or the one file. Raises InputError where no name tells the split."""
    if path.is_dir():
        everything = files_below(path)
        names = [name for name in everything if has_suffix(name, *SUFFIXES)]
        unread = unread_files(everything, names)
        files = row_files(entry.dataset, names, entry.split, entry.subset, unread)
        if unread:
            say(f"dataset {entry.dataset}: not read: {listed(unread)}")
        return [path / name for name in files]
    if split_of(entry.split) != "train" and not tells(path.name, entry.split):  # train, train_prefs: all rows
        raise InputError(
            f"{entry.dataset} is one file, and its name does not say that it is the split {entry.split}: give a file "
            "of that name, or leave split out to take all its rows"
        )
    return [path]


def shared(entries: list[dict], others: list[dict]) -> list[str]:
    """The files, or the names of data sets, that entries of both mixtures take rows from."""

    def parts(mixture: list[dict]) -> set[str]:
        taken: set[str] = set()
        for entry in map(Entry.read, mixture):
            path = local_path(entry.dataset)
            if path.suffix in (".yaml", ".yml") or entry.transform in WORD_TRANSFORMS or not path.exists():
                taken.add(":".join((entry.dataset, entry.subset or "", entry.split)))
            else:
                taken |= {str(file.resolve()) for file in _files(entry, path)}
        return taken

    return sorted(parts(entries) & parts(others))


def _made_rows(entry: Entry, seed: int) -> list[dict]:
    """The conversations of the primer or of a personality, made here."""
    if entry.transform != "messages":
        raise InputError(f"{entry.dataset} has messages; the transform {entry.transform} does not apply to it")
    name, _, kinds = entry.dataset.partition(":")
    if name != "primer":
        facts = personality.read_facts(entry.dataset)
        return list(personality.conversations(facts, entry.split, seed, entry.rows or personality.ROWS))
    # Whole rounds name every fact, so a short mixture takes the first rounds and not some rows out of all.
    rounds = primer.CONVERSATION_ROUNDS if entry.rows is None else 10**6
    kinds = kinds.split("+") if kinds else primer.CHAT_KINDS
    return list(islice(primer.conversations(entry.split, seed, rounds, kinds), entry.rows))


def _words(entry: Entry, path: Path) -> list[str]:
    """The data set's words: ascii letters, 3 to 15 of them; the split "test" is one word in twenty.

    They are the lines of a .txt; of other text, the words of its beginning, the most frequent first.
    """
    if path.suffix == ".txt":
        if not path.exists():
            raise InputError(f"no such file: {path}")
        found = (line.strip() for line in path.open(encoding="utf-8", errors="replace"))
    else:
        counts, characters = Counter(), 0
        for text in DocumentStream(entry.dataset):
            counts.update(re.findall(r"\b[a-z]{3,15}\b", text))
            characters += len(text)
            if characters > WORD_CHARACTERS:
                break
        # Those seen once are too often names and misprints.
        found = (word for word, count in counts.most_common(MAX_WORDS) if count > 1)
    words = dict.fromkeys(w for w in found if re.fullmatch("[a-z]{3,15}", w))
    return [w for w in words if (crc32(w.encode()) % 20 == 0) == (entry.split != "train")]


def content_fingerprint(rows: Sequence) -> str:
    """A short hash of what `open_rows` gave: of the files' bytes, or of the rows that were made here.

    For data sets of the Hub the `datasets` library's own, which follows from the commit and the files in its cache.
    """
    if not isinstance(rows, JsonLines | list):
        return rows._fingerprint
    digest = hashlib.sha256()
    if isinstance(rows, JsonLines):
        for file in rows.files:
            file.seek(0)
            digest.update(hashlib.file_digest(file, "sha256").digest())
    else:
        for row in rows:
            digest.update(json.dumps(row, sort_keys=True).encode())
    return digest.hexdigest()[:16]
