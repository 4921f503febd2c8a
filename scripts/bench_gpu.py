"""Training speed on one GPU, ours beside karpathy/nanochat: tok/s, MFU, memory, time to the first step.

    python scripts/bench_gpu.py [--configs d24x16,d12x32] [--baseline PATH_OF_A_NANOCHAT_CHECKOUT] [--steps 6]

A configuration is depth x micro-batch size, of sequences of 2,048 random token ids; a step is four micro-batches and
the optimizer. Each contender runs in its own process and is timed when its GPU is warm: after a pause, as while a
compiler runs, it is up to 3 % faster for some seconds. Contenders are `ours` and `baseline`, with options after a
colon, joined by +: `fp8`; of ours `L`, full attention, and `plain`, without FlashAttention-4 and quack (what
`pip install` gives without the kernels extra, and what an A100 runs); of the baseline its attention. Its
FlashAttention-3 comes from the Hub; FlashAttention-4 (`fa4`), FlexAttention with the same windows (`flex`) or its own
SDPA (`sdpa`) replace it; with none of them it takes what is installed. The last table has our speed over the
baseline's, by precision.

With --rounds N all contenders stay alive, and N times each is timed after the other; the figures are medians. That
needs memory for the weights and optimizer states of all, and of one the rest.
MFU is counted as upstream counts it: 6 FLOPs per matrix parameter plus attention by window, over the bf16 peak.
"""

import argparse
import itertools
import json
import re
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Annotated

from annotated_types import Ge, Le

from nanochat_hf.config import NotNegative, Parser, Size
from nanochat_hf.errors import fail, guarded

if __name__ == "__main__":  # --help is shown before the large imports
    parser = Parser(__doc__)
    parser.add_argument("--configs", default="d24x16,d12x32")
    parser.add_argument(
        "--contenders", help="default: ours,ours:fp8 and, with --baseline, baseline:fa4,baseline:fa4+fp8"
    )
    parser.add_argument("--baseline", "--peer", help="path of a karpathy/nanochat checkout")
    parser.option("--steps", Size, default=6, help="timed steps")
    parser.option("--warmup", NotNegative, default=12, help="seconds of steps before the timed ones")
    parser.option("--rounds", Annotated[int, Ge(0), Le(10**5)], default=0, help="time all in turn; 0: each alone")
    parser.option("--budget", NotNegative, default=3600, help="seconds after which no round begins")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    ARGUMENTS = guarded(parser.parse_args)

import torch
from torch import Tensor

from nanochat_hf.optim.scaling import peak_flops

LENGTH, GRAD_ACCUM_STEPS = 2048, 4
BEGUN = time.time()
OPTIONS = {"ours": {"L", "fp8", "plain"}, "baseline": {"fa4", "flex", "fp8", "sdpa"}}  # of the contenders


def ours(depth: int, pattern: str, fp8: bool):
    """This project's training step: function of ids and targets to the loss, optimizer, FLOPs per token."""
    from nanochat_hf.model.modeling_nanochat import NanoChatForCausalLM
    from nanochat_hf.optim.muon_adamw import MuonAdamW, param_groups
    from nanochat_hf.optim.scaling import plan
    from nanochat_hf.stage_configs import PretrainConfig
    from nanochat_hf.train.fused_model import FusedTransformer

    recipe = plan(PretrainConfig(depth, window_pattern=pattern), 32768)
    with torch.device("cuda"):
        model = NanoChatForCausalLM(recipe.model_config)
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            module.to(torch.bfloat16)
    optimizer = MuonAdamW(param_groups(model, recipe.groups))
    fused = FusedTransformer(model, compile=True, fp8=fp8)
    if fused.fp8 != fp8:
        sys.exit("error: the FP8 kernels are wrong here")
    return fused, optimizer, recipe.flops_per_token


def baseline(depth: int, pattern: str, attention: str, fp8: bool):
    """The same of karpathy/nanochat, whose checkout is on sys.path."""
    from nanochat import flash_attention
    from nanochat.gpt import GPT, GPTConfig

    width = depth * 64
    shape = {"n_layer": depth, "n_embd": width, "n_head": width // 128, "n_kv_head": width // 128}
    with torch.device("meta"):
        model = GPT(GPTConfig(**shape, window_pattern=pattern))
    model.to_empty(device="cuda")
    model.init_weights()
    flops = model.estimate_flops()  # before FP8: it counts the matrices of one class, which the conversion replaces
    if fp8:
        from nanochat.fp8 import convert_to_float8_training

        def wide(module, name):  # as its scripts/base_train.py chooses
            sizes = module.in_features, module.out_features
            return min(sizes) >= 128 and not any(size % 16 for size in sizes)

        convert_to_float8_training(model, module_filter_fn=wide)
    if attention in ("fa4", "flex"):
        windows = {window for window, _ in model.window_sizes}
        flash_attention.flash_attn.flash_attn_func = flash4() if attention == "fa4" else flex(windows)
    optimizer = model.setup_optimizer()
    return torch.compile(model, dynamic=False), optimizer, flops


def flex(windows: set[int]):
    """FlexAttention with the signature of FlashAttention-3."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def masked(window):
        visible = lambda b, h, q, k: (q >= k) & (q - k <= window)  # noqa: E731
        return create_block_mask(visible, None, None, LENGTH, LENGTH, device="cuda")

    masks = {window: masked(window) for window in windows}

    def attend(q, k, v, causal=False, window_size=(-1, -1)):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return flex_attention(q, k, v, block_mask=masks[window_size[0]]).transpose(1, 2)

    return attend


def flash4():
    """FlashAttention-4 with the signature of FlashAttention-3, as a custom operator: nanochat compiles one graph."""
    from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd

    def extent(left: int, length: int) -> dict:
        whole = left < 0 or left >= length
        return {"causal": True} if whole else {"window_size_left": left, "window_size_right": 0}

    @torch.library.custom_op("baseline::attend", mutates_args=())
    def forward(q: Tensor, k: Tensor, v: Tensor, left: int) -> tuple[Tensor, Tensor]:
        scale = q.shape[-1] ** -0.5
        out, lse, *_ = _flash_attn_fwd(q, k, v, softmax_scale=scale, return_lse=True, **extent(left, q.shape[1]))
        return out, lse

    @forward.register_fake
    def _(q, k, v, left):
        return torch.empty_like(q), q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32)

    @torch.library.custom_op("baseline::attend_grad", mutates_args=())
    def backward(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, left: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        options = extent(left, q.shape[1])
        _flash_attn_bwd(q, k, v, out, grad.contiguous(), lse, q.shape[-1] ** -0.5, **options, dq=dq, dk=dk, dv=dv)
        return dq, dk, dv

    @backward.register_fake
    def _(grad, q, k, v, out, lse, left):
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)

    def save(ctx, inputs, output):
        q, k, v, ctx.left = inputs
        ctx.save_for_backward(q, k, v, *output)

    forward.register_autograd(
        lambda ctx, grad, _: (*backward(grad, *ctx.saved_tensors, ctx.left), None), setup_context=save
    )
    return lambda q, k, v, causal=False, window_size=(-1, -1): forward(q, k, v, window_size[0])[0]


class Contender:
    """A training step on the GPU: built, compiled and run once. first_step_s: the seconds that this took."""

    def __init__(self, build, batch: int):
        launched = time.time()
        self.loss_of, self.optimizer, self.flops = build()
        self.ids = torch.randint(0, 32768, (GRAD_ACCUM_STEPS, batch, LENGTH + 1), device="cuda")
        for wait in (*[5] * 20, 0):
            try:
                self.step()
                torch.cuda.synchronize()
                break
            except torch.OutOfMemoryError:  # of others that take their first step now
                if not wait:
                    raise
            self.optimizer.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            time.sleep(wait)
        self.first_step_s = time.time() - launched

    def step(self) -> tuple[torch.cuda.Event, Tensor]:
        """Returns: an event before the optimizer, and the last loss."""
        for part in self.ids:
            loss = self.loss_of(part[:, :-1].contiguous(), part[:, 1:].contiguous()) / GRAD_ACCUM_STEPS
            loss.backward()
        micro = torch.cuda.Event(enable_timing=True)
        micro.record()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return micro, loss.detach()

    def measure(self, steps: int, warmup: float) -> dict:
        """Figures of `steps` steps after at least one step and `warmup` seconds of them."""
        warm = time.time() + warmup
        while True:
            self.step()
            torch.cuda.synchronize()
            if time.time() > warm:
                break
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(steps):
            micro, loss = self.step()
        end.record()
        torch.cuda.synchronize()
        if not loss.isfinite():  # what is not finite also takes less power, so it would look fast
            sys.exit("error: the loss is not finite")
        speed = self.ids[..., 1:].numel() * steps / (start.elapsed_time(end) / 1e3)
        name = torch.cuda.get_device_name()
        peak = peak_flops(name) or float("nan")
        return {
            "tok_s": speed, "mfu": speed * self.flops / peak,
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30, "first_step_s": self.first_step_s,
            "optimizer_ms": micro.elapsed_time(end), "device": name,
        }  # fmt: skip


class Hidden:
    """A finder that hides FlashAttention-4 and quack from this process."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "quack" or name.startswith("flash_attn.cute"):
            raise ImportError("hidden by the benchmark")


def parse(name: str, config: str) -> tuple[str, set[str], int, int]:
    """Kind, options, depth and micro-batch size of a contender, or one line that says what is wrong."""
    kind, _, words = name.partition(":")
    options, shape = set(words.split("+")) - {""}, re.fullmatch(r"d([1-9]\d*)x([1-9]\d*)", config)
    if kind not in OPTIONS or options - OPTIONS[kind] or len(options & {"fa4", "flex", "sdpa"}) > 1:
        fail(f"{name!r} is no contender; ours takes L, fp8, plain and baseline fp8 and one of fa4, flex, sdpa")
    if not shape:
        fail(f"{config!r} is no configuration; say d24x16 for depth 24 and micro-batch size 16")
    return kind, options, int(shape[1]), int(shape[2])


def contender(name: str, config: str) -> Contender:
    """Build one in this process, and take its first step."""
    kind, options, depth, batch = parse(name, config)
    if "plain" in options:
        sys.meta_path.insert(0, Hidden())
    pattern, fp8 = "L" if options & {"sdpa", "L"} else "SSSL", "fp8" in options
    attention = next(iter(options - {"fp8"}), "")
    build = partial(ours, depth, pattern, fp8) if kind == "ours" else partial(baseline, depth, pattern, attention, fp8)
    return Contender(build, batch)


def serve(name: str, config: str, steps: int, warmup: float, rounds: bool) -> None:
    """Print the figures of one contender as JSON: once, or, with `rounds`, for each line on stdin."""
    run = contender(name, config)
    if not rounds:
        print(json.dumps(run.measure(steps, warmup)))
        return
    torch.cuda.empty_cache()
    print(json.dumps({"first_step_s": run.first_step_s}), flush=True)
    for _ in sys.stdin:
        print(json.dumps(run.measure(steps, warmup)), flush=True)
        torch.cuda.empty_cache()
        print(json.dumps({}), flush=True)


class Child:
    """A contender in its own process that waits for its rounds."""

    def __init__(self, command: list[str], config: str, name: str):
        self.config, self.name, self.rows = config, name, []
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (it lives as long as the process)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.errors, "text": True}
        self.process = subprocess.Popen([*command, "--one", name, config], **pipes)

    def read(self) -> dict | None:
        """The next line of figures; None: the process has ended, and its error is printed."""
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        self.errors.seek(0)
        print(f"{self.config} {self.name} failed:\n{self.errors.read()[-2000:]}", flush=True)
        return None

    def round(self) -> bool:
        """Whether it could be timed."""
        try:
            self.process.stdin.write("round\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass
        row = self.read()
        if row:
            self.rows.append(row)
        return row is not None and self.read() is not None

    def median(self) -> dict:
        return sorted(self.rows, key=lambda row: row["tok_s"])[len(self.rows) // 2]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def interleave(command: list[str], pairs: list[tuple[str, str]], rounds: int, end: float) -> list[tuple]:
    """Rows (config, contender, figures): medians over rounds in which each is timed in turn, until time `end`.

    The baselines, which compile longest, start together; ours start one by one, beside idle baselines.
    """
    children, slow = [], [pair for pair in pairs if pair[1].startswith("baseline")]
    starting = [Child(command, *pair) for pair in slow]
    for child in starting:
        children += [child] if child.read() else []
        print(child.config, child.name, f"ready after {time.time() - BEGUN:.0f} s", flush=True)
    for pair in pairs:
        if pair not in slow and time.time() < end:
            child = Child(command, *pair)
            children += [child] if child.read() else []
            print(*pair, f"ready after {time.time() - BEGUN:.0f} s", flush=True)
    children.sort(key=lambda child: pairs.index((child.config, child.name)))
    longest = 0.0
    for turn in range(rounds):
        begun = time.time()
        if begun + longest > end:
            print(f"{turn} of {rounds} rounds, then the time was over")
            break
        for child in children[turn % 2 :] + children[: turn % 2]:
            if child.process.poll() is None and child.round():
                print(turn, child.config, child.name, child.rows[-1], flush=True)
        longest = max(longest, time.time() - begun)
    for child in children:
        child.close()
    return [(child.config, child.name, child.median()) for child in children if child.rows]


def one_by_one(command: list[str], pairs: list[tuple[str, str]]) -> list[tuple]:
    """Rows (config, contender, figures), each contender alone on the GPU."""
    rows = []
    for config, name in pairs:
        result = subprocess.run([*command, "--one", name, config], capture_output=True, text=True, check=False)
        if result.returncode:
            print(f"{config} {name} failed:\n{result.stderr[-2000:]}", flush=True)
            continue
        rows.append((config, name, json.loads(result.stdout.splitlines()[-1])))
        print(rows[-1], flush=True)
    return rows


def ratios(rows: list[tuple[str, str, dict]]) -> list[str]:
    """By configuration and precision: our speed, at its fastest, over that of the fastest baseline."""
    lines = []
    for config, fp8 in itertools.product(dict.fromkeys(config for config, _, _ in rows), (False, True)):
        speeds = {"ours": [], "baseline": []}
        for other, name, row in rows:
            if other == config and ("fp8" in name) == fp8:
                speeds[name.partition(":")[0]].append(row["tok_s"])
        if all(speeds.values()):
            ratio = max(speeds["ours"]) / max(speeds["baseline"])
            lines.append(f"{config:8} {'fp8' if fp8 else 'bf16':5} {ratio:.3f}")
    return lines


def main(arguments: argparse.Namespace) -> None:
    if arguments.one:
        sys.path.insert(0, arguments.baseline or ".")
        serve(*arguments.one, arguments.steps, arguments.warmup, arguments.rounds > 0)
        return
    default = "ours,ours:fp8" + (",baseline:fa4,baseline:fa4+fp8" if arguments.baseline else "")
    names = (arguments.contenders or default).replace("peer", "baseline").split(",")
    pairs = list(itertools.product(arguments.configs.split(","), dict.fromkeys(names)))
    for config, name in pairs:
        parse(name, config)
    checkout = Path(arguments.baseline or ".")
    if any(name.startswith("baseline") for name in names) and not (checkout / "nanochat" / "gpt.py").is_file():
        fail(f"--baseline: {checkout} is no checkout of karpathy/nanochat: it has no nanochat/gpt.py")
    if not torch.cuda.is_available():
        fail("bench_gpu needs a CUDA device; make bench measures a CPU")
    command = [sys.executable, __file__, "--steps", str(arguments.steps), "--warmup", str(arguments.warmup)]
    command += ["--rounds", str(arguments.rounds)]
    command += ["--baseline", arguments.baseline] if arguments.baseline else []
    end = BEGUN + arguments.budget
    rows = interleave(command, pairs, arguments.rounds, end) if arguments.rounds else one_by_one(command, pairs)
    if not rows:
        fail("no contender was timed: see above")
    table(rows)


def table(rows: list[tuple[str, str, dict]]) -> None:
    print(f"\n{'config':8} {'contender':17} {'tok/s':>9} {'MFU':>6} {'GiB':>6} {'optimizer':>10} {'first step':>10}")
    for config, name, row in rows:
        print(
            f"{config:8} {name:17} {row['tok_s']:9,.0f} {row['mfu']:6.1%} {row['peak_gib']:6.1f} "
            f"{row['optimizer_ms']:7.1f} ms {row['first_step_s']:8.1f} s"
        )
    print(*["", *ratios(rows)], sep="\n")


if __name__ == "__main__":
    guarded(lambda: main(ARGUMENTS))
