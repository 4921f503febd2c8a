"""The training step's forward pass: the parameters and results of model/, with fewer bytes moved.

`FusedTransformer(model)(input_ids)` equals `model.model(input_ids).last_hidden_state` for whole, unpadded sequences
(pretraining). With `position_ids` also for packed documents (SFT, `use_fused_forward`). q, k and v come out of one
matmul. How a block is computed is chosen once, when the module is made:

- bf16 with FlashAttention-4 and quack, eager: every operation between the matmuls is in a hand-written kernel;
- FP8, eager, while training; the head, too;
- everywhere else PyTorch, on GPUs compiled block by block: all blocks share three programs (regional compilation).
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..kernels.attention import FLASH, FLASH_DOCUMENTS, attention, attention_mask, split_qkv, uses_flash
from ..kernels.backend import disabled, verify
from ..kernels.block_matmuls import Bf16Weight, linear_and_gates, residual_mix, residual_mlp, uses_quack
from ..kernels.float8 import quantize_weight
from ..kernels.fused_cross_entropy import fused_linear_cross_entropy
from ..kernels.weight_cache import EmbeddingGradIndex, WeightCastCache
from ..model.modeling_nanochat import NanoChatForCausalLM

KERNELS = ("rotary and QK norm", "gradient sums", "GEMM epilogues")  # of a training step
BF16_KERNELS = ("fused cross-entropy", FLASH)
FP8_KERNELS = ("FP8", "FP8 head")


def embed(x, gate, smear_lambda, eps: float, dtype: torch.dtype, position_ids: Tensor | None) -> Tensor:
    """Embedding (B, T, C) -> the normed one, smeared if there is a gate (1, G), but not into position 0."""
    x = F.rms_norm(x.to(dtype), x.shape[-1:], eps=eps)
    if gate is not None:
        share = smear_lambda.to(x.dtype) * torch.sigmoid(F.linear(x[:, 1:, : gate.shape[1]], gate.to(x.dtype)))
        if position_ids is not None:
            share = share * (position_ids[:, 1:, None] > 0)
        x = torch.cat((x[:, :1], x[:, 1:] + share * x[:, :-1]), dim=1)
    return x


def block(x, h, weights, value_embeds, gate, position_ids, cos, sin, mask, kv_heads, window, scale, eps):
    """One decoder layer over the residual stream x and its norm h, (B, T, C) each.

    Args:
        weights: of q, k and v together, of the output projection, and the two of the MLP. All are `Bf16Weight`,
            `Float8Weight`, or tensors of the dtype of x.
        value_embeds, gate: as in `split_qkv`, and (K, G); None in a layer without.

    Returns: the two parts of the residual stream after it, (B, T, C) each, which the next layer's mix and norm add.
    """
    wqkv, wo, w1, w2 = weights
    qkv, gates = linear_and_gates(h, wqkv, gate, h.shape[-1] ** 0.5)  # the bound of a normed row
    q, k, v = split_qkv(qkv, cos, sin, kv_heads, eps, value_embeds, gates, position_ids)
    attn_out = attention(q, k, v, scale, window, mask)
    return residual_mlp(x, attn_out.flatten(-2), wo, w1, w2, eps)


def final_norm(x: Tensor, y: Tensor, middle: Tensor | None, backout_lambda: Tensor | None, eps: float) -> Tensor:
    """The final norm of x + y, less the backout of the middle layer's two parts if there is one."""
    x = x + y
    if backout_lambda is not None:
        x = (x - backout_lambda.float() * (middle[0] + middle[1])).to(x.dtype)  # in float32: what is left may be small
    return F.rms_norm(x, x.shape[-1:], eps=eps)


class BlockKind(NamedTuple):
    """One of the ways above to compute a block."""

    run: Callable  # `block`, compiled or eager
    weight: Callable  # (cache, name, parameters) -> the weight that `run` takes
    kernels: bool  # value embeddings are read from their table by the kernel
    flash: bool  # FlashAttention-4


class FusedTransformer(nn.Module):
    """NanoChatModel's forward over the parameters of `model`, and with targets the loss of the head as well.

    compile: use torch.compile where no kernels are. fp8: FP8 matmuls in blocks and head while training. dtype: of all
    that the network computes; None: that of the embeddings. documents: also for packed documents.
    """

    def __init__(
        self, model: NanoChatForCausalLM, compile: bool = False, fp8: bool = False, dtype: torch.dtype | None = None,
        documents: bool = False,
    ):  # fmt: skip
        super().__init__()
        self.model, device = model, model.lm_head.weight.device
        self.dtype = dtype or model.model.embed_tokens.weight.dtype
        names = [*KERNELS, *(BF16_KERNELS if self.dtype == torch.bfloat16 else ()), *(FP8_KERNELS if fp8 else ())]
        names += [FLASH_DOCUMENTS] if documents and self.dtype == torch.bfloat16 else []
        verify(names, model.config, device, self.dtype)
        self.fp8 = fp8 and "FP8" not in disabled
        self.fp8_head = self.fp8 and "FP8 head" not in disabled and len(model.lm_head.weight) % 16 == 0
        # Four kinds of blocks, each for training, evaluating and SFT; and a residual mix per kind of batch.
        torch._dynamo.config.recompile_limit = 64
        if compile:
            torch._dynamo.config.optimize_ddp = False  # blocks are compiled one by one: DDP overlaps without its help
        wrap = torch.compile(dynamic=False, fullgraph=True) if compile else lambda function: function
        self.embed, self.final_norm = wrap(embed), wrap(final_norm)
        self.cache = WeightCastCache()
        self.tables: dict = {}  # (length, device, dtype, flash) -> what `rope_and_masks` returns without position_ids

        x = torch.empty((), device=device, dtype=self.dtype)
        flash = uses_flash(x)
        self.eval_kind = BlockKind(wrap(block), self.plain_weight, kernels=False, flash=False)
        if flash and uses_quack(x):
            self.eval_kind = BlockKind(block, self.bf16_weight, kernels=True, flash=True)
        fp8_kind = BlockKind(block, self.fp8_weight, kernels=True, flash=flash)
        self.train_kind = fp8_kind if self.fp8 else self.eval_kind

    def plain_weight(self, cache: WeightCastCache, name, parts: tuple) -> Tensor:
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).to(self.dtype)

    def bf16_weight(self, cache: WeightCastCache, name, parts: tuple) -> Bf16Weight:
        return Bf16Weight(cache.cast_detached(name, self.dtype, *parts), parts)

    def fp8_weight(self, cache: WeightCastCache, name, parts: tuple):
        return cache.lookup((name, "fp8"), quantize_weight, *parts)

    def rope_and_masks(self, x: Tensor, position_ids: Tensor | None, max_documents: int, flash: bool) -> tuple:
        """x (B, T, C) -> cos, sin (T, 1, D/2) and the attention masks by window."""
        length, config = x.shape[1], self.model.config
        key = (length, x.device, x.dtype, flash)
        if key not in self.tables:
            cos, sin = self.model.model.rotary_emb(x, torch.arange(length, device=x.device)[None])
            masks = {window: attention_mask(x, window, flash=flash) for window in {None, config.sliding_window}}
            self.tables[key] = cos[0, 0, :, None].contiguous(), sin[0, 0, :, None].contiguous(), masks
        cos, sin, masks = self.tables[key]
        if position_ids is not None:
            masks = {window: attention_mask(x, window, position_ids, max_documents, flash=flash) for window in masks}
        return cos, sin, masks

    def call_layer(self, layer: nn.Module, *inputs) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """`mix_and_block` of a layer. Under FSDP2 the layer is called, whose hooks gather unsharded weights."""
        if not isinstance(layer, FSDPModule):
            return self.mix_and_block(layer, self.cache, *inputs)
        # FSDP2 fills unsharded weights without a new version, so a cache could not tell that a cast is out of date.
        layer.forward = partial(self.mix_and_block, layer, WeightCastCache())
        try:
            return layer(*inputs)
        finally:
            del layer.forward

    def mix_and_block(self, layer, cache, kind, i, residual, x0, lambdas, value_embeds, position_ids, cos, sin, masks):
        """The mix and norm before a layer, and its block -> the residual stream after it in two parts, and x0."""
        attn, mlp, config = layer.self_attn, layer.mlp, self.model.config
        length = residual[0].shape[1]
        window = attn.sliding_window if (attn.sliding_window or length) < length else None
        matrices = (
            (attn.q_proj.weight, attn.k_proj.weight, attn.v_proj.weight), (attn.o_proj.weight,),
            (mlp.fc1.weight,), (mlp.fc2.weight,),
        )  # fmt: skip
        weights = [kind.weight(cache, (i, j), parts) for j, parts in enumerate(matrices)]
        x, h, x0 = residual_mix(*residual, x0, lambdas, config.rms_norm_eps)
        residual = kind.run(
            x, h, weights, value_embeds, None if value_embeds is None else attn.ve_gate.weight, position_ids,
            cos, sin, masks[window], config.num_key_value_heads, window, attn.scaling, config.rms_norm_eps,
        )  # fmt: skip
        return residual, x0

    def forward(
        self, ids: Tensor, targets: Tensor | None = None, reduction: str = "mean",
        position_ids: Tensor | None = None, max_documents: int = 0,
    ) -> Tensor:  # fmt: skip
        """ids (B, T) -> hidden states (B, T, C); with targets (B, T; -100 ignored) their loss in nats instead.

        position_ids, max_documents: as in `attention_mask`, for packed documents.
        """
        model, config = self.model.model, self.model.config
        kind = self.train_kind if torch.is_grad_enabled() else self.eval_kind
        position_ids = None if position_ids is None else position_ids.contiguous()  # kernels count on it
        eps = config.rms_norm_eps
        smear = (model.smear_gate.weight, model.smear_lambda) if config.smear else (None, None)
        index = EmbeddingGradIndex(ids, len(model.embed_tokens.weight))
        x = self.embed(index.lookup(model.embed_tokens.weight), *smear, eps, self.dtype, position_ids)
        residual, middle = (x, None), None
        cos, sin, masks = self.rope_and_masks(x, position_ids, max_documents, kind.flash)
        lambdas = [None] * len(model.layers)
        if config.residual_lambdas:
            lambdas = list(zip(model.resid_lambdas.unbind(), model.x0_lambdas.unbind()))
        for i, layer in enumerate(model.layers):
            value_embeds = None
            if config.value_embeds and str(i) in model.value_embeds:
                table = model.value_embeds[str(i)].weight
                value_embeds = index.lookup(table, materialize=not kind.kernels)
            inputs = kind, i, residual, x, lambdas[i], value_embeds, position_ids, cos, sin, masks
            residual, x = self.call_layer(layer, *inputs)
            if i == len(model.layers) // 2:
                middle = residual
        hidden = self.final_norm(*residual, middle, model.backout_lambda if config.backout else None, eps)
        if targets is None:
            return hidden
        weight = self.model.lm_head.weight
        if self.fp8_head and reduction == "mean" and torch.is_grad_enabled():
            cache = WeightCastCache() if isinstance(self, FSDPModule) else self.cache
            weight = self.fp8_weight(cache, "head", (weight,))
        return lm_head_loss(self.model, hidden, targets, reduction, weight)


def lm_head_loss(model: NanoChatForCausalLM, hidden: Tensor, targets: Tensor, reduction: str, weight=None) -> Tensor:
    """Loss in nats of the head on hidden states (B, T, C) and targets (B, T): () the mean, or (B, T) with "none".

    weight: the head's as the matmuls take it; None: the parameter.
    """
    cap, size = model.config.final_logit_softcapping, model.config.num_tokens or model.config.vocab_size
    inputs = hidden.flatten(0, 1), model.lm_head.weight if weight is None else weight, targets.flatten()
    loss = fused_linear_cross_entropy(*inputs, cap, size, reduction)
    return loss if reduction == "mean" else loss.view_as(targets)


def use_fused_forward(model: NanoChatForCausalLM, dtype: torch.dtype, documents: int, compile: bool = False) -> None:
    """Let `model(input_ids, labels=, position_ids=)` run `FusedTransformer`, which returns a loss and no logits.

    For a trainer that packs documents. `labels` (B, T) are those of the inputs (-100 ignored). `position_ids` (B, T)
    begin at 0 in each of the batch's documents, at most `documents` with the padding. Without labels (generation,
    evaluation) the model's own forward runs.
    """
    fused, original = FusedTransformer(model, compile=compile, dtype=dtype, documents=True), model.forward

    def forward(input_ids=None, labels=None, position_ids=None, num_items_in_batch=None, **others):
        if labels is None:
            return original(input_ids=input_ids, position_ids=position_ids, **others)
        targets = F.pad(labels[:, 1:], (0, 1), value=-100)
        loss = fused(input_ids, targets, position_ids=position_ids, max_documents=documents)
        if num_items_in_batch is not None:  # of all micro-batches of the step
            loss = loss * ((targets >= 0).sum() / num_items_in_batch)
        return CausalLMOutputWithPast(loss=loss)

    model.forward = forward
