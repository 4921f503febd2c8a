"""Text and conversations that cannot be read are one line that says which file and why; so are wrong calls."""

import errno
import os
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from filelock import FileLock

from nanochat_hf.data.documents import DocumentStream, open_documents
from nanochat_hf.data.mixture import Mixture, check_data
from nanochat_hf.data.tokenizer import load_tokenizer, train_bpe
from nanochat_hf.errors import InputError
from nanochat_hf.stage_configs import ChatConfig, DPOStageConfig, EvalConfig, PretrainConfig, TokenizerConfig


def jsonl(path: Path, *lines: str) -> str:
    path.write_text("\n".join(lines))
    return str(path)


def parquet(path: Path, **columns: list) -> Path:
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path.parent


ENTRIES = [  # of a mixture of conversations, which is opened
    ({"dataset": "primer", "transform": "gsm8k"}, "does not apply"),
    ({"dataset": "primer", "split": "dev"}, "dev"),
    ({"dataset": "nowhere.txt", "transform": "spelling_bee"}, "no such file"),
    *(
        ({"dataset": name}, f"no such dataset: {name} is no file, no folder and no Hub id")
        for name in ("nowhere/chats.jsonl", "./org/name", "name", "org/name/folder", "data/x.csv")
    ),
    ({"dataset": "{here}/empty.jsonl"}, "no rows"),
    ({"dataset": "{here}/pipes/0.jsonl"}, "is no file"),
    ({"dataset": "{here}/pipes"}, "0.jsonl is a pipe or a device, no file: take it out"),
    ({"dataset": "{here}/links"}, "cannot read .*train.jsonl: No such file"),
    ({"dataset": "primer", "subset": "main"}, "primer has no subsets"),
    ({"dataset": "{here}/bad.jsonl", "subset": "main"}, "has no subsets"),
    ({"dataset": "{here}"}, r"train\*"),
    ({"dataset": "{here}/train.parquet"}, "cannot read"),
    ({"dataset": "{here}/bad.jsonl", "rows": 9}, "has 3 rows, not 9"),
    ({"dataset": "{here}/parts", "subset": "nonsense"}, "has no subset nonsense: leave subset out"),
    ({"dataset": "{here}/bad.jsonl", "split": "train[:2]"}, "slices such as train.:2. are for the Hub: give rows"),
    ({"dataset": "{here}/bad.jsonl", "split": "train+test"}, "slices such as train.test are for the Hub"),
    ({"dataset": "{here}/bad.jsonl", "epochs": 0.1}, "0.1 epochs of the 3 rows of .* are none: raise it"),
    ({"dataset": "primer", "rows": 10**9}, "primer gives at most 200,000 rows, not 1,000,000,000: use epochs"),
    (
        {"dataset": "{here}/words.txt", "transform": "spelling_bee", "rows": 10**9},
        "has 1,000,000,000 rows, more than 100,",
    ),
]


REFUSED_AT_ONCE = [  # an entry of a recipe's sft.yaml, before any stage runs
    ({"dataset": "texts.jsonl"}, "row .: no column 'messages'; its columns are text; transforms: messages, sharegpt"),
    ({"dataset": "texts"}, "row .: no column 'messages'; its columns are text"),
    ({"dataset": "chats.jsonl", "transform": "gsm8k"}, "row .: no column 'answer'; its columns are messages"),
    ({"dataset": "chats.jsonl", "subset": "main"}, "chats.jsonl has no subsets"),
    ({"dataset": "words.txt"}, "words.txt is neither .jsonl nor .parquet"),
]


@pytest.mark.parametrize("entry,message", REFUSED_AT_ONCE)
def test_a_mixture_of_another_form_is_refused_before_training(tmp_path, monkeypatch, entry, message):
    monkeypatch.chdir(tmp_path)
    chat = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'
    jsonl(tmp_path / "texts.jsonl", '{"text": "a"}')
    jsonl(tmp_path / "chats.jsonl", *['{"messages": []}'] * 3, chat)
    parquet(tmp_path / "texts" / "train.parquet", text=["a"])
    (tmp_path / "words.txt").write_text("apple\n")
    check_data("sft", ChatConfig([{"dataset": "chats.jsonl", "rows": 9}]))
    with pytest.raises(InputError, match=message):
        check_data("sft", ChatConfig([entry]))


def test_a_stage_needs_the_splits_that_it_reads(tmp_path):
    base = PretrainConfig(dataset=str(tmp_path))
    configs = {"tokenizer": TokenizerConfig(str(tmp_path)), "base": base, "eval": EvalConfig(dataset=str(tmp_path))}
    for broken in ("train", "validation"):
        for split in ("train", "validation"):
            jsonl(tmp_path / f"{split}.jsonl", *["{"] * (split == broken), '{"text": "a"}')
        for stage, config in configs.items():
            unread = stage == "eval" and broken == "train"
            with nullcontext() if unread else pytest.raises(InputError, match=f"{broken}.jsonl cannot be read"):
                check_data(stage, config)
        with pytest.warns(UserWarning, match="skipped"):
            check_data("base", replace(base, skip_bad_files=True))
    with pytest.raises(InputError, match="its name does not say it is test"):
        check_data("dpo", DPOStageConfig(dataset=jsonl(tmp_path / "pairs.jsonl", "{}"), split="test"))


@pytest.mark.parametrize("entry,message", ENTRIES)
def test_a_mixture_that_cannot_be_opened(tmp_path, entry, message):
    (tmp_path / "empty.jsonl").touch()
    if "pipes" in entry["dataset"]:
        (tmp_path / "pipes").mkdir()
        os.mkfifo(tmp_path / "pipes" / "0.jsonl")
    if "links" in entry["dataset"]:
        (tmp_path / "links").mkdir()
        (tmp_path / "links" / "train.jsonl").symlink_to("gone")
    (tmp_path / "words.txt").write_text("apple\nberry\n")
    (tmp_path / "train.parquet").write_bytes(b"PAR1 and then nothing")
    jsonl(tmp_path / "bad.jsonl", "{", "[1]", "3")
    if "parts" in entry["dataset"]:
        parquet(tmp_path / "parts" / "train.parquet", text=["a"])
    entry = entry | {"dataset": entry["dataset"].replace("{here}", str(tmp_path))}
    if entry["dataset"] == str(tmp_path):
        (tmp_path / "train.parquet").unlink()
    with pytest.raises(InputError, match=message) as caught:
        Mixture([entry])
    assert "\n" not in str(caught.value)


ROWS_OF_CHATS = [
    ("{", "not JSON"), ("[1]", "no messages"), ('{"text": "a"}', "no column 'messages'; its columns are text"),
    ('{"messages": []}', "no messages"),
    ('{"messages": [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}]}', "is empty"),
    ('{"messages": [{"role": "user", "content": "a\\ud800"}]}', "half of a surrogate pair"),
    ('{"messages": [{"role": "wizard", "content": "a"}, {"role": "assistant", "content": "b"}]}', "."),
]  # fmt: skip


@pytest.mark.parametrize("row,message", ROWS_OF_CHATS)
def test_a_row_that_is_no_conversation(tmp_path, row, message):
    with pytest.raises(InputError, match=f"^no row of .* can be used; row 0: .*{message}") as caught:
        list(Mixture([{"dataset": jsonl(tmp_path / "chats.jsonl", row)}]))
    assert "\n" not in str(caught.value)


TEXTS = [
    (lambda here: parquet(here / "t" / "0.parquet", content=["a"]), "no column 'text'; it has content"),
    (lambda here: parquet(here / "t" / "0.parquet", text=[1]), "int64, not text"),
    (lambda here: jsonl(here / "t.jsonl", *['{"messages": "a"}'] * 3), "no text under 'text'"),
    (lambda here: jsonl(here / "t.jsonl", "{", *['{"text": "a"}'] * 30), "is not JSON"),
    (lambda here: here, r"no \.parquet or \.jsonl"),
    (lambda here: here / "nowhere", "no dataset"),
    (lambda here: (here / "t.jsonl").symlink_to("t.jsonl") or here, r"cannot read .*t\.jsonl"),
    (lambda here: os.mkfifo(here / "pipe.jsonl") or here / "pipe.jsonl", "no dataset"),
    (lambda here: (here / "t.jsonl").symlink_to("/dev/null") or here, "t.jsonl is a pipe or a device, no file"),
    (lambda here: "someone/something", "HF_HUB_OFFLINE"),
]


@pytest.mark.parametrize("make,message", TEXTS)
def test_a_text_that_cannot_be_read(tmp_path, monkeypatch, make, message):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=message) as caught:
        next(iter(open_documents(str(make(tmp_path)))))
        next(iter(open_documents(str(make(tmp_path)), "validation")))
    assert "\n" not in str(caught.value)


SETTINGS = dict.fromkeys(("max_chars", "languages", "decontaminate"))
SETTINGS |= {
    "min_chars": 5,
    "dedup": ["exact"],
    "validation": 0.01,
    "seed": 0,
    "skip_bad_files": False,
}


def prepared(here: Path, source, eval_rows=list, workers: int = 1, **settings):
    pytest.importorskip("datasketch", reason="needs the extra data")
    pytest.importorskip("py3langid", reason="needs the extra data")
    from nanochat_hf.data.prepare import prepare

    return prepare([str(source)], SETTINGS | settings, here / "new" / "out", workers, eval_rows)


@pytest.mark.parametrize("make,message", TEXTS)
def test_a_source_that_cannot_be_prepared_leaves_nothing(tmp_path, monkeypatch, make, message):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=message) as caught:
        prepared(tmp_path, make(tmp_path))
    assert "\n" not in str(caught.value) and not [*(tmp_path / "new").rglob("*")]


LEFT = "1 documents are left, too few for two splits .read 2, too short 1, "
SOURCES = [  # what is prepared, settings, and what is said
    (
        lambda here: parquet(here / "t" / "0.parquet", text=["a", "a text"]),
        {},
        LEFT + "validation 1.: lower the filters",
    ),
    (lambda here: parquet(here / "t" / "0.parquet", text=["a text"] * 9), {}, "too few .*duplicate 8, validation 1"),
    (
        lambda here: parquet(here / "t" / "0.parquet", text=["a text"] * 9),
        {"dedup": None},
        "9 documents are left, too",
    ),
    (lambda here: parquet(here / "t" / "0.parquet", text=pa.array([], pa.string())), {}, "0 documents are .*read 0"),
    (lambda here: jsonl(here / "t.jsonl"), {}, "0 documents are left"),
    (lambda here: jsonl(here / "t.txt", "one text"), {}, "1 documents are left"),
    (
        lambda here: (here / "t.txt").write_bytes(b"caf\xe9") and here / "t.txt",
        {},
        "cannot be read .*codec.*get it",
    ),
    (
        lambda here: (here / "t.jsonl").write_bytes(b'{"text": "caf\xe9"}') and here / "t.jsonl",
        {},
        "is not JSON: 'utf-8'",
    ),
    (
        lambda here: (jsonl(here / "a.txt", "a text") and (here / "b.txt").symlink_to("no")) or here,
        {},
        r"cannot read .*b\.txt: a link to nothing",
    ),
    (lambda here: "primer", {}, "primer is the demo's own text: "),
    (lambda here: here, {"languages": ["en", "klingon"]}, "--languages: no language 'klingon'; known: "),
]


@pytest.mark.parametrize("make,settings,message", SOURCES)
def test_a_source_of_which_too_little_is_left(tmp_path, make, settings, message):
    with pytest.raises(InputError, match=message) as caught:
        prepared(tmp_path, make(tmp_path), **settings)
    assert "\n" not in str(caught.value) and not [*(tmp_path / "new").rglob("*")]


def test_an_output_that_is_taken_or_has_no_room(tmp_path, monkeypatch):
    source = parquet(tmp_path / "t" / "0.parquet", text=[f"text number {n}" for n in range(99)])
    with pytest.raises(InputError, match=r"out lies in the source .*: choose another --output, outside of it"):
        prepared(tmp_path, tmp_path)  # its shards would be sources of the next call
    (tmp_path / "new" / "out").mkdir(parents=True)
    (tmp_path / "new" / "out" / "thesis.txt").touch()
    with pytest.raises(InputError, match="out is not empty: choose another --output"):
        prepared(tmp_path, source)
    (tmp_path / "new" / "out" / "thesis.txt").unlink()  # an empty folder is taken

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "shard")

    with monkeypatch.context() as patch:
        patch.setattr(pq, "write_table", full)
        with pytest.raises(OSError, match="No space left"):  # one line in a command: test_output.py
            prepared(tmp_path, source)
    work = tmp_path / "new" / ".out.prepare"
    begun = (work / "run.json").read_text()
    for odd in ('{"sources": 3, "settings": {}}', '{"sources": [{"x": 1}], "settings": {}}', "{}"):
        (work / "run.json").write_text(odd)
        with pytest.raises(InputError, match=r"run.json: .*; delete .*\.out\.prepare"):
            prepared(tmp_path, source)
    (work / "run.json").unlink()
    with pytest.raises(InputError, match="is in the way, and no unfinished work of this command: move it away"):
        prepared(tmp_path, source)
    (work / "run.json").write_text(begun)
    with pytest.raises(InputError, match=r"the unfinished .*prepare has other settings .*delete it, or choose"):
        prepared(tmp_path, source, seed=1)
    with (
        FileLock(tmp_path / "new" / ".out.prepare" / ".lock"),
        pytest.raises(InputError, match="another process prep"),
    ):
        prepared(tmp_path, source)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "new" / "out").rmdir()
    (tmp_path / "new" / "out").symlink_to(tmp_path / "elsewhere")  # a link to a folder is followed
    assert prepared(tmp_path, source)["train"][0] == 98 and (tmp_path / "elsewhere" / "stats.json").exists()


def test_bad_files_are_left_out_and_named_where_that_is_asked_for(tmp_path):
    source = jsonl(tmp_path / "t.jsonl", '{"text": "first text"}', "{", '{"text": "second text"}')
    assert prepared(tmp_path, source, skip_bad_files=True)["read"][0] == 2
    assert "the line at byte 23 is not JSON" in (tmp_path / "new" / "out" / "README.md").read_text()


def test_a_parquet_file_without_a_footer_is_on_the_card(tmp_path):
    parquet(tmp_path / "t" / "0.parquet", text=["first text", "second text"])
    (tmp_path / "t" / "1.parquet").write_bytes(b"PAR1")
    with pytest.warns(UserWarning, match="1.parquet cannot be read"):
        assert prepared(tmp_path, tmp_path / "t", skip_bad_files=True)["read"][0] == 2
    assert "1.parquet cannot be read (truncated" in (tmp_path / "new" / "out" / "README.md").read_text()


def test_what_a_source_holds_beside_is_named_and_nothing_else_is_said(tmp_path, capsys):
    (tmp_path / "a").mkdir()
    jsonl(tmp_path / "a" / "1.jsonl", *[f'{{"text": "text number {n}"}}' for n in range(9)])
    for name in ("2.txt", "3.jsonl.gz", "test.jsonl"):
        jsonl(tmp_path / "a" / name, '{"text": "text number 10"}')
    assert prepared(tmp_path, tmp_path / "a")["read"][0] == 9
    assert capsys.readouterr().err == f"source {tmp_path}/a: not read: 2.txt, 3.jsonl.gz, test.jsonl\n"


def test_a_wrong_bundle_of_tests_is_one_line(tmp_path):
    from nanochat_hf.eval.tasks import eval_rows

    with pytest.raises(InputError, match="is no CORE bundle"):
        list(eval_rows(["nanochat_core"], str(tmp_path), None))


CALLS = [
    (lambda: train_bpe([], 300), "no text"),
    (lambda: load_tokenizer("/nowhere"), "no tokenizer in"),
    (lambda: DocumentStream("primer", "test"), "split must be"),
    (lambda: open_documents([]), "dataset is .*: it must be a list of {dataset, weight}, not empty"),
    (lambda: PretrainConfig(depth=0), "^depth is 0: it must be"),
    (lambda: PretrainConfig(0), "^depth is 0: it must be"),
    (lambda: PretrainConfig(depth=True), "^depth is 'true': it must be"),
    (lambda: PretrainConfig(dept=3), "unknown key 'dept'; did you mean 'depth'"),
]


@pytest.mark.parametrize("call,message", CALLS)
def test_a_wrong_call_from_python(call, message):
    with pytest.raises(InputError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
