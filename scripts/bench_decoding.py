"""Decoding speed: tokens/s, share of the memory bandwidth, time to first token, warm-up.

Decoding reads every weight and every key once per step, so bandwidth is its limit; MBU (model bandwidth utilization)
is the share of the data sheet's bandwidth that those reads amount to. A random model is as fast as a trained one.

python scripts/bench_decoding.py --depth 12      # a table, and JSON in the last line
"""

import argparse
import json
import re
import time
from typing import Annotated

from annotated_types import Ge, Le

from nanochat_hf.config import Length, Parser, Place, Size
from nanochat_hf.errors import InputError, guarded

if __name__ == "__main__":  # --help is shown before the large imports
    parser = Parser("Measure the decoding speed of a random or a given model.")
    parser.option("--depth", Size, default=12, help="layers of a random model, width 64 x depth")
    parser.option("--model", Place, help="a checkpoint folder or Hub id instead")
    parser.option("--batches", list[Size], default=[1, 8, 32, 128], help="numbers of samples at a time")
    parser.option("--prompt", Length, default=512, help="tokens of the prompt")
    parser.option(
        "--tokens", Annotated[Length, Ge(2)], default=128, help="new tokens, of which the first is not timed"
    )
    parser.option("--temperature", Annotated[float, Ge(0), Le(5)], default=1.0, help="of sampling")
    parser.option("--length", Length, help="tokens allocated per slot (default: prompt + new + 1)")
    parser.add_argument("--profile", action="store_true", help="list the kernels of 16 steps of the largest batch")
    ARGUMENTS = guarded(parser.parse_args)

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from nanochat_hf.loading import load_model
from nanochat_hf.serve.engine import Engine, Request

PEAK_BANDWIDTH = {"B200": 8.0e12, "H200": 4.8e12, "H100": 3.35e12, "A100": 2.04e12, "L40S": 0.864e12, "L4": 0.3e12}
COLUMNS = ("batch", "tok/s", "incl. prefill", "MBU", "TTFT ms", "warm-up s")
LINE = "{:>6} {:>9} {:>13} {:>6} {:>8} {:>9}"


def peak_bandwidth(device: torch.device) -> float | None:
    """Bytes per second that the device's memory can move by its data sheet; None if unknown."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for part, peak in PEAK_BANDWIDTH.items() if part in name), None)


def bytes_per_step(decoder, lengths: list[int]) -> int:
    """Bytes that one step must read: every matrix once, and the keys and values of slots of these lengths."""
    matrices = sum(w.numel() for name, w in decoder.w.items() if re.match(r"qkv|o\d|fc|head", name))
    keys = sum(min(n, cache.shape[2]) for n in lengths for cache in decoder.k)
    return (matrices + keys * 2 * decoder.kv_heads * decoder.head_dim) * decoder.dtype.itemsize


def run_batch(engine: Engine, requests: list[Request]) -> dict:
    """Returns: tokens_per_second (without prefill and first token), end_to_end, and ttft_s of one batch."""
    start = time.perf_counter()
    for request in requests:
        engine.submit(request)
    first, early, total = None, 0, 0
    while engine.busy:
        new = sum(len(tokens) for _, tokens in engine.advance())
        total += new
        if new and first is None:
            first, early = time.perf_counter(), new
    end = time.perf_counter()
    rate = (total - early) / (end - first)
    return {"tokens_per_second": rate, "end_to_end": total / (end - start), "ttft_s": first - start}


def bench_decoding(
    model,
    batch: int,
    prompt_length: int = 512,
    new_tokens: int = 128,
    temperature: float = 1.0,
    rounds: int = 3,
    length: int | None = None,
) -> dict:
    """Decoding speed: the best of `rounds`, `batch` samples of one prompt that is prefilled once.

    Returns:
        {batch, tokens_per_second, end_to_end, ttft_s, warm_up_s (kernels and graphs, first run), mbu (bytes that a
        step must read / time / the data sheet's peak; None on unknown devices), peak_memory_bytes}.
    """
    device = model.model.embed_tokens.weight.device
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    prompt = torch.randint(0, 256, (prompt_length,), generator=torch.Generator().manual_seed(0)).tolist()

    def requests(turn: int) -> list[Request]:
        return [Request(prompt, new_tokens, temperature, 50, seed=turn * batch + i) for i in range(batch)]

    begin = time.perf_counter()
    engine = Engine(model, None, batch, length or prompt_length + new_tokens + 1)
    run_batch(engine, requests(0))
    warm_up = time.perf_counter() - begin
    runs = [run_batch(engine, requests(turn + 1)) for turn in range(rounds)]
    best = max(runs, key=lambda run: run["tokens_per_second"]) | {"ttft_s": min(run["ttft_s"] for run in runs)}
    needed, peak = bytes_per_step(engine.decoder, [prompt_length + new_tokens // 2] * batch), peak_bandwidth(device)
    mbu = needed * best["tokens_per_second"] / batch / peak if peak else None
    memory = torch.cuda.max_memory_allocated(device) if cuda else None
    return {"batch": batch, **best, "warm_up_s": warm_up, "mbu": mbu, "peak_memory_bytes": memory}


def profile_steps(model, batch: int, prompt_length: int, steps: int = 16) -> str:
    """A table of where `steps` decoding steps spend their time, by kernel."""
    decoder = Engine(model, None, batch, prompt_length + 64).decoder
    decoder.schedule({slot: Request([1] * prompt_length, 60, 1.0, 50) for slot in range(batch)})
    for _ in range(2):
        decoder.step(batch, prompt_length + 2)
    with torch.profiler.profile() as profile:
        for i in range(steps):
            decoder.step(batch, prompt_length + 3 + i)
        if decoder.device.type == "cuda":
            torch.cuda.synchronize()
    order = "self_cuda_time_total" if decoder.device.type == "cuda" else "self_cpu_time_total"
    return profile.key_averages().table(sort_by=order, row_limit=16, max_name_column_width=60)


def main(args: argparse.Namespace) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.length and args.length <= args.prompt + args.tokens:
        raise InputError(f"--length must be above {args.prompt + args.tokens}, the tokens of prompt and answer")
    if args.model:
        model = load_model(args.model)
    else:
        sizes = {"hidden_size": 64 * args.depth, "num_attention_heads": max(args.depth // 2, 1)}
        config = AutoConfig.for_model("nanochat_hf", num_hidden_layers=args.depth, **sizes)
        model = AutoModelForCausalLM.from_config(config)
    model = model.to(device, torch.bfloat16 if device == "cuda" else torch.float32).eval()
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    print(f"{name}, prompt {args.prompt}, {args.tokens} new tokens")
    print(LINE.format(*COLUMNS))
    rows = []
    for batch in args.batches:
        row = bench_decoding(model, batch, args.prompt, args.tokens, args.temperature, length=args.length)
        rows.append(row)
        mbu = "-" if row["mbu"] is None else f"{row['mbu']:.1%}"
        rates = f"{row['tokens_per_second']:,.0f}", f"{row['end_to_end']:,.0f}"
        print(LINE.format(batch, *rates, mbu, f"{1000 * row['ttft_s']:.1f}", f"{row['warm_up_s']:.1f}"), flush=True)
    if args.profile:
        print(profile_steps(model, rows[-1]["batch"], args.prompt))
    print(json.dumps(rows))


if __name__ == "__main__":
    guarded(lambda: main(ARGUMENTS))
