"""A run folder: where each stage keeps its result, its metrics.json, and how a stage's YAML becomes its config.

Stages talk through folders only, so each can be rerun alone; metrics.json is what the report, the model card and a
rerun read. The layout is `tokenizer/ base/ mid/ sft/ rl/ eval/ report.md plots/` below the run folder.
"""

import dataclasses
import difflib
import hashlib
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import torch
import yaml
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from trl import TrlParser

from .errors import InputError

STAGES = ("tokenizer", "base", "mid", "sft", "rl", "eval", "report")
MODEL_STAGES = ("base", "mid", "sft", "rl")
TITLES = {"tokenizer": "Tokenizer", "base": "Base model", "mid": "Mid-training", "sft": "SFT", "rl": "RL"}
PACKAGES = ("torch", "transformers", "accelerate", "trl", "datasets", "tokenizers", "peft", "lm_eval", "deepspeed")


class Run:
    """A run folder on disk; `path` need not exist yet."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def folder(self, stage: str) -> Path:
        if stage not in STAGES:
            raise InputError(f"unknown stage {stage!r}; {nearest(stage, STAGES)}")
        return self.path / stage

    def metrics(self, stage: str) -> dict | None:
        return load_json(self.folder(stage) / "metrics.json")

    def finished(self, stage: str) -> bool:
        return bool((self.metrics(stage) or {}).get("finished"))

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other jobs out of the run folder; the kernel drops the lock when the process ends, however it ends.

        Raises InputError if another job holds it. Ranks other than the main one have nothing to lock.
        """
        if int(os.environ.get("RANK", "0")) > 0:
            yield
            return
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.path / ".lock")
            try:
                lock.acquire(timeout=0)
            except Timeout:
                raise InputError(
                    f"another process works on {self.path}: wait until it ends, or choose another --run-dir"
                ) from None
        try:
            yield
        finally:
            lock.release()

    def latest_model(self, before: str = "eval") -> Path | None:
        """The folder of the last finished stage with weights that comes before stage `before`, or None."""
        stages = [stage for stage in ("base", "mid", "sft", "rl") if STAGES.index(stage) < STAGES.index(before)]
        return next((self.folder(stage) for stage in reversed(stages) if self.finished(stage)), None)


def nearest(name: str, names) -> str:
    """'did you mean X?' when a name is close to one of `names`, else the list of them."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else "known: " + ", ".join(map(str, names))


def load_json(path: str | Path) -> dict | None:
    try:
        value = json.loads(Path(path).read_text())
        if not isinstance(value, dict):
            raise ValueError("no object, as everything that is written here")
    except FileNotFoundError:
        return None
    except (ValueError, OSError) as error:  # no JSON, no UTF-8; a folder, no permission
        raise InputError(f"{path} is not valid JSON ({error}); delete it to run that stage again") from None
    return value


def without_nan(value):
    """`value` with None for each float that JSON has no word for (NaN, infinities)."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def fingerprint(value) -> str:
    """A short hash of a plain value (whatever JSON can hold), for noticing that it changed."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def model_fingerprint(folder: str | Path) -> str | None:
    """A short hash of the files that decide what a model answers; None if `folder` has no weights.

    Covers the content of the weights, the tokenizer and the chat template. Reads all of it: about 1 s per GB.
    """
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        return None
    digest = hashlib.sha256()
    for path in [*files, Path(folder) / "tokenizer.json", Path(folder) / "chat_template.jinja"]:
        if path.exists():
            with open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def save_json(path: str | Path, value) -> None:
    """Write beside the target and rename, so that a reader never sees half a file. NaN and infinities become null."""
    path = Path(path)
    text = json.dumps(without_nan(value), indent=2, ensure_ascii=False, default=str, allow_nan=False)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.{os.getpid()}")
        aside.write_text(text + "\n")
        os.replace(aside, path)


@contextmanager
def writing(path: str | Path, left: str = "") -> Iterator[None]:
    """Turn a failure to write below `path` (full disk, no permission) into an InputError; `left` says what is safe.

    safetensors and torch's zip writer have exceptions of their own for the same failures.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        causes = [error]  # torch's zip writer hides the system's error, in a chain or altogether
        while following := causes[-1].__cause__ or causes[-1].__context__:
            causes.append(following)
        words = ("writing file", "unexpected pos", "iostream error")
        system = next((cause for cause in causes if isinstance(cause, OSError)), None)
        torn = any(word in str(cause) for cause in causes for word in words)
        if isinstance(error, RuntimeError) and not (system or torn):
            raise
        reason = system.strerror if system and system.strerror else str(causes[-1]).splitlines()[0]
        raise InputError(f"cannot write {path}: {reason}; make room there or choose another place{left}") from None


def apply_umask(folder: str | Path) -> None:
    """Give the files below `folder` the permissions of the umask: safetensors lets only their owner read them."""
    mask = os.umask(0)
    os.umask(mask)
    for path in Path(folder).rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(0o666 & ~mask)


def hardware() -> dict:
    """What this process computes on: device name and count, cores, memory in bytes."""
    cuda = torch.cuda.is_available()
    mps = torch.backends.mps.is_available()
    return {
        "device": torch.cuda.get_device_name(0) if cuda else "Apple MPS" if mps else platform.processor() or "CPU",
        "device_type": "cuda" if cuda else "mps" if mps else "cpu",
        "device_memory_bytes": torch.cuda.get_device_properties(0).total_memory if cuda else None,
        "num_processes": int(os.environ.get("WORLD_SIZE", "1")),
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.machine()}",
    }


def source() -> dict:
    """The commit this code stands at, and whether files differ from it; both None outside a git checkout."""

    def git(*words):
        done = subprocess.run(["git", *words], cwd=Path(__file__).parent, check=False, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None

    try:
        commit = git("rev-parse", "--short=10", "HEAD")
        return {"commit": commit, "dirty": bool(git("status", "--porcelain")) if commit else None}
    except OSError:  # no git on this machine
        return {"commit": None, "dirty": None}


def versions() -> dict:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def start_record(config) -> dict:
    """The facts of a stage that are known when it starts; `config` is the stage's dataclass."""
    values = dataclasses.asdict(config)
    facts = {"config": values, "seed": values.get("seed"), "versions": versions(), "hardware": hardware()}
    return {**source(), **facts, "started": time.time()}


def write_metrics(folder: Path, record: dict, **numbers) -> dict:
    """Write folder/metrics.json with `finished`; call it last, on the main process, when the folder is complete."""
    elapsed = time.time() - record["started"]
    metrics = {**record, "wall_time_s": elapsed + record.get("earlier_wall_time_s", 0), **numbers, "finished": True}
    save_json(Path(folder) / "metrics.json", metrics)
    return metrics


class _Parser(TrlParser):
    def error(self, message):
        raise InputError(message)


KEY_ALIASES = {  # keys of recipes, flags and finished runs from before December 2026 -> those of today
    "assistant_only": "assistant_only_loss",
    "lora_rank": "lora_r",
    "adamw_lr": "lora_lr",
    "test_rows": "num_eval_pairs",
    "bad_rows": "on_bad_example",
    "limit": "max_per_task",
    "core_limit": "core_max_per_task",
    "max_spike": "max_loss_spike",
    "opt_in": "enabled",
}
VALUE_ALIASES = {  # the same of values, by their old key
    "bad_rows": {"refuse": "error"},
    "opt_in": {True: False, False: True, "true": "false", "false": "true"},
}


def renamed_keys(values: dict) -> dict:
    """The values of a stage's config, old keys and old values given the names of today."""
    return {
        KEY_ALIASES.get(key, key): VALUE_ALIASES.get(key, {}).get(value, value)
        if isinstance(value, str | bool)
        else value
        for key, value in values.items()
    }


def parse_config(cls, path: str | Path, overrides: dict[str, str] | None = None):
    """Read a stage's flat YAML into its dataclass `cls`; `overrides` (key -> text, as typed) win over the file."""
    overrides = overrides or {}
    try:
        values = yaml.safe_load(Path(path).read_text()) or {}
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path} must be a mapping of keys to values")
    values, overrides = renamed_keys(values), renamed_keys(overrides)
    known = [field.name for field in dataclasses.fields(cls)]
    for key in [*values, *overrides]:
        if key not in known:
            raise InputError(f"unknown key {key!r} for {Path(path).name}; {nearest(key, known)}")
    flags = []
    for key, text in overrides.items():
        if text[:1] in "[{":  # a list or mapping typed on the command line; argparse has no syntax for it
            try:
                values[key] = yaml.safe_load(text)
            except yaml.YAMLError:
                raise InputError(f"{key} is no valid YAML list or mapping: {text}") from None
        else:
            flags += [f"--{key}={text}"]
    parser = _Parser(cls, allow_abbrev=False)
    parser.set_defaults_with_config(**values)
    return parser.parse_args_into_dataclasses(flags)[0]


def fail(error: Exception):
    """Show an input error as one line, on the main process only, and leave with exit code 2."""
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"error: {error}", file=sys.stderr, flush=True)
    sys.exit(2)


def guarded(main: Callable) -> None:
    """Run `main`; an InputError, a loss that is not finite, or too little memory on a GPU becomes one line on stderr
    and exit code 2, Ctrl-C 130 without a traceback."""
    try:
        main()
    except (InputError, FloatingPointError) as error:
        fail(error)
    except torch.OutOfMemoryError as error:  # perhaps on this process alone
        found = str(error).partition(" GPU ")[0]
        print(f"error: {found} Lower device_batch_size, or take a smaller model", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def script(cls, run_stage: Callable, **extra: str) -> None:
    """The main function of scripts/*: `--config YAML --run-dir DIR [--key value ...]`, then run_stage(config, run).

    `extra` declares further optional arguments (name -> help); they reach run_stage as keywords, None if not given.
    """

    def main():
        parser = _Parser(description=sys.modules["__main__"].__doc__, allow_abbrev=False)
        parser.add_argument("--config", required=True, help="YAML of this stage, for example recipes/d12/base.yaml")
        parser.add_argument("--run-dir", required=True, help="run folder, for example runs/d12")
        for name, text in extra.items():
            parser.add_argument(f"--{name.replace('_', '-')}", help=text)
        arguments, rest = parser.parse_known_args()
        options = {name: getattr(arguments, name) for name in extra}
        config = parse_config(cls, arguments.config, pairs(rest))
        run = Run(arguments.run_dir)
        with run.lock():
            run_stage(config, run, **options)

    guarded(main)


def pairs(words: list[str]) -> dict[str, str]:
    """['--depth', '4', '--seed=1'] -> {'depth': '4', 'seed': '1'}."""
    found, words = {}, list(words)
    while words:
        word = words.pop(0)
        key, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not (equals or words):
            raise InputError(f"expected --key value, got {word!r}")
        found[key.replace("-", "_")] = value if equals else words.pop(0)
    return found
