"""A saved model in the ecosystem: Auto classes, shards, remote code, pipeline, lm_eval, peft, a grown vocabulary."""

import json
import os
import site
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_standin import Hub
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import GENERATIONS, close, greedy, make_ids, make_model, randomize
from transformers import AutoModelForCausalLM, GenerationConfig

from nanochat_hf.model import NanoChatForCausalLM


@pytest.mark.parametrize("generation", GENERATIONS)
def test_save_and_load_keep_every_logit(generation, tmp_path):
    model, ids = make_model(generation), make_ids(2, 20)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is NanoChatForCausalLM
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.model.rotary_emb.inv_freq.dtype == torch.float32
    assert (half(ids).logits - model(ids).logits).abs().mean() < 0.1


def run_without_the_package(code: str, folder, package: bool = False, **variables: str) -> str:
    """The last line that `code` prints in a fresh process, in `folder`, for which nanochat_hf is not installed.

    With `package` it is imported, so that both can be compared.
    """
    # -S leaves out the .pth files, through which an editable install is found
    start = f"""
import importlib.util, os, sys
os.chdir({str(folder)!r})
sys.path += {site.getsitepackages()!r}
assert importlib.util.find_spec("nanochat_hf") is None
"""
    if package:
        start += f"sys.path.insert(0, {str(Path(__file__).parent.parent)!r})\nimport nanochat_hf\n"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}
    environment |= variables
    command = [sys.executable, "-I", "-S", "-c", start + code]
    run = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout.strip().splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("generation", GENERATIONS)
def test_a_saved_folder_needs_no_package(generation, tmp_path):
    model, ids = make_model(generation), make_ids(1, 20)
    model.save_pretrained(tmp_path / "model")
    torch.save((ids, model(ids).logits, greedy(model, ids, 5)), tmp_path / "expected.pt")
    code = """
import torch
from transformers import AutoModel, AutoModelForCausalLM
ids, logits, generated = torch.load("expected.pt")
model = AutoModelForCausalLM.from_pretrained("model", trust_remote_code=True)
assert torch.equal(model(ids).logits, logits)
assert model.generate(ids, max_new_tokens=5, do_sample=False).tolist() == generated.tolist()
model.save_pretrained("again")
again = AutoModelForCausalLM.from_pretrained("again", trust_remote_code=True)
assert torch.equal(again(ids).logits, logits)
assert AutoModel.from_pretrained("model", trust_remote_code=True)(ids).last_hidden_state.shape == (1, 20, 32)
print("equal")
"""
    assert run_without_the_package(code, tmp_path) == "equal"


@pytest.mark.slow
def test_push_to_hub_makes_a_repository_that_needs_no_package(tmp_path):
    model, ids = make_model(), make_ids(1, 20)
    model.save_pretrained(tmp_path / "model")
    torch.save((ids, model(ids).logits), tmp_path / "expected.pt")
    with Hub() as hub:
        variables = {"HF_ENDPOINT": hub.url, "HF_TOKEN": hub.token, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        push = "import nanochat_hf; nanochat_hf.NanoChatForCausalLM.from_pretrained('model').push_to_hub('you/small')"
        subprocess.run([sys.executable, "-c", push], check=True, cwd=tmp_path, env=os.environ | variables)
        pushed = hub.repos["models", "you/small"].files("main")[1]
        assert {"config.json", "configuration_nanochat.py", "modeling_nanochat.py", "model.safetensors"} <= set(pushed)
        assert json.loads(pushed["config.json"])["auto_map"]["AutoModelForCausalLM"].startswith("modeling_nanochat.")
        code = """
import torch
from transformers import AutoModelForCausalLM
ids, logits = torch.load("expected.pt")
assert torch.equal(AutoModelForCausalLM.from_pretrained("you/small", trust_remote_code=True)(ids).logits, logits)
print("equal")
"""
        assert run_without_the_package(code, tmp_path, **variables) == "equal"


@pytest.mark.slow
def test_pipeline_and_lm_eval_work_on_a_saved_folder(tiny_model, tokenizer, tmp_path):
    randomize(tiny_model).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    task = {
        "task": "animals",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": "animals.jsonl"}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "A cat is",
        "doc_to_choice": ["grey.", "two"],
        "doc_to_target": 0,
    }
    (tmp_path / "animals.yaml").write_text(json.dumps(task))
    (tmp_path / "animals.jsonl").write_text(json.dumps({"question": "cat"}))
    code = """
from transformers import pipeline
chat = pipeline("text-generation", model="model", trust_remote_code=True, device="cpu")
answer = chat([{"role": "user", "content": "Hello!"}], max_new_tokens=4)[0]["generated_text"][-1]
assert answer["role"] == "assistant" and isinstance(answer["content"], str), answer
from lm_eval.__main__ import cli_evaluate
sys.argv = ["lm_eval", "run", "--model", "hf", "--model_args", "pretrained=model,trust_remote_code=True,dtype=float32"]
sys.argv += "--tasks animals --include_path . --device cpu --batch_size 1 --log_samples --output_path out".split()
cli_evaluate()
"""
    run_without_the_package(code, tmp_path)
    [samples] = (tmp_path / "out").rglob("samples_animals*.jsonl")
    answered = json.loads(samples.read_text())["resps"]
    for choice, [[value, _]] in zip(task["doc_to_choice"], answered):
        context, row = tokenizer("A cat is")["input_ids"], tokenizer(f"A cat is {choice}", return_tensors="pt")
        said = row["input_ids"][0, len(context) :]
        with torch.no_grad():
            logprobs = tiny_model(row["input_ids"]).logits[0, len(context) - 1 : -1].log_softmax(-1)
        assert float(value) == pytest.approx(logprobs.gather(1, said[:, None]).sum().item(), abs=1e-3)


@pytest.mark.parametrize("generation", GENERATIONS)
def test_lora_adapts_attention_and_mlp_by_default_merges_and_reloads(generation, tmp_path):
    base, ids = make_model(generation), make_ids(2, 12)
    before = base(ids).logits.detach()
    torch.manual_seed(0)  # of the adapters
    model = get_peft_model(base, LoraConfig(r=4, task_type="CAUSAL_LM"))
    adapted = {name.split(".")[-1] for name in model.targeted_module_names}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=5.0)
    for _ in range(3):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    tuned = model(input_ids=ids).logits.detach()
    assert (tuned - before).abs().max() > 0.01
    model.save_pretrained(tmp_path / "adapter")
    close(PeftModel.from_pretrained(make_model(generation), tmp_path / "adapter")(input_ids=ids).logits, tuned)
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    close(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(ids).logits, tuned)


def test_resizing_the_vocabulary_resizes_the_value_embeddings_too():
    model, ids = make_model(num_tokens=None), make_ids(1, 10)
    before = model(ids).logits
    model.resize_token_embeddings(140, mean_resizing=False)
    assert all(table.weight.shape[0] == 140 for table in model.model.value_embeds.values())
    assert model.config.vocab_size == 140
    close(model(ids).logits[..., :128], before)
    model(torch.full((1, 3), 139))  # a new token has a value embedding
    model.resize_token_embeddings(110, pad_to_multiple_of=64)
    assert model.config.vocab_size == 128


def test_resizing_moves_the_number_of_tokens_along():
    model = make_model()
    model.resize_token_embeddings(105, pad_to_multiple_of=64)
    assert (model.config.vocab_size, model.config.num_tokens) == (128, 105)
    assert model(make_ids(1, 4)).logits.shape[-1] == 105


def test_tied_embeddings_are_one_tensor(tmp_path):
    model = make_model(1, tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    close(AutoModelForCausalLM.from_pretrained(tmp_path)(make_ids(1, 5)).logits, model(make_ids(1, 5)).logits)


def test_generation_defaults_are_saved_with_the_model(tmp_path):
    model = make_model()
    model.generation_config = GenerationConfig(eos_token_id=[3, 4], pad_token_id=0, do_sample=False)
    model.save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).generation_config.eos_token_id == [3, 4]
