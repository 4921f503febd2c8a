"""The report card of a run: report.md with plots, report.json, and report.html as one file, from metrics.json files.

    python scripts/make_report.py --run-dir runs/d12 [--hourly-rate 24]
    python scripts/make_report.py --compare runs/a runs/b
    python scripts/make_report.py --run-dir runs/d12 --row

Nothing is measured here and nothing is guessed: a number that no stage wrote is "-". `collect` gathers the facts (what
report.json holds, of the shape `Report`); sections.py writes them, plots.py draws them; the model card uses the same.
"""

from itertools import pairwise
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..errors import InputError
from ..run import Run, save_json, without_nan, writing
from .plots import page, plots
from .sections import MODEL_STAGES, TITLES, decimal, duration, grid, markdown, short, show
from .weights import measured, outdated, refuse_non_finite, replaced, unverified

Stage = Literal["base", "mid", "sft", "rl"]


class Result(BaseModel):
    """A number of one model; tasks may add more, such as `tool_use` and `pass@8`."""

    model_config = ConfigDict(extra="allow")
    value: float | None
    stderr: float | None = None
    n: int | None = None
    higher_is_better: bool = True


class Score(BaseModel):
    """One task of a mean."""

    acc: float | None
    centered: float | None
    stderr: float | None
    n: int


class Mean(Result):
    """CORE, ChatCORE or KoCORE; `label` says how much of it ("18/22 tasks")."""

    label: str
    per_task: dict[str, Score]


class Evaluation(BaseModel):
    results: dict[Stage, dict[str, Result]]
    core: dict[Stage, Mean]
    chatcore: dict[Stage, Mean]
    kocore: dict[Stage, Mean]
    examples: dict[Stage, list[dict]]
    bytes_per_token: dict[str, dict[str, float | None]]


class Report(BaseModel):
    """The shape of report.json, version 1; `stages` holds the metrics.json files as they are."""

    version: Literal[1] = Field(alias="schema")
    run: str
    notes: list[str]
    commits: list[str]
    hardware: dict | None
    versions: dict[str, str | None] | None
    seconds: dict[str, float | None]
    total_seconds: float
    hourly_rate: float | None
    cost: float | None
    bloat: dict[str, int] | None
    stages: dict[str, dict]
    evaluation: Evaluation
    table: dict[str, dict[Stage, Result]]


def make_report(run_path: str | Path, hourly_rate: float | None = None) -> Path:
    """Write report.md, report.json, report.html and plots/ into the run folder; returns the path of report.md.

    Args:
        hourly_rate: price of the whole machine in dollars an hour, for the cost.

    Raises:
        InputError: the folder has no finished stage, or weights that are not finite.
    """
    path = Path(run_path)
    facts = collect(Run(path), hourly_rate)
    validate(facts)
    with writing(path / "plots"):
        text = markdown(facts, plots(facts, path / "plots"))
    save_json(path / "report.json", facts)
    for name, content in (("report.html", page(text, path)), ("report.md", text)):
        with writing(path / name):
            (path / name).write_text(content, encoding="utf-8")
    return path / "report.md"


def collect(run: Run, hourly_rate: float | None = None) -> dict:
    """Everything the report says, as plain values: what report.json holds.

    Results of other weights than the run folder's are left out, and "notes" says so. Raises InputError for a folder
    without a finished stage, and for weights that are not finite.
    """
    found = {stage: without_nan(run.metrics(stage)) for stage in (*TITLES, "eval")}
    stages = {stage: metrics for stage, metrics in found.items() if metrics and metrics.get("finished")}
    if not stages:
        raise InputError(f"{run.path} holds no finished stage to report on")
    for stage in MODEL_STAGES:
        if stage in stages:
            refuse_non_finite(run.folder(stage))
    seconds = {stage: metrics.get("wall_time_s") for stage, metrics in stages.items()}
    total = sum(value for value in seconds.values() if value)
    last = max(stages.values(), key=lambda metrics: metrics.get("started") or 0)
    notes, evaluation = current(run, stages)
    shown = {name: stages[name] for name in stages if name != "eval" and not replaced(run, name)}
    return {
        "schema": 1,
        "run": run.path.resolve().name,
        "notes": notes,
        "commits": sorted({describe(m) for m in stages.values()}),
        "hardware": last.get("hardware"),
        "versions": last.get("versions"),
        "seconds": seconds,
        "total_seconds": total,
        "hourly_rate": hourly_rate,
        "cost": hourly_rate * total / 3600 if hourly_rate is not None else None,
        "bloat": stages.get("eval", {}).get("bloat"),
        "stages": shown,
        "evaluation": evaluation,
        "table": table(shown, evaluation),
    }


def current(run: Run, stages: dict) -> tuple[list[str], dict]:
    """Notes on what is left out or not certain, and the evaluation without results of other weights.

    Args:
        stages: the metrics.json of each finished stage.
    """
    record, notes = stages.get("eval", {}), []
    old, unknown, models = outdated(run, record), unverified(run, record), measured(record)
    if old:
        why = ", ".join(f"{stage} ({reason})" for stage, reason in old.items())
        notes.append(f"the evaluation is older than the models, its results are left out for {why}; run it again")
    if unknown:
        notes.append(f"not verified: the evaluation does not say which weights of {', '.join(unknown)} it measured")
    notes += [f"{stage} is {model}" for stage, model in models.items() if model and stage not in old]
    names = [name for name in stages if name in TITLES]
    notes += [
        f"the weights of {name} are not those that its metrics.json describes, so its numbers are left out; "
        "train it again, or restore them"
        for name in names
        if replaced(run, name)
    ]
    notes += [note for before, after in pairwise(names) if (note := broken_link(before, after, stages))]
    evaluation = {
        key: {stage: value for stage, value in (record.get(key) or {}).items() if stage not in old}
        for key in ("results", "core", "chatcore", "kocore", "examples")
    }
    whole = not old or next(iter(models)) not in old  # the tokenizer is that of the first model
    return notes, evaluation | {"bytes_per_token": (record.get("bytes_per_token") or {}) if whole else {}}


def broken_link(before: str, after: str, stages: dict) -> str | None:
    """What to note when a stage was not trained from the one before it: by the weights, or else by the times."""
    weights, source = stages[before].get("weights"), (stages[after].get("inputs") or {}).get("model")
    if before in MODEL_STAGES and weights and source:
        return f"{after} was trained from another model than today's {before}" if source != weights else None
    if (stages[before].get("started") or 0) > (stages[after].get("started") or 0):
        return f"{after} was trained before today's {before}, so not from it"
    return None


def describe(metrics: dict) -> str:
    commit = metrics.get("commit")
    return "unknown" if not commit else commit + (" (with local changes)" if metrics.get("dirty") else "")


def table(stages: dict, evaluation: dict) -> dict[str, dict[str, dict]]:
    """metric -> stage -> {"value", "stderr", ...}, in the order of the report's last table."""
    rows: dict[str, dict[str, dict]] = {}

    def put(name: str, stage: str, result: dict) -> None:
        rows.setdefault(name, {})[stage] = {key: value for key, value in result.items() if key != "per_task"}

    results = {stage: dict(found) for stage, found in (evaluation.get("results") or {}).items()}
    if not any("val_bpb" in found for found in results.values()) and stages.get("base", {}).get("val_bpb") is not None:
        value = {"value": stages["base"]["val_bpb"], "stderr": None, "higher_is_better": False}
        results.setdefault("base", {})["val_bpb"] = value
    for stage in MODEL_STAGES:
        if "val_bpb" in results.get(stage, {}):
            put("val bpb", stage, results[stage].pop("val_bpb"))
    for kind, others in (("core", results), ("chatcore", {}), ("kocore", {})):
        for stage, result in (evaluation.get(kind) or {}).items():
            limit = f", {result['limit']} examples each" if result.get("limit") else ""
            put(result["label"] + limit, stage, {**result, "higher_is_better": True})
        for stage in MODEL_STAGES:
            for name, result in others.get(stage, {}).items():
                put(name, stage, result)
    return rows


def validate(facts: dict) -> None:
    """Raise InputError where report.json would not have the shape that its readers rely on: `Report`."""
    try:
        Report.model_validate(facts, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise InputError(f"a metrics.json of {facts['run']} is damaged: {place}: {first['msg']}") from None


def results_row(facts: dict, report: str = "-") -> str:
    """The run's row of evals/RESULTS.md: recipe, commit, machine, wall time, tokens, val bpb, CORE, ChatCORE, report.

    CORE and ChatCORE stand there when all of their tasks were measured, of the last stage that has them; a limit on
    the examples of a task is named. The same facts always give the same row.

    Args:
        facts: what `collect` returns.
        report: what to write in the last column, for example a link.
    """
    hardware = facts["hardware"] or {}
    cores, count = hardware.get("cpu_cores"), hardware.get("num_processes", 1)
    machine = f"{count} x {hardware['device']}" if hardware.get("device") else "-"
    if hardware.get("device_type") == "cpu" and cores:
        machine = f"{cores} CPU cores"
    tokens = facts["stages"].get("base", {}).get("total_tokens")

    def last(metric: str) -> str:
        for name, cells in facts["table"].items():
            label, _, limit = name.partition(", ")
            if label == metric:
                value = cells[[stage for stage in MODEL_STAGES if stage in cells][-1]]["value"]
                return decimal(value) + (f" ({limit})" if limit else "")
        return "-"

    bpb = facts["table"].get("val bpb", {}).get("base")
    cells = [facts["run"], ", ".join(facts["commits"]), machine, duration(facts["total_seconds"])]
    cells += [short(tokens), decimal((bpb or {}).get("value")), last("CORE"), last("ChatCORE"), report]
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def compare(first: str | Path, second: str | Path) -> str:
    """Two runs side by side as Markdown: values, difference, and the standard error of the difference."""
    one, two = collect(Run(first)), collect(Run(second))
    rows = []
    for name in dict.fromkeys([*one["table"], *two["table"]]):
        for stage in MODEL_STAGES:
            a, b = one["table"].get(name, {}).get(stage), two["table"].get(name, {}).get(stage)
            if not a and not b:
                continue
            cells, difference = [show("", (cell or {}).get("value")) for cell in (a, b)], "-"
            if None not in ((a or {}).get("value"), (b or {}).get("value")):
                difference = f"{b['value'] - a['value']:+.4f}"
                errors = [cell.get("stderr") for cell in (a, b)]
                if None not in errors:
                    difference += f" ± {(errors[0] ** 2 + errors[1] ** 2) ** 0.5:.4f}"
            rows.append([name, stage.upper(), *cells, difference])
    rows.append(["total wall time", "", duration(one["total_seconds"]), duration(two["total_seconds"]), "-"])
    rows[-1][-1] = f"{(two['total_seconds'] - one['total_seconds']) / 60:+.1f} min"
    names = [one["run"], two["run"]] if one["run"] != two["run"] else [str(first), str(second)]
    notes = [f"{name}: {note}" for name, facts in zip(names, (one, two)) for note in facts["notes"]]
    return "\n\n".join([grid(["Metric", "Stage", *names, "Difference"], rows), *notes]) + "\n"
