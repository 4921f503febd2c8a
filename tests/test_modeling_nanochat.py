"""The model: equal to transformers' own where it has one, exact with every kind of cache, trainable, portable.

All models here have random weights everywhere, the lambdas and gates too: with fresh ones half of the network is zero
and any mistake in it invisible. Windows are five keys and sequences longer, so that the windows matter.
"""

import os
import subprocess
import sys

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig, StaticCache
from transformers import NanoChatConfig as NativeConfig
from transformers import NanoChatForCausalLM as NativeModel

from nanochat_hf.model import NanoChatConfig, NanoChatForCausalLM, NanoChatModel

TINY = {
    "vocab_size": 128,
    "num_tokens": 100,
    "hidden_size": 32,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": None,
}
GENERATIONS = [1, 2]


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


def make_ids(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(1, 100, shape, generator=torch.Generator().manual_seed(seed))


def close(actual: torch.Tensor, expected: torch.Tensor, atol: float = 3e-5) -> None:
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


def uncached_greedy(model, ids: torch.Tensor, length: int) -> torch.Tensor:
    """The slow twin of generation: the whole sequence is run again for every token."""
    for _ in range(length):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return ids


def greedy(model, ids: torch.Tensor, length: int, **kwargs) -> torch.Tensor:
    return model.generate(ids, max_new_tokens=length, do_sample=False, **kwargs)


@pytest.fixture(autouse=True)
def no_gradients_unless_asked(request):
    with torch.set_grad_enabled("gradient" in request.node.name or "loss" in request.node.name):
        yield


# ---- equality with the slow, the known and the separate ----------------------------------------------------------


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_first_generation_equals_the_nanochat_of_transformers(kv_heads):
    ours = make_model(1, num_tokens=None, num_key_value_heads=kv_heads)
    fields = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
              "intermediate_size", "max_position_embeddings", "rms_norm_eps", "rope_parameters")  # fmt: skip
    native = NativeModel(NativeConfig(**{name: getattr(ours.config, name) for name in fields})).eval()
    native.load_state_dict(ours.state_dict(), strict=True)
    ids = make_ids(2, 40)
    close(ours(ids).logits, native(ids).logits, atol=1e-5)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    close(ours(ids, attention_mask=mask).logits[0, 7:], native(ids, attention_mask=mask).logits[0, 7:], atol=1e-5)


def test_second_generation_equals_a_plain_reading_of_its_definition():
    model = make_model()
    config, weights, ids = model.config, dict(model.named_parameters()), make_ids(1, 23)
    net, head_dim = model.model, config.head_dim

    def norm(x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps)

    def turn(x, position):  # (H, D) at one position, by -theta
        angles = position * 100_000.0 ** -(torch.arange(head_dim // 2) * 2 / head_dim)
        a, b = x.chunk(2, -1)
        return torch.cat([a * angles.cos() + b * angles.sin(), b * angles.cos() - a * angles.sin()], -1)

    embedded = norm(weights["model.embed_tokens.weight"][ids[0]])
    x = embedded.clone()
    for t in range(1, 23):
        gate = torch.sigmoid(embedded[t, :24] @ weights["model.smear_gate.weight"][0])
        x[t] = embedded[t] + weights["model.smear_lambda"] * gate * embedded[t - 1]
    x0 = x
    for i in range(5):
        name = f"model.layers.{i}."
        x = weights["model.resid_lambdas"][i] * x + weights["model.x0_lambdas"][i] * x0
        h = norm(x)
        q, k, v = (
            (h @ weights[f"{name}self_attn.{p}_proj.weight"].T).unflatten(-1, (-1, head_dim)) for p in ("q", "k", "v")
        )
        if i % 2 == 0:  # five layers: the last is 4, so 0, 2 and 4 have value embeddings
            gates = 3 * torch.sigmoid(h[:, :12] @ weights[f"{name}self_attn.ve_gate.weight"].T)
            v = v + gates[..., None] * weights[f"model.value_embeds.{i}.weight"][ids[0]].unflatten(-1, (-1, head_dim))
        q = torch.stack([1.2 * norm(turn(q[t], t)) for t in range(23)])
        k = torch.stack([1.2 * norm(turn(k[t], t)) for t in range(23)])
        out = torch.zeros_like(q)
        for t in range(23):
            first = max(0, t - 4) if i in (0, 1, 2) else 0  # SSSL, and the last layer is full
            for head in range(4):
                scores = k[first : t + 1, head // 2] @ q[t, head] / head_dim**0.5
                out[t, head] = scores.softmax(0) @ v[first : t + 1, head // 2]
        x = x + out.flatten(1) @ weights[f"{name}self_attn.o_proj.weight"].T
        x = x + (norm(x) @ weights[f"{name}mlp.fc1.weight"].T).relu().square() @ weights[f"{name}mlp.fc2.weight"].T
        if i == 2:
            middle = x
    logits = norm(x - weights["model.backout_lambda"] * middle) @ weights["lm_head.weight"].T
    assert net.config.window_pattern == "SSSL"
    close(model(ids).logits[0], 15 * torch.tanh(logits / 15)[:, :100], atol=5e-5)


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_rows_equal_the_separate_rows(generation, attention):
    model = make_model(generation, attention)
    parts = [make_ids(1, n, seed=n) for n in (9, 14, 3)]
    positions = torch.cat([torch.arange(part.shape[1]) for part in parts])[None]
    packed = model(torch.cat(parts, dim=1), position_ids=positions, use_cache=False).logits
    close(packed, torch.cat([model(part).logits for part in parts], dim=1))
    close(model(torch.cat(parts, dim=1), position_ids=positions).logits, packed)  # also when a cache is kept


@pytest.mark.parametrize("generation", GENERATIONS)
def test_left_and_right_padding_change_nothing(generation):
    model, short, long = make_model(generation), make_ids(1, 11), make_ids(1, 18, seed=2)
    alone = model(short).logits[0]
    for left in (True, False):
        padding = torch.zeros(1, 7, dtype=torch.long)
        row = torch.cat([padding, short] if left else [short, padding], dim=1)
        real = torch.cat([padding, torch.ones_like(short)] if left else [torch.ones_like(short), padding], dim=1)
        mask = torch.cat([real, torch.ones_like(long)])
        logits = model(torch.cat([row, long]), attention_mask=mask).logits
        close(logits[0][real[0].bool()], alone)
        close(logits[1], model(long).logits[0])


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("implementation", ["sdpa", pytest.param("flex_attention", marks=pytest.mark.slow)])
def test_attention_implementations_agree(generation, implementation):
    reference, model = make_model(generation, "eager"), make_model(generation, implementation)
    ids = make_ids(2, 30)
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    close(model(ids).logits, reference(ids).logits)
    masked = [m(ids, attention_mask=mask).logits[mask.bool()] for m in (model, reference)]
    close(*masked)


def test_a_registered_attention_gets_the_window_and_no_mask():
    from transformers import AttentionInterface

    seen = []

    def spy(module, query, key, value, attention_mask, scaling, dropout=0.0, sliding_window=None, **kwargs):
        seen.append((attention_mask, sliding_window, scaling))
        return query.transpose(1, 2), None

    AttentionInterface.register("spy_attention", spy)
    model = make_model(attn_implementation="spy_attention")
    model(make_ids(1, 8))
    assert [window for _, window, _ in seen] == [5, 5, 5, None, None]
    assert all(mask is None for mask, _, _ in seen)
    assert seen[0][2] == pytest.approx(1.2 * 1.2 / 8**0.5)


def test_plain_training_builds_no_mask_for_full_layers_and_prepared_masks_are_used():
    model, ids = make_model(), make_ids(2, 20)
    embeds = torch.empty(2, 20, 0)
    masks = NanoChatModel.create_masks_for_generate(model.config, embeds, None)
    assert masks["full_attention"] is None and masks["padding"] is None
    assert masks["sliding_attention"].shape[-2:] == (20, 20)
    assert NanoChatModel.create_masks_for_generate(model.config, embeds[:, :5], None)["sliding_attention"] is None
    close(model(ids, attention_mask=masks).logits, model(ids).logits)


# ---- cached equals uncached ---------------------------------------------------------------------------------------


def make_cache(kind: str, config: NanoChatConfig):
    return DynamicCache(config=config) if kind == "dynamic" else StaticCache(config=config, max_cache_len=40)


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
@pytest.mark.parametrize("generation", GENERATIONS)
def test_training_compiles_as_one_graph_with_equal_gradients(generation):
    model, ids = make_model(generation).train(), make_ids(2, 16)
    with torch.enable_grad():
        model(ids, labels=ids).loss.backward()
        expected = {name: p.grad.clone() for name, p in model.named_parameters()}
        model.zero_grad()
        torch._dynamo.reset()
        torch.compile(model, fullgraph=True, backend="aot_eager")(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        close(parameter.grad, expected[name], atol=1e-4)


@pytest.mark.slow
def test_the_model_can_be_exported():
    model, ids = make_model(), make_ids(1, 16)
    exported = torch.export.export(model, (ids,), {"use_cache": False}, strict=False)
    close(exported.module()(ids, use_cache=False).logits, model(ids).logits)


# ---- on a GPU -----------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("implementation", ["sdpa", "flex_attention", "flash_attention_2", "flash_attention_3"])
def test_gpu_attention_implementations_honour_the_windows(generation, implementation):
    shape = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
    reference = make_model(generation, "eager", **shape).cuda().bfloat16()
    model = make_model(generation, **shape).cuda().bfloat16()
    try:
        model.set_attn_implementation(implementation)
    except (ImportError, ValueError, OSError) as error:
        pytest.skip(f"{implementation} is not installed: {error}")
    ids = make_ids(2, 60).cuda()
    masks = torch.ones_like(ids)
    masks[0, :9] = 0
    exact = randomize(make_model(generation, **shape)).cuda()
    for mask in (None, masks):
        real = slice(None) if mask is None else mask.bool()
        truth, wanted, got = (m(ids, attention_mask=mask).logits[real] for m in (exact, reference, model))
        assert (got - truth).abs().mean() < 1.5 * (wanted - truth).abs().mean()  # as near as eager in bfloat16


@pytest.mark.gpu
@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("cache", ["static", "offloaded", "offloaded_static"])
def test_gpu_generation_with_every_cache_equals_the_uncached(generation, cache):
    model, prompt = make_model(generation).cuda(), make_ids(2, 17).cuda()
    expected = torch.cat([uncached_greedy(model, row[None], 12) for row in prompt])
    assert greedy(model, prompt, 12, cache_implementation=cache).tolist() == expected.tolist()


# ---- training -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("generation", GENERATIONS)
def test_the_gradient_reaches_every_parameter(generation):
    model = make_model(generation, num_tokens=None, vocab_size=100).train()
    ids = torch.arange(100)[None].repeat(2, 1)
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_the_loss_is_the_shifted_cross_entropy_and_counts_items_as_told():
    model, ids = make_model(), make_ids(2, 12)
    labels = ids.clone()
    labels[0, :5] = -100
    out = model(ids, labels=labels)
    nll = cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    count = (labels[:, 1:] != -100).sum()
    close(out.loss, nll / count)
    close(model(ids, labels=labels, num_items_in_batch=50).loss, nll / 50)
    assert out.logits.shape == (2, 12, 100) and out.logits.dtype == torch.float32
    assert out.logits.abs().max() < 15


@pytest.mark.parametrize("generation", GENERATIONS)
def test_gradient_checkpointing_gives_the_same_gradients(generation):
    gradients = []
    for checkpointing in (False, True):
        model = make_model(generation).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(make_ids(2, 12), labels=make_ids(2, 12)).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        close(gradients[1][name], gradient)


def test_float32_masters_run_in_the_dtype_of_the_embeddings():
    model, ids = make_model(), make_ids(1, 12)
    reference = model(ids).logits
    model.model.embed_tokens.bfloat16()
    model.model.value_embeds.bfloat16()
    out = model.model(ids).last_hidden_state
    assert out.dtype == torch.bfloat16 and model.model.layers[0].mlp.fc1.weight.dtype == torch.float32
    assert model(ids).logits.dtype == torch.float32
    assert (model(ids).logits - reference).abs().mean() < 0.1


def test_fresh_weights_of_the_second_generation_have_the_stated_sizes():
    torch.manual_seed(0)
    model = NanoChatForCausalLM(make_config(hidden_size=256, num_attention_heads=4, vocab_size=1024))
    width = 256**-0.5
    stds = {
        "embed_tokens": 0.8,
        "lm_head": 0.001,
        "q_proj": width,
        "k_proj": width,
        "v_proj": width,
        "fc1": 0.4 * width,
    }
    stds["value_embeds"] = width
    for name, weight in model.named_parameters():
        for part, std in stds.items():
            if part in name:
                assert weight.std().item() == pytest.approx(std, rel=0.05), name
                if part not in ("embed_tokens", "lm_head"):  # uniform
                    assert weight.abs().max().item() == pytest.approx(3**0.5 * std, rel=0.02), name
        if "o_proj" in name or "fc2" in name or "smear_lambda" in name:
            assert not weight.any(), name
        if "gate" in name:
            assert weight.min() >= 0 and weight.max() <= 0.02 and weight.any(), name
    net = model.model
    close(net.resid_lambdas, torch.tensor([1.15, 1.125, 1.10, 1.075, 1.05]))
    close(net.x0_lambdas, torch.tensor([0.20, 0.1625, 0.125, 0.0875, 0.05]))
    assert net.backout_lambda.item() == pytest.approx(0.2)


def test_fresh_weights_of_the_first_generation_have_the_stated_sizes():
    torch.manual_seed(0)
    model = NanoChatForCausalLM(make_config(1, hidden_size=256, num_attention_heads=4, num_key_value_heads=1))
    attention = model.model.layers[0].self_attn
    assert model.model.embed_tokens.weight.std().item() == pytest.approx(1.0, rel=0.05)
    assert attention.q_proj.weight.std().item() == pytest.approx(256**-0.5, rel=0.05)
    assert attention.k_proj.weight.std().item() == pytest.approx(256**-0.5 * 0.5, rel=0.05)  # 64 outputs, 256 inputs
    assert not model.lm_head.weight.any() and not attention.o_proj.weight.any()


# ---- living in the ecosystem --------------------------------------------------------------------------------------


@pytest.mark.parametrize("generation", GENERATIONS)
def test_save_and_load_keep_every_logit(generation, tmp_path):
    model, ids = make_model(generation), make_ids(2, 20)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is NanoChatForCausalLM
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.model.rotary_emb.inv_freq.dtype == torch.float32
    assert (half(ids).logits - model(ids).logits).abs().mean() < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("generation", GENERATIONS)
def test_a_saved_folder_needs_no_package(generation, tmp_path):
    model, ids = make_model(generation), make_ids(1, 20)
    model.save_pretrained(tmp_path / "model")
    torch.save((ids, model(ids).logits, greedy(model, ids, 5)), tmp_path / "expected.pt")
    code = """
import sys, torch
from transformers import AutoModel, AutoModelForCausalLM
assert "nanochat_hf" not in sys.modules
ids, logits, generated = torch.load("expected.pt")
model = AutoModelForCausalLM.from_pretrained("model", trust_remote_code=True)
assert torch.equal(model(ids).logits, logits)
assert model.generate(ids, max_new_tokens=5, do_sample=False).tolist() == generated.tolist()
model.save_pretrained("again")
again = AutoModelForCausalLM.from_pretrained("again", trust_remote_code=True)
assert torch.equal(again(ids).logits, logits)
assert AutoModel.from_pretrained("model", trust_remote_code=True)(ids).last_hidden_state.shape == (1, 20, 32)
assert not any(name.split(".")[0] == "nanochat_hf" for name in sys.modules)
print("equal")
"""
    assert run_without_the_package(code, tmp_path) == "equal"


def run_without_the_package(code: str, folder) -> str:
    """The last line that `code` prints in a fresh process, in `folder`, which cannot import nanochat_hf."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(folder / "modules"), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-I", "-c", f"import os; os.chdir({str(folder)!r})\n{code}"],
        check=False,
        capture_output=True,
        text=True,
        env=environment,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout.strip().splitlines()[-1]


@pytest.mark.slow
def test_pipeline_and_lm_eval_work_on_a_saved_folder(tiny_model, tokenizer, tmp_path):
    randomize(tiny_model).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    context, continuation = tokenizer(" A cat is")["input_ids"][1:], tokenizer(" grey.")["input_ids"][1:]
    row = torch.tensor([context + continuation])
    logprobs = tiny_model(row).logits[0, len(context) - 1 : -1].log_softmax(-1)
    expected = logprobs.gather(1, row[0, len(context) :, None]).sum().item()
    code = f"""
from transformers import pipeline
chat = pipeline("text-generation", model="model", trust_remote_code=True, device="cpu")
answer = chat([{{"role": "user", "content": "Hello!"}}], max_new_tokens=4)[0]["generated_text"][-1]
assert answer["role"] == "assistant" and isinstance(answer["content"], str), answer
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
lm = HFLM(pretrained="model", trust_remote_code=True, device="cpu", dtype="float32", batch_size=1, add_bos_token=False)
request = Instance("loglikelihood", {{}}, (" A cat is", " grey."), 0)
[(value, greedy)] = lm.loglikelihood([request], disable_tqdm=True)
assert abs(value - {expected}) < 1e-3, (value, {expected})
print("equal")
"""
    assert run_without_the_package(code, tmp_path) == "equal"


def test_resizing_the_vocabulary_resizes_the_value_embeddings_too():
    model, ids = make_model(num_tokens=None), make_ids(1, 10)
    before = model(ids).logits
    model.resize_token_embeddings(140, mean_resizing=False)
    assert all(table.weight.shape[0] == 140 for table in model.model.value_embeds.values())
    assert model.config.vocab_size == 140
    close(model(ids).logits[..., :128], before)
    model(torch.full((1, 3), 139))  # a new token has a value embedding
    model.resize_token_embeddings(110, pad_to_multiple_of=64)
    assert model.config.vocab_size == 128


def test_resizing_moves_the_number_of_tokens_along():
    model = make_model()
    model.resize_token_embeddings(105, pad_to_multiple_of=64)
    assert (model.config.vocab_size, model.config.num_tokens) == (128, 105)
    assert model(make_ids(1, 4)).logits.shape[-1] == 105


def test_hidden_states_and_attentions_can_be_asked_for():
    model, ids = make_model(attn_implementation="eager"), make_ids(2, 9)
    out = model(ids, output_hidden_states=True, output_attentions=True)
    assert len(out.hidden_states) == 6 and len(out.attentions) == 5
    close(out.hidden_states[-1], model.model(ids).last_hidden_state)
    assert out.attentions[0].shape == (2, 4, 9, 9)
    assert out.attentions[0][0, 0, 8, :4].sum() == 0 and out.attentions[3][0, 0, 8, :4].sum() > 0  # window of 5
    assert isinstance(model(ids, return_dict=False), tuple)


def test_lora_trains_merges_and_reloads_without_gradient_of_the_base(tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    base, ids = make_model(), make_ids(2, 12)
    before = base(ids).logits.detach()
    model = get_peft_model(base, LoraConfig(r=4, task_type="CAUSAL_LM"))  # targets: the package's default
    adapted = {name.split(".")[-1] for name in model.targeted_module_names}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=5.0)
    for _ in range(3):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    tuned = model(input_ids=ids).logits.detach()
    assert (tuned - before).abs().max() > 0.01
    model.save_pretrained(tmp_path)
    close(PeftModel.from_pretrained(make_model(), tmp_path)(input_ids=ids).logits, tuned)
    close(model.merge_and_unload()(ids).logits, tuned)


def test_bad_input_is_refused_in_one_clear_line():
    model, ids = make_model(), make_ids(1, 8)
    with pytest.raises(ValueError, match="the value embeddings need them beside inputs_embeds"):
        model(inputs_embeds=model.get_input_embeddings()(ids))
    with pytest.raises(ValueError, match="pass input_ids"):
        model()
    with pytest.raises(ValueError, match=r"DynamicCache\(config=model.config\)"):
        model(ids, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match=r"passes position 640 \(10 x max_position_embeddings\)"):
        model(make_ids(1, 641))


def test_embeddings_can_be_given_beside_the_ids():
    for model in (make_model(1), make_model()):
        ids = make_ids(1, 8)
        embeds = model.get_input_embeddings()(ids)
        close(model(ids, inputs_embeds=embeds).logits, model(ids).logits)
    first = make_model(1)
    close(first(inputs_embeds=first.get_input_embeddings()(ids)).logits, first(ids).logits)


def test_logits_to_keep_cuts_from_the_end():
    model, ids = make_model(), make_ids(2, 9)
    close(model(ids, logits_to_keep=2).logits, model(ids).logits[:, -2:])
    close(model(ids, logits_to_keep=torch.tensor([1, 4])).logits, model(ids).logits[:, [1, 4]])


def test_tied_embeddings_are_one_tensor(tmp_path):
    model = make_model(1, tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    close(AutoModelForCausalLM.from_pretrained(tmp_path)(make_ids(1, 5)).logits, model(make_ids(1, 5)).logits)


def test_generation_defaults_are_saved_with_the_model(tmp_path):
    model = make_model()
    model.generation_config = GenerationConfig(eos_token_id=[3, 4], pad_token_id=0, do_sample=False)
    model.save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).generation_config.eos_token_id == [3, 4]
