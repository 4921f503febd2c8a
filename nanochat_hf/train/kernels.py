"""Fused operations of the training step: head and loss, relu-squared MLP, attention and what comes before it.

Each has a plain PyTorch twin that runs where the fast one cannot (no CUDA device, package not installed), and the
tests hold the two together. What is fused and why:

- head, softcap and cross-entropy: at 32K tokens a step the float32 logits of a 32K vocabulary are 4 GB, read and
  written several times. Here they exist in bf16, a chunk at a time, and one Triton kernel turns them into their own
  gradient in place, in a single pass: the softcap bounds the logits, so the softmax needs no running maximum, and its
  denominator is left to the products. (Gradients made in the forward pass are Liger Kernel's idea, arXiv:2410.10989.)
- MLP: relu(x)^2 runs in the epilogue of the first matrix product and its gradient in that of the second one's, by the
  CuTe kernels of Dao-AILab/quack; only the value before the activation is kept for the backward pass.
"""

import logging

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU and Apple builds of torch come without Triton
    triton = None

try:
    # quack 0.6 names a compiled kernel by all that its functions refer to and refuses cutlass-dsl 4.7's logger, which
    # is no part of the mathematics; its protocol for such objects is this method.
    if not hasattr(logging.Logger, "__quack_semantic_key__"):
        logging.Logger.__quack_semantic_key__ = lambda self: ("logger", self.name)
    from quack.gemm_interface import gemm_act, gemm_dact
except ImportError:
    gemm_act = gemm_dact = None

MAX_LOGITS_BYTES = 1 << 30  # of one chunk of bf16 logits; larger chunks gain nothing once the products fill the device


# ---------------------------------------------------------------------------------------------------- head and loss

if triton is not None:

    @triton.jit
    def _softcap_nll(
        logits,
        targets,
        losses,
        scales,
        inverse_count,
        num_tokens,
        stride,
        cap,
        GRAD: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """One row: loss of its target and, in place, the gradient of the mean loss with respect to the raw logits.

        The gradient lacks the row's factor 1 / (its sum of exponentials * number of targets), which goes to `scales`:
        so one pass over the row is enough, and the products that follow take the factor in.
        """
        row = tl.program_id(0).to(tl.int64)
        target = tl.load(targets + row)
        valid = target >= 0
        base = logits + row * stride
        wanted = tl.load(base + tl.maximum(target, 0)).to(tl.float32)
        wanted = 1.0 - 2.0 / (tl.exp(wanted * (2.0 / cap)) + 1.0)
        total = tl.zeros([BLOCK], dtype=tl.float32)
        for start in range(0, stride, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            inside = columns < num_tokens
            raw = tl.load(base + columns, mask=inside, other=0.0).to(tl.float32)
            squashed = 1.0 - 2.0 / (tl.exp(raw * (2.0 / cap)) + 1.0)  # tanh(raw / cap); the exponential may be inf
            exponential = tl.where(inside, tl.exp(squashed * cap), 0.0)  # at most e^15: no overflow without a maximum
            total += exponential
            if GRAD:
                slope = tl.where(valid, exponential * (1.0 - squashed * squashed), 0.0)
                tl.store(base + columns, slope.to(logits.dtype.element_ty), mask=columns < stride)
        mass = tl.sum(total, 0)
        tl.store(losses + row, tl.where(valid, tl.log(mass) - wanted * cap, 0.0))
        if GRAD:
            tl.debug_barrier()  # the target's own gradient comes after what the loop wrote there
            slope = (tl.exp(wanted * cap) - mass) * (1.0 - wanted * wanted)
            tl.store(base + target, slope.to(logits.dtype.element_ty), mask=valid)
            tl.store(scales + row, tl.load(inverse_count) / mass)


class _FusedHeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, softcap, num_tokens, reduction):
        low = weight.to(hidden.dtype)
        training = reduction == "mean" and (hidden.requires_grad or weight.requires_grad)
        inverse_count = (targets >= 0).sum().clamp(min=1).float().reciprocal()
        losses = torch.empty(targets.shape, dtype=torch.float32, device=hidden.device)
        scales = torch.empty_like(losses)[:, None]
        hidden_grad = torch.empty_like(hidden) if training else None
        weight_grad = None
        rows = max(1, MAX_LOGITS_BYTES // (2 * len(low)))
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            logits = hidden[part] @ low.t()  # (rows, V)
            _softcap_nll[(len(logits),)](
                logits, targets[part], losses[part], scales[part], inverse_count, num_tokens, logits.stride(0),
                float(softcap), GRAD=training, BLOCK=min(4096, triton.next_power_of_2(len(low))), num_warps=8,
            )  # fmt: skip
            if training:
                torch.mm(logits, low, out=hidden_grad[part])
                scaled = hidden[part] * scales[part].to(hidden.dtype)
                if weight_grad is None:
                    weight_grad = torch.mm(logits.t(), scaled, out_dtype=torch.float32)
                else:
                    weight_grad = torch.addmm(weight_grad, logits.t(), scaled, out_dtype=torch.float32)
        ctx.save_for_backward(hidden_grad, weight_grad, scales)
        return losses.sum() * inverse_count if reduction == "mean" else losses

    @staticmethod
    def backward(ctx, grad):
        hidden_grad, weight_grad, scales = ctx.saved_tensors
        if hidden_grad is None:
            raise RuntimeError("the per-token losses have no gradient; use reduction='mean'")
        hidden_grad.mul_((scales * grad).to(hidden_grad.dtype))
        return hidden_grad, weight_grad.mul_(grad), None, None, None, None


def head_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float, num_tokens: int, reduction="mean"
) -> Tensor:
    """Cross-entropy of softcap * tanh(hidden @ weight.T / softcap), in nats.

    Args:
        hidden: (N, C) normed hidden states, bf16 or fp32.
        weight: (V, C) head, fp32 master weights; rows from `num_tokens` on are padding and take no part.
        targets: (N,) int64, -100 is ignored.
        reduction: "mean" over the targets that count, or "none": (N,) fp32, without gradient on the fused path.
    """
    if triton is not None and hidden.is_cuda and hidden.dtype == torch.bfloat16:
        return _FusedHeadLoss.apply(hidden, weight, targets, softcap, num_tokens, reduction)
    logits = F.linear(hidden, weight.to(hidden.dtype))[..., :num_tokens].float()
    logits, reduce = softcap * torch.tanh(logits / softcap), "sum" if reduction == "mean" else reduction
    loss = F.cross_entropy(logits, targets, ignore_index=-100, reduction=reduce)
    return loss / (targets >= 0).sum().clamp(min=1) if reduction == "mean" else loss


# -------------------------------------------------------------------------------------------------- 8-bit products


def quantise(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x -> (x / scale in an 8-bit float `dtype`, float32 scale): the largest magnitude becomes the type's largest."""
    largest = torch.finfo(dtype).max
    scale = x.abs().amax().float().clamp(min=1e-12) / largest
    return (x.float() / scale).clamp(-largest, largest).to(dtype), scale


class _Float8Linear(torch.autograd.Function):
    """y = x w^T with one scale a tensor: e4m3 forward, e5m2 gradients (arXiv:2209.05433; torchao's tensorwise recipe).

    Hopper's 8-bit products want both operands contiguous along the summed dimension, hence the transposed copies.
    """

    @staticmethod
    def forward(ctx, x, w):
        (x8, xs), (w8, ws) = quantise(x, torch.float8_e4m3fn), quantise(w, torch.float8_e4m3fn)
        ctx.save_for_backward(x8, xs, w8, ws)
        return torch._scaled_mm(x8, w8.t(), scale_a=xs, scale_b=ws, out_dtype=x.dtype, use_fast_accum=True)

    @staticmethod
    def backward(ctx, g):
        x8, xs, w8, ws = ctx.saved_tensors
        g8, gs = quantise(g, torch.float8_e5m2)
        dx = torch._scaled_mm(g8, w8.t().contiguous().t(), scale_a=gs, scale_b=ws, out_dtype=g.dtype)
        turned = g8.t().contiguous()
        dw = torch._scaled_mm(turned, x8.t().contiguous().t(), scale_a=gs, scale_b=xs, out_dtype=g.dtype)
        return dx, dw


def linear(x: Tensor, w: Tensor, fp8: bool = False) -> Tensor:
    """x (..., C) times w (O, C) transposed -> (..., O); in 8-bit floats if asked (CUDA capability 8.9 and newer)."""
    if not fp8:
        return F.linear(x, w)
    return _Float8Linear.apply(x.reshape(-1, x.shape[-1]), w).view(*x.shape[:-1], len(w))


# -------------------------------------------------------------------------------------------------------------- MLP

if gemm_act is not None:

    @torch.library.custom_op("nanochat_hf::relu2_up", mutates_args=(), device_types="cuda")
    def _relu2_up(x: Tensor, w1: Tensor) -> tuple[Tensor, Tensor]:
        """x (N, C), w1 (H, C) -> (x w1^T, relu of it squared), both (N, H)."""
        return gemm_act(x, w1.t(), activation="relu_sq", tuned=False)

    @_relu2_up.register_fake
    def _(x, w1):
        return x.new_empty(len(x), len(w1)), x.new_empty(len(x), len(w1))

    @torch.library.custom_op("nanochat_hf::relu2_down_grad", mutates_args=(), device_types="cuda")
    def _relu2_down_grad(dy: Tensor, w2: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """dy (N, C), w2 (C, H), h (N, H) -> (gradient of h, relu(h)^2 made again), both (N, H)."""
        dh, a = gemm_dact(dy, w2, h, activation="relu_sq", tuned=False)
        return dh, a

    @_relu2_down_grad.register_fake
    def _(dy, w2, h):
        return torch.empty_like(h), torch.empty_like(h)

    class _Relu2MLP(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, w1, w2):
            h, a = _relu2_up(x, w1)
            ctx.save_for_backward(x, w1, w2, h)
            return a @ w2.t()

        @staticmethod
        def backward(ctx, dy):
            x, w1, w2, h = ctx.saved_tensors
            dy = dy.contiguous()
            dh, a = _relu2_down_grad(dy, w2, h)
            return dh @ w1, dh.t() @ x, dy.t() @ a


def relu2_mlp(x: Tensor, w1: Tensor, w2: Tensor, fp8: bool = False) -> Tensor:
    """relu(x w1^T)^2 w2^T for x (B, T, C), w1 (H, C), w2 (C, H), all of one dtype."""
    if not fp8 and gemm_act is not None and x.is_cuda and x.dtype == torch.bfloat16:
        return _Relu2MLP.apply(x.reshape(-1, x.shape[-1]), w1, w2).view_as(x)
    return linear(F.relu(linear(x, w1, fp8)).square(), w2, fp8)
