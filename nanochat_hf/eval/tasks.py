"""The lm-eval tasks that an eval.yaml names: loaded, run one by one, and their output as plain results.

tasks = Tasks(EvalConfig(tasks=["nanochat_demo"]), {"sft": "runs/d12/sft"}, Path("runs/d12/eval"))
results, samples = tasks.run("nanochat_demo_facts", lm)
"""

import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from lm_eval.api.metrics import mean_stderr
from lm_eval.filters import build_filter_ensemble
from lm_eval.tasks import TaskManager

from .. import sandbox
from ..data.documents import local_path
from ..data.grading import used_tool
from ..data.mixture import Mixture
from ..demo import corpus as primer
from ..distributed import main_process_first, partial_state
from ..errors import InputError
from ..run import nearest, project_folder, save_jsonl
from ..stage_configs import SPELLING, EvalConfig
from .core import DamagedFile, input_error, load_tasks, quiet, run_lm_eval
from .lm_eval_model import LocalLM

EVALS = project_folder("evals")
MEANS = {  # of centered accuracies: key in metrics.json -> group of tasks, name of the mean, name of a part of it
    "chatcore": ("nanochat_chatcore", "ChatCORE", "chat tasks"),
    "kocore": ("nanochat_ko", "KoCORE", "Korean tasks"),
}
DEMO_KINDS = ("fact", "arithmetic", "spelling", "counting", "problem")
NUM_SPELLING_QUESTIONS = 256  # as upstream


class Tasks:
    """The tasks that a config names. Raises InputError for wrong names and missing data, before a model is loaded."""

    def __init__(self, config, models: dict[str, str], output: Path):
        self.config, self.loaded = config, {}
        self.manager = known_tasks(config, [chat_folder(config), str(output / "questions")])
        if set(models) & {*config.chat_stages, *(config.text_stages or [])}:
            new = not (output / "questions").exists()
            try:
                self.write_questions(output / "questions")
                self.load()
            except InputError:  # refused input leaves nothing, and what was there
                if new:
                    shutil.rmtree(output / "questions", ignore_errors=True)
                    with suppress(OSError):  # it holds more
                        output.rmdir()
                raise
        if any(task.config.unsafe_code for task in self.loaded.values()):
            if config.allow_unsandboxed_code:
                os.environ[sandbox.ALLOW] = "1"
            sandbox.check_layers()
            partial_state().print(f"[eval] sandbox of generated code: {', '.join(sandbox.layers()) or 'none'}")
        self.chat = [name for name, task in self.loaded.items() if (task.config.metadata or {}).get("chat")]

    def load(self) -> None:
        """Load the tasks; of the Korean group only those whose rows are available here."""
        group = MEANS["kocore"][0]
        for name in self.config.tasks:
            if name != group:
                self.loaded |= load_tasks(self.manager, [name])
                continue
            failures = []
            for part in self.members("kocore"):
                try:
                    self.loaded |= load_tasks(self.manager, [part])
                except InputError as error:
                    if isinstance(error.__cause__, DamagedFile):
                        raise
                    failures.append(f"{part.removeprefix(group + '_')} ({error})")
            if len(failures) == len(self.members("kocore")):
                raise InputError(f"no task of {name} has its rows here: {failures[0]}; name them with chat_data")
            if failures:
                partial_state().print(f"[eval] {name} leaves out {', '.join(failures)}")
        for name, task in self.loaded.items() if self.config.num_samples > 1 else ():
            if task.OUTPUT_TYPE == "generate_until" and not name.startswith("nanochat_"):
                raise InputError(f"num_samples is {self.config.num_samples}: {name} of lm-eval grades one answer each")

    def members(self, kind: str) -> list[str]:
        return self.manager.task_index[MEANS[kind][0]].cfg["task"]

    def of(self, stage: str) -> list[str]:
        """The tasks that this stage answers."""
        chat, text = self.config.chat_stages, self.config.text_stages
        text = chat if text is None else text
        return [name for name in self.loaded if stage in (chat if name in self.chat else text)]

    def write_questions(self, folder: Path) -> None:
        """Write the rows of tasks that are generated, as files that the lm-eval CLI can read, too."""
        with main_process_first("making the questions") as main:
            if not main:
                return
            for kind in DEMO_KINDS:
                save_jsonl(folder / f"primer_{kind}.jsonl", primer.questions(kind))
            source = self.config.words or self.config.dataset
            if source and SPELLING & set(self.config.tasks):
                bee = {"dataset": source, "split": "test", "transform": "spelling_bee"}
                mixture = Mixture([bee | {"rows": NUM_SPELLING_QUESTIONS}], seed=self.config.seed)
                rows = [(row["messages"][:1], row["messages"][-1]["content"]) for row in mixture]
                rows = [{"messages": question, "answer": answer} for question, answer in rows]
                save_jsonl(folder / "spellingbee_test.jsonl", rows)

    def run(self, name: str, lm: LocalLM) -> tuple[dict, list[dict]]:
        """Returns ({short name: result}, samples) of one task; both empty on ranks other than the first."""
        task, lm.num_cropped = self.loaded[name], 0
        if self.config.num_samples > 1 and task.OUTPUT_TYPE == "generate_until":
            task.config.repeats = self.config.num_samples
            task._filters = [build_filter_ensemble("none", [["take_first_k", {"k": task.config.repeats}]])]
        output = run_lm_eval(lm, {name: task}, self.config.max_per_task, chat=name in self.chat, log_samples=True)
        num_cropped = sum(lm.gather_object(lm.num_cropped))
        if output is None:
            return {}, []
        metadata, rows = task.config.metadata or {}, sorted(output["samples"][name], key=lambda row: row["doc_id"])
        first = rows[0]["filter"]  # lm-eval's tasks may read an answer in several ways, the strictest first
        rows = [row for row in rows if row["filter"] == first]
        every = output["results"][name]
        numbers = {key.removesuffix(f",{first}"): value for key, value in every.items()}
        metric = next(m for m in ("acc", "acc_norm", "exact_match", *task.aggregation()) if m in numbers)
        samples, baseline = [sample_row(row, metric) for row in rows], metadata.get("baseline")
        result = {
            "value": numbers[metric],
            "stderr": standard_error([row.get(metric) for row in rows]),
            "n": len(samples),
            "baseline": majority(samples) if baseline == "majority" else baseline,
            "higher_is_better": task.higher_is_better().get(metric, True),
        }
        result |= {k: v for k, v in numbers.items() if k.startswith("pass@") and "stderr" not in k}
        result |= {key: every[key] for key in every if key.startswith(f"{metric},") and key != f"{metric},{first}"}
        if name.startswith("nanochat_demo_"):  # lm-eval's CLI cannot count calls: it drops special tokens
            first = [row["answer"] if isinstance(row["answer"], str) else row["answer"][0] for row in samples]
            result["tool_use"] = sum(map(used_tool, first)) / len(first)
        result |= {"cropped": num_cropped} if num_cropped else {}
        if unchecked := round(numbers.get("unchecked", 0) * len(samples)):
            result["unchecked"] = unchecked
        result |= {kind: True for kind in MEANS if name in self.members(kind)}
        alias, aliases = task.config.task_alias, [task.config.task_alias for task in self.loaded.values()]
        return {alias if alias and aliases.count(alias) == 1 else name: result}, samples


def task_manager(config, chat_data: list[str | None] | None = None, include_defaults: bool = False) -> TaskManager:
    """lm-eval's index of evals/tasks; the folders that the config names reach the tasks as metadata."""
    bundle = None if config.core_bundle in (None, "download") else str(local_path(config.core_bundle))
    metadata = {"core_bundle": bundle, "chat_data": chat_data}
    return TaskManager(include_path=str(EVALS), include_defaults=include_defaults, metadata=metadata)


def known_tasks(config, chat_data: list[str | None] | None = None) -> TaskManager:
    """The index that has all tasks of a config. Raises InputError for a name that it lacks."""
    own_only = all(name.startswith("nanochat_") for name in config.tasks)  # reading all of lm-eval's takes seconds
    manager = task_manager(config, chat_data, include_defaults=not own_only)
    for name in config.tasks:
        if name not in manager.all_tasks:
            raise InputError(f"unknown task {name!r}; {nearest(name, manager.all_tasks)}")
    return manager


def eval_rows(names: list[str], core_bundle: str, chat_data: str | None) -> Iterator[tuple[str, dict | None]]:
    """(task, row) of all rows that the tasks are scored on; None for a task whose file the CORE bundle lacks.

    Raises InputError: an unknown task, a wrong bundle, rows that are neither in `chat_data` nor on the Hub.
    """
    config = EvalConfig(tasks=names, core_bundle=core_bundle, chat_data=chat_data)
    with quiet():
        for name, task in load_tasks(known_tasks(config, [chat_folder(config)]), names).items():
            if input_error(lambda task: not hasattr(task, "file") or task.file.is_file(), task):
                yield from ((name, row) for row in input_error(list, task.eval_docs))
            else:
                print(f"{name} is not checked against: the CORE bundle has no file of it", file=sys.stderr)
                yield name, None


def chat_folder(config) -> str | None:
    """The folder of the chat tasks' local files, if one is named."""
    folder = config.chat_data and str(local_path(config.chat_data))
    if folder and not Path(folder).is_dir():
        raise InputError(f"chat_data: no folder {config.chat_data}")
    return folder


def sample_row(sample: dict, metric: str = "acc") -> dict:
    """The parts of an lm-eval sample that a person reads; graded by `metric`, if that is one number per sample."""
    doc, answers = sample["doc"], sample["filtered_resps"][0]
    if not isinstance(answers, str | list):  # multiple choice: (log-probability, greedy) of each letter
        scores = zip(sample["arguments"], sample["filtered_resps"])
        answers = {arguments[1]: round(score[0], 3) for arguments, score in scores}
    question = doc["messages"][0]["content"] if doc.get("messages") else doc.get("question") or doc.get("prompt")
    question = question if isinstance(question, str) else str(sample["arguments"][0][0])
    expected = doc["letters"][sample["target"]] if "letters" in doc else sample["target"]
    correct = sample.get(metric) if isinstance(sample.get(metric), int | float) else None
    return {"question": question, "expected": expected, "answer": answers, "correct": correct}


def majority(samples: list[dict]) -> float:
    """The accuracy of always giving the most frequent answer."""
    return Counter(str(sample["expected"]) for sample in samples).most_common(1)[0][1] / len(samples)


def standard_error(values: list) -> float | None:
    if len(values) < 2 or not all(isinstance(value, int | float) for value in values):
        return None
    return mean_stderr(values)
