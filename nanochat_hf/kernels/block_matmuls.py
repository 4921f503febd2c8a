"""The matmuls of a block with everything between them in their epilogues, and weight gradients added in place.

Matmuls are bound by the device's power, the operations between them by its memory bandwidth.

- `residual_mlp` is all that follows attention in a block: output projection, residual addition, norm and MLP, in three
  GEMMs. For the backward pass it keeps only the residual stream and relu(h)^2, whose root is relu(h). An RMS norm
  without weights is a factor on each row. It is applied after the next GEMM (quack: deferred rstd), and the GEMM
  before computes each row's sum of squares. The norm's gradient needs only the sum over h times its gradient.
- The GEMM of the gradient of a `Bf16Weight` adds to the `.grad` of its float32 parameters in its epilogue. Autograd
  would write a bf16 gradient, cast it and add it.

The GEMMs are those of Dao-AILab/quack (CuTe). Their epilogues are plain functions, each beside its reference.
Weights may also be `float8.Float8Weight`, or, for torch.compile, tensors, whose gradient is autograd's.
"""

import logging
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import check, compiled, tl, triton, unavailable, usable
from .float8 import Float8Relu2MLP, Float8Weight
from .weight_cache import accumulate_grad_


class Bf16Weight(NamedTuple):
    """A matrix (sum of N_i, C) in the dtype of the matmuls, and the parameters (N_i, C) that it was cast from."""

    matrix: Tensor
    parts: tuple[Tensor, ...]

    def linear(self, x: Tensor, amax_bound: float | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """x (N, C) times the matrix transposed, and what `linear_grad` needs."""
        return matmul(x, self.matrix.t()), (x,)

    def linear_grad(self, dy: Tensor, x: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        """The gradient of x, and those of the parts."""
        return matmul(dy, self.matrix), self.accumulate_grads(dy, x)

    def accumulate_grads(self, dy: Tensor, x: Tensor) -> list[Tensor | None]:
        """The gradients of the parts from dy (N, O) and x (N, C); None where it was added to `.grad`."""
        grads = []
        for part, grad in zip(self.parts, dy.split([len(part) for part in self.parts], dim=1)):
            if not part.requires_grad:
                grads.append(None)
            elif not (x.is_cuda and part.dtype == torch.float32):
                grads.append(accumulate_grad_(part, grad.t() @ x))
            elif part.grad is None:
                grads.append(torch.mm(grad.t(), x, out_dtype=torch.float32))
            else:
                torch.addmm(part.grad, grad.t(), x, out_dtype=torch.float32, out=part.grad)
                grads.append(None)
        return grads


class _Linear(torch.autograd.Function):
    """y = x w^T and, from the first channels of x, in bf16, the gates of the value embedding."""

    @staticmethod
    def forward(ctx, x, gate, amax_bound, weight, *parts):
        y, saved = weight.linear(x, amax_bound)
        channels = None if gate is None else x[:, : gate.shape[1]].contiguous()
        ctx.weight = weight
        ctx.save_for_backward(gate, channels, *saved)
        return y, None if gate is None else channels @ gate.t()

    @staticmethod
    def backward(ctx, dy, dgates):
        gate, channels, *saved = ctx.saved_tensors
        (dx, grads), dgate = ctx.weight.linear_grad(dy, *saved), None
        if gate is not None:
            dx[:, : gate.shape[1]].addmm_(dgates, gate)
            dgate = dgates.t() @ channels
        return dx, dgate, None, None, *grads


def linear_and_gates(
    x: Tensor, w: Bf16Weight | Float8Weight | Tensor, gate: Tensor | None = None, amax_bound: float | None = None
) -> tuple[Tensor, Tensor | None]:
    """x (..., C) times w (O, C) transposed, and x's first G channels times gate (K, G) transposed if there is a gate.

    amax_bound: upper bound of |x|, if known; saves FP8 matmuls a pass over x.
    """
    gate = None if gate is None else gate.to(x.dtype)
    if isinstance(w, Tensor):
        return F.linear(x, w), None if gate is None else F.linear(x[..., : gate.shape[1]], gate)
    y, gates = _Linear.apply(x.flatten(0, -2), gate, amax_bound, w, *w.parts)
    return y.unflatten(0, x.shape[:-1]), None if gate is None else gates.unflatten(0, x.shape[:-1])


class _ResidualMLP(torch.autograd.Function):
    """`residual_mlp` over rows (N, C)."""

    @staticmethod
    def forward(ctx, x, attn_out, eps, wo, w1, w2, *parts):
        x, scale = matmul_residual(attn_out, wo.matrix.t(), x, eps)
        squared = matmul_relu2(x, w1.matrix.t(), scale)
        ctx.weights = wo, w1, w2
        ctx.save_for_backward(attn_out, x, scale, squared)
        return x, matmul(squared, w2.matrix.t())

    @staticmethod
    def backward(ctx, dx, dy):
        attn_out, x, scale, squared = ctx.saved_tensors
        (wo, w1, w2), dx, dy = ctx.weights, dx.contiguous(), dy.contiguous()
        dh, factor = matmul_relu2_grad(dy, w2.matrix, squared, scale, x.shape[1])
        dx = matmul_norm_grad(dh, w1.matrix, dx, x, factor)
        return (
            dx, matmul(dx, wo.matrix), *[None] * 4, *wo.accumulate_grads(dx, attn_out),
            *w1.accumulate_grads(dh, x), *w2.accumulate_grads(dy, squared),
        )  # fmt: skip


class _ResidualMix(torch.autograd.Function):
    """`residual_mix` with lambdas. The gradient of x0, which every layer adds to, is added up in the same pass."""

    @staticmethod
    def forward(ctx, x, y, x0, a, b, eps):
        ctx.eps = eps
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, y, x0, a, b)
        return *compiled(_mix, dynamic=None)(x, y, x0, (a, b), eps), x0

    @staticmethod
    def backward(ctx, *grads):
        dx, dx0, da, db = compiled(_mix_grad, dynamic=None)(*ctx.saved_tensors, ctx.eps, *grads)
        return dx, None if ctx.saved_tensors[1] is None else dx, dx0, da, db, None


def residual_mix(
    x: Tensor, y: Tensor | None, x0: Tensor | None, lambdas: tuple[Tensor, Tensor] | None, eps: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The residual stream s = a (x + y) + b x0 before a block, its RMS norm, (B, T, C) each, and x0 for the next one.

    lambdas: the scalars a and b; None: s = x + y. y: None before the first block.
    """
    if x.is_cuda and not torch.compiler.is_compiling():
        if lambdas is not None:
            return _ResidualMix.apply(x, y, x0, *lambdas, eps)
        return *compiled(_mix, dynamic=None)(x, y, x0, lambdas, eps), x0  # SFT has a new length in every batch
    return *_mix(x, y, x0, lambdas, eps), x0


def _mix(x, y, x0, lambdas, eps):
    x = x if y is None else x + y
    if lambdas is not None:
        x = lambdas[0] * x + lambdas[1] * x0
    return x, F.rms_norm(x, x.shape[-1:], eps=eps)


def _mix_grad(x, y, x0, a, b, eps, ds, dh, dx0):
    """The gradients of x (and y), x0, a and b from those of `_mix`'s results and of x0 elsewhere, or None."""
    total = x.float() if y is None else x.float() + y.float()
    s = a * total + b * x0.float()
    scale = (s.square().mean(-1, keepdim=True) + eps).rsqrt()
    grad = scale * (dh.float() - s * (s * dh.float()).mean(-1, keepdim=True) * scale.square())
    grad = grad if ds is None else grad + ds.float()
    dx0 = b * grad if dx0 is None else b * grad + dx0.float()
    da, db = ((grad * part).sum(-1).sum() for part in (total, x0.float()))
    return (a * grad).to(x.dtype), dx0.to(x.dtype), da, db


def residual_mlp(x: Tensor, attn_out: Tensor, wo, w1, w2, eps: float) -> tuple[Tensor, Tensor]:
    """s = x + attn_out wo^T, and relu(norm(s) w1^T)^2 w2^T: what follows attention in a block.

    Args:
        x, attn_out: (B, T, C), the residual stream and the output of attention.
        wo (C, C), w1 (H, C), w2 (C, H): all `Bf16Weight`, `Float8Weight` or tensors of the dtype of x.
        eps: of the RMS norm, which has no weights.
    """
    if isinstance(w1, Bf16Weight):
        rows = x.flatten(0, -2), attn_out.flatten(0, -2)
        results = _ResidualMLP.apply(*rows, eps, wo, w1, w2, *wo.parts, *w1.parts, *w2.parts)
        return results[0].view_as(x), results[1].view_as(x)
    x, h, _ = residual_mix(x, linear_and_gates(attn_out, wo)[0], None, None, eps)
    if isinstance(w1, Float8Weight):
        bound = x.shape[-1] ** 0.5  # of a normed row
        return x, Float8Relu2MLP.apply(h.flatten(0, -2), bound, w1, w2, *w1.parts, *w2.parts).view_as(x)
    return x, F.linear(F.relu(F.linear(h, w1)).square(), w2)


try:
    # quack 0.6 names a compiled kernel by all objects that its functions refer to, and refuses cutlass-dsl 4.7's
    # logger, which does not change the result; its protocol for such objects is this method.
    if not hasattr(logging.Logger, "__quack_semantic_key__"):
        logging.Logger.__quack_semantic_key__ = lambda self: ("logger", self.name)
    import cutlass.cute as cute
    from quack.activation import relu_sq
    from quack.epilogue import gemm_epilogue
    from quack.epilogue.ops import ColVecLoad, ColVecReduce
    from quack.gemm_config import GemmConfig

    @cache
    def _tiles(columns: int, heavy: bool) -> GemmConfig:
        """For a result of so many columns. heavy: the epilogue loads, which overlaps the next tile's main loop.

        Otherwise the larger tiles, which take less power. Their width is what wastes least in pairs of tiles.
        """
        width = min((192, 208, 160, 128), key=lambda width: -(-columns // (2 * width)) * (width + 12))
        return GemmConfig(
            tile_m=128 if heavy else 256, tile_n=width, pingpong=heavy, cluster_m=1, cluster_n=2,
            is_dynamic_persistent=False,
        )  # fmt: skip

    @gemm_epilogue()
    def _matmul(acc):
        return {"D": acc}

    @gemm_epilogue(reduces={"squares": ColVecReduce("squares", scaled=True)})
    def _matmul_residual(acc, c):
        value = acc + c
        return {"D": value, "squares": (value, value)}

    @gemm_epilogue(ops={"scale": ColVecLoad("scale")})
    def _matmul_relu2(acc, scale):
        return {"D": relu_sq(acc * scale)}

    @gemm_epilogue(ops={"scale": ColVecLoad("scale")}, reduces={"along": ColVecReduce("along", scaled=True)})
    def _matmul_relu2_grad(acc, c, scale):
        h = cute.math.sqrt(c, fastmath=True)
        grad = 2.0 * (acc * h)
        return {"D": grad * scale, "along": (grad, h)}

    @gemm_epilogue(ops={"factor": ColVecLoad("factor")})
    def _matmul_norm_grad(acc, c, stream, factor):
        return {"D": acc + c - stream * factor}

    def _run(epilogue, a: Tensor, b: Tensor, c: Tensor | None = None, **operands) -> Tensor:
        config = _tiles(b.shape[1], heavy=epilogue is not _matmul)
        return epilogue(a, b, c, config=config, tuned=False, **operands)["D"]

    def _partials(rows: int, columns: int, device: torch.device) -> Tensor:
        """Memory for sums over columns, one part per tile."""
        return torch.empty(rows, -(-columns // _tiles(columns, heavy=True).tile_n), dtype=torch.float32, device=device)

except Exception as error:  # a version other than the pinned one may lack this, or raise anything
    gemm_epilogue = unavailable("quack-kernels", error)


if triton is not None:

    @triton.jit
    def _row_factor(parts, scale, out, rows, number, columns, eps, BLOCK: tl.constexpr, NUMBER: tl.constexpr):
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


def row_factor(parts: Tensor, columns: int, eps: float = 0.0, scale: Tensor | None = None) -> Tensor:
    """parts (N, P) of sums over so many columns -> (1, N): rsqrt(mean + eps), or scale^2 * mean."""
    rows, number = parts.shape
    if usable("GEMM epilogues", parts):
        out, padded = parts.new_empty(1, rows), triton.next_power_of_2(number)
        _row_factor[(triton.cdiv(rows, 128),)](parts, scale, out, rows, number, columns, eps, BLOCK=128, NUMBER=padded)
        return out
    mean = parts.sum(1)[None] / columns
    return (mean + eps).rsqrt() if scale is None else scale.square() * mean


@cache
def is_hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device)[0] == 9


def uses_quack(x: Tensor) -> bool:
    """Whether quack's GEMMs run on a device and in a dtype like those of x; the tiles are chosen for Hopper."""
    ready = gemm_epilogue is not None and x.is_cuda and x.dtype == torch.bfloat16 and is_hopper(x.device)
    return ready and usable("GEMM epilogues", x)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a (N, K) times b (K, M)."""
    return _run(_matmul, a, b) if uses_quack(a) else a @ b


def matmul_residual(a: Tensor, b: Tensor, x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """s = x + a b (N, M), and (1, N) float32: the factors by which RMS norm multiplies its rows."""
    if uses_quack(a):
        parts = _partials(*x.shape, x.device)
        residual = _run(_matmul_residual, a, b, x, squares=parts)
    else:
        residual = x + a @ b
        parts = residual.float().square().sum(1, keepdim=True)
    return residual, row_factor(parts, x.shape[1], eps)


def matmul_relu2(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """relu(h)^2 of h = scale (1, N) on the rows of a b (N, M)."""
    if uses_quack(a):
        return _run(_matmul_relu2, a, b, scale=scale)
    return (scale.t().to(a.dtype) * (a @ b)).relu().square()


def matmul_relu2_grad(a: Tensor, b: Tensor, squared: Tensor, scale: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """From the gradient a b (N, M) of squared = relu(h)^2: that of the matmul h / scale, and a factor (1, N) float32.

    The factor is scale^2 / columns times the sum over h and its gradient. Times a row of the residual stream, of so
    many columns, it is what the gradient of the norm subtracts.
    """
    if uses_quack(a):
        parts = _partials(*squared.shape, a.device)
        grad = _run(_matmul_relu2_grad, a, b, squared, scale=scale, along=parts)
    else:
        h = squared.sqrt()
        grad = 2 * (a @ b) * h
        parts = (grad.float() * h.float()).sum(1, keepdim=True)
        grad = grad * scale.t().to(a.dtype)
    return grad, row_factor(parts, columns, scale=scale)


def matmul_norm_grad(a: Tensor, b: Tensor, grad: Tensor, residual: Tensor, factor: Tensor) -> Tensor:
    """grad + a b - factor (1, N) on the rows of residual, all (N, M): the gradient of the residual before its norm."""
    if uses_quack(a):
        return _run(_matmul_norm_grad, a, b, grad, stream=residual, factor=factor)
    return grad + a @ b - factor.t().to(a.dtype) * residual


@check("GEMM epilogues", instead="PyTorch's matmuls")
def _cases(draw, config):
    width, rows = config.hidden_size, 80
    x, attn_out, dy, parts = (*(draw(rows, width) for _ in range(3)), draw(rows, 6, dtype=torch.float32))
    wo, w1, w2 = (draw(*size) / size[1] ** 0.5 for size in ((width, width), (4 * width, width), (width, 4 * width)))

    def factors():
        scale = row_factor(parts.square(), width, 1e-6)
        return [scale, row_factor(parts, width, scale=scale)]

    yield 1e-4, factors
    if not uses_quack(x):
        return
    squared, scale = draw(rows, 4 * width).relu().square(), draw(1, rows, dtype=torch.float32).abs() + 0.5

    def matmuls():
        residual, inverse = matmul_residual(attn_out, wo.t(), x, 1e-6)
        grad, factor = matmul_relu2_grad(dy, w2, squared, scale, width)
        return [
            matmul(attn_out, wo.t()), residual, inverse, matmul_relu2(x, w1.t(), scale), grad, factor,
            matmul_norm_grad(squared, w1, dy, x, scale),
        ]  # fmt: skip

    yield 0.02, matmuls
