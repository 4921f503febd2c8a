"""What a training process asks of its machine: memory and patience; and how it hears that it should stop.

Used by `pretrain.py`; nothing here knows about data or steps.
"""

import gc
import os
import signal
import threading
from collections.abc import Callable
from contextlib import contextmanager

import psutil
import torch

from ..errors import InputError
from .scaling import Plan, rows_that_fit

CPU_FLOPS = 5e10  # per second and core, a fair guess


def free_memory(device: torch.device) -> float:
    """Bytes that a run may take on this device."""
    if device.type == "cuda":
        return 0.95 * torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return 0.6 * torch.mps.recommended_max_memory()
    return 0.5 * psutil.virtual_memory().available / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def check_cost(made: Plan, device: torch.device) -> None:
    """Refuse a run that was meant for GPUs on a CPU: one of more than two days."""
    days = made.total_flops / (CPU_FLOPS * (os.cpu_count() or 1) * 86400)
    if device.type == "cpu" and days > 2:
        raise InputError(
            f"no GPU found, and {made.total_flops:.1e} FLOPs would take this CPU about {days:.0f} days: "
            "run it on a GPU, take recipe cpu-demo, or lower depth or num_iterations"
        )


@contextmanager
def listening(note: Callable[[int], None]):
    """Inside, SIGTERM and SIGINT only call `note(number)`; a second SIGINT interrupts as ever."""

    def heard(number, frame):
        note(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    if threading.current_thread() is not threading.main_thread():  # Python allows handlers there only
        yield
        return
    before = {number: signal.signal(number, heard) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def undisturbed_by_gc():
    """No garbage collection between steps: scanning a program of this size takes half a second (karpathy/nanochat)."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


def choose_rows(
    made: Plan, wanted: int, device: torch.device, world: int, dtype: torch.dtype, fits: Callable | None, say: Callable
) -> int:
    """Rows of a micro-batch: `wanted`, or for -1 what the free memory allows; halved as long as they do not fit.

    Args:
        fits: (rows) -> whether a micro-step of so many works, the same answer on every process; None: take the word.
        say: what to print with.

    Raises:
        InputError: the batch cannot be divided like this, or not even one row fits.
    """
    rows = rows_that_fit(made, free_memory(device), world, dtype.itemsize) if wanted == -1 else wanted
    if wanted == -1:
        say(f"device_batch_size: {rows} rows of {made.max_seq_len} tokens, chosen by the free memory")
    if rows < 1 or made.total_batch_size % (rows * made.max_seq_len * world):
        raise InputError(
            f"total_batch_size {made.total_batch_size} is not a multiple of {rows} rows (device_batch_size) x "
            f"{made.max_seq_len} tokens x {world} processes"
        )
    while fits is not None and not fits(rows):
        if rows % 2:
            raise InputError(f"{rows} rows of {made.max_seq_len} tokens do not fit: lower depth or max_seq_len")
        rows //= 2
        say(f"device_batch_size: out of memory, trying {rows} rows")
    return rows
