"""`nanochat scaling`: one recipe at several depths and horizons, and what the results say of larger models.

    nanochat scaling scaling/cpu --run-dir runs/scaling       # recipes/scaling/cpu: depths x FLOP budgets (IsoFLOP)
    nanochat scaling d12 --run-dir runs/series --depths 4,8,12 --ratios 8,12 --gpus 2

Each cell is an ordinary run folder, as DIR/d4-1e16, whose base stage is the usual pretraining in a process of its own.
So the same command skips finished cells and resumes an interrupted one. All cells share one tokenizer and one cache of
compiled programs. eval/scaling_fit.py has the fits.
"""

import os
import shlex
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import field, replace
from multiprocessing import connection, get_context
from pathlib import Path
from typing import Annotated, NamedTuple

from annotated_types import Ge, Gt, Le, MinLen

from .config import Count, Dir, Parser, Place, Unique, parse_config, settings
from .errors import InputError, guarded
from .run import Run, duration, short
from .stage_configs import PretrainConfig, find_recipe, read_recipe

Depth, Positive = Annotated[int, Ge(1), Le(1000)], Annotated[float, Gt(0), Le(1e30)]
Depths, Positives = Annotated[Unique[Depth], MinLen(1)], Unique[Positive]
HORIZON = ("num_iterations", "target_flops", "target_param_data_ratio")
# Fraction of the peak FLOPs by FLOPs per token: d4, d8, d12 (micro-batch 32) and d24 on one H200 in bf16. In small
# models most of the time goes to launches and to passes over embeddings and logits.
SMALL_MFU = ((8.0e7, 2.96e8, 7.6e8, 4.78e9), (0.162, 0.389, 0.515, 0.589))
START_UP = 25  # seconds per cell: first use of the GPU, compilation, writing the model (a guess)


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
    parser.option(
        "--depths", Depths, help="for example 4,6,8 (default: of the recipe's scaling.yaml, as the next two)"
    )
    parser.option("--budgets", Positives, help="training FLOPs, each at every depth, for example 1e16,3e16,1e17")
    parser.option("--ratios", Positives, help="tokens per parameter, each at every depth; neither: as in base.yaml")
    parser.option("--gpus", Count, help="cells at a time, each on its own GPU (default: all GPUs of this machine)")
    parser.option("--tokenizer", Place, help="folder or Hub id (default: the recipe's, trained once for all cells)")
    parser.option("--predict-depth", Depth, default=24, help="depth of the model whose loss is predicted")
    parser.option("--predict-ratio", Positive, default=8.0, help="its tokens per parameter")
    parser.add_argument("--fit-only", action="store_true", help="train nothing: fits of the finished cells")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the cells, projected time and cost, start nothing"
    )
    parser.add_argument("words", nargs="*", metavar="RECIPE [STAGE.KEY=VALUE ...]")
    arguments = parser.parse_intermixed_args(words)
    folder, prediction = arguments.run_dir, (arguments.predict_depth, arguments.predict_ratio)
    if arguments.fit_only:
        if arguments.words or arguments.dry_run or arguments.depths or arguments.budgets or arguments.ratios:
            raise InputError("--fit-only takes the cells that --run-dir has: leave recipe, grid and --dry-run out")
        return fit(folder, *prediction)
    configs, grid = read_series(arguments)
    if arguments.dry_run:
        return show_cells(configs, grid, arguments.tokenizer, arguments.gpus)
    failed = train(Run(folder), configs, grid, arguments.tokenizer, arguments.gpus)
    fit(folder, *prediction, shlex.join(["nanochat", "scaling", *words]))
    if failed:
        print(f"error: cells failed: {', '.join(failed)}; the same command tries them again", file=sys.stderr)
        sys.exit(1)


def read_series(arguments) -> tuple[dict, SeriesConfig]:
    """The recipe's configs and the grid, by scaling.yaml and the flags. Raises InputError for keys that both set."""
    names, overrides = ([word for word in arguments.words if ("=" in word) == sets] for sets in (False, True))
    if len(names) != 1:
        raise InputError("name one recipe, for example scaling/cpu or d12, and what to change as STAGE.KEY=VALUE")
    recipe = find_recipe(names[0])
    _, configs = read_recipe(recipe, ["base"], overrides)
    given = {name: value for name in ("depths", "budgets", "ratios") if (value := getattr(arguments, name))}
    if (path := recipe / "scaling.yaml").is_file():
        defaults = vars(parse_config(SeriesConfig, path))
        given = ({"depths": defaults["depths"]} if {"budgets", "ratios"} & {*given} else defaults) | given
    if "depths" not in given:
        raise InputError(f"give --depths, for example 4,6,8: recipe {recipe.name} has no scaling.yaml")
    grid = SeriesConfig(**{name: given[name] for name in SeriesConfig.__dataclass_fields__ if name in given})
    if grid.budgets and grid.ratios:
        raise InputError("give --budgets or --ratios, not both: each of them is a horizon")
    keys = ["base.depth", *(f"base.{key}" for key in HORIZON if grid.budgets or grid.ratios)]
    if twice := [word for word in overrides if word.partition("=")[0] in keys]:
        raise InputError(f"{twice[0]}: --depths, --budgets and --ratios set this key, leave it out")
    return configs, grid


def make_cells(base: PretrainConfig, grid: SeriesConfig, vocab_size: int) -> list[Cell]:
    """The runs of a grid, short horizons and small depths first. Raises InputError for a horizon below one step."""
    from .optim.scaling import for_budget, plan

    cells = []
    for horizon in grid.budgets or grid.ratios or [None]:
        for depth in sorted(grid.depths):
            name, config = f"d{depth}", replace(base, depth=depth)
            if grid.budgets:
                name += f"-{horizon:.4g}".replace("e+0", "e").replace("e+", "e")
                config = for_budget(config, horizon, vocab_size)
            elif grid.ratios:
                name += f"-ratio{horizon:g}"
                config = replace(config, **dict(zip(HORIZON, (-1, -1, horizon))))
            try:
                cells.append(Cell(name, config, plan(config, vocab_size)))
            except InputError as error:
                raise InputError(f"{name}: {error}") from None
    return cells


def seconds_of(cell: Cell, gpu: str | None) -> float:
    """Projected seconds of a cell with its evaluations, on a GPU of scaling.GPUS or on this CPU."""
    import numpy as np

    from .optim.scaling import GPUS, estimate_speed

    plan, config = cell.plan, cell.config
    speed, _ = estimate_speed(plan, "CPU", os.cpu_count() or 1, False)
    if gpu:
        mfu = np.interp(np.log(plan.flops_per_token), np.log(SMALL_MFU[0]), SMALL_MFU[1])
        speed = mfu * GPUS[gpu].flops / plan.flops_per_token
    evaluations = 1 + plan.num_iterations // config.eval_every if config.eval_every > 0 else 1
    return float((plan.total_tokens + evaluations * config.eval_tokens / 3) / speed) + START_UP  # /3: forward only


def show_cells(configs: dict, grid: SeriesConfig, tokenizer: str | None, gpus: int | None) -> None:
    """Print each cell's size, projected time and cost, and the sum: on this machine's GPUs, H200s or the CPU."""
    from .eval.report import grid as table
    from .optim.overview import gpu_here
    from .optim.scaling import RATE, find_gpu

    gpu, count, rows = find_gpu(gpu_here() or ("H200" if gpus else "CPU")), gpus or 1, []
    cells = make_cells(configs["base"], grid, vocabulary(configs, tokenizer))
    seconds, queues = [seconds_of(cell, gpu) for cell in cells], [0.0] * count
    for (name, _, plan), time_s in zip(cells, seconds):
        counts = plan.num_parameters, plan.num_scaling_parameters, plan.total_tokens
        cost = f"${time_s / 3600 * RATE:.2f}" if gpu else "-"
        rows.append([name, *map(short, counts), f"{counts[2] / counts[1]:.2f}", plan.num_iterations,
                     plan.total_batch_size, f"{plan.total_flops:.2e}", duration(time_s), cost])  # fmt: skip
    for time_s in sorted(seconds, reverse=True):
        queues[queues.index(min(queues))] += time_s
    head = ["cell", "parameters", "N", "tokens", "tokens per N", "steps", "batch", "FLOPs", "time", "cost"]
    print(table(head, rows))
    price = f", ${sum(seconds) / 3600 * RATE:.2f} at ${RATE:g} per GPU-hour" if gpu else ""
    where = f"{count} x {gpu}" if gpu else f"{os.cpu_count()} CPU cores"
    total = f"{len(cells)} cells, {sum(cell.plan.total_flops for cell in cells):.2e} FLOPs"
    print(f"\n{total}: about {duration(max(queues))} on {where}{price} (projected, roughly)")


def vocabulary(configs: dict, tokenizer: str | None) -> int:
    """Number of tokens of a tokenizer, or of the recipe's, which need not exist yet."""
    if not tokenizer and "tokenizer" not in configs:
        raise InputError("the recipe has no tokenizer.yaml: give --tokenizer")
    from .data.tokenizer import load_tokenizer

    return len(load_tokenizer(tokenizer)) if tokenizer else configs["tokenizer"].vocab_size


def devices_here(gpus: int | None) -> list[str | None]:
    """CUDA_VISIBLE_DEVICES of each worker, [None] for a CPU. Raises InputError if the machine has fewer GPUs."""
    import torch

    count = torch.cuda.device_count()
    if (gpus or 0) > count:
        raise InputError(f"--gpus {gpus}: this machine has {count}; leave it out to use what there is")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
    return visible.split(",")[: gpus or count] if count else [None]


def train(run: Run, configs: dict, grid: SeriesConfig, tokenizer: str | None, gpus: int | None) -> list[str]:
    """Train the cells that are not finished; returns the names of those that failed.

    Raises InputError for a finished cell of other keys, text or tokenizer, and for what the machine cannot train.
    """
    print("scaling: loading PyTorch ...", file=sys.stderr, flush=True)
    from .data.mixture import check_data
    from .data.tokenizer import load_tokenizer, tokenizer_fingerprint
    from .stages import check_run_folder, run_stage
    from .train.runtime import check_cost, torch

    devices, expected = devices_here(gpus), vocabulary(configs, tokenizer)
    check_data("base", configs["base"])
    if devices == [None] and not torch.backends.mps.is_available():
        cells = make_cells(configs["base"], grid, expected)
        check_cost(max((cell.plan for cell in cells), key=lambda plan: plan.total_flops), torch.device("cpu"))
    for name, folder in (("TORCHINDUCTOR", "inductor"), ("TRITON", "triton")):
        os.environ.setdefault(f"{name}_CACHE_DIR", str(run.path.resolve() / ".compiled" / folder))
    with run.lock():
        if not tokenizer and not run.finished("tokenizer"):
            run_stage("tokenizer", configs["tokenizer"], run)
        tokenizer = tokenizer or str(run.folder("tokenizer"))
        vocab = load_tokenizer(tokenizer)
        cells, left = make_cells(configs["base"], grid, len(vocab)), []
        for cell in cells:
            folder = Run(run.path / cell.name)
            metrics = folder.metrics("base") or {}
            if not metrics.get("finished"):
                left.append(cell)
                continue
            check_run_folder(folder, ["base"], {"base": cell.config})
            if (metrics.get("inputs") or {}).get("tokenizer") != tokenizer_fingerprint(vocab):
                raise InputError(f"{folder.path} was trained with another tokenizer: take another --run-dir")
        print(f"{len(cells)} cells, {len(cells) - len(left)} of them finished, into {run.path}")
        options = {"tokenizer": tokenizer, "tasks": configs.get("eval")}
        left = left[::-1] if len(devices) > 1 else left  # the longest first, so that no GPU is idle at the end
        return train_cells(left, devices, lambda device: Worker(device, run, options))


class Worker:
    """A process for one cell on one GPU, or on the CPU for None. It imports the libraries before it gets the cell."""

    def __init__(self, device: str | None, run: Run, options: dict):
        context, self.device, self.run = get_context("spawn"), device, run
        self.gate, theirs = context.Pipe()
        self.process = context.Process(target=train_cell, args=(theirs, options))
        if device is not None:  # before the imports: those of kernels ask for the GPU
            os.environ["CUDA_VISIBLE_DEVICES"] = device
        self.process.start()
        theirs.close()

    def send(self, cell: Cell) -> None:
        self.cell, self.folder, self.begin = cell, self.run.path / cell.name, time.time()
        with suppress(OSError):  # a process that has ended has an exit code
            self.gate.send((self.folder, cell.config))

    def outcome(self) -> tuple[bool, str]:
        """Whether the cell is finished, and a line about it; waits for the process."""
        self.process.join()
        seconds, metrics = duration(time.time() - self.begin), Run(self.folder).metrics("base") or {}
        if metrics.get("finished"):
            return True, f"val bpb {metrics.get('val_bpb') or float('nan'):.4f} after {seconds}"
        log, code = self.folder / "log.txt", self.process.exitcode
        lines = log.read_text(errors="replace").splitlines() if log.exists() else []
        error = next((line[7:] for line in reversed(lines) if line.startswith("error: ")), f"exit code {code}")
        return False, f"failed after {seconds}: {error} ({log})"


def train_cell(gate, options: dict) -> None:
    """What a `Worker` runs: pretraining of the cell that `gate` names, with its output in log.txt."""

    def pretrain():
        from .stages import run_stage

        try:
            folder, config = gate.recv()
        except EOFError:  # the command has ended
            return
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "log.txt", "w", encoding="utf-8") as log:
            for stream in (1, 2):
                os.dup2(log.fileno(), stream)
        run = Run(folder)
        with run.lock():
            run_stage("base", config, run, **options)

    guarded(pretrain)


def train_cells(cells: list[Cell], devices: list, start: Callable[[str | None], Worker]) -> list[str]:
    """Train each cell on the next free device, a line about each; returns the names of those that failed.

    The next process of each device imports meanwhile. SIGTERM and Ctrl-C stop all processes, which save.
    """
    left, ready, running, failed, done = list(cells), {}, {}, [], 0
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        while done < len(cells):
            busy = {worker.device for worker in running.values()}
            for device in devices:
                if left and device not in busy:
                    worker = ready.pop(device, None) or start(device)
                    worker.send(left.pop(0))
                    running[worker.process.sentinel] = worker
            for device in devices[: len(left)]:
                if device not in ready:
                    ready[device] = start(device)
            for sentinel in connection.wait(list(running)):
                worker, done = running.pop(sentinel), done + 1
                finished, text = worker.outcome()
                failed += [] if finished else [worker.cell.name]
                print(f"[{done}/{len(cells)}] {worker.cell.name}: {text}")
    except (KeyboardInterrupt, SystemExit):
        print("stopped by a signal: the same command resumes the series", file=sys.stderr)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
        for worker in (*running.values(), *ready.values()):
            worker.process.terminate()
            worker.process.join()
    return failed


def fit(folder: str, depth: int, ratio: float, command: str | None = None) -> None:
    """Write scaling.json, scaling.md, scaling.html and plots/ of the finished cells; print the summary."""
    from .eval.scaling_fit import make_report

    print(make_report(Path(folder), depth, ratio, command))
