"""The network as the pretraining loop wants it: made on its device, in its precision, as a module that gives a loss.

Precision: float32 masters everywhere but the embeddings, which are bf16 on devices that compute in it; their dtype is
the network's (no autocast). GPUs without bf16 compute in float16 from float32 embeddings, the rest in float32.
"""

from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from ..distributed import get_dist_info, partial_state
from ..errors import InputError
from ..kernels.backend import triton, unloaded, verify, version
from ..kernels.fused_cross_entropy import fused_linear_cross_entropy
from ..model.configuration_nanochat import NanoChatConfig
from ..model.modeling_nanochat import NanoChatForCausalLM
from ..model.quantization import is_quantized
from ..optim.scaling import Plan
from ..run import load_json, model_fingerprint
from .checkpoint import refuse_nan
from .fused_model import BF16_KERNELS, FusedTransformer


class ModelLoss(nn.Module):
    """The model's own forward with the head's loss, with the signature of `FusedTransformer`.

    For an attention that the user chose.
    """

    def __init__(self, model: NanoChatForCausalLM):
        super().__init__()
        self.model = model
        device = model.lm_head.weight.device
        if compute_dtype(device) == torch.bfloat16:
            verify(BF16_KERNELS[:1], model.config, device, torch.bfloat16)

    def forward(self, ids: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
        config = self.model.config
        hidden = self.model.model(ids, use_cache=False).last_hidden_state
        cap, size = config.final_logit_softcapping, config.num_tokens or config.vocab_size
        loss = fused_linear_cross_entropy(
            hidden.flatten(0, 1), self.model.lm_head.weight, targets.flatten(), cap, size, reduction
        )
        return loss if reduction == "mean" else loss.view_as(targets)


def compute_dtype(device: torch.device, half: bool = False) -> torch.dtype:
    """bf16 on CUDA devices that compute in it, else float32; with `half` float16 on those older ones (V100, T4) that
    are fast in it, for who scales the loss."""
    major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0
    return torch.bfloat16 if major >= 8 else torch.float16 if half and major == 7 else torch.float32


def plan_overrides_from(source: str) -> dict:
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


def read_model(source: str, attn_implementation: str | None = None) -> PreTrainedModel:
    """The float32 model of folder (or Hub id) `source`.

    Raises InputError when there is none, when its files are damaged or are not those that its stage wrote, or when
    weights are not finite.
    """
    weights = (load_json(Path(source) / "metrics.json") or {}).get("weights")
    if weights and get_dist_info()[0] == 0 and model_fingerprint(source) != weights:
        raise InputError(
            f"the weights or the tokenizer in {source} are not those that its metrics.json names: they are damaged "
            "or were replaced. Run that stage again; if it was on purpose, delete its metrics.json and give the "
            "folder with --model"
        )
    try:
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype=torch.float32, attn_implementation=attn_implementation
        )
        refuse_nan(model.state_dict(), f"the model in {source}")
    except FloatingPointError as error:
        raise InputError(str(error)) from None
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise InputError(f"no model in {source} that can be read: {str(error).splitlines()[0]}") from None
    if is_quantized(model):
        raise InputError(f"{source} is quantized and cannot be trained: take the model that it was made from")
    return model


def load_chat_model(source: str, config, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """`read_model` for the chat stages: float32 weights, computing in bf16 where the device has it.

    Its generation config ends a turn at assistant_end and pauses it at python_end, where a tool has to answer.
    """
    model = read_model(source, config.attn_implementation)
    ends = tokenizer.convert_tokens_to_ids(["<|assistant_end|>", "<|python_end|>"])
    model.generation_config.update(eos_token_id=ends, bos_token_id=tokenizer.bos_token_id)
    dtype = compute_dtype(partial_state().device)
    if dtype != torch.float32:
        # What comes out of the embeddings decides in which dtype the network runs; the weights all stay float32.
        model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.to(dtype))
        if config.lora_r > 0:  # peft calls the matrices itself, where the model would cast them
            for module in model.modules():
                if type(module) is nn.Linear:
                    module.forward = partial(cast_linear, module)
    return model


def lora(config) -> LoraConfig | None:
    if config.lora_r <= 0:
        return None
    # The default targets, all matrices of attention and MLP, are registered in nanochat_hf/__init__.py.
    return LoraConfig(r=config.lora_r, lora_alpha=config.lora_alpha, task_type="CAUSAL_LM")


def cast_linear(module: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, module.weight.to(x.dtype))


def build_model(made: Plan, source: str | None, tokenizer, device: torch.device, sharded: bool) -> NanoChatForCausalLM:
    """A fresh network, or that of folder (or Hub id) `source`, on the device and in its precision.

    Args:
        sharded: FSDP2 will shard it, which wants tensors of one dtype: the embeddings then stay float32 and only what
            comes out of them is bf16.
    """
    if source:
        model = read_model(source).to(device)
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


def why_not_fp8(
    model: NanoChatForCausalLM, attention: str, device: torch.device, least: tuple[int, int]
) -> str | None:
    """What keeps a model from FP8 on a device, which must have at least that compute capability; None: nothing."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < least:
        return "needs a CUDA device of the H100's generation or newer"
    if attention != "auto":
        return "works with attn_implementation auto only"
    config = model.config
    if any(size % 16 for size in (config.hidden_size, config.max_position_embeddings)):
        return "needs a width and a max_seq_len that are multiples of 16"
    return None


def build_loss_module(model: NanoChatForCausalLM, attention: str, compile: bool, fp8: bool | str) -> nn.Module:
    """-> module (ids (B, T), targets (B, T), reduction) -> loss in nats; see `PretrainConfig` for the options."""
    device = next(model.parameters()).device
    cuda = device.type == "cuda"
    if fp8 not in (True, False, "auto"):
        raise InputError(f"fp8 is {fp8!r}: choose true, false or auto")
    missing = why_not_fp8(model, attention, device, (9, 0) if fp8 == "auto" else (8, 9)) if fp8 else None
    if missing and fp8 != "auto":
        raise InputError(f"fp8 {missing}; leave it out, or say fp8=auto")
    if attention == "auto":
        fp8 = bool(fp8) and not missing
        return FusedTransformer(model, compile=compile and cuda, fp8=fp8, dtype=compute_dtype(device, half=True))
    model.set_attn_implementation(attention)
    if compile and cuda:
        for layer in model.model.layers:  # their forward and not the layers: FSDP2's hooks stay outside
            layer.forward = torch.compile(layer.forward, dynamic=False)
    return ModelLoss(model)


def describe(network: nn.Module, fp8: bool | str) -> str:
    """The kernels and the precision of a training step, and what would make it faster here, in one line.

    Args:
        network: of `build_loss_module`, which was given this fp8.
    """
    model = network.model
    device, eight = model.lm_head.weight.device, getattr(network, "fp8", False)
    dtype = str(compute_dtype(device, half=True)).removeprefix("torch.")
    precision = f"precision {dtype}{' with FP8 blocks' if eight else ''}"
    if device.type != "cuda":
        why = f"; no FP8: it {why_not_fp8(model, 'auto', device, (9, 0))}" if fp8 == "auto" else ""
        return f"kernels: PyTorch on {device.type}; {precision}{why}"
    auto = isinstance(network, FusedTransformer)
    parts = ["attention " + (packaged("flash-attn-4") if auto and network.train_kind.flash else "PyTorch")]
    matmuls = packaged("quack-kernels") if auto and network.train_kind.kernels else "PyTorch"
    parts.append("matmuls " + ("PyTorch's FP8" if eight else matmuls))
    parts += [packaged("triton")] if triton is not None else []
    hints = [f"{package} {reason}" for package, reason in unloaded.items() if auto and reason == "not installed"]
    modern = torch.cuda.get_device_capability(device) >= (9, 0)
    if hints and modern:
        hints.append('for more speed: pip install -c constraints.txt -e ".[kernels]"')
    if fp8 == "auto" and not eight:
        why = why_not_fp8(model, "auto" if auto else "another", device, (9, 0)) or "was wrong in its check"
        hints.append(f"no FP8: it {why}")
    elif not fp8 and auto and modern:
        hints.append("fp8=auto would be faster")
    return f"kernels: {', '.join(parts)}; {precision}" + "".join(f"; {hint}" for hint in hints)


def packaged(package: str) -> str:
    return f"{package} {version(package)}"


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
