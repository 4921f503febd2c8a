"""The training step's fast way through the network equals the model's own."""

import pytest
import torch
from tiny import relative

from nanochat_hf.model.configuration_nanochat import NanoChatConfig
from nanochat_hf.model.modeling_nanochat import NanoChatForCausalLM
from nanochat_hf.train.fused_model import FusedTransformer, finish, use_fused_forward

SHAPE = {
    "vocab_size": 320,
    "num_tokens": 300,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


def random_model(generation: int) -> NanoChatForCausalLM:
    torch.manual_seed(generation)
    make = NanoChatConfig.first_generation if generation == 1 else lambda **f: NanoChatConfig(sliding_window=33, **f)
    model = NanoChatForCausalLM(make(**SHAPE))
    with torch.no_grad():
        for parameter in model.parameters():  # fresh projections are zero and would hide everything behind them
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("generation", [1, 2])
def test_trunk_has_the_models_hidden_states_loss_and_gradients(generation):
    model = random_model(generation)
    ids, targets = torch.randint(0, 300, (2, 2, 200))
    targets[0, :7] = -100
    trunk = FusedTransformer(model)
    assert torch.allclose(trunk(ids), model.model(ids, use_cache=False).last_hidden_state, atol=1e-6)
    loss = trunk(ids, targets)
    loss.backward()
    fast = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    reference = model(ids, labels=targets, shift_labels=targets, use_cache=False).loss
    reference.backward()
    assert torch.allclose(loss, reference, atol=1e-6)
    for name, parameter in model.named_parameters():
        assert torch.allclose(fast[name], parameter.grad, atol=1e-6), name


def test_backout_in_bfloat16_keeps_its_digits_where_it_leaves_little():
    x, y = torch.randn(2, 40, 64).bfloat16()
    exact, middle = (x + y).float(), (x, y)  # the last value is the middle one: the norm undoes a factor of .008
    exact = torch.nn.functional.rms_norm(exact, (64,), eps=1e-6)
    assert relative(finish(x, y, middle, torch.tensor([0.992]), 1e-12), exact) < 0.005


def test_losses_of_single_tokens_average_to_the_mean():
    trunk = FusedTransformer(random_model(2))
    ids, targets = torch.randint(0, 300, (2, 2, 50))
    targets[1, 40:] = -100
    losses = trunk(ids, targets, reduction="none")
    assert losses.shape == (2, 50) and (losses[1, 40:] == 0).all()
    assert torch.allclose(losses.sum() / 90, trunk(ids, targets), atol=1e-6)


def test_eight_bit_products_stay_near_the_exact_loss_and_train():
    model = random_model(2)
    ids, targets = torch.randint(0, 300, (2, 2, 64))
    exact, coarse = FusedTransformer(model)(ids, targets), FusedTransformer(model, fp8=True)(ids, targets)
    assert abs(exact - coarse) / exact < 0.02 and exact != coarse
    with torch.no_grad():
        assert torch.equal(
            FusedTransformer(model, fp8=True)(ids, targets), FusedTransformer(model)(ids, targets)
        )  # measured in full precision
    coarse.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


POSITIONS = torch.stack([torch.cat([torch.arange(n) for n in part]) for part in ((90, 1, 109), (200,))])


@pytest.mark.parametrize("generation", [1, 2])
def test_fused_model_trains_on_packed_documents_like_the_model_itself(generation):
    model = random_model(generation)
    ids, labels = torch.randint(0, 300, (2, 2, 200))
    labels[:, ::3] = labels[POSITIONS == 0] = -100
    inputs = {"input_ids": ids, "labels": labels, "position_ids": POSITIONS}
    count = torch.tensor(500)  # of the step, more than are in this micro-batch
    exact = model(**inputs, use_cache=False, num_items_in_batch=count).loss
    exact.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    use_fused_forward(model, torch.float32, documents=6)
    loss = model(**inputs, num_items_in_batch=count).loss
    loss.backward()
    assert torch.allclose(loss, exact, atol=1e-6)
    for name, parameter in model.named_parameters():
        assert torch.allclose(gradients[name], parameter.grad, atol=1e-6), name
    assert model(input_ids=ids).logits.shape == (2, 200, 300)  # as before, where no loss is wanted


@pytest.mark.gpu
def test_fused_model_on_a_gpu_is_near_the_model_in_float32():
    torch.manual_seed(0)
    model = NanoChatForCausalLM(NanoChatConfig(**SHAPE | {"hidden_size": 512, "max_position_embeddings": 1024})).cuda()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    ids, labels = torch.randint(0, 300, (2, 2, 1024), device="cuda")
    places = [torch.cat([torch.arange(n) for n in part]) for part in ((500, 7, 517), (1, 1023))]
    inputs = {"input_ids": ids, "labels": labels, "position_ids": torch.stack(places).cuda()}
    labels[inputs["position_ids"] == 0] = -100
    exact = model(**inputs, use_cache=False).loss
    exact.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    use_fused_forward(model, torch.bfloat16, documents=20, compile=True)
    loss = model(**inputs).loss
    loss.backward()
    assert abs(loss - exact) / exact < 2e-3
    for name, parameter in model.named_parameters():
        error = (parameter.grad - gradients[name]).norm() / gradients[name].norm()
        assert error < (0.15 if parameter.numel() < 100 else 0.05), (name, error)


@pytest.mark.gpu
@pytest.mark.parametrize("generation", [1, 2])
def test_compiled_trunk_on_a_gpu_is_near_the_model_in_float32(generation):
    torch.manual_seed(0)
    shape = SHAPE | {"hidden_size": 512, "max_position_embeddings": 1024}
    make = NanoChatConfig.first_generation if generation == 1 else NanoChatConfig
    model = NanoChatForCausalLM(make(**shape)).cuda()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    ids, targets = torch.randint(0, 300, (2, 2, 1024), device="cuda")
    reference = model(ids, labels=targets, shift_labels=targets, use_cache=False).loss
    reference.backward()
    exact = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            module.to(torch.bfloat16)
    trunk = FusedTransformer(model, compile=True)
    for turn in (1, 2):  # the second time, gradients are added to the first ones
        loss = trunk(ids, targets)
        loss.backward()
        assert abs(loss - reference) / reference < 2e-3
        for name, parameter in model.named_parameters():
            error = (parameter.grad.float() / turn - exact[name]).norm() / exact[name].norm()
            assert error < (0.15 if parameter.numel() < 100 else 0.05), (name, error)  # sums over all tokens, in bf16
    with torch.no_grad():
        model.lm_head.weight.copy_(torch.randn_like(model.lm_head.weight))  # or the zero below would say nothing
        for layer in model.model.layers:
            layer.mlp.fc2.weight.zero_()
    changed = trunk(ids, targets)
    assert torch.allclose(
        changed, FusedTransformer(model)(ids, targets), rtol=1e-3
    )  # no copy of the weights is out of date
