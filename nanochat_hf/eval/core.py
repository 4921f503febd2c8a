"""CORE: the 22 tasks of evals/tasks computed together, the mean of centered accuracies, and lm-eval's evaluator.

    evaluate_core(LocalLM(model, tokenizer, config), task_manager, max_per_task=100)["value"]

evals/tasks/core.py defines the tasks, loglikelihood.py scores them. Tasks read their local files by `read_jsonl`.
"""

import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import lm_eval.api.task
from lm_eval import evaluator
from lm_eval.tasks import TaskManager

from ..distributed import partial_state
from ..errors import InputError, in_a_line

GROUP = "nanochat_core"
NUM_CORE = 22


def evaluate_core(lm, manager: TaskManager, max_per_task: int | None = None, log: Callable = print) -> dict | None:
    """CORE of a model, or the mean over those of its tasks that the bundle has; the label says which.

    `lm` is a `LocalLM`, `max_per_task` examples are drawn as the definition says. Returns on the main process what
    `centered_mean` does, with "missing", "limit", "long_prompts", "seconds" and "model_seconds". Raises InputError: no
    bundle, one with none of the tasks, a damaged line.
    """
    start, model_seconds, results, long_prompts = time.time(), lm.model_seconds, {}, 0
    tasks = load_tasks(manager, [GROUP])
    present = {name: task for name, task in tasks.items() if input_error(lambda task: task.file.is_file(), task)}
    if not present:
        raise InputError("the CORE bundle holds none of the 22 tasks; name the unpacked eval_bundle folder")
    for task in present.values():
        input_error(task.check, max_per_task)
    # With a limit all tasks share a few full batches; without one, their prompts would fill the memory.
    for job in [present] if max_per_task else [{name: task} for name, task in present.items()]:
        output = run_lm_eval(lm, job, max_per_task, chat=False, log_samples=False)
        long_prompts += sum(lm.gather_object(sum(task.num_long for task in job.values())))
        for name, task in job.items() if output else ():
            label, numbers = name.removeprefix(f"{GROUP}_"), output["results"][name]
            acc, n = numbers["acc,none"], numbers["sample_len"]
            stderr = (acc * (1 - acc) / max(n - 1, 1)) ** 0.5
            results[label] = {"value": acc, "stderr": stderr, "n": n, "baseline": task.baseline}
            log(f"[eval]   {label:34} {acc:.4f} (centered {numbers['centered,none']:+.4f}), n {n}")
    if not results:
        return None
    missing = [name.removeprefix(f"{GROUP}_") for name in tasks if name not in present]
    seconds = {"seconds": time.time() - start, "model_seconds": lm.model_seconds - model_seconds}
    facts = {"missing": missing, "limit": max_per_task, "long_prompts": long_prompts, **seconds}
    return centered_mean(results, "CORE", NUM_CORE) | facts


def centered(accuracy: float, baseline: float) -> float:
    """Accuracy rescaled so that the random baseline gives 0 and perfection 1."""
    return (accuracy - baseline) / (1 - baseline)


def centered_mean(results: dict[str, dict], name: str, num_tasks: int, part: str = "tasks") -> dict | None:
    """The plain mean of centered accuracies of {label: {"value", "stderr", "n", "baseline"}}; None without any.

    It is labelled `name` only if all `num_tasks` are in it, else for example "18/22 tasks". A task whose random
    baseline is 1 (all its questions here have the same answer) says nothing and is left out.
    """
    certain = [label for label, result in results.items() if (result.get("baseline") or 0) >= 1]
    if certain:
        why = "all its questions have the same answer, so the random baseline is always right"
        partial_state().print(f"[eval] {name} leaves out {', '.join(certain)}: {why}")
    per_task = {}
    for label in [label for label in results if label not in certain]:
        result, baseline = results[label], results[label].get("baseline") or 0.0
        stderr = result["stderr"] / (1 - baseline) if result.get("stderr") is not None else None
        values = {"acc": result["value"], "centered": centered(result["value"], baseline)}
        per_task[label] = {**values, "stderr": stderr, "n": result["n"]}
    if not per_task:
        return None
    errors, tasks = [row["stderr"] for row in per_task.values()], f"{len(per_task)}/{num_tasks}"
    return {
        "value": sum(row["centered"] for row in per_task.values()) / len(per_task),
        "stderr": None if None in errors else sum(error**2 for error in errors) ** 0.5 / len(errors),
        "label": name if len(per_task) == num_tasks else f"{tasks} {part}",
        "tasks": tasks,
        "per_task": per_task,
    }


def run_lm_eval(lm, tasks: dict, limit: int | None, chat: bool, log_samples: bool) -> dict | None:
    for task in tasks.values():
        if hasattr(task, "use"):  # those of evals/tasks/core.py, which tokenize by themselves
            task.use(lm.tokenizer, lm.model.config)
    lm.is_chat = chat
    return input_error(
        evaluator.evaluate,
        lm=lm,
        task_dict={"tasks": tasks, "groups": {}},
        limit=limit,
        bootstrap_iters=0,
        log_samples=log_samples,
        apply_chat_template=chat,
        confirm_run_unsafe_code=True,  # our only unsafe task runs its code in the sandbox
    )


def load_tasks(manager: TaskManager, names: list[str]) -> dict:
    """Name -> task, with its rows. Raises InputError: no network, no such dataset, a wrong YAML."""
    try:
        tasks = input_error(manager.load, names)["tasks"]
    except InputError:
        raise
    except Exception as error:  # of datasets and of a task's own code: no common type
        raise InputError(f"{', '.join(names)} of lm-eval cannot be loaded: {in_a_line(error)}") from error
    for task in tasks.values():
        task.set_fewshot_seed(1234)
        task.config.num_fewshot = task.config.num_fewshot or 0
    return tasks


def input_error(function, *args, **kwargs):
    """Calls the function; a ValueError of a task, which does not import this package's errors, becomes InputError."""
    try:
        return function(*args, **kwargs)
    except InputError:
        raise
    except ValueError as error:
        raise InputError(in_a_line(error)) from error


def find_file(folders: str | list[str | None] | None, *names: str) -> Path | None:
    """The first of these files in the first of the folders that has one: rows of a task that are on this disk."""
    folders = [folders] if isinstance(folders, str) else folders or []
    return next(filter(Path.is_file, (Path(folder) / name for folder in folders if folder for name in names)), None)


class DamagedFile(ValueError):
    """A file that is there and cannot be used, unlike one that is missing."""


def numbered_lines(path: Path) -> list[tuple[int, bytes]]:
    """(number from 1, bytes) of the lines that are not blank. Raises DamagedFile if there is none."""
    lines = [(number, line) for number, line in enumerate(path.read_bytes().split(b"\n"), 1) if line.strip()]
    if not lines:
        raise DamagedFile(f"{path} is empty: put the complete file there")
    return lines


def decode(path: Path, number: int, line: bytes) -> str:
    try:
        return line.decode("utf-8-sig").rstrip("\r")
    except UnicodeDecodeError as error:
        raise damaged(path, number, f"no UTF-8 at byte {error.start + 1}") from None


def parse_row(path: Path, number: int, line: bytes, fields: dict[str, type | tuple[type, ...]]) -> dict:
    """The row of one line; `fields` names what it must have, and of which type."""
    try:
        row = json.loads(decode(path, number, line))
        json.dumps(row, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise damaged(path, number, f"no JSON: {error.msg} at column {error.colno}") from None
    except UnicodeEncodeError:
        raise damaged(path, number, "half of a surrogate pair") from None
    except RecursionError:
        raise damaged(path, number, "nested too deeply") from None
    if not isinstance(row, dict):
        raise damaged(path, number, "no JSON object")
    for name, kind in fields.items():
        if name not in row:
            raise damaged(path, number, f"no field {name!r}")
        if not isinstance(row[name], kind) or isinstance(row[name], bool):
            raise damaged(path, number, f"{name!r} is {json.dumps(row[name])[:40]}")
    return row


def damaged(path: Path, number: int, reason: str) -> DamagedFile:
    return DamagedFile(f"{path}, line {number}: {reason}; repair that line or take the complete file")


def read_jsonl(path: Path, fields: dict[str, type | tuple[type, ...]]) -> list[dict]:
    return [parse_row(path, number, line, fields) for number, line in numbered_lines(path)]


@contextmanager
def quiet() -> Iterator[None]:
    """Without the notes and progress bars of lm-eval: our log has a line per task."""
    logger, tqdm = logging.getLogger("lm_eval"), lm_eval.api.task.tqdm
    level = logger.level
    logger.setLevel(logging.ERROR)
    lm_eval.api.task.tqdm = lambda rows, **_: rows
    try:
        yield
    finally:
        logger.setLevel(level)
        lm_eval.api.task.tqdm = tqdm
