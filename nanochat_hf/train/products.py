"""The matrix products of a block: their gradients go straight into `.grad`, and what lies between is part of them.

- A weight comes as `Weight`, its bf16 copy and the float32 parameters whose rows that holds: the gradient's product
  adds to their `.grad` in its own epilogue, where autograd would write a bf16 gradient, cast it and add it. Under
  torch.compile, which cannot see that, a weight is a tensor and its gradient autograd's.
- All that follows attention in a block, its output projection, the residual addition, the norm and the MLP, is one
  operation of three products (`epilogues`), which keeps the stream and relu(h)^2 for the backward pass and no more.
- Either in 8 bits, if the weight comes as `float8.Weight8`.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .epilogues import norm_grad, plus_residual, product, relu2, relu2_grad
from .float8 import Linear8, Relu2MLP8, Weight8
from .leaves import added
from .stream import mix


class Weight(NamedTuple):
    """A matrix in the dtype of the products, (sum of N_i, C), and the parameters (N_i, C) it was copied from."""

    low: Tensor
    parts: tuple[Tensor, ...]


def gradients(weight: Weight, dy: Tensor, x: Tensor) -> list[Tensor | None]:
    """dy (N, O), x (N, C) -> the gradient of each part of a weight (O, C); None where it is in its `.grad` already."""
    found, rows = [], [len(part) for part in weight.parts]
    for part, grad in zip(weight.parts, dy.split(rows, dim=1)):
        if not part.requires_grad:
            found.append(None)
        elif not (x.is_cuda and part.dtype == torch.float32):
            found.append(added(part, grad.t() @ x))
        elif part.grad is None:
            found.append(torch.mm(grad.t(), x, out_dtype=torch.float32))
        else:
            torch.addmm(part.grad, grad.t(), x, out_dtype=torch.float32, out=part.grad)
            found.append(None)
    return found


class _Linear(torch.autograd.Function):
    """y = x w^T, and the gates of the value embedding, which a small matrix makes of x's first channels, with it."""

    @staticmethod
    def forward(ctx, x, gate, low, *parts):
        ctx.weight = Weight(low, parts)
        ctx.save_for_backward(x, gate)
        return product(x, low.t()), None if gate is None else x[:, : gate.shape[1]] @ gate.t()

    @staticmethod
    def backward(ctx, dy, dgates):
        x, gate = ctx.saved_tensors
        dx, dgate = product(dy, ctx.weight.low), None
        if gate is not None:
            channels = slice(gate.shape[1])
            dx[:, channels].addmm_(dgates, gate)
            dgate = dgates.t() @ x[:, channels]
        return dx, dgate, None, *gradients(ctx.weight, dy, x)


def linear(x: Tensor, w: Weight | Weight8 | Tensor) -> Tensor:
    """x (..., C) times w (O, C) transposed -> (..., O)."""
    return linear_and_gates(x, w, None)[0]


def linear_and_gates(
    x: Tensor, w: Weight | Weight8 | Tensor, gate: Tensor | None, bound: float | None = None
) -> tuple[Tensor, Tensor | None]:
    """`linear`, and x's first G channels times gate (K, G) transposed -> (..., K), if there is a gate.

    bound: what no magnitude in x exceeds, if that is known; saves 8-bit products a pass over x.
    """
    gate = None if gate is None else gate.to(x.dtype)
    if isinstance(w, Tensor):
        return F.linear(x, w), None if gate is None else F.linear(x[..., : gate.shape[1]], gate)
    if isinstance(w, Weight8):
        y, gates = Linear8.apply(x.flatten(0, -2), gate, bound, w, *w.parts)
    else:
        y, gates = _Linear.apply(x.flatten(0, -2), gate, w.low, *w.parts)
    return y.unflatten(0, x.shape[:-1]), None if gate is None else gates.unflatten(0, x.shape[:-1])


class _ResidualMLP(torch.autograd.Function):
    """`residual_mlp` over rows (N, C)."""

    @staticmethod
    def forward(ctx, x, seen, eps, wo, w1, w2, *parts):
        x, scale = plus_residual(seen, wo.low.t(), x, eps)
        squared = relu2(x, w1.low.t(), scale)
        ctx.weights = wo, w1, w2
        ctx.save_for_backward(seen, x, scale, squared)
        return x, product(squared, w2.low.t())

    @staticmethod
    def backward(ctx, dx, dy):
        seen, x, scale, squared = ctx.saved_tensors
        (wo, w1, w2), dx, dy = ctx.weights, dx.contiguous(), dy.contiguous()
        dh, factor = relu2_grad(dy, w2.low, squared, scale, x.shape[1])
        dx = norm_grad(dh, w1.low, dx, x, factor)
        return (
            dx, product(dx, wo.low), *[None] * 4, *gradients(wo, dx, seen), *gradients(w1, dh, x),
            *gradients(w2, dy, squared),
        )  # fmt: skip


def relu2_mlp(x: Tensor, w1: Weight8 | Tensor, w2: Weight8 | Tensor, bound: float | None = None) -> Tensor:
    """relu(x w1^T)^2 w2^T for x (B, T, C), w1 (H, C), w2 (C, H), all of one dtype; bound as above."""
    if isinstance(w1, Weight8):
        return Relu2MLP8.apply(x.flatten(0, -2), bound, w1, w2, *w1.parts, *w2.parts).unflatten(0, x.shape[:-1])
    return linear(F.relu(linear(x, w1)).square(), w2)


def residual_mlp(x: Tensor, seen: Tensor, wo, w1, w2, eps: float) -> tuple[Tensor, Tensor]:
    """-> s = x + seen wo^T, and relu(norm(s) w1^T)^2 w2^T: what follows attention in a block.

    Args:
        x, seen: (B, T, C), the residual stream and what attention saw.
        wo (C, C), w1 (H, C), w2 (C, H): all `Weight`, `Weight8` or tensors of the dtype of x.
        eps: of the RMS norm, which has no weights.
    """
    if isinstance(w1, Weight):
        rows = x.flatten(0, -2), seen.flatten(0, -2)
        x, y = (
            part.view_as(x) for part in _ResidualMLP.apply(*rows, eps, wo, w1, w2, *wo.parts, *w1.parts, *w2.parts)
        )
        return x, y
    x, h = mix(x, linear(seen, wo), None, None, eps)
    return x, relu2_mlp(h, w1, w2, x.shape[-1] ** 0.5)
