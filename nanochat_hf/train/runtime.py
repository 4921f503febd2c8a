"""The process and its device: Accelerate's set-up, memory and micro-batch size, host-device copies, signals."""

import gc
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, gather_object, patch_environment
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from ..distributed import check_variables, partial_state
from ..errors import InputError
from ..optim.scaling import CPU_FLOPS, Plan, estimate_micro_batch_size, split_global_batch
from .model_setup import compute_dtype

ZERO_OPTIONS = ("OFFLOAD_OPTIMIZER_DEVICE", "OFFLOAD_PARAM_DEVICE", "CONFIG_FILE")


def start_accelerator(report_to: str, output: Path) -> Accelerator:
    """Accelerate for a pretraining run into `output`, compiled programs beside it; InputError for a wrong launch."""
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # less fragmentation
    if torch.cuda.is_available():
        compiled = output.resolve().parent / ".compiled"
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(compiled / "inductor"))
        os.environ.setdefault("TRITON_CACHE_DIR", str(compiled / "triton"))
    log_with = None if report_to == "none" else report_to
    check_variables()
    with fsdp2_for_zero():
        # No autocast: the dtype of the embeddings decides, see model_setup.py.
        accelerator = Accelerator(mixed_precision="no", log_with=log_with, project_dir=output)
        shard_on_cpu(accelerator)
    dtype = compute_dtype(accelerator.device)
    if accelerator.distributed_type == DistributedType.FSDP and dtype != torch.float32:
        # all-gather in bf16, reduce gradients in float32
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        accelerator.state.fsdp_plugin.mixed_precision_policy = policy
    if (launched := int(os.environ.get("WORLD_SIZE", "1"))) != accelerator.num_processes:
        raise InputError(  # each of them would train alone, into one folder
            f"{launched} processes were launched and Accelerate sees no GPU for them; on CPUs launch with "
            "ACCELERATE_USE_CPU=true accelerate launch --config_file configs/accelerate/multi_gpu.yaml "
            f"--num_processes {launched}"
        )
    return accelerator


@contextmanager
def fsdp2_for_zero() -> Iterator[None]:
    """Inside, a job launched with DeepSpeed ZeRO uses FSDP2, which leaves Muon the matrices that ZeRO would flatten.

    ZeRO-2 becomes FSDP2 with reshard_after_forward=False, ZeRO-3 with True; ZeRO-1 is what MuonAdamW does anyway.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") != "true":
        yield
        return
    values = {name.lower(): os.environ.get(f"ACCELERATE_DEEPSPEED_{name}", "none") for name in ZERO_OPTIONS}
    if unsupported := [name for name, value in values.items() if value != "none"]:
        advice = "leave it out, or launch this stage with configs/accelerate/fsdp2.yaml"
        raise InputError(f"pretraining under DeepSpeed: the config file has {', '.join(unsupported)}: {advice}")
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
    """Let FSDP2 shard on CPUs, where Accelerate silently trains with DDP. Returns: whether the launch wants that."""
    use = os.environ.get("ACCELERATE_USE_FSDP") == "true" and accelerator.device.type == "cpu"
    if use:
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
        PartialState().distributed_type = accelerator.state.distributed_type = DistributedType.FSDP
    return use


def check_launch(stage: str) -> None:
    """Raise InputError if the job was launched with DeepSpeed or FSDP2: `stage` generates with unsharded weights."""
    for name in ("DeepSpeed", "FSDP"):
        if os.environ.get(f"ACCELERATE_USE_{name.upper()}") == "true":
            advice = "launch it with configs/accelerate/multi_gpu.yaml"
            raise InputError(f"{stage} needs unsharded weights between its steps, and {name} shards them: {advice}")


def check_cost(plan: Plan, device: torch.device) -> None:
    """Raise InputError for a run of more than two days on a CPU: it was meant for GPUs."""
    days = plan.total_flops / (CPU_FLOPS * (os.cpu_count() or 1) * 86400)
    if device.type == "cpu" and days > 2:
        work = f"no GPU found, and {plan.total_flops:.1e} FLOPs would take this CPU about {days:.0f} days"
        raise InputError(f"{work}: run it on a GPU, take recipe cpu-demo, or lower depth or num_iterations")


def to_device(batch: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """(B, T + 1) of any integers -> inputs and targets (B, T), int64 on the device, without waiting for it."""
    if device.type == "cuda":
        # A copy from unpinned memory may wait for the device. NumPy fills the pinned block on this thread: torch
        # would use threads, which wait for cores that the loader uses.
        ids = torch.empty(batch.shape, dtype=torch.int32, pin_memory=True)
        ids.numpy()[...] = batch
    else:
        ids = torch.from_numpy(batch.astype(np.int32, copy=False))
    ids = ids.to(device, non_blocking=True).long()
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def copy_to_host_async(values: Tensor) -> Callable[[], list[float]]:
    """Start a copy to the host; returns the function that waits for it, but not for work enqueued later."""
    if values.device.type != "cuda":
        return values.tolist
    copied = values.to("cpu", non_blocking=True)  # into pinned memory
    done = torch.cuda.Event(blocking=True)  # sleeps instead of keeping a core from the loader
    done.record()

    def read() -> list[float]:
        done.synchronize()
        return copied.tolist()

    return read


@contextmanager
def graceful_shutdown(note: Callable[[int], None]):
    """Inside, SIGTERM and SIGINT only call `note(number)`; a second SIGINT raises KeyboardInterrupt."""

    def handle(number, frame):
        note(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    if threading.current_thread() is not threading.main_thread():  # Python allows handlers there only
        yield
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def gc_disabled():
    """No garbage collection between steps: it takes half a second per scan (karpathy/nanochat)."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def free_memory(device: torch.device) -> float:
    """Bytes that a run may take on this device, with what its model has taken already."""
    if device.type == "cuda":
        return 0.95 * (torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device))
    if device.type == "mps":
        return 0.6 * torch.mps.recommended_max_memory()
    return 0.5 * psutil.virtual_memory().available / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def peak_memory(device: torch.device) -> int | None:
    """Most bytes of tensors on a GPU since the stage began; None elsewhere."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def choose_micro_batch_size(
    plan: Plan, requested: int, accelerator: Accelerator, fits: Callable | None, log: Callable
) -> int:
    """Sequences per micro-batch: `requested`, or for -1 as many as free memory allows; halved until `fits`.

    fits: (micro-batch size, grad_accum_steps) -> bool, equal on every rank (`micro_batch_fits`); None: not tried.
    """
    device, world = accelerator.device, accelerator.num_processes

    def divide(size, log=lambda text: None):
        return split_global_batch("total_batch_size", plan.total_batch_size, plan.max_seq_len, size, world, log)

    if requested == -1:
        itemsize = compute_dtype(device, half=True).itemsize
        size, steps = divide(min(gather_object([estimate_micro_batch_size(plan, free_memory(device), itemsize)])))
        log(f"device_batch_size: {size} sequences of {plan.max_seq_len} tokens, chosen by the free memory")
    else:
        size, steps = divide(requested, log)
    while fits is not None and not fits(size, steps):
        if size == 1:
            raise InputError(f"1 sequence of {plan.max_seq_len} tokens does not fit: lower depth or max_seq_len")
        size, steps = divide(size // 2)
        log(f"device_batch_size: out of memory, trying {size}")
    return size


def micro_batch_fits(
    plan: Plan, network: nn.Module, groups: list[dict], accelerator: Accelerator, size: int, steps: int
) -> bool:
    """Whether `steps` micro-batches of `size` sequences fit on every device beside the optimizer state of `groups`."""
    device, failed = accelerator.device, torch.zeros((), device=accelerator.device)
    num_tokens = plan.model_config.num_tokens or plan.model_config.vocab_size
    ids = torch.arange(size * plan.max_seq_len, device=device).view(size, -1) % num_tokens
    state = sum(p.numel() * (4 if group["kind"] == "muon" else 8) for group in groups for p in group["params"])
    try:
        reserved = torch.empty(state // accelerator.num_processes, dtype=torch.uint8, device=device)
        with accelerator.no_sync(network):
            for _ in range(min(steps, 2)):  # the second one runs beside the gradients of the first
                network(ids, ids).backward()
        del reserved
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
        failed += 1
    network.zero_grad(set_to_none=True)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)  # the run reports its own peak
    return not accelerator.reduce(failed).item()
