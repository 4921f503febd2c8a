"""The decoding benchmark: its figures fit together, also on a CPU, where no bandwidth is known; bytes by hand."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from talker import talker  # noqa: F401
from test_decode import make

from nanochat_hf.serve.decoder import Decoder

SCRIPT = Path(__file__).parent.parent / "scripts" / "bench_decoding.py"
spec = importlib.util.spec_from_file_location("bench_decoding", SCRIPT)
bench = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench)


def test_rates_fit_together(talker):  # noqa: F811
    for batch in (1, 4):
        row = bench.bench_decoding(talker[0], batch, prompt_length=16, new_tokens=12, rounds=1)
        assert row["batch"] == batch and 0 < row["end_to_end"] < row["tokens_per_second"] * 1.5
        assert row["ttft_s"] > 0 and row["warm_up_s"] > row["ttft_s"] and row["mbu"] is None


def test_a_step_reads_matrices_once_and_no_more_keys_than_the_window():
    decoder, width, layers = Decoder(make("windows alone"), 2, 96, []), 64, 5
    matrices = layers * (4 * width * width + 8 * width * width) + 128 * width
    keys = 2 * sum(min(50, window) for window in (4, 96, 4, 96, 96))
    assert bench.bytes_per_step(decoder, [50, 50]) == (matrices + 2 * keys * width) * 4


@pytest.mark.slow
def test_the_command_prints_a_table_and_json():
    sizes = ["--depth", "2", "--batches", "1,2", "--prompt", "8", "--tokens", "8"]
    done = subprocess.run([sys.executable, SCRIPT, *sizes], check=True, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    assert lines[1].split()[:2] == ["batch", "tok/s"] and [row["batch"] for row in json.loads(lines[-1])] == [1, 2]
