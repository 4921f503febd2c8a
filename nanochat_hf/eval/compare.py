"""Runs side by side: values, differences with 95 % intervals and p-values, curves, and what differs in the recipes.

    compare(["runs/a", "runs/b"], "comparison")

The first run is the reference. A difference is tested in pairs where the answers of both runs to the same questions
are stored, else by the two standard errors: z-tests, as Miller advises (2024, "Adding Error Bars to Evals"). Values
that were measured on other texts, tasks or numbers of examples are not subtracted, and their row says so.
"""

import json
from pathlib import Path
from statistics import NormalDist, mean, stdev

from ..run import MODEL_STAGES, STAGES, Run, duration, renamed_keys, writing
from .plots import draw_curves, page
from .report import collect, grid, machine, markdown, mean_name, one_line, show, with_error

# Value that cannot be compared -> curves that are not drawn over each other then.
CURVES = {("val bpb", "base"): {"val_bpb"}, ("loss per token", "base"): {"train_loss", "val_loss"}}


def compare(paths: list[str | Path], folder: str | Path | None = None) -> str:
    """The comparison as Markdown; with `folder` also comparison.md, comparison.html and plots/ there."""
    runs = [Run(path) for path in paths]
    facts = [collect(run) for run in runs]
    names = [each["run"] for each in facts]
    names = names if len({*names}) == len(names) else [*map(str, paths)]
    notes = [f"{name}: {note}" for name, each in zip(names, facts) for note in each["notes"]]
    tables, left_out = {}, set()
    for name, run, each in list(zip(names, runs, facts))[1:]:
        reasons = obstacles([runs[0], run], [facts[0], each])
        tables[name] = differences([runs[0], run], [facts[0], each], reasons)
        left_out = left_out.union(*(CURVES.get(key, ()) for key in reasons))
    words = {"names": names, "notes": notes, "differences": tables, "drawn": folder is not None}
    words |= {"values": values(names, facts), "settings": changed_settings(names, runs, facts)}
    words["commands"] = {name: each["command"] for name, each in zip(names, facts)}
    if folder is None:
        return markdown(words, macro="comparison")
    with writing(folder):
        drawn = draw_curves(dict(zip(names, facts)), Path(folder, "plots"), left_out)
        text = markdown(words, drawn, "comparison")
        for name, content in (("comparison.md", text), ("comparison.html", page(text, Path(folder)))):
            Path(folder, name).write_text(content, encoding="utf-8")
    return text


def values(names: list[str], facts: list[dict]) -> str:
    """A table of all values: a row per metric and stage, a column per run."""
    rows = []
    for metric in dict.fromkeys(metric for each in facts for metric in each["table"]):
        for stage in MODEL_STAGES:
            cells = [each["table"].get(metric, {}).get(stage) or {} for each in facts]
            texts = (with_error(cell.get("value"), cell.get("stderr")) for cell in cells)
            rows += [[metric, stage.upper(), *texts]] if any(cells) else []
    times = (duration(each["total_seconds"]) for each in facts)
    return grid(["Metric", "Stage", *names], [*rows, ["total wall time", "", *times]])


def measured_on(run: Run, facts: dict) -> dict[tuple[str, str], dict]:
    """(metric, stage) -> what the value was measured on, None where that is not known."""
    base, evaluation = (run.metrics(stage) or {} for stage in ("base", "eval"))
    measured = evaluation if "val_bpb" in (evaluation.get("results") or {}).get("base", {}) else base
    text, trained = ((record.get("config") or {}).get("dataset") for record in (measured, base))
    inputs = base.get("inputs") or {}
    text = (text == trained and inputs.get("data")) or text  # the fingerprint of its files, where there is one
    cells = {(metric, stage): cell for metric, row in facts["table"].items() for stage, cell in row.items()}
    on = {key: {"numbers of examples or tokens": cell.get("n")} for key, cell in cells.items()}
    on |= {key: of | {"validation texts": text} for key, of in on.items() if key[0] == "val bpb"}
    on |= {("loss per token", "base"): {"tokenizers": inputs.get("tokenizer")}} if "base" in facts["stages"] else {}
    for kind in ("core", "chatcore", "kocore"):
        for stage, each in facts["evaluation"][kind].items():
            tasks = {name: row.get("n") for name, row in (each.get("per_task") or {}).items()}
            on[mean_name(each), stage] = {"tasks in a mean, or numbers of their examples": tasks}
    return on


def obstacles(runs: list[Run], facts: list[dict]) -> dict[tuple[str, str], str]:
    """(metric, stage) -> in what two runs differ that makes their values of it not comparable."""
    first, second = (measured_on(run, each) for run, each in zip(runs, facts))
    reasons = {}
    for key in (key for key in first if key in second):
        for what, value in first[key].items():
            other = second[key].get(what)
            if None not in (value, other) and value != other:
                reasons[key] = what + f" ({show(other)} and {show(value)})" * isinstance(value, int)
    return reasons


def differences(runs: list[Run], facts: list[dict], reasons: dict) -> str:
    """A table of the second run's values minus the first's: difference, 95 % interval, p-value and test.

    `reasons`: (metric, stage) -> why it is not compared.
    """
    rows = []
    cells = [(metric, stage) for metric in facts[0]["table"] for stage in MODEL_STAGES]
    for metric, stage in dict.fromkeys([*cells, *reasons]):
        if (metric, stage) in reasons:
            rows.append([metric, stage.upper(), "-", "-", "-", f"none: other {reasons[metric, stage]}"])
            continue
        results = [each["table"].get(metric, {}).get(stage) or {} for each in facts]
        a, b = (result.get("value") for result in results)
        if None in (a, b):
            continue
        test, error = difference_error([outcomes(run, stage, metric, r) for run, r in zip(runs, results)], results)
        interval, p = "-", "-"
        if error is not None:
            interval = f"{b - a - 1.96 * error:+.4f} to {b - a + 1.96 * error:+.4f}"
            p = 2 * NormalDist().cdf(-abs(b - a) / (error or 1e-12))  # without an error 1 or 0
            p = f"{p:.3f}" if p >= 0.001 else "<0.001"
        rows.append([metric, stage.upper(), with_error(b - a, sign="+"), interval, p, test])
    a, b = (each["total_seconds"] for each in facts)
    rows.append(["total wall time", "", "-+"[b >= a] + duration(abs(b - a)), "-", "-", "-"])
    return grid(["Metric", "Stage", "Difference", "95 % interval", "p", "Test"], rows)


def outcomes(run: Run, stage: str, metric: str, result: dict) -> list[tuple[str, float]] | None:
    """(question, 1 if it was answered right else 0) of each question of a metric; None if they are not stored."""
    record = run.metrics("eval") or {}
    metrics = [name for name in (record.get("results") or {}).get(stage) or {} if "bpb" not in name]
    tasks = [name for name in (record.get("seconds") or {}).get(stage) or {} if name not in ("val_bpb", "core", "all")]
    path = run.folder("eval") / "samples" / stage / f"{dict(zip(metrics, tasks)).get(metric)}.jsonl"
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        answers = [(str(row["question"]), float(row["correct"])) for row in rows]
        same = len(answers) == result.get("n") and abs(mean(c for _, c in answers) - result["value"]) < 1e-6
    except (OSError, ValueError, KeyError, TypeError):  # not there, damaged, or graded by another number
        return None
    return answers if same else None


def difference_error(outcomes_of: list, results: list[dict]) -> tuple[str, float | None]:
    """Name of the test and standard error of the difference of two results; "-" and None without errors."""
    a, b = outcomes_of
    if a and b and len(a) > 1 and [question for question, _ in a] == [question for question, _ in b]:
        return "paired", stdev(after - before for (_, before), (_, after) in zip(a, b)) / len(a) ** 0.5
    errors = [result.get("stderr") for result in results]
    return ("-", None) if None in errors else ("two-sample", (errors[0] ** 2 + errors[1] ** 2) ** 0.5)


def changed_settings(names: list[str], runs: list[Run], facts: list[dict]) -> str:
    """A table of the keys, commits, machines and versions that are not the same in all runs."""
    columns = []
    for run, each in zip(runs, facts):
        configs = {stage: renamed_keys((run.metrics(stage) or {}).get("config") or {}) for stage in STAGES[:-1]}
        keys = {
            f"{stage}.{key}": "-" if value is None else one_line(value)
            for stage, config in configs.items()
            for key, value in config.items()
        }
        keys |= {"commit": ", ".join(each["commits"]), "machine": machine(each["hardware"] or {})}
        columns.append(keys | {name: show(version) for name, version in (each["versions"] or {}).items()})
    every = dict.fromkeys(key for column in columns for key in column)
    rows = [[key, *(column.get(key, "not recorded") for column in columns)] for key in every]
    return grid(["Key", *names], [row for row in rows if len({*row[1:]}) > 1])
