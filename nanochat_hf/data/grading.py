"""Grades a reply. Evaluation and the rewards of RL share these functions, so RL trains what is measured.

All functions take the text of the assistant's turn, decoded with its special tokens, which mark tool calls.

    hash_answer("She earns 10 dollars.\n#### 10")                    -> "10"
    is_correct({"kind": "spelling", "answer": "o w l", ...}, text)   -> True or False
    GRPOTrainer(reward_funcs=correctness(tokenizer), ...)            # the same grades, in TRL's signature
"""

import re
from collections.abc import Callable, Iterable
from math import comb

from transformers import PreTrainedTokenizerBase

# Tool calls and their results, closed or cut off by the length limit.
_TOOL_BLOCK = re.compile(r"<\|(python|output)_start\|>.*?(<\|\1_end\|>|$)", re.DOTALL)
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_HASH_ANSWER = re.compile(r"#### (-?[\d.,]+)")  # as openai/grade-school-math `dataset.py`
_TARGET = re.compile(r"-?([0-9]+|[0-9]{1,3}(,[0-9]{3})+)(\.[0-9]+)?")


def used_tool(text: str) -> bool:
    """Whether the text has a tool call."""
    return "<|python_start|>" in text


def final_text(text: str) -> str:
    """What the assistant says after the last tool result, special tokens removed; the whole text without a tool."""
    text = text.split("<|assistant_end|>")[0]
    return re.sub(r"<\|\w+\|>", "", _TOOL_BLOCK.sub("", text.rsplit("<|output_end|>", 1)[-1]))


def final_words(text: str) -> str:
    return final_text(text).strip()


def hash_answer(text: str) -> str | None:
    """GSM8K's answer: the number after the first "#### ", commas removed; None if there is none."""
    match = _HASH_ANSWER.search(text)
    return match.group(1).replace(",", "") if match else None


def hash_target(text: str) -> str | None:
    """`hash_answer` of a dataset's answer; None if it would not grade rightly, as 1 for "#### 1/2" or "#### 1e3"."""
    _, _, target = text.partition("#### ")
    return hash_answer(text) if _TARGET.fullmatch(target.strip()) else None


def last_number(text: str) -> str | None:
    """The last number of the text, commas removed; None if there is none."""
    numbers = _NUMBER.findall(text)
    return numbers[-1].replace(",", "") if numbers else None


def spelled_word(text: str) -> str:
    """The letters of the last line after its last colon, joined: 'Here: "owl": o w l.' -> "owl"; commas are fine."""
    lines = final_words(text).splitlines()
    letters = re.split(r"[\s,.]+", lines[-1].rsplit(":", 1)[-1].strip(" .,")) if lines else []
    return "".join(letters).lower() if all(len(letter) == 1 for letter in letters) else ""


def says(text: str, phrase: str) -> bool:
    """Whether the text has the phrase as whole words, whatever the case."""
    return re.search(rf"(?<!\w){re.escape(phrase)}(?!\w)", text, re.IGNORECASE) is not None


def is_correct(row: dict, text: str) -> bool:
    """Whether the reply answers a row: of GSM8K ("kind": "gsm8k"), or of the demo's `questions`.

    GSM8K's answer follows `####`. A sum's result must be the last number. A spelling must have exactly the letters of
    the word. A fact must name its value and its entity, and none of the relation's other values.
    """
    kind, words = row["kind"], final_words(text)
    if kind == "gsm8k":
        return hash_answer(text) == row["answer"]
    if kind in ("arithmetic", "problem", "counting"):
        return last_number(words) == row["answer"]
    if kind == "spelling":
        return spelled_word(text) == row["answer"].replace(" ", "")
    named = says(words, row["answer"]) and (not row["entity"] or says(words, row["entity"]))
    return named and not any(says(words, rival) for rival in row["rivals"])


COLUMNS = ("kind", "answer", "entity", "rivals")  # of a row, besides its prompt: what `is_correct` needs


def correctness(tokenizer: PreTrainedTokenizerBase, record: Callable | None = None) -> Callable:
    """A reward function for TRL: 1.0 for a right completion, 0.0 for a wrong one; `record` gets each graded batch."""

    def correct(prompts, completion_ids, **columns) -> list[float]:
        log = columns.get("log_metric", lambda name, value: None)
        columns = {"prompt": prompts} | {name: columns[name] for name in COLUMNS}
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        texts = tokenizer.batch_decode(completion_ids)
        rewards = [float(is_correct(row, text)) for row, text in zip(rows, texts, strict=True)]
        log("tool_use", sum(map(used_tool, texts)) / len(texts))
        if record:
            record(rows, texts, rewards)
        return rewards

    return correct


def pass_at_k(outcomes: Iterable[list[bool]], k: int) -> float:
    """Chance that one of k samples is right, estimated without bias from n >= k samples of each prompt.

    1 - C(n - c, k) / C(n, k) for c right ones, averaged (Chen et al. 2021, arXiv:2107.03374). ValueError if n < k.
    """
    chances = []
    for right in outcomes:
        if len(right) < k:
            raise ValueError(f"pass@{k} needs {k} samples of every prompt, got {len(right)}")
        chances.append(1 - comb(len(right) - sum(right), k) / comb(len(right), k))
    return sum(chances) / len(chances)
