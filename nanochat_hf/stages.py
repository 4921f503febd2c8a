"""One runner per stage, and the pipeline of a recipe's stages.

    run_stage("sft", parse_config(ChatConfig, "recipes/d12/sft.yaml"), Run("runs/d12"))
    run_stages(Run("runs/d12"), *read_recipe(find_recipe("d12"), None, ["base.depth=10"]))

The pipeline skips a finished stage and resumes an interrupted one. It refuses a run folder whose stages have another
recipe or other inputs. A `model` or `tokenizer` is a folder or a Hub id; default: those of the run.
"""

import math
import os
import shlex
import sys
from pathlib import Path

import datasets

from .data.documents import is_local, text_fingerprint
from .data.mixture import check_data
from .data.tokenizer import load_tokenizer, tokenizer_fingerprint, train_tokenizer
from .demo import corpus as primer
from .distributed import (
    broadcast_from_main,
    main_process_first,
    monitored_barrier,
    on_cpu,
    partial_state,
    reset_accelerate_state,
)
from .errors import InputError
from .eval.harness import chatcore_metric, check_bundle, check_tasks, core_metric, definition_of, evaluate
from .eval.lm_eval_model import Generator
from .eval.report import make_report, markdown
from .eval.weights import REPLACED, origin, renewal, replaced
from .hub.push import checkpoint_pusher
from .loading import load_config
from .optim import scaling
from .optim.overview import Devices, gpu_here, pipeline_text, uses_fp8
from .run import MODEL_STAGES, Run, duration, in_words, load_json, load_metrics, renamed_keys
from .serve.engine import Engine
from .serve.terminal_chat import Chat, LocalModel, Options
from .stage_configs import ChatConfig, DPOStageConfig, EvalConfig, PretrainConfig, RLConfig, TokenizerConfig
from .train.dpo import train_dpo
from .train.grpo import train_rl
from .train.model_setup import check_attention
from .train.pretrain import pretrain
from .train.runtime import check_cost
from .train.sft import train_chat

datasets.disable_progress_bars()  # around internal work; our own lines say what happens
NO_MODEL = "stage {!r} starts from a finished earlier stage of {}: run base first, or give --model"
NO_TOKENIZER = "{} has no finished tokenizer: run `nanochat tokenizer` first, or give --tokenizer"
RL_COST = 2.6  # seconds per sampled token on a CPU, over those per trained token; the demo's, up to max_new_tokens


def engine(model, tokenizer):
    """What generates in evaluations and RL: the engine for nanochat models on CUDA, else transformers' forward."""
    fast = model.device.type == "cuda" and model.config.model_type in ("nanochat", "nanochat_hf")
    return Engine(model, tokenizer) if fast else Generator(model, tokenizer)


def new_folder(run: Run, stage: str) -> Path:
    """The stage's folder. Raises InputError if the stage is finished."""
    folder = run.folder(stage)
    if run.finished(stage):
        raise InputError(f"{folder} is finished already; delete it or choose another --run-dir")
    return folder


def start(stage: str, run: Run, model: str | None) -> tuple[Path, str]:
    """The folder of a chat stage and the model that it starts from, which is printed: `model`, or the run's newest."""
    folder, source = new_folder(run, stage), model or run.latest_model(before=stage)
    if source is None:
        raise InputError(NO_MODEL.format(stage, run.path))
    partial_state().print(origin(run, stage, str(source)))
    return folder, str(source)


def show_result(folder: Path) -> None:
    """Print one line about a finished stage, on the main process: its time, main figure and folder."""
    metrics = load_metrics(folder, folder.name == "eval") if partial_state().is_main_process else None
    if not metrics:
        return
    before, after = metrics.get("before") or {}, metrics.get("after") or {}
    figures = [f"{name} {before[name]:.4f} -> {after[name]:.4f}" for name in ("pass@1", "accuracy") if name in after]
    numbers = {key: value for row in [*(metrics.get("history") or ()), metrics] for key, value in row.items()}
    losses = [name for name in ("val_bpb", "val_loss", "train_loss") if numbers.get(name) is not None]
    figures += [in_words(numbers, losses[:1])] if losses and not figures else []
    if "vocab_size" in metrics:
        figures.append(f"{metrics['vocab_size']:,} tokens, {metrics['bytes_per_token']:.2f} bytes per token")
    for mean in (list((metrics.get(kind) or {}).values())[-1:] for kind in ("core", "chatcore", "kocore")):
        figures += [f"{part['label']} {part['value']:.4f}" for part in mean]
    for stage, results in [] if figures else list((metrics.get("results") or {}).items())[-1:]:
        values = [result["value"] for result in results.values() if result.get("higher_is_better", True)]
        figures += [f"mean of {len(values)} tasks {sum(values) / len(values):.4f} ({stage})"] if values else []
    print(", ".join([f"[{folder.name}] done in {duration(metrics['wall_time_s'])}", *figures, str(folder)]))


def run_tokenizer(config: TokenizerConfig, run: Run) -> None:
    folder = new_folder(run, "tokenizer")
    with main_process_first("the tokenizer") as main:
        if main:
            train_tokenizer(config, folder)


def run_base(config: PretrainConfig, run: Run, tokenizer=None, model=None, repo=None, tasks=None) -> None:
    """Pretrain; with CORE on the way if `tasks`, an EvalConfig, names a bundle; checkpoints go to the Hub's `repo`."""
    if not tokenizer and not run.finished("tokenizer"):
        raise InputError(NO_TOKENIZER.format(run.path))
    folder, tokenizer, core, push = new_folder(run, "base"), tokenizer or str(run.folder("tokenizer")), None, None
    if tasks and tasks.core_bundle and config.core_metric_every > 0:
        core = core_metric(load_tokenizer(tokenizer), tasks.core_bundle)
    elif config.core_metric_every > 0:
        partial_state().print("no CORE on the way: eval.core_bundle is null")
    if repo:  # all ranks take part in writing the folder, one uploads it
        push = checkpoint_pusher(repo) if partial_state().is_main_process else lambda folder, step: None
    pretrain(config, tokenizer, folder, model, core=core, push=push)


def run_chat(config: ChatConfig, run: Run, stage="sft", model=None, tasks=None, required=False) -> None:
    """Mid-training or SFT, with ChatCORE on `tasks`, an EvalConfig; without it if their data are not `required`."""
    (folder, source), chatcore = start(stage, run, model), None
    if tasks and config.chatcore_every > 0:
        try:
            chatcore = chatcore_metric(tasks, load_tokenizer(source), folder / "state", engine)
        except InputError as error:
            if required:
                raise
            partial_state().print(f"no ChatCORE on the way: {error}")
    train_chat(config, source, folder, chatcore)


def run_rl(config: RLConfig, run: Run, model: str | None = None) -> None:
    folder, source = start("rl", run, model)
    train_rl(config, source, folder, engine)


def run_dpo(config: DPOStageConfig, run: Run, model: str | None = None) -> None:
    folder, source = start("dpo", run, model)
    train_dpo(config, source, folder)


def run_eval(config: EvalConfig, run: Run, stages=None, model=None, **options) -> None:
    """Evaluate the finished stages of a run, those of `stages`, or another model as "base"."""
    names = stages or [name for name in MODEL_STAGES if run.finished(name)]
    models = {"base": model} if model else {name: str(run.model(name)) for name in names}
    evaluate(config, models, run.folder("eval"), engine, **options)


RUNNERS = {"tokenizer": run_tokenizer, "base": run_base, "mid": run_chat, "sft": run_chat, "rl": run_rl}
RUNNERS |= {"dpo": run_dpo, "eval": run_eval}


def run_stage(stage: str, config, run: Run, **options) -> None:
    """Run one stage; print a line about its result."""
    options |= {"stage": stage} if stage in ("mid", "sft") else {}
    RUNNERS[stage](config, run, **options)
    show_result(run.folder(stage))


def check_run_folder(run: Run, stages: list[str], configs: dict) -> None:
    """Refuse to mix what is on disk with another recipe, or a finished stage with a source that is not finished."""
    last = max((MODEL_STAGES.index(stage) for stage in stages if stage in MODEL_STAGES), default=-1)
    for stage in MODEL_STAGES[: last + 1]:
        if run.finished(stage) and broadcast_from_main(partial_state().is_main_process and replaced(run, stage)):
            raise InputError(f"{run.folder(stage)}: {REPLACED}; restore them, or delete that folder")
    redone = None
    for stage in stages:
        metrics = run.metrics(stage) if stage in configs else None
        if not (metrics and metrics.get("finished")):
            redone = redone or stage
            continue
        if redone and stage != "eval":
            raise InputError(f"{run.folder(stage)} was made before {redone!r}, which runs again; delete it")
        now, before = compared(run, vars(configs[stage])), compared(run, renamed_keys(metrics.get("config") or {}))
        changes = [f"{key}: {old!r} -> {now.get(key)!r}" for key, old in before.items() if now.get(key) != old]
        if changes:
            changed = f"the recipe changed since {run.folder(stage)} finished ({', '.join(changes[:3])})"
            raise InputError(f"{changed}; use another --run-dir or delete that folder")
        check_inputs(run, stage, metrics.get("inputs") or {}, configs[stage])


def check_given(model: str | None = None, tokenizer: str | None = None, **_) -> None:
    """Refuse a model (an adapter has no config) or tokenizer that cannot be read, by InputError."""
    if model and not Path(model, "adapter_config.json").is_file():
        load_config(model)
    if tokenizer:
        load_tokenizer(tokenizer)


def check_sources(run: Run, stages: list[str], configs: dict) -> None:
    """Refuse a stage without its data, or without a tokenizer or model to start from, of the run or of `stages`."""
    done = [stage for stage in ("tokenizer", *MODEL_STAGES) if run.finished(stage)]
    for stage in (name for name in stages if name != "report" and not run.finished(name)):
        if stage == "base" and "tokenizer" not in done:
            raise InputError(NO_TOKENIZER.format(run.path))
        if stage in MODEL_STAGES[1:] and not {*MODEL_STAGES[: MODEL_STAGES.index(stage)]} & {*done}:
            raise InputError(NO_MODEL.format(stage, run.path))
        check_data(stage, configs[stage])
        check_attention(getattr(configs[stage], "attn_implementation", None), partial_state().device)
        done.append(stage)


def compared(run: Run, config: dict) -> dict:
    """`config`, whose lists of stages to evaluate keep only those that the run has."""
    return {
        key: [stage for stage in value if run.folder(stage).exists()] if value and key.endswith("_stages") else value
        for key, value in config.items()
    }


def check_inputs(run: Run, stage: str, inputs: dict, config) -> None:
    """Refuse a finished stage whose tokenizer, starting model or local text is no longer that of today."""
    data = inputs.get("data") if stage in ("tokenizer", "base") and is_local(config.dataset) else None
    if data and text_fingerprint(config.dataset) != data:
        changed = f"the text of {config.dataset} changed since {run.folder(stage)} finished"
        raise InputError(f"{changed}; restore it, use another --run-dir or delete that folder")
    folder, tokenizer = run.folder("tokenizer"), inputs.get("tokenizer")
    if tokenizer and run.finished("tokenizer") and tokenizer_fingerprint(load_tokenizer(folder)) != tokenizer:
        raise InputError(f"{run.folder(stage)} was trained with another tokenizer than that in {folder}; delete it")
    source = run.latest_model(before=stage) if inputs.get("model") else None
    weights = (load_metrics(source) or {}).get("weights") if source else None
    if weights and weights != inputs["model"]:
        raise InputError(f"{run.folder(stage)} was made from another model than the one in {source} now; delete it")


def run_stages(run: Run, stages: list[str], configs: dict, repo=None, hourly_rate: float | None = None) -> None:
    """Run the stages that are not finished, on all ranks, then write the report and show a few answers."""
    state = partial_state()
    run.require_whole(stages)
    check_run_folder(run, stages, configs)
    check_sources(run, stages, configs)
    lines, tasks = outline(stages, configs, state.num_processes), configs.get("eval")
    options = {"base": {"repo": repo, "tasks": tasks}, "eval": {"keep_unchanged": True}}
    options |= {stage: {"tasks": tasks} for stage in ("mid", "sft")}
    state.print(f"{len(stages)} stage{'s' * (len(stages) > 1)} into {run.path}:", *lines.values(), sep="\n  ")
    if {"tokenizer", "base"} <= {*stages} and not run.finished("base"):  # before hours of work on the tokenizer
        check_cost(scaling.plan(configs["base"], configs["tokenizer"].vocab_size), state.device)
    if "tokenizer" in configs:  # the plan refuses batches that the ranks cannot divide, and FP8 without such a GPU
        left = [stage for stage in stages if stage == "report" or not run.finished(stage)]
        pipeline_text(left, configs, Devices(gpu_here() or "CPU", state.num_processes, hourly_rate, None))
    if "base" in stages and not run.finished("base") and tasks and configs["base"].core_metric_every > 0:
        check_bundle(tasks)
    if "eval" in stages and not run.finished("eval"):
        present = [stage for stage in MODEL_STAGES if stage in stages or run.finished(stage)]
        check_tasks(configs["eval"], present, run.folder("eval"))
    for stage in (name for name in stages if name != "report"):
        again = stage == "eval" and state.is_main_process and renewal(run, definition_of(configs[stage]))
        again = broadcast_from_main(again)
        if run.finished(stage) and not again:
            state.print(f"[{stage}] already finished, skipping: {run.folder(stage)}")
            continue
        state.print(f"\n{lines[stage]}" + (f": finished earlier, runs again for {again}" if again else ""))
        run_stage(stage, configs[stage], run, **options.get(stage, {}))
        reset_accelerate_state()
        monitored_barrier(f"the end of stage {stage}")
    if "report" in stages and state.is_main_process:
        report = make_report(run.path, hourly_rate=hourly_rate)
        print(f"\n{lines['report']}: {report.with_suffix('.html')} and {report}\n")
        print(markdown(load_json(report.with_suffix(".json")), macro="summary"), end="")
        show_answers(run, configs["base"].dataset)


def outline(stages: list[str], configs: dict, ranks: int) -> dict[str, str]:
    """Stage -> its number, name, steps and, where an estimate exists, about how long it takes."""
    base, gpu, lines = configs["base"], gpu_here(), {}
    size = scaling.plan(base, getattr(configs.get("tokenizer"), "vocab_size", 2**15))
    device, units = gpu or ("CPU" if on_cpu() else "MPS"), ranks if gpu else os.cpu_count() or 1
    speed, _ = scaling.estimate_speed(size, device, units, uses_fp8(base, gpu))  # tokens per second
    for number, stage in enumerate(stages, 1):
        config, lines[stage] = configs.get(stage), f"[{number}/{len(stages)}] {stage}"
        steps, tokens = getattr(config, "num_iterations", None), getattr(config, "total_batch_size", 0)
        if stage == "base":
            steps, tokens = size.num_iterations, size.total_batch_size
        elif stage == "rl" and not gpu:
            cost = RL_COST * (0.6 / config.updates_per_batch + 0.4)  # .6 of it samples (docs/experiments/demo.md)
            tokens = cost * config.examples_per_step * config.num_samples * config.max_new_tokens
        if steps:
            lines[stage] += f": {steps:,} steps" if steps > 0 else f": {config.num_epochs:g} x the data"
        if steps and min(steps, tokens) > 0 and speed:
            minutes = math.ceil(steps * tokens / speed / 60)
            lines[stage] += f", about {minutes} min" if minutes < 60 else f", about {duration(60 * minutes)}"
    return lines


def show_answers(run: Run, dataset) -> None:
    """Ask the newest chat model three questions; those of the demo's world were never in its training data."""
    folder = run.latest_model()
    if folder is None or folder.name == "base":
        return
    texts = ["Who are you?", "Why is the sky blue?", "What is 317 times 24?"]
    if dataset == "primer":
        rows = (primer.questions(kind, num=1)[0] for kind in ("fact", "arithmetic", "counting"))
        texts = [row["messages"][0]["content"] for row in rows]
    model = LocalModel(Engine.from_pretrained(str(folder)), str(folder))
    chat = Chat(model, Options(temperature=0.0, max_new_tokens=256))
    print(f"\nThree questions to {folder}:")
    for text in texts:
        print(f"\n> {text}")
        chat.ask(text, before=[])
    command = Path(sys.executable).with_name("nanochat")  # works outside of the virtual environment, too
    command = command.relative_to(Path.cwd()) if command.is_relative_to(Path.cwd()) else command
    print("\nTalk to it, here or in a browser:")
    for word in ("chat", "serve"):
        print(" ", shlex.join([str(command), word, "--run-dir", str(run.path)]))
