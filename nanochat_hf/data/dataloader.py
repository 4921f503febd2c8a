"""Documents into rows of equal length, without padding: best fit, every row beginning with bos.

Row by row, the longest waiting document that still fits is taken; when none fits, the shortest is cropped to fill the
row. So every token can attend to a bos and every position is trained on. karpathy/nanochat's loader, whose algorithm
this is, pays with the cropped tails; here a tail may wait with the others, as a document with a bos of its own, so
that no token is lost. The shortest is the one to crop then too: it leaves the shortest tails, and so the most text
that is read from its beginning (docs/experiments/data.md).

Batches of packed rows for pretraining, made in background threads, with a position that is exact.

    loader = PackedLoader(DocumentStream("primer", rank=rank, world_size=world), tokenizer, batch_size=16, seq_len=128)
    batch = next(loader)             # (B, T + 1) int32: inputs are batch[:, :-1], targets batch[:, 1:]
    state = loader.state_dict()      # save one per process; a resumed run is given its own, or all of them

What is read does not depend on how many processes read it. The documents are dealt over a fixed number of lanes, each
with a packer of its own; row n of the run is made by lane n % lanes, and process r of w makes the rows with n % w = r.
So 1 process with 4 micro-batches sees in each step the rows that 4 processes with 1 see, and a run may be resumed with
any number of processes that divides the lanes.
"""

import math
import os
import queue
import threading
import weakref
from bisect import bisect_right, insort
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from ..errors import InputError
from .documents import DocumentStream, MixtureStream
from .tokenizer import encode_documents


class BestFitPacker:
    """Waiting documents, found by length. Equal lengths leave in the order they came, so packing is deterministic.

    With `keep_tails` what is cropped waits on, and a document longer than a row of `row_length` = T + 1 tokens is cut
    into pieces that fill one each, and a rest. Without, a tail is lost, and a long document waits to be the shortest.
    `num_tokens` counts the tokens handed out, the tails' own bos included, `num_cropped` those that were lost.
    """

    def __init__(self, row_length: int, keep_tails: bool):
        self.row_length, self.keep_tails = row_length, keep_tails
        self._by_length: dict[int, deque[np.ndarray]] = {}
        self._lengths: list[int] = []  # the keys above, sorted
        self._count = 0
        self.num_tokens = 0
        self.num_cropped = 0

    def __len__(self) -> int:
        return self._count

    def add(self, documents: Iterable[np.ndarray]) -> None:
        """Documents are arrays (n,) of token ids with bos first; an empty one is refused with ValueError."""
        for document in documents:
            if not len(document):
                raise ValueError("a document needs at least its bos token")
            if not self.keep_tails or len(document) <= self.row_length:
                self._push(document)
                continue
            text = self.row_length - 1  # of a piece, beside its bos
            for start in range(1, len(document), text):
                self._push(after_bos(document, start, start + text))

    def _push(self, document: np.ndarray) -> None:
        length = len(document)
        if length not in self._by_length:
            self._by_length[length] = deque()
            insort(self._lengths, length)
        self._by_length[length].append(document)
        self._count += 1

    def take(self, space: int) -> np.ndarray:
        """Remove and return the longest document of at most `space` tokens, or the shortest cropped to `space`."""
        if not self._count:
            raise IndexError("no documents are waiting")
        at = max(bisect_right(self._lengths, space) - 1, 0)
        length = self._lengths[at]
        waiting = self._by_length[length]
        document = waiting.popleft()
        if not waiting:
            del self._by_length[length], self._lengths[at]
        self._count -= 1
        self.num_tokens += min(length, space)
        if length > space and self.keep_tails:
            self._push(after_bos(document, space))
        elif length > space:
            self.num_cropped += length - space
        return document[:space]

    def fill(self, row: np.ndarray, refill: Callable[[], None]) -> None:
        """Fill `row` (T + 1,) in place; `refill` is called before each document is chosen, to keep the choice wide."""
        position = 0
        while position < len(row):
            refill()
            piece = self.take(len(row) - position)
            row[position : position + len(piece)] = piece
            position += len(piece)

    def waiting(self) -> list[np.ndarray]:
        """The waiting documents, in an order from which `add` restores this packer's every later choice."""
        return [document for length in self._lengths for document in self._by_length[length]]


def after_bos(document: np.ndarray, start: int, end: int | None = None) -> np.ndarray:
    """document[start:end] with the bos of the document; a copy, because a view would keep all of a book in memory."""
    return np.concatenate([document[:1], document[start:end]])


CHUNK_CHARS = 1 << 20  # enough to tokenize at once; bounds what waits where documents are as long as books


class Lane:
    """One share of the documents on its way into rows: endless over epochs, `buffer_size` documents to choose from.

    Where tails are kept, never more waits than `buffer_size` rows, the text of CHUNK_CHARS, and one document.
    """

    def __init__(self, stream: DocumentStream | MixtureStream, tokenizer, buffer_size: int, packer: BestFitPacker):
        self.stream, self.tokenizer, self.buffer_size, self.packer = stream, tokenizer, buffer_size, packer
        self.chunk = min(max(buffer_size // 4, 8), 128)
        # Upstream's rule is there to compare validation with, so what it chooses from counts documents only.
        self.chunk_chars = CHUNK_CHARS if packer.keep_tails else math.inf
        self.documents = self._documents()

    def _documents(self) -> Iterator[str]:
        while True:
            yield from self.stream

    def refill(self) -> None:
        while len(self.packer) < self.buffer_size:
            texts, chars = [], 0
            while len(texts) < self.chunk and chars < self.chunk_chars:
                texts.append(next(self.documents))
                chars += len(texts[-1])
            self.packer.add(encode_documents(self.tokenizer, texts))

    def fill(self, rows: list[np.ndarray]) -> None:
        for row in rows:
            self.packer.fill(row, self.refill)

    def snapshot(self) -> tuple[dict, list[np.ndarray]]:
        return self.stream.state_dict(), self.packer.waiting()

    def restore(self, state: dict) -> None:
        self.stream.load_state_dict(state["stream"])
        ends = np.cumsum(state["lengths"])[:-1]
        self.packer.add(np.split(state["tokens"].numpy(), ends) if len(state["lengths"]) else [])


# Of validation rows: packed by upstream's rule, so that bits per byte compare; the same for 1, 2, 4 and 8 processes.
VALIDATION = {"lanes": 8, "keep_tails": False}


class PackedLoader:
    """Endless batches (B, T + 1) of token ids, int32, every row beginning with bos and without padding.

    `buffer_size` is the number of documents that packing chooses from, over all lanes together. With `keep_tails`
    every token of every document comes: what a row has no room for waits, after a bos of its own. Without, it is lost,
    as in upstream's loader: of books 18 % in rows of 2,048 tokens, 74 % in rows of 256. `lanes` is rounded up to a
    multiple of the stream's world size.
    """

    def __init__(
        self,
        stream: DocumentStream | MixtureStream,
        tokenizer: PreTrainedTokenizerFast,
        batch_size: int,
        seq_len: int,
        buffer_size: int = 1000,
        lanes: int = 64,
        keep_tails: bool = True,
        prefetch: int = 8,
    ):
        self.stream, self.tokenizer = stream, tokenizer
        self.batch_size, self.seq_len, self.prefetch = batch_size, seq_len, prefetch
        self.buffer_size, self.keep_tails = buffer_size, keep_tails
        world_size = stream.world_size
        self.num_lanes = -(-max(lanes, 1) // world_size) * world_size
        self._start = None  # the state to begin from
        self._last = None  # rows handed out, and each lane as it was then
        self._queue = None

    @property
    def epoch(self) -> int:
        """How often the data has been read through, by the lane that is farthest."""
        return max((stream["position"][0] for stream, _ in self._last[1].values()), default=0) if self._last else 0

    def __iter__(self) -> "PackedLoader":
        return self

    def __next__(self) -> np.ndarray:
        if self._queue is None:
            self._begin()
        item = self._queue.get()
        if isinstance(item, BaseException):
            self.close()
            raise item
        batch, self._last = item
        return batch

    def _begin(self) -> None:
        self._queue, stop = queue.Queue(self.prefetch), threading.Event()
        batches = self._batches_from(self._start)
        # The thread knows the queue and not the loader, so that a forgotten loader ends it.
        threading.Thread(target=produce, args=(batches, self._queue, stop), daemon=True, name="packed-loader").start()
        self._finalizer = weakref.finalize(self, stop.set)

    def _batches_from(self, state: dict | None) -> Iterator:
        rank, world_size = self.stream.rank, self.stream.world_size
        numbers = range(rank, self.num_lanes, world_size)
        lanes = {}
        for number in numbers:
            stream = self.stream.reader(number, self.num_lanes)
            packer = BestFitPacker(self.seq_len + 1, self.keep_tails)
            lanes[number] = Lane(stream, self.tokenizer, -(-self.buffer_size // self.num_lanes), packer)
            if state:
                lanes[number].restore(state["lanes"][number])
        done = state["rows"] if state else 0
        first = -(-(done - rank) // world_size)  # this process's first row at or after that
        return make_batches(lanes, first, done, world_size, self.batch_size, self.seq_len)

    def state_dict(self) -> dict:
        """The position after the last batch handed out: integers, strings and tensors only."""
        if self._last is None:
            return self._start or {"rows": 0, "num_lanes": self.num_lanes, "lanes": {}}
        rows, snapshots = self._last
        lanes = {}
        for number, (stream, waiting) in snapshots.items():
            tokens = np.concatenate(waiting) if waiting else np.empty(0, np.uint16)
            lengths = [len(document) for document in waiting]
            lanes[number] = {"stream": stream, "tokens": torch.from_numpy(tokens), "lengths": lengths}
        return {"rows": rows, "num_lanes": self.num_lanes, "lanes": lanes}

    def load_state_dict(self, state: dict | list[dict]) -> None:
        """Go on from a state of this process, or from those of all processes of a run that had another number."""
        states = state if isinstance(state, list) else [state]
        num_lanes, world_size = states[0]["num_lanes"], self.stream.world_size
        if num_lanes % world_size:
            raise InputError(
                f"this run's data is dealt over {num_lanes} lanes, which {world_size} processes cannot share equally; "
                f"resume with a number of processes that divides {num_lanes}"
            )
        if len({state["rows"] for state in states}) != 1:
            raise InputError("the processes' data positions are from different steps; resume from another checkpoint")
        merged = {"rows": states[0]["rows"], "num_lanes": num_lanes, "lanes": {}}
        for part in states:
            merged["lanes"] |= part["lanes"]
        own = range(self.stream.rank, num_lanes, world_size)
        if merged["rows"] and not set(own) <= set(merged["lanes"]):
            raise InputError("the number of processes changed: load the data positions of all the earlier processes")
        self.close()
        self.num_lanes, self._last = num_lanes, None
        merged["lanes"] = {number: merged["lanes"][number] for number in own if number in merged["lanes"]}
        self._start = merged if merged["rows"] else None

    def close(self) -> None:
        """Stop the background thread; `next` starts it again, from the last batch handed out."""
        if self._queue is not None:
            self._finalizer()
            self._start, self._queue = self.state_dict() if self._last else self._start, None


def make_batches(
    lanes: dict[int, Lane], row: int, done: int, world_size: int, batch_size: int, seq_len: int
) -> Iterator:
    """(batch, (rows done by all processes, snapshot of every lane)), for ever; `row` counts this process's rows."""
    numbers = list(lanes)
    snapshots = {number: lane.snapshot() for number, lane in lanes.items()}
    with ThreadPoolExecutor(threads(), "packed-loader-lane") as pool:
        while True:
            batch = np.empty((batch_size, seq_len + 1), np.int32)
            rows: dict[int, list[np.ndarray]] = {}  # by the lane that makes them, one after the other
            for i in range(batch_size):
                rows.setdefault(numbers[(row + i) % len(numbers)], []).append(batch[i])
            list(
                pool.map(lambda number, rows: lanes[number].fill(rows), rows, rows.values())
            )  # raises what they raise
            snapshots = snapshots | {number: lanes[number].snapshot() for number in rows}
            row, done = row + batch_size, done + batch_size * world_size
            yield batch, (done, snapshots)


def threads() -> int:
    """Lanes worked on at once. Tokenizing, 95 % of the work, runs without the interpreter's lock, so threads are as
    good as processes here, and share files and tokenizer."""
    return min(8, max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def produce(batches: Iterator, target: queue.Queue, stop: threading.Event) -> None:
    """Put batches, or at last the exception that ended them, until told to stop."""
    while not stop.is_set():
        try:
            item = next(batches)
        except BaseException as error:
            item = error
        while not stop.is_set():
            try:
                target.put(item, timeout=0.2)
                break
            except queue.Full:
                continue
        if isinstance(item, BaseException):
            return
