"""Muon's passes over many matrices and its symmetric products, against loops over single ones."""

import pytest
import torch

from nanochat_hf.kernels import muon as optim_kernels
from nanochat_hf.kernels.muon import apply_updates, gram, nesterov, product_plus, symmetric_plus

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
def test_nesterov_moves_each_momentum_and_writes_the_direction_beyond_it(device):
    grads, momenta = ([torch.randn(96, 100, device=device) for _ in range(3)] for _ in range(2))
    before = [m.clone() for m in momenta]
    out = torch.zeros(4, 96, 100, device=device)  # one more than there are: a rank with fewer matrices
    nesterov(grads, momenta, 0.9, out, torch.ones((), device=device))
    for grad, momentum, old, direction in zip(grads, momenta, before, out):
        assert torch.allclose(momentum, 0.9 * old + 0.1 * grad, atol=1e-6)
        assert torch.allclose(direction, 0.9 * momentum + 0.1 * grad, atol=1e-6)
    assert not out[3].any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(96, 64), (64, 96)])
def test_updates_decay_only_where_they_agree_with_the_weight(device, shape):
    params = [torch.randn(shape, device=device) for _ in range(3)]
    before = torch.stack(params)
    x = torch.randn(3, *shape, device=device).bfloat16()
    scale = torch.rand(3, *((shape[0], 1) if shape[0] > shape[1] else (1, shape[1])), device=device)
    apply_updates(params, x, scale, 0.1, 0.5, torch.ones((), device=device))
    u = x.float() * scale
    expected = before - 0.1 * u - torch.where(u * before >= 0, 0.05 * before, 0.0)
    assert torch.allclose(torch.stack(params), expected, atol=1e-5)


CUDA_HALVES = [pytest.param("cuda", dtype, marks=pytest.mark.gpu) for dtype in (torch.bfloat16, torch.float16)]


@pytest.mark.parametrize("device,dtype", [("cpu", torch.float32), *CUDA_HALVES])
@pytest.mark.parametrize("shape", [(2, 256, 512), (2, 512, 256), (3, 6, 12)])
def test_products_of_polar_express_equal_plain_ones(device, dtype, shape, monkeypatch):
    monkeypatch.setattr(optim_kernels, "SMALLEST", 256)
    x = (torch.randn(shape, device=device) / shape[-1] ** 0.5).to(dtype)
    tolerance = {"rtol": 0.02, "atol": 0.02} if device == "cuda" else {"atol": 1e-5}
    a = gram(x)
    exact = x.float() @ x.float().mT
    assert torch.allclose(a.float(), exact, **tolerance)
    assert torch.allclose(gram(x.mT).float(), x.float().mT @ x.float(), **tolerance)
    square = symmetric_plus(a, a, 0.7, 0.3)
    assert torch.allclose(square.float(), 0.3 * exact @ exact + 0.7 * exact, **tolerance)
    cube = symmetric_plus(a, square, 1.5)
    assert torch.allclose(cube.float(), exact @ square.float() + 1.5 * square.float(), **tolerance)
    assert torch.allclose(product_plus(a, x, x, 1.5).float(), exact @ x.float() + 1.5 * x.float(), **tolerance)
