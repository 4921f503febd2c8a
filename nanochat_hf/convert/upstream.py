"""Checkpoints of karpathy/nanochat (October 2025 and July 2026) <-> ours <-> transformers' own `nanochat`.

Upstream keeps `model_NNNNNN.pt` and `meta_NNNNNN.json` in one folder, its tokenizer in another. `convert` turns them
into a folder for `from_pretrained`, tokenizer included, and back; `nanochat convert` is its command line.
Weight files are read as plain weights, never as code.

Sources: karpathy/nanochat, gpt.py and checkpoint_manager.py at b399e43 (2025-11) and 92d63d4 (2026-07).
"""

import json
import re
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedTokenizerFast

from .. import loading, tool_loop
from ..data.tokenizer import refuse_other_model, with_todays_templates, wrap
from ..model.configuration_nanochat import SWITCHES, UPSTREAM_FIELDS, NanoChatConfig, update_class_names
from ..model.modeling_nanochat import NanoChatForCausalLM
from ..run import writing
from . import new_folder
from .native import from_native, load_strictly, refuse_differences, renew, to_native
from .tokenizer import backend_from_ranks, check_tokenizer, ranks_from_backend, read_tiktoken, write_tiktoken

NAMES = (  # part of a parameter's name: upstream's, ours
    ("transformer.wte.", "model.embed_tokens."), ("transformer.h.", "model.layers."),
    (".attn.c_q.", ".self_attn.q_proj."), (".attn.c_k.", ".self_attn.k_proj."), (".attn.c_v.", ".self_attn.v_proj."),
    (".attn.c_proj.", ".self_attn.o_proj."), (".attn.ve_gate.", ".self_attn.ve_gate."), (".mlp.c_fc.", ".mlp.fc1."),
    (".mlp.c_proj.", ".mlp.fc2."),
)  # fmt: skip
FEATURES = {name: name for name in SWITCHES} | {"residual_lambdas": "resid_lambdas"}  # switch: prefix of its names


def our_name(name: str) -> str:
    for upstream, ours in NAMES:
        name = name.replace(upstream, ours)
    return name if name.startswith(("model.", "lm_head.")) else f"model.{name}"


def upstream_name(name: str) -> str:
    for upstream, ours in NAMES:
        name = name.replace(ours, upstream)
    return name.removeprefix("model.")


def read_upstream(folder: Path, step: int | None = None) -> tuple[dict[str, torch.Tensor], dict, int]:
    """Reads one step of a checkpoint folder, the last by default. Returns: (state dict, meta file, step)."""
    steps = sorted(int(m[1]) for p in folder.glob("model_*.pt") if (m := re.fullmatch(r"model_(\d+)\.pt", p.name)))
    step = steps[-1] if step is None else step
    if step not in steps:
        raise ValueError(f"no model_{step:06d}.pt in {folder}: it has the steps {', '.join(map(str, steps))}")
    path, meta_path = folder / f"model_{step:06d}.pt", folder / f"meta_{step:06d}.json"
    if not meta_path.exists():
        raise ValueError(f"{meta_path} is missing: it says how large the model is, copy it from where the weights are")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or dishonest file makes torch.load fail in many ways
        name = re.search(r"GLOBAL (\S+) (?:was not|whose)", str(error))
        reason = f"it asks for {name[1]}" if name else f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
        raise ValueError(f"{path} is not a file of plain weights ({reason})") from None
    state = {name.removeprefix("_orig_mod."): value for name, value in state.items()}  # left by torch.compile
    try:
        return state, json.loads(meta_path.read_text()), step
    except ValueError as error:
        raise ValueError(f"{meta_path} is no JSON: {error}") from None


def config_from_upstream(fields: dict, state: dict[str, torch.Tensor]) -> NanoChatConfig:
    """Our config of an upstream checkpoint, whose parameters tell the generation; ValueError if it is of neither."""
    missing = [name for name in UPSTREAM_FIELDS if name not in fields and name != "window_pattern"]
    unknown = [name for name in fields if name not in UPSTREAM_FIELDS]
    if missing or unknown:
        raise ValueError(f"model_config of the meta file: missing {missing}, unknown {unknown}, has {sorted(fields)}")
    has = [switch for switch, prefix in FEATURES.items() if any(name.startswith(prefix) for name in state)]
    ours = {UPSTREAM_FIELDS[name]: value for name, value in fields.items()}
    ours["vocab_size"] = state["transformer.wte.weight"].shape[0]
    if ours["num_tokens"] == ours["vocab_size"]:
        ours["num_tokens"] = None
    if len(has) == len(FEATURES):
        return NanoChatConfig(**ours)
    if has or ours.get("window_pattern", "L").strip("L"):
        raise ValueError(
            "this checkpoint is between the two generations that can be read (October 2025, July 2026): it has "
            f"{', '.join(has) or 'no new parameter'} and window_pattern {ours.get('window_pattern')}, and lacks "
            f"{', '.join(name for name in FEATURES if name not in has)}"
        )
    return NanoChatConfig.first_generation(**ours)


def from_upstream(state: dict[str, torch.Tensor], meta: dict) -> NanoChatForCausalLM:
    """Converts upstream's state dict and meta file to our model, in float32."""
    if not {"transformer.wte.weight", "lm_head.weight"} <= set(state) or "model_config" not in meta:
        raise ValueError("this is no checkpoint of karpathy/nanochat: transformer.wte or model_config is missing")
    if wrong := [name for name, value in state.items() if not (value.is_floating_point() and value.isfinite().all())]:
        raise ValueError(f"{wrong[0]} has values that are not finite, or integers: take an earlier checkpoint")
    model = NanoChatForCausalLM(config_from_upstream(meta["model_config"], state))
    return load_strictly(model, {our_name(name): value for name, value in state.items()})


def to_upstream(model: NanoChatForCausalLM) -> tuple[dict[str, torch.Tensor], dict]:
    """Our model as (state dict, model_config) for upstream's `build_model`; ValueError if that cannot express it."""
    config = model.config
    fields = {name: getattr(config, ours) for name, ours in UPSTREAM_FIELDS.items()}
    rows = fields["vocab_size"] = config.num_tokens or config.vocab_size
    same = {ours: getattr(config, ours) for ours in (*UPSTREAM_FIELDS.values(), "vocab_size")}
    target = NanoChatConfig.first_generation(**same) if config.generation == 1 else NanoChatConfig(**same)
    refuse_differences(config, target, f"upstream's generation {config.generation}")
    if config.generation == 1:
        del fields["window_pattern"]  # unknown in October 2025
    else:
        rows = -(-rows // 64) * 64
    state = {}
    for name, value in model.state_dict().items():
        if "embed" in name or name == "lm_head.weight":  # the tables with one row per token
            value = torch.nn.functional.pad(value[:rows], (0, 0, 0, max(0, rows - len(value))))
        if "embed" in name and torch.equal(value.bfloat16().float(), value.float()):
            value = value.bfloat16()  # as upstream stores them
        state[upstream_name(name)] = value.contiguous().clone()
    return state, fields


def read_tokenizer(folder: Path, texts: Iterable[str]) -> tuple[PreTrainedTokenizerFast, int]:
    """Reads tokenizer.pkl or tokenizer.json. Returns: (tokenizer, ids on which it was compared with upstream's)."""
    if (folder / "tokenizer.pkl").exists():
        ranks, pattern, special = read_tiktoken(folder / "tokenizer.pkl")
        tokenizer = wrap(backend_from_ranks(ranks, pattern))
        return tokenizer, check_tokenizer(tokenizer.backend_tokenizer, ranks, pattern, special, texts)
    if (folder / "tokenizer.json").exists():
        return with_todays_templates(PreTrainedTokenizerFast.from_pretrained(folder)), 0
    raise ValueError(f"no tokenizer.pkl and no tokenizer.json in {folder}")


def set_token_ids(model: NanoChatForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Copy the ids of the tokenizer into the model's configs. Raises ValueError if the two do not fit."""
    size = model.config.num_tokens or model.config.vocab_size
    if len(tokenizer) != size:
        raise ValueError(f"the tokenizer has {len(tokenizer)} tokens and the model {size}: take the model's own")
    if getattr(model.config, "token_ids", None):  # a model of upstream's has no record of them
        refuse_other_model(tokenizer, model.config)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    for name, value in ids.items():
        setattr(model.config, name, value)
    generation = model.generation_config
    if generation.eos_token_id is None:
        # A base model ends a document with the bos of the next, a chat model its answer with eos.
        ends = [tokenizer.eos_token_id, tokenizer.bos_token_id]
        model.generation_config = GenerationConfig(**ids | {"eos_token_id": ends})
    elif isinstance(generation.eos_token_id, int):
        generation.eos_token_id = [generation.eos_token_id]


def may_call_tools(source: Path, model: NanoChatForCausalLM, tokenizer: PreTrainedTokenizerFast | None) -> bool:
    """Whether the model needs the tool loop: all but base models of ours, since upstream does not record the stage."""
    end = tokenizer and tokenizer.get_vocab().get("<|python_end|>")
    if end is None or (source / "custom_generate").exists():
        return end is not None
    return end in model.generation_config.eos_token_id or not (source / "configuration_nanochat.py").exists()


def read_checkpoint(source: Path, step: int | None) -> tuple[NanoChatForCausalLM, int]:
    """Reads any of the three kinds of checkpoint folder. Returns: (our model, step)."""
    if any(source.glob("model_*.pt")):
        state, meta, step = read_upstream(source, step)
        return from_upstream(state, meta), step
    if not (source / "config.json").exists():
        raise ValueError(f"{source} has neither model_NNNNNN.pt (karpathy/nanochat) nor config.json (transformers)")
    fields = loading.read_config(source)
    kind = fields.get("model_type")
    if kind not in ("nanochat", NanoChatConfig.model_type):
        raise ValueError(f"{source} holds no nanochat: its config.json {f'is of a {kind}' if kind else 'is damaged'}")
    if fields.get("quantization_config"):
        raise ValueError(f"{source} is quantized: convert the unquantized model")
    if kind == "nanochat":
        return from_native(loading.load_model(str(source))), step or 0
    config = NanoChatConfig.from_dict(update_class_names(fields))  # without the advice to renew the folder
    return loading.load_model(str(source), config=config), step or 0


def write_upstream(folder: Path, model, tokenizer, step: int, texts: Iterable[str]) -> int | None:
    """Writes what upstream loads. Returns: number of ids on which both tokenizers were compared, None without one."""
    state, fields = to_upstream(model)
    torch.save(state, folder / f"model_{step:06d}.pt")
    (folder / f"meta_{step:06d}.json").write_text(json.dumps({"step": step, "model_config": fields}, indent=2))
    if tokenizer is None:
        return None
    ranks, pattern, special = ranks_from_backend(tokenizer.backend_tokenizer)
    write_tiktoken(folder / "tokenizer.pkl", ranks, pattern, special)
    lengths = torch.zeros(len(tokenizer), dtype=torch.int32)  # for upstream's bits per byte; special tokens 0
    lengths[list(ranks.values())] = torch.tensor([*map(len, ranks)], dtype=torch.int32)
    torch.save(lengths, folder / "token_bytes.pt")
    return check_tokenizer(tokenizer.backend_tokenizer, ranks, pattern, special, texts)


def write_transformers(folder: Path, model, tokenizer, native: bool, calls_tools: bool) -> None:
    """Writes a folder for from_pretrained, with the tool loop if the model calls tools."""
    if calls_tools:  # where the loop does not run, an answer ends at its call
        ends = [*model.generation_config.eos_token_id, tokenizer.convert_tokens_to_ids("<|python_end|>")]
        model.generation_config.eos_token_id = list(dict.fromkeys(ends))
        tool_loop.ship(folder)
    (to_native(model) if native else model).save_pretrained(folder)
    if tokenizer is not None:
        if native and not calls_tools:  # transformers then leaves padding out of a base model's texts
            tokenizer.response_template = None
        tokenizer.save_pretrained(folder)


def convert(
    source: str | Path,
    output: str | Path,
    to: str = "hf",
    tokenizer: str | Path | None = None,
    step: int | None = None,
    texts: Iterable[str] = (),
) -> dict:
    """Converts one checkpoint folder; the output appears whole or not at all.

    Args:
        source: folder of upstream, of ours or of transformers' `nanochat`.
        output: folder to write; must not exist. With `hf` it may be `source`, a folder of ours, which is then renewed.
        to: `hf` (ours), `native` (transformers' nanochat) or `nanochat` (upstream).
        tokenizer: folder of its tokenizer; by default that of `source` if it has one, else weights alone are written.
        step: which of several checkpoints in `source`; when writing upstream's, the number in the file names.
        texts: on which, besides a generated sample, both tokenizers must give the same ids.

    Returns: generation, number of parameters, step, `tokenizer_ids` (compared; 0: copied, None: no tokenizer).

    Raises ValueError with one line on what cannot be converted; a damaged file raises what its reader does.
    """
    source, output = Path(source), Path(output)
    in_place = to == "hf" and output.exists() and output.samefile(source)
    in_place = in_place and (source / "configuration_nanochat.py").exists()
    if step is not None and to != "nanochat" and not any(source.glob("model_*.pt")):
        raise ValueError(f"--step chooses among model_NNNNNN.pt files (karpathy/nanochat), and {source} has none")
    if source.resolve() in output.resolve().parents:
        raise ValueError(f"{output} lies inside of {source}: choose a folder beside it")
    with nullcontext(source) if in_place else new_folder(output) as folder:
        model, step = read_checkpoint(source, step)
        compared = None
        if in_place:
            renew(source)
        if tokenizer is None and any((source / f"tokenizer.{kind}").exists() for kind in ("json", "pkl")):
            tokenizer = source
        if tokenizer is not None:
            tokenizer, compared = read_tokenizer(Path(tokenizer), texts)
            set_token_ids(model, tokenizer)
        with writing(output):
            if to == "nanochat":
                compared = write_upstream(folder, model, tokenizer, step, texts)
            elif not in_place:
                write_transformers(folder, model, tokenizer, to == "native", may_call_tools(source, model, tokenizer))
    count = sum(p.numel() for p in model.parameters())
    return {"generation": model.config.generation, "parameters": count, "step": step, "tokenizer_ids": compared}
