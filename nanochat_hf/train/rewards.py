"""Rewards for reinforcement learning: the graders of data/answers.py in the signature that TRL calls.

Why so thin: the reward must be what the evaluation measures. A row of an RL data set has `prompt` (messages), `kind`,
`answer` and, for facts, `entity` and `rivals`; `correctness` grades what the model wrote, tool calls included.

    reward = correctness(tokenizer)
    GRPOTrainer(reward_funcs=reward, ...)
"""

from collections.abc import Callable, Iterable
from math import comb

from transformers import PreTrainedTokenizerBase

from ..data.answers import hash_answer, is_correct, used_tool

COLUMNS = ("kind", "answer", "entity", "rivals")  # of a row, besides its prompt: what a grader needs


def grade(row: dict, text: str) -> bool:
    """Whether the assistant's turn `text`, decoded with special tokens, answers `row`.

    kind "gsm8k" wants the number after `####`; every other kind is one of data/answers.py.
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
