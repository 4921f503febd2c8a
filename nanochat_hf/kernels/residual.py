"""The residual stream before a block: the sum of both parts that the last block left, the embedding's share, the norm.

`residual_mix` is one pass over the residual stream forward and one backward. It moves less memory than what a compiler
fuses: the gradient of the embedding, to which every layer contributes, is accumulated in one tensor, where autograd
would write one per layer and add them in further passes; and the backward pass recomputes what the residual scale
multiplied from the mixed stream, so it reads one tensor instead of two.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import check, tl, triton, usable, with_gradients

if triton is not None:

    @triton.jit
    def _mix(x, y, x0, scale, share, mixed, normed, columns, eps, BLOCK: tl.constexpr):
        """One row: mixed = scale (x + y) + share x0 (scale None: x + y; y None: x alone), and its RMS norm."""
        column = tl.arange(0, BLOCK)
        at, inside = tl.program_id(0).to(tl.int64) * columns + column, column < columns
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        if y is not None:
            value += tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
        if scale is not None:
            first = tl.load(x0 + at, mask=inside, other=0.0).to(tl.float32)
            value = tl.load(scale).to(tl.float32) * value + tl.load(share).to(tl.float32) * first
        rounded = value.to(mixed.dtype.element_ty)  # the backward pass norms what was stored
        value = rounded.to(tl.float32)
        tl.store(mixed + at, rounded, mask=inside)
        value *= tl.rsqrt(tl.sum(value * value, 0) / columns + eps)
        tl.store(normed + at, value.to(normed.dtype.element_ty), mask=inside)

    @triton.jit
    def _mix_grad(
        dmixed, dnormed, mixed, x0, scale, share, dx, total, parts, rows, columns, eps,
        FRESH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """ROWS rows: dx, share times the gradient added to total (FRESH: written), partial sums for both scalars."""
        column = tl.arange(0, BLOCK)
        along_before, along_first = 0.0, 0.0
        if scale is not None:
            a, b = tl.load(scale).to(tl.float32), tl.load(share).to(tl.float32)
        for i in range(ROWS):
            row = tl.program_id(0).to(tl.int64) * ROWS + i
            at, inside = row * columns + column, (column < columns) & (row < rows)
            value = tl.load(mixed + at, mask=inside, other=0.0).to(tl.float32)
            grad = tl.load(dnormed + at, mask=inside, other=0.0).to(tl.float32)
            onward = tl.load(dmixed + at, mask=inside, other=0.0).to(tl.float32)
            inverse = tl.rsqrt(tl.sum(value * value, 0) / columns + eps)
            unit = value * inverse
            grad = onward + inverse * (grad - unit * (tl.sum(grad * unit, 0) / columns))
            if scale is None:
                tl.store(dx + at, grad.to(dx.dtype.element_ty), mask=inside)
            else:
                tl.store(dx + at, (a * grad).to(dx.dtype.element_ty), mask=inside)
                first = tl.load(x0 + at, mask=inside, other=0.0).to(tl.float32)
                before = tl.where(a == 0.0, 0.0, (value - b * first) / a)  # x + y
                along_before += tl.sum(grad * before, 0)
                along_first += tl.sum(grad * first, 0)
                grad *= b
                if not FRESH:
                    grad += tl.load(total + at, mask=inside, other=0.0).to(tl.float32)
                tl.store(total + at, grad.to(total.dtype.element_ty), mask=inside)
        if scale is not None:
            tl.store(parts + 2 * tl.program_id(0), along_before)
            tl.store(parts + 2 * tl.program_id(0) + 1, along_first)


ROWS = 2  # per program in the backward pass


class EmbeddingResidual:
    """The embedding x0 (B, T, C) of one forward pass, and its gradient as far as it has been accumulated."""

    def __init__(self, value: Tensor):
        self.value, self.grad = value, None


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, x0, scale, share, eps, embedded):
        rows, columns = x.shape[:-1].numel(), x.shape[-1]
        mixed, normed = torch.empty_like(x), torch.empty_like(x)
        block = triton.next_power_of_2(columns)
        _mix[(rows,)](x, y, x0, scale, share, mixed, normed, columns, eps, BLOCK=block, num_warps=warps(block))
        ctx.save_for_backward(mixed, x0, scale, share)
        ctx.eps, ctx.embedded, ctx.first = eps, embedded, y is None
        return mixed, normed

    @staticmethod
    def backward(ctx, dmixed, dnormed):
        mixed, x0, scale, share = ctx.saved_tensors
        embedded, rows, columns = ctx.embedded, mixed.shape[:-1].numel(), mixed.shape[-1]
        dx, total, parts, fresh = torch.empty_like(mixed), None, None, True
        if scale is not None:
            fresh = embedded.grad is None
            total = torch.empty_like(mixed) if fresh else embedded.grad
            parts = torch.empty(triton.cdiv(rows, ROWS), 2, dtype=torch.float32, device=mixed.device)
        block = triton.next_power_of_2(columns)
        _mix_grad[(triton.cdiv(rows, ROWS),)](
            dmixed.contiguous(), dnormed.contiguous(), mixed, x0, scale, share, dx, total, parts, rows, columns,
            ctx.eps, FRESH=fresh, ROWS=ROWS, BLOCK=block, num_warps=warps(block),
        )  # fmt: skip
        dy = None if ctx.first else dx
        if scale is None:
            return dx, dy, *[None] * 5
        # The first layer is differentiated last, so it returns the sum.
        embedded.grad = None if ctx.first else total
        return dx, dy, total if ctx.first else None, *parts.sum(0).unbind(), None, None


def warps(block: int) -> int:
    return max(1, block // 512)


def residual_mix(
    x: Tensor, y: Tensor | None, embedded: EmbeddingResidual | None, lambdas: tuple[Tensor, Tensor] | None, eps: float
) -> tuple[Tensor, Tensor]:
    """The residual stream s = a (x + y) + b x0, and its RMS norm, both (B, T, C).

    Args:
        x, y: (B, T, C); y is None in the first layer, where x is the embedding itself.
        embedded: the embedding x0, one object for all layers of a forward pass, each of which mixes once.
        lambdas: the scalars a and b; None: s = x + y.
    """
    if not torch.compiler.is_compiling() and usable("residual mix", x):  # torch.compile fuses by itself
        x0 = None if lambdas is None else embedded.value
        return _Mix.apply(x, y, x0, *(lambdas or (None, None)), eps, embedded)
    if y is not None:
        x = x + y
    if lambdas is not None:
        x = lambdas[0] * x + lambdas[1] * embedded.value
    return x, F.rms_norm(x, x.shape[-1:], eps=eps)


@check("residual mix", instead="PyTorch's operations")
def _cases(draw, config):
    x, y, z = (draw(1, 40, config.hidden_size) for _ in range(3))
    scale, share = (draw(2, dtype=torch.float32).abs() + 0.5 for _ in range(2))

    def layers(x, y, z, scale, share):
        embedded = EmbeddingResidual(x)
        first, normed = residual_mix(x, None, embedded, (scale[0], share[0]), 1e-6)
        second, last = residual_mix(first, y * normed, embedded, (scale[1], share[1]), 1e-6)
        return normed, *residual_mix(second, z * last, None, None, 1e-6)

    inputs = x, y, z, scale, share
    yield 0.02, lambda: with_gradients(layers, inputs)[:-2]
    # The scalars' gradients are sums of terms that cancel: bf16 rounds each, so the sums agree less than the terms.
    yield 0.25, lambda: with_gradients(layers, inputs)[-2:]
