"""`--sync URL`: checkpoints and finished stages of a run, kept where another machine can resume the run.

    with run.lock(), syncing("s3://bucket/d24", run):     # or gs://, file://, memory://, hf://owner/name
        run_stages(run, stages, configs)

On entry what the URL has beyond the run folder is downloaded. Inside, a thread uploads each finished stage and the
newest checkpoint, one at a time, and retries what fails; training does not wait. Each upload has a folder of its own,
`<stage>--<checkpoint or finished>--<fingerprint>`, in which sync.json with the checksums is written last: a folder
without it counts as absent. Older checkpoints are deleted there as in the run folder. One machine at a time.
"""

import json
import os
import re
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

from accelerate.utils import gather_object
from fsspec.core import url_to_fs

from .distributed import broadcast_from_main, get_dist_info, main_process_first, partial_state
from .errors import InputError
from .hub.push import friendly_hub_errors, link, log_in
from .run import STAGES, Run, fingerprint, load_json, save_json, writing
from .train.checkpoint import MANIFEST, MEASURED, complete_checkpoints, sha256

SYNCED = (*(stage for stage in STAGES if stage != "report"), "dpo")
NAME = re.compile(r"(\w+)--(finished|step_\d+(?:\.\d+)?|checkpoint-\d+)--[0-9a-f]{16}")
MARK = "sync.json"  # {"time": seconds, "files": {path below the run folder: its SHA-256}}
POLL = 1.0  # seconds between looks at the run folder
PAUSES = (1, 2, 4, 8)  # seconds before the same transfer is tried again
LONGEST_PAUSE = 60
AFTER_SIGNAL = 25  # seconds for uploads after SIGTERM; cloud providers give 30 in all


class FileStore:
    """Uploads below a URL of any file system that fsspec supports."""

    def __init__(self, url: str):
        try:
            self.fs, self.root = url_to_fs(url, use_listings_cache=False)
        except (ImportError, ValueError) as error:  # no such protocol, or its package is not installed
            raise InputError(f"--sync {url}: {str(error).splitlines()[0]}") from None

    def marks(self, work: Path) -> dict[str, bytes | None]:
        """{name: content of sync.json or None} of all uploads, half ones included; `work` is a folder for files."""
        try:
            entries = self.fs.ls(self.root, detail=False)
        except FileNotFoundError:
            return {}
        names = [PurePosixPath(entry).name for entry in entries]
        return {name: self.read_mark(name) for name in names if NAME.fullmatch(name)}

    def read_mark(self, name: str) -> bytes | None:
        try:
            return self.fs.cat_file(f"{self.root}/{name}/{MARK}")
        except FileNotFoundError:
            return None

    def put(self, folder: Path, name: str) -> None:
        files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        targets = [f"{self.root}/{name}/{file}" for file in files]
        for parent in sorted({str(PurePosixPath(target).parent) for target in targets}):
            self.fs.makedirs(parent, exist_ok=True)
        pairs = [(str(folder / file), target) for file, target in zip(files, targets) if file != MARK]
        self.fs.put(*map(list, zip(*pairs)))
        self.fs.pipe_file(f"{self.root}/{name}/{MARK}", (folder / MARK).read_bytes())

    def get(self, name: str, files: list[str], folder: Path) -> None:
        for file in files:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
        self.fs.get([f"{self.root}/{name}/{file}" for file in files], [str(folder / file) for file in files])

    def unmark(self, name: str) -> None:
        if self.fs.exists(f"{self.root}/{name}/{MARK}"):
            self.fs.rm_file(f"{self.root}/{name}/{MARK}")

    def delete(self, name: str) -> None:
        self.unmark(name)  # first: an interruption must not leave half an upload that counts as whole
        self.fs.rm(f"{self.root}/{name}", recursive=True)


class HubStore:
    """Uploads as folders of a private model repository, one commit each."""

    def __init__(self, url: str):
        self.repo, self.api = url.removeprefix("hf://"), log_in()
        with friendly_hub_errors(self.repo):
            self.api.create_repo(self.repo, private=True, exist_ok=True)

    def marks(self, work: Path) -> dict[str, bytes | None]:
        names = {file.split("/")[0] for file in self.api.list_repo_files(self.repo)}
        self.api.snapshot_download(self.repo, local_dir=work, allow_patterns=f"*/{MARK}")
        paths = {name: work / name / MARK for name in names if NAME.fullmatch(name)}
        return {name: path.read_bytes() if path.exists() else None for name, path in paths.items()}

    def put(self, folder: Path, name: str) -> None:
        message = f"Upload {name.rpartition('--')[0]}"
        self.api.upload_folder(repo_id=self.repo, folder_path=folder, path_in_repo=name, commit_message=message)

    def get(self, name: str, files: list[str], folder: Path) -> None:
        self.api.snapshot_download(self.repo, local_dir=folder.parent, allow_patterns=f"{name}/*")

    def unmark(self, name: str) -> None:
        self.api.delete_files(self.repo, [f"{name}/{MARK}"])

    def delete(self, name: str) -> None:
        self.api.delete_files(self.repo, [f"{name}/*"])


def progress_of(name: str, seconds: float = 0) -> tuple:
    """Sorts the uploads of a stage: checkpoints by step, a finished stage after them, equal ones by time."""
    place = NAME.fullmatch(name)[2]
    return place == "finished", [int(number) for number in re.findall(r"\d+", place)], seconds


def parse_mark(data: bytes | None, name: str) -> dict | None:
    """The content of sync.json, or None if it is absent, cut off or names files that are not the stage's."""
    try:
        mark = json.loads(data or b"")
        for file, checksum in mark["files"].items():
            parts = PurePosixPath(file).parts
            if parts[0] != NAME.fullmatch(name)[1] or len(parts) < 2 or ".." in parts or not isinstance(checksum, str):
                return None
        return mark if isinstance(mark["time"], float) and mark["files"] else None
    except (ValueError, LookupError, TypeError, AttributeError):
        return None


class Sync:
    """Keeps `url` up to date with a run folder, on the main process; see the module's text."""

    def __init__(self, url: str, run: Run, log: Callable[[str], None] = print):
        self.url, self.run, self.log = url, run, log
        self.store = (HubStore if url.startswith("hf://") else FileStore)(url)
        self.work = run.path / ".sync"
        self.uploads: dict[str, dict | None] = {}  # name of an upload -> its sync.json, None for a half one
        self.synced: set[tuple] = set()  # (stage, checkpoint, time of change) of what needs no upload any more
        self.error = ""  # of the last upload, if it failed
        self.closing = threading.Event()
        self.thread = threading.Thread(target=self.keep_up, daemon=True)

    # --- from the URL into the run folder

    def fetch(self) -> None:
        """Download, per stage, what is further than the run folder, the newest undamaged upload.

        Raises InputError if the URL cannot be read, or holds another run.
        """
        with writing(self.work):
            shutil.rmtree(self.work, ignore_errors=True)
            self.work.mkdir(parents=True)
        marks = self.repeated(self.store.marks, self.work / "marks")
        self.uploads = {name: parse_mark(data, name) for name, data in marks.items()}
        for stage in SYNCED:
            checkpoints = complete_checkpoints(self.run.path / stage / "state")
            local = progress_of(f"{stage}--{checkpoints[-1].name}--{'0' * 16}")[:2] if checkpoints else (False, [])
            whole = {name: mark for name, mark in self.uploads.items() if mark and name.startswith(f"{stage}--")}
            names = sorted(whole, key=lambda name: progress_of(name, whole[name]["time"]), reverse=True)
            if finished(self.run, stage):
                self.refuse_another_run(stage, names)
                local = (True, [])
            for name in names:
                if progress_of(name)[:2] <= local or self.download(name, whole[name]["files"]):
                    break

    def refuse_another_run(self, stage: str, names: list[str]) -> None:
        path = self.run.path / stage / "metrics.json"
        other = [self.uploads[name]["files"].get(f"{stage}/metrics.json") for name in names if progress_of(name)[0]]
        if other and stage != "eval" and other[0] != sha256(path):  # evaluations run again when tasks change
            raise InputError(
                f"{self.url} holds another run than {self.run.path}: their {stage} differs. Give another URL, or an "
                "empty run folder to continue the run of that URL"
            )

    def download(self, name: str, files: dict[str, str]) -> bool:
        """Take over an upload if its checksums are right, else set it aside; returns whether they were."""
        stage, place = NAME.fullmatch(name).groups()
        folder = self.work / name
        with suppress(FileNotFoundError):  # named below
            self.repeated(self.store.get, name, list(files), folder)
        bad = [file for file, checksum in files.items() if not right(folder / file, checksum)]
        if bad:
            self.log(
                f"{self.url}: {bad[0]} of {stage}, {place} is missing or damaged; set aside, using the one before"
            )
            self.repeated(self.store.unmark, name)
            self.uploads[name] = None
            return False
        last = Path(stage, "metrics.json") if place == "finished" else Path(stage, "state", place)
        with writing(self.run.path):
            for file in files:
                if file != last.as_posix() and not Path(file).is_relative_to(last):
                    (self.run.path / file).parent.mkdir(parents=True, exist_ok=True)
                    os.replace(folder / file, self.run.path / file)
            (self.run.path / last).parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(self.run.path / last, ignore_errors=True)  # a chat stage's half checkpoint
            os.replace(folder / last, self.run.path / last)
        self.synced.add(key_of(self.run, stage, place))
        self.log(f"{self.url}: took {stage}, {place}")
        return True

    def repeated(self, action: Callable, *args):
        """action(*args), tried again with pauses. Raises InputError when it keeps failing."""
        for pause in (*PAUSES, None):
            try:
                return action(*args)
            except FileNotFoundError:
                raise
            except Exception as error:  # each file system has its own
                if pause is None:
                    raise InputError(f"--sync {self.url}: {one_line(error)}") from None
                time.sleep(pause)

    # --- from the run folder to the URL

    def keep_up(self) -> None:
        """The thread: upload what is due, until `close`; then until nothing is left or it keeps failing."""
        failures, was_closing = 0, False
        while True:
            closing, due = self.closing.is_set(), None
            failures = 0 if closing and not was_closing else failures
            was_closing = closing
            try:
                due = self.next_due()
                if due:
                    self.upload(*due)
                failures, self.error = 0, ""
            except Exception as error:  # of any kind, also a checkpoint that a newer one replaced meanwhile
                failures, self.error = failures + 1, one_line(error)
                if failures == len(PAUSES) and not closing:
                    self.log(f"warning: {self.url} is behind: {self.error}; training continues, retrying")
            if closing and (failures > len(PAUSES) or not (due or failures)):
                return
            if failures:
                pause = min(PAUSES[0] * 2 ** (failures - 1), LONGEST_PAUSE)
                time.sleep(pause) if closing else self.closing.wait(pause)
            elif not due:
                self.closing.wait(POLL)

    def next_due(self) -> tuple[str, str, tuple] | None:
        """(stage, checkpoint or "finished", key) of what to upload next; finished stages first, in order."""
        newest = None
        for stage in SYNCED:
            key = key_of(self.run, stage, "finished")
            if key in self.synced:
                continue
            if finished(self.run, stage):
                return stage, "finished", key
            if checkpoints := complete_checkpoints(self.run.path / stage / "state"):
                key = key_of(self.run, stage, checkpoints[-1].name)
                newest = (stage, checkpoints[-1].name, key) if key not in self.synced else None
        return newest

    def upload(self, stage: str, place: str, key: tuple) -> None:
        """Upload a stage or checkpoint, unless it is there, and delete what it supersedes."""
        folder = self.work / "upload"
        shutil.rmtree(folder, ignore_errors=True)
        try:
            files = self.snapshot(stage, place, folder)
            settled = {file: checksum for file, checksum in files.items() if is_settled(file, stage, place)}
            name = f"{stage}--{place}--{fingerprint(settled)}"
            if not self.uploads.get(name):
                mark = {"time": time.time(), "files": files}
                save_json(folder / MARK, mark)
                self.uploads[name] = None
                self.store.put(folder, name)
                self.uploads[name] = mark
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        self.synced.add(key)
        self.delete_superseded(stage, place, name)

    def snapshot(self, stage: str, place: str, folder: Path) -> dict[str, str]:
        """Links (or copies) in `folder` of what belongs to an upload; returns {path: SHA-256}."""
        source, checkpoint = self.run.path / stage, self.run.path / stage / "state" / place
        if place == "finished":
            paths = [path for path in source.rglob("*") if not path.is_relative_to(source / "state")]
        else:
            paths = [*checkpoint.rglob("*"), *(source / "state").glob("*.json"), *source.glob("samples.jsonl")]
        stored = load_json(checkpoint / MANIFEST) or {}  # what a damaged file should be: the download compares
        files = {}
        for path in sorted(paths):
            file = path.relative_to(self.run.path)
            if path.is_symlink():
                raise InputError(f"{path} is a link: put the file itself there")
            if not path.is_file() or any(part.startswith(".") for part in file.parts):
                continue
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            if path.is_relative_to(checkpoint) or place == "finished":
                link(path, folder / file)
            else:  # later steps append to it
                shutil.copy(path, folder / file)
            inside = path.relative_to(checkpoint).as_posix() if path.is_relative_to(checkpoint) else None
            files[file.as_posix()] = stored.get(inside) or sha256(folder / file)
        return files

    def delete_superseded(self, stage: str, place: str, name: str) -> None:
        """Delete half uploads of `stage`, those before `name` of its place, and checkpoints that the run deleted."""
        kept = {path.name for path in complete_checkpoints(self.run.path / stage / "state")} - {place}
        kept = set() if place == "finished" else kept
        for other in [other for other in self.uploads if other.startswith(f"{stage}--") and other != name]:
            if not self.uploads[other] or NAME.fullmatch(other)[2] not in kept:
                try:
                    self.store.delete(other)
                    del self.uploads[other]
                except Exception as error:  # tried again after the next upload
                    self.log(f"warning: {self.url}: an old upload is not deleted: {one_line(error)}")

    def close(self, limit: float | None = None) -> str | None:
        """Wait, at most `limit` seconds, until all is uploaded. Returns: what is missing and why, or None."""
        self.closing.set()
        self.thread.join(limit)
        due = self.next_due()
        if not due:
            shutil.rmtree(self.work, ignore_errors=True)
            return None
        reason = self.error or "there was no time for it"
        return f"{self.url} is behind: {due[0]}, {due[1]} is not there ({reason}); run the same command again to sync"


def finished(run: Run, stage: str) -> bool:
    return bool((load_json(run.path / stage / "metrics.json") or {}).get("finished"))


def key_of(run: Run, stage: str, place: str) -> tuple | None:
    """What changes when the folder of a stage or checkpoint is written anew; None if it is absent."""
    path = run.path / stage / ("metrics.json" if place == "finished" else f"state/{place}")
    paths = [path] if place == "finished" else [path / MANIFEST, path / "complete", path]
    return next(((stage, place, path.stat().st_mtime_ns) for path in paths if path.exists()), None)


def is_settled(file: str, stage: str, place: str) -> bool:
    """Whether a file is never written again after its checkpoint or stage is complete."""
    return place == "finished" or (file.startswith(f"{stage}/state/{place}/") and not file.endswith(MEASURED))


def right(path: Path, checksum: str) -> bool:
    return path.is_file() and sha256(path) == checksum


def one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def refuse_local_disks(run: Run) -> None:
    """Raise InputError, on every rank, if not all nodes of a job share the run folder.

    The checkpoint of a pretraining run has a file per rank, and the main process uploads all of them.
    """
    if get_dist_info()[1] == 1:
        return
    path = run.path / f".sync-{broadcast_from_main(uuid.uuid4().hex)}"
    if partial_state().is_main_process:
        path.touch()
    broadcast_from_main(None)  # now it is there
    shared = all(gather_object([path.exists()]))
    if partial_state().is_main_process:
        path.unlink()
    if not shared:
        raise InputError(f"--sync needs a run folder that all nodes share, and {run.path} is another on each: move it")


@contextmanager
def syncing(url: str | None, run: Run) -> Iterator[None]:
    """Fetch from `url`, and keep it up to date inside; does nothing without a URL. Every rank calls this.

    Raises InputError if the URL cannot be used, and at the end if uploads are missing there.
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
            sync.fetch()
    if sync is None:
        yield
        return
    sync.thread.start()
    try:
        yield
    except BaseException as error:
        behind = sync.close(AFTER_SIGNAL if isinstance(error, SystemExit | KeyboardInterrupt) else None)
        if behind:
            sync.log(f"warning: {behind}")
        raise
    if behind := sync.close():
        raise InputError(behind)
