"""Packing against a slow twin, and what rows must look like."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanochat_hf.data.dataloader import BestFitPacker

BOS = 0
UNSET = 65535


def document(number: int, length: int) -> np.ndarray:
    """bos, then tokens that tell which document they are from and where they stood in it."""
    return np.array([BOS] + [number * 100 + place for place in range(1, length)], np.uint16)


def documents_of(sizes: list[int]) -> list[np.ndarray]:
    return [document(i + 1, n) for i, n in enumerate(sizes)]


def slow_rows(documents: list[np.ndarray], row_length: int, buffer_size: int, keep_tails: bool) -> list[list[int]]:
    """The same rule written plainly: look through the whole list each time. Stops when the documents run out."""
    rest, waiting, rows = [d.tolist() for d in documents], [], []
    while True:
        row = []
        while len(row) < row_length:
            while len(waiting) < buffer_size and rest:
                waiting.append(rest.pop(0))
                while keep_tails and len(waiting[-1]) > row_length:
                    long = waiting.pop()
                    waiting += [long[:row_length], [BOS] + long[row_length:]]
            if not waiting:
                return rows
            space = row_length - len(row)
            fitting = [d for d in waiting if len(d) <= space]
            best = max(fitting, key=len) if fitting else min(waiting, key=len)
            waiting = [d for d in waiting if d is not best]
            row += best[:space]
            if keep_tails and len(best) > space:
                waiting.append([BOS] + best[space:])
        rows.append(row)


def packed_rows(documents, row_length, buffer_size, packer) -> list[list[int]]:
    """Rows until the documents run out; the last one ends where they do."""
    rest, rows = iter(documents), []

    def refill():
        while len(packer) < buffer_size and (one := next(rest, None)) is not None:
            packer.add([one])

    while True:
        row = np.full(row_length, UNSET, np.uint16)
        try:
            packer.fill(row, refill)
        except IndexError:
            return rows + [row[row != UNSET].tolist()]
        rows.append(row.tolist())


def pieces_of(row: list[int]) -> list[list[int]]:
    """The runs between one bos and the next."""
    starts = [i for i, token in enumerate(row) if token == BOS] + [len(row)]
    return [row[begin + 1 : end] for begin, end in pairwise(starts)]


lengths = st.lists(st.integers(1, 40), min_size=1, max_size=80)
slowly = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@given(lengths, st.integers(2, 33), st.integers(1, 12), st.booleans())
@slowly
def test_packing_equals_a_plain_search_through_the_list(sizes, row_length, buffer_size, keep_tails):
    documents = documents_of(sizes)
    rows = packed_rows(documents, row_length, buffer_size, BestFitPacker(row_length, keep_tails))
    assert rows[:-1] == slow_rows(documents, row_length, buffer_size, keep_tails)


@given(lengths, st.integers(2, 33), st.integers(1, 12), st.integers(0, 100), st.booleans())
@slowly
def test_every_token_is_in_one_row_or_waits_or_is_counted_as_lost(
    sizes, row_length, buffer_size, num_rows, keep_tails
):
    packer, rest = BestFitPacker(row_length, keep_tails), iter(documents_of(sizes))
    read, rows = [], []

    def refill():
        while len(packer) < buffer_size and (one := next(rest, None)) is not None:
            read.append(one)
            packer.add([one])

    while len(rows) < num_rows:
        rows.append(np.full(row_length, UNSET, np.uint16))
        try:
            packer.fill(rows[-1], refill)
        except IndexError:
            break
    used = [row[row != UNSET].tolist() for row in rows]
    waiting = [piece.tolist() for piece in packer.waiting()]
    assert packer.num_tokens == sum(map(len, used))
    found = [token for row in used + waiting for token in row if token != BOS]
    assert len(found) == len(set(found))
    everything = {token for one in read for token in one.tolist() if token != BOS}
    assert set(found) <= everything
    assert packer.num_cropped == len(everything) - len(found)
    assert packer.num_cropped == 0 or not keep_tails


@given(lengths, st.integers(2, 33), st.booleans())
@slowly
def test_rows_begin_with_bos_and_a_piece_begins_a_document_or_goes_on_where_another_ended(
    sizes, row_length, keep_tails
):
    documents = documents_of(sizes)
    rows = packed_rows(documents, row_length, 10, BestFitPacker(row_length, keep_tails))
    assert all(len(row) == row_length for row in rows[:-1])
    assert all(row[0] == BOS for row in rows if row)
    pieces = [piece for row in rows for piece in pieces_of(row) if piece]
    ends = {piece[-1] for piece in pieces}
    for piece in pieces:
        assert piece == list(range(piece[0], piece[0] + len(piece))), "a run of one document, in its order"
        assert piece[0] % 100 == 1 or (keep_tails and piece[0] - 1 in ends)
    if not keep_tails:
        assert len({piece[0] // 100 for piece in pieces}) == len(pieces), "a document never comes twice"


def test_only_the_last_document_of_a_row_is_cropped_and_the_loss_is_counted():
    for keep_tails in (False, True):
        packer = BestFitPacker(8, keep_tails)
        packer.add([document(1, 6), document(2, 3), document(3, 8)])
        packer.take(8)  # the document that fills a row
        row = np.empty(8, np.uint16)
        packer.fill(row, lambda: None)
        assert row.tolist() == [0, 101, 102, 103, 104, 105, 0, 201]
        assert (packer.num_tokens, packer.num_cropped) == (16, 0 if keep_tails else 1)
        assert [piece.tolist() for piece in packer.waiting()] == ([[0, 202]] if keep_tails else [])


def test_a_long_document_fills_rows_at_once_or_waits_to_be_the_shortest():
    rows = {}
    for keep_tails in (False, True):
        packer, rows[keep_tails] = BestFitPacker(8, keep_tails), np.empty((2, 8), np.uint16)
        packer.add([document(1, 18), document(2, 7), document(3, 1)])
        for row in rows[keep_tails]:
            packer.fill(row, lambda: None)
    assert rows[True].tolist() == [[0, *range(101, 108)], [0, *range(108, 115)]]
    assert rows[False].tolist() == [[0, *range(201, 207), 0], [0, *range(101, 108)]]


def test_a_document_cropped_to_its_bos_waits_as_it_was():
    packer = BestFitPacker(8, True)
    packer.add([document(1, 5)])
    assert packer.take(1).tolist() == [BOS]
    assert [piece.tolist() for piece in packer.waiting()] == [document(1, 5).tolist()]


@given(lengths, lengths, st.booleans())
@slowly
def test_a_packer_rebuilt_from_its_waiting_documents_packs_the_same_rows(first, second, keep_tails):
    packer = BestFitPacker(16, keep_tails)
    packer.add(documents_of(first))
    packer.fill(np.empty(16, np.uint16), lambda: packer.add(documents_of([20, 5])))
    twin = BestFitPacker(16, keep_tails)
    twin.add(packer.waiting())
    more = [document(i + 300, n) for i, n in enumerate(second)]
    assert packed_rows(more, 16, 10, packer) == packed_rows(more, 16, 10, twin)


def test_what_waits_does_not_keep_the_memory_of_a_long_document():
    packer = BestFitPacker(101, True)
    packer.add([np.zeros(1_000_000, np.uint16)])
    for _ in range(9990):
        packer.take(101)
    assert sum(len(piece if piece.base is None else piece.base) for piece in packer.waiting()) < 2000


def test_an_empty_document_and_an_empty_packer_are_refused():
    packer = BestFitPacker(4, True)
    with pytest.raises(ValueError, match="bos"):
        packer.add([np.empty(0, np.uint16)])
    with pytest.raises(IndexError, match="waiting"):
        packer.take(4)
