"""Checkpoints of a running pretraining: complete or absent, the last few of them, exact for any number of processes.

`folder/step_000100/` holds the weights once and one file per rank (its optimizer state, data position and random
state); under FSDP2 weights and optimizer state are written as shards by torch.distributed.checkpoint instead. All is
written into a hidden folder first, which is renamed when every rank is done, so a kill at any moment leaves the
checkpoint before it. A manifest holds the checksum of every file: a damaged checkpoint is named and set aside, and
the one before it is used. A second one at the same step (a stop after a bad loss, with the data one step on) gets a
number of its own, `step_000100.1`, for a complete checkpoint is never touched before the next one is complete.

The chat stages' checkpoints are transformers' own, `state/checkpoint-100`, with a manifest and a rotation of ours.
`save_optimizer_state` and `load_optimizer_state` carry the optimizer's state from one stage to the next, as one small
file.

Why not `Accelerator.save_state`: under DDP it keeps the main process's optimizer state only, but each rank of
MuonAdamW owns a part; and it has no place for a data position per rank.
"""

import hashlib
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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

from ..distributed import get_dist_info, main_process_first, monitored_barrier
from ..errors import InputError
from ..optim.gradient_reduction import LARGE
from ..run import apply_umask, load_json, renamed_keys, save_json, writing

MANIFEST = "manifest.json"
COMPLETE = "complete"  # the same in a checkpoint of a chat stage (empty in those of older versions)
SKIPPED = "skipped.json"  # beside the checkpoints of a chat stage: {"steps": those with gradients that are not finite}
MEASURED = "measured.json"  # in a checkpoint, when the evaluations after its step were made: their figures


def barrier() -> None:
    monitored_barrier("a checkpoint")


def is_sharded(model: nn.Module) -> bool:
    return any(isinstance(p, DTensor) for p in model.parameters())


def complete(folder: Path) -> list[Path]:
    """The complete checkpoints below `folder`, the newest last; what else lies there is somebody else's."""
    named = [path for path in folder.glob("step_*") if re.fullmatch(r"step_\d+(\.\d+)?", path.name)]
    return sorted(named, key=lambda path: [int(number) for number in path.name.removeprefix("step_").split(".")])


def write_manifest(folder: Path, name: str = MANIFEST) -> None:
    """Write folder/name: {file: its SHA-256}, for `damage`."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / name)
    save_json(folder / name, {str(path.relative_to(folder)): sha256(path) for path in files})


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def damage(folder: Path, name: str = MANIFEST) -> str | None:
    """What is wrong with the first file that differs from the manifest; None if all are as they were written.

    A folder of an older version, without a manifest or with an empty mark `complete`, is not checked.
    """
    if not (folder / name).exists() or (name == COMPLETE and not (folder / name).stat().st_size):
        return None
    try:
        files = load_json(folder / name)
    except InputError:
        return f"{folder / name} is damaged"
    for file, checksum in files.items():
        if not (folder / file).is_file():
            return f"{folder / file} is missing"
        if sha256(folder / file) != checksum:
            return f"{folder / file} is damaged: its checksum differs"
    return None


def newest_intact(checkpoints: list[Path], name: str, log: Callable[[str], None]) -> Path | None:
    """The last of `checkpoints` (oldest first) whose files are as they were written; None if there are none at all.

    Damaged ones after it are renamed to damaged_*, for a new checkpoint of the same step must not overwrite them.
    All ranks call it, the main one decides. Raises InputError when every one is damaged.
    """
    with main_process_first("checking the last checkpoint") as main:
        reasons: list[str] = []
        while main and checkpoints and (reason := damage(checkpoints[-1 - len(reasons)], name)):
            reasons.append(reason)
            if len(reasons) == len(checkpoints):
                raise InputError(
                    f"{reasons[0]}, and there is no older checkpoint without damage: bring that file back, or delete "
                    f"{checkpoints[0].parent} to start this stage anew"
                )
        for reason, path in zip(reasons, reversed(checkpoints)):
            aside, number = path.with_name(f"damaged_{path.name}"), 0
            while aside.exists():
                number += 1
                aside = path.with_name(f"damaged_{path.name}.{number}")
            os.replace(path, aside)
            log(f"{reason}; set aside as {aside.name}; resuming from the checkpoint before it")
    return next((path for path in reversed(checkpoints) if path.exists()), None)


def latest(folder: Path, log: Callable[[str], None] = print) -> Path | None:
    """The newest complete and undamaged checkpoint below `folder`, or None; see `newest_intact`."""
    return newest_intact(complete(folder), MANIFEST, log)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn whatever a damaged file makes torch raise into an InputError that names `path`."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # pickle, zip, safetensors, keys and shapes: each has its own
        reason = " ".join(str(error).split())[:150]
        raise InputError(
            f"{path} cannot be read ({type(error).__name__}: {reason}): bring it back, or delete it to use an older "
            "checkpoint or start this stage anew"
        ) from error


def write(value, path: Path) -> None:
    """torch.save, and on the disk before this returns: a rename may outlive a crash of the machine, so must it."""
    with open(path, "wb") as file:
        torch.save(value, file)
        file.flush()
        os.fsync(file.fileno())


def read_progress(path: Path) -> dict:
    with reading(path):
        return torch.load(path / "progress.pt")


def full_weights(model: nn.Module) -> dict[str, Tensor]:
    """The whole state dict of the model, on every process; under FSDP2 only the first one's holds the tensors."""
    if not is_sharded(model):
        return model.state_dict()
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def save_model(folder: Path, model: nn.Module, tokenizer) -> None:
    """Make `folder` one for `from_pretrained`: float32, written aside and moved in file by file, the config last."""
    weights = full_weights(model)
    if get_dist_info()[0] == 0:
        refuse_nan(weights, f"the model for {folder}")
        aside = folder / ".weights"
        with writing(folder):
            shutil.rmtree(aside, ignore_errors=True)
            model.save_pretrained(aside, state_dict={name: value.float() for name, value in weights.items()})
            tokenizer.save_pretrained(aside)
            shutil.rmtree(aside / "custom_generate", ignore_errors=True)  # the source's: chat stages ship today's
            apply_umask(aside)
            for path in sorted(aside.iterdir(), key=lambda path: path.name == "config.json"):
                os.replace(path, folder / path.name)
            aside.rmdir()
    barrier()


def refuse_nan(weights: dict[str, Tensor], owner: str) -> None:
    """Raises FloatingPointError that names the first of `weights` with a NaN or an infinity in it."""
    for name, value in weights.items():
        if not value.isfinite().all():
            raise FloatingPointError(
                f"{owner} has values in {name} that are not finite: it is of no use; go back to an earlier stage or "
                "checkpoint, and lower the learning rates"
            )


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
        FloatingPointError: weights are not finite.
    """
    if not is_sharded(model):
        refuse_nan(model.state_dict(), "the model")
    rank, world = get_dist_info()
    aside, final = folder / f".step_{step:06d}", folder / f"step_{step:06d}"
    if before := [path for path in complete(folder) if path.name.partition(".")[0] == final.name]:
        final = final.with_name(f"{final.name}.{int(before[-1].name.partition('.')[2] or 0) + 1}")
    if rank == 0:
        shutil.rmtree(aside, ignore_errors=True)
        with writing(folder):
            aside.mkdir(parents=True)
    barrier()
    own = {"position": position, "random": random_state()}
    left = f"; the checkpoint before it is {complete(folder)[-1]}" if complete(folder) else ""
    try:
        with writing(folder, left):
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
                write_manifest(aside)
    except InputError:
        if rank == 0:  # half a checkpoint only takes up room
            shutil.rmtree(aside, ignore_errors=True)
        raise
    if rank == 0:
        os.replace(aside, final)
        for old in superseded(complete(folder), keep):
            hidden = old.with_name(f".{old.name}")  # a kill while it is deleted must not leave half of one
            shutil.rmtree(hidden, ignore_errors=True)
            os.replace(old, hidden)
            shutil.rmtree(hidden, ignore_errors=True)
    barrier()
    return final


def superseded(checkpoints: list[Path], keep: int) -> list[Path]:
    """Those of `checkpoints` (oldest first) that may go: older ones of a step, and all before the last `keep` steps.

    Runs that stop at one step again and again must not push out the checkpoint before it.
    """
    newest = {path.name.partition(".")[0]: path for path in checkpoints}
    staying = list(newest.values())[-max(keep, 1) :]
    return [path for path in checkpoints if path not in staying]


def load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict, list[dict]]:
    """Bring model, optimizer and random state back; -> (progress, the data positions for `load_state_dict`).

    With another number of processes than the checkpoint's, each one gets all the optimizer state (MuonAdamW drops what
    it does not own) and all the positions; random state then starts afresh.
    """
    rank, world = get_dist_info()
    progress = read_progress(path)
    same = progress["world_size"] == world
    numbers = [rank] if same else range(progress["world_size"])
    if (path / "shards").exists() != is_sharded(model):
        raise InputError(f"{path} was written with another kind of sharding; resume with the config it began with")
    with reading(path):
        parts = [torch.load(path / f"rank_{number:05d}.pt", map_location="cpu") for number in numbers]
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


def save_optimizer_state(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write the optimizer's state as one file, {parameter's name: {key: tensor}}; every process calls this.

    Large tensors in bf16: half the room (3 bytes a parameter of a d24), and a momentum needs no more digits.
    """
    rank, world = get_dist_info()
    own: dict = {}
    for name, p in model.named_parameters():
        for key, value in optimizer.state.get(p, {}).items():
            whole = value.full_tensor() if isinstance(value, DTensor) else value  # a transfer: all take part
            if rank == 0 or not isinstance(p, DTensor):
                own.setdefault(name, {})[key] = whole.to("cpu", torch.bfloat16 if whole.numel() >= LARGE else None)
    parts = [path.with_name(f".{path.name}.{number}") for number in range(world)]
    with writing(path):
        write(own, parts[rank])
    barrier()
    if rank == 0:
        for part in parts[1:]:
            for name, state in torch.load(part).items():
                own[name] = {**own.get(name, {}), **state}
        with writing(path):
            write(own, parts[0])
            os.replace(parts[0], path)
        for part in parts[1:]:
            part.unlink()
    barrier()


def load_optimizer_state(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Begin with the state in `path`, in float32; parameters that it lacks begin without, rates stay as they are.

    Raises InputError if it is damaged, or not the file that its stage wrote.
    """
    checksum = (load_json(path.parent / "metrics.json") or {}).get("optimizer")
    if checksum and get_dist_info()[0] == 0 and sha256(path) != checksum:
        raise InputError(f"{path} is not what its stage wrote: run that stage again, or set load_optimizer: no")
    with reading(path):
        saved = torch.load(path, map_location="cpu", mmap=True)
    for name, p in model.named_parameters():
        for key, value in saved.get(name, {}).items():
            value = value.to(p.device if value.ndim else "cpu", torch.float32, copy=True)
            if isinstance(p, DTensor) and value.shape == p.shape:
                value = distribute_tensor(value, p.device_mesh, p.placements)
            optimizer.state[p][key] = value


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[-1])


def complete_checkpoints(state: Path) -> list[Path]:
    """The checkpoints below `state` that were written to their end, the newest last."""
    return sorted((path for path in all_checkpoints(state) if (path / COMPLETE).is_file()), key=step_of)


def all_checkpoints(state: Path) -> list[Path]:
    """Also those that were not; what has another name is somebody else's."""
    return [path for path in state.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]


def remove(path: Path) -> None:
    """Delete a folder, a file, or a link but not what it points to."""
    path.unlink() if path.is_symlink() or path.is_file() else shutil.rmtree(path)


def missing_file(checkpoint: Path) -> str | None:
    """The name of a file without which transformers would resume a checkpoint half, and say nothing."""
    names = ("trainer_state.json", "scheduler.pt")
    absent = [name for name in names if not (checkpoint / name).exists()]
    if not (any(checkpoint.glob("optimizer*")) or any(checkpoint.glob("global_step*"))):
        absent.append("optimizer.pt")
    return absent[0] if absent else None


def refuse_change(state: Path, settings: dict, log: Callable[[str], None]) -> None:
    """Raises InputError if the checkpoints in `state` were written with other `settings`."""
    before = load_json(state / "config.json")
    if before is None:
        raise InputError(f"{state / 'config.json'} is missing: bring it back, or delete {state} to start anew")
    if unknown := [key for key in ("model", "data") if key in settings and key not in before]:
        log(f"not verified, since an older version wrote {state}: whether {' and '.join(unknown)} changed meanwhile")
    before = renamed_keys(before)
    changed = [key for key in settings if before.get(key, settings[key]) != settings[key]]  # older: fewer keys
    if changed:
        changed = [f"{key}: {before[key]!r} -> {settings[key]!r}" for key in changed]
        raise InputError(
            f"{state} was written by another recipe or launch ({', '.join(changed)}): go on with that, or delete it "
            "to start this stage anew"
        )


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
