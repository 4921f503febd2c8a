"""transformers' own tests of causal language models and of generation, run on our classes of both generations.

They are in the library's repository, not in the installed package, so this needs a checkout of about its version:

    TRANSFORMERS_TESTS=/path/to/transformers pytest -o addopts= tests/test_transformers_suite.py -m slow -n 2

(`addopts=` because the library has markers of its own; RUN_SLOW=1 adds what it calls slow, export for one.)
Fresh weights leave half of this model zero, so all weights are random here. What cannot apply is skipped by name, with
the reason; the suite itself skips what a model or a machine does not have.
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
if not FOLDER or not Path(FOLDER, "tests", "causal_lm_tester.py").exists():
    pytest.skip("set TRANSFORMERS_TESTS to a folder with transformers' tests/", allow_module_level=True)
if importlib.util.find_spec("parameterized") is None:
    pytest.skip("transformers' tests need parameterized", allow_module_level=True)
sys.path.insert(0, FOLDER)

from tests.causal_lm_tester import CausalLMModelTest, CausalLMModelTester  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

NEEDS_IDS = unittest.skip("value embeddings are looked up by token id, so embeddings alone are refused")
NOT_APPLICABLE = (
    "test_inputs_embeds", "test_inputs_embeds_matches_input_ids", "test_generate_from_inputs_embeds_0_greedy",
    "test_generate_from_inputs_embeds_1_beam_search", "test_generate_from_inputs_embeds_with_static_cache",
    "test_generate_from_random_inputs_embeds", "test_generate_continue_from_inputs_embeds",
)  # fmt: skip


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
        config = super().get_config()
        names = ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"]
        names += ["intermediate_size", "max_position_embeddings", "pad_token_id", "bos_token_id", "eos_token_id"]
        return NanoChatConfig.first_generation(**{name: getattr(config, name) for name in names})


class TestFirstGeneration(CausalLMModelTest, unittest.TestCase):
    model_tester_class = FirstTester


class TestSecondGeneration(CausalLMModelTest, unittest.TestCase):
    model_tester_class = SecondTester

    def _get_conv_state_shape(self, batch_size, config):
        return batch_size, config.hidden_size, 1  # the one embedding that the smear keeps


for name in NOT_APPLICABLE:
    if hasattr(TestSecondGeneration, name):
        setattr(TestSecondGeneration, name, NEEDS_IDS(getattr(TestSecondGeneration, name)))
del CausalLMModelTest  # or pytest would collect it on its own


def test_the_random_weights_are_not_zero():
    model = NanoChatForCausalLM(
        NanoChatConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    )
    assert all(torch.count_nonzero(p) for p in model.parameters())
