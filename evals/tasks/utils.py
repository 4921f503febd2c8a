"""Rows, prompts and graders of the chat tasks, which the YAMLs in this folder name as `!function utils.NAME`.

    lm_eval run --model hf --model_args pretrained=DIR,trust_remote_code=True --tasks nanochat_arc_easy,nanochat_mmlu \
        --include_path evals --apply_chat_template

Multiple choice gives the same results in the lm-eval CLI. Generated answers (GSM8K, HumanEval, SpellingBee, the demo)
do, too, as long as the model calls no tool: the CLI answers no calls, `nanochat eval` does.
"""

import re
from pathlib import Path
from string import ascii_uppercase

import datasets
from lm_eval.api.metrics import mean

from nanochat_hf.data.grading import final_text, hash_answer, is_correct, pass_at_k
from nanochat_hf.data.transforms import multiple_choice
from nanochat_hf.eval.core import centered, damaged, find_file, numbered_lines, parse_row
from nanochat_hf.sandbox import run_sandboxed

FUTURE = re.compile(r"^from __future__ import [\w, ]+;?", re.MULTILINE)
BLOCK = re.compile(  # from a fence to the next one that is not indented further, or to the end
    r"(?P<indent>^[ \t]*|)(?P<item>(?:[-*+]|\d+[.)])[ \t]+)?(?P<fence>`{3,}|~{3,})(?P<info>[^`\n]*)\n"
    r"(?P<code>.*?)(?P<end>^(?(item)[ \t]*|(?P=indent)?[ \t]{0,3})(?P=fence)|\Z)",
    re.MULTILINE | re.DOTALL,
)
PYTHON = re.compile(r"\W*((python|py)[\d.]*\b.*)?", re.IGNORECASE)  # what follows the fence of a Python block
INDENTED = re.compile(r"(?:^[ \t]+\S.*\n?|^[ \t]*\n)+", re.MULTILINE)
PROGRAM = re.compile(r"^(def|class|async def) \w+.*:|^@\w", re.MULTILINE)  # code that is not in a block
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
    """A task's rows: `<chat_data>/<file>` if it exists, else the Hub's, in upstream's order (shuffled, seed 42).

    chat_data, one folder or several, comes with `--metadata chat_data=DIR`; tasks that are not on the Hub need it.
    Every line of the file must have the `fields`, else the ValueError names it.
    """
    if path := find_file(chat_data, file):
        return {"test": read_rows(path, fields)}
    if not hub:
        raise ValueError(f"no file {file}: pass --metadata chat_data=DIR with the folder that holds it")
    try:
        return {"test": datasets.load_dataset(hub, name, split=split).shuffle(seed=42)}
    except (OSError, ValueError) as error:  # no network, or offline mode
        raise ValueError(f"no file {file} in chat_data and no {hub} from the Hub: {error}") from None


def read_rows(path: Path, fields: list[str]) -> datasets.Dataset:
    """The file's rows; questions with choices in the form of `choice_doc`."""
    docs, types = [], {name: TYPES.get(name, str) for name in fields}
    for number, line in numbered_lines(path):
        row = parse_row(path, number, line, types)
        try:
            if "messages" in row:
                question(row).strip()
            docs.append(choice_doc(row) if "choices" in row else {name: row[name] for name in fields})
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise damaged(path, number, f"not a row of this task ({type(error).__name__}: {error})") from None
    return datasets.Dataset.from_list(docs)


def question(doc: dict) -> str:
    """The user's first message, from `messages` or `question`."""
    return doc["messages"][0]["content"] if doc.get("messages") else doc["question"]


def choice_docs(docs: datasets.Dataset) -> datasets.Dataset:
    """Rows of ARC and MMLU in the form of `choice_doc`, which local files have already."""
    if "prompt" in docs.column_names:
        return docs
    return docs.map(choice_doc, remove_columns=docs.column_names, load_from_cache_file=False)


def choice_doc(doc: dict) -> dict:
    """A row of ARC or MMLU -> {prompt, letters, gold}, with the prompt of SFT. Raises ValueError for a bad answer."""
    user, assistant = multiple_choice(doc, rng=None)
    choices = doc["choices"]
    letters = list(choices["label"]) if isinstance(choices, dict) else list(ascii_uppercase[: len(choices)])
    return {"prompt": user["content"], "letters": letters, "gold": letters.index(assistant["content"])}


def choice_results(doc: dict, results: list[tuple[float, bool]]) -> dict[str, float]:
    """The choice with the highest log-probability is the answer; no text is generated."""
    scores = [total for total, _ in results]
    right = float(scores.index(max(scores)) == doc["gold"])
    return {"acc": right, "centered": right}


def centered_on(baseline: float):
    return lambda items: centered(mean(items), baseline)


centered20, centered25, centered50 = map(centered_on, (0.2, 0.25, 0.5))


def _graded(answers: str | list[str], grade) -> dict[str, float]:
    """acc = share of right answers among the n samples of a question (pass@1); also pass@2, 4, .. n for n > 1."""
    answers = [answers] if isinstance(answers, str) else answers
    outcomes = [bool(grade(answer)) for answer in answers]
    n, acc = len(outcomes), sum(outcomes) / len(outcomes)
    sizes = [k for k in (2, 4, 8, 16, 32, 64) if k < n] + [n] * (n > 1)
    return {"acc": acc, "centered": acc, **{f"pass@{k}": pass_at_k([outcomes], k) for k in sizes}}


def hash_results(doc: dict, results: list) -> dict[str, float]:
    """GSM8K and SpellingBee: the number after the first "####" must equal the reference's, as text."""
    expected = hash_answer(doc["answer"]) or doc["answer"]
    return _graded(results[0], lambda text: hash_answer(text) == expected)


def humaneval_results(doc: dict, results: list) -> dict[str, float]:
    """Runs the answer's first code block (or all of it) and the tests, in two sandboxes.

    unchecked = share of answers whose tests cannot be checked there; they count as wrong.
    """
    runs = []

    def passes(text: str) -> bool:
        runs.append(run_sandboxed(*humaneval_program(doc, text)))
        return runs[-1].passed

    return {**_graded(results[0], passes), "unchecked": sum(not run.checked for run in runs) / len(runs)}


def humaneval_program(doc: dict, text: str) -> tuple[str, str]:
    """The answer's program with the prompt's imports; the tests with all that the prompt defines first."""
    imports = []
    for line in doc["prompt"].splitlines():
        if line.strip().startswith(("import ", "from ")):
            imports.append(line.strip())
        elif line.strip() and not line.strip().startswith("#"):
            break
    program = code_of(final_text(text).strip("\n").removeprefix("\ufeff"), doc["entry_point"])  # a byte order mark
    head = "\n".join([*FUTURE.findall(program), *imports])  # Python takes those of __future__ only first
    given = doc["prompt"].partition(f"def {doc['entry_point']}(")[0]  # such as `poly`, with which the tests judge
    return f"{head}\n\n{FUTURE.sub('', program)}", f"{given}\n\n{doc['test']}\n\ncheck({doc['entry_point']})"


def code_of(text: str, name: str) -> str:
    """The first Python block of an answer in Markdown (marked as Python or not at all); without one all of the answer.

    A block may be indented; its fence need not be closed. Without fences a block is indented text that defines `name`.
    """
    text = text.replace("\r\n", "\n")
    program, name = PROGRAM.search(text), re.escape(name)
    defines = re.compile(rf"^\s*((async )?def {name}\b|{name} =)", re.MULTILINE)
    blocks = [block for block in BLOCK.finditer(text) if not program or block.start() < program.start()]
    block = next((block for block in blocks if block["code"].strip() and PYTHON.fullmatch(block["info"])), None)
    if block:
        text = block["code"] if block["end"] else re.split(r"(?m)```[ \t]*$", block["code"])[0]
    elif not program:
        text = next((run[0] for run in INDENTED.finditer(text) if defines.search(run[0])), text)
    width = len(re.match(r"\s*?([ \t]*)(\S|\Z)", text)[1])  # of the first line with words
    return re.sub(rf"^[ \t]{{0,{width}}}", "", text, flags=re.MULTILINE).strip()


def primer_results(doc: dict, results: list) -> dict[str, float]:
    """The demo's questions, graded as RL rewards them."""
    graded = _graded(results[0], lambda text: is_correct(doc, text))
    del graded["centered"]  # it has no place in a mean of centered accuracies
    return graded
