"""CORE: the 22 tasks of evals/tasks run as one job, and what their mean may be called.

    evaluate_core(LocalLM(model, tokenizer, config), task_manager, limit=100)["value"]

evals/tasks/core.py defines the tasks, score.py scores them fast; this file puts the two together and holds what every
use of lm-eval's evaluator here needs.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import datasets
import lm_eval.api.task
import transformers
from lm_eval import evaluator
from lm_eval.tasks import TaskManager

from ..distributed import partial_state
from ..errors import InputError

GROUP = "nanochat_core"
NUM_CORE = 22


def evaluate_core(lm, manager: TaskManager, limit: int | None = None, log: Callable = print) -> dict | None:
    """CORE of a model, or the mean over those of its tasks that the bundle has; the label says which.

    Args:
        lm: a `LocalLM`.
        limit: examples per task, drawn as the definition says; None for all.
        log: called with a line for each task.

    Returns:
        {"value", "stderr", "label", "tasks", "missing", "limit", "long_prompts", "seconds", "model_seconds",
        "per_task": {label: {"acc", "centered", "stderr", "n"}}} on the first rank, None elsewhere.

    Raises:
        InputError: no bundle, one with none of the tasks, a damaged line.
    """
    start, before, per_task, long_prompts = time.time(), lm.model_seconds, {}, 0
    tasks = load_tasks(manager, [GROUP])
    found = {name: task for name, task in tasks.items() if input_error(lambda task: task.file.is_file(), task)}
    if not found:
        raise InputError("the CORE bundle holds none of the 22 tasks; name the unpacked eval_bundle folder")
    for task in found.values():
        input_error(task.check, limit)
    # With a limit all tasks share batches, few and full ones; without, their prompts would fill the memory.
    for job in [found] if limit else [{name: task} for name, task in found.items()]:
        answers = run_lm_eval(lm, job, limit, chat=False, log_samples=False)
        long_prompts += sum(lm.gather_object(sum(task.num_long for task in job.values())))
        for name, task in job.items() if answers else ():
            numbers, share = answers["results"][name], 1 - task.metadata["baseline"] / 100
            acc, count = numbers["acc,none"], numbers["sample_len"]
            error = (acc * (1 - acc) / max(count - 1, 1)) ** 0.5
            row = {"acc": acc, "centered": numbers["centered,none"], "stderr": error / share, "n": count}
            per_task[name.removeprefix(f"{GROUP}_")] = row
            log(f"[eval]   {name.removeprefix(f'{GROUP}_'):34} {acc:.4f} (centered {row['centered']:+.4f}), n {count}")
    if not per_task:
        return None
    result = centered_mean({k: {**v, "value": v["acc"]} for k, v in per_task.items()}, "CORE", NUM_CORE)
    missing = [name.removeprefix(f"{GROUP}_") for name in tasks if name not in found]
    seconds = {"seconds": time.time() - start, "model_seconds": lm.model_seconds - before}
    return result | {"missing": missing, "limit": limit, "long_prompts": long_prompts, **seconds, "per_task": per_task}


def centered_mean(results: dict[str, dict], name: str, complete: int, part: str = "tasks") -> dict | None:
    """The mean of centered accuracies; labelled `name` only if all `complete` tasks are in it, else "18/22 tasks".

    A task in which guessing is always right (its questions here have one answer) says nothing and is left out; None if
    no task is left.
    """
    per_task, left_out = {}, []
    for label, found in results.items():
        baseline = found.get("baseline") or 0.0
        if baseline >= 1:
            left_out.append(label)
            continue
        centered = found.get("centered", (found["value"] - baseline) / (1 - baseline))
        error = found["stderr"] / (1 - baseline) if found.get("stderr") is not None else None
        per_task[label] = {"acc": found["value"], "centered": centered, "stderr": error, "n": found["n"]}
    if left_out:
        what = f"{', '.join(left_out)}: all its questions have the same answer, so guessing is always right"
        partial_state().print(f"[eval] {name} goes without {what}")
    if not per_task:
        return None
    errors = [row["stderr"] for row in per_task.values()]
    tasks = f"{len(per_task)}/{complete}"
    return {
        "value": sum(row["centered"] for row in per_task.values()) / len(per_task),
        "stderr": None if None in errors else sum(error**2 for error in errors) ** 0.5 / len(errors),
        "label": name if len(per_task) == complete else f"{tasks} {part}",
        "tasks": tasks,
        "per_task": per_task,
    }


def run_lm_eval(lm, tasks: dict, limit: int | None, chat: bool, log_samples: bool) -> dict | None:
    for task in tasks.values():
        if hasattr(task, "use"):  # those of evals/tasks/core.py, which tokenise by themselves
            task.use(lm.tokenizer, lm.model.config)
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
    found = input_error(manager.load, names)["tasks"]
    for task in found.values():
        task.set_fewshot_seed(1234)
        if task.config.num_fewshot is None:
            task.config.num_fewshot = 0
    return found


def input_error(function, *args, **kwargs):
    """Tasks know nothing of this package: what they raise as ValueError is the user's to read."""
    try:
        return function(*args, **kwargs)
    except InputError:
        raise
    except ValueError as error:
        raise InputError(" ".join(str(error).split())) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Without lm-eval's and datasets' own notes and bars: a line for each task says enough."""
    logger, bar = logging.getLogger("lm_eval"), lm_eval.api.task.tqdm
    level, bars = logger.level, datasets.are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    lm_eval.api.task.tqdm = lambda rows, **_: rows
    datasets.disable_progress_bars()
    weights = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        logger.setLevel(level)
        lm_eval.api.task.tqdm = bar
        if not bars:
            datasets.enable_progress_bars()
        if weights:
            transformers.utils.logging.enable_progress_bar()
