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

from nanochat_hf.data.documents import DocumentStream, is_local, open_documents, text_fingerprint
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


def test_a_position_is_refused_by_other_data_or_another_seed(folder):
    stream = DocumentStream(folder, seed=1)
    next(iter(stream))
    state = stream.state_dict()
    with pytest.raises(InputError, match="keep the seed"):
        DocumentStream(folder, seed=2).load_state_dict(state)
    write_parquet(folder / "shard_00004.parquet", ["new"])
    with pytest.raises(InputError, match="changed since this run began"):
        DocumentStream(folder, seed=1).load_state_dict(state)


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
from nanochat_hf.data.documents import DocumentStream, is_local, open_documents, text_fingerprint
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


def mixture_of(tmp_path, sizes=(40, 90), lengths=(30, 7), weights=(1, 3), split="train", **options):
    """Two datasets, `sizes` documents of `lengths` letters each; the first letter says which."""
    for letter, count, length in zip("ab", sizes, lengths):
        if not (tmp_path / letter).exists():
            (tmp_path / letter).mkdir()
            texts = [f"{letter}{i:03d}".ljust(length, ".") for i in range(count)]
            write_parquet(tmp_path / letter / "0.parquet", texts, group=8)
            write_parquet(tmp_path / letter / "1.parquet", [f"{letter} validation"])
    entries = [{"dataset": str(tmp_path / letter), "weight": weight} for letter, weight in zip("ab", weights)]
    return open_documents(entries, split, **options)


def endless(stream):
    while True:
        yield from stream


def test_a_mixture_keeps_the_weights_in_bytes_to_within_a_document(tmp_path):
    read = {"a": 0, "b": 0}
    for text in islice(endless(mixture_of(tmp_path, weights=(0.25, 0.75))), 500):
        read[text[0]] += len(text)
        assert abs(0.75 * read["a"] - 0.25 * read["b"]) <= 30
    assert sum(read.values()) > 3000


def test_hangul_counts_its_bytes_in_a_mixture(tmp_path):
    for name, letter in (("ko", "가"), ("en", "a")):
        write_jsonl(tmp_path / f"{name}.jsonl", [letter * 10] * 1600)
    stream = open_documents([{"dataset": str(tmp_path / f"{name}.jsonl")} for name in ("ko", "en")])
    texts = list(islice(stream, 400))
    assert texts.count("가" * 10) == 100 and texts.count("a" * 10) == 300


def test_iterating_over_a_mixture_ends_with_the_dataset_that_ends_first(tmp_path):
    stream = mixture_of(tmp_path, sizes=(10, 400), lengths=(10, 10), weights=(1, 1))
    texts = list(stream)
    assert stream.epoch == 1 and len(texts) == len(set(texts)) and {t[0] for t in texts} == {"a", "b"}
    assert len([t for t in texts if t[0] == "a"]) == 10 and abs(len(texts) - 20) <= 1
    more = list(stream)  # the small one again, the large one goes on
    assert stream.epoch == 2 and not {t for t in more if t[0] == "b"} & set(texts)


@given(
    sizes=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    weights=st.tuples(st.sampled_from([0.1, 1, 2.5]), st.sampled_from([0.1, 1, 2.5])),
    world_size=st.integers(1, 5),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_readers_of_a_mixture_share_each_datasets_documents_exactly_once_an_epoch(
    tmp_path_factory, sizes, weights, world_size
):
    path = tmp_path_factory.mktemp("data")
    epochs = {"a": [], "b": []}
    for rank in range(world_size):
        for number, letter in enumerate("ab"):
            stream = mixture_of(path, sizes, weights=weights, rank=rank, world_size=world_size)
            part, documents = stream.streams[number], endless(stream)
            while part.epoch == 0:  # until its second epoch begins; what came before is this reader's share
                text = next(documents)
                if text[0] == letter and part.epoch == 0:
                    epochs[letter].append(text)
    for letter, count in zip("ab", sizes):
        assert len(epochs[letter]) == len(set(epochs[letter])) == count


@pytest.mark.parametrize("world_size", [1, 3])
def test_resuming_a_mixture_anywhere_gives_the_documents_that_would_have_come(tmp_path, world_size):
    for rank in range(world_size):
        options = {"sizes": (9, 30), "rank": rank, "world_size": world_size, "seed": 5}
        whole = list(islice(endless(mixture_of(tmp_path, **options)), 140))
        for taken in range(0, 130, 1 if rank == 0 else 7):
            first = mixture_of(tmp_path, **options)
            list(islice(endless(first), taken))
            second = mixture_of(tmp_path, **options)
            second.load_state_dict(json.loads(json.dumps(first.state_dict())))
            assert second.epoch == first.epoch
            assert list(islice(endless(second), 5)) == whole[taken : taken + 5]


def test_a_mixtures_validation_split_is_that_of_its_datasets(tmp_path):
    assert set(mixture_of(tmp_path, split="validation")) == {"a validation", "b validation"}


@pytest.mark.parametrize(
    "entries,words",
    [
        ([], "the mixture is empty"),
        (["primer"], "must be {dataset: ..., weight: ...}, not 'primer'"),
        ([{"weight": 1}], "must be {dataset"),
        ([{"dataset": "primer", "wieght": 1}], "unknown key 'wieght' in the mixture's entry for primer"),
        ([{"dataset": "primer", "weight": 0}], "weight of primer must be a number above 0, not 0"),
        ([{"dataset": "primer", "weight": -1}], "above 0"),
        ([{"dataset": "primer", "weight": True}], "above 0"),
        ([{"dataset": "primer", "weight": float("nan")}], "above 0"),
        ([{"dataset": "primer", "weight": float("inf")}], "above 0"),
        ([{"dataset": "primer", "weight": "half"}], "above 0, not 'half'"),
        ([{"dataset": "nowhere/x.jsonl"}], "no dataset nowhere/x.jsonl"),
    ],
)
def test_a_wrong_mixture_is_named_in_one_line(entries, words):
    with pytest.raises(InputError) as caught:
        open_documents(entries)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_mixtures_position_is_refused_by_other_weights(tmp_path):
    state = mixture_of(tmp_path, weights=(1, 3)).state_dict()
    with pytest.raises(InputError, match="another mixture"):
        mixture_of(tmp_path, weights=(1, 2)).load_state_dict(state)
    with pytest.raises(InputError, match="another mixture"):
        mixture_of(tmp_path).load_state_dict(DocumentStream(tmp_path / "a").state_dict())
    with pytest.raises(InputError, match="keep the seed"):
        DocumentStream(tmp_path / "a").load_state_dict(state)


def test_a_mixture_is_read_from_yaml_and_from_the_command_line(tmp_path):
    from nanochat_hf.config import parse_config
    from nanochat_hf.data.tokenizer import TokenizerConfig
    from nanochat_hf.train.pretrain import PretrainConfig

    path, wanted = tmp_path / "base.yaml", [{"dataset": "a/b", "weight": 0.3}, {"dataset": "primer"}]
    path.write_text("dataset:\n  - {dataset: a/b, weight: 0.3}\n  - {dataset: primer}\n")
    for config in (PretrainConfig, TokenizerConfig):
        assert parse_config(config, path).dataset == wanted
        assert parse_config(config, path, {"dataset": "primer"}).dataset == "primer"
        assert parse_config(config, path, {"dataset": "[{dataset: x}]"}).dataset == [{"dataset": "x"}]
    with pytest.raises(InputError, match="dataset is no valid YAML list or mapping"):
        parse_config(PretrainConfig, path, {"dataset": "[{dataset: x"})


def epochs(stream: DocumentStream, count: int) -> list[str]:
    return [text for _ in range(count) for text in stream]


def test_only_empty_texts_end_a_reader_instead_of_keeping_it_searching(tmp_path):
    write_jsonl(tmp_path / "empty.jsonl", [""] * 20)
    for rank in range(3):
        with pytest.raises(InputError, match=r"train split of .*empty\.jsonl has no text"):
            epochs(DocumentStream(tmp_path / "empty.jsonl", rank=rank, world_size=3), 62)


def test_a_share_that_is_empty_in_some_epochs_is_no_error(tmp_path):
    for number, text in enumerate(("one", "validation")):
        write_parquet(tmp_path / f"{number}.parquet", [text])
    shares = [epochs(DocumentStream(tmp_path, rank=rank, world_size=8), 40) for rank in range(8)]
    assert [len(share) for share in shares] == [5] * 8
    write_jsonl(tmp_path / "few.jsonl", ["a long line of text " * 9] * 64)  # four lines of validation for 64 readers
    assert all(epochs(DocumentStream(tmp_path / "few.jsonl", "validation", rank, 64), 600) for rank in range(0, 64, 9))


def test_a_fingerprint_of_text_covers_both_splits_and_every_part(tmp_path):
    for part in "ab":
        (tmp_path / part).mkdir()
        for split in ("train", "validation"):
            write_jsonl(tmp_path / part / f"{split}.jsonl", [f"{split} {i}" for i in range(5)])
    mixture = [{"dataset": str(tmp_path / part), "weight": weight} for part, weight in (("a", 1), ("b", 2))]
    of = [text_fingerprint(dataset) for dataset in (str(tmp_path / "a"), mixture, "primer")]
    assert len(set(of)) == 3 and of == [text_fingerprint(d) for d in (tmp_path / "a", mixture, "primer")]
    for part, split in (("a", "train"), ("b", "validation")):
        path = tmp_path / part / f"{split}.jsonl"
        before = path.read_text()
        path.write_text(before.replace(" 3", " 4"))
        assert text_fingerprint(mixture) != of[1] and (text_fingerprint(str(tmp_path / "a")) != of[0]) == (part == "a")
        path.write_text(before)
    assert text_fingerprint(mixture) == of[1]
    mixture[1]["weight"] = 3
    assert text_fingerprint(mixture) != of[1]


def test_a_fingerprint_of_a_hub_id_asks_nobody_and_missing_text_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    names = ["org/name", "org/name@abc", "org/name/folder"]
    assert len({text_fingerprint(name) for name in names}) == 3
    assert not any(map(is_local, names)) and is_local("primer") and is_local(str(tmp_path))
    assert not is_local([{"dataset": "primer"}, {"dataset": "org/name"}])
    with pytest.raises(InputError, match="no dataset"):
        text_fingerprint(str(tmp_path / "nowhere.jsonl"))
