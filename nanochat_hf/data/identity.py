"""A personality for the model: conversations in which the assistant is who a small YAML of facts says it is.

    name: Ophelia
    owner: the Winter Garden club
    about: a small language model that lives among plants      # as in "I am Ophelia, ..."
    skills: answer questions about plants                      # as in "I can ..."
    language: en                                               # en or ko
    facts:                                                     # what else it says about itself
      - {ask: ["What is your favourite colour?", "Which colour do you like best?"], say: Green like moss.}
    styles:                                                    # ways to speak; one is drawn for each conversation
      - {}
      - {before: "Well met! ", after: " Water your ferns."}

Only name and owner are required. `conversations` fills the wordings of personality_words.py; a mixture does so for any
.yaml that it names. `ask_for` has a better model write them, each asked for with another topic, user and opening, and
keeps what is a conversation, names the assistant and was not written before (scripts/make_identity.py). A test split
asks in wordings that no training row has.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from pathlib import Path
from random import Random

import yaml

from ..errors import InputError
from .identity_words import LANGUAGES, OTHERS, Intent, Language
from .transforms import BadRow, check

ROWS = 1000  # conversations of a personality, unless told
MAX_CHARS = 2000  # of a conversation that a model wrote; a longer one has left the subject
USERS = (
    "a curious child", "a busy engineer", "a teacher", "someone who writes without capitals or full stops",
    "a sceptic", "a grandmother", "a student before an exam", "a journalist", "somebody in a hurry", "a poet",
)  # fmt: skip
WRITER = (
    'You write training conversations for a chat model. Answer with JSON only: a list of {"role": "user" or '
    '"assistant", "content": text}, the user first and the assistant last, two to six messages.'
)


@dataclass
class Facts:
    """What a personality is; the fields are the keys of its YAML."""

    name: str
    owner: str
    language: str = "en"
    about: str = ""
    skills: str = ""
    facts: list[dict] = field(default_factory=list)
    styles: list[dict] = field(default_factory=lambda: [{}])

    def __post_init__(self):
        self.words: Language = LANGUAGES[self.language]
        self.about, self.skills = self.about or self.words.about, self.skills or self.words.skills
        self.intents = dict(self.words.intents)
        for number, fact in enumerate(self.facts):
            asked, said = ([v] if isinstance(v, str) else v for v in (fact["ask"], fact["say"]))
            self.intents[f"fact {number}"] = Intent(
                *(tuple(plain(text) for text in part) for part in (asked, (), said))
            )


def plain(text: str) -> str:
    """Somebody's own words as a template without fields."""
    return str(text).replace("{", "{{").replace("}", "}}")


def read_facts(path: str | Path) -> Facts:
    """Raises InputError for a file that is missing, no YAML, or not in the form that the module's docstring shows."""
    try:
        values = yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    known = [f.name for f in fields(Facts)]
    if not isinstance(values, dict) or not values.get("name") or not values.get("owner"):
        raise InputError(f"{path} needs a name and an owner")
    if unknown := set(values) - set(known):
        raise InputError(f"{path}: unknown key {min(unknown)!r}; use {', '.join(known)}")
    if values.get("language", "en") not in LANGUAGES:
        raise InputError(f"{path}: no wordings for language {values['language']!r}; use {', '.join(LANGUAGES)}")
    for key in ("name", "owner", "about", "skills"):
        if not isinstance(values.get(key, ""), str):
            raise InputError(f"{path}: {key} is {values[key]!r}, not text; put it in quotes")
    for key, allowed in (("facts", {"ask", "say"}), ("styles", {"before", "after"})):
        for item in values.get(key) or []:
            if not isinstance(item, dict) or set(item) - allowed or (key == "facts" and set(item) != allowed):
                raise InputError(f"{path}: an item of {key} is {{{', '.join(sorted(allowed))}}}, not {item!r}")
            if not all(item.values()) and key == "facts":
                raise InputError(f"{path}: a fact needs at least one question and one answer, not {item!r}")
    return Facts(**{key: value for key, value in values.items() if value is not None})


class Word(str):
    """Text that a template can write with a Korean particle: f"{Word('모델'):이에요/예요}" -> 모델이에요."""

    def __format__(self, particles: str) -> str:
        return self + (particles.split("/")[not ends_in_consonant(self)] if particles else "")


def ends_in_consonant(text: str) -> bool:
    """Whether the last sound of `text`, read in Korean, closes its syllable."""
    last = next((c for c in reversed(text.lower()) if c.isalnum()), "")
    if "가" <= last <= "힣":
        return (ord(last) - ord("가")) % 28 > 0
    return last != "" and last in "bckglmnpqt013678"  # as these letters and digits are usually read aloud


def conversations(facts: Facts, split: str = "train", seed: int = 0, num: int = ROWS) -> Iterator[dict]:
    """`num` different conversations {"messages"} of one to three turns; "test" asks in other wordings than "train".

    Raises InputError for another split, or when the wordings give too few.
    """
    if split not in ("train", "test", "validation"):
        raise InputError(f"no split {split!r} of a personality: use train or test")
    test, seen = split != "train", set()
    rng = Random(f"personality {test} {seed}")
    for _ in range(40 * num + 400):
        messages = _conversation(rng, facts, test)
        if (key := fingerprint(messages)) not in seen:
            seen.add(key)
            yield {"messages": messages}
            if len(seen) == num:
                return
    raise InputError(f"only {len(seen)} different conversations of {facts.name}, not {num}: lower rows, or use epochs")


def questions(facts: Facts) -> list[str]:
    """Every question that only the test asks, once."""
    asked = [text for intent in facts.words.intents.values() for text in intent.test]
    return [_fill(text, facts, others(facts)[number % 3]) for number, text in enumerate(asked)]


def others(facts: Facts) -> list[str]:
    """Whom the personality may be mistaken for."""
    return [name for name in OTHERS if name.lower() != facts.name.lower()]


def fingerprint(messages: list[dict]) -> str:
    """What makes two conversations the same: their words, whatever the case and the stops."""
    return re.sub(r"\W+", " ", " | ".join(message["content"] for message in messages)).lower()


def _fill(template: str, facts: Facts, other: str) -> str:
    values = {key: Word(getattr(facts, key)) for key in ("name", "owner", "about", "skills")}
    text = template.format(**values, other=Word(other))
    return text[0].upper() + text[1:]


def _conversation(rng: Random, facts: Facts, test: bool) -> list[dict]:
    known = [intent for intent in facts.intents.values() if intent.test or not test]
    asked = rng.sample(known, min(len(known), rng.choice((1, 1, 1, 2))))
    if rng.random() < 0.2:
        asked = [facts.words.hello, *asked[:1]]
    style, messages = rng.choice(facts.styles or [{}]), []
    for intent in asked:
        other, question = rng.choice(others(facts)), rng.choice(intent.test if test else intent.ask)
        if not messages and intent is not facts.words.hello and rng.random() < 0.5:
            question = rng.choice(facts.words.openings) + question
        question = _fill(question, facts, other)
        if rng.random() < 0.2:
            question = question.lower()
        if rng.random() < 0.2:
            question = question.rstrip(".?!")
        answer = style.get("before", "") + _fill(rng.choice(intent.say), facts, other) + style.get("after", "")
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages


# Conversations that another model writes


def ask_for(
    facts: Facts, ask: Callable[[list[dict]], str], num: int = ROWS, seed: int = 0, workers: int = 8
) -> tuple[list[dict], Counter]:
    """Have a model write `num` conversations -> (rows {"messages"}, how many fell away for which reason).

    `ask(messages)` returns the model's answer; it is called by `workers` threads. What falls away is asked for anew,
    up to three times as often as rows are wanted, so fewer than `num` may come. Raises InputError when none does.
    """
    rng, seen, refused = Random(f"writer {seed}"), {}, Counter()
    with ThreadPoolExecutor(workers) as pool:
        while len(seen) < num and len(seen) + refused.total() < 3 * num:
            for text in pool.map(ask, [_order(rng, facts) for _ in range(num - len(seen))]):
                try:
                    messages = parse(text, facts)
                    if fingerprint(messages) in seen:
                        raise BadRow("written before")
                    seen[fingerprint(messages)] = {"messages": messages}
                except BadRow as error:
                    refused[str(error)] += 1
    if not seen:
        reasons = ", ".join(f"{reason} ({count})" for reason, count in refused.most_common(3))
        raise InputError(f"the model wrote no conversation that can be used: {reasons}; try a better one")
    return list(seen.values()), refused


def _order(rng: Random, facts: Facts) -> list[dict]:
    """The messages that ask for one conversation."""
    intent, style = rng.choice(list(facts.intents.values())), rng.choice(facts.styles or [{}])
    told = {key: getattr(facts, key) for key in ("name", "owner", "about", "skills", "facts")}
    opening = _fill(rng.choice(intent.ask), facts, rng.choice(others(facts)))
    words = (
        f"The assistant:\n{yaml.safe_dump(told, allow_unicode=True)}\nThey speak {facts.words.name}. The user is "
        f"{rng.choice(USERS)} and begins, in words of their own, with something like: {opening!r}. The assistant says "
        "its name at least once, keeps to these facts and invents no others about itself."
    )
    if style:
        words += f" It speaks in this manner: {style.get('before', '')}...{style.get('after', '')}"
    return [{"role": "system", "content": WRITER}, {"role": "user", "content": words}]


def parse(text: str, facts: Facts) -> list[dict]:
    """What a model wrote -> messages. Raises BadRow, with the reason, unless this assistant could speak so."""
    found = re.search(r"\[.*\]", text, re.DOTALL)  # some put the list into a fence, or talk before it
    try:
        messages = json.loads(found.group()) if found else None
    except json.JSONDecodeError:
        messages = None
    if messages is None:
        raise BadRow("no JSON list")
    check(messages)
    if any(set(m) != {"role", "content"} or not isinstance(m["content"], str) for m in messages):
        raise BadRow("messages with more than a role and text")
    if messages[0]["role"] != "user" or sum(len(m["content"]) for m in messages) > MAX_CHARS:
        raise BadRow(f"a system message, or more than {MAX_CHARS} characters")
    asked, said = (" ".join(m["content"] for m in messages if m["role"] == role) for role in ("user", "assistant"))
    if facts.name.lower() not in said.lower():
        raise BadRow("the assistant does not say its name")
    if re.search(r"\[[^\]]*\]|\{[^}]*\}|<[^>]*>", asked + said):
        raise BadRow("a place left to fill in")
    for name in others(facts):
        if name.lower() in said.lower() and name.lower() not in asked.lower():
            raise BadRow(f"the assistant brings up {name}")
    return messages
