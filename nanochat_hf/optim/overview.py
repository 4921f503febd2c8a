"""What a stage does, as a block of text: printed when it begins, and by `nanochat plan`, which starts nothing."""

import os
import textwrap
from collections.abc import Callable
from typing import NamedTuple

import torch

from ..errors import InputError
from ..run import duration, nearest, short
from . import scaling
from .scaling import GPUS, Plan, estimate_memory, find_gpu, split_global_batch

SHORTEST_STEP = 0.01  # seconds; in shorter ones starting the kernels takes longer than what an MFU says
LEARNING_RATES = {"matrix": "", "embedding": " (embedding)", "head": " (head)", "x0": " (scalars)"}  # by role
TOTALS = ("model", "steps", "time", "cost", "energy", "memory")  # rows that a plan begins with


class Devices(NamedTuple):
    """What trains: GPUs of one name, or "CPU"."""

    name: str
    ranks: int
    hourly_rate: float | None = None  # dollars, of a node of up to 8 GPUs
    sharding: str | None = None  # FSDP2, say; None: replicated parameters


def gpu_here() -> str | None:
    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None


def uses_fp8(config, gpu: str | None) -> bool:
    """Whether pretraining computes in FP8 on a GPU of this name; False on a CPU."""
    name, least = find_gpu(gpu or ""), {True: 8.9, "auto": 9.0}
    return config.fp8 in least and bool(name) and GPUS[name].capability >= least[config.fp8]


def block(rows: dict[str, str | None]) -> str:
    """One indented line per row that has a text, in lines of at most 100 characters."""
    lines = [f"  {name:<12} {text}" for name, text in rows.items() if text]
    return "\n".join(textwrap.fill(line, 100, subsequent_indent=" " * 15, break_on_hyphens=False) for line in lines)


def stage_rows(config, model_config, parameters: int, groups: dict, data: str, steps: str, batch: str) -> dict:
    """The rows that all training stages have; `groups`: role -> options of its group, `batch`: `batch_text`."""
    heads, width = model_config.num_attention_heads, model_config.hidden_size
    shape = f"{model_config.num_hidden_layers} layers, width {width:,}, {heads} heads"
    muon, *adamw = (f"{groups[role]['lr']:.3g}{word}" for role, word in LEARNING_RATES.items())
    optimizer = f"Muon, learning rate {muon}; AdamW, {', '.join(adamw)}"
    if lora := getattr(config, "lora_r", 0):
        optimizer = f"AdamW, learning rate {config.lora_lr:.3g}, on LoRA adapters of rank {lora}"
    every = f"every {config.save_every:,} steps" if config.save_every > 0 else "at the end, or when interrupted"
    return {
        "model": f"{short(parameters)} parameters: {shape}", "data": data, "steps": steps, "batch": batch,
        "optimizer": optimizer, "checkpoints": f"{every}; the last {config.keep_checkpoints} are kept",
    }  # fmt: skip


def data_text(config) -> str | None:
    """The names of a stage's datasets; None for an evaluation without."""
    parts = getattr(config, "mixture", None) or config.dataset
    return ", ".join(dict.fromkeys(part["dataset"] for part in parts)) if isinstance(parts, list) else parts


def batch_text(ranks: int, size: int, grad_accum_steps: int) -> str:
    parts = f"ranks {ranks} x micro-batch {size} x accumulation {grad_accum_steps}"
    return f"{ranks * size * grad_accum_steps:,} sequences per step ({parts})"


def base_rows(config, size: Plan, devices: Devices, batch: tuple[int, int], fp8: bool, more: dict) -> dict:
    """The rows of pretraining, `more` before the estimates; batch: micro-batch size and accumulation steps."""
    steps = f"{short(size.total_tokens)} tokens: {size.num_iterations:,} steps x {size.total_batch_size:,} tokens, "
    steps += f"{size.total_flops:.1e} FLOPs".replace("e+", "e")
    sequences = f"{batch_text(devices.ranks, *batch)}, {size.max_seq_len:,} tokens each"
    rows = stage_rows(config, size.model_config, size.num_parameters, size.groups, data_text(config), steps, sequences)
    replicated = "replicated parameters, ZeRO-1-style sharded optimizer state" if devices.ranks > 1 else None
    sharding = {"sharding": devices.sharding or replicated}
    return rows | sharding | more | estimate_rows(size, devices, batch[0], fp8)


def estimate_rows(size: Plan, devices: Devices, micro_batch_size: int, fp8: bool) -> dict[str, str]:
    """Memory, time, cost and energy of pretraining, without evaluations; what is not known is left out."""
    name, ranks, rows = find_gpu(devices.name), devices.ranks, {}
    units = ranks if name else os.cpu_count() or 1
    speed, source = scaling.estimate_speed(size, devices.name, units, fp8, bool(devices.sharding))
    if speed is None:
        return {"time": source}
    if name:
        needed = estimate_memory(size, micro_batch_size, kernels=fp8 or scaling.has_kernels(name))
        rows["memory"] = memory_text(needed, devices, "base", micro_batch_size)
        if size.total_batch_size < SHORTEST_STEP * speed:
            small = f"such small steps ({size.total_batch_size:,} tokens) leave GPUs idle"
            return rows | {"time": f"not known, nor is the cost: {small}"}
    seconds = size.total_tokens / speed
    rows["time"] = f"{duration(seconds)} at {short(round(speed))} tok/s ({source}); without evaluations"
    if name:
        gpu, hours = GPUS[name], seconds / 3600
        rate = scaling.RATE * ranks if devices.hourly_rate is None else devices.hourly_rate * -(-ranks // 8)
        rows["cost"] = f"${hours * rate:,.2f} at ${rate:,.2f} per hour"
        rows["energy"] = f"at most {hours * ranks * gpu.watts / 1000:,.1f} kWh: GPUs of {gpu.watts:,.0f} W"
    return rows


def memory_text(needed: float, devices: Devices, stage: str, micro_batch_size: int) -> str:
    """`needed` bytes beside what a GPU has, and what to lower where that is too little."""
    has, more = GPUS[find_gpu(devices.name)].memory, ", without sharding" if devices.sharding else ""
    if needed > has and not more:
        key = f"{stage}.device_batch_size" if micro_batch_size > 1 else "base.depth"
        more = f": too much, lower {key}"
    size = f"about {needed / 1e9:.{int(needed < 1e10)}f}" if needed > 1e9 else "less than 1"
    return f"{size} of {has / 1e9:.0f} GB per GPU{more}"


def stage_batch(config, ranks: int, length=1, log: Callable = lambda text: None, prefix="") -> tuple[int, int]:
    """Micro-batch size and gradient accumulation steps of a chat stage; InputError if its step cannot be divided.

    length: of a packed sequence in tokens, in which the recipe counts such a step; prefix: before its key.
    """
    name, total, unit = "examples_per_step", getattr(config, "examples_per_step", 0), 1
    if hasattr(config, "mixture"):
        name, total, unit = "total_batch_size", config.total_batch_size, length if config.packing else 1
    elif hasattr(config, "num_samples"):
        name, total = "examples_per_step x num_samples", total * config.num_samples
    if total < 0:
        return config.device_batch_size, 1
    return split_global_batch(prefix + name, total, unit, config.device_batch_size, ranks, log)


def pipeline_text(stages: list[str], configs: dict, devices: Devices) -> str:
    """Totals of pretraining, and a block per stage. InputError for an unknown GPU or a batch of another size."""
    base, ranks, cuda = configs["base"], devices.ranks, find_gpu(devices.name)
    if not cuda and devices.name not in ("CPU", gpu_here()):
        raise InputError(f"--gpu: no data sheet of {devices.name!r}; {nearest(devices.name, [*GPUS, 'CPU'])}")
    fp8 = uses_fp8(base, cuda)
    if base.fp8 is True and not fp8 and (cuda or devices.name == "CPU"):
        raise InputError(f"base.fp8 is true: {devices.name} has no FP8; leave it out, or say base.fp8=auto")
    kernels = scaling.has_kernels(devices.name)
    size, parts = scaling.plan(base, configs["tokenizer"].vocab_size), []
    for stage in (name for name in stages if name != "report"):
        config = configs[stage]
        rows = {"data": data_text(config)}
        if stage == "tokenizer":
            rows["vocabulary"] = f"{config.vocab_size:,} tokens"
        elif stage == "eval":
            rows["tasks"] = ", ".join([*config.tasks, *["CORE"] * bool(config.core_bundle)])
        elif stage == "base":
            requested, total = base.device_batch_size, size.total_batch_size
            if requested == -1:
                memory = 0.95 * GPUS[cuda].memory if cuda else 8e9
                requested = scaling.estimate_micro_batch_size(size, memory, 2 if cuda else 4, fp8 or kernels)
            batch = split_global_batch("base.total_batch_size", total, size.max_seq_len, requested, ranks)
            precision = ("bfloat16 with FP8" if fp8 else "bfloat16") if cuda else "float32"
            rows = base_rows(base, size, devices, batch, fp8, {"precision": precision})
            totals = {name: rows.pop(name) for name in TOTALS if name in rows}
            parts.insert(0, f"pretraining on {f'{ranks} x {devices.name}' if cuda else devices.name}\n{block(totals)}")
        else:
            length = getattr(config, "max_seq_len", -1)
            length = length if length > 0 else size.max_seq_len
            batch = stage_batch(config, ranks, length, prefix=f"{stage}.")
            steps = f"{config.num_iterations:,}" if config.num_iterations > 0 else f"{config.num_epochs:g} x the data"
            groups = scaling.stage_groups(config, size.model_config)
            shape = size.model_config, size.num_parameters
            rows = stage_rows(config, *shape, groups, data_text(config), steps, batch_text(ranks, *batch))
            del rows["model"]
            if cuda and stage in scaling.STAGE_BYTES and not config.lora_r:
                trained = 2 * config.max_new_tokens if stage == "rl" else length  # a prompt as long as its completion
                needed = estimate_memory(size, batch[0] * trained / size.max_seq_len, kernels=kernels)
                needed += scaling.STAGE_BYTES[stage] * size.num_parameters
                rows["memory"] = memory_text(needed, devices, stage, batch[0])
        parts.append(f"{stage}\n{block(rows)}")
    return "\n\n".join(parts)
