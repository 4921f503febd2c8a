"""YAML and command line -> a stage's dataclass, checked; and what `--help` and docs/configuration.md say of its keys.

    config = parse_config(PretrainConfig, "recipes/d12/base.yaml", {"depth": "10"})

A class decorated with `settings` declares each key's type, range and text once. pydantic checks by it, strictly: a
number is no text and true is no number. What YAML and flags write as text ("1e-3", "yes") is converted before.
"""

import argparse
import os
import re
import sys
import textwrap
from dataclasses import fields
from functools import wraps
from itertools import chain
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Required, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from annotated_types import Ge, Le, MinLen, MultipleOf
from fsspec import available_protocols
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from pydantic import AfterValidator, ConfigDict, StringConstraints, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from typing_extensions import is_typeddict

from .errors import InputError
from .run import BOOLEANS, KEY_ALIASES, nearest, or_shipped, renamed_keys

STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)
MAX_YAML = 10**6  # values in a file
BAD_YAML = (yaml.YAMLError, ValueError, RecursionError, KeyError, AttributeError)  # of a date or `!!bool x`, say
NOUNS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", NoneType: "null"}


READ_ONLY = "http https data git github gist zip tar libarchive reference cached simplecache".split()  # noqa: SIM905


def name_of_place(text: str) -> str:
    """A file, folder or Hub id, as text; raises ValueError for what no file system and no Hub can have."""
    if not text.strip():
        raise ValueError("it is empty; leave the key out for its default")
    if not text.isprintable() or max(len(part.encode(errors="replace")) for part in text.split("/")) > 255:
        raise ValueError("a name has printable characters only, and at most 255 bytes")
    return text


def not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("it has no characters but spaces")
    return text


def folder_to_write(text: str) -> str:
    """A place, as text. Raises ValueError for one that is a file, or lies below one."""
    path = next(path for path in (Path(text), *Path(text).parents) if os.path.lexists(path))
    if not path.is_dir():
        raise ValueError(f"{path} is no folder")
    return text


def repo_id(text: str) -> str:
    """A repository of the Hub. Raises ValueError for a name that it cannot have."""
    try:
        validate_repo_id(text)
    except HFValidationError as error:
        raise ValueError(f"no repo name: {error}") from None
    if "/" not in text:
        raise ValueError(f"write the repo with its owner, as in you/{text}")
    return text


def sync_url(text: str) -> str:
    """A place for checkpoints. Raises ValueError for what is neither a URL nor hf://owner/name."""
    if text.startswith("hf://"):
        repo_id(text.removeprefix("hf://"))
    elif not re.fullmatch(r"[a-z][a-z0-9+.-]*://\S+", text):
        raise ValueError("no URL, as s3://bucket/folder, gs://bucket/folder, file:///folder or hf://owner/name")
    elif re.match(r"(file|local)://(?!/+[^/])", text):
        raise ValueError("a file URL names a whole path with a folder, as file:///mnt/runs")
    elif (scheme := text.partition("://")[0]) in READ_ONLY:
        raise ValueError("nothing can be written to a web page or archive: take s3://, gs:// or hf://owner/name")
    elif scheme not in available_protocols():
        raise ValueError(f"no file system of fsspec is called {scheme}; take s3://, gs:// or hf://owner/name")
    return text


def each_once(names: list[str]) -> list[str]:
    """Raises InputError for a list that has a name twice."""
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(f"{twice[0]} is named twice")
    return names


Unique = Annotated[list[TypeVar("T")], AfterValidator(each_once)]
MOST = 10**15  # of any number of things
Count = Annotated[int, Ge(1), Le(MOST)]
Size = Annotated[int, Ge(1), Le(10**5)]  # of what a device or a run has at once
Length = Annotated[int, Ge(1), Le(2**24)]  # tokens
Fraction = Annotated[float, Ge(0), Le(1)]
NotNegative = Price = Annotated[float, Ge(0), Le(MOST)]
Place = Annotated[str, AfterValidator(name_of_place)]
Text = Annotated[str, AfterValidator(not_blank)]
Dir = Annotated[Place, AfterValidator(folder_to_write)]
RepoId = Annotated[str, AfterValidator(repo_id)]
Word = Annotated[str, StringConstraints(pattern=r"^[\w.][\w.:/@+-]*$")]  # that means the same in YAML and a shell
Hours = Annotated[int, Ge(1), Le(8760)]
SyncUrl = Annotated[str, AfterValidator(sync_url)]
Seed = Annotated[int, Ge(0), Le(2**32 - 1)]
TopK = Annotated[int, Ge(0), Le(2**24)]


def settings(cls):
    """A dataclass whose values are converted and checked; wrong ones raise InputError in one line."""
    cls = dataclass(config=STRICT)(cls)
    construct, kinds = cls.__init__, get_type_hints(cls, include_extras=True)
    names = sorted((f.name for f in fields(cls)), key=lambda name: name not in cls.__annotations__)  # its own first

    @wraps(construct)
    def __init__(self, *arguments, **values):
        values |= dict(zip(names, arguments))
        values = {key: convert(value, kinds[key]) if key in kinds else value for key, value in values.items()}
        try:
            construct(self, **values)
        except ValidationError as error:
            raise InputError(first_error(error, kinds)) from None

    cls.__init__ = __init__
    return cls


def check_value(kind, value, name: str):
    """`value`, checked by a type such as a TypedDict; raises InputError, which calls the value `name`."""
    try:
        return TypeAdapter(kind).validate_python(value, strict=True)
    except ValidationError as error:
        raise InputError(first_error(error, {name: kind}, name)) from None


def leaves(kind) -> tuple[set, set]:
    """The types and the literal values that an annotation allows."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return leaves(parts[0])
    if origin in (Union, UnionType):
        types, literals = zip(*map(leaves, parts))
        return set().union(*types), set().union(*literals)
    return (set(), set(parts)) if origin is Literal else ({origin or kind}, set())


def convert(value, kind):
    """Text to the number, boolean or null that the annotation asks for, 4.0 to 4, 1 to true; else unchanged."""
    types, literals = leaves(kind)
    value = str(value) if isinstance(value, Path) else value
    if isinstance(value, str) and value.strip() and value not in literals and str not in types:
        if bool in types and value.lower() in BOOLEANS:
            return BOOLEANS[value.lower()]
        try:
            value = yaml.load(value, Loader)
        except BAD_YAML:
            return value
    if isinstance(value, float) and value.is_integer() and float not in types and (int in types or value in literals):
        return int(value)
    if isinstance(value, bool) and not types & {bool, str}:
        return str(value).lower()  # which pydantic refuses; it would take true for 1
    return bool(value) if type(value) is int and value in (0, 1) and bool in types and int not in types else value


def from_command_line(text: str, key: str, kind):
    """As `convert`, for text from a command line, where lists may be written a,b or [a, b]."""
    types, _ = leaves(kind)
    if text == "null" and NoneType in types:
        return None
    if list in types and (text[:1] in ("[", "{") or leaves(element(kind))[0] & {int, float}):
        try:
            return yaml.load(text if text[:1] in ("[", "{") else f"[{text}]", Loader)
        except BAD_YAML:
            raise InputError(f"{key} is no valid YAML list or mapping: {text}") from None
    if list in types and str not in types:
        return text.split(",")
    return text


def allowed(kind, limits: tuple = ()) -> str:
    """What an annotation allows, in words: "-1 or a whole number of at least 1"."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return allowed(parts[0], parts[1:])
    if origin is Required:
        return allowed(parts[0])
    if origin in (Union, UnionType):
        return " or ".join(map(allowed, parts))
    if origin is Literal:
        words = [str(part) or "empty" for part in parts]
        return " or ".join(filter(None, (", ".join(words[:-1]), words[-1])))
    if origin is list:
        empty = ", not empty" if any(isinstance(limit, MinLen) for limit in limits) else ""
        return f"a list of {allowed(parts[0])}{empty}"
    if is_typeddict(kind):
        return "{" + ", ".join(get_type_hints(kind)) + "}"
    noun, bounds = NOUNS.get(kind, str(kind)), {}
    for limit in limits:
        if isinstance(limit, MultipleOf):
            noun = f"a multiple of {limit.multiple_of}"
        elif isinstance(limit, StringConstraints):
            noun = f"text that matches {limit.pattern}"
        bounds |= {name: value for name in ("ge", "gt", "le") if (value := getattr(limit, name, None)) is not None}
    bounds = {name: f"{value:g}" if value >= 1e12 else str(value) for name, value in bounds.items()}
    if {"ge", "le"} <= bounds.keys():
        return f"{noun} from {bounds['ge']} to {bounds['le']}"
    words = {"ge": "of at least", "gt": "above", "le": "and of at most"}
    return " ".join([noun, *(f"{words[name]} {value}" for name, value in bounds.items())])


def first_error(error: ValidationError, kinds: dict, name: str | None = None) -> str:
    """The first wrong key of a class, or of the one value `name`: what it is, and what is allowed."""
    errors = error.errors()
    if errors[0]["loc"] == () and name is None:  # of a rule about several keys
        return str(errors[0]["ctx"]["error"])
    key = errors[0]["loc"][0] if name is None else name
    if errors[0]["type"] == "unexpected_keyword_argument":
        return f"unknown key {key!r}; {nearest(key, kinds)}"
    kind, places = kinds[key], []
    for each in errors:
        if name is not None or each["loc"][0] == key:
            numbers = [i for i, part in enumerate(each["loc"]) if isinstance(part, int)]
            places.append((each["loc"][numbers[0] :] if numbers else (), each))
    # Of a union each part has its error; the one inside of a list says most.
    place, worst = max(places, key=lambda pair: len(pair[0]))
    if place:
        key, kind = f"{key}[{place[0]}]", element(kind)
    inner = next((part for part in place if isinstance(part, str) and part.isidentifier()), None)
    value = "null" if worst["input"] is None else repr(worst["input"])
    value = value if len(value) < 80 else value[:76] + " ..."
    if worst["type"] == "missing":
        return f"{key} needs a {inner}: {value}"
    if inner:
        keys = get_type_hints(kind, include_extras=True)
        if inner not in keys:
            return f"unknown key {inner!r} in {key}; {nearest(inner, keys)}"
        key, kind = f"{key}.{inner}", keys[inner]
    near = nearest(worst["input"], leaves(kind)[1])
    reason = f"it must be {allowed(kind)}" + f"; {near}" * near.startswith("did")
    reason = worst["ctx"]["error"] if worst["type"] == "value_error" else reason
    return f"{key} is {value}: {reason}" if key else f"{value}: {reason}"


def element(kind):
    """The annotation of what a list holds: TypedDicts without their own checks."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated and parts[0] in (int, float, str):
        return kind  # with its range or pattern
    if origin in (Annotated, list):
        return element(parts[0])
    return next(element(part) for part in parts if "list" in str(part)) if origin in (Union, UnionType) else kind


class Loader(yaml.SafeLoader):
    """YAML in which a key occurs once, texts have UTF-8, 1e-3 is a number, and aliases do not multiply."""

    def compose_node(self, parent, index):
        node = super().compose_node(parent, index)
        parts = chain.from_iterable(node.value) if isinstance(node, yaml.MappingNode) else node.value
        parts = () if isinstance(node, yaml.ScalarNode) else parts
        node.size = 1 + sum(getattr(part, "size", 1) for part in parts)  # with what aliases repeat
        if node.size > MAX_YAML:
            raise yaml.composer.ComposerError(None, None, "aliases make it too large", node.start_mark)
        return node

    def construct_scalar(self, node):
        value = super().construct_scalar(node)
        value.encode()  # raises ValueError for half of a surrogate pair, as "\\ud800"
        return value

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        if twice := next((key for key in keys if keys.count(key) > 1), None):
            raise yaml.constructor.ConstructorError(None, None, f"key {twice!r} occurs twice", node.start_mark)
        return super().construct_mapping(node, deep)


YAML_FLOAT, FLOAT = "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
Loader.add_implicit_resolver(YAML_FLOAT, FLOAT, list("-+.0123456789"))
# Not as in YAML 1.1, where 010 is 8 and 1:30 is 90.
Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value, 0))
Loader.add_constructor(YAML_FLOAT, lambda loader, node: float(re.sub(r"\.(?=inf|nan)", "", node.value.lower())))


def read_yaml(path: str | Path) -> dict:
    """The mapping in a file. Raises InputError: no such file, not UTF-8, no valid YAML, no mapping."""
    place, is_from_shell = Path(path), str(path).startswith("/dev/")  # where a shell's <(...) is
    if (place.is_fifo() or place.is_char_device()) and not is_from_shell:
        raise InputError(f"{path} is a pipe or a device, no file: reading it might not end")
    try:
        values = yaml.load(or_shipped(path).read_text(encoding="utf-8-sig"), Loader)
    except OSError as error:
        raise InputError(f"cannot read {str(path)[:200]}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8: save it in that encoding") from None
    except BAD_YAML as error:
        raise InputError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict | None):
        raise InputError(f"{path} must be a mapping of keys to values")
    return values or {}


def parse_config(cls, path: str | Path, overrides: dict[str, str] | None = None):
    """Read a flat YAML into the dataclass `cls`; `overrides` (key -> text, as typed) win. Old names of keys are valid.

    Raises InputError: a file that cannot be read, an unknown key (it names the nearest), a value that is not allowed.
    """
    kinds = get_type_hints(cls, include_extras=True)
    values, overrides = read_yaml(path), overrides or {}
    for given in (values, overrides):
        each_once([KEY_ALIASES.get(key, key) for key in given])
    values, overrides = renamed_keys(values), renamed_keys(overrides)
    for key in [*values, *overrides]:
        if key not in kinds:
            raise InputError(f"unknown key {key!r} for {path}; {nearest(key, kinds)}")
    values |= {key: from_command_line(text, key, kinds[key]) for key, text in overrides.items()}
    try:
        return cls(**values)
    except InputError as error:
        key = re.match(r"\w*", str(error))[0]
        raise InputError(f"{Path(path).stem}.{error}" if key in overrides else f"{path}: {error}") from None


class Parser(argparse.ArgumentParser):
    """Its errors are an InputError; an unknown flag is named with the nearest; --a-b and --a_b are the same.

    `keys`: key of a recipe -> its names with the stages, for somebody who writes it as a flag.
    """

    keys: dict[str, list[str]] = {}

    def __init__(self, description: str, **options):
        options |= {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
        super().__init__(description=description, **options)

    def error(self, message: str):
        flag = re.sub(r"^unrecognized arguments: (\w+\.)?", "--", message)
        if flag.partition("=")[0].replace("_", "-") in self._option_string_actions:
            raise InputError(f"keys of one stage are flags: {flag}")
        raise InputError(message.removeprefix("argument ") + "; --help lists the flags" * ("unrecognized" in message))

    def option(self, name: str, kind: Any = str, *names: str, **options) -> None:
        """`add_argument` with an annotation in place of argparse's type."""

        def parse(text: str):
            text = os.path.expanduser(text) if kind is Place else text  # of --run-dir=~/run, which shells leave alone
            try:
                return check_value(kind, convert(from_command_line(text, name, kind), kind), "")
            except InputError as error:
                raise argparse.ArgumentTypeError(str(error)) from None

        if get_origin(kind) is Literal and name.startswith("-"):
            options.setdefault("metavar", f"{{{','.join(get_args(kind))}}}")
        if isinstance(options.get("default"), int | float) or options.get("default"):
            options["help"] += " (default: %(default)s)" * ("(default" not in options["help"])
        self.add_argument(name, *names, type=parse, **options)

    def add_keys(self, cls, prefix: str = "--") -> None:
        """A flag for each key of a stage's config, absent from the result if it is not given; and their help."""
        for key, kind in get_type_hints(cls, include_extras=True).items():
            single = {"nargs": "?", "const": "true"} if bool in leaves(kind)[0] else {}
            for name in [key, *(old for old, new in KEY_ALIASES.items() if new == key)]:
                flag = f"--{name.replace('_', '-')}"
                self.add_argument(flag, dest=name, default=argparse.SUPPRESS, help=argparse.SUPPRESS, **single)
        self.epilog = keys_help(cls, prefix)

    def parse_known_args(self, args=None, namespace=None):
        words, left = [], list(sys.argv[1:] if args is None else args)
        if wrong := next((word for word in left if re.search("[\ud800-\udfff]", word)), None):
            raise InputError(f"{ascii(wrong)[:80]} is not UTF-8: write it in that encoding")
        while left:
            word = left.pop(0)
            name, equals, value = word.partition("=")
            if name.startswith("--") and name != "--":
                name = name.replace("_", "-")
                if any(other.partition("=")[0] == name for other in words):
                    raise InputError(f"{name} is given twice")
                if name not in self._option_string_actions:
                    key = name[2:].replace("-", "_")
                    if places := [key] if "." in key else self.keys.get(KEY_ALIASES.get(key, key)):
                        value = value or (left[0] if left and not left[0].startswith("--") else "VALUE")
                        given = " or ".join(f"{place}={value}" for place in places)
                        raise InputError(f"keys of a recipe have no dashes: {given}")
                    flags = [flag for flag in self._option_string_actions if flag.startswith("--")]
                    raise InputError(f"unknown flag {name!r}; {nearest(name, [*flags, *self.keys])}")
                word = name + equals + value
                if not equals and left and re.match(r"-(\.?\d|inf|nan)", left[0]):  # argparse takes -1e-3 for a flag
                    word = f"{name}={left.pop(0)}"
            words.append(word)
        return super().parse_known_args(words, namespace)


def keys_of(cls) -> list[tuple[str, str, str, str, str]]:
    """(class that declares it, key, default, what is allowed, text) of each key, inherited ones last."""
    rows, kinds = [], get_type_hints(cls, include_extras=True)
    for f in fields(cls):
        owners = [base for base in cls.__mro__ if f.name in getattr(base, "__pydantic_fields__", {})]
        text = next(filter(None, (base.__pydantic_fields__[f.name].description for base in owners)), "")
        default = cls.__pydantic_fields__[f.name].get_default(call_default_factory=True)
        default = "null" if default is None else str(default).lower() if isinstance(default, bool) else default
        default = "[" + ", ".join(map(str, default)) + "]" if isinstance(default, list) else str(default)
        rows.append((owners[-1].__name__, f.name, default, allowed(kinds[f.name]), " ".join(text.split())))
    return sorted(rows, key=lambda row: row[0] != cls.__name__)


def keys_help(cls, prefix: str) -> str:
    """The keys of a stage for `--help`, those of the class itself before the inherited ones."""
    lines, group = [], None
    for owner, key, default, values, text in keys_of(cls):
        if owner != group:
            lines += ["", f"keys of {owner} (default; what is allowed):"]
            group = owner
        lines.append(f"  {prefix}{key} ({default or 'empty'}; {values})")
        lines += textwrap.wrap(text, 100, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines[1:])
