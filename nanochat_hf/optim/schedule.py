"""Step -> multipliers of the learning rate and the weight decay, and the momentum of Muon. Pure functions of the step.

Why not torch's LR schedulers: nothing here has state, so a resumed run needs only its step, and plots and tests need
no optimizer. How: `factors = schedule.at(step)` before every optimizer step, `schedule` from `scaling.plan(...)`.
The shape is karpathy/nanochat's: linear warm-up, constant, linear decay over the last part of the run.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple


class StepHyperparams(NamedTuple):
    """What one step uses: multipliers of the planned rates and of the planned weight decay, and Muon's momentum."""

    lr: float
    weight_decay: float
    momentum: float


@dataclass(frozen=True)
class Schedule:
    """Shape of a run of `num_iterations` steps.

    Args:
        warmup_steps: the rate rises linearly and is full at the last of these steps.
        warmdown_ratio: share of the steps, at the end, in which the rate falls linearly.
        final_lr_frac: multiplier that the fall aims at (reached one step after the last).
        momentum: Muon's momentum at step 0, after `momentum_steps`, and at the end of the decay (linear between).
        momentum_steps: length of its rise; it wins over the fall where the two overlap, as upstream.
    """

    num_iterations: int
    warmup_steps: int = 0
    warmdown_ratio: float = 0.0
    final_lr_frac: float = 0.0
    momentum: tuple[float, float, float] = (0.85, 0.97, 0.90)
    momentum_steps: int = 400

    def at(self, step: int) -> StepHyperparams:
        return StepHyperparams(self.lr(step), self.weight_decay(step), self.muon_momentum(step))

    @property
    def warmdown_steps(self) -> int:
        return round(self.warmdown_ratio * self.num_iterations)

    def lr(self, step: int) -> float:
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        left = self.num_iterations - step
        if left >= self.warmdown_steps:
            return 1.0
        share = max(left, 0) / self.warmdown_steps
        return share + (1 - share) * self.final_lr_frac

    def weight_decay(self, step: int) -> float:
        """Cosine from 1 to 0 over the whole run."""
        return 0.5 * (1 + math.cos(math.pi * min(step / self.num_iterations, 1.0)))

    def muon_momentum(self, step: int) -> float:
        start, peak, end = self.momentum
        if step < self.momentum_steps:
            return start + (peak - start) * step / self.momentum_steps
        decayed = step - (self.num_iterations - self.warmdown_steps)
        if decayed <= 0:
            return peak
        return peak + (end - peak) * min(decayed / self.warmdown_steps, 1.0)
