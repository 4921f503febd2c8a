"""Tiny models with random weights everywhere, and what is asked of them: shared by the tests of the model.

The lambdas and gates are random too: with fresh ones half of the network is zero and any mistake in it invisible.
Windows are five keys and sequences longer, so that the windows matter.
"""

import torch
from transformers import DynamicCache, StaticCache

from nanochat_hf.model import NanoChatConfig, NanoChatForCausalLM

TINY = {
    "vocab_size": 128, "num_tokens": 100, "hidden_size": 32, "num_hidden_layers": 5, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "eos_token_id": None,
}  # fmt: skip
GENERATIONS = [1, 2]
KINDS = ["plain", "padded", "packed", "cached"]
LOW = {"device": "cuda", "dtype": torch.bfloat16}  # of the inputs that fused kernels take


def relative(a, b) -> float:
    """Distance of a from b, in lengths of b."""
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


def make_config(generation: int = 2, **fields) -> NanoChatConfig:
    if generation == 1:
        return NanoChatConfig.first_generation(**{**TINY, **fields})
    return NanoChatConfig(**{**TINY, "sliding_window": 5, **fields})


def randomize(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Random weights of a size that makes logits vary by about one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            std = 0.5 if parameter.ndim == 1 else 0.2
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return model.eval()


def make_model(generation: int = 2, attn_implementation: str = "sdpa", **fields) -> NanoChatForCausalLM:
    config = make_config(generation, **fields)
    config._attn_implementation = attn_implementation
    return randomize(NanoChatForCausalLM(config))


def make_cache(kind: str, config: NanoChatConfig):
    return DynamicCache(config=config) if kind == "dynamic" else StaticCache(config=config, max_cache_len=40)


def make_ids(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(1, 100, shape, generator=torch.Generator().manual_seed(seed))


def close(actual: torch.Tensor, expected: torch.Tensor, atol: float = 3e-5) -> None:
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


@torch.no_grad()
def logits_of(model, kind: str) -> torch.Tensor:
    """Logits of the real tokens of one batch: as it is, padded to the left, of packed rows, or in cached chunks."""
    ids = make_ids(2, 60).to(model.device)
    if kind == "padded":
        mask = torch.ones_like(ids)
        mask[0, :9] = 0
        return model(ids, attention_mask=mask).logits[mask.bool()]
    if kind == "packed":
        positions = torch.cat([torch.arange(25), torch.arange(35)]).to(model.device)[None]
        return model(ids[:1], position_ids=positions, use_cache=False).logits  # flash attention packs single rows only
    if kind == "cached":
        cache = make_cache("dynamic", model.config)
        return torch.cat([model(part, past_key_values=cache).logits for part in ids.split([40, 1, 19], dim=1)], dim=1)
    return model(ids).logits


@torch.no_grad()
def uncached_greedy(model, ids: torch.Tensor, length: int) -> torch.Tensor:
    """The slow reference of generation: the whole sequence runs again for each token."""
    for _ in range(length):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return ids


def greedy(model, ids: torch.Tensor, length: int, **kwargs) -> torch.Tensor:
    return model.generate(ids, max_new_tokens=length, do_sample=False, **kwargs)
