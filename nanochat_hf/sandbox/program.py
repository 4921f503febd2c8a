"""What runs inside a sandbox (nanochat_hf/sandbox starts it): a solution that serves requests, or the tests.

    python -c THIS_FILE solution|tests CHANNEL < CODE

CHANNEL is a socket. The tests send operations (OPERATIONS: a call, an attribute, an item ...), the solution sends the
result or the exception. Only plain data travels, as JSON; any other object stays where it is, and the tests hold its
number (`Remote`). No object of the solution is asked about what the tests expect: one that equals everything equals no
data. Tests that would need that (`Money(5) == 5`, `3 * vector`, a callback) end with "cannot be checked". Two objects
of the solution are equal if it reports equal types and contents.
"""

import ast
import builtins
import collections
import contextlib
import dataclasses
import decimal
import fractions
import importlib
import json
import operator
import os
import sys
import traceback
import types

ENDED, UNCHECKED = 77, 78  # exit codes: of tests that ran to their last line, or that cannot be checked
MAX_MESSAGE = 1 << 25  # bytes
EXACT = {"Decimal": decimal.Decimal, "Fraction": fractions.Fraction}
VIEWS = {"keys": type({}.keys()), "items": type({}.items())}  # of a dict: sets in its order
CONTAINERS = VIEWS | {"list": list, "tuple": tuple, "frozenset": frozenset, "set": collections.abc.Set}
CONTAINERS |= {"deque": collections.deque, "bytearray": bytearray}
MUTABLE = (list, dict, set, collections.deque, bytearray)
TYPES = {name: kind for name, kind in vars(builtins).items() if isinstance(kind, type)}
ERRORS = {name: kind for name, kind in TYPES.items() if issubclass(kind, Exception)}
MODULES = {name: name for name in "math cmath collections decimal fractions functools itertools re numpy".split()}  # noqa: SIM905
MODULES["np"] = "numpy"
BINARY = "lt le gt ge add sub mul truediv floordiv mod pow matmul and_ or_ xor".split()  # noqa: SIM905


def pack(value, other):
    """A value as JSON can hold it. Subclasses become their base, so that they compare as plain data do.

    `other(value)` packs what is no plain data.
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, dict):
        return {"dict": [[pack(key, other), pack(item, other)] for key, item in value.items()]}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return {"named": [type(value).__name__, list(value._fields), [pack(item, other) for item in value]]}
    for kind, base in CONTAINERS.items():
        if isinstance(value, base):
            return {kind: [pack(item, other) for item in value]}
    for base, plain in ((int, int.__int__), (float, float.__float__), (str, str.__str__)):
        if isinstance(value, base):
            return plain(value)
    if isinstance(value, bytes | complex):
        return {"literal": repr(value)}
    if isinstance(value, range):
        return {"range": [value.start, value.stop, value.step]}
    if isinstance(value, tuple(EXACT.values())):
        return {type(value).__name__: str(value)}
    if type(value).__module__ == "numpy" and not value.shape:
        return pack(value.item(), other)
    return other(value)


def unpack(value, other):
    """The opposite: `other(kind, items)` gives what is no plain data."""
    if not isinstance(value, dict):
        return value
    ((kind, items),) = value.items()
    if kind == "dict":
        return {unpack(key, other): unpack(item, other) for key, item in items}
    if kind in VIEWS:
        parts = [unpack(item, other) for item in items]
        return dict(parts).items() if kind == "items" else dict.fromkeys(parts).keys()
    if kind in CONTAINERS:
        return (CONTAINERS | {"set": set})[kind](unpack(item, other) for item in items)
    if kind == "named":
        return collections.namedtuple(*items[:2])(*(unpack(item, other) for item in items[2]))
    if kind == "range":
        return range(*items)
    if kind == "literal":
        return ast.literal_eval(items)
    return EXACT[kind](items) if kind in EXACT else other(kind, items)


class Channel:
    def __init__(self, number: int):
        self.reader, self.writer = os.fdopen(number, "rb"), os.fdopen(os.dup(number), "wb")

    def send(self, message) -> None:
        self.writer.write(json.dumps(message).encode() + b"\n")
        self.writer.flush()

    def receive(self):
        """The next message, or None at the end."""
        with contextlib.suppress(ConnectionError):
            return json.loads(self.reader.readline(MAX_MESSAGE) or b"null")


# ---- the side of the solution --------------------------------------------------------------------------------------


def describe(value) -> list:
    """How objects of this type are equal ("identity", "fields" or "own": by a method of theirs), type and contents."""
    kind = type(value)
    if kind.__eq__ is object.__eq__ or isinstance(value, type | types.FunctionType):
        return ["identity", kind, None]
    if dataclasses.is_dataclass(kind) and kind.__eq__.__code__.co_filename == "<string>":  # its own, not the program's
        names = [field.name for field in dataclasses.fields(kind) if field.compare]
        return ["fields", kind, {name: getattr(value, name) for name in names}]
    return ["own", kind, getattr(value, "__dict__", None) if kind.__module__ == "solution" else None]


OPERATIONS = {function.__name__: function for function in (
    operator.call, describe, getattr, setattr, delattr, hasattr, len, str, repr, bool, next, type, isinstance,
    issubclass,    operator.getitem, operator.setitem, operator.delitem, *(getattr(operator, name) for name in BINARY),
)} | {"iterator": iter}  # fmt: skip


def serve(code: str, channel: Channel) -> None:
    """Run a solution, then answer requests until the other side closes."""
    process, module = os.getpid(), types.ModuleType("solution")
    sys.modules["solution"] = module  # so that its classes can be pickled
    exec(compile(code, "<program>", "exec"), module.__dict__)
    sys.stdout.flush()
    if os.getpid() != process:  # a fork of the program, which has ended
        return
    objects, numbers = [module], {id(module): 0}

    def keep(value) -> dict:
        if isinstance(value, type) and issubclass(value, Exception):
            return {"exception": lineage(value)}
        if id(value) not in numbers:
            numbers[id(value)] = len(objects)
            objects.append(value)
        return {"object": numbers[id(value)]}

    def fetch(kind: str, items):
        if kind == "object":
            return objects[items]
        return getattr(builtins, items) if kind == "builtin" else iter([unpack(item, fetch) for item in items])

    channel.send("ready")
    while request := channel.receive():
        name, arguments, options = request
        try:
            values, named = unpack(arguments, fetch), unpack(options, fetch)
            before = pack([*values, *named.values()], keep)
            result = OPERATIONS[name](*values, **named)
            reply = {"value": keep(result) if name == "iterator" else pack(result, keep)}
            after = pack([*values, *named.values()], keep)
            reply |= {"arguments": after} if after != before else {}
        except BaseException as error:
            reply = {"error": lineage(type(error)), "state": pack([error.args, vars(error)], keep)}
        sys.stdout.flush()
        channel.send(reply)


def lineage(kind: type) -> list[str]:
    """The names of an exception's class and its bases up to the first one of Python."""
    names = [base.__name__ for base in kind.__mro__]
    end = next((i for i, name in enumerate(names) if name in ERRORS), None)
    return ["RuntimeError"] if end is None else names[: end + 1]


# ---- the side of the tests -----------------------------------------------------------------------------------------


class CannotBeCheckedError(BaseException):
    """The test would need to trust an object of the solution, or the solution one of the tests."""


class Session:
    channel: Channel
    unchecked = ""  # why the tests cannot be checked
    exceptions: dict[str, type] = {}  # classes of the tests for those of the solution
    objects: dict[int, "Remote"] = {}  # by number, so that `is` holds


def refuse(what: str, *_):
    Session.unchecked = f"{what}, with an object of one side"  # also if the test catches the exception
    raise CannotBeCheckedError


def exception_class(names: list[str]) -> type:
    kind = ERRORS[names[-1]]
    for name in reversed(names[:-1]):
        kind = Session.exceptions.setdefault(name, type(name, (kind,), {}))
    return kind


def receive_object(kind: str, items):
    return Session.objects.setdefault(items, Remote(items)) if kind == "object" else exception_class(items)


def send_object(value) -> dict:
    if isinstance(value, Remote):
        return {"object": value._number}
    if isinstance(value, collections.abc.Iterable):
        return {"iterator": [pack(item, send_object) for item in value]}
    name = getattr(value, "__name__", "")
    if getattr(builtins, name, None) is not value:
        refuse(f"{type(value).__name__} as an argument")
    return {"builtin": name}


def ask(operation: str, *arguments, **options):
    """The result of an operation on the other side; lists and others that it changed there are changed here, too."""
    Session.channel.send([operation, pack(arguments, send_object), pack(options, send_object)])
    reply = Session.channel.receive()
    if not reply:  # no exception, which the tests might expect
        print("the solution has ended", flush=True)
        os._exit(1)
    if "error" in reply:
        arguments, state = unpack(reply["state"], receive_object)
        error = exception_class(reply["error"])(*arguments)
        vars(error).update(state)
        raise error
    for before, after in zip([*arguments, *options.values()], unpack(reply.get("arguments"), receive_object) or ()):
        if isinstance(before, MUTABLE) and before != after:
            before.clear()
            (before.extend if isinstance(before, list | collections.deque | bytearray) else before.update)(after)
    return unpack(reply["value"], receive_object)


class Remote:
    """An object of the solution, for the tests."""

    def __init__(self, number: int):
        object.__setattr__(self, "_number", number)

    def __call__(self, *arguments, **options):
        return ask("call", self, *arguments, **options)

    def __eq__(self, other):
        if isinstance(other, Remote) and other._number == self._number:
            return True
        how, *mine = ask("describe", self)
        comparable = isinstance(other, Remote) and how != "identity" and mine[1] is not None
        if comparable and ask("describe", other)[1:] == mine:
            return True
        if other is Remote or (how == "own" and other is not None):
            refuse("==")
        return False

    def __hash__(self):
        return self._number

    def __iter__(self):
        return ask("iterator", self)

    def __contains__(self, value):
        if ask("hasattr", self, "__contains__"):
            refuse("in")
        return any(item == value for item in self)

    def __instancecheck__(self, value):
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            refuse("isinstance of a named tuple")
        return isinstance(value, Remote) and ask("isinstance", value, self)

    def __subclasscheck__(self, kind):
        return ask("issubclass", kind, self)

    def __format__(self, form):
        return format(str(self), form)


def forward(operation: str):
    return lambda self, *arguments: ask(operation, self, *arguments)


def combine(operation: str):
    return lambda self, other: (ask if isinstance(other, Remote) else refuse)(operation, self, other)


def refusal(operation: str):
    return lambda *_: refuse(operation)


for name in ("getattr", "setattr", "delattr", "len", "str", "repr", "bool", "next", "getitem", "setitem", "delitem"):
    setattr(Remote, f"__{name}__", forward(name))
for name in BINARY:
    setattr(Remote, f"__{name.strip('_')}__", combine(name))
    setattr(Remote, f"__r{name.strip('_')}__", refusal(name))
for name in ("abs", "neg", "pos", "invert", "round", "int", "float", "index", "enter", "exit"):
    setattr(Remote, f"__{name}__", refusal(name))


class KindOf(type):
    """Makes `type` of the tests, which gives the solution's classes for its objects."""

    def __call__(cls, *arguments):
        return ask("type", *arguments) if isinstance(arguments[0], Remote) else type(*arguments)

    def __instancecheck__(cls, value):
        return isinstance(value, type)


class Names(dict):
    """The namespace of the tests: names that they do not define are the solution's; Python's stay Python's.

    So do modules that solutions import: a solution's own `math` would be asked about what the tests expect.
    """

    def __missing__(self, name):
        if name in MODULES:
            with contextlib.suppress(ImportError):
                return importlib.import_module(MODULES[name])
        if hasattr(builtins, name) or not ask("hasattr", Remote(0), name):
            raise KeyError(name)
        value = ask("getattr", Remote(0), name)
        if isinstance(value, Remote | type):
            self[name] = value
        return value


def check(code: str, channel: Channel) -> int:
    """Run tests of the solution behind the channel. Returns: ENDED or UNCHECKED."""
    Session.channel = channel
    if channel.receive() != "ready":
        return 1
    try:
        exec(compile(code, "<tests>", "exec"), Names(__name__="tests", type=KindOf("type", (), {})))
    except BaseException:
        if not Session.unchecked:
            raise
    if Session.unchecked:
        print(f"cannot be checked: {Session.unchecked}")
    return UNCHECKED if Session.unchecked else ENDED


def main(role: str, number: str) -> None:
    if role == "layers":
        print("ready", flush=True)
        return
    code, result = sys.stdin.read(), 1
    sys.set_int_max_str_digits(0)  # of what travels
    sys.argv, sys.stdin = [""], open(os.devnull)  # noqa: SIM115
    try:
        result = {"solution": serve, "tests": check}[role](code, Channel(int(number))) or 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(result)


main(*sys.argv[1:])
