"""Checks of hand-written kernels: a wrong one is disabled with one line; each kernel has a check, and passes it."""

import re
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny import make_config
from torch import nn

from nanochat_hf.kernels import backend as checks
from nanochat_hf.kernels import decode as decode_kernels
from nanochat_hf.kernels import float8, fused_cross_entropy, fused_decode, muon
from nanochat_hf.model import NanoChatConfig, NanoChatForCausalLM
from nanochat_hf.serve.decoder import Decoder
from nanochat_hf.train.fused_model import FusedTransformer

CPU = torch.device("cpu")
CONFIG = NanoChatConfig(
    vocab_size=256, num_tokens=250, hidden_size=96, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=1,
    head_dim=32, max_position_embeddings=64,
)  # fmt: skip
TRAINING = [name for name in checks.CHECKS if name not in ("decoding", "fused decoding")]


@pytest.fixture
def kernel(monkeypatch):
    """A function that registers a kernel adding `error` to ones, and returns its function and a list of its calls."""
    for name, value in {"CHECKS": {}, "disabled": set(), "_verified": set(), "triton": 1, "INTERPRETED": True}.items():
        monkeypatch.setattr(checks, name, value)

    def make(error, tolerance=0.01):
        calls = []

        def ones():
            if not checks.usable("adder", torch.ones(2)):
                return [torch.ones(2)]
            calls.append(1)
            return [error() if callable(error) else torch.ones(2) + error]

        @checks.check("adder", instead="ones")
        def cases(draw, config):
            yield tolerance, ones

        return ones, calls

    return make


def verify(config=CONFIG):
    return checks.verify(["adder"], config, CPU, torch.float32)


def test_a_kernel_that_is_right_is_used_and_checked_once(kernel, capsys):
    ones, calls = kernel(0.001)
    assert verify() == verify() == frozenset() and len(calls) == 1
    ones()
    assert len(calls) == 2 and capsys.readouterr().err == ""
    verify(make_config())  # another width is another variant, and so are other heads
    verify(NanoChatConfig(**CONFIG.to_diff_dict() | {"num_key_value_heads": 3}))
    assert len(calls) == 4


def fails():
    raise TypeError("flash_attn_func() got an unexpected keyword\nand more")


@pytest.mark.parametrize("error, reason", [
    (0.5, "off by 0.5 of"), (torch.nan, "off by nan"), (fails, "keyword"),
    (lambda: torch.ones(1, 2), "is (1, 2), not (2,)"),
])  # fmt: skip
def test_a_kernel_that_is_wrong_is_not_used_and_one_line_says_so(kernel, capsys, error, reason):
    ones, calls = kernel(error)
    assert verify() == verify() == {"adder"}
    assert len(calls) == 1 and torch.equal(ones()[0], torch.ones(2)) and len(calls) == 1
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "'adder' is wrong here" in line and reason in line and "ones instead" in line
    assert f"torch {torch.__version__.split('+')[0]}" in line


def test_fp8_that_is_wrong_is_bf16_training(tiny_model, monkeypatch):
    assert FusedTransformer(tiny_model, fp8=True).fp8
    monkeypatch.setattr(checks, "disabled", {"FP8"})
    monkeypatch.setattr("nanochat_hf.train.fused_model.disabled", checks.disabled)
    assert not FusedTransformer(tiny_model, fp8=True).fp8


def draw(device: str = "cpu", dtype: torch.dtype = torch.bfloat16):
    return partial(checks._draw, torch.Generator(device).manual_seed(0), dtype)


@pytest.mark.parametrize("name", TRAINING)
def test_each_check_runs_its_reference_anywhere(name):
    assert checks.fault(name, checks.CHECKS[name].cases(draw(), CONFIG)) is None


AMAX, LOSS, NESTEROV = float8.compute_amax, fused_cross_entropy.fused_linear_cross_entropy, muon.nesterov


def signed_amax(x, norms=False):
    return x.amax().float()[None], *AMAX(x, norms)[1:]


def loss_of_padding_too(hidden, weight, targets, cap, num_tokens, reduction):
    return LOSS(hidden, weight, targets, cap, len(weight), reduction)


def loss_without_the_softcaps_slope(hidden, weight, targets, cap, num_tokens, reduction):
    logits = F.linear(hidden, weight.to(hidden.dtype))[:, :num_tokens].float()
    logits = logits + (cap * torch.tanh(logits / cap) - logits).detach()
    return F.cross_entropy(logits, targets, reduction=reduction)


def loss_without_the_last_token(hidden, weight, targets, cap, num_tokens, reduction):
    logits = F.linear(hidden, weight.to(hidden.dtype))[:, :num_tokens].float()
    logits = (cap * torch.tanh(logits / cap)).index_fill(1, torch.tensor([num_tokens - 1]), -torch.inf)
    return F.cross_entropy(logits, targets, reduction=reduction)


def nesterov_of_skipped_steps_too(grads, buffers, mu, out, step_factor):
    NESTEROV(grads, buffers, mu, out, torch.ones(()))


@pytest.mark.parametrize("name, module, right, wrong", [
    ("Muon passes", muon, NESTEROV, nesterov_of_skipped_steps_too),
    ("FP8", float8, AMAX, signed_amax),
    ("fused cross-entropy", fused_cross_entropy, LOSS, loss_of_padding_too),
    ("fused cross-entropy", fused_cross_entropy, LOSS, loss_without_the_softcaps_slope),
    ("fused cross-entropy", fused_cross_entropy, LOSS, loss_without_the_last_token),
])  # fmt: skip
def test_a_check_finds_a_kernel_that_is_a_little_wrong(monkeypatch, name, module, right, wrong):
    def run(*arguments, **options):
        return (right if name in checks.disabled else wrong)(*arguments, **options)

    monkeypatch.setattr(module, right.__name__, run)
    assert "off by" in checks.fault(name, checks.CHECKS[name].cases(draw(), CONFIG))


def lively(device: str, **sizes) -> nn.Module:
    torch.manual_seed(0)
    model = NanoChatForCausalLM(NanoChatConfig(**CONFIG.to_diff_dict() | sizes)).to(device).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2) if parameter.ndim > 1 else parameter.data.uniform_(0.3, 1.2)
    return model


@torch.inference_mode()
def test_the_decoders_check_leaves_it_as_it_was():
    decoder = Decoder(lively("cpu"), 4, 60, [1, 2])
    before = {name: value.clone() for name, value in vars(decoder.state).items()}
    decoder.fast_step = lambda rows: decoder.plain_step(rows, 59)
    assert checks.fault("decoding", decode_kernels._cases(draw(), decoder)) is None
    decoder.fast_step = lambda rows: 1.1 * decoder.plain_step(rows, 59)
    assert "off by" in checks.fault("decoding", decode_kernels._cases(draw(), decoder))
    assert all(torch.equal(getattr(decoder.state, name), value) for name, value in before.items())
    assert not any(cache.any() for cache in decoder.k + decoder.v)


@pytest.mark.gpu
@pytest.mark.parametrize("width, heads", [(1536, 12), (768, 6), (320, 5)])
@pytest.mark.parametrize("name", TRAINING)
def test_each_kernel_passes_its_check_on_a_gpu(name, width, heads):
    sizes = {"hidden_size": width, "num_attention_heads": heads, "num_key_value_heads": heads, "vocab_size": 8192}
    config = NanoChatConfig(**CONFIG.to_diff_dict() | sizes | {"head_dim": width // heads})
    assert checks.fault(name, checks.CHECKS[name].cases(draw("cuda"), config)) is None


@pytest.mark.gpu
def test_the_decoder_passes_its_check_on_a_gpu():
    sizes = {"hidden_size": 768, "num_attention_heads": 6, "num_key_value_heads": 6, "head_dim": 128}
    decoder = Decoder(lively("cuda", **sizes, max_position_embeddings=2048), 4, 900, [1, 2])
    assert decoder.fast
    with torch.inference_mode():
        assert checks.fault("decoding", decode_kernels._cases(draw("cuda"), decoder)) is None
        assert checks.fault("fused decoding", fused_decode._cases(draw("cuda"), decoder)) is None
        decoder.w["o0"].mul_(1.3)
        fast, plain = decoder.fast_step, decoder.w["o0"] / 1.3
        decoder.fast_step = lambda rows: (fast(rows), decoder.w["o0"].copy_(plain))[0]
        assert "off by" in checks.fault("decoding", decode_kernels._cases(draw("cuda"), decoder))


def test_a_package_that_is_not_installed_differs_from_one_that_does_not_fit(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(checks, "unloaded", {})
    assert checks.unavailable("no-such-package", ImportError("x")) is None
    for _ in range(2):  # two modules of kernels import it
        checks.unavailable("torch", AttributeError("module has no attribute 'flash_attn_func'\nmore"))
    assert checks.unloaded == {
        "no-such-package": "not installed", "torch": "AttributeError: module has no attribute 'flash_attn_func'",
    }  # fmt: skip
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and line.startswith("torch is not used: AttributeError") and "a GPU" in line


def test_every_kernel_of_triton_has_a_check():
    package = Path(checks.__file__).parent
    assert set(muon.MUON_KERNELS) <= set(TRAINING)
    for path in package.rglob("*.py"):
        text = path.read_text()
        if "@triton.jit" in text:
            assert "@check(" in text, f"{path.name} has kernels and no check"
        for name in re.findall(r'usable\("([^"]+)", ', text):
            assert name in checks.CHECKS or path.stem == "backend", name
