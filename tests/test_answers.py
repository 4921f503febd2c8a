"""The graders of data/grading.py: tricky answers, row by row."""

import pytest

from nanochat_hf.data.grading import (
    choice_letter,
    final_words,
    hash_answer,
    is_correct,
    last_number,
    says,
    spelled_word,
    used_tool,
)

CALL = "<|python_start|>2+3<|python_end|><|output_start|>5<|output_end|>"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("She earns 10 dollars.\n#### 10", "10"),
        ("#### 1,234,567", "1234567"),
        ("#### -3", "-3"),
        ("#### 2.5", "2.5"),
        ("#### 7\n#### 8", "7"),  # the first one counts, as in the official grader
        ("####10", None),
        ("The answer is 10.", None),
        ("", None),
    ],
)
def test_the_gsm8k_answer_is_the_number_after_four_hashes(text, answer):
    assert hash_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("2 + 3 = 5", "5"),
        ("2 + 3 = 5.", "5"),
        ("It is -4", "-4"),
        ("1,200 stones", "1200"),
        ("7.5 metres", "7.5"),
        ("none", None),
    ],
)
def test_the_last_number_is_found_with_sign_and_commas(text, number):
    assert last_number(text) == number


def test_the_final_words_come_after_the_last_tool_result():
    assert final_words(f"So: {CALL} It is 5.<|assistant_end|>") == "It is 5."
    assert final_words(f"{CALL}2 + 3 = 5. Then {CALL} done") == "done"


def test_words_after_the_end_of_the_turn_do_not_count():
    assert final_words("Taldo.<|assistant_end|><|user_start|>5") == "Taldo."


def test_a_call_that_was_cut_off_leaves_no_words():
    assert final_words("<|python_start|>12+30") == ""
    assert last_number(final_words("<|python_start|>12+30")) is None


def test_a_tool_call_is_recognised_even_when_cut_off():
    assert used_tool(CALL) and used_tool("<|python_start|>1") and not used_tool("5")


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("B.", "B"),
        (" B<|assistant_end|>", "B"),
        ("B is right", None),
        ("E", None),
        ("", None),
        ("AB", None),
    ],
)
def test_a_choice_is_one_letter_alone(text, letter):
    assert choice_letter(text) == letter


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ('"owl": o w l', "owl"),
        (" o w l", "owl"),
        ("o, w, l.", "owl"),
        ("Here it is:\no w l", "owl"),
        ("owl", ""),
        ("o w ll", ""),
        ("", ""),
    ],
)
def test_a_spelling_is_single_letters(text, word):
    assert spelled_word(text) == word


def test_a_phrase_must_stand_as_whole_words():
    assert says("It is RED.", "red")
    assert not says("Redhill", "red")
    assert not says("sixteen", "six")


FACT = {"kind": "fact", "answer": "red", "entity": "fox", "rivals": ["blue", "green"]}


@pytest.mark.parametrize(
    ("text", "correct"),
    [
        ("The fox is red.", True),
        ("Red is the fox.", True),
        ("The owl is red.", False),  # the right value about the wrong entity
        ("The fox is blue.", False),
        ("The fox is red or blue.", False),  # a list of guesses
        ("Red.", False),
        ("", False),
    ],
)
def test_a_fact_needs_value_and_entity_and_no_rival(text, correct):
    assert is_correct(FACT, text) is correct


def test_a_sum_is_graded_by_the_words_after_the_tool_not_by_its_result():
    row = {"kind": "arithmetic", "answer": "5", "entity": "", "rivals": []}
    assert is_correct(row, f"{CALL}2 + 3 = 5")
    assert not is_correct(row, CALL)
    assert not is_correct(row, f"{CALL}2 + 3 = 6")


def test_a_spelling_needs_every_letter():
    row = {"kind": "spelling", "answer": "o w l", "entity": "owl", "rivals": []}
    assert is_correct(row, '"owl": o w l')
    assert not is_correct(row, '"owl": o w')
