"""Batches of packed sequences for pretraining, made in background threads, with an exact data-loader state.

    loader = PackedLoader(DocumentStream("primer", rank=rank, world_size=world), tokenizer, batch_size=16, seq_len=128)
    batch = next(loader)             # (B, T + 1) int32: inputs are batch[:, :-1], targets batch[:, 1:]
    state = loader.state_dict()      # save one per rank; a resumed run loads its own, or those of all ranks

A document passes DocumentStream -> token_chunks -> BestFitPacker -> batch.

Best-fit packing without padding, as in karpathy/nanochat: a row takes the longest waiting document that fits. When
none fits, the shortest one is cut to fill the row. With the packing strategy `bfd` the rest is lost, as upstream: of
books 18 % in rows of 2,048 tokens, 74 % in rows of 256. With `bfd_split` it becomes a document with its own bos
(TRL's names; measured in docs/experiments/data.md).

The rows of a step do not depend on the number of ranks (elastic determinism, as MosaicML Streaming). Documents are
assigned round-robin to a fixed number of virtual shards, each with its own packer. Row n of the run comes from shard
n % num_shards and goes to rank n % world_size.
"""

import math
import os
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from ..errors import InputError
from .documents import DocumentStream, MixtureStream
from .tokenizer import encode_documents

CHUNK_CHARS = 1 << 20  # characters tokenized at once; bounds the memory where documents are as long as books
KEPT_CHARS = 1 << 24  # characters whose tokens a shard keeps, if `max_chars` is not less
# Validation rows are packed by upstream's rule, so that bits per byte compare, and alike for 1, 2, 4 and 8 ranks.
VALIDATION = {"num_shards": 8, "packing_strategy": "bfd"}


def token_chunks(
    stream: DocumentStream | MixtureStream, tokenizer: PreTrainedTokenizerFast, size: int, max_chars: float
) -> Iterator[list[np.ndarray]]:
    """Endless lists of tokenized documents, epoch after epoch: `size` each, or fewer where they reach `max_chars`.

    Tokens of few texts are kept for the next epoch: `bfd` takes one row of a text as long as a book, so an evaluation
    on a small split would tokenize all of it hundreds of times.
    """
    texts, chars, encoded = [], 0, {}
    limit = min(max_chars, KEPT_CHARS)
    while True:
        for text in stream:
            texts.append(text)
            chars += len(text)
            if len(texts) == size or chars >= max_chars:
                new = [text for text in texts if text not in encoded]
                encoded |= zip(new, encode_documents(tokenizer, new))
                yield [encoded[text] for text in texts]
                texts, chars = [], 0
                if sum(map(len, encoded)) > limit:
                    encoded = {}


class BestFitPacker:
    """Fills rows of `row_length` = T + 1 tokens with the best fit among at least `buffer_size` waiting documents.

    `chunks` yields lists of documents: arrays (n,) of token ids, bos first. Documents of equal length are taken in
    the order they came, so packing is deterministic.
    """

    def __init__(self, chunks: Iterator[list[np.ndarray]], row_length: int, buffer_size: int, strategy: str):
        self.chunks, self.row_length, self.buffer_size = chunks, row_length, buffer_size
        self.split = {"bfd_split": True, "bfd": False}[strategy]
        self._arrivals = count()
        self._waiting: list[tuple[int, int, np.ndarray]] = []  # (length, arrival, document), sorted

    def add(self, documents: list[np.ndarray]) -> None:
        step = self.row_length - 1  # tokens of a piece besides its bos
        for document in documents:
            parts = [document]
            if self.split and len(document) > self.row_length:
                parts = [after_bos(document, start, start + step) for start in range(1, len(document), step)]
            for part in parts:
                insort(self._waiting, (len(part), next(self._arrivals), part))

    def take(self, space: int) -> np.ndarray:
        """Remove and return the longest document of at most `space` tokens, or the shortest cut to `space`."""
        while len(self._waiting) < self.buffer_size and (documents := next(self.chunks, None)) is not None:
            self.add(documents)
        longer = bisect_left(self._waiting, (space + 1,))  # the documents from here on do not fit
        length = self._waiting[max(longer - 1, 0)][0]
        *_, document = self._waiting.pop(bisect_left(self._waiting, (length,)))  # the first that came of this length
        if length > space and self.split:
            self.add([after_bos(document, space)])
        return document[:space]

    def fill(self, row: np.ndarray) -> None:
        """Fill `row` (T + 1,) in place."""
        at = 0
        while at < len(row):
            piece = self.take(len(row) - at)
            row[at : at + len(piece)] = piece
            at += len(piece)

    def waiting(self) -> list[np.ndarray]:
        """The waiting documents, in an order from which `add` restores this packer's every later choice."""
        return [document for *_, document in self._waiting]


def after_bos(document: np.ndarray, start: int, end: int | None = None) -> np.ndarray:
    """document[start:end] with the bos of the document; a copy, because a view would keep all of a book in memory."""
    return np.concatenate([document[:1], document[start:end]])


class PackedLoader:
    """Endless batches (B, T + 1) of token ids, int32, every row beginning with bos and without padding.

    Args:
        stream: the documents; its rank and world size are the loader's.
        buffer_size: documents that packing chooses from, over all virtual shards together.
        num_shards: virtual shards, rounded up to a multiple of the world size.
        prefetch: batches that are made ahead.
    """

    def __init__(
        self,
        stream: DocumentStream | MixtureStream,
        tokenizer: PreTrainedTokenizerFast,
        batch_size: int,
        seq_len: int,
        buffer_size: int = 1000,
        num_shards: int = 64,
        packing_strategy: str = "bfd_split",
        prefetch: int = 8,
    ):
        self.stream, self.tokenizer = stream, tokenizer
        self.batch_size, self.seq_len, self.prefetch = batch_size, seq_len, prefetch
        self.buffer_size, self.packing_strategy = buffer_size, packing_strategy
        self.num_shards = math.ceil(max(num_shards, 1) / stream.world_size) * stream.world_size
        # Rows of all ranks up to the last batch handed out; the stream's state and waiting documents of each shard.
        self._last: tuple[int, dict[int, tuple[dict, list[np.ndarray]]]] = (0, {})
        self._thread: ThreadPoolExecutor | None = None
        self._pending: deque[Future] = deque()

    @property
    def epoch(self) -> int:
        """How often the data has been read through, by the shard that is farthest."""
        return max((stream["position"][0] for stream, _ in self._last[1].values()), default=0)

    def __iter__(self) -> "PackedLoader":
        return self

    def __next__(self) -> np.ndarray:
        if self._thread is None:  # it ends with the loader, because nothing in it refers to the loader
            self._thread = ThreadPoolExecutor(1, "packed-loader")
            self._batches = self._batches_from(*self._last)
        while len(self._pending) < self.prefetch:
            self._pending.append(self._thread.submit(next, self._batches))
        try:
            batch, self._last = self._pending.popleft().result()
        except BaseException:
            self.close()
            raise
        return batch

    def _batches_from(self, rows: int, snapshots: dict) -> Iterator:
        rank, world_size = self.stream.rank, self.stream.world_size
        buffer_size = math.ceil(self.buffer_size / self.num_shards)
        # `bfd` is upstream's rule, whose chunks count documents only.
        max_chars = CHUNK_CHARS if self.packing_strategy == "bfd_split" else math.inf
        shards = {}
        for number in range(rank, self.num_shards, world_size):
            stream = self.stream.shard(number, self.num_shards)
            chunks = token_chunks(stream, self.tokenizer, min(max(buffer_size // 4, 8), 128), max_chars)
            packer = BestFitPacker(chunks, self.seq_len + 1, buffer_size, self.packing_strategy)
            if number in snapshots:
                state, waiting = snapshots[number]
                stream.load_state_dict(state)
                packer.add(waiting)
            shards[number] = stream, packer
        return make_batches(shards, rows, rank, world_size, self.batch_size, self.seq_len)

    def state_dict(self) -> dict:
        """The data-loader state after the last batch handed out: integers, strings and tensors only."""
        rows, snapshots = self._last
        shards = {}
        for number, (stream, waiting) in snapshots.items():
            tokens = np.concatenate(waiting) if waiting else np.empty(0, np.uint16)
            lengths = [len(document) for document in waiting]
            shards[number] = {"stream": stream, "tokens": torch.from_numpy(tokens), "lengths": lengths}
        return {"rows": rows, "num_shards": self.num_shards, "shards": shards}

    def load_state_dict(self, state: dict | list[dict]) -> None:
        """Resume from a state of this rank, or from those of all ranks of a run that had another number."""
        states = state if isinstance(state, list) else [state]
        rows, num_shards, world_size = states[0]["rows"], states[0]["num_shards"], self.stream.world_size
        if num_shards % world_size:
            advice = f"resume with a number of ranks that divides {num_shards}"
            raise InputError(f"{world_size} ranks cannot share the {num_shards} virtual shards of this run: {advice}")
        if any(one["rows"] != rows for one in states):
            raise InputError("the ranks' data-loader states are from different steps; resume from another checkpoint")
        shards = {number: shard for one in states for number, shard in one["shards"].items()}
        own = range(self.stream.rank, num_shards, world_size)
        if rows and not set(own) <= set(shards):
            raise InputError("the number of ranks changed: load the data-loader states of all the earlier ranks")
        self.close()
        snapshots = {}
        for number, saved in ((number, shards[number]) for number in own if rows):
            documents = np.split(saved["tokens"].numpy(), np.cumsum(saved["lengths"])[:-1]) if saved["lengths"] else []
            snapshots[number] = saved["stream"], documents
        self.num_shards, self._last = num_shards, (rows, snapshots)

    def close(self) -> None:
        """Stop the background thread; `next` starts it again, from the last batch handed out."""
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)
            self._thread, self._batches = None, None
            self._pending.clear()


def make_batches(shards: dict[int, tuple], rows: int, rank: int, world_size: int, batch_size: int, seq_len: int):
    """Endless (batch, (rows of all ranks so far, snapshot of every shard)), from `rows` on."""
    numbers = list(shards)
    snapshots = {number: (stream.state_dict(), packer.waiting()) for number, (stream, packer) in shards.items()}
    row = math.ceil((rows - rank) / world_size)  # of this rank

    def fill(number: int, targets: list[np.ndarray]) -> None:
        for target in targets:
            shards[number][1].fill(target)

    with ThreadPoolExecutor(num_threads(), "packed-loader-shard") as pool:
        while True:
            batch = np.empty((batch_size, seq_len + 1), np.int32)
            targets: dict[int, list[np.ndarray]] = {}  # rows of the batch by their shard, which fills them in order
            for i in range(batch_size):
                targets.setdefault(numbers[(row + i) % len(numbers)], []).append(batch[i])
            list(pool.map(fill, targets, targets.values()))  # raises what they raise
            snapshots = dict(snapshots)
            for number in targets:
                stream, packer = shards[number]
                snapshots[number] = stream.state_dict(), packer.waiting()
            row, rows = row + batch_size, rows + batch_size * world_size
            yield batch, (rows, snapshots)


def num_threads() -> int:
    """Shards filled at once. Tokenizing, 95 % of the work, runs without Python's lock, so threads suffice."""
    return min(8, max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
