"""The fused head and loss against plain PyTorch: the twin on any machine, the kernel where there is a GPU."""

import pytest
import torch
import torch.nn.functional as F
from tiny import LOW, relative

from nanochat_hf.kernels import fused_cross_entropy as kernels


def test_head_loss_is_softcapped_cross_entropy_without_the_padding_rows():
    hidden, weight, targets = torch.randn(6, 8), torch.randn(10, 8), torch.tensor([1, 2, -100, 4, 5, 6])
    logits = 15 * torch.tanh(hidden @ weight[:7].T / 15)
    expected = sum(logits[i].logsumexp(0) - logits[i, t] for i, t in enumerate(targets.tolist()) if t >= 0) / 5
    assert torch.allclose(kernels.fused_linear_cross_entropy(hidden, weight, targets, 15.0, 7), expected)


@pytest.mark.gpu
def test_fused_head_loss_and_its_gradients_equal_the_twin(monkeypatch):
    hidden = torch.randn(300, 128, **LOW, requires_grad=True)
    weight = (0.1 * torch.randn(1024, 128, device="cuda")).requires_grad_()
    targets = torch.randint(0, 1000, (300,), device="cuda")
    targets[::7] = -100
    monkeypatch.setattr(kernels, "MAX_LOGITS_BYTES", 2 * 1024 * 128)  # three chunks, the last one short
    fused = kernels.fused_linear_cross_entropy(hidden, weight, targets, 15.0, 1000)
    exact = F.cross_entropy(15 * torch.tanh(hidden.float() @ weight[:1000].T / 15), targets, ignore_index=-100)
    assert abs(fused - exact) < 1e-3
    for a, b in zip(torch.autograd.grad(fused, (hidden, weight)), torch.autograd.grad(exact, (hidden, weight))):
        assert relative(a, b) < 1e-2
    assert not torch.autograd.grad(kernels.fused_linear_cross_entropy(hidden, weight, targets, 15.0, 1000), weight)[0][
        1000:
    ].any()
