"""The report card says what the metrics.json files say, "-" for what they do not, and draws it."""

import base64
import re
import subprocess
import sys
from pathlib import Path

import pytest
from finished_run import COMMON, finished_run, result  # noqa: F401

from nanochat_hf.errors import InputError
from nanochat_hf.eval import report
from nanochat_hf.eval.plots import draw_core, plots
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
)
from nanochat_hf.run import Run, load_json, save_json


def edit(path, **keys):
    save_json(path, {**load_json(path), **keys})


def cells(row):
    return [cell.strip() for cell in re.split(r" (?<!\\)\| | \|$", row.strip().removeprefix("|"))]


def test_the_summary_comes_first_and_has_every_stage_and_a_dash_for_what_was_not_measured(run):
    text = markdown(collect(Run(run)))
    sections = re.findall(r"^## (.+)$", text, re.M)
    assert sections == ["Summary", "Tokenizer", "Base model", "SFT", "RL", "Evaluation", "Repository size"]
    summary = text[text.index("## Summary") : text.index("## Tokenizer")]
    rows = {row[0]: row[1:5] for row in map(cells, summary.splitlines())}
    assert rows["Metric"] == ["BASE", "MID", "SFT", "RL"]
    assert rows["val bpb"] == ["1.1000", "-", "-", "-"]
    assert rows["counting"] == ["-", "-", "0.8000", "0.8500"]
    assert rows["2/22 tasks, 50 examples each"] == ["0.0100", "-", "-", "-"]
    assert "CORE" not in rows and "### BASE: 2/22 tasks" in text
    assert "Total wall time: 1 h 00 min (tokenizer 0 min 10 s" in summary


def test_the_header_has_machine_commit_and_cost(run):
    text = markdown(collect(Run(run), hourly_rate=3.0))
    for part in (
        "2 x Toaster",
        "8.0 GiB memory",
        "abcdef1234 (with local changes)",
        "torch 2.13.0",
        "$3.00 at $3.00 per hour",
    ):
        assert part in text
    assert "deepspeed" not in text
    assert re.search(r"Direct dependencies\s+\| 16", text)
    edit(run / "rl" / "metrics.json", started=9, hardware={"device": "Kettle", "num_processes": 1})
    later = markdown(collect(Run(run)))  # the machine is that of the last stage
    assert re.search(r"Cost\s+\| -", later) and "Kettle" in later and "Toaster" not in later


def test_the_sections_show_numbers_and_literal_samples_once(run):
    text = markdown(collect(Run(run)))
    assert re.search(r"Parameters\s+\| 1,234,567", text)
    assert re.search(r"arithmetic\s+\| 0.5000\s+\| 0.7500", text)
    assert re.search(r"korean\s+\| 1.5000\s+\| -", text)
    assert re.search(r"right \| 2\+2\?", text) and re.search(r"wrong \| 3\+3\?", text)
    assert re.search(r"SFT\s+\| Value\s+\| Random baseline", text)
    assert re.search(r"counting\s+\| 0.8000 ± 0.0100\s+\| 0.2500\s+\| 200\s+\| 99.0%\s+\| pass@2 0.9000", text)
    assert text.count("is \\*big\\* | and \\<b>old") == 1
    assert "The bundle lacks squad, so this is not CORE. At most 50 examples per task. 7 prompts were cropped." in text
    assert "It took 4.0 s, 75% of them in the model." in text
    assert re.search(r"piqa\s+\| 0.6000\s+\| 0.2000 ± 0.1000\s+\| 50\s+\| 0.4500", text)


def test_small_helpers():
    assert [duration(s) for s in (None, 59.6, 3725)] == ["-", "1 min 00 s", "1 h 02 min"]
    assert grid(["a", "b"], []) == ""
    assert grid(["a", "number"], [["x|y", "1.5"]]) == "| a    | number |\n|------|-------:|\n| x\\|y | 1.5    |"
    assert one_line("x" * 400) == "x" * 299 + "…"
    call = "<|python_start|>2*3<|python_end|><|output_start|>6<|output_end|>So <|assistant_end|>6."
    assert one_line(call) == r"\[calls 2\*3, gets 6] So 6."
    assert [short(n) for n in (None, 12, 1000, 65_536_000, 10**9)] == ["-", "12", "1.0K", "65.5M", "1.0B"]


def test_an_answer_right_in_one_of_four_samples_is_not_shown_as_right(run):
    (line,) = [line for line in markdown(collect(Run(run))).splitlines() if "3+3?" in line]
    assert "wrong" in line and "right" not in line


def test_report_json_holds_the_same_facts_and_damaged_results_are_one_line(run):
    make_report(run)
    facts = load_json(run / "report.json")
    assert facts["table"]["facts"]["sft"]["value"] == 0.93 and facts["total_seconds"] == 3600
    path = run / "rl" / "metrics.json"
    whole = path.read_text()
    for text in ("[" * 100_000, "[]", "{"):
        path.write_text(text)
        with pytest.raises(InputError, match=r"rl/metrics\.json is not valid JSON"):
            make_report(run)
    path.write_text(whole)
    edit(run / "eval" / "metrics.json", results={"sft": {"facts": result("good")}})
    with pytest.raises(InputError, match=r"metrics\.json: results\.sft\.facts\.value is 'good': .*delete it") as error:
        make_report(run)
    assert "\n" not in str(error.value)


def test_two_runs_are_compared_with_the_error_of_the_difference(run, tmp_path):
    other = tmp_path / "other"
    save_json(other / "sft" / "metrics.json", {**COMMON, "wall_time_s": 0})
    results = {"sft": {"facts": result(0.95)}}
    save_json(other / "eval" / "metrics.json", {**COMMON, "results": results, "wall_time_s": 60})
    text = compare(run, other)
    assert re.search(r"facts\s+\| SFT\s+\| 0.9300\s+\| 0.9500\s+\| \+0.0200 ± 0.0141", text)
    assert re.search(r"counting\s+\| RL\s+\| 0.8500\s+\| -\s+\| -", text)
    assert re.search(r"total wall time\s+\|\s+\| 1 h 00 min\s+\| 1 min 00 s\s+\| -59.0 min", text)


def test_the_row_of_the_results_has_a_dash_for_what_was_not_measured(run):
    row = results_row(collect(Run(run)))
    commit = "abcdef1234 (with local changes)"
    assert cells(row)[:9] == [run.name, commit, "2 x Toaster", "1 h 00 min", "-", "1.1000", "-", "-", "-"]
    assert row.count("|") == 10 and "\n" not in row  # two of 22 tasks are not CORE
    core = {"value": 0.2612, "label": "CORE", "per_task": {}}
    chat = {stage: {"value": v, "label": "ChatCORE", "limit": 50} for stage, v in (("sft", 0.1), ("rl", 0.2))}
    hardware = {"device": "x86_64", "device_type": "cpu", "cpu_cores": 2}
    edit(run / "eval" / "metrics.json", core={"base": core}, chatcore=chat, hardware=hardware, started=9)
    edit(run / "base" / "metrics.json", total_tokens=1_433_600)
    row = cells(results_row(collect(Run(run)), report="[json](results/a.json)"))
    assert row[2] == "2 CPU cores"
    assert row[4:9] == ["1.4M", "1.1000", "0.2612", "0.2000 (50 examples each)", "[json](results/a.json)"]


@pytest.mark.slow
def test_the_script_prints_the_row_and_writes_nothing(run):
    script = Path(__file__).parents[1] / "scripts" / "make_report.py"
    command = [sys.executable, str(script), "--run-dir", str(run), "--row"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert output == results_row(collect(Run(run))) + "\n" and not (run / "report.md").exists()


@pytest.mark.parametrize("name", ["report.md", "report.html", "report.json", "plots", "plots/base.png"])
def test_a_place_that_cannot_be_written_is_one_line(run, name):
    if name == "plots":
        (run / name).touch()
    else:
        (run / name / "in the way").mkdir(parents=True)
    with pytest.raises(InputError, match=f"cannot write .*{name.split('/')[0]}") as error:
        make_report(run)
    assert "\n" not in str(error.value)


def test_metrics_that_say_nothing_but_finished_make_a_report_and_unfinished_ones_do_not(run):
    stages = ("tokenizer", "base", "sft", "rl", "eval")
    for stage in stages:
        (run / stage / "metrics.json").write_text('{"finished": true}')
    assert "## Summary" in make_report(run).read_text() and results_row(collect(Run(run)))
    for stage in stages:
        (run / stage / "metrics.json").write_text("{}")
    with pytest.raises(InputError, match="no finished stage"):
        make_report(run)


def test_there_is_a_plot_of_every_curve_and_the_html_page_embeds_them(run):
    (run / "plots").mkdir()
    (run / "plots" / "sft.png").touch()  # of an earlier report
    drawn = plots(collect(Run(run)), run / "plots")
    assert not (run / "plots" / "sft.png").exists()
    assert drawn == {name: f"plots/{name}.png" for name in ("base", "rl", "core")}
    text, page = make_report(run).read_text(), (run / "report.html").read_text()
    assert all(f"]({place})" in text for place in drawn.values()) and "sft.png" not in text
    assert 'src="plots' not in page and "<table>" in page and "<b>old" not in page and "<title>Report card: " in page
    embedded = re.findall(r"data:image/png;base64,([^\"]+)", page)
    assert len(embedded) == 3
    assert all(base64.b64decode(picture).startswith(b"\x89PNG") for picture in embedded)
    row = {"acc": 0.6, "centered": 0.2, "stderr": 0.1, "n": 50}
    draw_core({"base": {"boolq": row}}, run / "one.png")  # GPT-2 has no published value of it
    assert (run / "one.png").read_bytes().startswith(b"\x89PNG")


def test_the_repository_size_is_that_of_the_checkout(tmp_path):
    assert report.repository_size(tmp_path) is None
    (tmp_path / "pyproject.toml").write_text('[project]\ndependencies = ["a", "b"]\n')
    (tmp_path / "one.py").write_text("x = 1\n")
    subprocess.run("git init -q && git add .", shell=True, cwd=tmp_path, check=True)
    (tmp_path / "untracked.py").write_text("x = 1\n" * 99)
    size = report.repository_size(tmp_path)
    assert size == {"characters": 42, "lines": 3, "files": 2, "tokens": 10, "dependencies": 2}
    assert report.repository_size()["files"] > 20


def test_bytes_per_token_are_compared_with_the_tokenizers_in_the_cache(tokenizer, tmp_path, monkeypatch):
    tokenizer.save_pretrained(tmp_path / "gpt2")
    others = {"GPT-2": str(tmp_path / "gpt2"), "GPT-4": str(tmp_path / "nothing")}
    monkeypatch.setattr(report, "OTHER_TOKENIZERS", others)
    table = report.compression(tokenizer)
    assert set(table) == {"books", "code", "korean", "math"}
    for name, row in table.items():
        text = (report.ROOT / "evals" / "texts" / f"{name}.txt").read_text(encoding="utf-8")
        expected = len(text.encode()) / len(tokenizer(text, add_special_tokens=False)["input_ids"])
        assert row == {"ours": expected, "GPT-2": expected, "GPT-4": None}
