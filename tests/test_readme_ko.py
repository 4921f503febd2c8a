"""The Korean pages say what the English ones say: the same headings, commands, tables, numbers and links in order."""

import datetime
import re
from itertools import zip_longest
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

ROOT = Path(__file__).parent.parent
MONTHS = [datetime.date(2000, month, 1).strftime("%B") for month in range(1, 13)]
PAGES = ("README.md", "recipes/README.md")


def numbers_of(text: str) -> list[str]:
    """1.5, 2,048, 1e13, 286M; "October 2025" is 2025년 10월."""
    text = re.sub(rf"\b({'|'.join(MONTHS)}) (?=\d{{4}}\b)", lambda m: f"{MONTHS.index(m[1]) + 1} ", text)
    return re.findall(r"(?<![A-Za-z])\d(?:[\d.,]*\d)?(?:e\d+)?[KMB]?", text)


def outline(text: str) -> list[tuple[str, str]]:
    """(what it is, what must be equal) of every heading, line of code, row of a table and link, in order."""
    tokens, items, row = MarkdownIt("commonmark").enable("table").parse(text), [], None
    for token in tokens:
        if token.type == "heading_open":
            items.append(("heading", f"level {token.tag[1]}"))
        elif token.type in ("fence", "code_block"):
            for line in token.content.splitlines():
                items.append(("code", re.sub(r"\s+#.*$", "", line)))  # comments are translated
        elif token.type == "tr_open":
            row = []
        elif token.type == "tr_close":
            numbers = [" ".join(sorted(numbers_of(cell))) for cell in row]
            items.append(("table", f"{len(row)} columns with the numbers {' | '.join(numbers)}"))
            row = None
        elif token.type == "inline":
            if row is not None:
                row.append(token.content)
            else:
                words = "".join(child.content for child in token.children if child.type in ("text", "code_inline"))
                items += [("number", number) for number in numbers_of(words) if len(number) > 1]
            for child in token.children:
                target = child.attrs.get("href") or child.attrs.get("src")
                if target and not Path(str(target)).name.startswith("README"):
                    items.append(("link", str(target).replace("-ko.png", ".png")))
    return items


def differences(english: str, korean: str) -> list[str]:
    """What must be changed in the Korean page, kind by kind, each with its place in the English one."""
    problems = []
    for kind in ("heading", "code", "table", "number", "link"):
        mine, theirs = ([value for k, value in outline(text) if k == kind] for text in (korean, english))
        if kind in ("number", "link"):  # word order differs between the languages
            mine, theirs = sorted(mine), sorted(theirs)
        for number, (here, there) in enumerate(zip_longest(mine, theirs), 1):
            if here != there:
                problems.append(f"{kind} {number}: English has {there!r}, Korean has {here!r}")
                break  # what follows is only shifted
    return problems


@pytest.mark.parametrize("page", PAGES)
def test_the_korean_page_keeps_step_with_the_english_one(page):
    korean = page.replace("README.md", "README.ko.md")
    problems = differences((ROOT / page).read_text(), (ROOT / korean).read_text())
    assert not problems, f"{korean} is not in step with {page}:\n" + "\n".join(problems)


def test_a_page_that_is_out_of_step_is_told_with_its_place():
    english = "# A\n\n## B\n\n    make x  # do\n\n| a | b |\n|---|---|\n| 1.5 s | 2 |\n\n40 minutes: see [c](c.py).\n"
    korean = (
        "# 가\n\n## 나\n\n    make x  # 하기\n\n| 가 | 나 |\n|---|---|\n| 1.5초 | 2 |\n\n40분: [다](c.py)를 보세요.\n"
    )
    assert differences(english, korean) == []
    for old, new, words in (
        ("## 나", "### 나", "heading 2: English has 'level 2', Korean has 'level 3'"),
        ("make x", "make y", "code 1: English has 'make x', Korean has 'make y'"),
        ("1.5초", "1.6초", "table 2: English has '2 columns with the numbers 1.5 | 2'"),
        ("| 1.5초 | 2 |\n", "", "Korean has None"),
        ("40분", "50분", "number 1: English has '40', Korean has '50'"),
        ("(c.py)", "(d.py)", "link 1: English has 'c.py', Korean has 'd.py'"),
    ):
        problems = differences(english, korean.replace(old, new))
        assert len(problems) == 1 and words in problems[0], problems


@pytest.mark.parametrize("page", PAGES)
def test_the_korean_page_is_korean_and_its_links_exist(page):
    path = ROOT / page.replace("README.md", "README.ko.md")
    text = path.read_text()
    prose = re.sub(r"```.*?```|`[^`]*`|\]\([^)]*\)", "", text, flags=re.S)
    hangul, latin = len(re.findall("[가-힣]", prose)), len(re.findall("[A-Za-z]", prose))
    assert hangul > latin / 2
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (path.parent / target).exists(), f"{path.name} links to {target}"
