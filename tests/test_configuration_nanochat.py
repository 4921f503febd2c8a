"""NanoChatConfig: derived fields, both generations, and one clear line for each wrong field."""

import json

import pytest
from transformers import AutoConfig
from transformers.testing_utils import CaptureLogger

from nanochat_hf.model import NanoChatConfig, configuration_nanochat


def test_windows_follow_the_pattern_and_the_last_layer_sees_everything():
    config = NanoChatConfig(num_hidden_layers=6)
    s, full = "sliding_attention", "full_attention"
    assert config.layer_types == [s, s, s, full, s, "hybrid"]
    assert config.sliding_window == 513  # 512 neighbours to the left, a quarter of 2048, and the token itself
    assert NanoChatConfig(num_hidden_layers=6, smear=False).layer_types == [s, s, s, full, s, full]
    assert NanoChatConfig(max_position_embeddings=1100).sliding_window == 385  # 275 rounded up to a multiple of 128


def test_value_embeddings_alternate_and_include_the_last_layer():
    assert NanoChatConfig(num_hidden_layers=5).value_embed_layers == [0, 2, 4]
    assert NanoChatConfig(num_hidden_layers=4).value_embed_layers == [1, 3]
    assert NanoChatConfig(num_hidden_layers=4, value_embeds=False).value_embed_layers == []


def test_the_first_generation_has_every_feature_off():
    config = NanoChatConfig.first_generation(num_hidden_layers=3)
    assert config.generation == 1 and config.layer_types == ["full_attention"] * 3 and config.sliding_window is None
    assert config.qk_scale == 1 and config.rope_parameters["rope_theta"] == 10_000
    assert NanoChatConfig().generation == 2 and NanoChatConfig().rope_parameters["rope_theta"] == 100_000


def test_shapes_are_derived_where_they_are_left_out():
    config = NanoChatConfig(hidden_size=96, num_attention_heads=3)
    assert (config.intermediate_size, config.num_key_value_heads, config.head_dim) == (384, 3, 32)
    assert NanoChatConfig(hidden_size=96, num_attention_heads=2, head_dim=16).head_dim == 16


@pytest.mark.parametrize("config", [NanoChatConfig(num_tokens=32000), NanoChatConfig.first_generation()])
def test_a_saved_config_loads_as_it_was(config, tmp_path):
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is NanoChatConfig
    assert loaded.to_dict() | {"_name_or_path": ""} == config.to_dict()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 100, "num_attention_heads": 3}, "not divisible by num_attention_heads 3"),
        ({"num_attention_heads": 6, "num_key_value_heads": 4}, "not divisible by num_key_value_heads 4"),
        ({"hidden_size": 66, "num_attention_heads": 2}, "head_dim is 33: RoPE rotates pairs"),
        ({"head_dim": 7}, "head_dim is 7: RoPE rotates pairs"),
        ({"window_pattern": "SXL"}, "window_pattern 'SXL': write a word of the letters S"),
        ({"window_pattern": ""}, "window_pattern ''"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_tokens": 40000}, "num_tokens 40000 must lie between 1 and vocab_size 32768"),
        ({"layer_types": ["full_attention"] * 12}, "layer_types .* do not follow from window_pattern 'SSSL'"),
        ({"n_layer": 4, "n_embd": 64}, r"upstream's names: n_layer \(write num_hidden_layers\), n_embd"),
        ({"sliding_window": 0}, "sliding_window is 0"),
        ({"hidden_size": 16, "num_attention_heads": 2}, "the smear needs hidden_size >= 24"),
        ({"hidden_size": 8, "num_attention_heads": 2, "smear": False}, "value embeddings need hidden_size >= 12"),
    ],
)
def test_a_wrong_field_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        NanoChatConfig(**fields)


def test_a_field_of_the_wrong_type_is_named():
    with pytest.raises(Exception, match="window_pattern"):
        NanoChatConfig(window_pattern=3)


@pytest.mark.parametrize("name", ["hidden_size", "num_hidden_layers", "window_pattern", "rope_parameters", "smear"])
def test_a_config_file_that_lacks_a_field_is_refused(name, tmp_path):
    NanoChatConfig().save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    value = fields.pop(name)
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=f"the config lacks {name}: write the values of the trained model"):
        AutoConfig.from_pretrained(tmp_path)
    assert getattr(AutoConfig.from_pretrained(tmp_path, **{name: value}), name) == value


def test_a_config_under_the_old_class_names_loads_with_todays_and_says_how_to_renew_its_folder(tmp_path):
    NanoChatConfig(architectures=["NanoChatHFForCausalLM"]).save_pretrained(tmp_path)
    path, logger = tmp_path / "config.json", configuration_nanochat.logger
    today = path.read_text()
    logger.warning_once.cache_clear()
    with CaptureLogger(logger) as log:
        AutoConfig.from_pretrained(tmp_path)
    assert log.out == "" and "HF" in today
    for old in (
        today.replace("NanoChatHF", "NanoChat"),
        today.replace("modeling_nanochat.NanoChatHF", "u/m--m.NanoChat"),
    ):
        path.write_text(old)
        logger.warning_once.cache_clear()
        with CaptureLogger(logger) as log:
            config = AutoConfig.from_pretrained(tmp_path)
        assert config.architectures == ["NanoChatHFForCausalLM"]
        assert config.auto_map == json.loads(today)["auto_map"]
        assert log.out.endswith(f"convert_checkpoint.py --source {tmp_path} --output {tmp_path}\n")
        assert log.out.count("\n") == 1


def test_the_pipeline_of_a_folder_is_for_those_without_the_package(tmp_path):
    """transformers asks for trust_remote_code wherever a config names a pipeline; here none is needed."""
    config = NanoChatConfig()
    for _ in range(2):
        config.save_pretrained(tmp_path)
        saved = json.loads((tmp_path / "config.json").read_text())["custom_pipelines"]
        assert saved["text-generation"]["impl"].startswith("generation_nanochat.")
        config = AutoConfig.from_pretrained(tmp_path)
        assert not hasattr(config, "custom_pipelines")
