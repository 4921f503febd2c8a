"""Packing against a slow twin, and what rows must look like."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanochat_hf.data.packing import BestFitPacker

BOS = 0


def document(number: int, length: int) -> np.ndarray:
    """bos, then the document's own number, so that every token tells where it came from."""
    return np.array([BOS] + [number] * (length - 1), np.uint16)


def slow_rows(documents: list[np.ndarray], row_length: int, buffer_size: int) -> list[list[int]]:
    """The same rule written plainly: look through the whole list each time. Stops when the documents run out."""
    rest, waiting, rows = list(documents), [], []
    while True:
        row = []
        while len(row) < row_length:
            while len(waiting) < buffer_size and rest:
                waiting.append(rest.pop(0))
            if not waiting:
                return rows
            space = row_length - len(row)
            fitting = [d for d in waiting if len(d) <= space]
            best = max(fitting, key=len) if fitting else min(waiting, key=len)
            waiting = [d for d in waiting if d is not best]
            row += best[:space].tolist()
        rows.append(row)


def packed_rows(documents, row_length, buffer_size, packer=None) -> list[list[int]]:
    packer, rest, rows = packer or BestFitPacker(), iter(documents), []

    def refill():
        while len(packer) < buffer_size and (one := next(rest, None)) is not None:
            packer.add([one])

    while True:
        row = np.empty(row_length, np.uint16)
        try:
            packer.fill(row, refill)
        except IndexError:
            return rows
        rows.append(row.tolist())


lengths = st.lists(st.integers(1, 40), min_size=1, max_size=80)


@given(lengths, st.integers(2, 33), st.integers(1, 12))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_packing_equals_a_plain_search_through_the_list(sizes, row_length, buffer_size):
    documents = [document(i + 1, n) for i, n in enumerate(sizes)]
    assert packed_rows(documents, row_length, buffer_size) == slow_rows(documents, row_length, buffer_size)


@given(lengths, st.integers(2, 33))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_rows_are_full_begin_with_bos_and_hold_each_document_once(sizes, row_length):
    rows = packed_rows([document(i + 1, n) for i, n in enumerate(sizes)], row_length, 10)
    seen = []
    for row in rows:
        assert len(row) == row_length
        assert row[0] == BOS
        starts = [i for i, token in enumerate(row) if token == BOS] + [row_length]
        for begin, end in pairwise(starts):
            numbers = set(row[begin + 1 : end])
            assert len(numbers) <= 1, "a document is never mixed with another"
            seen += numbers
    assert len(seen) == len(set(seen)), "a document never comes twice"


def test_only_the_last_document_of_a_row_is_cropped_and_the_loss_is_counted():
    packer = BestFitPacker()
    packer.add([document(1, 6), document(2, 3), document(3, 9)])
    row = np.empty(8, np.uint16)
    packer.fill(row, lambda: None)
    assert row.tolist() == [0, 1, 1, 1, 1, 1, 0, 2]
    assert (packer.num_tokens, packer.num_cropped) == (8, 1)
    assert len(packer) == 1


@given(lengths, lengths)
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_a_packer_rebuilt_from_its_waiting_documents_packs_the_same_rows(first, second):
    packer = BestFitPacker()
    packer.add(document(i + 1, n) for i, n in enumerate(first))
    packer.take(7)
    twin = BestFitPacker()
    twin.add(packer.waiting())
    more = [document(i + 1000, n) for i, n in enumerate(second)]
    assert packed_rows(more, 16, 10, packer) == packed_rows(more, 16, 10, twin)


def test_an_empty_document_and_an_empty_packer_are_refused():
    packer = BestFitPacker()
    with pytest.raises(ValueError, match="bos"):
        packer.add([np.empty(0, np.uint16)])
    with pytest.raises(IndexError, match="waiting"):
        packer.take(4)
