"""`--sync URL`: checkpoints and finished stages of a run, stored where another machine can resume the run.

    with run.lock(), syncing("s3://bucket/d24", run):     # or gs://, file://, memory://, hf://owner/name
        run_stages(run, stages, configs)

On entry what the URL has beyond the run folder is downloaded. Inside, a thread uploads each finished stage and the
newest checkpoint, one at a time; training does not wait. Each upload has its own folder,
`<stage>--<checkpoint or "finished">--<fingerprint>`. Its sync.json with the checksums is written last: a folder
without it counts as absent. One process at a time: `owner` names it and is renewed while it lives.
"""

import math
import os
import re
import shutil
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path, PurePosixPath

import psutil
from accelerate.utils import gather_object
from fsspec.core import url_to_fs
from huggingface_hub.errors import RemoteEntryNotFoundError
from pydantic import TypeAdapter
from typing_extensions import TypedDict

from .data.hub_files import hub_errors, reason_of, with_retry
from .distributed import broadcast_from_main, get_dist_info, main_process_first, partial_state
from .errors import InputError
from .hub.push import link, log_in
from .run import STAGES, Run, fingerprint, load_metrics, save_json, writing
from .train.checkpoint import complete_checkpoints, damage, manifest_of, sha256

SYNCED = STAGES[:-1]  # all but the report
NAME = re.compile(r"(\w+)--(finished|step_\d+(?:\.\d+)?|checkpoint-\d+)--[0-9a-f]{16}")
MARK = "sync.json"
OWNER = "owner"  # "process 123 on HOST" and seconds
POLL = 1.0  # seconds between looks at the run folder
PAUSES = (1, 2, 4, 8, 16, 32, 60)  # seconds before a failed upload is tried again; the last one repeats
AFTER_SIGNAL = 20  # seconds for uploads after SIGTERM and a checkpoint: cloud providers give 30 in all


class FileStore:
    """Uploads below a URL of any file system that fsspec supports."""

    renewal = 15.0  # seconds between renewals of OWNER

    def __init__(self, url: str):
        try:
            self.fs, self.root = url_to_fs(url, use_listings_cache=False)
        except Exception as error:  # no such protocol, its package is not installed, or it needs more than a URL
            raise InputError(f"--sync {url}: {reason_of(error)}") from None

    def names(self) -> set[str]:
        """The folders at the URL."""
        with suppress(FileNotFoundError):
            return {PurePosixPath(path).name for path in self.fs.ls(self.root, detail=False)}
        return set()

    def put(self, folder: Path, name: str) -> None:
        """Upload a folder, MARK last."""
        files = [path for path in folder.rglob("*") if path.is_file() and path != folder / MARK]
        targets = [f"{self.root}/{name}/{path.relative_to(folder).as_posix()}" for path in files]
        for parent in {str(PurePosixPath(target).parent) for target in targets}:
            self.fs.makedirs(parent, exist_ok=True)
        self.fs.put(list(map(str, files)), targets)
        self.write(f"{name}/{MARK}", (folder / MARK).read_bytes())

    def get(self, name: str, files: list[str], folder: Path) -> None:
        """Download `files` of an upload into `folder`; absent ones may be left out."""
        for file in files:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            self.fs.get([f"{self.root}/{name}/{file}" for file in files], [str(folder / file) for file in files])

    def read(self, file: str) -> bytes | None:
        with suppress(FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return self.fs.cat_file(f"{self.root}/{file}")

    def write(self, file: str, data: bytes) -> None:
        self.fs.makedirs(self.root, exist_ok=True)
        self.fs.pipe_file(f"{self.root}/{file}", data)

    def remove(self, file: str) -> None:
        with suppress(FileNotFoundError):
            self.fs.rm_file(f"{self.root}/{file}")

    def delete(self, name: str) -> None:
        self.remove(f"{name}/{MARK}")  # first: an interruption must not leave a half upload that counts as whole
        with suppress(FileNotFoundError):
            self.fs.rm(f"{self.root}/{name}", recursive=True)


class HubStore:
    """Uploads as folders of a private model repository, one commit each; as FileStore."""

    renewal = 300.0  # each is a commit

    def __init__(self, url: str):
        self.repo, self.api = url.removeprefix("hf://"), log_in()
        with hub_errors(self.repo):
            self.api.create_repo(self.repo, private=True, exist_ok=True)

    def names(self) -> set[str]:
        return {file.split("/")[0] for file in self.api.list_repo_files(self.repo)}

    def put(self, folder: Path, name: str) -> None:
        message = f"Upload {name.rpartition('--')[0]}"
        self.api.upload_folder(repo_id=self.repo, folder_path=folder, path_in_repo=name, commit_message=message)

    def get(self, name: str, files: list[str], folder: Path) -> None:
        self.api.snapshot_download(self.repo, local_dir=folder.parent, allow_patterns=f"{name}/*")

    def read(self, file: str) -> bytes | None:
        with suppress(RemoteEntryNotFoundError), tempfile.TemporaryDirectory() as cache:  # never an older copy
            return Path(self.api.hf_hub_download(self.repo, file, cache_dir=cache)).read_bytes()

    def write(self, file: str, data: bytes) -> None:
        self.api.upload_file(path_or_fileobj=data, path_in_repo=file, repo_id=self.repo)

    def remove(self, file: str) -> None:
        self.api.delete_files(self.repo, [file])

    def delete(self, name: str) -> None:
        self.api.delete_files(self.repo, [f"{name}/*"])


def order(place: str) -> list[float]:
    """Sorts the places of a stage: "" for nothing, checkpoints by step, "finished"."""
    return [math.inf] if place == "finished" else [int(number) for number in re.findall(r"\d+", place)]


class Mark(TypedDict):
    """The content of sync.json."""

    run: str  # its id
    time: float  # seconds
    files: dict[str, str]  # path below the run folder -> SHA-256


def parse_mark(data: bytes | None, stage: str) -> Mark | None:
    """The content of sync.json, or None if it is absent, cut off, or names files outside of the stage's folder."""
    try:
        mark = TypeAdapter(Mark).validate_json(data or b"")
    except ValueError:
        return None
    paths = [PurePosixPath(file).parts for file in mark["files"]]
    inside = all(len(parts) > 1 and parts[0] == stage and ".." not in parts for parts in paths)
    return mark if inside and mark["run"].isalnum() else None


class Sync:
    """Keeps `url` up to date with a run folder, on the main process."""

    def __init__(self, url: str, run: Run):
        self.url, self.run, self.work = url, run, run.path / ".sync"
        self.store = (HubStore if url.startswith("hf://") else FileStore)(url)
        self.uploads: dict[str, dict | None] = {}  # name of an upload -> its sync.json, None for a half one
        self.synced: set[tuple] = set()  # (stage, place, time of change) of what needs no upload any more
        self.run_id, self.error = "", ""  # error: why the last uploads failed
        self.closing = threading.Event()
        self.thread = threading.Thread(target=self.keep_up, daemon=True)
        self.me, self.other = f"process {os.getpid()} on {host_name()}", ""  # other: who took the URL over
        self.owner_thread = threading.Thread(target=self.keep_owner, daemon=True)
        self.released = threading.Event()

    # --- the owner of the URL

    def owner(self) -> tuple[str, bytes]:
        """(who has the URL, the content of OWNER), empty if nobody has it."""
        data = self.store.read(OWNER) or b""
        return data.decode(errors="replace").partition(";")[0][:200], data

    def claim(self) -> None:
        """Become the owner. Raises InputError if another process that still runs is it."""
        owner, before = self.repeated(self.owner)
        if owner and owner != self.me:
            if not is_dead(owner):
                print(f"{self.url}: {owner} has it; looking {2 * self.store.renewal:g} s whether that still runs")
                time.sleep(2 * self.store.renewal)
                if self.repeated(self.owner) not in ((owner, before), ("", b"")):
                    raise InputError(f"{self.url} is in use by {owner}: stop that, or give another URL")
            print(f"{self.url}: taken over from {owner}, which has ended")
        self.repeated(self.renew)
        self.owner_thread.start()

    def renew(self) -> None:
        self.store.write(OWNER, f"{self.me}; {time.time()}".encode())

    def keep_owner(self) -> None:
        """The second thread: renew OWNER, also during long uploads, until `release` or until another has the URL."""
        while not self.released.wait(self.store.renewal) and not self.other:
            with suppress(Exception):  # of any kind: tried again; if it keeps failing, uploads fail, too
                owner, _ = self.owner()
                self.other = owner if owner != self.me else ""
                if not self.other:
                    self.renew()

    def release(self) -> None:
        self.released.set()
        self.owner_thread.join(5)  # else it may renew what is removed here
        with suppress(Exception):  # then the next one has to wait until it is not renewed
            if self.owner()[0] == self.me:
                self.store.remove(OWNER)

    def marker(self, stage: str, place: str) -> Path:
        """The file that is written last in a finished stage or a checkpoint, with checksums of the others."""
        checkpoint = self.run.path / stage / "state" / place
        return self.run.path / stage / "metrics.json" if place == "finished" else manifest_of(checkpoint) or checkpoint

    def local(self, stage: str) -> str:
        """ "finished", the name of the newest checkpoint, or "" if the run folder has none of that stage."""
        if (load_metrics(self.run.path / stage, stage == "eval") or {}).get("finished"):
            return "finished"
        checkpoints = complete_checkpoints(self.run.path / stage / "state")
        return checkpoints[-1].name if checkpoints else ""

    # --- from the URL into the run folder

    def fetch(self) -> None:
        """Download of each stage the newest undamaged upload, if it is further than the run folder."""
        with writing(self.work):
            shutil.rmtree(self.work, ignore_errors=True)
            self.work.mkdir(parents=True)
        for name in filter(NAME.fullmatch, self.repeated(self.store.names)):
            data = self.repeated(self.store.read, f"{name}/{MARK}")
            self.uploads[name] = parse_mark(data, NAME.fullmatch(name)[1])
        self.join_run()
        whole = [(*NAME.fullmatch(name).groups(), name, mark) for name, mark in self.uploads.items() if mark]
        for stage, place, name, mark in sorted(whole, key=lambda one: (order(one[1]), one[3]["time"]), reverse=True):
            if order(place) > order(self.local(stage)):
                self.download(stage, place, name, mark["files"])

    def join_run(self) -> None:
        """Take over the run's id from the URL into an empty run folder. Raises InputError if it holds another run."""
        path, ids = self.run.path / ".sync-id", {mark["run"] for mark in self.uploads.values() if mark}
        try:
            own = path.read_text() if path.exists() else ""
        except (OSError, ValueError):
            raise InputError(f"{path} cannot be read: delete it, or give an empty run folder") from None
        if ids and own not in ids and any(map(self.local, SYNCED)):
            advice = "give another URL, or an empty run folder to resume that run"
            raise InputError(f"{self.url} holds another run than {self.run.path}: {advice}")
        self.run_id = own if own and (own in ids or not ids) else min(ids, default=uuid.uuid4().hex)
        with writing(path):
            path.write_text(self.run_id)

    def download(self, stage: str, place: str, name: str, files: dict[str, str]) -> None:
        """Take over an upload if its checksums are right, else set it aside."""
        folder = self.work / name
        self.repeated(self.store.get, name, list(files), folder)
        last = Path(stage, "metrics.json") if place == "finished" else Path(stage, "state", place)
        for file, checksum in files.items():
            if not (folder / file).is_file() or sha256(folder / file) != checksum:
                self.repeated(self.store.remove, f"{name}/{MARK}")
                self.uploads[name] = None
                print(f"{self.url}: {name}/{file} is damaged; set aside, using the upload before it, if any")
                return
        with writing(self.run.path):
            (self.run.path / last).parent.mkdir(parents=True, exist_ok=True)
            for file in (Path(file) for file in files if not Path(file).is_relative_to(last)):
                (self.run.path / file).parent.mkdir(parents=True, exist_ok=True)
                os.replace(folder / file, self.run.path / file)
            shutil.rmtree(self.run.path / last, ignore_errors=True)  # a chat stage's half checkpoint
            os.replace(folder / last, self.run.path / last)
        print(f"{self.url}: took {stage}, {place}")

    def repeated(self, action: Callable, *args):
        """action(*args), tried again with pauses. Raises InputError when it keeps failing."""
        return with_retry(partial(action, *args), f"--sync {self.url}", log=print)

    # --- from the run folder to the URL

    def keep_up(self) -> None:
        """The thread: upload what is due, until `close`; then once more, with a few attempts."""
        failures = 0
        while not self.closing.wait(PAUSES[min(failures, len(PAUSES)) - 1] if failures else POLL):
            try:
                self.upload_due()
                failures = 0
            except Exception as error:  # of any kind, also a checkpoint that a newer one replaced meanwhile
                failures += 1
                if failures == 4:
                    print(f"warning: {self.url} is behind: {reason_of(error)}; training continues, it is retried")
        try:
            self.repeated(self.upload_due)
        except InputError as error:
            self.error = str(error)

    def upload_due(self) -> None:
        while due := self.next_due():
            self.upload(*due)

    def next_due(self) -> tuple | None:
        """(stage, place, time of change) of what to upload next: finished stages in order, then a checkpoint."""
        newest = None
        for stage in SYNCED:
            if place := self.local(stage):
                due = stage, place, self.marker(stage, place).stat().st_mtime_ns
                if place == "finished" and due not in self.synced:
                    return due
                newest = due if place != "finished" else newest
        return newest if newest not in self.synced else None

    def upload(self, stage: str, place: str, changed: int) -> None:
        """Upload a finished stage or a checkpoint, unless it is there, and delete what it supersedes."""
        marker, folder = self.marker(stage, place), self.work / "upload"
        if self.other:
            raise RuntimeError(f"{self.other} took it over")
        name = f"{stage}--{place}--{fingerprint(sha256(marker) if marker.is_file() else changed)}"
        if not self.uploads.get(name):
            shutil.rmtree(folder, ignore_errors=True)
            mark = {"run": self.run_id, "time": time.time(), "files": self.snapshot(stage, place, folder)}
            save_json(folder / MARK, mark)
            self.uploads[name] = None
            self.store.put(folder, name)
            self.uploads[name] = mark
            shutil.rmtree(folder)
        self.synced.add((stage, place, changed))
        self.delete_superseded(stage, place, name)

    def snapshot(self, stage: str, place: str, folder: Path) -> dict[str, str]:
        """Links (or copies) in `folder` of what belongs to an upload; returns {path: SHA-256}. Refuses damage."""
        source, state = self.run.path / stage, self.run.path / stage / "state"
        if place == "finished":
            tops = [path for path in source.iterdir() if path != state and not path.name.startswith(".")]
            paths = [path for top in tops for path in (top, *top.rglob("*"))]
        else:  # with what lies beside a chat stage's checkpoint
            paths = [*(state / place).rglob("*"), *state.glob("*.json"), *source.glob("samples.jsonl")]
        files = [path.relative_to(self.run.path) for path in paths if not path.is_dir()]
        for file in files:
            path = self.run.path / file
            if path.is_symlink():
                raise InputError(f"{path} is a link: put the file itself there")
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            appended = path.suffix == ".jsonl" or path.parent == state
            (shutil.copy if appended else link)(path, folder / file)
        if place != "finished":
            (state / place).stat()  # else the list may lack files
            if reason := damage(folder / stage / "state" / place):
                raise InputError(reason)
        return {file.as_posix(): sha256(folder / file) for file in files}

    def delete_superseded(self, stage: str, place: str, name: str) -> None:
        """Delete the other uploads of `stage`, but not whole ones of checkpoints that the run folder keeps."""
        checkpoints = complete_checkpoints(self.run.path / stage / "state") if place != "finished" else []
        places = {path.name for path in checkpoints} - {place}
        for other in list(self.uploads):
            its_stage, its_place = NAME.fullmatch(other).groups()
            if its_stage == stage and other != name and not (self.uploads[other] and its_place in places):
                try:
                    self.store.delete(other)
                    del self.uploads[other]
                except Exception as error:  # tried again after the next upload
                    print(f"warning: {self.url}: the old {other} could not be deleted: {reason_of(error)}")

    def close(self, limit: float | None = None) -> str | None:
        """Wait, at most `limit` seconds, until all is uploaded. Returns: what is missing and why, or None."""
        self.closing.set()
        self.thread.join(limit)
        self.release()
        try:
            due = self.next_due()
        except InputError as error:  # a damaged metrics.json: what ended the job must stay visible
            return f"{self.url} is behind: {error}"
        if due:
            reason = self.error or "there was no time for it"
            return f"{self.url} is behind: it lacks {due[0]}, {due[1]} ({reason}); run the same command again to sync"
        shutil.rmtree(self.work, ignore_errors=True)
        return None


def host_name() -> str:
    """This machine or container: process numbers mean the same wherever it is equal."""
    space = os.readlink("/proc/self/ns/pid") if os.path.exists("/proc/self/ns/pid") else ""
    return f"{socket.gethostname()} {space}".strip()


def is_dead(owner: str) -> bool:
    """Whether `owner` was a process of this machine that has ended."""
    parts = re.fullmatch(r"process (\d{1,9}) on (.*)", owner)
    return bool(parts) and parts[2] == host_name() and not psutil.pid_exists(int(parts[1]))


def refuse_local_disks(run: Run) -> None:
    """Raise InputError, on every rank, if the nodes do not share the run folder: one process uploads every rank's."""
    if get_dist_info()[1] == 1:
        return
    path = run.path / f".sync-{broadcast_from_main(uuid.uuid4().hex)}"
    if partial_state().is_main_process:
        path.touch()
    broadcast_from_main(None)  # the others look after it is there
    shared = all(gather_object([path.exists()]))
    if partial_state().is_main_process:
        path.unlink()
    if not shared:
        raise InputError(f"--sync needs a disk that all nodes share, and {run.path} is on one node's own: move it")


@contextmanager
def syncing(url: str | None, run: Run) -> Iterator[None]:
    """Fetch from `url`, and keep it up to date inside; nothing without a URL. Every rank calls this.

    Raises InputError if the URL cannot be used, and at the end if it is behind.
    """
    if not url:
        yield
        return
    partial_state()
    refuse_local_disks(run)
    sync = None
    with main_process_first(f"fetching {url}") as main:
        if main:
            sync = Sync(url, run)
            sync.claim()
            try:
                sync.fetch()
            except BaseException:
                sync.release()
                raise
            sync.thread.start()
    try:
        yield
    except BaseException as error:
        stopped = isinstance(error, SystemExit | KeyboardInterrupt)
        if sync and (behind := sync.close(AFTER_SIGNAL if stopped else None)):
            print(f"warning: {behind}", flush=True)
        raise
    if sync and (behind := sync.close()):
        raise InputError(behind)
