"""The word lists of spelling and counting."""

import re
from collections import Counter

from nanochat_hf.demo.words import TRIPLE_WORDS, WORDS


def test_words_are_lower_case_and_stand_once():
    words = [*WORDS, *TRIPLE_WORDS]
    assert len(words) == len(set(words)) > 800
    assert all(re.fullmatch("[a-z]{3,12}", word) for word in words)


def test_triple_words_have_a_letter_three_times():
    assert len(TRIPLE_WORDS) > 150
    assert all(3 in Counter(word).values() for word in TRIPLE_WORDS)


def test_every_letter_is_spelled_often():
    counts = Counter("".join((*WORDS, *TRIPLE_WORDS)))
    assert all(counts[letter] >= 5 for letter in "abcdefghijklmnopqrstuvwxyz")
