"""Text and conversations that cannot be read are one line that says which file and why."""

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat_hf.data.documents import open_documents
from nanochat_hf.data.mixture import Mixture
from nanochat_hf.errors import InputError


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
    ({"dataset": "{here}/pipe.jsonl"}, "is no file"),
    ({"dataset": "{here}/links"}, "cannot read .*train.jsonl: No such file"),
    ({"dataset": "primer", "subset": "main"}, "primer has no subsets"),
    ({"dataset": "{here}/bad.jsonl", "subset": "main"}, "has no subsets"),
    ({"dataset": "{here}"}, r"train\*"),
    ({"dataset": "{here}/train.parquet"}, "cannot read"),
    ({"dataset": "{here}/bad.jsonl", "rows": 9}, "has 3 rows, not 9"),
    ({"dataset": "primer", "rows": 10**9}, "primer gives at most 200,000 rows, not 1,000,000,000: use epochs"),
    (
        {"dataset": "{here}/words.txt", "transform": "spelling_bee", "rows": 10**9},
        "has 1,000,000,000 rows, more than 100,",
    ),
]


@pytest.mark.parametrize("entry,message", ENTRIES)
def test_a_mixture_that_cannot_be_opened(tmp_path, entry, message):
    (tmp_path / "empty.jsonl").touch()
    os.mkfifo(tmp_path / "pipe.jsonl")
    if "links" in entry["dataset"]:
        (tmp_path / "links").mkdir()
        (tmp_path / "links" / "train.jsonl").symlink_to("gone")
    (tmp_path / "words.txt").write_text("apple\nberry\n")
    (tmp_path / "train.parquet").write_bytes(b"PAR1 and then nothing")
    jsonl(tmp_path / "bad.jsonl", "{", "[1]", "3")
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
    (lambda here: "someone/something", "HF_HUB_OFFLINE"),
]


@pytest.mark.parametrize("make,message", TEXTS)
def test_a_text_that_cannot_be_read(tmp_path, monkeypatch, make, message):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=message) as caught:
        next(iter(open_documents(str(make(tmp_path)))))
        next(iter(open_documents(str(make(tmp_path)), "validation")))
    assert "\n" not in str(caught.value)
