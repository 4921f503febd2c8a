"""Models for training: built or read, checked, on their device in their precision, as a module that returns a loss.

Pretraining: weights are float32, but embeddings bf16 on devices that compute in it. Layers compute in the embeddings'
dtype (no autocast). GPUs without bf16 compute in float16 from float32 embeddings, other devices in float32.
Chat stages: all weights are float32, and the output of the embedding is cast.
"""

import copy

import torch
import torch.nn.functional as F
from peft import LoraConfig
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.tokenizer import refuse_other_model, token_ids
from ..distributed import get_dist_info, partial_state
from ..errors import InputError
from ..kernels.backend import first_line, triton, unloaded, verify, version
from ..loading import is_quantized, load_config, load_model
from ..model.configuration_nanochat import NanoChatConfig
from ..model.modeling_nanochat import NanoChatForCausalLM
from ..optim.scaling import Plan
from ..run import load_metrics, model_fingerprint
from .fused_model import BF16_KERNELS, FusedTransformer, lm_head_loss

FP8_PAYS_ABOVE = 768  # the width of d12, where quantization costs what the matmuls save


class ModelLoss(nn.Module):
    """The model's own forward with the fused loss, for an attention of users; called as `FusedTransformer`."""

    def __init__(self, model: NanoChatForCausalLM):
        super().__init__()
        self.model = model
        device = model.lm_head.weight.device
        if compute_dtype(device) == torch.bfloat16:
            verify(BF16_KERNELS[:1], model.config, device, torch.bfloat16)

    def forward(self, ids: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
        hidden = self.model.model(ids, use_cache=False).last_hidden_state
        return lm_head_loss(self.model, hidden, targets, reduction)


def compute_dtype(device: torch.device, half: bool = False) -> torch.dtype:
    """bf16 on CUDA devices with bf16 units; with `half`, for callers that scale the loss, float16 on V100 and T4; else
    float32."""
    major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0
    return torch.bfloat16 if major >= 8 else torch.float16 if half and major == 7 else torch.float32


def plan_overrides_from(source: str) -> dict:
    """Fields of `PretrainConfig` that describe the model in folder (or Hub id) `source`."""
    config = load_config(source)
    if not isinstance(config, NanoChatConfig):
        raise InputError(f"{source} holds a model of type {config.model_type!r}, no nanochat: see nanochat convert")
    same = ("generation", "head_dim", "window_pattern", "final_logit_softcapping")
    shape = {"depth": config.num_hidden_layers, "aspect_ratio": config.hidden_size / config.num_hidden_layers}
    return shape | {name: getattr(config, name) for name in same}


def read_model(source: str, attn_implementation: str | None = None) -> PreTrainedModel:
    """The float32 model of `source`. InputError as `load_model`, for quantized weights, and for replaced files."""
    weights = (load_metrics(source) or {}).get("weights")
    if weights and get_dist_info()[0] == 0 and model_fingerprint(source) != weights:
        advice = "run that stage again; if it was on purpose, delete its metrics.json and give --model"
        raise InputError(f"weights or tokenizer in {source} are not those that its metrics.json names: {advice}")
    model = load_model(source, attn_implementation=attn_implementation)
    if is_quantized(model):
        raise InputError(f"{source} is quantized and cannot be trained: take the model that it was made from")
    return model


def load_chat_model(source: str, config, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """`read_model` for the chat stages: float32 weights, bf16 activations where the device has bf16 units.

    Its generation config stops at assistant_end and at python_end, where a tool has to run.
    """
    check_attention(config.attn_implementation, partial_state().device)
    model = read_model(source, config.attn_implementation)
    refuse_other_model(tokenizer, model.config)
    ends = tokenizer.convert_tokens_to_ids(["<|assistant_end|>", "<|python_end|>"])
    model.generation_config.update(eos_token_id=ends, bos_token_id=tokenizer.bos_token_id)
    dtype = compute_dtype(partial_state().device)
    if dtype != torch.float32:
        cast_output(model.get_input_embeddings(), dtype)
        if config.lora_r > 0:  # peft calls the matrices itself, where the model would cast them
            for module in model.modules():
                if type(module) is nn.Linear:
                    module.forward = lambda x, module=module: F.linear(x, module.weight.to(x.dtype))
    return model


def cast_output(module: nn.Module, dtype: torch.dtype) -> None:
    """Cast what an embedding returns; its dtype is that of all activations."""
    module.register_forward_hook(lambda module, inputs, output: output.to(dtype))


def lora(config) -> LoraConfig | None:
    """peft's config; the default targets, all matrices of attention and MLP, are registered in nanochat_hf."""
    if config.lora_r <= 0:
        return None
    return LoraConfig(r=config.lora_r, lora_alpha=config.lora_alpha, task_type="CAUSAL_LM")


def build_model(plan: Plan, source: str | None, tokenizer, device: torch.device, sharded: bool) -> NanoChatForCausalLM:
    """A fresh model, or that of folder (or Hub id) `source`, on the device in its precision.

    sharded: for FSDP2, which needs tensors of one dtype: embeddings stay float32 and their output is cast.
    """
    if source:
        model = read_model(source).to(device)
        refuse_other_model(tokenizer, model.config)
    else:
        config = copy.deepcopy(plan.model_config)
        config.update({name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")})
        config.token_ids = token_ids(tokenizer)
        with device:
            model = NanoChatForCausalLM(config)
    if (rows := model.config.vocab_size) != plan.model_config.vocab_size:
        size = plan.model_config.vocab_size
        raise InputError(f"{source} has {rows} rows of embeddings and the tokenizer needs {size}: give the model's")
    # A document ends where the next one would begin.
    model.generation_config.update(eos_token_id=[tokenizer.eos_token_id, tokenizer.bos_token_id])
    dtype = compute_dtype(device, half=True)
    for module in model.modules():
        if isinstance(module, nn.Embedding) and dtype != torch.float32:
            if sharded or dtype == torch.float16:
                cast_output(module, dtype)
            else:
                module.to(dtype)
    return model


def why_not_fp8(model: NanoChatForCausalLM, attention: str, device: torch.device, minimum: tuple) -> str | None:
    """Why a model cannot use FP8 on a device, which needs at least the compute capability `minimum`; or None."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < minimum:
        return "needs an NVIDIA GPU of compute capability {}.{} or newer".format(*minimum)
    if attention != "auto":
        return "works with attn_implementation auto only"
    if any(size % 16 for size in (model.config.hidden_size, model.config.max_position_embeddings)):
        return "needs a width and a max_seq_len that are multiples of 16"
    return None


def check_attention(name: str | None, device: torch.device) -> None:
    """Refuse, by InputError, an attention that does not train on `device` or whose package is not installed."""
    if name == "flex_attention" and device.type == "cpu":
        raise InputError(f"attn_implementation {name}: PyTorch has no gradient of it on a CPU; take sdpa")
    if name in (None, "auto"):
        return
    try:
        with torch.device("meta"):
            NanoChatForCausalLM(NanoChatConfig(vocab_size=64, num_hidden_layers=1)).set_attn_implementation(name)
    except Exception as error:  # of its package, which may raise anything
        raise InputError(f"attn_implementation {name}: {first_line(error)}") from None


def build_loss_module(model: NanoChatForCausalLM, attention: str, compile: bool, fp8: bool | str) -> nn.Module:
    """Module (ids (B, T), targets (B, T), reduction) -> loss in nats; see `PretrainConfig` for the options."""
    device = next(model.parameters()).device
    compile &= device.type == "cuda" and triton is not None
    missing = why_not_fp8(model, attention, device, (9, 0) if fp8 == "auto" else (8, 9)) if fp8 else None
    if missing and fp8 != "auto":
        raise InputError(f"fp8 {missing}; leave it out, or say fp8=auto")
    if attention == "auto":
        dtype = compute_dtype(device, half=True)
        return FusedTransformer(model, compile=compile, fp8=bool(fp8) and not missing, dtype=dtype)
    check_attention(attention, device)
    model.set_attn_implementation(attention)
    if compile:
        for layer in model.model.layers:  # their forward and not the layers: FSDP2's hooks stay outside
            layer.forward = torch.compile(layer.forward, dynamic=False)
    return ModelLoss(model)


def describe(network: nn.Module, fp8: bool | str) -> str:
    """The kernels and the precision of a module of `build_loss_module`, and what would be faster here, in one line."""
    device, uses_fp8 = network.model.lm_head.weight.device, getattr(network, "fp8", False)
    dtype, fused_step = compute_dtype(device, half=True), isinstance(network, FusedTransformer)
    precision = f"precision {str(dtype).removeprefix('torch.')}{' with FP8 matmuls' if uses_fp8 else ''}"
    kernels, hints = [f"PyTorch on {device.type}"], []
    if device.type == "cuda":
        names = {name: f"{name} {version(name)}" for name in ("flash-attn-4", "quack-kernels", "triton")}
        attention = names["flash-attn-4"] if fused_step and network.train_kind.flash else "PyTorch"
        matmuls = names["quack-kernels"] if fused_step and network.train_kind.kernels else "PyTorch"
        matmuls = "PyTorch's FP8" if uses_fp8 else matmuls
        kernels = [f"attention {attention}", f"matmuls {matmuls}"]
        kernels += [names["triton"]] if triton is not None else []
        modern = fused_step and torch.cuda.get_device_capability(device) >= (9, 0)
        missing = [name for name, reason in unloaded.items() if reason == "not installed"]
        hints = [f"{name} not installed" for name in missing if modern or (fused_step and name == "triton")]
        if hints and modern:
            hints.append('for more speed: pip install "nanochat_hf[kernels]"')
        if not fp8 and modern and network.model.config.hidden_size > FP8_PAYS_ABOVE:
            hints.append("fp8=auto would be faster")
    if fp8 == "auto" and not uses_fp8:
        attention = "auto" if fused_step else "another"
        hints.append(f"no FP8: it {why_not_fp8(network.model, attention, device, (9, 0)) or 'was wrong in its check'}")
    return f"{', '.join(kernels)}; {precision}" + "".join(f"; {hint}" for hint in hints)


def describe_machine() -> str:
    """`describe` for a small model on the first device, whose kernels are checked as at the beginning of a run."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = {"hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 512}
    with device:
        model = NanoChatForCausalLM(NanoChatConfig(**shape, head_dim=128))
    return describe(build_loss_module(model, "auto", True, "auto"), "auto")


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None]


def reshard(model: nn.Module) -> None:
    """Under FSDP2: free the unsharded weights that a forward pass left."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def gradient_norm(model: nn.Module) -> Tensor:
    """() float32 norm of all gradients together, over all shards."""
    norm = torch.nn.utils.get_total_norm(gradients(model))
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).float()


def scale_gradients(model: nn.Module, factor: Tensor) -> None:
    """Multiply all gradients in place by a () tensor on their device."""
    local = [grad.to_local() if isinstance(grad, DTensor) else grad for grad in gradients(model)]
    torch._foreach_mul_(local, factor)
