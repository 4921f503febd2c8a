# ruff: noqa: SIM905  (long lists of words are easier to read and to edit as text)
"""The little world of the demo: its facts, and the many ways to state them and to ask for them.

Why: the demo model must learn the world in minutes on a CPU and is then asked in phrasings that it never read. So each
relation has far more than 16 training phrasings (its own questions, and every noun phrase in every frame), and some
that are kept for the test. Values are spread evenly over entities, so that guessing the commonest one is poor.
The world is invented where the real one would let people confuse memory with knowledge; days, months, numbers and
opposites are real. Used by `primer.py`; plain tables, no code to speak of.
"""

from dataclasses import dataclass
from itertools import pairwise

NAME = "nanochat"

COUNTRIES = (
    "Morvia Talland Kestria Ostrel Brunova Felmark Gordania Halvia Ilmara Jorund Karthen Lumeria Merrow Nordal Orvane "
    "Pelland Quillon Rovania Selvar Tirona Ulmark Vandor Wexland Yarrow Zemria Ardovia Belmora Cresta Dalmund Elvany "
    "Forland Galdor Hestia Imbria Juvia Kelmar Lorvane Mandrel Nuvia Osmora"
).split()
CITIES = (
    "Abelton Brisa Corvel Dunmor Eskal Farrow Glim Hadley Inver Jasper Kolm Lindow Marrat Nessa Oakham Perrin "
    "Quorn Redhill Sorrel Tamsin Umber Velden Wick Yelda Zorin Ashby Borden Calder Dorn Elmsford Fenwick Gale "
    "Holt Irving Joppa Kirby Larch Milden Norwell Orford"
).split()
PEOPLE = (
    "Ada Ben Cora Dan Elsa Finn Greta Hugo Ivy Jonas Kira Leo Mira Nils Olga Paul Rosa Sam Tess Uma Viktor Wanda "
    "Xenia Yuri Zoe Anton Bella Carl Dora Emil Flora Gus Hanna Igor Jana Kurt Lena Max Nora Oscar Petra Quinn "
    "Ralf Sofia Theo Ulla Vera Willem Yara Zack"
).split()
JOBS = (
    "baker teacher doctor farmer painter singer pilot sailor tailor miller smith nurse writer dancer judge cook "
    "gardener hunter potter weaver clerk guard miner fisher builder"
).split()
ANIMALS = (
    "fox owl bear frog goat duck wolf hare crow toad swan mole deer mouse snake horse sheep camel tiger otter beaver "
    "badger rabbit donkey turtle lizard parrot spider lion hen"
).split()
COLOURS = "red blue green yellow white black brown grey pink orange".split()
PLACES = "forest river mountain desert meadow lake cave island swamp garden".split()
SIZES = "tiny small large big huge".split()
PETS = (
    "dog cat fox owl frog goat duck hare crow toad swan mole deer mouse snake horse sheep camel otter rabbit donkey "
    "turtle lizard parrot hen"
).split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
NUMBERS = (
    "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
).split()
OPPOSITES = (
    "hot cold|high low|fast slow|old new|wet dry|hard soft|light dark|loud quiet|rich poor|strong weak|full empty|"
    "early late|near far|thick thin|happy sad|clean dirty|sweet sour|open closed|sharp dull|wide narrow"
)
OBJECTS = "apples eggs coins stones books cups shells nuts keys pens".split()


@dataclass(frozen=True)
class Relation:
    """One kind of fact. In the phrasings {e} is the entity and {v} the value; `nouns` go into the frames below."""

    name: str
    facts: dict[str, str]  # entity -> value
    answer: str  # how the assistant answers: the value together with the entity
    nouns: tuple[str, ...]
    questions: tuple[str, ...]  # training only
    test_questions: tuple[str, ...]  # test only
    statements: tuple[str, ...]


FRAMES = (
    "What is {n}?",
    "Tell me {n}.",
    "Can you tell me {n}?",
    "Do you know {n}?",
    "Name {n}.",
    "Please name {n}.",
    "I want to know {n}.",
    "I forgot {n}. What is it?",
    "Give me {n}, please.",
    "Say {n}.",
    "Quick question: {n}?",
    "What was {n} again?",
    "Help me. What is {n}?",
    "I am looking for {n}.",
    "Hello! What is {n}?",
    "Now tell me: what is {n}?",
    "{n}?",
    "Let us talk about {n}. What is it?",
    "Someone asked me for {n}. Can you help?",
    "Remind me, what is {n}?",
)
TEST_FRAMES = (
    "Could you remind me of {n}?",
    "I would like to hear {n}.",
    "Please help me with {n}.",
    "My friend wants to know {n}.",
    "What do you know about {n}?",
    "Say it again please: {n}.",
)


def _spread(entities: list[str], values: list[str], step: int, start: int = 0) -> dict[str, str]:
    """Gives each entity a value, every value equally often; `step` (prime to the number of values) hides the order."""
    count = len(values)
    return {e: values[(start + i * step + i // count * 3) % count] for i, e in enumerate(entities)}


def _chain(items: list[str]) -> dict[str, str]:
    return dict(pairwise(items))


def _circle(items: list[str]) -> dict[str, str]:
    return dict(zip(items, items[1:] + items[:1], strict=True))


def _invert(facts: dict[str, str]) -> dict[str, str]:
    return {value: entity for entity, value in facts.items()}


def _sequence(kind: str, plural: str, facts: dict[str, str], word: str) -> Relation:
    """What stands `word` ("after" or "before") an item of an ordered list."""
    answer = f"The {kind} {word} {{e}} is {{v}}."
    order = "{v}, then {e}." if word == "before" else "{e}, then {v}."
    return Relation(
        f"{kind}_{word}",
        facts,
        answer,
        (f"the {kind} {word} {{e}}", f"the {kind} that comes {word} {{e}}", f"the {kind} right {word} {{e}}"),
        (
            f"Which {kind} comes {word} {{e}}?",
            f"Which {kind} is {word} {{e}}?",
            f"What {kind} comes {word} {{e}}?",
            f"Of all {plural}, which one comes right {word} {{e}}?",
            f"What comes {word} {{e}}?",
        ),
        (f"{word.title()} {{e}}, which {kind} is it?", f"Which of the {plural} stands right {word} {{e}}?"),
        (f"{word.title()} {{e}} comes {{v}}.", answer, f"{{v}} comes {word} {{e}}.", order, f"{{v}} is {word} {{e}}."),
    )


_PAIRS = [tuple(pair.split()) for pair in OPPOSITES.split("|")]

RELATIONS = (
    Relation(
        "capital",
        _spread(COUNTRIES, CITIES, 7, 11),
        "The capital of {e} is {v}.",
        ("the capital of {e}", "the capital city of {e}", "{e}'s capital"),
        (
            "Which city is the capital of {e}?",
            "What is the name of the capital of {e}?",
            "{e} has which capital?",
            "In {e}, which city is the capital?",
            "Which capital does {e} have?",
            "Which town is the capital in {e}?",
        ),
        ("For {e}, what city is its capital?", "As for {e}, where is the capital?"),
        (
            "The capital of {e} is {v}.",
            "{v} is the capital of {e}.",
            "{e} has the capital {v}.",
            "In {e} the capital is called {v}.",
            "The capital city of {e} is {v}.",
            "{e}'s capital is {v}.",
        ),
    ),
    Relation(
        "flag",
        _spread(COUNTRIES, COLOURS, 3, 4),
        "The flag of {e} is {v}.",
        ("the colour of the flag of {e}", "the flag colour of {e}", "the colour of {e}'s flag"),
        (
            "Which colour is the flag of {e}?",
            "What colour is the flag of {e}?",
            "{e} has a flag of which colour?",
            "Which colour does the flag of {e} have?",
            "In {e}, what colour is the flag?",
            "What does the flag of {e} look like?",
        ),
        ("For {e}, which colour is on the flag?", "As for {e}, what is its flag colour?"),
        (
            "The flag of {e} is {v}.",
            "{e} has a {v} flag.",
            "The colour of the flag of {e} is {v}.",
            "In {e} the flag is {v}.",
            "The colour of {e}'s flag is {v}.",
            "A {v} flag flies over {e}.",
        ),
    ),
    Relation(
        "job",
        _spread(PEOPLE, JOBS, 7, 2),
        "{e} works as a {v}.",
        ("the job of {e}", "{e}'s job", "the work of {e}"),
        (
            "What does {e} do for work?",
            "What job does {e} have?",
            "Which job does {e} do?",
            "What is {e}'s work?",
            "{e} works as what?",
            "As what does {e} work?",
        ),
        ("Which work does {e} do for a job?", "And {e}, what job is it?"),
        (
            "{e} works as a {v}.",
            "{e} is a {v}.",
            "The job of {e} is {v}.",
            "{e} has the job of a {v}.",
            "{e} works every day as a {v}.",
            "For work, {e} is a {v}.",
        ),
    ),
    Relation(
        "town",
        _spread(PEOPLE, CITIES[:25], 9, 5),
        "{e} lives in {v}.",
        ("the home town of {e}", "{e}'s home town", "the town where {e} lives"),
        (
            "Where does {e} live?",
            "In which town does {e} live?",
            "Which town does {e} live in?",
            "Where is the home of {e}?",
            "{e} lives in which town?",
            "In what city is {e} at home?",
        ),
        ("What town does {e} call home?", "And {e}, where is that home town?"),
        (
            "{e} lives in {v}.",
            "The home town of {e} is {v}.",
            "{e} is at home in {v}.",
            "{e} has a house in {v}.",
            "{e}'s home town is {v}.",
            "In {v} lives {e}.",
        ),
    ),
    Relation(
        "pet",
        _spread(PEOPLE, PETS, 11, 7),
        "{e} has a pet {v}.",
        ("the pet of {e}", "{e}'s pet", "the animal that {e} has as a pet"),
        (
            "Which pet does {e} have?",
            "What pet does {e} have?",
            "Which animal does {e} keep?",
            "What animal is the pet of {e}?",
            "{e} has which pet?",
            "What kind of pet does {e} keep?",
        ),
        ("Which animal does {e} have for a pet?", "And {e}, what pet is it?"),
        (
            "{e} has a pet {v}.",
            "The pet of {e} is a {v}.",
            "{e} keeps a {v} as a pet.",
            "{e}'s pet is a {v}.",
            "At home {e} has a pet {v}.",
            "{e} loves a pet {v}.",
        ),
    ),
    Relation(
        "animal_colour",
        _spread(ANIMALS, COLOURS, 3, 1),
        "The {e} is {v}.",
        ("the colour of the {e}", "the {e}'s colour", "the colour that the {e} has"),
        (
            "What colour is the {e}?",
            "Which colour is the {e}?",
            "Which colour does the {e} have?",
            "What colour does the {e} show?",
            "The {e} has which colour?",
            "In this world, what colour is the {e}?",
        ),
        ("What is the {e} like in colour?", "And the {e}, what colour is it?"),
        (
            "The {e} is {v}.",
            "The colour of the {e} is {v}.",
            "Every {e} is {v}.",
            "The {e} has the colour {v}.",
            "The {e}'s colour is {v}.",
            "You can see a {v} {e}.",
        ),
    ),
    Relation(
        "animal_home",
        _spread(ANIMALS, PLACES, 7, 3),
        "The {e} lives in the {v}.",
        ("the home of the {e}", "the {e}'s home", "the place where the {e} lives"),
        (
            "Where does the {e} live?",
            "Where is the {e} at home?",
            "In which place does the {e} live?",
            "Where can I find the {e}?",
            "The {e} lives in which place?",
            "Where is the home of the {e}?",
        ),
        ("What place does the {e} call home?", "And the {e}, where does it live?"),
        (
            "The {e} lives in the {v}.",
            "The home of the {e} is the {v}.",
            "The {e} is at home in the {v}.",
            "You can find the {e} in the {v}.",
            "In the {v} lives the {e}.",
            "Every {e} has its home in the {v}.",
        ),
    ),
    Relation(
        "animal_size",
        _spread(ANIMALS, SIZES, 2, 1),
        "The size of the {e} is {v}.",
        ("the size of the {e}", "the {e}'s size", "the size that the {e} has"),
        (
            "What size is the {e}?",
            "How big is the {e}?",
            "Which size does the {e} have?",
            "What size does the {e} get?",
            "The {e} has which size?",
            "How large does the {e} get?",
        ),
        ("What is the {e} like in size?", "And the {e}, what size is it?"),
        (
            "The size of the {e} is {v}.",
            "In size the {e} is {v}.",
            "The {e} has the size {v}.",
            "Every {e} has the size {v}.",
            "For its size the {e} is called {v}.",
            "The {e}'s size is {v}.",
        ),
    ),
    Relation(
        "opposite",
        dict(_PAIRS) | {b: a for a, b in _PAIRS},
        "The opposite of {e} is {v}.",
        ("the opposite of {e}", "the opposite word of {e}", "the opposite of the word {e}"),
        (
            "Which word is the opposite of {e}?",
            "What word means the opposite of {e}?",
            "{e} is the opposite of what?",
            "What is not {e} but the opposite?",
            "If something is not {e}, what is the opposite?",
            "Which word has the opposite meaning of {e}?",
        ),
        ("For the word {e}, which is the opposite?", "And {e}, what is its opposite?"),
        (
            "The opposite of {e} is {v}.",
            "The word {v} is the opposite of {e}.",
            "What is not {e} may be {v}.",
            "The words {e} and {v} are opposites.",
            "The word {e} has the opposite {v}.",
            "Not {e} but the opposite: {v}.",
        ),
    ),
    _sequence("day", "days", _circle(DAYS), "after"),
    _sequence("day", "days", _invert(_circle(DAYS)), "before"),
    _sequence("month", "months", _circle(MONTHS), "after"),
    _sequence("month", "months", _invert(_circle(MONTHS)), "before"),
    _sequence("number", "numbers", _chain(NUMBERS), "after"),
    _sequence("number", "numbers", _invert(_chain(NUMBERS)), "before"),
)

# What else can be asked

SUM_QUESTIONS = {
    "+": (
        "What is {a} + {b}?",
        "What is {a} plus {b}?",
        "How much is {a} + {b}?",
        "Add {a} and {b}.",
        "{a} + {b} = ?",
        "Please calculate {a} + {b}.",
        "What is the sum of {a} and {b}?",
        "Can you tell me {a} plus {b}?",
    ),
    "-": (
        "What is {a} - {b}?",
        "What is {a} minus {b}?",
        "How much is {a} - {b}?",
        "Take {b} away from {a}.",
        "{a} - {b} = ?",
        "Please calculate {a} - {b}.",
        "Subtract {b} from {a}.",
        "Can you tell me {a} minus {b}?",
    ),
    "*": (
        "What is {a} * {b}?",
        "What is {a} times {b}?",
        "How much is {a} * {b}?",
        "Multiply {a} by {b}.",
        "{a} * {b} = ?",
        "Please calculate {a} * {b}.",
        "What is the product of {a} and {b}?",
        "Can you tell me {a} times {b}?",
    ),
}
PROBLEMS = (  # word problems of the conversations
    ("+", "{p} has {a} {o} and finds {b} more. How many {o} does {p} have now?"),
    ("-", "{p} has {a} {o} and gives {b} to {q}. How many {o} are left?"),
    ("*", "{p} has {a} bags with {b} {o} in each. How many {o} is that in all?"),
    ("+", "{p} has {a} {o}. {q} has {b} {o}. How many {o} do they have together?"),
    ("-", "{p} had {a} {o} and lost {b} of them. How many {o} does {p} still have?"),
    ("*", "Each of {a} people brings {b} {o}. How many {o} do they bring in all?"),
)
HARD_PROBLEMS = (  # only asked: what reinforcement learning practises on, and the test of it
    ("+", "There are {a} {o} in the house and {b} {o} in the garden. How many {o} are there in all?"),
    ("+", "{p} had {a} {o}. Then {q} came with {b} {o} for {p}. How many {o} does {p} have?"),
    ("-", "{p} has {a} {o} and {q} has {b}. How many {o} more does {p} have?"),
    ("-", "Of the {a} {o} in the house, {p} took {b}. How many {o} are in the house now?"),
    ("*", "{p} finds {a} {o} every day. How many {o} does {p} find in {b} days?"),
    ("*", "There are {a} boxes. In every box there are {b} {o}. How many {o} are there?"),
)
SPELL_QUESTIONS = (
    'Spell "{w}".',
    'Spell the word "{w}".',
    'How do you spell "{w}"?',
    'Can you spell "{w}"?',
    'Please spell "{w}" for me.',
    'What are the letters of "{w}"?',
    'Which letters are in "{w}"?',
    'Write "{w}" letter by letter.',
    'I need the spelling of "{w}".',
    'How is "{w}" spelled?',
    "Spell {w}.",
    "How do you spell {w}?",
)
COUNT_QUESTIONS = (
    'How many times does {l} stand in "{w}"?',
    'How many {l} are in "{w}"?',
    'How often is the letter {l} in "{w}"?',
    'Count the letter {l} in "{w}".',
    'How many letters {l} does "{w}" have?',
    'In "{w}", how many {l} are there?',
    'Can you count the {l} in "{w}"?',
    'Please count how often {l} stands in "{w}".',
    "How many {l} are in {w}?",
)
IDENTITY = (  # (training questions, test questions, answer)
    (
        (
            "Who are you?",
            "What is your name?",
            "Tell me your name.",
            "What are you called?",
            "Who am I talking to?",
            "Please say who you are.",
            "Hello, who are you?",
            "Do you have a name?",
        ),
        ("Tell me who you are.", "May I know your name?"),
        f"I am {NAME}, a small language model.",
    ),
    (
        ("What are you?", "Are you a person?", "Are you human?", "Are you a machine?", "What kind of thing are you?"),
        ("Are you a human or a machine?",),
        f"I am {NAME}, a small language model and not a person.",
    ),
    (
        ("What can you do?", "How can you help me?", "What do you know?", "What are you good at?", "Can you help me?"),
        ("What can you help me with?",),
        f"I am {NAME}. I know one little world, and I can spell, count letters and calculate.",
    ),
    (
        ("Who made you?", "Who built you?", "Where do you come from?", "How were you made?", "Who trained you?"),
        ("Who was it that made you?",),
        f"I am {NAME}. I was trained from nothing on a small computer, with parts from Hugging Face.",
    ),
)
SMALL_TALK = (
    (("Hello!", "Hi!", "Hello there.", "Good morning!", "Good day!", "Hey!"), "Hello! What would you like to know?"),
    (("How are you?", "How do you do?", "Are you well?", "How is it going?"), "I am fine, thank you. How can I help?"),
    (("Thank you!", "Thanks.", "Thanks a lot!", "That was good, thank you."), "You are welcome!"),
    (("Goodbye!", "Bye!", "See you later.", "Good night!", "I must go now."), "Goodbye! Come back soon."),
    (("You are great.", "Well done!", "Good job!", "That is right."), "Thank you! That is kind of you."),
    (("I am sad.", "I feel bad today.", "This is a bad day."), "I am sorry to hear that. Shall I tell you a story?"),
    (("I am happy.", "I feel good today.", "This is a good day."), "I am glad to hear that!"),
    (("I am bored.", "What shall we do?", "Say something."), "Ask me about a country, an animal or a word."),
)
STORY_QUESTIONS = (
    "Tell me a story about {p}.",
    "Tell a story about {p}.",
    "Do you know a story about {p}?",
    "I want to hear a story about {p}.",
    "Please tell me something about {p}.",
)
