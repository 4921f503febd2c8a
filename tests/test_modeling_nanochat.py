"""The forward pass: equal to transformers' own where it has one, to a plain reading of the definition, and trainable.

Cached generation is in test_model_cache.py, folders and libraries in test_model_folder.py, GPUs in test_model_gpu.py.
"""

import ast
import inspect
import textwrap

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from tiny import GENERATIONS, KINDS, close, logits_of, make_config, make_ids, make_model
from torch.nn.functional import cross_entropy
from transformers import AttentionInterface, DynamicCache, EncoderDecoderCache, StaticCache
from transformers import NanoChatConfig as NativeConfig
from transformers import NanoChatForCausalLM as NativeModel

from nanochat_hf.model import NanoChatForCausalLM, NanoChatModel


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
@pytest.mark.parametrize(
    ("implementation", "kinds"),
    [("sdpa", KINDS), pytest.param("flex_attention", ["plain", "padded"], marks=pytest.mark.slow)],  # it is compiled
)
def test_attention_implementations_agree(generation, implementation, kinds):
    torch._dynamo.reset()  # or shapes would become dynamic, which flex_attention does not survive on every CPU
    reference, model = make_model(generation, "eager"), make_model(generation, implementation)
    for kind in kinds:
        close(logits_of(model, kind), logits_of(reference, kind), atol=5e-5)


def test_a_registered_attention_gets_the_window_and_no_mask():
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


def test_logits_to_keep_cuts_from_the_end():
    model, ids = make_model(), make_ids(2, 9)
    close(model(ids, logits_to_keep=2).logits, model(ids).logits[:, -2:])
    close(model(ids, logits_to_keep=torch.tensor([1, 4])).logits, model(ids).logits[:, [1, 4]])


def test_embeddings_can_be_given_beside_the_ids():
    for model in (make_model(1), make_model()):
        ids = make_ids(1, 8)
        embeds = model.get_input_embeddings()(ids)
        close(model(ids, inputs_embeds=embeds).logits, model(ids).logits)
    first = make_model(1)
    close(first(inputs_embeds=first.get_input_embeddings()(ids)).logits, first(ids).logits)


def test_hidden_states_and_attentions_can_be_asked_for():
    model, ids = make_model(attn_implementation="eager"), make_ids(2, 9)
    out = model(ids, output_hidden_states=True, output_attentions=True)
    assert len(out.hidden_states) == 6 and len(out.attentions) == 5
    close(out.hidden_states[-1], model.model(ids).last_hidden_state)
    assert out.attentions[0].shape == (2, 4, 9, 9)
    assert out.attentions[0][0, 0, 8, :4].sum() == 0 and out.attentions[3][0, 0, 8, :4].sum() > 0  # window of 5
    assert isinstance(model(ids, return_dict=False), tuple)


def test_missing_ids_are_refused():
    model = make_model()
    with pytest.raises(ValueError, match="the value embeddings need them beside inputs_embeds"):
        model(inputs_embeds=model.get_input_embeddings()(make_ids(1, 8)))
    with pytest.raises(ValueError, match="pass input_ids: no input"):
        model()


@pytest.mark.parametrize(
    ("generation", "make"),
    [
        (2, DynamicCache),  # no place for the smear's state
        (2, lambda: DynamicCache(config=make_config(1))),
        (2, lambda: DynamicCache(config=make_config(num_hidden_layers=3))),
        (2, lambda: EncoderDecoderCache(DynamicCache(), DynamicCache())),
        (2, lambda: (torch.zeros(1), torch.zeros(1))),
        (1, lambda: StaticCache(config=make_config(2), max_cache_len=9)),  # it would forget what is past the window
        (1, lambda: DynamicCache(config=make_config(1, num_hidden_layers=3))),
    ],
)
def test_a_cache_of_the_wrong_kind_is_refused(generation, make):
    with pytest.raises(ValueError, match=r"not one of this model: create it as DynamicCache\(config=model.config\)"):
        make_model(generation)(make_ids(1, 8), past_key_values=make())


@pytest.mark.parametrize("generation", GENERATIONS)
def test_positions_past_the_range_of_rope_are_refused(generation):
    model, cache = make_model(generation), DynamicCache(config=make_config(generation))
    message = r"641 positions are too many, this model counts to 640 \(10 x max_position_embeddings\)"
    with pytest.raises(ValueError, match=message):
        model(make_ids(1, 641))
    model(make_ids(1, 640), past_key_values=cache)
    with pytest.raises(ValueError, match=message):
        model(make_ids(1, 1), past_key_values=cache)
    with pytest.raises(ValueError, match=message):
        model(make_ids(1, 1), past_key_values=StaticCache(config=model.config, max_cache_len=641))


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


@pytest.mark.slow
@pytest.mark.parametrize("generation", GENERATIONS)
def test_training_compiles_as_one_graph_with_equal_gradients(generation):
    model, ids = make_model(generation).train(), make_ids(2, 16)
    model(ids, labels=ids).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    torch._dynamo.reset()
    torch.compile(model, fullgraph=True, backend="aot_eager")(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        close(parameter.grad, expected[name], atol=1e-4)


def test_float32_masters_run_in_the_dtype_of_the_embeddings():
    model, ids = make_model(), make_ids(1, 12)
    reference = model(ids).logits
    model.model.embed_tokens.bfloat16()
    model.model.value_embeds.bfloat16()
    out = model.model(ids).last_hidden_state
    assert out.dtype == torch.bfloat16 and model.model.layers[0].mlp.fc1.weight.dtype == torch.float32
    assert model(ids).logits.dtype == torch.float32
    assert (model(ids).logits - reference).abs().mean() < 0.1


def test_angles_are_exact_in_bfloat16_at_late_positions():
    """In the dtype of x, position 1,499 would be 1,496 and its fastest angle off by three radians."""
    model, positions = make_model(max_position_embeddings=512).bfloat16(), torch.arange(1500)
    cos, sin = model.model.rotary_emb(torch.zeros(1, dtype=torch.bfloat16), positions[None])
    exponents = torch.arange(0, 8, 2, dtype=torch.float64) / 8
    angles = positions[:, None] * 100_000.0**-exponents
    close(cos[0, 0].double(), angles.cos(), atol=4e-3)  # half a step of bfloat16 below one
    close(sin[0, 0].double(), angles.sin(), atol=4e-3)


@pytest.mark.parametrize("generation", GENERATIONS)
def test_bfloat16_predicts_what_float32_predicts_over_1500_tokens(generation):
    model, ids = make_model(generation, max_position_embeddings=512), make_ids(1, 1500)
    with torch.no_grad():
        expected = model(ids).logits[0].argmax(-1)
        found = model.bfloat16()(ids).logits[0].argmax(-1)
    agreement = (found == expected).float()
    assert agreement[-500:].mean() > agreement[:500].mean() - 0.05 and agreement.mean() > 0.85


@pytest.mark.parametrize("generation", GENERATIONS)
def test_the_softmax_scale_can_be_read_off_the_source(generation):
    """vLLM's Transformers backend (0.32, fusers/attention.py) parses the attention's forward.

    It looks for the one call of what `ALL_ATTENTION_FUNCTIONS` returned, and takes `scaling=self.NAME` of it; without
    that keyword it computes with 1 / sqrt(head_dim), and `qk_scale` is lost without a word.
    """
    attention = make_model(generation).model.layers[0].self_attn
    tree = ast.parse(textwrap.dedent(inspect.getsource(type(attention).forward)))
    [name] = [
        node.targets[0].id for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and ast.unparse(node.value).startswith("ALL_ATTENTION_FUNCTIONS")
    ]  # fmt: skip
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == name]
    [scaling] = [keyword.value for call in calls for keyword in call.keywords if keyword.arg == "scaling"]
    assert len(calls) == 1 and ast.unparse(scaling) == "self.scaling"
    assert attention.scaling == pytest.approx((1.2**2 if generation == 2 else 1.0) / 8**0.5)


def test_fresh_weights_of_the_second_generation_have_the_stated_sizes():
    torch.manual_seed(0)
    model = NanoChatForCausalLM(make_config(hidden_size=256, num_attention_heads=4, vocab_size=1024))
    width = 256**-0.5
    uniform = {"q_proj": width, "k_proj": width, "v_proj": width, "fc1": 0.4 * width, "value_embeds": width}
    for name, weight in model.named_parameters():
        for part, std in {**uniform, "embed_tokens": 0.8, "lm_head": 0.001}.items():
            if part in name:
                assert weight.std().item() == pytest.approx(std, rel=0.05), name
                if part in uniform:
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


@pytest.mark.parametrize("first", [0, 1, 2])
def test_the_later_blocks_may_lie_on_another_device(first):
    """The other device is `meta`, which has no numbers but refuses to mix as a second GPU does."""
    model = make_model(num_hidden_layers=3)
    for module in (*model.model.layers[first:], model.lm_head):
        add_hook_to_module(module.to("meta"), AlignDevicesHook(execution_device="meta"))
    assert model(make_ids(1, 5)).logits.device.type == "meta"
