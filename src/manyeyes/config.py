"""Settings: frozen dataclasses, loaded from TOML and overridden by dotted keys, with unknown keys refused."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from manyeyes.errors import ConfigError

T = TypeVar("T")


def load_toml(path: str | Path, what: str = "recipe") -> dict[str, Any]:
    """Read a TOML file: a recipe, or `what` it is called in the error.

    Raises:
        ConfigError: the file is missing or is not TOML.
    """
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"There is no {what} at {path}. Give the path of a .toml file"
            f"{', e.g. one under configs/' if what == 'recipe' else ''}."
        ) from None
    except OSError as error:
        raise ConfigError(f"{path} can't be read: {error.strerror}.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not a valid TOML file: {error}") from None


def override(settings: Mapping[str, Any], assignments: Iterable[str]) -> dict[str, Any]:
    """Return a copy of nested `settings` with `a.b=value` assignments applied; values are written as in TOML.

    A value that TOML can't read is taken as a string, so that `model.name=cnn` works unquoted.
    """
    result: dict[str, Any] = copy.deepcopy(dict(settings))
    for assignment in assignments:
        key, separator, text = assignment.partition("=")
        if not separator or not key.strip():
            raise ConfigError(f"{assignment!r} is not an assignment. Write key=value, e.g. optimizer.learning_rate=0.1")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text
        *parents, leaf = key.strip().split(".")
        node = result
        for parent in parents:
            child = node.setdefault(parent, {})
            if not isinstance(child, dict):
                raise ConfigError(f"{key} can't be set: {parent} is a value, not a section.")
            node = child
        node[leaf] = value
    return result


def from_dict(cls: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """Build the (nested) dataclass `cls` from a mapping.

    Raises:
        ConfigError: an unknown key (the nearest known one is suggested), a missing one, or a value of the wrong type.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where or cls.__name__} must be a section of settings, got {values!r}.")
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    arguments = {}
    for key, value in values.items():
        path = f"{where}.{key}" if where else key
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f" Did you mean {near[0]}?" if near else f" Known: {', '.join(fields)}."
            raise ConfigError(f"Unknown setting {path}.{hint}")
        arguments[key] = _coerce(hints[key], value, path)
    missing = [key for key, field in fields.items() if key not in values and _is_required(field)]
    if missing:
        raise ConfigError(f"{where or cls.__name__} lacks {', '.join(missing)}.")
    try:
        return cls(**arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where or cls.__name__}: {error}") from None


def flatten(section: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return the properties of Java programs that a section holds: dots and sections mean the same, true is "true"."""
    flat: dict[str, str] = {}
    for name, value in section.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = str(value).lower() if isinstance(value, bool) else str(value)
    return flat


def to_dict(settings: Any) -> dict[str, Any]:
    """Return a dataclass as plain nested dictionaries and lists, ready for JSON."""
    return dataclasses.asdict(settings)


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _coerce(hint: Any, value: Any, path: str) -> Any:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in typing.get_args(hint):
            return None
        errors = []
        for option in typing.get_args(hint):
            if option is type(None):
                continue
            try:
                return _coerce(option, value, path)
            except ConfigError as error:
                errors.append(error)
        raise errors[-1]
    if origin is typing.Literal:
        choices = typing.get_args(hint)
        if value not in choices:
            raise ConfigError(f"{path}={value!r} is not one of {', '.join(map(str, choices))}.")
        return value
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else from_dict(hint, value, path)  # type: ignore[arg-type]
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{path}={value!r} must be a list.")
        options = typing.get_args(hint)
        if len(options) == 2 and options[1] is Ellipsis:
            return tuple(_coerce(options[0], item, f"{path}[{i}]") for i, item in enumerate(value))
        if len(options) != len(value):
            raise ConfigError(f"{path}={value!r} must have {len(options)} values.")
        pairs = enumerate(zip(options, value, strict=True))
        return tuple(_coerce(option, item, f"{path}[{i}]") for i, (option, item) in pairs)
    if origin is list:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{path}={value!r} must be a list.")
        (option,) = typing.get_args(hint)
        return [_coerce(option, item, f"{path}[{i}]") for i, item in enumerate(value)]
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{path}={value!r} must be a section.")
        _, option = typing.get_args(hint)
        return {key: _coerce(option, item, f"{path}.{key}") for key, item in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint in (int, float, str, bool) and (not isinstance(value, hint) or (hint is int and isinstance(value, bool))):
        raise ConfigError(f"{path}={value!r} must be of type {hint.__name__}.")
    return value
