"""Mixtures of conversations for mid-training and SFT: any chat dataset as rows of `messages`, in one shuffled stream.

A mixture is a list of YAML entries, each a dataset spec with a transform:

    mixture:
      - {dataset: HuggingFaceTB/smol-smoltalk, rows: 10000}
      - {dataset: cais/mmlu, subset: auxiliary_train, transform: multiple_choice}
      - {dataset: openai/gsm8k, subset: main, transform: gsm8k, epochs: 4}
      - {dataset: recipes/identity.yaml, epochs: 2}
      - {dataset: data/words.txt, transform: spelling_bee, rows: 80000}
      - {dataset: primer, rows: 20000}

    for row in Mixture(entries, seed=0): row["messages"]

`dataset` is a Hub id, a .jsonl or .parquet file, a folder of them, an identity's .yaml (data/identity.py) or `primer`;
`primer:fact+talk` takes only some kinds. For the spelling transforms it is a .txt file with one word per line, or
text as for pretraining, whose words are taken. `split` is "train" by default. In a folder it selects files by their
names (data/splits.py); of one file it means all rows; of words one in twenty is "test". `rows` takes that many, in an
order drawn from the seed; `epochs` (1, or 0.5) passes over all.

A row that is no conversation is skipped and counted. With on_bad_example="error" it stops the run, as does an entry
without a usable row.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from glob import escape
from itertools import chain, islice, repeat
from pathlib import Path
from random import Random
from zlib import crc32

import pyarrow as pa
import pyarrow.parquet as pq

from ..config import check_value
from ..demo import corpus as primer
from ..errors import InputError
from ..stage_configs import ChatMixture, RLConfig
from . import identity
from .documents import DocumentStream, is_hub_id, local_path, log, parts_of
from .splits import SUFFIXES, files_below, has_suffix, listed, row_files, split_of, tells, unread_files
from .transforms import TRANSFORMS, WORD_TRANSFORMS, BadRow, check, normalize

MAX_LISTED_REASONS = 1000  # bad rows that are listed one by one; more are only counted
MAX_WORD_CHARS = 20_000_000  # of a text that a spelling transform takes its words from
MAX_WORDS = 200_000
WORD = re.compile("[a-z]{3,15}")
MAX_ROWS, MAX_GENERATED = 10**8, 200_000  # of a mixture; of what is made in memory, in 20 s


@dataclass
class DatasetConfig:
    """One entry of a mixture; the first fields are its YAML keys, the others count what it gave."""

    dataset: str
    split: str = "train"
    subset: str | None = None
    transform: str = "messages"
    rows: int | None = None
    epochs: float | None = None
    num_rows: int = field(default=0, init=False)
    num_bad: int = field(default=0, init=False)
    num_tokens: int = field(default=0, init=False)  # counted by whoever tokenizes
    first_bad: dict | None = field(default=None, init=False)  # a row that cannot be used, and why

    @property
    def name(self) -> str:
        return ":".join(part for part in (self.dataset, self.subset, self.transform) if part and part != "messages")

    def count(self, source: Sequence) -> int:
        """How many of the rows of `source` it takes. Raises InputError when there are too few."""
        if not len(source):
            words = ": no words of 3 to 15 letters a-z; name a .txt of words (SpellingBee: eval.words)"
            words *= self.transform in WORD_TRANSFORMS
            raise InputError(f"dataset {self.dataset} has no rows in split {self.split}{words}")
        if self.rows is None:
            if not (rows := round(len(source) * (1 if self.epochs is None else self.epochs))):
                raise InputError(
                    f"{self.epochs:g} epochs of the {len(source)} rows of {self.dataset} are none: raise it"
                )
            return rows
        if self.rows > len(source) and self.transform not in WORD_TRANSFORMS:
            raise InputError(f"{self.dataset} has {len(source)} rows, not {self.rows}: lower rows, or use epochs")
        return self.rows

    def conversation(self, source: Sequence, index: int, rng: Random) -> list[dict]:
        """The checked messages of a row. Raises BadRow with the reason when it cannot be used."""
        try:
            messages = normalize(TRANSFORMS[self.transform](source[index], rng))
            check(messages)
            return messages
        except KeyError as error:
            raise BadRow(f"no column {error}") from None
        except (TypeError, IndexError, AttributeError):
            raise BadRow(f"not in the form that {self.transform} reads") from None


class Mixture:
    """Iterating yields rows {"messages", "entry", "row"}; the last two are numbers, for reports about a row.

    Order and content follow from the entries (the keys of `DatasetConfig`) and the seed alone. `skipped` lists the bad
    rows as {"dataset", "row", "reason"}, numbered from 0. `summary()` counts the rows of each entry. Raises InputError
    for an unknown key, transform or dataset, for more rows than there are, and for a bad row if on_bad_example is
    "error". An entry without a usable row raises it at the end of the iteration.
    """

    def __init__(self, entries: list[dict], seed: int = 0, on_bad_example: str = "skip"):
        self.seed, self.on_bad_example = seed, on_bad_example
        self.entries = [DatasetConfig(**entry) for entry in check_value(ChatMixture, entries, "mixture")]
        self.skipped: list[dict] = []
        self.sources = [open_rows(entry, seed) for entry in self.entries]
        self.counts = [entry.count(source) for entry, source in zip(self.entries, self.sources, strict=True)]
        if len(self) > MAX_ROWS:
            raise InputError(f"the mixture has {len(self):,} rows, more than {MAX_ROWS:,}: lower rows or epochs")

    def __len__(self) -> int:
        """Rows of the mixture, the bad ones included."""
        return sum(self.counts)

    def __iter__(self) -> Iterator[dict]:
        self.skipped.clear()
        for entry in self.entries:
            entry.num_rows = entry.num_bad = entry.num_tokens = 0
            entry.first_bad = None
        order = [number for number, count in enumerate(self.counts) for _ in range(count)]
        Random(f"mixture {self.seed}").shuffle(order)
        streams = [self._rows(number) for number in range(len(self.entries))]
        for number in order:
            if (row := next(streams[number])) is not None:
                yield row
        for entry, source in zip(self.entries, self.sources):
            if entry.first_bad and not entry.num_rows:
                row, reason = entry.first_bad["row"], entry.first_bad["reason"]
                if reason.startswith(("no column", "not in the form")):
                    if isinstance(source[row], dict):
                        reason += f"; its columns are {', '.join(map(str, source[row]))[:100]}"
                    reason += f"; transforms: {', '.join(TRANSFORMS)}"
                raise InputError(f"no row of {entry.name} can be used; row {row}: {reason}")

    def _rows(self, number: int) -> Iterator[dict | None]:
        """An entry's conversations in their order, None in the place of a bad row; epoch after epoch."""
        entry, source, epoch = self.entries[number], self.sources[number], 0
        while True:
            order = list(range(len(source)))
            Random(f"{self.seed} {number} {epoch}").shuffle(order)
            for index in order:
                try:
                    messages = entry.conversation(source, index, Random(f"{self.seed} {number} {epoch} {index}"))
                except BadRow as error:
                    self.skip(number, index, str(error))
                    yield None
                else:
                    entry.num_rows += 1
                    yield {"messages": messages, "entry": number, "row": index}
            epoch += 1

    def skip(self, number: int, row: int, reason: str) -> None:
        """Note a row that cannot be used (also for the trainer: a conversation longer than the context)."""
        entry = self.entries[number]
        if self.on_bad_example == "error":
            raise InputError(f"row {row} of {entry.dataset} cannot be used: {reason}; mend it or set on_bad_example")
        entry.num_bad += 1
        bad = {"dataset": entry.name, "row": row, "reason": reason}
        entry.first_bad = entry.first_bad or bad
        if len(self.skipped) < MAX_LISTED_REASONS and bad not in self.skipped:  # every epoch meets it again
            self.skipped.append(bad)

    def summary(self) -> list[dict]:
        """What the entries gave so far: [{"dataset", "rows", "tokens", "bad"}]."""
        return [
            {"dataset": e.name, "rows": e.num_rows, "tokens": e.num_tokens, "bad": e.num_bad} for e in self.entries
        ]

    def table(self) -> str:
        """`summary` as a table to print, with the first bad row of each entry."""
        rows = self.summary()
        if len(rows) > 1:
            rows.append({"dataset": "total"} | {k: sum(r[k] for r in rows) for k in ("rows", "tokens", "bad")})
        width = max(len(r["dataset"]) for r in rows)
        lines = [f"  {r['dataset']:<{width}}  {r['rows']:>9,}  {r['tokens']:>13,}  {r['bad']:>6,}" for r in rows]
        lines += [f"  {e.name}: row {e.first_bad['row']}: {e.first_bad['reason']}" for e in self.entries if e.num_bad]
        return "\n".join([f"  {'dataset':<{width}}  {'rows':>9}  {'tokens':>13}  {'bad':>6}", *lines])


def log_skipped(stage: str, skipped: list[dict], count: int) -> None:
    """Print how many rows of a dataset a stage leaves out, and why the first of them; nothing for none."""
    for first in skipped[:1]:
        log(f"[{stage}] {count:,} rows of {first['dataset']} are left out; row {first['row']}: {first['reason']}")


class JsonLines(Sequence):
    """The lines of .jsonl files by number, read on demand; only their places are in memory."""

    def __init__(self, paths: list[Path]):
        self.places: list[tuple[int, int]] = []  # (file, byte)
        try:
            self.files = [path.open("rb") for path in paths]
        except OSError as error:  # a link to nothing, no permission
            raise InputError(f"cannot read {error.filename}: {error.strerror}") from None
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


def open_rows(entry: DatasetConfig, seed: int) -> Sequence:
    """The rows of an entry's dataset, by number. Raises InputError when it is missing or cannot be read."""
    path = local_path(entry.dataset)
    generated = entry.dataset.partition(":")[0] == "primer" or path.suffix in (".yaml", ".yml")
    if entry.subset and (generated or path.is_file()):
        raise InputError(f"{entry.dataset} has no subsets: leave subset out")
    if generated:
        return _generated_rows(entry, seed)
    if entry.transform in WORD_TRANSFORMS:
        return [{"word": word} for word in _words(entry, path)]
    if path.is_file() or path.is_dir():  # no pipe, on which reading would wait
        files = _files(entry, path)
        kinds = {p.suffix.lower() for p in files}
        if kinds == {".jsonl"}:
            return JsonLines(files)
        if kinds != {".parquet"}:
            raise InputError(f"{path} is neither .jsonl nor .parquet (a folder must hold one kind only)")
        # The library takes names for patterns: star* would be starfish, too.
        arguments = {"path": "parquet", "data_files": [escape(str(p.absolute())) for p in files], "split": "train"}
    else:
        refuse_missing(entry.dataset)
        arguments = {"path": entry.dataset, "name": entry.subset, "split": entry.split}
    from datasets import load_dataset  # takes a second to import, and the demo does without

    try:
        return load_dataset(**arguments)
    except Exception as error:  # its errors have no common type: missing, offline, no such split, broken file
        raise InputError(f"cannot read dataset {entry.dataset}: {str(error).splitlines()[0][:200]}") from error


def check_data(stage: str, config, elsewhere: bool = False) -> None:
    """Raises InputError if a dataset of a stage's config is missing, as `refuse_missing`, or its `chat_data`.

    elsewhere: only what is on this disk is checked, as for a plan of another machine.
    """

    def check(name: str, *splits: str) -> None:
        if not elsewhere or ":" in name or local_path(name).exists():  # no place has a dataset of such a name
            refuse_missing(name, *splits, skip_bad_files=getattr(config, "skip_bad_files", False))

    folder = getattr(config, "chat_data", None)
    if folder and not elsewhere and not local_path(folder).is_dir():
        raise InputError(f"chat_data: no folder {folder}")
    entries = getattr(config, "mixture", []) + getattr(config, "validation", [])
    if stage == "rl" and config.dataset.partition(":")[0] != "primer":
        entries = [prompts_of(config, split) for split in ("train", "test")]
    elif stage == "dpo":
        entries = [{"dataset": config.dataset, "split": config.split}]
    for part in entries:
        entry, path = DatasetConfig(**part), local_path(part["dataset"])
        check(entry.dataset)
        if entry.dataset.partition(":")[0] == "primer" or (path.suffix in (".yaml", ".yml") and path.exists()):
            rows = entry.rows if (entry.rows or 0) > MAX_GENERATED else 1
            open_rows(replace(entry, rows=rows), 0)  # which refuses a subset, split or transform, or too many rows
        elif path.exists() and holds_rows(entry, path):
            refuse_empty(entry.dataset, _files(entry, path))  # which refuses a split that no name tells
            if stage != "dpo" and not elsewhere:  # the first row that can be used is enough
                next(iter(Mixture([part | {"rows": None, "epochs": None}])))
    if (words := getattr(config, "words", None)) and not local_path(words).is_file():
        check(words, "train")
    splits = {"tokenizer": ("train", "validation"), "base": ("train", "validation"), "eval": ("validation",)}
    for name, _ in parts_of(dataset) if (dataset := getattr(config, "dataset", None)) else ():
        check(name, *splits.get(stage, ()))


def prompts_of(config, split: str) -> dict:
    """The entry of a mixture that gives RL's prompts of a split. Raises InputError for one file as both splits."""
    name = config.dataset.replace("{split}", split)
    if name == config.dataset and local_path(name).is_file():
        raise InputError(f"{name} would be trained on and tested on: write {{split}} for train and test in its name")
    subset = None if local_path(name).is_file() and config.subset == RLConfig.subset else config.subset  # of the Hub's
    return {"dataset": name, "split": split, "subset": subset, "transform": "gsm8k"}


def holds_rows(entry: DatasetConfig, path: Path) -> bool:
    """Whether an entry's rows are in files, and not made from an identity or from words."""
    return path.suffix not in (".yaml", ".yml") and entry.transform not in WORD_TRANSFORMS


def refuse_missing(dataset: str, *splits: str, skip_bad_files: bool = False) -> None:
    """Raises InputError for a dataset that is nothing on this disk and has no Hub id's form.

    `splits` are those of a dataset of texts. One that is on this disk must have a text that can be read in each.
    """
    hub = is_hub_id(dataset) and (splits or dataset.count("/") == 1) and not dataset.endswith((".yaml", ".yml"))
    path = local_path(dataset.replace("{split}", "train"))
    primer_kinds = dataset.partition(":")[0] == "primer" and not splits
    if not (hub or dataset == "primer" or primer_kinds or path.is_file() or path.is_dir()):
        raise InputError(f"no such dataset: {dataset} is no file, no folder and no Hub id")
    for split in splits if path.exists() and dataset != "primer" else ():
        next(chain.from_iterable(repeat(DocumentStream(dataset, split, skip_bad_files=skip_bad_files))))
    if path.exists() and not splits:
        names, kinds = files_below(path) if path.is_dir() else [path.name], (*SUFFIXES, ".txt", ".yaml", ".yml")
        if not any(has_suffix(name, *kinds) for name in names):
            raise InputError(f"dataset {dataset} has no .parquet or .jsonl files")


def refuse_empty(dataset: str, files: Iterable[Path]) -> None:
    """Raises InputError if no file of a split has a row. One that cannot be read is left to its reader."""
    with suppress(OSError, pa.ArrowException):
        for path in files:
            with path.open("rb") as file:
                if pq.read_metadata(file).num_rows if path.suffix == ".parquet" else any(map(bytes.strip, file)):
                    return
        raise InputError(f"dataset {dataset} is empty: {path.name} has no rows")


def _files(entry: DatasetConfig, path: Path) -> list[Path]:
    """The files of an entry's split in a folder, or the one file. Raises InputError where no name tells the split."""
    if path.is_dir():
        everything = files_below(path)
        names = [name for name in everything if has_suffix(name, *SUFFIXES)]
        unread = unread_files(everything, names)
        files = row_files(entry.dataset, names, entry.split, entry.subset, unread)
        if unread := [*unread, *(name for name in names if split_of(name) is None and name not in files)]:
            log(f"dataset {entry.dataset}: not read: {listed(unread)}")
        in_subset = any(f"/{entry.subset}/" in f"/{name}" for name in files)
        if entry.subset not in (None, RLConfig.subset) and not in_subset:  # main, which a copy of GSM8K may lack
            raise InputError(f"folder {entry.dataset} has no subset {entry.subset}: leave subset out")
        return [path / name for name in files]
    if not re.fullmatch(r"\w[\w.-]*", entry.split):  # train[:100], train+test
        raise InputError(
            f"{entry.dataset}: slices such as {entry.split} are for the Hub: give rows, or several entries"
        )
    if split_of(entry.split) != "train" and not tells(path.name, entry.split):  # train, train_prefs: all rows
        advice = "give a file of that name, or leave split out to take all its rows"
        raise InputError(f"{entry.dataset} is one file, and its name does not say it is {entry.split}: {advice}")
    return [path]


def shared(entries: list[dict], others: list[dict]) -> list[str]:
    """The files, or the names of datasets, that entries of both mixtures take rows from."""

    def parts(mixture: list[dict]) -> set[str]:
        names: set[str] = set()
        for entry in (DatasetConfig(**entry) for entry in mixture):
            path = local_path(entry.dataset)
            if not (path.exists() and holds_rows(entry, path)):
                names.add(":".join((entry.dataset, entry.subset or "", entry.split)))
            else:
                names |= {str(file.resolve()) for file in _files(entry, path)}
        return names

    return sorted(parts(entries) & parts(others))


def _generated_rows(entry: DatasetConfig, seed: int) -> list[dict]:
    """The conversations of the primer or of an identity."""
    if entry.transform != "messages":
        raise InputError(f"{entry.dataset} has messages; the transform {entry.transform} does not apply to it")
    if (entry.rows or 0) > MAX_GENERATED:
        raise InputError(f"{entry.dataset} gives at most {MAX_GENERATED:,} rows, not {entry.rows:,}: use epochs")
    name, _, kinds = entry.dataset.partition(":")
    if name != "primer":
        num = entry.rows or identity.NUM_CONVERSATIONS
        return list(identity.conversations(identity.read_identity(entry.dataset), entry.split, seed, num))
    # Whole rounds name every fact, so a short mixture takes the first rounds and not some rows out of all.
    rounds = primer.CONVERSATION_ROUNDS if entry.rows is None else 10**6
    kinds = kinds.split("+") if kinds else primer.CHAT_KINDS
    return list(islice(primer.conversations(entry.split, seed, rounds, kinds), entry.rows))


def _words(entry: DatasetConfig, path: Path) -> list[str]:
    """Words of 3 to 15 ASCII letters: the lines of a .txt, or the words of a text, most frequent first."""
    if path.suffix == ".txt":
        if not path.is_file():
            raise InputError(f"no such file: {path}")
        words = [line.strip() for line in path.open(encoding="utf-8-sig", errors="replace")]
        if left_out := sum(bool(w) and not WORD.fullmatch(w) for w in words):
            log(f"{path}: {left_out:,} of {len(words):,} lines are no word of 3 to 15 letters a-z, and are left out")
    else:
        counts, num_chars = Counter(), 0
        for text in DocumentStream(entry.dataset):
            counts.update(re.findall(r"\b[a-z]{3,15}\b", text))
            num_chars += len(text)
            if num_chars > MAX_WORD_CHARS:
                break
        words = (word for word, count in counts.most_common(MAX_WORDS) if count > 1)  # once: names, misprints
    words = dict.fromkeys(filter(WORD.fullmatch, words))
    return [w for w in words if (crc32(w.encode()) % 20 == 0) == (entry.split != "train")]
