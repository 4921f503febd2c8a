"""Checkpoints of karpathy/nanochat and of transformers' own `nanochat`: there and back, names, refusals, folders.

With a checkout of the original at hand the slow test at the end runs it:
    NANOCHAT_CHECKOUT=/path/to/nanochat pytest tests/test_convert.py -m slow
"""

import json
import os
import runpy
import shutil
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from old_folder import make_old
from talker import chat_folder, talker, talker_folder  # noqa: F401
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, pipeline
from transformers import NanoChatForCausalLM as NativeModel
from transformers.testing_utils import CaptureLogger

from nanochat_hf.convert.native import from_native, to_native
from nanochat_hf.convert.tokenizer import ranks_from_backend, write_tiktoken
from nanochat_hf.convert.upstream import convert, from_upstream, to_upstream
from nanochat_hf.data import tokenizer as tokenizer_module
from nanochat_hf.data.tokenizer import TEMPLATE
from nanochat_hf.model import NanoChatConfig, NanoChatForCausalLM, configuration_nanochat
from nanochat_hf.run import load_json, model_fingerprint, save_json

OCTOBER = {"sequence_len": 256, "vocab_size": 100, "n_layer": 3, "n_head": 2, "n_kv_head": 1, "n_embd": 32}
JULY = OCTOBER | {"window_pattern": "SSL"}
SCRIPT = Path(__file__).parent.parent / "scripts" / "convert_checkpoint.py"


def upstream_state(fields: dict) -> dict[str, torch.Tensor]:
    """Random weights under the names and in the shapes that upstream's own code saves."""
    generator = torch.Generator().manual_seed(0)
    width, layers = fields["n_embd"], fields["n_layer"]
    kv = fields["n_kv_head"] * width // fields["n_head"]
    july = "window_pattern" in fields
    rows = -(-fields["vocab_size"] // 64) * 64 if july else fields["vocab_size"]
    shapes = {"transformer.wte.weight": (rows, width), "lm_head.weight": (rows, width)}
    for i in range(layers):
        block = f"transformer.h.{i}."
        shapes |= {f"{block}attn.c_{n}.weight": (size, width) for n, size in (("q", width), ("k", kv), ("v", kv))}
        shapes[f"{block}attn.c_proj.weight"] = (width, width)
        shapes[f"{block}mlp.c_fc.weight"], shapes[f"{block}mlp.c_proj.weight"] = (4 * width, width), (width, 4 * width)
        if july and i % 2 == (layers - 1) % 2:
            shapes[f"{block}attn.ve_gate.weight"] = (fields["n_kv_head"], 12)
            shapes[f"value_embeds.{i}.weight"] = (rows, kv)
    if july:
        shapes |= {"resid_lambdas": (layers,), "x0_lambdas": (layers,), "backout_lambda": (1,)}
        shapes |= {"smear_lambda": (1,), "smear_gate.weight": (1, 24)}
    stored = {True: torch.bfloat16, False: torch.float32}  # tables of embeddings, and everything else
    return {
        name: (torch.randn(shape, generator=generator) * 0.2).to(stored["wte" in name or "value_embeds" in name])
        for name, shape in shapes.items()
    }


def write_checkpoint(folder: Path, fields: dict, step: int = 21, prefix: str = "") -> Path:
    folder.mkdir(exist_ok=True)
    torch.save({prefix + n: v for n, v in upstream_state(fields).items()}, folder / f"model_{step:06d}.pt")
    meta = {"step": step, "val_bpb": 1.0, "model_config": fields, "user_config": {"depth": 3}}
    (folder / f"meta_{step:06d}.json").write_text(json.dumps(meta))
    return folder


def logits(model, ids) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


@pytest.fixture
def ids():
    return torch.randint(0, 100, (2, 200), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("fields", [OCTOBER, JULY], ids=["october", "july"])
def test_there_and_back_keeps_every_tensor_and_field(fields):
    state = upstream_state(fields)
    model = from_upstream(state, {"model_config": fields})
    back, back_fields = to_upstream(model)
    assert back_fields == fields and back.keys() == state.keys()
    for name, value in state.items():
        assert back[name].dtype == value.dtype and torch.equal(back[name], value), name


def test_parameters_land_where_they_belong():
    state = upstream_state(JULY)
    model = from_upstream(state, {"model_config": JULY})
    layer = model.model.layers[2]
    assert model.config.generation == 2 and (model.config.vocab_size, model.config.num_tokens) == (128, 100)
    assert model.config.layer_types == ["sliding_attention", "sliding_attention", "hybrid"]
    assert model.config.sliding_window == 129
    pairs = {
        "transformer.wte.weight": model.model.embed_tokens.weight,
        "transformer.h.2.attn.c_k.weight": layer.self_attn.k_proj.weight,
        "transformer.h.2.attn.c_proj.weight": layer.self_attn.o_proj.weight,
        "transformer.h.2.mlp.c_fc.weight": layer.mlp.fc1.weight,
        "transformer.h.2.mlp.c_proj.weight": layer.mlp.fc2.weight,
        "transformer.h.2.attn.ve_gate.weight": layer.self_attn.ve_gate.weight,
        "value_embeds.0.weight": model.model.value_embeds["0"].weight,
        "x0_lambdas": model.model.x0_lambdas,
    }
    for name, parameter in pairs.items():
        assert torch.equal(state[name].float(), parameter), name


def test_october_becomes_native_and_returns(ids, tmp_path):
    model = from_upstream(upstream_state(OCTOBER), {"model_config": OCTOBER})
    native = to_native(model)
    assert type(native) is NativeModel
    torch.testing.assert_close(logits(native, ids), logits(model, ids), atol=1e-5, rtol=0)
    native.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "nanochat"
    assert not list(tmp_path.glob("*.py")), "needs no remote code"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is NativeModel
    torch.testing.assert_close(logits(from_native(loaded), ids), logits(model, ids), atol=1e-5, rtol=0)


def test_padding_rows_are_dropped_for_native():
    config = NanoChatConfig.first_generation(
        vocab_size=128, num_tokens=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    model, ids = NanoChatForCausalLM(config).eval(), torch.arange(100)[None]
    native = to_native(model)
    assert native.config.vocab_size == 100
    torch.testing.assert_close(logits(native, ids), logits(model, ids), atol=1e-5, rtol=0)


def test_what_a_format_cannot_express_is_named():
    july = from_upstream(upstream_state(JULY), {"model_config": JULY})
    with pytest.raises(ValueError, match=r"cannot express qk_scale=1.2, .*smear=True"):
        to_native(july)
    july.config.final_logit_softcapping = 30.0
    with pytest.raises(ValueError, match=r"generation 2 cannot express final_logit_softcapping=30.0"):
        to_upstream(july)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state, fields: fields.pop("n_head"), r"missing \['n_head'\]"),
        (lambda state, fields: fields.update(n_expert=8), r"unknown \['n_expert'\]"),
        (lambda state, fields: state.pop("smear_lambda"), "Missing key.*smear_lambda"),
        (lambda state, fields: [state.pop(n) for n in list(state) if "smear" in n], "two generations.*lacks smear"),
        (lambda state, fields: state.pop("transformer.wte.weight"), "no checkpoint of karpathy/nanochat"),
        (lambda state, fields: fields.update(n_embd=64), "size mismatch"),
    ],
)  # fmt: skip
def test_a_damaged_or_foreign_checkpoint_is_refused_with_the_reason(change, message):
    state, fields = upstream_state(JULY), dict(JULY)
    change(state, fields)
    with pytest.raises(ValueError, match=message):
        from_upstream(state, {"model_config": fields})


@pytest.mark.parametrize("fields", [OCTOBER, JULY], ids=["october", "july"])
def test_a_folder_converts_to_one_that_loads_and_back_to_the_same_files(fields, tokenizer, ids, tmp_path):
    fields = fields | {"vocab_size": len(tokenizer)}
    source = write_checkpoint(tmp_path / "source", fields, prefix="_orig_mod.")
    write_checkpoint(source, fields, step=5)
    (tmp_path / "tok").mkdir()
    write_tiktoken(tmp_path / "tok" / "tokenizer.pkl", *ranks_from_backend(tokenizer.backend_tokenizer))
    done = convert(source, tmp_path / "hf", "hf", tmp_path / "tok", texts=["a text"])
    assert done["step"] == 21 and done["generation"] == (1 if "window_pattern" not in fields else 2)
    assert done["tokenizer_ids"] > 10_000
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert loaded("An owl is grey.")["input_ids"] == tokenizer("An owl is grey.")["input_ids"]
    assert loaded.chat_template == tokenizer.chat_template
    ends = ("<|assistant_end|>", "<|bos|>", "<|python_end|>")  # upstream's folders do not tell base and chat apart
    assert model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids(list(ends))
    expected = from_upstream(upstream_state(fields), {"model_config": fields})
    assert torch.equal(logits(model, ids), logits(expected, ids))

    convert(tmp_path / "hf", tmp_path / "back", "nanochat", step=21)
    back = torch.load(tmp_path / "back" / "model_000021.pt", weights_only=True)
    assert all(torch.equal(back[name], value) for name, value in upstream_state(fields).items())
    assert json.loads((tmp_path / "back" / "meta_000021.json").read_text())["model_config"] == fields
    lengths = torch.load(tmp_path / "back" / "token_bytes.pt", weights_only=True)
    assert len(lengths) == len(tokenizer) and lengths[tokenizer.bos_token_id] == 0
    assert lengths[tokenizer("capital", add_special_tokens=False)["input_ids"]].sum() == 7


QUESTION = [{"role": "user", "content": "What is 12 * 34?"}]


def answer(folder, tokenizer, **options) -> str:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    inputs = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**inputs, max_new_tokens=60, do_sample=False, **options)
    return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :])


def test_a_chat_model_answers_its_calls_after_every_conversion(chat_folder, talker, tmp_path):  # noqa: F811
    """Through upstream's files, which do not say that it is a chat model; by the loop, or by ending at the call."""
    shutil.copytree(chat_folder, tmp_path / "chat")
    config = (tmp_path / "chat" / "config.json").read_text()
    assert '"sliding_window": 33' in config  # upstream knows windows of whole tiles only; the answers stay the same
    (tmp_path / "chat" / "config.json").write_text(config.replace('"sliding_window": 33', '"sliding_window": 129'))
    convert(tmp_path / "chat", tmp_path / "theirs", "nanochat")
    convert(tmp_path / "theirs", tmp_path / "ours", "hf")
    convert(chat_folder, tmp_path / "copy", "hf")
    for folder in ("ours", "copy"):
        result = "<|python_start|>12*34<|python_end|><|output_start|>408<|output_end|>It is 408.<|assistant_end|>"
        assert answer(tmp_path / folder, talker[1]) == result
        shutil.rmtree(tmp_path / folder / "custom_generate")
        assert answer(tmp_path / folder, talker[1]) == "<|python_start|>12*34<|python_end|>"


def test_native_folders_end_at_a_call_and_base_models_of_ours_get_no_loop(tokenizer, tmp_path):
    fields = OCTOBER | {"vocab_size": len(tokenizer)}
    source = write_checkpoint(tmp_path / "source", fields)
    write_tiktoken(source / "tokenizer.pkl", *ranks_from_backend(tokenizer.backend_tokenizer))
    convert(source, tmp_path / "native", "native")
    end = tokenizer.convert_tokens_to_ids("<|python_end|>")
    loaded = NativeModel.from_pretrained(tmp_path / "native")
    assert end in loaded.generation_config.eos_token_id and (tmp_path / "native" / "custom_generate").exists()
    base = from_upstream(upstream_state(fields), {"model_config": fields})
    base.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.bos_token_id]
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    for to in ("hf", "native"):
        convert(tmp_path / "base", tmp_path / f"base-{to}", to)
        generation = GenerationConfig.from_pretrained(tmp_path / f"base-{to}")
        assert generation.eos_token_id == base.generation_config.eos_token_id
        assert not (tmp_path / f"base-{to}" / "custom_generate").exists()
    pipe = pipeline("text-generation", model=str(tmp_path / "base-native"))
    texts = pipe(
        ["An owl", "A dog is here"], batch_size=2, max_new_tokens=40, do_sample=False, eos_token_id=list(range(400))
    )
    assert all("<|bos|>" not in text["generated_text"] for (text,) in texts)


def test_an_old_folder_is_renewed_in_place_and_files_that_share_its_bytes_stay(chat_folder, tmp_path):  # noqa: F811
    old = make_old(shutil.copytree(chat_folder, tmp_path / "old"))
    (old / "custom_generate" / "generate.py").write_text("# old")
    settings = json.loads((old / "tokenizer_config.json").read_text())
    settings["response_template"]["fields"]["content"].pop("close_pattern")
    (old / "tokenizer_config.json").write_text(json.dumps(settings))
    before = {path.relative_to(old): path.read_bytes() for path in old.rglob("*") if path.is_file()}
    shutil.copytree(old, tmp_path / "links", copy_function=os.link)
    with CaptureLogger(configuration_nanochat.logger) as log:
        convert(tmp_path / "links", tmp_path / "links", "hf")
    assert log.out == ""  # nobody has to be told how to do what he is doing
    assert {path.relative_to(old): path.read_bytes() for path in old.rglob("*") if path.is_file()} == before
    today = {path.relative_to(chat_folder) for path in chat_folder.rglob("*") if path.is_file()}
    assert {p.relative_to(tmp_path / "links") for p in (tmp_path / "links").rglob("*") if p.is_file()} == today
    for path in today:
        assert (tmp_path / "links" / path).read_bytes() == (chat_folder / path).read_bytes(), path


def test_templates_of_a_renewed_or_converted_folder_are_todays(chat_folder, tmp_path, monkeypatch):  # noqa: F811
    older, other = "{# older #}", "{# somebody's own #}"
    monkeypatch.setattr(tokenizer_module, "OLD_TEMPLATES", (sha256(older.encode()).hexdigest()[:16],))
    for name, template, chat, response in (
        ("old", older, TEMPLATE.read_text(), tokenizer_module.RESPONSE_TEMPLATE),
        ("own", other, other, {"fields": {}}),
    ):
        folder = shutil.copytree(chat_folder, tmp_path / name)
        (folder / "chat_template.jinja").write_text(template)
        settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"response_template": {"fields": {}}}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        for output in (tmp_path / f"{name}-copy", folder):
            convert(folder, output, "hf")
            loaded = AutoTokenizer.from_pretrained(output)  # as the Space does
            assert (loaded.chat_template, loaded.response_template) == (chat, response), output


def test_only_a_folder_of_ours_is_renewed_in_place(tmp_path):
    source = write_checkpoint(tmp_path / "source", OCTOBER)
    for to in ("hf", "nanochat"):
        with pytest.raises(ValueError, match="source exists: remove it or choose another output"):
            convert(source, source, to)


def test_bad_folders_leave_nothing_behind(tokenizer, tmp_path, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    source, out = write_checkpoint(tmp_path / "source", OCTOBER), tmp_path / "out"

    def refused(message, **options):
        with pytest.raises(ValueError, match=message):
            convert(**({"source": source, "output": out, "to": "hf"} | options))
        assert [path.name for path in tmp_path.iterdir()] == ["source"]

    refused("no model_000007.pt in .*: it has the steps 21", step=7)
    tokenizer.save_pretrained(elsewhere)
    refused("the tokenizer has 512 tokens and the model 100", tokenizer=elsewhere)
    refused("neither model_NNNNNN.pt", source=elsewhere)
    refused("no tokenizer.pkl", tokenizer=source)
    (source / "meta_000021.json").write_text("{")
    refused("meta_000021.json is no JSON")
    (source / "meta_000021.json").unlink()
    refused("meta_000021.json is missing")
    write_checkpoint(source, OCTOBER)
    torch.save({"weights": os.system}, source / "model_000021.pt")
    refused(r"not a file of plain weights \(it asks for (posix|nt).system\)")
    (source / "model_000021.pt").write_bytes(b"broken")
    refused("not a file of plain weights")
    out.mkdir()
    with pytest.raises(ValueError, match="exists: remove it"):
        convert(source, out, "hf")


@pytest.mark.slow
def test_the_script_converts_and_reports_errors_in_one_line(tmp_path):
    source = write_checkpoint(tmp_path / "source", OCTOBER)
    command = [sys.executable, str(SCRIPT), "--source", str(source), "--output", str(tmp_path / "out")]
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parent.parent)}
    run = subprocess.run([*command, "--to", "native"], capture_output=True, text=True, env=environment, check=True)
    assert "generation 1, 40,192 parameters, step 21" in run.stdout and "weights only" in run.stdout
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "out")) is NativeModel
    again = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert again.returncode == 2 and again.stderr.strip().splitlines()[-1].startswith("error: ")


def test_the_script_renews_a_stage_with_its_templates_and_its_record_names_the_new_content(
    chat_folder,  # noqa: F811
    tmp_path,
    monkeypatch,
):
    older = "{# older #}"
    monkeypatch.setattr(tokenizer_module, "OLD_TEMPLATES", (sha256(older.encode()).hexdigest()[:16],))
    for name, recorded in (("stage", None), ("foreign", "0" * 16)):
        folder = shutil.copytree(chat_folder, tmp_path / name)
        (folder / "chat_template.jinja").write_text(older)
        save_json(folder / "metrics.json", {"weights": recorded or model_fingerprint(folder)})
        monkeypatch.setattr(sys, "argv", ["convert", "--source", str(folder), "--output", str(folder)])
        runpy.run_path(str(SCRIPT))["main"]()
        assert (folder / "chat_template.jinja").read_text() == TEMPLATE.read_text()
        assert load_json(folder / "metrics.json") == {"weights": recorded or model_fingerprint(folder)}


ORIGINAL = """
import sys, types
sys.path.insert(0, sys.argv[1])
import torch
for name in ("rustbpe", "tiktoken"):
    sys.modules.setdefault(name, types.ModuleType(name))
from nanochat.gpt import GPT, GPTConfig
config, state, ids = torch.load(sys.argv[2], weights_only=True)
model = GPT(GPTConfig(**config))
model.init_weights()
model.load_state_dict({n: v.float() for n, v in state.items()}, strict=True, assign=True)
if model.cos.dtype != torch.float32:  # October 2025 rounds its rotary tables to bfloat16; compared in float32 here
    raise SystemExit("use a copy of October's gpt.py whose rotary tables stay float32")
with torch.no_grad():
    torch.save(model(ids), sys.argv[3])
"""


@pytest.mark.slow
@pytest.mark.skipif(
    "NANOCHAT_CHECKOUT" not in os.environ, reason="set NANOCHAT_CHECKOUT to a karpathy/nanochat folder"
)
def test_logits_equal_those_of_the_original_code(tmp_path):
    checkout = os.environ["NANOCHAT_CHECKOUT"]
    fields = JULY if "window_pattern" in Path(checkout, "nanochat", "gpt.py").read_text() else OCTOBER
    state, ids = upstream_state(fields), torch.randint(0, 100, (2, 250))
    torch.save((fields, state, ids), tmp_path / "in.pt")
    command = [sys.executable, "-c", ORIGINAL, checkout, str(tmp_path / "in.pt"), str(tmp_path / "out.pt")]
    subprocess.run(command, check=True, env=os.environ | {"NANOCHAT_DTYPE": "float32"})
    ours = logits(from_upstream(state, {"model_config": fields}), ids)
    torch.testing.assert_close(ours, torch.load(tmp_path / "out.pt"), atol=5e-5, rtol=0)
