"""Evaluate the models of a run with lm-eval: CORE, bits per byte, chat tasks; also CORE and ChatCORE during training.

    nanochat eval --config recipes/cpu-demo/eval.yaml --run-dir runs/cpu-demo

All tasks are the YAMLs of evals/tasks, which the lm-eval CLI runs, too. This runner is faster (shared prefixes,
batches of equal work, requests divided among ranks) and runs tools inside answers. An interrupted evaluation resumes
with the stage that it had not finished.
"""

import hashlib
import math
import shutil
import time
from collections.abc import Callable, Collection
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path

import torch
from tqdm import tqdm

from ..data.documents import local_path
from ..data.splits import files_below
from ..data.tokenizer import load_tokenizer
from ..distributed import broadcast_from_main, monitored_barrier, partial_state
from ..errors import InputError
from ..run import STAGES, Run, fingerprint, load_metrics, save_json, save_jsonl, start_record, track, write_metrics
from ..stage_configs import EvalConfig
from .bpb import held_out_bpb
from .core import GROUP, centered_mean, evaluate_core, input_error, load_tasks, quiet
from .lm_eval_model import Generator, LocalLM, load
from .report import compression, with_error
from .tasks import EVALS, MEANS, Tasks, task_manager
from .weights import model_id, outdated

PACKAGE = Path(__file__).parents[1]
CODE = ("eval/bpb", "eval/core", "eval/lm_eval_model", "eval/loglikelihood", "eval/tasks", "data/dataloader")
CODE += ("data/documents", "data/grading", "data/mixture", "data/tokenizer", "data/transforms", "kernels/decode")
CODE += ("tools", "tool_loop")  # decides results
OF_ALL = ("examples", "seconds", "weights", "models")  # keys of metrics.json that hold a value for every stage
NUMBERS = ("results", "core", *MEANS, *OF_ALL)  # all keys that hold values by stage


def evaluate(
    config: EvalConfig,
    models: dict[str, str],
    output: Path,
    engine: Callable | None = None,
    keep_unchanged: bool = False,
) -> dict | None:
    """Evaluate each stage's model and write output/metrics.json; returns its content on the main process.

    Args:
        models: stage -> folder or Hub id, for example {"base": "runs/d12/base", "sft": "runs/d12/sft"}.
        engine: (model, tokenizer) -> object with the `generate` of `Generator`, which is the default.
        keep_unchanged: reuse earlier results of stages whose weights, config, tasks and data are the same.

    Raises InputError: unknown task, no chat template, no bundle, no such model, weights that are not finite.
    """
    state, output, record = partial_state(), Path(output), start_record(config)
    check_counts(config, state.num_processes)
    load_metrics(output, evaluation=True)  # a damaged one is refused now, not when all is measured
    if not models:
        raise InputError("no finished model to evaluate: run the base stage first")
    refuse_nothing(config, models)
    with quiet():
        tasks, stages, definition, earlier = Tasks(config, models, output), {}, None, {}
        if state.is_main_process:
            definition = definition_of(config)
            earlier = by_stage(load_metrics(output, evaluation=True), definition) if keep_unchanged else {}
            earlier |= by_stage(load_metrics(output / "state", evaluation=True), definition)
        for stage, folder in models.items():
            weights = model_id(folder) if state.is_main_process else None
            unchanged = weights and stage in earlier and earlier[stage]["weights"] == weights
            measurement = broadcast_from_main(earlier[stage] if unchanged else None)
            if measurement:
                state.print(f"[eval] {stage}: measured earlier, with the same weights")
            else:
                measurement = evaluate_model(config, stage, folder, tasks, output, engine)
            if state.is_main_process:
                # A stage of this run is recorded by its name, so that a run folder can move.
                own = Path(folder).resolve() == (output.parent / stage).resolve()
                stages[stage] = measurement | {"weights": weights, "models": stage if own else folder}
                save_json(output / "state" / "metrics.json", {"definition": definition, **by_number(stages)})
        monitored_barrier("the end of the evaluation")
    if not state.is_main_process:
        return None
    stages |= other_stages(output, models, definition)
    numbers = by_number(stages)
    numbers["bytes_per_token"] = compression(load_tokenizer(next(iter(models.values()))))
    metrics = write_metrics(output, record, definition=definition, **numbers)
    run, samples = Run(output.parent), [path for path in output.glob("samples/*") if path.name not in stages]
    gone = [path for path in samples if path.name not in STAGES or not run.finished(path.name)]
    for folder in [output / "state", *gone]:
        shutil.rmtree(folder, ignore_errors=True)
    return metrics


def check_counts(config: EvalConfig, num_processes: int) -> None:
    for name in ("max_per_task", "core_max_per_task"):
        if (value := getattr(config, name)) is not None and value < num_processes:
            raise InputError(f"{name} is {value}: give at least one question for each of {num_processes} processes")


def definition_of(config: EvalConfig) -> str:
    """A hash of all that decides a result besides the weights: config, tasks, code that measures, local data."""
    files = [*EVALS.glob("tasks/*.*"), *PACKAGE.glob("demo/*.*"), *(PACKAGE / f"{name}.py" for name in CODE)]
    code = [(p.parts[-2:], hashlib.sha256(p.read_bytes()).hexdigest()) for p in sorted(files) if p.is_file()]
    parts = config.dataset if isinstance(config.dataset, list) else [{"dataset": config.dataset}]
    places = [config.chat_data, config.words, config.core_bundle, *(str(part.get("dataset")) for part in parts)]
    data = [
        (str(path), path.stat().st_size, path.stat().st_mtime_ns)
        for place in map(local_path, filter(None, places))
        for path in [place, *(map(place.joinpath, files_below(place)) if place.is_dir() else ())]
        if path.is_file()
    ]
    return fingerprint([asdict(config), code, data, metadata.version("lm_eval")])


def by_stage(record: dict | None, definition: str) -> dict[str, dict]:
    """The numbers of each stage in the content of a metrics.json, if they are by this definition."""
    if not record or record.get("definition") != definition:
        return {}
    stages = record.get("weights") or {}
    return {stage: {key: (record.get(key) or {}).get(stage) for key in NUMBERS} for stage in stages}


def by_number(stages: dict[str, dict]) -> dict[str, dict]:
    """The inverse of `by_stage`: name of a number -> stage -> value, in the order of the stages."""
    stages = {stage: stages[stage] for stage in sorted(stages, key=STAGES.index)}
    return {key: {s: n[key] for s, n in stages.items() if n[key] or key in OF_ALL} for key in NUMBERS}


def other_stages(output: Path, models: dict[str, str], definition: str) -> dict[str, dict]:
    """Earlier results of stages that were not measured now, if still true; others stay in a file that a line names."""
    record, run, lost = load_metrics(output, evaluation=True) or {}, Run(output.parent), []
    results = by_stage(record, definition)
    for stage, reason in outdated(run, record).items():
        model, weights = record["models"][stage], (record.get("weights") or {}).get(stage)
        if reason or not weights or (model != stage and model_id(model) not in (None, weights)):
            results.pop(stage, None)
        if stage not in {*results, *models} and (model != stage or run.finished(stage)):
            lost.append(stage)
    if lost:
        # A name of its own for each evaluation: a second loss must not replace what the first one kept.
        backup = output / f"metrics-{record.get('started') or 0:.0f}.json"
        shutil.copy(output / "metrics.json", backup)
        reason = "weights, config, tasks or data changed since"
        print(f"[eval] results of {', '.join(lost)} are left out: {reason}; all earlier ones are kept in {backup}")
    return {stage: numbers for stage, numbers in results.items() if stage not in models}


def evaluate_model(config, stage: str, folder: str, tasks: Tasks, output: Path, engine) -> dict:
    """All numbers of one stage; complete on the main process."""
    state, start, results, examples, rows, core = partial_state(), time.time(), {}, [], {}, None
    model, tokenizer = load(folder, config.dtype, state.device)
    generator = engine(model, tokenizer) if engine else Generator(model, tokenizer, config.batch_size)
    lm, seconds = LocalLM(model, tokenizer, config, generator), {}

    def log(name: str, words: str) -> None:
        if state.is_main_process:
            tqdm.write(f"[eval] {stage}: {name.replace('_', ' ')} {words}")

    if config.dataset and stage in config.bpb_stages:
        for name, dataset in bpb_datasets(config.dataset).items():
            result = held_out_bpb(model, tokenizer, dataset, config.bpb_tokens, config.batch_tokens)
            log(name, f"{result['value']:.4f}" if result else "unknown: its tokenizer is not byte-level")
            if result and math.isnan(result["value"]):
                raise InputError(f"{folder} gives NaN for text, in {model.dtype}: no number of it would mean anything")
            results |= {name: result} if result else {}
        seconds["val_bpb"] = time.time() - start
    if config.core_bundle and stage in config.core_stages:
        core = evaluate_core(lm, tasks.manager, config.core_max_per_task, state.print)
        if core:
            seconds["core"], share = core["seconds"], core["model_seconds"] / core["seconds"]
            log(core["label"], f"{core['value']:.4f} in {core['seconds']:.1f} s, {share:.0%} of it in the model")
    names = tasks.of(stage)
    for name in track(names, f"eval: {stage}", len(names), "tasks"):
        if name in tasks.chat and not tokenizer.chat_template:
            raise InputError(f"{folder} has no chat template, so it cannot answer {name}: evaluate a chat model")
        task_start = time.time()
        task_results, samples = tasks.run(name, lm)
        seconds[name] = time.time() - task_start
        for key, result in task_results.items():
            log(key, f"{format_result(result)}, {seconds[name]:.1f} s")
        results, examples, rows[name] = results | task_results, examples + samples[:2], samples
    if state.is_main_process:  # now, so that refused input costs no earlier ones
        shutil.rmtree(output / "samples" / stage, ignore_errors=True)
        for name in filter(rows.get, rows if config.log_samples else ()):
            save_jsonl(output / "samples" / stage / f"{name}.jsonl", rows[name])
    means = {}
    for kind, (_, label, part) in MEANS.items():
        members = {name: result for name, result in results.items() if result.get(kind)}
        means[kind] = centered_mean(members, label, len(tasks.members(kind)), part)
    seconds["all"] = time.time() - start
    return {"results": results, "core": core, **means, "examples": examples, "seconds": seconds}


def bpb_datasets(dataset: str | list[dict]) -> dict[str, str | list[dict]]:
    """Name of a result -> dataset. A part org/name/data/kor_Hang/train of a mixture is named after kor_Hang."""
    datasets = {"val_bpb": dataset}
    for place in [part["dataset"] for part in dataset] if isinstance(dataset, list) else ():
        name = next((part for part in reversed(Path(place).parts) if part not in ("train", "data")), place)
        datasets[f"bpb {name if datasets.get(f'bpb {name}', place) == place else place}"] = place
    return datasets


def format_result(result: dict) -> str:
    text = with_error(result["value"], result.get("stderr"))
    if result.get("baseline"):
        text += f" (random baseline {result['baseline']:.2f})"
    if result.get("unchecked"):
        text += f", {result['unchecked']} of {result['n']} tests cannot be checked and count as wrong"
    return text + (f", tool use {result['tool_use']:.0%}" if "tool_use" in result else "")


def check_tasks(config: EvalConfig, stages: Collection[str], output: Path) -> None:
    """Raise InputError if the data of a task cannot be had for an evaluation of `stages`; hours before it runs."""
    refuse_nothing(config, stages)
    with quiet():
        if {*config.core_stages} & {*stages}:
            check_bundle(config)
        Tasks(config, dict.fromkeys(stages, ""), output)


def refuse_nothing(config: EvalConfig, stages: Collection[str]) -> None:
    """Raise InputError if nothing would be measured, whose record would replace that of an earlier evaluation."""
    chat = {*config.chat_stages, *(config.text_stages or ())}
    parts = [(config.tasks, chat), (config.dataset, config.bpb_stages), (config.core_bundle, config.core_stages)]
    if not any(data and {*names} & {*stages} for data, names in parts):
        advice = "name tasks with chat_stages, dataset with bpb_stages, or core_bundle with core_stages"
        raise InputError(f"nothing would be measured of {', '.join(stages)}: {advice}")


def check_bundle(config: EvalConfig) -> None:
    if config.core_bundle:
        input_error(lambda: next(iter(load_tasks(task_manager(config), [GROUP]).values())).file)


def core_metric(tokenizer, bundle: str) -> Callable[[torch.nn.Module, int], float]:
    """CORE in training: (model in eval mode, examples per task) -> mean of the bundle's tasks, on every rank."""
    manager = task_manager(config := EvalConfig(core_bundle=bundle))

    def measure(model, max_per_task: int) -> float:
        with quiet():
            lm = LocalLM(model, tokenizer, config)
            core = evaluate_core(lm, manager, max_per_task if max_per_task > 0 else None, log=lambda line: None)
        return broadcast_from_main(core and core["value"])

    return measure


def chatcore_metric(config: EvalConfig, tokenizer, output: Path, engine: Callable | None = None) -> Callable:
    """ChatCORE during training: (model in eval mode, questions per task) -> centered mean, the same on every rank.

    The mean is over ChatCORE's tasks, where `config.tasks` has some, and over all its accuracies otherwise; NaN if the
    questions of every task have one answer. `engine` is built once; its weights are synced. Raises InputError for a
    task that is unknown or whose questions are missing, or no chat task at all.
    """
    config = replace(config, chat_stages=["sft"], num_samples=1, temperature=0.0)
    with quiet():
        tasks = Tasks(config, {"sft": ""}, Path(output))
    if not tasks.chat:
        raise InputError(f"none of {', '.join(config.tasks) or 'no tasks'} is a chat task")
    engines = []

    def measure(model, max_per_task: int) -> float:
        if not engines:
            engines.append((engine or Generator)(model, tokenizer))
        elif hasattr(engines[0], "sync_weights"):
            engines[0].sync_weights()
        tasks.config = replace(config, max_per_task=max_per_task if max_per_task > 0 else None)
        results = {}
        with quiet():
            lm = LocalLM(model, tokenizer, config, engines[0])
            for name in tasks.chat:
                results |= tasks.run(name, lm)[0]
        chatcore = {name: result for name, result in results.items() if result.get("chatcore")}
        mean = centered_mean(chatcore or results, "ChatCORE", len(results))
        return broadcast_from_main(mean["value"] if mean else math.nan)

    return measure
