"""Which weights a result belongs to, and whether weights are numbers at all.

model_id("runs/d12/sft")            # "3f0a.." of a folder, the commit of a Hub id; None where it cannot be known
refuse_non_finite("runs/d12/sft")   # InputError that names the first tensor with NaN or infinity
outdated(Run("runs/d12"), metrics)  # {"sft": "its weights changed"}: results that are of another model
"""

from functools import lru_cache
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils.hub import cached_file, extract_commit_hash

from ..errors import InputError
from ..run import Run, model_fingerprint
from .sections import MODEL_STAGES

CHUNK = 2**26  # values looked at together: a tensor of any size costs this much memory


def model_id(model: str | Path) -> str | None:
    """What identifies the weights that `model`, a folder or a Hub id, stands for now.

    Returns:
        A folder's fingerprint, a Hub id's commit; None for a folder without safetensors and for an unknown id.
    """
    if Path(model).is_dir():
        return _fingerprint(str(model), _stamp(model))
    try:
        return extract_commit_hash(cached_file(str(model), "config.json"), None)
    except (OSError, ValueError):
        return None  # loading it says why


def refuse_non_finite(folder: str | Path) -> None:
    """Raise InputError if a safetensors file of `folder` holds NaN or infinity, or cannot be read."""
    if broken := _non_finite(str(folder), _stamp(folder)):
        raise InputError(f"{folder}: {broken}; train that stage again, or restore its weights")


def first_non_finite(tensors) -> str | None:
    """Name of the first of (name, tensor) pairs that holds NaN or infinity."""
    return next((name for name, tensor in tensors if not _finite(tensor)), None)


def _finite(tensor: torch.Tensor) -> bool:
    if not tensor.is_floating_point():
        return True
    if tensor.element_size() == 1:  # FP8 has no isfinite
        tensor = tensor.float()
    return bool(torch.isfinite(tensor).all())


def _pieces(path: Path):
    """(name, tensor) of a safetensors file, large tensors in pieces."""
    with safe_open(path, framework="pt") as file:
        names = file.keys()
        for name in names:
            part = file.get_slice(name)
            shape = part.get_shape()
            if not shape:
                yield name, file.get_tensor(name)
                continue
            rows = max(1, CHUNK // max(prod(shape[1:]), 1))
            for begin in range(0, shape[0], rows):
                yield name, part[begin : begin + rows]


def _stamp(folder: str | Path) -> tuple:
    """Changes whenever a file that `model_fingerprint` reads does."""
    files = [path for pattern in ("*.safetensors", "*.json", "*.jinja") for path in sorted(Path(folder).glob(pattern))]
    return tuple((path.name, path.stat().st_size, path.stat().st_mtime_ns, path.stat().st_ino) for path in files)


@lru_cache(maxsize=64)
def _fingerprint(folder: str, stamp: tuple) -> str | None:
    return model_fingerprint(folder)


@lru_cache(maxsize=64)
def _non_finite(folder: str, stamp: tuple) -> str | None:
    for path in sorted(Path(folder).glob("*.safetensors")):
        try:
            name = first_non_finite(_pieces(path))
        except (SafetensorError, OSError) as error:
            return f"{path.name} cannot be read ({' '.join(str(error).split())[:120]})"
        if name:
            return f"the weights are not finite (NaN or infinity in {name} of {path.name})"
    return None


def replaced(run: Run, stage: str) -> bool:
    """Whether the weights in a stage's folder are other ones than its metrics.json describes."""
    recorded, today = (run.metrics(stage) or {}).get("weights"), model_id(run.folder(stage))
    return None not in (recorded, today) and recorded != today


def measured(evaluation: dict) -> dict[str, str | None]:
    """Stage -> the model that an evaluation measured as it; None for the stage's own folder in the run folder."""
    stages = {stage for key in ("results", "core", "chatcore", "kocore") for stage in evaluation.get(key) or {}}
    models = evaluation.get("models") or {stage: stage for stage in MODEL_STAGES if stage in stages}
    if evaluation.get("weights") is None:  # made before weights were recorded, when the stages' models were paths
        models = {stage: Path(model).name if Path(model).name == stage else model for stage, model in models.items()}
    return {stage: None if model == stage else model for stage, model in models.items()}


def outdated(run: Run, evaluation: dict) -> dict[str, str]:
    """Stages whose results in `evaluation` (eval/metrics.json) are not of the model that the run holds -> why."""
    reasons, weights = {}, evaluation.get("weights")
    for stage, elsewhere in measured(evaluation).items():
        metrics = run.metrics(stage) or {}
        if elsewhere:
            if metrics.get("finished"):
                reasons[stage] = f"{elsewhere} was measured in its place"
        elif not metrics.get("finished"):
            reasons[stage] = "no finished stage of this run"
        elif weights is None:
            if (metrics.get("started") or 0) > (evaluation.get("started") or 0):
                reasons[stage] = "trained after the evaluation"
        else:
            today = model_id(run.folder(stage)) or metrics.get("weights")
            if None not in (today, weights.get(stage)) and today != weights[stage]:
                reasons[stage] = "has other weights now"
    return reasons


def unverified(run: Run, evaluation: dict) -> list[str]:
    """Stages whose results may be of the model that the run holds, or not: it was not recorded."""
    weights, old = evaluation.get("weights") or {}, outdated(run, evaluation)
    own = [stage for stage, elsewhere in measured(evaluation).items() if not elsewhere]
    return [stage for stage in own if not weights.get(stage) and stage not in old]


def origin(run: Run, stage: str, source: str | Path) -> str:
    """The line that says which model a stage starts from, and which stages in between are passed over."""
    before = MODEL_STAGES[: MODEL_STAGES.index(stage)] if stage in MODEL_STAGES else MODEL_STAGES
    own = next((name for name in before if run.folder(name) == Path(source)), None)
    after = before[before.index(own) + 1 :] if own else ()
    half_done = [name for name in after if run.folder(name).exists() and not run.finished(name)]
    passed_over = f"; {' and '.join(half_done)} in {run.path}, not finished, is passed over" if half_done else ""
    return f"[{stage}] starts from {source}{passed_over}"


def renewal(run: Run, definition: str | None = None) -> str:
    """What a finished evaluation must be run again for: stages that changed, came or went, or all; "" for nothing.

    Args:
        definition: what `harness.definition_of` says today; None not to compare it.
    """
    evaluation = run.metrics("eval") or {}
    if not evaluation.get("finished"):
        return ""
    reasons, known = outdated(run, evaluation), measured(evaluation)
    reasons |= {stage: "not measured yet" for stage in MODEL_STAGES if run.finished(stage) and stage not in known}
    if definition and evaluation.get("definition") not in (None, definition):
        reasons = {"all stages": "its config, tasks, code or data changed"} | reasons
    return ", ".join(f"{stage} ({reason})" for stage, reason in reasons.items())
