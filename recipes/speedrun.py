"""The whole pipeline, from text to a chat model with its report card.

    accelerate launch recipes/speedrun.py --recipe cpu-demo
    accelerate launch --config_file configs/accelerate/multi_gpu.yaml recipes/speedrun.py --recipe d24 \
        [--run-dir runs/d24] [--stages tokenizer,base,mid,sft,rl,eval,report] [base.depth=18 sft.num_epochs=2 ...]

A recipe is a folder with one YAML per stage. Stages talk through the run folder: a finished stage is skipped, a killed
one goes on where it stopped, and a recipe that changed since a stage finished is reported instead of mixed in.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

from nanochat_hf.data.documents import is_local, text_fingerprint
from nanochat_hf.data.tokenizer import TokenizerConfig, load_tokenizer, tokenizer_fingerprint, train_tokenizer
from nanochat_hf.demo import corpus as primer
from nanochat_hf.distributed import (
    broadcast_from_main,
    main_process_first,
    monitored_barrier,
    partial_state,
    reset_accelerate_state,
)
from nanochat_hf.errors import InputError
from nanochat_hf.eval.harness import EvalConfig, chatcore_metric, core_metric, definition_of, evaluate
from nanochat_hf.eval.lm_eval_model import Generator
from nanochat_hf.eval.report import make_report
from nanochat_hf.eval.weights import origin, renewal, replaced
from nanochat_hf.hub.push import checkpoint_pusher
from nanochat_hf.run import MODEL_STAGES, STAGES, Run, guarded, load_json, nearest, parse_config, renamed_keys
from nanochat_hf.serve.engine import Engine
from nanochat_hf.train.grpo import RLConfig, train_rl
from nanochat_hf.train.pretrain import PretrainConfig, pretrain
from nanochat_hf.train.sft import ChatConfig, train_chat

RECIPES = Path(__file__).parent
CONFIGS = {"tokenizer": TokenizerConfig, "base": PretrainConfig, "mid": ChatConfig, "sft": ChatConfig, "rl": RLConfig}
CONFIGS["eval"] = EvalConfig
TURNS = {"call": "[", "result": " = ", "text": "] "}  # what stands before a tool call, its result, the text after it


def find_recipe(name: str) -> Path:
    for folder in (Path(name), RECIPES / name):
        if (folder / "base.yaml").is_file():
            return folder
    known = sorted(path.parent.name for path in RECIPES.glob("*/base.yaml"))
    raise InputError(f"no recipe {name!r} (a folder with base.yaml); {nearest(name, known)}")


def read_recipe(recipe: Path, stages: list[str] | None, overrides: list[str]) -> tuple[list[str], dict]:
    """The stages to run, in order, and each stage's config; every key is checked before anything runs."""
    present = [stage for stage in CONFIGS if (recipe / f"{stage}.yaml").is_file()]
    typed = {stage: {} for stage in present}
    for word in overrides:
        key, equals, value = word.partition("=")
        stage, dot, key = key.partition(".")
        if not (equals and dot):
            raise InputError(f"expected STAGE.KEY=VALUE, got {word!r}")
        if stage not in typed:
            raise InputError(f"recipe {recipe.name} has no stage {stage!r}; {nearest(stage, present)}")
        typed[stage][key] = value
    for stage in stages or []:
        if stage not in [*present, "report"]:
            raise InputError(f"recipe {recipe.name} has no stage {stage!r}; {nearest(stage, [*present, 'report'])}")
    configs = {stage: parse_config(CONFIGS[stage], recipe / f"{stage}.yaml", typed[stage]) for stage in present}
    # RL is the one stage that a recipe may carry without running it: it costs much and gains little on small budgets.
    chosen = stages or [*(stage for stage in present if getattr(configs[stage], "enabled", True)), "report"]
    return [stage for stage in STAGES if stage in chosen], configs


def check_run_folder(run: Run, stages: list[str], configs: dict) -> None:
    """Refuse to mix what is on disk with another recipe, or a finished stage with a source that is not finished."""
    trained = [stage for stage in MODEL_STAGES if stage in stages]
    for stage in MODEL_STAGES[: MODEL_STAGES.index(trained[-1]) + 1] if trained else ():
        if run.finished(stage) and broadcast_from_main(
            replaced(run, stage) if partial_state().is_main_process else None
        ):
            raise InputError(
                f"the weights in {run.folder(stage)} are not those that its metrics.json describes; "
                "restore them, or delete that folder"
            )
    redone = None
    for stage in stages:
        metrics = run.metrics(stage) if stage in configs else None
        if not (metrics and metrics.get("finished")):
            redone = redone or stage
            continue
        if redone and stage != "eval":
            raise InputError(
                f"{run.folder(stage)} is finished but was made before {redone!r}, which runs again; delete it"
            )
        now, before = vars(configs[stage]), renamed_keys(metrics.get("config") or {})
        changed = {key: (old, now.get(key)) for key, old in before.items() if now.get(key) != old}
        if changed:
            words = ", ".join(f"{key}: {old!r} -> {new!r}" for key, (old, new) in list(changed.items())[:3])
            raise InputError(
                f"the recipe changed since {run.folder(stage)} finished ({words}); "
                "use another --run-dir or delete that folder"
            )
        check_inputs(run, stage, metrics.get("inputs") or {}, configs[stage])


def check_inputs(run: Run, stage: str, inputs: dict, config) -> None:
    """Refuse a finished stage whose tokenizer, starting model or local text is no longer that of today."""
    data = inputs.get("data") if stage in ("tokenizer", "base") and is_local(config.dataset) else None
    if data and text_fingerprint(config.dataset) != data:
        raise InputError(
            f"the text of {config.dataset} changed since {run.folder(stage)} finished; "
            "bring back the old files, use another --run-dir or delete that folder"
        )
    folder, tokenizer = run.folder("tokenizer"), inputs.get("tokenizer")
    if tokenizer and run.finished("tokenizer") and tokenizer_fingerprint(load_tokenizer(folder)) != tokenizer:
        raise InputError(f"{run.folder(stage)} was trained with another tokenizer than that in {folder}; delete it")
    source = run.latest_model(before=stage) if inputs.get("model") else None
    weights = (load_json(source / "metrics.json") or {}).get("weights") if source else None
    if weights and weights != inputs["model"]:
        raise InputError(f"{run.folder(stage)} was made from another model than the one in {source} now; delete it")


def run_stage(stage: str, configs: dict, run: Run, repo: str | None) -> None:
    config, output = configs[stage], run.folder(stage)
    if stage == "tokenizer":
        with main_process_first("the tokenizer") as main:
            if main:
                train_tokenizer(config, output)
    elif stage == "base":
        tokenizer, bundle = str(run.folder("tokenizer")), configs["eval"].core_bundle if "eval" in configs else None
        core = None
        if bundle and config.core_metric_every > 0:
            core = core_metric(load_tokenizer(tokenizer), bundle)
        push = None
        if repo:  # every process takes part in writing the folder, one uploads it
            push = checkpoint_pusher(repo) if partial_state().is_main_process else lambda folder, step: None
        pretrain(config, tokenizer=tokenizer, output=output, core=core, push=push)
    elif stage in ("mid", "sft"):
        source = source_of(stage, run)
        partial_state().print(origin(run, stage, source))
        train_chat(config, source, output, chatcore(config, configs.get("eval"), source, output / "state"))
    elif stage == "rl":
        source = source_of(stage, run)
        partial_state().print(origin(run, stage, source))
        train_rl(config, model=source, output=output, engine=engine)
    elif stage == "eval":
        models = {name: str(run.folder(name)) for name in MODEL_STAGES if run.finished(name)}
        evaluate(config, models, output, engine=engine, keep_unchanged=True)


def engine(model, tokenizer):
    """What generates in evaluation and RL: CUDA graphs on a GPU, plain transformers elsewhere."""
    return Engine(model, tokenizer) if model.device.type == "cuda" else Generator(model, tokenizer)


def chatcore(config: ChatConfig, tasks: EvalConfig | None, source: str, folder: Path) -> Callable | None:
    """What measures ChatCORE while a stage trains. Without the tasks' data the stage does without."""
    if config.chatcore_every <= 0 or not tasks:
        return None
    try:
        return chatcore_metric(tasks, load_tokenizer(source), folder, engine)
    except InputError as error:
        partial_state().print(f"no ChatCORE on the way: {error}")
        return None


def source_of(stage: str, run: Run) -> str:
    folder = run.latest_model(before=stage)
    if folder is None:
        raise InputError(
            f"stage {stage!r} starts from a finished earlier stage and {run.path} has none; run base first"
        )
    return str(folder)


def talk(run: Run, configs: dict) -> None:
    """Ask the newest chat model three questions, of which the demo's were never in training."""
    folder = run.latest_model()
    if folder is None or folder.name == "base":
        return
    if configs["base"].dataset == "primer":
        rows = [primer.questions(kind, num=1)[0] for kind in ("fact", "arithmetic", "counting")]
        texts = [row["messages"][0]["content"] for row in rows]
    else:
        texts = ["Who are you?", "Why is the sky blue?", "What is 317 times 24?"]
    model = Engine.from_pretrained(str(folder))
    print(f"\nThree questions to {folder}; more with: python scripts/chat_cli.py --run-dir {run.path}")
    for text in texts:
        print(f"\n> {text}")
        kind = "text"
        for piece in model.stream([{"role": "user", "content": text}], max_new_tokens=256, temperature=0.0):
            print("" if piece.kind == kind else TURNS[piece.kind], piece, sep="", end="", flush=True)
            kind = piece.kind
        print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: (_ for _ in ()).throw(InputError(message))
    parser.add_argument("--recipe", required=True, help="a name under recipes/ or the path of a recipe folder")
    parser.add_argument("--run-dir", help="where results go (default: runs/<recipe>)")
    parser.add_argument("--stages", help="comma-separated; default: all of the recipe, without an opt-in rl")
    parser.add_argument("--hourly-rate", type=float, help="price of this machine in dollars an hour, for the report")
    parser.add_argument("--repo", help="Hub repository for checkpoints, as branches, every base.push_every steps")
    parser.add_argument("overrides", nargs="*", metavar="STAGE.KEY=VALUE")
    arguments = parser.parse_intermixed_args()

    recipe = find_recipe(arguments.recipe)
    stages, configs = read_recipe(recipe, arguments.stages and arguments.stages.split(","), arguments.overrides)
    run = Run(arguments.run_dir or Path("runs") / recipe.name)
    if (configs["base"].push_every > 0) != bool(arguments.repo):
        raise InputError("base.push_every and --repo go together: give both, or neither")
    with run.lock():
        run_stages(run, stages, configs, arguments)


def run_stages(run: Run, stages: list[str], configs: dict, arguments: argparse.Namespace) -> None:
    state = partial_state()
    check_run_folder(run, stages, configs)
    for stage in stages:
        if stage == "report":
            continue
        asked = stage == "eval" and state.is_main_process
        old = broadcast_from_main(renewal(run, definition_of(configs[stage])) if asked else None)
        if run.finished(stage) and not old:
            state.print(f"[{stage}] finished earlier: {run.folder(stage)}")
            continue
        if old:
            state.print(f"[{stage}] finished earlier, to be run again for {old}")
        state.print(f"[{stage}] {run.folder(stage)}")
        run_stage(stage, configs, run, arguments.repo)
        reset_accelerate_state()
        monitored_barrier(f"the end of stage {stage}")
    if "report" in stages and state.is_main_process:
        report = make_report(run.path, hourly_rate=arguments.hourly_rate)
        print(f"\n{report.read_text()}\nThe report with its plots: {report}")
        talk(run, configs)


if __name__ == "__main__":
    guarded(main)
