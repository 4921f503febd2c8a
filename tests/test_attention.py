"""Attention and its input against the definition: references on any machine, kernels where there is a GPU."""

import pytest
import torch

from nanochat_hf.kernels import attention
from nanochat_hf.kernels.weight_cache import EmbeddingGradIndex

POSITIONS = torch.cat([torch.arange(n) for n in (7, 1, 8)])[None]  # three documents in 16 tokens


def slow_attention(q, k, v, scale, window, position_ids=None):
    """Attention by the definition, in float32: (B, T, H, D) and (B, T, K, D) -> (B, T, H, D)."""
    groups = q.shape[2] // k.shape[2]
    k, v = (x.float().repeat_interleave(groups, dim=2) for x in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q.float(), k) * scale
    distance = torch.arange(q.shape[1], device=q.device)
    distance = distance[:, None] - distance
    hidden = (distance < 0) | (distance >= (window or q.shape[1]))
    if position_ids is not None:
        hidden = hidden | (distance > position_ids[:, None, :, None])
    return torch.einsum("bhts,bshd->bthd", scores.masked_fill(hidden, float("-inf")).softmax(-1), v)


@pytest.mark.parametrize("position_ids", [None, POSITIONS])
@pytest.mark.parametrize("window", [None, 5, 15, 16, 40])
def test_attention_sees_its_window_and_document_and_groups_heads(window, position_ids):
    q, k, v = torch.randn(2, 16, 4, 8), torch.randn(2, 16, 2, 8), torch.randn(2, 16, 2, 8)
    position_ids = None if position_ids is None else position_ids.expand(2, -1)
    mask = attention.attention_mask(q.flatten(-2), window, position_ids, 6)
    out = attention.attention(q, k, v, 0.3, window, mask)
    assert torch.allclose(out, slow_attention(q, k, v, 0.3, window, position_ids), atol=1e-6)


def test_cu_seqlens_are_where_documents_begin_and_the_end():
    x, position_ids = torch.empty(2, 16, 1), torch.cat((POSITIONS, torch.arange(16)[None]))
    mask = attention.attention_mask(x, 5, position_ids, max_documents=6, flash=True)
    assert mask.cu_seqlens.tolist() == [0, 7, 8, 16, 32, 32, 32] and mask.cu_seqlens.dtype == torch.int32
    assert attention.attention_mask(x, 5, flash=True).cu_seqlens is None


def test_flash_attention_gets_the_window_and_the_documents(monkeypatch):
    calls = []

    def flash(q, k, v, **options):
        calls.append({name: getattr(value, "shape", value) for name, value in options.items()})
        return q, None

    monkeypatch.setattr(attention, "flash_attn_func", flash)
    monkeypatch.setattr(attention, "flash_attn_varlen_func", flash)
    q = torch.randn(2, 16, 4, 8)
    for window, position_ids in ((None, None), (5, None), (5, POSITIONS.expand(2, -1))):
        mask = attention.attention_mask(q, window, position_ids, 6, flash=True)
        assert attention.attention(q, q, q, 0.3, window, mask).shape == q.shape
    documents = {"cu_seqlens_q": (7,), "cu_seqlens_k": (7,), "max_seqlen_q": 16, "max_seqlen_k": 16}
    assert calls[0] == {"softmax_scale": 0.3, "causal": True}
    assert calls[1] == {"softmax_scale": 0.3, "window_size": (4, 0)}  # 4 keys before the query's own
    assert calls[2] == calls[1] | documents


@pytest.mark.parametrize("packed", [False, True])
def test_split_qkv_rotates_then_norms_and_adds_the_gated_embedding(packed):
    heads, kv_heads, dim, length = 3, 1, 4, 5
    qkv, table = torch.randn(2, length, (heads + 2 * kv_heads) * dim), torch.randn(7, kv_heads * dim)
    ids, gates = torch.randint(0, 7, (2, length)), torch.randn(2, length, kv_heads)
    angle, position_ids = torch.randn(length, 1, dim // 2), torch.tensor([[0, 1, 0, 1, 2]] * 2) if packed else None
    rows = EmbeddingGradIndex(ids, 7).lookup(table, materialize=False)
    q, k, v = attention.split_qkv(qkv, angle.cos(), angle.sin(), kv_heads, 1e-6, rows, gates, position_ids)
    for part, raw in ((q[1, 2, 1], qkv[1, 2, 4:8]), (k[1, 2, 0], qkv[1, 2, 12:16])):  # one head of one token, by hand
        pairs = torch.complex(raw[:2], raw[2:]) * torch.exp(-1j * angle[0 if packed else 2, 0])
        rotated = torch.cat((pairs.real, pairs.imag))
        assert torch.allclose(part, rotated / (rotated.square().mean() + 1e-6).sqrt(), atol=1e-6)
    extra = 3 * torch.sigmoid(gates[1, 2, 0]) * table[ids[1, 2]]
    assert torch.allclose(v[1, 2, 0], qkv[1, 2, 16:20] + extra, atol=1e-6)
