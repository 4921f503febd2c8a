"""The Gradio Space: the functions of its app; test_space_page has the running one."""

import importlib.util
import re
import threading
from pathlib import Path
from types import SimpleNamespace

import gradio as gr
import pytest
import torch
import yaml
from fastapi.testclient import TestClient
from huggingface_hub import ChatCompletionStreamOutputDelta
from talker import QUESTIONS

APP = Path(__file__).parent.parent / "spaces" / "chat" / "app.py"
HELLO = QUESTIONS["Hello"][0][1]


@pytest.fixture(scope="module")
def app(chat_folder):
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
        ("```\n<script>\n```\n\n<script>", "```\n<script>\n```\n\n<~script>"),
        ("&lt; &amp;lt; &#60; &#x3c; &", "&~lt; &~amp;lt; &~#60; &~#x3c; &"),
        ("https://a.b/?c=1&d=2", "https://a.b/?c=1&d=2"),
        ("<~b> &~lt;", "<~~b> &~~lt;"),
        # where parsers of Markdown differ, or it is no code
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


def test_a_server_is_tried_again_before_the_first_word_and_its_chunks_become_text_beside_steps(app, monkeypatch):
    stream = [
        {"content": "So "}, {"tool": {"call": "1+"}}, {"tool": {"call": "1"}}, {"tool": {"result": "2"}},
        {"tool": {"result": "2"}}, {"content": ""}, {"content": "It is"}, {"content": " 22."},
        {"tool": {"call": "2"}}, {"tool": {"result": "2"}}, {"tool": {"call": "3"}},
    ]  # fmt: skip
    calls, states = [], []

    def chat_completion(*args, **kwargs):
        calls.append(args)
        if len(calls) < 2:
            raise OSError("busy")
        for chunk in stream:
            delta = ChatCompletionStreamOutputDelta.parse_obj_as_instance({"role": "assistant", **chunk})
            yield SimpleNamespace(choices=[SimpleNamespace(delta=delta)])
        raise OSError("gone")

    monkeypatch.setattr(app, "InferenceClient", lambda **_: SimpleNamespace(chat_completion=chat_completion))
    monkeypatch.setattr(app.time, "sleep", lambda seconds: None)
    with pytest.raises(app.Problem) as problem:
        for parts in app.remote_answer([], 0.0, 8):
            states.append(parts)
    assert len(calls) == 2 and problem.value.args == ("down", "gone")
    assert [brief(app, m) for m in app.show(states[-1])] == ["So ", "1+1: 22", "It is 22.", "2: 2", "3 ..."]


def test_a_busy_server_is_named_as_such_in_the_visitors_language(app, monkeypatch):
    def chat_completion(*args, **kwargs):
        error = OSError("429 Too Many Requests for url: http://secret")
        error.response = SimpleNamespace(status_code=429)
        raise error

    monkeypatch.setattr(app, "InferenceClient", lambda **_: SimpleNamespace(chat_completion=chat_completion))
    monkeypatch.setattr(app.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(app, "ENDPOINT_URL", "http://secret")
    for header, words in (
        ("en-US,en", "Many people are asking"), ("ko-KR,ko", "질문하는 사람이 많습니다"), ("fr", "Many"),
    ):  # fmt: skip
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


def test_no_files_are_taken(app):
    client = TestClient(gr.routes.App.create_app(app.demo, app_kwargs=app.LAUNCH["app_kwargs"]))
    for content in (b"", b"x" * 100):
        assert client.post("/gradio_api/upload", files={"files": ("x.txt", content)}).status_code == 404
    assert client.get("/config").status_code == 200


def test_examples_are_those_of_the_checkpoint(app, monkeypatch):
    def shown():
        return [example["text"] for example in app.build().chatbot.examples]

    assert shown() == app.EXAMPLES and len(app.EXAMPLES) == 4
    monkeypatch.setitem(app.tokenizer.init_kwargs, "examples", ["하나", "둘"])
    assert shown() == ["하나", "둘"]


def test_what_a_browser_saved_comes_back_as_text_only(app):
    parts = [{"type": "text", "text": "x"}, {"type": "file", "file": {"path": "/etc/passwd"}}]
    step = {"role": "assistant", "content": "```\n11\n```", "metadata": STEP}
    assert app.restore([{"role": "user", "content": parts}, step]) == ([{"role": "user", "content": "x"}, step],) * 2
    assert app.restore([]) == ([], [])
    broken = [{}, None, 5, {"role": "user"}, {"role": "user", "content": None}, {"role": "x", "content": "y"}]
    for saved in (None, 5, {"a": 1}, broken, [{"role": [], "content": "y"}]):
        assert app.restore(saved) == ([], []) and len(app.messages_of(saved, "Hi", "", with_tools=True)) == 1
    for content in ([{"type": "text", "text": None}], [{"text": 5}, None]):
        for metadata in (5, "x", [], {"title": 5}, {"title": ["x"]}, {}):
            odd = [{"role": "user", "content": content, "metadata": metadata}, {"role": "assistant", "content": "y"}]
            assert (
                len(app.restore(odd)[0]) == 2
                and app.messages_of(odd, "Hi", "", with_tools=True)[-1]["content"] == "Hi"
            )


@pytest.mark.parametrize(
    "message,system,words",
    [
        (" ", "", "Write something"), (None, "", "Write something"), ({"text": "x"}, "", "Write something"),
        ("x" * 100_001, "", "The message has 100,001 characters; at most 100,000"),
        ("x y" * 300, "", "tokens; the model reads at most 255"),
        ("x", "x y" * 300, "tokens; the model reads at most 255"),
    ],
)  # fmt: skip
def test_what_is_too_long_or_empty_is_refused_beside_the_box_and_in_the_api(app, message, system, words):
    assert app.check("x " * 100)["is_valid"]
    if not system:
        refused = app.check(message)
        assert not refused["is_valid"] and words in refused["message"]
    ((answer,),) = app.respond(message, [], system, 0.0, 0, 8)
    assert answer["metadata"]["title"] == "⚠️" and words in answer["content"]


def test_numbers_of_the_api_are_brought_into_the_sliders_ranges(app, monkeypatch):
    calls = []
    monkeypatch.setattr(app, "local_answer", lambda *args: calls.append(args[1:]) or [])
    for numbers in ((-1, -5, -3), (None, None, None), (99, 0, 10**9)):
        list(app.respond("Hello", [], None, *numbers))
    assert calls == [(0.0, 0, 1), (0.0, 0, 1024), (2.0, 0, 1024)]


@pytest.mark.parametrize("number", [float("nan"), float("-inf"), 10**400, "5", [1], {"a": 1}])
def test_what_is_no_number_is_refused(app, number):
    for numbers in ((number, 5, 8), (0.5, number, 8), (0.5, 5, number)):
        ((answer,),) = app.respond("Hello", [], 5, *numbers)
        assert "must be numbers" in answer["content"]


def test_half_of_a_surrogate_pair_is_a_question_mark(app):
    (system, user) = app.messages_of([], "x\ud83d", "\ud800", with_tools=True)
    assert (system["content"], user["content"]) == ("?", "x?") and app.encode([system, user], 8)


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
    sizes, real, ended = [], app.model.generate, threading.Event()

    def explode(inputs, max_new_tokens, **options):
        sizes.append(inputs.shape[1] + max_new_tokens)
        raise RuntimeError("out of luck")

    monkeypatch.setattr(app.model, "generate", explode)
    assert last(app, "Hello", max_tokens=1000) == [app.warning("The answer broke off: out of luck")]
    assert sizes == [256]  # never beyond the talker's context

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
