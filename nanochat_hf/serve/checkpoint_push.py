"""Checkpoints of a run that goes on, each on a branch of its own on the Hub: `push_every` of base.yaml."""

import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from ..eval.weights import refuse_non_finite
from .hub_client import MODEL_FILES, log_in, patiently, readable

COPIES = ".push-"  # how the folders that a checkpoint is uploaded from begin
MAX_UPLOADS = 2  # checkpoints that are uploaded or wait for it; each takes a model's size on the disk


def checkpoint_pusher(repo: str, say: Callable[[str], None] = print) -> Callable[[Path, int], Future | None]:
    """What `pretrain(..., push=)` takes: uploads a model folder to branch `step-NNNNNN`, as Pythia and SmolLM do.

    Training goes on meanwhile: a thread uploads a copy, which lies beside the folder, and the interpreter waits for it
    at its end. The repo is made private. A Hub that fails must not end a training run: what goes wrong is said, and
    the next checkpoint is tried again. Raises InputError at once if there is no token or the repo cannot be made.

    Returns:
        (folder, step) -> the upload as a Future, or None if this one is left out: too many are under way, or there is
            no room for its copy.
    """
    api = log_in()
    with readable(repo):
        api.create_repo(repo, private=True, exist_ok=True)
    thread, uploads = ThreadPoolExecutor(1), []

    def upload(copy: str, step: int) -> None:
        branch = f"step-{step:06d}"
        where = {"repo_id": repo, "revision": branch, "folder_path": copy, "allow_patterns": MODEL_FILES}
        try:
            refuse_non_finite(copy)
            with readable(repo):
                api.create_branch(repo, branch=branch, exist_ok=True)
                patiently(say, api.upload_folder, **where, commit_message=f"Step {step}")
            say(f"step {step} is on {repo} as branch {branch}")
        except Exception as error:  # of any kind: nobody else would hear of it in this thread
            say(f"warning: step {step} was not pushed: {error}")
        finally:
            shutil.rmtree(copy)

    def begin(folder: Path, step: int) -> Future | None:
        uploads[:] = [future for future in uploads if not future.done()]
        if len(uploads) == MAX_UPLOADS:
            say(f"warning: step {step} was not pushed: {MAX_UPLOADS} earlier ones are still under way")
            return None
        if not uploads:
            for left in folder.parent.glob(f"{COPIES}*"):  # by a run that was killed
                shutil.rmtree(left)
        copy = tempfile.mkdtemp(prefix=COPIES, dir=folder.parent)
        try:
            for file in folder.iterdir():
                if any(file.match(pattern) for pattern in MODEL_FILES):
                    shutil.copy(file, copy)
        except OSError as error:
            shutil.rmtree(copy)
            say(f"warning: step {step} was not pushed: {error}; its copy needs room for a model beside {folder}")
            return None
        uploads.append(thread.submit(upload, copy, step))
        return uploads[-1]

    return begin
