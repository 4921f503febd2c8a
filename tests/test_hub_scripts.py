"""The training and evaluation scripts with Hub ids instead of folders, as users start them, against the stand-in."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hub_standin import Hub

from nanochat_hf.data.tokenizer import TokenizerConfig, train_tokenizer

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
TOKEN = "hf_" + "Secret" * 6
STEPS = ["--num_iterations", "7", "--depth", "2", "--max_seq_len", "64", "--total_batch_size", "512",
         "--device_batch_size", "4", "--eval_every", "0", "--save_every", "2"]  # fmt: skip
LOAD = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
which = dict(revision=sys.argv[2], trust_remote_code=True)
model, tokenizer = (kind.from_pretrained(sys.argv[1], **which) for kind in (AutoModelForCausalLM, AutoTokenizer))
assert "nanochat_hf" not in sys.modules
print(model(**tokenizer("The owl is", return_tensors="pt")).logits.isfinite().all().item())
"""


class Workplace:
    """The stand-in and a folder of runs; `start` runs a script of the project there as a user would."""

    def __init__(self, hub: Hub, path: Path):
        self.hub, self.path = hub, path
        caches = {name: str(path / name.lower()) for name in ("HF_HOME", "HF_HUB_CACHE", "HF_MODULES_CACHE")}
        self.env = {**os.environ, **caches, "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
        self.env |= {"HF_HUB_OFFLINE": "0", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

    def start(self, *words: str, cwd: Path = ROOT, fails: bool = False) -> subprocess.CompletedProcess:
        options = {"cwd": cwd, "env": self.env, "capture_output": True, "text": True, "timeout": 300}
        process = subprocess.run([sys.executable, *words], check=False, **options)
        assert fails or process.returncode == 0, process.stderr[-3000:]
        assert TOKEN not in process.stdout + process.stderr
        return process

    def stage(self, script: str, recipe: str, run: str, *words: str, fails: bool = False):
        config = f"recipes/cpu-demo/{recipe}.yaml"
        command = [f"scripts/{script}.py", "--config", config, "--run-dir", str(self.path / run), *words]
        return self.start(*command, fails=fails)

    def metrics(self, run: str, stage: str) -> dict:
        return json.loads((self.path / run / stage / "metrics.json").read_text())


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A Hub on which `me/x` holds a base model of seven steps, and branches of two checkpoints."""
    path = tmp_path_factory.mktemp("work")
    demo = yaml.safe_load((ROOT / "recipes/cpu-demo/tokenizer.yaml").read_text())
    train_tokenizer(TokenizerConfig(**{**demo, "vocab_size": 512, "max_chars": 200_000}), path / "first" / "tokenizer")
    with Hub(token=TOKEN, user="me") as hub:
        work = Workplace(hub, path)
        work.trained = work.stage("base_train", "base", "first", *STEPS, "--push_every", "3", "--repo", "me/x")
        work.start("scripts/push_to_hub.py", "--run-dir", str(path / "first"), "--stage", "base", "--repo", "me/x")
        yield work


def test_checkpoints_become_branches_while_training_that_load_without_this_package(work):
    repo = work.hub.repos["models", "me/x"]
    assert set(repo.branches) == {"main", "step-000003", "step-000006"} and repo.private
    first, second = (repo.files(f"step-{step:06d}")[1] for step in (3, 6))
    assert {"model.safetensors", "config.json", "tokenizer.json", "modeling_nanochat.py"} <= set(first)
    assert not [name for name in (*first, *second) if "/" in name]  # nothing of the run's state
    assert first["model.safetensors"] != second["model.safetensors"]
    assert "step 3 is on me/x as branch step-000003" in work.trained.stdout
    for branch in ("step-000003", "step-000006"):
        assert work.start("-c", LOAD, "me/x", branch, cwd=work.path).stdout.strip() == "True"


def test_pretraining_starts_from_a_hub_id(work):
    deeper = [*STEPS[:2], "--depth", "3", *STEPS[4:]]  # the model's own shape wins
    work.stage("base_train", "base", "second", *deeper, "--model", "me/x", "--tokenizer", "me/x")
    before, after = work.metrics("first", "base"), work.metrics("second", "base")
    assert after["depth"] == 2 and after["num_parameters"] == before["num_parameters"]
    assert after["history"][0]["train_loss"] < before["history"][0]["train_loss"] - 0.1


def test_sft_and_evaluation_take_a_hub_id(work):
    rows = ["--mixture", "[{dataset: primer, rows: 100}]", "--validation", "[]", "--num_iterations", "2"]
    work.stage("chat_sft", "sft", "chat", *rows, "--device_batch_size", "4", "--model", "me/x")
    assert work.metrics("chat", "sft")["finished"] and (work.path / "chat/sft/model.safetensors").exists()
    few = ["--max_per_task", "2", "--bpb_tokens", "512", "--max_new_tokens", "4", "--chat_stages", "[base]"]
    work.stage("run_evals", "eval", "eval", *few, "--model", "me/x")
    results = work.metrics("eval", "eval")["results"]["base"]
    assert 0 < results["val_bpb"]["value"] < 8 and len(results) > 1 and all(r["n"] for r in results.values())


@pytest.mark.parametrize(
    ("script", "recipe", "words"),
    [
        ("base_train", "base", ["--tokenizer", "me/x", "--model", "me/wrong"]),
        ("base_train", "base", ["--tokenizer", "me/wrong"]),
        ("chat_sft", "sft", ["--model", "me/wrong"]),
        ("run_evals", "eval", ["--model", "me/wrong"]),
    ],
)
def test_a_wrong_hub_id_is_one_clear_line_and_exit_code_two(work, tmp_path, script, recipe, words):
    process = work.stage(script, recipe, str(tmp_path), *words, fails=True)
    last = process.stderr.strip().splitlines()[-1]
    assert process.returncode == 2 and last.startswith("error: ") and "me/wrong" in last, process.stderr[-3000:]
    assert "Traceback" not in process.stderr and not list(tmp_path.glob("*/metrics.json"))
