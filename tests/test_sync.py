"""--sync: a bare machine resumes from any URL to equal results, whatever cut the uploads off before."""

import dataclasses
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from safetensors.torch import load_file
from workers import launch

from nanochat_hf import sync as module
from nanochat_hf.errors import InputError
from nanochat_hf.run import Run, load_json, save_json
from nanochat_hf.stage_configs import PretrainConfig
from nanochat_hf.sync import MARK, FileStore, Sync, parse_mark, syncing
from nanochat_hf.train import checkpoint

ROOT = Path(__file__).parent.parent
BASE = PretrainConfig(
    dataset="primer", depth=2, aspect_ratio=32, head_dim=32, max_seq_len=64, num_iterations=8, total_batch_size=512,
    device_batch_size=8, warmup_steps=2, eval_every=-1, eval_tokens=256, sample_every=-1, save_every=2,
)  # fmt: skip


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr("nanochat_hf.data.hub_files.RETRY_DELAYS", (0.01, 0.01, 0.01))
    monkeypatch.setattr(module, "PAUSES", (0.01, 0.05))
    monkeypatch.setattr(module, "POLL", 0.02)
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


@pytest.fixture(params=["file", "memory", "hf"])
def url(request, tmp_path):
    if request.param == "hf":
        request.getfixturevalue("hub")
    urls = {"file": f"file://{tmp_path}/re [m]ote", "memory": "memory://bucket/run", "hf": "hf://you/run"}
    return urls[request.param]


@pytest.fixture
def remote(tmp_path):
    return f"file://{tmp_path}/remote"


def write_stage(run: Run, stage: str, text: str = "weights") -> None:
    run.path.joinpath(stage).mkdir(parents=True, exist_ok=True)
    (run.path / stage / "model.safetensors").write_text(text)
    save_json(run.path / stage / "metrics.json", {"finished": True, "text": text})
    shutil.rmtree(run.path / stage / "state", ignore_errors=True)


def write_checkpoint(run: Run, step: int, stage: str = "base", keep: int = 2) -> None:
    state = run.path / stage / "state"
    aside = state / f".step_{step:06d}"
    aside.mkdir(parents=True)
    (aside / "model.pt").write_bytes(random.Random(step).randbytes(2000))
    (aside / "shards").mkdir()
    (aside / "shards" / ".metadata").write_text(f"step {step}")  # of torch.distributed.checkpoint
    checkpoint.write_manifest(aside)
    aside.rename(state / f"step_{step:06d}")
    checkpoint.delete_superseded(state, keep)


def contents(run: Run) -> dict[str, bytes]:
    files = {p.relative_to(run.path).as_posix(): p.read_bytes() for p in run.path.rglob("*") if p.is_file()}
    return {file: data for file, data in files.items() if not file.startswith(".")}


def names_at(url: str) -> list[str]:
    """stage/checkpoint of the whole uploads at a file or memory URL."""
    names = [path.split("/")[-2] for path in FileStore(url).fs.find(FileStore(url).root) if path.endswith(MARK)]
    return sorted("/".join(name.split("--")[:2]) for name in names)


def wait_for(condition) -> None:
    while not condition():
        time.sleep(0.01)


def test_a_bare_folder_gets_finished_stages_and_the_newest_checkpoint(url, tmp_path):
    run, bare = Run(tmp_path / "run"), Run(tmp_path / "bare")
    with syncing(url, run):
        write_stage(run, "tokenizer")
        for step in (1, 2, 3):
            write_checkpoint(run, step)
    half = bare.path / "base" / "state" / "step_000003"
    half.mkdir(parents=True)
    (half / "half").touch()  # written by a job that was killed
    with syncing(url, bare):
        assert contents(bare) == {path: data for path, data in contents(run).items() if "step_000002" not in path}
        write_checkpoint(bare, 4)
        write_stage(bare, "base")
    with syncing(url, again := Run(tmp_path / "again")):
        assert contents(again) == contents(bare) and not (again.path / "base" / "state").exists()
    assert not (again.path / ".sync").exists()
    assert (module.HubStore if url.startswith("hf") else FileStore)(url).read(module.OWNER) is None  # released


def test_old_checkpoints_are_deleted_as_in_the_run_folder(remote, tmp_path):
    run = Run(tmp_path / "run")
    with syncing(remote, run):
        for step in range(1, 6):
            write_checkpoint(run, step)
            wait_for(lambda: f"base/step_{step:06d}" in names_at(remote))  # noqa: B023
    assert names_at(remote) == ["base/step_000004", "base/step_000005"]
    last = run.path / "base" / "state" / "step_000005"
    (last / "model.pt").write_bytes(b"saved again")
    checkpoint.write_manifest(last)
    with syncing(remote, run):
        pass
    assert names_at(remote) == ["base/step_000004", "base/step_000005"]
    with syncing(remote, run):
        write_stage(run, "base")
    assert names_at(remote) == ["base/finished"] and len(list((tmp_path / "remote").iterdir())) == 1


def test_the_newest_of_several_uploads_is_taken_and_hidden_files_are_not(remote, tmp_path, monkeypatch):
    monkeypatch.setattr(FileStore, "delete", lambda *args: None)  # as where the old ones could not be deleted
    run = Run(tmp_path / "run")
    for text in ("one", "two", "three", "four"):
        write_stage(run, "base", text)
        (run.path / "base" / ".model.safetensors").write_text("half")  # as of an interrupted write
        with syncing(remote, run):
            pass
    with syncing(remote, bare := Run(tmp_path / "bare")):
        assert contents(bare) == {file: data for file, data in contents(run).items() if "/." not in file}


def test_a_damaged_upload_is_set_aside_and_the_one_before_used(remote, tmp_path, capsys):
    run, bare = Run(tmp_path / "run"), Run(tmp_path / "bare")
    with syncing(remote, run):
        for step in (1, 2):
            write_checkpoint(run, step)
            wait_for(lambda: f"base/step_{step:06d}" in names_at(remote))  # noqa: B023
    [path] = (tmp_path / "remote").glob("base--step_000002--*/base/state/*/model.pt")
    path.write_bytes(b"\0" + path.read_bytes()[1:])
    with syncing(remote, bare):
        assert checkpoint.latest(bare.path / "base" / "state").name == "step_000001"
    assert "step_000002" in capsys.readouterr().out and names_at(remote) == ["base/step_000001"]


def test_a_half_upload_is_ignored_and_deleted_also_that_of_an_interrupted_deletion(remote, tmp_path):
    run, bare = Run(tmp_path / "run"), Run(tmp_path / "bare")
    with syncing(remote, run):
        write_checkpoint(run, 1)
    [whole] = (tmp_path / "remote").iterdir()
    halves = [shutil.copytree(whole, whole.with_name(f"base--step_00000{n}--{'0' * 16}")) for n in (8, 9)]
    (halves[0] / MARK).unlink()
    (halves[1] / MARK).write_bytes((whole / MARK).read_bytes()[:40])
    with syncing(remote, bare):
        assert [path.name for path in (bare.path / "base" / "state").iterdir()] == ["step_000001"]
        write_checkpoint(bare, 2)
    assert not any(half.exists() for half in halves)
    store = FileStore(remote)
    store.fs = Mock(wraps=store.fs, rm=Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        store.delete(whole.name)
    assert names_at(remote) == ["base/step_000002"]


def test_a_file_that_grows_during_its_upload_is_uploaded_as_it_was(remote, tmp_path):
    run, samples = Run(tmp_path / "run"), tmp_path / "run" / "rl" / "samples.jsonl"
    write_checkpoint(run, 1, "rl")
    samples.write_text("one\n")
    Sync(remote, run).snapshot("rl", "step_000001", tmp_path / "upload")
    samples.open("a").write("two\n")
    assert (tmp_path / "upload" / "rl" / "samples.jsonl").read_text() == "one\n"
    write_checkpoint(run, 7, "sft")
    assert Sync(remote, run).next_due()[:2] == ("rl", "step_000001")  # of two unfinished stages the later one


def test_a_mark_of_another_shape_or_with_files_outside_of_the_stage_counts_as_absent():
    whole = {"run": "a", "time": 1.0, "files": {"base/x": "0"}}
    assert parse_mark(json.dumps(whole).encode(), "base") == whole
    files = ["base/../../x", "/etc/x", "mid/x", "../base/x", "base", "base/\ud800"]
    for mark in (
        *([], None, 5, *({**whole, **change} for change in ({"files": ["base/x"]}, {"time": None}, {"run": ""}))),
        *({**whole, "files": {"base/x": "0", file: "0"}} for file in files),
    ):
        assert parse_mark(json.dumps(mark).encode(), "base") is None
    assert parse_mark(b"[" * 100_000, "base") is None is parse_mark(None, "base")


class Cut(FileStore):
    """Ends all work after `left` operations, in the middle of what it writes, as a killed process does."""

    left = 10**9

    def put(self, folder: Path, name: str) -> None:
        for path in sorted(folder.rglob("*"), key=lambda path: path.name == MARK):
            if path.is_file():
                self.write(f"{name}/{path.relative_to(folder).as_posix()}", path.read_bytes())

    def write(self, file: str, data: bytes) -> None:
        Cut.left -= 1
        if Cut.left >= 0:
            self.fs.makedirs(os.path.dirname(f"{self.root}/{file}"), exist_ok=True)
            super().write(file, data if Cut.left else data[:40])
        if Cut.left <= 0:
            raise ConnectionError("cut off")

    def delete(self, name: str) -> None:
        Cut.left -= 2
        if Cut.left >= 0:
            return super().delete(name)
        if Cut.left == -1:
            self.remove(f"{name}/{MARK}")
        raise ConnectionError("cut off")


def test_an_upload_cut_off_anywhere_leaves_a_whole_one(remote, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "FileStore", Cut)
    steps = []
    for left in range(1, 12):
        place, run, bare = f"{remote}{left}", Run(tmp_path / f"run{left}"), Run(tmp_path / f"bare{left}")
        sync = Sync(place, run)
        sync.fetch()
        for step, Cut.left in ((1, 10**9), (2, left)):  # by hand in place of the thread: the machine dies at the cut
            write_checkpoint(run, step, keep=1)
            with suppress(ConnectionError):
                sync.upload(*sync.next_due())
        Cut.left = 10**9
        sync = Sync(place, bare)
        sync.fetch()
        steps.append(checkpoint.step_of(checkpoint.latest(bare.path / "base" / "state")))
        write_checkpoint(bare, 3, keep=1)
        sync.upload(*sync.next_due())
        assert names_at(place) == ["base/step_000003"]
    assert steps == sorted(steps) and set(steps) == {1, 2} and "set aside" not in capsys.readouterr().out


def test_errors_are_retried_and_a_sync_that_stays_behind_is_said(remote, tmp_path, monkeypatch, capsys):
    real, failing = FileStore.put, [True]

    def put(store, folder, name):
        if failing:
            raise OSError("bucket gone")
        real(store, folder, name)

    monkeypatch.setattr(FileStore, "put", put)
    run = Run(tmp_path / "run")
    message = r"behind: it lacks base, step_000001 \(.*bucket gone.*run the same command"
    with pytest.raises(InputError, match=message), syncing(remote, run):
        write_checkpoint(run, 1)
        wait_for(lambda: "training continues" in capsys.readouterr().out)
    with syncing(remote, run):
        write_checkpoint(run, 2)
        failing.clear()
    assert "base/step_000002" in names_at(remote)


def test_training_does_not_wait_and_of_several_checkpoints_the_newest_is_next(remote, tmp_path, monkeypatch):
    real, names, written = FileStore.put, [], threading.Event()

    def slow(store, folder, name):
        names.append(name.split("--")[1])
        assert written.wait(60)
        real(store, folder, name)

    monkeypatch.setattr(FileStore, "put", slow)
    run = Run(tmp_path / "run")
    with syncing(remote, run):
        write_checkpoint(run, 1)
        wait_for(lambda: names)
        for step in (2, 3, 4):
            write_checkpoint(run, step)
        written.set()
    assert names == ["step_000001", "step_000004"] and names_at(remote) == ["base/step_000004"]


def test_after_a_signal_the_wait_is_bounded(remote, tmp_path, monkeypatch, capsys):
    begun, end = threading.Event(), threading.Event()
    monkeypatch.setattr(module, "AFTER_SIGNAL", 0.1)
    monkeypatch.setattr(FileStore, "put", lambda *_: begun.set() or end.wait(60))
    run = Run(tmp_path / "run")
    with pytest.raises(SystemExit) as caught, syncing(remote, run):
        write_checkpoint(run, 1)
        begun.wait(60)
        raise SystemExit(128 + signal.SIGTERM)
    assert caught.value.code == 143 and "is behind" in capsys.readouterr().out
    end.set()  # it was still on its way


def test_another_run_damaged_checkpoints_links_and_wrong_urls_are_refused(remote, tmp_path, monkeypatch):
    run, other = Run(tmp_path / "run"), Run(tmp_path / "other")
    for url in ("reference://x", "nosuch://x"):
        with pytest.raises(InputError, match=f"^--sync {url}: "), syncing(url, run):
            pass
    with syncing(remote, run):
        write_stage(run, "tokenizer")
    write_stage(other, "tokenizer", "others")
    for _ in range(2):
        with pytest.raises(InputError, match="holds another run"), syncing(remote, other):
            pass
    with syncing(f"{remote}2", other):  # its own place
        write_checkpoint(other, 1)
    (tmp_path / "empty").mkdir()  # of another run, but with nothing to lose
    (tmp_path / "empty" / ".sync-id").write_text("old")
    with syncing(remote, Run(tmp_path / "empty")):
        assert (tmp_path / "empty" / ".sync-id").read_text() == (run.path / ".sync-id").read_text()
    for url, folder in ((remote, other), (f"{remote}2", run)):
        with pytest.raises(InputError, match="holds another run"), syncing(url, folder):
            pass
    write_checkpoint(run, 2)
    (run.path / "base" / "state" / "step_000002" / "model.pt").write_text("other")
    with pytest.raises(InputError, match=r"step_000002 .*damaged"), syncing(remote, run):
        pass
    assert names_at(remote) == ["tokenizer/finished"]
    write_stage(run, "base")
    (run.path / "base" / "key.pem").symlink_to("/etc/hostname")
    monkeypatch.setattr("nanochat_hf.data.hub_files.time.sleep", lambda seconds: pytest.fail("it tries again"))
    with pytest.raises(InputError, match=r"lacks base, finished \(\S+key\.pem is a link"), syncing(remote, run):
        pass


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_the_hub_failing_at_random_requests(hub, tmp_path, monkeypatch, seed):
    monkeypatch.setattr("time.sleep", lambda seconds, real=time.sleep: real(min(seconds, 0.05)))  # the client's pauses
    numbers, run, bare = random.Random(seed), Run(tmp_path / "run"), Run(tmp_path / "bare")
    calls = [("POST", "/preupload/"), ("POST", "/commit/"), ("PUT", "/blobs/"), ("POST", "/batch"), ("GET", "/tree/")]
    with syncing("hf://you/run", run):
        for step in (1, 2, 3, 4):
            for _ in range(3):
                hub.fail(*numbers.choice(calls), numbers.choice([500, 503, None]))
            write_checkpoint(run, step)
            time.sleep(0.05)
        write_stage(run, "tokenizer")
    repo = hub.repos["models", "you/run"]
    files = repo.files("main")[1]
    [damaged] = [path for path in files if "step_000004" in path and path.endswith("model.pt")]
    files[damaged] = b"other"
    hub.faults.clear()
    others = [path for path in files if "step_000003" in path and path.endswith(MARK)]
    with syncing("hf://you/run", bare):
        base = bare.path / "base" / "state"
        assert [path.name for path in base.glob("*")] == (["step_000003"] if others else [])
        assert contents(bare)["tokenizer/model.safetensors"] == b"weights"


# --- real training


def losses(folder: Path) -> tuple:
    history = load_json(folder / "metrics.json")["history"]
    rows = [{k: v for k, v in row.items() if k not in ("time", "tokens_per_second", "mfu")} for row in history]
    return rows, {name: value.tolist() for name, value in load_file(folder / "model.safetensors").items()}


@pytest.mark.parametrize("shared", [True, False])
def test_the_look_for_disks_of_their_own_leaves_no_file(tmp_path, monkeypatch, shared):
    monkeypatch.setattr("nanochat_hf.sync.get_dist_info", lambda: (0, 2))
    monkeypatch.setattr("nanochat_hf.sync.gather_object", lambda here: [*here, shared])
    with nullcontext() if shared else pytest.raises(InputError, match="on one node's own: move it"):
        module.refuse_local_disks(Run(tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("config", ["multi_gpu", "fsdp2"])
def test_two_ranks_resume_on_another_disk_and_disks_of_their_own_are_refused(tokenizer, tmp_path, remote, config):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    keys = {"do": "sync", "tokenizer": tmp_path / "tokenizer", "url": remote, **dataclasses.asdict(BASE)}
    keys |= {"device_batch_size": 4}
    for name in ("own0", "own1"):
        (tmp_path / name).mkdir()
    first = {**keys, "run": tmp_path / "one", "die_at": 5}
    output = launch(2, config, [first, {**keys, "run": tmp_path / "own", "own_disks": True}]).stdout
    assert all(f"rank {rank}: --sync needs a disk that all nodes share" in output for rank in (0, 1))
    jobs = [{**keys, "run": tmp_path / "two"}, {**keys, "run": tmp_path / "whole", "url": None}]
    assert "took base, step_000004" in launch(2, config, jobs).stdout
    assert losses(tmp_path / "two" / "base") == losses(tmp_path / "whole" / "base")


@pytest.mark.slow
def test_sigterm_saves_and_syncs_and_the_same_command_resumes_elsewhere(tokenizer, tmp_path, remote):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    keys = {**dataclasses.asdict(BASE), "num_iterations": 400, "save_every": -1, "log_every": 5}
    (tmp_path / "base.yaml").write_text(json.dumps({key: value for key, value in keys.items() if value is not None}))

    def start(folder: str):
        words = ["pretrain", "--config", tmp_path / "base.yaml", "--run-dir", tmp_path / folder, "--sync", remote]
        command = [sys.executable, "-u", "-m", "nanochat_hf.cli", *words, "--tokenizer", tmp_path / "tokenizer"]
        return subprocess.Popen(list(map(str, command)), cwd=ROOT, stdout=subprocess.PIPE, text=True)

    process = start("one")
    for line in process.stdout:
        if "step" in line and "loss" in line:
            break
    begin = time.monotonic()
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 143 and time.monotonic() - begin < 30, output
    [name] = names_at(remote)
    process = start("two")
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0 and f"took base, {name.split('/')[1]}" in output and "resuming at step" in output


STRANGER = f"process 77 on elsewhere; {time.time()}".encode()


@pytest.mark.slow
def test_a_second_process_is_refused_while_the_first_lives_and_takes_over_then(url, tmp_path, monkeypatch, capsys):
    for store in (module.FileStore, module.HubStore):
        monkeypatch.setattr(store, "renewal", 0.2)
    run, bare = Run(tmp_path / "run"), Run(tmp_path / "bare")
    with syncing(url, run):
        store = (module.HubStore if url.startswith("hf") else FileStore)(url)
        first = store.read(module.OWNER)
        assert first.startswith(f"process {os.getpid()} on ".encode())
        write_checkpoint(run, 2)
        for _ in range(200):
            if renewed := store.read(module.OWNER) != first:
                break
            time.sleep(0.05)
        assert renewed
        second = Sync(url, bare)
        second.store.renewal = 1.0  # time enough for the first one to renew it on a busy machine
        second.me = "process 88 on elsewhere"
        with pytest.raises(InputError, match=f"{re.escape(url)} is in use by process {os.getpid()} on .*: stop that"):
            second.claim()
    assert store.read(module.OWNER) is None and not contents(bare)  # released
    store.write(module.OWNER, STRANGER)
    with syncing(url, bare):
        assert (bare.path / "base" / "state" / "step_000002").exists()
        assert "process 77 on elsewhere has it; looking 0.4 s whether that still runs" in capsys.readouterr().out


def test_an_ended_process_is_replaced_at_once_and_a_damaged_owner_after_a_while(remote, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(FileStore, "renewal", 0.01)
    ended = subprocess.Popen(["true"])
    ended.wait()
    names = {pid: f"process {pid} on {module.host_name()}; 1.0".encode() for pid in (ended.pid, os.getpid())}
    elsewhere = names[ended.pid].replace(b" on ", b" on other-")  # whether that has ended is not known here
    for owner in (*names.values(), b"\xff\xfe", b"x" * 10**6, elsewhere):
        FileStore(remote).write(module.OWNER, owner)
        with syncing(remote, run := Run(tmp_path / "run")):
            write_stage(run, "base")
        out = capsys.readouterr().out
        assert ("taken over from" in out) is (owner != names[os.getpid()])
        assert ("looking" in out) is (owner not in names.values())
    FileStore(remote).write(module.OWNER, elsewhere)
    with monkeypatch.context() as patch:  # that one releases the URL meanwhile
        patch.setattr(module.time, "sleep", lambda seconds: FileStore(remote).remove(module.OWNER))
        sync = Sync(remote, run)
        sync.claim()
    sync.release()
    assert names_at(remote) == ["base/finished"]


def test_whoever_lost_the_url_uploads_no_more_and_says_so(remote, tmp_path, monkeypatch):
    monkeypatch.setattr(FileStore, "renewal", 0.05)
    run, store, syncs = Run(tmp_path / "run"), FileStore(remote), []
    monkeypatch.setattr(module, "Sync", lambda *arguments: syncs.append(Sync(*arguments)) or syncs[-1])
    message = r"is behind: it lacks base, finished \(.*RuntimeError: process 77 .* took it over"
    with pytest.raises(InputError, match=message), syncing(remote, run):
        wait_for(lambda: store.write(module.OWNER, STRANGER) or syncs[0].other)
        write_stage(run, "base")
    assert store.read(module.OWNER) == STRANGER and names_at(remote) == []


@pytest.mark.parametrize("failures,warnings", [(3, 0), (4, 1), (6, 1)])
def test_uploads_that_fail_are_tried_again_with_pauses_and_told_once(capsys, failures, warnings):
    pauses, ends = [], iter([False] * failures + [True])
    closing = SimpleNamespace(wait=lambda seconds: pauses.append(seconds) or next(ends))
    last = Mock(side_effect=InputError("no"))
    sync = SimpleNamespace(
        url="u", closing=closing, upload_due=Mock(side_effect=OSError("x")), repeated=last, error=None
    )
    module.Sync.keep_up(sync)
    assert capsys.readouterr().out.count("warning: u is behind") == warnings and sync.error == "no"
    assert pauses == [0.02, 0.01, *[0.05] * 6][: failures + 1]


def test_an_owner_renews_until_another_has_the_url():
    for owner, renewals, other in (("me", 2, ""), ("", 2, ""), ("another", 0, "another")):
        sync = SimpleNamespace(store=SimpleNamespace(renewal=7), other="", me="me", renew=Mock())
        sync.owner, sync.released = Mock(return_value=(owner, b"")), Mock(wait=Mock(side_effect=[False, False, True]))
        Sync.keep_owner(sync)
        assert (sync.renew.call_count, sync.other) == (renewals, other)


def test_a_repository_of_uploads_is_private_and_its_commits_say_what_came(monkeypatch):
    monkeypatch.setattr(module, "log_in", api := Mock())
    module.HubStore("hf://you/run").put("x", "base--3")
    api().create_repo.assert_called_once_with("you/run", private=True, exist_ok=True)
    assert api().upload_folder.call_args.kwargs["commit_message"] == "Upload base"
