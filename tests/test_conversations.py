"""Mixtures: protocols to the letter, bad rows named, the same order for the same seed; on the real data, too."""

import json
import re
from itertools import islice
from pathlib import Path
from random import Random

import pytest

from nanochat_hf.data import conversations
from nanochat_hf.data.answers import hash_answer
from nanochat_hf.data.conversations import (
    BadRow,
    Mixture,
    check,
    gsm8k,
    multiple_choice,
    simple_spelling,
    spelling_bee,
)
from nanochat_hf.errors import InputError
from nanochat_hf.tools import calculate

REAL = Path(__file__).parents[2] / "shared" / "data" / "chat"
real_data = pytest.mark.skipif(not REAL.is_dir(), reason="the real data is not beside this checkout")
RNG = Random(0)


def write(path: Path, rows: list) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def chat(question: str, answer: str) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def test_multiple_choice_keeps_the_protocol_to_the_letter():
    row = {"question": "Which is red?", "choices": ["grass", "blood", "sky", "snow"], "answer": 1}
    assert multiple_choice(row, RNG) == [
        {
            "role": "user",
            "content": "Multiple Choice question: Which is red?\n- grass=A\n- blood=B\n- sky=C\n- snow=D\n\n"
            "Respond only with the letter of the correct answer.",
        },
        {"role": "assistant", "content": "B"},
    ]


def test_multiple_choice_reads_the_forms_of_the_hub():
    arc = {"question": "Q", "choices": {"text": ["x", "y", "z"], "label": ["1", "2", "3"]}, "answerKey": "3"}
    asked, answer = multiple_choice(arc, RNG)
    assert "- x=1\n- y=2\n- z=3\n\n" in asked["content"] and answer["content"] == "3"
    auxiliary = {"train": {"question": "Q", "choices": ["x", "y"], "answer": 0, "subject": ""}}
    assert multiple_choice(auxiliary, RNG)[1]["content"] == "A"
    with pytest.raises(BadRow, match="E"):
        multiple_choice(arc | {"answerKey": "E"}, RNG)


def test_gsm8k_turns_each_calculation_into_a_tool_call():
    row = {"question": "How much?", "answer": "She earns 12/60 = $<<12/60=0.2>>0.2.\nSo $<<0.2*50=10>>10.\n#### 10"}
    asked, first, result, second, _, last = gsm8k(row, RNG)
    assert asked["content"] == "How much?"
    assert first["content"] == "She earns 12/60 = $"
    assert first["tool_calls"][0]["function"] == {"name": "python", "arguments": {"expression": "12/60"}}
    assert result == {"role": "tool", "name": "python", "content": "0.2"}
    assert second["content"] == "0.2.\nSo $"
    assert last == {"role": "assistant", "content": "10.\n#### 10"}


@pytest.mark.parametrize("answer", ["no number", "<<1+1>>2\n#### 2", "<<=2>>2\n#### 2", "#### 2 <<1+1=2>>"])
def test_a_gsm8k_answer_without_its_parts_is_a_bad_row(answer):
    with pytest.raises(BadRow):
        gsm8k({"question": "Q", "answer": answer}, RNG)


def test_simple_spelling_separates_letters_by_commas():
    assert simple_spelling({"word": "owl"}, RNG)[1]["content"] == "o,w,l"


def test_the_spelling_bee_spells_counts_by_hand_and_checks_with_the_tool():
    asked = set()
    for seed in range(300):
        question, by_hand, result, last = spelling_bee({"word": "banana"}, Random(seed))
        expression = by_hand["tool_calls"][0]["function"]["arguments"]["expression"]
        letter = re.fullmatch(r"'banana'\.count\('(\w)'\)", expression).group(1)
        assert result["content"] == calculate(expression) == hash_answer(last["content"])
        assert "b,a,n,a,n,a" in by_hand["content"] and f"By hand I count {result['content']}." in by_hand["content"]
        assert re.search(rf"(?<!\w){letter}(?![a-z])", question["content"], re.IGNORECASE)
        asked.add(re.sub("['\"?]", "", question["content"].lower()))
    assert len(asked) > 60  # phrasings, times letters


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "no messages"),
        ("text", "no messages"),
        ([{"role": "user", "content": "a"}], "last message"),
        ([{"role": "assistant", "content": "a"}], "role 'assistant'"),
        (
            [{"role": "user", "content": "a"}] * 2 + [{"role": "assistant", "content": "b"}],
            "message 2 is of role 'user'",
        ),
        ([{"role": "user", "content": ""}, {"role": "assistant", "content": "b"}], "message 1 is empty"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": None}], "message 2 has no text"),
        ([{"role": "user"}, {"role": "assistant", "content": "b"}], "message 1 has no text"),
        ([{"role": "user", "content": 5}, {"role": "assistant", "content": "b"}], "message 1 has no text"),
        ([{"role": "system", "content": "a"}, {"role": "assistant", "content": "b"}], "message 2 is of role"),
        (
            [{"role": "user", "content": [{"type": "image", "text": "x"}]}, {"role": "assistant", "content": "b"}],
            "unknown part",
        ),
        (
            [{"role": "user", "content": [{"type": "python", "text": "1"}]}, {"role": "assistant", "content": "b"}],
            "not the assistant's",
        ),
        (
            [
                {"role": "user", "content": "a"},
                {"role": "tool", "content": "b"},
                {"role": "assistant", "content": "b"},
            ],
            "tool",
        ),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "tool_calls": [{"x": 1}]}], "none"),
    ],
)
def test_what_is_no_conversation_is_named(messages, reason):
    with pytest.raises(BadRow, match=re.escape(reason)):
        check(messages)


def test_conversations_with_a_system_message_parts_or_tools_are_fine():
    check([{"role": "system", "content": "Be brief."}, *chat("a", "b")["messages"], *chat("c", "d")["messages"]])
    parts = [
        {"type": "text", "text": "It is "},
        {"type": "python", "text": "1+1"},
        {"type": "python_output", "text": "2"},
    ]
    check([{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": parts}])
    check(spelling_bee({"word": "owl"}, Random(1)))


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


def test_bad_rows_can_be_refused(tmp_path):
    path = write(tmp_path / "chat.jsonl", [chat("a", "b"), chat("a", "")])
    with pytest.raises(InputError, match=r"row 1 of .*message 2 is empty"):
        list(Mixture([{"dataset": path}], bad_rows="refuse"))


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


def test_parquet_files_are_read(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"question": "Q", "answer": f"<<1+{n}={n + 1}>>{n + 1}\n#### {n + 1}"} for n in range(4)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    made = list(Mixture([{"dataset": str(tmp_path / "train.parquet"), "transform": "gsm8k"}]))
    assert sorted(row["messages"][2]["content"] for row in made) == ["1", "2", "3", "4"]


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
        ([{"dataset": "primer", "split": "dev"}], "dev"),
        ([{"dataset": "nowhere.jsonl"}], "no such dataset"),
        ([{"dataset": "./nowhere/at"}], "no such dataset"),
        ([{"dataset": "nowhere.txt", "transform": "spelling_bee"}], "no such file"),
    ],
)
def test_wrong_entries_are_named(entries, message):
    with pytest.raises(InputError, match=message):
        Mixture(entries)


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


def test_every_transform_is_documented():
    assert all(f.__doc__ for f in conversations.TRANSFORMS.values())
