"""Muon and AdamW in one torch optimizer whose state is sharded over the ranks, and its parameter groups by role.

Matrices learn faster when their update is orthogonalized (Muon); embeddings, head and scalars take AdamW. Accelerate,
the Trainer and checkpoints expect one optimizer object:

    optimizer = MuonAdamW(param_groups(model, plan.groups))

`kernels/muon.py` has the mathematics and its sources; here it is decided which rank computes what, anew in each step
from the parameters as they are:

- Replicated parameters (pretraining without FSDP2; DDP): a matrix, or a large AdamW tensor, has one owner rank. Only
  the owner needs the reduced gradient, has the momentum and computes. Orthogonal factors are all-gathered and new
  embeddings broadcast while the next stack is computed; then every rank applies them. So the optimizer state differs
  by rank, as in ZeRO stage 1, and each rank saves its own.
- FSDP2: parameters are DTensors sharded by rows. One all-to-all brings each owner rank its whole matrices, another
  returns the rows of their orthogonal factors. AdamW works on the local rows.
- DeepSpeed ZeRO gives its optimizers flat partitions instead of matrices: an error. Pretraining then takes FSDP2
  (`runtime.fsdp2_for_zero`), the other stages DeepSpeed's own Muon (`deepspeed_optimizer`).
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.distributed.tensor import DTensor, Shard

from ..distributed import coalesce_collectives, get_dist_info
from ..errors import InputError
from ..kernels import muon
from ..kernels.backend import verify

BUCKET_BYTES = 512 << 20  # of gradients that are sent at once: several layers, whose owners use all links
LARGE = 1 << 16  # elements from which an AdamW tensor has an owner rank, instead of a copy of its state on every rank
ROLES = {  # part of a parameter's name -> its role; the first that matches counts
    "lora_": "lora",
    "embed_tokens": "embedding",
    "value_embeds": "value_embeds",
    "lm_head": "head",
    "resid_lambdas": "resid",
    "x0_lambdas": "x0",
    "smear_": "smear",
    "backout_": "smear",
    "layers.": "matrix",
}


def role_of(name: str) -> str:
    """A parameter's role by its name, with the prefixes of peft, DDP or torch.compile or without."""
    for part, role in ROLES.items():
        if part in name:
            return role
    raise InputError(f"no optimizer role for parameter {name!r}: add one to optim/muon_adamw.py")


def param_groups(model: nn.Module, options: Mapping[str, Mapping]) -> list[dict]:
    """One group per role over all trainable parameters, each parameter in exactly one.

    options: {role: {"kind": "muon" or "adamw", "lr", "weight_decay", and "momentum", "beta2" or "betas", "eps"}}, from
    `scaling.optimizer_groups`. Raises InputError for a parameter whose role is unknown.
    """
    groups: dict[str, list] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[role_of(name)].append(parameter)
    return [{"role": role, "params": params, **options[role]} for role, params in groups.items()]


def adamw_owner_rank(p: Tensor, index: int, world: int) -> int | None:
    """The rank that updates p, the index-th parameter by size; None: every rank does."""
    return index % world if p.numel() >= LARGE else None


def assign_matrices_to_ranks(params: list, world: int) -> list[list]:
    """The matrices that each rank updates: equally many, fewer on the last ranks where they do not divide.

    They alternate in the order of the model, so that gradients which are ready at the same time go to all ranks.
    """
    size, interleaved = -(-len(params) // world), [p for first in range(world) for p in params[first::world]]
    return [interleaved[rank * size : (rank + 1) * size] for rank in range(world)]


class MuonAdamW(torch.optim.Optimizer):
    """See the module's docstring. The options are those of each group, as `param_groups` returns them.

    State of Muon parameters: `momentum_buffer` (m, n), on the owner rank only, and `second_momentum` (m, 1) or (1, n).
    State of AdamW parameters: `step`, `exp_avg`, `exp_avg_sq`. All of it is float32.

    `step_factor`: None, or a () float32 tensor on the parameters' device. Where it is 0 the step is skipped on the
    device: weights and moments stay as they are, whatever the gradients hold (as OLMo-core's SkipStepOptimizer). The
    host need not wait for it, and calls `rollback_step_count` when it learns that a step was skipped.
    """

    def __init__(self, groups: list[dict]):
        super().__init__(groups, defaults={})
        self.step_factor: Tensor | None = None
        for group in self.param_groups:
            if group["kind"] == "muon":
                check_matrices(group["params"])
                for p in group["params"][:1]:
                    sizes = SimpleNamespace(hidden_size=min(p.shape))
                    verify(muon.MUON_KERNELS, sizes, p.device, muon.orthogonal_dtype(p.device))

    @torch.no_grad()
    def step(self, closure=None):
        """One update from the gradients, which must be reduced already; parameters without one are left alone."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        broadcasts = [self._adamw(group, p, i) for i, (group, p) in enumerate(self._adamw_parameters())]
        device = self.param_groups[0]["params"][0].device
        wait = coalesce_collectives([start for start in broadcasts if start], device)
        updates = [
            (self._update_sharded if isinstance(params[0], DTensor) else self._update_replicated)(group, params)
            for group, params in self._stacks()
        ]
        while updates:  # each up to its next transfer, so that one stack's transfers overlap the others' work
            updates = [update for update in updates if next(update, "done") != "done"]
        wait()
        return loss

    def owners(self) -> dict[nn.Parameter, int | None]:
        """The owner rank of each replicated parameter; None: every rank computes its update."""
        _, world = get_dist_info()
        parameters = enumerate(self._adamw_parameters(with_grad=False))
        owners = {p: adamw_owner_rank(p, i, world) for i, (_, p) in parameters}
        for _, params in self._stacks(with_grad=False):
            owners |= {p: rank for rank, part in enumerate(assign_matrices_to_ranks(params, world)) for p in part}
        return owners

    def rollback_step_count(self) -> None:
        """Take back the count of the last step, which was skipped."""
        for state in self.state.values():
            if "step" in state:
                state["step"] -= 1

    def load_state_dict(self, state_dict: dict) -> None:
        """As torch's, which would cast the state to the dtype of a bf16 parameter: here it stays float32."""
        super().load_state_dict(state_dict)
        params = [p for group in self.param_groups for p in group["params"]]
        indices = [i for group in state_dict["param_groups"] for i in group["params"]]
        for index, p in zip(indices, params):
            for key, value in state_dict["state"].get(index, {}).items():
                shape = getattr(value, "shape", ())
                if p.numel() and any(size not in (1, full) for size, full in zip(shape, p.shape)):  # ZeRO empties some
                    raise ValueError(f"optimizer state of shape {(*shape,)} for a parameter of {(*p.shape,)}")
                if isinstance(value, Tensor) and self.state[p][key].dtype != value.dtype:
                    self.state[p][key] = value.to(self.state[p][key].device, copy=True)

    def _factor(self, x: Tensor) -> Tensor:
        return torch.ones((), device=x.device) if self.step_factor is None else self.step_factor

    def _adamw_parameters(self, with_grad: bool = True) -> list[tuple[dict, nn.Parameter]]:
        """(group, parameter), the large ones first so that owner ranks alternate; those with a gradient, or all."""
        groups = [group for group in self.param_groups if group["kind"] == "adamw"]
        pairs = [(group, p) for group in groups for p in group["params"] if not with_grad or p.grad is not None]
        return sorted(pairs, key=lambda pair: -pair[1].numel())

    def _stacks(self, with_grad: bool = True) -> Iterator[tuple[dict, list]]:
        """(group, parameters of one shape), the costliest first: its transfer overlaps the others' work."""
        stacks = defaultdict(list)
        for index, group in enumerate(self.param_groups):
            if group["kind"] == "muon":
                check_matrices(group["params"])  # again: DeepSpeed puts its partitions in after construction
                for p in group["params"]:
                    if not with_grad or p.grad is not None:
                        stacks[index, p.shape].append(p)
        for (index, _), params in sorted(stacks.items(), key=lambda item: -item[1][0].numel() * len(item[1])):
            yield self.param_groups[index], params

    def _adamw(self, group: dict, p: nn.Parameter, index: int) -> Callable[[], dist.Work] | None:
        """Update p if this rank has to. Returns: what begins its broadcast from the owner rank, if it has one."""
        rank, world = (0, 1) if isinstance(p, DTensor) else get_dist_info()
        owner, weight = adamw_owner_rank(p, index, world), local(p).detach()
        if owner not in (rank, None):
            self.state.pop(p, None)  # loaded from a checkpoint of another number of ranks
        else:
            state = self.state[p]
            if not state:
                state["step"] = muon.scalar(0)
                state["exp_avg"] = torch.zeros_like(p, dtype=torch.float32)
                state["exp_avg_sq"] = torch.zeros_like(p, dtype=torch.float32)
            state["step"] += 1
            tensors = local(p.grad), local(state["exp_avg"]), local(state["exp_avg_sq"]), state["step"]
            options = (group["lr"], *group["betas"], group["eps"], group["weight_decay"])
            muon.maybe_compiled(muon.adamw, weight)(weight, *tensors, self._factor(weight), *map(muon.scalar, options))
        if world == 1 or owner is None:
            return None
        return partial(dist.broadcast, weight, owner, async_op=True)

    def _update_replicated(self, group: dict, params: list) -> Iterator[None]:
        """Orthogonalize the matrices that this rank owns, all-gather, apply all; yields after starting a transfer."""
        rank, world = get_dist_info()
        parts = assign_matrices_to_ranks(params, world)
        own, size, params = parts[rank], len(parts[0]), [p for part in parts for p in part]
        for p in [p for part in parts if part is not own for p in part]:
            self.state[p].pop("momentum_buffer", None)  # as above
        (m, n), device = params[0].shape, params[0].device
        make = torch.empty if len(own) == size else torch.zeros
        x = make(size, m, n, dtype=muon.orthogonal_dtype(device), device=device)
        self._directions(group, own, x)
        x = muon.orthogonalize(x)
        if world > 1:
            gathered = x.new_empty(world * size, m, n)
            transfer = dist.all_gather_single(gathered, x, async_op=True)
            yield
            transfer.wait()
            x = gathered[: len(params)]
        self._apply(group, params, x, muon.maybe_compiled(muon.mean_squares, x)(x))

    def _update_sharded(self, group: dict, params: list) -> Iterator[None]:
        """FSDP2: send rows to the owner ranks of their matrices and back (all-to-all of equal, padded blocks)."""
        process_group, rank, world = shard_group(params[0])
        size = -(-len(params) // world)  # matrices per rank
        (m, n), device = params[0].shape, params[0].device
        block = -(-m // world)  # rows of a shard as torch.chunk cuts them; the last ones may have fewer, or none
        rows = slice(min(rank * block, m), min((rank + 1) * block, m))
        x = torch.zeros(world, size, block, n, dtype=muon.orthogonal_dtype(device), device=device)
        shards = x.view(world * size, block, n)[: len(params), : rows.stop - rows.start]
        self._directions(group, params, shards)
        received = torch.empty_like(x)
        transfer = dist.all_to_all_single(received, x, group=process_group, async_op=True)
        yield
        transfer.wait()
        whole = received.transpose(0, 1).reshape(size, world * block, n)[:, :m]
        whole = muon.orthogonalize(whole.contiguous())
        squares = muon.mean_squares(whole)
        back = torch.zeros(size, world * block, n, dtype=x.dtype, device=device)
        back[:, :m] = whole
        back = back.view(size, world, block, n).transpose(0, 1).contiguous()
        all_squares = squares.new_empty(world * size, *squares.shape[1:])
        transfers = (
            dist.all_to_all_single(x, back, group=process_group, async_op=True),
            dist.all_gather_single(all_squares, squares, group=process_group, async_op=True),
        )
        yield
        for transfer in transfers:
            transfer.wait()
        self._apply(group, params, shards, all_squares[: len(params)], rows)

    def _directions(self, group: dict, params: list, out: Tensor) -> None:
        """Nesterov momentum of each (local) gradient into out (at least as many, m, n); params may be empty."""
        for p in params:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p, dtype=torch.float32)
        if params:
            grads = [local(p.grad) for p in params]
            buffers = [local(self.state[p]["momentum_buffer"]) for p in params]
            muon.nesterov(grads, buffers, group["momentum"], out, self._factor(out))

    def _apply(self, group: dict, params: list, x: Tensor, squares: Tensor, rows: slice = slice(None)) -> None:
        """Scale orthogonal factors x (K, m or the local rows, n) with `mean_squares` and step the parameters."""
        m, n = params[0].shape
        for p in params:
            if "second_momentum" not in self.state[p]:
                self.state[p]["second_momentum"] = torch.zeros_like(squares[0])
        second = torch.stack([self.state[p]["second_momentum"] for p in params])  # (K, m, 1) or (K, 1, n)
        scale = muon.maybe_compiled(muon.update_scale, x)(
            squares, second, muon.scalar(group["beta2"]), self._factor(x), (m, n)
        )
        torch._foreach_copy_([self.state[p]["second_momentum"] for p in params], list(second.unbind()))
        if m >= n:
            scale = scale[:, rows]
        weights = [local(p).detach() for p in params]
        if weights[0].numel() == 0:  # fewer rows than ranks
            return
        lr = group["lr"] * max(1.0, m / n) ** 0.5
        muon.apply_updates(weights, x, scale.contiguous(), lr, group["weight_decay"], self._factor(x))


class OwnerGradientReducer:
    """Gradients summed, not averaged, over the ranks: at their owner, or everywhere if they have none.

        reducer = OwnerGradientReducer(optimizer.owners())  # once; all ranks get the parameters of the main process
        with reducer:  # around the last backward pass of a step
            loss.backward()

    DDP all-reduces every gradient to every rank. Reducing to the owner moves half the bytes, as in ZeRO stage 2
    (arXiv:1910.02054). The reduction overlaps the backward pass and takes gradients where they are: DDP copies them
    into buckets, whose addresses fit neither our kernels nor cuBLAS's fastest. Afterwards the gradients that a rank
    does not own are partial sums.
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


def local(x: Tensor) -> Tensor:
    """This rank's rows of a DTensor; any other tensor as it is."""
    return x.to_local() if isinstance(x, DTensor) else x


def deepspeed_optimizer(groups: list[dict], config: dict) -> torch.optim.Optimizer:
    """DeepSpeed's own Muon and AdamW, which sees the matrices before ZeRO partitions them into flat shards.

    The learning rates are the same, since its updates are as large as ours. It lacks normalized rows, Polar Express,
    NorMuon and cautious decay. `config` is DeepSpeed's, and is changed.
    """
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam  # DeepSpeed takes seconds to import

    for group in groups:
        group["use_muon"] = group["kind"] == "muon"
        for p in group["params"]:
            p.use_muon = group["use_muon"]
    config["zero_optimization"]["reduce_scatter"] = False  # Muon needs whole gradients; stage 3 insists on it
    return MuonWithAuxAdam(groups)


def check_matrices(params: list) -> None:
    for p in params:
        if p.ndim != 2:
            raise InputError(
                f"MuonAdamW needs whole matrices, but a parameter of shape {tuple(p.shape)} is flat: DeepSpeed ZeRO "
                "partitions parameters; train with configs/accelerate/multi_gpu.yaml or fsdp2.yaml, or choose "
                "DeepSpeed's own optimizer in its config"
            )


def shard_group(p: DTensor) -> tuple:
    """The process group over which p's rows are sharded, this process's rank in it, its size."""
    if Shard(0) not in p.placements:
        raise InputError("MuonAdamW takes DTensors that are sharded by rows; use configs/accelerate/fsdp2.yaml")
    axis = p.placements.index(Shard(0))
    return p.device_mesh.get_group(axis), p.device_mesh.get_local_rank(axis), p.device_mesh.size(axis)
