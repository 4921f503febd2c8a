"""The nanochat model for vLLM, both generations. The plugin in vllm.py registers it.

What the network computes, and the sources, stand at the head of modeling_nanochat.py; here only what vLLM differs in:
- The tokens of all requests stand in one row (T), prompts in chunks; vLLM keeps only keys and values per layer.
- So the smear gets the id of the previous token from one more attention layer, which copies it: see `PreviousToken`.
- Tensor parallel: heads, MLP, embedding and head are split over the ranks. No pipeline parallel.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import ColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.interfaces import SupportsLoRA

from ..model.configuration_nanochat import SMEAR_GATE_CHANNELS, VALUE_GATE_CHANNELS, NanoChatHFConfig
from ..model.modeling_nanochat import NanoChatRotaryEmbedding, rms_norm, rotate

SHARPNESS = 16.0  # softmax scale of PreviousToken: a key with one wrong bit gets exp(-32) of the right one's weight


def new_attention(scale: float, window: int | None, vllm_config: VllmConfig, prefix: str) -> Attention:
    """Attention over this rank's heads, with a cache; `window` counts the own token, None is full attention."""
    config, ranks = vllm_config.model_config.hf_config, get_tensor_model_parallel_world_size()
    kv_heads = max(1, config.num_key_value_heads // ranks)
    caching = {"num_kv_heads": kv_heads, "cache_config": vllm_config.cache_config, "per_layer_sliding_window": window}
    return Attention(config.num_attention_heads // ranks, config.head_dim, scale, prefix=prefix, **caching)


class PreviousToken(nn.Module):
    """Token ids (T,) -> ids of the tokens before, by an attention layer without parameters.

    In bits of +1 and -1, the query is the previous position, the key the own position, the value the own id. They are
    exact in every dtype. Window and sizes are those of the model's layers, because vLLM allocates the cache in groups
    of equal layers. The first token of a sequence gets its own id.
    """

    def __init__(self, config: NanoChatHFConfig, vllm_config: VllmConfig, prefix: str):
        super().__init__()
        self.bits, self.max_id = min(config.head_dim, 31), config.vocab_size - 1
        self.attn = new_attention(SHARPNESS, config.sliding_window, vllm_config, prefix)

    def to_signs(self, numbers: torch.Tensor, heads: int, dtype: torch.dtype) -> torch.Tensor:
        """Integers (T,) -> their bits as +1 and -1, for each head (T, heads * D)."""
        bits = (numbers[:, None] >> torch.arange(self.bits, device=numbers.device)) & 1
        return F.pad(2 * bits - 1, (0, self.attn.head_size - self.bits)).to(dtype).repeat(1, heads)

    def forward(self, ids: torch.Tensor, positions: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        query = self.to_signs(positions - 1, self.attn.num_heads, dtype)
        key, value = (self.to_signs(numbers, self.attn.num_kv_heads, dtype) for numbers in (positions, ids))
        bits = self.attn(query, key, value)[:, : self.bits] > 0
        previous = (bits.long() << torch.arange(self.bits, device=bits.device)).sum(-1)
        return previous.clamp(max=self.max_id)  # rows of padding hold anything


class NanoChatAttention(nn.Module):
    """Attention with QK norm after RoPE; some layers have gated value embeddings of the token."""

    def __init__(self, config: NanoChatHFConfig, layer: int, vllm_config: VllmConfig, prefix: str):
        super().__init__()
        self.eps, kwargs = config.rms_norm_eps, {"bias": False, "quant_config": vllm_config.quant_config}
        width, size, kv_heads = config.hidden_size, config.head_dim, config.num_key_value_heads
        heads = (size, config.num_attention_heads, kv_heads)
        self.qkv_proj = QKVParallelLinear(width, *heads, prefix=f"{prefix}.qkv_proj", **kwargs)
        self.o_proj = RowParallelLinear(heads[0] * heads[1], width, prefix=f"{prefix}.o_proj", **kwargs)
        if layer in config.value_embed_layers:
            self.ve_gate = nn.Linear(VALUE_GATE_CHANNELS, kv_heads, bias=False)
        self.first_kv_head = get_tensor_model_parallel_rank() * kv_heads // get_tensor_model_parallel_world_size()
        window = config.sliding_window if config.layer_types[layer] == "sliding_attention" else None
        self.attn = new_attention(config.qk_scale**2 * size**-0.5, window, vllm_config, f"{prefix}.attn")

    def forward(self, x: torch.Tensor, rope: tuple, value_embed: torch.Tensor | None) -> torch.Tensor:
        """x (T, C), cosines and sines (T, 1, D/2), value_embed (T, all H_kv * D) or None -> (T, C)."""
        kv_heads, size = self.attn.num_kv_heads, self.attn.head_size
        qkv = self.qkv_proj(x)[0].unflatten(-1, (-1, size))  # (T, H + 2 H_kv, D)
        q, k, v = qkv.split([self.attn.num_heads, kv_heads, kv_heads], dim=1)
        if value_embed is not None:
            gate = 3 * torch.sigmoid(self.ve_gate(x[..., :VALUE_GATE_CHANNELS]))
            gated = gate.unsqueeze(-1) * value_embed.unflatten(-1, (-1, size))
            v = v + gated.narrow(1, self.first_kv_head, kv_heads)
        q, k = (rms_norm(rotate(part, *rope), self.eps) for part in (q, k))
        return self.o_proj(self.attn(q.flatten(1), k.flatten(1), v.flatten(1)))[0]


class NanoChatMLP(nn.Module):
    """relu(x W1)^2 W2."""

    def __init__(self, config: NanoChatHFConfig, vllm_config: VllmConfig, prefix: str):
        super().__init__()
        sizes, kwargs = (config.hidden_size, config.intermediate_size), {"quant_config": vllm_config.quant_config}
        self.fc1 = ColumnParallelLinear(*sizes, bias=False, prefix=f"{prefix}.fc1", **kwargs)
        self.fc2 = RowParallelLinear(*sizes[::-1], bias=False, prefix=f"{prefix}.fc2", **kwargs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.relu(self.fc1(x)[0]).square())[0]


class NanoChatDecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: NanoChatHFConfig, layer: int, vllm_config: VllmConfig, prefix: str):
        super().__init__()
        self.eps = config.rms_norm_eps
        self.self_attn = NanoChatAttention(config, layer, vllm_config, f"{prefix}.self_attn")
        self.mlp = NanoChatMLP(config, vllm_config, f"{prefix}.mlp")

    def forward(self, x: torch.Tensor, *args) -> torch.Tensor:
        x = x + self.self_attn(rms_norm(x, self.eps), *args)
        return x + self.mlp(rms_norm(x, self.eps))


@support_torch_compile
class NanoChatModel(nn.Module):
    """The network without its head: token ids (T,) -> hidden states (T, C) after the final norm."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        self.config = config = vllm_config.model_config.hf_config
        if (kind := config.rope_parameters.get("rope_type", "default")) in ("dynamic", "longrope"):
            raise ValueError(f"RoPE of type {kind!r} changes with a text's length, which vLLM's rows do not have")
        names = [f"{prefix}.layers.{i}" for i in range(config.num_hidden_layers + 1)]
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size)
        layers = [NanoChatDecoderLayer(config, i, vllm_config, name) for i, name in enumerate(names[:-1])]
        self.layers, self.rotary_emb = nn.ModuleList(layers), NanoChatRotaryEmbedding(config)
        shape = (config.vocab_size, config.num_key_value_heads * config.head_dim)
        self.value_embeds = nn.ModuleDict({str(i): nn.Embedding(*shape) for i in config.value_embed_layers})
        if config.residual_lambdas:
            self.resid_lambdas, self.x0_lambdas = (nn.Parameter(torch.empty(len(layers))) for _ in range(2))
        if config.smear:
            self.smear_gate = nn.Linear(SMEAR_GATE_CHANNELS, 1, bias=False)
            self.smear_lambda = nn.Parameter(torch.empty(1))
            self.previous_token = PreviousToken(config, vllm_config, f"{names[-1]}.attn")  # vLLM reads the number
        if config.backout:
            self.backout_lambda = nn.Parameter(torch.empty(1))

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        return rms_norm(self.embed_tokens(input_ids), self.config.rms_norm_eps)

    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor, intermediate_tensors=None, inputs_embeds=None
    ) -> torch.Tensor:
        config, x = self.config, self.embed(input_ids)
        rope = [part[0, 0, :, None] for part in self.rotary_emb(x, positions[None])]  # cosines, sines (T, 1, D/2)
        if config.smear:
            gate = self.smear_lambda * torch.sigmoid(self.smear_gate(x[..., :SMEAR_GATE_CHANNELS]))
            gate = gate * (positions != 0).unsqueeze(-1)
            x = x + gate * self.embed(self.previous_token(input_ids, positions, x.dtype))
        x0 = middle = x
        for i, layer in enumerate(self.layers):
            if config.residual_lambdas:
                x = self.resid_lambdas[i] * x + self.x0_lambdas[i] * x0
            value_embed = self.value_embeds[str(i)](input_ids) if i in config.value_embed_layers else None
            x = layer(x, rope, value_embed)
            if i == len(self.layers) // 2:
                middle = x
        if config.backout:
            x = (x - self.backout_lambda.float() * middle).to(x.dtype)
        return rms_norm(x, config.rms_norm_eps)


class NanoChatForVllm(nn.Module, SupportsLoRA):
    """The language model: `NanoChatModel` and a head with softcapped float32 logits."""

    packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        self.config = config = vllm_config.model_config.hf_config
        self.model = NanoChatModel(vllm_config=vllm_config, prefix=f"{prefix}model")
        self.lm_head = ParallelLMHead(config.vocab_size, config.hidden_size, prefix=f"{prefix}lm_head")
        self.logits_processor = LogitsProcessor(config.vocab_size)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model.embed(input_ids)

    def forward(self, *args, **kwargs) -> torch.Tensor:
        return self.model(*args, **kwargs)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Hidden states (T, C) -> logits (T, vocab_size), -inf for padding rows of the head; None on other ranks."""
        logits = self.logits_processor(self.lm_head, hidden_states)
        if logits is not None:
            logits, cap = logits.float(), self.config.final_logit_softcapping
            logits = logits if cap is None else cap * torch.tanh(logits / cap)
            logits[..., self.config.num_tokens or self.config.vocab_size :] = -torch.inf
        return logits

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Loads a checkpoint; returns the names of the parameters that were loaded."""
        parameters, loaded = dict(self.named_parameters()), set()
        for name, weight in weights:
            before, dot, part = name.removesuffix("_proj.weight").rpartition(".")
            shard = (part,) if part in ("q", "k", "v") else ()
            parameter = parameters[name := f"{before}{dot}qkv_proj.weight" if shard else name]
            getattr(parameter, "weight_loader", default_weight_loader)(parameter, weight, *shard)
            loaded.add(name)
        return loaded
