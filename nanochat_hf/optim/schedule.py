"""Schedules of the learning rate, of the weight decay and of Muon's momentum, as pure functions of the step.

    schedule.apply(optimizer, plan.groups, step)     # before every optimizer step; schedule = plan(...).schedule

The shape is karpathy/nanochat's: linear warmup, constant, linear decay (warmdown) over the last part of the run.
torch's LR schedulers have state; here a resumed run needs only its step.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Schedule:
    """Schedule of a run of `num_iterations` steps.

    Args:
        warmup_steps: the learning rate rises linearly and reaches its peak at the last of these steps.
        warmdown_ratio: fraction of the steps, at the end, over which the learning rate decays linearly.
        final_lr_frac: fraction of the peak that the decay ends at (reached one step after the last).
        momentum: Muon's momentum at step 0, after `momentum_steps`, and at the end of the decay (linear between).
        momentum_steps: length of its warmup; where warmup and decay overlap, the warmup wins, as upstream.
    """

    num_iterations: int
    warmup_steps: int = 0
    warmdown_ratio: float = 0.0
    final_lr_frac: float = 0.0
    momentum: tuple[float, float, float] = (0.85, 0.97, 0.90)
    momentum_steps: int = 400

    def apply(self, optimizer: torch.optim.Optimizer, groups: Mapping[str, Mapping], step: int) -> None:
        """Set the options that `optimizer` uses in `step`; `groups`: {role: options at the peak}, `Plan.groups`."""
        for group in optimizer.param_groups:
            peak = groups[group["role"]]
            group["lr"] = peak["lr"] * self.lr(step)
            if group["kind"] == "muon":
                group["weight_decay"] = peak["weight_decay"] * self.weight_decay(step)
                group["momentum"] = self.muon_momentum(step)

    @property
    def warmdown_steps(self) -> int:
        return round(self.warmdown_ratio * self.num_iterations)

    def lr(self, step: int) -> float:
        """Fraction of the peak learning rate."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        left = self.num_iterations - step
        if left >= self.warmdown_steps:
            return 1.0
        fraction = max(left, 0) / self.warmdown_steps
        return fraction + (1 - fraction) * self.final_lr_frac

    def weight_decay(self, step: int) -> float:
        """Fraction of the planned weight decay: a cosine from 1 to 0 over the whole run."""
        return 0.5 * (1 + math.cos(math.pi * min(step / self.num_iterations, 1.0)))

    def muon_momentum(self, step: int) -> float:
        start, peak, end = self.momentum
        if step < self.momentum_steps:
            return start + (peak - start) * step / self.momentum_steps
        decay_steps = step - (self.num_iterations - self.warmdown_steps)
        if decay_steps <= 0:
            return peak
        return peak + (end - peak) * min(decay_steps / self.warmdown_steps, 1.0)
