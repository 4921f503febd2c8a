"""Folders of transformers: its own `nanochat` <-> our model, and older folders of ours brought up to date.

`to_native` and `from_native` convert the first generation, with equal logits. `renew` rewrites the class names, model
code, templates and tool loop of a folder that an older version saved; the weights stay.
"""

import copy
import json
import os
import shutil
import tempfile
from pathlib import Path

import torch
from transformers import NanoChatConfig as NativeConfig
from transformers import NanoChatForCausalLM as NativeModel
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from .. import tool_loop
from ..data.tokenizer import with_todays_templates
from ..model.configuration_nanochat import AUTO_MAP, NanoChatConfig, update_class_names
from ..model.modeling_nanochat import NanoChatForCausalLM

NATIVE_FIELDS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "max_position_embeddings", "rms_norm_eps", "rope_parameters", "final_logit_softcapping", "attention_dropout",
    "bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings",
)  # fmt: skip
NO_EFFECT = {"use_cache", "bos_token_id", "eos_token_id", "pad_token_id", "layer_types"}  # the last is derived


def load_strictly(model: PreTrainedModel, state: dict[str, torch.Tensor]) -> PreTrainedModel:
    """Fills the model, in float32, which holds bfloat16 embeddings exactly. Raises ValueError on a mismatch."""
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise ValueError(" ".join(str(error).split())) from None
    return model.eval()


def refuse_differences(config: NanoChatConfig, target: NanoChatConfig, name: str) -> None:
    """Raises ValueError naming the fields with which `config` computes something else than `target`."""
    fields = [field for field in NanoChatConfig.__annotations__ if field not in NO_EFFECT]
    different = [f"{f}={getattr(config, f)}" for f in fields if getattr(config, f) != getattr(target, f)]
    if different:
        raise ValueError(f"{name} cannot express {', '.join(different)}; nearest: nanochat export --to mlx or onnx")


def to_native(model: NanoChatForCausalLM) -> NativeModel:
    """Converts a generation-1 model to transformers' own `nanochat`; ValueError names the fields that this lacks."""
    config = model.config
    same = (*NATIVE_FIELDS, "vocab_size", "num_tokens", "head_dim")
    target = NanoChatConfig.first_generation(**{name: getattr(config, name) for name in same})
    refuse_differences(config, target, "transformers' nanochat (the first generation)")
    fields = {name: getattr(config, name) for name in NATIVE_FIELDS}
    fields["final_logit_softcapping"] = (cap := config.final_logit_softcapping) and float(cap)  # it takes no int
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        fields["head_dim"] = config.head_dim
    rows = config.num_tokens or config.vocab_size
    native = NativeModel(NativeConfig(vocab_size=rows, **fields))
    native.generation_config = generation = copy.deepcopy(model.generation_config)
    if generation.pad_token_id == config.bos_token_id:  # its `generate` would mask the bos of prompts without a mask
        generation.pad_token_id = config.eos_token_id
    state = model.state_dict()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        state[name] = state[name][:rows]
    return load_strictly(native, state)


def from_native(native: NativeModel) -> NanoChatForCausalLM:
    """Converts transformers' `nanochat` to our model."""
    if native.config.attention_bias or native.config.hidden_act != "relu2":
        raise ValueError("only nanochat models without attention_bias and with hidden_act relu2 can be converted")
    fields = {name: getattr(native.config, name) for name in (*NATIVE_FIELDS, "vocab_size")}
    fields["head_dim"] = getattr(native.config, "head_dim", None)
    model = NanoChatForCausalLM(NanoChatConfig.first_generation(**fields))
    model.generation_config = native.generation_config
    return load_strictly(model, native.state_dict())


def renew(folder: Path) -> None:
    """Writes today's class names, model code, templates and tool loop into a folder of ours; weights stay.

    Files are replaced, never written to: a folder of hard links leaves the originals alone.
    """
    config = update_class_names(NanoChatConfig.get_config_dict(folder)[0])
    config = NanoChatConfig.from_dict(config | {"auto_map": dict(AUTO_MAP)})
    with tempfile.TemporaryDirectory(prefix=".renew-", dir=folder) as temporary:
        part = Path(temporary)
        config.save_pretrained(part)
        for file in (Path(__file__).parents[1] / "model").glob("*_nanochat.py"):
            shutil.copyfile(file, part / file.name)
        if all((folder / file).exists() for file in ("tokenizer.json", "tokenizer_config.json")):
            renew_templates(folder, part)
        if (folder / "custom_generate").exists():
            tool_loop.ship(part)
        for file in filter(Path.is_file, part.rglob("*")):
            (folder / file.relative_to(part)).parent.mkdir(exist_ok=True)
            os.replace(file, folder / file.relative_to(part))


def renew_templates(folder: Path, part: Path) -> None:
    """Writes today's templates for the tokenizer of `folder` into `part`; its other settings stay."""
    tokenizer = with_todays_templates(PreTrainedTokenizerFast.from_pretrained(folder))
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    if isinstance(tokenizer.chat_template, str):
        settings.pop("chat_template", None)  # where it was before it had a file of its own
        (part / "chat_template.jinja").write_text(tokenizer.chat_template, encoding="utf-8")
    if response := getattr(tokenizer, "response_template", None):
        settings["response_template"] = response
    text = json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False)
    (part / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
