"""The blocks' matrix products in 8-bit floats, on Hopper GPUs and newer: `base.fp8=true`.

One scale a tensor; values and weights are e4m3, gradients e5m2 (arXiv:2209.05433, the tensorwise recipe of torchao).
The products want both operands contiguous along the summed dimension, so what a gradient needs again is needed
transposed, too. Measured naively that costs as much as the products save; so

- one pass reads a tensor and writes it in 8 bits both ways, relu squared and its gradient included;
- a weight is turned into 8 bits once a step, not once a micro-batch (`leaves.Copies`);
- a scale needs an upper bound of the magnitudes and no more. Where the largest one is not at hand, a bound that is
  costs a few of the exponents that floating point has to spare: the norm's output is at most sqrt(C), and a product's
  at most the length of the longest row times that of the longest column (Cauchy and Schwarz).

Each kernel has a plain twin that runs on any device; `usable("FP8")` says which of the two runs.
"""

from typing import NamedTuple

import torch
from torch import Tensor, is_tensor

from .backend import check, triton, usable
from .weight_cache import accumulate_grad_

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
PLAIN, SQUARED, SQUARED_GRAD = range(3)  # what is done to a tensor on its way: nothing, relu squared, its gradient
MEASURE = dict(ROWS=16, COLUMNS=256, num_warps=8)  # tiles of the kernels, from 11 tried on an H200
FILL = dict(ROWS=32, COLUMNS=128, num_warps=4)
# The assembler of Triton up to 3.8 corrupts the transposed store of a kernel that stores both ways (triton-lang/
# triton#11111), though not from bf16 at multiples of this, as in all models of usual sizes; else each way is a launch.
JOINT, JOINT_FILL = 64, FILL  # seen right with this tile only

if triton is not None:
    import triton.language as tl

    @triton.jit
    def _measure(x, found, rows, columns, LENGTHS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
        """ROWS rows of x (rows, columns): to found the largest magnitude, and the length of the longest."""
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
        peaks = tl.zeros([ROWS, COLUMNS], tl.float32)
        squares = tl.zeros([ROWS, COLUMNS], tl.float32)
        for start in range(0, columns, COLUMNS):
            column = start + tl.arange(0, COLUMNS)[None, :]
            inside = (row < rows) & (column < columns)
            value = tl.load(x + row.to(tl.int64) * columns + column, mask=inside, other=0.0).to(tl.float32)
            peaks = tl.maximum(peaks, tl.abs(value))
            if LENGTHS:
                squares += value * value
        tl.store(found + tl.program_id(0), tl.max(peaks))
        if LENGTHS:
            tl.store(found + tl.num_programs(0) + tl.program_id(0), tl.sqrt(tl.max(tl.sum(squares, 1), 0)))

    @triton.jit
    def _fill(
        x, grad, bounds, grad_bounds, number, known, straight, turned, scale, squares, squares_scale, rows, columns,
        tall, KIND: tl.constexpr, LARGEST: tl.constexpr, SQUARES_LARGEST: tl.constexpr, ROWS: tl.constexpr,
        COLUMNS: tl.constexpr, NUMBER: tl.constexpr,
    ):  # fmt: skip
        """A tile of x (rows, columns): in 8 bits to straight and transposed to turned, whose rows lie `tall` apart.

        KIND 1: relu(x)^2 instead; KIND 2: grad's product with the derivative of that instead, and relu(x)^2 itself
        transposed to squares. The scale is the largest of bounds (number) / LARGEST; None: known is the bound.
        """
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        inside = (row < rows) & (column < columns)
        at, across = row.to(tl.int64) * columns + column, column.to(tl.int64) * tall + row
        first = (tl.program_id(0) == 0) & (tl.program_id(1) == 0)
        limit = known
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
        value = tl.clamp(value * (LARGEST / limit), -LARGEST, LARGEST, tl.PropagateNan.ALL)  # no NaN is lost here
        if straight is not None:
            tl.store(straight + at, value.to(straight.dtype.element_ty), mask=inside)
        if turned is not None:
            tl.store(turned + across, value.to(turned.dtype.element_ty), mask=inside)


class Eight(NamedTuple):
    """A matrix in 8 bits, as it is (N, C) and transposed (C, N), and its () float32 scale; None: not asked for."""

    straight: Tensor | None
    turned: Tensor | None
    scale: Tensor


def measure(x: Tensor, lengths: bool = False) -> tuple[Tensor, ...]:
    """x (N, C) -> float32 numbers whose largest bounds the magnitudes, and if asked others for the rows' lengths."""
    if not usable("FP8", x):
        lengths = (torch.linalg.vector_norm(x, dim=1, dtype=torch.float32).amax()[None],) if lengths else ()
        return x.abs().amax().float()[None], *lengths
    found = torch.empty(1 + lengths, triton.cdiv(len(x), MEASURE["ROWS"]), device=x.device)
    _measure[(found.shape[1],)](x.contiguous(), found, *x.shape, LENGTHS=lengths, **MEASURE)
    return found.unbind()


def fill(to: Eight, x: Tensor, bounds: Tensor | float, kind: int = PLAIN, grad=None, grad_bounds=None, squares=None):
    """Write x (N, C), whose magnitudes are at most the largest of `bounds` (n,), in 8 bits into what `to` has.

    SQUARED: relu(x)^2 in its place; SQUARED_GRAD: grad (N, C), of magnitudes up to the largest of `grad_bounds` (n,),
    times the derivative of that, and relu(x)^2 goes transposed to the `Eight` called squares.
    """
    dtype = (to.turned if to.straight is None else to.straight).dtype
    top, known = torch.finfo(dtype).max, not isinstance(bounds, Tensor)
    if usable("FP8", x):
        (rows, columns), number = x.shape, 1 if known else len(bounds)
        tall = rows if to.turned is None else to.turned.stride(0)
        ways = [way for way in (to._replace(turned=None), to._replace(straight=None)) if any(map(is_tensor, way[:2]))]
        squares = squares if kind == SQUARED_GRAD else None
        apart = FILL != JOINT_FILL or x.dtype != torch.bfloat16 or any(size % JOINT for size in (rows, columns, tall))
        if apart and len(ways) + (squares is not None) > 1:
            for way in ways:
                fill(way, x, bounds, kind, grad, grad_bounds)
            if squares is not None:
                fill(squares, x, bounds, SQUARED)
            return
        _fill[(triton.cdiv(rows, FILL["ROWS"]), triton.cdiv(columns, FILL["COLUMNS"]))](
            x.contiguous(), grad, None if known else bounds, grad_bounds, number, float(bounds) if known else 0.0,
            to.straight, to.turned, to.scale, squares and squares.turned, squares and squares.scale, rows, columns,
            tall, KIND=kind, LARGEST=top, SQUARES_LARGEST=torch.finfo(E4M3).max,
            NUMBER=triton.next_power_of_2(number), **FILL,
        )  # fmt: skip
        return
    value, limit = x.float(), torch.as_tensor(bounds, dtype=torch.float32).amax()
    if kind != PLAIN:
        value = value.relu()
    if kind == SQUARED_GRAD:
        fill(squares, value, limit, SQUARED)
        value, limit = 2 * value * grad.float(), 2 * limit * grad_bounds.amax()
    if kind == SQUARED:
        value, limit = value.square(), limit.square()
    to.scale.copy_(limit.clamp_min(1e-24) / top)
    value = (value / to.scale).clamp(-top, top).to(dtype)
    if to.straight is not None:
        to.straight.copy_(value)
    if to.turned is not None:
        to.turned.copy_(value.t())


def empty(shape: tuple, device, dtype: torch.dtype, straight: bool = True, turned: bool = True) -> Eight:
    """What a matrix of this shape goes into."""
    return Eight(
        torch.empty(shape, dtype=dtype, device=device) if straight else None,
        torch.empty(shape[::-1], dtype=dtype, device=device) if turned else None,
        torch.empty((), device=device),
    )


def quantise(x: Tensor, dtype: torch.dtype, bounds: Tensor | float | None = None) -> Eight:
    """x (N, C) in 8 bits both ways; bounds None: its largest magnitude, which is measured first."""
    to = empty(x.shape, x.device, dtype)
    fill(to, x, measure(x)[0] if bounds is None else bounds)
    return to


class Weight8(NamedTuple):
    """A matrix (sum of N_i, C) in e4m3, the parameters it was made of, and the length of its longest column."""

    eight: Eight
    longest: Tensor
    parts: tuple[Tensor, ...]


@torch.no_grad()
def weight8(*parts: Tensor) -> Weight8:
    sizes, columns = [len(part) for part in parts], parts[0].shape[1]
    eight = empty((sum(sizes), columns), parts[0].device, E4M3)
    parts16 = [part.bfloat16() for part in parts]  # Triton 3.6 transposes a float32 tile wrongly once it is in 8 bits
    bounds = torch.cat([measure(part)[0] for part in parts16])
    for part, straight, turned in zip(parts16, eight.straight.split(sizes), eight.turned.split(sizes, dim=1)):
        fill(Eight(straight, turned, eight.scale), part, bounds)
    lengths = [torch.linalg.vector_norm(part, dim=0, dtype=torch.float32) for part in parts16]
    return Weight8(eight, torch.stack(lengths).norm(dim=0).amax(), parts)


def product(a: Tensor, b: Tensor, scales: tuple[Tensor, Tensor], dtype: torch.dtype, fast: bool = False) -> Tensor:
    """a (M, K), b (N, K) in 8 bits -> a b^T (M, N). fast: sums in the tensor cores' own, coarser accumulator."""
    return torch._scaled_mm(a, b.t(), scale_a=scales[0], scale_b=scales[1], out_dtype=dtype, use_fast_accum=fast)


def weight_gradients(weight: Weight8, dy: Eight, x: Eight, dtype: torch.dtype) -> list[Tensor | None]:
    """As `products.gradients`, from what is transposed of dy (N, O) and x (N, C); dtype: of what is added up."""
    fresh = len(weight.parts) == 1 and weight.parts[0].grad is None
    dw = product(dy.turned, x.turned, (dy.scale, x.scale), weight.parts[0].dtype if fresh else dtype)
    parts = zip(weight.parts, dw.split([len(part) for part in weight.parts]))
    return [accumulate_grad_(part, grad) if part.requires_grad else None for part, grad in parts]


class Linear8(torch.autograd.Function):
    """`products._Linear` in 8 bits; the few channels of the gates stay in bf16. bound: as in `quantise`."""

    @staticmethod
    def forward(ctx, x, gate, bound, weight, *parts):
        x8, eight = quantise(x, E4M3, bound), weight.eight
        head = None if gate is None else x[:, : gate.shape[1]].contiguous()
        ctx.weight, ctx.dtype = weight, x.dtype
        ctx.save_for_backward(x8.turned, x8.scale, head, gate)
        y = product(x8.straight, eight.straight, (x8.scale, eight.scale), x.dtype, fast=True)
        return y, None if gate is None else head @ gate.t()

    @staticmethod
    def backward(ctx, dy, dgates):
        turned, scale, head, gate = ctx.saved_tensors
        weight, dgate, dy8 = ctx.weight, None, quantise(dy, E5M2)
        dx = product(dy8.straight, weight.eight.turned, (dy8.scale, weight.eight.scale), ctx.dtype)
        if gate is not None:
            dx[:, : gate.shape[1]].addmm_(dgates, gate)
            dgate = dgates.t() @ head
        return dx, dgate, None, None, *weight_gradients(weight, dy8, Eight(None, turned, scale), ctx.dtype)


class Relu2MLP8(torch.autograd.Function):
    """relu(x w1^T)^2 w2^T in 8 bits; of what lies between, only the value before the activation is kept, in bf16."""

    @staticmethod
    def forward(ctx, x, bound, first, second, *parts):
        x8 = quantise(x, E4M3, bound)
        h = product(x8.straight, first.eight.straight, (x8.scale, first.eight.scale), x.dtype, fast=True)
        peaks = measure(h)[0]
        a8 = empty(h.shape, h.device, E4M3, turned=False)
        fill(a8, h, peaks, SQUARED)
        ctx.weights, ctx.dtype = (first, second), x.dtype
        ctx.save_for_backward(x8.turned, x8.scale, h, peaks)
        return product(a8.straight, second.eight.straight, (a8.scale, second.eight.scale), x.dtype, fast=True)

    @staticmethod
    def backward(ctx, dy):
        turned, scale, h, peaks = ctx.saved_tensors
        first, second = ctx.weights
        largest, longest = measure(dy, lengths=True)
        dy8 = quantise(dy, E5M2, largest)
        da = product(dy8.straight, second.eight.turned, (dy8.scale, second.eight.scale), ctx.dtype)
        dh8, a8 = empty(h.shape, h.device, E5M2), empty(h.shape, h.device, E4M3, straight=False)
        fill(dh8, h, peaks, SQUARED_GRAD, da, longest * second.longest, a8)
        dx = product(dh8.straight, first.eight.turned, (dh8.scale, first.eight.scale), ctx.dtype)
        return (
            dx, None, None, None, *weight_gradients(first, dh8, Eight(None, turned, scale), ctx.dtype),
            *weight_gradients(second, dy8, a8, ctx.dtype),
        )  # fmt: skip


def _numbers(draw, rows: int, columns: int) -> Tensor:
    """Random numbers of which, scaled, none lies halfway between two of FP8, where the order of operations decides.

    The largest one's digits are a prime number: no others are a simple fraction of them.
    """
    x = draw(rows, columns).clamp(-3.9, 3.9)
    x[0, 0] = 251 / 64
    return x


@check("FP8", instead="bf16")
def _cases(draw, config):
    """Both ways of storing, at the model's width and at an odd one: the values, and that both hold the same bytes."""
    for rows, columns in ((192, config.hidden_size), (72, config.hidden_size + 8)):
        x, grad = _numbers(draw, rows, columns), _numbers(draw, rows, columns)

        def cast(x=x, grad=grad):
            largest, longest = measure(x, lengths=True)
            kinds = [empty(x.shape, x.device, dtype) for dtype in (E4M3, E5M2, E4M3, E5M2)]
            squares = empty(x.shape, x.device, E4M3, straight=False)
            for to, kind in zip(kinds, (PLAIN, PLAIN, SQUARED, SQUARED_GRAD)):
                fill(to, x, largest, kind, grad, measure(grad)[0], squares)
            weight = weight8(x[:64].float(), x[64:].float())
            pairs = [(eight.straight, eight.turned.t(), eight.scale) for eight in (*kinds, weight.eight)]
            pairs.append((kinds[2].straight, squares.turned.t(), squares.scale))
            values = [straight.float() * scale for straight, _, scale in pairs]
            differ = [(one.view(torch.uint8) != other.view(torch.uint8)).sum()[None] for one, other, _ in pairs]
            return [*values, *differ, largest.amax()[None], longest.amax()[None], weight.longest[None]]

        yield 0.01, cast
    a, b = (quantise(draw(192, config.hidden_size), E4M3) for _ in range(2))

    def multiply():
        if usable("FP8", a.straight):
            return [product(a.straight, b.straight, (a.scale, b.scale), torch.bfloat16)]
        return [(a.straight.float() * a.scale) @ (b.straight.float() * b.scale).t()]

    yield 0.01, multiply
