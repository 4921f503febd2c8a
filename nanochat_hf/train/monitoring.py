"""What a pretraining run tells while it runs: bits per byte and samples of held-out text, and an alarm at loss spikes.

    evaluator = Evaluator(network, model, tokenizer, new_loader, num_batches)
    evaluator.bpb(), evaluator.samples(step)
    if SpikeAlarm(2.0).rings(loss): ...

The loop decides when; nothing here changes weights, gradients or random state.
"""

from collections import deque
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ..data.dataloader import PackedLoader
from ..data.tokenizer import token_byte_lengths, token_dtype
from ..eval.bpb import evaluate_bpb
from .runtime import to_device

SAMPLES, PROMPT_TOKENS, NEW_TOKENS = 4, 8, 32
WINDOW, FIRST = 64, 32  # steps that a spike is measured against: at most, at least
DEVIATIONS = 10


class LossSpikeDetector:
    """Knows a loss that is far above those of the steps before it.

    Far: above the median of the last 64 steps by more than `nats` (0: no alarm) and by more than ten standard
    deviations of the noise, for which 1.4826 x the median of the differences between neighbours / 2^0.5 stands: the
    fall of the loss at the beginning is not noise. A healthy run stays below both, also with tiny batches; one that
    diverges passes them within a step or some, on its way back to the loss of a fresh model.
    """

    def __init__(self, nats: float):
        self.nats, self.recent = nats, deque(maxlen=WINDOW)

    def limit(self) -> float:
        """The loss above which the next one is a spike; infinity while there are too few to tell.

        A number that float32 holds, so that a device which compares with it agrees.
        """
        if self.nats <= 0 or len(self.recent) < FIRST:
            return float("inf")
        noise = 1.4826 * float(np.median(np.abs(np.diff(self.recent)))) / 2**0.5
        return float(np.float32(np.median(self.recent) + max(self.nats, DEVIATIONS * noise)))

    def rings(self, loss: float, limit: float | None = None) -> bool:
        """Whether `loss` is a spike; if not, it counts among those before the next one.

        Args:
            limit: the one to judge by, where the step began before all losses before it were known; None: today's.
        """
        if loss > (self.limit() if limit is None else limit):
            return True
        self.recent.append(loss)
        return False


class Evaluator:
    """Figures of one model on the same held-out rows every time, whatever the number of processes.

    Args:
        network: (ids, targets, reduction) -> losses; without DDP around it.
        new_loader: makes the loader of the validation split. It is read once, and its rows are kept in memory.
        num_batches: how many of its batches bits per byte are measured on.
        alike: run the network as in training (gradients on, though none is computed), so that a compiled program
            serves both. Off where training computes in another precision.
    """

    def __init__(
        self,
        network: nn.Module,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        new_loader: Callable[[], PackedLoader],
        num_batches: int,
        alike: bool = True,
    ):
        self.network, self.model, self.tokenizer, self.new_loader = network, model, tokenizer, new_loader
        self.num_batches, self.alike = max(1, num_batches), alike
        self.byte_lengths = torch.tensor(token_byte_lengths(tokenizer), device=model.device)
        self.rows: list[np.ndarray] = []

    def batches(self, number: int) -> list[np.ndarray]:
        if len(self.rows) < number:
            loader, kept = self.new_loader(), token_dtype(self.tokenizer)
            self.rows = [next(loader).astype(kept) for _ in range(number)]
            loader.close()
        return self.rows[:number]

    def losses(self, ids: Tensor, targets: Tensor) -> Tensor:
        with torch.set_grad_enabled(self.alike):
            return self.network(ids, targets, reduction="none").detach()

    def bpb(self) -> float:
        rows = self.batches(self.num_batches)
        return evaluate_bpb(self.losses, (to_device(batch, self.model.device) for batch in rows), self.byte_lengths)

    @torch.no_grad()
    def samples(self, step: int) -> list[dict]:
        """Greedy continuations of the beginnings of held-out rows: {step, prompt, text} each."""
        prompts = to_device(self.batches(1)[0][:SAMPLES, : PROMPT_TOKENS + 1], self.model.device)[0]
        texts = self.model.generate(
            prompts, attention_mask=torch.ones_like(prompts), do_sample=False,
            min_new_tokens=NEW_TOKENS, max_new_tokens=NEW_TOKENS,  # every process takes part equally often (FSDP2)
        )  # fmt: skip
        decode = self.tokenizer.decode
        return [{"step": step, "prompt": decode(p[1:]), "text": decode(t[len(p) :])} for p, t in zip(prompts, texts)]


def status(loss: float, speed: float, mfu: float | None) -> str:
    return f"loss {loss:.3f}, {speed:,.0f} tok/s" + (f", MFU {mfu:.1%}" if mfu else "")


def line(total: int, point: dict) -> str:
    """The figures of a step in one line."""
    shown = f"step {point['step']}/{total}: {status(point['train_loss'], point['tokens_per_second'], point['mfu'])}"
    return f"{shown}, lr {point['lr']:.3g}, momentum {point['momentum']:.3f}, grad norm {point['grad_norm']:.3g}"
