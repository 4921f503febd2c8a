"""Which process updates a parameter under DDP, and gradients that are added up there and nowhere else.

DDP adds up every gradient on every process, but in `MuonAdamW` each large parameter has one owner. A reduction to the
owners moves half the bytes of one to everybody, as ZeRO-2 does (arXiv:1910.02054). DDP still decides when: it hands
over each bucket of gradients as soon as the last micro-batch of a step has filled it. Afterwards the gradients that
this process does not own are partial sums, of no use to anyone.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..distributed import place, together

LARGE = 1 << 16  # elements from which an AdamW tensor has one owner instead of a copy of its state everywhere


def adamw_owner(p: Tensor, turn: int, world: int) -> int | None:
    """The rank that updates p, the turn-th parameter by size; None: all of them do."""
    return turn % world if p.numel() >= LARGE else None


def shares(params: list, world: int) -> list[list]:
    """The matrices that each rank updates, of equally many until there are no more.

    They alternate, as they come in the model, so that gradients which are ready at one time go to all ranks.
    """
    size, dealt = -(-len(params) // world), [p for first in range(world) for p in params[first::world]]
    return [dealt[rank * size : (rank + 1) * size] for rank in range(world)]


class OwnerReduction:
    """Gradients of `network` summed, not averaged, over processes: at their owner, or everywhere if they have none.

    owners: of its parameters, as `MuonAdamW.owners` has them.
    """

    def __init__(self, network: DistributedDataParallel, owners: dict[nn.Parameter, int | None]):
        self.owners, self.pending = owners, []
        network.register_comm_hook(None, self._begin)

    def _begin(self, state, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        buffer, owned = bucket.buffer(), []
        for parameter, grad in zip(bucket.parameters(), bucket.gradients()):
            if (owner := self.owners[parameter]) is not None:
                owned.append(lambda grad=grad, owner=owner: dist.reduce(grad, owner, async_op=True))
        self.pending.append(together(owned, buffer.device))
        done = torch.futures.Future(devices=[buffer.device] if buffer.is_cuda else [])
        done.set_result(buffer)  # DDP shall not wait: `finish` does
        return done

    def finish(self) -> None:
        """Wait for what is on its way, and add up the small gradients that everybody needs."""
        for wait in self.pending:
            wait()
        self.pending.clear()
        if small := [p.grad for p, owner in self.owners.items() if owner is None and p.grad is not None]:
            flat = torch.cat([grad.flatten().float() for grad in small])
            dist.all_reduce(flat)
            parts = flat.split([grad.numel() for grad in small])
            torch._foreach_copy_(small, [part.view_as(grad) for part, grad in zip(parts, small)])

    def squared_norm(self) -> Tensor:
        """() float32, this process's part of the squared norm of all gradients: of those that it alone counts."""
        rank, _ = place()
        mine = [p.grad for p, owner in self.owners.items() if (owner or 0) == rank and p.grad is not None]
        device = next(iter(self.owners)).device
        return torch.nn.utils.get_total_norm(mine).float().square() if mine else torch.zeros((), device=device)
