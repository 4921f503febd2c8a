"""The nanochat language model for transformers: both generations of karpathy/nanochat in one class.

A decoder like Llama; read `NanoChatHFModel.forward` first. What differs from Llama, and its source:
- RMSNorm has no weights, and one more follows the embedding (nanochat; modded-nanogpt).
- RoPE rotates by -theta in half-split layout, and q and k are normed after it: "QK norm" (arXiv:2010.04245).
- relu(x)^2 in a two-matrix MLP of 4x (Primer, arXiv:2109.08668); no biases; the head is not tied to the embedding.
- Logits are softcapped in float32: 15 tanh(logits / 15) (Gemma 2, arXiv:2408.00118).
The second generation adds (each a switch of the config; with all off the logits equal those of transformers' own
`nanochat`, under the same parameter names):
- `qk_scale`: q and k times 1.2 after their norm, folded into the softmax scale here.
- `window_pattern`: sliding-window attention in most layers, full attention in every fourth and the last (Mistral,
  arXiv:2310.06825).
- `residual_lambdas`: block i reads r_i x + z_i x0, x0 the embedding (modded-nanogpt).
- `value_embeds`: every other layer adds a gated embedding of the token to its values (value residual,
  arXiv:2410.17897; modded-nanogpt).
- `smear`: the embedding of a token takes a gated share of its predecessor's, except at the start of a sequence. The
  previous embedding is kept across calls in transformers' own cache, as the convolution state of the last layer (type
  `hybrid`); so beam search, static caches and rollback work.
- `backout`: the residual stream after the middle block is subtracted before the final norm.

Precision: no autocast is needed. Matrices keep their stored dtype (float32 masters while training) and are cast to
the dtype of their input; the network runs in the dtype of the embeddings.
Attention: any `attn_implementation` of transformers (eager, sdpa, flex_attention, flash_attention_2/3/4), or a
function registered with `AttentionInterface`, which gets `sliding_window=` and no mask.

This file and those that it imports are uploaded with every checkpoint: they need only torch and transformers.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_flash_attention_utils import prepare_fa_kwargs_from_position_ids
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_rope_utils import dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, eager_attention_forward
from transformers.utils.generic import can_return_tuple, is_flash_attention_requested
from transformers.utils.output_capturing import capture_outputs

from .configuration_nanochat import ROPE_RANGE, SMEAR_GATE_CHANNELS, VALUE_GATE_CHANNELS, NanoChatHFConfig
from .generation_nanochat import ToolLoopMixin

ZEROS = partial(init.zeros_)


def with_init(module: nn.Module, init_fn: partial) -> nn.Module:
    module.init_fn = init_fn  # initializes a fresh weight, see `_init_weights`
    return module


def linear(in_features: int, out_features: int, init_fn: partial = ZEROS) -> nn.Linear:
    """A matrix without bias. A plain nn.Linear: bitsandbytes and others silently skip subclasses."""
    return with_init(nn.Linear(in_features, out_features, bias=False), init_fn)


def project(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """`module(x)` in the dtype of x, where a plain nn.Linear would refuse float32 masters and bf16 inputs."""
    if type(module) is nn.Linear and module.weight.dtype != x.dtype:
        return F.linear(x, module.weight.to(x.dtype))
    return module(x)


class Gate(nn.Module):
    """A small matrix, cast to the dtype of its input. Not an nn.Linear: quantizers and "all-linear" must skip it."""

    init_fn = staticmethod(partial(init.uniform_, a=0.0, b=0.02))  # a gate starts slightly above one half

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(out_features, in_features))  # one draw, as nn.Linear: pinned seeds

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.to(x.dtype))


def matrix_init(config: NanoChatHFConfig, out_features: int, gain: float = 1.0) -> partial:
    """Returns the initializer of a matrix that reads the residual stream: uniform (generation 2) or normal (1)."""
    std = config.hidden_size**-0.5
    if config.generation == 1:
        return partial(init.normal_, std=std * min(1.0, (out_features / config.hidden_size) ** 0.5))
    return partial(init.uniform_, a=-(3**0.5) * gain * std, b=3**0.5 * gain * std)


def rms_norm(x: torch.Tensor, eps: float) -> torch.Tensor:
    return F.rms_norm(x, (x.shape[-1],), eps=eps)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x (B, H, T, D), cos and sin (B or 1, 1, T, D/2) -> x with the pairs (i, i + D/2) rotated by -angle."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos + second * sin, second * cos - first * sin), dim=-1)


def flash_attention_4_lengths(position_ids: torch.Tensor) -> dict:
    """Lengths of packed sequences: transformers finds them itself, but as a tensor where version 4 needs an int."""
    (starts, _), (length, _) = prepare_fa_kwargs_from_position_ids(position_ids)
    lengths = {"max_length_q": int(length), "max_length_k": int(length)}
    return {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, **lengths}


class NanoChatRotaryEmbedding(LlamaRotaryEmbedding):
    """Angles of RoPE, computed in float32."""

    def _apply(self, fn, recurse=True):
        """Moves the frequencies but never casts them: bfloat16 (`model.bfloat16()`) cannot resolve late positions."""
        exact = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, buffer in self.named_buffers():
            if buffer.dtype != exact[name].dtype:
                setattr(self, name, exact[name].to(buffer.device))
        return self

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """position_ids (B or 1, T) -> cos, sin (B or 1, 1, T, D/2) in the dtype of x."""
        angles = position_ids[:, None, :, None].float() * self.inv_freq.float()
        return (angles.cos() * self.attention_scaling).to(x.dtype), (angles.sin() * self.attention_scaling).to(x.dtype)


class NanoChatAttention(nn.Module):
    """Attention with QK norm after RoPE; some layers have a sliding window, some gated value embeddings."""

    def __init__(self, config: NanoChatHFConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.qk_scale**2 * self.head_dim**-0.5
        self.is_causal = True
        self.sliding_window = config.sliding_window if config.layer_types[layer_idx] == "sliding_attention" else None
        width, q_size = config.hidden_size, config.num_attention_heads * self.head_dim
        kv_size = config.num_key_value_heads * self.head_dim
        self.q_proj = linear(width, q_size, matrix_init(config, q_size))
        self.k_proj = linear(width, kv_size, matrix_init(config, kv_size))
        self.v_proj = linear(width, kv_size, matrix_init(config, kv_size))
        self.o_proj = linear(q_size, width)  # zero: a fresh block is the identity
        if layer_idx in config.value_embed_layers:
            self.ve_gate = Gate(VALUE_GATE_CHANNELS, config.num_key_value_heads)

    def forward(
        self, hidden_states, position_embeddings, attention_mask=None, value_embed=None, past_key_values=None, **kwargs
    ):
        """hidden_states (B, T, C), value_embed (B, T, H_kv * D) or None -> (B, T, C) and attention weights or None."""
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        q, k, v = (project(m, hidden_states).view(heads) for m in (self.q_proj, self.k_proj, self.v_proj))
        if value_embed is not None:
            gate = 3 * torch.sigmoid(self.ve_gate(hidden_states[..., :VALUE_GATE_CHANNELS]))  # (B, T, H_kv)
            v = v + gate.unsqueeze(-1) * value_embed.view(heads)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, D)
        q = rms_norm(rotate(q, *position_embeddings), self.config.rms_norm_eps)
        k = rms_norm(rotate(k, *position_embeddings), self.config.rms_norm_eps)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.config.attention_dropout if self.training else 0.0
        # vLLM's Transformers backend looks for the keyword `scaling=` in this text and else takes head_dim**-0.5.
        out, weights = attention(
            self, q, k, v, attention_mask, dropout=dropout, scaling=self.scaling, sliding_window=self.sliding_window,
            **kwargs,
        )  # fmt: skip
        return project(self.o_proj, out.reshape(*hidden_states.shape[:-1], -1)), weights


class NanoChatMLP(nn.Module):
    """relu(x W1)^2 W2."""

    def __init__(self, config: NanoChatHFConfig):
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.fc1 = linear(width, inner, matrix_init(config, inner, gain=0.4))
        self.fc2 = linear(inner, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return project(self.fc2, F.relu(project(self.fc1, x)).square())


class NanoChatDecoderLayer(GradientCheckpointingLayer):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: NanoChatHFConfig, layer_idx: int):
        super().__init__()
        self.eps = config.rms_norm_eps
        self.self_attn = NanoChatAttention(config, layer_idx)
        self.mlp = NanoChatMLP(config)

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        hidden_states = hidden_states + self.self_attn(rms_norm(hidden_states, self.eps), *args, **kwargs)[0]
        return hidden_states + self.mlp(rms_norm(hidden_states, self.eps))


class NanoChatHFPreTrainedModel(PreTrainedModel):
    """What transformers reads off the two model classes below when it loads, saves and generates."""

    config: NanoChatHFConfig
    config_class = NanoChatHFConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["NanoChatDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": NanoChatDecoderLayer, "attentions": NanoChatAttention}

    def _init_weights(self, module: nn.Module) -> None:
        # The functions of transformers.initialization skip weights that came from a checkpoint.
        if hasattr(module, "init_fn"):
            module.init_fn(module.weight)
        elif isinstance(module, NanoChatHFModel):
            depth = torch.linspace(0, 1, self.config.num_hidden_layers)
            if self.config.residual_lambdas:
                init.copy_(module.resid_lambdas, 1.15 - 0.10 * depth)
                init.copy_(module.x0_lambdas, 0.20 - 0.15 * depth)
            if self.config.smear:
                init.zeros_(module.smear_lambda)
            if self.config.backout:
                init.constant_(module.backout_lambda, 0.2)
        else:
            super()._init_weights(module)

    def resize_token_embeddings(
        self, new_num_tokens=None, pad_to_multiple_of=None, mean_resizing=True
    ) -> nn.Embedding:
        """As in transformers; the value embeddings, which are read by token too, and `num_tokens` follow."""
        embeddings = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        for table in self.base_model.value_embeds.values() if self.config.value_embeds else ():
            self._get_resized_embeddings(table, new_num_tokens, pad_to_multiple_of, mean_resizing)
        if self.config.num_tokens is not None and new_num_tokens is not None:
            self.config.num_tokens = new_num_tokens
        return embeddings


class NanoChatHFModel(NanoChatHFPreTrainedModel):
    """The network without its head: token ids (B, T) -> hidden states (B, T, C) after the final norm."""

    def __init__(self, config: NanoChatHFConfig):
        super().__init__(config)
        width, layers = config.hidden_size, config.num_hidden_layers
        std = 0.8 if config.generation == 2 else 1.0
        self.embed_tokens = with_init(nn.Embedding(config.vocab_size, width), partial(init.normal_, std=std))
        self.layers = nn.ModuleList(NanoChatDecoderLayer(config, i) for i in range(layers))
        self.rotary_emb = NanoChatRotaryEmbedding(config)
        if config.value_embeds:
            shape = (config.vocab_size, config.num_key_value_heads * config.head_dim)
            init_fn = matrix_init(config, width)
            tables = {str(i): with_init(nn.Embedding(*shape), init_fn) for i in config.value_embed_layers}
            self.value_embeds = nn.ModuleDict(tables)
        if config.residual_lambdas:
            self.resid_lambdas = nn.Parameter(torch.ones(layers))
            self.x0_lambdas = nn.Parameter(torch.zeros(layers))
        if config.smear:
            if config._attn_implementation in ("vllm", "tgi", "sglang"):  # they would silently drop the smear
                raise ValueError(
                    f"{config._attn_implementation} keeps keys and values only, and the smear needs the token before: "
                    "serve this checkpoint with `nanochat serve`, or with vLLM and the plugin of the package "
                    "nanochat_hf; the first generation works as it is"
                )
            self.smear_gate = Gate(SMEAR_GATE_CHANNELS, 1)
            self.smear_lambda = nn.Parameter(torch.zeros(1))
        if config.backout:
            self.backout_lambda = nn.Parameter(torch.zeros(1))
        self.gradient_checkpointing = False
        self.post_init()

    @staticmethod
    def create_masks_for_generate(
        config, inputs_embeds, attention_mask, past_key_values=None, position_ids=None, cache=None, **_
    ):
        """Returns the masks of one forward pass: {"full_attention", "sliding_attention", "padding"}.

        `generate` calls this outside of the compiled step; a training loop may pass the result as `attention_mask`.
        The first two are what the attention function takes, or None; "padding" is the 2D mask of the queries and the
        token before them, for the smear, or None. `inputs_embeds` (B, T, any): only shape, dtype and device are read.
        `attention_mask`: None, (B, S) with 1 for tokens and 0 for padding, or (B, 1, T, S) used as it is.
        """
        past_key_values = cache if past_key_values is None else past_key_values  # its name from transformers 5.24 on
        # The layers are named because transformers would take the first full one, and does not count a static hybrid.
        inputs = (config, inputs_embeds, attention_mask)
        kwargs = {"past_key_values": past_key_values, "position_ids": position_ids}
        length = inputs_embeds.shape[1]
        # Plain training: SDPA's own causal mode, which transformers would not use while torch compiles.
        plain = attention_mask is None and past_key_values is None and position_ids is None
        causal = plain and config._attn_implementation == "sdpa"
        masks = dict.fromkeys(("full_attention", "sliding_attention", "padding"))
        if not causal:
            masks["full_attention"] = create_causal_mask(*inputs, **kwargs, layer_idx=config.num_hidden_layers - 1)
        if config.sliding_window and not (causal and length <= config.sliding_window):
            sliding = config.layer_types.index("sliding_attention")
            masks["sliding_attention"] = create_sliding_window_causal_mask(*inputs, **kwargs, layer_idx=sliding)
        if attention_mask is not None and attention_mask.ndim == 2:
            # A fresh copy: a view's stride grows with the sequence, and the compiled step would be compiled again.
            masks["padding"] = attention_mask[:, -(length + 1) :].clone(memory_format=torch.contiguous_format)
        return masks

    def check_cache(self, cache: Cache) -> None:
        """Raises ValueError for a cache that was created for another kind of model."""
        kinds, smear = self.config.layer_types, self.config.smear
        layers = getattr(cache, "layers", None)
        fits = layers is not None and len(layers) in (len(kinds), -1 if smear else 0)  # 0: created without a config
        fits = fits and (not smear or hasattr(layers[-1], "update_conv_state"))
        if not fits or any(layer.is_sliding and kind != "sliding_attention" for layer, kind in zip(layers, kinds)):
            raise ValueError(
                "this cache is not one of this model: create it as DynamicCache(config=model.config) or "
                "StaticCache(config=model.config, max_cache_len=...)"
            )

    def past_length(self, cache: Cache | None, length: int) -> int | torch.Tensor:
        """Returns the number of tokens in the cache, before `length` new ones: a tensor if the cache is static.

        Raises ValueError for a foreign cache, and for positions past the range of RoPE.
        """
        past, total = 0, length
        if cache is not None:
            self.check_cache(cache)
            past = cache.get_seq_length(self.config.num_hidden_layers - 1)  # the last layer never has a window
            static = getattr(cache.layers[-1], "max_cache_len", 0) if cache.layers else 0
            total = max(static, past + length if isinstance(past, int) else 0)
        limit = ROPE_RANGE * self.config.max_position_embeddings
        if total > limit:
            raise ValueError(
                f"{total} positions are too many, this model counts to {limit} "
                f"({ROPE_RANGE} x max_position_embeddings)"
            )
        return past

    def apply_smear(self, x, position_ids, padding, cache):
        """Adds to each embedding x_t (B, T, C) a gated share of x_{t-1}, within a sequence only."""
        length = x.shape[1]
        previous = F.pad(x[:, :-1], (0, 0, 1, 0))
        if cache is not None:
            layer = self.config.num_hidden_layers - 1
            continues = cache.has_previous_state(layer)
            states = cache.update_conv_state(x.transpose(1, 2), layer, conv_kernel_size=1).transpose(1, 2)
            if continues:
                previous = states[:, -length - 1 : -1]
        gate = torch.sigmoid(self.smear_gate(x[..., :SMEAR_GATE_CHANNELS])).to(x.device)  # (B, T, 1)
        gate = self.smear_lambda.to(x) * gate
        if position_ids is not None:  # packed rows, and left padding in generate: position 0 starts a sequence
            gate = gate * (position_ids != 0).unsqueeze(-1)
        if padding is not None:  # left padding without position_ids: no share of a padding token
            before = F.pad(padding, (length + 1 - padding.shape[1], 0))[:, :-1]
            gate = gate * (before != 0).unsqueeze(-1)
        return x + gate * previous

    def run_layers(self, x, input_ids, rope, masks, past_key_values, **kwargs) -> torch.Tensor:
        """The blocks: x (B, T, C), embedded, normed and smeared -> (B, T, C) before the final norm."""
        config, x0, middle = self.config, x, x
        if config.residual_lambdas:
            residual, initial = self.resid_lambdas.unbind(), self.x0_lambdas.unbind()
        offloading = past_key_values is not None and past_key_values.offloading
        for i, layer in enumerate(self.layers):
            if offloading:  # before 5.20, transformers fetches keys that may not have arrived: silently wrong ones
                past_key_values.prefetch_stream.wait_stream(torch.cuda.default_stream(x.device))
            if config.residual_lambdas:
                x0 = x0.to(x.device)  # a model split over devices: x is on that of the block before
                x = residual[i].to(x.device) * x + initial[i].to(x.device) * x0
            has_value_embed = config.value_embeds and str(i) in self.value_embeds
            value_embed = self.value_embeds[str(i)](input_ids).to(x.dtype) if has_value_embed else None
            mask = masks["sliding_attention" if config.layer_types[i] == "sliding_attention" else "full_attention"]
            options = {"attention_mask": mask, "value_embed": value_embed, "past_key_values": past_key_values}
            x = layer(x, rope, **options, **kwargs)
            if i == len(self.layers) // 2:
                middle = x
        if offloading and config.smear:
            # The smear reads the last layer's state before transformers fetches any layer, beam search reorders it as
            # if it had not left, and beside a static one transformers expects no keys and never fetches them.
            past_key_values.layers[-1].prefetch()
        if config.backout:
            share = self.backout_lambda.to(x.device).float() * middle.to(x.device)
            x = (x - share).to(x.dtype)  # subtracted in float32: the difference may be small
        return x

    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Runs the network.

        Args:
            input_ids: (B, T) token ids. Needed even beside `inputs_embeds` when the model has value embeddings.
            attention_mask: (B, S) with 0 for padding, a prepared 4D mask, or the dict of `create_masks_for_generate`.
            position_ids: (B, T). Restarting at 0 inside a row separates packed sequences.
            past_key_values: cache created with `config=model.config`.
            inputs_embeds: (B, T, C) in place of the embedding of `input_ids`.
            use_cache: keep keys and values; the default is the config's in evaluation mode and False in training.

        Returns: `last_hidden_state` (B, T, C) and `past_key_values`.

        Raises: ValueError for missing ids, a foreign cache, or positions past 10 x max_position_embeddings.
        """
        config = self.config
        if input_ids is None and (inputs_embeds is None or config.value_embeds):
            reason = "no input" if inputs_embeds is None else "the value embeddings need them beside inputs_embeds"
            raise ValueError(f"pass input_ids: {reason}")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds

        past_key_values = kwargs.pop("cache", None) if past_key_values is None else past_key_values
        past, masks = self.past_length(past_key_values, x.shape[1]), attention_mask
        if not isinstance(masks, dict):
            masks = self.create_masks_for_generate(config, x, attention_mask, past_key_values, position_ids)
        packed = position_ids is not None and past_key_values is None and len(x) == 1
        if packed and is_flash_attention_requested(config, version=4):
            kwargs = flash_attention_4_lengths(position_ids) | kwargs
        if use_cache is None:
            use_cache = config.use_cache and not self.training
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=config)

        counted = (torch.arange(x.shape[1], device=x.device) + past).unsqueeze(0)
        rope = self.rotary_emb(x, counted if position_ids is None else position_ids)
        x = rms_norm(x, config.rms_norm_eps)
        if config.smear:
            x = self.apply_smear(x, position_ids, masks.get("padding"), past_key_values)
        x = self.run_layers(x, input_ids, rope, masks, past_key_values, position_ids=position_ids, **kwargs)
        x = rms_norm(x, config.rms_norm_eps)
        return BaseModelOutputWithPast(last_hidden_state=x, past_key_values=past_key_values if use_cache else None)


class NanoChatHFForCausalLM(ToolLoopMixin, NanoChatHFPreTrainedModel, GenerationMixin):
    """The language model: `NanoChatHFModel` and a head with softcapped float32 logits."""

    def __init__(self, config: NanoChatHFConfig):
        super().__init__(config)
        self.model = NanoChatHFModel(config)
        init_fn = partial(init.normal_, std=0.001) if config.generation == 2 else ZEROS
        self.lm_head = linear(config.hidden_size, config.vocab_size, init_fn)
        self.post_init()

    create_masks_for_generate = staticmethod(NanoChatHFModel.create_masks_for_generate)

    def _prepare_attention_mask_for_generation(self, inputs_tensor, generation_config, model_kwargs):
        """The mask of `generate` without one: all but left padding, whose token is the bos that a prompt begins with.

        transformers' own masks that bos, too, and answers change.
        """
        if self.config.bos_token_id is None or generation_config.pad_token_id != self.config.bos_token_id:
            return super()._prepare_attention_mask_for_generation(inputs_tensor, generation_config, model_kwargs)
        ids = model_kwargs.get("input_ids")
        ids = inputs_tensor if ids is None or not ids.numel() else ids
        if ids.is_floating_point():  # embeddings
            return ids.new_ones(ids.shape[:2], dtype=torch.long)
        leading = ids.eq(generation_config.pad_token_id).long().cumprod(1)
        return 1 - F.pad(leading[:, 1:], (0, 1))  # the last of them is the bos

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Logits (B, T, num_tokens or vocab_size) in float32, and the loss if `labels` are given.

        Args as in `NanoChatHFModel.forward`, and:
            labels: (B, T) token ids, -100 for no loss; position t is scored against label t + 1.
            logits_to_keep: compute only the last so many positions (0: all), or those of an index tensor.
            kwargs: `num_items_in_batch` (loss = sum / that number), `shift_labels`, and what the attention takes.
        """
        inputs = (input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache)
        outputs = self.model(*inputs, **kwargs)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = project(self.lm_head, outputs.last_hidden_state[:, keep])[..., : self.config.num_tokens].float()
        if (cap := self.config.final_logit_softcapping) is not None:
            logits = cap * torch.tanh(logits / cap)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=logits.shape[-1], **kwargs)
        rest = {name: getattr(outputs, name) for name in ("past_key_values", "hidden_states", "attentions")}
        return CausalLMOutputWithPast(loss=loss, logits=logits, **rest)


# The public names, and those of older folders. The classes must have names that transformers does not have: TRL and
# others look up `config.architectures[0]` there first, and would train its first-generation class.
NanoChatForCausalLM, NanoChatModel = NanoChatHFForCausalLM, NanoChatHFModel

__all__ = ["NanoChatHFForCausalLM", "NanoChatHFModel", "NanoChatHFPreTrainedModel"]
