"""Evaluating a run: what lands in metrics.json, resuming, and each wrong input as one clear line."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from nanochat_hf.demo import corpus as primer
from nanochat_hf.errors import InputError
from nanochat_hf.eval.harness import EvalConfig, core_metric, definition_of, evaluate
from nanochat_hf.eval.lm_eval_model import load
from nanochat_hf.eval.tasks import write_jsonl
from nanochat_hf.run import Run, load_json, model_fingerprint, save_json
from nanochat_hf.stages import run_eval

ASKED = 6
ROOT = Path(__file__).parent.parent


@pytest.fixture
def run(tmp_path, tiny_model, tokenizer):
    """A run folder with one untrained model as base and as sft."""
    for stage in ("base", "sft"):
        tiny_model.save_pretrained(tmp_path / stage)
        tokenizer.save_pretrained(tmp_path / stage)
    return tmp_path


def config(**keys):
    return EvalConfig(**{"max_per_task": ASKED, "bpb_tokens": 512, "max_new_tokens": 8, "batch_size": 8, **keys})


def models(run):
    return {stage: str(run / stage) for stage in ("base", "sft")}


class Knower:
    """Generates the right answer to every question of the primer, to show that grading and bookkeeping work."""

    def __init__(self, model, tokenizer):
        self.tokenizer, self.asked = tokenizer, 0
        rows = [
            row for kind in ("fact", "arithmetic", "spelling", "counting", "problem") for row in primer.questions(kind)
        ]
        self.answers = {row["messages"][0]["content"]: row for row in rows}

    def generate(self, prompts, num_samples=1, **options):
        answers = []
        for prompt in prompts:
            text = self.tokenizer.decode(prompt)
            row = self.answers[text.split("<|user_start|>")[1].split("<|user_end|>")[0]]
            words = f"<|python_start|>1+1<|python_end|><|output_start|>2<|output_end|>{row['entity']}: {row['answer']}"
            ids = self.tokenizer(words + "<|assistant_end|>", add_special_tokens=False)["input_ids"]
            answers.append([ids] * num_samples)
            self.asked += 1
        return answers


def test_every_demo_task_is_graded_and_recorded(run):
    found = evaluate(config(bpb_stages=["base"]), models(run), run / "eval", engine=Knower)
    assert json.loads((run / "eval" / "metrics.json").read_text())["finished"]
    results = found["results"]["sft"]
    assert set(results) == {"facts", "arithmetic", "spelling", "counting", "problems"}
    for result in results.values():
        assert result["value"] == 1.0
        assert result["n"] == ASKED
        assert result["tool_use"] == 1.0
        assert result["stderr"] == 0.0
    assert 0.16 < results["counting"]["baseline"] < 1
    assert set(found["results"]["base"]) == {"val_bpb"}
    assert 3 < found["results"]["base"]["val_bpb"]["value"] < 9  # untrained: 9 bits a token of 1 to 3 bytes
    assert found["bloat"]["files"] > 20
    assert set(found["bytes_per_token"]) == {"books", "code", "korean", "math"}
    assert found["bytes_per_token"]["books"]["ours"] > found["bytes_per_token"]["korean"]["ours"] >= 1
    samples = [json.loads(line) for line in (run / "eval/samples/sft/nanochat_demo_facts.jsonl").open()]
    assert len(samples) == ASKED
    assert set(samples[0]) == {"question", "expected", "answer", "correct"}
    assert not (run / "eval" / "state").exists()


def test_an_untrained_model_scores_nothing_on_facts(run):
    found = evaluate(config(dataset=None, tasks=["nanochat_demo_facts"]), models(run), run / "eval")
    assert found["results"]["sft"]["facts"]["value"] == 0.0
    assert "base" not in found["results"]


def test_a_killed_evaluation_goes_on_with_the_stage_it_had_not_finished(run, monkeypatch):
    keys = {"tasks": ["nanochat_demo_spelling"], "bpb_stages": ["base"]}

    class Fails(Knower):
        def generate(self, *args, **kwargs):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(config(**keys), models(run), run / "eval", engine=Fails)
    assert not (run / "eval" / "metrics.json").exists()
    assert (run / "eval" / "state" / "base.json").exists()
    loaded = []
    monkeypatch.setattr(
        "nanochat_hf.eval.harness.load", lambda folder, *rest: loaded.append(folder) or load(folder, *rest)
    )
    found = evaluate(config(**keys), models(run), run / "eval", engine=Knower)
    assert [Path(folder).name for folder in loaded] == ["sft"]
    assert "val_bpb" in found["results"]["base"]


SPELLING = {"tasks": ["nanochat_demo_spelling"], "bpb_stages": ["base"], "bpb_tokens": 256}


class Loads(list):
    """Which stages were loaded, so measured, since the last look."""

    def look(self):
        names = [Path(folder).name for folder in self]
        self.clear()
        return names


@pytest.fixture
def loads(monkeypatch):
    names = Loads()
    monkeypatch.setattr(
        "nanochat_hf.eval.harness.load", lambda folder, *rest: names.append(folder) or load(folder, *rest)
    )
    return names


def change_weights(folder):
    values = load_file(folder / "model.safetensors")
    values[min(values)].add_(0.5)
    save_file(values, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("what", ["nothing", "config", "weights", "template", "task", "data"])
def test_an_interrupted_evaluation_is_used_only_for_the_same_weights_config_tasks_and_data(
    run, loads, monkeypatch, what
):
    """Measured of base, then broken off in sft; base is measured again if what decides its numbers changed."""
    tasks = run / "evals"
    shutil.copytree(ROOT / "evals", tasks)
    monkeypatch.setattr("nanochat_hf.eval.harness.EVALS", tasks)
    (run / "data").mkdir()
    (run / "data" / "gsm8k_test.jsonl").write_text("")
    keys = {**SPELLING, "chat_data": str(run / "data")}

    class Fails(Knower):
        def generate(self, *args, **kwargs):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(config(**keys), models(run), run / "eval", engine=Fails)
    assert loads.look() == ["base", "sft"]
    if what == "config":
        keys["bpb_tokens"] = 128
    elif what == "weights":
        change_weights(run / "base")
    elif what == "template":
        (run / "base" / "chat_template.jinja").write_text("{{ messages }}")
    elif what == "task":
        (tasks / "tasks" / "demo_spelling.yaml").open("a").write("# asks otherwise now\n")
    elif what == "data":
        (run / "data" / "gsm8k_test.jsonl").write_text('{"question": "?", "answer": "#### 1"}\n')
    metrics = evaluate(config(**keys), models(run), run / "eval", engine=Knower)
    assert loads.look() == (["sft"] if what == "nothing" else ["base", "sft"])
    assert metrics["weights"] == {stage: model_fingerprint(run / stage) for stage in ("base", "sft")}
    assert metrics["models"] == {"base": "base", "sft": "sft"}
    if what == "config":
        assert metrics["results"]["base"]["val_bpb"]["n"] == 128


def test_a_finished_evaluation_is_taken_over_for_the_stages_that_did_not_change(run, loads, capsys):
    shutil.copytree(run / "sft", run / "rl")
    first = evaluate(config(**SPELLING), {**models(run), "rl": str(run / "rl")}, run / "eval", engine=Knower)
    assert loads.look() == ["base", "sft", "rl"] and (run / "eval" / "samples" / "rl").is_dir()
    change_weights(run / "sft")
    second = evaluate(config(**SPELLING), models(run), run / "eval", engine=Knower, keep_unchanged=True)
    assert loads.look() == ["sft"]
    assert "[eval] base: measured earlier, with the same weights" in capsys.readouterr().out
    assert second["results"]["base"] == first["results"]["base"] and set(second["results"]) == {"base", "sft"}
    assert second["weights"]["sft"] == model_fingerprint(run / "sft") != first["weights"]["sft"]
    assert sorted(path.name for path in (run / "eval" / "samples").iterdir()) == [
        "sft"
    ]  # none of a stage that is gone
    evaluate(config(**SPELLING, max_per_task=7), models(run), run / "eval", engine=Knower, keep_unchanged=True)
    assert loads.look() == ["base", "sft"]
    evaluate(config(**SPELLING, max_per_task=7), models(run), run / "eval", engine=Knower)  # by the script: all of it
    assert loads.look() == ["base", "sft"]


@pytest.fixture
def measured_run(run):
    """base and sft, finished, and an evaluation of both."""
    for stage in ("base", "sft"):
        save_json(run / stage / "metrics.json", {"finished": True, "weights": model_fingerprint(run / stage)})
    evaluate(config(**SPELLING), models(run), run / "eval", engine=Knower)
    return run


def measure_base_alone(run, **keys):
    return evaluate(config(**{**SPELLING, **keys}), {"base": str(run / "base")}, run / "eval", engine=Knower)


def test_measuring_one_stage_again_keeps_the_results_and_samples_of_the_others(measured_run, loads, capsys):
    before = load_json(measured_run / "eval" / "metrics.json")
    after = measure_base_alone(measured_run)
    assert loads.look() == ["base"] and "left out" not in capsys.readouterr().out
    for key in ("results", "examples", "weights", "models", "definition"):
        assert after[key] == before[key], key
    assert (measured_run / "eval" / "samples" / "sft" / "nanochat_demo_spelling.jsonl").is_file()


@pytest.mark.parametrize("what", ["config", "weights"])
def test_results_of_other_stages_that_changed_are_left_out_in_one_line(measured_run, capsys, what):
    if what == "weights":
        change_weights(measured_run / "sft")
    after = measure_base_alone(measured_run, **({"bpb_tokens": 128} if what == "config" else {}))
    assert set(after["results"]) == set(after["weights"]) == set(after["models"]) == {"base"}
    assert (
        "[eval] results of sft are left out: weights, config, tasks or data changed since" in capsys.readouterr().out
    )
    assert (measured_run / "eval" / "samples" / "sft").is_dir()  # the stage is still there


def test_samples_of_a_stage_that_is_gone_go(measured_run):
    shutil.rmtree(measured_run / "sft")
    assert set(measure_base_alone(measured_run)["results"]) == {"base"}
    assert not (measured_run / "eval" / "samples" / "sft").exists()


@pytest.mark.parametrize("key", ["chat_data", "words", "core_bundle", "dataset", "mixture"])
def test_the_definition_sees_data_below_the_home_folder(tmp_path, monkeypatch, key):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.jsonl").write_text("a")
    keys = {"dataset": [{"dataset": "~/data"}]} if key == "mixture" else {key: "~/data"}
    first = definition_of(config(**keys))
    assert definition_of(config(**keys)) == first
    (tmp_path / "data" / "a.jsonl").write_text("ab")
    assert definition_of(config(**keys)) != first


def test_data_of_the_chat_tasks_is_read_below_the_home_folder(run, monkeypatch):
    monkeypatch.setenv("HOME", str(run))
    (run / "data").mkdir()
    (run / "data" / "gsm8k_test.jsonl").write_text('{"question": "1+1?", "answer": "#### 2"}\n')
    keys = {"dataset": None, "tasks": ["nanochat_gsm8k"], "chat_data": "~/data", "max_per_task": 1}
    assert evaluate(config(**keys), {"sft": str(run / "sft")}, run / "eval")["results"]["sft"]


@pytest.mark.parametrize("place", ["questions", "samples"])
def test_a_place_that_cannot_be_written_is_one_line(run, place):
    (run / "eval").mkdir()
    (run / "eval" / place).touch()  # a file where the folder should be: OSError, as of a full disk
    with pytest.raises(InputError, match=f"cannot write .*eval/{place}") as error:
        evaluate(config(**SPELLING), models(run), run / "eval", engine=Knower)
    assert "\n" not in str(error.value)


def test_a_state_that_lacks_keys_is_no_measurement(run, loads):
    save_json(run / "eval" / "state" / "base.json", {"finished": True})
    evaluate(config(**SPELLING), models(run), run / "eval", engine=Knower)
    assert loads.look() == ["base", "sft"]


def test_a_model_from_elsewhere_is_recorded_by_its_place(run, tiny_folder):
    metrics = evaluate(config(**SPELLING), {"base": str(tiny_folder)}, run / "eval", engine=Knower)
    assert metrics["models"] == {"base": str(tiny_folder)}


def test_weights_that_are_no_numbers_are_not_measured(run):
    values = load_file(run / "base" / "model.safetensors")
    name = next(name for name in sorted(values) if "mlp" in name)
    values[name][0, 0] = float("nan")
    save_file(values, run / "base" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=f"not finite .NaN or infinity in {name}"):
        evaluate(config(**SPELLING), models(run), run / "eval", engine=Knower)
    assert not (run / "eval" / "metrics.json").exists()


def test_a_model_whose_finite_weights_give_nan_is_not_measured(run):
    values = load_file(run / "base" / "model.safetensors")
    for name in values:
        if "mlp" in name:
            values[name].fill_(1e38)
    save_file(values, run / "base" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"gives NaN for text, in torch\.float32"):
        evaluate(config(**SPELLING), models(run), run / "eval", engine=Knower)


def test_samples_hold_null_for_what_is_no_number(tmp_path):
    write_jsonl(tmp_path / "a" / "b.jsonl", [{"answer": {"A": float("nan"), "B": -float("inf")}}, {"answer": "é"}])
    assert (tmp_path / "a" / "b.jsonl").read_text("utf-8") == '{"answer": {"A": null, "B": null}}\n{"answer": "é"}\n'


def test_several_samples_give_pass_at_k(run):
    keys = {"num_samples": 3, "temperature": 1.0, "dataset": None, "tasks": ["nanochat_demo_spelling"]}
    found = evaluate(config(**keys), models(run), run / "eval", engine=Knower)
    assert found["results"]["sft"]["spelling"]["pass@3"] == 1.0


def test_core_while_training_is_a_number(tiny_model, tokenizer, tmp_path):
    folder = tmp_path / "eval_data" / "commonsense_reasoning"
    folder.mkdir(parents=True)
    rows = [{"query": f"It rains {i} so", "choices": ["we run", "we sing"], "gold": i % 2} for i in range(8)]
    (folder / "copa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "core.yaml").write_text("icl_tasks: []")
    assert -1 <= core_metric(tokenizer, str(tmp_path))(tiny_model, 8) <= 1


@pytest.mark.parametrize(
    "keys,words",
    [
        ({"tasks": ["nanochat_demo_fact"]}, "did you mean 'nanochat_demo_facts'"),
        ({"core_bundle": "/nowhere"}, "no CORE bundle"),
        ({"chat_data": "/nowhere"}, "no folder /nowhere"),
        ({"num_samples": 2}, "needs a temperature"),
        ({"dtype": "float12"}, "float12"),
        ({"max_per_task": 0}, "max_per_task is 0"),
        ({"tasks": ["nanochat_mmlu"]}, "no file mmlu_test.jsonl"),
    ],
)
def test_wrong_input_is_one_clear_line(run, keys, words):
    with pytest.raises(InputError, match=words) as error:
        evaluate(config(**{"dataset": None, **keys}), models(run), run / "eval")
    assert "\n" not in str(error.value)
    assert not (run / "eval" / "metrics.json").exists()


def test_a_model_without_chat_template_cannot_chat(run, tokenizer):
    (run / "sft" / "chat_template.jinja").unlink()
    with pytest.raises(InputError, match="no chat template"):
        evaluate(config(dataset=None), {"sft": str(run / "sft")}, run / "eval")


def test_a_stage_that_is_not_finished_is_not_left_out_in_silence(run):
    (run / "base" / "metrics.json").write_text('{"finished": true}')
    for stages in ("base,rl", "sft", "tokenizer", "bass"):
        with pytest.raises(InputError, match=f"'{stages.split(',')[-1]}' is no finished stage with a model"):
            run_eval(config(), Run(run), stages=stages)


def test_a_missing_model_is_named(run):
    with pytest.raises(InputError, match="nothing-here"):
        evaluate(config(), {"sft": str(run / "nothing-here")}, run / "eval")
    with pytest.raises(InputError, match="no finished model"):
        evaluate(config(), {}, run / "eval")


@pytest.mark.slow
def test_the_numbers_do_not_depend_on_the_number_of_processes_or_batch_sizes(run, tmp_path):
    folder = tmp_path / "bundle" / "eval_data" / "commonsense_reasoning"
    folder.mkdir(parents=True)
    rows = [{"query": f"It rains {i} so", "choices": ["we run", "we all sing"], "gold": i % 2} for i in range(9)]
    (folder / "copa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "bundle" / "core.yaml").write_text("icl_tasks: []")
    program = tmp_path / "program.py"
    program.write_text(
        "import sys\nfrom pathlib import Path\nimport nanochat_hf\n"
        "from nanochat_hf.eval.harness import EvalConfig, evaluate\n"
        "config = EvalConfig(max_per_task=7, bpb_tokens=4096, batch_tokens=int(sys.argv[4]),\n"
        "                    batch_size=int(sys.argv[5]),\n"
        "                    max_new_tokens=8, core_max_per_task=9, core_bundle=sys.argv[2],\n"
        "                    tasks=['nanochat_demo_counting', 'nanochat_demo_facts'])\n"
        "evaluate(config, {stage: f'{sys.argv[1]}/{stage}' for stage in ('base', 'sft')}, Path(sys.argv[3]))\n"
    )
    found = []
    for processes in (1, 2):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command += [str(program), str(run), str(tmp_path / "bundle"), str(tmp_path / f"eval{processes}")]
        command += [str(4096 // processes**3), str(8 // processes**2)]  # other batches, too
        environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        subprocess.run(command, check=True, env=environment, timeout=170, capture_output=True)
        found.append(json.loads((tmp_path / f"eval{processes}" / "metrics.json").read_text()))
    one, two = found
    assert two["hardware"]["num_processes"] == 2
    for stage, tasks in one["results"].items():
        for name, result in tasks.items():
            other = two["results"][stage][name]
            assert other["n"] == result["n"]
            assert other["value"] == pytest.approx(result["value"], rel=1e-5 if name == "val_bpb" else 1e-9)
    for key in ("value", "per_task", "long_prompts"):
        assert one["core"]["base"][key] == two["core"]["base"][key]
    assert len((tmp_path / "eval2/samples/sft/nanochat_demo_facts.jsonl").read_text().splitlines()) == 7
