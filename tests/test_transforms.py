"""Transforms: protocols to the letter, OpenAI's forms of calls, and what is no conversation is named."""

import json
import re
from random import Random

import pytest

from nanochat_hf.data import transforms
from nanochat_hf.data.grading import hash_answer
from nanochat_hf.data.transforms import TRANSFORMS, BadRow, check, multiple_choice, normalize
from nanochat_hf.tools import calculate

RNG = Random(0)
USER, REPLY = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
PARTS = [{"type": kind, "text": "1"} for kind in ("text", "python", "python_output")]


def call(arguments, name="python", **keys) -> dict:
    return {"type": "function", "function": {"name": name, "arguments": arguments}, **keys}


def calling(*calls, content=None) -> dict:
    return {"role": "assistant", "content": content, "tool_calls": list(calls)}


def result(content="2", **keys) -> dict:
    return {"role": "tool", "content": content, **keys}


def steps(conversation) -> list[str]:
    """The calls' expressions and the other messages' texts, in order."""
    return [
        c["function"]["arguments"]["expression"] if c else m["content"]
        for m in conversation
        for c in m.get("tool_calls") or [None]
    ]


def test_multiple_choice_keeps_the_protocol_to_the_letter():
    row = {"question": "Which is red?", "choices": ["grass", "blood", "sky", "snow"], "answer": 1}
    prompt = (
        "Multiple Choice question: Which is red?\n- grass=A\n- blood=B\n- sky=C\n- snow=D\n\n"
        "Respond only with the letter of the correct answer."
    )
    reply = {"role": "assistant", "content": "B"}
    assert multiple_choice(row, RNG) == [{"role": "user", "content": prompt}, reply]
    assert multiple_choice({"train": {**row, "subject": ""}}, RNG)[1] == reply  # MMLU's auxiliary split
    assert multiple_choice({"question": "Q", "choices": list("abcdefghijkl"), "answer": 11}, RNG)[1]["content"] == "L"
    arc = {"question": "Q", "choices": {"text": ["x", "y", "z"], "label": ["1", "2", "3"]}, "answerKey": "3"}
    prompt, reply = (message["content"] for message in multiple_choice(arc, RNG))
    assert "- x=1\n- y=2\n- z=3\n\n" in prompt and reply == "3"
    for key in ("E", "12"):
        with pytest.raises(BadRow, match=key):
            multiple_choice(arc | {"answerKey": key}, RNG)
    for choices in ({"text": ["x", "y"], "label": ["A"]}, {"text": ["x"], "label": ["A"]}):
        with pytest.raises(BadRow, match="letters for them"):
            multiple_choice({"question": "Q", "choices": choices, "answerKey": "A"}, RNG)


@pytest.mark.parametrize("answer", [-1, True, False, 2, None, "C", "a", 1.0])
def test_an_answer_that_is_no_choice_is_a_bad_row(answer):
    with pytest.raises(BadRow, match=f"the answer {answer!r} is none of the choices"):
        multiple_choice({"question": "Q", "choices": ["x", "y"], "answer": answer}, RNG)


def test_gsm8k_turns_each_calculation_into_a_tool_call():
    row = {"question": "How much?", "answer": "She earns 12/60 = $<<12/60=0.2>>0.2.\nSo $<<.2*50=5*2=10>>10.\n#### 10"}
    prompt, first, result, second, product, last = transforms.gsm8k(row, RNG)
    assert prompt["content"] == "How much?"
    assert first["content"] == "She earns 12/60 = $"
    assert first["tool_calls"][0]["function"] == {"name": "python", "arguments": {"expression": "12/60"}}
    assert result == {"role": "tool", "name": "python", "content": "0.2"}
    assert second["content"] == "0.2.\nSo $"
    assert second["tool_calls"][0]["function"]["arguments"] == {"expression": ".2*50=5*2"}  # as upstream cuts it
    assert product["content"] == "10"
    assert last == {"role": "assistant", "content": "10.\n#### 10"}


@pytest.mark.parametrize("answer", ["no number", "<<1+1>>2\n#### 2", "<<=2>>2\n#### 2", "#### 2 <<1+1=2>>"])
def test_a_gsm8k_answer_without_its_parts_is_a_bad_row(answer):
    with pytest.raises(BadRow):
        transforms.gsm8k({"question": "Q", "answer": answer}, RNG)


def test_spelling_separates_letters_by_commas_and_the_bee_counts_by_hand_and_checks_with_the_tool():
    assert TRANSFORMS["simple_spelling"]({"word": "owl"}, RNG)[1]["content"] == "o,w,l"
    prompts = set()
    for seed in range(300):
        question, by_hand, result, last = transforms.spelling_bee({"word": "banana"}, Random(seed))
        expression = by_hand["tool_calls"][0]["function"]["arguments"]["expression"]
        letter = re.fullmatch(r"'banana'\.count\('(\w)'\)", expression).group(1)
        assert result["content"] == calculate(expression) == hash_answer(last["content"])
        assert "b,a,n,a,n,a" in by_hand["content"] and f"By hand I count {result['content']}." in by_hand["content"]
        assert re.search(rf"(?<!\w){letter}(?![a-z])", question["content"], re.IGNORECASE)
        prompts.add(re.sub("['\"?]", "", question["content"].lower()))
    assert len(prompts) > 60  # phrasings, times letters
    absent = sum(transforms.spelling_bee({"word": "bob"}, Random(seed))[2]["content"] == "0" for seed in range(1000))
    assert 60 < absent < 130  # a tenth, times 24 of 26 letters: 92 on average


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "no messages"), ("text", "no messages"), ([USER], "last message"), ([REPLY], "role 'assistant'"),
        ([USER, USER, REPLY], "message 2 is of role 'user'"), ([{**USER, "content": ""}, REPLY], "message 1 is empty"),
        ([USER, {**REPLY, "content": " \n"}], "message 2 is empty"),
        ([USER, {**REPLY, "content": None}], "message 2 has no text"),
        ([{"role": "user"}, REPLY], "message 1 has no text"),
        ([{"role": "system", "content": 5}, USER, REPLY], "message 1 has no text"),
        ([{"role": "system", "content": "a"}, REPLY], "message 2 is of role"),
        ([{**USER, "content": [{"type": "image", "text": "x"}]}, REPLY], "unknown part"),
        ([{**USER, "content": [{"type": "text"}]}, REPLY], "without text"),
        ([{**USER, "content": [{"type": "python", "text": "1"}]}, REPLY], "not the assistant's"),
        ([USER, {**REPLY, "tool_calls": [{"x": 1}]}], "none"),
        ([USER, calling(call(None)), result(), REPLY], "nothing"),
        ([{**USER, "tool_calls": [call("1")]}, REPLY], "message 1 has a tool call and is not"),
        ([USER, calling(call("1")), REPLY], "message 3 is of role 'assistant', expected tool"),
        ([USER, calling(call("1")), result(), result(), REPLY], "message 4 is of role 'tool', expected assistant"),
        ([USER, calling(call("1"), call("2")), result(), REPLY], "message 2 has 2 calls"),
        ([USER, calling(call({"city": "Ulm"}, "weather")), result(), REPLY], "message 2 calls weather"),
        ([USER, {**REPLY, "content": [{"type": "python", "text": "1"}]}], "call without its result"),
        ([USER, {**REPLY, "content": [{"type": "python_output", "text": "1"}]}], "result without a call"),
        ([USER, {**REPLY, "content": PARTS[1::-1] + PARTS[2:]}], "call without its result"),
    ],
)  # fmt: skip
def test_what_is_no_conversation_is_named(messages, reason):
    with pytest.raises(BadRow, match=re.escape(reason)):
        check(messages)


@pytest.mark.parametrize(
    "arguments",
    [
        {"expression": "12*34"},
        '{"expression": "12*34"}',
        ' {"expression":"12*34"}\n',
        json.dumps({"expression": "12*34"}, indent=2),
        "12*34",
        " 12*34\n",
        {"expression": "12*34", "city": None},  # Arrow gives all calls of a column the same keys
    ],
)
def test_a_calls_arguments_become_a_mapping(arguments):
    function = call(arguments)["function"]
    old = {"role": "assistant", "content": None, "function_call": function}
    for conversation in (
        [USER, calling(call(arguments)), result(), REPLY],
        [USER, calling(function), result(), REPLY],
        [USER, old, {"role": "function", "name": "python", "content": "2"}, REPLY],
    ):
        before = json.dumps(conversation)
        normalized = normalize(conversation)
        assert normalized[1]["tool_calls"][0]["function"] == {"name": "python", "arguments": {"expression": "12*34"}}
        assert normalized[2]["role"] == "tool" and "function_call" not in normalized[1]
        assert json.dumps(conversation) == before  # the caller's rows stay as they are
        check(normalized)


@pytest.mark.parametrize("expression", ["'owl'.count('o')", '"owl".count("o")', "'é'.count('é')", "408", "1.5"])
def test_expressions_that_look_like_json_stay_expressions(expression):
    for arguments in (expression, json.dumps({"expression": expression})):
        (_, message, *_) = normalize([USER, calling(call(arguments))])
        assert message["tool_calls"][0]["function"]["arguments"] == {"expression": expression}


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (call('{"code": "1+1"}'), "python takes one text, expression, not code"),
        (call({"expression": "1", "digits": 3}), "not expression, digits"),
        (call({"expression": 5}), "python takes one text"), (call({}), "not nothing"),
        (call("[1, 2]"), "no JSON object: [1, 2]"), (call("[" * 100_000), "no JSON object: [["),
        (call('"1+1"'), 'no JSON object: "1+1"'), (call('{"expression": "1'), "no JSON object"),
        (call([1]), "no mapping: [1]"), (call("Ulm", "weather"), "no JSON object: Ulm"),
        (call("1", ""), "names no function"), ({"function": "python"}, "names no function"),
    ],
)  # fmt: skip
def test_a_call_that_is_none_is_named(broken, reason):
    with pytest.raises(BadRow, match=re.escape(reason)) as caught:
        normalize([USER, calling(broken), result(), REPLY])
    assert str(caught.value).startswith("message 2 has a tool call that is none")


def test_each_of_several_calls_gets_its_own_result():
    calls = [call("1+1", id="a"), call('{"expression": "2+2"}', id="b")]
    for results in (
        [result("2", tool_call_id="a"), result("4", tool_call_id="b")],
        [result("4", tool_call_id="b"), result("2", tool_call_id="a")],
        [result("2"), result("4")],  # without ids the order says it
    ):
        conversation = normalize([USER, calling(*calls, content="So "), *results, REPLY])
        assert steps(conversation) == ["a", "1+1", "2", "2+2", "4", "b"]
        assert [m["content"] for m in conversation[1:4:2]] == ["So ", ""]
        check(conversation)
    with pytest.raises(BadRow, match="do not answer a, b"):
        normalize([USER, calling(*calls), result(tool_call_id="a"), result(tool_call_id="c"), REPLY])
    mixed = [call("1", id=1), call("2", id="b")]
    with pytest.raises(BadRow, match=r"do not answer 1, b"):
        normalize([USER, calling(*mixed), result(tool_call_id=[]), result(tool_call_id=2)])
    with pytest.raises(BadRow, match="the results of c do not answer a"):
        normalize([USER, calling(calls[0]), result(tool_call_id="c"), REPLY])


@pytest.mark.parametrize(
    ("ids", "answered", "order"),
    [
        ("ab", "b-", "10"),
        ("ab", "-a", "10"),
        ("a-", "xa", "10"),  # one is left, and one call may have that id
        ("--", "xy", "01"),
        ("abc", "a--", "012"),
        ("abc", "-b-", "012"),
        ("abc", "cb-", "210"),
        ("abc", "c--", "no id, and the others are not in the order"),
        ("abc", "-c-", "no id, and the others are not in the order"),
        ("ab", "x-", "do not answer a, b"),
        ("a-", "aa", "do not answer"),
        ("aa", "a-", "do not answer"),
    ],
)
def test_results_without_an_id_answer_the_calls_that_are_left(ids, answered, order):
    calls = [call(str(n), **({} if one == "-" else {"id": one})) for n, one in enumerate(ids)]
    results = [result(str(n), tool_call_id=None if one == "-" else one) for n, one in enumerate(answered)]
    if not order.isdigit():
        with pytest.raises(BadRow, match=order):
            normalize([USER, calling(*calls), *results, REPLY])
    else:
        conversation = normalize([USER, calling(*calls), *results, REPLY])
        assert [m["content"] for m in conversation if m["role"] == "tool"] == list(order)


def test_a_reply_that_is_not_to_be_learned_is_named():
    check([{"role": "system", "content": "Be brief."}, USER, REPLY, USER, {"role": "assistant", "content": PARTS}])
    check([USER, {**REPLY, "weight": 1}, {**USER, "weight": 0}, {**REPLY, "weight": None}])
    for weight in (0, 0.5, False):
        with pytest.raises(BadRow, match=f"message 2 has the weight {weight}"):
            check([USER, {**REPLY, "weight": weight}, USER, REPLY])
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "weight": 0}]
    with pytest.raises(BadRow, match="message 2 has the weight 0"):
        check(TRANSFORMS["sharegpt"]({"conversations": turns}, RNG))


@pytest.mark.parametrize("transform,row,reason", [
    *(("messages", {"messages": [USER, {**REPLY, key: "x"}]}, f"message 2 has {key}, which would be left out")
      for key in ("reasoning_content", "thinking", "refusal")),
    *(("messages", {"messages": [USER, REPLY], key: ["x"]}, f"its {key} would be") for key in ("images", "documents")),
    ("messages", {"messages": [USER, {**REPLY, "train": False}]}, "message 2 has the train False"),
    ("messages", {"messages": [USER, REPLY], "system": "a", "system_prompt": "b"}, "two system messages"),
    ("messages", {"messages": [USER, calling(call("1+1"))]}, "the last message has a call without its result"),
    ("messages", {"messages": [USER, calling(call('{"expression": " "}')), result(), REPLY]}, "an expression"),
    ("messages", {"messages": [USER, {**REPLY, "content": [{**part, "text": ""} for part in PARTS]}]}, "part"),
    ("sharegpt", {"conversations": [{"from": "gpt", "value": "b", "loss": 0}]}, "message 1 has the loss 0"),
    ("sharegpt", {"conversations": [{"from": "gpt", "value": "b", "tool_calls": "x"}]}, "tool call that is none"),
    ("multiple_choice", {"question": None, "choices": ["a", "b"], "answer": 0}, "the question is no text"),
    ("multiple_choice", {"question": {"stem": "q"}, "choices": ["a", "b"], "answer": 0}, "the question is no text"),
    ("multiple_choice", {"question": "q", "choices": [None, "b"], "answer": 0}, "a choice is no text"),
    ("multiple_choice", {"question": "q", "choices": "ab", "answer": 0}, "a choice is no text"),
    ("multiple_choice", {"question": "q", "choices": {"text": ["a", "b"], "label": ["A", "A"]}, "answerKey": "A"},
     "2 choices and 1 letters"),
])  # fmt: skip
def test_what_training_would_lose_or_make_up_is_no_row(transform, row, reason):
    with pytest.raises(BadRow, match=reason):
        check(normalize(TRANSFORMS[transform](row, RNG)))


@pytest.mark.parametrize("transform,row", [
    ("gsm8k", {"question": "q", "answer": "#### 5"}),
    ("multiple_choice", {"question": "q", "choices": ["a", "b"], "answer": 0}),
])  # fmt: skip
def test_a_system_message_beside_a_question_comes_first(transform, row):
    assert TRANSFORMS[transform]({**row, "system": "s"}, RNG)[0] == {"role": "system", "content": "s"}
    with pytest.raises(TypeError):  # a number is no text, and 0 is not nothing
        TRANSFORMS["instruction"]({"instruction": "i", "input": 0, "output": "o"}, RNG)


@pytest.mark.parametrize(
    ("transform", "row"),
    [
        ("messages", {"messages": [USER, REPLY]}),
        ("instruction", {"instruction": "a", "output": "b"}),
        ("instruction", {"instruction": "", "input": "a", "output": "b"}),
        *(("sharegpt", {"conversations": [{"from": user, "value": "a"}, {"from": name, "value": "b"}]})
          for user, name in (("human", "gpt"), ("human", "chatgpt"), ("human", "bot"), ("user", "assistant"))),
    ],
)  # fmt: skip
def test_a_system_message_beside_the_messages_comes_first_and_a_history_is_refused(transform, row):
    read, system = TRANSFORMS[transform], {"role": "system", "content": "Be brief."}
    for key in ("system", "system_prompt"):
        assert read({**row, key: "Be brief.", "history": []}, RNG) == [system, USER, REPLY]
        assert read({**row, key: None}, RNG) == read({**row, key: ""}, RNG) == [USER, REPLY]
        with pytest.raises(BadRow, match="no text"):
            read({**row, key: {"a": 1}}, RNG)
    with pytest.raises(BadRow, match="history would be left out"):
        read({**row, "history": [["a", "b"]]}, RNG)
    both = {"messages": [system, USER, REPLY], "system": "Be brief."}
    assert TRANSFORMS["messages"](both, RNG) == both["messages"]
    with pytest.raises(BadRow, match="two system messages"):
        TRANSFORMS["messages"]({**both, "system": "Be long."}, RNG)


def test_what_an_instruction_is_about_comes_after_an_empty_line():
    row = {"instruction": "Sum up:", "input": "One. Two.", "output": "b"}
    assert TRANSFORMS["instruction"](row, RNG)[0]["content"] == "Sum up:\n\nOne. Two."


def test_a_message_has_its_calls_in_one_form_only():
    both = {**calling(call("1+1")), "function_call": call("2+2")["function"]}
    with pytest.raises(BadRow, match="message 2 has tool_calls and a function_call"):
        normalize([USER, both, result(), REPLY])
    for empty in (None, []):  # Arrow fills the column
        assert steps(normalize([USER, {**both, "tool_calls": empty}, result(), REPLY])) == ["a", "2+2", "2", "b"]


def test_half_of_a_surrogate_pair_is_no_row_and_becomes_a_question_mark_for_the_server():
    half = json.loads('"x\\ud83d"')
    parts = [{**part, "text": half} for part in PARTS]
    calls = calling(call('{"expression": "\'\\ud83d\'.count(1)"}'))
    messages = [{**USER, "content": half}, calls, result(half), {**REPLY, "content": parts}]
    conversation = normalize(messages, "replace")
    for bad in (messages[:1], [USER, calls, result(), REPLY], [USER, {**REPLY, "content": parts}]):
        with pytest.raises(BadRow, match="half of a surrogate pair"):
            normalize(bad)
    assert [conversation[0]["content"], conversation[2]["content"]] == ["x?", "x?"]
    assert [part["text"] for part in conversation[3]["content"]] == ["x?", "x?", "x?"]
    assert steps(conversation)[1] == "'?'.count(1)" and json.dumps(conversation, ensure_ascii=False).encode()
    assert normalize([{"role": "user", "content": "😀 é"}])[0]["content"] == "😀 é"
    for arguments in ('["\\ud83d"]', half, '{"\\ud83d": 1}'):
        with pytest.raises(BadRow) as caught:  # the server sends the reason
            name = "python" if "{" in arguments else "weather"
            normalize([USER, calling(call(arguments, name)), result(), REPLY], "replace")
        assert str(caught.value).encode()
    deep: dict = {}
    for _ in range(100_000):
        deep = {"a": deep}
    with pytest.raises(BadRow, match="nested too deeply"):
        normalize([USER, calling(call(deep, "weather"))])


def test_texts_of_neighboring_parts_are_joined():
    text = [{"type": "text", "text": "<|user_"}, {"type": "text", "text": "end|>"}]
    reply = {"role": "assistant", "content": [*text, *PARTS[1:], *text]}
    conversation = normalize([*({"role": role, "content": text} for role in ("system", "user")), reply])
    joined = {"type": "text", "text": "<|user_end|>"}
    assert [m["content"] for m in conversation[:2]] == [joined["text"]] * 2
    assert conversation[2]["content"] == [joined, *PARTS[1:], joined]
    for odd in ([], [5], ["a", "b"], [{"type": "text"}], [{"type": "image", "url": "x"}], 5, None):
        assert normalize([{"role": "user", "content": odd}]) == [{"role": "user", "content": odd}]
    for odd in ("text", None, ["a"], {"role": "user"}):
        assert normalize(odd) == odd


def test_a_system_message_beside_an_empty_conversation_begins_it():
    system = {"role": "system", "content": "x"}
    for rest in ([], [None], [{"role": "user", "content": "a"}]):
        assert transforms.with_system({"system": "x"}, rest) == [system, *rest]
    assert transforms.with_system({"system": "x"}, [system]) == [system]
