"""What surrounds the pretraining loop: the model and its loss, the process and its device, monitoring."""

import json
import os
import random
import signal
from contextlib import nullcontext
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import nn

from nanochat_hf.data.dataloader import VALIDATION, PackedLoader
from nanochat_hf.data.documents import DocumentStream
from nanochat_hf.data.tokenizer import token_byte_lengths
from nanochat_hf.errors import InputError
from nanochat_hf.eval.bpb import evaluate_bpb, losses_of
from nanochat_hf.kernels.backend import version
from nanochat_hf.model import NanoChatForCausalLM
from nanochat_hf.optim.scaling import plan
from nanochat_hf.stage_configs import PretrainConfig
from nanochat_hf.train import model_setup, monitoring, runtime
from nanochat_hf.train import model_setup as setup
from nanochat_hf.train.fused_model import FusedTransformer
from nanochat_hf.train.monitoring import Evaluator, LossSpikeDetector, StepTimer

CPU = torch.device("cpu")
FSDP2 = Path(__file__).parent.parent / "configs" / "accelerate" / "fsdp2.yaml"
SHAPE = {"depth": 2, "aspect_ratio": 32, "head_dim": 32, "max_seq_len": 64, "total_batch_size": 64}
D12 = plan(PretrainConfig(total_batch_size=131_072, num_iterations=500), 32768)


def tiny_plan(vocab_size, **values):
    return plan(PretrainConfig(**{**SHAPE, "num_iterations": 1, **values}), vocab_size)


# --- the model and its loss


@pytest.mark.parametrize("generation", [1, 2])
def test_the_models_own_forward_gives_the_loss_and_the_gradient_of_the_logits(tokenizer, generation):
    torch.manual_seed(0)
    model = setup.build_model(tiny_plan(len(tokenizer), generation=generation), None, tokenizer, CPU, sharded=False)
    assert model.config.bos_token_id == tokenizer.bos_token_id
    assert model.generation_config.eos_token_id == [tokenizer.eos_token_id, tokenizer.bos_token_id]
    torch.nn.init.normal_(model.lm_head.weight)
    ids = torch.randint(0, len(tokenizer), (2, 65))
    assert isinstance(setup.build_loss_module(model, "auto", True, False), FusedTransformer)  # see test_fused_model.py
    module = setup.build_loss_module(model, "sdpa", True, False)
    assert isinstance(module, setup.ModelLoss) and model.config._attn_implementation == "sdpa"
    logits = model(ids[:, :-1]).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    expected.backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm()
    assert setup.gradient_norm(model).item() == pytest.approx(norm.item(), rel=1e-5)
    setup.scale_gradients(model, torch.tensor(0.5))
    assert setup.gradient_norm(model).item() == pytest.approx(norm.item() / 2, rel=1e-5)
    model.zero_grad()
    loss = module(ids[:, :-1], ids[:, 1:])
    loss.backward()
    assert [loss.item(), setup.gradient_norm(model).item()] == pytest.approx([expected.item(), norm.item()], rel=1e-4)
    per_token = module(ids[:, :-1], ids[:, 1:], reduction="none")
    assert per_token.shape == (2, 64) and per_token.mean().item() == pytest.approx(loss.item(), rel=1e-5)


def test_given_weights_bring_their_shape_and_need_their_tokenizer(tiny_model, tokenizer, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    shape = setup.plan_overrides_from(str(tmp_path))
    expected = {"depth": 2, "generation": 2, "head_dim": 32, "aspect_ratio": 32, "window_pattern": "SSSL"}
    assert shape == expected | {"final_logit_softcapping": 15.0}
    model = setup.build_model(tiny_plan(len(tokenizer), **shape), str(tmp_path), tokenizer, CPU, False)
    assert torch.equal(model.lm_head.weight, tiny_model.lm_head.weight)
    with pytest.raises(InputError, match="512 rows of embeddings and the tokenizer needs 320"):
        setup.build_model(tiny_plan(300), str(tmp_path), tokenizer, CPU, False)


def test_another_model_type_is_refused_in_one_line(tmp_path):
    for content, words in (
        ('{"model_type": "gpt2", "n_layer": 2}', r"a model of type 'gpt2'.*nanochat convert"),
        ('{"n_layer": 2}', "no model in .* that can be read"),
    ):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(InputError, match=words) as error:
            setup.plan_overrides_from(str(tmp_path))
        assert "\n" not in str(error.value)


def test_fp8_auto_is_off_where_it_cannot_work_and_the_first_line_says_so(tiny_model, monkeypatch):
    for fp8, hint in (("auto", "; no FP8: it needs an NVIDIA GPU of compute capability 9.0 or newer"), (False, "")):
        network = setup.build_loss_module(tiny_model, "auto", True, fp8)
        assert not network.fp8
        assert setup.describe(network, fp8).startswith("PyTorch on cpu; precision float32" + hint)
    capability = (9, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    cuda = torch.device("cuda")
    assert setup.why_not_fp8(tiny_model, "auto", cuda, (9, 0)) is None
    assert "attn_implementation" in setup.why_not_fp8(tiny_model, "sdpa", cuda, (9, 0))
    tiny_model.config.max_position_embeddings = 100  # gradients of weights sum over tokens
    assert "multiples of 16" in setup.why_not_fp8(tiny_model, "auto", cuda, (9, 0))
    capability = (8, 9)
    assert "newer" in setup.why_not_fp8(tiny_model, "auto", cuda, (9, 0))


@pytest.mark.parametrize("name, words", [("flash_attention_3", "installed"), ("flex_attention", "take sdpa")])
def test_an_attention_that_is_not_here_is_refused_in_one_line(tiny_model, name, words):
    with pytest.raises(InputError, match=words) as error:
        setup.build_loss_module(tiny_model, name, True, False)
    assert name in str(error.value) and "\n" not in str(error.value)


@pytest.mark.gpu
def test_the_first_line_names_kernels_and_precision(tiny_config):
    model = NanoChatForCausalLM(tiny_config).to("cuda")
    line = setup.describe(setup.build_loss_module(model, "auto", True, "auto"), "auto")
    assert "matmuls PyTorch's FP8" in line
    assert "precision bfloat16 with FP8" in line and f"triton {version('triton')}" in line


MISSING = '; quack-kernels not installed; for more speed: pip install "nanochat_hf[kernels]"'


@pytest.mark.parametrize("capability, width, hints", [
    ((8, 0), 1536, ""), ((9, 0), 768, MISSING), ((9, 0), 1536, MISSING + "; fp8=auto would be faster"),
])  # fmt: skip
def test_the_first_line_names_only_what_would_be_faster_there(tiny_model, monkeypatch, capability, width, hints):
    network = setup.build_loss_module(tiny_model, "auto", False, False)
    tiny_model.config.hidden_size = width
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(setup, "unloaded", {"quack-kernels": "not installed", "flash-attn-4": "OSError: -"})
    weight = SimpleNamespace(device=torch.device("cuda"))
    model = SimpleNamespace(lm_head=SimpleNamespace(weight=weight), config=tiny_model.config)
    monkeypatch.setattr(FusedTransformer, "model", model, raising=False)
    assert setup.describe(network, False).partition("; ")[2] == "precision bfloat16" + hints


# --- the process and its device


@pytest.mark.parametrize(
    "requested, world, largest, size, trials, log",
    [
        (16, 1, 64, 16, [(16, 4)], []),
        (3, 1, 64, 2, [(2, 32)], ["2 instead of 3"]),
        (64, 2, 64, 32, [(32, 1)], ["32 instead of 64"]),
        (32, 1, 8, 8, [(32, 2), (16, 4), (8, 8)], ["trying 16", "trying 8"]),
        (-1, 1, 64, 8, [(8, 8)], ["8 sequences of 2048 tokens, chosen by the free memory"]),
        (-1, 16, 64, 4, [(4, 1)], ["4 sequences of 2048 tokens"]),
    ],
)
def test_the_micro_batch_size_divides_the_step_and_fits(monkeypatch, requested, world, largest, size, trials, log):
    lines, tried = [], []
    monkeypatch.setattr(runtime, "free_memory", lambda device: 40e9)

    def fits(size, steps):
        tried.append((size, steps))
        return size <= largest

    ranks = SimpleNamespace(device=CPU, num_processes=world)
    assert runtime.choose_micro_batch_size(D12, requested, ranks, fits, lines.append) == size
    assert tried == trials and len(lines) == len(log)
    assert all(text in line for text, line in zip(log, lines))


def test_a_global_batch_is_split_into_whole_sequences_of_each_rank():
    assert runtime.split_global_batch("examples", 36, 1, 8, 2) == (6, 3)
    assert [runtime.split_global_batch("tokens", total, 128, 4, 1) for total in (1024, 256)] == [(4, 2), (2, 1)]
    for total in (1000, 0):
        with pytest.raises(InputError, match=f"tokens = {total} must be a positive multiple of 128"):
            runtime.split_global_batch("tokens", total, 128, 4, 1)
    with pytest.raises(InputError, match="1 sequence of 2048 tokens does not fit"):
        runtime.choose_micro_batch_size(D12, 2, SimpleNamespace(device=CPU, num_processes=1), lambda *_: False, print)


@pytest.mark.parametrize("steps, beside", [(1, [False]), (4, [False, True])])
def test_a_trial_has_gradients_beside_it_only_if_its_step_has(steps, beside, monkeypatch):
    has_gradient = []

    class Loss(nn.Linear):
        def forward(self, ids, targets):
            assert ids.shape == (2, 2048) and targets.max() < 32768
            has_gradient.append(self.weight.grad is not None)
            return self.weight.sum() * ids.shape[0]

    loss = Loss(1, 1, bias=False)
    assert runtime.micro_batch_fits(
        D12, loss, [{"kind": "muon", "params": [loss.weight]}], Accelerator(cpu=True), 2, steps
    )
    assert has_gradient == beside and loss.weight.grad is None
    monkeypatch.setattr(Loss, "forward", lambda *args: torch.zeros(1) @ torch.zeros(2))  # no lack of memory
    with pytest.raises(RuntimeError, match="size"):
        runtime.micro_batch_fits(D12, loss, [], Accelerator(cpu=True), 2, steps)


def test_a_run_for_gpus_is_refused_on_a_cpu_and_only_there(monkeypatch):
    large = plan(PretrainConfig(24), 32768)
    with pytest.raises(InputError, match=r"no GPU found.*days.*cpu-demo"):
        runtime.check_cost(large, CPU)
    runtime.check_cost(large, torch.device("cuda"))
    small = plan(PretrainConfig(6), 32768)
    a_day = small.total_flops / 86400 / os.cpu_count()
    for speed, words in ((a_day, None), (a_day / 3, "about 3 days")):
        monkeypatch.setattr(runtime, "CPU_FLOPS", speed)
        with pytest.raises(InputError, match=words) if words else nullcontext():
            runtime.check_cost(small, CPU)


def test_the_ranks_of_a_node_share_the_memory_of_its_cpu(monkeypatch):
    monkeypatch.setattr(runtime.psutil, "virtual_memory", lambda: SimpleNamespace(available=8e9))
    assert runtime.free_memory(CPU) == 4e9
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert runtime.free_memory(CPU) == 1e9


def test_signals_are_noted_a_second_interrupt_stops_at_once_and_the_handlers_return():
    noted, before = [], signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), runtime.graceful_shutdown(noted.append):
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
    assert noted == [signal.SIGTERM] * 2 and signal.getsignal(signal.SIGTERM) is before
    with runtime.graceful_shutdown(noted.append):
        os.kill(os.getpid(), signal.SIGINT)
    assert noted[2:] == [signal.SIGINT]


@pytest.mark.parametrize("stage", ["1", "2", "3"])
def test_a_zero_launch_uses_fsdp2_inside_and_deepspeed_again_afterwards(stage, monkeypatch):
    lines = []
    job = SimpleNamespace(distributed_type=DistributedType.DEEPSPEED, num_processes=2, print=lines.append)
    monkeypatch.setattr(runtime, "partial_state", lambda: job)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", stage)
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    with runtime.fsdp2_for_zero():
        assert job.distributed_type == DistributedType.MULTI_GPU
        assert os.environ["ACCELERATE_USE_DEEPSPEED"] == "false"
        assert os.environ.get("ACCELERATE_USE_FSDP") == (None if stage == "1" else "true")
        if stage != "1":
            plugin, options = FullyShardedDataParallelPlugin(), yaml.safe_load(FSDP2.read_text())["fsdp_config"]
            assert plugin.reshard_after_forward == (stage == "3")  # the rest is as in the Accelerate config file
            assert plugin.fsdp_version == options["fsdp_version"]
            assert plugin.transformer_cls_names_to_wrap == [options["fsdp_transformer_layer_cls_to_wrap"]]
            assert plugin.state_dict_type.name == options["fsdp_state_dict_type"]
            assert plugin.cpu_ram_efficient_loading == options["fsdp_cpu_ram_efficient_loading"]
    assert os.environ["ACCELERATE_USE_DEEPSPEED"] == "true" and "ACCELERATE_USE_FSDP" not in os.environ
    assert len(lines) == 1 and f"in place of ZeRO-{stage}" in lines[0]


# --- monitoring


def spikes(losses, nats=2.0):
    """The indices of spikes."""
    detector = LossSpikeDetector(nats)
    return [i for i, loss in enumerate(losses) if detector.is_spike(loss, detector.limit())]


def curve(steps, noise, seed=0):
    """A healthy run's losses: from 10.4 fast to 5, slowly to 3."""
    rng = random.Random(seed)
    return [3 + 5.4 * 0.97**i + 2 * 0.999**i + rng.gauss(0, noise) for i in range(steps)]


def test_spikes_are_found_and_do_not_count_as_normal_afterwards():
    for noise in (0.01, 0.1, 0.5, 2.0):
        assert not spikes(curve(2000, noise))
    for at in (100, 1500):
        losses = curve(1700, 0.05)
        losses[at] += 3.5
        assert spikes(losses) == [at]
        losses[at:] = [loss + 3.5 for loss in losses[at:]]
        assert spikes(losses)[:35] == list(range(at, at + 35))
    losses = curve(300, 0.01)
    losses[200] += 1.9
    assert not spikes(losses) and spikes(losses, nats=1.5) == [200]
    losses[250] = 50
    assert not spikes(losses, nats=0)
    assert not spikes([3.0] * 31 + [50.0]) and spikes([3.0] * 32 + [50.0]) == [32]


def test_the_limit_follows_its_formula():
    detector = LossSpikeDetector(2.0)
    detector.recent.extend([3.0, 4.0] * 32)  # median 3.5, differences of 1
    assert detector.limit() == pytest.approx(3.5 + 10 * 1.4826 / 2**0.5)
    assert detector.limit() == torch.tensor(detector.limit(), dtype=torch.float32).item()


def test_the_first_step_of_a_process_may_be_left_out_of_the_time(monkeypatch):
    now = iter([0, 50, 52, 100, 103, 107])
    monkeypatch.setattr(monitoring, "time", SimpleNamespace(perf_counter=lambda: next(now)))
    timer = StepTimer(skip_first=True)
    timer.start()
    assert [timer.lap(), timer.lap()] == [50, 2]
    timer.start()
    assert [timer.lap(), timer.lap()] == [3, 3.5]  # the mean since the start
    assert (timer.seconds, timer.steps) == (9, 3)


@pytest.fixture
def evaluator(tiny_model, tokenizer, tmp_path):
    """Of a model of two layers on 2 x 3 sequences of held-out text; the file gives the same text every time."""
    text = [{"text": f"Row {i} tells of {i} fish and {i * i} birds. " * 5} for i in range(600)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in text))
    loads = count()

    def new_loader():
        next(loads)
        stream = DocumentStream(str(tmp_path / "text.jsonl"), "validation")
        return PackedLoader(stream, tokenizer, 3, 128, **VALIDATION)

    evaluator = Evaluator(FusedTransformer(tiny_model), tiny_model, tokenizer, new_loader, 2)
    evaluator.loads = loads
    return evaluator


def test_bits_per_byte_are_those_of_the_batches_which_are_read_once(evaluator, tiny_model, tokenizer):
    first = evaluator.bpb()
    assert evaluator.bpb() == first and next(evaluator.loads) == 1 and len(evaluator.batches) == 2
    batches = [runtime.to_device(batch, CPU) for batch in evaluator.batches]
    lengths = torch.tensor(token_byte_lengths(tokenizer))
    assert first == pytest.approx(evaluate_bpb(losses_of(tiny_model), batches, lengths), abs=1e-4)
    assert all(p.grad is None for p in tiny_model.parameters())


def test_samples_are_greedy_of_one_length_and_the_same_every_time(evaluator, tokenizer, tiny_model, monkeypatch):
    real, texts = tiny_model.generate, []

    def generate(prompts, **options):
        ids = real(prompts, **options)
        texts[:] = map(tokenizer.decode, ids[:, prompts.shape[1] :])
        assert prompts.shape[1] + 32 == ids.shape[1]
        return ids

    monkeypatch.setattr(tiny_model, "generate", generate)
    tiny_model.generation_config.eos_token_id = list(range(500))  # would end a text early
    samples = evaluator.samples(7)
    assert [sample["text"] for sample in samples] == texts and len(texts) == 3 and samples == evaluator.samples(7)
    assert all(sample["step"] == 7 and sample["prompt"] for sample in samples)
    assert tokenizer.bos_token not in samples[0]["prompt"]


def test_adapters_have_the_configured_rank_and_scale():
    adapters = model_setup.lora(SimpleNamespace(lora_r=4, lora_alpha=12))
    assert (adapters.r, adapters.lora_alpha, adapters.task_type) == (4, 12, "CAUSAL_LM")
    assert model_setup.lora(SimpleNamespace(lora_r=0, lora_alpha=12)) is None
