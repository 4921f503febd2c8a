"""Fast scoring of continuations, and CORE made of it: the same decisions as one question at a time, many times faster.

`score` takes token ids from every question of a task at once. It sorts them by length into batches of equal work, runs
the part that all choices of a question share only once (through the KV cache), computes logits only where something is
scored, and fetches the results from the device at the end, so that the device never waits for Python. Neither batch
size nor order changes a decision (up to the rounding of float32 sums).

The definition of the 22 tasks is evals/tasks/utils.py; this file knows how to run them and what to call the result.
"""

import inspect
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import datasets
import lm_eval.api.task
import numpy as np
import torch
import transformers
from lm_eval import evaluator
from lm_eval.tasks import TaskManager
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache

from ..errors import InputError

NUM_CORE = 22

MIN_SHARED = 24  # tokens that choices must have in common before a separate pass over them pays
# Without cuDNN's attention, which builds a plan for every new shape: seconds where the batch takes milliseconds.
BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
LOGIT_COST = 8  # a position with logits costs the memory of about so many positions without


@dataclass
class _Row:
    """One input of the model: `context`, then `suffix`, whose first token is the context's last."""

    context: np.ndarray
    suffix: np.ndarray
    targets: list[tuple[int, np.ndarray]]  # (number of the request, its continuation)

    @property
    def length(self) -> int:
        return len(self.context) + len(self.suffix) - 1

    @property
    def scored(self) -> int:
        return max(len(tokens) for _, tokens in self.targets)


@torch.inference_mode()
def score(
    model,
    requests: Sequence[tuple[np.ndarray, np.ndarray]],
    batch_tokens: int = 32768,
    progress: Callable | None = None,
) -> list[tuple[float, bool]]:
    """Sum of log-probabilities of each continuation, and whether each of its tokens was the argmax.

    Args:
        model: a causal LM of transformers in eval mode.
        requests: (context, continuation) token ids, both at least one token long.
        batch_tokens: positions computed together; bounds the memory.
        progress: called with the number of requests done after each batch.

    Returns:
        (sum in nats, all argmax) per request, in the order of `requests`. Sums are taken in float64.
    """
    rows: dict[tuple[bytes, bytes], _Row] = {}
    groups: dict[bytes, list[_Row]] = {}
    for number, (context, continuation) in enumerate(requests):
        context, continuation = np.asarray(context, np.int32), np.asarray(continuation, np.int32)
        key = context.tobytes()
        suffix = np.concatenate([context[-1:], continuation[:-1]])
        if (key, suffix.tobytes()) not in rows:
            row = rows[key, suffix.tobytes()] = _Row(context, suffix, [])
            groups.setdefault(key, []).append(row)
        rows[key, suffix.tobytes()].targets.append((number, continuation))

    shares = not getattr(model, "_is_stateful", False)  # recurrent states cannot step over left padding
    shared = [group for group in groups.values() if shares and len(group) > 1 and len(group[0].context) > MIN_SHARED]
    taken = {id(row) for group in shared for row in group}
    single = [row for row in rows.values() if id(row) not in taken]

    found: list[tuple[list[tuple[int, int]], torch.Tensor, torch.Tensor]] = []
    with sdpa_kernel(BACKENDS):
        for batch in _batches([[row] for row in single], batch_tokens):
            found.append(_run_single(model, [row for [row] in batch]))
            if progress:
                progress(len(found[-1][0]))
        for batch in _batches(shared, batch_tokens):
            found.append(_run_shared(model, batch))
            if progress:
                progress(len(found[-1][0]))

    answers: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
    for sizes, log_probs, hits in found:
        log_probs, hits = log_probs.double().cpu().numpy(), hits.cpu().numpy()
        begin = 0
        for number, size in sizes:
            end = begin + size
            answers[number] = float(log_probs[begin:end].sum()), bool(hits[begin:end].all())
            begin = end
    return answers


def _batches(groups: list[list[_Row]], budget: int):
    """Groups of rows in batches of similar length, longest first, each within the budget (or a single group)."""
    batch, num_rows, widest, scored = [], 0, 0, 0
    for group in sorted(groups, key=lambda group: -max(row.length for row in group)):
        num_rows += len(group)
        widest = max(widest, *(row.length for row in group))
        scored = max(scored, *(row.scored for row in group))
        if batch and num_rows * (widest + LOGIT_COST * min(num_rows * scored, widest)) > budget:
            yield batch
            batch, num_rows = [], len(group)
            widest, scored = max(row.length for row in group), max(row.scored for row in group)
        batch.append(group)
    if batch:
        yield batch


def _run_single(model, rows: list[_Row]):
    """Whole rows, padded on the right, where causal attention cannot see it: no mask, the fastest kernels."""
    ids = np.zeros((len(rows), _width(model, max(row.length for row in rows))), np.int64)
    for line, row in zip(ids, rows):
        line[: row.length] = np.concatenate([row.context, row.suffix[1:]])
    columns = [len(row.context) - 1 + np.arange(row.scored) for row in rows]
    kept = np.unique(np.concatenate(columns))
    logits = _forward(model, ids, kept, use_cache=False)
    return _read(logits, rows, [np.searchsorted(kept, column) for column in columns])


def _run_shared(model, groups: list[list[_Row]]):
    """One pass over each group's context, then one over all suffixes on a cache repeated for each of them."""
    rows = [row for group in groups for row in group]
    lengths = np.array([len(group[0].context) - 1 for group in groups])
    # On the left, so that the distance to the suffix, which windows measure, is the same with and without padding.
    ids = np.zeros((len(groups), _width(model, lengths.max())), np.int64)
    mask = np.zeros_like(ids)
    for line, filled, group, length in zip(ids, mask, groups, lengths):
        line[-length:], filled[-length:] = group[0].context[:-1], 1
    cache = DynamicCache(config=model.config)
    positions = np.maximum(mask.cumsum(-1) - 1, 0)
    last = np.array([ids.shape[1] - 1])
    _forward(model, ids, last, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)

    owner = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
    cache.reorder_cache(torch.from_numpy(owner).to(model.device))
    ids = np.zeros((len(rows), max(len(row.suffix) for row in rows)), np.int64)
    for line, row in zip(ids, rows):
        line[: len(row.suffix)] = row.suffix
    mask = np.concatenate([mask[owner], np.ones_like(ids)], axis=1)
    positions = lengths[owner][:, None] + np.arange(ids.shape[1])
    inputs = {"attention_mask": mask, "position_ids": positions, "past_key_values": cache, "use_cache": True}
    logits = _forward(model, ids, np.arange(ids.shape[1]), **inputs)
    return _read(logits, rows, [np.arange(row.scored) for row in rows])


def _width(model, length: int) -> int:
    """`length`, on a GPU rounded up where the positions allow it: few shapes, so that memory is reused."""
    rounded, limit = -(-length // 64) * 64, getattr(model.config, "max_position_embeddings", None) or length
    return int(rounded if model.device.type == "cuda" and (rounded <= limit or length > limit) else length)


def _forward(model, ids: np.ndarray, kept: np.ndarray, **arrays) -> torch.Tensor:
    """ids (B, T) -> logits (B, len(kept), vocabulary) of the columns `kept`."""

    def on_device(value):
        return torch.from_numpy(value).to(model.device, non_blocking=True) if isinstance(value, np.ndarray) else value

    inputs = {name: on_device(value) for name, value in arrays.items()}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        return model(on_device(ids), logits_to_keep=on_device(kept), **inputs).logits
    return model(on_device(ids), **inputs).logits[:, on_device(kept)]


def _read(logits: torch.Tensor, rows: list[_Row], columns: list[np.ndarray]):
    """Log-probability and argmax hit of every target token, flat, still on the device; and whose tokens they are.

    columns[i]: the columns of logits (B, K, V) that predict the continuation tokens of row i.
    """
    sizes, lines, places, tokens = [], [], [], []
    for line, (row, column) in enumerate(zip(rows, columns)):
        for number, continuation in row.targets:
            sizes.append((number, len(continuation)))
            lines.append(np.full(len(continuation), line))
            places.append(column[: len(continuation)])
            tokens.append(continuation)
    lines, places, tokens = (
        torch.from_numpy(np.concatenate(part).astype(np.int64)).to(logits.device, non_blocking=True)
        for part in (lines, places, tokens)
    )
    picked = logits[lines, places].float()  # (tokens, V)
    log_probs = torch.log_softmax(picked, dim=-1).gather(1, tokens[:, None])[:, 0]
    return sizes, log_probs, picked.argmax(dim=-1) == tokens


def evaluate_core(lm, manager: TaskManager, limit: int | None = None, log: Callable = print) -> dict | None:
    """CORE of a model, or of those of its tasks that the bundle has; the label says which.

    Returns:
        {"value", "stderr", "label", "tasks", "missing", "limit", "long_prompts", "per_task": {label: {"acc",
        "centered", "stderr", "n", "seconds"}}} on the first rank, None elsewhere.
    """
    tasks, per_task, long_prompts = load_tasks(manager, ["nanochat_core"]), {}, 0
    missing = [
        name.removeprefix("nanochat_core_")
        for name, task in tasks.items()
        if not input_error(lambda task: task.file.is_file(), task)
    ]
    for name, task in tasks.items():
        label, start = name.removeprefix("nanochat_core_"), time.time()
        if label in missing:
            continue
        task.tokenizer = lm.tokenizer
        task.max_tokens = task.position_limit(lm.model.config)
        found = run_lm_eval(lm, {name: task}, limit, chat=False, log_samples=False)
        long_prompts += task.num_long
        if found is None:
            continue
        numbers, share = found["results"][name], 1 - task.metadata["baseline"] / 100
        acc, count = numbers["acc,none"], numbers["sample_len"]
        error = (acc * (1 - acc) / max(count - 1, 1)) ** 0.5
        per_task[label] = {"acc": acc, "centered": numbers["centered,none"], "stderr": error / share, "n": count}
        per_task[label]["seconds"] = time.time() - start
        log(f"[eval]   {label:34} {acc:.4f} (centered {numbers['centered,none']:+.4f}), {count} examples")
    if not per_task:
        if missing and len(missing) == NUM_CORE:
            raise InputError("the CORE bundle holds none of the 22 tasks; name the unpacked eval_bundle folder")
        return None
    result = centered_mean({k: {**v, "value": v["acc"]} for k, v in per_task.items()}, "CORE", NUM_CORE)
    return result | {"missing": missing, "limit": limit, "long_prompts": long_prompts, "per_task": per_task}


def centered_mean(results: dict[str, dict], name: str, complete: int, part: str = "tasks") -> dict | None:
    """The mean of centered accuracies; labelled `name` only if all `complete` tasks are in it, else "18/22 tasks"."""
    if not results:
        return None
    per_task = {}
    for label, found in results.items():
        baseline = found.get("baseline") or 0.0
        centered = found.get("centered", (found["value"] - baseline) / (1 - baseline))
        error = found["stderr"] / (1 - baseline) if found.get("stderr") is not None else None
        per_task[label] = {"acc": found["value"], "centered": centered, "stderr": error, "n": found["n"]}
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
