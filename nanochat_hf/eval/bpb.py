"""Bits per byte of text: the loss of a language model, independent of its tokenizer.

The summed loss in nats of all target tokens, over ln 2 times the bytes of their text. Special tokens have no bytes and
count on neither side (karpathy/nanochat's definition).

    evaluate_bpb(losses_of(model), batches, torch.tensor(token_byte_lengths(tokenizer)))
    held_out_bpb(model, tokenizer, "primer", 65536)["value"]
"""

import math
from collections.abc import Callable, Iterable

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ..data.dataloader import VALIDATION, PackedLoader
from ..data.documents import open_documents
from ..data.tokenizer import token_byte_lengths
from ..distributed import partial_state
from .loglikelihood import max_batch_tokens

IGNORED = -100  # targets that carry no loss
PROBE = "Owls weigh 3.5 kg — 올빼미 🦉\n"
LONGEST = 4096  # tokens per row of held-out text, for models whose context is longer than is reasonable here


def bits_per_byte(nats: float, num_bytes: float) -> float:
    """nats / (ln 2 x bytes); infinity for no bytes."""
    return nats / (math.log(2) * num_bytes) if num_bytes else math.inf


@torch.no_grad()
def evaluate_bpb(token_losses: Callable, batches: Iterable[tuple[Tensor, Tensor]], byte_lengths: Tensor) -> float:
    """Bits per byte over all batches of all ranks; every rank gets the same figure.

    `token_losses`: (inputs (B, T), targets (B, T)) -> losses (B, T) in nats; targets of -100 are ignored.
    `byte_lengths`: (V,) bytes that each token id stands for, 0 for special tokens.
    """
    sums = []  # one (2,) per batch, left on the device so that no batch waits for the one before
    for inputs, targets in batches:
        losses = token_losses(inputs, targets).float()
        lengths = torch.where(targets == IGNORED, 0, byte_lengths.to(targets.device)[targets.clamp_min(0)])
        sums.append(torch.stack(((losses * (lengths > 0)).sum(), lengths.sum().float())))
    total = torch.stack(sums).cpu().double().sum(0) if sums else torch.zeros(2, dtype=torch.float64)
    if dist.is_available() and dist.is_initialized():
        total = total.to(sums[0].device if sums else byte_lengths.device)
        dist.all_reduce(total)
    return bits_per_byte(*total.tolist())


def losses_of(model) -> Callable[[Tensor, Tensor], Tensor]:
    """`token_losses` of any causal language model of transformers: next-token losses from its logits."""

    def token_losses(inputs: Tensor, targets: Tensor) -> Tensor:
        logits = model(inputs, use_cache=False).logits.float()
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none")
        return losses.view_as(targets)

    return token_losses


def held_out_bpb(model, tokenizer, dataset, num_tokens: int, batch_tokens: int | None = None) -> dict | None:
    """Bits per byte of a dataset's validation split, in packed rows of the model's context: a result of metrics.json.

    The rows depend on `num_tokens` alone, not on `batch_tokens` (positions per batch; None for what fits) or on the
    number of ranks (1, 2, 4 or 8). None for a tokenizer that is not byte-level: the bytes of a token are unknown.
    """
    lengths = token_byte_lengths(tokenizer)
    if sum(lengths[i] for i in tokenizer(PROBE, add_special_tokens=False)["input_ids"]) != len(PROBE.encode()):
        return None
    state, length = partial_state(), min(model.config.max_position_embeddings, LONGEST)
    rank, world_size = state.process_index, state.num_processes
    num_rows = max(num_tokens // length, world_size)
    rows_here = len(range(rank, num_rows, world_size))
    # Every position has logits here, which take most of the memory.
    batch_size = min(max(1, (batch_tokens or max_batch_tokens(model)) // 4 // length), rows_here)
    stream = open_documents(dataset, "validation", rank, world_size, seed=0)
    loader = PackedLoader(stream, tokenizer, 1, length, **VALIDATION)

    def batches():
        for begin in range(0, rows_here, batch_size):
            rows = [next(loader) for _ in range(min(batch_size, rows_here - begin))]
            batch = torch.from_numpy(np.concatenate(rows)).long().to(model.device)
            yield batch[:, :-1], batch[:, 1:]

    value = evaluate_bpb(losses_of(model), batches(), torch.tensor(lengths))
    loader.close()
    return {"value": value, "stderr": None, "n": num_rows * length, "baseline": None, "higher_is_better": False}
