"""Threads that own an engine, and completions that an event loop reads from them.

A `Worker` runs one `Engine` on one device, with a bounded queue. A `Completion` is one request for the event loop:
chunks of text as they come, cut at stop strings and at a time limit.
"""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import suppress

import torch

from ..data.tokenizer import load_tokenizer
from . import StreamChunk
from .engine import Engine, IncrementalDetokenizer, Request

# One engine is built at a time: transformers sets torch's default dtype, which all threads share, while it loads, and
# the second engine reuses the kernels that the first one compiled.
LOAD_LOCK = threading.Lock()

TokenCallback = Callable[[list[int] | None], None]  # gets lists of new tokens, then None


class WorkerDiedError(RuntimeError):
    """The thread that ran the model has ended with an error."""


class QueueFullError(Exception):
    """The queue is full."""


class Worker(threading.Thread):
    """Owns one engine; passes the tokens of each request to the event loop that submitted it."""

    def __init__(self, make_engine: Callable[[], Engine], device: str | None = None, max_queue_size: int = 64):
        super().__init__(daemon=True, name=f"worker-{device or 'cpu'}")
        self.make_engine, self.device, self.max_queue_size = make_engine, device, max_queue_size
        self.engine: Engine | None = None  # None until `ready` is set
        self.error: Exception | None = None
        self.callbacks: dict[Request, TokenCallback] = {}
        self.loop: asyncio.AbstractEventLoop | None = None  # in which the callbacks run: that of the last request
        self.wake, self.ready, self.stopping = threading.Condition(), threading.Event(), False

    def run(self) -> None:
        try:
            device = torch.device(self.device or "cpu")
            if device.type == "cuda" and (device.index or 0) < torch.cuda.device_count():  # else loading says why
                torch.cuda.set_device(device.index or 0)  # where the thread's kernels go
            with LOAD_LOCK:
                self.engine = self.make_engine()
            self.ready.set()
            while not self.stopping:
                with self.wake:
                    self.wake.wait_for(lambda: self.stopping or self.engine.busy)
                calls = []
                for request, tokens in self.engine.advance():
                    if tokens:
                        calls.append((self.callbacks[request], tokens))
                    if request.finish_reason:
                        calls.append((self.callbacks.pop(request), None))
                if calls:
                    self.deliver(calls)
        except Exception as error:  # out of memory, a broken driver: all who wait and /health must get the reason
            self.error = error
        finally:
            self.ready.set()
            with self.wake:
                self.deliver([(callback, None) for callback in self.callbacks.values()])

    def deliver(self, calls: list[tuple[TokenCallback, list[int] | None]]) -> None:
        """Call the callbacks in the event loop, all at once: waking it costs more than reading the tokens."""

        def call_all() -> None:
            for callback, tokens in calls:
                callback(tokens)

        if self.loop is not None:
            with suppress(RuntimeError):  # the loop was closed in the meantime: there is no reader
                self.loop.call_soon_threadsafe(call_all)

    @property
    def load(self) -> int:
        return len(self.callbacks)

    @property
    def broken(self) -> bool:
        return self.error is not None or self.stopping or not self.is_alive()

    @property
    def capacity(self) -> int:
        """Requests that may run or wait at the same time."""
        return self.engine.decoder.slots + self.max_queue_size

    def submit(self, request: Request, callback: TokenCallback) -> None:
        """Queue a request of the running event loop, where `callback` will be called.

        Raises InputError if the prompt cannot be run, QueueFullError, WorkerDiedError.
        """
        with self.wake:
            if self.broken:
                raise WorkerDiedError(f"the model is not running: {self.error}")
            if self.load >= self.capacity:
                raise QueueFullError("the model is overloaded: try again in a few seconds")
            self.loop = asyncio.get_running_loop()
            self.callbacks[request] = callback  # before the engine can give its first token
            try:
                self.engine.submit(request)
            except BaseException:
                del self.callbacks[request]
                raise
            self.wake.notify()

    def close(self) -> None:
        with self.wake:
            self.stopping = True
            self.wake.notify()
        self.join(10)


class Completion:
    """One request under way: its tokens as chunks of text, cut at stop strings and at the time limit."""

    def __init__(self, workers: list[Worker], request: Request, stop: list[str] = (), timeout: float = 120.0):
        """Submit the request to the running worker with the least load; raises as `Worker.submit` does."""
        self.request = request
        self.chunks: list[StreamChunk] = []  # what has been read
        self.queue: asyncio.Queue[list[int] | None] = asyncio.Queue()
        self.worker = min(workers, key=lambda worker: (worker.broken, worker.load))
        self.worker.submit(request, self.queue.put_nowait)
        self.detokenizer = IncrementalDetokenizer(self.worker.engine.tokenizer, stop)
        self.timer = asyncio.get_running_loop().call_later(timeout, self.end)

    def end(self) -> None:
        """The time is up, the text is complete, or the client left: free the slot."""
        self.timer.cancel()
        if not self.request.finish_reason:
            self.request.cancelled = True
            self.queue.put_nowait(None)

    async def batches(self) -> AsyncIterator[tuple[list[int], list[StreamChunk]]]:
        """(tokens, chunks of text that they complete) as they come; ends the request when left early."""
        last = False
        try:
            while not last and not self.detokenizer.stopped:
                received = [await self.queue.get()]
                while not self.queue.empty():  # the reader is slower than the model
                    received.append(self.queue.get_nowait())
                last = None in received
                if last and self.worker.error is not None and not self.request.finish_reason:
                    raise WorkerDiedError(f"the model stopped: {self.worker.error}")
                tokens = [token for part in received for token in part or ()]
                chunks = self.detokenizer.push(tokens, last)
                self.chunks += chunks
                yield tokens, chunks
        finally:
            self.end()

    async def read(self) -> list[StreamChunk]:
        """All chunks, at the end."""
        async for _ in self.batches():
            pass
        return self.chunks

    @property
    def finish_reason(self) -> str:
        """ "stop", "tool_calls" or "length", as OpenAI names them."""
        reason = "stop" if self.detokenizer.stopped else self.request.finish_reason
        return reason if reason in ("stop", "tool_calls") else "length"


def open_workers(name: str, max_batch_size: int, max_queue_size: int, device: str | None = None) -> list[Worker]:
    """Started workers with the model `name`, one on each GPU, or one on `device`."""
    load_tokenizer(name)  # one that cannot be used fails before a model is loaded
    devices = [device] if device else [f"cuda:{i}" for i in range(torch.cuda.device_count())] or ["cpu"]

    def engine_on(device: str) -> Engine:
        engine = Engine.from_pretrained(name, device, slots=max_batch_size)
        engine.encode([{"role": "user", "content": ""}])  # a base model without a template fails here, not later
        engine.warm_up()
        return engine

    workers = [Worker(lambda device=device: engine_on(device), device, max_queue_size) for device in devices]
    for worker in workers:
        worker.start()
    return workers
