"""Which files of a folder or of a Hub repository belong to which split, read off their names.

Data sets on the Hub name splits in files (`data/train-00000-of-00002.parquet`) or in folders (`test/0.jsonl`), with
the words of KEYWORDS. Names are paths relative to the data set, with "/" between their parts.

    split_of("data/val-00000-of-00001.parquet")                               # "validation"
    text_files("books", ["test.jsonl", "train.jsonl"])                        # train, validation, what was decided
    row_files("chats", ["train.jsonl", "test.jsonl"], "test", subset=None)    # ["test.jsonl"]
"""

import re
from pathlib import PurePosixPath

from ..errors import InputError

KEYWORDS = {  # those of the datasets library, and devtest
    "train": ("training", "train"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("testing", "test", "devtest", "evaluation", "eval"),
}
SPLITS = {word: split for split, words in KEYWORDS.items() for word in words}
# A word of its own: not in "latest" or "contest", but in "trainset", "test2" and "X_dev".
KEYWORD = re.compile(rf"(?<![a-z])({'|'.join(sorted(SPLITS, key=len, reverse=True))})(?:set|data)?(?![a-z])")
SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}")


def is_visible(name: str) -> bool:
    """Whether no part of the name is hidden (`.ipynb_checkpoints/`, `._x`) or private (`__pycache__/`)."""
    return not any(part.startswith((".", "__")) for part in PurePosixPath(name).parts)


def split_of(name: str) -> str | None:
    """The split that the file's own name tells, or else its nearest folder's; None if no part of it names one."""
    for part in reversed(PurePosixPath(name).parts):
        if word := KEYWORD.search(part.lower()):
            return SPLITS[word[1]]
    return None


def text_files(dataset: str, names: list[str]) -> tuple[list[str], list[str], str]:
    """The files of a text to pretrain on -> (training, validation, one sentence about what no name decided or "").

    Without a validation split the test split takes its place, without both the last training file: if there is one
    file only, both lists name it. Raises InputError when there are test or validation files only.
    """
    said = []
    if any(name.startswith("data/") and split_of(name) == "train" for name in names):
        # The Hub's default configuration; other folders hold other ones, often samples of the same text.
        others = [n for n in names if "/" in n and not n.startswith("data/") and not split_of(n.split("/")[0])]
        if others:
            said.append(f"only its folder data is read, not {_listed({n.split('/')[0] for n in others})}")
        names = [name for name in names if name not in others]
    splits: dict[str | None, list[str]] = {}
    for name in names:
        splits.setdefault(split_of(name), []).append(name)
    train = splits.get("train") or splits.get(None)
    if not train:
        raise InputError(
            f"dataset {dataset} has {' and '.join(sorted(splits))} files only: name training files train-*, "
            "or give one file instead of the folder"
        )
    if None in splits and len(splits) > 1:
        use = "not read" if "train" in splits else "the training text"
        said.append(f"{_listed(splits[None])}, named after no split, is {use}")
    validation = splits.get("validation") or splits.get("test")
    if not validation:
        train, validation = train[:-1] or train, train[-1:]
        last = validation[0] if train != validation else f"the last part of {validation[0]}"
        said.append(f"no file is named after a validation split, so it is {last}")
    elif "validation" not in splits:
        said.append("it has no validation split, so the test split takes its place")
    return train, validation, "; ".join(said)


def row_files(dataset: str, names: list[str], split: str, subset: str | None) -> list[str]:
    """The files of one split of a folder of rows. Raises InputError if there are none, or those of several subsets."""
    role = SPLITS.get(split.lower())
    files = [name for name in names if (split_of(name) == role if role else _is_labelled(name, split))]
    labels = {match[1] for name in files if (match := SHARD.fullmatch(PurePosixPath(name).stem))}
    if role and (whole := labels & set(KEYWORDS[role])):  # train beside train_prefs
        labels, files = whole, [n for n in files if (m := SHARD.fullmatch(PurePosixPath(n).stem)) and m[1] in whole]
    if not files:
        has = f"; it has {_listed(names)}" if names else ""
        raise InputError(f"folder {dataset} has no .jsonl or .parquet files named {split}*{has}")
    if len(labels) > 1:
        raise InputError(
            f"folder {dataset} has several splits named {split}*: take one of {', '.join(sorted(labels))}"
        )
    subsets: dict[str | None, list[str]] = {}
    for name in files:
        folders = [p for p in PurePosixPath(name).parts[:-1] if p != "data" and p != split and not split_of(p)]
        subsets.setdefault(folders[0] if folders else None, []).append(name)
    if subset in subsets:
        return subsets[subset]
    if len(subsets) > 1 or (subset and None not in subsets):
        named = ", ".join(sorted(name or "(none)" for name in subsets))
        raise InputError(f"folder {dataset} has the subsets {named}: name one of them with subset, not {subset}")
    return files


def _is_labelled(name: str, split: str) -> bool:
    """Whether a file or a folder above it is named after a split of another name, such as train_prefs."""
    *folders, file = PurePosixPath(name).parts
    return split in folders or bool(re.match(rf"{re.escape(split)}(?![A-Za-z_])", file))


def _listed(names) -> str:
    """Names in order, not more than three of them."""
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
