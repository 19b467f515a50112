"""Checks that JSON values have the types that a dataclass declares."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any

from sicot_jax.common.text import one_line


def check_field_types(kind: type, stored: Mapping[str, Any]) -> None:
    """Checks the fields of a dataclass that was stored as JSON.

    Fields of types that JSON does not have, such as arrays, are left to the caller.

    Args:
      kind: the dataclass.
      stored: field name -> value.

    Raises:
      TypeError: a field is missing or unknown, or its value is of another type.
    """
    fields = {field.name: field for field in dataclasses.fields(kind)}
    if unknown := sorted(set(stored) - set(fields)):
        raise TypeError(f"unknown field {one_line(repr(unknown[0]), 40)}")
    declared = typing.get_type_hints(kind)
    for name, field in fields.items():
        if name not in stored:
            if field.default is dataclasses.MISSING:
                raise TypeError(f"no field {name}")
        elif not _has_type(stored[name], declared[name]):
            raise TypeError(f"{name}={one_line(repr(stored[name]), 40)}, wanted {field.type}")


def _has_type(value: Any, wanted: Any) -> bool:
    """Whether a JSON value has a type; True for types that JSON does not have."""
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    if origin is types.UnionType:
        return any(_has_type(value, one) for one in arguments)
    if origin in (list, tuple):  # of a tuple, those of any length: tuple[str, ...]
        return isinstance(value, list) and all(_has_type(item, arguments[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(
            _has_type(item, arguments[1]) for item in value.values()
        )
    if wanted is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if wanted is float:  # 1.0 may be written as 1; a longer number fits into no float
        return isinstance(value, float) or (_has_type(value, int) and abs(value) < 2**63)
    if wanted in (str, types.NoneType):
        return isinstance(value, wanted)
    return True
