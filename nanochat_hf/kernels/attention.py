"""Attention of the training step: RoPE, QK norm and the gated value embedding in one Triton kernel, then attention.

- `split_qkv`: one pass over the joint output of the q, k and v projections, one more backward.
- `attention`: FlashAttention-4 (package flash-attn-4); a sliding-window layer costs what its window costs. Without it
  FlexAttention (arXiv:2412.05496) with a block mask; on CPUs SDPA.
"""

import os
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from .backend import check, compiled, tl, triton, unavailable, usable, with_gradients
from .weight_cache import EmbeddingGradIndex, EmbeddingRows

os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")  # keep compiled kernels on disk, as quack does
try:
    from flash_attn.cute import flash_attn_func, flash_attn_varlen_func
except Exception as error:  # a version that does not fit may raise anything
    flash_attn_func = flash_attn_varlen_func = unavailable("flash-attn-4", error)

FLASH, FLASH_DOCUMENTS = "FlashAttention-4", "FlashAttention-4 with document masking"

if triton is not None:

    @triton.jit
    def _rope_qk_norm(base, out, first_head, heads, c, s, eps, D: tl.constexpr, PADDED: tl.constexpr):
        """Rotate by -angle and norm `heads` heads of one token, read at base and written to out."""
        head = tl.arange(0, PADDED)[:, None]
        half = tl.arange(0, D // 2)[None, :]
        inside = (head < heads) & (half < D // 2)
        x1 = tl.load(base + (first_head + head) * D + half, mask=inside, other=0.0).to(tl.float32)
        x2 = tl.load(base + (first_head + head) * D + D // 2 + half, mask=inside, other=0.0).to(tl.float32)
        y1, y2 = x1 * c + x2 * s, x2 * c - x1 * s
        scale = tl.rsqrt((tl.sum(y1 * y1, 1) + tl.sum(y2 * y2, 1)) / D + eps)[:, None]
        tl.store(out + head * D + half, (y1 * scale).to(out.dtype.element_ty), mask=inside)
        tl.store(out + head * D + D // 2 + half, (y2 * scale).to(out.dtype.element_ty), mask=inside)

    @triton.jit
    def _rope_qk_norm_grad(base, grad, out, first_head, heads, c, s, eps, D: tl.constexpr, PADDED: tl.constexpr):
        """Gradient of the above: reads the inputs again at base, the outputs' gradient at grad, writes beside base."""
        head = tl.arange(0, PADDED)[:, None]
        half = tl.arange(0, D // 2)[None, :]
        inside = (head < heads) & (half < D // 2)
        where = (first_head + head) * D + half
        x1 = tl.load(base + where, mask=inside, other=0.0).to(tl.float32)
        x2 = tl.load(base + where + D // 2, mask=inside, other=0.0).to(tl.float32)
        g1 = tl.load(grad + head * D + half, mask=inside, other=0.0).to(tl.float32)
        g2 = tl.load(grad + head * D + D // 2 + half, mask=inside, other=0.0).to(tl.float32)
        y1, y2 = x1 * c + x2 * s, x2 * c - x1 * s
        scale = tl.rsqrt((tl.sum(y1 * y1, 1) + tl.sum(y2 * y2, 1)) / D + eps)[:, None]
        y1, y2 = y1 * scale, y2 * scale
        along = ((tl.sum(g1 * y1, 1) + tl.sum(g2 * y2, 1)) / D)[:, None]
        d1, d2 = scale * (g1 - y1 * along), scale * (g2 - y2 * along)
        tl.store(out + where, (d1 * c - d2 * s).to(out.dtype.element_ty), mask=inside)
        tl.store(out + where + D // 2, (d1 * s + d2 * c).to(out.dtype.element_ty), mask=inside)

    @triton.jit
    def _qkv_forward(
        qkv, q, k, v, cos, sin, ids, table, gates, position_ids, length, heads, kv_heads, eps,
        D: tl.constexpr, PADDED: tl.constexpr, KV_PADDED: tl.constexpr, GATED: tl.constexpr, PACKED: tl.constexpr,
    ):  # fmt: skip
        token = tl.program_id(0).to(tl.int64)
        position = tl.load(position_ids + token) if PACKED else token % length
        angle = position * (D // 2) + tl.arange(0, D // 2)[None, :]
        c, s = tl.load(cos + angle).to(tl.float32), tl.load(sin + angle).to(tl.float32)
        base = qkv + token * (heads + 2 * kv_heads) * D
        _rope_qk_norm(base, q + token * heads * D, 0, heads, c, s, eps, D, PADDED)
        _rope_qk_norm(base, k + token * kv_heads * D, heads, kv_heads, c, s, eps, D, KV_PADDED)
        if GATED:
            head = tl.arange(0, KV_PADDED)[:, None]
            channel = tl.arange(0, D)[None, :]
            inside = (head < kv_heads) & (channel < D)
            value = tl.load(base + (heads + kv_heads + head) * D + channel, mask=inside, other=0.0).to(tl.float32)
            gate = tl.load(gates + token * kv_heads + head, mask=head < kv_heads, other=0.0).to(tl.float32)
            entry = tl.load(ids + token) * kv_heads * D
            extra = tl.load(table + entry + head * D + channel, mask=inside, other=0.0).to(tl.float32)
            value += 3.0 / (1.0 + tl.exp(-gate)) * extra
            tl.store(v + token * kv_heads * D + head * D + channel, value.to(v.dtype.element_ty), mask=inside)

    @triton.jit
    def _qkv_backward(
        qkv, dq, dk, dv, dqkv, cos, sin, ids, table, gates, dgates, dextra, position_ids, length, heads, kv_heads, eps,
        D: tl.constexpr, PADDED: tl.constexpr, KV_PADDED: tl.constexpr, GATED: tl.constexpr, PACKED: tl.constexpr,
    ):  # fmt: skip
        token = tl.program_id(0).to(tl.int64)
        position = tl.load(position_ids + token) if PACKED else token % length
        angle = position * (D // 2) + tl.arange(0, D // 2)[None, :]
        c, s = tl.load(cos + angle).to(tl.float32), tl.load(sin + angle).to(tl.float32)
        base, out = qkv + token * (heads + 2 * kv_heads) * D, dqkv + token * (heads + 2 * kv_heads) * D
        _rope_qk_norm_grad(base, dq + token * heads * D, out, 0, heads, c, s, eps, D, PADDED)
        _rope_qk_norm_grad(base, dk + token * kv_heads * D, out, heads, kv_heads, c, s, eps, D, KV_PADDED)
        head = tl.arange(0, KV_PADDED)[:, None]
        channel = tl.arange(0, D)[None, :]
        inside = (head < kv_heads) & (channel < D)
        grad = tl.load(dv + token * kv_heads * D + head * D + channel, mask=inside, other=0.0)
        tl.store(out + (heads + kv_heads + head) * D + channel, grad, mask=inside)
        if GATED:
            grad = grad.to(tl.float32)
            gate = tl.load(gates + token * kv_heads + head, mask=head < kv_heads, other=0.0).to(tl.float32)
            entry = tl.load(ids + token) * kv_heads * D
            extra = tl.load(table + entry + head * D + channel, mask=inside, other=0.0).to(tl.float32)
            sigmoid = 1.0 / (1.0 + tl.exp(-gate))  # (KV_PADDED, 1)
            dgate = tl.sum(grad * extra, 1)[:, None] * 3.0 * sigmoid * (1.0 - sigmoid)
            tl.store(dgates + token * kv_heads + head, dgate.to(dgates.dtype.element_ty), mask=head < kv_heads)
            where = token * kv_heads * D + head * D + channel
            tl.store(dextra + where, (3.0 * sigmoid * grad).to(dextra.dtype.element_ty), mask=inside)


class _SplitQKV(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, cos, sin, kv_heads, eps, index, table, gates, position_ids):
        batch, length, _ = qkv.shape
        ids = None if index is None else index.ids
        dim, gated, packed = 2 * cos.shape[-1], gates is not None, position_ids is not None
        heads = qkv.shape[-1] // dim - 2 * kv_heads
        q, k = qkv.new_empty(batch, length, heads, dim), qkv.new_empty(batch, length, kv_heads, dim)
        v = torch.empty_like(k) if gated else qkv[..., -kv_heads * dim :].unflatten(-1, (kv_heads, dim))
        ctx.sizes = dict(D=dim, PADDED=triton.next_power_of_2(heads), KV_PADDED=triton.next_power_of_2(kv_heads))
        ctx.sizes |= dict(GATED=gated, PACKED=packed, num_warps=4)
        _qkv_forward[(batch * length,)](
            qkv, q, k, v, cos, sin, ids, table, gates, position_ids, length, heads, kv_heads, eps, **ctx.sizes
        )
        ctx.save_for_backward(qkv, cos, sin, ids, gates, position_ids)
        ctx.eps, ctx.index, ctx.table = eps, index, table
        return q, k, v

    @staticmethod
    def backward(ctx, *grads):
        (qkv, cos, sin, ids, gates, position_ids), table = ctx.saved_tensors, ctx.table
        dq, dk, dv = (grad.contiguous() for grad in grads)
        batch, length, heads, _ = dq.shape
        dqkv, dgates, dextra, dtable = torch.empty_like(qkv), None, None, None
        if gates is not None:
            dgates, dextra = torch.empty_like(gates), torch.empty_like(dv)
        _qkv_backward[(batch * length,)](
            qkv, dq, dk, dv, dqkv, cos, sin, ids, table, gates, dgates, dextra, position_ids, length, heads,
            dk.shape[2], ctx.eps, **ctx.sizes,
        )  # fmt: skip
        if gates is not None and table.requires_grad:
            dtable = ctx.index.accumulate_grad(table, dextra.flatten(2))
        return dqkv, None, None, None, None, None, dtable, dgates, None


def split_qkv(
    qkv, cos, sin, kv_heads, eps, value_embeds=None, gates=None, position_ids=None
) -> tuple[Tensor, Tensor, Tensor]:
    """q and k rotated and normed, and v with its value embedding, from the joint output of their projections.

    Args:
        qkv: (B, T, (H + 2K) * D), the q heads first, then k, then v.
        cos, sin: (T, 1, D / 2), to rotate by -angle in half-split layout; the norm comes after it.
        value_embeds, gates: (B, T, K * D), or `EmbeddingRows` of a table (V, K * D), and (B, T, K) before their
            sigmoid: v += 3 sigmoid(gate) * value_embed; None in a layer without.
        position_ids: (B, T) positions within documents, below T; None: 0 to T - 1.

    Returns: q (B, T, H, D), k and v (B, T, K, D).
    """
    rows = value_embeds if isinstance(value_embeds, EmbeddingRows) else None
    if not (torch.compiler.is_compiling() or torch.is_tensor(value_embeds)) and usable("rotary and QK norm", qkv):
        value = (None, None) if rows is None else (rows.index, rows.table)
        return _SplitQKV.apply(qkv, cos, sin, kv_heads, eps, *value, gates, position_ids)
    dim = 2 * cos.shape[-1]
    if position_ids is not None:
        cos, sin = cos[position_ids], sin[position_ids]
    parts = qkv.unflatten(-1, (-1, dim)).split((qkv.shape[-1] // dim - 2 * kv_heads, kv_heads, kv_heads), dim=-2)
    q, k = (_rope_qk_norm_reference(part, cos, sin, eps) for part in parts[:2])
    v = parts[2]
    if gates is not None:
        extra = value_embeds if rows is None else rows.index.lookup(rows.table)
        v = v + 3 * torch.sigmoid(gates).unsqueeze(-1) * extra.to(v.dtype).view_as(v)
    return q, k, v


def _rope_qk_norm_reference(x: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    rotated = torch.cat((first * cos + second * sin, second * cos - first * sin), dim=-1)
    return F.rms_norm(rotated, rotated.shape[-1:], eps=eps)


class FlashMask(NamedTuple):
    """For FlashAttention-4, which takes windows as numbers: where documents begin and the last one ends, (N + 1,)."""

    cu_seqlens: Tensor | None = None


def uses_flash(x: Tensor) -> bool:
    """Whether FlashAttention-4 runs on a device and in a dtype like those of x."""
    ready = flash_attn_func is not None and x.is_cuda and x.dtype == torch.bfloat16
    return ready and usable(FLASH, x) and usable(FLASH_DOCUMENTS, x)


def attention_mask(x: Tensor, window: int | None, position_ids=None, max_documents: int = 0, flash: bool = False):
    """The mask that `attention` takes for inputs like x (B, T, C), which also chooses its implementation.

    Args:
        window: number of keys that a query sees, itself included; None: all before it.
        position_ids: (B, T) positions within documents, 0 where one begins; None: each sequence is one document.
        max_documents: at least as many as begin in `position_ids`; fixes the shape of `cu_seqlens`.
        flash: for FlashAttention-4.
    """
    batch, length = x.shape[:2]
    if flash:
        if position_ids is None:
            return FlashMask()
        index = torch.arange(batch * length, device=x.device, dtype=torch.int32)
        starts = torch.where(position_ids.flatten() == 0, index, batch * length)
        ends = F.pad(starts.sort().values, (0, 1), value=batch * length)
        return FlashMask(ends[: max_documents + 1].contiguous())
    if position_ids is None and (window is None or window >= length):
        return None
    if not x.is_cuda:
        return boolean_mask(length, window, position_ids, x.device)

    def visible(row, head, query, key):
        mask = query >= key
        if window is not None:
            mask = mask & (query - key < window)
        return mask if position_ids is None else mask & (query - key <= position_ids[row, query])

    return create_block_mask(visible, None if position_ids is None else batch, None, length, length, device=x.device)


def boolean_mask(length: int, window: int | None, position_ids: Tensor | None, device: torch.device) -> Tensor:
    """(T, T), or (B, 1, T, T) with position_ids: True where a query sees a key."""
    index = torch.arange(length, device=device)
    distance = index[:, None] - index
    mask = (distance >= 0) & (distance < (window or length))
    return mask if position_ids is None else (mask & (distance <= position_ids[..., None]))[:, None]


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, mask=None) -> Tensor:
    """Causal attention of q (B, T, H, D) to k, v (B, T, K, D), softmax of `scale` times q k^T: (B, T, H, D).

    window: as in `attention_mask`. mask: the `attention_mask` for it.
    """
    if isinstance(mask, FlashMask):
        extent = dict(causal=True) if window is None else dict(window_size=(window - 1, 0))
        if mask.cu_seqlens is None:
            return flash_attn_func(q, k, v, softmax_scale=scale, **extent)[0]
        extent |= dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), mask.cu_seqlens)
        extent |= dict.fromkeys(("max_seqlen_q", "max_seqlen_k"), q.shape[1])
        joined = (x.flatten(0, 1) for x in (q, k, v))
        return flash_attn_varlen_func(*joined, softmax_scale=scale, **extent)[0].view(q.shape)
    grouped = q.shape[2] != k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if isinstance(mask, BlockMask):
        run = flex_attention if torch.compiler.is_compiling() else compiled(flex_attention)
        out = run(q, k, v, block_mask=mask, scale=scale, enable_gqa=grouped)
    else:
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
        )
    return out.transpose(1, 2)


def _joint_inputs(draw, config, length: int) -> tuple:
    """qkv (2, T, (H + 2K) D), cos, sin, K, eps, and of the value embedding index, table, gates."""
    dim, kv_heads = config.head_dim, config.num_key_value_heads
    qkv = draw(2, length, (config.num_attention_heads + 2 * kv_heads) * dim)
    angle = draw(length, 1, dim // 2, dtype=torch.float32)
    index = EmbeddingGradIndex(torch.arange(2 * length, device=qkv.device).view(2, length) * 7 % 60, 60)
    value = index, draw(60, kv_heads * dim), draw(2, length, kv_heads)
    return qkv, angle.cos().to(qkv.dtype), angle.sin().to(qkv.dtype), kv_heads, 1e-6, *value


@check("rotary and QK norm", instead="PyTorch's operations")
def _qkv_cases(draw, config):
    qkv, *angles, index, table, gates = _joint_inputs(draw, config, 48)
    position_ids = torch.arange(48, device=qkv.device).repeat(2, 1) % 31

    def gated(qkv, table, gates):
        return split_qkv(qkv, *angles, EmbeddingRows(index, table), gates)

    yield 0.02, lambda: with_gradients(gated, (qkv, table, gates))
    yield 0.02, lambda: with_gradients(lambda qkv: split_qkv(qkv, *angles, position_ids=position_ids), (qkv,))


def _attention_cases(draw, config, documents: bool = False):
    length, scale = 320, config.head_dim**-0.5
    qkv, *angles, index, table, gates = _joint_inputs(draw, config, length)
    position_ids = torch.arange(length, device=qkv.device).repeat(2, 1) % 130 if documents else None

    def attend(window, qkv, gates=None):
        value = () if gates is None else (EmbeddingRows(index, table), gates)
        q, k, v = split_qkv(qkv, *angles, *value, position_ids=position_ids)
        if uses_flash(q):
            mask = attention_mask(q, window, position_ids, 6, flash=True)
        else:
            mask = boolean_mask(length, window, position_ids, q.device)
        return [attention(q, k, v, scale, window, mask)]

    for window in (None, 100):
        for inputs in ((qkv, gates), (qkv,)):
            yield 0.02, partial(with_gradients, partial(attend, window), inputs)


check(FLASH, instead="FlexAttention")(_attention_cases)
check(FLASH_DOCUMENTS, instead="FlexAttention")(partial(_attention_cases, documents=True))
