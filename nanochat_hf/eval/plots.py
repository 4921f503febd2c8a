"""The report card's pictures, and the page that holds them: facts -> plots/*.png, Markdown -> one HTML file."""

import base64
import re
from pathlib import Path

from markdown_it import MarkdownIt
from matplotlib.figure import Figure

from .sections import GPT2_XL, TITLES

CURVES = {"base": ("train_loss", "val_bpb", "core"), "rl": ("reward", "pass@1", "completion_length")}
NAMES = {"train_loss": "training loss", "val_loss": "validation loss", "val_bpb": "validation bits per byte"}
NAMES |= {"core": "centered mean (CORE)", "chatcore": "centered mean (ChatCORE)"}
NAMES |= {"pass@1": "accuracy on test questions", "completion_length": "tokens in an answer"}
COLORS = ("#2f6f9f", "#d9822b", "#4c9a5f", "#9a5fb0", "#888888")
STYLE = """
body{font:15px/1.55 system-ui,-apple-system,"Segoe UI",sans-serif;color:#1d2733;background:#fff;max-width:62rem;
  margin:0 auto;padding:2rem 1.25rem 4rem}
h1{font-size:1.7rem;border-bottom:3px solid #2f6f9f;padding-bottom:.5rem}
h2{font-size:1.25rem;margin-top:2.6rem;border-bottom:1px solid #d8dee5;padding-bottom:.3rem}
h3{font-size:1.02rem;margin-top:1.8rem;color:#44525f}
table{border-collapse:collapse;margin:1rem 0;font-variant-numeric:tabular-nums;display:block;overflow-x:auto}
th,td{padding:.28rem .8rem;border-bottom:1px solid #e6eaee;vertical-align:top;text-align:left}
th{border-bottom:2px solid #b9c4ce;white-space:nowrap}thead:not(:has(th:not(:empty))){display:none}
tbody tr:hover{background:#f4f7fa}
img{max-width:100%;display:block;margin:1.2rem 0}
blockquote{color:#44525f;border-left:3px solid #c9d3dc;margin:.5rem 0;padding:.05rem 0 .05rem .9rem}
blockquote p{margin:.25rem 0}
"""


def plots(facts: dict, folder: Path) -> dict[str, str]:
    """Draw what there is to draw; section -> path of its picture below the run folder. Older pictures go."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in (*TITLES, "core"):
        (folder / f"{name}.png").unlink(missing_ok=True)
    drawn = {}
    for stage, metrics in facts["stages"].items():
        history = metrics.get("history") or []
        curves = {name: points(history, name) for name in CURVES.get(stage, ("train_loss", "val_loss", "chatcore"))}
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
    shown = {name: curve for name, curve in curves.items() if len(curve[0]) > 1}
    figure = Figure(figsize=(9.2 + 2 * (len(shown) > 2), 3.1), layout="constrained")
    for axes, (name, (x, y)), color in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown.items(), COLORS):
        axes.plot(x, y, color=color, linewidth=1.5, marker="o" if len(x) < 30 else None, markersize=3.5)
        axes.set_title(f"{title}: {NAMES.get(name, name)}", fontsize=11, loc="left")
        tidy(axes, "step")
    return save(figure, path)


def draw_core(cores: dict[str, dict], path: Path) -> str:
    """Centered accuracy by task, beside those that are published of GPT-2 XL."""
    labels = list(dict.fromkeys(label for tasks in cores.values() for label in tasks))
    bars = {
        stage.upper(): {label: task["centered"] for label, task in tasks.items() if task["centered"] is not None}
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
    tidy(axes, "accuracy, centered: 0 is guessing, 1 is perfect", "x")
    return save(figure, path)


def tidy(axes, label: str, lines: str = "both") -> None:
    axes.set_xlabel(label, color="#44525f")
    axes.grid(axis=lines, color="#e6eaee")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def save(figure: Figure, path: Path) -> str:
    figure.savefig(path, dpi=140)
    return f"{path.parent.name}/{path.name}"


def page(text: str, folder: Path) -> str:
    """Markdown -> one HTML file with its pictures inside."""

    def inline(match: re.Match) -> str:
        data = base64.b64encode((folder / match.group(1)).read_bytes()).decode()
        return f'src="data:image/png;base64,{data}"'

    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
    body = re.sub(r'src="(plots/[\w.-]+\.png)"', inline, body)
    title = re.sub(r"<[^>]+>", "", body.split("</h1>")[0])
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    return f'<!doctype html><html lang="en">{head}<title>{title}</title><style>{STYLE}</style>\n{body}</html>\n'
