"""Mixtures: rows from files, folders, words and text; bad rows named; the same order for the same seed."""

import json
import re
from collections import Counter
from pathlib import Path
from random import Random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat_hf.data import identity, mixture
from nanochat_hf.data.identity import Identity
from nanochat_hf.data.mixture import DatasetConfig, JsonLines, Mixture, open_rows, refuse_missing, shared
from nanochat_hf.data.transforms import BadRow, spelling_bee
from nanochat_hf.demo import corpus as primer
from nanochat_hf.errors import InputError
from nanochat_hf.run import fingerprint
from nanochat_hf.tools import calculate

REAL = Path(__file__).parents[2] / "shared" / "data" / "chat"
real_data = pytest.mark.skipif(not REAL.is_dir(), reason="the real data is not beside this checkout")


def write(path: Path, rows: list) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def chat(question: str, answer: str) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def first_texts(*entries: dict) -> list[str]:
    return sorted(row["messages"][0]["content"] for row in Mixture(list(entries)))


def test_bad_rows_are_skipped_and_counted_with_number_and_reason(tmp_path):
    rows = [chat("a", "b"), "{broken", chat("", "b"), {"text": "x"}, [1], chat("c", "d")["messages"]]
    mixture = Mixture([{"dataset": write(tmp_path / "chat.jsonl", rows)}])
    good = list(mixture)
    assert sorted(row["row"] for row in good) == [0, 5]
    reasons = {1: "not JSON", 2: "message 1 is empty", 3: "no column 'messages'", 4: "no messages"}
    assert {bad["row"]: bad["reason"] for bad in mixture.skipped} == reasons
    summary = mixture.summary()
    assert list(mixture) == good and mixture.summary() == summary  # counted anew
    assert (summary[0]["bad"], summary[0]["rows"], mixture.entries[0].first_bad) == (4, 2, mixture.skipped[0])
    twice = Mixture([{"dataset": str(tmp_path / "chat.jsonl"), "epochs": 2}])
    assert len(list(twice)) == 4 and len(twice.skipped) == 4 and twice.summary()[0]["bad"] == 8
    with pytest.raises(InputError, match=r"row \d of .*; mend it or set on_bad_example"):
        list(Mixture([{"dataset": str(tmp_path / "chat.jsonl")}], on_bad_example="error"))


def test_epochs_pass_over_all_rows_in_a_new_order_each_time(tmp_path):
    path = write(tmp_path / "chat.jsonl", [chat(str(n), "b") for n in range(20)])
    mixture = Mixture([{"dataset": path, "epochs": 2.5}])
    order = [row["row"] for row in mixture]
    assert [row["row"] for row in mixture] == order  # again from the beginning
    assert sorted(order[:20]) == sorted(order[20:40]) == list(range(20)) and order[:20] != order[20:40]
    assert len(order) == 50 and len(Mixture([{"dataset": path, "epochs": 0.28}])) == 6  # of 5.6
    words = {"dataset": write(tmp_path / "words.txt", ["castle"]), "transform": "spelling_bee", "epochs": 9}
    assert len({row["messages"][0]["content"] for row in Mixture([words])}) > 5  # each epoch draws anew
    assert [row["row"] for row in Mixture([{"dataset": path, "rows": 7}])] == order[:7]
    with pytest.raises(InputError, match="has 20 rows, not 21"):
        Mixture([{"dataset": path, "rows": 21}])


def test_the_primer_has_a_test_split_and_can_leave_its_identity_to_another_entry(tmp_path):
    train, test = (list(Mixture([{"dataset": "primer", "split": s, "rows": 100}])) for s in ("train", "test"))
    assert len(train) == len(test) == 100
    assert {str(r["messages"]) for r in train}.isdisjoint(str(r["messages"]) for r in test)
    path = write(tmp_path / "me.jsonl", [chat("Who are you?", "I am Ophelia.")])
    entries = [{"dataset": "primer:fact+arithmetic+spelling+talk", "rows": 300}, {"dataset": path, "epochs": 9}]
    texts = [message["content"] for row in Mixture(entries) for message in row["messages"]]
    assert texts.count("I am Ophelia.") == 9 and not any("nanochat" in text for text in texts)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"instruction": "Say", "output": "x"}, "no column 'messages'; its columns are instruction, output; transf"),
        ({"messages": [*chat("a", "b")["messages"], {"role": "user", "content": "c"}]}, "last message is not the"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "model", "content": "b"}]}, "but of role 'model'"),
    ],
)
def test_an_entry_without_a_usable_row_is_refused_with_the_reason(tmp_path, row, reason):
    good, bad = write(tmp_path / "good.jsonl", [chat("a", "b")] * 3), write(tmp_path / "bad.jsonl", [row] * 20)
    for entries in ([{"dataset": bad}], [{"dataset": good}, {"dataset": bad}]):
        with pytest.raises(InputError, match=rf"^no row of {bad} can be used; row \d+: .*{reason}"):
            list(Mixture(entries))


def test_the_table_shows_rows_and_tokens(tmp_path):
    path = write(tmp_path / "chat.jsonl", [chat(str(n), "b") for n in range(60)] + ["{"])
    mixture = Mixture([{"dataset": path}, {"dataset": "primer", "rows": 7}])
    for row in mixture:
        mixture.entries[row["entry"]].num_tokens += 20
    assert re.search(r"jsonl +60 +1,200 +1\n  primer +7 +140 +0\n  total +67 +1,340 +1\n", mixture.table())
    assert re.search(r"chat\.jsonl: row 60: .+$", mixture.table())  # why a row is bad
    assert len(list(mixture)) == 67 and [entry["tokens"] for entry in mixture.summary()] == [0, 0]  # counted anew


@real_data
@pytest.mark.slow
def test_the_real_data_gives_conversations_without_a_bad_row():
    parts = (
        ("conversations_train.jsonl", {}, 2109), ("identity_conversations.jsonl", {"epochs": 2}, 2 * 91),
        ("arc_easy_test.jsonl", {"transform": "multiple_choice"}, 2376),
        ("arc_challenge_test.jsonl", {"transform": "multiple_choice"}, 1172),
        ("words.txt", {"transform": "spelling_bee", "rows": 200}, 200),
        ("words.txt", {"transform": "simple_spelling", "rows": 200}, 200),
        ("gsm8k_train.jsonl", {"transform": "gsm8k"}, 7473),
    )  # fmt: skip
    mixture, agree = Mixture([{"dataset": str(REAL / name), **keys} for name, keys, _ in parts]), Counter()
    rows = list(mixture)
    assert len(rows) == len(mixture) == sum(number for *_, number in parts) and not mixture.skipped
    for row in [row["messages"] for row in rows if row["entry"] == 6][:2000]:  # the calculator agrees with GSM8K,
        for call, result in zip(row[1::2], row[2::2], strict=False):
            value = calculate(call["tool_calls"][0]["function"]["arguments"]["expression"])
            agree[float(value) == float(result["content"])] += 1
    assert agree[True] > 4000 and agree[False] < 0.02 * agree[True]  # but for rounded results and fractions


# Rows


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
    entry = DatasetConfig(str(tmp_path / "me.yaml"), rows=50)
    rows = open_rows(entry, seed=1)
    assert len(rows) == 50 and rows == open_rows(entry, seed=1) != open_rows(entry, seed=2)
    assert open_rows(DatasetConfig(entry.dataset, "test", rows=50), seed=1) != rows
    assert any("Ophelia" in row["messages"][-1]["content"] for row in rows)
    with pytest.raises(InputError, match="transform gsm8k does not apply"):
        open_rows(DatasetConfig(str(tmp_path / "me.yaml"), transform="gsm8k"), seed=1)


def test_words_are_split_and_come_from_files_or_from_text(tmp_path):
    words = [f"{a}{b}{c}d" for a in "abcdefghij" for b in "abcdefghij" for c in "abcdefghij"]
    path = write(tmp_path / "words.txt", [*words, "No", "x1", "ab"])
    entry = {"dataset": path, "transform": "simple_spelling"}
    train, test = ({r["messages"][0]["content"] for r in Mixture([entry | {"split": s}])} for s in ("train", "test"))
    assert len(train | test) == 1000 and not train & test and 35 <= len(test) <= 65  # one in twenty
    assert first_texts(entry | {"split": "validation"}) == sorted(test)
    text = write(tmp_path / "text.jsonl", [{"text": "once"}] + [{"text": "the owl and the duck and the owl"}] * 40)
    words = {r["messages"][1]["content"] for r in Mixture([{"dataset": text, "transform": "simple_spelling"}])}
    assert words == {"t,h,e", "o,w,l", "a,n,d", "d,u,c,k"}


def test_one_file_gives_its_rows_only_as_the_split_in_its_name(tmp_path):
    good = "chats train;chats train_prefs;chats_test train;chats_test test;test_sft test_sft"
    bad = "chats test;chats dev;latest test;chats_test val;chats x"
    for name, split in (pair.split() for pair in f"{good};{bad}".split(";")):
        entry = DatasetConfig(write(tmp_path / f"{name}.jsonl", [chat(name, "b")]), split)
        if f"{name} {split}" in good.split(";"):
            assert len(open_rows(entry, seed=0)) == 1
        else:
            with pytest.raises(InputError, match=f"{name}.jsonl is one file, and its name does not say .* {split}"):
                open_rows(entry, seed=0)


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
    for name in ("a", "b"):
        (tmp_path / "of" / name).mkdir(parents=True)
        write(tmp_path / "of" / name / "train.jsonl", [chat(name, "b")])
    parts = [[{"dataset": "of", "subset": name}] for name in ("a", "b")]
    assert not shared(*parts) and first_texts(*parts[1]) == ["b"]


def test_suffixes_have_any_case_and_what_is_not_read_is_named(tmp_path, capsys):
    write(tmp_path / "train.JSONL", [chat("a", "b")])
    pq.write_table(pa.Table.from_pylist([chat("c", "d")]), tmp_path / "test.Parquet")
    assert [first_texts({"dataset": str(tmp_path), "split": split}) for split in ("train", "test")] == [["a"], ["c"]]
    assert "not read" not in capsys.readouterr().err
    (elsewhere := tmp_path.parent / f"{tmp_path.name}-elsewhere").mkdir()
    (tmp_path / "val").symlink_to(elsewhere, target_is_directory=True)
    for name in ("train-2.jsonl.gz", "README.md"):
        write(tmp_path / name, [])
    assert len(Mixture([{"dataset": str(tmp_path)}])) == 1
    assert capsys.readouterr().err == f"dataset {tmp_path}: not read: train-2.jsonl.gz, val/\n"
    write(tmp_path / "more.jsonl", [chat("e", "f")])  # named after no split
    assert len(Mixture([{"dataset": str(tmp_path)}])) == 1
    assert capsys.readouterr().err == f"dataset {tmp_path}: not read: more.jsonl, train-2.jsonl.gz, val/\n"
    (tmp_path / "words.txt").write_text("\ufeffapple\nPear\n\nnaïve\nberry\n", encoding="utf-8")
    spelling = {"dataset": str(tmp_path / "words.txt"), "transform": "simple_spelling"}
    assert {row["messages"][1]["content"] for row in Mixture([spelling])} == {"a,p,p,l,e", "b,e,r,r,y"}
    line = f"{tmp_path}/words.txt: 2 of 5 lines are no word of 3 to 15 letters a-z, and are left out\n"
    assert capsys.readouterr().err == line
    with pytest.raises(InputError, match=r"named validation\*; .* not read are train-2.jsonl.gz, val/"):
        Mixture([{"dataset": str(tmp_path), "split": "validation"}])


@pytest.mark.parametrize("name", ["v[2]", "star*", "a{b} 100%#, 한 국?"])
def test_names_of_folders_are_no_patterns(tmp_path, name):
    for folder in (name, "v2", "starfish"):  # what the names would match as patterns
        (tmp_path / folder).mkdir()
        pq.write_table(pa.Table.from_pylist([chat(folder, "b")]), tmp_path / folder / "train.parquet")
    assert first_texts({"dataset": str(tmp_path / name)}) == [name]


def test_an_id_of_the_hub_may_have_a_dot(monkeypatch):
    calls = []
    monkeypatch.setattr("datasets.load_dataset", lambda **arguments: calls.append(arguments) or [{"n": 1}])
    assert open_rows(DatasetConfig("teknium/OpenHermes-2.5", "test", "main", "sharegpt"), seed=0) == [{"n": 1}]
    assert calls == [{"path": "teknium/OpenHermes-2.5", "name": "main", "split": "test"}]


STYLES = [{}, {"before": "x"}]
TWO = [{"dataset": "primer", "rows": 60}, {"dataset": "primer:talk", "rows": 9}]
ROWS = {  # what is generated from a seed -> its hash: another one means that every run from now on has other data
    "spelling": lambda: [spelling_bee({"word": "banana"}, Random(seed)) for seed in range(300)],
    "identity": lambda: [
        [*identity.conversations(Identity("A", "B", language, styles=STYLES), split, 1, 80)]
        for language in identity.LANGUAGES for split in ("train", "test")
    ],
    "questions": lambda: [primer.questions(kind, num=20) for kind in primer.KINDS],
    "prompts": lambda: [identity._prompt(Random(seed), Identity("A", "B", styles=STYLES)) for seed in range(50)],
    "mixture": lambda: [*Mixture(TWO, seed=3)],
}  # fmt: skip
HASHES = {
    "spelling": "1fd81ba6f781021e", "identity": "35e3353bb7d525ce", "questions": "c9848dfeb95ae389",
    "prompts": "33c4727d7ba7ccfb", "mixture": "daff3f6a254f7899",
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_what_a_seed_generates_is_what_it_was(name):
    assert fingerprint(ROWS[name]()) == HASHES[name]


def test_a_file_for_each_split_words_of_the_beginning_and_a_row_of_another_form(tmp_path, monkeypatch):
    for split in ("train", "test"):
        write(tmp_path / f"of_{split}.jsonl", [chat(split, "b")])
    refuse_missing(f"{tmp_path}/of_{{split}}.jsonl")
    text = write(tmp_path / "text.jsonl", [{"text": f"{word} {word}"} for word in ("owl", "duck", "hen")])
    monkeypatch.setattr(mixture, "MAX_WORD_CHARS", 7)  # as the first text has; the second exceeds it, and is the last
    words = {row["word"] for row in open_rows(DatasetConfig(text, transform="simple_spelling"), 0)}
    assert words == {"owl", "duck"}
    for transform, row, reason in (
        ("messages", {"messages": 5, "system": "x"}, "its system message is no text beside messages"),
        ("multiple_choice", {"question": "a", "choices": 5, "answer": 0}, "not in the form that .*; its columns are"),
    ):
        odd = {"dataset": write(tmp_path / "odd.jsonl", [row]), "transform": transform}
        with pytest.raises(InputError, match=f"no row of .* can be used; row 0: {reason}"):
            list(Mixture([odd]))
