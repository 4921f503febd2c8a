"""Checkpoints for other engines: `nanochat export --to mlx`, one module per engine.

Each module has `write(source, folder, **options)`, which fills the empty `folder` from the checkpoint folder `source`.
It returns lines that say how to use the result, with {folder} in them. It raises InputError for a checkpoint that the
engine cannot express. `export` makes the output appear whole or not at all.

Some also have `add(folder)`, which puts the engine's files beside the weights of a checkpoint folder, for
`nanochat push --with mlx,onnx`.
"""

import shlex
import shutil
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from ..convert import new_folder
from ..errors import InputError


def export(source: str | Path, output: str | Path, engine: str, **options) -> list[str]:
    """Writes the checkpoint folder `source` for `engine` into `output`, which must not exist; options: as `write`'s.

    Returns: lines that say how to use it. Raises InputError if it cannot be expressed there, or cannot be read.
    """
    with new_folder(Path(output)) as folder:
        lines = module_of(engine).write(Path(source), folder, **options)
    return [line.format(folder=shlex.quote(str(output))) for line in lines]


def module_of(engine: str):
    """Its module of this folder. Raises InputError if a package is missing that it needs."""
    try:
        return import_module(f".{engine}", __package__)
    except ModuleNotFoundError as error:
        raise InputError(f"{engine} needs the package {error.name}: pip install {error.name}") from None


def adder(engine: str):
    """The `add` of an engine's module. Raises InputError if it needs a folder of its own."""
    module = module_of(engine) if find_spec(f"{__package__}.{engine}") else None
    if not hasattr(module, "add"):
        raise InputError(f"{engine} needs a folder of its own: nanochat export --to {engine}, then hf upload")
    return module.add


def checkpoint_config(source: Path):
    """Its config. Raises InputError if `source` is no checkpoint folder of ours with its tokenizer or is quantized."""
    from ..data.tokenizer import load_tokenizer, refuse_other_model
    from ..loading import load_config  # imported here: vLLM imports this package in each of its processes
    from ..model.configuration_nanochat import NanoChatConfig

    files = all((source / name).is_file() for name in ("config.json", "tokenizer.json"))
    if not files or not isinstance(config := load_config(source), NanoChatConfig):
        advice = "name a stage's folder, or convert it with nanochat convert"
        raise InputError(f"{source} is no checkpoint folder of nanochat_hf with a tokenizer: {advice}")
    if getattr(config, "quantization_config", None):
        raise InputError(f"{source} is quantized: export the unquantized model")
    tokens, rows = len(tokenizer := load_tokenizer(source)), config.num_tokens or config.vocab_size
    if tokens != rows:
        raise InputError(f"{source} has a tokenizer of {tokens} tokens and a model of {rows}: see num_tokens")
    refuse_other_model(tokenizer, config)
    return config


def refuse_scaled_rope(config, engine: str) -> None:
    if (kind := config.rope_parameters.get("rope_type", "default")) != "default":
        raise InputError(f"there is no RoPE of type {kind!r} for {engine}: use the folder itself, in transformers")


def copy_checkpoint(source: Path, folder: Path) -> None:
    """Copies a checkpoint folder of ours, without records of training, with today's model code and templates."""
    import torch

    from ..convert.native import renew
    from ..loading import load_model

    checkpoint_config(source)
    load_model(str(source), torch.bfloat16)  # to refuse weights that are damaged or that the config does not fit
    for path in source.iterdir():
        if path.suffix in (".json", ".jinja", ".safetensors") and path.name != "metrics.json":
            shutil.copyfile(path, folder / path.name)
    if (source / "custom_generate").is_dir():
        shutil.copytree(source / "custom_generate", folder / "custom_generate")
    renew(folder)
