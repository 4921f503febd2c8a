"""Checkpoints: complete or absent, pruned, merged over processes, with the random state."""

import random
from pathlib import Path

import pytest
import torch
from test_optim import OPTIONS

from nanochat_hf.errors import InputError
from nanochat_hf.model.modeling_nanochat import NanoChatForCausalLM
from nanochat_hf.train import checkpoint
from nanochat_hf.train.optim import MuonAdamW, param_groups


@pytest.fixture
def training(tiny_model):
    """A model and an optimizer that has made a step."""
    optimizer = MuonAdamW(param_groups(tiny_model, OPTIONS))
    tiny_model(input_ids=torch.arange(16)[None], labels=torch.arange(16)[None]).loss.backward()
    optimizer.step()
    return tiny_model, optimizer


def save(folder, step, training, keep=2):
    return checkpoint.save(folder, step, *training, {"rows": step}, {"history": [step]}, keep)


def test_what_is_loaded_is_what_was_saved(training, tiny_config, tmp_path):
    model, optimizer = training
    random.seed(1)
    torch.manual_seed(1)
    path = save(tmp_path, 3, training)
    drawn = random.random(), torch.rand(2)
    fresh = NanoChatForCausalLM(tiny_config)
    other = MuonAdamW(param_groups(fresh, OPTIONS))
    progress, positions = checkpoint.load(path, fresh, other)
    assert (progress["step"], progress["history"], positions) == (3, [3], [{"rows": 3}])
    assert random.random() == drawn[0] and torch.equal(torch.rand(2), drawn[1])
    assert all(torch.equal(value, fresh.state_dict()[name]) for name, value in model.state_dict().items())
    for index, values in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, other.state_dict()["state"][index][name]) for name, value in values.items())


def test_only_the_last_ones_stay_and_the_newest_is_found(training, tmp_path):
    for step in (5, 10, 100):
        save(tmp_path, step, training)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000010", "step_000100"]
    assert checkpoint.latest(tmp_path).name == "step_000100"
    assert checkpoint.latest(tmp_path / "nowhere") is None


def test_a_kill_while_writing_leaves_the_checkpoint_before(training, tmp_path, monkeypatch):
    save(tmp_path, 1, training)
    calls = []

    def fail(value, path):
        calls.append(path)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(value, path)

    real = torch.save
    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 2, training)
    assert checkpoint.latest(tmp_path).name == "step_000001"
    monkeypatch.undo()
    save(tmp_path, 2, training)  # over what was left
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000001", "step_000002"]


def test_states_of_several_ranks_become_one():
    groups = [{"params": [0, 1, 2]}]
    first = {"state": {0: {"a": 1, "shared": 5}, 1: {"shared": 6}}, "param_groups": groups}
    second = {"state": {0: {"shared": 5}, 1: {"a": 2, "shared": 6}, 2: {"b": 3}}, "param_groups": groups}
    whole = checkpoint.merged([first, second])
    assert whole == {
        "state": {0: {"a": 1, "shared": 5}, 1: {"a": 2, "shared": 6}, 2: {"b": 3}},
        "param_groups": groups,
    }


def test_a_folder_that_cannot_be_written_is_one_clear_line(training, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write checkpoints to"):
        save(tmp_path / "file", 1, training)


def test_a_model_folder_is_complete_float32_and_nothing_is_left_beside_it(training, tokenizer, tmp_path):
    model, _ = training
    model.model.embed_tokens.to(torch.bfloat16)
    checkpoint.save_model(tmp_path, model, tokenizer)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "modeling_nanochat.py"} <= names
    assert not any(Path(name).name.startswith(".") for name in names)
    loaded = NanoChatForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value.float())
