"""Generated programs in the sandbox: right ones pass, wrong ones cannot say that they are right, none gets out.

The hostile programs run in a cgroup of the test's own, so that a hole in the sandbox cannot hurt the machine.
"""

import contextlib
import ctypes
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from multiprocessing.pool import ThreadPool
from pathlib import Path

import psutil
import pytest
import yaml

from nanochat_hf import sandbox
from nanochat_hf.errors import InputError
from nanochat_hf.sandbox import MAX_OUTPUT, layers, run_sandboxed, support
from nanochat_hf.sandbox.guard import MAX_PROCESSES

LINUX = sys.platform == "linux"
fork = multiprocessing.get_context("fork")
isolated = pytest.mark.skipif(not (LINUX and {"namespaces", "read-only files"} <= {*layers()}), reason="no namespaces")

PROGRAMS = yaml.safe_load(Path(__file__).with_name("programs.yaml").read_text())
HOSTILE = PROGRAMS["hostile"]
NETWORK = "import socket\nsocket.socket(type=socket.SOCK_DGRAM).connect(('127.0.0.1', 9))"
ADD = "assert add(1, 2) == 3\nassert add('a', 'b') == 'ab'"
WRONG = [(code, ADD) for code in PROGRAMS["wrong"]]
WRONG += [(case["program"], case["tests"]) for case in PROGRAMS["wrong with objects"]]
ENDS = [  # program, passed, part of its output
    ("import math\nprint(math.gcd(12, 18))", True, "6\n"),
    ("import os\nassert not {'SECRET_OF_THE_PARENT', 'HOME'} & set(os.environ)", True, ""),
    ("import os, sys\nassert os.listdir() == [] and sys.stdin.read() == '' and sys.argv == ['']", True, ""),
    ("assert False", False, "AssertionError"), ("1/0", False, "ZeroDivisionError"), ("a b", False, "SyntaxError"),
    ("raise SystemExit(0)", False, ""), ("import os; os._exit(0)", False, ""), ("quit()", False, ""),
    ("\0", False, ""), ("def f(: pass", False, "SyntaxError"),
    ("import os; os.abort()", False, ""), ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", False, ""),
    ("print('\\ud800')", False, "UnicodeEncodeError"), ("def f(): return f()\nf()", False, "RecursionError"),
    ("x = bytearray(1 << 40)", False, "MemoryError"), ("import ctypes; ctypes.string_at(0)", False, ""),
    ("import os\nfor _ in range(1200): os.mkdir('d'); os.chdir('d')", True, ""),
    ("with open('big', 'wb') as f:\n for _ in range(2): f.write(bytes(1 << 20)); f.flush()", False, ""),
]  # fmt: skip
FILL = "for i in range({}):\n with open(str(i), 'wb') as f: f.write(bytes(1 << 20))"  # 1 MiB each
EMPTY = "[open(str(i), 'w').close() for i in range"
LIMITS = {
    "AS": 256 << 20, "CPU": 31, "FSIZE": 1 << 20, "NPROC": 64, "NOFILE": 64, "CORE": 0, "MEMLOCK": 0, "MSGQUEUE": 0,
}  # fmt: skip
HAS_LIMITS = f"""import resource
for name, limit in {LIMITS}.items():
    soft, hard = resource.getrlimit(getattr(resource, 'RLIMIT_' + name))
    assert soft == hard == limit, (name, soft, hard)"""
REFUSED = "try:\n    {}\nexcept (OSError, ValueError) as error: pass\nelse: raise SystemExit('allowed')"
EDGES = [  # program, passed: just below and just above a limit
    (HAS_LIMITS, True),
    (FILL.format(1) + "; f.write(b'')", True), (FILL.format(1) + "; f.write(b'x')", False),
    (FILL.format(15), True), (FILL.format(17), False), (f"{EMPTY}(4000)]", True), (f"{EMPTY}(4100)]", False),
    ("x = [open('/dev/null') for _ in range(40)]", True), ("x = [open('/dev/null') for _ in range(64)]", False),
    (f"import os\nassert os.getuid() in {range(61184, 65520) if os.getuid() == 0 else [os.getuid()]}", True),
    ("import os\nnames = 'OPENBLAS_NUM_THREADS', 'OMP_NUM_THREADS', 'MALLOC_ARENA_MAX'\n"
     "assert {*os.environ} - {'LC_CTYPE'} == {*names}", True),
    ("import ctypes\nassert ctypes.CDLL(None).prctl(39, 0, 0, 0, 0) == 1", True),  # no new privileges
    *[(REFUSED.format(code), True) for code in (
        "import socket; socket.socket(40, socket.SOCK_STREAM)", "import socket; socket.socket(16, 3)",
        "open('/usr/x', 'w')", "open('/etc/passwd')", "import os; os.setuid(0)",
        f"import os; os.listdir({str(Path(__file__).parent)!r})",
    )],
]  # fmt: skip


def in_parallel(table, run):
    with ThreadPool(4) as pool:
        return list(zip(table, pool.starmap(run, table)))


@pytest.mark.parametrize("key", ["right", pytest.param("right, slow", marks=pytest.mark.slow)])
def test_right_solutions_pass(key):
    table = [(case["program"], case["tests"]) for case in PROGRAMS[key]]
    assert [(case[0], result.output) for case, result in in_parallel(table, run_sandboxed) if not result.passed] == []


@pytest.mark.parametrize("table", [WRONG[::3], pytest.param(WRONG, marks=pytest.mark.slow)], ids=["third", "all"])
def test_no_solution_reports_its_own_success(table):
    assert [case for case, result in in_parallel(table, run_sandboxed) if result.passed] == []


def test_tests_that_would_trust_an_object_of_the_solution_are_not_checked():
    table = [(case["program"], case["tests"]) for case in PROGRAMS["unchecked"]]
    for case, result in in_parallel(table, run_sandboxed):
        assert not result.passed and not result.checked and "cannot be checked: " in result.output, case
    assert run_sandboxed("def f(): return 0", "assert f()").checked
    assert "checked: a file, which one side has\n" in run_sandboxed("def f(): return 0", "open('x', 'w')").output


def test_what_tests_import_is_not_the_solutions_and_what_they_are_given_is_their_subject():
    assert support.names("from math import sqrt\nassert f(sqrt(4)) == 2")[1] == {"f"}
    assert support.names("def check(x): assert x(g(1)) == 2\ncheck(f)")[2:] == ({"f"}, {"g"})


def test_tests_do_not_run_in_a_folder_that_the_solution_may_write_and_no_cgroup_is_left(monkeypatch):
    start, calls = sandbox.start_guard, []
    monkeypatch.setattr(sandbox, "start_guard", lambda *words: calls.append((words[3], start(*words))) or calls[-1][1])
    assert run_sandboxed("def f(): return 1", "assert f() == 1").passed
    (folder, solution), (place, tests) = calls
    assert place == "/" != folder
    assert not [path for guard in (solution, tests) for path in Path("/sys/fs").glob(f"**/nanochat-{guard.pid}")]


def test_a_program_without_tests_passes_if_it_runs_to_its_last_line(monkeypatch):
    monkeypatch.setenv("SECRET_OF_THE_PARENT", "1")
    table = [(code,) for code, _, _ in ENDS]
    for (code, passed, output), (_, result) in zip(ENDS, in_parallel(table, run_sandboxed)):
        assert (result.passed, result.timed_out) == (passed, False) and output in result.output, (code, result)


@isolated
def test_each_limit_lets_through_what_it_allows_and_no_more():
    run = lambda program, passed: run_sandboxed(program, timeout=30, memory_bytes=256 << 20)  # noqa: E731
    for (program, passed), result in in_parallel(EDGES, run):
        assert result.passed == passed, (program, result)


@isolated
def test_there_is_no_network():
    assert "Network is unreachable" in run_sandboxed(NETWORK).output


def test_time_and_output_are_limited_and_nothing_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    result = run_sandboxed("while True: pass", timeout=0.3)
    assert result.timed_out and not result.passed
    assert run_sandboxed("def f():\n while True: pass", "f()", timeout=0.3).timed_out
    result = run_sandboxed("while True: print('x' * 1000)", timeout=1)
    assert not result.passed and 0 < len(result.output) <= MAX_OUTPUT
    assert not list(tmp_path.iterdir())


def test_memory_counts_for_all_processes_together():
    children = "x = b'1' * (30 << 20)\nfor _ in range(6):\n    if os.fork() == 0: break\ntime.sleep(0.5)"
    assert run_sandboxed(f"import os, time\n{children}").passed
    assert not run_sandboxed(f"import os, time\n{children}", memory_bytes=128 << 20).passed  # of which each has 30


def test_who_would_give_all_files_is_refused(monkeypatch):
    for names in ((), ("cgroups",), ("namespaces",)):
        monkeypatch.setattr(sandbox, "layers", lambda names=names: names)
        with pytest.raises(InputError, match=r"with all files of this user: use a Linux with.*allow_unsandboxed_code"):
            run_sandboxed("print(1)")
    monkeypatch.setenv(sandbox.ALLOW, "1")
    assert run_sandboxed("print(1)").passed


NO_NAMESPACES = """if True:
    import ctypes, os, sys
    lines = {"setgroups": "deny", "uid_map": f"1234 {os.getuid()} 1", "gid_map": f"1234 {os.getgid()} 1"}
    assert ctypes.CDLL(None).unshare(0x10000000) == 0
    for name, line in lines.items():
        open(f"/proc/self/{name}", "w").write(line)
    open("/proc/sys/user/max_user_namespaces", "w").write("0")
    os.execv(sys.executable, [sys.executable, "-c", sys.argv[1]])
"""
SPY = """if True:
    import ctypes, os, socket, time
    def got(action, *arguments):
        try:
            return action(*arguments) or True
        except OSError:
            return False
    processes = [n for n in range(2, os.getpid() + 9) if n != os.getpid()]
    print("seen", sum(got(os.listdir, f"/proc/{process}/fd") is not False for process in processes))
    print("files", got(os.listdir, FOLDER), got(open, FOLDER + "/x", "w"), got(open, FOLDER + "/secret"))
    print("signals", sum(got(os.kill, process, 0) for process in processes if process != os.getppid()))
    libc = ctypes.CDLL(None)
    print("System V", libc.shmget(0, 4096, 0o1666), libc.semget(0, 1, 0o1666), libc.msgget(0, 0o1666))
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            print("orphan", os.getpid(), flush=True)
            time.sleep(60)
        os._exit(0)
    os.wait()
    time.sleep(0.2)
    print("sockets", *(got(socket.socket, family) for family in (1, 2, 10)), len(socket.socketpair()))
    os.makedirs("own/closed")
    open("own/closed/x", "w").write("x")
    os.chmod("own/closed", 0)
    os.chmod("own", 0)
    def f(x): return x + 1
"""


@isolated
@pytest.mark.skipif(LINUX and ctypes.CDLL(None).syscall(444, None, 0, 1) < 1, reason="no Landlock")
def test_a_user_without_namespaces_is_protected_by_landlock(tmp_path):
    """Without it a solution reads the tests in /proc, and its user's tokens, and ends the evaluation."""
    (tmp_path / "secret").write_text("x")
    (tmp_path / "temporary").mkdir(mode=0o777)
    program = f"FOLDER = {str(tmp_path)!r}\n{SPY}"
    main = "from nanochat_hf.sandbox import layers, run_sandboxed\nprint(layers())\n"
    main += f"print(run_sandboxed({program!r}, 'assert f(1) == 2'))"
    words = [sys.executable, "-c", NO_NAMESPACES, main]
    options = {"cwd": Path(__file__).parent.parent, "env": os.environ | {"TMPDIR": str(tmp_path / "temporary")}}
    out = subprocess.run(words, capture_output=True, text=True, check=True, **options).stdout
    assert out.startswith(("('read-only files',)", "('cgroups', 'read-only files')")), out
    assert "passed=True" in out and "seen 0" in out and "files False False False" in out, out
    assert "System V -1 -1 -1" in out
    assert not psutil.pid_exists(int(re.search(r"orphan (\d+)", out)[1]))
    assert "sockets False False False 2" in out, out
    assert not list((tmp_path / "temporary").iterdir())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["secret", "temporary"]
    assert "signals 0" in out or os.uname().release < "6.12"


HEAD = "import os, signal, threading, time\nHOME, PREFIX, HERE = {!r}, {!r}, {!r}\n"


def programs(name: str) -> list[tuple[str, str]]:
    """A hostile body as (program, tests): in the module, in a function that is called, and in a child's session."""
    head = HEAD.format(os.path.expanduser("~"), sys.prefix, str(Path(__file__).parent))
    body = HOSTILE[name].replace("\n", "\n    ")
    function = f"{head}def f():\n    {body}\n    return 1\n"
    child = "if os.fork() == 0:\n    os.setsid()\n    f()\n    os._exit(0)\nos.wait()\n"
    return [(f"{function}f()", ""), (function, "f()"), (function + child, "")]


def read(path: Path) -> str:
    with contextlib.suppress(OSError):  # the process has ended
        return path.read_text()
    return ""


def attack(name: str) -> list[str]:
    """What fell."""
    fallen = []
    for number, (program, tests) in enumerate(programs(name)):
        started = time.monotonic()
        result = run_sandboxed(program, tests)
        seconds = time.monotonic() - started
        group = Path("/proc/self/cgroup").read_text()
        left = [path for path in Path("/proc").glob("[0-9]*/cgroup") if path.parent.name != str(os.getpid())
                and read(path) == group]  # fmt: skip
        if "WROTE" in result.output or seconds > 30 or left:
            fallen.append(f"{name} {number}: {seconds:.1f} s, {len(left)} processes left, {result}")
    return fallen


@pytest.fixture(scope="session")
def small_cgroup(tmp_path_factory):
    """A folder of cgroups that allows 400 processes, so that a hole cannot hurt the machine; else the test skips."""
    root = Path("/sys/fs/cgroup")
    folder = (root if (root / "cgroup.controllers").exists() else root / "pids") / f"nanochat-test-{os.getpid()}"
    try:
        folder.mkdir()
        (folder / "pids.max").write_text("400")
    except OSError:
        pytest.skip("hostile programs run only in a cgroup, which needs root here")
    yield folder
    for _ in range(100):
        try:
            folder.rmdir()
            break
        except OSError:
            time.sleep(0.02)


def in_cgroup(folder: Path, function, *arguments):
    """The result of a function that runs in a process of its own, in a cgroup."""

    def child():
        (folder / "cgroup.procs").write_text("0")
        sender.send(function(*arguments))

    receiver, sender = fork.Pipe(duplex=False)
    process = fork.Process(target=child)
    process.start()
    assert receiver.poll(60)
    process.join()
    return receiver.recv()


def attack_without_cgroups(name: str) -> list[str]:
    """As `attack`, on a machine where no cgroup may be written."""
    source, guard = Path(sandbox.guard_script.__file__), Path(tempfile.mkdtemp()) / "guard.py"
    guard.write_text(source.read_text().replace("/sys/fs/cgroup", "/nowhere"))
    for other in ("program.py", "support.py"):
        shutil.copy(source.with_name(other), guard.parent)
    sandbox.guard_script.__file__ = str(guard)
    layers.cache_clear()
    return attack(name) + ["cgroups"] * ("cgroups" in layers())


@isolated
@pytest.mark.slow
@pytest.mark.parametrize("attack", [attack, attack_without_cgroups])
@pytest.mark.parametrize("name", HOSTILE)
def test_no_hostile_program_escapes_a_limit(name, attack, small_cgroup):
    assert len(HOSTILE) * 3 >= 120 and in_cgroup(small_cgroup, attack, name) == []


@isolated
def test_a_bomb_of_processes_stays_below_the_limit(small_cgroup):
    program = (
        "import os, time\nn = 0\nfor _ in range(200):\n    try:\n        if os.fork() == 0: time.sleep(5)\n"
        "        n += 1\n    except OSError: pass\nprint(n)"
    )
    result = in_cgroup(small_cgroup, run_sandboxed, program, "", 20, 2 << 30)  # of memory, for all of them
    assert 30 < max(map(int, result.output.split())) < MAX_PROCESSES
