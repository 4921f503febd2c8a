"""The residual mix and norm between layers equal PyTorch's operations, gradients over layers included."""

import pytest
import torch
import torch.nn.functional as F
from tiny import relative

from nanochat_hf.kernels.residual import EmbeddingResidual, residual_mix

LAYERS = 3


def reference_mix(x, y, embedded, lambdas, eps):
    x = x if y is None else x + y
    if lambdas is not None:
        x = lambdas[0] * x + lambdas[1] * embedded.value
    return x, F.rms_norm(x, x.shape[-1:], eps=eps)


def layers(mixer, x0, ys, scalars):
    """Results of three layers; each layer's second part is the norm times ys[i]."""
    embedded, x, y, results = EmbeddingResidual(x0), x0, None, []
    for i in range(LAYERS):
        x, h = mixer(x, y, embedded, None if scalars is None else (scalars[0, i], scalars[1, i]), 1e-6)
        y = h * ys[i]
        results.append(h)
    return torch.stack((*results, x, y))


@pytest.mark.parametrize("mixed", [True, False])
def test_the_mix_and_its_gradients_equal_the_definition(mixed):
    torch.manual_seed(0)
    values = torch.randn(2, 5, 40), torch.randn(LAYERS, 2, 5, 40), 0.5 + torch.rand(2, LAYERS)
    leaves = [value.requires_grad_() for value in values[: 3 if mixed else 2]]
    scalars = leaves[2] if mixed else None
    exact = layers(reference_mix, *leaves[:2], scalars)
    grads = torch.autograd.grad(exact.square().sum(), leaves)
    for _ in range(2):  # nothing of one pass is left for the next
        out = layers(residual_mix, *leaves[:2], scalars)
        assert relative(out, exact) < 1e-5
        for a, b in zip(torch.autograd.grad(out.square().sum(), leaves), grads):
            assert relative(a, b) < 1e-5
