"""The terminal chat: what the screen shows, what is remembered, commands, Ctrl-C, and servers that fail."""

import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import httpx
import pytest
from huggingface_hub import ChatCompletionStreamOutputDelta, get_session
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from prompt_toolkit.document import Document
from rich.console import Console
from rich.markdown import Markdown

from nanochat_hf.errors import InputError
from nanochat_hf.run import save_json
from nanochat_hf.serve import StreamChunk, terminal_chat
from nanochat_hf.serve.engine import Engine
from nanochat_hf.serve.terminal_chat import Chat, LocalModel, Options, RemoteModel, messages_of, with_piped

ROOT = Path(__file__).parent.parent


@pytest.fixture
def chat(talker):
    """A chat on a plain terminal of 80 columns that writes into `chat.console.file`."""
    console = Console(file=io.StringIO(), width=80, highlight=False)
    return Chat(LocalModel(Engine(*talker), "test"), Options(temperature=0.0, max_new_tokens=120), console=console)


def shown(chat):
    return chat.console.file.getvalue()


def test_an_answer_is_shown_and_remembered_as_the_tokens_that_were_generated(chat):
    chat.ask("What is 5 + 6?")
    assert "⚙ python 5+6 → 11" in shown(chat) and "It is 11." in shown(chat)
    user, call, result, text = chat.messages
    assert user == {"role": "user", "content": "What is 5 + 6?"}
    assert call["tool_calls"][0]["function"] == {"name": "python", "arguments": {"expression": "5+6"}}
    assert (result["role"], result["content"], text["content"]) == ("tool", "11", "It is 11.")
    engine = chat.model.engine
    prompt = engine.tokenizer.decode(engine.encode([*chat.messages, {"role": "user", "content": "and?"}]))
    turn = "<|python_start|>5+6<|python_end|><|output_start|>11<|output_end|>It is 11.<|assistant_end|>"
    assert f"<|assistant_start|>{turn}<|user_start|>and?" in prompt


class Script:
    """A model whose answer is these chunks."""

    name, count = "script", 0

    def __init__(self, chunks):
        self.chunks, self.prompts = chunks, []

    def answer(self, messages, options):
        self.prompts.append([message["content"] for message in messages])
        yield from self.chunks
        if not self.chunks:
            raise KeyboardInterrupt


def words(text):
    return [StreamChunk(word) for word in re.findall(r"\s+|\S+", text)]


def draw(chunks, **options):
    """(what a terminal shows of an answer, the chat)."""
    chat = Chat(Script(chunks), Options(), console=Console(file=io.StringIO(), **options))
    chat.ask("talk")
    return shown(chat), chat


def on_a_terminal(output, height):
    """The lines that a terminal of `height` rows has in its window and its scrollback after `output`."""
    lines, row, column = [""], 0, 0
    for code, text in re.findall(r"(\x1b\[[0-9;?]*[A-Za-z]|\n|\r)|([^\x1b\n\r]+)", output):
        if code == "\n":
            row, column = row + 1, 0
            lines += [""] * (row == len(lines))
        elif code == "\r":
            column = 0
        elif code.endswith("A"):
            row = max(row - int(code[2:-1] or 1), len(lines) - height, 0)  # the cursor never leaves the window
        elif code == "\x1b[2K":
            lines[row] = ""
        else:
            lines[row] = lines[row][:column].ljust(column) + text + lines[row][column + len(text) :]
            column += len(text)
    return [line.rstrip() for line in lines]


@pytest.mark.parametrize("text", [
    "One\ntwo.\n\nThree four.\n\n- a\n- b\n\n```python\nx = 1\n\ny = 2\n```\n\nEnd.",
    "1. one\n\n2. two\n\n   more of it\n\n3. three\n\n**Bold** end",
    "# Title\n\nWords:\n- a\n- b\n\n> said\n\n~~~\n```\n\n~~~\n",
    "Rows:\n\n```\n" + "".join(f"row {i}\n" for i in range(30)) + "```\nEnd.\n",  # taller than the window
])  # fmt: skip
def test_an_answer_that_grew_looks_like_one_drawn_at_once(text):
    lines = [line[2:] for line in on_a_terminal(draw(words(text), width=40, height=12, force_terminal=True)[0], 12)]
    at_once = Console(file=io.StringIO(), width=38)
    at_once.print(Markdown(text))
    expected = [line.rstrip() for line in at_once.file.getvalue().splitlines()]
    size = len(expected)
    assert lines[:size] == expected and "tokens" in lines[size] and not any(lines[size + 1 :])


def test_the_newest_lines_of_a_block_taller_than_the_window_are_in_view():
    console = Console(file=io.StringIO(), width=40, height=12, force_terminal=True)
    screen = terminal_chat.Screen(console)
    for chunk in words("```\n" + "".join(f"row {i}\n" for i in range(30))):
        screen.show(chunk)
    assert "   row 29" in on_a_terminal(console.file.getvalue(), 12)
    screen.close()


@pytest.mark.parametrize("terminal", [True, False])
def test_two_calls_in_a_row_are_on_two_lines(terminal):
    steps = [("1+1", "call"), ("2", "result"), ("2+2", "call"), ("4", "result"), ("Four.", "text")]
    output, chat = draw([StreamChunk(*step) for step in steps], width=40, force_terminal=terminal)
    lines = [line.strip() for line in on_a_terminal(output, 25)]
    assert lines[:3] == ["⚙ python 1+1 → 2", "⚙ python 2+2 → 4", "Four."]
    assert [message["role"] for message in chat.messages] == ["user", *["assistant", "tool"] * 2, "assistant"]


def test_the_system_message_is_sent_and_a_question_without_an_answer_forgotten():
    chat = Chat(Script([StreamChunk("b")]), Options(), "Be kind.", Console(file=io.StringIO(), force_terminal=True))
    chat.ask("a")
    chat.model.chunks = []
    chat.ask("c")
    chat.ask("d")
    assert chat.model.prompts == [["Be kind.", "a"], ["Be kind.", "a", "b", "c"], ["Be kind.", "a", "b", "d"]]


def test_a_given_seed_is_used_also_if_it_is_zero_and_else_another_each_time(chat, monkeypatch):
    seeds, submit = [], chat.model.engine.submit
    monkeypatch.setattr(chat.model.engine, "submit", lambda request: seeds.append(request.seed) or submit(request))
    for chat.options.seed in (0, 7, None, None):
        chat.ask("Hello")
    assert seeds[:2] == [0, 7] and len(set(seeds)) == 4
    chat.options.max_new_tokens = 5
    chat.ask("Hello")
    assert chat.model.count == 5


def test_ctrl_c_stops_the_answer_and_not_the_program(chat):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    real, count = chat.model.engine.advance, []

    def advance():
        count.append(1)
        if len(count) == 10:
            os.kill(os.getpid(), signal.SIGINT)
        return real()

    chat.model.engine.advance = advance
    chat.console = Console(file=io.StringIO(), width=80, force_terminal=True)
    try:
        chat.ask("Hello")
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert "stopped" in shown(chat) and len(count) < 20
    assert chat.messages[1]["content"].startswith("안녕") and len(chat.messages[1]["content"]) < 15
    chat.model.engine.advance = real
    chat.messages = []
    chat.ask("What is 5 + 6?")
    assert chat.messages[-1]["content"] == "It is 11."


OPTIONS = "temperature={} top_k={} top_p=1.0 max_new_tokens=120 seed={}"
REPLIES = {  # what a line of the chat shows; options that it shows are those from then on
    "/help": terminal_chat.HELP, "/tmep 0.5": "no command /tmep; did you mean '/temp'?",
    "/temp hot": "temperature is 'hot': it must be a number from 0 to 5",
    "/temp": OPTIONS.format(0.0, 50, None), "/temp 0.25": OPTIONS.format(0.25, 50, None),
    "/set": OPTIONS.format(0.0, 50, None), "/set top_k=3 seed=7": OPTIONS.format(0.0, 3, 7),
    "/set top_k 3": OPTIONS.format(0.0, 3, None),
    "/set tempreature=1": "unknown key 'tempreature'; did you mean 'temperature'?",
    "/retry": "nothing was asked yet", "/system": "system: (none)", "/system  Be kind. ": "system: Be kind. ",
    "/save": "say where: /save FILE",
    "/save /dev/null/x": "cannot write /dev/null/x: File exists; make room there or choose another place",
}  # fmt: skip


@pytest.mark.parametrize("line", REPLIES)
def test_commands_answer_in_one_line(chat, line):
    chat.console.width = 200
    try:
        assert chat.command(line)
    except InputError as error:
        chat.note(str(error))
    assert shown(chat) == f"{REPLIES[line]}\n"
    options = OPTIONS.format(chat.options.temperature, chat.options.top_k, chat.options.seed)
    assert options == (REPLIES[line] if "top_p=" in REPLIES[line] else OPTIONS.format(0.0, 50, None))


def test_quit_leaves_reset_and_system_forget_save_writes(chat, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert not chat.command("/quit")
    chat.ask("What is 5 + 6?")
    chat.command("/save ~/talk.json")
    assert json.loads((tmp_path / "talk.json").read_text()) == {"model": "test", "messages": chat.messages}
    assert "4 messages written to ~/talk.json" in shown(chat)
    chat.command("/reset")
    assert chat.messages == []
    chat.ask("Hello")
    chat.command("/system Be kind.")
    assert chat.messages == [] and chat.system == "Be kind."
    chat.ask("Hello")  # the system message goes along without being remembered as a turn
    assert chat.messages[0] == {"role": "user", "content": "Hello"}
    chat.command("/system")  # shows it only
    assert len(chat.messages) == 2 and shown(chat).endswith("system: Be kind.\n")
    chat.command("/save ~/talk.json")
    for text in ("my notes", '{"a": 1}'):
        (tmp_path / "notes.md").write_text(text)
        with pytest.raises(InputError, match="choose another FILE"):
            chat.command("/save ~/notes.md")
        assert (tmp_path / "notes.md").read_text() == text
    opening = [{"role": "system", "content": "Be kind."}]
    assert json.loads((tmp_path / "talk.json").read_text())["messages"] == opening + chat.messages


@pytest.mark.parametrize("terminal", [False, True])
def test_a_wrong_command_ends_a_pipe_and_is_told_on_a_terminal(monkeypatch, terminal):
    chat = Chat(Script([StreamChunk("b")]), Options(), console=Console(file=io.StringIO(), force_terminal=terminal))
    monkeypatch.setattr("builtins.input", Mock(side_effect=[" a ", " ", "/nosuch", "c", EOFError]))
    with nullcontext() if terminal else pytest.raises(InputError, match="no command /nosuch"):
        chat.run()
    assert chat.model.prompts == [["a"], ["a", "b", "c"]][: 1 + terminal]
    assert "error: no command /nosuch" in shown(chat) if terminal else shown(chat) == "b\n"
    assert [draw([StreamChunk(text)])[0] for text in ("a", "a\n", "\na")] == ["a\n", "a\n", "\na\n"]


def test_the_lines_around_an_answer_on_a_terminal(monkeypatch):
    """Title, rate, the note about Ctrl-C at the prompt; Ctrl-D ends the line, /quit has done so."""
    clock = iter(range(0, 99, 3))
    monkeypatch.setattr(terminal_chat.time, "perf_counter", lambda: next(clock))
    for last in (EOFError, "/quit"):
        console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None)
        chat = Chat(Script([StreamChunk("b")]), Options(), console=console)
        chat.model.count = 12
        monkeypatch.setattr("builtins.input", Mock(side_effect=["a", KeyboardInterrupt, last]))
        chat.run()
        lines = [line for line in on_a_terminal(shown(chat), 25) if line]
        assert lines[0] == "nanochat script · /help for commands"
        assert lines[-2:] == ["  12 tokens, 4 a second", "(/quit or Ctrl-D leaves)"]
        assert shown(chat).endswith("leaves)\n\n" if last is EOFError else "leaves)\n")
    with pytest.raises(KeyboardInterrupt):  # in a pipe it ends the program
        chat.console = Console(file=io.StringIO())
        monkeypatch.setattr("builtins.input", Mock(side_effect=KeyboardInterrupt))
        chat.run()


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_a_pipe_that_is_not_utf8_is_one_line(chat, monkeypatch, errors):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), "utf-8", errors))
    with pytest.raises(InputError, match="the input is not UTF-8"):
        chat.run()


def test_a_retry_replaces_the_last_answer_and_keeps_it_where_there_is_no_new_one():
    chat = Chat(Script([StreamChunk("b")]), Options(), console=Console(file=io.StringIO(), force_terminal=True))
    for text in ("a", "c"):
        chat.ask(text)
    chat.model.chunks = [StreamChunk("d")]
    assert chat.command("/retry") and chat.model.prompts[-1] == ["a", "b", "c"]
    assert [message["content"] for message in chat.messages] == ["a", "b", "c", "d"]
    chat.model.chunks = []  # stopped before its first word
    assert chat.command("/retry") and chat.messages[-1]["content"] == "d"
    chat.ask("e", before=[])
    assert chat.model.prompts[-1] == ["e"]


def test_beside_a_pipe_stdout_has_the_answer_and_stderr_the_rest(capsys, monkeypatch):
    chat = Chat(Script([StreamChunk("1+1", "call"), StreamChunk("2", "result"), StreamChunk("**Two.**")]), Options())
    reader, writer = os.pipe()
    monkeypatch.setattr("sys.stdin", os.fdopen(reader))
    monkeypatch.setattr("nanochat_hf.serve.terminal_chat.PIPE_SECONDS", 0)
    assert with_piped("this") == "this"  # nobody writes, and nobody closes it
    with monkeypatch.context() as patch:
        for patch.stdin in (None, SimpleNamespace(isatty=lambda: True)):
            patch.setattr("sys.stdin", patch.stdin)
            assert with_piped("this") == "this"
    os.write(writer, b"and\nmore \xff\n")
    os.close(writer)
    chat.ask(with_piped("this"))
    chat.command("/reset")
    assert chat.model.prompts == [["this\n\nand\nmore \ufffd"]]
    shown = capsys.readouterr()
    assert shown.out == "**Two.**\n" and "⚙ python 1+1 → 2" in shown.err and "forgotten" in shown.err


def test_a_chat_longer_than_the_context_goes_on_without_its_oldest_turns(chat):
    chat.messages = [{"role": role, "content": "word " * 60} for _ in range(8) for role in ("user", "assistant")]
    chat.ask("What is 5 + 6?")
    assert len(chat.messages) > 18 and "error" not in shown(chat)


def test_a_result_without_a_call_is_only_text_and_other_servers_get_no_calls():
    chunks = [StreamChunk("So "), StreamChunk("7", "result"), StreamChunk("!")]
    assert messages_of(chunks) == [{"role": "assistant", "content": "So 7!"}]
    call, last = messages_of([StreamChunk("1", "call"), *chunks])
    assert call["tool_calls"] and last == {"role": "assistant", "content": "So 7!"}
    pieces = [StreamChunk("Let me see. "), StreamChunk("1+1", "call"), StreamChunk("2", "result"), StreamChunk("Two.")]
    assert terminal_chat.without_tools(messages_of(pieces)) == [{"role": "assistant", "content": "Let me see. Two."}]


def test_a_local_model_asks_for_half_a_context_at_most_and_a_second_ctrl_c_does_not_wait():
    rooms, after = [], []

    def stream_request(request):
        for number in range(3):
            yield StreamChunk("a")
            after.append((number, request.cancelled))
            os.kill(os.getpid(), signal.SIGINT)

    engine = SimpleNamespace(length=64, stream_request=stream_request)
    engine.encode_last = lambda messages, room: (rooms.append(room) or [1], None)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        for room in (31, 33):
            with pytest.raises(KeyboardInterrupt):
                list(LocalModel(engine, "x").answer([], Options(max_new_tokens=room)))
    finally:
        signal.signal(signal.SIGINT, before)
    assert rooms == [31, 32] and after == [(0, False), (1, True)] * 2


def test_lines_are_read_with_a_private_history_where_it_can_be_kept(tmp_path, monkeypatch):
    session = lambda message, **options: SimpleNamespace(prompt=(message.value, options))  # noqa: E731
    monkeypatch.setattr(terminal_chat, "PromptSession", session)
    monkeypatch.setenv("HOME", str(tmp_path))
    notes, places = [], {"": tmp_path / ".local/state", str(tmp_path / "x"): tmp_path / "x", "/dev/null": None}
    for state, folder in places.items():
        monkeypatch.setenv("XDG_STATE_HOME", state)
        prompt, options = terminal_chat.line_reader("> ", ["/help", "/set seed="], lambda *words: notes.append(words))
        (only,) = options["completer"].get_completions(Document("/set s"), None)
        assert (prompt, only.text, options["complete_while_typing"]) == ("> ", "/set seed=", False)
        if folder:
            path = folder / "nanochat" / "history"
            assert options["history"].filename == path and path.stat().st_mode & 0o777 == 0o600
            assert path.parent.stat().st_mode & 0o777 == 0o700 and not notes
    assert options["history"] is None and [text for text, _ in notes] == ["the history is not kept: {}"]


def test_a_model_is_opened_here_or_at_a_server_and_a_base_model_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Engine, "from_pretrained", lambda *words: words)
    for name, metrics in (("base", {"depth": 4}), ("sft", {"rows": 4})):
        save_json(tmp_path / name / "metrics.json", metrics)
        model = terminal_chat.open_model(str(tmp_path / name), None, "cpu")
        assert (model.name, model.engine) == (str(tmp_path / name), (str(tmp_path / name), "cpu"))
        assert ("base is a base model" in capsys.readouterr().err) == (name == "base")
    remote = terminal_chat.open_model("m", "http://127.0.0.1:9")
    assert (remote.name, remote.model) == ("http://127.0.0.1:9", "m")


@pytest.mark.parametrize("reply,line", [
    ({"json": {"error": {"message": "too long"}}}, "400, too long"), ({"json": {"error": "busy"}}, "400, busy"),
    ({"json": ["x"]}, "it broke"), ({"json": {}}, "it broke"), ({"text": "<html>"}, "it broke"), (None, "it broke"),
])  # fmt: skip
def test_a_failed_request_is_explained_by_the_server_or_the_client(reply, line):
    error = OSError("it\n  broke")
    if reply is not None:
        error.response = httpx.Response(400, **reply)
    assert terminal_chat.explain(error) == line and terminal_chat.explain(OSError()) == "OSError"


class Replies:
    """A client of a server that gives these replies: words, or the status of an error in the end."""

    def __init__(self, *replies):
        self.replies, self.requests = list(replies), 0

    def chat_completion(self, *args, **options):
        self.requests, self.options = self.requests + 1, options
        for word in self.replies.pop(0):
            if isinstance(word, int):
                request = httpx.Request("POST", "http://x")
                response = httpx.Response(word, json={"error": "the queue is full"}, request=request)
                raise HfHubHTTPError("failed", response=response)
            delta = ChatCompletionStreamOutputDelta.parse_obj_as_instance({"role": "assistant", "content": word})
            yield SimpleNamespace(choices=[SimpleNamespace(delta=delta)])


@pytest.mark.parametrize("replies,requests,end", [
    ([[429], ["fi", "ne"]], 2, "fine"),
    ([[503], [502], ["fine"]], 3, "fine"),
    ([[503]] * 9, 3, "does not answer: 503, the queue is full"),
    *(([[status], ["no"]], 1, f"does not answer: {status}") for status in (400, 401, 404, 413, 422)),  # not again
    *(([[status], ["fine"]], 2, "fine") for status in (500, 502, 503, 504)),
    ([["fi", 503], ["no"]], 1, "does not answer: 503"),  # nor is an answer that has begun
])  # fmt: skip
def test_a_busy_server_is_tried_again_and_a_dead_one_gives_one_line(monkeypatch, replies, requests, end):
    pauses = []
    monkeypatch.setattr("time.sleep", pauses.append)
    model = RemoteModel("http://127.0.0.1:9", "name")
    model.client = Replies(*replies)
    try:
        result = "".join(model.answer([{"role": "user", "content": "?"}], Options()))
    except InputError as error:
        result = str(error)
    assert end in result and model.client.requests == requests and pauses == [0.5, 1.0][: requests - 1]
    sampling = {"temperature": 0.6, "top_p": None, "seed": None, "max_tokens": 512, "model": "name", "stream": True}
    assert model.client.options == sampling
    model.client = Replies(["a", "", "b"])
    assert "".join(model.answer([{"role": "user", "content": "?"}], Options(0.0, 3, 0.5, 9, 4))) == "ab"
    sampling |= {"temperature": 0.0, "top_p": 0.5, "seed": 4, "max_tokens": 9}
    assert (model.client.options, model.count) == (sampling, 2)


def test_an_endpoint_is_reached_in_offline_mode_and_the_hub_is_not():
    for _ in range(2):
        RemoteModel("http://127.0.0.1:9")
    assert len(get_session().event_hooks["request"]) == 1
    with pytest.raises(OfflineModeIsEnabled):
        get_session().get("https://huggingface.co/x")


def test_a_server_that_says_nothing_runs_into_the_time_limit_and_one_that_is_not_there_is_named():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(InputError, match=r"answer: .*timed? ?out"):
            list(RemoteModel(url, timeout=0.1, retries=0).answer([{"role": "user", "content": "?"}], Options()))
    with pytest.raises(InputError, match="does not answer"):
        list(RemoteModel(url, retries=0).answer([{"role": "user", "content": "?"}], Options()))


@pytest.mark.slow
def test_the_script_answers_one_prompt_and_reads_a_pipe(talker_folder):
    def run(run_dir, *words, **options):
        command = [sys.executable, "scripts/chat_cli.py", "--run-dir", run_dir, "--temperature", "0", *words]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, **options)

    done = run(talker_folder.parent, "-p", "What is 5 + 6?", input="")
    assert done.stdout == "It is 11.\n" and "⚙ python 5+6 → 11" in done.stderr and "loading" in done.stderr
    piped = run(talker_folder.parent, input="What is 12 * 34?\n/reset\nHello\n")
    assert "It is 408." in piped.stdout and "🙂" in piped.stdout and "forgotten" in piped.stderr
    missing = run("nowhere")
    assert missing.returncode == 2 and missing.stderr.strip().splitlines()[-1].startswith("error: nowhere has no")
