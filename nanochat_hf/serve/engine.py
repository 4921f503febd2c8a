"""Generation that streams: many rows at once, each with its own length, sampling and tool calls.

`Engine` drives a `decode.Decoder`. It puts requests into free rows (equal prompts are prefilled once), launches steps
ahead of what it has read, hands out tokens a few steps late, answers the calls that the model makes between
<|python_start|> and <|python_end|>, and refills rows that are done. The terminal chat streams one request, the server
feeds requests from a queue, evaluation hands over thousands at once.

    engine = Engine(model, tokenizer)
    for piece in engine.stream([{"role": "user", "content": "What is 12 * 34?"}]):
        print(piece, end="")                                   # piece.kind: "text", "call" or "result"
    engine.generate([prompt_ids], num_samples=8, temperature=1.0)  # -> [[ids, ...]]

    python -m nanochat_hf.serve.engine --bench --depth 12    # tokens/s, bandwidth, time to first token
"""

import codecs
import concurrent.futures
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
from transformers import AutoModelForCausalLM

from ..data.tokenizer import byte_alphabet, load_tokenizer, plain_backend
from ..errors import InputError
from ..kernels.decode import LOG
from ..tools import calculate
from .decoder import MAX_FORCED, Decoder, SlotRequest

MAX_ROWS = 128  # rows that `generate` asks for; more prompts wait for a free row
MAX_CHUNK = 8  # steps launched between two looks at the tokens
CALL_MARKS = ("<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>")


class StreamChunk(str):
    """A bit of an answer. `kind` is "text", "call" (what the model asks the tool) or "result" (what it said)."""

    kind: str

    def __new__(cls, text: str, kind: str = "text"):
        piece = super().__new__(cls, text)
        piece.kind = kind
        return piece


@dataclass(eq=False)
class Request:
    """One answer to be generated; `tokens` and `finish` fill while the engine runs.

    max_new_tokens counts everything after the prompt, tool results included. temperature 0 is greedy; top_k 0 and
    top_p 1 switch these off. The same seed gives the same answer, whatever else is generated beside it.
    """

    prompt: list[int]
    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    tools: bool = True
    stop_at_call: bool = False  # end with finish "call" when the model calls, for callers who run the tool themselves
    tokens: list[int] = field(default_factory=list)  # the stop token, if one came, is the last
    finish: str | None = None  # "stop", "length", "call" or "cancelled"
    cancelled: bool = False  # set it (from any thread) to end the request early


_meanings: WeakKeyDictionary = WeakKeyDictionary()


def meanings(tokenizer) -> dict[int, bytes | str]:
    """What each id is to a reader: a token's bytes, or for a special token the kind of what follows it.

    The kind is "" where a special token changes nothing. Made once a tokenizer: a server looks up every token here.
    """
    if tokenizer not in _meanings:
        names = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
        byte_of = str.maketrans({letter: chr(byte) for byte, letter in enumerate(byte_alphabet())})
        table = {
            token: name.translate(byte_of).encode("latin-1", "replace") for token, name in enumerate(names) if name
        }
        table |= dict.fromkeys(tokenizer.all_special_ids, "")
        table |= zip(tokenizer.convert_tokens_to_ids(list(CALL_MARKS)), ("call", "text", "result", "text"))
        _meanings[tokenizer] = table
    return _meanings[tokenizer]


class IncrementalDetokenizer:
    """Token ids -> pieces of text as they come. Bytes that are not yet a whole character wait for the rest."""

    def __init__(self, tokenizer):
        self.kind, self.meanings = "text", meanings(tokenizer)
        self.utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, ids: list[int], last: bool = False) -> list[StreamChunk]:
        """The pieces that `ids` complete; `last` also gives out what still waits."""
        pieces: list[StreamChunk] = []
        run: list[bytes] = []

        def give(final: bool):
            if text := self.utf8.decode(b"".join(run), final):
                pieces.append(StreamChunk(text, self.kind))
            run.clear()

        for token in ids:
            meaning = self.meanings.get(token, b"")  # a padding row of the head means nothing
            if isinstance(meaning, bytes):
                run.append(meaning)
            else:
                give(True)
                self.kind = meaning or self.kind
        give(last)
        return pieces

    def is_special(self, token: int) -> bool:
        return isinstance(self.meanings.get(token), str)


class Engine:
    """Streams answers of a nanochat model; not thread-safe but for `Request.cancelled`.

    Args:
        model: `NanoChatForCausalLM`, ours or transformers' own. On CUDA it runs in bfloat16 unless `dtype` is given.
        tokenizer: ours; None for plain token ids without stop tokens and tools.
        rows: answers generated at the same time; `generate` raises it as needed up to 128.
        length: tokens of a row, prompt included; the model's training length by default.
        tool: expression -> result as text; ValueError becomes an error message to the model. None: no tools.
        tool_timeout: seconds after which a call is answered with an error.
        stop_ids: tokens that end an answer; by default end of turn, bos and the generation config's eos.
    """

    def __init__(
        self,
        model,
        tokenizer,
        rows: int = 1,
        length: int | None = None,
        tool: Callable[[str], str] | None = calculate,
        tool_timeout: float = 5.0,
        stop_ids: list[int] | None = None,
        dtype: torch.dtype | None = None,
    ):
        self.model, self.tokenizer, self.tool, self.tool_timeout = model, tokenizer, tool, tool_timeout
        self.length = length or model.config.max_position_embeddings
        self.dtype = dtype
        ids = {}
        if tokenizer is not None:
            known = tokenizer.get_vocab()
            ids = {name: known[name] for name in (*CALL_MARKS, "<|bos|>", "<|assistant_end|>") if name in known}
        self.marks = [ids.get(name) for name in CALL_MARKS]
        if stop_ids is None:
            eos = model.generation_config.eos_token_id if tokenizer is not None else None
            eos = eos if isinstance(eos, list) else [eos]
            stop_ids = [*eos, tokenizer and tokenizer.eos_token_id, ids.get("<|bos|>"), ids.get("<|assistant_end|>")]
        self.stop_ids = {token for token in stop_ids if token is not None and token != self.marks[1]}
        if None in self.marks:
            self.tool = None
        self.waiting: deque[Request] = deque()
        self.calls: dict[Request, tuple[concurrent.futures.Future, float]] = {}
        self.pool: concurrent.futures.ThreadPoolExecutor | None = None
        self.decoder: Decoder | None = None
        self.resize(rows)

    @classmethod
    def from_pretrained(cls, name: str, device: str | None = None, **options) -> "Engine":
        """The engine of a model folder or Hub id, on the GPU if there is one (bfloat16), else on the CPU (float32)."""
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
        try:
            model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
        except (OSError, ValueError) as error:
            raise InputError(f"no model in {name}: {' '.join(str(error).split())[:300]}") from None
        try:
            model = model.to(device).eval()
        except torch.OutOfMemoryError:
            raise InputError(f"{name} does not fit into the memory of {device}: use device cpu") from None
        return cls(model, load_tokenizer(name), **options)

    def resize(self, rows: int) -> None:
        """Make room for `rows` rows; only while nothing is being generated."""
        if self.decoder is not None and self.decoder.rows >= rows:
            return
        self.decoder = None  # give its memory back first
        pauses = [self.marks[1]] if self.tool else []
        self.decoder = Decoder(self.model, rows, self.length, [*self.stop_ids, *pauses], self.dtype)
        self.owners: list[Request | None] = [None] * rows
        self.pending: deque = deque()  # chunks of steps that were launched and not yet read
        self.chunk = 1
        self.host = None
        if self.decoder.device.type == "cuda":
            self.host = [torch.empty(MAX_CHUNK, rows, dtype=torch.int32, pin_memory=True) for _ in range(4)]

    def warm_up(self) -> None:
        """Compile and record every size of step that `rows` rows can need, so that no request waits for it."""
        sizes = {min(1 << i, self.decoder.rows) for i in range(self.decoder.rows.bit_length() + 1)}
        for size in sorted(sizes) if self.decoder.fast else ():
            self.decoder.capture(size)
        list(self.generate([[0, 0]], max_new_tokens=1))

    def refresh(self) -> None:
        """Take over the model's weights after they changed (training between two rounds of generation)."""
        self.decoder.refresh()

    # ---- the loop --------------------------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        return bool(self.waiting) or any(self.owners)

    def check(self, prompt: list[int]) -> None:
        """Raises InputError if a prompt is empty, does not fit, or has ids that the model does not know."""
        if not prompt:
            raise InputError("the prompt is empty: give at least one token (bos)")
        if len(prompt) >= self.length:
            raise InputError(f"the prompt has {len(prompt)} tokens, the model's context is {self.length}: shorten it")
        rows = self.model.config.vocab_size
        if min(prompt) < 0 or max(prompt) >= rows:
            raise InputError(
                f"the prompt has token ids outside of 0..{rows - 1}: encode it with the model's tokenizer"
            )

    def submit(self, request: Request) -> Request:
        """Queue a request. Raises InputError as `check` does."""
        self.check(request.prompt)
        self.waiting.append(request)
        return request

    def advance(self) -> list[tuple[Request, list[int]]]:
        """Do a bit of work and return what came out: (request, its new tokens), also for requests that ended."""
        ended = self.drop_cancelled()
        self.admit()
        self.answer_calls()
        launched = self.launch()
        events = []
        if self.pending and (not launched or len(self.pending) > 1 or self.host is None):
            events = self.harvest()
        elif not launched and self.calls:  # every row waits for its tool
            concurrent.futures.wait([call for call, _ in self.calls.values()], timeout=0.05)
        return ended + events

    def drop_cancelled(self) -> list[tuple[Request, list[int]]]:
        ended = []
        for row, request in enumerate(self.owners):
            if request is not None and request.cancelled:
                self.decoder.release(row)
                self.close(row, "cancelled")
                ended.append((request, []))
        for request in [request for request in self.waiting if request.cancelled]:
            self.waiting.remove(request)
            request.finish = "cancelled"
            ended.append((request, []))
        return ended

    def admit(self) -> None:
        free = [row for row, owner in enumerate(self.owners) if owner is None]
        placed = {}
        while free and self.waiting:
            row, request = free.pop(0), self.waiting.popleft()
            placed[row] = SlotRequest(
                request.prompt, request.max_new_tokens, request.temperature, request.top_k, request.top_p, request.seed
            )
            self.owners[row] = request
        if placed:
            self.decoder.admit(placed)
            self.chunk = 1  # the first token quickly, then more steps at a time

    def budget(self, request: Request) -> int:
        return min(request.max_new_tokens, self.length - len(request.prompt))

    def launch(self) -> bool:
        """Start the next steps, unless those under way already reach the end of every row."""
        ahead: dict[Request, int] = {}
        for _, steps, owners, _, _ in self.pending:
            for owner in owners:
                ahead[owner] = ahead.get(owner, 0) + steps
        running = {row: r for row, r in enumerate(self.owners) if r is not None and r not in self.calls}
        wanted = max((self.budget(r) - len(r.tokens) - ahead.get(r, 0) for r in running.values()), default=0)
        if wanted <= 0:
            return False
        decoder = self.decoder
        steps = 1 if self.host is None else min(self.chunk, wanted, LOG - decoder.steps % LOG)
        self.chunk = min(2 * self.chunk, MAX_CHUNK)
        occupied = max(row for row, owner in enumerate(self.owners) if owner is not None) + 1
        rows = min(1 << (occupied - 1).bit_length(), decoder.rows)  # few different sizes: each is a graph of its own
        first = decoder.steps
        bound = max(len(r.prompt) + len(r.tokens) for r in self.owners if r is not None)  # exact without a GPU
        for _ in range(steps):
            decoder.step(rows, min(bound, self.length))
        log, event = decoder.tokens_since(first), None
        if self.host is not None:
            self.host.append(self.host.pop(0))
            log = self.host[-1][:steps].copy_(log, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self.pending.append((log, steps, list(self.owners), event, first))
        return True

    def harvest(self) -> list[tuple[Request, list[int]]]:
        """Read the oldest chunk of steps; waits for the device if it is not there yet."""
        log, _, owners, event, _ = self.pending.popleft()
        if event is not None:
            event.synchronize()
        events = []
        for row, column in enumerate(log.t().tolist()):
            request = owners[row]
            if request is None or request.finish:
                continue
            new = [token for token in column if token >= 0]
            if not new:
                continue
            request.tokens += new
            events.append((request, new))
            if new[-1] in self.stop_ids:  # a result's tokens are never among them: it is encoded as plain text
                self.close(row, "stop")
            elif len(request.tokens) >= self.budget(request):
                self.close(row, "length")
            elif self.tool and new[-1] == self.marks[1]:
                if request.stop_at_call:
                    self.close(row, "call")
                else:
                    self.call(request)
        return events

    def close(self, row: int, reason: str) -> None:
        self.owners[row].finish = reason
        self.calls.pop(self.owners[row], None)
        self.owners[row] = None

    # ---- tools -----------------------------------------------------------------------------------------------------

    def call(self, request: Request) -> None:
        """Start the tool on what stands before the newest token, back to the start of the call."""
        start, end = self.marks[0], self.marks[1]
        begin = next((i for i in range(len(request.tokens) - 2, -1, -1) if request.tokens[i] in (start, end)), None)
        future: concurrent.futures.Future = concurrent.futures.Future()
        if not request.tools or begin is None or request.tokens[begin] == end:
            future.set_result(None)  # tools are off, or an end without a start: the row just goes on
        else:
            expression = self.tokenizer.decode(request.tokens[begin + 1 : -1])
            self.pool = self.pool or concurrent.futures.ThreadPoolExecutor(8, "tool")
            future = self.pool.submit(self.tool, expression)
        self.calls[request] = (future, time.monotonic() + self.tool_timeout)

    def answer_calls(self) -> None:
        for request, (future, deadline) in list(self.calls.items()):
            if not future.done() and time.monotonic() < deadline:
                continue
            del self.calls[request]
            try:
                result = future.result(timeout=0)
            except concurrent.futures.TimeoutError:
                future.cancel()
                self.pool.shutdown(wait=False)  # its threads may hang for ever: later calls get new ones
                self.pool, result = None, str({"error": f"no result within {self.tool_timeout:g} seconds"})
            except Exception as error:  # whatever the tool raises is the model's to read, as in TRL's tool loop
                result = str({"error": str(error)})
            forced = []
            if result is not None:
                ids = plain_backend(self.tokenizer).encode(str(result), add_special_tokens=False).ids
                forced = [self.marks[2], *ids[: MAX_FORCED - 2], self.marks[3]]
            self.decoder.resume(self.owners.index(request), forced)

    # ---- what callers use ------------------------------------------------------------------------------------------

    def generate(
        self, prompts: list[list[int]], num_samples: int = 1, seed: int | list[int] = 0, **options
    ) -> list[list[list[int]]]:
        """`num_samples` answers to each prompt of token ids, as lists of new ids, the stop token included.

        seed is the first answer's, and those of the others follow, or a list of all; `options` are those of Request.
        Greedy answers equal those of `model.generate` (which has no tools).
        """
        asked = [prompt for prompt in prompts for _ in range(num_samples)]
        seeds = seed if isinstance(seed, list) else range(seed, seed + len(asked))
        requests = [Request(list(prompt), seed=own, **options) for prompt, own in zip(asked, seeds)]
        self.resize(min(len(requests), MAX_ROWS))
        for request in requests:
            self.submit(request)
        while self.busy:
            self.advance()
        answers = [request.tokens for request in requests]
        return [answers[i : i + num_samples] for i in range(0, len(answers), num_samples)]

    def encode(self, messages: list[dict]) -> list[int]:
        """Chat messages -> the ids of a prompt that ends where the assistant begins to speak."""
        if not getattr(self.tokenizer, "chat_template", None):
            raise InputError(
                "this tokenizer has no chat template: chat needs a model trained by this project's stages"
            )
        try:
            return list(
                self.tokenizer.apply_chat_template(
                    messages, add_generation_prompt=True, return_dict=False, tokenize=True
                )
            )
        except Exception as error:  # jinja2.TemplateError from the template's own checks, TypeError on odd content
            raise InputError(f"these messages are no chat: {error}") from None

    def fit(self, messages: list[dict], room: int) -> list[dict]:
        """`messages` without the oldest turns, so that prompt and `room` more tokens fit; the system message stays."""
        system = [m for m in messages[:1] if m["role"] == "system"]
        turns = messages[len(system) :]
        starts = [0, *(i for i, m in enumerate(turns) if m["role"] == "user" and i > 0)]

        def fits(start: int) -> bool:
            return len(self.encode(system + turns[start:])) + room <= self.length

        first = bisect_left(starts, True, key=fits)  # fewer turns are never longer
        # If not even the last question fits, it is asked alone: submit says if it is too long, else the answer is cut.
        return system + turns[starts[min(first, len(starts) - 1)] :]

    def stream(self, messages: list[dict], **options) -> Iterator[StreamChunk]:
        """Answer a conversation; pieces of text, calls and results as they come. Closing the iterator stops it."""
        yield from self.pieces(Request(self.encode(messages), **options))

    def pieces(self, request: Request) -> Iterator[StreamChunk]:
        decoder = IncrementalDetokenizer(self.tokenizer)
        self.submit(request)
        try:
            while not request.finish:
                for owner, new in self.advance():
                    if owner is request:
                        yield from decoder.push(new)
            yield from decoder.push([], last=True)
        finally:
            if not request.finish:
                request.cancelled = True
                self.drop_cancelled()


if __name__ == "__main__":
    from .bench import main

    main()
