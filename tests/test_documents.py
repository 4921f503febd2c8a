"""The document stream: every document once, in an order that the data alone decides, resumable anywhere.

And the files of a dataset: which ones are read, as which split, and which error names those that cannot be read.
"""

import json
from itertools import islice
from pathlib import Path
from random import Random
from unittest.mock import Mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from httpx import Request, Response
from hub_standin import Repo
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanochat_hf.data import documents as module
from nanochat_hf.data import hub_files
from nanochat_hf.data.documents import DocumentStream, is_local, open_documents, text_fingerprint
from nanochat_hf.data.splits import text_files
from nanochat_hf.errors import InputError


def write(path: Path, texts: list[str], group: int = 4, column: str = "text") -> None:
    """A parquet or .jsonl file, by its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        table = pa.table({column: pa.array(texts, pa.string())})
        pq.write_table(table, path, row_group_size=group, compression="none", use_dictionary=False)
    else:
        path.write_text("".join(json.dumps({column: text}) + "\n" for text in texts))


def layout(folder: Path, *names: str) -> None:
    """A file for each name, whose documents are the name."""
    for name in names:
        write(folder / name, [name] * 3)


def endless(stream):
    while True:
        yield from stream


def epochs(stream, count: int) -> list[str]:
    return [text for _ in range(count) for text in stream]


TRAIN = [f"{n}.{i}" for n, count in enumerate((10, 7, 1)) for i in range(count)]


@pytest.fixture
def folder(tmp_path):
    """Three training files of 10, 7 and 1 documents and a validation file, in row groups of 4."""
    for number, count in enumerate((10, 7, 1, 3)):
        write(tmp_path / f"shard_{number:05d}.parquet", [f"{number}.{i}" for i in range(count)])
    return tmp_path


@given(
    counts=st.lists(st.integers(0, 30), min_size=1, max_size=4).filter(any),
    group=st.integers(1, 12),
    world_size=st.integers(1, 9),
    suffix=st.sampled_from(["parquet", "jsonl"]),
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_ranks_share_every_document_exactly_once_per_epoch(tmp_path_factory, counts, group, world_size, suffix):
    path = tmp_path_factory.mktemp("data")
    for number, count in enumerate([*counts, 1]):
        write(path / f"{number}.{suffix}", [f"{number}.{i}" for i in range(count)], group)
    streams = [DocumentStream(path, rank=rank, world_size=world_size) for rank in range(world_size)]
    for epoch in range(3):
        assert [stream.epoch for stream in streams] == [epoch] * world_size
        texts = [text for stream in streams for text in stream]
        assert sorted(texts) == sorted(f"{n}.{i}" for n, count in enumerate(counts) for i in range(count))


def test_later_epochs_shuffle_by_the_seed_and_only_by_it(folder):
    one, again, other = (epochs(DocumentStream(folder, seed=seed).shard(0, 1), 2)[len(TRAIN) :] for seed in (1, 1, 2))
    assert one == again != other and one != TRAIN
    both = epochs(DocumentStream(folder, seed=1), 3)[len(TRAIN) :]
    assert both[: len(TRAIN)] == one != both[len(TRAIN) :] and sorted(both) == sorted(2 * TRAIN)


def test_only_empty_texts_end_a_stream_and_a_share_that_is_empty_in_some_epochs_is_no_error(tmp_path):
    write(tmp_path / "none" / "0.parquet", [])
    write(tmp_path / "none" / "1.parquet", ["a"])  # the validation split
    with pytest.raises(InputError, match=r"train split of dataset .* has no documents"):
        list(DocumentStream(tmp_path / "none"))
    write(tmp_path / "empty.jsonl", [""] * 20)
    for rank in range(3):
        with pytest.raises(InputError, match=r"train split of .*empty\.jsonl has no text"):
            epochs(DocumentStream(tmp_path / "empty.jsonl", rank=rank, world_size=3), 62)
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\nhello')  # no line begins in the last sixteenth
    with pytest.raises(InputError, match=r"broken\.jsonl cannot be read \(the line at byte 14 is not JSON"):
        epochs(DocumentStream(tmp_path / "broken.jsonl", "validation"), 22)
    layout(tmp_path / "one", "0.parquet", "1.parquet")
    write(tmp_path / "one" / "0.parquet", ["one"])
    shares = [epochs(DocumentStream(tmp_path / "one", rank=rank, world_size=8), 40) for rank in range(8)]
    assert [len(share) for share in shares] == [5] * 8
    write(tmp_path / "few.jsonl", ["a long line of text " * 9] * 64)  # four lines of validation for 64 ranks
    assert all(epochs(DocumentStream(tmp_path / "few.jsonl", "validation", rank, 64), 600) for rank in range(0, 64, 9))


# States


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("mixed", [False, True])
def test_resuming_anywhere_gives_the_documents_that_would_have_come(folder, tmp_path_factory, world_size, mixed):
    write(other := tmp_path_factory.mktemp("data") / "other.jsonl", [f"other {i}" for i in range(30)])
    dataset = [{"dataset": str(folder), "weight": 1}, {"dataset": str(other), "weight": 3}] if mixed else str(folder)
    for rank in range(world_size):
        options = {"rank": rank, "world_size": world_size, "seed": 5}
        whole = list(islice(endless(open_documents(dataset, **options)), 130))
        for taken in range(0, 120, 1 if world_size == 1 and not mixed else 13):
            first, second = (open_documents(dataset, **options) for _ in range(2))
            list(islice(endless(first), taken))
            second.load_state_dict(json.loads(json.dumps(first.state_dict())))
            assert second.epoch == first.epoch
            assert list(islice(endless(second), 5)) == whole[taken : taken + 5]


def test_a_state_holds_for_one_seed_one_mixture_and_a_rank_that_exists(folder, tmp_path):
    state, mixed = DocumentStream(folder, seed=1).state_dict(), mixture_of(tmp_path).state_dict()
    for stream, other, reason in (
        (DocumentStream(folder, seed=2), state, "keep the seed"),
        (DocumentStream(folder), mixed, "keep the seed"),
        (mixture_of(tmp_path), state, "another mixture"),
        (mixture_of(tmp_path, weights=(1, 2)), mixed, "another mixture"),
    ):
        with pytest.raises(InputError, match=reason):
            stream.load_state_dict(other)
    with pytest.raises(InputError, match="rank 3 does not exist among 3 ranks"):
        DocumentStream(folder, rank=3, world_size=3)


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("change", ["nothing", "training text", "validation text", "order", "one more file"])
def test_a_state_holds_for_the_same_text_only_wherever_it_lies(tmp_path, change, split):
    names = ("train-0", "train-1", "validation-0")
    for name in names:
        write(tmp_path / "a" / f"{name}.jsonl", [f"{name} {i}" for i in range(9)])
    saved = DocumentStream(tmp_path / "a", split).state_dict()
    first, second, validation = (tmp_path / "b" / f"{name}.jsonl" for name in names)
    (tmp_path / "a").rename(tmp_path / "b")
    if change == "nothing":
        return DocumentStream(tmp_path / "b", split).load_state_dict(saved)
    if change == "one more file":
        write(first.with_name("train-2.jsonl"), ["new"])
    elif change == "order":
        first.rename(tmp_path / "x")
        second.rename(first)
        (tmp_path / "x").rename(second)
    else:
        path = second if change == "training text" else validation
        path.write_text(path.read_text().replace(" 5", " 6"))  # of the same size
    with pytest.raises(InputError, match="changed since this run began"):
        DocumentStream(tmp_path / "b", split).load_state_dict(saved)


def test_the_primer_is_a_dataset_whose_states_stay_valid():
    texts, validation = (module.primer_documents(split)[0] for split in ("train", "validation"))
    stream = DocumentStream("primer")
    source = {"revision": None, "files and bytes": [1, None], "split": "train", "content": "7c768cf578604488"}
    stream.load_state_dict({"reader": [0, 1, 0], "source": source, "position": [1, 0, 1, 0, 3]})
    Random("0 1 rows 0 0").shuffle(texts := list(texts))  # seed, epoch, file and unit
    assert list(islice(stream, 5)) == texts[3:8] and stream.state_dict()["position"] == [1, 0, 1, 0, 8]
    assert len(validation) > 1700 and not {*validation} & {*texts} and set(DocumentStream("primer", "validation"))


def test_of_more_text_than_the_limit_both_ends_of_each_file_are_hashed(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "HASH_LIMIT", 40)  # 10 bytes at each end of two files

    def content(text: bytes):
        for name in "ab":
            (tmp_path / name).write_bytes(b"0123456789" * 3 if name == "a" else text)
        return module.content_hash(["a"], ["b"], tmp_path.joinpath)

    text, middle = b"0123456789" * 3, b"0123456789XXXXXXXXXX0123456789"
    assert content(text[:-1] + b"X") != content(text) != content(b"X" + text[1:])
    assert content(middle) == content(text)  # the stated limit of this hash
    monkeypatch.setattr(module, "HASH_LIMIT", 60)
    assert content(middle) != content(text)


def test_a_fingerprint_of_text_covers_both_splits_and_every_part(tmp_path, monkeypatch):
    for part in "ab":
        for split in ("train", "validation"):
            write(tmp_path / part / f"{split}.jsonl", [f"{split} {i}" for i in range(5)])
    mixture = [{"dataset": str(tmp_path / part), "weight": weight} for part, weight in (("a", 1), ("b", 2))]
    before = [text_fingerprint(dataset) for dataset in (tmp_path / "a", mixture)]
    for path in (tmp_path / "a" / "train.jsonl", tmp_path / "b" / "validation.jsonl"):
        text = path.read_text()
        path.write_text(text.replace(" 3", " 4"))
        assert text_fingerprint(mixture) != before[1]
        assert (text_fingerprint(tmp_path / "a") != before[0]) == (path.parent.name == "a")
        path.write_text(text)
    assert text_fingerprint(mixture) == before[1]
    mixture[1]["weight"] = 3
    assert text_fingerprint(mixture) != before[1]
    real, before = module.primer_documents, text_fingerprint("primer")
    for changed in ("train", "validation"):
        monkeypatch.setattr(
            module, "primer_documents", lambda s, changed=changed: ([], real(s)[1] + "x" * (s == changed))
        )
        assert text_fingerprint("primer") != before


def test_a_fingerprint_of_a_hub_id_needs_no_network_and_missing_text_is_refused(tmp_path):
    names = ["org/name", "org/name@abc", "org/name/folder"]
    assert text_fingerprint(names[0]) == text_fingerprint([{"dataset": names[0]}])  # the weight that is left out
    assert len({text_fingerprint(name) for name in names}) == 3
    assert not any(map(is_local, [*names, [{"dataset": "primer"}, {"dataset": "org/name"}]])) and is_local("primer")
    with pytest.raises(InputError, match="no dataset"):
        text_fingerprint(str(tmp_path / "nowhere.jsonl"))


# Mixtures


def mixture_of(tmp_path, sizes=(40, 90), lengths=(30, 7), weights=(1, 3), split="train", **options):
    """Two datasets, `sizes` documents of `lengths` letters each; the first letter says which."""
    for letter, count, length in zip("ab", sizes, lengths):
        texts = [f"{letter}{i:03d}".ljust(length, ".") for i in range(count)]
        write(tmp_path / letter / "0.parquet", texts, group=8)
        write(tmp_path / letter / "1.parquet", [f"{letter} validation"])
    entries = [{"dataset": str(tmp_path / letter), "weight": weight} for letter, weight in zip("ab", weights)]
    return open_documents(entries, split, **options)


def test_a_mixture_keeps_the_weights_in_bytes_to_within_a_document(tmp_path):
    read = {"a": 0, "b": 0}
    for text in islice(endless(mixture_of(tmp_path, weights=(0.25, 0.75))), 500):
        read[text[0]] += len(text)
        assert abs(0.75 * read["a"] - 0.25 * read["b"]) <= 30
    assert sum(read.values()) > 3000
    assert set(mixture_of(tmp_path, split="validation")) == {"a validation", "b validation"}
    for name, letter in (("ko", "가"), ("en", "a")):
        write(tmp_path / f"{name}.jsonl", [letter * 10] * 1600)
    stream = open_documents([{"dataset": str(tmp_path / f"{name}.jsonl")} for name in ("ko", "en")])
    texts = list(islice(stream, 400))  # a syllable of Hangul has three bytes
    assert texts.count("가" * 10) == 100 and texts.count("a" * 10) == 300


def test_iterating_over_a_mixture_ends_with_the_dataset_that_ends_first(tmp_path):
    stream = mixture_of(tmp_path, sizes=(10, 400), lengths=(10, 10), weights=(1, 1))
    texts = list(stream)
    assert stream.epoch == 1 and len(texts) == len(set(texts)) and {t[0] for t in texts} == {"a", "b"}
    assert len([t for t in texts if t[0] == "a"]) == 10 and abs(len(texts) - 20) <= 1
    more = list(stream)  # the small one again, the large one from where it was
    assert stream.epoch == 2 and not {t for t in more if t[0] == "b"} & set(texts)


@pytest.mark.parametrize(("weights", "world_size"), [((0.1, 2.5), 1), ((1, 1), 3)])
def test_ranks_of_a_mixture_share_each_datasets_documents_exactly_once_per_epoch(tmp_path, weights, world_size):
    texts = {"a": [], "b": []}
    for rank in range(world_size):
        for number, letter in enumerate("ab"):
            stream = mixture_of(tmp_path, (9, 30), weights=weights, rank=rank, world_size=world_size)
            part, documents = stream.streams[number], endless(stream)
            while part.epoch == 0:  # until its second epoch begins; what came before is this rank's share
                text = next(documents)
                if text[0] == letter and part.epoch == 0:
                    texts[letter].append(text)
    for letter, count in zip("ab", (9, 30)):
        assert len(texts[letter]) == len(set(texts[letter])) == count


# Files


def test_the_last_file_is_validation_or_the_last_sixteenth_of_a_single_one(folder, tmp_path):
    assert list(DocumentStream(folder)) == TRAIN
    assert list(DocumentStream(folder, "validation")) == ["3.0", "3.1", "3.2"]
    texts = [f"{i:04d}" for i in range(160)]
    for path in (tmp_path / "one" / "all.parquet", tmp_path / "one" / "all.jsonl"):
        write(path, texts, 50)
        assert [list(DocumentStream(path, split)) for split in ("train", "validation")] == [texts[:150], texts[150:]]
    write(tmp_path / "few.parquet", list("abcde"))
    assert list(DocumentStream(tmp_path / "few.parquet", "validation")) == ["e"]


@pytest.mark.parametrize("end", ["parquet", "jsonl"])
def test_the_hubs_layout_is_read_by_the_names_of_its_splits(tmp_path, end):
    names = [f"data/{n}-00000-of-00001.{end}" for n in ("test", "train", "validation")]
    layout(tmp_path, *names, f".ipynb_checkpoints/train-0.{end}", f"data/.train-1.{end}", "README.md")
    assert set(DocumentStream(tmp_path)) == {names[1]} and set(DocumentStream(tmp_path, "validation")) == {names[2]}
    assert list(DocumentStream(tmp_path / names[0]))  # a file that is named itself is read
    (tmp_path / names[1]).unlink()
    with pytest.raises(InputError, match="has test and validation files only"):
        DocumentStream(tmp_path)
    with pytest.raises(InputError, match="has validation files only"):
        text_files("d", ["val/0"])


def test_a_split_in_files_that_are_not_read_is_refused(tmp_path):
    layout(tmp_path, "train-0.parquet", "train-1.jsonl")
    (tmp_path / "train-0.parquet").rename(tmp_path / "train-0.Parquet")
    assert set(DocumentStream(tmp_path)) == {"train-0.parquet"}  # one kind only, in any case
    layout(tmp_path, "validation.jsonl")
    with pytest.raises(InputError, match=r"has its validation split in validation.jsonl, which is not read"):
        DocumentStream(tmp_path)
    layout(tmp_path, "c/x.csv")
    for dataset in (tmp_path / "c", tmp_path / "c" / "x.csv"):
        with pytest.raises(InputError, match=r"no .parquet or .jsonl files, only x.csv"):
            DocumentStream(dataset)


def test_what_no_name_decides_is_logged_once_by_the_main_process(tmp_path, capsys, monkeypatch):
    layout(tmp_path, "a.parquet", "b.parquet")
    for rank in "10":
        monkeypatch.setenv("RANK", rank)
        module.log.cache_clear()
        for split in ("train", "validation", "train"):
            DocumentStream(tmp_path, split)
        line = f"dataset {tmp_path}: no file is named after a validation split, so it is b.parquet\n"
        assert capsys.readouterr().err == (line if rank == "0" else "")


def test_names_that_look_like_something_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    layout(tmp_path, "~nobody-of-that-name/a.jsonl", "text.parquet/part-0.parquet", "text.parquet/part-1.parquet")
    assert list(DocumentStream("~nobody-of-that-name/a.jsonl"))
    assert set(DocumentStream(tmp_path / "text.parquet")) == {"text.parquet/part-0.parquet"}
    for dataset in ("org/name", "org/name-2.5", "org/name@main", "org/name@1f3a/data/kor_Hang", "a.b/c.d/e"):
        assert module.is_hub_id(dataset)
    for dataset in ("name", "/org/name", "./org/name", "~/name", "org/", "data/texts.jsonl"):
        assert not module.is_hub_id(dataset)


def test_empty_documents_are_passed_over_and_half_a_surrogate_pair_is_no_character(tmp_path):
    write(tmp_path / "0.parquet", ["a", None, "", "b"])
    write(tmp_path / "1.parquet", ["c"])
    assert list(DocumentStream(tmp_path)) == ["a", "b"]
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "a\\ud800b"}\n{"text": "\\ud83e\\udd89"}\n' * 20)
    assert set(open_documents([{"dataset": str(path)}])) == {"a?b", "🦉"}


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ("empty", "truncated or no parquet"), ("truncated", "truncated or no parquet"), ("overwritten", "row group 0"),
        ("no UTF-8", "row group 0: 'utf-8' codec"),
    ],
)  # fmt: skip
def test_a_broken_file_is_named_and_skipped_only_on_request(tmp_path, damage, reason):
    texts, path = [f"{i} " + "word " * 50 for i in range(8)], tmp_path / "0.parquet"
    for number in "012":
        write(tmp_path / f"{number}.parquet", ["v"] if number != "0" else texts)
    content, start = path.read_bytes(), pq.read_metadata(path).row_group(0).column(0).data_page_offset
    whole = {"empty": b"", "truncated": content[:-30], "no UTF-8": content.replace(b"0 word", b"0 wo\xffd")}
    path.write_bytes(whole.get(damage, content[:start] + b"\xff" * 20 + content[start + 20 :]))
    rest = [] if reason.startswith("truncated") else texts[4:]  # of the second row group
    with pytest.raises(InputError, match=rf"0.parquet cannot be read \({reason}.*skip_bad_files"):
        list(DocumentStream(tmp_path))
    with pytest.warns(UserWarning, match=reason):
        assert list(DocumentStream(tmp_path, skip_bad_files=True)) == [*rest, "v"]


@pytest.mark.parametrize("line", ['{"text": "b"', "[" * 100_000])
def test_bad_lines_are_named_and_skipped_only_on_request(tmp_path, line):
    path = tmp_path / "d.jsonl"
    path.write_text(f'{{"text": "a"}}\n{line}\n' + '{"text": "c"}\n' * 40_000)
    with pytest.raises(InputError, match="byte 14 is not JSON"):
        list(DocumentStream(path))
    with pytest.warns(UserWarning, match="byte 14"):
        assert set(DocumentStream(path, skip_bad_files=True)) == {"a", "c"}


# The Hub


def test_failures_of_the_network_are_tried_again_and_then_named(monkeypatch):
    delays = []
    monkeypatch.setattr(hub_files.time, "sleep", delays.append)
    with pytest.warns(UserWarning, match="file x: attempt [12345] failed with"):
        assert hub_files.with_retry(Mock(side_effect=[TimeoutError("late"), "done"]), "file x") == "done"
        with pytest.raises(InputError, match=r"file x: failed 6 times.*gone"):
            hub_files.with_retry(Mock(side_effect=ConnectionResetError("gone")), "file x")
    assert delays == [1, 1, 2, 4, 8, 16]
    fails, gated = (HfHubHTTPError, ".*HfHubHTTPError"), (GatedRepoError, "accept its terms")
    for status, calls, (kind, says) in ((400, 1, fails), (429, 6, fails), (503, 6, fails), (403, 1, gated)):
        answer = Response(status, request=Request("POST", "https://hub"))  # again only where it may pass
        send = Mock(side_effect=kind("no", response=answer))
        with pytest.raises(InputError, match=f"you/small: {says}"):
            hub_files.with_retry(send, "you/small", str)
        assert send.call_count == calls


def pushed(names: list[str], commit: str = "a" * 40) -> Repo:
    """A repository whose files have their names as documents."""
    files = {name: "".join(json.dumps({"text": name}) + "\n" for _ in range(3)).encode() for name in names}
    return Repo(branches={"main": commit}, commits={commit: files})


def test_a_hub_dataset_is_read_by_the_names_of_its_splits_and_stays_at_its_commit(hub):
    names = ["data/kor/test/0.jsonl", "data/kor/train/0.jsonl", "data/kor/train/1.jsonl", "data/kor/.x/train.jsonl"]
    hub.repos["datasets", "org/name"] = repo = pushed([*names, "data/eng/train/0.jsonl", "README.md"])
    for dataset in ("org/name", "org/name/data/kor", "org/name@main/data"):
        expected = {*names[1:3]} if "kor" in dataset else {*names[1:3], "data/eng/train/0.jsonl"}
        assert set(DocumentStream(dataset)) == expected
        assert set(DocumentStream(dataset, "validation")) == {names[0]}
    assert set(DocumentStream("org/name/data/kor/train")) == {names[1]}  # in a split's folder the last is held out
    saved = DocumentStream("org/name@main").state_dict()
    repo.commits["b" * 40], repo.branches["main"] = pushed(["train.jsonl", "test.jsonl"]).commits["a" * 40], "b" * 40
    stream = DocumentStream("org/name@main")
    assert set(stream) == {"train.jsonl"}
    stream.load_state_dict(saved)
    assert stream.state_dict() == saved and set(stream) == {*names[1:3], "data/eng/train/0.jsonl"}
    requests = len(hub.requests)
    for name in ("org/nothing", "you/a--b", "you/b..c", "you/" + "c" * 200):  # the last three cannot be
        with pytest.raises(InputError, match=f"dataset {name} .*: the Hub has no such repository"):
            DocumentStream(name)
    hub.fail("GET", "/api/datasets/", 403)
    with pytest.raises(InputError, match="the token has no right to this"):
        DocumentStream("you/secret")
    assert len(hub.requests) == requests + 2


def test_folders_that_are_nested_too_deeply_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("os.walk", Mock(side_effect=RecursionError))  # as for the dataset /
    with pytest.raises(InputError, match="cannot be walked through: name the folder that holds the files"):
        DocumentStream(str(tmp_path))


def test_files_of_the_hub_are_fetched_once_each_through_failures(hub):
    names = [f"{i}.jsonl" for i in range(4)]
    hub.repos["datasets", "me/books"] = pushed(names)
    hub.fail("GET", "/api/datasets/me/books", status=429)  # the Hub asks to slow down
    hub.fail("GET", "1.jsonl", status=500)
    with pytest.warns(UserWarning, match="attempt 1 failed"):
        assert list(DocumentStream("me/books")) == [name for name in names[:3] for _ in range(3)]
    list(DocumentStream("me/books"))
    fetched = [line.rsplit("/", 1)[-1] for line in hub.requests if line.startswith("GET") and "/resolve/" in line]
    assert sorted(fetched) == ["0.jsonl", "1.jsonl", "1.jsonl", "2.jsonl"]


def test_a_folder_with_more_files_than_a_dataset_has_is_not_walked_to_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr("nanochat_hf.data.splits.MAX_FILES", 10)
    for number in range(12):
        (tmp_path / "ab"[number // 6] / str(number)).mkdir(parents=True)
    with pytest.raises(InputError, match="has more than 10 files: name the folder of the dataset"):
        open_documents(str(tmp_path))
