"""Fused operations against plain PyTorch: the twins on any machine, the kernels where there is a GPU."""

import pytest
import torch
import torch.nn.functional as F

from nanochat_hf.train import kernels

LOW = {"device": "cuda", "dtype": torch.bfloat16}


def relative(a, b) -> float:
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


def test_head_loss_is_softcapped_cross_entropy_without_the_padding_rows():
    hidden, weight, targets = torch.randn(6, 8), torch.randn(10, 8), torch.tensor([1, 2, -100, 4, 5, 6])
    logits = 15 * torch.tanh(hidden @ weight[:7].T / 15)
    expected = sum(logits[i].logsumexp(0) - logits[i, t] for i, t in enumerate(targets.tolist()) if t >= 0) / 5
    assert torch.allclose(kernels.head_loss(hidden, weight, targets, 15.0, 7), expected)


def test_relu2_mlp_is_the_square_of_relu():
    x, w1, w2 = torch.randn(2, 3, 4), torch.randn(8, 4), torch.randn(4, 8)
    assert torch.allclose(kernels.relu2_mlp(x, w1, w2), (x @ w1.T).clamp(min=0) ** 2 @ w2.T, atol=1e-5)


def test_eight_bit_linear_is_near_the_exact_one_and_so_are_its_gradients():
    x = torch.randn(64, 128, dtype=torch.bfloat16, requires_grad=True)
    w = (0.1 * torch.randn(256, 128)).bfloat16().requires_grad_()
    coarse, exact = kernels.linear(x, w, fp8=True), kernels.linear(x, w)
    assert relative(coarse, exact) < 0.05
    grad = torch.randn_like(exact)
    for a, b in zip(torch.autograd.grad(coarse, (x, w), grad), torch.autograd.grad(exact, (x, w), grad)):
        assert relative(a, b) < 0.08


@pytest.mark.gpu
def test_fused_head_loss_and_its_gradients_equal_the_twin(monkeypatch):
    hidden = torch.randn(300, 128, **LOW, requires_grad=True)
    weight = (0.1 * torch.randn(1024, 128, device="cuda")).requires_grad_()
    targets = torch.randint(0, 1000, (300,), device="cuda")
    targets[::7] = -100
    monkeypatch.setattr(kernels, "MAX_LOGITS_BYTES", 2 * 1024 * 128)  # three chunks, the last one short
    fused = kernels.head_loss(hidden, weight, targets, 15.0, 1000)
    exact = F.cross_entropy(15 * torch.tanh(hidden.float() @ weight[:1000].T / 15), targets, ignore_index=-100)
    assert abs(fused - exact) < 1e-3
    for a, b in zip(torch.autograd.grad(fused, (hidden, weight)), torch.autograd.grad(exact, (hidden, weight))):
        assert relative(a, b) < 1e-2
    assert not torch.autograd.grad(kernels.head_loss(hidden, weight, targets, 15.0, 1000), weight)[0][1000:].any()


@pytest.mark.gpu
def test_fused_mlp_and_its_gradients_equal_the_twin():
    x = torch.randn(2, 64, 256, **LOW, requires_grad=True)
    w1 = (0.06 * torch.randn(1024, 256, **LOW)).requires_grad_()
    w2 = (0.03 * torch.randn(256, 1024, **LOW)).requires_grad_()
    fused = kernels.relu2_mlp(x, w1, w2)
    exact = F.linear(F.relu(F.linear(x.float(), w1.float())).square(), w2.float())
    grad = torch.randn_like(fused)
    wanted = torch.autograd.grad(exact, (x, w1, w2), grad.float())
    for a, b in zip((fused, *torch.autograd.grad(fused, (x, w1, w2), grad)), (exact, *wanted)):
        assert relative(a, b) < 1e-2
