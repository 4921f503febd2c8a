"""Other people's servers: `transformers serve` for real, and the way in which vLLM and TGI call a model.

vLLM and TGI need a GPU; their sources (vLLM's models/transformers/base.py, TGI's transformers_flash_causal_lm.py) say
how they run a model that is not their own, and a stand-in for their attention runs ours that way.
"""

import sys
from pathlib import Path

import openai
import pytest
import torch
import torch.nn.functional as F
from servers import free_port, start
from tiny import make_model
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from nanochat_hf.convert.native import to_native
from nanochat_hf.model import NanoChatConfig, NanoChatForCausalLM, NanoChatModel
from nanochat_hf.serve.engine import Engine

TINY = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 128}

HELLO = [{"role": "user", "content": "Hello"}]


def first_generation(vocab_size):
    """A model of October 2025 with random weights everywhere."""
    torch.manual_seed(0)
    model = NanoChatForCausalLM(NanoChatConfig.first_generation(vocab_size=vocab_size, **TINY)).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2)
    return model


class Paged:
    """How vLLM and TGI run a transformers model: no cache object, one flat row; the engine stores keys and values."""

    def __init__(self):
        self.keys, self.values = {}, {}

    def attention(self, module, query, key, value, mask, scaling, attention_instances=None, **_):
        i = module.layer_idx
        self.keys[i] = key = torch.cat([self.keys.get(i, key[:, :, :0]), key], dim=2)
        self.values[i] = value = torch.cat([self.values.get(i, value[:, :, :0]), value], dim=2)
        assert mask is None and attention_instances is not None
        causal = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril(key.shape[2] - query.shape[2])
        y = F.scaled_dot_product_attention(query, key, value, causal, scale=scaling, enable_gqa=True)
        return y.transpose(1, 2), None


@pytest.mark.parametrize("native", [False, True])
def test_the_first_generation_runs_under_engines_that_keep_the_keys_themselves(native, monkeypatch):
    ours = first_generation(128)
    model, engine, ids = to_native(ours) if native else ours, Paged(), torch.randint(0, 128, (1, 12))
    with torch.no_grad():
        expected = model(ids).logits
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "vllm", engine.attention)
        model.config._attn_implementation = "vllm"
        parts = []
        for part, at in ((ids[:, :9], range(9)), (ids[:, 9:10], [9]), (ids[:, 10:], [10, 11])):
            positions = torch.tensor([list(at)])
            out = model(part, position_ids=positions, use_cache=False, attention_instances={})
            parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=1e-4, atol=1e-4)


def test_the_second_generation_refuses_such_engines(monkeypatch):
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "vllm", Paged().attention)
    config = NanoChatConfig(vocab_size=128, **TINY)
    config._attn_implementation = "vllm"
    with pytest.raises(ValueError, match=r"the smear needs the token before.*plugin"):
        NanoChatModel(config)


@pytest.mark.slow
def test_transformers_serve_runs_both_generations_and_a_first_one_exported_as_native(tokenizer, tmp_path):
    first, sizes = first_generation(len(tokenizer)), {"vocab_size": len(tokenizer), "num_tokens": None}
    second = make_model(2, eos_token_id=tokenizer.eos_token_id, **sizes)
    native = to_native(first)
    for model, folder in ((first, "first"), (second, "second"), (native, "native")):
        model.generation_config.eos_token_id = tokenizer.eos_token_id
        model.save_pretrained(tmp_path / folder)
        tokenizer.save_pretrained(tmp_path / folder)
    port = free_port()
    command = [str(Path(sys.executable).with_name("transformers")), "serve", "--device", "cpu", "--port", str(port)]
    process, address = start([*command, "--dtype", "float32", "--trust-remote-code"], port, "/health")
    try:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        for model, folder in ((first, "native"), (first, "first"), (second, "second")):
            options = {"messages": HELLO, "max_tokens": 12, "temperature": 0}
            chunks = client.chat.completions.create(model=str(tmp_path / folder), stream=True, **options)
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
            engine = Engine(model, tokenizer)
            (answer,) = engine.generate([engine.encode(HELLO)], max_new_tokens=12)[0]
            expected = tokenizer.decode(answer, skip_special_tokens=True)
            assert text and text == expected.rstrip("\ufffd"), folder  # a character that is not complete
    finally:
        process.terminate()
        process.wait(20)
