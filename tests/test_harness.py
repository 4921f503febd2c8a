"""Evaluating a run: the content of metrics.json, resuming, ChatCORE during training, wrong input as one clear line."""

import json
import os
import shutil
import subprocess
import sys
from math import isnan
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from nanochat_hf import sandbox
from nanochat_hf.demo import corpus as primer
from nanochat_hf.errors import InputError
from nanochat_hf.eval.harness import (
    EvalConfig,
    bpb_datasets,
    chatcore_metric,
    check_counts,
    check_tasks,
    core_metric,
    definition_of,
    evaluate,
)
from nanochat_hf.eval.lm_eval_model import load
from nanochat_hf.eval.tasks import Tasks
from nanochat_hf.run import load_json, model_fingerprint, save_json

ROOT = Path(__file__).parent.parent
NUM_QUESTIONS = 6
SPELLING = {"tasks": ["nanochat_demo_spelling"], "bpb_stages": ["base"], "bpb_tokens": 256}


@pytest.fixture
def run(tmp_path, tiny_model, tokenizer):
    """A run folder, with a name that patterns read specially, with one untrained model as base and as sft."""
    tmp_path = tmp_path / "v[2]{a,b}*?"
    for stage in ("base", "sft"):
        tiny_model.save_pretrained(tmp_path / stage)
        tokenizer.save_pretrained(tmp_path / stage)
    return tmp_path


@pytest.fixture
def loads(monkeypatch):
    """A function that returns the stages that were loaded, so measured, since the last call."""
    names = []

    def recording_load(folder, *rest):
        names.append(Path(folder).name)
        return load(folder, *rest)

    def since():
        recent = names[:]
        names.clear()
        return recent

    monkeypatch.setattr("nanochat_hf.eval.harness.load", recording_load)
    return since


def config(**keys):
    sizes = {"max_per_task": NUM_QUESTIONS, "bpb_tokens": 512, "max_new_tokens": 8, "batch_size": 8}
    return EvalConfig(**sizes | keys)


class Oracle:
    """Generates the right answer to every question of the demo, to show that grading and bookkeeping work."""

    built, synced = 0, 0

    def __init__(self, model, tokenizer):
        type(self).built += 1
        self.tokenizer = tokenizer
        kinds = ("fact", "arithmetic", "spelling", "counting", "problem")
        self.rows = {row["messages"][0]["content"]: row for kind in kinds for row in primer.questions(kind)}

    def sync_weights(self):
        type(self).synced += 1

    def generate(self, prompts, num_samples=1, **options):
        answers = []
        for prompt in prompts:
            text = self.tokenizer.decode(prompt)
            row = self.rows[text.split("<|user_start|>")[1].split("<|user_end|>")[0]]
            words = f"<|python_start|>1+1<|python_end|><|output_start|>2<|output_end|>{row['entity']}: {row['answer']}"
            ids = self.tokenizer(words + "<|assistant_end|>", add_special_tokens=False)["input_ids"]
            answers.append([ids] * num_samples)
        return answers


class Interrupted(Oracle):
    def generate(self, *args, **kwargs):
        raise KeyboardInterrupt


def measure(run, stages=("base", "sft"), engine=Oracle, keep_unchanged=False, **keys):
    models = {stage: str(run / stage) for stage in stages}
    return evaluate(config(**SPELLING | keys), models, run / "eval", engine, keep_unchanged)


def change_weights(folder, value=None):
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in sorted(tensors) if "mlp" in name]:
        tensors[name] = tensors[name] + 0.5 if value is None else tensors[name].fill_(value)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_parts_of_a_mixture_with_one_name_are_measured_each():
    parts = ["a/web/data/kor_Hang/train", "b/web/data/kor_Hang/train", "primer", "primer"]
    datasets = bpb_datasets([{"dataset": part} for part in parts])
    assert list(datasets) == ["val_bpb", "bpb kor_Hang", f"bpb {parts[1]}", "bpb primer"]
    assert list(datasets.values())[1:] == parts[:3]


def test_every_demo_task_is_graded_and_recorded(run):
    metrics = measure(run, tasks=["nanochat_demo"])
    assert json.loads((run / "eval" / "metrics.json").read_text())["finished"]
    results = metrics["results"]["sft"]
    assert set(results) == {"facts", "arithmetic", "spelling", "counting", "problems"}
    for result in results.values():
        assert (result["value"], result["n"], result["tool_use"], result["stderr"]) == (1.0, NUM_QUESTIONS, 1.0, 0.0)
    assert 0.16 < results["counting"]["baseline"] < 1
    assert set(metrics["results"]["base"]) == {"val_bpb"} and metrics["results"]["base"]["val_bpb"]["n"] == 256
    assert set(metrics["bytes_per_token"]) == {"books", "code", "korean", "math"}
    assert metrics["models"] == {"base": "base", "sft": "sft"}
    assert 0 < metrics["seconds"]["base"]["val_bpb"] <= metrics["seconds"]["base"]["all"]
    samples = [json.loads(line) for line in (run / "eval/samples/sft/nanochat_demo_facts.jsonl").open()]
    assert len(samples) == NUM_QUESTIONS and set(samples[0]) == {"question", "expected", "answer", "correct"}
    assert samples[:2] == metrics["examples"]["sft"][:2] and not (run / "eval" / "state").exists()


def test_generated_code_needs_a_sandbox_before_a_model_is_loaded(run, loads, monkeypatch, tmp_path, capsys):
    row = {"task_id": "HumanEval/0", "prompt": "def f():\n", "test": "def check(f):\n    f()\n", "entry_point": "f"}
    row["canonical_solution"] = "    pass\n"
    (tmp_path / "humaneval.jsonl").write_text(json.dumps(row) + "\n")
    keys = {"tasks": ["nanochat_humaneval"], "chat_data": str(tmp_path), "dataset": None}
    assert measure(run, engine=None, **keys)["results"]["sft"]["HumanEval"]["n"] == 1
    assert f"[eval] sandbox of generated code: {', '.join(sandbox.layers())}" in capsys.readouterr().out
    monkeypatch.setattr(sandbox, "layers", lambda: ("namespaces",))
    monkeypatch.setenv(sandbox.ALLOW, "")
    assert loads() == ["base", "sft"]
    with pytest.raises(InputError, match="with all files of this user"):
        measure(run, **keys)
    assert loads() == []
    measure(run, engine=None, **keys, allow_unsandboxed_code=True)


def test_the_built_in_engine_answers_and_several_samples_give_pass_at_k(run):
    keys = {"dataset": None, "num_samples": 3, "temperature": 1.0}
    metrics = measure(run, engine=None, **keys)
    assert metrics["results"]["sft"]["spelling"]["value"] == 0.0 and "base" not in metrics["results"]
    assert measure(run, **keys)["results"]["sft"]["spelling"]["pass@3"] == 1.0


@pytest.mark.parametrize("what", ["nothing", "weights", "task"])
def test_an_interrupted_evaluation_is_used_only_for_the_same_weights_config_and_tasks(run, loads, monkeypatch, what):
    """Interrupted in sft; base is measured again if what decides its numbers changed."""
    shutil.copytree(ROOT / "evals", run / "evals")
    monkeypatch.setattr("nanochat_hf.eval.harness.EVALS", run / "evals")
    with pytest.raises(KeyboardInterrupt):
        measure(run, engine=Interrupted)
    assert loads() == ["base", "sft"] and not (run / "eval" / "metrics.json").exists()
    if what == "weights":
        change_weights(run / "base")
    elif what == "task":
        (run / "evals" / "tasks" / "demo_spelling.yaml").open("a").write("# changed\n")
    metrics = measure(run)
    assert loads() == (["sft"] if what == "nothing" else ["base", "sft"])
    assert metrics["weights"] == {stage: model_fingerprint(run / stage) for stage in ("base", "sft")}


def test_a_finished_evaluation_is_reused_for_the_stages_that_did_not_change(run, loads, capsys):
    shutil.copytree(run / "sft", run / "rl")
    first = measure(run, ("base", "sft", "rl"))
    assert loads() == ["base", "sft", "rl"] and (run / "eval" / "samples" / "rl").is_dir()
    change_weights(run / "sft")
    second = measure(run, keep_unchanged=True)
    assert loads() == ["sft"]
    assert "[eval] base: measured earlier, with the same weights" in capsys.readouterr().out
    assert second["results"]["base"] == first["results"]["base"] and set(second["results"]) == {"base", "sft"}
    assert second["weights"]["sft"] == model_fingerprint(run / "sft") != first["weights"]["sft"]
    assert [path.name for path in (run / "eval" / "samples").iterdir()] == ["sft"]  # none of a stage that is gone
    for keep_unchanged in (True, False):  # another config; then without the wish
        measure(run, keep_unchanged=keep_unchanged, max_per_task=7)
        assert loads() == ["base", "sft"]


def test_measuring_one_stage_again_keeps_what_is_still_true_of_the_others(run, loads, capsys):
    for stage in ("base", "sft"):
        save_json(run / stage / "metrics.json", {"finished": True, "weights": model_fingerprint(run / stage)})
    before, samples = measure(run), run / "eval" / "samples" / "sft"
    loads()
    after = measure(run, ["base"])
    assert loads() == ["base"] and "left out" not in capsys.readouterr().out
    for key in ("results", "examples", "weights", "models", "definition"):
        assert after[key] == before[key], key
    left_out = "[eval] results of sft are left out: weights, config, tasks or data changed since"
    for number, what in enumerate(("config", "weights"), start=1):
        before |= {"started": 1e9 + number}  # a second loss does not replace what the first one kept
        save_json(run / "eval" / "metrics.json", before)
        if what == "weights":
            change_weights(run / "sft")
        after = measure(run, ["base"], **({"bpb_tokens": 128} if what == "config" else {}))
        assert set(after["results"]) == set(after["weights"]) == set(after["models"]) == {"base"}
        out = capsys.readouterr().out
        assert left_out in out and samples.is_dir()  # the stage is still there
        assert load_json(out.split("are kept in ")[1].split("\n")[0]) == before
        assert len(list((run / "eval").glob("metrics-*.json"))) == number
    contents = [path.read_bytes() for path in sorted(samples.iterdir())]
    with pytest.raises(KeyboardInterrupt):  # as refused input in the midst of the evaluation
        measure(run, ["sft"], Interrupted)
    assert contents == [path.read_bytes() for path in sorted(samples.iterdir())] != []
    shutil.rmtree(run / "sft")
    measure(run, ["base"])
    assert not samples.exists()


@pytest.mark.parametrize("key", ["chat_data", "words", "core_bundle", "dataset", "mixture"])
def test_the_definition_depends_on_data_below_the_home_folder(tmp_path, monkeypatch, key):
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / "data" / "eval_data" / "a.jsonl"  # CORE's bundle has subfolders
    file.parent.mkdir(parents=True)
    keys = {"dataset": [{"dataset": "~/data"}]} if key == "mixture" else {key: "~/data"}

    def definition(text, time):
        file.write_text(text)
        os.utime(file, (time, time))
        return definition_of(config(**keys))

    first = definition("a", 1)
    assert first == definition("a", 1) != definition("ab", 1) != definition("b", 2) != first  # of the same size, too
    monkeypatch.setattr("nanochat_hf.eval.harness.metadata.version", lambda name: "9")
    assert definition("a", 1) != first


def test_the_definition_depends_on_the_code_that_asks_computes_and_grades(tmp_path, monkeypatch):
    package = shutil.copytree(ROOT / "nanochat_hf", tmp_path / "package", ignore=shutil.ignore_patterns("kernels"))
    monkeypatch.setattr("nanochat_hf.eval.harness.PACKAGE", package)
    before = definition_of(config())
    files = "bpb core", "dataloader documents grading mixture tokenizer transforms"  # which rows, tokens, grades
    files = [f"{folder}/{name}" for folder, names in zip(("eval", "data"), files) for name in names.split()]
    for file in (*files, "demo/corpus", "tool_loop", "tools"):
        (package / f"{file}.py").open("a").write("# changed\n")
        assert before != (before := definition_of(config())), file


def test_a_model_from_elsewhere_is_recorded_by_its_place(run, tiny_folder):
    metrics = evaluate(config(**SPELLING), {"base": str(tiny_folder)}, run / "eval", Oracle)
    assert metrics["models"] == {"base": str(tiny_folder)}


@pytest.mark.parametrize(
    "keys,words",
    [
        ({"chat_data": "/nowhere"}, "no folder /nowhere"),
        ({"tasks": ["nanochat_mmlu"]}, "no file mmlu_test.jsonl"),
        ({"tasks": ["nanochat_mmlu"], "break": "samples"}, "no file mmlu_test.jsonl"),
        ({"stages": []}, "no finished model"),
        ({"break": "template"}, "no chat template, so it cannot answer nanochat_demo_spelling"),
        ({"break": "nan"}, r"not finite .NaN or infinity in .*mlp"),
        ({"break": "overflow"}, r"gives NaN for text, in torch\.float32"),
        ({"break": "questions"}, "cannot write .*eval/questions"),
    ],
)  # fmt: skip
def test_wrong_input_is_one_clear_line(run, keys, words):
    keys = dict(keys)
    stages, broken = keys.pop("stages", ("base", "sft")), keys.pop("break", "")
    if broken == "template":
        (run / "sft" / "chat_template.jinja").unlink()
    elif broken in ("nan", "overflow"):
        change_weights(run / "base", float("nan") if broken == "nan" else 1e38)
    elif broken:
        (run / "eval").mkdir()
        (run / "eval" / broken).touch()  # a file where the folder should be: OSError, as of a full disk
    with pytest.raises(InputError, match=words) as error:
        evaluate(config(**SPELLING | keys), {stage: str(run / stage) for stage in stages}, run / "eval")
    assert "\n" not in str(error.value) and not (run / "eval" / "metrics.json").exists()
    if "tasks" in keys:
        assert [path.name for path in run.glob("eval/*")] == [broken] * bool(broken)


def test_a_damaged_record_is_refused_before_anything_is_measured(run):
    (run / "eval").mkdir()
    (run / "eval" / "metrics.json").write_text('{"results')
    with pytest.raises(
        InputError, match=r"eval/metrics\.json is not valid JSON .*; delete it to run that stage again"
    ):
        evaluate(config(**SPELLING), {"base": str(run / "base")}, run / "eval")
    assert [path.name for path in run.glob("eval/*")] == ["metrics.json"]


def test_each_process_needs_a_question():
    check_counts(config(max_per_task=2), 2)
    with pytest.raises(InputError, match="max_per_task is 1: give at least one question for each of 2"):
        check_counts(config(max_per_task=1), 2)


# ---- during training ------------------------------------------------------------------------------------------------

TASKS = ["nanochat_demo_arithmetic", "nanochat_demo_spelling"]


def test_core_during_training_is_a_number(tiny_model, tokenizer, tmp_path):
    write_copa(tmp_path)
    assert -1 <= core_metric(tokenizer, str(tmp_path))(tiny_model, 8) <= 1


def write_copa(folder):
    path = folder / "eval_data" / "commonsense_reasoning" / "copa.jsonl"
    path.parent.mkdir(parents=True)
    rows = [{"query": f"It rains {i} so", "choices": ["we run", "we all sing"], "gold": i % 2} for i in range(9)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "core.yaml").write_text("icl_tasks: []")


def test_chatcore_has_one_engine_and_is_nan_if_questions_have_one_answer(tiny_model, tokenizer, tmp_path, monkeypatch):
    Oracle.built = Oracle.synced = 0
    chatcore = chatcore_metric(EvalConfig(tasks=TASKS, batch_size=4), tokenizer, tmp_path, Oracle)
    assert chatcore(tiny_model, 3) == chatcore(tiny_model, 5) == 1.0
    assert (Oracle.built, Oracle.synced) == (1, 1)
    certain = {"value": 1.0, "stderr": 0.0, "n": 1, "baseline": 1.0}
    limits, owner = [], "nanochat_hf.eval.tasks.Tasks.run"
    monkeypatch.setattr(owner, lambda self, name, lm: limits.append(self.config.max_per_task) or ({name: certain}, []))
    assert isnan(chatcore(tiny_model, 1)) and isnan(chatcore(tiny_model, 0)) and limits == [1, 1, None, None]  # 0: all
    half = {"value": 0.5, "n": 1, "baseline": 0.25, "chatcore": True}
    other = {"value": 1.0, "n": 1, "baseline": 0.0}
    monkeypatch.setattr(owner, lambda self, name, lm: ({"a": half, "b": other}, []))
    assert chatcore(tiny_model, 1) == pytest.approx(1 / 3)  # of its own tasks, where there are some
    with pytest.raises(InputError, match="nanochat_demo_poetry"):
        chatcore_metric(EvalConfig(tasks=["nanochat_demo_poetry"]), tokenizer, tmp_path)
    with pytest.raises(InputError, match="none of no tasks is a chat task"):
        chatcore_metric(EvalConfig(tasks=[]), tokenizer, tmp_path)


@pytest.mark.slow
def test_the_numbers_do_not_depend_on_the_number_of_processes_or_batch_sizes(run, tmp_path):
    write_copa(tmp_path / "bundle")
    keys = {"max_per_task": 7, "bpb_tokens": 4096, "max_new_tokens": 8, "core_max_per_task": 9}
    keys |= {"core_bundle": str(tmp_path / "bundle"), "tasks": ["nanochat_demo_counting", "nanochat_demo_facts"]}
    records = []
    for processes in (1, 2):
        sizes = {"batch_tokens": 4096 // processes**3, "batch_size": 8 // processes**2}
        models = {stage: str(run / stage) for stage in ("base", "sft")}
        job = {"do": "evaluate", "output": str(tmp_path / f"eval{processes}"), "models": models, **keys, **sizes}
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command += [str(ROOT / "tests" / "workers.py"), json.dumps([job])]
        environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        subprocess.run(command, check=True, env=environment, timeout=170, capture_output=True)
        records.append(load_json(tmp_path / f"eval{processes}" / "metrics.json"))
    one, two = records
    assert two["hardware"]["num_processes"] == 2
    for stage, tasks in one["results"].items():
        for name, result in tasks.items():
            other = two["results"][stage][name]
            assert other["n"] == result["n"]
            assert other["value"] == pytest.approx(result["value"], rel=1e-5 if name == "val_bpb" else 1e-9)
    for key in ("value", "per_task", "long_prompts"):
        assert one["core"]["base"][key] == two["core"]["base"][key]
    assert len((tmp_path / "eval2/samples/sft/nanochat_demo_facts.jsonl").read_text().splitlines()) == 7


def test_chatcore_during_training_is_greedy_whatever_the_evaluation_samples(tiny_model, tokenizer, tmp_path):
    temperatures = []

    class Recorder(Oracle):
        def generate(self, *args, temperature, **options):
            temperatures.append(temperature)
            return super().generate(*args, **options)

    sampled = EvalConfig(tasks=TASKS, temperature=1.0, num_samples=4)
    assert chatcore_metric(sampled, tokenizer, tmp_path, Recorder)(tiny_model, 3) == 1.0
    assert set(temperatures) == {0.0}


def test_sizes_and_limits_reach_those_who_measure(run, tiny_model, tokenizer, monkeypatch, tmp_path):
    calls, harness = [], "nanochat_hf.eval.harness."
    core = {"value": 0.5, "label": "CORE", "seconds": 2.0, "model_seconds": 1.0}
    bpb = {"value": 1.0, "stderr": None, "n": 256}
    monkeypatch.setattr(harness + "evaluate_core", lambda lm, tasks, limit, log: calls.append(limit) or core)
    monkeypatch.setattr(harness + "held_out_bpb", lambda model, tokenizer, *of: calls.append(of) or bpb)
    monkeypatch.setattr(harness + "Generator", lambda *of: calls.append(of[2]) or Oracle(*of[:2]))
    monkeypatch.setattr(harness + "compression", lambda tokenizer: {"of": Path(tokenizer.name_or_path).name})
    write_copa(tmp_path / "copa")
    keys = {"core_bundle": str(tmp_path / "copa"), "core_max_per_task": 9, "core_stages": ["base"], "batch_size": 3}
    metrics = measure(run, engine=None, batch_tokens=640, **keys)
    assert calls == [3, ("primer", 256, 640), 9, 3] and metrics["bytes_per_token"] == {"of": "base"}
    for limit in (5, 0):
        core_metric(tokenizer, str(tmp_path / "copa"))(tiny_model, limit)
    assert calls[-2:] == [5, None]  # 0: all


def test_weights_that_cannot_be_identified_are_measured_again(run, loads, monkeypatch):
    monkeypatch.setattr("nanochat_hf.eval.harness.model_id", lambda folder: None)  # a Hub id without network
    for _ in range(2):
        measure(run, keep_unchanged=True)
        assert loads() == ["base", "sft"]


def test_spelling_asks_about_words_that_no_training_row_has(tmp_path):
    (tmp_path / "words.txt").write_text("river\npiano\ntiger\n")  # piano is the one of the test split
    Tasks(EvalConfig(tasks=["nanochat_spellingbee"], words=str(tmp_path / "words.txt")), {"sft": ""}, tmp_path)
    text = (tmp_path / "questions" / "spellingbee_test.jsonl").read_text()
    assert text.count("piano") >= 256 and "river" not in text and "tiger" not in text


def test_an_evaluation_of_nothing_is_refused_and_keeps_the_record(tmp_path):
    save_json(tmp_path / "metrics.json", {"finished": True})
    for keys in ({"tasks": [], "dataset": None}, {"chat_stages": ["rl"], "bpb_stages": []}):
        for check in (evaluate, check_tasks):
            with pytest.raises(InputError, match="nothing would be measured of sft: name tasks"):
                check(EvalConfig(**keys), {"sft": "x"}, tmp_path)
    assert load_json(tmp_path / "metrics.json") == {"finished": True}
