"""Put a trained model on the Hub, with a card that says only what was measured, and prove that it came back whole.

    python scripts/push_to_hub.py --run-dir runs/d24 --repo you/nanochat-d24 [--stage sft] [--space] [--dry-run]

What goes up: weights, configuration and the model's code, tokenizer with its chat template, the tool
loop (`custom_generate/`), metrics.json, the report with its plots, and a card whose metadata holds every result of the
evaluation. The push ends by loading the uploaded commit in a process that does not know this package and comparing
logits. Uploads are one commit: a push that was cut off leaves no half model, and the next one sends only files that
are missing. Tokens come from where huggingface_hub looks for them; a file that contains one is not uploaded.

What every upload to the Hub needs: which files, a login, a second try when it breaks off, errors in one line.

Checkpoints of a run that goes on, each on a branch of its own on the Hub: `push_every` of base.yaml.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from json import JSONDecodeError
from pathlib import Path

import torch
from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import BadRequestError, HfHubHTTPError, HTTPError
from transformers import AutoModelForCausalLM

from .. import tool_loop
from ..convert.native import renew
from ..data.tokenizer import load_tokenizer
from ..errors import InputError
from ..eval.report import MODEL_STAGES, make_report
from ..eval.weights import refuse_non_finite, replaced
from ..run import Run, nearest
from .model_card import Push, check_metadata, check_repo_id, collected, render_model_card

SPACE = Path(__file__).parents[2] / "spaces" / "chat"
TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{20,}\b")


def push(run_path: str | Path, wanted: Push, say: Callable[[str], None] = print) -> str:
    """Push a finished stage; returns the URL of the commit, or the prepared folder for a dry run.

    Raises:
        InputError: stage not finished, bad repo name, no token, no permission, other contents in the repo, a secret in
            a file, card metadata that the Hub would reject, weights that are not finite or not the stage's, network
            gone; nothing is half done in any of these cases.
    """
    run, stage, repo = Run(run_path), wanted.stage, wanted.repo
    check_repo_id(repo)
    if "/" not in repo:
        raise InputError(f"write the repo with its owner, as in you/{repo}")
    if wanted.space and not SPACE.is_dir():
        raise InputError("the Space's files are not in this installation: push from a checkout of the project")
    folder = prepare(run, wanted)
    for note in collected(run)["notes"]:
        say(f"note: {note}")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    refuse_secrets(files)
    say(f"{len(files)} files, {sum(path.stat().st_size for path in files) / 1e6:,.1f} MB, for {repo}:")
    say("\n".join(f"  {path.stat().st_size:>13,}  {path.relative_to(folder).as_posix()}" for path in files))
    if wanted.dry_run:
        say(f"dry run: nothing was sent; the files and the card are in {folder}")
        return str(folder)
    api = log_in()
    with friendly_hub_errors(repo):
        url = api.create_repo(repo, private=wanted.private, exist_ok=True)
        if wanted.revision:
            api.create_branch(repo, branch=wanted.revision, exist_ok=True)
        elif not wanted.force:
            refuse_others(api, repo, folder)
        commit = with_retries(
            say,
            api.upload_folder,
            repo_id=repo,
            folder_path=folder,
            revision=wanted.revision,
            commit_message=f"Upload {stage} of {run.path.resolve().name}",
            delete_patterns="*" if wanted.force else None,
        )
        difference = check_loaded_back(repo, commit.oid, run.folder(stage), api.token)
        say(f"loaded back in a clean process: largest difference of a logit {difference:.1e}")
        if wanted.space:
            say(f"Space: {push_space(api, wanted, say)}")
    say(f"done: {url} at {commit.oid[:10]}")
    return commit.commit_url


def prepare(run: Run, wanted: Push) -> Path:
    """Put together what is uploaded, in <run>/hub/<stage>; files are hard links where the disk allows it."""
    stage = wanted.stage
    if stage not in MODEL_STAGES:
        raise InputError(f"stage {stage!r} has no model to push; {nearest(stage, MODEL_STAGES)}")
    if not run.finished(stage):
        done = [name for name in MODEL_STAGES if run.finished(name)]
        raise InputError(f"stage {stage!r} of {run.path} is not finished; finished: {', '.join(done) or 'none'}")
    source, folder = run.folder(stage), run.path / "hub" / stage
    if not any(source.glob("*.safetensors")) or not (source / "tokenizer.json").exists():
        raise InputError(f"{source} lacks safetensors or tokenizer.json: run stage {stage!r} again")
    if replaced(run, stage):
        raise InputError(
            f"the weights in {source} are not those that its metrics.json describes: run stage {stage!r} again, or "
            "restore them"
        )
    make_report(run.path, collected(run)["hourly_rate"])
    shutil.rmtree(folder, ignore_errors=True)
    for root, patterns in ((source, (*MODEL_FILES, "metrics.json")), (run.path, ("report.md", "plots/*.png"))):
        for path in (found for pattern in patterns for found in root.glob(pattern)):
            link(path, folder / path.relative_to(root))
    if stage != "base":
        tool_loop.ship(folder)
    renew(folder)  # a folder made by an older version
    made = render_model_card(run, wanted)
    check_metadata(made.data)
    (folder / "README.md").write_text(f"{made}\n", encoding="utf-8")
    return folder


def link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copy(source, target)


def refuse_secrets(files: list[Path]) -> None:
    """Raise InputError if a file holds the token of this login, or anything that looks like a Hub token."""
    token = get_token()
    for path in files:
        if path.suffix == ".safetensors":
            continue
        data = path.read_bytes()
        if TOKEN.search(data) or (token and token.encode() in data):
            raise InputError(f"{path} contains a Hub token: remove it; if it was ever shared, make a new token")


def refuse_others(api: HfApi, repo: str, folder: Path) -> None:
    """Raise InputError if the repo holds a file that is not ours or differs from ours."""
    found = api.verify_repo_checksums(repo, local_dir=folder)
    others = {*found.missing_paths, *(mismatch["path"] for mismatch in found.mismatches)} - {".gitattributes"}
    if others:
        advice = "push to a branch with --revision NAME, or replace all of it with --force"
        raise InputError(f"{repo} holds another {min(others)} already: {advice}")


LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
name, revision, text, out = sys.argv[1:]
which = dict(revision=revision, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(name, **which)
model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, **which).eval()
assert "nanochat_hf" not in sys.modules, "the artifact must not need the package"
ids = tokenizer(text, return_tensors="pt").input_ids
with torch.no_grad():
    torch.save({"ids": ids, "logits": model(ids).logits}, out)
"""
PROBE = "The sky is blue because 12 * 34 is 408, and that is all there is to say."


def check_loaded_back(repo: str, revision: str, local: Path, token: str) -> float:
    """Load `repo` at `revision` in a clean process with an empty cache; returns the largest difference of a logit.

    Raises InputError if it does not load, or if ids or logits differ from the local folder's (by more than 1e-3).
    """
    with tempfile.TemporaryDirectory() as place:
        env = os.environ | {"HF_TOKEN": token, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "0"}
        env |= {"HF_HUB_CACHE": f"{place}/hub", "HF_MODULES_CACHE": f"{place}/modules", "PYTHONPATH": ""}
        words = [sys.executable, "-c", LOAD, repo, revision, PROBE, f"{place}/out.pt"]
        done = subprocess.run(words, cwd=place, env=env, check=False, capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise InputError(f"{repo} is uploaded but does not load in a clean process: {last}")
        found = torch.load(f"{place}/out.pt")
    ids = load_tokenizer(local)(PROBE, return_tensors="pt").input_ids
    model = AutoModelForCausalLM.from_pretrained(local, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model(ids).logits
    if not torch.equal(ids, found["ids"]):
        raise InputError(f"{repo} is uploaded but its tokenizer gives other ids than {local}")
    difference = (expected - found["logits"]).abs().max().item()
    if difference > 1e-3:
        raise InputError(f"{repo} is uploaded but its logits differ from those of {local} by {difference:.2g}")
    return difference


def push_space(api: HfApi, wanted: Push, say: Callable[[str], None]) -> str:
    """Create the Gradio Space `<repo>-chat` that talks to the model; returns its URL."""
    name = f"{wanted.repo}-chat"
    api.create_repo(name, repo_type="space", space_sdk="gradio", private=wanted.private, exist_ok=True)
    api.add_space_variable(name, "MODEL_ID", wanted.repo)
    files = [
        CommitOperationAdd(file, (SPACE / file).read_bytes().replace(b"you/nanochat-d24", wanted.repo.encode()))
        for file in ("app.py", "README.md", "requirements.txt")
    ]
    what = {"repo_id": name, "repo_type": "space", "operations": files, "commit_message": f"Chat with {wanted.repo}"}
    with_retries(say, api.create_commit, **what)
    if wanted.private:
        say(f"the model is private: give the Space a read token as the secret HF_TOKEN, in the settings of {name}")
    return f"{api.endpoint}/spaces/{name}"


MODEL_FILES = ("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json")
MODEL_FILES += ("*_nanochat.py",)
MODEL_FILES += ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")


def log_in() -> HfApi:
    if (token := get_token()) is None:
        raise InputError("there is no Hub token: log in with `hf auth login`, or set HF_TOKEN")
    return HfApi(token=token)


@contextmanager
def friendly_hub_errors(repo: str):
    """Turn the client's errors into one line that says what to do."""
    try:
        yield
    except HfHubHTTPError as error:
        status = error.response.status_code
        advice = {
            401: "the Hub does not accept the token: log in again with `hf auth login`",
            403: f"the token may not write to {repo}: use one with write access, or another owner",
            404: f"{repo} is not there, or the token may not see it",
            429: "the Hub asks to slow down: run the same command again in a few minutes; uploaded files are kept",
        }
        other = f"the Hub answered {status}: {error.server_message or 'no reason given'}; run the same command again"
        raise InputError(advice.get(status, other)) from None
    except (HTTPError, OSError, JSONDecodeError) as error:  # httpx, hf_xet (which sends the weights), a proxy's page
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"the push broke off ({reason}): run the same command again, what is up stays up") from None
    except ValueError as error:  # before it sends a file, huggingface_hub lets the Hub check the card
        if not isinstance(error.__cause__, BadRequestError):
            raise
        reason = f"{error} {error.__cause__.server_message}"
        raise InputError(f"the Hub rejects the card: {' '.join(reason.split())[:300]}") from None


def with_retries(say: Callable[[str], None], send: Callable, **what):
    """send(**what); after a broken connection or a server's error wait and do it again, which resumes an upload.

    huggingface_hub does so by itself for every request but the last one, the commit.
    """
    for pause in (1, 2, 4, None):
        try:
            return send(**what)
        except (HTTPError, OSError) as error:
            status = error.response.status_code if isinstance(error, HfHubHTTPError) else 500
            if pause is None or (status < 500 and status != 429):
                raise
            say(f"interrupted ({type(error).__name__}); trying again, what is up stays up")
            time.sleep(pause)


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
    with friendly_hub_errors(repo):
        api.create_repo(repo, private=True, exist_ok=True)
    thread, uploads = ThreadPoolExecutor(1), []

    def upload(copy: str, step: int) -> None:
        branch = f"step-{step:06d}"
        where = {"repo_id": repo, "revision": branch, "folder_path": copy, "allow_patterns": MODEL_FILES}
        try:
            refuse_non_finite(copy)
            with friendly_hub_errors(repo):
                api.create_branch(repo, branch=branch, exist_ok=True)
                with_retries(say, api.upload_folder, **where, commit_message=f"Step {step}")
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
