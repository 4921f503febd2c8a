"""CORE against a slow twin that follows the definition word by word, its label and its arithmetic."""

import json
import random

import numpy as np
import pytest
import torch
import yaml
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config

from nanochat_hf.errors import InputError
from nanochat_hf.eval.core import centered_mean, evaluate_core, quiet
from nanochat_hf.eval.harness import EVALS, EvalConfig, LocalLM, core_metric
from nanochat_hf.eval.loglikelihood import loglikelihoods

WORDS = ["the", "owl", "red", "cat", "sees", "a", "big", "green", "tree", "and", "two", "small", "dogs", "run", "town"]


def words(rng, count):
    return " ".join(rng.choice(WORDS) for _ in range(count))


@pytest.fixture
def bundle(tmp_path):
    """A small bundle in the official layout: one task of each kind, with the official names, shots and delimiters."""
    rng = random.Random(0)
    mc = [
        {"query": words(rng, 9), "choices": [words(rng, rng.randint(1, 4)) for _ in range(4)], "gold": i % 4}
        for i in range(24)
    ]
    mc[3]["choices"] = ["red", "red cat", "owl", "owl"]  # one begins another, two are equal
    mc[4]["choices"] = ["red", "red", "red", "red"]
    schema = []
    for i in range(20):
        options = [f"The owl met the cat because the {name}" for name in rng.sample(WORDS, 2)]
        schema.append({"context_options": options, "continuation": f"{words(rng, 3)}.", "gold": i % 2})
    lm = [{"context": f"{words(rng, 6)} ", "continuation": words(rng, 1)} for _ in range(24)]
    files = {
        "world_knowledge/arc_easy.jsonl": mc,
        "language_understanding/winograd_wsc.jsonl": schema,
        "world_knowledge/bigbench_qa_wikidata.jsonl": lm,
    }
    for name, rows in files.items():
        path = tmp_path / "eval_data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "core.yaml").write_text(yaml.safe_dump({"icl_tasks": []}))
    return tmp_path


def manager(bundle):
    return TaskManager(include_path=str(EVALS), include_defaults=False, metadata={"core_bundle": str(bundle)})


def slow_decisions(model, tokenizer, path, kind, shots, delimiter, limit):
    """DESIGN.md section 6, one row at a time and one prompt at a time."""
    rows = [json.loads(line) for line in path.open()]
    random.Random(1337).shuffle(rows)
    rows, decisions = rows[:limit], []
    for i, row in enumerate(rows):
        picks = random.Random(1234 + i).sample([j for j in range(len(rows)) if j != i], shots) if shots else []
        if kind == "multiple_choice":
            before = [rows[j]["query"] + delimiter + rows[j]["choices"][rows[j]["gold"]] for j in picks]
            texts = ["\n\n".join([*before, row["query"] + delimiter + choice]) for choice in row["choices"]]
        elif kind == "schema":
            texts = [option + delimiter + row["continuation"] for option in row["context_options"]]
        else:
            before = [rows[j]["context"].strip() + delimiter + rows[j]["continuation"] for j in picks]
            question = "\n\n".join([*before, row["context"].strip() + delimiter])
            texts = [question.strip(), question + row["continuation"]]
        ids = [
            [tokenizer.bos_token_id, *tokenizer(t, add_special_tokens=False, split_special_tokens=True)["input_ids"]]
            for t in texts
        ]
        shortest = min(map(len, ids))
        if kind == "schema":
            same = next((n for n in range(shortest) if len({x[-1 - n] for x in ids}) > 1), shortest)
            starts = [len(x) - same for x in ids]
        else:
            same = next((n for n in range(shortest) if len({x[n] for x in ids}) > 1), shortest)
            starts = [same] * len(ids)
        losses = []
        for x, start in zip(ids, starts):
            with torch.inference_mode():
                logits = model(torch.tensor([x]), use_cache=False).logits[0]
            if kind == "language_modeling":
                hit = (logits[start - 1 : -1].argmax(-1) == torch.tensor(x[start:])).all().item()
            loss = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(x[1:]), reduction="none")
            losses.append(loss[start - 1 :].mean().item())
        decisions.append(hit if kind == "language_modeling" else losses.index(min(losses)) == row["gold"])
    return decisions


@pytest.mark.parametrize(
    "label,kind,shots,delimiter,file",
    [
        ("arc_easy", "multiple_choice", 10, "\nAnswer: ", "world_knowledge/arc_easy.jsonl"),
        ("winograd", "schema", 0, " ", "language_understanding/winograd_wsc.jsonl"),
        ("bigbench_qa_wikidata", "language_modeling", 10, " ", "world_knowledge/bigbench_qa_wikidata.jsonl"),
    ],
)
def test_every_decision_equals_the_slow_twin(lively_model, tokenizer, bundle, label, kind, shots, delimiter, file):
    task = manager(bundle).load([f"nanochat_core_{label}"])["tasks"][f"nanochat_core_{label}"]
    task.use(tokenizer, lively_model.config)
    limit = 20
    task.build_all_requests(limit=limit)
    answers, by_row = (
        loglikelihoods(lively_model, [(r.context, r.continuation) for r in task.instances], batch_tokens=3000),
        {},
    )
    for request, answer in zip(task.instances, answers):
        by_row.setdefault(request.doc_id, []).append(answer)
    ours = [bool(task.process_results(doc, by_row[i])["acc"]) for i, doc in task.doc_iterator(limit=limit)]
    theirs = slow_decisions(lively_model, tokenizer, bundle / "eval_data" / file, kind, shots, delimiter, limit)
    assert ours == theirs
    assert len(ours) == limit


def test_an_incomplete_bundle_is_labelled_and_never_called_core(lively_model, tokenizer, bundle):
    with quiet():
        lm = LocalLM(lively_model, tokenizer, EvalConfig(), engine=None)
        found = evaluate_core(lm, manager(bundle), limit=12, log=lambda line: None)
    assert found["label"] == "3/22 tasks"
    assert found["tasks"] == "3/22"
    assert "hellaswag" in found["missing"]
    assert len(found["missing"]) == 19
    assert found["value"] == pytest.approx(np.mean([row["centered"] for row in found["per_task"].values()]))
    easy = found["per_task"]["arc_easy"]
    assert easy["centered"] == pytest.approx((easy["acc"] - 0.25) / 0.75)


def test_all_22_tasks_are_called_core_and_18_are_not(lively_model, tokenizer, tmp_path):
    rng = random.Random(0)
    (tmp_path / "core.yaml").write_text("icl_tasks: []")
    for name in yaml.safe_load((EVALS / "tasks" / "core.yaml").read_text())["task"]:
        task = load_yaml(EVALS / "tasks" / f"{name.removeprefix('nanochat_')}.yaml", resolve_func=False)
        rows = [
            {
                "multiple_choice": {"query": words(rng, 4), "choices": [words(rng, 2), words(rng, 3)], "gold": i % 2},
                "schema": {"context_options": ["the owl", "a cat"], "continuation": words(rng, 3), "gold": i % 2},
                "language_modeling": {"context": words(rng, 4), "continuation": words(rng, 1)},
            }[task["metadata"]["kind"]]
            for i in range(12)
        ]
        path = tmp_path / "eval_data" / task["dataset_path"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    lm = LocalLM(lively_model, tokenizer, EvalConfig())
    lines = []
    with quiet():
        found = evaluate_core(lm, manager(tmp_path), limit=11, log=lines.append)
    assert (found["label"], found["tasks"], found["missing"]) == ("CORE", "22/22", [])
    assert len(found["per_task"]) == len(lines) == 22
    assert 0 < found["model_seconds"] <= found["seconds"]
    for file in ("language_understanding/hellaswag", "reading_comprehension/squad", "reading_comprehension/coqa"):
        (tmp_path / "eval_data" / f"{file}.jsonl").unlink()
    with quiet():
        less = evaluate_core(lm, manager(tmp_path), limit=11, log=lambda line: None)
    assert (less["label"], less["tasks"]) == ("18/22 tasks", "18/22")
    assert less["missing"] == ["hellaswag_zeroshot", "hellaswag", "squad", "coqa"]
    assert all(found["per_task"][name]["acc"] == row["acc"] for name, row in less["per_task"].items())


def test_a_run_of_all_examples_gives_what_a_limit_of_as_many_gives(lively_model, tokenizer, bundle):
    lm = LocalLM(lively_model, tokenizer, EvalConfig())
    with quiet():
        limited, whole = (evaluate_core(lm, manager(bundle), n, log=lambda line: None) for n in (24, None))
    assert limited["per_task"] == whole["per_task"]


def test_an_empty_bundle_is_refused(lively_model, tokenizer, tmp_path):
    (tmp_path / "core.yaml").write_text("icl_tasks: []")
    with quiet(), pytest.raises(InputError, match="none of the 22 tasks"):
        evaluate_core(LocalLM(lively_model, tokenizer, EvalConfig(), None), manager(tmp_path), log=lambda line: None)


def test_long_prompts_are_cropped_on_the_left_and_counted(lively_model, tokenizer, bundle):
    task = manager(bundle).load(["nanochat_core_arc_easy"])["tasks"]["nanochat_core_arc_easy"]
    task.use(tokenizer, GPT2Config(n_positions=64))
    task.build_all_requests(limit=12)
    assert task.num_long == 48
    assert all(len(r.context) + len(r.continuation) == 64 for r in task.instances)


def test_the_mean_is_plain_and_centered():
    results = {
        "a": {"value": 0.5, "stderr": 0.03, "n": 9, "baseline": 0.25},
        "b": {"value": 0.1, "stderr": 0.0, "n": 9},
    }
    found = centered_mean(results, "ChatCORE", 2)
    assert found["label"] == "ChatCORE"
    assert found["value"] == pytest.approx((1 / 3 + 0.1) / 2)
    assert found["stderr"] == pytest.approx(0.02)
    assert centered_mean({}, "ChatCORE", 6) is None


def small(kind, tokenizer, lively_model):
    """A model of an architecture of the Hub, GPT-2 with positions for a part of a ten-shot prompt only."""
    if kind == "nanochat_hf":
        return lively_model
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.5}
    sizes |= (
        {"n_positions": 96, "bos_token_id": 0, "eos_token_id": 0}
        if kind == "gpt2"
        else {"num_key_value_heads": 1, "intermediate_size": 64}
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, vocab_size=len(tokenizer), **sizes)).eval()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nanochat_hf", "gpt2", "llama"])
def test_the_plain_runner_of_lm_eval_gives_the_same_numbers(lively_model, tokenizer, bundle, tmp_path, kind):
    model = small(kind, tokenizer, lively_model)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    with quiet():
        lm = LocalLM(model, tokenizer, EvalConfig())
        found = evaluate_core(lm, manager(bundle), limit=15, log=lambda line: None)
    ours = found["per_task"]
    assert bool(found["long_prompts"]) == (kind == "gpt2")
    metadata = {"core_bundle": str(bundle), "pretrained": str(tmp_path / "model")}
    plain = simple_evaluate(
        model="hf",
        # nanochat's prompts may be longer than its training length, which is what the backend crops at by itself
        model_args={"pretrained": metadata["pretrained"], "dtype": "float32"}
        | ({"max_length": 1280} if kind == "nanochat_hf" else {}),
        tasks=[f"nanochat_core_{label}" for label in ours],
        task_manager=TaskManager(include_path=str(EVALS), include_defaults=False, metadata=metadata),
        device="cpu",
        batch_size=3,
        limit=15,
        bootstrap_iters=0,
    )["results"]
    for label, row in ours.items():
        assert plain[f"nanochat_core_{label}"]["acc,none"] == row["acc"]
        assert plain[f"nanochat_core_{label}"]["centered,none"] == row["centered"]


def test_the_error_of_a_task_is_that_of_its_centered_accuracy(lively_model, tokenizer, bundle):
    """sqrt(p (1 - p) / (n - 1)), the standard error of a mean of n zeros and ones, over 1 - baseline (.25, .5, 0)."""
    found = evaluate_core(LocalLM(lively_model, tokenizer, EvalConfig()), manager(bundle), 20, log=lambda line: None)
    assert any(0 < row["acc"] < 1 for name, row in found["per_task"].items() if name != "bigbench_qa_wikidata")
    for name, baseline in (("arc_easy", 0.25), ("winograd", 0.5), ("bigbench_qa_wikidata", 0.0)):
        row = found["per_task"][name]
        error = (row["acc"] * (1 - row["acc"]) / 19) ** 0.5 / (1 - baseline)
        assert row["n"] == 20 and row["stderr"] == pytest.approx(error, rel=1e-9)


@pytest.mark.parametrize("limit", [None, 20])
def test_a_damaged_line_is_named_before_anything_is_computed(lively_model, tokenizer, bundle, limit):
    path = bundle / "eval_data" / "language_understanding" / "winograd_wsc.jsonl"  # the last of the three tasks
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:6], "{," + lines[6], *lines[7:]]))
    lm = LocalLM(lively_model, tokenizer, EvalConfig())
    with pytest.raises(InputError, match=rf"{path}, line 7: no JSON: .* at column 2") as error:
        evaluate_core(lm, manager(bundle), limit, log=lambda line: None)
    assert "\n" not in str(error.value) and lm.model_seconds == 0


def test_a_damaged_line_stops_core_while_training_with_the_same_words(lively_model, tokenizer, bundle):
    path = bundle / "eval_data" / "language_understanding" / "winograd_wsc.jsonl"
    path.write_bytes(path.read_bytes()[:-20])  # cut off in its last line
    with pytest.raises(InputError, match=rf"{path}, line 20: no JSON"):
        core_metric(tokenizer, str(bundle))(lively_model, 20)


def test_a_task_in_which_guessing_is_always_right_is_left_out_with_a_note(capsys):
    sure = {"value": 1.0, "stderr": 0.0, "n": 2, "baseline": 1.0}
    half = {"value": 0.75, "stderr": 0.1, "n": 2, "baseline": 0.5}
    found = centered_mean({"arc": sure, "mmlu": half}, "ChatCORE", 2, "chat tasks")
    assert found["value"] == 0.5 and found["label"] == "1/2 chat tasks" and list(found["per_task"]) == ["mmlu"]
    assert "[eval] ChatCORE goes without arc: all its questions have the same answer" in capsys.readouterr().out
    assert centered_mean({"arc": sure}, "ChatCORE", 1) is None
