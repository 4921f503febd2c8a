"""Rows come from files, folders, words and text; what is missing or empty is named."""

import pytest
from test_conversations import chat, write

from nanochat_hf.data.mixture import DatasetConfig, JsonLines, Mixture, open_rows, shared
from nanochat_hf.data.transforms import BadRow
from nanochat_hf.errors import InputError


def test_lines_are_read_by_number_over_several_files(tmp_path):
    write(tmp_path / "a.jsonl", [{"n": 0}, "", {"n": 1}])
    write(tmp_path / "b.jsonl", ["{broken", {"n": 3}, "[" * 100_000])
    rows = JsonLines([tmp_path / "a.jsonl", tmp_path / "b.jsonl"])
    assert len(rows) == 5 and [rows[i]["n"] for i in (3, 0, 1)] == [3, 0, 1]
    for number in (2, 4):
        with pytest.raises(BadRow, match="not JSON"):
            rows[number]


def test_a_yaml_of_facts_is_a_data_set(tmp_path):
    (tmp_path / "me.yaml").write_text("name: Ophelia\nowner: the club\n")
    entry = DatasetConfig.read({"dataset": str(tmp_path / "me.yaml"), "rows": 50})
    rows = open_rows(entry, seed=1)
    assert len(rows) == 50 and rows == open_rows(entry, seed=1) != open_rows(entry, seed=2)
    assert any("Ophelia" in row["messages"][-1]["content"] for row in rows)
    with pytest.raises(InputError, match="transform gsm8k does not apply"):
        open_rows(DatasetConfig(str(tmp_path / "me.yaml"), transform="gsm8k"), seed=1)


def test_words_are_split_and_come_from_files_or_from_text(tmp_path):
    path = write(
        tmp_path / "words.txt", [f"{a}{b}cd" for a in "abcdefghij" for b in "abcdefghij"] + ["No", "x1", "ab"]
    )
    entry = {"dataset": path, "transform": "simple_spelling"}
    train, test = ({r["messages"][0]["content"] for r in Mixture([entry | {"split": s}])} for s in ("train", "test"))
    assert len(train | test) == 100 and not train & test and 1 <= len(test) <= 15
    text = write(tmp_path / "text.jsonl", [{"text": "the owl and the duck and the owl"} for _ in range(40)])
    words = {r["messages"][1]["content"] for r in Mixture([{"dataset": text, "transform": "simple_spelling"}])}
    assert words == {"t,h,e", "o,w,l", "a,n,d", "d,u,c,k"}


def test_a_folder_gives_the_files_of_its_split(tmp_path):
    write(tmp_path / "train-0.jsonl", [chat("a", "b")])
    write(tmp_path / "train-1.jsonl", [chat("c", "d")])
    write(tmp_path / "test.jsonl", [chat("e", "f")])
    questions = {
        split: sorted(r["messages"][0]["content"] for r in Mixture([{"dataset": str(tmp_path), "split": split}]))
        for split in ("train", "test")
    }
    assert questions == {"train": ["a", "c"], "test": ["e"]}


def test_a_folder_in_the_hubs_layout_gives_the_rows_of_a_split(tmp_path):
    for name in ("data/train-00000-of-00001", "data/test-00000-of-00001", ".ipynb_checkpoints/train-checkpoint"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / f"{name}.jsonl", [chat(name, "b")])
    for split in ("train", "test"):
        (row,) = Mixture([{"dataset": str(tmp_path), "split": split}])
        assert row["messages"][0]["content"] == f"data/{split}-00000-of-00001"


def test_one_file_gives_its_rows_only_as_the_split_that_its_name_tells(tmp_path):
    for name in ("chats", "chats_test", "test_sft", "latest"):
        write(tmp_path / f"{name}.jsonl", [chat(name, "b")])
    for name, split in (
        ("chats", "train"),
        ("chats", "train_prefs"),
        ("chats_test", "train"),
        ("chats_test", "test"),
        ("test_sft", "test_sft"),
    ):
        assert len(open_rows(DatasetConfig(f"{tmp_path}/{name}.jsonl", split), seed=0)) == 1
    for name, split in (
        ("chats", "test"),
        ("chats", "dev"),
        ("latest", "test"),
        ("chats_test", "val"),
        ("chats", "x"),
    ):
        with pytest.raises(InputError, match=f"{name}.jsonl is one file, and its name does not say .* split {split}"):
            open_rows(DatasetConfig(f"{tmp_path}/{name}.jsonl", split), seed=0)


def test_rows_that_two_mixtures_share_are_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("chats", "train-0", "test-0"):
        write(tmp_path / f"{name}.jsonl", [chat(name, "b")])
    folder, one, words = {"dataset": str(tmp_path)}, {"dataset": "chats.jsonl"}, {"transform": "simple_spelling"}
    assert shared([one], [{"dataset": str(tmp_path / "chats.jsonl"), "rows": 1}]) == [str(tmp_path / "chats.jsonl")]
    assert shared([folder], [{"dataset": "./train-0.jsonl"}]) == [str(tmp_path / "train-0.jsonl")]
    assert shared([{"dataset": "primer"}], [{"dataset": "primer", "rows": 9}]) == ["primer::train"]
    assert not shared([folder, one], [{**folder, "split": "test"}, {"dataset": "org/name", "split": "test"}])
    assert not shared([{**one, **words}], [{**one, **words, "split": "test"}])


def test_suffixes_have_any_case_and_what_is_not_read_is_named(tmp_path, capsys):
    import pyarrow as pa
    import pyarrow.parquet as pq

    write(tmp_path / "train.JSONL", [chat("a", "b")])
    pq.write_table(pa.Table.from_pylist([chat("c", "d")]), tmp_path / "test.Parquet")
    for split, question in (("train", "a"), ("test", "c")):
        (row,) = Mixture([{"dataset": str(tmp_path), "split": split}])
        assert row["messages"][0]["content"] == question
    assert "not read" not in capsys.readouterr().err
    elsewhere = tmp_path.parent / f"{tmp_path.name}-elsewhere"
    elsewhere.mkdir()
    (tmp_path / "val").symlink_to(elsewhere, target_is_directory=True)
    write(tmp_path / "train-2.jsonl.gz", [])
    write(tmp_path / "README.md", [])
    assert len(Mixture([{"dataset": str(tmp_path)}])) == 1
    assert capsys.readouterr().err == f"dataset {tmp_path}: not read: train-2.jsonl.gz, val/\n"
    with pytest.raises(InputError, match=r"named validation\*; .* not read are train-2.jsonl.gz, val/"):
        Mixture([{"dataset": str(tmp_path), "split": "validation"}])


@pytest.mark.parametrize("name", ["v[2]", "star*", "what?", "a{b}", "x,y", "hash#1", "100%", "~tilde", "a=b", "한 국"])
def test_names_of_folders_are_no_patterns(tmp_path, name):
    import pyarrow as pa
    import pyarrow.parquet as pq

    for folder in (name, "v2", "starfish", "whatX"):  # what the names would match as patterns
        (tmp_path / folder).mkdir()
        pq.write_table(pa.Table.from_pylist([chat(folder, "b")]), tmp_path / folder / "train.parquet")
    for dataset in (tmp_path / name, tmp_path / name / "train.parquet"):
        (row,) = Mixture([{"dataset": str(dataset)}])
        assert row["messages"][0]["content"] == name


def test_parquet_files_are_read(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"question": "Q", "answer": f"<<1+{n}={n + 1}>>{n + 1}\n#### {n + 1}"} for n in range(4)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    made = list(Mixture([{"dataset": str(tmp_path / "train.parquet"), "transform": "gsm8k"}]))
    assert sorted(row["messages"][2]["content"] for row in made) == ["1", "2", "3", "4"]


def test_empty_and_odd_files_are_named(tmp_path):
    with pytest.raises(InputError, match="no rows"):
        Mixture([{"dataset": write(tmp_path / "empty.jsonl", [])}])
    with pytest.raises(InputError, match="neither"):
        Mixture([{"dataset": write(tmp_path / "data.csv", ["a"])}])
    with pytest.raises(InputError, match=r"train\*"):
        Mixture([{"dataset": str(tmp_path)}])
    (tmp_path / "train.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(InputError, match="cannot read"):
        Mixture([{"dataset": str(tmp_path / "train.parquet")}])


def test_an_id_of_the_hub_may_have_a_dot(monkeypatch):
    asked = []
    monkeypatch.setattr("datasets.load_dataset", lambda **arguments: asked.append(arguments) or [{"n": 1}])
    assert open_rows(DatasetConfig("teknium/OpenHermes-2.5", transform="sharegpt"), seed=0) == [{"n": 1}]
    assert asked == [{"path": "teknium/OpenHermes-2.5", "name": None, "split": "train"}]


@pytest.mark.parametrize("dataset", ["nowhere/chats.jsonl", "./org/name", "name", "org/name/folder", "data/x.csv"])
def test_what_is_no_file_and_no_id_is_named(dataset):
    with pytest.raises(InputError, match=f"no such dataset: {dataset} is no file, no folder and no Hub id"):
        open_rows(DatasetConfig(dataset), seed=0)
