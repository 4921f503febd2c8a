"""The whole pipeline as users start it, shortened: text to report, then again, then with a changed recipe."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SHORT = [
    "tokenizer.max_chars=200000", "base.num_iterations=12", "base.eval_every=6", "base.eval_tokens=4096",
    "mid.num_iterations=4", "mid.mixture=[{dataset: primer, rows: 300}]",
    "sft.num_iterations=4", "sft.mixture=[{dataset: primer, rows: 300}]", "sft.validation=[]",
    "rl.num_iterations=1", "rl.examples_per_step=2", "rl.num_samples=4", "rl.device_batch_size=8",
    "rl.eval_examples=4", "rl.max_new_tokens=8", "eval.limit=4", "eval.bpb_tokens=2048", "eval.max_new_tokens=8",
]  # fmt: skip


def speedrun(run: Path, *words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "recipes/speedrun.py", "--recipe", "cpu-demo", "--run-dir", str(run), *SHORT, *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=600)


@pytest.mark.slow
def test_pipeline_runs_skips_what_is_finished_and_reports_a_changed_recipe(tmp_path):
    run = tmp_path / "a run"
    done = speedrun(run)
    assert done.returncode == 0, done.stderr[-3000:]
    for stage in ("tokenizer", "base", "mid", "sft", "rl", "eval"):
        metrics = json.loads((run / stage / "metrics.json").read_text())
        assert metrics["finished"] and metrics["config"] and metrics["wall_time_s"] > 0, stage
        assert not (run / stage / "state").exists(), stage
    history = json.loads((run / "base" / "metrics.json").read_text())["history"]
    assert history[-1]["train_loss"] < history[0]["train_loss"]
    report = (run / "report.md").read_text()
    assert "| Metric" in report and "BASE" in report and "Total wall time" in report and str(run) in done.stdout
    answers = done.stdout.split("Three questions to")[1]  # the report above quotes samples in the same way
    assert answers.count("\n> ") == 3  # each followed by an answer
    assert f"nanochat chat --run-dir '{run}'\n" in answers
    before = {path: path.stat().st_mtime for path in run.glob("*/metrics.json")}
    again = speedrun(run)
    assert again.returncode == 0 and again.stdout.count("already finished, skipping") == 6
    assert before == {path: path.stat().st_mtime for path in run.glob("*/metrics.json")}
    changed = speedrun(run, "base.matrix_lr=0.03")
    assert changed.returncode == 2
    assert changed.stderr.strip().splitlines()[-1].startswith("error: the recipe changed since")
