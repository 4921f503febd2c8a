"""Muon and AdamW against slow references, roles of parameters, skipped steps, and ranks: they equal one, and own."""

import copy
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from servers import free_port
from tiny import relative
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from nanochat_hf.errors import InputError
from nanochat_hf.kernels.muon import POLAR_EXPRESS
from nanochat_hf.optim import muon_adamw
from nanochat_hf.optim.muon_adamw import MuonAdamW, OwnerGradientReducer, assign_matrices_to_ranks, param_groups
from nanochat_hf.optim.scaling import plan
from nanochat_hf.stage_configs import PretrainConfig

MUON = {"kind": "muon", "lr": 0.02, "weight_decay": 0.1, "momentum": 0.9, "beta2": 0.9}
ADAMW = {"kind": "adamw", "lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-10, "weight_decay": 0.1}


def reference_muon(p, grads, lr, weight_decay, momentum, beta2):
    """One matrix, step by step in float64, straight from the papers."""
    p, m, v = p.double().clone(), torch.zeros_like(p, dtype=torch.float64), 0.0
    for g in grads:
        m = momentum * m + (1 - momentum) * g.double()
        u = momentum * m + (1 - momentum) * g.double()
        u = u * (u.norm() / u.shape[0] ** 0.5 / u.norm(dim=1, keepdim=True))  # row equilibration
        u = u / (1.01 * u.norm() + 1e-6)
        for a, b, c in POLAR_EXPRESS:
            u = a * u + b * (u @ u.T @ u) + c * (u @ u.T @ u @ u.T @ u)
        u = u * min(u.shape) ** 0.5 / u.norm()  # Muon+
        squares = (u**2).mean(1 if u.shape[0] >= u.shape[1] else 0, keepdim=True)  # NorMuon
        v = beta2 * v + (1 - beta2) * squares
        damped = u / v**0.5
        u = damped * u.norm() / damped.norm()
        rate = lr * max(1, p.shape[0] / p.shape[1]) ** 0.5
        p = p - rate * u - rate * weight_decay * p * (u * p >= 0)
    return p


def gradients(shape, steps, seed=1):
    torch.manual_seed(seed)
    return [torch.randn(shape) * (1 + 10 * torch.rand(shape[0], 1)) for _ in range(steps)]


@pytest.mark.parametrize("shape", [(16, 16), (32, 8), (8, 32), (5, 12)])
def test_muon_equals_its_reference(shape):
    params = [torch.nn.Parameter(torch.randn(shape)) for _ in range(3)]
    optimizer = MuonAdamW([{"params": params, **MUON}])
    grads = [gradients(shape, 4, seed) for seed in range(3)]
    expected = [
        reference_muon(p.detach(), g, **{k: v for k, v in MUON.items() if k != "kind"}) for p, g in zip(params, grads)
    ]
    for step in range(4):
        for p, g in zip(params, grads):
            p.grad = g[step].clone()
        optimizer.step()
    for p, e in zip(params, expected):
        torch.testing.assert_close(p.detach().double(), e, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_zero_gradient_moves_nothing_but_the_decay(dtype):
    p = torch.nn.Parameter(torch.ones(4, 8, dtype=dtype))
    optimizer = MuonAdamW([{"params": [p], **MUON}])
    p.grad = torch.zeros_like(p)
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.full((4, 8), 1 - 0.02 * 0.1, dtype=dtype))
    assert all(value.dtype == torch.float32 for value in optimizer.state[p].values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adamw_equals_torch(dtype):
    p = torch.nn.Parameter(torch.randn(7, 5).to(dtype))
    exact = torch.nn.Parameter(p.detach().float().clone())
    ours, theirs = MuonAdamW([{"params": [p], **ADAMW}]), torch.optim.AdamW([exact], 0.01, (0.8, 0.95), 1e-10, 0.1)
    for g in gradients((7, 5), 5):
        g[0] *= 1e-8  # where eps counts
        p.grad = g.to(dtype)
        exact.grad = p.grad.float()
        ours.step()
        theirs.step()
        if dtype == torch.bfloat16:  # the parameter is rounded at every step, its state is not
            exact.data = p.detach().float()
    assert all(value.dtype == torch.float32 for value in ours.state[p].values())
    torch.testing.assert_close(ours.state[p]["exp_avg_sq"], theirs.state[exact]["exp_avg_sq"])
    torch.testing.assert_close(p.detach().float(), exact.detach(), atol=1e-6, rtol=1e-5)


def toy_groups():
    torch.manual_seed(0)
    matrices = [torch.nn.Parameter(torch.randn(s)) for s in [(8, 8)] * 3 + [(16, 8)] * 2 + [(8, 16), (3, 12)]]
    rest = [torch.nn.Parameter(torch.randn(s)) for s in [(300, 256), (257, 300), (4,), (1,)]]
    rest[0].data = rest[0].data.bfloat16()
    return [{"params": matrices, **MUON}, {"params": rest, **ADAMW}]


def parameters(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def toy_gradients(optimizer, step: int, place=lambda grad: grad):
    """Set gradients that depend on the step and the parameter's index only."""
    for index, p in enumerate(parameters(optimizer)):
        generator = torch.Generator().manual_seed(1000 * step + index)
        p.grad = place(torch.randn(p.shape, generator=generator).to(p.device, p.dtype))


def toy_run(optimizer, steps, start=0, place=lambda grad: grad):
    for step in range(start, start + steps):
        toy_gradients(optimizer, step, place)
        optimizer.step()


def values(optimizer):
    return [p.detach().clone() for p in parameters(optimizer)]


def test_a_reloaded_state_resumes_bit_for_bit(tmp_path):
    uninterrupted, stopped = MuonAdamW(toy_groups()), MuonAdamW(toy_groups())
    toy_run(uninterrupted, 6)
    toy_run(stopped, 3)
    torch.save((stopped.state_dict(), values(stopped)), tmp_path / "state.pt")
    state, weights = torch.load(tmp_path / "state.pt")
    resumed = MuonAdamW(toy_groups())
    with torch.no_grad():
        for p, value in zip(parameters(resumed), weights):
            p.copy_(value)
    resumed.load_state_dict(state)
    toy_run(resumed, 3, start=3)
    for a, b in zip(values(uninterrupted), values(resumed)):
        assert torch.equal(a, b)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_skipped_step_leaves_weights_and_state_alone_whatever_the_gradients_hold(device):
    def run(broken: bool):
        groups = toy_groups()
        for group in groups:
            group["params"] = [torch.nn.Parameter(p.detach().to(device)) for p in group["params"]]
        optimizer = MuonAdamW(groups)
        for step in range(4):
            toy_gradients(optimizer, step)
            if step != 2:
                optimizer.step_factor = torch.ones((), device=device)
                optimizer.step()
            elif broken:
                for p in parameters(optimizer):
                    p.grad.flatten()[0] = float("nan")
                optimizer.step_factor = torch.zeros((), device=device)
                optimizer.step()
                optimizer.rollback_step_count()
        return optimizer

    whole, broken = run(False), run(True)
    for a, b in zip(values(whole), values(broken)):
        assert torch.equal(a, b)
    for one, other in zip(whole.state.values(), broken.state.values()):
        assert all(torch.equal(one[key], other[key]) for key in one)


OPTIONS = {**plan(PretrainConfig(2, max_seq_len=128, total_batch_size=128), 512).groups, "lora": ADAMW}


def test_every_parameter_is_in_one_group_by_role(tiny_model):
    groups = {group["role"]: group for group in param_groups(tiny_model, OPTIONS)}
    named = {id(p): name for name, p in tiny_model.named_parameters()}
    names = [named[id(p)] for group in groups.values() for p in group["params"]]
    assert sorted(names) == sorted(named.values())
    assert all(".layers." in named[id(p)] and p.ndim == 2 for p in groups["matrix"]["params"])
    assert [group["kind"] for role, group in groups.items() if role != "matrix"] == ["adamw"] * 6
    assert {named[id(p)] for p in groups["smear"]["params"]} == {
        "model.smear_gate.weight", "model.smear_lambda", "model.backout_lambda"
    }  # fmt: skip


def test_lora_matrices_have_their_own_role_and_frozen_ones_none(tiny_model):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_model, LoraConfig(r=4, target_modules=["q_proj", "fc1"], modules_to_save=["lm_head"]))
    groups = {group["role"]: group["params"] for group in param_groups(model, OPTIONS)}
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    assert set(groups) == {"lora", "head"} and len(groups["lora"]) == 8
    assert {id(p) for params in groups.values() for p in params} == trainable


def test_unknown_roles_and_flat_partitions_are_refused():
    with pytest.raises(InputError, match="no optimizer role for parameter 'weight'"):
        param_groups(torch.nn.Linear(2, 2, bias=False), OPTIONS)
    with pytest.raises(InputError, match=r"DeepSpeed ZeRO.*multi_gpu.yaml"):
        MuonAdamW([{"params": [torch.nn.Parameter(torch.zeros(64))], **MUON}])
    optimizer = MuonAdamW(toy_groups())
    optimizer.param_groups[0]["params"] = [torch.nn.Parameter(torch.zeros(64))]  # as ZeRO does behind our back
    with pytest.raises(InputError, match="flat"):
        optimizer.step()


def start(rank, world, port, device="cpu"):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world))
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group("nccl" if device == "cuda" else "gloo")


def equal_worker(rank, world, port, sharded, expected):
    start(rank, world, port)
    mesh, optimizer = init_device_mesh("cpu", (world,)), MuonAdamW(toy_groups())
    place = (lambda x: distribute_tensor(x, mesh, [Shard(0)])) if sharded else (lambda x: x)
    for group in optimizer.param_groups:  # as FSDP2 does: in place, after construction
        group["params"][:] = [torch.nn.Parameter(place(p.data)) for p in group["params"]]
    toy_run(optimizer, 4, place=place)
    for p, whole in zip(parameters(optimizer), expected):
        torch.testing.assert_close((p.full_tensor() if sharded else p).detach(), whole, atol=1e-6, rtol=1e-5)
    buffers = [optimizer.state[p].get("momentum_buffer") for p in optimizer.param_groups[0]["params"]]
    if sharded:
        assert all(buffer.placements == (Shard(0),) for buffer in buffers)
    else:  # each matrix has one owner
        total = torch.tensor(owned := sum(buffer is not None for buffer in buffers))
        dist.all_reduce(total)
        assert total == len(buffers) and owned < total
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("world,sharded", [(2, False), (4, False), (3, True)])
def test_several_ranks_equal_one(world, sharded):
    alone = MuonAdamW(toy_groups())
    toy_run(alone, 4)
    mp.spawn(equal_worker, (world, free_port(), sharded, copy.deepcopy(values(alone))), nprocs=world)


class Net(torch.nn.Module):
    """Three matrices of one shape (two ranks do not divide them), a large bf16 table and a small scale."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = torch.nn.Embedding(300, 256, dtype=torch.bfloat16)
        self.matrices = torch.nn.ParameterList(torch.randn(256, 256) / 16 for _ in range(3))
        self.scale = torch.nn.Parameter(torch.ones(256))

    def forward(self, ids):
        x = self.table(ids).float()
        for matrix in self.matrices:
            x = torch.tanh(x @ matrix)
        return (x * self.scale).square().sum()


def reduction_worker(rank: int, world: int, port: int, device: str):
    start(rank, world, port, device)
    ids = torch.randint(300, (world, 2, 40), generator=torch.Generator().manual_seed(1)).to(device)
    alone, net = Net().to(device), Net().to(device)
    for part in ids.flatten(0, 1):
        alone(part).backward()
    expected = [p.grad.float() for p in alone.parameters()]
    if rank:
        net.scale.data.zero_()  # every rank gets the main process's weights
    muon_adamw.BUCKET_BYTES = 1 << 18  # a matrix
    rest = [net.table.weight, net.scale]
    optimizer = MuonAdamW([{"params": list(net.matrices), **MUON}, {"params": rest, **ADAMW}])
    reducer = OwnerGradientReducer(optimizer.owners())
    assert torch.equal(net.scale, torch.ones(256, device=device))
    owners = [None, 0, 0, 1, 0]  # of the scale, the table, the matrices
    assert [reducer.owners[p] for p in net.parameters()] == owners
    for _ in range(2):
        net.zero_grad(set_to_none=True)
        net(ids[rank, 0]).backward()
        with reducer:
            net(ids[rank, 1]).backward()
        for p, owner, grad in zip(net.parameters(), owners, expected):
            if owner in (rank, None):
                assert relative(p.grad, grad) < 0.01
        square = reducer.squared_norm()
        dist.all_reduce(square)
        torch.testing.assert_close(square, sum(grad.square().sum() for grad in expected), atol=0, rtol=0.01)
    dist.destroy_process_group()


TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
ON_TWO_GPUS = pytest.param("cuda", marks=[pytest.mark.gpu, TWO_GPUS])


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.slow), ON_TWO_GPUS])
def test_owner_ranks_have_the_summed_gradients(device):
    mp.spawn(reduction_worker, (2, free_port(), device), nprocs=2)


def test_large_tensors_have_alternating_owner_ranks_and_small_ones_none(monkeypatch):
    monkeypatch.setattr(muon_adamw, "get_dist_info", lambda: (0, 2))
    owners = MuonAdamW(toy_groups()).owners()
    ranks = {tuple(p.shape): [] for p in owners}
    for p, rank in owners.items():
        ranks[tuple(p.shape)] += [] if rank is None else [rank]
    assert {shape: sorted(of) for shape, of in ranks.items()} == {
        (8, 8): [0, 0, 1], (16, 8): [0, 1], (8, 16): [0], (3, 12): [0],
        (257, 300): [0], (300, 256): [1], (4,): [], (1,): [],
    }  # fmt: skip


@pytest.mark.parametrize("number, world, parts", [
    (6, 2, [[0, 2, 4], [1, 3, 5]]), (5, 4, [[0, 4], [1, 2], [3], []]), (3, 1, [[0, 1, 2]]), (1, 3, [[0], [], []]),
])  # fmt: skip
def test_matrices_are_assigned_so_that_neighbors_have_different_owners(number, world, parts):
    assert assign_matrices_to_ranks(list(range(number)), world) == parts


@pytest.mark.parametrize("shape", [(8, 8), (16, 8), (8, 16)])
def test_rows_of_a_matrix_take_the_step_that_they_take_in_the_whole(shape, monkeypatch):
    torch.manual_seed(0)
    whole = [torch.nn.Parameter(torch.randn(shape)) for _ in range(2)]
    x, part, rows = torch.randn(2, *shape), copy.deepcopy(whole), slice(shape[0] // 2, None)
    squares = muon_adamw.muon.mean_squares(x)
    MuonAdamW([{"params": whole, **MUON}])._apply(MUON, whole, x, squares)
    monkeypatch.setattr(muon_adamw, "local", lambda p: p[rows])  # as on the second of two ranks of FSDP2
    MuonAdamW([{"params": part, **MUON}])._apply(MUON, part, x[:, rows], squares, rows)
    for p, expected in zip(part, whole):
        torch.testing.assert_close(p[rows], expected[rows])


@pytest.mark.gpu
def test_bf16_on_a_gpu_stays_near_float32():
    grads = gradients((512, 256), 3)
    results = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(512, 256).to(device)) for _ in range(4)]
        optimizer = MuonAdamW([{"params": params, **MUON}])
        for g in grads:
            for p in params:
                p.grad = g.to(device)
            optimizer.step()
        results.append(torch.stack([p.detach().cpu() for p in params]))
    assert (results[0] - results[1]).norm() / (results[0].std() * results[0].numel() ** 0.5) < 2e-3


def test_the_squared_norm_counts_each_gradient_on_one_rank_and_small_ones_are_summed_on_all(monkeypatch):
    small, large = torch.nn.Parameter(torch.zeros(4)), torch.nn.Parameter(torch.zeros(9))
    small.grad, large.grad = torch.ones(4), torch.ones(9)
    reducer = object.__new__(OwnerGradientReducer)  # without a job
    reducer.owners, reducer.waits, reducer.bucket = {small: None, large: 1}, [], []
    for rank, square in ((0, 4), (1, 9)):
        monkeypatch.setattr(muon_adamw, "get_dist_info", lambda rank=rank: (rank, 2))
        assert reducer.squared_norm().item() == pytest.approx(square)
    monkeypatch.setattr(muon_adamw.dist, "all_reduce", lambda sums: sums.add_(2))  # what another rank has
    with reducer:
        pass
    assert small.grad.tolist() == [3] * 4 and large.grad.tolist() == [1] * 9


def test_a_rank_drops_the_state_of_a_tensor_that_another_one_owns(monkeypatch):
    p = torch.nn.Parameter(torch.zeros(muon_adamw.LARGE))
    p.grad = torch.ones_like(p)
    optimizer = MuonAdamW([{"params": [p], **ADAMW}])
    optimizer.step()
    assert "exp_avg" in optimizer.state[p]  # as loaded from a checkpoint of one rank
    monkeypatch.setattr(muon_adamw, "get_dist_info", lambda: (1, 2))
    optimizer._adamw(optimizer.param_groups[0], p, 0)
    assert not optimizer.state[p]
