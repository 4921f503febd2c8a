"""Reading lm-eval's results: what a person sees of a question, what guessing would get, the error of a mean."""

import pytest

from nanochat_hf.errors import InputError
from nanochat_hf.eval.harness import EvalConfig
from nanochat_hf.eval.tasks import Tasks, majority, readable, standard_error


def test_an_unknown_task_is_named_with_its_neighbour_before_any_model_is_loaded(tmp_path):
    with pytest.raises(InputError, match="unknown task 'nanochat_demo_fact'; did you mean 'nanochat_demo_facts'"):
        Tasks(EvalConfig(tasks=["nanochat_demo_fact"]), {"sft": "nowhere"}, tmp_path)


def test_a_multiple_choice_sample_shows_the_score_of_each_letter():
    sample = {
        "doc": {"prompt": "Sky?", "letters": ["A", "B"]},
        "arguments": [("Sky?", "A"), ("Sky?", "B")],
        "filtered_resps": [(-2.0001, False), (-0.5, True)],
        "target": 1,
        "acc": 1.0,
    }
    assert readable(sample) == {
        "question": "Sky?",
        "expected": "B",
        "answer": {"A": -2.0, "B": -0.5},
        "correct": 1.0,
    }


def test_guessing_means_the_most_frequent_answer():
    assert majority([{"expected": word} for word in "aab"]) == pytest.approx(2 / 3)


def test_the_standard_error_is_that_of_a_mean():
    assert standard_error([0, 1, 0, 1]) == pytest.approx((1 / 3) ** 0.5 / 2)
    assert standard_error([1.0]) is None
    assert standard_error([1.0, None]) is None
