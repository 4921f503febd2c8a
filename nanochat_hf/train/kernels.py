"""Fused operations of the training step: linear head + softcap + cross-entropy, relu-squared MLP, windowed attention.

Each has a plain PyTorch twin that runs where the fast one cannot (no CUDA device, package not installed), and the tests
hold the two together. What is fused and why:

- head and loss: at 32K tokens a step the fp32 logits of a 32K vocabulary are 4 GB, read and written several times. Here
  they exist in bf16, a chunk at a time, and one Triton kernel turns them into their own gradient in place. The softcap
  bounds the logits, so the softmax needs no running maximum (the idea of gradients made in the forward pass is Liger
  Kernel's, arXiv:2410.10989).
- MLP: relu(x)^2 runs in the epilogue of the first matrix product and its gradient in that of the second one's, by the
  CuTe kernels of Dao-AILab/quack; only the value before the activation is kept for the backward pass.
- attention: FlashAttention-4 (Dao-AILab/flash-attention, package flash-attn-4) knows sliding windows, so a short layer
  costs what its window costs; without it FlexAttention (arXiv:2412.05496) does the same with a block mask.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU and Apple builds of torch come without Triton
    triton = None

try:
    from quack.gemm_interface import gemm_act, gemm_dact
except ImportError:
    gemm_act = gemm_dact = None

try:
    from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd
except ImportError:
    _flash_attn_fwd = _flash_attn_bwd = None

MAX_LOGITS_BYTES = 1 << 30  # of one chunk of bf16 logits; larger chunks gain nothing once the products fill the device
MAX_FUSED_VOCAB = 1 << 16  # one row of logits lives in the registers of one program


# ---------------------------------------------------------------------------------------------------- head and loss

if triton is not None:

    @triton.jit
    def _softcap_nll(logits, targets, losses, inverse_count, num_tokens, stride, cap, GRAD: tl.constexpr, BLOCK: tl.constexpr):
        """One row: loss of its target and, in place, the gradient of the mean loss with respect to the raw logits."""
        row = tl.program_id(0).to(tl.int64)
        target = tl.load(targets + row)
        columns = tl.arange(0, BLOCK)
        inside = columns < num_tokens
        raw = tl.load(logits + row * stride + columns, mask=inside, other=0.0).to(tl.float32)
        squashed = 1.0 - 2.0 / (tl.exp(raw * (2.0 / cap)) + 1.0)  # tanh(raw / cap); the exponential may be inf
        capped = squashed * cap
        exponential = tl.where(inside, tl.exp(capped), 0.0)  # |capped| <= cap = 15: no overflow without a maximum
        total = tl.sum(exponential, 0)
        at_target = tl.sum(tl.where(columns == target, capped, 0.0), 0)
        valid = target >= 0
        tl.store(losses + row, tl.where(valid, tl.log(total) - at_target, 0.0))
        if GRAD:
            gradient = exponential / total - tl.where(columns == target, 1.0, 0.0)
            gradient *= (1.0 - squashed * squashed) * tl.load(inverse_count)
            gradient = tl.where(inside & valid, gradient, 0.0)  # padding rows of the vocabulary get none
            tl.store(logits + row * stride + columns, gradient.to(logits.dtype.element_ty), mask=columns < stride)


class _FusedHeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, softcap, num_tokens, reduction):
        low = weight.to(hidden.dtype)
        training = reduction == "mean" and (hidden.requires_grad or weight.requires_grad)
        inverse_count = (targets >= 0).sum().clamp(min=1).float().reciprocal()
        losses = torch.empty(targets.shape, dtype=torch.float32, device=hidden.device)
        hidden_grad = torch.empty_like(hidden) if training else None
        weight_grad = None
        rows = max(1, MAX_LOGITS_BYTES // (2 * len(low)))
        block = triton.next_power_of_2(len(low))
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            logits = hidden[part] @ low.t()  # (rows, V)
            _softcap_nll[(len(logits),)](
                logits, targets[part], losses[part], inverse_count, num_tokens, logits.stride(0), float(softcap),
                GRAD=training, BLOCK=block, num_warps=min(32, max(4, block // 1024)),
            )  # fmt: skip
            if training:
                torch.mm(logits, low, out=hidden_grad[part])
                if weight_grad is None:
                    weight_grad = torch.mm(logits.t(), hidden[part], out_dtype=torch.float32)
                else:
                    weight_grad = torch.addmm(weight_grad, logits.t(), hidden[part], out_dtype=torch.float32)
        ctx.save_for_backward(hidden_grad, weight_grad)
        return losses.sum() * inverse_count if reduction == "mean" else losses

    @staticmethod
    def backward(ctx, grad):
        hidden_grad, weight_grad = ctx.saved_tensors
        if hidden_grad is None:
            raise RuntimeError("the per-token losses have no gradient; use reduction='mean'")
        return hidden_grad * grad.to(hidden_grad.dtype), weight_grad.mul_(grad), None, None, None, None


def head_loss(hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float, num_tokens: int, reduction="mean") -> Tensor:
    """Cross-entropy of softcap * tanh(hidden @ weight.T / softcap), in nats.

    Args:
        hidden: (N, C) normed hidden states, bf16 or fp32.
        weight: (V, C) head, fp32 master weights; rows from `num_tokens` on are padding and take no part.
        targets: (N,) int64, -100 is ignored.
        reduction: "mean" over the targets that count, or "none": (N,) fp32, without gradient on the fused path.
    """
    if triton is not None and hidden.is_cuda and hidden.dtype == torch.bfloat16 and len(weight) <= MAX_FUSED_VOCAB:
        return _FusedHeadLoss.apply(hidden, weight, targets, softcap, num_tokens, reduction)
    logits = F.linear(hidden, weight.to(hidden.dtype))[..., :num_tokens].float()
    return F.cross_entropy(softcap * torch.tanh(logits / softcap), targets, ignore_index=-100, reduction=reduction)


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


def relu2_mlp(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """relu(x w1^T)^2 w2^T for x (B, T, C), w1 (H, C), w2 (C, H), all of one dtype."""
    if gemm_act is not None and x.is_cuda and x.dtype == torch.bfloat16:
        return _Relu2MLP.apply(x.reshape(-1, x.shape[-1]), w1, w2).view_as(x)
    return F.linear(F.relu(F.linear(x, w1)).square(), w2)


# -------------------------------------------------------------------------------------------------------- attention

if _flash_attn_fwd is not None:

    @torch.library.custom_op("nanochat_hf::flash_attention", mutates_args=(), device_types="cuda")
    def _flash(q: Tensor, k: Tensor, v: Tensor, left: int, scale: float) -> tuple[Tensor, Tensor]:
        """(B, T, H, D) -> output (B, T, H, D), log-sum-exp (B, H, T); left < 0 is full causal attention."""
        window = dict(causal=True) if left < 0 else dict(window_size_left=left, window_size_right=0)
        out, lse, *_ = _flash_attn_fwd(q, k, v, softmax_scale=scale, return_lse=True, **window)
        return out, lse

    @_flash.register_fake
    def _(q, k, v, left, scale):
        return torch.empty_like(q), q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32)

    @torch.library.custom_op("nanochat_hf::flash_attention_grad", mutates_args=(), device_types="cuda")
    def _flash_grad(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, left: int, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        window = dict(causal=True) if left < 0 else dict(window_size_left=left, window_size_right=0)
        dq, dk, dv, *_ = _flash_attn_bwd(q, k, v, out, grad.contiguous(), lse, scale, **window)
        return dq, dk, dv

    @_flash_grad.register_fake
    def _(grad, q, k, v, out, lse, left, scale):
        return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)

    def _flash_setup(ctx, inputs, output):
        q, k, v, ctx.left, ctx.scale = inputs
        ctx.save_for_backward(q, k, v, *output)

    def _flash_backward(ctx, grad, _):
        return *_flash_grad(grad, *ctx.saved_tensors, ctx.left, ctx.scale), None, None

    _flash.register_autograd(_flash_backward, setup_context=_flash_setup)


def window_mask(window: int | None, length: int, device):
    """FlexAttention's block mask of causal attention to the last `window` keys, the own one included (None: all)."""
    from torch.nn.attention.flex_attention import create_block_mask

    def visible(batch, head, query, key):
        causal = query >= key
        return causal if window is None else causal & (query - key < window)

    return create_block_mask(visible, None, None, length, length, device=device)


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, mask=None) -> Tensor:
    """Causal attention of q (B, T, H, D) to k, v (B, T, K, D), softmax of `scale` times the products.

    window: number of keys that a query sees, the own one included, or None for all. mask: the `window_mask` of it,
    used when FlashAttention-4 is not installed. Returns (B, T, H, D).
    """
    if _flash_attn_fwd is not None and q.is_cuda and q.dtype == torch.bfloat16:
        return _flash(q, k, v, -1 if window is None else window - 1, scale)[0]
    grouped = q.shape[2] != k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if window is None or window >= q.shape[2]:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
    elif q.is_cuda:
        from torch.nn.attention.flex_attention import flex_attention

        out = flex_attention(q, k, v, block_mask=mask, scale=scale, enable_gqa=grouped)
    else:
        distance = torch.arange(q.shape[2], device=q.device)
        distance = distance[:, None] - distance
        seen = (distance >= 0) & (distance < window)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=grouped)
    return out.transpose(1, 2)


def needs_mask(x: Tensor) -> bool:
    """Whether `attention` on this device and dtype takes a block mask for windows."""
    return x.is_cuda and not (_flash_attn_fwd is not None and x.dtype == torch.bfloat16)
