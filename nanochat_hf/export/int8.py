"""A folder with int8 matrices, about half as large as in bfloat16: torchao's weight-only quantization.

Each row of a matrix has a scale; embeddings, head and gates are bfloat16. Where torchao is, `from_pretrained` loads
the folder as any other, and the model answers its calls.
"""

from pathlib import Path

import torch
from torchao.quantization import Int8WeightOnlyConfig
from transformers import AutoModelForCausalLM, TorchAoConfig

from ..convert import new_folder
from . import copy_checkpoint


def write(source: Path, folder: Path) -> list[str]:
    """Fills `folder`; returns lines with the commands. Raises InputError for no checkpoint."""
    copy_checkpoint(source, folder)
    config = TorchAoConfig(Int8WeightOnlyConfig())
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=config)
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    model.save_pretrained(folder)
    return ["serve: transformers serve {folder} --trust-remote-code"]


def add(folder: Path) -> list[str]:
    """Adds the whole folder as `int8/`; returns a line. Raises InputError as `write`."""
    with new_folder(folder / "int8") as target:
        write(folder, target)
    return ['AutoModelForCausalLM.from_pretrained("{folder}", subfolder="int8", trust_remote_code=True)  # torchao']
