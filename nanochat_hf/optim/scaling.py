"""Scaling rules: depth -> model config, horizon, batch size, learning rates and their schedule, all in this file.

    plan(PretrainConfig(depth=12), vocab_size=32768) -> Plan

What a recipe sets wins; everything else follows from its depth. `DEFAULTS` has both generations of karpathy/nanochat:
- 2 (2026), relative to d12 at 524,288 tokens per step. Horizon D = ratio x (matrix + head parameters). Batch size B
  ~ D^0.383, rounded to a power of two (arXiv:2505.13738). Learning rates ~ sqrt(B / B_ref), those of embeddings and
  head also ~ (d_model / 768)^-0.5. Muon's weight decay ~ sqrt(B / B_ref) x D_ref / D (arXiv:2405.13698).
- 1 (October 2025): 20 tokens per parameter, 524,288 tokens per step at every depth. Learning rates do not depend on
  the batch size; no weight decay; gradient clipping at norm 1.
FLOPs per token are counted as upstream does: 6 per parameter of a matmul. Attention adds 12 x heads x head_dim x (keys
visible to a query) per layer. Embedding lookups, norms and softmax are not counted.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch

from ..errors import InputError
from ..model.configuration_nanochat import NanoChatConfig
from ..model.modeling_nanochat import NanoChatForCausalLM
from .muon_adamw import role_of

REFERENCE_DEPTH = 12
REFERENCE_BATCH = 2**19  # tokens per step, the best at d12 (upstream)
REFERENCE_WIDTH = 768
MAX_STEPS = 10**9  # as for the keys of a recipe


class GPU(NamedTuple):
    """A device by its data sheet."""

    flops: float  # dense bf16, per second
    memory: float  # bytes
    watts: float  # of the board, at most
    capability: float = 9.0  # CUDA's compute capability


# By words of the device's name; longer names first. Compared with pages that quote the data sheets (2026-11-29); the
# A10G's FLOPs and watts and the RTX 3090's watts were not found. The GH200's watts include its CPU.
GPUS = {
    "H100 PCIe": GPU(756e12, 80e9, 350), "H100 NVL": GPU(835e12, 94e9, 400), "H100": GPU(989e12, 80e9, 700),
    "GH200": GPU(989e12, 96e9, 1000), "H200": GPU(989e12, 141e9, 700), "B200": GPU(2250e12, 180e9, 1000, 10.0),
    "B300": GPU(2250e12, 288e9, 1400, 10.3), "A100 40GB": GPU(312e12, 40e9, 400, 8.0),
    "A100": GPU(312e12, 80e9, 400, 8.0), "A10G": GPU(70e12, 24e9, 300, 8.6), "L40S": GPU(362e12, 48e9, 350, 8.9),
    "L4": GPU(121e12, 24e9, 72, 8.9), "RTX 3090": GPU(71e12, 24e9, 350, 8.6), "RTX 4090": GPU(165e12, 24e9, 450, 8.9),
    "RTX 5090": GPU(210e12, 32e9, 575, 12.0), "MI300X": GPU(1307e12, 192e9, 750, 0),
}  # fmt: skip
RATE = 3.0  # dollars per GPU-hour: assumed where no price is given
CPU_FLOPS = 5e10  # per second and core, roughly
PLAIN = " without the fast kernels"
MFU = {"bf16": 0.589, "bf16" + PLAIN: 0.518, "FP8": 0.722}  # of recipe d24 on one H200 (docs/costs.md)
# Bytes per parameter beside pretraining's estimate at the same tokens (docs/experiments/scaling.md): within 3 % of
# eight peaks of SFT, 6 % of eight of RL.
STAGE_BYTES = {"mid": 1.8, "sft": 1.8, "rl": 10.2}
NODE_EFFICIENCY = 0.9  # of more than 8 GPUs: assumed
FSDP2_EFFICIENCY = {"bf16": 0.97, "FP8": 0.92}  # beside replicated parameters (docs/parallelism.md)
MEASURED = {  # tokens per second in evals/RESULTS.md: (GPU, how many, depth, precision), rest as in d24
    ("H200", 1, 24, "bf16"): 119_843, ("H200", 1, 24, "FP8"): 148_423, ("H200", 2, 24, "bf16"): 242_903,
    ("H200", 2, 24, "FP8"): 299_263, ("H200", 4, 24, "bf16"): 488_677, ("H100", 1, 24, "bf16"): 119_693,
    ("H200", 1, 12, "bf16"): 664_495, ("H200", 1, 12, "FP8"): 724_752,
}  # fmt: skip


@dataclass(frozen=True)
class Schedule:
    """Learning rate, weight decay and Muon's momentum in a run of `num_iterations` steps, as functions of the step.

        schedule.apply(optimizer, plan.groups, step)     # before every optimizer step; schedule = plan(...).schedule

    The shape is karpathy/nanochat's: linear warmup, constant, linear decay (warmdown). It has no state, so a resumed
    run needs only its step.

    Args:
        warmup_steps: the learning rate rises linearly and reaches its peak at the last of these steps.
        warmdown_ratio: fraction of the steps, at the end, over which the learning rate decays linearly.
        final_lr_frac: fraction of the peak that the decay ends at (reached one step after the last).
        momentum: Muon's momentum at step 0, after `momentum_steps`, and at the end of the decay (linear between).
        momentum_steps: length of its warmup; where warmup and decay overlap, the warmup wins, as upstream.
    """

    num_iterations: int
    warmup_steps: int = 0
    warmdown_ratio: float = 0.0
    final_lr_frac: float = 0.0
    momentum: tuple[float, float, float] = (0.85, 0.97, 0.90)
    momentum_steps: int = 400

    def apply(self, optimizer: torch.optim.Optimizer, groups: Mapping[str, Mapping], step: int) -> None:
        """Set the options that `optimizer` uses in `step`; `groups`: {role: options at the peak}, `Plan.groups`."""
        for group in optimizer.param_groups:
            peak = groups[group["role"]]
            group["lr"] = peak["lr"] * self.lr(step)
            if group["kind"] == "muon":
                group["weight_decay"] = peak["weight_decay"] * self.weight_decay(step)
                group["momentum"] = self.muon_momentum(step)

    @property
    def warmdown_steps(self) -> int:
        return round(self.warmdown_ratio * self.num_iterations)

    def lr(self, step: int) -> float:
        """Fraction of the peak learning rate."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        left = self.num_iterations - step
        if left >= self.warmdown_steps:
            return 1.0
        fraction = max(left, 0) / self.warmdown_steps
        return fraction + (1 - fraction) * self.final_lr_frac

    def weight_decay(self, step: int) -> float:
        """Fraction of the planned weight decay: a cosine from 1 to 0 over the whole run."""
        return 0.5 * (1 + math.cos(math.pi * min(step / self.num_iterations, 1.0)))

    def muon_momentum(self, step: int) -> float:
        start, peak, end = self.momentum
        if step < self.momentum_steps:
            return start + (peak - start) * step / self.momentum_steps
        decay_steps = step - (self.num_iterations - self.warmdown_steps)
        if decay_steps <= 0:
            return peak
        return peak + (end - peak) * min(decay_steps / self.warmdown_steps, 1.0)


@dataclass(frozen=True)
class HyperparameterDefaults:
    """Defaults of a generation, at the reference depth and batch size; the recipe's fields of these names win."""

    target_param_data_ratio: float = 12
    embedding_lr: float = 0.3
    unembedding_lr: float = 0.008
    matrix_lr: float = 0.02
    scalar_lr: float = 0.5
    weight_decay: float = 0.28  # of Muon
    warmup_steps: int = 40
    warmdown_ratio: float = 0.65
    final_lr_frac: float = 0.05
    window_pattern: str = "SSSL"
    momentum: tuple[float, float, float] = (0.85, 0.97, 0.90)
    momentum_steps: int = 400
    max_grad_norm: float | None = None


DEFAULTS = {
    2: HyperparameterDefaults(),
    1: HyperparameterDefaults(
        target_param_data_ratio=20, embedding_lr=0.2, unembedding_lr=0.004, weight_decay=0.0, warmup_steps=0,
        warmdown_ratio=0.2, final_lr_frac=0.0, window_pattern="L", momentum=(0.85, 0.95, 0.95), momentum_steps=300,
        max_grad_norm=1.0,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What a pretraining run does. FLOPs are those of forward and backward pass."""

    model_config: NanoChatConfig  # without the ids of special tokens
    num_parameters: int
    num_matmul_parameters: int
    num_scaling_parameters: int  # N of scaling laws: generation 2 matrices and head, generation 1 all (as upstream)
    flops_per_token: int
    num_iterations: int
    total_batch_size: int  # tokens per step
    schedule: Schedule
    max_grad_norm: float | None
    groups: Mapping[str, Mapping]  # role -> options of its parameter group, at the peak learning rate

    @property
    def max_seq_len(self) -> int:
        return self.model_config.max_position_embeddings

    @property
    def total_tokens(self) -> int:
        return self.num_iterations * self.total_batch_size

    @property
    def total_flops(self) -> int:
        return self.flops_per_token * self.total_tokens

    def summary(self) -> dict:
        """The plan's numbers, for metrics.json."""
        names = ("num_parameters", "num_matmul_parameters", "flops_per_token", "total_tokens", "total_flops")
        names += ("num_iterations", "total_batch_size", "num_scaling_parameters")
        shape = {"generation": self.model_config.generation, "depth": self.model_config.num_hidden_layers}
        return shape | {name: getattr(self, name) for name in names}


def count_parameters(config: NanoChatConfig) -> tuple[Counter, int]:
    """Number of parameters by role (`muon_adamw.role_of`), and how many of them matmuls take."""
    with torch.device("meta"):
        parameters = dict(NanoChatForCausalLM(config).named_parameters())
    counts: Counter = Counter()
    for name, p in parameters.items():
        counts[role_of(name)] += p.numel()
    return counts, sum(p.numel() for name, p in parameters.items() if p.ndim == 2 and "embed" not in name)


def optimizer_groups(
    defaults: HyperparameterDefaults, generation: int, width: int, lr_scale: float = 1.0, decay_scale: float = 1.0
) -> dict[str, dict]:
    """Options of each parameter group of `MuonAdamW`: {role: {"kind", "lr", "weight_decay", ...}}.

    lr_scale: factor on all learning rates but the smear's, for the batch size. decay_scale: on Muon's weight decay.
    """
    wide = lr_scale * (width / REFERENCE_WIDTH) ** -0.5

    def adamw(lr, betas, weight_decay=0.0):
        if generation == 1:
            betas, weight_decay = (0.8, 0.95), 0.0
        return {"kind": "adamw", "lr": lr, "betas": betas, "eps": 1e-10, "weight_decay": weight_decay}

    return {
        "head": adamw(defaults.unembedding_lr * wide, (0.8, 0.96), 0.01),
        "embedding": adamw(defaults.embedding_lr * wide, (0.8, 0.995), 0.001),
        "value_embeds": adamw(0.5 * defaults.embedding_lr * wide, (0.8, 0.995), 0.01),
        "resid": adamw(0.01 * defaults.scalar_lr * lr_scale, (0.8, 0.95), 0.05),
        "x0": adamw(defaults.scalar_lr * lr_scale, (0.96, 0.95)),
        "smear": adamw(0.2, (0.8, 0.95)),
        "matrix": {
            "kind": "muon", "lr": defaults.matrix_lr * lr_scale, "weight_decay": defaults.weight_decay * decay_scale,
            "momentum": defaults.momentum[1], "beta2": 0.9,
        },
    }  # fmt: skip


def stage_groups(stage, model_config) -> dict[str, dict]:
    """Options per parameter role in a chat stage: the generation's defaults, or the recipe's, x init_lr_frac."""
    names = ("embedding_lr", "unembedding_lr", "matrix_lr", "scalar_lr", "weight_decay")
    recipe = {name: value for name in names if (value := getattr(stage, name)) is not None}
    generation = model_config.generation
    groups = optimizer_groups(replace(DEFAULTS[generation], **recipe), generation, model_config.hidden_size)
    groups = {role: {**group, "lr": group["lr"] * stage.init_lr_frac} for role, group in groups.items()}
    return {**groups, "lora": {**groups["head"], "lr": stage.lora_lr, "betas": (0.9, 0.99)}}


def plan(config, vocab_size: int) -> Plan:
    """Everything that follows from the depth; config: a `PretrainConfig`, or an object with its fields.

    Generation 2 pads embedding and head to a multiple of 64 rows. InputError for a batch or horizon no run can have.
    """
    given = {f.name: getattr(config, f.name, None) for f in fields(HyperparameterDefaults)}
    defaults = replace(DEFAULTS[config.generation], **{name: v for name, v in given.items() if v is not None})
    generation, max_seq_len = config.generation, config.max_seq_len
    padded = -(-vocab_size // 64) * 64 if generation == 2 else vocab_size

    def shape(depth: int) -> NanoChatConfig:
        heads = math.ceil(depth * config.aspect_ratio / config.head_dim)
        make = NanoChatConfig if generation == 2 else NanoChatConfig.first_generation
        return make(
            hidden_size=heads * config.head_dim, num_hidden_layers=depth, num_attention_heads=heads,
            head_dim=config.head_dim, vocab_size=padded, num_tokens=vocab_size if vocab_size != padded else None,
            max_position_embeddings=max_seq_len, window_pattern=defaults.window_pattern,
            final_logit_softcapping=config.final_logit_softcapping,
        )  # fmt: skip

    def scaled_by(counts: Counter) -> int:
        return counts["matrix"] + counts["head"] if generation == 2 else counts.total()

    try:
        model_config = shape(config.depth)
    except ValueError as error:  # of the model's own check
        raise InputError(f"depth, aspect_ratio and head_dim give no model: {error}") from None
    counts, matmul = count_parameters(model_config)
    size, width, window = scaled_by(counts), model_config.hidden_size, model_config.sliding_window
    growth = size / scaled_by(count_parameters(shape(REFERENCE_DEPTH))[0])  # D / D_ref: tokens per parameter cancel
    keys = [min(window - 1, max_seq_len) if "sliding" in k else max_seq_len for k in model_config.layer_types]
    flops = 6 * matmul + 12 * width * sum(keys)
    batch = config.total_batch_size
    if batch == -1:
        batch = 2 ** round(math.log2(REFERENCE_BATCH * growth**0.383)) if generation == 2 else REFERENCE_BATCH
    if batch < max_seq_len or batch % max_seq_len:
        raise InputError(f"total_batch_size is {batch}: it must be a multiple of max_seq_len, {max_seq_len} tokens")
    steps = horizon(config, defaults.target_param_data_ratio * size, flops, batch)
    lr_scale = (batch / REFERENCE_BATCH) ** 0.5 if generation == 2 else 1.0
    if config.num_iterations < 1 and (config.warmup_steps or 0) > steps:  # who names the steps may want a short trial
        raise InputError(f"warmup_steps is {config.warmup_steps}, and the horizon is {steps} steps: lower it")
    schedule = {f.name: getattr(defaults, f.name) for f in fields(Schedule) if f.name != "num_iterations"}
    return Plan(
        model_config, counts.total(), matmul, size, flops, steps, batch, Schedule(steps, **schedule),
        defaults.max_grad_norm, optimizer_groups(defaults, generation, width, lr_scale, lr_scale / growth),
    )  # fmt: skip


def for_budget(config, flops: float, vocab_size: int):
    """`config` for a run of `flops`. What it leaves open of batch size and warmup suits as few tokens as that may be.

    Batch size ~ D^0.383 by the run's own tokens; `plan` takes D from the depth, as upstream. Warmup of at most a tenth
    of the steps: a longer one makes small budgets look worse than they are (arXiv:2406.19146).
    """
    config, defaults = replace(config, num_iterations=-1, target_flops=flops), DEFAULTS[config.generation]
    open_horizon = replace(config, target_flops=-1, target_param_data_ratio=None, total_batch_size=-1)
    if config.total_batch_size == -1 and config.generation == 2:
        tokens = flops / plan(replace(open_horizon, num_iterations=1), vocab_size).flops_per_token
        growth = tokens / plan(replace(open_horizon, depth=REFERENCE_DEPTH), vocab_size).total_tokens
        config = replace(config, total_batch_size=2 ** round(math.log2(REFERENCE_BATCH * growth**0.383)))
    if config.warmup_steps is None:
        steps = plan(config, vocab_size).num_iterations
        config = replace(config, warmup_steps=min(defaults.warmup_steps, steps // 10))
    return config


def horizon(config, ratio_tokens: float, flops_per_token: int, batch: int) -> int:
    """Optimizer steps of a run: from num_iterations, else target_flops, else `ratio_tokens`."""
    if config.num_iterations > 0:
        steps = config.num_iterations
    elif config.target_flops > 0:
        steps = round(config.target_flops / (flops_per_token * batch))
    else:
        steps = int(ratio_tokens) // batch
    if not 1 <= steps <= MAX_STEPS:
        how = "shorter than one step" if steps < 1 else f"longer than {MAX_STEPS:,} steps"
        raise InputError(f"the horizon is {how} of {batch} tokens: change total_batch_size or the horizon")
    return steps


def find_gpu(device_name: str) -> str | None:
    """The key of GPUS for a device, or None."""
    return next((name for name in GPUS if re.search(rf"\bG?{name.replace(' ', '.*')}\b", device_name)), None)


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOPs per second of a device, the denominator of MFU; None for a device that the table lacks."""
    name = find_gpu(device_name)
    return name and GPUS[name].flops


def estimate_speed(plan: Plan, device: str, ranks: int, fp8: bool, sharded=False) -> tuple[float | None, str]:
    """Tokens per second of pretraining on `ranks` GPUs or CPU cores, and how that is known, or why it is not."""
    name, precision, config = find_gpu(device), "FP8" if fp8 else "bf16", plan.model_config
    if name is None:
        if device != "CPU":
            return None, f"no estimate for {device}"
        return ranks * CPU_FLOPS / plan.flops_per_token, "projected, roughly"
    depth, standard = config.num_hidden_layers, (config.generation, plan.max_seq_len, config.window_pattern)
    key = (name, ranks, depth, precision)
    if key in MEASURED and not sharded and standard == (2, 2048, "SSSL") and config.hidden_size == 64 * depth:
        return MEASURED[key], f"measured on {ranks} x {name} in {precision}"
    plain = "" if fp8 or has_kernels(name) else PLAIN
    mfu = MFU[precision + plain] * (FSDP2_EFFICIENCY[precision] if sharded else 1)
    mfu *= NODE_EFFICIENCY if ranks > 8 else 1
    source = f"projected in {precision} at an MFU of {mfu:.2f}, from d24 on one H200{plain}"
    return mfu * ranks * GPUS[name].flops / plan.flops_per_token, source


def estimate_micro_batch_size(plan: Plan, memory_bytes: float, bytes_per_value: int = 2, kernels: bool = True) -> int:
    """Largest power of two of sequences, from 1 to 64, whose `estimate_memory` a device has."""
    sizes = (64, 32, 16, 8, 4, 2)
    return next((size for size in sizes if estimate_memory(plan, size, bytes_per_value, kernels) <= memory_bytes), 1)


def has_kernels(device_name: str) -> bool:
    """Whether quack's matmuls run there, whose tiles are Hopper's: a bf16 step keeps as little as on an H200."""
    return (name := find_gpu(device_name)) is None or GPUS[name].capability == 9


def estimate_memory(plan: Plan, micro_batch_size: float, bytes_per_value: int = 2, kernels: bool = True) -> float:
    """Peak bytes of pretraining on one device, weights and optimizer state included.

    bfloat16: within 6 % of the peaks that d8 to d40 had on an H200, within 3 % of d12's and d24's without the kernels
    extra (docs/experiments/scaling.md). Bytes: 12 per value of embeddings, 22 of the head, 14 of matrices; 29 per
    token, layer and channel (42 without kernels); and the head's chunk of logits.
    float32, a guess. Bytes: 16 per parameter, 20 values per token, layer and channel, 4 copies of the logits.
    """
    config, tokens = plan.model_config, micro_batch_size * plan.max_seq_len
    channels = tokens * config.hidden_size * config.num_hidden_layers
    if bytes_per_value != 2:
        return 16 * plan.num_parameters + bytes_per_value * (20 * channels + 4 * tokens * config.vocab_size)
    counts, _ = count_parameters(config)
    weights = 12 * (counts["embedding"] + counts["value_embeds"]) + 22 * counts["head"] + 14 * counts["matrix"]
    return weights + (29 if kernels else 42) * channels + min(2**30, 2 * tokens * config.vocab_size) + 0.3e9


def split_global_batch(
    name: str, total: int, unit: int, requested: int, world: int, log: Callable = lambda text: None
) -> tuple[int, int]:
    """Returns: (micro-batch size, gradient accumulation steps) of a global batch on `world` ranks.

    The micro-batch size is the largest divisor of a rank's part up to `requested`: it changes speed, not the result.
    name, total: the config's key for the global batch size and its value, in units of which a sequence has `unit`.
    """
    per_rank, rest = divmod(total, unit * world)
    if rest or per_rank < 1:
        raise InputError(f"{name} = {total} must be a positive multiple of {unit * world}, for {world} ranks")
    size = max(size for size in range(1, min(requested, per_rank) + 1) if per_rank % size == 0)
    if size < requested:
        log(f"device_batch_size: {size} instead of {requested}, to divide {name} evenly")
    return size, per_rank // size
