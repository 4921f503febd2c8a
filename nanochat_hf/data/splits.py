"""Which files of a folder or of a Hub repository belong to which split, read off their names.

Datasets on the Hub name splits in files (`data/train-00000-of-00002.parquet`) or in folders (`test/0.jsonl`), with
the words of KEYWORDS. Names are paths relative to the dataset, with "/" between their parts.

    split_of("data/val-00000-of-00001.parquet")                               # "validation"
    text_files("books", ["test.jsonl", "train.jsonl"])                        # train, validation, the decision
    row_files("chats", ["train.jsonl", "test.jsonl"], "test", subset=None)    # ["test.jsonl"]
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from ..errors import InputError

KEYWORDS = {  # those of the datasets library, and further names of test sets
    "train": ("training", "train"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("testing", "test", "tests", "devtest", "evaluation", "eval", "evals")
    + tuple(f"{verb}{dash}out" for verb in ("held", "hold") for dash in ("", "_", "-")),
}
SPLITS = {word: split for split, words in KEYWORDS.items() for word in words}
# A word of its own: not in "latest" or "contest", but in "trainset", "test2" and "X_dev".
KEYWORD = re.compile(rf"(?<![a-z])({'|'.join(sorted(SPLITS, key=len, reverse=True))})(?:set|data)?(?![a-z])")
CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")  # My|Test, train|A
SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}(?:-[0-9a-f]+)?")  # once the Hub put a hash behind it
SUFFIXES = (".parquet", ".jsonl")  # of the files that are read, in any case
# Of files that hold rows, too, and "/" ends a linked folder.
UNREAD = (*SUFFIXES, ".json", ".csv", ".tsv", ".arrow", ".feather", ".gz", ".zst", ".bz2", ".xz", ".zip", "/")
MAX_FILES = 100_000  # and folders, below a dataset's
METADATA = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json", "stats.json")


def is_visible(name: str) -> bool:
    """Whether no part of the name is hidden (`.ipynb_checkpoints/`, `._x`) or private (`__pycache__/`)."""
    return not any(part.startswith((".", "__")) for part in PurePosixPath(name).parts)


def files_below(folder: Path) -> list[str]:
    """Names of the visible files below a folder, in order; those of links to folders, not followed, end with "/".

    Raises InputError for a pipe, or for more than MAX_FILES of them, which is no dataset but a disk.
    """

    def note(error: OSError) -> None:
        if not isinstance(error, PermissionError):
            raise error

    paths = []
    try:
        for parent, folders, files in os.walk(folder, onerror=note):
            folders[:] = filter(is_visible, folders)
            paths += [Path(parent, name) for name in (*files, *folders) if is_visible(name)]
            if len(paths) > MAX_FILES:
                raise InputError(f"{folder} has more than {MAX_FILES:,} files: name the folder of the dataset")
    except (RecursionError, OSError):  # /proc loses entries while it is read
        raise InputError(f"{folder} cannot be walked through: name the folder that holds the files") from None
    kinds = [(path, path.is_dir()) for path in sorted(paths)]
    if odd := next((path for path, is_dir in kinds if not is_dir and path.exists() and not path.is_file()), None):
        raise InputError(f"{odd} is a pipe or a device, no file: take it out of {folder}")  # reading it may never end
    return [p.relative_to(folder).as_posix() + "/" * is_dir for p, is_dir in kinds if not is_dir or p.is_symlink()]


def split_of(name: str) -> str | None:
    """The split in the file's own name, or else in its nearest folder's; None if no part of it names one."""
    for part in reversed(PurePosixPath(name).parts):
        if word := KEYWORD.search(CAMEL.sub("_", part).lower()):
            return SPLITS[word[1]]
    return None


def has_suffix(name: str, *suffixes: str) -> bool:
    """Whether the name ends so, in upper or lower case."""
    return name.lower().endswith(suffixes)


def unread_files(names: list[str], read: list[str]) -> list[str]:
    """Those of the names that look like files of rows and are none of the kind that is read."""
    chosen = set(read)
    return [n for n in names if n not in chosen and has_suffix(n, *UNREAD) and not n.endswith(METADATA)]


def text_files(dataset: str, names: list[str], unread: Sequence[str] = ()) -> tuple[list[str], list[str], str]:
    """The training files, the validation files, and one sentence about what no name decided (or "").

    Without a validation split the test split takes its place, without both the last training file. Raises InputError
    when there are no training files, and when a split is among the files that are not read.
    """
    notes = []
    if any(name.startswith("data/") and split_of(name) == "train" for name in names):
        # The Hub's default configuration; other folders hold other ones, often samples of the same text.
        folders = {n.split("/")[0] for n in [*names, *unread] if "/" in n and not n.startswith("data/")}
        folders = {folder for folder in folders if not split_of(folder)}
        names, unread = ([n for n in some if n.split("/")[0] not in folders] for some in (names, unread))
        if folders:
            notes.append(f"only its folder data is read, not {listed(folders)}")
    if unread:
        notes.append(f"not read: {listed(unread)}")
    splits: dict[str | None, list[str]] = {}
    for name in names:
        splits.setdefault(split_of(name), []).append(name)
    for role in ("train", "validation") if "validation" in splits else ("train", "validation", "test"):
        if role not in splits and (hidden := [name for name in unread if split_of(name) == role]):
            advice = f"give files of one kind, here {PurePosixPath(names[0]).suffix}, no linked folders; or one file"
            raise InputError(f"{dataset} has its {role} split in {listed(hidden)}, which is not read: {advice}")
    train = splits.get("train") or splits.get(None)
    if not train:
        advice = "name training files train-*, or give one file instead of the folder"
        raise InputError(f"dataset {dataset} has {' and '.join(sorted(splits))} files only: {advice}")
    if None in splits and len(splits) > 1:
        use = "not read" if "train" in splits else "the training text"
        notes.append(f"{listed(splits[None])}, named after no split, is {use}")
    validation = splits.get("validation") or splits.get("test")
    if not validation:
        train, validation = train[:-1] or train, train[-1:]
        last = validation[0] if train != validation else f"the last part of {validation[0]}"
        notes.append(f"no file is named after a validation split, so it is {last}")
    elif "validation" not in splits:
        notes.append("it has no validation split, so the test split takes its place")
    return train, validation, "; ".join(notes)


def row_files(dataset: str, names: list[str], split: str, subset: str | None, unread: Sequence[str] = ()) -> list[str]:
    """The files of one split of a folder of rows. Raises InputError if there are none, or those of several subsets."""
    role = SPLITS.get(split.lower())
    files = [name for name in names if tells(name, split)]
    if role:
        labels: dict[str, list[str]] = {}
        for name in files:
            labels.setdefault(_label(name, role), []).append(name)
        whole = {name for word in KEYWORDS[role] for name in labels.get(word, [])}  # train beside train_prefs
        if len(labels) > 1 and not whole:
            several = ", ".join(sorted(labels))
            raise InputError(f"folder {dataset} has several splits named {split}*: take one of {several}")
        files = [name for name in files if name in whole] if whole else files
    else:
        files = [name for name in files if _is_labelled(name, split)] or files
    if not files:
        others = ", ".join(f"{what} {listed(n)}" for what, n in (("it has", names), ("not read are", unread)) if n)
        raise InputError(f"folder {dataset} has no .jsonl or .parquet files named {split}*{others and '; ' + others}")
    subsets: dict[str | None, list[str]] = {}
    for name in files:
        folders = [p for p in PurePosixPath(name).parts[:-1] if p != "data" and p != split and not split_of(p)]
        subsets.setdefault("/".join(folders) or None, []).append(name)
    if subset in subsets:
        return subsets[subset]
    if len(subsets) > 1 or (subset and None not in subsets):
        named = ", ".join(sorted(name or "(none)" for name in subsets))
        raise InputError(f"folder {dataset} has the subsets {named}: name one of them with subset, not {subset}")
    return files


def tells(name: str, split: str) -> bool:
    """Whether the file or a folder above it is named after the split: `test`, or a label such as `test_sft`."""
    if role := SPLITS.get(split.lower()):
        return split_of(name) == role
    return _is_labelled(name, split) or (not split[-1:].isdigit() and _is_labelled(name, split, r"_?\d+"))


def _label(name: str, role: str) -> str:
    """The name of the split that a file of `role` is a part of, such as train_sft, or the keyword."""
    part = next(part for part in reversed(PurePosixPath(name).parts) if split_of(part))
    stem = re.sub(r"(\.[a-z]\w*)+$", "", part, flags=re.IGNORECASE)
    if shard := SHARD.fullmatch(stem):
        return shard[1]
    own = re.match(rf"({'|'.join(KEYWORDS[role])})_[a-z]\w*", stem, flags=re.IGNORECASE)
    return re.sub(r"_?\d+$", "", own[0]) if own else KEYWORDS[role][0]


def _is_labelled(name: str, split: str, number: str = "") -> bool:
    """Whether a file or a folder above it is named after a split of another name, such as train_prefs."""
    *folders, file = PurePosixPath(name).parts
    return split in folders or bool(re.match(rf"{re.escape(split)}{number}(?!\w)", file))


def listed(names) -> str:
    """Names in order, not more than three of them."""
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
