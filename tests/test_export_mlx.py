"""`nanochat export --to mlx` in mlx-lm on a CPU: answers equal ours, token by token, for both generations."""

import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import openai
import pytest
import torch
from servers import free_port, start
from talker import QUESTIONS, chat_folder, talker, talker_folder  # noqa: F401
from test_model_folder import run_without_the_package
from tiny import GENERATIONS, close, greedy, make_ids, make_model
from transformers import AutoModelForCausalLM

from nanochat_hf import cli
from nanochat_hf.errors import InputError
from nanochat_hf.export import export

mlx_lm = pytest.importorskip("mlx_lm", reason="needs mlx-lm")
import mlx.core as mx  # noqa: E402
from mlx_lm.generate import generate_step  # noqa: E402


@pytest.fixture(params=GENERATIONS)
def models(request, tokenizer, tmp_path):
    """(model in torch, in mlx-lm, the exported folder); windows of five keys, two of four heads share keys."""
    mx.set_default_device(mx.cpu)
    model = make_model(request.param, vocab_size=-(-len(tokenizer) // 64) * 64 + 64, num_tokens=len(tokenizer))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    export(tmp_path / "model", tmp_path / "mlx", "mlx")
    exported = mlx_lm.load(str(tmp_path / "mlx"), trust_remote_code=True)[0]
    exported.freeze()  # as adapters of mlx-lm begin
    return model, exported, tmp_path / "mlx"


def test_logits_and_greedy_answers_are_ours_in_chunks_and_batches(models):
    model, converted, folder = models
    ids = make_ids(1, 60)
    logits = model(ids).logits[0]
    close(torch.tensor(converted(mx.array(ids.tolist())).tolist())[0], logits, atol=1e-4)
    cache, chunks = converted.make_cache(), [ids[:, a:b].tolist() for a, b in ((0, 7), (7, 8), (8, 50), (50, 60))]
    chunks = [torch.tensor(converted(mx.array(chunk), cache=cache).tolist())[0] for chunk in chunks]
    close(torch.cat(chunks), logits, atol=1e-4)
    prompts = [make_ids(1, length, seed=length) for length in (1, 9, 30)]
    expected = [greedy(model, prompt, 40)[0, prompt.shape[1] :].tolist() for prompt in prompts]
    endless = SimpleNamespace(eos_token_ids=(), decode=str)
    batch = [prompt[0].tolist() for prompt in prompts]
    answers = mlx_lm.batch_generate(converted, endless, batch, max_tokens=40, return_token_ids=True)
    assert answers.token_ids == expected
    assert [token for token, _ in generate_step(mx.array(batch[2]), converted, max_tokens=40)] == expected[2]
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(loaded(ids).logits[0], logits)
    loaded.save_pretrained(folder.parent / "copy")  # without mlx_nanochat.py
    assert "model_file" not in json.loads((folder.parent / "copy" / "config.json").read_text())


def test_a_model_that_mlx_cannot_express_is_refused_and_nothing_is_left(chat_folder, tmp_path):  # noqa: F811
    folder = shutil.copytree(chat_folder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "adapter_config.json").write_text("{}")
    for engine in ("mlx", "native", "gguf"):
        with pytest.raises(InputError, match=f"{tmp_path} is an adapter: merge it first"):
            cli.dispatch("export", ["--model", str(tmp_path), "--output", str(tmp_path / "out"), "--to", engine])
    (tmp_path / "adapter_config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    for place in (tmp_path, folder):
        with pytest.raises(InputError, match=f"{place} is no checkpoint folder"):
            export(place, tmp_path / "out", "mlx")
    shutil.copyfile(chat_folder / "config.json", folder / "config.json")
    weights = (folder / "model.safetensors").read_bytes()
    wider = {"head_dim": 64}, "do not belong together: see model.layers.0.self_attn.k_proj.weight"
    fewer = {"num_tokens": 99}, r"a tokenizer of \d+ tokens and a model of 99: see num_tokens"
    config = json.loads((folder / "config.json").read_text())
    damaged = [("config.json", json.dumps(config | fields).encode(), message) for fields, message in (wider, fewer)]
    damaged += [("model.safetensors", text, "no model in .* that can be read") for text in (weights[:-1], b"{}")]
    for name, content, message in [*damaged, ("tokenizer.json", b"{}", "no tokenizer")]:
        (folder / name).write_bytes(content)
        with pytest.raises(InputError, match=message):
            export(folder, tmp_path / "out", "mlx")
        (folder / "model.safetensors").write_bytes(weights)
        (folder / "config.json").write_text(json.dumps(config))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert all(f"'{tmp_path}/a b'" in line for line in export(chat_folder, tmp_path / "a b", "mlx"))


def mlx_lm_command(name: str, *words) -> list[str]:
    return [sys.executable, "-m", "mlx_lm", name, "--trust-remote-code", *map(str, words)]


@pytest.mark.slow
def test_the_server_answers_openai_clients_and_needs_no_package(chat_folder, tokenizer, tmp_path):  # noqa: F811
    export(chat_folder, tmp_path / "mlx", "mlx")
    stops = tokenizer.convert_tokens_to_ids(["<|assistant_end|>", "<|python_end|>"])  # as every chat stage saves them
    (tmp_path / "mlx" / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
    code = """
import mlx.core as mx
mx.set_default_device(mx.cpu)
from mlx_lm import generate, load
model, tokenizer = load("mlx", tokenizer_config=dict(trust_remote_code=True), trust_remote_code=True)
prompt = tokenizer.apply_chat_template([dict(role="user", content="Hello")], add_generation_prompt=True)
print(generate(model, tokenizer, prompt, max_tokens=100).strip())
"""
    hello = QUESTIONS["Hello"][0][1]
    assert run_without_the_package(code, tmp_path) == hello
    port = free_port()
    process, address = start(mlx_lm_command("server", "--model", tmp_path / "mlx", "--port", port), port, "/health")
    try:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)

        def ask(question: str) -> str:
            messages = [{"role": "user", "content": question}]
            answer = client.chat.completions.create(model="default_model", messages=messages, temperature=0)
            return answer.choices[0].message.content

        assert ask("Hello") == hello
        assert ask("What is 12 * 34?") == "<|python_start|>12*34"  # where the call ends
    finally:
        process.terminate()
        process.wait(20)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantized_folder_is_smaller_and_answers_alike(bits, chat_folder, tmp_path):  # noqa: F811
    export(chat_folder, tmp_path / "mlx", "mlx")
    words = ["--hf-path", tmp_path / "mlx", "--mlx-path", tmp_path / "small", "-q", "--q-bits", bits]
    subprocess.run(mlx_lm_command("convert", *words), check=True, capture_output=True)
    before, after = ((tmp_path / name / "model.safetensors").stat().st_size for name in ("mlx", "small"))
    assert after < before * bits / 24
    model, tokenizer = mlx_lm.load(str(tmp_path / "small"), trust_remote_code=True)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], add_generation_prompt=True)
    answer = mlx_lm.generate(model, tokenizer, prompt, max_tokens=100)
    assert QUESTIONS["Hello"][0][1][: 64 if bits == 8 else 10] in answer
