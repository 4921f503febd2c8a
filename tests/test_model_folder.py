"""A saved model in the ecosystem: Auto classes, remote code, pipeline, lm_eval, peft, quantizers, copies of chats.

`pip install bitsandbytes` runs its test, on a CPU. torchao: test_export_int8.py.
"""

import copy
import json
import os
import shutil
import site
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from talker import QUESTIONS
from tiny import GENERATIONS, close, make_ids, make_model, randomize
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, TextGenerationPipeline, pipeline
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.testing_utils import CaptureLogger
from transformers.utils import PushToHubMixin

from nanochat_hf.convert.upstream import convert
from nanochat_hf.errors import InputError
from nanochat_hf.loading import is_quantized
from nanochat_hf.model import NanoChatForCausalLM, generation_nanochat
from nanochat_hf.serve.engine import Engine
from nanochat_hf.train.model_setup import build_model, load_chat_model
from nanochat_hf.train.sft import ChatConfig

CHATS = [[{"role": "user", "content": question}] for question in QUESTIONS]
GREEDY = {"max_new_tokens": 120, "do_sample": False}
LOOP = {"generate.py", "tools.py"}
MATRICES = {"q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"}
ANSWER = "<|output_start|>408<|output_end|>It is 408.<|assistant_end|>"
load = AutoModelForCausalLM.from_pretrained


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
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"} | variables
    command = [sys.executable, "-I", "-S", "-c", start + code]
    run = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout.strip().splitlines()[-1]


@pytest.mark.parametrize("generation", GENERATIONS)
def test_save_and_load_keep_every_logit(generation, tmp_path):
    model, ids = make_model(generation), make_ids(2, 20)
    model.generation_config = GenerationConfig(eos_token_id=[3, 4], pad_token_id=0, do_sample=False)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = load(tmp_path)
    assert type(loaded) is NanoChatForCausalLM and loaded.generation_config.eos_token_id == [3, 4]
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    half = load(tmp_path, dtype=torch.bfloat16)
    assert half.model.rotary_emb.inv_freq.dtype == torch.float32
    assert (half(ids).logits - model(ids).logits).abs().mean() < 0.1


@pytest.mark.slow
def test_pipeline_and_lm_eval_work_on_a_saved_folder(tiny_model, tokenizer, tmp_path):
    randomize(tiny_model).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    task = {"task": "animals", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "animals.jsonl"}},
            "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "A cat is",
            "doc_to_choice": ["grey.", "two"], "doc_to_target": 0}  # fmt: skip
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
    for choice, [[value, _]] in zip(task["doc_to_choice"], json.loads(samples.read_text())["resps"]):
        context, row = tokenizer("A cat is")["input_ids"], tokenizer(f"A cat is {choice}", return_tensors="pt")
        tokens = row["input_ids"][0, len(context) :]
        with torch.no_grad():
            logprobs = tiny_model(row["input_ids"]).logits[0, len(context) - 1 : -1].log_softmax(-1)
        assert float(value) == pytest.approx(logprobs.gather(1, tokens[:, None]).sum().item(), abs=1e-3)


@pytest.mark.parametrize("generation", GENERATIONS)
def test_lora_adapts_attention_and_mlp_by_default_merges_and_reloads(generation, tmp_path):
    base, ids = make_model(generation), make_ids(2, 12)
    before = base(ids).logits.detach()
    torch.manual_seed(0)  # of the adapters
    model = get_peft_model(base, LoraConfig(r=4, task_type="CAUSAL_LM"))
    assert {name.split(".")[-1] for name in model.targeted_module_names} == MATRICES
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=5.0)
    for _ in range(3):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    tuned = model(input_ids=ids).logits.detach()
    assert (tuned - before).abs().max() > 0.01
    model.save_pretrained(tmp_path / "adapter")
    close(PeftModel.from_pretrained(make_model(generation), tmp_path / "adapter")(input_ids=ids).logits, tuned)
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    close(load(tmp_path / "merged")(ids).logits, tuned)


def test_resizing_the_vocabulary_resizes_the_value_embeddings_and_the_number_of_tokens_too():
    model, ids = make_model(num_tokens=None), make_ids(1, 10)
    before = model(ids).logits
    model.resize_token_embeddings(140, mean_resizing=False)
    assert all(table.weight.shape[0] == 140 for table in model.model.value_embeds.values())
    assert model.config.vocab_size == 140
    close(model(ids).logits[..., :128], before)
    model(torch.full((1, 3), 139))  # a new token has a value embedding
    model = make_model()
    model.resize_token_embeddings(105, pad_to_multiple_of=64)
    assert (model.config.vocab_size, model.config.num_tokens) == (128, 105)
    assert model(make_ids(1, 4)).logits.shape[-1] == 105


# ---- the pipeline: texts end at the end mark ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def chat(chat_folder):
    return pipeline("text-generation", model=str(chat_folder), trust_remote_code=True)


def expected(chats) -> list[str]:
    return ["".join(text for kind, text in QUESTIONS[c[0]["content"]] if kind == "text") for c in chats]


def contents(pipe, **options) -> list[list[str]]:
    """The contents of all answers of each chat."""
    return [[r["generated_text"][-1]["content"] for r in records] for records in pipe(CHATS, **GREEDY, **options)]


def test_contents_of_answers_have_no_marks_also_under_an_older_response_template(chat, chat_folder, monkeypatch):
    answers = [[text] for text in expected(CHATS)]
    assert contents(chat, batch_size=4) == answers
    beams = contents(chat, num_return_sequences=2, num_beams=2)
    assert [texts[:1] for texts in beams] == answers and not any("<|" in text for texts in beams for text in texts)
    options = {"model": str(chat_folder), "trust_remote_code": True, "pipeline_class": TextGenerationPipeline}
    assert contents(pipeline("text-generation", **options), batch_size=4) == answers  # transformers' own
    template = copy.deepcopy(chat.tokenizer.response_template)
    del template["fields"]["content"]["close_pattern"]
    template["fields"]["content"]["close"] = "<|assistant_end|>"
    monkeypatch.setattr(chat.tokenizer, "response_template", template)
    assert contents(chat, batch_size=4) == answers


def test_prefilled_replies_end_at_the_end_mark_and_are_parsed(chat):
    begun = [[*CHATS[0], {"role": "assistant", "content": ""}], [*CHATS[3], {"role": "assistant", "content": "안녕"}]]
    called, greeted = (records[0]["generated_text"][-1] for records in chat(begun, **GREEDY, batch_size=2))
    assert called["content"] == "It is 408." and called["tool_steps"] == [{"call": "12*34", "result": "408"}]
    assert greeted == {"role": "assistant", "content": QUESTIONS["Hello"][0][1]}


def test_plain_text_and_new_text_end_at_the_end_mark_but_the_prompt_is_left_alone(chat):
    texts = [chat.tokenizer.apply_chat_template(c, add_generation_prompt=True, tokenize=False) for c in CHATS]
    for text, (record,) in zip(texts, chat(texts, **GREEDY, batch_size=4, add_special_tokens=False)):
        answer = record["generated_text"].removeprefix(text)
        assert answer != record["generated_text"] and "<|assistant_end|>" not in answer and "<|bos|>" not in answer
    hello = chat(CHATS, **GREEDY, batch_size=4, return_full_text=False)[3][0]["generated_text"]
    assert hello == QUESTIONS["Hello"][0][1]
    assert "generated_token_ids" in chat(CHATS[:1], **GREEDY, return_tensors=True)[0][0]


@pytest.mark.slow
def test_a_folder_brings_its_pipeline(chat_folder, tmp_path):
    shutil.copytree(chat_folder, tmp_path / "model")
    begun = [*CHATS[3], {"role": "assistant", "content": "안녕"}]
    (tmp_path / "chats.json").write_text(json.dumps([*CHATS, begun]))
    code = """
import json
from transformers import pipeline
options = {"max_new_tokens": 120, "do_sample": False}
chats = json.load(open("chats.json"))
pipe = pipeline("text-generation", model="model", trust_remote_code=True)
contents = [r[0]["generated_text"][-1]["content"] for r in pipe(chats, **options, batch_size=5)]
pipe.save_pretrained("again")
again = pipeline("text-generation", model="again", trust_remote_code=True)
assert type(again).__name__ == "NanoChatHFTextGenerationPipeline"
assert [again(c, **options)[0]["generated_text"][-1]["content"] for c in chats] == contents
print(json.dumps(contents))
"""
    assert json.loads(run_without_the_package(code, tmp_path)) == [*expected(CHATS), *expected(CHATS[3:])]


# ---- copies keep the tool loop ------------------------------------------------------------------------------------


def files(folder) -> set[str]:
    return {path.name for path in (folder / "custom_generate").glob("*.py")}


def answer(model, tokenizer, question=CHATS[0]) -> str:
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    return tokenizer.decode(model.generate(**inputs, **GREEDY)[0, inputs["input_ids"].shape[1] :])


def test_copies_of_a_chat_model_keep_the_tool_loop(chat_folder, talker, tmp_path, monkeypatch):
    model, tokenizer = load(chat_folder, trust_remote_code=True), talker[1]
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    tuned = get_peft_model(model, LoraConfig(r=2, task_type="CAUSAL_LM"))
    tuned.save_pretrained(tmp_path / "adapter")
    tuned.merge_and_unload().save_pretrained(tmp_path / "merged")
    load(tmp_path / "merged").bfloat16().save_pretrained(tmp_path / "again")
    (tmp_path / "pushed").mkdir()
    monkeypatch.setattr(PushToHubMixin, "_upload_modified_files", lambda *words: None)
    model._upload_modified_files(tmp_path / "pushed")
    for copied in ("sharded", "merged", "again", "pushed"):
        assert files(tmp_path / copied) == LOOP, copied
    source = chat_folder / "custom_generate" / "generate.py"
    assert (tmp_path / "again" / "custom_generate" / "generate.py").read_bytes() == source.read_bytes()
    adapted = load(tmp_path / "adapter", trust_remote_code=True)
    assert not isinstance(adapted, PeftModel) and answer(adapted, tokenizer).endswith(ANSWER)
    with pytest.warns(UserWarning, match="no tokenizer in .*: calls are not answered"):
        answer(load(tmp_path / "merged", trust_remote_code=True), tokenizer)
    tokenizer.save_pretrained(tmp_path / "merged")
    assert answer(load(tmp_path / "merged", trust_remote_code=True), tokenizer).endswith(ANSWER)


def test_a_base_model_gets_no_tool_loop_and_an_existing_one_is_left_alone(talker_folder, chat_folder, tmp_path):
    load(talker_folder).save_pretrained(tmp_path / "base")
    assert not (tmp_path / "base" / "custom_generate").exists()
    (tmp_path / "own" / "custom_generate").mkdir(parents=True)
    (tmp_path / "own" / "custom_generate" / "generate.py").write_text("# mine")
    load(chat_folder).save_pretrained(tmp_path / "own")
    assert (tmp_path / "own" / "custom_generate" / "generate.py").read_text() == "# mine"
    load(chat_folder).save_pretrained(tmp_path / "other", is_main_process=False)
    assert not (tmp_path / "other" / "custom_generate").exists()


@pytest.mark.parametrize("trust,options", [(True, {}), (None, {"subfolder": "model"})])
def test_copies_keep_the_loop_of_relative_and_subfolders(options, trust, chat_folder, tmp_path, monkeypatch):
    shutil.copytree(chat_folder, tmp_path / "run" / "model")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    model = load("run" if options else "run/model", trust_remote_code=trust, **options)
    monkeypatch.chdir(tmp_path / "elsewhere")
    model.save_pretrained("copy")
    assert files(tmp_path / "elsewhere" / "copy") == LOOP


@pytest.mark.parametrize("state", ["cached", "unknown", "absent", "deleted"])
def test_copies_of_cached_hub_models_keep_the_loop_or_say_so(state, chat_folder, tmp_path):
    repo, commit = tmp_path / "cache" / "models--you--chat", "a" * 40
    snapshot = shutil.copytree(chat_folder, repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    if state in ("unknown", "absent"):
        shutil.rmtree(snapshot / "custom_generate")
    if state == "absent":  # how the cache notes that the repository has no such file
        (repo / ".no_exist" / commit / "custom_generate").mkdir(parents=True)
        for file in LOOP:
            (repo / ".no_exist" / commit / "custom_generate" / file).touch()
    model = load(snapshot) if state == "deleted" else load("you/chat", cache_dir=tmp_path / "cache")
    if state == "deleted":  # a folder
        shutil.rmtree(snapshot)
    generation_nanochat.logger.warning_once.cache_clear()
    with CaptureLogger(generation_nanochat.logger) as log:
        model.save_pretrained(tmp_path / "copy")
    assert files(tmp_path / "copy") == (LOOP if state == "cached" else set())
    source = snapshot if state == "deleted" else "you/chat"
    assert (f"if this is a chat model, copy it from {source}" in log.out) == (state in ("unknown", "deleted"))


# ---- quantized copies ---------------------------------------------------------------------------------------------


def test_quantizers_and_lora_adapt_every_matrix_and_leave_head_and_gates_alone():
    model = make_model()
    types = {name.split(".")[-1]: type(module) for name, module in model.named_modules() if hasattr(module, "weight")}
    assert all(types[name] is nn.Linear for name in (*MATRICES, "lm_head"))
    assert not any(issubclass(types[gate], nn.Linear) for gate in ("smear_gate", "ve_gate"))
    assert get_keys_to_not_convert(model) == ["lm_head"]
    model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert {name.split(".")[-1] for name in model.targeted_module_names} == MATRICES


def test_code_that_reads_weights_refuses_quantized_ones(talker, chat_folder, tmp_path, monkeypatch):
    """Without their scales, quantized weights are another model."""
    model, tokenizer = talker
    assert not is_quantized(model)
    packed = copy.deepcopy(model)
    layer = packed.model.layers[0].mlp.fc1
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.int8), requires_grad=False)
    assert is_quantized(packed)
    with pytest.raises(InputError, match="this model is quantized, and fast generation needs the weights themselves"):
        Engine(packed, tokenizer)
    shutil.copytree(chat_folder, tmp_path / "quantized")
    keys = json.loads((chat_folder / "config.json").read_text()) | {"quantization_config": {"quant_method": "quanto"}}
    (tmp_path / "quantized" / "config.json").write_text(json.dumps(keys))
    with pytest.raises(ValueError, match="is quantized: convert the unquantized model"):
        convert(tmp_path / "quantized", tmp_path / "out", "nanochat")
    info = dict.fromkeys(("missing_keys", "mismatched_keys", "unexpected_keys"), ())
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", lambda *args, **kwargs: (packed, info))
    with pytest.raises(InputError, match="is quantized and cannot be trained"):
        load_chat_model(str(chat_folder), ChatConfig(), tokenizer)
    plan = SimpleNamespace(generation=2, vocab_size=packed.config.vocab_size)
    with pytest.raises(InputError, match="is quantized and cannot be trained"):
        build_model(plan, str(chat_folder), tokenizer, torch.device("cpu"), sharded=False)


@pytest.mark.slow
def test_quantized_models_answer_the_same_and_take_lora(talker, chat_folder, tmp_path):
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, **options)
    (original, tokenizer), model = talker, load(chat_folder, quantization_config=config)
    model.save_pretrained(tmp_path)  # before it ran: bitsandbytes 0.50 saves 4-bit weights in the CPU's order after
    for copied in (model, load(tmp_path)):
        assert is_quantized(copied)
        assert [answer(copied, tokenizer, c) for c in CHATS] == [answer(original, tokenizer, c) for c in CHATS]
        for name, gate in original.named_parameters():
            if "gate" in name:
                assert torch.equal(copied.get_parameter(name), gate), name
    assert files(tmp_path) == LOOP
    model = get_peft_model(prepare_model_for_kbit_training(model), LoraConfig(r=4, task_type="CAUSAL_LM")).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids, losses = torch.arange(1, 33)[None], []
    for _ in range(8):
        loss = model(input_ids=ids, labels=ids).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.8 * losses[0]
