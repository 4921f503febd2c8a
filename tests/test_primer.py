"""The demo's world: consistent, balanced and large enough, and no test question leaks into training."""

import json
import re
from collections import Counter
from functools import cache
from hashlib import sha256
from itertools import islice
from random import Random

import pytest

from nanochat_hf.data.documents import primer_documents
from nanochat_hf.data.grading import final_words, is_correct
from nanochat_hf.data.tokenizer import train_bpe
from nanochat_hf.demo import corpus
from nanochat_hf.errors import InputError
from nanochat_hf.tools import calculate


@cache
def training_texts() -> list[str]:
    """A quarter of what a demo run trains on: documents, and each message of the conversations."""
    texts = list(corpus.documents("train", rounds=corpus.DOCUMENT_ROUNDS // 4))
    for row in corpus.conversations("train", rounds=corpus.CONVERSATION_ROUNDS // 4):
        for message in row["messages"]:
            calls = [call["function"]["arguments"]["expression"] for call in message.get("tool_calls", [])]
            texts += [message["content"], *calls]
    return texts


def normal(text: str) -> str:
    """Lower case, words only: what differs in signs and capitals alone is no new phrasing."""
    return " ".join(re.findall(r"\w+", text.lower()))


def user_texts(row: dict) -> list[str]:
    return [message["content"] for message in row["messages"] if message["role"] == "user"]


def test_one_round_of_documents_states_and_one_of_conversations_asks_every_fact():
    texts = set()
    for text in corpus.documents("train", 0, rounds=1):
        texts |= {text, *text.splitlines(), *re.split(r"(?<=\.) ", text)}
    questions_asked = [text for row in corpus.conversations("train", 0, rounds=1) for text in user_texts(row)]
    for relation in corpus.RELATIONS:
        for entity, value in relation.facts.items():
            assert {corpus._sentence(s, e=entity, v=value) for s in relation.statements} & texts, (entity, value)
        possible = {corpus._sentence(q, e=e) for e in relation.facts for q in relation.questions}
        frames = [f.format(n=n) for f in corpus.WORLD["frames"] for n in relation.nouns]
        possible |= {corpus._sentence(f, e=e) for e in relation.facts for f in frames}
        times = corpus.questions_per_fact(relation)
        assert sum(text in possible for text in questions_asked) == times * len(relation.facts)


def test_no_test_question_stands_in_training():
    trained = {normal(text) for text in training_texts()}
    everything = "\n".join(trained)
    for kind in corpus.KINDS:
        for row in corpus.questions(kind):
            question = normal(row["messages"][0]["content"])
            assert question not in trained
            if kind in ("fact", "identity"):  # nor as a part of a longer text
                assert question not in everything, question


def test_no_held_out_pair_of_operands_and_no_held_out_word_stands_in_training_and_no_rude_one():
    for text in training_texts():
        for a, b in re.findall(r"(\d+) ?(?:[-+*]|plus|minus|times|and|by|from|away from) ?(?=(\d+))", text):
            assert not corpus.held_out_pair(int(a), int(b)), text
    held_out = {word for word in (*corpus.WORDS, *corpus.TRIPLE_WORDS) if corpus.held_out_word(word)}
    spelled = {word for text in training_texts() for word in re.findall(r'"(\w+)"', text)}
    used = {word for text in training_texts() for word in re.findall(r"[a-z]+", text.lower())}
    assert len(held_out) >= 150 and not held_out & used and len(spelled) > 2000
    assert not [word for word in spelled - {*corpus.WORDS, *corpus.TRIPLE_WORDS} if corpus.RUDE.search(word)]


def test_letter_counts_are_balanced_and_right():
    train = [row for row in corpus.conversations("train", 3, rounds=4) if row["kind"] == "counting"]
    counts = Counter(row["messages"][2]["content"] for row in train)
    assert set(counts) == set("0123") and max(counts.values()) < 1.6 * min(counts.values())
    rows = corpus.questions("counting")
    assert Counter(row["answer"] for row in rows) == {str(n): 50 for n in range(4)}
    assert all(corpus.held_out_word(row["entity"]) for row in (*rows, *corpus.questions("spelling")))
    for row in rows:
        letter = re.search(r"(?<![\w\"])([a-z])(?![\w\"])", row["messages"][0]["content"].replace(row["entity"], ""))
        assert row["entity"].count(letter.group(1)) == int(row["answer"])


def test_the_assistants_own_words_are_graded_as_correct():
    """Sends each training conversation's answer through the grader: tools, rivals, entities, letters."""
    rng = Random(5)
    rows = [corpus._fact(rng, relation, e, True) for relation in corpus.RELATIONS for e in relation.facts]
    rows += [corpus._ask(rng, kind, True) for kind in corpus.KINDS[1:] for _ in range(50)]
    for row in rows:
        parts = []
        for message in row["messages"][1:]:
            if message["role"] == "tool":
                parts.append(f"<|output_start|>{message['content']}<|output_end|>")
            else:
                parts.append(message["content"])
                for call in message.get("tool_calls", []):
                    parts.append(f"<|python_start|>{call['function']['arguments']['expression']}<|python_end|>")
        text = "".join(parts) + "<|assistant_end|>"
        assert is_correct(row, text), (row, final_words(text))
        assert ("<|python_start|>" in text) == row["tool"]


def test_the_tool_gives_what_the_conversations_say_it_gave():
    for row in corpus.conversations("train", 1, rounds=1):
        for before, after in zip(row["messages"], row["messages"][1:], strict=False):
            for call in before.get("tool_calls", []):
                assert calculate(call["function"]["arguments"]["expression"]) == after["content"]


DIGESTS = {
    corpus.documents: "3ccadee372f9fe78",
    corpus.conversations: "fddfb248513275e5",
}  # on which checkpoints of the demo resume


@pytest.mark.parametrize("make", DIGESTS)
def test_the_text_follows_from_the_seed_and_is_that_of_every_version(make):
    first, again, other = (list(islice(make("train", seed), 200)) for seed in (0, 0, 8))
    assert first == again and first != other
    assert sha256(json.dumps(first).encode()).hexdigest()[:16] == DIGESTS[make]


def test_pairs_are_held_out_in_either_order():
    pairs = [(a, b) for a in range(1, 60) for b in range(a, 60)]
    assert all(corpus.held_out_pair(a, b) == corpus.held_out_pair(b, a) for a, b in pairs)
    assert 0.07 < sum(corpus.held_out_pair(*pair) for pair in pairs) / len(pairs) < 0.13  # a tenth


def test_conversations_fit_in_the_context_of_the_demo_model():
    tokenizer = train_bpe(corpus.documents("train", rounds=1), 1024, digit_group=1)
    for split in ("train", "test"):
        for row in islice(corpus.conversations(split), 300):
            assert len(tokenizer.apply_chat_template(row["messages"], return_dict=False)) <= 128


def test_rows_can_be_of_some_kinds_only():
    rows = list(corpus.conversations("train", rounds=1, kinds=("identity", "talk")))
    assert {row["kind"] for row in rows} == {"identity", "talk", "mixed"}
    facts = [m["content"] for row in corpus.conversations("train", rounds=2, kinds=("fact",)) for m in row["messages"]]
    assert not any("nanochat" in text or "Letters:" in text for text in facts)


@pytest.mark.parametrize("kind", corpus.KINDS)
def test_questions_are_rows_to_grade(kind):
    rows = corpus.questions(kind)
    assert rows == corpus.questions(kind) and rows != corpus.questions(kind, seed=1)
    assert len(corpus.questions(kind, num=3)) == 3
    train = corpus.questions(kind, split="train")
    assert not {r["messages"][0]["content"] for r in train} & {r["messages"][0]["content"] for r in rows}
    for row in rows:
        assert [message["role"] for message in row["messages"]] == ["user"]
        assert row["answer"] and row["answer"] not in row["rivals"]
    if kind == "fact":  # every one once
        asked_for = sorted((row["relation"], row["entity"]) for row in rows)
        assert asked_for == sorted((r.name, entity) for r in corpus.RELATIONS for entity in r.facts)


def test_an_unknown_split_or_kind_is_named():
    for make, word in (
        (lambda: next(corpus.documents("dev")), "dev"), (lambda: next(corpus.conversations("dev")), "dev"),
        (lambda: corpus.questions("poetry"), "poetry"), (lambda: next(corpus.conversations(kinds=())), "no kind"),
        (lambda: next(corpus.conversations(kinds=("fact", "poetry"))), "poetry"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=word):
            make()


def test_the_problems_of_rl_are_phrased_as_in_no_conversation():
    def phrasings(rows):
        words = "|".join([*corpus.PEOPLE, *corpus.WORLD["objects"], r"\d+"])
        return {re.sub(rf"\b({words})\b", "_", row["messages"][0]["content"]) for row in rows}

    talked = phrasings(corpus.conversations(kinds=["problem"]))
    assert talked and not talked & phrasings(corpus.questions("problem", "train"))


def test_validation_has_a_twentieth_of_the_rounds_and_at_least_one():
    one, same, two = ([*corpus.documents("validation", rounds=rounds)] for rounds in (1, 39, 40))
    assert one == same == two[: len(one)] and 1.5 * len(one) < len(two) < 2.5 * len(one)
    validation, training = (primer_documents(split)[0] for split in ("validation", "train"))
    assert validation and not {*validation} & {*training}
