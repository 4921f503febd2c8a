"""The commands that train: a recipe or one stage, on this machine or, with --job hf|sky|slurm, as a job elsewhere.

hf is a command line of Hugging Face Jobs, sky a task of SkyPilot, slurm a script for one or more nodes. The texts
are templates in configs/jobs; docs/cloud.md says which of them were run.
"""

import logging
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from string import Template
from typing import Literal

import psutil

from .config import Dir, Hours, Parser, Place, Price, RepoId, Size, SyncUrl, Unique, Word, parse_config, read_yaml
from .errors import InputError, in_a_line
from .run import BOOLEANS, MODEL_STAGES, STAGES, Run, nearest, or_shipped, project_folder
from .stage_configs import RECIPES, STAGE_CONFIGS, EvalConfig, Stages, find_recipe, read_recipe, refuse_unused_keys

NODE = 8  # GPUs
SUBMIT = {"hf": ("hf", "bash"), "sky": ("sky", "sky jobs launch --yes --secret HF_TOKEN"), "slurm": ("sbatch",) * 2}
ACCELERATE = project_folder("configs", "accelerate")
SHARDING = {"FSDP": "FSDP2", "DEEPSPEED": "ZeRO; pretraining: FSDP2"}  # distributed_type -> words
OPTIONS = {  # of stages, besides their keys: name -> (kind, text)
    "tokenizer": (Place, "folder or Hub id of a tokenizer (default: that of the run folder)"),
    "model": (Place, "folder or Hub id of the model to begin with or to evaluate (default: of the run; base: none)"),
    "repo": (RepoId, "Hub repository that gets a branch step-NNNNNN every push_every steps"),
    "stage": (Literal["mid", "sft"], "mid or sft: the folder that the result goes to"),
    "stages": (Stages, f"comma-separated, of {', '.join(MODEL_STAGES)}; default: all finished ones"),
    "eval": (Place, "eval.yaml with the chat tasks of ChatCORE, every chatcore_every steps (default: of the recipe)"),
    "sync": (SyncUrl, "URL of fsspec, or hf://owner/name: the same command resumes from it on another machine"),
}
OF_MODEL = ("depth", "aspect_ratio", "generation", "head_dim", "window_pattern", "final_logit_softcapping")
CHAT = ("model", "stage", "eval", "sync")
STAGE_COMMANDS = {  # subcommand -> its stage, text, and options
    "tokenizer": ("tokenizer", "Train a tokenizer, the first stage of a recipe.", ()),
    "pretrain": ("base", "Pretrain a base model; run again to resume.", ("tokenizer", "model", "repo", "sync")),
    "midtrain": ("mid", "Mid-training of the newest model of a run; run again to resume.", CHAT),
    "sft": ("sft", "SFT of the newest model of a run; run again to resume.", CHAT),
    "rl": ("rl", "RL with verifiable rewards; run again to resume.", ("model", "sync")),
    "dpo": ("dpo", "Direct preference optimization; run again to resume.", ("model", "sync")),
    "eval": ("eval", "Evaluate stages of a run, or any causal LM of the Hub, with lm-eval.", ("stages", "model")),
}


def run_stage_command(parser: Parser, command: str, words: list[str]) -> None:
    """Read the config of RECIPE, or of `--config YAML --run-dir DIR`, and run the stage."""
    stage, _, options = STAGE_COMMANDS[command]
    parser.option("recipe", Place, nargs="?", help="a name under recipes/ or the path of a recipe folder")
    parser.option("--config", Place, help=f"YAML of this stage instead, for example recipes/d12/{stage}.yaml")
    parser.option("--run-dir", Dir, help="run folder (default: runs/<recipe>)")
    add_options(parser, *options)
    parser.add_keys(STAGE_CONFIGS[stage])
    parser.usage = f"{parser.prog} RECIPE [...] [--KEY VALUE ...]"
    keys = vars(parser.parse_intermixed_args(words))
    name, path, run_dir, dry_run = (keys.pop(key) for key in ("recipe", "config", "run_dir", "dry_run"))
    given = {name: value for name in options if (value := keys.pop(name)) is not None}
    stage = given.pop("stage", stage)
    if bool(name) == bool(path) or not (name or run_dir):
        raise InputError(f"name a recipe, as in nanochat {command} d12, or --config YAML and --run-dir DIR")
    if "stages" in given and "model" in given:
        raise InputError("--model is evaluated in place of the run's stages: leave --stages out")
    if name:
        recipe = find_recipe(name)
        _, configs = read_recipe(recipe, [stage], [f"{stage}.{key}={value}" for key, value in keys.items()])
        config, run_dir = configs[stage], run_dir or Path("runs") / recipe.name
        given |= {"tasks": configs.get("eval")} if stage in ("base", "mid", "sft") else {}
    else:
        config = parse_config(STAGE_CONFIGS[stage], path, keys)
        refuse_unused_keys(stage, config, keys)
    if stage == "base":
        check_push(config, given.get("repo"))
        if "model" in given and (unused := [key for key in keys if key in OF_MODEL]):
            raise InputError(f"--{unused[0].replace('_', '-')} is not used, as --model has its own: leave it out")
    if "eval" in given:
        given |= {"tasks": parse_config(EvalConfig, given.pop("eval")), "required": True}
        if config.chatcore_every < 1:
            raise InputError("--eval is measured every chatcore_every steps: give that, too")
    needed = [] if {"model", "tokenizer"} & given.keys() else given.get("stages", [stage])
    if dry_run:
        Run(run_dir).require_whole(needed)
        if not needed:
            from .stages import check_given

            check_given(**given)
        recipe = find_recipe(name or str(or_shipped(path).parent))  # its base.yaml has the model's shape
        _, configs = read_recipe(recipe, None, [])
        return print_dry_run([stage], configs | {stage: config})
    with working(command, run_dir, given.pop("sync", None)) as run:
        run.require_whole(needed)
        from .stages import run_stage

        run_stage(stage, config, run, **given)


@contextmanager
def working(name: str, folder: str | Path, sync: str | None) -> Iterator[Run]:
    """A run folder that this process alone works on, and its copy at `sync`. Says that the imports take seconds."""
    if os.environ.get("RANK", "0") == "0":
        print(f"{name}: loading PyTorch ...", file=sys.stderr, flush=True)
    from .sync import syncing

    run = Run(folder)
    with run.lock(), syncing(sync, run):
        yield run


def add_options(parser: Parser, *names: str) -> None:
    for name in names:
        parser.option(f"--{name}", OPTIONS[name][0], help=OPTIONS[name][1])
    parser.add_argument("--dry-run", action="store_true", help="print the plan and start nothing")


def check_push(config, repo: str | None) -> None:
    if (config.push_every > 0) != bool(repo):
        raise InputError("base.push_every and --repo go together: give both, or neither")


def speedrun(parser: Parser, words: list[str]) -> None:
    """The whole pipeline of a recipe, from text to a chat model with its report card."""
    recipe, stages, configs, arguments = read_pipeline(parser, words)
    if arguments.dry_run:
        return print_dry_run(stages, configs, rate=arguments.node_hourly_rate)
    folder = arguments.run_dir or Path("runs") / recipe.name
    with working(f"recipe {recipe.name}", folder, arguments.sync) as run:
        from .stages import run_stages

        run_stages(run, stages, configs, arguments.repo, arguments.node_hourly_rate)


def read_pipeline(parser: Parser, words: list[str], runs: bool = True) -> tuple:
    """Returns: the recipe's folder, the stages to run, each stage's config, the arguments, also those of a run."""
    if runs:
        parser.option("--run-dir", Dir, help="where results go (default: runs/<recipe>)")
        parser.option("--node-hourly-rate", Price, "--hourly-rate", help="dollars per hour, for the report")
        add_options(parser, "repo", "sync")
    parser.option("--recipe", Place, metavar="NAME", help="a name under recipes/ or the path of a recipe folder")
    which = f"comma-separated, of {', '.join(STAGES)} (default: those that the recipe enables, and report)"
    parser.option("--stages", Unique[Place], help=which)
    parser.add_argument("overrides", nargs="*", metavar="STAGE.KEY=VALUE", help="for example base.depth=10")
    parser.usage = parser.usage or f"{parser.prog} NAME [...] [STAGE.KEY=VALUE ...]"
    parser.epilog = "keys, explained in docs/configuration.md and by the command of their stage:\n"
    for command, (stage, _, _) in STAGE_COMMANDS.items():
        parser.epilog += f"  {f'{stage}.KEY':<15} nanochat {command} --help\n"
    parser.keys = keys_by_name()
    arguments = parser.parse_intermixed_args(words)
    if arguments.recipe is None:
        name = next((word for word in arguments.overrides if "=" not in word), None)
        if name is None:
            raise InputError("name a recipe, for example cpu-demo; nanochat recipes lists them")
        arguments.overrides.remove(name)
        arguments.recipe = name
    recipe = find_recipe(arguments.recipe)
    stages, configs = read_recipe(recipe, arguments.stages, arguments.overrides)
    if runs:
        check_push(configs["base"], arguments.repo)
        if arguments.dry_run:
            Run(arguments.run_dir or Path("runs") / recipe.name).require_whole(stages)
    return recipe, stages, configs, arguments


def keys_by_name() -> dict[str, list[str]]:
    """Key -> its names with the stages, as eval.seed."""
    names: dict[str, list[str]] = {}
    for stage, cls in STAGE_CONFIGS.items():
        for key in cls.__dataclass_fields__:
            names.setdefault(key, []).append(f"{stage}.{key}")
    return names


def plan(parser: Parser, words: list[str]) -> None:
    """Say what a recipe would do and cost, and start nothing: `nanochat plan d24 --gpus 8 [STAGE.KEY=VALUE ...]`."""
    parser.option("--gpus", Size, "--num-processes", help="number of GPUs (default: 1)")
    parser.option("--gpu", help="for example H100 (default: that of this machine; H200 with --gpus)")
    parser.option("--node-hourly-rate", Price, help="dollars per hour of a node (default: 3 per GPU)")
    _, stages, configs, arguments = read_pipeline(parser, words, runs=False)
    if arguments.gpus and arguments.gpu == "CPU":
        raise InputError("--gpus counts GPUs: leave it out with --gpu CPU")
    from .data.mixture import check_data

    for stage in stages:
        check_data(stage, configs.get(stage), elsewhere=True)
    otherwise, rate = "H200" if arguments.gpus else "CPU", arguments.node_hourly_rate
    show_plan(stages, configs, arguments.gpus or 1, otherwise, arguments.gpu, rate=rate)


def print_dry_run(stages: list[str], configs: dict, *arguments, **options) -> None:
    """Print the plan, with the arguments of `show_plan`. Raises InputError for missing data, as a run does."""
    from .data.mixture import check_data

    for stage in stages:
        check_data(stage, configs.get(stage))
        if getattr(configs.get(stage), "attn_implementation", None) not in (None, "auto"):
            from .stages import check_attention, partial_state  # which takes seconds

            check_attention(configs[stage].attn_implementation, partial_state().device)
    if {"base", "eval"} & {*stages} and "eval" in configs and configs["eval"].core_bundle not in (None, "download"):
        from .eval.harness import check_bundle  # which imports lm-eval

        check_bundle(configs["eval"])
    show_plan(stages, configs, *arguments, **options)


def show_plan(stages, configs, ranks: int | None = None, otherwise="CPU", device=None, sharding=None, rate=None):
    """Print a pipeline's plan for `ranks` GPUs or CPUs: `device`, or the GPU of this machine, or `otherwise`."""
    if "tokenizer" not in configs:
        raise InputError("a plan needs the vocabulary size: the recipe has no tokenizer.yaml")
    if "eval" in stages and any(not name.startswith("nanochat_") for name in configs["eval"].tasks):
        from .eval.tasks import known_tasks  # which imports lm-eval

        known_tasks(configs["eval"])
    from .optim.overview import Devices, gpu_here, pipeline_text

    ranks = ranks or int(os.environ.get("WORLD_SIZE", "1"))
    name = gpu_here() or otherwise if device is None else device
    text = pipeline_text(stages, configs, Devices(name, ranks, rate, sharding))
    if os.environ.get("RANK", "0") == "0":
        print(text)


def run(parser: Parser, words: list[str]) -> None:
    """Run a recipe on all devices: `nanochat run NAME [--config-file multi_gpu] [--num-processes N] [...]`."""
    names = sorted(path.stem for path in ACCELERATE.glob("*.yaml"))
    parser.option("--config-file", Place, help=f"Accelerate config file, or one of {', '.join(names)}")
    parser.option("--num-processes", Size, "--gpus", help="ranks (default: as the config file says; of a job: 8)")
    parser.option("--job", Literal["hf", "sky", "slurm"], help="print a job for Hugging Face Jobs, SkyPilot or Slurm")
    parser.add_argument("--submit", action="store_true", help="also hand the job to hf, sky or sbatch")
    parser.option("--gpu", Word, help="GPU of a job (default: H200)")
    parser.option("--hours", Hours, help="time limit of a job (default: 1 + twice the projected pretraining)")
    parser.option("--image", Word, help="container image of a job (default: you/nanochat_hf)")
    recipe, stages, configs, arguments = read_pipeline(parser, words)
    if arguments.job:
        return make_job(recipe, configs, arguments)
    if unused := [name for name in ("submit", "gpu", "hours", "image") if getattr(arguments, name)]:
        raise InputError(f"--{unused[0]} is for a job: name --job hf, sky or slurm")
    command, accelerate, name = [], {}, arguments.config_file
    if name:
        files = [str(file) for file in (Path(name), ACCELERATE / f"{name}.yaml") if file.is_file()]
        if not files:
            raise InputError(f"no Accelerate config file {name}; {nearest(name, names)}")
        command, accelerate = ["--config_file", files[0]], read_yaml(files[0])
        if any(accelerate.get(key, 1) not in range(1, 10**5) for key in ("num_processes", "num_machines")):
            raise InputError(f"{files[0]}: num_processes and num_machines must be whole numbers of at least 1")
    if arguments.dry_run:
        ranks, kind = arguments.num_processes or accelerate.get("num_processes", 1), accelerate.get("distributed_type")
        otherwise, device = "H200" if accelerate or ranks > 1 else "CPU", "CPU" if accelerate.get("use_cpu") else None
        return print_dry_run(stages, configs, ranks, otherwise, device, SHARDING.get(kind), arguments.node_hourly_rate)
    check_gpus(arguments.num_processes, accelerate)
    command += ["--num_processes", str(arguments.num_processes)] if arguments.num_processes else []
    launch([*command, "--module", "nanochat_hf.cli", "speedrun", *speedrun_words(arguments)])


def demo(parser: Parser, words: list[str]) -> None:
    """Train a small chat model from nothing on this CPU, in minutes: `nanochat run cpu-demo --config-file cpu`."""
    parser.usage = "nanochat demo [--run-dir DIR] [...] [STAGE.KEY=VALUE ...]"
    chosen = any(word.replace("_", "-").startswith("--config-file") for word in words)
    run(parser, ["--recipe=cpu-demo", *["--config-file=cpu"] * (not chosen), *words])


def speedrun_words(arguments) -> list[str]:
    """The words of `nanochat speedrun` for the same pipeline."""
    words = [f"--recipe={arguments.recipe}", *arguments.overrides]
    given = {name: getattr(arguments, name) for name in ("run_dir", "repo", "sync", "node_hourly_rate")}
    words += [f"--{name.replace('_', '-')}={value}" for name, value in given.items() if value is not None]
    return words + ([f"--stages={','.join(arguments.stages)}"] if arguments.stages else [])


def check_gpus(num_processes: int | None, launch: dict) -> None:
    """Refuse more processes than this machine has GPUs, and several where Accelerate would start one."""
    ranks = (num_processes or launch.get("num_processes", 1)) // launch.get("num_machines", 1)
    use_cpu = launch.get("use_cpu") or BOOLEANS.get(os.environ.get("ACCELERATE_USE_CPU", "").lower())
    if ranks > 1 and (launch.get("distributed_type") == "NO" or (use_cpu and not launch)):
        raise InputError(f"one process would start, not {ranks}: name --config-file multi_gpu, for example")
    if ranks > 1 and not use_cpu:
        import torch  # takes seconds

        if ranks > (gpus := torch.cuda.device_count()):
            advice = f"{'lower --num-processes' if gpus else 'take --config-file cpu'}, or set ACCELERATE_USE_CPU=true"
            raise InputError(f"{ranks} processes need {ranks} GPUs, and this machine has {gpus}: {advice}")


def launch(words: list[str]) -> None:
    """Accelerate's launcher with these words, which ends with the exit code of a rank and without a traceback.

    Ctrl-C reaches a rank from the terminal; other signals are passed on, so that the rank can save.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser  # which imports torch
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    def pass_on(number, frame):
        for child in psutil.Process().children():
            child.send_signal(number)

    logging.disable(logging.ERROR)  # that defaults are used, and what the lines below say
    signal.signal(signal.SIGINT, lambda *_: None)
    signal.signal(signal.SIGTERM, pass_on)
    try:
        return launch_command(launch_command_parser().parse_args(words))
    except subprocess.CalledProcessError as error:  # of one rank
        rank, code = 0, error.returncode
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = failure.exitcode
    except ValueError as error:  # of its config file
        raise InputError(f"Accelerate cannot launch: {in_a_line(error)}") from None
    except SignalException as error:
        rank, code = 0, -error.sigval
    code = 128 - code if code < 0 else code
    if code in (128 + signal.SIGINT, 128 + signal.SIGTERM):
        print("stopped by a signal: the same command resumes the run", file=sys.stderr)
    elif code != 2:  # whose reason the rank has shown
        print(f"error: rank {rank} ended with exit code {code}: see what it printed above", file=sys.stderr)
    sys.exit(code)


def make_job(recipe: Path, configs: dict, arguments) -> None:
    """Print the job, by the arguments of `nanochat run`; with --submit hand it to its program."""
    kind, gpu, gpus = arguments.job, arguments.gpu or "H200", arguments.num_processes or NODE
    if arguments.config_file or arguments.dry_run:
        raise InputError("a job chooses its config file and starts nothing: leave --config-file and --dry-run out")
    if kind == "slurm" and arguments.image:
        raise InputError("--image is for hf and sky: a Slurm job runs in the environment that submits it")
    if kind != "slurm" and recipe.parent.resolve() != RECIPES.resolve():
        raise InputError(f"the image has no {recipe}: put it into recipes/ before docker build, or use --job slurm")
    scheme = (arguments.sync or "hf").partition("://")[0]
    if scheme in (("memory",) if kind == "slurm" else ("memory", "file", "local")):
        raise InputError(f"--sync: another machine cannot reach {arguments.sync}: take s3://, gs:// or hf://you/name")
    if kind != "slurm":
        arguments.recipe = recipe.name  # its path may be another there
    words = speedrun_words(arguments)
    folder, config = project_folder("configs", "jobs"), "multi_gpu" if gpus > 1 else "single_gpu"
    command = ["nanochat", "run", *words, f"--config-file={config}", f"--num-processes={gpus}"]
    values = {
        "name": recipe.name,
        "image": arguments.image or "you/nanochat_hf",
        "command": shlex.join(command),
        "hours": arguments.hours or projected_hours(configs, gpu, gpus),
        "words": shlex.join(words),
        "root": shlex.quote(str(project_folder())),
        "gpu": gpu,
        "gpus": gpus,
        **machine(kind, gpu, gpus, folder),
    }
    text = Template((folder / kind).read_text(encoding="utf-8")).substitute(values)
    print(text, end="", flush=True)
    if kind != "slurm" and not arguments.sync:
        lost = "the run folder is lost with the machine: add --sync, for example --sync hf://you/runs"
        if arguments.submit:
            raise InputError(lost)
        print(f"note: {lost}", file=sys.stderr)
    if arguments.submit:
        submit(text, *SUBMIT[kind])


def projected_hours(configs: dict, gpu: str, gpus: int) -> int:
    """1 + twice the projected hours of pretraining in bf16. Raises InputError for an unknown GPU."""
    from .optim.scaling import estimate_speed, plan  # which import torch

    if "tokenizer" not in configs:
        raise InputError("give --hours: the recipe has no tokenizer.yaml, whose vocabulary an estimate needs")
    size = plan(configs["base"], configs["tokenizer"].vocab_size)
    speed, source = estimate_speed(size, gpu, gpus, False)
    if speed is None:
        raise InputError(f"--gpu: {source}; give --hours")
    return 1 + math.ceil(2 * size.total_tokens / speed / 3600)


def machine(kind: str, gpu: str, gpus: int, folder: Path) -> dict:
    """Flavor of Hugging Face Jobs, or nodes of a cluster. Raises InputError if there is no such machine."""
    nodes, flavors = max(1, gpus // NODE), read_yaml(folder / "flavors.yaml")
    if kind == "hf" and gpus not in flavors.get(gpu, {}):
        machines = ", ".join(f"{number} x {name}" for name, numbers in flavors.items() for number in numbers)
        raise InputError(f"Hugging Face Jobs has no machine of {gpus} x {gpu}; it has {machines}")
    if kind == "sky" and nodes > 1:
        raise InputError(f"--job sky is for one machine of up to {NODE} GPUs; for several nodes use --job slurm")
    if gpus > NODE and gpus % NODE:
        raise InputError(f"{gpus} GPUs are no whole nodes: ask for up to {NODE}, or a multiple of {NODE}")
    return {"flavor": flavors.get(gpu, {}).get(gpus), "nodes": nodes, "gpus_per_node": gpus // nodes}


def submit(text: str, program: str, command: str) -> None:
    if shutil.which(program) is None:
        raise InputError(f"--submit: this machine has no program {program!r}; the job above is complete without it")
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", suffix=".yaml" if program == "sky" else ".sh") as file:
        print(text, end="", file=file, flush=True)
        code = subprocess.run([*command.split(), file.name], check=False).returncode
    if code:
        raise InputError(f"{program} refused the job: exit code {code}")
