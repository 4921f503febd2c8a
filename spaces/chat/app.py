"""Chat with a nanochat model in the browser: a Gradio Space that needs nothing but the model's repository.

    MODEL_ID=you/nanochat-d24 python app.py            # a Hub id, or the folder of a stage
    ENDPOINT_URL=http://127.0.0.1:8000 python app.py   # a TGI or OpenAI-compatible server does the work instead

On Spaces, MODEL_ID is a variable of the Space; without it the first of `models:` in README.md is taken. The model runs
on the GPU if there is one (ZeroGPU too), there and if it is large in bfloat16. Its calls are answered inside
`generate` by the code beside the weights (`custom_generate/`), and shown as steps that can be opened. The page speaks
the browser's language, English or Korean; SPACE_LANGUAGE=ko or en fixes it.
"""

import itertools
import json
import os
import queue
import re
import sys
import threading
import time
from pathlib import Path

import gradio as gr
import torch
import yaml
from fastapi import Depends, HTTPException, Request
from huggingface_hub import InferenceClient

HERE = Path(__file__).parent
ENDPOINT_URL = os.environ.get("ENDPOINT_URL")
MODEL_ID = os.environ.get("MODEL_ID") or next(
    iter(re.findall(r"^models:\s*\n\s*-\s*(\S+)", (HERE / "README.md").read_text(encoding="utf-8"), re.M)), None
)
MAX_CHARS = int(os.environ.get("MAX_CHARS", "100000"))  # of one message; the tokens of more are not even counted
MAX_NEW_TOKENS = int(os.environ.get("MAX_NEW_TOKENS", "1024"))  # of one answer, the slider's end
MAX_SECONDS = float(os.environ.get("MAX_SECONDS", "120"))  # of one answer
MAX_QUEUE = int(os.environ.get("MAX_QUEUE", "16"))  # visitors who may wait; the next one reads that the queue is full
LARGE = 300_000_000  # parameters above which a model runs in bfloat16 on a CPU
STEP = "🧮 "  # begins the title of a tool step

LANGUAGE = os.environ.get("SPACE_LANGUAGE")  # "en" or "ko"; by default the browser's (LANGUAGE itself is gettext's)
TEXTS = yaml.safe_load((HERE / "texts.yaml").read_text(encoding="utf-8"))
EXAMPLES = ["Hello", "Who are you?", "What is 12 * 34?", "How do you spell strawberry?"]  # of a checkpoint without any
if LANGUAGE and LANGUAGE not in TEXTS:
    sys.exit(f"error: SPACE_LANGUAGE is {LANGUAGE!r}; use {' or '.join(TEXTS)}")
TEXTS = {browser: TEXTS[LANGUAGE or browser] for browser in TEXTS}
i18n = gr.I18n(**TEXTS)

try:  # ZeroGPU lends a GPU for the length of a decorated call
    from spaces import GPU

    gpu = GPU(duration=int(MAX_SECONDS))
except ImportError:

    def gpu(function):
        return function


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
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if not hasattr(model.config, "quantization_config") and (device == "cuda" or model.num_parameters() > LARGE):
        model = model.to(torch.bfloat16)
    return model.to(device).eval(), tokenizer


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
    text = text.encode("utf-8", "replace").decode()  # half of a surrogate pair becomes "?", as in nanochat serve
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
    return "".join(unescape(str(part.get("text") or "")) for part in content if isinstance(part, dict))


def entries_of(history) -> list[dict]:
    """The messages in what a client sends as history, which may be anything."""
    entries = [x for x in (history if isinstance(history, list) else []) if isinstance(x, dict)]
    entries = [x for x in entries if x.get("role") in ("user", "assistant")]
    return [x for x in entries if isinstance(x.get("content"), str | list)]


def title_of(entry: dict) -> str:
    metadata = entry.get("metadata")
    return str(metadata.get("title") or "") if isinstance(metadata, dict) else ""


def messages_of(history: list[dict], message: str, system: str, with_tools: bool) -> list[dict]:
    """Gradio's history and the new message as a conversation; tool steps become calls and results again."""
    messages = [{"role": "system", "content": unescape(system.strip())}] if system.strip() else []
    for entry in entries_of(history):
        text, title = text_of(entry["content"]), title_of(entry)
        if title.startswith(STEP):
            if with_tools:
                result = text.strip("`\n ")
                expression = title.removeprefix(STEP).strip("`").removesuffix(f" = {result}")
                function = {"name": "python", "arguments": {"expression": expression}}
                call = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}
                messages += [call, {"role": "tool", "content": result}]
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


def show(parts: list[tuple[str, str]]) -> list[dict]:
    """An answer so far as Gradio's messages: text, and tool steps, which are pending until their result begins."""
    messages = []
    for kind, group in itertools.groupby(parts, lambda part: part[0]):
        text = "".join(part[1] for part in group)
        if kind == "call":
            call, metadata = text, {"title": f"{STEP}`{text}`", "status": "pending"}  # as code: 2*3*4 has no emphasis
            messages.append({"role": "assistant", "content": "```\n\n```", "metadata": metadata})
        elif kind == "result" and messages and messages[-1].get("metadata", {}).get("status") == "pending":
            metadata = {"title": f"{STEP}`{call} = {text}`", "status": "done"}
            messages[-1] |= {"content": f"```\n{text}\n```", "metadata": metadata}
        elif text := re.sub("\ufffd+\\Z", "", text):  # a character that is not complete yet
            if not messages or "metadata" in messages[-1]:
                messages.append({"role": "assistant", "content": ""})
            messages[-1]["content"] += text
    return messages


# ---- generation ----------------------------------------------------------------------------------------------------


class Problem(Exception):
    """Why there is no answer: a key of TEXTS and the values of its text."""


def ids_of(messages: list[dict], prompt: bool = True) -> list[int]:
    return tokenizer.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=False)


def encode(messages: list[dict], room: int) -> list[int]:
    """Ids of the conversation without its oldest turns, so that `room` more tokens fit into the context.

    Each turn is counted once, from the last to the first that does not fit: special tokens separate them.
    """
    length = model.config.max_position_embeddings
    system = [m for m in messages[:1] if m["role"] == "system"]
    *starts, first = [i for i, m in enumerate(messages) if m["role"] == "user"]
    size = len(ids_of(system + messages[first:]))
    if size >= length:
        raise Problem("tokens", size, length - 1)
    size += room
    for start in reversed(starts):
        turn = messages[start:first]
        if len(str(turn)) > 64 * length:  # characters; tokens are shorter, and counting them would take long
            break
        size += len(ids_of(turn, prompt=False)) - 1  # without bos
        if size > length:
            break
        first = start
    return ids_of(system + messages[first:])


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
    """Yields the parts of the answer so far; raises Problem."""
    length, streamer, tokens = model.config.max_position_embeddings, TokenStreamer(), []
    ids = encode(messages, min(max_tokens, length // 2))
    options = {"streamer": streamer, "max_time": MAX_SECONDS, "max_new_tokens": min(max_tokens, length - len(ids))}
    options |= {"temperature": temperature, "top_k": top_k} if temperature > 0 else {}

    def work():
        end = None
        try:
            inputs = torch.tensor([ids], device=model.device)
            model.generate(inputs, attention_mask=torch.ones_like(inputs), do_sample=temperature > 0, **options)
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
        raise Problem("memory" if isinstance(token, torch.OutOfMemoryError) else "failed", str(token)[:300])


def remote_answer(messages: list[dict], temperature: float, max_tokens: int):
    """The same from a server; tried again twice before the first word."""
    client = InferenceClient(base_url=ENDPOINT_URL, timeout=30)
    parts, deadline = [], time.monotonic() + MAX_SECONDS
    for attempt in range(3):
        try:
            for chunk in client.chat_completion(messages, max_tokens=max_tokens, temperature=temperature, stream=True):
                for choice in chunk.choices or []:
                    tool = choice.delta.get("tool") or {}  # our server's extra field: a bit of a call or of its result
                    parts += [(kind, text) for kind, text in [*tool.items(), ("text", choice.delta.content)] if text]
                    yield parts
                if time.monotonic() > deadline:
                    break
            return
        except Exception as error:  # connection refused, time-out, 429, 5xx: the client's classes differ by version
            if parts or attempt == 2:
                is_busy = getattr(getattr(error, "response", None), "status_code", None) == 429
                raise Problem("busy") if is_busy else Problem("down", str(error)[:200]) from None
            time.sleep(1 + attempt)


def warning(text: str) -> dict:
    return {"role": "assistant", "content": text, "metadata": {"title": "⚠️"}}


def translate(page: gr.Request | None, key: str, *values) -> str:
    """A text in the language of the visitor's browser."""
    accepted = page.headers.get("accept-language", "") if page else ""
    return TEXTS.get(accepted[:2], TEXTS["en"])[key].format(*values)


def refuse(message: str, system: str = "") -> None:
    """Raises Problem for a message that will not be answered. A server counts the tokens itself."""
    if not isinstance(message, str) or not message.strip():
        raise Problem("empty")
    if len(message) + len(system) > MAX_CHARS:
        raise Problem("chars", len(message) + len(system), MAX_CHARS)
    if not ENDPOINT_URL:
        encode(messages_of([], message, system, with_tools=True), 0)


def check(message: str, page: gr.Request = None):
    """Says at once, beside the text box, what will not be answered."""
    try:
        refuse(message)
    except Problem as problem:
        return gr.validate(False, translate(page, *problem.args))
    return gr.validate(True, "")


def respond(
    message: str, history: list, system: str, temperature: float, top_k: int, max_tokens: int, page: gr.Request = None
):
    """Yields the answer so far as Gradio's messages. The page's limits hold for callers of the API, too."""
    now: list[dict] = []
    try:
        refuse(message, system := str(system or ""))
        if not all(isinstance(x or 0, int | float) and abs(x or 0) < 2**31 for x in (temperature, top_k, max_tokens)):
            raise Problem("number")  # NaN, too
        messages = messages_of(history, message, system, with_tools=not ENDPOINT_URL)
        temperature, top_k = min(max(float(temperature or 0), 0.0), 2.0), max(int(top_k or 0), 0)
        max_tokens = max(min(int(max_tokens or MAX_NEW_TOKENS), MAX_NEW_TOKENS), 1)
        if ENDPOINT_URL:
            answer = remote_answer(messages, temperature, max_tokens)
        else:
            answer = local_answer(messages, temperature, top_k, max_tokens)
        for parts in answer:
            now = show(parts)
            yield now
    except Problem as problem:
        yield [*now, warning(translate(page, *problem.args))]


def restore(saved) -> tuple[list[dict], list[dict]]:
    """The conversation that the browser saved, for chatbot and state; texts only."""
    history = [{**x, "content": text_of(x["content"])} for x in entries_of(saved)]
    return history, history


def build() -> gr.Blocks:
    name = (ENDPOINT_URL or MODEL_ID).rstrip("/")
    link = "/".join(name.split("/")[-2:]).strip("/")
    if not ENDPOINT_URL and not Path(name).exists():
        link = f'<a href="https://huggingface.co/{name}">{name}</a>'
    examples = (tokenizer and tokenizer.init_kwargs.get("examples")) or EXAMPLES
    inputs = [
        gr.Textbox("", label=i18n("system"), lines=2),
        gr.Slider(0, 2, value=0.6, step=0.05, label=i18n("temperature")),
        gr.Slider(0, 200, value=50, step=1, label=i18n("top_k")),
        gr.Slider(8, MAX_NEW_TOKENS, value=min(512, MAX_NEW_TOKENS), step=8, label=i18n("max_tokens")),
    ]
    textbox = gr.Textbox(label=i18n("message"), submit_btn=True, stop_btn=True, autofocus=True)
    textbox.preprocess = lambda text: "" if text is None else str(text)  # Gradio takes null for a file
    demo = gr.ChatInterface(
        respond,
        title="nanochat",
        description=f"<center>{link}</center>",
        chatbot=show_tags(gr.Chatbot(placeholder=i18n("hello"), show_label=False, buttons=["copy"], height="64vh")),
        textbox=textbox,
        additional_inputs=inputs,
        additional_inputs_accordion=gr.Accordion(i18n("settings"), open=False),
        examples=[[str(text)] for text in examples[:4]],
        cache_examples=False,
        editable=True,
        validator=check,
        concurrency_limit=2 if ENDPOINT_URL else 1,
        api_name="chat",
    )
    with demo:  # the conversation stays in the browser, and comes back when the page is loaded again
        saved = gr.BrowserState([], storage_key="nanochat", secret="nanochat")
        options = {"show_progress": "hidden", "api_visibility": "private"}
        load = demo.load(restore, saved, [demo.chatbot, demo.chatbot_state], **options)
        load.then(None, js="() => { window.restored = true }", **options)  # before that, the chatbot is empty
        keep = "(history, saved) => [window.restored ? history : saved]"
        demo.chatbot.change(None, [demo.chatbot, saved], saved, js=keep, **options)
    return demo


demo = build()
demo.queue(max_size=MAX_QUEUE)


def no_uploads(request: Request) -> None:
    if request.url.path.rstrip("/").endswith("/upload"):  # even of empty files: nothing here needs one
        raise HTTPException(404)


head = (HERE / "head.html").read_text(encoding="utf-8").replace("TEXTS", json.dumps(TEXTS), 1)
LAUNCH = {"i18n": i18n, "head": head, "show_error": True, "footer_links": []}
LAUNCH |= {"app_kwargs": {"dependencies": [Depends(no_uploads)]}}

if __name__ == "__main__":
    demo.launch(**LAUNCH)
