"""The guard of a sandbox: a script that starts a program with limits, watches it and ends it.

    python -I -S guard.py solution|tests|layers CHANNEL SECONDS MEMORY_BYTES < CODE

CODE is a solution or its tests; `layers` runs nothing and prints what isolates a program on this machine. It imports
the standard library only. Its exit code is the program's, or TIMED_OUT or OVER_LIMIT.
"""

import contextlib
import ctypes
import errno
import os
import re
import resource
import signal
import struct
import sys
import time
from pathlib import Path

PROGRAM = Path(__file__).with_name("program.py")
MAX_PROCESSES = 64  # and threads, of one program
FOLDER_BYTES = 16 << 20
FILE_BYTES = 1 << 20
UNPRIVILEGED = range(61184, 65520)  # user ids; systemd has the same range for short-lived users
# Exit codes: tests that reached their end or cannot be checked (by program.py); what the guard ended.
ENDED, UNCHECKED, TIMED_OUT, OVER_LIMIT = 77, 78, 124, 125
NEW_MOUNTS, NEW_USERS, NEW_OTHERS = 0x00020000, 0x10000000, 0x6C000000  # others: pid, network, IPC, UTS
BIND, RECURSIVE, PRIVATE, NO_SUID, NO_DEVICES = 1 << 12, 1 << 14, 1 << 18, 2, 4  # flags of mount


def guard(role: str, channel: int, timeout: float, memory_bytes: int) -> int:
    """Start a program in as many layers as this machine has and watch it.

    Returns: the program's exit code, or TIMED_OUT or OVER_LIMIT.
    """
    deadline, groups, caller = time.monotonic() + timeout, [], os.getuid()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        with contextlib.suppress(OSError):
            system_call("prctl", 36, 1)  # PR_SET_CHILD_SUBREAPER: whoever loses its parent is not lost to this one
        user, namespaces = new_namespaces()
        groups = control_groups(memory_bytes)
        names = ["unprivileged user"] * (user not in (0, caller)) + ["namespaces"] * namespaces
        names += ["cgroups"] * bool(groups)
        child = os.fork()
        if child == 0:
            try:
                os._exit(first_process(role, channel, timeout, memory_bytes, user, names, groups))
            except BaseException as error:
                os.write(2, f"{error}\n".encode())
                os._exit(1)
        os.close(channel)
        while True:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status) & 255
            if time.monotonic() > deadline:
                return TIMED_OUT
            memory = usage(child)
            if sum(memory.values()) > memory_bytes or len(memory) > MAX_PROCESSES + 1:
                return OVER_LIMIT
            time.sleep(0.005)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the reason stays what it is
        end_all(groups)


def control_groups(memory_bytes: int) -> list[Path]:
    """New cgroups with the limits (one of version 2, or two of version 1) where they may be written, else none."""
    root, name = Path("/sys/fs/cgroup"), f"nanochat-{os.getpid()}"
    limits = {"pids.max": MAX_PROCESSES + 1, "memory.max": memory_bytes + FOLDER_BYTES}
    if (root / "cgroup.controllers").exists():
        plan = {root / name: limits}
    else:
        plan = {
            root / "pids" / name: {"pids.max": limits["pids.max"]},
            root / "memory" / name: {"memory.limit_in_bytes": limits["memory.max"]},
        }
    groups = []
    try:
        for folder, values in plan.items():
            folder.mkdir()
            groups.append(folder)
            for file, value in values.items():
                (folder / file).write_text(str(value))
    except OSError:
        remove_groups(groups)
        return []
    return groups


def remove_groups(groups) -> None:
    for folder in groups:
        for _ in range(100):  # a process that was killed leaves its group a little later
            try:
                folder.rmdir()
                break
            except OSError:
                time.sleep(0.01)


def system_call(name: str, *arguments) -> int:
    """The result of a function of the C library. Raises OSError if it fails or does not exist."""
    function = getattr(ctypes.CDLL(None, use_errno=True), name, None)
    kinds = {int: ctypes.c_long, str: lambda text: text.encode()}
    values = [kinds.get(type(value), lambda other: other)(value) for value in arguments]
    if function is None or (result := function(*values)) < 0:
        raise OSError(ctypes.get_errno() or errno.ENOSYS, f"{name}: {os.strerror(ctypes.get_errno())}")
    return result


def new_namespaces() -> tuple[int, bool]:
    """Enter new namespaces if the kernel allows it. Returns: the user id of the program, and whether it did.

    Root enters them as root, so that it can mount what it alone may read; the program then gets another user. Root
    of a container without that right becomes the other user first: kernels allow users what they deny such root.
    """
    user = os.getuid()
    if user == 0:
        user = UNPRIVILEGED[os.getpid() % len(UNPRIVILEGED)]  # one per program: kernels count processes by user
        with contextlib.suppress(OSError):
            system_call("unshare", NEW_OTHERS)
            return user, True
        try:
            become(user)
        except OSError:
            return 0, False
    group = os.getgid()
    try:
        system_call("unshare", NEW_OTHERS | NEW_USERS)
    except OSError:
        return user, False
    for file, line in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        Path("/proc/self", file).write_text(line)
    return user, True


def become(user: int) -> None:
    os.setgroups([])
    os.setgid(user)
    os.setuid(user)
    with contextlib.suppress(OSError):
        system_call("prctl", 4, 1, 0, 0, 0)  # PR_SET_DUMPABLE: else /proc/self stays root's


def first_process(
    role: str, channel: int, timeout: float, memory_bytes: int, user: int, names: list[str], groups: list[Path]
) -> int:
    """Start the program and wait for it: process 1 of the namespaces, with which all others end. Returns its code."""
    os.setsid()
    with contextlib.suppress(OSError):
        system_call("prctl", 1, signal.SIGKILL)  # PR_SET_PDEATHSIG: this one ends with the guard
        system_call("prctl", 36, 1)  # PR_SET_CHILD_SUBREAPER: `usage` of this one counts orphans, too
    for group in groups:
        (group / "cgroup.procs").write_text("0")
    script, support = PROGRAM.read_text(), PROGRAM.with_name("support.py").read_text()
    if "namespaces" in names:
        for name, limit in {"shmall": "0", "msgmni": "0", "sem": "0 0 0 0"}.items():
            with contextlib.suppress(OSError):
                Path("/proc/sys/kernel", name).write_text(limit)  # System V memory would count for no process
        with contextlib.suppress(OSError):
            isolate_files()
            names.append("read-only files")
    if "read-only files" not in names:
        with contextlib.suppress(OSError):
            restrict_files(os.getcwd() if role == "solution" else None)
            names.append("read-only files")
    if role == "layers":
        print(*names, sep="\n", flush=True)
    program = os.fork()
    if program == 0:
        limits = {
            "AS": memory_bytes,
            "CPU": int(timeout) + 1,
            "FSIZE": FILE_BYTES,
            "NPROC": MAX_PROCESSES,
            "NOFILE": 64,
        }
        for name, limit in (limits | {"CORE": 0, "MEMLOCK": 0, "MSGQUEUE": 0, "SIGPENDING": 1024}).items():
            with contextlib.suppress(OSError, ValueError, AttributeError):
                kind = getattr(resource, f"RLIMIT_{name}")
                hard = resource.getrlimit(kind)[1]
                limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
                resource.setrlimit(kind, (limit, limit))
        if os.getuid() != user:
            become(user)
        with contextlib.suppress(OSError):
            system_call("prctl", 38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
            filter_calls("namespaces" in names)
        threads = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}  # of 64 MiB each
        os.execve(sys.executable, [sys.executable, "-I", "-B", "-c", script, role, str(channel), support], threads)
    os.close(channel)
    while True:  # also for orphans
        done, status = os.wait()
        if done == program:
            return os.waitstatus_to_exitcode(status) & 255


def filter_calls(namespaces: bool) -> None:
    """Deny what no namespace holds: sockets neither Unix nor IP (vsock reaches a VM's host), keyrings, io_uring.

    Without namespaces deny all sockets but pairs, and System V's memory, semaphores and queues, which would stay.
    """
    numbers = {  # socket; of keys; of System V
        "x86_64": (0xC000003E, 41, [248, 249, 250], [29, 64, 68]),
        "aarch64": (0xC00000B7, 198, [217, 218, 219], [186, 190, 194]),
    }
    architecture, sockets, keys, others = numbers.get(os.uname().machine) or (0, 0, (), ())
    if not architecture:
        return
    denied = [*keys, 425, *([] if namespaces else [sockets, *others])]
    n = len(denied)
    load, equal, at_least, end = 0x20, 0x15, 0x35, 0x06  # instructions of BPF: (code, jump if true, if false, value)
    program = [
        (load, 0, 0, 4), (equal, 0, n + 9, architecture), (load, 0, 0, 0), (at_least, n + 7, 0, 0x40000000),
        *[(equal, n + 6 - i, 0, call) for i, call in enumerate(denied)],
        (equal, 1, 0, sockets), (end, 0, 0, 0x7FFF0000), (load, 0, 0, 16),  # allow; the family of a socket
        (equal, 2, 0, 1), (equal, 1, 0, 2), (equal, 0, 1, 10),
        (end, 0, 0, 0x7FFF0000), (end, 0, 0, 0x50000 | errno.EPERM),
    ]  # fmt: skip
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *instruction) for instruction in program))
    system_call("prctl", 22, 2, struct.pack("HxxxxxxP", len(program), ctypes.addressof(code)))  # PR_SET_SECCOMP


def visible_paths() -> list[str]:
    """What a program may read: Python's installation and what that needs."""
    paths, link = ["/usr", "/bin", "/sbin", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/alternatives"], sys.executable
    paths += [f"/dev/{name}" for name in ("null", "zero", "random", "urandom")]
    prefixes = [sys.base_prefix]
    while True:  # a virtual environment's python is a chain of links
        prefixes.append(str(Path(link).parent.parent))
        if not os.path.islink(link):
            break
        link = os.path.join(os.path.dirname(link), os.readlink(link))
    return paths + [f"{prefix}/{name}" for prefix in prefixes for name in ("bin", "lib", "lib64", "pyvenv.cfg")]


def restrict_files(writable: str | None) -> None:
    """Without namespaces: the same view by Landlock, with a writable folder. Raises OSError.

    Nor can a program then look into other processes, and on newer kernels signal them.
    """
    if sys.platform != "linux":  # its numbers of system calls
        raise OSError
    version = system_call("syscall", 444, None, 0, 1)
    everything = (1 << 13 + (version >= 2) + (version >= 3) + (version >= 5)) - 1
    denied = struct.pack("QQQ", everything, 0, 2)[: 24 if version >= 6 else 8]  # files, network, signals
    rules = system_call("syscall", 444, denied, len(denied), 0)
    for path in filter(os.path.exists, [*visible_paths(), *[writable] * (writable is not None)]):
        access = 1 | 4 | (8 if os.path.isdir(path) else 2 * path.startswith("/dev/"))  # execute, read, list, write
        file = os.open(path, os.O_PATH)
        rule = struct.pack("=Qi", everything if path == writable else access, file)
        system_call("syscall", 445, rules, 1, rule, 0)
        os.close(file)
    system_call("prctl", 38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS, which it asks for
    system_call("syscall", 446, rules, 0)
    os.close(rules)


def isolate_files() -> None:
    """Change the root to a read-only view of Python's installation with an empty /tmp in memory. Raises OSError."""
    system_call("unshare", NEW_MOUNTS)
    system_call("mount", "none", "/", None, RECURSIVE | PRIVATE, None)
    system_call("mount", "tmpfs", "/sys", "tmpfs", NO_SUID | NO_DEVICES, "mode=755,size=1m")  # /sys: needed no more
    os.makedirs("/sys/new/tmp")
    os.mkdir("/sys/old")
    options = f"mode=1777,size={FOLDER_BYTES},nr_inodes=4096"
    system_call("mount", "tmpfs", "/sys/new/tmp", "tmpfs", NO_SUID | NO_DEVICES, options)
    os.mkdir("/sys/new/tmp/program")
    os.chmod("/sys/new/tmp/program", 0o777)
    for path in visible_paths():
        source, target = os.path.realpath(path), Path(f"/sys/new{path}")
        if target.exists() or not os.path.exists(source):  # it may lie below another one
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        if os.path.isdir(source):
            target.mkdir()
        else:
            target.touch()
        system_call("mount", source, str(target), None, BIND | RECURSIVE, None)
    os.symlink("/tmp", "/sys/new/dev/shm")  # multiprocessing's locks are files there
    read_only = struct.pack("QQQQ", 1 | 2, 0, 0, 0)  # MOUNT_ATTR_RDONLY, _NOSUID
    system_call("syscall", 442, -100, "/sys", 0x8000, read_only, len(read_only))  # mount_setattr, AT_RECURSIVE
    writable = struct.pack("QQQQ", 0, 1, 0, 0)
    system_call("syscall", 442, -100, "/sys/new/tmp", 0, writable, len(writable))  # but not what lies below
    system_call("pivot_root", "/sys", "/sys/old")
    system_call("umount2", "/old", 2)  # MNT_DETACH
    os.chroot("/new")  # in a chroot kernels deny new user namespaces, in which a program could mount more
    os.chdir("/tmp/program")


def usage(process: int) -> dict[int, int]:
    """Bytes of anonymous and shared memory of a process and of all its descendants, by process id."""
    memory, waiting = {}, [process]
    while waiting and len(memory) <= 2 * MAX_PROCESSES:
        process = waiting.pop()
        with contextlib.suppress(OSError):
            status = Path(f"/proc/{process}/status").read_text()
            memory[process] = 1024 * sum(map(int, re.findall(r"Rss(?:Anon|Shmem):\s*(\d+)", status)))
            files = len(os.listdir(f"/proc/{process}/fd"))  # some may be files in memory
            memory[process] += max(files - 16, 0) * FILE_BYTES
            for thread in os.listdir(f"/proc/{process}/task"):
                waiting += map(int, Path(f"/proc/{process}/task/{thread}/children").read_text().split())
    return memory


def end_all(groups: list[Path]) -> None:
    """Kill all descendants. Orphans are this process's children, whatever session they are in."""
    for _ in range(200):
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        descendants = [process for process in usage(os.getpid()) if process != os.getpid()]
        if not descendants:
            break
        for process in reversed(descendants):
            with contextlib.suppress(OSError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.002)
    remove_groups(groups)


if __name__ == "__main__":
    role, channel, timeout, memory_bytes = sys.argv[1:]
    sys.exit(guard(role, int(channel), float(timeout), int(memory_bytes)))
