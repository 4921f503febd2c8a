"""Checkpoints of pretraining: complete or absent, rotated, merged over ranks, with the random state."""

import random
import re
from types import SimpleNamespace

import pytest
import torch
from mutations import mutations
from test_optim import OPTIONS
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from nanochat_hf.errors import InputError
from nanochat_hf.metrics import ChatMeasured, Measured
from nanochat_hf.model.modeling_nanochat import NanoChatForCausalLM
from nanochat_hf.optim.muon_adamw import MuonAdamW, param_groups
from nanochat_hf.optim.scaling import Schedule
from nanochat_hf.run import load_json, save_json
from nanochat_hf.train import checkpoint
from nanochat_hf.train.sft import ChatTrainer


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def train_step(model, optimizer):
    model(input_ids=torch.arange(16)[None], labels=torch.arange(16)[None]).loss.backward()
    optimizer.step()


@pytest.fixture
def training(tiny_model):
    """A model and an optimizer after one step."""
    optimizer = MuonAdamW(param_groups(tiny_model, OPTIONS))
    train_step(tiny_model, optimizer)
    return tiny_model, optimizer


def save(folder, step, training, keep=2, sequences=None):
    return checkpoint.save(folder, step, *training, {"rows": sequences or step}, {"history": [step]}, keep)


def test_what_is_loaded_is_what_was_saved(training, tiny_config, tmp_path):
    path = save(tmp_path, 3, training)
    drawn = random.random(), torch.rand(2).tolist()
    fresh = NanoChatForCausalLM(tiny_config)
    other = MuonAdamW(param_groups(fresh, OPTIONS))
    assert checkpoint.load(path, fresh, other) == [{"rows": 3}]
    assert checkpoint.read_progress(path) == {"step": 3, "world_size": 1, "history": [3]}
    assert (random.random(), torch.rand(2).tolist()) == drawn
    for loaded, saved in ((fresh.state_dict(), training[0].state_dict()), (other.state, training[1].state)):
        torch.testing.assert_close(list(loaded.values()), list(saved.values()), rtol=0, atol=0)


@pytest.mark.parametrize("keep, left", [(0, 1), (1, 1), (2, 2), (9, 3)])
def test_the_last_ones_are_kept_and_never_none(training, tmp_path, keep, left):
    assert checkpoint.latest(tmp_path / "nowhere") is None
    for step in (5, 10, 100):
        save(tmp_path, step, training, keep)
    assert names(tmp_path) == ["step_000005", "step_000010", "step_000100"][-left:]
    assert checkpoint.latest(tmp_path).name == "step_000100"


def test_an_interruption_while_writing_leaves_the_checkpoint_before(training, tmp_path, monkeypatch):
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
    assert names(tmp_path) == ["step_000001", "step_000002"]


def test_an_interruption_while_an_old_one_is_deleted_leaves_no_half_checkpoint(training, tmp_path, monkeypatch):
    save(tmp_path, 1, training)

    def fail(path, **options):
        if path.exists():
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint.shutil, "rmtree", fail)
        save(tmp_path, 2, training, keep=1)
    assert [path.name for path in checkpoint.complete_checkpoints(tmp_path)] == ["step_000002"]


def test_a_second_one_of_a_step_is_newer_and_pushes_out_no_other_step(training, tmp_path):
    for sequences in (1, 2):
        path = save(tmp_path, 7, training, sequences=sequences)
    assert names(tmp_path) == ["step_000007.1"]
    assert checkpoint.latest(tmp_path) == path and torch.load(path / "rank_00000.pt")["position"] == {"rows": 2}
    for step in (7, 7, 8, 8):
        save(tmp_path, step, training)
    (tmp_path / "step_000009.bak").mkdir()  # not a checkpoint
    checkpoints = checkpoint.complete_checkpoints(tmp_path)
    assert [path.name for path in checkpoints] == ["step_000007.3", "step_000008.1"]
    assert [checkpoint.step_of(path) for path in checkpoints] == [7, 8]


def test_damage_is_named_in_subfolders_too(tmp_path):
    file, manifest = tmp_path / "shards" / "0", tmp_path / "manifest.json"
    file.parent.mkdir()
    file.write_text("a")
    checkpoint.write_manifest(tmp_path)
    checkpoint.write_manifest(tmp_path)  # the manifest is not a file of itself
    assert checkpoint.damage(tmp_path) is None and list(load_json(manifest)) == ["shards/0"]
    file.write_text("b")
    assert checkpoint.damage(tmp_path) == f"{file} is damaged: its checksum differs"
    file.unlink()
    assert checkpoint.damage(tmp_path) == f"{file} is missing"
    for content, words in (("{}", "names no file"), ('{"a', "is damaged"), (f'{{"{"x" * 300}": ""}}', "is damaged")):
        manifest.write_text(content)
        assert checkpoint.damage(tmp_path) == f"{manifest} {words}"
    manifest.unlink()
    assert checkpoint.damage(tmp_path) == f"{manifest} is missing"


def test_a_checkpoint_of_another_kind_of_sharding_is_refused_and_what_cannot_be_read_is_named(training, tmp_path):
    path = save(tmp_path, 3, training)
    (path / "shards").mkdir()
    with pytest.raises(InputError, match="step_000003 was written with another kind of sharding"):
        checkpoint.load(path, *training)
    (path / "shards").rmdir()
    state = training[1].state_dict()
    state["state"] = {key: {name: torch.cat([v, v]) if v.ndim else v for name, v in values.items()}
                      for key, values in state["state"].items()}  # fmt: skip
    torch.save(torch.load(path / "rank_00000.pt") | {"optimizer": state}, path / "rank_00000.pt")
    with pytest.raises(InputError, match=r"step_000003 cannot be read \(optimizer state of shape .*: restore it"):
        checkpoint.load(path, *training)
    (path / "model.pt").write_bytes(b"x")
    with pytest.raises(InputError, match=r"step_000003 cannot be read \(.*\): restore it, or delete it to use"):
        checkpoint.load(path, *training)


@pytest.mark.parametrize("progress, message", [({"step": 4}, "it holds step 4"), ([1], "a value in it is missing")])
def test_a_checkpoint_holds_the_step_of_its_name(tmp_path, progress, message):
    (path := tmp_path / "step_9").mkdir()
    torch.save(progress, path / "progress.pt")
    with pytest.raises(InputError, match=rf"step_9 cannot be read .*{message}.*: restore it, or delete it"):
        checkpoint.read_progress(path)


def test_weights_that_are_not_finite_are_not_saved_and_push_nothing_out(training, tmp_path):
    save(tmp_path, 1, training)
    training[0].lm_head.weight.data[0, 0] = float("inf")
    with pytest.raises(FloatingPointError, match=r"values in lm_head\.weight that are not finite"):
        save(tmp_path, 2, training)
    assert names(tmp_path) == ["step_000001"]


def test_optimizer_state_continues_in_another_stage_by_name_in_float32(training, tiny_config, tmp_path, monkeypatch):
    model, optimizer = training
    monkeypatch.setattr(checkpoint, "LARGE", 1000)
    checkpoint.save_optimizer_state(tmp_path / "optimizer.pt", model, optimizer)
    assert names(tmp_path) == ["optimizer.pt"]
    saved = torch.load(tmp_path / "optimizer.pt")
    for value in (value for values in saved.values() for value in values.values()):
        assert value.dtype == (torch.bfloat16 if value.numel() >= 1000 else torch.float32)
    fresh = NanoChatForCausalLM(tiny_config)
    fresh.model.embed_tokens.to(torch.bfloat16)
    other = MuonAdamW(param_groups(fresh, OPTIONS))
    rates = [group["lr"] for group in other.param_groups]
    del saved["model.resid_lambdas"]
    torch.save(saved, tmp_path / "optimizer.pt")
    checkpoint.load_optimizer_state(tmp_path / "optimizer.pt", fresh, other)
    theirs = dict(model.named_parameters())
    for name, p in fresh.named_parameters():
        assert bool(other.state[p]) is (name != "model.resid_lambdas")
        for key, value in other.state[p].items():
            assert value.dtype == torch.float32
            torch.testing.assert_close(value, optimizer.state[theirs[name]][key], rtol=2**-8, atol=0)
    train_step(fresh, other)
    assert [group["lr"] for group in other.param_groups] == rates
    torch.save([1], tmp_path / "optimizer.pt")
    with pytest.raises(
        InputError, match=r"optimizer\.pt cannot be read \(a value in it is missing or of a wrong kind"
    ):
        checkpoint.load_optimizer_state(tmp_path / "optimizer.pt", fresh, other)


def test_the_optimizer_state_reaches_sharded_parameters_as_shards(training, tiny_config, tmp_path, monkeypatch):
    model, optimizer = training
    monkeypatch.setattr(checkpoint, "LARGE", 1 << 30)
    checkpoint.save_optimizer_state(tmp_path / "optimizer.pt", model, optimizer)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        fresh = NanoChatForCausalLM(tiny_config)
        fully_shard(fresh, mesh=init_device_mesh("cpu", (1,)))
        other = MuonAdamW(param_groups(fresh, OPTIONS))
        checkpoint.load_optimizer_state(tmp_path / "optimizer.pt", fresh, other)
        for name, p in fresh.named_parameters():
            assert set(other.state[p]) == set(optimizer.state[dict(model.named_parameters())[name]])
            sharded = [value for value in other.state[p].values() if value.shape == p.shape and value.ndim]
            assert all(isinstance(value, DTensor) for value in sharded)
        checkpoint.save_optimizer_state(tmp_path / "again.pt", fresh, other)
    finally:
        torch.distributed.destroy_process_group()
    first, again = torch.load(tmp_path / "optimizer.pt"), torch.load(tmp_path / "again.pt")
    assert all(torch.equal(value, again[name][key]) for name in first for key, value in first[name].items())


def test_a_model_folder_is_complete_float32_and_nothing_is_left_beside_it(training, tokenizer, tmp_path):
    model, _ = training
    model.model.embed_tokens.to(torch.bfloat16)
    checkpoint.save_model(tmp_path, model, tokenizer)
    assert {"config.json", "model.safetensors", "tokenizer.json", "modeling_nanochat.py"} <= set(names(tmp_path))
    assert not any(name.startswith(".") for name in names(tmp_path))
    loaded = NanoChatForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value.float())


def test_checkpoints_are_in_the_order_of_their_numbers(tmp_path):
    order = ["checkpoint-20", "checkpoint-100", "step_000100", "step_000100.2", "step_000100.10", "step_1000000"]
    for kind in ("checkpoint", "step"):
        (tmp_path / kind).mkdir()
        for name in order:
            if name.startswith(kind):
                (tmp_path / kind / name).mkdir()
        checkpoints = checkpoint.all_checkpoints(tmp_path / kind)
        assert [path.name for path in checkpoints] == [name for name in order if name.startswith(kind)]


def test_a_key_that_an_older_version_did_not_write_is_no_change():
    now = {"matrix_lr": 0.1, "of a later version": 5}
    assert checkpoint.changed_keys({"matrix_lr": 0.1}, now) == {}
    assert checkpoint.changed_keys({"matrix_lr": 0.2}, now) == {"matrix_lr": "matrix_lr: 0.2 -> 0.1"}


LOG = [{"step": 1, "time": 0.5, "loss": 2.0, "epoch": 0.1}, {"step": 3, "time": 1.0, "eval_loss": 2.0}]
POINTS = {"history": [{"step": 1, "train_loss": 2.0}], "samples": [{"prompt": "a", "text": "b"}]}
READ = {  # file of a stage's state -> (its content, what reads it, what a refusal says)
    "config.json": ({"matrix_lr": None}, ChatTrainer.compare_settings, "is not valid JSON|with another recipe"),
    "skipped.json": ({"steps": [1]}, ChatTrainer.restore_records, "delete it to count none as skipped"),
    "checkpoint-3/measured.json": ({"log": LOG}, ChatTrainer.restore_records, "delete it to repeat that evaluation"),
    "checkpoint-3/trainer_state.json": (
        {"global_step": 3, "log_history": LOG},
        ChatTrainer.restore_records,
        "to use an older checkpoint",
    ),
    "measured.json": (POINTS, None, "delete it to repeat"),
}


@pytest.mark.parametrize("file", READ)
def test_a_damaged_record_is_one_line(tmp_path, file):
    (content, read, words), outcomes = READ[file], []
    save_json(tmp_path / "checkpoint-3" / "trainer_state.json", {"global_step": 3, "log_history": LOG})
    save_json(tmp_path / file, content)
    for data in mutations((tmp_path / file).read_bytes(), 60):
        (tmp_path / file).write_bytes(data)
        ranks = SimpleNamespace(world_size=1, process_index=0)
        trainer = SimpleNamespace(args=ranks, schedule=Schedule(4), state=SimpleNamespace(log_history=[]))
        try:
            if read is ChatTrainer.compare_settings:
                read(trainer, tmp_path, content)
            elif read:
                read(trainer, tmp_path / "checkpoint-3")
                trainer.state.log_history = trainer.resumed_log
                ChatTrainer.history(trainer)
            else:
                load_json(tmp_path / file, "delete it to repeat", Measured)
        except InputError as error:
            outcomes.append(str(error))
    assert len(outcomes) > 20 and all(re.search(words, line) and "\n" not in line for line in outcomes), outcomes


@pytest.mark.parametrize("name, file", [("step_000010", "model.safetensors"), ("checkpoint-10", "complete")])
def test_a_checkpoint_of_an_old_version_is_refused_and_stays(tmp_path, name, file):
    (tmp_path / name).mkdir()
    (tmp_path / name / file).touch()
    with pytest.raises(InputError, match=f"{name} has no manifest.json, as those of versions before December 2026"):
        checkpoint.latest(tmp_path)
    assert (tmp_path / name / file).exists()


@pytest.mark.parametrize("entry", [{"time": 1.0}, {"step": None}, {"step": 1, "time": None}])
def test_an_entry_of_a_log_has_a_step_and_no_null_as_its_time(tmp_path, entry):
    save_json(tmp_path / "measured.json", {"log": [*LOG, entry]})
    with pytest.raises(InputError, match=r"log is .*an entry has no step, or its time is null; repeat it"):
        load_json(tmp_path / "measured.json", "repeat it", ChatMeasured)
