"""ONNX files in the layout of transformers.js 4, for browsers, Node and onnxruntime: both generations.

`onnx/model.onnx` (float32), `onnx/model_fp16.onnx` and `onnx/model_quantized.onnx` (int8) contain one decoding step:

    input_ids (B, T), attention_mask (B, P + T), position_ids (B, T), num_logits_to_keep (0: all)
    past_key_values.I.key and .value (B, H_kv, P, D) of each layer, past_conv.L (B, C, 1) for the smear
    -> logits (B, kept, num_tokens), present.I.key and .value (B, H_kv, P + T, D), present_conv.L

A sliding window is part of the mask, so all layers keep the keys of all P positions. transformers.js creates the cache
by the model type in config.json: `nanochat` for generation 1, `lfm2` for generation 2. The latter has convolution
states: `past_conv.L` is the previous token's embedding, zeros at first, so the first token gets no smear.
"""

import json
import logging
import shutil
import tempfile
import warnings
from pathlib import Path

import numpy as np
import onnxruntime
import onnxscript  # noqa: F401  (torch.onnx needs it)
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from torch import nn

from ..errors import InputError
from ..loading import load_model
from ..model.modeling_nanochat import NanoChatForCausalLM, project, rms_norm
from ..run import save_json
from . import copy_checkpoint, refuse_scaled_rope

MASKED = -1e4  # added to scores; float16 can hold it, and its exponential is zero
END = 2**62  # of a slice that has none
MAX_BYTES = 2**31 - 2**24  # of the weights in one file


class GraphCache:
    """Keys, values and the smear's state as inputs and outputs of the graph; called as a cache of transformers."""

    offloading = False

    def __init__(self, tensors: list[torch.Tensor], layers: int):
        self.tensors, self.layers = list(tensors), layers

    def update(self, key: torch.Tensor, value: torch.Tensor, layer: int) -> list[torch.Tensor]:
        pair = slice(2 * layer, 2 * layer + 2)
        self.tensors[pair] = [torch.cat(parts, dim=2) for parts in zip(self.tensors[pair], (key, value))]
        return self.tensors[pair]

    def has_previous_state(self, layer: int) -> bool:
        return True  # of zeros at the start

    def update_conv_state(self, x: torch.Tensor, layer: int, conv_kernel_size: int) -> torch.Tensor:
        states = torch.cat([self.tensors[-1], x], dim=2)
        self.tensors[-1] = states[..., -1:]
        return states


class Step(nn.Module):
    """One step of decoding with the names and shapes above; `cache` lists the inputs that begin with `past`."""

    def __init__(self, model: NanoChatForCausalLM):
        super().__init__()
        self.model, self.config = model, model.config
        # float16 ends at 65504, and the residual stream of generation 1 may not: the norms take the factor out again
        self.share = 2**-4 if model.dtype == torch.float16 else 1
        for layer in model.model.layers:
            for matrix in (layer.self_attn.o_proj, layer.mlp.fc2):
                matrix.weight.data *= self.share

    def masks(self, attention_mask: torch.Tensor, length: int, past: int, dtype: torch.dtype) -> dict:
        """Returns what is added to the scores, (B, 1, T, P + T), for both kinds of layers."""
        distance = (past + torch.arange(length))[:, None] - torch.arange(past + length)
        hidden = (distance < 0) | (attention_mask == 0)[:, None, None, :]
        window = self.config.sliding_window
        sliding = hidden if window is None else hidden | (distance >= window)
        zero, masked = torch.zeros((), dtype=dtype), torch.full((), MASKED, dtype=dtype)
        kinds = {"full_attention": hidden, "sliding_attention": sliding}
        return {kind: torch.where(mask, masked, zero) for kind, mask in kinds.items()}

    def forward(self, input_ids, attention_mask, position_ids, num_logits_to_keep, cache):
        config, core = self.config, self.model.model
        x = rms_norm(core.embed_tokens(input_ids), config.rms_norm_eps)
        masks = self.masks(attention_mask, input_ids.shape[1], cache[0].shape[2], x.dtype)
        cache = GraphCache(cache, config.num_hidden_layers)
        if config.smear:
            x = core.apply_smear(x, position_ids, None, cache)
        x = x * self.share
        x = core.run_layers(x, input_ids, core.rotary_emb(x, position_ids), masks, cache)
        # x[:, -n:] for an n of the input, in ONNX itself: torch would not export the case 0, all positions
        shape = (x.shape[0], num_logits_to_keep.item(), x.shape[2])
        slices = [-num_logits_to_keep.reshape(1), torch.tensor([END]), torch.tensor([1])]
        x = torch.onnx.ops.symbolic("Slice", [x, *slices], dtype=x.dtype, shape=shape)
        logits = project(self.model.lm_head, rms_norm(x, config.rms_norm_eps))[..., : config.num_tokens].float()
        if (cap := config.final_logit_softcapping) is not None:
            logits = cap * torch.tanh(logits / cap)
        return logits, *cache.tensors


def write_graph(model: NanoChatForCausalLM, path: Path) -> None:
    """Writes one step of the model to `path`, in the model's dtype."""
    config, layers = model.config, model.config.num_hidden_layers
    batch, length, past = 2, 3, 5  # of the example; each different, and none 0 or 1
    kv = (batch, config.num_key_value_heads, past, config.head_dim)
    shapes = {f"past_key_values.{i}.{part}": kv for i in range(layers) for part in ("key", "value")}
    if config.smear:
        shapes[f"past_conv.{layers}"] = (batch, config.hidden_size, 1)
    b, t, p = "batch_size", "sequence_length", "past_sequence_length"
    arguments = {  # all tensors are different ones: torch takes the same one twice for one input
        "input_ids": (torch.ones(batch, length, dtype=torch.long), {0: b, 1: t}),
        "attention_mask": (torch.ones(batch, past + length, dtype=torch.long), {0: b, 1: "total_sequence_length"}),
        "position_ids": (torch.ones(batch, length, dtype=torch.long), {0: b, 1: t}),
        "num_logits_to_keep": (torch.tensor(1), {}),
        "cache": (
            [torch.zeros(shape, dtype=model.dtype) for shape in shapes.values()],
            [{0: b, 2: p} if shape == kv else {0: b} for shape in shapes.values()],
        ),
    }
    present = [name.replace("past_key_values", "present").replace("past", "present") for name in shapes]
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # of torchvision, which is not needed
    with warnings.catch_warnings(action="ignore"):
        program = torch.onnx.export(
            Step(model).eval(),
            kwargs={name: value for name, (value, _) in arguments.items()},
            dynamic_shapes={name: dims for name, (_, dims) in arguments.items()},
            input_names=[*list(arguments)[:-1], *shapes],
            output_names=["logits", *present],
            opset_version=20,
            dynamo=True,
            verbose=False,
        )
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # stack traces with paths of this machine
    program.model.metadata_props["onnx.quant.pre_process"] = "onnxruntime.quant"  # quantization would warn: no shapes
    program.save(path)


def write_config(model: NanoChatForCausalLM, folder: Path) -> None:
    """Writes config.json as transformers.js reads it, and the chat template where it looks for it."""
    config = model.config
    fields = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
    fields += ("max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
    kind = {"model_type": "nanochat", "architectures": ["NanoChatForCausalLM"]}
    if config.smear:
        layer_types = ["full_attention"] * config.num_hidden_layers + ["conv"]
        kind = {"model_type": "lfm2", "architectures": ["Lfm2ForCausalLM"], "layer_types": layer_types}
    values = {name: getattr(config, name) for name in fields}
    save_json(folder / "config.json", {**kind, **values, "vocab_size": config.num_tokens or config.vocab_size})
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    template = folder / "chat_template.jinja"
    if template.exists():
        settings["chat_template"] = template.read_text(encoding="utf-8")
    save_json(folder / "tokenizer_config.json", settings)
    for path in folder.iterdir():
        if path.suffix in (".py", ".jinja", ".safetensors") or path.name.endswith(".index.json"):
            path.unlink()
    shutil.rmtree(folder / "custom_generate", ignore_errors=True)


def run_graph(path: Path, ids: np.ndarray) -> np.ndarray:
    """Returns the logits (T, num_tokens) of the file for ids (1, T)."""
    session = onnxruntime.InferenceSession(path)
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(ids.shape[1])[None]}
    feeds["num_logits_to_keep"] = np.array(0)
    for entry in session.get_inputs()[4:]:
        shape = [size if isinstance(size, int) else int(size == "batch_size") for size in entry.shape]
        feeds[entry.name] = np.zeros(shape, np.float16 if "float16" in entry.type else np.float32)
    return session.run(["logits"], feeds)[0][0]


@torch.no_grad()
def write(source: Path, folder: Path) -> list[str]:
    """Fills `folder`; returns lines with each file's size, on how many tokens it agrees with torch, and how to use it.

    Raises InputError for no checkpoint, for RoPE that is scaled, and for more than 2 GB in float32.
    """
    copy_checkpoint(source, folder)
    model = load_model(str(folder), attn_implementation="eager")
    refuse_scaled_rope(model.config, "ONNX")
    if (size := 4 * model.num_parameters()) > MAX_BYTES:
        raise InputError(f"{source} is {size / 1e9:.1f} GB in float32 and an ONNX file holds 2: export it --to mlx")
    torch.manual_seed(0)
    start = torch.tensor([[model.config.bos_token_id or 0]])
    text = model.generate(start, max_new_tokens=64, eos_token_id=None, do_sample=True)
    expected = model(text).logits[0].numpy()
    write_config(model, folder)
    files = [folder / "onnx" / f"model{suffix}.onnx" for suffix in ("", "_quantized", "_fp16")]
    files[0].parent.mkdir()
    write_graph(model, files[0])
    quantize_dynamic(files[0], files[1], per_channel=True, weight_type=QuantType.QUInt8)
    write_graph(model.half(), files[2])
    lines = []
    for path in files:
        logits = run_graph(path, text.numpy())
        if not np.isfinite(logits).all() or (path == files[0] and np.abs(logits - expected).max() > 0.01):
            raise InputError(f"{path.name} does not compute what torch does for {source}: export it --to mlx")
        agree = f"{(logits.argmax(-1) == expected.argmax(-1)).sum()} of {len(logits)} tokens as torch"
        lines.append(f"onnx/{path.name}: {path.stat().st_size / 1e6:.1f} MB, {agree}")
    page = "python -m http.server -d spaces/browser (its folder model: a copy of {folder})"
    return [*lines, f"page:    {page}", "publish: hf upload you/NAME {folder}"]


def add(folder: Path) -> list[str]:
    """Adds onnx/ with its own config.json to a checkpoint folder, and the chat template to tokenizer_config.json."""
    with tempfile.TemporaryDirectory(prefix=".onnx-", dir=folder.parent) as temporary:
        part = Path(temporary)
        write(folder, part)
        shutil.copyfile(part / "config.json", part / "onnx" / "config.json")
        shutil.copytree(part / "onnx", folder / "onnx", dirs_exist_ok=True)
        shutil.copyfile(part / "tokenizer_config.json", folder / "tokenizer_config.json")
    return [
        'config = await (await fetch("https://huggingface.co/{folder}/resolve/main/onnx/config.json")).json()',
        'chat = await pipeline("text-generation", "{folder}", {{ config, dtype: "q8" }})  // transformers.js 4',
    ]
