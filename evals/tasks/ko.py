"""Rows of the Korean tasks (group nanochat_ko), from local files or the Hub, in the wording of lm-eval's own tasks.

    lm_eval run --model hf --model_args pretrained=DIR,trust_remote_code=True --include_path evals \
        --tasks nanochat_ko_copa,nanochat_ko_hellaswag,nanochat_ko_boolq --metadata chat_data=FOLDER_WITH_KOBEST

KoBEST (arXiv:2204.04541): `COPA/test.tsv`, `HellaSwag/test.tsv`, `BoolQ/test.tsv` as its repository has them, else
skt/kobest_v1. KMMLU (arXiv:2402.11548) and HAE-RAE (arXiv:2309.02706) come from the Hub, all subjects as one task.
A choice is scored by the sum of its log-probabilities, as in lm-eval's `acc`.
"""

import re
from pathlib import Path

import datasets
import lm_eval.tasks
from lm_eval.tasks.kobest.utils import copa_doc_to_choice, copa_doc_to_text

from nanochat_hf.eval.core import damaged, decode, find_file, numbered_lines

COLUMNS = {  # of the files -> of the Hub
    "COPA": {"sentence": "premise", "question": "question", "Answer": "label"}
    | {"1": "alternative_1", "2": "alternative_2"},
    "HellaSwag": {"context": "context", "label": "label"} | {f"choice{i}": f"ending_{i}" for i in range(1, 5)},
    "BoolQ": {"Text": "paragraph", "Question": "question", "Answer": "label"},
}
LABELS = {  # in the files -> the label
    "COPA": {"1": 0, "2": 1},
    "HellaSwag": {str(i): i for i in range(4)},
    "BoolQ": {"false": 0, "true": 1},
}


def read_tsv(path: Path, task: str) -> list[dict]:
    """Rows of a file of KoBEST with the Hub's names of columns. Raises ValueError with file and line."""
    lines = [(number, decode(path, number, line).split("\t")) for number, line in numbered_lines(path)]
    (first, names), rows = lines[0], []
    for column in COLUMNS[task]:
        if column not in names:
            raise damaged(path, first, f"no column {column!r}")
    for number, cells in lines[1:]:
        if len(cells) != len(names):
            raise damaged(path, number, f"{len(cells)} of {len(names)} columns")
        row = {COLUMNS[task].get(name, name): cell for name, cell in zip(names, cells)}
        if (label := LABELS[task].get(row["label"].lower())) is None:
            raise damaged(path, number, f"the label is {row['label']!r}")
        rows.append({**row, "label": label})
    if not rows:
        raise damaged(path, first, "no rows follow")
    return rows


def kobest(task: str, chat_data: str | list[str | None] | None = None, **_) -> dict[str, datasets.Dataset]:
    """`<chat_data>/<task>/test.tsv` (or below `kobest/` there) where that exists, else the Hub's test split."""
    if path := find_file(chat_data, f"{task}/test.tsv", f"kobest/{task}/test.tsv"):
        return {"test": datasets.Dataset.from_list(read_tsv(path, task))}
    return {"test": from_hub("skt/kobest_v1", [task.lower()])}


def from_hub(repo: str, names: list[str]) -> datasets.Dataset:
    try:
        return datasets.concatenate_datasets([datasets.load_dataset(repo, name, split="test") for name in names])
    except Exception as error:  # no network, offline mode, gone: the library's errors have no common type
        raise ValueError(f"no {repo} from the Hub: {' '.join(str(error).split())[:200]}") from None


def subjects(task: str, repo: str, **_) -> dict[str, datasets.Dataset]:
    """All subjects that lm-eval's own task of this name asks about, one after another."""
    files = sorted((Path(lm_eval.tasks.__file__).parent / task).glob("*.yaml"))
    names = [re.search(r"^dataset_name: (.+)$", path.read_text(), re.M) for path in files]
    return {"test": from_hub(repo, [name[1] for name in names if name])}


def questions(render):
    """lm-eval's `process_docs`: rows -> {prompt, choices, gold}, which `render` makes of a row."""

    def process_docs(docs: datasets.Dataset) -> datasets.Dataset:
        def convert(doc):
            return dict(zip(("prompt", "choices", "gold"), render(doc)))

        return docs.map(convert, remove_columns=docs.column_names, load_from_cache_file=False)

    return process_docs


@questions
def copa(doc):
    return copa_doc_to_text(doc), copa_doc_to_choice(doc), doc["label"]


@questions
def hellaswag(doc):
    return f"문장: {doc['context']}", [doc[f"ending_{i}"] for i in range(1, 5)], int(doc["label"])


@questions
def boolq(doc):
    return f"{doc['paragraph']} 질문: {doc['question']} 답변: ", ["아니오", "예"], doc["label"]


@questions
def kmmlu(doc):
    lines = "\n".join(f"{letter}. {doc[letter]}" for letter in "ABCD")
    return f"{doc['question'].strip()}\n{lines}\n정답：", list("ABCD"), doc["answer"] - 1


@questions
def haerae(doc):
    letters = [f"({letter})" for letter in "ABCDE"]
    return doc["query"], letters, letters.index(doc["answer"])
