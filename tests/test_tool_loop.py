"""The calculator inside `generate`: shipped with a chat model, found by `from_pretrained`, used by `pipeline`."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from talker import QUESTIONS, chat_folder, talker, talker_folder  # noqa: F401
from transformers import AutoModelForCausalLM, GenerationConfig, pipeline
from transformers.generation.streamers import BaseStreamer

from nanochat_hf.serve.engine import Engine
from nanochat_hf.tool_loop import ToolResultProcessor, stop_ids

SUM = [{"role": "user", "content": "What is 12 * 34?"}]
GREEDY = {"max_new_tokens": 120, "do_sample": False}


@pytest.fixture(scope="module")
def chat(chat_folder):  # noqa: F811
    return pipeline("text-generation", model=str(chat_folder), trust_remote_code=True)


def reply(chat, messages, **options):
    return chat(messages, **GREEDY, **options)[0]["generated_text"][-1]


def test_a_pipeline_answers_with_the_calculators_help_and_shows_the_steps(chat):
    steps = [{"call": "12*34", "result": "408"}]
    assert reply(chat, SUM) == {"role": "assistant", "content": "It is 408.", "tool_steps": steps}
    assert reply(chat, [{"role": "user", "content": "Hello"}])["content"] == QUESTIONS["Hello"][0][1]


def test_a_call_that_fails_is_answered_with_its_error(chat):
    message = reply(chat, [{"role": "user", "content": "What is 1 / 0?"}])
    assert message["tool_steps"][0]["result"] == "{'error': 'division by zero'}" and message["content"] == "No."


def test_a_caller_may_answer_the_calls_itself(chat):
    messages = chat(SUM, **GREEDY, run_tools=False)[0]["generated_text"]
    assert messages[-1]["tool_calls"][0]["function"] == {"name": "python", "arguments": {"expression": "12*34"}}
    messages.append({"role": "tool", "content": "408"})
    assert reply(chat, messages, run_tools=False) == {"role": "assistant", "content": "It is 408."}


def test_pipelines_take_tool_schemas_and_keep_system_messages(chat):
    from nanochat_hf.tools import python

    assert reply(chat, SUM, tools=[python])["content"] == "It is 408."
    ids = chat.tokenizer.apply_chat_template([{"role": "system", "content": "Be kind."}, *SUM], tokenize=False)
    assert "Be kind.\n\nWhat is 12 * 34?" in ids


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"cache_implementation": "static"}, {"do_sample": True}])
def test_batches_beams_sampling_and_static_caches_give_the_engines_answers(chat_folder, talker, options):  # noqa: F811
    model = AutoModelForCausalLM.from_pretrained(chat_folder, trust_remote_code=True).eval()
    tokenizer = talker[1]
    prompts = [[{"role": "user", "content": question}] for question in QUESTIONS]
    inputs = tokenizer.apply_chat_template(
        prompts, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    options = {"do_sample": False, "temperature": 1e-3 if "do_sample" in options else 1.0, **options}
    found = model.generate(**inputs, max_new_tokens=120, **options)[:, inputs["input_ids"].shape[1] :]
    engine = Engine(*talker)
    for row, prompt in zip(found.tolist(), prompts):
        (expected,) = engine.generate([engine.encode(prompt)], max_new_tokens=120)[0]
        assert row[: len(expected)] == expected


def test_streamers_see_calls_and_results_and_positional_inputs_work(chat_folder, talker):  # noqa: F811
    class Seen(BaseStreamer):
        def __init__(self):
            self.ids = []

        def put(self, value):
            self.ids += value.flatten().tolist()

        def end(self):
            self.ended = True

    model = AutoModelForCausalLM.from_pretrained(chat_folder, trust_remote_code=True).eval()
    seen, tokenizer = Seen(), talker[1]
    ids = tokenizer.apply_chat_template(SUM, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    model.generate(ids, max_new_tokens=60, streamer=seen, do_sample=False)
    assert "<|output_start|>408<|output_end|>It is 408." in tokenizer.decode(seen.ids) and seen.ended


ENDS = {
    "its own GenerationConfig": lambda eos: {"generation_config": GenerationConfig(**GREEDY)},
    "eos in it": lambda eos: {"generation_config": GenerationConfig(**GREEDY, eos_token_id=eos)},
    "eos as a list in it": lambda eos: {"generation_config": GenerationConfig(**GREEDY, eos_token_id=[eos])},
    "tensor": lambda eos: {"eos_token_id": torch.tensor(eos)},
    "tensor of one": lambda eos: {"eos_token_id": torch.tensor([eos])},
    "tuple": lambda eos: {"eos_token_id": (eos,)},
    "set": lambda eos: {"eos_token_id": {eos}},
    "none": lambda eos: {"eos_token_id": None},
}


@pytest.mark.parametrize("run_tools", [True, False])
@pytest.mark.parametrize("how", ENDS)
def test_an_answer_ends_whatever_the_caller_says_about_its_end(how, run_tools, chat_folder, talker):  # noqa: F811
    model = AutoModelForCausalLM.from_pretrained(chat_folder, trust_remote_code=True)
    tokenizer, before = talker[1], model.generation_config.to_dict()
    inputs = tokenizer.apply_chat_template(SUM, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    options = ENDS[how](tokenizer.eos_token_id)
    own = options.get("generation_config", GenerationConfig()).to_dict()
    options = options if "generation_config" in options else options | GREEDY
    out = model.generate(**inputs, **options, run_tools=run_tools)
    full = "<|python_start|>12*34<|python_end|><|output_start|>408<|output_end|>It is 408.<|assistant_end|>"
    answer = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :])
    assert answer == (full if run_tools else "<|python_start|>12*34<|python_end|>")
    assert model.generation_config.to_dict() == before
    assert options.get("generation_config", GenerationConfig()).to_dict() == own  # the caller's own object


def test_an_eos_that_names_no_end_of_an_answer_gives_way_to_the_models():
    assert stop_ids([21], None, [19, 21], 19, without=21) == [19]
    assert stop_ids(None, torch.tensor(5), [19], 19, without=21) == [5]
    assert stop_ids(None, None, None, 19, without=21) == [19]


def test_only_calls_are_answered_and_only_once(tokenizer):
    loop = ToolResultProcessor(tokenizer)
    encode = lambda text: tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
    call = "<|python_start|>1+1<|python_end|>"
    assert loop.next(encode(call)) == loop.before
    assert loop.next(encode(f"{call}<|output_start|>2")) == loop.after
    assert loop.next(encode(f"{call}<|output_start|>2<|output_end|>")) is None
    assert loop.next(encode(f"{call}<|output_start|>three")) is None  # somebody else's result stays as it is
    assert loop.next(encode("<|python_start|>10**9<|python_end|><|output_start|>7")) is None  # also a shorter one
    assert loop.next(encode("1+1<|python_end|>")) is None
    assert loop.next(encode(f"{call}<|output_start|>2<|output_end|>2+2<|python_end|>")) is None


CLEAN = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
path, question = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
ids = tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True,
                                    return_tensors="pt", return_dict=True)
for where in (path, path + "/plain"):  # found beside the weights, or named in the call
    model = AutoModelForCausalLM.from_pretrained(where, trust_remote_code=True)
    named = {} if where == path else {"custom_generate": path, "trust_remote_code": True}
    print(tokenizer.decode(model.generate(**ids, max_new_tokens=60, do_sample=False, **named)[0]))
assert not [name for name in sys.modules if name.startswith("nanochat_hf")]
"""


@pytest.mark.slow
def test_a_clean_process_needs_only_the_folder(chat_folder, talker_folder, tmp_path):  # noqa: F811
    shutil.copytree(talker_folder, chat_folder / "plain")
    env = {**os.environ, "HF_MODULES_CACHE": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-P", "-c", CLEAN, str(chat_folder), SUM[0]["content"]],
        cwd=tmp_path, env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    shutil.rmtree(chat_folder / "plain")
    assert done.returncode == 0, done.stderr[-2000:]
    both = done.stdout.splitlines()
    assert len(both) == 2 and all("<|output_start|>408<|output_end|>It is 408.<|assistant_end|>" in s for s in both)
