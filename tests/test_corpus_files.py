"""The files of a dataset: which ones count, how they are cut, and what is said of those that cannot be read."""

from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_corpus import write_jsonl, write_parquet

from nanochat_hf.data import documents as corpus_files
from nanochat_hf.data.documents import DocumentStream, open_documents
from nanochat_hf.errors import InputError


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


def layout(folder, names):
    """A file for each name, whose documents say it."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (write_parquet if name.endswith("parquet") else write_jsonl)(folder / name, [name] * 3)


@pytest.mark.parametrize("end", ["parquet", "jsonl"])
def test_the_hubs_layout_is_read_by_the_names_of_its_splits(tmp_path, end):
    names = [f"data/{n}-00000-of-00001.{end}" for n in ("test", "train", "validation")]
    layout(tmp_path, [*names, f".ipynb_checkpoints/train-0.{end}", f"data/.train-1.{end}"])
    assert set(DocumentStream(tmp_path)) == {names[1]} and set(DocumentStream(tmp_path, "validation")) == {names[2]}
    assert list(DocumentStream(tmp_path / names[0]))  # somebody who names a file gets it
    (tmp_path / names[1]).unlink()
    with pytest.raises(InputError, match="has test and validation files only"):
        DocumentStream(tmp_path)


def test_a_split_in_files_that_are_not_read_is_refused(tmp_path):
    layout(tmp_path, ["train-0.parquet", "train-1.jsonl"])
    (tmp_path / "train-0.parquet").rename(tmp_path / "train-0.Parquet")
    assert set(DocumentStream(tmp_path)) == {"train-0.parquet"}
    elsewhere = tmp_path.parent / f"{tmp_path.name}-elsewhere"
    layout(elsewhere, ["0.parquet"])
    (tmp_path / "validation").symlink_to(elsewhere, target_is_directory=True)
    with pytest.raises(InputError, match="has its validation split in validation/, which is not read"):
        DocumentStream(tmp_path)
    (tmp_path / "validation").unlink()
    layout(tmp_path, ["validation.jsonl"])
    with pytest.raises(InputError, match=r"has its validation split in validation.jsonl, which is not read"):
        DocumentStream(tmp_path)
    layout(tmp_path / "c", ["x.csv"])
    for dataset in (tmp_path / "c", tmp_path / "c" / "x.csv"):
        with pytest.raises(InputError, match=r"no .parquet or .jsonl files, only x.csv"):
            DocumentStream(dataset)


def test_what_no_name_decides_is_said_once_by_the_main_process(tmp_path, capsys, monkeypatch):
    layout(tmp_path, ["a.parquet", "b.parquet"])
    for rank in "10":
        monkeypatch.setenv("RANK", rank)
        corpus_files.log.cache_clear()
        for split in ("train", "validation", "train"):
            DocumentStream(tmp_path, split)
        said = capsys.readouterr().err
        assert said.count("\n") == (rank == "0")
    assert said == f"dataset {tmp_path}: no file is named after a validation split, so it is b.parquet\n"


def test_positions_of_files_that_were_read_otherwise_are_refused(tmp_path):
    """Older versions read [test, train] as training text and validation; their positions mean other documents."""
    layout(tmp_path, ["test-0.jsonl", "train-0.jsonl"])
    stream = DocumentStream(tmp_path)
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    older = {**stream.state_dict(), "source": {"revision": None, "files and bytes": [2, size], "split": "train"}}
    with pytest.raises(InputError, match="changed since this run began"):
        stream.load_state_dict(older)
    stream.load_state_dict(stream.state_dict())
    (tmp_path / "test-0.jsonl").rename(tmp_path / "validation-0.jsonl")  # here names and order agree
    layout(tmp_path, ["train-0.jsonl"])
    stream = DocumentStream(tmp_path)
    assert "training files" not in stream.state_dict()["source"]


def test_the_hubs_files_are_read_by_the_names_of_their_splits(tmp_path, monkeypatch):
    names = ["data/kor/test/0.jsonl", "data/kor/train/0.jsonl", "data/kor/train/1.jsonl", "data/kor/.x/train.jsonl"]
    layout(tmp_path, [*names, "data/eng/train/0.jsonl"])
    info = SimpleNamespace(sha="abc", siblings=[SimpleNamespace(rfilename=n) for n in [*names, "README.md"]])
    monkeypatch.setattr(corpus_files.HfApi, "dataset_info", lambda *a, **k: info)
    monkeypatch.setattr(corpus_files, "hf_hub_download", lambda repo, name, **k: str(tmp_path / name))
    for dataset in ("org/name", "org/name/data/kor", "org/name@main/data"):
        assert set(DocumentStream(dataset)) == set(names[1:3])
        assert set(DocumentStream(dataset, "validation")) == {names[0]}
    assert set(DocumentStream("org/name/data/kor/train")) == {
        names[1]
    }  # in a split's folder the last file is held out


def test_a_home_that_nobody_has_is_a_folder_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    layout(tmp_path, ["~nobody-of-that-name/a.jsonl"])
    assert list(DocumentStream("~nobody-of-that-name/a.jsonl"))


def test_empty_documents_are_passed_over(tmp_path):
    table = pa.table({"text": pa.array(["a", None, "", "b"], pa.string())})
    pq.write_table(table, tmp_path / "0.parquet")
    write_parquet(tmp_path / "1.parquet", ["c"])
    assert list(DocumentStream(tmp_path)) == ["a", "b"]


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


def test_failures_of_the_network_are_tried_again_and_then_named(monkeypatch):
    pauses, calls = [], []
    monkeypatch.setattr(corpus_files.time, "sleep", pauses.append)

    def fails_twice():
        calls.append(1)
        if len(calls) < 3:
            raise TimeoutError("read timed out")
        return "done"

    with pytest.warns(UserWarning, match="file x: attempt [12] failed with TimeoutError: read timed out"):
        assert corpus_files.with_retry(fails_twice, "file x") == "done"
    assert pauses == [1, 2]

    def always_fails():
        raise ConnectionResetError("gone")

    with pytest.warns(UserWarning), pytest.raises(InputError, match=r"file x: failed 6 times.*gone"):
        corpus_files.with_retry(always_fails, "file x")
    assert pauses == [1, 2, 1, 2, 4, 8, 16]


def test_a_folder_named_like_a_file_is_searched_too(tmp_path):
    (tmp_path / "text.parquet").mkdir()
    for number in range(2):
        write_parquet(tmp_path / "text.parquet" / f"part-{number}.parquet", [str(number)])
    assert list(DocumentStream(tmp_path)) == ["0"]


def test_half_a_surrogate_pair_is_no_character(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "a\\ud800b"}\n{"text": "\\ud83e\\udd89"}\n' * 20)
    assert set(open_documents([{"dataset": str(path)}])) == {"a?b", "🦉"}


def test_parquet_text_that_is_no_utf8_is_named_and_skipped_only_when_told(tmp_path):
    offsets = pa.array([0, 1, 3], pa.int32()).buffers()[1]
    bad = pa.StringArray.from_buffers(2, offsets, pa.py_buffer(b"a\xff\xfe"))
    pq.write_table(pa.table({"text": bad}), tmp_path / "0.parquet")
    write_parquet(tmp_path / "1.parquet", ["v"])
    with pytest.raises(InputError, match=r"0.parquet cannot be read \(row group 0: 'utf-8' codec"):
        list(DocumentStream(tmp_path))
    with pytest.warns(UserWarning, match="skipped"):
        assert list(DocumentStream(tmp_path, skip_bad_files=True)) == []


@pytest.mark.parametrize(
    "dataset", ["org/name", "org/name-2.5", "org/name@main", "org/name@1f3a/data/kor_Hang", "a.b/c.d/e"]
)
def test_an_id_of_the_hub_may_have_dots_a_revision_and_a_folder(dataset):
    assert corpus_files.is_hub_id(dataset)


@pytest.mark.parametrize("dataset", ["name", "/org/name", "./org/name", "~/name", "org/", "data/texts.jsonl"])
def test_a_path_is_no_id_of_the_hub(dataset):
    assert not corpus_files.is_hub_id(dataset)


def test_readers_of_one_process_decode_a_row_group_once(tmp_path, monkeypatch):
    texts, decoded = [f"{i}" for i in range(40)], []
    for number in range(2):
        write_parquet(tmp_path / f"{number}.parquet", texts, group=20)
    read = pq.ParquetFile.read_row_group
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", lambda *a, **k: decoded.append(a[1]) or read(*a, **k))
    stream = DocumentStream(tmp_path)
    assert sorted(t for rank in range(8) for t in stream.shard(rank, 8)) == sorted(texts)
    assert decoded == [0, 1]
    monkeypatch.setattr(corpus_files, "CACHE_LIMIT", 1)  # only the newest stays
    assert sorted(t for rank in range(8) for t in stream.shard(rank, 8)) == sorted(texts)
    assert decoded == [0, 1, 1]


def replace_text(path, old: bytes, new: bytes):
    content = path.read_bytes()
    assert len(old) == len(new) and old in content
    path.write_bytes(content.replace(old, new))


@pytest.mark.parametrize("edited", ["train-0.jsonl", "validation-0.jsonl", "swapped"])
def test_a_position_of_other_text_of_the_same_size_is_refused(tmp_path, edited):
    for name in ("train-0", "train-1", "validation-0"):
        write_jsonl(tmp_path / f"{name}.jsonl", [f"{name} {i}" for i in range(9)])
    saved = DocumentStream(tmp_path).state_dict()
    DocumentStream(tmp_path).load_state_dict(saved)
    if edited == "swapped":
        (tmp_path / "train-0.jsonl").rename(tmp_path / "x")
        (tmp_path / "train-1.jsonl").rename(tmp_path / "train-0.jsonl")
        (tmp_path / "x").rename(tmp_path / "train-1.jsonl")
    else:
        replace_text(tmp_path / edited, b" 5", b" 6")
    with pytest.raises(InputError, match="changed since this run began"):
        DocumentStream(tmp_path).load_state_dict(saved)


def test_positions_without_a_content_hash_are_of_older_versions_and_go_on(tmp_path):
    layout(tmp_path, ["train-0.jsonl", "validation-0.jsonl"])
    saved = DocumentStream(tmp_path).state_dict()
    del saved["source"]["content"]
    DocumentStream(tmp_path).load_state_dict(saved)
    older = {**DocumentStream("primer").state_dict()}
    del older["source"]["content"]
    DocumentStream("primer").load_state_dict(older)


def test_a_moved_dataset_is_the_same_text(tmp_path):
    layout(tmp_path, ["a/train-0.jsonl", "a/validation-0.jsonl"])
    saved = DocumentStream(tmp_path / "a").state_dict()
    (tmp_path / "a").rename(tmp_path / "b")
    DocumentStream(tmp_path / "b").load_state_dict(saved)


def test_of_more_text_than_the_limit_both_ends_of_each_file_are_hashed(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_files, "HASH_LIMIT", 40)  # 10 bytes at each end of two files
    names = ["a", "b"]
    for name in names:
        (tmp_path / name).write_bytes(b"0123456789" * 3)

    def content():
        return corpus_files.content_hash(["a"], ["b"], tmp_path.joinpath)

    first = content()
    (tmp_path / "b").write_bytes(b"0123456789" * 2 + b"012345678X")
    assert content() != first
    (tmp_path / "b").write_bytes(b"X123456789" + b"0123456789" * 2)
    assert content() != first
    (tmp_path / "b").write_bytes(b"0123456789" + b"XXXXXXXXXX" + b"0123456789")  # the stated limit of this hash
    assert content() == first
    monkeypatch.setattr(corpus_files, "HASH_LIMIT", 60)
    assert content() != first
