"""Find the answer in what a model said, and grade it: one set of pure functions for evaluation and for RL rewards.

Why one place: a reward that differs from the benchmark teaches something else than what is measured. All take the
text of the assistant's turn as it was decoded with special tokens, so that tool calls can be told from words.

    hash_answer("She earns 10 dollars.\n#### 10")                  -> "10"
    is_correct({"kind": "spelling", "answer": "o w l", ...}, text)  -> True or False

Rewards for reinforcement learning: the graders of data/grading.py in the signature that TRL calls.

Why so thin: the reward must be what the evaluation measures. A row of an RL data set has `prompt` (messages), `kind`,
`answer` and, for facts, `entity` and `rivals`; `correctness` grades what the model wrote, tool calls included.

    reward = correctness(tokenizer)
    GRPOTrainer(reward_funcs=reward, ...)
"""

import re
from collections.abc import Callable, Iterable
from math import comb

from transformers import PreTrainedTokenizerBase

# Tool calls and their results, closed or cut off by the length limit.
_TOOL_BLOCK = re.compile(r"<\|(python|output)_start\|>.*?(<\|\1_end\|>|$)", re.DOTALL)
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_HASH_ANSWER = re.compile(r"#### (-?[\d.,]+)")  # as openai/grade-school-math `dataset.py`


def used_tool(text: str) -> bool:
    """Whether a tool call stands in the text."""
    return "<|python_start|>" in text


def final_words(text: str) -> str:
    """What the assistant says after the last tool result, special tokens removed; the whole text without a tool."""
    text = text.split("<|assistant_end|>")[0]
    return re.sub(r"<\|\w+\|>", "", _TOOL_BLOCK.sub("", text.rsplit("<|output_end|>", 1)[-1])).strip()


def hash_answer(text: str) -> str | None:
    """GSM8K's answer: the number after the first "#### ", commas removed; None if there is none."""
    match = _HASH_ANSWER.search(text)
    return match.group(1).replace(",", "") if match else None


def last_number(text: str) -> str | None:
    """The last number of the text as it stands there, commas removed; None if there is none."""
    numbers = _NUMBER.findall(text)
    return numbers[-1].replace(",", "") if numbers else None


def choice_letter(text: str, letters: str = "ABCD") -> str | None:
    """The letter of a multiple choice, if the final words are a letter alone (a full stop is forgiven)."""
    words = final_words(text).rstrip(".")
    return words if len(words) == 1 and words in letters else None


def spelled_word(text: str) -> str:
    """The letters of the last line after its last colon, joined: 'Here: "owl": o w l.' -> "owl"; commas are fine."""
    lines = final_words(text).splitlines()
    letters = re.split(r"[\s,.]+", lines[-1].rsplit(":", 1)[-1].strip(" .,")) if lines else []
    return "".join(letters).lower() if all(len(letter) == 1 for letter in letters) else ""


def says(text: str, phrase: str) -> bool:
    """Whether the phrase stands in the text as whole words, whatever the case."""
    return re.search(rf"(?<!\w){re.escape(phrase)}(?!\w)", text, re.IGNORECASE) is not None


def is_correct(row: dict, text: str) -> bool:
    """Whether the reply answers a row of `primer.questions`.

    A sum's result must be the last number said; a spelling must have exactly the word's letters; a fact must name the
    value and the entity and none of the relation's other values, so that neither a list of guesses nor a fact about
    somebody else counts. Whether the tool was called is `used_tool`'s business.
    """
    kind, words = row["kind"], final_words(text)
    if kind in ("arithmetic", "problem", "counting"):
        return last_number(words) == row["answer"]
    if kind == "spelling":
        return spelled_word(text) == row["answer"].replace(" ", "")
    named = says(words, row["answer"]) and (not row["entity"] or says(words, row["entity"]))
    return named and not any(says(words, rival) for rival in row["rivals"])


COLUMNS = ("kind", "answer", "entity", "rivals")  # of a row, besides its prompt: what a grader needs


def grade(row: dict, text: str) -> bool:
    """Whether the assistant's turn `text`, decoded with special tokens, answers `row`.

    kind "gsm8k" wants the number after `####`; every other kind is one of data/grading.py.
    """
    return hash_answer(text) == row["answer"] if row["kind"] == "gsm8k" else is_correct(row, text)


def correctness(tokenizer: PreTrainedTokenizerBase, record: Callable | None = None) -> Callable:
    """-> TRL reward function: 1.0 for a right completion, 0.0 for a wrong one.

    `record(rows, texts, rewards)`, if given, sees each batch that was graded: for samples and for pass@k. The share of
    completions with a tool call goes to TRL's log as `tool_use`.
    """

    def correct(prompts, completion_ids, **columns) -> list[float]:
        log = columns.get("log_metric", lambda name, value: None)
        columns = {"prompt": prompts} | {name: columns[name] for name in COLUMNS}
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        texts = tokenizer.batch_decode(completion_ids)
        rewards = [float(grade(row, text)) for row, text in zip(rows, texts, strict=True)]
        log("tool_use", sum(map(used_tool, texts)) / len(texts))
        if record:
            record(rows, texts, rewards)
        return rewards

    return correct


def pass_at_k(outcomes: Iterable[list[bool]], k: int) -> float:
    """Chance that one of k samples is right, estimated without bias from n >= k samples of each question.

    1 - C(n - c, k) / C(n, k) for c right ones, averaged (Chen et al. 2021, arXiv:2107.03374). ValueError if n < k.
    """
    chances = []
    for right in outcomes:
        if len(right) < k:
            raise ValueError(f"pass@{k} needs {k} samples of every question, got {len(right)}")
        chances.append(1 - comb(len(right) - sum(right), k) / comb(len(right), k))
    return sum(chances) / len(chances)
