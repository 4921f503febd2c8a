"""The report's pictures and its page: there is a picture of what was measured, and the page needs no other file."""

import base64
import re

from finished_run import finished_run  # noqa: F401

from nanochat_hf.eval.plots import draw_core, plots
from nanochat_hf.eval.report import collect, make_report
from nanochat_hf.run import Run


def test_there_is_a_picture_of_every_curve_and_none_of_nothing(run):
    drawn = plots(collect(Run(run)), run / "plots")
    assert drawn == {name: f"plots/{name}.png" for name in ("base", "rl", "core")}
    for place in drawn.values():
        assert (run / place).read_bytes().startswith(b"\x89PNG")
    text = make_report(run).read_text()
    assert all(f"]({place})" in text for place in drawn.values()) and "sft.png" not in text


def test_tasks_that_gpt2_has_no_published_value_of_are_drawn_alone(tmp_path):
    row = {"acc": 0.6, "centered": 0.2, "stderr": 0.1, "n": 50}
    assert draw_core({"base": {"boolq": row, "piqa": row}}, tmp_path / "core.png") == f"{tmp_path.name}/core.png"
    assert draw_core({"base": {"boolq": row}}, tmp_path / "one.png") and (tmp_path / "one.png").stat().st_size > 1000


def test_the_html_page_needs_no_other_file(run):
    make_report(run)
    page = (run / "report.html").read_text()
    assert 'src="plots' not in page and "<table>" in page and "<b>old" not in page
    pictures = re.findall(r"data:image/png;base64,([^\"]+)", page)
    assert len(pictures) == 3
    assert all(base64.b64decode(picture).startswith(b"\x89PNG") for picture in pictures)
