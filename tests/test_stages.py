"""The pipeline of stages: what runs, is skipped or runs again, what each stage is given, and what is said of it."""

import re
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import ANY

import pytest

from nanochat_hf import stages
from nanochat_hf.demo import corpus as primer
from nanochat_hf.errors import InputError
from nanochat_hf.run import Run, save_json
from nanochat_hf.serve.terminal_chat import Options
from nanochat_hf.stage_configs import find_recipe, read_recipe

RATE = 24.0


@pytest.fixture
def calls(monkeypatch):
    """Notes (name, arguments, keywords) of all that the pipeline calls, which does nothing but finish a stage."""
    noted = []

    def replaced(name, result=None):
        def note(*arguments, **options):
            noted.append((name, arguments, options))
            return result(*arguments) if callable(result) else result

        monkeypatch.setattr(stages, name, note)

    def finish(stage, config, run, **_):
        save_json(run.folder(stage) / "metrics.json", {"finished": True})

    def report(path, **_):
        save_json(path / "report.json", {"facts": 1})
        return path / "report.md"

    replaced("run_stage", finish)
    replaced("make_report", report)
    for name in ("check_cost", "check_tasks", "check_bundle", "check_data", "show_answers", "train_tokenizer"):
        replaced(name)
    for name in ("pretrain", "train_chat", "train_rl", "train_dpo", "evaluate"):
        replaced(name)
    for name in ("core_metric", "chatcore_metric", "checkpoint_pusher"):
        replaced(name, name)
    replaced("load_tokenizer", lambda source: f"tokenizer of {source}")
    monkeypatch.setattr(stages, "markdown", lambda facts, macro: f"{facts} as a {macro}\n")
    monkeypatch.setattr(stages, "renewal", lambda run, definition: "")
    monkeypatch.setattr(stages, "definition_of", lambda config: "today")
    monkeypatch.setattr(Run, "require_whole", lambda *_: None)  # these stages have no files
    return noted


def took(calls, *names):
    return [call for call in calls if call[0] in names]


def test_the_pipeline_runs_each_stage_once_with_its_options(calls, tmp_path, capsys, monkeypatch):
    run, (names, configs) = Run(tmp_path / "run"), read_recipe(find_recipe("cpu-demo"), None, [])
    stages.run_stages(run, names, configs, "me/x", RATE)
    tasks = {"tasks": configs["eval"]}
    options = {"base": {"repo": "me/x"} | tasks, "mid": tasks, "sft": tasks, "eval": {"keep_unchanged": True}}
    expected = [("run_stage", (name, configs[name], run), options.get(name, {})) for name in names[:-1]]
    assert took(calls, "run_stage") == expected
    assert took(calls, "check_data") == [("check_data", (name, configs[name]), {}) for name in names[:-1]]
    assert took(calls, "make_report", "show_answers")[-2:] == [
        ("make_report", (run.path,), {"hourly_rate": RATE}), ("show_answers", (run, "primer"), {})
    ]  # fmt: skip
    [(_, (size, _), _)] = took(calls, "check_cost")
    assert size.model_config.vocab_size == 1024 and size.num_iterations == 700
    present = ["base", "mid", "sft", "rl"]
    assert took(calls, "check_tasks") == [("check_tasks", (configs["eval"], present, run.folder("eval")), {})]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"7 stages into {run.path}:" and [x[2:5] for x in lines[1:8]] == [f"[{n}/" for n in range(1, 8)]
    assert lines[8:10] == ["", "[1/7] tokenizer"] and lines[-2:] == ["", "{'facts': 1} as a summary"]
    assert f"[7/7] report: {run.path}/report.html and {run.path}/report.md" in lines
    calls.clear()
    stages.run_stages(run, names, configs)
    assert not took(calls, "run_stage", "check_cost", "check_tasks", "check_data")
    out = capsys.readouterr().out
    skipped = re.findall(r"^\[(\w+)\] already finished, skipping: (.*)$", out, re.M)
    assert skipped == [(name, str(run.folder(name))) for name in names[:-1]]
    monkeypatch.setattr(stages, "renewal", lambda run, definition: f"sft by {definition}")
    stages.run_stages(run, ["eval"], configs)
    assert took(calls, "run_stage") == [("run_stage", ("eval", configs["eval"], run), {"keep_unchanged": True})]
    out = capsys.readouterr().out
    assert "1 stage into" in out and "\n[1/1] eval: finished earlier, runs again for sft by today\n" in out


def test_core_on_the_way_is_checked_before_base_and_only_then(calls, tmp_path):
    save_json(tmp_path / "tokenizer" / "metrics.json", {"finished": True})
    for every, names, checked in ((9, ["base"], 1), (-1, ["base"], 0), (9, ["tokenizer"], 0), (0, ["base"], 0)):
        keys = [f"base.core_metric_every={every}", "eval.core_bundle=b"]
        _, configs = read_recipe(find_recipe("cpu-demo"), None, keys)
        run = Run(tmp_path)
        stages.run_stages(run, names, configs)
        assert len(took(calls, "check_bundle")) == checked and not took(calls, "check_cost")
        calls.clear()
        (run.folder("base") / "metrics.json").unlink(missing_ok=True)


BASE, BUNDLE = stages.PretrainConfig(core_metric_every=5), stages.EvalConfig(core_bundle="b")
CHAT = stages.ChatConfig(chatcore_every=5)
BOTH = {"base": "{run}/base", "dpo": "{run}/dpo"}
GIVEN = [  # stage, config, options of `run_stage` -> the last call
    ("tokenizer", stages.TokenizerConfig(), {}, ("train_tokenizer", (ANY, "{run}/tokenizer"), {})),
    ("base", BASE, {}, ("pretrain", (BASE, "{run}/tokenizer", "{run}/base", None), {"core": None, "push": None})),
    ("base", BASE, {"tokenizer": "t", "model": "m", "repo": "me/x", "tasks": BUNDLE},
     ("pretrain", (BASE, "t", "{run}/base", "m"), {"core": "core_metric", "push": "checkpoint_pusher"})),
    ("base", stages.PretrainConfig(), {"tasks": BUNDLE}, ("pretrain", (ANY,) * 4, {"core": None, "push": None})),
    ("base", stages.PretrainConfig(core_metric_every=0), {"tasks": BUNDLE},
     ("pretrain", (ANY,) * 4, {"core": None, "push": None})),
    ("sft", stages.ChatConfig(chatcore_every=0), {"tasks": BUNDLE}, ("train_chat", (ANY, ANY, "{run}/sft", None), {})),
    ("base", BASE, {"tasks": stages.EvalConfig()}, ("pretrain", (ANY,) * 4, {"core": None, "push": None})),
    ("mid", CHAT, {}, ("train_chat", (CHAT, "{run}/base", "{run}/mid", None), {})),
    ("sft", CHAT, {"tasks": BUNDLE, "model": "m"}, ("train_chat", (CHAT, "m", "{run}/sft", "chatcore_metric"), {})),
    ("sft", stages.ChatConfig(), {"tasks": BUNDLE}, ("train_chat", (ANY, "{run}/base", "{run}/sft", None), {})),
    ("rl", stages.RLConfig(), {}, ("train_rl", (stages.RLConfig(), "{run}/base", "{run}/rl", stages.engine), {})),
    ("rl", stages.RLConfig(), {"model": "m"}, ("train_rl", (ANY, "m", "{run}/rl", stages.engine), {})),
    ("dpo", stages.DPOStageConfig(), {"model": "m"}, ("train_dpo", (stages.DPOStageConfig(), "m", "{run}/dpo"), {})),
    ("eval", BUNDLE, {"keep_unchanged": True},
     ("evaluate", (BUNDLE, BOTH, "{run}/eval", stages.engine), {"keep_unchanged": True})),
    ("eval", BUNDLE, {"stages": ["base"]}, ("evaluate", (ANY, {"base": "{run}/base"}, ANY, ANY), {})),
    ("eval", BUNDLE, {"model": "org/x"}, ("evaluate", (ANY, {"base": "org/x"}, ANY, ANY), {})),
]  # fmt: skip


@pytest.mark.parametrize("stage,config,options,expected", GIVEN)
def test_a_stage_is_given_its_config_source_folder_and_measurements(calls, tmp_path, stage, config, options, expected):
    for name in {"tokenizer", "base", "dpo"} - {stage}:  # nothing starts from a later stage
        save_json(tmp_path / name / "metrics.json", {"finished": True})
    (tmp_path / "rl").mkdir(exist_ok=True)  # not finished: nobody evaluates it
    runner = {"mid": lambda *words, **more: stages.run_chat(*words, "mid", **more)}.get(stage, stages.RUNNERS[stage])
    runner(config, Run(tmp_path), **options)
    name, arguments, more = calls[-1]

    def in_text(value):
        if isinstance(value, dict):
            return {key: str(one) for key, one in value.items()}
        return str(value) if hasattr(value, "joinpath") else value

    def filled(value):
        if isinstance(value, dict):
            return {key: filled(one) for key, one in value.items()}
        return value.replace("{run}", str(tmp_path)) if isinstance(value, str) else value

    assert (name, tuple(map(in_text, arguments)), more) == (expected[0], tuple(map(filled, expected[1])), expected[2])
    first = {call[0]: call[1] for call in calls[:-1]}
    sft = (BUNDLE, "tokenizer of m", tmp_path / "sft" / "state", stages.engine)
    measures = {"core_metric": ("tokenizer of t", "b"), "chatcore_metric": sft, "checkpoint_pusher": ("me/x",)}
    assert {key: words for key, words in first.items() if key in measures}.items() <= measures.items()


def test_chatcore_without_its_data_is_left_out_or_refused_where_it_was_asked_for(calls, tmp_path, monkeypatch, capsys):
    def missing(*_):
        raise InputError("no gsm8k")

    save_json(tmp_path / "base" / "metrics.json", {"finished": True})
    monkeypatch.setattr(stages, "chatcore_metric", missing)
    stages.run_chat(CHAT, Run(tmp_path), tasks=BUNDLE)
    assert calls[-1][0] == "train_chat" and calls[-1][1][3] is None
    assert capsys.readouterr().out == f"[sft] starts from {tmp_path}/base\nno ChatCORE on the way: no gsm8k\n"
    with pytest.raises(InputError, match="no gsm8k"):
        stages.run_chat(CHAT, Run(tmp_path), tasks=BUNDLE, required=True)


def test_a_stage_is_named_to_its_runner_and_its_result_is_shown(monkeypatch, tmp_path):
    noted = []
    monkeypatch.setattr(stages, "show_result", noted.append)
    for stage in stages.RUNNERS:
        monkeypatch.setitem(stages.RUNNERS, stage, lambda *words, **options: noted.append(options))
        stages.run_stage(stage, None, Run(tmp_path), model="m")
    expected = [{"model": "m"} | ({"stage": stage} if stage in ("mid", "sft") else {}) for stage in stages.RUNNERS]
    assert noted[0::2] == expected and noted[1::2] == [tmp_path / stage for stage in stages.RUNNERS]


HISTORY = [{"step": 1, "train_loss": 3.0, "val_bpb": 1.5}, {"step": 2, "train_loss": 2.0, "val_bpb": None}]
RESULTS = {"sft": {"facts": {"value": 0.5}, "sums": {"value": 1.0}, "bpb": {"value": 9, "higher_is_better": False}}}
FIGURES = [  # metrics.json of a stage, the figures of its last line
    ("tokenizer", {"vocab_size": 1024, "bytes_per_token": 2.5}, "1,024 tokens, 2.50 bytes per token"),
    ("base", {"history": HISTORY[:1], "val_bpb": 1.25}, "val bpb 1.2500"),
    ("base", {"history": [{"train_loss": 3.0}, {"train_loss": 2.0}]}, "loss 2.000"),
    ("sft", {"history": [{"train_loss": 3.0, "val_loss": 1.5}]}, "val loss 1.5000"),
    ("rl", {"before": {"pass@1": 0.25}, "after": {"pass@1": 0.5}, "history": HISTORY}, "pass@1 0.2500 -> 0.5000"),
    ("dpo", {"before": {"accuracy": 0.5}, "after": {"accuracy": 0.75}}, "accuracy 0.5000 -> 0.7500"),
    ("eval", {"results": {"base": {}} | RESULTS}, "mean of 2 tasks 0.7500 (sft)"),
    ("eval", {"chatcore": {"sft": {"label": "2/6", "value": 0.5}}, "results": RESULTS}, "2/6 0.5000"),
    ("eval", {"core": {"base": {"label": "CORE", "value": 0.25, "per_task": {}}},
              "kocore": {"mid": {"label": "K", "value": 0}, "sft": {"label": "KoCORE", "value": 0.125}}},
     "CORE 0.2500, KoCORE 0.1250"),
    ("sft", {}, ""), ("eval", {"results": {"base": {"bpb": RESULTS["sft"]["bpb"]}}}, ""),
]  # fmt: skip


@pytest.mark.parametrize("stage,metrics,figures", FIGURES)
def test_the_last_line_of_a_stage_has_its_time_main_figure_and_folder(tmp_path, capsys, stage, metrics, figures):
    stages.show_result(tmp_path / stage)
    save_json(tmp_path / stage / "metrics.json", {"wall_time_s": 60.0} | metrics)
    stages.show_result(tmp_path / stage)
    figures = f", {figures}" if figures else ""
    assert capsys.readouterr().out == f"[{stage}] done in 1 min 00 s{figures}, {tmp_path}/{stage}\n"


def test_the_outline_estimates_each_stage_of_a_cpu_by_its_tokens(monkeypatch):
    """Two cores of 5e10 FLOPs: 15,894 tokens per second of cpu-demo; an RL token costs 2.6 of them, .6 to sample."""
    monkeypatch.setattr(stages.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(stages, "on_cpu", lambda: True)
    names, configs = read_recipe(find_recipe("cpu-demo"), None, ["base.num_iterations=70000"])
    lines = stages.outline(names, configs, 1)
    rl = configs["rl"]
    sampled = 2.6 * 100 * (0.6 / 4 + 0.4) * rl.examples_per_step * rl.num_samples * rl.max_new_tokens
    minutes = -(-sampled // (15_894 * 60))
    assert list(lines.values()) == [
        "[1/7] tokenizer", "[2/7] base: 70,000 steps, about 2 h 31 min", "[3/7] mid: 150 steps, about 1 min",
        "[4/7] sft: 300 steps, about 1 min", f"[5/7] rl: 100 steps, about {minutes:.0f} min",
        "[6/7] eval", "[7/7] report",
    ]  # fmt: skip
    monkeypatch.setattr(stages, "on_cpu", lambda: False)  # MPS, of which nothing is known
    assert stages.outline(names, configs, 1)["base"] == "[2/7] base: 70,000 steps"
    monkeypatch.setattr(stages, "gpu_here", lambda: "NVIDIA H200")
    assert stages.outline(names, configs, 1)["rl"] == "[5/7] rl: 100 steps"  # of which nothing was measured on GPUs
    line = stages.outline(*read_recipe(find_recipe("d24"), None, []), ranks=8)["base"]
    assert line == "[2/5] base: 5,568 steps, about 1 h 22 min"  # in FP8, as nanochat plan has it
    _, configs = read_recipe(find_recipe("d12"), None, ["sft.num_epochs=0.5"])
    assert stages.outline(["sft"], configs, 8)["sft"] == "[1/1] sft: 0.5 x the data"


def test_the_newest_chat_model_answers_three_questions_and_a_base_model_none(monkeypatch, tmp_path, capsys):
    noted = []
    monkeypatch.setattr(stages.Engine, "from_pretrained", lambda folder: f"engine of {folder}")
    monkeypatch.setattr(stages, "LocalModel", lambda *words: words)
    chat = SimpleNamespace(ask=lambda text, before: noted.append((text, before)))
    monkeypatch.setattr(stages, "Chat", lambda *words: noted.append(words) or chat)
    stages.show_answers(Run(tmp_path), "primer")
    save_json(tmp_path / "base" / "metrics.json", {"finished": True})
    stages.show_answers(Run(tmp_path), "primer")
    assert not noted and not capsys.readouterr().out
    save_json(tmp_path / "sft" / "metrics.json", {"finished": True})
    folder, kinds = f"{tmp_path}/sft", ("fact", "arithmetic", "counting")
    for dataset, texts in (
        ("x", ["Who are you?", "Why is the sky blue?", "What is 317 times 24?"]),
        ("primer", [primer.questions(kind, num=1)[0]["messages"][0]["content"] for kind in kinds]),
    ):
        noted.clear()
        stages.show_answers(Run(tmp_path), dataset)
        assert noted[0] == ((f"engine of {folder}", folder), Options(temperature=0.0, max_new_tokens=256))
        assert noted[1:] == [(text, []) for text in texts]
        out = capsys.readouterr().out
        assert out.startswith(f"\nThree questions to {folder}:\n\n> {texts[0]}\n\n> {texts[1]}\n\n> {texts[2]}\n")
        assert re.search(rf"nanochat chat --run-dir {tmp_path}\n  \S*nanochat serve --run-dir {tmp_path}\n$", out)


def test_the_fast_engine_is_for_our_models_on_a_gpu(monkeypatch):
    monkeypatch.setattr(stages, "Engine", lambda *words: ("engine", *words))
    monkeypatch.setattr(stages, "Generator", lambda *words: ("generator", *words))
    for device, kind, name in (
        ("cuda", "nanochat", "engine"), ("cuda", "nanochat_hf", "engine"), ("cuda", "gpt2", "generator"),
        ("cpu", "nanochat_hf", "generator"),
    ):  # fmt: skip
        model = SimpleNamespace(device=SimpleNamespace(type=device), config=SimpleNamespace(model_type=kind))
        assert stages.engine(model, "t") == (name, model, "t")


def test_stages_to_evaluate_that_a_run_does_not_have_are_no_change_of_the_recipe(tmp_path):
    run = Run(tmp_path)
    configs = {"eval": stages.EvalConfig(chat_stages=["sft", "rl"])}
    record = {"finished": True, "config": {"chat_stages": ["sft"], "max_per_task": None}}
    for has_rl in (False, True):
        for stage in ["sft", *["rl"] * has_rl]:
            run.folder(stage).mkdir(exist_ok=True)
        save_json(run.folder("eval") / "metrics.json", record)
        refused = pytest.raises(InputError, match=r"changed since .*eval finished \(chat_stages: \['sft'\] -> \['sf")
        with refused if has_rl else nullcontext():
            stages.check_run_folder(run, ["eval"], configs)
    changed = {"eval": replace(configs["eval"], chat_stages=["sft"], max_per_task=3)}
    with pytest.raises(InputError, match=r"\(max_per_task: None -> 3\); use another --run-dir"):
        stages.check_run_folder(run, ["eval"], changed)
