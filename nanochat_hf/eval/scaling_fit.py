"""Scaling laws of the finished cells of a series (series.py): fits, confidence intervals, prediction, report.

Loss L(N, D) = E + A / N^alpha + B / D^beta: approach 3 of Hoffmann et al. (arXiv:2203.15556), but least squares of
log L. Optimum of each FLOP budget: their approach 2, a parabola of the loss over log N.
L is in bits per byte of validation text. N counts `num_scaling_parameters`, D training tokens, C training FLOPs.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import yaml
from scipy.optimize import least_squares
from scipy.special import logsumexp

from ..errors import InputError
from ..loading import load_config
from ..optim.scaling import plan
from ..run import load_json, load_metrics, renamed_keys, save_json, save_text, writing
from ..stage_configs import PretrainConfig
from .plots import draw_scaling, page
from .report import markdown

RESAMPLES = 200
LEAST, MOST = 0.01, 3.0  # alpha and beta
KEYS = ("depth", "num_parameters", "num_iterations", "total_batch_size", "val_bpb", "core", "tokens_per_second")


def make_report(folder: Path, depth: int, ratio: float, command: str | None = None) -> str:
    """Write scaling.json, scaling.md, scaling.html and plots/ of a series; returns the summary as Markdown.

    depth, ratio: the model to predict, and its tokens per parameter. command: what trained, None: as recorded before.
    A fit that the cells do not allow is {"refused": reason} in scaling.json.
    """
    cells, last = read_cells(folder)
    config, model = PretrainConfig(**renamed_keys(last["config"])), load_config(last["folder"])
    horizon = {"num_iterations": -1, "target_flops": -1, "target_param_data_ratio": ratio, "total_batch_size": -1}
    vocab_size = getattr(model, "num_tokens", None) or model.vocab_size
    size = plan(replace(config, depth=depth, warmup_steps=None, **horizon), vocab_size)
    target = {"depth": depth, "ratio": ratio, "N": size.num_scaling_parameters, "D": size.total_tokens}
    facts = {"schema": 1, "series": folder.resolve().name, "text": config.dataset, "generation": config.generation}
    facts |= {key: last.get(key) for key in ("hardware", "versions", "commit")}
    facts["command"] = command or (load_json(folder / "scaling.json", "delete it") or {}).get("command")
    facts |= {"cells": cells, "prediction": target | {"flops": size.total_flops}}
    facts["references"] = yaml.safe_load(Path(__file__).with_name("scaling.yaml").read_text("utf-8"))
    for name, fit in (("law", lambda: fit_law(cells, target)), ("optima", lambda: fit_optima(cells))):
        try:
            facts[name] = fit()
        except InputError as error:
            facts[name] = {"refused": str(error)}
    with writing(folder / "plots"):
        text = markdown(facts, draw_scaling(facts, folder / "plots"), template="scaling.jinja")
    save_json(folder / "scaling.json", facts)
    save_text(folder / "scaling.md", text)
    save_text(folder / "scaling.html", page(text, folder))
    return markdown(facts, macro="summary", template="scaling.jinja") + f"\n{folder / 'scaling.html'}"


def read_cells(folder: Path) -> tuple[list[dict], dict]:
    """The finished cells, by budget and N, and metrics.json of the largest, with its folder.

    Raises InputError if there are none, if one lacks a number, and for cells of several texts or tokenizers.
    """
    paths, cells = [path.parent for path in sorted(folder.glob("*/base/metrics.json"))], []
    records = [record | {"folder": path} for path in paths if (record := load_metrics(path) or {}).get("finished")]
    if not records:
        raise InputError(f"{folder} has no finished cell: train some first, without --fit-only")
    for record in records:
        config, names = record.get("config") or {}, ("num_scaling_parameters", "total_tokens", "total_flops")
        size, name = dict(zip("NDC", (record.get(key) or 0 for key in names))), record["folder"].parent.name
        if not all(number > 0 for number in (*size.values(), record.get("val_bpb") or 0)):
            raise InputError(f"{record['folder']}: no val bpb or size in metrics.json; delete that folder")
        by_flops = config.get("num_iterations", -1) < 1 and config.get("target_flops", -1) > 0
        budget = config["target_flops"] if by_flops else None
        cells.append({"name": name, "budget": budget} | size | {key: record.get(key) for key in KEYS})
    for key in ("data", "tokenizer"):
        if len({(record.get("inputs") or {}).get(key) for record in records}) > 1:
            raise InputError(f"the cells of {folder} differ in their {key}: put each series into its own folder")
    cells.sort(key=lambda cell: (cell["budget"] or cell["C"], cell["N"]))
    return cells, max(records, key=lambda record: record["total_flops"])


def with_intervals(fit: Callable, y: np.ndarray, expected: np.ndarray, residuals: np.ndarray, constants: int) -> dict:
    """{name: {"value", "low", "high"}} of the numbers that `fit` (values -> {name: number}) finds in y.

    The interval is the middle 95 % of fits to the expected values with normal noise (parametric bootstrap). Residuals
    of a fit with so many constants tell the size of the noise roughly: each resample draws it, by chi-squared.
    """
    rng, values = np.random.default_rng(0), fit(y)
    noise = np.sqrt((residuals**2).sum() / rng.chisquare(len(residuals) - constants, (RESAMPLES, 1)))
    samples = [fit(sample) for sample in expected + noise * rng.normal(size=(RESAMPLES, len(y)))]
    ends = {name: np.percentile([sample[name] for sample in samples], (2.5, 97.5)) for name in values}
    return {key: dict(zip(("value", "low", "high"), map(float, (values[key], *ends[key])))) for key in values}


def fit_law(cells: list[dict], target: dict) -> dict:
    """Constants of L(N, D), its optimum at the largest C = 6 N D, and the loss of `target` {"N", "D"}, with intervals.

    Raises InputError for fewer than seven cells or three depths, for cells of one ratio D / N, and where N or D turns
    out to have no effect.
    """
    logs, y = np.log([[cell[key] for cell in cells] for key in "ND"]), np.log([cell["val_bpb"] for cell in cells])
    if len(cells) < 7 or len({*logs[0]}) < 3:
        raise InputError(f"L(N, D) has five constants: {len(cells)} cells are too few, take at least 7, of 3 depths")
    if np.corrcoef(logs)[0, 1] > 0.98:
        raise InputError("all cells have about the same tokens per parameter: add --ratios, to tell N from D")
    center, budget = logs.mean(1, keepdims=True), logs.sum(0).max()  # log of C / 6
    features = logs - center
    grid = product((0.3, 0.6, 0.9), (0.2, 0.5, 1.0), (0.2, 0.5, 1.0))  # share of E at the center, alpha, beta
    starts = [np.append(np.log([e, (1 - e) / 2, (1 - e) / 2]) + y.mean(), powers) for e, *powers in grid]
    best = minimum(features, y, starts)
    expected, shares = logsumexp(terms(best, features), axis=0), np.exp(terms(best, features) - y)
    if min(shares[1:].max(1)) < 1e-3 or not all((best[3:] > LEAST) & (best[3:] < MOST)):
        raise InputError("the cells do not show both A / N^alpha and B / D^beta: take larger budgets, or more of them")

    def numbers(values: np.ndarray) -> dict[str, float]:
        theta = minimum(features, values, [best])
        (alpha, beta), (a, b) = theta[3:], theta[1:3] + theta[3:] * center[:, 0]
        size = (math.log(alpha / beta) + a - b + beta * budget) / (alpha + beta)  # log N of the optimum
        predicted = logsumexp(terms(theta, np.log([[target["N"]], [target["D"]]]) - center))
        optimum = {"N exponent": beta / (alpha + beta), "D exponent": alpha / (alpha + beta)}
        exponentials = {"E": theta[0], "A": a, "B": b, "ratio": budget - 2 * size, "prediction": predicted}
        constants = {"alpha": alpha, "beta": beta}  # e^99: of a resample without an optimum
        return constants | optimum | {key: math.exp(min(value, 99)) for key, value in exponentials.items()}

    facts = {"budget": 6 * math.exp(budget), "residual": float(np.abs(y - expected).max())}
    return facts | with_intervals(numbers, y, expected, y - expected, len(best))


def terms(theta: np.ndarray, features: np.ndarray) -> np.ndarray:
    """Logs of E, A / N^alpha, B / D^beta, (3, n), at log N and log D, (2, n). theta: logs of E, A, B; alpha; beta."""
    return np.vstack([np.full(features.shape[1], theta[0]), theta[1:3, None] - theta[3:, None] * features])


def minimum(features: np.ndarray, y: np.ndarray, starts: list[np.ndarray]) -> np.ndarray:
    """The theta of `terms` with the smallest sum of squares that a start leads to; y: log L."""

    def errors(theta):
        return logsumexp(terms(theta, features), axis=0) - y

    bounds = [-30] * 3 + [LEAST] * 2, [30] * 3 + [MOST] * 2
    return min((least_squares(errors, each, bounds=bounds) for each in starts), key=lambda fit: fit.cost).x


def fit_optima(cells: list[dict]) -> dict:
    """Optimal N, D, tokens per parameter and loss of each budget that has at least four depths, with intervals.

    A budget whose best depth is the smallest or largest is {"refused": reason}. InputError if none has four depths.
    """
    flops = sorted({cell["budget"] for cell in cells} - {None})
    groups = {f: group for f in flops if len(group := [cell for cell in cells if cell["budget"] == f]) > 3}
    if not groups:
        raise InputError("a parabola per budget needs at least four depths at one of --budgets")
    points = {f: np.log([[cell[key] for key in ("N", "D")] for cell in group]).T for f, group in groups.items()}
    loss = {f: np.array([cell["val_bpb"] for cell in group]) for f, group in groups.items()}
    expected = {f: np.polyval(np.polyfit(points[f][0], loss[f], 2), points[f][0]) for f in groups}
    residuals, rows = np.concatenate([loss[f] - expected[f] for f in groups]), []
    for f in groups:
        fits = with_intervals(partial(lowest, *points[f]), loss[f], expected[f], residuals, 3 * len(groups))
        edge = fits["N"]["value"] in [math.exp(n) for n in points[f][0][[0, -1]]]
        rows.append({"budget": f} | ({"refused": "the best depth is the smallest or largest"} if edge else fits))
    return {"budgets": rows}


def lowest(sizes: np.ndarray, tokens: np.ndarray, loss: np.ndarray) -> dict[str, float]:
    """The lowest point of the parabola through the losses at these log N, with log D, not beyond the outer ones."""
    points = np.linspace(sizes[0], sizes[-1], 5001)
    curve = np.polyval(np.polyfit(sizes, loss, 2), points)
    size = points[curve.argmin()]
    total = np.interp(size, sizes, tokens)
    return {"N": math.exp(size), "D": math.exp(total), "ratio": math.exp(total - size), "loss": curve.min()}
