"""What stands between the float32 parameters and the blocks: their bf16 copies and rows of embedding tables.

Two things that autograd does once a micro-batch need doing once a step, or in one pass instead of four:

- `WeightCastCache`: the bf16 copy of a weight is made once and kept until the weight changes. Under the compiler
  (`low`) its bf16 gradient is added to `.grad` at once, where autograd would first make a float32 gradient and then
  add that; elsewhere (`copy`) the products see to it (`products.Weight`).
- `Places.rows`: the gradient of an embedding is added to those rows of `.grad` that occur, one program a token, in a
  fixed order (so a rerun gives the same bits), where PyTorch fills a table of zeros by atomic additions, casts it and
  adds it. The tokens are sorted once a micro-batch for all tables.

A gradient that was added in place is not handed to autograd. Hooks that wait for the parameter (DDP) still run, and
find it in `.grad`. Elsewhere than on CUDA, and for parameters that are not leaves, all is as in plain PyTorch.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import check, triton, usable

if triton is not None:
    import triton.language as tl

    @triton.jit
    def _add_rows(total, grad, order, starts, tokens, columns, least, most, ROWS: tl.constexpr, BLOCK: tl.constexpr):
        """total[token] += the sum of the rows of grad whose token it is: one token, BLOCK columns a program.

        Only tokens that occur `least` to `most` times. tokens: that of each program; None: the program's own number.
        """
        token = tl.program_id(0) if tokens is None else tl.load(tokens + tl.program_id(0))
        begin, end = tl.load(starts + token), tl.load(starts + token + 1)
        if (end - begin >= least) & (end - begin <= most):
            column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
            target = total + token.to(tl.int64) * columns + column
            found = tl.load(target, mask=column < columns, other=0.0).to(tl.float32)
            for at in range(begin, end, ROWS):
                place = at + tl.arange(0, ROWS)
                known = place < end
                row = tl.load(order + place, mask=known, other=0)
                inside = known[:, None] & (column < columns)[None, :]
                part = tl.load(grad + row[:, None] * columns + column[None, :], mask=inside, other=0.0)
                found += tl.sum(part.to(tl.float32), axis=0)
            tl.store(target, found.to(total.dtype.element_ty), mask=column < columns)

    @triton.jit
    def _add(total, part, numel, BLOCK: tl.constexpr):
        """total += part, of two dtypes: PyTorch's own kernel for that moves half as many bytes a second."""
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = at < numel
        value = tl.load(total + at, mask=inside) + tl.load(part + at, mask=inside).to(total.dtype.element_ty)
        tl.store(total + at, value, mask=inside)


class _Low(torch.autograd.Function):
    @staticmethod
    def forward(ctx, copy, *weights):
        ctx.weights = weights
        return copy.detach()

    @staticmethod
    def backward(ctx, grad):
        return None, *map(accumulate_grad_, ctx.weights, grad.split([len(weight) for weight in ctx.weights]))


def accumulate_grad_(weight: Tensor, grad: Tensor) -> Tensor | None:
    """Add to `weight.grad` in place and give None, or what autograd shall make the gradient if there is none yet."""
    if weight.grad is None:
        return grad.to(weight.dtype)
    if usable("gradient sums", grad) and grad.is_contiguous() and weight.grad.is_contiguous():
        _add[(triton.cdiv(grad.numel(), 4096),)](weight.grad, grad, grad.numel(), BLOCK=4096)
    else:
        weight.grad.add_(grad)
    return None


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, table, places, real):
        ctx.table, ctx.places = table, places
        ids = places.ids
        return F.embedding(ids, table) if real else table.new_empty(()).expand(*ids.shape, table.shape[1])

    @staticmethod
    def backward(ctx, grad):
        table, grad = ctx.table, grad.contiguous()
        total = torch.zeros_like(table) if table.grad is None else table.grad
        ctx.places.add(total, grad)
        return total if table.grad is None else None, None, None


class EmbeddingGradIndex:
    """Where each token stands in a batch of ids (B, T): made once, used by every embedding table."""

    RARE = 4  # most tokens of a batch occur once or twice, and a few a thousand times: two kernels for the two

    def __init__(self, ids: Tensor, rows: int):
        """rows: of the tables."""
        self.ids = ids
        self.fast = usable("gradient sums", ids) and torch.is_grad_enabled()
        if self.fast:
            self.sort(rows)

    def sort(self, rows: int) -> None:
        tokens, self.order = self.ids.flatten().sort(stable=True)
        self.starts = torch.searchsorted(tokens, torch.arange(rows + 1, device=tokens.device))
        most = min(rows, len(tokens) // (self.RARE + 1))  # so many tokens at most are not rare
        self.frequent = self.starts.diff().topk(most).indices if most else self.order[:0]

    def add(self, total: Tensor, grad: Tensor) -> None:
        """total (V, C) += the rows of grad (B, T, C), each to its token's row, in place."""
        columns = total.shape[1]
        block = min(2048, triton.next_power_of_2(columns))
        _add_rows[(len(total), triton.cdiv(columns, block))](
            total, grad, self.order, self.starts, None, columns, 1, self.RARE,
            ROWS=1, BLOCK=block, num_warps=max(1, block // 256),
        )  # fmt: skip
        if len(self.frequent):
            _add_rows[(len(self.frequent), triton.cdiv(columns, 128))](
                total, grad, self.order, self.starts, self.frequent, columns, self.RARE + 1, len(self.order),
                ROWS=64, BLOCK=128, num_warps=8,
            )  # fmt: skip

    def rows(self, table: Tensor, real: bool = True) -> Tensor | None:
        """table (V, C) -> its rows (B, T, C).

        Not `real`: only what carries their gradient, without values or memory, for a kernel that reads the table by
        itself; None where none is needed, because the table's gradient comes by plain autograd.
        """
        if self.fast and table.requires_grad:
            return _Rows.apply(table, self, real)
        return F.embedding(self.ids, table) if real else None


class WeightCastCache:
    """What is made of weights, above all their copies in another dtype, kept until the weights change."""

    def __init__(self):
        self.kept: dict = {}

    def low(self, name, dtype: torch.dtype, *weights: Tensor) -> Tensor:
        """Weights (N_i, C) -> one (sum N_i, C) of `dtype`, whose gradient goes to them."""
        if not weights[0].is_cuda or weights[0].dtype == dtype:
            return (weights[0] if len(weights) == 1 else torch.cat(weights)).to(dtype)
        return _Low.apply(self.copy(name, dtype, *weights), *weights)

    def copy(self, name, dtype: torch.dtype, *weights: Tensor) -> Tensor:
        """The same without a gradient; `name` tells one set of weights from another."""
        if weights[0].dtype == dtype:
            return weights[0].detach() if len(weights) == 1 else torch.cat([weight.detach() for weight in weights])
        return self.made(name, partial(joined, dtype), *weights)

    def made(self, name, make: Callable, *weights: Tensor):
        """make(*weights) of now or before, if no weight has changed since."""
        versions = [weight._version for weight in weights]
        if name not in self.kept or self.kept[name][0] != versions:
            with torch.no_grad():
                self.kept[name] = versions, make(*weights)
        return self.kept[name][1]


def joined(dtype: torch.dtype, *weights: Tensor) -> Tensor:
    copy = torch.empty(sum(map(len, weights)), weights[0].shape[1], dtype=dtype, device=weights[0].device)
    for part, weight in zip(copy.split([len(weight) for weight in weights]), weights):
        part.copy_(weight)
    return copy


@check("gradient sums", instead="PyTorch's operations")
def _cases(draw, config):
    table, grad = draw(60, config.hidden_size), draw(3, 200, config.hidden_size)
    ids = (torch.arange(600, device=table.device) ** 2 % 47).view(3, 200)  # some once, some often, some never
    ids[0, :150] = 3

    def rows():
        leaf = table.clone().requires_grad_()
        for _ in range(2):  # the second time added to the first
            EmbeddingGradIndex(ids, len(leaf)).rows(leaf).backward(grad)
        weight = torch.nn.Parameter(table.float())
        weight.grad = weight.detach().clone()
        accumulate_grad_(weight, grad[0, : len(table)].contiguous())
        return [leaf.grad, weight.grad]

    yield 0.02, rows
