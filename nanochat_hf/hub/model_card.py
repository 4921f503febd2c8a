"""The model card: every measured result as metadata that the Hub understands, and the facts of the run as text.

`card(run, wanted)` renders it from the metrics.json files alone, with the pieces of the report; `check_metadata`
applies the rules by which the Hub rejects a card. `hub.push` uses both, and the tests run the code that it shows.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..errors import InputError
from ..eval.report import MODEL_STAGES, TITLES, collect, decimal, duration, grid, show
from ..run import Run, load_json, nearest

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# From the Hub's list (https://huggingface.co/docs/hub/repositories-licenses): those that fit a model
LICENSES = ("mit", "apache-2.0", "bsd-2-clause", "bsd-3-clause", "gpl-3.0", "agpl-3.0", "lgpl-3.0", "mpl-2.0")
LICENSES += ("cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc-by-nc-nd-4.0")
LICENSES += ("openrail", "unlicense", "other", "unknown")


@dataclass
class Push:
    """What to push where (see hub.py), and what no run knows about its model; the fields are the command line's."""

    repo: str
    stage: str = "sft"
    private: bool = False
    space: bool = False
    dry_run: bool = False
    revision: str | None = None
    force: bool = False
    license: str = "mit"
    language: tuple[str, ...] = ("en",)  # ISO codes
    base_model: str | None = None  # Hub id of the model that this one continues


def render_model_card(run: Run, wanted: Push) -> ModelCard:
    """The card of `wanted.stage`: metadata with its measured results, and the facts of the run as text."""
    facts, stage, name = collected(run), wanted.stage, wanted.repo.split("/")[-1]
    sources = datasets(facts, stage)
    data = ModelCardData(
        license=wanted.license,
        language=list(wanted.language),
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["nanochat", "nanochat-hf", stage],
        datasets=[d for d in sources if HUB_ID.fullmatch(d) and not Path(d).exists()] or None,
        base_model=wanted.base_model,
        model_name=name,
        eval_results=results(facts, stage) or None,
    )
    return ModelCard.from_template(
        data,
        template_str=CARD,
        name=name,
        repo=wanted.repo,
        stage=stage,
        title=TITLES[stage],
        results="\n\n".join([result_table(facts, stage), *(f"Note: {note}." for note in facts["notes"])]),
        training=training(facts, stage),
        sources=", ".join(f"`{d}`" for d in sources) or "not recorded",
    )


def collected(run: Run) -> dict:
    """The facts of the run's report, at the hourly rate that the last report was made with."""
    return collect(run, (load_json(run.path / "report.json") or {}).get("hourly_rate"))


def chain(facts: dict, stage: str) -> list[str]:
    """The stages that made this model, in order, this one last."""
    return [s for s in MODEL_STAGES[: MODEL_STAGES.index(stage) + 1] if s in facts["stages"]]


def datasets(facts: dict, stage: str) -> list[str]:
    """Names of what the model was trained on, as the recipes write them."""
    found = []
    for name in chain(facts, stage):
        metrics = facts["stages"][name]
        named = (metrics.get("config") or {}).get("dataset")
        parts = named if isinstance(named, list) else [{"dataset": named}]
        found += [part.get("dataset") for part in [*parts, *(metrics.get("mixture") or [])]]
    names = [re.split(r"[:@\s]", d)[0] for d in found if isinstance(d, str)]
    return list(dict.fromkeys(name for name in names if name))


def results(facts: dict, stage: str) -> list[EvalResult]:
    """Every result of this stage as the Hub's model-index wants it. Raises InputError for one that was NaN."""
    values = {metric: cells[stage]["value"] for metric, cells in facts["table"].items() if stage in cells}
    for mean in ("core", "chatcore", "kocore"):
        tasks = facts["evaluation"][mean].get(stage, {}).get("per_task", {})
        values |= {f"{label} ({mean})": task["acc"] for label, task in tasks.items()}
    found = []
    for metric, value in values.items():
        if value is None:
            raise InputError(f"the result of {metric} is no number: run the evaluation again")
        kind = "bits_per_byte" if "bpb" in metric else "centered_accuracy" if "CORE" in metric else "accuracy"
        slug = re.sub(r"[^a-z0-9]+", "-", metric.lower()).strip("-")
        names = {"task_name": "Text Generation", "metric_name": kind.replace("_", " ")}
        found.append(EvalResult("text-generation", slug, metric, kind, round(float(value), 6), **names))
    return found


def result_table(facts: dict, stage: str) -> str:
    """The stages up to this one side by side."""
    stages = chain(facts, stage)
    rows = [
        [metric, *(decimal(cells.get(s, {}).get("value")) for s in stages)]
        for metric, cells in facts["table"].items()
        if any(s in cells for s in stages)
    ]
    return grid(["Metric", *(s.upper() for s in stages)], rows) or "No evaluation was run."


def training(facts: dict, stage: str) -> str:
    """What was trained on what, for how long and at what price, a row a stage."""
    base = facts["stages"].get("base", {})
    keys = (("depth", "Depth"), ("num_parameters", "Parameters"), ("total_flops", "FLOPs of pretraining"))
    rows = [[label, show(key, base[key])] for key, label in keys if base.get(key) is not None]
    for name in chain(facts, stage):
        metrics = facts["stages"][name]
        tokens = metrics.get("total_tokens") or metrics.get("tokens")
        what = f"{tokens:,.0f} tokens, " if tokens else ""
        rows.append([TITLES[name], what + duration(metrics.get("wall_time_s"))])
    hardware, versions = (facts["stages"][stage].get(key) or {} for key in ("hardware", "versions"))
    rows.append(["Hardware", f"{hardware.get('num_processes', 1)} x {hardware.get('device', '-')}"])
    rows.append(["Software", ", ".join(f"{n} {v}" for n, v in versions.items() if v) or "-"])
    rows.append(["Code", ", ".join(facts["commits"])])
    if facts["cost"] is not None:
        rows.append(["Cost of the whole run", f"${facts['cost']:.2f} at ${facts['hourly_rate']:.2f} an hour"])
    return grid(["", ""], rows)


def collection_table(runs: dict[str, Run]) -> str:
    """The text of a Hub collection: one row a model, from the runs' own metrics; repo id -> run."""
    rows = []
    for repo, run in runs.items():
        facts = collected(run)
        base = facts["stages"].get("base", {})
        found = {metric.split(" (")[0]: cells for metric, cells in facts["table"].items()}
        first = [next(iter(found.get(name, {}).values()), {}) for name in ("val bpb", "CORE", "ChatCORE")]
        scores = [show("", cell.get("value")) for cell in first]
        cost = "-" if facts["cost"] is None else f"${facts['cost']:.0f}"
        sizes = [show("", base.get(key)) for key in ("depth", "num_parameters", "total_tokens")]
        link = f"[{repo}](https://huggingface.co/{repo})"
        rows.append([link, *sizes, *scores, duration(facts["total_seconds"]), cost])
    return grid(["Model", "Depth", "Parameters", "Tokens", "val bpb", "CORE", "ChatCORE", "Time", "Cost"], rows)


CARD = """---
{{ card_data }}
---

# {{ name }}

A small language model, trained from nothing by nanochat_hf; stage: {{ title }}. Architecture and recipe follow Andrej
Karpathy's [nanochat](https://github.com/karpathy/nanochat), the pipeline is made of Hugging Face libraries.

## How to use

{% if stage == "base" -%}
```python
from transformers import pipeline

generate = pipeline("text-generation", model="{{ repo }}", trust_remote_code=True)
print(generate("The capital of France is", max_new_tokens=32)[0]["generated_text"])
```
{%- else -%}
```python
from transformers import pipeline

chat = pipeline("text-generation", model="{{ repo }}", trust_remote_code=True)
messages = [{"role": "user", "content": "What is 12 * 34?"}]
print(chat(messages, max_new_tokens=256, do_sample=False)[0]["generated_text"][-1])
```

The model may call a calculator; `custom_generate/` in this repository answers it inside `generate`, and the message
that comes back lists the `tool_steps`. To answer the calls yourself:

```python
from transformers import pipeline

chat = pipeline("text-generation", model="{{ repo }}", trust_remote_code=True)
messages = [{"role": "user", "content": "What is 12 * 34?"}]
for _ in range(5):  # at most four calls
    messages = chat(messages, max_new_tokens=256, do_sample=False, run_tools=False)[0]["generated_text"]
    if "tool_calls" not in messages[-1]:
        break
    expression = messages[-1]["tool_calls"][0]["function"]["arguments"]["expression"]
    left, right = expression.split("*")  # put your tool here
    messages.append({"role": "tool", "content": str(int(left) * int(right))})
print(messages[-1]["content"])
```
{%- endif %}

## Results

{{ results }}

Measured by the run's own evaluation; `report.md` in this repository holds sizes, errors and baselines.

## Training

{{ training }}

Data: {{ sources }}.

## Intended use and limits

{% if stage == "base" -%}
This is a base model: it continues text and does not follow instructions. It is meant for research and
teaching, and as a starting point for fine-tuning. It has had no safety training; what it writes can be wrong or
offensive.
{%- else -%}
A model of this size is for learning how such models are made, and for fun. It makes up facts, its
arithmetic is only as good as its use of the calculator, and it has had no safety training beyond its data. Do not use
it where an error matters.
{%- endif %}

Licence of the weights: {{ license }}. The licences of the data are their owners'.
"""


def check_metadata(data: ModelCardData) -> None:
    """The rules by which the Hub rejects a card, checked here so that nothing is sent in vain.

    Raises InputError naming the field: licence, language codes, repo ids.
    """
    if data.license not in LICENSES:
        raise InputError(f"licence {data.license!r} is not one that the Hub knows; {nearest(data.license, LICENSES)}")
    for code in data.language or []:
        if not re.fullmatch(r"[a-z]{2,3}(-[A-Za-z0-9]+)*|code|multilingual", code):
            raise InputError(f"language {code!r} is no ISO 639 code such as en or ko")
    bases = data.base_model if isinstance(data.base_model, list) else [data.base_model]
    for name in [*(data.datasets or []), *filter(None, bases)]:
        check_repo_id(name, " in the card")


def check_repo_id(name: str, where: str = "") -> None:
    """Raise InputError if `name` cannot be a repository of the Hub."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise InputError(f"{name!r}{where} is no repo name: {error}") from None
