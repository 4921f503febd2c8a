"""The model on a GPU: attention kernels that honour the windows, every cache, the compiled step.

    python -m pytest -o addopts= tests/test_model_gpu.py

needs torch, transformers and pytest. flash_attention_4 runs where flash-attn-4 is installed; versions 2 and 3 come
from their packages or, where `kernels` is installed, from the Hub. What is absent is skipped by name.
"""

import pytest
import torch
from tiny import GENERATIONS, KINDS, greedy, logits_of, make_ids, make_model, uncached_greedy

pytestmark = pytest.mark.gpu
# A window, a full layer, and the last with the smear's state; heads of 64 channels, which all kernels know.
SHAPE = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 3}
SHAPE["window_pattern"] = "SL"


def error_of(model, kind: str) -> float:
    """Mean distance of the logits from those of eager attention in float32."""
    exact = logits_of(make_model(attn_implementation="eager", **SHAPE).to(model.device), kind)
    return (logits_of(model, kind) - exact).abs().mean().item()


@pytest.mark.parametrize(
    ("implementation", "kinds"),
    [
        ("sdpa", KINDS),
        ("flex_attention", ["plain", "padded"]),  # each kind is compiled, for seconds
        ("flash_attention_2", KINDS),
        ("flash_attention_3", KINDS),
        ("flash_attention_4", KINDS),
    ],
)
def test_attention_implementations_honour_the_windows(implementation, kinds):
    model = make_model(**SHAPE).cuda().bfloat16()
    try:
        model.set_attn_implementation(implementation)
    except (ImportError, ValueError, OSError) as error:
        pytest.skip(f"{implementation} cannot be had here: {str(error).splitlines()[0]}")
    assert model.config._attn_implementation == implementation
    eager = make_model(attn_implementation="eager", **SHAPE).cuda().bfloat16()
    blind = make_model(**SHAPE).cuda().bfloat16()
    blind.config.sliding_window = 60
    for kind in kinds:
        unavoidable = error_of(eager, kind)  # what bfloat16 alone costs
        assert error_of(model, kind) < 2 * unavoidable, kind
        assert error_of(blind, kind) > 10 * unavoidable, f"{kind}: a wrong window would not be seen"


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("cache", ["dynamic", "static", "offloaded", "offloaded_static"])
def test_generation_with_every_cache_equals_the_uncached(generation, cache):
    model, prompt = make_model(generation).cuda(), make_ids(2, 17).cuda()
    model.generation_config.disable_compile = True
    expected = torch.cat([uncached_greedy(model, row[None], 12) for row in prompt])
    assert greedy(model, prompt, 12, cache_implementation=cache).tolist() == expected.tolist()


def test_the_step_that_generate_compiles_says_the_same():
    model, prompt = make_model(**SHAPE).cuda(), make_ids(2, 17).cuda()
    expected = torch.cat([uncached_greedy(model, row[None], 12) for row in prompt])
    for _ in range(2):  # the second call reuses what was compiled
        assert greedy(model, prompt, 12, cache_implementation="static").tolist() == expected.tolist()
