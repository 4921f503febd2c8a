"""Chat in the terminal, with a model on this machine or with any TGI or OpenAI-compatible server, on the same screen.

    nanochat chat --run-dir runs/cpu-demo                               # the newest finished stage of a run
    nanochat chat --model you/nanochat-d24 -p "Why is the sky blue?"
    nanochat chat --endpoint http://127.0.0.1:8000

Answers stream as Markdown: finished blocks are printed for good, and only the block being written is redrawn, which
keeps the scrollback clean. In a pipe, stdout has the answers only; tool steps and notes go to stderr.
"""

import itertools
import os
import re
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

import yaml
from annotated_types import Ge, Le
from huggingface_hub import InferenceClient, get_session
from huggingface_hub.errors import HTTPError  # httpx's or httpx2's, whichever this version of the hub's client uses
from prompt_toolkit import ANSI, PromptSession
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.history import FileHistory
from rich.console import Console
from rich.live import Live
from rich.markdown import Markdown
from rich.padding import Padding
from rich.segment import SegmentLines
from rich.text import Text

from ..config import Count, Fraction, Seed, TopK, settings
from ..errors import InputError
from ..run import load_json, load_metrics, nearest, save_json
from . import StreamChunk, join_chunks

HELP = """/help             this list
/retry            answer the last message again
/reset            forget the conversation (the system message stays)
/system [TEXT]    show or set the system message; starts a new conversation
/set [KEY=VALUE]  show or set temperature, top_k, top_p, max_new_tokens, seed
/temp X           the same as /set temperature=X, 0 is greedy
/save FILE        write the conversation as JSON
/quit             leave (so does Ctrl-D); Ctrl-C stops an answer
\"""               begins and ends a message of several lines; pasted lines are one message"""
COMMANDS = [line.split()[0] for line in HELP.splitlines() if line.startswith("/")]
PIPE_SECONDS = 3  # that the first byte of a pipe is waited for
KOREAN = yaml.safe_load(Path(__file__).with_name("terminal_ko.yaml").read_text(encoding="utf-8"))


def system_language() -> str:
    """ "ko" where the terminal's locale is Korean, else "en"."""
    name = os.environ.get("LC_ALL") or os.environ.get("LC_MESSAGES") or os.environ.get("LANG", "")
    return "ko" if name.startswith("ko") else "en"


@settings
class Options:
    """How answers are sampled; other values raise InputError."""

    temperature: Annotated[float, Ge(0), Le(5)] = 0.6
    top_k: TopK = 50
    top_p: Fraction = 1.0
    max_new_tokens: Count = 512
    seed: Seed | None = None  # None: different every time


class LocalModel:
    """Answers from an `Engine` in this process."""

    def __init__(self, engine, name: str):
        self.engine, self.name, self.count = engine, name, 0

    def answer(self, messages: list[dict], options: Options) -> Iterator[StreamChunk]:
        """Stream an answer. Ctrl-C cancels it, then raises KeyboardInterrupt; a second one interrupts at once."""
        from .decoder import Request

        room = min(options.max_new_tokens, self.engine.length // 2)
        prompt, _ = self.engine.encode_last(messages, room)
        seed = time.time_ns() % 2**31 if options.seed is None else options.seed
        request = Request(prompt, **vars(options) | {"seed": seed})

        def stop(number, frame):
            if request.cancelled:
                raise KeyboardInterrupt
            request.cancelled = True

        before = signal.signal(signal.SIGINT, stop)
        try:
            yield from self.engine.stream_request(request)
        finally:
            signal.signal(signal.SIGINT, before)
        self.count = len(request.tokens)
        if request.cancelled:
            raise KeyboardInterrupt


class RemoteModel:
    """Answers from a server that speaks OpenAI's chat protocol (TGI, vLLM, `transformers serve`, our own)."""

    def __init__(self, url: str, model: str | None = None, timeout: float = 60.0, retries: int = 2):
        try:
            parts = urlsplit(url)
            is_url = parts.scheme in ("http", "https") and parts.hostname and parts.hostname.encode("idna")
            is_url = is_url and parts.port != 0 and not re.search(r"\s", url)
        except ValueError:  # of the host's brackets, its labels or the port
            is_url = False
        if not is_url:
            raise InputError(f"--endpoint must be a URL such as http://127.0.0.1:8000, not {url!r}")
        reach_offline(url)
        self.client = InferenceClient(base_url=url, timeout=timeout)
        self.name, self.model, self.retries, self.count = url, model, retries, 0

    def answer(self, messages: list[dict], options: Options) -> Iterator[StreamChunk]:
        """Stream an answer; before its first word a server that is busy or not there yet is tried again."""
        top_p = options.top_p if options.top_p < 1 else None  # TGI refuses 1
        sampling = {"temperature": options.temperature, "top_p": top_p, "seed": options.seed}
        sampling |= {"model": self.model, "max_tokens": options.max_new_tokens}
        self.count = 0
        for attempt in range(self.retries + 1):
            try:
                for chunk in self.client.chat_completion(without_tools(messages), stream=True, **sampling):
                    for choice in chunk.choices or []:
                        tool = choice.delta.get("tool") or {}  # our server's extra field: a call and its result
                        for kind, text in (("text", choice.delta.content), *tool.items()):
                            if text:
                                self.count += 1
                                yield StreamChunk(text, kind)
                return
            except (HTTPError, OSError) as error:
                status = getattr(getattr(error, "response", None), "status_code", None)
                permanent = status not in (None, 429, 500, 502, 503, 504)
                if self.count or permanent or attempt == self.retries:
                    raise InputError(f"{self.name} does not answer: {explain(error)}") from None
                time.sleep(0.5 * 2**attempt)


def reach_offline(url: str) -> None:
    """Let huggingface_hub's HTTP client reach `url` under HF_HUB_OFFLINE, too: that is about the Hub."""
    hooks = get_session().event_hooks
    if any(getattr(hook, "url", None) == url for hook in hooks["request"]):
        return

    def hook(request) -> None:
        if not str(request.url).startswith(url):
            for other in hooks["request"]:
                other(request)

    hook.url = url
    get_session().event_hooks = {**hooks, "request": [hook]}


def explain(error: Exception) -> str:
    """One line of a failed request: the server's own words if it sent any, else the client's."""
    with suppress(AttributeError, LookupError, TypeError, ValueError):  # no response, no JSON, other JSON
        reason = error.response.json()["error"]
        return f"{error.response.status_code}, {reason['message'] if isinstance(reason, dict) else reason}"
    return " ".join(str(error).split()) or type(error).__name__


def without_tools(messages: list[dict]) -> list[dict]:
    """The conversation without calls and results, for servers that keep tools to themselves."""
    turns = itertools.groupby((m for m in messages if m["role"] != "tool"), lambda m: m["role"])
    return [{"role": role, "content": "".join(m["content"] for m in turn)} for role, turn in turns]


def messages_of(chunks: list[StreamChunk]) -> list[dict]:
    """The messages of one completion; a call is an assistant message with `tool_calls`, its result of role tool."""
    messages, content = [], ""
    for kind, text in join_chunks(chunks):
        if kind == "call":
            calls = [{"type": "function", "function": {"name": "python", "arguments": {"expression": text}}}]
            messages.append({"role": "assistant", "content": content, "tool_calls": calls})
            content = ""
        elif kind == "result" and messages and messages[-1].get("tool_calls") and not content:
            messages.append({"role": "tool", "name": "python", "content": text})
        else:  # also a result that the model wrote without a call
            content += text
    return [*messages, {"role": "assistant", "content": content}]


def last_block(text: str) -> str:
    """The end of a growing Markdown text that more words can still change: its last paragraph, list or code."""
    blocks = Markdown(text[: text.rfind("\n") + 1]).parsed  # of whole lines: "**" may become a list item or bold text
    starts = [token.map[0] for token in blocks if token.map and token.level == 0]
    return "\n".join(text.split("\n")[starts[-1] :]) if starts else text


class Screen:
    """Shows one answer while it comes: each block of text and each call is redrawn until it ends, then printed.

    Off a terminal nothing is redrawn, text is written as it comes, and calls go to `aside`.
    """

    def __init__(self, console: Console, aside: Console | None = None):
        self.console, self.kind, self.text, self.gap = console, "text", "", ""
        self.aside = aside or console
        self.live = Live(console=console, transient=True, auto_refresh=False)
        self.live.start()

    def show(self, chunk: StreamChunk) -> None:
        if chunk.kind != self.kind:
            if (self.kind, chunk.kind) != ("call", "result"):
                self.print_block()
            self.kind = chunk.kind
            self.text += " → " if chunk.kind == "result" else ""
        self.text += chunk if chunk.kind == "text" else chunk.replace("\n", " ")
        if self.console.is_terminal:
            if chunk.kind == "text" and "\n" in chunk:
                self.print_block(last_block(self.text))
            lines = self.console.render_lines(self.render(self.text))[-self.console.height :]
            self.live.update(SegmentLines(lines, new_lines=True), refresh=True)
        elif chunk.kind == "text":
            self.console.out(chunk, end="", highlight=False)

    def render(self, text: str):
        if self.kind == "text":
            return Padding(Markdown(self.gap + text, code_theme="ansi_dark"), (0, 0, 0, 2))
        return Text.assemble(("  ⚙ python ", "dim"), (text, "cyan"))

    def print_block(self, rest: str = "") -> None:
        """Print what is being written for good, but for its end `rest`."""
        done, self.text = self.text.removesuffix(rest), rest
        if not done:
            return
        if self.console.is_terminal or self.kind != "text":
            self.live.update("", refresh=True)
            console = self.console if self.kind == "text" else self.aside
            console.print(self.render(done), soft_wrap=self.kind != "text")
        elif not done.endswith("\n"):
            self.console.out("")
        self.gap = "<!-- -->\n\n" if rest else ""  # an empty block: rich puts space between it and the next

    def close(self) -> None:
        self.live.update("")
        self.live.stop()
        self.print_block()


@dataclass
class Chat:
    """A conversation at the terminal: `run` reads lines until the end, `ask` answers one."""

    model: LocalModel | RemoteModel
    options: Options
    system: str = ""
    console: Console = field(default_factory=lambda: Console(highlight=False))
    language: str = "en"
    messages: list[dict] = field(default_factory=list)

    @property
    def aside(self) -> Console:
        """For notes and tool steps: stderr, if stdout is a pipe."""
        piped = self.console.file is sys.stdout and not self.console.is_terminal
        return Console(stderr=True, highlight=False) if piped else self.console

    @property
    def opening(self) -> list[dict]:
        """The system message, if there is one."""
        return [{"role": "system", "content": self.system}] if self.system else []

    def translate(self, english: str, *values) -> str:
        """A text of the interface in its language; errors stay English."""
        return (KOREAN.get(english, english) if self.language == "ko" else english).format(*values)

    def note(self, english: str, *values) -> None:
        self.aside.print(Text(self.translate(english, *values), "dim"))

    def ask(self, text: str, before: list[dict] | None = None) -> None:
        """Show and remember the answer, also what came before Ctrl-C; off a terminal that ends the program.

        `before`: the messages before this one; default: all.
        """
        messages = [*(self.messages if before is None else before), {"role": "user", "content": text}]
        screen, chunks, stopped, start = Screen(self.console, self.aside), [], False, time.perf_counter()
        try:
            for chunk in self.model.answer(self.opening + messages, self.options):
                chunks.append(chunk)
                screen.show(chunk)
        except KeyboardInterrupt:
            stopped = True
        finally:
            screen.close()
        if chunks:
            self.messages = messages + messages_of(chunks)
        if self.console.is_terminal:
            rate = self.model.count / (time.perf_counter() - start)
            mark = self.translate("stopped · ") if stopped else ""
            self.note("  {}{}", mark, self.translate("{} tokens, {} a second", self.model.count, f"{rate:.0f}"))
        elif stopped:
            raise KeyboardInterrupt

    def command(self, line: str) -> bool:
        """Run a line that begins with /; False means leave. Raises InputError for what it cannot do."""
        word, rest = [*line.split(maxsplit=1), ""][:2]
        if word == "/help":
            self.note(HELP)
        elif word == "/reset":
            self.messages = []
            self.note("forgotten")
        elif word == "/system":
            if rest:
                self.system, self.messages = rest, []
            self.note("system: {}", self.system or self.translate("(none)"))
        elif word == "/retry":
            turns = [number for number, message in enumerate(self.messages) if message["role"] == "user"]
            if not turns:
                raise InputError("nothing was asked yet")
            self.ask(self.messages[turns[-1]]["content"], self.messages[: turns[-1]])
        elif word in ("/set", "/temp"):
            rest = f"temperature={rest}" if word == "/temp" and rest else rest
            rest = rest if "=" in rest else rest.replace(" ", "=")  # /set temperature 0
            self.options = replace(self.options, **dict(pair.partition("=")[::2] for pair in rest.split()))
            self.note(" ".join(f"{name}={value}" for name, value in vars(self.options).items()))
        elif word == "/save" and not rest:
            self.note("say where: /save FILE")
        elif word == "/save":
            path = Path(os.path.expanduser(rest))
            if path.is_file() and "messages" not in load_json(path, remedy := "choose another FILE"):
                raise InputError(f"{path} is no saved conversation: {remedy}")
            conversation = {"model": self.model.name, "messages": self.opening + self.messages}
            save_json(path, conversation)
            self.note("{} messages written to {}", len(self.messages), rest)
        elif word != "/quit":
            raise InputError(f"no command {word}; {nearest(word, COMMANDS)}")
        return word != "/quit"

    def run(self) -> None:
        """Read messages until /quit or the end of the input. In a pipe an error ends it, too."""
        terminal = self.console.is_terminal
        if terminal:
            title = f"{self.model.name} · {self.translate('/help for commands')}"
            self.console.print(Text.assemble(("nanochat ", "bold"), (title, "dim")))
        read, more = utf8_line, True
        if terminal and sys.stdin.isatty():
            keys = [f"/set {name}=" for name in vars(self.options)]
            read = line_reader(f"\033[1;36m{self.translate('you')} ›\033[0m ", COMMANDS + keys, self.note)
        while more:
            try:
                line = read().strip()
                if line.startswith("/") and "\n" not in line:
                    more = self.command(line)
                elif text := quoted(line, read):
                    self.ask(text)
            except InputError as error:
                if not terminal:
                    raise
                self.note("error: {}", error)
            except EOFError:
                self.console.print(end="\n" if terminal else "")
                more = False
            except KeyboardInterrupt:
                if not terminal:
                    raise
                self.note("\n{}", self.translate("(/quit or Ctrl-D leaves)"))


def utf8_line() -> str:
    """As `input`. Raises InputError for what is not UTF-8, whatever the encoding of the standard input is."""
    try:
        line = input()
        line.encode()
        return line
    except UnicodeError:
        raise InputError("the input is not UTF-8: convert it to that encoding") from None
    except RuntimeError:  # input() finds one closed
        raise InputError("standard input or output is closed: open both, or give --prompt") from None


def quoted(line: str, read: Callable[[], str]) -> str:
    """The message in `line`; one that begins with three quotation marks goes up to the line that ends with them."""
    if not line.startswith('"""'):
        return line
    text = line[3:]
    with suppress(EOFError):
        while not text.rstrip().endswith('"""'):
            text += "\n" + read()
    return text.rstrip().removesuffix('"""').strip()


def line_reader(prompt: str, words: list[str], note: Callable) -> Callable[[], str]:
    """What reads from the terminal: pasted lines are one text, Tab completes `words`, the history stays on disk."""
    path = Path(os.path.expanduser(os.environ.get("XDG_STATE_HOME") or "~/.local/state"), "nanochat", "history")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.touch(mode=0o600)
    except OSError as error:
        note("the history is not kept: {}", error)
    history = FileHistory(path) if os.access(path, os.W_OK) else None
    completer = WordCompleter(words, sentence=True)
    return PromptSession(ANSI(prompt), history=history, completer=completer, complete_while_typing=False).prompt


def with_piped(prompt: str) -> str:
    """The prompt and, below it, the text that is piped in; a pipe that stays silent is left alone."""
    piped = ""
    if sys.stdin is not None and not sys.stdin.isatty():
        if select.select([sys.stdin], [], [], PIPE_SECONDS)[0]:
            piped = sys.stdin.buffer.read().decode(errors="replace").strip()
        else:
            print("note: nothing came from the pipe, the prompt is asked alone", file=sys.stderr)
    if not (prompt.strip() or piped):
        raise InputError("the message is empty: give one with --prompt, or leave that out to chat")
    return f"{prompt}\n\n{piped}" if piped else prompt


def open_model(model: str | None, endpoint: str | None, device: str | None = None):
    """The server at `endpoint`, where it is called `model`, or the model of a folder or Hub id on this machine."""
    if endpoint is not None:
        return RemoteModel(endpoint, model)
    if "depth" in (load_metrics(model) or {}):
        print(f"warning: {model} is a base model: it continues texts and was not trained to chat", file=sys.stderr)
    from .engine import Engine  # takes seconds, which a remote model does not need

    return LocalModel(Engine.from_pretrained(model, device), model)
