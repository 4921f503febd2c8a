"""Checkpoints of a running pretraining: complete or absent, the last few of them, exact for any number of processes.

`folder/step_000100/` holds the weights once and one file per rank (its optimizer state, data position and random
state); under FSDP2 weights and optimizer state are written as shards by torch.distributed.checkpoint instead. All is
written into a hidden folder first, which is renamed when every rank is done, so a kill at any moment leaves the
checkpoint before it. A second one at the same step (a stop after a bad loss, with the data one step on) gets a number
of its own, `step_000100.1`, for a complete checkpoint is never touched before the next one is complete.

`save_momenta` and `load_momenta` carry the optimizer's state from one stage to the next, as one small file.

Why not `Accelerator.save_state`: under DDP it keeps the main process's optimizer state only, but each rank of
MuonAdamW owns a part; and it has no place for a data position per rank.
"""

import os
import random
import shutil
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from ..distributed import meet, place
from ..errors import InputError
from .owners import LARGE


def barrier() -> None:
    meet("a checkpoint")


def is_sharded(model: nn.Module) -> bool:
    return any(isinstance(p, DTensor) for p in model.parameters())


def complete(folder: Path) -> list[Path]:
    """The complete checkpoints below `folder`, the newest last."""
    return sorted(folder.glob("step_*"), key=lambda path: [int(n) for n in path.name.removeprefix("step_").split(".")])


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint below `folder`, or None."""
    return (complete(folder) or [None])[-1]


def write(value, path: Path) -> None:
    """torch.save, and on the disk before this returns: a rename may outlive a crash of the machine, so must it."""
    with open(path, "wb") as file:
        torch.save(value, file)
        file.flush()
        os.fsync(file.fileno())


def read_progress(path: Path) -> dict:
    return torch.load(path / "progress.pt")


def full_weights(model: nn.Module) -> dict[str, Tensor]:
    """The whole state dict of the model, on every process; under FSDP2 only the first one's holds the tensors."""
    if not is_sharded(model):
        return model.state_dict()
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def save_model(folder: Path, model: nn.Module, tokenizer) -> None:
    """Make `folder` one for `from_pretrained`: float32, written aside and moved in file by file, the config last."""
    weights = full_weights(model)
    if place()[0] == 0:
        aside = folder / ".weights"
        shutil.rmtree(aside, ignore_errors=True)
        model.save_pretrained(aside, state_dict={name: value.float() for name, value in weights.items()})
        tokenizer.save_pretrained(aside)
        shutil.rmtree(aside / "custom_generate", ignore_errors=True)  # that of the source: chat stages ship today's
        for path in sorted(aside.iterdir(), key=lambda path: path.name == "config.json"):
            os.replace(path, folder / path.name)
        aside.rmdir()
    barrier()


def save(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    position: dict,
    progress: dict,
    keep: int,
) -> Path:
    """Write the state after `step` steps; every process of the job calls this at the same step.

    Args:
        position: this process's place in the data.
        progress: what the loop needs beside that, the same on every process; plain values only.
        keep: how many checkpoints stay, the new one included.

    Raises:
        InputError: the folder cannot be written to.
    """
    rank, world = place()
    aside, final = folder / f".step_{step:06d}", folder / f"step_{step:06d}"
    if before := [path for path in complete(folder) if path.name.partition(".")[0] == final.name]:
        final = final.with_name(f"{final.name}.{int(before[-1].name.partition('.')[2] or 0) + 1}")
    if rank == 0:
        shutil.rmtree(aside, ignore_errors=True)
        try:
            aside.mkdir(parents=True)
        except OSError as error:
            raise InputError(f"cannot write checkpoints to {folder} ({error.strerror})") from None
    barrier()
    own = {"position": position, "random": random_state()}
    if is_sharded(model):
        weights, state = get_state_dict(model, optimizer)
        dcp.save({"model": weights, "optimizer": state}, checkpoint_id=aside / "shards")
    else:
        own["optimizer"] = optimizer.state_dict()
        if rank == 0:
            write(model.state_dict(), aside / "model.pt")
    write(own, aside / f"rank_{rank:05d}.pt")
    if rank == 0:
        write({**progress, "step": step, "world_size": world}, aside / "progress.pt")
    barrier()
    if rank == 0:
        os.replace(aside, final)
        for old in complete(folder)[: -max(keep, 1)]:
            hidden = old.with_name(f".{old.name}")  # a kill while it is deleted must not leave half of one
            shutil.rmtree(hidden, ignore_errors=True)
            os.replace(old, hidden)
            shutil.rmtree(hidden, ignore_errors=True)
    barrier()
    return final


def load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict, list[dict]]:
    """Bring model, optimizer and random state back; -> (progress, the data positions for `load_state_dict`).

    With another number of processes than the checkpoint's, each one gets all the optimizer state (MuonAdamW drops what
    it does not own) and all the positions; random state then starts afresh.
    """
    rank, world = place()
    progress = read_progress(path)
    same = progress["world_size"] == world
    numbers = [rank] if same else range(progress["world_size"])
    parts = [torch.load(path / f"rank_{number:05d}.pt", map_location="cpu") for number in numbers]
    if (path / "shards").exists() != is_sharded(model):
        raise InputError(f"{path} was written with another kind of sharding; resume with the config it began with")
    if is_sharded(model):
        weights, state = get_state_dict(model, optimizer)
        dcp.load({"model": weights, "optimizer": state}, checkpoint_id=path / "shards")
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    else:
        model.load_state_dict(torch.load(path / "model.pt", map_location="cpu"))
        optimizer.load_state_dict(merged([part["optimizer"] for part in parts]))
    if same:
        restore_random_state(parts[0]["random"])
    return progress, [part["position"] for part in parts]


def merged(states: list[dict]) -> dict:
    """Optimizer state dicts of all ranks as one: each holds what its rank owns, and copies of what all share."""
    whole: dict = {}
    for state in states:
        for index, values in state["state"].items():
            whole[index] = {**whole.get(index, {}), **values}
    return {"state": whole, "param_groups": states[0]["param_groups"]}


def save_momenta(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write the optimizer's state as one file, {parameter's name: {key: tensor}}; every process calls this.

    Large tensors in bf16: half the room (3 bytes a parameter of a d24), and a momentum needs no more digits.
    """
    rank, world = place()
    own: dict = {}
    for name, p in model.named_parameters():
        for key, value in optimizer.state.get(p, {}).items():
            whole = value.full_tensor() if isinstance(value, DTensor) else value  # a transfer: all take part
            if rank == 0 or not isinstance(p, DTensor):
                own.setdefault(name, {})[key] = whole.to("cpu", torch.bfloat16 if whole.numel() >= LARGE else None)
    parts = [path.with_name(f".{path.name}.{number}") for number in range(world)]
    write(own, parts[rank])
    barrier()
    if rank == 0:
        for part in parts[1:]:
            for name, state in torch.load(part).items():
                own[name] = {**own.get(name, {}), **state}
        write(own, parts[0])
        os.replace(parts[0], path)
        for part in parts[1:]:
            part.unlink()
    barrier()


def load_momenta(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Begin with the state in `path`, in float32; parameters that it lacks begin without, rates stay as they are."""
    saved = torch.load(path, map_location="cpu", mmap=True)
    for name, p in model.named_parameters():
        for key, value in saved.get(name, {}).items():
            value = value.to(p.device if value.ndim else "cpu", torch.float32, copy=True)
            if isinstance(p, DTensor) and value.shape == p.shape:
                value = distribute_tensor(value, p.device_mesh, p.placements)
            optimizer.state[p][key] = value


def random_state() -> dict:
    version, numbers, gauss = random.getstate()
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {"python": [version, list(numbers), gauss], "torch": torch.get_rng_state(), "cuda": cuda}


def restore_random_state(state: dict) -> None:
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
