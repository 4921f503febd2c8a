"""Copies and embedding rows whose gradients are added in place: the same gradients, and DDP still reduces them."""

import itertools
import os
import tempfile

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from nanochat_hf.kernels import block_matmuls as products
from nanochat_hf.kernels import weight_cache as leaves


class Net(torch.nn.Module):
    """Two matrices through one copy, as q, k and v go."""

    def __init__(self, in_place: str | None):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = (torch.nn.Parameter(torch.randn(n, 8)) for n in (3, 5))
        self.in_place = in_place

    def forward(self, x):
        parts = (self.a, self.b)
        joint = torch.cat(parts)
        if self.in_place == "copy":
            joint = leaves._Low.apply(joint.detach().bfloat16(), *parts)
        elif self.in_place == "product":
            joint = products.Weight(joint.detach().bfloat16(), parts)
        else:
            joint = joint.bfloat16()
        return products.linear(x, joint).float().square().sum()


def gradients(module, parts) -> list[torch.Tensor]:
    for part in parts[:-1]:
        with module.no_sync() if hasattr(module, "no_sync") else torch.enable_grad():
            module(part).backward()
    module(parts[-1]).backward()
    return [parameter.grad.clone() for parameter in module.parameters()]


IN_PLACE = ["copy", "product"]  # under the compiler, and without


@pytest.mark.parametrize("in_place", IN_PLACE)
def test_gradients_added_in_place_are_those_of_autograd(in_place):
    parts = torch.randn(3, 4, 8).bfloat16()
    for ours, theirs in zip(gradients(Net(in_place), parts), gradients(Net(None), parts)):
        assert torch.equal(ours, theirs)


def reduced(in_place: str | None, steps: int, parts) -> list[torch.Tensor]:
    """Gradients of the last step; DDP is gone before its processes part."""
    module = DistributedDataParallel(Net(in_place), gradient_as_bucket_view=True)
    for _ in range(steps):
        module.zero_grad(set_to_none=True)
        found = gradients(module, parts)
    return found


def worker(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    parts = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(rank)).bfloat16()
    for in_place, steps in itertools.product(IN_PLACE, (1, 2)):  # the second step finds DDP's own buckets in place
        for ours, theirs in zip(reduced(in_place, steps, parts), reduced(None, steps, parts)):
            assert torch.equal(ours, theirs)
            both = [torch.empty_like(ours) for _ in range(2)]
            dist.all_gather(both, ours)
            assert torch.equal(*both)  # reduced: the same on both
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_ddp_reduces_gradients_that_were_added_in_place():
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(worker, (folder,), nprocs=2)


def test_without_a_gpu_rows_are_plain_embeddings():
    table = torch.randn(7, 4, requires_grad=True)
    ids = torch.tensor([[1, 2, 1]])
    places = leaves.EmbeddingGradIndex(ids, 7)
    assert torch.equal(places.rows(table), table[ids]) and places.rows(table, real=False) is None


@pytest.mark.gpu
def test_rows_have_the_gradient_of_an_embedding_and_add_it_up():
    ids = torch.randint(0, 50, (4, 700), device="cuda")
    ids[0] = 3  # one token many times, and 50 to 59 never
    table = torch.randn(60, 300, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(4, 700, 300, device="cuda", dtype=torch.bfloat16)
    exact = torch.zeros(60, 300, device="cuda").index_add_(0, ids.flatten(), grad.flatten(0, 1).float())
    for turn in (1, 2):
        rows = leaves.EmbeddingGradIndex(ids, 60).rows(table)
        assert torch.equal(rows, table[ids])
        rows.backward(grad)
        assert torch.allclose(table.grad.float(), turn * exact, rtol=2e-2, atol=2e-2)
    assert not table.grad[50:].any()
