"""Casts of weights kept over a step, and gradients added in place to the `.grad` of the parameters (CUDA).

- `WeightCastCache`: the bf16 or FP8 copy of a weight is made once and kept until the weight changes.
- `accumulate_grad_`: adds a bf16 gradient to a float32 `.grad` in one pass, where autograd would cast it first.
- `EmbeddingGradIndex`: the gradient of an embedding is added only to the rows of `.grad` that occur. PyTorch would
  fill a table of zeros and add it. The order is fixed, so a rerun gives the same bits. The token ids are sorted once
  per micro-batch for all tables.

A gradient that was added in place is not returned to autograd. Hooks of the parameter still run. On other devices
everything is as in plain PyTorch.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import check, tl, triton, usable

if triton is not None:

    @triton.jit
    def _add_rows(total, grad, order, starts, tokens, columns, least, most, ROWS: tl.constexpr, BLOCK: tl.constexpr):
        """total[token] += the sum of its rows of grad: one token id, BLOCK columns per program.

        Only tokens that occur `least` to `most` times. tokens: that of each program; None: the program's own number.
        """
        token = tl.program_id(0) if tokens is None else tl.load(tokens + tl.program_id(0))
        begin, end = tl.load(starts + token), tl.load(starts + token + 1)
        if (end - begin >= least) & (end - begin <= most):
            column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
            target = total + token.to(tl.int64) * columns + column
            value = tl.load(target, mask=column < columns, other=0.0).to(tl.float32)
            for at in range(begin, end, ROWS):
                place = at + tl.arange(0, ROWS)
                valid = place < end
                row = tl.load(order + place, mask=valid, other=0)
                inside = valid[:, None] & (column < columns)[None, :]
                part = tl.load(grad + row[:, None] * columns + column[None, :], mask=inside, other=0.0)
                value += tl.sum(part.to(tl.float32), axis=0)
            tl.store(target, value.to(total.dtype.element_ty), mask=column < columns)

    @triton.jit
    def _add(total, part, numel, BLOCK: tl.constexpr):
        """total += part, of two dtypes: PyTorch's own kernel for that reaches half the bandwidth."""
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = at < numel
        value = tl.load(total + at, mask=inside) + tl.load(part + at, mask=inside).to(total.dtype.element_ty)
        tl.store(total + at, value, mask=inside)


def accumulate_grad_(weight: Tensor, grad: Tensor) -> Tensor | None:
    """Add to `weight.grad` in place and return None; return the gradient for autograd if there is none yet."""
    if weight.grad is None:
        return grad.to(weight.dtype)
    if usable("gradient sums", grad) and grad.is_contiguous() and weight.grad.is_contiguous():
        _add[(triton.cdiv(grad.numel(), 4096),)](weight.grad, grad, grad.numel(), BLOCK=4096)
    else:
        weight.grad.add_(grad)
    return None


class EmbeddingGradIndex:
    """Where each token id occurs in ids (B, T): made once, used for every embedding table, of `vocab_size` rows."""

    RARE = 4  # most token ids of a batch occur once or twice and a few a thousand times: one kernel for each kind

    def __init__(self, ids: Tensor, vocab_size: int):
        self.ids = ids.contiguous()  # kernels count on it
        self.sorted = usable("gradient sums", ids) and torch.is_grad_enabled()
        if self.sorted:
            tokens, self.order = ids.flatten().sort(stable=True)
            self.starts = torch.searchsorted(tokens, torch.arange(vocab_size + 1, device=tokens.device))
            most = min(vocab_size, len(tokens) // (self.RARE + 1))  # not more than so many token ids are frequent
            self.frequent = self.starts.diff().topk(most).indices if most else self.order[:0]

    def lookup(self, table: Tensor, materialize: bool = True) -> "Tensor | EmbeddingRows":
        """table (V, C) -> its rows (B, T, C); or, not materialized, what a kernel reads them from."""
        if not materialize:
            return EmbeddingRows(self, table)
        return _Lookup.apply(table, self) if self.sorted and table.requires_grad else F.embedding(self.ids, table)

    def accumulate_grad(self, table: Tensor, grad: Tensor) -> Tensor | None:
        """As `accumulate_grad_`, from the gradient (B, T, C) of the table's rows."""
        if not self.sorted:
            return torch.ops.aten.embedding_dense_backward(grad, self.ids, len(table), -1, False).to(table.dtype)
        total = torch.zeros_like(table) if table.grad is None else table.grad
        grad, columns = grad.contiguous(), table.shape[1]
        block = min(2048, triton.next_power_of_2(columns))
        _add_rows[(len(total), triton.cdiv(columns, block))](
            total, grad, self.order, self.starts, None, columns, 1, self.RARE,
            ROWS=1, BLOCK=block, num_warps=max(1, block // 256),
        )  # fmt: skip
        if len(self.frequent):
            _add_rows[(len(self.frequent), triton.cdiv(columns, 128))](
                total, grad, self.order, self.starts, self.frequent, columns, self.RARE + 1, len(self.order),
                ROWS=64, BLOCK=128, num_warps=4,
            )  # fmt: skip
        return total if table.grad is None else None


class EmbeddingRows:
    """Rows of a table that are not materialized. Not a tuple: FSDP2 would look into it, and replace the table."""

    def __init__(self, index: EmbeddingGradIndex, table: Tensor):
        self.index, self.table = index, table


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx, table, index):
        ctx.table, ctx.index = table, index
        return F.embedding(index.ids, table)

    @staticmethod
    def backward(ctx, grad):
        return ctx.index.accumulate_grad(ctx.table, grad), None


class WeightCastCache:
    """Casts of weights, without gradient, kept until a weight changes."""

    def __init__(self):
        self.casts: dict = {}

    def cast_detached(self, name, dtype: torch.dtype, *weights: Tensor) -> Tensor:
        """`cast_weights`, from the cache; each set of weights has its own `name`."""
        return self.lookup(name, partial(cast_weights, dtype), *weights)

    def lookup(self, name, make: Callable, *weights: Tensor):
        """make(*weights), from the cache if no weight has changed since."""
        versions = [weight._version for weight in weights]
        if name not in self.casts or self.casts[name][0] != versions:
            with torch.no_grad():
                self.casts[name] = versions, make(*weights)
        return self.casts[name][1]


def cast_weights(dtype: torch.dtype, *weights: Tensor) -> Tensor:
    """Weights (N_i, C) -> one (sum N_i, C) of `dtype`."""
    result = torch.empty(sum(map(len, weights)), weights[0].shape[1], dtype=dtype, device=weights[0].device)
    for part, weight in zip(result.split([len(weight) for weight in weights]), weights):
        part.copy_(weight)
    return result


@check("gradient sums", instead="PyTorch's operations")
def _cases(draw, config):
    table, grad = draw(60, config.hidden_size), draw(3, 265, config.hidden_size)
    occur = torch.tensor([*range(35), 200], device=table.device)  # each token id as often as its number, one 200 times
    ids = torch.arange(36, device=table.device).repeat_interleave(occur)
    ids = ids[torch.arange(795, device=table.device) * 17 % 795].view(3, 265)

    def rows():
        leaf = table.clone().requires_grad_()
        for _ in range(2):  # the second time added to the first
            EmbeddingGradIndex(ids, len(leaf)).lookup(leaf).backward(grad)
        weight = torch.nn.Parameter(table.float())
        weight.grad = weight.detach().clone()
        accumulate_grad_(weight, grad[0, : len(table)].contiguous())
        return [leaf.grad, weight.grad]

    yield 0.02, rows
