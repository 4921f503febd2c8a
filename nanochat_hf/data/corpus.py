"""Pretraining text as a stream of documents: any dataset spec, split in two, dealt over readers, resumable exactly.

A dataset spec is one of
    org/name, org/name@revision, org/name/folder   a dataset of the Hub: parquet or .jsonl files with a column `text`
    path/to/folder                                 such files on this disk
    path/to/file.jsonl                             one of them (.parquet too)
    primer                                         the demo's embedded corpus
or, for `open_documents`, a mixture: a list of {dataset: one of these, weight: 0.5}. A weight is a share of the bytes
of UTF-8, which is nearer to a share of the tokens than documents or characters are (a Hangul syllable has 3 bytes).
Names tell the splits (data/splits.py). Where none does, the last file is the validation split, as in
karpathy/nanochat, and a line says so; of a single file it is the last sixteenth. Hidden files are not read.

The order of documents is fixed before anything is read. A file is a run of units (parquet row groups, or slices of
them), and the units of all files, counted on through all epochs, are dealt in turn to the readers. So a position is a
few integers, resuming opens one file, and the readers share every document of an epoch exactly once. The first epoch
keeps the files' own order, so a run downloads no more files than it reads; later ones shuffle files, units and
documents by the seed. There is no shuffle buffer whose content a resume would lose.
"""

import copy
import math
import random
from collections.abc import Iterator

from ..errors import InputError
from ..run import fingerprint
from .corpus_files import DatasetSplit, content_hash, find_files, is_hub_id, local_path, split_files


def open_documents(
    dataset: str | list[dict],
    split: str = "train",
    rank: int = 0,
    world_size: int = 1,
    seed: int = 0,
    skip_bad_files: bool = False,
) -> "DocumentStream | MixedStream":
    """The stream of a dataset spec or of a mixture of them. Raises InputError as `DocumentStream` does."""
    parts = parts_of(dataset)
    streams = [DocumentStream(name, split, rank, world_size, seed, skip_bad_files) for name, _ in parts]
    return MixedStream(streams, [weight for _, weight in parts]) if isinstance(dataset, list) else streams[0]


def parts_of(dataset: str | list[dict]) -> list[tuple[str, float]]:
    """(dataset spec, weight) of each part of a mixture, or of the one spec. Raises InputError for a wrong mixture."""
    if not isinstance(dataset, list):
        return [(str(dataset), 1)]
    if not dataset:
        raise InputError("the mixture is empty: give at least one {dataset: ..., weight: ...}")
    for entry in dataset:
        if not isinstance(entry, dict) or not isinstance(entry.get("dataset"), str):
            raise InputError(f"an entry of the mixture must be {{dataset: ..., weight: ...}}, not {entry!r}")
        if unknown := [key for key in entry if key not in ("dataset", "weight")]:
            raise InputError(f"unknown key {unknown[0]!r} in the mixture's entry for {entry['dataset']}")
        weight = entry.get("weight", 1)
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
            raise InputError(f"the weight of {entry['dataset']} must be a number above 0, not {weight!r}")
    return [(entry["dataset"], entry.get("weight", 1)) for entry in dataset]


def is_local(dataset: str | list[dict]) -> bool:
    """Whether all of it is on this disk or in the package, so that `text_fingerprint` sees every change."""
    return all(name == "primer" or local_path(name).exists() for name, _ in parts_of(dataset))


def text_fingerprint(dataset: str | list[dict]) -> str:
    """A short hash of both splits of a dataset spec or a mixture, for noticing that the text changed.

    Of files on this disk `content_hash`, of the primer its documents. Of a Hub id the id as it is written, with its
    @revision if it has one: a commit that comes later changes nothing, since a saved position goes back to its own.
    Raises InputError for a dataset that is missing or has no such files.
    """
    return fingerprint([(_part_fingerprint(name), weight) for name, weight in parts_of(dataset)])


def _part_fingerprint(name: str) -> str | list[str]:
    if name == "primer":
        return [DatasetSplit(name, split, False).identity["content"] for split in ("train", "validation")]
    if not local_path(name).exists() and is_hub_id(name):
        return name
    names, locate, _ = find_files(name, None)
    _, train, validation = split_files(name, names)
    return content_hash(train, validation, locate)


class DocumentStream:
    """The documents (str) of reader `rank` out of `world_size`; iterating gives the rest of the current epoch.

    `epoch` counts finished epochs. `state_dict` is the position after the last document handed out. Raises InputError
    for a dataset that is missing, empty, unreadable or without text; with `skip_bad_files` what cannot be read is
    skipped with a warning.
    """

    def __init__(self, dataset: str, split="train", rank=0, world_size=1, seed=0, skip_bad_files=False):
        self.source, self.seed = DatasetSplit(str(dataset), split, skip_bad_files), seed
        self._begin(rank, world_size)

    def _begin(self, rank: int, world_size: int) -> None:
        if not 0 <= rank < world_size:
            raise InputError(f"rank {rank} does not exist among {world_size} readers")
        self.rank, self.world_size = rank, world_size
        self.epoch = 0
        self._file = 0  # files finished in this epoch
        self._start = 0  # units of all finished files, since the very beginning
        self._unit = 0  # units finished in the current file
        self._row = 0  # documents handed out of the current unit
        self._idle = 0  # epochs in a row without a text for this reader

    def reader(self, rank: int, world_size: int) -> "DocumentStream":
        """Another reader's stream from the beginning, over the same opened files."""
        other = copy.copy(self)
        other._begin(rank, world_size)
        return other

    def __iter__(self) -> Iterator[str]:
        files, found = [self.source.files[number] for number in self._order(len(self.source.files), "files")], False
        while self._file < len(files):
            file = files[self._file]
            for following in files[self._file + 1 : self._file + 2]:
                following.prefetch()
            units = file.units(self.world_size)
            unit_order = self._order(len(units), f"units {self._file}")
            while self._unit < len(units):
                if (self._start + self._unit) % self.world_size == self.rank:
                    rows = file.read(units[unit_order[self._unit]])
                    row_order = self._order(len(rows), f"rows {self._file} {self._unit}")
                    while self._row < len(rows):
                        self._row += 1
                        if text := rows[row_order[self._row - 1]]:
                            found = True
                            yield text
                self._unit, self._row = self._unit + 1, 0
            self._file, self._unit, self._start = self._file + 1, 0, self._start + len(units)
        if self._start == 0:
            raise InputError(f"the {self.source.split} split of dataset {self.source.dataset} has no documents")
        self.epoch, self._file, self._idle = self.epoch + 1, 0, 0 if found else self._idle + 1
        # A share of an epoch may well be empty (a slice in which no line begins), but not so often by chance.
        if self._idle > 20 * self.world_size:
            raise InputError(
                f"{self.source.split} split of dataset {self.source.dataset} has no text: it is empty or unreadable"
            )

    def _order(self, count: int, what: str) -> range | list[int]:
        if self.epoch == 0:
            return range(count)
        order = list(range(count))
        random.Random(f"{self.seed} {self.epoch} {what}").shuffle(order)
        return order

    def state_dict(self) -> dict:
        return {
            "position": [self.epoch, self._file, self._start, self._unit, self._row],
            "reader": [self.rank, self.world_size, self.seed],
            "source": self.source.identity,
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
        self.rank, self.world_size = streams[0].rank, streams[0].world_size
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
