"""Scaling laws of the finished cells of a series (series.py): fits, confidence intervals, prediction, report.

Loss L(N, D) = E + A / N^alpha + B / D^beta: approach 3 of Hoffmann et al. (arXiv:2203.15556), a Huber loss on log L by
L-BFGS from many starts. Optimum of each FLOP budget: their approach 2, a parabola of the loss over log N.
L is in bits per byte of validation text. N counts `num_scaling_parameters`, D training tokens, C training FLOPs.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import yaml
from scipy.optimize import minimize
from scipy.special import huber, logsumexp

from ..errors import InputError
from ..optim.scaling import plan
from ..run import load_json, load_metrics, renamed_keys, save_json, save_text, writing
from ..stage_configs import PretrainConfig
from .plots import draw_scaling, page
from .report import markdown

DELTA = 1e-3  # of the Huber loss, in nats of log L, as Hoffmann et al.
RESAMPLES = 200
KEYS = ("depth", "num_parameters", "num_iterations", "total_batch_size", "val_bpb", "core", "tokens_per_second")


def make_report(folder: Path, depth: int, ratio: float, command: str | None = None) -> str:
    """Write scaling.json, scaling.md, scaling.html and plots/ of a series; returns the summary as Markdown.

    depth, ratio: the model to predict, and its tokens per parameter. command: what trained, None: as recorded before.
    A fit that the cells do not allow is {"refused": reason} in scaling.json.
    """
    cells, last = read_cells(folder)
    config, model = PretrainConfig(**renamed_keys(last["config"])), load_json(last["folder"] / "config.json")
    horizon = {"num_iterations": -1, "target_flops": -1, "target_param_data_ratio": ratio, "total_batch_size": -1}
    size = plan(replace(config, depth=depth, **horizon), model["num_tokens"] or model["vocab_size"])
    target = {"depth": depth, "ratio": ratio, "N": size.num_scaling_parameters, "D": size.total_tokens}
    references = yaml.safe_load(Path(__file__).with_name("scaling.yaml").read_text("utf-8"))
    facts = {"schema": 1, "series": folder.resolve().name, "text": config.dataset, "generation": config.generation}
    facts |= {"cells": cells, "prediction": target | {"flops": size.total_flops}, "references": references}
    facts |= {key: last.get(key) for key in ("hardware", "versions", "commit")}
    facts["command"] = command or (load_json(folder / "scaling.json") or {}).get("command")
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

    Raises InputError if there are none, or of several texts or tokenizers.
    """
    records, cells = [], []
    for path in sorted(folder.glob("*/base/metrics.json")):
        metrics = (load_metrics(path.parent) or {}) | {"folder": path.parent}
        if metrics.get("finished"):
            if None in (n := metrics.get("num_scaling_parameters"), metrics.get("val_bpb")):
                raise InputError(f"{path}: no val bpb or parameter count; train it again, not with eval_every: 0")
            records.append(metrics)
            horizon = {"N": n, "D": metrics["total_tokens"], "C": metrics["total_flops"]}
            by_flops = metrics["config"]["num_iterations"] < 1 and metrics["config"]["target_flops"] > 0
            horizon["budget"] = metrics["config"]["target_flops"] if by_flops else None
            cells.append({"name": path.parts[-3]} | horizon | {key: metrics.get(key) for key in KEYS})
    if not cells:
        raise InputError(
            f"{folder} has no finished cell: train some first, with nanochat scaling RECIPE --run-dir DIR"
        )
    for key in ("data", "tokenizer"):
        if len({(metrics.get("inputs") or {}).get(key) for metrics in records}) > 1:
            raise InputError(
                f"the cells of {folder} differ in their {key}: put those of each series into its own folder"
            )
    cells.sort(key=lambda cell: (cell["budget"] or cell["C"], cell["N"]))
    return cells, max(records, key=lambda metrics: metrics["total_flops"])


def with_intervals(fit: Callable, y: np.ndarray, expected: np.ndarray, constants: int) -> dict[str, dict]:
    """{name: {"value", "low", "high"}} of the numbers that `fit` (values -> {name: number}) finds in y.

    The interval is the middle 95 % of fits to the expected values with normal noise of the residuals' size, for n -
    constants degrees of freedom (parametric bootstrap). Resampled residuals would give narrower ones: this Huber loss
    lets the curve pass through as many points as it has constants.
    """
    noise, rng = math.sqrt(((y - expected) ** 2).sum() / (len(y) - constants)), np.random.default_rng(0)
    samples = [fit(expected + rng.normal(0, noise, len(y))) for _ in range(RESAMPLES)]
    numbers = {}
    for name, value in fit(y).items():
        low, high = np.percentile([sample[name] for sample in samples], (2.5, 97.5))
        numbers[name] = {"value": float(value), "low": float(low), "high": float(high)}
    return numbers


def fit_law(cells: list[dict], target: dict) -> dict:
    """Constants of L(N, D), its optimum at the largest C = 6 N D, and the loss of `target` {"N", "D"}, with intervals.

    Raises InputError for fewer than seven cells or three depths, and for cells of one ratio D / N.
    """
    logs, y = np.log([[cell[key] for cell in cells] for key in "ND"]), np.log([cell["val_bpb"] for cell in cells])
    if len(cells) < 7 or len({*logs[0]}) < 3:
        raise InputError(f"L(N, D) has five constants: {len(cells)} cells are too few, take at least 7, of 3 depths")
    if np.corrcoef(logs)[0, 1] > 0.98:
        raise InputError(
            "all cells have about the same tokens per parameter, so N and D have one effect: add --ratios"
        )
    center, budget = logs.mean(1, keepdims=True), logs.sum(0).max()  # log of C / 6
    features, scale = logs - center, y.mean()
    grid = product((0.3, 0.6, 0.9), (0.2, 0.5, 1.0), (0.2, 0.5, 1.0))  # share of E at the center, alpha, beta
    starts = [np.append(np.log([e, (1 - e) / 2, (1 - e) / 2]) + scale, powers) for e, *powers in grid]
    best = minimum(features, y, starts)

    def numbers(values: np.ndarray) -> dict[str, float]:
        theta = minimum(features, values, [best])
        (alpha, beta), powers = theta[3:], theta[3:].sum()
        a, b = theta[1:3] + theta[3:] * center[:, 0]
        size = (math.log(alpha / beta) + a - b + beta * budget) / powers  # log N of the optimum
        predicted = logsumexp(terms(theta, np.log([[target["N"]], [target["D"]]]) - center))
        constants = {"E": math.exp(theta[0]), "A": math.exp(a), "alpha": alpha, "B": math.exp(b), "beta": beta}
        optimum = {"N exponent": beta / powers, "D exponent": alpha / powers, "ratio": math.exp(budget - 2 * size)}
        return constants | optimum | {"prediction": math.exp(predicted)}

    expected = logsumexp(terms(best, features), axis=0)
    facts = {"budget": 6 * math.exp(budget), "residual": float(np.abs(y - expected).max())}
    return facts | with_intervals(numbers, y, expected, len(best))


def terms(theta: np.ndarray, features: np.ndarray) -> np.ndarray:
    """Logs of E, A / N^alpha, B / D^beta, (3, n), at log N and log D, (2, n). theta: logs of E, A, B; alpha; beta."""
    return np.vstack([np.full(features.shape[1], theta[0]), theta[1:3, None] - theta[3:, None] * features])


def minimum(features: np.ndarray, y: np.ndarray, starts: list[np.ndarray]) -> np.ndarray:
    """The theta of `terms` with the smallest sum of Huber losses that a start leads to; y: log L."""

    def objective(theta):
        parts = terms(theta, features)
        errors = (logsumexp(parts, axis=0) - y) / DELTA
        slopes = np.exp(parts - logsumexp(parts, axis=0)) * np.clip(errors, -1, 1) / DELTA
        return huber(1, errors).sum(), np.append(slopes.sum(1), -(slopes[1:] * features).sum(1))

    options = {"jac": True, "method": "L-BFGS-B", "bounds": [(-30, 30)] * 3 + [(0.01, 3)] * 2}
    options["options"] = {"maxiter": 500, "ftol": 1e-10}
    return min((minimize(objective, start, **options) for start in starts), key=lambda fit: fit.fun).x


def fit_optima(cells: list[dict]) -> dict:
    """Optimal N, D and loss of each budget with four depths, and the exponents of N ~ C^a and D ~ C^b, with intervals.

    A budget whose best depth is the smallest or largest is {"refused": reason}. InputError if none has four depths.
    """
    groups = [
        [c for c in cells if c["budget"] == flops] for flops in sorted({c["budget"] for c in cells if c["budget"]})
    ]
    groups = [group for group in groups if len(group) > 3]
    if not groups:
        raise InputError("a parabola per budget needs at least four depths at one of --budgets")
    budgets, ends = [group[0]["budget"] for group in groups], np.cumsum([len(group) for group in groups])[:-1]
    sizes, tokens = ([np.log([cell[key] for cell in group]) for group in groups] for key in "ND")
    loss = np.array([cell["val_bpb"] for group in groups for cell in group])

    def curves_of(values: np.ndarray) -> list[np.ndarray]:
        return [np.polyfit(x, part, 2) for x, part in zip(sizes, np.split(values, ends))]

    def lowest(curve: np.ndarray, x: np.ndarray) -> float:
        ends = x[[0, -1]]
        return np.clip(-curve[1] / (2 * curve[0]), *ends) if curve[0] > 0 else ends[np.polyval(curve, ends).argmin()]

    curves = curves_of(loss)
    inside = [i for i, (curve, x) in enumerate(zip(curves, sizes)) if lowest(curve, x) not in x[[0, -1]]]

    def numbers(values: np.ndarray) -> dict[str, float]:
        curves = curves_of(values)
        best = {i: lowest(curves[i], sizes[i]) for i in inside}
        trained = {i: np.interp(best[i], sizes[i], tokens[i]) for i in inside}
        named = {"N": best, "D": trained, "ratio": {i: trained[i] - best[i] for i in inside}}
        optima = {(key, i): math.exp(values[i]) for key, values in named.items() for i in inside}
        optima |= {("loss", i): np.polyval(curves[i], best[i]) for i in inside}
        if len(inside) > 1:
            logs = np.log([budgets[i] for i in inside])
            optima |= {(key, None): np.polyfit(logs, [*named[key].values()], 1)[0] for key in "ND"}
        return optima

    expected = np.concatenate([np.polyval(curve, x) for curve, x in zip(curves, sizes)])
    fits, edge = with_intervals(numbers, loss, expected, 3 * len(groups)), "the best depth is the smallest or largest"
    rows = [{"budget": flops, "curve": list(curve), "refused": edge} for flops, curve in zip(budgets, curves)]
    for i in inside:
        rows[i] = rows[i] | {"refused": None} | {key: fits[key, i] for key in ("N", "D", "ratio", "loss")}
    return {"budgets": rows} | {f"{key} exponent": fits[key, None] for key in "ND" if (key, None) in fits}
