"""The decoding machine: a nanochat model's weights, static caches for many rows, and one step for all rows at once.

Why not `model.generate`: it launches ~400 kernels a token and asks the device for every token whether to go on. Here a
step on CUDA is one replay of a CUDA graph: about ten kernels a layer (`decode_kernels.py`), sampling included, with
all state (position, budget, forced tokens, stop) on the device; the host only reads a log of tokens, some steps late.
Elsewhere `forward` runs the same step in plain PyTorch.

A row is a place in the caches. Its cache in a sliding layer is a ring that holds exactly the window; in a full layer
it holds `length` keys. Keys are stored rotated, so their order does not matter. A row feeds `token` at `pos`; while
`active` it then takes the next forced token if there is one, else it samples, and goes inactive at a stop token or at
`last`. An inactive row repeats its last step without effect, so that a step never changes shape.
`generate.Engine` decides which request uses which row; nothing here knows about text.
"""

import re
import threading
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..errors import InputError
from ..kernels import decode as kernels
from ..kernels.backend import verify
from ..model.quantization import is_quantized

MAX_FORCED = 512  # tokens that can wait to be put into a row (a tool's answer)
MAX_STOPS = 8
PREFILL_TOKENS = 32768  # tokens of prompt in one forward pass
CAPTURING = threading.Lock()
STATE = ("token", "prev", "pos", "last", "active", "forced_at", "forced_size", "top_k")


def sample_next_token(logits: torch.Tensor, uniform, temperature, top_k, top_p) -> torch.Tensor:
    """The next token of each row: greedy where temperature is 0, else top-k, then top-p, then one draw.

    Args:
        logits: (B, V), softcapped.
        uniform, temperature, top_k, top_p: (B,) each; uniform in [0, 1), top_k 0 for all tokens, top_p 1 for all.

    Returns:
        (B,) int64. Ties at the k-th logit are all kept. The draw inverts the cumulative sum in token order, so that
        one uniform number a token decides, the same way on every device.
    """
    greedy = logits.argmax(-1)
    if not bool((temperature > 0).any()):
        return greedy
    heat = torch.where(temperature > 0, temperature, 1.0)[:, None]
    value = (logits - logits.amax(-1, keepdim=True)) / heat  # log weight relative to the best token
    size = value.shape[-1]
    if bool((top_k > 0).any()) or bool((top_p < 1).any()):
        most = int(top_k.max()) if bool((top_k > 0).all()) else size
        ordered = value.topk(min(most, size), sorted=True).values
        k = torch.where(top_k > 0, top_k, size).clamp(max=size).long()[:, None]
        low = ordered.gather(1, k - 1)
        if bool((top_p < 1).any()):
            mass = torch.where(value >= low, value.exp(), 0.0).sum(-1, keepdim=True)
            above = torch.where(ordered >= low, ordered.exp(), 0.0).cumsum(-1)
            inside = (above < mass * top_p[:, None]).sum(-1, keepdim=True).clamp(max=ordered.shape[-1] - 1)
            low = torch.where(top_p[:, None] < 1, torch.maximum(low, ordered.gather(1, inside)), low)
        value = torch.where(value >= low, value, -torch.inf)
    mass = value.exp().cumsum(-1, dtype=torch.float64)
    drawn = (mass <= mass[:, -1:] * uniform.double()[:, None]).sum(-1).clamp(max=size - 1)
    return torch.where(temperature > 0, drawn, greedy)


@dataclass
class SlotRequest:
    """What a row of the machine is asked to do; prompts are lists of ids."""

    prompt: list[int]
    max_new_tokens: int
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0


class Decoder:
    """Weights, caches and state of `rows` rows of at most `length` tokens each, prompt included.

    Args:
        model: a `NanoChatForCausalLM`, ours or transformers' own (model_type `nanochat_hf` or `nanochat`).
        stops: at most 8 token ids that end or pause a row.
        dtype: bfloat16 on CUDA unless given, else the model's. Matrices already in it are shared, not copied.

    Raises:
        InputError: another architecture, quantized weights, or the caches do not fit into memory.
    """

    sample_next_token = staticmethod(sample_next_token)

    @torch.inference_mode()
    def __init__(self, model, rows: int, length: int, stops: list[int], dtype: torch.dtype | None = None):
        config = self.config = model.config
        if config.model_type not in ("nanochat_hf", "nanochat") or getattr(config, "attention_bias", False):
            raise InputError(
                f"fast generation knows nanochat models, not {config.model_type!r} with this configuration: "
                "use transformers' own generate for it (adapters: merge_and_unload first)"
            )
        if is_quantized(model):
            raise InputError(
                "this model is quantized, and fast generation reads plain weights: use transformers' own generate or "
                "`pipeline` for it, or take the model that it was made from"
            )
        self.model, self.rows, self.length = model, rows, length
        self.device = model.model.embed_tokens.weight.device
        self.dtype = dtype or (torch.bfloat16 if self.device.type == "cuda" else model.dtype)
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        self.eps, self.softcap = config.rms_norm_eps, config.final_logit_softcapping or 0.0
        self.scale = getattr(config, "qk_scale", 1.0) ** 2 * self.head_dim**-0.5
        self.vocab = getattr(config, "num_tokens", None) or config.vocab_size
        cuda = self.device.type == "cuda"
        self.processors = torch.cuda.get_device_properties(self.device).multi_processor_count if cuda else 1
        self.load_weights()
        types = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
        slots = [min(length, config.sliding_window) if t == "sliding_attention" else length for t in types]
        try:
            self.k, self.v = (
                [self.empty(rows, self.kv_heads, n, self.head_dim).zero_() for n in slots] for _ in range(2)
            )
        except torch.OutOfMemoryError:
            need = sum(slots) * rows * self.kv_heads * self.head_dim * 2 * self.dtype.itemsize / 2**30
            raise InputError(
                f"the caches of {rows} rows of {length} tokens need {need:.1f} GiB, more than the GPU has free: "
                "lower the number of rows or the length"
            ) from None
        rotary = model.model.rotary_emb
        angles = torch.arange(length, device=self.device).float()[:, None] * rotary.inv_freq.float()
        self.cos = (angles.cos() * rotary.attention_scaling).to(self.dtype)  # (length, D/2)
        self.sin = (angles.sin() * rotary.attention_scaling).to(self.dtype)
        for name in STATE:
            setattr(self, name, torch.zeros(rows, dtype=torch.int32, device=self.device))
        self.forced = torch.zeros(rows, MAX_FORCED, dtype=torch.int32, device=self.device)
        self.temperature = torch.zeros(rows, device=self.device)
        self.top_p = torch.ones(rows, device=self.device)
        self.uniform = torch.zeros(rows, length, device=self.device)  # the draw of the token after each position
        if len(stops) > MAX_STOPS:
            raise InputError(f"at most {MAX_STOPS} stop tokens, not {len(stops)}")
        padded = [*stops, *[-1] * (MAX_STOPS - len(stops))]
        self.stops = torch.tensor(padded, dtype=torch.int32, device=self.device)
        self.log = torch.full((kernels.LOG, rows), -1, dtype=torch.int32, device=self.device)
        self.counter = torch.zeros(1, dtype=torch.int32, device=self.device)
        self.steps = 0  # the same count on the host
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self.pool = None
        self.fast = kernels.available(self.device, self.head_dim)
        if self.fast:
            self.fast = "decoding" not in verify(["decoding"], config, self.device, self.dtype, subject=self)

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.device)

    # ---- weights ---------------------------------------------------------------------------------------------------

    def load_weights(self) -> None:
        """Take the model's weights in our dtype; q, k and v become one matrix. Call `refresh` after they changed."""
        trunk, cast = self.model.model, lambda w: w.detach().to(self.dtype)
        weights = {"embed": cast(trunk.embed_tokens.weight), "head": cast(self.model.lm_head.weight)}
        for i, layer in enumerate(trunk.layers):
            attention = layer.self_attn
            joined = [cast(p.weight) for p in (attention.q_proj, attention.k_proj, attention.v_proj)]
            weights[f"qkv{i}"] = torch.cat(joined)
            weights[f"o{i}"] = cast(attention.o_proj.weight)
            weights[f"fc1{i}"], weights[f"fc2{i}"] = cast(layer.mlp.fc1.weight), cast(layer.mlp.fc2.weight)
            if hasattr(attention, "ve_gate"):
                weights[f"gate{i}"] = cast(attention.ve_gate.weight)
                weights[f"values{i}"] = cast(trunk.value_embeds[str(i)].weight)
        for name in ("resid_lambdas", "x0_lambdas", "smear_lambda", "backout_lambda"):
            if hasattr(trunk, name):
                weights[name] = getattr(trunk, name).detach().float()
        if hasattr(trunk, "smear_gate"):
            weights["smear_gate"] = cast(trunk.smear_gate.weight)
        self.w = weights

    @torch.inference_mode()
    def refresh(self) -> None:
        """Copy the model's present weights into the machine's, in place: captured graphs stay valid."""
        old = self.w
        self.load_weights()
        for name, weight in self.w.items():
            if weight.data_ptr() != old[name].data_ptr():
                old[name].copy_(weight)
        self.w = old

    # ---- the network in plain PyTorch: prefill everywhere, decoding without the kernels ---------------------------

    def norm(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (x.shape[-1],), eps=self.eps)

    def forward(self, token, prev, positions, attend) -> torch.Tensor:
        """The network without its head: ids, their predecessors, positions (B, T) -> normed hidden states (B, T, C).

        `attend(layer, q, k, v)` stores k and v (B, H_kv, T, D) and returns the attention output (B, H, T, D).
        """
        w = self.w
        x = self.norm(F.embedding(token, w["embed"]))
        if "smear_gate" in w:
            size = w["smear_gate"].shape[1]
            gate = torch.sigmoid(F.linear(x[..., :size], w["smear_gate"])) * w["smear_lambda"].to(self.dtype)
            x = x + gate * (positions > 0).unsqueeze(-1) * self.norm(F.embedding(prev, w["embed"]))
        x0 = middle = x
        cos, sin = (F.embedding(positions, table).unsqueeze(1) for table in (self.cos, self.sin))  # (B, 1, T, D/2)
        layers = self.config.num_hidden_layers
        for i in range(layers):
            if "resid_lambdas" in w:
                x = w["resid_lambdas"][i].to(self.dtype) * x + w["x0_lambdas"][i].to(self.dtype) * x0
            h = self.norm(x)
            qkv = F.linear(h, w[f"qkv{i}"]).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, heads, T, D)
            q, k, v = qkv.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
            if f"gate{i}" in w:
                size = w[f"gate{i}"].shape[1]
                gate = 3 * torch.sigmoid(F.linear(h[..., :size], w[f"gate{i}"]))  # (B, T, H_kv)
                extra = F.embedding(token, w[f"values{i}"]).unflatten(-1, (self.kv_heads, self.head_dim))
                v = v + (gate.unsqueeze(-1) * extra).transpose(1, 2)
            first, second = qkv[:, : self.heads + self.kv_heads].chunk(2, dim=-1)
            turned = torch.cat((first * cos + second * sin, second * cos - first * sin), dim=-1)
            q, k = self.norm(turned).split((self.heads, self.kv_heads), dim=1)
            x = x + F.linear(attend(i, q, k, v).transpose(1, 2).flatten(2), w[f"o{i}"])
            x = x + F.linear(F.relu(F.linear(self.norm(x), w[f"fc1{i}"])).square(), w[f"fc2{i}"])
            if i == layers // 2:
                middle = x
        if "backout_lambda" in w:
            x = (x - w["backout_lambda"] * middle).to(self.dtype)  # in float32: what is left may be small
        return self.norm(x)

    def cap(self, logits: torch.Tensor) -> torch.Tensor:
        logits = logits[..., : self.vocab].float()
        return self.softcap * torch.tanh(logits / self.softcap) if self.softcap else logits

    @torch.inference_mode()
    def prefill(self, prompts: list[list[int]], rows: list[list[int]]) -> None:
        """Run all but the last token of each prompt, once, and store the keys in every row of `rows[i]`."""
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # equal lengths together: little padding
        while order:
            some, longest = [], 0
            while order and (not some or max(longest, len(prompts[order[0]])) * (len(some) + 1) <= PREFILL_TOKENS):
                some.append(order.pop(0))
                longest = max(longest, len(prompts[some[-1]]))
            self._prefill([prompts[i][:-1] for i in some], [rows[i] for i in some])

    def _prefill(self, prompts, rows) -> None:
        lengths = [len(prompt) for prompt in prompts]
        width = max(lengths)
        if width == 0:
            return
        ids = torch.zeros(len(prompts), width, dtype=torch.long)
        for i, prompt in enumerate(prompts):
            ids[i, : len(prompt)] = torch.tensor(prompt, dtype=torch.long)
        ids = ids.to(self.device, non_blocking=True)
        sizes = torch.tensor(lengths).to(self.device)
        source = torch.tensor([i for i, group in enumerate(rows) for _ in group]).to(self.device)
        target = torch.tensor([row for group in rows for row in group]).to(self.device)
        positions = torch.arange(width, device=self.device).expand(len(prompts), -1)
        distance = positions[0][:, None] - positions[0][None, :]

        def attend(i, q, k, v):
            slots = self.k[i].shape[2]
            # the newest position that falls on each slot of the ring; a slot beyond the prompt takes what nobody reads
            slot = torch.arange(min(slots, width), device=self.device)
            newest = (slot + slots * ((sizes[:, None] - 1 - slot) // slots)).clamp(min=0)  # (B, slots)
            at = newest[:, None, :, None].expand(-1, self.kv_heads, -1, self.head_dim)
            self.k[i][target, :, : len(slot)] = k.gather(2, at)[source]
            self.v[i][target, :, : len(slot)] = v.gather(2, at)[source]
            mask = (distance >= 0) & (distance < slots) if width > slots else None
            return F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=mask,
                is_causal=mask is None,
                scale=self.scale,
                enable_gqa=self.heads != self.kv_heads,
            )

        self.forward(ids, F.pad(ids[:, :-1], (1, 0)), positions, attend)

    # ---- rows ------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def admit(self, requests: dict[int, SlotRequest]) -> None:
        """Put requests into rows: prefill each different prompt once, then set the rows' state. Needs free rows."""
        groups: dict[tuple, list[int]] = {}
        for row, request in requests.items():
            groups.setdefault(tuple(request.prompt), []).append(row)
        self.prefill([list(prompt) for prompt in groups], list(groups.values()))
        rows = torch.tensor(list(requests)).to(self.device)

        def write(name, values, dtype=torch.int32):
            getattr(self, name)[rows] = torch.as_tensor(values, dtype=dtype).to(self.device, non_blocking=True)

        asked = list(requests.values())
        write("token", [r.prompt[-1] for r in asked])
        write("prev", [r.prompt[-2] if len(r.prompt) > 1 else 0 for r in asked])
        write("pos", [len(r.prompt) - 1 for r in asked])
        write("last", [self.last_position(r) for r in asked])
        write("forced_at", [0] * len(asked))
        write("forced_size", [0] * len(asked))
        write("top_k", [r.top_k for r in asked])
        write("top_p", [r.top_p for r in asked], torch.float32)
        write("temperature", [r.temperature for r in asked], torch.float32)
        if any(r.temperature > 0 for r in asked):
            uniform = torch.zeros(len(asked), self.length)
            for draws, r in zip(uniform, asked):
                first, stop = len(r.prompt) - 1, self.last_position(r)
                draws[first:stop] = torch.rand(stop - first, generator=torch.Generator().manual_seed(r.seed))
            write("uniform", uniform, torch.float32)
        write("active", [1] * len(asked))

    def last_position(self, row: SlotRequest) -> int:
        """Where a row must stop: its budget is used up, or its cache is full."""
        return min(len(row.prompt) - 1 + row.max_new_tokens, self.length - 1)

    @torch.inference_mode()
    def resume(self, row: int, forced: list[int]) -> None:
        """Let a row that stopped at a stop token go on, first with the `forced` ids (at most 512 of them)."""
        forced = forced[:MAX_FORCED]
        self.forced[row, : len(forced)] = torch.tensor(forced, dtype=torch.int32).to(self.device)
        self.forced_at[row], self.forced_size[row] = 0, len(forced)
        self.active[row] = 1

    @torch.inference_mode()
    def release(self, row: int) -> None:
        """Stop a row at once."""
        self.active[row] = 0

    # ---- steps -----------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self, rows: int, bound: int) -> None:
        """One step of the first `rows` rows; `bound` is one more than the highest position among them."""
        if self.fast:
            if rows not in self.graphs:
                self.capture(rows)
            self.graphs[rows].replay()
        else:
            self.plain_step(rows, bound)
        self.steps += 1

    def plain_step(self, rows: int, bound: int) -> torch.Tensor:
        """The same in PyTorch -> the logits (rows, V), softcapped."""
        state = {name: getattr(self, name)[:rows] for name in STATE}
        pos, running = state["pos"].long(), state["active"] > 0
        index = torch.arange(rows, device=self.device)

        def attend(i, q, k, v):
            slots = self.k[i].shape[2]
            self.k[i][index, :, pos % slots], self.v[i][index, :, pos % slots] = k[:, :, 0], v[:, :, 0]
            size = min(slots, bound)
            mask = torch.arange(size, device=self.device) <= pos[:, None]  # all True once a ring is full
            return F.scaled_dot_product_attention(
                q, self.k[i][:rows, :, :size], self.v[i][:rows, :, :size], attn_mask=mask[:, None, None, :],
                scale=self.scale, enable_gqa=self.heads != self.kv_heads,
            )  # fmt: skip

        token, prev = state["token"].long()[:, None], state["prev"].long()[:, None]
        hidden = self.forward(token, prev, pos[:, None], attend)[:, 0]
        logits = self.cap(F.linear(hidden, self.w["head"]))
        draw = self.uniform[:rows].gather(1, pos[:, None])[:, 0]
        picked = sample_next_token(logits, draw, self.temperature[:rows], state["top_k"], self.top_p[:rows]).int()
        told = state["forced_at"] < state["forced_size"]
        waiting = self.forced[:rows].gather(1, state["forced_at"].long().clamp(max=MAX_FORCED - 1)[:, None])[:, 0]
        picked = torch.where(told, waiting, picked)
        self.log[self.steps % kernels.LOG].fill_(-1)
        self.log[self.steps % kernels.LOG, :rows] = torch.where(running, picked, -1)
        stop = (picked[:, None] == self.stops).any(1) & ~told
        state["prev"].copy_(torch.where(running, state["token"], state["prev"]))
        state["token"].copy_(torch.where(running, picked, state["token"]))
        state["pos"].add_(running.int())
        state["forced_at"].add_((running & told).int())
        state["active"].copy_(running & ~stop & (state["pos"] < state["last"]))
        return logits

    def fast_step(self, rows: int) -> torch.Tensor:
        """The launches of one step on CUDA; recorded once a number of rows, then replayed -> the raw logits."""
        w, k, size = self.w, kernels, self.config.hidden_size
        empty = self.empty
        block = 1 << (size - 1).bit_length()
        warps = 4 if block <= 2048 else 8
        x, x0, h = empty(rows, size), empty(rows, size), empty(rows, size)
        none = self.stops  # a pointer for arguments that a kernel without the feature never reads
        resid, initial = w.get("resid_lambdas"), w.get("x0_lambdas")
        smear = w.get("smear_gate")
        k.embed_kernel[(rows,)](
            self.token, self.prev, self.pos, self.counter, w["embed"],
            none if smear is None else smear, w.get("smear_lambda", none), w.get("resid_lambdas", none),
            w.get("x0_lambdas", none), x, x0, h, size, 0 if smear is None else smear.shape[1], self.eps,
            SMEAR=smear is not None, LAMBDAS=resid is not None, BLOCK=block, num_warps=warps,
        )  # fmt: skip
        layers, heads, kv_heads, dim = self.config.num_hidden_layers, self.heads, self.kv_heads, self.head_dim
        tile, wide = (16, 32) if rows <= 16 else (32, 32) if rows <= 32 else (64, 64)  # measured on an H200
        middle = x
        for i in range(layers):
            slots = self.k[i].shape[2]
            qkv, q = h @ w[f"qkv{i}"].t(), empty(rows, heads * dim)
            gate = w.get(f"gate{i}")
            k.place_kernel[(rows, heads + 2 * kv_heads)](
                qkv, h, self.token, self.pos, self.cos, self.sin, w.get(f"values{i}", h),
                h if gate is None else gate, q, self.k[i], self.v[i],
                size, 0 if gate is None else gate.shape[1], slots, self.eps,
                HEADS=heads, KV_HEADS=kv_heads, HALF=dim // 2, VALUES=gate is not None, GATE=16, num_warps=1,
            )  # fmt: skip
            splits = self.splits(rows, slots)
            y = empty(rows, heads * dim)
            part = empty(rows * heads, splits, dim, dtype=torch.float32) if splits > 1 else y
            sums, bests = (empty(rows * heads, splits, dtype=torch.float32) for _ in range(2))
            k.attend_kernel[(rows * heads, splits)](
                q, self.k[i], self.v[i], self.pos, part, sums, bests, slots, self.scale,
                HEADS=heads, GROUP=heads // kv_heads, DIM=dim, SPLITS=splits, BLOCK=32, num_warps=2,
            )  # fmt: skip
            if splits > 1:
                k.join_kernel[(rows * heads,)](part, sums, bests, y, DIM=dim, SPLITS=splits, num_warps=4)
            x.addmm_(y, w[f"o{i}"].t())
            inner = empty(rows, len(w[f"fc1{i}"]))
            k.up_kernel[(-(-inner.shape[1] // wide), -(-rows // tile))](
                x, w[f"fc1{i}"], inner, rows, size, inner.shape[1], self.eps,
                ROWS=tile, COLUMNS=wide, CHANNELS=256 // self.dtype.itemsize, num_warps=4, num_stages=3,
            )  # fmt: skip
            x.addmm_(inner, w[f"fc2{i}"].t())
            if i == layers // 2:
                middle = x if resid is not None else x.clone()  # the mix below writes to a new tensor, else x goes on
            mixed, scales, mode = x, (none, none), 0
            if i + 1 < layers and resid is not None:
                mixed, scales, mode = torch.empty_like(x), (resid[i + 1], initial[i + 1]), 1
            elif i + 1 == layers and "backout_lambda" in w:
                scales, mode = (none, w["backout_lambda"]), 2
            other = middle if mode == 2 else x0
            k.mix_kernel[(rows,)](x, other, *scales, mixed, h, size, self.eps, MODE=mode, BLOCK=block, num_warps=warps)
            x = mixed
        logits = h @ w["head"].t()
        block = 1 << (self.vocab - 1).bit_length()
        k.sample_kernel[(rows,)](
            logits, self.token, self.prev, self.pos, self.last, self.active, self.forced, self.forced_at,
            self.forced_size, self.temperature, self.top_k, self.top_p, self.uniform, self.stops, self.log,
            self.counter, self.vocab, logits.stride(0), self.softcap, MAX_FORCED, self.length, self.rows,
            CAPPED=self.softcap > 0, STOPS=MAX_STOPS, STEPS=k.LOG, FLOOR=k.NEGLIGIBLE, BLOCK=block,
            num_warps=32 if block > 8192 else 8,
        )  # fmt: skip
        return logits

    def splits(self, rows: int, slots: int) -> int:
        """Into how many shares attention cuts the keys of a row: enough programs for the device, a power of two."""
        wanted = min(4 * self.processors // (rows * self.heads), slots // 64, 32)
        return 1 << max(wanted, 1).bit_length() - 1

    @torch.inference_mode()
    def capture(self, rows: int) -> None:
        """Record one step of `rows` rows as a CUDA graph. The trial steps before it leave no trace in the state.

        Replicas on other GPUs work in other threads at the same time, and a process may capture one graph at a time:
        hence the lock, a stream of this device's own (PyTorch's default one for captures belongs to the device that
        came first), and errors only for what this thread does meanwhile.
        """
        saved = {name: getattr(self, name).clone() for name in (*STATE, "counter", "log")}
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):  # compiles the kernels and lets cuBLAS allocate, which a capture must not do
            self.active.zero_()
            for _ in range(2):
                self.fast_step(rows)
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        with CAPTURING, torch.cuda.graph(graph, self.pool, stream, capture_error_mode="thread_local"):
            self.fast_step(rows)
        for name, value in saved.items():
            getattr(self, name).copy_(value)
        self.graphs[rows] = graph

    def tokens_since(self, first: int) -> torch.Tensor:
        """The log of the steps from `first` to now, (steps, rows), -1 where a row was not running; on the device.

        The two must lie in one round of the log: first // 64 == (steps - 1) // 64.
        """
        return self.log[first % kernels.LOG : (self.steps - 1) % kernels.LOG + 1]

    def bytes_per_step(self, lengths: list[int]) -> int:
        """Bytes that one step must read: every matrix once, and the keys and values of rows of these lengths."""
        matrices = sum(w.numel() for name, w in self.w.items() if re.match(r"qkv|o\d|fc|head", name))
        keys = sum(min(n, cache.shape[2]) for n in lengths for cache in self.k)
        return (matrices + keys * 2 * self.kv_heads * self.head_dim) * self.dtype.itemsize
