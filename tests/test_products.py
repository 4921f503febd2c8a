"""Matrix products whose gradients go into `.grad`, in 8 bits and with relu squared, against plain PyTorch."""

import pytest
import torch
from tiny import relative

from nanochat_hf.kernels import block_matmuls as products


def test_relu2_mlp_is_the_square_of_relu():
    x, w1, w2 = torch.randn(2, 3, 4), torch.randn(8, 4), torch.randn(4, 8)
    assert torch.allclose(products.relu2_mlp(x, w1, w2), (x @ w1.T).clamp(min=0) ** 2 @ w2.T, atol=1e-5)


def joint_and_apart(device: str):
    """A joint product with gates and what follows attention, through `Weight` and by plain products, on copies."""
    torch.manual_seed(0)
    sizes = {"a": (96, 64), "b": (32, 64), "gate": (4, 16), "wo": (128, 128), "w1": (256, 128), "w2": (128, 256)}
    leaves = {name: (0.1 * torch.randn(size)).to(device) for name, size in sizes.items()}
    x, stream = torch.randn(2, 40, 64).to(device), torch.randn(2, 40, 128).to(device)
    both = []
    for fused in (True, False):
        params = {name: value.clone().requires_grad_() for name, value in leaves.items()}
        params |= {"x": x.clone().requires_grad_(), "stream": stream.clone().requires_grad_()}

        def weight(*names, params=params, fused=fused):
            parts = tuple(params[name] for name in names)
            if not fused:
                return torch.cat(parts).bfloat16()
            return products.Weight(torch.cat(parts).detach().bfloat16(), parts)

        def run(params=params, weight=weight):
            seen, gates = products.linear_and_gates(params["x"].bfloat16(), weight("a", "b"), params["gate"])
            s, y = products.residual_mlp(
                params["stream"].bfloat16(), seen, weight("wo"), weight("w1"), weight("w2"), 1e-6
            )
            return y.float().square().sum() + gates.float().square().sum() + (s * y).float().sum()

        both.append((run, params))
    return both


def check_gradients_in_place(device: str, tolerance: float):
    (ours, params), (theirs, params2) = joint_and_apart(device)
    for _ in range(2):  # the second time added to the first
        loss, wanted = ours(), theirs()
        assert abs(loss - wanted) < tolerance * wanted
        loss.backward()
        wanted.backward()
        for name in params:
            assert params[name].grad.dtype == torch.float32
            assert relative(params[name].grad, params2[name].grad) < tolerance, name


def test_gradients_go_into_the_parameters_as_autograd_would_put_them():
    check_gradients_in_place("cpu", 2e-2)


def test_a_frozen_part_of_a_weight_gets_no_gradient():
    a, b = torch.randn(3, 8, requires_grad=True), torch.randn(5, 8)
    weight = products.Weight(torch.cat((a, b)).detach(), (a, b))
    products.linear(torch.randn(2, 7, 8), weight).sum().backward()
    assert a.grad is not None and b.grad is None


@pytest.mark.gpu
def test_products_add_to_the_gradients_by_themselves_on_a_gpu():
    check_gradients_in_place("cuda", 2e-2)
