"""The model's identity: conversations in which the assistant is who a small YAML says it is.

    name: Ophelia
    owner: the Winter Garden club
    about: a small language model that lives among plants      # as in "I am Ophelia, ..."
    skills: answer questions about plants                      # as in "I can ..."
    language: en                                               # a file of data/identities
    facts:                                                     # what else it says about itself
      - {ask: ["What is your favorite color?", "Which color do you like best?"], say: Green like moss.}
    styles:                                                    # ways to speak; one is drawn for each conversation
      - {}
      - {before: "Well met! ", after: " Water your ferns."}

Only name and owner are required. `conversations` fills the phrasings of data/identities/<language>.yaml; a mixture
does so for any .yaml that it names. `generate_with_model` has a better model write the conversations
(`nanochat identity`). The test split asks in phrasings that no training row has.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Annotated, Literal

import yaml
from annotated_types import MinLen
from typing_extensions import TypedDict

from ..config import STRICT, Text, parse_config, settings
from ..errors import InputError
from .transforms import BadRow, check, normalize

FOLDER = Path(__file__).with_name("identities")
LANGUAGES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
NUM_CONVERSATIONS = 1000  # by default
MAX_CHARS = 2000  # of a conversation that a model wrote; a longer one has left the subject
OTHERS = ("ChatGPT", "Claude", "Gemini", "Siri", "Alexa", "Llama", "nanochat")  # whom it may be mistaken for
USERS = (
    "a curious child", "a busy engineer", "a teacher", "someone who writes without capitals or full stops",
    "a sceptic", "a grandmother", "a student before an exam", "a journalist", "somebody in a hurry", "a poet",
)  # fmt: skip
WRITER = (
    'You write training conversations for a chat model. Answer with JSON only: a list of {"role": "user" or '
    '"assistant", "content": text}, the user first and the assistant last, two to six messages.'
)


Texts = Text | int | float | Annotated[list[Text | int | float], MinLen(1)]


class Fact(TypedDict):
    __pydantic_config__ = STRICT
    ask: Texts
    say: Texts


class Style(TypedDict, total=False):
    __pydantic_config__ = STRICT
    before: str
    after: str


@settings
class Identity:
    """The fields are the keys of the YAML; `phrasings` is the language's file, `intents` its intents and the facts."""

    name: Text | None = None
    owner: Text | None = None
    language: Literal[tuple(LANGUAGES)] | None = "en"
    about: str | None = None
    skills: str | None = None
    facts: list[Fact] | None = None
    styles: list[Style] | None = None

    def __post_init__(self):
        if not (self.name and self.owner):
            raise ValueError("an identity needs a name and an owner")
        path = FOLDER / f"{self.language or 'en'}.yaml"
        self.phrasings = yaml.safe_load(path.read_text(encoding="utf-8"))
        self.about, self.skills = self.about or self.phrasings["about"], self.skills or self.phrasings["skills"]
        self.intents = list(self.phrasings["intents"].values())
        self.others = [name for name in OTHERS if name.lower() != self.name.lower()]
        for fact in self.facts or ():
            ask, say = (text if isinstance(text, list) else [text] for text in (fact["ask"], fact["say"]))
            self.intents.append({"ask": list(map(_literal, ask)), "test": [], "say": list(map(_literal, say))})

    def fill(self, template: str, other: str) -> str:
        values = {key: Word(getattr(self, key)) for key in ("name", "owner", "about", "skills")}
        text = template.format(**values, other=Word(other))
        return text[0].upper() + text[1:]


def _literal(text: str) -> str:
    """The user's own words as a template without fields."""
    return str(text).replace("{", "{{").replace("}", "}}")


def read_identity(path: str | Path) -> Identity:
    return parse_config(Identity, os.path.expanduser(path))


class Word(str):
    """Text that a template can write with a Korean particle: f"{Word('모델'):이에요/예요}" is 모델이에요."""

    def __format__(self, particles: str) -> str:
        return self + (particles.split("/")[not ends_in_consonant(self)] if particles else "")


def ends_in_consonant(text: str) -> bool:
    """Whether the last sound of `text`, read in Korean, closes its syllable."""
    last = next((c for c in reversed(text.lower()) if c.isalnum()), "")
    if "가" <= last <= "힣":
        return (ord(last) - ord("가")) % 28 > 0
    return last != "" and last in "bckglmnpqt013678"  # as these letters and digits are usually read aloud


def conversations(identity: Identity, split="train", seed: int = 0, num: int = NUM_CONVERSATIONS) -> Iterator[dict]:
    """`num` different conversations {"messages"} of one to three turns; "test" asks in other phrasings than "train".

    Raises InputError for another split, or when the phrasings give too few.
    """
    if split not in ("train", "test", "validation"):
        raise InputError(f"no split {split!r} of an identity: use train or test")
    test, seen = split != "train", set()
    rng = Random(f"personality {test} {seed}")  # the name of former versions, so that their rows stay
    for _ in range(40 * num + 400):
        messages = _conversation(rng, identity, test)
        if (key := words_of(messages)) not in seen:
            seen.add(key)
            yield {"messages": messages}
            if len(seen) == num:
                return
    raise InputError(f"only {len(seen)} different conversations of {identity.name}, not {num}: lower rows, use epochs")


def words_of(messages: list[dict]) -> str:
    """The words of a conversation, whatever the case and the punctuation: equal ones are duplicates."""
    return re.sub(r"\W+", " ", " | ".join(message["content"] for message in messages)).lower()


def _conversation(rng: Random, identity: Identity, test: bool) -> list[dict]:
    hello, openings = identity.phrasings["hello"], identity.phrasings["openings"]
    intents = [intent for intent in identity.intents if intent["test"] or not test]
    intents = rng.sample(intents, min(len(intents), rng.choice((1, 1, 1, 2))))
    if rng.random() < 0.2:
        intents = [hello, *intents[:1]]
    style, messages = rng.choice(identity.styles or [{}]), []
    for intent in intents:
        other, question = rng.choice(identity.others), rng.choice(intent["test" if test else "ask"])
        if not messages and intent is not hello and rng.random() < 0.5:
            question = rng.choice(openings) + question
        question = identity.fill(question, other)
        if rng.random() < 0.2:
            question = question.lower()
        if rng.random() < 0.2:
            question = question.rstrip(".?!")
        answer = style.get("before", "") + identity.fill(rng.choice(intent["say"]), other) + style.get("after", "")
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages


# Conversations that another model writes


def generate_with_model(
    identity: Identity, complete: Callable[[list[dict]], str], num: int, seed: int = 0, workers: int = 8
) -> tuple[list[dict], Counter]:
    """Up to `num` rows {"messages"} that a model writes, and how many answers were refused for which reason.

    `workers` threads call `complete(messages)`, which returns an answer, each time with another topic, user and
    opening; at most 3 x `num` times in all. Raises InputError when all answers were refused.
    """
    rng, rows, refused = Random(f"writer {seed}"), {}, Counter()
    with ThreadPoolExecutor(workers) as pool:
        while len(rows) < num and len(rows) + refused.total() < 3 * num:
            for text in pool.map(complete, [_prompt(rng, identity) for _ in range(num - len(rows))]):
                try:
                    messages = parse_messages(text, identity)
                    if words_of(messages) in rows:
                        raise BadRow("written before")
                    rows[words_of(messages)] = {"messages": messages}
                except BadRow as error:
                    refused[str(error)] += 1
    if not rows:
        reasons = ", ".join(f"{reason} ({count})" for reason, count in refused.most_common(3))
        raise InputError(f"the model wrote no conversation that can be used: {reasons}; try a better one")
    return list(rows.values()), refused


def _prompt(rng: Random, identity: Identity) -> list[dict]:
    """The messages that request one conversation."""
    intent, style = rng.choice(identity.intents), rng.choice(identity.styles or [{}])
    description = {key: getattr(identity, key) for key in ("name", "owner", "about", "skills", "facts")}
    opening = identity.fill(rng.choice(intent["ask"]), rng.choice(identity.others))
    text = (
        f"The assistant:\n{yaml.safe_dump(description, allow_unicode=True)}\nThey speak {identity.phrasings['name']}. "
        f"The user is {rng.choice(USERS)} and begins, in words of their own, with something like: {opening!r}. The "
        "assistant says its name at least once, keeps to these facts and invents no others about itself."
    )
    if style:
        text += f" It speaks in this manner: {style.get('before', '')}...{style.get('after', '')}"
    return [{"role": "system", "content": WRITER}, {"role": "user", "content": text}]


def parse_messages(text: str, identity: Identity) -> list[dict]:
    """The messages in what a model wrote. Raises BadRow, with the reason, unless this assistant could speak so."""
    match = re.search(r"\[.*\]", text, re.DOTALL)  # some put the list into a fence, or talk before it
    try:
        messages = json.loads(match.group()) if match else None
    except json.JSONDecodeError:
        messages = None
    if messages is None:
        raise BadRow("no JSON list")
    check(normalize(messages))
    if any(set(m) != {"role", "content"} or not isinstance(m["content"], str) for m in messages):
        raise BadRow("messages with more than a role and text")
    if messages[0]["role"] != "user" or sum(len(m["content"]) for m in messages) > MAX_CHARS:
        raise BadRow(f"a system message, or more than {MAX_CHARS} characters")
    user, assistant = (" ".join(m["content"] for m in messages if m["role"] == role) for role in ("user", "assistant"))
    if identity.name.lower() not in assistant.lower():
        raise BadRow("the assistant does not say its name")
    if re.search(r"\[[^\]]*\]|\{[^}]*\}|<[^>]*>", user + assistant):
        raise BadRow("a place left to fill in")
    for name in identity.others:
        if name.lower() in assistant.lower() and name.lower() not in user.lower():
            raise BadRow(f"the assistant brings up {name}")
    return messages
