"""Whether hand-written kernels are right on this machine: each is compared with its reference before its first use.

Compilers have faults (triton-lang/triton#11111: FP8 stored transposed), and a wrong kernel trains wrong numbers
without an error. So each kernel has a check beside it. `verify` runs the checks of the kernels that a process is about
to use, once, at the model's width, on few tokens. That takes milliseconds, besides the compilation. A kernel that
differs from its reference, or fails, is disabled, and one line says which and why.
"""

import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from importlib import metadata
from typing import NamedTuple

import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's kernels run on the CPU, in Python
PACKAGES = ("torch", "triton", "flash-attn-4", "quack-kernels", "nvidia-cutlass-dsl")
SIZES = ("hidden_size", "head_dim", "num_key_value_heads", "final_logit_softcapping")  # of a kernel's variants
Cases = Iterator[tuple[float, Callable[[], Sequence[Tensor]]]]


class Check(NamedTuple):
    instead: str  # what runs in the kernel's place
    cases: Callable[..., Cases]


CHECKS: dict[str, Check] = {}
disabled: set[str] = set()  # names of kernels that must not be used
unloaded: dict[str, str] = {}  # package -> why its kernels cannot be loaded
_verified: set[tuple] = set()
_lock = threading.Lock()  # replicas of a model start in threads


@cache
def compiled(function, dynamic: bool | None = False):
    """The function by torch.compile, the same object for all callers; without Triton itself."""
    return function if triton is None else torch.compile(function, dynamic=dynamic)


def usable(name: str, x: Tensor) -> bool:
    """Whether the kernel may run on a tensor like x."""
    return triton is not None and name not in disabled and (x.is_cuda or INTERPRETED)


def check(name: str, instead: str):
    """Register the decorated function (draw, config) -> pairs of a tolerance and a function that returns results.

    That function is called twice: with the kernel `name`, and with it disabled, so that it returns the results of the
    reference. `draw(*shape, dtype=)` returns normal random numbers, by default of the network's dtype.
    """

    def register(cases):
        CHECKS[name] = Check(instead, cases)
        return cases

    return register


@contextmanager
def without(name: str):
    """Inside, the kernel is disabled."""
    before = name in disabled
    disabled.add(name)
    try:
        yield
    finally:
        if not before:
            disabled.discard(name)


def verify(names: Sequence[str], config, device: torch.device, dtype: torch.dtype, subject=None) -> frozenset[str]:
    """Run those checks of `names` that this process has not run for such a model; disable kernels that fail.

    The sizes of `config`, the model's, decide which variants of the kernels are compiled. Checks get `subject` in its
    place if that is given. Returns: the names of all disabled kernels.
    """
    with _lock:
        for name in names if triton is not None and (device.type == "cuda" or INTERPRETED) else ():
            key = name, device, dtype, *(getattr(config, size, None) for size in SIZES)
            if key in _verified or name in disabled:
                continue
            _verified.add(key)
            draw = partial(_draw, torch.Generator(device).manual_seed(0), dtype)
            with torch.enable_grad():
                reason = fault(name, CHECKS[name].cases(draw, subject or config))
            if reason:
                disabled.add(name)
                line = f"kernel {name!r} is wrong here and not used: {reason} ({versions()})"
                warn(f"{line}; {CHECKS[name].instead} instead")
        return frozenset(disabled)


def fault(name: str, cases: Cases) -> str | None:
    """What is wrong with a kernel according to these cases; None: nothing."""
    try:
        for tolerance, run in cases:
            results = run()
            with without(name):
                references = run()
            for result, reference in zip(results, references, strict=True):
                if result.shape != reference.shape:
                    return f"a result is {tuple(result.shape)}, not {tuple(reference.shape)}"
                scale = reference.float().norm().clamp_min(1e-30)
                error = ((result.float() - reference.float()).norm() / scale).item()
                if not error <= tolerance:  # NaN fails, too
                    return f"its results are off by {error:.2g} of their size"
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # compilers and kernel packages raise anything
        return first_line(error)
    return None


def unavailable(package: str, error: Exception) -> None:
    """Note why a package's kernels cannot be loaded; warn once if it is installed."""
    if version(package) and torch.cuda.is_available() and package not in unloaded:
        warn(f"{package} is not used: {first_line(error)} ({versions()}); PyTorch instead")
    unloaded[package] = first_line(error) if version(package) else "not installed"


def warn(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip() or '-'}".splitlines()[0][:200]


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def versions() -> str:
    """The installed kernel packages and the GPU."""
    installed = [f"{package} {version(package)}" for package in PACKAGES if version(package)]
    return ", ".join([*installed, *([torch.cuda.get_device_name()] if torch.cuda.is_available() else [])])


try:
    import triton
    import triton.language as tl
except Exception as error:  # CPU and Apple builds of torch come without Triton; a damaged one may raise anything
    triton = tl = unavailable("triton", error)


def _draw(generator: torch.Generator, default: torch.dtype, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    return torch.randn(shape, generator=generator, device=generator.device).to(dtype or default)


def with_gradients(function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor]) -> list[Tensor]:
    """The results of function(*copies of inputs), and the gradients of all inputs for fixed ones of the results."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    results = list(function(*leaves))
    grads = [torch.arange(x.numel(), device=x.device).cos().view_as(x).to(x) for x in results]
    torch.autograd.backward(results, grads)
    return [*(result.detach() for result in results), *(leaf.grad for leaf in leaves)]
