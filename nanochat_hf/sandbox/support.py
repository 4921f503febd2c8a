"""What program.py needs that asks no other process: names of the tests, what a library has by them, changed lists."""

import ast
import builtins
import collections
import contextlib
import importlib.util
import symtable

# Modules whose functions and constants tests use to say what is right: `isclose(root(2), 1.414)`.
LIBRARY = "math cmath collections copy decimal fractions statistics string".split()  # noqa: SIM905


def names(tests: str) -> tuple[set[str], set[str]]:
    """The names with which tests do more than call them; those that tests use and do not define."""
    nodes, tables = [*ast.walk(ast.parse(tests))], [symtable.symtable(tests, "<tests>", "exec")]
    called = {id(node.func) for node in nodes if isinstance(node, ast.Call)}
    used = {node.id for node in nodes if isinstance(node, ast.Name) and id(node) not in called}
    for table in tables:  # which grows
        tables += table.get_children()
    own = {x.get_name() for x in tables[0].get_symbols() if x.is_assigned() or x.is_imported()}
    free = {x.get_name() for table in tables for x in table.get_symbols() if table is tables[0] or x.is_global()}
    return used, free - own - vars(builtins).keys()


def library_module(name: str, claimed: str | None):
    """The module that a solution says it has as `name`, from here; None if it is none, or another one than `name`."""
    if not isinstance(claimed, str) or claimed in ("__main__", "solution"):
        return None
    if claimed.rpartition(".")[2] != name and importlib.util.find_spec(name):  # np is the name of no module
        return None
    with contextlib.suppress(ImportError, ValueError):
        return importlib.import_module(claimed)


def confirmed(name: str, value, refuse):
    """`value`, the solution's; where a module of LIBRARY has such a name that one's, with which it must agree."""
    modules = map(importlib.import_module, LIBRARY)
    module = next((module for module in modules if name in getattr(module, "__all__", vars(module))), None)
    library = getattr(module, name, value)

    def call(*arguments, **options):
        try:
            result = library(*arguments, **options)
        except Exception as error:
            with contextlib.suppress(type(error)):
                value(*arguments, **options)
                refuse(f"{name} of its own")
            raise
        comparable = type(result) is not type(value) and type(result).__eq__ is not object.__eq__
        return refuse(f"{name} of its own") if comparable and result != value(*arguments, **options) else result

    if library is not value and callable(library) and callable(value):
        return call
    return library if library == value else refuse(f"{name} of its own")


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
    elif isinstance(before, bytearray) or type(before).__module__ == "numpy":
        before[:] = after
    else:
        return after
    return before
