"""The server with the clients that people use: huggingface_hub's InferenceClient, the openai package, plain HTTP."""

import asyncio
import json
import re
import socket
import threading
import time
from contextlib import nullcontext
from unittest.mock import MagicMock

import httpx
import openai
import pytest
import torch
import uvicorn
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError
from pydantic import ValidationError
from talker import QUESTIONS

from nanochat_hf.errors import InputError
from nanochat_hf.serve.engine import Engine
from nanochat_hf.serve.limits import LimitedProtocol
from nanochat_hf.serve.server import UNSUPPORTED, ChatBody, CompletionBody, Server, TGIParameters, parse
from nanochat_hf.serve.terminal_chat import Options, RemoteModel, messages_of, reach_offline
from nanochat_hf.serve.worker import Completion, Worker

HELLO = QUESTIONS["Hello"][0][1]
PYTHON = [{"type": "function", "function": {"name": "python", "parameters": {}}}]
CHAT = "/v1/chat/completions"
RANDOM = {"temperature": 3.0, "top_k": 0, "seed": 1}


@pytest.fixture(scope="module")
def server(talker):
    """The server with the talker in greedy mode: `server.url`, `.http` (a client), `.post(route, **body)`."""
    worker = Worker(lambda: Engine(*talker, slots=4), max_queue_size=4)
    worker.start()
    server = Server([worker], "tests/talker", temperature=0.0, max_new_tokens=150)
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    server.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.http = httpx.Client(base_url=server.url, timeout=60)
    server.post = lambda route, **body: server.http.post(route, content=json.dumps(body))  # httpx refuses some values
    runner = uvicorn.Server(uvicorn.Config(server.app, log_level="critical", http=LimitedProtocol, ws="none"))
    thread = threading.Thread(target=runner.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    until(lambda: runner.started)
    yield server
    server.http.close()
    runner.should_exit = True
    thread.join(10)
    assert not worker.is_alive()  # a clean shutdown ends the model's thread


@pytest.fixture
def hf(server):
    reach_offline(server.url)
    return InferenceClient(base_url=server.url, timeout=60)


@pytest.fixture(scope="module")
def ai(server):
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)


@pytest.fixture
def prompt(server):
    return server.tokenizer.apply_chat_template(user("Hello"), add_generation_prompt=True, tokenize=False)


def user(text):
    return [{"role": "user", "content": text}]


def texts(chunks):
    return "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


# ---- huggingface_hub and the terminal ------------------------------------------------------------------------------


def test_inference_client_chats_and_streams_with_the_tool(hf, server):
    answer = hf.chat_completion(user("Hello"), max_tokens=120)
    assert answer.choices[0].message.content == HELLO and answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens > 20 and answer.model == "tests/talker"
    chunks = list(hf.chat_completion(user("What is 12 * 34?"), stream=True))
    tools = [chunk.choices[0].delta["tool"] for chunk in chunks if "tool" in chunk.choices[0].delta]
    steps = ["".join(tool.get(kind, "") for tool in tools) for kind in ("call", "result")]
    assert (texts(chunks), steps) == ("It is 408.", ["12*34", "408"])
    assert chunks[-1].choices[0].finish_reason == "stop" and len(chunks) > 5
    chunks = RemoteModel(server.url).answer(user("What is 5 + 6?"), Options(temperature=0.0, max_new_tokens=100))
    call, result, text = messages_of(list(chunks))
    assert call["tool_calls"][0]["function"]["arguments"] == {"expression": "5+6"}
    assert (result["content"], text["content"]) == ("11", "It is 11.")


def test_inference_client_generates_text_plain_detailed_and_streamed(hf, prompt):
    detailed = hf.text_generation(prompt, max_new_tokens=120, details=True)
    assert detailed.generated_text == HELLO and detailed.details.finish_reason == "eos_token"
    assert "".join(token.text for token in detailed.details.tokens) == HELLO
    assert detailed.details.tokens[-1].special and detailed.details.generated_tokens == len(detailed.details.tokens)
    assert "".join(hf.text_generation(prompt, max_new_tokens=120, stream=True)) == HELLO
    events = list(hf.text_generation(prompt, max_new_tokens=9, stream=True, details=True))
    assert [event.index for event in events] == list(range(1, 10)) and events[-1].details.finish_reason == "length"
    assert events[-1].generated_text == "".join(event.token.text for event in events)
    stopped = hf.text_generation(prompt, max_new_tokens=120, stop=["small"], details=True)
    assert stopped.generated_text.endswith("**") and stopped.details.finish_reason == "stop_sequence"
    assert hf.text_generation(prompt, max_new_tokens=3, return_full_text=True).startswith(prompt)


def test_an_answer_sent_back_as_it_came_keeps_its_calls(ai, server):
    answer = ai.chat.completions.create(model="any", messages=user("What is 12 * 34?"))
    message = answer.choices[0].message
    assert message.content == "It is 408."
    assert message.model_extra["tool_steps"] == [{"call": "12*34", "result": "408"}]
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    messages = [*user("What is 12 * 34?"), message.model_dump(exclude_none=True), *user("Hello")]
    usage = ai.chat.completions.create(model="any", messages=messages, max_tokens=1).usage
    marks = "<|assistant_start|><|python_start|>12*34<|python_end|><|output_start|>408<|output_end|>It is 408."
    text = server.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert marks in text and usage.prompt_tokens == len(server.tokenizer.encode(text, add_special_tokens=False))


@pytest.mark.parametrize("streamed", [False, True])
def test_openai_clients_may_run_the_tool_themselves(ai, streamed):
    messages = user("What is 5 + 6?")
    reply = ai.chat.completions.create(model="any", messages=messages, tools=PYTHON, stream=streamed)
    if streamed:
        chunks = list(reply)
        reason, (call,) = chunks[-1].choices[0].finish_reason, chunks[-2].choices[0].delta.tool_calls
    else:
        reason, (call,) = reply.choices[0].finish_reason, reply.choices[0].message.tool_calls
        assert reply.choices[0].message.content is None  # as OpenAI has it beside calls
    assert reason == "tool_calls" and json.loads(call.function.arguments) == {"expression": "5+6"}
    called = {"id": call.id, "type": "function", "function": call.function.model_dump()}
    messages += [{"role": "assistant", "content": None, "tool_calls": [called]}]
    messages += [{"role": "tool", "tool_call_id": call.id, "content": "11"}]
    final = ai.chat.completions.create(model="any", messages=messages, tools=PYTHON)
    assert final.choices[0].message.content == "It is 11."


def test_openai_streams_completes_texts_and_lists_the_model(ai, server, prompt):
    """Several prompts at once: as LangChain's `OpenAI(...).generate([...])` sends them."""
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(ai.chat.completions.create(model="any", messages=user("Hello"), **options))
    assert texts(chunks) == HELLO
    assert chunks[-1].usage.completion_tokens > 20 and chunks[-2].choices[0].finish_reason == "stop"
    chunks = list(ai.completions.create(model="any", prompt=prompt, max_tokens=120, stream=True))
    assert "".join(c.choices[0].text for c in chunks) == HELLO and chunks[-1].choices[0].finish_reason == "stop"
    assert [model.id for model in ai.models.list()] == [ai.models.retrieve("tests/talker").id] == ["tests/talker"]
    with pytest.raises(openai.NotFoundError, match="no model gpt-4; this server has tests/talker"):
        ai.models.retrieve("gpt-4")
    ids = server.tokenizer.encode("Hello", add_special_tokens=False)
    alone = ai.completions.create(model="any", prompt="Hello", max_tokens=20)
    assert alone.usage.prompt_tokens == 1 + len(ids)  # and bos
    answer = ai.completions.create(model="any", prompt=[prompt, "Hello"], n=2, max_tokens=20)
    first = [choice.text for choice in answer.choices[:2]]
    assert first[0] == first[1] and HELLO.startswith(first[0]) and [c.index for c in answer.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in answer.choices[2:]] == [alone.choices[0].text] * 2
    size = len(server.tokenizer.encode(prompt, add_special_tokens=False))  # has its bos already
    assert answer.usage.prompt_tokens == size + 1 + len(ids)  # each counts once
    two = ai.completions.create(model="any", prompt=[ids, ids], max_tokens=1)
    assert len(two.choices) == two.usage.completion_tokens == 2


def test_openai_gets_several_samples_of_one_prompt_and_the_same_with_the_same_seed(ai):
    options = {"n": 3, "temperature": 2.0, "seed": 5, "max_tokens": 12, "extra_body": {"top_k": 0}}
    answers = [ai.chat.completions.create(model="any", messages=user("Hello"), **options) for _ in range(2)]
    first, second = ([choice.message.content for choice in answer.choices] for answer in answers)
    assert len(set(first)) == 3 and second == first


# ---- bodies that are refused ---------------------------------------------------------------------------------------


def calling(arguments):
    call = {"id": "a", "type": "function", "function": {"name": "python", "arguments": arguments}}
    return [*user("?"), {"role": "assistant", "content": None, "tool_calls": [call]}]


def schema(name, *arguments):
    """The tool `name` as LangChain writes it, each of its arguments required."""
    parameters = {"type": "object", "properties": {x: {"type": "string"} for x in arguments}, "required": arguments}
    return [{"type": "function", "function": {"name": name, "strict": True, "parameters": parameters}}]


HALF = "x\ud83d"
TOOLS = ([1], [{"function": {"name": 1}}], PYTHON + schema("search", "query"), schema("python", "expression", "n"))
BAD_CHATS = [  # messages, other fields, the reason
    (calling('{"code": "1"}'), {}, "expression, not code"),
    ([{"role": "r" * 10**6, "content": "?"}], {}, "unknown role rrr"),
    (user([{"type": HALF}]), {}, "not a part of type x?"),
    (user("?") * 4097, {}, "messages: List should have at most 4096"),
    (user("a" * 1_040_000), {}, "characters, more than the model's context of 256 tokens"),
    (user("?"), {"top_k": 10**12}, "top_k"),
    *((user("?"), {key: True}, key) for key in ("temperature", "max_tokens", "n", "seed")),
    *((user("?"), {key: float("nan")}, key) for key in ("temperature", "top_p")),
    (user("?"), {"stream": True, "n": 2}, "leave n out"),
    (user("?"), {"response_format": {"type": "json_object"}}, "response_format is not supported"),
    *((user("?"), {key: 0.5}, f"{key} is not supported: l") for key in ("frequency_penalty", "temprature", "store")),
    *((user("?"), {"tools": PYTHON, "tool_choice": c}, "tool_choice") for c in ("required", {"type": "function"})),
    *((user("?"), {"tools": tools}, "tool") for tools in TOOLS),
    *(
        (user("?"), {key: value}, key)
        for key in ("model", "parallel_tool_calls", "stream_options")
        for value in ([], 3)
    ),
    (user("?"), {"stream_options": {"x": True}}, "stream_options.x: Extra inputs are not permitted"),
    (user("?"), {"stream_options": {"include_usage": "x"}}, "stream_options.include_usage: Input should be a valid b"),
    *(([{"role": x, "content": None}], {}, f"role {x} needs content") for x in ("user", "system", "assistant")),
    (user("?"), {"stop": ["x"] * 17}, "stop: List should have at most 16"),
    *((user("?"), {"x": [value] * 250_000}, "more than 40000 lists") for value in ([], 1)),
    (user("?"), {f"k{number}": 1 for number in range(50_000)}, "more than 40000 lists, objects and keys"),
]
BAD_PROMPTS = [
    ("word " * 300, {}, "context is 256"), ([1, 99999], {}, "outside of 0.."),
    (["a"] * 3, {"n": 3}, "9 completions in one request: this server takes at most 8"),
    ([1, 2, "a"], {}, "prompt.0.2: Input should be a valid integer"), ("a", {"echo": True}, "echo is not supported"),
    ("a", {"logprobs": 0}, "logprobs is not supported"),
]  # fmt: skip
WRONG = [
    *((CHAT, {"messages": messages, **more}, reason) for messages, more, reason in BAD_CHATS),
    *(("/v1/completions", {"prompt": prompt, **more}, reason) for prompt, more, reason in BAD_PROMPTS),
    ("/generate", {"inputs": "?", "stream": 1}, "stream"),
    ("/generate", {"inputs": "?", "parameters": {"do_sample": True, "temperature": 0}}, "temperature: Input should"),
    *(("/generate", {"inputs": "?", "parameters": {key: 9}}, f"{key} is not s") for key in ("typical_p", "max_tokns")),
    *((path, {}, f"no route {path}; those of OpenAI are /v1/chat") for path in ("/chat/completions", "/v1/responses")),
]


@pytest.mark.parametrize("route,body,reason", WRONG)
def test_a_wrong_body_gets_one_reason_in_the_words_of_its_protocol(server, route, body, reason):
    reply = server.post(route, **body)
    error = reply.json()["error"]
    if route == "/generate":
        assert reply.status_code == 422 and reason in error and reply.json()["error_type"] == "validation"
    else:
        assert reply.status_code == (404 if "no route" in reason else 400)
        assert reason in error["message"] and len(error["message"]) < 1000


@pytest.mark.parametrize(
    "part",
    [
        {"messages": [{"role": 3, "content": 5, "tool_steps": [{}]}] * 4000},
        {"messages": [{"role": "user", "content": [1] * 1000}]},
        {"messages": user("?"), "tools": [{}] * 100},
        {"messages": user("?"), "stop": [1] * 1000},
    ],
)
def test_the_first_wrong_part_ends_the_reading_of_a_body_since_errors_are_made_in_the_event_loop(part):
    with pytest.raises(ValidationError) as error:
        parse(ChatBody, json.dumps(part).encode())
    assert error.value.error_count() < 10


def test_bodies_too_large_broken_or_sent_elsewhere_are_refused(server):
    big = httpx.post(server.url + CHAT, content=b"x" * (1 << 21))
    assert big.status_code == 413 and "1048576 bytes" in big.text
    two = {"Transfer-Encoding": "chunked", "Content-Length": "2"}  # the first one counts
    both = httpx.post(server.url + CHAT, content=iter([b"x" * (1 << 21)]), headers=two)
    assert both.status_code == 413
    for content in (b"{", b"[]", b'{"messages": "\\ud83d' + b"[" * 2000):
        broken = server.http.post(CHAT, content=content)
        assert broken.status_code == 400 and broken.json()["error"]["type"] == "validation"
    for reply in (server.http.get(CHAT), server.post("/v1/embeddings"), server.http.get("/metrics")):
        assert reply.status_code in (404, 405) and reply.json()["error"]["message"]


def test_tgi_routes_answer_as_documented(server, monkeypatch):
    body = {"inputs": "Hello", "parameters": {"max_new_tokens": 5}}
    assert set(server.post("/generate", **body).json()) == {"generated_text"}
    assert isinstance(server.post("/", **body).json(), list)
    lines = server.post("/generate_stream", **body).text.strip().split("\n\n")
    assert len(lines) == 5 and json.loads(lines[-1].removeprefix("data: "))["details"]["generated_tokens"] == 5
    assert server.post("/", **body, stream=True).text.strip().split("\n\n") == lines
    for parameters, seed in (({}, None), ({"do_sample": True}, 3)):
        parameters |= {"truncate": 2, "details": True, "seed": 3, "temperature": None, "top_k": 0}
        details = server.post("/generate", inputs="xy" * 20, parameters=parameters).json()["details"]
        assert (details["input_length"], details["seed"]) == (2, seed) and details["generated_tokens"] <= 20
    info = server.http.get("/info").json()
    names = ("max_total_tokens", "max_input_tokens", "num_replicas", "max_batch_size", "max_concurrent_requests")
    assert info["model_id"] == "tests/talker" and [info[name] for name in names] == [256, 255, 1, 4, 8]
    requests, submit = [], server.engine.submit  # it samples among all tokens, and greedily unless asked to sample
    monkeypatch.setattr(server.engine, "submit", lambda request: requests.append(request) or submit(request))
    for parameters in ({}, {"do_sample": True}, {"do_sample": True, "top_k": 7, "top_p": 0.5}):
        server.post("/generate", inputs="Hello", parameters={**parameters, "max_new_tokens": 1})
    taken = [(request.temperature, request.top_k, request.top_p) for request in requests]
    assert taken == [(0.0, 0, 1.0), (1.0, 0, 1.0), (1.0, 7, 0.5)]
    server.post("/generate", inputs="How are you?", parameters={"truncate": 2})
    assert requests[-1].prompt == server.engine.encode_text("How are you?")[-2:] and requests[-1].max_new_tokens == 20
    limits, name = [], "nanochat_hf.serve.server.Completion"
    monkeypatch.setattr(name, lambda *of: limits.append(of[3]) or Completion(*of))
    server.post(CHAT, messages=user("Hello"), max_tokens=1)
    assert (requests[-1].temperature, requests[-1].top_k, limits) == (0.0, 50, [120.0])  # the server's
    two = asyncio.run(Server(server.workers * 2, "x").info())
    assert (two["num_replicas"], two["max_concurrent_requests"]) == (2, 16)


@pytest.mark.parametrize("text,read", [(HALF, "x?"), ("🙂\ud83d\ud83d🙂", "🙂??🙂"), ("\\ud83d", "\\ud83d")])
def test_half_of_a_surrogate_pair_is_a_question_mark(server, text, read):
    chat, plain = len(server.engine.encode(user(read))), 1 + len(server.engine.encode_text(read))
    rows = [(CHAT, {"messages": user(content)}, chat) for content in (text, [{"type": "text", "text": text}])]
    for route, body, size in [*rows, ("/v1/completions", {"prompt": text}, plain)]:
        assert server.post(route, **body, max_tokens=1).json()["usage"]["prompt_tokens"] == size


def test_the_page_needs_nothing_from_elsewhere_and_gets_the_examples_of_the_checkpoint(server, monkeypatch):
    page = server.http.get("/")
    assert page.headers["content-type"].startswith("text/html") and CHAT in page.text
    assert re.findall(r"(?:src|href)=\W*(\w+)", page.text) == ["data"] and "innerHTML" not in page.text
    assert "default-src 'none'" in page.text
    assert server.http.get("/v1/models").json()["data"][0]["examples"] is None
    monkeypatch.setitem(server.tokenizer.init_kwargs, "examples", ["One?"])
    assert server.http.get("/v1/models").json()["data"][0]["examples"] == ["One?"]


def test_a_conversation_that_grew_too_long_loses_its_oldest_turns(server):
    messages = [{"role": role, "content": "word " * 20} for _ in range(8) for role in ("user", "assistant")]
    answer = server.post(CHAT, messages=[*messages, *user("Hello")], max_tokens=60).json()
    assert answer["dropped_messages"] > 0 and answer["usage"]["completion_tokens"] > 0
    assert answer["usage"]["prompt_tokens"] + 60 <= server.engine.length
    huge = server.post(CHAT, messages=[*user("b" * 1_040_000), *user("Hello")]).json()
    assert huge["dropped_messages"] == 1
    two = [*user("Hello"), {"role": "assistant", "content": "Hi"}, *user("What is 5 + 6?")]
    assert "dropped_messages" not in server.post(CHAT, messages=two, max_tokens=10**6).json()  # half of the context
    while len(server.engine.encode([*messages, *user("Hello")])) + 9 > server.engine.length:
        messages = messages[2:]
    assert "dropped_messages" not in server.post(CHAT, messages=[*messages, *user("Hello")], max_tokens=9).json()


NULLS = dict.fromkeys(("n", "stream", "stop", "stream_options", "tools", "tool_choice", "seed", "top_p", "logprobs"))
NOTHING = {"logprobs": False, "top_logprobs": 0, "frequency_penalty": 0.0, "presence_penalty": 0, "logit_bias": {}}
NOTHING |= {"response_format": {"type": "text"}}
LANGCHAIN = {"model": "gpt", "max_completion_tokens": 99, "n": 1, "parallel_tool_calls": True, "temperature": 0.0}
OPEN_WEBUI = {"model": "m", "max_tokens": 99, "user": {"name": "a"}, "metadata": {"chat_id": "b"}, "params": {}}
OPEN_WEBUI |= {"stream_options": {"include_usage": True}, "chat_id": "c", "features": {}, "files": None, "top_p": 1}


@pytest.mark.parametrize("extra", [NULLS, NOTHING, LANGCHAIN, OPEN_WEBUI, {"seed": -(10**30), "max_tokens": 10**12}])
def test_what_clients_send_beside_the_messages_is_read_or_asks_for_nothing(server, extra):
    messages = [*calling({"expression": "5+6"}), {"role": "tool", "content": "11", "tool_call_id": "a", "name": None}]
    messages[0] = {"role": "user", "content": [{"type": "text", "text": "What is 5 + 6?"}], "name": None}
    assert server.post(CHAT, messages=messages, **extra).json()["choices"][0]["message"]["content"] == "It is 11."
    nothing = dict.fromkeys(("temperature", "top_k", "top_p", "seed", "stop", "max_new_tokens", "truncate", "details"))
    assert server.post("/generate", inputs="?", parameters=nothing, stream=None).json()["generated_text"]
    assert server.post(CHAT, messages=[{"role": "developer", "content": "x"}, *user("?")], n=None).status_code == 200


@pytest.mark.parametrize("choice,tools", [("none", None), ("none", PYTHON), ("auto", None)])
def test_tool_choice_none_runs_no_tool(server, monkeypatch, choice, tools):
    calls = []
    monkeypatch.setattr(server.engine, "tool", lambda expression: calls.append(expression) or "11")
    reply = server.post(CHAT, messages=user("What is 5 + 6?"), tool_choice=choice, tools=tools).json()["choices"][0]
    assert reply["finish_reason"] != "tool_calls" and "tool_calls" not in reply["message"]
    assert calls == ([] if choice == "none" else ["5+6"])


# ---- limits --------------------------------------------------------------------------------------------------------


def test_the_server_answers_others_while_it_reads_a_request(server, monkeypatch):
    reading, go, tokenizer = threading.Event(), threading.Event(), server.engine.encode_text
    monkeypatch.setattr(server.engine, "encode_text", lambda text: reading.set() or (go.wait(60) and tokenizer(text)))
    for route, body in ((CHAT, {"messages": user("?")}), ("/v1/completions", {"prompt": "?"}), ("/", {"inputs": "?"})):
        reading.clear()
        go.clear()
        job = threading.Thread(target=server.post, args=(route,), kwargs=body)
        job.start()
        assert reading.wait(60) and server.http.get("/health").status_code == 200
        go.set()
        job.join(60)


def test_a_full_queue_says_so_and_the_others_are_answered(server, hf, monkeypatch):
    worker, real, gate, statuses = server.workers[0], server.engine.advance, threading.Event(), []
    monkeypatch.setattr(server.engine, "advance", lambda: (gate.wait(60), real())[1])

    def ask():
        statuses.append(server.post(CHAT, messages=user("Hello"), max_tokens=4).status_code)

    threads = [threading.Thread(target=ask, daemon=True) for _ in range(8)]  # 4 slots and 4 that may wait
    for thread in threads:
        thread.start()
    until(lambda: worker.load == 8)
    with pytest.raises(HfHubHTTPError, match="overloaded"):
        hf.chat_completion(user("Hello"))
    refused = server.post(CHAT, messages=user("Hello"))
    assert (refused.status_code, refused.json()["error"]["type"]) == (429, "overloaded")
    assert int(refused.headers["retry-after"]) > 0
    gate.set()
    for thread in threads:
        thread.join()
    assert statuses == [200] * 8


@pytest.fixture
def only_ends(server, monkeypatch):
    """An engine that does nothing but end requests that were cancelled."""
    worker, real = server.workers[0], server.engine.advance
    gone = lambda: all(request.cancelled for request in list(worker.callbacks))  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(server.engine, "advance", lambda: real() if gone() else time.sleep(0.01) or [])
        yield worker


def test_several_samples_are_started_all_or_none(server, only_ends, monkeypatch):
    monkeypatch.setattr(Worker, "load", property(lambda worker: len(worker.callbacks) + 1))  # 8 may run or wait
    assert server.post(CHAT, messages=user("Hello"), n=8, **RANDOM).status_code == 429
    until(lambda: not only_ends.callbacks)


@pytest.mark.parametrize("stream,n", [(True, 1), (False, 3)])
def test_a_client_that_hangs_up_frees_its_slots(server, only_ends, stream, n):
    body = json.dumps({"messages": user("Hello"), "stream": stream, "n": n}).encode()
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as client:
        client.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        until(lambda: only_ends.load == n)
        requests = list(only_ends.callbacks)
    until(lambda: not only_ends.load)
    assert [request.finish_reason for request in requests] == ["cancelled"] * n


def test_no_client_gets_more_tokens_than_the_server_allows(server, monkeypatch):
    monkeypatch.setattr(server, "max_new_tokens", 5)
    parameters = {**RANDOM, "max_new_tokens": 100, "details": True}
    details = server.post("/generate", inputs="Hello", parameters=parameters).json()["details"]
    assert (details["generated_tokens"], details["finish_reason"]) == (5, "length")
    for limit in ({"max_tokens": 100}, {"max_completion_tokens": 100}, {}):
        reply = server.post(CHAT, messages=user("Hello"), **limit, **RANDOM).json()
        assert (reply["usage"]["completion_tokens"], reply["choices"][0]["finish_reason"]) == (5, "length")


def test_a_broken_model_is_a_503_and_an_event_of_the_stream(talker, server, tmp_path):
    worker = Worker(lambda: Engine(*talker))
    worker.start()
    other = Server([worker], str(tmp_path))
    assert other.name == "/".join(tmp_path.parts[-2:])  # does not say where the folder is

    def explode():
        raise MemoryError("no memory left")

    async def requests():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(other.app), base_url="http://x") as client:
            assert (await client.get("/health")).status_code == 200
            worker.engine.advance = explode
            stream = await client.post(CHAT, json={"messages": user("Hello"), "stream": True})
            return stream, await client.post("/generate", json={"inputs": "Hello"}), await client.get("/health")

    stream, refused, health = asyncio.run(requests())
    assert '"the model stopped: no memory left"' in stream.text and stream.text.endswith("data: [DONE]\n\n")
    assert (refused.status_code, refused.json()["error_type"], health.status_code) == (503, "unavailable", 503)
    small = Worker(MagicMock(side_effect=torch.OutOfMemoryError("CUDA out of memory")), "cpu")
    small.start()
    with pytest.raises(InputError, match="memory of cpu is full: lower --max-batch-size"):
        Server([small], "x")


U, PARTS = {"role": "user", "content": "a"}, [{"type": "text", "text": "a"}]
EDGES = [  # route, field: values that are taken | values that are refused
    ("chat", "temperature", [0, 5], [-0.1, 5.1]), ("tgi", "temperature", [0.01, 5], [0, 5.1]),
    ("chat", "top_p", [0.01, 1], [0, 1.1]), ("chat", "top_k", [0, 2**31 - 1], [-1, 2**31, 1.5]),
    ("chat", "max_tokens", [1, 10**9], [0, "1"]), ("chat", "max_completion_tokens", [1], [0]),
    ("tgi", "max_new_tokens", [1], [0]), ("chat", "n", [1, 16], [0, 17]), ("tgi", "truncate", [1], [0]),
    ("chat", "stop", ["a", ["a"] * 16, "a" * 1000], [["a"] * 17, "a" * 1001, 5]),
    ("chat", "messages", [[U], [U] * 4096], [[], [U] * 4097]), ("chat", "seed", [-1, 2**70], [1.5]),
    ("chat", "messages", [[{**U, "content": PARTS * 1024}]], [[{**U, "content": PARTS * 1025}]]),
    ("chat", "messages", [[{"role": "assistant", "tool_calls": [{}] * 128}]], [[{"role": "assistant"}]]),
    ("chat", "messages", [], [[{"role": "assistant", "tool_calls": [{}] * 129}]]),
    ("chat", "tools", [[], PYTHON * 128], [PYTHON * 129, [{"type": "function", "function": {"name": "sql"}}]]),
    ("chat", "tool_choice", ["auto", "none"], ["required"]),
    ("text", "prompt", ["a", [1], ["a"] * 64], ["", [], ["a"] * 65]),
    *(("chat", name, [None, False, ""], ["x", 7]) for name in (*UNSUPPORTED, "logprobs", "grammar", "echo", "audio")),
    ("chat", "service_tier", ["auto", "default"], ["flex", "auto default"]), ("chat", "store", [[], {}], [True]),
]  # fmt: skip
BODIES = {"chat": (ChatBody, {"messages": [U]}), "text": (CompletionBody, {}), "tgi": (TGIParameters, {})}


@pytest.mark.parametrize("route, field, taken, refused", EDGES)
def test_each_field_of_a_request_takes_what_is_within_its_limits(route, field, taken, refused):
    model, others = BODIES[route]
    for value in taken:
        parse(model, json.dumps(others | {field: value}).encode())
    for value in refused:
        with pytest.raises((InputError, ValidationError)):
            parse(model, json.dumps(others | {field: value}).encode())


def test_the_newest_name_of_a_limit_wins_and_a_body_has_only_so_many_parts():
    names = ("max_completion_tokens", "max_tokens", "max_new_tokens")
    for first in range(3):
        body = {"messages": [U]} | {name: number for number, name in enumerate(names) if number >= first and number}
        assert parse(ChatBody, json.dumps(body).encode()).limit == max(first, 1)
    for commas, message in ((5 * 39_990, ""), (5 * 40_010, "more than 40000 lists")):
        with pytest.raises(InputError, match=message) if message else nullcontext():
            parse(CompletionBody, b'{"prompt": ["' + b"," * commas + b'"]}')
