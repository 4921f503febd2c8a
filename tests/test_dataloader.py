"""Packing against a slow reference; batches depend on the data only: not on timing, ranks or interruptions."""

import io
import math
import threading
from itertools import islice, pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanochat_hf.data import dataloader
from nanochat_hf.data.dataloader import BestFitPacker, PackedLoader, token_chunks
from nanochat_hf.data.documents import DocumentStream, open_documents
from nanochat_hf.errors import InputError

BOS, UNSET = 0, 65535
STRATEGIES = ["bfd", "bfd_split"]
lengths = st.lists(st.integers(1, 40), min_size=1, max_size=80)
slowly = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def documents_of(sizes: list[int], first: int = 1) -> list[np.ndarray]:
    """bos, then tokens that tell which document they are from and where they stood in it."""
    return [np.array([BOS] + [n * 100 + i for i in range(1, size)], np.uint16) for n, size in enumerate(sizes, first)]


def packer(documents, row_length=8, buffer_size=1, strategy="bfd") -> BestFitPacker:
    return BestFitPacker(iter([[one] for one in documents]), row_length, buffer_size, strategy)


def rows_of(packer) -> list[list[int]]:
    """Rows until the documents run out; the last one ends where they do."""
    rows = []
    while True:
        rows.append(np.full(packer.row_length, UNSET, np.uint16))
        try:
            packer.fill(rows[-1])
        except IndexError:
            return [row[row != UNSET].tolist() for row in rows]


def slow_rows(documents: list[np.ndarray], row_length: int, buffer_size: int, strategy: str) -> list[list[int]]:
    """The same rule written plainly: look through the whole list each time. Stops when the documents run out."""
    rest, waiting, rows, split = [d.tolist() for d in documents], [], [], strategy == "bfd_split"
    while True:
        row = []
        while len(row) < row_length:
            while len(waiting) < buffer_size and rest:
                waiting.append(rest.pop(0))
                while split and len(waiting[-1]) > row_length:
                    long = waiting.pop()
                    waiting += [long[:row_length], [BOS] + long[row_length:]]
            if not waiting:
                return [*rows, row]
            space = row_length - len(row)
            fitting = [d for d in waiting if len(d) <= space]
            best = max(fitting, key=len) if fitting else min(waiting, key=len)
            waiting = [d for d in waiting if d is not best]
            row += best[:space]
            if split and len(best) > space:
                waiting.append([BOS] + best[space:])
        rows.append(row)


@given(lengths, st.integers(2, 33), st.integers(1, 12), st.sampled_from(STRATEGIES))
@slowly
def test_packing_equals_a_plain_search_through_the_list(sizes, row_length, buffer_size, strategy):
    documents = documents_of(sizes)
    rows = rows_of(packer(documents, row_length, buffer_size, strategy))
    assert rows == slow_rows(documents, row_length, buffer_size, strategy)
    assert all(row[0] == BOS for row in rows if row)
    tokens = [token for row in rows for token in row if token != BOS]
    assert len(tokens) == len(set(tokens))
    if strategy == "bfd_split":
        assert len(tokens) == sum(sizes) - len(sizes)
    starts = [[*(i for i, token in enumerate(row) if token == BOS), len(row)] for row in rows]
    for row, begin, end in ((row, a, b) for row, at in zip(rows, starts) for a, b in pairwise(at) if a + 1 < b):
        piece = row[begin + 1 : end]
        assert piece == list(range(piece[0], piece[0] + len(piece))), "a run of one document, in its order"
        assert piece[0] % 100 == 1 or strategy == "bfd_split", "only what is split begins inside a document"


@pytest.mark.parametrize("size, max_chars, number", [(3, 100, 3), (8, 5, 3), (8, 4, 2), (1, 1, 1)])
def test_documents_are_tokenized_together_up_to_a_number_or_a_length(tokenizer, size, max_chars, number):
    chunks = token_chunks(["ab"] * 7, tokenizer, size, max_chars)
    assert [len(chunk) for chunk in islice(chunks, 5)] == [number] * 5


def test_few_texts_are_tokenized_once_and_many_in_every_epoch(tokenizer, monkeypatch):
    encode, encoded = dataloader.encode_documents, []
    monkeypatch.setattr(dataloader, "encode_documents", lambda t, texts: encoded.extend(texts) or encode(t, texts))
    texts = ["a book", "a tale", "a poem"]
    for max_chars, number in ((math.inf, 3), (11, 12)):
        chunks = islice(token_chunks(texts, tokenizer, 2, max_chars), 6)
        documents = [document.tolist() for chunk in chunks for document in chunk]
        assert documents == [document.tolist() for document in encode(tokenizer, texts)] * 4
        assert len(encoded) == number
        encoded.clear()


def test_only_the_last_document_of_a_row_is_cut():
    for strategy, waiting in (("bfd", []), ("bfd_split", [[0, 302]])):
        one = packer(documents_of([6, 8, 3]), 8, 3, strategy)
        assert one.take(8).tolist() == [0, *range(201, 208)]
        row = np.empty(8, np.uint16)
        one.fill(row)
        assert row.tolist() == [0, 101, 102, 103, 104, 105, 0, 301]
        assert [piece.tolist() for piece in one.waiting()] == waiting
    one = packer(documents_of([5]), strategy="bfd_split")  # of a document cut to its bos nothing is lost
    assert one.take(1).tolist() == [BOS] and one.waiting()[0].tolist() == [0, 101, 102, 103, 104]
    with pytest.raises(KeyError):
        packer([], strategy="wrapped")


# The loader

NUM_DOCUMENTS = 150
LENGTH = [2 + (i * 37) % 59 for i in range(NUM_DOCUMENTS)]  # words


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """150 documents that each begin with their own number, of 2 to 60 words, in three files."""
    path = tmp_path_factory.mktemp("data")
    texts = [f"#{i:03d} " + "so " * LENGTH[i] for i in range(NUM_DOCUMENTS)]
    write(path, texts[:50], texts[50:100], texts[100:], ["validation " * 30] * 5)
    return path


def write(folder, *files: list[str]) -> None:
    """Parquet files of these documents, the last one for validation."""
    for number, texts in enumerate(files if len(files) > 1 else (*files, ["v"])):
        table = pa.table({"text": pa.array(texts, pa.string())})
        pq.write_table(table, folder / f"{number}.parquet", row_group_size=20)


def loader(folder, tokenizer, rank=0, world_size=1, batch_size=2, **settings):
    settings = {"seq_len": 32, "buffer_size": 16, "num_shards": 4, **settings}
    stream = open_documents(folder, rank=rank, world_size=world_size)  # a list of datasets is a mixture
    return PackedLoader(stream, tokenizer, batch_size, **settings)


def saved_and_loaded(state):
    """Through a file, as accelerate does it: only tensors and plain values may come back."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("packing_strategy", STRATEGIES)
@pytest.mark.parametrize("world_size", [1, 4])
def test_ranks_share_the_rows_of_one_in_any_threads(folder, tokenizer, monkeypatch, world_size, packing_strategy):
    settings = {"packing_strategy": packing_strategy, "batch_size": 1}
    alone = np.concatenate(list(islice(loader(folder, tokenizer, **settings), 60)))
    assert alone.shape == (60, 33) and alone.dtype == np.int32 and (alone[:, 0] == tokenizer.bos_token_id).all()
    assert not set(np.unique(alone)) & (set(tokenizer.all_special_ids) - {tokenizer.bos_token_id})
    monkeypatch.setattr("nanochat_hf.data.dataloader.num_threads", lambda: 1)
    ranks = [loader(folder, tokenizer, rank, world_size, **settings) for rank in range(world_size)]
    assert (np.concatenate([next(rank) for _ in range(60 // world_size) for rank in ranks]) == alone).all()


@pytest.mark.parametrize("packing_strategy", STRATEGIES)
@pytest.mark.parametrize("taken", [0, 7, 40])
def test_a_resumed_loader_gives_the_batches_that_would_have_come(folder, tokenizer, taken, packing_strategy):
    whole = list(islice(loader(folder, tokenizer, packing_strategy=packing_strategy), taken + 10))
    first, second = (loader(folder, tokenizer, packing_strategy=packing_strategy) for _ in range(2))
    list(islice(first, taken))
    state = saved_and_loaded(first.state_dict())  # of the last batch handed out, and not of the thread, which is ahead
    second.load_state_dict(state)
    first.close()
    for one in (first, second):
        assert all((batch == expected).all() for batch, expected in zip(islice(one, 10), whole[taken:]))


@pytest.mark.parametrize(
    ("before", "after", "batch_size", "mixed"), [(1, 4, 3, True), (4, 1, 1, False), (4, 2, 1, True), (2, 4, 3, False)]
)
def test_a_run_resumes_on_other_ranks_without_loss_or_repetition(folder, tokenizer, before, after, batch_size, mixed):
    folder = [{"dataset": str(folder), "weight": 3}, {"dataset": "primer"}] if mixed else folder
    alone = np.concatenate(list(islice(loader(folder, tokenizer, batch_size=1, num_shards=8), 64)))
    ranks = [loader(folder, tokenizer, rank, before, batch_size=batch_size, num_shards=8) for rank in range(before)]
    for _ in range(5):
        for rank in ranks:
            next(rank)
    states = [saved_and_loaded(rank.state_dict()) for rank in ranks]
    done = 5 * before * batch_size
    assert {state["rows"] for state in states} == {done}
    for number in range(after):
        rank = loader(folder, tokenizer, number, after, batch_size=1)
        rank.load_state_dict(states)
        expected = alone[next(n for n in range(done, 64) if n % after == number) :: after]
        assert (np.concatenate(list(islice(rank, len(expected)))) == expected).all()


def test_a_long_document_fills_rows_or_waits_to_be_a_rows_end(tmp_path, tokenizer):
    write(tmp_path, ["zq " * 100, "so so so so"] * 40)
    mark = tokenizer("zq")["input_ids"][1]
    rows = np.concatenate(list(islice(loader(tmp_path, tokenizer, num_shards=1, buffer_size=8), 10)))
    assert (rows[:, 1] == mark).any()
    rows = next(loader(tmp_path, tokenizer, num_shards=1, buffer_size=8, packing_strategy="bfd"))
    assert not (rows[:, 1] == mark).any()
    assert (rows == mark).any()


def test_states_that_do_not_fit_and_errors_of_the_thread_are_refused(folder, tokenizer, tmp_path):
    assert loader(folder, tokenizer, 0, 3).num_shards == 6
    ranks = [loader(folder, tokenizer, rank, 2) for rank in range(2)]
    states = [next(rank) is not None and rank.state_dict() for rank in ranks]
    with pytest.raises(InputError, match="resume with a number of ranks that divides 4"):
        loader(folder, tokenizer, 0, 3).load_state_dict(states)
    with pytest.raises(InputError, match="all the earlier ranks"):
        loader(folder, tokenizer).load_state_dict(states[0])
    next(ranks[1])
    with pytest.raises(InputError, match="different steps"):
        loader(folder, tokenizer).load_state_dict([states[0], ranks[1].state_dict()])
    write(tmp_path, [])
    with pytest.raises(InputError, match="has no documents"):  # of the thread
        next(loader(tmp_path, tokenizer))


def test_the_epoch_is_counted_and_validation_is_its_own_data(folder, tokenizer):
    one = loader(folder, tokenizer)
    next(one)
    assert one.epoch == 0
    for _ in range(200):  # the shard that is farthest counts
        next(one)
        assert one.epoch == max(shard["stream"]["position"][0] for shard in one.state_dict()["shards"].values())
    assert one.epoch >= 1
    validation = PackedLoader(DocumentStream(folder, "validation"), tokenizer, 2, 32, num_shards=1, buffer_size=2)
    assert "validation" in tokenizer.decode(next(validation)[0])


def test_the_buffer_is_that_of_all_shards_together(folder, tokenizer):
    one = loader(folder, tokenizer, batch_size=4, buffer_size=64, packing_strategy="bfd")  # 16 for each of 4 shards
    next(one)
    waiting = [len(shard["lengths"]) for shard in one.state_dict()["shards"].values()]
    assert len(waiting) == 4 and all(15 <= number <= 22 for number in waiting)  # they come in chunks of 8


def test_a_forgotten_loader_ends_its_thread(folder, tokenizer):
    def running():
        return {thread for thread in threading.enumerate() if thread.name.startswith("packed-loader_")}

    before = running()
    one = loader(folder, tokenizer)
    next(one)
    (mine,) = running() - before
    del one
    mine.join(timeout=5)
    assert not mine.is_alive()
