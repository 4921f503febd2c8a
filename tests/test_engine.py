"""The engine: streaming text, tools in the middle of completions, many requests over few slots, stopping early."""

import threading
import unicodedata
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from talker import QUESTIONS

from nanochat_hf.data.tokenizer import byte_alphabet, train_bpe
from nanochat_hf.errors import InputError
from nanochat_hf.serve import join_chunks
from nanochat_hf.serve.engine import MAX_CHUNK, Engine, IncrementalDetokenizer, PendingSteps, Request, token_table
from nanochat_hf.tool_loop import MARKS


@pytest.fixture
def engine(talker):
    return Engine(*talker, slots=4)


def user(question):
    return [{"role": "user", "content": question}]


def run(engine, *requests):
    for request in requests:
        engine.submit(request)
    while engine.busy:
        engine.advance()


@pytest.mark.parametrize("question", QUESTIONS)
def test_an_answer_streams_with_its_calls_and_the_real_results(engine, question):
    chunks = list(engine.stream(user(question)))
    kinds = {"python": "call", "python_output": "result", "text": "text"}
    assert join_chunks(chunks) == [(kinds[kind], text) for kind, text in QUESTIONS[question]]
    assert all("\ufffd" not in chunk for chunk in chunks) and len(chunks) > 3  # no chunk ends inside a character


@pytest.mark.parametrize("which", ["talker", "lively_model"])
def test_greedy_answers_equal_generate_of_transformers(request, tokenizer, which):
    model = request.getfixturevalue(which)
    model, tokenizer = model if which == "talker" else (model, tokenizer)
    engine = Engine(model, tokenizer, tool=None)
    prompts = [engine.encode(user(question)) for question in QUESTIONS]
    answers = engine.generate(prompts, max_new_tokens=40)
    stops = sorted(tokenizer.convert_tokens_to_ids(["<|bos|>", "<|assistant_end|>"]))
    assert sorted(engine.stop_ids) == stops
    for prompt, (answer,) in zip(prompts, answers):
        ids = torch.tensor([prompt])
        expected = model.generate(ids, max_new_tokens=40, do_sample=False, eos_token_id=stops, pad_token_id=0)
        assert answer == expected[0, len(prompt) :].tolist()


def test_slots_call_the_tool_each_for_itself(talker):
    model, tokenizer = talker
    calls = []
    engine = Engine(model, tokenizer, slots=4, tool=lambda text: calls.append(text) or str(eval(text)))
    questions = ["What is 12 * 34?", "Hello", "What is 5 + 6?"] * 2
    answers = engine.generate([engine.encode(user(question)) for question in questions], max_new_tokens=120)
    texts = [tokenizer.decode(answer, skip_special_tokens=True) for (answer,) in answers]
    assert sorted(calls) == ["12*34"] * 2 + ["5+6"] * 2
    assert texts == ["".join(part for _, part in QUESTIONS[question]) for question in questions]


def test_a_result_is_plain_text_of_a_bounded_length(talker, monkeypatch):
    monkeypatch.setattr("nanochat_hf.serve.engine.MAX_FORCED", 42)
    engine = Engine(*talker, tool=lambda text: "<|assistant_end|>77")
    assert dict(join_chunks(engine.stream(user("What is 5 + 6?"))))["result"] == "<|assistant_end|>77"
    engine.tool = lambda text: "x y " * 2000
    request = Request(engine.encode(user("What is 5 + 6?")), 100)
    run(engine, request)
    start, end = (request.tokens.index(mark) for mark in engine.marks[2:])
    assert end - start - 1 == 40


def test_a_tool_that_hangs_is_answered_with_an_error_and_one_that_fails_too(talker):
    release = threading.Event()
    engine = Engine(*talker, slots=2, tool=lambda text: release.wait(60) or "late", tool_timeout=0.1)
    requests = [Request(engine.encode(user("What is 12 * 34?")), 100) for _ in range(2)]  # both at once
    run(engine, *requests)
    release.set()
    for request in requests:
        chunks = join_chunks(IncrementalDetokenizer(engine.tokenizer).push(request.tokens))
        assert chunks[1] == ("result", "{'error': 'no result within 0.1 seconds'}")
    engine.tool = lambda text: {}[text]  # the pool of the tool that hung is not used again
    chunks = join_chunks(engine.stream(user("What is 12 * 34?"), max_new_tokens=100))
    assert chunks[1] == ("result", str({"error": "'12*34'"}))


def test_tools_can_be_switched_off_for_one_request_or_left_to_the_caller(engine):
    calls = []
    engine.tool = lambda expression: calls.append(expression) or "11"
    chunks = join_chunks(engine.stream(user("What is 5 + 6?"), tools=False))
    assert chunks[0] == ("call", "5+6") and calls == []  # the model still calls, without an answer
    request = Request(engine.encode(user("What is 5 + 6?")), stop_at_call=True)
    assert join_chunks(engine.stream_request(request)) == [("call", "5+6")] and calls == []
    assert request.finish_reason == "tool_calls" and request.tokens[-1] == engine.marks[1]


def test_the_end_of_a_call_does_not_end_an_answer_although_the_models_settings_say_so(talker, monkeypatch):
    model, tokenizer = talker
    ends = tokenizer.convert_tokens_to_ids(["<|assistant_end|>", "<|python_end|>"])
    monkeypatch.setattr(model.generation_config, "eos_token_id", ends)
    assert join_chunks(Engine(*talker).stream(user("What is 5 + 6?")))[-1] == ("text", "It is 11.")


def test_more_requests_than_slots_wait_and_give_the_same_answers(talker):
    engine = Engine(*talker, slots=2)
    requests = [Request(engine.encode(user(question)), 120) for question in list(QUESTIONS) * 2]
    run(engine, *requests)
    engine = Engine(*talker)
    alone = [engine.generate([r.prompt], max_new_tokens=120)[0][0] for r in requests[:4]]
    assert [request.tokens for request in requests] == alone * 2
    assert {request.finish_reason for request in requests} == {"stop"}


def test_steps_launched_ahead_and_read_late_give_the_same_answers(talker, monkeypatch):
    """The way of a GPU, on a CPU: chunks of steps, of which the host reads the one before the last."""
    event = SimpleNamespace(record=lambda: None, synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    engine = Engine(*talker, slots=2)
    engine.host_buffers += [torch.empty(MAX_CHUNK, 2, dtype=torch.int32) for _ in range(4)]
    decoder, step = engine.decoder, engine.decoder.step
    monkeypatch.setattr(decoder, "step", lambda slots, bound: step(slots, engine.length))
    prompts = [engine.encode(user(question)) for question in QUESTIONS]
    requests = [Request(prompt, limit) for prompt in prompts for limit in (120, 7, 12)]
    for request in requests:
        engine.submit(request)
    engine.advance()
    assert [len(steps.log) for steps in engine.pending] == [1]  # the first token comes quickly
    run(engine)
    alone = Engine(*talker)
    for request in requests:
        assert alone.generate([request.prompt], max_new_tokens=request.max_new_tokens) == [[request.tokens]]
    needed = sum(len(request.tokens) for request in requests)
    assert needed / 2 <= decoder.steps <= needed + 2 * MAX_CHUNK * len(requests)  # ahead of ends that are read late


def test_the_same_seed_gives_the_same_answer_in_any_company(talker):
    engine = Engine(*talker, slots=8)
    prompt = engine.encode(user("Hello"))
    options = dict(max_new_tokens=30, temperature=2.0, top_k=0)
    together = engine.generate([prompt], num_samples=6, seed=10, **options)[0]
    alone = Engine(*talker).generate([prompt], seed=13, **options)[0][0]
    assert engine.generate([prompt] * 2, seed=[13, 15], **options) == [together[3:4], together[5:6]]
    assert together[3] == alone and len({tuple(answer) for answer in together}) > 3


def test_a_request_may_come_while_ended_ones_are_taken_out(engine):
    """Another thread submits; here reading whether one has ended does."""

    class Late(Request):
        cancelled = property(lambda self: bool(engine.submit(Request([1], 1))) and False, lambda self, value: None)

    engine.submit(Late([1], 1))
    assert engine.drop_cancelled() == [] and len(engine.waiting) == 2


def test_an_answer_that_is_cut_inside_a_character_ends_with_its_replacement(engine):
    ids = engine.generate([engine.encode(user("Hello"))], max_new_tokens=9)[0][0]
    for size in range(1, 9):
        assert "".join(engine.stream(user("Hello"), max_new_tokens=size)) == engine.tokenizer.decode(ids[:size])


def test_closing_the_stream_frees_the_slot(engine):
    stream = engine.stream(user("Hello"))
    first = next(stream)
    stream.close()
    assert first and not engine.busy
    assert join_chunks(engine.stream(user("What is 5 + 6?")))[0] == ("call", "5+6")


def test_a_request_can_be_cancelled_while_it_waits_and_while_it_runs(talker):
    engine = Engine(*talker, slots=1)
    running, waiting = (engine.submit(Request(engine.encode(user("Hello")), 100)) for _ in range(2))
    engine.advance()
    running.cancelled = waiting.cancelled = True
    assert engine.advance()[:2] == [(running, []), (waiting, [])] and not engine.busy
    assert (running.finish_reason, waiting.finish_reason, waiting.tokens) == ("cancelled", "cancelled", [])
    engine.pending.append(PendingSteps(torch.tensor([[7]]), [running], None))  # what it said meanwhile
    assert engine.collect_outputs() == []
    release = threading.Event()
    engine.tool = lambda text: release.wait(5) and text
    calling = engine.submit(Request(engine.encode(user("What is 5 + 6?")), 100))
    while not engine.calls:
        engine.advance()
    calling.cancelled = True
    engine.advance()
    release.set()
    assert join_chunks(engine.stream(user("What is 5 + 6?")))[0] == ("call", "5+6") and not engine.busy


@pytest.mark.parametrize("size,limit,tokens", [(60, 100, 4), (60, 3, 3), (60, 4, 4), (63, 100, 1), (5, 7, 7)])
def test_an_answer_ends_at_its_budget_or_where_the_context_does(talker, size, limit, tokens):
    engine = Engine(*talker, length=64, tool=None, stop_ids=[])
    request = engine.submit(Request([5] * size, max_new_tokens=limit))
    for _ in range(20):
        engine.advance()
    assert (request.finish_reason, len(request.tokens), engine.busy) == ("length", tokens, False)


@pytest.mark.parametrize(
    "prompt,message",
    [([], "empty"), ([1] * 256, "256 tokens.*context is 256"), ([-1], "outside"), ([512], "outside of 0..511")],
)
def test_prompts_that_cannot_work_are_refused(engine, prompt, message):
    with pytest.raises(InputError, match=message):
        engine.submit(Request(prompt))
    assert not engine.busy


@pytest.mark.parametrize("system", [[], [{"role": "system", "content": "be brief"}]])
def test_long_conversations_lose_their_oldest_turns_but_not_the_system_message(engine, monkeypatch, system):
    lengths, render = [], engine.render
    monkeypatch.setattr(engine, "render", lambda messages: lengths.append(len(messages)) or render(messages))
    turns = [{"role": role, "content": f"turn {i}"} for i in range(800) for role in ("user", "assistant")]
    turns.append({"role": "user", "content": "last"})
    ids, dropped = engine.encode_last(system + turns, room=60)
    assert len(lengths) < 12 and max(lengths) <= 128  # never as a whole
    assert ids == engine.encode(system + turns[dropped:]) and turns[dropped]["role"] == "user"
    longer = engine.encode(system + turns[dropped - 2 :])  # with the turn before, which would not have fit
    assert len(longer) + 60 > engine.length >= len(ids) + 60
    assert engine.encode_last(system + turns, room=engine.length - len(longer)) == (longer, dropped - 2)  # just fits
    assert engine.encode_last(system + turns, room=1000) == (engine.encode([*system, turns[-1]]), len(turns) - 1)
    assert engine.encode_last(system + turns[:2] + turns[-1:], room=9)[1] == 0


def test_a_text_far_too_long_is_refused_before_it_is_encoded(engine):
    longest = max(map(len, engine.tokenizer.get_vocab()))
    assert engine.max_chars == engine.length * longest
    assert engine.encode_text("x" * engine.max_chars)
    with pytest.raises(InputError, match=f"has {engine.max_chars + 1} characters.* of 256 tokens"):
        engine.encode_text("x" * (engine.max_chars + 1))
    word = " " + "\u1f82" * 8  # NFC makes one letter of four characters
    composing = Engine(engine.model, train_bpe([word] * 99, 300, normalization="nfc"), length=16)
    assert len(composing.encode_text(unicodedata.normalize("NFD", word) * 15)) == 15
    history = [{"role": "user", "content": "x" * 10**6}, {"role": "assistant", "content": "?"}, *user("Hello")]
    assert engine.encode_last(history, 60) == (engine.encode(user("Hello")), 2)


def test_the_detokenizer_replaces_bad_bytes_and_waits_for_whole_characters(talker):
    _, tokenizer = talker
    letter = dict(enumerate(tokenizer.convert_tokens_to_ids(byte_alphabet())))
    detokenizer = IncrementalDetokenizer(tokenizer)
    euro = [letter[byte] for byte in "€".encode()]
    assert detokenizer.push(euro[:2]) == [] and detokenizer.push(euro[2:]) == ["€"]
    assert "".join(detokenizer.push([letter[0xFF], letter[ord("a")]])) == "\ufffda"
    assert detokenizer.push(euro[:1]) == [] and detokenizer.push([], last=True) == ["\ufffd"]
    chunks = detokenizer.push([*euro[:1], *tokenizer.convert_tokens_to_ids(["<|python_start|>", "1"])])
    assert [(chunk, chunk.kind) for chunk in chunks] == [("\ufffd", "text"), ("1", "call")]
    assert detokenizer.push([len(tokenizer) + 5]) == []  # a padding row of the head


def test_text_held_back_for_a_stop_string_comes_before_the_call_that_follows_it(tokenizer):
    text = "a b<|python_start|>1+1 bc<|python_end|>c bcxyd"
    for end in ([], tokenizer.encode("<|python_start|>2", add_special_tokens=False)):  # nothing comes after the stop
        detokenizer = IncrementalDetokenizer(tokenizer, ["bc", "xy", ""])
        ids = [*tokenizer.encode(text, add_special_tokens=False), *end]
        chunks = [chunk for token in ids for chunk in detokenizer.push([token])] + detokenizer.push([], last=True)
        assert join_chunks(chunks) == [("text", "a b"), ("call", "1+1 bc"), ("text", "c ")] and detokenizer.stopped
    first = IncrementalDetokenizer(tokenizer, stop=["d", "b"])  # whichever comes first in the text
    assert first.push(tokenizer.encode("a b c d", add_special_tokens=False), last=True) == ["a "]


def test_the_token_table_is_what_the_tokenizer_says(talker):
    _, tokenizer = talker
    table = token_table(tokenizer)
    assert set(table) == set(range(len(tokenizer))) and token_table(tokenizer) is table
    specials = {token for token, value in table.items() if isinstance(value, str)}
    assert specials == set(tokenizer.all_special_ids)
    assert all(table[i].decode(errors="replace") == tokenizer.decode([i]) for i in set(table) - specials)
    kinds = [table[token] for token in tokenizer.convert_tokens_to_ids(list(MARKS))]
    assert kinds == ["call", "text", "result", "text"] and table[tokenizer.bos_token_id] == ""


def test_a_prompt_has_its_special_tokens_also_after_text_was_encoded_without(tiny_folder):
    engine, chat = Engine.from_pretrained(tiny_folder, device="cpu"), [{"role": "user", "content": "What is 2 + 3?"}]
    before = engine.encode(chat)
    engine.tokenizer.encode("5", add_special_tokens=False, split_special_tokens=True)  # as the tool loop does
    assert engine.encode(chat) == before and before[0] == engine.tokenizer.bos_token_id


def test_every_batch_size_is_warmed_up_before_a_first_answer():
    calls = []
    decoder = SimpleNamespace(slots=6, fast=True, capture=calls.append, sync_weights=lambda: calls.append("weights"))
    engine = SimpleNamespace(decoder=decoder, generate=lambda *words, **options: calls.append((words, options)))
    Engine.warm_up(engine)
    Engine.sync_weights(engine)
    assert calls == [1, 2, 4, 6, (([[0, 0]],), {"max_new_tokens": 1}), "weights"]


@pytest.mark.parametrize("launched", [True, False])
def test_only_an_engine_with_nothing_else_to_do_waits_for_tools(monkeypatch, launched):
    monkeypatch.setattr("concurrent.futures.wait", wait := Mock())
    engine = Mock(pending=[], calls={0: ("call", None)}, enqueue_steps=lambda: launched)
    assert Engine.advance(engine) == engine.drop_cancelled()
    assert wait.call_count == (not launched)
