"""Batches that depend on the data only: not on timing, the number of processes, or where a run was interrupted."""

import io
import threading
import time
from collections import Counter
from itertools import cycle, islice

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from nanochat_hf.data.dataloader import PackedLoader
from nanochat_hf.data.documents import DocumentStream, open_documents
from nanochat_hf.errors import InputError

NUM_DOCUMENTS = 150


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """150 documents that each begin with their own number, of 2 to 60 words, in three files."""
    path = tmp_path_factory.mktemp("data")
    texts = [f"#{i:03d} " + "so " * (2 + (i * 37) % 59) for i in range(NUM_DOCUMENTS)]
    for number in range(3):
        table = pa.table({"text": texts[number * 50 : number * 50 + 50]})
        pq.write_table(table, path / f"{number}.parquet", row_group_size=20)
    pq.write_table(pa.table({"text": ["validation " * 30] * 5}), path / "3.parquet")
    return path


def loader(folder, tokenizer, rank=0, world_size=1, batch_size=2, **settings):
    settings = {"seq_len": 32, "buffer_size": 16, "lanes": 4, **settings}
    stream = open_documents(folder, rank=rank, world_size=world_size)  # a list of datasets is a mixture
    return PackedLoader(stream, tokenizer, batch_size, **settings)


def saved_and_loaded(state):
    """Through a file, as accelerate does it: only tensors and plain values may come back."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_rows_are_full_begin_with_bos_and_hold_no_other_special_token(folder, tokenizer):
    batch = next(loader(folder, tokenizer, batch_size=8))
    assert batch.shape == (8, 33)
    assert batch.dtype == np.int32
    assert (batch[:, 0] == tokenizer.bos_token_id).all()
    assert not set(np.unique(batch)) & (set(tokenizer.all_special_ids) - {tokenizer.bos_token_id})


@pytest.mark.parametrize("lanes", [1, 4])
def test_no_document_comes_twice_before_all_came_once(folder, tokenizer, monkeypatch, lanes):
    def numbered(tokenizer, texts):  # every token tells its document, so that cropping cannot hide one
        return [np.full(len(text) // 4 + 1, int(text[1:4]), np.uint16) for text in texts]

    monkeypatch.setattr("nanochat_hf.data.dataloader.encode_documents", numbered)
    one = loader(folder, tokenizer, lanes=lanes, batch_size=1, keep_tails=False)
    counts = Counter()
    positions = [0]
    while min(positions) == 0:  # until every lane has read its documents
        row = next(one)[0]
        positions = [lane["stream"]["position"][0] for lane in one.state_dict()["lanes"].values()]
        counts.update(row[np.flatnonzero(np.diff(row, prepend=-1))].tolist())
    waiting = Counter()
    for lane in one.state_dict()["lanes"].values():
        starts = np.cumsum([0, *lane["lengths"][:-1]])
        waiting.update(lane["tokens"].numpy()[starts].tolist())
    total = counts + waiting
    # Each was read once and is in a row or waits; a few came again, where a lane is ahead in the second epoch.
    assert set(total) == set(range(NUM_DOCUMENTS))
    assert max(total.values()) <= 2
    assert sum(total.values()) < 1.3 * NUM_DOCUMENTS


@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_share_the_rows_that_one_process_would_make(folder, tokenizer, world_size):
    alone = np.concatenate(list(islice(loader(folder, tokenizer, batch_size=1), 60)))
    ranks = [loader(folder, tokenizer, rank, world_size, batch_size=1) for rank in range(world_size)]
    together = np.concatenate([next(rank) for _ in range(60 // world_size) for rank in ranks])
    assert (together == alone).all()


def test_the_number_of_threads_changes_nothing(folder, tokenizer, monkeypatch):
    batches = []
    for number in (1, 8):
        monkeypatch.setattr("nanochat_hf.data.dataloader.threads", lambda number=number: number)
        batches.append(list(islice(loader(folder, tokenizer, batch_size=6), 12)))
    assert all((a == b).all() for a, b in zip(*batches))


@pytest.mark.parametrize("keep_tails", [True, False])
@pytest.mark.parametrize("taken", [0, 1, 7, 40])
def test_a_resumed_loader_gives_the_batches_that_would_have_come(folder, tokenizer, taken, keep_tails):
    whole = list(islice(loader(folder, tokenizer, keep_tails=keep_tails), taken + 10))
    first = loader(folder, tokenizer, keep_tails=keep_tails)
    list(islice(first, taken))
    second = loader(folder, tokenizer, keep_tails=keep_tails)
    second.load_state_dict(saved_and_loaded(first.state_dict()))
    for batch, expected in zip(islice(second, 10), whole[taken:]):
        assert (batch == expected).all()


@pytest.mark.parametrize("before,after", [(1, 4), (4, 1), (2, 4), (4, 2)])
def test_a_run_resumes_with_another_number_of_processes_without_losing_or_repeating_a_row(
    folder, tokenizer, before, after
):
    alone = np.concatenate(list(islice(loader(folder, tokenizer, batch_size=1), 64)))
    ranks = [loader(folder, tokenizer, rank, before, batch_size=4 // before) for rank in range(before)]
    for _ in range(6):
        for rank in ranks:
            next(rank)
    states = [saved_and_loaded(rank.state_dict()) for rank in ranks]
    assert {state["rows"] for state in states} == {24}
    ranks = [loader(folder, tokenizer, rank, after, batch_size=1) for rank in range(after)]
    for rank in ranks:
        rank.load_state_dict(states)
    rest = np.concatenate([next(rank) for _ in range(40 // after) for rank in ranks])
    assert (rest == alone[24:64]).all()


def test_the_state_is_that_of_the_last_batch_handed_out_and_not_of_the_thread(folder, tokenizer):
    ahead = loader(folder, tokenizer, prefetch=6)
    next(ahead)
    before = ahead.state_dict()
    time.sleep(0.2)  # the thread goes on meanwhile
    assert ahead.state_dict()["rows"] == before["rows"] == 2
    expected = next(ahead)
    ahead.close()
    later = loader(folder, tokenizer)
    later.load_state_dict(before)
    assert (next(later) == expected).all()


def test_a_closed_loader_goes_on_where_it_was(folder, tokenizer):
    whole = list(islice(loader(folder, tokenizer), 6))
    one = loader(folder, tokenizer)
    list(islice(one, 3))
    one.close()
    assert all((a == b).all() for a, b in zip(islice(one, 3), whole[3:]))


def test_a_long_document_fills_rows_or_waits_to_be_a_rows_end(tmp_path, tokenizer):
    pq.write_table(pa.table({"text": ["zq " * 100, "so so so so"] * 40}), tmp_path / "0.parquet")
    pq.write_table(pa.table({"text": ["v"]}), tmp_path / "1.parquet")
    mark = tokenizer("zq")["input_ids"][1]
    rows = np.concatenate(list(islice(loader(tmp_path, tokenizer, lanes=1, buffer_size=8), 10)))
    assert (rows[:, 1] == mark).any()
    rows = next(loader(tmp_path, tokenizer, lanes=1, buffer_size=8, keep_tails=False))
    assert not (rows[:, 1] == mark).any()
    assert (rows == mark).any()


@pytest.mark.parametrize("seq_len", [8, 32])
def test_every_token_comes_once_in_an_epoch_of_interruptions_by_other_numbers_of_processes(
    folder, tokenizer, monkeypatch, seq_len
):
    bos, length = 65535, {i: 2 + (i * 37) % 59 for i in range(NUM_DOCUMENTS)}

    def numbered(tokenizer, texts):  # a token tells its document and its place in it
        numbers = [int(text[1:4]) for text in texts]
        return [np.array([bos, *range(n * 100, n * 100 + length[n])], np.uint16) for n in numbers]

    monkeypatch.setattr("nanochat_hf.data.dataloader.encode_documents", numbered)
    found, epoch, states, sizes = Counter(), 0, None, cycle([1, 4, 2])
    while epoch == 0:  # until every lane has read its documents
        world_size = next(sizes)
        ranks = [
            loader(folder, tokenizer, rank, world_size, batch_size=3, seq_len=seq_len) for rank in range(world_size)
        ]
        for rank in ranks:
            if states:
                rank.load_state_dict(states)
            found.update(np.concatenate([next(rank), next(rank)]).ravel().tolist())
        states = [saved_and_loaded(rank.state_dict()) for rank in ranks]
        lanes = [lane for state in states for lane in state["lanes"].values()]
        epoch = min(lane["stream"]["position"][0] for lane in lanes)
    found.update(token for lane in lanes for token in lane["tokens"].tolist())
    del found[bos]
    assert set(found) == {n * 100 + place for n in length for place in range(length[n])}
    # Where a lane is ahead in the second epoch, documents came again, but as whole as the first time.
    assert set(found.values()) <= {1, 2}
    again = {token // 100 for token, count in found.items() if count == 2}
    assert sum(found.values()) == sum(length.values()) + sum(length[n] for n in again)
    assert len(again) < NUM_DOCUMENTS / 2


def test_few_documents_wait_where_they_are_long(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("nanochat_hf.data.dataloader.CHUNK_CHARS", 1000)
    pq.write_table(pa.table({"text": ["zq " * 3000] * 40}), tmp_path / "0.parquet")
    pq.write_table(pa.table({"text": ["v"]}), tmp_path / "1.parquet")
    one = loader(tmp_path, tokenizer, lanes=1, buffer_size=8)
    read, longest = len(tokenizer("zq " * 3000)["input_ids"]), 0
    for _ in range(400):
        next(one)
        longest = max(longest, len(one.state_dict()["lanes"][0]["tokens"]))
    assert read // 2 < longest < read * 1.04 + 8 * 33  # a bos each row


def test_lanes_are_rounded_up_to_the_processes_and_refuse_a_number_that_cannot_share_them(folder, tokenizer):
    assert loader(folder, tokenizer, 0, 3).num_lanes == 6
    one = loader(folder, tokenizer)
    next(one)
    with pytest.raises(InputError, match="resume with a number of processes that divides 4"):
        loader(folder, tokenizer, 0, 3).load_state_dict(one.state_dict())


def test_positions_of_other_steps_and_missing_processes_are_refused(folder, tokenizer):
    ranks = [loader(folder, tokenizer, rank, 2) for rank in range(2)]
    states = [next(rank) is not None and rank.state_dict() for rank in ranks]
    with pytest.raises(InputError, match="all the earlier processes"):
        loader(folder, tokenizer).load_state_dict(states[0])
    next(ranks[1])
    with pytest.raises(InputError, match="different steps"):
        loader(folder, tokenizer).load_state_dict([states[0], ranks[1].state_dict()])


def test_an_error_of_the_thread_reaches_the_caller(tmp_path, tokenizer):
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "0.parquet")
    pq.write_table(pa.table({"text": ["v"]}), tmp_path / "1.parquet")
    with pytest.raises(InputError, match="has no documents"):
        next(loader(tmp_path, tokenizer))


def test_the_epoch_is_counted_and_validation_is_its_own_data(folder, tokenizer):
    one = loader(folder, tokenizer)
    next(one)
    assert one.epoch == 0
    list(islice(one, 200))
    assert one.epoch >= 1
    validation = PackedLoader(DocumentStream(folder, "validation"), tokenizer, 2, 32, lanes=1, buffer_size=2)
    assert "validation" in tokenizer.decode(next(validation)[0])


def test_a_forgotten_loader_ends_its_thread(folder, tokenizer):
    def running():
        return {thread for thread in threading.enumerate() if thread.name == "packed-loader"}

    before = running()
    one = loader(folder, tokenizer)
    next(one)
    (mine,) = running() - before
    del one
    mine.join(timeout=5)
    assert not mine.is_alive()


def test_rows_of_a_mixture_are_the_same_for_other_numbers_of_processes_and_after_resuming(folder, tokenizer):
    mixed = [{"dataset": str(folder), "weight": 3}, {"dataset": "primer", "weight": 1}]
    alone = loader(mixed, tokenizer, batch_size=4)
    whole = np.concatenate([next(alone) for _ in range(20)])
    pair = [loader(mixed, tokenizer, rank=rank, world_size=2, batch_size=2) for rank in range(2)]
    for step in range(10):
        batches = [next(one) for one in pair]
        for rank in range(2):
            assert (batches[rank] == whole[step * 4 + rank : step * 4 + 4 : 2]).all()
    again = loader(mixed, tokenizer, batch_size=4)
    again.load_state_dict(saved_and_loaded([one.state_dict() for one in pair]))
    assert all((next(again) == whole[step * 4 : step * 4 + 4]).all() for step in range(10, 20))
