"""The Gradio Space: its functions, its API, and the page in a real browser (headless Chromium through playwright).

The browser tests are skipped where playwright or Chromium is absent; their pictures go to runs/screenshots.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import gradio as gr
import httpx
import pytest
import torch
import yaml
from browser import browser, picture  # noqa: F401
from huggingface_hub import ChatCompletionStreamOutputDelta
from servers import free_port, start
from talker import QUESTIONS, chat_folder, talker, talker_folder  # noqa: F401

APP = Path(__file__).parent.parent / "spaces" / "chat" / "app.py"
HELLO = QUESTIONS["Hello"][0][1]


@pytest.fixture(scope="module")
def app(chat_folder):  # noqa: F811
    """The app as a module, with the talker as its model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MODEL_ID", str(chat_folder))
        spec = importlib.util.spec_from_file_location("space_app", APP)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module


def last(app, text, history=(), max_tokens=120):
    *_, final = app.respond(text, list(history), "", 0.0, 0, max_tokens)
    return final


# ---- functions -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("question", QUESTIONS)
def test_an_answer_grows_to_that_of_the_fast_engine_with_its_steps_apart(app, question):
    states = list(app.respond(question, [], "", 0.0, 0, 120))
    *step, text = QUESTIONS[question]
    if step:
        (_, call), (_, result) = step
        assert states[0][0]["metadata"] == {"title": app.STEP + "``", "status": "pending"}
        metadata = {"title": f"🧮 `{call} = {result}`", "status": "done"}
        expected = {"role": "assistant", "content": f"```\n{result}\n```", "metadata": metadata}
        assert states[-1][0] == expected
    assert states[-1][len(step) // 2 :] == [{"role": "assistant", "content": text[1]}] and len(states) > 8
    assert not any("\ufffd" in message["content"] for state in states for message in state)


STEP = {"title": "🧮 `5+6 = 11`", "status": "done"}


def test_history_with_steps_becomes_calls_and_results_again(app):
    history = [
        {"role": "user", "content": [{"type": "text", "text": "What is 5 + 6?"}], "metadata": None},
        {"role": "assistant", "content": [{"type": "text", "text": "```\n11\n```"}], "metadata": STEP},
        {"role": "assistant", "content": "It is 11.", "metadata": {"title": None}},
        {"role": "assistant", "content": "too long", "metadata": {"title": "⚠️"}},
    ]
    messages = app.messages_of(history, "And &lt;b&gt;?", "Be kind.", with_tools=True)
    assert [m["role"] for m in messages] == ["system", "user", "assistant", "tool", "assistant", "user"]
    text = app.tokenizer.apply_chat_template(messages, tokenize=False)
    turn = "<|python_start|>5+6<|python_end|><|output_start|>11<|output_end|>It is 11.<|assistant_end|>"
    assert turn in text and text.startswith("<|bos|><|user_start|>Be kind.\n\nWhat is 5 + 6?")
    assert [m["role"] for m in app.messages_of(history, "x", "", with_tools=False)] == ["user", "assistant", "user"]


@pytest.mark.parametrize(
    "text,escaped",  # ~ is the joiner
    [
        ("<b>x</b>", "<~b>x<~/b>"),
        ("a & b < c && d > e", "a & b < c && d > e"),
        ("`<i>` and <i>", "`<i>` and <~i>"),
        ("```\n<script>\n```\n\n<script>", "```\n<script>\n```\n\n<~script>"),
        ("&lt; &amp;lt; &#60; &#x3c; &", "&~lt; &~amp;lt; &~#60; &~#x3c; &"),
        ("<!-- x --> <?php <br/>", "<~!-- x --> <~?php <~br/>"),
        ("https://a.b/?c=1&d=2", "https://a.b/?c=1&d=2"),
        ("<~b> &~lt;", "<~~b> &~~lt;"),
        # where parsers of Markdown differ, or it is no code
        ("x ``` <b>", "x ``` <~b>"),
        ("`a\n<b>` <i>", "`a\n<~b>` <~i>"),
        ("\\`<b>\\` `<i>`", "\\`<~b>\\` `<~i>`"),
        ("a|b\n-|-\n`x|<b>`", "a|b\n-|-\n`x|<~b>`"),
        ("x\n  ```\n<b>", "x\n  ```\n<~b>"),
    ],
)
def test_tags_and_entities_are_shown_as_text_and_reach_the_model_unchanged_in_every_turn(app, text, escaped):
    text, escaped = (t.replace("~", app.JOINER) for t in (text, escaped))
    assert app.escape(text) == escaped and app.unescape(escaped) == text
    if app.JOINER in text:  # the browser's copy of a joiner of the user's own counts as ours
        return
    chatbot = app.show_tags(gr.Chatbot())
    history = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
    for _ in range(3):  # the browser's copy is sent, shown and sent again
        messages = app.messages_of(history, text, "", with_tools=True)
        assert [m["content"] for m in messages] == [text] * 3
        history = chatbot.preprocess(chatbot.postprocess(history))
        assert app.text_of(history[0]["content"]) == text  # asked again, or edited


def test_a_question_without_an_answer_is_not_asked_again(app):
    failed = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "x", "metadata": {"title": "⚠️"}}]
    ok = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    stopped = [{"role": "user", "content": "s"}]
    for history in (failed + ok, ok + failed, failed + ok + stopped, failed + failed + ok + failed + failed):
        for system in ([], ["Be kind."]):
            messages = app.messages_of(history, "next", "".join(system), with_tools=True)
            assert [m["content"] for m in messages] == [*system, "a", "b", "next"]
    assert [m["content"] for m in app.messages_of(failed, "next", "Be kind.", with_tools=True)] == ["Be kind.", "next"]


def test_a_long_conversation_is_shortened_keeps_its_system_message_and_one_message_may_be_too_long(app):
    history = [{"role": role, "content": "word " * 20} for _ in range(8) for role in ("user", "assistant")]
    messages = [{"role": "system", "content": "Be kind."}, *history, {"role": "user", "content": "?"}]
    ids = app.encode(messages, 8)
    text = app.tokenizer.decode(ids)
    assert text.startswith("<|bos|><|user_start|>Be kind.\n\nword") and len(ids) + 8 <= 256
    assert text.endswith("<|user_start|>?<|user_end|><|assistant_start|>") and last(app, "Hello", history, 8)
    text = "x y" * 50
    with pytest.raises(app.Problem) as problem:
        while app.encode([{"role": "user", "content": text}], 0):
            text += "x"
    assert problem.value.args == ("tokens", 256, 255)
    (message,) = last(app, "word " * 300)
    assert message["metadata"]["title"] == "⚠️" and "the model reads at most 255" in message["content"]


def brief(app, message) -> str:
    """A message of text, or "call: result", or "call ..." while the result is missing."""
    if "metadata" not in message:
        return message["content"]
    title = message["metadata"]["title"].removeprefix(app.STEP).strip("`")
    if message["metadata"]["status"] == "pending":
        return title + " ..."
    result = message["content"].strip("`\n")
    assert title.endswith(f" = {result}")
    return title.replace(" = ", ": ")


@pytest.mark.parametrize(
    "text,messages",
    [
        ("Hi", ["Hi"]),
        ("So <C>1+", ["So ", "1+ ..."]),
        ("<C>1+1</C>", ["1+1 ..."]),
        ("<C>1+1</C><R>2", ["1+1: 2"]),
        ("<C>1+1</C><R>2</R>Two.<|assistant_end|>", ["1+1: 2", "Two."]),
        ("a<C>1</C><R>1</R>b<C>2", ["a", "1: 1", "b", "2 ..."]),
        ("a<R>1</R>b", ["a1b"]),  # a result without a call is text
    ],
)
def test_an_answer_so_far_is_split_into_text_and_steps(app, text, messages):
    for short, token in zip(("<C>", "</C>", "<R>", "</R>"), app.tokenizer.convert_ids_to_tokens(range(512))[-4:]):
        text = text.replace(short, token)
    assert [brief(app, message) for message in app.show(app.parts_of(text))] == messages


def test_chunks_of_a_servers_stream_become_text_beside_steps(app):
    stream = [
        {"content": "So "}, {"tool": {"call": "1+"}}, {"tool": {"call": "1"}}, {"tool": {"result": "2"}},
        {"tool": {"result": "2"}}, {"content": ""}, {"content": "It is"}, {"content": " 22."},
        {"tool": {"call": "2"}}, {"tool": {"result": "2"}}, {"tool": {"call": "3"}},
    ]  # fmt: skip
    parts = []
    for chunk in stream:
        delta = ChatCompletionStreamOutputDelta.parse_obj_as_instance({"role": "assistant", **chunk})
        parts = app.add_delta(parts, delta)
    assert [brief(app, m) for m in app.show(parts)] == ["So ", "1+1: 22", "It is 22.", "2: 2", "3 ..."]


def test_a_server_is_tried_again_before_the_first_word_only(app, monkeypatch):
    calls, word = [], SimpleNamespace(choices=[SimpleNamespace(delta=Delta("word"))])

    def chat_completion(*args, **kwargs):
        calls.append(args)
        if len(calls) < 2:
            raise OSError("busy")
        yield word
        raise OSError("gone")

    monkeypatch.setattr(app, "InferenceClient", lambda **_: SimpleNamespace(chat_completion=chat_completion))
    monkeypatch.setattr(app.time, "sleep", lambda seconds: None)
    answer = app.remote_answer([], 0.0, 8)
    assert next(answer) == [("text", "word")]
    with pytest.raises(app.Problem) as problem:
        next(answer)
    assert len(calls) == 2 and problem.value.args == ("down", "gone")


def test_a_busy_server_is_named_as_such_in_the_visitors_language(app, monkeypatch):
    def chat_completion(*args, **kwargs):
        error = OSError("429 Too Many Requests for url: http://secret")
        error.response = SimpleNamespace(status_code=429)
        raise error

    monkeypatch.setattr(app, "InferenceClient", lambda **_: SimpleNamespace(chat_completion=chat_completion))
    monkeypatch.setattr(app.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(app, "ENDPOINT_URL", "http://secret")
    for header, words in (
        ("en-US,en", "Many people are asking"),
        ("ko-KR,ko", "질문하는 사람이 많습니다"),
        ("fr", "Many"),
    ):
        page = SimpleNamespace(headers={"accept-language": header})
        ((answer,),) = app.respond("Hello", [], "", 0.0, 0, 8, page)
        assert words in answer["content"] and "429" not in answer["content"] and not app.check(" ", page)["is_valid"]


def test_texts_are_the_same_in_both_languages():
    texts = yaml.safe_load((APP.parent / "texts.yaml").read_text(encoding="utf-8"))
    assert list(texts["en"]) == list(texts["ko"])
    for english, korean in zip(texts["en"].values(), texts["ko"].values(), strict=True):
        assert english.count("{") == korean.count("{") and english != korean
    page = (APP.parent / "head.html").read_text(encoding="utf-8")
    assert not re.findall(r"(?:src|href)=", page) and "innerHTML" not in page


def test_examples_are_those_of_the_checkpoint(app, monkeypatch):
    def shown():
        return [example["text"] for example in app.build().chatbot.examples]

    assert shown() == app.EXAMPLES and len(app.EXAMPLES) == 4
    monkeypatch.setitem(app.tokenizer.init_kwargs, "examples", ["하나", "둘"])
    assert shown() == ["하나", "둘"]


def test_what_a_browser_saved_comes_back_as_text_only(app):
    saved = [
        {
            "role": "user",
            "content": [{"type": "text", "text": "x"}, {"type": "file", "file": {"path": "/etc/passwd"}}],
        },
        {"role": "assistant", "content": "```\n11\n```", "metadata": STEP},
    ]
    history, state = app.restore(saved)
    assert history == state == [{"role": "user", "content": "x"}, saved[1]]
    assert app.restore([]) == ([], []) and "etc" not in str(app.demo.chatbot.postprocess(history))


class Delta(dict):
    def __init__(self, content):
        self.content = content


@pytest.mark.parametrize(
    "message,system,words",
    [
        (" ", "", "Write something"),
        (None, "", "Write something"),
        ({"text": "x"}, "", "Write something"),
        ("x" * 100_001, "", "The message has 100,001 characters; at most 100,000"),
        ("x y" * 300, "", "tokens; the model reads at most 255"),
        ("x", "x y" * 300, "tokens; the model reads at most 255"),
    ],
)
def test_what_is_too_long_or_empty_is_refused_beside_the_box_and_in_the_api(app, message, system, words):
    assert app.check("x " * 100)["is_valid"]
    if not system:
        refused = app.check(message)
        assert not refused["is_valid"] and words in refused["message"]
    ((answer,),) = app.respond(message, [], system, 0.0, 0, 8)
    assert answer["metadata"]["title"] == "⚠️" and words in answer["content"]


def test_numbers_of_the_api_are_brought_into_the_sliders_ranges(app, monkeypatch):
    calls, answer = [], app.local_answer
    monkeypatch.setattr(app, "local_answer", lambda *args: calls.append(args[1:]) or answer(*args))
    for numbers in ((-1, -5, -3), (None, None, None), (99, 0, 10**9)):
        list(app.respond("Hello", [], None, *numbers))
    assert calls == [(0.0, 0, 1), (0.0, 0, 1024), (2.0, 0, 1024)]


def test_eight_hundred_turns_are_shortened_at_once(app, monkeypatch):
    texts, apply = [], app.tokenizer.apply_chat_template
    monkeypatch.setattr(app.tokenizer, "apply_chat_template", lambda m, **o: texts.append(m) or apply(m, **o))
    turns = [{"role": role, "content": f"turn {i}"} for i in range(800) for role in ("user", "assistant")]
    turns.append({"role": "user", "content": "?"})
    ids = app.encode([{"role": "system", "content": "Be kind."}, *turns], 8)
    assert sum(map(len, texts)) < 80 and len(texts) > 5
    shown = texts[-1]
    longer = apply([shown[0], *turns[-len(shown) - 1 :]], add_generation_prompt=True, return_dict=False)
    assert len(ids) + 8 <= 256 < len(longer) + 8 + 2  # the turn before would not have fit; bos counts for every turn
    texts.clear()
    app.encode([{"role": "user", "content": "x" * 10**6}, *turns[-2:]], 8)
    assert all(len(str(messages)) < 1000 for messages in texts)  # a turn of megabytes is not even encoded


def test_a_large_model_runs_in_bfloat16_on_a_cpu_too(app, monkeypatch):
    assert app.model.dtype == torch.float32
    monkeypatch.setattr(app, "LARGE", 0)
    assert app.load()[0].dtype == torch.bfloat16


def test_a_generation_that_breaks_is_a_warning_and_one_that_is_left_ends(app, monkeypatch):
    def explode(*args, **kwargs):
        raise RuntimeError("out of luck")

    real, ended = app.model.generate, threading.Event()
    monkeypatch.setattr(app.model, "generate", explode)
    assert last(app, "Hello") == [app.warning("The answer broke off: out of luck")]

    def watched(*args, **kwargs):
        try:
            real(*args, **kwargs | {"min_new_tokens": 40})  # no end by chance
        except InterruptedError:
            ended.set()
            raise

    monkeypatch.setattr(app.model, "generate", watched)
    monkeypatch.setattr(app, "MAX_NEW_TOKENS", 5)
    assert len(list(app.respond("Hello", [], "", 5.0, 0, 200))) <= 5
    monkeypatch.setattr(app, "MAX_NEW_TOKENS", 1000)
    answer = app.respond("Hello", [], "", 5.0, 0, 200)
    next(answer)
    answer.close()
    assert ended.wait(10)


def test_front_matter_and_requirements_are_what_spaces_expects():
    meta = yaml.safe_load((APP.parent / "README.md").read_text().split("---\n")[1])
    assert meta["sdk"] == "gradio" and meta["app_file"] == "app.py" and meta["models"] == ["you/nanochat-d24"]
    assert meta["sdk_version"].split(".")[0] == gr.__version__.split(".")[0]
    assert "transformers" in (APP.parent / "requirements.txt").read_text()


# ---- the running app -------------------------------------------------------------------------------------------

SLOW_APP = """
import importlib.util, sys, time
spec = importlib.util.spec_from_file_location("space_app", sys.argv[1])
app = importlib.util.module_from_spec(spec)
spec.loader.exec_module(app)
put, answer = app.TokenStreamer.put, app.local_answer
app.TokenStreamer.put = lambda self, ids: (time.sleep(0.06), put(self, ids))  # time to press a button
app.local_answer = lambda messages, temperature, *rest: answer(messages, 0.0, *rest)
app.demo.launch(**app.LAUNCH, server_port=int(sys.argv[2]))
"""


@pytest.fixture(scope="module")
def space(chat_folder):  # noqa: F811
    port = free_port()
    words = [sys.executable, "-c", SLOW_APP, str(APP), str(port)]
    process, url = start(words, port, environment={"MODEL_ID": str(chat_folder), "MAX_QUEUE": "3"})
    yield url
    process.terminate()
    process.wait(20)


class Tab:
    """One visitor."""

    def __init__(self, chromium, url, **options):
        self.page = chromium.new_context(**options).new_page()
        self.page.goto(url, wait_until="domcontentloaded")
        self.page.wait_for_selector("textarea", timeout=60_000)
        self.page.wait_for_timeout(500)

    def send(self, text):
        box = self.page.locator("textarea").first
        box.fill(text)
        box.press("Enter")

    def texts(self, who="bot"):
        return [element.inner_text() for element in self.page.query_selector_all(f'[data-testid="{who}"]')]

    def press(self, label):
        self.page.locator(f'button[aria-label*="{label}" i]').last.click()

    def until(self, condition, seconds=30):
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, (self.texts("user"), self.texts())
            self.page.wait_for_timeout(50)


@pytest.mark.slow
def test_a_question_streams_its_answer_and_the_tool_step_opens(space, browser):  # noqa: F811
    tab = Tab(browser, space)
    tab.send("Hello")
    lengths = set()
    tab.until(lambda: (lengths.add(len("".join(tab.texts()))), "nothing at all." in "".join(tab.texts()))[1])
    assert len(lengths) > 5 and "🙂" in "".join(tab.texts())  # it came bit by bit
    tab.send("What is 12 * 34?")
    tab.until(lambda: "It is 408." in tab.texts())
    step = tab.page.locator(".thought-group .title")
    assert "12*34 = 408" in step.inner_text()  # closed
    step.click()
    tab.until(lambda: tab.page.get_by_text("408", exact=True).count() > 0)
    tab.page.wait_for_timeout(1000)  # it unfolds
    picture(tab.page, "space-tool")
    tab.page.reload()
    tab.until(lambda: "It is 408." in tab.texts() and tab.texts("user") == ["Hello", "What is 12 * 34?"])


@pytest.mark.slow
def test_the_text_box_has_focus_and_hint_after_an_answer_and_buttons_have_names(space, browser):  # noqa: F811
    tab = Tab(browser, space)
    for question, answer in (("What is 5 + 6?", "It is 11."), ("What is 12 * 34?", "It is 408.")):
        tab.send(question)
        tab.until(lambda answer=answer: answer in tab.texts())
        tab.until(lambda: tab.page.evaluate("document.activeElement.tagName") == "TEXTAREA")
        assert tab.page.locator("textarea").first.get_attribute("placeholder") == "Write a message"
    tab.until(lambda: tab.page.locator("[data-testid=submit-button]").get_attribute("aria-label") == "Send")
    for button in tab.page.query_selector_all("button"):
        assert (button.get_attribute("aria-label") or button.inner_text()).strip(), button.evaluate("b => b.outerHTML")
    width = tab.page.evaluate("document.querySelector('.bubble-wrap').clientWidth / 16")
    assert 45 < width < 55  # rem


@pytest.mark.slow
def test_stop_keeps_what_was_said_and_retry_undo_and_edit_work(space, browser):  # noqa: F811
    tab = Tab(browser, space)
    tab.send("Hello")
    tab.until(lambda: len("".join(tab.texts())) > 8)
    tab.page.locator("button.stop-button").click()
    tab.page.wait_for_timeout(1500)
    stopped = "".join(tab.texts())
    tab.page.wait_for_timeout(1000)
    assert "".join(tab.texts()) == stopped and "at all" not in stopped
    picture(tab.page, "space-stopped")
    tab.press("Retry")
    tab.until(lambda: "nothing at all." in "".join(tab.texts()))
    tab.page.wait_for_timeout(1500)
    tab.press("Edit")
    tab.page.locator('[data-testid="user"] textarea, textarea.edit-textarea, .message textarea').first.fill(
        "What is 5 + 6?"
    )
    tab.press("Submit")
    tab.until(lambda: "It is 11." in tab.texts() and tab.texts("user") == ["What is 5 + 6?"])
    tab.page.wait_for_timeout(1500)
    tab.press("Undo")
    tab.until(lambda: tab.texts() == [] and tab.page.locator("textarea").first.input_value() == "What is 5 + 6?")


@pytest.mark.slow
@pytest.mark.parametrize(
    "text",
    [
        "<script>window.hacked=1</script><img src=x onerror='window.hacked=2'><b>bold</b>",
        "Is &amp;lt; shown as &lt;? Is &copy; a sign? a < b && c > d",
        "x ``` <b>bold</b>",
    ],
)
def test_tags_and_entities_are_shown_as_text_and_scripts_do_not_run(space, browser, text):  # noqa: F811
    tab = Tab(browser, space)
    tab.send(text)
    tab.until(lambda: tab.texts("user") != [])
    tab.page.wait_for_timeout(1000)
    picture(tab.page, "space-tags")
    assert [shown.replace("\u2060", "") for shown in tab.texts("user")] == [text]
    assert tab.page.evaluate("window.hacked") is None and not tab.page.query_selector('[data-testid="user"] b')


@pytest.mark.slow
def test_a_message_beyond_the_context_is_refused_beside_the_box_and_the_chat_goes_on(space, browser):  # noqa: F811
    tab = Tab(browser, space)
    tab.send("x y" * 1000)
    tab.until(lambda: "tokens; the model reads at most 255." in tab.page.inner_text("body"))
    assert tab.texts("user") == []
    picture(tab.page, "space-too-long")
    tab.send("What is 5 + 6?")
    tab.until(lambda: "It is 11." in tab.texts())


@pytest.mark.slow
def test_two_tabs_at_once_get_each_their_own_answer(space, browser):  # noqa: F811
    one, two = Tab(browser, space), Tab(browser, space)
    one.send("Hello")
    two.send("What is 5 + 6?")
    two.until(lambda: "It is 11." in two.texts())
    one.until(lambda: "nothing at all." in "".join(one.texts()))
    assert "11" not in "".join(one.texts()) and "안녕" not in "".join(two.texts())


@pytest.mark.slow
def test_a_phone_in_korean_at_night(space, browser):  # noqa: F811
    screen = {"width": 390, "height": 844}
    tab = Tab(browser, space, locale="ko-KR", viewport=screen, color_scheme="dark", is_mobile=True, has_touch=True)
    tab.until(lambda: "메시지를 입력하세요" in (tab.page.locator("textarea").first.get_attribute("placeholder") or ""))
    tab.page.get_by_text("설정").click()
    tab.until(lambda: "시스템 메시지" in tab.page.inner_text("body"))
    picture(tab.page, "space-phone-settings")
    tab.send("What is 12 * 34?")
    tab.until(lambda: "It is 408." in tab.texts())
    tab.until(lambda: tab.page.locator("button[aria-label='보내기']").count() == 1)
    tab.page.evaluate("""() => { document.querySelector('.message-content .md').innerHTML = '<table><tr>'
        + '<td>Netherlands</td>'.repeat(9) + '</tr></table>' }""")
    assert tab.page.evaluate("document.querySelector('td').offsetHeight") < 60  # a word is not broken
    assert tab.page.evaluate("document.documentElement.scrollWidth") <= 390  # nothing sticks out sideways
    picture(tab.page, "space-phone")


@pytest.mark.slow
def test_the_api_streams_and_a_full_queue_says_so(space):
    from gradio_client import Client

    client = Client(space, verbose=False)
    arguments = ("", 0.0, 0, 120)
    upload = httpx.post(space + "/gradio_api/upload", files={"files": ("x.txt", b"x" * 100)})
    assert upload.status_code == 413
    assert client.predict("", api_name="/chat") == client.predict(None, api_name="/chat")  # the rest has defaults
    job = client.submit("What is 12 * 34?", *arguments, api_name="/chat")
    assert job.result()[-1]["content"] == "It is 408." and len(job.outputs()) > 5
    jobs = [client.submit("Hello", *arguments, api_name="/chat") for _ in range(8)]  # one runs, three may wait
    failures = []
    for job in jobs:
        try:
            job.result()
        except Exception as error:
            failures.append(str(error))
    assert 1 <= len(failures) < 8 and all("queue is full" in text.lower() for text in failures), failures


@pytest.mark.slow
def test_a_full_queue_is_explained_in_the_visitors_language(space, browser):  # noqa: F811
    from gradio_client import Client

    tab, client = Tab(browser, space, locale="ko-KR"), Client(space, verbose=False)
    jobs = [client.submit("Hello", "", 0.0, 0, 120, api_name="/chat") for _ in range(8)]
    tab.send("Hello")
    tab.until(lambda: "지금 질문하는 사람이 많습니다" in tab.page.inner_text("body"))
    for job in jobs:
        job.cancel()


@pytest.mark.slow
def test_it_talks_to_an_endpoint_and_says_when_it_is_gone(talker_folder):  # noqa: F811
    from gradio_client import Client

    script = Path(__file__).parent.parent / "scripts" / "chat_web.py"
    port = free_port()
    words = [sys.executable, str(script), "--run-dir", str(talker_folder.parent), "--temperature", "0"]
    server, endpoint = start([*words, "--port", str(port)], port, "/health")
    port = free_port()
    words = [sys.executable, "-c", SLOW_APP, str(APP), str(port)]
    process, url = start(words, port, environment={"ENDPOINT_URL": endpoint, "HF_HUB_OFFLINE": "0"})
    try:
        client = Client(url, verbose=False)
        step, text = client.predict("What is 12 * 34?", "", 0.0, 0, 120, api_name="/chat")
        assert "408" in step["content"] and text["content"] == "It is 408."
        server.terminate()
        server.wait(20)
        (message,) = client.predict("Hello", "", 0.0, 0, 120, api_name="/chat")
        assert "does not answer" in message["content"]
    finally:
        server.kill()
        process.terminate()
        process.wait(20)


@pytest.mark.slow
@pytest.mark.parametrize("name,words", [("/nowhere/at/all", "no model in"), ("", "set MODEL_ID")])
def test_without_a_model_the_app_ends_with_one_line(name, words, tmp_path):
    shutil.copytree(APP.parent, tmp_path / "chat")
    (tmp_path / "chat" / "README.md").write_text("---\ntitle: x\n---\n")
    command = [sys.executable, str(tmp_path / "chat" / "app.py")]
    done = subprocess.run(command, env={**os.environ, "MODEL_ID": name}, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr.strip().splitlines()[-1].startswith("error: ") and words in done.stderr


def test_an_answer_never_runs_beyond_the_context(app, monkeypatch):
    sizes = []

    def generate(inputs, max_new_tokens, **options):
        sizes.append(inputs.shape[1] + max_new_tokens)
        raise RuntimeError("enough")

    monkeypatch.setattr(app.model, "generate", generate)
    with pytest.raises(app.Problem, match="enough"):
        list(app.local_answer([{"role": "user", "content": "Hello"}], 0.0, 0, 1000))
    assert sizes == [256]  # the talker's context
