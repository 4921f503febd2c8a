"""The plots of a report card or a comparison, and the page: facts -> plots/*.png, Markdown -> one HTML file.

The plots have no background and gray text, so that they can be read on white and on black.
"""

import base64
import os
import re
from collections.abc import Collection, Sequence
from itertools import cycle
from pathlib import Path
from string import Template
from tempfile import TemporaryDirectory

import matplotlib
import numpy as np
import yaml
from markdown_it import MarkdownIt
from matplotlib.figure import Figure
from PIL import Image

from ..run import MODEL_STAGES, TITLES

WORDS = yaml.safe_load(Path(__file__).with_name("report.yaml").read_text("utf-8"))
GPT2_XL = WORDS["gpt2_xl"]
CURVES = {"base": ("train_loss", "val_bpb", "core"), "rl": ("reward", "pass@1", "completion_length")}
GPT2 = "GPT-2 XL (published)"
COLORS = dict(zip(MODEL_STAGES, ("#4a8fc7", "#d9822b", "#4c9a5f", "#a56fc4", "#c2566b"))) | {GPT2: "#9aa3ad"}
RUN_COLORS = [*COLORS.values()][:-1]
GRAY = "#7a7f87"  # contrast of at least 4:1 with white and with the page's black
STYLE = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), GRAY) | {
    "axes.axisbelow": True, "axes.grid": True, "axes.spines.right": False, "axes.spines.top": False,
    "axes.titlelocation": "left", "axes.titlesize": 11, "figure.constrained_layout.use": True, "grid.alpha": 0.25,
    "grid.color": GRAY, "legend.frameon": False, "savefig.dpi": 140, "savefig.transparent": True,
}  # fmt: skip


def plots(facts: dict, folder: Path) -> dict[str, list[str]]:
    """Draw the plots in place of those of an earlier report; section -> paths of its plots below the run folder."""
    with TemporaryDirectory(dir=folder.parent, prefix=".plots") as name:  # a full disk leaves the earlier ones
        aside = Path(name, folder.name)
        aside.mkdir()
        drawn = draw_plots(facts, aside)
        for section in (*TITLES, "core", "scores"):
            for path in folder.glob(f"{section}*.png"):
                path.unlink()
        folder.mkdir(exist_ok=True)
        for path in aside.iterdir():
            os.replace(path, folder / path.name)
    return drawn


def draw_plots(facts: dict, folder: Path) -> dict[str, list[str]]:
    drawn = draw_curves({"": facts}, folder)
    with matplotlib.rc_context(STYLE):
        if scores := {metric: cells for metric, cells in facts["table"].items() if "bpb" not in metric}:
            drawn["scores"] = [draw_bars(scores, folder / "scores.png", "Scores by stage")]
        tasks: dict[str, dict] = {}
        for stage, core in facts["evaluation"]["core"].items():
            for task, row in core["per_task"].items():
                published = {GPT2: {"value": GPT2_XL[task]}} if task in GPT2_XL else {}
                tasks.setdefault(task, published)[stage] = row | {"value": row.get("centered"), "baseline": 0}
        if tasks:
            drawn["core"] = [draw_bars(tasks, folder / "core.png", "CORE by task: accuracy, centered (1 is perfect)")]
    return drawn


def draw_curves(runs: dict[str, dict], folder: Path, left_out: Collection[str] = ()) -> dict[str, list[str]]:
    """Draw the curves of a run, or over each other those that two of several runs have; stage -> paths of its plots.

    `runs`: label -> facts; `left_out`: names of curves.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawn: dict[str, list[str]] = {}
    for stage in TITLES:
        for name in CURVES.get(stage, ("train_loss", "val_loss", "chatcore")):
            all_points = {label: curve(facts["stages"].get(stage, {}), name) for label, facts in runs.items()}
            lines = {label: points for label, points in all_points.items() if len(points) > 1}
            if len(lines) >= min(2, len(runs)) and name not in left_out:
                path, colors = folder / f"{stage}-{name}.png", [COLORS[stage]] if len(runs) == 1 else RUN_COLORS
                with matplotlib.rc_context(STYLE):
                    draw_lines(lines, path, f"{TITLES[stage]}: {WORDS['curves'][name]}", colors)
                drawn.setdefault(stage, []).append(f"{folder.name}/{path.name}")
    return drawn


def curve(metrics: dict, name: str) -> list[tuple[float, float]]:
    """(step, value) of each entry of a stage's history that has both."""
    start = {"step": 0, name: metrics.get(f"start_{name}")}
    points = [(row.get("step"), row.get(name)) for row in (start, *(metrics.get("history") or []))]
    return [point for point in points if None not in point]


def draw_lines(lines: dict[str, list[tuple[float, float]]], path: Path, title: str, colors: Sequence[str]) -> None:
    """Curves from step 0; of many points also a smoothed line: a moving average over a fifteenth of them."""
    figure = Figure(figsize=(4.6, 2.9))
    axes = figure.subplots()
    for (label, points), color in zip(lines.items(), cycle(colors)):
        many, (steps, values) = len(points) >= 30, zip(*points)
        axes.plot(steps, values, color=color, alpha=0.35 if many else 1, linewidth=1.2, marker=None if many else "o")
        if many:
            axes.plot(steps, smoothed(values, len(values) // 30), color=color, linewidth=1.8)
        axes.lines[-1].set_label(label)
    axes.set_title(title)
    axes.set_xlabel("step")
    axes.set_xlim(left=0)
    if len(lines) > 1:
        axes.legend()
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    """Write a PNG of at most 64 colors, which has a third of the bytes."""
    figure.savefig(path)
    with Image.open(path) as picture:
        small = picture.convert("RGBA").quantize(64, Image.Quantize.FASTOCTREE)
    small.save(path, optimize=True)


def smoothed(values: Sequence[float], reach: int) -> list[float]:
    """The mean of each value and up to `reach` on each side, as many on the left as on the right."""
    reaches = [min(reach, i, len(values) - 1 - i) for i in range(len(values))]
    return [sum(values[i - n : i + n + 1]) / (2 * n + 1) for i, n in enumerate(reaches)]


def draw_bars(groups: dict[str, dict[str, dict]], path: Path, title: str) -> str:
    """Horizontal bars with standard errors; `groups`: group -> bar, of COLORS -> {"value", "stderr", "baseline"}."""
    bars = [name for name in COLORS if any(name in cells for cells in groups.values())]
    figure = Figure(figsize=(5.4, 0.2 * len(groups) * (len(bars) + 1) + 1.1))
    axes, height = figure.subplots(), 0.84 / len(bars)
    for number, name in enumerate(bars):
        cells = {i + number * height: group.get(name, {}) for i, group in enumerate(groups.values())}
        cells = {place: cell for place, cell in cells.items() if cell.get("value") is not None}
        values, errors = ([cell.get(key) or 0 for cell in cells.values()] for key in ("value", "stderr"))
        label = name if name == GPT2 else name.upper()
        options = {"color": COLORS[name], "label": label, "error_kw": {"ecolor": GRAY}}
        drawn = axes.barh(list(cells), values, height, xerr=errors, **options)
        axes.bar_label(drawn, fmt=" {:.3f}", fontsize=9, color=GRAY)
        for place, cell in cells.items():
            if cell.get("baseline") is not None:
                for width, color in ((3, "black"), (1.2, "white")):  # visible on all grounds
                    axes.vlines(cell["baseline"], place - height / 2, place + height / 2, color, linewidth=width)
    axes.set_yticks([i + 0.42 - height / 2 for i in range(len(groups))], groups)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set_title(title)
    axes.set_xlabel("double line: random baseline, where known")
    axes.margins(x=0.1)
    if len(bars) > 1:
        figure.legend(loc="outside lower center", ncols=len(bars))
    save(figure, path)
    return f"{path.parent.name}/{path.name}"


def draw_scaling(facts: dict, folder: Path) -> list[str]:
    """The plots of scaling.json: loss and CORE by training FLOPs with published marks, the valley of each budget."""
    folder.mkdir(parents=True, exist_ok=True)
    cells, target, optima, drawn = facts["cells"], facts["prediction"], facts["optima"].get("budgets", []), []
    for key, label in (("val_bpb", "val bpb"), ("core", "CORE")):
        series, marks = {}, {}
        for cell in sorted((c for c in cells if c[key] is not None), key=lambda c: (c["depth"], c["C"])):
            series.setdefault(f"d{cell['depth']}", []).append((cell["C"], cell[key]))
        if key == "val_bpb" and "prediction" in facts["law"]:
            marks[f"d{target['depth']}, predicted"] = [(target["flops"], facts["law"]["prediction"]["value"])]
        for mark in facts["references"]:
            if key in mark and mark.get("flops", 0) < 1e4 * max(c["C"] for c in cells):  # else the cells are a spot
                name = f"{mark['name']}, {mark['text']}" if key == "val_bpb" else mark["name"]
                marks.setdefault(name, []).append((mark.get("flops"), mark[key]))
        if series:
            drawn.append(draw_points(series, marks, folder / f"{key}.png", ("training FLOPs", label)))
    valleys = [(f"{v['budget']:.3g} FLOPs", [c for c in cells if c["budget"] == v["budget"]]) for v in optima]
    if valleys:
        series = {name: [(c["N"], c["val_bpb"]) for c in group] for name, group in valleys}
        best = [(v["N"]["value"], v["loss"]["value"]) for v in optima if "N" in v]
        labels = "N (matrices and head)", "val bpb"
        drawn.append(draw_points(series, {"optimum": best}, folder / "isoflop.png", labels, parabolas=True))
    return drawn


@matplotlib.rc_context(STYLE)
def draw_points(series: dict, marks: dict, path: Path, labels: tuple[str, str], parabolas=False) -> str:
    """Points (x, y) by name, joined by lines, or with parabolas in log x through them; x is logarithmic.

    marks: other points by name; x None: a horizontal line.
    """
    figure = Figure(figsize=(6.4, 3.6))
    axes, colors = figure.subplots(), matplotlib.colormaps["viridis"](np.linspace(0.1, 0.9, len(series)))
    axes.set(xscale="log", xlabel=labels[0], ylabel=labels[1])
    for i, (name, points) in enumerate(series.items()):
        x, y = zip(*points)
        axes.plot(x, y, "o" if parabolas else "o-", label=name, color=colors[i])
        if parabolas:
            line = np.geomspace(x[0], x[-1])
            axes.plot(line, np.polyval(np.polyfit(np.log(x), y, 2), np.log(line)), color=colors[i])
    for i, (name, points) in enumerate(marks.items()):
        if points and points[0][0] is None:
            axes.axhline(points[0][1], color=GRAY, linestyle="--", label=name)
        elif points:
            axes.plot(*zip(*points), "D*Xps"[i % 5], color=[*COLORS.values()][i % 6], label=name)
    figure.legend(loc="outside right upper", fontsize=8)
    figure.savefig(path)
    return f"{path.parent.name}/{path.name}"


def page(text: str, folder: Path) -> str:
    """Markdown -> one HTML file that embeds its plots."""

    def embed(match: re.Match) -> str:
        return f'src="data:image/png;base64,{base64.b64encode((folder / match[1]).read_bytes()).decode()}"'

    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
    body = re.sub(r'src="(plots/[\w.@-]+\.png)"', embed, body)
    title = re.sub(r"<[^>]+>", "", body.split("</h1>")[0])
    return Template(Path(__file__).with_name("report.html").read_text()).substitute(title=title, body=body)
