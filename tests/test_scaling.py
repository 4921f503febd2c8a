"""Scaling rules and schedules: tables of plans, agreement with the real model, hand-computed points of each curve."""

import itertools
import re

import pytest
import torch
from torch import nn

from nanochat_hf.errors import InputError
from nanochat_hf.model.modeling_nanochat import NanoChatForCausalLM
from nanochat_hf.optim import scaling
from nanochat_hf.optim.overview import Devices, pipeline_text, stage_batch
from nanochat_hf.optim.scaling import DEFAULTS, Schedule, estimate_memory, estimate_micro_batch_size, peak_flops, plan
from nanochat_hf.stage_configs import ChatConfig, PretrainConfig, RLConfig, TokenizerConfig

# depth: width, heads, parameters, FLOPs per token, tokens per step, steps, learning rates of Muon, embedding and
# head, weight decay of Muon; vocabulary 32,768, 2,048 tokens per sequence
SECOND = {
    4: (256, 2, 36_700_242, 80_216_496, 262_144, 528, 0.01414, 0.36742, 0.009798, 1.88990),
    8: (512, 4, 125_829_354, 295_699_728, 262_144, 1_920, 0.01414, 0.25981, 0.006928, 0.51972),
    12: (768, 6, 286_261_730, 759_696_048, 524_288, 2_520, 0.02000, 0.30000, 0.008000, 0.28000),
    16: (1024, 8, 536_871_738, 1_585_451_664, 524_288, 5_376, 0.02000, 0.25981, 0.006928, 0.13125),
    18: (1152, 9, 701_891_594, 2_179_995_480, 1_048_576, 3_712, 0.02828, 0.34641, 0.009238, 0.13439),
    20: (1280, 10, 896_533_746, 2_886_212_784, 1_048_576, 4_980, 0.02828, 0.32863, 0.008764, 0.10019),
    24: (1536, 12, 1_384_122_122, 4_775_225_616, 1_048_576, 8_352, 0.02828, 0.30000, 0.008000, 0.05974),
    26: (1664, 13, 1_681_786_938, 5_991_051_288, 1_048_576, 10_510, 0.02828, 0.28823, 0.007686, 0.04747),
    32: (2048, 16, 2_818_575_450, 10_770_991_248, 2_097_152, 9_600, 0.04000, 0.36742, 0.009798, 0.03675),
}
# October 2025, vocabulary 65,536: the published runs
FIRST = {20: (560_988_160, 21_400), 26: (1_081_999_360, 41_275), 32: (1_879_048_192, 71_680)}


def planned(depth=12, vocab_size=32768, **values):
    return plan(PretrainConfig(depth=depth, **values), vocab_size)


@pytest.mark.parametrize("depth", SECOND)
def test_second_generation_follows_the_table(depth):
    p = planned(depth)
    shape = p.model_config.hidden_size, p.model_config.num_attention_heads
    assert (*shape, p.num_parameters, p.flops_per_token, p.total_batch_size, p.num_iterations) == SECOND[depth][:6]
    rates = [p.groups[role]["lr"] for role in ("matrix", "embedding", "head")]
    assert [*rates, p.groups["matrix"]["weight_decay"]] == pytest.approx(SECOND[depth][6:], abs=6e-6)


@pytest.mark.parametrize("depth", FIRST)
def test_first_generation_follows_the_published_runs(depth):
    p = planned(depth, 65536, generation=1)
    assert (p.num_parameters, p.num_iterations, p.total_batch_size) == (*FIRST[depth], 524_288)
    assert p.max_grad_norm == 1.0 and p.schedule.warmup_steps == 0 and p.groups["matrix"]["weight_decay"] == 0
    assert p.groups["embedding"]["lr"] == pytest.approx(0.2 * (64 * depth / 768) ** -0.5)
    assert p.groups["embedding"]["betas"] == (0.8, 0.95)
    assert not any(group["weight_decay"] for group in p.groups.values())


# role: learning rate, betas and weight decay of AdamW at the reference, and powers of its rate of batch and width
ADAMW = {
    "head": (0.008, (0.8, 0.96), 0.01, 0.5, -0.5), "embedding": (0.3, (0.8, 0.995), 0.001, 0.5, -0.5),
    "value_embeds": (0.15, (0.8, 0.995), 0.01, 0.5, -0.5), "resid": (0.005, (0.8, 0.95), 0.05, 0.5, 0),
    "x0": (0.5, (0.96, 0.95), 0.0, 0.5, 0), "smear": (0.2, (0.8, 0.95), 0.0, 0, 0),
}  # fmt: skip


@pytest.mark.parametrize("generation", [1, 2])
@pytest.mark.parametrize("depth", [12, 24])
def test_the_groups_have_the_options_of_their_generation_scaled_from_the_reference(depth, generation):
    """d24 has twice the width, and in generation 2 twice the batch."""
    groups, wide, batch = planned(depth, generation=generation).groups, depth / 12, (depth / 12) ** (generation - 1)
    own = {"head": 0.004, "embedding": 0.2, "value_embeds": 0.1} if generation == 1 else {}
    for role, (rate, betas, decay, of_batch, of_width) in ADAMW.items():
        betas, decay = ((0.8, 0.95), 0.0) if generation == 1 else (betas, decay)
        rate = own.get(role, rate) * batch**of_batch * wide**of_width
        options = {"kind": "adamw", "lr": pytest.approx(rate), "betas": betas, "eps": 1e-10, "weight_decay": decay}
        assert groups[role] == options, role
    matrix = {"kind": "muon", "lr": pytest.approx(0.02 * batch**0.5), "momentum": 0.97 if generation == 2 else 0.95}
    decay = SECOND[depth][-1] if generation == 2 else 0
    assert groups["matrix"] == matrix | {"beta2": 0.9, "weight_decay": pytest.approx(decay, abs=6e-6)}
    assert len(groups) == len(ADAMW) + 1


def test_a_chat_stage_has_the_defaults_or_its_own_rates_times_one_factor():
    model = planned().model_config
    groups = scaling.stage_groups(ChatConfig(init_lr_frac=0.5, matrix_lr=0.1, scalar_lr=0.0, weight_decay=0.3), model)
    assert groups["matrix"]["lr"] == 0.05 and groups["matrix"]["weight_decay"] == 0.3 and groups["x0"]["lr"] == 0
    rates = [groups[role]["lr"] for role in ("embedding", "head", "lora")]
    assert rates == pytest.approx([0.15, 0.004, 0.001]) and groups["lora"]["betas"] == (0.9, 0.99)
    assert (
        groups["lora"]["kind"] == "adamw" and scaling.stage_groups(ChatConfig(), model)["matrix"]["weight_decay"] == 0
    )


# device, how many, FP8, sharded, keys of the recipe -> MFU x efficiencies that multiply its peak, or measured tokens/s
SPEEDS = [
    ("H100", 8, False, False, {}, 0.589), ("H100", 9, False, False, {}, 0.589 * 0.9),
    ("A100", 1, False, False, {}, 0.518), ("B200", 2, False, True, {}, 0.518 * 0.97),
    ("B200", 1, True, False, {}, 0.722),
    ("H100", 8, True, False, {}, 0.722), ("H100", 8, False, True, {}, 0.589 * 0.97),
    ("H200", 16, True, True, {}, 0.722 * 0.9 * 0.92),
    ("H200", 1, False, False, {}, 119_843), ("H200", 2, True, False, {}, 299_263),
    ("H200", 1, False, True, {}, 0.589 * 0.97), ("H200", 1, False, False, {"generation": 1}, 0.589),
    ("H200", 1, False, False, {"aspect_ratio": 128}, 0.589), ("H200", 1, False, False, {"window_pattern": "L"}, 0.589),
    ("H200", 1, False, False, {"max_seq_len": 1024}, 0.589), ("H200", 1, False, False, {"depth": 12}, 664_495),
]  # fmt: skip


@pytest.mark.parametrize("gpu, ranks, fp8, sharded, keys, expected", SPEEDS)
def test_a_speed_is_measured_or_the_mfu_of_d24_times_the_peak(gpu, ranks, fp8, sharded, keys, expected):
    size = planned(**{"depth": 24} | keys)
    speed, source = scaling.estimate_speed(size, f"NVIDIA {gpu}", ranks, fp8, sharded)
    if expected < 1:
        expected, shown = (
            expected * ranks * peak_flops(gpu) / size.flops_per_token,
            f"at an MFU of {expected:.2f}, from d24 on one H200"
            + scaling.PLAIN * (gpu in ("A100", "B200") and not fp8),
        )
    else:
        shown = f"measured on {ranks} x {gpu} in {'FP8' if fp8 else 'bf16'}"
    assert speed == pytest.approx(expected) and shown in source
    assert scaling.estimate_speed(size, "Abacus", 1, False) == (None, "no estimate for Abacus")


# FLOPs in bf16, GB, watts, compute capability of the data sheets
SHEETS = {
    "H100 PCIe": (756, 80, 350, 9.0), "H100 NVL": (835, 94, 400, 9.0), "H100": (989, 80, 700, 9.0),
    "GH200": (989, 96, 1000, 9.0), "H200": (989, 141, 700, 9.0), "B200": (2250, 180, 1000, 10.0),
    "B300": (2250, 288, 1400, 10.3), "A100 40GB": (312, 40, 400, 8.0), "A100": (312, 80, 400, 8.0),
    "A10G": (70, 24, 300, 8.6), "L40S": (362, 48, 350, 8.9), "L4": (121, 24, 72, 8.9), "RTX 3090": (71, 24, 350, 8.6),
    "RTX 4090": (165, 24, 450, 8.9), "RTX 5090": (210, 32, 575, 12.0), "MI300X": (1307, 192, 750, 0),
}  # fmt: skip


def test_the_devices_are_those_of_the_data_sheets_and_are_found_by_their_name():
    for name, (tera, gigabytes, *others) in SHEETS.items():
        assert scaling.GPUS[name] == (tera * 1e12, gigabytes * 1e9, *others) and scaling.find_gpu(name) == name
        assert scaling.has_kernels(name) == (others[1] == 9.0), name
    assert scaling.has_kernels("Abacus") and len(SHEETS) == len(scaling.GPUS)


def test_the_estimated_memory_is_that_of_the_formula():
    """Of d4, which has value embeddings in two of four layers; the logits of a chunk have at most 1 GiB."""
    size = planned(4)
    channels, matrices, rows = 2048 * 256 * 4, 4 * 12 * 256**2, 32768 * 256
    others = 2 * 12 * rows
    for batch, logits in ((1, 2 * 2048 * 32768), (64, 2**30)):
        least = 12 * rows + 22 * rows + others + 14 * matrices + 0.3e9 + logits
        assert estimate_memory(size, batch) == pytest.approx(least + 29 * batch * channels, rel=1e-3)
        assert estimate_memory(size, batch, kernels=False) == pytest.approx(least + 42 * batch * channels, rel=1e-3)
        wide = 16 * size.num_parameters + 4 * batch * (20 * channels + 4 * 2048 * 32768)
        assert estimate_memory(size, batch, bytes_per_value=4) == wide
    exact = [estimate_memory(size, 4), estimate_memory(size, 4) - 1]
    assert [estimate_micro_batch_size(size, memory) for memory in exact] == [4, 2]


@pytest.mark.parametrize("generation", [1, 2])
@pytest.mark.parametrize("depth", [3, 4])
def test_the_plan_counts_what_the_model_has(depth, generation):
    shape = {"aspect_ratio": 16, "head_dim": 16, "max_seq_len": 256, "total_batch_size": 256}
    p = planned(depth, 300, generation=generation, **shape)
    assert (p.model_config.vocab_size, p.model_config.num_tokens) == ((300, None) if generation == 1 else (320, 300))
    with torch.device("meta"):
        model = NanoChatForCausalLM(p.model_config)
    assert sum(x.numel() for x in model.parameters()) == p.num_parameters
    lookups = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Embedding))
    assert sum(x.numel() for x in model.parameters() if x.ndim == 2) - lookups == p.num_matmul_parameters


@pytest.mark.parametrize("seq_len, short", [(64, 64), (128, 128), (512, 128), (513, 256), (2048, 512)])
def test_a_sliding_window_is_a_quarter_in_blocks_of_128_and_at_most_the_sequence(seq_len, short):
    full, windowed = (
        planned(5, max_seq_len=seq_len, total_batch_size=seq_len, window_pattern=pattern).flops_per_token
        for pattern in ("L", "SSSL")
    )
    assert full - windowed == 3 * 12 * 384 * (seq_len - short)  # three of five layers, width 384


def test_a_given_value_wins_and_none_means_the_default():
    p = planned(total_batch_size=131_072, num_iterations=500, warmup_steps=None, weight_decay=0.1)
    assert (p.total_batch_size, p.num_iterations, p.total_tokens) == (131_072, 500, 65_536_000)
    assert p.groups["matrix"]["lr"] == pytest.approx(0.01)  # a quarter of the reference batch size, half the rate
    assert p.groups["matrix"]["weight_decay"] == pytest.approx(0.05)
    assert p.schedule == Schedule(500, 40, 0.65, 0.05, DEFAULTS[2].momentum, 400)
    assert planned(target_flops=1e18).total_flops == pytest.approx(1e18, rel=1e-3)
    assert [planned(target_flops=steps * 759_696_048 * 2**19).num_iterations for steps in (2.4, 2.6)] == [2, 3]
    caps = [planned(**given).model_config.final_logit_softcapping for given in ({}, {"final_logit_softcapping": None})]
    assert caps == [15.0, None]
    p = planned(weight_decay=0.0, warmup_steps=0, final_lr_frac=0.0)  # a zero is a value, too
    assert p.groups["matrix"]["weight_decay"] == 0 and (p.schedule.warmup_steps, p.schedule.final_lr_frac) == (0, 0)


def test_a_horizon_shorter_than_a_step_and_a_width_that_no_model_has_are_refused():
    with pytest.raises(InputError, match="give no model: the smear needs hidden_size >= 24"):
        planned(depth=1, aspect_ratio=1, head_dim=2)
    with pytest.raises(InputError, match="is 524288: it must be a multiple of max_seq_len, 1000"):
        planned(max_seq_len=1000)
    with pytest.raises(InputError, match="shorter than one step"):
        planned(depth=4, vocab_size=1024, target_flops=1.0)


# peaks in GiB that runs had on an H200: depth, micro-batch size, peak
PEAKS = [(8, 4, 3.11), (12, 2, 4.92), (12, 32, 21.9), (14, 1, 5.86), (18, 1, 10.04), (20, 1, 12.71), (24, 1, 19.37)]
PEAKS += [(24, 16, 50.7), (32, 1, 39.82), (40, 1, 71.80)]
PLAIN_PEAKS = [(12, 32, 29.1, False), (24, 16, 64.8, False)]  # without the kernels extra
# (depth, micro-batch size, GiB), measured on an H200; RL with 256 new tokens
SFT_PEAKS = [(d, 1, peak) for d, peak in [(14, 6.73), (16, 8.89), (20, 14.43), (24, 21.80), (32, 44.07), (38, 68.54)]]
SFT_PEAKS += [(12, 32, 22.22), (24, 8, 36.30)]
RL_PEAKS = [(d, 1, peak) for d, peak in [(12, 7.0), (14, 9.8), (16, 12.7), (20, 20.5), (28, 44.02), (34, 70.21)]]
RL_PEAKS += [(12, 8, 8.06), (24, 8, 34.62)]
STAGE_PEAKS = [("base", *p) for p in PEAKS] + [("sft", *p) for p in SFT_PEAKS] + [("rl", *p) for p in RL_PEAKS]


@pytest.mark.parametrize("depth, size, peak, kernels", [(*row, True) for row in PEAKS] + PLAIN_PEAKS)
def test_the_estimated_memory_is_within_a_tenth_of_the_measured_peak(depth, size, peak, kernels):
    assert estimate_memory(planned(depth), size, kernels=kernels) / 2**30 == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize("stage, depth, size, peak", STAGE_PEAKS)
def test_the_plan_has_the_memory_of_a_stage_within_a_tenth(stage, depth, size, peak):
    configs = {"base": PretrainConfig(depth=depth, device_batch_size=size), "tokenizer": TokenizerConfig()}
    configs["sft"] = ChatConfig(device_batch_size=size, total_batch_size=2048 * size)
    configs["rl"] = RLConfig(device_batch_size=size)
    text = pipeline_text([stage], configs, Devices("H200", 1))
    assert float(re.search(r"memory +about ([\d.]+) of 141 GB", text)[1]) * 1e9 / 2**30 == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize(
    "gpu, base, text",
    [
        ("L4", {"depth": 24, "device_batch_size": 8}, "of 24 GB per GPU: too much, lower base.device_batch_size"),
        ("L4", {"depth": 32, "device_batch_size": 2}, "of 24 GB per GPU: too much, lower base.device_batch_size"),
        ("L4", {"depth": 32}, "of 24 GB per GPU: too much, lower base.depth"),
        ("L4", {"depth": 12}, "of 24 GB per GPU: too much, lower sft.device_batch_size"),  # 29 GB: it has no kernels
        ("H100", {"depth": 12}, "of 80 GB per GPU base"),
        ("A100", {"fp8": True}, "base.fp8 is true: A100 has no FP8"),
        ("CPU", {"fp8": True}, "base.fp8 is true: CPU has no FP8"),
        ("cpu", {}, "MI300X, CPU"),
        ("RTX 4090", {"fp8": True}, "bfloat16 with FP8"),
    ],
)
def test_a_plan_says_what_a_device_cannot_do(gpu, base, text):
    configs = {"base": PretrainConfig(**base), "tokenizer": TokenizerConfig("primer", 2**15)}
    configs["sft"] = ChatConfig(device_batch_size=32, total_batch_size=2**16)
    try:
        shown = pipeline_text(["base", "sft"], configs, Devices(gpu, 1))
    except InputError as error:
        shown = str(error)
    assert text in re.sub(r"\s+", " ", shown)


def test_a_step_without_a_batch_of_its_own_is_one_micro_batch_on_each_rank():
    assert stage_batch(ChatConfig(total_batch_size=-1, device_batch_size=4), ranks=8) == (4, 1)


def test_the_estimated_micro_batch_fits_the_memory():
    d12, d24 = planned(total_batch_size=131_072), planned(24)
    assert estimate_micro_batch_size(d12, 80e9) == 64 and estimate_micro_batch_size(d24, 80e9) == 16
    assert estimate_micro_batch_size(d24, 12e9) == 1  # too little by the estimate: try the least
    assert estimate_micro_batch_size(d12, 80e9, bytes_per_value=4) < 64


SHAPE = Schedule(num_iterations=1000, warmup_steps=40, warmdown_ratio=0.65, final_lr_frac=0.05)


def test_the_learning_rate_warms_up_stays_and_decays_without_a_jump():
    points = {0: 1 / 40, 19: 0.5, 39: 1.0, 40: 1.0, 350: 1.0, 675: 0.525, 1000: 0.05}
    assert {step: SHAPE.lr(step) for step in points} == pytest.approx(points)
    rates = [SHAPE.lr(step) for step in range(1001)]
    assert max(abs(a - b) for a, b in itertools.pairwise(rates)) < 1 / 39


def test_momentum_warms_up_for_400_steps_and_ends_lower_and_weight_decay_follows_a_cosine():
    points = {0: 0.85, 200: 0.91, 400: 0.97 - 0.07 * 50 / 650, 1000: 0.90}
    assert {step: SHAPE.muon_momentum(step) for step in points} == pytest.approx(points)
    late = Schedule(num_iterations=1000, warmdown_ratio=0.2)  # at its peak from 400 to 800
    points = {399: 0.85 + 0.12 * 399 / 400, 401: 0.97, 800: 0.97, 900: 0.935, 1000: 0.90, 1100: 0.90}
    assert {step: late.muon_momentum(step) for step in points} == pytest.approx(points)
    assert [SHAPE.weight_decay(step) for step in (0, 500, 1000)] == pytest.approx([1.0, 0.5, 0.0], abs=1e-12)


def test_the_first_generation_is_constant_then_linear_to_zero():
    shape = Schedule(100, warmdown_ratio=0.2, momentum=(0.85, 0.95, 0.95), momentum_steps=300)
    assert [shape.lr(step) for step in (0, 79, 80, 90, 99, 100)] == pytest.approx([1, 1, 1, 0.5, 0.05, 0])
    assert Schedule(11, warmdown_ratio=0.7).warmdown_steps == 8  # 7.7, rounded as upstream
    flat = Schedule(10)  # no decay, and no division by zero
    assert (flat.lr(10), flat.weight_decay(10), flat.muon_momentum(10)) == (1.0, 0.0, pytest.approx(0.853))


def test_the_schedule_is_applied_to_each_group_from_its_peak():
    groups = {
        "matrix": {"kind": "muon", "lr": 0.02, "weight_decay": 0.2, "momentum": 0.5},
        "head": {"kind": "adamw", "lr": 0.1, "weight_decay": 0.01},
    }
    groups_with_params = [{"params": [torch.zeros(1)], "role": role, **group} for role, group in groups.items()]
    optimizer = torch.optim.SGD(groups_with_params)
    for step in (19, 500, 19):  # from the peak each time, not from the step before
        SHAPE.apply(optimizer, groups, step)
    muon, adamw = optimizer.param_groups
    assert (muon["lr"], muon["momentum"]) == (pytest.approx(0.01), pytest.approx(0.85 + 0.12 * 19 / 400))
    assert muon["weight_decay"] == pytest.approx(0.2, rel=1e-3) and muon["weight_decay"] < 0.2
    assert (adamw["lr"], adamw["weight_decay"]) == (pytest.approx(0.05), 0.01)


def test_a_longer_name_of_a_device_comes_before_its_part():
    names = ("NVIDIA H100 PCIe", "NVIDIA H100 NVL", "NVIDIA H100 80GB HBM3", "NVIDIA H200", "Radeon VII")
    assert [peak_flops(name) for name in names] == [756e12, 835e12, 989e12, 989e12, None]
    others = {"A100-SXM4-40GB": "A100 40GB", "A100 80GB PCIe": "A100", "L40": None, "RTX A1000": None, "GB200": "B200"}
    assert {name: scaling.find_gpu(f"NVIDIA {name}") for name in others} == others
