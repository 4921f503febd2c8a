"""Byte-level BPE tokenizers: train one from any dataset, with the chat template and special tokens that chat needs.

The split pattern is GPT-4's with shorter groups of digits, and the nine special tokens come after the merges, both
as in karpathy/nanochat. What is saved is an ordinary `PreTrainedTokenizerFast` folder for `AutoTokenizer`.

    nanochat tokenizer --config recipes/d12/tokenizer.yaml --run-dir runs/d12

Text that spells a special token never becomes one: `encode_documents` and the chat template both treat `<|bos|>` in a
text as seven ordinary characters.
"""

import hashlib
import warnings
from collections.abc import Iterable, Iterator
from contextlib import closing, suppress
from functools import partial
from inspect import signature
from itertools import chain, islice
from pathlib import Path
from weakref import WeakKeyDictionary

import numpy as np
import yaml
from jinja2 import TemplateError
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.utils import get_json_schema

from ..errors import InputError, in_a_line
from ..run import Progress, fingerprint, start_record, write_metrics, writing
from ..stage_configs import TokenizerConfig
from .chat_renderer import RENDERER

SPECIAL_TOKENS = (
    "<|bos|>",  # begins every document and every conversation
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",  # inside an assistant turn: an expression for the tool ...
    "<|python_end|>",
    "<|output_start|>",  # ... and its result
    "<|output_end|>",
)
TEMPLATE = Path(__file__).with_name("chat_template.jinja")
RESPONSE_TEMPLATE = yaml.safe_load(Path(__file__).with_name("response_template.yaml").read_text())
# First digits of the SHA-256 of our older chat templates, whose faults are mended in today's.
OLD_TEMPLATES = ("55bb7e10abbffda5", "b1658c1843ab4305", "fa6171ba5fe4ac1d", "d8b31d21e6e23a4c", "4a391466a79d6cf5")
ODD_TEXT = "e\u0301 \ufb01 it's IT'S  we'll\r\n\n\n  12345 0,007 x=1;;  \n end   "  # changed by any normalizer
VALIDATION_CHARS = 4_000_000  # how much of the validation split bytes per token are measured on

# GPT-4's pattern (openai/tiktoken, cl100k_base); GROUP is how many digits may share a token. Upstream measured 2 as
# best at 32K tokens; 1 lets a small model learn arithmetic.
SPLIT_PATTERN = "|".join(
    [
        r"'(?i:[sdmt]|ll|ve|re)",  # the tail of an English contraction
        r"[^\r\n\p{L}\p{N}]?+\p{L}+",  # a word, with the one space or sign before it
        r"\p{N}{1,GROUP}",
        r" ?[^\s\p{L}\p{N}]++[\r\n]*",  # signs, with the line ends after them
        r"\s*[\r\n]",
        r"\s+(?!\S)",  # blanks, but the last one before a word belongs to the word
        r"\s+",
    ]
)


class ChatTemplateError(InputError, TemplateError):
    """A chat template of others refuses messages, or fails."""


def new_backend(digit_group: int = 2, normalization: str | None = None) -> Tokenizer:
    """An untrained byte-level BPE tokenizer; `normalization` is None (text is kept byte for byte) or "nfc"."""
    backend = Tokenizer(models.BPE())
    if normalization:
        backend.normalizer = normalizers.NFC()
    pattern = Regex(SPLIT_PATTERN.replace("GROUP", str(digit_group)))
    split = pre_tokenizers.Split(pattern, behavior="isolated")
    bytes_as_letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_as_letters])
    backend.decoder = decoders.ByteLevel()
    return backend


def byte_alphabet() -> list[str]:
    """The 256 letters that byte-level tokenizers write bytes as (GPT-2's table), in the order of the bytes."""
    letters = bytes_to_unicode()
    return [letters[byte] for byte in range(256)]


def train_bpe(
    texts: Iterable[str], vocab_size: int, digit_group: int = 2, normalization: str | None = None
) -> PreTrainedTokenizerFast:
    """Train a tokenizer of `vocab_size` tokens, the nine special ones included and last. Deterministic.

    Fewer tokens come out, with a warning, when the text has no more pairs to merge. Raises InputError without text.
    """
    backend, texts = new_backend(digit_group, normalization), filter(None, texts)
    if (first := next(texts, None)) is None:
        raise InputError("there is no text to train a tokenizer on: the dataset is empty")
    size = vocab_size - len(SPECIAL_TOKENS)
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=byte_alphabet(), show_progress=False)
    backend.train_from_iterator(chain([first], texts), trainer)
    tokenizer = wrap(backend)
    if len(tokenizer) < vocab_size:
        warnings.warn(f"the text gives only {len(tokenizer)} tokens, not {vocab_size}", stacklevel=2)
    return tokenizer


def wrap(backend: Tokenizer) -> PreTrainedTokenizerFast:
    """Add the special tokens, the chat template and the response template to a trained backend."""
    backend.add_special_tokens(list(SPECIAL_TOKENS))
    bos = backend.token_to_id("<|bos|>")
    # Plain `tokenizer(text)` begins with bos, as every training row does; the chat template writes its own.
    backend.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", bos)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|bos|>",
        eos_token="<|assistant_end|>",
        pad_token="<|bos|>",  # not eos: collators that ignore padding in the loss would then never teach to stop
        additional_special_tokens=[token for token in SPECIAL_TOKENS if token not in ("<|bos|>", "<|assistant_end|>")],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        response_template=RESPONSE_TEMPLATE,
    )
    tokenizer.chat_template = TEMPLATE.read_text()
    return tokenizer


def load_tokenizer(name: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a folder or a Hub id; older templates of this project are renewed, those of others limited.

    Raises InputError when there is none, its special tokens are not where our template needs them, or the template of
    others reaches a limit on a short message or leaves it out.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(name), trust_remote_code=False)
        if tokenizer.is_fast and getattr(plain_backend(tokenizer).model, "dropout", None):  # two names of one id fail
            raise ValueError("its BPE has dropout, so ids are random: set it to null")
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # of damaged files: json's, tokenizers' (a panic) and the config's
        reason = "it has no tokenizer.json" if "backend tokenizer" in str(error) else in_a_line(error)
        raise InputError(f"no tokenizer in {name}: {reason}; copy its files again") from None
    tokenizer = with_todays_templates(tokenizer)
    if tokenizer.chat_template == TEMPLATE.read_text():
        ids = tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS))
        ends = tokenizer.bos_token, tokenizer.eos_token
        if ends != ("<|bos|>", "<|assistant_end|>") or np.any(np.diff(ids) != 1):
            raise InputError(f"no tokenizer in {name}: a special token is missing or has another place; copy it again")
        if None in (tokenizer.backend_tokenizer.pre_tokenizer, tokenizer.backend_tokenizer.decoder):
            raise InputError(f"no tokenizer in {name}: it has no pre-tokenizer, or no decoder; copy it again")
        ours = {index: repr(AddedToken(token, special=True)) for index, token in zip(ids, SPECIAL_TOKENS)}
        for index, token in tokenizer.added_tokens_decoder.items():
            if index <= ids[-1] and repr(token) != ours.get(index):  # later ones may be those of a larger model
                raise InputError(
                    f"no tokenizer in {name}: its added token {token.content!r} is not ours; copy it again"
                )
    elif tokenizer.chat_template:
        tokenizer.apply_chat_template = partial(apply_chat_template, tokenizer)  # for every caller
        with suppress(ChatTemplateError):  # it refuses this message
            if "?!" not in tokenizer.apply_chat_template([{"role": "user", "content": "?!"}], tokenize=False):
                raise InputError(f"the chat template of {name} leaves out what the user says")
    return tokenizer


def refuse_other_model(tokenizer: PreTrainedTokenizerFast, config) -> None:
    """Raise InputError if a model of ours has another bos token, or its config.json the record of other ids."""
    ids, reason = (getattr(config, "bos_token_id", None), tokenizer.bos_token_id), None
    if config.model_type == "nanochat_hf" and None not in ids and ids[0] != ids[1]:
        reason = f"<|bos|> is token {ids[1]} in its tokenizer and {ids[0]} in its config.json"
    elif getattr(config, "token_ids", None) not in (None, token_ids(tokenizer)):
        reason = "it was trained with other ids for the same text; copy tokenizer.json of the trained model again"
    if reason:
        raise InputError(f"model and tokenizer of {config.name_or_path} do not belong together: {reason}")


def token_ids(tokenizer: PreTrainedTokenizerFast) -> str:
    """A short hash of the tokens and of the ids that texts with all of them get, for the config of a model.

    Another version of the library may write tokenizer.json in another way. Tokens after ours are a user's.
    """
    count = tokenizer.get_vocab().get(SPECIAL_TOKENS[-1], len(tokenizer) - 1) + 1
    names = list(filter(None, tokenizer.convert_ids_to_tokens(list(range(count)))))
    texts = [tokenizer.convert_tokens_to_string(names[start : start + 100]) for start in range(0, len(names), 100)]
    encodings = plain_backend(tokenizer).encode_batch_fast([*texts, ODD_TEXT], add_special_tokens=False)
    return fingerprint([names, [encoding.ids for encoding in encodings]])


def apply_chat_template(tokenizer, conversation, tools=None, documents=None, chat_template=None, **options):
    """`tokenizer.apply_chat_template` for a template of others, which is a program: in a process with limits.

    Raises InputError at a limit, ChatTemplateError with the template's own error.
    """
    own = type(tokenizer).apply_chat_template
    for name in ("return_assistant_tokens_mask", "sanitize_control_tokens"):
        if options.get(name):
            raise InputError(f"{name} is not supported for a chat template of others")
    batched = bool(conversation) and not isinstance(conversation[0], dict)
    chats = conversation if batched else [conversation]
    chats = [[{key: value for key, value in message.items() if value is not None} for message in c] for c in chats]
    encoding = set(signature(own).parameters) - {"add_generation_prompt", "continue_final_message"}
    try:
        texts = RENDERER.render(
            conversations=chats,
            tools=tools and [tool if isinstance(tool, dict) else get_json_schema(tool) for tool in tools],
            documents=documents,
            chat_template=tokenizer.get_chat_template(chat_template, tools),
            **tokenizer.special_tokens_map | {name: options.pop(name) for name in set(options) - encoding},
        )
    except (TemplateError, ValueError) as error:
        kind = ChatTemplateError if isinstance(error, TemplateError) else InputError
        raise kind(f"the chat template of {tokenizer.name_or_path} fails: {error}") from None
    chats = [[{"role": "user", "content": text}] for text in texts]
    return own(tokenizer, chats if batched else chats[0], chat_template="{{ messages[0]['content'] }}", **options)


def with_todays_templates(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The tokenizer, with chat and response template of today if its chat template is an older one of ours."""
    template = tokenizer.chat_template
    if isinstance(template, str) and hashlib.sha256(template.encode()).hexdigest()[:16] in OLD_TEMPLATES:
        tokenizer.chat_template, tokenizer.response_template = TEMPLATE.read_text(), RESPONSE_TEMPLATE
    elif template == TEMPLATE.read_text() and getattr(tokenizer, "response_template", None):
        tokenizer.response_template = RESPONSE_TEMPLATE
    return tokenizer


_plain_backends: WeakKeyDictionary = WeakKeyDictionary()


def plain_backend(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """A copy of the tokenizer's backend that reads special tokens in text as ordinary text; cached per tokenizer."""
    if tokenizer not in _plain_backends:
        plain = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        plain.no_padding()
        plain.no_truncation()
        plain.encode_special_tokens = True  # the library's name for "encode them like any other text"
        _plain_backends[tokenizer] = plain
    return _plain_backends[tokenizer]


def token_dtype(tokenizer: PreTrainedTokenizerFast) -> type:
    """The smallest numpy integer that holds every id."""
    return np.uint16 if len(tokenizer) <= 65536 else np.uint32


def encode_documents(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[np.ndarray]:
    """Each text as an array of ids, bos first, and no other special token whatever the text spells."""
    bos, dtype = tokenizer.bos_token_id, token_dtype(tokenizer)
    if bos is None:
        raise InputError("the tokenizer has no bos token, which begins each text: an evaluation leaves dataset out")
    encodings = plain_backend(tokenizer).encode_batch_fast(texts, add_special_tokens=False)
    return [np.array([bos, *encoding.ids], dtype) for encoding in encodings]


def tool_result_mask(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> list[int]:
    """0 for the tokens of tool results, their marks included, else 1."""
    opens, closes = tokenizer.convert_tokens_to_ids(["<|output_start|>", "<|output_end|>"])
    inside, mask = False, []
    for token in ids:
        inside = inside or token == opens
        mask.append(int(not inside))
        inside = inside and token != closes
    return mask


def assistant_mask(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> list[int]:
    """1 for each token of a rendered conversation that the assistant writes (text, calls, end of turn), else 0.

    transformers' own mask counts characters: of one with several tokens (emoji, Hangul) it may have only the first.
    """
    start, end = tokenizer.convert_tokens_to_ids(["<|assistant_start|>", "<|assistant_end|>"])
    mask, turn = [], False
    for token, no_result in zip(ids, tool_result_mask(tokenizer, ids)):
        mask.append(int(turn and no_result))
        turn = token == start or (turn and token != end)
    return mask


def strip_special_tokens(text: str) -> str:
    """`text` with every special token spelled in it broken up, the way the chat template does it to messages."""
    for token in SPECIAL_TOKENS:
        text = text.replace(token, f"<| {token[2:-2]} |>")
    return text


def token_byte_lengths(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Bytes of text per id, in id order; special tokens 0. For bits per byte.

    Exact for byte-level tokenizers, ours and GPT-2's kind: each letter of a token's name is one byte.
    """
    specials = set(tokenizer.all_special_ids)
    names = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    return [0 if index in specials or name is None else len(name) for index, name in enumerate(names)]


def bytes_per_token(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str]) -> float:
    """Mean bytes of UTF-8 per token over texts, bos not counted."""
    num_bytes = num_tokens = 0
    texts = iter(texts)
    while batch := list(islice(texts, 256)):
        num_bytes += sum(len(text.encode()) for text in batch)
        num_tokens += sum(len(document) - 1 for document in encode_documents(tokenizer, batch))
    if not num_tokens:
        raise InputError("there is no text to measure the tokenizer on")
    return num_bytes / num_tokens


def train_tokenizer(config: TokenizerConfig, output: str | Path) -> None:
    """Train on the training split of `config.dataset` and write a `from_pretrained` folder and metrics.json."""
    from .documents import open_documents, text_fingerprint

    output, record = Path(output), start_record(config)
    data = text_fingerprint(config.dataset)
    chars = {"train": 0, "validation": 0}

    def texts(split: str, limit: int) -> Iterator[str]:
        with closing(Progress(f"tokenizer: {split}", limit, unit="characters")) as progress:
            for text in open_documents(config.dataset, split, seed=config.seed, skip_bad_files=config.skip_bad_files):
                text = text[: min(config.doc_cap, limit - chars[split])]
                chars[split] += len(text)
                progress.update(chars[split])
                yield text
                if chars[split] >= limit:
                    return

    train = texts("train", config.max_chars)
    tokenizer = train_bpe(train, config.vocab_size, config.digit_group, config.normalization)
    compression = bytes_per_token(tokenizer, texts("validation", VALIDATION_CHARS))
    with writing(output):
        tokenizer.save_pretrained(output)
    numbers = {"vocab_size": len(tokenizer), "bytes_per_token": compression, "train_chars": chars["train"]}
    write_metrics(output, record, inputs={"data": data}, **numbers)


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """A short hash of all that decides how text and conversations become ids."""
    parts = tokenizer.backend_tokenizer.to_str(), str(tokenizer.chat_template)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
