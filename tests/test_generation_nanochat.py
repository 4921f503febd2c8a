"""What a folder brings for generation: texts of its pipeline end at the end mark, copies keep the tool loop."""

import json
import shutil
from copy import deepcopy

import pytest
from hub_standin import Hub
from peft import LoraConfig, PeftModel, get_peft_model
from talker import QUESTIONS, chat_folder, talker, talker_folder  # noqa: F401
from test_model_folder import run_without_the_package
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedTokenizerFast,
    TextGenerationPipeline,
    pipeline,
)
from transformers.testing_utils import CaptureLogger

from nanochat_hf.model import generation_nanochat
from nanochat_hf.tool_loop import ship

CHATS = [[{"role": "user", "content": question}] for question in QUESTIONS]
GREEDY = {"max_new_tokens": 120, "do_sample": False}
LOOP = {"generate.py", "tools.py"}


@pytest.fixture(scope="module")
def chat(chat_folder):  # noqa: F811
    return pipeline("text-generation", model=str(chat_folder), trust_remote_code=True)


def expected(chat) -> list[str]:
    return ["".join(text for kind, text in QUESTIONS[c[0]["content"]] if kind == "text") for c in chat]


@pytest.mark.parametrize("options", [{"batch_size": 4}, {"num_return_sequences": 2, "num_beams": 2}])
def test_contents_of_several_answers_have_no_marks(chat, options):
    for prompt, records in zip(CHATS, chat(CHATS, **GREEDY, **options)):
        for record in records:
            message = record["generated_text"][-1]
            assert "<|" not in message["content"]
        assert records[0]["generated_text"][-1]["content"] == expected([prompt])[0]


def test_a_batch_of_the_standard_pipeline_has_no_marks_either(chat_folder):  # noqa: F811
    options = {"model": str(chat_folder), "trust_remote_code": True}
    standard = pipeline("text-generation", **options, pipeline_class=TextGenerationPipeline)
    found = [records[0]["generated_text"][-1]["content"] for records in standard(CHATS, **GREEDY, batch_size=4)]
    assert found == expected(CHATS)


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


def test_contents_have_no_padding_under_an_older_response_template_either(chat, monkeypatch):
    template = deepcopy(chat.tokenizer.response_template)
    content = template["fields"]["content"]
    del content["close_pattern"]
    content["close"] = "<|assistant_end|>"
    monkeypatch.setattr(chat.tokenizer, "response_template", template)
    found = [records[0]["generated_text"][-1]["content"] for records in chat(CHATS, **GREEDY, batch_size=4)]
    assert found == expected(CHATS)


def test_texts_of_other_tokenizers_stay_as_they_are(talker, chat_folder):  # noqa: F811
    model, tokenizer = talker[0], PreTrainedTokenizerFast.from_pretrained(chat_folder)
    plain = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    for tokenizer.response_template in (None, {"fields": {"content": {}}, "start_anchor": "x"}):
        found, expected = (
            pipeline("text-generation", model=model, tokenizer=tokenizer, pipeline_class=kind)("Hello<|bos|>", **plain)
            for kind in (None, TextGenerationPipeline)
        )
        assert found == expected


OUTSIDE = """
import json
from transformers import AutoConfig, pipeline
chats = json.load(open("chats.json"))
pipe = pipeline("text-generation", model="model", trust_remote_code=True)
found = [r[0]["generated_text"][-1]["content"] for r in pipe(chats, max_new_tokens=120, do_sample=False, batch_size=5)]
pipe.save_pretrained("again")
again = pipeline("text-generation", model="again", trust_remote_code=True)
assert type(again).__name__ == "NanoChatHFTextGenerationPipeline"
assert [again(c, max_new_tokens=120, do_sample=False)[0]["generated_text"][-1]["content"] for c in chats] == found
print(json.dumps(found))
"""


@pytest.mark.slow
def test_a_folder_brings_its_pipeline(chat_folder, tmp_path):  # noqa: F811
    shutil.copytree(chat_folder, tmp_path / "model")
    begun = [*CHATS[3], {"role": "assistant", "content": "안녕"}]
    (tmp_path / "chats.json").write_text(json.dumps([*CHATS, begun]))
    found = json.loads(run_without_the_package(OUTSIDE, tmp_path))
    assert found == [*expected(CHATS), *expected(CHATS[3:])]


def files(folder) -> set[str]:
    return {path.name for path in (folder / "custom_generate").glob("*.py")}


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options)


@pytest.mark.parametrize("trust", [True, None])
def test_copies_of_a_chat_model_keep_the_tool_loop(trust, chat_folder, tmp_path):  # noqa: F811
    model = load(chat_folder, trust_remote_code=trust)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    tuned = get_peft_model(model, LoraConfig(r=2, task_type="CAUSAL_LM"))
    tuned.save_pretrained(tmp_path / "adapter")
    tuned.merge_and_unload().save_pretrained(tmp_path / "merged")
    load(tmp_path / "merged").bfloat16().save_pretrained(tmp_path / "again")
    for copy in ("sharded", "merged", "again"):
        assert files(tmp_path / copy) == LOOP, copy
    source = chat_folder / "custom_generate" / "generate.py"
    assert (tmp_path / "again" / "custom_generate" / "generate.py").read_bytes() == source.read_bytes()


def test_an_adapter_alone_brings_the_tool_loop_of_its_base(chat_folder, talker, tmp_path):  # noqa: F811
    get_peft_model(load(chat_folder), LoraConfig(r=2, task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    model, tokenizer = load(tmp_path, trust_remote_code=True), talker[1]
    assert not isinstance(model, PeftModel)
    inputs = tokenizer.apply_chat_template(CHATS[0], add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = tokenizer.decode(model.generate(**inputs, **GREEDY)[0])
    assert "<|output_start|>408<|output_end|>It is 408." in out


def test_a_base_model_gets_no_tool_loop_and_an_existing_one_is_left_alone(talker_folder, chat_folder, tmp_path):  # noqa: F811
    load(talker_folder).save_pretrained(tmp_path / "base")
    assert not (tmp_path / "base" / "custom_generate").exists()
    (tmp_path / "own" / "custom_generate").mkdir(parents=True)
    (tmp_path / "own" / "custom_generate" / "generate.py").write_text("# mine")
    load(chat_folder).save_pretrained(tmp_path / "own")
    assert (tmp_path / "own" / "custom_generate" / "generate.py").read_text() == "# mine"
    load(chat_folder).save_pretrained(tmp_path / "other", is_main_process=False)
    assert not (tmp_path / "other" / "custom_generate").exists()


def test_a_copy_that_cannot_have_the_tool_loop_says_so(talker_folder, tmp_path):  # noqa: F811
    shutil.copytree(talker_folder, tmp_path / "model")
    ship(tmp_path / "model")
    model = load(tmp_path / "model")
    shutil.rmtree(tmp_path / "model")
    generation_nanochat.logger.warning_once.cache_clear()
    with CaptureLogger(generation_nanochat.logger) as log:
        model.save_pretrained(tmp_path / "copy")
    assert f"copy has no custom_generate/: if this is a chat model, copy it from {tmp_path}/model" in log.out
    assert not (tmp_path / "copy" / "custom_generate").exists()


@pytest.mark.parametrize("trust", [True, None])
@pytest.mark.parametrize("options", [{}, {"subfolder": "model"}])
def test_copies_keep_the_loop_of_relative_and_subfolders(options, trust, chat_folder, tmp_path, monkeypatch):  # noqa: F811
    shutil.copytree(chat_folder, tmp_path / "run" / "model")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    model = load("run" if options else "run/model", trust_remote_code=trust, **options)
    monkeypatch.chdir(tmp_path / "elsewhere")
    model.save_pretrained("copy")
    assert files(tmp_path / "elsewhere" / "copy") == LOOP


@pytest.mark.parametrize("state", ["cached", "unknown", "absent"])
def test_offline_copies_of_hub_models_keep_the_loop_or_say_so(state, chat_folder, tmp_path):  # noqa: F811
    repo, commit = tmp_path / "cache" / "models--you--chat", "a" * 40
    snapshot = shutil.copytree(chat_folder, repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    if state != "cached":
        shutil.rmtree(snapshot / "custom_generate")
    if state == "absent":  # how the cache notes that the repository has no such file
        (repo / ".no_exist" / commit / "custom_generate").mkdir(parents=True)
        for file in LOOP:
            (repo / ".no_exist" / commit / "custom_generate" / file).touch()
    model = load("you/chat", cache_dir=tmp_path / "cache")
    generation_nanochat.logger.warning_once.cache_clear()
    with CaptureLogger(generation_nanochat.logger) as log:
        model.save_pretrained(tmp_path / "copy")
    assert files(tmp_path / "copy") == (LOOP if state == "cached" else set())
    assert ("copy it from you/chat" in log.out) == (state == "unknown")


PUSH = """
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("model")
model.push_to_hub("you/pushed")
model.save_pretrained("saved", push_to_hub=True, repo_id="you/saved")
AutoModelForCausalLM.from_pretrained("you/pushed").save_pretrained("back")
AutoModelForCausalLM.from_pretrained("you/pushed", trust_remote_code=True).save_pretrained("back2")
print("pushed")
"""


@pytest.mark.slow
def test_pushes_and_copies_of_hub_models_keep_the_tool_loop(chat_folder, tmp_path):  # noqa: F811
    shutil.copytree(chat_folder, tmp_path / "model")
    with Hub() as hub:
        variables = {"HF_ENDPOINT": hub.url, "HF_TOKEN": hub.token, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        assert run_without_the_package(PUSH, tmp_path, package=True, **variables) == "pushed"
        for repo in ("you/pushed", "you/saved"):
            pushed = hub.repos["models", repo].files("main")[1]
            assert {f"custom_generate/{file}" for file in LOOP} <= set(pushed), repo
            assert "generation_nanochat.py" in pushed
    assert files(tmp_path / "back") == files(tmp_path / "back2") == LOOP


def test_a_copy_answers_its_calls(chat_folder, talker, tmp_path):  # noqa: F811
    model, tokenizer = load(chat_folder), talker[1]
    model.save_pretrained(tmp_path)
    inputs = tokenizer.apply_chat_template(CHATS[0], add_generation_prompt=True, return_tensors="pt", return_dict=True)
    copy = load(tmp_path, trust_remote_code=True)
    with pytest.warns(UserWarning, match="no tokenizer in .*: calls are not answered"):
        copy.generate(**inputs, generation_config=GenerationConfig(**GREEDY))
    tokenizer.save_pretrained(tmp_path)
    out = tokenizer.decode(load(tmp_path, trust_remote_code=True).generate(**inputs, **GREEDY)[0])
    assert out.endswith("<|output_start|>408<|output_end|>It is 408.<|assistant_end|>")
