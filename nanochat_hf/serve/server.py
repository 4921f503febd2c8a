"""An HTTP server over the fast generator that speaks the protocols of OpenAI and text-generation-inference.

    nanochat serve --run-dir runs/d24            # a chat page on http://127.0.0.1:8000
    InferenceClient(base_url="http://127.0.0.1:8000").chat_completion([{"role": "user", "content": "Hello"}])
    OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="-").chat.completions.create(model="-", messages=[...])

Each GPU has a replica (`worker`). The queue is bounded: a request beyond it gets status 429 at once. Bodies are read
and prompts encoded in threads of their own, so that no request holds up the others (`limits`: those of connections).

The calculator runs here, inside the completion. Streamed chunks show its calls in an extra field, `delta.tool` =
{"call": text} or {"result": text}; whole completions list them in `message.tool_steps`, which is read where a client
sends the message back. A client that passes the function `python` in `tools` gets `tool_calls` instead and runs them
itself. Turns that do not fit into the context are dropped, oldest first; `dropped_messages` says how many. Token
log-probabilities are not computed: TGI's `logprob` is null.
"""

import asyncio
import concurrent.futures
import contextlib
import gc
import json
import re
import time
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from fastapi import FastAPI
from fastapi import Request as HTTPRequest
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from pydantic import AliasChoices, BaseModel, BeforeValidator, Field, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from ..data.transforms import BadRow, normalize
from ..errors import InputError
from . import join_chunks, text_of
from .engine import IncrementalDetokenizer, Request
from .limits import MAX_BODY, TooLargeError
from .worker import Completion, QueueFullError, Worker, WorkerDiedError

PAGE = Path(__file__).with_name("ui.html")
MAX_PARTS = 40_000  # of a body; Python's objects of more are made, and freed, too long without a break
SURROGATES = re.compile(rb"\\u[dD](?:[89abAB]..\\u[dD][c-fC-F]..|[89a-fA-F][0-9a-fA-F]{2})")  # a pair, or one alone
RETRY_AFTER = "2"  # seconds, for clients of a full queue

FAILURES = {  # exception -> status, and its name in the reply; HTTPException has a status of its own
    InputError: (422, "validation"), ValidationError: (422, "validation"), QueueFullError: (429, "overloaded"),
    WorkerDiedError: (503, "unavailable"), TooLargeError: (413, "too_large"), ClientDisconnect: (499, "closed"),
    HTTPException: (None, "not_found"), Exception: (500, "internal"),
}  # fmt: skip
TGI_PATHS = ("/", "/generate", "/generate_stream", "/info", "/health")
OPENAI_PATHS = "/v1/chat/completions, /v1/completions and /v1/models"
UNSUPPORTED = {  # field that is not implemented -> its values, beside null, false and empty, that ask for nothing
    "top_logprobs": 0, "best_of": 1, "response_format": {"type": "text"}, "function_call": "auto none",
    "modalities": ["text"], "frequency_penalty": 0, "presence_penalty": 0, "repetition_penalty": 1, "min_p": 0,
    "typical_p": 1, "reasoning_effort": "none", "repeat_penalty": 1, "mirostat": 0, "top_n_tokens": 0,
    "service_tier": "auto default", "verbosity": "medium",
}  # fmt: skip
LABELS = {"chat_id", "metadata", "model", "options", "prompt_cache_key", "safety_identifier", "session_id", "user"}

Limit = Annotated[int, Field(ge=1)]
StopString = Annotated[str, Field(max_length=1000)]


class Body(BaseModel, extra="allow", strict=True):
    """Refuses fields that it lacks, as OpenAI does, unless they are empty, a default of UNSUPPORTED, or LABELS."""

    def model_post_init(self, context) -> None:
        for name, value in self.model_extra.items():
            nothing = UNSUPPORTED.get(name)
            nothing = nothing.split() if isinstance(nothing, str) else [nothing]
            if not (value is False or value in (None, "", [], {}, *nothing) or name in LABELS):
                raise InputError(f"{name[:80]} is not supported: leave it out")


class Sampling(Body):
    """What both protocols share. null, which clients send as null, takes the server's default."""

    temperature: Annotated[float, Field(ge=0, le=5)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    seed: int | None = None
    max_tokens: Limit | None = None
    max_completion_tokens: Limit | None = None
    max_new_tokens: Limit | None = None
    stop: Annotated[
        Annotated[list[StopString], Field(max_length=16, fail_fast=True)] | None,
        BeforeValidator(lambda stop: [stop] if isinstance(stop, str) else stop),
    ] = Field(None, validation_alias=AliasChoices("stop", "stop_sequences"))

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens or self.max_new_tokens


class StreamOptions(BaseModel, extra="forbid", strict=True):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # of the sizes of chunks; there is none


class OpenAIBody(Sampling):
    model: str | None = None  # any name; there is one model
    parallel_tool_calls: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=16)] | None = None


class ToolStep(BaseModel):
    call: str
    result: str


class Message(BaseModel):
    role: Annotated[str, BeforeValidator(lambda role: "system" if role == "developer" else role)]  # its newer name
    content: str | Annotated[list[dict], Field(max_length=1024, fail_fast=True)] | None = None
    # Of a completion that is sent back.
    tool_steps: Annotated[list[ToolStep], Field(max_length=1024, fail_fast=True)] | None = None
    tool_calls: Annotated[list[dict], Field(max_length=128, fail_fast=True)] | None = None
    tool_call_id: str | None = None
    function_call: dict | None = None

    def model_post_init(self, context) -> None:
        if self.content is None and not (self.tool_calls or self.tool_steps or self.function_call):
            raise InputError(f"a message of role {self.role} needs content")


class Parameters(BaseModel):
    required: list[Literal["expression"]] | None = None


class Function(BaseModel):
    """The model's only tool; another one would never be called."""

    name: Literal["python"]
    parameters: Parameters | None = None


class Tool(BaseModel):
    function: Function


class ChatBody(OpenAIBody):
    messages: list[Message] = Field(min_length=1, max_length=4096, fail_fast=True)
    tools: Annotated[list[Tool], Field(max_length=128, fail_fast=True)] | None = None
    tool_choice: Literal["auto", "none"] | None = None  # the model cannot be made to call


class CompletionBody(OpenAIBody):
    """`prompt`: one or a list of prompts, each a text or a list of token ids."""

    prompt: Annotated[
        list[Annotated[str, Field(min_length=1)] | Annotated[list[int], Field(min_length=1, fail_fast=True)]],
        Field(max_length=64, fail_fast=True),
        BeforeValidator(lambda x: x if isinstance(x, list) and isinstance([*x[:1], 0][0], str | list) else [x]),
    ]


class TGIParameters(Sampling):
    temperature: Annotated[float, Field(gt=0, le=5)] | None = None  # greedy is `do_sample: false`
    do_sample: bool | None = None
    return_full_text: bool | None = None
    truncate: Limit | None = None
    details: bool | None = None


class TGIBody(Body):
    inputs: str = Field(min_length=1)
    parameters: TGIParameters | None = None
    stream: bool | None = None


def parse(model: type[BaseModel], body: bytes) -> Any:
    """A body as one of the models; half of a surrogate pair becomes "?", as in text. Raises ValidationError."""
    if sum(map(body.count, (b"{", b"[", b'":', b'" :'))) + body.count(b",") // 5 > MAX_PARTS:
        raise InputError(f"the body has more than {MAX_PARTS} lists, objects and keys")
    body = body.replace(rb"\\", rb"\u005c")  # now each backslash begins an escape
    body = SURROGATES.sub(lambda match: match[0] if len(match[0]) == 12 else b"?", body)
    return model.model_validate_json(body)


@dataclass(eq=False)
class Server:
    """Routes and limits over a list of workers; `app` is the ASGI application.

    Raises:
        InputError: a GPU's memory is too small. Any other error of a worker is raised unchanged.
    """

    workers: list[Worker]  # started threads, one per GPU
    name: str  # what /v1/models and /info call the model; of a folder the last two parts, such as cpu-demo/rl
    temperature: float = 0.6
    top_k: int = 50
    max_new_tokens: int = 512  # of one completion, unless the request says fewer
    request_timeout: float = 120.0  # seconds of one completion, then it is cut

    def __post_init__(self):
        for worker in self.workers:
            worker.ready.wait()
            if isinstance(worker.error, torch.OutOfMemoryError):
                reason = f"the memory of {worker.device} is full: lower --max-batch-size, or free it"
                raise InputError(reason) from worker.error
            if worker.error is not None:
                raise worker.error
        if Path(self.name).exists():
            self.name = "/".join(Path(self.name).resolve().parts[-2:])
        self.started = int(time.time())
        self.engine = self.workers[0].engine
        self.tokenizer = self.engine.tokenizer
        self.readers = concurrent.futures.ThreadPoolExecutor(2, "reader")  # more would compete for Python's lock
        handlers = dict.fromkeys(FAILURES, failure)
        app = self.app = FastAPI(title="nanochat", lifespan=self.lifespan, exception_handlers=handlers)
        app.get("/", response_class=HTMLResponse)(lambda: PAGE.read_text(encoding="utf-8"))
        app.get("/health")(self.health)
        app.get("/info")(self.info)
        app.get("/v1/models")(self.models)
        app.get("/v1/models/{name:path}")(self.model)
        app.post("/v1/chat/completions")(self.chat)
        app.post("/v1/completions")(self.completions)
        for path in ("/", "/generate", "/generate_stream"):
            app.post(path)(self.generate)

    @contextlib.asynccontextmanager
    async def lifespan(self, app: FastAPI):
        gc.collect()
        gc.freeze()  # else a full collection, of all that the libraries hold, stops every stream for a quarter second
        yield
        for worker in self.workers:
            worker.close()

    async def health(self) -> dict:
        """503 as soon as one replica has broken, so that the process gets restarted; the others still answer."""
        for worker in self.workers:
            if worker.broken:
                raise WorkerDiedError(str(worker.error))
        return {}

    async def info(self) -> dict:
        decoder = self.engine.decoder
        return {
            "model_id": self.name, "model_dtype": str(decoder.dtype).removeprefix("torch."), "router": "nanochat_hf",
            "model_device_type": decoder.device.type, "model_pipeline_tag": "text-generation",
            "max_concurrent_requests": sum(worker.capacity for worker in self.workers),
            "num_replicas": len(self.workers), "max_batch_size": decoder.slots,
            "max_input_tokens": self.engine.length - 1, "max_total_tokens": self.engine.length,
        }  # fmt: skip

    async def models(self) -> dict:
        return {"object": "list", "data": [await self.model(self.name)]}

    async def model(self, name: str) -> dict:
        if name != self.name:
            raise HTTPException(404, f"no model {name}; this server has {self.name}")
        examples = {"examples": self.tokenizer.init_kwargs.get("examples")}  # for the page
        return {"id": name, "object": "model", "created": self.started, "owned_by": "nanochat_hf", **examples}

    async def read(self, reader: Callable[[bytes], tuple], http: HTTPRequest) -> tuple:
        """What `reader` makes of the body, in another thread: long prompts take a while. Raises TooLargeError."""
        size = http.headers.get("content-length", "")
        chunked = "transfer-encoding" in http.headers  # its length would count in place of the one that is said
        if chunked or not size.isdecimal() or len(size) > 9 or int(size) > MAX_BODY:
            raise TooLargeError(f"a request may have {MAX_BODY} bytes and must say its length")
        return await asyncio.get_running_loop().run_in_executor(self.readers, reader, await http.body())

    def encode_text(self, text: str, truncate: int = 0) -> list[int]:
        """Text as it is, special tokens included (as in TGI), after bos; with `truncate` its last tokens."""
        if truncate:  # of a longer text only the end is encoded; the tokens at the cut are not among the last ones
            text = text[-self.engine.max_chars * min(truncate + 64, self.engine.length) // self.engine.length :]
        ids, bos = self.engine.encode_text(text), self.tokenizer.bos_token_id
        return (ids if ids[:1] == [bos] else [bos, *ids])[-truncate:]

    def start(self, prompts: list[list[int]], body: Sampling, n: int = 1, **options) -> list[Completion]:
        """Start `n` completions of each prompt, all or none; raises as `Worker.submit` does."""
        options = {"temperature": self.temperature, "top_k": self.top_k, **options}
        options |= body.model_dump(include={"temperature", "top_k", "top_p"}, exclude_none=True)
        options["max_new_tokens"] = min(options.get("max_new_tokens") or self.max_new_tokens, self.max_new_tokens)
        seed = time.time_ns() % 2**31 if body.seed is None else body.seed % 2**63
        capacity = sum(worker.capacity for worker in self.workers)
        if n * len(prompts) > capacity:
            raise InputError(f"{n * len(prompts)} completions in one request: this server takes at most {capacity}")
        completions = []
        with contextlib.ExitStack() as ends:
            for i in range(n * len(prompts)):
                request = Request(prompts[i // n], seed=seed + i, **options)
                completions.append(Completion(self.workers, request, body.stop or (), self.request_timeout))
                ends.callback(completions[-1].end)
            ends.pop_all()
        return completions

    # ---- OpenAI ----------------------------------------------------------------------------------------------------

    async def chat(self, http: HTTPRequest):
        body, prompt, dropped = await self.read(self.read_chat, http)
        tools = body.tool_choice != "none"
        head = {"dropped_messages": dropped} if dropped else {}
        return await self.reply(http, body, [prompt], head, stop_at_call=bool(body.tools) and tools, tools=tools)

    def read_chat(self, raw: bytes) -> tuple[ChatBody, list[int], int]:
        body = parse(ChatBody, raw)
        try:
            messages = normalize(
                [{"content": "", **m.model_dump(exclude_none=True)} for m in body.messages], "replace"
            )
        except BadRow as error:
            raise InputError(f"these messages are no chat: {error}") from None
        room = min(body.limit or self.max_new_tokens, self.engine.length // 2)
        return body, *self.engine.encode_last(messages, room)

    async def completions(self, http: HTTPRequest):
        return await self.reply(http, *await self.read(self.read_completion, http), {})

    def read_completion(self, raw: bytes) -> tuple[CompletionBody, list[list[int]]]:
        body = parse(CompletionBody, raw)
        return body, [self.encode_text(prompt) if isinstance(prompt, str) else prompt for prompt in body.prompt]

    async def reply(self, http: HTTPRequest, body: OpenAIBody, prompts: list[list[int]], head: dict, **options):
        """What OpenAI's routes have in common: `head` is part of every chunk, `options` are those of `Request`."""
        n = body.n or 1
        if body.stream and n * len(prompts) > 1:
            raise InputError("streaming gives one completion: send one prompt, and leave n out")
        completions = self.start(prompts, body, n, max_new_tokens=body.limit, **options)
        chat = isinstance(body, ChatBody)
        head |= {"id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}", "created": int(time.time())}
        head |= {"model": self.name, "object": "chat.completion" if chat else "text_completion"}

        def choice(content: dict, reason: str | None, index: int = 0) -> dict:
            return {"index": index, **content, "finish_reason": reason, "logprobs": None}

        if not body.stream:
            await whole(completions, http)
            contents = [{"message": message_of(c)} if chat else {"text": text_of(c.chunks)} for c in completions]
            choices = [choice(x, c.finish_reason, i) for i, (x, c) in enumerate(zip(contents, completions))]
            return JSONResponse({**head, "choices": choices, "usage": usage(completions, n)})

        async def chunks() -> AsyncIterator[dict]:
            async for content, reason in deltas(completions[0], chat):
                yield {**head, "choices": [choice(content, reason)]}
            if body.stream_options and body.stream_options.include_usage:
                yield {**head, "choices": [], "usage": usage(completions, n)}

        head["object"] += ".chunk" if chat else ""
        return stream(chunks(), http)

    # ---- text-generation-inference ---------------------------------------------------------------------------------

    async def generate(self, http: HTTPRequest):
        """TGI's routes; the root streams if the body says so and else gives a list, as the Inference API has it."""
        body, prompt = await self.read(self.read_generate, http)
        parameters, path = body.parameters or TGIParameters(), http.url.path
        options = {"temperature": 1.0 if parameters.do_sample else 0.0, "top_k": 0}
        options["max_new_tokens"] = parameters.limit or 20  # as in TGI
        (completion,) = self.start([prompt], parameters, **options)
        if path == "/generate_stream" or (path == "/" and body.stream):
            return stream(self.tgi_events(completion), http)
        await whole([completion], http)
        text = text_of(completion.chunks)
        reply = {"generated_text": body.inputs + text if parameters.return_full_text else text}
        if parameters.details:
            detokenizer = IncrementalDetokenizer(self.tokenizer)
            tokens = [tgi_token(token, detokenizer) for token in completion.request.tokens]
            reply["details"] = {**tgi_end(completion), "prefill": [], "tokens": tokens}
        return JSONResponse([reply] if path == "/" else reply)

    def read_generate(self, raw: bytes) -> tuple[TGIBody, list[int]]:
        body = parse(TGIBody, raw)
        return body, self.encode_text(body.inputs, getattr(body.parameters, "truncate", None) or 0)

    async def tgi_events(self, completion: Completion) -> AsyncIterator[dict]:
        """One event per token; the last one carries the whole text and the finish reason."""
        detokenizer, index, last = IncrementalDetokenizer(self.tokenizer), 0, None
        async for tokens, _ in completion.batches():
            for token in tokens:
                if last is not None:
                    yield last
                index += 1
                shown = tgi_token(token, detokenizer)
                last = {"index": index, "token": shown, "generated_text": None, "details": None}
        if last is not None:
            yield {**last, "generated_text": text_of(completion.chunks), "details": tgi_end(completion)}


def tgi_token(token: int, detokenizer: IncrementalDetokenizer) -> dict:
    text, is_special = text_of(detokenizer.push([token])), isinstance(detokenizer.table.get(token), str)
    return {"id": token, "text": text, "logprob": None, "special": is_special}


def tgi_end(completion: Completion) -> dict:
    request, reason = completion.request, completion.finish_reason
    reason = "stop_sequence" if completion.detokenizer.stopped else "eos_token" if reason == "stop" else "length"
    sizes = {"generated_tokens": len(request.tokens), "input_length": len(request.prompt)}
    return {"finish_reason": reason, **sizes, "seed": request.seed if request.temperature else None}


async def deltas(completion: Completion, chat: bool) -> AsyncIterator[tuple[dict, str | None]]:
    """The contents of the chunks of OpenAI's two protocols, and in the last one the finish reason."""
    if chat:
        yield {"delta": {"role": "assistant", "content": ""}}, None
    async for _, chunks in completion.batches():
        for kind, text in join_chunks(chunks):  # several if the reader is slow
            if kind == "text":
                yield {"delta": {"content": text}} if chat else {"text": text}, None
            elif chat and not completion.request.stop_at_call:
                yield {"delta": {"content": "", "tool": {kind: text}}}, None
    if completion.finish_reason == "tool_calls":
        yield {"delta": {"tool_calls": [{"index": 0, **call} for call in message_of(completion)["tool_calls"]]}}, None
    yield {"delta": {}} if chat else {"text": ""}, completion.finish_reason


def message_of(completion: Completion) -> dict:
    """The assistant message of a completion: its text, and the calls that were answered or are left to the client."""
    message = {"role": "assistant", "content": text_of(completion.chunks)}
    steps: list[dict] = []
    for kind, text in join_chunks(completion.chunks):
        if kind == "call" or (kind == "result" and not steps):
            steps.append({"call": "", "result": ""})
        if kind != "text":
            steps[-1][kind] += text
    if completion.finish_reason == "tool_calls":
        arguments = json.dumps({"expression": "".join(step["call"] for step in steps)})
        function = {"name": "python", "arguments": arguments}
        call = {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}
        return {**message, "content": message["content"] or None, "tool_calls": [call]}
    return {**message, **({"tool_steps": steps} if steps else {})}


async def whole(completions: list[Completion], http: HTTPRequest) -> None:
    """Wait for all of them; when the client leaves they end."""
    left = asyncio.create_task(http.receive())  # after the body, nothing else can come
    left.add_done_callback(lambda _: [completion.end() for completion in completions])
    try:
        await asyncio.gather(*(completion.read() for completion in completions))
    finally:
        left.cancel()


def usage(completions: list[Completion], n: int) -> dict:
    """Tokens of `n` completions of each prompt, which is counted once."""
    new = sum(len(completion.request.tokens) for completion in completions)
    prompt = sum(len(completion.request.prompt) for completion in completions[::n])
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


def stream(chunks: AsyncIterator[dict], http: HTTPRequest) -> StreamingResponse:
    """Server-sent events; an error on the way becomes a last event."""

    async def lines():
        try:
            async for chunk in chunks:
                yield f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"
        except WorkerDiedError as error:
            yield f"data: {(await failure(http, error)).body.decode()}\n\n"
        if http.url.path.startswith("/v1"):
            yield "data: [DONE]\n\n"

    return StreamingResponse(lines(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


async def failure(http: HTTPRequest, error: Exception) -> JSONResponse:
    """The reply to a request that ended with one of FAILURES, in the shape that the clients of its protocol expect."""
    status, kind = next(FAILURES[kind] for kind in type(error).__mro__ if kind in FAILURES)
    message, param, headers = str(error), None, {"Retry-After": RETRY_AFTER} if status == 429 else None
    if isinstance(error, HTTPException):
        status, message, headers = error.status_code, error.detail, error.headers
        if message == "Not Found":  # of a path, such as that of a client whose base URL lacks /v1
            message = f"no route {http.url.path[:80]}; those of OpenAI are {OPENAI_PATHS}"
    elif isinstance(error, ValidationError):
        errors = error.errors(include_url=False, include_input=False)
        first = max(errors, key=lambda e: (len(e["loc"]), e["type"] != "string_type"))  # of a union, the nearest form
        param = ".".join(str(part) for part in first["loc"] if re.fullmatch(r"\w+", str(part)) and part != "str")
        cause = first.get("ctx", {}).get("error")
        message = str(cause) if isinstance(cause, InputError) else f"{param or 'the body'}: {first['msg']}"
    elif status == 500:
        message = "the server failed; its log says why"
    message = message[:500]  # it may quote the request
    if http.url.path in TGI_PATHS:
        return JSONResponse({"error": message, "error_type": kind}, status, headers)
    body = {"message": message, "type": kind, "param": param or None, "code": None}
    return JSONResponse({"error": body}, 400 if status == 422 else status, headers)
