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

from nanochat_hf.train import float8, products
from nanochat_hf.train.fast import Trunk
from nanochat_hf.train.float8 import (
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
    alone = [gradients(Trunk(random_model(2), fp8=True), each) for each in range(2)]
    wanted = {name: (grad + alone[1][name]) / 2 for name, grad in alone[0].items()}
    ddp = DistributedDataParallel(Trunk(random_model(2), fp8=True))
    sharded = Trunk(random_model(2), fp8=True)
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


@pytest.mark.gpu
def test_the_kernel_writes_what_its_twin_writes():
    torch.manual_seed(0)
    h, grad = (torch.randn(200, 144).bfloat16() for _ in range(2))
    made = []
    for device in ("cpu", "cuda"):
        x, g = h.to(device), grad.to(device)
        plain, square, turned = quantise(x, E4M3), *(empty(x.shape, device, dtype) for dtype in (E4M3, E5M2))
        fill(square, x, measure(x)[0], SQUARED)
        squares = empty(x.shape, device, E4M3, straight=False)
        fill(turned, x, measure(x)[0], SQUARED_GRAD, g, measure(g)[0], squares)
        made.append(
            [back(plain), back(plain, True), back(square), back(turned), back(turned, True), back(squares, True)]
        )
    for ours, twin in zip(*made):
        assert relative(twin.cpu(), ours) < 0.01  # a value between two may be rounded to either


def odd_shapes(count: int) -> list[tuple]:
    """Random rows, columns, tiles and dtypes: multiples of 64, of 16, and any."""
    random, cases = Random(0), []
    for i in range(count):
        unit = (64, 16, 1)[i % 3]
        sizes = [unit * random.randint(1, 400 // unit) for _ in range(2)]
        tile = {"ROWS": random.choice((16, 32, 64)), "COLUMNS": random.choice((64, 128, 256)), "num_warps": 4}
        cases.append((*sizes, float8.FILL if i % 2 else tile, (torch.bfloat16, torch.float32)[i % 5 == 4]))
    return cases


def written(device: str, rows: int, columns: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """What `fill` makes of random numbers, all kinds, as it is and transposed, over memory full of NaN."""
    torch.manual_seed(rows)
    x, grad = (torch.randn(rows, columns).to(device, dtype) for _ in range(2))
    results = []
    for kind, low in ((PLAIN, E4M3), (PLAIN, E5M2), (SQUARED, E4M3), (SQUARED_GRAD, E5M2)):
        to, squares = empty(x.shape, device, low), empty(x.shape, device, E4M3, straight=False)
        for part in (to.straight, to.turned, squares.turned):
            part.view(torch.uint8).fill_(0x7F)
        fill(to, x, measure(x)[0], kind, grad, measure(grad)[0], squares)
        assert torch.equal(to.straight.view(torch.uint8), to.turned.view(torch.uint8).t())
        results += [back(to), *([back(squares, True)] if kind == SQUARED_GRAD else [])]
    return results


@pytest.mark.parametrize("rows, columns", [(8, 24), (200, 144)])
def test_every_element_is_written_both_ways(rows, columns):
    plain, _, squared, _, squares = written("cpu", rows, columns, torch.float32)
    torch.manual_seed(rows)
    exact = torch.randn(rows, columns)
    assert relative(plain, exact) < 0.04 and relative(squared, exact.relu().square()) < 0.05
    assert torch.equal(squared, squares)


@pytest.mark.gpu
@pytest.mark.parametrize("rows, columns, tile, dtype", odd_shapes(24))
def test_the_kernel_is_right_at_every_shape_tile_and_dtype(rows, columns, tile, dtype, monkeypatch):
    monkeypatch.setattr(float8, "FILL", tile)
    for ours, twin in zip(written("cuda", rows, columns, dtype), written("cpu", rows, columns, dtype)):
        assert relative(ours.cpu(), twin) < 0.01  # a value between two may be rounded to either
