"""The report's text: every stage's numbers, "-" for what is missing, and text that means nothing but itself."""

import re

from finished_run import finished_run  # noqa: F401

from nanochat_hf.eval.report import make_report
from nanochat_hf.eval.sections import duration, grid, one_line, short


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


def test_what_is_less_than_core_says_why_and_how_long_it_took(run):
    text = make_report(run).read_text()
    assert "The bundle lacks squad, so this is not CORE. At most 50 examples a task. 7 prompts were cropped." in text
    assert "It took 4.0 s, 75% of them in the model." in text
    assert re.search(r"piqa\s+\| 0.6000\s+\| 0.2000 ± 0.1000\s+\| 50\s+\| 0.4500", text)


def test_small_helpers():
    assert [duration(s) for s in (None, 59.6, 3725)] == ["-", "1 min 00 s", "1 h 02 min"]
    assert grid(["a", "b"], []) == ""
    assert one_line("x" * 400).endswith("…")
    said = "<|python_start|>2*3<|python_end|><|output_start|>6<|output_end|>So 6."
    assert one_line(said) == "\\[calls 2*3, gets 6] So 6.".replace("*", "\\*")
    assert [short(n) for n in (None, 12, 65_536_000, 4_200_000_000)] == ["-", "12", "65.5M", "4.2B"]
