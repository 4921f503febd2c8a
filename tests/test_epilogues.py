"""What follows attention in a block, and its gradient, in the epilogues of products: against autograd in float64."""

import pytest
import torch
import torch.nn.functional as F
from tiny import LOW, relative

from nanochat_hf.kernels.block_matmuls import Weight, fold, fused, residual_mlp

EPS = 1.19e-7


def leaves(rows: int, width: int, hidden: int) -> list[torch.Tensor]:
    torch.manual_seed(0)
    sizes = ((1, rows, width), (1, rows, width), (width, width), (hidden, width), (width, hidden))
    return [torch.randn(size) / (1 if size[0] == 1 else size[1] ** 0.5) for size in sizes]


def plain(x, seen, wo, w1, w2):
    x = x + seen @ wo.T
    return x, F.relu(F.rms_norm(x, x.shape[-1:], eps=EPS) @ w1.T).square() @ w2.T


def check(values: list[torch.Tensor], tolerance: float):
    """Outputs and gradients of the fused operation on `values` against those of the plain one in float64."""
    exact = [value.double().requires_grad_() for value in values]
    wanted = plain(*exact)
    into = [torch.randn_like(part) for part in wanted]
    wanted = (*wanted, *torch.autograd.grad(wanted, exact, into))
    inputs = [value.clone().requires_grad_() for value in values[:2]]
    parts = [value.float().requires_grad_() for value in values[2:]]
    found = residual_mlp(*inputs, *(Weight(part.detach().to(values[0].dtype), (part,)) for part in parts), EPS)
    found = (*found, *torch.autograd.grad(found, (*inputs, *parts), [grad.to(values[0].dtype) for grad in into]))
    names = ("stream", "mlp", "d stream", "d seen", "d wo", "d w1", "d w2")
    for name, one, other in zip(names, found, wanted):
        assert relative(one, other) < tolerance, name


def test_the_twin_is_exact():
    check(leaves(50, 32, 96), 1e-5)


def test_a_stream_of_any_size_is_normed():
    values = leaves(50, 32, 96)
    values[0][0, :20] *= 1e4
    values[0][0, 20:40] *= 1e-4
    values[1][0, 20:40] *= 1e-4
    check(values, 1e-5)


def test_fold_gives_the_factor_of_the_norm_and_that_of_its_gradient():
    parts = torch.rand(7, 3)
    scale = fold(parts, columns=5, eps=0.1)
    assert torch.allclose(scale, (parts.sum(1) / 5 + 0.1).rsqrt()[None])
    assert torch.allclose(fold(parts, columns=5, scale=scale), scale.square() * parts.sum(1) / 5)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(4096, 1536, 6144), (1000, 1280, 5120), (500, 1024, 4096), (77, 256, 1024)])
def test_kernels_equal_the_exact_operation(shape):
    values = [value.to(**LOW) for value in leaves(*shape)]
    assert fused(values[0]), "quack-kernels is not installed"
    check(values, 1e-2)


@pytest.mark.gpu
def test_fold_on_a_gpu_equals_its_twin():
    parts = torch.rand(1000, 8)
    scale = fold(parts, 768, EPS)
    assert torch.allclose(fold(parts.cuda(), 768, EPS).cpu(), scale, rtol=1e-5)
    assert torch.allclose(fold(parts.cuda(), 768, scale=scale.cuda()).cpu(), fold(parts, 768, scale=scale), rtol=1e-5)
