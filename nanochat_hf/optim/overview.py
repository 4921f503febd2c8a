"""What a stage does, as a block of text: printed when it begins, and by `nanochat plan`, which starts nothing.

base_block(config, plan(config, 32768), Devices("NVIDIA H200", 8), batch=(16, 4))
pipeline_text(stages, configs, Devices("H200", 8))     # all stages of a recipe
"""

from typing import NamedTuple

from ..run import duration, short
from .scaling import (
    GPUS,
    Plan,
    estimate_micro_batch_size,
    estimate_speed,
    find_gpu,
    memory_needs,
    plan,
    split_global_batch,
    stage_groups,
)

RATE = 3.0  # dollars per GPU-hour
SHARES = {"matrix": "Muon", "embedding": "embedding", "head": "head", "x0": "scalars"}  # role -> word for its LR


class Devices(NamedTuple):
    """What trains: GPUs of one name, or "CPU"."""

    name: str
    ranks: int
    cores: int = 1  # of a CPU
    hourly_rate: float = RATE  # dollars, of one GPU
    sharding: str | None = None  # FSDP2, say; None: replicated parameters


def block(rows: dict[str, str | None]) -> str:
    """One indented line per row that has a text."""
    return "\n".join(f"  {name:<12} {text}" for name, text in rows.items() if text)


def stage_rows(config, model_config, parameters: int, groups: dict, data: str, steps: str, batch: str) -> dict:
    """The rows that all training stages have.

    Args:
        config: of the stage. groups: role -> options of its parameter group. batch: what `batch_text` returns.
    """
    heads, width = model_config.num_attention_heads, model_config.hidden_size
    shape = f"{model_config.num_hidden_layers} layers, width {width:,}, {heads} heads"
    rates = [f"{word} {groups[role]['lr']:.3g}" for role, word in SHARES.items()]
    optimizer = f"learning rates: {rates[0]}; AdamW: {', '.join(rates[1:])}"
    if lora := getattr(config, "lora_r", 0):
        optimizer = f"AdamW, learning rate {config.lora_lr:.3g}, on LoRA adapters of rank {lora}"
    every = f"every {config.save_every:,} steps" if config.save_every > 0 else "at the end, or when interrupted"
    return {
        "model": f"{shape}, {short(parameters)} parameters",
        "data": data,
        "steps": steps,
        "batch": batch,
        "optimizer": optimizer,
        "checkpoints": f"{every}; {config.keep_checkpoints} stay",
    }


def data_text(config) -> str:
    """The names of a stage's datasets."""
    parts = getattr(config, "mixture", None) or config.dataset
    return parts if isinstance(parts, str) else ", ".join(dict.fromkeys(part["dataset"] for part in parts))


def batch_text(ranks: int, size: int, grad_accum_steps: int) -> str:
    parts = f"ranks {ranks} x micro-batch {size} x accumulation {grad_accum_steps}"
    return f"{ranks * size * grad_accum_steps:,} sequences per step ({parts})"


def base_block(config, size: Plan, devices: Devices, batch: tuple[int, int], fp8: bool, more: dict) -> str:
    """The block of pretraining.

    Args:
        batch: micro-batch size and gradient accumulation steps. fp8: whether the blocks compute in FP8.
        more: further rows, before the estimates.
    """
    steps = f"{size.num_iterations:,} x {size.total_batch_size:,} tokens = {short(size.total_tokens)} tokens, "
    steps += f"{size.total_flops:.1e} FLOPs".replace("e+", "e")
    sequences = f"{batch_text(devices.ranks, *batch)}, of {size.max_seq_len:,} tokens each"
    rows = stage_rows(config, size.model_config, size.num_parameters, size.groups, data_text(config), steps, sequences)
    replicated = "replicated parameters, ZeRO-1-style sharded optimizer state" if devices.ranks > 1 else None
    sharding = {"sharding": devices.sharding or replicated}
    return block(rows | sharding | more | estimate_rows(size, devices, batch[0], fp8))


def estimate_rows(size: Plan, devices: Devices, micro_batch_size: int, fp8: bool) -> dict[str, str]:
    """Memory, time, cost and energy of pretraining, without evaluations; what is not known is left out."""
    name, units = find_gpu(devices.name), devices.ranks if devices.name != "CPU" else devices.cores
    rows, speed = {}, estimate_speed(size, devices.name, units, fp8, bool(devices.sharding))
    if name:
        fixed, per_sequence = memory_needs(size)
        needed = (fixed + micro_batch_size * per_sequence) / 1e9
        rows["memory"] = f"at most {needed:.0f} of {GPUS[name].memory / 1e9:.0f} GB per GPU, by a cautious estimate"
    if speed is None:
        return rows | {"time": f"no estimate for {devices.name}"}
    seconds = size.total_tokens / speed[0]
    rows["time"] = f"{duration(seconds)} at {short(round(speed[0]))} tok/s ({speed[1]}); evaluations not included"
    if name:
        hours = devices.ranks * seconds / 3600
        rows["cost"] = f"${hours * devices.hourly_rate:,.2f} at ${devices.hourly_rate:.2f} per GPU-hour"
        rows["energy"] = f"at most {hours * GPUS[name].watts / 1000:,.1f} kWh, the GPUs at {GPUS[name].watts:,.0f} W"
    return rows


def uses_fp8(fp8: bool | str, device_name: str) -> bool:
    """Whether a GPU of this name computes in FP8 by the key `fp8`; auto: from the H100 on."""
    name = find_gpu(device_name) or ""
    return fp8 is True or (fp8 == "auto" and name.startswith(("H100", "GH200", "H200", "B", "RTX 50")))


def stage_batch(config, ranks: int, length: int) -> tuple[int, int]:
    """Micro-batch size and gradient accumulation steps of a chat stage; InputError if its step cannot be divided."""
    name, total, unit = "examples_per_step", getattr(config, "examples_per_step", 0), 1
    if hasattr(config, "mixture"):
        name, total, unit = "total_batch_size", config.total_batch_size, length if config.packing else 1
    elif hasattr(config, "num_samples"):
        name, total = "examples_per_step x num_samples", total * config.num_samples
    if total < 0:
        return config.device_batch_size, 1
    return split_global_batch(name, total, unit, config.device_batch_size, ranks)


def pipeline_text(stages: list[str], configs: dict, devices: Devices) -> str:
    """The blocks of a recipe's stages. Raises InputError for a batch that these devices cannot divide."""
    base, size = configs["base"], plan(configs["base"], configs["tokenizer"].vocab_size)
    cuda = find_gpu(devices.name)
    requested, parts = base.device_batch_size, [f"{devices.ranks} x {devices.name}"]
    if requested == -1:
        requested = estimate_micro_batch_size(size, 0.95 * GPUS[cuda].memory if cuda else 8e9, 2 if cuda else 4)
    for stage in stages:
        config = configs.get(stage)
        if stage == "tokenizer":
            rows = {"data": data_text(config), "vocabulary": f"{config.vocab_size:,} tokens"}
            parts.append(f"{stage}\n{block(rows)}")
        elif stage == "base":
            fp8 = uses_fp8(base.fp8, devices.name)
            batch = split_global_batch(
                "total_batch_size", size.total_batch_size, size.max_seq_len, requested, devices.ranks
            )
            precision = ("bfloat16 with FP8 blocks" if fp8 else "bfloat16") if cuda else "float32"
            parts.append(f"{stage}\n{base_block(base, size, devices, batch, fp8, {'precision': precision})}")
        elif stage in ("mid", "sft", "rl"):
            length = getattr(config, "max_seq_len", -1)
            batch = stage_batch(config, devices.ranks, length if length > 0 else size.max_seq_len)
            steps = f"{config.num_iterations:,}" if config.num_iterations > 0 else f"{config.num_epochs:g} x the data"
            groups = stage_groups(config, size.model_config)
            text = batch_text(devices.ranks, *batch)
            rows = stage_rows(config, size.model_config, size.num_parameters, groups, data_text(config), steps, text)
            parts.append(f"{stage}\n{block(rows)}")
        elif stage == "eval":
            parts.append(f"{stage}\n{block({'tasks': ', '.join(config.tasks), 'CORE': config.core_bundle})}")
    return "\n\n".join(parts)
