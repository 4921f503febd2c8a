"""The project speaks the field's words: private ones stay out of code, comments, recipes and documents."""

import ast
import re
import subprocess
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXEMPT = ("docs/experiments/", "evals/results/", "README.ko.md", "tests/test_words.py")  # quotes, and other languages
EXEMPT += ("nanochat_hf/demo/", "nanochat_hf/data/identities/")  # text that is trained on
PRIVATE = {  # a private word -> the standard one
    r"whole copies": "replicated parameters", r"gather(s|ing)? again": "reshard_after_forward=True",
    r"in (flat )?pieces|whole weights": "sharded, unsharded weights", r"launch files?": "Accelerate config file",
    r"\bpeers?\b": "karpathy/nanochat, baseline",
    r"\b8[- ]bits?\b (products|floats|weights)|in 8 bits": "FP8, int8 weight-only",
    r"\btwins?\b": "reference implementation", r"\blanes?\b": "virtual shards",
    r"dealt (over|out)": "assigned round-robin", r"keep_tails|\btails\b": "bfd_split",
    r"\bpersonalit(y|ies)\b": "identity", r"\bmomenta\b": "optimizer state",
    r"\bgoes on\b|\bgo on\b|\bgoing on\b": "resumes, continues",
    r"\bstands? in(to)? for\b|\bknows (of )?\b|\bhears\b|\bis told\b": "no personification",
    r"plain command line": "lm-eval CLI", r"\bguessing\b": "random baseline (chance)", r"\bpatience": "timeout",
    r"matrix products?": "matmuls, GEMMs",
    r"\bTrunk\b|\bCopies\(|\bPlaces\(|\bMixedStream\b|\bSpikeAlarm\b|\bWaitedTooLong\b": "see the names of today",
    r"(?i)orthogonalis|tokenis|normalis|initialis|serialis|quantis|recognis": "American spelling",
    r"(?i)behaviour|neighbour|favourite|licen[c]e|colour|practise": "American spelling",
}  # fmt: skip
OLD = re.compile(  # of flags and stored keys, which stay valid
    r'"--(peer|patience)"|replace\("peer"|"lanes"|virtual shards lanes|Random\(f"personality|_ALIASES'
)
PRIVATE_NAMES = re.compile(  # identifiers of before that have a standard name
    r"meet|WaitedTooLong|PATIENCE|agreed|main_first|next_stage|OwnerReduction|adamw_owner|choose_rows|rows_that_fit"
    r"|share_out|keep_tails|MixedStream|bad_rows|Embedded|head_loss|Trunk|Copies|Places|Eight|[Ww]eight8|shrink|Int8"
    r"|Factors|(save|load)_momenta|SpikeAlarm|rings|max_spike|settle|queued|trouble|listening|undisturbed_by_gc"
    r"|conclude|new_model|with_loss|shape_of|PreferenceConfig|assistant_only|lora_rank|adamw_lr|test_rows|opt_in"
    r"|outside_results|cut_off|core_limit|positions_that_fit|choose|Row|admit|harvest|refresh|Piece|TextDecoder|Sink"
    r"|Busy|Broken|patiently|readable|spoken_mask|REASONS_KEPT|fuse|mix|quantise|turned"
)
FILLERS = {"found", "asked", "told", "made", "kept", "said", "wanted", "known"}


@cache
def tracked(*suffixes: str) -> dict[str, str]:
    """Name -> text of the files of this checkout."""
    listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    names = [name for name in listing.splitlines() if name.endswith(suffixes) and not name.startswith(EXEMPT)]
    return {name: (ROOT / name).read_text() for name in names if (ROOT / name).exists()}


@pytest.mark.parametrize("word", PRIVATE)
def test_no_private_word(word):
    places = []
    for name, text in tracked(".py", ".md", ".yaml", ".toml", ".html", "Makefile", ".jinja").items():
        if re.search(word, text):
            lines = enumerate(text.splitlines(), 1)
            places += [f"{name}:{n}: {line}" for n, line in lines if re.search(word, line) and not OLD.search(line)]
    assert not places, f"say {PRIVATE[word]!r}:\n" + "\n".join(places)


def names_of(node) -> list[str]:
    """What a node of the syntax tree defines."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        return [node.id]
    return [node.arg] if isinstance(node, ast.arg) else []


def test_names_are_the_fields_and_variables_name_the_thing():
    places = []
    for path, text in tracked(".py").items():
        for node in ast.walk(ast.parse(text)):
            names = [name for name in names_of(node) if name in FILLERS or PRIVATE_NAMES.fullmatch(name)]
            places += [f"{path}:{node.lineno}: {name}" for name in names]
    assert not places, f"{len(places)} names that say too little, or are private:\n" + "\n".join(places)
