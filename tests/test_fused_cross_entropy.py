"""Fused linear cross-entropy against its definition: the reference on any machine, the kernel on a GPU."""

import pytest
import torch
import torch.nn.functional as F
from tiny import LOW, relative

from nanochat_hf.kernels import fused_cross_entropy
from nanochat_hf.kernels.float8 import E5M2, Float8Pair, empty, quantize_weight
from nanochat_hf.kernels.fused_cross_entropy import fused_linear_cross_entropy


def softcap(logits, cap):
    return logits if cap is None else cap * torch.tanh(logits / cap)


@pytest.mark.parametrize("cap", [15.0, None])
def test_the_loss_is_softcapped_cross_entropy_without_the_padding_rows(cap):
    hidden, weight, targets = torch.randn(6, 8), torch.randn(10, 8), torch.tensor([1, 2, -100, 4, 5, 6])
    logits = softcap(hidden @ weight[:7].T, cap)
    losses = logits.logsumexp(1) - logits.gather(1, targets.clamp(min=0)[:, None])[:, 0]
    losses = torch.where(targets < 0, 0, losses)
    assert torch.allclose(fused_linear_cross_entropy(hidden, weight, targets, cap, 7), losses.sum() / 5)
    assert torch.allclose(fused_linear_cross_entropy(hidden, weight, targets, cap, 7, "none"), losses, atol=1e-6)
    assert fused_linear_cross_entropy(hidden, weight, torch.full((6,), -100), cap, 7) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("cap, size, bound", [(15.0, 0.1, 1e-2), (None, 0.1, 1e-2), (None, 5, 0.1)])  # 5: exp is inf
def test_the_kernel_and_its_gradients_equal_the_definition(cap, size, bound, monkeypatch):
    hidden = torch.randn(300, 128, **LOW, requires_grad=True)
    weight = (size * torch.randn(1024, 128, device="cuda")).requires_grad_()
    targets = torch.randint(0, 1000, (300,), device="cuda")
    targets[::7] = -100
    monkeypatch.setattr(fused_cross_entropy, "MAX_LOGITS_BYTES", 2 * 1024 * 128)  # three chunks, the last one short
    loss = fused_linear_cross_entropy(hidden, weight, targets, cap, 1000)
    exact = F.cross_entropy(softcap(hidden.float() @ weight[:1000].T, cap), targets, ignore_index=-100)
    assert abs(loss - exact) < 1e-3 * max(1, exact)
    grads = torch.autograd.grad(loss, (hidden, weight))
    for a, b in zip(grads, torch.autograd.grad(exact, (hidden, weight))):
        assert relative(a, b) < bound
    assert not grads[1][1000:].any()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("cap", [15.0, None])
def test_in_fp8_the_loss_and_its_gradients_are_near_the_exact_ones(device, cap, monkeypatch):
    """Gradients of a quarter of the loss, twice added up; the reference sees the weights in FP8."""
    hidden = F.rms_norm(torch.randn(320, 128, device=device), (128,)).bfloat16().requires_grad_()
    weight = (0.3 * torch.randn(1024, 128, device=device)).requires_grad_()
    targets = torch.randint(0, 1000, (320,), device=device)
    targets[::7] = -100
    quantized = quantize_weight(weight)
    seen = (quantized.pair.row_major.float() * quantized.pair.scale)[:1000]
    monkeypatch.setattr(fused_cross_entropy, "FP8_LOGITS_BYTES", 2 * 1024 * 128)  # three chunks, the last one short
    for _ in range(2):
        loss = fused_linear_cross_entropy(hidden, quantized, targets, cap, 1000)
        (loss / 4).backward()
    leaves = hidden.detach().float().requires_grad_(), seen.detach().requires_grad_()
    exact = F.cross_entropy(softcap(leaves[0] @ leaves[1].T, cap), targets, ignore_index=-100)
    grads = torch.autograd.grad(exact / 2, leaves)
    assert abs(loss - exact) < 2e-3 * exact
    assert relative(hidden.grad, grads[0]) < 0.08 and relative(weight.grad[:1000], grads[1]) < 0.08
    assert not weight.grad[1000:].any() and weight.grad.dtype == torch.float32


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("cap, rows, size", [(15.0, 200, 1088), (None, 64, 4160), (15.0, 5, 64)])
def test_gradients_in_fp8_lie_in_both_layouts_and_nan_stays(device, cap, rows, size):
    logits = (4 * torch.randn(rows, size, device=device)).bfloat16()
    targets = torch.randint(0, size - 60, (rows,), device=device)
    targets[1], logits[2, 3] = -100, torch.nan
    whole = empty((2 * rows, size), device, E5M2)  # the transposed one is a slice of a larger matrix
    out = Float8Pair(whole.row_major[:rows], whole.transposed[:, :rows], whole.scale)
    losses = fused_cross_entropy.softcapped_loss_and_grad(out, logits, targets, cap, size - 60)
    assert torch.equal(out.row_major.view(torch.uint8), out.transposed.t().view(torch.uint8))
    raw = logits.double().requires_grad_()
    exact = F.cross_entropy(softcap(raw, cap)[:, : size - 60], targets, ignore_index=-100, reduction="none")
    grad = torch.autograd.grad(exact.nansum(), raw)[0]
    rest = torch.arange(rows, device=device) != 2
    assert losses[2].isnan() and out.row_major[2, : size - 60].isnan().all()
    assert torch.allclose(losses[rest].double(), exact[rest], atol=1e-3)
    values, limits = out.row_major[rest].double() / 57344, torch.finfo(E5M2)
    assert ((values - grad[rest]).abs() <= 0.126 * grad[rest].abs() + limits.smallest_normal / 57344).all()
