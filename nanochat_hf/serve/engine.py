"""Streaming generation with continuous batching: many requests, each with its own length, sampling and tool calls.

`Engine` drives a `Decoder`. It puts requests into free slots and enqueues steps before it reads the tokens of those
before. It answers the model's calls, between <|python_start|> and <|python_end|>.

    engine = Engine(model, tokenizer)
    for chunk in engine.stream([{"role": "user", "content": "What is 12 * 34?"}]):
        print(chunk, end="")                                   # chunk.kind: "text", "call" or "result"
    engine.generate([prompt_ids], num_samples=8, temperature=1.0)  # -> [[ids, ...]]
"""

import bisect
import codecs
import concurrent.futures
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch

from ..data.tokenizer import byte_alphabet, load_tokenizer, plain_backend, refuse_other_model
from ..errors import InputError
from ..kernels.decode import LOG_STEPS
from ..loading import load_model
from ..tool_loop import MARKS, last_call, run_tool
from ..tools import calculate
from . import StreamChunk
from .decoder import MAX_FORCED, Decoder, Request

MAX_BATCH_SIZE = 128  # slots that `generate` allocates; further prompts wait for a free slot
MAX_CHUNK = 8  # steps launched between two readings of the log
_token_tables: WeakKeyDictionary = WeakKeyDictionary()


def token_table(tokenizer) -> dict[int, bytes | str]:
    """Each id's bytes, or for a special token the kind of the text after it ("": unchanged). Cached per tokenizer."""
    if tokenizer not in _token_tables:
        names = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
        byte_of = str.maketrans({letter: chr(byte) for byte, letter in enumerate(byte_alphabet())})
        table = {i: name.translate(byte_of).encode("latin-1", "replace") for i, name in enumerate(names) if name}
        table |= dict.fromkeys(tokenizer.all_special_ids, "")
        table |= zip(tokenizer.convert_tokens_to_ids(list(MARKS)), ("call", "text", "result", "text"))
        _token_tables[tokenizer] = table
    return _token_tables[tokenizer]


class IncrementalDetokenizer:
    """Token ids -> chunks of text as they come, cut at the first of the `stop` strings (then `stopped`).

    Bytes of an incomplete character wait for the rest, and so does text that may be the beginning of a stop string.
    """

    def __init__(self, tokenizer, stop: Iterable[str] = ()):
        self.kind, self.table = "text", token_table(tokenizer)
        self.utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.stop, self.stopped, self.text = [string for string in stop if string], False, ""

    def push(self, ids: list[int], last: bool = False) -> list[StreamChunk]:
        """The chunks that `ids` complete; `last` also returns what waits, an incomplete character as U+FFFD."""
        chunks = []
        for token in ids:
            value = self.table.get(token, b"")  # a padding row of the head has no text
            if isinstance(value, bytes):
                self.text += self.utf8.decode(value)
            else:
                self.text += self.utf8.decode(b"", True)
                if value and value != self.kind:
                    chunks.append(self.take(True))
                    self.kind = value
        self.text += self.utf8.decode(b"", last)
        return [chunk for chunk in [*chunks, self.take(last)] if chunk]

    def take(self, whole: bool) -> StreamChunk:
        """What may be shown of the text so far: all if `whole`, but nothing from a stop string on."""
        end = 0 if self.stopped else len(self.text)
        if self.kind == "text" and self.stop and end:
            if begins := [at for at in map(self.text.find, self.stop) if at >= 0]:
                self.stopped, end = True, min(begins)
            elif not whole:
                starts = (stop[:n] for stop in self.stop for n in range(1, min(len(stop), end + 1)))
                end -= max((len(start) for start in starts if self.text.endswith(start)), default=0)
        chunk, self.text = StreamChunk(self.text[:end], self.kind), self.text[end:]
        return chunk


class PendingSteps(NamedTuple):
    """Steps that were launched and whose tokens were not read yet."""

    log: torch.Tensor  # (steps, slots)
    owners: list[Request | None]  # of the slots when they were enqueued
    event: torch.cuda.Event | None  # when the copy to the host is done


class Engine:
    """Generates completions of a nanochat model; not thread-safe but for `submit` and `Request.cancelled`.

    Args:
        model: `NanoChatForCausalLM`, ours or transformers' own. On CUDA it runs in bfloat16 unless `dtype` is given.
        tokenizer: ours; None for plain token ids without stop tokens and tools.
        slots: requests that run at the same time; `generate` raises it as needed up to 128.
        length: tokens per slot, prompt included; the model's training length by default.
        tool: expression -> result as text; an exception becomes an error message to the model. None: no tools.
        tool_timeout: seconds after which a call is answered with an error.
        stop_ids: tokens that end a completion; by default end of turn, bos and the generation config's eos.
    """

    def __init__(
        self,
        model,
        tokenizer,
        slots: int = 1,
        length: int | None = None,
        tool: Callable[[str], str] | None = calculate,
        tool_timeout: float = 5.0,
        stop_ids: list[int] | None = None,
        dtype: torch.dtype | None = None,
    ):
        self.model, self.tokenizer, self.dtype = model, tokenizer, dtype
        self.length = length or model.config.max_position_embeddings
        vocab = {} if tokenizer is None else tokenizer.get_vocab()
        self.marks = [vocab.get(name) for name in MARKS]
        self.tool, self.tool_timeout = None if None in self.marks else tool, tool_timeout
        if stop_ids is None and tokenizer is not None:
            eos = model.generation_config.eos_token_id
            stop_ids = [*(eos if isinstance(eos, list) else [eos]), tokenizer.eos_token_id]
            stop_ids += [vocab.get("<|bos|>"), vocab.get("<|assistant_end|>")]
        self.stop_ids = set(stop_ids or ()) - {None, self.marks[1]}
        self.max_chars = 0  # a text with more characters has more than `length` tokens
        if tokenizer is not None:
            longest = max(map(len, [*token_table(tokenizer).values(), *tokenizer.all_special_tokens]))
            composes = tokenizer.backend_tokenizer.normalizer is not None  # NFC makes one of up to 4 characters
            self.max_chars = self.length * longest * (4 if composes else 1)
        self.waiting: deque[Request] = deque()
        self.calls: dict[Request, tuple[concurrent.futures.Future, float]] = {}  # running tool calls, their deadlines
        self.pool: concurrent.futures.ThreadPoolExecutor | None = None
        self.decoder: Decoder | None = None
        self.resize(slots)

    @classmethod
    def from_pretrained(cls, name: str, device: str | None = None, **options) -> "Engine":
        """The engine of a model folder or Hub id, on the GPU if there is one (bfloat16), else on the CPU (float32)."""
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
        model, tokenizer = load_model(name, dtype, device), load_tokenizer(name)
        refuse_other_model(tokenizer, model.config)
        return cls(model, tokenizer, **options)

    def resize(self, slots: int) -> None:
        """Allocate at least `slots` slots; only while nothing is being generated."""
        if self.decoder is not None and self.decoder.slots >= slots:
            return
        self.decoder = None  # free its memory first
        pauses = [self.marks[1]] if self.tool else []
        self.decoder = Decoder(self.model, slots, self.length, [*self.stop_ids, *pauses], self.dtype)
        self.owners: list[Request | None] = [None] * slots
        self.pending: deque[PendingSteps] = deque()
        self.chunk = 1  # steps that the next call enqueues
        self.host_buffers: deque[torch.Tensor] = deque()  # pinned; empty where there is no GPU
        if self.decoder.device.type == "cuda":
            self.host_buffers += [torch.empty(MAX_CHUNK, slots, dtype=torch.int32, pin_memory=True) for _ in range(4)]

    def warm_up(self) -> None:
        """Compile and capture every batch size that `slots` slots can need, so that no request waits for it."""
        sizes = {min(1 << i, self.decoder.slots) for i in range(self.decoder.slots.bit_length() + 1)}
        for size in sorted(sizes) if self.decoder.fast else ():
            self.decoder.capture(size)
        self.generate([[0, 0]], max_new_tokens=1)

    def sync_weights(self) -> None:
        """Copy the model's weights again after they changed (training between two rounds of generation)."""
        self.decoder.sync_weights()

    # ---- the loop --------------------------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        return bool(self.waiting) or any(self.owners)

    def submit(self, request: Request) -> Request:
        """Queue a request. Raises InputError if the prompt is empty, too long, or has ids outside the vocabulary."""
        prompt, size = request.prompt, self.model.config.vocab_size
        if not prompt:
            raise InputError("the prompt is empty: give at least one token (bos)")
        if len(prompt) >= self.length:
            raise InputError(f"the prompt has {len(prompt)} tokens, the model's context is {self.length}: shorten it")
        if min(prompt) < 0 or max(prompt) >= size:
            raise InputError(f"the prompt has token ids outside of 0..{size - 1}: use the model's tokenizer")
        self.waiting.append(request)
        return request

    def advance(self) -> list[tuple[Request, list[int]]]:
        """Do a bit of work. Returns: (request, its new tokens) for each that has new tokens or ended."""
        events = self.drop_cancelled()
        self.schedule()
        self.answer_calls()
        launched = self.enqueue_steps()
        if self.pending and (not launched or len(self.pending) > 1 or not self.host_buffers):
            events += self.collect_outputs()
        elif not launched and self.calls:  # every slot waits for its tool
            concurrent.futures.wait([call for call, _ in self.calls.values()], timeout=0.05)
        return events

    def drop_cancelled(self) -> list[tuple[Request, list[int]]]:
        ended = []
        for slot, request in enumerate(self.owners):
            if request is not None and request.cancelled:
                self.decoder.release(slot)
                self.end_request(slot, "cancelled")
                ended.append((request, []))
        for request in [request for request in list(self.waiting) if request.cancelled]:
            self.waiting.remove(request)
            request.finish_reason = "cancelled"
            ended.append((request, []))
        return ended

    def schedule(self) -> None:
        """Put waiting requests into free slots."""
        free = [slot for slot, owner in enumerate(self.owners) if owner is None]
        placed = {slot: self.waiting.popleft() for slot in free[: len(self.waiting)]}
        for slot, request in placed.items():
            self.owners[slot] = request
        if placed:
            self.decoder.schedule(placed)
            self.chunk = 1  # the first token quickly, then more steps at a time

    def enqueue_steps(self) -> bool:
        """Start the next steps, unless the pending ones already reach the end of every request."""
        decoder, remaining, bound = self.decoder, 0, 0
        occupied = [(slot, r) for slot, r in enumerate(self.owners) if r is not None]
        for slot, request in occupied:
            bound = max(bound, len(request.prompt) + len(request.tokens))  # exact without a GPU
            if request not in self.calls:
                in_flight = sum(len(steps.log) for steps in self.pending if steps.owners[slot] is request)
                remaining = max(remaining, decoder.budget(request) - len(request.tokens) - in_flight)
        if remaining <= 0:
            return False
        steps = min(self.chunk, remaining, LOG_STEPS - decoder.steps % LOG_STEPS) if self.host_buffers else 1
        self.chunk = min(2 * self.chunk, MAX_CHUNK)
        slots = min(1 << occupied[-1][0].bit_length(), decoder.slots)  # few sizes: each is a CUDA graph of its own
        first = decoder.steps
        for _ in range(steps):
            decoder.step(slots, min(bound, self.length))
        log, event = decoder.tokens_since(first), None
        if self.host_buffers:
            self.host_buffers.rotate()
            log = self.host_buffers[0][:steps].copy_(log, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self.pending.append(PendingSteps(log, list(self.owners), event))
        return True

    def collect_outputs(self) -> list[tuple[Request, list[int]]]:
        """Read the oldest pending steps; waits for the device if they are not done yet."""
        log, owners, event = self.pending.popleft()
        if event is not None:
            event.synchronize()
        events = []
        for slot, (request, column) in enumerate(zip(owners, log.t().tolist())):
            new = [token for token in column if token >= 0]
            if request is None or request.finish_reason or not new:
                continue
            request.tokens += new
            events.append((request, new))
            if new[-1] in self.stop_ids:  # never a result's token: it is encoded as plain text
                self.end_request(slot, "stop")
            elif len(request.tokens) >= self.decoder.budget(request):
                self.end_request(slot, "length")
            elif self.tool and new[-1] == self.marks[1]:
                if request.stop_at_call:
                    self.end_request(slot, "tool_calls")
                else:
                    self.start_call(slot)
        return events

    def end_request(self, slot: int, reason: str) -> None:
        self.owners[slot].finish_reason = reason
        self.calls.pop(self.owners[slot], None)
        self.owners[slot] = None

    # ---- tools -----------------------------------------------------------------------------------------------------

    def start_call(self, slot: int) -> None:
        """Run the tool on the call that the newest token of a slot ends, or let the slot continue if there is none."""
        request = self.owners[slot]
        ids = last_call(request.tokens, *self.marks[:2]) if request.tools else None
        if ids is None:
            return self.decoder.resume(slot, [])
        self.pool = self.pool or concurrent.futures.ThreadPoolExecutor(8, "tool")
        call = self.pool.submit(run_tool, self.tool, self.tokenizer.decode(ids))
        self.calls[request] = call, time.monotonic() + self.tool_timeout

    def answer_calls(self) -> None:
        """Force the results of finished calls, and errors for those beyond their deadline, into their slots."""
        for request, (call, deadline) in list(self.calls.items()):
            if not call.done() and time.monotonic() < deadline:
                continue
            del self.calls[request]
            if call.done():
                result = call.result()
            else:
                call.cancel()
                if self.pool:  # its threads may never end: later calls get new ones
                    self.pool.shutdown(wait=False)
                self.pool, result = None, str({"error": f"no result within {self.tool_timeout:g} seconds"})
            ids = plain_backend(self.tokenizer).encode(result, add_special_tokens=False).ids
            forced = [self.marks[2], *ids[: MAX_FORCED - 2], self.marks[3]]
            self.decoder.resume(self.owners.index(request), forced)

    # ---- what callers use ------------------------------------------------------------------------------------------

    def generate(
        self, prompts: list[list[int]], num_samples: int = 1, seed: int | list[int] = 0, **options
    ) -> list[list[list[int]]]:
        """`num_samples` completions of each prompt of token ids, as lists of new ids, the stop token included.

        seed is that of the first completion, the others count up; or a list of all. `options` are those of Request.
        Greedy completions equal those of `model.generate` (which has no tools).
        """
        repeated = [prompt for prompt in prompts for _ in range(num_samples)]
        seeds = seed if isinstance(seed, list) else range(seed, seed + len(repeated))
        requests = [Request(list(prompt), seed=own, **options) for prompt, own in zip(repeated, seeds)]
        self.resize(min(len(requests), MAX_BATCH_SIZE))
        for request in requests:
            self.submit(request)
        while self.busy:
            self.advance()
        completions = [request.tokens for request in requests]
        return [completions[i : i + num_samples] for i in range(0, len(completions), num_samples)]

    def encode(self, messages: list[dict]) -> list[int]:
        """Chat messages -> the ids of a prompt that ends where the assistant's turn begins."""
        return self.encode_text(self.render(messages))

    def render(self, messages: list[dict]) -> str:
        if not getattr(self.tokenizer, "chat_template", None):
            raise InputError("this tokenizer has no chat template: take a model that was trained to chat")
        try:
            return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except Exception as error:  # jinja2.TemplateError from the template's own checks, TypeError on odd content
            raise InputError(f"these messages are no chat: {error}") from None

    def encode_text(self, text: str) -> list[int]:
        """The ids of a text, special tokens in it included. Raises InputError for one that is far too long, at once.

        Other threads run meanwhile (`encode_batch_fast` releases Python's lock).
        """
        if len(text) > self.max_chars:
            size = f"{len(text)} characters, more than the model's context of {self.length} tokens can hold"
            raise InputError(f"the prompt has {size}: shorten it")
        backend = self.tokenizer.backend_tokenizer
        backend.encode_special_tokens = False  # a call with split_special_tokens leaves it set
        backend.no_truncation()  # of tokenizer.json
        return backend.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def encode_last(self, messages: list[dict], room: int) -> tuple[list[int], int]:
        """The ids of a conversation to which `room` more tokens fit, and how many of its oldest messages that cost.

        Whole turns are dropped, but not the system message nor the last question (`submit` refuses a long one).
        """
        system = [m for m in messages[:1] if m["role"] == "system"]
        turns = messages[len(system) :]
        starts = [0, *(i for i, m in enumerate(turns) if m["role"] == "user" and i > 0)]

        def encode(start: int) -> list[int] | None:
            """The ids from the turn at `start` on, or None if they are too long."""
            if 2 * (len(turns) - start) > self.length:  # a message has two special tokens
                return None
            text = self.render(system + turns[start:])
            ids = self.encode_text(text) if len(text) <= self.max_chars else None
            return ids if ids is not None and len(ids) + room <= self.length else None

        if (ids := encode(0)) is not None:
            return ids, 0
        first = starts[bisect.bisect_left(starts[:-1], True, key=lambda start: encode(start) is not None)]
        return self.encode(system + turns[first:]), first

    def stream(self, messages: list[dict], **options) -> Iterator[StreamChunk]:
        """Answer a conversation in chunks of text, calls and results. Closing the iterator stops it."""
        yield from self.stream_request(Request(self.encode(messages), **options))

    def stream_request(self, request: Request) -> Iterator[StreamChunk]:
        detokenizer = IncrementalDetokenizer(self.tokenizer)
        self.submit(request)
        try:
            while not request.finish_reason:
                for owner, new in self.advance():
                    if owner is request:
                        yield from detokenizer.push(new)
            yield from detokenizer.push([], last=True)
        finally:
            if not request.finish_reason:
                request.cancelled = True
                self.drop_cancelled()
