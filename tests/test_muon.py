"""Muon's mathematics: Polar Express against exact factors and plain steps, norms of updates."""

import pytest
import torch

from nanochat_hf.kernels.muon import POLAR_EXPRESS, equilibrate, mean_squares, orthogonalize, update_scale


@pytest.mark.parametrize("shape", [(24, 24), (48, 16), (16, 48)])
def test_polar_express_comes_near_the_polar_factor(shape):
    u, s, vh = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    x = (
        u @ torch.diag(torch.linspace(0.1, 1, len(s))) @ vh
    )  # no singular value so small that five steps cannot lift it
    x = x / x.norm(dim=1, keepdim=True)
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    found = orthogonalize(x[None])[0]
    assert (torch.linalg.svdvals(found) - 1).abs().max() < 0.2
    assert torch.nn.functional.cosine_similarity(found.flatten(), (u @ vh).flatten(), dim=0) > 0.99


def step_by_step(x):
    """The five steps on whole matrices (K, m, n) in x's dtype, without the shortcut for oblong ones."""
    tall = x.shape[1] > x.shape[2]
    x = equilibrate(x, x.dtype)
    x = x.mT if tall else x
    for a, b, c in POLAR_EXPRESS:
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
    ours, steps = ((found.double() - exact).norm(dim=(1, 2)) for found in (orthogonalize(x), step_by_step(x)))
    assert (ours < 0.5 * steps).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(8, 8), (8, 32), (32, 8)])
def test_a_matrix_does_not_depend_on_the_others_of_its_stack_and_zero_stays_zero(shape, dtype):
    x = torch.randn(3, *shape).to(dtype)
    x[1] = 0
    found = orthogonalize(x)
    assert not found[1].any() and found.isfinite().all()
    for one, whole in zip(x, found):
        torch.testing.assert_close(orthogonalize(one[None])[0], whole)


def test_the_norm_of_an_update_is_that_of_a_semi_orthogonal_matrix():
    x = orthogonalize(torch.randn(3, 20, 12))
    scale = update_scale(mean_squares(x), torch.rand(3, 20, 1), torch.tensor(0.9), torch.tensor(1.0), (20, 12))
    torch.testing.assert_close((x * scale).norm(dim=(1, 2)), torch.full((3,), 12**0.5))
