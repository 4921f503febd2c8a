"""Fast scoring of continuations: the same decisions as one question at a time, many times faster.

`loglikelihoods` takes token ids from every question of a task at once. It sorts them by length into batches of equal
work, runs the part that all choices of a question share only once (through the KV cache), computes logits only where
something is scored, and fetches the results from the device at the end, so that the device never waits for Python.
Neither batch size nor order changes a decision (up to the rounding of float32 sums).

    [(total, greedy)] = score(model, [(context_ids, continuation_ids)])
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache

MIN_SHARED = 24  # tokens that choices must have in common before a separate pass over them pays
# Without cuDNN's attention, which builds a plan for every new shape: seconds where the batch takes milliseconds.
BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
LOGIT_COST = 8  # a position with logits costs the memory of about so many positions without


@dataclass
class _Row:
    """One input of the model: `context`, then `suffix`, whose first token is the context's last."""

    context: np.ndarray
    suffix: np.ndarray
    targets: list[tuple[int, np.ndarray]]  # (number of the request, its continuation)

    @property
    def length(self) -> int:
        return len(self.context) + len(self.suffix) - 1

    @property
    def scored(self) -> int:
        return max(len(tokens) for _, tokens in self.targets)


@torch.inference_mode()
def loglikelihoods(
    model,
    requests: Sequence[tuple[np.ndarray, np.ndarray]],
    batch_tokens: int | None = None,
) -> list[tuple[float, bool]]:
    """Sum of log-probabilities of each continuation, and whether each of its tokens was the argmax.

    Args:
        model: a causal LM of transformers in eval mode.
        requests: (context, continuation) token ids, both at least one token long.
        batch_tokens: positions computed together, which bounds the memory; None for what fits (`max_batch_tokens`).

    Returns:
        (sum in nats, all argmax) per request, in the order of `requests`. Sums are taken in float64.
    """
    batch_tokens = batch_tokens or max_batch_tokens(model)
    rows: dict[tuple[bytes, bytes], _Row] = {}
    groups: dict[bytes, list[_Row]] = {}
    for number, (context, continuation) in enumerate(requests):
        context, continuation = np.asarray(context, np.int32), np.asarray(continuation, np.int32)
        key = context.tobytes()
        suffix = np.concatenate([context[-1:], continuation[:-1]])
        if (key, suffix.tobytes()) not in rows:
            row = rows[key, suffix.tobytes()] = _Row(context, suffix, [])
            groups.setdefault(key, []).append(row)
        rows[key, suffix.tobytes()].targets.append((number, continuation))

    shares = not getattr(model, "_is_stateful", False)  # recurrent states cannot step over left padding
    shared = [group for group in groups.values() if shares and len(group) > 1 and len(group[0].context) > MIN_SHARED]
    taken = {id(row) for group in shared for row in group}
    single = [row for row in rows.values() if id(row) not in taken]

    found: list[tuple[list[tuple[int, int]], torch.Tensor, torch.Tensor]] = []
    with sdpa_kernel(BACKENDS):
        for batch in _batches([[row] for row in single], batch_tokens):
            found.append(_run_single(model, [row for [row] in batch]))
        for batch in _batches(shared, batch_tokens):
            found.append(_run_shared(model, batch))

    answers: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
    for sizes, log_probs, hits in found:
        log_probs, hits = log_probs.double().cpu().numpy(), hits.cpu().numpy()
        begin = 0
        for number, size in sizes:
            end = begin + size
            answers[number] = float(log_probs[begin:end].sum()), bool(hits[begin:end].all())
            begin = end
    return answers


def max_batch_tokens(model) -> int:
    """A batch size in positions: half of a GPU's free memory, between 16,384 and 131,072; 8,192 without a GPU.

    A position takes its keys and values, about sixteen vectors of the width, and its share of the logits, bytes of
    which are bounded by LOGIT_COST.
    """
    if model.device.type != "cuda":
        return 8192  # larger ones leave the processor's cache
    config, size = model.config.get_text_config(), model.dtype.itemsize
    heads = getattr(config, "num_attention_heads", None) or 1
    share = (getattr(config, "num_key_value_heads", None) or heads) / heads
    cache = int(2 * config.num_hidden_layers * config.hidden_size * share) * size
    bytes_each = cache + 16 * config.hidden_size * size + 10 * config.vocab_size // LOGIT_COST
    return min(max(torch.cuda.mem_get_info(model.device)[0] // 2 // bytes_each, 16_384), 131_072)


def _batches(groups: list[list[_Row]], budget: int):
    """Groups of rows in batches of similar length, longest first, each within the budget (or a single group)."""
    batch, num_rows, widest, scored = [], 0, 0, 0
    for group in sorted(groups, key=lambda group: -max(row.length for row in group)):
        num_rows += len(group)
        widest = max(widest, *(row.length for row in group))
        scored = max(scored, *(row.scored for row in group))
        if batch and num_rows * (widest + LOGIT_COST * min(num_rows * scored, widest)) > budget:
            yield batch
            batch, num_rows = [], len(group)
            widest, scored = max(row.length for row in group), max(row.scored for row in group)
        batch.append(group)
    if batch:
        yield batch


def _run_single(model, rows: list[_Row]):
    """Whole rows, padded on the right, where causal attention cannot see it: no mask, the fastest kernels."""
    ids = np.zeros((len(rows), _width(model, max(row.length for row in rows))), np.int64)
    for line, row in zip(ids, rows):
        line[: row.length] = np.concatenate([row.context, row.suffix[1:]])
    columns = [len(row.context) - 1 + np.arange(row.scored) for row in rows]
    kept = np.unique(np.concatenate(columns))
    logits = _forward(model, ids, kept, use_cache=False)
    return _read(logits, rows, [np.searchsorted(kept, column) for column in columns])


def _run_shared(model, groups: list[list[_Row]]):
    """One pass over each group's context, then one over all suffixes on a cache repeated for each of them."""
    rows = [row for group in groups for row in group]
    lengths = np.array([len(group[0].context) - 1 for group in groups])
    # On the left, so that the distance to the suffix, which windows measure, is the same with and without padding.
    ids = np.zeros((len(groups), _width(model, lengths.max())), np.int64)
    mask = np.zeros_like(ids)
    for line, filled, group, length in zip(ids, mask, groups, lengths):
        line[-length:], filled[-length:] = group[0].context[:-1], 1
    cache = DynamicCache(config=model.config)
    positions = np.maximum(mask.cumsum(-1) - 1, 0)
    last = np.array([ids.shape[1] - 1])
    _forward(model, ids, last, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)

    owner = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
    cache.reorder_cache(torch.from_numpy(owner).to(model.device))
    ids = np.zeros((len(rows), max(len(row.suffix) for row in rows)), np.int64)
    for line, row in zip(ids, rows):
        line[: len(row.suffix)] = row.suffix
    mask = np.concatenate([mask[owner], np.ones_like(ids)], axis=1)
    # Padding stays at its row's last position: learned positions may have no later one.
    places = [np.minimum(np.arange(ids.shape[1]), len(row.suffix) - 1) for row in rows]
    positions = lengths[owner][:, None] + np.stack(places)
    inputs = {"attention_mask": mask, "position_ids": positions, "past_key_values": cache, "use_cache": True}
    logits = _forward(model, ids, np.arange(ids.shape[1]), **inputs)
    return _read(logits, rows, [np.arange(row.scored) for row in rows])


def _width(model, length: int) -> int:
    """`length`, on a GPU rounded up where the positions allow it: few shapes, so that memory is reused."""
    rounded, limit = -(-length // 64) * 64, getattr(model.config, "max_position_embeddings", None) or length
    return int(rounded if model.device.type == "cuda" and (rounded <= limit or length > limit) else length)


def _forward(model, ids: np.ndarray, kept: np.ndarray, **arrays) -> torch.Tensor:
    """ids (B, T) -> logits (B, len(kept), vocabulary) of the columns `kept`."""

    def on_device(value):
        return torch.from_numpy(value).to(model.device, non_blocking=True) if isinstance(value, np.ndarray) else value

    inputs = {name: on_device(value) for name, value in arrays.items()}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        return model(on_device(ids), logits_to_keep=on_device(kept), **inputs).logits
    return model(on_device(ids), **inputs).logits[:, on_device(kept)]


def _read(logits: torch.Tensor, rows: list[_Row], columns: list[np.ndarray]):
    """Log-probability and argmax hit of every target token, flat, still on the device; and whose tokens they are.

    columns[i]: the columns of logits (B, K, V) that predict the continuation tokens of row i.
    """
    sizes, lines, places, tokens = [], [], [], []
    for line, (row, column) in enumerate(zip(rows, columns)):
        for number, continuation in row.targets:
            sizes.append((number, len(continuation)))
            lines.append(np.full(len(continuation), line))
            places.append(column[: len(continuation)])
            tokens.append(continuation)
    lines, places, tokens = (
        torch.from_numpy(np.concatenate(part).astype(np.int64)).to(logits.device, non_blocking=True)
        for part in (lines, places, tokens)
    )
    picked = logits[lines, places].float()  # (tokens, V)
    log_probs = torch.log_softmax(picked, dim=-1).gather(1, tokens[:, None])[:, 0]
    return sizes, log_probs, picked.argmax(dim=-1) == tokens
