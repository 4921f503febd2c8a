"""Generation: with every cache, cut in every way, the model says what it says without one, token by token."""

import pytest
import torch
from tiny import (
    GENERATIONS,
    close,
    greedy,
    make_cache,
    make_config,
    make_ids,
    make_model,
    randomize,
    uncached_greedy,
)
from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin

from nanochat_hf.model import NanoChatForCausalLM


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("chunks", [[1] * 30, [13] + [1] * 17, [7, 7, 7, 7, 2], [1, 6, 1, 22]], ids=str)
def test_cached_logits_equal_uncached_ones(generation, kind, chunks):
    model, ids = make_model(generation), make_ids(2, 30)
    cache = make_cache(kind, model.config)
    logits = [model(chunk, past_key_values=cache).logits for chunk in ids.split(chunks, dim=1)]
    close(torch.cat(logits, dim=1), model(ids, use_cache=False).logits)


def test_the_smear_is_what_the_cache_test_can_see():
    model, ids = make_model(), make_ids(1, 12)
    cache = make_cache("dynamic", model.config)
    model(ids[:, :6], past_key_values=cache)
    cache.layers[-1].has_previous_state[0] = False  # a cache that forgets the previous embedding
    wrong = model(ids[:, 6:], past_key_values=cache).logits
    assert (wrong - model(ids, use_cache=False).logits[:, 6:]).abs().max() > 0.01


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 6},
        {"prompt_lookup_num_tokens": 3},
        {"use_cache": False},
    ],
    ids=str,
)
def test_generate_equals_running_everything_again_for_each_token(generation, options):
    model = make_model(generation)
    model.generation_config.disable_compile = True
    prompt = make_ids(1, 6).repeat(1, 3)  # repeats, so that prompt lookup finds something
    assert greedy(model, prompt, 15, **options).tolist() == uncached_greedy(model, prompt, 15).tolist()


@pytest.mark.parametrize("generation", GENERATIONS)
def test_a_left_padded_batch_generates_what_each_row_generates_alone(generation):
    model = make_model(generation)
    model.generation_config.disable_compile = True
    rows = [make_ids(1, n, seed=n) for n in (4, 9, 13)]
    ids = torch.cat([torch.cat([torch.zeros(1, 13 - r.shape[1], dtype=torch.long), r], dim=1) for r in rows])
    mask = torch.cat([(torch.arange(13) >= 13 - r.shape[1]).long()[None] for r in rows])
    for options in ({}, {"cache_implementation": "static"}, {"prefill_chunk_size": 4}):
        out = greedy(model, ids, 10, attention_mask=mask, **options)
        for row, generated in zip(rows, out):
            assert generated[13:].tolist() == uncached_greedy(model, row, 10)[0, row.shape[1] :].tolist()


@pytest.mark.parametrize("generation", GENERATIONS)
def test_beams_and_assistants_see_the_same_model_with_and_without_cache(generation):
    model, prompt = make_model(generation, num_tokens=None), make_ids(2, 7)
    beams = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 8, "do_sample": False}
    assert model.generate(prompt, **beams).tolist() == model.generate(prompt, use_cache=False, **beams).tolist()
    assistant = randomize(NanoChatForCausalLM(make_config(generation, num_tokens=None)), seed=9)
    assisted = greedy(model, prompt[:1], 12, assistant_model=assistant)
    assert assisted.tolist() == uncached_greedy(model, prompt[:1], 12).tolist()


@pytest.mark.parametrize("generation", GENERATIONS)
def test_a_returned_cache_continues_into_a_second_turn(generation):
    model, first = make_model(generation), make_ids(1, 8)
    turn = greedy(model, first, 5, return_dict_in_generate=True)
    second = torch.cat([turn.sequences, make_ids(1, 6, seed=5)], dim=1)
    continued = greedy(model, second, 9, past_key_values=turn.past_key_values)
    assert continued.tolist() == uncached_greedy(model, second, 9).tolist()


@pytest.fixture
def synchronize(monkeypatch):
    """Lets caches offload without a GPU, and as late as one may: yields what waits for all copies.

    A float tensor is on the device, the int32 view of one is away: no mix of the two gives a right result. A copy to
    the CPU, which the main stream makes, arrives when somebody waits for that stream. Before, there are zeros.
    """
    pending, streams = [], []

    def synchronize(*_):
        while pending:
            target, source = pending.pop()
            target.copy_(source)

    class Stream:
        def __enter__(self):
            streams.append(self)

        def __exit__(self, *_):
            streams.pop()

        def wait_stream(self, other):
            if other is main:
                synchronize()

    def go(x):
        if x is None or x.dtype == torch.int32:
            return x
        pending.append((torch.zeros_like(x, dtype=torch.int32), x.view(torch.int32)))
        return pending[-1][0]

    def come(x):
        if x is None or x.dtype == torch.float32:
            return x
        if not streams:  # the main stream does one thing after the other
            synchronize()
        return x.view(torch.float32).clone()

    main = Stream()
    for name, move in {"offload": go, "prefetch": come}.items():

        def move_keys(layer, move=move):
            layer.keys, layer.values = move(layer.keys), move(layer.values)

        def move_states(layer, move=move):
            layer.conv_states = {i: move(x) for i, x in layer.conv_states.items()}

        monkeypatch.setattr(CacheLayerMixin, name, move_keys)
        monkeypatch.setattr(LinearAttentionCacheLayerMixin, name, move_states)
    monkeypatch.setattr(torch, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: main)
    return synchronize


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("cache", ["offloaded", "offloaded_static"])
def test_what_a_cache_offloads_is_back_when_it_is_needed(synchronize, generation, cache):
    model, prompt = make_model(generation, window_pattern="SL", num_tokens=None), make_ids(2, 17)
    model.generation_config.disable_compile = True
    model.register_forward_hook(synchronize)  # the next token is chosen on the CPU
    generated = greedy(model, prompt, 12, cache_implementation=cache)
    assert generated.tolist() == uncached_greedy(model, prompt, 12).tolist()
    beams = {"num_beams": 3, "max_new_tokens": 8, "do_sample": False}
    expected = model.generate(prompt, use_cache=False, **beams)
    assert model.generate(prompt, cache_implementation=cache, **beams).tolist() == expected.tolist()


@pytest.mark.slow
@pytest.mark.parametrize("generation", GENERATIONS)
def test_the_decoding_step_compiles_whole_and_not_again_as_lengths_grow(generation):
    model = make_model(generation)
    torch._dynamo.reset()
    step = torch.compile(model, fullgraph=True, backend="aot_eager")
    ids, cache, logits, graphs = make_ids(1, 30), make_cache("static", model.config), [], []
    model(ids[:, :10], past_key_values=cache)
    torch._dynamo.utils.counters.clear()
    for t in range(10, 30):
        mask = torch.ones(1, t + 1, dtype=torch.long)  # as generate does: masks are made outside of the compiled step
        masks = model.create_masks_for_generate(model.config, torch.empty(1, 1, 0), mask, cache, torch.tensor([[t]]))
        out = step(ids[:, t : t + 1], attention_mask=masks, past_key_values=cache, position_ids=torch.tensor([[t]]))
        logits.append(out.logits)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    close(torch.cat(logits, dim=1), model(ids, use_cache=False).logits[:, 10:])
    # transformers' static window layer counts in a Python int: seen to change once, it becomes a symbol, for good.
    assert graphs[-1] == graphs[1] <= generation
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.slow
def test_the_model_can_be_exported():
    model, ids = make_model(), make_ids(1, 16)
    exported = torch.export.export(model, (ids,), {"use_cache": False}, strict=False)
    close(exported.module()(ids, use_cache=False).logits, model(ids).logits)
