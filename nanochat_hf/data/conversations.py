"""Mixtures of conversations for mid-training and SFT: any chat data set as rows of `messages`, in one shuffled stream.

A mixture is a list of YAML entries, each a dataset spec with a transform:

    mixture:
      - {dataset: HuggingFaceTB/smol-smoltalk, rows: 10000}
      - {dataset: cais/mmlu, subset: auxiliary_train, transform: multiple_choice}
      - {dataset: openai/gsm8k, subset: main, transform: gsm8k, epochs: 4}
      - {dataset: data/identity.jsonl, epochs: 2}
      - {dataset: data/words.txt, transform: spelling_bee, rows: 80000}
      - {dataset: primer, rows: 20000}

    for row in Mixture(entries, seed=0): row["messages"]

`dataset` is a Hub id, a .jsonl or .parquet file, a folder of them (for the spelling transforms: a .txt file with a
word a line, or text as for pretraining, whose words are taken), or `primer` (of some kinds only: `primer:fact+talk`).
`split` is "train" unless told; of the files of a folder it takes those whose names begin with it, and of words one in
twenty is "test". `rows` takes so many, in an order drawn from the seed; `epochs` (1; 0.5 will do) passes over all.
Rows are read when their turn comes. A row that is no conversation is skipped, and counted with its number and the
reason; bad_rows="refuse" stops the run.

The transforms keep karpathy/nanochat's protocols to the letter where its checkpoints depend on them: the
multiple-choice prompt, GSM8K's calculator calls, the answers to the spelling tasks.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from random import Random
from zlib import crc32

from ..errors import InputError
from . import primer
from .corpus import DocumentStream

WORD_CHARACTERS = 20_000_000  # of a text that a spelling transform takes its words from
MAX_WORDS = 200_000
REASONS_KEPT = 1000  # bad rows that are remembered one by one; more are only counted
KEYS = ("dataset", "split", "subset", "transform", "rows", "epochs")


# Transforms: a row of the data set -> messages. A row that cannot be used raises BadRow (or KeyError, TypeError)


class BadRow(ValueError):
    """A row is no usable conversation; the text says why."""


def messages(row: dict, rng: Random) -> list[dict]:
    """Conversations as they are: {"messages": [...]}, or the bare list (upstream's identity file)."""
    return row if isinstance(row, list) else row["messages"]


def multiple_choice(row: dict, rng: Random) -> list[dict]:
    """MMLU: {"question", "choices", "answer": index}; ARC: {"choices": {"text", "label"}, "answerKey"}."""
    row = row.get("train") or row  # MMLU's auxiliary_train hides its rows one level down
    question, choices = row["question"], row["choices"]
    if isinstance(choices, dict):
        letters, choices, answer = choices["label"], choices["text"], row["answerKey"]
    else:
        letters = "ABCDEFGHIJ"[: len(choices)]
        answer = letters[row["answer"]] if isinstance(row["answer"], int) else row["answer"]
    if answer not in list(letters) or len(choices) < 2:
        raise BadRow(f"the answer {answer!r} is none of the choices' letters")
    return [
        {"role": "user", "content": render_choices(question, letters, choices)},
        {"role": "assistant", "content": answer},
    ]


def render_choices(question: str, letters: Sequence[str], choices: Sequence[str]) -> str:
    """The multiple-choice prompt. The letter comes after the text, right behind `=`: so it binds to the text, and is
    one token without a space before it, the same that answers."""
    lines = "".join(f"- {choice}={letter}\n" for letter, choice in zip(letters, choices, strict=True))
    return f"Multiple Choice question: {question}\n{lines}\nRespond only with the letter of the correct answer."


def gsm8k(row: dict, rng: Random) -> list[dict]:
    """{"question", "answer"}: each `<<expression=result>>` of the answer becomes a tool call and its result."""
    parts = re.split(r"<<([^>]*)>>", row["answer"])
    if "#### " not in parts[-1]:
        raise BadRow("the answer has no '#### '")
    replies = []
    for text, inner in zip(parts[0::2], parts[1::2], strict=False):
        expression, equals, result = inner.rpartition("=")
        if not (expression and equals and result):
            raise BadRow(f"no expression and result in <<{inner}>>")
        replies += [assistant_call(text, expression), {"role": "tool", "name": "python", "content": result}]
    return [{"role": "user", "content": row["question"]}, *replies, {"role": "assistant", "content": parts[-1]}]


def simple_spelling(row: dict, rng: Random) -> list[dict]:
    """{"word"} -> the word spelled, its letters separated by commas."""
    word = row["word"]
    return [
        {"role": "user", "content": f"Spell the word: {word}"},
        {"role": "assistant", "content": ",".join(word)},
    ]


COUNT_QUESTIONS = (
    "How many {l} are in {w}",
    "How many {l} are there in {w}",
    "How many {l} does {w} have",
    "How many times does {l} appear in {w}",
    "How often does {l} occur in {w}",
    "How often is {l} in {w}",
    "Count the {l} in {w}",
    "Count how many {l} there are in {w}",
    "Can you count the {l} in {w}",
    "What is the number of {l} in {w}",
    "What's the count of {l} in {w}",
    "Tell me how many {l} are in {w}",
    "Find the number of times {l} is used in {w}",
    "In {w}, how many {l} do you see",
    "In the word {w}, count the letter {l}",
    "{w}: how many {l}",
    "number of {l} in {w}",
    "¿Cuántas {l} hay en {w}",
    "¿Cuántas veces aparece {l} en {w}",
    "Combien de {l} y a-t-il dans {w}",
    "Combien de fois {l} apparaît dans {w}",
    "Wie viele {l} sind in {w}",
    "Wie oft kommt {l} in {w} vor",
    "Quante {l} ci sono in {w}",
    "Quantos {l} há em {w}",
    "Hoeveel {l} zitten er in {w}",
    "Hur många {l} finns i {w}",
    "Ile liter {l} jest w {w}",
    "Сколько букв {l} в слове {w}",
    "{w} 中有多少个 {l}",
    "{w} に {l} は何個ありますか",
    "{w}에 {l}가 몇 개 있나요",
)


def spelling_bee(row: dict, rng: Random) -> list[dict]:
    """{"word"} -> how often a letter stands in it: spelled and counted by hand, checked with the tool, `#### n`."""
    word = row["word"]
    letter = rng.choice(word) if rng.random() < 0.9 else rng.choice("abcdefghijklmnopqrstuvwxyz")
    quote_letter, quote_word = rng.choice(("", "'", '"')), rng.choice(("", "'", '"'))
    question = rng.choice(COUNT_QUESTIONS).format(
        l=f"{quote_letter}{letter}{quote_letter}", w=f"{quote_word}{word}{quote_word}"
    )
    if rng.random() < 0.3:
        question = question.lower()
    if rng.random() < 0.5:
        question += "?"
    lines, count = [], 0
    for position, character in enumerate(word, 1):
        count += character == letter
        lines.append(f"{position}:{character}" + (f" that is {letter} number {count}" if character == letter else ""))
    by_hand = (
        f"Let me find every '{letter}' in '{word}'. First I spell the word:\n{word}:{','.join(word)}\n\n"
        f"Then I go through the letters:\n" + "\n".join(lines) + f"\n\nBy hand I count {count}. Python checks it:\n\n"
    )
    return [
        {"role": "user", "content": question},
        assistant_call(by_hand, f"'{word}'.count('{letter}')"),
        {"role": "tool", "name": "python", "content": str(count)},
        {"role": "assistant", "content": f"\n\nPython says {count}, so that is the answer.\n\n#### {count}"},
    ]


def assistant_call(text: str, expression: str) -> dict:
    """An assistant message that says `text` and then calls the python tool."""
    function = {"name": "python", "arguments": {"expression": expression}}
    return {"role": "assistant", "content": text, "tool_calls": [{"type": "function", "function": function}]}


TRANSFORMS: dict[str, Callable[[dict, Random], list[dict]]] = {
    f.__name__: f for f in (messages, multiple_choice, gsm8k, simple_spelling, spelling_bee)
}
WORD_TRANSFORMS = ("simple_spelling", "spelling_bee")


def check(conversation: list[dict]) -> None:
    """Raises BadRow unless the messages are a conversation that the chat template renders and a model learns from."""
    if not isinstance(conversation, list) or not conversation or not all(isinstance(m, dict) for m in conversation):
        raise BadRow("no messages")
    turns = conversation[1:] if conversation[0].get("role") == "system" else conversation
    if not turns or turns[-1].get("role") != "assistant":
        raise BadRow("the last message is not the assistant's")
    expected = ("user",)
    for number, message in enumerate(turns, len(conversation) - len(turns) + 1):
        role, content, calls = message.get("role"), message.get("content"), message.get("tool_calls")
        if role not in expected:
            raise BadRow(f"message {number} is of role {role!r}, expected {' or '.join(expected)}")
        if isinstance(content, list):
            for part in content:
                if not isinstance(part, dict) or part.get("type") not in ("text", "python", "python_output"):
                    raise BadRow(f"message {number} has an unknown part: {str(part)[:60]}")
                if not isinstance(part.get("text"), str):
                    raise BadRow(f"message {number} has a part without text")
                if part["type"] != "text" and role != "assistant":
                    raise BadRow(f"message {number} has a tool call and is not the assistant's")
        elif not isinstance(content, str) and not (content is None and calls):
            raise BadRow(f"message {number} has no text")
        if not content and not calls and role != "tool":
            raise BadRow(f"message {number} is empty")
        if calls and (role != "assistant" or not all(isinstance(c, dict) and c.get("function") for c in calls)):
            raise BadRow(f"message {number} has a tool call that is none")
        expected = {
            "user": ("assistant",),
            "tool": ("tool", "assistant"),
            "assistant": ("tool",) if calls else ("user",),
        }[role]


# Sources: the rows of a data set, by number


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
        except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
            raise BadRow("not JSON") from error


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

    @property
    def name(self) -> str:
        return ":".join(part for part in (self.dataset, self.subset, self.transform) if part and part != "messages")


class Mixture:
    """Iterating gives rows {"messages", "entry", "row"}: the entry's number and the row's, for messages about it.

    The order and the content follow from the entries and the seed alone. After (or while) iterating, `skipped` lists
    the bad rows as {"dataset", "row", "reason"} and `summary()` what each entry gave.

    Args:
        entries: dicts with the keys of `Entry`; `dataset` is required.
        seed: of the order of rows, and of what the generating transforms draw.
        bad_rows: "skip" or "refuse".

    Raises:
        InputError: an unknown key, transform or dataset, more rows than there are, or a bad row when refused.
    """

    def __init__(self, entries: list[dict], seed: int = 0, bad_rows: str = "skip"):
        if bad_rows not in ("skip", "refuse"):
            raise InputError(f"bad_rows is {bad_rows!r}: use skip or refuse")
        if not entries:
            raise InputError("the mixture is empty: give at least one entry with a dataset")
        self.seed, self.bad_rows = seed, bad_rows
        self.entries = [_entry(entry) for entry in entries]
        self.skipped: list[dict] = []
        self.sources = [_open(entry, seed) for entry in self.entries]
        self.counts = [_count(entry, source) for entry, source in zip(self.entries, self.sources, strict=True)]

    def __len__(self) -> int:
        """Rows of the mixture, the bad ones among them."""
        return sum(self.counts)

    def __iter__(self) -> Iterator[dict]:
        self.skipped.clear()
        for entry in self.entries:
            entry.num_rows = entry.num_bad = entry.num_tokens = 0
        turns = [number for number, count in enumerate(self.counts) for _ in range(count)]
        Random(f"mixture {self.seed}").shuffle(turns)
        streams = [self._rows(number) for number in range(len(self.entries))]
        for number in turns:
            row = next(streams[number], None)
            if row is not None:
                yield row

    def _rows(self, number: int) -> Iterator[dict | None]:
        """An entry's conversations in their order, None in the place of a bad row."""
        entry, source, left, epoch = self.entries[number], self.sources[number], self.counts[number], 0
        while left > 0:
            order = list(range(len(source)))
            Random(f"{self.seed} {number} {epoch}").shuffle(order)
            for index in order[:left]:
                try:
                    rng = Random(f"{self.seed} {number} {epoch} {index}")
                    conversation = TRANSFORMS[entry.transform](source[index], rng)
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
        if len(self.skipped) < REASONS_KEPT:
            self.skipped.append({"dataset": entry.name, "row": row, "reason": reason})

    def summary(self) -> list[dict]:
        """What the entries gave so far: [{"dataset", "rows", "tokens", "bad"}]."""
        return [
            {"dataset": e.name, "rows": e.num_rows, "tokens": e.num_tokens, "bad": e.num_bad} for e in self.entries
        ]

    def table(self) -> str:
        """`summary` as a table to print."""
        rows = self.summary()
        rows.append({"dataset": "total"} | {k: sum(r[k] for r in rows) for k in ("rows", "tokens", "bad")})
        width = max(len(r["dataset"]) for r in rows)
        lines = [f"{'dataset':<{width}}  {'rows':>9}  {'tokens':>13}  {'bad':>6}"]
        return "\n".join(
            lines + [f"{r['dataset']:<{width}}  {r['rows']:>9,}  {r['tokens']:>13,}  {r['bad']:>6,}" for r in rows]
        )


def _entry(entry: dict) -> Entry:
    if not isinstance(entry, dict) or "dataset" not in entry:
        raise InputError(f"an entry of the mixture needs a dataset: {entry}")
    for key in entry:
        if key not in KEYS:
            raise InputError(
                f"unknown key {key!r} in the mixture's entry for {entry['dataset']}: use {', '.join(KEYS)}"
            )
    made = Entry(**entry)
    if made.transform not in TRANSFORMS:
        raise InputError(
            f"unknown transform {made.transform!r} for {made.dataset}: use one of {', '.join(TRANSFORMS)}"
        )
    if made.rows is not None and made.epochs is not None:
        raise InputError(f"{made.dataset}: give rows or epochs, not both")
    return made


def _count(entry: Entry, source: Sequence) -> int:
    if not len(source):
        raise InputError(f"dataset {entry.dataset} has no rows in split {entry.split}")
    if entry.rows is None:
        return round(len(source) * (1 if entry.epochs is None else entry.epochs))
    if entry.rows > len(source) and entry.transform not in WORD_TRANSFORMS:
        raise InputError(f"{entry.dataset} has {len(source)} rows, not {entry.rows}: lower rows, or use epochs")
    return entry.rows


def _open(entry: Entry, seed: int) -> Sequence:
    """The rows of an entry's data set, by number."""
    if entry.dataset.partition(":")[0] == "primer":
        return _primer_rows(entry, seed)
    if entry.transform in WORD_TRANSFORMS:
        return [{"word": word} for word in _words(entry)]
    path = Path(entry.dataset).expanduser()
    if path.is_dir():
        files = sorted(
            p for p in path.iterdir() if p.suffix in (".jsonl", ".parquet") and p.name.startswith(entry.split)
        )
        if not files:
            raise InputError(f"folder {path} has no .jsonl or .parquet files named {entry.split}*")
    elif path.exists():
        files = [path]
    else:
        return _hub_rows(entry)
    kinds = {p.suffix for p in files}
    if kinds == {".jsonl"}:
        return JsonLines(files)
    if kinds == {".parquet"}:
        return _load(entry, "parquet", data_files=[str(p) for p in files], split="train")
    raise InputError(f"{path} is neither .jsonl nor .parquet (a folder must hold one kind only)")


def _hub_rows(entry: Entry) -> Sequence:
    if entry.dataset.startswith((".", "/", "~")) or entry.dataset.count("/") != 1 or Path(entry.dataset).suffix:
        raise InputError(f"no such dataset: {entry.dataset} is no file, no folder and no Hub id")
    return _load(entry, entry.dataset, entry.subset, split=entry.split)


def _load(entry: Entry, *args, **options) -> Sequence:
    from datasets import load_dataset  # takes a second to import, and the demo does without

    try:
        return load_dataset(*args, **options)
    except Exception as error:  # its errors have no common type: missing, offline, no such split, broken file
        raise InputError(f"cannot read dataset {entry.dataset}: {str(error).splitlines()[0][:200]}") from error


def _primer_rows(entry: Entry, seed: int) -> list[dict]:
    if entry.transform != "messages":
        raise InputError(f"primer has messages; the transform {entry.transform} does not apply to it")
    kinds = entry.dataset.partition(":")[2].split("+") if ":" in entry.dataset else primer.CHAT_KINDS
    # Whole rounds name every fact, so a short mixture takes the first rounds and not some rows out of all.
    rounds = primer.CONVERSATION_ROUNDS if entry.rows is None else 10**6
    return list(islice(primer.conversations(entry.split, seed, rounds, kinds), entry.rows))


def _words(entry: Entry) -> list[str]:
    """The data set's words: ascii letters, 3 to 15 of them; the split "test" is one word in twenty."""
    path = Path(entry.dataset).expanduser()
    if path.suffix == ".txt":
        if not path.exists():
            raise InputError(f"no such file: {path}")
        found = (line.strip() for line in path.open(encoding="utf-8", errors="replace"))
    else:
        found = _words_of_text(entry.dataset)
    words = dict.fromkeys(w for w in found if re.fullmatch("[a-z]{3,15}", w))
    return [w for w in words if (crc32(w.encode()) % 20 == 0) == (entry.split != "train")]


def _words_of_text(dataset: str) -> list[str]:
    """The words of a text's beginning, the most frequent first; those seen once are too often names and misprints."""
    counts, characters = Counter(), 0
    for text in DocumentStream(dataset):
        counts.update(re.findall(r"\b[a-z]{3,15}\b", text))
        characters += len(text)
        if characters > WORD_CHARACTERS:
            break
    return [word for word, count in counts.most_common(MAX_WORDS) if count > 1]
