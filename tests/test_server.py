"""The server with the clients that people use: huggingface_hub's InferenceClient, the openai package, plain HTTP."""

import asyncio
import concurrent.futures
import contextlib
import json
import logging
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import httpx
import openai
import pytest
import torch
import uvicorn
from browser import browser, picture  # noqa: F401
from huggingface_hub import InferenceClient, close_session, constants
from huggingface_hub.errors import HfHubHTTPError
from servers import free_port, start
from talker import QUESTIONS, talker, talker_folder  # noqa: F401

from nanochat_hf import cli
from nanochat_hf.errors import InputError
from nanochat_hf.serve import limits
from nanochat_hf.serve.engine import Engine
from nanochat_hf.serve.limits import LimitedProtocol, OncePerMinute
from nanochat_hf.serve.server import Server
from nanochat_hf.serve.terminal_chat import Options, RemoteModel, messages_of
from nanochat_hf.serve.worker import Worker

ROOT = Path(__file__).parent.parent
HELLO = QUESTIONS["Hello"][0][1]
PYTHON = [{"type": "function", "function": {"name": "python", "parameters": {}}}]
CHAT = "/v1/chat/completions"
RANDOM = {"temperature": 3.0, "top_k": 0, "seed": 1}


@pytest.fixture(scope="module")
def server(talker):  # noqa: F811
    """The server with the talker in greedy mode on loopback; `server.url`, `server.post(route, **body)`."""
    worker = Worker(lambda: Engine(*talker, slots=4), max_queue_size=4)
    worker.start()
    server = Server([worker], "tests/talker", temperature=0.0, max_new_tokens=150)
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    server.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.post = lambda route, **body: httpx.post(server.url + route, json=body, timeout=60)
    runner = uvicorn.Server(uvicorn.Config(server.app, log_level="critical", http=LimitedProtocol, ws="none"))
    thread = threading.Thread(target=runner.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not runner.started:
        time.sleep(0.01)
    yield server
    runner.should_exit = True
    thread.join(10)
    assert not worker.is_alive()  # a clean shutdown ends the model's thread


@pytest.fixture
def hf(server, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    close_session()
    yield InferenceClient(base_url=server.url, timeout=30)
    close_session()


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
        time.sleep(0.02)


@pytest.mark.skipif(not shutil.which("node"), reason="needs node")
def test_the_page_sends_no_question_that_got_no_answer():
    page, script = ROOT / "nanochat_hf" / "serve" / "ui.html", Path(__file__).with_name("page.js").read_text()
    done = subprocess.run(["node", "-e", script, page], capture_output=True, text=True, check=True, timeout=20)
    steps = '[{"call":"6*7","result":"42"},{"call":"1+1","result":"2"}]'  # not the call that got no result
    nothing = dict.fromkeys(("busy", "down", "stopped before", "says nothing"), "u last")
    some = dict.fromkeys(("stopped after", "breaks", "ok"), "u one, a Hello., u last")
    calls = {"calls": f"u one, a It is 42. {steps}, u last"}
    new = dict.fromkeys(("new", "new breaks"), "u two, a Hello., u last")  # what was cleared away comes too late
    new |= {"errors": "false"}
    enter = {"enter": "u one, a Hello.again, u last", "enter stops": "false", "scrolled up": "true"}
    lines = [line.split(": ", 1) for line in done.stdout.splitlines()]
    assert dict(lines) == nothing | some | calls | new | enter


# ---- huggingface_hub -----------------------------------------------------------------------------------------------


def test_inference_client_chats_and_streams_with_the_tool(hf):
    answer = hf.chat_completion(user("Hello"), max_tokens=120)
    assert answer.choices[0].message.content == HELLO and answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens > 20 and answer.model == "tests/talker"
    chunks = list(hf.chat_completion(user("What is 12 * 34?"), stream=True))
    tools = [chunk.choices[0].delta["tool"] for chunk in chunks if "tool" in chunk.choices[0].delta]
    steps = ["".join(tool.get(kind, "") for tool in tools) for kind in ("call", "result")]
    assert (texts(chunks), steps) == ("It is 408.", ["12*34", "408"])
    assert chunks[-1].choices[0].finish_reason == "stop" and len(chunks) > 5


def test_inference_client_generates_text_plain_detailed_and_streamed(hf, prompt):
    assert hf.text_generation(prompt, max_new_tokens=120) == HELLO
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


def test_the_terminal_chat_talks_to_it_with_tools_shown(server):
    chunks = RemoteModel(server.url).answer(user("What is 5 + 6?"), Options(temperature=0.0, max_new_tokens=100))
    call, result, text = messages_of(list(chunks))
    assert call["tool_calls"][0]["function"]["arguments"] == {"expression": "5+6"}
    assert (result["content"], text["content"]) == ("11", "It is 11.")


# ---- openai --------------------------------------------------------------------------------------------------------


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


def test_openai_streams_with_usage(ai):
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(ai.chat.completions.create(model="any", messages=user("Hello"), **options))
    assert texts(chunks) == HELLO
    assert chunks[-1].usage.completion_tokens > 20 and chunks[-2].choices[0].finish_reason == "stop"


@pytest.mark.parametrize("streamed", [False, True])
def test_openai_clients_may_run_the_tool_themselves(ai, streamed):
    messages = user("What is 5 + 6?")
    reply = ai.chat.completions.create(model="any", messages=messages, tools=PYTHON, stream=streamed)
    if streamed:
        chunks = list(reply)
        reason, (call,) = chunks[-1].choices[0].finish_reason, chunks[-2].choices[0].delta.tool_calls
    else:
        reason, (call,) = reply.choices[0].finish_reason, reply.choices[0].message.tool_calls
    assert reason == "tool_calls" and json.loads(call.function.arguments) == {"expression": "5+6"}
    called = {"id": call.id, "type": "function", "function": call.function.model_dump()}
    messages += [{"role": "assistant", "content": None, "tool_calls": [called]}]
    messages += [{"role": "tool", "tool_call_id": call.id, "content": "11"}]
    final = ai.chat.completions.create(model="any", messages=messages, tools=PYTHON)
    assert final.choices[0].message.content == "It is 11."


def test_openai_completes_text_and_lists_the_model(ai, server, prompt):
    assert ai.completions.create(model="any", prompt=prompt, max_tokens=120).choices[0].text == HELLO
    chunks = list(ai.completions.create(model="any", prompt=prompt, max_tokens=120, stream=True))
    assert "".join(c.choices[0].text for c in chunks) == HELLO and chunks[-1].choices[0].finish_reason == "stop"
    assert [model.id for model in ai.models.list()] == [ai.models.retrieve("tests/talker").id] == ["tests/talker"]
    with pytest.raises(openai.NotFoundError, match="no model gpt-4; this server has tests/talker"):
        ai.models.retrieve("gpt-4")
    for text, bos in ((prompt, 0), ("Hello", 1)):  # the first has its bos already
        size = len(server.tokenizer.encode(text, add_special_tokens=False))
        assert ai.completions.create(model="any", prompt=text, max_tokens=1).usage.prompt_tokens == bos + size


def test_openai_gets_several_samples_of_one_prompt_and_the_same_with_the_same_seed(ai, server):
    def sample():
        options = {"n": 3, "temperature": 2.0, "seed": 5, "max_tokens": 12, "extra_body": {"top_k": 0}}
        answer = ai.chat.completions.create(model="any", messages=user("Hello"), **options)
        assert answer.usage.prompt_tokens == len(server.engine.encode(user("Hello")))  # is counted once
        return [choice.message.content for choice in answer.choices]

    first = sample()
    assert len(set(first)) == 3 and sample() == first


def test_openai_completes_several_prompts(ai, server, prompt):
    """As LangChain's `OpenAI(...).generate([...])` sends them."""
    ids = server.tokenizer.encode("Hello", add_special_tokens=False)
    answer = ai.completions.create(model="any", prompt=[prompt, "Hello"], n=2, max_tokens=120, temperature=0)
    alone = ai.completions.create(model="any", prompt="Hello", max_tokens=120, temperature=0)
    texts = [choice.text for choice in answer.choices]
    assert texts == [HELLO] * 2 + [alone.choices[0].text] * 2 and [c.index for c in answer.choices] == [0, 1, 2, 3]
    long = len(server.tokenizer.encode(prompt, add_special_tokens=False))
    assert answer.usage.prompt_tokens == long + 1 + len(ids)
    assert len(ai.completions.create(model="any", prompt=[ids, ids], max_tokens=1).choices) == 2


# ---- bodies that are refused ---------------------------------------------------------------------------------------


def calling(arguments):
    call = {"id": "a", "type": "function", "function": {"name": "python", "arguments": arguments}}
    return [*user("?"), {"role": "assistant", "content": None, "tool_calls": [call]}]


def schema(name, *arguments):
    """The tool `name` as LangChain writes it, each of its arguments required."""
    parameters = {"type": "object", "properties": {x: {"type": "string"} for x in arguments}, "required": arguments}
    return [{"type": "function", "function": {"name": name, "strict": True, "parameters": parameters}}]


HALF = "x\ud83d"
FORCED = {"type": "function", "function": {"name": "Answer"}}
STEP = {"role": "assistant", "content": "2", "tool_steps": [{"call": "1+1"}]}
BAD_TOOLS = ([1], [{}], [{"function": None}], [{"function": {"name": 1}}], [{"function": "python"}], "python")
WRONG = [
    (CHAT, {"messages": [{"role": "robot", "content": "?"}]}, "no chat"),
    (CHAT, {"messages": []}, "messages"),
    (CHAT, {"messages": user("?"), "temperature": 99}, "temperature"),
    (CHAT, {"messages": user("?"), "top_k": 10**12}, "top_k"),
    *((CHAT, {"messages": user("?"), key: True}, key) for key in ("temperature", "max_tokens", "n", "seed")),
    ("/generate", {"inputs": "?", "stream": 1}, "stream"),
    (CHAT, {"messages": user("?"), "tools": [{"type": "function", "function": {"name": "search"}}]}, "has one tool"),
    (CHAT, {"messages": user("?"), "stream": True, "n": 2}, "leave n out"),
    (CHAT, {"messages": [*user("?"), STEP, *user("?")]}, "tool_steps"),
    (CHAT, {"messages": calling('{"code": "1"}')}, "expression, not code"),
    (CHAT, {"messages": calling("[1]")}, "no JSON object"),
    (CHAT, {"messages": calling('{"expression": 5}')}, "takes one text"),
    *(
        (CHAT, {"messages": user("?"), key: float(x)}, key)
        for key in ("temperature", "top_p")
        for x in ("nan", "-inf")
    ),
    ("/v1/completions", {"prompt": "word " * 300}, "context is 256"),
    ("/v1/completions", {"prompt": [1, 99999]}, "outside of 0.."),
    ("/v1/completions", {"prompt": ["a", "b"], "stream": True}, "send one prompt, and leave n out"),
    ("/v1/completions", {"prompt": ["a"] * 65}, "prompt: List should have at most 64 items"),
    ("/v1/completions", {"prompt": ["a"] * 3, "n": 3}, "9 completions in one request: this server takes at most 8"),
    ("/v1/completions", {"prompt": ["a", [1, 99999]]}, "outside of 0.."),
    ("/v1/completions", {"prompt": ["a", ""]}, "prompt.1: String should have at least 1 character"),
    ("/v1/completions", {"prompt": []}, "at least 1"),
    ("/v1/completions", {"prompt": [1, 2, "a"]}, "prompt.0.2: Input should be a valid integer"),
    ("/v1/completions", {"prompt": "a", "echo": True}, "echo is not supported"),
    ("/v1/completions", {"prompt": "a", "logprobs": 0}, "logprobs is not supported"),
    (CHAT, {"messages": user("?"), "response_format": {"type": "json_object"}}, "response_format is not supported"),
    (CHAT, {"messages": user("?"), "frequency_penalty": 0.5}, "frequency_penalty is not supported"),
    (CHAT, {"messages": user("?"), "tools": PYTHON, "tool_choice": "required"}, "cannot be made to call"),
    (CHAT, {"messages": user("?"), "tools": PYTHON, "tool_choice": FORCED}, "cannot be made to call"),
    (CHAT, {"messages": user("?"), "tools": schema("Answer", "value"), "tool_choice": FORCED}, "Answer is not that"),
    (CHAT, {"messages": user("?"), "tools": PYTHON + schema("search", "query")}, "search is not that"),
    (CHAT, {"messages": user("?"), "tools": schema("python", "code")}, "argument, expression: python is not that"),
    (CHAT, {"messages": user("?"), "tools": schema("python", "expression", "n")}, "python is not that"),
    (CHAT, {"messages": user("?"), "reasoning_effort": "low"}, "reasoning_effort is not supported"),
    (CHAT, {"messages": user("?"), "repeat_penalty": 1.1}, "repeat_penalty is not supported"),
    *((path, {}, f"no route {path}; those of OpenAI are /v1/chat") for path in ("/chat/completions", "/v1/responses")),
    *((CHAT, {"messages": user("?"), "tools": tools}, "tools") for tools in BAD_TOOLS),
    (CHAT, {"messages": [{"role": HALF, "content": "?"}]}, "unknown role x?"),
    (CHAT, {"messages": [{"role": 5, "content": "?"}]}, "messages.0.role"),
    (CHAT, {"messages": user([{"type": HALF}])}, "not a part of type x?"),
    (CHAT, {"messages": user([1] * 2000)}, "messages.0.content: List should have at most 1024"),
    (CHAT, {"messages": user("?") * 4097}, "messages: List should have at most 4096"),
    (CHAT, {"messages": user("?"), "stop": ["x"] * 17}, "stop: List should have at most 16"),
    (CHAT, {"messages": user("?"), "stop": "x" * 1001}, "stop.0"),
    (CHAT, {"messages": user("?"), "x": [[]] * 200_000}, "more than 100000 lists"),
    (CHAT, [], "the body"),
    ("/generate", {"inputs": "Hello", "parameters": {"repetition_penalty": 1.2}}, "repetition_penalty is not supp"),
    ("/generate", {"inputs": "x" * 10**6}, "characters, more than the model's context of 256 tokens"),
    ("/generate", {"inputs": "Hello", "parameters": {"max_new_tokens": 0}}, "max_new_tokens"),
]


@pytest.mark.parametrize("route,body,reason", WRONG)
def test_a_wrong_body_gets_one_reason_in_the_words_of_its_protocol(server, route, body, reason):
    headers = {"Content-Type": "application/json"}
    reply = httpx.post(server.url + route, content=json.dumps(body), headers=headers)  # httpx itself refuses some
    if route == "/generate":
        assert reply.status_code == 422 and reason in reply.json()["error"]
        assert reply.json()["error_type"] == "validation"
    else:
        assert reply.status_code == (404 if "no route" in reason else 400)
        assert reason in reply.json()["error"]["message"]


def test_bodies_too_large_broken_or_sent_elsewhere_are_refused(server):
    big = httpx.post(server.url + CHAT, content=b"x" * (1 << 21))
    assert big.status_code == 413 and "1048576 bytes" in big.text
    two = {"Transfer-Encoding": "chunked", "Content-Length": "2"}  # the first one counts
    both = httpx.post(server.url + CHAT, content=iter([b"x" * (1 << 21)]), headers=two)
    assert both.status_code == 413
    broken = httpx.post(server.url + CHAT, content=b"{", headers={"Content-Type": "application/json"})
    assert broken.status_code == 400 and broken.json()["error"]["type"] == "validation"
    for reply in (httpx.get(server.url + CHAT), httpx.post(server.url + "/v1/embeddings", json={})):
        assert reply.status_code in (404, 405) and reply.json()["error"]["message"]
    assert httpx.get(server.url + "/metrics").json()["error"]["type"] == "not_found"


def test_no_number_that_a_client_sends_breaks_the_model(server):
    for name, value in (("seed", -(10**30)), ("seed", 10**30), ("max_tokens", 10**12)):
        body = {"messages": user("Hello"), "max_tokens": 3, "temperature": 1.0, name: value}
        assert server.post(CHAT, **body).status_code == 200
    assert httpx.get(server.url + "/health").status_code == 200


# ---- plain HTTP ----------------------------------------------------------------------------------------------------


def test_tgi_routes_answer_as_documented(server):
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
    info = httpx.get(server.url + "/info").json()
    assert (info["model_id"], info["max_total_tokens"], info["num_replicas"]) == ("tests/talker", 256, 1)
    assert info["max_input_tokens"] == 255  # leaves one for the answer
    assert (info["max_batch_size"], info["max_concurrent_requests"]) == (4, 8)


def test_half_of_a_surrogate_pair_is_a_question_mark(server):
    chat, text = len(server.engine.encode(user("x?"))), 1 + len(server.engine.encode_text("x?"))
    rows = [(CHAT, {"messages": user(content)}, chat) for content in (HALF, [{"type": "text", "text": HALF}])]
    rows += [("/v1/completions", {"prompt": prompt}, text) for prompt in (HALF, [HALF])]
    for route, body, size in rows:
        reply = httpx.post(server.url + route, content=json.dumps({**body, "max_tokens": 1}))
        assert reply.json()["usage"]["prompt_tokens"] == size
    reply = httpx.post(server.url + "/generate", content=json.dumps({"inputs": HALF, "parameters": {"details": True}}))
    assert reply.json()["details"]["input_length"] == text


def test_browsers_get_a_page_that_needs_nothing_from_elsewhere(server):
    page = httpx.get(server.url + "/")
    assert page.headers["content-type"].startswith("text/html") and CHAT in page.text
    assert re.findall(r"(?:src|href)=\W*(\w+)", page.text) == ["data"] and "innerHTML" not in page.text
    assert "default-src 'none'" in page.text


def test_the_page_gets_the_examples_of_the_checkpoint(server, monkeypatch):
    assert httpx.get(server.url + "/v1/models").json()["data"][0]["examples"] is None
    monkeypatch.setitem(server.tokenizer.init_kwargs, "examples", ["One?"])
    assert httpx.get(server.url + "/v1/models").json()["data"][0]["examples"] == ["One?"]


def test_special_tokens_in_a_message_stay_text(server):
    text = "x<|assistant_end|><|user_start|>"
    ids = server.engine.encode(user(text))
    assert server.post(CHAT, messages=user(text), max_tokens=2).json()["usage"]["prompt_tokens"] == len(ids)
    assert sum(token in server.tokenizer.all_special_ids for token in ids) == 4  # bos, user start and end, assistant


def test_a_conversation_that_grew_too_long_loses_its_oldest_turns(server):
    messages = [{"role": role, "content": "word " * 20} for _ in range(8) for role in ("user", "assistant")]
    answer = server.post(CHAT, messages=[*messages, *user("Hello")], max_tokens=60).json()
    assert answer["dropped_messages"] > 0 and answer["usage"]["completion_tokens"] > 0
    assert answer["usage"]["prompt_tokens"] + 60 <= server.engine.length
    while len(server.engine.encode([*messages, *user("Hello")])) + 9 > server.engine.length:
        messages = messages[2:]
    assert "dropped_messages" not in server.post(CHAT, messages=[*messages, *user("Hello")], max_tokens=9).json()


OPTIONAL = ("n", "stream", "stop", "stream_options", "tools", "tool_choice", "seed", "top_p", "top_k", "max_tokens")
OPTIONAL += ("max_completion_tokens", "temperature", "logprobs", "response_format", "logit_bias", "user", "metadata")
NULLS = dict.fromkeys(OPTIONAL)
NOTHING = {"logprobs": False, "top_logprobs": 0, "frequency_penalty": 0.0, "presence_penalty": 0, "logit_bias": {}}
LANGCHAIN = {"model": "gpt", "max_completion_tokens": 99, "n": 1, "parallel_tool_calls": True, "temperature": 0.0}
OPEN_WEBUI = {"model": "m", "max_tokens": 99, "user": {"name": "a"}, "metadata": {"chat_id": "b"}, "params": {}}
OPEN_WEBUI |= {"stream_options": {"include_usage": True}, "chat_id": "c", "features": {}, "files": None, "top_p": 1}


@pytest.mark.parametrize("extra", [NULLS, NOTHING, LANGCHAIN, OPEN_WEBUI, {"response_format": {"type": "text"}}])
def test_what_clients_send_beside_the_messages_is_read_or_asks_for_nothing(server, extra):
    messages = [*calling({"expression": "5+6"}), {"role": "tool", "content": "11", "tool_call_id": "a", "name": None}]
    messages[0] = {"role": "user", "content": [{"type": "text", "text": "What is 5 + 6?"}], "name": None}
    assert server.post(CHAT, messages=messages, **extra).json()["choices"][0]["message"]["content"] == "It is 11."
    old = server.post(CHAT, messages=[{"role": "system", "content": "x"}, *user("?")], max_tokens=1).json()
    new = server.post(CHAT, messages=[{"role": "developer", "content": "x"}, *user("?")], max_tokens=1).json()
    assert new["usage"] == old["usage"]
    nothing = dict.fromkeys(("temperature", "top_k", "top_p", "seed", "stop", "max_new_tokens", "truncate", "details"))
    assert server.post("/generate", inputs="Hello", parameters=nothing).json()["generated_text"]
    assert server.post("/generate", inputs="Hello", parameters=None, stream=None).json()["generated_text"]


@pytest.mark.parametrize("form", ["text", "old", "several"])
def test_calls_in_the_history_are_read_in_all_of_openais_forms(server, monkeypatch, form):
    function = {"name": "python", "arguments": json.dumps({"expression": "5+6"})}
    calls = [{"id": "a", "type": "function", "function": function}]
    results = [{"role": "tool", "tool_call_id": "a", "content": "11"}]
    steps = "<|python_start|>5+6<|python_end|><|output_start|>11<|output_end|>"
    if form == "several":  # each result goes to its own call, whatever the order
        calls.append({**calls[0], "id": "b", "function": {**function, "arguments": '{"expression": "1+1"}'}})
        results.insert(0, {"role": "tool", "tool_call_id": "b", "content": "2"})
        steps += "<|python_start|>1+1<|python_end|><|output_start|>2<|output_end|>"
    history = [{"role": "assistant", "content": None, "tool_calls": calls}, *results]
    if form == "old":
        history = [{"role": "assistant", "content": None, "function_call": function}]
        history += [{"role": "function", "name": "python", "content": "11"}]
    prompts, render = [], server.engine.render
    monkeypatch.setattr(server.engine, "render", lambda m: prompts.append(render(m)) or prompts[-1])
    reply = server.post(CHAT, messages=user("What is 5 + 6?") + history).json()
    assert prompts[0].endswith("<|assistant_start|>" + steps)
    assert form == "several" or reply["choices"][0]["message"]["content"] == "It is 11."


# ---- limits --------------------------------------------------------------------------------------------------------


LARGE = {
    "one word": (CHAT, {"messages": user("a" * 1_040_000)}, 400),
    "a long history": (CHAT, {"messages": [*user("b" * 1_040_000), *user("Hello")]}, 200),
    "many turns": (CHAT, {"messages": user("word " * 40) * 4000, "stop": ["x" * 1000] * 16}, 200),
    "special tokens": ("/generate", {"inputs": "<|bos|>" * 149_000, "parameters": {"truncate": 9}}, 200),
    "tool calls": (CHAT, {"messages": calling("1") * 4000}, 400),
    "numbers": ("/v1/completions", {"prompt": [1] * 340_000 + ["a"]}, 400),
}


@pytest.mark.parametrize("name", LARGE)
def test_the_server_answers_others_while_it_reads_a_request_of_a_megabyte(server, name):
    route, body, status = LARGE[name]
    with concurrent.futures.ThreadPoolExecutor() as pool, httpx.Client() as client:
        worst, job = 0.0, pool.submit(httpx.post, server.url + route, content=json.dumps(body), timeout=60)
        while not job.done():
            start = time.monotonic()
            client.get(server.url + "/health", timeout=60)
            worst = max(worst, time.monotonic() - start)
    assert job.result().status_code == status and worst < 0.8  # 30 ms on an idle machine, seconds without the threads


def test_half_requests_are_hung_up_on_and_there_are_only_so_many_connections(server, monkeypatch):
    monkeypatch.setattr(limits, "RECEIVE_TIMEOUT", 0.3)
    address, head = ("127.0.0.1", int(server.url.rpartition(":")[2])), f"POST {CHAT} HTTP/1.1\r\nHost: x\r\n"
    for half in ("", head, head + "Content-Length: 99\r\n\r\n{"):
        with socket.create_connection(address, timeout=5) as client:
            if half == head:  # as the second request of a connection
                client.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
                reply = b""
                while not reply.endswith(b"{}"):
                    reply += client.recv(1000)
            client.sendall(half.encode())
            with contextlib.suppress(ConnectionResetError):
                assert client.recv(100) == b""
    with httpx.Client() as client:  # a connection may be used again, and an answer may take longer
        for _ in range(2):
            body = {"messages": user("Hello"), **RANDOM, "max_tokens": 100}
            assert client.post(server.url + CHAT, json=body, timeout=60).status_code == 200
    monkeypatch.setattr(limits, "connection_limit", lambda: 3)
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(socket.create_connection(address, timeout=5)) for _ in range(6)]
        assert clients[-1].recv(100).startswith(b"HTTP/1.1 503 ")
    until(lambda: httpx.get(server.url + "/health").status_code == 200)


def test_a_flood_of_broken_requests_is_one_line_of_the_log_per_minute():
    once, record = OncePerMinute(), logging.LogRecord("uvicorn.error", 30, "", 1, "Invalid HTTP request", (), None)
    assert [once.filter(record) for _ in range(3)] == [True, False, False]
    once.times.clear()
    assert once.filter(record)


def test_a_full_queue_says_so_and_the_others_are_answered(server, hf, monkeypatch):
    worker, real, gate, statuses = server.workers[0], server.engine.advance, threading.Event(), []
    monkeypatch.setattr(server.engine, "advance", lambda: (gate.wait(20), real())[1])

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


def test_several_samples_are_started_all_or_none(server, monkeypatch):
    worker, real = server.workers[0], server.engine.advance
    with monkeypatch.context() as patch:  # none continues before all were cancelled
        gone = lambda: all(request.cancelled for request in list(worker.callbacks))  # noqa: E731
        patch.setattr(server.engine, "advance", lambda: real() if gone() else time.sleep(0.01) or [])
        patch.setattr(Worker, "load", property(lambda worker: len(worker.callbacks) + 1))  # 8 may run or wait
        assert server.post(CHAT, messages=user("Hello"), n=8, **RANDOM).status_code == 429
        until(lambda: not worker.callbacks)
    assert len(server.post(CHAT, messages=user("Hello"), n=8, max_tokens=1).json()["choices"]) == 8


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_frees_its_slots(server, monkeypatch, stream):
    worker, real, loads = server.workers[0], server.engine.advance, []

    def advance():  # three tokens of a stream, then nothing until all were cancelled
        time.sleep(0.01)
        loads.append(worker.load)
        gone = all(request.cancelled for request in list(worker.callbacks))
        return real() if gone or (stream and len(loads) < 4) else []

    monkeypatch.setattr(server.engine, "advance", advance)
    body = {"messages": user("Hello"), **RANDOM}
    if stream:
        with httpx.stream("POST", server.url + CHAT, json={**body, "stream": True}) as reply:
            next(reply.iter_text())
            requests = list(worker.callbacks)
        until(lambda: not worker.load)
        assert [request.finish_reason for request in requests] == ["cancelled"]
    else:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(server.url + CHAT, json={**body, "n": 3}, timeout=0.5)
        until(lambda: loads and not worker.load)
        assert max(loads) == 3


@pytest.mark.parametrize("route", [CHAT, "/v1/completions", "/generate"])
def test_no_client_gets_more_tokens_than_the_server_allows(server, monkeypatch, route):
    monkeypatch.setattr(server, "max_new_tokens", 5)
    if route == "/generate":
        parameters = {**RANDOM, "max_new_tokens": 100, "details": True}
        details = server.post(route, inputs="Hello", parameters=parameters).json()["details"]
        assert (details["generated_tokens"], details["finish_reason"]) == (5, "length")
        return
    content = {"messages": user("Hello")} if route == CHAT else {"prompt": "Hello"}
    for limit in ({"max_tokens": 100}, {"max_completion_tokens": 100}, {}):
        reply = server.post(route, **content, **limit, **RANDOM).json()
        assert (reply["usage"]["completion_tokens"], reply["choices"][0]["finish_reason"]) == (5, "length")


@pytest.mark.parametrize("choice,tools", [("none", None), ("none", PYTHON), ("auto", None)])
def test_tool_choice_none_runs_no_tool(server, monkeypatch, choice, tools):
    calls = []
    monkeypatch.setattr(server.engine, "tool", lambda expression: calls.append(expression) or "11")
    reply = server.post(CHAT, messages=user("What is 5 + 6?"), tool_choice=choice, tools=tools).json()["choices"][0]
    assert reply["finish_reason"] != "tool_calls" and "tool_calls" not in reply["message"]
    assert calls == ([] if choice == "none" else ["5+6"])


def test_a_broken_model_is_a_503_and_an_event_of_the_stream(talker, server, monkeypatch):  # noqa: F811
    worker = Worker(lambda: Engine(*talker))
    worker.start()
    other = Server([worker], "x")

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


def test_a_gpu_that_is_too_small_gets_advice():
    def load():
        raise torch.OutOfMemoryError("CUDA out of memory")

    worker = Worker(load, "cpu")
    worker.start()
    with pytest.raises(InputError, match="memory of cpu is full: lower --max-batch-size"):
        Server([worker], "x")


def test_the_name_of_a_folder_does_not_say_where_it_is(talker, tmp_path):  # noqa: F811
    worker = Worker(lambda: Engine(*talker))
    worker.start()
    assert Server([worker], str(tmp_path)).name == "/".join(tmp_path.parts[-2:])
    worker.close()


# ---- the whole program ---------------------------------------------------------------------------------------------


def test_each_flag_of_the_command_reaches_its_setting(monkeypatch):
    calls, port = [], free_port()
    monkeypatch.setattr("nanochat_hf.serve.worker.open_workers", lambda *values: calls.append(values) or ["worker"])
    monkeypatch.setattr(
        "nanochat_hf.serve.server.Server", lambda *values: calls.append(values) or SimpleNamespace(app="app")
    )
    monkeypatch.setattr(limits, "run", lambda *values: calls.append(values))
    flags = f"--model x --port {port} --device cpu --max-batch-size 3 --max-queue-size 5 --max-new-tokens 7"
    cli.dispatch("serve", f"{flags} --request-timeout 9 --temperature 0.5 --top-k 11".split())
    assert calls == [("x", 3, 5, "cpu"), (["worker"], "x", 0.5, 11, 7, 9.0), ("app", "127.0.0.1", port)]


@pytest.mark.slow
@pytest.mark.parametrize("old_names", [False, True])
def test_the_script_serves_a_run_answers_curl_and_stops_at_a_signal(talker_folder, old_names):  # noqa: F811
    flags = ("--rows", "--max-waiting", "--max-seconds") if old_names else ("--max-batch-size", "--max-queue-size")
    port = free_port()
    words = ["--run-dir", talker_folder.parent, "--port", str(port), "--temperature", "0"]
    words += [word for flag in flags for word in (flag, "7")]
    process, address = start([sys.executable, "scripts/chat_web.py", *words], port, "/health", cwd=ROOT)
    try:
        assert httpx.get(address + "/info").json()["max_concurrent_requests"] == 14
        body = json.dumps({"messages": user("What is 5 + 6?"), "stream": True})
        command = ["curl", "-sN", address + CHAT, "-H", "Content-Type: application/json", "-d", body]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert output.rstrip().endswith("data: [DONE]") and '"tool": {"result"' in output
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(30) in (0, -signal.SIGINT, 130)


@pytest.mark.slow
def test_the_page_streams_shows_steps_and_text_as_text_and_stops(server, browser, monkeypatch):  # noqa: F811
    page = browser.new_page(bypass_csp=True)  # playwright evaluates its conditions
    page.goto(server.url)
    page.fill("textarea", "What is 12 * 34?")
    page.press("textarea", "Enter")
    page.wait_for_function("document.querySelector('.bot')?.textContent.includes('It is 408.')")
    page.click(".bot summary")
    assert page.inner_text(".bot summary") == "12*34 = 408" and "408" in page.inner_text(".bot details")
    picture(page, "page")
    page.click("#new")
    assert page.query_selector_all(".bot, .user") == []
    real = server.engine.advance
    monkeypatch.setattr(server.engine, "advance", lambda: (time.sleep(0.05), real())[1])
    page.fill("textarea", "<b>Hello</b><script>window.hacked = 1</script>")
    page.click("#send")
    page.wait_for_function("document.querySelector('.bot')?.textContent.length > 5")
    page.click("#send")  # now it says Stop
    page.wait_for_function("document.querySelector('#send').textContent == 'Send'")
    text = page.inner_text(".bot")
    page.wait_for_timeout(500)
    assert page.inner_text(".bot") == text and page.evaluate("window.hacked") is None
    assert page.inner_text(".user") == "<b>Hello</b><script>window.hacked = 1</script>"
    page.close()


def test_tgi_samples_among_all_tokens_and_greedily_unless_the_request_says_otherwise(server, monkeypatch):
    requests, start = [], server.start

    def spy(*arguments, **options):
        completions = start(*arguments, **options)
        requests.extend(completion.request for completion in completions)
        return completions

    monkeypatch.setattr(server, "start", spy)
    for parameters in ({}, {"do_sample": True}, {"do_sample": True, "top_k": 7}):
        server.post("/generate", inputs="Hello", parameters={**parameters, "max_new_tokens": 1})
    assert [(request.temperature, request.top_k) for request in requests] == [(0.0, 0), (1.0, 0), (1.0, 7)]
