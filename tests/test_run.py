"""Run folders, metrics.json, the way from a YAML and flags to a config, and errors in one line."""

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
    writing,
)


@dataclass
class Config:
    depth: int = 4
    rate: float = 0.1
    fast: bool = False
    name: str | None = None
    parts: list[dict] = field(default_factory=list)
    seed: int = 3
    on_bad_example: str = "skip"
    enabled: bool = True
    max_per_task: int = 0


def parse(folder: Path, text: str, overrides: dict | None = None) -> Config:
    (folder / "stage.yaml").write_text(text)
    return parse_config(Config, folder / "stage.yaml", overrides)


@pytest.mark.parametrize(
    "text,overrides,expected",
    [
        ("", {}, Config()),
        ("depth: 12\nrate: 2e-5", {"depth": "7", "fast": "true"}, Config(depth=7, rate=2e-5, fast=True)),
        ("parts:\n- {dataset: a, rows: 3}", {}, Config(parts=[{"dataset": "a", "rows": 3}])),
        ("parts: [{dataset: a}]", {"parts": "[{dataset: b}]"}, Config(parts=[{"dataset": "b"}])),
        (
            "bad_rows: refuse\nopt_in: true\nlimit: 5",
            {},
            Config(on_bad_example="error", enabled=False, max_per_task=5),
        ),
        ("opt_in: true\nlimit: 5", {"opt_in": "false", "limit": "7"}, Config(enabled=True, max_per_task=7)),
        *(("", {"opt_in": word}, Config(enabled=False)) for word in ("True", "1", "yes")),
        *((f"opt_in: {word}", {}, Config(enabled=True)) for word in ("no", "0", "'False'")),
        ("bad_rows: skip", {"on_bad_example": "error"}, Config(on_bad_example="error")),
    ],
)
def test_yaml_sets_defaults_the_command_line_wins_and_old_names_mean_the_same(tmp_path, text, overrides, expected):
    assert parse(tmp_path, text, overrides) == expected


@pytest.mark.parametrize(
    "text,overrides,message",
    [
        ("1: 2", {}, "unknown key 1 for stage.yaml"),
        ("dept: 1", {}, "unknown key 'dept' for stage.yaml; did you mean 'depth'"),
        ("", {"dept": "1"}, "did you mean 'depth'"),
        ("", {"qqq": "1"}, "known: depth"),
        ("", {"depth": "many"}, "invalid int"),
        ("", {"parts": "[{"}, "parts is no valid YAML list or mapping"),
        ("- 1", {}, "must be a mapping"),
        ("a: [", {}, "is not valid YAML"),
    ],
)
def test_wrong_keys_and_values_are_one_clear_line(tmp_path, text, overrides, message):
    with pytest.raises(InputError, match=message) as caught:
        parse(tmp_path, text, overrides)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="cannot read"):
        parse_config(Config, tmp_path / "none.yaml")


def test_flags_become_keys_and_no_alias_is_a_name_of_today():
    assert parse_flags(["--depth", "4", "--a-b=1"]) == {"depth": "4", "a_b": "1"}
    for words in (["depth", "4"], ["--depth"]):
        with pytest.raises(InputError, match="--key value"):
            parse_flags(words)
    assert not set(KEY_ALIASES.values()) & set(KEY_ALIASES)


def test_a_stage_counts_as_finished_only_with_its_metrics(tmp_path):
    run, record = Run(tmp_path), start_record(Config())
    record["started"] -= 7
    record["earlier_wall_time_s"] = 100
    save_json(run.folder("base") / "metrics.json", record)
    assert not run.finished("base")
    write_metrics(run.folder("base"), record, val_bpb=1.5)
    metrics = run.metrics("base")
    assert run.finished("base") and metrics["val_bpb"] == 1.5 and metrics["seed"] == 3
    assert metrics["config"]["depth"] == 4 and 107 <= metrics["wall_time_s"] < 120
    assert metrics["versions"]["torch"] == torch.__version__ and metrics["versions"]["trl"]
    assert run.latest_model() == run.folder("base") and run.latest_model(before="base") is None
    for stage in ("sft", "rl"):
        write_metrics(run.folder(stage), record)
    assert run.latest_model() == run.folder("rl") and run.latest_model(before="rl") == run.folder("sft")
    with pytest.raises(InputError, match="unknown stage 'bas'; did you mean 'base'"):
        run.folder("bas")


def test_json_is_written_aside_without_nan_and_half_files_are_named(tmp_path):
    path = tmp_path / "a.json"
    save_json(path, {"loss": float("nan"), "rows": [1.5, (float("inf"), {"x": -float("inf")})]})
    text = path.read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"loss": None, "rows": [1.5, [None, {"x": None}]]}
    assert load_json(tmp_path / "none.json") is None and [p.name for p in tmp_path.iterdir()] == ["a.json"]
    for content in ('{"x": ', "[1]", "", "\x00"):
        path.write_text(content)
        with pytest.raises(InputError, match=r"a\.json is not valid JSON"):
            load_json(path)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write"):
        save_json(tmp_path / "file" / "c.json", {})


def test_only_failures_to_write_become_input_errors(tmp_path):
    torn = RuntimeError("[enforce fail at inline_container.cc:783] . unexpected pos 64 vs 0")
    for error in (OSError(28, "No space left on device"), torn):
        message = f"cannot write {tmp_path}: .*; make room.*; the last one is here$"
        with pytest.raises(InputError, match=message), writing(tmp_path, "; the last one is here"):
            raise error
    with pytest.raises(RuntimeError, match="shapes"), writing(tmp_path):
        raise RuntimeError("shapes differ")


def test_a_models_fingerprint_follows_its_weights_and_its_tokenizer_but_not_its_metrics(tmp_path):
    assert model_fingerprint(tmp_path) is None
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    first = model_fingerprint(tmp_path)
    (tmp_path / "metrics.json").write_text("{}")
    assert model_fingerprint(tmp_path) == first
    prints = {first}
    for name, content in (("model.safetensors", b"weightz"), ("tokenizer.json", b"{}"), ("chat_template.jinja", b"x")):
        (tmp_path / name).write_bytes(content)
        prints.add(model_fingerprint(tmp_path))
    assert len(prints) == 4


MEMORY = "CUDA out of memory. Tried to allocate 2.00 GiB."


@pytest.mark.parametrize(
    "error,rank,code,line",
    [
        (InputError("no"), 0, 2, "error: no\n"),
        (InputError("no"), 3, 2, ""),  # the main rank shows it
        (FloatingPointError("nan"), 0, 2, "error: nan\n"),
        (KeyboardInterrupt(), 0, 130, ""),
        (
            torch.OutOfMemoryError(f"{MEMORY} GPU 0 has a total capacity of 79.19 GiB of which ..."), 3, 2,
            f"error: {MEMORY} Lower device_batch_size, or take a smaller model\n",
        ),
    ],
)  # fmt: skip
def test_expected_errors_end_a_script_in_one_line(capsys, monkeypatch, error, rank, code, line):
    def main():
        raise error

    monkeypatch.setenv("RANK", str(rank))
    with pytest.raises(SystemExit) as caught:
        guarded(main)
    assert caught.value.code == code and capsys.readouterr().err == line


@pytest.mark.slow
@pytest.mark.parametrize("script,stage", [("base_train", "base"), ("chat_sft", "sft"), ("chat_rl", "rl")])
def test_a_script_shows_one_line_and_exit_code_two(tmp_path, script, stage):
    command = [sys.executable, f"scripts/{script}.py", "--config", f"recipes/cpu-demo/{stage}.yaml", "--run-dir"]
    missing = (
        "has no finished tokenizer" if stage == "base" else f"stage {stage!r} starts from a finished earlier stage"
    )
    for words, message in ((["--sed", "3"], "unknown key 'sed' for"), ([], missing)):
        root = Path(__file__).parent.parent
        done = subprocess.run([*command, tmp_path, *words], cwd=root, capture_output=True, text=True, check=False)
        last = done.stderr.strip().splitlines()[-1]
        assert done.returncode == 2 and last.startswith("error: ") and message in last
