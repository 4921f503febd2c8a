"""Attention of the training step and what comes before it, each beside a plain PyTorch twin (see `kernels.py`).

- RoPE, QK norm and the gated value embedding are one pass over the joint product of q, k and v, one more backward.
- attention: FlashAttention-4 (Dao-AILab/flash-attention, package flash-attn-4) knows sliding windows and documents, so
  a short layer costs what its window costs; without it FlexAttention (arXiv:2412.05496) does the same with a block
  mask. FlashAttention reads v, where nothing is added to it, in the joint product, and writes its gradient there.
"""

import os
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from .backend import check, triton, unavailable, usable, with_gradients
from .fused_cross_entropy import compiled

os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")  # keep compiled kernels on disk, as quack does
try:
    from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd
except Exception as error:  # these functions are private: another version may lack them, or raise anything
    _flash_attn_fwd = _flash_attn_bwd = unavailable("flash-attn-4", error)

FLASH = ("rotary and QK norm", "FlashAttention-4", "FlashAttention-4 over documents")  # what it needs

if triton is not None:
    import triton.language as tl

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
        qkv, q, k, v, cos, sin, ids, table, gates, positions, length, heads, kv_heads, eps,
        D: tl.constexpr, PADDED: tl.constexpr, KV_PADDED: tl.constexpr, GATED: tl.constexpr, PACKED: tl.constexpr,
    ):  # fmt: skip
        token = tl.program_id(0).to(tl.int64)
        position = tl.load(positions + token) if PACKED else token % length
        angle = position * (D // 2) + tl.arange(0, D // 2)[None, :]
        c, s = tl.load(cos + angle).to(tl.float32), tl.load(sin + angle).to(tl.float32)
        base = qkv + token * (heads + 2 * kv_heads) * D
        _rope_qk_norm(base, q + token * heads * D, 0, heads, c, s, eps, D, PADDED)
        _rope_qk_norm(base, k + token * kv_heads * D, heads, kv_heads, c, s, eps, D, KV_PADDED)
        if v is not None:
            head = tl.arange(0, KV_PADDED)[:, None]
            channel = tl.arange(0, D)[None, :]
            inside = (head < kv_heads) & (channel < D)
            value = tl.load(base + (heads + kv_heads + head) * D + channel, mask=inside, other=0.0).to(tl.float32)
            if GATED:
                gate = tl.load(gates + token * kv_heads + head, mask=head < kv_heads, other=0.0).to(tl.float32)
                entry = tl.load(ids + token) * kv_heads * D
                extra = tl.load(table + entry + head * D + channel, mask=inside, other=0.0).to(tl.float32)
                value += 3.0 / (1.0 + tl.exp(-gate)) * extra
            tl.store(v + token * kv_heads * D + head * D + channel, value.to(v.dtype.element_ty), mask=inside)

    @triton.jit
    def _qkv_backward(
        qkv, dq, dk, dv, dqkv, cos, sin, ids, table, gates, dgates, dextra, positions, length, heads, kv_heads, eps,
        D: tl.constexpr, PADDED: tl.constexpr, KV_PADDED: tl.constexpr, GATED: tl.constexpr, PACKED: tl.constexpr,
    ):  # fmt: skip
        token = tl.program_id(0).to(tl.int64)
        position = tl.load(positions + token) if PACKED else token % length
        angle = position * (D // 2) + tl.arange(0, D // 2)[None, :]
        c, s = tl.load(cos + angle).to(tl.float32), tl.load(sin + angle).to(tl.float32)
        base, out = qkv + token * (heads + 2 * kv_heads) * D, dqkv + token * (heads + 2 * kv_heads) * D
        _rope_qk_norm_grad(base, dq + token * heads * D, out, 0, heads, c, s, eps, D, PADDED)
        _rope_qk_norm_grad(base, dk + token * kv_heads * D, out, heads, kv_heads, c, s, eps, D, KV_PADDED)
        if dv is not None:
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
                opening = 1.0 / (1.0 + tl.exp(-gate))  # (KV_PADDED, 1)
                dgate = tl.sum(grad * extra, 1)[:, None] * 3.0 * opening * (1.0 - opening)
                tl.store(dgates + token * kv_heads + head, dgate.to(dgates.dtype.element_ty), mask=head < kv_heads)
                where = token * kv_heads * D + head * D + channel
                tl.store(dextra + where, (3.0 * opening * grad).to(dextra.dtype.element_ty), mask=inside)

    def _qkv_sizes(qkv, cos, kv_heads):
        dim = 2 * cos.shape[-1]
        heads = qkv.shape[-1] // dim - 2 * kv_heads
        padded = dict(D=dim, PADDED=triton.next_power_of_2(heads), KV_PADDED=triton.next_power_of_2(kv_heads))
        return heads, dim, padded

    def _split(qkv, cos, sin, kv_heads, eps, ids, table, gates, positions, with_v: bool):
        batch, length, _ = qkv.shape
        heads, dim, padded = _qkv_sizes(qkv, cos, kv_heads)
        q, k = qkv.new_empty(batch, length, heads, dim), qkv.new_empty(batch, length, kv_heads, dim)
        v = torch.empty_like(k) if with_v else None
        _qkv_forward[(batch * length,)](
            qkv, q, k, v, cos, sin, ids, table, gates, positions, length, heads, kv_heads, eps,
            GATED=gates is not None, PACKED=positions is not None, num_warps=4, **padded,
        )  # fmt: skip
        return q, k, v

    def _split_grad(dq, dk, dv, dqkv, qkv, cos, sin, eps, ids, table, gates, positions):
        """Completes dqkv, where dv None says that its part of v is there already -> dgates, dextra."""
        batch, length, kv_heads, _ = dk.shape
        heads, dim, padded = _qkv_sizes(qkv, cos, kv_heads)
        gated = gates is not None
        dgates = torch.empty_like(gates) if gated else qkv.new_empty(0)
        dextra = qkv.new_empty(batch, length, kv_heads * dim) if gated else qkv.new_empty(0)
        _qkv_backward[(batch * length,)](
            qkv, dq, dk, dv, dqkv, cos, sin, ids, table, gates, dgates, dextra, positions, length, heads, kv_heads,
            eps, GATED=gated, PACKED=positions is not None, num_warps=4, **padded,
        )  # fmt: skip
        return dgates, dextra

    def _fake_grads(qkv, gates, kv_heads, dim):
        none = qkv.new_empty(0)
        extra = none if gates is None else qkv.new_empty(*qkv.shape[:2], kv_heads * dim)
        return torch.empty_like(qkv), none if gates is None else torch.empty_like(gates), extra

    @torch.library.custom_op("nanochat_hf::qkv", mutates_args=())
    def _qkv(
        qkv: Tensor, cos: Tensor, sin: Tensor, kv_heads: int, eps: float, ids: Tensor | None, table: Tensor | None,
        gates: Tensor | None, rows: Tensor | None, positions: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        return _split(qkv, cos, sin, kv_heads, eps, ids, table, gates, positions, with_v=True)

    @_qkv.register_fake
    def _(qkv, cos, sin, kv_heads, eps, ids, table, gates, rows, positions):
        heads, dim, _ = _qkv_sizes(qkv, cos, kv_heads)
        shape = qkv.shape[:2]
        return qkv.new_empty(*shape, heads, dim), *(qkv.new_empty(*shape, kv_heads, dim) for _ in range(2))

    @torch.library.custom_op("nanochat_hf::qkv_grad", mutates_args=())
    def _qkv_grad(
        dq: Tensor, dk: Tensor, dv: Tensor, qkv: Tensor, cos: Tensor, sin: Tensor, eps: float, ids: Tensor | None,
        table: Tensor | None, gates: Tensor | None, positions: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        dqkv, grads = torch.empty_like(qkv), (x.contiguous() for x in (dq, dk, dv))
        return dqkv, *_split_grad(*grads, dqkv, qkv, cos, sin, eps, ids, table, gates, positions)

    @_qkv_grad.register_fake
    def _(dq, dk, dv, qkv, cos, sin, eps, ids, table, gates, positions):
        return _fake_grads(qkv, gates, *dk.shape[2:])

    def _qkv_setup(ctx, inputs, output):
        qkv, cos, sin, _, ctx.eps, ids, table, gates, _, positions = inputs
        ctx.save_for_backward(qkv, cos, sin, ids, table, gates, positions)

    def _qkv_backward_rule(ctx, dq, dk, dv):
        qkv, cos, sin, ids, table, gates, positions = ctx.saved_tensors
        dqkv, dgates, dextra = _qkv_grad(dq, dk, dv, qkv, cos, sin, ctx.eps, ids, table, gates, positions)
        gated = gates is not None
        return dqkv, *[None] * 6, dgates if gated else None, dextra if gated else None, None

    _qkv.register_autograd(_qkv_backward_rule, setup_context=_qkv_setup)


def split_qkv(
    qkv, cos, sin, kv_heads, eps, ids=None, table=None, gates=None, rows=None, positions=None
) -> tuple[Tensor, Tensor, Tensor]:
    """The three products in one tensor -> what attention takes: q and k turned and normed, v with its embedding.

    Args:
        qkv: (B, T, (H + 2K) * D), the q heads first, then k, then v.
        cos, sin: (T, 1, D / 2); the turn is by -angle in half-split layout, and the norm comes after it.
        ids, table, gates: (B, T) token ids, (V, K * D) value embeddings, (B, T, K) gates before their sigmoid:
            v += 3 sigmoid(gate) * table[id]; None in a layer without.
        rows: (B, T, K * D) whose gradient is that of the rows table[id], their values are not read: on CUDA the table
            itself gets none (`leaves.Places.rows`).
        positions: (B, T) places of the tokens, below T, in rows of several documents; None: 0 to T - 1.

    Returns: q (B, T, H, D), k and v (B, T, K, D).
    """
    if usable("rotary and QK norm", qkv):
        return _qkv(qkv, cos, sin, kv_heads, eps, ids, table, gates, rows, positions)
    dim = 2 * cos.shape[-1]
    if positions is not None:
        cos, sin = cos[positions], sin[positions]
    parts = qkv.unflatten(-1, (-1, dim)).split((qkv.shape[-1] // dim - 2 * kv_heads, kv_heads, kv_heads), dim=-2)
    q, k = (_rope_qk_norm_reference(part, cos, sin, eps) for part in parts[:2])
    v = parts[2]
    if gates is not None:
        v = v + 3 * torch.sigmoid(gates).unsqueeze(-1) * F.embedding(ids, table).to(v.dtype).view_as(v)
    return q, k, v


def _rope_qk_norm_reference(x: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((first * cos + second * sin, second * cos - first * sin), dim=-1)
    return F.rms_norm(turned, turned.shape[-1:], eps=eps)


if _flash_attn_fwd is not None and triton is not None:

    def _extent(left: int) -> dict:
        return dict(causal=True) if left < 0 else dict(window_size_left=left, window_size_right=0)

    def _documents(starts: Tensor | None, q: Tensor) -> dict:
        if starts is None:
            return {}
        return dict(cu_seqlens_q=starts, cu_seqlens_k=starts, max_seqlen_q=q.shape[1], max_seqlen_k=q.shape[1])

    def _values(qkv: Tensor, k: Tensor) -> Tensor:
        """The part of v in qkv (or in its gradient), (B, T, K, D), in place."""
        return qkv[..., -k.shape[2] * k.shape[3] :].unflatten(-1, k.shape[2:])

    def _attend(
        qkv: Tensor, cos: Tensor, sin: Tensor, kv_heads: int, eps: float, ids: Tensor | None, table: Tensor | None,
        gates: Tensor | None, rows: Tensor | None, positions: Tensor | None, left: int, scale: float,
        starts: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        """-> output (B, T, H, D), log-sum-exp, q, k and v, which is empty where it is as in qkv and read there.

        left < 0 is full causal attention. starts: (N + 1,) int32, where documents begin in the rows laid end to end,
        the end of the last one included.
        """
        q, k, v = _split(qkv, cos, sin, kv_heads, eps, ids, table, gates, positions, with_v=gates is not None)
        parts = (q, k, _values(qkv, k) if v is None else v)
        parts = parts if starts is None else (x.flatten(0, 1) for x in parts)
        out, lse, *_ = _flash_attn_fwd(
            *parts, softmax_scale=scale, return_lse=True, **_extent(left), **_documents(starts, q)
        )
        return out.view(q.shape), lse, q, k, qkv.new_empty(0) if v is None else v

    _attend_op = torch.library.custom_op("nanochat_hf::attend", _attend, mutates_args=(), device_types="cuda")

    @_attend_op.register_fake
    def _(qkv, cos, sin, kv_heads, eps, ids, table, gates, rows, positions, left, scale, starts):
        heads, dim, _ = _qkv_sizes(qkv, cos, kv_heads)
        batch, length, _ = qkv.shape
        q, k = qkv.new_empty(batch, length, heads, dim), qkv.new_empty(batch, length, kv_heads, dim)
        shape = (batch, heads, length) if starts is None else (heads, batch * length)
        v = qkv.new_empty(0) if gates is None else torch.empty_like(k)
        return torch.empty_like(q), qkv.new_empty(shape, dtype=torch.float32), q, k, v

    def _attend_grad(
        grad: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, qkv: Tensor, cos: Tensor,
        sin: Tensor, eps: float, ids: Tensor | None, table: Tensor | None, gates: Tensor | None,
        positions: Tensor | None, left: int, scale: float, starts: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        dqkv = torch.empty_like(qkv)
        gated = gates is not None
        dv = torch.empty_like(v) if gated else _values(dqkv, k)
        parts = (q, k, v if gated else _values(qkv, k), out, grad.contiguous())
        dq, dk = torch.empty_like(q), torch.empty_like(k)
        into = {"dq": dq, "dk": dk, "dv": dv}
        if starts is not None:
            parts = (x.flatten(0, 1) for x in parts)
            into = {name: x.flatten(0, 1) for name, x in into.items()}  # views of the same memory
        _flash_attn_bwd(*parts, lse, scale, **_extent(left), **_documents(starts, q), **into)
        return dqkv, *_split_grad(
            dq, dk, dv if gated else None, dqkv, qkv, cos, sin, eps, ids, table, gates, positions
        )

    _attend_grad_op = torch.library.custom_op(
        "nanochat_hf::attend_grad", _attend_grad, mutates_args=(), device_types="cuda"
    )

    @_attend_grad_op.register_fake
    def _(grad, out, lse, q, k, v, qkv, cos, sin, eps, ids, table, gates, positions, left, scale, starts):
        return _fake_grads(qkv, gates, *k.shape[2:])

    def _attend_setup(ctx, inputs, output):
        qkv, cos, sin, _, ctx.eps, ids, table, gates, _, positions, ctx.left, ctx.scale, starts = inputs
        ctx.save_for_backward(*output, qkv, cos, sin, ids, table, gates, positions, starts)

    def _attend_backward(ctx, grad, run=_attend_grad_op):
        out, lse, q, k, v, qkv, cos, sin, ids, table, gates, positions, starts = ctx.saved_tensors
        dqkv, dgates, dextra = run(
            grad, out, lse, q, k, v, qkv, cos, sin, ctx.eps, ids, table, gates, positions, ctx.left, ctx.scale, starts
        )
        gated = gates is not None
        return dqkv, *[None] * 6, dgates if gated else None, dextra if gated else None, *[None] * 4

    _attend_op.register_autograd(lambda ctx, grad, *_: _attend_backward(ctx, grad), setup_context=_attend_setup)

    class _Attend(torch.autograd.Function):
        """The same without the compiler, which alone leaves out the zeros that stand for the others' gradients."""

        @staticmethod
        def forward(ctx, *inputs):
            output = _attend(*inputs)
            _attend_setup(ctx, inputs, output)
            return output[0]

        @staticmethod
        def backward(ctx, grad):
            return _attend_backward(ctx, grad, run=_attend_grad)


def uses_flash(x: Tensor) -> bool:
    """Whether `attend` runs FlashAttention-4 on a device and in a dtype like those of x."""
    ready = _flash_attn_fwd is not None and x.is_cuda and x.dtype == torch.bfloat16
    return ready and all(usable(name, x) for name in FLASH)


def attention_mask(x: Tensor, window: int | None, positions: Tensor | None = None, documents: int = 0):
    """What `attend` must be told besides the window: None if nothing, or what its implementation here takes.

    Args:
        x: (B, T, C) in the dtype and on the device of the network.
        positions: (B, T) places within documents, 0 where one begins; None for rows of one document each.
        documents: at least as many as documents begin in `positions`; fixes the shape of what FlashAttention takes.
    """
    batch, length = x.shape[:2]
    if uses_flash(x):
        if positions is None:
            return None
        place = torch.arange(batch * length, device=x.device, dtype=torch.int32)
        begins = torch.where(positions.flatten() == 0, place, batch * length)
        return F.pad(begins.sort().values, (0, 1), value=batch * length)[: documents + 1].contiguous()
    if positions is None and (window is None or window >= length):
        return None
    if not x.is_cuda:
        distance = torch.arange(length, device=x.device)
        distance = distance[:, None] - distance
        seen = (distance >= 0) & (distance < (window or length))
        return seen if positions is None else (seen & (distance <= positions[..., None]))[:, None]

    def visible(row, head, query, key):
        seen = query >= key
        if window is not None:
            seen = seen & (query - key < window)
        return seen if positions is None else seen & (query - key <= positions[row, query])

    return create_block_mask(visible, None if positions is None else batch, None, length, length, device=x.device)


def attend(
    qkv, cos, sin, kv_heads, eps, ids=None, table=None, gates=None, rows=None, positions=None, *, scale: float,
    window: int | None, mask=None,
) -> Tensor:  # fmt: skip
    """`split_qkv`, whose arguments come first, and `attention` over what it gives: (B, T, H, D)."""
    if uses_flash(qkv):
        left = -1 if window is None else window - 1
        inputs = (qkv, cos, sin, kv_heads, eps, ids, table, gates, rows, positions, left, scale, mask)
        return _attend_op(*inputs)[0] if torch.compiler.is_compiling() else _Attend.apply(*inputs)
    q, k, v = split_qkv(qkv, cos, sin, kv_heads, eps, ids, table, gates, rows, positions)
    return attention(q, k, v, scale, window, mask)


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, mask=None) -> Tensor:
    """Causal attention of q (B, T, H, D) to k, v (B, T, K, D), softmax of `scale` times the products; in PyTorch.

    window: number of keys that a query sees, the own one included, or None for all. mask: the `attention_mask` of it.
    Returns (B, T, H, D).
    """
    grouped = q.shape[2] != k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if mask is None or not q.is_cuda:
        causal = mask is None
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped
        )
    else:
        run = flex_attention if torch.compiler.is_compiling() else compiled(flex_attention)
        out = run(q, k, v, block_mask=mask, scale=scale, enable_gqa=grouped)
    return out.transpose(1, 2)


def _joint_inputs(draw, config, length: int):
    """-> qkv (1, T, (H + 2K) D), cos, sin, K, and what belongs to the value embedding: ids, table, gates."""
    dim, kv_heads = config.head_dim, config.num_key_value_heads
    qkv = draw(1, length, (config.num_attention_heads + 2 * kv_heads) * dim)
    angle = draw(length, 1, dim // 2, dtype=torch.float32)
    ids = torch.arange(length, device=qkv.device)[None] * 7 % 60
    value = ids, draw(60, kv_heads * dim), draw(1, length, kv_heads)
    return qkv, angle.cos().to(qkv.dtype), angle.sin().to(qkv.dtype), kv_heads, value


@check("rotary and QK norm", instead="PyTorch's operations")
def _qkv_cases(draw, config):
    qkv, cos, sin, kv_heads, (ids, table, gates) = _joint_inputs(draw, config, 48)
    positions = torch.arange(48, device=qkv.device)[None] % 31

    def gated(qkv, gates, rows):
        # The kernel reads the table and gives the rows their gradient; the reference gets it through the table.
        if usable("rotary and QK norm", qkv):
            return split_qkv(qkv, cos, sin, kv_heads, 1e-6, ids, table, gates, rows)
        places = torch.arange(48, device=qkv.device)[None]
        return split_qkv(qkv, cos, sin, kv_heads, 1e-6, places, rows[0], gates)

    yield 0.02, lambda: with_gradients(gated, (qkv, gates, table[ids]))
    packed = lambda qkv: split_qkv(qkv, cos, sin, kv_heads, 1e-6, positions=positions)  # noqa: E731
    yield 0.02, lambda: with_gradients(packed, (qkv,))


def _attention_cases(draw, config, documents: bool = False):
    length = 320
    qkv, cos, sin, kv_heads, (ids, table, gates) = _joint_inputs(draw, config, length)
    positions = torch.arange(length, device=qkv.device)[None] % 130 if documents else None
    place = torch.arange(length, device=qkv.device)
    distance = place[:, None] - place
    since = place[:, None] if positions is None else positions.t()  # how far back a query's document begins
    scale = config.head_dim**-0.5

    def inputs(qkv, gates):
        value = (None,) * 4 if gates is None else (ids, table, gates, table[ids])
        return qkv, cos, sin, kv_heads, 1e-6, *value

    for window in (None, 100):
        visible = (distance >= 0) & (distance < (window or length)) & (distance <= since)

        def joint(qkv, gates, window=window, visible=visible):
            if uses_flash(qkv):
                mask = attention_mask(qkv, window, positions, 3)
                return [attend(*inputs(qkv, gates), positions, scale=scale, window=window, mask=mask)]
            q, k, v = (x.transpose(1, 2) for x in split_qkv(*inputs(qkv, gates), positions))
            out = F.scaled_dot_product_attention(q, k, v, visible, scale=scale, enable_gqa=True)
            return [out.transpose(1, 2)]

        yield 0.02, lambda joint=joint: with_gradients(joint, (qkv, gates))
        yield 0.02, lambda joint=joint: with_gradients(lambda qkv: joint(qkv, None), (qkv,))


check("FlashAttention-4", instead="FlexAttention")(_attention_cases)
check("FlashAttention-4 over documents", instead="FlexAttention")(partial(_attention_cases, documents=True))
