"""Triton kernels of one decoding step on CUDA: all operations of a nanochat step besides the matmuls.

At small batch sizes a step is bound by the number of kernels and by the bytes that it reads. So the 30 elementwise
operations per layer of eager PyTorch become four kernels, and attention reads only the keys that a slot has. The
reference implementations are `sample_next_token` below and `Decoder.forward`, which run where the kernels do not.

Split attention: Flash-Decoding (Dao et al. 2023, https://crfm.stanford.edu/2023/10/12/flashdecoding.html).
"""

from functools import partial

import torch
from torch import Tensor

from .backend import check, disabled, tl, triton, without

FUSED = "fused decoding"  # the check of kernels/fused_decode.py
LOG_STEPS = 64  # steps whose tokens the device keeps until the host has read them
# Attention, measured on an H200: keys of a block, warps, programs per multiprocessor, fewest keys of a split.
ATTENTION = {"block": 32, "warps": 2, "programs": 4, "split": 64}
NEGLIGIBLE = -32.0  # log weight, relative to the best token, below which sampling ignores a token: e^-32 = 1e-14


def sample_next_token(logits: Tensor, uniform: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """The next token of each slot: greedy where temperature is 0, else top-k, then top-p, then one draw.

    logits: (B, V), softcapped. uniform, temperature, top_k, top_p: (B,) each; uniform in [0, 1), top_k 0 and top_p 1
    for all tokens. Returns: (B,) int64. Ties at the k-th logit are all eligible. The draw inverts the cumulative sum
    in token order, so one uniform number per token decides, the same way on every device.
    """
    greedy = logits.argmax(-1)
    if not bool((temperature > 0).any()):
        return greedy
    divisor = torch.where(temperature > 0, temperature, 1.0)[:, None]
    value = (logits - logits.amax(-1, keepdim=True)) / divisor  # log weight relative to the best token
    size = value.shape[-1]
    if bool((top_k > 0).any()) or bool((top_p < 1).any()):
        k = torch.where(top_k > 0, top_k, size).clamp(max=size).long()[:, None]
        ordered = value.topk(int(k.max()), sorted=True).values
        low = ordered.gather(1, k - 1)  # the log weight of the k-th token, the lowest one that top-k allows
        mass = torch.where(value >= low, value.exp(), 0.0).sum(-1, keepdim=True)
        above = torch.where(ordered >= low, ordered.exp(), 0.0).cumsum(-1)
        last = (above < mass * top_p[:, None]).sum(-1, keepdim=True)  # the token with which the mass reaches top_p
        nucleus = ordered.gather(1, last.clamp(max=ordered.shape[-1] - 1))
        low = torch.where(top_p[:, None] < 1, torch.maximum(low, nucleus), low)
        value = torch.where(value >= low, value, -torch.inf)
    exact = torch.float32 if logits.device.type == "mps" else torch.float64  # Apple's GPUs lack it
    mass = value.exp().cumsum(-1, dtype=exact)
    drawn = (mass <= mass[:, -1:] * uniform.to(exact)[:, None]).sum(-1).clamp(max=size - 1)
    return torch.where(temperature > 0, drawn, greedy)


if triton is not None:

    @triton.jit
    def _normed(x, size, eps):
        return x * tl.rsqrt(tl.sum(x * x, axis=0) / size + eps)

    @triton.jit
    def embed_kernel(
        token, prev, pos, counter, table, smear_gate, smear_lambda, resid, x0_lambda, x_out, x0_out, h_out,
        size, gate_size, eps, SMEAR: tl.constexpr, LAMBDAS: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """One program per slot: embedding, norm, smear, the first residual mix and norm; also counts the step."""
        slot = tl.program_id(0)
        column = tl.arange(0, BLOCK)
        inside = column < size
        dtype = table.dtype.element_ty
        if slot == 0:
            tl.store(counter, tl.load(counter) + 1)
        x = tl.load(table + tl.load(token + slot).to(tl.int64) * size + column, mask=inside, other=0.0).to(tl.float32)
        x = _normed(x, size, eps).to(dtype).to(tl.float32)
        if SMEAR:
            before = tl.load(table + tl.load(prev + slot).to(tl.int64) * size + column, mask=inside, other=0.0)
            before = _normed(before.to(tl.float32), size, eps).to(dtype).to(tl.float32)
            weight = tl.load(smear_gate + column, mask=column < gate_size, other=0.0).to(tl.float32)
            gate = tl.load(smear_lambda).to(tl.float32) * tl.sigmoid(tl.sum(x * weight, axis=0))
            x += tl.where(tl.load(pos + slot) > 0, gate, 0.0) * before  # the first token has nothing before it
            x = x.to(dtype).to(tl.float32)
        tl.store(x0_out + slot * size + column, x, mask=inside)
        if LAMBDAS:
            x = (tl.load(resid).to(tl.float32) + tl.load(x0_lambda).to(tl.float32)) * x
            x = x.to(dtype).to(tl.float32)
        tl.store(x_out + slot * size + column, x, mask=inside)
        tl.store(h_out + slot * size + column, _normed(x, size, eps), mask=inside)

    @triton.jit
    def residual_kernel(
        x_in, other, scale_x, scale_other, x_out, h_out, size, eps, MODE: tl.constexpr, BLOCK: tl.constexpr
    ):
        """One program per slot. MODE 0: h = norm(x); 1: x = a x + b other, h = norm(x); 2: h = norm(x - b other)."""
        at = tl.program_id(0) * size + tl.arange(0, BLOCK)
        inside = tl.arange(0, BLOCK) < size
        x = tl.load(x_in + at, mask=inside, other=0.0).to(tl.float32)
        if MODE == 1:
            y = tl.load(other + at, mask=inside, other=0.0).to(tl.float32)
            x = tl.load(scale_x).to(tl.float32) * x + tl.load(scale_other).to(tl.float32) * y
            x = x.to(x_out.dtype.element_ty).to(tl.float32)
            tl.store(x_out + at, x, mask=inside)
        if MODE == 2:
            y = tl.load(other + at, mask=inside, other=0.0).to(tl.float32)
            x = x - tl.load(scale_other).to(tl.float32) * y
        tl.store(h_out + at, _normed(x, size, eps), mask=inside)

    @triton.jit
    def rope_cache_kernel(
        qkv, h, token, pos, cos, sin, value_table, value_gate, q_out, k_cache, v_cache,
        size, gate_size, cache_len, eps,
        HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, VALUES: tl.constexpr, GATE: tl.constexpr,
    ):  # fmt: skip
        """One program per (slot, head): rotate and norm q and k, add the value embedding, write to the cache."""
        slot = tl.program_id(0).to(tl.int64)
        head = tl.program_id(1)
        half = tl.arange(0, HALF)
        source = qkv + slot * (HEADS + 2 * KV_HEADS) * 2 * HALF + head * 2 * HALF
        dtype = qkv.dtype.element_ty
        first = tl.load(source + half).to(tl.float32)
        second = tl.load(source + HALF + half).to(tl.float32)
        at = tl.load(pos + slot)
        entry = at % cache_len
        if head < HEADS + KV_HEADS:
            c = tl.load(cos + at * HALF + half).to(tl.float32)
            s = tl.load(sin + at * HALF + half).to(tl.float32)
            rotated = (first * c + second * s).to(dtype).to(tl.float32)
            second = (second * c - first * s).to(dtype).to(tl.float32)
            mean = (tl.sum(rotated * rotated, axis=0) + tl.sum(second * second, axis=0)) / (2 * HALF)
            factor = tl.rsqrt(mean + eps)
            first = rotated * factor
            second = second * factor
            if head < HEADS:
                target = q_out + (slot * HEADS + head) * 2 * HALF
            else:
                target = k_cache + ((slot * KV_HEADS + head - HEADS) * cache_len + entry) * 2 * HALF
        else:
            kv = head - HEADS - KV_HEADS
            if VALUES:
                channel = tl.arange(0, GATE)
                is_gate = channel < gate_size
                left = tl.load(h + slot * size + channel, mask=is_gate, other=0.0).to(tl.float32)
                right = tl.load(value_gate + kv * gate_size + channel, mask=is_gate, other=0.0).to(tl.float32)
                gate = 3.0 * tl.sigmoid(tl.sum(left * right, axis=0))
                extra = value_table + (tl.load(token + slot).to(tl.int64) * KV_HEADS + kv) * 2 * HALF
                first += gate * tl.load(extra + half).to(tl.float32)
                second += gate * tl.load(extra + HALF + half).to(tl.float32)
            target = v_cache + ((slot * KV_HEADS + kv) * cache_len + entry) * 2 * HALF
        tl.store(target + half, first.to(dtype))
        tl.store(target + HALF + half, second.to(dtype))

    @triton.jit
    def attention_kernel(
        q, k_cache, v_cache, pos, out, part_sum, part_max, cache_len, scale,
        HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """One program per (slot and head, split): softmax(q k) v over this split's share of the keys that exist."""
        slot = (tl.program_id(0) // HEADS).to(tl.int64)
        head = tl.program_id(0) % HEADS
        split = tl.program_id(1)
        dim = tl.arange(0, DIM)
        filled = tl.minimum(tl.load(pos + slot) + 1, cache_len)  # a full ring buffer: order does not matter
        share = tl.cdiv(tl.cdiv(filled, BLOCK), SPLITS) * BLOCK
        begin = split * share
        end = tl.minimum(filled, begin + share)
        base = (slot * (HEADS // GROUP) + head // GROUP) * cache_len * DIM
        row = tl.arange(0, 16)  # tensor cores want 16 rows: the query and zeros
        query = tl.load(
            q + (slot * HEADS + head) * DIM + dim[None, :] + row[:, None] * 0, mask=row[:, None] == 0, other=0.0
        )
        best = tl.full([16], -float("inf"), dtype=tl.float32)
        total = tl.zeros([16], dtype=tl.float32)
        acc = tl.zeros([16, DIM], dtype=tl.float32)
        for start in range(begin, end, BLOCK):
            key = start + tl.arange(0, BLOCK)
            inside = key < end
            where = base + key[:, None] * DIM + dim[None, :]
            keys = tl.load(k_cache + where, mask=inside[:, None], other=0.0)
            values = tl.load(v_cache + where, mask=inside[:, None], other=0.0)  # loaded early to hide latency
            score = tl.dot(query, tl.trans(keys), input_precision="ieee") * scale
            score = tl.where(inside[None, :], score, -float("inf"))
            now = tl.maximum(best, tl.max(score, axis=1))
            weight = tl.exp(score - now[:, None])
            fade = tl.exp(best - now)
            acc = tl.dot(weight.to(values.dtype), values, acc * fade[:, None], input_precision="ieee")
            total = total * fade + tl.sum(weight, axis=1)
            best = now
        acc = tl.sum(tl.where(row[:, None] == 0, acc, 0.0), axis=0)
        total = tl.sum(tl.where(row == 0, total, 0.0), axis=0)
        best = tl.max(tl.where(row == 0, best, -float("inf")), axis=0)
        if SPLITS == 1:
            tl.store(out + (slot * HEADS + head) * DIM + dim, (acc / total).to(out.dtype.element_ty))
        else:
            part = (slot * HEADS + head) * SPLITS + split
            tl.store(out + part * DIM + dim, acc)
            tl.store(part_sum + part, total)
            tl.store(part_max + part, best)

    @triton.jit
    def combine_kernel(part, part_sum, part_max, out, DIM: tl.constexpr, SPLITS: tl.constexpr):
        """One program per (slot and head): the softmax over all splits from those of each split."""
        which = tl.program_id(0).to(tl.int64)
        dim = tl.arange(0, DIM)
        split = tl.arange(0, SPLITS)
        best = tl.load(part_max + which * SPLITS + split)
        weight = tl.exp(best - tl.max(best, axis=0))  # a split without keys has -inf, so weight 0
        total = tl.sum(weight * tl.load(part_sum + which * SPLITS + split), axis=0)
        acc = tl.load(part + (which * SPLITS + split[:, None]) * DIM + dim[None, :])
        acc = tl.sum(acc * weight[:, None], axis=0) / total
        tl.store(out + which * DIM + dim, acc.to(out.dtype.element_ty))

    @triton.jit
    def mlp_up_kernel(
        x, weight, out, rows, size, inner, eps,
        ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr,
    ):  # fmt: skip
        """out = relu(norm(x) weight^T)^2, one program per tile; x (rows, size), weight (inner, size).

        A norm without weights is one factor per row, so it is computed along the way and applied to the matmul.
        """
        row = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        column = (tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)
        squares = tl.zeros([ROWS], dtype=tl.float32)
        acc = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
        for start in range(0, size, CHANNELS):
            channel = start + tl.arange(0, CHANNELS)
            inside = channel < size
            left = tl.load(x + row[:, None] * size + channel, mask=(row < rows)[:, None] & inside, other=0.0)
            right = tl.load(
                weight + column[None, :] * size + channel[:, None], mask=(column < inner) & inside[:, None], other=0.0
            )
            acc = tl.dot(left, right, acc, input_precision="ieee")
            squares += tl.sum(left.to(tl.float32) * left.to(tl.float32), axis=1)
        value = tl.maximum(acc * tl.rsqrt(squares / size + eps)[:, None], 0.0)
        target = out + row[:, None] * inner + column
        tl.store(target, (value * value).to(out.dtype.element_ty), mask=(row < rows)[:, None] & (column < inner))

    @triton.jit
    def _threshold(value, mass, goal, low):
        """The largest of 26 halvings of [low, 0] above which the mass of `value` still reaches the goal: no sort."""
        high = low * 0.0 + 1e-6
        for _ in range(26):
            middle = 0.5 * (low + high)
            enough = tl.sum(tl.where(value >= middle, mass, mass * 0), axis=0) >= goal
            low = tl.where(enough, middle, low)
            high = tl.where(enough, high, middle)
        return low

    @triton.jit
    def _draw_token(
        value, best, greedy, temp, k, p, uniform, at, vocab, softcap, CAPPED: tl.constexpr, FLOOR: tl.constexpr
    ):
        """Top-k, then top-p, then one draw, which inverts the cumulative sum; `value` holds the logits of ids `at`."""
        if CAPPED:  # tanh(x) = 2 sigmoid(2x) - 1
            value = softcap * (2.0 * tl.sigmoid(2.0 * value / softcap) - 1.0)
            best = softcap * (2.0 * tl.sigmoid(2.0 * best / softcap) - 1.0)
        value = tl.where(at < vocab, (value - best) / temp, -float("inf"))  # log weight relative to the best token
        low = temp * 0.0 + FLOOR
        if k > 0:
            low = _threshold(value, at * 0 + 1, k, low)
        weight = tl.where(value >= low, tl.exp(value), 0.0)
        if p < 1.0:
            low = _threshold(value, weight, tl.sum(weight, axis=0) * p, low)
            weight = tl.where(value >= low, weight, 0.0)
        goal = tl.sum(weight, axis=0) * uniform
        reached = (tl.cumsum(weight, axis=0) > goal) & (weight > 0)
        drawn = tl.min(tl.where(reached, at, vocab), axis=0)
        return tl.where(drawn < vocab, drawn, greedy)  # rounding left the goal above the mass: take the best

    @triton.jit
    def sample_kernel(
        logits, token, prev, pos, last, active, forced, forced_at, forced_size, temperature, top_k, top_p, uniform,
        stops, log, counter, vocab, stride, softcap, forced_capacity, uniform_capacity, log_slots,
        CAPPED: tl.constexpr, STOPS: tl.constexpr, STEPS: tl.constexpr, FLOOR: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """One program per slot, logits in registers: pick the next token or a forced one, log it, advance the slot."""
        slot = tl.program_id(0).to(tl.int64)
        at = tl.arange(0, BLOCK)
        value = tl.load(logits + slot * stride + at, mask=at < vocab, other=-float("inf")).to(tl.float32)
        best, pick = tl.max(value, axis=0, return_indices=True)
        temp = tl.load(temperature + slot)
        if temp > 0:
            k = tl.load(top_k + slot)
            p = tl.load(top_p + slot)
            draw = tl.load(uniform + slot * uniform_capacity + tl.load(pos + slot))
            pick = _draw_token(value, best, pick, temp, k, p, draw, at, vocab, softcap, CAPPED, FLOOR)
        index = tl.load(forced_at + slot)
        is_forced = (index < tl.load(forced_size + slot)).to(tl.int32)
        forced_token = tl.load(forced + slot * forced_capacity + tl.minimum(index, forced_capacity - 1))
        pick = tl.where(is_forced > 0, forced_token, pick)
        running = tl.load(active + slot)
        step = (tl.load(counter) - 1) % STEPS
        tl.store(log + step * log_slots + slot, tl.where(running > 0, pick, -1))
        if running > 0:
            now = tl.load(pos + slot) + 1
            stop = tl.max((tl.load(stops + tl.arange(0, STOPS)) == pick).to(tl.int32), axis=0)
            still = tl.where(is_forced > 0, 1, 1 - stop) * (now < tl.load(last + slot)).to(tl.int32)
            tl.store(prev + slot, tl.load(token + slot))
            tl.store(token + slot, pick)
            tl.store(pos + slot, now)
            tl.store(forced_at + slot, index + is_forced)
            tl.store(active + slot, still)


@check("decoding", instead="PyTorch's operations, which are slower")
def _cases(draw, decoder):
    """A step of few slots at a late position and of all slots at an early one, without the fused kernels."""
    with without(FUSED):
        yield from trials(draw, decoder, ((min(decoder.slots, 3), 700), (decoder.slots, 100)))


def trials(draw, decoder, sizes):
    """Cases of a check: one step for each of `sizes`, (slots, position), over random caches; then all is cleared."""
    try:
        for slots, most in sizes:
            at = max(min(decoder.length - 2, most), 0)
            for cache in decoder.k + decoder.v:
                part = cache[:slots, :, : at + 1]
                part.copy_(draw(*part.shape, dtype=cache.dtype))
            yield 0.03, partial(_trial, decoder, slots, at)
    finally:
        decoder.state.reset(top_p=1)
        for cache in decoder.k + decoder.v:
            cache[:, :, :701].zero_()


def _trial(decoder, slots: int, at: int) -> list[Tensor]:
    """Returns: logits, how many picks break the rule, positions, and the keys and values written.

    Every slot is at position `at`; the first is greedy, the next two sample with top-p and top-k, and so on.
    """
    state = decoder.state
    state.reset(token=5, prev=3, pos=at, last=decoder.length, active=1, uniform=0.6)
    for values, each in (((0, 1, 0.7), state.temperature), ((0, 0, 10), state.top_k), ((1, 0.9, 1), state.top_p)):
        each.copy_(torch.tensor(values).repeat(len(each))[: len(each)])
    if "decoding" in disabled:
        logits = decoder.plain_step(slots, at + 1)
    else:
        logits = decoder.softcap_logits(decoder.fast_step(slots))
    # The kernel's picks against the rule on these logits; neighbors are as good where rounding decides.
    temperature = state.temperature[:slots]
    expected = sample_next_token(
        logits, state.uniform[:slots, at], temperature, state.top_k[:slots], state.top_p[:slots]
    )
    mass = torch.where(temperature[:, None] > 0, logits.softmax(-1).cumsum(-1), logits)
    picked = state.log[0, :slots].clamp(min=0)
    apart = mass.gather(1, picked[:, None].long()) - mass.gather(1, expected[:, None].long())
    written = [cache[:slots, :, at % cache.shape[2]].clone() for cache in decoder.k + decoder.v]
    return [logits, (apart.abs() > 0.01).sum()[None], state.pos[:slots].clone(), *written]
