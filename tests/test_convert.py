"""Checkpoints and tokenizers of karpathy/nanochat and of transformers' own `nanochat`: both ways, refusals, folders.

With a checkout of the original at hand the slow test at the end runs it:
    NANOCHAT_CHECKOUT=/path/to/nanochat pytest tests/test_convert.py -m slow
"""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import types
from hashlib import sha256
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from old_folder import make_old
from tiny import close, make_ids
from tokenizers import Tokenizer, models, normalizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, pipeline
from transformers import NanoChatForCausalLM as NativeModel
from transformers.testing_utils import CaptureLogger

from nanochat_hf import cli
from nanochat_hf.convert import tokenizer as convert_tokenizer
from nanochat_hf.convert import upstream as upstream_module
from nanochat_hf.convert.native import from_native, to_native
from nanochat_hf.convert.tokenizer import backend_from_ranks, check_tokenizer, ranks_from_backend, write_tiktoken
from nanochat_hf.convert.upstream import convert, from_upstream, read_upstream, set_token_ids, to_upstream
from nanochat_hf.data import tokenizer as tokenizer_module
from nanochat_hf.data.tokenizer import SPECIAL_TOKENS, TEMPLATE, wrap
from nanochat_hf.model import NanoChatConfig, NanoChatForCausalLM, configuration_nanochat
from nanochat_hf.run import load_json, model_fingerprint, save_json

OCTOBER = {"sequence_len": 256, "vocab_size": 100, "n_layer": 3, "n_head": 2, "n_kv_head": 1, "n_embd": 32}
JULY = OCTOBER | {"window_pattern": "SSL"}
SCRIPT = Path(__file__).parent.parent / "scripts" / "convert_checkpoint.py"
both_generations = pytest.mark.parametrize("fields", [OCTOBER, JULY], ids=["october", "july"])


def upstream_state(fields: dict) -> dict[str, torch.Tensor]:
    """Random weights under the names and in the shapes that upstream's own code saves."""
    generator = torch.Generator().manual_seed(0)
    width, layers, july = fields["n_embd"], fields["n_layer"], "window_pattern" in fields
    kv = fields["n_kv_head"] * width // fields["n_head"]
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
    state = {name: torch.randn(shape, generator=generator) * 0.2 for name, shape in shapes.items()}
    tables = {name: value.bfloat16() for name, value in state.items() if "wte" in name or "value_embeds" in name}
    return state | tables


def write_checkpoint(folder: Path, fields: dict, step: int = 21, prefix: str = "") -> Path:
    folder.mkdir(exist_ok=True)
    torch.save({prefix + n: v for n, v in upstream_state(fields).items()}, folder / f"model_{step:06d}.pt")
    meta = {"step": step, "val_bpb": 1.0, "model_config": fields, "user_config": {"depth": 3}}
    (folder / f"meta_{step:06d}.json").write_text(json.dumps(meta))
    return folder


def logits(model, ids) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


ids = make_ids(2, 200)


@both_generations
def test_there_and_back_keeps_every_tensor_and_field(fields):
    state = upstream_state(fields)
    back, back_fields = to_upstream(from_upstream(state, {"model_config": fields}))
    assert back_fields == fields and back.keys() == state.keys()
    for name, value in state.items():
        assert back[name].dtype == value.dtype and torch.equal(back[name], value), name


def test_parameters_land_where_they_belong():
    state = upstream_state(JULY)
    model = from_upstream(state, {"model_config": JULY})
    layer, config = model.model.layers[2], model.config
    assert (config.generation, config.vocab_size, config.num_tokens, config.sliding_window) == (2, 128, 100, 129)
    assert config.layer_types == ["sliding_attention", "sliding_attention", "hybrid"]
    attention = {"c_q": "q_proj", "c_k": "k_proj", "c_v": "v_proj", "c_proj": "o_proj", "ve_gate": "ve_gate"}
    pairs = {f"h.2.attn.{theirs}": getattr(layer.self_attn, ours) for theirs, ours in attention.items()}
    pairs |= {"wte": model.model.embed_tokens, "h.2.mlp.c_fc": layer.mlp.fc1, "h.2.mlp.c_proj": layer.mlp.fc2}
    for name, module in pairs.items():
        assert torch.equal(state[f"transformer.{name}.weight"].float(), module.weight), name
    assert torch.equal(state["value_embeds.0.weight"].float(), model.model.value_embeds["0"].weight)
    assert torch.equal(state["x0_lambdas"], model.model.x0_lambdas)


def test_october_becomes_native_without_remote_code_or_padding_rows_and_returns(tmp_path):
    padded = NanoChatConfig.first_generation(
        vocab_size=128, num_tokens=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, head_dim=24,
        final_logit_softcapping=30, bos_token_id=1, eos_token_id=2, pad_token_id=1,
    )  # fmt: skip
    for model in (from_upstream(upstream_state(OCTOBER), {"model_config": OCTOBER}), NanoChatForCausalLM(padded)):
        to_native(model).save_pretrained(tmp_path)
        assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "nanochat"
        assert not list(tmp_path.glob("*.py")), "needs no remote code"
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert type(loaded) is NativeModel and loaded.config.vocab_size == 100
        for copied in (loaded, from_native(loaded)):
            close(logits(copied, ids), logits(model, ids), atol=1e-5)
    assert loaded.generation_config.pad_token_id == 2  # its `generate` masks padding, and a prompt's bos with it


@pytest.mark.parametrize("config, words", [('{"model_type": "llama"}', "of a llama"), ('{"model_type', "damaged")])
def test_a_folder_of_another_model_is_refused(config, words, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(config)
    with pytest.raises(ValueError, match=f"{source} holds no nanochat: its config.json is {words}"):
        convert(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_full_disk_is_that_of_the_output(tmp_path, monkeypatch):
    from_upstream(upstream_state(OCTOBER), {"model_config": OCTOBER}).save_pretrained(tmp_path / "source")
    for full in (OSError(28, "No space left on device"), RuntimeError("basic_ios::clear: iostream error")):
        monkeypatch.setattr(torch, "save", MagicMock(side_effect=full))
        with pytest.raises(ValueError, match=f"cannot write {tmp_path}/out: .*; make room there"):
            convert(tmp_path / "source", tmp_path / "out", "nanochat")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_what_a_format_cannot_express_is_named():
    july = from_upstream(upstream_state(JULY), {"model_config": JULY})
    with pytest.raises(ValueError, match=r"cannot express qk_scale=1.2, window_pattern=\w+, [^\[]*smear.*--to mlx"):
        to_native(july)
    july.config.final_logit_softcapping = 30.0
    with pytest.raises(ValueError, match=r"generation 2 cannot express final_logit_softcapping=30.0"):
        to_upstream(july)
    native = to_native(from_upstream(upstream_state(OCTOBER), {"model_config": OCTOBER}))
    native.config.hidden_act = "gelu"
    with pytest.raises(ValueError, match=r"only nanochat models .* hidden_act relu2 can be converted"):
        from_native(native)


@pytest.mark.parametrize(("change", "message"), [
    (lambda state, fields: fields.pop("n_head"), r"missing \['n_head'\]"),
    (lambda state, fields: fields.update(n_expert=8), r"unknown \['n_expert'\]"),
    (lambda state, fields: state.pop("smear_lambda"), "Missing key.*smear_lambda"),
    (lambda state, fields: [state.pop(n) for n in list(state) if "smear" in n], "two generations.*lacks smear"),
    (lambda state, fields: state.pop("transformer.wte.weight"), "no checkpoint of karpathy/nanochat"),
    (lambda state, fields: fields.update(n_embd=64), "size mismatch"),
    (lambda state, fields: state["lm_head.weight"][0].fill_(torch.nan), "^lm_head.weight has values that are not fin"),
    (lambda state, fields: state.update({"lm_head.weight": state["lm_head.weight"].int()}), "^lm_head.weight has val"),
    (lambda state, fields: [state.pop(n) for n in upstream_state(JULY).keys() - upstream_state(OCTOBER).keys()],
     "no new parameter and window_pattern SSL, and lacks value_embeds"),
])  # fmt: skip
def test_a_damaged_or_foreign_checkpoint_is_refused_with_the_reason(change, message):
    state, fields = upstream_state(JULY), dict(JULY)
    change(state, fields)
    with pytest.raises(ValueError, match=message):
        from_upstream(state, {"model_config": fields})


# ---- folders ------------------------------------------------------------------------------------------------------


@both_generations
def test_a_folder_converts_to_one_that_loads_and_back_to_the_same_files(fields, tokenizer, tmp_path, monkeypatch):
    fields = fields | {"vocab_size": len(tokenizer)}
    source = write_checkpoint(tmp_path / "source", fields, prefix="_orig_mod.")
    write_checkpoint(source, fields, step=0)
    for order in (sorted, lambda paths: sorted(paths, reverse=True)):  # a disk may list them in any
        monkeypatch.setattr(Path, "glob", lambda path, name, real=Path.glob, order=order: order(real(path, name)))
        assert [read_upstream(source, step)[2] for step in (0, None)] == [0, 21]
    (tmp_path / "tok").mkdir()
    write_tiktoken(tmp_path / "tok" / "tokenizer.pkl", *ranks_from_backend(tokenizer.backend_tokenizer))
    summary = convert(source, tmp_path / "hf", "hf", tmp_path / "tok", texts=["a text"])
    assert summary["step"] == 21 and summary["generation"] == (1 if "window_pattern" not in fields else 2)
    backend, texts = tokenizer.backend_tokenizer, ["a text"]
    assert summary["tokenizer_ids"] == check_tokenizer(backend, *ranks_from_backend(backend), texts)
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


@pytest.mark.slow
def test_the_command_shows_nothing_of_other_libraries(tmp_path):
    source, target = write_checkpoint(tmp_path / "source", OCTOBER), tmp_path / "hf"
    words = ["convert", "--source", str(source), "--output", str(target)]
    done = subprocess.run([sys.executable, "-mnanochat_hf.cli", *words], capture_output=True, text=True, check=True)
    assert not done.stderr and [line.split(":")[0] for line in done.stdout.splitlines()] == [
        str(target),
        "weights only",
    ]


def test_native_folders_end_at_a_call_and_base_models_of_ours_get_no_loop(tokenizer, tmp_path):
    fields = OCTOBER | {"vocab_size": len(tokenizer)}
    source = write_checkpoint(tmp_path / "source", fields)
    write_tiktoken(source / "tokenizer.pkl", *ranks_from_backend(tokenizer.backend_tokenizer))
    convert(source, tmp_path / "native", "native")
    assert AutoTokenizer.from_pretrained(tmp_path / "native").response_template
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
    options = {"batch_size": 2, "max_new_tokens": 40, "do_sample": False, "eos_token_id": list(range(400))}
    assert all("<|bos|>" not in text["generated_text"] for (text,) in pipe(["An owl", "A dog is here"], **options))


def test_the_tokens_of_a_tokenizer_are_counted_without_padding_rows(tokenizer):
    shape = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    size = len(tokenizer)
    model = NanoChatForCausalLM(NanoChatConfig(**shape, vocab_size=size + 64, num_tokens=size))
    set_token_ids(model, tokenizer)
    assert model.config.eos_token_id == tokenizer.eos_token_id
    model.config.num_tokens += 1
    with pytest.raises(ValueError, match="take the model's own"):
        set_token_ids(model, tokenizer)
    model.config.update({"num_tokens": size, "token_ids": "those of another tokenizer"})
    with pytest.raises(ValueError, match="trained with other ids for the same text"):
        set_token_ids(model, tokenizer)


def content(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_old_folder_is_renewed_in_place_and_files_that_share_its_bytes_stay(chat_folder, tmp_path):
    old = make_old(shutil.copytree(chat_folder, tmp_path / "old"))
    (old / "custom_generate" / "generate.py").write_text("# old")
    settings = json.loads((old / "tokenizer_config.json").read_text())
    settings["response_template"]["fields"]["content"].pop("close_pattern")
    settings["chat_template"] = "{# before it had a file of its own #}"
    (old / "tokenizer_config.json").write_text(json.dumps(settings))
    before = content(old)
    shutil.copytree(old, tmp_path / "links", copy_function=os.link)
    with CaptureLogger(configuration_nanochat.logger) as log:
        convert(tmp_path / "links", tmp_path / "links")
    assert log.out == ""  # no advice to do what this does
    with CaptureLogger(configuration_nanochat.logger) as log:
        AutoConfig.from_pretrained(old, trust_remote_code=False)
        NanoChatConfig.from_dict(json.loads((old / "config.json").read_text()))
    assert re.findall("--output (.+)", log.out) == [str(old), "FOLDER"]
    assert content(old) == before and content(tmp_path / "links") == content(chat_folder)


@pytest.mark.parametrize("older", [True, False])
def test_templates_of_a_renewed_or_converted_folder_are_todays_unless_they_are_not_ours(
    older, chat_folder, tmp_path, monkeypatch
):  # fmt: skip
    text = "{# older #}"
    if older:
        monkeypatch.setattr(tokenizer_module, "OLD_TEMPLATES", (sha256(text.encode()).hexdigest()[:16],))
    folder = shutil.copytree(chat_folder, tmp_path / "folder")
    (folder / "chat_template.jinja").write_text(text)
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"response_template": {"fields": {}}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    expected = (TEMPLATE.read_text(), tokenizer_module.RESPONSE_TEMPLATE) if older else (text, {"fields": {}})
    save_json(folder / "metrics.json", {"weights": model_fingerprint(folder)})
    for output in (tmp_path / "copy", folder):
        cli.dispatch("convert", ["--source", str(folder), "--output", str(output)])
        loaded = AutoTokenizer.from_pretrained(output)  # as the Space does
        assert (loaded.chat_template, loaded.response_template) == expected, output
    assert load_json(folder / "metrics.json") == {"weights": model_fingerprint(folder)}  # of the new content
    if older:
        save_json(folder / "metrics.json", {"weights": "of others"})
        cli.dispatch("convert", ["--source", str(folder), "--output", str(folder)])
        assert load_json(folder / "metrics.json") == {"weights": "of others"}  # still not those of this folder


def test_bad_folders_leave_nothing_behind(tokenizer, tmp_path, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    source, out = write_checkpoint(tmp_path / "source", OCTOBER), tmp_path / "out"

    def refused(message, **options):
        with pytest.raises(ValueError, match=message):
            convert(**{"source": source, "output": out, **options})
        assert [path.name for path in tmp_path.iterdir()] == ["source"]

    refused("source exists: remove it or choose another output", output=source)  # only ours are renewed in place
    refused("exists: remove it", output=elsewhere)
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


# ---- tokenizers ---------------------------------------------------------------------------------------------------

PATTERN = r" ?\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]+|\s+"
MERGES = [b"th", b"he", b"the", b" the", b"in", b"ing", b"aa", b"aaa", "é".encode(), b"12", b" s", b" sing"]
RANKS = {bytes([i]): i for i in range(256)} | {token: 256 + i for i, token in enumerate(MERGES)}


def test_the_reference_merges_the_lowest_rank_first():
    encode = convert_tokenizer.reference_encoder(RANKS, PATTERN)
    expected = {"the": [258], " the": [259], "thhe": [256, 257], "1234": [265, ord("3"), ord("4")], "é\n": [264, 10]}
    expected |= {"aaaa": [262, 262], "aaaaa": [262, 263]}  # the pairs `aa` come before `aaa`
    assert {text: encode(text) for text in expected} == expected


def test_ranks_become_a_tokenizer_with_equal_ids_and_a_difference_is_shown():
    wrapped = wrap(backend_from_ranks(RANKS, PATTERN))
    tokenizer = wrapped.backend_tokenizer
    special = {name: 268 + i for i, name in enumerate(SPECIAL_TOKENS)}
    texts = ["in the singing aaaaaaa", "naïve café 1234567", "", "\r\n \t"]
    assert check_tokenizer(tokenizer, RANKS, PATTERN, special, texts) > 10_000
    assert wrapped.decode(wrapped("the café", add_special_tokens=False)["input_ids"]) == "the café"
    swapped = RANKS | {b"th": RANKS[b"he"], b"he": RANKS[b"th"]}
    with pytest.raises(ValueError, match=r"encode .* differently"):
        check_tokenizer(tokenizer, swapped, PATTERN, {})
    with pytest.raises(ValueError, match=r"special token <\|bos\|> has id 7 .* 268"):
        check_tokenizer(tokenizer, RANKS, PATTERN, {"<|bos|>": 7})


def test_a_trained_tokenizer_goes_to_tiktoken_and_back_and_tiktoken_itself_reads_it(tokenizer, tmp_path, monkeypatch):
    ranks, pattern, special = ranks_from_backend(tokenizer.backend_tokenizer)
    path = tmp_path / "tokenizer.pkl"
    assert len(ranks) + len(special) == len(tokenizer) and special["<|output_end|>"] == len(tokenizer) - 1
    write_tiktoken(path, ranks, pattern, special)
    assert convert_tokenizer.read_tiktoken(path) == (ranks, pattern, special)
    again = wrap(backend_from_ranks(ranks, pattern))
    text = "What is the capital of Verdania? 12 + 345 = 357\n\n日本語 🙂"
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]

    core = types.ModuleType("tiktoken.core")  # its Encoding takes its fields back in __setstate__
    core.Encoding = type("Encoding", (), {"__setstate__": lambda self, fields: setattr(self, "fields", fields)})
    monkeypatch.setitem(sys.modules, "tiktoken", types.ModuleType("tiktoken"))
    monkeypatch.setitem(sys.modules, "tiktoken.core", core)
    loaded = pickle.loads(path.read_bytes())
    assert type(loaded) is core.Encoding and loaded.fields["mergeable_ranks"] == ranks


class Evil:
    def __reduce__(self):
        return os.system, ("exit 1",)


@pytest.mark.parametrize(("content", "reason"), [
    (pickle.dumps(Evil()), r"(posix|nt).system"),
    (b"not a pickle", ""),
    (b"\x80\x03ctiktoken.core\nEncoding\n)R}b.", ""),  # no fields
    (pickle.dumps({"mergeable_ranks": {}}), ""),
    (({"a": 0}, PATTERN), "of other types"),
])  # fmt: skip
def test_what_is_no_tiktoken_encoding_is_refused(content, reason, tmp_path):
    path = tmp_path / "tokenizer.pkl"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        write_tiktoken(path, *content, {"<|bos|>": 1})
    with pytest.raises(ValueError, match=f"is no pickled tiktoken encoding: .*{reason}"):
        convert_tokenizer.read_tiktoken(path)


def test_a_tokenizer_that_upstream_cannot_express_is_refused(tokenizer):
    with pytest.raises(ValueError, match="byte-level BPE"):
        ranks_from_backend(Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    normalizing = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    normalizing.normalizer = normalizers.NFC()
    with pytest.raises(ValueError, match="does not normalize"):
        ranks_from_backend(normalizing)


# ---- the original -------------------------------------------------------------------------------------------------

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
@pytest.mark.skipif("NANOCHAT_CHECKOUT" not in os.environ, reason="set NANOCHAT_CHECKOUT")
def test_logits_equal_those_of_the_original_code(tmp_path):
    checkout = os.environ["NANOCHAT_CHECKOUT"]
    fields = JULY if "window_pattern" in Path(checkout, "nanochat", "gpt.py").read_text() else OCTOBER
    state, ids = upstream_state(fields), torch.randint(0, 100, (2, 250))
    torch.save((fields, state, ids), tmp_path / "in.pt")
    command = [sys.executable, "-c", ORIGINAL, checkout, str(tmp_path / "in.pt"), str(tmp_path / "out.pt")]
    subprocess.run(command, check=True, env=os.environ | {"NANOCHAT_DTYPE": "float32"})
    ours = logits(from_upstream(state, {"model_config": fields}), ids)
    close(ours, torch.load(tmp_path / "out.pt"), atol=5e-5)


def test_embeddings_that_bfloat16_cannot_hold_are_written_in_float32():
    model = from_upstream(upstream_state(OCTOBER), {"model_config": OCTOBER})
    model.model.embed_tokens.weight.data[0, 0] = 0.1
    table = to_upstream(model)[0]["transformer.wte.weight"]
    assert table.dtype == torch.float32 and torch.equal(table, model.model.embed_tokens.weight)


@pytest.mark.parametrize("make, num, rows", [(NanoChatConfig.first_generation, 128, 100), (NanoChatConfig, 100, 128)])
def test_tables_get_the_rows_that_upstream_has(make, num, rows):
    config = make(vocab_size=num, num_tokens=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    tables, _ = to_upstream(NanoChatForCausalLM(config))
    assert {len(tables[f"{name}.weight"]) for name in ("transformer.wte", "lm_head")} == {rows}


def test_a_model_without_a_tokenizer_calls_no_tools(tmp_path):
    assert not upstream_module.may_call_tools(tmp_path, None, None)
