"""Chat in the terminal, with a model on this machine or with any TGI or OpenAI-compatible server, on the same screen.

    python scripts/chat_cli.py --run-dir runs/cpu-demo                  # the newest finished stage of a run
    python scripts/chat_cli.py --model you/nanochat-d24 -p "Why is the sky blue?"
    python scripts/chat_cli.py --endpoint http://127.0.0.1:8000

Answers stream as Markdown: finished blocks are printed for good, only the one being written is redrawn, so the
scrollback stays clean however long the answer. Ctrl-C stops an answer; at the prompt, Ctrl-D or /quit leaves. The
interface speaks English or Korean, by `--language` or the locale.
"""

import itertools
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field

from huggingface_hub import InferenceClient
from huggingface_hub.errors import HTTPError  # httpx's or httpx2's, whichever this version of the hub's client uses
from rich.console import Console
from rich.live import Live
from rich.markdown import Markdown
from rich.padding import Padding
from rich.segment import SegmentLines
from rich.text import Text
from transformers.utils.logging import disable_progress_bar

from ..errors import InputError
from ..run import Run, nearest, save_json
from .engine import Engine, Request, StreamChunk

HELP = """/help           this list
/reset          forget the conversation (the system message stays)
/system [TEXT]  show or set the system message; starts a new conversation
/temp [X]       show or set the temperature, 0 is greedy
/save FILE      write the conversation as JSON
/quit           leave (so does Ctrl-D); Ctrl-C stops an answer"""
KOREAN = {
    HELP: """/help           이 목록
/reset          대화를 잊습니다 (시스템 메시지는 남습니다)
/system [글]    시스템 메시지를 보거나 정합니다. 정하면 새 대화가 시작됩니다
/temp [X]       온도를 보거나 정합니다. 0이면 항상 가장 가능성 높은 토큰
/save 파일      대화를 JSON으로 저장합니다
/quit           끝냅니다 (Ctrl-D도 같습니다). Ctrl-C는 대답을 멈춥니다""",
    "you": "나",
    "/help for commands": "/help: 명령 목록",
    "forgotten": "잊었습니다",
    "system: {}": "시스템: {}",
    "(none)": "(없음)",
    "temperature {}": "온도 {}",
    "say where: /save FILE": "파일 이름을 함께 써 주세요: /save 파일",
    "{} messages written to {}": "메시지 {}개를 {}에 저장했습니다",
    "(/quit or Ctrl-D leaves)": "(/quit 또는 Ctrl-D로 끝냅니다)",
    "{} tokens, {} a second": "토큰 {}개, 초당 {}개",
    "stopped · ": "멈춤 · ",
}


def system_language() -> str:
    """ "ko" where the terminal's locale is Korean, else "en"."""
    name = os.environ.get("LC_ALL") or os.environ.get("LC_MESSAGES") or os.environ.get("LANG", "")
    return "ko" if name.startswith("ko") else "en"


@dataclass
class Options:
    """How answers are sampled."""

    temperature: float = 0.6
    top_k: int = 50
    top_p: float = 1.0
    max_new_tokens: int = 512
    seed: int | None = None  # None: different every time


def temperature(text: str) -> float:
    """A number from 0 to 5; anything else raises InputError."""
    with suppress(ValueError):
        if 0 <= float(text) <= 5:
            return float(text)
    raise InputError(f"the temperature must be a number from 0 to 5, not {text!r}")


class LocalModel:
    """Answers from an `Engine` in this process."""

    def __init__(self, engine: Engine, name: str):
        self.engine, self.name, self.count = engine, name, 0

    def answer(self, messages: list[dict], options: Options) -> Iterator[StreamChunk]:
        """Stream an answer. Ctrl-C asks the engine to end, then raises KeyboardInterrupt; a second one breaks in."""
        room = min(options.max_new_tokens, self.engine.length // 2)
        prompt = self.engine.encode(self.engine.truncate(messages, room))
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
        if not url.startswith(("http://", "https://")):
            raise InputError(f"--endpoint must be a URL such as http://127.0.0.1:8000, not {url!r}")
        self.client = InferenceClient(base_url=url, timeout=timeout)
        self.name, self.model, self.retries, self.count = url, model, retries, 0

    def answer(self, messages: list[dict], options: Options) -> Iterator[StreamChunk]:
        """Stream an answer; a server that is busy or not there yet is tried again before the first word."""
        top_p = options.top_p if options.top_p < 1 else None  # TGI refuses 1
        sampling = {"temperature": options.temperature, "top_p": top_p, "seed": options.seed}
        sampling |= {"model": self.model, "max_tokens": options.max_new_tokens}
        self.count = 0
        for attempt in range(self.retries + 1):
            try:
                for chunk in self.client.chat_completion(spoken(messages), stream=True, **sampling):
                    for choice in chunk.choices or []:
                        tool = choice.delta.get("tool") or {}  # our server's extra field: a call and its result
                        for kind, text in (("text", choice.delta.content), *tool.items()):
                            if text:
                                self.count += 1
                                yield StreamChunk(text, kind)
                return
            except (HTTPError, OSError) as error:
                status = getattr(getattr(error, "response", None), "status_code", None)
                hopeless = status not in (None, 429, 500, 502, 503, 504)
                if self.count or hopeless or attempt == self.retries:
                    raise InputError(f"{self.name} does not answer: {explain(error)}") from None
                time.sleep(0.5 * 2**attempt)


def explain(error: Exception) -> str:
    """One line of a failed request: the server's own words if it sent any, else the client's."""
    with suppress(AttributeError, LookupError, TypeError, ValueError):  # no response, no JSON, other JSON
        said = error.response.json()["error"]
        return f"{error.response.status_code}, {said['message'] if isinstance(said, dict) else said}"
    return " ".join(str(error).split()) or type(error).__name__


def spoken(messages: list[dict]) -> list[dict]:
    """The conversation without calls and results, for servers that keep tools to themselves."""
    turns = itertools.groupby((m for m in messages if m["role"] != "tool"), lambda m: m["role"])
    return [{"role": role, "content": "".join(m["content"] for m in turn)} for role, turn in turns]


def messages_of(pieces: list[StreamChunk]) -> list[dict]:
    """The messages of one answer; a call is an assistant message with `tool_calls`, its result one of role tool."""
    messages, text = [], ""
    for kind, group in itertools.groupby(pieces, lambda piece: piece.kind):
        said = "".join(group)
        if kind == "call":
            calls = [{"type": "function", "function": {"name": "python", "arguments": {"expression": said}}}]
            messages.append({"role": "assistant", "content": text, "tool_calls": calls})
            text = ""
        elif kind == "result" and messages and messages[-1].get("tool_calls") and not text:
            messages.append({"role": "tool", "name": "python", "content": said})
        else:  # also a result that the model made up without a call
            text += said
    return [*messages, {"role": "assistant", "content": text}]


def last_block(text: str) -> str:
    """The end of a growing Markdown text that more words can still change: its last paragraph, list or code."""
    blocks = Markdown(text[: text.rfind("\n") + 1]).parsed  # of whole lines: "**" may become a list item or bold text
    starts = [token.map[0] for token in blocks if token.map and token.level == 0]
    return "\n".join(text.split("\n")[starts[-1] :]) if starts else text


class Screen:
    """Shows one answer while it comes: each block of text and each call is redrawn until it ends, then printed.

    Off a terminal nothing is redrawn, and text comes out as the model writes it.
    """

    def __init__(self, console: Console):
        self.console, self.kind, self.text, self.gap = console, "text", "", ""
        self.live = Live(console=console, transient=True, auto_refresh=False)
        self.live.start()

    def show(self, piece: StreamChunk) -> None:
        if piece.kind != self.kind:
            if (self.kind, piece.kind) != ("call", "result"):
                self.settle()
            self.kind = piece.kind
            self.text += " → " if piece.kind == "result" else ""
        self.text += piece if piece.kind == "text" else piece.replace("\n", " ")
        if self.console.is_terminal:
            if piece.kind == "text" and "\n" in piece:
                self.settle(last_block(self.text))
            lines = self.console.render_lines(self.drawn(self.text))[-self.console.height :]
            self.live.update(SegmentLines(lines, new_lines=True), refresh=True)
        elif piece.kind == "text":
            self.console.out(piece, end="", highlight=False)

    def drawn(self, text: str):
        if self.kind == "text":
            return Padding(Markdown(self.gap + text, code_theme="ansi_dark"), (0, 0, 0, 2))
        return Text.assemble(("  ⚙ python ", "dim"), (text, "cyan"))

    def settle(self, rest: str = "") -> None:
        """Print what is being written for good, but for its end `rest`."""
        done, self.text = self.text.removesuffix(rest), rest
        if not done:
            return
        if self.console.is_terminal or self.kind != "text":
            self.live.update("", refresh=True)
            self.console.print(self.drawn(done), soft_wrap=self.kind != "text")
        elif not done.endswith("\n"):
            self.console.out("")
        self.gap = "<!-- -->\n\n" if rest else ""  # an empty block: rich puts space between it and the next

    def close(self) -> None:
        self.live.update("")
        self.live.stop()
        self.settle()


@dataclass
class Chat:
    """A conversation at the terminal: `run` reads lines until the end, `say` answers one."""

    model: LocalModel | RemoteModel
    options: Options
    system: str = ""
    console: Console = field(default_factory=lambda: Console(highlight=False))
    language: str = "en"
    messages: list[dict] = field(default_factory=list)

    @property
    def opening(self) -> list[dict]:
        """The system message, if there is one."""
        return [{"role": "system", "content": self.system}] if self.system else []

    def words(self, english: str, *values) -> str:
        """A text of the interface in its language; errors stay English."""
        return (KOREAN.get(english, english) if self.language == "ko" else english).format(*values)

    def note(self, english: str, *values) -> None:
        self.console.print(Text(self.words(english, *values), "dim"))

    def say(self, text: str) -> None:
        """Ask, show the answer, remember both, also what came before Ctrl-C; off a terminal that ends the program."""
        asked = [*self.messages, {"role": "user", "content": text}]
        screen, pieces, stopped, start = Screen(self.console), [], False, time.perf_counter()
        try:
            for piece in self.model.answer(self.opening + asked, self.options):
                pieces.append(piece)
                screen.show(piece)
        except KeyboardInterrupt:
            stopped = True
        finally:
            screen.close()
        if pieces:
            self.messages = asked + messages_of(pieces)
        if self.console.is_terminal:
            rate = self.model.count / (time.perf_counter() - start)
            mark = self.words("stopped · ") if stopped else ""
            self.note("  {}{}", mark, self.words("{} tokens, {} a second", self.model.count, f"{rate:.0f}"))
        elif stopped:
            raise KeyboardInterrupt

    def command(self, line: str) -> bool:
        """Do what a line that begins with / says; False means leave."""
        word, _, rest = line.partition(" ")
        rest = rest.strip()
        try:
            if word == "/help":
                self.note(HELP)
            elif word == "/reset":
                self.messages = []
                self.note("forgotten")
            elif word == "/system":
                if rest:
                    self.system, self.messages = rest, []
                self.note("system: {}", self.system or self.words("(none)"))
            elif word == "/temp":
                if rest:
                    self.options.temperature = temperature(rest)
                self.note("temperature {}", f"{self.options.temperature:g}")
            elif word == "/save" and not rest:
                self.note("say where: /save FILE")
            elif word == "/save":
                talk = {"model": self.model.name, "messages": self.opening + self.messages}
                save_json(os.path.expanduser(rest), talk)
                self.note("{} messages written to {}", len(self.messages), rest)
            elif word != "/quit":
                known = [line.split()[0] for line in HELP.splitlines()]
                raise InputError(f"no command {word}; {nearest(word, known)}")
        except InputError as error:
            self.note("error: {}", error)
        return word != "/quit"

    def run(self) -> None:
        """Read lines until /quit or the end of the input."""
        with suppress(ImportError):
            import readline  # noqa: F401  (line editing and history for input())
        terminal = self.console.is_terminal
        if terminal:
            title = f"{self.model.name} · {self.words('/help for commands')}"
            self.console.print(Text.assemble(("nanochat ", "bold"), (title, "dim")))
        prompt = f"\001\033[1;36m\002{self.words('you')} ›\001\033[0m\002 " if terminal and sys.stdin.isatty() else ""
        going = True
        while going:
            try:
                line = input(prompt).strip()
                if line.startswith("/"):
                    going = self.command(line)
                elif line:
                    self.say(line)
            except InputError as error:
                self.note("error: {}", error)
            except EOFError:
                self.console.print(end="\n" if terminal else "")
                going = False
            except KeyboardInterrupt:
                if not terminal:
                    raise
                self.note("\n{}", self.words("(/quit or Ctrl-D leaves)"))


def open_model(model: str | None, run_dir: str | None, endpoint: str | None, device: str | None = None):
    """The model that the command line names: one of the three, a run's newest finished stage for `run_dir`."""
    if endpoint is not None and run_dir is None:
        return RemoteModel(endpoint, model)
    if endpoint is not None or (model is None) == (run_dir is None):
        raise InputError("name what to talk to: --run-dir DIR, --model FOLDER_OR_HUB_ID or --endpoint URL")
    if run_dir is not None:
        if (folder := Run(run_dir).latest_model()) is None:
            raise InputError(f"{run_dir} has no finished stage to talk to; train one first, for example by make demo")
        model = str(folder)
    disable_progress_bar()
    return LocalModel(Engine.from_pretrained(model, device), model)
