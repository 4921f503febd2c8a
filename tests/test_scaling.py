"""The dial: a table of plans, its agreement with the real model, and what overrides do."""

import pytest
import torch

from nanochat_hf.errors import InputError
from nanochat_hf.model.configuration_nanochat import NanoChatConfig
from nanochat_hf.model.modeling_nanochat import NanoChatForCausalLM
from nanochat_hf.optim.scaling import DEFAULTS, estimate_micro_batch_size, plan, visible_keys

# depth: width, heads, parameters, FLOPs a token, tokens a step, steps, rates of Muon, embedding and head, decay of
# Muon; vocabulary 32,768, 2,048 tokens a row
SECOND = {
    4: (256, 2, 36_700_242, 80_216_496, 262_144, 528, 0.01414, 0.36742, 0.009798, 1.88990),
    6: (384, 3, 73_531_538, 167_510_808, 262_144, 1_062, 0.01414, 0.30000, 0.008000, 0.93961),
    8: (512, 4, 125_829_354, 295_699_728, 262_144, 1_920, 0.01414, 0.25981, 0.006928, 0.51972),
    10: (640, 5, 195_952_986, 495_454_104, 524_288, 1_605, 0.02000, 0.32863, 0.008764, 0.43963),
    12: (768, 6, 286_261_730, 759_696_048, 524_288, 2_520, 0.02000, 0.30000, 0.008000, 0.28000),
    14: (896, 7, 399_114_882, 1_128_533_592, 524_288, 3_759, 0.02000, 0.27775, 0.007407, 0.18771),
    16: (1024, 8, 536_871_738, 1_585_451_664, 524_288, 5_376, 0.02000, 0.25981, 0.006928, 0.13125),
    18: (1152, 9, 701_891_594, 2_179_995_480, 1_048_576, 3_712, 0.02828, 0.34641, 0.009238, 0.13439),
    20: (1280, 10, 896_533_746, 2_886_212_784, 1_048_576, 4_980, 0.02828, 0.32863, 0.008764, 0.10019),
    22: (1408, 11, 1_123_157_490, 3_763_085_976, 1_048_576, 6_517, 0.02828, 0.31334, 0.008356, 0.07655),
    24: (1536, 12, 1_384_122_122, 4_775_225_616, 1_048_576, 8_352, 0.02828, 0.30000, 0.008000, 0.05974),
    26: (1664, 13, 1_681_786_938, 5_991_051_288, 1_048_576, 10_510, 0.02828, 0.28823, 0.007686, 0.04747),
    28: (1792, 14, 2_018_511_234, 7_365_736_368, 1_048_576, 13_020, 0.02828, 0.27775, 0.007407, 0.03832),
    30: (1920, 15, 2_396_654_306, 8_977_137_624, 1_048_576, 15_907, 0.02828, 0.26833, 0.007155, 0.03136),
    32: (2048, 16, 2_818_575_450, 10_770_991_248, 2_097_152, 9_600, 0.04000, 0.36742, 0.009798, 0.03675),
}
# October 2025, vocabulary 65,536: the published runs
FIRST = {20: (560_988_160, 21_400), 26: (1_081_999_360, 41_275), 32: (1_879_048_192, 71_680)}


@pytest.mark.parametrize("depth", SECOND)
def test_second_generation_follows_the_table(depth):
    p = plan(depth, 32768)
    found = (p.hidden_size, p.num_heads, p.num_parameters, p.flops_per_token, p.total_batch_size, p.num_iterations)
    assert found == SECOND[depth][:6]
    rates = [p.groups[role]["lr"] for role in ("matrix", "embedding", "head")]
    assert [*rates, p.groups["matrix"]["weight_decay"]] == pytest.approx(SECOND[depth][6:], abs=6e-6)


@pytest.mark.parametrize("depth", range(4, 33))
def test_every_depth_obeys_the_laws_of_the_scaling(depth):
    p, reference = plan(depth, 32768), plan(12, 32768)
    assert p.hidden_size == -(-64 * depth // 128) * 128 and p.num_heads * 128 == p.hidden_size
    size = p.parameters["matrix"] + p.parameters["head"]
    assert 0 <= 12 * size - p.total_tokens < p.total_batch_size  # 12 tokens a parameter, whole steps
    ideal = 2**19 * (size / (reference.parameters["matrix"] + reference.parameters["head"])) ** 0.383
    assert 2**-0.5 <= p.total_batch_size / ideal <= 2**0.5 and p.total_batch_size & (p.total_batch_size - 1) == 0
    noise = (p.total_batch_size / 2**19) ** 0.5
    assert p.groups["matrix"]["lr"] == pytest.approx(0.02 * noise)
    assert p.groups["head"]["lr"] == pytest.approx(0.008 * noise * (p.hidden_size / 768) ** -0.5)
    # Weights are forgotten over the same share of a run: rate x decay x steps is as at the reference.
    forgotten = [
        q.groups["matrix"]["lr"] * q.groups["matrix"]["weight_decay"] * q.num_iterations for q in (p, reference)
    ]
    assert forgotten[0] == pytest.approx(forgotten[1], rel=0.01)


@pytest.mark.parametrize("depth", FIRST)
def test_first_generation_follows_the_published_runs(depth):
    p = plan(depth, 65536, generation=1)
    assert (p.num_parameters, p.num_iterations, p.total_batch_size) == (*FIRST[depth], 524_288)
    assert p.max_grad_norm == 1.0 and p.schedule.warmup_steps == 0 and p.groups["matrix"]["weight_decay"] == 0
    assert p.groups["embedding"]["lr"] == pytest.approx(0.2 * (64 * depth / 768) ** -0.5)


def test_the_reference_has_the_reference_rates_and_depth_scales_them():
    reference, deep = plan(12, 32768).groups, plan(24, 32768).groups
    assert [reference[r]["lr"] for r in ("head", "embedding", "value_embeds", "resid", "x0", "smear", "matrix")] == (
        pytest.approx([0.008, 0.3, 0.15, 0.005, 0.5, 0.2, 0.02])
    )
    assert reference["matrix"]["weight_decay"] == pytest.approx(0.28)
    assert deep["matrix"]["lr"] == pytest.approx(0.02 * 2**0.5)  # twice the batch
    assert deep["head"]["lr"] == pytest.approx(0.008)  # sqrt(2) for the batch, 1 / sqrt(2) for the width
    assert deep["matrix"]["weight_decay"] == pytest.approx(0.05974, rel=1e-3)


@pytest.mark.parametrize("generation", [1, 2])
@pytest.mark.parametrize("depth", [3, 4])
def test_the_plan_counts_what_the_model_has(depth, generation):
    p = plan(depth, 300, generation, aspect_ratio=16, head_dim=16, max_seq_len=256, total_batch_size=256)
    make = NanoChatConfig if generation == 2 else NanoChatConfig.first_generation
    with torch.device("meta"):
        model = NanoChatForCausalLM(make(**p.model_fields()))
    assert sum(x.numel() for x in model.parameters()) == p.num_parameters
    linear = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name)
    assert linear == p.num_matmul_parameters


def test_windows_cost_what_their_keys_cost():
    full, windowed = (plan(12, 32768, window_pattern=pattern).flops_per_token for pattern in ("L", "SSSL"))
    assert full - windowed == 9 * 12 * 768 * (2048 - 512)  # 9 of 12 layers see 512 keys


@pytest.mark.parametrize("seq_len,short", [(64, 64), (128, 128), (512, 128), (513, 256), (2048, 512)])
def test_a_short_window_is_a_quarter_in_whole_blocks_of_128_and_never_longer_than_the_row(seq_len, short):
    assert visible_keys(5, "SSSL", seq_len) == [short, short, short, seq_len, seq_len]


def test_a_given_value_wins_and_none_means_the_recipe():
    p = plan(12, 32768, total_batch_size=131_072, num_iterations=500, warmup_steps=None, weight_decay=0.1)
    assert (p.total_batch_size, p.num_iterations, p.total_tokens) == (131_072, 500, 65_536_000)
    assert p.groups["matrix"]["lr"] == pytest.approx(0.01)  # a quarter of the reference batch, half of the rate
    assert p.groups["matrix"]["weight_decay"] == pytest.approx(0.05)
    assert p.schedule.warmup_steps == DEFAULTS[2].warmup_steps


def test_a_budget_of_flops_sets_the_horizon():
    p = plan(12, 32768, target_flops=1e18)
    assert p.total_flops == pytest.approx(1e18, rel=1e-3)


@pytest.mark.parametrize(
    "words,message",
    [
        ({"generation": 3}, "generation is 3"),
        ({"depth": 0}, "depth is 0"),
        ({"head_dim": 7}, "head_dim is 7"),
        ({"window_pattern": "SX"}, "window_pattern"),
        ({"total_batch_size": 1000}, "multiple of max_seq_len"),
        ({"target_param_data_ratio": -1}, "no horizon"),
        ({"target_flops": 1.0}, "shorter than one step"),
    ],
)
def test_impossible_values_are_refused_in_one_line(words, message):
    with pytest.raises(InputError, match=message) as error:
        plan(**{"depth": 4, "vocab_size": 1024, **words})
    assert "\n" not in str(error.value)


def test_the_micro_batch_fits_the_memory():
    d12, d24 = plan(12, 32768, total_batch_size=131_072), plan(24, 32768)
    assert estimate_micro_batch_size(d12, 80e9) == 64 and estimate_micro_batch_size(d24, 80e9) == 16
    assert estimate_micro_batch_size(d24, 24e9) == 1  # too little by the estimate: try the least
    assert estimate_micro_batch_size(d12, 80e9, most=48) == 32
    assert estimate_micro_batch_size(d12, 80e9, bytes_per_value=4) < 64
