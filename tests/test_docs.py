"""The documents: links and anchors are alive, commands are parsed, Python is executed, the Korean pages keep step.

A Python block that cannot be executed here begins with a comment: `# needs` one of NEEDS.
"""

import ast
import datetime
import json
import re
import runpy
import shlex
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from itertools import pairwise, zip_longest
from pathlib import Path
from urllib.parse import unquote

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from lm_eval._cli import HarnessCLI
from markdown_it import MarkdownIt
from talker import chat_folder, talker, talker_folder  # noqa: F401  (fixtures)

from nanochat_hf import cli
from nanochat_hf.config import Parser
from nanochat_hf.errors import InputError

ROOT = Path(__file__).parent.parent
FOLDERS = ("configs", "docs", "evals", "recipes", "scripts", "spaces", "tests")
PAGES = sorted([*ROOT.glob("*.md"), *(page for name in FOLDERS for page in (ROOT / name).rglob("*.md"))])
KOREAN = ("README.md", "recipes/README.md")  # pages with a translation beside them
NOTEBOOK = ROOT / "docs" / "tutorial.ipynb"
MONTHS = [datetime.date(2000, month, 1).strftime("%B") for month in range(1, 13)]
NEEDS = ("a GPU", "the Hub", "a trained model", "a running server", "bitsandbytes")
SHELL = set("cd cp curl docker git hf npx nvidia-smi pip pytest sky source vllm".split())  # noqa: SIM905  (not parsed)
PLACEHOLDERS = {
    "configs/accelerate/X.yaml": "configs/accelerate/cpu.yaml", "DOLLARS": "24", "NAME_OR_PATH": "cpu-demo",
    "STAGE.KEY=VALUE": None, "...": None,
}  # fmt: skip


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def parse(text: str) -> list:
    return MarkdownIt("commonmark").enable("table").parse(text)


# --- README, links, trees


def test_the_readme_is_short():
    for name in ("README.md", "README.ko.md"):
        text = (ROOT / name).read_text()
        assert len(text.splitlines()) <= 125, name
        assert re.findall(r'<img .*height="(.*?)"', text) == ["400"], f"{name}: one picture, 400 pixels high"


@cache
def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings as GitHub, and the site (mkdocs.yml), name them."""
    tokens = parse(page.read_text())
    titles = [tokens[i + 1] for i, token in enumerate(tokens) if token.type == "heading_open"]
    texts = ["".join(c.content for c in title.children if c.type in ("text", "code_inline")) for title in titles]
    return {re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-") for text in texts}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_and_anchors_are_alive(page):
    text = page.read_text()
    children = [child for token in parse(text) for child in token.children or ()]
    targets = [child.attrs.get("href") or child.attrs.get("src") for child in children]
    targets = [*filter(None, targets), *re.findall(r'<img src="([^"]+)"', text)]
    for target in targets:
        if re.match(r"https?:", target):
            continue
        name, _, anchor = unquote(target).partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.is_file(), f"{name_of(page)} links to {target}"
        assert not anchor or anchor in anchors(file), f"{name_of(page)} links to {target}, which has no such heading"


def test_the_site_lists_every_page_once():
    text = (ROOT / "mkdocs.yml").read_text()
    listed = re.findall(r"^ +- (?:.*: )?(\S+\.md)$", text.partition("\nnav:")[2], re.M)
    assert len(listed) == len(set(listed)) and set(listed) <= set(map(name_of, PAGES))
    missing = set(map(name_of, PAGES)) - set(listed) - {"docs/cloud.md"}
    assert not missing, f"mkdocs.yml: nav lacks {sorted(missing)}"
    files = {x for name in listed if (ROOT / (x := name.replace("README.md", "index.html"))).is_file()} - {*listed}
    hidden = [file for file in files if f"\n  {file}\n" not in text.partition("\nexclude_docs:")[2]]
    assert not hidden, f"mkdocs takes {hidden} in place of a page: exclude_docs must name it"


def test_the_module_tree_is_true():
    text = (ROOT / "docs" / "architecture.md").read_text()
    tree = re.search(r"```text\n(nanochat_hf/.*?)```", text, re.S).group(1)
    named, folders = set(), []
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        folders = folders[:depth]
        for word in line.split("#")[0].split():
            path = "/".join([*folders, word.rstrip("/")])
            assert (ROOT / path).exists(), f"the tree names {path}, which does not exist"
            named.add(path)
            if word.endswith("/"):
                folders.append(word.rstrip("/"))
    modules = {name_of(path) for path in (ROOT / "nanochat_hf").rglob("*.py") if path.name != "__init__.py"}
    assert not modules - named, f"the tree misses {sorted(modules - named)}"


def test_the_works_with_page_is_its_table_and_names_tests_that_exist():
    text = (ROOT / "docs" / "works-with.md").read_text()
    script = runpy.run_path(str(ROOT / "scripts" / "make_works_with.py"))
    assert text == script["markdown"](), "run: python scripts/make_works_with.py"
    for row in (row for rows in yaml.safe_load(script["TABLE"].read_text()).values() for row in rows):
        assert set(row) == set(script["FIELDS"]) and re.match(r"(tested|ran): .|(read|not run)$", row["shown"]), row
        assert all((ROOT / name).is_file() for name in re.findall(r"tests/\w+\.py", row["shown"])), row["shown"]


# --- figures

SOURCES = re.compile(r"RESULTS\.md|experiments/[\w-]+\.md|results/|#time-and-cost")
SPEED = r"tok/s|tokens/s|(?:tokens|answers) per second|GiB|kWh|times"
NUMBER = r"(?<![\w.,])(\d[\d,]*(?:\.\d+)?|\.\d+)([KMB]?)(?![\w.,]*\d)"
FIGURE = re.compile(
    rf"(?<!over ){NUMBER} (?:{SPEED}|MB|ms)\b|{NUMBER} %|bpb {NUMBER}|\${NUMBER}"
    rf"|\b(?:took|takes?) (?:about )?(?:[\d.]+ to )?{NUMBER} (?:s|min|h|hours|minutes)\b"
)
HEAD = re.compile(rf"{SPEED}|\b(?:bpb|GPU-hours|cost|MB|ms|RL)\b|, s\b")  # of a column or row of figures
LETTERS = {"": 1, "K": 1e3, "M": 1e6, "B": 1e9}


def figures_of(page: Path) -> dict[str, tuple[list[str], list[str]]]:
    """Section -> its figures with a unit, also those of a table's columns and rows, and the links beside them."""
    sections, figures, links, head, row = {}, [], [], [], []
    for before, token in pairwise(parse(page.read_text())):
        text = "".join(child.content if child.type == "text" else " " for child in token.children or ())
        if before.type == "heading_open":
            figures, links = sections.setdefault(token.content, ([], []))
        elif before.type == "th_open":
            head = [*head, text] if row else [text]
        elif before.type == "td_open":
            is_figure = HEAD.search(head[len(row)]) or (row and HEAD.search(row[0]))
            figures += ["".join(match) for match in re.findall(NUMBER, text)] if is_figure else []
        elif token.type == "inline":
            figures += ["".join(match) for match in FIGURE.findall(text)]
        row = [] if token.type == "tr_open" else [*row, text] if token.type == "inline" else row
        links += [child.attrs["href"] for child in token.children or () if "href" in child.attrs]
    return sections


def values_of(text: str) -> list[tuple[float, float]]:
    """(value, half a unit of its last digit) of the numbers in a text, "121.9K" as 121,900 and 50."""
    numbers = [(digits.replace(",", ""), LETTERS[letter]) for digits, letter in re.findall(NUMBER, text)]
    return [(float(digits) * size, 0.501 * size / 10 ** len(digits.partition(".")[2])) for digits, size in numbers]


RECORDS = {"experiments", "results", "RESULTS.md"}  # what the figures of other pages link to


@pytest.mark.parametrize("page", [page for page in PAGES if RECORDS.isdisjoint(page.parts)], ids=name_of)
def test_every_figure_links_to_a_record_that_has_it(page):
    """In the same section; a figure of three digits or more is in the linked file, rounded or not."""
    for section, (figures, links) in figures_of(page).items():
        files = [page.parent / link.partition("#")[0] for link in links if SOURCES.search(link)]
        assert files or not figures, f"{section}: {figures} and no link to RESULTS.md or an experiment"
        records = [value for file in files for value, _ in values_of((file if file.name else page).read_text())]
        long = [figure for figure in figures if len(re.sub(r"^[0.]+|\D", "", figure)) > 2]
        lost = [f for f in long for value, half in values_of(f) if not any(abs(value - k) <= half for k in records)]
        assert not lost, f"{section}: {lost} are not in {sorted({file.name for file in files})}"


def test_a_figure_without_a_record_is_found(tmp_path):
    (tmp_path / "RESULTS.md").write_text("121,948 tok/s, 2.7 s")
    link, table = "[row](RESULTS.md)", "| what | tok/s |\n|---|---|\n| d24 | 121.8K |\n"
    for text in ("121.9K tok/s", f"121.8K tok/s {link}", f"{table}\n{link}", "It took 2.7 s.", "$40", "val bpb .5"):
        (tmp_path / "page.md").write_text(f"# A\n\n{text}\n\n# B\n\n{link}\n")
        with pytest.raises(AssertionError, match=r"no link|are not in"):
            test_every_figure_links_to_a_record_that_has_it(tmp_path / "page.md")
    (tmp_path / "page.md").write_text(f"# A\n\n121.9K tok/s {link}, which took 2.7 s\n")
    test_every_figure_links_to_a_record_that_has_it(tmp_path / "page.md")


# --- commands


class ParsedError(Exception):
    """A command line was accepted; nothing was started."""


def commands_of(page: Path) -> list[str]:
    """The lines of a page's shell blocks: fences marked bash, and in indented blocks what begins with a program."""
    programs, lines = {*RUNNERS, *SHELL}, []
    for token in parse(page.read_text()):
        is_bash = token.type == "fence" and token.info.strip() == "bash"
        if not is_bash and token.type != "code_block":
            continue
        text = token.content.replace("\\\n", " ")
        for name, value in re.findall(r'^([A-Z]+)="(.*)"$', text, re.M):
            text = text.replace(f"${name}", value)
        for line in text.splitlines():
            for part in re.split(r" && | \| ", re.sub(r"(^|\s)#.*| > \S+", "", line).strip()):
                program = re.sub(r"^([A-Z_]+=\S+ )+", "", part).split(" ")[0]
                if program in programs:
                    lines.append(part)
                elif part and is_bash:
                    raise AssertionError(f"{name_of(page)}: {program} is in neither RUNNERS nor SHELL: {part}")
    return lines


def words_of(line: str) -> list[str]:
    """The words after the environment, with what stands in [brackets] taken and placeholders replaced."""
    words, inside = [], False
    for word in shlex.split(re.sub(r"^([A-Z_]+=\S+ )+", "", line)):
        if word.startswith("["):
            word, inside = word[1:], True
        if inside and word.endswith("]") and word.count("[") < word.count("]"):
            word, inside = word[:-1], False
        words.append(PLACEHOLDERS.get(word, word))
    return [word for word in words if word]


def run_nanochat(words: list[str]) -> None:
    if words[0] == "bench":  # it would replace this process
        return
    is_printed = {"--dry-run", "--job", "--fit-only"} & {*words}
    plans = words[0] in ("run", "speedrun", "demo", "scaling", *cli.STAGE_COMMANDS) and not is_printed
    with suppress(ParsedError):
        cli.dispatch(None, words + ["--dry-run"] * plans)


def run_python(words: list[str]) -> None:
    script, *rest = words
    if script in ("-m", "-c"):
        assert find_spec(rest[0]) if script == "-m" else ast.parse(rest[0])
        return
    if command := re.search(r'main\("(\w+)"\)', text := (ROOT / script).read_text()):
        run_nanochat([command[1], *rest])
    else:  # a benchmark, which has a parser of its own
        flags = [word for word in rest if word.startswith("--")]
        assert all(f'"{flag}"' in text for flag in flags), f"{script} has no {flags}"


def run_accelerate(words: list[str]) -> None:
    arguments = launch_command_parser().parse_args(words[1:])
    assert words[0] == "launch" and (not arguments.config_file or Path(arguments.config_file).is_file())
    run_python([arguments.training_script, *arguments.training_script_args])


def run_make(words: list[str]) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    assert {word for word in words if "=" not in word} <= set(targets)


RUNNERS = {  # program -> what parses its words
    "nanochat": run_nanochat, "python": run_python, "accelerate": run_accelerate, "make": run_make,
    "lm_eval": HarnessCLI()._parser.parse_args,
    "sbatch": lambda words: run_nanochat(["speedrun", *words[words.index("recipes/slurm.sh") + 1 :]]),
}  # fmt: skip


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with the checkout's files and the copies of recipes that pages make; commands are only parsed there."""
    for name in FOLDERS:
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "mine").symlink_to(ROOT / "recipes" / "d24")
    parse_args = Parser.parse_args

    def stop(*arguments, **options):
        raise ParsedError(parse_args(*arguments, **options))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Parser, "parse_args", stop)
    for end in (
        "jobs.print_dry_run",
        "jobs.show_plan",
        "series.show_cells",
        "eval.scaling_fit.make_report",
    ):  # all was read
        monkeypatch.setattr(f"nanochat_hf.{end}", lambda *_, **__: None)
    return tmp_path


@pytest.mark.parametrize("page", [page for page in PAGES if "experiments" not in page.parts], ids=name_of)
def test_commands_are_accepted_by_the_real_parsers(page, workplace, monkeypatch):
    monkeypatch.setattr("nanochat_hf.stages.check_given", lambda **_: None)  # it reads the config of Hub ids
    for line in commands_of(page):
        words = words_of(line)
        files = [word for word in words if re.match(rf"({'|'.join(FOLDERS)})/.*\.\w+$", word)]
        absent = [file for file in files if not Path(file).exists() and words[0] not in ("cp", "git")]
        assert not absent, f"{name_of(page)}: {line}: there is no {absent}"
        try:
            RUNNERS.get(words[0], len)(words[1:])
        except (InputError, AssertionError, SystemExit) as error:
            if getattr(error, "code", 1) != 0:  # of --help
                raise AssertionError(f"{name_of(page)}: {line}\n{error}") from error


def test_a_wrong_command_is_not_accepted(workplace):
    for line in (
        "nanochat run d24 base.dept=4", "nanochat run nothing", "nanochat chat --run-dirr x",
        "nanochat sft --config recipes/d12/sft.yaml --run-dir x --num-epoch 2",
        "accelerate launch recipes/speedrun.py --recipe d24 [base.depth=ten ...]", "make nothing",
        "python scripts/bench_gpu.py --nothing",
    ):  # fmt: skip
        program, *words = words_of(line)
        with pytest.raises((InputError, AssertionError)):
            RUNNERS[program](words)


# --- Python


def python_blocks(page: Path) -> list[str]:
    return [token.content for token in parse(page.read_text()) if token.type == "fence" and token.info == "python"]


@pytest.mark.parametrize("page", [page for page in PAGES if python_blocks(page)], ids=name_of)
def test_python_is_executed_or_marked(page, chat_folder, tmp_path, monkeypatch):  # noqa: F811
    for stage in ("sft", "rl"):
        (tmp_path / "runs" / "cpu-demo").mkdir(parents=True, exist_ok=True)
        (tmp_path / "runs" / "cpu-demo" / stage).symlink_to(chat_folder)
    monkeypatch.chdir(tmp_path)
    for block in python_blocks(page):
        if block.startswith("# needs "):
            assert block.removeprefix("# needs ").startswith(NEEDS), f"{name_of(page)}: say one of {NEEDS}"
            ast.parse(block)
        else:
            exec(compile(block, name_of(page), "exec"), {})


def test_the_notebook_has_no_outputs():
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    assert len(cells) > 15 and not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(NOTEBOOK, 4)
    shorter = 'STEPS = {"base": 40, "mid": 10, "sft": 10, "rl": 1}'
    for cell in notebook.cells:
        cell.source = re.sub(r"^STEPS = .*", shorter, cell.source, flags=re.M)
        cell.source = cell.source.replace("{WORDS}", "{WORDS} eval.max_per_task=8 rl.eval_examples=16")
    client = nbclient.NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    assert (tmp_path / "runs" / "tutorial" / "report.html").is_file()
    texts = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ()))
    assert "dry run: nothing was sent" in texts and "layers of" in texts


# --- Korean


def numbers_of(text: str) -> list[str]:
    """1.5, 2,048, 1e13, 286M; "October 2025" is 2025년 10월."""
    text = re.sub(rf"\b({'|'.join(MONTHS)}) (?=\d{{4}}\b)", lambda m: f"{MONTHS.index(m[1]) + 1} ", text)
    return re.findall(r"(?<![A-Za-z])\d(?:[\d.,]*\d)?(?:e\d+)?[KMB]?", text)


def outline(text: str) -> list[tuple[str, str]]:
    """(what it is, what must be equal) of every heading, line of code, row of a table and link, in order."""
    items, row = [], None
    for token in parse(text):
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


@pytest.mark.parametrize("page", KOREAN)
def test_the_korean_page_is_korean_and_keeps_step_with_the_english_one(page):
    korean = page.replace("README.md", "README.ko.md")
    text = (ROOT / korean).read_text()
    problems = differences((ROOT / page).read_text(), text)
    assert not problems, f"{korean} is not in step with {page}:\n" + "\n".join(problems)
    prose = re.sub(r"```.*?```|`[^`]*`|\]\([^)]*\)", "", text, flags=re.S)
    assert len(re.findall("[가-힣]", prose)) > len(re.findall("[A-Za-z]", prose)) / 2
