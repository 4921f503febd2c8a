"""Processes of one job that wait for each other: always with a time-out, and saying who waits for whom and for what.

    meet("checkpoint of step 100")                   # a barrier
    with main_first("the tokenizer"):                # the main process does it, then all others, from its cache
        tokenizer = load_tokenizer(name)

Why not torch's barriers: when one process is stuck they let the others wait for the job's communication time-out,
which has to be long, and then say something about a collective operation. Here the processes write down in the job's
key-value store where they have got to; so nothing runs on a device, and whoever gives up can name the missing ones.
"""

import gc
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import broadcast_object_list
from torch.distributed import distributed_c10d
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from .errors import InputError

BARRIER_TIMEOUT = timedelta(minutes=30)
LONG = timedelta(hours=6)  # for work of one process that may take so long: a tokenizer, a dataset's download
_kind: dict = {}  # of parallelism, as it was before the first Accelerator
_met: Counter = Counter()  # how often each place was passed; the same on every process


class BarrierTimeoutError(RuntimeError):
    """Some process of the job did not come, see the message."""


def on_cpu() -> bool:
    return not (torch.cuda.is_available() or torch.backends.mps.is_available())


def partial_state() -> PartialState:
    """The job's processes, joined if they are not yet. Without `cpu` Accelerate takes those on CPUs for strangers."""
    state = PartialState(cpu=on_cpu(), timeout=BARRIER_TIMEOUT)
    _kind.setdefault("launched", state.distributed_type)
    return state


def reset_accelerate_state() -> None:
    """Let the next Accelerator of these processes choose precision, accumulation and DDP or FSDP2 for itself, and have
    all the device's memory: a stage's model and optimizer are in cycles, which Python leaves for later."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    AcceleratorState._reset_state()
    GradientState._reset_state()
    unset_hf_deepspeed_config()  # else, after ZeRO-3, transformers would load every model in pieces
    if "launched" in _kind:
        PartialState().distributed_type = _kind["launched"]  # an FSDP job would be taken for one without its options


def get_dist_info() -> tuple[int, int]:
    """-> (rank, number of processes)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def broadcast_from_main(value):
    """The main process's `value`, on every process."""
    return broadcast_object_list([value])[0] if get_dist_info()[1] > 1 else value


def coalesce_collectives(operations: list[Callable[[], dist.Work]], device: torch.device) -> Callable[[], None]:
    """Begin collective operations on tensors of `device` -> what waits for them. On CUDA NCCL runs them as one, so
    that those with several roots use the links of several processes at once."""
    if device.type == "cuda" and operations:
        with dist._coalescing_manager(device=device, async_ops=True) as manager:
            for begin in operations:
                begin()
        return manager.wait
    works = [begin() for begin in operations]
    return lambda: [work.wait() for work in works]


def monitored_barrier(where: str, patience: timedelta = BARRIER_TIMEOUT) -> None:
    """Wait until every process of the job is here. Raises WaitedTooLong with the ranks that are missing."""
    rank, world = get_dist_info()
    if world > 1:
        arrive(where, rank)
        wait_for(range(world), where, patience)
        _met[where] += 1


@contextmanager
def main_process_first(where: str, patience: timedelta = LONG) -> Iterator[bool]:
    """Let the main process through first, the others when it is done; gives whether this is the main process.

    Raises WaitedTooLong when it takes longer than `patience`; and InputError, which only the main process would show,
    when it fails.
    """
    rank, world = get_dist_info()
    if rank > 0:
        wait_for([0], where, patience)
    try:
        yield rank == 0
    except BaseException:
        if rank == 0 and world > 1:
            arrive(where, 0, "failed")
        raise
    if rank == 0 and world > 1:
        arrive(where, 0)
    _met[where] += 1


def key(where: str, rank: int) -> str:
    return f"nanochat_hf/{where}/{_met[where]}/{rank}"


def arrive(where: str, rank: int, how: str = "here") -> None:
    distributed_c10d._get_default_store().set(key(where, rank), how)


def wait_for(others, where: str, patience: timedelta) -> None:
    """Ask the store again and again: its own wait writes warnings from C++ when the time is up."""
    store, keys = distributed_c10d._get_default_store(), {rank: key(where, rank) for rank in others}
    end, pause = time.monotonic() + patience.total_seconds(), 0.002
    while missing := [rank for rank, name in keys.items() if not store.check([name])]:
        if time.monotonic() > end:
            raise BarrierTimeoutError(
                f"rank {get_dist_info()[0]} waited {patience} at {where!r} for rank {', '.join(map(str, missing))}; "
                "look at the output of these"
            )
        time.sleep(pause)
        pause = min(2 * pause, 0.25)
    if any(store.get(name) == b"failed" for name in keys.values()):
        raise InputError(f"the main process failed at {where!r}; see there")
