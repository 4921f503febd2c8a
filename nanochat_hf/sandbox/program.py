"""What runs inside a sandbox (nanochat_hf/sandbox starts it): a solution that serves requests, or the tests.

    python -c THIS_FILE solution|tests CHANNEL SOURCE_OF_SUPPORT < CODE

CHANNEL is a socket. The tests send operations (OPERATIONS: a call, an attribute, an item ...), the solution sends the
result or the exception. Data (ITEMS, REDUCED) travels as JSON; any other object stays where it is, and the other side
holds a proxy. The solution may call functions and read iterators that the tests gave it. No object of the solution is
asked about what the tests expect: one that equals everything equals no data. Tests that would need that
(`Money(5) == 5`, `3 * vector`) end with "cannot be checked". Two objects of the solution are equal if it reports equal
types and contents.
"""

import builtins
import collections.abc
import contextlib
import copy
import copyreg
import functools
import importlib.util
import io
import json
import operator
import os
import random
import sys
import types

support = types.ModuleType("support")  # support.py, whose source is an argument: a sandbox may not read the file
ENDED, UNCHECKED = 77, 78  # exit codes: of tests that ran to their last line, or that cannot be checked
MAX_MESSAGE = 1 << 25  # bytes
TYPES = {name: kind for name, kind in vars(builtins).items() if isinstance(kind, type)}
DATA = (int, float, str, bytes, tuple)  # a solution's subclasses of these are data with an object behind it
MUTABLE = (list, dict, set, collections.deque, bytearray)
BINARY = "lt le gt ge add sub mul truediv floordiv mod pow matmul and_ or_ xor".split()  # noqa: SIM905
ITEMS = {  # types that travel by value -> how to make one of its items
    "builtins.list": list,
    "builtins.tuple": tuple,
    "builtins.dict": dict,
    "builtins.bytes": bytes,
    "builtins.dict_keys": lambda items: dict.fromkeys(items).keys(),
    "builtins.dict_values": lambda items: dict(enumerate(items)).values(),
    "builtins.dict_items": lambda items: dict(items).items(),
}
REDUCED = {  # those that travel as what pickle would make them of
    *(f"builtins.{name}" for name in ("set", "frozenset", "bytearray", "complex", "range", "slice")),
    *(f"collections.{name}" for name in ("OrderedDict", "Counter", "defaultdict", "deque")),
    *(f"datetime.{name}" for name in ("date", "datetime", "time", "timedelta", "timezone")),
    *("decimal.Decimal", "fractions.Fraction", "pathlib.PosixPath"),
}


class Endpoint:
    """One end of the channel: asks the other one, and answers it meanwhile."""

    operations: dict  # that the other side may ask for
    builtins: dict  # names that the other side may send

    def __init__(self, number: int):
        self.reader, self.writer = os.fdopen(number, "rb"), os.fdopen(os.dup(number), "wb")
        self.objects, self.numbers = [], {}  # of this side, for the other one; their numbers by id
        self.proxies, self.theirs = {}, {}  # of the other side's objects, by number; those numbers by the proxy's id

    def send(self, message) -> None:
        self.writer.write(json.dumps(message).encode() + b"\n")
        self.writer.flush()

    def receive(self):
        """The next message, or None at the end."""
        with contextlib.suppress(ConnectionError):
            return json.loads(self.reader.readline(MAX_MESSAGE) or b"null")

    def pack(self, value):
        """A value as JSON can hold it."""
        kind = type(value)
        if value is None or kind in (bool, int, float, str):
            return value
        if id(value) in self.theirs:
            return {"yours": self.theirs[id(value)]}
        if (name := f"{kind.__module__}.{kind.__qualname__}") in ITEMS:
            items = value.items() if kind is dict else value
            return {name: [item if type(item) in (int, str) else self.pack(item) for item in items]}
        if name in REDUCED:
            make, arguments, _, items, pairs = (*value.__reduce_ex__(2), None, None, None)[:5]
            arguments = arguments[make is copyreg.__newobj__ :]  # its first one is the type
            return {name: [self.pack(part) for part in (arguments, list(items or ()), list(pairs or ()))]}
        is_scalar = kind.__module__ == "numpy" and getattr(value, "shape", None) == ()
        if (name == "numpy.ndarray" or is_scalar) and value.dtype.names is None:  # others stay here
            return {"numpy.ndarray": [value.dtype.str, self.pack(value.shape), self.pack(value.ravel().tolist())]}
        if isinstance(value, type) and TYPES.get(value.__name__) is value:
            return {"builtin": value.__name__}
        if isinstance(value, type) and (name := f"{value.__module__}.{value.__qualname__}") in REDUCED:
            return {"builtin": name}
        if isinstance(value, type) and issubclass(value, BaseException):
            return {"exception": [self.number(value), value.__name__, self.pack(value.__bases__), value.__module__]}
        if isinstance(value, BaseException):
            value.__traceback__ = None  # it would keep all that its frames hold
            arguments = value.__reduce__()[1] if kind.__module__ == "builtins" else value.args
            parts = [kind, arguments, vars(value), value.__cause__]
            return {"error": [self.number(value), *map(self.pack, parts)]}
        return self.refer(value)  # it stays here

    def unpack(self, value):
        """The opposite of `pack`."""
        if not isinstance(value, dict):
            return value
        ((name, parts),) = value.items()
        if name == "yours":
            return self.objects[parts]
        if name == "builtin":
            module, _, kind = parts.rpartition(".")
            return getattr(importlib.import_module(module), kind) if parts in REDUCED else self.builtins[parts]
        parts = [self.unpack(part) if type(part) is dict else part for part in parts]
        if name in ITEMS:
            return ITEMS[name](parts)
        if name == "numpy.ndarray":
            return importlib.import_module("numpy").array(parts[2], parts[0]).reshape(parts[1])[()]
        if name in REDUCED:
            module, _, kind = name.rpartition(".")
            value = getattr(importlib.import_module(module), kind)(*parts[0])
            for item in parts[1]:
                value.append(item)
            for key, item in parts[2]:
                value[key] = item
            return value
        number, *parts = parts
        if number not in self.proxies:
            proxy = self.proxy(name, number, *parts)
            self.proxies[number], self.theirs[id(proxy)] = proxy, number
        return self.proxies[number]

    def number(self, value) -> int:
        if id(value) not in self.numbers:
            self.numbers[id(value)] = len(self.objects)
            self.objects.append(value)
        return self.numbers[id(value)]

    def proxy(self, name: str, number: int, *parts):
        """What stands for an object of the other side: here, for an exception or its class."""
        if name == "exception":
            if parts[2].partition(".")[0] in sys.stdlib_module_names:
                importlib.import_module(parts[2])
            real = getattr(sys.modules.get(parts[2]), parts[0], None)
            if isinstance(real, type) and issubclass(real, BaseException) and parts[0] != "SkipTest":
                return real  # of a library: the same here; but one that skips tests would let them pass
            bases = tuple(base for base in parts[1] if isinstance(base, type) and issubclass(base, BaseException))
            return TheirException(parts[0], bases, {"__str__": forward("str"), "__getattr__": attribute})
        kind, arguments, state, cause = parts
        error = kind.__new__(kind, *arguments)
        if kind.__module__ == "builtins":  # others, made of `args`, may take other arguments
            error.__init__(*arguments)
        vars(error).update(state)
        error.__cause__ = cause
        return error

    def ask(self, operation: str, *arguments, **options):
        """The result of an operation on the other side; lists and the like that it changes change here, too."""
        self.send([operation, self.pack(arguments), self.pack(options)])
        while isinstance(reply := self.receive(), list):
            self.answer(*reply)
        if not reply:  # no exception, which the tests might expect
            print("the solution has ended", flush=True)
            os._exit(1)
        values = (*arguments, *options.values())
        support.renewed(values, self.unpack(reply.get("changed")))
        if "error" in reply:
            raise self.unpack(reply["error"])
        return values[reply["argument"]] if "argument" in reply else self.unpack(reply["value"])

    def answer(self, operation: str, arguments, options) -> None:
        values, before = (), None
        try:
            arguments, options = self.unpack(arguments), self.unpack(options)
            values = (*arguments, *options.values())
            before = self.pack(values)
            result = self.operations[operation](*arguments, **options)
            same = [n for n, value in enumerate(values) if value is result and isinstance(value, MUTABLE)]
            reply = {"argument": same[0]} if same else {"value": self.pack(result)}
        except BaseException as error:
            reply = {"error": self.pack(error)}
        if (after := self.pack(values)) != before:
            reply["changed"] = after
        flush()
        self.send(reply)


def flush() -> None:
    with contextlib.suppress(Exception):  # a program may have closed or replaced it
        sys.stdout.flush()


# ---- the side of the solution --------------------------------------------------------------------------------------


def describe(value) -> list:
    """How objects of this type are equal, their type and contents.

    "data" (as the list or other container that it is), "identity", "fields", or "own" by a method of theirs.
    """
    kind = type(value)
    for base in (list, collections.OrderedDict, dict, set, collections.deque):
        if isinstance(value, base) and kind.__eq__ is base.__eq__:
            return ["data", kind, base(base.items(value) if issubclass(base, dict) else base.__iter__(value))]
    if kind.__eq__ is object.__eq__ or isinstance(value, type | types.FunctionType):
        return ["identity", kind, None]
    if hasattr(kind, "__dataclass_fields__") and kind.__eq__.__code__.co_filename == "<string>":  # not the program's
        names = [field.name for field in sys.modules["dataclasses"].fields(kind) if field.compare]
        return ["fields", kind, {name: getattr(value, name) for name in names}]
    return ["own", kind, getattr(value, "__dict__", None) if kind.__module__ == "solution" else None]


def module_name(value) -> str | None:
    return value.__name__ if isinstance(value, types.ModuleType) else None


def printing(operation: str, *arguments, **options) -> tuple:
    """The result of an operation and what it prints."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        return OPERATIONS[operation](*arguments, **options), output.getvalue()


def run(coroutine):
    return importlib.import_module("asyncio").run(coroutine)


OPERATIONS = {function.__name__: function for function in (
    operator.call, describe, module_name, printing, run, random.seed, copy.copy, copy.deepcopy, getattr, setattr,
    delattr, hasattr, len, str, repr, bool, hash, iter, next, type, isinstance, issubclass, operator.getitem,
    operator.setitem, operator.delitem, *(getattr(operator, name) for name in BINARY),
)}  # fmt: skip


class Solution(Endpoint):
    operations, builtins = OPERATIONS, vars(builtins)

    def refer(self, value) -> dict:
        for base in DATA:
            if isinstance(value, base):
                return {"data": [self.number(value), self.pack(base.__getnewargs__(value)[0])]}
        return {"coroutine" if isinstance(value, types.CoroutineType) else "object": [self.number(value)]}

    def proxy(self, name: str, number: int, *parts):
        if name == "named":
            return collections.namedtuple(*parts[:2])(*parts[2])
        if name == "iterator":
            return self.items(number)
        if name != "function":
            return super().proxy(name, number, *parts)

        def function(*arguments, **options):
            return self.ask("call", function, *arguments, **options)

        function.__name__ = parts[0]
        return function

    def items(self, number: int):
        with contextlib.suppress(StopIteration):
            while True:
                yield self.ask("next", self.proxies[number])

    def serve(self, code: str) -> None:
        """Run a solution, then answer requests until the other side closes."""
        process, module = os.getpid(), types.ModuleType("solution")
        sys.modules["solution"] = module  # so that its classes can be pickled
        self.number(module)
        exec(compile(code, "<program>", "exec"), module.__dict__)
        flush()
        if os.getpid() != process:  # a fork of the program, which has ended
            return
        self.send("ready")
        while request := self.receive():
            self.answer(*request)


# ---- the side of the tests -----------------------------------------------------------------------------------------


class CannotBeCheckedError(BaseException):
    """The test would need to trust an object of the solution, or the solution one of the tests."""


class Tests(Endpoint):
    builtins = TYPES
    unchecked = ""  # why the tests cannot be checked

    def __init__(self, number: int):
        super().__init__(number)
        self.python = sys.stdin, dict(vars(builtins))
        self.operations = {"call": self.call, "next": next}
        self.lent = {}  # lists and the like that the solution has, too: (id of object, name) -> value, as packed

    def refer(self, value) -> dict:
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return {"named": [self.number(value), type(value).__name__, self.pack(value._fields), self.pack([*value])]}
        for base in DATA:
            if isinstance(value, base):
                return self.pack(base.__getnewargs__(value)[0])
        name = getattr(value, "__name__", "")
        if getattr(builtins, name, None) is value:
            return {"builtin": name}
        if callable(value) and not isinstance(value, type):
            return {"function": [self.number(value), name]}
        if isinstance(value, collections.abc.Iterable) and not isinstance(value, io.IOBase):
            return {"iterator": [self.number(iter(value))]}
        refuse(f"{type(value).__name__} as an argument")

    def call(self, function, *arguments, **options):
        """Call what the solution was given, nothing else: `type` would make it a class that equals everything."""
        return self.objects[self.numbers[id(function)]](*arguments, **options)

    def proxy(self, name: str, number: int, *parts):
        if name == "data" and type(parts[0]) in DATA:
            return data_type(type(parts[0]))(*parts)
        if name == "coroutine":
            return self.result(number)
        return Remote() if name == "object" else super().proxy(name, number, *parts)

    async def result(self, number: int):
        return self.ask("run", self.proxies[number])

    def ask(self, operation: str, *arguments, **options):
        if any(self.pack(value) != before for value, before in self.lent.values()):
            refuse("a changed list or the like")
        if self.python != (sys.stdin, vars(builtins)):
            refuse("a replaced input or builtin")
        if sys.stdout is sys.__stdout__:
            result = super().ask(operation, *arguments, **options)
        else:
            result, output = super().ask("printing", operation, *arguments, **options)
            sys.stdout.write(output)
        if operation in ("getattr", "getitem") and isinstance(result, MUTABLE):
            self.lent[id(arguments[0]), str(self.pack(arguments[1]))] = result, self.pack(result)
        return result

    def check(self, code: str) -> int:
        """Run the tests of the solution behind the channel. Returns: ENDED or UNCHECKED."""
        if self.receive() != "ready":
            return 1
        random.seed = lambda *arguments, seed=random.seed: (seed(*arguments), self.ask("seed", *arguments))
        try:
            exec(compile(code, "<tests>", "exec"), Names(self, code))
        except BaseException:
            if not self.unchecked:
                raise
        if self.unchecked:
            print(f"cannot be checked: {self.unchecked}")
        return UNCHECKED if self.unchecked else ENDED


def refuse(what: str, *_):
    Tests.unchecked = f"{what}, with an object of one side"  # also if the test catches the exception
    raise CannotBeCheckedError


def forward(operation: str):
    return lambda self, *arguments, **options: ENDPOINT.ask(operation, self, *arguments, **options)


def combine(operation: str):
    return lambda self, other: (ENDPOINT.ask if isinstance(other, Remote) else refuse)(operation, self, other)


def refusal(operation: str):
    return lambda *_: refuse(operation)


def attribute(self, name: str):
    if name.startswith("__array"):
        raise AttributeError(name)  # numpy would read the memory at an address
    return ENDPOINT.ask("getattr", self, name)


class TheirException(type):
    """The type of exception classes that stand for one of the other side."""

    __call__, __getattr__ = forward("call"), attribute


class KindOfRemote(type):
    def __getattr__(cls, name: str):
        if name == "__dataclass_fields__":  # dataclasses looks for it in the type
            refuse("dataclasses")
        raise AttributeError(name)


class Remote(metaclass=KindOfRemote):  # noqa: PLW1641  (its __hash__ is below)
    # An object of the solution, for the tests. It has no attributes of its own, not even a docstring.
    __slots__ = ("__weakref__",)
    __doc__ = property(lambda self: ENDPOINT.ask("getattr", self, "__doc__"))

    def __eq__(self, other):
        if other is self:
            return True
        how, *mine = ENDPOINT.ask("describe", self)
        theirs = ENDPOINT.ask("describe", other)[1:] if isinstance(other, Remote) else None
        if how == "data":
            return mine[1] == (theirs[1] if theirs else other)
        if theirs and how != "identity" and mine[1] is not None and theirs == mine:
            return True
        if other is Remote or (how == "own" and other is not None):
            refuse("==")
        return False

    def __contains__(self, value):
        how, _, contents = ENDPOINT.ask("describe", self)
        if how == "data":
            return value in contents
        if ENDPOINT.ask("hasattr", self, "__contains__"):
            refuse("in")
        return any(item == value for item in self)

    def __instancecheck__(self, value):
        return id(value) in ENDPOINT.theirs and ENDPOINT.ask("isinstance", value, self)

    def __subclasscheck__(self, kind):
        return ENDPOINT.ask("issubclass", kind, self)

    def __format__(self, form):
        return format(str(self), form)

    def __deepcopy__(self, memo):
        return ENDPOINT.ask("deepcopy", self)

    __getattr__, __call__, __copy__, __hash__ = attribute, *map(forward, ("call", "copy", "hash"))


for name in "setattr delattr len str repr bool iter next getitem setitem delitem".split():  # noqa: SIM905
    setattr(Remote, f"__{name}__", forward(name))
for name in BINARY:
    setattr(Remote, f"__{name.strip('_')}__", combine(name))
    setattr(Remote, f"__r{name.strip('_')}__", refusal(name))
for name in "abs neg pos invert round int float index enter exit mro_entries".split():  # noqa: SIM905
    setattr(Remote, f"__{name}__", refusal(name))


@functools.cache
def data_type(base: type) -> type:
    """Of data that is of a class of the solution, whose other attributes and methods are asked for there."""
    names = {"__getattr__": attribute, "__str__": forward("str"), "__repr__": forward("repr")}
    return type(base.__name__, (base,), names)


class KindOf(type):
    """Makes `type` of the tests, which gives the solution's classes for its objects."""

    def __call__(cls, *arguments):
        ours = isinstance(arguments[0], type | BaseException) or id(arguments[0]) not in ENDPOINT.theirs
        return type(*arguments) if ours else ENDPOINT.ask("type", *arguments)

    def __instancecheck__(cls, value):
        return isinstance(value, type)


class Names(dict):
    """The namespace of the tests: names that they do not define are the solution's; Python's stay Python's.

    So do those of libraries. Another `math` or `np` would be asked about what the tests expect: they may only call it.
    """

    def __init__(self, endpoint: Tests, tests: str):
        super().__init__(__name__="tests", __annotations__={}, type=KindOf("type", (), {}))
        self.module = endpoint.unpack({"object": [0]})
        self.used, self.free = support.names(tests)

    def __missing__(self, name):
        if hasattr(builtins, name) or not ENDPOINT.ask("hasattr", self.module, name):
            raise KeyError(name)
        value = ENDPOINT.ask("getattr", self.module, name)
        if isinstance(value, Remote) and name in self.used:
            value = support.library_module(name, ENDPOINT.ask("module_name", value)) or value
            if isinstance(value, Remote) and (name in ("np", "pd") or importlib.util.find_spec(name)):
                refuse(name)
        is_module = isinstance(value, types.ModuleType)
        if len(self.free) > 1 and not is_module:  # the only one is what the tests are about
            value = support.confirmed(name, value, refuse)
        if callable(value) or is_module:
            self[name] = value
        return value


def main(role: str, number: str, source: str) -> None:
    global ENDPOINT
    exec(source, vars(support))
    if role == "layers":
        return print("ready", flush=True)
    code, result = sys.stdin.read(), 1
    sys.set_int_max_str_digits(0)  # of what travels
    sys.argv, sys.stdin = [""], open(os.devnull)  # noqa: SIM115
    try:
        ENDPOINT = (Solution if role == "solution" else Tests)(int(number))
        result = (ENDPOINT.serve if role == "solution" else ENDPOINT.check)(code) or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    flush()
    os._exit(result)


main(*sys.argv[1:])
