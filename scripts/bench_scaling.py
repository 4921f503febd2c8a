"""Pretraining speed by number of GPUs: tok/s, MFU, memory, time to the first step; and what the recipe would cost.

    python scripts/bench_scaling.py [--recipe d24] [--gpus 1,2,4,8] [--configs multi_gpu,fsdp2] [--precisions bf16,fp8]
                                    [--steps 30] [--accumulation 4] [--peer PATH_OF_A_NANOCHAT_CHECKOUT]
    python scripts/bench_scaling.py --depths 32,36,40,44,48      # the largest depth that fits, 4 rows at once
    python scripts/bench_scaling.py --cpu                        # the same machinery, tiny, over gloo

Each row is a run of its own of the real loop (train/pretrain.py, its loader included) under a file of
configs/accelerate/ (by its name) or another launch file (by its path), 16 x 2,048 tokens a GPU at once and 1M tokens a
step unless --accumulation says otherwise; numbers of GPUs that this machine does not have are left out. "One GPU" is
the mean over as many runs at once as there are GPUs, each on one of them. All runs share one cache of compiled
programs, so only the first time to the first step is a cold one. Without --dataset the text is made of random words.
Scaling is tok/s over (GPUs x tok/s of one GPU in the same precision): of the mean of the machine's GPUs, and of its
slowest, for which all others wait when they train together. MFU is over the bf16 peak, also for fp8.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch

from nanochat_hf.config import parse_config
from nanochat_hf.data.tokenizer import train_bpe
from nanochat_hf.optim.scaling import peak_flops, plan
from nanochat_hf.train.pretrain import PretrainConfig, Pretraining

ROOT = Path(__file__).parent.parent
TINY = {"aspect_ratio": 32, "head_dim": 32, "max_seq_len": 64, "generation": 2}  # of --cpu
MARK = "figures: "  # before the line of JSON that a run prints at its end
COLUMNS = ("run", "GPUs", "tok/s", "per GPU", "of mean", "of slowest", "MFU", "GiB", "first step", "recipe", "cost")


class Timed(Pretraining):
    """The loop of `pretrain`, which gives figures in place of a model."""

    first_step = None

    def measure(self, figures: dict) -> None:
        if self.first_step is None:
            self.first_step = time.time() - float(os.environ["BENCH_LAUNCHED"])
        self.history.append((self.seconds, figures["train_loss"]))

    def finish(self) -> dict:
        self.loader.close()
        # A step is told of when the next one is on its way, which takes a good part of that one's time; the last step
        # has none behind it and would come out too early, so it is not timed.
        warm, (end, _) = self.history[int(os.environ["BENCH_WARMUP"]) - 1][0], self.history[-2]
        steps, loss = len(self.history) - 1 - int(os.environ["BENCH_WARMUP"]), self.history[-1][1]
        speed = steps * self.plan.total_batch_size / (end - warm)
        cuda = self.device.type == "cuda"
        peaks = torch.tensor([torch.cuda.max_memory_allocated() if cuda else 0.0], device=self.device)
        return {
            "tok_s": speed, "mfu": self.mfu(speed), "bytes": self.accelerator.gather(peaks).max().item(),
            "first_step": self.first_step, "loss": loss, "parameters": self.plan.num_parameters,
            "device": torch.cuda.get_device_name() if cuda else "CPU",
        }  # fmt: skip


def ours(settings: dict) -> dict:
    run = Timed(
        PretrainConfig(**settings["config"]), settings["tokenizer"], Path(settings["output"]), None, None, None
    )
    if run.rows < run.config.device_batch_size:  # the loop would go on with fewer
        sys.exit(f"{run.config.device_batch_size} rows do not fit")
    return run.run()


def peer(settings: dict) -> dict:
    """The same of karpathy/nanochat with its own optimizer, on ids that are there already: no loader."""
    sys.path.insert(0, settings["peer"])
    from bench_gpu import peer as make
    from nanochat.common import compute_init

    *_, world, device = compute_init("cuda")
    function, optimizer, flops = make(settings["depth"], "SSSL", settings["attention"])
    rows, accumulation = settings["rows"], settings["accumulation"]
    ids, first = torch.randint(0, 32768, (accumulation, rows, 2049), device=device), None
    for step in range(settings["warmup"] + settings["steps"]):
        for part in ids:
            (function(part[:, :-1].contiguous(), part[:, 1:].contiguous()) / accumulation).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step in (0, settings["warmup"] - 1):
            torch.cuda.synchronize()
            first = first or time.time() - float(os.environ["BENCH_LAUNCHED"])
            start = time.perf_counter()
    torch.cuda.synchronize()
    speed = settings["steps"] * world * ids[..., 1:].numel() / (time.perf_counter() - start)
    name = torch.cuda.get_device_name()
    return {
        "tok_s": speed, "mfu": speed * flops / (world * (peak_flops(name) or float("nan"))), "first_step": first,
        "bytes": torch.cuda.max_memory_allocated(), "device": name,
    }  # fmt: skip


def launch(name: str, gpus: int, settings: dict, options, device: int | None = None) -> dict | None:
    """One run in processes of its own, on one device if it is given; its figures, or None after saying why not."""
    words = [sys.executable]
    if gpus > 1 and settings["kind"] == "peer":
        words += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(gpus)]
    elif gpus > 1:
        path = Path(settings["kind"])
        path = path if path.suffix else ROOT / "configs" / "accelerate" / f"{path}.yaml"
        words = [str(Path(sys.executable).parent / "accelerate"), "launch", "--config_file", str(path)]
        words += ["--num_processes", str(gpus), "--main_process_port", "0"]
    cache = options.work.resolve() / "compiled"
    environment = {
        **os.environ, "BENCH_LAUNCHED": str(time.time()), "BENCH_WARMUP": str(options.warmup),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"), "TRITON_CACHE_DIR": str(cache / "triton"),
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]), "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    environment |= {"ACCELERATE_USE_CPU": "true"} if options.cpu else {}
    environment.setdefault("OMP_NUM_THREADS", "1")
    if device is not None:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")  # the devices are those of this process
        environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[device] if visible else str(device)
        settings = settings | {"output": f"{settings['output']}-{device}"}
    name = f"{name}, {gpus}" + ("" if device is None else f" (number {device})")
    words += [__file__, "--one", json.dumps(settings)]
    try:
        done = subprocess.run(
            words, env=environment, capture_output=True, text=True, check=False, timeout=options.patience
        )
    except subprocess.TimeoutExpired:
        print(f"{name}: no result after {options.patience} s", file=sys.stderr)
        return None
    found = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if done.returncode or not found:
        short = "OutOfMemoryError" in done.stderr or "do not fit" in done.stderr
        print(f"{name}: " + ("out of memory" if short else f"failed:\n{done.stderr[-3000:]}"), file=sys.stderr)
        return None
    figures = json.loads(found[0].removeprefix(MARK))
    print(f"{name}: {figures['tok_s']:,.0f} tok/s, {figures['bytes'] / 2**30:.1f} GiB", file=sys.stderr)
    return figures


def launch_on_each(name: str, devices: int, settings: dict, options) -> dict | None:
    """The run on one GPU, on each of the machine's at the same time: mean and lowest speed, the worst of the rest.

    GPUs of one machine differ by a percent or two, and those beside them work, too, when they train together.
    """
    with ThreadPoolExecutor(devices) as pool:
        found = list(pool.map(lambda device: launch(name, 1, settings, options, device), range(devices)))
    if None in found:
        return None
    worst = {key: max(figures[key] for figures in found) for key in ("bytes", "first_step")}
    mean = {key: sum(figures[key] or 0 for figures in found) / devices for key in ("tok_s", "mfu")}
    return found[0] | worst | mean | {"slowest": min(figures["tok_s"] for figures in found)}


def prepare(options) -> tuple[str, str]:
    """-> (tokenizer, dataset): what was given, or made of random words once."""
    folder = options.work / ("tiny" if options.cpu else "text")
    if not options.tokenizer and not (folder / "tokenizer").exists():
        rng, letters = random.Random(0), "abcdefghijklmnopqrstuvwxyz"
        words = ["".join(rng.choices(letters, k=rng.randint(3, 9))) for _ in range(400 if options.cpu else 30_000)]
        texts = [" ".join(rng.choices(words, k=rng.randint(50, 1500))) for _ in range(200 if options.cpu else 2_000)]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        train_bpe(iter(texts), 512 if options.cpu else 32768).save_pretrained(folder / "tokenizer")
    return options.tokenizer or str(folder / "tokenizer"), options.dataset or str(folder / "text.jsonl")


def config_of(options, depth: int, gpus: int, precision: str, rows: int, accumulation: int | None, dataset: str):
    """The recipe's own config, at this size."""
    config = parse_config(PretrainConfig, ROOT / "recipes" / options.recipe / "base.yaml")
    config = replace(config, depth=depth, **(TINY if options.cpu else {}))
    together = rows * config.max_seq_len * gpus
    accumulation = accumulation or max(1, options.tokens // together)
    return replace(
        config, dataset=dataset, device_batch_size=rows, total_batch_size=together * accumulation,
        num_iterations=options.warmup + options.steps + 1, fp8=precision == "fp8", eval_every=0, core_metric_every=-1,
        save_every=-1, max_loss_spike=0.0, report_to="none",
    )  # fmt: skip


def table(columns, rows) -> str:
    cells = [list(map(str, row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *cells)]
    lines = [list(columns), ["-" * width for width in widths], *cells]
    return "\n".join("| " + " | ".join(x.ljust(w) for x, w in zip(line, widths)) + " |" for line in lines)


def speeds(options, counts: list[int]) -> None:
    tokenizer, dataset = prepare(options)
    recipe = parse_config(PretrainConfig, ROOT / "recipes" / options.recipe / "base.yaml")
    made = plan(recipe.depth, 32768, recipe.generation, target_param_data_ratio=recipe.target_param_data_ratio)
    rows, single = [], {}
    for precision in options.precisions.split(","):
        for gpus in counts:
            contenders = options.configs.split(",") if gpus > 1 else ["one GPU"]
            contenders = [kind for kind in contenders if kind]  # --configs= for the peer alone
            for kind in contenders + (["peer"] if options.peer and precision == "bf16" else []):
                depth = 2 if options.cpu else recipe.depth
                config = config_of(options, depth, gpus, precision, options.rows, options.accumulation, dataset)
                settings = {"kind": kind, "config": vars(config), "tokenizer": tokenizer, "peer": options.peer}
                settings |= {"output": str(options.work / "run"), "depth": recipe.depth, "rows": options.rows}
                settings |= {"warmup": options.warmup, "steps": options.steps, "attention": options.attention}
                settings["accumulation"] = config.total_batch_size // (options.rows * config.max_seq_len * gpus)
                name = "karpathy/nanochat" if kind == "peer" else f"{Path(kind).stem}, {precision}"
                if gpus == 1:
                    found = launch_on_each(name, counts[-1], settings, options)
                else:
                    found = launch(name, gpus, settings, options)
                if found is None:
                    continue
                each = found["tok_s"] / gpus
                mean, slowest = single.setdefault((kind == "peer", precision), (each, found.get("slowest", each)))
                hours = made.total_tokens / found["tok_s"] / 3600
                rows.append(
                    (
                        name, gpus, f"{found['tok_s']:,.0f}", f"{each:,.0f}", f"{each / mean:.1%}",
                        f"{each / slowest:.1%}", f"{found['mfu']:.1%}" if found["mfu"] else "-",
                        f"{found['bytes'] / 2**30:.1f}", f"{found['first_step']:.0f} s", f"{hours:.2f} h",
                        f"${hours * gpus * options.rate:,.0f}",
                    )
                )  # fmt: skip
                device = found["device"]
    if not rows:
        sys.exit("error: no run gave figures")
    shape = "a tiny model" if options.cpu else f"{options.recipe}, {options.rows} x {recipe.max_seq_len} a GPU"
    print(f"\n{device}: {shape}, {options.steps} steps after {options.warmup}, torch {torch.__version__}\n")
    print(table(COLUMNS, rows))
    print(
        f"\nrecipe (projected, not run) = {made.total_tokens:,} tokens of {options.recipe} / tok/s; "
        f"cost = GPUs x hours x ${options.rate:g}. Without evaluation, checkpoints and the other stages."
    )


def depths(options, counts: list[int]) -> None:
    """Each depth, upwards, until it no longer fits; 4 rows at once and one micro-batch a step."""
    tokenizer, dataset = prepare(options)
    rows, gpus = [], counts[-1]
    for kind in options.configs.split(",") if gpus > 1 else ["one GPU"]:
        for depth in map(int, options.depths.split(",")):
            config = config_of(options, depth, gpus, "bf16", 4, 1, dataset)
            settings = {"kind": kind, "config": vars(config), "tokenizer": tokenizer}
            found = launch(f"{kind}, d{depth}", gpus, settings | {"output": str(options.work / "run")}, options)
            if found is None:
                break
            speed, memory = f"{found['tok_s']:,.0f}", f"{found['bytes'] / 2**30:.1f}"
            rows.append((Path(kind).stem, gpus, f"d{depth}", f"{found['parameters'] / 1e9:.2f}B", memory, speed))
            device = found["device"]
    if not rows:
        sys.exit("error: no depth fits")
    print(f"\n{device}: the largest depths that fit, 4 x {config.max_seq_len} a GPU\n")
    print(table(("config", "GPUs", "depth", "parameters", "GiB", "tok/s"), rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="d24")
    parser.add_argument("--gpus", default="1,2,4,8")
    parser.add_argument("--configs", default="multi_gpu,fsdp2")
    parser.add_argument("--precisions", default="bf16,fp8")
    parser.add_argument("--rows", type=int, default=16, help="rows that a GPU takes at once")
    parser.add_argument("--tokens", type=int, default=2**20, help="of a step")
    parser.add_argument("--accumulation", type=int, help="micro-batches of a step, instead of --tokens")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--warmup", type=int, default=3, help="steps that are not timed")
    parser.add_argument("--depths", help="find the largest of these depths that fits, instead")
    parser.add_argument("--dataset", help="text, as in base.yaml")
    parser.add_argument("--tokenizer")
    parser.add_argument("--peer", help="path of a karpathy/nanochat checkout, to run beside ours")
    parser.add_argument(
        "--attention", default="flex", help="the peer's, where its FlashAttention-3 is missing, or sdpa"
    )
    parser.add_argument("--rate", type=float, default=3.0, help="dollars a GPU-hour")
    parser.add_argument("--work", type=Path, default=Path("runs/bench-scaling"))
    parser.add_argument("--patience", type=float, default=900, help="seconds that one run may take")
    parser.add_argument("--cpu", action="store_true", help="a tiny model on this CPU, to try the script")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        settings = json.loads(options.one)
        figures = (peer if settings["kind"] == "peer" else ours)(settings)
        if os.environ.get("RANK", "0") == "0":
            print(f"\n{MARK}{json.dumps(figures)}", flush=True)
        return
    if options.cpu:
        options.rows, options.precisions, options.peer = 2, "fp32", None
        options.tokens, options.gpus = 2 * 64 * 4, "1,2"
    there = 2 if options.cpu else torch.cuda.device_count()
    if not (counts := [n for n in map(int, options.gpus.split(",")) if n <= there]):
        sys.exit(f"error: {there} GPUs here; --gpus {options.gpus} needs more (--cpu tries the script without one)")
    (depths if options.depths else speeds)(options, counts)


if __name__ == "__main__":
    main()
