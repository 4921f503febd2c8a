"""One loader for training, evaluation and serving: whatever is wrong with a model folder is the same single line."""

import json
import sys
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanochat_hf.cli import dispatch
from nanochat_hf.data import tokenizer as tokenizers
from nanochat_hf.data.tokenizer import load_tokenizer
from nanochat_hf.errors import InputError
from nanochat_hf.eval.lm_eval_model import load
from nanochat_hf.loading import load_model
from nanochat_hf.run import save_json
from nanochat_hf.serve.engine import Engine
from nanochat_hf.serve.worker import open_workers
from nanochat_hf.train.model_setup import read_model

LOADERS = {
    "training": read_model,
    "evaluation": lambda folder: load(folder, "auto", torch.device("cpu")),
    "serving": lambda folder: Engine.from_pretrained(folder, device="cpu"),
}


def not_finite(path):
    tensors = load_file(path)
    tensors["model.layers.0.mlp.fc1.weight"][0, 0] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})


def other_shape(path):
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:8].clone()
    save_file(tensors, path, metadata={"format": "pt"})


def foreign_code(path):
    """A model of a type that nobody knows: its own code would have to be executed."""
    config = json.loads((path.parent / "config.json").read_text())
    (path.parent / "evil.py").write_text("import os\nos._exit(3)\n")
    config |= {"model_type": "foreign", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}
    (path.parent / "config.json").write_text(json.dumps(config))


def damaged_end(path):
    (path.parent / "generation_config.json").write_text('{"eos_token_id": "x"}')


def endless_template(path):
    template = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    (path.parent / "chat_template.jinja").write_text(template)


BROKEN = {  # what happened to model.safetensors, and what the line says
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-7]), "no model in .* that can be read"),
    "empty": (lambda path: path.write_bytes(b""), "no model in .* that can be read"),
    "gone": (lambda path: path.unlink(), "no model in .* that can be read"),
    "other shape": (other_shape, "no model in .* that can be read"),
    "not finite": (not_finite, r"not finite \(NaN or infinity in model\.layers\.0\.mlp\.fc1\.weight\)"),
    "foreign code": (foreign_code, "no model in .* that can be read"),
    "damaged end": (damaged_end, "generation_config.json of .* is damaged: eos_token_id is 'x'"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_wrong_with_a_model_is_the_same_line_for_all(tiny_folder, monkeypatch, what):
    monkeypatch.setattr(sys, "stdin", None)  # a question on it would be an error of its own
    change, words = BROKEN[what]
    change(tiny_folder / "model.safetensors")
    lines = set()
    for loader in LOADERS.values():
        with pytest.raises(InputError, match=words) as error:
            loader(str(tiny_folder))
        lines.add(str(error.value))
    assert len(lines) == 1 and "\n" not in lines.pop()


@pytest.mark.parametrize(
    ("file", "content"),
    [("config.json", "[]"), ("config.json", '{"model_type": "nanochat_hf", "hidden_size": "x"}'), ("config.json", "["),
     ("tokenizer.json", "{}"), ("tokenizer.json", "[]"), ("model.safetensors", ""), ("tokenizer_config.json", "[]")],
)  # fmt: skip
def test_a_damaged_file_is_one_line_of_conversion_and_push(tiny_folder, tmp_path, file, content):
    (tiny_folder / file).write_text(content)
    with pytest.raises(InputError):
        dispatch("convert", ["--source", str(tiny_folder), "--output", str(tmp_path / "out"), "--to", "nanochat"])
    run = tmp_path / "run"
    run.mkdir()
    tiny_folder.rename(run / "sft")
    save_json(run / "sft" / "metrics.json", {"finished": True})
    if file != "model.safetensors":  # a push compares weights with their fingerprint
        with pytest.raises(InputError, match=r"no (model|tokenizer) in"):
            dispatch("push", ["--run-dir", str(run), "--repo", "you/x", "--dry-run"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"] and not (run / "hub").exists()


SERVER = partial(open_workers, max_batch_size=1, max_queue_size=1, device="cpu")


@pytest.mark.parametrize("read", [load_tokenizer, LOADERS["serving"], SERVER])
def test_a_chat_template_that_does_not_end_is_one_line(tiny_folder, monkeypatch, read):
    monkeypatch.setattr(tokenizers, "TEMPLATE_SECONDS", 0.2)
    endless_template(tiny_folder / "model.safetensors")
    with pytest.raises(InputError, match=r"the chat template of .* fails: it takes more than 0\.2 s"):
        read(str(tiny_folder))


def test_a_device_that_is_not_there_or_full_is_named(tiny_folder, monkeypatch):
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match=r"model cannot be used on cuda: .*; try cpu"):
            load_model(str(tiny_folder), device="cuda")
    monkeypatch.setattr(torch.nn.Module, "to", lambda *args: (_ for _ in ()).throw(torch.OutOfMemoryError("full")))
    with pytest.raises(InputError, match=r"model cannot be used on cpu: full; try cpu"):
        load_model(str(tiny_folder), device="cpu")
