"""What the chat stages share: rates by role, exact resume after a kill, warm starts, several processes."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from nanochat_hf.errors import InputError
from nanochat_hf.optim.muon_adamw import MuonAdamW, param_groups
from nanochat_hf.optim.scaling import DEFAULTS, optimizer_groups
from nanochat_hf.run import load_json
from nanochat_hf.train.checkpoint import save_optimizer_state
from nanochat_hf.train.dpo import DPOStageConfig, train_preference
from nanochat_hf.train.grpo import RLConfig, train_rl
from nanochat_hf.train.sft import ChatConfig, ChatTrainer, train_chat
from nanochat_hf.train.trainer import StageTrainer, split_step

pytestmark = pytest.mark.usefixtures("fresh_accelerator")

CONFIG = ChatConfig(mixture=[{"dataset": "primer", "rows": 60}], device_batch_size=4, num_iterations=6, save_every=2)


def kill_after(monkeypatch, steps: int) -> None:
    """The process dies in the middle of the step after so many."""
    real, done = ChatTrainer.training_step, []

    def step(self, *args, **kwargs):
        if len(done) == steps:
            raise KeyboardInterrupt
        done.append(1)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(ChatTrainer, "training_step", step)


def rates(model, **keys) -> dict[str, dict]:
    trainer = StageTrainer.__new__(StageTrainer)
    trainer.model, trainer.stage = model, ChatConfig(**keys)
    return trainer.rates()


def test_rates_are_those_of_the_generation_times_the_fraction(tiny_model):
    expected = optimizer_groups(replace(DEFAULTS[2], weight_decay=0.0), 2, 64)
    found = rates(tiny_model, init_lr_frac=0.5)
    for role, group in expected.items():
        assert found[role] == {**group, "lr": group["lr"] * 0.5}


def test_a_rate_of_the_recipe_wins(tiny_model):
    found, usual = rates(tiny_model, matrix_lr=0.5, embedding_lr=0.6, weight_decay=0.1), rates(tiny_model)
    assert found["matrix"]["lr"] == 0.5 and found["matrix"]["weight_decay"] == 0.1
    assert found["embedding"]["lr"] == pytest.approx(2 * usual["embedding"]["lr"])
    assert found["head"] == usual["head"]


def test_a_step_must_be_whole_rows():
    assert split_step(CONFIG, "total_batch_size", 1024, 128) == (CONFIG, 2) and split_step(CONFIG, "pairs", 8) == (
        CONFIG,
        2,
    )
    assert split_step(CONFIG, "total_batch_size", 256, 128) == (replace(CONFIG, device_batch_size=2), 1)
    for total in (1000, 0):
        with pytest.raises(InputError, match=f"tokens = {total} must be a positive multiple of 128, one sequence"):
            split_step(CONFIG, "tokens", total, 128)


@pytest.mark.parametrize("stage", ["rl", "dpo"])
@pytest.mark.parametrize("launched", ["DEEPSPEED", "FSDP"])
def test_a_launch_that_keeps_weights_in_pieces_is_refused_before_anything_is_loaded(stage, launched, monkeypatch):
    monkeypatch.setenv(f"ACCELERATE_USE_{launched}", "true")
    train, config = {"rl": (train_rl, RLConfig()), "dpo": (train_preference, DPOStageConfig(dataset="x"))}[stage]
    with pytest.raises(InputError, match=f"^{stage} needs unsharded weights.*multi_gpu.yaml$"):
        train(config, "nowhere", Path("nowhere"))


def test_a_killed_stage_resumes_and_ends_with_the_same_weights(tiny_folder, tmp_path, monkeypatch):
    train_chat(CONFIG, str(tiny_folder), tmp_path / "whole")
    with monkeypatch.context() as patch:
        kill_after(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            train_chat(CONFIG, str(tiny_folder), tmp_path / "killed")
    assert not (tmp_path / "killed" / "metrics.json").exists()
    torch.manual_seed(123)
    train_chat(CONFIG, str(tiny_folder), tmp_path / "killed")
    whole, killed = (load_json(tmp_path / name / "metrics.json")["history"] for name in ("whole", "killed"))
    assert [(r["step"], r["train_loss"]) for r in whole] == [(r["step"], r["train_loss"]) for r in killed]
    one, other = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "killed"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_checkpoint_that_was_not_written_to_its_end_is_not_used(tiny_folder, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        kill_after(patch, 5)
        with pytest.raises(KeyboardInterrupt):
            train_chat(replace(CONFIG, save_every=2), str(tiny_folder), tmp_path / "sft")
    checkpoint = tmp_path / "sft" / "state" / "checkpoint-4"
    assert (checkpoint / "complete").exists()
    (checkpoint / "complete").unlink()
    train_chat(CONFIG, str(tiny_folder), tmp_path / "sft")  # begins anew
    assert [row["step"] for row in load_json(tmp_path / "sft" / "metrics.json")["history"]] == [1, 2, 3, 4, 5, 6]


def test_a_checkpoint_of_another_recipe_is_refused(tiny_folder, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        kill_after(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            train_chat(CONFIG, str(tiny_folder), tmp_path / "sft")
    for key, value in (("matrix_lr", 0.001), ("device_batch_size", 2)):  # here the number of rows is the step's size
        with pytest.raises(InputError, match="written by another recipe"):
            train_chat(replace(CONFIG, **{key: value}), str(tiny_folder), tmp_path / "sft")
    train_chat(replace(CONFIG, save_every=3), str(tiny_folder), tmp_path / "sft")


def test_momenta_of_the_source_are_taken_over_and_its_rates_are_not(tiny_folder, tiny_model, tmp_path, monkeypatch):
    optimizer = MuonAdamW(param_groups(tiny_model, rates(tiny_model, init_lr_frac=0.001)))
    for parameter in tiny_model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    save_optimizer_state(tiny_folder / "optimizer.pt", tiny_model, optimizer)
    found = {}

    def look(self, *args, **kwargs):
        inner = self.optimizer.optimizer
        found["lr"] = [group["initial_lr"] for group in inner.param_groups]
        found["states"] = [len(inner.state[p]) for group in inner.param_groups for p in group["params"]]
        raise KeyboardInterrupt

    monkeypatch.setattr(ChatTrainer, "training_step", look)
    for load in (True, False):
        with pytest.raises(KeyboardInterrupt):
            train_chat(replace(CONFIG, load_optimizer=load), str(tiny_folder), tmp_path / f"sft-{load}")
        assert all(found["states"]) is load and any(found["states"]) is load
        assert found["lr"] == [group["lr"] for group in param_groups(tiny_model, rates(tiny_model))]


PROGRAM = """
import sys
from pathlib import Path
from nanochat_hf.model.configuration_nanochat import NanoChatConfig
from nanochat_hf.train.sft import ChatConfig, train_chat
import nanochat_hf.train.sft as sft, torch
torch.set_num_threads(1)
base, out, batch, die = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
mixture = [{"dataset": "primer", "rows": 60}]
config = ChatConfig(mixture=mixture, device_batch_size=batch, num_iterations=8, save_every=2, init_lr_frac=0.02)
config.total_batch_size = 8 * NanoChatConfig.from_pretrained(base).max_position_embeddings
real, done = sft.ChatTrainer.training_step, []
def step(self, *args, **kwargs):
    if len(done) == die:
        sys.exit(3)
    done.append(1)
    return real(self, *args, **kwargs)
sft.ChatTrainer.training_step = step
train_chat(config, base, out)
"""


def launch(base, out, processes: int, batch: int, die: int = -1) -> int:
    """Run PROGRAM in so many processes; -> exit code."""
    (out.parent / "program.py").write_text(PROGRAM)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += [str(out.parent / "program.py"), str(base), str(out), str(batch), str(die)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd(), "HF_HUB_OFFLINE": "1"}
    environment["ACCELERATE_USE_CPU"] = "true"  # as accelerate launch says it
    done = subprocess.run(command, env=environment, capture_output=True, check=False, text=True, timeout=150)
    print(done.stdout[-2000:], done.stderr[-4000:])
    return done.returncode


@pytest.mark.slow
def test_two_processes_train_like_one_and_resume_as_two_or_one(tiny_folder, tmp_path):
    assert launch(tiny_folder, tmp_path / "one", 1, 8) == 0
    assert launch(tiny_folder, tmp_path / "two", 2, 4) == 0
    assert launch(tiny_folder, tmp_path / "killed", 2, 4, die=3) != 0
    checkpoint = tmp_path / "killed" / "state" / "checkpoint-2"
    assert (checkpoint / "complete").exists() and (checkpoint / "optimizer-1.pt").exists()
    shutil.copytree(tmp_path / "killed", tmp_path / "fewer")
    assert launch(tiny_folder, tmp_path / "killed", 2, 4) == 0
    assert launch(tiny_folder, tmp_path / "fewer", 1, 4) == 0
    assert launch(tiny_folder, tmp_path / "more", 1, 4, die=6) != 0  # of two micro-batches a step
    assert launch(tiny_folder, tmp_path / "more", 2, 4) == 0
    one, *others = (
        [row["train_loss"] for row in load_json(tmp_path / name / "metrics.json")["history"]]
        for name in ("one", "two", "killed", "fewer", "more")
    )
    assert len(one) == 8  # through three epochs, which end in half a step
    for losses in others:
        assert losses == pytest.approx(one, rel=1e-5)
