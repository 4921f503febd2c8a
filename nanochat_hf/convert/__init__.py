"""Checkpoints of karpathy/nanochat and of transformers' own nanochat <-> ours."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import InputError
from ..run import writing


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """An empty folder to fill, which becomes `path` at the end: it appears whole or not at all."""
    if os.path.lexists(path):
        raise InputError(f"{path} exists: remove it or choose another output")
    part = path.with_name(f".{path.name}.part")
    with writing(part):
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    try:
        yield part
        os.replace(part, path)
    finally:
        shutil.rmtree(part, ignore_errors=True)
