"""The report card of a run: report.md with plots, report.json, and report.html as one file, from metrics.json files.

    python scripts/make_report.py --run-dir runs/d12 [--hourly-rate 24]
    python scripts/make_report.py --compare runs/a runs/b
    python scripts/make_report.py --run-dir runs/d12 --row

Nothing is measured here and nothing is guessed: a number that no stage wrote is "-". `collect` gathers the facts,
`markdown` and `plots` show them; the model card uses the same pieces.
"""

import base64
import re
from pathlib import Path

from markdown_it import MarkdownIt
from matplotlib.figure import Figure

from ..errors import InputError
from ..run import Run, save_json

MODEL_STAGES = ("base", "mid", "sft", "rl")
TITLES = {"tokenizer": "Tokenizer", "base": "Base model", "mid": "Mid-training", "sft": "SFT", "rl": "RL"}
# CORE by karpathy/nanochat's `dev/estimate_gpt3_core.ipynb` and LEADERBOARD.md: GPT-2 XL (1.6B), centered.
GPT2_XL = {
    "CORE": 0.256525,
    "hellaswag_zeroshot": 0.3360,
    "lambada_openai": 0.5230,
    "hellaswag": 0.3493,
    "piqa": 0.4500,
    "arc_easy": 0.4600,
    "arc_challenge": 0.0653,
}
SHOWN = {  # of a stage's metrics.json: key -> what a reader calls it
    "vocab_size": "Vocabulary",
    "bytes_per_token": "Bytes per token",
    "train_chars": "Characters trained on",
    "depth": "Depth",
    "num_parameters": "Parameters",
    "num_matmul_parameters": "Parameters in matrix products",
    "flops_per_token": "FLOPs per token",
    "num_iterations": "Steps",
    "total_batch_size": "Tokens per step",
    "total_tokens": "Tokens",
    "total_flops": "FLOPs",
    "rows": "Rows",
    "tokens": "Tokens",
    "tokens_per_second": "Tokens per second",
    "mfu": "Model FLOPs utilization",
    "peak_memory_bytes": "Peak device memory",
    "val_bpb": "Validation bits per byte",
    "val_loss": "Validation loss",
    "core": "CORE while training",
    "generation_share": "Share of time spent generating",
    "task": "Task",
    "wall_time_s": "Wall time",
}


def make_report(run_path: str | Path, hourly_rate: float | None = None) -> Path:
    """Write report.md, report.json, report.html and plots/ into the run folder; returns the path of report.md.

    Args:
        hourly_rate: price of the whole machine in dollars an hour, for the cost.

    Raises:
        InputError: the folder has no finished stage.
    """
    path = Path(run_path)
    facts = collect(Run(path), hourly_rate)
    pictures = plots(facts, path / "plots")
    text = markdown(facts, pictures)
    validate(facts)
    save_json(path / "report.json", facts)
    (path / "report.html").write_text(page(text, path), encoding="utf-8")
    (path / "report.md").write_text(text, encoding="utf-8")
    return path / "report.md"


def collect(run: Run, hourly_rate: float | None = None) -> dict:
    """Everything the report says, as plain values: what report.json holds."""
    found = {stage: run.metrics(stage) for stage in (*TITLES, "eval")}
    stages = {stage: metrics for stage, metrics in found.items() if metrics and metrics.get("finished")}
    if not stages:
        raise InputError(f"{run.path} holds no finished stage to report on")
    seconds = {stage: metrics.get("wall_time_s") for stage, metrics in stages.items()}
    total = sum(value for value in seconds.values() if value)
    last = max(stages.values(), key=lambda metrics: metrics.get("started") or 0)
    evaluation = stages.get("eval", {})
    return {
        "schema": 1,
        "run": run.path.resolve().name,
        "commits": sorted({describe(m) for m in stages.values()}),
        "hardware": last.get("hardware"),
        "versions": last.get("versions"),
        "seconds": seconds,
        "total_seconds": total,
        "hourly_rate": hourly_rate,
        "cost": hourly_rate * total / 3600 if hourly_rate is not None else None,
        "bloat": evaluation.get("bloat"),
        "stages": {name: metrics for name, metrics in stages.items() if name != "eval"},
        "evaluation": {
            key: evaluation.get(key) or {}
            for key in ("results", "core", "chatcore", "kocore", "examples", "bytes_per_token")
        },
        "table": table(stages, evaluation),
    }


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
    """Raise ValueError where report.json would not have the shape that its readers rely on."""
    kinds = {"schema": int, "run": str, "commits": list, "seconds": dict, "total_seconds": int | float, "stages": dict}
    kinds |= {"evaluation": dict, "table": dict}
    for key, kind in kinds.items():
        if not isinstance(facts.get(key), kind):
            raise ValueError(f"report.json: {key} must be {kind}, not {facts.get(key)!r}")
    for metric, row in facts["table"].items():
        for stage, cell in row.items():
            if stage not in MODEL_STAGES or not isinstance(cell.get("value"), int | float):
                raise ValueError(f"report.json: table[{metric!r}][{stage!r}] has no value: {cell!r}")


# ---- text -----------------------------------------------------------------------------------------------------------


def markdown(facts: dict, pictures: dict[str, str] | None = None) -> str:
    """The report as Markdown; pictures: section -> path of its plot, relative to the report."""
    pictures = pictures or {}
    parts = [f"# Report card: {facts['run']}", header(facts)]
    for stage, metrics in facts["stages"].items():
        parts.append(f"## {TITLES[stage]}")
        parts.append(
            grid(["", ""], [[SHOWN[key], show(key, metrics[key])] for key in SHOWN if metrics.get(key) is not None])
        )
        if stage == "tokenizer" and (texts := facts["evaluation"]["bytes_per_token"]):
            rows = [[name, *(show("", value) for value in row.values())] for name, row in texts.items()]
            parts.append(grid(["Bytes per token", *next(iter(texts.values()))], rows))
        parts += extras(stage, metrics)
        if stage in pictures:
            parts.append(f"![{TITLES[stage]}]({pictures[stage]})")
    parts += evaluation_section(facts, pictures)
    parts += ["## Summary", summary(facts)]
    return "\n\n".join(part for part in parts if part) + "\n"


def header(facts: dict) -> str:
    hardware, versions = facts["hardware"] or {}, facts["versions"] or {}
    machine = f"{hardware.get('num_processes', 1)} x {hardware.get('device', '-')}"
    if memory := hardware.get("device_memory_bytes"):
        machine += f" ({gib(memory)})"
    cores, ram = hardware.get("cpu_cores"), hardware.get("memory_bytes")
    rows = [
        ["Machine", machine],
        [
            "Host",
            f"{cores or '-'} CPU cores, {gib(ram) if ram else '-'} memory, {hardware.get('system', '-')}",
        ],
        ["Software", ", ".join(f"{name} {version}" for name, version in versions.items() if version) or "-"],
        ["Commit", ", ".join(facts["commits"])],
        ["Wall time", duration(facts["total_seconds"])],
        ["Cost", f"${facts['cost']:.2f} at ${facts['hourly_rate']:.2f} an hour" if facts["cost"] is not None else "-"],
    ]
    bloat = facts["bloat"] or {}
    names = {"characters": "Characters", "lines": "Lines", "files": "Files", "tokens": "Tokens (characters / 4)"}
    names |= {"dependencies": "Direct dependencies"}
    sizes = [[label, f"{bloat[key]:,}" if bloat.get(key) is not None else "-"] for key, label in names.items()]
    return "\n\n".join([grid(["", ""], rows), "### Bloat", grid(["", ""], sizes)])


def extras(stage: str, metrics: dict) -> list[str]:
    """What only some stages have: mixtures, skipped rows, samples, before and after."""
    parts = []
    if metrics.get("mixture"):
        rows = [[m["dataset"], f"{m['rows']:,}", f"{m['tokens']:,}"] for m in metrics["mixture"]]
        parts.append(grid(["Dataset", "Rows", "Tokens"], rows))
    if skipped := metrics.get("skipped_rows"):
        parts.append(f"{len(skipped)} rows were skipped, the first because: {skipped[0].get('reason')}")
    if metrics.get("before") or metrics.get("after"):
        before, after = metrics.get("before") or {}, metrics.get("after") or {}
        names = list(dict.fromkeys([*before, *after]))
        rows = [[name, show("", before.get(name)), show("", after.get(name))] for name in names]
        parts.append(grid(["On the test split", "before", "after"], rows))
    for sample in (metrics.get("samples") or [])[:8]:
        parts.append(f"> **{one_line(sample['prompt'])}** {one_line(sample['text'])}")
    return parts


def evaluation_section(facts: dict, pictures: dict[str, str]) -> list[str]:
    results, cores = facts["evaluation"]["results"], facts["evaluation"]["core"]
    parts = ["## Evaluation"] if results or cores else []
    for stage, tasks in results.items():
        rows = []
        for name, r in tasks.items():
            value = f"{r['value']:.4f}" + (f" ± {r['stderr']:.4f}" if r.get("stderr") is not None else "")
            rows.append(
                [
                    name.replace("_", " "),
                    value,
                    show("", r.get("baseline")),
                    f"{r['n']:,}",
                    percent(r.get("tool_use")),
                    best_of(r),
                ]
            )
        parts.append(grid([stage.upper(), "Value", "Guessing", "n", "Tool called", "pass@k"], rows))
    for stage, core in cores.items():
        error = f" ± {core['stderr']:.4f}" if core.get("stderr") is not None else ""
        notes = [f"Mean of centered accuracies: {core['value']:.4f}{error}."]
        notes += (
            [f"The bundle lacks {', '.join(core['missing'])}, so this is not CORE."] if core.get("missing") else []
        )
        notes += [f"{core['long_prompts']} prompts were cropped."] if core.get("long_prompts") else []
        notes += [f"GPT-2 XL (1.6B) has {GPT2_XL['CORE']:.4f}."] if core["label"] == "CORE" else []
        parts += [f"### {stage.upper()}: {core['label']}", " ".join(notes)]
        rows = [[n, f"{r['acc']:.4f}", f"{r['centered']:.4f}", f"{r['n']:,}"] for n, r in core["per_task"].items()]
        parts.append(grid(["Task", "Accuracy", "Centered", "n"], rows))
    if "core" in pictures:
        parts.append(f"![CORE by task]({pictures['core']})")
    for stage, examples in list(facts["evaluation"]["examples"].items())[-1:]:
        rows = [[mark(e), e["question"], e["expected"], e["answer"]] for e in examples]
        parts.append(f"### What {stage} answers" if rows else "")
        parts.append(grid(["", "Question", "Expected", "Answer"], [[one_line(cell) for cell in row] for row in rows]))
    return parts


def summary(facts: dict) -> str:
    """The last table, Metric | BASE | MID | SFT | RL, and the total wall time."""
    rows = [
        [name, *(f"{cells[stage]['value']:.4f}" if stage in cells else "-" for stage in MODEL_STAGES)]
        for name, cells in facts["table"].items()
    ]
    times = ", ".join(f"{stage} {duration(value)}" for stage, value in facts["seconds"].items() if value is not None)
    total = f"Total wall time: {duration(facts['total_seconds'])} ({times})"
    return grid(["Metric", *(stage.upper() for stage in MODEL_STAGES)], rows) + f"\n\n{total}"


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
                return f"{value:.4f}" + (f" ({limit})" if limit else "")
        return "-"

    bpb = facts["table"].get("val bpb", {}).get("base")
    cells = [facts["run"], ", ".join(facts["commits"]), machine, duration(facts["total_seconds"])]
    cells += [short(tokens), f"{bpb['value']:.4f}" if bpb else "-", last("CORE"), last("ChatCORE"), report]
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def short(count: int | None) -> str:
    """1433600 -> 1.4M."""
    if count is None:
        return "-"
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= size:
            return f"{count / size:.1f}{letter}"
    return str(count)


def grid(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, aligned so that it can be read in a terminal, too; "" without rows."""
    if not rows:
        return ""
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in [head, *rows]]
    widths = [max(3, *(len(row[i]) for row in cells)) for i in range(len(head))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def show(key: str, value) -> str:
    if value is None:
        return "-"
    if key == "wall_time_s":
        return duration(value)
    if key == "peak_memory_bytes":
        return gib(value)
    if key in ("mfu", "generation_share"):
        return percent(value)
    if isinstance(value, bool | str):
        return str(value)
    if isinstance(value, dict | list):
        return one_line(str(value))
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}" if abs(value) < 1e12 else f"{value:.3g}"
    return f"{value:.4f}"


def gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


def percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def best_of(result: dict) -> str:
    found = [(name, value) for name, value in result.items() if name.startswith("pass@")]
    return ", ".join(f"{name} {value:.4f}" for name, value in found) or "-"


def mark(example: dict) -> str:
    return "-" if example.get("correct") is None else "right" if example["correct"] >= 1 else "wrong"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    minutes, hours = round(seconds) // 60, round(seconds) // 3600
    return f"{hours} h {minutes % 60:02d} min" if hours else f"{minutes} min {round(seconds) % 60:02d} s"


def one_line(text) -> str:
    """Text as a single line of Markdown that means nothing but itself, at most 300 characters; tool calls in words."""
    call = r"<\|python_start\|>(.*?)<\|python_end\|>(?:<\|output_start\|>(.*?)<\|output_end\|>)?"
    words = re.sub(call, lambda m: f"[calls {m[1]}" + (f", gets {m[2]}] " if m[2] else "] "), str(text), flags=re.S)
    words = " ".join(words.split())
    words = words if len(words) <= 300 else words[:299] + "…"
    return re.sub(r"([\\`*<\[])", r"\\\1", words)


# ---- pictures -------------------------------------------------------------------------------------------------------


def plots(facts: dict, folder: Path) -> dict[str, str]:
    """Draw what there is to draw; section -> path below the run folder."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {}
    for stage, metrics in facts["stages"].items():
        history = metrics.get("history") or []
        wanted = {"base": ("train_loss", "val_bpb"), "rl": ("reward", "completion_length")}.get(
            stage, ("train_loss", "val_loss")
        )
        curves = {name: points(history, name) for name in wanted}
        if any(len(x) > 1 for x, _ in curves.values()):
            drawn[stage] = draw_curves(curves, folder / f"{stage}.png", TITLES[stage])
    cores = {stage: core["per_task"] for stage, core in facts["evaluation"]["core"].items()}
    if cores:
        drawn["core"] = draw_core(cores, folder / "core.png")
    return drawn


def points(history: list[dict], name: str) -> tuple[list, list]:
    """The steps at which a number was written, and the number."""
    kept = [(row["step"], row[name]) for row in history if row.get(name) is not None]
    return [x for x, _ in kept], [y for _, y in kept]


def draw_curves(curves: dict[str, tuple[list, list]], path: Path, title: str) -> str:
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    shown = {name: curve for name, curve in curves.items() if curve[0]}
    for axes, (name, (x, y)) in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown.items()):
        axes.plot(x, y, linewidth=1.2, marker="o" if len(x) < 30 else None, markersize=3)
        axes.set(xlabel="step", title=f"{title}: {name.replace('_', ' ')}")
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    return f"{path.parent.name}/{path.name}"


def draw_core(cores: dict[str, dict], path: Path) -> str:
    """Centered accuracy by task beside GPT-2 XL's published ones."""
    labels = list(dict.fromkeys(label for tasks in cores.values() for label in tasks))
    bars = {stage: {label: tasks[label]["centered"] for label in tasks} for stage, tasks in cores.items()}
    bars["GPT-2 XL (published)"] = {label: GPT2_XL[label] for label in labels if label in GPT2_XL}
    figure = Figure(figsize=(9, 0.32 * len(labels) + 1), layout="constrained")
    axes, height = figure.subplots(), 0.8 / len(bars)
    for number, (name, values) in enumerate(bars.items()):
        places = [i + number * height for i, label in enumerate(labels) if label in values]
        axes.barh(places, [values[label] for label in labels if label in values], height=height, label=name)
    axes.set_yticks([i + 0.4 - height / 2 for i in range(len(labels))], labels)
    axes.invert_yaxis()
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set(title="CORE by task, centered on guessing")
    axes.legend()
    figure.savefig(path, dpi=110)
    return f"{path.parent.name}/{path.name}"


def page(text: str, folder: Path) -> str:
    """Markdown -> one HTML file with its pictures inside."""

    def inline(match: re.Match) -> str:
        data = base64.b64encode((folder / match.group(1)).read_bytes()).decode()
        return f'src="data:image/png;base64,{data}"'

    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
    body = re.sub(r'src="(plots/[\w.-]+\.png)"', inline, body)
    style = (
        "body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
        "table{border-collapse:collapse}td,th{border:1px solid #ccc;padding:.2rem .6rem;text-align:left}"
        "img{max-width:100%}blockquote{color:#444;border-left:3px solid #ccc;margin:0;padding-left:1rem}"
    )
    title = re.sub(r"<[^>]+>", "", body.split("</h1>")[0])
    return f'<!doctype html><meta charset="utf-8"><title>{title}</title><style>{style}</style>\n{body}'


# ---- two runs, and the size of the code -----------------------------------------------------------------------------


def compare(first: str | Path, second: str | Path) -> str:
    """Two runs side by side as Markdown: values, difference, and the standard error of the difference."""
    one, two = collect(Run(first)), collect(Run(second))
    rows = []
    for name in dict.fromkeys([*one["table"], *two["table"]]):
        for stage in MODEL_STAGES:
            a, b = one["table"].get(name, {}).get(stage), two["table"].get(name, {}).get(stage)
            if not a and not b:
                continue
            cells, difference = ["-" if cell is None else f"{cell['value']:.4f}" for cell in (a, b)], "-"
            if a and b:
                difference = f"{b['value'] - a['value']:+.4f}"
                errors = [cell.get("stderr") for cell in (a, b)]
                if None not in errors:
                    difference += f" ± {(errors[0] ** 2 + errors[1] ** 2) ** 0.5:.4f}"
            rows.append([name, stage.upper(), *cells, difference])
    rows.append(["total wall time", "", duration(one["total_seconds"]), duration(two["total_seconds"]), "-"])
    rows[-1][-1] = f"{(two['total_seconds'] - one['total_seconds']) / 60:+.1f} min"
    names = [one["run"], two["run"]] if one["run"] != two["run"] else [str(first), str(second)]
    return grid(["Metric", "Stage", *names, "Difference"], rows) + "\n"
