"""Rewards grade what the model wrote as the evaluation would, and pass@k is estimated without bias."""

from itertools import combinations

import pytest

from nanochat_hf.data.grading import correctness, grade, pass_at_k

CALL = "<|python_start|>2+3<|python_end|><|output_start|>5<|output_end|>"


@pytest.mark.parametrize(
    "kind,answer,text,right",
    [
        ("gsm8k", "1200", "so it is\n#### 1,200<|assistant_end|>", True),
        ("gsm8k", "5", f"{CALL}\n#### 5<|assistant_end|>", True),
        ("gsm8k", "5", "It is 5.<|assistant_end|>", False),  # the benchmark wants its four signs
        ("gsm8k", "5", "", False),
        ("arithmetic", "5", f"{CALL}2 + 3 = 5<|assistant_end|>", True),
        ("arithmetic", "5", "<|python_start|>2+3<|python_end|>", False),  # cut off inside the call
        ("spelling", "o w l", '"owl": o w l<|assistant_end|>', True),
        ("spelling", "o w l", '"owl": o w<|assistant_end|>', False),
    ],
)
def test_grades_follow_the_kind_of_the_row(kind, answer, text, right):
    assert grade({"kind": kind, "answer": answer, "entity": "", "rivals": []}, text) is right


def test_a_reward_is_one_or_zero_per_completion_and_everything_graded_is_recorded(tokenizer):
    texts = [f"{CALL}1 + 2 = 3<|assistant_end|>", "1 + 2 = 4<|assistant_end|>"]
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    seen, logged = [], {}
    reward = correctness(tokenizer, lambda *batch: seen.append(batch))
    columns = {
        "log_metric": logged.__setitem__,
        "kind": ["arithmetic"] * 2,
        "answer": ["3"] * 2,
        "entity": [""] * 2,
        "rivals": [[]] * 2,
    }
    prompts = [[{"role": "user", "content": "1 + 2?"}]] * 2
    assert reward(prompts=prompts, completions=None, completion_ids=ids, trainer_state=None, **columns) == [1.0, 0.0]
    rows, graded, rewards = seen[0]
    assert graded == texts and rewards == [1.0, 0.0] and rows[1]["answer"] == "3" and rows[0]["prompt"] == prompts[0]
    assert logged == {"tool_use": 0.5}


@pytest.mark.parametrize("right", [[True], [False, True, False], [True, True, False, False], [False] * 4])
def test_pass_at_k_is_the_share_of_draws_with_a_right_one(right):
    for k in range(1, len(right) + 1):
        draws = list(combinations(right, k))
        assert pass_at_k([right], k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_pass_at_k_averages_over_questions_and_wants_enough_samples():
    assert pass_at_k([[True, True], [False, False]], 2) == 0.5
    with pytest.raises(ValueError, match="pass@3 needs 3 samples"):
        pass_at_k([[True, False]], 3)
