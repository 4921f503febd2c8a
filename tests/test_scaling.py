"""The dial: a table of plans, its agreement with the real model, and what overrides do."""

import pytest
import torch

from nanochat_hf.errors import InputError
from nanochat_hf.model.configuration_nanochat import NanoChatConfig
from nanochat_hf.model.modeling_nanochat import NanoChatForCausalLM
from nanochat_hf.train.scaling import RECIPES, plan, rows_that_fit

# depth: width, heads, parameters, FLOPs a token, tokens a step, steps; vocabulary 32,768, 2,048 tokens a row
SECOND = {
    4: (256, 2, 36_700_242, 80_216_496, 262_144, 528),
    12: (768, 6, 286_261_730, 759_696_048, 524_288, 2_520),
    20: (1280, 10, 896_533_746, 2_886_212_784, 1_048_576, 4_980),
    24: (1536, 12, 1_384_122_122, 4_775_225_616, 1_048_576, 8_352),
    32: (2048, 16, 2_818_575_450, 10_770_991_248, 2_097_152, 9_600),
}
# October 2025, vocabulary 65,536: the published runs
FIRST = {20: (560_988_160, 21_400), 26: (1_081_999_360, 41_275), 32: (1_879_048_192, 71_680)}


@pytest.mark.parametrize("depth", SECOND)
def test_second_generation_follows_the_table(depth):
    p = plan(depth, 32768)
    found = (p.hidden_size, p.num_heads, p.num_parameters, p.flops_per_token, p.total_batch_size, p.num_iterations)
    assert found == SECOND[depth]


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
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    assert linear == p.num_matmul_parameters


def test_windows_cost_what_their_keys_cost():
    full, windowed = (plan(12, 32768, window_pattern=pattern).flops_per_token for pattern in ("L", "SSSL"))
    assert full - windowed == 9 * 12 * 768 * (2048 - 512)  # 9 of 12 layers see 512 keys


def test_a_given_value_wins_and_none_means_the_recipe():
    p = plan(12, 32768, total_batch_size=131_072, num_iterations=500, warmup_steps=None, weight_decay=0.1)
    assert (p.total_batch_size, p.num_iterations, p.total_tokens) == (131_072, 500, 65_536_000)
    assert p.groups["matrix"]["lr"] == pytest.approx(0.01)  # a quarter of the reference batch, half of the rate
    assert p.groups["matrix"]["weight_decay"] == pytest.approx(0.05)
    assert p.schedule.warmup_steps == RECIPES[2].warmup_steps


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


def test_the_micro_batch_fits_the_memory_and_divides_the_batch():
    d12, d24 = plan(12, 32768, total_batch_size=131_072), plan(24, 32768)
    assert rows_that_fit(d12, 80e9) == 64 and rows_that_fit(d24, 80e9) == 16
    assert rows_that_fit(d12, 80e9, world_size=4) == 16  # 64 rows in a batch of 4 processes
    assert rows_that_fit(d24, 24e9) == 1  # too little by the estimate: try the least
    assert rows_that_fit(plan(4, 1024, max_seq_len=128, total_batch_size=128 * 12), 8e9) == 4
    with pytest.raises(InputError, match="not a multiple of 3 processes"):
        rows_that_fit(d12, 80e9, world_size=3)
