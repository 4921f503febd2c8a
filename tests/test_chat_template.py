"""The chat template: upstream's token protocol exactly, a true loss mask, and no way in for spelled special tokens."""

import json
from itertools import groupby

import pytest
from jinja2.exceptions import TemplateError
from trl import chat_template_utils

from nanochat_hf.data.tokenizer import SPECIAL_TOKENS, assistant_mask, train_bpe


def call(expression="6*7", name="python", **arguments):
    arguments = arguments or {"expression": expression}
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def system(text):
    return {"role": "system", "content": text}


def user(text):
    return {"role": "user", "content": text}


def assistant(text="", *calls):
    return {"role": "assistant", "content": text, **({"tool_calls": list(calls)} if calls else {})}


def tool(text):
    return {"role": "tool", "name": "python", "content": text}


SUM = [user("What is 6*7?"), assistant("I compute:", call("6*7")), tool("42"), assistant("It is 42.")]
KINDS = (("text", "I compute:"), ("python", "6*7"), ("python_output", "42"), ("text", "It is 42."))
PARTS = [user("What is 6*7?"), assistant([{"type": kind, "text": text} for kind, text in KINDS])]


def show(tokenizer, messages, **options):
    """The rendered text with special tokens in short: ^ bos, u( )u user, a( )a assistant, p( )p call, o( )o output."""
    text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    text = text.replace("<|bos|>", "^")
    for name, letter in (("user", "u"), ("assistant", "a"), ("python", "p"), ("output", "o")):
        text = text.replace(f"<|{name}_start|>", letter + "(").replace(f"<|{name}_end|>", ")" + letter)
    return text


def trained(tokenizer, messages) -> list[str]:
    """The stretches of text that the loss is taken on."""
    out = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    stretches = groupby(zip(out["input_ids"], out["assistant_masks"]), key=lambda pair: pair[1])
    return [tokenizer.decode([token for token, _ in stretch]) for mask, stretch in stretches if mask]


def structure(tokenizer, messages) -> list[int]:
    """The special tokens that the messages become."""
    ids = tokenizer.apply_chat_template(messages, return_dict=False, add_generation_prompt=True)
    return [index for index in ids if index in tokenizer.all_special_ids]


DIALOGUE = [user("Hi"), assistant("Yes?"), user("Bye")]
ROUNDS = [user("?"), assistant("", call("1"), call("2")), tool("x"), tool("y"), assistant("", call("3")), tool("z")]
WEATHER = [user("?"), assistant("", call(name="weather", city="Ulm", days=2, unit=None))]
TEXTS = [user([{"type": "text", "text": "What is "}, {"type": "text", "text": "6*7?"}])]
NONE = [message | {"tool_calls": message.get("tool_calls"), "name": None} for message in SUM]  # as Arrow fills columns
TURN = "^u(What is 6*7?)ua(I compute:p(6*7)po(42)oIt is 42.)a"


@pytest.mark.parametrize(
    ("messages", "options", "text"),
    [
        (DIALOGUE, {}, "^u(Hi)ua(Yes?)au(Bye)u"),
        (DIALOGUE, {"add_generation_prompt": True}, "^u(Hi)ua(Yes?)au(Bye)ua("),
        ([system("Be brief."), *DIALOGUE], {}, "^u(Be brief.\n\nHi)ua(Yes?)au(Bye)u"),
        ([system(""), *DIALOGUE], {}, "^u(Hi)ua(Yes?)au(Bye)u"),
        (SUM, {}, TURN),
        (SUM[:2], {}, "^u(What is 6*7?)ua(I compute:p(6*7)p"),
        (SUM[:3], {"add_generation_prompt": True}, "^u(What is 6*7?)ua(I compute:p(6*7)po(42)o"),
        (PARTS, {}, TURN),
        (NONE, {}, TURN),
        (TEXTS, {}, "^u(What is 6*7?)u"),
        ([*ROUNDS, assistant("end")], {}, "^u(?)ua(p(1)pp(2)po(x)oo(y)op(3)po(z)oend)a"),
        ([*SUM[:3], user("Well?")], {}, TURN.replace("It is 42.", "") + "u(Well?)u"),  # an unfinished turn is closed
        (WEATHER, {}, '^u(?)ua(p(weather(city="Ulm", days=2))p'),
        ([user("?"), {**assistant(None, call("1"))}], {}, "^u(?)ua(p(1)p"),
    ],
)
def test_conversations_follow_upstreams_protocol(tokenizer, messages, options, text):
    assert show(tokenizer, messages, **options) == text


def test_the_loss_is_on_the_assistants_words_calls_and_ends_only(tokenizer):
    spoken = ["I compute:<|python_start|>6*7<|python_end|>", "It is 42.<|assistant_end|>"]
    assert trained(tokenizer, SUM) == spoken
    assert trained(tokenizer, PARTS) == spoken
    dialogue = [system("S"), user("a"), assistant("b"), user("c"), assistant("d")]
    assert trained(tokenizer, dialogue) == ["b<|assistant_end|>", "d<|assistant_end|>"]


ENDS = ["Sure 😊", "좋아요", "e\u0301", "fine 👍🏽", "a 😊 in the middle."]


def conversations(reply):
    part, called = {"type": "text", "text": reply}, call(f"'{reply}'")
    ran = [{"type": "python", "text": f"'{reply}'"}, {"type": "python_output", "text": reply}]
    turns = [
        [assistant(reply), user(reply), assistant(reply)], [assistant(reply, called), tool(reply), assistant(reply)],
        [assistant(reply, call("1"), called), tool(reply), tool(reply), assistant(reply)],
        [assistant("", called), tool(reply), assistant("", call("1")), tool("1"), assistant()],
        [assistant([part, *ran, part, *ran, part, part])], [assistant([*ran, *ran])], [assistant(reply, called)],
    ]  # fmt: skip
    return [[user(reply), *turn] for turn in turns]


@pytest.mark.parametrize("reply", ENDS)
def test_the_mask_holds_all_bytes_of_a_last_character(tokenizer, reply):
    composing = train_bpe(["a few words"], 265, normalization="nfc")
    for tok in (tokenizer, composing):
        options = {"return_dict": True, "return_assistant_tokens_mask": True}
        outs = [tok.apply_chat_template([messages], **options) for messages in conversations(reply)]
        for out in [*outs, tok.apply_chat_template(conversations(reply), padding=True, **options)]:
            assert out["assistant_masks"] == [assistant_mask(tok, ids) for ids in out["input_ids"]]


def test_trl_can_train_with_the_template(tokenizer):
    assert chat_template_utils.supports_tool_calling(tokenizer)
    assert chat_template_utils.is_chat_template_prefix_preserving(tokenizer)
    assert chat_template_utils.is_chat_template_stop_token_trained(tokenizer)
    assert chat_template_utils.has_generation_markers(tokenizer.chat_template)


@pytest.mark.parametrize("token", SPECIAL_TOKENS)
def test_no_content_becomes_a_special_token(tokenizer, token):
    def spelled(word):
        calls = [call(f"'{word}'"), call(name=f"t{word}", **{f"k{word}": word})]
        parts = [{"type": kind, "text": word} for kind in ("text", "python")]
        messages = [system(f"s{word}"), user(f"u{word}"), assistant(f"a{word}", *calls), tool(f"o{word}{word}")]
        return structure(tokenizer, [*messages, assistant(parts), user(parts[:1])])

    # Spellings that could close up again when taken apart are tried too.
    for word in (token, f"<|bo{token}s|>", f"<{token}|bos|>", token[:-1] + token + ">"):
        assert spelled(word) == spelled("x")

    def over_parts(*texts):
        parts = [{"type": "text", "text": text} for text in texts]
        ran = [{"type": "python", "text": "1"}, {"type": "python_output", "text": "1"}]
        messages = [system(parts), user(parts), assistant(parts, call("1")), tool(parts)]
        return structure(tokenizer, [*messages, assistant([*parts, *ran, *parts]), user(parts)])

    for cut in range(1, len(token)):
        assert over_parts(token[:cut], token[cut:]) == over_parts("x")
    assert over_parts(*token) == over_parts("x")


@pytest.mark.parametrize("expression", ["12*34", "'owl'.count('o')", '"owl".count("o")', "'é'.count('é')"])
def test_arguments_as_json_text_are_the_same_call(tokenizer, expression):
    arguments = {"expression": expression}
    expected = show(tokenizer, [user("?"), assistant("", call(expression))])
    spaced = [json.dumps(arguments, ensure_ascii=False, **form) for form in ({}, {"separators": ",:"}, {"indent": 2})]
    for text in (*spaced, expression):
        called = {"type": "function", "function": {"name": "python", "arguments": text}}
        assert show(tokenizer, [user("?"), assistant(None, called)]) == expected


@pytest.mark.parametrize(
    "function",
    [
        {"name": "python", "arguments": '{"code": "1"}'},
        {"name": "python", "arguments": '{"expression": "1", "digits": "2"}'},
        {"name": "python", "arguments": '{"expression": "1\\n"}'},  # an escape that Jinja cannot decode
        {"name": "python", "arguments": {"code": "1"}},
        {"name": "python", "arguments": {"expression": None}},
        {"name": "weather", "arguments": '{"city": "Ulm"}'},
    ],
)
def test_a_call_that_the_template_cannot_read_is_refused(tokenizer, function):
    with pytest.raises(TemplateError, match=r"decode them|no expression"):
        show(tokenizer, [user("?"), assistant("", {"type": "function", "function": function})])


@pytest.mark.parametrize(
    "messages,reason",
    [
        ([user("a"), system("late")], "can only come first"),
        ([system("alone")], "followed by a user message"),
        ([{"role": "critic", "content": "x"}], "unknown role critic"),
        ([user("a"), tool("1")], "must follow an assistant message"),
        ([user([{"type": "image", "url": "x"}])], "type image"),
        ([user([{"type": "text", "text": None}])], "has no text"),
        ([user("a"), assistant([{"type": "text", "text": None}])], "has no text"),
        ([user("a"), assistant([{"type": "python_output", "text": "1"}])], "must follow a part python"),
        ([user("a"), {**assistant("b"), "tool_steps": [{"call": "1+1"}]}], "a tool step has no text"),
        ([user("a"), {"role": "assistant", "content": None, "function_call": {"name": "python"}}], "use tool_calls"),
    ],
)
def test_what_the_protocol_cannot_say_is_refused(tokenizer, messages, reason):
    with pytest.raises(TemplateError, match=reason):
        tokenizer.apply_chat_template(messages, tokenize=False)


CALL, RESULT = "<|python_start|>6*7<|python_end|>", "<|output_start|>42<|output_end|>"
STEP, PADDING = [{"call": "6*7", "result": "42"}], "<|assistant_end|><|bos|><|bos|>"


@pytest.mark.parametrize(
    ("reply", "content", "rest"),
    [
        (f"Hello.{PADDING}", "Hello.", {}), (f"{CALL}{RESULT}It is 42.{PADDING}", "It is 42.", {"tool_steps": STEP}),
        ("Hello.<|assistant_end|>Never<|assistant_end|>stopped", "Hello.", {}),
        (f"Hello.<|bos|>{CALL}{RESULT}", "Hello.", {}), ("Hello.<|user_start|>And you?", "Hello.", {}),
        ("5-5<|python_end|> is<|python_end|> 0", "5-5 is 0", {}),
        (f"I compute:{CALL}{PADDING}", "I compute:", {"tool_calls": [call("6*7")]}),
        (f"<|python_start|>6*7{PADDING}", "", {"tool_calls": [call("6*7")]}),
        (f"{CALL}<|output_start|>42{PADDING}", "", {"tool_steps": STEP}),
        (f"{CALL.replace('6*7', '1<2')}{RESULT}Yes.", "Yes.", {"tool_steps": [{**STEP[0], "call": "1<2"}]}),
    ],
)  # fmt: skip
def test_a_content_ends_at_the_first_end_mark_and_holds_no_marks(tokenizer, reply, content, rest):
    parsed = tokenizer.parse_response(reply, prefix="<|assistant_start|>")
    assert parsed == {"role": "assistant", "content": content, **rest}
    parser = tokenizer.get_response_parser(prefix="<|assistant_start|>")
    events = [event for character in reply for event in parser.feed(character)]
    message, last = parser.finalize()
    shown = [e["text"] for e in events + last if e["type"] == "region_chunk" and e["field"] == "content"]
    assert message == parsed and "".join(shown) == content


def test_a_reply_that_is_given_back_keeps_its_calls_and_results_are_not_trained_on(tokenizer):
    more = f"{CALL}{RESULT}".replace("6*7", "42+1").replace(">42<", ">43<")
    reply = f"{CALL}{RESULT}{more}It is 43.<|assistant_end|>"
    message = tokenizer.parse_response(reply, prefix="<|assistant_start|>")
    messages = [user("What is 6*7+1?"), message, user("And 1 more?")]
    assert show(tokenizer, messages) == "^u(What is 6*7+1?)ua(p(6*7)po(42)op(42+1)po(43)oIt is 43.)au(And 1 more?)u"
    spoken = ["<|python_start|>6*7<|python_end|>", "<|python_start|>42+1<|python_end|>", "It is 43.<|assistant_end|>"]
    assert trained(tokenizer, messages) == spoken
    ids = tokenizer.apply_chat_template(messages, return_dict=False)
    mask = assistant_mask(tokenizer, ids)
    assert tokenizer.decode([i for i, one in zip(ids, mask) if one]) == "".join(spoken)
    spelled = [{"call": "<|bos|>", "result": "<|assistant_end|>"}]
    text = tokenizer.apply_chat_template([user("a"), {**assistant("b"), "tool_steps": spelled}], tokenize=False)
    assert text.count("<|bos|>") == text.count("<|assistant_end|>") == 1
    prompt = tokenizer.apply_chat_template(SUM[:3], add_generation_prompt=True, return_dict=False)
    parsed = tokenizer.parse_response(tokenizer.encode("It is 42.", add_special_tokens=False), prefix=prompt)
    assert parsed["content"] == "It is 42." and not parsed.get("tool_calls")
