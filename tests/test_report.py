"""The report card says what the metrics.json files say, "-" for what they do not, and draws it."""

import base64
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nanochat_hf.errors import InputError
from nanochat_hf.eval.report import (

    collect,
    compare,
    duration,
    grid,
    make_report,
    markdown,
    one_line,
    results_row,
    short,
    validate,
)
from nanochat_hf.run import Run

COMMON = {
    "finished": True,
    "commit": "abcdef1234",
    "dirty": True,
    "started": 1.0,
    "versions": {"torch": "2.13.0", "deepspeed": None},
    "hardware": {
        "device": "Toaster",
        "num_processes": 2,
        "cpu_cores": 4,
        "memory_bytes": 8 * 2**30,
        "system": "Linux",
    },
}


def result(value, **more):
    return {"value": value, "stderr": 0.01, "n": 200, "baseline": None, "higher_is_better": True, **more}


@pytest.fixture
def run(tmp_path):
    def write(stage, **numbers):
        (tmp_path / stage).mkdir()
        (tmp_path / stage / "metrics.json").write_text(json.dumps({**COMMON, **numbers}))

    write("tokenizer", vocab_size=1024, bytes_per_token=2.5, wall_time_s=10)
    history = [{"step": s, "train_loss": 5 - s / 10, **({"val_bpb": 2 - s / 40} if s % 2 else {})} for s in range(9)]
    samples = [{"prompt": "The owl", "text": "is *big* | and\n<b>old"}]
    write("base", depth=4, num_parameters=1_234_567, wall_time_s=100, mfu=None, history=history, samples=samples)
    write(
        "sft",
        rows=3000,
        tokens=90_000,
        wall_time_s=50,
        mixture=[{"dataset": "primer", "rows": 3000, "tokens": 90_000}],
    )
    rl = [{"step": s, "reward": s / 10} for s in range(5)]
    write("rl", history=rl, before={"arithmetic": 0.5}, after={"arithmetic": 0.75}, wall_time_s=40)
    core = {"value": 0.01, "stderr": 0.02, "label": "2/22 tasks", "tasks": "2/22", "missing": ["squad"], "limit": 50}
    core["per_task"] = {"piqa": {"acc": 0.6, "centered": 0.2, "stderr": 0.1, "n": 50}}
    write(
        "eval",
        wall_time_s=3400,
        results={
            "base": {"val_bpb": result(1.1, stderr=None, higher_is_better=False)},
            "sft": {"facts": result(0.93), "counting": result(0.8, baseline=0.25, tool_use=0.99)},
            "rl": {"counting": result(0.85)},
        },
        core={"base": core},
        bytes_per_token={"korean": {"ours": 1.5, "GPT-2": None}},
        bloat={"characters": 1000, "lines": 20, "files": 2, "tokens": 250, "dependencies": 16},
        examples={"rl": [{"question": "2+2?", "expected": "4", "answer": "4", "correct": 1.0}]},
    )
    return tmp_path


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


def test_the_header_tells_machine_commit_cost_and_bloat(run):
    text = make_report(run, hourly_rate=3.0).read_text()
    for part in (
        "2 x Toaster",
        "8.0 GiB memory",
        "abcdef1234 (with local changes)",
        "torch 2.13.0",
        "$3.00 at $3.00 an hour",
    ):
        assert part in text
    assert "deepspeed" not in text
    assert re.search(r"Direct dependencies\s+\| 16", text)
    assert re.search(r"Cost\s+\| -", make_report(run).read_text())


def test_stage_sections_show_their_numbers_and_plots(run):
    text = make_report(run).read_text()
    assert re.search(r"Parameters\s+\| 1,234,567", text)
    assert re.search(r"arithmetic\s+\| 0.5000\s+\| 0.7500", text)
    assert re.search(r"korean\s+\| 1.5000\s+\| -", text)
    assert re.search(r"right \| 2\+2\?", text)
    assert "is \\*big\\* | and \\<b>old" in text
    for name in ("base", "rl", "core"):
        assert (run / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"(plots/{name}.png)" in text
    assert "sft.png" not in text


def test_the_html_page_needs_no_other_file(run):
    make_report(run)
    page = (run / "report.html").read_text()
    assert 'src="plots' not in page and "<table>" in page and "<b>old" not in page
    pictures = re.findall(r"data:image/png;base64,([^\"]+)", page)
    assert len(pictures) == 3
    assert all(base64.b64decode(picture).startswith(b"\x89PNG") for picture in pictures)


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
    (other / "eval").mkdir(parents=True)
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
    path.write_text(json.dumps({**metrics, "core": {"base": core}, "chatcore": chat}))
    base = json.loads((run / "base" / "metrics.json").read_text())
    base |= {"total_tokens": 1_433_600, "hardware": hardware, "started": 9.0}
    (run / "base" / "metrics.json").write_text(json.dumps(base))
    found = cells(results_row(collect(Run(run)), report="[json](results/a.json)"))
    assert found[2] == "2 CPU cores"
    assert found[4:] == ["1.4M", "1.1000", "0.2612", "0.2000 (50 examples each)", "[json](results/a.json)"]
    assert [short(n) for n in (None, 12, 65_536_000, 4_200_000_000)] == ["-", "12", "65.5M", "4.2B"]


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


def test_bloat_counts_the_checkout_and_only_that(tmp_path):
    assert bloat(tmp_path) is None
    (tmp_path / "pyproject.toml").write_text('[project]\ndependencies = ["a", "b"]\n')
    (tmp_path / "one.py").write_text("x = 1\n")
    for hidden in (".venv", "runs"):
        (tmp_path / hidden).mkdir()
        (tmp_path / hidden / "two.py").write_text("x = 1\n" * 99)
    found = bloat(tmp_path)
    assert found == {"characters": 42, "lines": 3, "files": 2, "tokens": 10, "dependencies": 2}
    assert bloat()["files"] > 20


def test_small_helpers():
    assert [duration(s) for s in (None, 59.6, 3725)] == ["-", "1 min 00 s", "1 h 02 min"]
    assert grid(["a", "b"], []) == ""
    assert one_line("x" * 400).endswith("…")
    said = "<|python_start|>2*3<|python_end|><|output_start|>6<|output_end|>So 6."
    assert one_line(said) == "\\[calls 2*3, gets 6] So 6.".replace("*", "\\*")
