"""The ONNX files in onnxruntime, in transformers.js under Node, and in the page of spaces/browser in Chromium.

The last two need Node, and transformers.js in TRANSFORMERS_JS/node_modules:

    npm install --ignore-scripts --prefix $TRANSFORMERS_JS @huggingface/transformers@4.3.2
"""

import json
import mimetypes
import os
import re
import shutil
import subprocess
from pathlib import Path
from unittest.mock import MagicMock
from urllib.parse import urlparse

import numpy as np
import pytest
import torch
from browser import browser, picture  # noqa: F401
from talker import QUESTIONS, talker, talker_folder  # noqa: F401
from test_tools import REFUSED, RESULTS
from tiny import close, make_ids, make_model, relative, uncached_greedy
from transformers import AutoModelForCausalLM

from nanochat_hf.errors import InputError
from nanochat_hf.export import adder, export
from nanochat_hf.tools import calculate

ort = pytest.importorskip("onnxruntime", reason="exports to ONNX need onnx, onnxscript and onnxruntime")
pytest.importorskip("onnxscript")
from nanochat_hf.export.onnx import Step, run_graph, write_graph  # noqa: E402

SITE = Path(__file__).parents[1] / "spaces" / "browser"
LIBRARY = Path(os.environ.get("TRANSFORMERS_JS", "/nowhere")) / "node_modules"
VERSION = re.search(r"/npm/@huggingface/transformers@([\d.]+)", (SITE / "worker.js").read_text())[1]
GENERATE = """
import fs from "node:fs";
const { AutoModelForCausalLM, AutoTokenizer, Tensor, env } = await import(process.argv[1]);
const { root, name, dtype, prompts, chat, length } = JSON.parse(fs.readFileSync(0));
env.localModelPath = root;
env.allowRemoteModels = false;
const beside = `${root}${name}/onnx/config.json`;
const config = fs.existsSync(beside) ? JSON.parse(fs.readFileSync(beside)) : null;
const model = await AutoModelForCausalLM.from_pretrained(name, { dtype, config });
const tokenizer = await AutoTokenizer.from_pretrained(name);
const options = { add_generation_prompt: true, return_tensor: false, return_dict: false };
if (chat) prompts.push(tokenizer.apply_chat_template(chat, options));
const rows = [];
for (const ids of prompts) {
  const inputs = new Tensor("int64", BigInt64Array.from(ids, BigInt), [1, ids.length]);
  const sequences = await model.generate({ inputs, max_new_tokens: length, do_sample: false });
  rows.push(sequences.tolist()[0].map(Number));
}
console.log(JSON.stringify(rows));
"""


def node(script: str, *words: str, **values):
    """What the module prints as JSON, given `values` as JSON; skipped without Node."""
    if shutil.which("node") is None:
        pytest.skip("transformers.js and the page's calculator need Node")
    command = ["node", "--input-type=module", "-e", script, *words]
    output = subprocess.run(command, input=json.dumps(values), capture_output=True, text=True, check=True)
    return json.loads(output.stdout)


def generate(folder: Path, prompts: list, length: int, chat=None, dtype: str = "fp32") -> list[list[int]]:
    package = LIBRARY / "@huggingface" / "transformers"
    if not package.is_dir():
        pytest.skip(f"needs transformers.js {VERSION}: see the head of this file")
    assert json.loads((package / "package.json").read_text())["version"] == VERSION
    values = {"root": f"{folder.parent}/", "name": folder.name, "dtype": dtype, "prompts": prompts, "chat": chat}
    return node(GENERATE, str(package / "dist" / "transformers.node.mjs"), **values, length=length)


@pytest.fixture(scope="module", params=[1, 2])
def exported(request, tokenizer, tmp_path_factory):
    """(model with sliding windows, exported folder) of a generation."""
    root = tmp_path_factory.mktemp("onnx")
    model = make_model(request.param, vocab_size=512, num_tokens=None, window_pattern="SSL", sliding_window=5)
    model.save_pretrained(root / "torch")
    tokenizer.save_pretrained(root / "torch")
    export(root / "torch", root / "onnx", "onnx")
    return model, root / "onnx"


@pytest.fixture(scope="module")
def chat_export(talker_folder, tokenizer, tmp_path_factory):  # noqa: F811
    root = tmp_path_factory.mktemp("chat")
    folder = root / "model"
    shutil.copytree(talker_folder, root / "torch")
    path = root / "torch" / "generation_config.json"
    stops = tokenizer.convert_tokens_to_ids(["<|assistant_end|>", "<|python_end|>"])  # as a chat stage writes them
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": stops}))
    lines = export(root / "torch", folder, "onnx")
    assert re.match(r"onnx/model.onnx: \S+ MB, (\d+) of \1 tokens as torch", lines[0])
    return folder


def step(session, ids, mask, cache=None):
    """Logits of all positions of ids (B, T), and the cache after them."""
    if cache is None:
        inputs = [entry for entry in session.get_inputs() if entry.name.startswith("past")]
        batch = {"batch_size": len(ids)}
        sizes = [[n if isinstance(n, int) else batch.get(n, 0) for n in entry.shape] for entry in inputs]
        cache = {entry.name: np.zeros(size, np.float32) for entry, size in zip(inputs, sizes)}
    positions = np.maximum(mask.cumsum(1) - 1, 0)[:, -ids.shape[1] :]
    feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "num_logits_to_keep": np.array(0)}
    names = [entry.name for entry in session.get_outputs()]
    logits, *after = session.run(names, {**feeds, **cache})
    renamed = [n.replace("present_conv", "past_conv").replace("present.", "past_key_values.") for n in names[1:]]
    return torch.from_numpy(logits), dict(zip(renamed, after))


def test_masks_show_the_window_and_no_padding():
    tokens = torch.tensor([[0, *[1] * 8]])  # one of padding
    masks = Step(make_model(sliding_window=5)).masks(tokens, 3, 6, torch.float32)
    seen = {kind: [row.nonzero()[:, 0].tolist() for row in mask[0, 0] == 0] for kind, mask in masks.items()}
    assert seen["full_attention"] == [list(range(1, query + 1)) for query in (6, 7, 8)]
    assert seen["sliding_attention"] == [list(range(query - 4, query + 1)) for query in (6, 7, 8)]


@pytest.mark.parametrize("generation, caches", [(1, 10), (2, 11)])  # keys and values of five layers, the smear's token
def test_the_graph_has_its_inputs_and_float16_a_smaller_residual_stream(generation, caches, monkeypatch):
    monkeypatch.setattr(torch.onnx, "export", exporter := MagicMock())
    model = make_model(generation)
    before = {name: value.clone() for name, value in model.half().state_dict().items()}
    write_graph(model, None)
    assert len([name for name in exporter.call_args.kwargs["input_names"] if name.startswith("past")]) == caches
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name] / (16 if "o_proj" in name or "fc2" in name else 1)), name
    values = [parameter.sum() for parameter in model.float().parameters()]
    assert [parameter.sum() for parameter in Step(model).parameters()] == values


@pytest.mark.slow
@torch.no_grad()
def test_logits_equal_torch_whole_in_pieces_and_padded(exported):
    model, folder = exported
    session = ort.InferenceSession(folder / "onnx" / "model.onnx")
    ids = make_ids(2, 60)
    mask = torch.ones_like(ids)
    expected = model(ids).logits
    close(step(session, ids.numpy(), mask.numpy())[0], expected)
    cache, parts = None, []
    for end, part in zip((20, 21, 60), ids.split([20, 1, 39], dim=1)):
        logits, cache = step(session, part.numpy(), mask[:, :end].numpy(), cache)
        parts.append(logits)
    close(torch.cat(parts, 1), expected)
    mask[0, :9] = 0
    padded = step(session, ids.numpy(), mask.numpy())[0]
    close(padded[mask.bool()], model(ids, attention_mask=mask).logits[mask.bool()])


@pytest.mark.slow
@torch.no_grad()
def test_float16_holds_logits_of_a_residual_stream_beyond_its_range(tokenizer, tmp_path):
    model, ids = make_model(1, vocab_size=512, num_tokens=None), make_ids(1, 60)
    for layer in model.model.layers:
        layer.mlp.fc2.weight *= 2.0**13
    assert model.model(ids, output_hidden_states=True).hidden_states[-2].abs().max() > torch.finfo(torch.float16).max
    model.save_pretrained(tmp_path / "torch")
    tokenizer.save_pretrained(tmp_path / "torch")
    export(tmp_path / "torch", tmp_path / "onnx", "onnx")
    logits = torch.from_numpy(run_graph(tmp_path / "onnx" / "onnx" / "model_fp16.onnx", ids.numpy()))
    assert relative(logits, model(ids).logits[0]) < 0.01


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "q8"])
def test_node_generates_the_same_tokens(exported, dtype):
    model, folder = exported
    prompts = [make_ids(1, length, seed=length) for length in (1, 12)]
    rows = generate(folder, [ids[0].tolist() for ids in prompts], 30, dtype=dtype)
    assert [len(row) for row in rows] == [31, 42]
    if dtype == "fp32":  # the others round
        assert rows == [uncached_greedy(model, ids, 30)[0].tolist() for ids in prompts]


@pytest.mark.slow
def test_files_beside_the_weights_leave_these_alone_and_run_with_the_config_there(exported, tmp_path):
    model, folder = exported
    beside = tmp_path / "model"
    shutil.copytree(folder.parent / "torch", beside)
    assert "onnx/config.json" in adder("onnx")(beside)[0]
    ids = make_ids(1, 12)
    loaded = AutoModelForCausalLM.from_pretrained(beside)
    assert type(loaded) is type(model) and torch.equal(loaded(ids).logits, model(ids).logits)
    assert generate(beside, ids.tolist(), 30) == [uncached_greedy(model, ids, 30)[0].tolist()]


@pytest.mark.slow
def test_node_has_the_chat_template_and_stops_at_a_call(chat_export, talker):  # noqa: F811
    _, tokenizer = talker
    chat = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi."}]
    chat.append({"role": "user", "content": "What is 12 * 34?"})
    (row,) = generate(chat_export, [], 5, chat)
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert row[: len(prompt)] == prompt
    (row,) = generate(chat_export, [], 60, chat[2:])
    assert tokenizer.decode(row).endswith("<|python_start|>12*34<|python_end|>")


def test_the_calculator_of_the_page_equals_ours():
    script = f"""
        import fs from "node:fs";
        import {{ calculate }} from "{SITE.as_uri()}/calculator.js";
        const values = JSON.parse(fs.readFileSync(0)).texts.map(text => {{
          try {{ return calculate(text) }} catch (error) {{ return {{ error: error.message }} }}
        }});
        console.log(JSON.stringify(values));
    """
    refused = [text for text in REFUSED if isinstance(text, str)]
    computed = ["7/3*3/3", "2e-60/3", "100/7", "123456789012/7", "2/3*10", "-1e-30*1e-30", "9" * 60 + "/8", "1e100/3"]
    results = node(script, texts=[*(text for text, _ in RESULTS), *computed, *refused])
    assert results[: len(RESULTS)] == [result for _, result in RESULTS]
    assert results[len(RESULTS) : -len(refused)] == [calculate(text) for text in computed]
    assert all(set(result) == {"error"} for result in results[-len(refused) :])


@pytest.mark.slow
def test_page_chats_calls_the_calculator_and_begins_anew(chat_export, browser):  # noqa: F811
    if not LIBRARY.is_dir():
        pytest.skip(f"needs transformers.js {VERSION}: see the head of this file")

    def serve(route):
        url = urlparse(route.request.url)
        if url.netloc == "cdn.jsdelivr.net":
            name, rest = re.fullmatch(r"/npm/((?:@\w+/)?[\w-]+)@[^/]+/?(.*)", url.path).groups()
            path = LIBRARY / name / (rest or "dist/transformers.min.js")
        elif url.path.startswith("/model/"):
            path = chat_export / url.path.removeprefix("/model/")
        else:
            path = SITE / (url.path[1:] or "index.html")
        headers = {"access-control-allow-origin": "*"}
        if path.is_file():
            kind = "text/javascript" if path.suffix in (".js", ".mjs") else mimetypes.guess_type(path)[0]
            headers["content-type"] = kind or "application/octet-stream"
            if path.name == "calculator.js":  # results get a mark: the model has learned those without it by heart
                marked = "export const calculate = text => `#${value(text)}`;\nfunction value"
                route.fulfill(body=path.read_text().replace("export function calculate", marked), headers=headers)
            else:
                route.fulfill(path=path, headers=headers)
        else:
            route.fulfill(status=404)

    context = browser.new_context(viewport={"width": 390, "height": 844}, color_scheme="dark")
    context.set_default_timeout(300_000)
    context.route("**/*", serve)
    page, errors = context.new_page(), []
    page.on("pageerror", lambda error: errors.append(str(error)))
    context.route("**/model/config.json", lambda route: route.fulfill(status=404))
    page.goto("https://page.test/?device=wasm")
    assert page.text_content(".error").startswith("no folder of nanochat export --to onnx can be read in model: ")
    assert page.text_content("#status") == "Not loaded"
    context.unroute("**/model/config.json")
    page.goto("https://page.test/?device=wasm&temperature=0")
    page.wait_for_selector("#send:not([disabled])")
    for question, parts in QUESTIONS.items():  # one conversation would be longer than the model's memory of four
        page.fill("#text", question)
        page.press("#text", "Enter")
        page.wait_for_function("document.querySelector('#send').textContent === 'Send'")
        if len(parts) == 1:
            assert page.text_content(".bot") == parts[0][1]
        else:
            (_, call), (_, result), _ = parts
            result = f"= {result}" if "error" in result else f"= #{result}"
            assert [box.text_content() for box in page.query_selector_all(".call")] == [call, result]
        picture(page, "browser-dark")
        page.click("#new")
        assert page.query_selector(".bot") is None
    assert errors == [] and "tokens/s" in page.text_content("#status")
    context.close()


def test_scaled_rope_is_refused(tokenizer, tmp_path):
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0}
    make_model(1, rope_parameters=rope, vocab_size=512, num_tokens=None).save_pretrained(tmp_path / "torch")
    tokenizer.save_pretrained(tmp_path / "torch")
    for engine in ("onnx", "mlx"):
        with pytest.raises(InputError, match=r"RoPE of type 'linear'.*use the folder itself"):
            export(tmp_path / "torch", tmp_path / "out", engine)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["torch"]


def test_a_model_of_more_than_two_gigabytes_is_refused(tokenizer, tmp_path, monkeypatch):
    model = make_model(1, vocab_size=512, num_tokens=None)
    model.save_pretrained(tmp_path / "torch")
    tokenizer.save_pretrained(tmp_path / "torch")
    monkeypatch.setattr("nanochat_hf.export.onnx.MAX_BYTES", 4 * model.num_parameters() - 1)
    with pytest.raises(InputError, match="an ONNX file holds 2"):
        export(tmp_path / "torch", tmp_path / "out", "onnx")


def test_the_config_has_as_many_tokens_as_the_logits_and_not_the_padded_rows(tokenizer, tmp_path):
    from nanochat_hf.export.onnx import write_config  # needs onnxruntime

    tokenizer.save_pretrained(tmp_path)
    for name in ("model.safetensors", "model.safetensors.index.json", "modeling_nanochat.py"):
        (tmp_path / name).touch()
    write_config(make_model(1, vocab_size=128, num_tokens=100), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["vocab_size"] == 100
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "tokenizer.json", "tokenizer_config.json"}
