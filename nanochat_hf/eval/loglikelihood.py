"""Fast loglikelihoods of continuations: the same predictions as one question at a time, many times faster.

Requests are sorted by length into batches of equal work. The prefix that all choices of a question share is computed
once and kept in the KV cache. Logits are computed only where a token is scored. Results are copied to the host at the
end, so the device never waits for Python. Batch size and order change predictions by rounding only.

    [(total, greedy)] = loglikelihoods(model, [(context_ids, continuation_ids)])
"""

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import inf

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache

MIN_SHARED = 24  # tokens of a shared prefix below which a pass of its own costs more than it saves
# Without cuDNN's attention, which builds a plan for every new shape: seconds where the batch takes milliseconds.
BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
LOGIT_COST = 8  # a position with logits costs the memory of about this many positions without


@dataclass
class _Row:
    """One input of the model. Requests with equal inputs, such as choices of one token, share a row."""

    tokens: np.ndarray  # the context, then the continuation without its last token
    context: int  # number of tokens in the context
    targets: list[tuple[int, np.ndarray]] = field(default_factory=list)  # (number of the request, continuation)

    @property
    def num_scored(self) -> int:
        return len(self.tokens) - self.context + 1


@torch.inference_mode()
def loglikelihoods(
    model, requests: Sequence[tuple[np.ndarray, np.ndarray]], batch_tokens: int | None = None
) -> list[tuple[float, bool]]:
    """(sum of log-probabilities in nats, whether each token was the argmax) of each request, summed in float64.

    `requests`: (context, continuation), token ids, at least one each; `batch_tokens`: positions per batch.
    """
    batch_tokens = batch_tokens or max_batch_tokens(model)
    groups: dict[bytes, dict[bytes, _Row]] = {}  # by context, then by all tokens of the input
    for number, (context, continuation) in enumerate(requests):
        context, continuation = np.asarray(context, np.int32), np.asarray(continuation, np.int32)
        tokens, group = np.concatenate([context, continuation[:-1]]), groups.setdefault(context.tobytes(), {})
        group.setdefault(tokens.tobytes(), _Row(tokens, len(context))).targets.append((number, continuation))

    single, shared = [], []
    can_share = not getattr(model, "_is_stateful", False)  # recurrent states cannot step over left padding
    for rows in (list(group.values()) for group in groups.values()):
        if can_share and len(rows) > 1 and rows[0].context > MIN_SHARED:
            shared.append(rows)
        else:
            single += [[row] for row in rows]
    with sdpa_kernel(BACKENDS):
        scores = [_score(model, batch, share_prefix=False) for batch in _batches(single, batch_tokens)]
        # As many as every row fits into, or a few contexts: a model may count no further.
        positions = max((len(row.tokens) for rows in shared for row in rows), default=0)
        positions = max(positions, 4 * (getattr(model.config, "max_position_embeddings", None) or inf))
        scores += [_score(model, batch, share_prefix=True) for batch in _batches(shared, batch_tokens, positions)]

    totals, greedy = np.zeros(len(requests)), np.ones(len(requests), bool)
    for numbers, log_probs, hits in scores:
        np.add.at(totals, numbers, log_probs.cpu().double().numpy())
        np.logical_and.at(greedy, numbers, hits.cpu().numpy())
    return list(zip(totals.tolist(), greedy.tolist()))


def max_batch_tokens(model) -> int:
    """A batch size in positions: half of a GPU's free memory, between 16,384 and 131,072; 8,192 without a GPU.

    A position takes its keys and values, about sixteen vectors of the model's width, and a share of the logits.
    """
    if model.device.type != "cuda":
        return 8192  # larger ones leave the processor's cache
    config, size = model.config.get_text_config(), model.dtype.itemsize
    heads = getattr(config, "num_attention_heads", None) or 1
    share = (getattr(config, "num_key_value_heads", None) or heads) / heads
    cache = int(2 * config.num_hidden_layers * config.hidden_size * share) * size
    position_bytes = cache + 16 * config.hidden_size * size + 10 * config.vocab_size // LOGIT_COST
    return min(max(torch.cuda.mem_get_info(model.device)[0] // 2 // position_bytes, 16_384), 131_072)


def _batches(groups: list[list[_Row]], budget: int, positions: float = inf) -> Iterator[list[list[_Row]]]:
    """Groups in batches of similar length, longest first, each within the budget (or a single group).

    positions: that the longest prefix and the longest suffix of a batch may have together.
    """

    def sizes(group):
        length, prefix = max(len(row.tokens) for row in group), group[0].context - 1
        return length, max(row.num_scored for row in group), prefix, length - prefix

    batch, count, largest = [], 0, (0, 0, 0, 0)
    for group in sorted(groups, key=lambda group: -sizes(group)[0]):
        count, largest = count + len(group), tuple(map(max, largest, sizes(group)))
        width, scored, prefix, suffix = largest
        cost = count * (width + LOGIT_COST * min(count * scored, width))
        if batch and (cost > budget or prefix + suffix > positions):
            yield batch
            batch, count, largest = [], len(group), sizes(group)
        batch.append(group)
    if batch:
        yield batch


def _score(model, groups: list[list[_Row]], share_prefix: bool):
    """Numbers of requests, log-probabilities and argmax hits of all target tokens of a batch, flat.

    Rows are padded on the right, where causal attention cannot see it: no mask, the fastest kernels. With
    `share_prefix` the context of a group without its last token is computed once, and the rows begin after it.
    """
    rows = [row for group in groups for row in group]
    begins = np.array([row.context - 1 if share_prefix else 0 for row in rows])
    inputs = [row.tokens[begin:] for row, begin in zip(rows, begins)]
    width = max(map(len, inputs))
    ids = np.zeros((len(rows), width if share_prefix else _padded_width(model, width)), np.int64)
    for line, tokens in zip(ids, inputs):
        line[: len(tokens)] = tokens
    columns = [row.context - 1 - begin + np.arange(row.num_scored) for row, begin in zip(rows, begins)]
    scored = np.unique(np.concatenate(columns))
    options = {"use_cache": False}
    if share_prefix:
        cache, mask = _prefix_cache(model, groups)
        # Learned positions may have none for the padding, so it stays at the position of its row's last token.
        offsets = np.minimum(np.arange(width), np.array([[len(tokens) - 1] for tokens in inputs]))
        options = {"use_cache": True, "past_key_values": cache, "position_ids": begins[:, None] + offsets}
        options["attention_mask"] = np.concatenate([mask, np.ones_like(ids)], axis=1)
    logits = _forward(model, ids, scored, **options)
    return _read_targets(logits, rows, [np.searchsorted(scored, column) for column in columns])


def _prefix_cache(model, groups: list[list[_Row]]) -> tuple[DynamicCache, np.ndarray]:
    """KV cache of each group's prefix, once per row of the group, and its attention mask (rows, T).

    Padding is on the left, so that distances from prefix to suffix, as of sliding windows, are those without it.
    """
    prefixes = [group[0].tokens[: group[0].context - 1] for group in groups]
    ids = np.zeros((len(groups), _padded_width(model, max(map(len, prefixes)))), np.int64)
    mask = np.zeros_like(ids)
    for line, mask_line, prefix in zip(ids, mask, prefixes):
        line[-len(prefix) :], mask_line[-len(prefix) :] = prefix, 1
    cache, positions = DynamicCache(config=model.config), np.maximum(mask.cumsum(-1) - 1, 0)
    options = {"attention_mask": mask, "position_ids": positions, "past_key_values": cache, "use_cache": True}
    _forward(model, ids, np.array([ids.shape[1] - 1]), **options)
    group_of = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
    cache.reorder_cache(torch.from_numpy(group_of).to(model.device))
    return cache, mask[group_of]


def _padded_width(model, length: int) -> int:
    """`length`, on a GPU rounded up where the positions allow it: few shapes, so that memory is reused."""
    rounded, limit = -(-length // 64) * 64, getattr(model.config, "max_position_embeddings", None) or length
    return int(rounded if model.device.type == "cuda" and (rounded <= limit or length > limit) else length)


def _forward(model, ids: np.ndarray, columns: np.ndarray, **inputs) -> torch.Tensor:
    """ids (B, T) -> logits (B, len(columns), V) at these columns."""

    def on_device(value):
        return torch.from_numpy(value).to(model.device, non_blocking=True) if isinstance(value, np.ndarray) else value

    inputs = {name: on_device(value) for name, value in inputs.items()}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        return model(on_device(ids), logits_to_keep=on_device(columns), **inputs).logits
    return model(on_device(ids), **inputs).logits[:, on_device(columns)]


def _read_targets(logits: torch.Tensor, rows: list[_Row], columns: list[np.ndarray]):
    """Number of its request (on the host), log-probability and argmax hit (on the device) of each target token, flat.

    columns[i]: the columns of logits (B, K, V) that predict the continuation of row i.
    """
    targets = [
        (np.full(len(continuation), number), np.full(len(continuation), line), column, continuation)
        for line, (row, column) in enumerate(zip(rows, columns))
        for number, continuation in row.targets
    ]
    numbers, *index = (np.concatenate(part).astype(np.int64) for part in zip(*targets))
    lines, places, tokens = (torch.from_numpy(part).to(logits.device, non_blocking=True) for part in index)
    predictions = logits[lines, places].float()  # (tokens, V)
    log_probs = predictions.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    return numbers, log_probs, predictions.argmax(-1) == tokens
