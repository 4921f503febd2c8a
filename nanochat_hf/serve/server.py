"""An HTTP server over the fast generator that speaks the protocols of OpenAI and text-generation-inference.

    python scripts/chat_web.py --run-dir runs/d24            # a chat page on http://127.0.0.1:8000
    InferenceClient(base_url="http://127.0.0.1:8000").chat_completion([{"role": "user", "content": "Hello"}])
    OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="-").chat.completions.create(model="-", messages=[...])

Each GPU has a replica (`worker`). The queue is bounded: a request beyond it gets status 429 at once.

The calculator runs here, inside the completion. Streamed chunks show its calls in an extra field, `delta.tool` =
{"call": text} or {"result": text}; whole completions list them in `message.tool_steps`, which is read where a client
sends the message back. A client that passes the function `python` in `tools` gets `tool_calls` instead and runs them
itself. Turns that do not fit into the context are dropped, oldest first; `dropped_messages` says how many. Token
log-probabilities are not computed: TGI's `logprob` is null.
"""

import asyncio
import contextlib
import gc
import json
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from fastapi import FastAPI
from fastapi import Request as HTTPRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from pydantic import AliasChoices, BaseModel, BeforeValidator, Field

from ..data.transforms import BadRow, normalize
from ..errors import InputError
from .engine import IncrementalDetokenizer, Request, join_chunks, text_of
from .worker import Completion, QueueFullError, Worker, WorkerDiedError

MAX_BODY = 1 << 20  # bytes of a request
PAGE = Path(__file__).with_name("ui.html")
Limit = Annotated[int | None, Field(ge=1)]
Stops = Annotated[list[str], BeforeValidator(lambda stop: [stop] if isinstance(stop, str) else stop or [])]


class TooLarge(Exception):
    """A body of more than MAX_BODY bytes, or of unknown length."""


FAILURES = {  # exception -> status, and its name in the reply
    InputError: (422, "validation"),
    RequestValidationError: (422, "validation"),
    QueueFullError: (429, "overloaded"),
    WorkerDiedError: (503, "unavailable"),
    TooLarge: (413, "too_large"),
}


class Sampling(BaseModel):
    """What both protocols share; None takes the server's default."""

    temperature: float | None = Field(None, ge=0, le=5)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, lt=2**31)
    seed: int | None = None
    stop: Stops = Field([], validation_alias=AliasChoices("stop", "stop_sequences"))


class OpenAIBody(Sampling):
    max_tokens: Limit = None
    max_completion_tokens: Limit = None
    stream: bool = False
    stream_options: dict | None = None
    n: int = Field(1, ge=1, le=16)


class ToolStep(BaseModel):
    call: str
    result: str


class Message(BaseModel):
    role: str
    content: str | list[dict] | None = None
    tool_steps: list[ToolStep] | None = None  # of a completion that is sent back
    tool_calls: list[dict] | None = None
    tool_call_id: str | None = None
    function_call: dict | None = None


class ChatBody(OpenAIBody):
    messages: list[Message] = Field(min_length=1)
    tools: list[dict] | None = None
    tool_choice: str | dict | None = None


class CompletionBody(OpenAIBody):
    prompt: str | list[int] | list[str] = Field(min_length=1)


class TGIParameters(Sampling):
    max_new_tokens: Limit = None
    do_sample: bool = False
    return_full_text: bool | None = None
    truncate: Limit = None
    details: bool = False


class TGIBody(BaseModel):
    inputs: str = Field(min_length=1)
    parameters: TGIParameters = TGIParameters()
    stream: bool = False


@dataclass(eq=False)
class Server:
    """Routes and limits over a list of workers; `app` is the ASGI application.

    Raises:
        InputError: a GPU's memory is too small. Any other error of a worker is raised unchanged.
    """

    workers: list[Worker]  # started threads, one per GPU
    name: str  # what /v1/models and /info call the model
    temperature: float = 0.6
    top_k: int = 50
    max_new_tokens: int = 512  # of one completion, unless the request says fewer
    request_timeout: float = 120.0  # seconds of one completion, then it is cut

    def __post_init__(self):
        for worker in self.workers:
            worker.ready.wait()
        for worker in self.workers:
            if isinstance(worker.error, torch.OutOfMemoryError):
                reason = f"the memory of {worker.device} is full: lower --max-batch-size, or free it"
                raise InputError(reason) from worker.error
            if worker.error is not None:
                raise worker.error
        self.started = int(time.time())
        self.engine = self.workers[0].engine
        self.tokenizer = self.engine.tokenizer
        handlers = dict.fromkeys(FAILURES, failure)
        app = self.app = FastAPI(title="nanochat", lifespan=self.lifespan, exception_handlers=handlers)
        app.add_middleware(BodyLimit)
        app.get("/", response_class=HTMLResponse)(lambda: PAGE.read_text(encoding="utf-8"))
        app.get("/health")(self.health)
        app.get("/info")(self.info)
        app.get("/v1/models")(self.models)
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
        """503 as soon as one replica has broken, so that somebody restarts the process; the others still answer."""
        for worker in self.workers:
            if worker.broken:
                raise WorkerDiedError(str(worker.error))
        return {}

    async def info(self) -> dict:
        decoder = self.engine.decoder
        return {
            "model_id": self.name,
            "model_dtype": str(decoder.dtype).removeprefix("torch."),
            "model_device_type": decoder.device.type,
            "model_pipeline_tag": "text-generation",
            "max_concurrent_requests": sum(worker.capacity for worker in self.workers),
            "max_input_tokens": self.engine.length - 1,
            "max_total_tokens": self.engine.length,
            "max_batch_size": decoder.slots,
            "num_replicas": len(self.workers),
            "router": "nanochat_hf",
        }

    async def models(self) -> dict:
        model = {"id": self.name, "object": "model", "created": self.started, "owned_by": "nanochat_hf"}
        return {"object": "list", "data": [model]}

    def encode_text(self, text: str) -> list[int]:
        """Text as it is, special tokens included (as in TGI), with bos before it if it has none."""
        if text != text.encode(errors="replace").decode():
            raise InputError("the prompt holds half of a surrogate pair, which is no character: send whole characters")
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        bos = self.tokenizer.bos_token_id
        return ids if ids[:1] == [bos] else [bos, *ids]

    def start(self, prompt: list[int], body: Sampling, limit: int | None, n: int = 1, **options) -> list[Completion]:
        """Start `n` completions of one prompt, all or none; raises as `Worker.submit` does."""
        sampling = body.model_dump(include={"temperature", "top_k", "top_p"}, exclude_none=True)
        options |= {"temperature": self.temperature, "top_k": self.top_k, **sampling}
        options["max_new_tokens"] = min(limit or self.max_new_tokens, self.max_new_tokens)
        seed = time.time_ns() % 2**31 if body.seed is None else body.seed % 2**63
        completions: list[Completion] = []
        try:
            for i in range(n):
                request = Request(prompt, seed=seed + i, **options)
                completions.append(Completion(self.workers, request, body.stop, self.request_timeout))
        except (QueueFullError, WorkerDiedError):
            for completion in completions:
                completion.end()
            raise
        return completions

    # ---- OpenAI ----------------------------------------------------------------------------------------------------

    async def chat(self, body: ChatBody, http: HTTPRequest):
        tools = body.tool_choice != "none"
        by_client = bool(body.tools) and tools
        if by_client and not any((tool.get("function") or {}).get("name") == "python" for tool in body.tools):
            raise InputError("this model knows one tool: a function named python with one argument, expression")
        try:
            messages = normalize([{"content": "", **m.model_dump(exclude_none=True)} for m in body.messages])
        except BadRow as error:
            raise InputError(f"these messages are no chat: {error}") from None
        room = min(body.max_completion_tokens or body.max_tokens or self.max_new_tokens, self.engine.length // 4)
        prompt, dropped = self.engine.encode(messages), 0
        if len(prompt) + room > self.engine.length:  # rare, so that most conversations are encoded only once
            shorter = self.engine.truncate(messages, room)
            prompt, dropped = self.engine.encode(shorter), len(messages) - len(shorter)
        head = {"dropped_messages": dropped} if dropped else {}
        return await self.reply(http, body, prompt, head, stop_at_call=by_client, tools=tools)

    async def completions(self, body: CompletionBody, http: HTTPRequest):
        prompt = body.prompt
        if isinstance(prompt, list) and isinstance(prompt[0], str):
            if len(prompt) > 1:
                raise InputError("send one prompt at a time")
            prompt = prompt[0]
        return await self.reply(http, body, self.encode_text(prompt) if isinstance(prompt, str) else prompt, {})

    async def reply(self, http: HTTPRequest, body: OpenAIBody, prompt: list[int], head: dict, **options):
        """What OpenAI's routes have in common: `head` is part of every chunk, `options` are those of `Request`."""
        if body.stream and body.n > 1:
            raise InputError("streaming gives one completion: leave n out")
        completions = self.start(prompt, body, body.max_completion_tokens or body.max_tokens, body.n, **options)
        chat = isinstance(body, ChatBody)
        head |= {"id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}", "created": int(time.time())}
        head |= {"model": self.name, "object": "chat.completion" if chat else "text_completion"}

        def choice(content: dict, reason: str | None, index: int = 0) -> dict:
            return {"index": index, **content, "finish_reason": reason, "logprobs": None}

        if not body.stream:
            await asyncio.gather(*(completion.whole(http.is_disconnected) for completion in completions))
            contents = [{"message": message_of(c)} if chat else {"text": text_of(c.chunks)} for c in completions]
            choices = [choice(x, c.finish_reason, i) for i, (x, c) in enumerate(zip(contents, completions))]
            return JSONResponse({**head, "choices": choices, "usage": usage(completions)})

        async def chunks() -> AsyncIterator[dict]:
            async for content, reason in deltas(completions[0], chat):
                yield {**head, "choices": [choice(content, reason)]}
            if (body.stream_options or {}).get("include_usage"):
                yield {**head, "choices": [], "usage": usage(completions)}

        head["object"] += ".chunk" if chat else ""
        return stream(chunks(), http)

    # ---- text-generation-inference ---------------------------------------------------------------------------------

    async def generate(self, body: TGIBody, http: HTTPRequest):
        """TGI's routes; the root streams if the body says so and else gives a list, as the Inference API has it."""
        parameters, path = body.parameters, http.url.path
        if parameters.temperature is None:
            parameters.temperature = 1.0 if parameters.do_sample else 0.0
        parameters.top_k = parameters.top_k or 0
        prompt = self.encode_text(body.inputs)[-(parameters.truncate or 0) :]
        (completion,) = self.start(prompt, parameters, parameters.max_new_tokens or 20)  # 20 as in TGI
        if path == "/generate_stream" or (path == "/" and body.stream):
            return stream(self.tgi_events(completion), http)
        text = text_of(await completion.whole(http.is_disconnected))
        reply = {"generated_text": body.inputs + text if parameters.return_full_text else text}
        if parameters.details:
            detokenizer = IncrementalDetokenizer(self.tokenizer)
            tokens = [tgi_token(token, detokenizer) for token in completion.request.tokens]
            reply["details"] = {**tgi_end(completion), "prefill": [], "tokens": tokens}
        return JSONResponse([reply] if path == "/" else reply)

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
    text = text_of(detokenizer.push([token]))
    return {"id": token, "text": text, "logprob": None, "special": detokenizer.is_special(token)}


def tgi_end(completion: Completion) -> dict:
    request, reason = completion.request, completion.finish_reason
    reason = "stop_sequence" if completion.stopped else "eos_token" if reason == "stop" else "length"
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


def usage(completions: list[Completion]) -> dict:
    """Tokens of completions of one prompt, which is counted once."""
    new = sum(len(completion.request.tokens) for completion in completions)
    prompt = len(completions[0].request.prompt)
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
    status, kind = FAILURES[type(error)]
    message = str(error)
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        message = f"{'.'.join(str(part) for part in first['loc'][1:]) or 'the body'}: {first['msg']}"
    if not http.url.path.startswith("/v1"):
        return JSONResponse({"error": message, "error_type": kind}, status)
    body = {"message": message, "type": kind, "param": None, "code": None}
    return JSONResponse({"error": body}, 400 if status == 422 else status)


class BodyLimit:
    """Refuses bodies that are too large before they are read.

    Plain ASGI: a function given to `app.middleware` would hide from the routes that a client hung up.
    """

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send) -> None:
        app = self.app
        if scope["type"] == "http" and scope["method"] == "POST":
            http = HTTPRequest(scope)
            size = http.headers.get("content-length", "")
            if not size.isdecimal() or int(size) > MAX_BODY:
                app = await failure(http, TooLarge(f"a request may have {MAX_BODY} bytes and must say its length"))
        await app(scope, receive, send)
