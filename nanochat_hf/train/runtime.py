"""What a training process asks of its machine: processes, memory and patience; and how it hears that it should stop.

Used by `pretrain.py`; nothing here knows about data or steps.
"""

import gc
import importlib.util
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DistributedType,
    FullyShardedDataParallelPlugin,
    gather_object,
    patch_environment,
)
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from ..distributed import partial_state
from ..errors import InputError
from ..optim.scaling import Plan, estimate_micro_batch_size
from .model_setup import compute_dtype

CPU_FLOPS = 5e10  # per second and core, a fair guess
ZERO_OPTIONS = ("OFFLOAD_OPTIMIZER_DEVICE", "OFFLOAD_PARAM_DEVICE", "CONFIG_FILE")
TRACKERS = ("none", "trackio", "wandb", "tensorboard")


def start_accelerator(report_to: str, output: Path) -> Accelerator:
    """Accelerate for a pretraining run into `output`; compiled programs are kept beside it, for a warm start.

    Raises:
        InputError: a launch or a tracker that does not work.
    """
    if report_to not in TRACKERS:
        raise InputError(f"report_to is {report_to!r}: choose one of {', '.join(TRACKERS)}")
    if report_to != "none" and importlib.util.find_spec(report_to) is None:
        raise InputError(f"report_to: {report_to} is not installed; pip install {report_to}")
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # less is lost between blocks of memory
    if torch.cuda.is_available():
        compiled = output.resolve().parent / ".compiled"
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(compiled / "inductor"))
        os.environ.setdefault("TRITON_CACHE_DIR", str(compiled / "triton"))
    with fsdp2_for_zero():
        accelerator = Accelerator(
            mixed_precision="no",  # the dtype of the embeddings decides, see network.py
            log_with=None if report_to == "none" else report_to,
            project_dir=output,
        )
        shard_on_cpu(accelerator)
    dtype = compute_dtype(accelerator.device)
    if accelerator.distributed_type == DistributedType.FSDP and dtype != torch.float32:
        # gather half the bytes, but still add gradients in float32
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        accelerator.state.fsdp_plugin.mixed_precision_policy = policy
    if (launched := int(os.environ.get("WORLD_SIZE", "1"))) != accelerator.num_processes:
        raise InputError(  # else each of them would train alone, into one folder
            f"{launched} processes were launched and Accelerate sees no GPU for them; on CPUs launch with "
            "ACCELERATE_USE_CPU=true accelerate launch --config_file configs/accelerate/multi_gpu.yaml "
            f"--num_processes {launched}"
        )
    return accelerator


@contextmanager
def fsdp2_for_zero() -> Iterator[None]:
    """Inside, a job that was launched with DeepSpeed ZeRO shards by FSDP2, which leaves Muon the matrices it needs.

    ZeRO flattens what it shards. Its stage 2 keeps whole weights beside pieces of gradients and optimizer state, as
    FSDP2 does if it leaves weights gathered until the step is done; stage 3 gathers them for each pass. Stage 1, the
    optimizer's state alone in pieces, is what `MuonAdamW` does by itself.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") != "true":
        yield
        return
    asked = {name: os.environ.get(f"ACCELERATE_DEEPSPEED_{name}", "none") for name in ZERO_OPTIONS}
    if any(value != "none" for value in asked.values()):
        raise InputError(
            "pretraining under DeepSpeed takes its stage and nothing else, and the launch file asks for "
            f"{', '.join(name.lower() for name, value in asked.items() if value != 'none')}: leave it out, "
            "or launch this stage with configs/accelerate/fsdp2.yaml"
        )
    stage, state = int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")), partial_state()
    engine = "FSDP2" if stage > 1 else "MuonAdamW"
    state.print(f"pretraining: {engine} in place of ZeRO-{stage}, which would flatten the matrices that Muon needs")
    if state.distributed_type == DistributedType.DEEPSPEED:
        state.distributed_type = DistributedType.MULTI_GPU if state.num_processes > 1 else DistributedType.NO
    options = {
        "accelerate_use_fsdp": "true", "fsdp_version": "2", "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_transformer_cls_to_wrap": "NanoChatDecoderLayer", "fsdp_state_dict_type": "SHARDED_STATE_DICT",
        "fsdp_reshard_after_forward": str(stage == 3).lower(), "fsdp_cpu_ram_efficient_loading": "false",
    }  # fmt: skip
    options = options if stage > 1 else {}
    with patch_environment(accelerate_use_deepspeed="false", accelerate_gradient_accumulation_steps="1", **options):
        yield


def shard_on_cpu(accelerator: Accelerator) -> bool:
    """Let FSDP2 shard on a CPU, where Accelerate would, without a word, train with DDP -> whether it was asked to."""
    asked = os.environ.get("ACCELERATE_USE_FSDP") == "true" and accelerator.device.type == "cpu"
    if asked:
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
        PartialState().distributed_type = accelerator.state.distributed_type = DistributedType.FSDP
    return asked


def to_device(batch: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """(B, T + 1) of any integers -> inputs and targets (B, T), int64 on the device."""
    if device.type == "cuda":
        # Pinned: from other memory the host may have to wait for all that is queued before the copy. torch keeps
        # pinned blocks and hands one out again when the copies from it are done. NumPy fills it, on this thread:
        # torch would share so many numbers out to threads that have to wait for a core among the loader's.
        rows = torch.empty(batch.shape, dtype=torch.int32, pin_memory=True)
        rows.numpy()[...] = batch
    else:
        rows = torch.from_numpy(batch.astype(np.int32, copy=False))
    rows = rows.to(device, non_blocking=True).long()
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def copy_to_host_async(figures: Tensor) -> Callable[[], list[float]]:
    """Have the tensor copied to the host -> what waits for the copy, though not for what is queued after it."""
    if figures.device.type != "cuda":
        return figures.tolist
    copied = figures.to("cpu", non_blocking=True)  # into pinned memory
    done = torch.cuda.Event(blocking=True)  # sleeps, where others would keep a core from the loader
    done.record()

    def read() -> list[float]:
        done.synchronize()
        return copied.tolist()

    return read


def check_launch(stage: str) -> None:
    """Raises InputError if the job was launched with DeepSpeed or FSDP2.

    For stages that evaluate before they train, which neither can, or generate with the weights that they train.
    """
    for name in ("DeepSpeed", "FSDP"):
        if os.environ.get(f"ACCELERATE_USE_{name.upper()}") == "true":
            raise InputError(
                f"{stage} needs whole weights between its steps, and {name} keeps them in pieces: launch it with "
                "configs/accelerate/multi_gpu.yaml"
            )


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
def graceful_shutdown(note: Callable[[int], None]):
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
def gc_disabled():
    """No garbage collection between steps: scanning a program of this size takes half a second (karpathy/nanochat)."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


def split_global_batch(
    name: str, total: int, unit: int, wanted: int, world: int, say: Callable = lambda text: None
) -> tuple[int, int]:
    """-> rows that each of `world` processes takes at once, at most `wanted`, and how often in a step of `total`.

    As many rows as go evenly into a process's share of the step: their number changes its speed and not its result.

    Args:
        name, total: the key that says how large a step is, and what it says; unit: for how much of that a row counts.
        say: what to print with, if they are fewer than `wanted`.

    Raises:
        InputError: the step cannot be shared out evenly, or no row is wanted.
    """
    share, rest = divmod(total, unit * world)
    if rest or share < 1:
        raise InputError(
            f"{name} = {total} must be a positive multiple of {unit * world}, one row on each of {world} processes"
        )
    if wanted < 1:
        raise InputError(f"device_batch_size = {wanted} must be at least one row")
    rows = max(rows for rows in range(1, min(wanted, share) + 1) if share % rows == 0)
    if rows < wanted:
        say(f"device_batch_size: {rows} rows instead of {wanted}, so that a step is shared out evenly")
    return rows, share // rows


def choose_micro_batch_size(
    made: Plan,
    wanted: int,
    device: torch.device,
    world: int,
    dtype: torch.dtype,
    micro_batch_fits: Callable | None,
    say: Callable,
) -> int:
    """Rows of a micro-batch: `wanted`, or for -1 what the free memory allows; fewer if a step has no more for each
    process (`split_global_batch`), and halved as long as they do not fit.

    Args:
        fits: (rows, micro-steps) -> whether a step of so many works, the same answer on every process; None: take the
            word.
        say: what to print with.

    Raises:
        InputError: the batch cannot be divided like this, or not even one row fits.
    """
    divide = partial(split_global_batch, "total_batch_size", made.total_batch_size, made.max_seq_len, world=world)
    if wanted == -1:
        # The least of all processes: they take part in equally many micro-steps.
        rows, steps = divide(
            min(gather_object([estimate_micro_batch_size(made, free_memory(device), dtype.itemsize)]))
        )
        say(f"device_batch_size: {rows} rows of {made.max_seq_len} tokens, chosen by the free memory")
    else:
        rows, steps = divide(wanted, say=say)
    while micro_batch_fits is not None and not micro_batch_fits(rows, steps):
        if rows == 1:
            raise InputError(f"1 row of {made.max_seq_len} tokens does not fit: lower depth or max_seq_len")
        rows, steps = divide(rows // 2)
        say(f"device_batch_size: out of memory, trying {rows} rows")
    return rows


def micro_batch_fits(
    made: Plan, network: nn.Module, groups: list[dict], accelerator: Accelerator, rows: int, steps: int
) -> bool:
    """Whether so many micro-steps of so many rows fit on every device, beside the optimizer state; compiles them.

    Args:
        network: (ids, targets) -> loss; groups: the optimizer's, over its parameters.
    """
    device, failed = accelerator.device, torch.zeros((), device=accelerator.device)
    ids = torch.arange(rows * made.max_seq_len, device=device).view(rows, -1) % made.num_tokens
    state = sum(p.numel() * (4 if group["kind"] == "muon" else 8) for group in groups for p in group["params"])
    try:
        held = torch.empty(state // accelerator.num_processes, dtype=torch.uint8, device=device)
        with accelerator.no_sync(network):
            for _ in range(min(steps, 2)):  # from the second one on beside the gradients of those before
                network(ids, ids).backward()
        del held
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
        failed += 1
    network.zero_grad(set_to_none=True)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)  # the run's own peak is what is reported
    return not accelerator.reduce(failed).item()
