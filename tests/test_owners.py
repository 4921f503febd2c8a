"""Gradients of several processes are summed at the process that owns their parameter, and only there."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_optim import free_port
from tiny import relative
from torch import nn

from nanochat_hf.optim import gradient_reduction as owners
from nanochat_hf.optim.gradient_reduction import OwnerGradientReducer, assign_matrices_to_ranks
from nanochat_hf.optim.muon_adamw import MuonAdamW

MUON = {"kind": "muon", "lr": 0.02, "momentum": 0.9, "beta2": 0.9, "weight_decay": 0.0}
ADAMW = {"kind": "adamw", "lr": 0.02, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0}


class Net(nn.Module):
    """Three matrices of one shape (an uneven share), a large table and a small scale, in bf16 and float32."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(300, 256, dtype=torch.bfloat16)
        self.matrices = nn.ParameterList(torch.randn(256, 256) / 16 for _ in range(3))
        self.scale = nn.Parameter(torch.ones(256))

    def forward(self, ids):
        x = self.table(ids).float()
        for matrix in self.matrices:
            x = torch.tanh(x @ matrix)
        return (x * self.scale).square().sum()


def optimizer_of(net: Net) -> MuonAdamW:
    rest = [net.table.weight, net.scale]
    return MuonAdamW([{"params": list(net.matrices), **MUON}, {"params": rest, **ADAMW}])


def gradients(net: nn.Module, parts) -> list[torch.Tensor]:
    for part in parts:
        net(part).backward()
    return [p.grad.float().clone() for p in net.parameters()]


def worker(rank: int, world: int, port: int, device: str):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world))
    torch.set_num_threads(1)
    device = torch.device(device, rank) if device == "cuda" else torch.device(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    ids = torch.randint(300, (world, 2, 40), generator=torch.Generator().manual_seed(1)).to(device)
    expected = gradients(Net().to(device), ids.flatten(0, 1))
    net = Net().to(device)
    if rank:
        net.scale.data.zero_()  # the main process's weights count
    owners.BUCKET_BYTES = 1 << 18  # a matrix
    reduction = OwnerGradientReducer(optimizer_of(net).owners())
    assert torch.equal(net.scale, torch.ones(256, device=device))
    expected_owners = [None, 0, 0, 1, 0]  # of the scale, the table, the matrices
    assert [reduction.owners[p] for p in net.parameters()] == expected_owners
    for _ in range(2):
        net.zero_grad(set_to_none=True)
        net(ids[rank, 0]).backward()
        with reduction:
            net(ids[rank, 1]).backward()
        for p, owner, wanted in zip(net.parameters(), expected_owners, expected):
            if owner in (rank, None):
                assert relative(p.grad, wanted) < 0.01
        square = reduction.squared_norm()
        dist.all_reduce(square)
        whole = torch.stack([wanted.square().sum() for wanted in expected]).sum()
        torch.testing.assert_close(square, whole, atol=0, rtol=0.01)
    dist.destroy_process_group()


@pytest.mark.slow
def test_owners_have_the_sums():
    mp.spawn(worker, (2, free_port(), "cpu"), nprocs=2)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_owners_have_the_sums_on_gpus():
    mp.spawn(worker, (2, free_port(), "cuda"), nprocs=2)


def test_matrices_are_dealt_out_so_that_neighbours_have_different_owners():
    assert assign_matrices_to_ranks(list(range(6)), 2) == [[0, 2, 4], [1, 3, 5]]
    assert assign_matrices_to_ranks(list(range(5)), 4) == [
        [0, 4],
        [1, 2],
        [3],
        [],
    ]  # the first ranks have equally many
    assert assign_matrices_to_ranks(list(range(3)), 1) == [[0, 1, 2]]
    assert assign_matrices_to_ranks([7], 3) == [[7], [], []]
