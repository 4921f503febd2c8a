"""The config, and the forward pass: equal to transformers' own, to a plain reading of the definition, and trainable.

Cached generation is in test_model_cache.py, folders and libraries in test_model_folder.py, GPUs in test_model_gpu.py.
"""

import inspect
import json
import math
import re

import pytest
import torch
import torch.nn.functional as F
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from tiny import GENERATIONS, KINDS, close, logits_of, make_config, make_ids, make_model
from transformers import AttentionInterface, AutoConfig, DynamicCache, EncoderDecoderCache, StaticCache
from transformers import NanoChatConfig as NativeConfig
from transformers import NanoChatForCausalLM as NativeModel
from transformers.testing_utils import CaptureLogger

from nanochat_hf.model import NanoChatConfig, NanoChatForCausalLM, NanoChatModel, configuration_nanochat

S, FULL = "sliding_attention", "full_attention"
DERIVED = {"intermediate_size": 384, "num_key_value_heads": 3, "head_dim": 32}
FIRST = {"generation": 1, "layer_types": [FULL] * 3, "sliding_window": None, "qk_scale": 1}
ROPE = {"rope_type": "default", "rope_theta": 1e5}
FIRST |= {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (NanoChatConfig(num_hidden_layers=6), {"layer_types": [S, S, S, FULL, S, "hybrid"], "generation": 2}),
        (NanoChatConfig(num_hidden_layers=6, smear=False), {"layer_types": [S, S, S, FULL, S, FULL]}),
        # a quarter of the context, rounded up to a multiple of 128, and the token itself
        (NanoChatConfig(), {"sliding_window": 513, "rope_parameters": {"rope_theta": 1e5, "rope_type": "default"}}),
        (NanoChatConfig(max_position_embeddings=1100), {"sliding_window": 385}),
        (NanoChatConfig(num_hidden_layers=5), {"value_embed_layers": [0, 2, 4]}),
        (NanoChatConfig(num_hidden_layers=4), {"value_embed_layers": [1, 3]}),
        (NanoChatConfig(value_embeds=False), {"value_embed_layers": [], "rms_norm_eps": torch.finfo().eps}),
        (NanoChatConfig(hidden_size=96, num_attention_heads=3), DERIVED),
        (NanoChatConfig(hidden_size=100, num_attention_heads=3, head_dim=16), {"head_dim": 16}),
        *((NanoChatConfig(**{switch: False}), {"generation": 2}) for switch in configuration_nanochat.SWITCHES),
        (NanoChatConfig.first_generation(num_hidden_layers=3), FIRST),
    ],
)
def test_fields_are_derived_and_survive_saving(config, expected, tmp_path):
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is NanoChatConfig and loaded.to_dict() | {"_name_or_path": ""} == config.to_dict()
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 100, "num_attention_heads": 3}, "not divisible by num_attention_heads 3"),
        ({"num_attention_heads": 6, "num_key_value_heads": 4}, "not divisible by num_key_value_heads 4"),
        ({"hidden_size": 66, "num_attention_heads": 2}, "head_dim is 33: RoPE rotates pairs"),
        ({"window_pattern": "SXL"}, "window_pattern 'SXL': write a word of the letters S"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_tokens": 40000}, "num_tokens 40000 must lie between 1 and vocab_size 32768"),
        ({"layer_types": ["full_attention"] * 12}, "layer_types .* do not follow from window_pattern 'SSSL'"),
        ({"n_layer": 4, "n_embd": 64}, r"upstream's names: n_layer \(write num_hidden_layers\), n_embd"),
        ({"sliding_window": 1}, "sliding_window is 1"),
        ({"head_dim": -2}, "head_dim is -2"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 0}},
            "rope_theta is 0: write a number from 1 to 1e",
        ),
        ({"rope_parameters": {"rope_type": "yarm", "rope_theta": 1}}, "rope_type is 'yarm': write one of default"),
        ({"rope_parameters": {"rope_type": 5, "rope_theta": 1e5}}, "rope_type is 5: write one of"),
        ({"qk_scale": float("nan")}, "qk_scale is nan: write a number from"),
        ({"final_logit_softcapping": float("inf")}, "final_logit_softcapping is inf: write a number"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps is -1.0: write a number from"),
        *(
            ({"rope_parameters": ROPE | {name: value}}, rf"{name} is .*: write a number from")
            for name, value in (
                ("factor", 0),
                ("factor", math.nan),
                ("factor", "a"),
                ("rope_theta", True),
                ("partial_rotary_factor", 0.5),
                ("long_factor", [1, -1]),
                ("beta_fast", math.inf),
                ("rope_theta", [1e5]),
            )
        ),
        *(
            ({name: value}, f"{name} is {value}: write a number from")
            for name, value in (
                ("final_logit_softcapping", 1e-30),
                ("qk_scale", 1e-30),
                ("rms_norm_eps", 1e8),
                ("attention_dropout", -1),
                ("attention_dropout", math.nan),
                ("vocab_size", 2**63),
                ("intermediate_size", 0),
                ("head_dim", 0),
                ("num_key_value_heads", -1),
            )
        ),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is true: the head has weights of its own"),
        ({"final_logit_softcapping": 0}, "final_logit_softcapping is 0: write null to turn it off"),
        ({"hidden_size": 16, "num_attention_heads": 2}, "the smear needs hidden_size >= 24"),
        ({"hidden_size": 8, "num_attention_heads": 2, "smear": False}, "value embeddings need hidden_size >= 12"),
    ],
)
def test_a_wrong_field_is_named(fields, message):
    with pytest.raises(Exception, match=message):
        NanoChatConfig(**fields)


@pytest.mark.parametrize(
    ("name", "left"),
    [
        *((name, {}) for name in ("hidden_size", "qk_scale", "window_pattern", "rope_parameters", "smear")),
        *(("rope_parameters", {"rope_parameters": empty}) for empty in (None, {}, {"rope_type": "default"})),
    ],
)
def test_a_config_file_that_lacks_a_field_is_refused(name, left, tmp_path):
    NanoChatConfig().save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    value = fields.pop(name)
    (tmp_path / "config.json").write_text(json.dumps(fields | left))
    with pytest.raises(ValueError, match=rf"the config lacks {name}(\.rope_theta)?: write the values of the tr"):
        AutoConfig.from_pretrained(tmp_path)
    assert getattr(AutoConfig.from_pretrained(tmp_path, **{name: value}), name) == value


@pytest.mark.parametrize("field,values", {
    "rope_parameters": ["x", [1], -1, True], "architectures": [5, "x"], "quantization_config": [5, [1]],
    "id2label": [5], "auto_map": ["x"], "num_labels": ["x"], "_attn_implementation": [5], "return_dict": [False, "x"],
    "output_hidden_states": ["x"], "output_attentions": [2], "dtype": ["x", 5, "int8", ["float32"]],
    "factor": [{"rope_type": kind, "rope_theta": 1e4} for kind in ("yarn", "dynamic", "llama3", "longrope")],
}.items())  # fmt: skip
def test_a_config_file_with_a_value_of_a_wrong_kind_is_refused_by_its_name(field, values, tmp_path):
    NanoChatConfig().save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    for value in values:
        changed = {"rope_parameters" if field == "factor" else field: value}
        (tmp_path / "config.json").write_text(json.dumps(fields | changed))
        with pytest.raises(ValueError, match=field):
            AutoConfig.from_pretrained(tmp_path)


def test_a_config_with_old_class_names_loads_with_todays_and_one_line_says_how_to_renew_its_folder(tmp_path):
    NanoChatConfig(architectures=["NanoChatHFForCausalLM"]).save_pretrained(tmp_path)
    path, logger = tmp_path / "config.json", configuration_nanochat.logger
    today = path.read_text()
    remote = today.replace("modeling_nanochat.NanoChatHF", "u/m--m.NanoChat")
    for text in (today, today.replace("NanoChatHF", "NanoChat"), remote):
        path.write_text(text)
        logger.warning_once.cache_clear()
        with CaptureLogger(logger) as log:
            config = AutoConfig.from_pretrained(tmp_path)
        assert config.architectures == ["NanoChatHFForCausalLM"]
        assert config.auto_map == json.loads(today)["auto_map"]
        assert log.out.count("\n") == (text != today)
        assert text == today or log.out.endswith(f"--source {tmp_path} --output {tmp_path}\n")
        # transformers asks for trust_remote_code where a config names a pipeline, and with the package none is needed
        assert not hasattr(config, "custom_pipelines")
        config.save_pretrained(tmp_path / "again")
        saved = json.loads((tmp_path / "again" / "config.json").read_text())["custom_pipelines"]
        assert saved["text-generation"]["impl"].startswith("generation_nanochat.")


# ---- forward ------------------------------------------------------------------------------------------------------


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
    head_dim = config.head_dim

    def norm(x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps)

    def rotate(x, position):  # (H, D) at one position, by -theta
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
        q, k, v = ((h @ weights[f"{name}self_attn.{p}_proj.weight"].T).unflatten(-1, (-1, head_dim)) for p in "qkv")
        if i % 2 == 0:  # five layers: the last is 4, so 0, 2 and 4 have value embeddings
            gates = 3 * torch.sigmoid(h[:, :12] @ weights[f"{name}self_attn.ve_gate.weight"].T)
            v = v + gates[..., None] * weights[f"model.value_embeds.{i}.weight"][ids[0]].unflatten(-1, (-1, head_dim))
        q = torch.stack([1.2 * norm(rotate(q[t], t)) for t in range(23)])
        k = torch.stack([1.2 * norm(rotate(k[t], t)) for t in range(23)])
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
    for sides in ((7, 0), (0, 7)):
        row, real = F.pad(short, sides), F.pad(torch.ones_like(short), sides)
        logits = model(torch.cat([row, long]), attention_mask=torch.cat([real, torch.ones_like(long)])).logits
        close(logits[0][real[0].bool()], model(short).logits[0])
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


def test_attention_drops_weights_in_training_alone():
    model, ids = make_model(attention_dropout=0.5), make_ids(1, 12)
    close(model(ids).logits, make_model()(ids).logits)
    assert (model.train()(ids).logits - model.eval()(ids).logits).abs().max() > 0.01


def test_a_registered_attention_gets_the_window_and_no_mask():
    calls = []

    def spy(module, query, key, value, attention_mask, scaling, dropout=0.0, sliding_window=None, **kwargs):
        calls.append((attention_mask, sliding_window, scaling))
        return query.transpose(1, 2), None

    AttentionInterface.register("spy_attention", spy)
    make_model(attn_implementation="spy_attention")(make_ids(1, 8))
    make_model(attn_implementation="flex_attention")  # is not refused
    scale = pytest.approx(1.2 * 1.2 / 8**0.5)
    assert calls == [(None, window, scale) for window in (5, 5, 5, None, None)]


def test_plain_training_builds_no_mask_for_full_layers_and_prepared_masks_are_used():
    model, ids = make_model(), make_ids(2, 20)
    embeds = torch.empty(2, 20, 0)
    masks = NanoChatModel.create_masks_for_generate(model.config, embeds, None)
    assert masks["full_attention"] is None and masks["padding"] is None
    assert masks["sliding_attention"].shape[-2:] == (20, 20)
    assert NanoChatModel.create_masks_for_generate(model.config, embeds[:, :5], None)["sliding_attention"] is None
    close(model(ids, attention_mask=masks).logits, model(ids).logits)


def test_optional_inputs_and_outputs():
    model, first, ids = make_model(attn_implementation="eager"), make_model(1), make_ids(2, 9)
    logits, out = model(ids).logits, model(ids, output_hidden_states=True, output_attentions=True)
    close(model(ids, logits_to_keep=2).logits, logits[:, -2:])
    close(model(ids, logits_to_keep=torch.tensor([1, 4])).logits, logits[:, [1, 4]])
    close(model(ids, inputs_embeds=model.get_input_embeddings()(ids)).logits, logits)
    close(first(inputs_embeds=first.get_input_embeddings()(ids)).logits, first(ids).logits)
    assert len(out.hidden_states) == 6 and len(out.attentions) == 5
    close(out.hidden_states[-1], model.model(ids).last_hidden_state)
    assert out.attentions[0].shape == (2, 4, 9, 9)
    assert out.attentions[0][0, 0, 8, :4].sum() == 0 and out.attentions[3][0, 0, 8, :4].sum() > 0  # window of 5
    assert isinstance(model(ids, return_dict=False), tuple)
    assert model(ids).past_key_values is not None and model.train()(ids).past_key_values is None


FOREIGN, TOO_LONG = "not one of this model: create it as DynamicCache", "641 positions are too many, .* counts to 640"


@pytest.mark.parametrize(
    ("generation", "inputs", "message"),
    [
        (2, lambda: {"inputs_embeds": torch.zeros(1, 8, 32)}, "the value embeddings need them beside inputs_embeds"),
        (2, dict, "pass input_ids: no input"),
        (1, lambda: {"input_ids": make_ids(1, 641)}, TOO_LONG),
        (2, lambda: StaticCache(config=make_config(2), max_cache_len=641), TOO_LONG),
        (2, DynamicCache, FOREIGN),  # no place for the smear's state
        (2, lambda: DynamicCache(config=make_config(1)), FOREIGN),
        (2, lambda: DynamicCache(config=make_config(num_hidden_layers=3)), FOREIGN),
        (2, lambda: EncoderDecoderCache(DynamicCache(), DynamicCache()), FOREIGN),
        (2, lambda: (torch.zeros(1), torch.zeros(1)), FOREIGN),
        (1, lambda: StaticCache(config=make_config(2), max_cache_len=9), FOREIGN),  # it would drop keys
        (1, lambda: DynamicCache(config=make_config(1, num_hidden_layers=3)), FOREIGN),
    ],
)
def test_wrong_inputs_are_refused_in_one_line(generation, inputs, message):
    inputs = inputs()
    if not isinstance(inputs, dict):
        inputs = {"input_ids": make_ids(1, 8), "past_key_values": inputs}
    with pytest.raises(ValueError, match=message):
        make_model(generation)(**inputs)


def test_positions_up_to_the_range_of_rope_are_accepted_and_no_more_with_a_cache():
    model, cache = make_model(), DynamicCache(config=make_config())
    model(make_ids(1, 640), past_key_values=cache)
    with pytest.raises(ValueError, match=TOO_LONG):
        model(make_ids(1, 1), past_key_values=cache)


# ---- training -----------------------------------------------------------------------------------------------------


def gradients(model, ids, **options) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(ids, labels=ids, **options).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("generation", GENERATIONS)
def test_the_gradient_reaches_every_parameter_and_checkpointing_gives_the_same(generation):
    model = make_model(generation, num_tokens=None, vocab_size=100).train()
    ids = torch.arange(100)[None].repeat(2, 1)
    expected = gradients(model, ids)
    assert expected.keys() == dict(model.named_parameters()).keys() and all(g.any() for g in expected.values())
    model.gradient_checkpointing_enable()
    for name, gradient in gradients(model, ids, use_cache=True).items():  # recomputing must not append keys twice
        close(gradient, expected[name])


def test_the_loss_is_the_shifted_cross_entropy_over_the_given_number_of_items():
    model, ids = make_model(), make_ids(2, 12)
    labels = ids.clone()
    labels[0, :5] = -100
    out = model(ids, labels=labels)
    nll = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    close(out.loss, nll / (labels[:, 1:] != -100).sum())
    close(model(ids, labels=labels, num_items_in_batch=50).loss, nll / 50)
    assert out.logits.shape == (2, 12, 100) and out.logits.dtype == torch.float32 and out.logits.abs().max() < 15


@pytest.mark.parametrize("generation", GENERATIONS)
def test_bfloat16_predicts_what_float32_predicts_over_1500_tokens(generation):
    """With angles in bfloat16, position 1,499 would be 1,496 and its fastest angle off by three radians."""
    model, ids = make_model(generation, max_position_embeddings=512), make_ids(1, 1500)
    with torch.no_grad():
        agreement = (model(ids).logits[0].argmax(-1) == model.bfloat16()(ids).logits[0].argmax(-1)).float()
    assert agreement[-500:].mean() > agreement[:500].mean() - 0.05 and agreement.mean() > 0.85
    cos, sin = model.model.rotary_emb(torch.zeros(1, dtype=torch.bfloat16), torch.arange(1500)[None])
    theta = 100_000.0 if generation == 2 else 10_000.0
    angles = torch.arange(1500)[:, None] * theta ** -(torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    close(cos[0, 0].double(), angles.cos(), atol=4e-3)  # half a step of bfloat16 below one
    close(sin[0, 0].double(), angles.sin(), atol=4e-3)


@pytest.mark.parametrize("generation", GENERATIONS)
def test_the_softmax_scale_can_be_read_off_the_source(generation):
    """vLLM's Transformers backend (0.32, fusers/attention.py) parses the attention's forward.

    It looks for the one call of what `ALL_ATTENTION_FUNCTIONS` returned, and takes `scaling=self.NAME` of it; without
    that keyword it computes with 1 / sqrt(head_dim), and `qk_scale` is lost without a word.
    """
    attention = make_model(generation).model.layers[0].self_attn
    source = inspect.getsource(type(attention).forward)
    [name] = re.findall(r"(\w+) = ALL_ATTENTION_FUNCTIONS", source)
    [call] = re.findall(rf"(?<!def ){name}\(([^()]*)\)", source)
    assert " scaling=self.scaling," in call
    assert attention.scaling == pytest.approx((1.2**2 if generation == 2 else 1.0) / 8**0.5)


WIDTH = 256**-0.5
FRESH = {  # part of a parameter's name: standard deviation of fresh weights of width 256, by generation
    1: {"embed_tokens": 1.0, "q_proj": WIDTH, "k_proj": WIDTH / 2, "fc1": WIDTH, "lm_head": 0.0},  # k: 64 outputs
    2: dict.fromkeys(("q_proj", "k_proj", "v_proj", "value_embeds"), WIDTH)
    | {"fc1": 0.4 * WIDTH, "embed_tokens": 0.8, "lm_head": 0.001, "smear_lambda": 0.0},
}


@pytest.mark.parametrize("generation", GENERATIONS)
def test_fresh_weights_have_the_stated_sizes(generation):
    torch.manual_seed(0)
    shape = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4 if generation == 2 else 1}
    model = NanoChatForCausalLM(make_config(generation, **shape, vocab_size=1024))
    for name, weight in model.named_parameters():
        for part, std in {**FRESH[generation], "o_proj": 0.0, "fc2": 0.0}.items():
            if part in name:
                assert weight.square().mean().sqrt().item() == pytest.approx(std, rel=0.05), name
                if generation == 2 and std in (WIDTH, 0.4 * WIDTH):  # uniform
                    assert weight.abs().max().item() == pytest.approx(3**0.5 * std, rel=0.02), name
        if "gate" in name:
            assert weight.min() >= 0 and weight.max() <= 0.02 and weight.any(), name
    if generation == 2:
        close(model.model.resid_lambdas, torch.tensor([1.15, 1.125, 1.10, 1.075, 1.05]))
        close(model.model.x0_lambdas, torch.tensor([0.20, 0.1625, 0.125, 0.0875, 0.05]))
        close(model.model.backout_lambda, torch.tensor([0.2]))


@pytest.mark.parametrize("first", [0, 1, 2])
def test_the_later_blocks_may_lie_on_another_device(first):
    """The other device is `meta`, which has no numbers but refuses to mix as a second GPU does."""
    model = make_model(num_hidden_layers=3)
    for module in (*model.model.layers[first:], model.lm_head):
        add_hook_to_module(module.to("meta"), AlignDevicesHook(execution_device="meta"))
    assert model(make_ids(1, 5)).logits.device.type == "meta"


def test_a_sequence_of_one_token_more_than_the_window_needs_the_mask():
    ids = make_ids(1, 6)  # the windows have five keys
    close(make_model()(ids).logits, make_model(attn_implementation="eager")(ids).logits)
