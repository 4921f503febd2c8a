"""transformers' own tests of causal language models and of generation, run on our classes of both generations.

They are in the library's repository and not in the installed package (a source distribution has the top-level part,
the generation mixin is in the repository only), so this needs a checkout of about the installed version:

    TRANSFORMERS_TESTS=/path/to/transformers pytest -o addopts= tests/test_transformers_suite.py -m slow -n 2

(`addopts=` because the library has markers of its own; RUN_SLOW=1 adds what it calls slow, export for one.)

Fresh weights leave half of this model zero, and a test that compares two ways to the same output would see nothing.
So all weights are random here. What cannot apply is skipped by name, with the reason. The suite itself skips what a
model does not have: pipelines of images and sound, heads for classification, experts, plans for tensor and expert
parallelism, parts with configs of their own, weights to convert or to keep in float32, partial and axial RoPE; and
what a machine does not have: accelerators, flash attention, other libraries.
"""

import importlib.util
import os
import sys
import unittest
from pathlib import Path

import pytest
import torch
from transformers import initialization as init

from nanochat_hf.model import NanoChatConfig, NanoChatForCausalLM, NanoChatModel, NanoChatPreTrainedModel
from nanochat_hf.model.modeling_nanochat import NanoChatRotaryEmbedding

FOLDER = os.environ.get("TRANSFORMERS_TESTS")
needed = ("parameterized",)
if not FOLDER or not Path(FOLDER, "tests", "causal_lm_tester.py").exists():
    pytest.skip("set TRANSFORMERS_TESTS to a folder with transformers' tests/", allow_module_level=True)
if any(importlib.util.find_spec(name) is None for name in needed):
    pytest.skip(f"transformers' tests need {', '.join(needed)}", allow_module_level=True)
sys.path.insert(0, FOLDER)

from tests.causal_lm_tester import CausalLMModelTest, CausalLMModelTester  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

NEEDS_IDS = "value embeddings are looked up by token id, so embeddings alone are refused"
NOT_APPLICABLE = {
    "test_inputs_embeds": NEEDS_IDS,
    "test_inputs_embeds_matches_input_ids": NEEDS_IDS,
    "test_generate_from_inputs_embeds_0_greedy": NEEDS_IDS,
    "test_generate_from_inputs_embeds_1_beam_search": NEEDS_IDS,
    "test_generate_from_inputs_embeds_with_static_cache": NEEDS_IDS,
    "test_generate_from_random_inputs_embeds": NEEDS_IDS,
    "test_generate_continue_from_inputs_embeds": NEEDS_IDS,
}


@pytest.fixture(autouse=True)
def random_weights_and_rope_tables_without_the_axis_of_heads(monkeypatch):
    init_weights, angles = NanoChatPreTrainedModel._init_weights, NanoChatRotaryEmbedding.forward

    def init_randomly(self, module):
        init_weights(self, module)
        for parameter in module.parameters(recurse=False):
            init.normal_(parameter, std=0.5 if parameter.ndim == 1 else 0.05)

    monkeypatch.setattr(NanoChatPreTrainedModel, "_init_weights", init_randomly)
    if os.environ.get("PYTEST_CURRENT_TEST", "").find("rope_scaling_frequencies") >= 0:
        # That test slices the tables along axis 1; ours have the heads there, so that layers need not insert them.
        monkeypatch.setattr(NanoChatRotaryEmbedding, "forward", lambda *args: [t[:, 0] for t in angles(*args)])


class SecondTester(CausalLMModelTester):
    config_class = NanoChatConfig
    base_model_class = NanoChatModel
    causal_lm_class = NanoChatForCausalLM

    def prepare_config_and_inputs_for_common(self):
        config, inputs = super().prepare_config_and_inputs_for_common()
        inputs["attention_mask"] = inputs["attention_mask"].flip(1)  # padded to the left, as generation needs it
        return config, inputs


class FirstTester(SecondTester):
    def get_config(self):
        made = super().get_config()
        names = ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"]
        names += ["intermediate_size", "max_position_embeddings", "pad_token_id", "bos_token_id", "eos_token_id"]
        return NanoChatConfig.first_generation(**{name: getattr(made, name) for name in names})


class TestFirstGeneration(CausalLMModelTest, unittest.TestCase):
    model_tester_class = FirstTester


class TestSecondGeneration(CausalLMModelTest, unittest.TestCase):
    model_tester_class = SecondTester

    def _get_conv_state_shape(self, batch_size, config):
        return batch_size, config.hidden_size, 1  # the one embedding that the smear keeps


for name, reason in NOT_APPLICABLE.items():
    if hasattr(TestSecondGeneration, name):
        setattr(TestSecondGeneration, name, unittest.skip(reason)(getattr(TestSecondGeneration, name)))
del CausalLMModelTest  # or pytest would collect it on its own


def test_the_random_weights_are_not_zero():
    model = NanoChatForCausalLM(
        NanoChatConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    )
    assert all(torch.count_nonzero(p) for p in model.parameters())
