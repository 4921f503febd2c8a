"""Chat in the terminal, with a model on this machine or with any TGI or OpenAI-compatible server, on the same screen.

    python scripts/chat_cli.py --run-dir runs/cpu-demo                  # the newest finished stage of a run
    python scripts/chat_cli.py --model you/nanochat-d24 -p "Why is the sky blue?"
    python scripts/chat_cli.py --endpoint http://127.0.0.1:8000

Answers stream as Markdown: finished paragraphs are printed for good, only the one being written is redrawn, so the
scrollback stays clean however long the answer. Ctrl-C stops an answer; at the prompt, Ctrl-D or /quit leaves. The
interface speaks English or Korean, by `--language` or the locale.
"""

import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.markdown import Markdown
from rich.padding import Padding
from rich.text import Text
from transformers.utils.logging import disable_progress_bar

from ..errors import InputError
from ..run import Run, nearest, save_json
from .generate import Engine, Piece, Request

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

ARROW = " → "  # between a call and its result


def system_language() -> str:
    """ "ko" where the terminal's locale is Korean, else "en"."""
    names = (os.environ.get(name) for name in ("LC_ALL", "LC_MESSAGES", "LANG"))
    return "ko" if next(filter(None, names), "").startswith("ko") else "en"


@dataclass
class Options:
    """How answers are sampled."""

    temperature: float = 0.6
    top_k: int = 50
    top_p: float = 1.0
    max_new_tokens: int = 512
    seed: int | None = None  # None: different every time


class LocalModel:
    """Answers from an `Engine` in this process."""

    def __init__(self, engine: Engine, name: str):
        self.engine, self.name, self.count = engine, name, 0

    def answer(self, messages: list[dict], options: Options) -> Iterator[Piece]:
        """Stream an answer. Ctrl-C ends it cleanly: the pieces so far stand, then KeyboardInterrupt is raised."""
        room = min(options.max_new_tokens, self.engine.length // 2)
        prompt = self.engine.encode(self.engine.fit(messages, room))
        seed = time.time_ns() % 2**31 if options.seed is None else options.seed
        sampling = (options.temperature, options.top_k, options.top_p, seed)
        request = Request(prompt, options.max_new_tokens, *sampling)
        with interruptible(request):
            yield from self.engine.pieces(request)
        self.count = len(request.tokens)
        if request.cancelled:
            raise KeyboardInterrupt


@contextmanager
def interruptible(request: Request):
    """While it holds, Ctrl-C asks the request to end instead of breaking into the engine; a second one breaks in."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number, frame):
        if request.cancelled:
            raise KeyboardInterrupt
        request.cancelled = True

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class RemoteModel:
    """Answers from a server that speaks OpenAI's chat protocol (TGI, vLLM, `transformers serve`, our own)."""

    def __init__(self, url: str, model: str | None = None, timeout: float = 60.0, retries: int = 2):
        from huggingface_hub import InferenceClient

        if not url.startswith(("http://", "https://")):
            raise InputError(f"--endpoint must be a URL such as http://127.0.0.1:8000, not {url!r}")
        self.client = InferenceClient(base_url=url, timeout=timeout)
        self.name, self.model, self.retries, self.count = url, model, retries, 0

    def answer(self, messages: list[dict], options: Options) -> Iterator[Piece]:
        """Stream an answer; a server that is busy or not there yet is tried again before the first word."""
        from huggingface_hub.errors import HfHubHTTPError

        # HTTPError of httpx or, in newer hub clients, of httpx2: the hub's own error derives from the one it uses
        network_error = next(base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")
        plain = [{"role": m["role"], "content": m["content"]} for m in spoken(messages)]
        arguments = {"max_tokens": options.max_new_tokens, "temperature": options.temperature, "seed": options.seed}
        if options.top_p < 1:
            arguments["top_p"] = options.top_p
        self.count = 0
        for attempt in range(self.retries + 1):
            try:
                stream = self.client.chat_completion(plain, model=self.model, stream=True, **arguments)
                for chunk in stream:
                    for choice in chunk.choices or []:
                        tool = choice.delta.get("tool") or {}  # our server's extra field: a call and its result
                        for kind, text in (("text", choice.delta.content), *tool.items()):
                            if text:
                                self.count += 1
                                yield Piece(text, kind)
                return
            except (network_error, OSError) as error:
                status = getattr(getattr(error, "response", None), "status_code", None)
                hopeless = status is not None and status not in (429, 500, 502, 503, 504)
                if self.count or hopeless or attempt == self.retries:
                    raise InputError(f"{self.name} does not answer: {explain(error)}") from None
                time.sleep(0.5 * 2**attempt)


def explain(error: Exception) -> str:
    """One line of an HTTP error: the server's own words if it gave any."""
    response = getattr(error, "response", None)
    if response is not None:
        try:
            body = response.json()
            body = body.get("error", body) if isinstance(body, dict) else body
            message = body.get("message", body) if isinstance(body, dict) else body
            return f"{response.status_code}, {message}"
        except Exception:  # no body, or not JSON, or already closed
            return f"status {response.status_code}"
    return " ".join(str(error).split()) or type(error).__name__


def spoken(messages: list[dict]) -> list[dict]:
    """The conversation without calls and results, for servers that keep tools to themselves."""
    kept: list[dict] = []
    for message in messages:
        if message["role"] == "tool":
            continue
        if kept and kept[-1]["role"] == message["role"] == "assistant":
            kept[-1] = {"role": "assistant", "content": kept[-1]["content"] + message["content"]}
        else:
            kept.append({"role": message["role"], "content": message["content"] or ""})
    return kept


def messages_of(pieces: list[Piece]) -> list[dict]:
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


def finished_part(text: str) -> int:
    """How many characters of a growing Markdown text stand for good: up to the last blank line outside code."""
    end, position, fenced = 0, 0, False
    for line in text.splitlines(keepends=True):
        position += len(line)
        if line.lstrip().startswith("```"):
            fenced = not fenced
        if not line.strip() and line.endswith("\n") and not fenced:
            end = position
    return end


class Screen:
    """Shows one answer while it comes: paragraphs and calls in turn, each redrawn until it ends, then printed."""

    def __init__(self, console: Console):
        self.console, self.kind, self.text = console, "text", ""
        self.live: Live | None = None

    def show(self, piece: Piece) -> None:
        kind = "text" if piece.kind == "text" else "call"
        if kind != self.kind:
            self.close()
            self.kind = kind
        if piece.kind == "result" and ARROW not in self.text:
            self.text += ARROW
        self.text += piece if kind == "text" else piece.replace("\n", " ")
        if not self.console.is_terminal:
            if kind == "text":
                self.console.out(piece, end="", highlight=False)
            return
        if self.live is None:
            self.live = Live(console=self.console, transient=True, auto_refresh=False, vertical_overflow="crop")
            self.live.start()
        if kind == "text" and (done := finished_part(self.text)):
            self.console.print(self.drawn(self.text[:done]))
            self.text = self.text[done:]
        self.live.update(self.drawn(self.text), refresh=True)

    def drawn(self, text: str):
        if self.kind == "call":
            return Text.assemble(("  ⚙ python ", "dim"), (text, "cyan"))
        return Padding(Markdown(text, code_theme="ansi_dark"), (0, 0, 0, 2))

    def close(self) -> None:
        """Print what is being written for good."""
        if self.live is not None:
            self.live.stop()
            self.live = None
        if self.text and (self.console.is_terminal or self.kind == "call"):
            self.console.print(self.drawn(self.text), soft_wrap=self.kind == "call")
        elif self.text and not self.text.endswith("\n"):
            self.console.out("")
        self.text = ""


class Chat:
    """A conversation at the terminal: `run` reads lines until the end, `say` answers one."""

    def __init__(
        self,
        model: LocalModel | RemoteModel,
        options: Options,
        system: str = "",
        console: Console | None = None,
        language: str = "en",
    ):
        self.model, self.options, self.system, self.language = model, options, system, language
        self.console = console or Console(highlight=False)
        self.messages: list[dict] = []

    def words(self, english: str, *values) -> str:
        """A text of the interface in its language; errors stay English."""
        return (KOREAN[english] if self.language == "ko" else english).format(*values)

    def say(self, text: str) -> None:
        """Ask, show the answer, remember both; what was shown before Ctrl-C is remembered too."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        asked = [*self.messages, {"role": "user", "content": text}]
        screen, pieces, stopped, start = Screen(self.console), [], False, time.monotonic()
        try:
            for piece in self.model.answer(system + asked, self.options):
                pieces.append(piece)
                screen.show(piece)
        except KeyboardInterrupt:
            stopped = True
        finally:
            screen.close()
        if pieces:
            self.messages = asked + messages_of(pieces)
        if self.console.is_terminal:
            seconds = time.monotonic() - start
            rate = f"{self.model.count / max(seconds, 1e-6):.0f}"
            mark = self.words("stopped · ") if stopped else ""
            rate = self.words("{} tokens, {} a second", self.model.count, rate)
            self.console.print(Text(f"  {mark}{rate}", "dim"))
        elif stopped:
            raise KeyboardInterrupt

    def command(self, line: str) -> bool:
        """Do what a line that begins with / says; False means leave."""
        word, _, rest = line.strip().partition(" ")
        rest = rest.strip()
        if word == "/quit":
            return False
        if word == "/help":
            self.note(self.words(HELP))
        elif word == "/reset":
            self.messages = []
            self.note(self.words("forgotten"))
        elif word == "/system":
            if rest:
                self.system, self.messages = rest, []
            self.note(self.words("system: {}", self.system or self.words("(none)")))
        elif word == "/temp":
            self.set_temperature(rest)
        elif word == "/save":
            self.save(rest)
        else:
            known = ("/help", "/reset", "/system", "/temp", "/save", "/quit")
            self.note(f"unknown command {word}; {nearest(word, known)}")
        return True

    def set_temperature(self, text: str) -> None:
        try:
            value = float(text) if text else self.options.temperature
            if not 0 <= value <= 5:
                raise ValueError
            self.options.temperature = value
            self.note(self.words("temperature {}", f"{value:g}"))
        except ValueError:
            self.note(f"the temperature must be a number from 0 to 5, not {text!r}")

    def save(self, name: str) -> None:
        if not name:
            self.note(self.words("say where: /save FILE"))
            return
        system = [{"role": "system", "content": self.system}] if self.system else []
        try:
            save_json(Path(name).expanduser(), {"model": self.model.name, "messages": system + self.messages})
            self.note(self.words("{} messages written to {}", len(self.messages), name))
        except InputError as error:
            self.note(f"error: {error}")

    def note(self, text: str) -> None:
        self.console.print(Text(text, "dim"))

    def run(self) -> None:
        """Read lines until /quit or the end of the input."""
        with suppress(ImportError):
            import readline  # noqa: F401  (line editing and history for input())
        if self.console.is_terminal:
            title = f"{self.model.name} · {self.words('/help for commands')}"
            self.console.print(Text.assemble(("nanochat ", "bold"), (title, "dim")))
        prompt = (
            f"\001\033[1;36m\002{self.words('you')} ›\001\033[0m\002 "
            if self.console.is_terminal and sys.stdin.isatty()
            else ""
        )
        while True:
            try:
                line = input(prompt)
            except KeyboardInterrupt:
                self.console.print(Text("\n" + self.words("(/quit or Ctrl-D leaves)"), "dim"))
                continue
            except EOFError:
                if self.console.is_terminal:
                    self.console.print()
                return
            if not line.strip():
                continue
            if line.lstrip().startswith("/"):
                if not self.command(line):
                    return
                continue
            try:
                self.say(line)
            except InputError as error:
                self.note(f"error: {error}")


def open_model(model: str | None, run_dir: str | None, endpoint: str | None, device: str | None = None):
    """The model that the command line names: one of the three, a run's newest finished stage for `run_dir`."""
    if sum(x is not None for x in (model, run_dir, endpoint)) != 1 and not (endpoint and model):
        raise InputError("name what to talk to: --run-dir DIR, --model FOLDER_OR_HUB_ID or --endpoint URL")
    if endpoint:
        return RemoteModel(endpoint, model)
    if run_dir is not None:
        folder = Run(run_dir).latest_model()
        if folder is None:
            raise InputError(
                f"{run_dir} has no finished stage to talk to; train one first, for example with make demo"
            )
        model = str(folder)
    disable_progress_bar()
    return LocalModel(Engine.from_pretrained(model, device), model)
