"""Fast BPE training against the tokenizers library, its slow twin: the same words, the same merges."""

import json
from collections import Counter

import pytest
import regex
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers, trainers

from nanochat_hf.data import bpe
from nanochat_hf.data.bpe import byte_alphabet, count_words, learn_merges
from nanochat_hf.data.tokenizer import new_backend, split_pattern
from nanochat_hf.demo import corpus as primer

PATTERN = split_pattern(2)
SPACES = " \t\n\r\x0b\x0c\x1c\x85\u00a0\u2003\u2028\u3000"
# Blanks in every company: they decide where text may be cut.
texts = st.lists(st.sampled_from([*SPACES, *"aZé한1٣.,'\"!_-<|🙂\u0301", "  ", "the", " the", "'s"])).map("".join)


def library_merges(documents: list[str], num_merges: int) -> list[tuple[bytes, bytes]]:
    backend = new_backend()
    trainer = trainers.BpeTrainer(
        vocab_size=256 + num_merges,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[],
        min_frequency=0,
        show_progress=False,
    )
    backend.train_from_iterator(documents, trainer)
    byte_of = {letter: byte for byte, letter in enumerate(byte_alphabet())}
    merges = json.loads(backend.to_str())["model"]["merges"]
    return [tuple(bytes(byte_of[letter] for letter in part) for part in pair) for pair in merges]


def fast_merges(documents: list[str], num_merges: int) -> list[tuple[bytes, bytes]]:
    return learn_merges(count_words(documents, PATTERN), num_merges)


@given(st.lists(texts, max_size=5))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_cutting_at_blanks_counts_the_words_that_the_pattern_finds_in_whole_texts(documents):
    whole = Counter(word for text in documents for word in regex.findall(PATTERN, text))
    assert count_words(documents, PATTERN, num_threads=1) == whole


@given(texts)
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_words_are_those_that_the_saved_tokenizer_will_see(text):
    seen = [text[a:b] for _, (a, b) in new_backend().pre_tokenizer.pre_tokenize_str(text)]
    assert regex.findall(PATTERN, text) == seen


@given(st.lists(st.text("ab ", max_size=30), min_size=1, max_size=6), st.integers(1, 40))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_runs_and_ties_merge_as_in_the_library(documents, num_merges):
    assert fast_merges(documents, num_merges) == library_merges(documents, num_merges)


def test_real_text_gives_the_librarys_merges():
    documents = [text for text, _ in zip(primer.documents("train", seed=0), range(3000))] + [
        "한국어 문장 " * 3,
        "  x\n\n y",
    ]
    merges = fast_merges(documents, 700)
    assert len(merges) == 700
    assert merges == library_merges(documents, 700)


@pytest.mark.parametrize("num_threads", [1, 3])
def test_threads_and_batches_do_not_change_the_counts(monkeypatch, num_threads):
    documents = [f"the cat {i} sat  on\nthe mat" for i in range(200)]
    whole = count_words(documents, PATTERN)
    monkeypatch.setattr(bpe, "BATCH_CHARS", 100)
    assert count_words(iter(documents), PATTERN, num_threads) == whole


def test_bytes_have_the_letters_of_byte_level_tokenizers():
    assert sorted(byte_alphabet()) == sorted(pre_tokenizers.ByteLevel.alphabet())
    shown = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for byte in range(128):
        assert shown.pre_tokenize_str(chr(byte))[0][0] == byte_alphabet()[byte]


def test_merging_ends_when_no_pair_is_left():
    assert learn_merges({"abc": 2}, 100) == [(b"a", b"b"), (b"ab", b"c")]
    assert learn_merges({}, 10) == []
