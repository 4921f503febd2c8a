"""Find the answer in what a model said, and grade it: one set of pure functions for evaluation and for RL rewards.

Why one place: a reward that differs from the benchmark teaches something else than what is measured. All take the
text of the assistant's turn as it was decoded with special tokens, so that tool calls can be told from words.

    hash_answer("She earns 10 dollars.\\n#### 10")                  -> "10"
    is_correct({"kind": "spelling", "answer": "o w l", ...}, text)  -> True or False
"""

import re

# Tool calls and their results, closed or cut off by the length limit.
_TOOL_BLOCK = re.compile(r"<\|(python|output)_start\|>.*?(<\|\1_end\|>|$)", re.DOTALL)
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_HASH_ANSWER = re.compile(r"#### (-?[\d.,]+)")  # as openai/grade-school-math `dataset.py`


def used_tool(text: str) -> bool:
    """Whether a tool call stands in the text."""
    return "<|python_start|>" in text


def final_words(text: str) -> str:
    """What the assistant says after the last tool result, special tokens removed; the whole text without a tool."""
    text = text.split("<|assistant_end|>")[0]
    return re.sub(r"<\|\w+\|>", "", _TOOL_BLOCK.sub("", text.rsplit("<|output_end|>", 1)[-1])).strip()


def hash_answer(text: str) -> str | None:
    """GSM8K's answer: the number after the first "#### ", commas removed; None if there is none."""
    match = _HASH_ANSWER.search(text)
    return match.group(1).replace(",", "") if match else None


def last_number(text: str) -> str | None:
    """The last number of the text as it stands there, commas removed; None if there is none."""
    numbers = _NUMBER.findall(text)
    return numbers[-1].replace(",", "") if numbers else None


def choice_letter(text: str, letters: str = "ABCD") -> str | None:
    """The letter of a multiple choice, if the final words are a letter alone (a full stop is forgiven)."""
    words = final_words(text).rstrip(".")
    return words if len(words) == 1 and words in letters else None


def spelled_word(text: str) -> str:
    """The letters of the last line after its last colon, joined: 'Here: "owl": o w l.' -> "owl"; commas are fine."""
    lines = final_words(text).splitlines()
    letters = re.split(r"[\s,.]+", lines[-1].rsplit(":", 1)[-1].strip(" .,")) if lines else []
    return "".join(letters).lower() if all(len(letter) == 1 for letter in letters) else ""


def says(text: str, phrase: str) -> bool:
    """Whether the phrase stands in the text as whole words, whatever the case."""
    return re.search(rf"(?<!\w){re.escape(phrase)}(?!\w)", text, re.IGNORECASE) is not None


def is_correct(row: dict, text: str) -> bool:
    """Whether the reply answers a row of `primer.questions`.

    A sum's result must be the last number said; a spelling must have exactly the word's letters; a fact must name the
    value and the entity and none of the relation's other values, so that neither a list of guesses nor a fact about
    somebody else counts. Whether the tool was called is `used_tool`'s business.
    """
    kind, words = row["kind"], final_words(text)
    if kind in ("arithmetic", "problem", "counting"):
        return last_number(words) == row["answer"]
    if kind == "spelling":
        return spelled_word(text) == row["answer"].replace(" ", "")
    named = says(words, row["answer"]) and (not row["entity"] or says(words, row["entity"]))
    return named and not any(says(words, rival) for rival in row["rivals"])
