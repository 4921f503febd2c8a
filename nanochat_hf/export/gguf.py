"""A .gguf for llama.cpp, Ollama and LM Studio: a model of generation 1 as the Qwen3 that computes the same.

llama.cpp has no nanochat. Where its Qwen3 differs, the weights make up for it:
- It does not norm the embedding: the rows are normed here, and the head is a tensor of its own.
- Its norms have weights: ones, and `qk_scale` for q and k. It norms q and k before RoPE, which keeps their lengths.
- It rotates by +theta. With the second half of each head of q and k negated that is our rotation by -theta, mirrored.
  Products of q and k stay the same.
- Its MLP is W_down (silu(W_gate x) * (W_up x)). For u = W1 x, W_gate = S W1 and W_up = W1 / S give u^2 sigmoid(S u).
  That is relu(u)^2 up to 0.48 / S^2. The norm before takes a factor of both, so that f16 and q8_0 hold them.
It has no logit softcapping, sliding windows, smear or value embeddings, and splits numbers into one or three digits.

Source: ggml-org/llama.cpp, src/models/qwen3.cpp and src/llama-vocab.cpp.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import gguf
import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.tokenizer import load_tokenizer, new_backend, with_todays_templates
from ..errors import InputError
from ..loading import load_model
from ..model.configuration_nanochat import NanoChatConfig
from . import checkpoint_config, refuse_scaled_rope

SHARPNESS, NORM = 2.0**8, 2.0**-5  # S above, and the weight of the norm before the MLP; powers of two lose no bits
PRE_TOKENIZERS = {1: "bailingmoe", 3: "dbrx", 2: "bailingmoe"}  # digits per token: llama.cpp's name; none has pairs
MODELFILE = r'''TEMPLATE """{{- $system := "" }}{{- range $i, $_ := .Messages }}
{{- if eq .Role "system" }}{{ $system = printf "%s\n\n" .Content }}
{{- else if eq .Role "user" }}<|user_start|>{{ $system }}{{ .Content }}<|user_end|><|assistant_start|>
{{- $system = "" }}
{{- else if eq .Role "assistant" }}{{ .Content }}{{ if gt (len (slice $.Messages $i)) 1 }}<|assistant_end|>{{ end }}
{{- end }}{{ end }}"""
PARAMETER stop <|assistant_end|>
PARAMETER stop <|python_end|>
PARAMETER num_ctx '''
CHAT = 'npx node-llama-cpp chat --systemPrompt "" --repeatPenalty 1 --model'
CARD = """---
library_name: gguf
pipeline_tag: text-generation
---
A nanochat model of generation 1, written as the Qwen3 that computes the same by `nanochat export --to gguf`.

    {command}

`Modelfile` is for Ollama. The calculator does not run in these engines: an answer ends where it is called.
"""


def write(source: Path, folder: Path, outtype: str = "f16", allow_inexact: bool = False) -> list[str]:
    """Fills `folder` with the .gguf, a Modelfile and a card. `outtype`, of the matrices: f32, f16, bf16 or q8_0.

    Returns: what is not exact, and a command. Raises InputError for a model that llama.cpp's Qwen3 cannot express.
    With `allow_inexact` sampling and the tokens of some texts may differ.
    """
    config, tokenizer = checkpoint_config(source), with_todays_templates(load_tokenizer(source))
    refuse_impossible(config)
    pre_tokenizer, caveats = compare_tokenizer(tokenizer)
    if (cap := config.final_logit_softcapping) is not None:
        caveats.append(f"logits are softcapped at {cap:g}, and not there: greedy answers are right, sampled ones not")
    if caveats and not allow_inexact:
        raise InputError(
            f"{'; '.join(caveats)}. --allow-inexact writes it all the same; --to native, mlx and onnx are exact, and "
            "gguf is with final_logit_softcapping: null in base.yaml and digit_group: 1 in tokenizer.yaml"
        )
    notes, file = [f"not exact: {caveat}" for caveat in caveats], f"model-{outtype.upper()}.gguf"
    writer = gguf.GGUFWriter(folder / file, "qwen3")
    writer.add_name("nanochat")
    writer.add_description("; ".join(["nanochat, generation 1, as a Qwen3", *notes]))
    add_config(writer, config)
    add_tokenizer(writer, tokenizer, pre_tokenizer)
    add_tensors(writer, qwen3_tensors(load_model(str(source)).state_dict(), config), outtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    text = f"FROM ./{file}\n{MODELFILE}{config.max_position_embeddings}\n"
    (folder / "Modelfile").write_text(text, encoding="utf-8")
    (folder / "README.md").write_text("\n".join([CARD.format(command=f"{CHAT} {file}"), *notes]), encoding="utf-8")
    return [*notes, f"chat: {CHAT} {{folder}}/{file}"]


def refuse_impossible(config: NanoChatConfig) -> None:
    """Raises InputError for a model that no weights make a Qwen3."""
    refuse_scaled_rope(config, "a .gguf")
    if config.generation == 2:
        reason = "llama.cpp has no smear, value embeddings or backout: a .gguf holds generation 1 only"
    elif "sliding_attention" in config.layer_types:
        reason = "llama.cpp's Qwen3 has no sliding windows: train with window_pattern L"
    else:
        return
    raise InputError(f"{reason}; export it --to mlx or onnx, or serve the folder with vLLM")


def compare_tokenizer(tokenizer) -> tuple[str, list[str]]:
    """llama.cpp's name of the split pattern, and what it does otherwise. Raises InputError if it has none."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    caveats = ["text is not normalized there before it is tokenized"] if state["normalizer"] else []
    for digits, name in PRE_TOKENIZERS.items():
        if json.loads(new_backend(digits).to_str())["pre_tokenizer"] == state["pre_tokenizer"]:
            pairs = ["numbers are split into pairs of digits, and there into single ones"] if digits == 2 else []
            return name, pairs + caveats
    raise InputError("llama.cpp does not split text as this tokenizer does: export it --to mlx or onnx")


def add_config(writer: gguf.GGUFWriter, config: NanoChatConfig) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def add_tokenizer(writer: gguf.GGUFWriter, tokenizer, pre_tokenizer: str) -> None:
    """An answer ends at assistant_end, and at python_end, where a tool would run."""
    kinds = [gguf.TokenType.NORMAL] * len(tokenizer)
    for i in tokenizer.added_tokens_decoder:
        kinds[i] = gguf.TokenType.CONTROL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer)
    writer.add_token_list(tokenizer.convert_ids_to_tokens(list(range(len(tokenizer)))))
    writer.add_token_types(kinds)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.convert_tokens_to_ids("<|assistant_end|>"))
    writer.add_eom_token_id(tokenizer.convert_tokens_to_ids("<|python_end|>"))
    writer.add_add_bos_token(True)
    writer.add_chat_template(tokenizer.chat_template)


def qwen3_tensors(state: dict[str, Tensor], config: NanoChatConfig) -> Iterator[tuple[str, Tensor]]:
    """The weights of the Qwen3, by llama.cpp's names: see the head of this file."""
    rows, ones = config.num_tokens or config.vocab_size, torch.ones(config.hidden_size)
    embedding = state["model.embed_tokens.weight"][:rows]
    yield "token_embd.weight", F.rms_norm(embedding, embedding.shape[1:], eps=config.rms_norm_eps)
    yield "output_norm.weight", ones
    yield "output.weight", state["lm_head.weight"][:rows]
    mirror = torch.tensor([[1.0], [-1.0]]).repeat_interleave(config.head_dim // 2, dim=0)  # (D, 1)
    for i in range(config.num_hidden_layers):
        ours, theirs = f"model.layers.{i}.", f"blk.{i}."
        for name in ("q", "k"):
            weight = state[f"{ours}self_attn.{name}_proj.weight"]
            yield f"{theirs}attn_{name}.weight", weight * mirror.repeat(len(weight) // config.head_dim, 1)
            yield f"{theirs}attn_{name}_norm.weight", torch.full((config.head_dim,), float(config.qk_scale))
        yield f"{theirs}attn_v.weight", state[f"{ours}self_attn.v_proj.weight"]
        yield f"{theirs}attn_output.weight", state[f"{ours}self_attn.o_proj.weight"]
        yield f"{theirs}attn_norm.weight", ones
        yield f"{theirs}ffn_norm.weight", ones * NORM
        yield f"{theirs}ffn_gate.weight", state[f"{ours}mlp.fc1.weight"] * (SHARPNESS / NORM)
        yield f"{theirs}ffn_up.weight", state[f"{ours}mlp.fc1.weight"] / (SHARPNESS * NORM)
        yield f"{theirs}ffn_down.weight", state[f"{ours}mlp.fc2.weight"]


def add_tensors(writer: gguf.GGUFWriter, tensors: Iterator[tuple[str, Tensor]], outtype: str) -> None:
    """Matrices as `outtype`, the weights of norms as float32. Raises InputError for those that it cannot hold."""
    kind = gguf.GGMLQuantizationType[outtype.upper()]
    writer.add_file_type(gguf.LlamaFileType["ALL_F32" if outtype == "f32" else f"MOSTLY_{kind.name}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for name, tensor in tensors:
        if outtype in ("f16", "q8_0") and tensor.abs().max() > torch.finfo(torch.float16).max:
            raise InputError(f"{name} is too large for {outtype}: choose --outtype bf16")
        if outtype == "q8_0" and tensor.ndim == 2 and tensor.shape[1] % 32:
            raise InputError(f"{name} has rows of {tensor.shape[1]}, and q8_0 blocks of 32: choose --outtype f16")
        dtype = kind if tensor.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quantize(tensor.numpy(), dtype), raw_dtype=dtype)
