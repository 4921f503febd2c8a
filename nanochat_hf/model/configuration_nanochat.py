"""Configuration of the nanochat family: both generations of karpathy/nanochat in one class.

`NanoChatHFConfig` holds the shape of the network and one switch per feature of the second generation (2026). With all
switches off (`NanoChatHFConfig.first_generation()`) it describes the model of October 2025, transformers' `nanochat`.
Model type and class names are our own: transformers and TRL look classes up by name, and `NanoChatForCausalLM` would
give them that first generation.

    NanoChatHFConfig(num_hidden_layers=12, hidden_size=768)

Uploaded with every checkpoint: imports nothing of the project.
"""

import math
import re
from typing import ClassVar

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.utils import logging

logger = logging.get_logger(__name__)

SMEAR_GATE_CHANNELS = 24  # the smear's gate reads this many leading channels of the normed embedding
VALUE_GATE_CHANNELS = 12  # the gate of a value embedding reads this many leading channels of the layer's input
ROPE_RANGE = 10  # positions up to this multiple of `max_position_embeddings`, as upstream's rotary tables
UPSTREAM_FIELDS = {  # karpathy/nanochat's `GPTConfig`: ours
    "sequence_len": "max_position_embeddings",
    "vocab_size": "num_tokens",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_kv_head": "num_key_value_heads",
    "n_embd": "hidden_size",
    "window_pattern": "window_pattern",
}
SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
MAX_LAYERS = 10_000  # more would only fill the memory
LIMITS = {  # least and largest value of numbers that are given
    **dict.fromkeys((*SIZES, "intermediate_size", "num_key_value_heads"), (1, 2**31 - 1)),
    "num_hidden_layers": (1, MAX_LAYERS), "head_dim": (2, 2**20), "attention_dropout": (0, 0.99),
    "sliding_window": (2, 2**31 - 1),  # of 1, transformers' cache would keep all keys
    "final_logit_softcapping": (0.01, 1e6), "qk_scale": (1e-3, 1e3), "rms_norm_eps": (1e-30, 1),
}  # fmt: skip
ROPE_LIMITS = {"rope_theta": (1, 1e12), "factor": (1, 1e6), "partial_rotary_factor": (1, 1)}  # of others: 1e-6, 1e12
KINDS = {  # of fields whose type transformers does not check
    **dict.fromkeys(("auto_map", "id2label", "label2id", "quantization_config", "rope_parameters"), dict),
    **dict.fromkeys(("return_dict", "output_attentions", "output_hidden_states"), bool),
    "architectures": list, "num_labels": int, "_attn_implementation": str, "attn_implementation": str,
}  # fmt: skip
SWITCHES = ("value_embeds", "smear", "residual_lambdas", "backout")  # what the second generation adds

# Saving a model writes the entry of its own class only, and AutoModel needs one too.
AUTO_MAP = {
    "AutoConfig": "configuration_nanochat.NanoChatHFConfig",
    "AutoModel": "modeling_nanochat.NanoChatHFModel",
    "AutoModelForCausalLM": "modeling_nanochat.NanoChatHFForCausalLM",
    "AutoModelForDecision": "modeling_nanochat.NanoChatHFForCausalLM",  # `transformers serve` tries it, and no other
}
PIPELINE = {"impl": "generation_nanochat.NanoChatHFTextGenerationPipeline", "pt": ["AutoModelForCausalLM"]}
OLD_NAMES = {"NanoChatModel": "NanoChatHFModel", "NanoChatForCausalLM": "NanoChatHFForCausalLM"}  # until 2026-11


def update_class_names(config_dict: dict) -> dict:
    """Returns a config.json with today's class names; the same object if it has them already."""
    architectures, auto_map = config_dict.get("architectures") or [], config_dict.get("auto_map") or {}
    names = {str(name).rpartition(".")[2] for name in (*architectures, *auto_map.values())}
    if names.isdisjoint(OLD_NAMES):
        return config_dict
    architectures = [OLD_NAMES.get(name, name) for name in architectures]
    return {**config_dict, "architectures": architectures, "auto_map": dict(AUTO_MAP)}


@strict
class NanoChatHFConfig(PreTrainedConfig):
    """Shape and features of a nanochat model; upstream's field names (`GPTConfig`) in brackets.

    Args:
        vocab_size: rows of the embedding and of the head, padded to a multiple of 64 for speed.
        num_tokens: size of the tokenizer [vocab_size]; logits are cropped to it. None: no padding rows. If the two
            differ, transformers' `compute_transition_scores` (before 5.23 also beam search) fails.
        hidden_size: width of the residual stream [n_embd]; intermediate_size (None: 4 x this) is that of the MLP.
        num_hidden_layers: number of blocks [n_layer].
        num_attention_heads: number of query heads [n_head], each of head_dim channels (None: hidden_size / heads).
        num_key_value_heads: number of key/value heads [n_kv_head]; None: num_attention_heads.
        max_position_embeddings: training sequence length in tokens [sequence_len]; 10 x as many are accepted.
        rms_norm_eps: epsilon of every RMSNorm; default: that of float32, as upstream.
        rope_parameters: as in transformers; theta is 100,000 (first generation: 10,000).
        final_logit_softcapping: logits are c * tanh(logits / c); None turns it off.
        qk_scale: factor on q and on k after their norm (1.2; first generation: 1).
        window_pattern: letters tiled over the layers: S is sliding-window attention, L full attention; the last layer
            is always L. (Upstream's L sees `sequence_len` tokens back: the same up to sequence_len + 1 tokens.)
        sliding_window: keys that an S layer sees, its own token included; default:
            ceil(max_position_embeddings / 4 / 128) * 128 + 1.
        layer_types: derived, cannot be chosen: `sliding_attention`, `full_attention`, and `hybrid` for the last layer
            if the smear is on (transformers' caches then keep keys, values and the previous token's embedding).
        value_embeds, smear, residual_lambdas, backout: the switches, see the head of modeling_nanochat.py.

    Raises ValueError for a wrong field; the message says what to write.

    Sources: https://github.com/karpathy/nanochat (nanochat/gpt.py, 2025-10 and 2026-07).
    """

    model_type = "nanochat_hf"
    keys_to_ignore_at_inference = ["past_key_values"]
    default_theta: ClassVar[float] = 100_000.0

    vocab_size: int = 32768
    num_tokens: int | None = None
    hidden_size: int = 768
    intermediate_size: int | None = None
    num_hidden_layers: int = 12
    num_attention_heads: int = 6
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 2.0**-23  # of float32; no torch here: mlx-lm reads this file where torch is absent
    rope_parameters: dict | None = None
    final_logit_softcapping: float | int | None = 15.0
    qk_scale: float | int = 1.2
    window_pattern: str = "SSSL"
    sliding_window: int | None = None
    layer_types: list[str] | None = None
    value_embeds: bool = True
    smear: bool = True
    residual_lambdas: bool = True
    backout: bool = True
    attention_dropout: float | int = 0.0
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        if foreign := [f"{name} (write {ours})" for name, ours in UPSTREAM_FIELDS.items() if name in kwargs]:
            raise ValueError(f"these are upstream's names: {', '.join(foreign)}")
        self.intermediate_size = 4 * self.hidden_size if self.intermediate_size is None else self.intermediate_size
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if error := self.shape_error():
            raise ValueError(error)
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}: RoPE rotates pairs of channels, choose an even number")
        pattern, last = self.window_pattern, self.num_hidden_layers - 1
        derived = ["sliding_attention" if pattern[i % len(pattern)] == "S" else "full_attention" for i in range(last)]
        derived.append("hybrid" if self.smear else "full_attention")
        if self.layer_types is not None and list(self.layer_types) != derived:
            raise ValueError(
                f"layer_types {list(self.layer_types)} do not follow from window_pattern {pattern!r} and "
                f"smear={self.smear} over {self.num_hidden_layers} layers: leave layer_types out, they are derived"
            )
        self.layer_types = derived
        if "sliding_attention" not in derived:
            self.sliding_window = None
        elif self.sliding_window is None:
            self.sliding_window = math.ceil(self.max_position_embeddings / 4 / 128) * 128 + 1
        kwargs.setdefault("auto_map", dict(AUTO_MAP))
        super().__post_init__(**kwargs)
        words = {"rope_type", "type", "truncate"}  # which are no numbers
        for name in {"rope_theta", *self.rope_parameters} - words:
            value, (low, high) = self.rope_parameters.get(name), ROPE_LIMITS.get(name, (1e-6, 1e12))
            values = value if name in ("short_factor", "long_factor") and isinstance(value, list) else [value]
            if not all(type(item) in (int, float) and low <= item <= high for item in values):
                raise ValueError(f"{name} is {value!r}: write a number from {low:g} to {high:g}")
        kind, kinds = self.rope_parameters.get("rope_type", "default"), ["default", *ROPE_INIT_FUNCTIONS]
        if kind not in kinds:
            raise ValueError(f"rope_type is {kind!r}: write one of {', '.join(kinds)}")

    def shape_error(self) -> str | None:
        """Returns one clear line on the first field that is out of range, or None."""
        if self.final_logit_softcapping == 0:
            return "final_logit_softcapping is 0: write null to turn it off"
        for name, (low, high) in LIMITS.items():
            if (value := getattr(self, name)) is not None and not low <= value <= high:
                return f"{name} is {value}: write a number from {low:g} to {high:g}"
        width, heads, kv_heads = self.hidden_size, self.num_attention_heads, self.num_key_value_heads
        if self.head_dim is None and width % heads:
            return f"hidden_size {width} is not divisible by num_attention_heads {heads}"
        if heads % kv_heads:
            return f"num_attention_heads {heads} is not divisible by num_key_value_heads {kv_heads}"
        if not self.window_pattern or set(self.window_pattern) - set("SL"):
            return (
                f"window_pattern {self.window_pattern!r}: write a word of the letters S (sliding window) and L (full)"
            )
        if self.num_tokens is not None and not 0 < self.num_tokens <= self.vocab_size:
            return f"num_tokens {self.num_tokens} must lie between 1 and vocab_size {self.vocab_size}"
        if self.tie_word_embeddings:
            return "tie_word_embeddings is true: the head has weights of its own, write false"
        if self.smear and width < SMEAR_GATE_CHANNELS:
            return f"the smear needs hidden_size >= {SMEAR_GATE_CHANNELS}: set smear=False or widen the model"
        if self.value_embeds and width < VALUE_GATE_CHANNELS:
            return f"value embeddings need hidden_size >= {VALUE_GATE_CHANNELS}: set value_embeds=False"
        return None

    @property
    def value_embed_layers(self) -> list[int]:
        """Indices of the layers that have a value embedding: every other one, counted back from the last."""
        first = (self.num_hidden_layers - 1) % 2
        return list(range(first, self.num_hidden_layers, 2)) if self.value_embeds else []

    @property
    def generation(self) -> int:
        """2 if a feature of the second generation adds parameters, else 1; decides how weights are initialized."""
        return 2 if any(getattr(self, name) for name in SWITCHES) else 1

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        """Reads config.json. Raises ValueError if it lacks a field whose default would silently change the model."""
        for name, kind in KINDS.items():
            value = config_dict.get(name)
            if isinstance(value, str | int | float | list | dict) and not isinstance(value, kind):
                raise ValueError(f"{name} is {value!r}: write a {kind.__name__}, or leave it out")
        dtype = config_dict.get("dtype", config_dict.get("torch_dtype"))
        if isinstance(dtype, str | int | float | list) and not re.fullmatch(
            r"(torch\.)?b?float\d\w*|auto", str(dtype)
        ):
            raise ValueError(f"dtype is {dtype!r}: write float32, bfloat16 or float16")
        if config_dict.get("return_dict") is False:
            raise ValueError("return_dict is false: write true")
        given = {**config_dict, **kwargs}
        given["rope_parameters.rope_theta"] = (given.get("rope_parameters") or {}).get("rope_theta")
        required = (*SIZES, *SWITCHES, "qk_scale", "window_pattern", "rope_parameters.rope_theta")
        if missing := [name for name in required if given.get(name) is None]:
            raise ValueError(f"the config lacks {', '.join(missing)}: write the values of the trained model")
        if (updated := update_class_names(config_dict)) is not config_dict:
            folder = kwargs.get("name_or_path", "FOLDER")
            logger.warning_once(
                f"{folder} has class names that other tools silently take for transformers' own nanochat; renew it: "
                f"nanochat convert --source {folder} --output {folder}"
            )
            config_dict = updated
        left_out = {"model_file"}  # of an export for MLX: a copy has not got the file
        if not __name__.startswith("transformers_modules."):  # transformers loads it with trust_remote_code only
            left_out.add("custom_pipelines")
        config_dict = {name: value for name, value in config_dict.items() if name not in left_out}
        try:
            return super().from_dict(config_dict, **kwargs)
        except KeyError as error:  # of RoPE's types that need more
            raise ValueError(error.args[0]) from None

    def to_dict(self) -> dict:
        return {**super().to_dict(), "custom_pipelines": {"text-generation": dict(PIPELINE)}}

    @classmethod
    def first_generation(cls, **fields) -> "NanoChatHFConfig":
        """Returns the config of the model of October 2025; `fields` override."""
        off = dict.fromkeys(SWITCHES, False)
        rope = {"rope_type": "default", "rope_theta": 10_000.0}
        return cls(**{**off, "qk_scale": 1.0, "window_pattern": "L", "rope_parameters": rope, **fields})


NanoChatConfig = NanoChatHFConfig  # the public name, and that of older folders

__all__ = ["NanoChatConfig", "NanoChatHFConfig"]
