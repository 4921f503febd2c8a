"""Damaged versions of a file: cut, flipped and overwritten bytes, and JSON with values of other types and ranges."""

import json
import random
from collections.abc import Iterator

VALUES = (
    None, True, False, 0, -1, 2**63, 10**400, 1e300, -0.5, float("nan"), float("inf"), "", "x", "1", "\ud800", "a\0b",
    "../../x", [], [[]], [None], ["x"], [1, "x"], {}, {"": None}, {"x": {"x": []}}, [{}], [{"step": "x"}], "9" * 5000,
)  # fmt: skip
TEXTS = (b"", b"\xff\xfe", b"null", b"[]", b"1", b'"x"', b"{}", b"{", b'{"steps": 1}', b"[" * 5000, b'{"a":' * 5000)


def places(value, path: tuple = ()) -> Iterator[tuple]:
    """The paths of all values in `value` below the first level."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from places(item, (*path, key))


def mutations(data: bytes, count: int, seed: int = 0) -> Iterator[bytes]:
    """`count` damaged versions of a file; every second one is JSON with one or two values replaced or left out."""
    rng = random.Random(seed)
    for number in range(count):
        try:
            value = json.loads(data)
        except ValueError:  # no JSON, such as weights
            value = {}
        paths = list(places(value))
        if number % 2 and paths:
            for path in rng.sample(paths, min(len(paths), rng.choice((1, 1, 2)))):
                parent = value
                try:
                    for key in path[:-1]:
                        parent = parent[key]
                    if rng.random() < 0.2:
                        del parent[path[-1]]
                    else:
                        parent[path[-1]] = rng.choice(VALUES)
                except (LookupError, TypeError):  # the first change took its place away
                    continue
            yield json.dumps(value).encode()
        elif rng.random() < 0.4:
            yield rng.choice(TEXTS)
        else:
            copy, start = bytearray(data), rng.randrange(max(len(data), 1))
            kind = rng.randrange(3)
            if kind == 0:
                copy[start : start + 1] = bytes([rng.randrange(256)])
            elif kind == 1:
                del copy[start : start + rng.randrange(1, 40)]
            else:
                copy[start:start] = rng.randbytes(rng.randrange(1, 9))
            yield bytes(copy)
