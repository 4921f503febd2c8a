"""The network for the loop: its two ways to a loss agree, its precision, what it refuses."""

import pytest
import torch

from nanochat_hf.errors import InputError
from nanochat_hf.kernels.backend import version
from nanochat_hf.model import NanoChatForCausalLM
from nanochat_hf.optim.scaling import plan
from nanochat_hf.train.fused_model import FusedTransformer
from nanochat_hf.train.model_setup import (
    ModelLoss,
    build_loss_module,
    build_model,
    describe,
    gradient_norm,
    plan_overrides_from,
    why_not_fp8,
)

CPU = torch.device("cpu")


def made(tokenizer, generation=2, **fields):
    options = {"aspect_ratio": 32, "head_dim": 32, "max_seq_len": 64, "total_batch_size": 64, "num_iterations": 1}
    return plan(2, len(tokenizer), generation, **{**options, **fields})


@pytest.mark.parametrize("generation", [1, 2])
def test_both_ways_give_one_loss_and_one_gradient(tokenizer, generation):
    torch.manual_seed(0)
    model = build_model(made(tokenizer, generation), None, tokenizer, CPU, sharded=False)
    torch.nn.init.normal_(model.lm_head.weight)
    ids = torch.randint(0, len(tokenizer), (2, 65))
    results = []
    for module in (build_loss_module(model, "auto", True, False), build_loss_module(model, "sdpa", True, False)):
        model.zero_grad()
        loss = module(ids[:, :-1], ids[:, 1:])
        loss.backward()
        results.append(torch.stack((loss.detach(), gradient_norm(model))))
        per_token = module(ids[:, :-1], ids[:, 1:], reduction="none")
        assert per_token.shape == (2, 64) and per_token.mean().item() == pytest.approx(loss.item(), rel=1e-5)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    logits = model(ids[:, :-1]).logits
    assert results[0][0].item() == pytest.approx(
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item(), rel=1e-4
    )


def test_the_gradient_norm_is_that_of_all_gradients_together(tiny_model):
    tiny_model(input_ids=torch.arange(16)[None], labels=torch.arange(16)[None]).loss.backward()
    whole = torch.cat([p.grad.flatten() for p in tiny_model.parameters() if p.grad is not None])
    assert gradient_norm(tiny_model).item() == pytest.approx(whole.norm().item(), rel=1e-5)


def test_the_way_to_the_loss_follows_the_options(tiny_model):
    assert isinstance(build_loss_module(tiny_model, "auto", True, False), FusedTransformer)
    assert isinstance(build_loss_module(tiny_model, "eager", True, False), ModelLoss)
    assert tiny_model.config._attn_implementation == "eager"


def test_given_weights_bring_their_shape(tiny_model, tokenizer, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    shape = plan_overrides_from(str(tmp_path))
    assert shape == {"depth": 2, "generation": 2, "head_dim": 32, "aspect_ratio": 32, "window_pattern": "SSSL"}
    fields = {key: value for key, value in shape.items() if key not in ("depth", "generation")}
    model = build_model(made(tokenizer, **fields), str(tmp_path), tokenizer, CPU, False)
    assert torch.equal(model.lm_head.weight, tiny_model.lm_head.weight)


def test_another_tokenizer_is_refused(tiny_model, tokenizer, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    smaller = plan(2, 300, aspect_ratio=32, head_dim=32, max_seq_len=64, total_batch_size=64, num_iterations=1)
    with pytest.raises(InputError, match="512 rows of embeddings and the tokenizer needs 320"):
        build_model(smaller, str(tmp_path), tokenizer, CPU, False)


def test_fp8_is_refused_where_it_cannot_work(tiny_model):
    with pytest.raises(InputError, match="fp8 needs a CUDA device"):
        build_loss_module(tiny_model, "auto", True, True)


def test_another_kind_of_model_and_missing_weights_are_refused_in_one_line(tiny_model, tokenizer, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "n_layer": 2}')
    with pytest.raises(InputError, match=r"a model of type 'gpt2'.*convert_checkpoint"):
        plan_overrides_from(str(tmp_path))
    tiny_model.config.save_pretrained(tmp_path)
    assert plan_overrides_from(str(tmp_path))["depth"] == 2
    with pytest.raises(InputError, match="no model in") as caught:
        build_model(made(tokenizer), str(tmp_path), tokenizer, CPU, sharded=False)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("fp8, said", [("auto", "; no FP8: it needs a CUDA device"), (False, "")])
def test_fp8_auto_is_off_where_it_cannot_work_and_the_first_line_says_so(tiny_model, fp8, said):
    trunk = build_loss_module(tiny_model, "auto", True, fp8)
    assert not trunk.fp8
    assert describe(trunk, fp8).startswith("kernels: PyTorch on cpu; precision float32" + said)


@pytest.mark.parametrize("fp8", ["true ", "on", 1.5])
def test_another_value_of_fp8_is_refused(tiny_model, fp8):
    with pytest.raises(InputError, match="choose true, false or auto"):
        build_loss_module(tiny_model, "auto", True, fp8)


def capable(monkeypatch, capability: tuple[int, int]) -> torch.device:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    return torch.device("cuda")


def test_what_keeps_a_model_from_fp8(tiny_model, monkeypatch):
    hopper = capable(monkeypatch, (9, 0))
    assert why_not_fp8(tiny_model, "auto", hopper, (9, 0)) is None
    assert "attn_implementation" in why_not_fp8(tiny_model, "sdpa", hopper, (9, 0))
    tiny_model.config.max_position_embeddings = 100  # the products sum over tokens, too
    assert "multiples of 16" in why_not_fp8(tiny_model, "auto", hopper, (9, 0))
    ada = capable(monkeypatch, (8, 9))  # has it, and nobody measured that it is faster there
    assert "newer" in why_not_fp8(tiny_model, "auto", ada, (9, 0))


@pytest.mark.gpu
def test_the_first_line_names_kernels_and_precision(tiny_config):
    model = NanoChatForCausalLM(tiny_config).to("cuda")
    line = describe(build_loss_module(model, "auto", True, "auto"), "auto")
    assert "matmuls PyTorch's FP8" in line
    assert "precision bfloat16 with FP8 blocks" in line and f"triton {version('triton')}" in line
    assert "fp8=auto would be faster" in describe(build_loss_module(model, "auto", True, False), False)
