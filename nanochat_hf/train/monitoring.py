"""Monitoring of a pretraining run: bits per byte and samples of held-out text, loss spikes, speed.

Nothing here changes weights, gradients or random state; pretrain.py decides when to measure.
"""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ..data.dataloader import PackedLoader
from ..data.tokenizer import token_byte_lengths, token_dtype
from ..eval.bpb import evaluate_bpb
from .runtime import to_device

NUM_SAMPLES, PROMPT_TOKENS, NEW_TOKENS = 4, 8, 32


class LossSpikeDetector:
    """Finds losses far above those of the last 64 steps; none while fewer than 32 are known.

    A spike is above their median by more than `nats` (0: no detection) and by more than ten standard deviations of
    the noise. One is estimated as 1.4826 x the median absolute difference between neighbors / sqrt(2): the fast
    decrease at the beginning is no noise.
    """

    WINDOW, FIRST, DEVIATIONS = 64, 32, 10

    def __init__(self, nats: float):
        self.nats, self.recent = nats, deque(maxlen=self.WINDOW)

    def limit(self) -> float:
        """The loss above which the next one is a spike, rounded to float32 so that a device agrees; or infinity."""
        if self.nats <= 0 or len(self.recent) < self.FIRST:
            return float("inf")
        noise = 1.4826 * float(np.median(np.abs(np.diff(self.recent)))) / 2**0.5
        return float(np.float32(np.median(self.recent) + max(self.nats, self.DEVIATIONS * noise)))

    def is_spike(self, loss: float, limit: float) -> bool:
        """Whether `loss` is above `limit`, which was computed when its step was enqueued; if not, remember it."""
        if loss <= limit:
            self.recent.append(loss)
        return loss > limit


class StepTimer:
    """Seconds in training steps, without evaluations and checkpoints; skip_first: without the one that compiles."""

    def __init__(self, skip_first: bool):
        self.seconds, self.steps, self.skip = 0.0, 0, skip_first

    def start(self) -> None:
        """Nothing is enqueued: whatever came before was no training step."""
        self.last, self.interval_steps, self.interval_seconds = time.perf_counter(), 0, 0.0

    def lap(self) -> float:
        """A step is done; returns the mean seconds per step since `start`, as the next one may already be running."""
        now = time.perf_counter()
        elapsed, self.last = now - self.last, now
        if self.skip:
            self.skip = False
            return elapsed
        self.seconds, self.steps = self.seconds + elapsed, self.steps + 1
        self.interval_seconds, self.interval_steps = self.interval_seconds + elapsed, self.interval_steps + 1
        return self.interval_seconds / self.interval_steps


@dataclass
class Evaluator:
    """Measures a model on the same held-out sequences every time.

    Args:
        network: (ids, targets, reduction) -> losses.
        new_loader: returns a loader of the validation split, whose first batches are kept in memory.
        num_batches: batches for bits per byte.
        as_in_training: keep gradients enabled, so that evaluation reuses the programs compiled for training; False
            where training computes in another precision.
    """

    network: nn.Module
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    new_loader: Callable[[], PackedLoader]
    num_batches: int
    as_in_training: bool = True
    batches: list[np.ndarray] = field(default_factory=list)

    def read_batches(self, number: int) -> list[np.ndarray]:
        if len(self.batches) < number:
            loader, dtype = self.new_loader(), token_dtype(self.tokenizer)
            self.batches = [next(loader).astype(dtype) for _ in range(number)]
            loader.close()
        return self.batches[:number]

    def losses(self, ids: Tensor, targets: Tensor) -> Tensor:
        with torch.set_grad_enabled(self.as_in_training):
            return self.network(ids, targets, reduction="none").detach()

    def bpb(self) -> float:
        byte_lengths = torch.tensor(token_byte_lengths(self.tokenizer), device=self.model.device)
        pairs = (to_device(batch, self.model.device) for batch in self.read_batches(max(1, self.num_batches)))
        return evaluate_bpb(self.losses, pairs, byte_lengths)

    @torch.no_grad()
    def samples(self, step: int) -> list[dict]:
        """Greedy continuations of the beginnings of held-out sequences: {"step", "prompt", "text"} each."""
        batch = self.read_batches(1)[0][:NUM_SAMPLES, : PROMPT_TOKENS + 1]
        prompts = to_device(batch, self.model.device)[0]
        texts = self.model.generate(
            prompts, attention_mask=torch.ones_like(prompts), do_sample=False,
            min_new_tokens=NEW_TOKENS, max_new_tokens=NEW_TOKENS,  # as many forward passes on every rank (FSDP2)
        )  # fmt: skip
        decode = self.tokenizer.decode
        return [{"step": step, "prompt": decode(p[1:]), "text": decode(t[len(p) :])} for p, t in zip(prompts, texts)]
