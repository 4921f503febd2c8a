"""Fused linear cross-entropy against its definition: the reference on any machine, the kernel on a GPU."""

import torch

from nanochat_hf.kernels.fused_cross_entropy import fused_linear_cross_entropy


def test_the_loss_is_softcapped_cross_entropy_without_the_padding_rows():
    hidden, weight, targets = torch.randn(6, 8), torch.randn(10, 8), torch.tensor([1, 2, -100, 4, 5, 6])
    logits = 15 * torch.tanh(hidden @ weight[:7].T / 15)
    losses = logits.logsumexp(1) - logits.gather(1, targets.clamp(min=0)[:, None])[:, 0]
    losses = torch.where(targets < 0, 0, losses)
    assert torch.allclose(fused_linear_cross_entropy(hidden, weight, targets, 15.0, 7), losses.sum() / 5)
    assert torch.allclose(fused_linear_cross_entropy(hidden, weight, targets, 15.0, 7, "none"), losses, atol=1e-6)
    assert fused_linear_cross_entropy(hidden, weight, torch.full((6,), -100), 15.0, 7) == 0
