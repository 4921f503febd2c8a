"""Whether a model is quantized: code that reads weights instead of calling modules has to refuse such a model."""

import torch
from torch.distributed.tensor import DTensor


def is_quantized(model: torch.nn.Module) -> bool:
    """Whether a weight is stored in something else than the numbers it stands for.

    Integers (bitsandbytes), or a tensor subclass that holds packed parts (torchao, optimum-quanto).
    """
    return any(
        not p.is_floating_point() or (hasattr(p, "__tensor_flatten__") and not isinstance(p, DTensor))
        for p in model.parameters()
    )
