"""What the tests share: no network, one thread, a small tokenizer and a two-layer model made in the process."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import gc
from functools import cache

import pytest
import torch
from huggingface_hub import close_session
from talker import chat_folder, talker, talker_folder  # noqa: F401  (trained once for all files)

import nanochat_hf  # noqa: F401  (registers the model)
from nanochat_hf import run
from nanochat_hf.kernels import backend as kernel_checks

torch.set_num_threads(1)
run.versions = cache(run.versions)  # read from two hundred packages in every stage


def pytest_collection_finish():
    gc.freeze()  # each collection would take seconds to look through the libraries


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):  # keywords would hold the folders' names, too
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def kernels_stay_in_use():
    """A kernel that fails its check on this machine fails the test that used it, and no other."""
    yield
    lost = set(kernel_checks.disabled)
    kernel_checks.disabled.clear()
    assert not lost, f"kernels that are wrong here: {lost}"


@pytest.fixture(scope="session")
def tokenizer():
    """A byte-level BPE of 512 tokens, trained on the demo's own text."""
    from nanochat_hf.data.tokenizer import train_bpe
    from nanochat_hf.demo import corpus as primer

    texts = [text for _, text in zip(range(2000), primer.documents("train", seed=0))]
    return train_bpe(iter(texts), vocab_size=512)


@pytest.fixture
def tiny_config(tokenizer):
    """Second generation, two layers of width 64, windows of 32 in a context of 128."""
    from nanochat_hf.model.configuration_nanochat import NanoChatConfig

    return NanoChatConfig(
        vocab_size=-(-len(tokenizer) // 64) * 64, num_tokens=len(tokenizer), max_position_embeddings=128,
        hidden_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        **{f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")},
    )  # fmt: skip


@pytest.fixture
def tiny_model(tiny_config):
    from nanochat_hf.model.modeling_nanochat import NanoChatForCausalLM

    torch.manual_seed(0)
    return NanoChatForCausalLM(tiny_config).eval()


@pytest.fixture
def lively_model(tiny_model):
    """Random weights large enough that answers differ by more than rounding."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in tiny_model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return tiny_model


@pytest.fixture
def tiny_folder(tiny_model, tokenizer, tmp_path):
    """The tiny model with its tokenizer in a folder, as a finished stage leaves it."""
    tiny_model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture(scope="session")
def hub_server():
    from hub_standin import Hub

    with Hub() as server:
        yield server


@pytest.fixture
def hub(hub_server, monkeypatch, tmp_path):
    """A small Hub over HTTP (hub_standin.py), empty and logged in; failed requests are repeated at once."""
    monkeypatch.setattr("nanochat_hf.data.hub_files.RETRY_DELAYS", (0, 0, 0))
    hub_server.connect(monkeypatch, str(tmp_path / "cache"))
    yield hub_server
    close_session()


@pytest.fixture
def fresh_accelerator():
    """Stages of one process choose their own precision: the pipeline resets this between them, too."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state()
    GradientState._reset_state()
