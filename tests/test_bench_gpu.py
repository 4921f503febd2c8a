"""The training benchmark's own parts: FlashAttention-4 for the baseline, which contenders there are, the ratios."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

NO_GPU = {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(Path(__file__).parents[1])}
spec = importlib.util.spec_from_file_location("bench_gpu", Path(__file__).parents[1] / "scripts" / "bench_gpu.py")
bench = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench)


@pytest.mark.parametrize(
    "name, config, words",
    [(name, "d12x1", "is no contender") for name in ("ours:fa4", "baseline:L", "baseline:fa4+flex", "theirs")]
    + [("ours", config, "is no configuration") for config in ("d12", "d12x0", "12x1", "x")],
)
def test_an_unknown_contender_or_configuration_is_an_error(name, config, words, capsys):
    with pytest.raises(SystemExit, match="2"):
        bench.parse(name, config)
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("words, message", [
    ("--steps 0", "a whole number from 1"), ("--rounds -1", "a whole number from 0"),
    ("--warmup nan", "a number from"), ("--baseline none", "none is no checkout"),
    ("--contenders baseline:fa4", ". is no checkout"), ("", "needs a CUDA device"),
])  # fmt: skip
def test_a_wrong_argument_is_an_error_before_anything_is_compiled(words, message, tmp_path):
    command = [sys.executable, bench.__file__, *words.split()]
    done = subprocess.run(
        command, cwd=tmp_path, check=False, capture_output=True, text=True, env={**os.environ, **NO_GPU}
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and message in done.stderr


def test_ratios_are_ours_over_the_fastest_baseline_by_precision():
    speeds = {"ours": 120, "ours:fp8": 150, "baseline:fa4": 100, "baseline:sdpa": 80, "baseline:fa4+fp8": 125}
    rows = [("d24x16", name, {"tok_s": speed}) for name, speed in speeds.items()] + [("d12x32", "ours", {"tok_s": 1})]
    assert bench.ratios(rows) == ["d24x16   bf16  1.200", "d24x16   fp8   1.200"]


def test_in_rounds_all_contenders_are_timed_in_turn_and_one_that_fails_is_left_out(tmp_path, capsys):
    stub = tmp_path / "contender.py"
    stub.write_text(
        "import json, sys\n"
        "name, config = sys.argv[-2:]\n"
        "if name == 'ours:L': sys.exit('no kernel')\n"
        "print('noise'); print(json.dumps({'first_step_s': 1}), flush=True)\n"
        "for i, _ in enumerate(sys.stdin):\n"
        "    print(json.dumps({'tok_s': (120, 90, 100)[i] + 5 * (name == 'ours')}), flush=True)\n"
        "    print('{}', flush=True)\n"
    )
    pairs = [("d24x16", name) for name in ("ours", "baseline:fa4", "ours:L")]
    rows = bench.interleave([sys.executable, str(stub)], pairs, 3, float("inf"))
    speeds = {name: row["tok_s"] for _, name, row in rows}
    assert speeds == {"ours": 105, "baseline:fa4": 100} and bench.ratios(rows) == ["d24x16   bf16  1.050"]
    printed = capsys.readouterr().out
    order = [line.split()[2] for line in printed.splitlines() if line[:1].isdigit()]
    assert order == ["ours", "baseline:fa4", "baseline:fa4", "ours", "ours", "baseline:fa4"] and "no kernel" in printed
    assert bench.interleave([sys.executable, str(stub)], pairs[:1], 3, 0.0) == []
