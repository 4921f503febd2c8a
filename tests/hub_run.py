"""The fixtures of the Hub's tests: a finished run folder, and the stand-in with the real client pointed at it."""

import os

import pytest
from hub_standin import Hub
from huggingface_hub import close_session, constants

from nanochat_hf.hub import push as hub_client
from nanochat_hf.hub import push as serve_hub
from nanochat_hf.run import save_json

TOKEN = "hf_" + "Secret" * 6


@pytest.fixture(name="run")
def hub_run(talker_folder, tmp_path):
    """A run folder with a finished SFT stage, an unfinished RL stage and an evaluation."""
    folder = tmp_path / "run"
    (folder / "sft").mkdir(parents=True)
    for path in talker_folder.iterdir():
        os.link(path, folder / "sft" / path.name)
    metrics = {
        "finished": True,
        "commit": "abc123",
        "started": 1.0,
        "wall_time_s": 120.0,
        "tokens": 5000,
        "history": [{"step": step, "train_loss": 3.0 / step, "time": float(step)} for step in range(1, 5)],
        "hardware": {"device": "test machine", "num_processes": 1},
        "versions": {"torch": "2"},
        "mixture": [
            {"dataset": "openai/gsm8k:main", "rows": 3, "tokens": 40},
            {"dataset": "primer", "rows": 1, "tokens": 9},
        ],
    }
    (folder / "sft" / "metrics.json").unlink()
    save_json(folder / "sft" / "metrics.json", metrics)
    (folder / "rl").mkdir()
    results = {"sft": {"facts": {"value": 0.91, "stderr": 0.01, "n": 400, "baseline": 0.1, "higher_is_better": True}}}
    evaluation = {"finished": True, "started": 2.0, "wall_time_s": 5.0, "results": results}
    save_json(folder / "eval" / "metrics.json", evaluation)
    return folder


@pytest.fixture(name="hub")
def stand_in(monkeypatch):
    """The stand-in, with this process's client and its children pointed at it and logged in."""
    with Hub(token=TOKEN) as server:
        environment = {"HF_ENDPOINT": server.url, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0"}
        for key, value in environment.items():
            monkeypatch.setenv(key, value)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        downloads = constants.HUGGINGFACE_CO_URL_TEMPLATE.split("/", 3)[3]
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{server.url}/{downloads}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(hub_client.time, "sleep", lambda seconds: None)
        close_session()
        yield server
    close_session()


@pytest.fixture(name="no_check")
def without_check(monkeypatch):
    """Leave out the load-back in another process, which one slow test does for real."""
    monkeypatch.setattr(serve_hub, "check_loaded_back", lambda *_: 0.0)


def pushed(hub, name="you/small", kind="models", branch="main"):
    return hub.repos[kind, name].files(branch)[1]
