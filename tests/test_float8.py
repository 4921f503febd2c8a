"""FP8 matmuls, relu squared between them, and their gradients, against exact ones."""

from random import Random

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from test_fused_model import random_model
from tiny import relative
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from nanochat_hf.kernels import block_matmuls, float8
from nanochat_hf.kernels.float8 import E4M3, E5M2, PLAIN, SQUARED, SQUARED_GRAD, cast_to_fp8, empty
from nanochat_hf.train.fused_model import FusedTransformer

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def dequantize(pair: float8.Float8Pair, transposed: bool = False) -> torch.Tensor:
    return (pair.transposed.t() if transposed else pair.row_major).float() * pair.scale


def test_an_amax_bound_that_is_too_large_costs_next_to_nothing():
    x = torch.randn(64, 64)
    assert relative(dequantize(float8.quantize(x, E4M3, 8.0)), x) < 0.04
    assert relative(dequantize(float8.quantize(1e-6 * x, E5M2, torch.tensor([1e-3]))), 1e-6 * x) < 0.08
    assert not dequantize(float8.quantize(torch.zeros(16, 16), E4M3)).any()
    for dtype in (E4M3, E5M2):  # and one that is too small saturates
        assert (dequantize(float8.quantize(x, dtype, 1.0)) - x.clamp(-1, 1)).abs().max() < 0.08


def test_amax_and_norms_are_those_of_magnitudes_and_rows():
    x = torch.randn(40, 24)
    amax, row_norm = float8.compute_amax(x, norms=True)
    assert torch.allclose(amax.max(), x.abs().max()) and torch.allclose(row_norm.max(), x.norm(dim=1).max())


@pytest.mark.parametrize("device", DEVICES)
def test_a_nan_stays_so_that_the_loop_can_see_it(device):
    x, pairs = torch.randn(16, 16, device=device), [empty((16, 16), device, E5M2) for _ in range(3)]
    x[3, 4] = torch.nan
    squares = empty((16, 16), device, E4M3, row_major=False)
    for kind, pair in enumerate(pairs):
        cast_to_fp8(pair, x, 4.0, kind, torch.ones_like(x), torch.ones(1, device=device), squares)
    for layout in (*map(dequantize, pairs), dequantize(pairs[0], True), dequantize(squares, True)):
        assert layout[3, 4].isnan() and layout.isnan().sum() == 1


@pytest.mark.parametrize("device", DEVICES)
def test_a_weight_of_several_parts_has_one_scale_and_its_largest_column_norm(device):
    a, b = torch.randn(48, 32), 3 * torch.randn(16, 32)
    whole, weight = torch.cat((a, b)), float8.quantize_weight(a.to(device), b.to(device))
    assert relative(dequantize(weight.pair).cpu(), whole) < 0.04
    assert torch.equal(dequantize(weight.pair), dequantize(weight.pair, True))
    assert torch.allclose(weight.column_norm.cpu(), whole.norm(dim=0).amax(), rtol=5e-3)


def run(device: str, dtype: torch.dtype, fp8: bool) -> tuple[list, dict]:
    """Outputs and gradients, twice added up, of a matmul with gates and what follows attention, from one seed."""
    torch.manual_seed(0)
    sizes = {"a": (96, 64), "b": (32, 64), "gate": (4, 16), "wo": (64, 128), "w1": (256, 64), "w2": (64, 256)}
    p = {name: (0.5 * torch.randn(size)).to(device).requires_grad_() for name, size in sizes.items()}
    p["w2"].data *= 10  # so that a bound without its column norm would be far too small
    p["x"] = F.rms_norm(torch.randn(2, 64, 64), (64,)).to(device).requires_grad_()
    dy, dgates = torch.randn(2, 64, 64).to(device, dtype), torch.randn(2, 64, 4).to(device, dtype)
    for _ in range(2):
        make = float8.quantize_weight if fp8 else lambda *parts: torch.cat(parts).to(dtype)
        y, gates = block_matmuls.linear_and_gates(p["x"].to(dtype), make(p["a"], p["b"]), p["gate"], amax_bound=8.0)
        s, y = block_matmuls.residual_mlp(p["x"].to(dtype), y, make(p["wo"]), make(p["w1"]), make(p["w2"]), 1e-6)
        torch.autograd.backward((s + y, gates), (dy, dgates))
    return [s, y, gates], {name: value.grad for name, value in p.items()}


@pytest.mark.parametrize("device", DEVICES)
def test_matmuls_and_their_gradients_are_near_the_exact_ones(device):
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    (results, grads), (exact, exact_grads) = (run(device, dtype, fp8) for fp8 in (True, False))
    assert all(relative(a, b) < 0.12 for a, b in zip(results, exact))
    for name, grad in exact_grads.items():
        assert grads[name].dtype == torch.float32
        assert relative(grads[name], grad) < 0.2, name


def gradients(fused, rank: int, sync=lambda on: None) -> dict:
    """Added up over two micro-batches of a rank; sync(True) before the last one."""
    batches = torch.randint(0, 300, (2, 2, 2, 64), generator=torch.Generator().manual_seed(rank))
    for last, (ids, targets) in enumerate(batches):
        sync(bool(last))
        fused(ids, targets).backward()
    grads = {name: p.grad for name, p in fused.named_parameters()}
    return {name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in grads.items()}


def worker(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    alone = [gradients(FusedTransformer(random_model(2), fp8=True), each) for each in range(2)]
    expected = {name: (grad + alone[1][name]) / 2 for name, grad in alone[0].items()}
    sharded = FusedTransformer(random_model(2), fp8=True)
    for layer in sharded.model.model.layers:
        fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
    fully_shard(sharded, mesh=init_device_mesh("cpu", (2,)))
    grads = gradients(sharded, rank, sharded.set_requires_gradient_sync)
    assert grads.keys() == expected.keys()
    for name, grad in expected.items():
        assert relative(grads[name], grad) < 1e-5, name
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_several_ranks_average_the_gradients_of_fp8_matmuls(tmp_path):
    torch.multiprocessing.spawn(worker, (str(tmp_path),), nprocs=2)


def odd_shapes(count: int) -> list[tuple]:
    """Random rows, columns and dtypes: multiples of 64, of 16, and any."""
    random, cases = Random(0), [(200, 144, torch.bfloat16)]
    for i in range(count):
        unit = (64, 16, 1)[i % 3]
        sizes = [unit * random.randint(1, 400 // unit) for _ in range(2)]
        cases.append((*sizes, (torch.bfloat16, torch.float32)[i % 5 == 4]))
    return cases


def spacing(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Between the neighbors of `value` in a format of FP8."""
    limits = torch.finfo(dtype)
    return value.abs().clamp_min(limits.smallest_normal).log2().floor().exp2() * limits.eps


SHAPES = [("cpu", *case) for case in odd_shapes(5)]
SHAPES += [pytest.param("cuda", *case, marks=pytest.mark.gpu) for case in odd_shapes(24)]


@pytest.mark.parametrize("device, rows, columns, dtype", SHAPES)
def test_every_element_is_the_nearest_number_of_fp8_in_both_layouts(device, rows, columns, dtype):
    """Written over memory full of NaN. Halfway between two, which float32 may reach or miss, either is right."""
    x, grad = (torch.randn(rows, columns).to(device, dtype) for _ in range(2))
    amax, grad_amax, squared = x.double().abs().max(), grad.double().abs().max(), x.double().relu().square()
    slope, slope_amax = 2 * x.double().relu() * grad.double(), 2 * amax * grad_amax
    for kind, fp8, exact, bound in (
        (PLAIN, E4M3, x.double(), amax), (PLAIN, E5M2, x.double(), amax), (SQUARED, E4M3, squared, amax**2),
        (SQUARED_GRAD, E5M2, slope, slope_amax),
    ):  # fmt: skip
        pair, squares = empty(x.shape, device, fp8), empty(x.shape, device, E4M3, row_major=False)
        for layout in (pair.row_major, pair.transposed, squares.transposed):
            layout.view(torch.uint8).fill_(0x7F)
        cast_to_fp8(pair, x, float8.compute_amax(x)[0], kind, grad, float8.compute_amax(grad)[0], squares)
        assert torch.equal(pair.row_major.view(torch.uint8), pair.transposed.view(torch.uint8).t())
        results = [(pair.row_major, pair.scale, exact, bound)]
        results += [(squares.transposed.t(), squares.scale, squared, amax**2)] if kind == SQUARED_GRAD else []
        for layout, scale, value, most in results:
            assert abs(scale * torch.finfo(layout.dtype).max / most - 1) < 1e-6
            value = value / scale.double()
            assert ((layout.double() - value).abs() <= 0.5005 * spacing(value, layout.dtype)).all()
