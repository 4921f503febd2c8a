"""FP8 matmuls of the blocks, on Hopper GPUs and newer: E4M3 forward, E5M2 gradients, tensorwise dynamic scaling.

`base.fp8=true`; the recipe is that of arXiv:2209.05433 and torchao. FP8 matmuls need both operands contiguous along
the summed dimension, so a gradient needs them transposed as well. To make that cheap

- one pass reads a tensor and writes it in FP8 row-major and transposed, relu squared and its gradient included;
- a weight is quantized once per step, not once per micro-batch (`WeightCastCache`);
- a scale may come from an upper bound of the magnitudes (`amax_bound`), since the format has exponents to spare. A
  normed row is at most sqrt(C). A matmul's result is at most the largest row norm times the largest column norm.

Each kernel has a reference implementation that runs on any device; `usable("FP8", x)` chooses.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .backend import check, tl, triton, usable
from .weight_cache import accumulate_grad_, cast_weights

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
PLAIN, SQUARED, SQUARED_GRAD = range(3)  # what is cast: x, relu(x)^2, or grad times the derivative of relu(x)^2
AMAX_TILE = dict(ROWS=16, COLUMNS=256, num_warps=8)  # fastest of 11 on an H200
CAST_TILE = dict(ROWS=32, COLUMNS=128, num_warps=8)
# The assembler of Triton up to 3.8 corrupts the transposed store of a kernel that stores both layouts (triton-lang/
# triton#11111), but not from bf16 at multiples of ALIGNED with CAST_TILE: all other casts launch once per layout.
ALIGNED = 64

if triton is not None:

    @triton.jit
    def _amax(x, out, rows, columns, NORMS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
        """ROWS rows of x (rows, columns): their largest magnitude and the largest norm of a row go to out."""
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
        peaks = tl.zeros([ROWS, COLUMNS], tl.float32)
        squares = tl.zeros([ROWS, COLUMNS], tl.float32)
        for start in range(0, columns, COLUMNS):
            column = start + tl.arange(0, COLUMNS)[None, :]
            inside = (row < rows) & (column < columns)
            value = tl.load(x + row.to(tl.int64) * columns + column, mask=inside, other=0.0).to(tl.float32)
            peaks = tl.maximum(peaks, tl.abs(value))
            if NORMS:
                squares += value * value
        tl.store(out + tl.program_id(0), tl.max(peaks))
        if NORMS:
            tl.store(out + tl.num_programs(0) + tl.program_id(0), tl.sqrt(tl.max(tl.sum(squares, 1), 0)))

    @triton.jit
    def _cast(
        x, grad, bounds, grad_bounds, number, bound, row_major, transposed, scale, squares, squares_scale, rows,
        columns, KIND: tl.constexpr, LARGEST: tl.constexpr, SQUARES_LARGEST: tl.constexpr, ROWS: tl.constexpr,
        COLUMNS: tl.constexpr, NUMBER: tl.constexpr,
    ):  # fmt: skip
        """A tile of x (rows, columns) in FP8 to row_major and to transposed.

        KIND as above; SQUARED_GRAD also writes relu(x)^2 transposed to squares. The scale is the largest of `bounds`
        (number) / LARGEST, or bound / LARGEST where bounds is None.
        """
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        inside = (row < rows) & (column < columns)
        at, across = row.to(tl.int64) * columns + column, column.to(tl.int64) * rows + row
        first = (tl.program_id(0) == 0) & (tl.program_id(1) == 0)
        limit = bound
        which = tl.arange(0, NUMBER)
        if bounds is not None:
            limit = tl.max(tl.load(bounds + which, mask=which < number, other=0.0), 0)
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        if KIND > 0:
            value = tl.maximum(value, 0.0, tl.PropagateNan.ALL)
        if KIND == 2:
            if squares is not None:
                peak = tl.maximum(limit * limit, 1e-24)
                if first:
                    tl.store(squares_scale, peak / SQUARES_LARGEST)
                square = tl.minimum(value * value * (SQUARES_LARGEST / peak), SQUARES_LARGEST, tl.PropagateNan.ALL)
                tl.store(squares + across, square.to(squares.dtype.element_ty), mask=inside)
            value *= 2.0 * tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
            limit *= 2.0 * tl.max(tl.load(grad_bounds + which, mask=which < number, other=0.0), 0)
        if KIND == 1:
            value, limit = value * value, limit * limit
        limit = tl.maximum(limit, 1e-24)
        if first:
            tl.store(scale, limit / LARGEST)
        value = tl.clamp(value * (LARGEST / limit), -LARGEST, LARGEST, tl.PropagateNan.ALL)  # NaN stays NaN
        if row_major is not None:
            tl.store(row_major + at, value.to(row_major.dtype.element_ty), mask=inside)
        if transposed is not None:
            tl.store(transposed + across, value.to(transposed.dtype.element_ty), mask=inside)


class Float8Pair(NamedTuple):
    """A matrix in FP8, row-major (N, C) and transposed (C, N), each None if not needed, and its () float32 scale."""

    row_major: Tensor | None
    transposed: Tensor | None
    scale: Tensor

    @property
    def dtype(self) -> torch.dtype:
        return (self.transposed if self.row_major is None else self.row_major).dtype


def empty(shape: tuple, device, dtype: torch.dtype, row_major: bool = True, transposed: bool = True) -> Float8Pair:
    """Uninitialized memory for a matrix of this shape."""
    return Float8Pair(
        torch.empty(shape, dtype=dtype, device=device) if row_major else None,
        torch.empty(shape[::-1], dtype=dtype, device=device) if transposed else None,
        torch.empty((), device=device),
    )


def compute_amax(x: Tensor, norms: bool = False) -> tuple[Tensor, ...]:
    """x (N, C) -> float32 numbers whose maximum is that of |x|; norms: also others, with that of the rows' norms."""
    if not usable("FP8", x):
        norms = (torch.linalg.vector_norm(x, dim=1, dtype=torch.float32).amax()[None],) if norms else ()
        return x.abs().amax().float()[None], *norms
    out = torch.empty(1 + norms, triton.cdiv(len(x), AMAX_TILE["ROWS"]), device=x.device)
    _amax[(out.shape[1],)](x.contiguous(), out, *x.shape, NORMS=norms, **AMAX_TILE)
    return out.unbind()


def cast_to_fp8(
    out: Float8Pair, x: Tensor, amax_bound: Tensor | float, kind: int = PLAIN, grad=None, grad_bound=None, squares=None
) -> None:
    """Write x (N, C), whose magnitudes are at most the largest of `amax_bound` (n,), in FP8 to the layouts of `out`.

    SQUARED: relu(x)^2 instead. SQUARED_GRAD: grad (N, C), of magnitudes up to the largest of `grad_bound` (n,), times
    the derivative of relu(x)^2; relu(x)^2 goes transposed to the pair `squares`.
    """
    if not usable("FP8", x):
        return _cast_reference(out, x, amax_bound, kind, grad, grad_bound, squares)
    top, is_number = torch.finfo(out.dtype).max, not isinstance(amax_bound, Tensor)
    (rows, columns), number = x.shape, 1 if is_number else len(amax_bound)
    squares = squares if kind == SQUARED_GRAD else None
    aligned = not any(size % ALIGNED for size in (rows, columns))
    both = out.row_major is not None and out.transposed is not None
    if (both or squares is not None) and not (aligned and x.dtype == torch.bfloat16):
        for layout in (out._replace(transposed=None), out._replace(row_major=None)):
            if (layout.row_major, layout.transposed) != (None, None):
                cast_to_fp8(layout, x, amax_bound, kind, grad, grad_bound)
        if squares is not None:
            cast_to_fp8(squares, x, amax_bound, SQUARED)
        return
    _cast[(triton.cdiv(rows, CAST_TILE["ROWS"]), triton.cdiv(columns, CAST_TILE["COLUMNS"]))](
        x.contiguous(), grad, None if is_number else amax_bound, grad_bound, number,
        float(amax_bound) if is_number else 0.0, out.row_major, out.transposed, out.scale,
        squares and squares.transposed, squares and squares.scale, rows, columns, KIND=kind, LARGEST=top,
        SQUARES_LARGEST=torch.finfo(E4M3).max, NUMBER=triton.next_power_of_2(number), **CAST_TILE,
    )  # fmt: skip


def _cast_reference(out: Float8Pair, x: Tensor, amax_bound, kind: int, grad, grad_bound, squares) -> None:
    value, limit = x.float(), torch.as_tensor(amax_bound, dtype=torch.float32).amax()
    if kind != PLAIN:
        value = value.relu()
    if kind == SQUARED_GRAD:
        cast_to_fp8(squares, value, limit, SQUARED)
        value, limit = 2 * value * grad.float(), 2 * limit * grad_bound.amax()
    if kind == SQUARED:
        value, limit = value.square(), limit.square()
    top = torch.finfo(out.dtype).max
    out.scale.copy_(limit.clamp_min(1e-24) / top)
    value = (value / out.scale).clamp(-top, top).to(out.dtype)
    for layout, written in ((out.row_major, value), (out.transposed, value.t())):
        if layout is not None:
            layout.copy_(written)


def quantize(x: Tensor, dtype: torch.dtype, amax_bound: Tensor | float | None = None) -> Float8Pair:
    """x (N, C) in FP8, both layouts. amax_bound None: computed from x."""
    out = empty(x.shape, x.device, dtype)
    cast_to_fp8(out, x, compute_amax(x)[0] if amax_bound is None else amax_bound)
    return out


def scaled_mm(
    a: Tensor, b: Tensor, scales: tuple[Tensor, Tensor], dtype: torch.dtype, fast: bool = False, out=None
) -> Tensor:
    """a (M, K), b (N, K) in FP8 -> a b^T (M, N). fast: sums in the tensor cores' own, less precise accumulator."""
    options = dict(scale_a=scales[0], scale_b=scales[1], out_dtype=dtype, use_fast_accum=fast, out=out)
    return torch._scaled_mm(a, b.t(), **options)


class Float8Weight(NamedTuple):
    """A matrix (sum of N_i, C) in E4M3, its largest column norm, its parameters (N_i, C); methods as `Bf16Weight`."""

    pair: Float8Pair
    column_norm: Tensor
    parts: tuple[Tensor, ...]

    def linear(self, x: Tensor, amax_bound: float | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        x8 = quantize(x, E4M3, amax_bound)
        return self.matmul(x8, x.dtype), (x8.transposed, x8.scale)

    def linear_grad(self, dy: Tensor, x_transposed: Tensor, x_scale: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        dy8 = quantize(dy, E5M2)
        return self.matmul_grad(dy8, dy.dtype), self.accumulate_grads(dy8, x_transposed, x_scale, dy.dtype)

    def matmul(self, x8: Float8Pair, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        return scaled_mm(x8.row_major, self.pair.row_major, (x8.scale, self.pair.scale), dtype, fast=True, out=out)

    def matmul_grad(self, dy8: Float8Pair, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        return scaled_mm(dy8.row_major, self.pair.transposed, (dy8.scale, self.pair.scale), dtype, out=out)

    def accumulate_grads(self, dy8: Float8Pair, x_transposed, x_scale, dtype: torch.dtype) -> list[Tensor | None]:
        """dtype: of what is added to `.grad`."""
        first = len(self.parts) == 1 and self.parts[0].grad is None
        dtype = self.parts[0].dtype if first else dtype
        dw = scaled_mm(dy8.transposed, x_transposed, (dy8.scale, x_scale), dtype)
        parts = zip(self.parts, dw.split([len(part) for part in self.parts]))
        return [accumulate_grad_(part, grad) if part.requires_grad else None for part, grad in parts]


@torch.no_grad()
def quantize_weight(*parts: Tensor) -> Float8Weight:
    matrix = cast_weights(torch.bfloat16, *parts)  # Triton 3.6 transposes a tile wrongly that was float32
    norms = torch.linalg.vector_norm(matrix, dim=0, dtype=torch.float32)
    return Float8Weight(quantize(matrix, E4M3), norms.amax(), parts)


class Float8Relu2MLP(torch.autograd.Function):
    """relu(x w1^T)^2 w2^T in FP8; between the matmuls only the input of the activation is kept, in bf16."""

    @staticmethod
    def forward(ctx, x, amax_bound, w1, w2, *parts):
        h, saved = w1.linear(x, amax_bound)
        h_amax = compute_amax(h)[0]
        a8 = empty(h.shape, h.device, E4M3, transposed=False)
        cast_to_fp8(a8, h, h_amax, SQUARED)
        ctx.weights, ctx.dtype = (w1, w2), x.dtype
        ctx.save_for_backward(*saved, h, h_amax)
        return w2.matmul(a8, x.dtype)

    @staticmethod
    def backward(ctx, dy):
        (*saved, h, h_amax), (w1, w2), dtype = ctx.saved_tensors, ctx.weights, ctx.dtype
        dy_amax, row_norm = compute_amax(dy, norms=True)
        dy8 = quantize(dy, E5M2, dy_amax)
        da = w2.matmul_grad(dy8, dtype)
        dh8, a8 = empty(h.shape, h.device, E5M2), empty(h.shape, h.device, E4M3, row_major=False)
        cast_to_fp8(dh8, h, h_amax, SQUARED_GRAD, da, row_norm * w2.column_norm, a8)
        dx, grads = w1.matmul_grad(dh8, dtype), w1.accumulate_grads(dh8, *saved, dtype)
        return dx, None, None, None, *grads, *w2.accumulate_grads(dy8, a8.transposed, a8.scale, dtype)


def _numbers(draw, rows: int, columns: int) -> Tensor:
    """Random numbers none of which, scaled, lies halfway between two of FP8, where the order of operations decides.

    The largest one is a prime number over 64, so that no other is a simple fraction of it, and negative: a magnitude.
    """
    x = draw(rows, columns).clamp(-3.9, 3.9)
    x[0, 0] = -251 / 64
    return x


@check("FP8", instead="bf16")
def _cases(draw, config):
    """Both ways of storing, at the model's width and at an odd one: the values, and that both layouts are equal."""
    for rows, columns in ((192, config.hidden_size), (72, config.hidden_size + 8)):
        x, grad = _numbers(draw, rows, columns), _numbers(draw, rows, columns)

        def cast(x=x, grad=grad):
            amax, row_norm = compute_amax(x, norms=True)
            pairs = [empty(x.shape, x.device, dtype) for dtype in (E4M3, E5M2, E4M3, E5M2)]
            squares = empty(x.shape, x.device, E4M3, row_major=False)
            for pair, kind in zip(pairs, (PLAIN, PLAIN, SQUARED, SQUARED_GRAD)):
                cast_to_fp8(pair, x, amax, kind, grad, compute_amax(grad)[0], squares)
            weight = quantize_weight(x[:64].float(), x[64:].float())
            layouts = [(pair.row_major, pair.transposed.t(), pair.scale) for pair in (*pairs, weight.pair)]
            layouts.append((pairs[2].row_major, squares.transposed.t(), squares.scale))
            values = [row_major.float() * scale for row_major, _, scale in layouts]
            differ = [(one.view(torch.uint8) != other.view(torch.uint8)).sum()[None] for one, other, _ in layouts]
            return [*values, *differ, amax.amax()[None], row_norm.amax()[None], weight.column_norm[None]]

        yield 0.01, cast
    a, b = (quantize(draw(192, config.hidden_size), E4M3) for _ in range(2))

    def multiply():
        if usable("FP8", a.row_major):
            return [scaled_mm(a.row_major, b.row_major, (a.scale, b.scale), torch.bfloat16)]
        return [(a.row_major.float() * a.scale) @ (b.row_major.float() * b.scale).t()]

    yield 0.01, multiply
