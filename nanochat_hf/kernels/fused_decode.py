"""Few, larger kernels of one decoding step on CUDA: five per layer, for at most `MAX_SLOTS` slots.

At few slots a step is bound by the number of kernels that wait for each other, not by bytes. Per layer:

1. q, k and v, with the norm before them
2. RoPE, QK norm, cache write and attention
3. the output projection, which joins the splits of the keys and adds the residual stream
4. the up projection with norm and relu squared
5. the down projection, which adds the residual stream and mixes the embedding in for the next layer

On compute capability 9.0 and newer a kernel starts before the one ahead of it has ended (programmatic dependent
launch) and reads its weights meanwhile. `serve/decoder.py` calls `network`, and records it as a CUDA graph.
"""

import torch
from torch import Tensor

from . import decode
from .backend import INTERPRETED, check, tl, triton

MAX_SLOTS = 4  # more slots use cuBLAS
# Measured on an H200: programs per multiprocessor and weights, warps of a program of a matrix; keys and warps of a
# program of attention, and into how many parts the keys are split.
TUNING = {"programs": 2, "linear values": 4096, "linear warps": 1, "keys": (128, 8), "splits": 4}
PLAIN, ADD, MIX, BACKOUT, BACKOUT_ITSELF = range(5)  # what a projection does with the residual stream

if triton is not None:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

    @triton.jit
    def _finish(
        value, at, inside, out, raw, residual, other, scale_x, scale_other, RELU2: tl.constexpr, MODE: tl.constexpr
    ):
        """Store a matmul's result, after relu squared or with the residual stream; constants as in `network`."""
        dtype = out.dtype.element_ty
        if RELU2:
            value = tl.maximum(value, 0.0)
            value = value * value
        if MODE > 0:
            value += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
        if MODE > 1:
            value = value.to(dtype).to(tl.float32)
            tl.store(raw + at, value.to(dtype), mask=inside)
            y = value
            if MODE < 4:
                y = tl.load(other + at, mask=inside, other=0.0).to(tl.float32)
            if MODE == 2:
                value = tl.load(scale_x).to(tl.float32) * value + tl.load(scale_other).to(tl.float32) * y
            else:
                value = value - tl.load(scale_other).to(tl.float32) * y
        tl.store(out + at, value.to(dtype), mask=inside)

    @triton.jit
    def linear_kernel(
        x, weight, out, raw, residual, other, scale_x, scale_other, part_sum, part_max, size, columns, eps,
        NORM: tl.constexpr, RELU2: tl.constexpr, MODE: tl.constexpr, SPLITS: tl.constexpr, SLOTS: tl.constexpr,
        COLUMNS: tl.constexpr, CHANNELS: tl.constexpr, CHUNKS: tl.constexpr, OVERLAP: tl.constexpr,
    ):  # fmt: skip
        """[norm](x) weight^T of few slots, COLUMNS outputs per program; x (SLOTS, size), weight (columns, size).

        size is CHUNKS x CHANNELS. SPLITS > 1: x is attention's unfinished output, float32 (slots x heads, SPLITS,
        head_dim), and CHANNELS is head_dim. A program reads its weights once for all slots, and before the wait for
        the kernel ahead, which does not write them.
        """
        column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        channel = tl.arange(0, CHANNELS)
        rows = weight + column.to(tl.int64)[:, None] * size + channel[None, :]
        valid = (column < columns)[:, None]
        tiles = ()
        for chunk in tl.static_range(CHUNKS):
            tiles = tiles + (tl.load(rows + chunk * CHANNELS, mask=valid, other=0.0),)
        if OVERLAP:
            gdc_launch_dependents()
            gdc_wait()
        for slot in tl.static_range(SLOTS):
            products = tl.zeros([COLUMNS, CHANNELS], dtype=tl.float32)
            squares = tl.zeros([CHANNELS], dtype=tl.float32)
            for chunk in tl.static_range(CHUNKS):
                if SPLITS > 1:
                    split = (slot * CHUNKS + chunk) * SPLITS + tl.arange(0, SPLITS)
                    best = tl.load(part_max + split)
                    share = tl.exp(best - tl.max(best, axis=0))  # a split without keys has a very low maximum: 0
                    share = share / tl.sum(share * tl.load(part_sum + split), axis=0)
                    part = tl.load(x + split[:, None] * CHANNELS + channel[None, :])
                    value = tl.sum(part * share[:, None], axis=0).to(weight.dtype.element_ty).to(tl.float32)
                else:
                    value = tl.load(x + (slot * CHUNKS + chunk) * CHANNELS + channel).to(tl.float32)
                products += tiles[chunk].to(tl.float32) * value[None, :]
                squares += value * value
            acc = tl.sum(products, axis=1)
            if NORM:
                acc = acc * tl.rsqrt(tl.sum(squares, axis=0) / size + eps)
            at = slot * columns + column
            _finish(acc, at, column < columns, out, raw, residual, other, scale_x, scale_other, RELU2, MODE)

    @triton.jit
    def _rotated(source, cos, sin, at, eps, DIM: tl.constexpr):
        """(DIM,) q or k of one head, rotated to position `at` and normed, rounded as its dtype would."""
        dim = tl.arange(0, DIM)
        half = DIM // 2
        own = tl.load(source + dim).to(tl.float32)
        partner = tl.load(source + (dim + half) % DIM).to(tl.float32)
        c = tl.load(cos + at * half + dim % half).to(tl.float32)
        s = tl.load(sin + at * half + dim % half).to(tl.float32)
        dtype = source.dtype.element_ty
        value = (own * c + partner * tl.where(dim < half, s, -s)).to(dtype).to(tl.float32)
        value = value * tl.rsqrt(tl.sum(value * value, axis=0) / DIM + eps)
        return value.to(dtype).to(tl.float32)

    @triton.jit
    def _new_value(
        source, x, weight, table, token, kv, size, gate_size, eps,
        KV: tl.constexpr, DIM: tl.constexpr, VALUES: tl.constexpr, GATE: tl.constexpr, WIDTH: tl.constexpr,
    ):  # fmt: skip
        """(DIM,) v of head kv; with VALUES plus a row of `table`, gated by the first channels of norm(x), x (size)."""
        dtype = source.dtype.element_ty
        dim = tl.arange(0, DIM)
        value = tl.load(source + dim).to(tl.float32)
        if VALUES:
            channel = tl.arange(0, WIDTH)
            residual = tl.load(x + channel, mask=channel < size, other=0.0).to(tl.float32)
            factor = tl.rsqrt(tl.sum(residual * residual, axis=0) / size + eps)
            channel = tl.arange(0, GATE)
            left = tl.load(x + channel, mask=channel < gate_size, other=0.0).to(tl.float32) * factor
            right = tl.load(weight + kv * gate_size + channel, mask=channel < gate_size, other=0.0).to(tl.float32)
            gate = 3.0 * tl.sigmoid(tl.sum(left.to(dtype).to(tl.float32) * right, axis=0))
            value += gate * tl.load(table + (tl.load(token).to(tl.int64) * KV + kv) * DIM + dim).to(tl.float32)
        return value.to(dtype).to(tl.float32)

    @triton.jit
    def _join_keys(keys, values, inside, query, best, total, acc):
        """Softmax attention over one more block of keys: the new maximum, sum and weighted sum of values."""
        score = tl.where(inside, tl.sum(keys.to(tl.float32) * query[None, :], axis=1), -float("inf"))
        now = tl.maximum(best, tl.max(score, axis=0))
        weight = tl.exp(score - now)
        fade = tl.exp(best - now)
        acc = acc * fade + tl.sum(weight[:, None] * values.to(tl.float32), axis=0)
        return now, total * fade + tl.sum(weight, axis=0), acc

    @triton.jit
    def rope_attention_kernel(
        qkv, x, token, pos, cos, sin, value_table, value_gate, k_cache, v_cache, out, part_sum, part_max,
        size, gate_size, cache_len, scale, eps,
        HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
        VALUES: tl.constexpr, GATE: tl.constexpr, WIDTH: tl.constexpr, OVERLAP: tl.constexpr,
    ):  # fmt: skip
        """One program per (slot and head, split): softmax(q k) v over this split's share of the keys that exist.

        The first split has the new key and value in registers and writes them to the cache; no program reads them
        there. x: the residual stream before the norm, for the gate of the value embedding.
        """
        slot = (tl.program_id(0) // HEADS).to(tl.int64)
        head, split = tl.program_id(0) % HEADS, tl.program_id(1)
        KV: tl.constexpr = HEADS // GROUP
        kv, dim = head // GROUP, tl.arange(0, DIM)
        at = tl.load(pos + slot)
        entry = at % cache_len
        filled = tl.minimum(at, cache_len)  # a full ring buffer: order does not matter
        share = tl.cdiv(tl.cdiv(filled, BLOCK), SPLITS) * BLOCK
        begin = split * share
        end = tl.minimum(filled, begin + share)
        base = (slot * KV + kv) * cache_len * DIM
        which = begin + tl.arange(0, BLOCK)
        inside = (which < end) & (which != entry)
        where = base + which[:, None] * DIM + dim[None, :]
        keys = tl.load(k_cache + where, mask=inside[:, None], other=0.0)  # of earlier steps: no need to wait
        values = tl.load(v_cache + where, mask=inside[:, None], other=0.0)
        if OVERLAP:
            gdc_launch_dependents()
            gdc_wait()
        row = qkv + slot * (HEADS + 2 * KV) * DIM
        query = _rotated(row + head * DIM, cos, sin, at, eps, DIM) * scale
        best = tl.full([], -1e30, tl.float32)  # not -inf: a split may have no key at all
        total = tl.full([], 0.0, tl.float32)
        acc = tl.zeros([DIM], dtype=tl.float32)
        if split == 0:
            key = _rotated(row + (HEADS + kv) * DIM, cos, sin, at, eps, DIM)
            acc = _new_value(
                row + (HEADS + KV + kv) * DIM, x + slot * size, value_gate, value_table, token + slot, kv,
                size, gate_size, eps, KV, DIM, VALUES, GATE, WIDTH,
            )  # fmt: skip
            here = base + entry * DIM + dim
            tl.store(k_cache + here, key.to(k_cache.dtype.element_ty), mask=head % GROUP == 0)
            tl.store(v_cache + here, acc.to(v_cache.dtype.element_ty), mask=head % GROUP == 0)
            best = tl.sum(query * key, axis=0)
            total += 1.0
        for _ in range(begin, end, BLOCK):
            best, total, acc = _join_keys(keys, values, inside, query, best, total, acc)
            which += BLOCK
            inside = (which < end) & (which != entry)
            where += BLOCK * DIM
            keys = tl.load(k_cache + where, mask=inside[:, None], other=0.0)
            values = tl.load(v_cache + where, mask=inside[:, None], other=0.0)
        if SPLITS == 1:
            tl.store(out + (slot * HEADS + head) * DIM + dim, (acc / total).to(out.dtype.element_ty))
        else:
            part = (slot * HEADS + head) * SPLITS + split
            tl.store(out + part * DIM + dim, acc)
            tl.store(part_sum + part, total)
            tl.store(part_max + part, best)


class Launcher:
    """Launches the kernels of one step of `decoder` for `slots` slots; holds nothing but sizes."""

    def __init__(self, decoder, slots: int):
        self.decoder, self.slots, self.size = decoder, slots, decoder.config.hidden_size
        self.none = decoder.state.stops  # a pointer for arguments that a kernel without the feature never reads
        modern = decoder.device.type == "cuda" and torch.cuda.get_device_capability(decoder.device) >= (9, 0)
        overlap = modern and not INTERPRETED  # programmatic dependent launch
        self.launch = {"OVERLAP": overlap} | ({"launch_pdl": True} if overlap else {})

    def linear(
        self, x: Tensor, weight: Tensor, mode: int = PLAIN, residual=None, other=None, scales=(None, None),
        norm: bool = False, relu2: bool = False, parts: tuple | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """[norm](x) weight^T (slots, N) -> what `mode` makes of it, and, for the modes from MIX on, x + its result.

        parts: attention's sums and maxima by split, if x is not finished.
        """
        decoder, slots, (columns, size) = self.decoder, self.slots, weight.shape
        out = decoder.empty(slots, columns)
        raw = decoder.empty(slots, columns) if mode > ADD else out
        pointers = [self.none if p is None else p for p in (residual, other, *scales)]
        sums, bests = parts or (self.none, self.none)
        channels = decoder.head_dim if parts else min(size & -size, 1024)  # a power of two that divides the size
        outputs = self.outputs(columns, size)
        linear_kernel[(triton.cdiv(columns, outputs),)](
            x, weight, out, raw, *pointers, sums, bests, size, columns, decoder.eps,
            NORM=norm, RELU2=relu2, MODE=mode, SPLITS=sums.shape[-1] if parts else 1, SLOTS=slots, COLUMNS=outputs,
            CHANNELS=channels, CHUNKS=size // channels, num_warps=TUNING["linear warps"], **self.launch,
        )  # fmt: skip
        return out, raw

    def outputs(self, columns: int, size: int) -> int:
        """Outputs per program of a matrix: enough programs for the device, of 4 outputs or more if they fit."""
        most = max(TUNING["linear values"] // size, 1)
        tiles = (tile for tile in (16, 8) if columns >= TUNING["programs"] * self.decoder.processors * tile)
        tile = next(tiles, 4)
        return min(tile, 1 << most.bit_length() - 1)

    def attention(self, i: int, x: Tensor) -> tuple[Tensor, tuple | None]:
        """Layer i's attention over the residual stream x (slots, C) -> its output, and `parts` as in `linear`."""
        d, slots, heads, kv_heads = self.decoder, self.slots, self.decoder.heads, self.decoder.kv_heads
        qkv, _ = self.linear(x, d.w[f"qkv{i}"], norm=True)
        size, gate = d.k[i].shape[2], d.w.get(f"gate{i}")
        block, warps = TUNING["keys"]
        splits = min(TUNING["splits"], 1 << max(size // 64, 1).bit_length() - 1)
        y = d.empty(slots, heads * d.head_dim)
        part = d.empty(slots * heads, splits, d.head_dim, dtype=torch.float32) if splits > 1 else y
        sums, bests = (d.empty(slots * heads, splits, dtype=torch.float32) for _ in range(2))
        rope_attention_kernel[(slots * heads, splits)](
            qkv, x, d.state.token, d.state.pos, d.cos, d.sin, d.w.get(f"values{i}", x), x if gate is None else gate,
            d.k[i], d.v[i], part, sums, bests, self.size, 0 if gate is None else gate.shape[1], size, d.scale, d.eps,
            HEADS=heads, GROUP=heads // kv_heads, DIM=d.head_dim, SPLITS=splits, BLOCK=block,
            VALUES=gate is not None, GATE=16, WIDTH=triton.next_power_of_2(self.size), num_warps=warps, **self.launch,
        )  # fmt: skip
        return (part, (sums, bests)) if splits > 1 else (y, None)


@check(decode.FUSED, instead="one kernel per operation, which is slower for few requests")
def _cases(draw, decoder):
    """One slot, a few and all, of which those of at most MAX_SLOTS take these kernels."""
    yield from decode.trials(draw, decoder, ((1, 700), (min(decoder.slots, 3), 700), (decoder.slots, 100)))


def network(decoder, x: Tensor, x0: Tensor, slots: int) -> Tensor:
    """Layers and head: residual stream x before the first layer, embedding x0, (slots, C) each -> raw logits."""
    launcher, w = Launcher(decoder, slots), decoder.w
    layers, resid, backout = decoder.config.num_hidden_layers, w.get("resid_lambdas"), w.get("backout_lambda")
    middle = None
    for i in range(layers):
        y, parts = launcher.attention(i, x)
        x, _ = launcher.linear(y, w[f"o{i}"], ADD, residual=x, parts=parts)
        inner, _ = launcher.linear(x, w[f"fc1{i}"], norm=True, relu2=True)
        mode, other, scales = ADD, None, (None, None)
        if i + 1 < layers and resid is not None:
            mode, other, scales = MIX, x0, (resid[i + 1], w["x0_lambdas"][i + 1])
        elif i + 1 == layers and backout is not None:
            mode, other, scales = (BACKOUT_ITSELF if i == layers // 2 else BACKOUT), middle, (None, backout)
        x, raw = launcher.linear(inner, w[f"fc2{i}"], mode, residual=x, other=other, scales=scales)
        if i == layers // 2:
            middle = raw
    return launcher.linear(x, w["head"], norm=True)[0]
