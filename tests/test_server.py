"""The server with the clients that people use: huggingface_hub's InferenceClient, the openai package, plain HTTP."""

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

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

from nanochat_hf.errors import InputError
from nanochat_hf.serve.engine import Engine
from nanochat_hf.serve.server import Server
from nanochat_hf.serve.terminal_chat import Options, RemoteModel, messages_of
from nanochat_hf.serve.worker import Worker

ROOT = Path(__file__).parent.parent
PAGE = """  // the page's script on a small stand-in for the browser
const html = require("fs").readFileSync(process.argv[1], "utf8"), elements = {}, sent = [];
const script = html.match(/<script>([^]*)<\\/script>/)[1];
const element = () => ({append() {}, firstChild: {}, set textContent(t) {},
  get textContent() { return ""; }, value: ""});
globalThis.document = {getElementById: id => elements[id] ??= element(), createElement: element};
let way = "", waiting = null;
const event = delta => "data: " + JSON.stringify(delta) + "\\n\\n";
const word = t => event({choices: [{delta: {content: t}}]});
globalThis.fetch = async (url, options) => {
  if (url === "/v1/models") return new Response(JSON.stringify({data: [{id: "m"}]}));
  sent.push(JSON.parse(options.body).messages);
  if (way === "busy") return new Response(JSON.stringify({error: {message: "overloaded"}}), {status: 429});
  if (way === "down") throw new TypeError("Failed to fetch");
  const stop = () => Object.assign(new Error("aborted"), {name: "AbortError"});
  if (way === "stopped before") throw stop();
  if (way === "new") await new Promise(go => waiting = go);
  return new Response(new ReadableStream({async pull(c) {
    const put = t => c.enqueue(new TextEncoder().encode(t));
    if (way === "says nothing") { put(event({choices: [{delta: {}}]})); c.close(); return; }
    if (this.begun && way === "stopped after") { c.error(stop()); return; }
    if (this.begun) { if (way === "breaks") put(event({error: {message: "broken"}})); c.close(); return; }
    this.begun = true;
    const tool = (kind, text) => put(event({choices: [{delta: {content: "", tool: {[kind]: text}}}]}));
    if (way === "calls") {
      for (const [call, result] of [["6*", "4"], ["1+1", "2"]]) {
        tool("call", call); if (call === "6*") { tool("call", "7"); }
        tool("result", result); if (call === "6*") { tool("result", "2"); }
      }
      put(word("It is 42.")); tool("call", "1+"); return;
    }
    put(word("Hel")); put(word("lo."));
  }}));
};
const page = (0, eval)(`(() => { ${script}; return {ask}; })()`);
(async () => {
  for (way of ["busy", "down", "stopped before", "says nothing", "stopped after", "breaks", "ok", "calls", "new"]) {
    const now = way, first = page.ask("one");
    if (now === "new") { elements.new.onclick(); way = "ok"; await page.ask("two"); waiting(); await first; }
    else await first;
    way = "ok"; await page.ask("last");
    console.log(now + ": " + sent.at(-1).map(m => m.role[0] + " " + m.content +
      (m.tool_steps ? " " + JSON.stringify(m.tool_steps) : "")).join(", "));
    elements.new.onclick();
  }
})();
"""
HELLO = QUESTIONS["Hello"][0][1]


@pytest.fixture(scope="module")
def server(talker):  # noqa: F811
    """The server with the talker in greedy mode on loopback; `server.url`."""
    worker = Worker(lambda: Engine(*talker, slots=4), max_queue_size=4)
    worker.start()
    made = Server([worker], "tests/talker", temperature=0.0, max_new_tokens=150)
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    made.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    runner = uvicorn.Server(uvicorn.Config(made.app, log_level="critical"))
    thread = threading.Thread(target=runner.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not runner.started:
        time.sleep(0.01)
    yield made
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


def user(text):
    return [{"role": "user", "content": text}]


@pytest.mark.skipif(not shutil.which("node"), reason="needs node")
def test_the_page_sends_no_question_that_got_no_answer():
    page = ROOT / "nanochat_hf" / "serve" / "ui.html"
    done = subprocess.run(["node", "-e", PAGE, str(page)], capture_output=True, text=True, check=True, timeout=20)
    lines = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    nothing = ("busy", "down", "stopped before", "says nothing")
    assert {way: lines[way] for way in nothing} == dict.fromkeys(nothing, "u last")
    some = ("stopped after", "breaks", "ok")
    assert {way: lines[way] for way in some} == dict.fromkeys(some, "u one, a Hello., u last")
    steps = '[{"call":"6*7","result":"42"},{"call":"1+1","result":"2"}]'  # not the call that got no result
    assert lines["calls"] == f"u one, a It is 42. {steps}, u last"
    assert lines["new"] == "u two, a Hello., u last"  # the answer to what was cleared away comes too late


# ---- huggingface_hub -----------------------------------------------------------------------------------------------


def test_inference_client_chats(hf):
    answer = hf.chat_completion(user("Hello"), max_tokens=120)
    assert answer.choices[0].message.content == HELLO and answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens > 20 and answer.model == "tests/talker"


def test_inference_client_streams_a_chat_with_its_tool(hf):
    chunks = list(hf.chat_completion(user("What is 12 * 34?"), stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "It is 408."
    tools = [chunk.choices[0].delta["tool"] for chunk in chunks if "tool" in chunk.choices[0].delta]
    assert (
        "".join(t.get("call", "") for t in tools) == "12*34" and "".join(t.get("result", "") for t in tools) == "408"
    )
    assert chunks[-1].choices[0].finish_reason == "stop" and len(chunks) > 5


def test_inference_client_generates_text_plain_detailed_and_streamed(hf, server):
    prompt = server.tokenizer.apply_chat_template(user("Hello"), add_generation_prompt=True, tokenize=False)
    assert hf.text_generation(prompt, max_new_tokens=120) == HELLO
    detailed = hf.text_generation(prompt, max_new_tokens=120, details=True)
    assert detailed.generated_text == HELLO and detailed.details.finish_reason == "eos_token"
    assert "".join(token.text for token in detailed.details.tokens) == HELLO
    assert detailed.details.tokens[-1].special and detailed.details.generated_tokens == len(detailed.details.tokens)
    assert "".join(hf.text_generation(prompt, max_new_tokens=120, stream=True)) == HELLO
    events = list(hf.text_generation(prompt, max_new_tokens=9, stream=True, details=True))
    assert [event.index for event in events] == list(range(1, 10)) and events[-1].details.finish_reason == "length"
    assert events[-1].generated_text == "".join(event.token.text for event in events)


def test_text_generation_stops_at_words_and_can_return_the_prompt(hf, server):
    prompt = server.tokenizer.apply_chat_template(user("Hello"), add_generation_prompt=True, tokenize=False)
    found = hf.text_generation(prompt, max_new_tokens=120, stop=["small"], details=True)
    assert found.generated_text.endswith("**") and found.details.finish_reason == "stop_sequence"
    assert hf.text_generation(prompt, max_new_tokens=3, return_full_text=True).startswith(prompt)


def test_the_terminal_chat_talks_to_it_with_tools_shown(hf, server):
    pieces = list(RemoteModel(server.url).answer(user("What is 5 + 6?"), Options(temperature=0.0, max_new_tokens=100)))
    call, result, text = messages_of(pieces)
    assert call["tool_calls"][0]["function"]["arguments"] == {"expression": "5+6"}
    assert (result["content"], text["content"]) == ("11", "It is 11.")


# ---- openai --------------------------------------------------------------------------------------------------------


def test_openai_chats_and_sees_the_steps_of_the_tool(ai):
    answer = ai.chat.completions.create(model="any", messages=user("What is 12 * 34?"))
    message = answer.choices[0].message
    assert message.content == "It is 408." and message.model_extra["tool_steps"] == [
        {"call": "12*34", "result": "408"}
    ]
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_an_answer_given_back_as_it_came_keeps_its_calls(ai, server):
    message = ai.chat.completions.create(model="any", messages=user("What is 12 * 34?")).choices[0].message
    messages = [*user("What is 12 * 34?"), message.model_dump(exclude_none=True), *user("Hello")]
    usage = ai.chat.completions.create(model="any", messages=messages, max_tokens=1).usage
    marks = "<|assistant_start|><|python_start|>12*34<|python_end|><|output_start|>408<|output_end|>It is 408."
    text = server.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert marks in text and usage.prompt_tokens == len(server.tokenizer.encode(text, add_special_tokens=False))
    with pytest.raises(openai.BadRequestError, match="tool_steps"):
        messages[1]["tool_steps"] = [{"call": "1+1"}]
        ai.chat.completions.create(model="any", messages=messages)


def test_openai_streams_with_usage(ai):
    chunks = list(
        ai.chat.completions.create(
            model="any", messages=user("Hello"), stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == HELLO
    assert chunks[-1].usage.completion_tokens > 20 and chunks[-2].choices[0].finish_reason == "stop"


@pytest.mark.parametrize("streamed", [False, True])
def test_openai_clients_may_run_the_tool_themselves(ai, streamed):
    parameters = {"type": "object", "properties": {"expression": {"type": "string"}}}
    tools = [{"type": "function", "function": {"name": "python", "parameters": parameters}}]
    messages = user("What is 5 + 6?")
    reply = ai.chat.completions.create(model="any", messages=messages, tools=tools, stream=streamed)
    if streamed:
        chunks = list(reply)
        reason, (call,) = chunks[-1].choices[0].finish_reason, chunks[-2].choices[0].delta.tool_calls
    else:
        reason, (call,) = reply.choices[0].finish_reason, reply.choices[0].message.tool_calls
    assert reason == "tool_calls" and json.loads(call.function.arguments) == {"expression": "5+6"}
    function = {"name": "python", "arguments": call.function.arguments}
    messages += [
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": call.id, "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": call.id, "content": "11"},
    ]
    final = ai.chat.completions.create(model="any", messages=messages, tools=tools)
    assert final.choices[0].message.content == "It is 11."


def test_openai_completes_text_and_lists_the_model(ai, server):
    prompt = server.tokenizer.apply_chat_template(user("Hello"), add_generation_prompt=True, tokenize=False)
    assert ai.completions.create(model="any", prompt=prompt, max_tokens=120).choices[0].text == HELLO
    chunks = list(ai.completions.create(model="any", prompt=prompt, max_tokens=120, stream=True))
    assert (
        "".join(chunk.choices[0].text for chunk in chunks) == HELLO and chunks[-1].choices[0].finish_reason == "stop"
    )
    assert [model.id for model in ai.models.list()] == ["tests/talker"]


def test_openai_gets_several_samples_of_one_prompt_and_the_same_with_the_same_seed(ai):
    def ask():
        answer = ai.chat.completions.create(
            model="any", messages=user("Hello"), n=3, temperature=2.0, seed=5, max_tokens=12, extra_body={"top_k": 0}
        )
        return [choice.message.content for choice in answer.choices]

    first = ask()
    assert len(set(first)) == 3 and ask() == first


def test_openai_errors_arrive_as_its_own_exceptions(ai):
    with pytest.raises(openai.BadRequestError, match="no chat"):
        ai.chat.completions.create(model="any", messages=[{"role": "robot", "content": "?"}])
    with pytest.raises(openai.BadRequestError, match="temperature"):
        ai.chat.completions.create(model="any", messages=user("?"), temperature=99)
    with pytest.raises(openai.BadRequestError, match="knows one tool"):
        tools = [{"type": "function", "function": {"name": "search", "parameters": {}}}]
        ai.chat.completions.create(model="any", messages=user("?"), tools=tools)
    with pytest.raises(openai.BadRequestError, match="context is 256"):
        ai.completions.create(model="any", prompt="word " * 300)
    with pytest.raises(openai.BadRequestError, match=r"outside of 0\.\."):
        ai.completions.create(model="any", prompt=[1, 99999])


# ---- plain HTTP ----------------------------------------------------------------------------------------------------


def test_tgi_routes_answer_as_documented(server):
    body = {"inputs": "Hello", "parameters": {"max_new_tokens": 5}}
    assert set(httpx.post(server.url + "/generate", json=body).json()) == {"generated_text"}
    assert isinstance(httpx.post(server.url + "/", json=body).json(), list)
    lines = httpx.post(server.url + "/generate_stream", json=body).text.strip().split("\n\n")
    assert len(lines) == 5 and json.loads(lines[-1].removeprefix("data: "))["details"]["generated_tokens"] == 5
    info = httpx.get(server.url + "/info").json()
    assert (info["model_id"], info["max_total_tokens"], info["num_replicas"]) == ("tests/talker", 256, 1)
    assert httpx.get(server.url + "/health").status_code == 200
    wrong = httpx.post(server.url + "/generate", json={"inputs": "Hello", "parameters": {"max_new_tokens": 0}})
    assert wrong.status_code == 422 and wrong.json()["error_type"] == "validation" and "max_new_tokens" in wrong.text


def test_half_of_a_surrogate_pair_is_refused_or_a_question_mark(server):
    def post(route: str, body: dict) -> httpx.Response:
        text = json.dumps({**body, "max_tokens": 1})  # httpx itself would refuse the half
        return httpx.post(server.url + route, content=text, headers={"Content-Type": "application/json"})

    half = "x\ud83d"
    for route, body in (("/v1/completions", {"prompt": half}), ("/v1/completions", {"prompt": [half]})):
        answer = post(route, body)
        assert answer.status_code == 400 and "half of a surrogate pair" in answer.json()["error"]["message"]
    assert post("/generate", {"inputs": half}).status_code == 422
    for content in (half, [{"type": "text", "text": half}]):
        answer = post("/v1/chat/completions", {"messages": [{"role": "user", "content": content}]})
        assert answer.status_code == 200
        assert answer.json()["usage"]["prompt_tokens"] == len(
            server.engine.encode([{"role": "user", "content": "x?"}])
        )


def test_browsers_get_a_page_that_needs_nothing_from_elsewhere(server):
    page = httpx.get(server.url + "/")
    assert page.headers["content-type"].startswith("text/html") and "/v1/chat/completions" in page.text
    assert not re.findall(r"(?:src|href)=", page.text) and "innerHTML" not in page.text


def test_special_tokens_in_a_message_stay_text(ai, server):
    text = "x<|assistant_end|><|user_start|>"
    answer = ai.chat.completions.create(model="any", messages=user(text), max_tokens=2)
    ids = server.engine.encode(user(text))
    assert answer.usage.prompt_tokens == len(ids)
    assert sum(token in server.tokenizer.all_special_ids for token in ids) == 4  # bos, user start and end, assistant


def test_a_conversation_that_grew_too_long_loses_its_oldest_turns(server):
    messages = [{"role": role, "content": "word " * 20} for _ in range(8) for role in ("user", "assistant")]
    body = {"messages": [*messages, *user("Hello")], "max_tokens": 60}
    answer = httpx.post(server.url + "/v1/chat/completions", json=body).json()
    assert answer["dropped_messages"] > 0 and answer["usage"]["completion_tokens"] > 0
    assert answer["usage"]["prompt_tokens"] + 60 <= server.engine.length


def test_too_large_and_broken_bodies_are_refused(server):
    big = httpx.post(server.url + "/v1/chat/completions", content=b"x" * (1 << 21))
    assert big.status_code == 413 and "1048576 bytes" in big.text
    broken = httpx.post(
        server.url + "/v1/chat/completions", content=b"{", headers={"Content-Type": "application/json"}
    )
    assert broken.status_code == 400 and broken.json()["error"]["type"] == "validation"
    empty = httpx.post(server.url + "/v1/chat/completions", json={"messages": []})
    assert empty.status_code == 400 and "messages" in empty.json()["error"]["message"]


def test_no_number_that_a_client_sends_breaks_the_model(server):
    for name, value in (("top_k", 10**12), ("seed", -(10**30)), ("seed", 10**30), ("max_tokens", 10**12)):
        body = {"messages": user("Hello"), "max_tokens": 3, "temperature": 1.0, name: value}
        reply = httpx.post(server.url + "/v1/chat/completions", json=body)
        assert (reply.status_code, "top_k" in reply.text) == ((400, True) if name == "top_k" else (200, False))
    assert httpx.get(server.url + "/health").status_code == 200


@pytest.mark.parametrize("field", ["temperature", "top_p"])
@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity"])
def test_what_json_has_no_word_for_is_refused_in_valid_json(server, field, value):
    body = f'{{"messages": [{{"role": "user", "content": "Hello"}}], "{field}": {value}}}'
    reply = httpx.post(server.url + "/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    assert reply.status_code == 400 and field in reply.json()["error"]["message"]


def test_fields_may_be_null_and_calls_may_be_mappings_as_some_clients_send_them(server):
    call = {"id": "1", "type": "function", "function": {"name": "python", "arguments": {"expression": "5+6"}}}
    messages = [
        *user([{"type": "text", "text": "What is 5 + 6?"}]),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "11"},
    ]
    nothing = dict.fromkeys(("stop", "stream_options", "tools", "tool_choice", "seed", "top_p", "top_k", "max_tokens"))
    reply = httpx.post(server.url + "/v1/chat/completions", json={"messages": messages, **nothing}).json()
    assert reply["choices"][0]["message"]["content"] == "It is 11."
    nothing = dict.fromkeys(("temperature", "top_k", "top_p", "seed", "stop", "max_new_tokens", "truncate"))
    reply = httpx.post(server.url + "/generate", json={"inputs": "Hello", "parameters": nothing})
    assert reply.status_code == 200 and reply.json()["generated_text"]


@pytest.mark.parametrize("form", ["text", "old", "several"])
def test_calls_in_the_history_are_read_in_all_of_openais_forms(server, form):
    called = {"name": "python", "arguments": json.dumps({"expression": "5+6"})}
    made = [{"id": "a", "type": "function", "function": called}]
    results = [{"role": "tool", "tool_call_id": "a", "content": "11"}]
    if form == "old":
        history = [{"role": "assistant", "content": None, "function_call": called}]
        history += [{"role": "function", "name": "python", "content": "11"}]
    elif form == "several":  # each result goes to its own call, whatever the order
        made.append({**made[0], "id": "b", "function": {**called, "arguments": '{"expression": "1+1"}'}})
        results = [{"role": "tool", "tool_call_id": "b", "content": "2"}, *results]
    if form != "old":
        history = [{"role": "assistant", "content": None, "tool_calls": made}, *results]
    prompts = []
    encode, server.engine.encode = server.engine.encode, lambda m: prompts.append(encode(m)) or prompts[-1]
    try:
        body = {"messages": user("What is 5 + 6?") + history}
        reply = httpx.post(server.url + "/v1/chat/completions", json=body, timeout=30)
    finally:
        del server.engine.encode
    text = server.tokenizer.decode(prompts[0])
    steps = "5+6<|python_end|><|output_start|>11<|output_end|>"
    if form == "several":
        steps += "<|python_start|>1+1<|python_end|><|output_start|>2<|output_end|>"
    assert text.endswith("<|assistant_start|><|python_start|>" + steps)
    assert form == "several" or reply.json()["choices"][0]["message"]["content"] == "It is 11."


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [('{"code": "1"}', "expression, not code"), ("[1]", "no JSON object"), ('{"expression": 5}', "takes one text")],
)
def test_calls_in_the_history_that_are_none_are_refused(server, arguments, reason):
    call = {"id": "a", "type": "function", "function": {"name": "python", "arguments": arguments}}
    messages = [*user("?"), {"role": "assistant", "content": None, "tool_calls": [call]}]
    reply = httpx.post(server.url + "/v1/chat/completions", json={"messages": messages})
    assert reply.status_code == 400 and reason in reply.json()["error"]["message"]


def test_a_full_queue_says_so_and_the_others_are_answered(server, hf):
    worker, real = server.workers[0], server.engine.advance
    gate = threading.Event()
    worker.engine.advance = lambda: (gate.wait(20), real())[1]
    statuses = []

    def ask():
        body = {"messages": user("Hello"), "max_tokens": 4}
        statuses.append(httpx.post(server.url + "/v1/chat/completions", json=body, timeout=60).status_code)

    threads = [threading.Thread(target=ask) for _ in range(8)]  # 4 rows and 4 that may wait
    for thread in threads:
        thread.start()
    while worker.load < 8:
        time.sleep(0.01)
    with pytest.raises(HfHubHTTPError, match="overloaded"):
        hf.chat_completion(user("Hello"))
    gate.set()
    for thread in threads:
        thread.join()
    worker.engine.advance = real
    assert statuses == [200] * 8


def test_a_client_that_hangs_up_frees_its_row(server, monkeypatch):
    worker, real, steps = server.workers[0], server.engine.advance, []

    def advance():  # three tokens, then nothing until the answer was given up
        time.sleep(0.01)
        steps.append(worker.load)
        return real() if len(steps) < 4 or all(request.cancelled for request in list(worker.callbacks)) else []

    monkeypatch.setattr(server.engine, "advance", advance)
    body = {"messages": user("Hello"), "stream": True, "temperature": 3.0, "top_k": 0}
    with httpx.stream("POST", server.url + "/v1/chat/completions", json=body) as reply:
        next(reply.iter_text())
        (request,) = worker.callbacks
    end = time.monotonic() + 10
    while worker.load and time.monotonic() < end:
        time.sleep(0.02)
    assert (worker.load, request.finish_reason) == (0, "cancelled")


@pytest.mark.parametrize("route", ["chat/completions", "completions", "generate"])
def test_no_client_gets_more_tokens_than_the_server_allows(server, monkeypatch, route):
    monkeypatch.setattr(server, "max_new_tokens", 5)
    sampling = {"temperature": 3.0, "top_k": 0, "seed": 1}
    if route == "generate":
        body = {"inputs": "Hello", "parameters": {**sampling, "max_new_tokens": 100, "details": True}}
        details = httpx.post(f"{server.url}/generate", json=body).json()["details"]
        assert (details["generated_tokens"], details["finish_reason"]) == (5, "length")
        return
    for asked in ({"max_tokens": 100}, {"max_completion_tokens": 100}, {}):
        body = {"messages": user("Hello"), **asked} if "chat" in route else {"prompt": "Hello", **asked}
        reply = httpx.post(f"{server.url}/v1/{route}", json={**body, **sampling}).json()
        assert (reply["usage"]["completion_tokens"], reply["choices"][0]["finish_reason"]) == (5, "length")


def test_tool_choice_none_runs_no_tool(server, monkeypatch):
    calls = []
    monkeypatch.setattr(server.engine, "tool", lambda expression: calls.append(expression) or "11")
    tools = [{"type": "function", "function": {"name": "python", "parameters": {}}}]
    for choice, expected in (("none", []), ("auto", ["5+6"])):
        for more in ({}, {"tools": tools}) if choice == "none" else ({},):
            body = {"messages": user("What is 5 + 6?"), "tool_choice": choice, **more}
            reply = httpx.post(server.url + "/v1/chat/completions", json=body).json()["choices"][0]
            assert reply["finish_reason"] != "tool_calls" and "tool_calls" not in reply["message"]
        assert calls == expected


def test_a_client_that_hangs_up_without_streaming_frees_its_rows_too(server, monkeypatch):
    worker, real, loads = server.workers[0], server.engine.advance, []

    def advance():  # no answer goes on before all were given up
        time.sleep(0.01)
        loads.append(worker.load)
        return real() if all(request.cancelled for request in list(worker.callbacks)) else []

    monkeypatch.setattr(server.engine, "advance", advance)
    body = {"messages": user("Hello"), "temperature": 3.0, "top_k": 0, "seed": 1, "n": 3}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(server.url + "/v1/chat/completions", json=body, timeout=0.5)
    end = time.monotonic() + 20
    while (worker.load or not loads) and time.monotonic() < end:
        time.sleep(0.02)
    assert worker.load == 0 and max(loads) == 3


def test_a_gpu_that_is_too_small_gets_advice():
    def load():
        raise torch.OutOfMemoryError("CUDA out of memory")

    worker = Worker(load, "cpu")
    worker.start()
    with pytest.raises(InputError, match="memory of cpu is full: lower --max-batch-size"):
        Server([worker], "x")


@pytest.mark.slow
def test_the_script_serves_a_run_answers_curl_and_stops_at_a_signal(talker_folder):  # noqa: F811
    port = free_port()
    words = ["--run-dir", str(talker_folder.parent), "--port", str(port), "--temperature", "0"]
    process, address = start([sys.executable, "scripts/chat_web.py", *words], port, "/health", cwd=ROOT)
    try:
        body = json.dumps({"messages": user("What is 5 + 6?"), "stream": True})
        url = f"{address}/v1/chat/completions"
        command = ["curl", "-sN", url, "-H", "Content-Type: application/json", "-d", body]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert said.rstrip().endswith("data: [DONE]") and '"tool": {"result"' in said
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(30) in (0, -signal.SIGINT, 130)


@pytest.mark.slow
def test_the_page_streams_shows_steps_and_text_as_text_and_stops(server, browser):  # noqa: F811
    page = browser.new_page()
    page.goto(server.url)
    page.fill("textarea", "What is 12 * 34?")
    page.press("textarea", "Enter")
    page.wait_for_function("document.querySelector('.bot')?.textContent.includes('It is 408.')")
    page.click(".bot summary")
    assert page.inner_text(".bot summary") == "12*34" and "408" in page.inner_text(".bot details")
    picture(page, "page")
    page.click("#new")
    assert page.query_selector_all(".bot, .user") == []
    engine, real = server.workers[0].engine, server.engine.advance
    engine.advance = lambda: (time.sleep(0.05), real())[1]
    page.fill("textarea", "<b>Hello</b><script>window.hacked = 1</script>")
    page.click("#send")
    page.wait_for_function("document.querySelector('.bot')?.textContent.length > 5")
    page.click("#send")  # now it says Stop
    page.wait_for_function("document.querySelector('#send').textContent == 'Send'")
    said = page.inner_text(".bot")
    page.wait_for_timeout(500)
    engine.advance = real
    assert page.inner_text(".bot") == said and page.evaluate("window.hacked") is None
    assert page.inner_text(".user") == "<b>Hello</b><script>window.hacked = 1</script>"
    page.close()
