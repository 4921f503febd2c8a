"""Quantized copies: what quantizers look for, and (where they are installed) bitsandbytes, torchao, optimum-quanto.

The three are not of the pinned stack: `pip install bitsandbytes torchao optimum-quanto` runs their tests, on a CPU.
"""

import copy
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from talker import QUESTIONS, chat_folder, talker, talker_folder  # noqa: F401
from tiny import GENERATIONS, make_model
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, TorchAoConfig
from transformers.quantizers.base import get_keys_to_not_convert

from nanochat_hf.convert.upstream import convert
from nanochat_hf.errors import InputError
from nanochat_hf.model.quantization import is_quantized
from nanochat_hf.serve.engine import Engine
from nanochat_hf.train.model_setup import build_model, load_chat_model
from nanochat_hf.train.sft import ChatConfig

MATRICES = {"q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"}


@pytest.mark.parametrize("generation", GENERATIONS)
def test_every_matrix_is_a_plain_linear_and_no_gate_is_one(generation):
    model = make_model(generation)
    kinds = {name.split(".")[-1]: type(module) for name, module in model.named_modules() if hasattr(module, "weight")}
    assert all(kinds[name] is nn.Linear for name in (*MATRICES, "lm_head"))
    for gate in ("smear_gate", "ve_gate") if generation == 2 else ():
        assert not issubclass(kinds[gate], nn.Linear)


def test_quantizers_of_transformers_leave_the_head_alone():
    assert get_keys_to_not_convert(make_model()) == ["lm_head"]


def test_lora_on_all_linear_leaves_head_and_gates_alone():
    model = get_peft_model(make_model(), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert {name.split(".")[-1] for name in model.targeted_module_names} == MATRICES


def size(model: nn.Module) -> int:
    """Bytes of the parameters as they lie in memory, those of tensor subclasses included."""
    total, waiting = 0, list(model.parameters())
    while waiting:
        tensor = waiting.pop()
        if hasattr(tensor, "__tensor_flatten__"):
            waiting += [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
        else:
            total += tensor.numel() * tensor.element_size()
    return total


def answers(model, tokenizer) -> list[str]:
    """The greedy answers to all questions, one at a time."""
    found = []
    for question in QUESTIONS:
        chat = [{"role": "user", "content": question}]
        inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        out = model.generate(**inputs, max_new_tokens=100, do_sample=False)
        found.append(tokenizer.decode(out[0, inputs["input_ids"].shape[1] :]))
    return found


def check(model, talker, share: float) -> None:  # noqa: F811
    """It is smaller, answers the same, and its gates are as they were."""
    original, tokenizer = talker
    assert is_quantized(model)
    matrices = sum(p.numel() * 4 for n, p in original.named_parameters() if n.split(".")[-2] in MATRICES)
    assert size(model) < size(original) - share * matrices
    assert answers(model, tokenizer) == answers(original, tokenizer)
    for name, gate in original.named_parameters():
        if "gate" in name:
            assert torch.equal(model.get_parameter(name), gate), name


def test_who_reads_weights_refuses_quantized_ones(talker, chat_folder, tmp_path, monkeypatch):  # noqa: F811
    """A quantized weight under their eyes would be numbers without their scale: another model, without a word."""
    model, tokenizer = talker
    assert not is_quantized(model)
    packed = copy.deepcopy(model)
    layer = packed.model.layers[0].mlp.fc1
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.int8), requires_grad=False)
    assert is_quantized(packed)
    with pytest.raises(InputError, match="this model is quantized, and fast generation reads plain weights"):
        Engine(packed, tokenizer)
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", lambda *args, **kwargs: packed)
    with pytest.raises(ValueError, match="is quantized: convert the model that it was made from"):
        convert(chat_folder, tmp_path / "out", "nanochat")
    with pytest.raises(InputError, match="is quantized and cannot be trained"):
        load_chat_model(str(chat_folder), ChatConfig(), tokenizer)
    plan = SimpleNamespace(generation=2, vocab_size=packed.config.vocab_size)
    with pytest.raises(InputError, match="is quantized and cannot be trained"):
        build_model(plan, str(chat_folder), tokenizer, torch.device("cpu"), sharded=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "share"),
    [
        ({"load_in_8bit": True}, 0.7),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}, 0.8),
    ],
    ids=["int8", "nf4"],
)
def test_bitsandbytes(options, share, talker, chat_folder, tmp_path):  # noqa: F811
    pytest.importorskip("bitsandbytes")
    load = AutoModelForCausalLM.from_pretrained
    model = load(chat_folder, quantization_config=BitsAndBytesConfig(**options))
    model.save_pretrained(tmp_path)  # before it ran: bitsandbytes 0.50 saves 4-bit weights in the CPU's order after
    for quantized in (model, load(tmp_path)):
        check(quantized, talker, share)
    assert (tmp_path / "custom_generate" / "tools.py").exists()


@pytest.mark.slow
def test_qlora_trains_on_four_bits(chat_folder):  # noqa: F811
    pytest.importorskip("bitsandbytes")
    options = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(chat_folder, quantization_config=options)
    model = prepare_model_for_kbit_training(model)
    model = get_peft_model(model, LoraConfig(r=4, task_type="CAUSAL_LM")).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids, losses = torch.arange(1, 33)[None], []
    for _ in range(8):
        loss = model(input_ids=ids, labels=ids).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.7 * losses[0]
    kinds = {type(m.base_layer).__name__ for m in model.modules() if hasattr(m, "base_layer")}
    assert kinds == {"Linear4bit"}


@pytest.mark.slow
def test_torchao_while_loading_saved_and_afterwards(talker, chat_folder, tmp_path):  # noqa: F811
    torchao = pytest.importorskip("torchao.quantization")
    load, int8 = AutoModelForCausalLM.from_pretrained, torchao.Int8WeightOnlyConfig()
    model = load(chat_folder, quantization_config=TorchAoConfig(int8))
    model.save_pretrained(tmp_path)
    later = load(chat_folder)
    torchao.quantize_(later, int8)
    for quantized in (model, load(tmp_path), later):
        check(quantized, talker, 0.7)
    assert (tmp_path / "custom_generate" / "tools.py").exists()


@pytest.mark.slow
def test_quanto_afterwards(talker, chat_folder):  # noqa: F811
    quanto = pytest.importorskip("optimum.quanto")
    model = AutoModelForCausalLM.from_pretrained(chat_folder)
    quanto.quantize(model, weights=quanto.qint8)
    quanto.freeze(model)
    check(model, talker, 0.7)
