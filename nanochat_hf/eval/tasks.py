"""The lm-eval tasks that an eval.yaml names: found, given their rows, run one by one and read into plain results.

tasks = Tasks(EvalConfig(tasks=["nanochat_demo"]), {"sft": "runs/d12/sft"}, Path("runs/d12/eval"))
results, samples = tasks.run("nanochat_demo_facts", lm)
"""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from lm_eval.api.metrics import mean_stderr
from lm_eval.filters import build_filter_ensemble
from lm_eval.tasks import TaskManager

from ..data.documents import local_path
from ..data.jsonl import DamagedFile
from ..data.mixture import Mixture
from ..demo import corpus as primer
from ..distributed import main_process_first, partial_state
from ..errors import InputError
from ..run import nearest, without_nan, writing
from .core import evaluate_core, load_tasks, run_lm_eval
from .lm_eval_model import LocalLM

EVALS = Path(__file__).parents[2] / "evals"
MEANS = {  # of centered accuracies: key in metrics.json -> group of tasks, name of the mean, name of a part of it
    "chatcore": ("nanochat_chatcore", "ChatCORE", "chat tasks"),
    "kocore": ("nanochat_ko", "KoCORE", "Korean tasks"),
}
DEMO_KINDS = ("fact", "arithmetic", "spelling", "counting", "problem")
SPELLING = {"nanochat_spellingbee", "nanochat_chatcore"}
SPELLING_BEES = 256  # questions, as upstream


class Tasks:
    """The lm-eval tasks that a config names, ready to run; finds out about wrong names before any model is loaded."""

    def __init__(self, config, models: dict[str, str], output: Path):
        self.config, self.models = config, models
        if not (EVALS / "tasks").is_dir():
            raise InputError(f"no {EVALS}: evaluation runs from a checkout of the repository")
        chat_data = config.chat_data and str(local_path(config.chat_data))
        if chat_data and not Path(chat_data).is_dir():
            raise InputError(f"chat_data: no folder {config.chat_data}")
        if isinstance(config.dataset, list) and not config.words and SPELLING & set(config.tasks):
            raise InputError(
                "dataset is a mixture, and SpellingBee takes its words from one dataset: name it in words"
            )
        metadata = {"core_bundle": bundle_folder(config), "chat_data": [chat_data, str(output / "questions")]}
        self.manager = TaskManager(include_path=str(EVALS), include_defaults=False, metadata=metadata)
        if any(not name.startswith("nanochat_") for name in config.tasks):
            self.manager = TaskManager(include_path=str(EVALS), metadata=metadata)  # reads all of lm-eval's
        for name in config.tasks:
            if name not in self.manager.all_tasks:
                raise InputError(f"unknown task {name!r}; {nearest(name, self.manager.all_tasks)}")
        self.loaded: dict = {}
        if set(models) & {*config.chat_stages, *(config.text_stages or [])}:
            self.write_questions(output)
            self.load()
        self.chat = [name for name, task in self.loaded.items() if (task.config.metadata or {}).get("chat")]

    def load(self) -> None:
        """Load the tasks; of the Korean group those whose rows can be had here."""
        for name in self.config.tasks:
            korean, failed = name == MEANS["kocore"][0], []
            for part in self.members("kocore") if korean else [name]:
                try:
                    self.loaded |= load_tasks(self.manager, [part])
                except InputError as error:
                    failed.append(f"{part.removeprefix(name + '_')} ({error})")
                    if not korean or isinstance(error.__cause__, DamagedFile):
                        raise
            if korean and not self.loaded:
                raise InputError(f"no task of {name} has its rows here: {failed[0]}; name them with chat_data")
            if failed:
                partial_state().print(f"[eval] {name} goes without {', '.join(failed)}")

    def members(self, kind: str) -> list[str]:
        return self.manager.task_index[MEANS[kind][0]].cfg["task"]

    def of(self, stage: str) -> list[str]:
        """The tasks that this stage answers."""
        chat, text = self.config.chat_stages, self.config.text_stages
        text = chat if text is None else text
        return [name for name in self.loaded if stage in (chat if name in self.chat else text)]

    def write_questions(self, output: Path) -> None:
        """The rows of tasks that are generated, as files that the plain lm_eval command line can read again."""
        with main_process_first("making the questions") as main:
            if not main:
                return
            for kind in DEMO_KINDS:
                write_jsonl(output / "questions" / f"primer_{kind}.jsonl", primer.questions(kind))
            source = self.config.words or self.config.dataset
            if source and SPELLING & set(self.config.tasks):
                bee = {"dataset": source, "split": "test", "transform": "spelling_bee", "rows": SPELLING_BEES}
                found = [row["messages"] for row in Mixture([bee], seed=self.config.seed)]
                rows = [{"messages": turns[:1], "answer": turns[-1]["content"]} for turns in found]
                write_jsonl(output / "questions" / "spellingbee_test.jsonl", rows)

    def run(self, name: str, lm: LocalLM) -> tuple[dict, list[dict]]:
        """One task -> ({short name: result}, samples); both empty on ranks other than the first."""
        task, chat, lm.num_cropped = self.loaded[name], name in self.chat, 0
        if self.config.num_samples > 1 and task.OUTPUT_TYPE == "generate_until":
            count = self.config.num_samples
            task.config.repeats = count
            task._filters = [build_filter_ensemble("none", [["take_first_k", {"k": count}]])]
        found = run_lm_eval(lm, {name: task}, self.config.max_per_task, chat=chat, log_samples=True)
        cropped = sum(lm.gather_object(lm.num_cropped))
        if found is None:
            return {}, []
        numbers, metadata = found["results"][name], task.config.metadata or {}
        samples = [readable(sample) for sample in sorted(found["samples"][name], key=lambda sample: sample["doc_id"])]
        metric = next(m for m in ("acc", "acc_norm", "exact_match", *task.aggregation()) if f"{m},none" in numbers)
        result = {
            "value": numbers[f"{metric},none"],
            "stderr": standard_error([sample.get(metric) for sample in found["samples"][name]]),
            "n": len(samples),
            "baseline": majority(samples) if metadata.get("baseline") == "majority" else metadata.get("baseline"),
            "higher_is_better": task.higher_is_better().get(metric, True),
        }
        extra = {k.removesuffix(",none"): v for k, v in numbers.items() if k.startswith(("tool_use", "pass@"))}
        result |= {key: value for key, value in extra.items() if "stderr" not in key}
        if cropped:
            result["cropped"] = cropped
        result |= {kind: True for kind in MEANS if name in self.members(kind)}
        return {task.config.task_alias or name: result}, samples

    def core(self, lm: LocalLM, log: Callable = print) -> dict | None:
        return evaluate_core(lm, self.manager, self.config.core_max_per_task, log)


def bundle_folder(config) -> str | None:
    """The folder of CORE's data that a config names; None for the official one."""
    return None if config.core_bundle in (None, "download") else str(local_path(config.core_bundle))


def write_jsonl(path: Path, rows: list[dict]) -> None:
    """A row a line; NaN and infinities, which JSON has no word for, become null."""
    lines = (json.dumps(without_nan(row), ensure_ascii=False, allow_nan=False) for row in rows)
    text = "".join(f"{line}\n" for line in lines)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def readable(sample: dict) -> dict:
    """What a person wants to see of an lm-eval sample."""
    doc, answers = sample["doc"], sample["filtered_resps"][0]
    if not isinstance(answers, str | list):  # multiple choice: (log-probability, greedy) of each letter
        answers = {
            request[1]: round(found[0], 3) for request, found in zip(sample["arguments"], sample["filtered_resps"])
        }
    question = doc["messages"][0]["content"] if doc.get("messages") else doc.get("question") or doc.get("prompt")
    question = question if isinstance(question, str) else str(sample["arguments"][0][0])
    expected = doc["letters"][sample["target"]] if "letters" in doc else sample["target"]
    return {"question": question, "expected": expected, "answer": answers, "correct": sample.get("acc")}


def majority(samples: list[dict]) -> float:
    """What always giving the most frequent answer would get."""
    return Counter(str(sample["expected"]) for sample in samples).most_common(1)[0][1] / len(samples)


def standard_error(values: list) -> float | None:
    if len(values) < 2 or not all(isinstance(value, int | float) for value in values):
        return None
    return mean_stderr(values)
