"""`nanochat data prepare`: exactly what should go goes, and neither kills nor workers change a byte of the rest."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from random import Random

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_standin import Repo

from nanochat_hf import cli
from nanochat_hf.data import prepare as module
from nanochat_hf.data.documents import DocumentStream
from nanochat_hf.errors import InputError

pytest.importorskip("datasketch", reason="needs the extra data")
pytest.importorskip("py3langid", reason="needs the extra data")

ENGLISH = (
    "the of and to in that it was for on are as with his they at be this from have or one had by word but not what "
    "were we when your can said there use an each which she do how their if will up other about out many then them so "
    "some her would make like him into time has look two more write see number way could people my than first water "
    "call who its now find long down day did get come may part over house tree river morning garden winter"
)
WORDS = ENGLISH.split()
FRENCH = (
    "Le conseil municipal se réunira demain matin afin de discuter des travaux prévus dans les écoles de la ville. "
)
KOREAN = "도서관은 아침 아홉 시에 문을 열고 저녁 여섯 시에 닫습니다. 책을 빌리려면 회원증이 있어야 합니다. "
QUESTION = "Which of these four animals spends the whole winter asleep under the old red barn"  # 15 words


def document(seed: int, words: int = 90) -> str:
    rng = Random(seed)
    return " ".join(rng.choice(WORDS) for _ in range(words)) + "."


def jsonl(path: Path, texts: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def run(capsys, *words) -> dict:
    cli.dispatch("data", ["prepare", *map(str, words)])
    return capsys.readouterr().out


def texts(folder: Path, split: str) -> list[str]:
    return list(DocumentStream(folder, split))


@pytest.fixture
def tests(tmp_path):
    """Flags for the test rows of a bundle with one task, and of a file of GSM8K."""
    row = {"query": "Question: " + QUESTION, "choices": ["a mouse of the field", "a fish"], "gold": 0}
    short = {"query": "Who sleeps?", "choices": ["a", document(7002, 13)], "gold": 0}  # one of its texts has 13 words
    text = "".join(json.dumps(row) + "\n" for row in (row, short))
    jsonl(tmp_path / "bundle/eval_data/world_knowledge/arc_easy.jsonl", []).write_text(text)
    (tmp_path / "bundle/core.yaml").write_text("icl_tasks: []")
    (tmp_path / "chat").mkdir()
    rows = [{"question": document(7000, 20), "answer": document(7001, 20)}, {"question": "Two?", "answer": "2"}]
    (tmp_path / "chat/gsm8k_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = "nanochat_core_arc_easy,nanochat_core_squad,nanochat_gsm8k"
    return ["--decontaminate", tasks, "--core-bundle", tmp_path / "bundle", "--chat-data", tmp_path / "chat"]


def test_a_second_run_of_a_process_has_its_own_test_rows(tmp_path):
    source = jsonl(tmp_path / "texts" / "train.jsonl", [document(seed) for seed in range(20)])
    trains = []
    for seed, order in ((3, 0), (7, 0), (7, 1)):
        settings = {"min_chars": 1, "max_chars": None, "languages": None, "decontaminate": [f"task{seed}"]}
        settings |= {"dedup": [], "validation": 0.1, "skip_bad_files": False, "seed": order}
        rows = [("task", {"question": document(seed)})]
        module.prepare([str(source)], settings, tmp_path / "out", 1, lambda rows=rows: rows)
        trains.append(texts(tmp_path / "out", "train"))
        assert document(seed) not in trains[-1] + texts(tmp_path / "out", "validation")
        shutil.rmtree(tmp_path / "out")
    assert trains[1] != trains[2]


def test_exactly_the_planted_documents_go(tmp_path, capsys, monkeypatch, tests):
    good = [document(seed) for seed in range(120)]
    words = good[3].split()
    near = " ".join([*words[:40], "elsewhere", *words[41:]])
    other = " ".join(words[:45] + document(999, 45).split())  # half of it is new
    shouted = " --_".join(QUESTION.upper().split()[1:14])  # 13 words
    almost = document(500) + " " + " ".join(QUESTION.split()[1:13]) + " " + document(501)  # 12
    answered = (
        document(502) + " animals spends the whole winter asleep under the old red barn, a fish! " + document(503)
    )
    problem = document(504) + " " + " ".join(document(7000, 20).split()[-7:] + document(7001, 20).split()[:6])
    planted = {
        "without words": ["?! " * 200, None, ""], "too short": [document(600, 10)], "too long": [document(601, 2000)],
        "other language": [document(603) + FRENCH * 20, KOREAN * 9], "near duplicate": [near, near.title()],
        "contaminated": [document(602) + shouted, answered, problem], "duplicate": [good[5], good[5], good[90]],
    }  # fmt: skip
    rows = [*good[:60], other, almost, *(text for group in planted.values() for text in group)]
    pq.write_table(pa.table({"text": rows, "id": list(range(len(rows)))}), tmp_path / "a.parquet", row_group_size=9)
    jsonl(tmp_path / "b/train.jsonl", good[60:100])
    jsonl(tmp_path / "b/test.jsonl", [document(700)])  # not read
    for number, text in enumerate(good[100:]):
        (tmp_path / "c").mkdir(exist_ok=True)
        (tmp_path / f"c/test {number:02d}.txt").write_text(text)
    output = tmp_path / "out"
    words = [tmp_path / "a.parquet", tmp_path / "b", tmp_path / "c", "--output", output, "--workers", 1, *tests]
    words += ["--languages", "en", "--max-chars", 5000, "--validation", 0.1]
    monkeypatch.setattr(module, "SHARD_CHARS", 10_000)
    monkeypatch.setattr(module, "ROW_GROUP", 7)
    printed = run(capsys, *words)
    train, validation = texts(output, "train"), texts(output, "validation")
    assert sorted(train + validation) == sorted([*good, other, almost]) and len(validation) == 12
    assert validation[0] != train[0] != good[0] and not {near[:200], other[:200]} & {t[:200] for t in validation}
    shards = sorted(path.name for path in output.glob("train-*.parquet"))
    assert len(shards) == round(sum(map(len, train)) / 10_000) and shards[-1].endswith(
        f"-of-{len(shards):05d}.parquet"
    )
    stats = json.loads((output / "stats.json").read_text())
    dropped = {name: [text or "" for text in group] for name, group in planted.items()}
    dropped |= {"train": train, "validation": validation, "read": [t or "" for t in [*rows, *good[60:]]]}
    assert stats["counts"] == {
        name: [len(group), sum(map(len, group)), sum(len(text.encode()) for text in group)]
        for name, group in dropped.items()
    }
    assert stats["tests"] == {
        "nanochat_core_arc_easy": [2, 0, 2], "nanochat_core_squad": [0, 0, 0], "nanochat_gsm8k": [2, 1, 1]
    }  # fmt: skip
    timing, speed = stats["timing"], stats["counts"]["read"][2] / 1e6 / stats["timing"].pop("seconds")
    assert timing == {"megabytes_per_second": pytest.approx(speed), "workers": 1, "resumed": False}
    assert pq.read_metadata(output / "validation-00000-of-00001.parquet").num_row_groups == 2  # of 12 documents
    card = (output / "README.md").read_text()
    assert "\n# out\n" in card and "| duplicate | 3 | " in card
    assert 'language: ["en"]' in card and "duplicate " in printed
    assert not list(tmp_path.glob(".out*"))


def contents(folder: Path) -> dict:
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    files["stats.json"] = {k: v for k, v in json.loads(files["stats.json"]).items() if k != "timing"}
    return files


def test_a_run_that_is_killed_at_any_rename_resumes_to_the_same_bytes(tmp_path, capsys, monkeypatch, tests):
    monkeypatch.setattr(module, "PART_BYTES", 4000)
    monkeypatch.setattr(module, "SHARD_CHARS", 9000)
    source, output = tmp_path / "texts.parquet", tmp_path / "out"
    pq.write_table(pa.table({"text": [document(n % 55) for n in range(60)]}), source, row_group_size=9)
    words = [source, "--output", output, *tests, "--workers"]
    run(capsys, *words, 1)
    whole, events, kills = contents(output), [], 0
    output.rename(tmp_path / "whole")

    def killed(function):
        def call(*arguments):
            if len(events) == limit:
                raise KeyboardInterrupt
            events.append(arguments)
            return function(*arguments)

        return call

    for name in ("replace", "rename"):
        monkeypatch.setattr(module.os, name, killed(getattr(os, name)))
    monkeypatch.setattr(module.os, "getpid", lambda: 10**6 + kills)  # a run is another process
    for limit in (0, 1, *[2] * 16, 3, 4):  # noqa: B007
        events.clear()
        try:
            run(capsys, *words, 1)
            break
        except KeyboardInterrupt:
            kills += 1
            assert not output.exists()
    assert kills == 19 and contents(output) == whole and len(whole) > 4 and not list(tmp_path.glob(".out*"))
    published = (output / "README.md").read_text() + (output / "stats.json").read_text()
    assert source.name in published and str(tmp_path) not in published
    before = sorted((path, path.stat().st_mtime_ns) for path in output.iterdir())
    assert run(capsys, *words, 2) and before == sorted((path, path.stat().st_mtime_ns) for path in output.iterdir())
    pq.write_table(pa.table({"text": [document(1)]}), source)
    for flags, message in (([], "out has other sources"), (["--seed", 1], "out has other settings")):
        with pytest.raises(InputError, match=message):
            run(capsys, *words, 1, *flags)


@pytest.mark.slow
@pytest.mark.parametrize("parts", [0, 1, 4])
def test_a_kill_leaves_no_process_and_two_workers_write_what_one_does(tmp_path, capsys, parts):
    source, output = tmp_path / "texts.parquet", tmp_path / "out"
    blobs = [os.urandom(1 << 20)] * 120  # a column that is not read makes large parts of little text
    rows = {"text": [document(n % 90, 900) for n in range(120)], "image": blobs}
    pq.write_table(pa.table(rows), source, row_group_size=10, use_dictionary=False, compression="none")
    words = ["prepare", str(source), "--decontaminate=null", f"--output={output}", "--workers"]
    command = [sys.executable, "-m", "nanochat_hf.cli", "data", *words, "2"]
    process, deadline = subprocess.Popen(command, stderr=subprocess.PIPE), time.time() + 120
    while len(list(tmp_path.glob(".out.prepare/part_*.arrow"))) < parts or not (tmp_path / ".out.prepare").exists():
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.05)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not psutil.wait_procs(children, timeout=20)[1] and not output.exists()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    timing = json.loads((output / "stats.json").read_text())["timing"]
    assert "finished; train on it" in done.stdout and (timing["resumed"], timing["workers"]) == (bool(parts), 2)
    cli.dispatch("data", [*words[:-2], f"--output={tmp_path}/one", "--workers", "1"])
    both = [contents(output), contents(tmp_path / "one")]
    assert both[0].pop("README.md") != both[1].pop("README.md") and both[0] == both[1]  # their titles differ


def test_without_the_extra_one_line_names_it(tmp_path, capsys, monkeypatch):
    def version(name: str):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(module.metadata, "version", version)
    with pytest.raises(InputError, match=r"needs the package datasketch: pip install 'nanochat_hf\[data\]'"):
        run(capsys, tmp_path, "--output", tmp_path / "out")
    assert not [*tmp_path.iterdir()]
    monkeypatch.undo()
    jsonl(tmp_path / "source/a.jsonl", ["text"])
    (tmp_path / "source/train.csv").touch()
    with pytest.raises(InputError, match=r"source has its train split in train\.csv, which is not read"):
        run(capsys, tmp_path / "source", "--output", tmp_path / "out", "--decontaminate", "null")


def test_a_dataset_of_the_hub_keeps_its_commit_when_a_download_broke_off(tmp_path, hub, capsys, monkeypatch):
    def rows(first: int) -> bytes:
        return "".join(json.dumps({"text": document(seed)}) + "\n" for seed in range(first, first + 30)).encode()

    files = {f"{n}.jsonl": rows(30 * n) for n in range(3)} | {"test.jsonl": rows(900)}
    monkeypatch.setattr(module, "PART_BYTES", 1)
    hub.repos["datasets", "me/texts"] = repo = Repo(branches={"main": "1" * 40}, commits={"1" * 40: files})
    words = ["me/texts", "--output", tmp_path / "out", "--decontaminate", "null", "--workers", 1]
    for _ in range(4):  # all attempts
        hub.fail("GET", "1.jsonl", status=500)
    with pytest.raises(InputError, match=r"1\.jsonl .*run the same command again to resume"):
        run(capsys, *words)
    assert len(list(tmp_path.glob(".out.prepare/part_*.arrow"))) == 1
    repo.commits["2" * 40], repo.branches["main"] = {"0.jsonl": rows(0)}, "2" * 40
    run(capsys, *words)
    stats = json.loads((tmp_path / "out" / "stats.json").read_text())
    assert stats["sources"] == [{"name": "me/texts", "commit": "1" * 40, "files": 3, "content": None}]
    assert stats["counts"]["read"][0] == 90 and stats["timing"]["resumed"]
