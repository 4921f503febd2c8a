"""Attention and its input against plain PyTorch: the twins on any machine, the kernels where there is a GPU."""

import pytest
import torch

from nanochat_hf.train import attention
from nanochat_hf.train.leaves import Places

LOW = {"device": "cuda", "dtype": torch.bfloat16}


def relative(a, b) -> float:
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


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


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 129])
def test_fast_attention_and_its_gradients_equal_the_definition(window):
    shape = (2, 512, 4, 128)
    tensors = [torch.randn(shape, **LOW, requires_grad=True) for _ in range(3)]
    mask = attention.attention_mask(tensors[0].flatten(-2), window)
    grad = torch.randn(shape, **LOW)
    out = torch.compile(attention.attention)(*tensors, 0.1, window, mask)
    exact = slow_attention(*tensors, 0.1, window)
    assert relative(out, exact) < 1e-2
    for a, b in zip(torch.autograd.grad(out, tensors, grad), torch.autograd.grad(exact, tensors, grad.float())):
        assert relative(a, b) < 1e-2


@pytest.mark.gpu
@pytest.mark.parametrize("gated", [False, True])
def test_fused_qkv_and_its_gradients_equal_the_twin(gated, monkeypatch):
    qkv = torch.randn(2, 64, 8 * 128, **LOW, requires_grad=True)
    angle = torch.randn(64, 1, 64, device="cuda")
    table = torch.randn(50, 2 * 128, **LOW, requires_grad=True)
    gates = torch.randn(2, 64, 2, **LOW, requires_grad=True)
    ids = torch.randint(0, 50, (2, 64), device="cuda")
    extra = (ids, table, gates) if gated else ()
    leaves = (qkv, table, gates) if gated else (qkv,)
    fast = (ids, table.detach(), gates, Places(ids, 50).rows(table, real=False)) if gated else ()
    fused = attention.split_qkv(qkv, angle.cos(), angle.sin(), 2, 1e-6, *fast)
    grads = [torch.randn_like(x) for x in fused]
    found = torch.autograd.grad(fused, leaves, grads)
    monkeypatch.setattr(attention, "triton", None)
    exact = attention.split_qkv(qkv.float(), angle.cos(), angle.sin(), 2, 1e-6, *extra)
    wanted = torch.autograd.grad(exact, leaves, [g.float() for g in grads])
    for a, b in zip((*fused, *found), (*exact, *wanted)):
        assert relative(a, b) < 1e-2
