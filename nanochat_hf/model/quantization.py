"""Whether a model is quantized: code that reads weights instead of calling modules must refuse such a model."""

import torch
from torch.distributed.tensor import DTensor


def is_quantized(model: torch.nn.Module) -> bool:
    """Whether a weight is an integer tensor (bitsandbytes) or a packed tensor subclass (torchao, optimum-quanto)."""
    return any(
        not p.is_floating_point() or (hasattr(p, "__tensor_flatten__") and not isinstance(p, DTensor))
        for p in model.parameters()
    )
