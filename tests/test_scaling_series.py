"""`nanochat scaling`: cells, the queue, resuming, fits of losses whose law is known, and the report."""

import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from threading import Timer
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.figure import Figure

from nanochat_hf import cli, series, stages
from nanochat_hf.errors import InputError
from nanochat_hf.eval import scaling_fit
from nanochat_hf.eval.plots import draw_scaling
from nanochat_hf.run import Run, duration, load_json, save_json
from nanochat_hf.series import Cell, SeriesConfig, make_cells, train_cells
from nanochat_hf.stage_configs import PretrainConfig
from nanochat_hf.train.pretrain import Pretraining

ROOT = Path(__file__).parent.parent
LAW = {"E": 0.6, "A": 30.0, "alpha": 0.35, "B": 60.0, "beta": 0.30}
SIZES, BUDGETS = (1.2e7, 2.3e7, 4.2e7, 7e7, 1.1e8), (1e16, 3e16, 1e17)
D24 = {"N": 7.3e8, "D": 5.8e9}


def loss(n: float, d: float) -> float:
    return LAW["E"] + LAW["A"] / n ** LAW["alpha"] + LAW["B"] / d ** LAW["beta"]


def grid_of_losses(noise: float = 0.0, seed: int = 0) -> list[dict]:
    rng = np.random.default_rng(seed)
    pairs = [(n, c / 6 / n, c) for c in BUDGETS for n in SIZES]
    return [
        {"N": n, "D": d, "C": c, "budget": c, "val_bpb": loss(n, d) * np.exp(noise * rng.normal())}
        for n, d, c in pairs
    ]


def test_the_fit_finds_the_constants_of_a_law_and_its_intervals_cover_them(monkeypatch):
    monkeypatch.setattr(scaling_fit, "RESAMPLES", 2)
    exact = scaling_fit.fit_law(grid_of_losses(), D24)
    for name, value in LAW.items():
        assert exact[name]["value"] == pytest.approx(value, rel=0.02), name
    exponent = LAW["beta"] / (LAW["alpha"] + LAW["beta"])
    # dL = 0 at 6 N D = C gives alpha A / N^alpha = beta B / D^beta
    best = (LAW["alpha"] * LAW["A"] / LAW["beta"] / LAW["B"]) ** (1 / (LAW["alpha"] + LAW["beta"]))
    best *= (1e17 / 6) ** exponent
    truth = {**LAW, "N exponent": exponent, "D exponent": 1 - exponent, "ratio": 1e17 / 6 / best**2}
    truth["prediction"] = loss(D24["N"], D24["D"])
    assert exact["ratio"]["value"] == pytest.approx(truth["ratio"], rel=0.02)
    monkeypatch.setattr(scaling_fit, "RESAMPLES", 30)
    fits = [scaling_fit.fit_law(grid_of_losses(0.003, seed), D24) for seed in range(4)]
    for name in ("N exponent", "D exponent", "ratio", "prediction"):  # four simulated grids do not show 95 %
        assert sum(fit[name]["low"] < truth[name] < fit[name]["high"] for fit in fits) >= 3, name


def test_intervals_are_as_wide_as_students_t_asks(monkeypatch):
    monkeypatch.setattr(scaling_fit, "RESAMPLES", 20000)
    y = np.array([1.0, 2, 4, 5, 9, 3])
    mean, error = y.mean(), y.std(ddof=1) / 6**0.5
    fit = scaling_fit.with_intervals(lambda y: {"mean": y.mean()}, y, np.full(6, mean), y - mean, 1)["mean"]
    assert fit["value"] == mean  # 1.96 errors would be .7 off
    assert [fit["low"], fit["high"]] == pytest.approx([mean - 2.571 * error, mean + 2.571 * error], abs=0.1)


def test_the_optimum_of_each_budget_is_that_of_its_parabola(monkeypatch):
    monkeypatch.setattr(scaling_fit, "RESAMPLES", 40)
    cells, rng = grid_of_losses(), np.random.default_rng(1)
    for cell in cells:  # a valley at N = 4e7 (C / 3e16)^.4, the loss there 1 / log C
        cell["best"] = 4e7 * (cell["C"] / 3e16) ** 0.4
        cell["val_bpb"] = 30 / np.log(cell["C"]) + 0.01 * np.log(cell["N"] / cell["best"]) ** 2
    optima = scaling_fit.fit_optima(cells)
    for row, budget in zip(optima["budgets"], BUDGETS):
        best = 4e7 * (budget / 3e16) ** 0.4
        assert row["N"]["value"] == pytest.approx(best, rel=1e-3) and row["loss"]["value"] == pytest.approx(
            30 / np.log(budget)
        )
        assert row["D"]["value"] == pytest.approx(budget / 6 / best, rel=1e-3) and "refused" not in row
        assert row["ratio"]["value"] == pytest.approx(budget / 6 / best**2, rel=1e-3)
        assert row["N"]["low"] == pytest.approx(row["N"]["high"], rel=2e-3)
    noisy = [cell | {"val_bpb": cell["val_bpb"] + 3e-4 * rng.normal()} for cell in cells]
    for row in scaling_fit.fit_optima(noisy)["budgets"]:
        assert row["N"]["low"] < 4e7 * (row["budget"] / 3e16) ** 0.4 < row["N"]["high"]


REFUSED = [  # fit, what is done to the cells, and why they are refused
    ("law", lambda cells: cells[:6], "6 cells are too few, take at least 7, of 3 depths"),
    ("law", lambda cells: [c for c in cells if c["N"] in SIZES[:2]] * 2, "too few"),
    ("law", lambda cells: [c | {"D": 8 * c["N"]} for c in cells], "the same tokens per parameter.*add --ratios"),
    ("law", lambda cells: [c | {"val_bpb": 40 / c["D"] ** 0.2} for c in cells], "do not show both A / N.alpha and"),
    ("optima", lambda cells: [c | {"budget": None} for c in cells], "at least four depths at one of --budgets"),
    ("optima", lambda cells: cells[:3] + cells[5:8], "at least four depths"),
]


@pytest.mark.parametrize("name,change,message", REFUSED)
def test_too_little_for_a_fit_is_refused(name, change, message):
    with pytest.raises(InputError, match=message):
        scaling_fit.fit_law(change(grid_of_losses()), D24) if name == "law" else scaling_fit.fit_optima(
            change(grid_of_losses())
        )


# cell of vocabulary 32,768: tokens per step by 2^19 (D / 1.321e9)^.383, steps = C / FLOPs per token / tokens per step,
# warmup steps, with the FLOPs per token of test_scaling.SECOND
BY_BUDGET = {"d4-1e16": (2**18, 476, 40), "d12-1e16": (2**16, 201, 20), "d12-1e17": (2**18, 502, 40)}


def test_cells_of_budgets_ratios_and_the_recipes_own_horizon(capsys):
    base = PretrainConfig(num_iterations=7, total_batch_size=-1)
    cells = {cell.name: cell for cell in make_cells(base, SeriesConfig(depths=[12, 4], budgets=[1e17, 1e16]), 32768)}
    assert list(cells) == ["d4-1e16", "d12-1e16", "d4-1e17", "d12-1e17"]
    for name, (batch, steps, warmup) in BY_BUDGET.items():
        plan = cells[name].plan
        assert (plan.total_batch_size, plan.num_iterations, plan.schedule.warmup_steps) == (batch, steps, warmup), name
        assert plan.total_flops == pytest.approx(float(name.partition("-")[2]), rel=0.01)
    assert cells["d4-1e16"].plan.num_scaling_parameters == 12 * 256**2 * 4 + 2 * 12 * 2 + 256 * 32768  # + gates, head
    ratio, other = make_cells(base, SeriesConfig(depths=[4], ratios=[8, 10.5]), 32768)
    assert (ratio.name, other.name) == ("d4-ratio8", "d4-ratio10.5") and ratio.config.num_iterations == -1
    assert ratio.plan.total_tokens / ratio.plan.num_scaling_parameters == pytest.approx(8, rel=0.01)
    for recipe, number in (("scaling/cpu", 12), ("scaling/gpu", 15)):
        configs, grid = series.read_series([recipe], {})
        assert len(make_cells(configs["base"], grid, configs["tokenizer"].vocab_size)) == number
    assert series.read_series(["scaling/cpu"], {"ratios": [9]})[1] == SeriesConfig(depths=[2, 3, 4, 6], ratios=[9])
    (own,) = make_cells(base, SeriesConfig(depths=[4]), 32768)
    assert (own.name, own.plan.num_iterations) == ("d4", 7)
    cli.dispatch("scaling", ["scaling/gpu", "--run-dir=s", "--dry-run", "--gpus=2"])
    assert " on 2 x H200, $" in capsys.readouterr().out


@pytest.mark.parametrize("gpus, where", [(None, "this CPU"), (1, "1 x H200"), (3, "3 x H200")])
def test_the_times_of_cells_follow_from_tokens_and_speed(monkeypatch, capsys, gpus, where):
    """300 steps of 2^18 tokens and 4 evaluations, without backward pass, of 3 x 2^20; 35 s to begin with."""
    monkeypatch.setattr("os.cpu_count", lambda: 2)  # of 5e10 FLOPs per second
    grid = SeriesConfig(depths=[4, 12])
    base = PretrainConfig(num_iterations=300, total_batch_size=2**18, eval_every=100, eval_tokens=3 * 2**20)
    series.show_cells({"base": base, "tokenizer": SimpleNamespace(vocab_size=32768)}, grid, gpus)
    plans = [cell.plan for cell in make_cells(base, grid, 32768)]
    speeds = (0.162 * 989e12, 0.515 * 989e12) if gpus else (1e11, 1e11)  # the MFU of d4 and d12 on one H200
    seconds = [(300 * 2**18 + 4 * 2**20) * p.flops_per_token / speed + 35 for p, speed in zip(plans, speeds)]
    *rows, _, total = capsys.readouterr().out.splitlines()
    assert [row.split("|")[-2].strip() for row in rows[-2:]] == [*map(duration, seconds)]
    longest, flops = duration(max(*seconds, sum(seconds) / (gpus or 1))), sum(plan.total_flops for plan in plans)
    price = f", ${sum(seconds) / 1200:.2f} at $3 per GPU-hour" if gpus else ""
    assert total == f"2 cells, {flops:.2e} FLOPs: about {longest} on {where}{price} (projected, roughly)"


def test_the_queue_gives_each_free_gpu_the_next_cell_and_a_failure_stops_no_other(capsys, tmp_path, monkeypatch):
    busy, sent, stopped, run = set(), [], [], Run(tmp_path)

    def start(cell, device, *_):
        if cell.name == "fatal":
            raise KeyboardInterrupt
        assert device not in busy, "two cells on one GPU"
        busy.add(device)
        sent.append((cell.name, len(busy)))
        read, write = os.pipe()
        save_json(tmp_path / cell.name / "base" / "metrics.json", {"finished": cell.name != "bad", "val_bpb": 1.0})
        Timer(0.02, lambda: (busy.discard(device), os.close(write))).start()
        end = lambda: stopped.append(cell.name)  # noqa: E731
        return SimpleNamespace(sentinel=read, exitcode=3, join=lambda: None, terminate=end)

    monkeypatch.setattr(series, "start", start)
    cells = [Cell(name, None, None) for name in ("a", "bad", "c", "d", "e")]
    assert train_cells(cells, ["0", "3"], run, {}) == ["bad"]
    assert [name for name, _ in sent] == ["a", "bad", "c", "d", "e"] and {number for _, number in sent} == {1, 2}
    out = capsys.readouterr().out
    assert out.count("/5] ") == 5 and "bad: failed with exit code 3" in out and not stopped
    with pytest.raises(KeyboardInterrupt):
        train_cells([Cell("a", None, None), Cell("fatal", None, None)], ["0", "3"], run, {})
    assert stopped == ["a"]


def test_devices_are_the_visible_gpus(monkeypatch):
    assert series.devices_here(None) == [None]
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,7")
    assert (series.devices_here(None), series.devices_here(2)) == (["4", "5", "7"], ["4", "5"])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert series.devices_here(None) == ["0", "1", "2"]
    started, cell = [], Cell("d4", "config", None)
    process = SimpleNamespace(start=lambda: started.append("at once"))
    context = SimpleNamespace(Process=lambda target, args: started.append((target, *args)) or process)
    monkeypatch.setattr(series, "get_context", lambda kind: context)
    assert series.start(cell, "5", Run("s"), {"a": 1}) is process
    assert started[0][1].path == Path("s/d4") and started[0][2:] == ("5", "config", {"a": 1})
    assert started[0][0] is series.train_cell and started[1:] == ["at once"]


TINY = "scaling/cpu --budgets 5e9 base.eval_tokens=2048 base.save_every=3 base.max_seq_len=64 "
TINY += "tokenizer.max_chars=50000 base.total_batch_size=512 base.device_batch_size=8"


@pytest.fixture
def here(monkeypatch, tmp_path, fresh_accelerator):
    """Runs `nanochat scaling` with every cell in this process."""

    def start(cell, device, run, options):
        stages.run_stage("base", cell.config, Run(run.path / cell.name), **options)
        return SimpleNamespace(sentinel=os.open(os.devnull, os.O_RDONLY), join=lambda: None, exitcode=0)

    monkeypatch.setattr(series, "start", start)
    monkeypatch.setattr(series.connection, "wait", list)

    def scaling(folder: str, *words: str) -> dict:
        depths = [] if "--depths=4" in words else ["--depths=2,3"]
        cli.dispatch("scaling", [*TINY.split(), *depths, "--run-dir", str(tmp_path / folder), *words])
        return {name: Run(tmp_path / folder / name).metrics("base") for name in ("d2-5e9", "d3-5e9")}

    return scaling


def test_a_series_that_was_killed_equals_one_that_was_not(here, monkeypatch, tmp_path, capsys):
    whole, step = here("whole"), Pretraining.train_step

    def killed(self):
        if self.plan.model_config.num_hidden_layers == 3 and self.step == 5:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(Pretraining, "train_step", killed)
    with pytest.raises(KeyboardInterrupt):
        here("killed")
    assert not (tmp_path / "killed" / "d3-5e9" / "base" / "metrics.json").exists()
    monkeypatch.setattr(Pretraining, "train_step", step)
    capsys.readouterr()
    resumed = here("killed")
    out = capsys.readouterr().out
    assert "2 cells, 1 of them finished" in out and "resuming at step 3" in out and "2 cells are too few" in out
    for name, metrics in whole.items():
        assert metrics["weights"] == resumed[name]["weights"] and metrics["val_bpb"] == resumed[name]["val_bpb"]
    with pytest.raises(InputError, match=r"recipe changed since .*d2-5e9/base finished \(seed: 0 -> 1\)"):
        here("killed", "base.seed=1")
    with pytest.raises(InputError, match=r"recipe changed since .*d2-5e9/base finished \(seed: 0 -> 1\)"):
        here("killed", "base.seed=1", "--depths=4")  # which would join one fit with the others
    with pytest.raises(InputError, match=r"recipe changed since .*/tokenizer finished \(vocab_size: 512 -> 600\)"):
        here("killed", "tokenizer.vocab_size=600")
    assert load_json(tmp_path / "killed" / "scaling.json")["command"].startswith(
        "nanochat scaling scaling/cpu --budgets"
    )
    calls = []
    monkeypatch.setattr(series, "devices_here", lambda gpus: ["0", "1"])
    monkeypatch.setattr(series, "train_cells", lambda *of: calls.append(of) or ["d3-5e9"])
    with pytest.raises(InputError, match="no finished cell"):
        here("two")
    assert [cell.name for cell in calls[0][0]] == ["d3-5e9", "d2-5e9"]  # the longest first
    with Run(tmp_path / "killed").lock(), pytest.raises(InputError, match="another process works on"):
        here("killed")


def test_a_report_of_cells_with_core_has_all_plots_and_the_reference_marks(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(scaling_fit, "RESAMPLES", 10)
    for cell in make_cells(PretrainConfig(), SeriesConfig(depths=[4, 6, 8, 12], budgets=[1e17, 1e18]), 32768):
        bpb = loss(cell.plan.num_scaling_parameters, cell.plan.total_tokens)
        record = {"finished": True, "config": asdict(cell.config), "val_bpb": bpb, "core": 1 - bpb}
        record |= {"inputs": {"data": "a", "tokenizer": "b"}, **cell.plan.summary()}
        save_json(tmp_path / cell.name / "base" / "metrics.json", record)
        cell.plan.model_config.save_pretrained(tmp_path / cell.name / "base")
    cli.dispatch("scaling", ["--run-dir", str(tmp_path), "--fit-only", "--predict-ratio", "8"])
    assert "**Prediction** for d24 at 8 tokens per parameter (N 729.8M, D 5.8B" in capsys.readouterr().out
    text, facts = (tmp_path / "scaling.md").read_text(), load_json(tmp_path / "scaling.json")
    assert facts["law"]["prediction"]["value"] == pytest.approx(
        loss(facts["prediction"]["N"], facts["prediction"]["D"]), rel=0.01
    )
    for part in ("GPT-2 XL", "0.2565", "nanochat d24", "ClimbMix", "| d12-1e18 |", "the best depth is the smallest"):
        assert part in text, part
    names = {path.name for path in (tmp_path / "plots").iterdir()}
    assert names == {"val_bpb.png", "core.png", "isoflop.png"}
    assert (tmp_path / "scaling.html").read_text().count("data:image/png;base64") == 3
    record["inputs"]["data"] = "other text"
    for change, message in (({}, "differ in their data"), ({"val_bpb": None}, "d4-1e17/base: no val bpb or size in")):
        save_json(tmp_path / "d4-1e17" / "base" / "metrics.json", record | change)
        with pytest.raises(InputError, match=message):
            scaling_fit.read_cells(tmp_path)


def test_the_plots_of_a_series_are_these_points(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: figures.append(figure.axes[0]))
    rows = [(12, 2e17, 4e7, 0.7, 0.2), (12, 1e16, 3e7, 1.0, None), (4, 2e17, 1e7, 0.8, 0.1), (4, 1e16, 9e6, 0.9, 0.05)]
    cells = [dict(zip(("depth", "C", "N", "val_bpb", "core"), row)) | {"budget": row[1]} for row in rows]
    cells += [cells[0] | {"budget": None}, cells[3] | {"N": 2e7, "val_bpb": 0.85, "core": None}]
    marks = [{"name": "line", "core": 0.3}, {"name": "far", "flops": 2e21, "core": 0.5, "val_bpb": 0.5}]
    marks.append({"name": "near", "flops": 1e21, "val_bpb": 0.6, "text": "books"})
    best = {"budget": 1e16, "N": {"value": 2.2e7}, "loss": {"value": 0.84}}
    facts = {"cells": cells, "references": marks, "prediction": {"depth": 24, "flops": 1e19}}
    facts |= {"law": {"prediction": {"value": 0.65}}, "optima": {"budgets": [best]}}
    names = [f"{tmp_path.name}/{name}.png" for name in ("val_bpb", "core", "isoflop")]
    assert draw_scaling(facts, tmp_path) == names
    assert draw_scaling({**facts, "law": {}, "optima": {}}, tmp_path) == names[:2]
    shown = [{line.get_label(): [*map(tuple, line.get_xydata())] for line in axes.lines} for axes in figures]
    d4, d12 = [(1e16, 0.9), (1e16, 0.85), (2e17, 0.8)], [(1e16, 1.0), (2e17, 0.7), (2e17, 0.7)]
    losses = {"d4": d4, "d12": d12, "near, books": [(1e21, 0.6)]}
    assert shown[3] == losses and shown[0] == losses | {"d24, predicted": [(1e19, 0.65)]}
    scores = {"d4": [(1e16, 0.05), (2e17, 0.1)], "d12": [(2e17, 0.2)] * 2}
    assert {name: shown[1].pop(name) for name in scores} == scores and {y for _, y in shown[1]["line"]} == {0.3}
    assert shown[2]["1e+16 FLOPs"] == [(3e7, 1.0), (9e6, 0.9), (2e7, 0.85)] and shown[2]["optimum"] == [(2.2e7, 0.84)]
    ends = figures[2].lines[1].get_xydata()[[0, -1]]  # of the parabola through the three points
    assert ends == pytest.approx(np.array([[3e7, 1.0], [2e7, 0.85]])) and figures[2].get_xscale() == "log"


@pytest.mark.slow
def test_the_toy_grid_trains_whole_and_its_law_is_fitted(tmp_path):
    words = [sys.executable, "-m", "nanochat_hf.cli", "scaling", "scaling/cpu", "--run-dir", str(tmp_path / "toy")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    facts = load_json(tmp_path / "toy" / "scaling.json")
    assert len(facts["cells"]) == 12 and "prediction" in facts["law"] and (tmp_path / "toy" / "scaling.html").is_file()
    assert "12 of them finished" in subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout
