"""Building a configuration from a mapping, and the checks that configurations share."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from moekit.errors import ConfigError

__all__ = ["check", "choice", "from_dict", "positive"]

C = TypeVar("C")


def from_dict(cls: type[C], values: Mapping[str, Any], *, source: str = "configuration") -> C:
    """Build the configuration class `cls` from a mapping; unknown and missing keys are refused.

    Args:
        cls: one of the configuration dataclasses.
        values: field names to values; lists become tuples, mappings become nested configurations.
        source: what to call the mapping in an error message (a file name, say).
    Raises:
        ConfigError: for a key that is no field, a required field that is missing, or a bad value.

    >>> from moekit.config import SamplingConfig
    >>> from_dict(SamplingConfig, {"temperature": 0.5}).temperature
    0.5
    >>> from_dict(SamplingConfig, {"temprature": 0.5})
    Traceback (most recent call last):
    ...
    moekit.errors.ConfigError: configuration: unknown key 'temprature' for SamplingConfig; did you mean 'temperature'?
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(sorted(fields))}"
            raise ConfigError(f"{source}: unknown key {key!r} for {cls.__name__}; {hint}")
    missing = [
        f.name
        for f in fields.values()
        if f.name not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"{source}: {cls.__name__} needs {', '.join(missing)}")
    hints = typing.get_type_hints(cls)
    return cls(**{key: _value(hints[key], value, f"{source}.{key}") for key, value in values.items()})


def _value(hint: Any, value: Any, source: str) -> Any:
    """A mapping as the configuration class that the field's type names, a list as a tuple, the rest as it is.

    So is a mapping where the type allows one: then the configuration itself knows what to make of it.
    """
    if isinstance(value, Mapping) and any(typing.get_origin(part) is Mapping for part in typing.get_args(hint)):
        return value
    nested = next((cls for cls in _parts(hint) if dataclasses.is_dataclass(cls)), None)
    if isinstance(value, Mapping) and nested is not None:
        return from_dict(nested, value, source=source)
    if isinstance(value, list | tuple):
        return tuple(_value(hint, item, f"{source}[{number}]") for number, item in enumerate(value))
    return value


def _parts(hint: Any) -> list[type]:
    """The classes that a type is made of: those of `tuple[A, ...] | None` are A and NoneType."""
    arguments = typing.get_args(hint)
    return [cls for argument in arguments for cls in _parts(argument)] if arguments else [hint]


def check(ok: bool, message: str) -> None:
    """Raise `ConfigError` with the message unless `ok`."""
    if not ok:
        raise ConfigError(message)


def positive(config: object, *names: str) -> None:
    """Each named field is a whole number of at least 1."""
    for name in names:
        value = getattr(config, name)
        ok = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        check(ok, f"{name} must be a whole number of at least 1, not {value!r}")


def choice(config: object, name: str, choices: tuple[str, ...]) -> None:
    """The field's value is one of the choices."""
    value = getattr(config, name)
    check(value in choices, f"{name} must be one of {', '.join(choices)}, not {value!r}")
