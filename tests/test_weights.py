"""A result belongs to the weights that it measured, and weights are finite: both checked on folders of files."""

import json
import os
import re

import pytest
import torch
from finished_run import COMMON, result
from safetensors.torch import save_file

from nanochat_hf import stages as pipeline
from nanochat_hf.errors import InputError
from nanochat_hf.eval import weights
from nanochat_hf.eval.report import collect, make_report
from nanochat_hf.eval.weights import first_non_finite, model_id, origin, refuse_non_finite, renewal
from nanochat_hf.run import Run, load_json, model_fingerprint, save_json
from nanochat_hf.stage_configs import STAGE_CONFIGS


def write_stage(path, value, started):
    path.mkdir(exist_ok=True)
    save_file({"a": torch.zeros(3), "b": torch.full((2, 2), value)}, path / "model.safetensors")
    record = {"started": started, "wall_time_s": 1, "val_bpb": 1.0 + value, "weights": model_fingerprint(path)}
    save_json(path / "metrics.json", COMMON | record)


@pytest.fixture
def run(tmp_path):
    """base, sft and rl, and an evaluation of all three that says which weights it measured."""
    stages = ("base", "sft", "rl")
    for number, stage in enumerate(stages):
        write_stage(tmp_path / stage, number / 4, started=float(number))
    evaluation = {**COMMON, "started": 9.0, "wall_time_s": 1, "models": {stage: stage for stage in stages}}
    evaluation["weights"] = {stage: model_id(tmp_path / stage) for stage in stages}
    evaluation["results"] = {stage: {"facts": result(number / 10)} for number, stage in enumerate(stages)}
    evaluation |= {"examples": {stage: [] for stage in stages}, "bytes_per_token": {"books": {"ours": 4.0}}}
    save_json(tmp_path / "eval" / "metrics.json", evaluation)
    return Run(tmp_path)


def change(run, **keys):
    save_json(run.path / "eval" / "metrics.json", {**run.metrics("eval"), **keys})


def retrain(run, stage="sft", started=1.5):
    write_stage(run.folder(stage), 0.75, started)


def change_template(run):
    (run.folder("sft") / "chat_template.jinja").touch()


def begin_again(run):
    save_json(run.folder("sft") / "metrics.json", {"started": 1.0})


def remove_rl_add_mid(run):
    run.folder("rl").rename(run.path / "elsewhere")
    retrain(run, "mid", 0.5)


def delete_weights(run, stage="base"):
    (run.folder(stage) / "model.safetensors").unlink()


def retrain_and_delete_weights(run):
    retrain(run, "base", 0.0)
    delete_weights(run)


def replace_by_hand(run):
    save_file({"a": torch.ones(3)}, run.folder("base") / "model.safetensors")


def measure_another(run):
    change(run, models={"base": "org/other", "sft": "sft", "rl": "rl"})


OLDER = "the evaluation is older than the models, its results are left out for {}; run it again"
REPLACED = "base: the weights are not those that its metrics.json describes, so its numbers are left out"


@pytest.mark.parametrize(
    "edit,stages,note,again",
    [
        (lambda run: None, "base rl sft", "", ""),
        (retrain, "base rl", OLDER, "sft (has other weights now)"),
        (change_template, "base rl", OLDER, "sft (has other weights now)"),
        (begin_again, "base rl", OLDER, "sft (no finished stage of this run)"),
        (remove_rl_add_mid, "base sft", "", "rl (no finished stage of this run), mid (not measured yet)"),
        (delete_weights, "base rl sft", "", ""),  # after the evaluation
        (retrain_and_delete_weights, "rl sft", OLDER, "base (has other weights now)"),
        (replace_by_hand, "rl sft", REPLACED, "base (has other weights now)"),
        (measure_another, "rl sft", OLDER, "base (org/other was measured in its place)"),
    ],
)
def test_results_of_other_weights_are_left_out_with_a_note_and_measured_again(run, edit, stages, note, again):
    edit(run)
    facts = collect(run)
    notes = " ".join(facts["notes"])
    assert " ".join(sorted(facts["table"]["facts"])) == stages
    assert note.format(again) in notes and (note or not notes or edit is remove_rl_add_mid)
    assert again is None or renewal(run) == again
    assert ("base" in facts["stages"]) == (edit is not replace_by_hand)
    assert bool(facts["evaluation"]["bytes_per_token"]) == ("base" in stages)  # its tokenizer was measured


def test_a_note_is_in_the_report_and_a_moved_run_or_one_without_stages_has_results(run, tmp_path):
    change(run, models={"base": "org/other"})
    save_json(tmp_path / "alone" / "eval" / "metrics.json", run.metrics("eval"))
    facts = collect(Run(tmp_path / "alone"))
    assert facts["notes"] == ["base is org/other"] and "base" in facts["table"]["facts"]
    assert "> Note: the evaluation is older than the models" in make_report(run.path).read_text()
    change(run, models={stage: stage for stage in ("base", "sft", "rl")})
    paths = {stage: f"runs/elsewhere/{stage}" for stage in ("base", "sft", "rl")}
    change(run, models=paths, weights=None)  # a run of November 2026
    assert collect(run)["notes"] == [] and sorted(collect(run)["table"]["facts"]) == ["base", "rl", "sft"]
    moved = Run(run.path.rename(tmp_path.parent / f"{tmp_path.name}-moved"))
    assert collect(moved)["notes"] == []


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
    assert collect(run)["notes"] == []
    write_stage(run.folder("base"), 0.0, started=5.0)  # trained again to the same weights: the times do not matter
    assert collect(run)["notes"] == []
    link(run, "sft", "another")
    assert collect(run)["notes"] == ["sft was trained from another model than today's base"]


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


def test_the_pipeline_refuses_a_stage_whose_weights_were_replaced(run):
    configs = {stage: STAGE_CONFIGS[stage]() for stage in ("base", "sft")}
    pipeline.check_run_folder(run, ["base", "sft"], configs)
    save_file({"a": torch.ones(3)}, run.folder("base") / "model.safetensors")
    for stages in (["base"], ["sft"], ["base", "sft", "report"]):
        with pytest.raises(InputError, match=r"base: the weights are not those that its metrics\.json describes"):
            pipeline.check_run_folder(run, stages, configs)
    pipeline.check_run_folder(run, ["report"], configs)  # leaves its numbers out and says so


def test_a_hub_ids_weights_are_its_commit(tmp_path, monkeypatch):
    commit = "0123456789" * 4
    place = tmp_path / "models--org--small" / "snapshots" / commit / "config.json"
    monkeypatch.setattr(weights, "cached_file", lambda name, file: str(place))
    assert model_id("org/small") == commit
    monkeypatch.undo()
    assert model_id("org/not-here") is None


@pytest.mark.parametrize(
    "value,dtype",
    [(float("nan"), torch.float32), (float("-inf"), torch.bfloat16), (float("nan"), torch.float8_e4m3fn)],
)
def test_a_value_that_is_not_finite_is_found_in_any_shard_and_named(tmp_path, value, dtype):
    good = {"fine": torch.ones(5, 4).to(dtype), "count": torch.tensor(3), "none": torch.zeros(0, 3)}
    save_file(good, tmp_path / "a.safetensors")
    bad = torch.ones(5, 4)
    save_file({"bad.weight": bad.to(dtype)}, tmp_path / "b.safetensors")
    refuse_non_finite(tmp_path)
    bad[4, 3] = value
    save_file({"bad.weight": bad.to(dtype)}, tmp_path / "b.safetensors")
    with pytest.raises(InputError, match=r"not finite \(NaN or infinity in bad.weight of b.safetensors\)") as error:
        refuse_non_finite(tmp_path)
    assert "\n" not in str(error.value)
    assert first_non_finite([("s", torch.tensor(value))]) == "s"


def test_numbers_that_were_nan_are_a_dash_and_null(run):
    path = run.path / "eval" / "metrics.json"
    record = run.metrics("eval")
    record["results"]["sft"]["facts"]["value"] = float("nan")
    core = {"value": None, "stderr": None, "label": "CORE", "n": 1}
    core["per_task"] = {"piqa": {"acc": None, "centered": None, "stderr": None, "n": 3}}
    path.write_text(json.dumps({**record, "core": {"base": core}}))  # as an older version wrote it, with NaN
    base = load_json(run.folder("base") / "metrics.json")
    history = [{"step": step, "train_loss": [1.0, None, 2.0][step]} for step in range(3)]
    save_json(run.folder("base") / "metrics.json", {**base, "history": history})
    text = make_report(run.path).read_text()
    assert not re.search(r"\bnan\b", text, re.I) and "None" not in text
    assert "NaN" not in (run.path / "report.json").read_text()
    assert collect(run)["table"]["facts"]["sft"]["value"] is None


def test_weights_written_in_place_are_other_weights(run):
    before, file = model_id(run.folder("sft")), run.folder("sft") / "model.safetensors"
    with file.open("r+b") as target:  # the size and the file stay
        target.seek(-1, os.SEEK_END)
        target.write(b"\x01")
    os.utime(file, ns=(1, 1))
    assert model_id(run.folder("sft")) not in (None, before)


def test_a_folder_in_the_place_of_a_file_has_no_part_in_the_fingerprint(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"x")
    before = model_fingerprint(tmp_path)
    for name in ("b.safetensors", "tokenizer.json"):
        (tmp_path / name).mkdir()
    assert model_id(tmp_path) == before
