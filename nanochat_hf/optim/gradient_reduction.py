"""Which process updates a parameter when each holds the model, and gradients that are added up there and nowhere else.

torch's DDP adds up every gradient on every process, but in `MuonAdamW` each large parameter has one owner. A reduction
to the owners moves half the bytes, as ZeRO-2 does (arXiv:1910.02054). It begins while the last backward pass of a step
goes on, and takes gradients where they are: DDP would copy them into buckets first, whose addresses fit neither our
kernels nor cuBLAS's fastest. Afterwards what this process does not own is a partial sum, of no use to anyone.
"""

from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from ..distributed import coalesce_collectives, get_dist_info

BUCKET_BYTES = 512 << 20  # of gradients that are sent at once: several layers, whose owners use all links
LARGE = 1 << 16  # elements from which an AdamW tensor has one owner instead of a copy of its state everywhere


def adamw_owner_rank(p: Tensor, turn: int, world: int) -> int | None:
    """The rank that updates p, the turn-th parameter by size; None: all of them do."""
    return turn % world if p.numel() >= LARGE else None


def assign_matrices_to_ranks(params: list, world: int) -> list[list]:
    """The matrices that each rank updates, of equally many until there are no more.

    They alternate, as they come in the model, so that gradients which are ready at one time go to all ranks.
    """
    size, dealt = -(-len(params) // world), [p for first in range(world) for p in params[first::world]]
    return [dealt[rank * size : (rank + 1) * size] for rank in range(world)]


class OwnerGradientReducer:
    """Gradients summed, not averaged, over processes: at their owner, or everywhere if they have none.

        with reduction:
            loss.backward()

    owners: of all parameters, as `MuonAdamW.owners` has them; they are made those of the main process.
    """

    def __init__(self, owners: dict[nn.Parameter, int | None]):
        self.owners, self.on, self.filled, self.pending = owners, False, [], []
        for p in owners:
            dist.broadcast(
                p.detach(), 0
            )  # one by one: what begins inside `coalesce_collectives` finds NCCL connected already
        self.nodes = [get_gradient_edge(p).node for p in owners]  # kept, for the hooks go when they do
        for p, node in zip(owners, self.nodes):
            node.register_hook(partial(self._fill, p))  # runs for a gradient that was added in place as well

    def __enter__(self) -> None:
        self.on = True

    def __exit__(self, kind, *_) -> None:
        """Wait for what is on its way, and add up the small gradients that everybody needs."""
        self.on = False
        if kind is None:
            self._send()
            for wait in self.pending:
                wait()
            if small := [p.grad for p, owner in self.owners.items() if owner is None and p.grad is not None]:
                flat = torch.cat([grad.flatten().float() for grad in small])
                dist.all_reduce(flat)
                parts = flat.split([grad.numel() for grad in small])
                torch._foreach_copy_(small, [part.view_as(grad) for part, grad in zip(parts, small)])
        self.pending.clear()
        self.filled.clear()

    def _fill(self, p: nn.Parameter, *_) -> None:
        if self.on and self.owners[p] is not None and p.grad is not None:
            self.filled.append((p.grad, self.owners[p]))
            if sum(grad.nbytes for grad, _ in self.filled) >= BUCKET_BYTES:
                self._send()

    def _send(self) -> None:
        if self.filled:
            operations = [partial(dist.reduce, grad, owner, async_op=True) for grad, owner in self.filled]
            self.pending.append(coalesce_collectives(operations, self.filled[0][0].device))
            self.filled.clear()

    def squared_norm(self) -> Tensor:
        """() float32, this process's part of the squared norm of all gradients: of those that it alone counts."""
        rank, _ = get_dist_info()
        mine = [p.grad for p, owner in self.owners.items() if (owner or 0) == rank and p.grad is not None]
        device = next(iter(self.owners)).device
        return torch.nn.utils.get_total_norm(mine).float().square() if mine else torch.zeros((), device=device)
