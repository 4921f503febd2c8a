"""Documents into rows of equal length, without padding: best fit, every row beginning with bos.

Row by row, the longest waiting document that still fits is taken; when none fits, the shortest is cropped to fill the
row. So every token can attend to a bos and every position is trained on. karpathy/nanochat's loader, whose algorithm
this is, pays with the cropped tails; here a tail may wait with the others, as a document with a bos of its own, so
that no token is lost. The shortest is the one to crop then too: it leaves the shortest tails, and so the most text
that is read from its beginning (measured in recipes/LOG.md). Pure: arrays in, arrays out; `loader.py` feeds it.
"""

from bisect import bisect_right, insort
from collections import deque
from collections.abc import Callable, Iterable

import numpy as np


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
