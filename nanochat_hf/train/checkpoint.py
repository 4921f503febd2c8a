"""Checkpoints: complete or absent, verified by checksums, the last few kept, exact for any number of ranks.

`state/step_000100/` of a pretraining run holds the weights once, and per rank a file with optimizer state, data-loader
state and random state. Under FSDP2 torch.distributed.checkpoint writes weights and optimizer state as shards. A hidden
folder is renamed when every rank has written, so an interruption leaves the checkpoint before it. A second checkpoint
of one step (after a loss spike, with later data) is `step_000100.1`. Chat stages use transformers' own checkpoints,
`state/checkpoint-100`.

In both `manifest.json`, with every file's checksum, is written last. A damaged checkpoint is set aside and the one
before it is used. `Accelerator.save_state` would save the optimizer state of rank 0 only.
"""

import hashlib
import os
import random
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as dcp_state
from torch.distributed.tensor import DTensor, distribute_tensor

from ..distributed import get_dist_info, main_process_first, monitored_barrier
from ..errors import InputError, in_a_line
from ..optim.muon_adamw import LARGE
from ..run import apply_umask, first_non_finite, load_json, load_metrics, renamed_keys, save_json, writing

MANIFEST = "manifest.json"
SKIPPED = "skipped.json"  # beside a chat stage's checkpoints: {"steps": those whose gradients were not finite}
MEASURED = "measured.json"  # in a checkpoint: results of the evaluations after its step


def is_sharded(model: nn.Module) -> bool:
    return any(isinstance(p, DTensor) for p in model.parameters())


def all_checkpoints(state: Path) -> list[Path]:
    """The checkpoint folders in `state`, complete or not, the newest last; other names are ignored."""
    named = [path for path in state.glob("*") if re.fullmatch(r"step_\d+(\.\d+)?|checkpoint-\d+", path.name)]
    return sorted(named, key=lambda path: [int(number) for number in re.findall(r"\d+", path.name)])


def complete_checkpoints(state: Path) -> list[Path]:
    """The complete checkpoints in `state`, the newest last."""
    return [path for path in all_checkpoints(state) if manifest_of(path)]


def manifest_of(checkpoint: Path) -> Path | None:
    return checkpoint / MANIFEST if (checkpoint / MANIFEST).is_file() else None


def step_of(checkpoint: Path) -> int:
    return int(re.findall(r"\d+", checkpoint.name)[0])


def write_manifest(folder: Path) -> None:
    """Write the manifest of the files in `folder`, {file: its SHA-256}, for `damage`."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)
    save_json(folder / MANIFEST, {str(path.relative_to(folder)): sha256(path) for path in files})


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def damage(folder: Path) -> str | None:
    """What is wrong with the first file that differs from the manifest, or None."""
    if not manifest_of(folder):
        return f"{folder / MANIFEST} is missing"
    try:
        if not (checksums := load_json(folder / MANIFEST)):
            return f"{folder / MANIFEST} names no file"
        for file, checksum in checksums.items():
            if not (folder / file).is_file():
                return f"{folder / file} is missing"
            if sha256(folder / file) != checksum:
                return f"{folder / file} is damaged: its checksum differs"
    except (InputError, OSError):  # OSError: a name that no disk allows
        return f"{folder / MANIFEST} is damaged"
    return None


def latest(state: Path, log: Callable[[str], None] = print) -> Path | None:
    """The newest complete and undamaged checkpoint in `state`, or None if there are none. Every rank calls this.

    Damaged ones after it are renamed to damaged_*. Raises InputError when all are damaged or one is of an old version.
    """
    checkpoints, reasons = complete_checkpoints(state), []
    with main_process_first("checking the last checkpoint") as main:
        for path in set(all_checkpoints(state)) - set(checkpoints):
            if path.name.startswith("step") or (path / "complete").exists():  # else one that was cut off
                advice = f"finish the stage with such a version, or delete {state} to start it anew"
                raise InputError(f"{path} has no {MANIFEST}, as those of versions before December 2026: {advice}")
        while main and checkpoints and (reason := damage(checkpoints[-1 - len(reasons)])):
            reasons.append(reason)
            if len(reasons) == len(checkpoints):
                advice = f"bring that file back, or delete {state} to start this stage anew"
                raise InputError(f"{reasons[0]}, and there is no older undamaged checkpoint: {advice}")
        for reason, path in zip(reasons, reversed(checkpoints)):
            names = (path.with_name(f"damaged_{path.name}" + (f".{n}" if n else "")) for n in count())
            aside = next(name for name in names if not name.exists())
            os.replace(path, aside)
            log(f"{reason}; set aside as {aside.name}; resuming from the checkpoint before it")
    return next((path for path in reversed(checkpoints) if path.exists()), None)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn the errors of reading a damaged file into an InputError that names `path`."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # pickle, zip, safetensors, missing keys, shapes
        advice = "restore it, or delete it to use an older checkpoint or start this stage anew"
        raise InputError(f"{path} cannot be read ({in_a_line(error)}): {advice}") from error


def write(value, path: Path) -> None:
    """torch.save with fsync: the later rename of the folder may survive a crash of the machine, so the file must."""
    with open(path, "wb") as file:
        torch.save(value, file)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def writing_checkpoint(folder: Path) -> Iterator[None]:
    """Turn a failure to write `folder` into an InputError that names the checkpoint before it, and delete `folder`."""
    older = complete_checkpoints(folder.parent)
    try:
        with writing(folder.parent, f"; the checkpoint before it is {older[-1]}" if older else ""):
            yield
    except InputError:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def read_progress(path: Path) -> dict:
    with reading(path):
        progress = torch.load(path / "progress.pt")
        if progress["step"] != step_of(path):
            raise ValueError(f"it holds step {progress['step']}")
        return progress


def save_model(folder: Path, model: nn.Module, tokenizer) -> None:
    """Make `folder` one for `from_pretrained`: float32 weights; files are moved into place, the config last."""
    options = dcp_state.StateDictOptions(full_state_dict=True, cpu_offload=True)  # rank 0 gets all of it
    weights = dcp_state.get_model_state_dict(model, options=options) if is_sharded(model) else model.state_dict()
    if get_dist_info()[0] == 0:
        refuse_nan(weights, f"the model for {folder}")
        aside = folder / ".weights"
        with writing(folder):
            shutil.rmtree(aside, ignore_errors=True)
            model.save_pretrained(aside, state_dict={name: value.float() for name, value in weights.items()})
            tokenizer.save_pretrained(aside)
            shutil.rmtree(aside / "custom_generate", ignore_errors=True)  # of initial weights; chat stages add ours
            apply_umask(aside)
            for path in sorted(aside.iterdir(), key=lambda path: path.name == "config.json"):
                os.replace(path, folder / path.name)
            aside.rmdir()
    monitored_barrier("a checkpoint")


def refuse_nan(weights: dict[str, Tensor], owner: str) -> None:
    """Raise FloatingPointError that names the first of `weights` with a NaN or infinity."""
    if name := first_non_finite(weights.items()):
        advice = "go back to an earlier stage or checkpoint, and lower the learning rates"
        raise FloatingPointError(f"{owner} has values in {name} that are not finite: {advice}")


def save(
    folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, position: dict, progress: dict,
    keep: int,
) -> Path:  # fmt: skip
    """Write the state after `step` steps and delete superseded checkpoints. Every rank calls this at the same step.

    Args:
        position: this rank's data-loader state.
        progress: the rest of the loop's state, plain values that are equal on every rank.
        keep: number of steps whose checkpoints stay, this one included.

    Raises InputError if the folder cannot be written to, FloatingPointError if weights are not finite.
    """
    sharded, (rank, world) = is_sharded(model), get_dist_info()
    if not sharded:
        refuse_nan(model.state_dict(), "the model")
    aside, final = folder / f".step_{step:06d}", folder / f"step_{step:06d}"
    if numbers := [int(path.suffix[1:] or 0) for path in all_checkpoints(folder) if path.stem == final.name]:
        final = final.with_name(f"{final.name}.{numbers[-1] + 1}")
    own = {"position": position, "random": random_state()}
    with writing_checkpoint(aside):
        if rank == 0:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        monitored_barrier("a checkpoint")
        if sharded:
            weights, state = dcp_state.get_state_dict(model, optimizer)
            dcp.save({"model": weights, "optimizer": state}, checkpoint_id=aside / "shards")
        else:
            own["optimizer"] = optimizer.state_dict()
            if rank == 0:
                write(model.state_dict(), aside / "model.pt")
        write(own, aside / f"rank_{rank:05d}.pt")
        if rank == 0:
            write({**progress, "step": step, "world_size": world}, aside / "progress.pt")
        monitored_barrier("a checkpoint")
        if rank == 0:
            write_manifest(aside)
    if rank == 0:
        os.replace(aside, final)
        delete_superseded(folder, keep)
    monitored_barrier("a checkpoint")
    return final


def delete_superseded(state: Path, keep: int, best_step: int | None = None) -> None:
    """Delete all checkpoints in `state` but the newest of each of the last `keep` steps, and that of `best_step`.

    So runs that stop at one step repeatedly do not push out the checkpoint of the step before.
    """
    checkpoints = complete_checkpoints(state)
    newest = list({path.stem: path for path in checkpoints}.values())[-max(keep, 1) :]
    for old in (path for path in checkpoints if path not in newest and step_of(path) != best_step):
        hidden = old.with_name(f".{old.name}")  # an interruption must not leave half a checkpoint
        remove(hidden)
        os.replace(old, hidden)
        remove(hidden)


def remove(path: Path) -> None:
    """Delete a folder, a file or a link, but not the link's target."""
    path.unlink() if path.is_symlink() or path.is_file() else shutil.rmtree(path, ignore_errors=True)


def load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> list[dict]:
    """Restore model, optimizer and random state; returns the data-loader states for `load_state_dict`.

    With another number of ranks than the checkpoint's, each gets all optimizer and data-loader states, and the random
    state is not restored. MuonAdamW drops the state that its rank does not own.
    """
    rank, world = get_dist_info()
    saved_world = read_progress(path)["world_size"]
    numbers = [rank] if saved_world == world else range(saved_world)
    if (path / "shards").exists() != is_sharded(model):
        raise InputError(f"{path} was written with another kind of sharding; resume with the config it began with")
    with reading(path):
        parts = [torch.load(path / f"rank_{number:05d}.pt", map_location="cpu") for number in numbers]
        if is_sharded(model):
            weights, state = dcp_state.get_state_dict(model, optimizer)
            dcp.load({"model": weights, "optimizer": state}, checkpoint_id=path / "shards")
            dcp_state.set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
        else:
            model.load_state_dict(torch.load(path / "model.pt", map_location="cpu"))
            optimizer.load_state_dict(merged([part["optimizer"] for part in parts]))
        if saved_world == world:
            restore_random_state(parts[0]["random"])
        return [part["position"] for part in parts]


def merged(states: list[dict]) -> dict:
    """Optimizer state dicts of all ranks as one: each has what its rank owns, and copies of what all ranks have."""
    return {"state": merged_state([state["state"] for state in states]), "param_groups": states[0]["param_groups"]}


def merged_state(states: list[dict]) -> dict:
    result: dict = {}
    for state in states:
        for key, values in state.items():
            result[key] = {**result.get(key, {}), **values}
    return result


def save_optimizer_state(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write the optimizer's state as one file, {parameter's name: {key: tensor}}. Every rank calls this.

    Large tensors are stored in bf16, which is enough for momentum and halves the size (a d24: 3 bytes per parameter).
    """
    rank, world = get_dist_info()
    own: dict = {}
    for name, p in model.named_parameters():
        for key, value in optimizer.state.get(p, {}).items():
            full = value.full_tensor() if isinstance(value, DTensor) else value  # a collective operation
            if rank == 0 or not isinstance(p, DTensor):
                own.setdefault(name, {})[key] = full.to("cpu", torch.bfloat16 if full.numel() >= LARGE else None)
    parts = [path.with_name(f".{path.name}.{number}") for number in range(world)]
    with writing(path):
        write(own, parts[rank])
        monitored_barrier("a checkpoint")
        if rank == 0:
            write(merged_state([own, *map(torch.load, parts[1:])]), parts[0])
            os.replace(parts[0], path)
            for part in parts[1:]:
                part.unlink()
    monitored_barrier("a checkpoint")


def load_optimizer_state(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Start from the state in `path`, in float32; parameters that it lacks start without, learning rates stay.

    Raises InputError if it is damaged, or not the file that its stage wrote.
    """
    checksum = (load_metrics(path.parent) or {}).get("optimizer")
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


def changed_keys(before: dict, now: dict) -> dict[str, str]:
    """{key: "key: before -> now"} of the keys whose values differ; older versions wrote fewer keys."""
    before = renamed_keys(before)
    return {k: f"{k}: {before[k]!r} -> {value!r}" for k, value in now.items() if before.get(k, value) != value}


def refuse_changes(state: Path, changes: Iterable[str]) -> None:
    """Raise InputError if anything changed since the checkpoints in `state` were written."""
    if words := ", ".join(changes):
        advice = "resume with that, use another --run-dir, or delete it to start this stage anew"
        raise InputError(f"{state} was written with another recipe, input or launch ({words}): {advice}")


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
