"""The embedded corpus of the demo: text, conversations and test questions about one small world, made from a seed.

`make demo` downloads nothing, and what the model learned must be measurable. `documents` is text for pretraining:
facts in varied sentences, stories, worked sums, spelling. `conversations` are chats for SFT, `questions` the rows of
the test. Test questions have phrasings, pairs of operands and words (one in five) that no training text has. The
facts and phrasings are in world.yaml, the words in words.txt.

    for text in documents("train", seed=0): ...
    for row in conversations("train", seed=0): row["messages"]
    questions("spelling")[0]  # {"kind", "messages", "answer", ...}; grade with nanochat_hf.data.grading
"""

import operator
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from zlib import crc32

import yaml

from ..errors import InputError
from ..run import nearest


@dataclass(frozen=True)
class Relation:
    """One kind of fact. In phrasings {e} is the entity and {v} the value; `nouns` fill the {n} of a frame."""

    name: str
    facts: dict[str, str]  # entity -> value
    answer: str  # of the assistant: the value together with the entity
    nouns: list[str]
    questions: list[str]  # training only
    test_questions: list[str]  # test only
    statements: list[str]


FOLDER = Path(__file__).parent
WORLD = yaml.load((FOLDER / "world.yaml").read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
NAME, PEOPLE, ANIMALS = WORLD["name"], WORLD["people"], WORLD["animals"]
RELATIONS = [Relation(**fields) for fields in WORLD["relations"]]
LISTED = RELATIONS[8:]  # opposites, days, months, numbers: no document is about their entities
WORDS, TRIPLE_WORDS = (part.split() for part in (FOLDER / "words.txt").read_text().split("\n\n")[1::2])

KINDS = ("fact", "arithmetic", "spelling", "counting", "problem", "identity")  # of `questions`
CHAT_KINDS = (*KINDS, "talk", "story")  # of `conversations`
DOCUMENT_ROUNDS = 100  # rounds of `documents`; one round names every fact, about 14K tokens
CONVERSATION_ROUNDS = 40  # rounds of `conversations`; one round asks for every fact, about 35K tokens

RESULT = {"+": operator.add, "-": operator.sub, "*": operator.mul}
RUDE = re.compile("rape|cock|shit|fuck|cunt|dick|porn|piss|slut|whore|nig|fag|anus|sex|cum|tits")  # not to be spliced
TIMES = ("0 times", "1 time", "2 times", "3 times")
NAMES = [name.lower() for key in ("countries", "cities", "people", "days", "months") for name in WORLD[key]]


def of_kinds(kinds: tuple[str, ...]):
    """A check of names such as primer:fact+talk: each part after the colon is one of `kinds`, and occurs once."""

    def check(text: str) -> str:
        name, colon, parts = text.partition(":")
        parts = parts.split("+") if name == "primer" and (colon or kinds is KINDS) else []
        for part in parts:
            if part not in kinds:
                raise ValueError(f"the primer has no kind {part!r}; {nearest(part, kinds)}")
            if parts.count(part) > 1:
                raise ValueError(f"it names the kind {part} twice")
        return text

    return check


def held_out_word(word: str) -> bool:
    """Whether a word to spell belongs to the test, and so to no training text."""
    return crc32(word.encode()) % 5 == 0


def held_out_pair(a: int, b: int) -> bool:
    """Whether two operands belong to the test, in either order and for every operation."""
    return crc32(f"{min(a, b)} {max(a, b)}".encode()) % 10 == 0


def questions_per_fact(relation: Relation) -> int:
    """How often a round of `conversations` asks for each fact: order is learned more slowly than names."""
    return 1 if relation not in LISTED else 4 if len(relation.facts) < 15 else 2


def documents(split: str = "train", seed: int = 0, rounds: int = DOCUMENT_ROUNDS) -> Iterator[str]:
    """Documents for pretraining; "validation" or "test": the same world in other words, a twentieth of the rounds."""
    validation = _is_test(split)
    rng = Random(f"documents {validation} {seed}")
    for _ in range(max(1, rounds // 20) if validation else rounds):
        batch = [_about(rng, entity) for entity in (*PEOPLE, *WORLD["countries"], *ANIMALS)]
        batch += [text for relation in LISTED * 2 for text in _lists_of_facts(rng, relation)]
        batch += [_dialogue(rng) for _ in range(40)]
        batch += [" ".join(_story(rng, rng.choice(PEOPLE))) for _ in range(30)]
        batch += [_worked_sums(rng) for _ in range(20)]
        batch += [_spelled_words(rng) for _ in range(100)]
        batch += [_counted_letters(rng) for _ in range(25)]
        rng.shuffle(batch)
        yield from batch


def conversations(
    split: str = "train", seed: int = 0, rounds: int = CONVERSATION_ROUNDS, kinds: Collection[str] = CHAT_KINDS
) -> Iterator[dict]:
    """Chats as rows {"kind": ..., "messages": [...]}, fewer than 128 tokens each; some have two or three turns.

    "test" (or "validation") asks with test phrasings, held-out words and pairs, in a tenth of the rounds. `kinds`
    leaves out the others of CHAT_KINDS: without "identity" a mixture can bring an identity of its own.
    """
    if unknown := set(kinds) - set(CHAT_KINDS):
        raise InputError(f"no conversations of kind {min(unknown)!r} in the primer: use {', '.join(CHAT_KINDS)}")
    if not kinds:
        raise InputError(f"conversations of no kind at all: name some of {', '.join(CHAT_KINDS)}")
    test = _is_test(split)
    rng = Random(f"conversations {test} {seed}")
    counts = {"arithmetic": 120, "spelling": 180, "counting": 120, "problem": 30, "identity": 25}
    counts |= {"talk": 30, "story": 20}
    for _ in range(max(1, rounds // 10) if test else rounds):
        relations = [relation for relation in RELATIONS for _ in range(questions_per_fact(relation))]
        batch = [_fact(rng, relation, entity, test) for relation in relations for entity in relation.facts]
        batch += [_ask(rng, kind, test) for kind, count in counts.items() for _ in range(count)]
        batch = [row for row in batch if row["kind"] in kinds]
        rng.shuffle(batch)
        position = 0
        while position < len(batch):
            turns = batch[position : position + rng.choice((1, 1, 1, 1, 1, 1, 2, 2, 3))]
            length = sum(len(m["content"]) + 40 * ("tool_calls" in m) for row in turns for m in row["messages"])
            turns = turns[:1] if length > 200 else turns  # keeps all below 128 tokens
            position += len(turns)
            kind = turns[0]["kind"] if len(turns) == 1 else "mixed"
            yield {"kind": kind, "messages": [message for row in turns for message in row["messages"]]}


def questions(kind: str, split: str = "test", seed: int = 0, num: int | None = None) -> list[dict]:
    """Questions to grade, as rows {"kind", "messages": [one user message], "answer", "entity", "rivals", "tool"}.

    Kind "fact" has every fact once, "identity" every test question, the others `num` rows (default 200). "problem" has
    word problems in phrasings that no conversation has. Those of split="train" are the prompts of RL. `answer` is the
    value to name, `entity` what it is about or "", `rivals` are the relation's other values. `tool`: whether the
    python tool should be called.
    """
    if kind not in KINDS:
        raise InputError(f"no questions of kind {kind!r} in the primer: use one of {', '.join(KINDS)}")
    test, count = _is_test(split), 200 if num is None else num
    rng = Random(f"questions {kind} {test} {seed}")
    if kind == "fact":
        rows = [_fact(rng, relation, entity, test) for relation in RELATIONS for entity in relation.facts]
    elif kind == "identity":
        key = "test_questions" if test else "questions"
        rows = [_row(kind, question, topic["answer"], NAME) for topic in WORLD[kind] for question in topic[key]]
    elif kind == "counting":
        rows = [_counting(rng, test, i % 4) for i in range(count)]
    else:
        rows = [_ask(rng, kind, test, "hard_problems") for _ in range(count)]
    rng.shuffle(rows)
    return [{**row, "messages": row["messages"][:1]} for row in rows[:num]]


# Pieces of documents


def _sentence(template: str, **values: str) -> str:
    """Fills a phrasing: "a owl" becomes "an owl", and the first letter a capital."""
    text = re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", template.format(**values))
    return text[0].upper() + text[1:]


def _stated(rng: Random, facts: list[tuple[Relation, str]]) -> str:
    """A sentence for each (relation, entity)."""
    return " ".join(_sentence(rng.choice(r.statements), e=entity, v=r.facts[entity]) for r, entity in facts)


def _about(rng: Random, entity: str) -> str:
    relations = [relation for relation in RELATIONS if entity in relation.facts]
    return _stated(rng, [(relation, entity) for relation in rng.sample(relations, len(relations))])


def _lists_of_facts(rng: Random, relation: Relation) -> list[str]:
    """Each fact of the relation once, four to a document, in any order."""
    facts = [(relation, entity) for entity in rng.sample(list(relation.facts), len(relation.facts))]
    return [_stated(rng, facts[i : i + 4]) for i in range(0, len(facts), 4)]


def _dialogue(rng: Random) -> str:
    """Two people talk: a question as a chat may have it, and its answer."""
    p, q = rng.sample(PEOPLE, 2)
    relation = rng.choice(RELATIONS)
    row = _fact(rng, relation, rng.choice(list(relation.facts)), test=False)
    question, answer = (message["content"] for message in row["messages"])
    return rng.choice(WORLD["dialogues"]).format(p=p, q=q, x=question, y=answer)


def _story(rng: Random, person: str) -> list[str]:
    """Three or four sentences about a person, with facts of the world in them."""
    facts = {relation.name: relation.facts for relation in RELATIONS}
    animal, q = rng.choice(ANIMALS), rng.choice([p for p in PEOPLE if p != person])
    day = rng.choice(list(facts["day_after"]))
    values = {name: facts[name][person] for name in ("job", "town", "pet")}
    values |= {"p": person, "q": q, "q_job": facts["job"][q], "day": day, "next_day": facts["day_after"][day]}
    values |= {"animal": animal, "colour": facts["animal_colour"][animal], "place": facts["animal_home"][animal]}
    return [_sentence(rng.choice(part), **values) for part in WORLD["story"]]


def _operands(rng: Random, sign: str, test: bool) -> tuple[int, int]:
    while True:
        top = rng.choice((20, 99, 99, 999))
        a, b = rng.randint(1, top), rng.randint(1, min(top, 12) if sign == "*" else top)
        if sign == "-" and a < b:
            a, b = b, a
        if held_out_pair(a, b) == test:
            return a, b


def _worked_sums(rng: Random) -> str:
    """A few sums; two-digit ones are worked out by tens and ones."""
    lines = []
    while len(lines) < 3:
        sign = rng.choice("++-*")
        a, b = _operands(rng, sign, test=False)
        steps = [(a, sign, b)]
        if 10 < a < 100 and a % 10 and sign == "*":
            tens, ones = a - a % 10, a % 10
            steps = [(tens, "*", b), (ones, "*", b), (tens * b, "+", ones * b)]
        elif 10 < a < 100 and 10 < b < 100 and a % 10 and b % 10 and sign == "+":
            tens, ones = (a - a % 10, b - b % 10), (a % 10, b % 10)
            steps = [(tens[0], "+", tens[1]), (ones[0], "+", ones[1]), (sum(tens), "+", sum(ones))]
        if any(held_out_pair(x, y) for x, _, y in steps):
            continue
        worked = ", ".join(f"{x} {s} {y} = {RESULT[s](x, y)}" for x, s, y in steps)
        lines.append(f"{worked}." if len(steps) == 1 else f"{a} {sign} {b}: {worked}. It is {RESULT[sign](a, b)}.")
    return "\n".join(lines)


def _word(rng: Random, test: bool) -> str:
    """A word to spell: in the test a real one that is held out, in training mostly pieces of words and names.

    The model spells a token in a new word only if it has seen it in many words.
    """
    while True:
        if test or rng.random() < 0.4:
            word = rng.choice(WORDS if test or rng.random() < 0.85 else TRIPLE_WORDS)
        else:
            word = "".join(_piece(rng) for _ in range(rng.choice((1, 2, 2, 3))))
            if len(word) < 3 or RUDE.search(word):
                continue
        if held_out_word(word) == test:
            return word


def _piece(rng: Random) -> str:
    """Two to five letters in a row of a training word or of a name."""
    while True:
        word = rng.choice(NAMES if rng.random() < 0.5 else WORDS)
        start = rng.randrange(len(word) - 1)
        if not held_out_word(word):
            return word[start : start + rng.randint(2, 5)]


def _spelled_words(rng: Random) -> str:
    words = (_word(rng, False) for _ in range(3))
    return "\n".join(rng.choice(WORLD["spellings"]).format(w=word, s=" ".join(word)) for word in words)


def _counted_letters(rng: Random) -> str:
    word, letter, count = _countable(rng, False, rng.randint(0, 3))
    return f'Letters of "{word}": {" ".join(word)}. The letter {letter} stands {TIMES[count]} in "{word}".'


def _countable(rng: Random, test: bool, count: int) -> tuple[str, str, int]:
    """A word and a letter that occurs in it `count` times (0 to 3)."""
    while True:
        word = rng.choice(TRIPLE_WORDS) if count == 3 else _word(rng, test)
        letters = sorted(set(word) if count else set("abcdefghijklmnoprstuvwy") - set(word))
        letters = [letter for letter in letters if word.count(letter) == count]
        if letters and held_out_word(word) == test:
            return word, rng.choice(letters), count


# Pieces of conversations: each returns a row of `questions` with the assistant's answer still in its messages


def _row(kind: str, question: str, answer: list[dict] | str, value: str, entity: str = "", **more: object) -> dict:
    replies = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
    messages = [{"role": "user", "content": question}, *replies]
    return {"kind": kind, "messages": messages, "answer": value, "entity": entity, "rivals": [], "tool": False} | more


def _tool_call(before: str, expression: str, result: str, after: str) -> list[dict]:
    call = {"type": "function", "function": {"name": "python", "arguments": {"expression": expression}}}
    return [
        {"role": "assistant", "content": before, "tool_calls": [call]},
        {"role": "tool", "name": "python", "content": result},
        {"role": "assistant", "content": after},
    ]


def _fact(rng: Random, relation: Relation, entity: str, test: bool) -> dict:
    direct = relation.test_questions if test else relation.questions
    frames = WORLD["test_frames" if test else "frames"]
    question = rng.choice(direct) if rng.random() < 0.4 else rng.choice(frames).format(n=rng.choice(relation.nouns))
    value = relation.facts[entity]
    answer = _sentence(relation.answer, e=entity, v=value)
    rivals = sorted(set(relation.facts.values()) - {value, entity})
    return _row("fact", _sentence(question, e=entity), answer, value, entity, rivals=rivals, relation=relation.name)


def _ask(rng: Random, kind: str, test: bool, problems: str = "problems") -> dict:
    if kind in ("arithmetic", "problem"):
        sign, text = rng.choice(WORLD[problems]) if kind == "problem" else (rng.choice("+-*"), "")
        a, b = _operands(rng, sign, test)
        if kind == "problem":
            p, q = rng.sample(PEOPLE, 2)
            question = text.format(p=p, q=q, a=a, b=b, o=rng.choice(WORLD["objects"]))
        else:
            question = rng.choice(WORLD["sum_questions"][sign]).format(a=a, b=b)
        result = str(RESULT[sign](a, b))
        answer = _tool_call("", f"{a}{sign}{b}", result, f"{a} {sign} {b} = {result}")
        return _row(kind, question, answer, result, tool=True)
    if kind == "spelling":
        word = _word(rng, test)
        letters = " ".join(word)
        return _row(kind, rng.choice(WORLD["spell_questions"]).format(w=word), f"Letters: {letters}", letters, word)
    if kind == "counting":
        return _counting(rng, test, rng.randint(0, 3))
    if kind == "story":
        person = rng.choice(PEOPLE)
        return _row(kind, rng.choice(WORLD["story_questions"]).format(p=person), " ".join(_story(rng, person)), "")
    topic = rng.choice(WORLD["small_talk" if kind == "talk" else "identity"])
    questions = topic["test_questions" if test and kind == "identity" else "questions"]
    return _row(kind, rng.choice(questions), topic["answer"], NAME if kind == "identity" else "")


def _counting(rng: Random, test: bool, count: int) -> dict:
    """Spells, counts by hand, then checks with the tool.

    Call and question have double quotes, so that the word has the same tokens in both.
    """
    word, letter, count = _countable(rng, test, count)
    question = rng.choice(WORLD["count_questions"]).format(w=word, l=letter)
    before, after = f"Letters: {' '.join(word)}. So {count}? ", f" The letter {letter} stands {TIMES[count]}."
    answer = _tool_call(before, f'"{word}".count("{letter}")', str(count), after)
    return _row("counting", question, answer, str(count), word, tool=True)


def _is_test(split: str) -> bool:
    if split not in ("train", "test", "validation"):
        raise InputError(f"no split {split!r} in the primer: use train or test")
    return split != "train"
