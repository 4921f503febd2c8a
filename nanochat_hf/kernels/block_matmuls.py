"""The matrix products of a block: their gradients go straight into `.grad`, and what lies between is part of them.

- A weight comes as `Weight`, its bf16 copy and the float32 parameters whose rows that holds: the gradient's product
  adds to their `.grad` in its own epilogue, where autograd would write a bf16 gradient, cast it and add it. Under
  torch.compile, which cannot see that, a weight is a tensor and its gradient autograd's.
- All that follows attention in a block, its output projection, the residual addition, the norm and the MLP, is one
  operation of three products (`epilogues`), which keeps the stream and relu(h)^2 for the backward pass and no more.
- Either in 8 bits, if the weight comes as `float8.Weight8`.

Matrix products that do what comes next before their result leaves the chip, each beside its plain PyTorch twin.

At the sizes of this project the products run at the device's power limit, and what stands between them at the limit of
its memory. So the residual addition, the RMS norm, relu squared and their gradients are parts of the products here:

- a norm without weights is a factor on each row, so it can be applied after the product that follows it; the row's sum
  of squares comes out of the product before it;
- relu(h)^2 is all that is kept of h: its root is relu(h), which is all that the gradient needs;
- what the gradient of the norm subtracts is known from the sum over h times its gradient.

The products are Dao-AILab/quack's (CuTe), whose epilogues are plain functions; `fold` is Triton. The idea of moving a
norm's factor behind the product is old; quack's library calls it a deferred rstd.
"""

import logging
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import check, triton, unavailable, usable
from .float8 import Linear8, Relu2MLP8, Weight8
from .residual import residual_mix
from .weight_cache import accumulate_grad_


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
            found.append(accumulate_grad_(part, grad.t() @ x))
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
    x, h = residual_mix(x, linear(seen, wo), None, None, eps)
    return x, relu2_mlp(h, w1, w2, x.shape[-1] ** 0.5)


try:
    # quack 0.6 names a compiled kernel by all that its functions refer to and refuses cutlass-dsl 4.7's logger, which
    # is no part of the mathematics; its protocol for such objects is this method.
    if not hasattr(logging.Logger, "__quack_semantic_key__"):
        logging.Logger.__quack_semantic_key__ = lambda self: ("logger", self.name)
    import cutlass.cute as cute
    from quack.activation import relu_sq
    from quack.epilogue import gemm_epilogue
    from quack.epilogue.ops import ColVecLoad, ColVecReduce
    from quack.gemm_config import GemmConfig

    @cache
    def _tiles(columns: int, heavy: bool) -> GemmConfig:
        """For a result of so many columns; heavy: an epilogue that loads, which runs beside the next tile's products.

        Else the larger tiles, which take less power. Their columns are what wastes least in pairs of tiles.
        """
        width = min((192, 208, 160, 128), key=lambda width: -(-columns // (2 * width)) * (width + 12))
        return GemmConfig(
            tile_m=128 if heavy else 256, tile_n=width, pingpong=heavy, cluster_m=1, cluster_n=2,
            is_dynamic_persistent=False,
        )  # fmt: skip

    @gemm_epilogue()
    def _product(acc):
        return {"D": acc}

    @gemm_epilogue(reduces={"squares": ColVecReduce("squares", scaled=True)})
    def _plus_residual(acc, c):
        value = acc + c
        return {"D": value, "squares": (value, value)}

    @gemm_epilogue(ops={"scale": ColVecLoad("scale")})
    def _relu2(acc, scale):
        return {"D": relu_sq(acc * scale)}

    @gemm_epilogue(ops={"scale": ColVecLoad("scale")}, reduces={"along": ColVecReduce("along", scaled=True)})
    def _relu2_grad(acc, c, scale):
        h = cute.math.sqrt(c, fastmath=True)
        grad = 2.0 * (acc * h)
        return {"D": grad * scale, "along": (grad, h)}

    @gemm_epilogue(ops={"factor": ColVecLoad("factor")})
    def _norm_grad(acc, c, stream, factor):
        return {"D": acc + c - stream * factor}

    def _run(epilogue, a: Tensor, b: Tensor, c: Tensor | None = None, **operands) -> Tensor:
        config = _tiles(b.shape[1], heavy=epilogue is not _product)
        return epilogue(a, b, c, config=config, tuned=False, **operands)["D"]

    def _partials(rows: int, columns: int, device: torch.device) -> Tensor:
        """For sums over columns: a part from each tile."""
        return torch.empty(rows, -(-columns // _tiles(columns, heavy=True).tile_n), dtype=torch.float32, device=device)

except Exception as error:  # another version than the pinned one may lack this, or raise anything
    gemm_epilogue = unavailable("quack-kernels", error)


if triton is not None:
    import triton.language as tl

    @triton.jit
    def _fold(parts, scale, out, rows, number, columns, eps, BLOCK: tl.constexpr, NUMBER: tl.constexpr):
        """mean = the sum of a row's parts / columns; out = rsqrt(mean + eps), or scale^2 mean if there is a scale."""
        row, part = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, NUMBER)
        inside = (row < rows)[:, None] & (part < number)[None, :]
        mean = tl.sum(tl.load(parts + row[:, None] * number + part[None, :], mask=inside, other=0.0), 1) / columns
        if scale is None:
            mean = tl.rsqrt(mean + eps)
        else:
            factor = tl.load(scale + row, mask=row < rows)
            mean *= factor * factor
        tl.store(out + row, mean, mask=row < rows)


def fold(parts: Tensor, columns: int, eps: float = 0.0, scale: Tensor | None = None) -> Tensor:
    """parts (N, P) of sums over so many columns -> (1, N): rsqrt(mean + eps), or scale^2 * mean."""
    rows, number = parts.shape
    if usable("GEMM epilogues", parts):
        out = parts.new_empty(1, rows)
        grid = (triton.cdiv(rows, 128),)
        _fold[grid](parts, scale, out, rows, number, columns, eps, BLOCK=128, NUMBER=triton.next_power_of_2(number))
        return out
    mean = parts.sum(1)[None] / columns
    return (mean + eps).rsqrt() if scale is None else scale.square() * mean


@cache
def hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device)[0] == 9


def fused(x: Tensor) -> bool:
    """Whether the kernels take what is on the device and of the dtype of x; their tiles are a Hopper's."""
    ready = gemm_epilogue is not None and x.is_cuda and x.dtype == torch.bfloat16 and hopper(x.device)
    return ready and usable("GEMM epilogues", x)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a (N, K) times b (K, M)."""
    return _run(_product, a, b) if fused(a) else a @ b


def plus_residual(a: Tensor, b: Tensor, x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """-> s = x + a b (N, M), and (1, N) float32: the factors that RMS norm would multiply its rows by."""
    if fused(a):
        parts = _partials(*x.shape, x.device)
        stream = _run(_plus_residual, a, b, x, squares=parts)
    else:
        stream = x + a @ b
        parts = stream.float().square().sum(1, keepdim=True)
    return stream, fold(parts, x.shape[1], eps)


def relu2(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """relu(h)^2 of h = scale (1, N) on the rows of a b (N, M)."""
    return _run(_relu2, a, b, scale=scale) if fused(a) else (scale.t().to(a.dtype) * (a @ b)).relu().square()


def relu2_grad(a: Tensor, b: Tensor, kept: Tensor, scale: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """The gradient a b (N, M) of kept = relu(h)^2 -> that of the product h / scale, and a factor (1, N) float32.

    The factor is scale^2 / columns times the sum over h and its gradient: what the gradient of the norm that scale
    stands for subtracts of each row of the stream, whose columns are given.
    """
    if fused(a):
        parts = _partials(*kept.shape, a.device)
        grad = _run(_relu2_grad, a, b, kept, scale=scale, along=parts)
    else:
        h = kept.sqrt()
        grad = 2 * (a @ b) * h
        parts = (grad.float() * h.float()).sum(1, keepdim=True)
        grad = grad * scale.t().to(a.dtype)
    return grad, fold(parts, columns, scale=scale)


def norm_grad(a: Tensor, b: Tensor, grad: Tensor, stream: Tensor, factor: Tensor) -> Tensor:
    """grad + a b - factor (1, N) on the rows of stream, all (N, M): the gradient of the stream before its norm."""
    if fused(a):
        return _run(_norm_grad, a, b, grad, stream=stream, factor=factor)
    return grad + a @ b - factor.t().to(a.dtype) * stream


@check("GEMM epilogues", instead="PyTorch's products")
def _cases(draw, config):
    width, rows = config.hidden_size, 80
    x, seen, dy, parts = draw(rows, width), draw(rows, width), draw(rows, width), draw(rows, 6, dtype=torch.float32)
    wo, w1, w2 = (draw(*size) / size[1] ** 0.5 for size in ((width, width), (4 * width, width), (width, 4 * width)))

    def folds():
        scale = fold(parts.square(), width, 1e-6)
        return [scale, fold(parts, width, scale=scale)]

    yield 1e-4, folds
    if not fused(x):
        return
    kept, scale = draw(rows, 4 * width).relu().square(), draw(1, rows, dtype=torch.float32).abs() + 0.5

    def products():
        stream, inverse = plus_residual(seen, wo.t(), x, 1e-6)
        grad, factor = relu2_grad(dy, w2, kept, scale, width)
        return [
            product(seen, wo.t()), stream, inverse, relu2(x, w1.t(), scale), grad, factor,
            norm_grad(kept, w1, dy, x, scale),
        ]  # fmt: skip

    yield 0.02, products
