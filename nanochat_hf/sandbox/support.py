"""What program.py needs that asks no other process: names of the tests, what a library has by them, changed lists,
and operations on objects of the solution (OPERATIONS).
"""

import abc
import ast
import builtins
import collections.abc
import contextlib
import copy
import copyreg
import importlib.util
import io
import itertools
import json
import math
import operator
import os
import random
import symtable
import sys
import types

# Modules whose functions and constants tests use to say what is right: `isclose(root(2), 1.414)`.
LIBRARY = "cmath collections copy decimal fractions functools itertools json math operator re".split()  # noqa: SIM905
LIBRARY += ["statistics", "string"]
DEEP = 20_000  # limit of recursion; values may be nested half as deep
# A solution's subclasses of these are data with an object behind it.
DATA = (int, float, str, bytes, tuple, collections.UserString)
USER_DATA = {  # containers whose `data` tells how they are equal, as long as a subclass leaves these methods
    collections.UserList: ["__eq__"],
    collections.UserDict: ["__eq__", "__getitem__", "__iter__", "items"],
}
READING = "len bool iter getitem contents".split()  # noqa: SIM905  (operations)
BINARY = "lt le gt ge add sub mul truediv floordiv mod pow matmul and_ or_ xor".split()  # noqa: SIM905
IN_PLACE = [f"i{name.strip('_')}" for name in BINARY[4:]]
# Methods that are given what the tests expect.
ABOUT = "count index isdisjoint issubset issuperset startswith endswith equals".split()  # noqa: SIM905
TYPES = {name: kind for name, kind in vars(builtins).items() if isinstance(kind, type)}
TYPES |= {kind.__name__: kind for kind in (types.FunctionType, types.MethodType, types.GeneratorType, type(None))}
TYPES |= {"Ellipsis": ..., "NotImplemented": NotImplemented}  # those have one object each
# Functions without effects, the same on both sides: `f() is math.sqrt`.
FUNCTIONS = {f"math.{name}": f for name, f in vars(math).items() if isinstance(f, types.BuiltinFunctionType)}
for name in "abs all any chr len max min ord pow repr round sorted sum".split():  # noqa: SIM905
    FUNCTIONS[name] = vars(builtins)[name]
ITEMS = {  # types that travel by value: the attribute that has what is in one ("": itself), how to make it again
    "builtins.list": ("", list),
    "builtins.tuple": ("", tuple),
    "builtins.bytes": ("", bytes),
    "builtins.memoryview": ("tobytes", lambda items: memoryview(bytearray(items))),
    "builtins.dict": ("items", dict),
    "builtins.mappingproxy": ("items", lambda items: types.MappingProxyType(dict(items))),
    "collections.ChainMap": ("items", lambda items: collections.ChainMap(dict(items))),
    "collections.UserDict": ("items", lambda items: collections.UserDict(dict(items))),
    "collections.UserList": ("data", collections.UserList),
    "collections.UserString": ("data", lambda items: collections.UserString("".join(items))),
    "uuid.UUID": ("bytes", lambda items: importlib.import_module("uuid").UUID(bytes=bytes(items))),
    "zoneinfo.ZoneInfo": ("key", lambda items: importlib.import_module("zoneinfo").ZoneInfo("".join(items))),
}
for kind in ("builtins.dict", "builtins.odict"):
    ITEMS[f"{kind}_keys"] = "", lambda items: dict.fromkeys(items).keys()
    ITEMS[f"{kind}_values"] = "", lambda items: dict(enumerate(items)).values()
    ITEMS[f"{kind}_items"] = "", lambda items: dict(items).items()
REDUCED = {  # those that travel as what pickle would make them of
    *(f"builtins.{name}" for name in ("set", "frozenset", "bytearray", "complex", "range", "slice")),
    *(f"collections.{name}" for name in ("OrderedDict", "Counter", "defaultdict", "deque")),
    *(f"datetime.{name}" for name in ("date", "datetime", "time", "timedelta", "timezone")),
    *(f"ipaddress.IPv{version}{what}" for version in "46" for what in ("Address", "Network", "Interface")),
    *("array.array", "decimal.Decimal", "fractions.Fraction", "pathlib.PosixPath", "pathlib.PurePosixPath"),
    *("inspect.Signature", "inspect.Parameter", "inspect._empty"),
}


@contextlib.contextmanager
def deep():
    """Allows values that are nested deeper than calls may be. No code of a program runs meanwhile."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(max(limit, DEEP))
    try:
        yield
    finally:
        sys.setrecursionlimit(limit)


def names(tests: str, is_object=lambda name: True) -> tuple[set[str], set[str], set[str], set[str]]:
    """Names with which tests do more than call them; those that they use and do not define; subjects; helpers.

    Subjects are what tests are about: judged without another undefined name, or given to the tests' own functions, as
    in `check(f)`. Helpers are judged together with another one only, and no library has them, so that a solution
    could make both agree: `poly` in `assert poly(root(2)) == 0`. `is_object`: whether a name is the solution's object.
    """
    nodes, tables = [*ast.walk(ast.parse(tests))], [symtable.symtable(tests, "<tests>", "exec")]
    functions = {id(node.func): getattr(node.func, "id", "") for node in nodes if isinstance(node, ast.Call)}
    used, called = {node.id for node in nodes if isinstance(node, ast.Name) and id(node) not in functions}, set()
    for table in tables:  # which grows
        tables += table.get_children()
    own = {x.get_name() for x in tables[0].get_symbols() if x.is_assigned() or x.is_imported()}
    free = {x.get_name() for table in tables for x in table.get_symbols() if table is tables[0] or x.is_global()}
    free, called = free - own - vars(builtins).keys(), {*functions.values()} - own - {""}  # also of parameters
    subjects = set() if free else called
    for node in nodes:
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) in own:
            subjects = subjects | {x.id for x in node.args if isinstance(x, ast.Name)}
    library = {name for name in free if library_of(name)}
    called = {x for x in called - vars(builtins).keys() if not x[0].isupper() and (x not in free or is_object(x))}
    subjects |= judged_alone(nodes, called | library)
    return used, free, subjects, (called - library - judged_alone(nodes, called - (library - subjects))) & free


def names_in(node) -> set[str]:
    return {x.id for x in ast.walk(node) if isinstance(x, ast.Name)}


def judged_alone(nodes: list, names: set[str]) -> set[str]:
    """Those of the names that tests judge without another one that is not judged alone itself.

    They judge what they compare or assert, and calls as statements, except `x.append(f(1))`. What is judged also has
    the names that its variables and the tests' own functions are made of.
    """
    made_of, judged, alone = collections.defaultdict(set), [], set()
    for node in nodes:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            made_of[node.name] |= names_in(node)
        value = next((x for key in ("value", "iter", "context_expr") if (x := getattr(node, key, None))), None)
        targets = [*getattr(node, "targets", ()), getattr(node, "target", getattr(node, "optional_vars", None))]
        pairs = [(target, value) for target in targets if target and value]
        if pairs and isinstance(value, ast.Tuple) and isinstance(targets[0], ast.Tuple):  # as in a, b = f(1), g(2)
            pairs = zip(targets[0].elts, value.elts)
        for target, value in pairs:
            for name in names_in(target):
                made_of[name] |= names_in(value)
        match node:
            case ast.Compare():
                judged.append(node)
            case ast.Assert() | ast.If():
                judged.append(node.test)
            case ast.BoolOp():
                judged += node.values
            case ast.UnaryOp(op=ast.Not()):
                judged.append(node.operand)
            case ast.Expr(value=ast.Call(func=ast.Attribute(value=ast.Name(id=receiver)))) if receiver != "self":
                pass
            case ast.Expr():
                judged.append(node.value)
    groups = []
    for group in map(names_in, judged):
        while more := set().union(*(made_of[name] for name in group)) - group:
            group |= more
        groups.append(group & names)
    while new := set().union(*(left for group in groups if len(left := group - alone) == 1)):
        alone |= new
    return alone


def library_of(name: str):
    """The module of LIBRARY that has a name, or None."""
    modules = map(importlib.import_module, LIBRARY)
    return next((module for module in modules if name in getattr(module, "__all__", vars(module))), None)


def library_module(name: str, claimed: str | None):
    """The module that a solution says it has as `name`, from here; None if it is none, or another one than `name`."""
    if not isinstance(claimed, str) or claimed in ("__main__", "solution"):
        return None
    if claimed.rpartition(".")[2] != name and importlib.util.find_spec(name):  # np is the name of no module
        return None
    with contextlib.suppress(ImportError, ValueError):
        return importlib.import_module(claimed)


def confirmed(name: str, value, is_from, refuse):
    """`value`, the solution's; where a module of LIBRARY has such a name that one's, with which it must agree.

    A function that the solution has from there (`is_from` says so) need not: that one's is called instead.
    """
    module = library_of(name)
    library = getattr(module, name, value)
    if library is value or callable(library) != callable(value):
        return value
    if not callable(library) or is_from(module.__name__, name):
        return library if callable(library) or library == value else refuse(f"{name} of its own")

    def call(*arguments, **options):
        try:
            result = library(*arguments, **options)
        except Exception as error:
            with contextlib.suppress(type(error)):
                value(*arguments, **options)
                refuse(f"{name} of its own")
            raise
        theirs, ours = value(*arguments, **options), result
        if callable(ours) and module.__name__ == "functools":  # a decorator is about the function that it gets
            return theirs
        if isinstance(ours, collections.abc.Iterator) and isinstance(theirs, collections.abc.Iterable):
            ours = [*itertools.islice(ours, 10_000)]
            first = [*itertools.islice(theirs, 10_000)]
            result, theirs = (itertools.chain(first, theirs) if hasattr(theirs, "__next__") else theirs), first
        if type(ours).__eq__ is object.__eq__ or ours != theirs:
            refuse(f"{name} of its own")
        return result

    return call


def shared_name(value) -> str | None:
    """The name of a type or function that is the same on both sides."""
    if not isinstance(value, type | types.BuiltinFunctionType):
        return None
    full = f"{value.__module__}.{value.__qualname__}"
    if full in REDUCED:
        return full
    return next((x for x in (value.__name__, full) if TYPES.get(x, FUNCTIONS.get(x)) is value), None)


def reduced(value) -> tuple:
    """The parts of an object of REDUCED, for `made_again`."""
    make, arguments, state, items, pairs = (*value.__reduce_ex__(2), None, None, None)[:5]
    arguments = arguments[make is copyreg.__newobj__ :]  # its first one is the type
    return arguments, list(items or ()), list(pairs or ()), state


def array_parts(value) -> tuple | None:
    """Type, shape and items of numpy's arrays and scalars; None of others."""
    if (type(value).__name__ == "ndarray" or getattr(value, "shape", None) == ()) and value.dtype.names is None:
        return value.dtype.str, value.shape, value.ravel().tolist()
    return None


def library_exception(name: str, module: str) -> type | None:
    """An exception's class of a library, which is the same here, unless unittest or pytest take it for no failure."""
    if module.partition(".")[0] in sys.stdlib_module_names:
        importlib.import_module(module)
    kind, ends_tests = getattr(sys.modules.get(module), name, None), ("unittest", "_pytest", "doctest")
    is_real = isinstance(kind, type) and issubclass(kind, BaseException)
    return kind if is_real and module.partition(".")[0] not in ends_tests else None


def made_error(kind, arguments, state, cause):
    """An exception of the other side."""
    error = kind.__new__(kind, *arguments)
    if kind.__module__ == "builtins":  # others, made of `args`, may take other arguments
        error.__init__(*arguments)
    vars(error).update(state)
    error.__cause__ = cause
    return error


def made_again(name: str, arguments, items, pairs, state):
    """What pickle would make of the parts of an object of REDUCED."""
    module, _, kind = name.rpartition(".")
    value = getattr(importlib.import_module(module), kind)(*arguments)
    for item in items:
        value.append(item)
    for key, item in pairs:
        value[key] = item
    if state:  # of inspect's
        value.__setstate__(state)
    return value


def renewed(before, after):
    """`after`, as the object `before` if that can be changed in place; so are the objects in it."""
    if type(before) is not type(after):
        return after
    if isinstance(before, tuple):
        return tuple(map(renewed, before, after))
    if isinstance(before, dict):
        items = {key: renewed(before.get(key), value) for key, value in after.items()}
        before.clear()
        before.update(items)
    elif isinstance(before, list | collections.deque):
        items = [*map(renewed, before, after), *list(after)[len(before) :]]
        before.clear()
        before.extend(items)
    elif isinstance(before, set):
        before.clear()
        before.update(after)
    elif isinstance(before, bytearray | memoryview) or type(before).__module__ in ("array", "numpy"):
        before[:] = after
    else:
        return after
    return before


def watch_library(remote: type, contents_of, refuse) -> None:
    """Let the library take what stands for objects of the other side, or refuse: JSON, abstract classes and files."""
    default, is_instance = json.JSONEncoder.default, abc.ABCMeta.__instancecheck__

    def of_one_side(event: str, arguments) -> None:
        path = arguments[0] if event == "open" and isinstance(arguments[0], str) else "/"
        of_python = path.startswith(("<", sys.prefix, sys.base_prefix))  # which may be below /tmp
        is_programs = (path.startswith("/tmp/") or path[:1] != "/") and not of_python
        if is_programs and (arguments[2] & (os.O_WRONLY | os.O_RDWR) or not os.path.exists(path)):
            refuse("a file", why=", which one side has")

    def check(kind, value):
        try:
            return is_instance(kind, value)
        except TypeError:
            return refuse("isinstance") if type(value) is remote else is_instance(kind, value)

    sys.addaudithook(of_one_side)
    abc.ABCMeta.__instancecheck__ = check
    json.JSONEncoder.default = lambda encoder, value: (
        contents_of(value)[0]
        if type(value) is remote and contents_of(value)[0] is not None
        else default(encoder, value)
    )


def uncheckable(error: BaseException, may_be_old: bool) -> str:
    """Why tests that ended in an error say nothing about the solution, else nothing."""
    if may_be_old and isinstance(error, AssertionError):
        return "a list or the like that was fetched before a call, which may have changed it"
    return "match, with a class of the solution" if type(error) is TypeError and "match pattern" in str(error) else ""


def flush() -> None:
    with contextlib.suppress(Exception):  # a program may have closed or replaced it
        sys.stdout.flush()


# ---- operations on objects of the solution -------------------------------------------------------------------------


def contents(value, classes=()):
    """What is in a container, as plain data, whatever its methods say; None of what is none or of `classes`."""
    kind = type(value)
    if isinstance(value, tuple(kind for kind in classes if isinstance(kind, type))):
        return None
    if isinstance(value, dict):
        bases = collections.OrderedDict, collections.Counter, dict
        return next(base for base in bases if isinstance(value, base))(dict(dict.items(value)))
    for base in (list, set, frozenset, collections.deque, bytearray):
        if isinstance(value, base):
            return base(base.__iter__(value))
    if hasattr(kind, "__len__") and hasattr(kind, "__iter__"):
        return (tuple if hasattr(kind, "keys") else list)(itertools.islice(value, 10_000_000))  # tuple: of keys
    if hasattr(kind, "__len__") and hasattr(kind, "__getitem__"):
        with contextlib.suppress(Exception):  # of one without numbers as keys
            return tuple(value[i] for i in range(len(value)))
    return None


def applied(operation: str, contents, key: tuple) -> tuple:
    """What an operation on a container gives on its contents, in a tuple; an empty one if it gives an exception."""
    function = {"len": len, "bool": bool, "iter": list}.get(operation) or getattr(operator, operation, None)
    with contextlib.suppress(LookupError, TypeError, ValueError, AttributeError):
        return (getattr(contents, operation)(*key) if operation in ABOUT else function(contents, *key),)
    return ()


def checked(operation: str, contents, key: tuple, ours: tuple, result, pack, refuse):
    """The result of an operation on a container, if it is `ours`, what the operation gives on its contents."""
    if operation == "getitem":
        is_list = isinstance(contents, list | collections.deque)
        if not isinstance(contents, dict) and not (is_list and isinstance(key[0], int | slice)):
            return result  # of what is no sequence
    elif operation == "iter":
        result = [*itertools.islice(result, len(contents) + 1)]
    if ours and pack(ours[0]) == pack(result):
        return iter(result) if operation == "iter" else result
    return refuse(f"a container with a {operation} of its own")


def describe(value) -> list:
    """How objects of this type are equal, their type and contents.

    "data" (as the list or other container that it is), "identity", "fields", or "own" by a method of theirs.
    """
    kind = type(value)
    for base in (list, collections.OrderedDict, dict, set, frozenset, collections.deque, bytearray):
        if isinstance(value, base) and kind.__eq__ is base.__eq__:
            return ["data", kind, contents(value)]
    for base, names in USER_DATA.items():
        if isinstance(value, base) and all(getattr(kind, name) is getattr(base, name) for name in names):
            return ["data", kind, value.data]
    if kind.__eq__ is object.__eq__ or isinstance(value, type | types.FunctionType):
        return ["identity", kind, None]
    if hasattr(kind, "__dataclass_fields__") and kind.__eq__.__code__.co_filename == "<string>":  # not the program's
        names = [field.name for field in sys.modules["dataclasses"].fields(kind) if field.compare]
        return ["fields", kind, {name: getattr(value, name) for name in names}]
    attributes = getattr(value, "__dict__", None) if kind.__module__ == "solution" else None
    return ["own", kind, attributes or None]  # without any, all would be equal


def is_from(value, module: str, name: str) -> bool:
    return getattr(importlib.import_module(module), name) is value


def known_class(value) -> type:
    """The first class of an object that both sides have, else its own."""
    return next((kind for kind in type(value).__mro__[:-1] if TYPES.get(kind.__name__) is kind), type(value))


def module_name(value) -> str | None:
    return value.__name__ if isinstance(value, types.ModuleType) else None


def run(coroutine):
    return importlib.import_module("asyncio").run(coroutine)


def signature(value):
    return importlib.import_module("inspect").signature(value)


def printing(operation: str, *arguments, **options) -> tuple:
    """The result of an operation and what it prints."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        return OPERATIONS[operation](*arguments, **options), output.getvalue()


OPERATIONS = {function.__name__: function for function in (
    operator.call, printing, random.seed, copy.copy, copy.deepcopy, getattr, setattr, delattr, hasattr, len, str,
    repr, bool, hash, iter, next, type, isinstance, issubclass, callable, operator.getitem, operator.setitem,
    operator.delitem, format, *(getattr(operator, name) for name in ["eq", *BINARY, *IN_PLACE]),
    contents, describe, is_from, known_class, module_name, run, signature,
)}  # fmt: skip
