"""Pretraining: pinned losses, the loop one step ahead, interruption and resume, divergence, hooks, bad input.

Renew the pinned losses with `REGENERATE_GOLDEN=1 pytest tests/test_pretrain.py -k pinned`.
"""

import dataclasses
import importlib.util
import itertools
import json
import os
import random
import re
import weakref
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from accelerate import Accelerator

from nanochat_hf.data.tokenizer import load_tokenizer, token_ids, train_bpe
from nanochat_hf.distributed import reset_accelerate_state
from nanochat_hf.errors import InputError
from nanochat_hf.model.modeling_nanochat import NanoChatForCausalLM
from nanochat_hf.train import checkpoint, model_setup, runtime
from nanochat_hf.train import pretrain as module
from nanochat_hf.train.fused_model import FusedTransformer
from nanochat_hf.train.monitoring import LossSpikeDetector, StepTimer
from nanochat_hf.train.pretrain import PretrainConfig, Pretraining, pretrain

GOLDEN = Path(__file__).parent / "golden" / "pretrain_d2.json"
TINY = PretrainConfig(
    depth=2, aspect_ratio=32, head_dim=32, max_seq_len=64, num_iterations=20, total_batch_size=512,
    device_batch_size=8, matrix_lr=0.6, embedding_lr=2.0, unembedding_lr=0.1, warmup_steps=2, eval_every=10,
    eval_tokens=1024, sample_every=-1, save_every=-1,
)  # fmt: skip


class Interrupted(Exception):
    pass


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with text.jsonl and tokenizer/, generated here: other code does not change the pinned losses."""
    folder = tmp_path_factory.mktemp("world")
    rng = random.Random(0)
    who, does = ["the cat", "a dog", "one bird"], ["sees", "likes", "follows"]
    what = ["the moon", "a fish", "red grass"]

    def document(_):
        lines = (f"{rng.choice(who)} {rng.choice(does)} {rng.choice(what)}." for _ in range(rng.randint(2, 20)))
        return " ".join(lines).capitalize()

    texts = [document(i) for i in range(1500)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    train_bpe(iter(texts), vocab_size=300).save_pretrained(folder / "tokenizer")
    return folder


def run(world, output, **changes):
    hooks = {name: changes.pop(name) for name in ("core", "push", "model") if name in changes}
    config = dataclasses.replace(TINY, **{"dataset": str(world / "text.jsonl"), **changes})
    return pretrain(config, str(world / "tokenizer"), output, **hooks)


def losses(metrics):
    return [point["train_loss"] for point in metrics["history"]]


def weights(folder):
    return NanoChatForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()


def same(one, other) -> bool:
    """Whether two nested values are equal, tensors bit for bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def states(output) -> list[str]:
    return sorted(path.name for path in (output / "state").iterdir())


def interrupt_at(step):
    def push(folder, at):
        if at == step:
            raise Interrupted

    return {"push_every": step, "push": push}


@pytest.fixture(scope="module")
def straight(world, tmp_path_factory):
    """The uninterrupted run that others are compared with: (folder, metrics)."""
    output = tmp_path_factory.mktemp("straight")
    return output, run(world, output, save_optimizer=True)


@pytest.fixture
def trace(monkeypatch):
    """What the loop does: ("enqueue" or "finalize", step), and "start" and "lap" of its timer."""
    events = []

    def note(owner, name, event):
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda self, *args: events.append(event(self, *args)) or real(self, *args))

    note(Pretraining, "enqueue_step", lambda self, number, *_: ("enqueue", number))
    note(Pretraining, "finalize_step", lambda self, *_: ("finalize", self.step))
    note(StepTimer, "start", lambda self: "start")
    note(StepTimer, "lap", lambda self: "lap")
    return events


def on_batch(patch, number, effect):
    """Apply `effect` to the targets of the number-th micro-batch of a process."""
    batches, real = itertools.count(), runtime.to_device

    def to_device(batch, device):
        ids, targets = real(batch, device)
        return ids, effect(targets) if next(batches) == number else targets

    patch(runtime, "to_device", to_device)


def noise(targets):
    return torch.randint_like(targets, 300)


# --- the loop


def test_twenty_steps_follow_the_pinned_losses(straight):
    values = losses(straight[1])
    if os.environ.get("REGENERATE_GOLDEN"):
        GOLDEN.write_text(json.dumps([round(loss, 5) for loss in values]) + "\n")
    assert values == pytest.approx(json.loads(GOLDEN.read_text()), abs=2e-3)


def test_the_result_is_a_model_folder_with_its_metrics(straight, world):
    folder, returned = straight
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["finished"] and metrics["history"] == returned["history"] and not (folder / "state").exists()
    assert metrics["total_tokens"] == 20 * 512 and metrics["gradient_accumulation"] == 1
    assert metrics["val_bpb"] < metrics["history"][9]["val_bpb"] < metrics["start_val_bpb"] and metrics["core"] is None
    assert metrics["tokens_per_second"] > 0 and metrics["mfu"] is None
    assert [point["lr_multiplier"] for point in metrics["history"]][:3] == [0.5, 1, 1]
    assert metrics["history"][1]["lr"] == pytest.approx(0.6 / 32)  # by the root of 512 of 2^19 tokens
    assert (metrics["history"][9]["tokens"], metrics["history"][0]["momentum"]) == (10 * 512, 0.85)
    model, tokenizer = NanoChatForCausalLM.from_pretrained(folder), load_tokenizer(folder)
    assert sum(p.numel() for p in model.parameters()) == metrics["num_parameters"]
    assert model.config.token_ids == token_ids(tokenizer)
    assert set(torch.load(folder / "optimizer.pt")) == {name for name, _ in model.named_parameters()}
    assert not list(folder.glob(".*"))
    sample = metrics["samples"][0]
    assert sample["step"] == 20
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(sample["prompt"], add_special_tokens=False).input_ids]])
    new = model.generate(ids, max_new_tokens=32, min_new_tokens=32, do_sample=False)[0, ids.shape[1] :]
    assert tokenizer.decode(new) == sample["text"]


def test_each_step_is_enqueued_before_the_last_is_finalized_and_none_too_many(world, tmp_path, trace, monkeypatch):
    monkeypatch.setattr(module, "HISTORY", 2)  # points of the curve, besides the first and evaluations
    metrics = run(world, tmp_path, num_iterations=8, eval_every=5)
    assert [point["step"] for point in metrics["history"]] == [1, 4, 5, 8]
    expected = []
    for first, last in ((0, 4), (5, 7)):  # the evaluation after five steps needs their weights, and has its own time
        expected += ["start", ("enqueue", first)]
        for step in range(first, last):
            expected += [("enqueue", step + 1), ("finalize", step), "lap"]
        expected += [("finalize", last), "lap"]
    assert trace == expected


def state_of(folder):
    """(weights, optimizer state, recent losses), and apart from them the number of sequences read."""
    own, recent = torch.load(folder / "rank_00000.pt"), torch.load(folder / "progress.pt")["recent"]
    return (torch.load(folder / "model.pt"), own["optimizer"]["state"], recent), own["position"]["rows"]


def test_training_can_start_from_given_weights_and_leaves_nothing_to_the_next(straight, world, tmp_path, monkeypatch):
    models, real = [], model_setup.build_model
    monkeypatch.setattr(model_setup, "build_model", lambda *a: models.append(weakref.ref(m := real(*a))) or m)
    metrics = run(world, tmp_path, num_iterations=2, depth=7, model=str(straight[0]), eval_every=0)
    assert metrics["depth"] == 2 and metrics["val_bpb"] is None and losses(metrics)[0] < losses(straight[1])[-1] + 0.5
    reset_accelerate_state()
    assert len(models) == 1 and models[0]() is None
    texts = (world / "text.jsonl").read_text()
    train_bpe(iter([texts.upper()]), vocab_size=300).save_pretrained(tmp_path / "tokenizer")  # other ids
    (tmp_path / "text.jsonl").write_text(texts)
    with pytest.raises(InputError, match="do not belong together: it was trained with other ids"):
        run(tmp_path, tmp_path / "out", model=str(straight[0]))


# --- divergence


@pytest.mark.parametrize("what, pending", [("gradient", False), ("loss", True)])
def test_a_diverged_step_leaves_all_as_it_was_also_with_a_next_one(world, tmp_path, trace, monkeypatch, what, pending):
    with pytest.raises(Interrupted):
        run(world, tmp_path / "healthy", save_every=6, **interrupt_at(6))
    trace.clear()
    calls, real = itertools.count(), model_setup.gradient_norm

    def gradient_norm(model):
        if next(calls) == 6 and what == "gradient":
            for p in model.parameters():
                p.grad.fill_(float("nan"))
        return real(model)

    # Only the limit of step 6 is below its loss: a step judged by another one's limit would stop elsewhere, or never.
    limits = (0.0 if number == 6 and what == "loss" else float("inf") for number in itertools.count())
    monkeypatch.setattr(model_setup, "gradient_norm", gradient_norm)
    monkeypatch.setattr(LossSpikeDetector, "limit", lambda self: next(limits))
    with pytest.raises(FloatingPointError, match=r"step 6: .* at sequences 48 to 56 ") as stopped:
        run(world, tmp_path / "diverged", sample_every=-1 if pending else 7)
    assert trace[-1] == ("finalize", 6) and (trace[-2] == ("enqueue", 7)) == pending
    assert ("those of the next step" in str(stopped.value)) == pending
    state, sequences = state_of(tmp_path / "diverged" / "state" / "step_000006")
    expected, before = state_of(tmp_path / "healthy" / "state" / "step_000006")
    assert same(state, expected) and sequences == before + (16 if pending else 8)


def test_a_spike_stops_before_the_weights_and_a_rerun_skips_its_data(world, tmp_path, monkeypatch):
    saved, times, message = [], [], r"step 35: loss .* after a median of .*sequences 280 to 288.*max_loss_spike=0"
    for batch, name in ((35, "step_000035"), (0, "step_000035.1")):  # the checkpoint holds the losses to compare with
        on_batch(monkeypatch.setattr, batch, noise)
        with pytest.raises(FloatingPointError, match=message):
            run(world, tmp_path, num_iterations=40)
        assert states(tmp_path) == [name]
        progress = checkpoint.read_progress(tmp_path / "state" / name)
        assert len(progress["recent"]) == 35
        times.append(progress["wall_time_s"])
        saved.append(torch.load(tmp_path / "state" / name / "model.pt"))
        monkeypatch.undo()
    assert same(*saved) and times[0] < times[1]  # that of the process before counts, too
    on_batch(monkeypatch.setattr, 0, noise)
    metrics = run(world, tmp_path, num_iterations=40, max_loss_spike=0)
    assert metrics["history"][-1]["step"] == 40 and metrics["start_val_bpb"] == progress["start_val_bpb"] > 0


def test_large_gradients_are_clipped_and_small_ones_never_scaled_up(world, tmp_path, monkeypatch):
    norms, factors = iter([0.25, 4.0]), []
    monkeypatch.setattr(model_setup, "gradient_norm", lambda model: torch.tensor(next(norms)))
    monkeypatch.setattr(model_setup, "scale_gradients", lambda model, factor: factors.append(float(factor)))
    metrics = run(world, tmp_path, generation=1, num_iterations=2, eval_every=0)
    assert factors == [1.0, 0.25]  # the first generation clips at norm 1
    assert metrics["num_parameters"] == 2 * 300 * 64 + 24 * 64**2


class SecondRank:
    """As OwnerGradientReducer on a rank whose partner has the same text and owns half of the squared norm."""

    def __init__(self, owners):
        self.parameters = list(owners)

    def __enter__(self):
        pass

    def __exit__(self, *args):
        for p in self.parameters:
            p.grad *= 2

    def squared_norm(self):
        return sum(p.grad.square().sum() for p in self.parameters) / 2


def test_ranks_average_their_gradients_and_share_the_evaluation(world, tmp_path, monkeypatch):
    monkeypatch.setattr(Pretraining, "world", 2)
    monkeypatch.setattr(module, "OwnerGradientReducer", SecondRank)
    config = dataclasses.replace(TINY, dataset=str(world / "text.jsonl"), device_batch_size=4, seed=3)
    training = Pretraining(config, str(world / "tokenizer"), tmp_path, None, None, None)
    assert training.evaluator.num_batches == 1024 // (4 * 64 * 2) and torch.initial_seed() == 3
    batch = next(training.loader)
    training.loader.close()
    training.loss_model(*runtime.to_device(batch, training.device)).backward()
    norm = model_setup.gradient_norm(training.model).item()
    training.optimizer.zero_grad()
    training.loader = iter([batch])
    assert training.enqueue_step(0).read()[1] == pytest.approx(norm, rel=1e-4)


def test_float16_skips_steps_until_its_loss_scale_fits(straight, world, tmp_path, monkeypatch):
    monkeypatch.setattr(model_setup, "compute_dtype", lambda device, half=False: torch.float16)
    monkeypatch.setattr(module, "LOSS_SCALE", 2.0**21)  # overflows in the first steps
    keys = {"num_iterations": 12, "eval_every": 4, "save_optimizer": True}
    with pytest.raises(Interrupted):
        run(world, tmp_path, save_every=8, **keys, **interrupt_at(8))
    metrics = run(world, tmp_path, **keys)  # with the loss scale that was reached
    norms = [point["grad_norm"] or float("inf") for point in metrics["history"]]  # JSON has no infinity
    skipped = next(i for i, norm in enumerate(norms) if norm < float("inf"))
    assert 0 < skipped < 8 and all(norm < float("inf") for norm in norms[skipped:])
    assert losses(metrics)[skipped] == pytest.approx(losses(metrics)[0], abs=0.1)  # the weights did not change
    assert norms[skipped] == pytest.approx(straight[1]["history"][0]["grad_norm"], rel=0.5)
    assert losses(metrics)[-1] < losses(metrics)[0] - 1 and metrics["val_bpb"] < metrics["history"][3]["val_bpb"]
    assert weights(tmp_path)["model.embed_tokens.weight"].dtype == torch.float32
    steps = torch.load(tmp_path / "optimizer.pt")["model.embed_tokens.weight"]["step"]
    assert steps == 12 - skipped


@pytest.mark.slow
def test_float16_stops_when_there_is_no_loss_scale_left(world, tmp_path, monkeypatch):
    norms = iter([float("inf")] * 3 + [1.0])  # at scales 4, 2 and 1; the last is of the next step, already enqueued
    monkeypatch.setattr(model_setup, "compute_dtype", lambda device, half=False: torch.float16)
    monkeypatch.setattr(module, "LOSS_SCALE", 4.0)
    monkeypatch.setattr(model_setup, "gradient_norm", lambda model: torch.tensor(next(norms)))
    with pytest.raises(FloatingPointError, match=r"step 2: loss .* gradient norm inf"):
        run(world, tmp_path)
    (_, optimizer_state, _), _ = state_of(tmp_path / "state" / "step_000002")
    for state in optimizer_state.values():  # of no step
        assert all(not value.any() for key, value in state.items() if key != "second_momentum")


# --- micro-batches, hooks


def test_a_micro_batch_that_does_not_fit_is_halved_and_the_run_goes_on(straight, world, tmp_path, monkeypatch, capsys):
    real = FusedTransformer.forward

    def small_device(self, ids, *args, **kwargs):
        if len(ids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(self, ids, *args, **kwargs)

    monkeypatch.setattr(FusedTransformer, "forward", small_device)
    metrics = run(world, tmp_path, device_batch_size=-1, num_iterations=20)
    assert (metrics["device_batch_size"], metrics["gradient_accumulation"]) == (2, 4)
    output = capsys.readouterr().out
    assert "8 sequences of 64 tokens, chosen by the free memory" in output and "out of memory, trying 2" in output
    assert "ranks 1 x micro-batch 2 x accumulation 4" in output
    assert losses(metrics) == pytest.approx(losses(straight[1]), abs=1e-3)


@pytest.mark.slow
def test_trackers_get_all_metrics_and_the_terminal_a_line_per_step(world, tmp_path, monkeypatch, capsys):
    real, logged = importlib.util.find_spec, {}

    def init_trackers(self, name, values):
        logged["config"], self.trackers = values, [SimpleNamespace(finish=lambda: logged.update(finished=True))]

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "tensorboard" or real(name))
    monkeypatch.setattr(Accelerator, "init_trackers", init_trackers)
    monkeypatch.setattr(Accelerator, "log", lambda self, values, step: logged.update({step: values}))
    monkeypatch.setattr(Pretraining, "mfu", lambda self, speed: speed / 1e9)  # a CPU has none
    run(
        world, tmp_path, num_iterations=4, report_to="tensorboard", log_every=1, eval_every=2, sample_every=2,
        core_metric_every=4, core=lambda model, limit: 0.25,
    )  # fmt: skip
    assert logged["config"]["depth"] == 2 and logged["finished"] and logged[3]["tokens"] == 3 * 512
    every = {"step", "tokens", "time", "train_loss", "grad_norm", "lr", "lr_multiplier", "momentum"}
    every |= {"tokens_per_second", "mfu"}
    assert set(logged[1]) == set(logged[3]) == every
    assert set(logged[2]) == every | {"val_bpb", "samples"} and set(logged[4]) == set(logged[2]) | {"core"}
    assert re.match(r"(['\"]).+\1 -> ['\"]", logged[2]["samples"])
    lines = [line for line in capsys.readouterr().out.splitlines() if "grad norm" in line]
    words = r"step 3/4: loss \d\.\d{3}, lr 0\.0\S+, momentum 0\.85\d, grad norm \S+, [\d.]+K? tok/s, MFU \S+%"
    assert len(lines) == 4 and re.fullmatch(re.escape(f"[{tmp_path.name}] ") + words, lines[2])


def test_hooks_are_called_and_lines_printed_when_due(world, tmp_path, monkeypatch, capsys):
    calls, shown, loaders, real = [], [], [], module.PackedLoader
    monkeypatch.setattr(module, "PackedLoader", lambda *a, **keys: loaders.append(real(*a, **keys)) or loaders[-1])
    monkeypatch.setattr(module.Progress, "update", lambda self, step, words: shown.append(float(words[5:10])))
    monkeypatch.setattr(real, "epoch", 3)
    metrics = run(
        world, tmp_path, num_iterations=5, core_metric_every=2, core_metric_max_per_task=7, push_every=4, log_every=2,
        core=lambda model, limit: calls.append(limit) or 0.25,
        push=lambda folder, step: calls.append((step, NanoChatForCausalLM.from_pretrained(folder).config.vocab_size)),
    )  # fmt: skip
    assert calls == [7, 7, (4, 320), 7] and metrics["core"] == 0.25 and metrics["val_bpb"] > 0  # also at the end
    assert metrics["epochs"] == 3
    assert [point["step"] for point in metrics["history"] if "core" in point] == [2, 4, 5]
    assert re.findall(r"step (\d)/5: loss", capsys.readouterr().out) == ["2", "4"]
    packing = [(loader.num_shards, loader.buffer_size, loader.packing_strategy) for loader in loaders]
    assert set(packing) == {(64, 1000, "bfd_split"), (8, 1000, "bfd")}  # training; validation as upstream
    smooth = itertools.accumulate(losses(metrics), lambda mean, loss: 0.9 * mean + 0.1 * loss)
    assert shown == pytest.approx(list(smooth), abs=6e-4)


# --- keys and bad input


OFFLOAD = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"}


@pytest.mark.parametrize(
    "changes, environment, message",
    [
        ({"fp8": True}, {}, "fp8 needs an NVIDIA GPU of compute capability 8.9 or newer"),
        ({}, {"WORLD_SIZE": "2"}, "2 processes were launched and Accelerate sees no GPU"),
        ({}, OFFLOAD | {"WORLD_SIZE": "1"}, "offload_optimizer_device: .*fsdp2.yaml"),
    ],
)
def test_bad_input_is_one_clear_line(world, tmp_path, monkeypatch, changes, environment, message):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=message) as error:
        run(world, tmp_path, **changes)
    assert "\n" not in str(error.value) and not (tmp_path / "metrics.json").exists()


def test_a_text_too_short_for_two_splits_is_refused_before_the_first_step(world, tmp_path, trace):
    (tmp_path / "one.jsonl").write_text('{"text": "The only text there is."}\n')
    with pytest.raises(InputError, match=r"validation split of .* has no text: its one file has too few texts"):
        run(world, tmp_path / "out", dataset=str(tmp_path / "one.jsonl"), eval_every=-1)
    assert not trace


def test_a_divergence_names_the_median_and_the_checkpoint_that_is_left(tmp_path, monkeypatch):
    plan, spikes = SimpleNamespace(total_batch_size=64, max_seq_len=8), SimpleNamespace(recent=[3.0, 1.0, 2.0])
    state = SimpleNamespace(plan=plan, spikes=spikes, pending_step=None, step=5, output=tmp_path)
    state.save = lambda: "step_5"
    text = module.Pretraining.divergence_message(state, 9.0, 1.5)
    begin = "step 5: loss 9 after a median of 2, gradient norm 1.5, at sequences 40 to 48 of the data"
    assert text.startswith(f"{begin}; step_5 has the weights before it.")
    state.save = Mock(side_effect=FloatingPointError)
    for left, words in (([], "there is no checkpoint yet"), (["a", "b"], "the last checkpoint is b")):
        monkeypatch.setattr(module.checkpoint, "complete_checkpoints", lambda folder, left=left: left)
        text = module.Pretraining.divergence_message(state, 9.0, 1.5)
        assert text == f"{begin}, and the weights are not finite; {words}. Lower the learning rates"
