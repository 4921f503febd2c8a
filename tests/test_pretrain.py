"""The pretraining loop: a pinned trajectory, exact resume, accumulation, several processes, stops, bad input.

The pinned losses are renewed with `REGENERATE_GOLDEN=1 pytest tests/test_pretrain.py -k pinned`.
"""

import dataclasses
import itertools
import json
import os
import random
import re
import signal
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.multiprocessing as mp
from accelerate import tracking
from accelerate.state import AcceleratorState, GradientState
from accelerate.tracking import GeneralTracker
from accelerate.utils import LoggerType
from test_optim import free_port

from nanochat_hf.data.tokenizer import load_tokenizer, train_bpe
from nanochat_hf.distributed import reset_accelerate_state
from nanochat_hf.errors import InputError
from nanochat_hf.model.modeling_nanochat import NanoChatForCausalLM
from nanochat_hf.train import checkpoint
from nanochat_hf.train import model_setup as network
from nanochat_hf.train import pretrain as module
from nanochat_hf.train import runtime as device
from nanochat_hf.train.fused_model import FusedTransformer
from nanochat_hf.train.pretrain import PretrainConfig, Pretraining, pretrain
from nanochat_hf.train.sft import ChatConfig, ChatTrainer, train_chat

GOLDEN = Path(__file__).parent / "golden" / "pretrain_d2.json"
TINY = PretrainConfig(
    depth=2, aspect_ratio=32, head_dim=32, max_seq_len=64, num_iterations=20, total_batch_size=512,
    device_batch_size=8, matrix_lr=0.6, embedding_lr=2.0, unembedding_lr=0.1, warmup_steps=2, eval_every=10,
    eval_tokens=1024, sample_every=-1, save_every=-1,
)  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with text.jsonl and tokenizer/, made by rule: nothing that others change moves the pinned losses."""
    folder = tmp_path_factory.mktemp("world")
    rng = random.Random(0)
    who, does, what = (
        ["the cat", "a dog", "one bird"],
        ["sees", "likes", "follows"],
        ["the moon", "a fish", "red grass"],
    )

    def document(_):
        lines = (f"{rng.choice(who)} {rng.choice(does)} {rng.choice(what)}." for _ in range(rng.randint(2, 20)))
        return " ".join(lines).capitalize()

    texts = [document(i) for i in range(1500)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    train_bpe(iter(texts), vocab_size=300).save_pretrained(folder / "tokenizer")
    return folder


def run(world, output, **changes):
    hooks = {name: changes.pop(name) for name in ("core", "push", "model") if name in changes}
    config = dataclasses.replace(TINY, dataset=str(world / "text.jsonl"), **changes)
    return pretrain(config, str(world / "tokenizer"), output, **hooks)


def losses(metrics):
    return [point["train_loss"] for point in metrics["history"]]


@pytest.fixture(scope="module")
def straight(world, tmp_path_factory):
    """The uninterrupted run that others are compared with: (folder, metrics)."""
    output = tmp_path_factory.mktemp("straight")
    return output, run(world, output, save_optimizer=True)


def weights(folder):
    return NanoChatForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()


def equal_weights(one, other):
    return all(torch.equal(value, weights(other)[name]) for name, value in weights(one).items())


def test_twenty_steps_follow_the_pinned_losses(straight):
    found = losses(straight[1])
    if os.environ.get("REGENERATE_GOLDEN"):
        GOLDEN.write_text(json.dumps([round(loss, 5) for loss in found]) + "\n")
    assert found == pytest.approx(json.loads(GOLDEN.read_text()), abs=2e-3)


def test_the_result_is_a_model_folder_with_its_figures(straight, world):
    folder, returned = straight
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["finished"] and metrics["history"] == returned["history"] and not (folder / "state").exists()
    assert metrics["total_tokens"] == 20 * 512 and metrics["gradient_accumulation"] == 1
    assert metrics["val_bpb"] < metrics["history"][9]["val_bpb"] and metrics["core"] is None
    assert metrics["tokens_per_second"] > 0 and metrics["mfu"] is None
    model, tokenizer = NanoChatForCausalLM.from_pretrained(folder), load_tokenizer(folder)
    assert sum(p.numel() for p in model.parameters()) == metrics["num_parameters"]
    sample = metrics["samples"][0]
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(sample["prompt"], add_special_tokens=False).input_ids]])
    text = tokenizer.decode(
        model.generate(ids, max_new_tokens=32, min_new_tokens=32, do_sample=False)[0, ids.shape[1] :]
    )
    assert text == sample["text"]


class Killed(Exception):
    pass


def test_a_killed_run_goes_on_bit_for_bit(straight, world, tmp_path):
    def kill(folder, step):
        raise Killed

    with pytest.raises(Killed):
        run(world, tmp_path, save_every=5, push_every=15, push=kill)
    assert not (tmp_path / "metrics.json").exists()
    assert sorted(path.name for path in (tmp_path / "state").iterdir()) == ["step_000010", "step_000015"]
    resumed = run(world, tmp_path, save_every=5)
    assert losses(resumed) == losses(straight[1]) and resumed["samples"] == straight[1]["samples"]
    assert equal_weights(straight[0], tmp_path)


def dies_by_sigkill(world, output, moment: Callable, **changes) -> bool:
    """Run in a process of its own that kills itself, uncatchably, where `moment(kill)` says; whether it did."""

    def main():
        moment(lambda: os.kill(os.getpid(), signal.SIGKILL))
        run(world, output, **changes)

    child = mp.get_context("fork").Process(target=main)
    child.start()
    child.join()
    assert child.exitcode in (0, -signal.SIGKILL)
    return child.exitcode != 0


def in_a_write(number, bytes_written):
    """The moment when that many bytes of the file `number` of the run's checkpoints are on the disk."""

    def moment(kill):
        real, numbers = checkpoint.write, itertools.count(1)

        def write(value, path):
            real(value, path)
            if next(numbers) == number:
                os.truncate(path, min(bytes_written, path.stat().st_size))
                kill()

        checkpoint.write = write

    return moment


def in_a_step(number):
    def moment(kill):
        real, numbers = module.gradient_norm, itertools.count(1)
        module.gradient_norm = lambda model: kill() if next(numbers) == number else real(model)

    return moment


def before_the_rename(kill):
    checkpoint.os = SimpleNamespace(replace=lambda *paths: kill(), fsync=os.fsync)


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_gives_the_losses_of_one_that_was_not(straight, world, tmp_path):
    """SIGKILL in a step, before there is a checkpoint, in each file of one, whole or half, and before its rename."""
    moments = [
        in_a_step(2), in_a_write(1, 0), in_a_write(2, 1000), before_the_rename, in_a_write(3, 10**9),
        in_a_write(5, 99), in_a_step(9), in_a_write(4, 50), before_the_rename, in_a_step(6),
    ]  # fmt: skip
    assert all(dies_by_sigkill(world, tmp_path, moment, save_every=3) for moment in moments)
    assert 0 < checkpoint.read_progress(checkpoint.latest(tmp_path / "state"))["step"] < 20
    metrics = run(world, tmp_path, save_every=3)
    assert losses(metrics) == losses(straight[1]) and metrics["samples"] == straight[1]["samples"]
    assert equal_weights(straight[0], tmp_path) and not (tmp_path / "state").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_leaves(straight, world, tmp_path, number):
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as stopped:
        run(world, tmp_path, push_every=3, push=lambda folder, step: os.kill(os.getpid(), number))
    assert stopped.value.code == 128 + number and signal.getsignal(number) is before
    assert (tmp_path / "state" / "step_000004").is_dir()
    assert losses(run(world, tmp_path)) == losses(straight[1])


def test_accumulated_micro_batches_equal_one_batch(straight, world, tmp_path):
    split = run(world, tmp_path, device_batch_size=1)
    assert split["gradient_accumulation"] == 8
    assert losses(split) == pytest.approx(losses(straight[1]), abs=1e-4)
    assert split["val_bpb"] == pytest.approx(straight[1]["val_bpb"], abs=1e-4)


def test_a_loss_that_is_not_finite_stops_before_the_weights_and_can_go_on(world, tmp_path, monkeypatch):
    norms, real = iter([False, False, False, True] + [False] * 20), module.gradient_norm
    monkeypatch.setattr(module, "gradient_norm", lambda model: real(model) * (float("nan") if next(norms) else 1))
    with pytest.raises(FloatingPointError, match=r"step 3: loss .*rows 24 to 32"):
        run(world, tmp_path)
    saved = torch.load(tmp_path / "state" / "step_000003" / "model.pt")
    assert all(value.isfinite().all() for value in saved.values())
    assert run(world, tmp_path)["history"][-1]["step"] == 20


def test_a_spike_stops_before_the_weights_and_a_rerun_skips_its_rows(world, tmp_path, monkeypatch):
    def garbage_at(call):
        calls = itertools.count()

        def to_device(batch, device):
            ids, targets = real(batch, device)
            return ids, torch.randint_like(targets, 300) if next(calls) == call else targets

        monkeypatch.setattr(module, "to_device", to_device)

    real, saved = module.to_device, []
    for call, name in ((35, "step_000035"), (0, "step_000035.1")):  # the second knows from the first what is usual
        garbage_at(call)
        message = r"step 35: loss .* after a median of .*rows 280 to 288.*max_loss_spike=0"
        with pytest.raises(FloatingPointError, match=message):
            run(world, tmp_path, num_iterations=40)
        assert [path.name for path in (tmp_path / "state").iterdir()] == [name]
        saved.append(torch.load(tmp_path / "state" / name / "model.pt"))
    assert all(torch.equal(value, saved[1][name]) for name, value in saved[0].items())
    garbage_at(0)
    assert run(world, tmp_path, num_iterations=40, max_loss_spike=0)["history"][-1]["step"] == 40


def test_a_batch_that_does_not_fit_is_halved_and_the_run_goes_on(straight, world, tmp_path, monkeypatch, capsys):
    real = FusedTransformer.forward

    def small_device(self, ids, *args, **kwargs):
        if len(ids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(self, ids, *args, **kwargs)

    monkeypatch.setattr(FusedTransformer, "forward", small_device)
    metrics = run(world, tmp_path, device_batch_size=-1, num_iterations=20)
    assert (metrics["device_batch_size"], metrics["gradient_accumulation"]) == (2, 4)
    said = capsys.readouterr().out
    assert "8 rows of 64 tokens, chosen by the free memory" in said and "out of memory, trying 2 rows" in said
    assert losses(metrics) == pytest.approx(losses(straight[1]), abs=1e-3)


def test_other_errors_of_the_first_step_are_shown(world, tmp_path, monkeypatch):
    def broken(self, *args, **kwargs):
        raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(FusedTransformer, "forward", broken)
    with pytest.raises(RuntimeError, match="illegal"):
        run(world, tmp_path)


def test_float16_is_trained_with_a_scaled_loss(world, tmp_path, monkeypatch):
    for place in (module, network):
        monkeypatch.setattr(place, "compute_dtype", lambda device, half=False: torch.float16)
    monkeypatch.setattr(module, "LOSS_SCALE", 2.0**28)  # too large: must come down by itself
    scales, real = [], Pretraining.train_step
    monkeypatch.setattr(Pretraining, "train_step", lambda self: scales.append(self.loss_scale) or real(self))
    metrics = run(world, tmp_path, num_iterations=8, eval_every=4)
    assert losses(metrics)[-1] < losses(metrics)[0] - 1.5 and metrics["val_bpb"] < metrics["history"][3]["val_bpb"]
    assert scales[0] == 2**28 and 1 < scales[-1] < 2**28
    assert weights(tmp_path)["model.embed_tokens.weight"].dtype == torch.float32


class Recorder(GeneralTracker):
    """A tracker as Accelerate wants it, that keeps what it is told."""

    name, requires_logging_directory = "tensorboard", True
    told: dict = {}

    def __init__(self, run_name, logging_dir=None, **kwargs):
        super().__init__()

    tracker = None

    def store_init_configuration(self, values):
        self.told["config"] = values

    def log(self, values, step, **kwargs):
        assert step not in self.told
        self.told[step] = values

    def finish(self):
        self.told["finished"] = True


def test_trackers_get_every_figure_and_the_terminal_a_line_a_step(world, tmp_path, monkeypatch, capsys):
    real = device.importlib.util.find_spec
    monkeypatch.setattr(device.importlib.util, "find_spec", lambda name: name == "tensorboard" or real(name))
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "tensorboard", Recorder)
    monkeypatch.setattr(tracking, "_available_trackers", [LoggerType.TENSORBOARD])
    monkeypatch.setattr(Pretraining, "mfu", lambda self, speed: speed / 1e9)  # a CPU has none
    metrics = run(
        world, tmp_path, num_iterations=4, report_to="tensorboard", log_every=1, eval_every=2, sample_every=2,
        core_metric_every=4, core=lambda model, limit: 0.25,
    )  # fmt: skip
    told = Recorder.told
    assert told["config"]["depth"] == 2 and told["finished"]
    every = {"step", "tokens", "time", "train_loss", "grad_norm", "lr", "lr_multiplier", "momentum"}
    every |= {"tokens_per_second", "mfu"}
    assert set(told[1]) == set(told[3]) == every
    assert set(told[2]) == every | {"val_bpb", "samples"} and set(told[4]) == set(told[2]) | {"core"}
    assert told[4]["samples"].count("->") == 4 and "samples" not in metrics["history"][-1]
    lines = [line for line in capsys.readouterr().out.splitlines() if "grad norm" in line]
    assert len(lines) == 4 and re.match(
        r"step 3/4: loss \d.*, [\d,]+ tok/s, MFU .*, lr 0.0.*, momentum 0\.85", lines[2]
    )


def test_sft_begins_with_the_momenta_of_pretraining(world, tmp_path, monkeypatch):
    run(world, tmp_path / "base", num_iterations=3, save_optimizer=True)
    saved = torch.load(tmp_path / "base" / "optimizer.pt")
    named = dict(NanoChatForCausalLM.from_pretrained(tmp_path / "base").named_parameters())
    assert set(saved) == set(named) and not list(tmp_path.glob("base/.*"))
    found = {}

    def look(self, model, *args, **kwargs):
        names = {p: name for name, p in self.accelerator.unwrap_model(model).named_parameters()}
        found.update({names[p]: state for p, state in self.optimizer.optimizer.state.items()})
        raise Killed

    monkeypatch.setattr(ChatTrainer, "training_step", look)
    AcceleratorState._reset_state()
    GradientState._reset_state()
    config = ChatConfig(mixture=[{"dataset": "primer", "rows": 20}], max_seq_len=128, device_batch_size=2)
    with pytest.raises(Killed):
        train_chat(config, str(tmp_path / "base"), tmp_path / "sft")
    assert set(found) == set(saved)
    momentum = found["model.layers.1.mlp.fc1.weight"]["momentum_buffer"]
    assert momentum.abs().sum() > 0
    for name, state in found.items():
        for key, value in state.items():
            assert torch.equal(value, saved[name][key].float())


def test_hooks_are_called_when_due(world, tmp_path):
    calls = []
    metrics = run(
        world, tmp_path, num_iterations=5, core_metric_every=2, core_metric_max_per_task=7, push_every=4,
        core=lambda model, limit: calls.append(limit) or 0.25,
        push=lambda folder, step: calls.append((step, NanoChatForCausalLM.from_pretrained(folder).config.vocab_size)),
    )  # fmt: skip
    assert calls == [7, 7, (4, 320), 7] and metrics["core"] == 0.25
    assert [point["step"] for point in metrics["history"] if "core" in point] == [2, 4, 5]


def test_training_can_begin_with_given_weights(straight, world, tmp_path):
    metrics = run(world, tmp_path, num_iterations=2, depth=7, model=str(straight[0]))
    assert metrics["depth"] == 2 and losses(metrics)[0] < losses(straight[1])[-1] + 0.5


def test_the_first_generation_trains_too(world, tmp_path):
    metrics = run(
        world, tmp_path, generation=1, num_iterations=12, matrix_lr=None, embedding_lr=None, unembedding_lr=None
    )
    assert losses(metrics)[-1] < losses(metrics)[0] - 1 and metrics["num_parameters"] == 2 * 300 * 64 + 24 * 64**2
    assert NanoChatForCausalLM.from_pretrained(tmp_path).config.generation == 1


def test_nothing_of_a_stage_is_left_for_the_next(world, tmp_path, monkeypatch):
    made, real = [], module.build_model
    monkeypatch.setattr(module, "build_model", lambda *a: made.append(weakref.ref(m := real(*a))) or m)
    run(world, tmp_path, num_iterations=1)
    reset_accelerate_state()
    assert len(made) == 1 and made[0]() is None


def test_the_models_own_forward_gives_the_same_losses(straight, world, tmp_path):
    metrics = run(world, tmp_path, num_iterations=4, warmdown_ratio=0.0, attn_implementation="eager")
    assert losses(metrics)[:3] == pytest.approx(losses(straight[1])[:3], abs=1e-3)


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"device_batch_size": 0}, "must be at least one row"),
        ({"dataset": "nowhere/text.jsonl"}, "no dataset"),
        ({"report_to": "paper"}, "choose one of none, trackio"),
        ({"fp8": True}, "fp8 needs a CUDA device"),
        ({"depth": 24, "aspect_ratio": 64, "num_iterations": -1, "total_batch_size": -1}, "no GPU found"),
        ({"model": "nowhere"}, "no model in nowhere"),
    ],
)
def test_bad_input_is_one_clear_line(world, tmp_path, changes, message):
    if "dataset" in changes:
        with pytest.raises(InputError, match=message):
            pretrain(dataclasses.replace(TINY, **changes), str(world / "tokenizer"), tmp_path)
        return
    with pytest.raises(InputError, match=message) as error:
        run(world, tmp_path, **changes)
    assert "\n" not in str(error.value) and not (tmp_path / "metrics.json").exists()


def test_what_a_zero_launch_asks_for_beside_its_stage_is_refused(world, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "cpu")
    with pytest.raises(InputError, match=r"asks for offload_optimizer_device: .*fsdp2.yaml"):
        run(world, tmp_path)


def test_processes_that_do_not_know_of_each_other_are_refused(world, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="2 processes were launched and Accelerate sees no GPU"):
        run(world, tmp_path)


def test_another_model_is_not_continued(world, tmp_path):
    def kill(folder, step):
        raise Killed

    with pytest.raises(Killed):
        run(world, tmp_path, save_every=1, push_every=1, push=kill)
    with pytest.raises(InputError, match=r"is of another config \(depth: 2 -> 3\)"):
        run(world, tmp_path, depth=3)


def process(rank, count, port, world, output, changes, sharded):
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count),
        LOCAL_WORLD_SIZE=str(count), ACCELERATE_USE_CPU="true",
    )  # fmt: skip
    torch.set_num_threads(1)
    if sharded:
        module.start_accelerator = sharding_accelerator
    stop_at = changes.pop("stop_at", None)
    if stop_at:
        changes |= {"push_every": stop_at, "push": lambda folder, step: os.kill(os.getpid(), signal.SIGTERM)}
    try:
        run(world, output, **changes)
    except SystemExit as stopped:
        assert stop_at and stopped.code == 128 + signal.SIGTERM
    torch.distributed.destroy_process_group()


def sharding_accelerator(report_to, output):
    """FSDP2 on CPU, which accelerate does not offer: its GPU path, switched on by hand."""
    from accelerate import Accelerator
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", reshard_after_forward=True,
        transformer_cls_names_to_wrap=["NanoChatDecoderLayer"], cpu_ram_efficient_loading=False,
    )  # fmt: skip
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    accelerator.state.distributed_type, accelerator.state.fsdp_plugin = DistributedType.FSDP, plugin
    return accelerator


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fsdp2"])
def test_two_processes_equal_one_also_after_a_stop(straight, world, tmp_path, sharded):
    """Stopped by a signal that only the main process gets, after step 8; resumed by two, and (DDP) by one."""
    shared = {"device_batch_size": 2, "stop_at": 7, "eval_every": 8}  # evaluates, then saves
    mp.spawn(process, (2, free_port(), world, tmp_path, shared, sharded), nprocs=2)
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["step_000008"]
    copy = tmp_path.with_name(tmp_path.name + "-alone")
    if not sharded:
        copy.mkdir()
        os.system(f"cp -r {tmp_path}/state {copy}/")
        alone = run(world, copy, device_batch_size=4)
        assert losses(alone) == pytest.approx(losses(straight[1]), abs=1e-4)
    rest = {"device_batch_size": 2, "save_optimizer": True}
    mp.spawn(process, (2, free_port(), world, tmp_path, rest, sharded), nprocs=2)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["gradient_accumulation"] == 2 and losses(metrics) == pytest.approx(losses(straight[1]), abs=1e-4)
    assert metrics["val_bpb"] == pytest.approx(straight[1]["val_bpb"], abs=1e-4)
    mine, theirs = (torch.load(folder / "optimizer.pt") for folder in (tmp_path, straight[0]))
    assert {n: set(state) for n, state in mine.items()} == {n: set(state) for n, state in theirs.items()}
    for name, state in theirs.items():
        for key, value in state.items():
            near = 0.03 * value.abs().max().item() + 1e-8  # sums in another order
            torch.testing.assert_close(mine[name][key], value, rtol=0, atol=near, msg=f"{name} {key}")
