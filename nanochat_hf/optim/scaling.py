"""The one dial: depth -> shape of the model, horizon, batch, rates, decay. Pure; nothing else computes from depth.

Why: a recipe names a depth and everything else follows, so that d4 and d32 are trained alike; what a recipe does set
wins. How: `plan(depth=12, vocab_size=32768)` -> `Plan`; the pretraining loop and the tests read its fields.

Both generations of karpathy/nanochat are here, as `DEFAULTS`:
- 2 (2026): reference d12 at 524,288 tokens a step. Horizon D = ratio x (matrix + head parameters); batch ~ D^0.383
  rounded to a power of two (arXiv:2505.13738); rates ~ sqrt(B / B_ref); AdamW rates of wide parameters
  ~ (d_model / 768)^-0.5; Muon's decay ~ sqrt(B / B_ref) x D_ref / D, which keeps the decay's horizon in epochs
  (arXiv:2405.13698).
- 1 (October 2025): 20 tokens per parameter of any kind, 524,288 tokens a step at every depth, rates that do not depend
  on the batch, no weight decay, gradients clipped at norm 1.
FLOPs are counted as upstream counts them, so that MFU figures compare: 6 per parameter of a matrix product, and
12 x heads x head_dim x (keys that a query may see) per layer; lookups, norms and the softmax count nothing.
"""

import math
from dataclasses import dataclass, replace
from types import MappingProxyType

from ..errors import InputError
from .schedule import Schedule

REFERENCE_DEPTH = 12
REFERENCE_BATCH = 2**19  # tokens a step, measured to be best at d12 (upstream)
REFERENCE_WIDTH = 768
SMEAR_CHANNELS, VALUE_CHANNELS = 24, 12  # inputs of the smear's and of the value embeddings' gates
PEAK_FLOPS = {  # dense bf16 per second, by a part of the device's name; longer names first
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "B300": 2250e12,
    "A100": 312e12,
    "A10G": 70e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 3090": 71e12,
    "RTX 4090": 165e12,
    "RTX 5090": 210e12,
    "MI300X": 1307e12,
}


@dataclass(frozen=True)
class HyperparameterDefaults:
    """What a generation recommends; `plan` takes any of these fields to override it. Rates are at the reference."""

    target_param_data_ratio: float = 12  # tokens per scaling parameter
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
        target_param_data_ratio=20,
        embedding_lr=0.2,
        unembedding_lr=0.004,
        weight_decay=0.0,
        warmup_steps=0,
        warmdown_ratio=0.2,
        final_lr_frac=0.0,
        window_pattern="L",
        momentum=(0.85, 0.95, 0.95),
        momentum_steps=300,
        max_grad_norm=1.0,
    ),
}


@dataclass(frozen=True)
class Plan:
    """All that follows from the dial. Token counts are per run, FLOPs are forward and backward."""

    generation: int
    depth: int
    hidden_size: int
    num_heads: int
    head_dim: int
    vocab_size: int  # rows of embedding and head
    num_tokens: int  # the tokenizer's size
    max_seq_len: int
    window_pattern: str
    parameters: MappingProxyType  # role -> count
    num_matmul_parameters: int
    flops_per_token: int
    num_iterations: int
    total_batch_size: int  # tokens a step
    schedule: Schedule
    max_grad_norm: float | None
    groups: MappingProxyType  # role -> options of its optimizer group, see `optimizer_groups`

    @property
    def num_parameters(self) -> int:
        return sum(self.parameters.values())

    @property
    def total_tokens(self) -> int:
        return self.num_iterations * self.total_batch_size

    @property
    def total_flops(self) -> int:
        return self.flops_per_token * self.total_tokens

    def model_fields(self) -> dict:
        """Fields of NanoChatConfig (or of its `first_generation`)."""
        return {
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.depth,
            "num_attention_heads": self.num_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab_size,
            "num_tokens": self.num_tokens if self.num_tokens != self.vocab_size else None,
            "max_position_embeddings": self.max_seq_len,
            "window_pattern": self.window_pattern,
        }


def count_parameters(generation: int, depth: int, width: int, heads: int, vocab: int) -> dict[str, int]:
    """-> {role: number of parameters}, roles as in `optim.param_groups`; heads x head_dim is the width."""
    second = generation == 2
    gated = -(-depth // 2) if second else 0  # layers with a value embedding: every other one, the last included
    counts = {
        "embedding": vocab * width,
        "head": vocab * width,
        "matrix": 12 * depth * width**2 + gated * heads * VALUE_CHANNELS,
        "value_embeds": gated * vocab * width,
        "resid": depth if second else 0,
        "x0": depth if second else 0,
        "smear": SMEAR_CHANNELS + 2 if second else 0,  # gate, its strength, the backout's strength
    }
    return {role: count for role, count in counts.items() if count}


def visible_keys(depth: int, pattern: str, seq_len: int) -> list[int]:
    """Keys that count for a query's FLOPs in each layer: S sees a quarter, rounded up to 128; the last layer all."""
    short = min(math.ceil(seq_len / 4 / 128) * 128, seq_len)
    return [short if pattern[i % len(pattern)] == "S" and i < depth - 1 else seq_len for i in range(depth)]


def optimizer_groups(
    recipe: HyperparameterDefaults, generation: int, width: int, batch_scale: float = 1.0, decay_scale: float = 1.0
):
    """-> {role: {"kind", "lr", "weight_decay", ...}}, the options of each group of `optim.MuonAdamW`.

    Args:
        batch_scale: factor on all rates but the smear's, for the batch size.
        decay_scale: factor on Muon's weight decay.
    """
    wide = batch_scale * (width / REFERENCE_WIDTH) ** -0.5

    def adamw(lr, betas, weight_decay=0.0):
        if generation == 1:
            betas, weight_decay = (0.8, 0.95), 0.0
        return {"kind": "adamw", "lr": lr, "betas": betas, "eps": 1e-10, "weight_decay": weight_decay}

    return {
        "head": adamw(recipe.unembedding_lr * wide, (0.8, 0.96), 0.01),
        "embedding": adamw(recipe.embedding_lr * wide, (0.8, 0.995), 0.001),
        "value_embeds": adamw(0.5 * recipe.embedding_lr * wide, (0.8, 0.995), 0.01),
        "resid": adamw(0.01 * recipe.scalar_lr * batch_scale, (0.8, 0.95), 0.05),
        "x0": adamw(recipe.scalar_lr * batch_scale, (0.96, 0.95)),
        "smear": adamw(0.2, (0.8, 0.95)),
        "matrix": {
            "kind": "muon",
            "lr": recipe.matrix_lr * batch_scale,
            "weight_decay": recipe.weight_decay * decay_scale,
            "momentum": recipe.momentum[1],
            "beta2": 0.9,
        },
    }


def plan(
    depth: int,
    vocab_size: int,
    generation: int = 2,
    aspect_ratio: int = 64,
    head_dim: int = 128,
    max_seq_len: int = 2048,
    num_iterations: int = -1,
    target_flops: float = -1,
    total_batch_size: int = -1,
    **overrides,
) -> Plan:
    """Everything that follows from `depth`.

    Args:
        vocab_size: the tokenizer's size; generation 2 pads the matrices to a multiple of 64.
        aspect_ratio: width = depth x aspect_ratio, rounded up to whole heads of `head_dim`.
        num_iterations, target_flops: the horizon; -1 leaves it to the next of them, then to the ratio.
        total_batch_size: tokens a step; -1 computes it.
        overrides: fields of `HyperparameterDefaults`; None means the generation's own value.

    Raises:
        InputError: a value that no run can have.
    """
    if generation not in DEFAULTS:
        raise InputError(f"generation is {generation}: choose 1 (October 2025) or 2 (2026)")
    for name, value in (("depth", depth), ("aspect_ratio", aspect_ratio), ("max_seq_len", max_seq_len)):
        if value < 1:
            raise InputError(f"{name} is {value}: it must be at least 1")
    if head_dim < 2 or head_dim % 2:
        raise InputError(f"head_dim is {head_dim}: it must be even, RoPE turns pairs of channels")
    recipe = replace(DEFAULTS[generation], **{key: value for key, value in overrides.items() if value is not None})
    if not recipe.window_pattern or set(recipe.window_pattern) - set("SL"):
        raise InputError(f"window_pattern is {recipe.window_pattern!r}: write a word of S (window) and L (all)")
    padded = -(-vocab_size // 64) * 64 if generation == 2 else vocab_size

    def shape(layers: int) -> tuple[int, dict[str, int]]:
        heads = -(-layers * aspect_ratio // head_dim)
        return heads, count_parameters(generation, layers, heads * head_dim, heads, padded)

    def scaling_parameters(counts: dict[str, int]) -> int:
        return counts["matrix"] + counts["head"] if generation == 2 else sum(counts.values())

    heads, counts = shape(depth)
    width = heads * head_dim
    size = scaling_parameters(counts)
    growth = size / scaling_parameters(shape(REFERENCE_DEPTH)[1])  # D / D_ref: the ratio of tokens cancels
    batch = total_batch_size
    if batch == -1:
        batch = 2 ** round(math.log2(REFERENCE_BATCH * growth**0.383)) if generation == 2 else REFERENCE_BATCH
    if batch < max_seq_len or batch % max_seq_len:
        raise InputError(f"total_batch_size is {batch}: it must be a multiple of max_seq_len, {max_seq_len} tokens")

    matmul = counts["matrix"] + counts["head"] + (SMEAR_CHANNELS if generation == 2 else 0)
    keys = visible_keys(depth, recipe.window_pattern, max_seq_len)
    flops = 6 * matmul + 12 * width * sum(keys)
    if num_iterations == 0:
        raise InputError("num_iterations is 0, which trains nothing: give a number of steps, or -1")
    if num_iterations > 0:
        steps = num_iterations
    elif target_flops > 0:
        steps = round(target_flops / (flops * batch))
    elif recipe.target_param_data_ratio > 0:
        steps = int(recipe.target_param_data_ratio * size) // batch
    else:
        raise InputError("no horizon: set num_iterations, target_flops or target_param_data_ratio")
    if steps < 1:
        raise InputError(f"the horizon is shorter than one step of {batch} tokens: lower total_batch_size")

    batch_scale = (batch / REFERENCE_BATCH) ** 0.5 if generation == 2 else 1.0
    groups = optimizer_groups(recipe, generation, width, batch_scale, batch_scale / growth)
    return Plan(
        generation=generation,
        depth=depth,
        hidden_size=width,
        num_heads=heads,
        head_dim=head_dim,
        vocab_size=padded,
        num_tokens=vocab_size,
        max_seq_len=max_seq_len,
        window_pattern=recipe.window_pattern,
        parameters=MappingProxyType(counts),
        num_matmul_parameters=matmul,
        flops_per_token=flops,
        num_iterations=steps,
        total_batch_size=batch,
        schedule=Schedule(
            num_iterations=steps,
            warmup_steps=recipe.warmup_steps,
            warmdown_ratio=recipe.warmdown_ratio,
            final_lr_frac=recipe.final_lr_frac,
            momentum=recipe.momentum,
            momentum_steps=recipe.momentum_steps,
        ),
        max_grad_norm=recipe.max_grad_norm,
        groups=MappingProxyType(groups),
    )


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOPs per second of a device, the denominator of MFU; None for a device that the table lacks."""
    return next((flops for name, flops in PEAK_FLOPS.items() if name in device_name), None)


def estimate_micro_batch_size(plan: Plan, free_bytes: float, bytes_per_value: int = 2, most: int = 64) -> int:
    """Largest power of two of rows that a device has the memory to take at once, at least 1.

    An estimate on the careful side: 16 bytes a parameter (weight, gradient, optimizer state), 20 values a layer and
    channel for what the backward pass needs; in bf16 3 GB for the head's chunks and workspaces, in float32, where the
    head is not chunked, 4 copies of the logits.
    """
    head, workspace = (0, 3e9) if bytes_per_value == 2 else (4 * bytes_per_value * plan.vocab_size, 0)
    row = plan.max_seq_len * (plan.hidden_size * plan.depth * 20 * bytes_per_value + head)
    room = (free_bytes - 16 * plan.num_parameters - workspace) / row
    return 2 ** int(math.log2(min(max(room, 1), most)))
