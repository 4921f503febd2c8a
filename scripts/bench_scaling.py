"""Pretraining speed by number of GPUs: tok/s, MFU, memory, time to the first step, and the cost of the recipe.

    python scripts/bench_scaling.py [--recipe d24] [--gpus 1,2,4,8] [--configs multi_gpu,fsdp2] [--precisions bf16,fp8]
                                    [--steps 30] [--grad-accum-steps 4] [--baseline PATH_OF_A_NANOCHAT_CHECKOUT]
    python scripts/bench_scaling.py --depths 32,36,40,44,48      # the largest depth that fits, micro-batch size 4
    python scripts/bench_scaling.py --cpu                        # tiny, over gloo, to try the script

Each row is a run of the real loop (train/pretrain.py with its loader) under an Accelerate config file, a name in
configs/accelerate/ or a path. "One GPU" is the mean over simultaneous runs on each of the machine's GPUs. All runs
share one cache of compiled programs: only the first has a cold start. Without --dataset the text is random words.
Scaling efficiency is tok/s over (GPUs x tok/s of one GPU in the same precision): of the mean of the GPUs, and of the
slowest, for which the others wait. MFU is relative to the bf16 peak, also for FP8.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Le

from nanochat_hf.config import Count, NotNegative, Parser, Place, Price, Size, Unique, parse_config
from nanochat_hf.errors import fail, guarded

if __name__ == "__main__":  # --help is shown before the large imports
    parser = Parser(__doc__)
    add = parser.option
    add("--recipe", Place, default="d24", help="a name under recipes/ or the path of a recipe folder")
    add("--gpus", Unique[Size], default=[1, 2, 4, 8], help="those that the machine lacks are left out")
    add("--configs", default="multi_gpu,fsdp2", help="Accelerate config files")
    add("--precisions", Unique[Literal["bf16", "fp8"]], default=["bf16", "fp8"], help="bf16, fp8 or both")
    add("--micro-batch-size", Size, "--rows", default=16, help="sequences per GPU")
    add("--total-batch-size", Count, "--tokens", default=2**20, help="tokens per step")
    add("--grad-accum-steps", Size, "--accumulation", help="micro-batches per step, instead of --total-batch-size")
    add("--steps", Size, default=30, help="timed steps")
    add("--warmup", Annotated[int, Ge(0), Le(10**5)], default=3, help="steps that are not timed")
    add("--depths", Unique[Size], help="find the largest of these depths that fits, instead")
    add("--dataset", help="text, as in base.yaml")
    add("--tokenizer", Place, help="folder or Hub id of a tokenizer")
    add("--baseline", Place, "--peer", help="path of a karpathy/nanochat checkout, to run beside ours")
    attentions = Literal["flex", "fa4", "sdpa"]
    add("--attention", attentions, default="flex", help="of the baseline without FlashAttention-3")
    add("--gpu-hourly-rate", Price, "--rate", default=3.0, help="dollars per GPU and hour")
    add("--work", Place, default="runs/bench-scaling", help="folder for what the runs write")
    add("--timeout", NotNegative, "--patience", default=900, help="seconds that one run may take")
    parser.add_argument("--cpu", action="store_true", help="a tiny model on this CPU, to try the script")
    add("--one", help=argparse.SUPPRESS)
    ARGUMENTS = guarded(parser.parse_args)

import torch

from nanochat_hf.data.tokenizer import train_bpe
from nanochat_hf.eval.report import grid
from nanochat_hf.optim.scaling import peak_flops, plan
from nanochat_hf.stage_configs import find_recipe
from nanochat_hf.train.pretrain import PretrainConfig, Pretraining

ROOT = Path(__file__).parent.parent
TINY = {"aspect_ratio": 32, "head_dim": 32, "max_seq_len": 64, "generation": 2}  # of --cpu
MARK = "results: "  # before the line of JSON that a run prints at its end
COLUMNS = ("run", "GPUs", "tok/s", "per GPU", "of mean", "of slowest", "MFU", "GiB", "first step", "recipe", "cost")


class TimedPretraining(Pretraining):
    """The loop of `pretrain`, which returns its speed instead of a model."""

    first_step = None

    def measure(self, metrics: dict) -> None:
        if self.first_step is None:
            self.first_step = time.time() - float(os.environ["BENCH_LAUNCHED"])
        self.history.append((self.timer.seconds, metrics["train_loss"]))

    def finish(self) -> dict:
        self.loader.close()
        # A step is reported when the next one is enqueued. The last one has none behind it, so it is not timed.
        warmup, (end, _) = int(os.environ["BENCH_WARMUP"]), self.history[-2]
        steps = len(self.history) - 1 - warmup
        speed = steps * self.plan.total_batch_size / (end - self.history[warmup - 1][0])
        cuda = self.device.type == "cuda"
        peaks = torch.tensor([torch.cuda.max_memory_allocated() if cuda else 0.0], device=self.device)
        return {
            "tok_s": speed, "mfu": self.mfu(speed), "bytes": self.accelerator.gather(peaks).max().item(),
            "first_step": self.first_step, "loss": self.history[-1][1], "parameters": self.plan.num_parameters,
            "device": torch.cuda.get_device_name() if cuda else "CPU",
        }  # fmt: skip


def ours(settings: dict) -> dict:
    config = PretrainConfig(**settings["config"])
    run = TimedPretraining(config, settings["tokenizer"], Path(settings["output"]), None, None, None)
    if run.micro_batch_size < config.device_batch_size:  # the loop would continue with fewer
        sys.exit(f"{config.device_batch_size} sequences do not fit")
    return run.run()


def baseline(settings: dict) -> dict:
    """karpathy/nanochat with its own optimizer, on token ids in memory: no loader."""
    sys.path.insert(0, settings["baseline"])
    from bench_gpu import baseline as build_baseline
    from nanochat.common import compute_init

    *_, world, device = compute_init("cuda")
    depth, config, warmup = settings["config"]["depth"], settings["config"], settings["warmup"]
    loss_of, optimizer, flops = build_baseline(depth, "SSSL", settings["attention"], False)
    size, length = config["device_batch_size"], config["max_seq_len"]
    steps = config["total_batch_size"] // (size * length * world)
    ids, first = torch.randint(0, 32768, (steps, size, length + 1), device=device), None
    for step in range(warmup + settings["steps"]):
        for micro_batch in ids:
            (loss_of(micro_batch[:, :-1].contiguous(), micro_batch[:, 1:].contiguous()) / steps).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step in (0, warmup - 1):
            torch.cuda.synchronize()
            first = first or time.time() - float(os.environ["BENCH_LAUNCHED"])
            start = time.perf_counter()
    torch.cuda.synchronize()
    speed = settings["steps"] * config["total_batch_size"] / (time.perf_counter() - start)
    name = torch.cuda.get_device_name()
    return {
        "tok_s": speed, "mfu": speed * flops / (world * (peak_flops(name) or float("nan"))), "first_step": first,
        "bytes": torch.cuda.max_memory_allocated(), "device": name,
    }  # fmt: skip


def launch(name: str, gpus: int, settings: dict, options, device: int | None = None) -> dict | None:
    """One run in processes of its own, on one device if it is given; its results, or None after printing why not."""
    words = [sys.executable]
    if gpus > 1 and settings["kind"] == "baseline":
        words += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(gpus)]
    elif gpus > 1:
        path = Path(settings["kind"])
        path = path if path.suffix else ROOT / "configs" / "accelerate" / f"{path}.yaml"
        words = [str(Path(sys.executable).parent / "accelerate"), "launch", "--config_file", str(path)]
        words += ["--num_processes", str(gpus), "--main_process_port", "0"]
    cache = Path(options.work).resolve() / "compiled"
    environment = {
        "OMP_NUM_THREADS": "1", **os.environ, "BENCH_LAUNCHED": str(time.time()), "BENCH_WARMUP": str(options.warmup),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"), "TRITON_CACHE_DIR": str(cache / "triton"),
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]), "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    environment |= {"ACCELERATE_USE_CPU": "true"} if options.cpu else {}
    name = f"{name}, {gpus}"
    if device is not None:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[device] if visible else str(device)
        settings, name = settings | {"output": f"{settings['output']}-{device}"}, f"{name} (number {device})"
    words += [__file__, "--one", json.dumps(settings)]
    try:
        done = subprocess.run(
            words, env=environment, capture_output=True, text=True, check=False, timeout=options.timeout
        )
    except subprocess.TimeoutExpired:
        print(f"{name}: no result after {options.timeout} s", file=sys.stderr)
        return None
    lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if done.returncode or not lines:
        full = "OutOfMemoryError" in done.stderr or "do not fit" in done.stderr
        print(f"{name}: " + ("out of memory" if full else f"failed:\n{done.stderr[-3000:]}"), file=sys.stderr)
        return None
    results = json.loads(lines[0].removeprefix(MARK))
    print(f"{name}: {results['tok_s']:,.0f} tok/s, {results['bytes'] / 2**30:.1f} GiB", file=sys.stderr)
    return results


def launch_on_each(name: str, devices: int, settings: dict, options) -> dict | None:
    """One-GPU runs on all GPUs at the same time, which differ by a percent or two: the mean and the slowest speed."""
    with ThreadPoolExecutor(devices) as pool:
        results = list(pool.map(lambda device: launch(name, 1, settings, options, device), range(devices)))
    if None in results:
        return None
    worst = {key: max(result[key] for result in results) for key in ("bytes", "first_step")}
    mean = {key: sum(result[key] or 0 for result in results) / devices for key in ("tok_s", "mfu")}
    return results[0] | worst | mean | {"slowest": min(result["tok_s"] for result in results)}


def prepare_text(options) -> tuple[str, str]:
    """Returns: (tokenizer, dataset), given or made of random words."""
    folder = Path(options.work) / ("tiny" if options.cpu else "text")
    if not options.tokenizer and not (folder / "tokenizer").exists():
        rng, letters = random.Random(0), "abcdefghijklmnopqrstuvwxyz"
        words = ["".join(rng.choices(letters, k=rng.randint(3, 9))) for _ in range(400 if options.cpu else 30_000)]
        texts = [" ".join(rng.choices(words, k=rng.randint(50, 1500))) for _ in range(200 if options.cpu else 2_000)]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        train_bpe(iter(texts), 512 if options.cpu else 32768).save_pretrained(folder / "tokenizer")
    return options.tokenizer or str(folder / "tokenizer"), options.dataset or str(folder / "text.jsonl")


def settings_for(options, kind: str, gpus: int, precision: str, depth: int, size: int, steps: int | None) -> dict:
    """The recipe's config with this depth, micro-batch size and number of micro-batches per step, for `launch`."""
    tokenizer, dataset = prepare_text(options)
    config = replace(recipe_of(options), depth=depth, **(TINY if options.cpu else {}))
    tokens = size * config.max_seq_len * gpus
    config = replace(
        config, dataset=dataset, device_batch_size=size, fp8=precision == "fp8", eval_every=0, core_metric_every=-1,
        total_batch_size=tokens * (steps or max(1, options.total_batch_size // tokens)), save_every=-1,
        num_iterations=options.warmup + options.steps + 1, max_loss_spike=0.0, report_to="none",
    )  # fmt: skip
    return {
        "kind": kind, "config": asdict(config), "tokenizer": tokenizer, "output": f"{options.work}/run",
        "baseline": options.baseline, "attention": options.attention, "warmup": options.warmup, "steps": options.steps,
    }  # fmt: skip


def recipe_of(options) -> PretrainConfig:
    return parse_config(PretrainConfig, find_recipe(options.recipe) / "base.yaml")


def measure_speeds(options, counts: list[int]) -> None:
    recipe = recipe_of(options)
    tokens = plan(recipe, 32768).total_tokens
    rows, single, size = [], {}, options.micro_batch_size
    kinds = [kind for kind in options.configs.split(",") if kind]  # --configs= for the baseline alone
    for precision in options.precisions:
        extra = ["baseline"] if options.baseline and precision == "bf16" else []
        for gpus in counts:
            for kind in (kinds if gpus > 1 else ["one GPU"][: len(kinds)]) + extra:
                depth = 2 if options.cpu else recipe.depth
                settings = settings_for(options, kind, gpus, precision, depth, size, options.grad_accum_steps)
                name = "karpathy/nanochat" if kind == "baseline" else f"{Path(kind).stem}, {precision}"
                if gpus == 1:
                    result = launch_on_each(name, counts[-1], settings, options)
                else:
                    result = launch(name, gpus, settings, options)
                if result is None:
                    continue
                each, hours, device = result["tok_s"] / gpus, tokens / result["tok_s"] / 3600, result["device"]
                mean, slowest = single.setdefault((kind == "baseline", precision), (each, result.get("slowest", each)))
                cost, memory = hours * gpus * options.gpu_hourly_rate, result["bytes"] / 2**30
                rows.append((
                    name, gpus, f"{result['tok_s']:,.0f}", f"{each:,.0f}", f"{each / mean:.1%}",
                    f"{each / slowest:.1%}", f"{result['mfu']:.1%}" if result["mfu"] else "-",
                    f"{memory:.1f}", f"{result['first_step']:.0f} s", f"{hours:.2f} h", f"${cost:,.0f}",
                ))  # fmt: skip
    if not rows:
        sys.exit("error: no run gave results")
    shape = "a tiny model" if options.cpu else f"{options.recipe}, {size} x {recipe.max_seq_len} per GPU"
    print(f"\n{device}: {shape}, {options.steps} steps after {options.warmup}, torch {torch.__version__}\n")
    print(grid(COLUMNS, rows))
    print(
        f"\nrecipe (projected, not run) = {tokens:,} tokens of {options.recipe} / tok/s; cost = GPUs x hours x "
        f"${options.gpu_hourly_rate:g}. Without evaluation, checkpoints and the other stages."
    )


def find_depths(options, counts: list[int]) -> None:
    """Each depth, upwards, until it no longer fits; micro-batch size 4 and one micro-batch per step."""
    rows, gpus = [], counts[-1]
    for kind in options.configs.split(",") if gpus > 1 else ["one GPU"]:
        for depth in options.depths:
            settings = settings_for(options, kind, gpus, "bf16", depth, 4, 1)
            result = launch(f"{kind}, d{depth}", gpus, settings, options)
            if result is None:
                break
            speed, memory, device = f"{result['tok_s']:,.0f}", f"{result['bytes'] / 2**30:.1f}", result["device"]
            rows.append((Path(kind).stem, gpus, f"d{depth}", f"{result['parameters'] / 1e9:.2f}B", memory, speed))
    if not rows:
        sys.exit("error: no depth fits")
    print(f"\n{device}: the largest depths that fit, 4 x {settings['config']['max_seq_len']} per GPU\n")
    print(grid(("config", "GPUs", "depth", "parameters", "GiB", "tok/s"), rows))


def main(options: argparse.Namespace) -> None:
    if options.one:
        settings = json.loads(options.one)
        results = (baseline if settings["kind"] == "baseline" else ours)(settings)
        if os.environ.get("RANK", "0") == "0":
            print(f"\n{MARK}{json.dumps(results)}", flush=True)
        return
    if options.cpu:
        options.micro_batch_size, options.precisions, options.baseline = 2, ["fp32"], None
        options.total_batch_size, options.gpus = 2 * 64 * 4, [1, 2]
    available = 2 if options.cpu else torch.cuda.device_count()
    if not (counts := sorted(n for n in options.gpus if n <= available)):
        fail(f"{available} GPUs here; --gpus {options.gpus} needs more (--cpu tries the script without one)")
    (find_depths if options.depths else measure_speeds)(options, counts)


if __name__ == "__main__":
    guarded(lambda: main(ARGUMENTS))
