"""The text of the report card: facts, as `report.collect` gives them, -> Markdown, a section a stage.

    markdown(collect(Run("runs/d12")), {"base": "plots/base.png"})

What was not measured is "-". `grid`, `show` and `duration` are also what the model card writes with.
"""

import re

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
NUMBER = re.compile(r"-|[-+]?[\d.,]+(e[-+]?\d+)?%?( ± [\d.]+)?( GiB| min)?")
BLOAT = {
    "characters": "Characters",
    "lines": "Lines",
    "files": "Files",
    "tokens": "Tokens (characters / 4)",
    "dependencies": "Direct dependencies",
}


def markdown(facts: dict, pictures: dict[str, str] | None = None) -> str:
    """The report as Markdown; pictures: section -> path of its plot, relative to the report."""
    pictures = pictures or {}
    notes = [f"> Note: {one_line(note)}" for note in facts["notes"]]
    parts = [f"# Report card: {facts['run']}", *notes, *header(facts)]
    for stage, metrics in facts["stages"].items():
        parts += [f"## {TITLES[stage]}", numbers(metrics)]
        if stage == "tokenizer" and (texts := facts["evaluation"]["bytes_per_token"]):
            rows = [[name, *(show("", value) for value in row.values())] for name, row in texts.items()]
            parts.append(grid(["Bytes per token", *next(iter(texts.values()))], rows))
        parts += extras(metrics)
        if stage in pictures:
            parts.append(f"![{TITLES[stage]}]({pictures[stage]})")
    parts += [*evaluation(facts, pictures), "## Summary", summary(facts)]
    return "\n\n".join(part for part in parts if part) + "\n"


def header(facts: dict) -> list[str]:
    hardware, versions, bloat = (facts[key] or {} for key in ("hardware", "versions", "bloat"))
    machine = f"{hardware.get('num_processes', 1)} x {hardware.get('device', '-')}"
    if memory := hardware.get("device_memory_bytes"):
        machine += f" ({gib(memory)})"
    host = f"{hardware.get('cpu_cores') or '-'} CPU cores, {gib(hardware.get('memory_bytes'))} memory"
    cost = f"${facts['cost']:.2f} at ${facts['hourly_rate']:.2f} an hour" if facts["cost"] is not None else "-"
    rows = [
        ["Machine", machine],
        ["Host", f"{host}, {hardware.get('system', '-')}"],
        ["Software", ", ".join(f"{name} {version}" for name, version in versions.items() if version) or "-"],
        ["Commit", ", ".join(facts["commits"])],
        ["Wall time", duration(facts["total_seconds"])],
        ["Cost", cost],
    ]
    sizes = [[label, show(key, bloat.get(key))] for key, label in BLOAT.items()]
    return [grid(["", ""], rows), "### Bloat", grid(["", ""], sizes)]


def numbers(metrics: dict) -> str:
    """The plain numbers of a stage."""
    return grid(["", ""], [[SHOWN[key], show(key, metrics[key])] for key in SHOWN if metrics.get(key) is not None])


def extras(metrics: dict) -> list[str]:
    """What only some stages have: mixtures, skipped rows, before and after, samples."""
    parts = []
    if mixture := metrics.get("mixture"):
        rows = [[part["dataset"], f"{part['rows']:,}", f"{part['tokens']:,}"] for part in mixture]
        parts.append(grid(["Dataset", "Rows", "Tokens"], rows))
    if skipped := metrics.get("skipped_rows"):
        first = f"row {skipped[0].get('row')} of {skipped[0].get('dataset')}: {skipped[0].get('reason')}"
        count = sum(part.get("bad", 0) for part in mixture or []) or len(skipped)  # not all of them are kept by name
        parts.append(f"{count:,} rows were skipped, the first of them {first}")
    before, after = metrics.get("before") or {}, metrics.get("after") or {}
    rows = [[name, show("", before.get(name)), show("", after.get(name))] for name in {**before, **after}]
    parts.append(grid(["On the test split", "before", "after"], rows))
    parts += [
        f"> **{one_line(sample['prompt'])}** {one_line(sample['text'])}"
        for sample in (metrics.get("samples") or [])[:8]
    ]
    return parts


def evaluation(facts: dict, pictures: dict[str, str]) -> list[str]:
    found = facts["evaluation"]
    parts = ["## Evaluation"] if found["results"] or found["core"] else []
    for stage, results in found["results"].items():
        head = [stage.upper(), "Value", "Guessing", "n", "Tool called", "pass@k"]
        parts.append(grid(head, [[name.replace("_", " "), *result_cells(r)] for name, r in results.items()]))
    for stage, core in found["core"].items():
        notes = [f"Mean of centered accuracies: {with_error(core)}."]
        if core.get("missing"):
            notes.append(f"The bundle lacks {', '.join(core['missing'])}, so this is not CORE.")
        if core.get("limit"):
            notes.append(f"At most {core['limit']} examples a task.")
        if core.get("long_prompts"):
            notes.append(f"{core['long_prompts']} prompts were cropped.")
        if core.get("seconds"):
            share = core["model_seconds"] / core["seconds"]
            notes.append(f"It took {core['seconds']:.1f} s, {share:.0%} of them in the model.")
        if core["label"] == "CORE":
            notes.append(f"GPT-2 XL (1.6B) has {GPT2_XL['CORE']:.4f}.")
        rows = [
            [name, decimal(row["acc"]), with_error({**row, "value": row["centered"]}), f"{row['n']:,}"]
            + [show("", GPT2_XL.get(name))]
            for name, row in core["per_task"].items()
        ]
        parts += [f"### {stage.upper()}: {core['label']}", " ".join(notes)]
        parts.append(grid(["Task", "Accuracy", "Centered", "n", "GPT-2 XL, centered"], rows))
    if "core" in pictures:
        parts.append(f"![CORE by task]({pictures['core']})")
    for stage, examples in list(found["examples"].items())[-1:]:
        rows = [[mark(e), *(one_line(e[key]) for key in ("question", "expected", "answer"))] for e in examples]
        parts += [
            f"### What {stage.upper()} answers" if rows else "",
            grid(["", "Question", "Expected", "Answer"], rows),
        ]
    return parts


def result_cells(result: dict) -> list[str]:
    best = [f"{name} {decimal(value)}" for name, value in result.items() if name.startswith("pass@")]
    used = show("tool_use", result.get("tool_use"))
    return [with_error(result), show("", result.get("baseline")), f"{result['n']:,}", used, ", ".join(best) or "-"]


def with_error(result: dict) -> str:
    return decimal(result["value"]) + (f" ± {result['stderr']:.4f}" if result.get("stderr") is not None else "")


def decimal(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def summary(facts: dict) -> str:
    """The last table, Metric | BASE | MID | SFT | RL, and the total wall time."""
    rows = [
        [name, *(decimal(cells.get(stage, {}).get("value")) for stage in MODEL_STAGES)]
        for name, cells in facts["table"].items()
    ]
    times = ", ".join(f"{stage} {duration(value)}" for stage, value in facts["seconds"].items() if value is not None)
    total = f"Total wall time: {duration(facts['total_seconds'])} ({times})"
    return grid(["Metric", *(stage.upper() for stage in MODEL_STAGES)], rows) + f"\n\n{total}"


def short(count: int | None) -> str:
    """1433600 -> 1.4M."""
    if count is None:
        return "-"
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= size:
            return f"{count / size:.1f}{letter}"
    return str(count)


def grid(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, padded so that it can be read in a terminal, too, numbers to the right; "" without rows."""
    if not rows:
        return ""
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in [head, *rows]]
    widths = [max(3, *(len(row[i]) for row in cells)) for i in range(len(head))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in cells]
    numeric = [all(NUMBER.fullmatch(row[i]) for row in cells[1:]) for i in range(len(head))]
    marks = ["-" * (width + 1) + (":" if right else "-") for width, right in zip(widths, numeric)]
    return "\n".join([lines[0], "|" + "|".join(marks) + "|", *lines[1:]])


def show(key: str, value) -> str:
    """A value as text, in the unit that its key in metrics.json means; "-" for None."""
    if value is None:
        return "-"
    if key == "wall_time_s":
        return duration(value)
    if key == "peak_memory_bytes":
        return gib(value)
    if key in ("mfu", "generation_share", "tool_use"):
        return f"{value:.1%}"
    if isinstance(value, bool | str):
        return str(value)
    if isinstance(value, dict | list):
        return one_line(str(value))
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}" if abs(value) < 1e12 else f"{value:.3g}"
    return f"{value:.4f}"


def gib(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**30:.1f} GiB"


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
