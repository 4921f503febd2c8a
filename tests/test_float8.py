"""Products in 8 bits, relu squared between them, and their gradients, against exact ones."""

from random import Random

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from test_fast import random_model
from tiny import relative
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from nanochat_hf.kernels import block_matmuls as products
from nanochat_hf.kernels import float8
from nanochat_hf.kernels.float8 import (
    E4M3,
    E5M2,
    PLAIN,
    SQUARED,
    SQUARED_GRAD,
    Eight,
    empty,
    fill,
    measure,
    quantise,
    weight8,
)
from nanochat_hf.train.fused_model import FusedTransformer


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def back(eight: Eight, turned: bool = False) -> torch.Tensor:
    return (eight.turned.t() if turned else eight.straight).float() * eight.scale


@pytest.mark.parametrize("dtype, error", [(E4M3, 0.04), (E5M2, 0.08)])
def test_eight_bits_hold_a_tensor_both_ways_to_the_digits_that_they_have(dtype, error):
    x = torch.randn(48, 80).bfloat16()
    eight = quantise(x, dtype)
    assert eight.straight.dtype == eight.turned.dtype == dtype
    assert torch.equal(back(eight), back(eight, turned=True))
    assert relative(back(eight), x) < error
    assert back(eight).abs().max() <= 1.001 * x.abs().max().float()


def test_a_bound_beyond_the_largest_magnitude_costs_next_to_nothing():
    x = torch.randn(64, 64)
    assert relative(back(quantise(x, E4M3, 8.0)), x) < 0.04
    assert relative(back(quantise(1e-6 * x, E5M2, torch.tensor([1e-3]))), 1e-6 * x) < 0.08


def test_what_is_measured_bounds_magnitudes_and_the_lengths_of_rows():
    x = torch.randn(40, 24)
    largest, longest = measure(x, lengths=True)
    assert torch.allclose(largest.max(), x.abs().max()) and torch.allclose(longest.max(), x.norm(dim=1).max())


def test_zeros_stay_zeros():
    assert (back(quantise(torch.zeros(16, 16), E4M3)) == 0).all()


def lost(device: str) -> list[bool]:
    """Whether a NaN in x is gone from what is made of it."""
    x, to = torch.randn(16, 16, device=device), [empty((16, 16), device, E5M2) for _ in range(3)]
    x[3, 4] = torch.nan
    squares = empty((16, 16), device, E4M3, straight=False)
    for kind, eight in enumerate(to):
        fill(eight, x, 4.0, kind, torch.ones_like(x), torch.ones(1, device=device), squares)
    return [not part[3, 4].isnan() for part in (*map(back, to), back(to[0], True), back(squares, True))]


def test_a_nan_is_not_lost_so_that_the_loop_can_see_it():
    assert not any(lost("cpu"))


@pytest.mark.gpu
def test_a_nan_is_not_lost_by_the_kernel():
    assert not any(lost("cuda"))


def test_relu_squared_and_its_gradient_are_made_on_the_way():
    h, grad = torch.randn(32, 48), torch.randn(32, 48)
    a = empty(h.shape, h.device, E4M3, turned=False)
    fill(a, h, measure(h)[0], SQUARED)
    assert a.turned is None and relative(back(a), h.relu().square()) < 0.05
    dh, squares = empty(h.shape, h.device, E5M2), empty(h.shape, h.device, E4M3, straight=False)
    fill(dh, h, measure(h)[0], SQUARED_GRAD, grad, measure(grad)[0], squares)
    assert relative(back(dh), 2 * h.relu() * grad) < 0.09 and torch.equal(back(dh), back(dh, turned=True))
    assert torch.equal(back(squares, turned=True), back(a))


def test_a_weight_of_several_parts_has_one_scale_and_its_longest_column():
    a, b = torch.randn(48, 32), 3 * torch.randn(16, 32)
    whole = torch.cat((a, b))
    weight = weight8(a, b)
    assert relative(back(weight.eight), whole) < 0.04 and torch.equal(back(weight.eight), back(weight.eight, True))
    assert torch.allclose(weight.longest, whole.norm(dim=0).amax(), rtol=5e-3)


def through(device: str, dtype: torch.dtype, eight: bool) -> tuple[list, dict]:
    """Outputs and gradients, twice added up, of a product with gates and an MLP on parameters made from one seed."""
    torch.manual_seed(0)
    sizes = {"a": (96, 64), "b": (32, 64), "gate": (4, 16), "w1": (256, 128), "w2": (64, 256)}
    p = {name: (0.1 * torch.randn(size)).to(device).requires_grad_() for name, size in sizes.items()}
    p["x"] = F.rms_norm(torch.randn(2, 64, 64), (64,)).to(device).requires_grad_()
    dy, dgates = torch.randn(2, 64, 64).to(device, dtype), torch.randn(2, 64, 4).to(device, dtype)
    for _ in range(2):
        make = weight8 if eight else lambda *parts: torch.cat(parts).to(dtype)
        y, gates = products.linear_and_gates(p["x"].to(dtype), make(p["a"], p["b"]), p["gate"], bound=8.0)
        y = products.relu2_mlp(y, make(p["w1"]), make(p["w2"]))
        torch.autograd.backward((y, gates), (dy, dgates))
    return [y, gates], {name: value.grad for name, value in p.items()}


def check_products(device: str, dtype: torch.dtype):
    (found, gradients), (wanted, exact) = (through(device, dtype, eight) for eight in (True, False))
    assert all(relative(a, b) < 0.1 for a, b in zip(found, wanted))
    for name in exact:
        assert gradients[name].dtype == torch.float32
        assert relative(gradients[name], exact[name]) < 0.15, name


def test_products_and_their_gradients_are_near_the_exact_ones():
    check_products("cpu", torch.float32)


def test_a_frozen_part_of_a_weight_gets_no_gradient():
    a, b = torch.randn(16, 32, requires_grad=True), torch.randn(16, 32)
    products.linear(torch.randn(2, 16, 32), weight8(a, b)).sum().backward()
    assert a.grad is not None and b.grad is None


def micro_batches(rank: int) -> torch.Tensor:
    return torch.randint(0, 300, (2, 2, 2, 64), generator=torch.Generator().manual_seed(rank))  # inputs and targets


def gradients(trunk, rank: int, sync=lambda on: None) -> dict:
    """Added up over two micro-batches of a rank; `sync` is told whether the next one is the last."""
    for last, (ids, targets) in enumerate(micro_batches(rank)):
        sync(bool(last))
        trunk(ids, targets).backward()
    found = {name.removeprefix("module."): p.grad for name, p in trunk.named_parameters()}
    return {name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in found.items()}


def worker(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    alone = [gradients(FusedTransformer(random_model(2), fp8=True), each) for each in range(2)]
    wanted = {name: (grad + alone[1][name]) / 2 for name, grad in alone[0].items()}
    ddp = DistributedDataParallel(FusedTransformer(random_model(2), fp8=True))
    sharded = FusedTransformer(random_model(2), fp8=True)
    for layer in sharded.model.model.layers:
        fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
    fully_shard(sharded, mesh=init_device_mesh("cpu", (2,)))
    for trunk, sync in (
        (ddp, lambda on: setattr(ddp, "require_backward_grad_sync", on)), (sharded, sharded.set_requires_gradient_sync)
    ):  # fmt: skip
        found = gradients(trunk, rank, sync)
        assert found.keys() == wanted.keys()
        for name, grad in wanted.items():
            assert relative(found[name], grad) < 1e-5, name
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_several_processes_average_the_gradients_of_8_bit_products(tmp_path):
    torch.multiprocessing.spawn(worker, (str(tmp_path),), nprocs=2)


@pytest.mark.gpu
def test_a_weight_is_made_on_a_gpu_as_elsewhere():
    parts = torch.randn(48, 32), 3 * torch.randn(16, 32)
    ours, twin = (weight8(*(part.to(device) for part in parts)) for device in ("cuda", "cpu"))
    for found, wanted in zip((back(ours.eight), back(ours.eight, True)), (back(twin.eight), back(twin.eight, True))):
        assert relative(found.cpu(), wanted) < 0.01
    assert torch.allclose(ours.longest.cpu(), twin.longest)


@pytest.mark.gpu
def test_products_and_their_gradients_are_near_the_exact_ones_on_a_gpu():
    check_products("cuda", torch.bfloat16)


def odd_shapes(count: int) -> list[tuple]:
    """Random rows, columns, tiles and dtypes: multiples of 64, of 16, and any."""
    random, cases = Random(0), [(200, 144, float8.FILL, torch.bfloat16)]
    for i in range(count):
        unit = (64, 16, 1)[i % 3]
        sizes = [unit * random.randint(1, 400 // unit) for _ in range(2)]
        tile = {"ROWS": random.choice((16, 32, 64)), "COLUMNS": random.choice((64, 128, 256)), "num_warps": 4}
        cases.append((*sizes, float8.FILL if i % 2 else tile, (torch.bfloat16, torch.float32)[i % 5 == 4]))
    return cases


def spacing(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Between the neighbors of `value` in a format of FP8."""
    limits = torch.finfo(dtype)
    return value.abs().clamp_min(limits.smallest_normal).log2().floor().exp2() * limits.eps


def check_written(device: str, rows: int, columns: int, dtype: torch.dtype) -> None:
    """All that `fill` makes of random numbers, over memory full of NaN, is the nearest number of FP8, both ways.

    Halfway between two, which rounding in float32 may reach or miss, either is right.
    """
    torch.manual_seed(rows)
    x, grad = (torch.randn(rows, columns).to(device, dtype) for _ in range(2))
    peak, grad_peak, squared = x.double().abs().max(), grad.double().abs().max(), x.double().relu().square()
    slope, peak_slope = 2 * x.double().relu() * grad.double(), 2 * peak * grad_peak
    for kind, low, exact, limit in (
        (PLAIN, E4M3, x.double(), peak), (PLAIN, E5M2, x.double(), peak), (SQUARED, E4M3, squared, peak**2),
        (SQUARED_GRAD, E5M2, slope, peak_slope),
    ):  # fmt: skip
        to, squares = empty(x.shape, device, low), empty(x.shape, device, E4M3, straight=False)
        for part in (to.straight, to.turned, squares.turned):
            part.view(torch.uint8).fill_(0x7F)
        fill(to, x, measure(x)[0], kind, grad, measure(grad)[0], squares)
        assert torch.equal(to.straight.view(torch.uint8), to.turned.view(torch.uint8).t())
        results = [(to.straight, to.scale, exact, limit)]
        results += [(squares.turned.t(), squares.scale, squared, peak**2)] if kind == SQUARED_GRAD else []
        for eight, scale, value, most in results:
            assert abs(scale * torch.finfo(eight.dtype).max / most - 1) < 1e-6
            value = value / scale.double()
            assert ((eight.double() - value).abs() <= 0.5005 * spacing(value, eight.dtype)).all()


@pytest.mark.parametrize("rows, columns, tile, dtype", odd_shapes(24))
def test_every_element_is_the_nearest_number_both_ways(rows, columns, tile, dtype):
    check_written("cpu", rows, columns, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("rows, columns, tile, dtype", odd_shapes(24))
def test_the_kernel_is_right_at_every_shape_tile_and_dtype(rows, columns, tile, dtype, monkeypatch):
    monkeypatch.setattr(float8, "FILL", tile)
    check_written("cuda", rows, columns, dtype)


def test_the_checks_numbers_are_rounded_the_same_by_quotient_and_reciprocal():
    generator, differ = torch.Generator().manual_seed(0), []
    for draw in (lambda *shape: torch.randn(shape, generator=generator).bfloat16(),) * 200:
        for x in (draw(72, 104), float8._numbers(draw, 72, 104)):
            limit = x.abs().max().float()
            quotient, product = x.float() / (limit / 448), x.float() * (448 / limit)
            differ.append((quotient.to(E4M3).float() != product.to(E4M3).float()).any().item())
    assert any(differ[::2]) and not any(differ[1::2])
