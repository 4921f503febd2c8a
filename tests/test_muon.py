"""Muon's mathematics against exact factors, plain steps and single matrices, with the kernels on a GPU."""

import pytest
import torch

from nanochat_hf.kernels import muon
from nanochat_hf.kernels.muon import mean_squares, orthogonalize, update_scale

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("shape", [(24, 24), (48, 16), (16, 48)])
def test_polar_express_comes_near_the_polar_factor(shape):
    u, s, vh = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    x = u @ torch.diag(torch.linspace(0.1, 1, len(s))) @ vh  # five steps cannot lift smaller singular values
    x = x / x.norm(dim=1, keepdim=True)
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    result = orthogonalize(x[None])[0]
    assert (torch.linalg.svdvals(result) - 1).abs().max() < 0.2
    assert torch.nn.functional.cosine_similarity(result.flatten(), (u @ vh).flatten(), dim=0) > 0.99


def step_by_step(x):
    """The five steps on whole matrices (K, m, n) in x's dtype, without the Gram form for oblong ones."""
    tall = x.shape[1] > x.shape[2]
    x = muon.equilibrate(x, x.dtype)
    x = x.mT if tall else x
    for a, b, c in muon.POLAR_EXPRESS:
        g = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(g, g, g, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


@pytest.fixture(params=["wide", "tall"])
def oblong(request):
    """Singular values: even; over five decades; of low rank and noise; one above all, as when training begins."""
    torch.manual_seed(0)
    m = 48
    values = torch.stack([torch.linspace(0.5, 1, m), torch.logspace(0, -5, m), torch.ones(m), torch.full((m,), 0.003)])
    values[2, m // 4 :] = 1e-6
    values[3, 0] = 1.0
    u, _, vh = torch.linalg.svd(torch.randn(4, m, 4 * m), full_matrices=False)
    x = u @ (values[:, :, None] * vh)
    return x if request.param == "wide" else x.mT.contiguous()


def test_oblong_matrices_come_out_as_from_five_steps_on_the_whole(oblong):
    torch.testing.assert_close(orthogonalize(oblong), step_by_step(oblong), atol=1e-4, rtol=0)


def test_half_precision_costs_oblong_matrices_less_than_five_steps_in_bfloat16_would(oblong):
    x = oblong.bfloat16()
    exact = step_by_step(x.double())
    ours, steps = ((result.double() - exact).norm(dim=(1, 2)) for result in (orthogonalize(x), step_by_step(x)))
    assert (ours < 0.5 * steps).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(8, 8), (8, 32), (32, 8)])
def test_a_matrix_does_not_depend_on_the_others_of_its_stack_and_zero_stays_zero(shape, dtype):
    x = torch.randn(3, *shape).to(dtype)
    x[1] = 0
    result = orthogonalize(x)
    assert not result[1].any() and result.isfinite().all()
    for one, whole in zip(x, result):
        torch.testing.assert_close(orthogonalize(one[None])[0], whole)


def test_the_norm_of_an_update_is_that_of_a_semi_orthogonal_matrix():
    x = orthogonalize(torch.randn(3, 20, 12))
    scale = update_scale(mean_squares(x), torch.rand(3, 20, 1), torch.tensor(0.9), torch.tensor(1.0), (20, 12))
    torch.testing.assert_close((x * scale).norm(dim=(1, 2)), torch.full((3,), 12**0.5))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(96, 64), (64, 96)])
def test_updates_decay_only_where_they_agree_with_the_weight_and_make_casts_out_of_date(device, shape):
    params = [torch.randn(shape, device=device) for _ in range(3)]
    before, versions = torch.stack(params), [p._version for p in params]
    x = torch.randn(3, *shape, device=device).bfloat16()
    scale = torch.rand(3, *((shape[0], 1) if shape[0] > shape[1] else (1, shape[1])), device=device)
    muon.apply_updates(params, x, scale, 0.1, 0.5, torch.ones((), device=device))
    u = x.float() * scale
    expected = before - 0.1 * u - torch.where(u * before >= 0, 0.05 * before, 0.0)
    assert torch.allclose(torch.stack(params), expected, atol=1e-5)
    assert all(p._version > version for p, version in zip(params, versions))
