"""Looking ahead by one step, which the loop does on CUDA: here switched on for the CPU, against runs without it."""

import itertools
import json
import os
import signal
import time
from types import SimpleNamespace

import pytest
import torch
import torch.multiprocessing as mp
from test_optim import free_port
from test_pretrain import (  # noqa: F401  (two are fixtures)
    Killed,
    before_the_rename,
    dies_by_sigkill,
    equal_weights,
    in_a_step,
    in_a_write,
    losses,
    process,
    run,
    straight,
    world,
)

from nanochat_hf.train import checkpoint
from nanochat_hf.train import pretrain as module
from nanochat_hf.train.monitoring import LossSpikeDetector
from nanochat_hf.train.pretrain import Pretraining
from nanochat_hf.train.runtime import copy_to_host_async, to_device

# ruff: noqa: F811  (fixtures as arguments)


def switch_on(patch) -> list[tuple[str, int]]:
    """-> what the loop then does: ("launch" or "settle", step)."""
    init, launch, settle, done = Pretraining.__init__, Pretraining.launch, Pretraining.settle, []

    def looking_ahead(self, *args):
        init(self, *args)
        assert not self.ahead  # a CPU has nothing to win
        self.ahead = True

    patch(Pretraining, "__init__", looking_ahead)
    patch(Pretraining, "launch", lambda self, n, *a: done.append(("launch", n)) or launch(self, n, *a))
    patch(Pretraining, "settle", lambda self, *a: done.append(("settle", self.step)) or settle(self, *a))
    return done


@pytest.fixture
def ahead(straight, monkeypatch):
    """Switches it on, after the runs to compare with."""
    return switch_on(monkeypatch.setattr)


def stop_at(step):
    def push(folder, at):
        if at == step:
            raise Killed

    return {"push_every": step, "push": push}


@pytest.fixture(scope="module")
def checkpoints(world, tmp_path_factory):
    """Checkpoints after 3 to 12 steps of a run that does not look ahead."""
    output = tmp_path_factory.mktemp("checkpoints")
    with pytest.raises(Killed):
        run(world, output, save_every=3, keep_checkpoints=9, **stop_at(12))
    return output / "state"


def same(one, other):
    """Whether two values out of checkpoints are equal, tensors bit for bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def state_of(folder):
    """Weights, optimizer state by parameter and the losses that the alarm knows, and apart from them the rows read."""
    own = torch.load(folder / "rank_00000.pt")
    recent = torch.load(folder / "progress.pt")["recent"]
    return (torch.load(folder / "model.pt"), own["optimizer"]["state"], recent), own["position"]["rows"]


def test_a_step_is_queued_before_the_one_before_is_settled_and_nothing_else_changes(straight, world, tmp_path, ahead):
    metrics = run(world, tmp_path, save_optimizer=True, sample_every=-1)
    stretch = [("launch", 0)]
    for step in range(9):  # evaluation is due after the tenth, so that nothing is on its way then
        stretch += [("launch", step + 1), ("settle", step)]
    stretch += [("settle", 9)]
    assert ahead == stretch + [(word, step + 10) for word, step in stretch]
    assert losses(metrics) == losses(straight[1]) and metrics["samples"] == straight[1]["samples"]
    assert [point.get("val_bpb") for point in metrics["history"]] == [
        point.get("val_bpb") for point in straight[1]["history"]
    ]
    assert equal_weights(straight[0], tmp_path)
    assert same(torch.load(tmp_path / "optimizer.pt"), torch.load(straight[0] / "optimizer.pt"))


def test_checkpoints_and_uploads_see_the_step_that_they_are_of(world, tmp_path, checkpoints, ahead):
    with pytest.raises(Killed):
        run(world, tmp_path, save_every=3, keep_checkpoints=9, **stop_at(12))
    names = sorted(path.name for path in checkpoints.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "state").iterdir()) and len(names) == 4
    assert all(same(state_of(checkpoints / name), state_of(tmp_path / "state" / name)) for name in names)
    assert {step for word, step in ahead if word == "launch"} == set(range(12))


@pytest.mark.parametrize("what", ["gradient", "loss"])
@pytest.mark.parametrize("queued", [True, False])
def test_a_refused_step_leaves_all_as_it_was_also_when_the_next_is_queued(
    world, tmp_path, checkpoints, ahead, monkeypatch, what, queued
):
    calls, real = itertools.count(), module.gradient_norm

    def gradient_norm(model):
        if next(calls) == 6 and what == "gradient":
            for p in model.parameters():
                p.grad.fill_(float("nan"))
        return real(model)

    # Only the limit of step 6 is below its loss: who judges a step by another's stops elsewhere, or never.
    limits = (0.0 if number == 6 and what == "loss" else float("inf") for number in itertools.count())
    monkeypatch.setattr(module, "gradient_norm", gradient_norm)
    monkeypatch.setattr(LossSpikeDetector, "limit", lambda self: next(limits))
    with pytest.raises(FloatingPointError, match=r"step 6: .* at rows 48 to 56 ") as stopped:
        run(world, tmp_path, sample_every=-1 if queued else 7)
    assert ahead[-1] == ("settle", 6) and (ahead[-2] == ("launch", 7)) == queued
    assert ("those of the next step" in str(stopped.value)) == queued
    found, rows = state_of(tmp_path / "state" / "step_000006")
    wanted, before = state_of(checkpoints / "step_000006")
    assert same(found, wanted) and rows == before + (16 if queued else 8)
    monkeypatch.undo()
    assert run(world, tmp_path)["history"][-1]["step"] == 20


def test_a_spike_is_found_by_what_was_known_when_its_step_was_queued(world, tmp_path, ahead, monkeypatch):
    calls, real = itertools.count(), module.to_device

    def to_device(batch, device):
        ids, targets = real(batch, device)
        return ids, torch.randint_like(targets, 300) if next(calls) == 35 else targets

    monkeypatch.setattr(module, "to_device", to_device)
    with pytest.raises(FloatingPointError, match=r"step 35: loss .* after a median of .*rows 280 to 288"):
        run(world, tmp_path, num_iterations=40)
    assert ahead[-2:] == [("launch", 36), ("settle", 35)]
    recent = checkpoint.read_progress(tmp_path / "state" / "step_000035")["recent"]
    assert len(recent) == 35


def signal_in(launch, patch):
    """SIGTERM while the batch of that step is on its way."""
    calls, real = itertools.count(), module.to_device

    def to_device(batch, device):
        if next(calls) == launch:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(batch, device)

    patch(module, "to_device", to_device)


def test_after_a_signal_the_queued_step_is_finished_and_a_rerun_goes_on(straight, world, tmp_path, ahead, monkeypatch):
    with monkeypatch.context() as context:
        signal_in(5, context.setattr)
        with pytest.raises(SystemExit) as stopped:
            run(world, tmp_path)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert ahead[-4:] == [("settle", 4), ("launch", 6), ("settle", 5), ("settle", 6)]
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["step_000007"]
    metrics = run(world, tmp_path)
    assert losses(metrics) == losses(straight[1]) and equal_weights(straight[0], tmp_path)


def test_seconds_are_those_of_steps_however_host_and_device_share_them(world, tmp_path, ahead, monkeypatch):
    """A device that takes 10 s a step and a host that takes 1 s to queue one and 100 s to evaluate."""
    now, free, ends = [0.0], [0.0], {}
    launch, settle, bpb = Pretraining.launch, Pretraining.settle, module.Evaluator.bpb

    def timed_launch(self, number, *before):
        now[0] += 1
        free[0] = ends[number] = max(now[0], free[0]) + 10
        return launch(self, number, *before)

    def timed_settle(self, step):
        now[0] = max(now[0], ends[self.step])
        return settle(self, step)

    def timed_bpb(self):
        now[0] += 100
        return bpb(self)

    monkeypatch.setattr(Pretraining, "launch", timed_launch)
    monkeypatch.setattr(Pretraining, "settle", timed_settle)
    monkeypatch.setattr(module.Evaluator, "bpb", timed_bpb)
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: now[0], time=time.time))
    metrics = run(world, tmp_path)
    assert metrics["training_time_s"] == 2 * (1 + 10 * 10) == now[0] - 200
    speeds = [point["tokens_per_second"] for point in metrics["history"]]
    assert speeds == pytest.approx(2 * [512 * n / (1 + 10 * n) for n in range(1, 11)])  # since the last pause
    assert metrics["tokens_per_second"] == 20 * 512 / 202


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_gives_the_losses_of_one_that_was_not(straight, world, tmp_path, ahead):
    moments = [in_a_step(3), in_a_write(2, 1000), before_the_rename, in_a_write(3, 10**9), in_a_step(9), in_a_step(5)]
    assert all(dies_by_sigkill(world, tmp_path, moment, save_every=3) for moment in moments)
    assert 0 < checkpoint.read_progress(checkpoint.latest(tmp_path / "state"))["step"] < 20
    metrics = run(world, tmp_path, save_every=3)
    assert losses(metrics) == losses(straight[1]) and equal_weights(straight[0], tmp_path)


def process_ahead(rank, *args):
    switch_on(setattr)
    if rank == 1:
        signal_in(2 * 5, setattr)  # two micro-batches a step
    process(rank, *args)


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fsdp2"])
def test_processes_queue_the_same_when_only_one_hears_a_signal(straight, world, tmp_path, sharded):
    shared = {"device_batch_size": 2, "stop_at": 1000}  # never, but a stop is expected
    mp.spawn(process_ahead, (2, free_port(), world, tmp_path, shared, sharded), nprocs=2)
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["step_000007"]
    mp.spawn(process, (2, free_port(), world, tmp_path, {"device_batch_size": 2}, sharded), nprocs=2)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert losses(metrics) == pytest.approx(losses(straight[1]), abs=1e-4)


@pytest.mark.gpu
def test_the_host_waits_neither_for_batches_nor_for_figures_of_the_future():
    cuda, rng = torch.device("cuda"), torch.Generator().manual_seed(0)
    batches = [torch.randint(0, 300, (32, 2049), generator=rng).numpy() for _ in range(20)]
    for seconds in (0.1, 1):  # the first time torch pins the memory that it has the second time
        read, slept = copy_to_host_async(torch.arange(3.0, device=cuda)), torch.cuda.Event()
        torch.cuda._sleep(int(seconds * 2e9))
        slept.record()
        sent = [to_device(batch, cuda) for batch in batches]
        figures, early = read(), not slept.query()
        torch.cuda.synchronize()
    assert early and figures == [0.0, 1.0, 2.0]
    for batch, (ids, targets) in zip(batches, sent):
        assert (ids.cpu().numpy() == batch[:, :-1]).all() and (targets.cpu().numpy() == batch[:, 1:]).all()
