"""Threads that own an engine, and the answers that an event loop reads from them.

A `Worker` runs one `Engine`, on a device of its own; requests that come while others run join them at the next step.
Its queue is bounded. `Answer` is one request seen from the event loop: pieces of text as they come, cut at stop
strings and at a time limit. `server` builds its routes on them.
"""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable

import torch

from .engine import Engine, IncrementalDetokenizer, Request, StreamChunk

# One engine is made at a time: transformers sets torch's default dtype, which all threads share, while it loads, and
# the second engine finds the kernels that the first one compiled.
LOADING = threading.Lock()
HANG_UP_CHECK = 0.5  # seconds between two looks whether the reader of a whole answer is still there

TokenCallback = Callable[[list[int] | None], None]


class WorkerDiedError(RuntimeError):
    """The thread that ran the model has ended with an error."""


class QueueFullError(Exception):
    """The queue is full."""


class Worker(threading.Thread):
    """Owns one engine; hands out the tokens of each request to the event loop that asked for them."""

    def __init__(self, make_engine: Callable[[], Engine], device: str | None = None, max_waiting: int = 64):
        super().__init__(daemon=True, name=f"worker-{device or 'cpu'}")
        self.make_engine, self.device, self.max_waiting = make_engine, device, max_waiting
        self.engine: Engine | None = None  # None until `ready` is set
        self.error: Exception | None = None
        self.sinks: dict[Request, tuple[TokenCallback, asyncio.AbstractEventLoop | None]] = {}
        self.inbox: list[Request] = []
        self.wake, self.ready, self.stopping = threading.Condition(), threading.Event(), False

    def run(self) -> None:
        try:
            if self.device and self.device.startswith("cuda"):
                torch.cuda.set_device(torch.device(self.device).index or 0)  # where the thread's kernels go
            with LOADING:
                self.engine = self.make_engine()
            self.ready.set()
            while not self.stopping:
                self.turn()
        except Exception as error:  # out of memory, a broken driver: say so to everybody who waits, and in /health
            self.error = error
        finally:
            self.ready.set()
            with self.wake:
                hand_over([(sink, None) for sink in self.sinks.values()])
                self.sinks.clear()

    def turn(self) -> None:
        """One round of the engine; sleeps while there is nothing to do."""
        with self.wake:
            self.wake.wait_for(lambda: self.stopping or self.inbox or self.engine.busy)
            arrived, self.inbox = self.inbox, []
        for request in arrived:
            self.engine.submit(request)
        given = []
        for request, tokens in self.engine.advance():
            if tokens:
                given.append((self.sinks[request], tokens))
            if request.finish:
                given.append((self.sinks.pop(request), None))
        hand_over(given)

    @property
    def load(self) -> int:
        return len(self.sinks)

    @property
    def broken(self) -> bool:
        return self.error is not None or self.stopping or not self.is_alive()

    def start_request(
        self, request: Request, sink: TokenCallback, loop: asyncio.AbstractEventLoop | None = None
    ) -> None:
        """`sink` gets lists of tokens, then None; in `loop`, or in this thread if there is none.

        Raises InputError if the prompt cannot be run, Busy, Broken.
        """
        with self.wake:
            if self.broken:
                raise WorkerDiedError(f"the model is not running: {self.error}")
            self.engine.check(request.prompt)
            if self.load >= self.engine.decoder.rows + self.max_waiting:
                raise QueueFullError("the model is overloaded: try again in a few seconds")
            self.sinks[request] = sink, loop
            self.inbox.append(request)
            self.wake.notify()

    def close(self) -> None:
        with self.wake:
            self.stopping = True
            self.wake.notify()
        self.join(10)


def hand_over(given: list[tuple[tuple[TokenCallback, asyncio.AbstractEventLoop | None], list[int] | None]]) -> None:
    """Call the sinks. All of one event loop in one call: to wake it costs more than to read a row's tokens."""
    calls: dict[asyncio.AbstractEventLoop | None, list] = {}
    for (sink, loop), tokens in given:
        calls.setdefault(loop, []).append((sink, tokens))
    for loop, some in calls.items():
        if loop is None:
            call_all(some)
            continue
        with contextlib.suppress(RuntimeError):  # the loop was closed in the meantime: nobody listens any more
            loop.call_soon_threadsafe(call_all, some)


def call_all(calls: list[tuple[TokenCallback, list[int] | None]]) -> None:
    for sink, tokens in calls:
        sink(tokens)


class Answer:
    """One request under way: its tokens as pieces of text, cut at stop strings and at the time limit."""

    def __init__(self, workers: list[Worker], request: Request, stops: list[str] = (), max_seconds: float = 120.0):
        """Give the request to the running worker with the least to do; raises as `start_request` does."""
        self.request, self.stops = request, [stop for stop in stops if stop]
        self.tokens: list[int] = []  # what has come so far
        self.pieces: list[StreamChunk] = []
        self.held, self.stopped = "", False
        loop = asyncio.get_running_loop()
        self.news, self.ended = asyncio.Event(), loop.create_future()
        self.worker = min(workers, key=lambda worker: (worker.broken, worker.load))
        self.worker.start_request(request, self.take, loop)
        self.decoder = IncrementalDetokenizer(self.worker.engine.tokenizer)
        self.timer = loop.call_later(max_seconds, self.take, None)

    def take(self, tokens: list[int] | None) -> None:
        """The worker's sink, which the event loop calls; None also when the time is up."""
        if self.ended.done():
            return
        last = tokens is None
        if last and self.worker.error is not None and not self.request.finish:
            return self.end(WorkerDiedError(f"the model stopped: {self.worker.error}"))
        self.tokens += tokens or []
        self.pieces += self.cut(self.decoder.push(tokens or [], last), last)
        self.news.set()
        if last or self.stopped:
            self.end()

    def end(self, error: WorkerDiedError | None = None) -> None:
        """Nothing more comes, or nobody wants it; frees the row."""
        self.timer.cancel()
        if not self.request.finish:
            self.request.cancelled = True
        if not self.ended.done():
            self.ended.set_result(error)
            self.news.set()

    async def batches(self) -> AsyncIterator[tuple[list[int], list[StreamChunk]]]:
        """(tokens, pieces of text that they complete) as they come; ends the request when left early."""
        num_tokens = num_pieces = 0
        try:
            while not self.ended.done() or self.news.is_set():
                await self.news.wait()
                self.news.clear()
                tokens, pieces = self.tokens[num_tokens:], self.pieces[num_pieces:]
                num_tokens, num_pieces = len(self.tokens), len(self.pieces)
                yield tokens, pieces
            self.check()
        finally:
            self.end()

    async def whole(self, gone: Callable) -> list[StreamChunk]:
        """All pieces; gives up when `await gone()`, asked now and then, says that nobody waits any more."""
        try:
            while not (await asyncio.wait([self.ended], timeout=HANG_UP_CHECK))[0]:
                if await gone():
                    self.end()
            self.check()
        finally:
            self.end()
        return self.pieces

    def check(self) -> None:
        if error := self.ended.result():
            raise error

    def cut(self, pieces: list[StreamChunk], last: bool) -> list[StreamChunk]:
        """Drop what follows a stop string; hold back text that may be the beginning of one, if more can come."""
        if not self.stops:
            return pieces
        given = []
        for piece in pieces:
            if piece.kind != "text":
                given += [StreamChunk(self.held), piece]
                self.held = ""
                continue
            text = self.held + piece
            found = [at for at in (text.find(stop) for stop in self.stops) if at >= 0]
            if found:
                self.stopped, self.held = True, ""
                given.append(StreamChunk(text[: min(found)]))
                break
            starts = (stop[:n] for stop in self.stops for n in range(min(len(stop), len(text) + 1)))
            end = len(text) - max((len(start) for start in starts if text.endswith(start)), default=0)
            given.append(StreamChunk(text[:end]))
            self.held = text[end:]
        if last:
            given.append(StreamChunk(self.held))
        return [piece for piece in given if piece]

    @property
    def reason(self) -> str:
        """OpenAI's name for why it ended."""
        if self.stopped or self.request.finish == "stop":
            return "stop"
        return "tool_calls" if self.request.finish == "call" else "length"


def open_workers(name: str, rows: int, max_waiting: int, device: str | None = None) -> list[Worker]:
    """Started workers with the model `name`, one on each GPU, or one on `device`."""
    devices = [device] if device else [f"cuda:{i}" for i in range(torch.cuda.device_count())] or ["cpu"]

    def engine_on(place: str) -> Engine:
        engine = Engine.from_pretrained(name, place, rows=rows)
        engine.encode([{"role": "user", "content": ""}])  # a base model without a template fails here, not later
        engine.warm_up()
        return engine

    workers = [Worker(lambda place=place: engine_on(place), place, max_waiting) for place in devices]
    for worker in workers:
        worker.start()
    return workers
