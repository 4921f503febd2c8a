"""Pretraining text as a stream of documents: any dataset spec, split in two, shared by ranks, resumable exactly.

A dataset spec is one of

    org/name, org/name@revision, org/name/folder   a dataset of the Hub: parquet or .jsonl files with a column `text`
    path/to/folder                                 such files on this disk
    path/to/file.jsonl                             one such file (.parquet too)
    primer                                         the demo's embedded corpus

`open_documents` also takes a mixture, a list of {dataset: SPEC, weight: 0.5}. A weight is a share of the UTF-8 bytes.
That is nearer to a share of the tokens than a share of documents or characters is.
File names give the splits (data/splits.py). If none does, the last file is the validation split, as in
karpathy/nanochat, or the last sixteenth of a single file. Hidden files are not read.

A file is a sequence of units: parquet row groups, or slices of files. The units of all files and epochs are assigned
to the ranks round-robin before anything is read. So a stream's state is a few integers, and the ranks read each
document of an epoch exactly once. The first epoch keeps the order of the files, so that a run downloads only files
that it reads. Later epochs shuffle files, units and documents by the seed.
"""

import hashlib
import json
import os
import random
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache, cached_property, lru_cache
from itertools import chain, pairwise
from pathlib import Path
from threading import Lock, Thread

import pyarrow as pa
import pyarrow.parquet as pq

from ..config import check_value
from ..demo import corpus as primer
from ..errors import InputError
from ..run import fingerprint, or_shipped
from ..stage_configs import TextMixture
from .hub_files import hub_files
from .splits import SUFFIXES, files_below, has_suffix, listed, text_files, unread_files

COLUMN = "text"
SINGLE_FILE_VALIDATION = 16  # a dataset of one file gives its last 1/16 to validation
JSONL_UNIT = 1 << 20  # bytes
HASH_LIMIT = 1 << 26  # bytes of a dataset that its content hash reads
CACHE_LIMIT = 1 << 28  # bytes of decoded row groups; the newest stays whatever its size


def open_documents(dataset: str | list[dict], *arguments, **options) -> "DocumentStream | MixtureStream":
    """The stream of a dataset spec or of a mixture of them, with the arguments of `DocumentStream`."""
    parts = parts_of(dataset)
    streams = [DocumentStream(name, *arguments, **options) for name, _ in parts]
    return MixtureStream(streams, [weight for _, weight in parts]) if isinstance(dataset, list) else streams[0]


def parts_of(dataset: str | list[dict]) -> list[tuple[str, float]]:
    """(dataset spec, weight) of each part of a mixture, or of the one spec. Raises InputError for a wrong mixture."""
    if not isinstance(dataset, list):
        return [(str(dataset), 1)]
    check_value(TextMixture, dataset, "dataset")
    return [(entry["dataset"], entry.get("weight", 1)) for entry in dataset]


def is_local(dataset: str | list[dict]) -> bool:
    """Whether all of it is on this disk or in the package, so that `text_fingerprint` sees every change."""
    return all(name == "primer" or local_path(name).exists() for name, _ in parts_of(dataset))


def text_fingerprint(dataset: str | list[dict]) -> str:
    """A short hash of both splits of a dataset spec or a mixture, which shows whether the text changed.

    Of a Hub id only the name is hashed: a resumed run keeps its commit. Raises InputError for a missing dataset.
    """
    hashes = []
    for name, weight in parts_of(dataset):
        if name == "primer":
            content = [primer_documents(split)[1] for split in ("train", "validation")]
        elif not local_path(name).exists() and is_hub_id(name):
            content = name
        else:
            content = content_hash(*find_files(name)[:3])
        hashes.append((content, weight))
    return fingerprint(hashes)


class DocumentStream:
    """The documents (str) of rank `rank` out of `world_size`; iterating gives the rest of the current epoch.

    `dataset` is a spec, or a `DatasetSplit` that is already open. Raises InputError for a dataset that is missing,
    empty, unreadable or without text; with `skip_bad_files` what cannot be read is skipped with a warning.
    """

    def __init__(self, dataset, split="train", rank=0, world_size=1, seed=0, skip_bad_files=False):
        if not 0 <= rank < world_size:
            raise InputError(f"rank {rank} does not exist among {world_size} ranks")
        opened = isinstance(dataset, DatasetSplit)
        self.source = dataset if opened else DatasetSplit(str(dataset), split, skip_bad_files)
        self.rank, self.world_size, self.seed = rank, world_size, seed
        self.epoch = 0
        self._file = 0  # files finished in this epoch
        self._start = 0  # units of all finished files, since the very beginning
        self._unit = 0  # units finished in the current file
        self._row = 0  # documents handed out of the current unit
        self._idle = 0  # epochs in a row without a text for this rank

    def shard(self, rank: int, world_size: int) -> "DocumentStream":
        """The stream of another rank from the beginning, over the same opened files."""
        return DocumentStream(self.source, rank=rank, world_size=world_size, seed=self.seed)

    def __iter__(self) -> Iterator[str]:
        files, has_text = [self.source.files[number] for number in self._order(len(self.source.files), "files")], False
        while self._file < len(files):
            file = files[self._file]
            for following in files[self._file + 1 : self._file + 2]:
                following.prefetch()
            units = file.units(self.world_size)
            order = self._order(len(units), f"units {self._file}")
            while self._unit < len(units):
                if (self._start + self._unit) % self.world_size == self.rank:
                    for text in self._rest_of_unit(file.read(units[order[self._unit]])):
                        has_text = True
                        yield text
                self._unit, self._row = self._unit + 1, 0
            self._file, self._unit, self._start = self._file + 1, 0, self._start + len(units)
        if self._start == 0:
            raise InputError(f"the {self.source.split} split of dataset {self.source.dataset} has no documents")
        self.epoch, self._file, self._idle = self.epoch + 1, 0, 0 if has_text else self._idle + 1
        # A share of an epoch may well be empty (a slice in which no line begins), but not so often by chance.
        if self._idle > 20 * self.world_size:
            for file in files:
                if isinstance(file, Jsonl):
                    file.read((0, file.path.stat().st_size))  # of both splits: an error says more
            reason = "its one file has too few texts for two splits" if self.source.single else "all texts are empty"
            raise InputError(f"{self.source.split} split of dataset {self.source.dataset} has no text: {reason}")

    def _rest_of_unit(self, rows: list[str | None]) -> Iterator[str]:
        """The texts of the current unit that were not handed out yet."""
        order = self._order(len(rows), f"rows {self._file} {self._unit}")
        while self._row < len(rows):
            self._row += 1
            if text := rows[order[self._row - 1]]:
                yield text

    def _order(self, count: int, name: str) -> range | list[int]:
        if self.epoch == 0:
            return range(count)
        order = list(range(count))
        random.Random(f"{self.seed} {self.epoch} {name}").shuffle(order)
        return order

    def state_dict(self) -> dict:
        return {
            "position": [self.epoch, self._file, self._start, self._unit, self._row],
            "reader": [self.rank, self.world_size, self.seed],
            "source": self.source.identity,
        }

    def load_state_dict(self, state: dict) -> None:
        """Resume after the last document of `state`. Raises InputError when it was saved for other data."""
        if state.get("reader") != [self.rank, self.world_size, self.seed]:
            raise InputError(f"the saved state is of [rank, ranks, seed] {state.get('reader')}; keep the seed")
        self.source.require(state["source"])
        self.epoch, self._file, self._start, self._unit, self._row = state["position"]


class MixtureStream:
    """The documents of several streams, so that the bytes read from each stay in proportion to its weight.

    The next document comes from the stream that is farthest behind its share, so the order depends on the documents
    and the weights alone. Each stream has its own epochs. An epoch of the mixture ends with that of the stream which
    repeats most, so that no document is read twice in the first one.
    """

    def __init__(self, streams: list[DocumentStream], weights: list[float]):
        self.streams, self.weights = streams, weights
        self.rank, self.world_size = streams[0].rank, streams[0].world_size
        self.epoch, self._bytes = 0, [0] * len(streams)

    def shard(self, rank: int, world_size: int) -> "MixtureStream":
        """The mixture of another rank from the beginning, over the same opened files."""
        return MixtureStream([stream.shard(rank, world_size) for stream in self.streams], self.weights)

    def __iter__(self) -> Iterator[str]:
        iterators = [iter(stream) for stream in self.streams]
        while True:
            shares = [num_bytes / weight for num_bytes, weight in zip(self._bytes, self.weights)]
            number = shares.index(min(shares))
            text = next(iterators[number], None)
            if text is not None:
                self._bytes[number] += len(text.encode())
                yield text
            elif self.streams[number].epoch > self.epoch:
                self.epoch = self.streams[number].epoch
                return
            else:
                iterators[number] = iter(self.streams[number])

    def state_dict(self) -> dict:
        return {
            "position": [self.epoch, list(self._bytes)],
            "weights": list(self.weights),
            "streams": [stream.state_dict() for stream in self.streams],
        }

    def load_state_dict(self, state: dict) -> None:
        """Resume after the last document of `state`. Raises InputError when it was saved for other data or weights."""
        if state.get("weights") != self.weights:
            raise InputError("the saved state is of another mixture; keep its datasets and weights")
        for stream, saved in zip(self.streams, state["streams"]):
            stream.load_state_dict(saved)
        self.epoch, self._bytes = state["position"][0], list(state["position"][1])


@cache
def primer_documents(split: str) -> tuple[list[str], str]:
    """The demo's documents of a split, and their fingerprint."""
    documents = list(primer.documents(split, seed=0))
    if split == "validation":  # short texts come up in both by chance
        training = set(primer_documents("train")[0])
        documents = [text for text in documents if text not in training]
    return documents, fingerprint(documents)


class DatasetSplit:
    """One split of a dataset: its `files` in order, shared by the streams of a process.

    `identity` is what a saved state depends on. Raises InputError for a missing dataset or a broken file.
    """

    def __init__(self, dataset: str, split: str, skip_bad_files: bool):
        if split not in ("train", "validation"):
            raise InputError(f"split must be 'train' or 'validation', not {split!r}")
        self.dataset, self.split, self.skip_bad_files = dataset, split, skip_bad_files
        self._groups: dict[tuple[Path, int], pa.ChunkedArray] = {}  # least recently used first
        self._lock = Lock()  # the loader reads in several threads
        self._open(None)

    def _open(self, revision: str | None) -> None:
        if self.dataset == "primer":
            documents, content = primer_documents(self.split)
            self.files, self.revision = [Memory(documents)], None
            self.identity = {"revision": None, "files and bytes": [1, None], "split": self.split, "content": content}
            return
        train, validation, self.locate, self.revision = find_files(self.dataset, revision)
        self.single, read = train == validation, {*train, *validation}
        kind = Parquet if has_suffix(train[0], SUFFIXES[0]) else Jsonl
        self.files = [kind(self, name) for name in (train if self.split == "train" else validation)]
        # Of the Hub's files the revision says more than their size.
        self.identity = {"revision": self.revision, "files and bytes": [len(read), None], "split": self.split}
        if self.revision is None:
            self.identity["files and bytes"][1] = sum(self.locate(name).stat().st_size for name in read)
            self.identity["content"] = content_hash(train, validation, self.locate)
            for file in self.files:  # on this disk: report a broken file now, and not in an hour
                file.units(1)

    def require(self, identity: dict) -> None:
        """Make sure that states saved with `identity` mean the same documents here. Raises InputError if not."""
        if identity["revision"] and identity["revision"] != self.revision:
            self._open(identity["revision"])  # the Hub keeps the commit that the run began with
        if any(identity.get(key) != value for key, value in self.identity.items()):
            advice = "bring back the old files, or begin in another --run-dir"
            raise InputError(f"{self.dataset} changed since this run began ({identity} to {self.identity}): {advice}")

    def row_group(self, path: Path, group: int) -> pa.ChunkedArray:
        """The texts of a parquet file's row group, decoded once for the streams that take slices of it."""
        with self._lock:
            column = self._groups.pop((path, group), None)
            if column is None:
                with pq.ParquetFile(path) as file:
                    column = file.read_row_group(group, columns=[COLUMN]).column(0)
            self._groups[path, group] = column
            while len(self._groups) > 1 and sum(column.nbytes for column in self._groups.values()) > CACHE_LIMIT:
                del self._groups[next(iter(self._groups))]
            return column


def is_hub_id(dataset: str) -> bool:
    """Whether it has the form org/name[@revision][/folder], and is no name of a file."""
    form = r"\w[\w.-]*/[\w.-]+(@[\w.-]+)?(/.+)?"
    return bool(re.fullmatch(form, dataset)) and not has_suffix(dataset, *SUFFIXES, ".json", ".csv", ".txt")


def local_path(dataset: str) -> Path:
    """Where the dataset is if it is on this disk, with ~ for the home folder."""
    try:
        return or_shipped(dataset).expanduser()
    except RuntimeError:  # ~name, and nobody has that name
        return Path(dataset)


@cache
def log(line: str) -> None:
    """Print a line once, on the main process only."""
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr, flush=True)


def list_files(dataset: str, revision: str | None, *kinds: tuple[str, ...]) -> tuple:
    """Names of all files, of those of the first of the kinds that is there, a function from name to path, the commit.

    One kind decides, so that a stray file of another does not become the validation split.
    """
    path, commit = local_path(dataset), None
    if path.is_dir():
        everything, locate = files_below(path), path.joinpath
    elif path.is_file():  # no pipe, on which reading would wait
        everything, locate = [path.name], path.parent.joinpath
    elif is_hub_id(dataset):
        everything, locate, commit = hub_files(dataset, revision)
    else:
        raise InputError(f"no dataset {dataset}: give a folder, a .jsonl file, a Hub id or 'primer'")
    names = next(filter(None, ([n for n in everything if has_suffix(n, *kind)] for kind in kinds)), [])
    if not names:
        unread = unread_files(everything, names)
        others = f", only {listed(unread)}" if unread else ""
        raise InputError(f"dataset {dataset} has no {' or '.join(chain(*kinds))} files{others}")
    if path.is_dir() and (gone := next((name for name in names if not locate(name).exists()), None)):
        raise InputError(f"cannot read {locate(gone)}: a link to nothing")
    return everything, names, locate, commit


def find_files(dataset: str, revision: str | None = None) -> tuple:
    """Names of the training and validation files, a function from name to path, the commit; logs what was guessed."""
    everything, names, locate, commit = list_files(dataset, revision, *((suffix,) for suffix in SUFFIXES))
    train, validation, decision = names, names, ""
    if not local_path(dataset).is_file():
        train, validation, decision = text_files(dataset, names, unread_files(everything, names))
    if decision:
        log(f"dataset {dataset}: {decision}")
    return train, validation, locate, commit


def content_hash(train: list[str], validation: list[str], locate: Callable[[str], Path]) -> str:
    """A hash of both splits' files on this disk: names in order, sizes and bytes.

    Of more than HASH_LIMIT bytes only both ends of each file: an edit between them that keeps the size is not seen.
    """
    stats = {name: locate(name).stat() for name in {*train, *validation}}
    whole = sum(stat.st_size for stat in stats.values()) <= HASH_LIMIT
    part = None if whole else max(HASH_LIMIT // (2 * len(stats)), 1)
    hashes = {
        name: (name, stat.st_size, _bytes_hash(locate(name), stat.st_size, stat.st_mtime_ns, stat.st_ino, part))
        for name, stat in stats.items()
    }
    return fingerprint([[hashes[name] for name in split] for split in (train, validation)])


@lru_cache(maxsize=1 << 16)
def _bytes_hash(path: Path, size: int, changed: int, inode: int, part: int | None) -> str:
    """Of the whole file, or of `part` bytes at either end. Raises InputError if it cannot be read."""
    try:
        with open(path, "rb") as file:
            if part is None or size <= 2 * part:
                return hashlib.file_digest(file, "sha256").hexdigest()
            head = file.read(part)
            file.seek(-part, os.SEEK_END)
            return hashlib.sha256(head + file.read(part)).hexdigest()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None


class File:
    """A file of documents. `units(n)` lists its parts, enough for n ranks; `read(unit)` gives a part's documents."""

    def __init__(self, dataset: DatasetSplit, name: str):
        self.dataset, self.name, self._requested = dataset, name, False

    @property
    def path(self) -> Path:
        """Where it is on this disk, after its download."""
        return self.dataset.locate(self.name)

    def prefetch(self) -> None:
        """Begin to download the file; a failure shows when it is read."""

        def download() -> None:
            with suppress(InputError):
                self.dataset.locate(self.name)

        if self.dataset.revision and not self._requested:
            self._requested = True
            Thread(target=download, daemon=True).start()

    def bounds(self, total: int) -> tuple[int, int]:
        """The rows or bytes [first, end) of `total` that belong to this split."""
        if not self.dataset.single:
            return 0, total
        edge = total - -(-total // SINGLE_FILE_VALIDATION)
        return (0, edge) if self.dataset.split == "train" else (edge, total)

    def bad(self, reason: str) -> None:
        text = f"{self.path} cannot be read ({' '.join(reason.split())[:150]})"
        if not self.dataset.skip_bad_files:
            raise InputError(f"{text}; get it again, or set skip_bad_files to continue without it")
        warnings.warn(f"{text}; skipped", stacklevel=3)


class Parquet(File):
    @cached_property
    def footer(self) -> pq.FileMetaData | None:
        """None for a file that is to be skipped."""
        try:
            footer = pq.read_metadata(self.path)
        except (pa.ArrowException, OSError) as error:
            return self.bad(f"truncated or no parquet: {error}")
        schema = footer.schema.to_arrow_schema()
        if COLUMN not in schema.names:
            raise InputError(f"{self.path} has no column {COLUMN!r}; it has {', '.join(schema.names)}")
        kind = str(schema.field(COLUMN).type)
        if kind not in ("string", "large_string", "string_view"):
            raise InputError(f"{self.path}: column {COLUMN!r} is {kind}, not text")
        return footer

    def units(self, ranks: int) -> list[tuple[int, int, int]]:
        """(row group, first row, end row); row groups are sliced where they are fewer than the ranks."""
        if self.footer is None:
            return []
        first, end = self.bounds(self.footer.num_rows)
        slices, units, offset = -(-ranks // max(self.footer.num_row_groups, 1)), [], 0
        for group in range(self.footer.num_row_groups):
            rows = self.footer.row_group(group).num_rows
            units += [(group, a, b) for a, b in cut(max(first - offset, 0), min(end - offset, rows), slices)]
            offset += rows
        return units

    def read(self, unit: tuple[int, int, int]) -> list[str | None]:
        group, first, end = unit
        try:
            return self.dataset.row_group(self.path, group).slice(first, end - first).to_pylist()
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            self.bad(f"row group {group}: {error}")
            return []


class Jsonl(File):
    def units(self, ranks: int) -> list[tuple[int, int]]:
        """(first byte, end byte), for the lines that begin there."""
        first, end = self.bounds(self.path.stat().st_size)
        return cut(first, end, max(ranks, -(-(end - first) // JSONL_UNIT)))

    def read(self, unit: tuple[int, int]) -> list[str]:
        first, end = unit
        texts = []
        with open(self.path, "rb") as file:
            if first:
                file.seek(first - 1)
                file.readline()  # the rest of a line that began in the unit before
            while (at := file.tell()) < end and (line := file.readline()):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    self.bad(f"the line at byte {at} is not JSON: {error}")
                    continue
                if not isinstance(row, dict) or not isinstance(row.get(COLUMN), str):
                    raise InputError(f"{self.path}: the line at byte {at} has no text under {COLUMN!r}")
                # JSON may spell half of a surrogate pair, which is no character and which no tokenizer takes: "?".
                texts.append(row[COLUMN].encode(errors="replace").decode())
        return texts


class Memory:
    """Documents in memory, with the interface of a file."""

    def __init__(self, documents: list[str]):
        self.documents = documents

    def units(self, ranks: int) -> list[tuple[int, int]]:
        return cut(0, len(self.documents), ranks)

    def read(self, unit: tuple[int, int]) -> list[str]:
        return self.documents[slice(*unit)]


def cut(first: int, end: int, pieces: int) -> list[tuple[int, int]]:
    """[first, end) in `pieces` nearly equal ranges, without empty ones."""
    edges = [first + (end - first) * i // pieces for i in range(pieces + 1)]
    return [(a, b) for a, b in pairwise(edges) if a < b]
