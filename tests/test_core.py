"""CORE against a slow reference that follows the definition word by word; its label, errors, prompts and bundle."""

import csv
import hashlib
import json
import os
import random
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from test_eval_tasks import TASKS, function, manager, write
from test_loglikelihood import make
from transformers import GPT2Config, LlamaConfig

from nanochat_hf import NanoChatConfig
from nanochat_hf.errors import InputError
from nanochat_hf.eval.core import centered_mean, evaluate_core, quiet
from nanochat_hf.eval.harness import EvalConfig, check_bundle, core_metric
from nanochat_hf.eval.lm_eval_model import LocalLM
from nanochat_hf.eval.loglikelihood import loglikelihoods

WORDS = ["the", "owl", "red", "cat", "sees", "a", "big", "green", "tree", "and", "two", "small", "dogs", "run", "town"]
CORE_TASKS = yaml.safe_load((TASKS / "core.yaml").read_text())["task"]
KINDS = {  # label -> kind, shots, delimiter, file
    "arc_easy": ("multiple_choice", 10, "\nAnswer: ", "world_knowledge/arc_easy.jsonl"),
    "winograd": ("schema", 0, " ", "language_understanding/winograd_wsc.jsonl"),
    "bigbench_qa_wikidata": ("language_modeling", 10, " ", "world_knowledge/bigbench_qa_wikidata.jsonl"),
}


def words(rng, count):
    return " ".join(rng.choice(WORDS) for _ in range(count))


def make_row(kind, rng, i):
    if kind == "multiple_choice":
        return {"query": words(rng, 9), "choices": [words(rng, rng.randint(1, 4)) for _ in range(4)], "gold": i % 4}
    if kind == "schema":
        options = [f"The owl met the cat because the {name}" for name in rng.sample(WORDS, 2)]
        return {"context_options": options, "continuation": f"{words(rng, 3)}.", "gold": i % 2}
    return {"context": f"{words(rng, 6)} ", "continuation": words(rng, 1)}


@pytest.fixture
def bundle(tmp_path):
    """A small bundle in the official layout: one task of each kind, with the official names, shots and delimiters."""
    tmp_path = tmp_path / "v[2]{a,b}"
    tmp_path.mkdir()
    rng = random.Random(0)
    (tmp_path / "core.yaml").write_text("icl_tasks: []")
    for kind, _, _, file in KINDS.values():
        rows = [make_row(kind, rng, i) for i in range(24)]
        if kind == "multiple_choice":
            rows[3]["choices"] = ["red", "red cat", "owl", "owl"]  # one begins another, two are equal
            rows[4]["choices"] = ["red", "red", "red", "red"]
        if kind == "schema":
            rows[5]["context_options"] = rows[6]["context_options"] = ["The owl", "The owl"]
        write(tmp_path / "eval_data" / file, rows)
    return tmp_path


def core(model, tokenizer, bundle, max_per_task=None):
    lm = LocalLM(model, tokenizer, EvalConfig())
    with quiet():
        return evaluate_core(lm, manager(core_bundle=str(bundle)), max_per_task, log=lambda line: None)


def load_task(label, folder):
    return manager(core_bundle=str(folder)).load([f"nanochat_core_{label}"])["tasks"][f"nanochat_core_{label}"]


@torch.inference_mode()
def slow_predictions(model, tokenizer, path, kind, shots, delimiter, limit):
    """DESIGN.md section 6, one row at a time and one prompt at a time."""
    rows = [json.loads(line) for line in path.open()]
    random.Random(1337).shuffle(rows)
    rows, predictions = rows[:limit], []
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
        encode = {"add_special_tokens": False, "split_special_tokens": True}
        ids = [[tokenizer.bos_token_id, *tokenizer(text, **encode)["input_ids"]] for text in texts]
        shortest = min(map(len, ids))
        if kind == "schema":
            same = next((n for n in range(shortest) if len({x[-1 - n] for x in ids}) > 1), shortest)
            starts = [len(x) - same for x in ids]
        else:
            same = next((n for n in range(shortest) if len({x[n] for x in ids}) > 1), shortest)
            starts = [same] * len(ids)
        losses = []
        for x, start in zip(ids, starts):
            logits = model(torch.tensor([x]), use_cache=False).logits[0]
            if kind == "language_modeling":
                hit = (logits[start - 1 : -1].argmax(-1) == torch.tensor(x[start:])).all().item()
            loss = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(x[1:]), reduction="none")
            losses.append(loss[start - 1 :].mean().item())
        predictions.append(hit if kind == "language_modeling" else losses.index(min(losses)) == row["gold"])
    return predictions


@pytest.mark.parametrize("label", KINDS)
def test_every_prediction_equals_the_slow_reference(lively_model, tokenizer, bundle, label):
    kind, shots, delimiter, file = KINDS[label]
    task, limit, by_row = load_task(label, bundle), 20, {}
    task.use(tokenizer, lively_model.config)
    task.build_all_requests(limit=limit)
    requests = [(request.context, request.continuation) for request in task.instances]
    for request, score in zip(task.instances, loglikelihoods(lively_model, requests, batch_tokens=3000)):
        by_row.setdefault(request.doc_id, []).append(score)
    ours = [bool(task.process_results(doc, by_row[i])["acc"]) for i, doc in task.doc_iterator(limit=limit)]
    path = bundle / "eval_data" / file
    assert ours == slow_predictions(lively_model, tokenizer, path, kind, shots, delimiter, limit)
    assert len(ours) == limit


def test_an_incomplete_bundle_is_labelled_and_its_errors_are_those_of_centered_ones(lively_model, tokenizer, bundle):
    """The error of a task is sqrt(p (1 - p) / (n - 1)), that of a mean of zeros and ones, over 1 - baseline."""
    result = core(lively_model, tokenizer, bundle, 20)
    assert (result["label"], result["tasks"], len(result["missing"])) == ("3/22 tasks", "3/22", 19)
    assert "hellaswag" in result["missing"] and result["limit"] == 20 and result["long_prompts"] == 0
    assert result["value"] == pytest.approx(np.mean([row["centered"] for row in result["per_task"].values()]))
    for name, baseline in (("arc_easy", 0.25), ("winograd", 0.5), ("bigbench_qa_wikidata", 0.0)):
        row = result["per_task"][name]
        assert row["n"] == 20 and row["centered"] == pytest.approx((row["acc"] - baseline) / (1 - baseline))
        error = (row["acc"] * (1 - row["acc"]) / 19) ** 0.5 / (1 - baseline)
        assert row["stderr"] == pytest.approx(error, rel=1e-9) and (error or name == "bigbench_qa_wikidata")
    limited, whole = (core(lively_model, tokenizer, bundle, limit)["per_task"] for limit in (24, None))
    assert limited == whole  # one job for all tasks, or one for each


def test_all_22_tasks_are_called_core_and_18_are_not(lively_model, tokenizer, tmp_path):
    rng = random.Random(0)
    (tmp_path / "core.yaml").write_text("icl_tasks: []")
    for name in CORE_TASKS:
        task = load_yaml(TASKS / f"{name.removeprefix('nanochat_')}.yaml", resolve_func=False)
        rows = [make_row(task["metadata"]["kind"], rng, i) for i in range(12)]
        write(tmp_path / "eval_data" / task["dataset_path"], rows)
    result = core(lively_model, tokenizer, tmp_path, 11)
    assert (result["label"], result["tasks"], result["missing"]) == ("CORE", "22/22", [])
    assert len(result["per_task"]) == 22 and 0 < result["model_seconds"] <= result["seconds"]
    for file in ("language_understanding/hellaswag", "reading_comprehension/squad", "reading_comprehension/coqa"):
        (tmp_path / "eval_data" / f"{file}.jsonl").unlink()
    less = core(lively_model, tokenizer, tmp_path, 11)
    assert (less["label"], less["tasks"]) == ("18/22 tasks", "18/22")
    assert less["missing"] == ["hellaswag_zeroshot", "hellaswag", "squad", "coqa"]
    assert all(result["per_task"][name]["acc"] == row["acc"] for name, row in less["per_task"].items())
    for file in (tmp_path / "eval_data").rglob("*.jsonl"):
        file.unlink()
    with pytest.raises(InputError, match="none of the 22 tasks"):
        core(lively_model, tokenizer, tmp_path)


def test_a_damaged_line_is_named_before_anything_is_computed(lively_model, tokenizer, bundle):
    path = bundle / "eval_data" / KINDS["winograd"][-1]
    path.write_bytes(path.read_bytes().replace(b"{", b"{,", 7).replace(b"{,", b"{", 6))
    calls = []
    lively_model.register_forward_pre_hook(lambda *args: calls.append(args))
    for measure in (core, lambda *args: core_metric(tokenizer, str(bundle))(lively_model, 20)):
        with pytest.raises(InputError, match=rf"{re.escape(str(path))}, line 7: no JSON: .* at column 2") as error:
            measure(lively_model, tokenizer, bundle)
        assert "\n" not in str(error.value) and not calls


def test_the_mean_is_plain_and_centered_and_leaves_out_tasks_without_a_choice(capsys):
    half = {"value": 0.75, "stderr": 0.03, "n": 9, "baseline": 0.5}
    results = {"a": half, "b": {"value": 0.1, "stderr": 0.08, "n": 9}}
    mean = centered_mean(results, "ChatCORE", 2)
    assert mean["label"] == "ChatCORE" and mean["value"] == pytest.approx((0.5 + 0.1) / 2)
    assert mean["stderr"] == pytest.approx((0.06**2 + 0.08**2) ** 0.5 / 2)
    assert centered_mean(results | {"c": {**half, "stderr": None}}, "ChatCORE", 6)["stderr"] is None
    assert centered_mean({}, "ChatCORE", 6) is None
    certain = {"value": 1.0, "stderr": 0.0, "n": 2, "baseline": 1.0}
    mean = centered_mean({"arc": certain, "mmlu": half}, "ChatCORE", 2, "chat tasks")
    assert mean["value"] == 0.5 and mean["label"] == "1/2 chat tasks" and list(mean["per_task"]) == ["mmlu"]
    assert "[eval] ChatCORE leaves out arc: all its questions have the same answer" in capsys.readouterr().out
    assert centered_mean({"arc": certain}, "ChatCORE", 1) is None


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nanochat_hf", "gpt2", "llama"])
def test_the_lm_eval_cli_gives_the_same_numbers(lively_model, tokenizer, bundle, tmp_path, kind):
    model = make(kind, lively_model, vocab_size=len(tokenizer))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    result = core(model, tokenizer, bundle, 15)
    assert bool(result["long_prompts"]) == (kind == "gpt2")  # of 64 positions
    metadata = {"core_bundle": str(bundle), "pretrained": str(tmp_path / "model")}
    # nanochat's prompts may be longer than its training length, at which the backend crops by default
    length = {"max_length": 1280} if kind != "gpt2" else {}
    cli = simple_evaluate(
        model="hf",
        model_args={"pretrained": metadata["pretrained"], "dtype": "float32", **length},
        tasks=[f"nanochat_core_{label}" for label in KINDS],
        task_manager=TaskManager(include_path=str(TASKS), include_defaults=False, metadata=metadata),
        **{"device": "cpu", "batch_size": 3, "limit": 15, "bootstrap_iters": 0},
    )["results"]
    for label, row in result["per_task"].items():
        assert cli[f"nanochat_core_{label}"]["acc,none"] == row["acc"]
        assert cli[f"nanochat_core_{label}"]["centered,none"] == row["centered"]


# ---- one task -------------------------------------------------------------------------------------------------------


@pytest.fixture
def core_task(tmp_path):
    def build(rows, kind="multiple_choice", shots=0, delimiter=" "):
        write(tmp_path / "eval_data" / "rows.jsonl", rows)
        (tmp_path / "core.yaml").write_text("")
        metadata = {"version": 1, "kind": kind, "delimiter": delimiter, "baseline": 25, "core_bundle": str(tmp_path)}
        config = {"task": "t", "dataset_path": "rows.jsonl", "num_fewshot": shots, "metadata": metadata}
        return function("core.CoreTask")(config)

    return build


MC = {"query": "Q", "choices": ["a", "b"], "gold": 0}


@pytest.mark.parametrize(
    "kind,row,reason",
    [
        ("multiple_choice", {**MC, "gold": 2}, "'gold' is 2 of 2 choices"),
        ("multiple_choice", {**MC, "gold": None}, "'gold' is null"),
        ("multiple_choice", {**MC, "gold": True}, "'gold' is true"),
        ("multiple_choice", {**MC, "query": "\ud800"}, "half of a surrogate pair"),
        ("multiple_choice", {**MC, "choices": ["a", 1]}, "'choices' must be texts"),
        ("schema", MC, "no field 'context_options'"),
        ("language_modeling", {"context": "a"}, "no field 'continuation'"),
    ],
)
def test_a_row_that_is_none_of_its_kind_is_named_on_every_rank(core_task, kind, row, reason):
    task = core_task([make_row(kind, random.Random(0), 0)] * 2 + [row], kind=kind)
    with pytest.raises(ValueError, match=rf"rows\.jsonl, line 3: {reason}"):
        task.build_all_requests(rank=0, world_size=3)


def test_half_a_last_line_is_named_whichever_rows_are_drawn(core_task, tmp_path):
    task = core_task([make_row("multiple_choice", random.Random(0), 0)] * 200)
    path = next(tmp_path.rglob("rows.jsonl"))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 200: no JSON"):
        task.build_all_requests(limit=2)


def test_too_few_rows_for_the_examples_are_named(core_task):
    task = core_task([make_row("multiple_choice", random.Random(0), 0)] * 3, shots=3)
    with pytest.raises(ValueError, match=r"rows\.jsonl has 3 rows, and each needs 3 others as examples: take"):
        task.shots(0, 3)


@pytest.mark.skipif("NANOCHAT_CORE_BUNDLE" not in os.environ, reason="needs the CORE bundle (NANOCHAT_CORE_BUNDLE)")
def test_core_files_say_what_the_bundle_says():
    bundle = Path(os.environ["NANOCHAT_CORE_BUNDLE"])
    with (bundle / "eval_meta_data.csv").open(encoding="utf-8", newline="") as table:
        baselines = {row["Eval Task"]: float(row["Random baseline"]) for row in csv.DictReader(table)}
    for stated in yaml.safe_load((bundle / "core.yaml").read_text(encoding="utf-8"))["icl_tasks"]:
        config = load_yaml(TASKS / f"core_{stated['label']}.yaml", resolve_func=False)
        assert config["dataset_path"] == stated["dataset_uri"]
        assert config["num_fewshot"] == stated["num_fewshot"][0]
        assert config["metadata"]["kind"] == stated["icl_task_type"]
        assert config["metadata"]["delimiter"] == stated.get("continuation_delimiter", " ")
        assert config["metadata"]["baseline"] == baselines[stated["label"]]


ROOF, NORMANS, KITTEN = (
    "He sits on a roof. he", "Question: In what centuries?\nAnswer: ", "Question: What color?\nAnswer:",
)  # fmt: skip
HELLASWAG = {"query": ROOF, "choices": ["is using wrap.", "starts."], "gold": 1}
SQUAD = {"context": NORMANS, "continuation": "10th and 11th"}
COQA = {"context": KITTEN, "continuation": "white"}
WINOGRAD = {"context_options": ["A", "B"], "continuation": "so.", "gold": 1}


@pytest.mark.parametrize(
    "label,row,shots,expected",
    [
        ("hellaswag_zeroshot", HELLASWAG, 0, [f"{ROOF} is using wrap.", f"{ROOF} starts."]),
        ("hellaswag", HELLASWAG, 1, [f"{ROOF} starts.\n\n{ROOF} {end}" for end in ("is using wrap.", "starts.")]),
        ("coqa", COQA, 0, [KITTEN, f"{KITTEN} white"]),
        ("squad", SQUAD, 1, [f"{NORMANS}10th and 11th\n\n{NORMANS[:-1]}{end}" for end in ("", " 10th and 11th")]),
        ("arc_easy", MC, 1, [f"Q\nAnswer: a\n\nQ\nAnswer: {choice}" for choice in "ab"]),
        ("winograd", WINOGRAD, 1, ["B so.\n\nA so.", "B so.\n\nB so."]),
    ],
)
def test_prompts_of_each_kind(tmp_path, tokenizer, tiny_model, label, row, shots, expected):
    task = load_task(label, tmp_path)
    assert task.prompts(row, [row] * shots) == expected
    if task.kind == "schema":
        spans = task.spans([np.array([7, 8]), np.array([5, 7, 8])])  # nothing comes before the tokens of the first
        assert [start for _, start in spans] == [2, 1]
        return
    write(tmp_path / "eval_data" / task.config.dataset_path, [row] * 12)
    (tmp_path / "core.yaml").write_text("")
    task.use(tokenizer, tiny_model.config)
    task.build_all_requests(limit=1)
    scored = [tokenizer.decode(request.continuation).strip() for request in task.instances]
    answers = row.get("choices") or [row["continuation"]]
    assert all(text and answer.endswith(text) for text, answer in zip(scored, answers, strict=True))


def test_examples_come_from_the_rows_that_are_left_but_from_at_least_one_more_than_shots(core_task):
    task = core_task([{**MC, "query": str(i)} for i in range(40)], shots=10)
    assert [task.check(limit) for limit in (None, 25, 5)] == [40, 25, 11]
    assert len({shot["query"] for shot in task.shots(3, pool=11)} - {task.test_docs()[3]["query"]}) == 10


def test_models_with_learned_positions_are_cropped_and_rotary_ones_are_not():
    limit = function("core.CoreTask").position_limit
    configs = GPT2Config(), LlamaConfig(), NanoChatConfig(max_position_embeddings=128)
    assert [limit(config) for config in configs] == [1024, None, 1280]


@pytest.mark.parametrize("longest,context", [(None, [9, 1, 2, 3, 4]), (6, [2, 3, 4]), (3, [5])])
def test_a_cropped_prompt_scores_the_same_tokens_as_a_whole_one(core_task, longest, context):
    """Cropping drops the beginning of the context; the answer's three tokens are scored, or what is left of them."""
    task = core_task([COQA], kind="language_modeling")
    ids = [np.array([9, 1, 2, 3, 4]), np.array([9, 1, 2, 3, 4, 5, 6, 7])]
    [request] = task._requests(0, {"_row": 0}, ["", ""], ids, longest)
    assert [list(request.context), list(request.continuation)] == [context, [5, 6, 7] if longest != 3 else [6, 7]]
    assert task._scored[0] == [len(request.continuation)] and task.num_long == bool(longest)


# ---- the bundle -----------------------------------------------------------------------------------------------------


@pytest.fixture
def published(tmp_path):
    """The zip as its storage has it; stored without compression, so that only its checksums show a changed byte."""
    path = tmp_path / "eval_bundle.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("eval_bundle/core.yaml", "icl_tasks: []")
        archive.writestr("eval_bundle/eval_data/commonsense_reasoning/copa.jsonl", b"x" * (3 << 20))
    return path


@pytest.fixture
def core_bundle(published, tmp_path, monkeypatch):
    """The function of that name, with an empty cache and a file as the place to download from."""
    find = function("core.core_bundle")
    monkeypatch.delenv("NANOCHAT_CORE_BUNDLE", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setitem(find.__globals__, "CACHE", tmp_path / "cache")
    monkeypatch.setitem(find.__globals__, "BUNDLE_URL", published.as_uri())
    return find


def test_the_bundle_is_fetched_once_with_progress_and_its_checksum_kept(core_bundle, published, tmp_path, capsys):
    folder, checksum = core_bundle(), hashlib.sha256(published.read_bytes()).hexdigest()
    published.unlink()
    assert folder == core_bundle() == tmp_path / "cache" / "eval_bundle"
    assert (folder / "core.yaml").read_text() == "icl_tasks: []"
    assert len((folder / "eval_data/commonsense_reasoning/copa.jsonl").read_text()) == 3 << 20
    assert (folder / "SHA256").read_text().strip() == checksum
    progress = capsys.readouterr().err
    assert "CORE bundle: 100%" in progress and "B/s" in progress


@pytest.mark.parametrize(
    "harm,words",
    [("cut", "damaged"), ("changed byte", "damaged"), ("missing", "cannot download")]
    + [("no core.yaml", "is no CORE bundle"), ("bomb", r"unpacks to 0\.020 GB, so")],
)
def test_a_damaged_download_is_one_line_and_leaves_nothing(core_bundle, published, tmp_path, monkeypatch, harm, words):
    whole = published.read_bytes()
    half = len(whole) // 2
    changed = {"cut": whole[:half], "changed byte": whole[:half] + b"y" + whole[half + 1 :]}
    published.unlink()
    if harm in changed:
        published.write_bytes(changed[harm])
    elif harm != "missing":
        monkeypatch.setitem(core_bundle.__globals__, "MAX_BUNDLE", 10**7)
        with zipfile.ZipFile(published, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("eval_bundle/readme", b"0" * (2 * 10**7 if harm == "bomb" else 1))
    with pytest.raises(ValueError, match=words) as error:
        core_bundle()
    assert "\n" not in str(error.value)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["eval_bundle.lock"]


def test_a_missing_bundle_or_file_is_named(core_bundle, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no CORE bundle"):
        core_bundle(str(tmp_path))
    with pytest.raises(InputError, match="no CORE bundle"):  # before training, not at the first measurement
        check_bundle(EvalConfig(core_bundle=str(tmp_path)))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE"):
        core_bundle()
    (tmp_path / "core.yaml").write_text("")
    with pytest.raises(ValueError, match=r"nanochat_core_squad: the bundle has no reading_comprehension/squad\.jsonl"):
        load_task("squad", tmp_path).test_docs()
