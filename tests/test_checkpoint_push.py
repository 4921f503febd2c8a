"""Checkpoints of a run that goes on, sent by a thread to the Hub's stand-in, and what must not stop training."""

import shutil
import threading

import pytest
from hub_run import hub_run, pushed, stand_in  # noqa: F401
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file
from talker import talker, talker_folder  # noqa: F401

from nanochat_hf.hub.push import checkpoint_pusher


def test_checkpoints_become_branches_and_a_failing_hub_does_not_stop_training(hub, run):
    said = []
    upload = checkpoint_pusher("you/base", log=said.append)
    upload(run / "sft", 500).result()
    files = pushed(hub, "you/base", branch="step-000500")
    assert {"model.safetensors", "tokenizer.json", "config.json"} <= set(files) and "metrics.json" not in files
    assert hub.repos["models", "you/base"].private and pushed(hub, "you/base") == {}
    hub.fail("POST", "/commit/", 503, times=50)
    upload(run / "sft", 1000).result()
    hub.faults.clear()
    assert said[-1].startswith("warning: step 1000 was not pushed") and "run the same command again" in said[-1]
    upload(run / "sft", 1500).result()
    assert "model.safetensors" in pushed(hub, "you/base", branch="step-001500")
    assert list(run.glob(".push-*")) == []


def test_a_checkpoint_that_is_no_numbers_is_not_sent(hub, run):
    said, path = [], run / "sft" / "model.safetensors"
    values = load_file(path)
    values[min(values)].fill_(float("inf"))
    path.unlink()  # a link
    save_file(values, path, metadata={"format": "pt"})
    checkpoint_pusher("you/base", log=said.append)(run / "sft", 500).result()
    assert "warning: step 500 was not pushed" in said[-1] and f"infinity in {min(values)}" in said[-1]
    assert list(hub.repos["models", "you/base"].branches) == ["main"]


def test_training_goes_on_while_a_checkpoint_is_uploaded_as_it_was(hub, run, monkeypatch):
    said, hold, send = [], threading.Event(), HfApi.upload_folder
    monkeypatch.setattr(HfApi, "upload_folder", lambda self, **what: hold.wait(60) and send(self, **what))
    upload, config = checkpoint_pusher("you/base", log=said.append), run / "sft" / "config.json"
    left, written = run / ".push-killed", config.read_bytes()
    left.mkdir()
    first = upload(run / "sft", 500)
    assert not left.exists() and not first.done()
    config.unlink()  # a link
    config.write_bytes(written + b"\n")
    second = upload(run / "sft", 1000)
    assert upload(run / "sft", 1500) is None and "step 1500 was not pushed: 2 earlier ones" in said[-1]
    hold.set()
    assert first.result() is second.result() is None and len(said) == 3
    files = [pushed(hub, "you/base", branch=f"step-{step:06d}")["config.json"] for step in (500, 1000)]
    assert files == [written, written + b"\n"]


@pytest.mark.parametrize(
    "error", [PermissionError("token refused"), RuntimeError("token refused")], ids=["hf_xet", "unknown"]
)  # the first is what hf_xet.XetAuthenticationError is
def test_a_failure_of_another_kind_does_not_stop_training_either(hub, run, monkeypatch, error):
    def refuse(*_, **__):
        raise error

    said = []
    upload = checkpoint_pusher("you/base", log=said.append)
    monkeypatch.setattr(HfApi, "upload_folder", refuse)
    upload(run / "sft", 500).result()
    assert said[-1].startswith("warning: step 500 was not pushed") and "token refused" in said[-1]


def test_a_disk_without_room_for_a_copy_does_not_stop_training_either(hub, run, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    said = []
    upload = checkpoint_pusher("you/base", log=said.append)
    monkeypatch.setattr(shutil, "copy", full)
    assert upload(run / "sft", 500) is None and list(run.glob(".push-*")) == []
    assert "step 500 was not pushed" in said[-1] and "No space left" in said[-1]
