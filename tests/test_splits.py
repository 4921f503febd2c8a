"""Names of files tell the splits of a dataset; what they leave open is said, and what they contradict is refused."""

import pytest

from nanochat_hf.data.splits import is_visible, row_files, split_of, text_files, unread_files
from nanochat_hf.errors import InputError

NAMES = {
    "train": "train-00000-of-00002.parquet data/CC-MAIN-2013-20/train-00000-of-00014.parquet train.jsonl "
    "training_3.jsonl wiki.train.raw.jsonl trainset.parquet train_prefs-00000-of-00001.parquet Train.parquet "
    "train/000_00000.parquet test/train/0.jsonl trainA/0.parquet train-00000-of-00002-3f1a9c0b2d4e5f60.parquet",
    "validation": "validation-00000-of-00001.parquet val-0.parquet valid.jsonl books_dev.parquet dev/a.parquet "
    "JSONVal.jsonl",
    "test": "test.parquet testdata.parquet test2.jsonl kor_Hang/test/000_00000.parquet eval.jsonl evaluation/0.jsonl "
    "devtest.jsonl train/test_questions.jsonl MyTest.parquet testA.jsonl tests/0.jsonl evals.jsonl held_out.jsonl "
    "held-out/0.jsonl heldout.jsonl HoldOut.jsonl",
    None: "shard_00000.parquet greatest.parquet LATEST.parquet Contest.parquet latest.parquet contest.parquet "
    "pretraining.parquet value.parquet devices.parquet CC-MAIN-2013-20/000_00000.parquet",
}


@pytest.mark.parametrize(("split", "names"), NAMES.items())
def test_a_name_tells_its_split(split, names):
    assert {name: split_of(name) for name in names.split()} == dict.fromkeys(names.split(), split)


def test_hidden_files_are_none_of_the_data_and_files_of_rows_are_told_from_others():
    for name in (".ipynb_checkpoints/a.parquet", "._a.parquet", "x/.git/a.jsonl", "__MACOSX/a.jsonl", ".a.jsonl"):
        assert not is_visible(name)
    assert is_visible("a/b.c/_d.jsonl")
    rows = ["a.PARQUET", "b.jsonl.gz", "c.json", "d.CSV", "e/f.arrow", "linked/"]
    names = ["a.jsonl", "README.md", "LICENSE", "dataset_infos.json", "x/state.json", "load.py", *rows]
    assert unread_files(names, ["a.jsonl"]) == rows


SPLITS = """
a b c | a b | c | no file is named after a validation split, so it is c
a | a | a | so it is the last part of a
data/test-0 data/train-0 data/train-1 data/validation-0 | data/train-0 data/train-1 | data/validation-0 |
train-0 train-1 test-0 | train-0 train-1 | test-0 | no validation split, so the test split
train-0 train-1 train-2 | train-0 train-1 | train-2 | so it is train-2
train-0 | train-0 | train-0 | the last part of train-0
training val | training | val |
train/0 train/1 dev/0 | train/0 train/1 | dev/0 |
train/0 eval/0 | train/0 | eval/0 | so the test split
shard_0 shard_1 valid | shard_0 shard_1 | valid | shard_0, shard_1, named after no split, is the training
more train-0 val | train-0 | val | more, named after no split, is not read
data/c/train-0 data/c/train-1 s/0 | data/c/train-0 | data/c/train-1 | only its folder data is read, not s; no file
data/train-0 other/train-0 test/0 val | data/train-0 | val | only its folder data is read, not other
data/train-0 val/0 | data/train-0 | val/0 |
data/0 data/1 more/0 | data/0 data/1 | more/0 | so it is more/0
main/train-0 main/test-0 other/train-0 | main/train-0 other/train-0 | main/test-0 | test split
"""


@pytest.mark.parametrize("row", SPLITS.strip().splitlines())
def test_pretraining_goes_by_the_names_and_a_note_says_what_they_leave_open(row):
    names, train, validation, sentence = (part.strip() for part in row.split("|"))
    *files, note = text_files("d", names.split())
    assert files == [train.split(), validation.split()]
    assert sentence in note if sentence else not note


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
        *_, chosen, note = text_files("d", names.split(), unread.split())
        assert chosen == [validation] and note.startswith(sentence)


ROWS = """
train-0 train-1 test | train |  | train-0 train-1
train.x val.x | dev |  | val.x
chats_train.x chats_test.x | train |  | chats_train.x
train_prefs-00000-of-00001 train_sft-0 test_prefs-0 | train_prefs |  | train_prefs-00000-of-00001
train_prefs-00000-of-00001 train_sft-0 test_prefs-0 | test |  | test_prefs-0
train_prefs.x train_prefs_2.x | train_prefs |  | train_prefs.x
train_sft/0.x train_gen/0.x | train_sft |  | train_sft/0.x
train-00000-of-00001 train_sft-00000-of-00001 | train |  | train-00000-of-00001
main/train-0 main/test-0 socratic/train-0 | train | main | main/train-0
data/en/train-0 data/ko/train-0 | train | ko | data/ko/train-0
train-0 | train | main | train-0
train-00000-of-00002-3f1a9c0b2d4e5f60 test | train |  | train-00000-of-00002-3f1a9c0b2d4e5f60
train_sft.x train.x | train |  | train.x
train_part1.x train_part2.x | train |  | train_part1.x train_part2.x
train_sft_1.x train_sft_2.x train_gen.x | train_sft |  | train_sft_1.x train_sft_2.x
train_1.x train_12.x | train_1 |  | train_1.x
chats_train.x more_train.x | train |  | chats_train.x more_train.x
trainA.x trainB.x testA.x | train |  | trainA.x trainB.x
v1/a/train-0 v1/b/train-0 | train | v1/b | v1/b/train-0
v1/train/a/0 v1/train/b/0 | train | v1/a | v1/train/a/0
data/train-0 other/train-0 | train |  | data/train-0
train_sft-00001-of-00002 train_gen.x | train_sft |  | train_sft-00001-of-00002
more/train_part.x | train |  | more/train_part.x
"""


@pytest.mark.parametrize("row", ROWS.strip().splitlines())
def test_rows_are_those_of_their_split_and_subset(row):
    names, split, subset, files = (part.strip() for part in row.split("|"))
    assert row_files("d", names.split(), split, subset or None) == files.split()


REFUSED = """
 | train |  | no .jsonl or .parquet files named train
a b | train |  | it has a, b
train-0 | train_prefs |  | named train_prefs
train_prefs-00000-of-00001 train_sft-0 test_prefs-0 | train |  | take one of train_prefs, train_sft
train_sft.jsonl train_gen.jsonl | train |  | take one of train_gen, train_sft
v1/a/train-0 v1/b/train-0 | train | v1 | subsets v1/a, v1/b
main/train-0 socratic/train-0 | train |  | subsets main, socratic
main/train-0 | train | socratic | subsets main: name one of them with subset, not socratic
train-0 main/train-0 | train | socratic | subsets \\(none\\), main: name one of them
d c b a | train |  | it has a, b, c and 1 more
"""


@pytest.mark.parametrize("row", REFUSED.strip().splitlines())
def test_rows_that_no_name_tells_apart_are_refused(row):
    names, split, subset, reason = (part.strip() for part in row.split("|"))
    with pytest.raises(InputError, match=reason):
        row_files("d", names.split(), split, subset or None)
