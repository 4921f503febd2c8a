"""The network as the pretraining loop wants it: made on its device, in its precision, as a module that gives a loss.

Precision: float32 masters everywhere but the embeddings, which are bf16 on devices that compute in it; their dtype is
the network's (no autocast). GPUs without bf16 compute in float16 from float32 embeddings, the rest in float32.
"""

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from ..errors import InputError
from ..model.configuration_nanochat import NanoChatConfig
from ..model.modeling_nanochat import NanoChatForCausalLM
from ..model.quantization import is_quantized
from .fast import Trunk
from .kernels import head_loss
from .scaling import Plan


class ModelLoss(nn.Module):
    """The model's own forward with the head's loss, with the signature of `fast.Trunk`.

    For an attention that the user chose.
    """

    def __init__(self, model: NanoChatForCausalLM):
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
        config = self.model.config
        hidden = self.model.model(ids, use_cache=False).last_hidden_state
        cap, size = config.final_logit_softcapping, config.num_tokens or config.vocab_size
        loss = head_loss(hidden.flatten(0, 1), self.model.lm_head.weight, targets.flatten(), cap, size, reduction)
        return loss if reduction == "mean" else loss.view_as(targets)


def compute_dtype(device: torch.device, half: bool = False) -> torch.dtype:
    """bf16 on CUDA devices that compute in it, else float32; with `half` float16 on those older ones (V100, T4) that
    are fast in it, for who scales the loss."""
    major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0
    return torch.bfloat16 if major >= 8 else torch.float16 if half and major == 7 else torch.float32


def shape_of(source: str) -> dict:
    """What `scaling.plan` must be told to plan for the model in folder (or Hub id) `source`."""
    try:
        kind = NanoChatConfig.get_config_dict(source)[0].get("model_type")
        if kind != NanoChatConfig.model_type:
            found = "no model" if kind is None else f"a model of type {kind!r}"
            raise InputError(
                f"{source} holds {found} and pretraining goes on from {NanoChatConfig.model_type!r} only; "
                "scripts/convert_checkpoint.py makes one of a nanochat model"
            )
        config = NanoChatConfig.from_pretrained(source)
    except OSError as error:
        raise InputError(f"no model in {source}: {str(error).splitlines()[0]}") from None
    return {
        "depth": config.num_hidden_layers,
        "generation": config.generation,
        "head_dim": config.head_dim,
        "aspect_ratio": config.hidden_size / config.num_hidden_layers,
        "window_pattern": config.window_pattern,
    }


def new_model(made: Plan, source: str | None, tokenizer, device: torch.device, sharded: bool) -> NanoChatForCausalLM:
    """A fresh network, or that of folder (or Hub id) `source`, on the device and in its precision.

    Args:
        sharded: FSDP2 will shard it, which wants tensors of one dtype: the embeddings then stay float32 and only what
            comes out of them is bf16.
    """
    if source:
        try:
            model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).to(device)
        except OSError as error:
            raise InputError(f"no weights in {source}: {str(error).splitlines()[0]}") from None
        if is_quantized(model):
            raise InputError(f"{source} is quantized and cannot be trained: take the model that it was made from")
    else:
        make = NanoChatConfig if made.generation == 2 else NanoChatConfig.first_generation
        ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        with device:
            model = NanoChatForCausalLM(make(**made.model_fields(), **ids))
    if model.config.vocab_size != made.vocab_size:
        raise InputError(
            f"{source} has {model.config.vocab_size} rows of embeddings and the tokenizer needs {made.vocab_size}: "
            "give the tokenizer that the model was trained with"
        )
    # A document ends where the next one would begin.
    model.generation_config.update(eos_token_id=[tokenizer.eos_token_id, tokenizer.bos_token_id])
    dtype = compute_dtype(device, half=True)
    for module in model.modules():
        if isinstance(module, nn.Embedding) and dtype != torch.float32:
            if sharded or dtype == torch.float16:
                module.register_forward_hook(lambda module, inputs, x: x.to(dtype))
            else:
                module.to(dtype)
    return model


def with_loss(model: NanoChatForCausalLM, attention: str, compile: bool, fp8: bool) -> nn.Module:
    """-> module (ids (B, T), targets (B, T), reduction) -> loss in nats; see `PretrainConfig` for the options."""
    device = next(model.parameters()).device
    cuda = device.type == "cuda"
    if fp8 and not (cuda and torch.cuda.get_device_capability(device) >= (8, 9)):
        raise InputError("fp8 needs a CUDA device of the H100's generation or newer; leave it out")
    if attention == "auto":
        return Trunk(model, compile=compile and cuda, fp8=fp8, dtype=compute_dtype(device, half=True))
    if fp8:
        raise InputError("fp8 works with attn_implementation auto only")
    model.set_attn_implementation(attention)
    if compile and cuda:
        for layer in model.model.layers:  # their forward and not the layers: FSDP2's hooks stay outside
            layer.forward = torch.compile(layer.forward, dynamic=False)
    return ModelLoss(model)


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None]


def shard(model: nn.Module) -> None:
    """Under FSDP2: have its modules give up the whole weights that a forward pass left in them."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def gradient_norm(model: nn.Module) -> Tensor:
    """() float32 norm of all gradients together, over all shards."""
    norm = torch.nn.utils.get_total_norm(gradients(model))
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).float()


def scale_gradients(model: nn.Module, factor: Tensor | float) -> None:
    """Multiply all gradients in place; `factor` may be a () tensor on their device."""
    found = gradients(model)
    torch._foreach_mul_([grad.to_local() if isinstance(grad, DTensor) else grad for grad in found], factor)
