"""GGUF: the file is a Qwen3 that computes what our model does, in transformers and llama.cpp; the rest is refused."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import gguf
import pytest
import torch
from tiny import make_config, make_ids, randomize, relative
from transformers import Qwen3Config, Qwen3ForCausalLM

from nanochat_hf.convert.native import renew
from nanochat_hf.data.tokenizer import load_tokenizer, plain_backend, train_bpe
from nanochat_hf.errors import InputError
from nanochat_hf.export import export
from nanochat_hf.loading import load_model
from nanochat_hf.model import NanoChatForCausalLM


def make_folder(folder, digit_group=1, normalization=None, generation=1, **fields):
    tokenizer = train_bpe(["one 12 two 345 three!"], 270, digit_group, normalization)
    fields = {"hidden_size": 64, "num_tokens": 270, "final_logit_softcapping": None} | fields
    randomize(NanoChatForCausalLM(make_config(generation, vocab_size=320, **fields))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    renew(folder)  # adds the model's code
    return folder


def read(folder) -> tuple[Qwen3ForCausalLM, dict]:
    """transformers' Qwen3 with the shape and the weights of a .gguf, and its metadata."""
    reader = gguf.GGUFReader(next(folder.glob("*.gguf")))
    facts = {name: field.contents() for name, field in reader.fields.items()}
    model = Qwen3ForCausalLM(Qwen3Config(
        vocab_size=len(facts["tokenizer.ggml.tokens"]), hidden_size=facts["qwen3.embedding_length"],
        intermediate_size=facts["qwen3.feed_forward_length"], num_hidden_layers=facts["qwen3.block_count"],
        num_attention_heads=facts["qwen3.attention.head_count"], head_dim=facts["qwen3.attention.key_length"],
        num_key_value_heads=facts["qwen3.attention.head_count_kv"], tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": facts["qwen3.rope.freq_base"]},
        rms_norm_eps=facts["qwen3.attention.layer_norm_rms_epsilon"], attention_bias=False, use_sliding_window=False,
    ))  # fmt: skip
    tensors = {t.name: torch.tensor(gguf.dequantize(t.data, t.tensor_type)) for t in reader.tensors}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, facts["qwen3.block_count"])
    model.load_state_dict({name: tensors.pop(names.get_name(name, (".weight",))) for name in model.state_dict()})
    assert not tensors
    return model.eval(), facts


OTHER = {"qk_scale": 1.2, "head_dim": 32, "rms_norm_eps": 1e-2}
OTHER["rope_parameters"] = {"rope_type": "default", "rope_theta": 100.0}


@torch.no_grad()
@pytest.mark.parametrize("fields", [{}, OTHER])
def test_the_file_is_a_qwen3_with_the_same_logits(tmp_path, fields):
    source = make_folder(tmp_path / "model", **fields)
    model, ids = load_model(source), make_ids(2, 60)
    logits, bounds = model(ids).logits, {"f32": 1e-4, "f16": 3e-3, "bf16": 2e-2, "q8_0": 4e-2}
    for outtype, bound in bounds.items():
        lines = export(source, tmp_path / outtype, "gguf", outtype=outtype)
        assert f"{tmp_path / outtype}/model-{outtype.upper()}.gguf" in lines[-1]
        qwen3, facts = read(tmp_path / outtype)
        assert relative(qwen3(ids).logits, logits) < bound
    token = {name: facts[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "eom")}
    tokenizer = load_tokenizer(source)
    assert tokenizer.convert_ids_to_tokens(token.values()) == ["<|bos|>", "<|assistant_end|>", "<|python_end|>"]
    merges = json.loads((source / "tokenizer.json").read_text())["model"]["merges"]
    assert facts["tokenizer.ggml.merges"] == [" ".join(pair) for pair in merges]
    control = [i for i, kind in enumerate(facts["tokenizer.ggml.token_type"]) if kind == 3]  # no text spells these
    assert control == sorted(tokenizer.all_special_ids)
    assert facts["tokenizer.chat_template"] == tokenizer.chat_template and facts["qwen3.context_length"] == 64
    assert facts["general.quantization_version"] == gguf.GGML_QUANT_VERSION
    assert facts["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q8_0
    assert facts["qwen3.rope.dimension_count"] == facts["qwen3.attention.key_length"]
    text = (tmp_path / "f16" / "Modelfile").read_text()
    assert text.startswith("FROM ./model-F16.gguf\nTEMPLATE") and text.endswith("\nPARAMETER num_ctx 64\n")


@pytest.mark.parametrize("options, fields, words", [
    ({}, {"generation": 2}, "generation 1 only.*mlx or onnx"),
    ({}, {"window_pattern": "SL"}, "train with window_pattern L"),
    ({}, {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "RoPE .* the folder itself"),
    ({}, {"final_logit_softcapping": 15.0}, "greedy answers are right.*final_logit_softcapping: null"),
    ({}, {"digit_group": 2}, "pairs of digits.*digit_group: 1"),
    ({}, {"normalization": "nfc"}, "not normalized"),
    ({"allow_inexact": True}, {"num_tokens": 300}, "tokenizer of 270 tokens and a model of 300"),
    ({"outtype": "q8_0"}, {"hidden_size": 48}, "rows of 48.*--outtype f16"),
])  # fmt: skip
def test_what_llama_cpp_cannot_carry_is_refused(tmp_path, options, fields, words):
    source = make_folder(tmp_path / "model", **fields)
    with pytest.raises(InputError, match=words):
        export(source, tmp_path / "out", "gguf", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_inexact_file_says_so(tmp_path):
    source = make_folder(tmp_path / "model", digit_group=2, final_logit_softcapping=15.0)
    lines = export(source, tmp_path / "out", "gguf", allow_inexact=True)
    _, facts = read(tmp_path / "out")
    for text in ("\n".join(lines), facts["general.description"], (tmp_path / "out" / "README.md").read_text()):
        assert "not exact: numbers" in text and "not exact: logits are softcapped at 15" in text


def node_modules() -> Path:
    folder = Path(os.environ.get("NODE_MODULES", "node_modules"))
    if not shutil.which("node") or not (folder / "node-llama-cpp").is_dir():
        pytest.skip("needs node, and node-llama-cpp in ./node_modules or $NODE_MODULES: npm install node-llama-cpp")
    return folder.resolve()


def random_text(rng: random.Random) -> str:
    """Words, numbers, contractions, blanks, signs and characters of many scripts, in any order."""
    parts = ["'s", "'LL", "''ve", "\r\n", " \n ", "\n\n", "   ", "\t", "\u00a0", "\u3000", "<|bos|>", "½", "Ⅷ", "१२"]
    scripts = [(0x20, 0x7F), (0xA0, 0x600), (0x900, 0xE00), (0x3040, 0x3100), (0xAC00, 0xD7A4), (0x1F300, 0x1F700)]
    words = ["the", "Capital", " of", " naïve", "don't", "x1y2", "<|user", "e\u0301"]
    kinds = [
        lambda: rng.choice(parts), lambda: rng.choice(words), lambda: str(rng.randrange(10**9)),
        lambda: "".join(chr(rng.randrange(*rng.choice(scripts))) for _ in range(5)),
    ]  # fmt: skip
    return "".join(rng.choice(kinds)() for _ in range(rng.randint(1, 12)))


@pytest.mark.slow
@torch.no_grad()
def test_llama_cpp_computes_the_same_on_a_model_of_the_recipe_key(tmp_path):
    modules, run, out = node_modules(), tmp_path / "run", tmp_path / "out"
    keys = "generation=1 final_logit_softcapping=null depth=2 num_iterations=20 matrix_lr=0.04 embedding_lr=0.1"
    nanochat, stages = [sys.executable, "-m", "nanochat_hf.cli"], ["--run-dir", run, "--stages", "tokenizer,base"]
    subprocess.run([*nanochat, "run", "cpu-demo", *stages, *(f"base.{key}" for key in keys.split())], check=True)
    options = ["--outtype", "f32", "--output", out]
    subprocess.run([*nanochat, "export", "--model", run / "base", "--to", "gguf", *options], check=True)
    model, tokenizer, rng = load_model(run / "base"), load_tokenizer(run / "base"), random.Random(0)
    assert model.config.final_logit_softcapping is None
    prompts, answers = [make_ids(1, length) for length in (3, 40)], []
    for ids in prompts:
        answer = model.generate(ids, max_new_tokens=200, do_sample=False, eos_token_id=None)
        answers.append(answer[0, ids.shape[1] :].tolist())
    prompts = [ids[0].tolist() for ids in prompts]
    forced = [*prompts[1], *tokenizer.convert_tokens_to_ids(["<|assistant_end|>", "<|python_end|>"])]
    strings = [random_text(rng) for _ in range(10_000)]
    ask = {"model": str(out / "model-F32.gguf"), "prompts": prompts, "length": 200}
    (tmp_path / "in.json").write_text(json.dumps(ask | {"forced": forced, "strings": strings}))
    os.symlink(modules, tmp_path / "node_modules")
    shutil.copy(Path(__file__).with_name("llama_cpp.mjs"), tmp_path)
    subprocess.run(["node", "llama_cpp.mjs", "in.json", "out.json"], cwd=tmp_path, check=True)
    reply = json.loads((tmp_path / "out.json").read_text())
    assert reply["answers"] == answers and {*forced[-2:]} <= {*reply["ends"]}
    assert reply["ids"] == [e.ids for e in plain_backend(tokenizer).encode_batch(strings, add_special_tokens=False)]
    expected = model(torch.tensor([forced])).logits[0].log_softmax(-1)
    for log_p, pairs in zip(expected, reply["probabilities"]):
        q = torch.tensor([p for _, p in sorted(pairs)]).clamp(min=1e-30)
        assert (log_p.exp() * (log_p - (q / q.sum()).log())).sum() < 1e-5
