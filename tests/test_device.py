"""What a process asks of its machine: rows that fit, refusal of GPU runs on a CPU, signals."""

import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import nn

from nanochat_hf.errors import InputError
from nanochat_hf.optim.scaling import plan
from nanochat_hf.train import runtime as device
from nanochat_hf.train.runtime import (
    check_cost,
    choose_micro_batch_size,
    free_memory,
    gc_disabled,
    graceful_shutdown,
    micro_batch_fits,
    split_global_batch,
)

CPU = torch.device("cpu")
D12 = plan(12, 32768, total_batch_size=131_072, num_iterations=500)


def choose(wanted, fits=None, world=1):
    said = []
    return choose_micro_batch_size(D12, wanted, CPU, world, torch.float32, fits, said.append), said


def test_given_rows_are_taken_and_nothing_is_said():
    assert choose(16) == (16, [])


def test_rows_are_halved_until_they_fit():
    tried = []
    rows, said = choose(32, fits=lambda rows, steps: tried.append((rows, steps)) or rows <= 8)
    assert rows == 8 and tried == [(32, 2), (16, 4), (8, 8)]
    assert len(said) == 2 and "out of memory, trying 8 rows" in said[-1]


def test_one_row_that_does_not_fit_is_an_error():
    with pytest.raises(InputError, match="1 row of 2048 tokens does not fit"):
        choose(2, fits=lambda rows, steps: False)


@pytest.mark.parametrize("steps,beside", [(1, [False]), (4, [False, True])])
def test_a_trial_has_gradients_beside_it_only_if_its_step_has(steps, beside):
    found = []

    class Loss(nn.Linear):
        def forward(self, ids, targets):
            found.append(self.weight.grad is not None)
            return self.weight.sum() * ids.shape[0]

    loss = Loss(1, 1, bias=False)
    assert micro_batch_fits(D12, loss, [{"kind": "muon", "params": [loss.weight]}], Accelerator(cpu=True), 2, steps)
    assert found == beside and loss.weight.grad is None


def test_the_choice_follows_the_free_memory(monkeypatch):
    monkeypatch.setattr("nanochat_hf.train.runtime.free_memory", lambda device: 40e9)
    rows, said = choose(-1)
    assert rows == 8 and "chosen by the free memory" in said[0]
    rows, said = choose(-1, world=16)  # the batch has no more for each of them
    assert rows == 4 and len(said) == 1 and "4 rows of 2048 tokens" in said[0]


def test_fewer_rows_are_taken_when_a_step_has_no_more_for_each_process():
    assert choose(3)[0] == 2 and choose(16)[1] == []
    rows, said = choose(64, world=2)
    assert rows == 32 and "32 rows instead of 64" in said[0]
    assert split_global_batch("examples", 36, 1, 8, 2) == (6, 3)


@pytest.mark.parametrize(
    "wanted,world,why",
    [
        (16, 3, "must be a positive multiple of 6144, one row"),
        (-1, 3, "must be a positive multiple"),
        (0, 1, "at least one"),
    ],
)
def test_a_step_that_cannot_be_shared_out_is_refused(wanted, world, why):
    with pytest.raises(InputError, match=why):
        choose(wanted, world=world)


def test_free_memory_is_some_of_what_there_is():
    assert 0 < free_memory(CPU) < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_a_run_for_gpus_is_refused_on_a_cpu_and_only_there():
    with pytest.raises(InputError, match=r"no GPU found.*days.*cpu-demo"):
        check_cost(plan(24, 32768), CPU)
    check_cost(plan(24, 32768), torch.device("cuda"))
    check_cost(plan(4, 1024, aspect_ratio=32, head_dim=32, max_seq_len=128, total_batch_size=2048), CPU)


def test_a_signal_is_noted_and_the_handlers_come_back():
    heard, before = [], signal.getsignal(signal.SIGTERM)
    with graceful_shutdown(heard.append):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
    assert heard == [signal.SIGTERM] * 2 and signal.getsignal(signal.SIGTERM) is before


def test_a_second_interrupt_stops_at_once():
    heard = []
    with pytest.raises(KeyboardInterrupt), graceful_shutdown(heard.append):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
    assert heard == [signal.SIGINT]


def test_the_collector_works_again_afterwards():
    import gc

    with gc_disabled():
        assert not gc.isenabled()
    assert gc.isenabled() and gc.get_freeze_count() == 0


@pytest.mark.parametrize("stage", ["1", "2", "3"])
def test_a_job_launched_with_zero_shards_by_fsdp2_and_is_deepspeeds_again_afterwards(stage, monkeypatch):
    said = []
    job = SimpleNamespace(distributed_type=DistributedType.DEEPSPEED, num_processes=2, print=said.append)
    monkeypatch.setattr(device, "partial_state", lambda: job)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", stage)
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    with device.fsdp2_for_zero():
        assert job.distributed_type == DistributedType.MULTI_GPU
        assert os.environ["ACCELERATE_USE_DEEPSPEED"] == "false"
        assert os.environ.get("ACCELERATE_USE_FSDP") == (None if stage == "1" else "true")
        if stage != "1":
            plugin = FullyShardedDataParallelPlugin()
            assert plugin.reshard_after_forward == (stage == "3")
            launch_file = Path(__file__).parent.parent / "configs" / "accelerate" / "fsdp2.yaml"
            options = yaml.safe_load(launch_file.read_text())["fsdp_config"]  # what is not the stage's stands in both
            assert plugin.fsdp_version == options["fsdp_version"]
            assert plugin.transformer_cls_names_to_wrap == [options["fsdp_transformer_layer_cls_to_wrap"]]
            assert plugin.state_dict_type.name == options["fsdp_state_dict_type"]
            assert plugin.cpu_ram_efficient_loading == options["fsdp_cpu_ram_efficient_loading"]
    assert os.environ["ACCELERATE_USE_DEEPSPEED"] == "true" and "ACCELERATE_USE_FSDP" not in os.environ
    assert len(said) == 1 and f"in place of ZeRO-{stage}" in said[0]
