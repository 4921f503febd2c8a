"""The engine: streaming text, tools in the middle of answers, many requests over few rows, stopping early."""

import threading
import time

import pytest
import torch
from talker import QUESTIONS, talker  # noqa: F401

from nanochat_hf.data.bpe import byte_alphabet
from nanochat_hf.errors import InputError
from nanochat_hf.serve.engine import Engine, IncrementalDetokenizer, Request, last_call, token_table
from nanochat_hf.tool_loop import MARKS


@pytest.fixture
def engine(talker):  # noqa: F811
    return Engine(*talker, slots=4)


def ask(question):
    return [{"role": "user", "content": question}]


def kinds(pieces):
    """Pieces joined by kind, in order: [("call", "12*34"), ...]."""
    joined = []
    for piece in pieces:
        if joined and joined[-1][0] == piece.kind:
            joined[-1] = (piece.kind, joined[-1][1] + piece)
        else:
            joined.append((piece.kind, str(piece)))
    return joined


@pytest.mark.parametrize("question", QUESTIONS)
def test_an_answer_streams_with_its_calls_and_the_tools_real_results(engine, question):
    wanted = {"python": "call", "python_output": "result", "text": "text"}
    expected = [(wanted[kind], text) for kind, text in QUESTIONS[question]]
    assert kinds(engine.stream(ask(question))) == expected


def test_characters_of_several_tokens_are_never_split(engine):
    pieces = list(engine.stream(ask("Hello")))
    assert all("\ufffd" not in piece for piece in pieces)
    assert "".join(pieces).startswith("안녕하세요!") and "🙂" in "".join(pieces) and len(pieces) > 20


def test_greedy_answers_equal_generate_of_transformers(talker):  # noqa: F811
    model, tokenizer = talker
    engine = Engine(model, tokenizer, tool=None)
    prompts = [engine.encode(ask(question)) for question in QUESTIONS]
    answers = engine.generate(prompts, max_new_tokens=90)
    for prompt, (answer,) in zip(prompts, answers):
        ids = torch.tensor([prompt])
        stops = sorted(engine.stop_ids)
        expected = model.generate(ids, max_new_tokens=90, do_sample=False, eos_token_id=stops, pad_token_id=0)
        assert answer == expected[0, len(prompt) :].tolist()


def test_rows_call_the_tool_each_for_itself(talker):  # noqa: F811
    model, tokenizer = talker
    seen = []
    engine = Engine(model, tokenizer, slots=4, tool=lambda text: (seen.append(text), str(eval(text)))[1])
    questions = ["What is 12 * 34?", "Hello", "What is 5 + 6?"] * 2
    answers = engine.generate([engine.encode(ask(question)) for question in questions], max_new_tokens=120)
    texts = [tokenizer.decode(answer, skip_special_tokens=True) for (answer,) in answers]
    assert sorted(seen) == ["12*34"] * 2 + ["5+6"] * 2
    for question, text in zip(questions, texts):
        assert text == "".join(part for _, part in QUESTIONS[question])


def test_a_wrong_result_of_the_tool_is_what_the_model_goes_on_with(talker):  # noqa: F811
    engine = Engine(*talker, tool=lambda text: "<|assistant_end|>77")
    found = dict(kinds(engine.stream(ask("What is 5 + 6?"))))
    assert found["result"] == "<|assistant_end|>77"  # as plain characters: it neither stops nor vanishes


def test_a_tool_that_hangs_is_answered_with_an_error_and_others_go_on(talker):  # noqa: F811
    release = threading.Event()
    engine = Engine(*talker, slots=2, tool=lambda text: release.wait(20) or "late", tool_timeout=0.2)
    start = time.monotonic()
    found = kinds(engine.stream(ask("What is 12 * 34?"), max_new_tokens=100))
    release.set()
    assert found[1] == ("result", "{'error': 'no result within 0.2 seconds'}") and time.monotonic() - start < 10


def test_tools_can_be_switched_off_for_one_request(engine):
    found = kinds(engine.stream(ask("What is 5 + 6?"), tools=False))
    assert found[0] == ("call", "5+6")  # the model still asks, nobody answers


def test_more_requests_than_rows_wait_their_turn_and_give_the_same_answers(talker):  # noqa: F811
    model, tokenizer = talker
    engine = Engine(model, tokenizer, slots=2)
    prompts = [engine.encode(ask(question)) for question in list(QUESTIONS) * 2]
    requests = [engine.submit(Request(prompt, 120)) for prompt in prompts]
    while engine.busy:
        engine.advance()
    alone = [Engine(model, tokenizer).generate([prompt], max_new_tokens=120)[0][0] for prompt in prompts[:4]]
    assert [request.tokens for request in requests] == alone * 2
    assert {request.finish_reason for request in requests} == {"stop"}


def test_the_same_seed_gives_the_same_answer_in_any_company(talker):  # noqa: F811
    engine = Engine(*talker, slots=8)
    prompt = engine.encode(ask("Hello"))
    options = dict(max_new_tokens=30, temperature=2.0, top_k=0)
    together = engine.generate([prompt], num_samples=6, seed=10, **options)[0]
    alone = Engine(*talker).generate([prompt], seed=13, **options)[0][0]
    assert engine.generate([prompt] * 2, seed=[13, 15], **options) == [together[3:4], together[5:6]]
    assert together[3] == alone and len({tuple(answer) for answer in together}) > 3


def test_closing_the_stream_frees_the_row(engine):
    stream = engine.stream(ask("Hello"))
    first = next(stream)
    stream.close()
    assert first and not engine.busy
    assert kinds(engine.stream(ask("What is 5 + 6?")))[0] == ("call", "5+6")


def test_a_request_can_be_cancelled_while_it_waits_and_while_it_runs(talker):  # noqa: F811
    engine = Engine(*talker, slots=1)
    running, waiting = (engine.submit(Request(engine.encode(ask("Hello")), 100)) for _ in range(2))
    engine.advance()
    running.cancelled = waiting.cancelled = True
    while engine.busy:
        engine.advance()
    assert (running.finish_reason, waiting.finish_reason, waiting.tokens) == ("cancelled", "cancelled", [])


def test_a_budget_ends_an_answer(engine):
    request = Request(engine.encode(ask("Hello")), max_new_tokens=7)
    list(engine.stream_request(request))
    assert (request.finish_reason, len(request.tokens)) == ("length", 7)


def test_an_answer_ends_where_the_context_does(talker):  # noqa: F811
    engine = Engine(*talker, length=64, tool=None, stop_ids=[])
    request = engine.submit(Request([5] * 60, max_new_tokens=100))
    for _ in range(20):
        engine.advance()
    assert (request.finish_reason, len(request.tokens), engine.busy) == ("length", 4, False)


@pytest.mark.parametrize(
    "tokens,call",
    [
        ("S1E", "1"),
        ("xS12E", "12"),
        ("S1S2E", "2"),
        ("SE", ""),
        ("S1EE", None),
        ("S1Ex2E", None),
        ("E", None),
        ("1E", None),
    ],
)
def test_a_call_is_what_is_between_a_start_and_the_next_end(tokens, call):
    assert last_call(list(tokens), "S", "E") == (None if call is None else list(call))


@pytest.mark.parametrize("prompt,message", [([], "empty"), ([1] * 256, "256 tokens.*context is 256")])
def test_prompts_that_cannot_work_are_refused(engine, prompt, message):
    with pytest.raises(InputError, match=message):
        engine.submit(Request(prompt))


def test_messages_that_are_no_chat_are_refused(engine):
    with pytest.raises(InputError, match="no chat"):
        engine.encode([{"role": "robot", "content": "hi"}])


def test_long_conversations_lose_their_oldest_turns_but_not_the_system_message(engine):
    turns = [{"role": role, "content": f"turn {i} " * 6} for i in range(12) for role in ("user", "assistant")]
    messages = [{"role": "system", "content": "be brief"}, *turns, {"role": "user", "content": "last"}]
    kept = engine.truncate(messages, room=60)
    assert kept[0]["role"] == "system" and kept[1]["role"] == "user" and kept[-1] == messages[-1]
    assert len(engine.encode(kept)) + 60 <= engine.length and 2 < len(kept) < len(messages)


def test_dropping_turns_of_a_very_long_conversation_reads_it_few_times(engine, monkeypatch):
    lengths, encode = [], engine.encode
    monkeypatch.setattr(engine, "encode", lambda messages: lengths.append(len(messages)) or encode(messages))
    turns = [{"role": role, "content": f"turn {i}"} for i in range(200) for role in ("user", "assistant")]
    kept = engine.truncate([*turns, {"role": "user", "content": "last"}], room=60)
    assert len(lengths) < 12 and kept[-1]["content"] == "last"
    one_more = turns[-len(kept) - 1 :] + kept[-1:]  # the turn before what was kept would not have fit
    assert len(encode(one_more)) + 60 > engine.length >= len(encode(kept)) + 60


def test_text_decoder_gives_bad_bytes_as_replacement_characters_and_keeps_going(talker):  # noqa: F811
    _, tokenizer = talker
    letter = dict(enumerate(tokenizer.convert_tokens_to_ids(byte_alphabet())))
    decoder = IncrementalDetokenizer(tokenizer)
    euro = [letter[byte] for byte in "€".encode()]
    assert decoder.push(euro[:2]) == [] and decoder.push(euro[2:]) == ["€"]
    assert "".join(decoder.push([letter[0xFF], letter[ord("a")]])) == "\ufffda"
    assert decoder.push(euro[:1]) == [] and decoder.push([], last=True) == ["\ufffd"]


def test_the_table_of_token_table_is_what_the_tokenizer_says(talker):  # noqa: F811
    _, tokenizer = talker
    table = token_table(tokenizer)
    assert set(table) == set(range(len(tokenizer))) and token_table(tokenizer) is table
    specials = {token for token, meaning in table.items() if isinstance(meaning, str)}
    assert specials == set(tokenizer.all_special_ids)
    for token in set(table) - specials:
        assert table[token].decode(errors="replace") == tokenizer.decode([token])
    kinds = [table[token] for token in tokenizer.convert_tokens_to_ids(list(MARKS))]
    assert kinds == ["call", "text", "result", "text"] and table[tokenizer.bos_token_id] == ""
    assert IncrementalDetokenizer(tokenizer).push([len(tokenizer) + 5]) == []  # a padding row of the head


def test_a_cancelled_request_is_among_what_comes_out(talker):  # noqa: F811
    engine = Engine(*talker, slots=1)
    running, waiting = (engine.submit(Request(engine.encode(ask("Hello")), 100)) for _ in range(2))
    engine.advance()
    running.cancelled = waiting.cancelled = True
    assert engine.advance()[:2] == [(running, []), (waiting, [])]
