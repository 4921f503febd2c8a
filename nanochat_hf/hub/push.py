"""Puts a trained model on the Hub, with a card that says only what was measured, and checks the uploaded copy.

    nanochat push --run-dir runs/d24 --repo you/nanochat-d24 [--stage sft] [--space] [--dry-run]

An upload is one commit: an interrupted push leaves no half model, and the next one sends only what is missing. At the
end a process without this package loads the uploaded commit, and its logits are compared. What is private stays here:
a link out of the run folder and a file with a token are refused, and paths of local data are shortened to names.

`checkpoint_pusher` uploads checkpoints of a running job, each to a branch of its own: `push_every` of base.yaml.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, get_token

from .. import tool_loop
from ..config import RepoId, check_value, each_once
from ..convert.native import renew
from ..data.hub_files import hub_errors, with_retry
from ..data.tokenizer import load_tokenizer, refuse_other_model
from ..errors import InputError
from ..eval.plots import plots
from ..eval.report import markdown
from ..eval.weights import REPLACED, refuse_non_finite, replaced
from ..export import adder
from ..loading import load_model
from ..model import configuration_nanochat
from ..model.configuration_nanochat import update_class_names
from ..run import Run, load_json, project_folder, save_json, writing
from .model_card import Push, render_model_card, report_facts, without_local_paths

SPACE = project_folder("spaces", "chat")
SECRET = re.compile(  # Hugging Face, OpenAI and others, GitHub, AWS, Google, Slack, GitLab, npm, PyPI, W&B; keys, URLs
    rb"\b(hf_[A-Za-z0-9]{20,}|sk-(?=[\w-]*\d)[\w-]{20,}|gh[a-z]_\w{30,}|github_pat_\w{20,}|A[KS]IA[A-Z0-9]{16}"
    rb"|AIza[\w-]{35}|xox[a-z]-[\w-]{20,}|glpat-[\w-]{20,}|npm_\w{30,}|pypi-[\w-]{40,}|wandb_v1_\w{30,})"
    rb"|-----BEGIN [A-Z ]*PRIVATE KEY|://[^\s/:@\"]+:[^\s/@\"]+@"
)
ESCAPED = re.compile(rb"\\u00([0-7][0-9A-Fa-f])")  # an ASCII character in JSON
CODE_OF_OTHERS = re.compile(r"[\w.-]+/[\w.-]+--[\w.]+")  # such as owner/name--module.Class
CODE = {path.name: path for path in Path(configuration_nanochat.__file__).parent.glob("*_nanochat.py")}
MODEL_FILES = (
    "*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "tokenizer.json",
    "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json", *CODE,
)  # fmt: skip


def push(run_path: str | Path, options: Push, log: Callable[[str], None] = print) -> str:
    """Pushes a finished stage. Returns: the URL of the commit, or the prepared folder for a dry run.

    Raises InputError, with nothing half done: an unfinished stage, a bad repo name, no token or permission, other
    contents in the repo. Also for a secret in a file, a rejected card, weights that are not finite or not the stage's.
    """
    run, repo = Run(run_path), options.repo
    stage = run.model(options.stage).name
    options = replace(options, stage=stage)
    check_value(RepoId, repo, "repo")
    for engine in each_once(options.engines):
        adder(engine)  # refuses before anything is written
    folder = prepare(run, options)
    for note in report_facts(run)["notes"]:
        log(f"note: {note}")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    refuse_secrets(files)
    log(f"{len(files)} files, {sum(path.stat().st_size for path in files) / 1e6:,.1f} MB, for {repo}:")
    log("\n".join(f"  {path.stat().st_size:>13,}  {path.relative_to(folder).as_posix()}" for path in files))
    if options.space:
        log(f"and the Space {repo}-chat, which talks to it")
    if options.dry_run:
        log(f"dry run: nothing was sent; the files and the card are in {folder}")
        return str(folder)
    api = log_in()
    with hub_errors(repo):
        try:
            ModelCard.load(folder / "README.md").validate()
        except ValueError as error:
            raise InputError(f"the Hub rejects the card: {' '.join(str(error).split())[:300]}") from None
        url = api.create_repo(repo, private=options.private, exist_ok=True)
        if options.revision and not options.revision.startswith("refs/"):  # refs/pr/1 is there
            api.create_branch(repo, branch=options.revision, exist_ok=True)
        elif not options.revision and not options.force:
            check = api.verify_repo_checksums(repo, local_dir=folder)
            others = {*check.missing_paths, *(one["path"] for one in check.mismatches)} - {".gitattributes"}
            if others:
                advice = "push to a branch with --revision NAME, or replace all of it with --force"
                raise InputError(f"{repo} holds another {min(others)} already: {advice}")
        delete = "*" if options.force else None
        what = {"folder_path": folder, "delete_patterns": delete, "revision": options.revision}
        what["commit_message"] = f"Upload {stage} of {run.path.resolve().name}"
        commit = with_retry(partial(api.upload_folder, repo_id=repo, **what), repo, log)
        difference = check_loaded_back(repo, commit.oid, folder, api.token)
        log(f"loaded back in a clean process: largest difference of a logit {difference:.1e}")
        if options.space:
            log(f"Space: {push_space(api, options, log)}")
    log(f"done: {url} at {commit.oid[:10]}")
    return commit.commit_url


def prepare(run: Run, options: Push) -> Path:
    """Collects what is uploaded in <run>/hub/<stage>; files are hard links where the disk allows it."""
    stage = options.stage
    source, folder = run.model(stage), run.path / "hub" / stage
    if folder.parent.is_symlink():
        raise InputError(f"{folder.parent} is a link: delete it, or all that is where it points would be replaced")
    files = own_files(source, MODEL_FILES, run.path)
    if not any(path.suffix == ".safetensors" for path in files) or source / "tokenizer.json" not in files:
        raise InputError(f"{source} lacks safetensors or tokenizer.json: run stage {stage!r} again")
    model = load_model(str(source), torch.bfloat16)  # refuses damaged files, and weights that the config does not fit
    refuse_other_model(load_tokenizer(source), model.config)
    code = own_files(source, ["*_nanochat.py"], run.path)
    config = load_json(source / "config.json")
    # An older version's code is renewed.
    todays = not options.model_code and update_class_names(config) is config
    for path in code if todays else ():
        if path.name not in CODE or path.read_bytes() != CODE[path.name].read_bytes():
            advice = "--model-code folder pushes it as it is, --model-code package this version's in its place"
            raise InputError(f"{path} is not this version's code: {advice}")
    for path in files if options.model_code != "folder" else ():
        if path.match("*config.json") and (match := CODE_OF_OTHERS.search(path.read_text(encoding="utf-8"))):
            raise InputError(f"{path} names code of another repository, {match[0]}: remove it from there")
    if replaced(run, stage):
        raise InputError(f"{source}: {REPLACED}; run stage {stage!r} again, or restore them")
    facts = report_facts(run)
    shutil.rmtree(folder, ignore_errors=True)
    with writing(folder):  # also where a link or another's file is in the way: all below it is uploaded
        folder.mkdir(parents=True)
        pictures = plots(facts, folder / "plots")
    for path in files:
        link(path, folder / path.name)
    (folder / "report.md").write_text(markdown(facts, pictures), encoding="utf-8")
    save_json(folder / "metrics.json", without_local_paths(run, run.metrics(stage)))
    if stage != "base":
        tool_loop.ship(folder)
    renew(folder)  # an older version may have written it
    for path in code if options.model_code == "folder" else ():
        (folder / path.name).unlink(missing_ok=True)
        link(path, folder / path.name)
    uses = [line.format(folder=options.repo) for engine in options.engines for line in adder(engine)(folder)]
    (folder / "README.md").write_text(f"{render_model_card(run, options, uses)}\n", encoding="utf-8")
    return folder


def own_files(folder: Path, patterns: Iterable[str], run: Path) -> list[Path]:
    """The files of `folder` with these names. Raises InputError for a link to what is not in `folder` or `run`."""
    entries = folder.iterdir() if folder.exists() else ()
    paths = sorted(path for path in entries if any(path.match(pattern) for pattern in patterns))
    for path in paths:
        if path.exists() and not path.is_file():  # a folder, or a pipe, on which reading would wait
            raise InputError(f"{path} is no file: put the file itself there")
        target = Path(os.path.realpath(path))
        if not (target.exists() and any(target.is_relative_to(place.resolve()) for place in (folder, run))):
            raise InputError(f"{path} is a link to {target}, which is no file of the run: put the file itself there")
    return paths


def link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy(source, target)


def refuse_secrets(files: Iterable[Path]) -> None:
    """Raises InputError if a file, or the header of a safetensors file, holds this login's token or another secret."""
    token = (get_token() or "hf_").encode()
    for path in files:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little") if path.suffix == ".safetensors" else None
            data = file.read(length) if length else path.read_bytes()
        data = ESCAPED.sub(lambda match: bytes.fromhex(match[1].decode()), data)
        if SECRET.search(data) or (len(token) > 3 and token in data):
            raise InputError(f"{path} contains a token or a private key: remove it, and replace it if it was shared")


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


def load_in_clean_process(name: str | Path, revision: str, token: str) -> dict[str, torch.Tensor]:
    """{"ids", "logits"} of PROBE by a repo or a folder that is loaded with an empty cache and without this package."""
    with tempfile.TemporaryDirectory() as work:
        env = os.environ | {"HF_TOKEN": token, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "0", "PYTHONPATH": ""}
        env |= {"HF_HUB_CACHE": f"{work}/hub", "HF_MODULES_CACHE": f"{work}/modules"}
        command = [sys.executable, "-c", LOAD, str(name), revision, PROBE, f"{work}/out.pt"]
        process = subprocess.run(command, cwd=work, env=env, check=False, capture_output=True, text=True)
        if process.returncode:
            last = (process.stderr.strip().splitlines() or ["no message"])[-1]
            raise InputError(f"{name} does not load in a clean process: {last}")
        return torch.load(f"{work}/out.pt")


def check_loaded_back(repo: str, revision: str, local: Path, token: str) -> float:
    """Loads `repo` at `revision` as a user does; returns the largest difference of a logit, refused above 1e-3."""
    loaded, expected = (load_in_clean_process(name, revision, token) for name in (repo, local.resolve()))
    if not torch.equal(expected["ids"], loaded["ids"]):
        raise InputError(f"{repo} is uploaded but its tokenizer gives other ids than {local}")
    difference = (expected["logits"] - loaded["logits"]).abs().max().item()
    if not difference <= 1e-3:  # NaN too
        raise InputError(f"{repo} is uploaded but its logits differ from those of {local} by {difference:.2g}")
    return difference


def push_space(api: HfApi, options: Push, log: Callable[[str], None]) -> str:
    """Creates the Gradio Space `<repo>-chat` that talks to the model. Returns: its URL."""
    name = f"{options.repo}-chat"
    api.create_repo(name, repo_type="space", space_sdk="gradio", private=options.private, exist_ok=True)
    api.add_space_variable(name, "MODEL_ID", options.repo)
    files = [
        CommitOperationAdd(file, (SPACE / file).read_bytes().replace(b"you/nanochat-d24", options.repo.encode()))
        for file in ("app.py", "head.html", "texts.yaml", "README.md", "requirements.txt")
    ]
    what = {"operations": files, "commit_message": f"Chat with {options.repo}"}
    with_retry(partial(api.create_commit, repo_id=name, repo_type="space", **what), name, log)
    if options.private:
        log(f"the model is private: give the Space a read token as the secret HF_TOKEN, in the settings of {name}")
    return f"{api.endpoint}/spaces/{name}"


def log_in() -> HfApi:
    if (token := get_token()) is None:
        raise InputError("there is no Hub token: log in with `hf auth login`, or set HF_TOKEN")
    return HfApi(token=token)


COPIES = ".push-"  # prefix of the folders that checkpoints are uploaded from
MAX_UPLOADS = 2  # checkpoints that are uploaded or queued; each takes a model's size on the disk


def checkpoint_pusher(repo: str, log: Callable[[str], None] = print) -> Callable[[Path, int], Future | None]:
    """Returns what `pretrain(..., push=)` takes: it uploads a folder to branch `step-NNNNNN`, as Pythia and SmolLM do.

    A thread uploads a copy while training continues; the interpreter waits for it at its end. Errors of the Hub are
    logged, because they must not end a training run. Returns a Future, or None if the upload is left out: too many
    are under way, or its copy has no room. Raises InputError without a token or a private repo.
    """
    api = log_in()
    with hub_errors(repo):
        api.create_repo(repo, private=True, exist_ok=True)
    uploads: list[Future] = []

    def warn(step: int, reason: object) -> None:
        log(f"warning: step {step} was not pushed: {reason}")

    def upload(copy: str, step: int) -> None:
        branch = f"step-{step:06d}"
        where = {"repo_id": repo, "revision": branch, "folder_path": copy, "allow_patterns": MODEL_FILES}
        try:
            refuse_non_finite(copy)
            refuse_secrets(Path(copy).iterdir())
            with hub_errors(repo):
                api.create_branch(repo, branch=branch, exist_ok=True)
            with_retry(partial(api.upload_folder, **where, commit_message=f"Step {step}"), repo, log)
            log(f"step {step} is on {repo} as branch {branch}")
        except Exception as error:  # of any kind: a thread's error would be lost
            warn(step, error)
        finally:
            shutil.rmtree(copy)

    def enqueue(folder: Path, step: int) -> Future | None:
        uploads[:] = [future for future in uploads if not future.done()]
        if len(uploads) == MAX_UPLOADS:
            return warn(step, f"{MAX_UPLOADS} earlier ones are still under way")
        if not uploads:
            for left in folder.parent.glob(f"{COPIES}*"):  # by an interrupted run
                shutil.rmtree(left)
        copy = tempfile.mkdtemp(prefix=COPIES, dir=folder.parent)
        try:
            for file in own_files(folder, MODEL_FILES, folder.parent):
                shutil.copy(file, copy)
        except (InputError, OSError) as error:
            shutil.rmtree(copy)
            room = "" if isinstance(error, InputError) else f"; its copy needs room for a model beside {folder}"
            return warn(step, f"{error}{room}")
        uploads.append(api.run_as_future(upload, copy, step))
        return uploads[-1]

    return enqueue
