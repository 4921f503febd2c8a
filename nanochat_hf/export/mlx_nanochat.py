"""The nanochat model for MLX (Apple silicon): loaded by mlx-lm beside a checkpoint, for both generations.

config.json of an exported folder names this file as `model_file`, so that mlx-lm runs it with `trust_remote_code`.
What the network computes, and the sources, stand at the head of modeling_nanochat.py; here only what MLX differs in:
- The cache has one entry per layer, and a last one with the previous token's embedding for the smear.
- `sanitize` moves each table of value embeddings into its layer: MLX reads a number in a name as an index of a list.
- Masks come from the caches of mlx-lm, so prompts in chunks, batches with padding and prompt caches work.

This file imports only mlx and mlx-lm.
"""

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import BaseModelArgs, create_attention_mask, create_ssm_mask, scaled_dot_product_attention
from mlx_lm.models.cache import ArraysCache, KVCache, RotatingKVCache

SMEAR_GATE_CHANNELS, VALUE_GATE_CHANNELS = 24, 12  # as in configuration_nanochat.py


@dataclass
class ModelArgs(BaseModelArgs):
    """The fields of config.json that the network needs, under their names there."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_parameters: dict
    layer_types: list
    qk_scale: float
    value_embeds: bool
    smear: bool
    residual_lambdas: bool
    backout: bool
    num_tokens: int | None = None
    final_logit_softcapping: float | None = None
    sliding_window: int | None = None

    def has_value_embed(self, layer: int) -> bool:
        return self.value_embeds and (self.num_hidden_layers - 1 - layer) % 2 == 0


class Attention(nn.Module):
    """Attention with QK norm after RoPE; some layers have gated value embeddings of the token."""

    def __init__(self, args: ModelArgs, layer: int):
        super().__init__()
        self.args, width = args, args.hidden_size
        q_size, kv_size = args.num_attention_heads * args.head_dim, args.num_key_value_heads * args.head_dim
        self.q_proj = nn.Linear(width, q_size, bias=False)
        self.k_proj = nn.Linear(width, kv_size, bias=False)
        self.v_proj = nn.Linear(width, kv_size, bias=False)
        self.o_proj = nn.Linear(q_size, width, bias=False)
        if args.has_value_embed(layer):
            self.ve_gate = nn.Linear(VALUE_GATE_CHANNELS, args.num_key_value_heads, bias=False)
            self.value_embed = nn.Embedding(args.vocab_size, kv_size)
        exponents = mx.arange(0, args.head_dim, 2, dtype=mx.float32) / args.head_dim
        self._wavelengths = -mx.power(args.rope_parameters["rope_theta"], exponents)  # negative: rotates by -angle

    def rotate_and_norm(self, x: mx.array, offset) -> mx.array:
        rope = {"traditional": False, "base": None, "scale": 1.0, "freqs": self._wavelengths}
        x = mx.fast.rope(x, self.args.head_dim, offset=offset, **rope)
        return mx.fast.rms_norm(x, None, self.args.rms_norm_eps)

    def __call__(self, x: mx.array, inputs: mx.array, mask, cache) -> mx.array:
        """x (B, T, C), token ids (B, T) -> (B, T, C)."""
        args, batch, length = self.args, *x.shape[:2]
        q, k, v = (m(x).reshape(batch, length, -1, args.head_dim) for m in (self.q_proj, self.k_proj, self.v_proj))
        if "value_embed" in self:
            gate = 3 * mx.sigmoid(self.ve_gate(x[..., :VALUE_GATE_CHANNELS]))  # (B, T, H_kv)
            v = v + gate[..., None] * self.value_embed(inputs).astype(x.dtype).reshape(v.shape)
        q, k, v = (part.transpose(0, 2, 1, 3) for part in (q, k, v))  # (B, H, T, D)
        offset = cache.offset if cache is not None else 0
        q, k = self.rotate_and_norm(q, offset), self.rotate_and_norm(k, offset)
        if cache is not None:
            k, v = cache.update_and_fetch(k, v)
        scale = args.qk_scale**2 * args.head_dim**-0.5
        out = scaled_dot_product_attention(q, k, v, cache=cache, scale=scale, mask=mask)
        return self.o_proj(out.transpose(0, 2, 1, 3).reshape(batch, length, -1))


class MLP(nn.Module):
    """relu(x W1)^2 W2."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.fc1 = nn.Linear(args.hidden_size, args.intermediate_size, bias=False)
        self.fc2 = nn.Linear(args.intermediate_size, args.hidden_size, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.fc2(nn.relu2(self.fc1(x)))


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, args: ModelArgs, layer: int):
        super().__init__()
        self.eps = args.rms_norm_eps
        self.self_attn, self.mlp = Attention(args, layer), MLP(args)

    def __call__(self, x: mx.array, inputs: mx.array, mask, cache) -> mx.array:
        x = x + self.self_attn(mx.fast.rms_norm(x, None, self.eps), inputs, mask, cache)
        return x + self.mlp(mx.fast.rms_norm(x, None, self.eps))


class NanoChatModel(nn.Module):
    """The network without its head: token ids (B, T) -> hidden states (B, T, C) after the final norm."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args, layers = args, args.num_hidden_layers
        self.embed_tokens = nn.Embedding(args.vocab_size, args.hidden_size)
        self.layers = [DecoderLayer(args, i) for i in range(layers)]
        if args.residual_lambdas:
            self.resid_lambdas, self.x0_lambdas = mx.ones(layers), mx.zeros(layers)
        if args.smear:
            self.smear_gate = nn.Linear(SMEAR_GATE_CHANNELS, 1, bias=False)
            self.smear_lambda = mx.zeros(1)
        if args.backout:
            self.backout_lambda = mx.zeros(1)

    def apply_smear(self, x: mx.array, cache) -> mx.array:
        """Adds to each embedding x_t (B, T, C) a gated share of x_{t-1}, but none of padding."""
        mask = create_ssm_mask(x, cache)
        tokens = x if mask is None else mx.where(mask[..., None], x, 0)
        before = mx.zeros_like(x[:, :1]) if cache is None or cache[0] is None else cache[0]
        sequence = mx.concatenate([before, tokens], axis=1)  # (B, 1 + T, C)
        if cache is not None:
            length = x.shape[1]
            if cache.lengths is None:
                cache[0] = sequence[:, -1:]
            else:  # rows of a batch end at different positions; index 0 is the state before this call
                ends = mx.clip(cache.lengths, 0, length)
                cache[0] = mx.take_along_axis(sequence, ends[:, None, None], axis=1)
            cache.advance(length)
        gate = mx.sigmoid(self.smear_gate(x[..., :SMEAR_GATE_CHANNELS]))
        return x + (self.smear_lambda.astype(x.dtype) * gate) * sequence[:, :-1]

    def __call__(self, inputs: mx.array, cache=None) -> mx.array:
        args = self.args
        cache = cache or [None] * (args.num_hidden_layers + 1)
        x = mx.fast.rms_norm(self.embed_tokens(inputs), None, args.rms_norm_eps)
        masks = {}
        for kind, entry in zip(args.layer_types, cache):
            window = args.sliding_window if kind == "sliding_attention" else None
            if window not in masks:
                masks[window] = create_attention_mask(x, entry, window_size=window)
        if args.smear:
            x = self.apply_smear(x, cache[-1])
        x0 = middle = x
        for i, (layer, kind) in enumerate(zip(self.layers, args.layer_types)):
            if args.residual_lambdas:
                x = (self.resid_lambdas[i] * x + self.x0_lambdas[i] * x0).astype(x0.dtype)
            x = layer(x, inputs, masks[args.sliding_window if kind == "sliding_attention" else None], cache[i])
            if i == args.num_hidden_layers // 2:
                middle = x
        if args.backout:
            x = (x - self.backout_lambda.astype(mx.float32) * middle).astype(x0.dtype)
        return mx.fast.rms_norm(x, None, args.rms_norm_eps)


class Model(nn.Module):
    """The language model: token ids (B, T) -> softcapped float32 logits (B, T, num_tokens)."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args, self.model_type = args, args.model_type
        self.model = NanoChatModel(args)
        self.lm_head = nn.Linear(args.hidden_size, args.vocab_size, bias=False)

    def __call__(self, inputs: mx.array, cache=None) -> mx.array:
        logits = self.lm_head(self.model(inputs, cache))[..., : self.args.num_tokens].astype(mx.float32)
        cap = self.args.final_logit_softcapping
        return logits if cap is None else cap * mx.tanh(logits / cap)

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Returns the weights under the names above; those that mlx-lm has saved keep theirs."""
        renamed = {}
        for name, weight in weights.items():
            table = name.removeprefix("model.value_embeds.")
            if table != name:
                layer, _, rest = table.partition(".")
                name = f"model.layers.{layer}.self_attn.value_embed.{rest}"
            renamed[name] = weight
        return renamed

    @property
    def layers(self) -> list:
        return self.model.layers

    def make_cache(self) -> list:
        kinds, window = self.args.layer_types, self.args.sliding_window
        caches = [RotatingKVCache(window) if kind == "sliding_attention" else KVCache() for kind in kinds]
        return [*caches, ArraysCache(1)] if self.args.smear else caches
