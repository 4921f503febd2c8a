"""Muon and AdamW in one torch optimizer, sharded over the processes of a job, and its parameter groups by role.

Why: matrices learn much faster when their update is orthogonalised (Muon), embeddings, head and scalars do not; one
optimizer object is what Accelerate, Trainer and checkpoints expect. How:

    optimizer = MuonAdamW(param_groups(model, plan.groups))

`muon` has what is computed, and the papers it is from; this file has who computes it, and when.

Several processes, found out at every step (nothing is kept outside `param_groups` and `state`):
- Each process has all parameters (pretraining; DDP): a matrix, or a large AdamW tensor, has one owner (`owners`). It
  alone needs the reduced gradient, holds the momentum and computes; orthogonal factors are gathered, new embeddings
  broadcast, while the next stack is computed; then everyone applies them. States differ by rank: each saves its own.
- FSDP2, parameters are DTensors sharded by rows: one all-to-all brings each owner its whole matrices, one takes the
  rows of their orthogonal factors back. AdamW works on the local rows.
- DeepSpeed ZeRO hands its optimizers flat partitions, in which no matrix is left: refused. A job launched with it
  pretrains by FSDP2 (`device.fsdp2_for_zero`), and its other stages use DeepSpeed's own Muon (`trainer`).
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from ..distributed import coalesce_collectives, get_dist_info
from ..errors import InputError
from ..kernels.backend import verify
from ..kernels.muon import (
    adamw,
    apply_updates,
    fused,
    mean_squares,
    nesterov,
    orthogonal_dtype,
    orthogonalize,
    scalar,
    update_scale,
)
from .gradient_reduction import adamw_owner_rank, assign_matrices_to_ranks

all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.13


def role_of(name: str) -> str:
    """A parameter's role by its name; of the model as it is, or inside peft, DDP or torch.compile."""
    if "lora_" in name:
        return "lora"
    for part, role in (
        ("embed_tokens", "embedding"),
        ("value_embeds", "value_embeds"),
        ("lm_head", "head"),
        ("resid_lambdas", "resid"),
        ("x0_lambdas", "x0"),
        ("smear_", "smear"),
        ("backout_", "smear"),
        ("layers.", "matrix"),
    ):
        if part in name:
            return role
    raise InputError(f"no optimizer role for parameter {name!r}: add one to optim/muon_adamw.py")


def param_groups(model: nn.Module, options: Mapping[str, Mapping]) -> list[dict]:
    """One group per role over all trainable parameters, each parameter in exactly one.

    Args:
        options: {role: {"kind": "muon" or "adamw", "lr", "weight_decay", and "momentum", "beta2" or "betas", "eps"}},
            as `scaling.optimizer_groups` makes them.

    Raises:
        InputError: a parameter whose role is unknown or has no options.
    """
    groups: dict[str, list] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            role = role_of(name)
            if role not in options:
                raise InputError(f"no optimizer options for role {role!r}, which {name!r} has")
            groups[role].append(parameter)
    return [{"role": role, "params": params, **options[role]} for role, params in groups.items()]


class MuonAdamW(torch.optim.Optimizer):
    """See the module's docstring. Every option stands in its group, as `param_groups` makes them.

    State of a Muon parameter: `momentum_buffer` (m, n), on its owner only, and `second_momentum` (m, 1) or (1, n); of
    an AdamW parameter: `step`, `exp_avg`, `exp_avg_sq`. All of it is float32 whatever the parameter's dtype.

    `gate`, if given, is a () float32 tensor on the parameters' device that each step reads there: 1 steps, 0 leaves
    weights and moments as they are, whatever the gradients hold. So a loop can refuse a step without waiting for the
    device to tell it.
    """

    def __init__(self, groups: list[dict]):
        super().__init__(groups, defaults={})
        self.gate: Tensor | None = None
        for group in self.param_groups:
            if group["kind"] == "muon":
                check_matrices(group["params"])
                for p in group["params"][:1]:
                    sizes = SimpleNamespace(hidden_size=min(p.shape))
                    verify(("Muon passes", "Muon products"), sizes, p.device, orthogonal_dtype(p.device))

    @torch.no_grad()
    def step(self, closure=None):
        """One update from the gradients, which must be reduced already; parameters without one are left alone."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        computed = [self._adamw(group, p, turn) for turn, (group, p) in enumerate(self._adamw_parameters())]
        sent = [send for send in computed if send]
        # functions that wait for a transfer and finish its work
        pending = [coalesce_collectives(sent, self.param_groups[0]["params"][0].device)] if sent else []
        begun = []
        for group, params in self._stacks():
            if isinstance(params[0], DTensor):
                begun.append(self._muon_sharded(group, params))
            else:
                pending.append(self._muon(group, params))
        pending += [compute() for compute in begun]  # all rows are on their way before the first ones are needed
        for finish in pending:
            finish()
        return loss

    def owners(self) -> dict[nn.Parameter, int | None]:
        """Each parameter -> the rank that computes its update, or None if all do, when each has all of them."""
        _, world = get_dist_info()
        found = {
            p: adamw_owner_rank(p, turn, world) for turn, (_, p) in enumerate(self._adamw_parameters(everyone=True))
        }
        for _, params in self._stacks(everyone=True):
            found |= {p: rank for rank, part in enumerate(assign_matrices_to_ranks(params, world)) for p in part}
        return found

    def refused(self) -> None:
        """Take back the count of the last step, which `gate` turned out to refuse."""
        for state in self.state.values():
            if "step" in state:
                state["step"] -= 1

    def load_state_dict(self, state_dict: dict) -> None:
        """As torch's, but the state keeps its float32: torch would cast it to the dtype of a bf16 parameter."""
        super().load_state_dict(state_dict)
        params = [p for group in self.param_groups for p in group["params"]]
        indices = [i for group in state_dict["param_groups"] for i in group["params"]]
        for index, p in zip(indices, params):
            for key, value in state_dict["state"].get(index, {}).items():
                if isinstance(value, Tensor) and self.state[p][key].dtype != value.dtype:
                    self.state[p][key] = value.to(self.state[p][key].device, copy=True)

    def _gate(self, x: Tensor) -> Tensor:
        return torch.ones((), device=x.device) if self.gate is None else self.gate

    def _adamw_parameters(self, everyone: bool = False) -> Iterator[tuple[dict, nn.Parameter]]:
        """(group, parameter), the large ones first so that owners alternate; of those with a gradient, or of all."""
        groups = [group for group in self.param_groups if group["kind"] == "adamw"]
        found = [(group, p) for group in groups for p in group["params"] if everyone or p.grad is not None]
        yield from sorted(found, key=lambda pair: -pair[1].numel())

    def _stacks(self, everyone: bool = False) -> Iterator[tuple[dict, list]]:
        """(group, parameters of one shape), the costliest first: its transfer hides behind the others' work.

        Of those with a gradient, or of all.
        """
        stacks = defaultdict(list)
        for index, group in enumerate(self.param_groups):
            if group["kind"] == "muon":
                check_matrices(group["params"])  # again: DeepSpeed puts its partitions in after construction
                for p in group["params"]:
                    if everyone or p.grad is not None:
                        stacks[index, p.shape].append(p)
        for (index, _), params in sorted(stacks.items(), key=lambda item: -item[1][0].numel() * len(item[1])):
            yield self.param_groups[index], params

    def _adamw(self, group: dict, p: nn.Parameter, turn: int) -> Callable[[], dist.Work] | None:
        """Update p if this rank is to -> what sends it from its owner to all, if it has one."""
        local = p.to_local() if isinstance(p, DTensor) else p.detach()
        rank, world = (0, 1) if isinstance(p, DTensor) else get_dist_info()
        owner = adamw_owner_rank(p, turn, world)
        if owner not in (rank, None):
            self.state.pop(p, None)  # a checkpoint of another number of processes brought it along
        else:
            state = self.state[p]
            if not state:
                state["step"] = scalar(0)
                state["exp_avg"] = torch.zeros_like(p, dtype=torch.float32)
                state["exp_avg_sq"] = torch.zeros_like(p, dtype=torch.float32)
            state["step"] += 1
            grad, first, second = (
                t.to_local() if isinstance(t, DTensor) else t for t in (p.grad, state["exp_avg"], state["exp_avg_sq"])
            )
            numbers = (group["lr"], *group["betas"], group["eps"], group["weight_decay"])
            fused(adamw, local)(local, grad, first, second, state["step"], self._gate(local), *map(scalar, numbers))
        if world == 1 or owner is None:
            return None
        return partial(dist.broadcast, local, owner, async_op=True)

    def _directions(self, group: dict, params: list, out: Tensor) -> None:
        """Nesterov momentum of each (local) gradient into out (at least as many, m, n); there may be no parameter."""
        for p in params:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p, dtype=torch.float32)
        if params:
            grads, momenta = [p.grad for p in params], [self.state[p]["momentum_buffer"] for p in params]
            if isinstance(params[0], DTensor):
                grads, momenta = [t.to_local() for t in grads], [t.to_local() for t in momenta]
            nesterov(grads, momenta, group["momentum"], out, self._gate(out))

    def _second(self, params: list, shape: torch.Size) -> Tensor:
        """The stack (K, m, 1) or (K, 1, n) of the parameters' second momenta, whole on every rank."""
        size = (shape[0], 1) if shape[0] >= shape[1] else (1, shape[1])
        for p in params:
            if "second_momentum" not in self.state[p]:
                self.state[p]["second_momentum"] = torch.zeros(size, dtype=torch.float32, device=p.device)
        return torch.stack([self.state[p]["second_momentum"] for p in params])

    def _finish(self, group: dict, params: list, x: Tensor, squares: Tensor, rows: slice = slice(None)) -> None:
        """Turn orthogonal factors x (K, m or the local rows, n) into the step that everyone takes."""
        shape = params[0].shape
        second = self._second(params, shape)
        scale = fused(update_scale, x)(squares, second, scalar(group["beta2"]), self._gate(x), tuple(shape))
        torch._foreach_copy_([self.state[p]["second_momentum"] for p in params], list(second.unbind()))
        if shape[0] >= shape[1]:
            scale = scale[:, rows]
        local = [p.to_local() if isinstance(p, DTensor) else p.detach() for p in params]
        if local[0].numel() == 0:  # fewer rows than ranks
            return
        rate = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
        apply_updates(local, x, scale.contiguous(), rate, group["weight_decay"], self._gate(x))

    def _muon(self, group: dict, params: list):
        """Whole matrices: orthogonalise those that this rank owns, gather all."""
        rank, world = get_dist_info()
        parts = assign_matrices_to_ranks(params, world)
        mine, share, params = parts[rank], len(parts[0]), [p for part in parts for p in part]
        for p in [p for part in parts if part is not mine for p in part]:
            self.state[p].pop("momentum_buffer", None)  # as above
        (m, n), device = params[0].shape, params[0].device
        make = torch.empty if len(mine) == share else torch.zeros
        x = make(share, m, n, dtype=orthogonal_dtype(device), device=device)
        self._directions(group, mine, x)
        x = orthogonalize(x)
        if world == 1:
            self._finish(group, params, x, fused(mean_squares, x)(x))
            return lambda: None
        whole = x.new_empty(world * share, m, n)
        transfer = all_gather(whole, x, async_op=True)

        def finish():
            transfer.wait()
            x = whole[: len(params)]
            self._finish(group, params, x, fused(mean_squares, x)(x))

        return finish

    def _muon_sharded(self, group: dict, params: list):
        """FSDP2: rows travel to the owners of their matrices and back (all-to-all of equal, padded blocks).

        Returns what to call next, when the other stacks' rows are on their way, too; which returns what to call last.
        """
        process_group, rank, world = shard_group(params[0])
        share = -(-len(params) // world)
        (m, n), device = params[0].shape, params[0].device
        block = -(-m // world)  # rows of a shard as torch.chunk cuts them; the last ones may have fewer, or none
        rows = slice(min(rank * block, m), min((rank + 1) * block, m))
        x = torch.zeros(world, share, block, n, dtype=orthogonal_dtype(device), device=device)
        mine = x.view(world * share, block, n)[: len(params), : rows.stop - rows.start]
        self._directions(group, params, mine)
        received = torch.empty_like(x)
        sent = dist.all_to_all_single(received, x, group=process_group, async_op=True)

        def compute():
            sent.wait()
            whole = received.transpose(0, 1).reshape(share, world * block, n)[:, :m]
            whole = orthogonalize(whole.contiguous())
            squares = mean_squares(whole)
            back = torch.zeros(share, world * block, n, dtype=x.dtype, device=device)
            back[:, :m] = whole
            back = back.view(share, world, block, n).transpose(0, 1).contiguous()
            every = squares.new_empty(world * share, *squares.shape[1:])
            transfers = (
                dist.all_to_all_single(x, back, group=process_group, async_op=True),
                all_gather(every, squares, group=process_group, async_op=True),
            )

            def finish():
                for transfer in transfers:
                    transfer.wait()
                self._finish(group, params, mine, every[: len(params)], rows)

            return finish

        return compute


def deepspeed_optimizer(groups: list[dict], config: dict) -> torch.optim.Optimizer:
    """DeepSpeed's own Muon and AdamW: ZeRO partitions matrices into flat shards, after its own Muon has seen them.

    The same learning rates serve, for its updates are as large as ours. It lacks what muon.py adds: normalized rows,
    Polar Express, NorMuon, cautious decay. `config` is DeepSpeed's, and is changed.
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


def shard_group(p: DTensor):
    """-> the process group over which p's rows are sharded, this process's place in it, its size."""
    for axis, placement in enumerate(p.placements):
        if isinstance(placement, Shard):
            if placement.dim != 0:
                raise InputError("MuonAdamW takes parameters sharded by rows; use configs/accelerate/fsdp2.yaml")
            return p.device_mesh.get_group(axis), p.device_mesh.get_local_rank(axis), p.device_mesh.size(axis)
    raise InputError("MuonAdamW found a DTensor that is not sharded; use configs/accelerate/fsdp2.yaml")
