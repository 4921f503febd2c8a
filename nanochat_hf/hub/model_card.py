"""The model card: every measured result as metadata that the Hub reads, and the facts of the run as text.

`render_model_card(run, options)` fills model_card_template.md from the metrics.json files alone, with the parts of the
report; `collection_table` is the text of a Hub collection. The tests run the code that the card shows.
"""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..data.documents import local_path
from ..errors import InputError
from ..eval.report import MODEL_STAGES, TITLES, collect, duration, grid, machine_and_cost, metrics_by_stage, show
from ..run import Run, load_json

DATA_FILES = (".jsonl", ".parquet", ".txt", ".yaml")
TEMPLATE = Path(__file__).with_name("model_card_template.md")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass
class Push:
    """What to push where (see push.py), and what no run records about its model; the fields are the command line's."""

    repo: str
    stage: str = "sft"
    private: bool = False
    space: bool = False
    dry_run: bool = False
    revision: str | None = None
    force: bool = False
    model_code: Literal["package", "folder"] | None = None  # for a folder whose model code is not this version's
    license: str = "mit"
    language: tuple[str, ...] = ("en",)  # ISO codes
    base_model: str | None = None  # Hub id of the model that this one continues


def render_model_card(run: Run, options: Push) -> ModelCard:
    """Returns the card of `options.stage`: metadata with its measured results, and the facts of the run as text."""
    facts, stage, name = report_facts(run), options.stage, options.repo.split("/")[-1]
    results = metrics_by_stage(facts["table"], chain(facts, stage)) or "No evaluation was run."
    sources = datasets(facts, stage)
    data = ModelCardData(
        license=options.license,
        language=list(options.language),
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["nanochat", "nanochat-hf", stage],
        datasets=list(filter(HUB_ID.fullmatch, sources)) or None,
        base_model=options.base_model,
        model_name=name,
        eval_results=eval_results(facts, stage) or None,
    )
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        name=name,
        repo=options.repo,
        stage=stage,
        title=TITLES[stage],
        results="\n\n".join([results, *(f"Note: {note}." for note in facts["notes"])]),
        training=training_table(facts, stage),
        sources=", ".join(f"`{d}`" for d in sources) or "not recorded",
    )


def report_facts(run: Run) -> dict:
    """The facts of the run's report, at the hourly rate of the last report, without paths of this machine."""
    rate = (load_json(run.path / "report.json") or {}).get("hourly_rate")
    return without_local_paths(run, collect(run, rate))


def without_local_paths(run: Run, value):
    """`value` with names in the place of the paths of data and models that the run's metrics.json files mention."""
    records = [run.metrics(stage) or {} for stage in (*TITLES, "eval")]
    mentions = [[record.get(key) for key in ("config", "mixture", "models")] for record in records]
    strings = re.findall(r'"((?:[^"\\]|\\.)*)"', json.dumps(mentions, ensure_ascii=False))
    # Also without `:transform`, which follows the path in the name of a mixture's part.
    texts, value = {*strings, *(text.partition(":")[0] for text in strings)}, json.dumps(value, ensure_ascii=False)
    for text in sorted(texts, key=len, reverse=True):
        if is_local_path(text):
            value = value.replace(text, text.rstrip("/").rpartition("/")[2])
    return json.loads(value)


def is_local_path(text: str) -> bool:
    if "/" not in text.rstrip("/"):
        return False
    return text.startswith(("/", "~", ".")) or text.endswith(DATA_FILES) or os.path.exists(local_path(text))


def chain(facts: dict, stage: str) -> list[str]:
    """The stages that produced this model, in order, this one last."""
    return [s for s in MODEL_STAGES[: MODEL_STAGES.index(stage) + 1] if s in facts["stages"]]


def datasets(facts: dict, stage: str) -> list[str]:
    """Names of what the model was trained on: Hub ids, names of local files and folders, `primer`."""
    names = []
    for metrics in (facts["stages"][name] for name in chain(facts, stage)):
        recipe = (metrics.get("config") or {}).get("dataset")
        entries = recipe if isinstance(recipe, list) else [{"dataset": recipe}]
        names += [entry.get("dataset") for entry in [*entries, *(metrics.get("mixture") or [])]]
    names = [re.split(r"[:@\s]", name)[0] for name in names if isinstance(name, str)]
    return list(dict.fromkeys(filter(None, names)))


def eval_results(facts: dict, stage: str) -> list[EvalResult]:
    """Every result of this stage as the Hub's model-index has it. Raises InputError for a result that is NaN."""
    values = {metric: cells[stage]["value"] for metric, cells in facts["table"].items() if stage in cells}
    for mean in ("core", "chatcore", "kocore"):
        tasks = facts["evaluation"][mean].get(stage, {}).get("per_task", {})
        values |= {f"{label} ({mean})": task["acc"] for label, task in tasks.items()}
    results = []
    for metric, value in values.items():
        if value is None:
            raise InputError(f"the result of {metric} is no number: run the evaluation again")
        kind = "bits_per_byte" if "bpb" in metric else "centered_accuracy" if "CORE" in metric else "accuracy"
        slug = re.sub(r"[^a-z0-9]+", "-", metric.lower()).strip("-")
        names = {"task_name": "Text Generation", "metric_name": kind.replace("_", " ")}
        results.append(EvalResult("text-generation", slug, metric, kind, round(float(value), 6), **names))
    return results


def training_table(facts: dict, stage: str) -> str:
    """What was trained, for how long, on what machine and at what price."""
    base = facts["stages"].get("base", {})
    keys = {"depth": "Depth", "num_parameters": "Parameters", "total_flops": "FLOPs of pretraining"}
    rows = {label: show(key, base[key]) for key, label in keys.items() if base.get(key) is not None}
    for name in chain(facts, stage):
        metrics = facts["stages"][name]
        tokens = metrics.get("total_tokens") or metrics.get("tokens")
        rows[TITLES[name]] = (f"{tokens:,.0f} tokens, " if tokens else "") + duration(metrics.get("wall_time_s"))
    rows |= machine_and_cost(facts | {key: facts["stages"][stage].get(key) for key in ("hardware", "versions")})
    return grid(["", ""], [row for row in rows.items() if row[1] != "-"])


def collection_table(runs: dict[str, Run]) -> str:
    """The text of a Hub collection: one row per model, from the runs' own metrics; `runs` maps repo id to run."""
    rows = []
    for repo, run in runs.items():
        facts = report_facts(run)
        base = facts["stages"].get("base", {})
        metrics = {metric.split(" (")[0]: cells for metric, cells in facts["table"].items()}
        first = [next(iter(metrics.get(name, {}).values()), {}) for name in ("val bpb", "CORE", "ChatCORE")]
        numbers = [base.get(key) for key in ("depth", "num_parameters", "total_tokens")]
        numbers += [cell.get("value") for cell in first]
        cost = "-" if facts["cost"] is None else f"${facts['cost']:.0f}"
        link = f"[{repo}](https://huggingface.co/{repo})"
        rows.append([link, *(show("", number) for number in numbers), duration(facts["total_seconds"]), cost])
    return grid(["Model", "Depth", "Parameters", "Tokens", "val bpb", "CORE", "ChatCORE", "Time", "Cost"], rows)
