"""Graders and rewards: tricky replies row by row, and pass@k without bias."""

from itertools import combinations

import pytest

from nanochat_hf.data import grading

CALL = "<|python_start|>2+3<|python_end|><|output_start|>5<|output_end|>"
END = "<|assistant_end|>"


@pytest.mark.parametrize(
    ("function", "text", "value"),
    [
        (grading.hash_answer, "She earns 10 dollars.\n#### 10", "10"),
        (grading.hash_answer, "#### 1,234,567", "1234567"),
        (grading.hash_answer, "#### -3", "-3"),
        (grading.hash_answer, "#### 2.5", "2.5"),
        (grading.hash_answer, "#### 7\n#### 8", "7"),  # the first one counts, as in the official grader
        (grading.hash_answer, "####10", None),
        (grading.hash_answer, "The answer is 10.", None),
        (grading.last_number, "2 + 3 = 5.", "5"),
        (grading.last_number, "It is -4", "-4"),
        (grading.last_number, "1,200 stones", "1200"),
        (grading.last_number, "7.5 metres", "7.5"),
        (grading.final_words, f"So: {CALL} It is 5.{END}", "It is 5."),
        (grading.final_words, f"{CALL}2 + 3 = 5. Then {CALL} done", "done"),
        (grading.final_words, f"Taldo.{END}<|user_start|>5", "Taldo."),
        (grading.final_words, "<|python_start|>12+30", ""),  # cut off inside the call
        (grading.used_tool, "<|python_start|>1", True),
        (grading.used_tool, "5", False),
        (grading.spelled_word, '"owl": o w l', "owl"),
        (grading.spelled_word, "o, w, l.", "owl"),
        (grading.spelled_word, "It is: , o w l ,.", "owl"),
        (grading.spelled_word, "Here it is:\nO w l", "owl"),
        (grading.spelled_word, 'Here: "owl": o w l', "owl"),  # after the last colon
        (grading.spelled_word, "owl", ""),
        (grading.spelled_word, "o w ll", ""),
    ],
)
def test_what_is_read_from_a_reply(function, text, value):
    assert function(text) == value


def test_a_phrase_must_occur_as_whole_words():
    assert grading.says("It is RED.", "red")
    assert not grading.says("Redhill", "red") and not grading.says("sixteen", "six")


@pytest.mark.parametrize(
    ("kind", "answer", "text", "right"),
    [
        ("gsm8k", "1200", f"so it is\n#### 1,200{END}", True),
        ("gsm8k", "5", f"{CALL}\n#### 5{END}", True),
        ("gsm8k", "5", f"It is 5.{END}", False),  # the benchmark wants its four signs
        ("gsm8k", "5", "", False),
        ("arithmetic", "5", f"{CALL}2 + 3 = 5{END}", True),
        ("arithmetic", "5", CALL, False),  # the tool's result is not the reply's
        ("arithmetic", "5", f"{CALL}2 + 3 = 6", False),
        ("counting", "5", "<|python_start|>2+3<|python_end|>", False),
        ("problem", "5", "5 apples, not 6", False),
        ("spelling", "o w l", f'"owl": o w l{END}', True),
        ("spelling", "o w l", f'"owl": o w{END}', False),
        ("fact", "red", "Red is the fox.", True),
        ("fact", "red", "The owl is red.", False),  # the right value about another entity
        ("fact", "red", "The fox is blue.", False),
        ("fact", "red", "The fox is here.", False),
        ("fact", "red", "The fox is red or blue.", False),  # a list of guesses
        ("fact", "red", "", False),
    ],
)
def test_grades_follow_the_kind_of_the_row(kind, answer, text, right):
    fact = {"entity": "fox", "rivals": ["blue", "green"]} if kind == "fact" else {"entity": "", "rivals": []}
    assert grading.is_correct({"kind": kind, "answer": answer, **fact}, text) is right


def test_a_reward_is_one_or_zero_per_completion_and_everything_graded_is_recorded(tokenizer):
    texts = [f"{CALL}1 + 2 = 3{END}", f"1 + 2 = 4{END}"]
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    records, logged = [], {}
    reward = grading.correctness(tokenizer, lambda *batch: records.append(batch))
    columns = {"kind": ["arithmetic"] * 2, "answer": ["3"] * 2, "entity": [""] * 2, "rivals": [[]] * 2}
    prompts = [[{"role": "user", "content": "1 + 2?"}]] * 2
    columns |= {"completions": None, "trainer_state": None, "log_metric": logged.__setitem__}
    assert reward(prompts=prompts, completion_ids=ids, **columns) == [1.0, 0.0]
    rows, graded, rewards = records[0]
    assert graded == texts and rewards == [1.0, 0.0] and rows[1]["answer"] == "3" and rows[0]["prompt"] == prompts[0]
    assert logged == {"tool_use": 0.5}


@pytest.mark.parametrize("right", [[True], [False, True, False], [True, True, False, False], [False] * 4])
def test_pass_at_k_is_the_share_of_draws_with_a_right_one(right):
    for k in range(1, len(right) + 1):
        draws = list(combinations(right, k))
        assert grading.pass_at_k([right], k) == pytest.approx(sum(map(any, draws)) / len(draws))
    assert grading.pass_at_k([[True, True], [False, False]], 2) == 0.5
