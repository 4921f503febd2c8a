"""Chat with a nanochat model in the browser: a Gradio Space that needs nothing but the model's repository.

    MODEL_ID=you/nanochat-d24 python app.py            # a Hub id, or the folder of a stage
    ENDPOINT_URL=http://127.0.0.1:8000 python app.py   # a TGI or OpenAI-compatible server does the work instead

On Spaces, MODEL_ID is a variable of the Space; without it the first of `models:` in README.md is taken. The model runs
on the GPU if there is one (ZeroGPU too); on a CPU a large one gets int8 weights. Its calls are answered inside
`generate` by the code beside the weights (`custom_generate/`), and shown as steps that can be opened. The page speaks
the browser's language, English or Korean; SPACE_LANGUAGE=ko or en fixes it.
"""

import os
import queue
import re
import sys
import threading
import time
from pathlib import Path

import gradio as gr
import torch
from huggingface_hub import InferenceClient
from torch import nn

HERE = Path(__file__).parent
ENDPOINT_URL = os.environ.get("ENDPOINT_URL")
MODEL_ID = os.environ.get("MODEL_ID") or next(
    iter(re.findall(r"^models:\s*\n\s*-\s*(\S+)", (HERE / "README.md").read_text(encoding="utf-8"), re.M)), None
)
MAX_CHARS = int(os.environ.get("MAX_CHARS", "8000"))  # of one message
MAX_NEW_TOKENS = int(os.environ.get("MAX_NEW_TOKENS", "1024"))  # of one answer, the slider's end
MAX_SECONDS = float(os.environ.get("MAX_SECONDS", "120"))  # of one answer
MAX_QUEUE = int(os.environ.get("MAX_QUEUE", "16"))  # visitors who may wait; the next one reads that the queue is full
MAX_SYSTEM = 2000  # characters of the system message
LARGE = 300_000_000  # parameters above which the weights are quantized to int8 on a CPU
STEP = "🧮 "  # begins the title of a tool step

LANGUAGE = os.environ.get("SPACE_LANGUAGE")  # "en" or "ko"; by default the browser's (LANGUAGE itself is gettext's)
TEXTS = {
    "en": {
        "system": "System message",
        "temperature": "Temperature (0: always the likeliest token)",
        "top_k": "Top-k (0: all tokens)",
        "max_tokens": "Most new tokens",
        "settings": "Settings",
        "examples": "Examples",
        "message": "Write a message",
        "hello": "<center>A small language model, trained from nothing.<br>It makes things up.</center>",
    },
    "ko": {
        "system": "시스템 메시지",
        "temperature": "온도 (0: 항상 가장 가능성 높은 토큰)",
        "top_k": "Top-k (0: 모든 토큰)",
        "max_tokens": "새 토큰 최대 개수",
        "settings": "설정",
        "examples": "예시",
        "message": "메시지를 입력하세요",
        "hello": "<center>처음부터 학습한 작은 언어 모델입니다.<br>사실이 아닌 말을 지어낼 수 있습니다.</center>",
    },
}
EXAMPLES = {
    "en": ["Hello", "What is 12 * 34?", "How many letters r are in strawberry?", "Why is the sky blue?"],
    "ko": ["안녕하세요", "12 * 34는 얼마인가요?", "딸기는 무슨 색인가요?", "하늘은 왜 파란가요?"],
}
CSS = ".message { word-break: keep-all; overflow-wrap: anywhere; }"  # Korean lines break between words
if LANGUAGE and LANGUAGE not in TEXTS:
    sys.exit(f"error: SPACE_LANGUAGE is {LANGUAGE!r}; use {' or '.join(TEXTS)}")
i18n = gr.I18n(**{browser: TEXTS[LANGUAGE or browser] for browser in TEXTS})

try:  # ZeroGPU lends a GPU for the length of a decorated call
    from spaces import GPU

    gpu = GPU(duration=int(MAX_SECONDS))
except ImportError:

    def gpu(function):
        return function


class Int8WeightOnlyLinear(nn.Module):
    """A linear map with int8 weights and one scale per row, in the form that PyTorch's CPU kernel reads."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight = linear.weight.detach().float()
        scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-8) / 127
        self.register_buffer("weight", (weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale[:, 0].bfloat16())

    def forward(self, x):
        rows = x.flatten(0, -2)
        if len(rows) < 16:
            return torch._weight_int8pack_mm(rows, self.weight, self.scale).unflatten(0, x.shape[:-1])
        return nn.functional.linear(x, self.weight.to(x.dtype)) * self.scale  # a prompt: a plain matmul is faster


def quantize_int8(model: nn.Module) -> None:
    """Cast to bfloat16, and matrices to int8: not embeddings, of which a token reads one row, nor small ones."""
    model.to(torch.bfloat16)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear) and min(child.weight.shape) >= 64:
                setattr(module, name, Int8WeightOnlyLinear(child))


def load():
    """(model, tokenizer) of MODEL_ID; ends the program with one line if there is none."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not MODEL_ID:
        sys.exit("error: set MODEL_ID to a Hub id or a folder, or ENDPOINT_URL to a server")
    try:
        tokenizer = AutoTokenizer.from_pretrained(MODEL_ID, trust_remote_code=True)
        model = AutoModelForCausalLM.from_pretrained(MODEL_ID, trust_remote_code=True)
    except (OSError, ValueError) as error:
        sys.exit(f"error: no model in {MODEL_ID}: {' '.join(str(error).split())[:300]}")
    if not tokenizer.chat_template:
        sys.exit(f"error: {MODEL_ID} has no chat template: take a model that was trained to chat (stage sft or rl)")
    if torch.cuda.is_available():
        model = model.to("cuda", torch.bfloat16)
    elif model.num_parameters() > LARGE:
        quantize_int8(model)
    return model.eval(), tokenizer


model, tokenizer = (None, None) if ENDPOINT_URL else load()


# ---- from Gradio's history to messages and back --------------------------------------------------------------------

# Code about which no Markdown parser has doubts: fences at the left, and text between two backticks in one line.
CODE = re.compile(r"(^```[^`\n]*\n(?:[^`\n].*\n|\n)*?```[ ]*$|(?<![`\\])`[^`|$\n]+`(?!`))", re.M)
JOINER = "\u2060"  # has no width and no meaning; after < or & it keeps HTML from seeing a tag or an entity


def outside_code(text: str, pattern: str, replacement: str) -> str:
    """`text` with a pattern replaced in all that Markdown may show as anything but code."""
    parts = CODE.split(text)
    if any("`" in part for part in parts[::2]):  # what is code depends on the parser
        return re.sub(pattern, replacement, text)
    return "".join(part if i % 2 else re.sub(pattern, replacement, part) for i, part in enumerate(parts))


def escape(text: str) -> str:
    """Tags and entities in a message become visible text; in code Markdown shows them as they are anyway.

    Not `&lt;`: when a text comes back (next turn, retry, edit) it could not be told from one that the user wrote.
    """
    return outside_code(text, rf"<(?=[A-Za-z/!?{JOINER}])|&(?=#?\w+;|{JOINER})", rf"\g<0>{JOINER}")


def unescape(text: str) -> str:
    return outside_code(text, f"([<&]){JOINER}", r"\1")


def show_tags(chatbot: gr.Chatbot) -> gr.Chatbot:
    """Make a Chatbot show HTML tags instead of obeying or dropping them (a subclass makes Gradio write .pyi files)."""
    to_browser = chatbot._postprocess_content

    def escaped(message):
        content = to_browser(message)
        if content is not None and content.type == "text":
            content.text = escape(unescape(content.text))  # what came back from the browser is escaped already
        return content

    chatbot._postprocess_content = escaped
    return chatbot


def text_of(content) -> str:
    if isinstance(content, str):
        return unescape(content)
    return "".join(unescape(part.get("text", "")) for part in content if isinstance(part, dict))


def messages_of(history: list[dict], message: str, system: str, with_tools: bool) -> list[dict]:
    """Gradio's history and the new message as a conversation; tool steps become calls and results again."""
    messages = [{"role": "system", "content": system.strip()}] if system.strip() else []
    for entry in history:
        text, title = text_of(entry["content"]), (entry.get("metadata") or {}).get("title") or ""
        if title.startswith(STEP):
            if with_tools:
                function = {"name": "python", "arguments": {"expression": title.removeprefix(STEP)}}
                call = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}
                messages += [call, {"role": "tool", "content": text.strip("`\n ")}]
        elif not title:  # a title of another kind is a warning of ours
            messages = answered(messages) if entry["role"] == "user" else messages
            messages.append({"role": entry["role"], "content": text})
    return [*answered(messages), {"role": "user", "content": unescape(message)}]


def answered(messages: list[dict]) -> list[dict]:
    """The messages without a last question that got no answer: it was stopped, or failed."""
    return messages[:-1] if messages and messages[-1]["role"] == "user" else messages


KINDS = {"<|python_start|>": "call", "<|output_start|>": "result"}  # of the text after a special token; else "text"


def parts_of(text: str) -> list[tuple[str, str]]:
    """An answer so far, with its special tokens, as (kind, text): "text", "call" or "result"."""
    first, *rest = re.split(r"(<\|\w+\|>)", text)
    return [("text", first), *((KINDS.get(token, "text"), part) for token, part in zip(rest[::2], rest[1::2]))]


def add_delta(parts: list[tuple[str, str]], delta) -> list[tuple[str, str]]:
    """The parts with what a chunk adds: text, or a bit of a call or of a result (our server's extra field)."""
    for kind, text in {**(delta.get("tool") or {}), "text": delta.content or ""}.items():
        if text and parts and parts[-1][0] == kind:
            parts = [*parts[:-1], (kind, parts[-1][1] + text)]
        elif text:
            parts = [*parts, (kind, text)]
    return parts


def show(parts: list[tuple[str, str]]) -> list[dict]:
    """An answer so far as Gradio's messages: text, and tool steps, which are pending until their result begins."""
    messages = []
    for kind, text in parts:
        if kind == "call":
            metadata = {"title": STEP + text, "status": "pending"}
            messages.append({"role": "assistant", "content": "```\n\n```", "metadata": metadata})
        elif kind == "result" and messages and messages[-1].get("metadata", {}).get("status") == "pending":
            messages[-1]["content"] = f"```\n{text}\n```"
            messages[-1]["metadata"]["status"] = "done"
        elif text := re.sub("\ufffd+\\Z", "", text):  # a character that is not complete yet
            if not messages or "metadata" in messages[-1]:
                messages.append({"role": "assistant", "content": ""})
            messages[-1]["content"] += text
    return messages


# ---- generation ----------------------------------------------------------------------------------------------------


def encode(messages: list[dict], room: int) -> list[int]:
    """Ids of the conversation without its oldest turns, so that `room` more tokens fit into the context.

    Each turn is counted once, from the last to the first that does not fit: special tokens separate them.
    """

    def ids_of(messages: list[dict], **options) -> list[int]:
        return tokenizer.apply_chat_template(messages, return_dict=False, **options)

    length = model.config.max_position_embeddings
    system = [m for m in messages[:1] if m["role"] == "system"]
    *starts, first = [i for i, m in enumerate(messages) if m["role"] == "user"]
    size = room + len(ids_of(system + messages[first:], add_generation_prompt=True))
    for start in reversed(starts):
        turn = messages[start:first]
        if len(str(turn)) > 64 * length:  # characters; tokens are shorter, and counting them would take long
            break
        size += len(ids_of(turn)) - 1  # without bos
        if size > length:
            break
        first = start
    ids = ids_of(system + messages[first:], add_generation_prompt=True)
    if len(ids) >= length:
        raise ValueError(f"The message has {len(ids)} tokens, the model reads at most {length}.")
    return ids


class TokenStreamer:
    """A streamer for `generate` whose tokens another thread reads; `stopped` ends generate."""

    def __init__(self):
        self.queue, self.prompt, self.stopped = queue.Queue(), True, False

    def put(self, ids: torch.Tensor):
        if self.stopped:
            raise InterruptedError
        if not self.prompt:
            self.queue.put(ids.item())
        self.prompt = False

    def end(self):
        pass


@gpu
def local_answer(messages: list[dict], temperature: float, top_k: int, max_tokens: int):
    """Yields the parts of the answer so far; raises the errors of `generate`."""
    length, streamer, tokens = model.config.max_position_embeddings, TokenStreamer(), []
    ids = encode(messages, min(max_tokens, length // 4))
    options = {"do_sample": temperature > 0, "max_new_tokens": min(max_tokens, length - len(ids))}
    if temperature > 0:
        options |= {"temperature": temperature, "top_k": top_k}

    def work():
        end = None
        try:
            inputs = torch.tensor([ids], device=model.device)
            model.generate(
                inputs, attention_mask=torch.ones_like(inputs), streamer=streamer, max_time=MAX_SECONDS, **options
            )
        except Exception as error:  # out of memory, for example: the other thread raises it
            end = error
        streamer.queue.put(end)

    threading.Thread(target=work, daemon=True).start()
    try:
        while isinstance(token := streamer.queue.get(), int):
            tokens.append(token)
            yield parts_of(tokenizer.decode(tokens))
    finally:
        streamer.stopped = True
    if token is not None:
        raise token


def remote_answer(messages: list[dict], temperature: float, max_tokens: int):
    """The same from a server; tried again twice before the first word."""
    client = InferenceClient(base_url=ENDPOINT_URL, timeout=30)
    parts, deadline = [], time.monotonic() + MAX_SECONDS
    for attempt in range(3):
        try:
            for chunk in client.chat_completion(messages, max_tokens=max_tokens, temperature=temperature, stream=True):
                for choice in chunk.choices or []:
                    parts = add_delta(parts, choice.delta)
                    yield parts
                if time.monotonic() > deadline:
                    break
            return
        except Exception as error:  # connection refused, time-out, 429, 5xx: the client's classes differ by version
            if parts or attempt == 2:
                raise ConnectionError(f"The model's server does not answer: {str(error)[:200]}") from None
            time.sleep(1 + attempt)


def warning(text: str) -> dict:
    return {"role": "assistant", "content": text, "metadata": {"title": "⚠️"}}


def problem_of(message: str, system: str = "") -> str:
    """Why a message will not be answered; empty if it will."""
    if not isinstance(message, str) or not message.strip():
        return "Write something first."
    for what, text, limit in (("message", message, MAX_CHARS), ("system message", system, MAX_SYSTEM)):
        if len(text) > limit:
            return f"The {what} has {len(text):,} characters; at most {limit:,} are read."
    return ""


def check(message: str):
    """Says at once, beside the text box, what will not be answered."""
    problem = problem_of(message)
    return gr.validate(not problem, problem)


def respond(message: str, history: list[dict], system: str, temperature: float, top_k: int, max_tokens: int):
    """Yields the answer so far as Gradio's messages. The page's limits hold for callers of the API, too."""
    system = system or ""
    if problem := problem_of(message, system):
        yield [warning(problem)]
        return
    messages = messages_of(history, message, system, with_tools=not ENDPOINT_URL)
    temperature, top_k = min(max(float(temperature or 0), 0.0), 2.0), max(int(top_k or 0), 0)
    max_tokens = max(min(int(max_tokens or MAX_NEW_TOKENS), MAX_NEW_TOKENS), 1)
    if ENDPOINT_URL:
        answer = remote_answer(messages, temperature, max_tokens)
    else:
        answer = local_answer(messages, temperature, top_k, max_tokens)
    now: list[dict] = []
    try:
        for parts in answer:
            now = show(parts)
            yield now
    except torch.OutOfMemoryError:
        yield [*now, warning("The GPU's memory is full: shorten the conversation, or lower the number of new tokens.")]
    except (ValueError, RuntimeError, ConnectionError) as error:
        yield [*now, warning(str(error)[:300])]


def build() -> gr.Blocks:
    name = ENDPOINT_URL or MODEL_ID
    is_hub_id = not ENDPOINT_URL and not Path(MODEL_ID).exists()
    link = f'<a href="https://huggingface.co/{name}">{name}</a>' if is_hub_id else "/".join(name.split("/")[-2:])
    inputs = [
        gr.Textbox("", label=i18n("system"), lines=2, max_length=MAX_SYSTEM),
        gr.Slider(0, 2, value=0.6, step=0.05, label=i18n("temperature")),
        gr.Slider(0, 200, value=50, step=1, label=i18n("top_k")),
        gr.Slider(8, MAX_NEW_TOKENS, value=min(512, MAX_NEW_TOKENS), step=8, label=i18n("max_tokens")),
    ]
    textbox = gr.Textbox(
        label=i18n("message"), placeholder=i18n("message"), submit_btn=True, stop_btn=True, autofocus=True
    )
    textbox.preprocess = lambda text: "" if text is None else str(text)  # Gradio takes null for a file
    return gr.ChatInterface(
        respond,
        title="nanochat",
        description=f"<center>{link}</center>",
        chatbot=show_tags(gr.Chatbot(placeholder=i18n("hello"), show_label=False, buttons=["copy"], height="64vh")),
        textbox=textbox,
        additional_inputs=inputs,
        additional_inputs_accordion=gr.Accordion(i18n("settings"), open=False),
        examples=[[text] for text in EXAMPLES[LANGUAGE or "en"]],
        examples_label=i18n("examples"),
        cache_examples=False,
        editable=True,
        flagging_mode="never",
        validator=check,
        concurrency_limit=2 if ENDPOINT_URL else 1,
        api_name="chat",
    )


demo = build()
demo.queue(max_size=MAX_QUEUE)

LAUNCH = {"i18n": i18n, "css": CSS, "show_error": True, "footer_links": [], "max_file_size": 0}  # no uploads

if __name__ == "__main__":
    demo.launch(**LAUNCH)
