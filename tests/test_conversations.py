"""Mixtures: bad rows named, the same order for the same seed; on the real data, too."""

import json
import re
from itertools import islice
from pathlib import Path

import pytest

from nanochat_hf.data import mixture as conversations
from nanochat_hf.data.mixture import Mixture
from nanochat_hf.errors import InputError
from nanochat_hf.tools import calculate

REAL = Path(__file__).parents[2] / "shared" / "data" / "chat"
real_data = pytest.mark.skipif(not REAL.is_dir(), reason="the real data is not beside this checkout")


def write(path: Path, rows: list) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def chat(question: str, answer: str) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def test_bad_rows_are_skipped_and_counted_with_number_and_reason(tmp_path):
    rows = [chat("a", "b"), "{broken", chat("", "b"), {"text": "x"}, [1], chat("c", "d")["messages"]]
    mixture = Mixture([{"dataset": write(tmp_path / "chat.jsonl", rows)}])
    good = list(mixture)
    assert sorted(row["row"] for row in good) == [0, 5]
    assert {bad["row"]: bad["reason"] for bad in mixture.skipped} == {
        1: "not JSON",
        2: "message 1 is empty",
        3: "no column 'messages'",
        4: "no messages",
    }
    assert mixture.summary()[0]["bad"] == 4 and mixture.summary()[0]["rows"] == 2
    twice = Mixture([{"dataset": str(tmp_path / "chat.jsonl"), "epochs": 2}])
    assert len(list(twice)) == 4 and len(twice.skipped) == 4 and twice.summary()[0]["bad"] == 8


def test_bad_rows_can_be_refused(tmp_path):
    path = write(tmp_path / "chat.jsonl", [chat("a", "b"), chat("a", "")])
    with pytest.raises(InputError, match=r"row 1 of .*message 2 is empty"):
        list(Mixture([{"dataset": path}], on_bad_example="error"))


def test_a_trainer_can_report_a_row_that_is_too_long(tmp_path):
    mixture = Mixture([{"dataset": write(tmp_path / "chat.jsonl", [chat("a", "b")])}])
    (row,) = mixture
    mixture.skip(row["entry"], row["row"], "300 tokens, the context has 256")
    assert mixture.skipped == [
        {"dataset": str(tmp_path / "chat.jsonl"), "row": 0, "reason": "300 tokens, the context has 256"}
    ]


def test_the_same_seed_gives_the_same_stream_and_another_seed_another_order(tmp_path):
    path = write(tmp_path / "chat.jsonl", [chat(str(n), "b") for n in range(50)])
    words = write(tmp_path / "words.txt", ["castle", "owl", "banana"])
    entries = [{"dataset": path}, {"dataset": words, "transform": "spelling_bee", "rows": 30}]
    first, again, other = (list(Mixture(entries, seed=seed)) for seed in (1, 1, 2))
    assert first == again and first != other
    assert [row["entry"] for row in first] != sorted(row["entry"] for row in first)  # mixed, not one after the other
    mixture = Mixture(entries, seed=1)
    assert list(mixture) == list(mixture) == first and len(mixture) == 80


def test_epochs_pass_over_all_rows_in_a_new_order_each_time(tmp_path):
    path = write(tmp_path / "chat.jsonl", [chat(str(n), "b") for n in range(20)])
    order = [row["row"] for row in Mixture([{"dataset": path, "epochs": 2.5}])]
    assert sorted(order[:20]) == sorted(order[20:40]) == list(range(20)) and order[:20] != order[20:40]
    assert len(order) == 50


def test_rows_takes_a_part(tmp_path):
    path = write(tmp_path / "chat.jsonl", [chat(str(n), "b") for n in range(20)])
    assert len({row["row"] for row in Mixture([{"dataset": path, "rows": 7}])}) == 7
    with pytest.raises(InputError, match="has 20 rows, not 21"):
        Mixture([{"dataset": path, "rows": 21}])


def test_the_primer_is_a_data_set_with_a_test_split():
    train = Mixture([{"dataset": "primer", "rows": 100}])
    test = Mixture([{"dataset": "primer", "split": "test", "rows": 100}])
    assert len(list(train)) == len(list(test)) == 100
    assert {str(r["messages"]) for r in train}.isdisjoint(str(r["messages"]) for r in test)


def test_the_primer_can_leave_its_identity_to_another_entry(tmp_path):
    path = write(tmp_path / "me.jsonl", [chat("Who are you?", "I am Ophelia.")])
    entries = [{"dataset": "primer:fact+arithmetic+spelling+talk", "rows": 300}, {"dataset": path, "epochs": 9}]
    texts = [message["content"] for row in Mixture(entries) for message in row["messages"]]
    assert texts.count("I am Ophelia.") == 9 and not any("nanochat" in text for text in texts)
    with pytest.raises(InputError, match="poetry"):
        Mixture([{"dataset": "primer:poetry", "rows": 3}])


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"conversations": [{"from": "human", "value": "Hi"}]}, "no column 'messages'; its columns are conversations"),
        (
            {"instruction": "Say", "output": "x"},
            "no column 'messages'; its columns are instruction, output; transforms: messages, sharegpt",
        ),
        ({"messages": [*chat("a", "b")["messages"], {"role": "user", "content": "c"}]}, "last message is not the"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "model", "content": "b"}]}, "but of role 'model'"),
        ([], "no messages$"),
        ("{", "not JSON$"),
    ],
)
def test_an_entry_without_a_usable_row_is_refused_with_the_reason(tmp_path, row, reason):
    good, bad = write(tmp_path / "good.jsonl", [chat("a", "b")] * 3), write(tmp_path / "bad.jsonl", [row] * 20)
    for entries in ([{"dataset": bad}], [{"dataset": good}, {"dataset": bad}]):
        with pytest.raises(InputError, match=rf"^no row of {bad} can be used; row \d+: .*{reason}"):
            list(Mixture(entries))


def test_an_entry_with_one_usable_row_is_not_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(conversations, "REASONS_KEPT", 0)
    path = write(tmp_path / "some.jsonl", [{"no": 1}] * 20 + [chat("a", "b")])
    mixture = Mixture([{"dataset": path}])
    assert len(list(mixture)) == len(list(mixture)) == 1 and mixture.entries[0].num_bad == 20
    bad = write(tmp_path / "bad.jsonl", [{"no": 1}] * 20)
    with pytest.raises(InputError, match="no column"):  # also when no more reasons are kept
        list(Mixture([{"dataset": bad}]))


def test_the_table_shows_rows_and_tokens(tmp_path):
    mixture = Mixture([{"dataset": "primer", "rows": 60}])
    for row in mixture:
        mixture.entries[row["entry"]].num_tokens += 20
    assert re.search(r"^primer +60 +1,200 +0$", mixture.table(), re.MULTILINE)
    assert re.search(r"^total +60 +1,200 +0$", mixture.table(), re.MULTILINE)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([], "empty"),
        ([{"split": "train"}], "needs a dataset"),
        ([{"dataset": "primer", "row": 5}], "unknown key 'row'"),
        ([{"dataset": "primer", "transform": "gsm9k"}], "unknown transform 'gsm9k'"),
        ([{"dataset": "primer", "transform": "gsm8k"}], "does not apply"),
        ([{"dataset": "primer", "rows": 5, "epochs": 1}], "not both"),
        ([{"dataset": "primer", "rows": -5}], "rows is -5"),
        ([{"dataset": "primer", "epochs": "many"}], "epochs is 'many'"),
        ([{"dataset": "nobody.yaml"}], "cannot read nobody.yaml"),
        ([{"dataset": "primer", "split": "dev"}], "dev"),
        ([{"dataset": "nowhere.jsonl"}], "no such dataset"),
        ([{"dataset": "./nowhere/at"}], "no such dataset"),
        ([{"dataset": "nowhere.txt", "transform": "spelling_bee"}], "no such file"),
    ],
)
def test_wrong_entries_are_named(entries, message):
    with pytest.raises(InputError, match=message):
        Mixture(entries)


@real_data
def test_the_real_data_gives_conversations_without_a_bad_row():
    entries = [
        {"dataset": str(REAL / "conversations_train.jsonl")},
        {"dataset": str(REAL / "identity_conversations.jsonl"), "epochs": 2},
        {"dataset": str(REAL / "gsm8k_train.jsonl"), "transform": "gsm8k"},
        {"dataset": str(REAL / "arc_easy_test.jsonl"), "transform": "multiple_choice"},
        {"dataset": str(REAL / "arc_challenge_test.jsonl"), "transform": "multiple_choice"},
        {"dataset": str(REAL / "words.txt"), "transform": "spelling_bee", "rows": 200},
        {"dataset": str(REAL / "words.txt"), "transform": "simple_spelling", "rows": 200},
    ]
    mixture = Mixture(entries)
    assert sum(1 for _ in mixture) == len(mixture) == 2109 + 2 * 91 + 7473 + 2376 + 1172 + 400
    assert not mixture.skipped


@real_data
def test_the_calculator_agrees_with_gsm8k():
    """Of its 23,716 results; the few others are rounded there, or written as fractions."""
    agree, total = 0, 0
    for row in islice(Mixture([{"dataset": str(REAL / "gsm8k_train.jsonl"), "transform": "gsm8k"}]), 2000):
        for call, result in zip(row["messages"][1::2], row["messages"][2::2], strict=False):
            value = calculate(call["tool_calls"][0]["function"]["arguments"]["expression"])
            agree, total = agree + (float(value) == float(result["content"])), total + 1
    assert total > 4000 and agree / total > 0.98
