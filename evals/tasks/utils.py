"""What the chat tasks' YAMLs beside this file call through `!function utils.NAME`: rows, prompts and graders.

    lm_eval run --model hf --model_args pretrained=DIR,trust_remote_code=True --tasks nanochat_arc_easy,nanochat_mmlu \
        --include_path evals --apply_chat_template

Multiple choice is exact with the plain command line. Generated answers (GSM8K, HumanEval, SpellingBee, the demo) are
too, as long as the model calls no tool: lm-eval's own runner answers no calls, `scripts/run_evals.py` does.
"""

import re
from math import comb
from pathlib import Path

import datasets

from nanochat_hf.data import grading as answers
from nanochat_hf.data.jsonl import damaged, numbered_lines, parse
from nanochat_hf.tools import run_sandboxed

TYPES = {"messages": list, "choices": (list, dict), "rivals": list}  # of fields; the others are text


def rows(
    file: str,
    fields: list[str],
    hub: str | None = None,
    name: str | None = None,
    split: str = "test",
    chat_data: str | list[str | None] | None = None,
    **_,
) -> dict[str, datasets.Dataset]:
    """A task's rows: `<chat_data>/<file>` where that exists, else the Hub's, in upstream's order (shuffled, seed 42).

    chat_data, a folder or several, comes with `--metadata chat_data=DIR`; tasks without a place on the Hub need it.
    Every line of the file must have the `fields`, else the ValueError names it.
    """
    folders = [chat_data] if isinstance(chat_data, str) else chat_data or []
    for path in (Path(folder) / file for folder in folders if folder):
        if path.is_file():
            return {"test": read_rows(path, fields)}
    if not hub:
        raise ValueError(f"no file {file}: pass --metadata chat_data=DIR with the folder that holds it")
    try:
        return {"test": datasets.load_dataset(hub, name, split=split).shuffle(seed=42)}
    except (OSError, ValueError) as error:  # no network, or offline mode
        raise ValueError(f"no file {file} in chat_data and no {hub} from the Hub: {error}") from None


def read_rows(path: Path, fields: list[str]) -> datasets.Dataset:
    """The file's rows; of questions with choices already as `choice_docs` makes them."""
    found, types = [], {name: TYPES.get(name, str) for name in fields}
    for number, line in numbered_lines(path):
        row = parse(path, number, line, types)
        try:
            if "messages" in row:
                question(row).strip()
            found.append(choice_doc(row) if "choices" in row else {name: row[name] for name in fields})
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise damaged(path, number, f"not a row of this task ({type(error).__name__}: {error})") from None
    return datasets.Dataset.from_list(found)


def question(doc: dict) -> str:
    """The user's first message, from `messages` or `question`."""
    return doc["messages"][0]["content"] if doc.get("messages") else doc["question"]


def choice_docs(found: datasets.Dataset) -> datasets.Dataset:
    """ARC's and MMLU's rows of the Hub -> those of `choice_doc`, which local files have already."""
    if "prompt" in found.column_names:
        return found
    return found.map(choice_doc, remove_columns=found.column_names, load_from_cache_file=False)


def choice_doc(doc: dict) -> dict:
    """A row of ARC or MMLU -> {prompt, letters, gold}. Raises ValueError if its answer is none of its choices.

    The prompt is upstream's protocol to the letter: each choice stands before its letter, which helps small models to
    bind the two, and the letter follows "=" without a space, so that it is the token that the answer consists of.
    """
    choices = doc["choices"]
    texts, letters = (choices["text"], choices["label"]) if isinstance(choices, dict) else (choices, "ABCDEFGHIJ")
    letters = list(letters)[: len(texts)]
    gold = letters.index(doc["answerKey"]) if "answerKey" in doc else doc["answer"]
    if not (isinstance(gold, int) and 0 <= gold < len(texts) == len(letters)):
        raise ValueError(f"answer {gold!r} of {len(texts)} choices")
    lines = "".join(f"- {text}={letter}\n" for text, letter in zip(texts, letters))
    request = "Respond only with the letter of the correct answer."
    prompt = f"Multiple Choice question: {doc['question']}\n{lines}\n{request}"
    return {"prompt": prompt, "letters": letters, "gold": gold}


def choice_results(doc: dict, results: list[tuple[float, bool]]) -> dict[str, float]:
    """The letter with the highest logit among the valid ones is the answer; no text is generated."""
    scores = [total for total, _ in results]
    right = float(scores.index(max(scores)) == doc["gold"])
    return {"acc": right, "centered": right}


def centered25(items: list[float]) -> float:
    """Accuracy rescaled so that guessing among four gives 0 and perfection 1."""
    return (sum(items) / len(items) - 0.25) / 0.75


def _graded(answers: str | list[str], grade) -> dict[str, float]:
    """acc = share of right answers among those sampled for a question (pass@1); with n of them also pass@2, 4, .. n.

    pass@k is the chance that k of the n, drawn at random, hold a right one (Chen et al., arXiv 2107.03374).
    """
    answers = [answers] if isinstance(answers, str) else answers
    n, right = len(answers), sum(bool(grade(answer)) for answer in answers)
    sizes = [k for k in (2, 4, 8, 16, 32, 64) if k < n] + [n] * (n > 1)
    more = {f"pass@{k}": 1 - comb(n - right, k) / comb(n, k) for k in sizes}
    return {"acc": right / n, "centered": right / n, **more}


def hash_results(doc: dict, results: list) -> dict[str, float]:
    """GSM8K and SpellingBee: the number after the first "####" must equal the reference's, as text."""
    expected = answers.hash_answer(doc["answer"]) or doc["answer"]
    return _graded(results[0], lambda text: answers.hash_answer(text) == expected)


def humaneval_results(doc: dict, results: list) -> dict[str, float]:
    """Runs the answer's first code block (or all of it) with the prompt's imports and the tests, in a sandbox."""
    return _graded(results[0], lambda text: run_sandboxed(humaneval_program(doc, text)).passed)


def humaneval_program(doc: dict, text: str) -> str:
    code = answers.final_words(text)
    block = re.search(r"```(?:python)?[^\S\n]*\n(.*?)\n```", code, re.DOTALL)
    imports = []
    for line in doc["prompt"].splitlines():
        if line.strip().startswith(("import ", "from ")):
            imports.append(line.strip())
        elif line.strip() and not line.strip().startswith("#"):
            break
    return "\n\n".join(
        ["\n".join(imports), (block.group(1) if block else code).strip(), doc["test"], f"check({doc['entry_point']})"]
    )


def primer_results(doc: dict, results: list) -> dict[str, float]:
    """The demo's questions: graded as RL rewards them, and the share of answers that called the tool."""
    graded = _graded(results[0], lambda text: answers.is_correct(doc, text))
    del graded["centered"]  # no part of a mean of centered accuracies
    first = results[0] if isinstance(results[0], str) else results[0][0]
    return {**graded, "tool_use": float(answers.used_tool(first))}
