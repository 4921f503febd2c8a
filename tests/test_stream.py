"""The mixed and normed stream between layers: one pass equals PyTorch's operations, gradients over layers included."""

import pytest
import torch
import torch.nn.functional as F

from nanochat_hf.kernels import residual as stream

LAYERS = 3


def plain(x0, ys, scalars, eps):
    """Three layers' worth of the definition; each layer's second part is a product of the norm with ys[i]."""
    x, y, found = x0, None, []
    for i in range(LAYERS):
        x = x if y is None else x + y
        if scalars is not None:
            x = scalars[0, i] * x + scalars[1, i] * x0
        h = F.rms_norm(x, x.shape[-1:], eps=eps)
        y = h * ys[i]
        found.append(h)
    return torch.stack((*found, x, y))


def ours(x0, ys, scalars, eps, apply=None):
    embedded, x, y, found = stream.EmbeddingResidual(x0), x0, None, []
    for i in range(LAYERS):
        lambdas = None if scalars is None else (scalars[0, i], scalars[1, i])
        if apply is None:
            x, h = stream.residual_mix(x, y, embedded, lambdas, eps)
        else:
            x, h = apply(x, y, x0, *(lambdas or (None, None)), eps, embedded)
        y = h * ys[i]
        found.append(h)
    return torch.stack((*found, x, y))


def inputs(device="cpu", columns=40):
    generator = torch.Generator().manual_seed(0)
    x0, ys = (torch.randn(*size, generator=generator) for size in ((2, 5, columns), (LAYERS, 2, 5, columns)))
    scalars = 0.5 + torch.rand(2, LAYERS, generator=generator)
    return [x.to(device).requires_grad_() for x in (x0, ys, scalars)]


@pytest.mark.parametrize("mixed", [True, False])
def test_without_a_gpu_it_is_the_definition(mixed):
    x0, ys, scalars = inputs()
    scalars = scalars if mixed else None
    assert torch.equal(ours(x0, ys, scalars, 1e-6), plain(x0, ys, scalars, 1e-6))


@pytest.mark.gpu
@pytest.mark.parametrize("mixed", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernel_and_its_gradients_equal_the_definition(mixed, dtype):
    x0, ys, scalars = inputs("cuda", 1000)
    leaves = (x0, ys, scalars) if mixed else (x0, ys)
    exact = plain(x0, ys, scalars if mixed else None, 1e-6)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for _ in range(2):  # nothing of one pass is left for the next
        out = ours(x0.to(dtype), ys.to(dtype), scalars if mixed else None, 1e-6)
        assert (out - exact).norm() < tolerance * exact.norm()
        grads = torch.autograd.grad(out.float().square().sum(), leaves)
        for a, b in zip(grads, torch.autograd.grad(exact.square().sum(), leaves, retain_graph=True)):
            assert (a - b).norm() < tolerance * b.norm()
