"""Tools that the chat model may call: a calculator, and a sandbox that runs whole Python programs for HumanEval.

`calculate` evaluates what the model writes between <|python_start|> and <|python_end|>: arithmetic on numbers and
`'word'.count('l')`, nothing else. It walks the syntax tree with a list of allowed nodes; there is no `eval`, no name
lookup and no attribute access, so there is nothing to escape to.
`run_sandboxed` runs a program of the model in a process of its own with limits on time, memory, files and processes
and, where the kernel allows it, without network. It guards against accidents and clumsy attacks, not against an
expert: to run code from strangers, put the whole evaluation into a container.

    calculate("12*(3+4)")            -> "84"
    calculate("'castle'.count('t')") -> "1"
    run_sandboxed("print(1 + 1)")    -> SandboxResult(passed=True, output="2\\n", ...)
"""

import ast
import contextlib
import operator
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from decimal import Context, Decimal, Inexact, InvalidOperation
from fractions import Fraction

MAX_CHARS = 200  # of an expression; bounds nesting and work
MAX_EXPONENT = 100
MAX_VALUE = 10**MAX_EXPONENT  # of intermediate values; larger ints are slow to print and useless in a chat
MAX_DIGITS = 100  # printed of a result that terminates; further ones are rounded
MAX_OUTPUT = 64 * 1024  # bytes of a sandboxed program's output that are returned

_ALLOWED = "only numbers, + - * / // % ( ) and 'text'.count('part') are allowed"
_CHARACTERS = re.compile(r"""('[^'\\]*'|"[^"\\]*"|\.count\b|[0-9 .+*/%(),eE_-])*""")
_THOUSANDS = re.compile(r"(?<![\w.])\d{1,3}(,\d{3})+(?![\w,])")

_OPERATIONS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


def calculate(expression: str) -> str:
    """Value of an arithmetic expression or of `'text'.count('part')`, as text.

    Takes + - * / // % and parentheses on decimal numbers (commas between thousands are dropped), and the one string
    method `count`. The arithmetic is exact, in fractions. Results print as integers or terminating decimals in full;
    others, such as 1/3, are rounded to 10 digits, but never to fewer than 2 decimals.

    Raises:
        ValueError: one line that says what is wrong (too long, not allowed, division by zero, too large).
    """
    if not isinstance(expression, str):
        raise ValueError("the expression must be text")
    text = expression.strip()
    if len(text) > MAX_CHARS:
        raise ValueError(f"expression longer than {MAX_CHARS} characters")
    if "'" not in text and '"' not in text:
        text = _THOUSANDS.sub(lambda number: number[0].replace(",", ""), text)
    if not (text.isprintable() and _CHARACTERS.fullmatch(text)):  # the parser would print warnings
        raise ValueError(_ALLOWED)
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:  # the last two: deep nesting
        raise ValueError("not an expression") from error
    try:
        return _format(_number(tree.body, text.encode()))
    except ZeroDivisionError as error:
        raise ValueError("division by zero") from error


def python(expression: str) -> str:
    """Calculates an arithmetic expression, or how often a letter occurs in a word.

    Args:
        expression: arithmetic such as 12*(3+4), or 'castle'.count('t').

    Returns:
        The result as text.
    """
    return calculate(expression)


def _number(node: ast.expr, source: bytes) -> Fraction:
    """The exact value of a node of the expression; `source` holds the digits, which a Python float would round."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):  # type(): True is an int, too
        value = _literal(source[node.col_offset : node.end_col_offset].decode())
    elif isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        value = _OPERATIONS[type(node.op)](_number(node.left, source), _number(node.right, source))
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.UAdd, ast.USub)):
        value = _number(node.operand, source) * (1 if isinstance(node.op, ast.UAdd) else -1)
    elif isinstance(node, ast.Call):
        value = _count(node)
    else:
        raise ValueError(_ALLOWED)
    if not -MAX_VALUE <= value <= MAX_VALUE:
        raise ValueError("number too large")
    return Fraction(value)  # // gives an int


def _literal(digits: str) -> Fraction:
    try:
        value = Decimal(digits)
    except InvalidOperation:  # an exponent beyond 10**18
        raise ValueError("number too large") from None
    # Bounded before it becomes a fraction: 1e-999999999 would have a denominator of a billion digits.
    if value and not -MAX_EXPONENT <= value.adjusted() <= MAX_EXPONENT:
        raise ValueError(f"number too {'large' if value.adjusted() > 0 else 'small'}")
    return Fraction(value) if value else Fraction(0)


def _format(value: Fraction) -> str:
    """In full if the decimal fraction terminates, else rounded; below 0.0001 in Python's exponent notation."""
    if value.denominator == 1:
        return str(value.numerator)
    whole = len(str(abs(int(value)))) if abs(value) >= 1 else 0
    for digits in (MAX_DIGITS, max(10, whole + 2)):
        context = Context(prec=digits)
        result = context.divide(Decimal(value.numerator), Decimal(value.denominator)).normalize(context)
        if not context.flags[Inexact]:
            break
    if result.adjusted() >= -4:
        return f"{result:f}"
    mantissa, exponent = f"{result:e}".split("e")
    return f"{mantissa}e-{-int(exponent):02d}"


def _count(node: ast.Call) -> int:
    match node:
        case ast.Call(ast.Attribute(ast.Constant(str(text)), "count"), [ast.Constant(str(part))], []):
            return text.count(part)
    raise ValueError("the only call allowed is 'text'.count('part')")


@dataclass(frozen=True)
class SandboxResult:
    """Outcome of a sandboxed program: `passed` is True only if it ran to its last line without an exception."""

    passed: bool
    output: str  # the first MAX_OUTPUT bytes of stdout and stderr together
    timed_out: bool


# Runs in the child before the program. Kernels differ in the namespaces they allow, so it requests fewer and fewer.
# In a process-id namespace all processes end with the first one, even in other sessions. The first one only waits
# (signals that it sends to itself, even SIGKILL, are ignored) and counts its descendants: kernels do not limit root's.
_GUARD = r"""
import ctypes, os, resource, signal, sys, time, traceback
LIMIT = 64
marker, report, memory, seconds = sys.argv[1], *map(int, sys.argv[2:])
code = sys.stdin.read()
try:
    libc = ctypes.CDLL(None)
    NEWUSER, NEWNET, NEWPID, NEWIPC = 0x10000000, 0x40000000, 0x20000000, 0x08000000
    for flags in (NEWUSER | NEWNET | NEWPID | NEWIPC, NEWNET | NEWPID | NEWIPC, NEWUSER | NEWNET, NEWNET):
        if libc.unshare(flags) == 0:
            break
except (OSError, AttributeError):
    libc = None
def crowd(process):
    children = []
    try:
        for thread in os.listdir(f"/proc/{process}/task"):
            children += open(f"/proc/{process}/task/{thread}/children").read().split()
    except OSError:
        pass
    return len(children) + sum(map(crowd, children))
for _ in range(2):
    child = os.fork()
    if child:
        os.close(report)
        done = 0
        while not done:
            time.sleep(0.005)
            done, status = os.waitpid(child, os.WNOHANG)
            if crowd(os.readlink("/proc/self") if os.path.exists("/proc/self") else 0) > LIMIT:
                os._exit(1)
        os._exit(os.waitstatus_to_exitcode(status) & 255)
    if hasattr(libc, "prctl"):
        libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: dies with the process that waits for it
limits = {"AS": memory, "CPU": seconds, "FSIZE": 1 << 20, "NPROC": LIMIT, "NOFILE": 64, "CORE": 0}
for name, limit in limits.items():
    try:
        kind = getattr(resource, "RLIMIT_" + name)
        hard = resource.getrlimit(kind)[1]
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(kind, (limit, limit))
    except (OSError, ValueError, AttributeError):
        pass
sys.argv, sys.stdin = [""], open(os.devnull)
def run(code):
    exec(compile(code, "<program>", "exec"), {"__name__": "__main__"})
try:
    run(code)
    sys.stdout.flush()
    os.write(report, marker.encode())
except BaseException:
    traceback.print_exc()
    sys.stdout.flush()
    os._exit(1)
"""


def run_sandboxed(code: str, timeout: float = 5.0, memory_bytes: int = 512 * 1024 * 1024) -> SandboxResult:
    """Runs a Python program in a fresh process and returns whether it ran to its end.

    The process gets an empty environment, an empty temporary folder (deleted afterwards), the standard library, no
    standard input, no network and no power over other processes where the kernel allows that, and limits: `timeout`
    seconds of wall and processor time, `memory_bytes` of address space per process, files of 1 MiB, 64 processes.
    A program that exits before its last line has not passed: else `sys.exit(0)` above the tests would pass them all.
    """
    marker = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, tempfile.TemporaryFile() as output:
        read_end, write_end = os.pipe()
        limits = (str(write_end), str(memory_bytes), str(int(timeout) + 1))
        command = [sys.executable, "-I", "-S", "-c", _GUARD, marker, *limits]
        streams = {"stdin": subprocess.PIPE, "stdout": output, "stderr": output, "pass_fds": (write_end,)}
        process = subprocess.Popen(command, cwd=folder, env={}, start_new_session=True, **streams)
        os.close(write_end)
        timed_out = False
        try:
            process.communicate(code.encode("utf-8", "replace"), timeout=timeout)
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # also what the program left running in its group
            process.wait()
        os.set_blocking(read_end, False)  # a descendant that escaped may still hold the other end
        try:
            passed = os.read(read_end, 64) == marker.encode()
        except BlockingIOError:
            passed = False
        os.close(read_end)
        output.seek(0)
        text = output.read(MAX_OUTPUT).decode("utf-8", "replace")
    passed = passed and not timed_out and process.returncode == 0
    return SandboxResult(passed=passed, output=text, timed_out=timed_out)
