"""Transforms: a row of any dataset -> the `messages` of a conversation, and the check that it is one.

They keep karpathy/nanochat's protocols to the letter where its checkpoints depend on them: the multiple-choice prompt,
GSM8K's calculator calls, the answers to the spelling tasks. A row that cannot be used raises BadRow (or KeyError,
TypeError, where it has another form); data/mixture.py skips and counts it.

    conversation = TRANSFORMS["gsm8k"]({"question": ..., "answer": ...}, Random(0))  # [{"role": "user", ...}, ...]
    conversation = normalize(conversation)  # OpenAI's forms of calls and parts -> the template's
    check(conversation)
"""

import json
import re
from collections.abc import Callable, Sequence
from itertools import pairwise, takewhile
from pathlib import Path
from random import Random
from string import ascii_uppercase


class BadRow(ValueError):
    """A row is no usable conversation; the text says why."""


def messages(row: dict, rng: Random) -> list[dict]:
    """Conversations as they are: {"messages": [...]}, or the bare list (upstream's identity file)."""
    return row if isinstance(row, list) else with_system(row, row["messages"])


def sharegpt(row: dict, rng: Random) -> list[dict]:
    """{"conversations": [{"from": "human" or "gpt", "value"}]}."""
    names = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}
    conversation = []
    for message in row["conversations"]:
        rest = {key: value for key, value in message.items() if key not in ("from", "value")}
        name = message["from"]
        conversation.append({"role": names.get(name, name), "content": message["value"], **rest})
    return with_system(row, conversation)


def instruction(row: dict, rng: Random) -> list[dict]:
    """Alpaca's form: {"instruction", "output"}, and "input" that the instruction is about."""
    prompt = "\n\n".join(part for part in (row["instruction"], row.get("input")) if part not in (None, ""))
    return with_system(row, exchange(prompt, row["output"]))


def with_system(row: dict, conversation: list) -> list:
    """The conversation after the system message that its row holds beside it. Raises BadRow for what would be lost."""
    if lost := next((key for key in ("history", "images", "documents") if row.get(key)), None):
        raise BadRow(f"its {lost} would be left out: make it messages of text")
    texts = [text for key in ("system", "system_prompt") if (text := row.get(key))]
    if not texts:
        return conversation
    text = texts[0]
    if not isinstance(text, str) or not isinstance(conversation, list):
        raise BadRow("its system message is no text beside messages")
    first = conversation[0] if conversation and isinstance(conversation[0], dict) else {}
    if first.get("role") != "system" and texts == [text] * len(texts):
        return [{"role": "system", "content": text}, *conversation]
    if texts != [first.get("content")] * len(texts):
        raise BadRow("it has two system messages: in its messages, and beside them")
    return conversation


def multiple_choice(row: dict, rng: Random) -> list[dict]:
    """MMLU: {"question", "choices", "answer": index}; ARC: {"choices": {"text", "label"}, "answerKey"}."""
    row = row.get("train") or row  # MMLU's auxiliary_train hides its rows one level down
    question, choices = row["question"], row["choices"]
    if isinstance(choices, dict):
        letters, choices, answer = choices["label"], choices["text"], row["answerKey"]
    else:
        letters, answer = ascii_uppercase[: len(choices)], row["answer"]
        # -1 is how test sets hide the answer; True is no number.
        if type(answer) is int and 0 <= answer < len(letters):
            answer = letters[answer]
    if len({*letters}) != len(choices) or len(choices) < 2:
        raise BadRow(f"{len(choices)} choices and {len({*letters})} letters for them")
    if not isinstance(choices, list) or not all(isinstance(text, str | int | float) for text in choices):
        raise BadRow("a choice is no text")
    if not isinstance(question, str) or not question.strip():
        raise BadRow("the question is no text")
    if answer not in list(letters):
        raise BadRow(f"the answer {answer!r} is none of the choices' letters")
    # The letter is right behind `=`: one token without a space before it, the same that answers.
    lines = "".join(f"- {choice}={letter}\n" for letter, choice in zip(letters, choices))
    prompt = f"Multiple Choice question: {question}\n{lines}\nRespond only with the letter of the correct answer."
    return with_system(row, exchange(prompt, answer))


def gsm8k(row: dict, rng: Random) -> list[dict]:
    """{"question", "answer"}: each `<<expression=result>>` of the answer becomes a tool call and its result."""
    parts = re.split(r"<<([^>]*)>>", row["answer"])
    if "#### " not in parts[-1]:
        raise BadRow("the answer has no '#### '")
    steps = []
    for text, inner in zip(parts[0::2], parts[1::2], strict=False):
        expression, equals, result = inner.rpartition("=")
        if not (expression and equals and result):
            raise BadRow(f"no expression and result in <<{inner}>>")
        steps += call_and_result(text, expression, result)
    return with_system(row, exchange(row["question"], parts[-1], steps))


def simple_spelling(row: dict, rng: Random) -> list[dict]:
    """{"word"} -> the word spelled, its letters separated by commas."""
    return exchange(f"Spell the word: {row['word']}", ",".join(row["word"]))


# Ways to ask how often the letter {l} occurs in the word {w}.
COUNT_QUESTIONS = Path(__file__).with_name("count_questions.txt").read_text(encoding="utf-8").splitlines()


def spelling_bee(row: dict, rng: Random) -> list[dict]:
    """{"word"} -> how often a letter occurs in it: spelled and counted by hand, checked with the tool, `#### n`."""
    word = row["word"]
    letter = rng.choice(word) if rng.random() < 0.9 else rng.choice("abcdefghijklmnopqrstuvwxyz")
    a, b = rng.choice(("", "'", '"')), rng.choice(("", "'", '"'))  # around the letter, around the word
    question = rng.choice(COUNT_QUESTIONS).format(l=f"{a}{letter}{a}", w=f"{b}{word}{b}")
    if rng.random() < 0.3:
        question = question.lower()
    if rng.random() < 0.5:
        question += "?"
    lines, count = [], word.count(letter)
    for position, character in enumerate(word, 1):
        mark = f" that is {letter} number {word[:position].count(letter)}" if character == letter else ""
        lines.append(f"{position}:{character}{mark}")
    by_hand = (
        f"Let me find every '{letter}' in '{word}'. First I spell the word:\n{word}:{','.join(word)}\n\n"
        f"Then I go through the letters:\n" + "\n".join(lines) + f"\n\nBy hand I count {count}. Python checks it:\n\n"
    )
    steps = call_and_result(by_hand, f"'{word}'.count('{letter}')", str(count))
    return exchange(question, f"\n\nPython says {count}, so that is the answer.\n\n#### {count}", steps)


def exchange(question: str, answer: str, steps: Sequence[dict] = ()) -> list[dict]:
    """The user's question, the calls and results of `steps`, and the assistant's answer."""
    return [{"role": "user", "content": question}, *steps, {"role": "assistant", "content": answer}]


def call_and_result(text: str, expression: str, result: str) -> list[dict]:
    """An assistant message of `text` with a call of the python tool, and the tool's result."""
    function = {"name": "python", "arguments": {"expression": expression}}
    call = {"role": "assistant", "content": text, "tool_calls": [{"type": "function", "function": function}]}
    return [call, {"role": "tool", "name": "python", "content": result}]


TRANSFORMS: dict[str, Callable[[dict, Random], list[dict]]] = {
    f.__name__: f for f in (messages, sharegpt, instruction, multiple_choice, gsm8k, simple_spelling, spelling_bee)
}
WORD_TRANSFORMS = ("simple_spelling", "spelling_bee")
WEIGHTS = ("weight", "train", "training", "loss")  # keys that leave a reply out of the loss
NOT_RENDERED = ("reasoning_content", "reasoning", "thinking", "refusal", "audio", "images")  # by the chat template


def normalize(conversation: list[dict], errors: str = "strict") -> list[dict]:
    """OpenAI's forms of messages -> the form that the chat template renders.

    A call's arguments that are JSON text become a mapping; `function_call` and the role function, OpenAI's old form,
    become `tool_calls` and the role tool. Neighboring parts of text become one, so that no special token can be
    spelled over their border. Of several calls in a message each gets its own result right after it. What is no
    message is left to `check`. Raises BadRow for a call that is none, a result that answers another call, or half of
    a surrogate pair, which JSON may spell and no tokenizer takes; `errors` "replace" makes it "?", as in `str.encode`.
    """
    if not isinstance(conversation, list) or not all(isinstance(m, dict) for m in conversation):
        return conversation
    try:
        conversation = _encodable(conversation, errors)
    except RecursionError:
        raise BadRow("the messages are nested too deeply") from None
    normalized: list[dict] = []
    rest = [_with_calls(message, number, errors) for number, message in enumerate(conversation, 1)]
    while rest:
        message, rest = rest[0], rest[1:]
        calls = message.get("tool_calls") or []
        results = list(takewhile(lambda m: m.get("role") == "tool", rest)) if calls else []
        if len(calls) != len(results):  # unanswered ones: not to be learned from, but a model can continue there
            normalized.append(message)
            continue
        texts = [message.get("content"), *[""] * len(calls)]
        for text, call, result in zip(texts, calls, _in_order(calls, results)):
            normalized += [{**message, "content": text, "tool_calls": [call]}, result]
        if not calls:
            normalized.append(message)
        rest = rest[len(results) :]
    return normalized


def _encodable(value, errors: str):
    """The value with texts that have UTF-8."""
    if isinstance(value, str):
        try:
            return value.encode(errors=errors).decode()
        except UnicodeEncodeError:
            raise BadRow("half of a surrogate pair, which is no character") from None
    if isinstance(value, dict):
        return {_encodable(key, errors): _encodable(one, errors) for key, one in value.items()}
    return [_encodable(one, errors) for one in value] if isinstance(value, list) else value


def _with_calls(message: dict, number: int, errors: str = "strict") -> dict:
    """The message with its parts of text joined and its calls as `tool_calls` with mappings."""
    message = {**message, "content": _joined(message.get("content"))}
    if call := message.pop("function_call", None):
        if message.get("tool_calls"):
            raise BadRow(f"message {number} has tool_calls and a function_call, its old form: give one of them")
        message["tool_calls"] = [call]
    if message.get("role") == "function":
        message["role"] = "tool"
    if calls := message.get("tool_calls"):
        try:
            message["tool_calls"] = [_decoded(call, errors) for call in calls]
        except BadRow as error:
            raise BadRow(f"message {number} has a tool call that is none: {error}") from None
    return message


def _joined(content):
    """Content with neighboring parts of text as one part; as plain text where nothing else is in it."""
    if not isinstance(content, list):
        return content
    parts: list = []
    for part in content:
        texts = [p for p in (parts[-1:] + [part]) if isinstance(p, dict) and isinstance(p.get("text"), str)]
        if len(texts) == 2 and all(p.get("type") == "text" for p in texts):
            parts[-1] = {"type": "text", "text": texts[0]["text"] + texts[1]["text"]}
        else:
            parts.append(part)
    only = parts[0] if len(parts) == 1 and isinstance(parts[0], dict) else {}
    return only["text"] if only.get("type") == "text" and isinstance(only.get("text"), str) else parts


def _decoded(call, errors: str) -> dict:
    """A call whose arguments are a mapping: {"expression": text} for python. Raises BadRow."""
    function = (call.get("function") or call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise BadRow("it names no function")
    name, arguments = function["name"], function.get("arguments") or {}
    if isinstance(arguments, str):
        text = arguments.strip()
        try:
            arguments = _encodable(json.loads(text), errors) if text else {}
        except BadRow:
            raise
        except (ValueError, RecursionError):
            arguments = text
        bare = arguments is text or (isinstance(arguments, int | float) and not isinstance(arguments, bool))
        if name == "python" and bare and not text.startswith(("{", "[")):  # an expression, as in python_start ... end
            arguments = {"expression": text}
        elif not isinstance(arguments, dict):
            raise BadRow(f"its arguments are no JSON object: {text[:60]}")
    if not isinstance(arguments, dict):
        raise BadRow(f"its arguments are no mapping: {str(arguments)[:60]}")
    if name == "python":
        arguments = {key: value for key, value in arguments.items() if value is not None}  # Arrow fills with None
        if list(arguments) != ["expression"] or not isinstance(arguments["expression"], str):
            raise BadRow(f"python takes one text, expression, not {', '.join(arguments) or 'nothing'}")
    return {**call, "type": "function", "function": {"name": name, "arguments": arguments}}


def _in_order(calls: list[dict], results: list[dict]) -> list[dict]:
    """The results in the order of their calls. Raises BadRow when one answers another call, or any of several."""
    kinds = (calls, "id"), (results, "tool_call_id")
    call_ids, answered = ([None if x.get(key) in (None, "") else str(x[key]) for x in ones] for ones, key in kinds)
    call_of = {n: call_ids.index(one) for n, one in enumerate(answered) if one and one in call_ids}  # of result n
    # The other results take the other calls in order; where both have an id, the ids differ.
    others = [n for n in range(len(results)) if n not in call_of]
    open_calls = [n for n in range(len(calls)) if n not in call_of.values()]
    differ = any(answered[n] and call_ids[m] for n, m in zip(others, open_calls))
    if differ or any(len(set(given)) < len(given) for given in (list(filter(None, i)) for i in (call_ids, answered))):
        raise BadRow(f"the results of {', '.join(map(str, answered))} do not answer {', '.join(map(str, call_ids))}")
    if len(others) > 1 and any(n != m for n, m in call_of.items()):  # the named ones changed places: so may these
        raise BadRow(f"{len(others)} results have no id, and the others are not in the order of their calls")
    call_of |= zip(others, open_calls)
    return [results[n] for n in sorted(call_of, key=call_of.get)]


def check(conversation: list[dict]) -> None:
    """Raises BadRow unless the messages are a conversation that the chat template renders and a model learns from.

    They must be normalized. A call is of python, and its result comes right after it, as when the model speaks.
    """
    if not isinstance(conversation, list) or not conversation or not all(isinstance(m, dict) for m in conversation):
        raise BadRow("no messages")
    if conversation[-1].get("role") != "assistant":
        raise BadRow(f"the last message is not the assistant's but of role {conversation[-1].get('role')!r}")
    expected = ("system", "user")
    for number, message in enumerate(conversation, 1):
        role, content, calls = message.get("role"), message.get("content"), message.get("tool_calls") or []
        if role == "assistant" and (key := next((key for key in WEIGHTS if message.get(key) not in (None, 1)), None)):
            raise BadRow(f"message {number} has the {key} {message[key]}, and all replies are learned alike")
        if lost := next((key for key in NOT_RENDERED if message.get(key)), None):
            raise BadRow(f"message {number} has {lost}, which would be left out: make it content or take it out")
        if role not in expected:
            raise BadRow(f"message {number} is of role {role!r}, expected {' or '.join(expected)}")
        kinds = [None]
        for part in content if isinstance(content, list) else []:
            if not isinstance(part, dict) or part.get("type") not in ("text", "python", "python_output"):
                raise BadRow(f"message {number} has an unknown part: {str(part)[:60]}")
            if not isinstance(part.get("text"), str) or (part["type"] == "python" and not part["text"].strip()):
                raise BadRow(f"message {number} has a part without text")
            kinds.append(part["type"])
        if role != "assistant" and (calls or {*kinds} - {None, "text"}):
            raise BadRow(f"message {number} has a tool call and is not the assistant's")
        if any((one == "python") != (two == "python_output") for one, two in pairwise([*kinds, None])):
            raise BadRow(f"message {number} has a call without its result, or a result without a call")
        if not isinstance(content, str | list) and not (content is None and calls):
            raise BadRow(f"message {number} has no text")
        if not (content.strip() if isinstance(content, str) else content) and not calls and role != "tool":
            raise BadRow(f"message {number} is empty")
        for call in _with_calls(message, number).get("tool_calls") or []:
            if (name := call["function"]["name"]) != "python":
                raise BadRow(f"message {number} calls {name}, and the model has one tool, python(expression)")
            if not call["function"]["arguments"]["expression"].strip():
                raise BadRow(f"message {number} calls python without an expression")
        if len(calls) > 1:
            raise BadRow(f"message {number} has {len(calls)} calls, and not one result for each")
        expected = {"system": ("user",), "assistant": ("tool",) if calls else ("user",)}.get(role, ("assistant",))
    if expected == ("tool",):
        raise BadRow("the last message has a call without its result")
