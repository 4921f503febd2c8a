"""Fast loglikelihoods equal those of one forward per request, for models of every kind, in any batch and order."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from nanochat_hf.eval import loglikelihood
from nanochat_hf.eval.loglikelihood import loglikelihoods, max_batch_tokens

SIZES = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA = SIZES | {"num_key_value_heads": 1, "intermediate_size": 64, "max_position_embeddings": 128}
KINDS = {"gpt2": {**SIZES, "n_positions": 64}, "llama": LLAMA, "mistral": LLAMA | {"sliding_window": 16}}


def make(kind, lively_model, **sizes):
    if kind == "nanochat_hf":
        return lively_model
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **KINDS[kind] | sizes)).eval()


@torch.inference_mode()
def reference(model, context, continuation):
    logits = model(torch.from_numpy(np.concatenate([context, continuation]))[None], use_cache=False).logits[0]
    targets = torch.from_numpy(continuation)
    logits = logits[len(context) - 1 : -1]
    total = logits.log_softmax(-1).gather(1, targets[:, None]).sum().item()
    return total, bool((logits.argmax(-1) == targets).all())


@torch.inference_mode()
def extend(model, tokens):
    return np.append(tokens, model(torch.from_numpy(tokens)[None]).logits[0, -1].argmax().item())


@pytest.mark.parametrize("kind", ["nanochat_hf", *KINDS])
def test_any_batch_and_order_gives_the_values_of_one_forward_per_request(lively_model, kind):
    model, rng = make(kind, lively_model), np.random.default_rng(0)
    contexts = [rng.integers(0, 300, size) for size in (3, 24, 25, 30, 58)]  # shared from 25 on; 58 + 6 fill GPT-2
    requests = [(c, rng.integers(0, 300, n)) for c in contexts for n in (1, 6, 3, 1)]
    for context in contexts:  # continuations of which all, or all but one, tokens are the argmax
        best = extend(model, extend(model, context))
        wrong = extend(model, np.append(context, (best[-2] + 1) % 300))[-2:]
        requests += [(context, part) for part in (best[-2:], best[-2:] + [0, 1], wrong, best[-2:-1])]
    requests += [(contexts[3], rng.integers(0, 300, 20)) for _ in range(2)]  # padding of 58 has no such positions
    expected = [reference(model, *request) for request in requests]
    assert sum(greedy for _, greedy in expected) >= len(contexts)
    order = rng.permutation(len(requests))
    for batch_tokens in (None, 1, 700):
        scores = loglikelihoods(model, [requests[i] for i in order], batch_tokens)
        assert [greedy for _, greedy in scores] == [expected[i][1] for i in order]
        assert [total for total, _ in scores] == pytest.approx([expected[i][0] for i in order], abs=1e-3)


def test_prefixes_and_suffixes_of_a_batch_stay_within_what_the_model_counts(lively_model):
    limit, rng = 10 * lively_model.config.max_position_embeddings, np.random.default_rng(0)
    requests = [
        (rng.integers(0, 300, context), rng.integers(0, 300, n))
        for context, lengths in ((limit - 4, (3, 4)), (30, (limit - 40, limit - 41)))
        for n in lengths
    ]
    requests = [(requests[i - i % 2][0], continuation) for i, (_, continuation) in enumerate(requests)]
    expected = [reference(lively_model, *request)[0] for request in requests]
    assert [total for total, _ in loglikelihoods(lively_model, requests, 10**7)] == pytest.approx(expected, abs=1e-2)


def test_choices_share_their_context_and_those_of_one_token_the_whole_row(lively_model):
    shapes, context = [], np.arange(5, 60)
    lively_model.register_forward_pre_hook(lambda module, args: shapes.append(tuple(args[0].shape)))
    loglikelihoods(lively_model, [(context, np.array([letter])) for letter in (1, 2, 3, 4)])
    assert shapes == [(1, 55)]
    shapes.clear()
    choices = [(context, np.array([letter, 7, 8])) for letter in (1, 2, 3, 4)]
    loglikelihoods(lively_model, choices)
    assert shapes == [(1, 54), (4, 3)]
    shapes.clear()
    loglikelihoods(lively_model, [(context[:24], np.array([letter, 7, 8])) for letter in (1, 2, 3, 4)])
    assert shapes == [(4, 26)]  # too short a prefix for a pass of its own
    shapes.clear()
    lively_model._is_stateful = True
    loglikelihoods(lively_model, choices)
    assert shapes == [(4, 57)]


def test_a_batch_is_bounded_with_and_without_a_gpu(lively_model, monkeypatch):
    shapes, requests = [], [(np.arange(5, 5 + n), np.array([1])) for n in (40, 38, 36, 10, 9)]
    lively_model.register_forward_pre_hook(lambda module, args: shapes.append(tuple(args[0].shape)))
    loglikelihoods(lively_model, requests, batch_tokens=150)
    assert shapes == [(2, 40), (2, 36), (1, 9)]  # two rows cost 2 x (40 + 8 x 2), as each has logits in both columns
    assert max_batch_tokens(lively_model) == 8192

    class OnGPU:
        device, dtype, config = torch.device("cuda"), torch.bfloat16, lively_model.config

    for free, expected in ((1 << 20, 16_384), (1 << 40, 131_072)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, free))
        assert max_batch_tokens(OnGPU()) == expected
    sizes = {"num_hidden_layers": 3, "hidden_size": 128, "vocab_size": 6000}
    for heads, vectors in (((None, None), 2 * 3), ((4, None), 2 * 3), ((4, 1), 1.5)):  # keys and values in bf16; 16
        given = {name: n for name, n in zip(("num_attention_heads", "num_key_value_heads"), heads) if n}
        text = SimpleNamespace(**sizes, **given)
        OnGPU.config = SimpleNamespace(get_text_config=lambda text=text: text)
        size = int((vectors + 16) * 128 * 2) + 10 * 6000 // loglikelihood.LOGIT_COST
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, size=size: (2 * 50_000 * size, 0))
        assert max_batch_tokens(OnGPU()) == 50_000
