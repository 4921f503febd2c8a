"""The report card of a run: report.md with plots, report.json, and report.html as one file, from metrics.json files.

    python scripts/make_report.py --run-dir runs/d12 [--node-hourly-rate 24]
    python scripts/make_report.py --compare runs/a runs/b
    python scripts/make_report.py --run-dir runs/d12 --row

Nothing is measured or estimated here: a number that no stage wrote is "-". `collect` gathers the facts (the content of
report.json), `markdown` formats them, plots.py draws them; the model card uses the same facts. `repository_size` and
`compression` are measured by the evaluation, for this report.
"""

import re
import subprocess
import tomllib
from collections.abc import Collection, Sequence
from itertools import pairwise
from pathlib import Path

from transformers import AutoTokenizer

from ..errors import InputError
from ..run import MODEL_STAGES, TITLES, Run, duration, project_folder, save_json, short, writing
from .plots import GPT2_XL, WORDS, page, plots
from .weights import measurements, refuse_non_finite, replaced

ROOT = Path(__file__).parents[2]
OTHER_TOKENIZERS = {"GPT-2": "openai-community/gpt2", "GPT-4": "Xenova/gpt-4"}
SOURCES = (".py", ".md", ".yaml", ".toml", ".jinja", ".html")
NUMERIC = re.compile(r"-|[-+]?[\d.,]+(e[-+]?\d+)?%?( ± [\d.]+)?( GiB| min)?")
CALL = re.compile(r"<\|python_start\|>(.*?)<\|python_end\|>(?:<\|output_start\|>(.*?)<\|output_end\|>)?", re.S)


def make_report(run_path: str | Path, hourly_rate: float | None = None) -> Path:
    """Write report.md, report.json, report.html and plots/ into the run folder; returns the path of report.md.

    Args:
        hourly_rate: price of the whole machine in dollars per hour, for the cost.

    Raises:
        InputError: the folder has no finished stage, or weights that are not finite.
    """
    path = Path(run_path)
    facts = collect(Run(path), hourly_rate)
    with writing(path / "plots"):
        text = markdown(facts, plots(facts, path / "plots"))
    save_json(path / "report.json", facts)
    for name, content in (("report.html", page(text, path)), ("report.md", text)):
        with writing(path / name):
            (path / name).write_text(content, encoding="utf-8")
    return path / "report.md"


def collect(run: Run, hourly_rate: float | None = None) -> dict:
    """All facts of the report as plain values: the content of report.json.

    Results of other weights than the run folder's are left out, and "notes" says so. Raises InputError for a folder
    without a finished stage, and for weights that are not finite.
    """
    stages = {stage: run.metrics(stage) or {} for stage in (*TITLES, "eval")}
    stages = {stage: metrics for stage, metrics in stages.items() if metrics.get("finished")}
    if not stages:
        raise InputError(f"{run.path} holds no finished stage to report on")
    for stage in MODEL_STAGES:
        if stage in stages:
            refuse_non_finite(run.folder(stage))
    seconds = {stage: metrics.get("wall_time_s") for stage, metrics in stages.items()}
    total = sum(filter(None, seconds.values()))
    last = max(stages.values(), key=lambda metrics: metrics.get("started") or 0)
    notes, evaluation = current_results(run, stages)
    shown = {name: stages[name] for name in stages if name != "eval" and not replaced(run, name)}
    return {
        "schema": 1,
        "run": run.path.resolve().name,
        "notes": notes,
        "commits": sorted({commit_of(metrics) for metrics in stages.values()}),
        "hardware": last.get("hardware"),
        "versions": last.get("versions"),
        "seconds": seconds,
        "total_seconds": total,
        "hourly_rate": hourly_rate,
        "cost": hourly_rate * total / 3600 if hourly_rate is not None else None,
        "bloat": stages.get("eval", {}).get("bloat"),
        "stages": shown,
        "evaluation": evaluation,
        "table": summary_table(shown, evaluation),
    }


def current_results(run: Run, stages: dict) -> tuple[list[str], dict]:
    """Notes on what is left out or uncertain, and the evaluation without results of other weights.

    Args:
        stages: the metrics.json of each finished stage.
    """
    record, notes, names = stages.get("eval", {}), [], [name for name in stages if name in TITLES]
    measured = measurements(run, record)
    reasons = {stage: measurement.outdated for stage, measurement in measured.items() if measurement.outdated}
    if reasons:
        why = ", ".join(f"{stage} ({reason})" for stage, reason in reasons.items())
        notes.append(f"the evaluation is older than the models, its results are left out for {why}; run it again")
    if unknown := [stage for stage in measured if not measured[stage].verified and stage not in reasons]:
        notes.append(f"not verified: the evaluation does not say which weights of {', '.join(unknown)} it measured")
    notes += [f"{stage} is {m.model}" for stage, m in measured.items() if m.model and stage not in reasons]
    for name in names:
        if replaced(run, name):
            problem = f"the weights of {name} are not those that its metrics.json describes"
            notes.append(f"{problem}, so its numbers are left out; train it again, or restore them")
    for before, after in pairwise(names):
        weights, source = stages[before].get("weights"), (stages[after].get("inputs") or {}).get("model")
        if before in MODEL_STAGES and weights and source:
            if source != weights:
                notes.append(f"{after} was trained from another model than today's {before}")
        elif (stages[before].get("started") or 0) > (stages[after].get("started") or 0):
            notes.append(f"{after} was trained before today's {before}, so not from it")
    evaluation = {
        key: {stage: value for stage, value in (record.get(key) or {}).items() if stage not in reasons}
        for key in ("results", "core", "chatcore", "kocore", "examples")
    }
    same_tokenizer = not reasons or next(iter(measured)) not in reasons  # it is that of the first model
    return notes, evaluation | {"bytes_per_token": (record.get("bytes_per_token") or {}) if same_tokenizer else {}}


def commit_of(metrics: dict) -> str:
    commit = metrics.get("commit")
    return "unknown" if not commit else commit + (" (with local changes)" if metrics.get("dirty") else "")


def summary_table(stages: dict, evaluation: dict) -> dict[str, dict[str, dict]]:
    """metric -> stage -> {"value", "stderr", ...}, in the order of the summary."""
    rows: dict[str, dict[str, dict]] = {}
    results = {stage: dict(numbers) for stage, numbers in evaluation["results"].items()}
    bpb = {stage: results[stage].pop("val_bpb") for stage in MODEL_STAGES if "val_bpb" in results.get(stage, {})}
    if not bpb and (value := stages.get("base", {}).get("val_bpb")) is not None:
        bpb = {"base": {"value": value, "stderr": None, "higher_is_better": False}}
    if bpb:
        rows["val bpb"] = bpb
    for kind in ("core", "chatcore", "kocore"):
        for stage, mean in evaluation[kind].items():
            limit = f", {mean['limit']} examples each" if mean.get("limit") else ""
            cell = {key: value for key, value in mean.items() if key != "per_task"} | {"higher_is_better": True}
            rows.setdefault(mean["label"] + limit, {})[stage] = cell
        for stage in MODEL_STAGES if kind == "core" else ():
            for name, result in results.get(stage, {}).items():
                rows.setdefault(name, {})[stage] = result
    return rows


def results_row(facts: dict, report: str = "-") -> str:
    """The run's row of evals/RESULTS.md: recipe, commit, machine, wall time, tokens, val bpb, CORE, ChatCORE, report.

    CORE and ChatCORE are filled in if all of their tasks were measured, of the last stage that has them; a limit on
    the examples per task is named.

    Args:
        facts: what `collect` returns.
        report: the text of the last column, for example a link.
    """
    hardware, stages = facts["hardware"] or {}, facts["stages"]
    machine = f"{hardware.get('num_processes', 1)} x {hardware['device']}" if hardware.get("device") else "-"
    if hardware.get("device_type") == "cpu" and hardware.get("cpu_cores"):
        machine = f"{hardware['cpu_cores']} CPU cores"

    def last(metric: str) -> str:
        for name, row in facts["table"].items():
            label, _, limit = name.partition(", ")
            if label == metric:
                value = row[[stage for stage in MODEL_STAGES if stage in row][-1]]["value"]
                return decimal(value) + (f" ({limit})" if limit else "")
        return "-"

    bpb = facts["table"].get("val bpb", {}).get("base") or {}
    cells = [facts["run"], ", ".join(facts["commits"]), machine, duration(facts["total_seconds"])]
    cells += [short(stages.get("base", {}).get("total_tokens")), decimal(bpb.get("value"))]
    cells += [last("CORE"), last("ChatCORE"), report]
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def compare(first: str | Path, second: str | Path) -> str:
    """Two runs side by side as Markdown: values, difference, and the standard error of the difference."""
    runs, rows = [collect(Run(path)) for path in (first, second)], []
    for name in dict.fromkeys(name for facts in runs for name in facts["table"]):
        for stage in MODEL_STAGES:
            results = [facts["table"].get(name, {}).get(stage) or {} for facts in runs]
            if not any(results):
                continue
            a, b = (result.get("value") for result in results)
            errors = [result.get("stderr") for result in results]
            error = None if None in errors else (errors[0] ** 2 + errors[1] ** 2) ** 0.5
            difference = "-" if None in (a, b) else f"{b - a:+.4f}" + (f" ± {error:.4f}" if error is not None else "")
            rows.append([name, stage.upper(), show("", a), show("", b), difference])
    a, b = (facts["total_seconds"] for facts in runs)
    rows.append(["total wall time", "", duration(a), duration(b), f"{(b - a) / 60:+.1f} min"])
    names = [facts["run"] for facts in runs]
    names = names if names[0] != names[1] else [str(first), str(second)]
    notes = [f"{name}: {note}" for name, facts in zip(names, runs) for note in facts["notes"]]
    return "\n\n".join([grid(["Metric", "Stage", *names, "Difference"], rows), *notes]) + "\n"


def repository_size(root: Path = ROOT) -> dict[str, int] | None:
    """Size of the project's own sources: what a newcomer has to read. None outside of a git checkout."""
    project = root / "pyproject.toml"
    try:
        listing = subprocess.run(["git", "ls-files"], cwd=root, capture_output=True, text=True, check=False).stdout
    except OSError:  # no git on this machine
        return None
    paths = [root / name for name in listing.splitlines() if name.endswith(SOURCES)]
    texts = [path.read_text("utf-8", "replace") for path in paths if path.is_file()]
    if not texts or not project.is_file():
        return None
    characters, lines = sum(map(len, texts)), sum(text.count("\n") for text in texts)
    dependencies = len(tomllib.loads(project.read_text())["project"]["dependencies"])
    sizes = {"characters": characters, "lines": lines, "files": len(texts), "tokens": characters // 4}
    return sizes | {"dependencies": dependencies}


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
            name: encode and len(text.encode()) / len(encode(text, add_special_tokens=False)["input_ids"])
            for name, encode in tokenizers.items()
        }
    return table


# ---- text ----


def markdown(facts: dict, pictures: dict[str, str] | None = None) -> str:
    """The report as Markdown; pictures: section -> path of its plot, relative to the report."""
    pictures = pictures or {}
    notes = [f"> Note: {one_line(note)}" for note in facts["notes"]]
    parts = [f"# Report card: {facts['run']}", *notes, "## Summary", summary(facts)]
    parts.append(grid(["", ""], machine_and_cost(facts).items()))
    for stage, metrics in facts["stages"].items():
        parts += [f"## {TITLES[stage]}", named_values(metrics, WORDS["labels"])]
        if stage == "tokenizer" and (texts := facts["evaluation"]["bytes_per_token"]):
            rows = [[name, *(show("", value) for value in row.values())] for name, row in texts.items()]
            parts.append(grid(["Bytes per token", *next(iter(texts.values()))], rows))
        parts += training_details(metrics)
        if stage in pictures:
            parts.append(f"![{TITLES[stage]}]({pictures[stage]})")
    parts += evaluation_section(facts["evaluation"], pictures)
    if facts["bloat"]:
        parts += ["## Repository size", named_values(facts["bloat"], WORDS["sizes"])]
    return "\n\n".join(part for part in parts if part) + "\n"


def summary(facts: dict) -> str:
    """The table Metric | BASE | MID | SFT | RL (| DPO), and the total wall time."""
    times = ", ".join(f"{stage} {duration(value)}" for stage, value in facts["seconds"].items() if value is not None)
    total = f"Total wall time: {duration(facts['total_seconds'])} ({times})"
    stages = [stage for stage in MODEL_STAGES if stage in facts["stages"] or stage != "dpo"]
    return f"{metrics_by_stage(facts['table'], stages)}\n\n{total}"


def metrics_by_stage(table: dict, stages: Sequence[str]) -> str:
    """A row per metric that one of these stages has, a column per stage."""
    rows = [
        [metric, *(decimal(cells.get(stage, {}).get("value")) for stage in stages)]
        for metric, cells in table.items()
        if any(stage in cells for stage in stages)
    ]
    return grid(["Metric", *map(str.upper, stages)], rows)


def machine_and_cost(facts: dict) -> dict[str, str]:
    hardware, versions = facts["hardware"] or {}, facts["versions"] or {}
    memory, rate = hardware.get("device_memory_bytes"), facts["hourly_rate"]
    machine = f"{hardware.get('num_processes', 1)} x {hardware.get('device', '-')}"
    host = f"{hardware.get('cpu_cores') or '-'} CPU cores, {gib(hardware.get('memory_bytes'))} memory"
    return {
        "Machine": machine + (f" ({gib(memory)})" if memory else ""),
        "Host": f"{host}, {hardware.get('system', '-')}",
        "Software": ", ".join(f"{name} {version}" for name, version in versions.items() if version) or "-",
        "Commit": ", ".join(facts["commits"]),
        "Wall time": duration(facts["total_seconds"]),
        "Cost": "-" if facts["cost"] is None else f"${facts['cost']:.2f} at ${rate:.2f} per hour",
    }


def named_values(values: dict, labels: dict[str, str]) -> str:
    return grid(["", ""], [[labels[key], show(key, values[key])] for key in labels if values.get(key) is not None])


def training_details(metrics: dict) -> list[str]:
    """The parts that only some stages have: mixture, skipped rows, values before and after, samples."""
    mixture, skipped = metrics.get("mixture") or [], metrics.get("skipped_rows")
    rows = [[part["dataset"], f"{part['rows']:,}", f"{part['tokens']:,}"] for part in mixture]
    parts = [grid(["Dataset", "Rows", "Tokens"], rows)]
    if skipped:
        first = f"row {skipped[0].get('row')} of {skipped[0].get('dataset')}: {skipped[0].get('reason')}"
        count = sum(part.get("bad", 0) for part in mixture) or len(skipped)  # not all of them are listed by name
        parts.append(f"{count:,} rows were skipped, the first of them {first}")
    before, after = metrics.get("before") or {}, metrics.get("after") or {}
    rows = [[name, show("", before.get(name)), show("", after.get(name))] for name in {**before, **after}]
    parts.append(grid(["On the test split", "before", "after"], rows))
    samples = [(one_line(sample["prompt"]), one_line(sample["text"])) for sample in metrics.get("samples") or []]
    return parts + [f"> **{prompt}** {text}" for prompt, text in dict.fromkeys(samples[:8])]


def evaluation_section(evaluation: dict, pictures: dict[str, str]) -> list[str]:
    parts = ["## Evaluation"] if evaluation["results"] or evaluation["core"] else []
    for stage, results in evaluation["results"].items():
        head = [stage.upper(), "Value", "Random baseline", "n", "Tool called", "pass@k"]
        parts.append(grid(head, [[name.replace("_", " "), *result_cells(r)] for name, r in results.items()]))
    for stage, core in evaluation["core"].items():
        rows = []
        for name, row in core["per_task"].items():
            value = with_error(row.get("centered"), row.get("stderr"))
            rows.append([name, decimal(row["acc"]), value, show("", row.get("n")), show("", GPT2_XL.get(name))])
        parts += [f"### {stage.upper()}: {core['label']}", core_notes(core)]
        parts.append(grid(["Task", "Accuracy", "Centered", "n", "GPT-2 XL, centered"], rows))
    if "core" in pictures:
        parts.append(f"![CORE by task]({pictures['core']})")
    for stage, examples in list(evaluation["examples"].items())[-1:]:
        rows = []
        for example in examples:
            correct = example.get("correct")
            grade = "-" if correct is None else "right" if correct >= 1 else "wrong"
            rows.append([grade, *(one_line(example[key]) for key in ("question", "expected", "answer"))])
        if rows:
            parts += [f"### Answers of {stage.upper()}", grid(["", "Question", "Expected", "Answer"], rows)]
    return parts


def core_notes(core: dict) -> str:
    notes = [f"Mean of centered accuracies: {with_error(core['value'], core.get('stderr'))}."]
    if core.get("missing"):
        notes.append(f"The bundle lacks {', '.join(core['missing'])}, so this is not CORE.")
    if core.get("limit"):
        notes.append(f"At most {core['limit']} examples per task.")
    if core.get("long_prompts"):
        notes.append(f"{core['long_prompts']} prompts were cropped.")
    if core.get("seconds") and core.get("model_seconds") is not None:
        share = core["model_seconds"] / core["seconds"]
        notes.append(f"It took {core['seconds']:.1f} s, {share:.0%} of them in the model.")
    if core["label"] == "CORE":
        notes.append(f"GPT-2 XL (1.6B) has {GPT2_XL['CORE']:.4f}.")
    return " ".join(notes)


def result_cells(result: dict) -> list[str]:
    value = with_error(result["value"], result.get("stderr"))
    pass_at_k = ", ".join(f"{name} {decimal(value)}" for name, value in result.items() if name.startswith("pass@"))
    tool_use = show("tool_use", result.get("tool_use"))
    return [value, show("", result.get("baseline")), show("", result.get("n")), tool_use, pass_at_k or "-"]


def with_error(value: float | None, stderr: float | None) -> str:
    return decimal(value) + (f" ± {stderr:.4f}" if stderr is not None else "")


def decimal(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def gib(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**30:.1f} GiB"


def show(key: str, value) -> str:
    """A value as text, in the unit of its key in metrics.json; "-" for None."""
    if value is None:
        return "-"
    if key in ("wall_time_s", "peak_memory_bytes"):
        return duration(value) if key == "wall_time_s" else gib(value)
    if key in ("mfu", "generation_share", "tool_use"):
        return f"{value:.1%}"
    if isinstance(value, bool | str):
        return str(value)
    if isinstance(value, dict | list):
        return one_line(str(value))
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}" if abs(value) < 1e12 else f"{value:.3g}"
    return f"{value:.4f}"


def grid(head: list[str], rows: Collection[Sequence[str]]) -> str:
    """A Markdown table, padded so that a terminal shows it well, numbers to the right; "" without rows."""
    if not rows:
        return ""
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in [head, *rows]]
    columns = list(zip(*cells))
    widths = [max(3, *map(len, column)) for column in columns]
    numeric = [all(NUMERIC.fullmatch(cell) for cell in column[1:]) for column in columns]
    marks = ["-" * (width + 1) + (":" if right else "-") for width, right in zip(widths, numeric)]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "|".join(marks) + "|", *lines[1:]])


def one_line(text) -> str:
    """Text as one line of literal Markdown of at most 300 characters; tool calls in words, no special tokens."""
    text = CALL.sub(lambda match: f"[calls {match[1]}" + (f", gets {match[2]}] " if match[2] else "] "), str(text))
    text = " ".join(re.sub(r"<\|\w+\|>", " ", text).split())
    text = text if len(text) <= 300 else text[:299] + "…"
    return re.sub(r"([\\`*<\[])", r"\\\1", text)
