"""The decoding machine against the model itself: same greedy tokens, exact caches, sampling by the book."""

import pytest
import torch
from tiny import relative

from nanochat_hf.errors import InputError
from nanochat_hf.kernels.decode import sample_next_token
from nanochat_hf.model import NanoChatConfig, NanoChatForCausalLM
from nanochat_hf.serve.decoder import Decoder, Request

PROMPTS = [[1, 2, 3], [4], [9, 8, 7, 6, 5, 4, 3, 2, 1, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20]]


def noisy(model):
    """Random weights everywhere, so that no feature is switched off by a zero."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, 0.3, generator=generator)
        else:
            parameter.data.uniform_(0.3, 1.2, generator=generator)
    return model.eval()


def make(kind):
    shape = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 5, "max_position_embeddings": 96}
    if kind == "second generation":
        config = NanoChatConfig(
            **shape, num_tokens=120, num_attention_heads=4, num_key_value_heads=2, sliding_window=9
        )
    elif kind == "first generation":
        config = NanoChatConfig.first_generation(**shape, num_attention_heads=2)
    elif kind == "windows alone":
        config = NanoChatConfig.first_generation(**shape, num_attention_heads=2, window_pattern="SL", sliding_window=4)
    elif kind == "backout alone":
        config = NanoChatConfig.first_generation(**shape, num_attention_heads=2, backout=True)
    else:
        from transformers import NanoChatConfig as Native
        from transformers import NanoChatForCausalLM as NativeModel

        return noisy(NativeModel(Native(**shape, intermediate_size=256, num_attention_heads=2, num_key_value_heads=1)))
    return noisy(NanoChatForCausalLM(config))


def run(decoder, requests, steps):
    """The tokens of each row after `steps` steps."""
    decoder.schedule(requests)
    bound = max(len(row.prompt) for row in requests.values())
    found = [[] for _ in requests]
    for i in range(steps):
        decoder.step(decoder.slots, min(bound + i, decoder.length))
        for row, token in enumerate(decoder.tokens_since(decoder.steps - 1)[0][: len(requests)].tolist()):
            found[row] += [token] * (token >= 0)
    return found


@pytest.mark.parametrize(
    "kind", ["second generation", "first generation", "windows alone", "backout alone", "transformers' own"]
)
def test_greedy_rows_of_different_lengths_equal_the_models_generate(kind):
    model = make(kind)
    decoder = Decoder(model, 4, 96, stops=[5, 7])
    answers = run(decoder, {i: Request(prompt, 40) for i, prompt in enumerate(PROMPTS)}, 40)
    for prompt, answer in zip(PROMPTS, answers):
        ids = torch.tensor([prompt])
        expected = model.generate(ids, max_new_tokens=40, do_sample=False, eos_token_id=[5, 7], pad_token_id=0)
        assert answer == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize("backout", [0.5, 0.992])
@torch.inference_mode()
def test_bfloat16_keeps_its_digits_where_backout_leaves_little(backout):
    """Of two layers the middle's value is the last one, so that the final norm must undo a factor of 1 - backout."""
    shape = {"vocab_size": 128, "hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 96}
    model = noisy(NanoChatForCausalLM(NanoChatConfig(**shape, num_hidden_layers=2)))
    model.model.backout_lambda.data.fill_(backout)
    logits = []
    for dtype in (torch.float32, torch.bfloat16):
        decoder = Decoder(model, 1, 30, [], dtype)
        decoder.schedule({0: Request(PROMPTS[2], 9)})
        step = decoder.plain_step(1, len(PROMPTS[2]))[0]
        logits.append((step, model.to(dtype)(torch.tensor(PROMPTS[2:])).logits[0, -1]))
    for exact, rounded in zip(*logits):
        assert relative(rounded, exact) < 0.02


def test_a_row_that_is_used_again_knows_nothing_of_its_former_tenant():
    model = make("second generation")
    fresh = run(Decoder(model, 1, 96, []), {0: Request([3, 1, 4, 1, 5], 20)}, 20)
    decoder = Decoder(model, 1, 96, [])
    run(decoder, {0: Request(PROMPTS[2], 30)}, 30)
    assert run(decoder, {0: Request([3, 1, 4, 1, 5], 20)}, 20) == fresh


def test_a_prompt_shared_by_rows_is_prefilled_once(monkeypatch):
    model, seen = make("second generation"), []
    decoder = Decoder(model, 4, 96, [])
    forward = decoder.forward
    monkeypatch.setattr(decoder, "forward", lambda ids, *rest: (seen.append(tuple(ids.shape)), forward(ids, *rest))[1])
    decoder.schedule({row: Request(PROMPTS[2], 5) for row in range(4)})
    assert seen == [(1, len(PROMPTS[2]) - 1)]


def test_forced_tokens_enter_a_stopped_row_and_it_goes_on_from_them():
    model = make("second generation")
    plain = run(Decoder(model, 1, 96, []), {0: Request(PROMPTS[0], 30)}, 30)[0]
    decoder = Decoder(model, 1, 96, stops=[plain[4]])
    first = plain.index(plain[4]) + 1
    begun = run(decoder, {0: Request(PROMPTS[0], 30)}, 10)[0]
    assert begun == plain[:first] and decoder.state.active.tolist() == [0]
    decoder.resume(0, [plain[4], 33])  # a forced stop token does not stop
    rest = []
    for i in range(6):
        decoder.step(1, len(PROMPTS[0]) + first + i)
        rest += decoder.tokens_since(decoder.steps - 1)[0].tolist()
    assert rest[:2] == [plain[4], 33]
    ids = torch.tensor([PROMPTS[0] + begun + [plain[4], 33]])
    expected = model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=plain[4], pad_token_id=0)
    got = [token for token in rest[2:] if token >= 0]
    assert got == expected[0, ids.shape[1] :].tolist()


def test_a_full_cache_ends_the_row_and_never_writes_past_it():
    decoder = Decoder(make("first generation"), 1, 16, [])
    answer = run(decoder, {0: Request(PROMPTS[0], 1000)}, 40)[0]
    assert len(answer) == 16 - len(PROMPTS[0]) and decoder.state.pos.item() == 15


def test_refresh_takes_over_changed_weights_in_place():
    model = make("second generation")
    decoder = Decoder(model, 1, 96, [])
    before, pointers = run(decoder, {0: Request(PROMPTS[0], 10)}, 10), [w.data_ptr() for w in decoder.w.values()]
    noise = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        parameter.data += torch.randn(parameter.shape, generator=noise) * 0.3
    decoder.sync_weights()
    after = run(decoder, {0: Request(PROMPTS[0], 10)}, 10)
    assert after != before and after == run(Decoder(model, 1, 96, []), {0: Request(PROMPTS[0], 10)}, 10)
    assert pointers == [w.data_ptr() for w in decoder.w.values()]


def test_other_architectures_are_refused_with_a_way_out():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=10, n_embd=8, n_layer=1, n_head=1))
    with pytest.raises(InputError, match=r"gpt2.*transformers' own generate"):
        Decoder(model, 1, 8, [])


# ---- choose ------------------------------------------------------------------------------------------------------


def brute_force(logits, temperature, top_k, top_p):
    """The distribution that sampling should follow: softmax, k best (with ties), smallest set with mass top_p."""
    p = torch.softmax(logits.double() / temperature, -1)
    if top_k:
        p = torch.where(p >= p.topk(top_k).values[-1], p, 0.0)
        p = p / p.sum()
    kept, total = torch.zeros_like(p), 0.0
    for i in p.argsort(descending=True).tolist():
        if total >= top_p:
            break
        kept[i], total = p[i], total + p[i].item()
    return kept / kept.sum()


@pytest.mark.parametrize("temperature,top_k,top_p", [(1.0, 0, 1.0), (0.7, 5, 1.0), (1.3, 0, 0.8), (0.9, 20, 0.5)])
def test_choose_follows_the_distribution_that_was_asked_for(temperature, top_k, top_p):
    logits = torch.randn(40, generator=torch.Generator().manual_seed(0)) * 2
    n = 20_000
    uniform = (torch.arange(n) + 0.5) / n
    picked = sample_next_token(
        logits.expand(n, -1),
        uniform,
        torch.full((n,), temperature),
        torch.full((n,), top_k),
        torch.full((n,), top_p),
    )
    frequency = torch.bincount(picked, minlength=40).double() / n
    assert (frequency - brute_force(logits, temperature, top_k, top_p)).abs().max() < 1e-3


def test_choose_mixes_greedy_and_sampled_rows():
    logits = torch.tensor([[0.0, 3.0, 1.0], [0.0, 3.0, 1.0]])
    picked = sample_next_token(
        logits, torch.tensor([0.99, 0.999]), torch.tensor([0.0, 5.0]), torch.tensor([0, 0]), torch.tensor([1.0, 1.0])
    )
    assert picked.tolist() == [1, 2]
