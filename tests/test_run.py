"""Run folders, metrics.json, the way from a YAML and flags to a config, and errors in one line."""

import json
import os
import runpy
import subprocess
import sys
from dataclasses import field
from pathlib import Path
from unittest.mock import Mock

import psutil
import pytest
import torch

from nanochat_hf import run as module
from nanochat_hf.config import Parser, Place, keys_of, parse_config, settings
from nanochat_hf.errors import InputError, guarded
from nanochat_hf.stage_configs import STAGE_CONFIGS, ChatDataset

ROOT = Path(__file__).parent.parent
PATH = "/".join(["x" * 200] * 3)


@settings
class Config:
    depth: int = 4
    rate: float = 0.1
    fast: bool = False
    name: Place | None = None
    parts: list[ChatDataset] = field(default_factory=list)
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
        (f"name: {PATH}", {}, Config(name=PATH)),  # long as a whole, and each part is a name that a disk may have
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


def test_flags_become_keys_and_no_alias_is_a_name_of_today():
    parser = Parser("")
    parser.add_keys(Config)
    for words, keys in (
        (["--depth", "4", "--max-per-task=1", "--fast"], {"depth": "4", "max_per_task": "1", "fast": "true"}),
        (["--max_per_task", "-1", "--rate", "-.5e-3"], {"max_per_task": "-1", "rate": "-.5e-3"}),
        (["--fast", "--limit", "3"], {"fast": "true", "limit": "3"}),
    ):
        assert vars(parser.parse_args(words)) == keys
    assert not set(module.KEY_ALIASES.values()) & set(module.KEY_ALIASES)


def test_a_flag_of_a_place_has_its_home_folder_written_out_and_help_shows_defaults(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    parser = Parser("")
    parser.option("--run-dir", Place)
    parser.option("--system", default="~", help="a text")
    assert vars(parser.parse_args(["--run-dir=~/run"])) == {"run_dir": "/home/me/run", "system": "~"}
    assert parser.parse_args(["--system=~/run"]).system == "~/run" and "a text (default: ~)" in parser.format_help()


def test_documentation_and_help_list_every_key_in_step():
    text = (ROOT / "docs" / "configuration.md").read_text()
    script = runpy.run_path(str(ROOT / "scripts" / "make_configuration.py"))
    assert text == script["markdown"](), "run: python scripts/make_configuration.py > docs/configuration.md"
    for cls in STAGE_CONFIGS.values():
        assert all(meaning for *_, meaning in keys_of(cls)), "every key has a docstring"


HELP = """
import contextlib, io, runpy, sys
for path in sys.argv[1:]:
    sys.argv = [path, "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
        runpy.run_path(path, run_name="__main__")
    assert "options:" in text.getvalue(), path
assert not (large := {"torch", "transformers", "datasets", "fastapi"} & set(sys.modules)), large
"""


def test_help_imports_nothing_large():
    others = ("bench", "make_configuration", "make_works_with")
    names = [path for path in (ROOT / "scripts").glob("*.py") if not path.stem.startswith(others)]
    command = [sys.executable, "-c", HELP, ROOT / "recipes" / "speedrun.py", *names]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_stage_counts_as_finished_only_with_its_metrics(tmp_path):
    run, record = module.Run(tmp_path), module.start_record(Config())
    record["started"] -= 7
    record["earlier_wall_time_s"] = 100
    module.save_json(run.folder("base") / "metrics.json", record)
    assert not run.finished("base")
    module.write_metrics(run.folder("base"), record, val_bpb=1.5)
    metrics = run.metrics("base")
    assert run.finished("base") and metrics["val_bpb"] == 1.5 and metrics["seed"] == 3
    assert metrics["config"]["depth"] == 4 and 107 <= metrics["wall_time_s"] < 120
    assert metrics["versions"]["torch"] == torch.__version__ and metrics["versions"]["trl"]
    assert run.latest_model() == run.folder("base") and run.latest_model(before="base") is None
    for stage in ("sft", "rl"):
        module.write_metrics(run.folder(stage), record)
    assert run.latest_model() == run.folder("rl") and run.latest_model(before="rl") == run.folder("sft")
    assert run.model(None) == run.folder("rl")


def test_json_is_written_aside_without_nan_and_half_files_are_named(tmp_path):
    path = tmp_path / "a.json"
    module.save_json(path, {"loss": float("nan"), "rows": [1.5, (float("inf"), {"x": -float("inf")})]})
    text = path.read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"loss": None, "rows": [1.5, [None, {"x": None}]]}
    assert module.load_json(tmp_path / "none.json") is None and [p.name for p in tmp_path.iterdir()] == ["a.json"]
    for content in ('{"x": ', "[1]", "", "\x00"):
        path.write_text(content)
        with pytest.raises(InputError, match=r"a\.json is not valid JSON"):
            module.load_json(path)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write"):
        module.save_json(tmp_path / "file" / "c.json", {})


def test_only_failures_to_write_become_input_errors(tmp_path):
    torn = RuntimeError("[enforce fail at inline_container.cc:783] . unexpected pos 64 vs 0")
    for error in (OSError(28, "No space left on device"), torn):
        message = f"cannot write {tmp_path}: .*; make room.*; the last one is here$"
        with pytest.raises(InputError, match=message), module.writing(tmp_path, "; the last one is here"):
            raise error
    with pytest.raises(RuntimeError, match="shapes"), module.writing(tmp_path):
        raise RuntimeError("shapes differ")


def test_files_below_a_folder_get_the_permissions_of_the_umask(tmp_path):
    (tmp_path / "file").touch(0o600)
    before = os.umask(0o027)
    try:
        module.apply_umask(tmp_path)
        assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640 and os.umask(0o027) == 0o027
    finally:
        os.umask(before)


def test_a_models_fingerprint_follows_its_weights_and_its_tokenizer_but_not_its_metrics(tmp_path):
    assert module.model_fingerprint(tmp_path) is None
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    first = module.model_fingerprint(tmp_path)
    (tmp_path / "metrics.json").write_text("{}")
    assert module.model_fingerprint(tmp_path) == first
    prints = {first}
    for name, content in (("model.safetensors", b"weightz"), ("tokenizer.json", b"{}"), ("chat_template.jinja", b"x")):
        (tmp_path / name).write_bytes(content)
        prints.add(module.model_fingerprint(tmp_path))
    assert len(prints) == 4


MEMORY = "CUDA out of memory. Tried to allocate 2.00 GiB."


@pytest.mark.parametrize(
    "error,rank,code,line",
    [
        (InputError("no"), 0, 2, "error: no\n"),
        (InputError("no"), 3, 2, ""),  # the main rank shows it
        (FloatingPointError("nan"), 0, 2, "error: nan\n"),
        (KeyboardInterrupt(), 0, 130, ""),
        (InputError("a\nb"), 0, 2, "error: a b\n"),
        (RuntimeError("can't allocate memory: 9 bytes."), 0, 2,
         "error: out of memory. Lower device_batch_size or use a smaller model. (can't allocate memory: 9 bytes.)\n"),
        (
            torch.OutOfMemoryError(f"{MEMORY} GPU 0 has a total capacity of 79.19 GiB of which ..."), 3, 2,
            f"error: out of GPU memory. Lower device_batch_size or use a smaller model. ({MEMORY})\n",
        ),
    ],
)  # fmt: skip
def test_expected_errors_end_a_script_in_one_line(capsys, monkeypatch, error, rank, code, line):
    def main():
        raise error

    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(SystemExit) as caught:
        guarded(main)
    assert caught.value.code == code and capsys.readouterr().err == line


@pytest.mark.parametrize("error,code", [(BrokenPipeError(), 141), (OSError(28, "full"), 2)])
def test_output_that_nobody_takes_is_dropped(tmp_path, monkeypatch, error, code):
    with open(tmp_path / "out", "w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        with pytest.raises(SystemExit) as caught:
            guarded(Mock(side_effect=error))
        out.write("lost")
    assert caught.value.code == code and (tmp_path / "out").read_text() == ""


def test_the_recorded_version_is_of_the_package_that_is_imported(tmp_path, monkeypatch):
    for number in (1, 2):  # as a virtual environment with --system-site-packages has some twice
        information = tmp_path / str(number) / f"torch-{number}.0.dist-info"
        information.mkdir(parents=True)
        (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {number}.0\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "2"), str(tmp_path / "1"), *sys.path])
    assert module.versions.__wrapped__()["torch"] == "2.0"


def test_a_record_names_the_commit_and_whether_it_is_what_runs(tmp_path, monkeypatch):
    def git(*words) -> str:
        command = ["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b.c", *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    monkeypatch.setattr(module, "__file__", str(tmp_path / "run.py"))
    (tmp_path / "run.py").write_text("1")
    nothing = {"commit": None, "dirty": None}
    assert module.source() == nothing  # no repository
    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "x")
    assert module.source() == nothing  # one of somebody else
    git("add", "run.py")
    assert module.source() == {"commit": git("rev-parse", "HEAD")[:10], "dirty": True}
    git("commit", "-q", "-m", "y")
    assert module.source() == {"commit": git("rev-parse", "HEAD")[:10], "dirty": False}
    monkeypatch.setenv("PATH", "")
    assert module.source() == nothing  # no git


def test_a_record_names_the_hardware(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    expected = {"num_processes": 3, "device_memory_bytes": None, "memory_bytes": psutil.virtual_memory().total}
    for mps, device_type in ((False, "cpu"), (True, "mps")):
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda mps=mps: mps)
        facts = module.hardware()
        assert (expected | {"device_type": device_type}).items() <= facts.items() and facts["cpu_cores"] >= 1
        assert facts["device"] and (facts["device"] == "Apple MPS") == mps
