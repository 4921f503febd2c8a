"""Triton kernels of one decoding step on CUDA: everything of a nanochat step that is not a matrix product.

A step at small batch is bound by the number of kernels and by the bytes it reads, so the ~30 element-wise operations a
layer has in eager PyTorch become four kernels, and attention reads exactly the keys that a row has, not the allocated
cache. Every kernel has a PyTorch twin in `decode.py` (`Decoder.forward`, `choose`), which is what runs on a CPU; the
tests compare the two. Used through `Decoder` only. `available(...)` says whether they can run here.

The split attention follows Flash-Decoding (Dao et al. 2023, https://crfm.stanford.edu/2023/10/12/flashdecoding.html).
"""

from functools import partial

import torch

from .backend import check, disabled, triton

LOG = 64  # steps of tokens that the device remembers until the host has read them
NEGLIGIBLE = -32.0  # log weight, relative to the best token, below which sampling ignores a token: e^-32 = 1e-14


def available(device: torch.device, head_dim: int) -> bool:
    """Whether the kernels can run for tensors on `device`; head_dim must be a power of two."""
    return triton is not None and device.type == "cuda" and head_dim & (head_dim - 1) == 0


if triton is not None:
    import triton.language as tl

    @triton.jit
    def _normed(x, size, eps):
        return x * tl.rsqrt(tl.sum(x * x, axis=0) / size + eps)

    @triton.jit
    def embed_kernel(
        token, prev, pos, counter, table, smear_gate, smear_lambda, resid, x0_lambda, x_out, x0_out, h_out,
        size, gate_size, eps, SMEAR: tl.constexpr, LAMBDAS: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """One program a row: embedding, norm, smear, the first layer's mix and norm; also counts the step."""
        row = tl.program_id(0)
        column = tl.arange(0, BLOCK)
        inside = column < size
        dtype = table.dtype.element_ty
        if row == 0:
            tl.store(counter, tl.load(counter) + 1)
        x = tl.load(table + tl.load(token + row).to(tl.int64) * size + column, mask=inside, other=0.0).to(tl.float32)
        x = _normed(x, size, eps).to(dtype).to(tl.float32)
        if SMEAR:
            before = tl.load(table + tl.load(prev + row).to(tl.int64) * size + column, mask=inside, other=0.0)
            before = _normed(before.to(tl.float32), size, eps).to(dtype).to(tl.float32)
            weight = tl.load(smear_gate + column, mask=column < gate_size, other=0.0).to(tl.float32)
            gate = tl.load(smear_lambda).to(tl.float32) * tl.sigmoid(tl.sum(x * weight, axis=0))
            x += tl.where(tl.load(pos + row) > 0, gate, 0.0) * before  # the first token has nothing before it
            x = x.to(dtype).to(tl.float32)
        tl.store(x0_out + row * size + column, x, mask=inside)
        if LAMBDAS:
            x = (tl.load(resid).to(tl.float32) + tl.load(x0_lambda).to(tl.float32)) * x
            x = x.to(dtype).to(tl.float32)
        tl.store(x_out + row * size + column, x, mask=inside)
        tl.store(h_out + row * size + column, _normed(x, size, eps), mask=inside)

    @triton.jit
    def mix_kernel(
        x_in, other, scale_x, scale_other, x_out, h_out, size, eps, MODE: tl.constexpr, BLOCK: tl.constexpr
    ):
        """One program a row. MODE 0: h = norm(x); 1: x = a x + b other, h = norm(x); 2: h = norm(x - b other)."""
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
    def place_kernel(
        qkv, h, token, pos, cos, sin, value_table, value_gate, q_out, k_cache, v_cache,
        size, gate_size, slots, eps,
        HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, VALUES: tl.constexpr, GATE: tl.constexpr,
    ):  # fmt: skip
        """One program a (row, head): rotate and norm q and k, add the value embedding, write k and v to their slot."""
        row = tl.program_id(0).to(tl.int64)
        head = tl.program_id(1)
        half = tl.arange(0, HALF)
        source = qkv + row * (HEADS + 2 * KV_HEADS) * 2 * HALF + head * 2 * HALF
        dtype = qkv.dtype.element_ty
        first = tl.load(source + half).to(tl.float32)
        second = tl.load(source + HALF + half).to(tl.float32)
        at = tl.load(pos + row)
        slot = at % slots
        if head < HEADS + KV_HEADS:
            c = tl.load(cos + at * HALF + half).to(tl.float32)
            s = tl.load(sin + at * HALF + half).to(tl.float32)
            turned = (first * c + second * s).to(dtype).to(tl.float32)
            second = (second * c - first * s).to(dtype).to(tl.float32)
            mean = (tl.sum(turned * turned, axis=0) + tl.sum(second * second, axis=0)) / (2 * HALF)
            factor = tl.rsqrt(mean + eps)
            first = turned * factor
            second = second * factor
            if head < HEADS:
                target = q_out + (row * HEADS + head) * 2 * HALF
            else:
                target = k_cache + ((row * KV_HEADS + head - HEADS) * slots + slot) * 2 * HALF
        else:
            kv = head - HEADS - KV_HEADS
            if VALUES:
                channel = tl.arange(0, GATE)
                known = channel < gate_size
                left = tl.load(h + row * size + channel, mask=known, other=0.0).to(tl.float32)
                right = tl.load(value_gate + kv * gate_size + channel, mask=known, other=0.0).to(tl.float32)
                gate = 3.0 * tl.sigmoid(tl.sum(left * right, axis=0))
                extra = value_table + (tl.load(token + row).to(tl.int64) * KV_HEADS + kv) * 2 * HALF
                first += gate * tl.load(extra + half).to(tl.float32)
                second += gate * tl.load(extra + HALF + half).to(tl.float32)
            target = v_cache + ((row * KV_HEADS + kv) * slots + slot) * 2 * HALF
        tl.store(target + half, first.to(dtype))
        tl.store(target + HALF + half, second.to(dtype))

    @triton.jit
    def attend_kernel(
        q, k_cache, v_cache, pos, out, part_sum, part_max, slots, scale,
        HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """One program a (row and head, split): softmax(q k) v over this split's share of the keys that exist."""
        row = (tl.program_id(0) // HEADS).to(tl.int64)
        head = tl.program_id(0) % HEADS
        split = tl.program_id(1)
        dim = tl.arange(0, DIM)
        filled = tl.minimum(tl.load(pos + row) + 1, slots)  # a full window is a ring: its order does not matter
        share = tl.cdiv(tl.cdiv(filled, BLOCK), SPLITS) * BLOCK
        begin = split * share
        end = tl.minimum(filled, begin + share)
        base = (row * (HEADS // GROUP) + head // GROUP) * slots * DIM
        query = tl.load(q + (row * HEADS + head) * DIM + dim).to(tl.float32) * scale
        best = -float("inf")
        total = 0.0
        acc = tl.zeros([DIM], dtype=tl.float32)
        for start in range(begin, end, BLOCK):
            key = start + tl.arange(0, BLOCK)
            inside = key < end
            where = base + key[:, None] * DIM + dim[None, :]
            keys = tl.load(k_cache + where, mask=inside[:, None], other=0.0)
            values = tl.load(v_cache + where, mask=inside[:, None], other=0.0)  # asked for early: it hides latency
            score = tl.where(inside, tl.sum(keys.to(tl.float32) * query[None, :], axis=1), -float("inf"))
            now = tl.maximum(best, tl.max(score, axis=0))
            weight = tl.exp(score - now)
            fade = tl.exp(best - now)
            acc = acc * fade + tl.sum(weight[:, None] * values.to(tl.float32), axis=0)
            total = total * fade + tl.sum(weight, axis=0)
            best = now
        if SPLITS == 1:
            tl.store(out + (row * HEADS + head) * DIM + dim, (acc / total).to(out.dtype.element_ty))
        else:
            part = (row * HEADS + head) * SPLITS + split
            tl.store(out + part * DIM + dim, acc)
            tl.store(part_sum + part, total)
            tl.store(part_max + part, best)

    @triton.jit
    def join_kernel(part, part_sum, part_max, out, DIM: tl.constexpr, SPLITS: tl.constexpr):
        """One program a (row and head): the softmax over all splits from the splits' own."""
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
    def up_kernel(
        x, weight, out, rows, size, inner, eps,
        ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr,
    ):  # fmt: skip
        """out = relu(norm(x) weight^T)^2, a tile of rows x columns a program; x (rows, size), weight (inner, size).

        A norm without weights is one factor a row, so it can be found on the way and applied to the product.
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
    def sample_kernel(
        logits, token, prev, pos, last, active, forced, forced_at, forced_size, temperature, top_k, top_p, uniform,
        stops, log, counter, vocab, stride, softcap, forced_room, uniform_room, log_rows,
        CAPPED: tl.constexpr, STOPS: tl.constexpr, STEPS: tl.constexpr, FLOOR: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """One program a row: pick the next token (greedy, top-k, top-p), prefer a forced one, advance the row's state.

        The whole row of logits sits in registers. The thresholds of top-k and top-p are found by bisection on the log
        weight, 26 halvings of [-32, 0]: no sort. The draw inverts the cumulative sum at the row's uniform number.
        """
        row = tl.program_id(0).to(tl.int64)
        at = tl.arange(0, BLOCK)
        known = at < vocab
        value = tl.load(logits + row * stride + at, mask=known, other=-float("inf")).to(tl.float32)
        best, pick = tl.max(value, axis=0, return_indices=True)
        heat = tl.load(temperature + row)
        if heat > 0:
            if CAPPED:  # tanh(x) = 2 sigmoid(2x) - 1
                value = softcap * (2.0 * tl.sigmoid(2.0 * value / softcap) - 1.0)
                best = softcap * (2.0 * tl.sigmoid(2.0 * best / softcap) - 1.0)
            value = tl.where(known, (value - best) / heat, -float("inf"))  # log weight relative to the best token
            low = heat * 0.0 + FLOOR
            count = tl.load(top_k + row)
            if count > 0:
                high = heat * 0.0 + 1e-6
                for _ in range(26):
                    middle = 0.5 * (low + high)
                    enough = tl.sum((value >= middle).to(tl.int32), axis=0) >= count
                    low = tl.where(enough, middle, low)
                    high = tl.where(enough, high, middle)
            weight = tl.where(value >= low, tl.exp(value), 0.0)
            share = tl.load(top_p + row)
            if share < 1.0:
                high = heat * 0.0 + 1e-6
                wanted = tl.sum(weight, axis=0) * share
                for _ in range(26):
                    middle = 0.5 * (low + high)
                    enough = tl.sum(tl.where(value >= middle, weight, 0.0), axis=0) >= wanted
                    low = tl.where(enough, middle, low)
                    high = tl.where(enough, high, middle)
                weight = tl.where(value >= low, weight, 0.0)
            goal = tl.sum(weight, axis=0) * tl.load(uniform + row * uniform_room + tl.load(pos + row))
            reached = (tl.cumsum(weight, axis=0) > goal) & (weight > 0)
            drawn = tl.min(tl.where(reached, at, vocab), axis=0)
            pick = tl.where(drawn < vocab, drawn, pick)  # rounding left the goal above the mass: take the best
        here = tl.load(forced_at + row)
        is_forced = (here < tl.load(forced_size + row)).to(tl.int32)
        told = tl.load(forced + row * forced_room + tl.minimum(here, forced_room - 1))
        pick = tl.where(is_forced > 0, told, pick)
        running = tl.load(active + row)
        step = (tl.load(counter) - 1) % STEPS
        tl.store(log + step * log_rows + row, tl.where(running > 0, pick, -1))
        if running > 0:
            now = tl.load(pos + row) + 1
            stop = tl.max((tl.load(stops + tl.arange(0, STOPS)) == pick).to(tl.int32), axis=0)
            go_on = tl.where(is_forced > 0, 1, 1 - stop) * (now < tl.load(last + row)).to(tl.int32)
            tl.store(prev + row, tl.load(token + row))
            tl.store(token + row, pick)
            tl.store(pos + row, now)
            tl.store(forced_at + row, here + is_forced)
            tl.store(active + row, go_on)


@check("decoding", instead="PyTorch's operations, which are slower")
def _cases(draw, decoder):
    """A step of few rows far along and of all rows early, over random caches; leaves the decoder as it was made."""
    try:
        for rows, most in ((min(decoder.rows, 3), 700), (decoder.rows, 100)):
            at = max(min(decoder.length - 2, most), 0)
            for cache in decoder.k + decoder.v:
                part = cache[:rows, :, : at + 1]
                part.copy_(draw(*part.shape, dtype=cache.dtype))
            yield 0.03, partial(_trial, decoder, rows, at)
    finally:
        _set(decoder, 0, 0)
        decoder.top_p.fill_(1)
        for cache in decoder.k + decoder.v:
            cache[:, :, :701].zero_()


def _set(decoder, at: int, on: int) -> None:
    """Every row at position `at`, the first greedy, the next two with top-p and top-k, and so on; on 0: all zero."""
    states = {"token": 5, "prev": 3, "pos": at, "last": decoder.length, "active": 1, "uniform": 0.6, "forced_at": 0}
    for name, value in states.items():
        getattr(decoder, name).fill_(value * on)
    for name, values in {"temperature": (0, 1, 0.7), "top_k": (0, 0, 10), "top_p": (1, 0.9, 1)}.items():
        state = getattr(decoder, name)
        state.copy_(torch.tensor(values).repeat(len(state))[: len(state)] * on)
    decoder.counter.zero_()
    decoder.log.fill_(-1)


def _trial(decoder, rows: int, at: int) -> list[torch.Tensor]:
    """-> logits, how many picks break the rule, positions, and the keys and values written."""
    _set(decoder, at, 1)
    if "decoding" in disabled:
        logits = decoder.plain_step(rows, at + 1)
    else:
        logits = decoder.cap(decoder.fast_step(rows))
    # What was picked, against the rule on these logits; neighbors are as good where rounding decides.
    heat = decoder.temperature[:rows]
    sampling = (decoder.uniform[:rows, at], heat, decoder.top_k[:rows], decoder.top_p[:rows])
    wanted = decoder.sample_next_token(logits, *sampling)
    mass = torch.where(heat[:, None] > 0, logits.softmax(-1).cumsum(-1), logits)
    picked = decoder.log[0, :rows].clamp(min=0)
    apart = mass.gather(1, picked[:, None].long()) - mass.gather(1, wanted[:, None].long())
    written = [cache[:rows, :, at % cache.shape[2]].clone() for cache in decoder.k + decoder.v]
    return [logits, (apart.abs() > 0.01).sum()[None], decoder.pos[:rows].clone(), *written]
