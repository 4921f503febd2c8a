"""Matmuls with epilogues and gradients added in place, against autograd: also under DDP, and for embedding tables."""

import itertools

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tiny import LOW, relative
from torch.nn.parallel import DistributedDataParallel

from nanochat_hf.kernels import block_matmuls
from nanochat_hf.kernels.block_matmuls import Bf16Weight, linear_and_gates, residual_mlp, row_factor
from nanochat_hf.kernels.float8 import quantize_weight
from nanochat_hf.kernels.weight_cache import EmbeddingGradIndex, WeightCastCache

EPS = 1.19e-7
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def mlp_inputs(rows: int, width: int, hidden: int) -> list[torch.Tensor]:
    torch.manual_seed(0)
    sizes = ((1, rows, width), (1, rows, width), (width, width), (hidden, width), (width, hidden))
    return [torch.randn(size) / (1 if size[0] == 1 else size[1] ** 0.5) for size in sizes]


def check_residual_mlp(values: list[torch.Tensor], tolerance: float):
    """Outputs and gradients of the fused operation on `values` against those of its definition in float64."""
    x, attn_out, wo, w1, w2 = leaves = [value.double().requires_grad_() for value in values]
    s = x + attn_out @ wo.T
    exact = s, F.relu(F.rms_norm(s, s.shape[-1:], eps=EPS) @ w1.T).square() @ w2.T
    grads = [torch.randn_like(part) for part in exact]
    exact = (*exact, *torch.autograd.grad(exact, leaves, grads))
    inputs = [value.clone().requires_grad_() for value in values[:2]]
    params = [value.float().requires_grad_() for value in values[2:]]
    results = residual_mlp(*inputs, *(Bf16Weight(p.detach().to(values[0].dtype), (p,)) for p in params), EPS)
    grads = torch.autograd.grad(results, (*inputs, *params), [grad.to(values[0].dtype) for grad in grads])
    names = ("stream", "mlp", "d stream", "d attn_out", "d wo", "d w1", "d w2")
    for name, a, b in zip(names, (*results, *grads), exact):
        assert relative(a, b) < tolerance, name


@pytest.mark.parametrize("scale", [1, 1e4, 1e-4])
def test_residual_mlp_equals_its_definition_at_any_size_of_the_stream(scale):
    values = mlp_inputs(50, 32, 96)
    for value in values[:2]:
        value[0, :20] *= scale
    check_residual_mlp(values, 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(4096, 1536, 6144), (1000, 1280, 5120), (500, 1024, 4096), (77, 256, 1024)])
def test_gemm_epilogues_equal_the_definition(shape):
    values = [value.to(**LOW) for value in mlp_inputs(*shape)]
    assert block_matmuls.uses_quack(values[0]), "quack-kernels is not installed"
    check_residual_mlp(values, 1e-2)


@pytest.mark.parametrize("mixed", [True, False], ids=["scaled", "added"])
@pytest.mark.parametrize("device", DEVICES)
def test_the_residual_mix_and_what_it_keeps_for_its_gradient(device, mixed):
    """Beside x and x0, which others keep, one tensor of the stream's size: y, or where nothing is scaled the sum."""
    torch.manual_seed(0)
    x, y, x0 = [torch.randn(2, 40, 64, device=device, requires_grad=True) for _ in range(3)]
    scalars = (0.5 + torch.rand(2, device=device)).requires_grad_()
    s = scalars[0] * (x + y) + scalars[1] * x0 if mixed else x + y
    exact, leaves = (s, F.rms_norm(s, s.shape[-1:], eps=EPS)), [x, y, scalars] if mixed else [x, y]
    grads = [torch.randn_like(part) for part in exact]
    later = torch.randn_like(x0)  # the gradient of x0 in the layers after this one
    if device == "cuda":
        *results, same = block_matmuls.residual_mix(x, y, x0, tuple(scalars.unbind()) if mixed else None, EPS)
    elif mixed:
        *results, same = block_matmuls._ResidualMix.apply(x, y, x0, *scalars.unbind(), EPS)
    else:  # with the partition of forward and backward that CUDA gets
        run = torch.compile(block_matmuls._mix, backend="aot_eager_decomp_partition", dynamic=False, fullgraph=True)
        results, same = run(x, y, None, None, EPS), x0
    saved = {t.data_ptr() for t in results[0].grad_fn.saved_tensors if t.numel() == x.numel()}
    assert len(saved - {x.data_ptr(), x0.data_ptr()}) == 1
    for one, other in zip(results, exact):
        assert relative(one, other) < 1e-5
    assert torch.equal(same, x0)
    ends = [*results, same], [*exact, x0]
    for one, other in zip(*(torch.autograd.grad(end, [*leaves, x0], [*grads, later]) for end in ends)):
        assert relative(one, other) < 1e-5


@pytest.mark.parametrize("device", DEVICES)
def test_row_factor_is_that_of_the_norm_and_of_its_gradient(device):
    parts = torch.rand(1000, 3)
    scale = row_factor(parts.to(device), columns=5, eps=0.1)
    assert torch.allclose(scale.cpu(), (parts.sum(1) / 5 + 0.1).rsqrt()[None], rtol=1e-5)
    factor = row_factor(parts.to(device), columns=5, scale=scale).cpu()
    assert torch.allclose(factor, scale.cpu().square() * parts.sum(1) / 5, rtol=1e-5)


def test_tensors_as_weights_give_gates():
    x, w1, gate = torch.randn(2, 3, 4), torch.randn(8, 4), torch.randn(5, 2)
    y, gates = linear_and_gates(x, w1, gate)
    assert torch.allclose(y, x @ w1.T, atol=1e-6) and torch.allclose(gates, x[..., :2] @ gate.T, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_go_into_the_parameters_as_autograd_would_put_them(device):
    torch.manual_seed(0)
    sizes = {"a": (96, 64), "b": (32, 64), "gate": (4, 16), "wo": (128, 128), "w1": (256, 128), "w2": (128, 256)}
    sizes |= {"x": (2, 40, 64), "stream": (2, 40, 128)}
    values = {name: (0.1 if len(size) == 2 else 1) * torch.randn(size) for name, size in sizes.items()}

    def run(p, in_place: bool):
        def weight(*names):
            parts = tuple(p[name] for name in names)
            joint = torch.cat(parts).bfloat16()
            return Bf16Weight(joint.detach(), parts) if in_place else joint

        attn_out, gates = linear_and_gates(p["x"].bfloat16(), weight("a", "b"), p["gate"])
        mlp = [weight(name) for name in ("wo", "w1", "w2")]
        s, y = residual_mlp(p["stream"].bfloat16(), attn_out, *mlp, 1e-6)
        return y.float().square().sum() + gates.float().square().sum() + (s * y).float().sum()

    ours, exact = ({name: v.clone().to(device).requires_grad_() for name, v in values.items()} for _ in range(2))
    for _ in range(2):  # the second time added to the first
        losses = run(ours, True), run(exact, False)
        assert abs(losses[0] - losses[1]) < 2e-2 * losses[1]
        for loss in losses:
            loss.backward()
        for name in values:
            assert ours[name].grad.dtype == torch.float32
            assert relative(ours[name].grad, exact[name].grad) < 2e-2, name


@pytest.mark.parametrize("make", [lambda *parts: Bf16Weight(torch.cat(parts).detach(), parts), quantize_weight])
def test_a_frozen_part_of_a_weight_gets_no_gradient(make):
    a, b = torch.randn(16, 32, requires_grad=True), torch.randn(16, 32)
    linear_and_gates(torch.randn(2, 16, 32), make(a, b))[0].sum().backward()
    assert a.grad.any() and b.grad is None


class Net(torch.nn.Module):
    """Two matrices through one cast, as q, k and v."""

    def __init__(self, in_place: bool):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = (torch.nn.Parameter(torch.randn(n, 8)) for n in (3, 5))
        self.in_place = in_place

    def forward(self, x):
        joint = torch.cat((self.a, self.b)).bfloat16()
        weight = Bf16Weight(joint.detach(), (self.a, self.b)) if self.in_place else joint
        return linear_and_gates(x, weight)[0].float().square().sum()


def reduced(in_place: bool, steps: int, parts) -> list[torch.Tensor]:
    """Gradients of the last step of three micro-batches; DDP must be deleted before its processes end."""
    module = DistributedDataParallel(Net(in_place), gradient_as_bucket_view=True)
    for _ in range(steps):
        module.zero_grad(set_to_none=True)
        with module.no_sync():
            for part in parts[:-1]:
                module(part).backward()
        module(parts[-1]).backward()
    return [parameter.grad.clone() for parameter in module.parameters()]


def ddp_worker(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    parts = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(rank)).bfloat16()
    for steps in (1, 2):  # in the second step `.grad` is DDP's own bucket
        for ours, exact in zip(reduced(True, steps, parts), reduced(False, steps, parts)):
            assert torch.equal(ours, exact)
            both = [torch.empty_like(ours) for _ in range(2)]
            dist.all_gather(both, ours)
            assert torch.equal(*both)  # reduced: the same on both
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_ddp_reduces_gradients_that_were_added_in_place(tmp_path):
    torch.multiprocessing.spawn(ddp_worker, (str(tmp_path),), nprocs=2)


def test_a_cast_is_kept_until_a_weight_changes():
    cache, weights = WeightCastCache(), [torch.nn.Parameter(torch.randn(n, 4)) for n in (2, 3)]
    first = cache.cast_detached("qkv", torch.bfloat16, *weights)
    assert torch.equal(first, torch.cat(weights).bfloat16()) and not first.requires_grad
    assert cache.cast_detached("qkv", torch.bfloat16, *weights) is first
    assert cache.cast_detached("other", torch.bfloat16, weights[0]).shape == (2, 4)
    with torch.no_grad():
        weights[1].mul_(2)
    assert torch.equal(cache.cast_detached("qkv", torch.bfloat16, *weights), torch.cat(weights).bfloat16())


@pytest.mark.parametrize("device", DEVICES)
def test_embedding_gradients_are_added_up(device):
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    ids = torch.randint(0, 50, (4, 700), device=device)
    ids[0] = 3  # one token id many times, and 50 to 59 never
    table = torch.randn(60, 300, device=device, dtype=dtype, requires_grad=True)
    grad = torch.randn(4, 700, 300, device=device, dtype=dtype)
    exact = torch.zeros(60, 300, device=device).index_add_(0, ids.flatten(), grad.flatten(0, 1).float())
    for step, materialize in itertools.product((0, 2), (True, False)):
        index = EmbeddingGradIndex(ids.t().contiguous().t(), 60)
        assert index.ids.is_contiguous()
        rows = index.lookup(table, materialize)
        if materialize:
            assert torch.equal(rows, table[ids])
            rows.backward(grad)
        else:
            added = rows.index.accumulate_grad(rows.table, grad)
            table.grad = table.grad if added is None else table.grad + added
        turn = step + (1 if materialize else 2)
        assert torch.allclose(table.grad.float(), turn * exact, rtol=2e-2, atol=4e-2)
    assert not table.grad[50:].any()
