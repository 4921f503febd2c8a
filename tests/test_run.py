"""Run folders, metrics.json and the way from a YAML to a config."""

import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from nanochat_hf.config import parse_config, parse_flags
from nanochat_hf.errors import InputError, guarded
from nanochat_hf.run import (
    KEY_ALIASES,
    Run,
    load_json,
    model_fingerprint,
    save_json,
    start_record,
    write_metrics,
)


@dataclass
class Config:
    depth: int = 4
    rate: float = 0.1
    fast: bool = False
    name: str | None = None
    parts: list[dict] = field(default_factory=list)
    seed: int = 3


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "stage.yaml"
    path.write_text("depth: 12\nrate: 2e-5\nparts:\n- {dataset: a, rows: 3}\n")
    return path


def test_yaml_sets_defaults_and_the_command_line_wins(recipe):
    config = parse_config(Config, recipe, {"depth": "7", "fast": "true"})
    assert config == Config(depth=7, rate=2e-5, fast=True, parts=[{"dataset": "a", "rows": 3}])


def test_lists_can_be_typed_on_the_command_line(recipe):
    assert parse_config(Config, recipe, {"parts": "[{dataset: b}]"}).parts == [{"dataset": "b"}]


@pytest.mark.parametrize(
    "overrides,words",
    [({"dept": "1"}, "did you mean 'depth'"), ({"qqq": "1"}, "known: depth"), ({"depth": "many"}, "invalid int")],
)
def test_wrong_keys_and_values_are_one_clear_line(recipe, overrides, words):
    with pytest.raises(InputError, match=words) as caught:
        parse_config(Config, recipe, overrides)
    assert "\n" not in str(caught.value)


def test_a_yaml_that_is_no_mapping_is_refused(tmp_path):
    (tmp_path / "a.yaml").write_text("- 1\n")
    with pytest.raises(InputError, match="mapping"):
        parse_config(Config, tmp_path / "a.yaml")
    with pytest.raises(InputError, match="cannot read"):
        parse_config(Config, tmp_path / "none.yaml")


def test_a_stage_counts_as_finished_only_after_finish(tmp_path):
    run = Run(tmp_path)
    assert not run.finished("base")
    record = start_record(Config())
    record["started"] -= 7
    record["earlier_wall_time_s"] = 100
    save_json(run.folder("base") / "metrics.json", record)
    assert not run.finished("base")
    write_metrics(run.folder("base"), record, val_bpb=1.5)
    metrics = run.metrics("base")
    assert run.finished("base") and metrics["val_bpb"] == 1.5 and metrics["seed"] == 3
    assert metrics["config"]["depth"] == 4 and metrics["versions"]["torch"] and 107 <= metrics["wall_time_s"] < 120
    assert run.latest_model() == run.folder("base") and run.latest_model(before="base") is None


def test_json_is_written_aside_and_half_files_are_named(tmp_path):
    save_json(tmp_path / "a.json", {"x": 1})
    assert load_json(tmp_path / "a.json") == {"x": 1} and [p.name for p in tmp_path.iterdir()] == ["a.json"]
    (tmp_path / "b.json").write_text('{"x": ')
    with pytest.raises(InputError, match=r"b\.json is not valid JSON"):
        load_json(tmp_path / "b.json")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write"):
        save_json(tmp_path / "file" / "c.json", {})


def test_flags_become_pairs():
    assert parse_flags(["--depth", "4", "--a-b=1"]) == {"depth": "4", "a_b": "1"}
    for words in (["depth", "4"], ["--depth"]):
        with pytest.raises(InputError, match="--key value"):
            parse_flags(words)


@pytest.mark.slow
def test_a_script_shows_one_line_and_exit_code_two(tmp_path):
    root = Path(__file__).parent.parent
    command = [
        sys.executable,
        "scripts/base_train.py",
        "--config",
        "recipes/cpu-demo/base.yaml",
        "--run-dir",
        str(tmp_path),
    ]
    done = subprocess.run([*command, "--dpth", "3"], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("error: unknown key 'dpth'")


@pytest.mark.parametrize("error, code", [(InputError("no"), 2), (KeyboardInterrupt(), 130)])
def test_bad_input_and_ctrl_c_end_a_script_without_a_traceback(error, code):
    def main():
        raise error

    with pytest.raises(SystemExit) as caught:
        guarded(main)
    assert caught.value.code == code


def test_too_little_memory_is_one_line_of_the_process_that_had_too_little(capsys, monkeypatch):
    def main():
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.19 GiB of which ..."
        )

    monkeypatch.setenv("RANK", "3")
    with pytest.raises(SystemExit, match="2"):
        guarded(main)
    said = "error: CUDA out of memory. Tried to allocate 2.00 GiB. Lower device_batch_size, or take a smaller model"
    assert capsys.readouterr().err.splitlines() == [said]


def test_json_files_hold_null_in_place_of_nan(tmp_path):
    path = tmp_path / "metrics.json"
    save_json(path, {"loss": float("nan"), "rows": [1.5, (float("inf"), {"x": -float("inf")})]})
    assert json.loads(path.read_text(), parse_constant=pytest.fail) == {
        "loss": None,
        "rows": [1.5, [None, {"x": None}]],
    }


def test_a_models_fingerprint_follows_its_weights_and_its_tokenizer_but_not_its_metrics(tmp_path):
    assert model_fingerprint(tmp_path) is None
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    first = model_fingerprint(tmp_path)
    (tmp_path / "metrics.json").write_text("{}")
    assert model_fingerprint(tmp_path) == first
    seen = {first}
    for name, content in (("model.safetensors", b"weightz"), ("tokenizer.json", b"{}"), ("chat_template.jinja", b"x")):
        (tmp_path / name).write_bytes(content)
        seen.add(model_fingerprint(tmp_path))
    assert len(seen) == 4


def test_keys_and_values_from_before_their_renaming_mean_the_same(tmp_path):
    @dataclass
    class Config:
        on_bad_example: str = "skip"
        enabled: bool = True
        max_per_task: int = 0

    (tmp_path / "old.yaml").write_text("bad_rows: refuse\nopt_in: true\nlimit: 5\n")
    assert parse_config(Config, tmp_path / "old.yaml") == Config("error", False, 5)
    assert parse_config(Config, tmp_path / "old.yaml", {"opt_in": "false", "limit": "7"}) == Config("error", True, 7)
    assert not set(KEY_ALIASES.values()) & set(KEY_ALIASES)
