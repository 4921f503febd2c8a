"""The matrix products of a block: their gradients go straight into `.grad`, relu squared is part of them.

- A weight comes as `Weight`, its bf16 copy and the float32 parameters whose rows that holds: the gradient's product
  adds to their `.grad` in its own epilogue, where autograd would write a bf16 gradient, cast it and add it. Under
  torch.compile, which cannot see that, a weight is a tensor and its gradient autograd's.
- MLP: relu(x)^2 runs in the epilogue of the first matrix product and its gradient in that of the second one's, by the
  CuTe kernels of Dao-AILab/quack; only the value before the activation is kept for the backward pass.
- Either in 8 bits, if the weight comes as `float8.Weight8`.

Everything has a plain twin that runs on any device.
"""

import logging
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .float8 import Linear8, Relu2MLP8, Weight8
from .leaves import added

try:
    # quack 0.6 names a compiled kernel by all that its functions refer to and refuses cutlass-dsl 4.7's logger, which
    # is no part of the mathematics; its protocol for such objects is this method.
    if not hasattr(logging.Logger, "__quack_semantic_key__"):
        logging.Logger.__quack_semantic_key__ = lambda self: ("logger", self.name)
    from quack.gemm_interface import gemm_act, gemm_dact
except ImportError:
    gemm_act = gemm_dact = None


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
        return x @ low.t(), None if gate is None else x[:, : gate.shape[1]] @ gate.t()

    @staticmethod
    def backward(ctx, dy, dgates):
        x, gate = ctx.saved_tensors
        dx, dgate = dy @ ctx.weight.low, None
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


# -------------------------------------------------------------------------------------------------------------- MLP

if gemm_act is not None:

    def _up(x: Tensor, w1: Tensor) -> tuple[Tensor, Tensor]:
        """x (N, C), w1 (H, C) -> (x w1^T, relu of it squared), both (N, H)."""
        return gemm_act(x, w1.t(), activation="relu_sq", tuned=False)

    def _down_grad(dy: Tensor, w2: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """dy (N, C), w2 (C, H), h (N, H) -> (gradient of h, relu(h)^2 made again), both (N, H)."""
        dh, a = gemm_dact(dy, w2, h, activation="relu_sq", tuned=False)
        return dh, a

    _up_op = torch.library.custom_op("nanochat_hf::relu2_up", _up, mutates_args=(), device_types="cuda")
    _down_grad_op = torch.library.custom_op(
        "nanochat_hf::relu2_down_grad", _down_grad, mutates_args=(), device_types="cuda"
    )

    @_up_op.register_fake
    def _(x, w1):
        return x.new_empty(len(x), len(w1)), x.new_empty(len(x), len(w1))

    @_down_grad_op.register_fake
    def _(dy, w2, h):
        return torch.empty_like(h), torch.empty_like(h)

    class _Relu2MLP(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, low1, low2, *parts):
            h, a = (_up if parts else _up_op)(x, low1)  # without parts the compiler is at work
            ctx.parts = parts
            ctx.save_for_backward(x, low1, low2, h)
            return a @ low2.t()

        @staticmethod
        def backward(ctx, dy):
            x, low1, low2, h = ctx.saved_tensors
            dy = dy.contiguous()
            dh, a = (_down_grad if ctx.parts else _down_grad_op)(dy, low2, h)
            if not ctx.parts:
                return dh @ low1, dh.t() @ x, dy.t() @ a
            first, second = (Weight(low, (part,)) for low, part in zip((low1, low2), ctx.parts))
            return dh @ low1, None, None, *gradients(first, dh, x), *gradients(second, dy, a)


def relu2_mlp(
    x: Tensor, w1: Weight | Weight8 | Tensor, w2: Weight | Weight8 | Tensor, bound: float | None = None
) -> Tensor:
    """relu(x w1^T)^2 w2^T for x (B, T, C), w1 (H, C), w2 (C, H), all of one dtype; bound as above."""
    if isinstance(w1, Weight8):
        return Relu2MLP8.apply(x.flatten(0, -2), bound, w1, w2, *w1.parts, *w2.parts).unflatten(0, x.shape[:-1])
    if gemm_act is not None and x.is_cuda and x.dtype == torch.bfloat16:
        whole = isinstance(w1, Weight)
        matrices = (w1.low, w2.low, *w1.parts, *w2.parts) if whole else (w1, w2)
        return _Relu2MLP.apply(x.flatten(0, -2), *matrices).unflatten(0, x.shape[:-1])
    return linear(F.relu(linear(x, w1)).square(), w2)
