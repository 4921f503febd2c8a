"""Whether hand-written kernels are right on this machine: each is compared with its reference before it is used.

Compilers have faults (triton-lang/triton#11111: FP8 stored transposed), and a kernel that is wrong trains wrong
numbers without a word. So each kernel has a check beside it, of which `verify` runs those that a process is about to
use: at the model's own width, on few rows, once, in milliseconds besides the compilation that the first step needs
anyway. One that differs from its reference, or fails, is not used: `usable` says no, and one line says which and why.
"""

import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import metadata
from typing import NamedTuple

import torch
from torch import Tensor

try:
    import triton
except ImportError:  # CPU and Apple builds of torch come without Triton
    triton = None

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's kernels run on the CPU, in Python
PACKAGES = ("torch", "triton", "flash-attn-4", "quack-kernels", "nvidia-cutlass-dsl")
Cases = Iterator[tuple[float, Callable[[], Sequence[Tensor]]]]


class Check(NamedTuple):
    instead: str  # what runs where the kernel does not
    cases: Callable[..., Cases]


CHECKS: dict[str, Check] = {}
disabled: set[str] = set()  # names of kernels that are not to be used
unloaded: dict[str, str] = {}  # package -> why its kernels cannot be had
_verified: set[tuple] = set()
_lock = threading.Lock()  # replicas of a model start in threads


def usable(name: str, x: Tensor) -> bool:
    """Whether the kernel may run on a tensor like x."""
    return triton is not None and name not in disabled and (x.is_cuda or INTERPRETED)


def check(name: str, instead: str):
    """Decorate (draw, config) -> pairs of a tolerance and a function that gives the results of the kernel `name`.

    The function is called twice, the second time with the kernel disabled, and must then give its reference's.
    draw(*shape, dtype=) gives random numbers, of the network's dtype unless told, the same in each process.
    """

    def register(cases):
        CHECKS[name] = Check(instead, cases)
        return cases

    return register


@contextmanager
def without(name: str):
    """Inside, the kernel is not used."""
    before = name in disabled
    disabled.add(name)
    try:
        yield
    finally:
        if not before:
            disabled.discard(name)


def verify(names: Sequence[str], config, device: torch.device, dtype: torch.dtype, subject=None) -> frozenset[str]:
    """Run the checks of `names` that this process has not run for such a model; disable what fails, in one line each.

    Args:
        config: of the model, whose sizes decide which variants of the kernels are compiled.
        subject: what the checks get in its place.

    Returns:
        The names of all kernels that are not to be used.
    """
    with _lock:
        for name in names if triton is not None and (device.type == "cuda" or INTERPRETED) else ():
            key = name, device, dtype, config.hidden_size, getattr(config, "head_dim", None)
            if key in _verified or name in disabled:
                continue
            _verified.add(key)
            draw = partial(_draw, torch.Generator(device).manual_seed(0), dtype)
            with torch.enable_grad():
                reason = fault(name, CHECKS[name].cases(draw, subject or config))
            if reason:
                disable(name, reason)
        return frozenset(disabled)


def disable(name: str, reason: str) -> None:
    disabled.add(name)
    print(
        f"kernel {name!r} is wrong here and not used: {reason} ({versions()}); {CHECKS[name].instead} instead",
        file=sys.stderr, flush=True,
    )  # fmt: skip


def fault(name: str, cases: Cases) -> str | None:
    """What is wrong with a kernel by these cases, if anything is."""
    try:
        for tolerance, run in cases:
            results = run()
            with without(name):
                references = run()
            for result, reference in zip(results, references, strict=True):
                scale = reference.float().norm().clamp_min(1e-30)
                error = ((result.float() - reference.float()).norm() / scale).item()
                if not error <= tolerance:  # NaN is no number to pass with
                    return f"its results are off by {error:.2g} of their size"
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # compilers and packages of kernels raise anything
        return first_line(error)
    return None


def unavailable(package: str, error: Exception) -> None:
    """Note why a package's kernels cannot be had; one that is installed and does not fit is worth a line."""
    unloaded[package] = first_line(error) if version(package) else "not installed"
    if version(package) and torch.cuda.is_available():
        print(
            f"{package} is not used: {unloaded[package]} ({versions()}); PyTorch instead", file=sys.stderr, flush=True
        )


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip() or '-'}".splitlines()[0][:200]


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def versions() -> str:
    """The packages of kernels that are installed, and the GPU."""
    known = [f"{package} {version(package)}" for package in PACKAGES if version(package)]
    return ", ".join([*known, *([torch.cuda.get_device_name()] if torch.cuda.is_available() else [])])


def _draw(generator: torch.Generator, own: torch.dtype, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    return torch.randn(shape, generator=generator, device=generator.device).to(dtype or own)


def with_gradients(function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor]) -> list[Tensor]:
    """function(*copies of the inputs) and, for the same gradient of each result, those of all inputs."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    results = list(function(*leaves))
    given = [torch.arange(x.numel(), device=x.device).cos().view_as(x).to(x) for x in results]
    torch.autograd.backward(results, given)
    return [*(result.detach() for result in results), *(leaf.grad for leaf in leaves)]
