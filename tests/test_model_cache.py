"""Generation: with every cache, in chunks of every size, the model gives the logits that it gives without a cache.

Offloaded caches need a GPU: test_model_gpu.py.
"""

import pytest
import torch
from tiny import GENERATIONS, close, greedy, make_cache, make_config, make_ids, make_model, randomize, uncached_greedy

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


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 3}], ids=str)
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
def test_without_a_mask_generate_reads_the_bos_of_each_prompt_and_no_padding(generation):
    model, (bos, eos) = make_model(generation), (5, 6)
    model.config.bos_token_id = model.generation_config.bos_token_id = model.generation_config.pad_token_id = bos
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": eos}
    first, second = [bos, 9, 11, 14, 13, 12], [bos, 20, 7]
    alone = []
    for row in (first, second):
        ids = torch.tensor([row])
        alone.append(model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(row) :].tolist())
        assert model.generate(ids, **options)[0, len(row) :].tolist() == alone[-1]
    batch = model.generate(torch.tensor([first, [bos] * 3 + second]), **options)[:, 6:]
    assert [row[: len(one)] for row, one in zip(batch.tolist(), alone)] == alone


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


def test_the_cache_may_have_its_name_of_transformers_5_24():
    model, ids = make_model(2), make_ids(1, 8)
    past = model(ids[:, :7], use_cache=True).past_key_values
    masks = model.model.create_masks_for_generate(model.config, ids[:, 7:, None], None, cache=past)
    assert masks.keys() == {"full_attention", "sliding_attention", "padding"}
    torch.testing.assert_close(model(ids[:, 7:], cache=past).logits[:, -1], model(ids).logits[:, -1])
