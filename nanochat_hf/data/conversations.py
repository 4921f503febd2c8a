"""Mixtures of conversations for mid-training and SFT: any chat data set as rows of `messages`, in one shuffled stream.

A mixture is a list of YAML entries, each a dataset spec with a transform:

    mixture:
      - {dataset: HuggingFaceTB/smol-smoltalk, rows: 10000}
      - {dataset: cais/mmlu, subset: auxiliary_train, transform: multiple_choice}
      - {dataset: openai/gsm8k, subset: main, transform: gsm8k, epochs: 4}
      - {dataset: recipes/identity.yaml, epochs: 2}
      - {dataset: data/words.txt, transform: spelling_bee, rows: 80000}
      - {dataset: primer, rows: 20000}

    for row in Mixture(entries, seed=0): row["messages"]

`dataset` is a Hub id, a .jsonl or .parquet file, a folder of them (for the spelling transforms: a .txt file with a
word a line, or text as for pretraining, whose words are taken), a .yaml of facts (a personality: data/personality.py),
or `primer` (of some kinds only: `primer:fact+talk`). `split` is "train" unless told; of a folder it takes the files
that are named after it (data/splits.py), of one file all rows, if its name says the split or it is a "train", and of
words one in twenty is "test". `rows` takes so many, in an order drawn from the seed; `epochs` (1; 0.5 will do) passes
over all. Rows are read when their turn comes. A row that is no conversation is skipped, and counted with its number
and the reason; bad_rows="refuse" stops the run, and so does an entry without a usable row.
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from random import Random

from ..errors import InputError
from .sources import Entry, open_rows
from .transforms import TRANSFORMS, BadRow, check, normalize

REASONS_KEPT = 1000  # bad rows that are remembered one by one; more are only counted


class Mixture:
    """Iterating gives rows {"messages", "entry", "row"}: the entry's number and the row's, for messages about it.

    The order and the content follow from the entries and the seed alone. After (or while) iterating, `skipped` lists
    the bad rows as {"dataset", "row", "reason"}, numbered from 0, and `summary()` what each entry gave.

    Args:
        entries: dicts with the keys of `Entry`; `dataset` is required.
        seed: of the order of rows, and of what the generating transforms draw.
        bad_rows: "skip" or "refuse".

    Raises:
        InputError: an unknown key, transform or dataset, more rows than there are, a bad row when refused, and at the
            end of an iteration an entry of which no row could be used.
    """

    def __init__(self, entries: list[dict], seed: int = 0, bad_rows: str = "skip"):
        if bad_rows not in ("skip", "refuse"):
            raise InputError(f"bad_rows is {bad_rows!r}: use skip or refuse")
        if not entries:
            raise InputError("the mixture is empty: give at least one entry with a dataset")
        self.seed, self.bad_rows = seed, bad_rows
        self.entries = [Entry.read(entry) for entry in entries]
        self.skipped: list[dict] = []
        self.sources = [open_rows(entry, seed) for entry in self.entries]
        self.counts = [entry.count(source) for entry, source in zip(self.entries, self.sources, strict=True)]

    def __len__(self) -> int:
        """Rows of the mixture, the bad ones among them."""
        return sum(self.counts)

    def __iter__(self) -> Iterator[dict]:
        self.skipped.clear()
        for entry in self.entries:
            entry.num_rows = entry.num_bad = entry.num_tokens = 0
            entry.first_bad = None
        turns = [number for number, count in enumerate(self.counts) for _ in range(count)]
        Random(f"mixture {self.seed}").shuffle(turns)
        streams = [self._rows(number) for number in range(len(self.entries))]
        for number in turns:
            row = next(streams[number], None)
            if row is not None:
                yield row
        for entry, source in zip(self.entries, self.sources):
            if entry.first_bad and not entry.num_rows:
                row, reason = entry.first_bad["row"], entry.first_bad["reason"]
                if reason.startswith(("no column", "not in the form")):
                    reason += f"{columns_of(source, row)}; transforms: {', '.join(TRANSFORMS)}"
                raise InputError(f"no row of {entry.name} can be used; row {row}: {reason}")

    def _rows(self, number: int) -> Iterator[dict | None]:
        """An entry's conversations in their order, None in the place of a bad row."""
        entry, source, left, epoch = self.entries[number], self.sources[number], self.counts[number], 0
        while left > 0:
            order = list(range(len(source)))
            Random(f"{self.seed} {number} {epoch}").shuffle(order)
            for index in order[:left]:
                try:
                    rng = Random(f"{self.seed} {number} {epoch} {index}")
                    conversation = normalize(TRANSFORMS[entry.transform](source[index], rng))
                    check(conversation)
                    entry.num_rows += 1
                    yield {"messages": conversation, "entry": number, "row": index}
                except (BadRow, KeyError, TypeError, IndexError, AttributeError) as error:
                    reason = (
                        str(error) if isinstance(error, BadRow) else f"not in the form that {entry.transform} reads"
                    )
                    if isinstance(error, KeyError):
                        reason = f"no column {error}"
                    self.skip(number, index, reason)
                    yield None
            left, epoch = left - len(order), epoch + 1

    def skip(self, number: int, row: int, reason: str) -> None:
        """Notes a row that cannot be used (also for the trainer: a conversation longer than the context)."""
        entry = self.entries[number]
        if self.bad_rows == "refuse":
            raise InputError(f"row {row} of {entry.dataset} cannot be used: {reason}; mend it or set bad_rows: skip")
        entry.num_bad += 1
        named = {"dataset": entry.name, "row": row, "reason": reason}
        entry.first_bad = entry.first_bad or named
        if len(self.skipped) < REASONS_KEPT and named not in self.skipped:  # every epoch comes by
            self.skipped.append(named)

    def summary(self) -> list[dict]:
        """What the entries gave so far: [{"dataset", "rows", "tokens", "bad"}]."""
        names = {"rows": "num_rows", "tokens": "num_tokens", "bad": "num_bad"}
        return [{"dataset": e.name} | {key: getattr(e, name) for key, name in names.items()} for e in self.entries]

    def table(self) -> str:
        """`summary` as a table to print."""
        rows = self.summary()
        rows.append({"dataset": "total"} | {k: sum(r[k] for r in rows) for k in ("rows", "tokens", "bad")})
        width = max(len(r["dataset"]) for r in rows)
        lines = [f"{'dataset':<{width}}  {'rows':>9}  {'tokens':>13}  {'bad':>6}"]
        return "\n".join(
            lines + [f"{r['dataset']:<{width}}  {r['rows']:>9,}  {r['tokens']:>13,}  {r['bad']:>6,}" for r in rows]
        )


def columns_of(source: Sequence, number: int) -> str:
    """What a row has, to say beside why it cannot be used; "" where it is no mapping."""
    with suppress(BadRow):
        if isinstance(row := source[number], dict):
            return f"; its columns are {', '.join(map(str, row))[:100]}"
    return ""
