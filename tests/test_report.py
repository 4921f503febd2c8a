"""The report card says what the metrics.json files say, "-" for what they do not, and draws it."""

import base64
import errno
import json
import re
import shlex
import shutil
from dataclasses import asdict
from unittest.mock import MagicMock

import numpy as np
import pytest
from finished_run import COMMON, finished_run, result  # noqa: F401
from huggingface_hub.repocard_data import model_index_to_eval_results
from matplotlib.patches import Rectangle
from mutations import mutations

from nanochat_hf import cli
from nanochat_hf.errors import InputError
from nanochat_hf.eval import plots as plots_module
from nanochat_hf.eval import report
from nanochat_hf.eval.compare import compare, outcomes
from nanochat_hf.eval.plots import draw_bars, draw_lines, plots, smoothed
from nanochat_hf.eval.report import by_text, collect, grid, make_report, markdown, one_line, results_row
from nanochat_hf.hub.model_card import Push, collection_table, render_model_card
from nanochat_hf.run import Run, duration, load_json, project_folder, save_json, short
from nanochat_hf.stage_configs import find_recipe, read_recipe


def edit(path, **keys):
    save_json(path, {**load_json(path), **keys})


def cells(row):
    return [cell.strip() for cell in re.split(r" (?<!\\)\| | \|$", row.strip().removeprefix("|"))]


def test_a_sentence_and_the_summary_come_first_without_empty_columns(run):
    text = markdown(collect(Run(run), hourly_rate=3.0), {"scores": ["plots/scores.png"], "base": ["plots/base.png"]})
    sections = re.findall(r"^## (.+)$", text, re.M)
    assert sections == [
        "Summary", "Curves", "Conversations with RL", "Continuations by BASE", "Evaluation", "CORE by task",
        "Cost and energy", "Reproduction", "Environment", "Stages",
    ]  # fmt: skip
    sentence = "A chat model of 1.2M parameters, trained and evaluated in 1 h 00 min on 2 x Toaster for $3.00: "
    sentence += "2/22 tasks, 50 examples each 0.0100, val bpb 1.1000 after pretraining.\n"
    assert sentence in text
    summary = text[text.index("## Summary") : text.index("## Curves")]
    rows = {row[0]: row[1:5] for row in map(cells, summary.splitlines())}
    assert rows["Metric"] == ["BASE", "SFT", "RL", "Random baseline"]  # there is no MID
    assert rows["val bpb"] == ["1.1000", "-", "-", "-"]
    assert rows["counting"] == ["-", "0.8000", "0.8500", "0.2500"]
    assert rows["2/22 tasks, 50 examples each"] == ["0.0100", "-", "-", "0"]
    assert "### BASE: 2/22 tasks" in text and "![scores](plots/scores.png)" in summary
    assert "Total wall time: 1 h 00 min (tokenizer " in summary


def test_the_environment_has_machine_and_commit(run):
    text = markdown(collect(Run(run)))
    for part in ("2 x Toaster", "8.0 GiB memory", "abcdef1234 (with local changes)", "torch 2.13.0"):
        assert part in text
    assert "deepspeed" not in text
    edit(run / "rl" / "metrics.json", hardware={"device": "NVIDIA H200", "num_processes": 2}, started=9)
    text = markdown(collect(Run(run)))  # the machine is that of the last stage
    assert "2 x NVIDIA H200" in text and "Toaster" not in text


H200S = {"device": "NVIDIA H200", "device_type": "cuda", "num_processes": 2}
COSTS = {  # an hour in all: machine, hourly rate -> lines
    "two H200s": (H200S, 3.0, "2", r"\$3.00: 1 h 00 min at \$3.00 per hour", "at most 1.4 kWh: .* rated"),
    "no price": (H200S, None, "2", r"\$6.00 at an assumed \$3 per GPU-hour", "at most 1.4 kWh"),
    "an unknown GPU": ({"device": "Toaster"}, None, "1", r"\$3.00 at an assumed", "not known: .* 1 x Toaster"),
    "a CPU": (
        {"device": "x", "device_type": "cpu"},
        None,
        "0, all stages",
        "no price",
        "not known: it was not measured",
    ),
    "a Mac": ({"device": "Apple MPS", "device_type": "mps"}, None, "0, all stages", "no price", "not known"),
    "no machine": ({}, None, "not known", "no price was given", "not known"),
}


@pytest.mark.parametrize("hardware,rate,gpu_hours,cost,energy", COSTS.values(), ids=COSTS)
def test_cost_and_energy_say_what_they_are_computed_from(run, hardware, rate, gpu_hours, cost, energy):
    for path in run.glob("*/metrics.json"):
        edit(path, hardware=hardware)
    text = markdown(collect(Run(run), hourly_rate=rate))
    for name, line in (("GPU-hours", gpu_hours), ("Cost", cost), ("Energy", energy)):
        assert re.search(rf"- \*\*{name}\*\*: {line}", text), name


def test_what_is_missing_is_said(run):
    """Of a tokenizer alone, and of a run whose evaluation measured nothing."""
    for stage in ("base", "sft", "rl"):
        (run / stage / "metrics.json").unlink()
    edit(run / "eval" / "metrics.json", models={}, results={}, core={}, examples={})
    reasons = ["nothing was measured", "no stage recorded values", "no chat model was asked", "nothing was measured"]
    text = markdown(collect(Run(run)))
    assert re.findall(r"^Missing: (.*?)(?: of several steps)?\.$", text, re.M) == [
        *reasons, "no bundle of tasks was named (`eval.core_bundle`)",
        "the run has no recorded keys, or stages that no recipe has",
    ]  # fmt: skip
    (run / "eval" / "metrics.json").unlink()
    assert markdown(collect(Run(run))).count("Missing: the evaluation has not run.") == 4


def test_the_command_is_the_nearest_recipe_with_the_keys_that_differ(run):
    assert collect(Run(run))["command"] is None  # no stage has a config
    stages, configs = read_recipe(find_recipe("cpu-demo"), None, ["base.depth=6", "sft.matrix_lr=0.5"])
    for stage in stages[:-1]:
        save_json(run / stage / "metrics.json", {**COMMON, "config": asdict(configs[stage])})
    cpu = {"hardware": {"device_type": "cpu"}, "started": 9}
    edit(run / "eval" / "metrics.json", **cpu)
    command = "nanochat run cpu-demo --config-file=cpu base.depth=6 sft.matrix_lr=0.5"
    assert collect(Run(run))["command"] == command
    assert f"\n```bash\n{command}\n```\n" in markdown(collect(Run(run)))  # its commit has local changes
    for path in run.glob("*/metrics.json"):
        edit(path, dirty=False)
    assert f"\n```bash\ngit checkout abcdef1234 && {command}\n```\n" in markdown(collect(Run(run)))
    (run / "rl" / "metrics.json").unlink()
    assert collect(Run(run))["command"] == f"{command} --stages=tokenizer,base,mid,sft,eval,report"
    shutil.rmtree(run / "mid")
    korean, d12 = (read_recipe(find_recipe(name), None, [])[1] for name in ("d20-ko", "d12"))
    for stage in ("tokenizer", "base", "sft", "eval", "rl"):  # d20-ko, which is nearest, has no RL
        config = (d12 if stage == "rl" else korean)[stage]
        save_json(run / stage / "metrics.json", {**COMMON, "config": asdict(config)})
    words = shlex.split(collect(Run(run))["command"])
    assert words[2] != "d20-ko" and words[-1] == "--stages=tokenizer,base,sft,rl,eval,report"


def test_the_sections_show_numbers_and_literal_samples_once(run):
    wrong = {"question": "3+3?", "expected": "6", "answer": "5", "correct": 0.0}
    right = {"question": "2+2?", "expected": "4", "answer": "4", "correct": 1.0}
    other = {**right, "question": "?", "correct": None}
    edit(run / "eval" / "metrics.json", examples={"rl": [right, wrong, wrong, other]})
    text = markdown(collect(Run(run)))
    answers = "- **2+2?** 4 (right)\n- **3+3?** 5 (wrong, expected 6)\n- **?** 4 (not graded)\n\n"
    assert f"## Conversations with RL\n\n{answers}## Continuations by BASE\n" in text
    assert "- **Base model**, 1 min 40 s: depth 4, 1,234,567 parameters\n" in text
    done = "30 steps, 0.7500 passes over the data, 3,000 rows, 90,000 tokens"
    assert re.search(rf"- \*\*SFT\*\*, .*50 s: {done}; data: primer\n", text)
    assert (
        "; arithmetic 0.5000 -> 0.7500\n" in text
        and "**Bytes per token** of evals/texts: korean 1.5000 (ours)" in text
    )
    assert re.search(r"counting\s+\| -\s+\| 0.8000 ± 0.0100\s+\| 0.8500 ± 0.0100 \| 0.2500\s+\| 200", text)
    assert re.search(r"counting, tool called\s+\| -\s+\| 99.0%", text)
    assert re.search(r"counting, pass@2\s+\| -\s+\| 0.9000", text)
    assert text.count("is \\*big\\* | and \\<b>old") == 1
    assert "The bundle lacks squad, so this is not CORE. At most 50 examples per task. 7 prompts were cropped." in text
    assert "It took 4.0 s, 75% of them in the model." in text
    assert re.search(r"piqa \|\s+0.6000\s+\|\s+0.5000\s+\| 0.2000 ± 0.1000\s+\| 50\s+\| 0.4500", text)


def test_small_helpers():
    assert [duration(s) for s in (None, 59.4, 59.6, 3725)] == ["-", "59 s", "1 min 00 s", "1 h 02 min"]
    assert grid(["a", "b"], []) == ""
    assert grid(["a", "number"], [["x|y", "1.5"]]) == "| a    | number |\n|------|-------:|\n| x\\|y | 1.5    |"
    assert grid(["a", "b", "c"], [["1", "-", ""]]) == "| a   |\n|----:|\n| 1   |"  # no empty columns
    assert smoothed([1, 2, 6, 4], 2) == [1, 3, 4, 4]
    assert one_line({"A": -1.0, "B": -0.5}) == "B"
    rows = [{"text": str(n % 12), "n": n} for n in range(24)]
    assert list(by_text(rows, "text").values()) == rows[12:22]  # ten, and of equal texts the last
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
    for text in ("[" * 100_000, "{"):
        path.write_text(text)
        with pytest.raises(InputError, match=r"rl/metrics\.json is not valid JSON"):
            make_report(run)
    path.write_text(whole)
    edit(run / "eval" / "metrics.json", results={"sft": {"facts": result("good")}})
    with pytest.raises(InputError, match=r"metrics\.json: results\.sft\.facts\.value is 'good': .*delete it") as error:
        make_report(run)
    assert "\n" not in str(error.value)


def test_runs_are_compared_with_the_error_of_the_difference(run, tmp_path):
    other = tmp_path / "other"
    save_json(other / "sft" / "metrics.json", {**COMMON, "wall_time_s": 0})
    assert "95 %" not in compare([run, other])  # neither the column nor what it means
    evaluation = {**COMMON, "wall_time_s": 60, "models": {"sft": "sft"}}
    # The error of the difference is sqrt(.01**2 + .02**2) = .02236; z = .894 and 1.789, so p = .371 and .0736.
    for value, row in ((0.95, r"\+0.0200\s+\| -0.0238 to \+0.0638 \| 0.371"), (0.97, r".* \+0.0838 \| 0.074")):
        facts = {"facts": result(value) | {"stderr": 0.02}}
        save_json(other / "eval" / "metrics.json", {**evaluation, "results": {"sft": facts}})
        text = compare([run, other])
        assert re.search(rf"facts\s+\| SFT\s+\| 0.9300 ± 0.0100\s+\| {value:.4f} ± 0.0200 \|", text)
        assert re.search(rf"facts\s+\| SFT\s+\| {row} \| two-sample", text)
    assert re.search(r"counting\s+\| RL\s+\| 0.8500 ± 0.0100\s+\| -\s+\|\n", text)
    assert re.search(r"total wall time\s+\|\s+\| 1 h 00 min\s+\| 1 min 00 s\s+\|\n", text)
    assert re.search(r"total wall time\s+\|\s+\| -59 min 00 s", text)
    three = compare([run, other, run])  # names that are not unique are paths
    assert f"## {other} minus {run}\n" in three and f"## {run} minus {run}\n" in three
    assert re.search(r"total wall time\s+\|\s+\| \+0 s", three)
    assert re.search(r"counting\s+\| RL\s+\| \+0.0000\s+\| -0.0277 to \+0.0277 \| 1.000", three)


def test_what_cannot_be_compared_is_named_and_not_subtracted(run, tmp_path):
    other = tmp_path / "other"
    for stage in ("base", "sft", "rl", "eval"):
        save_json(other / stage / "metrics.json", load_json(run / stage / "metrics.json"))
    assert "Note" not in compare([run, other]) and "Nothing." in compare([run, other])
    for folder, text in ((run, "books"), (other, "mix")):
        edit(folder / "base" / "metrics.json", inputs={"tokenizer": text, "data": text}, config={"dataset": "x"})
        edit(folder / "eval" / "metrics.json", config={"dataset": "x", "seed": 1})
    evaluation = load_json(other / "eval" / "metrics.json")
    evaluation["results"]["sft"]["facts"]["n"] = 1000
    evaluation["core"]["base"]["per_task"]["copa"] = {"acc": 0.5, "n": 50}
    edit(other / "eval" / "metrics.json", **evaluation, chatcore={"rl": {"value": 0.1, "label": "ChatCORE"}})
    edit(other / "eval" / "metrics.json", config={"dataset": "x", "seed": 2})
    assert "`--output FOLDER` draws them" in compare([run, other])
    edit(other / "base" / "metrics.json", commit="0ther")
    text = compare([run, other], tmp_path / "page")
    table = text[text.index("## other minus") : text.index("## Curves")]
    rows = {(row[0], row[1]): row[2:6] for row in map(cells, table.splitlines()) if len(row) > 5}
    for metric, stage, reason in (
        ("facts", "SFT", "numbers of examples or tokens (1,000 and 200)"),
        ("2/22 tasks, 50 examples each", "BASE", "tasks in a mean, or numbers of their examples"),
        ("val bpb", "BASE", "validation texts"),
        ("loss per token", "BASE", "tokenizers"),
    ):
        assert rows[metric, stage] == ["-", "-", "-", f"none: other {reason}"], metric
    assert [key for key, row in rows.items() if row[0].startswith("+")] == [
        ("counting", "SFT"), ("counting", "RL")
    ] and "ChatCORE" not in table  # fmt: skip
    assert re.findall(r"^!\[.*\]\((.*)\)$", text, re.M) == ["plots/rl-reward.png"]  # neither loss nor val bpb
    assert re.findall(r"^\| eval.seed\s+\| 1\s+\| 2\s+\|$", text, re.M) and "| x " not in text
    assert re.search(r"^\| commit\s.* 0ther", text, re.M)
    assert re.search(r"^- \*\*other\*\*: `nanochat run .*base.dataset=x.*`$", text, re.M)
    page = (tmp_path / "page" / "comparison.html").read_text()
    assert (tmp_path / "page" / "comparison.md").read_text() == text and page.count("data:image/png") == 1
    edit(other / "base" / "metrics.json", inputs={"tokenizer": "other", "data": "books"})  # the texts are the same
    assert "other validation texts" not in compare([run, other])


def test_the_same_questions_are_compared_in_pairs(tmp_path):
    """Outcomes 1 1 0 0 and 1 1 1 0: the differences 0 0 1 0 have the mean 1/4 and the standard deviation 1/2."""
    for name, answers in (("a", (1, 1, 0, 0)), ("b", (1, 1, 1, 0))):
        save_json(tmp_path / name / "sft" / "metrics.json", COMMON)
        numbers = {"seconds": {"sft": {"t": 1, "all": 2}}, "models": {"sft": "sft"}}
        numbers["results"] = {"sft": {"sums": result(sum(answers) / 4, n=4)}}
        save_json(tmp_path / name / "eval" / "metrics.json", {**COMMON, **numbers})
        samples = tmp_path / name / "eval" / "samples" / "sft" / "t.jsonl"
        samples.parent.mkdir(parents=True)
        samples.write_text("".join(json.dumps({"question": i, "correct": c}) + "\n" for i, c in enumerate(answers)))
    # The errors are (1/2) / sqrt(4) = .25, so z = 1 and p = .317, or sqrt(2) x .01.
    paired, independent = r"-0.2400 to \+0.7400 \| 0.317 \| paired", r"\+0.2777 \| <0.001 \| two-sample"
    assert re.search(paired, compare([tmp_path / "a", tmp_path / "b"]))
    assert re.search(r"\+0.0000 to \+0.0000 \| 1.000 \| paired", compare([tmp_path / "a", tmp_path / "a"]))
    samples.write_text(samples.read_text().replace('"question": 3', '"question": 4'))
    assert re.search(independent, compare([tmp_path / "a", tmp_path / "b"]))
    samples.write_text("{")
    assert re.search(independent, compare([tmp_path / "a", tmp_path / "b"]))


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


def test_the_command_prints_the_summary_a_row_a_comparison_or_a_collection(run, capsys, tmp_path):
    def output(*words) -> tuple[str, str]:
        cli.dispatch("report", list(map(str, words)))
        return capsys.readouterr()

    row = output("--run-dir", run, "--row")
    facts = collect(Run(run))
    assert row == (results_row(facts, "-") + "\n", "") and not (run / "report.md").exists()
    text = output("--run-dir", run, "--node-hourly-rate", "3").out
    assert text.endswith(f"\n{run}/report.md\n{run}/report.html\n") and "## Evaluation" not in text
    assert text.startswith(markdown(load_json(run / "report.json"), macro="summary"))
    assert load_json(run / "report.json")["hourly_rate"] == 3.0
    edit(run / "sft" / "metrics.json", inputs={"model": "another"}, weights="w")
    edit(run / "base" / "metrics.json", weights="v")
    out, err = output("--run-dir", run, "--row")
    assert f"| [report]({run}/report.md) |" in out
    assert err == "".join(f"note: {note}\n" for note in collect(Run(run))["notes"]) != ""
    copied = shutil.copytree(run, run.with_name(f"{run.name}-2"))
    assert output("--compare", run, copied).out == compare([run, copied]) + "\n"
    table = output("--collection", f"me/a={run}", f"me/b={tmp_path}").out
    assert table == collection_table({"me/a": Run(run), "me/b": Run(tmp_path)}) + "\n"


@pytest.mark.parametrize("name", ["report.html", "plots"])
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
    curves = {"base": ["plots/base-train_loss.png", "plots/base-val_bpb.png"], "rl": ["plots/rl-reward.png"]}
    assert drawn == curves | {"scores": ["plots/scores.png"], "core": ["plots/core.png"]}
    text, page = make_report(run).read_text(), (run / "report.html").read_text()
    assert all(f"]({place})" in text for places in drawn.values() for place in places) and "sft.png" not in text
    assert 'src="plots' not in page and "<table>" in page and "<b>old" not in page and "<title>Report card: " in page
    embedded = re.findall(r"data:image/png;base64,([^\"]+)", page)
    assert len(embedded) == 5
    assert all(base64.b64decode(picture).startswith(b"\x89PNG") for picture in embedded)


def test_curves_and_bars_are_these_points(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plots_module, "save", lambda figure, path: figures.append(figure))
    many, few = ([(step, 1 / (step + 1)) for step in range(size)] for size in (60, 29))
    draw_lines({"a": many, "b": few}, tmp_path / "x.png", "loss", ["#ff0000", "#0000ff"])
    draw_lines({"a": few}, tmp_path / "x.png", "loss", ["#ff0000"])
    (axes,), (alone,) = (figure.axes for figure in figures)
    looks = [(line.get_color(), line.get_alpha(), line.get_marker(), line.get_label()[0]) for line in axes.lines]
    assert looks == [("#ff0000", 0.35, "None", "_"), ("#ff0000", None, "None", "a"), ("#0000ff", 1, "o", "b")]
    lines = [line.get_xydata().tolist() for line in axes.lines]
    assert [lines[0], lines[2]] == [[[*point] for point in points] for points in (many, few)]
    assert lines[1] == [[*point] for point in zip(range(60), smoothed([value for _, value in many], 2))]
    assert axes.get_legend() and not alone.get_legend() and (axes.get_xlim()[0], axes.get_xlabel()) == (0, "step")
    groups = {"boolq": {"sft": {"value": None}, "base": {"value": 0.2, "stderr": 0.1, "baseline": 0.5}}}
    groups["copa"] = {"sft": {"value": 0.6, "baseline": 0}, plots_module.GPT2: {"value": 0.7}}
    assert draw_bars(groups, tmp_path / "x.png", "CORE") == f"{tmp_path.name}/x.png"
    draw_bars({"boolq": {"base": {"value": 1, "stderr": None}}}, tmp_path / "x.png", "")
    figure, ((axes,), (alone,)) = figures[2], (figure.axes for figure in figures[2:])
    bars = [(bar.get_y() + bar.get_height() / 2, bar.get_width()) for group in axes.containers[:6] for bar in group
            if isinstance(bar, Rectangle)]  # fmt: skip
    assert bars == [(0, 0.2), (pytest.approx(1.28), 0.6), (pytest.approx(1.56), 0.7)]  # .84 / 3 apart
    marks = [line.round(9).tolist() for lines in axes.collections for line in lines.get_segments() if np.ptp(line)]
    expected = [[[0.1, 0], [0.3, 0]], *[[[0.5, -0.14], [0.5, 0.14]]] * 2, *[[[0, 1.14], [0, 1.42]]] * 2]
    assert sorted(line for line in marks if line[0] != line[1]) == sorted(expected)
    assert axes.get_yticks().tolist() == pytest.approx([0.28, 1.28]) and axes.yaxis_inverted()
    assert figure.get_size_inches().tolist() == pytest.approx([5.4, 0.2 * 2 * 4 + 1.1])  # .2 per bar and gap
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["BASE", "SFT", plots_module.GPT2]
    assert not figures[3].legends and {text.get_text() for text in axes.texts} == {" 0.200", " 0.600", " 0.700"}


def test_bytes_per_token_are_compared_with_the_tokenizers_in_the_cache(tokenizer, tmp_path, monkeypatch):
    tokenizer.save_pretrained(tmp_path / "gpt2")
    others = {"GPT-2": str(tmp_path / "gpt2"), "GPT-4": str(tmp_path / "nothing")}
    monkeypatch.setattr(report, "OTHER_TOKENIZERS", others)
    table = report.compression(tokenizer)
    assert set(table) == {"books", "code", "korean", "math"}
    for name, row in table.items():
        text = (project_folder() / "evals" / "texts" / f"{name}.txt").read_text(encoding="utf-8")
        expected = len(text.encode()) / len(tokenizer(text, add_special_tokens=False)["input_ids"])
        assert row == {"ours": expected, "GPT-2": expected, "GPT-4": None}


@pytest.mark.parametrize("stage", ["base", "eval"])
def test_a_damaged_metrics_json_is_one_line_or_a_report(run, stage):
    path, refusals = run / stage / "metrics.json", 0
    for data in mutations(path.read_bytes(), 25):
        path.write_bytes(data)
        try:
            facts = collect(Run(run))
            assert markdown(facts, {}) and results_row(facts) and compare([run, run])
        except InputError as error:
            assert "metrics.json" in str(error) and "\n" not in str(error)
            refusals += 1
    assert 5 < refusals < 25


# The model card


@pytest.fixture
def measured(tmp_path):
    """A finished base and SFT stage with CORE and ChatCORE, in metrics.json files alone."""
    stage = {"finished": True, "commit": "abc", "versions": {"torch": "2.13"}, "hardware": {"device": "H100"}}
    base = {**stage, "started": 1.0, "wall_time_s": 6000.0, "total_tokens": 5e9, "depth": 24, "val_bpb": 0.72}
    base |= {"num_parameters": 1_400_000, "config": {"dataset": "karpathy/climbmix"}}
    save_json(tmp_path / "base" / "metrics.json", base)
    mixture = [{"dataset": name, "rows": 1, "tokens": 2} for name in ("openai/gsm8k:main", "./mine.jsonl")]
    save_json(tmp_path / "sft" / "metrics.json", {**stage, "started": 2.0, "wall_time_s": 60.0, "mixture": mixture})
    tasks = {"piqa": {"acc": 0.7, "centered": 0.4, "n": 100}, "copa": {"acc": 0.6, "centered": 0.2, "n": 50}}
    core = {"value": 0.3, "stderr": 0.01, "label": "CORE (2/22 tasks)", "tasks": "2/22", "per_task": tasks}
    chat = {"value": 0.1, "stderr": None, "label": "ChatCORE (1/6 tasks)", "tasks": "1/6", "limit": None}
    gsm = {"GSM8K": {"value": 0.05, "stderr": 0.002, "n": 1319, "baseline": 0.0, "higher_is_better": True}}
    evaluation = {**stage, "started": 3.0, "wall_time_s": 9.0, "results": {"sft": gsm}, "chatcore": {"sft": chat}}
    evaluation |= {"core": {"base": {**core, "limit": None}}, "models": {"base": "base", "sft": "sft"}}
    save_json(tmp_path / "eval" / "metrics.json", evaluation)
    return Run(tmp_path)


def test_every_result_of_the_stage_is_in_the_model_index(measured):
    data = render_model_card(measured, Push("you/b", "base")).data
    _, results = model_index_to_eval_results(data.to_dict()["model-index"])
    assert {(r.dataset_name, r.metric_type): r.metric_value for r in results} == {
        ("val bpb", "bits_per_byte"): 0.72, ("CORE (2/22 tasks)", "centered_accuracy"): 0.3,
        ("piqa (core)", "accuracy"): 0.7, ("copa (core)", "accuracy"): 0.6,
    }  # fmt: skip
    chat = render_model_card(measured, Push("you/c", "sft")).data
    assert {r.dataset_name: r.metric_value for r in chat.eval_results} == {"ChatCORE (1/6 tasks)": 0.1, "GSM8K": 0.05}
    mean = load_json(measured.path / "eval" / "metrics.json")["core"]["base"] | {"label": "2/22 tasks"}  # of today
    edit(measured.path / "eval" / "metrics.json", core={"base": mean})
    data = render_model_card(measured, Push("you/b", "base")).data
    assert [r.metric_type for r in data.eval_results if r.dataset_name == "2/22 tasks"] == ["centered_accuracy"]


def test_the_text_shows_the_stages_up_to_this_one_and_no_number_that_was_not_measured(measured):
    text = str(render_model_card(measured, Push("you/c", "sft")))
    assert "\n# c\n\nA chat model of 1.4M parameters, trained and evaluated in 1 h 41 min on " in text
    assert re.search(r"BASE\s+\| SFT\s+\| Random baseline", text)
    assert "1 h 40 min" in text and "5,000,000,000 tokens" in text and "1 x H100" in text
    assert "Cost" not in text and re.search(r"GSM8K .*\| 0.0500 ± 0.0020", text) and "tool_steps" in text
    base = str(render_model_card(measured, Push("you/b", "base")))
    assert "does not follow instructions" in base and "GSM8K" not in base
    save_json(measured.path / "report.json", {"hourly_rate": 24.0})
    assert "$40.46: 1 h 41 min at $24.00 per hour" in str(render_model_card(measured, Push("you/c", "sft")))


def test_a_collections_text_has_a_row_for_each_model_and_dashes_for_what_is_missing(measured, tmp_path):
    save_json(tmp_path / "other" / "sft" / "metrics.json", {"finished": True, "started": 1.0, "wall_time_s": 60.0})
    first, second = collection_table({"you/a": measured, "you/b": Run(tmp_path / "other")}).splitlines()[2:]
    cells = [cell.strip() for cell in first.split("|")[1:-1]]
    assert cells[0] == "[you/a](https://huggingface.co/you/a)" and cells[1:4] == ["24", "1,400,000", "5,000,000,000"]
    assert cells[4:8] == ["0.7200", "0.3000", "0.1000", "1 h 41 min"]
    assert [cell.strip() for cell in second.split("|")[2:8]] == ["-"] * 6


def test_curves_have_the_color_of_their_stage_or_of_their_run_and_no_outcomes_are_none(run, tmp_path, monkeypatch):
    colors, facts = [], collect(Run(run))
    monkeypatch.setattr(plots_module, "draw_lines", lambda lines, path, title, own: colors.append(own))
    for runs in ({"": facts}, {"a": facts, "b": facts}):
        plots_module.draw_curves(runs, tmp_path / "plots")
    stages = [[plots_module.COLORS[stage]] for stage in ("base", "base", "rl")]
    assert colors == [*stages, *[plots_module.RUN_COLORS] * 3]
    assert outcomes(Run(tmp_path / "none"), "sft", "facts", {}) is None


def test_a_full_disk_leaves_the_earlier_report(run, monkeypatch):
    make_report(run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(plots_module, "save", MagicMock(side_effect=full))
    with pytest.raises(InputError, match=r"cannot write .*plots: No space left on device; make room there"):
        make_report(run)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
