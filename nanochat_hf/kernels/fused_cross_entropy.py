"""Fused linear cross-entropy with logit softcapping: the head and its loss in one operation.

At 32K tokens per micro-batch the float32 logits of a 32K vocabulary take 4 GB and are read and written several times.
Here the logits exist in bf16, one chunk at a time, and one Triton kernel replaces them by their gradient in one pass.
Softcapping bounds the logits, so the softmax needs no maximum; without it one more pass finds that. The matmuls that
follow apply the denominator. (Gradients in the forward pass: Liger Kernel, arXiv:2410.10989.)

With a `Float8Weight` the three matmuls of the head run in FP8, as those of the blocks. The gradient of the logits,
which lies between -1 and 1, needs a fixed scale only. E5M2 holds it down to 2^-32.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import check, tl, triton, usable, with_gradients
from .float8 import ALIGNED, CAST_TILE, E4M3, E5M2, Float8Pair, Float8Weight, empty, quantize

MAX_LOGITS_BYTES = 1 << 30  # of one chunk of bf16 logits; larger chunks gain nothing once the matmuls fill the device
FP8_LOGITS_BYTES = 1 << 28  # the same in FP8, where the gradients of all chunks are kept, transposed

if triton is not None:

    @triton.jit
    def _tanh(x, FAST: tl.constexpr):
        """FAST: one instruction, right to 2^-11 as numbers in bf16 are to 2^-9. Else the exponential may be inf."""
        if FAST:
            return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
        return 1.0 - 2.0 / (tl.exp(x * 2.0) + 1.0)

    @triton.jit
    def _softcap_nll(
        logits, targets, losses, scales, inverse_count, num_tokens, stride, cap,
        CAPPED: tl.constexpr, FAST: tl.constexpr, GRAD: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """One row: loss of its target and, in place, the gradient of the mean loss with respect to the raw logits.

        The row's factor 1 / (sum of exponentials * number of targets) goes to `scales`, for the matmuls after it.
        Without GRAD, the logarithm of that sum goes there.
        """
        row = tl.program_id(0).to(tl.int64)
        target = tl.load(targets + row)
        valid = target >= 0
        base = logits + row * stride
        target_logit = tl.load(base + tl.maximum(target, 0)).to(tl.float32)
        target_slope = 1.0
        maximum = 0.0
        if CAPPED:
            tl.debug_barrier()  # every warp has read the target's logit before one of them overwrites it
            target_logit = _tanh(target_logit / cap, FAST)
            target_logit, target_slope = target_logit * cap, 1.0 - target_logit * target_logit
        else:
            highest = tl.full([BLOCK], float("-inf"), dtype=tl.float32)
            for start in range(0, stride, BLOCK):
                columns = start + tl.arange(0, BLOCK)
                raw = tl.load(base + columns, mask=columns < num_tokens, other=float("-inf")).to(tl.float32)
                highest = tl.maximum(highest, raw)
            maximum = tl.max(highest, 0)
            target_logit -= maximum
        total = tl.zeros([BLOCK], dtype=tl.float32)
        for start in range(0, stride, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            inside = columns < num_tokens
            raw = tl.load(base + columns, mask=inside, other=0.0).to(tl.float32)
            if CAPPED:
                squashed = _tanh(raw * (1.0 / cap), FAST)
                exponential = tl.where(inside, tl.exp(squashed * cap), 0.0)  # e^15 at most: no overflow
                slope = exponential * (1.0 - squashed * squashed)
            else:
                exponential = tl.where(inside, tl.exp(raw - maximum), 0.0)
                slope = exponential
            total += exponential
            if GRAD:
                slope = tl.where(valid, slope, 0.0)
                tl.store(base + columns, slope.to(logits.dtype.element_ty), mask=columns < stride)
        mass = tl.sum(total, 0)
        tl.store(losses + row, tl.where(valid, tl.log(mass) - target_logit, 0.0))
        if GRAD:
            tl.debug_barrier()  # the target's own gradient comes after what the loop wrote there
            slope = (tl.exp(target_logit) - mass) * target_slope
            tl.store(base + target, slope.to(logits.dtype.element_ty), mask=valid)
            tl.store(scales + row, tl.load(inverse_count) / mass)
        else:
            tl.store(scales + row, tl.log(mass) + maximum)

    @triton.jit
    def _softcap_grad(
        logits, targets, log_masses, row_major, transposed, rows, num_tokens, stride, transposed_stride, cap,
        CAPPED: tl.constexpr, FAST: tl.constexpr, LARGEST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ):  # fmt: skip
        """A tile of the gradient of the summed loss with respect to the raw logits, times LARGEST, to both layouts."""
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        inside = (row < rows) & (column < stride)
        at, across = row.to(tl.int64) * stride + column, column.to(tl.int64) * transposed_stride + row
        value = tl.load(logits + at, mask=inside, other=0.0).to(tl.float32)
        target = tl.load(targets + row, mask=row < rows, other=-100)
        log_mass = tl.load(log_masses + row, mask=row < rows, other=0.0)
        slope = 1.0
        if CAPPED:
            value = _tanh(value * (1.0 / cap), FAST)
            value, slope = value * cap, 1.0 - value * value
        value = (tl.exp(value - log_mass) - tl.where(column == target, 1.0, 0.0)) * slope * LARGEST
        value = tl.where((target >= 0) & (column < num_tokens), value, 0.0)
        value = tl.clamp(value, -LARGEST, LARGEST, tl.PropagateNan.ALL)  # NaN stays NaN
        if row_major is not None:
            tl.store(row_major + at, value.to(row_major.dtype.element_ty), mask=inside)
        if transposed is not None:
            tl.store(transposed + across, value.to(transposed.dtype.element_ty), mask=inside)


class _FusedLinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, softcap, num_tokens, reduction):
        bf16_weight = weight.to(hidden.dtype)
        training = reduction == "mean" and (hidden.requires_grad or weight.requires_grad)
        inverse_count = (targets >= 0).sum().clamp(min=1).float().reciprocal()
        losses = torch.empty(targets.shape, dtype=torch.float32, device=hidden.device)
        scales = torch.empty_like(losses)[:, None]
        hidden_grad = torch.empty_like(hidden) if training else None
        weight_grad = None
        rows = max(1, MAX_LOGITS_BYTES // (2 * len(bf16_weight)))
        buffer = hidden.new_empty(min(rows, len(hidden)), len(bf16_weight))  # one chunk's memory serves all
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            logits = torch.mm(hidden[part], bf16_weight.t(), out=buffer[: len(hidden[part])])  # (rows, V)
            _softcap_nll[(len(logits),)](
                logits, targets[part], losses[part], scales[part], inverse_count, num_tokens, logits.stride(0),
                softcap or 0.0, CAPPED=softcap is not None, FAST=False, GRAD=training,
                BLOCK=min(4096, triton.next_power_of_2(len(bf16_weight))), num_warps=8,
            )  # fmt: skip
            if training:
                torch.mm(logits, bf16_weight, out=hidden_grad[part])
                scaled = hidden[part] * scales[part].to(hidden.dtype)
                if weight_grad is None:
                    weight_grad = torch.mm(logits.t(), scaled, out_dtype=torch.float32)
                else:
                    torch.addmm(weight_grad, logits.t(), scaled, out_dtype=torch.float32, out=weight_grad)
        ctx.save_for_backward(hidden_grad, weight_grad, scales)
        return losses.sum() * inverse_count if reduction == "mean" else losses

    @staticmethod
    def backward(ctx, grad):
        hidden_grad, weight_grad, scales = ctx.saved_tensors
        if hidden_grad is None:
            raise RuntimeError("the per-token losses have no gradient; use reduction='mean'")
        hidden_grad.mul_((scales * grad).to(hidden_grad.dtype))
        return hidden_grad, weight_grad.mul_(grad), None, None, None, None


class _Float8LinearCrossEntropy(torch.autograd.Function):
    """The mean loss, with `Float8Weight`'s matmuls."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, softcap, num_tokens, *parts):
        vocab_size = len(weight.pair.row_major)
        x8 = quantize(hidden, E4M3, hidden.shape[1] ** 0.5)  # the bound of a normed row
        inverse_count = (targets >= 0).sum().clamp(min=1).float().reciprocal()
        grads = empty((len(hidden), vocab_size), hidden.device, E5M2, row_major=False)
        grads = grads._replace(scale=inverse_count / torch.finfo(E5M2).max)
        losses, hidden_grad = torch.empty(targets.shape, device=hidden.device), torch.empty_like(hidden)
        rows = max(16, FP8_LOGITS_BYTES // (2 * vocab_size) // 64 * 64)
        logits = hidden.new_empty(min(rows, len(hidden)), vocab_size)  # one chunk's memory serves all
        row_major = torch.empty_like(logits, dtype=E5M2)
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            chunk = x8._replace(row_major=x8.row_major[part])
            out = Float8Pair(row_major[: len(chunk.row_major)], grads.transposed[:, part], grads.scale)
            raw = weight.matmul(chunk, hidden.dtype, out=logits[: len(out.row_major)])
            losses[part] = softcapped_loss_and_grad(out, raw, targets[part], softcap, num_tokens)
            weight.matmul_grad(out, hidden.dtype, out=hidden_grad[part])
        ctx.weight = weight
        ctx.save_for_backward(hidden_grad, grads.transposed, grads.scale, x8.transposed, x8.scale)
        return losses.sum() * inverse_count

    @staticmethod
    def backward(ctx, grad):
        hidden_grad, transposed, scale, *x8 = ctx.saved_tensors
        grads = Float8Pair(None, transposed, scale * grad)
        return hidden_grad.mul_(grad), *[None] * 4, *ctx.weight.accumulate_grads(grads, *x8, hidden_grad.dtype)


def softcapped_loss_and_grad(
    out: Float8Pair, logits: Tensor, targets: Tensor, softcap: float | None, num_tokens: int
) -> Tensor:
    """logits (N, V), targets (N,) -> losses (N,) in nats; to `out` the gradient of their sum, times E5M2's largest."""
    largest = torch.finfo(E5M2).max
    if not usable("FP8 head", logits):
        capped = logits.float() if softcap is None else softcap * torch.tanh(logits.float() / softcap)
        slope = 1.0 if softcap is None else 1 - (capped / softcap).square()
        log_probs = capped.index_fill(1, torch.arange(num_tokens, logits.shape[1], device=logits.device), -torch.inf)
        log_probs = log_probs.log_softmax(1)
        grads = (log_probs.exp() - F.one_hot(targets.clamp(min=0), logits.shape[1])) * slope
        grads = torch.where(targets[:, None] >= 0, grads * largest, 0).to(E5M2)
        out.row_major.copy_(grads)
        out.transposed.copy_(grads.t())
        return F.nll_loss(log_probs, targets, ignore_index=-100, reduction="none")
    rows, vocab_size = logits.shape
    losses, log_masses = torch.empty(2, rows, device=logits.device)
    _softcap_nll[(rows,)](
        logits, targets, losses, log_masses, None, num_tokens, vocab_size, softcap or 0.0,
        CAPPED=softcap is not None, FAST=True, GRAD=False,
        BLOCK=min(4096, triton.next_power_of_2(vocab_size)), num_warps=8,
    )  # fmt: skip
    grid = triton.cdiv(rows, CAST_TILE["ROWS"]), triton.cdiv(vocab_size, CAST_TILE["COLUMNS"])
    aligned = not any(size % ALIGNED for size in (rows, vocab_size, out.transposed.stride(0)))
    pairs = [out[:2]] if aligned else [(out.row_major, None), (None, out.transposed)]
    for pair in pairs:
        _softcap_grad[grid](
            logits, targets, log_masses, *pair, rows, num_tokens, vocab_size, out.transposed.stride(0),
            softcap or 0.0, CAPPED=softcap is not None, FAST=True, LARGEST=largest, **CAST_TILE,
        )  # fmt: skip
    return losses


def fused_linear_cross_entropy(
    hidden: Tensor, weight: Tensor | Float8Weight, targets: Tensor, softcap: float | None, num_tokens: int,
    reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """Cross-entropy of softcap * tanh(hidden @ weight.T / softcap), or with None of hidden @ weight.T, in nats.

    Args:
        hidden: (N, C) normed hidden states, bf16 or fp32.
        weight: (V, C) head, fp32 or `Float8Weight`; rows from `num_tokens` on are padding and excluded.
        targets: (N,) int64; -100 is ignored.
        reduction: "mean" over the targets that are not ignored, or "none": (N,) fp32, without gradient if fused.
    """
    if isinstance(weight, Float8Weight):
        assert reduction == "mean"
        return _Float8LinearCrossEntropy.apply(hidden, weight, targets, softcap, num_tokens, *weight.parts)
    if hidden.dtype == torch.bfloat16 and usable("fused cross-entropy", hidden):
        return _FusedLinearCrossEntropy.apply(hidden, weight, targets, softcap, num_tokens, reduction)
    logits = F.linear(hidden, weight.to(hidden.dtype))[..., :num_tokens].float()
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    reduce = "sum" if reduction == "mean" else reduction
    loss = F.cross_entropy(logits, targets, ignore_index=-100, reduction=reduce)
    return loss / (targets >= 0).sum().clamp(min=1) if reduction == "mean" else loss


@check("fused cross-entropy", instead="PyTorch's operations, which take more memory")
def _cases(draw, config):
    """Logits large enough for the softcap, and enough rows of padding, that a kernel without them is off by more."""
    size, cap = min(config.vocab_size, 5632), config.final_logit_softcapping
    num_tokens = size * 3 // 4  # of 5632: more columns than one program reads at once
    hidden, weight = draw(80, config.hidden_size), draw(size, config.hidden_size, dtype=torch.float32)
    weight *= 4 / config.hidden_size**0.5
    targets = torch.arange(80, device=hidden.device) * 37 % num_tokens
    targets[::7] = -100
    targets[1] = num_tokens - 1  # the last before the padding

    def loss(hidden, weight, reduction="mean"):
        return [fused_linear_cross_entropy(hidden, weight, targets, cap, num_tokens, reduction)]

    yield 0.02, lambda: with_gradients(loss, (hidden, weight))
    yield 0.01, lambda: loss(hidden, weight, "none")


@check("FP8 head", instead="bf16 for the head")
def _float8_cases(draw, config):
    size, cap = min(config.vocab_size, 5632) // 64 * 64, config.final_logit_softcapping
    num_tokens = size * 3 // 4
    targets = torch.arange(192, device=draw(1).device) * 37 % num_tokens
    targets[::7] = -100
    targets[1] = num_tokens - 1
    logits = 4 * draw(192, size)

    def loss_and_grad():
        out = empty(logits.shape, logits.device, E5M2)
        losses = softcapped_loss_and_grad(out, logits, targets, cap, num_tokens)
        differ = (out.row_major.view(torch.uint8) != out.transposed.t().view(torch.uint8)).sum()[None]
        return [losses, out.row_major.float(), differ]

    yield 0.02, loss_and_grad
