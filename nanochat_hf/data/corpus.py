"""Pretraining text as a stream of documents: any dataset spec, split in two, dealt over readers, resumable exactly.

A dataset spec is one of
    org/name, org/name@revision, org/name/folder   a dataset of the Hub: parquet or .jsonl files with a column `text`
    path/to/folder                                 such files on this disk
    path/to/file.jsonl                             one of them (.parquet too)
    primer                                         the demo's embedded corpus
or, for `open_documents`, a mixture: a list of {dataset: one of these, weight: 0.5}. A weight is a share of the bytes
of UTF-8, which is nearer to a share of the tokens than documents or characters are (a Hangul syllable has 3 bytes).
The last file is the validation split, as in karpathy/nanochat; of a single file it is the last sixteenth.

The order of documents is fixed before anything is read. A file is a run of units (parquet row groups, or slices of
them), and the units of all files, counted on through all epochs, are dealt in turn to the readers. So a position is a
few integers, resuming opens one file, and the readers share every document of an epoch exactly once. The first epoch
keeps the files' own order, so a run downloads no more files than it reads; later ones shuffle files, units and
documents by the seed. There is no shuffle buffer whose content a resume would lose.
"""

import json
import math
import random
import re
import time
import warnings
from collections.abc import Callable, Iterator
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from threading import Lock, Thread

import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import InputError

COLUMN = "text"
SINGLE_FILE_VALIDATION = 16  # a dataset of one file gives its last 1/16 to validation
JSONL_UNIT = 1 << 20  # bytes
DOWNLOAD_ATTEMPTS = 6  # with 1, 2, 4, 8 and 16 seconds between them
SUFFIXES = (".parquet", ".jsonl")
HUB_ID = r"\w[\w.-]*/[\w.-]+(@[\w.-]+)?(/.+)?"


def open_documents(
    dataset: str | list[dict],
    split: str = "train",
    rank: int = 0,
    world_size: int = 1,
    seed: int = 0,
    skip_bad_files: bool = False,
) -> "DocumentStream | MixedStream":
    """The stream of a dataset spec or of a mixture of them. Raises InputError as `DocumentStream` does."""
    if not isinstance(dataset, list):
        return DocumentStream(dataset, split, rank, world_size, seed, skip_bad_files)
    if not dataset:
        raise InputError("the mixture is empty: give at least one {dataset: ..., weight: ...}")
    for entry in dataset:
        if not isinstance(entry, dict) or not isinstance(entry.get("dataset"), str):
            raise InputError(f"an entry of the mixture must be {{dataset: ..., weight: ...}}, not {entry!r}")
        if unknown := set(entry) - {"dataset", "weight"}:
            raise InputError(f"unknown key {min(unknown)!r} in the mixture's entry for {entry['dataset']}")
        weight = entry.get("weight", 1)
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
            raise InputError(f"the weight of {entry['dataset']} must be a number above 0, not {weight!r}")
    streams = [DocumentStream(e["dataset"], split, rank, world_size, seed, skip_bad_files) for e in dataset]
    return MixedStream(streams, [entry.get("weight", 1) for entry in dataset])


class DocumentStream:
    """The documents (str) of reader `rank` out of `world_size`; iterating gives the rest of the current epoch.

    `epoch` counts finished epochs. `state_dict` is the position after the last document handed out. Raises InputError
    for a dataset that is missing, empty, unreadable or without text; with `skip_bad_files` what cannot be read is
    skipped with a warning.
    """

    def __init__(
        self,
        dataset: str,
        split: str = "train",
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        skip_bad_files: bool = False,
    ):
        if split not in ("train", "validation"):
            raise InputError(f"split must be 'train' or 'validation', not {split!r}")
        if not 0 <= rank < world_size:
            raise InputError(f"rank {rank} does not exist among {world_size} readers")
        self.rank, self.world_size, self.seed = rank, world_size, seed
        self.source = Source(str(dataset), split, skip_bad_files)
        self._rewind()

    def _rewind(self) -> None:
        self.epoch = 0
        self._file = 0  # files finished in this epoch
        self._start = 0  # units of all finished files, since the very beginning
        self._unit = 0  # units finished in the current file
        self._row = 0  # documents handed out of the current unit

    def reader(self, rank: int, world_size: int) -> "DocumentStream":
        """Another reader's stream from the beginning, over the same opened files."""
        other = object.__new__(DocumentStream)
        other.rank, other.world_size, other.seed, other.source = rank, world_size, self.seed, self.source
        other._rewind()
        return other

    def __iter__(self) -> Iterator[str]:
        files = self._order(len(self.source.files), "files")
        while self._file < len(files):
            file = self.source.files[files[self._file]]
            self.source.prefetch(files[self._file + 1 : self._file + 2])
            units = file.units(self.world_size)
            unit_order = self._order(len(units), f"units {self._file}")
            while self._unit < len(units):
                if (self._start + self._unit) % self.world_size == self.rank:
                    rows = file.read(units[unit_order[self._unit]])
                    row_order = self._order(len(rows), f"rows {self._file} {self._unit}")
                    while self._row < len(rows):
                        self._row += 1
                        if text := rows[row_order[self._row - 1]]:
                            yield text
                self._unit, self._row = self._unit + 1, 0
            self._file, self._unit, self._start = self._file + 1, 0, self._start + len(units)
        if self._start == 0:
            raise InputError(f"{self.source} has no documents")
        self.epoch, self._file = self.epoch + 1, 0

    def _order(self, count: int, what: str) -> range | list[int]:
        if self.epoch == 0:
            return range(count)
        order = list(range(count))
        random.Random(f"{self.seed} {self.epoch} {what}").shuffle(order)
        return order

    def state_dict(self) -> dict:
        position = [self.epoch, self._file, self._start, self._unit, self._row]
        return {
            "position": position,
            "reader": [self.rank, self.world_size, self.seed],
            "source": self.source.identity(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Go on after the last document of `state`. Raises InputError when it was saved for other data."""
        if state.get("reader") != [self.rank, self.world_size, self.seed]:
            raise InputError(f"the saved position is of [reader, readers, seed] {state.get('reader')}; keep the seed")
        self.source.require(state["source"])
        self.epoch, self._file, self._start, self._unit, self._row = state["position"]


class MixedStream:
    """The documents of several streams in turn, so that the bytes read from each stay in proportion to its weight.

    The next document always comes from the stream that is farthest behind its share, so the order depends on nothing
    but the documents and the weights, and no share is ever off by more than a document. Each stream goes through its
    own epochs, in each of which every document comes exactly once. Iterating ends, and `epoch` counts, when the stream
    that repeats most has been read through once more: until the first end no document has come twice.
    """

    def __init__(self, streams: list[DocumentStream], weights: list[float]):
        self.streams, self.weights = streams, weights
        self.rank, self.world_size, self.seed = streams[0].rank, streams[0].world_size, streams[0].seed
        self.epoch, self._given = 0, [0] * len(streams)  # bytes

    def reader(self, rank: int, world_size: int) -> "MixedStream":
        """Another reader's mixture from the beginning, over the same opened files."""
        return MixedStream([stream.reader(rank, world_size) for stream in self.streams], self.weights)

    def __iter__(self) -> Iterator[str]:
        iterators = [iter(stream) for stream in self.streams]
        while True:
            shares = [given / weight for given, weight in zip(self._given, self.weights)]
            number = shares.index(min(shares))
            text = next(iterators[number], None)
            if text is not None:
                self._given[number] += len(text.encode())
                yield text
            elif self.streams[number].epoch > self.epoch:
                self.epoch = self.streams[number].epoch
                return
            else:
                iterators[number] = iter(self.streams[number])

    def state_dict(self) -> dict:
        return {
            "position": [self.epoch, list(self._given)],
            "weights": list(self.weights),
            "streams": [stream.state_dict() for stream in self.streams],
        }

    def load_state_dict(self, state: dict) -> None:
        """Go on after the last document of `state`. Raises InputError when it was saved for other data or weights."""
        if state.get("weights") != self.weights:
            raise InputError("the saved position is of another mixture; keep its datasets and weights")
        for stream, saved in zip(self.streams, state["streams"]):
            stream.load_state_dict(saved)
        self.epoch, self._given = state["position"][0], list(state["position"][1])


class Source:
    """The files of one split of a dataset, in order; shared by the readers of a process."""

    def __init__(self, dataset: str, split: str, skip_bad_files: bool):
        self.dataset, self.split, self.skip_bad_files = dataset, split, skip_bad_files
        self._open(None)

    def __str__(self) -> str:
        return f"the {self.split} split of dataset {self.dataset}"

    def _open(self, revision: str | None) -> None:
        self.revision, self.total, self._requested = None, [1, None], set()
        path = Path(self.dataset).expanduser()
        if self.dataset == "primer":
            from . import primer

            self.files = [Memory(list(primer.documents("train" if self.split == "train" else "test", seed=0)))]
            return
        if path.exists():
            paths = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES) if path.is_dir() else [path]
            found = [(str(p), lambda p=p: p) for p in paths]
        elif re.fullmatch(HUB_ID, self.dataset) and path.suffix not in SUFFIXES:
            found = self._hub_files(revision)
        else:
            raise InputError(f"no dataset {self.dataset}: give a folder, a .jsonl file, a Hub id or 'primer'")
        # One kind decides, so that a stray file of the other does not become the validation split.
        suffix = next((s for s in SUFFIXES if any(name.endswith(s) for name, _ in found)), None)
        if suffix is None:
            raise InputError(f"dataset {self.dataset} has no .parquet or .jsonl files")
        found = [(name, locate) for name, locate in found if name.endswith(suffix)]
        kind, part = (Parquet if suffix == ".parquet" else Jsonl), (self.split if len(found) == 1 else None)
        files = [kind(name, locate, part, self.skip_bad_files) for name, locate in found]
        cache = GroupCache()
        for file in files:
            file.cache = cache
        self.files = files if len(files) == 1 else files[:-1] if self.split == "train" else files[-1:]
        self.total = [len(files), sum(file.path.stat().st_size for file in files) if self.revision is None else None]
        if self.revision is None:
            for file in self.files:  # on this disk: tell now, and not in an hour, which file is broken
                file.units(1)

    def _hub_files(self, revision: str | None) -> list[tuple[str, Callable[[], Path]]]:
        from huggingface_hub import HfApi, hf_hub_download

        owner, name, *folder = self.dataset.split("/")
        name, _, asked = name.partition("@")
        repo, prefix = f"{owner}/{name}", "".join(f"{part}/" for part in folder)

        def download(file: str) -> Path:
            # The cache's lock lets the processes of one machine take turns, so each file is fetched once.
            fetch = lambda: hf_hub_download(repo, file, repo_type="dataset", revision=info.sha)  # noqa: E731
            return Path(with_retry(fetch, f"file {file} of dataset {repo}"))

        list_files = lambda: HfApi().dataset_info(repo, revision=revision or asked or None, timeout=30)  # noqa: E731
        info = with_retry(list_files, f"dataset {self.dataset} (not a folder here)")
        self.revision = info.sha  # whatever is pushed later, this run reads this state of the repository
        names = sorted(file.rfilename for file in info.siblings if file.rfilename.startswith(prefix))
        return [(name, lambda name=name: download(name)) for name in names if name.endswith(SUFFIXES)]

    def prefetch(self, indices: range | list[int]) -> None:
        """Begin to download the files that come next; a failure shows when the file is read."""
        for index in indices:
            if self.revision and index not in self._requested:
                self._requested.add(index)
                Thread(target=self.files[index].prefetch, daemon=True).start()

    def identity(self) -> dict:
        return {"revision": self.revision, "files and bytes": self.total, "split": self.split}

    def require(self, identity: dict) -> None:
        """Make sure that positions saved with `identity` mean the same documents here."""
        if identity["revision"] and identity["revision"] != self.revision:
            self._open(identity["revision"])  # the Hub keeps the state that the run began with
        if identity != self.identity():
            raise InputError(
                f"{self} changed since this run began (files and bytes {identity['files and bytes']}, now "
                f"{self.total}); bring back the old files, or begin again in another --run-dir"
            )


def with_retry(action: Callable, what: str):
    """Call `action`; what may pass (network, server) is tried again with growing pauses, the rest is an InputError."""
    from huggingface_hub import errors

    for attempt in range(1, DOWNLOAD_ATTEMPTS + 1):
        try:
            return action()
        except errors.OfflineModeIsEnabled:
            raise InputError(f"{what}: the Hub cannot be asked, because HF_HUB_OFFLINE is set") from None
        except errors.GatedRepoError:
            raise InputError(f"{what}: accept its terms on the Hub, then `hf auth login`") from None
        except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
            raise InputError(f"{what}: the Hub has no such dataset or revision, or it is private") from None
        except Exception as error:  # httpx, xet and the file system each have their own
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            if attempt == DOWNLOAD_ATTEMPTS:
                raise InputError(f"{what}: failed {attempt} times, last with {reason}; run again to go on") from error
            warnings.warn(
                f"{what}: attempt {attempt} failed with {reason}; again in {2 ** (attempt - 1)} s", stacklevel=2
            )
            time.sleep(2 ** (attempt - 1))


class File:
    """A file of documents. `units(n)` lists its parts, enough for n readers; `read(unit)` gives a part's documents.

    `part` is None, or the split to keep of a dataset that has only this file.
    """

    def __init__(self, name: str, locate: Callable[[], Path], part: str | None, skip_bad: bool):
        self.name, self._locate, self.part, self.skip_bad = name, locate, part, skip_bad

    @cached_property
    def path(self) -> Path:
        return self._locate()

    def prefetch(self) -> None:
        try:
            self.path  # noqa: B018
        except InputError as error:
            warnings.warn(str(error), stacklevel=2)

    def bounds(self, total: int) -> tuple[int, int]:
        """The rows or bytes [first, end) of `total` that belong to this split."""
        edge = total - -(-total // SINGLE_FILE_VALIDATION)
        return {None: (0, total), "train": (0, edge), "validation": (edge, total)}[self.part]

    def bad(self, reason: str) -> None:
        text = f"{self.path} cannot be read ({' '.join(reason.split())[:150]})"
        if not self.skip_bad:
            raise InputError(f"{text}; get it again, or set skip_bad_files to go on without it")
        warnings.warn(f"{text}; skipped", stacklevel=3)


class Parquet(File):
    cache: "GroupCache"

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
        kind = schema.field(COLUMN).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise InputError(f"{self.path}: column {COLUMN!r} is {kind}, not text")
        return footer

    def units(self, readers: int) -> list[tuple[int, int, int]]:
        """(row group, first row, end row); row groups are sliced where they are fewer than the readers."""
        if self.footer is None:
            return []
        first, end = self.bounds(self.footer.num_rows)
        slices, found, offset = -(-readers // max(self.footer.num_row_groups, 1)), [], 0
        for group in range(self.footer.num_row_groups):
            rows = self.footer.row_group(group).num_rows
            found += [(group, a, b) for a, b in cut(max(first - offset, 0), min(end - offset, rows), slices)]
            offset += rows
        return found

    def read(self, unit: tuple[int, int, int]) -> list[str | None]:
        group, first, end = unit
        try:
            return self.cache.get(self.path, group).slice(first, end - first).to_pylist()
        except (pa.ArrowException, OSError) as error:
            self.bad(f"row group {group}: {error}")
            return []


class GroupCache:
    """The row groups decoded last, for the readers of a process that take slices of the same one."""

    LIMIT = 1 << 28  # bytes; the newest group stays whatever its size

    def __init__(self):
        self._groups: dict[tuple[Path, int], pa.ChunkedArray] = {}
        self._lock = Lock()  # the loader reads in several threads

    def get(self, path: Path, group: int) -> pa.ChunkedArray:
        key = (path, group)
        with self._lock:
            if key in self._groups:
                self._groups[key] = self._groups.pop(key)  # newest last
                return self._groups[key]
            with pq.ParquetFile(path) as file:
                self._groups[key] = file.read_row_group(group, columns=[COLUMN]).column(0)
            while len(self._groups) > 1 and sum(column.nbytes for column in self._groups.values()) > self.LIMIT:
                del self._groups[next(iter(self._groups))]
            return self._groups[key]


class Jsonl(File):
    def units(self, readers: int) -> list[tuple[int, int]]:
        """(first byte, end byte), for the lines that begin there."""
        first, end = self.bounds(self.path.stat().st_size)
        return cut(first, end, max(readers, -(-(end - first) // JSONL_UNIT)))

    def read(self, unit: tuple[int, int]) -> list[str]:
        first, end = unit
        found = []
        with open(self.path, "rb") as file:
            if first:
                file.seek(first - 1)
                file.readline()  # the rest of a line that began in the unit before
            while (at := file.tell()) < end and (line := file.readline()):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except ValueError as error:
                    self.bad(f"the line at byte {at} is not JSON: {error}")
                    continue
                if not isinstance(row, dict) or not isinstance(row.get(COLUMN), str):
                    raise InputError(f"{self.path}: the line at byte {at} has no text under {COLUMN!r}")
                found.append(row[COLUMN])
        return found


class Memory:
    """Documents that are here already."""

    def __init__(self, documents: list[str]):
        self.documents = documents

    def units(self, readers: int) -> list[tuple[int, int]]:
        return cut(0, len(self.documents), readers)

    def read(self, unit: tuple[int, int]) -> list[str]:
        return self.documents[slice(*unit)]


def cut(first: int, end: int, pieces: int) -> list[tuple[int, int]]:
    """[first, end) in `pieces` nearly equal ranges, without empty ones."""
    edges = [first + (end - first) * i // pieces for i in range(pieces + 1)]
    return [(a, b) for a, b in pairwise(edges) if a < b]
