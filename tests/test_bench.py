"""The decoding benchmark gives the figures it promises, also on a CPU where there is no bandwidth to compare with."""

import json
import subprocess
import sys

import pytest
from talker import talker  # noqa: F401

from nanochat_hf.serve.bench import bench_decode


def test_bench_reports_rates_that_fit_together(talker):  # noqa: F811
    model, _ = talker
    one, four = bench_decode(model, batches=(1, 4), prompt_length=16, new_tokens=12, rounds=1)
    assert (one["batch"], four["batch"]) == (1, 4)
    for row in (one, four):
        assert 0 < row["end_to_end"] < row["tokens_per_second"] * 1.5
        assert row["ttft_s"] > 0 and row["warm_up_s"] > row["ttft_s"] and row["mbu"] is None


@pytest.mark.slow
def test_the_command_prints_a_table_and_json():
    sizes = ["--depth", "2", "--batches", "1,2", "--prompt", "8", "--tokens", "8"]
    command = [sys.executable, "-m", "nanochat_hf.serve.engine", "--bench", *sizes]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    assert lines[1].split()[:2] == ["batch", "tok/s"] and [row["batch"] for row in json.loads(lines[-1])] == [1, 2]
