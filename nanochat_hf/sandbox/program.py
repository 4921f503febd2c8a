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
import functools
import importlib.util
import io
import json
import os
import random
import sys
import threading
import types
from collections import deque
from functools import partial

support = types.ModuleType("support")  # support.py, whose source is an argument: a sandbox may not read the file
exec(sys.argv[3], vars(support))
ITEMS, REDUCED, TYPES, DATA = support.ITEMS, support.REDUCED, support.TYPES, support.DATA
READING, BINARY, IN_PLACE = support.READING, support.BINARY, support.IN_PLACE
ENDED, UNCHECKED = 77, 78  # exit codes: of tests that ran to their last line, or that cannot be checked
MAX_MESSAGE = 1 << 25  # bytes


class Endpoint:
    """One end of the channel: asks the other one, and answers it meanwhile."""

    operations: dict  # that the other side may ask for
    builtins: dict  # names that the other side may send

    def __init__(self, number: int):
        self.reader, self.writer = os.fdopen(number, "rb"), os.fdopen(os.dup(number), "wb")
        self.objects, self.numbers = [], {}  # of this side, for the other one; their numbers by id
        self.lock = threading.RLock()  # of a request and its reply: threads take turns
        self.proxies, self.theirs = {}, {}  # of the other side's objects, by number; those numbers by the proxy's id

    def send(self, message) -> None:
        self.writer.write(json.dumps(message).encode() + b"\n")
        self.writer.flush()

    def receive(self):
        """The next message, or None at the end."""
        with contextlib.suppress(ConnectionError), support.deep():
            return json.loads(self.reader.readline(MAX_MESSAGE) or b"null")

    def pack(self, value):
        """A value as JSON can hold it."""
        kind = type(value)
        if value is None or kind in (bool, int, float, str):
            return value
        if value is ... or value is NotImplemented:
            return {"builtin": repr(value)}
        if id(value) in self.theirs:
            return {"yours": self.theirs[id(value)]}
        name, is_plain = f"{kind.__module__}.{kind.__qualname__}", kind is not memoryview or value.format == "B"
        if name in ITEMS and is_plain:
            items = getattr(value, ITEMS[name][0], value)
            items = items() if callable(items) else items
            return {name: [item if type(item) in (int, str) else self.pack(item) for item in items]}
        if name in REDUCED:
            return {name: [*map(self.pack, support.reduced(value))]}
        if kind.__module__ == "numpy" and (parts := support.array_parts(value)):
            return {"numpy.ndarray": [*map(self.pack, parts)]}
        if shared := support.shared_name(value):
            return {"builtin": shared}
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
            return ITEMS[name][1](parts)
        if name == "numpy.ndarray":
            return importlib.import_module("numpy").array(parts[2], parts[0]).reshape(parts[1])[()]
        if name in REDUCED:
            return support.made_again(name, *parts)
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
            if real := support.library_exception(parts[0], parts[2]):
                return real
            bases = tuple(x for x in parts[1] if issubclass(type(x), type) and issubclass(x, BaseException))
            return TheirException(parts[0], bases, {"__str__": forward("str"), "__getattr__": attribute})
        return support.made_error(*parts)

    def ask(self, operation: str, *arguments, **options):
        """The result of an operation on the other side; lists and the like that it changes change here, too."""
        with self.lock:
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
            with support.deep():
                arguments, options = self.unpack(arguments), self.unpack(options)
                values = (*arguments, *options.values())
                before = self.pack(values)
            result = self.operations[operation](*arguments, **options)
            same = [n for n, value in enumerate(values) if value is result]
            with support.deep():
                reply = {"argument": same[0]} if same else {"value": self.pack(result)}
        except BaseException as error:
            reply = {"error": self.pack(error)}
        support.flush()
        with support.deep():
            if (after := self.pack(values)) != before:
                reply["changed"] = after
            self.send(reply)


# ---- the side of the solution --------------------------------------------------------------------------------------


class Solution(Endpoint):
    operations, builtins = support.OPERATIONS, TYPES | support.FUNCTIONS | vars(builtins)

    def refer(self, value) -> dict:
        for base in DATA:
            if isinstance(value, base):
                return {"data": [self.number(value), self.pack(base(base.__getnewargs__(value)[0]))]}
        return {"coroutine" if isinstance(value, types.CoroutineType) else "object": [self.number(value)]}

    def proxy(self, name: str, number: int, *parts):
        if name == "named":
            return collections.namedtuple(*parts[:2])(*parts[2])
        if name in ("iterator", "object"):
            return self.items(number) if name == "iterator" else object()
        if name != "function":
            return super().proxy(name, number, *parts)

        def function(*arguments, **options):
            return self.ask("call", function, *arguments, **options)

        function.__name__, function.__doc__ = parts
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
        support.flush()
        if os.getpid() != process:  # a fork of the program, which has ended
            return
        self.send("ready")
        while request := self.receive():
            self.answer(*request)


# ---- the side of the tests -----------------------------------------------------------------------------------------


class CannotBeCheckedError(BaseException):
    """The test would need to trust an object of the solution, or the solution one of the tests."""


class Tests(Endpoint):
    builtins = TYPES | support.FUNCTIONS
    unchecked = ""  # why the tests cannot be checked

    def __init__(self, number: int):
        super().__init__(number)
        self.python = sys.stdin, dict(vars(builtins))
        self.operations = {"call": self.call, "next": next}
        self.lent = {}  # lists and the like that the solution has, too: (id of object, name) -> value, as packed
        self.contents = {}  # of containers of the solution, by id, until it is asked for what may change them
        self.may_be_old = False  # a list or the like of `lent`: a call may have changed the solution's
        self.first = {}  # operation on what says that it is none, by id: a length, or items

    def refer(self, value) -> dict:
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return {"named": [self.number(value), type(value).__name__, self.pack(value._fields), self.pack([*value])]}
        for base in DATA:
            if isinstance(value, base):
                return self.pack(base(base.__getnewargs__(value)[0]))
        name = getattr(value, "__name__", "")
        if getattr(builtins, name, None) is value:
            return {"builtin": name}
        if type(value) is object:  # a sentinel, of which nothing can be asked
            return {"object": [self.number(value)]}
        if callable(value) and not isinstance(value, type):
            return {"function": [self.number(value), name, str(getattr(value, "__doc__", ""))]}
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
        if operation not in READING:
            self.contents.clear()
        self.may_be_old = self.may_be_old or bool(self.lent and operation == "call")
        shown = sys.stdout is sys.__stdout__
        try:
            result = super().ask(*(operation,) if shown else ("printing", operation), *arguments, **options)
        except (StopIteration, StopAsyncIteration) as error:
            if operation == "next" or type(error).__name__ in self.names.used:
                raise
            raise RuntimeError("the solution raised StopIteration") from error  # it would end loops of the tests
        if not shown:
            result, output = result
            sys.stdout.write(output)
        if operation in ("getattr", "getitem") and isinstance(result, list | dict | set | deque | bytearray):
            self.lent[id(arguments[0]), str(self.pack(arguments[1]))] = result, self.pack(result)
        return result

    def check(self, code: str) -> int:
        """Run the tests of the solution behind the channel. Returns: ENDED or UNCHECKED."""
        if self.receive() != "ready":
            return 1
        random.seed = lambda *arguments, seed=random.seed: (seed(*arguments), self.ask("seed", *arguments))
        support.watch_library(Remote, contents_of, refuse)
        try:
            self.names = Names(self, code)
            exec(compile(code, "<tests>", "exec"), self.names)
        except BaseException as error:
            self.unchecked = self.unchecked or support.uncheckable(error, self.may_be_old)
            if not self.unchecked:
                raise
        if self.unchecked:
            print(f"cannot be checked: {self.unchecked}")
        return UNCHECKED if self.unchecked else ENDED


def refuse(what: str, *_, why=", with an object of one side"):
    Tests.unchecked = f"{what}{why}"  # also if the test catches the exception
    raise CannotBeCheckedError


def forward(operation: str):
    return lambda self, *arguments, **options: ENDPOINT.ask(operation, self, *arguments, **options)


def contents_of(container) -> tuple:
    """What is in a container (None: it is none, or of a class that the tests name as `Stack()`), and those classes."""
    if id(container) not in ENDPOINT.contents:
        classes = [x for name, x in ENDPOINT.names.items() if name[:1].isupper() and type(x) is Remote]
        ENDPOINT.contents[id(container)] = ENDPOINT.ask("contents", container, (*classes,)), classes
    return ENDPOINT.contents[id(container)]


def consistent_result(operation: str, container, ask, *key):
    """The result of an operation on a container that agrees with its contents before it. BINARY has two sides."""
    if operation in BINARY and isinstance(key[0], Remote):
        return ask(*key)
    before, (contents, classes) = ENDPOINT.pack(key), contents_of(container)
    ours = support.applied(operation, contents, key)  # before the solution learns the key, by which it could choose
    result = ask(*key)
    if ENDPOINT.pack(key) != before:
        refuse(f"{operation} that changes its argument")
    if contents is not None:
        return support.checked(operation, contents, key, ours, result, ENDPOINT.pack, refuse)
    first = ENDPOINT.first.setdefault(id(container), operation) if operation in ("len", "iter") else operation
    if operation in BINARY or (not classes and (operation in support.ABOUT or first != operation)):
        refuse(operation)
    return result


def in_place(name: str, self, other):
    """`self += other` by a method of the class; NotImplemented is `self + other`, which is checked."""
    if ENDPOINT.ask("hasattr", self, f"__{name}__") and (isinstance(other, Remote) or contents_of(self)[0] is None):
        return ENDPOINT.ask(name, self, other) if isinstance(other, Remote) else refuse(name)
    return NotImplemented


def attribute(self, name: str):
    if name.startswith("__array"):
        raise AttributeError(name)  # numpy would read the memory at an address
    if name == "__signature__":  # inspect looks for it
        return ENDPOINT.ask("signature", self)
    if name in ("items", "keys", "values", "get") and type(self) is Remote and isinstance(contents_of(self)[0], dict):
        return getattr(contents_of(self)[0], name)
    value = ENDPOINT.ask("getattr", self, name)
    if name in support.ABOUT and callable(value):
        return lambda *key: consistent_result(name, self, value, *key)
    return value


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
    __class__ = property(lambda self: ENDPOINT.ask("known_class", self))  # for isinstance

    def __eq__(self, other):
        if other is self:
            return True
        how, *mine = ENDPOINT.ask("describe", self)
        theirs = ENDPOINT.ask("describe", other)[1:] if isinstance(other, Remote) else None
        if how == "data":
            return mine[1] == (theirs[1] if theirs else other)
        if theirs and how != "identity" and mine[1] is not None and theirs == mine:
            return True
        agree = theirs and ENDPOINT.ask("eq", self, other) is False  # that they are not
        if other is Remote or (how == "own" and other is not None and not agree):
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
        return ENDPOINT.ask("format", self, form) if form else str(self)

    def __deepcopy__(self, memo):
        return ENDPOINT.ask("deepcopy", self)

    __getattr__, __call__, __copy__, __hash__ = attribute, *map(forward, ("call", "copy", "hash"))


for name in "setattr delattr str repr next setitem delitem".split():  # noqa: SIM905
    setattr(Remote, f"__{name}__", forward(name))
for name in READING[:4] + BINARY:
    answer = lambda self, *key, name=name: consistent_result(name, self, partial(ENDPOINT.ask, name, self), *key)  # noqa: E731
    setattr(Remote, f"__{name.strip('_')}__", answer)
for name in IN_PLACE:
    setattr(Remote, f"__{name}__", lambda self, other, name=name: in_place(name, self, other))
for name in BINARY:
    setattr(Remote, f"__r{name.strip('_')}__", staticmethod(partial(refuse, name)))
names = "abs neg pos invert round int float index bytes reversed enter exit aiter anext aenter aexit mro_entries"
for name in f"{names} lshift rshift rlshift rrshift divmod rdivmod".split():
    setattr(Remote, f"__{name}__", staticmethod(partial(refuse, name)))


@functools.cache
def data_type(base: type) -> type:
    """Of data that is of a class of the solution, whose other attributes and methods are asked for there."""
    names = {"__getattr__": attribute, "__str__": forward("str"), "__repr__": forward("repr")}
    return type(base.__name__, (base,), names)


class KindOf(type):
    """Makes `type` of the tests, which gives the solution's classes for its objects."""

    def __call__(cls, *arguments):
        ours = issubclass(type(arguments[0]), type | BaseException) or id(arguments[0]) not in ENDPOINT.theirs
        return type(*arguments) if ours else ENDPOINT.ask("type", *arguments)

    def __instancecheck__(cls, value):
        return isinstance(value, type)


class Names(dict):
    """The namespace of the tests: names that they do not define are the solution's; Python's stay Python's.

    So do those of libraries. Another `math` or `np` would be asked about what the tests expect: they may only call it.
    A name that they compare with what they spell out, as in `gcd(4, 6) == 2`, is the solution's: a subject.
    """

    def __init__(self, endpoint: Tests, tests: str):
        super().__init__(__name__="tests", __annotations__={}, type=KindOf("type", (), {}))
        self["callable"] = lambda value: ENDPOINT.ask("callable", value) if type(value) is Remote else callable(value)
        self.module = endpoint.unpack({"object": [0]})
        is_object = lambda name: isinstance(endpoint.ask("getattr", self.module, name, None), Remote)  # noqa: E731
        self.used, self.free, self.subjects, self.helpers = support.names(tests, is_object)

    def __missing__(self, name):
        is_ours = hasattr(builtins, name) and (self.free or name not in self.subjects)
        if is_ours or not ENDPOINT.ask("hasattr", self.module, name):
            raise KeyError(name)
        value = ENDPOINT.ask("getattr", self.module, name)
        others = self.subjects & vars(builtins).keys() - {name} if hasattr(builtins, name) else ()
        if any(ENDPOINT.ask("hasattr", self.module, other) for other in others):
            refuse(f"{name} and another builtin of its own")  # they could agree with each other
        if isinstance(value, Remote) and name in self.used:
            value = support.library_module(name, ENDPOINT.ask("module_name", value)) or value
            if isinstance(value, Remote) and (name in ("np", "pd") or importlib.util.find_spec(name)):
                refuse(name)
        is_module = isinstance(value, types.ModuleType)
        if name in self.helpers and len(self.free) > 1:
            refuse(f"{name} in no test without another function of the solution", why="")
        if len(self.free) > 1 and name not in self.subjects and not is_module:  # the only one is a subject, too
            value = support.confirmed(name, value, lambda *where: ENDPOINT.ask("is_from", value, *where), refuse)
        if callable(value) or is_module:
            self[name] = value
        return value


def main(role: str, number: str, _: str) -> None:
    global ENDPOINT
    if role == "layers":
        return print("ready", flush=True)
    code, result = sys.stdin.read().removeprefix("\ufeff"), 1  # a byte order mark
    sys.set_int_max_str_digits(0)  # of what travels
    sys.setrecursionlimit(support.DEEP if role == "tests" else sys.getrecursionlimit())
    sys.argv, sys.stdin = [""], open(os.devnull)  # noqa: SIM115
    try:
        ENDPOINT = (Solution if role == "solution" else Tests)(int(number))
        result = (ENDPOINT.serve if role == "solution" else ENDPOINT.check)(code) or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    support.flush()
    os._exit(result)


main(*sys.argv[1:])
