"""Names tell splits: which files are trained on, validated on, left out, and what is said about it."""

import pytest

from nanochat_hf.data.splits import is_visible, row_files, split_of, text_files, unread_files
from nanochat_hf.errors import InputError


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train-00000-of-00002.parquet", "train"),
        ("data/CC-MAIN-2013-20/train-00000-of-00014.parquet", "train"),
        ("train.jsonl", "train"),
        ("training_3.jsonl", "train"),
        ("wiki.train.raw.jsonl", "train"),
        ("trainset.parquet", "train"),
        ("train_prefs-00000-of-00001.parquet", "train"),
        ("train/000_00000.parquet", "train"),
        ("Train.parquet", "train"),
        ("validation-00000-of-00001.parquet", "validation"),
        ("val-0.parquet", "validation"),
        ("valid.jsonl", "validation"),
        ("books_dev.parquet", "validation"),
        ("dev/a.parquet", "validation"),
        ("test.parquet", "test"),
        ("testdata.parquet", "test"),
        ("test2.jsonl", "test"),
        ("kor_Hang/test/000_00000.parquet", "test"),
        ("eval.jsonl", "test"),
        ("evaluation/0.jsonl", "test"),
        ("devtest.jsonl", "test"),
        ("train/test_questions.jsonl", "test"),  # the file's own name comes first
        ("test/train/0.jsonl", "train"),  # then the nearest folder's
        ("MyTest.parquet", "test"),
        ("trainA/0.parquet", "train"),
        ("testA.jsonl", "test"),
        ("JSONVal.jsonl", "validation"),
        ("tests/0.jsonl", "test"),
        ("evals.jsonl", "test"),
        ("held_out.jsonl", "test"),
        ("held-out/0.jsonl", "test"),
        ("heldout.jsonl", "test"),
        ("HoldOut.jsonl", "test"),
        ("train-00000-of-00002-3f1a9c0b2d4e5f60.parquet", "train"),
        ("shard_00000.parquet", None),
        ("greatest.parquet", None),
        ("LATEST.parquet", None),
        ("Contest.parquet", None),
        ("latest.parquet", None),
        ("contest.parquet", None),
        ("pretraining.parquet", None),
        ("value.parquet", None),
        ("devices.parquet", None),
        ("CC-MAIN-2013-20/000_00000.parquet", None),
    ],
)
def test_a_name_tells_its_split(name, split):
    assert split_of(name) == split


@pytest.mark.parametrize(
    "name", [".ipynb_checkpoints/a.parquet", "._a.parquet", "x/.git/a.jsonl", "__MACOSX/a.jsonl", ".a.jsonl"]
)
def test_hidden_files_are_none_of_the_data(name):
    assert not is_visible(name) and is_visible("a/b.c/_d.jsonl")


@pytest.mark.parametrize(
    ("names", "train", "validation", "sentence"),
    [
        ("a b c", "a b", "c", "no file is named after a validation split, so it is c"),
        ("a", "a", "a", "so it is the last part of a"),
        (
            "data/test-0 data/train-0 data/train-1 data/validation-0",
            "data/train-0 data/train-1",
            "data/validation-0",
            "",
        ),
        ("data/validation-0 data/train-0", "data/train-0", "data/validation-0", ""),
        ("train-0 train-1 test-0", "train-0 train-1", "test-0", "no validation split, so the test split"),
        ("train-0 train-1 train-2", "train-0 train-1", "train-2", "so it is train-2"),
        ("train-0", "train-0", "train-0", "the last part of train-0"),
        ("training val", "training", "val", ""),
        ("train/0 train/1 dev/0", "train/0 train/1", "dev/0", ""),
        ("train/0 eval/0", "train/0", "eval/0", "so the test split"),
        (
            "shard_0 shard_1 valid",
            "shard_0 shard_1",
            "valid",
            "shard_0, shard_1, named after no split, is the training",
        ),
        ("more train-0 val", "train-0", "val", "more, named after no split, is not read"),
        (
            "data/c/train-0 data/c/train-1 sample/10BT/0 sample/10BT/1",
            "data/c/train-0",
            "data/c/train-1",
            "only its folder data is read, not sample; no file",
        ),
        ("data/train-0 other/train-0 test/0 val", "data/train-0", "val", "only its folder data is read, not other"),
        ("data/0 data/1 more/0", "data/0 data/1", "more/0", "so it is more/0"),
        ("main/train-0 main/test-0 other/train-0", "main/train-0 other/train-0", "main/test-0", "test split"),
    ],
)
def test_pretraining_goes_by_the_names_and_says_what_they_leave_open(names, train, validation, sentence):
    *files, said = text_files("d", names.split())
    assert files == [train.split(), validation.split()]
    assert sentence in said if sentence else not said


@pytest.mark.parametrize("names", ["test-0", "test-0 test-1", "validation-0 test-0", "val/0"])
def test_text_without_a_training_split_is_refused(names):
    with pytest.raises(
        InputError, match=r"dataset d has (test|validation|test and validation) files only: name train"
    ):
        text_files("d", names.split())


@pytest.mark.parametrize(
    ("names", "unread", "validation", "sentence"),
    [
        ("a b", "c.csv", "b", "not read: c.csv; no file is named"),
        ("a b", "more/ x.jsonl.gz", "b", "not read: more/, x.jsonl.gz; no file is named"),
        ("train test", "val.json", None, "its validation split in val.json, which is not read"),
        ("train.jsonl", "val/", None, "its validation split in val/, which is not read: .* here .jsonl"),
        ("a b", "test.arrow", None, "its test split in test.arrow"),
        ("a b", "train.csv", None, "its train split in train.csv"),
        ("train val", "test.csv", "val", "not read: test.csv"),
        ("data/train-0 data/val-0", "sample/test.json", "data/val-0", "only its folder data is read, not sample"),
    ],
)
def test_what_is_not_read_is_named_and_no_other_file_takes_the_place_of_a_split(names, unread, validation, sentence):
    if validation is None:
        with pytest.raises(InputError, match=sentence):
            text_files("d", names.split(), unread.split())
    else:
        *_, chosen, said = text_files("d", names.split(), unread.split())
        assert chosen == [validation] and said.startswith(sentence)


def test_files_that_may_hold_rows_are_told_from_others():
    rows = ["a.PARQUET", "b.jsonl.gz", "c.json", "d.CSV", "e/f.arrow", "linked/"]
    names = ["a.jsonl", "README.md", "LICENSE", "dataset_infos.json", "x/state.json", "load.py", *rows]
    assert unread_files(names, ["a.jsonl"]) == rows


OLD = "data/train-00000-of-00002-3f1a9c0b2d4e5f60 data/train-00001-of-00002-a1b2c3d4e5f60718"
ULTRA = "data/train_prefs-00000-of-00001 data/train_sft-00000-of-00001 data/test_prefs-00000-of-00001"


@pytest.mark.parametrize(
    ("names", "split", "subset", "files"),
    [
        ("train-0 train-1 test", "train", None, "train-0 train-1"),
        ("train-0 train-1 test", "test", None, "test"),
        ("train.x val.x", "validation", None, "val.x"),
        ("train.x val.x", "dev", None, "val.x"),
        ("data/train-00000-of-00001 data/test-00000-of-00001", "train", None, "data/train-00000-of-00001"),
        ("train/a train/b test/a", "train", None, "train/a train/b"),
        ("chats_train.x chats_test.x", "train", None, "chats_train.x"),
        (ULTRA, "train_prefs", None, "data/train_prefs-00000-of-00001"),
        (ULTRA, "test", None, "data/test_prefs-00000-of-00001"),
        ("train_prefs.x train_prefs_2.x", "train_prefs", None, "train_prefs.x"),
        ("train_1.x train_2.x", "train_1", None, "train_1.x"),
        ("train_sft/0.x train_gen/0.x", "train_sft", None, "train_sft/0.x"),
        ("train-00000-of-00001 train_sft-00000-of-00001", "train", None, "train-00000-of-00001"),
        ("main/train-0 main/test-0 socratic/train-0", "train", "main", "main/train-0"),
        ("main/train-0 main/test-0 socratic/train-0", "train", "socratic", "socratic/train-0"),
        ("data/en/train-0 data/ko/train-0", "train", "ko", "data/ko/train-0"),
        ("main/train-0", "train", None, "main/train-0"),
        ("train-0", "train", "main", "train-0"),
        (OLD, "train", None, OLD),
        ("train_sft.x train.x", "train", None, "train.x"),
        ("train_sft.x train_gen.x", "train_gen", None, "train_gen.x"),
        ("train_part1.x train_part2.x", "train", None, "train_part1.x train_part2.x"),
        ("train_sft_1.x train_sft_2.x train_gen.x", "train_sft", None, "train_sft_1.x train_sft_2.x"),
        ("train_1.x train_12.x", "train_1", None, "train_1.x"),
        ("chats_train.x more_train.x", "train", None, "chats_train.x more_train.x"),
        ("trainA.x trainB.x testA.x", "train", None, "trainA.x trainB.x"),
        ("v1/a/train-0 v1/b/train-0", "train", "v1/b", "v1/b/train-0"),
        ("v1/train/a/0 v1/train/b/0", "train", "v1/a", "v1/train/a/0"),
        ("data/train-0 other/train-0", "train", None, "data/train-0"),  # data is the Hub's default configuration
    ],
)
def test_rows_are_those_of_their_split_and_subset(names, split, subset, files):
    assert row_files("d", names.split(), split, subset) == files.split()


@pytest.mark.parametrize(
    ("names", "split", "subset", "reason"),
    [
        ("", "train", None, r"no .jsonl or .parquet files named train\*$"),
        ("a b", "train", None, r"named train\*; it has a, b"),
        ("train-0", "test", None, r"named test\*; it has train-0"),
        ("train-0", "train_prefs", None, r"named train_prefs\*"),
        (ULTRA, "train", None, "take one of train_prefs, train_sft"),
        (ULTRA.replace("-00001", "-00001-3f1a9c0b2d4e5f60"), "train", None, "take one of train_prefs, train_sft"),
        ("train_sft.jsonl train_gen.jsonl", "train", None, "take one of train_gen, train_sft"),
        ("train_sft/0.x train_gen/0.x", "train", None, "take one of train_gen, train_sft"),
        ("v1/a/train-0 v1/b/train-0", "train", None, "subsets v1/a, v1/b"),
        ("v1/a/train-0 v1/b/train-0", "train", "v1", "subsets v1/a, v1/b"),
        ("main/train-0 socratic/train-0", "train", None, "subsets main, socratic"),
        ("main/train-0", "train", "socratic", "subsets main: name one of them with subset, not socratic"),
    ],
)
def test_rows_that_no_name_tells_apart_are_refused(names, split, subset, reason):
    with pytest.raises(InputError, match=reason):
        row_files("d", names.split(), split, subset)
