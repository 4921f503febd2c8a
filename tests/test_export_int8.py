"""`nanochat export --to int8`: smaller folders that answer as before; `pip install torchao` runs the slow tests."""

import copy
import json
import shutil
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from talker import QUESTIONS, chat_folder, talker, talker_folder  # noqa: F401
from test_model_folder import run_without_the_package
from tiny import GENERATIONS, make_ids, make_model, relative

from nanochat_hf.errors import InputError
from nanochat_hf.export import adder, copy_checkpoint, export
from nanochat_hf.loading import load_model


def test_without_torchao_one_line_says_what_to_install(chat_folder, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    monkeypatch.delitem(sys.modules, "nanochat_hf.export.int8", raising=False)
    for refused in (lambda: export(chat_folder, tmp_path / "out", "int8"), lambda: adder("int8")):
        with pytest.raises(InputError, match="int8 needs the package torchao"):
            refused()
    assert not list(tmp_path.iterdir())


def test_a_copied_checkpoint_has_no_records_of_its_training(chat_folder, tmp_path):  # noqa: F811
    source = shutil.copytree(chat_folder, tmp_path / "source")
    for name in ("metrics.json", "optimizer.pt", "samples.jsonl"):
        (source / name).write_text("{}")
    (tmp_path / "copy").mkdir()
    copy_checkpoint(source, tmp_path / "copy")
    copied = {path.name for path in (tmp_path / "copy").iterdir()}
    assert "model.safetensors" in copied and copied.isdisjoint({"metrics.json", "optimizer.pt", "samples.jsonl"})


@pytest.mark.slow
@pytest.mark.parametrize("generation", GENERATIONS)
def test_matrices_are_int8_and_logits_close(generation, tokenizer, tmp_path):
    pytest.importorskip("torchao", reason="needs torchao")
    model = make_model(generation, vocab_size=len(tokenizer) + 64, num_tokens=len(tokenizer), hidden_size=64)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    export(tmp_path / "model", tmp_path / "int8", "int8")
    loaded, ids = load_model(tmp_path / "int8"), make_ids(2, 40)
    matrices = {name for name, p in loaded.named_parameters() if hasattr(p, "__tensor_flatten__")}
    assert len(matrices) == 6 * 5 and all(name.endswith("proj.weight") or ".mlp.fc" in name for name in matrices)
    for inference in (torch.no_grad, torch.inference_mode):  # `nanochat eval` has the second
        with inference():
            logits, low = model(ids).logits, copy.deepcopy(model).bfloat16()(ids).logits
            assert relative(loaded(ids).logits, logits) < relative(low, logits) + 0.05
    with pytest.raises(InputError, match="is quantized: export the unquantized model"):
        export(tmp_path / "int8", tmp_path / "mlx", "mlx")


DAMAGE = [
    ("_weight_scale", lambda x: x * torch.nan, "has integers or scales of another form"),
    ("_weight_scale", lambda x: x[:1].clone(), "has integers or scales of another form"),
    ("_weight_scale", lambda x: x * 0, "is all zero"),
    ("_weight_qdata", lambda x: x[:, :-1].clone(), "has integers or scales of another form"),
    ("_weight_qdata", torch.Tensor.float, "has integers or scales of another form"),
    ("_weight_qdata", lambda x: x * 0, "is all zero"),
    ("embed_tokens.weight", lambda x: x * torch.nan, "are not finite"),
    ("embed_tokens.weight", lambda x: x * 0, "embed_tokens is all zero"),
]


@pytest.mark.slow
def test_damaged_int8_weights_are_refused_and_a_second_copy_too(tokenizer, tmp_path):
    pytest.importorskip("torchao", reason="needs torchao")
    model = make_model(2, vocab_size=len(tokenizer) + 64, num_tokens=len(tokenizer), hidden_size=64)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    adder("int8")(tmp_path / "model")
    with pytest.raises(InputError, match=r"int8 exists: remove it"):
        adder("int8")(tmp_path / "model")
    path = tmp_path / "model" / "int8" / "model.safetensors"
    weights = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    for end, change, message in DAMAGE:
        changed = {name: change(value) if name.endswith(end) else value for name, value in weights.items()}
        save_file(changed, path, metadata)
        with pytest.raises(InputError, match=message):
            load_model(path.parent)


CODE = """
import json
from transformers import pipeline
chat = pipeline("text-generation", model="int8", trust_remote_code=True)
chats = [[dict(role="user", content=question)] for question in json.load(open("questions.json"))]
print(json.dumps([chat(c, max_new_tokens=120, do_sample=False)[0]["generated_text"][-1]["content"] for c in chats]))
"""


@pytest.mark.slow
def test_the_folder_answers_and_calls_its_tool_without_this_package(chat_folder, tmp_path):  # noqa: F811
    pytest.importorskip("torchao", reason="needs torchao")
    export(chat_folder, tmp_path / "int8", "int8")
    small, large = ((folder / "model.safetensors").stat().st_size for folder in (tmp_path / "int8", chat_folder))
    assert small < 0.45 * large  # of float32; half of the weights are embeddings, which stay bfloat16
    (tmp_path / "questions.json").write_text(json.dumps([*QUESTIONS]))
    assert json.loads(run_without_the_package(CODE, tmp_path)) == [parts[-1][1] for parts in QUESTIONS.values()]
