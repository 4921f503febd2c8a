"""ChatCORE on the way: a few questions of each task to the model in training, by an engine that is made once."""

from dataclasses import replace
from math import isnan

import pytest
from test_harness import Knower

from nanochat_hf import stages as speedrun
from nanochat_hf.errors import InputError
from nanochat_hf.eval.harness import EvalConfig, chatcore_metric
from nanochat_hf.run import Run, load_json
from nanochat_hf.train.sft import ChatConfig, train_chat

TASKS = ["nanochat_demo_arithmetic", "nanochat_demo_spelling"]


class Refreshed(Knower):
    made, refreshed = 0, 0

    def __init__(self, model, tokenizer):
        super().__init__(model, tokenizer)
        type(self).made += 1

    def refresh(self):
        type(self).refreshed += 1


def test_the_engine_answers_a_few_questions_of_each_task_and_is_made_once(tiny_model, tokenizer, tmp_path):
    measure = chatcore_metric(EvalConfig(tasks=TASKS, batch_size=4), tokenizer, tmp_path, Refreshed)
    assert measure(tiny_model, 3) == measure(tiny_model, 5) == 1.0  # it knows all answers
    assert (Refreshed.made, Refreshed.refreshed) == (1, 1)


def test_it_is_the_mean_of_centered_accuracies_in_the_history_of_sft(
    tiny_folder, tokenizer, tmp_path, fresh_accelerator
):
    measure = chatcore_metric(EvalConfig(tasks=TASKS, max_new_tokens=4), tokenizer, tmp_path / "sft" / "state")
    mixture = [{"dataset": "primer", "rows": 30}]
    config = ChatConfig(mixture=mixture, num_iterations=2, device_batch_size=2, chatcore_every=1, seed=1)
    config.chatcore_max_per_task = 2
    train_chat(config, str(tiny_folder), tmp_path / "sft", measure)
    metrics = load_json(tmp_path / "sft" / "metrics.json")
    assert [row["chatcore"] for row in metrics["history"]] == [0.0, 0.0]  # a model of two steps knows nothing
    assert not (tmp_path / "sft" / "state").exists()


def test_questions_with_one_answer_say_nothing_and_end_nothing(tiny_model, tokenizer, tmp_path, monkeypatch):
    measure = chatcore_metric(EvalConfig(tasks=TASKS, batch_size=4), tokenizer, tmp_path, Knower)
    sure = {"value": 1.0, "stderr": 0.0, "n": 1, "baseline": 1.0}
    monkeypatch.setattr("nanochat_hf.eval.tasks.Tasks.run", lambda self, name, lm: ({name: sure}, []))
    assert isnan(measure(tiny_model, 1))


def test_an_unknown_task_is_named(tokenizer, tmp_path):
    with pytest.raises(InputError, match="nanochat_demo_poetry"):
        chatcore_metric(EvalConfig(tasks=["nanochat_demo_poetry"]), tokenizer, tmp_path)


def test_the_pipeline_brings_it_to_sft_and_does_without_where_the_questions_are_missing(
    tiny_model, tiny_folder, tmp_path, monkeypatch, capsys
):
    brought = []
    monkeypatch.setattr(speedrun, "train_chat", lambda config, model, output, measure: brought.append(measure))
    monkeypatch.setattr(speedrun, "source_of", lambda stage, run: str(tiny_folder))
    tasks = EvalConfig(tasks=TASKS, max_new_tokens=4)
    for every, asked in ((-1, tasks), (200, tasks), (200, replace(tasks, chat_data="/no/such/folder"))):
        configs = {"sft": ChatConfig(chatcore_every=every), "eval": asked}
        speedrun.run_stage("sft", configs, Run(tmp_path), None)
    never, measure, without = brought
    assert never is without is None and 0 <= measure(tiny_model, 2) < 1
    assert "no ChatCORE on the way: chat_data: no folder /no/such/folder" in capsys.readouterr().out
