"""Which weights a result belongs to, and whether weights are finite.

outdated(Run("runs/d12"), metrics)      # {"sft": "has other weights now", "rl": ""}
"""

from functools import lru_cache
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.utils.hub import cached_file, extract_commit_hash

from ..errors import InputError
from ..run import MODEL_STAGES, Run, first_non_finite, model_fingerprint


def model_id(model: str | Path) -> str | None:
    """A folder's fingerprint or a Hub id's commit; None for a folder without safetensors and for an unknown id."""
    if Path(model).is_dir():
        return _fingerprint(str(model), _stamp(model))
    try:
        return extract_commit_hash(cached_file(str(model), "config.json"), None)
    except (OSError, ValueError):
        return None  # loading it reports the reason


def refuse_non_finite(folder: str | Path) -> None:
    """Raise InputError if a safetensors file of `folder` holds NaN or infinity, or cannot be read."""
    for path in sorted(Path(folder).glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                name = first_non_finite((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path} cannot be read ({' '.join(str(error).split())[:120]})") from None
        if name:
            raise InputError(f"{folder}: the weights are not finite (NaN or infinity in {name} of {path.name})")


def _stamp(folder: str | Path) -> tuple:
    """Changes whenever a file that `model_fingerprint` reads does."""
    files = [path for pattern in ("*.safetensors", "*.json", "*.jinja") for path in sorted(Path(folder).glob(pattern))]
    stats = [(path.name, path.stat()) for path in files if path.exists()]  # not of a broken link
    return tuple((name, stat.st_size, stat.st_mtime_ns, stat.st_ino) for name, stat in stats)


@lru_cache(maxsize=64)
def _fingerprint(folder: str, stamp: tuple) -> str | None:
    return model_fingerprint(folder)


REPLACED = "the weights are not those that its metrics.json describes"


def replaced(run: Run, stage: str) -> bool:
    """Whether the weights in a stage's folder differ from those that its metrics.json describes."""
    recorded, current = (run.metrics(stage) or {}).get("weights"), model_id(run.folder(stage))
    return None not in (recorded, current) and recorded != current


def outdated(run: Run, evaluation: dict) -> dict[str, str]:
    """Each stage in `evaluation`, that of eval/metrics.json -> why its results are not of today's model, or ""."""
    weights, reasons = evaluation.get("weights") or {}, {}
    for stage, model in (evaluation.get("models") or {}).items():
        metrics, recorded, reasons[stage] = run.metrics(stage) or {}, weights.get(stage), ""
        if model != stage:
            reasons[stage] = f"{model} was measured in its place" if metrics.get("finished") else ""
        elif not metrics.get("finished"):
            reasons[stage] = "no finished stage of this run"
        elif recorded and (model_id(run.folder(stage)) or metrics.get("weights")) not in (None, recorded):
            reasons[stage] = "has other weights now"
    return reasons


def origin(run: Run, stage: str, source: str | Path) -> str:
    """The log line that says which model a stage starts from, and which unfinished stages it passes over."""
    before = MODEL_STAGES[: MODEL_STAGES.index(stage)]
    own = next((name for name in before if run.folder(name) == Path(source)), None)
    after = before[before.index(own) + 1 :] if own else ()
    unfinished = [name for name in after if run.folder(name).exists() and not run.finished(name)]
    passed_over = f"; {' and '.join(unfinished)} in {run.path}, not finished, is passed over" if unfinished else ""
    return f"[{stage}] starts from {source}{passed_over}"


def renewal(run: Run, definition: str | None = None) -> str:
    """What a finished evaluation must be run again for: stages that changed, came or went, or all; "" for nothing.

    `definition` is today's `harness.definition_of`; None not to compare it.
    """
    evaluation = run.metrics("eval") or {}
    if not evaluation.get("finished"):
        return ""
    measured = outdated(run, evaluation)
    reasons = {stage: reason for stage, reason in measured.items() if reason}
    reasons |= {stage: "not measured yet" for stage in MODEL_STAGES if run.finished(stage) and stage not in measured}
    if definition and evaluation.get("definition") not in (None, definition):
        reasons = {"all stages": "its config, tasks, code or data changed"} | reasons
    return ", ".join(f"{stage} ({reason})" for stage, reason in reasons.items())
