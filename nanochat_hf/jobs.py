"""`nanochat run NAME --job hf|sky|slurm`: a job that runs the recipe on rented GPUs or a cluster, as text.

hf is a command line of Hugging Face Jobs, sky a task of SkyPilot, slurm a script for one or more nodes. Templates:
configs/jobs and recipes/slurm.sh. docs/cloud.md says which of them were run.
"""

import math
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from string import Template
from typing import Literal

from .config import Parser, read_yaml
from .errors import InputError
from .run import nearest, project_folder
from .stage_configs import RECIPES, Count, Place

FOLDER = project_folder("configs", "jobs")
NODE = 8  # GPUs
SUBMIT = {"hf": ("hf", "bash"), "sky": ("sky", "sky jobs launch --yes --secret HF_TOKEN"), "slurm": ("sbatch",) * 2}


def job_options(parser: Parser) -> None:
    parser.option("--job", Literal["hf", "sky", "slurm"], help="print a job for Hugging Face Jobs, SkyPilot or Slurm")
    parser.add_argument("--submit", action="store_true", help="also hand the job to hf, sky or sbatch")
    parser.option("--gpu", help="of a job (default: H200)")
    parser.option("--hours", Count, help="time limit of a job; default: 1 + twice the projected pretraining")
    parser.option("--image", Place, help="container of a job, from the Dockerfile (default: you/nanochat_hf)")


def make_job(recipe: Path, configs: dict, words: list[str], arguments) -> None:
    """Print the job; with --submit hand it to its program.

    Args:
        words: of `nanochat speedrun`, for the same pipeline. arguments: values of `job_options`, and of the command.

    Raises:
        InputError: no such machine, a recipe that the image lacks, or no program to submit with.
    """
    kind, gpu, gpus = arguments.job, arguments.gpu or "H200", arguments.num_processes or NODE
    if arguments.config_file or arguments.dry_run:
        raise InputError("a job chooses its config file and starts nothing: leave --config-file and --dry-run out")
    if kind != "slurm" and recipe.parent.resolve() != RECIPES.resolve():
        raise InputError(f"the image has no {recipe}: put it into recipes/ before docker build, or use --job slurm")
    if kind != "slurm" and not arguments.sync:
        lost = "the run folder is lost with the machine: add --sync, for example --sync hf://you/runs"
        if arguments.submit:
            raise InputError(lost)
        print(f"note: {lost}", file=sys.stderr)
    hours = arguments.hours or projected_hours(configs, gpu, gpus)
    if kind == "slurm":
        text = slurm_script(recipe.name, words, gpus, hours)
    else:
        values = {"name": recipe.name, "hours": hours, "image": arguments.image or "you/nanochat_hf"}
        text = container_job(kind, words, gpu, gpus, values)
    print(text, end="", flush=True)
    if arguments.submit:
        submit(text, *SUBMIT[kind])


def projected_hours(configs: dict, gpu: str, gpus: int) -> int:
    """1 + twice the projected hours of pretraining in bf16. Raises InputError for an unknown GPU."""
    from .optim.scaling import GPUS, estimate_speed, plan  # which import torch

    if gpu not in GPUS:
        raise InputError(f"--gpu: no data sheet of {gpu!r}; {nearest(gpu, GPUS)}, or give --hours")
    size = plan(configs["base"], configs["tokenizer"].vocab_size)
    return 1 + math.ceil(2 * size.total_tokens / estimate_speed(size, gpu, gpus, False)[0] / 3600)


def slurm_script(name: str, words: list[str], gpus: int, hours: int) -> str:
    if gpus > NODE and gpus % NODE:
        raise InputError(f"{gpus} GPUs are no whole nodes: ask for up to {NODE}, or a multiple of {NODE}")
    text, nodes = project_folder("recipes", "slurm.sh").read_text(encoding="utf-8"), max(1, gpus // NODE)
    values = {"job-name": name, "nodes": nodes, "gpus-per-node": gpus // nodes, "time": f"{hours}:00:00"}
    for key, value in values.items():
        text = re.sub(rf"(#SBATCH --{key}=).*", rf"\g<1>{value}", text)
    for folder in ("configs/accelerate", "recipes"):  # which the script names from the root of a checkout
        text = text.replace(f" {folder}/", f" {project_folder(folder)}/")
    return text.replace('launch "$@"\n', f"launch {shlex.join(words)}\n")


def container_job(kind: str, words: list[str], gpu: str, gpus: int, values: dict) -> str:
    """The job of hf or sky, on one machine."""
    flavors = read_yaml(FOLDER / "hf.yaml")
    if gpus > NODE:
        raise InputError(f"--job {kind} is for one machine of up to {NODE} GPUs; for several nodes use --job slurm")
    if kind == "hf" and gpus not in flavors.get(gpu, {}):
        known = ", ".join(f"{number} x {name}" for name, numbers in flavors.items() for number in numbers)
        raise InputError(f"Hugging Face Jobs has no machine of {gpus} x {gpu}; known: {known}")
    config = f"--config-file={'multi_gpu' if gpus > 1 else 'single_gpu'}"
    command = shlex.join(["nanochat", "run", *words, config, f"--num-processes={gpus}"])
    values |= {"command": command, "gpu": gpu.replace(" ", "-"), "gpus": gpus}
    values |= {"flavor": flavors.get(gpu, {}).get(gpus)}
    template = FOLDER / {"hf": "hf.sh", "sky": "sky.yaml"}[kind]
    return Template(template.read_text(encoding="utf-8")).substitute(values)


def submit(text: str, program: str, command: str) -> None:
    if shutil.which(program) is None:
        raise InputError(f"--submit: this machine has no program {program!r}; the job above is complete without it")
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", suffix=".yaml" if program == "sky" else ".sh") as file:
        file.write(text)
        file.flush()
        code = subprocess.run([*command.split(), file.name], check=False).returncode
    if code:
        raise InputError(f"{program} did not take the job: exit code {code}")
