"""Checkpoints: complete or absent, pruned, merged over processes, with the random state."""

import random
from pathlib import Path

import pytest
import torch
from test_optim import OPTIONS
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from nanochat_hf.errors import InputError
from nanochat_hf.model.modeling_nanochat import NanoChatForCausalLM
from nanochat_hf.optim.muon_adamw import MuonAdamW, param_groups
from nanochat_hf.train import checkpoint


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


@pytest.mark.parametrize("keep,left", [(0, 1), (1, 1), (2, 2), (9, 3)])
def test_as_many_stay_as_are_to_be_kept_and_never_none(training, tmp_path, keep, left):
    for step in (1, 2, 3):
        save(tmp_path, step, training, keep)
    assert len(checkpoint.complete(tmp_path)) == left and checkpoint.latest(tmp_path).name == "step_000003"


def test_a_kill_while_writing_leaves_the_checkpoint_before(training, tmp_path, monkeypatch):
    save(tmp_path, 1, training)
    real = torch.save
    for written in (1, 2):  # of three files
        left = iter(range(written))

        def fail(value, file, left=left):
            if next(left, None) is None:
                raise KeyboardInterrupt
            real(value, file)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(torch, "save", fail)
            save(tmp_path, 2, training)
        assert checkpoint.latest(tmp_path).name == "step_000001"
    save(tmp_path, 2, training)  # over what was left
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000001", "step_000002"]


def test_a_kill_while_an_old_one_is_deleted_leaves_no_half_one(training, tmp_path, monkeypatch):
    save(tmp_path, 1, training)

    def fail(path, **options):
        if path.exists():
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint.shutil, "rmtree", fail)
        save(tmp_path, 2, training, keep=1)
    assert [path.name for path in checkpoint.complete(tmp_path)] == ["step_000002"]


def test_a_second_one_at_the_same_step_is_newer_and_the_first_stays_until_it_is_complete(training, tmp_path):
    for rows in (1, 2):
        path = checkpoint.save(tmp_path, 7, *training, {"rows": rows}, {}, keep=2)
    assert [path.name for path in checkpoint.complete(tmp_path)] == ["step_000007.1"]
    assert checkpoint.latest(tmp_path) == path and torch.load(path / "rank_00000.pt")["position"] == {"rows": 2}
    checkpoint.save(tmp_path, 7, *training, {"rows": 3}, {}, keep=2)
    checkpoint.save(tmp_path, 7, *training, {"rows": 4}, {}, keep=2)
    assert [path.name for path in checkpoint.complete(tmp_path)] == ["step_000007.3"]
    save(tmp_path, 8, training)
    checkpoint.save(tmp_path, 8, *training, {"rows": 5}, {}, keep=2)  # stops at one step push no other step out
    (tmp_path / "step_000009.bak").mkdir()  # somebody's own
    assert [path.name for path in checkpoint.complete(tmp_path)] == ["step_000007.3", "step_000008.1"]


def test_weights_that_are_not_finite_are_not_saved_and_push_nothing_out(training, tmp_path):
    save(tmp_path, 1, training)
    training[0].lm_head.weight.data[0, 0] = float("inf")
    with pytest.raises(FloatingPointError, match=r"values in lm_head\.weight that are not finite"):
        save(tmp_path, 2, training)
    assert [path.name for path in tmp_path.iterdir()] == ["step_000001"]


def test_momenta_go_on_in_another_stage_by_name_and_in_float32(training, tiny_config, tmp_path):
    model, optimizer = training
    checkpoint.save_optimizer_state(tmp_path / "optimizer.pt", model, optimizer)
    assert [path.name for path in tmp_path.iterdir()] == ["optimizer.pt"]
    saved = torch.load(tmp_path / "optimizer.pt")
    assert saved["lm_head.weight"]["exp_avg"].dtype == torch.float32  # small here; large ones are halved
    fresh = NanoChatForCausalLM(tiny_config)
    fresh.model.embed_tokens.to(torch.bfloat16)
    other = MuonAdamW(param_groups(fresh, OPTIONS))
    rates = [group["lr"] for group in other.param_groups]
    del saved["model.resid_lambdas"]
    large = saved["model.layers.0.mlp.fc1.weight"]
    large["momentum_buffer"] = large["momentum_buffer"].bfloat16()
    torch.save(saved, tmp_path / "optimizer.pt")
    checkpoint.load_optimizer_state(tmp_path / "optimizer.pt", fresh, other)
    theirs = dict(model.named_parameters())
    for name, p in fresh.named_parameters():
        assert bool(other.state[p]) is (name != "model.resid_lambdas")
        for key, value in other.state[p].items():
            assert value.dtype == torch.float32
            torch.testing.assert_close(value, optimizer.state[theirs[name]][key], rtol=2**-8, atol=0)
    fresh(input_ids=torch.arange(16)[None], labels=torch.arange(16)[None]).loss.backward()
    other.step()
    assert [group["lr"] for group in other.param_groups] == rates


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
    with pytest.raises(InputError, match=r"cannot write .*file"):
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


def test_momenta_reach_sharded_parameters_as_shards(training, tiny_config, tmp_path):
    model, optimizer = training
    checkpoint.save_optimizer_state(tmp_path / "optimizer.pt", model, optimizer)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        fresh = NanoChatForCausalLM(tiny_config)
        fully_shard(fresh, mesh=init_device_mesh("cpu", (1,)))
        other = MuonAdamW(param_groups(fresh, OPTIONS))
        checkpoint.load_optimizer_state(tmp_path / "optimizer.pt", fresh, other)
        for name, p in fresh.named_parameters():
            assert set(other.state[p]) == set(optimizer.state[dict(model.named_parameters())[name]])
            kept = [value for value in other.state[p].values() if value.shape == p.shape and value.ndim]
            assert all(isinstance(value, DTensor) for value in kept)
        checkpoint.save_optimizer_state(tmp_path / "again.pt", fresh, other)
    finally:
        torch.distributed.destroy_process_group()
    first, again = torch.load(tmp_path / "optimizer.pt"), torch.load(tmp_path / "again.pt")
    assert all(torch.equal(value, again[name][key]) for name in first for key, value in first[name].items())
