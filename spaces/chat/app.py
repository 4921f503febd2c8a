"""Chat with a nanochat model in the browser: a Gradio Space that needs nothing but the model's repository.

    MODEL_ID=you/nanochat-d24 python app.py            # a Hub id, or the folder of a stage
    ENDPOINT_URL=http://127.0.0.1:8000 python app.py   # a TGI or OpenAI-compatible server does the work instead

On Spaces, MODEL_ID is a variable of the Space; without it the first of `models:` in README.md is taken. The model runs
on the GPU if there is one (ZeroGPU too), else in bfloat16 on the CPU if it is large. What it asks of its calculator is
answered by the `tools.py` that lies beside the weights, and shown as a step that can be opened.
"""

import functools
import os
import re
import runpy
import sys
import time
from pathlib import Path

import gradio as gr
import torch
from huggingface_hub import InferenceClient, hf_hub_download

HERE = Path(__file__).parent
ENDPOINT_URL = os.environ.get("ENDPOINT_URL")
MODEL_ID = os.environ.get("MODEL_ID") or next(
    iter(re.findall(r"^models:\s*\n\s*-\s*(\S+)", (HERE / "README.md").read_text(encoding="utf-8"), re.M)), None
)
MAX_CHARS = int(os.environ.get("MAX_CHARS", "8000"))  # of one message
MAX_NEW_TOKENS = int(os.environ.get("MAX_NEW_TOKENS", "1024"))  # of one answer, the slider's end
MAX_SECONDS = float(os.environ.get("MAX_SECONDS", "120"))  # of one answer
MAX_QUEUE = int(os.environ.get("MAX_QUEUE", "16"))  # people who may wait; the next is told that the queue is full
MAX_CALLS = 8  # of the tool in one answer
LARGE = 300_000_000  # parameters above which a CPU runs in bfloat16: half the memory to read a token
STEP = "🧮 "  # begins the title of a tool step

i18n = gr.I18n(
    en={
        "system": "System message",
        "temperature": "Temperature (0: always the likeliest token)",
        "top_k": "Top-k (0: all tokens)",
        "max_tokens": "Most new tokens",
        "settings": "Settings",
        "examples": "Examples",
        "hello": "A small language model, trained from nothing. It makes things up.",
    },
    ko={
        "system": "시스템 메시지",
        "temperature": "온도 (0: 항상 가장 가능성 높은 토큰)",
        "top_k": "Top-k (0: 모든 토큰)",
        "max_tokens": "새 토큰 최대 개수",
        "settings": "설정",
        "examples": "예시",
        "hello": "처음부터 학습한 작은 언어 모델입니다. 사실이 아닌 말을 지어낼 수 있습니다.",
    },
)

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
    if torch.cuda.is_available():
        model = model.to("cuda", torch.bfloat16)
    else:
        model = model.to(torch.bfloat16 if model.num_parameters() > LARGE else torch.float32)
    return model.eval(), tokenizer


@functools.cache
def tool():
    """The model's calculator, from the file beside its weights (or, in a checkout, from the package); None without."""
    places = [Path(MODEL_ID) / "tools.py", HERE / "tools.py", HERE.parents[1] / "nanochat_hf" / "tools.py"]
    path = next((place for place in places if place.is_file()), None)
    try:
        return runpy.run_path(str(path or hf_hub_download(MODEL_ID, "tools.py")))["python"]
    except (OSError, ValueError):
        return None


model, tokenizer = (None, None) if ENDPOINT_URL else load()


# ---- from Gradio's history to messages and back --------------------------------------------------------------------

CODE = re.compile(r"(```.*?(?:```|\Z)|`[^`\n]*`)", re.S)


def outside_code(text: str, change) -> str:
    """`text` with `change` applied to what is not Markdown code."""
    return "".join(part if i % 2 else change(part) for i, part in enumerate(CODE.split(text)))


def escape(text: str) -> str:
    """HTML in a message becomes visible text; in code Markdown shows it as it is anyway."""
    return outside_code(text, lambda part: part.replace("&", "&amp;").replace("<", "&lt;"))


def unescape(text: str) -> str:
    return outside_code(text, lambda part: part.replace("&lt;", "<").replace("&amp;", "&"))


def show_tags(chatbot: gr.Chatbot) -> gr.Chatbot:
    """Make a Chatbot show HTML tags instead of obeying or dropping them (a subclass makes Gradio write .pyi files)."""
    to_browser, from_browser = chatbot._postprocess_content, chatbot._preprocess_content

    def escaped(message):
        content = to_browser(message)
        if content is not None and content.type == "text":
            content.text = escape(unescape(content.text))  # what came back from the browser is escaped already
        return content

    def unescaped(message):
        content = from_browser(message)
        return {**content, "text": unescape(content["text"])} if content.get("type") == "text" else content

    chatbot._postprocess_content, chatbot._preprocess_content = escaped, unescaped
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
            messages.append({"role": entry["role"], "content": text})
    return [*messages, {"role": "user", "content": unescape(message)}]


def step(expression: str, result: str | None) -> dict:
    metadata = {"title": STEP + expression, "status": "pending" if result is None else "done"}
    return {"role": "assistant", "content": f"```\n{result or ''}\n```", "metadata": metadata}


# ---- generation ----------------------------------------------------------------------------------------------------


def fit(messages: list[dict], room: int) -> list[int]:
    """Ids of the conversation without its oldest turns, so that `room` more tokens fit into the context."""
    length = model.config.max_position_embeddings
    while True:
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        users = [i for i, m in enumerate(messages) if m["role"] == "user"]
        if len(ids) + room <= length or len(users) < 2:
            break
        messages = [m for m in messages[:1] if m["role"] == "system"] + messages[users[1] :]
    if len(ids) >= length:
        raise ValueError(f"The message has {len(ids)} tokens, the model reads at most {length}.")
    return ids


def pick(logits: torch.Tensor, temperature: float, top_k: int) -> int:
    if temperature <= 0:
        return int(logits.argmax())
    if 0 < top_k < logits.numel():
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], -torch.inf)
    return int(torch.multinomial((logits / temperature).softmax(-1), 1))


@gpu
@torch.inference_mode()
def local_answer(messages: list[dict], temperature: float, top_k: int, max_tokens: int):
    """Yields the answer so far, a list of Gradio messages: text and tool steps in turn."""
    length = model.config.max_position_embeddings
    try:
        ids = fit(messages, min(max_tokens, length // 4))
    except ValueError as error:
        yield [warning(str(error))]
        return
    names = (
        "<|python_start|>",
        "<|python_end|>",
        "<|output_start|>",
        "<|output_end|>",
        "<|assistant_end|>",
        "<|bos|>",
    )
    start, end, result_start, result_end, *stops = tokenizer.convert_tokens_to_ids(list(names))
    shown, text, call, calls = [], [], None, 0
    feed, cache, used, deadline = ids, None, len(ids), time.monotonic() + MAX_SECONDS
    budget = min(max_tokens, length - used)
    while budget > 0 and time.monotonic() < deadline:
        inputs = torch.tensor([feed], device=model.device)
        out = model(input_ids=inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
        token, cache = pick(out.logits[0, -1].float(), temperature, top_k), out.past_key_values
        feed, budget = [token], budget - 1
        if token in stops:
            break
        if token == start:
            shown, text, call = shown + written(text), [], []
            yield [*shown, step("", None)]
        elif token == end and call is not None and tool() and calls < MAX_CALLS:
            expression = tokenizer.decode(call)
            try:
                result = tool()(expression)
            except ValueError as error:
                result = str({"error": str(error)})
            shown, call, calls = [*shown, step(expression, result)], None, calls + 1
            told = tokenizer.encode(str(result), add_special_tokens=False, split_special_tokens=True)
            feed = [token, result_start, *told, result_end]
            budget -= len(feed) - 1
            yield shown
        elif call is not None:
            call.append(token)
            yield [*shown, step(tokenizer.decode(call), None)]
        else:
            text.append(token)
            if (now := written(text)) and not now[0]["content"].endswith("\ufffd"):  # half a character: wait
                yield shown + now
    yield shown + written(text)


def written(tokens: list[int]) -> list[dict]:
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    return [{"role": "assistant", "content": text}] if text else []


def remote_answer(messages: list[dict], temperature: float, max_tokens: int):
    """The same from a server; tried again twice before the first word."""
    client = InferenceClient(base_url=ENDPOINT_URL, timeout=30)
    shown, text, expression, deadline = [], "", "", time.monotonic() + MAX_SECONDS
    for attempt in range(3):
        try:
            for chunk in client.chat_completion(messages, max_tokens=max_tokens, temperature=temperature, stream=True):
                for choice in chunk.choices or []:
                    part = choice.delta.get("tool") or {}
                    if "call" in part:
                        expression += part["call"]
                        yield shown + say(text) + [step(expression, None)]
                    if "result" in part:
                        if expression:
                            shown, text = [*shown, *say(text), step(expression, "")], ""
                            expression = ""
                        shown[-1] = step(
                            shown[-1]["metadata"]["title"].removeprefix(STEP), inside(shown[-1]) + part["result"]
                        )
                        yield shown
                    if choice.delta.content:
                        text += choice.delta.content
                        yield shown + say(text)
                if time.monotonic() > deadline:
                    break
            return
        except Exception as error:  # connection refused, time-out, 429, 5xx: the client's classes differ by version
            if shown or text or attempt == 2:
                yield [*shown, *say(text), warning(f"The model's server does not answer: {str(error)[:200]}")]
                return
            time.sleep(1 + attempt)


def say(text: str) -> list[dict]:
    return [{"role": "assistant", "content": text}] if text else []


def inside(message: dict) -> str:
    return message["content"].strip("`\n")


def warning(text: str) -> dict:
    return {"role": "assistant", "content": text, "metadata": {"title": "⚠️"}}


def respond(message: str, history: list[dict], system: str, temperature: float, top_k: int, max_tokens: int):
    messages = messages_of(history, message, system or "", with_tools=not ENDPOINT_URL)
    max_tokens = min(int(max_tokens), MAX_NEW_TOKENS)
    if ENDPOINT_URL:
        yield from remote_answer(messages, temperature, max_tokens)
    else:
        yield from local_answer(messages, temperature, int(top_k), max_tokens)


def check(message: str):
    """Says at once, beside the text box, what will not be answered."""
    size = len(message or "")
    if not (message or "").strip():
        return gr.validate(False, "Write something first.")
    return gr.validate(size <= MAX_CHARS, f"The message has {size:,} characters; at most {MAX_CHARS:,} are read.")


def build() -> gr.Blocks:
    name = ENDPOINT_URL or MODEL_ID
    is_hub_id = not ENDPOINT_URL and not Path(MODEL_ID).exists()
    link = f"[{name}](https://huggingface.co/{name})" if is_hub_id else f"`{name}`"
    inputs = [
        gr.Textbox(label=i18n("system"), lines=2, max_length=2000),
        gr.Slider(0, 2, value=0.6, step=0.05, label=i18n("temperature")),
        gr.Slider(0, 200, value=50, step=1, label=i18n("top_k")),
        gr.Slider(8, MAX_NEW_TOKENS, value=min(512, MAX_NEW_TOKENS), step=8, label=i18n("max_tokens")),
    ]
    return gr.ChatInterface(
        respond,
        title="nanochat",
        description=link,
        chatbot=show_tags(gr.Chatbot(placeholder=i18n("hello"), show_label=False, buttons=["copy"], height="60vh")),
        additional_inputs=inputs,
        additional_inputs_accordion=gr.Accordion(i18n("settings"), open=False),
        examples=[
            ["Hello"],
            ["What is 12 * 34?"],
            ["How many letters r are in strawberry?"],
            ["Why is the sky blue?"],
        ],
        examples_label=i18n("examples"),
        example_labels=["Hello", "12 × 34", "strawberry", "the sky"],
        cache_examples=False,
        editable=True,
        flagging_mode="never",
        validator=check,
        concurrency_limit=2 if ENDPOINT_URL else 1,
        api_name="chat",
    )


demo = build()
demo.queue(max_size=MAX_QUEUE)

if __name__ == "__main__":
    demo.launch(i18n=i18n, show_error=True, footer_links=[])
