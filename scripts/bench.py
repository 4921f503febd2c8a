"""Speed of this machine's CPU: the data loader, and the training step and optimizer of the demo's model.

    python scripts/bench.py [--dataset primer] [--seconds 10]

Prints tokens per second of tokenizing and packing (sequences of 2,048) and of a training step of recipe cpu-demo, and
milliseconds of the optimizer in it. The loader's threads share no lock and tokenizing is nearly all of their work, so
N cores give N times the figure per core (tokens per second of processor time). For a GPU: scripts/bench_gpu.py.
"""

import argparse
import time
from typing import Annotated, get_type_hints

from annotated_types import Gt, Le

from nanochat_hf.config import Parser, Place
from nanochat_hf.errors import guarded
from nanochat_hf.stage_configs import PretrainConfig, TokenizerConfig

if __name__ == "__main__":  # --help is shown before the large imports
    parser = Parser(__doc__)
    parser.option("--dataset", Place, default="primer", help="text, as in base.yaml")
    size = get_type_hints(TokenizerConfig, include_extras=True)["vocab_size"]
    parser.option("--vocab-size", size, default=1024, help="32768 for the tokens of real recipes")
    parser.option("--seconds", Annotated[float, Gt(0), Le(10**6)], default=10, help="time of each measurement")
    ARGUMENTS = guarded(parser.parse_args)

import torch

from nanochat_hf.data.dataloader import PackedLoader
from nanochat_hf.data.documents import DocumentStream
from nanochat_hf.data.tokenizer import train_bpe
from nanochat_hf.model.modeling_nanochat import NanoChatForCausalLM
from nanochat_hf.optim.muon_adamw import MuonAdamW, param_groups
from nanochat_hf.optim.scaling import plan
from nanochat_hf.train.fused_model import FusedTransformer


def repeat(function, seconds: float) -> float:
    """Runs of `function` per second, after one to warm up."""
    function()
    start, runs = time.perf_counter(), 0
    while not runs or time.perf_counter() - start < seconds:
        function()
        runs += 1
    return runs / (time.perf_counter() - start)


def main(arguments: argparse.Namespace) -> None:
    stream = DocumentStream(arguments.dataset, "train")
    texts = (text for text, _ in zip(stream, range(20000)))
    tokenizer = train_bpe(texts, vocab_size=arguments.vocab_size)
    loader = PackedLoader(DocumentStream(arguments.dataset, "train"), tokenizer, 8, 2048)
    next(loader)
    wall, cpu, rows = time.perf_counter(), time.process_time(), 0
    while not rows or time.perf_counter() - wall < arguments.seconds:
        rows += len(next(loader))
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    loader.close()
    print(f"loader     {rows * 2048 / wall:12,.0f} tok/s on {cpu / wall:.1f} cores, {rows * 2048 / cpu:,.0f} per core")

    recipe = plan(PretrainConfig(4, 2, 32, 32, 128, num_iterations=1, total_batch_size=2048), 1024)
    model = NanoChatForCausalLM(recipe.model_config)
    fused, optimizer = FusedTransformer(model), MuonAdamW(param_groups(model, recipe.groups))
    ids = torch.randint(0, 1024, (16, 129))

    def step():
        fused(ids[:, :-1], ids[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()

    print(f"train step {repeat(step, arguments.seconds) * 2048:12,.0f} tok/s on {torch.get_num_threads()} threads")
    fused(ids[:, :-1], ids[:, 1:]).backward()
    print(f"optimizer  {1e3 / repeat(optimizer.step, arguments.seconds):12.1f} ms per step")


if __name__ == "__main__":
    guarded(lambda: main(ARGUMENTS))
