"""Wordings: every language has the same intents, the test's questions stand in no training, all can be filled."""

from itertools import chain

import pytest

from nanochat_hf.data.identity import Facts, _fill
from nanochat_hf.data.identity_words import ENGLISH, LANGUAGES


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_language_has_all_intents_and_its_wordings_can_be_filled(language):
    words, facts = LANGUAGES[language], Facts("Ophelia", "the club", language)
    assert words.intents.keys() == ENGLISH.intents.keys()
    for intent in (words.hello, *words.intents.values()):
        assert len(intent.ask) >= 5 and intent.test and intent.say and not set(intent.ask) & set(intent.test)
        for text in chain(intent.ask, intent.test, intent.say):
            assert not set("{}/") & set(_fill(text, facts, "Siri"))
        assert all("{name" in text for text in intent.say), "the assistant says its name"
