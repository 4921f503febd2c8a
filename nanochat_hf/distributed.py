"""Ranks of one job that wait for each other, always with a timeout that names the missing ranks and the place.

    monitored_barrier("checkpoint of step 100")
    with main_process_first("the tokenizer"):            # rank 0 does it, then the others, from its cache
        tokenizer = load_tokenizer(name)

torch's barriers wait for the communication timeout of the job, which has to be long, and then name a collective
operation. Here each rank writes to the job's key-value store where it has arrived; nothing runs on a device.
"""

import gc
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import PrecisionType, broadcast_object_list, str_to_bool
from torch.distributed import distributed_c10d
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from .errors import InputError, in_a_line

BARRIER_TIMEOUT = timedelta(minutes=30)
LONG_TIMEOUT = timedelta(hours=6)  # for work of one rank: training a tokenizer, downloading a dataset
_launched: list = []  # Accelerate's distributed type before the first Accelerator changed it
_passed: Counter = Counter()  # how often each place was passed; the same on every rank


class BarrierTimeoutError(RuntimeError):
    """A rank did not arrive; the message names it."""


def on_cpu() -> bool:
    return not (torch.cuda.is_available() or torch.backends.mps.is_available())


def check_variables() -> None:
    """Raise InputError for variables of Accelerate that only a launcher can set, or that it cannot read."""
    for name in (f"ACCELERATE_USE_{kind}" for kind in ("CPU", "DEEPSPEED", "FSDP")):
        try:
            use = str_to_bool(value := os.environ.get(name, "no"))
        except ValueError:
            raise InputError(f"{name} is {value!r}: set it to true or false, or unset it") from None
        if use and "WORLD_SIZE" not in os.environ and not name.endswith("CPU"):
            advice = "start it with nanochat run --config-file or accelerate launch, or unset that"
            raise InputError(f"{name} is set, and no launcher started this process: {advice}")


def partial_state() -> PartialState:
    """The job's ranks, joined on the first call. Without `cpu` Accelerate does not join processes on CPUs."""
    if on_cpu():  # else DeepSpeed, where installed, warns that it found no GPU
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    check_variables()
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    try:
        state = PartialState(cpu=on_cpu(), timeout=BARRIER_TIMEOUT)
        PrecisionType(precision.lower())  # which chat stages would refuse, after hours of pretraining
    except (ValueError, dist.DistError) as error:
        PartialState._reset_state()  # what it began would fail every later call
        variables = "variables that a launcher sets (ACCELERATE_*, MASTER_*, WORLD_SIZE, ...)"
        raise InputError(f"{in_a_line(error)}: unset the {variables}, or launch with nanochat run") from None
    if not _launched:
        _launched.append(state.distributed_type)
    return state


def reset_accelerate_state() -> None:
    """Let the next stage in this process choose precision, gradient accumulation and DDP or FSDP2, and free memory."""
    gc.collect()  # a stage's model and optimizer are in reference cycles
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()  # each stage reports its own
    AcceleratorState._reset_state()
    GradientState._reset_state()
    unset_hf_deepspeed_config()  # after ZeRO-3 transformers would load every model partitioned
    if _launched:
        PartialState().distributed_type = _launched[0]


def get_dist_info() -> tuple[int, int]:
    """Returns: (rank, world size); (0, 1) outside a job."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def broadcast_from_main(value):
    """Rank 0's `value`, on every rank."""
    return broadcast_object_list([value])[0] if get_dist_info()[1] > 1 else value


def coalesce_collectives(operations: list[Callable[[], dist.Work]], device: torch.device) -> Callable[[], None]:
    """Start collective operations on tensors of `device`; returns the function that waits for them.

    On CUDA NCCL runs them as one, so that operations with different roots use several links at once.
    """
    if device.type == "cuda" and operations:
        with dist._coalescing_manager(device=device, async_ops=True) as manager:
            for start in operations:
                start()
        return manager.wait
    works = [start() for start in operations]
    return lambda: [work.wait() for work in works]


def monitored_barrier(where: str, timeout: timedelta = BARRIER_TIMEOUT) -> None:
    """Wait until every rank is here. Raises BarrierTimeoutError with the missing ranks."""
    rank, world = get_dist_info()
    if world > 1:
        _arrive(where, rank)
        _wait_for(range(world), where, timeout)
        _passed[where] += 1


@contextmanager
def main_process_first(where: str, timeout: timedelta = LONG_TIMEOUT) -> Iterator[bool]:
    """Run the block on rank 0, then on the other ranks; yields whether this is rank 0.

    Raises BarrierTimeoutError when rank 0 takes longer than `timeout`, on other ranks InputError when it fails.
    """
    rank, world = get_dist_info()
    if rank > 0:
        _wait_for([0], where, timeout)
    try:
        yield rank == 0
    except BaseException:
        if rank == 0 and world > 1:
            _arrive(where, 0, "failed")
        raise
    if rank == 0 and world > 1:
        _arrive(where, 0)
    _passed[where] += 1


def _key(where: str, rank: int) -> str:
    return f"nanochat_hf/{where}/{_passed[where]}/{rank}"


def _arrive(where: str, rank: int, status: str = "here") -> None:
    distributed_c10d._get_default_store().set(_key(where, rank), status)


def _wait_for(ranks, where: str, timeout: timedelta) -> None:
    """Poll the store; its own `wait` prints C++ warnings on a timeout."""
    store, keys = distributed_c10d._get_default_store(), {rank: _key(where, rank) for rank in ranks}
    deadline, pause = time.monotonic() + timeout.total_seconds(), 0.002
    while missing := [rank for rank, key in keys.items() if not store.check([key])]:
        if time.monotonic() > deadline:
            names, rank = ", ".join(map(str, missing)), get_dist_info()[0]
            raise BarrierTimeoutError(f"rank {rank} waited {timeout} at {where!r} for rank {names}; see their output")
        time.sleep(pause)
        pause = min(2 * pause, 0.25)
    if any(store.get(key) == b"failed" for key in keys.values()):
        raise InputError(f"the main process failed at {where!r}; see its output")
