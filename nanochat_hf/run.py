"""The run folder: one folder per stage, with its result and a metrics.json that the report and a rerun read.

Stages talk through folders only, so each can be rerun alone. The layout is `tokenizer/ base/ mid/ sft/ rl/ dpo/ eval/
report.md plots/` below the run folder.
"""

import dataclasses
import difflib
import hashlib
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from importlib import metadata
from pathlib import Path

from filelock import FileLock, Timeout
from packaging.requirements import Requirement
from safetensors import SafetensorError
from tqdm import tqdm

from .errors import InputError
from .metrics import Evaluation, StageMetrics, problem

STAGES = ("tokenizer", "base", "mid", "sft", "rl", "dpo", "eval", "report")
MODEL_STAGES = ("base", "mid", "sft", "rl", "dpo")
TITLES = dict(zip(STAGES, ("Tokenizer", "Base model", "Mid-training", "SFT", "RL", "DPO")))
PACKAGES = ("torch", "transformers", "accelerate", "trl", "datasets", "tokenizers", "peft", "lm_eval", "deepspeed")

LOG_SECONDS = 30  # between two lines of progress in a file
WORDS = {  # number of a step or a measurement -> how every log line and bar says it; others by name
    "train_loss": "loss {:.3f}", "reward": "reward {:.3f}", "completion_length": "{:.0f} tokens per completion",
    "tool_use": "tool use {:.0%}", "core": "CORE {:.4f}", "chatcore": "ChatCORE {:.4f}",
    "eval_rewards/accuracies": "accuracy {:.4f}", "lr": "lr {:.3g}", "momentum": "momentum {:.3f}",
    "grad_norm": "grad norm {:.3g}", "tokens_per_second": "{} tok/s", "mfu": "MFU {:.1%}",
}  # fmt: skip


class Run:
    """A run folder on disk; `path` need not exist yet."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def folder(self, stage: str) -> Path:
        return self.path / stage

    def metrics(self, stage: str) -> dict | None:
        return load_metrics(self.folder(stage), evaluation=stage == "eval")

    def finished(self, stage: str) -> bool:
        return bool((self.metrics(stage) or {}).get("finished"))

    def require_whole(self, stages: Iterable[str]) -> None:
        """Raise InputError for a finished stage that has lost files, of `stages` or of those that they start from."""
        needed = {*stages}
        for stage in (name for name in stages if not self.finished(name)):
            needed |= {"base": {"tokenizer"}, "eval": {*MODEL_STAGES}}.get(stage, set())
            needed |= {source.name for source in [self.latest_model(before=stage)] if source}
        for stage in ("tokenizer", *MODEL_STAGES):
            folder, files = self.folder(stage), ["tokenizer.json", "tokenizer_config.json"]
            files += ["config.json", "*.safetensors"] if stage in MODEL_STAGES else []
            lost = [name for name in files if not any(path.exists() for path in folder.glob(name))]
            if lost and stage in needed and self.finished(stage):
                reason = f"{folder} is incomplete: the stage has finished, but {lost[0]} is missing"
                raise InputError(f"{reason}; restore it, or delete that folder to run the stage again")

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other jobs out of the run folder, on the main process; the kernel drops the lock with the process."""
        if int(os.environ.get("RANK", "0")) > 0:
            yield
            return
        if own := next((name for name in ("metrics.json", "config.json") if (self.path / name).is_file()), None):
            raise InputError(f"{self.path} is no run folder, but one of a stage or model, with {own}: choose another")
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.path / ".lock")
            try:
                lock.acquire(timeout=0)
            except Timeout:
                raise InputError(f"another process works on {self.path}: wait, or choose another --run-dir") from None
        try:
            yield
        finally:
            if os.listdir(self.path) == [".lock"]:  # refused input leaves nothing
                shutil.rmtree(self.path)
            lock.release()

    def model(self, stage: str | None) -> Path:
        """The folder of a finished stage with weights, None: of the newest. Raises InputError if there is none."""
        finished = [name for name in MODEL_STAGES if self.finished(name)]
        if not (stage or finished):
            advice = "name it as --model" if (self.path / "config.json").is_file() else "run nanochat demo first"
            raise InputError(f"{self.path} has no finished stage with a model: {advice}")
        if stage and stage not in finished:
            finished = ", ".join(finished) or "none"
            raise InputError(f"stage {stage!r} of {self.folder(stage).parent} is not finished; finished: {finished}")
        return self.folder(stage or finished[-1])

    def latest_model(self, before: str = "eval") -> Path | None:
        """The folder of the newest finished stage with weights that comes before stage `before`, or None."""
        stages = [stage for stage in MODEL_STAGES if STAGES.index(stage) < STAGES.index(before)]
        return next((self.folder(stage) for stage in reversed(stages) if self.finished(stage)), None)


def project_folder(*names: str) -> Path:
    """A folder of the project, or what is below: inside the package if that came as a wheel, else beside it."""
    package = Path(__file__).parent
    inside = package / "shipped"
    return (inside if inside.is_dir() else package.parent).joinpath(*names)


def or_shipped(path: str | Path) -> Path:
    """The path; for a recipe's file outside of a checkout, as recipes/d12/sft.yaml, the project's own."""
    own = project_folder(str(path)) if str(path).startswith("recipes/") and not Path(path).exists() else Path(path)
    return own if own.is_file() else Path(path)


def first_non_finite(tensors) -> str | None:
    """Name of the first of (name, tensor) pairs that holds NaN or infinity."""
    for name, tensor in tensors:
        # FP8 has no isfinite
        values = tensor.float() if tensor.is_floating_point() and tensor.element_size() == 1 else tensor
        if not values.isfinite().all():
            return name
    return None


SYNONYMS = {  # names of transformers and TRL -> ours
    "dataset_name": "dataset", "grpo": "rl", "gradient_accumulation_steps": "total_batch_size",
    "learning_rate": "matrix_lr", "max_completion_length": "max_new_tokens", "max_steps": "num_iterations",
    "model_name_or_path": "model", "num_generations": "num_samples", "num_train_epochs": "num_epochs",
    "output_dir": "run_dir", "per_device_train_batch_size": "device_batch_size", "use_peft": "lora_r",
}  # fmt: skip


def nearest(name, names) -> str:
    """'did you mean X?' when a name is close to one of `names`, else the list of them."""
    plain = {str(ours).strip("-").replace("-", "_"): ours for ours in names}
    word = str(name).strip("-").replace("-", "_")
    close = [SYNONYMS[word]] if SYNONYMS.get(word) in plain else difflib.get_close_matches(word, plain, n=1)
    close = [plain[word] for word in close]
    few = [*map(str, names)][:30]  # lm-eval has 14,000 tasks
    return f"did you mean {close[0]!r}?" if close else "known: " + ", ".join(few) + " ..." * (len(few) < len(names))


def load_json(path: str | Path, remedy: str = "delete it to run that stage again", kind=None) -> dict | None:
    """The object in a JSON file, NaN as None; None if there is no file.

    Raises InputError that ends with `remedy` for what is no object of JSON, or not of the TypedDict `kind`.
    """
    try:
        if (place := Path(path)).is_fifo() or place.is_char_device():  # reading one would wait or never end
            raise InputError(f"{path} is a pipe or a device, no file; {remedy}")
        text = Path(path).read_text(encoding="utf-8")  # C, as in Matplotlib, has no longer integers
        value = without_nan(json.loads(text, parse_int=lambda word: float(word) if 18 < len(word) < 99 else int(word)))
        json.dumps(value, ensure_ascii=False).encode()  # not of half a pair of surrogates
        if not isinstance(value, dict):
            raise ValueError("no object")
    except FileNotFoundError:
        return None
    except OSError as error:  # a folder, below a file, no permission
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8
        raise InputError(f"{path} is not valid JSON ({error}); {remedy}") from None
    if kind and (reason := problem(value, kind)):
        raise InputError(f"{path}: {reason}; {remedy}")
    return value


def load_metrics(folder: str | Path, evaluation: bool = False) -> dict | None:
    """metrics.json of a stage's folder, or of the evaluation's."""
    record = load_json(Path(folder) / "metrics.json", kind=Evaluation if evaluation else StageMetrics)
    if evaluation and record and not record.get("weights"):  # before weights were recorded, models were paths
        models = record.get("models") or {}
        record["models"] = {stage: stage if Path(model).name == stage else model for stage, model in models.items()}
    return record


def without_nan(value):
    """`value` with None for NaN and infinities, which JSON does not have."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def fingerprint(value) -> str:
    """A short hash of a value that JSON can hold."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def model_fingerprint(folder: str | Path) -> str | None:
    """A short hash of weights, tokenizer and chat template; None if `folder` has no weights. About 1 s per GB."""
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        return None
    digest = hashlib.sha256()
    for path in [*files, Path(folder) / "tokenizer.json", Path(folder) / "chat_template.jinja"]:
        if path.is_file():
            with open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def save_json(path: str | Path, value) -> None:
    """Write JSON by `save_text`; NaN becomes null."""
    text = json.dumps(without_nan(value), indent=2, ensure_ascii=False, default=str, allow_nan=False)
    save_text(path, f"{text}\n")


def save_jsonl(path: str | Path, rows: Iterable[dict]) -> None:
    """As `save_json`, one row per line."""
    lines = (json.dumps(without_nan(row), ensure_ascii=False, allow_nan=False) for row in rows)
    save_text(path, "".join(f"{line}\n" for line in lines))


def save_text(path: str | Path, text: str) -> None:
    """Write a file beside the target and rename it, so that no reader sees half of it."""
    path = Path(path)
    aside = path.parent / f".{path.name}.{os.getpid()}"
    with writing(path):
        if path.exists() and not path.is_file():  # a device such as /dev/stdout, which must stay, or a folder
            path.write_text(text, encoding="utf-8")
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            aside.write_text(text, encoding="utf-8")
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)


@contextmanager
def writing(path: str | Path, hint: str = "") -> Iterator[None]:
    """Turn a failure to write below `path` (full disk, no permission) into an InputError that ends with `hint`."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        causes = [error]  # torch's zip writer hides the system's error, in a chain or altogether
        while following := causes[-1].__cause__ or causes[-1].__context__:
            causes.append(following)
        phrases = ("writing file", "unexpected pos", "iostream error")
        system = next((cause for cause in causes if isinstance(cause, OSError)), None)
        is_write_error = system or any(phrase in str(cause) for cause in causes for phrase in phrases)
        if isinstance(error, RuntimeError) and not is_write_error:
            raise
        reason = system.strerror if system and system.strerror else str(causes[-1]).splitlines()[0]
        raise InputError(f"cannot write {path}: {reason}; make room there or choose another place{hint}") from None


def short(count: int | None) -> str:
    """1433600 -> 1.4M."""
    if count is None:
        return "-"
    sizes = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K"))
    return next((f"{count / size:.1f}{letter}" for size, letter in sizes if count >= size), str(count))


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    minutes, hours = round(seconds) // 60, round(seconds) // 3600
    if not minutes:
        return f"{round(seconds)} s"
    if hours > 99:
        return f"{hours:,} h"
    return f"{hours} h {minutes % 60:02d} min" if hours else f"{minutes} min {round(seconds) % 60:02d} s"


def in_words(numbers: dict, names: Iterable[str]) -> str:
    """The numbers of `names` that are known, as "loss 2.345, lr 0.04, 11.9K tok/s"."""
    numbers = {name: numbers[name] for name in names if numbers.get(name) is not None}
    if speed := numbers.get("tokens_per_second"):
        numbers["tokens_per_second"] = short(round(speed))
    return ", ".join(WORDS.get(name, f"{name.replace('_', ' ')} {{:.4f}}").format(n) for name, n in numbers.items())


class Progress:
    """A bar in a terminal with a width, else a line every LOG_SECONDS, on the main rank; `first`: steps done."""

    FORMAT = "{n_fmt}/{total_fmt} {unit}{postfix}, ETA {remaining}"

    def __init__(self, name: str, total: int, first: int = 0, unit: str = "steps"):
        main, terminal = os.environ.get("RANK", "0") == "0", sys.stderr.isatty()
        terminal = terminal and os.get_terminal_size(sys.stderr.fileno()).columns > 0  # else tqdm prints nothing
        self.name, self.start = name, time.monotonic()
        self.due = self.start + LOG_SECONDS if main and not terminal else math.inf
        self.static = {"initial": first, "total": total, "unit": unit, "unit_scale": total >= 10**6}
        layout, hide = f"[{name}] {{percentage:3.0f}}%|{{bar:16}}| {self.FORMAT}", not (main and terminal)
        self.bar = tqdm(bar_format=layout, dynamic_ncols=True, leave=False, disable=hide, **self.static)

    def update(self, done: int, words: str = "") -> None:
        """`done` steps are done; `words` are the newest numbers."""
        now = time.monotonic()
        if now >= self.due:
            self.due, layout = now + LOG_SECONDS, f"[{self.name}] {self.FORMAT}"
            values = {"n": done, "elapsed": now - self.start, "bar_format": layout, "postfix": words}
            print(tqdm.format_meter(**values, **self.static), file=sys.stderr, flush=True)
        self.bar.set_postfix_str(words, refresh=False)
        self.bar.update(done - self.bar.n)

    def close(self) -> None:
        self.bar.close()


def track(items: Iterable, name: str, total: int, unit: str) -> Iterator:
    """The items, with their progress."""
    with closing(Progress(name, total, unit=unit)) as progress:
        for done, item in enumerate(items, 1):
            yield item
            progress.update(done)


def apply_umask(folder: str | Path) -> None:
    """Give the files below `folder` the permissions of the umask; those of safetensors are for the owner only."""
    mask = os.umask(0)
    os.umask(mask)
    for path in Path(folder).rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(0o666 & ~mask)


def hardware() -> dict:
    """Device name, type and memory in bytes, number of ranks, cores, main memory in bytes, system."""
    import torch  # takes seconds, and the command line reads this module

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
    """The git commit of this code, and whether files differ from it; both None outside a git checkout."""

    def git(*arguments):
        command, here = ["git", *arguments], Path(__file__).parent
        done = subprocess.run(command, cwd=here, check=False, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None

    try:  # an installed package may lie in a repository of somebody else
        commit = git("ls-files", "--error-unmatch", Path(__file__).name) and git("rev-parse", "--short=10", "HEAD")
        return {"commit": commit, "dirty": bool(git("status", "--porcelain")) if commit else None}
    except OSError:  # no git on this machine
        return {"commit": None, "dirty": None}


def versions() -> dict:
    packages = reversed([*metadata.distributions()])  # of two on sys.path the first is imported
    installed = {package.name.lower().replace("-", "_"): package.version for package in packages}
    return {"python": platform.python_version()} | {name: installed.get(name) for name in PACKAGES}


def missing_packages() -> list[str]:
    """The requirements that are not installed, or in too old a version; vLLM has an environment of its own."""
    missing, left_out = [], ("dev", "docs", "vllm")
    for requirement in map(Requirement, metadata.requires("nanochat_hf") or ()):
        try:
            fits = requirement.specifier.contains(metadata.version(requirement.name), prereleases=True)
        except metadata.PackageNotFoundError:
            fits = False
        if not fits and not any(f'extra == "{extra}"' in str(requirement.marker) for extra in left_out):
            missing.append(str(requirement))
    return missing


def start_record(config) -> dict:
    """What metrics.json says of the start of a stage: commit, config, versions, hardware, time."""
    values = dataclasses.asdict(config)
    facts = {"config": values, "seed": values.get("seed"), "versions": versions(), "hardware": hardware()}
    return {**source(), **facts, "started": time.time()}


def write_metrics(folder: Path, record: dict, **numbers) -> dict:
    """Write folder/metrics.json, with `finished`: the last thing a stage does, on the main process."""
    elapsed = time.time() - record["started"]
    metrics = {**record, "wall_time_s": elapsed + record.get("earlier_wall_time_s", 0), **numbers, "finished": True}
    save_json(Path(folder) / "metrics.json", metrics)
    return metrics


KEY_ALIASES = {  # keys of recipes, flags and finished runs from before December 2026 -> those of today
    "assistant_only": "assistant_only_loss", "lora_rank": "lora_r", "adamw_lr": "lora_lr",
    "test_rows": "num_eval_pairs", "bad_rows": "on_bad_example", "limit": "max_per_task",
    "core_limit": "core_max_per_task", "max_spike": "max_loss_spike", "opt_in": "enabled",
    "rows of a step": "sequences per step",
}  # fmt: skip
VALUE_ALIASES = {"bad_rows": {"refuse": "error"}}  # the same of values, by their old key
BOOLEANS = dict.fromkeys(("true", "yes", "on", "y", "t", "1"), True)  # what flags and YAML may say
BOOLEANS |= dict.fromkeys(("false", "no", "off", "n", "f", "0"), False)


def renamed_keys(values: dict) -> dict:
    """The values of a stage's config, with today's names for old keys and old values."""

    def renamed(key, value):
        if key == "opt_in":  # `enabled` is its opposite; a word that is no boolean is left to the config
            word = str(value).lower()
            return not BOOLEANS[word] if word in BOOLEANS else value
        return VALUE_ALIASES.get(key, {}).get(value, value) if isinstance(value, str) else value

    return {KEY_ALIASES.get(key, key): renamed(key, value) for key, value in values.items()}
