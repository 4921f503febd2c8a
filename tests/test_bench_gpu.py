"""The training benchmark's own parts: FlashAttention-4 for the baseline, which contenders there are, the ratios."""

import importlib.util
import sys
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch

spec = importlib.util.spec_from_file_location("bench_gpu", Path(__file__).parents[1] / "scripts" / "bench_gpu.py")
bench = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench)


def install(monkeypatch, **modules) -> None:
    """Make modules importable, by name with _ for a dot: dictionaries of what is in them."""
    for name, members in modules.items():
        parts = name.replace("__", ".").split(".")
        for i in range(1, len(parts) + 1):
            module = sys.modules.get(".".join(parts[:i])) or ModuleType(parts[i - 1])
            monkeypatch.setitem(sys.modules, ".".join(parts[:i]), module)
            if i > 1:
                monkeypatch.setattr(sys.modules[".".join(parts[: i - 1])], parts[i - 1], module, raising=False)
        vars(module).update(members)


def probabilities(q, k, scale, left):
    """(B, H, T, T) by the definition; left None is causal attention, else so many keys back."""
    distance = torch.arange(q.shape[1])[:, None] - torch.arange(q.shape[1])
    hidden = (distance < 0) | (distance > (q.shape[1] if left is None else left))
    return (scale * torch.einsum("bthd,bshd->bhts", q, k)).masked_fill(hidden, -torch.inf).softmax(-1)


def attention(q, k, v, scale, left):
    return torch.einsum("bhts,bshd->bthd", probabilities(q, k, scale, left), v)


def forward(q, k, v, softmax_scale, return_lse, causal=False, window_size_left=None, window_size_right=None):
    assert causal != (window_size_right == 0)
    return attention(q, k, v, softmax_scale, window_size_left), q.new_zeros(q.shape[0], q.shape[2], q.shape[1])


def backward(q, k, v, out, grad, lse, scale, dq, dk, dv, causal=False, window_size_left=None, window_size_right=0):
    p = probabilities(q, k, scale, window_size_left)  # inside of an operator there is no autograd
    inner = torch.einsum("bthd,bshd->bhts", grad, v)
    inner = scale * p * (inner - (inner * p).sum(-1, keepdim=True))
    dv.copy_(torch.einsum("bhts,bthd->bshd", p, grad))
    dq.copy_(torch.einsum("bhts,bshd->bthd", inner, k))
    dk.copy_(torch.einsum("bhts,bthd->bshd", inner, q))


@pytest.mark.slow
def test_flash_attention_4_replaces_3_in_a_whole_compiled_graph(monkeypatch):
    install(monkeypatch, flash_attn__cute__interface={"_flash_attn_fwd": forward, "_flash_attn_bwd": backward})
    flash, (q, k, v, grad) = bench.flash4(), torch.randn(4, 2, 12, 3, 8)
    for window, left in (((12, 0), None), ((-1, -1), None), ((3, 0), 3)):
        leaves, plain = ([x.clone().requires_grad_() for x in (q, k, v)] for _ in range(2))
        run = torch.compile(partial(flash, causal=True, window_size=window), fullgraph=True, backend="aot_eager")
        out, exact = run(*leaves), attention(*plain, 8**-0.5, left)
        assert torch.allclose(out, exact, atol=1e-5)
        grads = torch.autograd.grad(out, leaves, grad)
        for a, b in zip(grads, torch.autograd.grad(exact, plain, grad)):
            assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("name", ["ours:fa4", "baseline:L", "theirs"])
def test_an_unknown_contender_is_an_error(name):
    with pytest.raises(SystemExit, match="is no contender"):
        bench.contender(name, "d12x1")


def test_ratios_are_ours_over_the_fastest_baseline_by_precision():
    speeds = {"ours": 120, "ours:fp8": 150, "baseline:fa4": 100, "baseline:sdpa": 80, "baseline:fa4+fp8": 125}
    rows = [("d24x16", name, {"tok_s": speed}) for name, speed in speeds.items()] + [("d12x32", "ours", {"tok_s": 1})]
    assert bench.ratios(rows) == ["d24x16   bf16  1.200", "d24x16   fp8   1.200"]


def test_in_rounds_all_contenders_are_timed_in_turn_and_one_that_fails_is_left_out(tmp_path, capsys):
    stub = tmp_path / "contender.py"
    stub.write_text(
        "import json, sys\n"
        "name, config = sys.argv[-2:]\n"
        "if name == 'ours:L': sys.exit('no kernel')\n"
        "print('noise'); print(json.dumps({'first_step_s': 1}), flush=True)\n"
        "for i, _ in enumerate(sys.stdin):\n"
        "    print(json.dumps({'tok_s': (120, 90, 100)[i] + 5 * (name == 'ours')}), flush=True)\n"
        "    print('{}', flush=True)\n"
    )
    pairs = [("d24x16", name) for name in ("ours", "baseline:fa4", "ours:L")]
    rows = bench.interleave([sys.executable, str(stub)], pairs, 3, float("inf"))
    speeds = {name: row["tok_s"] for _, name, row in rows}
    assert speeds == {"ours": 105, "baseline:fa4": 100} and bench.ratios(rows) == ["d24x16   bf16  1.050"]
    printed = capsys.readouterr().out
    order = [line.split()[2] for line in printed.splitlines() if line[:1].isdigit()]
    assert order == ["ours", "baseline:fa4", "baseline:fa4", "ours", "ours", "baseline:fa4"] and "no kernel" in printed
    assert bench.interleave([sys.executable, str(stub)], pairs[:1], 3, 0.0) == []
