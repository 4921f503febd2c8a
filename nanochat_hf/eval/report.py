"""The report card of a run: report.md with plots, report.json, and report.html as one file, from metrics.json files.

Nothing is measured here: a section says what no stage wrote, a table has "-". `collect` gathers the facts (the content
of report.json), `markdown` formats them, plots.py draws them; the model card uses the same facts.
`compression` is measured by the evaluation, for this report.
"""

import json
import re
import shlex
from collections.abc import Collection, Sequence
from itertools import pairwise
from pathlib import Path

from jinja2 import Environment, FileSystemLoader
from transformers import AutoTokenizer

from ..errors import InputError
from ..optim.scaling import GPUS, RATE, find_gpu
from ..run import (
    MODEL_STAGES,
    STAGES,
    TITLES,
    Run,
    duration,
    project_folder,
    renamed_keys,
    save_json,
    save_text,
    short,
    writing,
)
from ..stage_configs import RECIPES, read_recipe
from .plots import GPT2_XL, WORDS, page, plots
from .weights import REPLACED, outdated, replaced

OTHER_TOKENIZERS = {"GPT-2": "openai-community/gpt2", "GPT-4": "Xenova/gpt-4"}
NUMERIC = re.compile(r"-|[-+]?[\d.,]+(e[-+]?\d+)?%?( (±|to) [-+]?[\d.]+)?( GiB)?|<0.001|[-+]?\d+ .*\b(min|s)")
EXTRA = re.compile("tool_use|pass@|.*,")  # keys of a result with rows of their own; "metric,filter" is lm-eval's
CALL = re.compile(r"<\|python_start\|>(.*?)<\|python_end\|>(?:<\|output_start\|>(.*?)<\|output_end\|>)?", re.S)


def make_report(run_path: str | Path, hourly_rate: float | None = None) -> Path:
    """Write report.md, report.json, report.html and plots/ into the run folder; returns the path of report.md.

    `hourly_rate`: price of the whole machine in dollars per hour, for the cost.
    """
    path = Path(run_path)
    facts = collect(Run(path), hourly_rate)
    with writing(path / "plots"):
        text = markdown(facts, plots(facts, path / "plots"))
    save_json(path / "report.json", facts)
    for name, content in (("report.html", page(text, path)), ("report.md", text)):
        save_text(path / name, content)
    return path / "report.md"


def collect(run: Run, hourly_rate: float | None = None, last: str | None = None) -> dict:
    """All facts of the report, up to stage `last` if that is named, as plain values: the content of report.json.

    Results of other weights than the run folder's are left out, and "notes" says so. Raises InputError for a folder
    without a finished stage.
    """
    later = MODEL_STAGES[MODEL_STAGES.index(last) + 1 :] if last else ()
    stages = {stage: run.metrics(stage) or {} for stage in (*TITLES, "eval") if stage not in later}
    stages = {stage: metrics for stage, metrics in stages.items() if metrics.get("finished")}
    if not stages:
        raise InputError(f"{run.path} holds no finished stage to report on")
    seconds = {stage: metrics.get("wall_time_s") for stage, metrics in stages.items()}
    total = sum(filter(None, seconds.values()))
    newest = max(stages.values(), key=lambda metrics: metrics.get("started") or 0)
    hardware = newest.get("hardware") or {}
    notes, evaluation = current_results(run, stages, later)
    shown = {name: stages[name] for name in stages if name != "eval" and not replaced(run, name)}
    table = summary_table(shown, evaluation)
    means = [name for name, cells in table.items() if of_last_stage(cells, "label")]
    changed = {m["commit"] for m in stages.values() if m.get("commit") and m.get("dirty")}
    commits = {m.get("commit") or "unknown" for m in stages.values()}
    return {
        "schema": 1,
        "run": run.path.resolve().name,
        "notes": notes,
        "commits": sorted(c + " (with local changes)" * (c in changed) for c in commits),
        "hardware": newest.get("hardware"),
        "versions": newest.get("versions"),
        "seconds": seconds,
        "total_seconds": total,
        "hourly_rate": hourly_rate,
        "cost": hourly_rate * total / 3600 if hourly_rate is not None else None,
        **gpu_use(stages, seconds),
        "command": command(stages, hardware),
        "stages": shown,
        "evaluation": evaluation,
        "table": table,
        "main_metrics": (means or [name for name in table if "bpb" not in name])[:6],
    }


def current_results(run: Run, stages: dict, later: Collection[str] = ()) -> tuple[list[str], dict]:
    """Notes on what is left out or uncertain, and the evaluation without results of other weights.

    `stages`: the metrics.json of each finished stage; `later`: names of stages that are left out.
    """
    record, notes, names = stages.get("eval", {}), [], [name for name in stages if name in TITLES]
    measured = {stage: reason for stage, reason in outdated(run, record).items() if stage not in later}
    if reasons := {stage: reason for stage, reason in measured.items() if reason}:
        why = ", ".join(f"{stage} ({reason})" for stage, reason in reasons.items())
        notes.append(f"the evaluation is older than the models, its results are left out for {why}; run it again")
    models = {stage: record["models"][stage] for stage in measured if stage not in reasons}
    notes += [f"{stage} is {model}" for stage, model in models.items() if model != stage]
    notes += [f"{name}: {REPLACED}, so its numbers are left out" for name in names if replaced(run, name)]
    for before, after in pairwise(names):
        weights, source = stages[before].get("weights"), (stages[after].get("inputs") or {}).get("model")
        if before in MODEL_STAGES and None not in (weights, source) and source != weights:
            notes.append(f"{after} was trained from another model than today's {before}")
    keys = ("results", "core", "chatcore", "kocore", "examples")
    evaluation = {key: {s: v for s, v in (record.get(key) or {}).items() if s in models} for key in keys}
    same_tokenizer = not reasons or next(iter(measured)) not in reasons  # it is that of the first model
    return notes, evaluation | {"bytes_per_token": (record.get("bytes_per_token") or {}) if same_tokenizer else {}}


def gpu_use(stages: dict, seconds: dict) -> dict[str, float | None]:
    """GPU-hours of these stages, 0 on CPUs and Macs, and kWh at the GPUs' rated power; None for what is not known."""
    hours, kwh = 0.0, 0.0
    for stage, metrics in stages.items():
        hardware = metrics.get("hardware") or {}
        device, ranks = hardware.get("device"), hardware.get("num_processes") or 1
        if not device or seconds[stage] is None:
            return {"gpu_hours": None, "max_kwh": None}
        if hardware.get("device_type") not in ("cpu", "mps"):
            gpu, used = find_gpu(device), ranks * seconds[stage] / 3600
            hours, kwh = hours + used, kwh + used * GPUS[gpu].watts / 1000 if gpu and kwh is not None else None
    return {"gpu_hours": hours, "max_kwh": kwh or None}


def command(stages: dict, hardware: dict) -> str | None:
    """The command with the settings of these stages: the nearest recipe that has all, and each key that differs."""
    configs = {stage: renamed_keys(metrics["config"]) for stage, metrics in stages.items() if metrics.get("config")}
    candidates = []
    for path in sorted(RECIPES.glob("*/base.yaml")) if "base" in configs else ():
        enabled, recipe = read_recipe(path.parent, None, [])
        if not configs.keys() <= recipe.keys():  # its command would leave a stage out
            continue
        pairs = [(stage, key, value) for stage in configs for key, value in configs[stage].items()]
        changes = [
            f"{stage}.{key}={value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}"
            for stage, key, value in pairs
            if hasattr(recipe[stage], key) and json.dumps(getattr(recipe[stage], key)) != json.dumps(value)
        ]
        if stages.keys() != {*enabled} - {"report"}:
            changes.append(f"--stages={','.join([*sorted(stages, key=STAGES.index), 'report'])}")
        candidates.append((len(changes), path.parent.name, changes))
    if not candidates:
        return None
    _, name, changes = min(candidates)
    ranks, kind = hardware.get("num_processes") or 1, hardware.get("device_type")
    launch = ["--config-file=cpu"] if kind == "cpu" else []
    launch = ["--config-file=multi_gpu", f"--num-processes={ranks}"] if ranks > 1 and kind == "cuda" else launch
    return shlex.join(["nanochat", "run", name, *launch, *changes])


def summary_table(stages: dict, evaluation: dict) -> dict[str, dict[str, dict]]:
    """metric -> stage -> {"value", "stderr", "baseline", ...}, in the order of the summary."""
    results = {stage: dict(numbers) for stage, numbers in evaluation["results"].items()}
    bpb = {stage: results[stage].pop("val_bpb") for stage in MODEL_STAGES if "val_bpb" in results.get(stage, {})}
    if not bpb and (value := stages.get("base", {}).get("val_bpb")) is not None:
        bpb = {"base": {"value": value, "stderr": None}}
    rows = {"val bpb": bpb} if bpb else {}
    for kind in ("core", "chatcore", "kocore"):
        for stage, mean_result in evaluation[kind].items():
            cell = {key: value for key, value in mean_result.items() if key != "per_task"}
            cell["baseline"] = 0  # of centered accuracies
            rows.setdefault(mean_name(mean_result), {})[stage] = cell
        for stage in MODEL_STAGES if kind == "core" else ():
            for name, result in results.get(stage, {}).items():
                rows.setdefault(name, {})[stage] = result
    return rows


def mean_name(mean: dict) -> str:
    """For example "18/22 tasks, 100 examples each"."""
    return mean["label"] + (f", {mean['limit']} examples each" if mean.get("limit") else "")


def of_last_stage(cells: dict[str, dict], key: str):
    """The value of the last stage that has one."""
    return next((cells[s][key] for s in reversed(MODEL_STAGES) if cells.get(s, {}).get(key) is not None), None)


def machine(hardware: dict) -> str:
    """For example "8 x NVIDIA H200" or "2 CPU cores"."""
    if hardware.get("device_type") == "cpu" and hardware.get("cpu_cores"):
        return f"{hardware['cpu_cores']} CPU cores"
    return f"{hardware.get('num_processes') or 1} x {hardware['device']}" if hardware.get("device") else "-"


def results_row(facts: dict, report: str = "-") -> str:
    """The run's row of evals/RESULTS.md; CORE and ChatCORE are of the last stage for which all tasks were measured."""
    table, means = facts["table"], {"CORE": "-", "ChatCORE": "-"}
    for name, cells in table.items():
        label, _, limit = name.partition(", ")
        if label in means:
            means[label] = with_error(of_last_stage(cells, "value")) + (f" ({limit})" if limit else "")
    bpb, tokens = table.get("val bpb", {}).get("base") or {}, facts["stages"].get("base", {}).get("total_tokens")
    cells = [facts["run"], ", ".join(facts["commits"]), machine(facts["hardware"] or {})]
    cells += [duration(facts["total_seconds"]), short(tokens), with_error(bpb.get("value")), *means.values(), report]
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def compression(tokenizer) -> dict[str, dict[str, float | None]]:
    """Bytes per token of text -> tokenizer, for a page of a book, code, Korean and mathematics (evals/texts).

    GPT-2's and GPT-4's tokenizers are compared if this machine's Hub cache has them; None if not.
    """
    tokenizers, table = {"ours": tokenizer}, {}
    for name, repo in OTHER_TOKENIZERS.items():
        try:
            tokenizers[name] = AutoTokenizer.from_pretrained(repo, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError):
            tokenizers[name] = None
    for path in sorted(project_folder("evals", "texts").glob("*.txt")):
        text = path.read_text("utf-8")
        table[path.stem] = {
            name: encode and len(text.encode()) / max(1, len(encode(text, add_special_tokens=False)["input_ids"]))
            for name, encode in tokenizers.items()
        }
    return table


def markdown(facts: dict, pictures: dict | None = None, macro: str = "report", template="report.jinja") -> str:
    """The report, or another macro of the template, such as its "summary"; pictures: section -> paths of plots."""
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), trim_blocks=True, lstrip_blocks=True)
    functions = (short, duration, machine, of_last_stage, with_error, show, one_line, core_table, grid)
    environment.filters |= {function.__name__: function for function in functions}
    environment.filters |= {"by_stage": metrics_by_stage, "by": by_text}
    environment.globals |= {"WORDS": WORDS, "TITLES": TITLES, "RATE": RATE}
    text = getattr(environment.get_template(template).module, macro)(facts | {"pictures": pictures or {}})
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def by_text(rows: list[dict], key: str) -> dict[str, dict]:
    """At most ten rows by the text of `key`; of rows with the same text the last."""
    return dict(list({one_line(row[key]): row for row in rows}.items())[:10])


def metrics_by_stage(table: dict, errors: bool = False) -> str:
    """A row per metric, a column per stage; with `errors` also standard errors, questions, tool calls and pass@k."""
    rows, counts = [], ("baseline", "n") if errors else ("baseline",)
    stages = [stage for stage in MODEL_STAGES if any(stage in named for named in table.values())]
    for metric, named in table.items():
        cells = [named.get(stage, {}) for stage in stages]
        values = [with_error(cell.get("value"), cell.get("stderr") if errors else None) for cell in cells]
        rows.append([metric, *values, *(show(of_last_stage(named, key)) for key in counts)])
        extra = dict.fromkeys(key for cell in cells for key in cell if cell[key] and EXTRA.match(key))
        for key in extra if errors else ():
            label, values = key.replace("tool_use", "tool called"), [show(cell.get(key), key) for cell in cells]
            rows.append([f"{metric}, {label}", *values, "-", "-"])
    return grid(["Metric", *map(str.upper, stages), "Random baseline", "n"][: -1 if not errors else None], rows)


def core_table(core: dict) -> str:
    rows = []
    for name, row in core["per_task"].items():
        acc, value = row["acc"], row.get("centered")
        chance = (acc - value) / (1 - value) if None not in (acc, value) and value != 1 else None
        cells = [with_error(acc), show(chance), with_error(value, row.get("stderr")), show(row.get("n"))]
        rows.append([name, *cells, show(GPT2_XL.get(name))])
    return grid(["Task", "Accuracy", "Random baseline", "Centered", "n", "GPT-2 XL, centered"], rows)


def with_error(value: float | None, stderr: float | None = None, sign: str = "") -> str:
    return "-" if value is None else f"{value:{sign}.4f}" + (f" ± {stderr:.4f}" if stderr is not None else "")


def show(value, key: str = "") -> str:
    """A value as text, in the unit of its key in metrics.json; "-" for None."""
    if value is None:
        return "-"
    if key.endswith("memory_bytes"):
        return f"{value / 2**30:.1f} GiB"
    if key in ("mfu", "generation_share", "tool_use"):
        return f"{value:.1%}"
    if isinstance(value, bool | str | dict | list):
        return one_line(value)
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}" if abs(value) < 1e12 else f"{value:.3g}"
    return f"{value:.4f}"


def grid(head: list[str], rows: Collection[Sequence[str]]) -> str:
    """A Markdown table, padded so that a terminal shows it well, numbers to the right; "" without rows.

    Columns without any value are left out.
    """
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in [head, *rows]]
    columns = [column for column in zip(*cells) if set(column[1:]) - {"-", ""}]
    if not columns:
        return ""
    widths = [max(3, *map(len, column)) for column in columns]
    numeric = [all(NUMERIC.fullmatch(cell) for cell in column[1:]) for column in columns]
    marks = ["-" * (width + 1) + (":" if right else "-") for width, right in zip(widths, numeric)]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in zip(*columns)]
    return "\n".join([lines[0], "|" + "|".join(marks) + "|", *lines[1:]])


def one_line(text) -> str:
    """Text as one line of literal Markdown of at most 300 characters; tool calls in words, no special tokens.

    Of log-probabilities by letter, as a task with choices has them, the most likely letter.
    """
    if isinstance(text, dict) and all(isinstance(value, float) for value in text.values()):
        text = max(text, key=text.get, default="-")
    text = CALL.sub(lambda match: f"[calls {match[1]}" + (f", gets {match[2]}] " if match[2] else "] "), str(text))
    text = " ".join(re.sub(r"<\|\w+\|>", " ", text).split())
    text = text if len(text) <= 300 else text[:299] + "…"
    return re.sub(r"([\\`*<\[])", r"\\\1", text)
