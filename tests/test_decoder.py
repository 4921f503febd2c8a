"""The decoder against the model: greedy tokens, caches, sampling; the CUDA kernels against PyTorch; the benchmark.

The kernels run on a GPU, and elsewhere in Triton's interpreter if it is installed.
"""

import asyncio
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from talker import QUESTIONS
from tiny import relative

from nanochat_hf.errors import InputError
from nanochat_hf.kernels import decode as kernels
from nanochat_hf.kernels import fused_decode
from nanochat_hf.model import NanoChatConfig, NanoChatForCausalLM
from nanochat_hf.serve.decoder import Decoder, Request
from nanochat_hf.serve.engine import Engine
from nanochat_hf.serve.worker import Completion, open_workers

PROMPTS = [[1, 2, 3], [4], [9, 8, 7, 6, 5, 4, 3, 2, 1, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20]]
SHAPE = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 5, "max_position_embeddings": 96}
FIRST = {**SHAPE, "num_attention_heads": 2}
CONFIGS = {
    "second": lambda: NanoChatConfig(
        **SHAPE, num_tokens=120, num_attention_heads=4, num_key_value_heads=2, sliding_window=9
    ),
    "first": lambda: NanoChatConfig.first_generation(**FIRST),
    "windows alone": lambda: NanoChatConfig.first_generation(**FIRST, window_pattern="SL", sliding_window=4),
    "backout alone": lambda: NanoChatConfig.first_generation(**FIRST, backout=True),
}
SCRIPT = Path(__file__).parent.parent / "scripts" / "bench_decoding.py"
spec = importlib.util.spec_from_file_location("bench_decoding", SCRIPT)
bench = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench)


def noisy(model, size=0.3, seed=1):
    """Random weights everywhere, so that no feature is switched off by a zero."""
    if seed is not None:
        torch.manual_seed(seed)
    for parameter in model.parameters():
        parameter.data.normal_(0, size) if parameter.ndim > 1 else parameter.data.uniform_(0.3, 1.2)
    return model.eval()


def make(kind="second"):
    if kind in CONFIGS:
        return noisy(NanoChatForCausalLM(CONFIGS[kind]()))
    from transformers import NanoChatConfig as Native
    from transformers import NanoChatForCausalLM as NativeModel

    return noisy(NativeModel(Native(**FIRST, intermediate_size=256, num_key_value_heads=1)))


def run(decoder, requests, steps):
    """The tokens of each slot after `steps` steps."""
    decoder.schedule(dict(enumerate(requests)))
    bound = max(len(request.prompt) for request in requests)
    tokens = [[] for _ in requests]
    for i in range(steps):
        decoder.step(decoder.slots, min(bound + i, decoder.length))
        for slot, token in enumerate(decoder.tokens_since(decoder.steps - 1)[0][: len(requests)].tolist()):
            tokens[slot] += [token] * (token >= 0)
    return tokens


def generate(model, prompt, length, stops):
    ids = torch.tensor([prompt])
    tokens = model.generate(ids, max_new_tokens=length, do_sample=False, eos_token_id=stops, pad_token_id=0)
    return tokens[0, len(prompt) :].tolist()


# ---- in PyTorch ----------------------------------------------------------------------------------------------------


def test_caches_larger_than_a_cpus_memory_are_refused(tiny_model):
    with pytest.raises(InputError, match=r"the KV caches of .* slots of 96 tokens need .* GiB, more than is free"):
        Decoder(tiny_model, 10**9, 96, [])


@pytest.mark.parametrize("kind", [*CONFIGS, "transformers' own"])
def test_greedy_slots_of_different_lengths_equal_the_models_generate(kind, monkeypatch):
    if kind == "first":
        monkeypatch.setattr("nanochat_hf.serve.decoder.PREFILL_TOKENS", 20)  # several prefills
    model = make(kind)
    answers = run(Decoder(model, 4, 96, stops=[5, 7]), [Request(prompt, 24) for prompt in PROMPTS], 24)
    assert answers == [generate(model, prompt, 24, [5, 7]) for prompt in PROMPTS]


@pytest.mark.parametrize("backout", [0.5, 0.992])
@torch.inference_mode()
def test_bfloat16_keeps_its_digits_where_backout_leaves_little(backout):
    """With two layers the middle is the output of the last block: the final norm must undo a factor of 1 - backout."""
    model = noisy(NanoChatForCausalLM(NanoChatConfig(**SHAPE | {"num_hidden_layers": 2}, num_attention_heads=4)))
    model.model.backout_lambda.data.fill_(backout)
    logits = []
    for dtype in (torch.float32, torch.bfloat16):
        decoder = Decoder(model, 1, 30, [], dtype)
        decoder.schedule({0: Request(PROMPTS[2], 9)})
        step = decoder.plain_step(1, len(PROMPTS[2]))[0]
        logits.append((step, model.to(dtype)(torch.tensor(PROMPTS[2:])).logits[0, -1]))
    for exact, rounded in zip(*logits):
        assert relative(rounded, exact) < 0.02


def test_a_slot_keeps_nothing_of_its_last_request():
    model, request = make(), Request([3, 1, 4, 1, 5], 20)
    fresh = run(Decoder(model, 1, 96, []), [request], 20)
    decoder = Decoder(model, 1, 96, [])
    run(decoder, [Request(PROMPTS[2], 30, temperature=1.0, top_k=3, top_p=0.5)], 20)
    decoder.resume(0, [9, 9, 9])
    decoder.release(0)
    assert run(decoder, [request], 20) == fresh


def test_a_prompt_shared_by_slots_is_prefilled_once(monkeypatch):
    decoder, shapes = Decoder(make(), 4, 96, []), []
    forward = decoder.forward
    monkeypatch.setattr(decoder, "forward", lambda ids, *rest: shapes.append(tuple(ids.shape)) or forward(ids, *rest))
    decoder.schedule({slot: Request(PROMPTS[2], 5) for slot in range(4)})
    assert shapes == [(1, len(PROMPTS[2]) - 1)]


def test_forced_tokens_enter_a_stopped_slot_which_continues_from_them():
    model = make()
    free = run(Decoder(model, 1, 96, []), [Request(PROMPTS[0], 30)], 30)[0]
    decoder = Decoder(model, 1, 96, stops=[free[4]])
    first = free.index(free[4]) + 1
    begun = run(decoder, [Request(PROMPTS[0], 30)], 10)[0]
    assert begun == free[:first] and decoder.state.active.tolist() == [0]
    decoder.resume(0, [free[4], 33])  # a forced stop token does not stop
    rest = []
    for i in range(6):
        decoder.step(1, len(PROMPTS[0]) + first + i)
        rest += decoder.tokens_since(decoder.steps - 1)[0].tolist()
    prompt = PROMPTS[0] + begun + [free[4], 33]
    assert rest[:2] == prompt[-2:] and [t for t in rest[2:] if t >= 0] == generate(model, prompt, 4, free[4])


def test_a_full_cache_ends_the_slot_and_is_never_written_past_its_end():
    decoder = Decoder(make("first"), 1, 16, [])
    answer = run(decoder, [Request(PROMPTS[0], 1000)], 40)[0]
    assert len(answer) == 16 - len(PROMPTS[0]) and decoder.state.pos.item() == 15


def test_a_released_slot_is_stopped_and_no_other():
    decoder = Decoder(make("first"), 2, 16, [])
    with torch.inference_mode():
        decoder.state.active[:] = 1
    decoder.release(1)
    assert decoder.state.active.tolist() == [1, 0]


def test_sync_weights_takes_over_changed_weights_in_place():
    model, request = make(), Request(PROMPTS[0], 10)
    decoder = Decoder(model, 1, 96, [])
    before, pointers = run(decoder, [request], 10), [w.data_ptr() for w in decoder.w.values()]
    for parameter in model.parameters():
        parameter.data += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7)) * 0.3
    decoder.sync_weights()
    after = run(decoder, [request], 10)
    assert after != before and after == run(Decoder(model, 1, 96, []), [request], 10)
    assert pointers == [w.data_ptr() for w in decoder.w.values()]


def test_what_cannot_be_decoded_is_refused():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=10, n_embd=8, n_layer=1, n_head=1))
    with pytest.raises(InputError, match=r"gpt2.*transformers' own generate"):
        Decoder(model, 1, 8, [])
    with pytest.raises(InputError, match="at most 8 stop tokens, not 9"):
        Decoder(make(), 1, 8, list(range(9)))


def reference_distribution(logits, temperature, top_k, top_p):
    """What sampling should follow: softmax, the k best (with ties), then the smallest set with mass top_p."""
    p = torch.softmax(logits.double() / temperature, -1)
    if top_k:
        p = torch.where(p >= p.topk(min(top_k, len(p))).values[-1], p, 0.0)
        p = p / p.sum()
    nucleus, total = torch.zeros_like(p), 0.0
    for i in p.argsort(descending=True).tolist():
        if total >= top_p:
            break
        nucleus[i], total = p[i], total + p[i].item()
    return nucleus / nucleus.sum()


@pytest.mark.parametrize(
    "temperature,top_k,top_p",
    [(1.0, 0, 1.0), (0.7, 5, 1.0), (1.3, 0, 0.8), (0.9, 20, 0.5), (1.3, 4, 0.6), (0.9, 99, 1.0)],
)
def test_sampling_follows_its_distribution_beside_greedy_slots(temperature, top_k, top_p):
    logits = torch.randn(40, generator=torch.Generator().manual_seed(0)) * 2
    n = 20_000
    uniform = (torch.arange(n) + 0.5) / n
    settings = [torch.full((n + 1,), value) for value in (temperature, top_k, top_p)]
    settings[0][n] = 0  # one greedy slot
    draws = torch.cat([uniform, torch.tensor([0.999])])
    picked = kernels.sample_next_token(logits.expand(n + 1, -1), draws, *settings)
    frequency = torch.bincount(picked[:n], minlength=40).double() / n
    assert (frequency - reference_distribution(logits, temperature, top_k, top_p)).abs().max() < 1e-3
    assert picked[n] == logits.argmax()
    certain, ends = torch.tensor([[-torch.inf, 0.0, -torch.inf]] * 2), torch.tensor([0.0, 1 - 2**-24])
    assert kernels.sample_next_token(certain, ends, *(values[:2] for values in settings)).tolist() == [1, 1]


# ---- the kernels ---------------------------------------------------------------------------------------------------


def compare(device: str, steps: int) -> None:
    """The same slots through `plain_step` and `fast_step`: greedy, nucleus, top-k, forced tokens, a free slot."""
    shape = {"vocab_size": 192, "hidden_size": 96, "num_hidden_layers": 4, "max_position_embeddings": 192}
    second = {"num_tokens": 150, "num_attention_heads": 4, "head_dim": 32, "num_key_value_heads": 2}
    first = {"num_attention_heads": 3}
    configs = (NanoChatConfig(**shape, **second, sliding_window=9), NanoChatConfig.first_generation(**shape, **first))
    cases = ((configs[0], 96, 4, 4), (configs[1], 1, 4, 4), (configs[0], 96, 1, 4), (configs[0], 96, 4, 0))
    for config, processors, slots, fused_slots in cases:  # with and without splitting the keys, and fused kernels
        fused_decode.MAX_SLOTS = fused_slots
        torch.manual_seed(0)
        model = noisy(NanoChatForCausalLM(config), 0.25, seed=None).to(device)
        prompts = [[5 + i % 100 for i in range(140)], [4], [1, 2, 3]]
        settings = ((0.7, 10, 1), (1.0, 0, 0.9), (0, 0, 1))
        requests = {i: Request(p, 60, *s, seed=i) for i, (p, s) in enumerate(zip(prompts, settings)) if i < slots}
        plain, fast = decoders = [Decoder(model, slots, 192, [1, 2], dtype=torch.float32) for _ in range(2)]
        for decoder in decoders:
            decoder.processors = processors
            decoder.schedule(requests)
            with torch.inference_mode():
                for i in range(steps):
                    decoder.fast_step(slots) if decoder is fast else decoder.plain_step(slots, 140 + i)
                    decoder.steps += 1
                    if i == steps // 2:
                        decoder.resume(0, [11, 12, 13])
        for name, value in vars(plain.state).items():
            assert name == "counter" or torch.equal(value, getattr(fast.state, name)), name
        for one, other in zip(plain.k + plain.v, fast.k + fast.v):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    fused_decode.MAX_SLOTS = 4


@pytest.mark.gpu
def test_kernels_agree_with_pytorch_on_the_gpu():
    torch.backends.cuda.matmul.allow_tf32 = False
    compare("cuda", 40)


@pytest.mark.slow
def test_kernels_agree_with_pytorch_in_the_interpreter():
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed (CPU builds of torch come without it)")
    code = "import test_decoder as t; t.compare('cpu', 6)"
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, env=env, cwd=Path(__file__).parent)


@pytest.mark.gpu
def test_a_replayed_graph_gives_the_tokens_of_single_launches():
    torch.manual_seed(0)
    model = NanoChatForCausalLM(NanoChatConfig(vocab_size=512, hidden_size=256, num_hidden_layers=4, head_dim=128))
    engine = Engine(noisy(model, 0.1, seed=None).to("cuda"), None, 4, length=700, dtype=torch.float32)
    engine.warm_up()
    prompts = [[1, 2, 3], [4], list(range(5, 300))]
    options = {"num_samples": 2, "max_new_tokens": 100, "temperature": 0.9, "top_k": 20}
    replayed = [engine.generate(prompts, **options) for _ in range(2)]
    decoder = engine.decoder
    assert replayed[0] == replayed[1] and len(decoder.graphs) > 0

    @torch.inference_mode()
    def launch(slots, bound):
        decoder.fast_step(slots)
        decoder.steps += 1

    decoder.step = launch
    assert engine.generate(prompts, **options) == replayed[0]


@pytest.mark.gpu
def test_a_replica_on_each_gpu_answers_as_one_on_the_cpu(talker_folder):
    def answer(worker) -> list[int]:
        worker.ready.wait(120)
        assert worker.error is None

        async def tokens():
            completion = Completion([worker], Request(worker.engine.encode(question), 20))
            return [token async for new, _ in completion.batches() for token in new]

        answer = asyncio.run(tokens())
        worker.close()
        return answer

    question = [{"role": "user", "content": next(iter(QUESTIONS))}]
    (reference,) = open_workers(str(talker_folder), 4, 4, device="cpu")
    workers = open_workers(str(talker_folder), 4, 4)
    assert [worker.device for worker in workers] == [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    expected = answer(reference)
    assert len(expected) > 3 and all(answer(worker) == expected for worker in workers)


# ---- the benchmark -------------------------------------------------------------------------------------------------


def test_a_step_reads_matrices_once_and_no_more_keys_than_the_window():
    decoder, width, layers = Decoder(make("windows alone"), 2, 96, []), 64, 5
    matrices = layers * (4 * width * width + 8 * width * width) + 128 * width
    keys = 2 * sum(min(50, window) for window in (4, 96, 4, 96, 96))
    assert bench.bytes_per_step(decoder, [50, 50]) == (matrices + 2 * keys * width) * 4


@pytest.mark.slow
def test_the_benchmark_prints_a_table_and_json():
    sizes = ["--depth", "2", "--batches", "1,2", "--prompt", "8", "--tokens", "8"]
    done = subprocess.run([sys.executable, SCRIPT, *sizes], check=True, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    assert lines[1].split()[:2] == ["batch", "tok/s"] and [row["batch"] for row in json.loads(lines[-1])] == [1, 2]
