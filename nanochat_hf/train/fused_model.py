"""The training step's way through the network: the same parameters and the same numbers as model/, fewer bytes moved.

`Trunk(model)(input_ids)` equals `model.model(input_ids).last_hidden_state` for whole, unpadded rows without a cache,
which is what pretraining feeds, and for rows of several documents with their `positions`, which SFT feeds
(`use_fused_forward`); the tests hold the two together for both generations. Differences:

- q, k and v come out of one matrix product;
- the fused operations of `kernels.py`, `products.py`, `epilogues.py`, `float8.py`, `attention.py` and `stream.py`, the
  bf16 copies and embedding rows of `leaves.py`; with FlashAttention-4 and quack installed, or in 8 bits, nothing in a
  block is left to compile;
- without them each block is compiled by itself and the program is reused by all blocks alike (regional compilation),
  so that the first step of 24 layers waits for three programs and not for one of 24 times the size.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..kernels.attention import FLASH, attend, attention_mask, uses_flash
from ..kernels.backend import disabled, verify
from ..kernels.block_matmuls import Weight, fused, linear_and_gates, residual_mlp
from ..kernels.float8 import weight8
from ..kernels.fused_cross_entropy import fused_linear_cross_entropy
from ..kernels.residual import EmbeddingResidual, residual_mix
from ..kernels.weight_cache import EmbeddingGradIndex, WeightCastCache
from ..model.modeling_nanochat import NanoChatForCausalLM

KERNELS = ("rotary and QK norm", "residual mix", "gradient sums", "GEMM epilogues")  # of a training step
BF16_KERNELS = ("fused cross-entropy", "FlashAttention-4")


def rms_norm(x: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), eps=eps)


def embed(
    x: Tensor, gate: Tensor | None, strength: Tensor | None, eps: float, dtype: torch.dtype, positions: Tensor | None
) -> Tensor:
    """Embedding (B, T, C) -> the normed one, smeared if there is a gate (1, G), though not into position 0."""
    x = rms_norm(x.to(dtype), eps)
    if gate is not None:
        share = strength.to(x.dtype) * torch.sigmoid(F.linear(x[:, 1:, : gate.shape[1]], gate.to(x.dtype)))
        if positions is not None:
            share = share * (positions[:, 1:, None] > 0)
        x = torch.cat((x[:, :1], x[:, 1:] + share * x[:, :-1]), dim=1)
    return x


def block(
    x, h, ids, positions, table, rows, gate, wqkv, wo, w1, w2, cos, sin, mask, kv_heads, window, scale, eps,
):  # fmt: skip
    """One decoder layer over the stream x and its norm h, (B, T, C) each -> the two parts of the stream after it.

    Leaving the last addition to the next layer lets it be fused with that layer's mix and norm (`stream.mix`). `table`
    (V, K * D), `rows` (as in `attention.split_qkv`) and `gate` (K, G) are the value embedding's, None in a layer
    without. The matrices are tensors of the dtype of x, `products.Weight` or `float8.Weight8`.
    """
    bound = h.shape[-1] ** 0.5  # of what has been normed
    qkv, gates = linear_and_gates(h, wqkv, gate, bound)
    seen = attend(
        qkv, cos, sin, kv_heads, eps, None if table is None else ids, table, gates, rows, positions,
        scale=scale, window=window, mask=mask,
    )  # fmt: skip
    return residual_mlp(x, seen.flatten(-2), wo, w1, w2, eps)


def finish(x: Tensor, y: Tensor, middle: Tensor | None, strength: Tensor | None, eps: float) -> Tensor:
    x = x + y
    if strength is not None:
        x = (x - strength.float() * (middle[0] + middle[1])).to(x.dtype)  # in float32: what is left may be small
    return rms_norm(x, eps)


class FusedTransformer(nn.Module):
    """NanoChatModel's forward over the parameters of `model`, and with targets the head's loss as well.

    compile: each part by torch.compile. fp8: the blocks' matrix products in 8-bit floats, while training only; the
    head's stays in bf16. dtype: what the network computes in; None: the dtype of the embeddings. documents: rows of
    several will come.
    """

    def __init__(
        self,
        model: NanoChatForCausalLM,
        compile: bool = False,
        fp8: bool = False,
        dtype: torch.dtype | None = None,
        documents: bool = False,
    ):
        super().__init__()
        self.model = model
        self.dtype = dtype or model.model.embed_tokens.weight.dtype
        names = [*KERNELS, *(BF16_KERNELS if self.dtype == torch.bfloat16 else ()), *(["FP8"] if fp8 else [])]
        names += [FLASH[-1]] if documents and self.dtype == torch.bfloat16 else []
        verify(names, model.config, model.lm_head.weight.device, self.dtype)
        self.fp8 = fp8 and "FP8" not in disabled
        if compile:
            torch._dynamo.config.optimize_ddp = False  # blocks are compiled one by one: DDP overlaps without its help
            torch._dynamo.config.recompile_limit = 64  # four kinds of blocks, each for training, evaluating and SFT
        wrap = torch.compile(dynamic=False, fullgraph=True) if compile else lambda function: function
        self.embed, self.block, self.finish = wrap(embed), wrap(block), wrap(finish)
        self.copies = WeightCastCache()
        self.plain: dict = {}  # (length, device, dtype) -> what `prepare` made for rows of one document

    def prepare(self, x: Tensor, positions: Tensor | None, documents: int) -> tuple[Tensor, Tensor, dict]:
        """x (B, T, C) -> cos, sin (T, 1, D/2) and the attention masks by window."""
        length, config = x.shape[1], self.model.config
        key = (length, x.device, x.dtype)
        if key not in self.plain:
            cos, sin = self.model.model.rotary_emb(x, torch.arange(length, device=x.device)[None])
            windows = {None, config.sliding_window}
            masks = {window: attention_mask(x, window) for window in windows}
            self.plain[key] = cos[0, 0, :, None].contiguous(), sin[0, 0, :, None].contiguous(), masks
        cos, sin, masks = self.plain[key]
        if positions is not None:
            masks = {window: attention_mask(x, window, positions, documents) for window in masks}
        return cos, sin, masks

    def layer(self, layer: nn.Module, *inputs) -> tuple[Tensor, Tensor]:
        """The block over a layer's weights. Under FSDP2 by the layer's own call, whose hooks gather these weights."""
        if not isinstance(layer, FSDPModule):
            return self.step(layer, *inputs)
        layer.forward = partial(self.step, layer)
        try:
            return layer(*inputs)
        finally:
            del layer.forward

    def step(
        self, layer, i, x, y, embedded, lambdas, ids, positions, table, rows, cos, sin, masks
    ) -> tuple[Tensor, Tensor]:
        attn, mlp, config = layer.self_attn, layer.mlp, self.model.config
        gate = None if table is None else attn.ve_gate.weight
        window = attn.sliding_window if (attn.sliding_window or ids.shape[1]) < ids.shape[1] else None
        matrices = (
            (attn.q_proj.weight, attn.k_proj.weight, attn.v_proj.weight), (attn.o_proj.weight,),
            (mlp.fc1.weight,), (mlp.fc2.weight,),
        )  # fmt: skip
        # FSDP2 fills the gathered weights behind autograd's back: their copies cannot be told to be out of date.
        copies = WeightCastCache() if isinstance(layer, FSDPModule) else self.copies
        run = block  # nothing is left to fuse
        if self.fp8 and torch.is_grad_enabled():
            low = [copies.made((i, kind, "fp8"), weight8, *parts) for kind, parts in enumerate(matrices)]
        elif uses_flash(x) and fused(x):
            low = [Weight(copies.copy((i, kind), x.dtype, *parts), parts) for kind, parts in enumerate(matrices)]
        else:
            run = self.block
            low = [copies.low((i, kind), x.dtype, *parts) for kind, parts in enumerate(matrices)]
        x, h = residual_mix(x, y, embedded, lambdas, config.rms_norm_eps)
        return run(
            x, h, ids, positions, table, rows, gate, *low, cos, sin, masks[window], config.num_key_value_heads,
            window, attn.scaling, config.rms_norm_eps,
        )  # fmt: skip

    def forward(
        self,
        ids: Tensor,
        targets: Tensor | None = None,
        reduction: str = "mean",
        positions: Tensor | None = None,
        documents: int = 0,
    ) -> Tensor:
        """ids (B, T) -> hidden states (B, T, C); with targets (B, T; -100 ignored) their loss in nats instead.

        positions, documents: as in `attention_mask`, for rows of several documents, which see only themselves.
        """
        model, config = self.model.model, self.model.config
        eps = config.rms_norm_eps
        smear = (model.smear_gate.weight, model.smear_lambda) if config.smear else (None, None)
        places = EmbeddingGradIndex(ids, len(model.embed_tokens.weight))
        x = self.embed(places.rows(model.embed_tokens.weight), *smear, eps, self.dtype, positions)
        embedded, y, middle = EmbeddingResidual(x), None, None
        cos, sin, masks = self.prepare(x, positions, documents)
        lambdas = [None] * len(model.layers)
        if config.residual_lambdas:
            lambdas = list(zip(model.resid_lambdas.unbind(), model.x0_lambdas.unbind()))
        for i, layer in enumerate(model.layers):
            table = rows = None
            if config.value_embeds and str(i) in model.value_embeds:
                table = model.value_embeds[str(i)].weight
                rows = places.rows(table, real=False)
                table = table if rows is None else table.detach()
            x, y = self.layer(layer, i, x, y, embedded, lambdas[i], ids, positions, table, rows, cos, sin, masks)
            if i == len(model.layers) // 2:
                middle = x, y
        hidden = self.finish(x, y, middle, model.backout_lambda if config.backout else None, eps)
        if targets is None:
            return hidden
        cap, size = config.final_logit_softcapping, config.num_tokens or config.vocab_size
        loss = fused_linear_cross_entropy(
            hidden.flatten(0, 1), self.model.lm_head.weight, targets.flatten(), cap, size, reduction
        )
        return loss if reduction == "mean" else loss.view_as(targets)


def use_fused_forward(model: NanoChatForCausalLM, dtype: torch.dtype, documents: int, compile: bool = False) -> None:
    """Send `model(input_ids, labels=, position_ids=)` this way, so that it returns a loss and no logits.

    For a trainer that packs documents into rows: `labels` (B, T) are those of the inputs (-100 ignored),
    `position_ids` (B, T) begin at 0 in each of at most `documents` documents of a batch, padding counted as such.
    Without labels (generation, evaluation) the model stays as it is.
    """
    trunk, original = FusedTransformer(model, compile=compile, dtype=dtype, documents=True), model.forward

    def forward(input_ids=None, labels=None, position_ids=None, num_items_in_batch=None, **others):
        if labels is None:
            return original(input_ids=input_ids, position_ids=position_ids, **others)
        targets = F.pad(labels[:, 1:], (0, 1), value=-100)
        loss = trunk(input_ids, targets, positions=position_ids, documents=documents)
        if num_items_in_batch is not None:  # of all micro-batches of the step
            loss = loss * ((targets >= 0).sum() / num_items_in_batch)
        return CausalLMOutputWithPast(loss=loss)

    model.forward = forward
