"""What `nanochat run` starts: processes on this machine, or with --job hf|sky|slurm a job elsewhere, as text.

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
from pathlib import Path
from string import Template
from typing import Literal

import psutil

from .config import Parser, read_yaml
from .errors import InputError
from .run import BOOLEANS, project_folder
from .stage_configs import RECIPES, Hours, Word

NODE = 8  # GPUs
SUBMIT = {"hf": ("hf", "bash"), "sky": ("sky", "sky jobs launch --yes --secret HF_TOKEN"), "slurm": ("sbatch",) * 2}


def speedrun_words(arguments) -> list[str]:
    """The words of `nanochat speedrun` for the same pipeline."""
    words = [f"--recipe={arguments.recipe}", *arguments.overrides]
    for name in ("run_dir", "repo", "sync", "node_hourly_rate"):
        if (value := getattr(arguments, name)) is not None:
            words.append(f"--{name.replace('_', '-')}={value}")
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
            advice = "lower --num-processes, or set ACCELERATE_USE_CPU=true"
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
    except SignalException as error:
        rank, code = 0, -error.sigval
    code = 128 - code if code < 0 else code
    if code in (128 + signal.SIGINT, 128 + signal.SIGTERM):
        print("stopped by a signal: the same command resumes the run", file=sys.stderr)
    elif code != 2:  # whose reason the rank has shown
        print(f"error: rank {rank} ended with exit code {code}: see what it printed above", file=sys.stderr)
    sys.exit(code)


def job_options(parser: Parser) -> None:
    parser.option("--job", Literal["hf", "sky", "slurm"], help="print a job for Hugging Face Jobs, SkyPilot or Slurm")
    parser.add_argument("--submit", action="store_true", help="also hand the job to hf, sky or sbatch")
    parser.option("--gpu", Word, help="of a job (default: H200)")
    parser.option("--hours", Hours, help="time limit of a job; default: 1 + twice the projected pretraining")
    parser.option("--image", Word, help="container of a job, from the Dockerfile (default: you/nanochat_hf)")


def make_job(recipe: Path, configs: dict, arguments) -> None:
    """Print the job, by the arguments of `nanochat run`; with --submit hand it to its program.

    Raises InputError: no such machine, a recipe that the image lacks, or no program to submit with.
    """
    kind, gpu, gpus = arguments.job, arguments.gpu or "H200", arguments.num_processes or NODE
    if arguments.config_file or arguments.dry_run:
        raise InputError("a job chooses its config file and starts nothing: leave --config-file and --dry-run out")
    if kind == "slurm" and arguments.image:
        raise InputError("--image is for hf and sky: a Slurm job runs in the environment that submits it")
    if kind != "slurm" and recipe.parent.resolve() != RECIPES.resolve():
        raise InputError(f"the image has no {recipe}: put it into recipes/ before docker build, or use --job slurm")
    scheme = (arguments.sync or "hf").partition("://")[0]
    if scheme in (("memory",) if kind == "slurm" else ("memory", "file", "local")):
        raise InputError(f"--sync: another machine cannot reach {arguments.sync}: take s3://, gs:// or hf://owner/name")
    if kind != "slurm":
        arguments.recipe = recipe.name  # its path may be another there
    words = speedrun_words(arguments)
    folder, config = project_folder("configs", "jobs"), "multi_gpu" if gpus > 1 else "single_gpu"
    command = ["nanochat", "run", *words, f"--config-file={config}", f"--num-processes={gpus}"]
    values = {
        "name": recipe.name, "image": arguments.image or "you/nanochat_hf", "command": shlex.join(command),
        "hours": arguments.hours or projected_hours(configs, gpu, gpus), "words": shlex.join(words),
        "root": shlex.quote(str(project_folder())), "gpu": gpu, "gpus": gpus, **machine(kind, gpu, gpus, folder),
    }  # fmt: skip
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
        raise InputError(f"{program} did not take the job: exit code {code}")
