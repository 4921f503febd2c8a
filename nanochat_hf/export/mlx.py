"""A folder for mlx-lm: the checkpoint as it is, and beside it the model in MLX (mlx_nanochat.py).

mlx-lm runs the file that config.json names as `model_file`, with `--trust-remote-code`. transformers ignores the
field, so the folder still loads there. An answer ends at a tool call: both stop tokens are in generation_config.json.
"""

import shutil
from pathlib import Path

from ..loading import load_config
from ..run import load_json, save_json
from . import copy_checkpoint, refuse_scaled_rope

MODEL = Path(__file__).with_name("mlx_nanochat.py")


def write(source: Path, folder: Path) -> list[str]:
    """Fills `folder`; returns lines with the commands. Raises InputError as `add` does, or for no checkpoint."""
    copy_checkpoint(source, folder)
    return add(folder)


def add(folder: Path) -> list[str]:
    """Adds what mlx-lm needs to a checkpoint folder; returns lines. Raises InputError for RoPE that is scaled."""
    refuse_scaled_rope(load_config(folder), "MLX")
    path = folder / "config.json"
    save_json(path, load_json(path) | {"model_file": MODEL.name})
    shutil.copyfile(MODEL, folder / MODEL.name)
    return [
        "chat:     mlx_lm.chat --trust-remote-code --model {folder}",
        "serve:    mlx_lm.server --trust-remote-code --model {folder}",
        "quantize: mlx_lm.convert --trust-remote-code --hf-path {folder} --mlx-path {folder}-4bit -q --q-bits 4",
    ]
