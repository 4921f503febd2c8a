"""TRL's trainers given a model by its name: they must train that model and not transformers' `nanochat`."""

import json
import shutil

import pytest
import torch
import transformers
from old_folder import make_old
from talker import chat_folder, rows, talker, talker_folder  # noqa: F401
from test_model_folder import run_without_the_package
from transformers import AutoConfig
from trl.trainer.utils import create_model_from_path

from nanochat_hf.model import NanoChatForCausalLM, NanoChatModel


def test_transformers_has_no_class_of_our_names():
    assert not [c for c in (NanoChatForCausalLM, NanoChatModel) if hasattr(transformers, c.__name__)]


def test_trl_builds_our_class_from_a_folder_of_today_and_from_an_old_one(talker_folder, tmp_path):  # noqa: F811
    old = make_old(shutil.copytree(talker_folder, tmp_path / "old"))
    for folder in (talker_folder, old):
        assert type(create_model_from_path(str(folder))) is NanoChatForCausalLM
        assert AutoConfig.from_pretrained(folder).architectures == ["NanoChatHFForCausalLM"]


TRAIN = """
import json
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

init = {} if "nanochat_hf" in sys.modules else {"trust_remote_code": True}
question, answer = json.load(open("row.json"))
chat = Dataset.from_list([{"messages": [question, answer]}] * 4)
pairs = Dataset.from_list([{"prompt": [question], "chosen": [answer], "rejected": [dict(answer, content="No.")]}] * 4)
asks = Dataset.from_list([{"prompt": [question]}] * 4)
reward = lambda completions, **_: [float(len(str(c))) for c in completions]

def load():
    return AutoModelForCausalLM.from_pretrained("model", **init)

def config(cls, model, **options):
    if named := isinstance(model, str):
        options["model_init_kwargs"] = dict(init)
    if cls is GRPOConfig:  # a reference model; made of an object it would want an argument of its own
        options["beta"] = 0.1 * named
    return cls(cls.__name__, max_steps=1, per_device_train_batch_size=4, report_to="none", use_cpu=True, bf16=False,
               save_strategy="no", logging_steps=1, **options)

def sft(model):
    return SFTTrainer(model, config(SFTConfig, model, assistant_only_loss=True), train_dataset=chat)

def dpo(model):
    reference = None if isinstance(model, str) else load()
    return DPOTrainer(model, reference, config(DPOConfig, model), train_dataset=pairs)

def grpo(model):
    options = config(GRPOConfig, model, num_generations=2, max_completion_length=8, temperature=1e-3)
    return GRPOTrainer(model, reward, options, train_dataset=asks)

results = {}
for make in (sft, dpo, grpo):
    for model in ("model", load()):
        trainer = make(model)
        trainer.train()
        [log] = [entry for entry in trainer.state.log_history if "loss" in entry]
        model = trainer.accelerator.unwrap_model(trainer.model)
        value = log.get("logps/chosen", log.get("entropy"))
        facts = [type(model).__name__, model.num_parameters(), log["loss"], value]
        results.setdefault(make.__name__, []).append(facts)
print(json.dumps(results))
"""


@pytest.mark.slow
@pytest.mark.parametrize("package", [True, False])
def test_sft_dpo_and_grpo_by_name_train_the_model_of_the_folder(package, talker, chat_folder, tmp_path):  # noqa: F811
    shutil.copytree(chat_folder, tmp_path / "model")
    *_, (question, answer) = rows()
    text = answer["content"][0]["text"]
    (tmp_path / "row.json").write_text(json.dumps([question, {"role": "assistant", "content": text}]))
    results = json.loads(run_without_the_package(TRAIN, tmp_path, package=package))
    count = talker[0].num_parameters()
    for name, (by_name, by_object) in results.items():
        assert by_name[:2] == by_object[:2] == ["NanoChatHFForCausalLM", count], name
        assert by_name[2:] == pytest.approx(by_object[2:], rel=1e-3, abs=1e-4), name
    model, tokenizer = talker
    chat = [question, {"role": "assistant", "content": text}]
    row = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True, return_tensors="pt")
    labels = row["input_ids"].where(row["assistant_masks"].bool(), -100)
    with torch.no_grad():
        loss = model(row["input_ids"], labels=labels).loss.item()
    assert results["sft"][0][2] == pytest.approx(loss, abs=1e-3)
