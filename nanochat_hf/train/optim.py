"""Muon and AdamW in one torch optimizer, sharded over the processes of a job.

Why: matrices learn much faster when their update is orthogonalised (Muon), embeddings, head and scalars do not; one
optimizer object is what Accelerate, Trainer and checkpoints expect. How:

    optimizer = MuonAdamW(param_groups(model, plan.groups))

Muon's update of a matrix is Nesterov momentum -> row equilibration (MuonEq, arXiv:2603.28254) -> Polar Express, five
steps (arXiv:2505.16932) -> norm snapped to that of a semi-orthogonal matrix (Muon+, arXiv:2602.21545) -> NorMuon's
variance reduction (arXiv:2510.05491) -> cautious weight decay (arXiv:2510.12402), rate x max(1, rows/columns)^0.5. The
choice and its order are karpathy/nanochat's. All state is float32; the orthogonalisation runs on stacks of equal
shapes, in half precision where the device has bf16.

Several processes, found out at every step (nothing is kept outside `param_groups` and `state`):
- DDP, each process has all parameters and reduced gradients: a matrix, or a large AdamW tensor, has one owner, which
  alone holds its momentum and computes; orthogonal factors are gathered (and new embeddings broadcast) while the next
  stack is computed; then everyone applies them. So the states differ by rank: each rank saves its own.
- FSDP2, parameters are DTensors sharded by rows: one all-to-all brings each owner its whole matrices, one takes the
  rows of their orthogonal factors back. AdamW works on the local rows.
- DeepSpeed ZeRO hands its optimizers flat partitions, in which no matrix is left: refused.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from ..distributed import place
from ..errors import InputError
from .optim_kernels import apply_updates, gram, nesterov, product_plus, symmetric_plus

POLAR_EXPRESS = (  # arXiv:2505.16932 for five steps, safety factor 2e-2, cushion 2
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
OBLONG = 2  # longer over shorter side from which Polar Express works on x x^T: saves a quarter of the FLOPs, 42 % at 4
LARGE = 1 << 16  # elements from which an AdamW tensor has one owner instead of a copy of its state everywhere
FLAT = (
    "MuonAdamW needs whole matrices, but {} is flat: DeepSpeed ZeRO partitions parameters; train with "
    "configs/accelerate/multi_gpu.yaml or fsdp2.yaml, or choose DeepSpeed's own optimizer in its config"
)

all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.13


# ------------------------------------------------------------------------------------------------- groups by role


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
    raise InputError(f"no optimizer role for parameter {name!r}: add one to train/optim.py")


def param_groups(model: nn.Module, options: Mapping[str, Mapping]) -> list[dict]:
    """One group per role over all trainable parameters, each parameter in exactly one.

    Args:
        options: {role: {"kind": "muon" or "adamw", "lr", "weight_decay", and "momentum", "beta2" or "betas", "eps"}},
            as `scaling.optimizer_groups` makes them.

    Raises:
        InputError: a parameter whose role is unknown or has no options, or a Muon parameter that is not a matrix.
    """
    groups: dict[str, list] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            role = role_of(name)
            if role not in options:
                raise InputError(f"no optimizer options for role {role!r}, which {name!r} has")
            groups[role].append(parameter)
    return [{"role": role, "params": params, **options[role]} for role, params in groups.items()]


# ------------------------------------------------------------------------------------------------------- the maths


def orthogonalise(x: Tensor) -> Tensor:
    """(K, m, n) -> (K, m, n), each matrix near the closest semi-orthogonal one; a zero matrix stays zero.

    Rows are first scaled to their mean norm. The result's norm misses sqrt(min(m, n)) a little: see `update_scale`.

    Oblong matrices take the Gram form (Dao-AILab's Gram Newton-Schulz): the steps multiply x by a polynomial in x x^T,
    so that most products are of small matrices. Rounding makes some eigenvalues of x x^T negative, which further steps
    blow up: hence x and x x^T afresh after the second step, and bfloat16 comes back as float16, whose three more bits
    (nothing here is large) leave the result nearer the exact one than five steps on bfloat16's x do.
    """
    m, n = x.shape[-2:]
    tall, oblong = m > n, max(m, n) >= OBLONG * min(m, n)
    x = fused(equilibrate, x)(x, torch.float16 if oblong and x.dtype == torch.bfloat16 else x.dtype)
    if oblong:
        for steps in (POLAR_EXPRESS[:2], POLAR_EXPRESS[2:]):
            q = polynomial(gram(x.mT if tall else x), steps)
            x = x @ q if tall else q @ x
        return x
    for a, b, c in POLAR_EXPRESS:
        g = gram(x.mT if tall else x)
        z = symmetric_plus(g, g, b, c)
        x = product_plus(x, z, x, a) if tall else product_plus(z, x, x, a)
    return x


def polynomial(g: Tensor, steps: tuple[tuple, ...]) -> Tensor:
    """g = x x^T (K, m, m) -> the matrix that multiplies x as the steps would.

    A step multiplies x by z + a I. The products add a in float32: rounded into z's diagonal it would cost digits.
    Whatever is multiplied here is a polynomial in g, so it is symmetric and commutes.
    """
    for step, (a, b, c) in enumerate(steps):
        z = symmetric_plus(g, g, b, c)
        if step == 0:
            q = z.clone()
            q.diagonal(dim1=-2, dim2=-1).add_(a)
        else:
            q = symmetric_plus(z, q, a)
        if step < len(steps) - 1:
            g = symmetric_plus(z, symmetric_plus(z, g, a), a)
    return q


def equilibrate(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Scale rows to their mean norm and the whole to a spectral norm below 1, where Polar Express converges."""
    rows = x.float().square().sum(-1, keepdim=True)
    factor = rows.mean(-2, keepdim=True).sqrt() / rows.sqrt().clamp_min(1e-6)
    norm = (rows * factor.square()).sum(-2, keepdim=True).sqrt()
    return (x * (factor / (norm * 1.01 + 1e-6))).to(dtype)


def mean_squares(x: Tensor) -> Tensor:
    """(K, m, n) -> float32 means over the shorter side's index: (K, m, 1) if m >= n, else (K, 1, n)."""
    return x.float().square().mean(-1 if x.shape[-2] >= x.shape[-1] else -2, keepdim=True)


def update_scale(squares: Tensor, second: Tensor, beta2: Tensor, gate: Tensor, shape: tuple[int, int]) -> Tensor:
    """Muon+ and NorMuon: the factor on an orthogonal factor, from its `mean_squares`; `second` is updated in place.

    Rows (or columns) whose updates have been large for long are damped; the norm of the whole stays sqrt(min(m, n)).
    """
    m, n = shape
    target = min(m, n) ** 0.5
    norm = (squares.sum((-2, -1), keepdim=True) * min(m, n)).sqrt().clamp_min(1e-6)
    squares = squares * (target / norm).square()
    second.add_((1 - beta2) * gate * (squares - second))
    step = second.clamp_min(1e-10).rsqrt()
    damped = ((squares * step.square()).sum((-2, -1), keepdim=True) * min(m, n)).sqrt().clamp_min(1e-10)
    return step * (target / norm) * (target / damped)


def adamw(p, grad, first, second, step, gate, lr, beta1, beta2, eps, weight_decay) -> None:
    """Decoupled AdamW in float32 on a parameter of any dtype, in place (arXiv:1711.05101); gate 0 changes nothing."""
    lr = lr * gate
    grad, p32 = torch.where(gate > 0, grad.float(), first), p.float() * (1 - lr * weight_decay)
    first.lerp_(grad, 1 - beta1)
    second.add_((1 - beta2) * gate * (grad.square() - second))
    denominator = (second / (1 - beta2**step)).sqrt() + eps
    p.copy_(p32 - lr / (1 - beta1**step) * first / denominator)


_compiled: dict = {}


def fused(function, x: Tensor):
    """The function, compiled if x is large and on CUDA. Scalars come as 0-d CPU tensors: no new program per value."""
    if not x.is_cuda or x.numel() < LARGE:
        return function
    if function not in _compiled:
        _compiled[function] = torch.compile(function, dynamic=False)
    return _compiled[function]


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float32)


def orthogonal_dtype(device: torch.device) -> torch.dtype:
    low = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.bfloat16 if low else torch.float32


# --------------------------------------------------------------------------------------------------- the optimizer


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

    @torch.no_grad()
    def step(self, closure=None):
        """One update from the gradients, which must be reduced already; parameters without one are left alone."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        pending = []  # functions that wait for a transfer and finish its work
        for turn, (group, p) in enumerate(self._adamw_parameters()):
            pending.append(self._adamw(group, p, turn))
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

    def _adamw_parameters(self) -> Iterator[tuple[dict, nn.Parameter]]:
        """(group, parameter) of all with a gradient, the large ones first so that their owners alternate."""
        found = [(g, p) for g in self.param_groups if g["kind"] == "adamw" for p in g["params"] if p.grad is not None]
        yield from sorted(found, key=lambda pair: -pair[1].numel())

    def _stacks(self) -> Iterator[tuple[dict, list]]:
        """(group, parameters of one shape), the costliest first: its transfer hides behind the others' work."""
        stacks = defaultdict(list)
        for index, group in enumerate(self.param_groups):
            if group["kind"] == "muon":
                check_matrices(group["params"])  # again: DeepSpeed puts its partitions in after construction
                for p in group["params"]:
                    if p.grad is not None:
                        stacks[index, p.shape].append(p)
        for (index, _), params in sorted(stacks.items(), key=lambda item: -item[1][0].numel() * len(item[1])):
            yield self.param_groups[index], params

    def _adamw(self, group: dict, p: nn.Parameter, turn: int):
        local = p.to_local() if isinstance(p, DTensor) else p.detach()
        rank, world = (0, 1) if isinstance(p, DTensor) else place()
        owner = turn % world if p.numel() >= LARGE else rank
        if owner != rank:
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
        if world == 1 or p.numel() < LARGE:
            return lambda: None
        return dist.broadcast(local, owner, async_op=True).wait

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
        copy([self.state[p]["second_momentum"] for p in params], second.unbind())
        if shape[0] >= shape[1]:
            scale = scale[:, rows]
        local = [p.to_local() if isinstance(p, DTensor) else p.detach() for p in params]
        if local[0].numel() == 0:  # fewer rows than ranks
            return
        rate = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
        apply_updates(local, x, scale.contiguous(), rate, group["weight_decay"], self._gate(x))

    def _muon(self, group: dict, params: list):
        """One process, or DDP: orthogonalise the matrices that this rank owns, gather all."""
        rank, world = place()
        share = -(-len(params) // world)
        mine = params[rank * share : (rank + 1) * share]
        for p in params[: rank * share] + params[(rank + 1) * share :]:
            self.state[p].pop("momentum_buffer", None)  # as above
        (m, n), device = params[0].shape, params[0].device
        x = torch.zeros(share, m, n, dtype=orthogonal_dtype(device), device=device)
        self._directions(group, mine, x)
        x = orthogonalise(x)
        if world == 1:
            self._finish(group, params, x, fused(mean_squares, x)(x))
            return lambda: None
        whole = x.new_empty(world * share, m, n)
        transfer = all_gather(whole, x, async_op=True)

        def finish():
            transfer.wait()
            mine = whole[: len(params)]
            self._finish(group, params, mine, fused(mean_squares, mine)(mine))

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
        flat = x.view(world * share, block, n)
        self._directions(group, params, flat[: len(params), : rows.stop - rows.start])
        received = torch.empty_like(x)
        sent = dist.all_to_all_single(received, x, group=process_group, async_op=True)

        def compute():
            sent.wait()
            whole = received.transpose(0, 1).reshape(share, world * block, n)[:, :m]
            whole = orthogonalise(whole.contiguous())
            squares = mean_squares(whole)
            back = torch.zeros(share, world * block, n, dtype=x.dtype, device=device)
            back[:, :m] = whole
            back = back.view(share, world, block, n).transpose(0, 1).contiguous()
            every = squares.new_empty(world * share, *squares.shape[1:])
            transfers = (
                dist.all_to_all_single(x, back, group=process_group, async_op=True),
                all_gather(every, squares, group=process_group, async_op=True),
            )
            return partial(finish, transfers, every)

        def finish(transfers: tuple, every: Tensor):
            for transfer in transfers:
                transfer.wait()
            self._finish(group, params, flat[: len(params), : rows.stop - rows.start], every[: len(params)], rows)

        return compute


def check_matrices(params: list) -> None:
    for p in params:
        if p.ndim != 2:
            raise InputError(FLAT.format(f"a parameter of shape {tuple(p.shape)}"))


def copy(targets, sources) -> None:
    """Copy tensors pairwise, in one launch, converting dtypes; empty lists and empty tensors are fine."""
    if len(targets) and targets[0].numel():
        torch._foreach_copy_(list(targets), list(sources))


def shard_group(p: DTensor):
    """-> the process group over which p's rows are sharded, this process's place in it, its size."""
    for axis, placement in enumerate(p.placements):
        if isinstance(placement, Shard):
            if placement.dim != 0:
                raise InputError("MuonAdamW takes parameters sharded by rows; use configs/accelerate/fsdp2.yaml")
            return p.device_mesh.get_group(axis), p.device_mesh.get_local_rank(axis), p.device_mesh.size(axis)
    raise InputError("MuonAdamW found a DTensor that is not sharded; use configs/accelerate/fsdp2.yaml")
