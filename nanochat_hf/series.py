"""`nanochat scaling`: one recipe at several depths and horizons, and what the results say of larger models.

    nanochat scaling scaling/cpu --run-dir runs/scaling       # recipes/scaling/cpu: depths x FLOP budgets (IsoFLOP)
    nanochat scaling d12 --run-dir runs/series --depths 4,8,12 --ratios 8,12 --gpus 2

Each cell is an ordinary run folder, as DIR/d4-1e16, whose base stage is the usual pretraining in a process of its own.
So the same command skips finished cells and resumes an interrupted one. All cells share one tokenizer.
eval/scaling_fit.py has the fits.
"""

import os
import shlex
import signal
import sys
import time
from dataclasses import field, replace
from multiprocessing import connection, get_context, parent_process
from multiprocessing.process import BaseProcess
from threading import Thread
from typing import Annotated, NamedTuple

from annotated_types import Ge, Gt, Le, MinLen

from .config import Count, Dir, Parser, Unique, each_once, parse_config, settings
from .errors import InputError, guarded
from .run import Run, duration, short
from .stage_configs import PretrainConfig, find_recipe, read_recipe

Depth, Positive = Annotated[int, Ge(1), Le(1000)], Annotated[float, Gt(0), Le(1e30)]
Depths, Positives = Annotated[Unique[Depth], MinLen(1)], Unique[Positive]
HORIZON = ("num_iterations", "target_flops", "target_param_data_ratio")
OF_A_CELL = ("depth", *HORIZON, "total_batch_size", "warmup_steps")
# Fraction of the peak FLOPs by FLOPs per token: d4, d8, d12 (micro-batch 32) and d24 on one H200 in bf16. In small
# models most of the time goes to launches and to passes over embeddings and logits.
SMALL_MFU = ((8.0e7, 2.96e8, 7.6e8, 4.78e9), (0.162, 0.389, 0.515, 0.589))
START_UP = 35  # seconds per cell: imports, first use of the GPU, compilation, writing the model (a guess)


@settings
class SeriesConfig:
    """Keys of scaling.yaml, a grid; flags of these names win. Without budgets and ratios: the horizon of base.yaml."""

    depths: Depths
    budgets: Positives = field(default_factory=list)
    ratios: Positives = field(default_factory=list)


class Cell(NamedTuple):
    name: str  # of its folder
    config: PretrainConfig
    plan: object  # scaling.Plan


def scaling(parser: Parser, words: list[str]) -> None:
    """Train a recipe at several depths and budgets, fit scaling laws: `nanochat scaling scaling/cpu --run-dir DIR`."""
    parser.option("--run-dir", Dir, required=True, help="folder of the series, with a run folder per cell")
    parser.option("--depths", Depths, help="for example 4,6,8 (default: of scaling.yaml, as the next two)")
    parser.option("--budgets", Positives, help="training FLOPs, each at every depth, for example 1e16,3e16,1e17")
    parser.option("--ratios", Positives, help="tokens per parameter, each at every depth; neither: as in base.yaml")
    parser.option("--gpus", Count, help="cells at a time, each on its own GPU (default: all GPUs of this machine)")
    parser.option("--predict-depth", Depth, default=24, help="depth of the model whose loss is predicted")
    parser.option("--predict-ratio", Positive, default=8.0, help="its tokens per parameter")
    parser.add_argument("--fit-only", action="store_true", help="train nothing: fits of the finished cells")
    parser.add_argument("--dry-run", action="store_true", help="print cells, projected time and cost, start nothing")
    parser.add_argument("words", nargs="*", metavar="RECIPE [STAGE.KEY=VALUE ...]")
    arguments = parser.parse_intermixed_args(words)
    run, command, failed = Run(arguments.run_dir), None, []
    given = {name: value for name in ("depths", "budgets", "ratios") if (value := getattr(arguments, name))}
    if not arguments.fit_only:
        configs, grid = read_series(arguments.words, given)
        if arguments.dry_run:
            return show_cells(configs, grid, arguments.gpus)
        failed, command = train(run, configs, grid, arguments.gpus), shlex.join(["nanochat", "scaling", *words])
    elif arguments.words or arguments.dry_run or given:
        raise InputError("--fit-only takes the cells that --run-dir has: leave recipe, grid and --dry-run out")
    from .eval.scaling_fit import make_report  # takes seconds

    if failed:
        print(f"error: cells failed: {', '.join(failed)}; the same command tries them again", file=sys.stderr)
    print(make_report(run.path, arguments.predict_depth, arguments.predict_ratio, command))
    if failed:
        sys.exit(1)


def read_series(words: list[str], given: dict) -> tuple[dict, SeriesConfig]:
    """The recipe's configs and the grid, of scaling.yaml and the flags. Raises InputError for keys that both set."""
    names, overrides = ([word for word in words if ("=" in word) == sets] for sets in (False, True))
    if len(names) != 1:
        raise InputError("name one recipe, for example scaling/cpu or d12, and what to change as STAGE.KEY=VALUE")
    recipe = find_recipe(names[0])
    _, configs = read_recipe(recipe, ["tokenizer", "base"], overrides)
    if (path := recipe / "scaling.yaml").is_file():
        own = vars(parse_config(SeriesConfig, path))
        given = ({"depths": own["depths"]} if {"budgets", "ratios"} & {*given} else own) | given
    if "depths" not in given:
        raise InputError(f"give --depths, for example 4,6,8: recipe {recipe.name} has no scaling.yaml")
    grid = SeriesConfig(**given)
    if grid.budgets and grid.ratios:
        raise InputError("give --budgets or --ratios, not both: each of them is a horizon")
    stages = ("tokenizer.", "base.", "eval.")
    if unused := [word for word in overrides if not word.startswith(stages)]:
        raise InputError(f"{unused[0]} is not used: a series runs {', '.join(stages)[:-1].replace('.', '')}")
    keys = ["base.depth", *(f"base.{key}" for key in HORIZON if grid.budgets or grid.ratios)]
    if twice := [word for word in overrides if word.partition("=")[0] in keys]:
        raise InputError(f"{twice[0]}: --depths, --budgets and --ratios set this key, leave it out")
    if configs["base"].eval_every == 0:
        raise InputError("base.eval_every is 0, so that no cell has a val bpb: take -1, at the end")
    return configs, grid


def make_cells(base: PretrainConfig, grid: SeriesConfig, vocab_size: int) -> list[Cell]:
    """The runs of a grid, short horizons and small depths first. Raises InputError for a horizon below one step."""
    from .optim.scaling import for_budget, plan

    cells = []
    for horizon in sorted(grid.budgets or grid.ratios) or [None]:
        for depth in sorted(grid.depths):
            name, config = f"d{depth}", replace(base, depth=depth)
            try:
                if grid.budgets:
                    name += f"-{horizon:.4g}".replace("e+0", "e").replace("e+", "e")
                    config = for_budget(config, horizon, vocab_size)
                elif grid.ratios:
                    name += f"-ratio{horizon:g}"
                    config = replace(config, **dict(zip(HORIZON, (-1, -1, horizon))))
                cells.append(Cell(name, config, plan(config, vocab_size)))
            except InputError as error:
                raise InputError(f"{name}: {error}") from None
    each_once([cell.name for cell in cells])  # of two horizons that differ too little
    return cells


def show_cells(configs: dict, grid: SeriesConfig, gpus: int | None) -> None:
    """Print each cell's size and projected time, and the sum: on this machine's GPUs, on H200s or on the CPU."""
    import numpy as np
    import torch

    from .eval.report import grid as table
    from .optim.overview import gpu_here
    from .optim.scaling import CPU_FLOPS, GPUS, RATE, find_gpu

    here, count = gpu_here(), gpus or torch.cuda.device_count()
    gpu, rows, seconds = (find_gpu(here or "") or "H200") if count else None, [], []
    cells = make_cells(configs["base"], grid, configs["tokenizer"].vocab_size)
    for name, config, plan in cells:
        mfu = np.interp(np.log(plan.flops_per_token), np.log(SMALL_MFU[0]), SMALL_MFU[1])
        speed = (mfu * GPUS[gpu].flops if gpu else CPU_FLOPS * os.cpu_count()) / plan.flops_per_token
        evaluations = 1 + plan.num_iterations // config.eval_every if config.eval_every > 0 else 1
        tokens = plan.total_tokens + evaluations * config.eval_tokens / 3  # without backward pass
        seconds.append(tokens / speed + START_UP)
        counts = plan.num_parameters, plan.num_scaling_parameters, plan.total_tokens
        size = [*map(short, counts), f"{counts[2] / counts[1]:.2f}", plan.num_iterations, plan.total_batch_size]
        rows.append([name, *size, f"{plan.total_flops:.2e}", duration(seconds[-1])])
    print(table(["cell", "parameters", "N", "tokens", "tokens per N", "steps", "batch", "FLOPs", "time"], rows))
    longest, where = max(*seconds, sum(seconds) / max(count, 1)), f"{count} x {gpu}" if gpu else "this CPU"
    price = f", ${sum(seconds) / 3600 * RATE:.2f} at ${RATE:g} per GPU-hour" if gpu else ""
    total = f"{len(cells)} cells, {sum(cell.plan.total_flops for cell in cells):.2e} FLOPs"
    print(f"\n{total}: about {duration(longest)} on {where}{price} (projected, roughly)")


def devices_here(gpus: int | None) -> list[str | None]:
    """CUDA_VISIBLE_DEVICES of each cell at a time, [None] for a CPU. InputError if the machine has fewer GPUs."""
    import torch

    count = torch.cuda.device_count()
    if (gpus or 0) > count:
        raise InputError(f"--gpus {gpus}: this machine has {count}; leave it out to use what there is")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
    return visible.split(",")[: gpus or count] if count else [None]


def train(run: Run, configs: dict, grid: SeriesConfig, gpus: int | None) -> list[str]:
    """Train the cells that are not finished; returns the names of those that failed.

    Raises InputError for a finished cell of other keys, text or tokenizer, and for what the machine cannot train.
    """
    print("scaling: loading PyTorch ...", file=sys.stderr, flush=True)
    from .data.mixture import check_data
    from .data.tokenizer import load_tokenizer, tokenizer_fingerprint
    from .stages import check_run_folder, run_stage
    from .train.runtime import check_cost, torch

    devices = devices_here(gpus)
    check_data("base", configs["base"])
    if devices == [None] and not torch.backends.mps.is_available():
        plans = [cell.plan for cell in make_cells(configs["base"], grid, configs["tokenizer"].vocab_size)]
        check_cost(max(plans, key=lambda plan: plan.total_flops), torch.device("cpu"))
    with run.lock():
        check_run_folder(run, ["tokenizer"], configs)
        if not run.finished("tokenizer"):
            run_stage("tokenizer", configs["tokenizer"], run)
        vocab = load_tokenizer(run.folder("tokenizer"))
        cells = make_cells(configs["base"], grid, len(vocab))
        planned = {cell.name: cell.config for cell in cells}
        for folder in (Run(path.parents[1]) for path in sorted(run.path.glob("*/base/metrics.json"))):
            if folder.finished("base"):  # also those of other depths and horizons: one fit takes them all
                config, inputs = (folder.metrics("base").get(key) or {} for key in ("config", "inputs"))
                own = {key: value for key, value in config.items() if key in OF_A_CELL}
                config = planned.pop(folder.path.name, None) or replace(configs["base"], **own)
                check_run_folder(folder, ["base"], {"base": config})
                if inputs.get("tokenizer") != tokenizer_fingerprint(vocab):
                    raise InputError(f"{folder.path} was trained with another tokenizer: take another --run-dir")
        left = [cell for cell in cells if cell.name in planned]
        print(f"{len(cells)} cells, {len(cells) - len(left)} of them finished, into {run.path}")
        options = {"tokenizer": str(run.folder("tokenizer")), "tasks": configs.get("eval")}
        left = left[::-1] if len(devices) > 1 else left  # the longest first, so that no GPU is idle at the end
        return train_cells(left, devices, run, options)


def start(cell: Cell, device: str | None, run: Run, options: dict) -> BaseProcess:
    """A process that trains a cell on one GPU, None: on the CPU."""
    arguments = Run(run.path / cell.name), device, cell.config, options
    process = get_context("spawn").Process(target=train_cell, args=arguments)
    process.start()
    return process


def train_cell(run: Run, device: str | None, config: PretrainConfig, options: dict) -> None:
    """Pretraining of a cell, in a process of its own, with its output in log.txt."""
    run.path.mkdir(parents=True, exist_ok=True)
    with open(run.path / "log.txt", "w", encoding="utf-8") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    command = parent_process()  # if it is killed, the cell saves and ends, so that the next command can have it
    Thread(target=lambda: (command.join(), os.kill(os.getpid(), signal.SIGTERM)), daemon=True).start()

    def pretrain():
        from .stages import run_stage

        with run.lock():
            run_stage("base", config, run, **options)

    guarded(pretrain)


def train_cells(cells: list[Cell], devices: list[str | None], run: Run, options: dict) -> list[str]:
    """Train each cell on the next free device, a line about each; returns the names of those that failed.

    options: of `run_base`. SIGTERM and Ctrl-C stop all processes, which save.
    """
    left, free, running, failed = list(cells), list(devices), {}, []
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        while left or running:
            while left and free:
                cell, device = left.pop(0), free.pop(0)
                process = start(cell, device, run, options)
                running[process.sentinel] = process, cell, device, time.time()
            for sentinel in connection.wait([*running]):
                process, cell, device, begin = running.pop(sentinel)
                process.join()
                free.append(device)
                folder, done = Run(run.path / cell.name), len(cells) - len(left) - len(running)
                if folder.finished("base"):
                    text = f"val bpb {folder.metrics('base')['val_bpb']:.4f}"
                else:
                    failed.append(cell.name)
                    log = folder.path / "log.txt"
                    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
                    text = f"failed with exit code {process.exitcode}: {' '.join(lines[-1:])} ({log})"
                print(f"[{done}/{len(cells)}] {cell.name}: {text}, after {duration(time.time() - begin)}")
    except (KeyboardInterrupt, SystemExit):
        print("stopped by a signal: the same command resumes the series", file=sys.stderr)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
        for process, *_ in running.values():
            process.terminate()
        for process, *_ in running.values():
            process.join()
    return failed
