"""Checkpoints of karpathy/nanochat (October 2025 and July 2026) <-> ours <-> transformers' own `nanochat`.

Upstream keeps `model_NNNNNN.pt` and `meta_NNNNNN.json` in a folder, and its tokenizer in another. Nobody else reads
those; `convert` writes folders for `from_pretrained`, tokenizer included, and the way back, and is what
`scripts/convert_checkpoint.py` calls. Weight files are read as plain weights, never as code.

Sources: karpathy/nanochat, gpt.py and checkpoint_manager.py at b399e43 (2025-11) and 92d63d4 (2026-07).
"""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers import NanoChatConfig as NativeConfig
from transformers import NanoChatForCausalLM as NativeModel

from ..model.configuration_nanochat import SWITCHES, NanoChatConfig, update_class_names
from ..model.configuration_nanochat import UPSTREAM_FIELDS as FIELDS
from ..model.modeling_nanochat import NanoChatForCausalLM
from ..model.quantization import is_quantized
from .tokenizer import backend_from_ranks, check_tokenizer, ranks_from_backend, read_tiktoken, write_tiktoken

NAMES = (  # a piece of a parameter's name: upstream's, ours
    ("transformer.wte.", "model.embed_tokens."),
    ("transformer.h.", "model.layers."),
    (".attn.c_q.", ".self_attn.q_proj."),
    (".attn.c_k.", ".self_attn.k_proj."),
    (".attn.c_v.", ".self_attn.v_proj."),
    (".attn.c_proj.", ".self_attn.o_proj."),
    (".attn.ve_gate.", ".self_attn.ve_gate."),
    (".mlp.c_fc.", ".mlp.fc1."),
    (".mlp.c_proj.", ".mlp.fc2."),
)
FEATURES = {name: name for name in SWITCHES} | {"residual_lambdas": "resid_lambdas"}  # switch: prefix of its names
NATIVE_FIELDS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "max_position_embeddings", "rms_norm_eps", "rope_parameters", "final_logit_softcapping", "attention_dropout",
    "bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings",
)  # fmt: skip


# ---- weights and config -------------------------------------------------------------------------------------------


def our_name(name: str) -> str:
    """Upstream's name of a parameter -> ours."""
    for theirs, ours in NAMES:
        name = name.replace(theirs, ours)
    return name if name.startswith(("model.", "lm_head.")) else f"model.{name}"


def their_name(name: str) -> str:
    """Our name of a parameter -> upstream's."""
    for theirs, ours in NAMES:
        name = name.replace(ours, theirs)
    return name.removeprefix("model.")


def read_upstream(folder: Path, step: int | None = None) -> tuple[dict[str, torch.Tensor], dict, int]:
    """-> (upstream's state dict, its meta file, step) of one step in a checkpoint folder, the last by default."""
    steps = sorted(int(m[1]) for p in folder.glob("model_*.pt") if (m := re.fullmatch(r"model_(\d+)\.pt", p.name)))
    step = steps[-1] if step is None else step
    if step not in steps:
        raise ValueError(f"no model_{step:06d}.pt in {folder}: it has the steps {', '.join(map(str, steps))}")
    meta_path = folder / f"meta_{step:06d}.json"
    if not meta_path.exists():
        raise ValueError(f"{meta_path} is missing: it says how large the model is, copy it from where the weights are")
    try:
        state = torch.load(folder / f"model_{step:06d}.pt", map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or dishonest file makes torch.load fail in many ways
        asked = re.search(r"GLOBAL (\S+) (?:was not|whose)", str(error))
        reason = f"it asks for {asked[1]}" if asked else f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
        raise ValueError(f"{folder}/model_{step:06d}.pt is not a file of plain weights ({reason})") from None
    state = {name.removeprefix("_orig_mod."): value for name, value in state.items()}  # left by torch.compile
    try:
        return state, json.loads(meta_path.read_text()), step
    except ValueError as error:
        raise ValueError(f"{meta_path} is no JSON: {error}") from None


def config_from_upstream(fields: dict, state: dict[str, torch.Tensor]) -> NanoChatConfig:
    """-> our config of an upstream checkpoint. The generation is told by the parameters that it has.

    Raises ValueError when a field is missing or unknown, or when the checkpoint is of neither generation.
    """
    missing = [name for name in FIELDS if name not in fields and name != "window_pattern"]
    unknown = [name for name in fields if name not in FIELDS]
    if missing or unknown:
        raise ValueError(f"model_config of the meta file: missing {missing}, unknown {unknown}, has {sorted(fields)}")
    has = [ours for ours, theirs in FEATURES.items() if any(name.startswith(theirs) for name in state)]
    ours = {FIELDS[name]: value for name, value in fields.items()}
    ours["vocab_size"] = state["transformer.wte.weight"].shape[0]
    if ours["num_tokens"] == ours["vocab_size"]:
        ours["num_tokens"] = None
    if len(has) == len(FEATURES):
        return NanoChatConfig(**ours)
    if has or ours.get("window_pattern", "L").strip("L"):
        raise ValueError(
            "this checkpoint stands between the two generations that can be read (October 2025, July 2026): it has "
            f"{', '.join(has) or 'no new parameter'} and window_pattern {ours.get('window_pattern')}, and lacks "
            f"{', '.join(name for name in FEATURES if name not in has)}"
        )
    return NanoChatConfig.first_generation(**ours)


def load_strictly(model: PreTrainedModel, state: dict[str, torch.Tensor]) -> PreTrainedModel:
    """Fills the model, in float32, which holds bfloat16 embeddings exactly. Raises ValueError on a mismatch."""
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise ValueError(" ".join(str(error).split())) from None
    return model.eval()


def from_upstream(state: dict[str, torch.Tensor], meta: dict) -> NanoChatForCausalLM:
    """Upstream's state dict and meta file -> our model, in float32."""
    if not {"transformer.wte.weight", "lm_head.weight"} <= set(state) or "model_config" not in meta:
        raise ValueError("this is no checkpoint of karpathy/nanochat: transformer.wte or model_config is missing")
    model = NanoChatForCausalLM(config_from_upstream(meta["model_config"], state))
    return load_strictly(model, {our_name(name): value for name, value in state.items()})


def differences(config: NanoChatConfig, like: NanoChatConfig, ignore: Iterable[str] = ()) -> list[str]:
    """Names and values of the fields that shape the function and differ between two configs."""
    passing = {"use_cache", "dtype", "auto_map", "bos_token_id", "eos_token_id", "pad_token_id", "architectures"}
    names = [name for name in NanoChatConfig.__annotations__ if name not in passing | set(ignore)]
    return [f"{n}={getattr(config, n)}" for n in names if getattr(config, n) != getattr(like, n)]


def to_upstream(model: NanoChatForCausalLM) -> tuple[dict[str, torch.Tensor], dict]:
    """Our model -> (state dict, model_config) as upstream's `build_model` loads them.

    Raises ValueError for a model that upstream's code, where most numbers are constants, cannot express.
    """
    config = model.config
    fields = {theirs: getattr(config, ours) for theirs, ours in FIELDS.items()}
    fields["vocab_size"] = config.num_tokens or config.vocab_size
    same = {ours: getattr(config, ours) for ours in FIELDS.values()} | {"vocab_size": config.vocab_size}
    like = NanoChatConfig.first_generation(**same) if config.generation == 1 else NanoChatConfig(**same)
    if found := differences(config, like):
        raise ValueError(f"upstream's generation {config.generation} cannot express {', '.join(found)}")
    rows = fields["vocab_size"]
    if config.generation == 1:
        del fields["window_pattern"]  # unknown in October 2025
    else:
        rows = -(-rows // 64) * 64
    state = {}
    for name, value in model.state_dict().items():
        if "embed" in name or name == "lm_head.weight":  # the tables with a row for each token
            value = torch.nn.functional.pad(value[:rows], (0, 0, 0, max(0, rows - len(value))))
        if "embed" in name and torch.equal(value.bfloat16().float(), value.float()):
            value = value.bfloat16()  # as upstream stores them
        state[their_name(name)] = value.contiguous().clone()
    return state, fields


def to_native(model: NanoChatForCausalLM) -> NativeModel:
    """A model of the first generation -> transformers' own `nanochat`, equal in every logit; padding rows are dropped.

    Raises ValueError naming the fields that `nanochat` does not know.
    """
    config = model.config
    same = (*NATIVE_FIELDS, "vocab_size", "num_tokens", "head_dim")
    like = NanoChatConfig.first_generation(**{name: getattr(config, name) for name in same})
    if found := differences(config, like):
        raise ValueError(f"transformers' nanochat (the first generation) cannot express {', '.join(found)}")
    fields = {name: getattr(config, name) for name in NATIVE_FIELDS}
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        fields["head_dim"] = config.head_dim
    rows = config.num_tokens or config.vocab_size
    native = NativeModel(NativeConfig(vocab_size=rows, **fields))
    native.generation_config = model.generation_config
    state = model.state_dict()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        state[name] = state[name][:rows]
    return load_strictly(native, state)


def from_native(native: NativeModel) -> NanoChatForCausalLM:
    """transformers' `nanochat` -> ours."""
    if getattr(native.config, "attention_bias", False) or native.config.hidden_act != "relu2":
        raise ValueError("only nanochat models without attention_bias and with hidden_act relu2 can be converted")
    fields = {name: getattr(native.config, name) for name in (*NATIVE_FIELDS, "vocab_size")}
    fields["head_dim"] = getattr(native.config, "head_dim", None)
    model = NanoChatForCausalLM(NanoChatConfig.first_generation(**fields))
    model.generation_config = native.generation_config
    return load_strictly(model, native.state_dict())


# ---- folders ------------------------------------------------------------------------------------------------------


def load_tokenizer(
    folder: Path, wrap: Callable, refresh: Callable, texts: Iterable[str]
) -> tuple[PreTrainedTokenizerFast, int]:
    """A folder with tokenizer.pkl or of transformers -> (tokenizer, ids on which it was compared with upstream's)."""
    if not (folder / "tokenizer.pkl").exists():
        if not (folder / "tokenizer.json").exists():
            raise ValueError(f"no tokenizer.pkl and no tokenizer.json in {folder}")
        return refresh(PreTrainedTokenizerFast.from_pretrained(folder)), 0
    ranks, pattern, special = read_tiktoken(folder / "tokenizer.pkl")
    tokenizer = wrap(backend_from_ranks(ranks, pattern))
    return tokenizer, check_tokenizer(tokenizer.backend_tokenizer, ranks, pattern, special, texts)


def renew(folder: Path, refresh: Callable, ship: Callable[[Path], None]) -> None:
    """Write today's class names, model code, templates and tool loop into a folder of ours; weights stay.

    Files are replaced, never written to: a folder of hard links leaves the originals alone.
    """
    config = NanoChatConfig.from_dict(update_class_names(NanoChatConfig.get_config_dict(folder)[0]))
    with tempfile.TemporaryDirectory(prefix=".renew-", dir=folder) as temporary:
        part = Path(temporary)
        config.save_pretrained(part)
        for file in (Path(__file__).parents[1] / "model").glob("*_nanochat.py"):
            shutil.copyfile(file, part / file.name)
        if all((folder / file).exists() for file in ("tokenizer.json", "tokenizer_config.json")):
            renew_templates(folder, part, refresh)
        if (folder / "custom_generate").exists():
            ship(part)
            (folder / "custom_generate").mkdir(exist_ok=True)
        for file in part.rglob("*"):
            if file.is_file():
                os.replace(file, folder / file.relative_to(part))


def renew_templates(folder: Path, part: Path, refresh: Callable) -> None:
    """Write the templates that `refresh` gives the tokenizer of `folder` into `part`; the other settings stay."""
    tokenizer = refresh(PreTrainedTokenizerFast.from_pretrained(folder))
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    if isinstance(tokenizer.chat_template, str):
        settings.pop("chat_template", None)  # where it was before it had a file of its own
        (part / "chat_template.jinja").write_text(tokenizer.chat_template, encoding="utf-8")
    if response := getattr(tokenizer, "response_template", None):
        settings["response_template"] = response
    text = json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False)
    (part / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")


def may_call(source: Path, model: PreTrainedModel, tokenizer) -> bool:
    """Whether the model needs the tool loop. Upstream's folders do not say so: only a base model of ours does not."""
    end = None if tokenizer is None else tokenizer.get_vocab().get("<|python_end|>")
    if end is None or (source / "custom_generate").exists():
        return end is not None
    return end in model.generation_config.eos_token_id or not (source / "configuration_nanochat.py").exists()


def set_token_ids(model: NanoChatForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Tell the model the ids of its tokenizer. Raises ValueError if the two do not belong together."""
    size = model.config.num_tokens or model.config.vocab_size
    if len(tokenizer) != size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens and the model {size}: they do not belong together"
        )
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


def write_transformers(folder: Path, model: NanoChatForCausalLM, tokenizer, to: str, ship: Callable | None) -> None:
    """Writes a folder for from_pretrained. `ship`: writes the tool loop, for a model that may call."""
    if ship:  # where the loop does not run, an answer ends at its call
        ends = [*model.generation_config.eos_token_id, tokenizer.convert_tokens_to_ids("<|python_end|>")]
        model.generation_config.eos_token_id = list(dict.fromkeys(ends))
        ship(folder)
    (to_native(model) if to == "native" else model).save_pretrained(folder)
    if tokenizer is not None:
        if to == "native" and not ship:  # transformers then leaves padding out of a base model's texts
            tokenizer.response_template = None
        tokenizer.save_pretrained(folder)


def load_model(source: Path, step: int | None) -> tuple[NanoChatForCausalLM, int]:
    """Any of the three kinds of checkpoint folder -> (our model, step)."""
    if any(source.glob("model_*.pt")):
        state, meta, step = read_upstream(source, step)
        return from_upstream(state, meta), step
    if not (source / "config.json").exists():
        raise ValueError(f"{source} has neither model_NNNNNN.pt (karpathy/nanochat) nor config.json (transformers)")
    fields = NanoChatConfig.get_config_dict(source)[0]
    kind = fields.get("model_type")
    if kind == NativeConfig.model_type:
        return from_native(NativeModel.from_pretrained(source, dtype=torch.float32)), step or 0
    if kind != NanoChatConfig.model_type:
        raise ValueError(f"{source} holds a model of type {kind}, not nanochat")
    config = NanoChatConfig.from_dict(update_class_names(fields))
    model = NanoChatForCausalLM.from_pretrained(source, config=config, dtype=torch.float32)
    if is_quantized(model):
        raise ValueError(f"{source} is quantized: convert the model that it was made from")
    return model, step or 0


def write_upstream(folder: Path, model: NanoChatForCausalLM, tokenizer, step: int, texts: Iterable[str]) -> int | None:
    """Writes what upstream loads; -> number of ids on which both tokenizers were compared, None without one."""
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


def convert(
    source: str | Path,
    output: str | Path,
    to: str,
    wrap: Callable[[Tokenizer], PreTrainedTokenizerFast],
    tokenizer: str | Path | None = None,
    step: int | None = None,
    texts: Iterable[str] = (),
    ship: Callable[[Path], None] = lambda folder: None,
    refresh: Callable[[PreTrainedTokenizerFast], PreTrainedTokenizerFast] = lambda tokenizer: tokenizer,
) -> dict:
    """Converts one checkpoint folder; the output appears whole or not at all.

    Args:
        source: folder of upstream, of ours or of transformers' `nanochat`.
        output: folder to make; must not exist. With `hf` it may be `source`, a folder of ours, which is then renewed.
        to: `hf` (ours), `native` (transformers' nanochat) or `nanochat` (upstream).
        wrap: adds special tokens and chat template to a bare tokenizer (`data.tokenizer.wrap`; the model folder must
            not know it).
        tokenizer: folder of its tokenizer; that of `source` if it has one, else weights alone are written.
        step: of several checkpoints in `source`, which one; when writing upstream's, the number in the file names.
        texts: on which, besides a generated sample, both tokenizers must give the same ids.
        ship: writes the tool loop into a folder (`tool_loop.ship`), for models that may call.
        refresh: gives a tokenizer today's templates (`data.tokenizer.with_todays_templates`).

    Returns:
        generation, number of parameters, step, and `tokenizer_ids`: how many ids were compared (None: there is no
        tokenizer, 0: it was copied).

    Raises:
        ValueError: one line on what is wrong.
    """
    source, output = Path(source), Path(output)
    in_place = output.exists() and output.samefile(source)
    if output.exists() and not (in_place and to == "hf" and (source / "configuration_nanochat.py").exists()):
        raise ValueError(f"{output} exists: remove it or choose another output")
    model, step = load_model(source, step)
    compared = None
    if in_place:
        renew(source, refresh, ship)
    if tokenizer is None and any((source / f"tokenizer.{kind}").exists() for kind in ("json", "pkl")):
        tokenizer = source
    if tokenizer is not None:
        tokenizer, compared = load_tokenizer(Path(tokenizer), wrap, refresh, texts)
        set_token_ids(model, tokenizer)
    if not in_place:
        part = output.with_name(f".{output.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        try:
            if to == "nanochat":
                compared = write_upstream(part, model, tokenizer, step, texts)
            else:
                write_transformers(part, model, tokenizer, to, ship if may_call(source, model, tokenizer) else None)
            os.replace(part, output)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    count = sum(p.numel() for p in model.parameters())
    return {"generation": model.config.generation, "parameters": count, "step": step, "tokenizer_ids": compared}
