"""What runs inside a sandbox (nanochat_hf/sandbox starts it): a solution that serves requests, or the tests.

    python -c THIS_FILE solution|tests CHANNEL < CODE

CHANNEL is a socket. The tests send operations (OPERATIONS: a call, an attribute, an item ...), the solution sends the
result or the exception. Only plain data travels, as JSON; any other object stays where it is, and the tests hold its
number (`Remote`). So no object of the solution compares itself with what the tests expect: one that equals everything
is not equal. Tests that would need that (`Money(5) == 5`, `3 * vector`, a callback) end with "cannot be checked".
"""

import ast
import builtins
import collections
import contextlib
import dataclasses
import decimal
import fractions
import json
import operator
import os
import sys
import traceback
import types

ENDED, UNCHECKED = 77, 78  # exit codes: of tests that ran to their last line, or that cannot be checked
MAX_MESSAGE = 1 << 22  # bytes
EXACT = {"Decimal": decimal.Decimal, "Fraction": fractions.Fraction}
CONTAINERS = {
    "list": list, "tuple": tuple, "frozenset": frozenset, "set": collections.abc.Set, "deque": collections.deque
}  # fmt: skip
MUTABLE = (list, dict, set, collections.deque)
ERRORS = {name: kind for name, kind in vars(builtins).items() if isinstance(kind, type) and issubclass(kind, Exception)}
BINARY = ("lt", "le", "gt", "ge", "add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and_", "or_", "xor")


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
    for base in (int, float, str):
        if isinstance(value, base):
            return base(value)
    if isinstance(value, bytes | complex):
        return {"literal": repr(value)}
    if isinstance(value, range):
        return {"range": [value.start, value.stop, value.step]}
    if isinstance(value, tuple(EXACT.values())):
        return {type(value).__name__: str(value)}
    if hasattr(value, "item") and not getattr(value, "shape", ()):  # numbers of numpy
        return pack(value.item(), other)
    return other(value)


def unpack(value, other):
    """The opposite: `other(kind, items)` gives what is no plain data."""
    if not isinstance(value, dict):
        return value
    ((kind, items),) = value.items()
    if kind == "dict":
        return {unpack(key, other): unpack(item, other) for key, item in items}
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


def call(function, *arguments, **options):
    return function(*arguments, **options)


def describe(value) -> list:
    """How objects of this type are equal ("identity", "fields" or "own": by a method of theirs), type and contents."""
    kind, contents = type(value), getattr(value, "__dict__", None)
    if kind.__eq__ is object.__eq__ or isinstance(value, type | types.FunctionType):
        return ["identity", kind, None]
    if dataclasses.is_dataclass(kind) and kind.__eq__.__qualname__.startswith("__create_fn__"):
        names = [field.name for field in dataclasses.fields(kind) if field.compare]
        return ["fields", kind, {name: getattr(value, name) for name in names}]
    return ["own", kind, contents]


OPERATIONS = {function.__name__: function for function in (
    call, describe, getattr, setattr, delattr, hasattr, len, str, repr, bool, next, isinstance, issubclass,
    operator.getitem, operator.setitem, operator.delitem, *(getattr(operator, name) for name in BINARY),
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
            return {"exception": [value.__name__, builtin_base(value)]}
        if id(value) not in numbers:
            numbers[id(value)] = len(objects)
            objects.append(value)
        return {"object": numbers[id(value)]}

    def fetch(kind: str, items):
        return objects[items] if kind == "object" else iter([unpack(item, fetch) for item in items])

    channel.send("ready")
    while request := channel.receive():
        name, arguments, options = request
        try:
            values, named = unpack(arguments, fetch), unpack(options, fetch)
            result = OPERATIONS[name](*values, **named)
            reply = {"value": keep(result) if name == "iterator" else pack(result, keep)}
            if name == "call" and (changed := pack(values, keep)) != arguments:
                reply["arguments"] = changed
        except BaseException as error:
            state = {key: item for key, item in vars(error).items() if key != "__notes__"}
            reply = {"error": [type(error).__name__, builtin_base(type(error)), pack([error.args, state], keep)]}
        sys.stdout.flush()
        channel.send(reply)


def builtin_base(kind: type) -> str:
    return next(filter(ERRORS.get, (base.__name__ for base in kind.__mro__)), "RuntimeError")


# ---- the side of the tests -----------------------------------------------------------------------------------------


class CannotBeCheckedError(BaseException):
    """The test needs an object of the solution as if it were data, or the other way round."""


def refuse(what: str):
    Remote.unchecked = what  # also if the test catches the exception
    raise CannotBeCheckedError(what)


def stand_in(name: str, base: str) -> type:
    """A class for an exception of the solution, one per name."""
    if name != base and name not in Remote.exceptions:
        Remote.exceptions[name] = type(name, (ERRORS[base],), {})
    return Remote.exceptions.get(name) or ERRORS[base]


class Remote:
    """An object of the solution, for the tests."""

    channel, unchecked, exceptions = None, "", {}

    def __init__(self, number: int):
        object.__setattr__(self, "_number", number)

    @staticmethod
    def ask(operation: str, *arguments, **options):
        """The result of an operation on the other side; lists and others that a call changed are changed here, too."""

        def fetch(kind, items):
            return Remote(items) if kind == "object" else stand_in(*items)

        def send(value):
            if isinstance(value, Remote):
                return {"object": value._number}
            if isinstance(value, collections.abc.Iterable):
                return {"iterator": [pack(item, send) for item in value]}
            return refuse(f"a {type(value).__name__} of the tests as an argument")

        Remote.channel.send([operation, pack(arguments, send), pack(options, send)])
        reply = Remote.channel.receive()
        if not reply:  # no exception, which the tests might expect
            print("the solution has ended", flush=True)
            os._exit(1)
        if "error" in reply:
            name, base, details = reply["error"]
            arguments, state = unpack(details, fetch)
            kind = stand_in(name, base)
            error = kind.__new__(kind)
            error.args = arguments
            vars(error).update(state)
            raise error
        for before, after in zip(arguments, unpack(reply.get("arguments", {"tuple": []}), fetch)):
            if isinstance(before, MUTABLE) and before != after:
                before.clear()
                (before.extend if isinstance(before, list | collections.deque) else before.update)(after)
        return unpack(reply["value"], fetch)

    def __call__(self, *arguments, **options):
        return Remote.ask("call", self, *arguments, **options)

    def __eq__(self, other):
        if isinstance(other, Remote) and other._number == self._number:
            return True
        how, *mine = Remote.ask("describe", self)
        if isinstance(other, Remote) and how != "identity" and mine[1] and Remote.ask("describe", other)[1:] == mine:
            return True
        if other is Remote or (how == "own" and other is not None):
            refuse("an object of the solution that is compared")
        return False

    def __hash__(self):
        return self._number

    def __iter__(self):
        return Remote.ask("iterator", self)

    def __contains__(self, value):
        if Remote.ask("hasattr", self, "__contains__"):
            refuse("`in` with an object of the solution")
        return any(item == value for item in self)

    def __instancecheck__(self, value):
        return isinstance(value, Remote) and Remote.ask("isinstance", value, self)

    def refuse(self, *_):
        refuse("an operation on an object of the solution")


def forward(operation: str):
    return lambda self, *arguments: Remote.ask(operation, self, *arguments)


def combine(operation: str):
    return lambda self, other: Remote.ask(operation, self, other) if isinstance(other, Remote) else self.refuse()


for name in ("getattr", "setattr", "delattr", "len", "str", "repr", "bool", "next", "getitem", "setitem", "delitem"):
    setattr(Remote, f"__{name}__", forward(name))
for name in BINARY:
    setattr(Remote, f"__{name.strip('_')}__", combine(name))
    setattr(Remote, f"__r{name.strip('_')}__", Remote.refuse)
for name in ("abs", "neg", "pos", "invert", "round", "int", "float", "index", "enter", "exit", "format"):
    setattr(Remote, f"__{name}__", Remote.refuse)


class Names(dict):
    """The namespace of the tests: names that they do not define are the solution's; Python's stay Python's."""

    def __missing__(self, name):
        if hasattr(builtins, name) or not Remote.ask("hasattr", Remote(0), name):
            raise KeyError(name)
        value = Remote.ask("getattr", Remote(0), name)
        if isinstance(value, Remote | type):
            self[name] = value
        return value


def check(code: str, channel: Channel) -> int:
    """Run tests of the solution behind the channel. Returns: ENDED or UNCHECKED."""
    Remote.channel = channel
    if channel.receive() != "ready":
        return 1
    with contextlib.suppress(CannotBeCheckedError):
        exec(compile(code, "<tests>", "exec"), Names(__name__="tests"))
    if Remote.unchecked:
        print(f"cannot be checked: {Remote.unchecked}")
        return UNCHECKED
    return ENDED


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
