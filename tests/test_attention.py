"""Attention and its input against plain PyTorch: the twins on any machine, the kernels where there is a GPU."""

import pytest
import torch
from tiny import LOW, relative

from nanochat_hf.kernels import attention
from nanochat_hf.kernels import backend as kernel_checks
from nanochat_hf.kernels.weight_cache import EmbeddingGradIndex


def slow_attention(q, k, v, scale, window):
    """Attention by the definition, in float32: (B, T, H, D) and (B, T, K, D) -> (B, T, H, D)."""
    groups = q.shape[2] // k.shape[2]
    k, v = (x.float().repeat_interleave(groups, dim=2) for x in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q.float(), k) * scale
    distance = torch.arange(q.shape[1], device=q.device)
    distance = distance[:, None] - distance
    hidden = (distance < 0) | (distance >= (window or q.shape[1]))
    return torch.einsum("bhts,bshd->bthd", scores.masked_fill(hidden, float("-inf")).softmax(-1), v)


@pytest.mark.parametrize("window", [None, 5])
def test_attention_sees_the_window_and_groups_heads(window):
    q, k, v = torch.randn(2, 16, 4, 8), torch.randn(2, 16, 2, 8), torch.randn(2, 16, 2, 8)
    out = attention.attention(q, k, v, 0.3, window, attention.attention_mask(q.flatten(-2), window))
    assert torch.allclose(out, slow_attention(q, k, v, 0.3, window), atol=1e-6)


def test_split_qkv_turns_then_norms_and_adds_the_gated_embedding():
    heads, kv_heads, dim, length = 3, 1, 4, 5
    qkv, table = torch.randn(2, length, (heads + 2 * kv_heads) * dim), torch.randn(7, kv_heads * dim)
    ids, gates = torch.randint(0, 7, (2, length)), torch.randn(2, length, kv_heads)
    angle = torch.randn(length, 1, dim // 2)
    q, _, v = attention.split_qkv(qkv, angle.cos(), angle.sin(), kv_heads, 1e-6, ids, table, gates)
    raw = qkv[1, 2, 4:8]  # second head of one token, turned by hand
    pairs = torch.complex(raw[:2], raw[2:]) * torch.exp(-1j * angle[2, 0])
    turned = torch.cat((pairs.real, pairs.imag))
    assert torch.allclose(q[1, 2, 1], turned / (turned.square().mean() + 1e-6).sqrt(), atol=1e-6)
    extra = 3 * torch.sigmoid(gates[1, 2, 0]) * table[ids[1, 2]]
    assert torch.allclose(v[1, 2, 0], qkv[1, 2, 16:20] + extra, atol=1e-6)


def joint_inputs(length: int, gated: bool):
    """qkv, angles, leaves that get gradients, value embedding as the kernels take it, and as the definition does."""
    qkv = torch.randn(2, length, 8 * 128, **LOW, requires_grad=True)
    angle = torch.randn(length, 1, 64, device="cuda")
    if not gated:
        return qkv, angle, (qkv,), (), ()
    table = torch.randn(50, 2 * 128, **LOW, requires_grad=True)
    gates = torch.randn(2, length, 2, **LOW, requires_grad=True)
    ids = torch.randint(0, 50, (2, length), device="cuda")
    fast = (ids, table.detach(), gates, EmbeddingGradIndex(ids, 50).rows(table, real=False))
    return qkv, angle, (qkv, table, gates), fast, (ids, table, gates)


@pytest.mark.gpu
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("window", [None, 129])
def test_attention_over_the_joint_product_and_its_gradients_equal_the_definition(window, gated, monkeypatch):
    qkv, angle, leaves, fast, extra = joint_inputs(512, gated)
    mask = attention.attention_mask(qkv, window)
    out = torch.compile(attention.attend)(
        qkv, angle.cos(), angle.sin(), 2, 1e-6, *fast, scale=0.1, window=window, mask=mask
    )
    grad = torch.randn_like(out)
    found = torch.autograd.grad(out, leaves, grad)
    monkeypatch.setattr(kernel_checks, "disabled", {"rotary and QK norm"})
    parts = attention.split_qkv(qkv.float(), angle.cos(), angle.sin(), 2, 1e-6, *extra)
    exact = slow_attention(*parts, 0.1, window)
    wanted = torch.autograd.grad(exact, leaves, grad.float())
    for a, b in zip((out, *found), (exact, *wanted)):
        assert relative(a, b) < 1e-2


@pytest.mark.gpu
@pytest.mark.parametrize("gated", [False, True])
def test_fused_qkv_and_its_gradients_equal_the_twin(gated, monkeypatch):
    qkv, angle, leaves, fast, extra = joint_inputs(64, gated)
    fused = attention.split_qkv(qkv, angle.cos(), angle.sin(), 2, 1e-6, *fast)
    grads = [torch.randn_like(x) for x in fused]
    found = torch.autograd.grad(fused, leaves, grads)
    monkeypatch.setattr(kernel_checks, "disabled", {"rotary and QK norm"})
    exact = attention.split_qkv(qkv.float(), angle.cos(), angle.sin(), 2, 1e-6, *extra)
    wanted = torch.autograd.grad(exact, leaves, [g.float() for g in grads])
    for a, b in zip((*fused, *found), (*exact, *wanted)):
        assert relative(a, b) < 1e-2
