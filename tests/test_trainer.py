"""What the chat stages share: optimizer options by role, steps split among ranks, warm starts, several processes."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer

from nanochat_hf.data.tokenizer import tool_result_mask
from nanochat_hf.errors import InputError
from nanochat_hf.optim.muon_adamw import MuonAdamW, param_groups
from nanochat_hf.optim.scaling import DEFAULTS
from nanochat_hf.train.checkpoint import complete_checkpoints, save_optimizer_state
from nanochat_hf.train.dpo import DPOStageConfig, train_dpo
from nanochat_hf.train.grpo import RLConfig, train_rl
from nanochat_hf.train.model_setup import lora
from nanochat_hf.train.sft import ChatConfig, ChatTrainer, train_chat
from nanochat_hf.train.trainer import StageConfig, StageTrainer, trainer_arguments

pytestmark = pytest.mark.usefixtures("fresh_accelerator")

CONFIG = ChatConfig(mixture=[{"dataset": "primer", "rows": 60}], device_batch_size=4, num_iterations=6, save_every=2)


def options(model, **keys) -> dict[str, dict]:
    trainer = StageTrainer.__new__(StageTrainer)
    trainer.model, trainer.stage = model, ChatConfig(**keys)
    return trainer.optimizer_options()


def test_warmup_decay_and_muon_momentum_follow_the_schedule(tiny_folder, tmp_path, monkeypatch):
    steps, real = [], MuonAdamW.step

    def step(self, *args, **kwargs):
        groups = self.param_groups
        steps.append((groups[0]["lr"] / groups[0]["initial_lr"], [g["momentum"] for g in groups if "momentum" in g]))
        return real(self, *args, **kwargs)

    monkeypatch.setattr(MuonAdamW, "step", step)
    keys = {"num_iterations": 8, "warmup_ratio": 0.2, "warmdown_ratio": 0.5, "final_lr_frac": 0.2}
    train_chat(replace(CONFIG, **keys, device_batch_size=1), str(tiny_folder), tmp_path / "sft")
    # 1.6 steps of warmup are two whole ones
    assert [factor for factor, _ in steps] == pytest.approx([0.5, 1, 1, 1, 1, 0.8, 0.6, 0.4])
    start, peak, _ = DEFAULTS[2].momentum
    slope = (peak - start) / DEFAULTS[2].momentum_steps
    for number, (_, values) in enumerate(steps):
        assert values and values == pytest.approx([start + slope * number] * len(values))
    trainer, first = StageTrainer.__new__(StageTrainer), SimpleNamespace(config=SimpleNamespace(generation=1))
    trainer.stage, trainer.model, trainer.lr_scheduler = CONFIG, first, None
    trainer.create_scheduler(8, torch.optim.SGD([torch.zeros(1)]))
    assert (trainer.schedule.momentum, trainer.schedule.momentum_steps) == ((0.85, 0.95, 0.95), 300)


def test_keys_of_the_yaml_reach_the_library(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)  # as if wandb were installed
    keys = {"num_epochs": 3, "max_grad_norm": 0.7, "eval_every": 5, "save_every": 7, "report_to": "wandb", "seed": 9}
    config = StageConfig(num_iterations=11, device_batch_size=2, **keys)
    monkeypatch.undo()
    arguments = trainer_arguments(config, tmp_path)
    expected = {"max_steps": 11, "num_train_epochs": 3, "per_device_train_batch_size": 2, "max_grad_norm": 0.7}
    expected |= {"eval_strategy": "steps", "eval_steps": 5, "save_steps": 7, "report_to": "wandb", "seed": 9}
    assert expected.items() <= arguments.items()
    adapters = lora(StageConfig(lora_r=4, lora_alpha=8))
    assert (adapters.r, adapters.lora_alpha) == (4, 8) and lora(StageConfig()) is None
    arguments = trainer_arguments(StageConfig(), tmp_path)
    assert arguments["eval_strategy"] == "no" and arguments["save_steps"] > 1e6 and arguments["max_grad_norm"] == 0


def test_tool_results_and_their_marks_are_masked(tokenizer):
    parts = "<|python_start|>2+3<|python_end|>", "<|output_start|>5<|output_end|>", "is 5"
    call, output, words = (tokenizer.encode(part, add_special_tokens=False) for part in parts)
    mask = tool_result_mask(tokenizer, [*call, *output, *words])
    assert mask == [1] * len(call) + [0] * len(output) + [1] * len(words)
    assert tool_result_mask(tokenizer, output[:-1]) == [0] * (len(output) - 1)  # cut off by the length limit


@pytest.mark.parametrize("stage", ["rl", "dpo"])
@pytest.mark.parametrize("launched", ["DEEPSPEED", "FSDP"])
def test_a_launch_that_shards_weights_is_refused_before_anything_is_loaded(stage, launched, monkeypatch):
    monkeypatch.setenv(f"ACCELERATE_USE_{launched}", "true")
    rl, dpo = (partial(train_rl, engine=None), RLConfig()), (train_dpo, DPOStageConfig(dataset="x"))
    train, config = {"rl": rl, "dpo": dpo}[stage]
    with pytest.raises(InputError, match=f"^{stage} needs unsharded weights.*multi_gpu.yaml$"):
        train(config, "nowhere", Path("nowhere"))


@pytest.mark.parametrize("keys, loaded", [({}, True), ({"load_optimizer": False}, False), ({"lora_r": 2}, False)])
def test_optimizer_state_of_the_source_is_taken_over_and_its_learning_rates_are_not(
    tiny_folder, tiny_model, tmp_path, monkeypatch, keys, loaded
):
    optimizer = MuonAdamW(param_groups(tiny_model, options(tiny_model, init_lr_frac=0.001)))
    for parameter in tiny_model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    save_optimizer_state(tiny_folder / "optimizer.pt", tiny_model, optimizer)
    seen = {}

    def look(self, *args, **kwargs):
        inner = self.optimizer.optimizer
        seen["lr"] = [group["initial_lr"] for group in inner.param_groups]
        seen["states"] = [len(inner.state[p]) for group in inner.param_groups for p in group["params"]]
        raise KeyboardInterrupt

    monkeypatch.setattr(ChatTrainer, "training_step", look)
    with pytest.raises(KeyboardInterrupt):
        train_chat(replace(CONFIG, **keys), str(tiny_folder), tmp_path / "sft")
    assert all(seen["states"]) is loaded and any(seen["states"]) is loaded
    if "lora_r" not in keys:
        assert seen["lr"] == [group["lr"] for group in param_groups(tiny_model, options(tiny_model))]


# --- losses and weights that are not finite ----------------------------------------------------------------------


@pytest.mark.parametrize("rank, value", [(0, float("inf")), pytest.param(4, float("nan"), marks=pytest.mark.slow)])
def test_a_step_that_is_not_finite_stops_the_stage_and_a_rerun_skips_it(tiny_folder, tmp_path, rank, value):
    config, real, out = replace(CONFIG, lora_r=rank, save_every=-1), ChatTrainer.training_step, tmp_path / "sft"

    def spoiled(self, model, *args, **kwargs):
        loss = real(self, model, *args, **kwargs)
        if self.state.global_step == 2:
            next(p.grad for p in model.parameters() if p.grad is not None).view(-1)[0] = value
        return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ChatTrainer, "training_step", spoiled)
        with pytest.raises(FloatingPointError, match=r"sft: the gradients of step 3 are not finite.*checkpoint-3"):
            train_chat(config, str(tiny_folder), out)
    [saved] = (out / "state" / "checkpoint-3").glob("*.safetensors")
    assert all(value.isfinite().all() for value in load_file(saved).values())
    assert not (out / "metrics.json").exists()
    train_chat(config, str(tiny_folder), out)  # with the data after it
    metrics = json.loads((out / "metrics.json").read_text(), parse_constant=pytest.fail)
    assert metrics["finished"] and metrics["skipped_steps"] == [3]


def test_after_a_gradient_that_is_not_finite_no_step_updates_until_the_stage_ends(monkeypatch):
    optimizer = MuonAdamW.__new__(MuonAdamW)
    trainer = ChatTrainer.__new__(ChatTrainer)
    trainer.state, trainer.all_finite, trainer.pending_checks = SimpleNamespace(global_step=0), None, []
    trainer.inner_optimizer = lambda: optimizer
    monkeypatch.setattr(Trainer, "_get_grad_norm", lambda trainer, model, norm: norm)
    factors = []
    for norm in (1.0, float("nan"), 1.0):
        trainer._get_grad_norm(None, torch.tensor(norm))
        factors.append(optimizer.step_factor.item())
    assert factors == [1, 0, 0]


@pytest.mark.parametrize("step, skipped, ends", [(3, [], False), (3, [1], False), (3, [2], True), (8, [], True)])
def test_a_second_skipped_step_in_a_row_or_the_last_one_leaves_no_checkpoint(tmp_path, step, skipped, ends):
    trainer, saved = StageTrainer.__new__(StageTrainer), []
    trainer.args, trainer.state = SimpleNamespace(output_dir=str(tmp_path)), SimpleNamespace(max_steps=8)
    trainer.pending_checks, trainer.skipped = [(step, lambda: [0.0])], list(skipped)
    trainer.optimizer = SimpleNamespace(optimizer=SimpleNamespace(rollback_step_count=lambda: None))
    trainer.is_world_process_zero, trainer._save_checkpoint = lambda: True, lambda: saved.append(step)
    with pytest.raises(FloatingPointError, match="Lower the" if ends else "Run again to resume"):
        trainer.check_finite()
    assert saved == [] if ends else [step]


def test_a_validation_loss_that_is_not_finite_is_no_result(tiny_folder, tmp_path, monkeypatch):
    real = Trainer.compute_loss

    def loss(self, model, inputs, *args, **kwargs):
        after_training = not model.training and self.state.global_step
        return real(self, model, inputs, *args, **kwargs) * (float("nan") if after_training else 1)

    monkeypatch.setattr(Trainer, "compute_loss", loss)
    held_out = [{"dataset": "primer", "split": "test", "rows": 8}]
    with pytest.raises(FloatingPointError, match=r"the validation loss is nan at step 2.*checkpoint-2"):
        train_chat(replace(CONFIG, validation=held_out, eval_every=2), str(tiny_folder), tmp_path / "sft")


def test_a_run_that_diverged_is_never_finished_by_running_it_again(tiny_folder, tmp_path, monkeypatch):
    """Every rerun would skip one step more, up to the end."""
    monkeypatch.setattr("nanochat_hf.optim.scaling.Schedule.lr", lambda self, step: 1e15)
    config, out = replace(CONFIG, num_iterations=4, save_every=1), tmp_path / "sft"
    for _ in range(3):
        with pytest.raises(FloatingPointError, match="checkpoint"):
            train_chat(config, str(tiny_folder), out)
        assert not (out / "metrics.json").exists()
        for folder in complete_checkpoints(out / "state"):
            assert all(value.isfinite().all() for value in load_file(folder / "model.safetensors").values())
