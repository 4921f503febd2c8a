"""What program.py needs that asks no other process: what a solution's imports bind, by reading it; changed lists."""

import ast
import collections
import contextlib
import importlib.util
import sys
import types


def statements(code: str) -> list[ast.AST]:
    """Of a module; none of one that does not compile, which says so itself."""
    with contextlib.suppress(SyntaxError, ValueError, RecursionError, MemoryError):
        return ast.parse(code).body
    return []


def used(code: str) -> set[str]:
    """The names that a module does more with than call them."""
    nodes = [*ast.walk(ast.Module(statements(code)))]
    called = {id(node.func) for node in nodes if isinstance(node, ast.Call)}
    return {node.id for node in nodes if isinstance(node, ast.Name) and id(node) not in called}


def bindings(nodes: list[ast.AST], name: str) -> list:
    """What statements of a module bind to a name: what an import gives here, None for any other statement."""
    bound, nodes = [], list(nodes)
    for node in nodes:  # which grows
        if isinstance(node, ast.Import | ast.ImportFrom):
            bound += [value for alias in node.names if (value := imported(node, alias, name)) is not alias]
        elif isinstance(node, ast.Try) and any(value is not None for value in bindings(node.body, name)):
            nodes += node.body + node.orelse + node.finalbody  # the import works, its handlers do not run
        else:
            names = (getattr(node, "name", ""), getattr(node, "rest", ""), *getattr(node, "names", ()))
            stored = getattr(node, "id", "") == name and not isinstance(node.ctx, ast.Load)
            bound += [None] * (stored or name in names)
            own = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda)
            inner = ast.walk(node) if own else ast.iter_child_nodes(node)
            nodes += [child for child in inner if not own or isinstance(child, ast.Global)]
    return bound


def imported(node: ast.Import | ast.ImportFrom, alias: ast.alias, name: str):
    """What a part of an import binds to a name here; `alias` if nothing.

    None where that may be a lie: a module as another module, or anything else under another name
    (`from os import _exit as add`).
    """
    source, renamed = getattr(node, "module", None), alias.asname not in (None, alias.name)
    bound = alias.asname or (alias.name if source else alias.name.partition(".")[0])
    if bound not in (name, "*") or getattr(node, "level", 0) or (source or alias.name) in ("__main__", "solution"):
        return None if bound == name else alias
    try:
        value = importlib.import_module(source or alias.name)
        if bound == "*":
            names = getattr(value, "__all__", None) or [key for key in vars(value) if key[0] != "_"]
            return getattr(value, name) if name in names else alias
        if source and not hasattr(value, alias.name):
            importlib.import_module(f"{source}.{alias.name}")
        value = getattr(value, alias.name) if source else value if alias.asname else sys.modules[name]
    except (ImportError, AttributeError):
        return alias
    plain = isinstance(value, types.ModuleType) and not importlib.util.find_spec(name)
    return value if plain or not renamed else None


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
