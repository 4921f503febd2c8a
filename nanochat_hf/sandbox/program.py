"""What runs inside a sandbox (nanochat_hf/sandbox.py starts it): a solution that serves calls, or the tests that call.

    python -c THIS_FILE solution|tests CHANNEL < CODE

CHANNEL is a socket. The solution writes the names that it defines; after that each request is a call and each reply
its result, or one of Python's own exceptions. Only plain data travels, as JSON: an object that equals everything never
reaches the tests.
"""

import ast
import builtins
import collections.abc
import contextlib
import decimal
import fractions
import json
import os
import sys
import traceback
import types

ENDED = 77  # exit code of tests that ran to their last line
MAX_MESSAGE = 1 << 22  # bytes
EXACT = {"Decimal": decimal.Decimal, "Fraction": fractions.Fraction}
CONTAINERS = {"list": list, "tuple": tuple, "frozenset": frozenset, "set": collections.abc.Set}
TYPES = {name: kind for name, kind in vars(builtins).items() if isinstance(kind, type)}
ERRORS = {name: kind for name, kind in TYPES.items() if issubclass(kind, Exception)}


def pack(value):
    """A value as JSON can hold it. Subclasses become their base, so that they compare as plain data do."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, dict):
        return {"dict": [[pack(key), pack(item)] for key, item in value.items()]}
    for kind, base in CONTAINERS.items():
        if isinstance(value, base):
            return {kind: [pack(item) for item in value]}
    for base in (int, float, str):
        if isinstance(value, base):
            return base(value)
    if isinstance(value, bytes | complex):
        return {"literal": repr(value)}
    if isinstance(value, tuple(EXACT.values())):
        return {type(value).__name__: str(value)}
    if hasattr(value, "item"):  # numbers of numpy
        return pack(value.item())
    if isinstance(value, collections.abc.Iterable):
        return {"iterator": [pack(item) for item in value]}
    raise TypeError(f"a {type(value).__name__} cannot leave the sandbox")


def unpack(value):
    if not isinstance(value, dict):
        return value
    ((kind, items),) = value.items()
    if kind == "dict":
        return {unpack(key): unpack(item) for key, item in items}
    if kind in CONTAINERS:
        return (CONTAINERS | {"set": set})[kind](map(unpack, items))
    if kind == "iterator":
        return map(unpack, items)
    return ast.literal_eval(items) if kind == "literal" else EXACT[kind](items)


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


def serve(code: str, channel: Channel) -> None:
    """Run a solution, then answer calls until the other side closes."""
    process, module = os.getpid(), types.ModuleType("solution")
    sys.modules["solution"] = module  # so that its classes can be pickled
    exec(compile(code, "<program>", "exec"), module.__dict__)
    sys.stdout.flush()
    if os.getpid() != process:  # a fork of the program, which has ended
        return
    channel.send([name for name, value in vars(module).items() if callable(value)])
    while request := channel.receive():
        name, arguments, options = request
        try:
            reply = {"value": pack(getattr(module, name)(*unpack(arguments), **unpack(options)))}
        except BaseException as error:
            kinds = [kind.__name__ for kind in type(error).__mro__]
            reply = {"error": [next(filter(ERRORS.get, kinds), "RuntimeError"), f"{kinds[0]}: {error}"]}
        sys.stdout.flush()
        channel.send(reply)


def check(code: str, channel: Channel) -> None:
    """Run tests in which the names of the solution are calls to it. Names of Python itself stay Python's."""

    def remote(name):
        def call(*arguments, **options):
            channel.send([name, pack(arguments), pack(options)])
            reply = channel.receive()
            if "value" not in reply:
                kind, text = reply["error"]
                raise ERRORS[kind](f"{name}: {text}")
            return unpack(reply["value"])

        return call

    names = {str(name) for name in channel.receive()} - set(dir(builtins))
    namespace = {name: remote(name) for name in names}
    exec(compile(code, "<tests>", "exec"), namespace | {"__name__": "tests"})


def main(role: str, number: str) -> None:
    if role == "layers":
        print("ready", flush=True)
        return
    code = sys.stdin.read()
    sys.set_int_max_str_digits(0)  # of what travels
    sys.argv, sys.stdin = [""], open(os.devnull)  # noqa: SIM115
    try:
        {"solution": serve, "tests": check}[role](code, Channel(int(number)))
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
        sys.stdout.flush()
        os._exit(1)
    os._exit(ENDED if role == "tests" else 0)


main(*sys.argv[1:])
