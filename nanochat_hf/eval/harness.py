"""Evaluate the models of a run with lm-eval: CORE and bits per byte of the base model, chat tasks of the others.

All tasks are the YAMLs of evals/tasks, which the plain `lm_eval` command line runs, too; what this file adds is speed
(prefixes shared, batches of equal work, every rank a share of the questions) and tools that run inside answers.

    python scripts/run_evals.py --config recipes/cpu-demo/eval.yaml --run-dir runs/cpu-demo

Results go to eval/metrics.json, every question with its answer to eval/samples/<stage>/<task>.jsonl. A killed
evaluation goes on with the stage that it had not finished.

ChatCORE while a model trains: the chat tasks of eval.yaml, a few questions of each.

`train_chat` calls what `chatcore_metric` returns every `chatcore_every` steps; recipes/speedrun.py and
scripts/chat_sft.py bring the two together, since training does not know evaluation.

    measure = chatcore_metric(EvalConfig(tasks=["nanochat_chatcore"]), tokenizer, folder)
    measure(model, 32)  # -> 0.21, questions of each task at most 32
"""

import hashlib
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from math import nan
from pathlib import Path

import torch
from lm_eval.tasks import TaskManager

from ..data.documents import local_path
from ..data.tokenizer import load_tokenizer
from ..distributed import broadcast_from_main, monitored_barrier, partial_state
from ..errors import InputError
from ..run import Run, fingerprint, load_json, save_json, start_record, write_metrics
from .bpb import held_out_bpb
from .core import centered_mean, evaluate_core, quiet
from .lm_eval_model import Generator, LocalLM, load
from .sections import MODEL_STAGES
from .sizes import bloat, compression
from .tasks import EVALS, MEANS, Tasks, bundle_folder, write_jsonl
from .weights import measured, model_id, outdated


@dataclass
class EvalConfig:
    """Keys of eval.yaml."""

    tasks: list[str] = field(default_factory=lambda: ["nanochat_demo"])
    """Tasks or groups for the chat stages: ours (evals/tasks) or any of lm-eval's."""
    chat_stages: list[str] = field(default_factory=lambda: ["mid", "sft", "rl"])
    """Stages that answer `tasks`; those that a run does not have are left out."""
    text_stages: list[str] | None = None
    """Stages that answer those of `tasks` that are plain text and no chat, as the Korean ones; None: chat_stages."""
    max_per_task: int | None = None
    """Questions per chat task; None for all."""
    chat_data: str | None = None
    """Folder with local files of the chat tasks (gsm8k_test.jsonl, ...); what it lacks comes from the Hub."""
    words: str | None = None
    """Words for SpellingBee: a .txt file with a word a line, or a dataset of text; None for those of `dataset`."""
    core_bundle: str | None = None
    """CORE's data: a folder, `download` for the official bundle (kept in the cache), None for no CORE."""
    core_stages: list[str] = field(default_factory=lambda: ["base"])
    """Stages that CORE is computed for."""
    core_max_per_task: int | None = None
    """Examples per CORE task, upstream's max_per_task; None for all."""
    dataset: str | None = "primer"
    """Text for bits per byte, its validation split; None for none. Of a mixture also those of each part."""
    bpb_tokens: int = 65536
    """Tokens of it."""
    bpb_stages: list[str] = field(default_factory=lambda: ["base", "mid", "sft", "rl"])
    """Stages that bits per byte are computed for."""
    batch_size: int = 128
    """Answers generated together."""
    batch_tokens: int | None = None
    """Positions scored together (CORE, multiple choice, bits per byte); None for what fits into memory."""
    max_new_tokens: int | None = None
    """Longest answer; None for what each task says."""
    num_samples: int = 1
    """Answers to each question; more than 1 gives pass@k and needs a temperature."""
    temperature: float = 0.0
    top_k: int = 50
    dtype: str = "auto"
    """auto (bfloat16 on CUDA, float32 elsewhere), float32 or bfloat16."""
    log_samples: bool = True
    """Keep every question with its answer in eval/samples."""
    seed: int = 0


PACKAGE = Path(__file__).parents[1]
PARTS = ("eval/bpb", "eval/core", "eval/lm_eval_model", "eval/loglikelihood", "eval/tasks", "data/grading")
PARTS += ("data/jsonl", "tools")


def evaluate(
    config: EvalConfig,
    models: dict[str, str],
    output: Path,
    engine: Callable | None = None,
    keep_unchanged: bool = False,
) -> dict | None:
    """Evaluate each stage's model and write output/metrics.json.

    Args:
        config: keys of eval.yaml.
        models: stage -> folder or Hub id, for example {"base": "runs/d12/base", "sft": "runs/d12/sft"}.
        output: the eval folder of the run.
        engine: (model, tokenizer) -> object with `generate`, such as `serve.engine.Engine`; None: the built-in one.
        keep_unchanged: take over from an earlier output/metrics.json the results of stages whose weights did not
            change, if config, tasks and data are the same.

    Returns:
        What stands in metrics.json, on the main process; None elsewhere. "weights" says which weights were measured.

    Raises:
        InputError: unknown task, no chat template, no bundle, no such model, weights that are not finite.
    """
    state, output, record = partial_state(), Path(output), start_record(config)
    check_counts(config, state.num_processes)
    if not models:
        raise InputError("no finished model to evaluate: run the base stage first")
    with quiet():
        tasks = Tasks(config, models, output)
        identity = ()
        if state.is_main_process:
            identity = {stage: model_id(folder) for stage, folder in models.items()}, definition_of(config)
        (weights, definition), stages = broadcast_from_main(identity), {}
        for stage, folder in models.items():
            key = {"definition": definition, "weights": weights[stage]}
            found = broadcast_from_main(earlier(output, stage, key, keep_unchanged) if state.is_main_process else None)
            if found is None:
                found = key | evaluate_model(config, stage, folder, tasks, output, engine, state)
                if state.is_main_process:
                    save_json(output / "state" / f"{stage}.json", found)
            else:
                state.print(f"[eval] {stage}: measured earlier, with the same weights")
            stages[stage] = found
        monitored_barrier("the end of the evaluation")
    if not state.is_main_process:
        return None
    # A stage of this run goes by its name, so that a run folder can move.
    places = {s: s if Path(path).resolve() == (output.parent / s).resolve() else path for s, path in models.items()}
    for stage, (place, found) in carried(output, models, definition).items():
        stages[stage], places[stage], weights[stage] = found, place, found["weights"]
    stages = {stage: stages[stage] for stage in sorted(stages, key=MODEL_STAGES.index)}
    numbers = {key: {s: n[key] for s, n in stages.items() if n[key]} for key in ("results", "core", *MEANS)}
    numbers |= {key: {stage: found[key] for stage, found in stages.items()} for key in ("examples", "seconds")}
    numbers["bytes_per_token"] = compression(load_tokenizer(next(iter(models.values()))))
    what = {"models": places, "weights": weights, "definition": definition}
    metrics = write_metrics(output, record, **what, bloat=bloat(), **numbers)
    gone = [path for path in output.glob("samples/*") if path.name not in stages and not exists(output, path.name)]
    for folder in [output / "state", *gone]:
        shutil.rmtree(folder, ignore_errors=True)
    return metrics


def exists(output: Path, stage: str) -> bool:
    return stage in MODEL_STAGES and Run(output.parent).finished(stage)


def carried(output: Path, models: dict[str, str], definition: str) -> dict[str, tuple[str, dict]]:
    """Stages measured earlier and not now -> (model, numbers), if weights and definition are still the same.

    A line names those of the run's stages whose results are left out.
    """
    record = load_json(output / "metrics.json") or {}
    old, weights, kept, lost = outdated(Run(output.parent), record), record.get("weights") or {}, {}, []
    for stage, elsewhere in measured(record).items():
        if stage in models:
            continue
        changed = stage in old or (elsewhere and model_id(elsewhere) not in (None, weights.get(stage)))
        key = {"definition": definition, "weights": weights.get(stage)}
        found = None if changed else earlier(output, stage, key, keep_unchanged=True)
        if found:
            kept[stage] = elsewhere or stage, found
        elif elsewhere or exists(output, stage):
            lost.append(stage)
    if lost:
        print(f"[eval] results of {', '.join(lost)} are left out: weights, config, tasks or data changed since")
    return kept


def check_counts(config: EvalConfig, num_processes: int) -> None:
    if config.num_samples > 1 and config.temperature == 0:
        raise InputError("num_samples above 1 needs a temperature: greedy answers would all be the same")
    for name in ("max_per_task", "core_max_per_task"):
        if (value := getattr(config, name)) is not None and value < num_processes:
            raise InputError(f"{name} is {value}: give at least one question for each of {num_processes} processes")


def definition_of(config: EvalConfig) -> str:
    """A hash of all that decides a result besides the weights: config, tasks, code that measures, local data."""
    files = [*EVALS.glob("tasks/*.*"), *PACKAGE.glob("demo/*.*"), *(PACKAGE / f"{name}.py" for name in PARTS)]
    code = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files if path.is_file()}
    parts = config.dataset if isinstance(config.dataset, list) else [{"dataset": config.dataset}]
    places = [config.chat_data, config.words, config.core_bundle, *(str(part.get("dataset")) for part in parts)]
    data = [
        (str(path), path.stat().st_size, path.stat().st_mtime_ns)
        for place in filter(None, places)
        for path in sorted([local_path(place), *local_path(place).rglob("*")])
        if path.is_file()
    ]
    return fingerprint([asdict(config), code, data, metadata.version("lm_eval")])


def earlier(output: Path, stage: str, key: dict, keep_unchanged: bool) -> dict | None:
    """The numbers of this stage from an evaluation that broke off, or from the finished one; only those of `key`."""
    candidates = [load_json(output / "state" / f"{stage}.json") or {}]
    if keep_unchanged:
        whole = load_json(output / "metrics.json") or {}
        names = ("results", "core", *MEANS, "examples", "seconds", "weights")
        known = {name: whole[name][stage] for name in names if stage in (whole.get(name) or {})}
        candidates.append(known | {"definition": whole.get("definition")})
    for found in candidates:
        if key["weights"] and all(found.get(name) == value for name, value in key.items()):
            return dict.fromkeys(("core", *MEANS, "seconds")) | {"results": {}, "examples": []} | found
    return None


def part_name(dataset: str) -> str:
    """What to call a part of a mixture: org/name/data/kor_Hang/train -> kor_Hang."""
    return next((part for part in reversed(Path(dataset).parts) if part not in ("train", "data")), dataset)


def evaluate_model(config, stage: str, folder: str, tasks: Tasks, output: Path, engine, state) -> dict:
    """All numbers of one stage; the same on every rank except for what only the main process gathers."""
    began, seconds, results, examples, core = time.time(), {}, {}, [], None
    if state.is_main_process:
        shutil.rmtree(output / "samples" / stage, ignore_errors=True)
    model, tokenizer = load(folder, config.dtype, state.device)
    generator = engine(model, tokenizer) if engine else Generator(model, tokenizer, config.batch_size)
    lm = LocalLM(model, tokenizer, config, generator)
    if config.dataset and stage in config.bpb_stages:
        parts = {"val_bpb": config.dataset}
        if isinstance(config.dataset, list):
            parts |= {f"bpb {part_name(part['dataset'])}": part["dataset"] for part in config.dataset}
        for name, dataset in parts.items():
            found = held_out_bpb(model, tokenizer, dataset, config.bpb_tokens, config.batch_tokens)
            if found:
                results[name] = found
            if found and math.isnan(found["value"]):
                raise InputError(f"{folder} gives NaN for text, in {model.dtype}: no number of it would mean anything")
            words = f"{found['value']:.4f}" if found else "not known: its tokenizer is not byte-level"
            state.print(f"[eval] {stage}: {name.replace('_', ' ')} {words}")
        seconds["val_bpb"] = time.time() - began
    if config.core_bundle and stage in config.core_stages:
        start = time.time()
        core = tasks.core(lm, state.print)
        seconds["core"] = time.time() - start
        if core:
            share = f"{core['model_seconds'] / core['seconds']:.0%} of it in the model"
            state.print(f"[eval] {stage}: {core['label']} {core['value']:.4f} in {seconds['core']:.1f} s, {share}")
    for name in tasks.of(stage):
        if name in tasks.chat and not tokenizer.chat_template:
            raise InputError(f"{folder} has no chat template, so it cannot answer {name}: evaluate a chat model")
        start = time.time()
        found, samples = tasks.run(name, lm)
        seconds[name] = time.time() - start
        for key, value in found.items():
            results[key] = value
            state.print(f"[eval] {stage}: {key} {shown(value)} in {seconds[name]:.1f} s")
        if state.is_main_process and samples:
            examples += samples[:2]
            if config.log_samples:
                write_jsonl(output / "samples" / stage / f"{name}.jsonl", samples)
    means = {
        kind: centered_mean({k: v for k, v in results.items() if v.get(kind)}, label, len(tasks.members(kind)), part)
        for kind, (_, label, part) in MEANS.items()
    }
    seconds["all"] = time.time() - began
    return {"results": results, "core": core, **means, "examples": examples, "seconds": seconds}


def core_metric(tokenizer, bundle: str) -> Callable[[torch.nn.Module, int], float]:
    """(model, examples per task) -> mean centered accuracy, the same on every rank: CORE while a model trains.

    A bundle that lacks tasks gives the mean over those it has. The model must be in eval mode.
    """
    config = EvalConfig(core_bundle=bundle)
    metadata = {"core_bundle": bundle_folder(config)}
    manager = TaskManager(include_path=str(EVALS), include_defaults=False, metadata=metadata)

    def measure(model, limit: int) -> float:
        with quiet():
            lm = LocalLM(model, tokenizer, config)
            found = evaluate_core(lm, manager, limit if limit > 0 else None, log=lambda line: None)
        return broadcast_from_main(found and found["value"])

    return measure


def shown(result: dict) -> str:
    words = f"{result['value']:.4f}"
    if result.get("stderr") is not None:
        words += f" ± {result['stderr']:.4f}"
    if result.get("baseline"):
        words += f" (guessing {result['baseline']:.2f})"
    return words + (f", tool called in {result['tool_use']:.0%}" if "tool_use" in result else "")


def chatcore_metric(config: EvalConfig, tokenizer, output: Path, engine: Callable | None = None) -> Callable:
    """(model in eval mode, questions per task) -> mean centered accuracy, the same on every process.

    The mean is over ChatCORE's tasks, where `config.tasks` has some, and over all its accuracies otherwise; NaN if the
    few questions of every task have one answer, so that guessing is always right. Generated
    questions are written below `output`. `engine` as in harness.evaluate; it is made once and refreshed.

    Raises:
        InputError: a task that is unknown or whose questions cannot be had, or no chat task at all.
    """
    config = replace(config, chat_stages=["sft"], num_samples=1, temperature=0.0)
    with quiet():
        tasks = Tasks(config, {"sft": ""}, Path(output))
    if not tasks.chat:
        raise InputError(f"none of {', '.join(config.tasks) or 'no tasks'} is asked in a chat")
    engines = []

    def measure(model, limit: int) -> float:
        if not engines:
            engines.append((engine or Generator)(model, tokenizer))
        elif hasattr(engines[0], "sync_weights"):
            engines[0].sync_weights()
        tasks.config = replace(config, max_per_task=limit if limit > 0 else None)
        results = {}
        with quiet():
            lm = LocalLM(model, tokenizer, config, engines[0])
            for name in tasks.chat:
                results |= tasks.run(name, lm)[0]
        marked = {k: v for k, v in results.items() if v.get("chatcore")}
        found = centered_mean(marked or results, "ChatCORE", len(results))
        return broadcast_from_main(found["value"] if found else nan)

    return measure
