"""The CUDA kernels against their PyTorch twin: on a GPU for real, elsewhere in Triton's interpreter if it is there."""

import asyncio
import importlib.util
import os
import subprocess
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from talker import QUESTIONS, talker, talker_folder  # noqa: F401

from nanochat_hf.kernels import decode as decode_kernels
from nanochat_hf.model import NanoChatConfig, NanoChatForCausalLM
from nanochat_hf.serve.decoder import Decoder
from nanochat_hf.serve.engine import Engine, Request
from nanochat_hf.serve.worker import Completion, open_workers


def compare(device: str, steps: int) -> None:
    """Run the same rows through `plain_step` and `fast_step`: greedy, nucleus, top-k, a forced row, a free row."""
    for second in (True, False):
        shape = {"vocab_size": 192, "hidden_size": 96, "num_hidden_layers": 4, "max_position_embeddings": 192}
        if second:
            config = NanoChatConfig(
                **shape, num_tokens=150, num_attention_heads=4, head_dim=32, num_key_value_heads=2, sliding_window=9
            )
        else:
            config = NanoChatConfig.first_generation(**shape, num_attention_heads=3)
        torch.manual_seed(0)
        model = NanoChatForCausalLM(config)
        for parameter in model.parameters():
            parameter.data.normal_(0, 0.25) if parameter.ndim > 1 else parameter.data.uniform_(0.3, 1.2)
        model = model.eval().to(device)
        prompts = [[1, 2, 3], [4], [5 + i % 100 for i in range(140)]]
        asked = zip(prompts, (0, 1.0, 0.7), (0, 0, 10), (1, 0.9, 1))
        requests = {i: Request(p, 60, heat, k, share, seed=i) for i, (p, heat, k, share) in enumerate(asked)}
        machines = [Decoder(model, 4, 192, [1, 2], dtype=torch.float32) for _ in range(2)]
        for machine, fast in zip(machines, (False, True)):
            machine.processors = 96 if second else 1  # with and without splitting the keys
            machine.schedule(requests)
            with torch.inference_mode():
                for i in range(steps):
                    machine.fast_step(4) if fast else machine.plain_step(4, 140 + i)
                    machine.steps += 1
                    if i == steps // 2:
                        machine.resume(2, [11, 12, 13])
        plain, fast = machines
        for name, value in vars(plain.state).items():
            assert name == "counter" or torch.equal(value, getattr(fast.state, name)), name
        for ours, theirs in zip(plain.k + plain.v, fast.k + fast.v):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.gpu
def test_kernels_agree_with_pytorch_on_the_gpu():
    torch.backends.cuda.matmul.allow_tf32 = False
    compare("cuda", 40)


@pytest.mark.gpu
def test_a_replayed_graph_gives_the_tokens_of_single_launches():
    torch.manual_seed(0)
    model = NanoChatForCausalLM(NanoChatConfig(vocab_size=512, hidden_size=256, num_hidden_layers=4, head_dim=128))
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.1) if parameter.ndim > 1 else parameter.data.uniform_(0.3, 1.2)
    model = model.to("cuda").eval()
    prompts = [[1, 2, 3], [4], list(range(5, 300))]
    engine = Engine(model, None, slots=4, length=700, dtype=torch.float32)
    engine.warm_up()
    fast = [engine.generate(prompts, num_samples=2, max_new_tokens=100, temperature=0.9, top_k=20) for _ in range(2)]
    assert fast[0] == fast[1] and len(engine.decoder.graphs) > 0
    decoder = engine.decoder

    @torch.inference_mode()
    def launch(rows, bound):
        decoder.fast_step(rows)
        decoder.steps += 1

    decoder.step = launch
    assert engine.generate(prompts, num_samples=2, max_new_tokens=100, temperature=0.9, top_k=20) == fast[0]


def test_warming_up_may_record_steps_outside_of_inference_mode(talker, monkeypatch):  # noqa: F811
    engine, seen = Engine(*talker, slots=4), []

    @contextmanager
    def graph(recorded, pool, stream, capture_error_mode):
        seen.append((stream, capture_error_mode))
        yield

    device = SimpleNamespace(wait_stream=lambda other: None)
    fakes = {"Stream": lambda device: SimpleNamespace(wait_stream=lambda other: None), "CUDAGraph": SimpleNamespace}
    fakes |= {"current_stream": lambda place: device, "stream": lambda stream: nullcontext(), "graph": graph}
    fakes |= {"graph_pool_handle": lambda: 1}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    decoder = engine.decoder
    monkeypatch.setattr(
        decoder, "fast_step", lambda rows: decoder.state.pos[:rows].add_(1)
    )  # as the kernels: in place
    monkeypatch.setattr(decoder, "step", torch.inference_mode()(decoder.plain_step))
    decoder.fast = True
    engine.warm_up()
    assert sorted(decoder.graphs) == [1, 2, 4]
    assert len({id(stream) for stream, _ in seen}) == 3 and {mode for _, mode in seen} == {"thread_local"}
    assert (decoder.state.pos[1:] == 0).all()  # the trial steps left no trace


def answer(worker, text: str) -> list[int]:
    """The tokens of a started worker's greedy answer; the worker is closed."""
    worker.ready.wait(120)
    assert worker.error is None

    async def run():
        request = Request(worker.engine.encode([{"role": "user", "content": text}]), 20)
        completion = Completion([worker], request)
        return [token async for tokens, _ in completion.batches() for token in tokens]

    tokens = asyncio.run(run())
    worker.close()
    return tokens


@pytest.mark.gpu
def test_a_replica_on_each_gpu_answers_as_one_on_the_cpu(talker_folder):  # noqa: F811
    question = next(iter(QUESTIONS))
    (twin,) = open_workers(str(talker_folder), max_batch_size=4, max_queue_size=4, device="cpu")
    workers = open_workers(str(talker_folder), max_batch_size=4, max_queue_size=4)
    assert [worker.device for worker in workers] == [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    wanted = answer(twin, question)
    assert len(wanted) > 3 and all(answer(worker, question) == wanted for worker in workers)


@pytest.mark.slow
def test_kernels_agree_with_pytorch_in_the_interpreter():
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed (CPU builds of torch come without it)")
    code = "import test_decode_kernels as t; t.compare('cpu', 6)"
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, env=env, cwd=Path(__file__).parent)


def test_without_a_gpu_the_kernels_say_that_they_cannot_run():
    assert not decode_kernels.available(torch.device("cpu"), 128)


def test_odd_head_sizes_take_the_plain_path():
    assert not decode_kernels.available(torch.device("cuda"), 96)
