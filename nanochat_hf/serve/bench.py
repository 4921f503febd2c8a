"""How fast decoding is: tokens a second, share of the memory bandwidth, time to the first token, warm-up.

Decoding reads every weight and every key once a step, so bandwidth is its limit; MBU (model bandwidth utilisation) is
the share of the data sheet's bandwidth that those reads alone amount to. A random model is as fast as a trained one.

    python -m nanochat_hf.serve.engine --bench --depth 12      # a table, and JSON in the last line
"""

import argparse
import json
import time

import torch

from .decoder import SlotRequest
from .engine import Engine, Request

PEAK_BANDWIDTH = {"B200": 8.0e12, "H200": 4.8e12, "H100": 3.35e12, "A100": 2.04e12, "L40S": 0.864e12, "L4": 0.3e12}
# karpathy/nanochat at 92d63d4 with its SDPA path, d12, prompt 512, one H100: batch -> tokens/s (DESIGN.md, section 5)
PEER = {1: 16, 8: 123, 32: 521, 128: 1930}


def peak_bandwidth(device: torch.device) -> float | None:
    """Bytes a second that the device's memory can move by its data sheet; None if unknown."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for part, peak in PEAK_BANDWIDTH.items() if part in name), None)


def bench_decode(
    model,
    batches: tuple[int, ...] = (1, 8, 32, 128),
    prompt_length: int = 512,
    new_tokens: int = 128,
    temperature: float = 1.0,
    top_k: int = 50,
    rounds: int = 3,
    length: int | None = None,
) -> list[dict]:
    """Decoding speed: for each batch the best of `rounds`, samples of one prompt that is prefilled once.

    Returns:
        rows of {batch, tokens_per_second (all of the time but prefill and first token), end_to_end (all), ttft_s,
        warm_up_s (kernels and graphs, first run), mbu (bytes a step must read / time / the data sheet's peak; None
        off known devices), peak_memory_bytes}.
    """
    device = model.model.embed_tokens.weight.device
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(0, 256, (prompt_length,), generator=generator).tolist()
    found = []
    for batch in batches:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        begin = time.perf_counter()
        engine = Engine(model, None, rows=batch, length=length or prompt_length + new_tokens + 1)
        best: dict = {}
        for turn in range(rounds + 1):
            start = time.perf_counter()
            for i in range(batch):
                engine.submit(Request(prompt, new_tokens, temperature, top_k, seed=turn * batch + i))
            first, early, total = None, 0, 0
            while engine.busy:
                new = sum(len(tokens) for _, tokens in engine.advance())
                total += new
                if new and first is None:
                    first, early = time.perf_counter(), new
            end = time.perf_counter()
            if turn == 0:
                warm_up = end - begin
                continue
            rate = (total - early) / (end - first)
            if rate > best.get("tokens_per_second", 0):
                best = {"batch": batch, "tokens_per_second": rate, "end_to_end": total / (end - start)}
            best["ttft_s"] = min(best.get("ttft_s", first - start), first - start)
        middle = [prompt_length + new_tokens // 2] * batch
        peak, step_time = peak_bandwidth(device), batch / best["tokens_per_second"]
        best["mbu"] = engine.decoder.bytes_per_step(middle) / step_time / peak if peak else None
        best["warm_up_s"] = warm_up
        best["peak_memory_bytes"] = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
        found.append(best)
        del engine
    return found


def main() -> None:
    """Print the table of `bench_decode`, and the same as JSON in the last line."""
    from transformers import AutoConfig, AutoModelForCausalLM

    parser = argparse.ArgumentParser(description="Measure decoding speed of a random or a given model.")
    parser.add_argument("--bench", action="store_true", help="measure; there is nothing else to do here")
    parser.add_argument("--depth", type=int, default=12, help="layers of a random model, width 64 x depth")
    parser.add_argument("--model", help="a checkpoint folder or Hub id instead")
    parser.add_argument("--batches", default="1,8,32,128")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=128, help="new tokens")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--length", type=int, help="tokens of a row that are allocated (prompt + new + 1)")
    parser.add_argument(
        "--profile", action="store_true", help="also list the kernels of 16 steps of the largest batch"
    )
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.model:
        model = AutoModelForCausalLM.from_pretrained(args.model, trust_remote_code=True)
    else:
        width, heads = 64 * args.depth, max(args.depth // 2, 1)
        config = AutoConfig.for_model(
            "nanochat_hf", hidden_size=width, num_hidden_layers=args.depth, num_attention_heads=heads
        )
        model = AutoModelForCausalLM.from_config(config)
    model = model.to(device, torch.bfloat16 if device == "cuda" else torch.float32).eval()
    batches = tuple(int(batch) for batch in args.batches.split(","))
    options = dict(prompt_length=args.prompt, new_tokens=args.tokens, temperature=args.temperature, length=args.length)
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    print(f"{name}, prompt {args.prompt}, {args.tokens} new tokens")
    columns = (("batch", 6), ("tok/s", 9), ("incl. prefill", 13), ("MBU", 6), ("TTFT ms", 8), ("warm-up s", 9))
    print(*[f"{title:>{width}}" for title, width in (*columns, ("nanochat tok/s", 14))])
    rows = []
    for batch in batches:
        row = bench_decode(model, (batch,), **options)[0]
        rows.append(row)
        mbu = "-" if row["mbu"] is None else f"{row['mbu']:.1%}"
        comparable = args.depth == 12 and args.prompt == 512 and not args.model
        peer = PEER.get(batch, "-") if comparable else "-"
        print(
            f"{batch:>6} {row['tokens_per_second']:>9,.0f} {row['end_to_end']:>13,.0f} {mbu:>6} "
            f"{1000 * row['ttft_s']:>8.1f} {row['warm_up_s']:>9.1f} {peer:>14}",
            flush=True,
        )
    if args.profile:
        print(profile_steps(model, batches[-1], args.prompt))
    print(json.dumps(rows))


def profile_steps(model, batch: int, prompt_length: int, steps: int = 16) -> str:
    """A table of where `steps` decoding steps spend their time, by kernel."""
    engine = Engine(model, None, rows=batch, length=prompt_length + 64)
    engine.decoder.admit({row: SlotRequest([1] * prompt_length, 60, 1.0, 50) for row in range(batch)})
    for _ in range(2):
        engine.decoder.step(batch, prompt_length + 2)
    with torch.profiler.profile() as profile:
        for i in range(steps):
            engine.decoder.step(batch, prompt_length + 3 + i)
        if engine.decoder.device.type == "cuda":
            torch.cuda.synchronize()
    order = "self_cuda_time_total" if engine.decoder.device.type == "cuda" else "self_cpu_time_total"
    return profile.key_averages().table(sort_by=order, row_limit=16, max_name_column_width=60)
