"""The Hub: card, push, load back and all that fails, against a stand-in over real HTTP with the real client."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from contextlib import nullcontext
from hashlib import sha256
from pathlib import Path

import pytest
import torch
import yaml
from hub_standin import TOKEN
from huggingface_hub import HfApi
from old_folder import make_old
from safetensors.torch import load_file, save_file
from talker import QUESTIONS, talker, talker_folder  # noqa: F401
from test_model_folder import run_without_the_package

from nanochat_hf import cli
from nanochat_hf.data import tokenizer
from nanochat_hf.errors import InputError
from nanochat_hf.hub import push as push_module
from nanochat_hf.hub.model_card import Push
from nanochat_hf.hub.push import checkpoint_pusher, own_files, push
from nanochat_hf.run import load_json, model_fingerprint, save_json

ROOT = Path(__file__).parent.parent


@pytest.fixture
def run(talker_folder, tmp_path):  # noqa: F811
    """A run folder with a finished SFT stage, an unfinished RL stage and an evaluation."""
    folder = shutil.copytree(talker_folder, tmp_path / "run [2]*?" / "sft").parent
    mixture = [{"dataset": name, "rows": 3, "tokens": 40} for name in ("openai/gsm8k:main", "primer")]
    metrics = {"finished": True, "commit": "abc123", "started": 1.0, "wall_time_s": 120.0, "tokens": 5000}
    metrics |= {"hardware": {"device": "test machine", "num_processes": 1}, "versions": {"torch": "2"}}
    metrics["history"] = [{"step": step, "train_loss": 3.0 / step, "time": float(step)} for step in range(1, 5)]
    save_json(folder / "sft" / "metrics.json", {**metrics, "mixture": mixture})
    (folder / "rl").mkdir()
    results = {"sft": {"facts": {"value": 2 / 3, "stderr": 0.01, "n": 400, "baseline": 0.1, "higher_is_better": True}}}
    evaluation = {"finished": True, "started": 2.0, "wall_time_s": 5.0, "results": results, "models": {"sft": "sft"}}
    save_json(folder / "eval" / "metrics.json", evaluation)
    return folder


CHECK_LOADED_BACK = push_module.check_loaded_back


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """One file in the place of the plots, which test_report.py checks, and no other process, which a slow test has."""

    def plots(facts, folder):
        folder.mkdir()
        (folder / "sft-train_loss.png").write_bytes(b"PNG")
        return {"sft": ["plots/sft-train_loss.png"]}

    monkeypatch.setattr(push_module, "plots", plots)
    monkeypatch.setattr(push_module, "check_loaded_back", lambda *_: 0.0)


@pytest.fixture
def log():
    return []


def pushed(hub, name="you/small", kind="models", branch="main"):
    return hub.repos[kind, name].files(branch)[1]


def change(path, **fields):
    save_json(path, load_json(path) | fields)


def change_weights(folder, value) -> str:
    path = folder / "model.safetensors"
    values = load_file(path)
    name = min(values)
    values[name].view(-1)[0] = value
    save_file(values, path, metadata={"format": "pt"})
    return name


def test_a_push_brings_model_tokenizer_card_report_and_tools(hub, run, monkeypatch):
    checked, repos = [], hub.repos
    monkeypatch.setattr(push_module, "check_loaded_back", lambda repo, revision, *_: checked.append(revision) or 0.0)
    monkeypatch.chdir(run)
    push(".", Push("you/small", language=("en", "ko"), base_model="you/base"))
    assert checked == [repos["models", "you/small"].branches["main"]]  # that commit, whatever comes after it
    files = pushed(hub)
    code = {f"{name}_nanochat.py" for name in ("modeling", "configuration", "generation")}
    code |= {"custom_generate/generate.py", "custom_generate/tools.py"}
    texts = {"config.json", "tokenizer.json", "chat_template.jinja", "README.md", "report.md", "metrics.json"}
    assert code | texts | {"model.safetensors", "plots/sft-train_loss.png"} <= set(files)
    assert files["model.safetensors"] == (run / "sft" / "model.safetensors").read_bytes()
    assert hub.repos["models", "you/small"].messages == ["Upload sft of run [2]*?"]
    _, head, text = files["README.md"].decode().split("---\n", 2)
    data = yaml.safe_load(head)
    assert data["datasets"] == ["openai/gsm8k"] and data["language"] == ["en", "ko"]
    assert (data["license"], data["pipeline_tag"], data["library_name"]) == ("mit", "text-generation", "transformers")
    assert data["base_model"] == "you/base"
    (result,) = data["model-index"][0]["results"]
    assert result["dataset"]["name"] == "facts" and result["metrics"][0]["value"] == 0.666667
    assert "0.6667" in text and "2 min 00 s: 5,000 tokens" in text and "test machine" in text
    assert "License of the weights: mit" in text
    push(run, Push("you/small", language=("en", "ko"), base_model="you/base"))
    assert len(hub.repos["models", "you/small"].commits) == 2  # nothing new to send
    for stage in ("base", "rl"):
        shutil.copytree(run / "sft", run / stage, copy_function=os.link, dirs_exist_ok=True)
    change(run / "eval" / "metrics.json", weights={"sft": "0" * 16})
    lines, options = [], Push("you/small", dry_run=True, space=True)
    assert push(run, options, lines.append) == str(run / "hub" / "rl")  # the newest that is finished
    assert lines[0].startswith("note: the evaluation is older than the models")
    assert "and the Space you/small-chat, which talks to it" in lines


def test_files_of_other_engines_go_up_beside_the_weights_and_come_back(hub, run, tmp_path, monkeypatch):
    own = "native needs a folder of its own: nanochat export --to native"
    for engines, message in ((["native"], own), (["mlx", "vllm", "mlx"], "mlx is named twice")):
        with pytest.raises(InputError, match=message):
            push(run, Push("you/small", engines=engines))
    assert not (run / "hub").exists()
    push(run, Push("you/small", engines=["mlx", "vllm"]))
    files = pushed(hub)
    config, card = json.loads(files["config.json"]), files["README.md"].decode()
    assert config["model_file"] in files and "mlx" in yaml.safe_load(card.split("---\n")[1])["tags"]
    assert "mlx_lm.server --trust-remote-code --model you/small" in card and "vllm serve you/small" in card
    assert "model_file" not in load_json(run / "sft" / "config.json")
    cli.dispatch("export", ["--model", "you/small", "--to", "mlx", "--output", str(tmp_path / "out")])
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == files["model.safetensors"]
    assert {"generate.py", "tools.py"} == {path.name for path in (tmp_path / "out" / "custom_generate").iterdir()}
    with pytest.raises(InputError, match=r"you/none is no folder, .* downloaded from the Hub: 404") as caught:
        cli.dispatch("export", ["--model", "you/none", "--to", "mlx", "--output", str(tmp_path / "no")])
    assert "\n" not in str(caught.value) and not (tmp_path / "no").exists()


@pytest.mark.slow
def test_int8_weights_go_up_in_a_folder_that_loads_as_the_card_says(hub, run, tmp_path):
    """In a process without this package, from the Hub; the calculator answers there, too."""
    pytest.importorskip("torchao", reason="needs torchao")
    push(run, Push("you/small", engines=["int8"]))
    files = pushed(hub)
    assert len(files["int8/model.safetensors"]) < 0.45 * len(files["model.safetensors"])
    (line,) = (line for line in files["README.md"].decode().splitlines() if "int8" in line and "from_" in line)
    question, parts = next(iter(QUESTIONS.items()))
    code = f"""
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
model = {line}
assert sum(hasattr(p, "__tensor_flatten__") for p in model.parameters())
tokenizer = AutoTokenizer.from_pretrained("you/small", trust_remote_code=True)
chat = pipeline("text-generation", model=model, tokenizer=tokenizer, trust_remote_code=True)
question = [{{"role": "user", "content": {question!r}}}]
print(chat(question, max_new_tokens=120, do_sample=False)[0]["generated_text"][-1]["content"])
"""
    assert run_without_the_package(code, tmp_path, HF_HUB_OFFLINE="0") == parts[-1][1]


def test_an_old_folder_goes_up_with_todays_names_and_template_and_stays_as_it_is(hub, run, monkeypatch):
    make_old(run / "sft")
    (run / "sft" / "chat_template.jinja").write_text("{# older #}")
    monkeypatch.setattr(tokenizer, "OLD_TEMPLATES", (sha256(b"{# older #}").hexdigest()[:16],))
    before = {path.name: path.read_bytes() for path in (run / "sft").iterdir()}
    push(run, Push("you/small"))
    files = pushed(hub)
    assert json.loads(files["config.json"])["architectures"] == ["NanoChatHFForCausalLM"]
    assert files["chat_template.jinja"] == tokenizer.TEMPLATE.read_bytes()
    assert b"class NanoChatHFForCausalLM" in files["modeling_nanochat.py"] and "generation_nanochat.py" in files
    assert {path.name: path.read_bytes() for path in (run / "sft").iterdir()} == before


def test_model_code_of_others_is_refused_or_named_by_a_flag(hub, run):
    changed, extra = run / "sft" / "modeling_nanochat.py", run / "sft" / "evil_nanochat.py"
    ours = changed.read_bytes()
    for path in (changed, extra):
        path.write_bytes((path.read_bytes() if path.exists() else b"") + b"\n# changed\n")
        with pytest.raises(InputError, match=f"{path.name} is not this version's code: --model-code folder pushes it"):
            push(run, Push("you/small"))
        push(run, Push("you/small", model_code="package", force=True))
        assert pushed(hub)["modeling_nanochat.py"] == ours and extra.name not in pushed(hub)
        push(run, Push("you/small", model_code="folder", force=True))
        assert pushed(hub)[path.name] == path.read_bytes()
        changed.write_bytes(ours)
    assert set(os.listdir(run / "sft")) - set(pushed(hub)) <= {"state"}
    for file, key in (("config.json", "AutoModelForCausalLM"), ("tokenizer_config.json", "AutoTokenizer")):
        change(run / "sft" / file, auto_map={key: ["me/other--evil.M", None]})
        with pytest.raises(InputError, match=f"{file} names code of another repository, me/other--evil.M"):
            push(run, Push("you/small", model_code="package"))
        change(run / "sft" / file, auto_map={})


def test_a_folder_in_place_of_a_file_is_refused(tmp_path):
    (tmp_path / "generation_config.json").mkdir()
    with pytest.raises(InputError, match=r"generation_config\.json is no file"):
        own_files(tmp_path, ["*.json"], tmp_path)


def test_other_contents_are_refused_but_a_branch_and_force_work(hub, run):
    api = HfApi(token=TOKEN)
    api.create_repo("you/small")
    for name in (".gitattributes", "config.json"):  # the Hub makes the first
        api.upload_file(path_or_fileobj=b"other", path_in_repo=name, repo_id="you/small")
    with pytest.raises(InputError, match=r"another config.json already: .*--revision NAME.*--force"):
        push(run, Push("you/small"))
    hub.repos["models", "you/small"].branches["refs/pr/1"] = hub.repos["models", "you/small"].branches["main"]
    for branch in ("step-000100", "refs/pr/1"):
        push(run, Push("you/small", revision=branch))
    assert "model.safetensors" in pushed(hub, branch="refs/pr/1")
    assert not any("branch/refs" in str(request) for request in hub.requests)
    assert "model.safetensors" in pushed(hub, branch="step-000100")
    assert set(pushed(hub)) == {".gitattributes", "config.json"}
    api.upload_file(path_or_fileobj=b"left over", path_in_repo="old.txt", repo_id="you/small")
    push(run, Push("you/small", force=True))
    assert "model.safetensors" in pushed(hub) and "old.txt" not in pushed(hub)


def test_a_space_points_at_the_model_and_is_as_private(hub, run, capsys):
    push(run, Push("you/small", space=True, private=True))
    repo = hub.repos["spaces", "you/small-chat"]
    assert repo.variables == {"MODEL_ID": "you/small"} and repo.private and hub.repos["models", "you/small"].private
    files = pushed(hub, "you/small-chat", "spaces")
    assert set(files) == {"app.py", "head.html", "texts.yaml", "README.md", "requirements.txt"}
    assert yaml.safe_load(files["README.md"].decode().split("---\n")[1])["models"] == ["you/small"]
    assert "read token as the secret HF_TOKEN" in capsys.readouterr().out
    push(run, Push("you/open", space=True))
    assert not hub.repos["models", "you/open"].private and not hub.repos["spaces", "you/open-chat"].private


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stage": "rl"}, "'rl' of .* is not finished; finished: sft"), ({"repo": "small"}, "you/small"),
        ({"repo": "you/sm all"}, "no repo name"), ({"results": float("nan")}, "run the evaluation again"),
        ({"config": {"report_to": "hf_" + "x" * 34}}, r"metrics\.json contains a token"),
        ({"weights": None, "file": b""}, r"no model in .* that can be read: .*header"),
        ({"weights": "0" * 16}, r"are not those that its metrics\.json describes; run stage 'sft' again"),
    ],
)  # fmt: skip
def test_what_cannot_be_pushed_is_refused_before_anything_is_sent(hub, run, options, message):
    record = {name: options.pop(name) for name in ("config", "weights") if name in options}
    change(run / "sft" / "metrics.json", **record)
    if "file" in options:
        (run / "sft" / "model.safetensors").write_bytes(options.pop("file"))
    if "results" in options:
        change(run / "eval" / "metrics.json", results={"sft": {"facts": {"value": options.pop("results"), "n": 1}}})
    with pytest.raises(InputError, match=message) as error:
        push(run, Push(**{"repo": "you/small"} | options))
    assert hub.requests == [] and "\n" not in str(error.value)


SECRETS = [TOKEN, "hf_" + "x" * 34, "sk-proj-" + "a1" * 20, "ghp_" + "a1" * 18, "AKIA" + "A1" * 8, "AIza" + "a" * 35]
SECRETS += ["xoxb-" + "1" * 24, "glpat-" + "a1" * 10, "npm_" + "a1" * 18, "pypi-" + "a1" * 30]
SECRETS += ["-----BEGIN OPENSSH PRIVATE KEY-----", "wandb_v1_" + "aB3" * 15, "s3://name:secret@bucket/data"]
SECRETS += [rf"\u00{ord(TOKEN[0]):02x}{TOKEN[1:]}"]  # as JSON may have it


def test_secrets_are_known_by_their_form_and_not_shown(tmp_path, monkeypatch):
    path, login = tmp_path / "text", "of-another-form"
    for token in (None, login):
        monkeypatch.setattr(push_module, "get_token", lambda token=token: token)
        path.write_text(
            "task-related-sk-learn-with-many-words, sha 0123456789abcdef0123456789abcdef, shf_ghp_AKIA, http://a:80/b@c"
        )
        push_module.refuse_secrets([path])
        for secret in [*SECRETS, *[login] * bool(token)]:
            path.write_text(f"key={secret}")
            with pytest.raises(InputError, match="text contains a token or a private key") as error:
                push_module.refuse_secrets([path])
            assert secret not in str(error.value)


def test_a_secret_in_a_text_or_in_the_header_of_weights_is_never_sent(hub, run, log):
    path, template = run / "sft" / "model.safetensors", run / "sft" / "chat_template.jinja"
    values, text = load_file(path), template.read_text()
    template.write_text(f"{text}{{# {TOKEN} #}}")
    with pytest.raises(InputError, match=r"chat_template\.jinja contains a token"):
        push(run, Push("you/small"))
    template.write_text(text)
    save_file(values, path, metadata={"format": "pt", "note": TOKEN})
    with pytest.raises(InputError, match=r"model\.safetensors contains a token"):
        push(run, Push("you/small"))
    assert hub.requests == []
    checkpoint_pusher("you/base", log=log.append)(run / "sft", 5).result()
    assert "step 5 was not pushed" in log[-1] and "contains a token" in log[-1]


def test_links_out_of_the_run_folder_are_refused_and_those_inside_are_not(hub, run, tmp_path, log):
    (tmp_path / "of another run" / "sft").mkdir(parents=True)
    (run / "hub").symlink_to(tmp_path / "of another run")
    with pytest.raises(InputError, match="hub is a link"):
        push(run, Push("you/small"))
    assert (tmp_path / "of another run" / "sft").exists()
    (run / "hub").unlink()
    (tmp_path / "key").write_text("private")
    (run / "tokenizer").mkdir()
    (run / "sft" / "chat_template.jinja").rename(run / "tokenizer" / "chat_template.jinja")
    (run / "sft" / "chat_template.jinja").symlink_to(run / "tokenizer" / "chat_template.jinja")
    (run / "sft").rename(tmp_path / "elsewhere")  # a stage on another disk
    (run / "sft").symlink_to(tmp_path / "elsewhere")
    folder = Path(push(run, Push("you/small", dry_run=True)))
    shutil.rmtree(folder)
    folder.symlink_to(tmp_path)
    with pytest.raises(InputError, match=r"cannot write .*hub/sft: File exists"):
        push(run, Push("you/small"))
    folder.unlink()
    for target in ("nothing", "key"):
        (run / "sft" / "chat_template.jinja").unlink()
        (run / "sft" / "chat_template.jinja").symlink_to(tmp_path / target)
        with pytest.raises(InputError, match=rf"chat_template\.jinja is a link to {tmp_path}/{target}, which is no"):
            push(run, Push("you/small"))
    assert hub.requests == [] and checkpoint_pusher("you/base", log=log.append)(run / "sft", 5) is None
    assert "warning: step 5 was not pushed" in log[-1] and "is a link to" in log[-1]


def test_paths_of_this_machine_are_shortened_to_names(hub, run, monkeypatch):
    """In card, report and metrics.json: of a folder, a file with a transform, one with [] in its name, a model."""
    monkeypatch.chdir(run)
    (run / "data" / "mine").mkdir(parents=True)
    paths = ["/home/alice/texts/", "~/alice/chats.jsonl", "/home/alice/v[2]", "data/mine", "../alice/gone"]
    paths += ["file://localhost/home/alice/l", '/home/alice/"q".jsonl', r"\\alice\u"]  # the last one: of Windows
    paths += ["file:///home/alice/f", r"C:\Users\alice\d", "json:/home/alice/j", "$HOME/alice/h", "hf://you/hub"]
    mixture = [{"dataset": f"{path}:gsm8k" if "jsonl" in path else path, "rows": 3, "tokens": 4} for path in paths]
    skipped = [{"dataset": paths[2], "row": 3, "reason": "no a/b column"}]
    mixture.append({"dataset": "openai/gsm8k", "rows": 3, "tokens": 4})
    config = {"mixture": [{"dataset": path} for path in paths], "words": "/home/alice/a:b/words"}
    config["core_bundle"] = "~/alice/bundle"
    record = {"config": config, "mixture": mixture, "skipped_rows": skipped}
    change(run / "sft" / "metrics.json", **record, weights=model_fingerprint(run / "sft"))
    change(run / "eval" / "metrics.json", models={"sft": "sft", "base": "/home/alice/models/first"})
    folder = Path(push(run, Push("you/small", dry_run=True)))
    texts = {name: (folder / name).read_text() for name in ("README.md", "report.md", "metrics.json")}
    assert not any(word in text for text in texts.values() for word in ("alice", "data/mine"))
    assert hub.requests == [] and (folder / "model.safetensors").exists()  # a dry run sends nothing
    assert "base is first" in texts["README.md"] and "no a/b column" in texts["report.md"]
    sources = ["chats.jsonl", "v[2]", "mine", "gone", "l", '"q".jsonl', "u", "f", "d", "j", "h", "hf", "openai/gsm8k"]
    assert ", ".join(f"`{source}`" for source in sources) in texts["README.md"]
    metrics = load_json(folder / "metrics.json")
    assert metrics["mixture"][1]["dataset"] == "chats.jsonl:gsm8k" and metrics["config"]["words"] == "words"
    assert metrics["mixture"][-2]["dataset"] == "hf://you/hub"


def test_an_hourly_rate_that_is_no_number_is_refused(run):
    save_json(run / "report.json", {"hourly_rate": "x"})
    with pytest.raises(InputError, match=r"report\.json: .*hourly_rate.*run stage report again"):
        push(run, Push("you/small", dry_run=True))


SMALL = {"repo": "you/small"}


@pytest.mark.parametrize(
    ("fault", "options", "token", "message"),
    [
        (("POST", "repos/create", 401), SMALL, TOKEN, "hf auth login"),
        (("POST", "repos/create", 403), SMALL, TOKEN, "you/small: the token has no right"),
        (("POST", "commit", 429), SMALL, TOKEN, "run the same command again"),
        (("POST", "commit", None), SMALL, TOKEN, "run the same command again"),
        (None, {"repo": "somebody/small"}, TOKEN, "somebody/small: the token has no right"),
        (None, SMALL, "hf_wrong", "does not accept the token"),
        (None, SMALL, None, "no Hub token"),
        (None, SMALL | {"license": "mitt"}, TOKEN, 'rejects the card: .*"license" must be one of'),
    ],
)
def test_each_refusal_of_the_hub_is_one_line_of_advice(hub, run, monkeypatch, fault, options, token, message):
    if fault:
        hub.fail(*fault, times=50)
    monkeypatch.setattr(push_module, "get_token", lambda: token)
    with pytest.raises(InputError, match=message) as caught:
        push(run, Push(**options))
    assert TOKEN not in str(caught.value) and "\n" not in str(caught.value)
    assert all(not files for name in hub.repos for files in [pushed(hub, name[1])])  # a commit or nothing


@pytest.mark.slow
def test_an_interrupted_upload_is_resumed_without_sending_the_weights_again(hub, run, capsys):
    for status in (500, None, 429):
        hub.fail("POST", "/commit/", status)
    push(run, Push("you/small"))
    puts = [line for line in hub.requests if line.startswith("PUT")]
    assert len(puts) == len(set(puts)) == len(hub.blobs) and "model.safetensors" in pushed(hub)
    shown = capsys.readouterr()
    assert TOKEN not in shown.out + shown.err
    assert not [path for path in run.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]


@pytest.mark.slow
def test_push_load_back_and_the_cards_own_code_in_clean_processes(hub, run, tmp_path):
    script = [sys.executable, "scripts/push_to_hub.py", "--run-dir", str(run), "--repo", "you/small", "--private"]
    done = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "largest difference of a logit 0.0e+00" in done.stdout and TOKEN not in done.stdout + done.stderr
    assert hub.repos["models", "you/small"].private
    blocks = re.findall(r"```python\n(.*?)```", pushed(hub)["README.md"].decode(), re.S)
    env = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    outputs = [subprocess.check_output([sys.executable, "-c", c], cwd=tmp_path, env=env, text=True) for c in blocks]
    assert "'content': 'It is 408.'" in outputs[0] and outputs[1] == "It is 408.\n"
    assert "trainable params: " in outputs[2]
    hf = [str(Path(sys.executable).with_name("hf")), "download", "you/small", "--local-dir", "copy"]
    subprocess.run(hf, cwd=tmp_path, env=env, check=True, capture_output=True)
    copy = {path.relative_to(tmp_path / "copy").as_posix(): path for path in (tmp_path / "copy").rglob("*")}
    assert all(copy[name].read_bytes() == data for name, data in pushed(hub).items())
    unfinished = subprocess.run([*script, "--stage", "rl"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert unfinished.returncode == 2 and "not finished" in unfinished.stderr.splitlines()[-1]


LOCAL = {"ids": torch.tensor([[1, 2]]), "logits": torch.tensor([[2.0, -3.0]])}


@pytest.mark.parametrize("copy,message", [
    ({}, ""), ({"logits": LOCAL["logits"] + 9e-4}, ""),
    ({"logits": LOCAL["logits"] * float("nan")}, "logits differ from those of .* by nan"),
    ({"logits": LOCAL["logits"] - 2e-3}, "logits differ from those of .* by 0.002$"),
    ({"ids": torch.tensor([[1, 3]])}, "its tokenizer gives other ids than"),
    (None, "you/small does not load in a clean process: no file$"),
])  # fmt: skip
def test_a_copy_that_does_not_load_or_differs_is_noticed(tmp_path, monkeypatch, copy, message):
    def load_back(command, env, **options):
        name, revision, text, out = command[3:]
        assert (revision, text, env["HF_TOKEN"], env["PYTHONPATH"]) == ("main", push_module.PROBE, "hf_token", "")
        if name == "you/small" and copy is None:
            return subprocess.CompletedProcess(command, 1, stderr="Traceback\nno file\n")
        torch.save(LOCAL | (copy if name == "you/small" else {}), out)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(push_module.subprocess, "run", load_back)
    with pytest.raises(InputError, match=message) if message else nullcontext():
        difference = CHECK_LOADED_BACK("you/small", "main", tmp_path, "hf_token")
        assert difference == pytest.approx(9e-4 if copy else 0, rel=1e-2)


@pytest.fixture
def upload(hub, log):
    return checkpoint_pusher("you/base", log=log.append)


def test_checkpoints_become_branches_and_a_failing_hub_does_not_stop_training(hub, run, upload, log):
    upload(run / "sft", 500).result()
    files = pushed(hub, "you/base", branch="step-000500")
    assert {"model.safetensors", "tokenizer.json", "config.json"} <= set(files) and "metrics.json" not in files
    assert hub.repos["models", "you/base"].private and pushed(hub, "you/base") == {}
    hub.fail("POST", "/commit/", 503, times=50)
    upload(run / "sft", 1000).result()
    hub.faults.clear()
    assert log[-1].startswith("warning: step 1000 was not pushed") and "run the same command again" in log[-1]
    for _ in range(2):  # as where a run was interrupted after it
        upload(run / "sft", 1500).result()
        assert log[-1].startswith("step 1500 is on you/base as branch")
    assert "model.safetensors" in pushed(hub, "you/base", branch="step-001500")
    assert list(run.glob(".push-*")) == [] and hub.repos["models", "you/base"].messages == ["Step 500", "Step 1500"]
    name = change_weights(run / "sft", float("inf"))
    upload(run / "sft", 2000).result()
    assert "warning: step 2000 was not pushed" in log[-1] and f"infinity in {name}" in log[-1]
    assert "step-002000" not in hub.repos["models", "you/base"].branches


def test_a_checkpoint_is_uploaded_as_it_was_while_training_continues(hub, run, upload, log, monkeypatch):
    hold, send = threading.Event(), HfApi.upload_folder
    monkeypatch.setattr(HfApi, "upload_folder", lambda self, **what: hold.wait(60) and send(self, **what))
    config, left = run / "sft" / "config.json", run / ".push-interrupted"
    left.mkdir()
    written = config.read_bytes()
    first = upload(run / "sft", 500)
    assert not left.exists() and not first.done()
    config.write_bytes(written + b"\n")
    second = upload(run / "sft", 1000)
    assert upload(run / "sft", 1500) is None and "step 1500 was not pushed: 2 earlier ones" in log[-1]
    hold.set()
    assert first.result() is second.result() is None and len(log) == 3
    files = [pushed(hub, "you/base", branch=f"step-{step:06d}")["config.json"] for step in (500, 1000)]
    assert files == [written, written + b"\n"]


FAILURES = [(HfApi, "upload_folder", RuntimeError("refused")), (shutil, "copy", OSError(28, "refused"))]  # 28: no room


@pytest.mark.parametrize(("where", "name", "error"), FAILURES)
def test_no_other_failure_stops_training(run, upload, log, monkeypatch, where, name, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(where, name, fail)
    future = upload(run / "sft", 500)
    assert (future is None) == (where is shutil) and (future is None or future.result() is None)
    assert log[-1].startswith("warning: step 500 was not pushed") and "refused" in log[-1]
    assert list(run.glob(".push-*")) == []
