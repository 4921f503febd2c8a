"""A sandbox for generated Python programs: run one, or check a solution against tests that it cannot see.

    run_sandboxed("print(1 + 1)")                                           -> SandboxResult(True, "2\\n", False)
    run_sandboxed("def add(a, b): return a + b", "assert add(1, 2) == 3")   -> SandboxResult(True, "", False)
    layers()                                                                -> ("unprivileged user", "namespaces", ...)

Solution and tests run in two sandboxes. The tests call the solution over a socket that carries plain data only
(program.py), so a solution can neither read what is expected nor report success. Without tests a program passes if it
ran to its last line; that it says itself.

A sandbox is three processes. The guard (guard.py, a script) stays outside and watches time, processes and memory.
Its child is process 1 of new namespaces: no network, no foreign process, a read-only view of the Python installation
and an empty folder in memory. That one starts the program as a user without rights. Kernels and containers differ in
what they allow: without namespaces Landlock protects the files. `layers` says what this machine gives.
"""

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from ..errors import InputError
from . import guard as guard_script
from .guard import ENDED, TIMED_OUT, UNCHECKED

MAX_OUTPUT = 64 * 1024  # bytes of a program's output that are returned
MEMORY_BYTES = 512 << 20
ALLOW = "NANOCHAT_ALLOW_UNSANDBOXED"  # environment variable that lets it run with all files of this user


@dataclass(frozen=True)
class SandboxResult:
    """Outcome of a program: `passed` is True only if it, or its tests, ran to the last line without an exception."""

    passed: bool
    output: str  # the first MAX_OUTPUT bytes of stdout and stderr together
    timed_out: bool
    checked: bool = True  # False: the tests are of a kind that cannot be checked, which `output` names


def run_sandboxed(
    program: str, tests: str = "", timeout: float = 3.0, memory_bytes: int = MEMORY_BYTES
) -> SandboxResult:
    """Run a Python program; with `tests`, check what it defines. Whatever it does, nothing is raised.

    Args:
        program: source of a module that is not `__main__`; it has the standard library and the installed packages.
        tests: source that calls the program's functions by name, for example "assert add(1, 2) == 3".
        timeout: seconds of wall time, and of processor time per process.
        memory_bytes: of all processes together.

    Raises:
        InputError: the program would run with all files of this user, and ALLOW is not set.
    """
    check_layers()
    ours, theirs = socket.socketpair()
    with collected() as (pipe, output), working_folder() as folder, ours, theirs:
        solution = start_guard("solution", program, theirs, folder, pipe, timeout, memory_bytes)
        # Not in the folder: unittest, which a solution can make the tests import, would run what it wrote there.
        checker = start_guard("tests", tests, ours, "/", pipe, timeout, memory_bytes)
        ours.close()
        theirs.close()  # else neither side would see the other one end
        code = wait(checker, timeout)
        solution.terminate()  # nobody calls it any more
        codes = code, wait(solution, timeout)
    text = output.decode("utf-8", "replace")
    return SandboxResult(code == ENDED, text, TIMED_OUT in codes, code != UNCHECKED)


@contextlib.contextmanager
def collected() -> Iterator[tuple[int, bytearray]]:
    """A pipe to write to, and what came through it, at the end whole: MAX_OUTPUT bytes; the rest is dropped."""
    data, (reader, writer) = bytearray(), os.pipe()

    def read() -> None:
        while part := os.read(reader, 1 << 16):
            data.extend(part[: MAX_OUTPUT - len(data)])

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    try:
        yield writer, data
    finally:
        os.close(writer)
        thread.join(10)  # all that wrote have ended
        os.close(reader)


@cache
def layers() -> tuple[str, ...]:
    """What protects this machine from generated code, found by starting a sandbox once."""
    with collected() as (pipe, output):
        wait(start_guard("layers", "", None, "/", pipe, 20, MEMORY_BYTES), 20)
    lines = output.decode("utf-8", "replace").splitlines()
    if "ready" not in lines:
        raise InputError(
            f"the sandbox for generated code does not start ({(lines or ['no output'])[-1]}): install Python where "
            "every user can read it, not in root's home, or evaluate as a user who is not root"
        )
    return tuple(lines[: lines.index("ready")])


@contextlib.contextmanager
def working_folder() -> Iterator[str]:
    """An empty folder that any user may write: the program's where it cannot have a root of its own."""
    folder = tempfile.mkdtemp(prefix="nanochat-")
    os.chmod(folder, 0o777)
    try:
        yield folder
    finally:
        # Any depth: shutil.rmtree ends in RecursionError. Who is not root must first get into folders of mode 0.
        for command in (["chmod", "-R", "u+rwx", folder], ["rm", "-rf", folder]):
            subprocess.run(command, check=False, stderr=subprocess.DEVNULL)


def check_layers() -> None:
    """Refuse, by InputError, to run generated code with all files of this user, unless ALLOW is set."""
    if not {"unprivileged user", "read-only files"} & set(layers()) and not os.environ.get(ALLOW):
        raise InputError(
            "generated code would run with all files of this user: use a Linux with user namespaces or Landlock or, "
            f"in a container that may be lost, allow_unsandboxed_code in eval.yaml ({ALLOW}=1 for the lm-eval CLI)"
        )


def start_guard(
    role: str, code: str, channel: socket.socket | None, folder: str, output: int, timeout: float, memory_bytes: int
) -> subprocess.Popen:
    number = channel.fileno() if channel else 2
    command = [sys.executable, "-I", "-S", guard_script.__file__, role, str(number), str(timeout), str(memory_bytes)]
    with tempfile.TemporaryFile() as source:
        source.write(code.encode("utf-8", "replace"))
        source.seek(0)
        streams = {"stdin": source, "stdout": output, "stderr": output, "pass_fds": (number,)}
        return subprocess.Popen(command, cwd=folder, env={}, start_new_session=True, **streams)


def wait(guard: subprocess.Popen, timeout: float) -> int:
    """The exit code of a guard, which ends by itself in time; one that does not is killed."""
    try:
        return guard.wait(timeout + 10)
    except subprocess.TimeoutExpired:
        guard.kill()
        return guard.wait()
