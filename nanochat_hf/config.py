"""A stage's YAML and the command line -> its dataclass; unknown keys and wrong values are one line.

config = parse_config(PretrainConfig, "recipes/d12/base.yaml", {"depth": "10"})
"""

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

import yaml
from trl import TrlParser

from .errors import InputError, guarded
from .run import Run, nearest, renamed_keys


class Parser(TrlParser):
    def error(self, message):
        raise InputError(message)


def parse_config(cls, path: str | Path, overrides: dict[str, str] | None = None):
    """Read a flat YAML into the dataclass `cls`; `overrides` (key -> text, as typed) win. Old names of keys are valid.

    Raises:
        InputError: no such file, no YAML mapping, an unknown key (it names the nearest one), a value of another type.
    """
    try:
        values = yaml.safe_load(Path(path).read_text()) or {}
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path} must be a mapping of keys to values")
    values, overrides = renamed_keys(values), renamed_keys(overrides or {})
    names = [field.name for field in dataclasses.fields(cls)]
    for key in [*values, *overrides]:
        if key not in names:
            raise InputError(f"unknown key {key!r} for {Path(path).name}; {nearest(key, names)}")
    flags = []
    for key, text in overrides.items():
        if text[:1] in "[{":  # argparse has no syntax for lists and mappings
            try:
                values[key] = yaml.safe_load(text)
            except yaml.YAMLError:
                raise InputError(f"{key} is no valid YAML list or mapping: {text}") from None
        else:
            flags.append(f"--{key}={text}")
    parser = Parser(cls, allow_abbrev=False)
    parser.set_defaults_with_config(**values)
    return parser.parse_args_into_dataclasses(flags)[0]


def parse_flags(words: list[str]) -> dict[str, str]:
    """['--depth', '4', '--seed=1'] -> {'depth': '4', 'seed': '1'}."""
    flags, words = {}, list(words)
    while words:
        word = words.pop(0)
        key, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not (equals or words):
            raise InputError(f"expected --key value, got {word!r}")
        flags[key.replace("-", "_")] = value if equals else words.pop(0)
    return flags


def script(cls, runner: Callable, **options: str) -> None:
    """The main function of scripts/*: `--config YAML --run-dir DIR [--key value ...]`, then runner(config, run).

    `options` declares further optional arguments, name -> help; those that are given reach `runner` as keywords.
    """

    def main():
        parser = Parser(description=sys.modules["__main__"].__doc__, allow_abbrev=False)
        parser.add_argument("--config", required=True, help="YAML of this stage, for example recipes/d12/base.yaml")
        parser.add_argument("--run-dir", required=True, help="run folder, for example runs/d12")
        for name, text in options.items():
            parser.add_argument(f"--{name.replace('_', '-')}", help=text)
        arguments, rest = parser.parse_known_args()
        given = {name: value for name in options if (value := getattr(arguments, name)) is not None}
        config, run = parse_config(cls, arguments.config, parse_flags(rest)), Run(arguments.run_dir)
        with run.lock():
            runner(config, run, **given)

    guarded(main)
