"""Dataclasses as lines of JSON, checked field by field on the way back.

Knows which types a field may have (numbers, text, None, tuples of numbers), not what a record
means; `records` does.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import types
import typing
from typing import Any, TypeVar

_Record = TypeVar("_Record")

_NON_FINITE = ("nan", "inf", "-inf")


def encode(kind: str, record: Any) -> str:
    """One line: the record's fields beside its kind.

    A float that is not finite becomes its name in quotes, for JSON has none.
    """
    row: dict[str, Any] = {"kind": kind}
    for name in _hints(type(record)):
        value = getattr(record, name)
        if isinstance(value, float) and not math.isfinite(value):
            value = str(value)
        row[name] = value
    return json.dumps(row, allow_nan=False)


def decode(cls: type[_Record], row: dict[str, Any]) -> _Record:
    """Builds a record from a line's fields, the kind taken out.

    Raises:
      ValueError: If a field is missing, unknown, of another type, or refused by the record.
    """
    hints = _hints(cls)
    needed = _needed(cls)
    missing = [name for name in needed if name not in row]
    if missing:
        raise ValueError(f"field `{missing[0]}` is missing.")
    values = {}
    for name, value in row.items():
        if name not in hints:
            raise ValueError(f"field `{name}` is unknown.")
        values[name] = _checked(name, value, hints[name])
    return cls(**values)


def parse(text: str) -> dict[str, Any]:
    """Reads one line.

    Raises:
      ValueError: If it is not one JSON object.
    """
    try:
        row = json.loads(text, parse_constant=_refuse)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}.") from None
    if not isinstance(row, dict):
        raise ValueError(f"must be a JSON object; got {text.strip()[:40]!r}.")
    return row


def _refuse(name: str) -> Any:
    raise ValueError(f"numbers must be finite; got {name}.")


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


@functools.cache
def _needed(cls: type) -> tuple[str, ...]:
    return tuple(
        field.name for field in dataclasses.fields(cls) if field.default is dataclasses.MISSING
    )


def _checked(name: str, value: Any, hint: Any) -> Any:
    """The value as the field holds it."""
    optional = isinstance(hint, types.UnionType)
    if optional:
        if value is None:
            return None
        hint = next(part for part in typing.get_args(hint) if part is not types.NoneType)
    if hint is float and isinstance(value, str) and value in _NON_FINITE:
        return float(value)
    if typing.get_origin(hint) is tuple:
        if isinstance(value, list) and all(_is_number(item) for item in value):
            return tuple(value)
        rule = "a list of numbers"
    else:
        is_right, rule = {
            float: (_is_number(value), "a number"),
            int: (type(value) is int, "an integer"),
            str: (isinstance(value, str), "text"),
        }[hint]
        if is_right:
            return value
    raise ValueError(f"`{name}` must be {rule}{' or null' if optional else ''}; got {value!r}.")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)
