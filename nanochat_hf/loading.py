"""Reads a model for training, evaluation and serving alike: from a folder or the Hub, or one clear error."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Annotated, NotRequired

import torch
from annotated_types import MinLen
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
from safetensors import safe_open
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import cached_file
from transformers.utils.logging import disable_progress_bar

from .errors import InputError, in_a_line
from .metrics import record
from .model.configuration_nanochat import MAX_LAYERS, NanoChatConfig
from .model.modeling_nanochat import ZEROS
from .run import first_non_finite, load_json

quiet_downloads = are_progress_bars_disabled()
disable_progress_bar()  # of files on this disk, and of downloads, which stay
if not quiet_downloads:
    enable_progress_bars()
configs = logging.getLogger("transformers.configuration_utils")
configs.addFilter(lambda record: "Can't set" not in str(record.msg))  # the error that follows says it in a line
reports = logging.getLogger("transformers.modeling_utils")
reports.addFilter(lambda record: "LOAD REPORT" not in str(record.msg))  # load_model says it in a line


TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
GENERATION = "temperature top_p top_k max_length max_new_tokens min_length num_beams repetition_penalty"
GenerationFields = record(  # of generation_config.json
    "GenerationFields",
    GENERATION,
    eos_token_id=NotRequired[int | Annotated[list[int], MinLen(1)] | None],
    **dict.fromkeys(("bos_token_id", "pad_token_id"), NotRequired[int | None]),
    **dict.fromkeys(("do_sample", "use_cache"), NotRequired[bool | None]),
)


def read_config(source: str | Path) -> dict:
    """Returns config.json, {} if there is none.

    Raises ValueError for what transformers would take or replace silently: layers that fill the memory when built, a
    damaged generation_config.json, token ids that a model of ours lacks, two values of rope_theta; and other outputs
    than usual, with which a training would fail, at its end.
    """
    config, generation = {}, None
    with suppress(OSError):  # no config.json, as in an adapter's folder
        config, _ = PreTrainedConfig.get_config_dict(source)
        path = cached_file(source, "generation_config.json", _raise_exceptions_for_missing_entries=False)
        generation = load_json(path, "copy it again", GenerationFields) if path else None
    for name, usual in (("return_dict", True), ("output_hidden_states", False), ("output_attentions", False)):
        if config.get(name, usual) not in (usual, None):
            raise ValueError(f"{name} is {config[name]!r}: it must be {str(usual).lower()}")
    layers = config.get("text_config") or config
    for name in ("num_hidden_layers", "n_layer", "num_layers"):
        if isinstance(layers.get(name), int) and layers[name] > MAX_LAYERS:
            raise ValueError(f"{name} is {layers[name]}: at most {MAX_LAYERS}")
    num_ids = config.get("vocab_size") if "nanochat" in str(config.get("model_type")) else None
    for name in TOKEN_IDS if isinstance(num_ids, int) else ():
        for ids in (config.get(name), (generation or {}).get(name)):
            if any(isinstance(i, int) and not 0 <= i < num_ids for i in (ids if isinstance(ids, list) else [ids])):
                raise ValueError(f"{name} is {ids}: the model has {num_ids} tokens")
    theta, inner = config.get("rope_theta"), config.get("rope_parameters")
    if theta is not None and isinstance(inner, dict) and inner.get("rope_theta", theta) != theta:
        raise ValueError(f"rope_theta is {theta!r}, and in rope_parameters {inner['rope_theta']!r}: leave one out")
    return config


def load_config(source: str | Path) -> PreTrainedConfig:
    """The config of a folder or Hub id. Raises InputError when there is none that can be read."""
    try:
        read_config(source)
        return AutoConfig.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # json's and the config's have no common type
        raise unreadable(source, error) from None


def download(source: str) -> str:
    """A folder as it is; for a Hub id, its model files in the cache. Raises InputError if there is neither."""
    if os.path.isdir(source):
        return source
    try:
        return snapshot_download(source, allow_patterns=["*.safetensors", "*.json", "*.jinja", "*.py"])
    except (HfHubHTTPError, HTTPError, OSError, ValueError) as error:  # of the Hub, the network, the cache, the name
        raise InputError(f"{source} is no folder, and cannot be downloaded from the Hub: {in_a_line(error)}") from None


def is_quantized(model: torch.nn.Module) -> bool:
    """Whether a weight is an integer (bitsandbytes) or packed tensor (torchao, quanto) that only modules read."""
    return not all(map(is_plain, model.parameters()))


def is_plain(p: torch.Tensor) -> bool:
    return p.is_floating_point() and (not hasattr(p, "__tensor_flatten__") or isinstance(p, DTensor))


def unreadable(source: str | Path, error: Exception) -> InputError:
    reason = "it is a run folder: add a stage, as in /sft" if Path(source, "tokenizer").is_dir() else in_a_line(error)
    if isinstance(error, ModuleNotFoundError):  # of a quantized folder
        reason += f"; pip install {error.name}"
    return InputError(f"no model in {source} that can be read: {reason}")


def load_model(
    source: str,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
    attn_implementation: str | None = None,
    config: PreTrainedConfig | None = None,
) -> PreTrainedModel:
    """The causal LM of folder or Hub id `source`, in eval mode, on `device` (None: where transformers puts it).

    `config` stands for the folder's. A quantized model keeps its own dtype. Code from `source` is not executed. Raises
    InputError: no model, damaged files, weights that are not finite, integers or zeros, too little memory on `device`.
    """
    try:
        if read_config(source).get("quantization_config"):
            dtype = "auto"  # as its kernels expect
        options = {"config": config, "dtype": dtype, "attn_implementation": attn_implementation}
        options |= {"ignore_mismatched_sizes": True, "output_loading_info": True}  # what does not fit is named below
        model, info = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=False, **options)
    except Exception as error:  # safetensors', json's and the config's have no common type
        raise unreadable(source, error) from None
    wrong = [*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])]  # which have random numbers
    unused = [*info["unexpected_keys"]]
    if wrong := wrong + unused * isinstance(model.config, NanoChatConfig):
        raise InputError(f"config.json and weights of {source} do not belong together: see {min(wrong)}")
    if unused:
        print(f"warning: {source} has weights that its model does not use, such as {min(unused)}", file=sys.stderr)
    try:
        model = model if device is None else model.to(device)
    except (RuntimeError, AssertionError) as error:  # out of memory, no such device
        raise InputError(f"{source} cannot be used on {device}: {str(error).splitlines()[0]}; try cpu") from None
    if name := first_non_finite((name, p) for name, p in model.named_parameters() if is_plain(p)):
        raise InputError(f"the weights of {source} are not finite (NaN or infinity in {name}): take earlier ones")
    wrong = wrong_int8(model) if is_quantized(model) else no_floats(source, model)
    if damage := next(chain(wrong, zeros(model)), None):
        raise InputError(f"the weights of {source} are damaged: {damage}; copy them again")
    return model


def wrong_int8(model: PreTrainedModel) -> Iterator[str]:
    """torchao's int8 matrices whose integers or scales, one per row, have another form; it reads them nevertheless."""
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if type(weight).__name__ == "Int8Tensor":
            data, scale, shape = weight.qdata, weight.scale, (module.out_features, module.in_features)
            if (data.shape, data.dtype, scale.numel()) != (shape, torch.int8, shape[0]) or not scale.isfinite().all():
                yield f"{name} has integers or scales of another form"


def no_floats(source: str, model: PreTrainedModel) -> Iterator[str]:
    """The parameters that are integers or complex in the files, which transformers converts."""
    names = dict(model.named_parameters())
    config = cached_file(source, "config.json", _raise_exceptions_for_missing_entries=False)  # None of an adapter
    for path in Path(config).parent.glob("*.safetensors") if config else ():
        with safe_open(path, "pt") as file:
            for name in names.keys() & {*file.keys()}:
                if not (dtype := file.get_slice(name).get_dtype()).startswith(("F", "BF")):
                    yield f"{name} is {dtype}"


def zeros(model: PreTrainedModel) -> Iterator[str]:
    """The matrices without any value but zero that do not begin as zeros, as output projections do."""
    for name, module in model.named_modules():
        begins = module is model.get_input_embeddings() or getattr(module, "init_fn", ZEROS) is not ZEROS
        weight = getattr(module, "weight", None)
        if begins and weight.is_floating_point() and not (weight if is_plain(weight) else weight.dequantize()).any():
            yield f"{name} is all zero"
