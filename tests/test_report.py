"""The report card says what the metrics.json files say, "-" for what they do not, and draws it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from finished_run import COMMON, finished_run, result  # noqa: F401

from nanochat_hf.errors import InputError
from nanochat_hf.eval.report import collect, compare, make_report, results_row, validate
from nanochat_hf.eval.sections import markdown
from nanochat_hf.run import Run


def test_the_last_table_has_every_stage_and_a_dash_for_what_was_not_measured(run):
    text = make_report(run).read_text()
    last = text[text.index("## Summary") :]
    rows = {cells[0]: cells[1:] for cells in (re.split(r"\s*\|\s*", line.strip("| ")) for line in last.splitlines())}
    assert rows["Metric"] == ["BASE", "MID", "SFT", "RL"]
    assert rows["val bpb"] == ["1.1000", "-", "-", "-"]
    assert rows["counting"] == ["-", "-", "0.8000", "0.8500"]
    assert rows["2/22 tasks, 50 examples each"] == ["0.0100", "-", "-", "-"]
    assert "CORE" not in rows
    assert "### BASE: 2/22 tasks" in text
    assert "Total wall time: 1 h 00 min" in last


def test_report_json_holds_the_same_facts_and_has_a_checked_shape(run):
    text = make_report(run).read_text()
    facts = json.loads((run / "report.json").read_text())
    validate(facts)
    assert facts["table"]["facts"]["sft"]["value"] == 0.93
    assert facts["total_seconds"] == 3600
    assert markdown(facts).splitlines()[0] == text.splitlines()[0]
    facts["table"]["facts"]["sft"]["value"] = "good"
    with pytest.raises(ValueError, match="facts"):
        validate(facts)


def test_two_runs_are_compared_with_the_error_of_the_difference(run, tmp_path):
    other = tmp_path / "other"
    for stage in ("sft", "eval"):
        (other / stage).mkdir(parents=True)
        (other / stage / "metrics.json").write_text(json.dumps({**COMMON, "wall_time_s": 0}))
    numbers = {"results": {"sft": {"facts": result(0.95)}}, "wall_time_s": 60}
    (other / "eval" / "metrics.json").write_text(json.dumps({**COMMON, **numbers}))
    text = compare(run, other)
    assert re.search(r"facts\s+\| SFT\s+\| 0.9300\s+\| 0.9500\s+\| \+0.0200 ± 0.0141", text)
    assert re.search(r"counting\s+\| RL\s+\| 0.8500\s+\| -\s+\| -", text)


def cells(row):
    return [cell.strip() for cell in row.strip().strip("|").split(" | ")]


def test_the_row_of_the_results_has_a_dash_for_what_was_not_measured(run):
    row = results_row(collect(Run(run)))
    commit = "abcdef1234 (with local changes)"
    assert cells(row) == [run.name, commit, "2 x Toaster", "1 h 00 min", "-", "1.1000", "-", "-", "-"]
    assert row.count("|") == 10 and "\n" not in row  # two of 22 tasks are no CORE


def test_the_row_tells_tokens_core_and_the_last_stages_chatcore(run):
    path = run / "eval" / "metrics.json"
    metrics = json.loads(path.read_text())
    core = {"value": 0.2612, "label": "CORE", "per_task": {}}
    chat = {stage: {"value": v, "label": "ChatCORE", "limit": 50} for stage, v in (("sft", 0.1), ("rl", 0.2))}
    hardware = {"device": "x86_64", "device_type": "cpu", "cpu_cores": 2}
    path.write_text(
        json.dumps({**metrics, "core": {"base": core}, "chatcore": chat, "hardware": hardware, "started": 9})
    )
    base = json.loads((run / "base" / "metrics.json").read_text())
    base |= {"total_tokens": 1_433_600}
    (run / "base" / "metrics.json").write_text(json.dumps(base))
    found = cells(results_row(collect(Run(run)), report="[json](results/a.json)"))
    assert found[2] == "2 CPU cores"
    assert found[4:] == ["1.4M", "1.1000", "0.2612", "0.2000 (50 examples each)", "[json](results/a.json)"]


@pytest.mark.slow
def test_the_script_prints_the_row_and_writes_nothing(run):
    script = Path(__file__).parents[1] / "scripts" / "make_report.py"
    words = [sys.executable, str(script), "--run-dir", str(run), "--row"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stdout == results_row(collect(Run(run))) + "\n" and not (run / "report.md").exists()


def test_a_run_without_finished_stages_is_refused(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "metrics.json").write_text("{}")
    with pytest.raises(InputError, match="no finished stage"):
        make_report(tmp_path)


@pytest.mark.parametrize("name", ["report.md", "report.html", "report.json", "plots", "plots/base.png"])
def test_a_place_that_cannot_be_written_is_one_line(run, name):
    if name == "plots":
        (run / name).touch()
    else:
        (run / name / "in the way").mkdir(parents=True)
    with pytest.raises(InputError, match=f"cannot write .*{name.split('/')[0]}") as error:
        make_report(run)
    assert "\n" not in str(error.value)


def test_metrics_that_say_nothing_but_finished_make_a_report(run):
    for stage in ("tokenizer", "base", "sft", "rl", "eval"):
        (run / stage / "metrics.json").write_text('{"finished": true}')
    assert "## Summary" in make_report(run).read_text()
    results_row(collect(Run(run)))
