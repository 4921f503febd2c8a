"""The model card: every measured result as metadata that the Hub reads, and the facts of the run as text.

`render_model_card(run, options)` fills model_card_template.md from the metrics.json files alone, with the parts of the
report; `collection_table` is the text of a Hub collection. The tests run the code that the card shows.
"""

import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..data.documents import local_path
from ..errors import InputError
from ..eval.report import MODEL_STAGES, TITLES, collect, duration, grid, markdown, metrics_by_stage, show
from ..run import Run, load_json

DATA_FILES = (".jsonl", ".parquet", ".txt", ".yaml")
TEMPLATE = Path(__file__).with_name("model_card_template.md")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass
class Push:
    """What to push where (see push.py), and what no run records about its model; the fields are the command line's."""

    repo: str
    stage: str | None = None  # the newest that is finished
    private: bool = False
    space: bool = False
    dry_run: bool = False
    revision: str | None = None
    force: bool = False
    model_code: Literal["package", "folder"] | None = None  # for a folder whose model code is not this version's
    license: str = "mit"
    language: Sequence[str] = ("en",)  # ISO codes
    base_model: str | None = None  # Hub id of the model that this one continues
    engines: Sequence[str] = ()  # of export/, whose files go beside the weights


def render_model_card(run: Run, options: Push, uses: Sequence[str] = ()) -> ModelCard:
    """The card of `options.stage`: measured results as metadata, facts as text; `uses`: commands of other engines."""
    stage, name = options.stage, options.repo.split("/")[-1]
    facts = report_facts(run, stage)
    facts |= {key: facts["stages"].get(stage, {}).get(key) for key in ("hardware", "versions")}
    results = metrics_by_stage(facts["table"], errors=True) or "No evaluation was run."
    sources = datasets(facts)
    data = ModelCardData(
        license=options.license, language=list(options.language), base_model=options.base_model, model_name=name,
        library_name="transformers", pipeline_tag="text-generation",
        tags=["nanochat", "nanochat-hf", stage, *options.engines],
        datasets=list(filter(HUB_ID.fullmatch, sources)) or None, eval_results=eval_results(facts, stage) or None,
    )  # fmt: skip
    texts = {"name": name, "repo": options.repo, "stage": stage, "title": TITLES[stage], "command": facts["command"]}
    texts["uses"] = uses
    texts["headline"] = markdown(facts, macro="headline").strip()
    texts["results"] = "\n\n".join([results, *(f"Note: {note}." for note in facts["notes"])])
    parts = ("stages", *["cost"] * (facts["cost"] is not None), "environment")
    texts["training"] = "".join(markdown(facts, macro=part) for part in parts).rstrip()
    texts["sources"] = ", ".join(f"`{d}`" for d in sources) or "not recorded"
    return ModelCard.from_template(data, template_path=str(TEMPLATE), **texts)


def report_facts(run: Run, last: str | None = None) -> dict:
    """The facts of the run's report up to stage `last`, at the last report's hourly rate, without local paths."""
    rate = (load_json(run.path / "report.json") or {}).get("hourly_rate")
    if not isinstance(rate, int | float | None):
        raise InputError(f"{run.path / 'report.json'}: hourly_rate is no number; run stage report again")
    return without_local_paths(run, collect(run, rate, last))


def without_local_paths(run: Run, value):
    """`value` with names in the place of the paths of data and models that the run's metrics.json files mention."""
    records = [run.metrics(stage) or {} for stage in (*TITLES, "eval")]
    mentions: list[str] = []
    mapped([[record.get(key) for key in ("config", "mixture", "models")] for record in records], mentions.append)
    # Also without `:transform`, which follows the path in the name of a mixture's part.
    paths = filter(is_local_path, {*mentions, *(text.partition(":")[0] for text in mentions)})
    names = [(path, re.split(r"[/\\]", path.rstrip("/\\"))[-1]) for path in sorted(paths, key=len, reverse=True)]

    def shortened(text: str) -> str:
        for path, name in names:  # in a command as JSON has it
            text = text.replace(path, name).replace(json.dumps(path, ensure_ascii=False)[1:-1], name)
        return text

    return mapped(value, shortened)


def mapped(value, change: Callable[[str], str]):
    """A value of JSON with all its strings and keys changed."""
    if isinstance(value, dict):
        return {mapped(key, change): mapped(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [mapped(item, change) for item in value]
    return change(value) if isinstance(value, str) else value


def is_local_path(text: str) -> bool:
    text = re.sub(r"^((\w+::)*file:(//localhost)?|(\w+::?)+(?!//\w))", "", text)  # a protocol or drive, but no URL's
    text = text.replace("\\", "/")
    if "/" not in text.rstrip("/"):
        return False
    return text.startswith(("/", "~", ".", "$")) or text.endswith(DATA_FILES) or os.path.exists(local_path(text))


def datasets(facts: dict) -> list[str]:
    """Names of what the model was trained on: Hub ids, names of local files and folders, `primer`."""
    names = []
    for metrics in (facts["stages"][name] for name in MODEL_STAGES if name in facts["stages"]):
        recipe = (metrics.get("config") or {}).get("dataset")
        entries = recipe if isinstance(recipe, list) else [{"dataset": recipe}]
        names += [entry.get("dataset") for entry in [*entries, *(metrics.get("mixture") or [])]]
    names = [re.split(r"[:@\s]", name)[0] for name in names if isinstance(name, str)]
    return list(dict.fromkeys(filter(None, names)))


def eval_results(facts: dict, stage: str) -> list[EvalResult]:
    """Every result of this stage as the Hub's model-index has it. Raises InputError for a result that is NaN."""
    cells = {metric: named[stage] for metric, named in facts["table"].items() if stage in named}
    for mean in ("core", "chatcore", "kocore"):
        tasks = facts["evaluation"][mean].get(stage, {}).get("per_task", {})
        cells |= {f"{label} ({mean})": {"value": task["acc"]} for label, task in tasks.items()}
    results = []
    for metric, cell in cells.items():
        if cell["value"] is None:
            raise InputError(f"the result of {metric} is no number: run the evaluation again")
        kind = "bits_per_byte" if "bpb" in metric else "centered_accuracy" if "tasks" in cell else "accuracy"
        slug = re.sub(r"[^a-z0-9]+", "-", metric.lower()).strip("-")
        names = {"task_name": "Text Generation", "metric_name": kind.replace("_", " ")}
        results.append(EvalResult("text-generation", slug, metric, kind, round(float(cell["value"]), 6), **names))
    return results


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
        rows.append([link, *(show(number) for number in numbers), duration(facts["total_seconds"]), cost])
    return grid(["Model", "Depth", "Parameters", "Tokens", "val bpb", "CORE", "ChatCORE", "Time", "Cost"], rows)
