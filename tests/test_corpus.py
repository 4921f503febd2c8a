"""The document stream: every document once, in an order that nothing but the data decides, resumable anywhere."""

import json
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanochat_hf.data import corpus
from nanochat_hf.data.corpus import DocumentStream
from nanochat_hf.errors import InputError


def write_parquet(path: Path, texts: list[str], group: int = 4, column: str = "text") -> None:
    pq.write_table(pa.table({column: pa.array(texts, pa.string())}), path, row_group_size=group)


def write_jsonl(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


@pytest.fixture
def folder(tmp_path):
    """Three training files of 10, 7 and 1 documents and a validation file, in row groups of 4."""
    for number, count in enumerate((10, 7, 1, 3)):
        write_parquet(tmp_path / f"shard_{number:05d}.parquet", [f"{number}.{i}" for i in range(count)])
    return tmp_path


def test_the_last_file_is_validation_and_training_keeps_the_order_of_the_files(folder):
    train = [f"{n}.{i}" for n, count in enumerate((10, 7, 1)) for i in range(count)]
    assert list(DocumentStream(folder)) == train
    assert list(DocumentStream(folder, "validation")) == ["3.0", "3.1", "3.2"]


@given(
    counts=st.lists(st.integers(0, 30), min_size=1, max_size=4).filter(any),
    group=st.integers(1, 12),
    world_size=st.integers(1, 9),
    epochs=st.integers(1, 3),
    kind=st.sampled_from(["parquet", "jsonl"]),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_readers_share_every_document_exactly_once_an_epoch(tmp_path_factory, counts, group, world_size, epochs, kind):
    path = tmp_path_factory.mktemp("data")
    wanted = [f"{n}.{i}" for n, count in enumerate(counts) for i in range(count)]
    for number, count in enumerate([*counts, 1]):
        texts = [f"{number}.{i}" for i in range(count)]
        if kind == "parquet":
            write_parquet(path / f"{number}.parquet", texts, group)
        else:
            write_jsonl(path / f"{number}.jsonl", texts)
    streams = [DocumentStream(path, rank=rank, world_size=world_size) for rank in range(world_size)]
    for epoch in range(epochs):
        assert [stream.epoch for stream in streams] == [epoch] * world_size
        assert sorted(text for stream in streams for text in stream) == sorted(wanted)


@pytest.mark.parametrize("world_size", [1, 3])
def test_resuming_anywhere_gives_the_documents_that_would_have_come(folder, world_size):
    def endless(stream):
        while True:
            yield from stream

    for rank in range(world_size):
        stream = DocumentStream(folder, rank=rank, world_size=world_size, seed=5)
        whole = list(islice(endless(stream), 50))
        for taken in range(45):
            first = DocumentStream(folder, rank=rank, world_size=world_size, seed=5)
            list(islice(endless(first), taken))
            second = DocumentStream(folder, rank=rank, world_size=world_size, seed=5)
            second.load_state_dict(json.loads(json.dumps(first.state_dict())))
            assert list(islice(endless(second), 5)) == whole[taken : taken + 5]


def test_later_epochs_shuffle_by_the_seed_and_only_by_it(folder):
    def second_epoch(seed):
        stream = DocumentStream(folder, seed=seed)
        list(stream)
        return list(stream)

    assert second_epoch(1) == second_epoch(1)
    assert second_epoch(1) != second_epoch(2)
    assert second_epoch(1) != list(DocumentStream(folder))


def test_one_file_gives_its_last_sixteenth_to_validation(tmp_path):
    texts = [f"{i:04d}" for i in range(160)]
    write_parquet(tmp_path / "all.parquet", texts, 50)
    write_jsonl(tmp_path / "all.jsonl", texts)
    for path in (tmp_path / "all.parquet", tmp_path / "all.jsonl"):
        train, validation = list(DocumentStream(path)), list(DocumentStream(path, "validation"))
        assert train + validation == texts
        assert len(validation) == 10


def test_a_folder_is_searched_below_and_other_files_are_ignored(tmp_path):
    (tmp_path / "data").mkdir()
    write_parquet(tmp_path / "data" / "a.parquet", ["a"])
    write_parquet(tmp_path / "data" / "b.parquet", ["b"])
    (tmp_path / "README.md").write_text("about")
    write_jsonl(tmp_path / "zzz.jsonl", ["not the validation split"])
    assert list(DocumentStream(tmp_path, "validation")) == ["b"]


def test_empty_documents_are_passed_over(tmp_path):
    table = pa.table({"text": pa.array(["a", None, "", "b"], pa.string())})
    pq.write_table(table, tmp_path / "0.parquet")
    write_parquet(tmp_path / "1.parquet", ["c"])
    assert list(DocumentStream(tmp_path)) == ["a", "b"]


def test_the_primer_is_a_dataset_with_two_splits():
    train = set(islice(DocumentStream("primer"), 500))
    validation = set(islice(DocumentStream("primer", "validation"), 500))
    assert len(train) > 100
    assert len(validation - train) > 0.8 * len(validation)


@pytest.mark.parametrize("cut", [0, 40, -30])
def test_a_truncated_file_is_named_and_skipped_only_when_told(folder, cut):
    broken = folder / "shard_00001.parquet"
    broken.write_bytes(broken.read_bytes()[:cut])
    with pytest.raises(InputError, match=r"shard_00001.parquet cannot be read .*skip_bad_files"):
        DocumentStream(folder)
    with pytest.warns(UserWarning, match="shard_00001"):
        stream = DocumentStream(folder, skip_bad_files=True)
    assert list(stream) == [f"{n}.{i}" for n, count in ((0, 10), (2, 1)) for i in range(count)]


def test_a_damaged_row_group_is_named_and_skipped_only_when_told(tmp_path):
    texts = [f"{i} " + "word " * 50 for i in range(8)]
    write_parquet(tmp_path / "0.parquet", texts)
    write_parquet(tmp_path / "1.parquet", ["v"])
    path = tmp_path / "0.parquet"
    start = pq.read_metadata(path).row_group(0).column(0).data_page_offset
    content = bytearray(path.read_bytes())
    content[start : start + 20] = b"\xff" * 20
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"0.parquet cannot be read \(row group 0"):
        list(DocumentStream(tmp_path))
    with pytest.warns(UserWarning, match="row group 0"):
        assert list(DocumentStream(tmp_path, skip_bad_files=True)) == texts[4:]


def test_bad_lines_are_named_and_skipped_only_when_told(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "a"}\n{"text": "b"\n' + '{"text": "c"}\n' * 40)
    with pytest.raises(InputError, match="byte 14 is not JSON"):
        list(DocumentStream(path))
    with pytest.warns(UserWarning, match="byte 14"):
        assert set(DocumentStream(path, skip_bad_files=True)) == {"a", "c"}


def test_data_without_text_is_refused(tmp_path):
    write_parquet(tmp_path / "0.parquet", ["a"], column="content")
    with pytest.raises(InputError, match="no column 'text'; it has content"):
        DocumentStream(tmp_path / "0.parquet")
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "1.parquet")
    with pytest.raises(InputError, match="int64, not text"):
        DocumentStream(tmp_path / "1.parquet")
    (tmp_path / "m.jsonl").write_text('{"messages": []}\n' * 3)
    with pytest.raises(InputError, match="no text under 'text'"):
        list(DocumentStream(tmp_path / "m.jsonl"))


def test_missing_and_empty_datasets_are_refused(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="no dataset"):
        DocumentStream(tmp_path / "nowhere")
    with pytest.raises(InputError, match="no dataset"):
        DocumentStream("data/missing.jsonl")
    with pytest.raises(InputError, match=r"no \.parquet or \.jsonl"):
        DocumentStream(tmp_path)
    write_parquet(tmp_path / "0.parquet", [])
    write_parquet(tmp_path / "1.parquet", ["a"])
    with pytest.raises(InputError, match=r"train split of dataset .* has no documents"):
        list(DocumentStream(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="HF_HUB_OFFLINE"):
        DocumentStream("someone/something")


def test_a_position_is_refused_by_other_data_or_another_seed(folder):
    stream = DocumentStream(folder, seed=1)
    next(iter(stream))
    state = stream.state_dict()
    with pytest.raises(InputError, match="keep the seed"):
        DocumentStream(folder, seed=2).load_state_dict(state)
    write_parquet(folder / "shard_00004.parquet", ["new"])
    with pytest.raises(InputError, match="changed since this run began"):
        DocumentStream(folder, seed=1).load_state_dict(state)


def test_failures_of_the_network_are_tried_again_and_then_named(monkeypatch):
    pauses, calls = [], []
    monkeypatch.setattr(corpus.time, "sleep", pauses.append)

    def fails_twice():
        calls.append(1)
        if len(calls) < 3:
            raise TimeoutError("read timed out")
        return "done"

    with pytest.warns(UserWarning, match="file x: attempt [12] failed with TimeoutError: read timed out"):
        assert corpus.with_retry(fails_twice, "file x") == "done"
    assert pauses == [1, 2]

    def always_fails():
        raise ConnectionResetError("gone")

    with pytest.warns(UserWarning), pytest.raises(InputError, match=r"file x: failed 6 times.*gone"):
        corpus.with_retry(always_fails, "file x")
    assert pauses == [1, 2, 1, 2, 4, 8, 16]


HUB = """
import http.server, json, sys, threading, hashlib, pathlib, os
files = {p.name: p.read_bytes() for p in pathlib.Path(sys.argv[1]).glob("*.parquet")}
sha, asked = "0123456789abcdef0123456789abcdef01234567", []
class Hub(http.server.BaseHTTPRequestHandler):
    def log_message(self, *a): pass
    def answer(self, body=b"", code=200, **headers):
        self.send_response(code)
        for k, v in {"Content-Length": str(len(body)), **headers}.items(): self.send_header(k.replace("_", "-"), v)
        self.end_headers()
        if self.command == "GET": self.wfile.write(body)
    def do_GET(self):
        asked.append((self.command, self.path))
        if self.path.startswith("/api/datasets/me/books"):
            rows = [{"rfilename": "data/" + n} for n in sorted(files)] + [{"rfilename": "README.md"}]
            body = json.dumps({"id": "me/books", "sha": sha, "siblings": rows}).encode()
            return self.answer(body, Content_Type="application/json")
        name = self.path.rsplit("/", 1)[-1].split("?")[0]
        if name in files and f"/resolve/{sha}/data/" in self.path:
            if asked.count(("GET", self.path)) == 1 and self.command == "GET" and name.endswith("1.parquet"):
                return self.answer(b"", 500)
            etag = '"' + hashlib.sha256(files[name]).hexdigest() + '"'
            return self.answer(files[name], ETag=etag, X_Repo_Commit=sha, Content_Type="application/octet-stream")
        self.answer(b"", 404, X_Error_Code="RepoNotFound")
    do_HEAD = do_GET
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
os.environ |= {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0"}
os.environ |= {"HF_HOME": sys.argv[2], "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_XET": "1"}
threading.Thread(target=server.serve_forever, daemon=True).start()
from nanochat_hf.data.corpus import DocumentStream
from nanochat_hf.errors import InputError
stream = DocumentStream("me/books")
it = iter(stream)
print(json.dumps([next(it) for _ in range(6)]))
state = stream.state_dict()
again = DocumentStream("me/books/data")
again.load_state_dict(state)
print(json.dumps(list(again)))
print(json.dumps(list(DocumentStream("me/books", "validation"))))
print(json.dumps(sorted({p.rsplit("/", 1)[-1] for c, p in asked if c == "GET" and "resolve" in p})))
print(json.dumps(state["source"]["revision"]))
try: DocumentStream("me/nothing")
except InputError as error: print(json.dumps(str(error)))
"""


@pytest.mark.slow
def test_a_hub_dataset_is_listed_once_and_fetched_file_by_file_through_failures(folder, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run(
        [sys.executable, "-c", HUB, str(folder), str(tmp_path / "home")],
        env=environment,
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    first, rest, validation, fetched, revision, missing = map(json.loads, done.stdout.splitlines())
    train = [f"{n}.{i}" for n, count in enumerate((10, 7, 1)) for i in range(count)]
    assert first + rest == train
    assert validation == ["3.0", "3.1", "3.2"]
    assert fetched == [f"shard_0000{i}.parquet" for i in range(4)]
    assert revision == "0123456789abcdef0123456789abcdef01234567"
    assert "no such dataset" in missing
