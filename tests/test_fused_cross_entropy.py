"""Fused linear cross-entropy against its definition: the reference on any machine, the kernel on a GPU."""

import pytest
import torch
import torch.nn.functional as F
from tiny import LOW, relative

from nanochat_hf.kernels import fused_cross_entropy
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
