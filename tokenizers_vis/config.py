"""The constructor is the config: a table of plain values becomes an object, strictly and with its types checked.

``build(cls, table)`` binds the table to the signature of ``cls``. An unknown key, a missing one or a wrong type is a
``ConfigError`` that names the key and what is allowed. A parameter annotated with a class is built from a nested table;
an abstract class that has ``kinds()`` lets the table choose by ``kind = "name"``, or ``kind = "package.module:Class"``
for a part that lives outside this project.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import json
import re
import tomllib
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

T = TypeVar("T")


class ConfigError(ValueError):
    """A config that does not fit what it configures."""


def did_you_mean(word: object, allowed: Iterable[str]) -> str:
    """`` Did you mean 'x'?`` for the nearest allowed word, or nothing."""
    near = difflib.get_close_matches(str(word), list(allowed), n=1, cutoff=0.5)
    return f" Did you mean {near[0]!r}?" if near else ""


def build(cls: Callable[..., T], table: Mapping[str, Any], where: str = "") -> T:
    """Calls ``cls`` with the values of ``table``.

    cls: a class, a dataclass, or an abstract class with ``kinds()``.
    table: plain values (bool, int, float, str, lists, tables), as TOML or JSON give them.
    where: the key under which the table stands, for messages.

    Raises ``ConfigError``.
    """
    if not isinstance(table, Mapping):
        raise ConfigError(f"{where or cls.__name__} is a table of options, got {table!r}")
    table = dict(table)
    if inspect.isabstract(cls) and hasattr(cls, "kinds"):
        cls = _choose(cls, table, where)
    options = _options(cls)
    prefix = f"{where}." if where else ""
    for key in table:
        if key not in options:
            raise ConfigError(
                f"{prefix}{key}: {cls.__name__} has no option {key!r}.{did_you_mean(key, options)} "
                f"It takes: {', '.join(options) or 'nothing'}."
            )
    missing = [key for key, (_, required) in options.items() if required and key not in table]
    if missing:
        raise ConfigError(f"{where or cls.__name__}: {cls.__name__} needs {', '.join(missing)}")
    values = {key: coerce(value, options[key][0], prefix + key) for key, value in table.items()}
    try:
        return cls(**values)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{where or cls.__name__}: {error}") from error


def coerce(value: Any, annotation: Any, where: str) -> Any:
    """``value`` as the annotated type, or ``ConfigError``. An int serves as a float; nothing else is converted."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Any or annotation is inspect.Parameter.empty:
        return value
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        choices = [arg for arg in args if arg is not type(None)]
        for choice in choices[:-1]:
            try:
                return coerce(value, choice, where)
            except ConfigError:
                continue
        return coerce(value, choices[-1], where)
    if origin is Literal:
        # Types too: True == 1 == 1.0.
        if not any(value == arg and type(value) is type(arg) for arg in args):
            raise ConfigError(f"{where} is one of {', '.join(map(repr, args))}; got {value!r}")
        return value
    if origin in (tuple, list):
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{where} is a list, got {value!r}")
        inner = args if origin is tuple and args[-1] is not Ellipsis else (args[0],) * len(value)
        if len(inner) != len(value):
            raise ConfigError(f"{where} is a list of {len(inner)}, got {len(value)}: {value!r}")
        return origin(coerce(v, a, f"{where}[{i}]") for i, (v, a) in enumerate(zip(value, inner, strict=True)))
    if origin in (dict, Mapping) or annotation in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where} is a table, got {value!r}")
        inner = args[1] if args else Any
        return {key: coerce(v, inner, f"{where}.{key}") for key, v in value.items()}
    if annotation is Path and isinstance(value, str):
        return Path(value)
    if annotation is float and type(value) is int:
        return float(value)
    if annotation in (int, float, str, bool, Path):
        if type(value) is not annotation and not (annotation is Path and isinstance(value, Path)):
            raise ConfigError(f"{where} is {_name(annotation)}, got {value!r} ({type(value).__name__})")
        return value
    if isinstance(annotation, type):
        return value if isinstance(value, annotation) else build(annotation, value, where)
    raise ConfigError(f"{where}: a config cannot hold {annotation}")


def read_toml(path: str | Path) -> dict[str, Any]:
    """The tables of a TOML file, or ``ConfigError`` that names the file and the line."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"there is no file {path}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error


def override(table: Mapping[str, Any], assignments: Iterable[str]) -> dict[str, Any]:
    """A copy of ``table`` with ``key.sub=value`` set; values are TOML, a bare word is a string.

    ``key.0.sub=value`` reaches into the first table of a list. Raises ``ConfigError`` for a text without ``=``, a path
    through something that is no table or list, and a place that a list does not have.
    """
    result = _copy(table)
    for text in assignments:
        path, equals, raw = text.partition("=")
        if not equals or not path.strip():
            raise ConfigError(f"an override reads key.sub=value, got {text!r}")
        try:
            read = tomllib.loads(f"v = {raw}")
        except tomllib.TOMLDecodeError:
            read = {}
        # A text of several lines can read as several assignments; it is meant as one value.
        value = read["v"] if read.keys() == {"v"} else raw.strip()
        *parents, last = path.strip().split(".")
        node = result
        for key in parents:
            node = node[_place(node, key, path)] if isinstance(node, list) else node.setdefault(key, {})
            if not isinstance(node, (dict, list)):
                raise ConfigError(f"{path}: {key!r} is a value, not a table")
        node[_place(node, last, path) if isinstance(node, list) else last] = value
    return result


def to_toml(table: Mapping[str, Any]) -> str:
    """A nested table of plain values as TOML text; ``None`` values are left out."""
    return "\n".join(_toml_lines(table, ())).lstrip("\n") + "\n"


def _choose(cls: Any, table: dict[str, Any], where: str) -> Any:
    kinds = cls.kinds()
    kind = table.pop("kind", None)
    place = f"{where}.kind" if where else "kind"
    if kind is None:
        raise ConfigError(f"{where or cls.__name__} needs a kind: {', '.join(kinds)}")
    if isinstance(kind, str) and kind in kinds:
        return kinds[kind]
    if isinstance(kind, str) and ":" in kind:
        module, _, name = kind.partition(":")
        try:
            found = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, TypeError, ValueError) as error:
            raise ConfigError(f"{place}: cannot import {kind!r}: {error}") from error
        if not (isinstance(found, type) and issubclass(found, cls)) or inspect.isabstract(found):
            raise ConfigError(f"{place}: {kind!r} is not a {cls.__name__} that can be built")
        return found
    raise ConfigError(
        f"{place}: there is no {cls.__name__.lower()} {kind!r}.{did_you_mean(kind, kinds)} "
        f"There are: {', '.join(kinds)}; or give 'package.module:Class'."
    )


def _options(cls: Any) -> dict[str, tuple[Any, bool]]:
    """name -> (annotation, required) of everything that ``cls`` can be called with."""
    if is_dataclass(cls):
        hints = typing.get_type_hints(cls)
        return {
            f.name: (hints[f.name], f.default is MISSING and f.default_factory is MISSING)
            for f in fields(cls)
            if f.init
        }
    function = cls.__init__ if isinstance(cls, type) else cls
    hints = typing.get_type_hints(function)
    parameters = inspect.signature(cls).parameters.values()
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return {p.name: (hints.get(p.name, Any), p.default is p.empty) for p in named}


def _name(annotation: type) -> str:
    return {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}.get(annotation, "a path")


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copy(inner) for key, inner in value.items()}
    return [_copy(inner) for inner in value] if isinstance(value, list) else value


def _place(items: list[Any], key: str, path: str) -> int:
    if not key.isdecimal() or int(key) >= len(items):
        raise ConfigError(f"{path}: {key!r} is no place of the list before it, which has {len(items)}, counted from 0")
    return int(key)


def _toml_lines(table: Mapping[str, Any], path: tuple[str, ...]) -> list[str]:
    plain = {k: v for k, v in table.items() if v is not None and not isinstance(v, Mapping)}
    nested = {k: v for k, v in table.items() if isinstance(v, Mapping)}
    lines = ["", f"[{'.'.join(map(_toml_key, path))}]"] if path and (plain or not nested) else []
    lines += [f"{_toml_key(key)} = {_toml_value(value)}" for key, value in plain.items()]
    for key, value in nested.items():
        lines += _toml_lines(value, (*path, key))
    return lines


def _toml_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _toml_text(key)


def _toml_text(text: str) -> str:
    # JSON's escapes are TOML's, but for DEL, which JSON leaves bare.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_toml_value(v) for v in value)}]"
    if isinstance(value, Mapping):
        pairs = (f"{_toml_key(k)} = {_toml_value(v)}" for k, v in value.items() if v is not None)
        return f"{{ {', '.join(pairs)} }}"
    return _toml_text(str(value))
