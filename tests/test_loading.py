"""One loader for training, evaluation and serving: whatever is wrong with a model folder is the same single line."""

import json
import os
import pickle
import sys
from functools import partial
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from nanochat_hf.cli import dispatch
from nanochat_hf.data import chat_renderer
from nanochat_hf.data.tokenizer import TEMPLATE, load_tokenizer, token_ids
from nanochat_hf.errors import InputError
from nanochat_hf.eval.lm_eval_model import LocalLM, load
from nanochat_hf.export import checkpoint_config
from nanochat_hf.loading import load_model
from nanochat_hf.run import Run, save_json
from nanochat_hf.serve.engine import Engine
from nanochat_hf.serve.worker import open_workers
from nanochat_hf.stage_configs import ChatConfig, EvalConfig
from nanochat_hf.train.model_setup import load_chat_model, read_model
from nanochat_hf.train.sft import encode

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


def changed(name, change, path):
    tensors = load_file(path)
    tensors[name] = change(tensors[name])
    save_file(tensors, path, metadata={"format": "pt"})


def set_fields(path, **fields):
    config = json.loads((path.parent / "config.json").read_text())
    (path.parent / "config.json").write_text(json.dumps(config | fields))


def next_id(path):
    set_fields(path, bos_token_id=json.loads((path.parent / "config.json").read_text())["vocab_size"])


def foreign_code(path):
    """A model of a type that nobody knows: its own code would have to be executed."""
    config = json.loads((path.parent / "config.json").read_text())
    (path.parent / "evil.py").write_text("import os\nos._exit(3)\n")
    config |= {"model_type": "foreign", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}
    (path.parent / "config.json").write_text(json.dumps(config))


def generation(text):
    return lambda path: (path.parent / "generation_config.json").write_text(text)


def endless_template(path):
    template = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    (path.parent / "chat_template.jinja").write_text(template)


BROKEN = {  # what happened to model.safetensors, and what the line says
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-7]), "no model in .* that can be read"),
    "other shape": (other_shape, "config.json and weights of .* do not belong together: see lm_head.weight"),
    "more layers": (partial(set_fields, num_hidden_layers=9, layer_types=None), r"see model\.layers\.[0-9]\."),
    "fewer layers": (partial(set_fields, num_hidden_layers=1, layer_types=None), r"see model\.layers\.[0-9]\."),
    "not finite": (not_finite, r"not finite \(NaN or infinity in model\.layers\.0\.mlp\.fc1\.weight\)"),
    "integers": (
        partial(changed, "model.layers.1.mlp.fc2.weight", lambda x: (100 * x).to(torch.int8)),
        r"are damaged: model\.layers\.1\.mlp\.fc2\.weight is I8",
    ),
    "complex": (partial(changed, "lm_head.weight", lambda x: x.to(torch.complex64)), r"lm_head\.weight is C64"),
    "zeros": (
        partial(changed, "model.layers.1.mlp.fc1.weight", torch.zeros_like),
        r"are damaged: model\.layers\.1\.mlp\.fc1 is all zero",
    ),
    "foreign code": (foreign_code, "no model in .* that can be read"),
    "generation: end": (generation('{"eos_token_id": "x"}'), "generation_config.json: eos_token_id is 'x'"),
    "generation: no end": (generation('{"eos_token_id": []}'), "generation_config.json: eos_token_id is "),
    "generation: no JSON": (generation("{"), "generation_config.json is not valid JSON"),
    "generation: no object": (generation("[]"), "generation_config.json is not valid JSON"),
    "generation: id": (generation('{"eos_token_id": [1, 9999]}'), "eos_token_id is .*: the model has "),
    "generation: type": (generation('{"temperature": "hot"}'), "generation_config.json: temperature is 'hot'"),
    "token id": (next_id, r"bos_token_id is (\d+): the model has \1 tokens"),
    "return_dict": (partial(set_fields, return_dict=False), "return_dict is False: it must be true"),
    "hidden states": (partial(set_fields, output_hidden_states="x"), "output_hidden_states is 'x': it must be false"),
    "attentions": (partial(set_fields, output_attentions=True), "output_attentions is True: it must be false"),
    "rope_theta": (partial(set_fields, rope_theta="x"), "rope_theta is 'x', and in rope_parameters .*: leave one out"),
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
    [("config.json", "["), ("generation_config.json", "{"), ("tokenizer.json", "{}"), ("model.safetensors", ""),
     ("config.json", {"hidden_size": 256}), ("config.json", {"id2label": 5})],
)  # fmt: skip
def test_a_damaged_file_is_one_line_of_conversion_and_push(tiny_folder, tmp_path, file, content):
    if isinstance(content, dict):
        set_fields(tiny_folder / file, **content)
    else:
        (tiny_folder / file).write_text(content)
    with pytest.raises(InputError, match=r"^((?!attribute|KeyError).)*$"):  # no words of Python
        dispatch("convert", ["--source", str(tiny_folder), "--output", str(tmp_path / "out"), "--to", "nanochat"])
    run = tmp_path / "run"
    run.mkdir()
    tiny_folder.rename(run / "sft")
    save_json(run / "sft" / "metrics.json", {"finished": True})
    if file != "model.safetensors":  # a push compares weights with their fingerprint
        with pytest.raises(InputError, match=r"no (model|tokenizer) in|do not belong together"):
            dispatch("push", ["--run-dir", str(run), "--repo", "you/x", "--dry-run"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"] and not (run / "hub").exists()


SERVER = partial(open_workers, max_batch_size=1, max_queue_size=1, device="cpu")


@pytest.mark.parametrize("read", [load_tokenizer, LOADERS["serving"], SERVER])
def test_a_chat_template_that_does_not_end_is_one_line(tiny_folder, monkeypatch, read):
    monkeypatch.setattr(chat_renderer, "SECONDS", 0.2)
    endless_template(tiny_folder / "model.safetensors")
    with pytest.raises(InputError, match=r"the chat template of .* fails: it takes more than 0\.2 s"):
        read(str(tiny_folder))


ENDLESS = (
    "{% set r = range(99999) %}{% for i in r %}{% for j in r %}{% for k in r %}{% endfor %}{% endfor %}{% endfor %}"
)
ON_HI = "{{% if messages[-1]['content'] == 'Hi' %}}{}{{% endif %}}{{{{ bos_token }}}}{{{{ messages[0]['content'] }}}}"
LIMITS = {  # what a template does on the message "Hi" only -> what the line says
    ENDLESS: "it takes more than", "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}": "RecursionError",
    '{{ "x" * 10**10 }}': "it takes more than 1024 MiB",
    '{{ "%1000000000d" % 1 }}{{ "%1000000000d" % 1 }}': "it takes more than",
    '{{ "x".center(10**9) ~ "x".center(10**9) }}': "it takes more than",
    '{{ "x" * 2 * 10**7 }}': "it (writes more than 16,777,216 characters|takes more than 1 s)",
    "{{ 10**(10**10) }}": "it takes more than", "{{ range(10**9) }}": "Range too big",
    "{{ raise_exception('no Hi') }}": "TemplateError: no Hi", "{{ raise_exception('\\ud800') }}": r"TemplateError: \?",
    "{{ ''.__class__.__mro__ }}": "SecurityError",
}  # fmt: skip


def chat(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def python(expression: str) -> str:
    """Compute.

    Args:
        expression: in Python.
    """


def of_tokenizer(path, change):
    parts = json.loads(path.read_text())
    change(parts)
    path.write_text(json.dumps(parts))


TOKENIZERS = {  # of a folder, damaged, and what is said of it
    "special token is missing": lambda folder: (folder / "tokenizer_config.json").unlink(),
    "another place": lambda folder: of_tokenizer(folder / "tokenizer.json", lambda x: x.update(added_tokens=[])),
    "added token '<|output_end|>' is not ours": lambda folder: of_tokenizer(
        folder / "tokenizer.json", lambda x: x["added_tokens"][-1].update(special=False)
    ),
    "added token '<|bos|>' is not ours": lambda folder: of_tokenizer(
        folder / "tokenizer.json", lambda x: x["added_tokens"][0].update(lstrip=True)
    ),
    "added token 't' is not ours": lambda folder: of_tokenizer(
        folder / "tokenizer.json",
        lambda x: x["added_tokens"].append({**x["added_tokens"][0], "content": "t", "id": x["model"]["vocab"]["t"]}),
    ),
    "it has no pre-tokenizer, or no dec": lambda folder: of_tokenizer(
        folder / "tokenizer.json", lambda x: x.update(pre_tokenizer=None)
    ),
    "pre-tokenizer, or no decoder": lambda folder: of_tokenizer(
        folder / "tokenizer.json", lambda x: x.update(decoder=None)
    ),
    "token is missing or has": lambda folder: of_tokenizer(
        folder / "tokenizer_config.json", lambda x: x.update(bos_token=None)
    ),
    "slice index": lambda folder: of_tokenizer(
        folder / "tokenizer.json", lambda x: x["model"].update(continuing_subword_prefix="##")
    ),
    "out of vocabulary": lambda folder: of_tokenizer(
        folder / "tokenizer.json", lambda x: x["model"]["vocab"].update(a=x["model"]["vocab"]["b"])
    ),
    "a value in it is missing": lambda folder: (folder / "tokenizer.json").write_text("{}"),
    "its BPE has dropout": lambda folder: of_tokenizer(
        folder / "tokenizer.json", lambda x: x["model"].update(dropout=0.1)
    ),
    "leaves out what the user says": lambda folder: (folder / "chat_template.jinja").write_text("null"),
}


@pytest.mark.parametrize("message", TOKENIZERS)
def test_a_damaged_tokenizer_is_one_line(tiny_folder, message):
    TOKENIZERS[message](tiny_folder)
    with pytest.raises(InputError, match=message) as caught:
        load_tokenizer(tiny_folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("reader", ["evaluation", "serving", "training"])
def test_a_tokenizer_that_lost_a_token_is_not_that_of_the_model(tiny_folder, reader):
    of_tokenizer(tiny_folder / "tokenizer.json", lambda x: x["model"]["vocab"].pop(min(x["model"]["vocab"])))
    readers = LOADERS | {"training": lambda folder: load_chat_model(folder, ChatConfig(), load_tokenizer(folder))}
    with pytest.raises(
        InputError, match=r"do not belong together: <\|bos\|> is token \d+ in its tokenizer and \d+ in"
    ):
        readers[reader](str(tiny_folder))


def swap_tokens(parts):
    vocab = parts["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]


OTHER_IDS = {  # changes of tokenizer.json after which all names and sizes are as before
    "merges": lambda parts: parts["model"]["merges"].clear(), "swapped": swap_tokens,
    **{kind: lambda parts, kind=kind: parts.update(normalizer={"type": kind}) for kind in ("NFC", "Lowercase")},
}  # fmt: skip


@pytest.mark.parametrize("change", OTHER_IDS)
def test_a_tokenizer_with_other_ids_is_not_that_of_the_model(tiny_folder, tokenizer, change):
    set_fields(tiny_folder / "config.json", token_ids=token_ids(tokenizer))
    readers = [*LOADERS.values(), checkpoint_config]
    readers[0] = lambda folder: load_chat_model(folder, ChatConfig(), load_tokenizer(folder))
    for read in readers:
        read(tiny_folder)
    of_tokenizer(tiny_folder / "tokenizer.json", OTHER_IDS[change])
    for read in readers:
        with pytest.raises(InputError, match="do not belong together: it was trained with other ids"):
            read(tiny_folder)
    set_fields(tiny_folder / "config.json", token_ids=None)  # of a model without the record
    readers[1](tiny_folder)


def test_a_truncation_in_tokenizer_json_cuts_no_prompt(tiny_folder):
    engine = Engine.from_pretrained(tiny_folder, device="cpu")
    whole = engine.encode_text("one two three four")
    engine.tokenizer.backend_tokenizer.enable_truncation(2)
    assert engine.encode_text("one two three four") == whole and len(whole) > 2


def limited(folder: Path, template: str):
    (folder / "chat_template.jinja").write_text(template)
    return load_tokenizer(folder)


@pytest.mark.parametrize(
    "template", [*list(LIMITS)[:3], *(pytest.param(t, marks=pytest.mark.slow) for t in list(LIMITS)[3:])]
)
def test_a_chat_template_of_others_has_limits_on_every_message(tiny_folder, monkeypatch, template):
    monkeypatch.setattr(chat_renderer, "SECONDS", 1.0)
    with pytest.raises(InputError, match=f"the chat template of .* fails: .*{LIMITS[template]}"):
        tokenizer = pickle.loads(pickle.dumps(limited(tiny_folder, ON_HI.format(template))))
        assert tokenizer.apply_chat_template(chat("Hello"), tokenize=False) == "<|bos|>Hello"
        encode(tokenizer, [chat("Hello"), chat("Hi")], True)


def test_a_forked_process_renders_in_a_process_of_its_own(monkeypatch):
    renderer, started = chat_renderer.Renderer(), []

    def start():
        started.append(os.getpid())
        streams = {"stdin": BytesIO(), "stdout": BytesIO(b'{"texts": ["a"]}\n' * 2)}
        renderer.process, renderer.owner = SimpleNamespace(**streams, kill=lambda: None), os.getpid()

    monkeypatch.setattr(renderer, "start", start)
    for process in (1, 1, 2):
        monkeypatch.setattr("os.getpid", lambda process=process: process)
        assert renderer.render(conversations=[]) == ["a"]
    assert started == [1, 2]


@pytest.mark.slow
def test_serving_and_evaluation_keep_the_limits_of_chat_templates(tiny_folder, tiny_model, monkeypatch):
    monkeypatch.setattr(chat_renderer, "SECONDS", 0.5)
    tokenizer = limited(tiny_folder, ON_HI.format(ENDLESS))
    lm = LocalLM(tiny_model, tokenizer, EvalConfig())
    for reader in (Engine(tiny_model, tokenizer).encode, lm.apply_chat_template):
        with pytest.raises(InputError, match=r"the chat template of .* fails: it takes more than 0\.5 s"):
            reader(chat("Hi"))


def test_a_chat_template_of_others_gives_what_it_gives_without_limits(tiny_folder, tokenizer):
    text = "{# others #}" + TEMPLATE.read_text()
    ours, theirs = load_tokenizer(tiny_folder), limited(tiny_folder, text)
    chats = [[*chat("é <|bos|>"), {"role": "assistant", "content": "b", "tool_calls": None}], chat("two")]
    for options in (
        {"return_dict": True, "padding": True},
        {"tokenize": False, "add_generation_prompt": True},
        {"return_dict": False, "tools": [python], "x": 1},
    ):
        assert theirs.apply_chat_template(chats, **options) == ours.apply_chat_template(chats, **options)
        assert theirs.apply_chat_template(chats[0], **options) == ours.apply_chat_template(chats[0], **options)
    half = limited(tiny_folder, "{{ '\\ud800' ~ messages[0].content }}")
    assert half.apply_chat_template(chats[1], tokenize=False) == "?two"
    theirs.save_pretrained(tiny_folder / "again")
    assert load_tokenizer(tiny_folder / "again").chat_template == text


def test_a_run_folder_in_place_of_a_model_and_the_other_way_round(tmp_path):
    (tmp_path / "tokenizer").mkdir()
    with pytest.raises(InputError, match=r"no model in .*: it is a run folder: add a stage, as in /sft"):
        load_model(str(tmp_path))
    (tmp_path / "config.json").touch()
    with pytest.raises(InputError, match="has no finished stage with a model: name it as --model"):
        Run(tmp_path).model(None)


def test_a_device_that_is_not_there_or_full_is_named(tiny_folder, monkeypatch):
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match=r"model cannot be used on cuda: .*; try cpu"):
            load_model(str(tiny_folder), device="cuda")
    monkeypatch.setattr(torch.nn.Module, "to", lambda *args: (_ for _ in ()).throw(torch.OutOfMemoryError("full")))
    with pytest.raises(InputError, match=r"model cannot be used on cpu: full; try cpu"):
        load_model(str(tiny_folder), device="cpu")


def test_weights_that_another_kind_of_model_does_not_use_are_named(tmp_path, capsys):
    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=1)).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file({**weights, "extra.weight": torch.zeros(2)}, tmp_path / "model.safetensors", {"format": "pt"})
    load_model(str(tmp_path))
    assert "weights that its model does not use, such as extra.weight" in capsys.readouterr().err
