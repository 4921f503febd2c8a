"""Batched decoding of a nanochat model: weights, KV caches and sampling state of many slots, one step for all at once.

`model.generate` launches about 400 kernels per token and synchronizes with the device after each one. Here a step on
CUDA replays one CUDA graph of five to ten kernels per layer (`kernels/decode.py`), sampling included. All state is on
the device; the host reads a log of tokens a few steps later. Elsewhere `plain_step` computes the same in PyTorch.

A slot is the place of one request in the batch. In a sliding-window layer its KV cache is a ring buffer of the
window's size, in a full-attention layer it has `length` entries. Keys are stored rotated, so their order does not
matter. An active slot feeds `token` at `pos` and takes its next forced token, or samples. It becomes inactive after a
stop token or at position `last`. An inactive slot repeats its last step without effect: shapes never change.
"""

import threading
from dataclasses import dataclass, field
from types import SimpleNamespace

import psutil
import torch
import torch.nn.functional as F

from ..errors import InputError
from ..kernels import decode as kernels
from ..kernels import fused_decode
from ..kernels.backend import disabled, triton, verify
from ..loading import is_quantized

MAX_FORCED = 512  # tokens that can wait to be put into a slot (a tool's result)
MAX_STOPS = 8
PREFILL_TOKENS = 32768  # prompt tokens of one forward pass
CAPTURE_LOCK = threading.Lock()


def row_block(size: int) -> dict:
    """Options of a kernel with one program per row of `size` values."""
    block = 1 << (size - 1).bit_length()
    return {"BLOCK": block, "num_warps": 4 if block <= 2048 else 8}


@dataclass(eq=False)
class Request:
    """One completion to generate; `tokens` and `finish_reason` fill while it runs.

    max_new_tokens counts everything after the prompt, tool results included. temperature 0 is greedy; top_k 0 and
    top_p 1 switch these off. The same seed gives the same completion, whatever is generated beside it.
    """

    prompt: list[int]
    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    tools: bool = True
    stop_at_call: bool = False  # end with finish_reason "tool_calls", for callers who run the tool themselves
    tokens: list[int] = field(default_factory=list)  # the stop token, if one came, is the last
    finish_reason: str | None = None  # "stop", "length", "tool_calls" or "cancelled"
    cancelled: bool = False  # set it (from any thread) to end the request early


class SlotState:
    """Tensors on the device that a step reads and updates; int32 of shape (slots,) unless noted."""

    def __init__(self, slots: int, length: int, stops: list[int], device: torch.device):
        def zeros(*shape: int, dtype=torch.int32):
            return torch.zeros(shape, dtype=dtype, device=device)

        self.token, self.prev, self.pos = zeros(slots), zeros(slots), zeros(slots)  # to feed, the one before, where
        self.active, self.last = zeros(slots), zeros(slots)  # `last`: the position at which the slot must stop
        self.forced, self.forced_at, self.forced_size = zeros(slots, MAX_FORCED), zeros(slots), zeros(slots)
        self.temperature, self.top_k = zeros(slots, dtype=torch.float32), zeros(slots)
        self.top_p = zeros(slots, dtype=torch.float32) + 1
        self.uniform = zeros(slots, length, dtype=torch.float32)  # the draw of the token after each position
        self.stops = torch.tensor([*stops, *[-1] * (MAX_STOPS - len(stops))], dtype=torch.int32, device=device)
        self.log = zeros(kernels.LOG_STEPS, slots) - 1  # the tokens of the last steps; -1 where a slot was inactive
        self.counter = zeros(1)  # steps done, for the kernels

    def views(self, slots: int) -> SimpleNamespace:
        """The tensors of the first `slots` slots."""
        shared = ("stops", "log", "counter")
        return SimpleNamespace(**{name: x[:slots] for name, x in vars(self).items() if name not in shared})

    def reset(self, **values: float) -> None:
        """Fill the named tensors; all others become 0, but for stops and the log."""
        for name, tensor in vars(self).items():
            if name != "stops":
                tensor.fill_(-1 if name == "log" else values.get(name, 0))


class Decoder:
    """Weights, KV caches and state of `slots` slots of at most `length` tokens each, prompt included.

    Args:
        model: a `NanoChatForCausalLM`, ours or transformers' own (model_type `nanochat_hf` or `nanochat`).
        stops: at most 8 token ids that end or pause a slot.
        dtype: bfloat16 on CUDA unless given, else the model's. Weights already in it are shared, not copied.

    Raises InputError for another architecture, quantized weights, or caches that do not fit into memory.
    """

    @torch.inference_mode()
    def __init__(self, model, slots: int, length: int, stops: list[int], dtype: torch.dtype | None = None):
        config = self.config = model.config
        if config.model_type not in ("nanochat_hf", "nanochat") or getattr(config, "attention_bias", False):
            reason = f"fast generation supports nanochat models, not {config.model_type!r} with this configuration"
            raise InputError(f"{reason}: use transformers' own generate for it (adapters: merge_and_unload first)")
        if is_quantized(model):
            advice = "use transformers' own generate or `pipeline`, or take the model that was quantized"
            raise InputError(f"this model is quantized, and fast generation needs the weights themselves: {advice}")
        if len(stops) > MAX_STOPS:
            raise InputError(f"at most {MAX_STOPS} stop tokens, not {len(stops)}")
        self.model, self.slots, self.length = model, slots, length
        self.device = model.model.embed_tokens.weight.device
        cuda = self.device.type == "cuda"
        self.dtype = dtype or (torch.bfloat16 if cuda else model.dtype)
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        self.eps, self.softcap = config.rms_norm_eps, config.final_logit_softcapping or 0.0
        self.scale = getattr(config, "qk_scale", 1.0) ** 2 * self.head_dim**-0.5
        self.vocab = getattr(config, "num_tokens", None) or config.vocab_size
        self.processors = torch.cuda.get_device_properties(self.device).multi_processor_count if cuda else 1
        self.w = self.cast_weights()
        self.k, self.v = self.allocate_caches()
        rotary = model.model.rotary_emb
        angles = torch.arange(length, device=self.device).float()[:, None] * rotary.inv_freq.float()
        self.cos = (angles.cos() * rotary.attention_scaling).to(self.dtype)  # (length, D/2)
        self.sin = (angles.sin() * rotary.attention_scaling).to(self.dtype)
        self.state = SlotState(slots, length, stops, self.device)
        self.steps = 0  # the counter on the host
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self.pool = None
        self.fast = triton is not None and cuda and self.head_dim & (self.head_dim - 1) == 0  # a power of two
        if self.fast:
            names = ["decoding", *([kernels.FUSED] if fused_decode.MAX_SLOTS else [])]
            self.fast = "decoding" not in verify(names, config, self.device, self.dtype, subject=self)

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.device)

    def allocate_caches(self) -> list[list[torch.Tensor]]:
        """Keys and values per layer, each (slots, H_kv, min(window, length), D)."""
        config, length = self.config, self.length
        types = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
        sizes = [min(length, config.sliding_window) if t == "sliding_attention" else length for t in types]
        shapes = [(self.slots, self.kv_heads, size, self.head_dim) for size in sizes]
        gib = 2 * sum(sizes) * self.slots * self.kv_heads * self.head_dim * self.dtype.itemsize / 2**30
        try:
            if self.device.type == "cpu" and gib > psutil.virtual_memory().available / 2**30:  # no allocation fails
                raise torch.OutOfMemoryError
            return [[self.empty(*shape).zero_() for shape in shapes] for _ in range(2)]
        except torch.OutOfMemoryError:
            needed = f"the KV caches of {self.slots} slots of {length} tokens need {gib:.1f} GiB"
            raise InputError(f"{needed}, more than is free: lower the batch size or the length") from None

    # ---- weights ---------------------------------------------------------------------------------------------------

    def cast_weights(self) -> dict[str, torch.Tensor]:
        """The model's weights in the decoder's dtype; q, k and v become one matrix."""
        network, cast = self.model.model, lambda w: w.detach().to(self.dtype)
        weights = {"embed": cast(network.embed_tokens.weight), "head": cast(self.model.lm_head.weight)}
        for i, layer in enumerate(network.layers):
            attention = layer.self_attn
            joined = [cast(p.weight) for p in (attention.q_proj, attention.k_proj, attention.v_proj)]
            weights[f"qkv{i}"] = torch.cat(joined)
            weights[f"o{i}"] = cast(attention.o_proj.weight)
            weights[f"fc1{i}"], weights[f"fc2{i}"] = cast(layer.mlp.fc1.weight), cast(layer.mlp.fc2.weight)
            if hasattr(attention, "ve_gate"):
                weights[f"gate{i}"] = cast(attention.ve_gate.weight)
                weights[f"values{i}"] = cast(network.value_embeds[str(i)].weight)
        for name in ("resid_lambdas", "x0_lambdas", "smear_lambda", "backout_lambda"):
            if hasattr(network, name):
                weights[name] = getattr(network, name).detach().float()
        if hasattr(network, "smear_gate"):
            weights["smear_gate"] = cast(network.smear_gate.weight)
        return weights

    @torch.inference_mode()
    def sync_weights(self) -> None:
        """Copy the model's present weights into the decoder's, in place: captured graphs stay valid."""
        for name, weight in self.cast_weights().items():
            if weight.data_ptr() != self.w[name].data_ptr():
                self.w[name].copy_(weight)

    # ---- the network in plain PyTorch: prefill everywhere, decoding without the kernels ----------------------------

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
            rotated = torch.cat((first * cos + second * sin, second * cos - first * sin), dim=-1)
            q, k = self.norm(rotated).split((self.heads, self.kv_heads), dim=1)
            x = x + F.linear(attend(i, q, k, v).transpose(1, 2).flatten(2), w[f"o{i}"])
            x = x + F.linear(F.relu(F.linear(self.norm(x), w[f"fc1{i}"])).square(), w[f"fc2{i}"])
            if i == layers // 2:
                middle = x
        if "backout_lambda" in w:
            x = (x - w["backout_lambda"] * middle).to(self.dtype)  # in float32: the difference may be small
        return self.norm(x)

    def attention(self, q, k, v, mask, is_causal: bool = False) -> torch.Tensor:
        options = {"is_causal": is_causal, "scale": self.scale, "enable_gqa": self.heads != self.kv_heads}
        return F.scaled_dot_product_attention(q, k, v, mask, **options)

    def softcap_logits(self, logits: torch.Tensor) -> torch.Tensor:
        logits = logits[..., : self.vocab].float()
        return self.softcap * torch.tanh(logits / self.softcap) if self.softcap else logits

    def prefill(self, slots_of: dict[tuple[int, ...], list[int]]) -> None:
        """Run all but the last token of each prompt, once, and store the keys in all slots that share the prompt."""
        order = sorted(slots_of, key=len)  # equal lengths together: little padding
        while order:
            size = 1
            while size < len(order) and (size + 1) * len(order[size]) <= PREFILL_TOKENS:
                size += 1
            if len(order[size - 1]) > 1:
                self._prefill([prompt[:-1] for prompt in order[:size]], [slots_of[prompt] for prompt in order[:size]])
            order = order[size:]

    def _prefill(self, prompts: list[tuple[int, ...]], slots: list[list[int]]) -> None:
        width = len(prompts[-1])
        ids = torch.tensor([[*prompt, *[0] * (width - len(prompt))] for prompt in prompts]).to(self.device)
        sizes = torch.tensor([len(prompt) for prompt in prompts]).to(self.device)
        source = torch.tensor([i for i, group in enumerate(slots) for _ in group]).to(self.device)
        target = torch.tensor([slot for group in slots for slot in group]).to(self.device)
        positions = torch.arange(width, device=self.device).expand(len(prompts), -1)
        distance = positions[0][:, None] - positions[0][None, :]

        def attend(i, q, k, v):
            size = self.k[i].shape[2]
            # the newest position of each ring-buffer entry; an entry beyond the prompt gets what is never read
            entry = torch.arange(min(size, width), device=self.device)
            newest = (entry + size * ((sizes[:, None] - 1 - entry) // size)).clamp(min=0)  # (B, entries)
            index = newest[:, None, :, None].expand(-1, self.kv_heads, -1, self.head_dim)
            self.k[i][target, :, : len(entry)] = k.gather(2, index)[source]
            self.v[i][target, :, : len(entry)] = v.gather(2, index)[source]
            mask = (distance >= 0) & (distance < size) if width > size else None
            return self.attention(q, k, v, mask, is_causal=mask is None)

        self.forward(ids, F.pad(ids[:, :-1], (1, 0)), positions, attend)

    # ---- slots -----------------------------------------------------------------------------------------------------

    def budget(self, request: Request) -> int:
        """New tokens that a request may have: its own limit, or what is left of the context."""
        return min(request.max_new_tokens, self.length - len(request.prompt))

    @torch.inference_mode()
    def schedule(self, requests: dict[int, Request]) -> None:
        """Put requests into free slots: prefill each different prompt once, then set the slots' state."""
        slots_of: dict[tuple[int, ...], list[int]] = {}
        for slot, request in requests.items():
            slots_of.setdefault(tuple(request.prompt), []).append(slot)
        self.prefill(slots_of)
        slots = torch.tensor(list(requests)).to(self.device)

        def write(name, values):
            tensor = getattr(self.state, name)
            tensor[slots] = torch.as_tensor(values, dtype=tensor.dtype).to(self.device, non_blocking=True)

        batch = list(requests.values())
        firsts = [len(r.prompt) - 1 for r in batch]
        lasts = [first + self.budget(r) for first, r in zip(firsts, batch)]
        write("token", [r.prompt[-1] for r in batch])
        write("prev", [r.prompt[-2] if len(r.prompt) > 1 else 0 for r in batch])
        write("pos", firsts)
        write("last", lasts)
        write("forced_size", [0] * len(batch))
        for name in ("temperature", "top_k", "top_p"):
            write(name, [getattr(r, name) for r in batch])
        if any(r.temperature > 0 for r in batch):
            uniform = torch.zeros(len(batch), self.length)
            for draws, first, last, r in zip(uniform, firsts, lasts, batch):
                draws[first:last] = torch.rand(last - first, generator=torch.Generator().manual_seed(r.seed))
            write("uniform", uniform)
        write("active", [1] * len(batch))

    @torch.inference_mode()
    def resume(self, slot: int, forced: list[int]) -> None:
        """Continue a slot that stopped at a stop token, first with the `forced` ids (at most 512 of them)."""
        state, forced = self.state, forced[:MAX_FORCED]
        state.forced[slot, : len(forced)] = torch.tensor(forced, dtype=torch.int32).to(self.device)
        state.forced_at[slot], state.forced_size[slot], state.active[slot] = 0, len(forced), 1

    @torch.inference_mode()
    def release(self, slot: int) -> None:
        """Stop a slot at once."""
        self.state.active[slot] = 0

    # ---- steps -----------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self, slots: int, bound: int) -> None:
        """One step of the first `slots` slots; `bound` is one more than the highest position among them."""
        if not self.fast:
            self.plain_step(slots, bound)
        else:
            if slots not in self.graphs:
                self.capture(slots)
            self.graphs[slots].replay()
        self.steps += 1

    def plain_step(self, slots: int, bound: int) -> torch.Tensor:
        """The step in PyTorch. Returns: the logits (slots, V), softcapped."""
        s, log = self.state.views(slots), self.state.log[self.steps % kernels.LOG_STEPS]
        index, running, position = torch.arange(slots, device=self.device), s.active > 0, s.pos.long()

        def attend(i, q, k, v):
            entry = position % self.k[i].shape[2]
            self.k[i][index, :, entry], self.v[i][index, :, entry] = k[:, :, 0], v[:, :, 0]
            size = min(self.k[i].shape[2], bound)
            mask = torch.arange(size, device=self.device) <= position[:, None]  # all True once a ring is full
            return self.attention(q, self.k[i][:slots, :, :size], self.v[i][:slots, :, :size], mask[:, None, None])

        hidden = self.forward(s.token.long()[:, None], s.prev.long()[:, None], position[:, None], attend)[:, 0]
        logits = self.softcap_logits(F.linear(hidden, self.w["head"]))
        draw = s.uniform.gather(1, position[:, None])[:, 0]
        picked = kernels.sample_next_token(logits, draw, s.temperature, s.top_k, s.top_p).int()
        is_forced = s.forced_at < s.forced_size
        next_forced = s.forced.gather(1, s.forced_at.long().clamp(max=MAX_FORCED - 1)[:, None])[:, 0]
        picked = torch.where(is_forced, next_forced, picked)
        log.fill_(-1)
        log[:slots] = torch.where(running, picked, -1)
        stop = (picked[:, None] == self.state.stops).any(1) & ~is_forced
        s.prev.copy_(torch.where(running, s.token, s.prev))
        s.token.copy_(torch.where(running, picked, s.token))
        s.pos.add_(running.int())
        s.forced_at.add_((running & is_forced).int())
        s.active.copy_(running & ~stop & (s.pos < s.last))
        return logits

    def fast_step(self, slots: int) -> torch.Tensor:
        """The launches of one step on CUDA, recorded once per number of slots. Returns: the raw logits."""
        w, k, s, size = self.w, kernels, self.state, self.config.hidden_size
        x, x0, h = (self.empty(slots, size) for _ in range(3))
        none = s.stops  # a pointer for arguments that a kernel without the feature never reads
        smear = w.get("smear_gate")
        k.embed_kernel[(slots,)](
            s.token, s.prev, s.pos, s.counter, w["embed"],
            none if smear is None else smear, w.get("smear_lambda", none), w.get("resid_lambdas", none),
            w.get("x0_lambdas", none), x, x0, h, size, 0 if smear is None else smear.shape[1], self.eps,
            SMEAR=smear is not None, LAMBDAS="resid_lambdas" in w, **row_block(size),
        )  # fmt: skip
        fused = slots <= fused_decode.MAX_SLOTS and kernels.FUSED not in disabled
        logits = fused_decode.network(self, x, x0, slots) if fused else self._network(x, x0, h)
        block = 1 << (self.vocab - 1).bit_length()
        k.sample_kernel[(slots,)](
            logits, s.token, s.prev, s.pos, s.last, s.active, s.forced, s.forced_at, s.forced_size, s.temperature,
            s.top_k, s.top_p, s.uniform, s.stops, s.log, s.counter, self.vocab, logits.stride(0), self.softcap,
            MAX_FORCED, self.length, self.slots,
            CAPPED=self.softcap > 0, STOPS=MAX_STOPS, STEPS=k.LOG_STEPS, FLOOR=k.NEGLIGIBLE, BLOCK=block,
            num_warps=32 if block > 8192 else 8,
        )  # fmt: skip
        return logits

    def _network(self, x: torch.Tensor, x0: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        """Layers and head with cuBLAS: the residual stream x before the first layer, its norm h -> raw logits."""
        w, (slots, size), layers, none = self.w, x.shape, self.config.num_hidden_layers, self.state.stops
        resid, initial = w.get("resid_lambdas"), w.get("x0_lambdas")
        middle = x
        for i in range(layers):
            x.addmm_(self._launch_attention(i, h), w[f"o{i}"].t())
            x.addmm_(self._launch_mlp_up(i, x), w[f"fc2{i}"].t())
            if i == layers // 2:
                # The mix below writes to a new tensor, or else in place.
                middle = x if resid is not None else x.clone()
            mixed, scales, mode = x, (none, none), 0
            if i + 1 < layers and resid is not None:
                mixed, scales, mode = torch.empty_like(x), (resid[i + 1], initial[i + 1]), 1
            elif i + 1 == layers and "backout_lambda" in w:
                scales, mode = (none, w["backout_lambda"]), 2
            other = middle if mode == 2 else x0
            kernels.residual_kernel[(slots,)](
                x, other, *scales, mixed, h, size, self.eps, MODE=mode, **row_block(size)
            )
            x = mixed
        return h @ w["head"].t()

    def _launch_attention(self, i: int, h: torch.Tensor) -> torch.Tensor:
        """Attention of layer i for normed inputs h (slots, C). Returns: its output before the projection."""
        w, k, s, slots, size = self.w, kernels, self.state, len(h), self.k[i].shape[2]
        heads, kv_heads, dim = self.heads, self.kv_heads, self.head_dim
        qkv, q, y = h @ w[f"qkv{i}"].t(), self.empty(slots, heads * dim), self.empty(slots, heads * dim)
        gate = w.get(f"gate{i}")
        k.rope_cache_kernel[(slots, heads + 2 * kv_heads)](
            qkv, h, s.token, s.pos, self.cos, self.sin, w.get(f"values{i}", h),
            h if gate is None else gate, q, self.k[i], self.v[i],
            h.shape[1], 0 if gate is None else gate.shape[1], size, self.eps,
            HEADS=heads, KV_HEADS=kv_heads, HALF=dim // 2, VALUES=gate is not None, GATE=16, num_warps=1,
        )  # fmt: skip
        splits = self.splits(slots, size)
        part = self.empty(slots * heads, splits, dim, dtype=torch.float32) if splits > 1 else y
        sums, bests = (self.empty(slots * heads, splits, dtype=torch.float32) for _ in range(2))
        k.attention_kernel[(slots * heads, splits)](
            q, self.k[i], self.v[i], s.pos, part, sums, bests, size, self.scale,
            HEADS=heads, GROUP=heads // kv_heads, DIM=dim, SPLITS=splits, BLOCK=k.ATTENTION["block"],
            num_warps=k.ATTENTION["warps"],
        )  # fmt: skip
        if splits > 1:
            k.combine_kernel[(slots * heads,)](part, sums, bests, y, DIM=dim, SPLITS=splits, num_warps=4)
        return y

    def _launch_mlp_up(self, i: int, x: torch.Tensor) -> torch.Tensor:
        """relu(norm(x) fc1^T)^2 of layer i."""
        slots, size = x.shape
        tile, wide = (16, 32) if slots <= 16 else (32, 32) if slots <= 32 else (64, 64)  # measured on an H200
        inner = self.empty(slots, len(self.w[f"fc1{i}"]))
        kernels.mlp_up_kernel[(-(-inner.shape[1] // wide), -(-slots // tile))](
            x, self.w[f"fc1{i}"], inner, slots, size, inner.shape[1], self.eps,
            ROWS=tile, COLUMNS=wide, CHANNELS=256 // self.dtype.itemsize, num_warps=4, num_stages=3,
        )  # fmt: skip
        return inner

    def splits(self, slots: int, size: int) -> int:
        """Into how many parts attention splits the keys of a slot: enough programs for the device, a power of two."""
        tuning = kernels.ATTENTION
        most = min(tuning["programs"] * self.processors // (slots * self.heads), size // tuning["split"], 32)
        return 1 << max(most, 1).bit_length() - 1

    @torch.inference_mode()
    def capture(self, slots: int) -> None:
        """Record one step of `slots` slots as a CUDA graph. The trial steps before it leave no trace in the state.

        Replicas on other GPUs work in other threads, and a process may capture one graph at a time. Hence the lock and
        the capture error mode. The stream is of this device: PyTorch's default for captures is of the first one.
        """
        before = {name: tensor.clone() for name, tensor in vars(self.state).items()}
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):  # compiles the kernels and lets cuBLAS allocate, which a capture must not do
            self.state.active.zero_()
            for _ in range(2):
                self.fast_step(slots)
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        with CAPTURE_LOCK, torch.cuda.graph(graph, self.pool, stream, capture_error_mode="thread_local"):
            self.fast_step(slots)
        for name, tensor in before.items():
            getattr(self.state, name).copy_(tensor)
        self.graphs[slots] = graph

    def tokens_since(self, first: int) -> torch.Tensor:
        """The log of the steps from `first` to now, (steps, slots), -1 where a slot was inactive; on the device.

        The two must be in one round of the log: first // 64 == (steps - 1) // 64.
        """
        return self.state.log[first % kernels.LOG_STEPS : (self.steps - 1) % kernels.LOG_STEPS + 1]
