"""A folder with int8 matrices, about half as large as in bfloat16: torchao's weight-only quantization.

Each row of a matrix has a scale; embeddings, head and gates are bfloat16. Where torchao is, `from_pretrained` loads
the folder as any other, and the model answers its calls.
"""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, TorchAoConfig
from transformers.utils import is_torchao_available

from ..errors import InputError
from . import copy_checkpoint


def write(source: Path, folder: Path) -> list[str]:
    """Fills `folder`; returns lines with the commands. Raises InputError without torchao, or for no checkpoint."""
    if not is_torchao_available():
        raise InputError("--to int8 needs torchao: pip install torchao")
    from torchao.quantization import Int8WeightOnlyConfig

    copy_checkpoint(source, folder)
    config = TorchAoConfig(Int8WeightOnlyConfig())
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=config)
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    model.save_pretrained(folder)
    return ["serve: transformers serve {folder} --trust-remote-code"]
