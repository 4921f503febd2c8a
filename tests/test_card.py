"""The model card says what was measured, in the shape that the Hub reads, and nothing that was not."""

import pytest
from huggingface_hub.repocard_data import model_index_to_eval_results

from nanochat_hf.hub.model_card import Push, chain, collection_table, datasets, render_model_card
from nanochat_hf.run import Run, save_json


@pytest.fixture
def run(tmp_path):
    """A finished base and SFT stage with CORE and ChatCORE, made of files alone."""
    stage = {"finished": True, "commit": "abc", "versions": {"torch": "2.13"}, "hardware": {"device": "H100"}}
    base = {
        **stage,
        "started": 1.0,
        "wall_time_s": 6000.0,
        "total_tokens": 5e9,
        "depth": 24,
        "num_parameters": 1_400_000,
    }
    save_json(
        tmp_path / "base" / "metrics.json", {**base, "val_bpb": 0.72, "config": {"dataset": "karpathy/climbmix"}}
    )
    mixture = [
        {"dataset": "openai/gsm8k:main", "rows": 1, "tokens": 2},
        {"dataset": "./mine.jsonl", "rows": 1, "tokens": 2},
    ]
    save_json(tmp_path / "sft" / "metrics.json", {**stage, "started": 2.0, "wall_time_s": 60.0, "mixture": mixture})
    tasks = {"piqa": {"acc": 0.7, "centered": 0.4, "n": 100}, "copa": {"acc": 0.6, "centered": 0.2, "n": 50}}
    core = {
        "value": 0.3,
        "stderr": 0.01,
        "label": "CORE (2/22 tasks)",
        "tasks": "2/22",
        "per_task": tasks,
        "limit": None,
    }
    chat = {"value": 0.1, "stderr": None, "label": "ChatCORE (1/6 tasks)", "tasks": "1/6", "limit": None}
    gsm = {"GSM8K": {"value": 0.05, "stderr": 0.002, "n": 1319, "baseline": 0.0, "higher_is_better": True}}
    evaluation = {**stage, "started": 3.0, "wall_time_s": 9.0, "results": {"sft": gsm}}
    save_json(tmp_path / "eval" / "metrics.json", {**evaluation, "core": {"base": core}, "chatcore": {"sft": chat}})
    return Run(tmp_path)


def test_every_result_of_the_stage_stands_in_the_model_index(run):
    data = render_model_card(run, Push("you/b", "base")).data
    _, results = model_index_to_eval_results(data.to_dict()["model-index"])
    found = {(r.dataset_name, r.metric_type): r.metric_value for r in results}
    assert found == {
        ("val bpb", "bits_per_byte"): 0.72,
        ("CORE (2/22 tasks)", "centered_accuracy"): 0.3,
        ("piqa (core)", "accuracy"): 0.7,
        ("copa (core)", "accuracy"): 0.6,
    }
    chat = render_model_card(run, Push("you/c", "sft")).data
    assert {r.dataset_name: r.metric_value for r in chat.eval_results} == {"ChatCORE (1/6 tasks)": 0.1, "GSM8K": 0.05}


def test_the_text_shows_the_chain_of_stages_and_no_number_that_was_not_measured(run):
    text = str(render_model_card(run, Push("you/c", "sft")))
    assert "| BASE   | SFT" in text and "1 h 40 min" in text and "5,000,000,000 tokens" in text and "1 x H100" in text
    assert "Cost" not in text and "| GSM8K" in text and "tool_steps" in text
    assert "does not follow instructions" in str(render_model_card(run, Push("you/b", "base")))


def test_only_hub_ids_become_dataset_metadata(run):
    from nanochat_hf.eval.report import collect

    facts = collect(run)
    assert chain(facts, "sft") == ["base", "sft"] and chain(facts, "base") == ["base"]
    assert datasets(facts, "sft") == ["karpathy/climbmix", "openai/gsm8k", "./mine.jsonl"]
    assert render_model_card(run, Push("you/c", "sft")).data.datasets == ["karpathy/climbmix", "openai/gsm8k"]


def test_a_folder_of_this_machine_is_never_published_as_a_dataset_of_the_hub(run, tmp_path, monkeypatch):
    """`mine/text` has the form of a Hub id; it is one only where no such folder is."""
    monkeypatch.chdir(tmp_path)
    base = run.metrics("base")
    save_json(run.folder("base") / "metrics.json", {**base, "config": {"dataset": "mine/text"}})
    assert render_model_card(run, Push("you/b", "base")).data.datasets == ["mine/text"]
    (tmp_path / "mine" / "text").mkdir(parents=True)
    assert render_model_card(run, Push("you/b", "base")).data.datasets is None


def test_numbers_of_another_model_are_left_out_and_the_card_says_so(run):
    evaluation = run.metrics("eval")
    models = {"base": "base", "sft": "sft"}
    evaluation |= {"models": models, "weights": {"base": "aaaa", "sft": "bbbb"}}
    save_json(run.folder("eval") / "metrics.json", evaluation)
    for stage in models:
        save_json(run.folder(stage) / "metrics.json", {**run.metrics(stage), "weights": evaluation["weights"][stage]})
    assert "GSM8K" in str(render_model_card(run, Push("you/c", "sft")))
    save_json(run.folder("sft") / "metrics.json", {**run.metrics("sft"), "weights": "cccc"})
    made = render_model_card(run, Push("you/c", "sft"))
    assert not made.data.eval_results and "GSM8K" not in str(made).split("## Results")[1].split("## Training")[0]
    assert "left out for sft (has other weights now)" in str(made)


def test_the_cost_appears_when_the_report_knows_the_rate(run):
    save_json(run.path / "report.json", {"hourly_rate": 24.0})
    assert "$40.46 at $24.00 per hour" in str(render_model_card(run, Push("you/c", "sft")))


def test_a_collections_text_has_a_row_for_each_model_and_dashes_for_what_is_missing(run, tmp_path):
    save_json(tmp_path / "other" / "sft" / "metrics.json", {"finished": True, "started": 1.0, "wall_time_s": 60.0})
    first, second = collection_table({"you/a": run, "you/b": Run(tmp_path / "other")}).splitlines()[2:]
    cells = [cell.strip() for cell in first.split("|")[1:-1]]
    assert cells[0] == "[you/a](https://huggingface.co/you/a)" and cells[1:4] == ["24", "1,400,000", "5,000,000,000"]
    assert cells[4:7] == ["0.7200", "0.3000", "0.1000"] and cells[7] == "1 h 41 min"
    assert [cell.strip() for cell in second.split("|")[2:8]] == ["-"] * 6
