"""The keys of base.yaml: their names, and that each says what it means."""

import dataclasses
from pathlib import Path

import pytest

from nanochat_hf.config import parse_config
from nanochat_hf.train import pretrain_config

KEYS = (
    "depth generation aspect_ratio head_dim max_seq_len window_pattern num_iterations target_flops "
    "target_param_data_ratio device_batch_size total_batch_size embedding_lr unembedding_lr matrix_lr scalar_lr "
    "weight_decay warmup_steps warmdown_ratio final_lr_frac eval_every eval_tokens core_metric_every "
    "core_metric_max_per_task sample_every save_every keep_checkpoints save_optimizer push_every fp8 dataset "
    "skip_bad_files seed compile attn_implementation max_loss_spike log_every report_to"
)


def test_the_keys_are_those_of_the_design_and_each_says_what_it_means():
    names = [field.name for field in dataclasses.fields(pretrain_config.PretrainConfig)]
    assert " ".join(names) == KEYS
    source = Path(pretrain_config.__file__).read_text()
    for name in names:
        assert f"\n    {name}: " in source and '\n    """' in source.split(f"\n    {name}: ")[1][:90]


def test_what_the_plan_is_made_of_are_keys():
    names = {field.name for field in dataclasses.fields(pretrain_config.PretrainConfig)}
    assert set(pretrain_config.SHAPE_KEYS) < set(pretrain_config.PLAN_KEYS) < names


@pytest.mark.parametrize(
    "yaml, flag, value",
    [
        ("true", None, True),
        ("false", None, False),
        ("auto", None, "auto"),
        ("auto", "false", False),
        ("false", "true", True),
        ("true", "auto", "auto"),
    ],
)
def test_fp8_is_a_switch_or_auto_in_yaml_and_as_a_flag(tmp_path, yaml, flag, value):
    (tmp_path / "base.yaml").write_text(f"fp8: {yaml}")
    config = parse_config(pretrain_config.PretrainConfig, tmp_path / "base.yaml", {"fp8": flag} if flag else None)
    assert config.fp8 is value or config.fp8 == value == "auto"
