"""Put a trained model on the Hub, with a card that says only what was measured, and prove that it came back whole.

    python scripts/push_to_hub.py --run-dir runs/d24 --repo you/nanochat-d24 [--stage sft] [--space] [--dry-run]

What goes up: weights, configuration and the two model files, tokenizer with its chat template, the tool
loop (`custom_generate/`), metrics.json, the report with its plots, and a card whose metadata holds every result of the
evaluation. The push ends by loading the uploaded commit in a process that does not know this package and comparing
logits. Uploads are one commit: a push that was cut off leaves no half model, and the next one sends only files that
are missing. Tokens come from where huggingface_hub looks for them; a file that contains one is not uploaded.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import get_session, hf_raise_for_status, validate_repo_id
from huggingface_hub.utils.sha import git_hash, sha_fileobj
from transformers import AutoModelForCausalLM

from .. import tool_loop
from ..data.tokenizer import load_tokenizer
from ..errors import InputError
from ..eval.report import MODEL_STAGES, make_report
from ..run import Run, load_json, nearest
from .card import Facts, card, check_metadata

PACKAGE = Path(__file__).parents[1]
SPACE_FILES = ("app.py", "README.md", "requirements.txt")
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")
CODE = ("config.json", "generation_config.json", "configuration_*.py", "modeling_*.py")
FACTS = ("metrics.json",)
TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{20,}\b")


@dataclass
class Push:
    """What to push where; the fields are the command line's."""

    repo: str
    stage: str = "sft"
    private: bool = False
    space: bool = False
    dry_run: bool = False
    revision: str | None = None
    force: bool = False
    license: str = "mit"
    language: tuple[str, ...] = ("en",)
    base_model: str | None = None


def push(run_path: str | Path, wanted: Push, say: Callable[[str], None] = print) -> str:
    """Push a finished stage; returns the URL of the commit, or the prepared folder for a dry run.

    Raises:
        InputError: stage not finished, bad repo name, no token, no permission, other contents in the repo, a secret in
            a file, card metadata that the Hub would reject, network gone; nothing is half done in any of these cases.
    """
    run = Run(run_path)
    try:
        validate_repo_id(wanted.repo)
    except HFValidationError as error:
        raise InputError(f"{wanted.repo!r} is no repo name: {error}") from None
    if "/" not in wanted.repo:
        raise InputError(f"write the repo with its owner, as in you/{wanted.repo}")
    token = get_token()
    folder = prepare(run, wanted)
    refuse_secrets(folder, token)
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files_of(folder)}
    listing = "\n".join(f"  {size:>13,}  {name}" for name, size in sizes.items())
    say(f"{len(sizes)} files, {sum(sizes.values()) / 1e6:,.1f} MB, for {wanted.repo}:\n{listing}")
    if wanted.dry_run:
        say(f"dry run: nothing was sent; the files and the card are in {folder}")
        return str(folder)
    if token is None:
        raise InputError("there is no Hub token: log in with `hf auth login`, or set HF_TOKEN")
    api = HfApi(token=token)
    with readable(wanted.repo):
        created = api.create_repo(wanted.repo, private=wanted.private, exist_ok=True)
        if wanted.revision:
            api.create_branch(wanted.repo, branch=wanted.revision, exist_ok=True)
        elif not wanted.force:
            refuse_others(api, wanted.repo, folder)
        validate_on_hub(api, folder)
        message = f"Upload {wanted.stage} of {run.path.resolve().name}"
        commit = patiently(
            lambda: api.upload_folder(
                repo_id=wanted.repo,
                folder_path=folder,
                revision=wanted.revision,
                commit_message=message,
                delete_patterns="*" if wanted.force else None,
            ),
            say,
        )
        difference = check_loaded_back(wanted.repo, commit.oid, run.folder(wanted.stage), token)
        say(f"loaded back in a clean process: largest difference of a logit {difference:.1e}")
        if wanted.space:
            say(f"Space: {push_space(api, wanted, say)}")
    say(f"done: {created.url if hasattr(created, 'url') else created} at {commit.oid[:10]}")
    return commit.commit_url


# ---- the folder --------------------------------------------------------------------------------------------------


def prepare(run: Run, wanted: Push) -> Path:
    """Put together what is uploaded, in <run>/hub/<stage>; files are hard links where the disk allows it."""
    stage, source = wanted.stage, run.folder(wanted.stage)
    if stage not in MODEL_STAGES:
        raise InputError(f"stage {stage!r} has no model to push; {nearest(stage, MODEL_STAGES)}")
    if not run.finished(stage):
        done = [name for name in MODEL_STAGES if run.finished(name)]
        raise InputError(f"stage {stage!r} of {run.path} is not finished; finished: {', '.join(done) or 'none'}")
    folder = run.path / "hub" / stage
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    make_report(run.path, hourly_rate=(load_json(run.path / "report.json") or {}).get("hourly_rate"))
    for pattern in (*WEIGHTS, *TOKENIZER, *CODE, *FACTS):
        for path in sorted(source.glob(pattern)):
            link(path, folder / path.name)
    if not any(folder.glob("*.safetensors")) or not (folder / "tokenizer.json").exists():
        raise InputError(
            f"{source} is no complete checkpoint (safetensors and tokenizer.json): run stage {stage!r} again"
        )
    link(run.path / "report.md", folder / "report.md")
    for path in sorted((run.path / "plots").glob("*.png")):
        (folder / "plots").mkdir(exist_ok=True)
        link(path, folder / "plots" / path.name)
    if stage != "base":
        tool_loop.ship(folder)
    made = card(run, wanted.stage, wanted.repo, Facts(wanted.license, wanted.language, wanted.base_model))
    check_metadata(made.data)
    (folder / "README.md").write_text(str(made), encoding="utf-8")
    return folder


def link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy(source, target)


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def refuse_secrets(folder: Path, token: str | None) -> None:
    """Raise InputError if a file that would be uploaded holds this token, or anything that looks like a Hub token."""
    for path in files_of(folder):
        if path.suffix == ".safetensors":
            continue
        data = path.read_bytes()
        if TOKEN.search(data) or (token and token.encode() in data):
            raise InputError(
                f"{path} contains a Hub token: remove it there, and make a new token if it was ever shared"
            )


# ---- the Hub -----------------------------------------------------------------------------------------------------


@contextmanager
def readable(repo: str):
    """Turn the client's HTTP errors into one line that says what to do."""
    network_error = next(base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")
    try:
        yield
    except HfHubHTTPError as error:
        status = error.response.status_code
        advice = {
            401: "the Hub does not accept the token: log in again with `hf auth login`",
            403: f"the token may not write to {repo}: use one with write access, or another owner",
            404: f"{repo} is not there, or the token may not see it",
            429: "the Hub asks to slow down: run the same command again in a few minutes; uploaded files are kept",
        }.get(
            status,
            f"the Hub answered {status}: {error.server_message or 'no reason given'}; run the same command again",
        )
        raise InputError(advice) from None
    except (network_error, ConnectionError, TimeoutError) as error:
        raise InputError(
            f"the Hub cannot be reached ({' '.join(str(error).split())[:200]}): run the same command again, "
            "files that are up are kept"
        ) from None


def patiently(action: Callable, say: Callable[[str], None], attempts: int = 4, pause: float = 1.0):
    """Do `action`; on a broken connection or a server error wait and do it again, which resumes an upload."""
    network_error = next(base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")
    for attempt in range(attempts):
        try:
            return action()
        except (network_error, OSError) as error:
            status = getattr(getattr(error, "response", None), "status_code", None)
            hopeless = status is not None and status < 500 and status != 429
            if hopeless or attempt + 1 == attempts:
                raise
            say(f"interrupted ({status or type(error).__name__}); trying again, what is up stays up")
            time.sleep(pause * 2**attempt)


def refuse_others(api: HfApi, repo: str, folder: Path) -> None:
    """Raise InputError if the repo holds a file that is not ours or differs from ours."""
    try:
        there = [entry for entry in api.list_repo_tree(repo, recursive=True) if hasattr(entry, "blob_id")]
    except (RepositoryNotFoundError, RevisionNotFoundError):
        return
    for entry in there:
        ours = folder / entry.path
        if entry.path == ".gitattributes":
            continue
        if not ours.is_file() or not same(entry, ours):
            raise InputError(
                f"{repo} holds another {entry.path} already: push to a branch with --revision NAME, or replace all "
                "of it with --force"
            )


def same(entry, path: Path) -> bool:
    if entry.size != path.stat().st_size:
        return False
    if entry.lfs is None:
        return git_hash(path.read_bytes()) == entry.blob_id
    with path.open("rb") as file:
        return sha_fileobj(file).hex() == entry.lfs.sha256


def validate_on_hub(api: HfApi, folder: Path) -> None:
    """Ask the Hub itself about the card. (ModelCard.validate does not respect HF_ENDPOINT in every version.)"""
    body = {"repoType": "model", "content": (folder / "README.md").read_text(encoding="utf-8")}
    response = get_session().post(f"{api.endpoint}/api/validate-yaml", json=body, headers={"Accept": "text/plain"})
    if response.status_code == 400:
        raise InputError(f"the Hub rejects the card: {' '.join(response.text.split())[:300]}")
    hf_raise_for_status(response)


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


def check_loaded_back(repo: str, revision: str, local: Path, token: str | None) -> float:
    """Load `repo` at `revision` in a clean process with an empty cache; returns the largest difference of a logit.

    Raises InputError if it does not load, or if ids or logits differ from the local folder's (by more than 1e-3).
    """
    with tempfile.TemporaryDirectory() as place:
        env = {
            k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
        }
        env |= {"HF_HUB_CACHE": f"{place}/hub", "HF_MODULES_CACHE": f"{place}/modules", "CUDA_VISIBLE_DEVICES": ""}
        env |= {"HF_TOKEN": token} if token else {}
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


def checkpoint_pusher(
    repo: str, private: bool = True, say: Callable[[str], None] = print
) -> Callable[[Path, int], None]:
    """What `pretrain(..., push=)` takes: uploads a model folder to branch `step-NNNNNN`, as Pythia and SmolLM do.

    A Hub that fails must not end a training run: what goes wrong is said, and the next checkpoint is tried again.
    Raises InputError at once if there is no token or the repo cannot be made.
    """
    if (token := get_token()) is None:
        raise InputError("there is no Hub token: log in with `hf auth login`, or set HF_TOKEN")
    api = HfApi(token=token)
    with readable(repo):
        api.create_repo(repo, private=private, exist_ok=True)

    def upload(folder: Path, step: int) -> None:
        branch, files = f"step-{step:06d}", [*WEIGHTS, *TOKENIZER, *CODE]
        try:
            with readable(repo):
                api.create_branch(repo, branch=branch, exist_ok=True)
                where = {"repo_id": repo, "revision": branch, "folder_path": folder, "allow_patterns": files}
                patiently(lambda: api.upload_folder(**where, commit_message=f"Step {step}"), say)
            say(f"step {step} is on {repo} as branch {branch}")
        except InputError as error:
            say(f"warning: step {step} was not pushed: {error}")

    return upload


def push_space(api: HfApi, wanted: Push, say: Callable[[str], None]) -> str:
    """Create the Gradio Space `<repo>-chat` that talks to the model; returns its URL."""
    source, name = PACKAGE.parent / "spaces" / "chat", f"{wanted.repo}-chat"
    if not source.is_dir():
        raise InputError("the Space's files are not in this installation: push from a checkout of the project")
    api.create_repo(name, repo_type="space", space_sdk="gradio", private=wanted.private, exist_ok=True)
    api.add_space_variable(name, "MODEL_ID", wanted.repo)
    with tempfile.TemporaryDirectory() as place:
        for file in SPACE_FILES:
            shutil.copy(source / file, place)
        readme = Path(place) / "README.md"
        readme.write_text(
            readme.read_text(encoding="utf-8").replace("you/nanochat-d24", wanted.repo), encoding="utf-8"
        )
        patiently(lambda: api.upload_folder(repo_id=name, repo_type="space", folder_path=place), say)
    if wanted.private:
        say(f"the model is private: give the Space a read token as the secret HF_TOKEN, in the settings of {name}")
    return f"{api.endpoint}/spaces/{name}"
