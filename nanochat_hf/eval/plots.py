"""The report card's plots, and the page that holds them: facts -> plots/*.png, Markdown -> one HTML file."""

import base64
import re
from pathlib import Path
from string import Template

import yaml
from markdown_it import MarkdownIt
from matplotlib.figure import Figure

from ..run import TITLES

WORDS = yaml.safe_load(Path(__file__).with_name("report.yaml").read_text("utf-8"))
GPT2_XL = WORDS["gpt2_xl"]
CURVES = {"base": ("train_loss", "val_bpb", "core"), "rl": ("reward", "pass@1", "completion_length")}
COLORS = ("#2f6f9f", "#d9822b", "#4c9a5f", "#9a5fb0", "#888888")


def plots(facts: dict, folder: Path) -> dict[str, str]:
    """Draw the plots of all curves; section -> path of its plot below the run folder. Older plots are deleted."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in (*TITLES, "core"):
        (folder / f"{name}.png").unlink(missing_ok=True)
    drawn = {}
    for stage, metrics in facts["stages"].items():
        curves = {}
        for name in CURVES.get(stage, ("train_loss", "val_loss", "chatcore")):
            points = [(row.get("step"), row.get(name)) for row in metrics.get("history") or []]
            points = [point for point in points if None not in point]
            if len(points) > 1:
                curves[name] = points
        if curves:
            drawn[stage] = draw_curves(curves, folder / f"{stage}.png", TITLES[stage])
    cores = {stage: core["per_task"] for stage, core in facts["evaluation"]["core"].items()}
    if cores:
        drawn["core"] = draw_core(cores, folder / "core.png")
    return drawn


def draw_curves(curves: dict[str, list[tuple[int, float]]], path: Path, title: str) -> str:
    figure = Figure(figsize=(9.2 + 2 * (len(curves) > 2), 3.1), layout="constrained")
    for axes, (name, points), color in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), COLORS):
        marker = "o" if len(points) < 30 else None
        axes.plot(*zip(*points), color=color, linewidth=1.5, marker=marker, markersize=3.5)
        label = WORDS["curves"].get(name) or WORDS["labels"].get(name, name)
        axes.set_title(f"{title}: {label}", fontsize=11, loc="left")
        style(axes, "step")
    return save(figure, path)


def draw_core(cores: dict[str, dict], path: Path) -> str:
    """Centered accuracy by task, compared to the published ones of GPT-2 XL."""
    labels = list(dict.fromkeys(label for tasks in cores.values() for label in tasks))
    bars = {
        stage.upper(): {label: task["centered"] for label, task in tasks.items() if task.get("centered") is not None}
        for stage, tasks in cores.items()
    }
    bars["GPT-2 XL (published)"] = {label: GPT2_XL[label] for label in labels if label in GPT2_XL}
    figure = Figure(figsize=(9.2, 0.34 * len(labels) + 1.2), layout="constrained")
    axes, height = figure.subplots(), 0.8 / len(bars)
    for number, ((name, values), color) in enumerate(zip(bars.items(), [*COLORS[: len(bars) - 1], "#b8c0c8"])):
        places = [i + number * height for i, label in enumerate(labels) if label in values]
        if places:
            axes.barh(places, [values[n] for n in labels if n in values], height=height, label=name, color=color)
    axes.set_yticks([i + 0.4 - height / 2 for i in range(len(labels))], labels)
    axes.invert_yaxis()
    axes.axvline(0, color="#1d2733", linewidth=0.8)
    axes.set_title("CORE by task", fontsize=11, loc="left")
    axes.legend(frameon=False)
    style(axes, "accuracy, centered: 0 is the random baseline, 1 is perfect", "x")
    return save(figure, path)


def style(axes, label: str, lines: str = "both") -> None:
    axes.set_xlabel(label, color="#44525f")
    axes.grid(axis=lines, color="#e6eaee")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def save(figure: Figure, path: Path) -> str:
    figure.savefig(path, dpi=140)
    return f"{path.parent.name}/{path.name}"


def page(text: str, folder: Path) -> str:
    """Markdown -> one HTML file that embeds its plots."""

    def embed(match: re.Match) -> str:
        return f'src="data:image/png;base64,{base64.b64encode((folder / match[1]).read_bytes()).decode()}"'

    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
    body = re.sub(r'src="(plots/[\w.-]+\.png)"', embed, body)
    title = re.sub(r"<[^>]+>", "", body.split("</h1>")[0])
    return Template(Path(__file__).with_name("report.html").read_text()).substitute(title=title, body=body)
