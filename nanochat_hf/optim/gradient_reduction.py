"""Which rank updates a replicated parameter, and gradients that are reduced to that owner rank only.

DDP all-reduces every gradient to every rank, but in `MuonAdamW` each large parameter has one owner. Reducing to the
owner moves half the bytes, as in ZeRO stage 2 (arXiv:1910.02054). The reduction overlaps the last backward pass of a
step and takes gradients where they are; DDP would copy them into buckets, whose addresses fit neither our kernels nor
cuBLAS's fastest. Afterwards the gradients that a rank does not own are partial sums, which nobody needs.
"""

from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from ..distributed import coalesce_collectives, get_dist_info

BUCKET_BYTES = 512 << 20  # of gradients that are sent at once: several layers, whose owners use all links
LARGE = 1 << 16  # elements from which an AdamW tensor has an owner rank, instead of a copy of its state on every rank


def adamw_owner_rank(p: Tensor, index: int, world: int) -> int | None:
    """The rank that updates p, the index-th parameter by size; None: every rank does."""
    return index % world if p.numel() >= LARGE else None


def assign_matrices_to_ranks(params: list, world: int) -> list[list]:
    """The matrices that each rank updates: equally many, fewer on the last ranks where they do not divide.

    They alternate in the order of the model, so that gradients which are ready at the same time go to all ranks.
    """
    size, interleaved = -(-len(params) // world), [p for first in range(world) for p in params[first::world]]
    return [interleaved[rank * size : (rank + 1) * size] for rank in range(world)]


class OwnerGradientReducer:
    """Gradients summed, not averaged, over the ranks: at their owner, or everywhere if they have none.

        with reducer:
            loss.backward()

    owners: of all parameters, from `MuonAdamW.owners`; all ranks get the parameters of the main process.
    """

    def __init__(self, owners: dict[nn.Parameter, int | None]):
        self.owners, self.active, self.bucket, self.waits = owners, False, [], []
        for p in owners:  # one by one: `coalesce_collectives` needs NCCL connected already
            dist.broadcast(p.detach(), 0)
        self.nodes = [get_gradient_edge(p).node for p in owners]  # the hooks live as long as these
        for p, node in zip(owners, self.nodes):
            node.register_hook(partial(self._add, p))  # runs for a gradient that was added in place as well

    def __enter__(self) -> None:
        self.active = True

    def __exit__(self, kind, *_) -> None:
        """Wait for the transfers, and all-reduce the small gradients that every rank needs."""
        self.active = False
        if kind is None:
            self._send()
            for wait in self.waits:
                wait()
            if small := [p.grad for p, owner in self.owners.items() if owner is None and p.grad is not None]:
                flat = torch.cat([grad.flatten().float() for grad in small])
                dist.all_reduce(flat)
                parts = flat.split([grad.numel() for grad in small])
                torch._foreach_copy_(small, [part.view_as(grad) for part, grad in zip(parts, small)])
        self.waits.clear()
        self.bucket.clear()

    def _add(self, p: nn.Parameter, *_) -> None:
        if self.active and self.owners[p] is not None and p.grad is not None:
            self.bucket.append((p.grad, self.owners[p]))
            if sum(grad.nbytes for grad, _ in self.bucket) >= BUCKET_BYTES:
                self._send()

    def _send(self) -> None:
        if self.bucket:
            reductions = [partial(dist.reduce, grad, owner, async_op=True) for grad, owner in self.bucket]
            self.waits.append(coalesce_collectives(reductions, self.bucket[0][0].device))
            self.bucket.clear()

    def squared_norm(self) -> Tensor:
        """() float32, this rank's share of the squared norm of all gradients: that of the ones it counts alone."""
        rank, _ = get_dist_info()
        counted = [p.grad for p, owner in self.owners.items() if (owner or 0) == rank and p.grad is not None]
        device = next(iter(self.owners)).device
        return torch.nn.utils.get_total_norm(counted).float().square() if counted else torch.zeros((), device=device)
