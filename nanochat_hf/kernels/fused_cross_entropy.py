"""Fused linear cross-entropy with logit softcapping: the head and its loss in one operation.

At 32K tokens per micro-batch the float32 logits of a 32K vocabulary take 4 GB and are read and written several times.
Here the logits exist in bf16, one chunk at a time, and one Triton kernel replaces them by their gradient in one pass.
Softcapping bounds the logits, so the softmax needs no maximum; without it one more pass finds that. The matmuls that
follow apply the denominator. (Gradients in the forward pass: Liger Kernel, arXiv:2410.10989.)
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import check, tl, triton, usable, with_gradients

MAX_LOGITS_BYTES = 1 << 30  # of one chunk of bf16 logits; larger chunks gain nothing once the matmuls fill the device

if triton is not None:

    @triton.jit
    def _softcap_nll(
        logits, targets, losses, scales, inverse_count, num_tokens, stride, cap,
        CAPPED: tl.constexpr, GRAD: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """One row: loss of its target and, in place, the gradient of the mean loss with respect to the raw logits.

        The row's factor 1 / (sum of exponentials * number of targets) goes to `scales`, for the matmuls after it.
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
            target_logit = 1.0 - 2.0 / (tl.exp(target_logit * (2.0 / cap)) + 1.0)
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
                squashed = 1.0 - 2.0 / (tl.exp(raw * (2.0 / cap)) + 1.0)  # tanh(raw / cap); the exponential may be inf
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
                softcap or 0.0, CAPPED=softcap is not None, GRAD=training,
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


def fused_linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None, num_tokens: int, reduction="mean"
) -> Tensor:
    """Cross-entropy of softcap * tanh(hidden @ weight.T / softcap), or with None of hidden @ weight.T, in nats.

    Args:
        hidden: (N, C) normed hidden states, bf16 or fp32.
        weight: (V, C) head, fp32; rows from `num_tokens` on are padding and excluded.
        targets: (N,) int64; -100 is ignored.
        reduction: "mean" over the targets that are not ignored, or "none": (N,) fp32, without gradient if fused.
    """
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
