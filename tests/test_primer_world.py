"""The tables of the little world: enough facts and phrasings, balanced values, a test half that training lacks."""

import re
from collections import Counter

from nanochat_hf.demo.world import FRAMES, HARD_PROBLEMS, IDENTITY, PROBLEMS, RELATIONS, SUM_QUESTIONS, TEST_FRAMES


def normal(text: str) -> str:
    """Lower case, words only: what differs in signs and capitals alone is no new phrasing."""
    return " ".join(re.findall(r"\w+", text.lower()))


def test_the_world_has_at_least_400_facts_in_many_phrasings():
    assert sum(len(relation.facts) for relation in RELATIONS) >= 400
    for relation in RELATIONS:
        phrasings = {*relation.questions, *(f.format(n=n) for f in FRAMES for n in relation.nouns)}
        assert len(phrasings) >= 16 and len(relation.test_questions) >= 2
        assert len(set(relation.statements)) >= 5


def test_no_single_value_answers_many_facts_of_a_relation():
    most, total = 0, 0
    for relation in RELATIONS:
        counts = Counter(relation.facts.values())
        assert max(counts.values()) - min(counts.values()) <= 1, relation.name
        most, total = most + max(counts.values()), total + len(relation.facts)
    assert most / total < 0.08  # the majority baseline over all facts


def test_no_name_of_the_world_means_two_things():
    names = [name for relation in RELATIONS[:9:3] for name in relation.facts]
    assert len(names) == len(set(names))
    for relation in RELATIONS:
        assert all(relation.facts[e] != e for e in relation.facts)


def test_no_test_phrasing_is_a_training_phrasing_of_any_relation():
    for relation in RELATIONS:
        train = {normal(q) for q in relation.questions}
        train |= {normal(f.format(n=n)) for f in FRAMES for n in relation.nouns}
        test = {normal(q) for q in relation.test_questions}
        test |= {normal(f.format(n=n)) for f in TEST_FRAMES for n in relation.nouns}
        assert not train & test
    assert not {normal(q) for group in IDENTITY for q in group[0]} & {
        normal(q) for group in IDENTITY for q in group[1]
    }


def test_every_phrasing_has_the_places_that_are_filled():
    for relation in RELATIONS:
        for text in (*relation.nouns, *relation.questions, *relation.test_questions):
            assert text.count("{e}") == 1 and "{v}" not in text
        for text in (relation.answer, *relation.statements):
            assert text.count("{e}") == 1 and text.count("{v}") == 1
    for text in (*FRAMES, *TEST_FRAMES):
        assert text.count("{n}") == 1
    for sign, questions in SUM_QUESTIONS.items():
        assert len(questions) >= 8 and all("{a}" in q and "{b}" in q for q in questions), sign


def test_hard_problems_are_worded_unlike_the_taught_ones():
    assert not {normal(text) for _, text in PROBLEMS} & {normal(text) for _, text in HARD_PROBLEMS}
    for sign in "+-*":
        assert sum(s == sign for s, _ in PROBLEMS) == sum(s == sign for s, _ in HARD_PROBLEMS) == 2
