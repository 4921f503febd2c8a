"""Documents into rows of equal length, without padding: best fit, every row beginning with bos.

Row by row, the longest waiting document that still fits is taken; when none fits, the shortest is cropped to fill the
row. So each document is seen from its beginning, every position is trained on, and the price is the cropped tails
(the algorithm of karpathy/nanochat's loader). Pure: arrays in, arrays out; `loader.py` feeds it.
"""

from bisect import bisect_right, insort
from collections import deque
from collections.abc import Callable, Iterable

import numpy as np


class BestFitPacker:
    """Waiting documents, found by length. Equal lengths leave in the order they came, so packing is deterministic.

    `num_tokens` counts the tokens handed out, `num_cropped` those that were cut off.
    """

    def __init__(self):
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
            length = len(document)
            if not length:
                raise ValueError("a document needs at least its bos token")
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
        self.num_cropped += max(length - space, 0)
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
