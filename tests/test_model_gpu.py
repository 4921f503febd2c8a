"""The model on a GPU: attention kernels that honor the windows, every cache, the compiled step.

    python -m pytest -o addopts= tests/test_model_gpu.py

needs torch, transformers and pytest. flash_attention_4 runs where flash-attn-4 is installed; versions 2 and 3 come
from their packages or, where `kernels` is installed, from the Hub. What is absent is skipped by name. How the model
calls FlashAttention-4 is tested on any machine, against a function that is as strict about its arguments.
"""

from itertools import pairwise

import pytest
import torch
from tiny import GENERATIONS, KINDS, close, greedy, logits_of, make_ids, make_model, uncached_greedy
from torch.nn.functional import scaled_dot_product_attention
from transformers import modeling_flash_attention_utils as flash

# A sliding window, a full layer, and the last with the smear's state; heads of 64 channels, which all kernels support.
SHAPE = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 3}
SHAPE["window_pattern"] = "SL"


def error_of(model, kind: str) -> float:
    """Mean distance of the logits from those of eager attention in float32."""
    exact = logits_of(make_model(attn_implementation="eager", **SHAPE).to(model.device), kind)
    return (logits_of(model, kind) - exact).abs().mean().item()


def flash_attn_func(q, k, v, softmax_scale, causal, window_size=(None, None)):
    """(..., T, H, D), (..., S, H_kv, D) twice -> (..., T, H, D): the last T of S tokens see `window_size[0]` back."""
    assert causal
    age = torch.arange(k.shape[-3] - q.shape[-3], k.shape[-3])[:, None] - torch.arange(k.shape[-3])
    mask = (age >= 0) & (age <= (k.shape[-3] if window_size[0] is None else window_size[0]))
    q, k, v = (x.transpose(-3, -2) for x in (q, k, v))
    out = scaled_dot_product_attention(q, k, v, mask, scale=softmax_scale, enable_gqa=True)
    return out.transpose(-3, -2)


def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal,
                           window_size=(None, None)):  # fmt: skip
    """The same for sequences one after the other, which begin at `cu_seqlens`."""
    assert isinstance(max_seqlen_q, int) and isinstance(max_seqlen_k, int), "expected int, but got a tensor"
    parts = zip(pairwise(cu_seqlens_q.tolist()), pairwise(cu_seqlens_k.tolist()), strict=True)
    options = (softmax_scale, causal, window_size)
    return torch.cat([flash_attn_func(q[a:b], k[c:d], v[c:d], *options) for (a, b), (c, d) in parts])


@pytest.mark.parametrize("kind", KINDS)
def test_flash_attention_4_is_called_as_it_wants_to_be(monkeypatch, kind):
    functions = (flash_attn_func, flash_attn_varlen_func, None, flash._pad_input, flash._unpad_input)
    monkeypatch.setattr(flash, "_lazy_imports", lambda *_, **__: functions)
    for name in [name for name in vars(flash) if name.endswith("_fn")]:
        monkeypatch.setattr(flash, name, None)  # so that what was loaded is put back
    monkeypatch.setattr(flash, "_loaded_implementation", None)
    model = make_model()
    model.config._attn_implementation = "flash_attention_4"  # the setter would look for the package
    close(logits_of(model, kind), logits_of(make_model(), kind))


@pytest.mark.gpu
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
def test_attention_implementations_honor_the_windows(implementation, kinds):
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


@pytest.mark.gpu
@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("cache", ["dynamic", "static", "offloaded", "offloaded_static"])
def test_generation_with_every_cache_equals_the_uncached(generation, cache):
    model, prompt = make_model(generation).cuda(), make_ids(2, 17).cuda()
    model.generation_config.disable_compile = True
    expected = torch.cat([uncached_greedy(model, row[None], 12) for row in prompt])
    for layer in model.model.layers:  # the GPU falls behind the host, as with large layers: copies have to wait for it
        layer.register_forward_pre_hook(lambda *_: torch.cuda._sleep(1_000_000))
    assert greedy(model, prompt, 12, cache_implementation=cache).tolist() == expected.tolist()


@pytest.mark.gpu
def test_the_step_that_generate_compiles_says_the_same():
    model, prompt = make_model(**SHAPE).cuda(), make_ids(2, 17).cuda()
    expected = torch.cat([uncached_greedy(model, row[None], 12) for row in prompt])
    for _ in range(2):  # the second call reuses what was compiled
        assert greedy(model, prompt, 12, cache_implementation="static").tolist() == expected.tolist()
