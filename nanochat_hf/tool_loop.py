"""The calculator inside `model.generate`: transformers' `custom_generate`, shipped beside the weights of chat stages.

`ship(folder)` writes this file and `tools.py` into folder/custom_generate/. A model loaded from that folder or its Hub
repository with `trust_remote_code=True` answers its own calls in `generate`, and so in `pipeline`, lm-eval, a Space:

    chat = pipeline("text-generation", model="you/nanochat-d24", trust_remote_code=True)
    chat([{"role": "user", "content": "What is 12 * 34?"}], max_new_tokens=64)
    model.generate(**inputs, run_tools=False)                                       # without
    model.generate(**inputs, custom_generate=FOLDER_OR_HUB_ID, trust_remote_code=True)  # on a model loaded otherwise

A logits processor does it: after <|python_end|> it allows only the tokens of the result. So batches, beams, sampling,
streamers and every cache work as without it. (`serve.engine` does the same many times faster, with this package.)
"""

import copy
import functools
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerFast

from .tools import python

MARKS = ("<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>")
MAX_TOKENS = 512  # of a call and its result together


def last_call(ids: list[int], start: int, end: int) -> list[int] | None:
    """The ids between the last start of a call and its end, the newest of `ids`; None if another end is between."""
    begin = next((i for i in range(len(ids) - 2, -1, -1) if ids[i] in (start, end)), None)
    return ids[begin + 1 : -1] if begin is not None and ids[begin] == start else None


def run_tool(tool: Callable[[str], object], call: str) -> str:
    """The result of a call as the model reads it; an error of the tool's, too, as in TRL's tool loop."""
    try:
        return str(tool(call))
    except Exception as error:
        return str({"error": str(error)})


class ToolResultProcessor(LogitsProcessor):
    """Forces the result of each call, token by token, right after it."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self.tokenizer = tokenizer
        self.start, self.end, self.before, self.after = tokenizer.convert_tokens_to_ids(list(MARKS))

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        recent = input_ids[:, -MAX_TOKENS:]
        for row in (recent == self.end).any(1).nonzero()[:, 0].tolist():
            token = self.next(recent[row].tolist())
            if token is not None:
                scores = scores.clone()
                scores[row] = -torch.inf
                scores[row, token] = 0.0
        return scores

    def next(self, ids: list[int]) -> int | None:
        """The token that must follow `ids`, or None where the model chooses."""
        end = len(ids) - ids[::-1].index(self.end)
        call = last_call(ids[:end], self.start, self.end)
        if call is None:
            return None
        result, written = self.result(tuple(call)), ids[end:]
        return result[len(written)] if len(written) < len(result) and written == result[: len(written)] else None

    @functools.lru_cache(1024)  # noqa: B019  (lives as long as one call of generate)
    def result(self, call: tuple[int, ...]) -> list[int]:
        text = run_tool(python, self.tokenizer.decode(call))
        ids = self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        return [self.before, *ids[: MAX_TOKENS // 2], self.after]


@functools.lru_cache(8)
def tokenizer_of(name: str, revision: str | None) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(name, revision=revision)


def stop_ids(*settings, without: int) -> list[int]:
    """The ids of the first eos setting (an id, or ids in any container) that names a token besides `without`."""
    for setting in settings:
        values = setting.tolist() if hasattr(setting, "tolist") else setting
        ids = [values] if isinstance(values, int) else values or ()
        if ids := [index for index in ids if index != without]:
            return ids
    return []


def generate(inputs=None, generation_config=None, logits_processor=None, *, model, run_tools: bool = True, **kwargs):
    """`model.generate` that answers the model's calls. With `run_tools=False` an answer ends at the end of a call.

    An eos of the caller, as an argument or in a GenerationConfig, replaces the model's own; None means the model's.
    """
    try:
        revision = getattr(model.config, "_commit_hash", None)
        tokenizer = kwargs.get("tokenizer") or tokenizer_of(model.name_or_path, revision)
    except (OSError, ValueError):
        problem = f"no tokenizer in {model.name_or_path}: calls are not answered. Save it there, or pass tokenizer="
        warnings.warn(problem, stacklevel=2)
        return type(model).generate(model, inputs, generation_config, logits_processor, **kwargs)
    results = ToolResultProcessor(tokenizer)
    given = getattr(generation_config, "eos_token_id", None)
    settings = (kwargs.pop("eos_token_id", None), given, model.generation_config.eos_token_id, tokenizer.eos_token_id)
    stops = stop_ids(*settings, without=results.end) + ([] if run_tools else [results.end])
    if generation_config is None:
        kwargs["eos_token_id"] = stops
    else:
        generation_config = copy.deepcopy(generation_config)
        generation_config.eos_token_id = stops
    if run_tools:
        logits_processor = LogitsProcessorList([*(logits_processor or []), results])
    return type(model).generate(model, inputs, generation_config, logits_processor, **kwargs)


def ship(folder: str | Path) -> None:
    """Write the code that a chat model's folder needs to answer its own calls."""
    target = Path(folder) / "custom_generate"
    target.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(__file__, target / "generate.py")
    shutil.copyfile(Path(__file__).with_name("tools.py"), target / "tools.py")
