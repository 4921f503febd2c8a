"""Transforms: protocols to the letter, and what is no conversation is named."""

import re
from random import Random

import pytest

from nanochat_hf.data.answers import hash_answer
from nanochat_hf.data.transforms import (
    TRANSFORMS,
    BadRow,
    check,
    gsm8k,
    multiple_choice,
    simple_spelling,
    spelling_bee,
)
from nanochat_hf.tools import calculate

RNG = Random(0)
USER, REPLY = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


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
        ([USER], "last message"),
        ([REPLY], "role 'assistant'"),
        ([USER, USER, REPLY], "message 2 is of role 'user'"),
        ([{**USER, "content": ""}, REPLY], "message 1 is empty"),
        ([USER, {**REPLY, "content": " \n"}], "message 2 is empty"),
        ([USER, {**REPLY, "content": None}], "message 2 has no text"),
        ([{"role": "user"}, REPLY], "message 1 has no text"),
        ([{**USER, "content": 5}, REPLY], "message 1 has no text"),
        ([{"role": "system", "content": 5}, USER, REPLY], "message 1 has no text"),
        ([{"role": "system", "content": "a"}, REPLY], "message 2 is of role"),
        ([{**USER, "content": [{"type": "image", "text": "x"}]}, REPLY], "unknown part"),
        ([{**USER, "content": [{"type": "text"}]}, REPLY], "without text"),
        ([{**USER, "content": [{"type": "python", "text": "1"}]}, REPLY], "not the assistant's"),
        ([USER, {"role": "tool", "content": "b"}, REPLY], "tool"),
        ([USER, {**REPLY, "tool_calls": [{"x": 1}]}], "none"),
        ([USER, {**REPLY, "tool_calls": [{"function": {"arguments": {}}}]}], "none"),
    ],
)
def test_what_is_no_conversation_is_named(messages, reason):
    with pytest.raises(BadRow, match=re.escape(reason)):
        check(messages)


def test_conversations_with_a_system_message_parts_or_tools_are_fine():
    check([{"role": "system", "content": "Be brief."}, USER, REPLY, USER, REPLY])
    parts = [
        {"type": "text", "text": "It is "},
        {"type": "python", "text": "1+1"},
        {"type": "python_output", "text": "2"},
    ]
    check([{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": parts}])
    check(spelling_bee({"word": "owl"}, Random(1)))


def test_every_transform_is_documented():
    assert all(f.__doc__ for f in TRANSFORMS.values())
