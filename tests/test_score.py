"""The fast scorer gives what one forward at a time gives, for models of every kind, in any batch and order."""

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from nanochat_hf.eval.loglikelihood import loglikelihoods, max_batch_tokens


def test_scores_do_not_depend_on_batch_size_or_order(lively_model):
    rng = np.random.default_rng(0)
    contexts = [rng.integers(0, 500, size) for size in (3, 30, 45, 60)]
    requests = [(c, rng.integers(0, 500, rng.integers(1, 5))) for c in contexts for _ in range(3)]
    small = loglikelihoods(lively_model, requests, batch_tokens=1)
    large = loglikelihoods(lively_model, requests, batch_tokens=100_000)
    order = rng.permutation(len(requests))
    mixed = loglikelihoods(lively_model, [requests[i] for i in order], batch_tokens=700)
    assert np.allclose([s for s, _ in small], [s for s, _ in large], atol=1e-3)
    assert np.allclose([large[i][0] for i in order], [s for s, _ in mixed], atol=1e-3)
    assert [h for _, h in small] == [h for _, h in large]


def test_a_score_is_the_sum_of_log_probabilities(lively_model):
    context, continuation = np.arange(5, 40), np.array([7, 300, 12])
    whole = torch.from_numpy(np.concatenate([context, continuation]))[None]
    with torch.inference_mode():
        expected = lively_model(whole, use_cache=False).logits[0, 34:37].log_softmax(-1)
    [(total, greedy)] = loglikelihoods(lively_model, [(context, continuation)])
    assert total == pytest.approx(sum(expected[i, t].item() for i, t in enumerate(continuation)), abs=1e-4)
    best = expected.argmax(-1)
    assert not greedy
    assert loglikelihoods(lively_model, [(context, best[:1].numpy())])[0][1]


@pytest.mark.parametrize("kind", ["gpt2", "llama", "mistral"])
def test_other_models_of_transformers_score_the_same_with_shared_prefixes(kind):
    sizes = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "intermediate_size": 64} if kind != "gpt2" else {}
    sizes |= {"sliding_window": 16} if kind == "mistral" else {}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, max_position_embeddings=128, **sizes)).eval()
    rng = np.random.default_rng(0)
    contexts = [rng.integers(0, 300, size) for size in (30, 41, 60)]
    requests = [(c, rng.integers(0, 300, rng.integers(1, 6))) for c in contexts for _ in range(3)]
    for (total, _), (context, continuation) in zip(loglikelihoods(model, requests), requests):
        with torch.inference_mode():
            logits = model(torch.from_numpy(np.concatenate([context, continuation]))[None]).logits[0]
        expected = logits.log_softmax(-1)[len(context) - 1 : -1]
        expected = expected.gather(1, torch.from_numpy(continuation)[:, None]).sum()
        assert total == pytest.approx(expected.item(), abs=1e-3)


def test_choices_of_one_token_need_one_row(lively_model):
    seen = []
    lively_model.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape)))
    context = np.arange(5, 60)
    loglikelihoods(lively_model, [(context, np.array([letter])) for letter in (1, 2, 3, 4)])
    assert seen == [(1, 55)]


def test_a_batch_is_bounded_with_and_without_a_gpu(lively_model, monkeypatch):
    assert max_batch_tokens(lively_model) == 8192

    class OnGPU:
        device, dtype, config = torch.device("cuda"), torch.bfloat16, lively_model.config

    for free, expected in ((1 << 20, 16_384), (1 << 40, 131_072)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, free))
        assert max_batch_tokens(OnGPU()) == expected


def test_padding_needs_no_position_that_the_model_does_not_have():
    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", n_positions=64, **sizes)).eval()
    rng = np.random.default_rng(0)
    full, short = rng.integers(0, 300, 62), rng.integers(0, 300, 30)
    requests = [(full, rng.integers(0, 300, 2)) for _ in range(2)]
    requests += [(short, rng.integers(0, 300, 20)) for _ in range(2)]
    together, alone = (
        loglikelihoods(model, requests, 10_000),
        [loglikelihoods(model, [request])[0] for request in requests],
    )
    assert [total for total, _ in together] == pytest.approx([total for total, _ in alone], abs=1e-3)
