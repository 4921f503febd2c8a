"""An HTTP server over the fast generator that speaks OpenAI's and text-generation-inference's protocols.

    python scripts/chat_web.py --run-dir runs/d24            # a chat page on http://127.0.0.1:8000
    InferenceClient(base_url="http://127.0.0.1:8000").chat_completion([{"role": "user", "content": "Hello"}])
    OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="-").chat.completions.create(model="-", messages=[...])

One `Worker` thread a GPU owns a model and its `Engine`; requests that come while others run join them at the next
step (continuous batching). The queue is bounded: beyond it a request is refused at once with 429, not kept waiting.

Calls of the calculator run here, inside the answer; streamed chunks show them in an extra field, `delta.tool` =
{"call": text} or {"result": text}, and whole answers in `message.tool_steps`. A client that passes the function
`python` in `tools` gets `tool_calls` instead and runs them itself. Turns that do not fit into the context are dropped,
oldest first; `dropped_messages` says how many. Token log-probabilities are not computed: TGI's `logprob` is null.

Other people's servers (tests/test_other_servers.py): `transformers serve` runs a first-generation model exported as
transformers' own `nanochat`. vLLM's Transformers backend runs that export, and by its source our class, too: it wants
attention through ALL_ATTENTION_FUNCTIONS and takes the softcap from the config; the second generation, whose smear
needs the token before, refuses to start there. TGI is in maintenance mode and pins transformers 4.51, which knows
neither class. All three stop at a call and leave it to the client.
"""

import asyncio
import contextlib
import dataclasses
import itertools
import json
import time
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import torch
from fastapi import FastAPI
from fastapi import Request as HTTPRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from pydantic import BaseModel, Field

from ..errors import InputError
from .generate import Piece, Request, TextDecoder
from .worker import Answer, Broken, Busy, Worker

MAX_BODY = 1 << 20  # bytes of a request
PAGE = Path(__file__).with_name("page.html")


class Sampling(BaseModel):
    """What both protocols share; None takes the server's default."""

    temperature: float | None = Field(None, ge=0, le=5)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0)
    seed: int | None = None
    stop: str | list[str] | None = None


class OpenAIBody(Sampling):
    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    stream: bool = False
    stream_options: dict | None = None
    n: int = Field(1, ge=1, le=16)


class ChatBody(OpenAIBody):
    messages: list[dict] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    tools: list[dict] | None = None
    tool_choice: str | dict | None = None


class CompletionBody(OpenAIBody):
    prompt: str | list[int] | list[str]


class TGIParameters(Sampling):
    max_new_tokens: int | None = Field(None, ge=1)
    do_sample: bool = False
    return_full_text: bool | None = None
    truncate: int | None = Field(None, ge=1)
    details: bool = False
    stop_sequences: list[str] | None = None


class TGIBody(BaseModel):
    inputs: str = Field(min_length=1)
    parameters: TGIParameters = TGIParameters()
    stream: bool = False


class Server:
    """Routes and limits over a list of workers; `app` is the ASGI application.

    Args:
        workers: started threads, one a GPU.
        name: what /v1/models and /info call the model.
        max_new_tokens: of one answer, unless asked for fewer. max_seconds: of one answer, then it is cut.
    """

    def __init__(
        self,
        workers: list[Worker],
        name: str,
        temperature: float = 0.6,
        top_k: int = 50,
        max_new_tokens: int = 512,
        max_seconds: float = 120.0,
    ):
        self.workers, self.name = workers, name
        self.temperature, self.top_k, self.max_new_tokens = temperature, top_k, max_new_tokens
        self.max_seconds, self.started = max_seconds, int(time.time())
        for worker in workers:
            worker.ready.wait()
            if isinstance(worker.error, torch.OutOfMemoryError):
                raise InputError(f"the memory of {worker.device} is full: lower --rows, or free it") from worker.error
            if worker.error is not None:
                raise worker.error
        self.engine = workers[0].engine
        self.tokenizer = self.engine.tokenizer
        self.app = FastAPI(title="nanochat", lifespan=self.lifespan)
        self.routes()

    @contextlib.asynccontextmanager
    async def lifespan(self, app: FastAPI):
        yield
        for worker in self.workers:
            worker.close()

    # ---- from bodies to requests -----------------------------------------------------------------------------------

    def request(self, prompt: list[int], body: Sampling, new_tokens: int | None, **options) -> Request:
        """Raises InputError if the prompt cannot be run."""
        self.engine.check(prompt)
        seed = time.time_ns() % 2**31 if body.seed is None else body.seed % 2**63
        return Request(
            prompt,
            min(new_tokens or self.max_new_tokens, self.max_new_tokens),
            self.temperature if body.temperature is None else body.temperature,
            self.top_k if body.top_k is None else body.top_k,
            1.0 if body.top_p is None else body.top_p,
            seed,
            **options,
        )

    def chat_prompt(self, body: ChatBody) -> tuple[list[int], int]:
        """-> ids, and how many of the oldest messages were dropped to make room."""
        messages = [readable_message(message) for message in body.messages]
        room = min(body.max_completion_tokens or body.max_tokens or self.max_new_tokens, self.engine.length // 4)
        kept = self.engine.fit(messages, room)
        return self.engine.encode(kept), len(messages) - len(kept)

    def text_prompt(self, text: str | list[int]) -> list[int]:
        """Text as it is, special tokens included (as in TGI), with bos before it if it has none."""
        if not isinstance(text, str):
            return text
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        bos = self.tokenizer.bos_token_id
        return ids if ids[:1] == [bos] else [bos, *ids]

    # ---- routes ----------------------------------------------------------------------------------------------------

    def routes(self) -> None:
        app = self.app
        app.middleware("http")(limit_body)
        app.exception_handler(InputError)(lambda http, error: failure(http, 400, str(error), "validation"))
        app.exception_handler(RequestValidationError)(
            lambda http, error: failure(http, 422, explain_validation(error), "validation")
        )
        busy = "the model is overloaded: try again in a few seconds"
        app.exception_handler(Busy)(lambda http, error: failure(http, 429, busy, "overloaded"))
        app.exception_handler(Broken)(lambda http, error: failure(http, 503, str(error), "unavailable"))
        app.get("/", response_class=HTMLResponse)(lambda: PAGE.read_text(encoding="utf-8"))
        app.get("/health")(self.health)
        app.get("/info")(self.info)
        app.get("/v1/models")(self.models)
        app.post("/v1/chat/completions")(self.chat)
        app.post("/v1/completions")(self.completions)
        app.post("/")(self.compatible)
        app.post("/generate")(self.generate)
        app.post("/generate_stream")(self.generate_stream)

    async def health(self, http: HTTPRequest):
        broken = [str(worker.error) for worker in self.workers if worker.error or not worker.is_alive()]
        return failure(http, 503, broken[0], "unavailable") if broken else {}

    async def info(self) -> dict:
        decoder = self.engine.decoder
        return {
            "model_id": self.name,
            "model_dtype": str(decoder.dtype).removeprefix("torch."),
            "model_device_type": decoder.device.type,
            "model_pipeline_tag": "text-generation",
            "max_concurrent_requests": sum(w.engine.decoder.rows + w.max_waiting for w in self.workers),
            "max_input_tokens": self.engine.length - 1,
            "max_total_tokens": self.engine.length,
            "max_batch_size": decoder.rows,
            "num_replicas": len(self.workers),
            "router": "nanochat_hf",
        }

    async def models(self) -> dict:
        model = {"id": self.name, "object": "model", "created": self.started, "owned_by": "nanochat_hf"}
        return {"object": "list", "data": [model]}

    def answers(self, prompt: list[int], body: OpenAIBody, limit: int | None, **options) -> list[Answer]:
        """Start `body.n` answers to one prompt, all or none."""
        if body.stream and body.n > 1:
            raise InputError("streaming gives one answer: leave n out")
        first = self.request(prompt, body, limit, **options)
        started: list[Answer] = []
        try:
            for i in range(body.n):
                request = dataclasses.replace(first, seed=first.seed + i, tokens=[])
                started.append(Answer(self.workers, request, listed(body.stop), self.max_seconds))
        except (Busy, Broken):
            for answer in started:
                answer.request.cancelled = True
            raise
        return started

    async def chat(self, body: ChatBody, http: HTTPRequest):
        prompt, dropped = self.chat_prompt(body)
        by_client = bool(body.tools) and body.tool_choice != "none"
        if by_client and not any((tool.get("function") or {}).get("name") == "python" for tool in body.tools):
            raise InputError("this model knows one tool: a function named python with one argument, expression")
        limit = body.max_completion_tokens or body.max_tokens
        answers = self.answers(prompt, body, limit, stop_at_call=by_client, tools=body.tool_choice != "none")
        head = {"object": "chat.completion", **({"dropped_messages": dropped} if dropped else {})}
        return await self.reply(http, body, answers, head, chat_deltas, {"delta": {}}, message_of)

    async def completions(self, body: CompletionBody, http: HTTPRequest):
        prompt = body.prompt
        if isinstance(prompt, list) and prompt and isinstance(prompt[0], str):
            if len(prompt) > 1:
                raise InputError("send one prompt at a time")
            prompt = prompt[0]
        if not prompt:
            raise InputError("the prompt is empty")
        answers = self.answers(self.text_prompt(prompt), body, body.max_tokens)
        head = {"object": "text_completion"}
        return await self.reply(
            http, body, answers, head, text_deltas, {"text": ""}, lambda p, _: {"text": text_of(p)}
        )

    async def reply(self, http: HTTPRequest, body: OpenAIBody, answers, head: dict, deltas, last: dict, whole):
        """What OpenAI's routes have in common: `deltas` and `last` make chunks of an answer, `whole` its choice."""
        chat = "chat" in head["object"]
        head |= {"id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}", "created": int(time.time())}
        head |= {"model": self.name}

        def choice(i: int, content: dict, reason: str | None) -> dict:
            return {"index": i, **content, "finish_reason": reason, "logprobs": None}

        if not body.stream:
            pieces = await asyncio.gather(*(answer.whole(http.is_disconnected) for answer in answers))
            choices = [choice(i, whole(p, a.reason), a.reason) for i, (a, p) in enumerate(zip(answers, pieces))]
            return {**head, "choices": choices, "usage": usage(answers)}

        async def chunks():
            async for content in deltas(answers[0]):
                yield {**head, "choices": [choice(0, content, None)]}
            yield {**head, "choices": [choice(0, last, answers[0].reason)]}
            if (body.stream_options or {}).get("include_usage"):
                yield {**head, "choices": [], "usage": usage(answers)}

        head["object"] += ".chunk" if chat else ""
        return stream(chunks(), http)

    def start_tgi(self, body: TGIBody) -> Answer:
        parameters = body.parameters
        prompt = self.text_prompt(body.inputs)
        if parameters.truncate:
            prompt = prompt[-parameters.truncate :]
        if parameters.temperature is None:
            parameters.temperature = 1.0 if parameters.do_sample else 0.0
        if parameters.top_k is None:
            parameters.top_k = 0
        request = self.request(prompt, parameters, parameters.max_new_tokens or 20)  # 20 as in TGI
        stops = [*listed(parameters.stop), *(parameters.stop_sequences or [])]
        return Answer(self.workers, request, stops, self.max_seconds)

    async def compatible(self, body: TGIBody, http: HTTPRequest):
        """TGI's root: one route for both, as the Inference API has it; a plain answer is a list there."""
        if body.stream:
            return await self.generate_stream(body, http)
        return [await self.generate(body, http)]

    async def generate(self, body: TGIBody, http: HTTPRequest) -> dict:
        answer = self.start_tgi(body)
        text = text_of(await answer.whole(http.is_disconnected))
        reply = {"generated_text": body.inputs + text if body.parameters.return_full_text else text}
        if body.parameters.details:
            decoder = TextDecoder(self.tokenizer)
            tokens = [self.tgi_token(token, decoder) for token in answer.request.tokens]
            reply["details"] = {**self.tgi_end(answer), "prefill": [], "tokens": tokens}
        return reply

    async def generate_stream(self, body: TGIBody, http: HTTPRequest):
        return stream(self.tgi_events(self.start_tgi(body)), http)

    async def tgi_events(self, answer: Answer) -> AsyncIterator[dict]:
        """One event a token; the last one carries the whole text and why it ended."""
        decoder, text, index, last = TextDecoder(self.tokenizer), "", 0, None
        async for tokens, pieces in answer.batches():
            text += text_of(pieces)
            for token in tokens:
                if last is not None:
                    yield last
                index += 1
                last = {
                    "index": index,
                    "token": self.tgi_token(token, decoder),
                    "generated_text": None,
                    "details": None,
                }
        if last is not None:
            yield {**last, "generated_text": text, "details": self.tgi_end(answer)}

    def tgi_token(self, token: int, decoder: TextDecoder) -> dict:
        special = token in decoder.specials
        return {"id": token, "text": text_of(decoder.push([token])), "logprob": None, "special": special}

    def tgi_end(self, answer: Answer) -> dict:
        reason = "stop_sequence" if answer.stopped else "eos_token" if answer.reason == "stop" else "length"
        usage = {"generated_tokens": len(answer.request.tokens), "input_length": len(answer.request.prompt)}
        return {"finish_reason": reason, **usage, "seed": answer.request.seed if answer.request.temperature else None}


def readable_message(message: dict) -> dict:
    """A message of OpenAI's protocol as our template reads it: arguments of calls as a mapping, not as JSON text."""
    calls = []
    for call in message.get("tool_calls") or []:
        function = dict(call.get("function") or {})
        if isinstance(function.get("arguments"), str):
            with contextlib.suppress(ValueError):
                function["arguments"] = json.loads(function["arguments"])
        calls.append({"type": "function", "function": function})
    if "role" not in message:
        raise InputError("each message needs a role: system, user, assistant or tool")
    kept = {"role": message["role"], "content": message.get("content") or ""}
    return {**kept, "tool_calls": calls} if calls else kept


def tool_call(expression: str) -> dict:
    function = {"name": "python", "arguments": json.dumps({"expression": expression})}
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}


def listed(stop: str | list[str] | None) -> list[str]:
    return [stop] if isinstance(stop, str) else stop or []


def text_of(pieces: list[Piece]) -> str:
    """What the model says, without its calls and their results."""
    return "".join(piece for piece in pieces if piece.kind == "text")


async def text_deltas(answer: Answer) -> AsyncIterator[dict]:
    async for _, pieces in answer.batches():
        if text := text_of(pieces):
            yield {"text": text}


async def chat_deltas(answer: Answer) -> AsyncIterator[dict]:
    yield {"delta": {"role": "assistant", "content": ""}}
    calls = ""
    async for _, pieces in answer.batches():
        for piece in pieces:
            if piece.kind == "text":
                yield {"delta": {"content": str(piece)}}
            elif answer.request.stop_at_call:
                calls += piece
            else:
                yield {"delta": {"content": "", "tool": {piece.kind: str(piece)}}}
    if answer.reason == "tool_calls":
        yield {"delta": {"tool_calls": [{"index": 0, **tool_call(calls)}]}}


def message_of(pieces: list[Piece], reason: str) -> dict:
    """The assistant message of an answer: its text, and the calls that were made or are left to the client."""
    message = {"role": "assistant", "content": text_of(pieces)}
    if reason == "tool_calls":
        message["tool_calls"] = [tool_call("".join(piece for piece in pieces if piece.kind == "call"))]
        return {"message": {**message, "content": message["content"] or None}}
    steps: list[dict] = []
    for kind, group in itertools.groupby(pieces, lambda piece: piece.kind):
        if kind == "call" or (kind == "result" and not steps):
            steps.append({"call": "", "result": ""})
        if kind != "text":
            steps[-1][kind] += "".join(group)
    return {"message": {**message, **({"tool_steps": steps} if steps else {})}}


def usage(answers: list[Answer]) -> dict:
    """Tokens of answers to one prompt, which is counted once."""
    new = sum(len(answer.request.tokens) for answer in answers)
    prompt = len(answers[0].request.prompt)
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


def stream(chunks: AsyncIterator[dict], http: HTTPRequest) -> StreamingResponse:
    """Server-sent events; an error on the way becomes a last event."""
    openai = http.url.path.startswith("/v1")

    async def lines():
        try:
            async for chunk in chunks:
                yield f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"
        except Broken as error:
            yield f"data: {json.dumps(error_body(openai, str(error), 'unavailable'))}\n\n"
        if openai:
            yield "data: [DONE]\n\n"

    return StreamingResponse(lines(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


def error_body(openai: bool, message: str, kind: str) -> dict:
    """The shape in which each protocol's clients look for what went wrong."""
    if openai:
        return {"error": {"message": message, "type": kind, "param": None, "code": None}}
    return {"error": message, "error_type": kind}


def failure(http: HTTPRequest, status: int, message: str, kind: str) -> JSONResponse:
    openai = http.url.path.startswith("/v1")
    status = 422 if kind == "validation" and not openai else 400 if kind == "validation" else status
    return JSONResponse(error_body(openai, message, kind), status)


def explain_validation(error: RequestValidationError) -> str:
    first = error.errors()[0]
    return f"{'.'.join(str(part) for part in first['loc'][1:]) or 'the body'}: {first['msg']}"


async def limit_body(http: HTTPRequest, call_next):
    """Refuse bodies that are too large before reading them."""
    size = http.headers.get("content-length", "0")
    if http.method == "POST" and (not size.isdigit() or int(size) > MAX_BODY or "content-length" not in http.headers):
        return failure(http, 413, f"a request may have {MAX_BODY} bytes and must say its length", "too_large")
    return await call_next(http)
