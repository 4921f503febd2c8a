"""The training step's forward pass equals the model's own: hidden states, loss and gradients."""

from functools import cache, partial

import pytest
import torch
from tiny import relative

from nanochat_hf.kernels import attention, block_matmuls, float8
from nanochat_hf.model.configuration_nanochat import NanoChatConfig
from nanochat_hf.model.modeling_nanochat import NanoChatForCausalLM
from nanochat_hf.train import fused_model
from nanochat_hf.train.fused_model import FusedTransformer, final_norm, use_fused_forward

SHAPE = {
    "vocab_size": 320, "num_tokens": 300, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
GPU_SHAPE = SHAPE | {"hidden_size": 512, "max_position_embeddings": 1024}
POSITIONS = torch.stack([torch.cat([torch.arange(n) for n in part]) for part in ((90, 1, 109), (200,))])


def random_model(generation: int, noise: float = 0.05, **fields) -> NanoChatForCausalLM:
    torch.manual_seed(generation)
    make = NanoChatConfig.first_generation if generation == 1 else NanoChatConfig
    fields = SHAPE | ({} if generation == 1 else {"sliding_window": 33}) | fields
    model = NanoChatForCausalLM(make(**fields))
    with torch.no_grad():
        for parameter in model.parameters():  # fresh projections are zero and would hide everything before them
            parameter.add_(noise * torch.randn_like(parameter))
    return model


def gradients(model) -> dict:
    grads = {name: parameter.grad.float().clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    return grads


def near(grads: dict, exact: dict, tolerance: float = 0.05) -> None:
    for name, grad in exact.items():  # those of small parameters are sums over all tokens, in low precision
        assert relative(grads[name], grad) < (3 * tolerance if grad.numel() < 100 else tolerance), name


def assert_close(grads: dict, exact: dict) -> None:
    for name, grad in exact.items():
        assert torch.allclose(grads[name], grad, atol=1e-6), name


@pytest.fixture(params=["plain", "kernels"])
def path(request, monkeypatch):
    """Both ways of a block; on this machine the references run in the kernels' places."""

    def mask(x, window, position_ids=None, max_documents=0, flash=False):
        assert flash == (request.param == "kernels")
        return attention.attention_mask(x, window, position_ids, max_documents)

    monkeypatch.setattr(fused_model, "attention_mask", mask)
    for name in ("uses_flash", "uses_quack"):
        monkeypatch.setattr(fused_model, name, lambda x: request.param == "kernels")


@pytest.mark.parametrize("generation", [1, 2])
def test_hidden_states_loss_and_gradients_are_the_models(generation, path):
    model = random_model(generation)
    ids, targets = torch.randint(0, 300, (2, 2, 200))
    targets[0, :7] = -100
    fused = FusedTransformer(model)
    for part in (ids[:, :120], ids):  # each length has its own tables
        assert torch.allclose(fused(part), model.model(part, use_cache=False).last_hidden_state, atol=1e-5)
    loss = fused(ids, targets)
    loss.backward()
    grads = gradients(model)
    exact = model(ids, labels=targets, shift_labels=targets, use_cache=False).loss
    exact.backward()
    assert torch.allclose(loss, exact, atol=1e-6)
    assert_close(grads, gradients(model))


def test_the_plain_block_is_one_graph_for_the_compiler():
    model = random_model(2, num_hidden_layers=2)
    fused, ids = FusedTransformer(model), torch.randint(0, 300, (2, 200))
    exact = fused(ids)
    run = torch.compile(fused_model.block, dynamic=False, fullgraph=True, backend="eager")
    fused.eval_kind = fused.train_kind = fused.train_kind._replace(run=run)
    assert torch.allclose(fused(ids), exact, atol=1e-6)


def test_backout_in_bfloat16_keeps_its_digits_where_it_leaves_little():
    x, y = torch.randn(2, 40, 64).bfloat16()
    exact, middle = (x + y).float(), (x, y)  # the last value is the middle one: the norm undoes a factor of .008
    exact = torch.nn.functional.rms_norm(exact, (64,), eps=1e-6)
    assert relative(final_norm(x, y, middle, torch.tensor([0.992]), 1e-12), exact) < 0.005


def test_losses_of_single_tokens_average_to_the_mean():
    fused = FusedTransformer(random_model(2))
    ids, targets = torch.randint(0, 300, (2, 2, 50))
    targets[1, 40:] = -100
    losses = fused(ids, targets, reduction="none")
    assert losses.shape == (2, 50) and (losses[1, 40:] == 0).all()
    assert torch.allclose(losses.sum() / 90, fused(ids, targets), atol=1e-6)


def test_fp8_training_stays_near_the_exact_loss_and_evaluates_in_full_precision(monkeypatch):
    model = random_model(2)
    ids, targets = torch.randint(0, 300, (2, 2, 64))
    exact, fp8 = FusedTransformer(model), FusedTransformer(model, fp8=True)
    calls, quantize = [], float8.quantize_weight
    monkeypatch.setattr(fused_model, "quantize_weight", lambda *parts: (calls.append(parts), quantize(*parts))[1])
    exact(ids, targets).backward()
    expected, loss = gradients(model), fp8(ids, targets)
    assert abs(exact(ids, targets) - loss) / loss < 0.02 and exact(ids, targets) != loss
    loss.backward()
    near(gradients(model), expected, 0.2)
    fp8(ids, targets)
    assert len(calls) == 4 * 4 + 1  # once per weight, the head's too: the second micro-batch finds them in the cache
    with torch.no_grad():
        assert torch.equal(fp8(ids, targets), exact(ids, targets))


@pytest.mark.parametrize("generation", [1, 2])
def test_packed_documents_train_like_the_model_itself(generation, path):
    model = random_model(generation)
    ids, labels = torch.randint(0, 300, (2, 2, 200))
    labels[:, ::3] = labels[POSITIONS == 0] = -100
    inputs = {"input_ids": ids, "labels": labels, "position_ids": POSITIONS}
    count = torch.tensor(500)  # of the step, more than are in this micro-batch
    exact = model(**inputs, use_cache=False, num_items_in_batch=count).loss
    exact.backward()
    expected = gradients(model)
    use_fused_forward(model, torch.float32, documents=6)
    loss = model(**inputs, num_items_in_batch=count).loss
    loss.backward()
    assert torch.allclose(loss, exact, atol=1e-6)
    assert_close(gradients(model), expected)
    assert model(input_ids=ids).logits.shape == (2, 200, 300)  # without labels as before


@pytest.fixture(params=[True, False], ids=["kernels", "PyTorch"])
def kernels(request, monkeypatch):
    """With the kernels extra and without it."""
    if not request.param:
        monkeypatch.setattr(attention, "flash_attn_func", None)
        monkeypatch.setattr(block_matmuls, "gemm_epilogue", None)
    return request.param


@pytest.mark.gpu
@pytest.mark.parametrize("generation", [1, 2])
def test_training_on_a_gpu_is_near_the_model_in_float32(generation, kernels):
    model = random_model(generation, 0.02, **GPU_SHAPE, **({} if generation == 1 else {"sliding_window": None})).cuda()
    ids, targets = torch.randint(0, 300, (2, 2, 1024), device="cuda")
    reference = model(ids, labels=targets, shift_labels=targets, use_cache=False).loss
    reference.backward()
    exact = gradients(model)
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            module.to(torch.bfloat16)
    fused = FusedTransformer(model, compile=True)
    for turn in (1, 2):  # the second time, gradients are added to the first ones
        loss = fused(ids, targets)
        loss.backward()
        assert abs(loss - reference) / reference < 2e-3
        near({name: parameter.grad.float() / turn for name, parameter in model.named_parameters()}, exact)
    with torch.no_grad():
        model.lm_head.weight.copy_(torch.randn_like(model.lm_head.weight))  # else the zeros below would not show
        for layer in model.model.layers:
            layer.mlp.fc2.weight.zero_()
    assert torch.allclose(fused(ids, targets), FusedTransformer(model)(ids, targets), rtol=1e-3)  # no cast is outdated


@torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=True)
def test_the_residual_mix_is_compiled_for_every_kind_of_batch(monkeypatch):
    """Training or not, first layer or not, one sequence or more, any length: more programs than PyTorch allows."""
    compiled = cache(partial(torch.compile, backend="eager"))
    monkeypatch.setattr(block_matmuls, "compiled", compiled)
    residual_mix = lambda x, y, x0, lambdas, eps: block_matmuls._ResidualMix.apply(x, y, x0, *lambdas, eps)  # noqa: E731
    monkeypatch.setattr(fused_model, "residual_mix", residual_mix)
    model = FusedTransformer(random_model(2, num_hidden_layers=2))
    for grad in (True, False):
        for size in ((4, 40), (4, 57), (1, 50), (1, 60), (3, 62)):
            with torch.set_grad_enabled(grad):
                out = model(torch.zeros(size, dtype=torch.long))
            if grad:
                out.sum().backward()
