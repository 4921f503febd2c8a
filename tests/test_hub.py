"""The Hub round trip against a stand-in over real HTTP with the real client: push, load back, and all that fails."""

import json
import os
import re
import shutil
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest
import yaml
from hub_run import TOKEN, hub_run, pushed, stand_in, without_check  # noqa: F401
from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub.errors import RepositoryNotFoundError
from old_folder import make_old
from safetensors.torch import load_file, save_file
from talker import talker, talker_folder  # noqa: F401

from nanochat_hf.data import tokenizer
from nanochat_hf.errors import InputError
from nanochat_hf.hub import push as serve_hub
from nanochat_hf.hub.push import Push, push
from nanochat_hf.run import load_json, model_fingerprint, save_json

ROOT = Path(__file__).parent.parent


def test_a_push_brings_model_tokenizer_card_report_and_tools(hub, run, no_check):
    push(run, Push("you/small"))
    files = pushed(hub)
    wanted = [
        "model.safetensors",
        "config.json",
        "modeling_nanochat.py",
        "configuration_nanochat.py",
        "generation_nanochat.py",
        "tokenizer.json",
        "plots/sft.png",
    ]
    assert {
        *wanted,
        "chat_template.jinja",
        "README.md",
        "report.md",
        "metrics.json",
        "custom_generate/generate.py",
        "custom_generate/tools.py",
    } <= set(files)
    assert files["model.safetensors"] == (run / "sft" / "model.safetensors").read_bytes()
    assert hub.repos["models", "you/small"].messages == ["Upload sft of run"] and not any("state" in f for f in files)


def test_an_old_folder_goes_up_with_todays_names_and_template_and_stays_as_it_is(hub, run, no_check, monkeypatch):
    copy = shutil.copytree(run / "sft", run / "copy")  # the fixture's files are links to those of other tests
    shutil.rmtree(run / "sft")
    make_old(copy.rename(run / "sft"))
    (run / "sft" / "chat_template.jinja").write_text("{# older #}")
    monkeypatch.setattr(tokenizer, "OLD_TEMPLATES", (sha256(b"{# older #}").hexdigest()[:16],))
    before = {path.name: path.read_bytes() for path in (run / "sft").iterdir()}
    push(run, Push("you/small"))
    files = pushed(hub)
    assert json.loads(files["config.json"])["architectures"] == ["NanoChatHFForCausalLM"]
    assert files["chat_template.jinja"] == tokenizer.TEMPLATE.read_bytes()
    assert b"class NanoChatHFForCausalLM" in files["modeling_nanochat.py"] and "generation_nanochat.py" in files
    assert {path.name: path.read_bytes() for path in (run / "sft").iterdir()} == before


def test_the_cards_metadata_holds_every_result_and_parses(hub, run, no_check):
    push(run, Push("you/small", language=("en", "ko"), base_model="you/base"))
    _, head, text = pushed(hub)["README.md"].decode().split("---\n", 2)
    data = yaml.safe_load(head)
    assert (
        data["datasets"] == ["openai/gsm8k"] and data["language"] == ["en", "ko"] and data["base_model"] == "you/base"
    )
    assert (data["license"], data["pipeline_tag"], data["library_name"]) == ("mit", "text-generation", "transformers")
    (result,) = data["model-index"][0]["results"]
    assert result["dataset"]["name"] == "facts" and result["metrics"][0]["value"] == 0.91
    assert "0.9100" in text and "5,000 tokens, 2 min 00 s" in text and "test machine" in text


def test_pushing_the_same_again_sends_nothing_new(hub, run, no_check):
    push(run, Push("you/small"))
    commits = len(hub.repos["models", "you/small"].commits)
    push(run, Push("you/small"))
    assert len(hub.repos["models", "you/small"].commits) == commits


def test_other_contents_are_refused_but_a_branch_and_force_work(hub, run, no_check):
    api = HfApi(token=TOKEN)
    api.create_repo("you/small")
    api.upload_file(path_or_fileobj=b"other", path_in_repo="config.json", repo_id="you/small")
    with pytest.raises(InputError, match=r"another config.json already: .*--revision NAME.*--force"):
        push(run, Push("you/small"))
    push(run, Push("you/small", revision="step-000100"))
    assert "model.safetensors" in pushed(hub, branch="step-000100") and set(pushed(hub)) == {"config.json"}
    api.upload_file(path_or_fileobj=b"left over", path_in_repo="old.txt", repo_id="you/small")
    push(run, Push("you/small", force=True))
    assert "model.safetensors" in pushed(hub) and "old.txt" not in pushed(hub)


def test_a_dry_run_sends_nothing(hub, run):
    folder = Path(push(run, Push("you/small", dry_run=True)))
    assert hub.requests == [] and (folder / "README.md").exists() and (folder / "model.safetensors").exists()


def test_a_cut_upload_is_resumed_without_sending_the_weights_again(hub, run, no_check):
    hub.fail("POST", "/commit/", 500)
    push(run, Push("you/small"))
    puts = [line for line in hub.requests if line.startswith("PUT")]
    assert len(puts) == len(set(puts)) == len(hub.blobs) and "model.safetensors" in pushed(hub)


def test_a_cut_download_goes_on_with_a_range_and_gives_the_whole_file(hub, run, no_check, tmp_path, monkeypatch):
    push(run, Push("you/small"))
    whole = pushed(hub)["model.safetensors"]
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 4096)  # less than a chunk is not kept
    hub.fail("GET", r"/resolve/.*/model\.safetensors", None, times=2)
    got = hf_hub_download("you/small", "model.safetensors", cache_dir=tmp_path / "cache")
    assert Path(got).read_bytes() == whole and not hub.faults
    starts = [int(re.fullmatch(r"bytes=(\d+)-", text)[1]) for text in hub.ranges]
    assert len(starts) == 2 and 0 < starts[0] <= len(whole) // 2 < starts[1] < len(whole)


def test_a_card_that_the_hub_rejects_is_one_line_and_nothing_is_created(hub, run):
    with pytest.raises(InputError, match=r'rejects the card: .*"license" must be one of'):
        push(run, Push("you/small", license="mitt"))
    assert not hub.repos


def test_a_private_repo_is_there_with_a_token_only(hub, run, no_check, tmp_path):
    push(run, Push("you/small", private=True))
    assert HfApi(token=TOKEN).model_info("you/small").private
    with pytest.raises(RepositoryNotFoundError):
        HfApi(token=False).model_info("you/small")
    with pytest.raises(RepositoryNotFoundError):
        hf_hub_download("you/small", "config.json", token=False, cache_dir=tmp_path / "cache")


def test_another_owner_is_refused(hub, run):
    with pytest.raises(InputError, match="may not write to somebody/small"):
        push(run, Push("somebody/small"))


@pytest.mark.parametrize(
    "wanted,words",
    [
        (Push("you/small", stage="rl"), "'rl' of .* is not finished; finished: sft"),
        (Push("you/small", stage="stf"), "did you mean 'sft'"),
        (Push("small"), "you/small"),
        (Push("you/sm all"), "no repo name"),
    ],
)
def test_wrong_wishes_are_refused_before_anything_is_sent(hub, run, wanted, words):
    with pytest.raises(InputError, match=words):
        push(run, wanted)
    assert hub.requests == []


def test_a_result_that_is_no_number_is_refused(hub, run):
    evaluation = load_json(run / "eval" / "metrics.json")
    evaluation["results"]["sft"]["facts"]["value"] = float("nan")
    save_json(run / "eval" / "metrics.json", evaluation)
    with pytest.raises(InputError, match="run the evaluation again"):
        push(run, Push("you/small"))


def test_a_file_with_a_token_is_not_sent_and_no_token_is_ever_written(hub, run, no_check, capsys):
    push(run, Push("you/small"))
    shown = capsys.readouterr()
    assert TOKEN not in shown.out + shown.err
    assert not [path for path in run.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
    metrics = load_json(run / "sft" / "metrics.json")
    save_json(run / "sft" / "metrics.json", {**metrics, "config": {"report_to": "hf_" + "x" * 34}})
    hub.requests.clear()
    with pytest.raises(InputError, match="contains a Hub token"):
        push(run, Push("you/small"))
    assert hub.requests == []


def test_a_space_is_made_that_points_at_the_model(hub, run, no_check):
    push(run, Push("you/small", space=True))
    repo = hub.repos["spaces", "you/small-chat"]
    assert repo.variables == {"MODEL_ID": "you/small"}
    files = pushed(hub, "you/small-chat", "spaces")
    assert set(files) == {"app.py", "README.md", "requirements.txt"}
    assert yaml.safe_load(files["README.md"].decode().split("---\n")[1])["models"] == ["you/small"]


def test_a_private_model_gets_a_private_space_and_is_told_of_its_token(hub, run, no_check, capsys):
    push(run, Push("you/small", space=True, private=True))
    assert hub.repos["models", "you/small"].private and hub.repos["spaces", "you/small-chat"].private
    assert "read token as the secret HF_TOKEN" in capsys.readouterr().out
    push(run, Push("you/open", space=True))
    assert not hub.repos["models", "you/open"].private and not hub.repos["spaces", "you/open-chat"].private


def change_weights(folder, value):
    path = folder / "model.safetensors"
    values = load_file(path)
    name = min(values)
    values[name].view(-1)[0] = value
    path.unlink()  # a link
    save_file(values, path, metadata={"format": "pt"})
    return name


def test_weights_that_are_no_numbers_are_never_sent(hub, run):
    name = change_weights(run / "sft", float("nan"))
    with pytest.raises(InputError, match=rf"NaN or infinity in {name} of model\.safetensors") as error:
        push(run, Push("you/small"))
    assert hub.requests == [] and "\n" not in str(error.value)


def test_weights_that_its_metrics_do_not_describe_are_not_sent(hub, run):
    metrics = load_json(run / "sft" / "metrics.json")
    save_json(run / "sft" / "metrics.json", {**metrics, "weights": model_fingerprint(run / "sft")})
    push(run, Push("you/small", dry_run=True))
    change_weights(run / "sft", 0.5)
    with pytest.raises(InputError, match=r"are not those that its metrics\.json describes: run stage 'sft' again"):
        push(run, Push("you/small", dry_run=True))


def test_an_old_evaluation_is_not_published_with_a_new_model(hub, run, no_check, capsys):
    evaluation = load_json(run / "eval" / "metrics.json")
    evaluation |= {"models": {"sft": "sft"}, "weights": {"sft": model_fingerprint(run / "sft")}}
    save_json(run / "eval" / "metrics.json", evaluation)
    (run / "plots").mkdir()
    (run / "plots" / "rl.png").write_bytes(b"of a stage that is gone")
    push(run, Push("you/small"))
    assert "0.9100" in pushed(hub)["README.md"].decode() and "plots/rl.png" not in pushed(hub)
    change_weights(run / "sft", 0.5)
    capsys.readouterr()
    push(run, Push("you/new"))
    files = pushed(hub, "you/new")
    for name in ("README.md", "report.md"):
        assert "0.9100" not in files[name].decode() and "results are left out for sft" in files[name].decode()
    assert "note: the evaluation is older than the models" in capsys.readouterr().out


def test_a_space_without_its_files_is_refused_before_anything_is_sent(hub, run, tmp_path, monkeypatch):
    monkeypatch.setattr(serve_hub, "SPACE", tmp_path / "nowhere")
    with pytest.raises(InputError, match="from a checkout of the project"):
        push(run, Push("you/small", space=True))
    assert hub.requests == []


@pytest.mark.slow
def test_push_load_back_and_the_cards_own_code_in_clean_processes(hub, run, tmp_path):
    script = [sys.executable, "scripts/push_to_hub.py", "--run-dir", str(run), "--repo", "you/small", "--private"]
    done = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "largest difference of a logit 0.0e+00" in done.stdout and TOKEN not in done.stdout + done.stderr
    assert hub.repos["models", "you/small"].private
    blocks = re.findall(r"```python\n(.*?)```", pushed(hub)["README.md"].decode(), re.S)
    env = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    said = [
        subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
        for code in blocks
    ]
    assert "'content': 'It is 408.'" in said[0].stdout and said[1].stdout == "It is 408.\n"
    download = [
        str(Path(sys.executable).with_name("hf")),
        "download",
        "you/small",
        "--local-dir",
        str(tmp_path / "got"),
    ]
    subprocess.run(download, env=env, check=True, capture_output=True)
    assert (tmp_path / "got" / "model.safetensors").read_bytes() == (run / "sft" / "model.safetensors").read_bytes()
    unfinished = subprocess.run([*script, "--stage", "rl"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert unfinished.returncode == 2 and "not finished" in unfinished.stderr.splitlines()[-1]


@pytest.mark.slow
def test_a_broken_upload_is_noticed(hub, run, monkeypatch):
    push_folder = serve_hub.prepare

    def spoil(*args):
        folder = push_folder(*args)
        text = (folder / "config.json").read_text().replace('"qk_scale": 1.2', '"qk_scale": 1.5')
        (folder / "config.json").unlink()
        (folder / "config.json").write_text(text)
        return folder

    monkeypatch.setattr(serve_hub, "prepare", spoil)
    with pytest.raises(InputError, match="logits differ"):
        push(run, Push("you/small"))
