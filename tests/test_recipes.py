"""Every recipe and Accelerate config file is read by the parser of real runs; the pipeline refuses what is wrong."""

import logging
import re
import signal
import subprocess
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from accelerate import PartialState
from accelerate.commands.config.config_args import load_config_from_file

from nanochat_hf import cli, jobs, stages
from nanochat_hf.data.documents import text_fingerprint
from nanochat_hf.errors import InputError
from nanochat_hf.eval.core import load_tasks
from nanochat_hf.optim.scaling import MEASURED, Plan, plan
from nanochat_hf.run import Run, save_json, save_jsonl, start_record, write_metrics
from nanochat_hf.stage_configs import STAGE_CONFIGS, read_recipe

ROOT = Path(__file__).parent.parent
RECIPES = sorted(path.parent.name for path in (ROOT / "recipes").glob("*/base.yaml"))


def read(name: str, chosen: list[str] | None = None, overrides=()) -> tuple[list[str], dict]:
    return read_recipe(ROOT / "recipes" / name, chosen, overrides)


def planned(configs: dict) -> Plan:
    return plan(configs["base"], configs["tokenizer"].vocab_size)


@pytest.mark.parametrize("name", RECIPES)
def test_every_key_of_a_recipe_is_known_and_its_plan_can_be_made(name):
    names, configs = read(name)
    assert names[0] == "tokenizer" and names[-1] == "report" and {"base", "sft", "eval"} <= set(names)
    assert ("rl" in names) == (name == "cpu-demo")  # not enabled on GPUs
    size = planned(configs)
    assert size.num_iterations > 0 and size.total_batch_size % size.max_seq_len == 0
    if name in ("d12", "d24"):  # SFT follows pretraining directly
        assert configs["base"].save_optimizer and configs["sft"].load_optimizer
    if name != "cpu-demo" and not name.endswith("-ko"):
        corpus = "fineweb-edu" if configs["base"].generation == 1 else "climbmix"
        assert corpus in configs["base"].dataset and corpus in configs["tokenizer"].dataset
        assert {"HuggingFaceTB/smol-smoltalk", "openai/gsm8k"} <= {part["dataset"] for part in configs["sft"].mixture}


def test_the_example_numbers_of_the_readme_are_the_plans():
    assert {"cpu-demo", "d12", "d20", "d24", "d26", "d32"} <= set(RECIPES)
    text = (ROOT / "README.md").read_text()
    for name in ("d12", "d20", "d24", "d26", "d32"):
        size = planned(read(name)[1])
        row = next(line for line in text.splitlines() if line.startswith(f"| [{name}]"))
        assert f"{size.total_tokens / 1e9:.1f}B" in row and f"{size.total_flops:.1e}".replace("e+", "e") in row
        millions = size.num_parameters / 1e6
        assert (f"{millions / 1e3:.2f}B" if millions >= 1000 else f"{millions:.0f}M") in row


def test_overrides_reach_their_stage_and_another_depth_is_planned_from_the_other_keys():
    overrides = ["base.depth=6", "sft.num_iterations=5", "eval.tasks=[nanochat_gsm8k]"]
    names, configs = read("cpu-demo", ["sft", "base"], overrides)
    assert names == ["base", "sft"] and configs["base"].depth == 6 and configs["sft"].num_iterations == 5
    assert configs["eval"].tasks == ["nanochat_gsm8k"]
    size = planned(read("d24", None, ["base.depth=18"])[1])
    shape = size.model_config.num_hidden_layers, size.model_config.hidden_size
    assert (*shape, size.total_batch_size, size.num_iterations) == (18, 1152, 2**20, 2475)
    assert read("cpu-demo", None, ["eval.dataset=null"])[1]["eval"].dataset is None
    assert read("cpu-demo", None, ["eval.text_stages=null"])[1]["eval"].text_stages is None  # also of a list
    for stage in ("rl", "dpo"):
        assert stage in read("d12", None, [f"{stage}.enabled=true"])[0] and stage not in read("d12")[0]
    assert read("d12", ["dpo", "rl", "eval"])[0] == ["rl", "dpo", "eval"]


def test_a_stage_command_takes_a_recipe_name(monkeypatch, tmp_path, capsys):
    calls = []
    monkeypatch.setattr(stages, "run_stage", lambda *arguments, **options: calls.append((arguments, options)))
    monkeypatch.chdir(tmp_path)
    for command, expected in (("tokenizer", "tokenizer"), ("pretrain", "base"), ("midtrain", "mid"), ("eval", "eval")):
        cli.dispatch(command, ["--seed", "7", "cpu-demo"])  # as `nanochat run cpu-demo` does this stage
        (stage, config, run), options = calls[-1]
        assert (stage, config.seed, str(run.path)) == (expected, 7, "runs/cpu-demo")
        tasks = {"tasks": read("cpu-demo")[1]["eval"]} if stage in ("base", "mid") else {}
        assert (type(config), options) == (STAGE_CONFIGS[stage], tasks)
    assert "eval: loading PyTorch ..." in capsys.readouterr().err  # which takes seconds


def test_a_recipe_for_gpus_is_refused_before_its_tokenizer_is_trained(monkeypatch, tmp_path):
    monkeypatch.setattr(stages, "partial_state", lambda: PartialState(cpu=True))
    with pytest.raises(InputError, match="no GPU found"):
        stages.run_stages(Run(tmp_path), *read("d12"))
    assert not Run(tmp_path).folder("tokenizer").exists()


@pytest.mark.parametrize(
    "runner,cls,keys,message",
    [
        (stages.run_chat, stages.ChatConfig, {}, "stage 'sft' starts from a finished earlier stage.*run base first"),
        (stages.run_rl, stages.RLConfig, {}, "stage 'rl' starts from a finished"),
        (stages.run_dpo, stages.DPOStageConfig, {}, "stage 'dpo' starts from a finished"),
        (stages.run_base, stages.PretrainConfig, {}, "no finished tokenizer"),
        (stages.run_eval, stages.EvalConfig, {"stages": ["sft"]}, "'sft' of .* is not finished"),
    ],
)
def test_a_stage_without_what_it_starts_from_is_refused_and_so_is_a_finished_one(tmp_path, runner, cls, keys, message):
    run = Run(tmp_path)
    with pytest.raises(InputError, match=message):
        runner(cls(), run, **keys)
    if not keys:
        for stage in ("tokenizer", "base", "sft", "rl", "dpo"):
            save_json(tmp_path / stage / "metrics.json", {"finished": True})
        with pytest.raises(InputError, match="is finished already; delete it or choose another --run-dir"):
            runner(cls(), run)


def finished(run: Run, configs: dict, *names: str, **numbers) -> None:
    for name in names:
        run.folder(name).mkdir(parents=True)
        write_metrics(run.folder(name), start_record(configs[name]), **numbers)


def test_a_changed_recipe_and_a_source_that_runs_again_are_refused(tmp_path):
    run, (names, configs) = Run(tmp_path), read("cpu-demo")
    finished(run, configs, "tokenizer", "base", "mid")
    stages.check_run_folder(run, names, configs)
    changed = read("cpu-demo", None, ["base.depth=5"])[1]
    with pytest.raises(InputError, match=r"recipe changed since .*base finished \(depth: 4 -> 5\)"):
        stages.check_run_folder(run, names, changed)
    for gone, left in (("tokenizer", "base"), ("base", "mid")):
        (run.folder(gone) / "metrics.json").unlink()
        with pytest.raises(InputError, match=f"{left} was made before 'tokenizer', which runs again"):
            stages.check_run_folder(run, names, configs)
    finished(run, configs, "eval")
    stages.check_run_folder(run, ["tokenizer", "eval"], configs)  # an evaluation finds out by itself what changed
    for stage in ("tokenizer", "base"):  # of an old version
        (run.folder(stage) / "metrics.json").write_text('{"finished": true}')
    stages.check_run_folder(run, names, configs)


def test_a_finished_stage_of_another_model_or_tokenizer_is_refused(tmp_path, tokenizer):
    run, (_, configs) = Run(tmp_path), read("cpu-demo")
    finished(run, configs, "tokenizer")
    tokenizer.save_pretrained(run.folder("tokenizer"))
    finished(run, configs, "base", weights="today's")
    finished(run, configs, "sft", inputs={"model": "today's"})
    stages.check_run_folder(run, ["sft"], configs)
    save_json(run.folder("base") / "metrics.json", {"finished": True, "weights": "other"})
    with pytest.raises(InputError, match=r"sft was made from another model than the one in .*base now"):
        stages.check_run_folder(run, ["sft"], configs)
    save_json(run.folder("base") / "metrics.json", {"finished": True, "inputs": {"tokenizer": "other"}})
    with pytest.raises(InputError, match=r"base was trained with another tokenizer than that in .*tokenizer"):
        stages.check_run_folder(run, ["base"], configs)


def test_a_finished_stage_whose_local_text_changed_is_refused(tmp_path):
    text, run = tmp_path / "text.jsonl", Run(tmp_path / "run")
    text.write_text('{"text": "one"}\n' * 20)
    names, configs = read("cpu-demo", None, [f"tokenizer.dataset={text}", f"base.dataset={text}"])
    finished(run, configs, "tokenizer", "base", inputs={"data": text_fingerprint(str(text))})
    stages.check_run_folder(run, names, configs)
    text.write_text('{"text": "two"}\n' * 20)
    for stage in ("tokenizer", "base"):
        with pytest.raises(InputError, match=rf"text of .*text.jsonl changed since .*{stage} finished"):
            stages.check_run_folder(run, [stage], configs)
    text.unlink()  # gone, as after a move: nothing to compare
    stages.check_run_folder(run, names, configs)


def shown(capsys, command, *words: str) -> str:
    cli.dispatch(command, list(words))
    return capsys.readouterr().out


def test_a_dry_run_prints_the_plan_of_its_launch(capsys):
    sharded = shown(capsys, "run", "d24", "--config-file", "fsdp2", "--dry-run")
    assert all(part in sharded for part in ("sharding     FSDP2", "MFU of 0.66", "GB per GPU, without sharding"))


def test_measured_speeds_are_those_of_the_results():
    text = (ROOT / "evals" / "RESULTS.md").read_text()
    for speed in MEASURED.values():
        assert f"| {speed:,.0f} |" in text or f"| {speed / 1e3:.1f}K |" in text, speed


def test_a_copied_recipe_is_one_to_run(capsys, tmp_path, monkeypatch):
    assert "edit its YAML files" in shown(capsys, "recipes", "--copy", "cpu-demo", str(tmp_path / "mine"))
    assert read_recipe(tmp_path / "mine", None, []) == read("cpu-demo")
    lines = shown(capsys, "recipes").splitlines()
    assert [line.split()[0] for line in lines] == RECIPES and all(line.endswith(".") for line in lines)
    with pytest.raises(InputError, match="name a recipe"):
        cli.dispatch("run", [])
    monkeypatch.chdir(tmp_path)  # without a checkout the project's own files are meant
    assert "primer" in shown(capsys, "sft", "--config", "recipes/cpu-demo/sft.yaml", "--run-dir", "x", "--dry-run")
    cli.dispatch("identity", ["--identity", "recipes/identity.yaml", "--output", "y.jsonl", "--rows", "2"])


def test_the_environment_names_versions_kernels_folders_and_what_is_missing(capsys, monkeypatch):
    monkeypatch.setattr(
        metadata,
        "requires",
        lambda name: ["torch>=99", "no-such>1; extra == 'gpu'", "pyyaml", "b; extra == 'dev'", "c; extra == 'vllm'"],
    )
    text = shown(capsys, "env")
    assert f"torch                {torch.__version__}" in text and "precision" in text
    assert re.search(r"recipes +\S*recipes\nlm-eval tasks +\S*evals\n", text)
    assert re.search(r"^memory +[\d.]+ GiB$", text, re.M)
    commands = re.findall(r"missing .*: pip install (.*)", text)
    assert commands == ['"torch>=99"', '"no-such>1"']
    for home in ("/", ""):  # as in a container: it is in every path, or in all other words
        monkeypatch.setenv("HOME", home)
        text = shown(capsys, "env")
        assert re.search(r"^recipes +/.*/recipes$", text, re.M) and "~" not in text


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_every_config_file(path):
    config, keys = load_config_from_file(str(path)), yaml.safe_load(path.read_text())
    assert config.num_processes >= 1 and str(config.compute_environment).endswith("LOCAL_MACHINE")
    assert set(keys) >= {"distributed_type", "mixed_precision", "num_processes"}
    assert keys.get("gpu_ids", "all") == "all"  # any other value would silently overrule CUDA_VISIBLE_DEVICES


STOPPED = "stopped by a signal: the same command resumes the run"


@pytest.mark.parametrize(
    "code,ends,line",
    [(-15, 143, STOPPED), (130, 130, STOPPED), (2, 2, ""), (7, 7, "error: rank 0 ended with exit code 7: .*")],
)
def test_a_launch_ends_as_its_rank_does_with_one_line_and_passes_signals_on(monkeypatch, capsys, code, ends, line):
    def rank(arguments):
        assert levels == [logging.ERROR]  # the launcher's own warnings are not shown
        raise subprocess.CalledProcessError(code, "rank")

    handlers, signals, levels = {}, [], []
    children = SimpleNamespace(children=lambda: [SimpleNamespace(send_signal=signals.append)])
    monkeypatch.setattr("nanochat_hf.jobs.logging.disable", levels.append)
    monkeypatch.setattr("nanochat_hf.jobs.signal.signal", handlers.__setitem__)
    monkeypatch.setattr("nanochat_hf.jobs.psutil.Process", lambda: children)
    monkeypatch.setattr("accelerate.commands.launch.launch_command", rank)
    with pytest.raises(SystemExit) as caught:
        jobs.launch(["--cpu", "rank.py"])
    assert caught.value.code == ends and re.fullmatch(line, capsys.readouterr().err.strip())
    for number in (signal.SIGINT, signal.SIGTERM):
        handlers[number](number, None)
    assert signals == [signal.SIGTERM]  # a terminal sends Ctrl-C to the rank itself


def test_tasks_whose_data_cannot_be_had_are_refused_before_anything_is_trained(monkeypatch, tmp_path):
    monkeypatch.setattr(stages, "check_cost", lambda *_: None)
    monkeypatch.setattr(stages, "run_stage", lambda *_, **__: pytest.fail("trains"))
    save_jsonl(text := tmp_path / "text.jsonl", [{"text": "가나다 라마바"}] * 40)
    for sums in (tmp_path / "only_train.jsonl", tmp_path / "sums.jsonl"):
        save_jsonl(sums, [{"question": "1 + 1", "answer": "#### 2"}] * 9)
    save_jsonl(other := tmp_path / "other.jsonl", [{"content": "a"}] * 30)
    pq.write_table(pa.table({"content": ["a"] * 30}), table := tmp_path / "other.parquet")
    early = ["tokenizer", "base"]  # base measures CORE on the way
    for names, keys, message in (
        (None, ["eval.tasks=[nanochat_gsm8k]"], "no file gsm8k_test.jsonl in chat_data and no openai/gsm8k from the"),
        (None, ["eval.core_bundle=/nowhere"], "/nowhere is no CORE bundle"),
        (early, ["eval.core_bundle=/nowhere", "base.core_metric_every=9"], "/nowhere is no CORE bundle"),
        (None, ["eval.tasks=[nanochat_spellingbee]", f"eval.dataset={text}"], "no words of 3 to 15 letters .*words"),
        (None, ["sft.mixture=[{dataset: nowhere.jsonl}]"], "no such dataset: nowhere.jsonl"),
        (None, ["mid.validation=[{dataset: recipes/nope.yaml}]"], "no such dataset: recipes/nope.yaml"),
        (None, ["rl.dataset=of_{split}.jsonl"], "no such dataset: of_train.jsonl"),
        (None, [f"rl.dataset={tmp_path}/only_{{split}}.jsonl"], "no such dataset: .*/only_test.jsonl"),
        (None, [f"rl.dataset={sums}"], "sums.jsonl would be trained on and tested on: write {split} for"),
        (None, [f"sft.validation=[{{dataset: {text}, split: test}}]"], "is one file, and its name does not say it is"),
        (None, ["base.dataset=/nowhere"], "no such dataset: /nowhere"),
        (None, [f"base.dataset={other}"], r"other\.jsonl: the line at byte 0 has no text under 'text'"),
        (None, [f"base.dataset=[{{dataset: primer}}, {{dataset: {table}}}]"], "other.parquet has no column 'text'"),
        (None, [f"tokenizer.dataset={table}"], "other.parquet has no column 'text'"),
        (None, [f"eval.dataset={other}"], "has no text under 'text'"),
        (None, ["base.attn_implementation=flash_attention_2"], "^attn_implementation flash_attention_2: ImportError"),
        (None, ["rl.attn_implementation=flash_attention_2"], "^attn_implementation flash_attention_2: ImportError"),
        (None, ["sft.attn_implementation=flex_attention"], "flex_attention: PyTorch has no gradient of it on a CPU"),
        (None, ["tokenizer.dataset=[{dataset: primer}, {dataset: no.jsonl}]"], "no such dataset: no.jsonl"),
        (None, ["eval.dataset=/nowhere"], "no such dataset: /nowhere"),
    ):
        with pytest.raises(InputError, match=message):
            stages.run_stages(Run(tmp_path / "run"), *read("cpu-demo", names, keys))
        if "Hub" not in message and "words" not in message and "openai" not in message:  # which needs no network
            with pytest.raises(InputError, match=message):
                jobs.print_dry_run(*read("cpu-demo", names, keys))
    assert not (tmp_path / "run" / "eval").exists()
    save_json(tmp_path / "half" / "base" / "metrics.json", {"finished": True})
    monkeypatch.setattr(Run, "require_whole", lambda *_: None)
    with pytest.raises(InputError, match="/nowhere is no CORE bundle"):  # for a stage that is finished already
        stages.run_stages(Run(tmp_path / "half"), *read("cpu-demo", ["sft", "eval"], ["eval.core_bundle=/nowhere"]))

    def load(names):
        raise ConnectionError("Couldn't reach 'allenai/ai2_arc' on the Hub\n(OfflineModeIsEnabled)")  # of datasets

    with pytest.raises(InputError, match=r"^arc_easy of lm-eval cannot be loaded: Couldn't reach .* on the Hub \(Off"):
        load_tasks(SimpleNamespace(load=load), ["arc_easy"])
