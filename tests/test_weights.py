"""A result belongs to the weights that it measured, and weights are numbers: both checked on folders of files."""

import json
import os
import re

import pytest
import torch
from finished_run import COMMON, result
from safetensors.torch import load_file, save_file

from nanochat_hf import stages as speedrun
from nanochat_hf.errors import InputError
from nanochat_hf.eval import weights
from nanochat_hf.eval.report import collect, make_report
from nanochat_hf.eval.weights import (
    first_non_finite,
    model_id,
    origin,
    outdated,
    refuse_non_finite,
    renewal,
    unverified,
)
from nanochat_hf.run import Run, load_json, model_fingerprint, save_json


def write_stage(path, value, started):
    path.mkdir(exist_ok=True)
    save_file({"a": torch.zeros(3), "b": torch.full((2, 2), value)}, path / "model.safetensors")
    record = {
        **COMMON,
        "started": started,
        "wall_time_s": 1,
        "val_bpb": 1.0 + value,
        "weights": model_fingerprint(path),
    }
    save_json(path / "metrics.json", record)


@pytest.fixture
def run(tmp_path):
    """base, sft and rl, and an evaluation of all three that says which weights it measured."""
    stages = ("base", "sft", "rl")
    for number, stage in enumerate(stages):
        write_stage(tmp_path / stage, number / 4, started=float(number))
    evaluation = {**COMMON, "started": 9.0, "wall_time_s": 1, "models": {stage: stage for stage in stages}}
    evaluation["weights"] = {stage: model_id(tmp_path / stage) for stage in stages}
    evaluation["results"] = {stage: {"facts": result(number / 10)} for number, stage in enumerate(stages)}
    evaluation["examples"] = {stage: [] for stage in stages}
    save_json(tmp_path / "eval" / "metrics.json", evaluation)
    return Run(tmp_path)


def change(run, **keys):
    save_json(run.path / "eval" / "metrics.json", {**run.metrics("eval"), **keys})


def shown(run):
    """Stages with a number in the report's last table, and the notes."""
    facts = collect(run)
    return sorted(facts["table"].get("facts", {})), " ".join(facts["notes"])


def test_results_of_todays_weights_are_shown_without_a_note(run):
    assert shown(run) == (["base", "rl", "sft"], "")
    assert outdated(run, run.metrics("eval")) == {} and renewal(run) == ""


def test_results_of_weights_that_were_trained_anew_are_left_out_and_named(run):
    write_stage(run.folder("sft"), 0.75, started=1.5)
    stages, notes = shown(run)
    assert stages == ["base", "rl"] and "left out for sft (has other weights now); run it again" in notes
    assert renewal(run) == "sft (has other weights now)"
    text = make_report(run.path).read_text()
    assert "> Note: the evaluation is older than the models" in text


def test_a_stage_that_is_gone_has_no_column_and_a_new_one_is_to_be_measured(run):
    run.folder("rl").rename(run.path / "elsewhere")
    write_stage(run.folder("mid"), 0.5, started=0.5)
    assert shown(run)[0] == ["base", "sft"]
    assert renewal(run) == "rl (no finished stage of this run), mid (not measured yet)"


def test_a_stage_that_is_being_trained_again_is_not_what_was_measured(run):
    save_json(run.folder("sft") / "metrics.json", {"started": 1.0})
    assert shown(run)[0] == ["base", "rl"]


def test_an_evaluation_by_another_definition_is_run_again_for_all_stages(run):
    assert renewal(run, "today") == ""  # it does not say by which
    change(run, definition="today")
    assert renewal(run, "today") == renewal(run) == ""
    assert renewal(run, "other") == "all stages (its config, tasks, code or data changed)"


def link(run, stage, model):
    save_json(run.folder(stage) / "metrics.json", {**run.metrics(stage), "inputs": {"model": model}})


def test_the_chain_of_models_goes_by_weights_where_they_are_recorded(run):
    link(run, "sft", run.metrics("base")["weights"])
    link(run, "rl", run.metrics("sft")["weights"])
    assert shown(run)[1] == ""
    write_stage(run.folder("base"), 0.0, started=5.0)  # the same weights, made again: the times say nothing
    assert shown(run)[1] == ""
    link(run, "sft", "another")
    assert shown(run)[1] == "sft was trained from another model than today's base"


def test_the_source_of_a_stage_is_one_line_that_names_what_is_passed_over(run):
    base, sft = run.folder("base"), run.folder("sft")
    assert origin(run, "sft", str(base)) == f"[sft] starts from {base}"
    run.folder("mid").mkdir()
    passed_over = f"; mid in {run.path}, not finished, is passed over"
    assert origin(run, "sft", str(base)) == f"[sft] starts from {base}{passed_over}"
    assert origin(run, "rl", sft) == f"[rl] starts from {sft}"
    assert origin(run, "mid", base) == f"[mid] starts from {base}"
    assert origin(run, "sft", "elsewhere/base") == "[sft] starts from elsewhere/base"
    assert origin(run, "dpo", run.folder("rl")) == f"[dpo] starts from {run.folder('rl')}"


@pytest.mark.parametrize(
    "runner,trainer,stage,source",
    [
        ("run_chat", "train_chat", "sft", "base"),
        ("run_rl", "train_rl", "rl", "sft"),
        ("run_dpo", "train_dpo", "dpo", "rl"),
    ],
)
def test_the_stages_say_which_model_they_start_from(run, monkeypatch, capsys, runner, trainer, stage, source):
    monkeypatch.setattr(speedrun, trainer, lambda *args, **keys: None)
    if stage != "dpo":
        (run.folder(stage) / "metrics.json").unlink()
    getattr(speedrun, runner)(None, run)
    assert capsys.readouterr().out == f"[{stage}] starts from {run.folder(source)}\n"


def test_the_pipeline_refuses_a_stage_whose_weights_were_replaced(run):
    configs = {stage: speedrun.CONFIGS[stage]() for stage in ("base", "sft")}
    speedrun.check_run_folder(run, ["base", "sft"], configs)
    save_file({"a": torch.ones(3)}, run.folder("base") / "model.safetensors")
    for stages in (["base"], ["sft"], ["base", "sft", "report"]):
        with pytest.raises(InputError, match=r"weights in .*base are not those that its metrics\.json describes"):
            speedrun.check_run_folder(run, stages, configs)
    speedrun.check_run_folder(run, ["report"], configs)  # leaves its numbers out and says so


def test_a_tokenizer_or_chat_template_changed_later_is_another_model(run):
    (run.folder("sft") / "chat_template.jinja").write_text("{{ messages }}")
    assert list(outdated(run, run.metrics("eval"))) == ["sft"]


def test_weights_replaced_by_hand_take_the_stages_own_numbers_away(run):
    save_file({"a": torch.ones(3)}, run.folder("base") / "model.safetensors")
    facts = collect(run)
    assert "base" not in facts["stages"] and "val bpb" not in facts["table"]
    assert "the weights of base are not those that its metrics.json describes" in " ".join(facts["notes"])


def test_weights_deleted_after_the_evaluation_leave_its_results_valid(run):
    (run.folder("base") / "model.safetensors").unlink()
    assert shown(run) == (["base", "rl", "sft"], "")
    write_stage(run.folder("base"), 0.9, started=0.0)
    (run.folder("base") / "model.safetensors").unlink()
    assert shown(run)[0] == ["rl", "sft"]


def test_a_moved_run_keeps_its_results(run, tmp_path):
    moved = Run(run.path.rename(tmp_path.parent / f"{tmp_path.name}-moved"))
    assert shown(moved) == (["base", "rl", "sft"], "")


def test_an_evaluation_without_recorded_weights_is_shown_as_not_verified_or_by_its_time_left_out(run):
    change(run, weights=None, models={stage: f"runs/d4/{stage}" for stage in ("base", "sft", "rl")})
    assert unverified(run, run.metrics("eval")) == ["base", "sft", "rl"] and renewal(run) == ""
    assert shown(run) == (
        ["base", "rl", "sft"],
        "not verified: the evaluation does not say which weights of base, sft, rl it measured",
    )
    write_stage(run.folder("sft"), 0.5, started=10.0)
    stages, notes = shown(run)
    assert stages == ["base", "rl"] and "sft (trained after the evaluation)" in notes
    assert "rl was trained before today's sft" in notes


def test_a_model_from_elsewhere_is_named_and_never_stands_in_a_stages_column(run, tmp_path):
    change(run, models={"base": "org/other", "sft": "sft", "rl": "rl"})
    stages, notes = shown(run)
    assert stages == ["rl", "sft"] and "base (org/other was measured in its place)" in notes
    save_json(tmp_path / "alone" / "eval" / "metrics.json", {**run.metrics("eval"), "models": {"base": "org/other"}})
    stages, notes = shown(Run(tmp_path / "alone"))
    assert "base" in stages and notes == "base is org/other"


def test_a_hub_ids_weights_are_its_commit(tmp_path, monkeypatch):
    commit = "0123456789" * 4
    place = tmp_path / "models--org--small" / "snapshots" / commit / "config.json"
    monkeypatch.setattr(weights, "cached_file", lambda name, file: str(place))
    assert model_id("org/small") == commit
    monkeypatch.undo()
    assert model_id("org/not-here") is None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_value_that_is_no_number_is_found_in_any_shard_and_named(tmp_path, value, dtype, monkeypatch):
    monkeypatch.setattr(weights, "CHUNK", 8)  # a piece is two rows of four
    save_file({"fine": torch.ones(5, 4, dtype=dtype), "count": torch.tensor(3)}, tmp_path / "a.safetensors")
    bad = torch.ones(5, 4, dtype=dtype)
    save_file({"bad.weight": bad}, tmp_path / "b.safetensors")
    refuse_non_finite(tmp_path)
    bad[4, 3] = value
    save_file({"bad.weight": bad}, tmp_path / "b.safetensors")
    with pytest.raises(InputError, match=r"not finite \(NaN or infinity in bad.weight of b.safetensors\)") as error:
        refuse_non_finite(tmp_path)
    assert "\n" not in str(error.value)


def test_scalars_integers_eight_bit_floats_and_empty_tensors_are_looked_at_rightly():
    good = {"i": torch.tensor([1, 2]), "e": torch.ones(2).to(torch.float8_e4m3fn), "none": torch.zeros(0, 3)}
    assert first_non_finite(good.items()) is None
    assert first_non_finite([("e", torch.tensor([float("nan")]).to(torch.float8_e4m3fn))]) == "e"
    assert first_non_finite([("s", torch.tensor(float("inf")))]) == "s"


def test_a_cut_off_file_is_one_line(tmp_path):
    save_file({"a": torch.ones(100)}, tmp_path / "model.safetensors")
    os.truncate(tmp_path / "model.safetensors", 100)
    with pytest.raises(InputError, match=r"model\.safetensors cannot be read"):
        refuse_non_finite(tmp_path)


def test_a_report_of_weights_that_are_no_numbers_is_refused(run):
    values = load_file(run.folder("sft") / "model.safetensors")
    values["b"][0, 1] = float("nan")
    save_file(values, run.folder("sft") / "model.safetensors")
    with pytest.raises(InputError, match=r"NaN or infinity in b of model\.safetensors"):
        make_report(run.path)


def test_numbers_that_were_nan_are_a_dash_and_null(run):
    path = run.path / "eval" / "metrics.json"
    found = run.metrics("eval")
    found["results"]["sft"]["facts"]["value"] = float("nan")
    core = {"value": None, "stderr": None, "label": "CORE", "n": 1}
    core["per_task"] = {"piqa": {"acc": None, "centered": None, "stderr": None, "n": 3}}
    path.write_text(json.dumps({**found, "core": {"base": core}}))  # as an older version wrote it, with NaN
    base = load_json(run.folder("base") / "metrics.json")
    history = [{"step": step, "train_loss": [1.0, None, 2.0][step]} for step in range(3)]
    save_json(run.folder("base") / "metrics.json", {**base, "history": history})
    text = make_report(run.path).read_text()
    assert not re.search(r"\bnan\b", text, re.I) and "None" not in text
    assert "NaN" not in (run.path / "report.json").read_text()
    assert collect(run)["table"]["facts"]["sft"]["value"] is None


def test_the_pipeline_measures_again_only_the_stages_that_changed_and_says_so(
    tmp_path, tiny_model, tokenizer, monkeypatch, capsys
):
    recipe, run = tmp_path / "recipe", Run(tmp_path / "run")
    recipe.mkdir()
    (recipe / "base.yaml").write_text("dataset: primer\n")
    keys = "tasks: [nanochat_demo_spelling]\nlimit: 2\nbpb_tokens: 128\nmax_new_tokens: 4\n"
    (tmp_path / "rows").mkdir()
    keys += f"chat_data: {tmp_path / 'rows'}\n"
    (recipe / "eval.yaml").write_text(keys)
    for number, stage in enumerate(("base", "sft")):
        tiny_model.save_pretrained(run.folder(stage))
        tokenizer.save_pretrained(run.folder(stage))
        save_json(run.folder(stage) / "metrics.json", {**COMMON, "started": float(number)})

    def again():
        words = ["--recipe", str(recipe), "--run-dir", str(run.path), "--stages", "eval"]
        monkeypatch.setattr("sys.argv", ["speedrun.py", *words])
        speedrun.main()
        return capsys.readouterr().out

    again()
    assert "[eval] already finished, skipping: " in again()
    path = run.folder("sft") / "model.safetensors"
    values = load_file(path)
    values[min(values)] += 1
    save_file(values, path, metadata={"format": "pt"})
    said = again()
    assert ": finished earlier, runs again for sft (has other weights now)" in said
    assert "[eval] base: measured earlier, with the same weights" in said and "[eval] sft: val bpb" in said
    assert run.metrics("eval")["weights"] == {stage: model_fingerprint(run.folder(stage)) for stage in ("base", "sft")}
    assert "[eval] already finished, skipping: " in again()
    (tmp_path / "rows" / "gsm8k_test.jsonl").write_text("")
    said = again()
    assert "runs again for all stages (its config, tasks, code or data changed)" in said
    assert "[eval] base: val bpb" in said and "[eval] sft: val bpb" in said
    assert "[eval] already finished, skipping: " in again()
