"""Checks of arguments and seeded streams of random numbers, shared by this package."""

from __future__ import annotations

import math
import zlib
from typing import Any

import numpy as np


def require_number(name: str, value: Any, *, positive: bool = False) -> None:
    """Raises unless `value` is a finite number >= 0, or > 0 if `positive`."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value < 0 or (positive and value == 0):
        raise ValueError(f"`{name}` must be a number {'>' if positive else '>='} 0; got {value!r}.")


def require_count(name: str, value: Any, at_least: int = 1) -> None:
    """Raises unless `value` is an integer of at least `at_least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
        raise ValueError(f"`{name}` must be an integer >= {at_least}; got {value!r}.")


def require_share(name: str, value: Any) -> None:
    """Raises unless `value` is a number from 0 to 1."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 <= value <= 1:
        raise ValueError(f"`{name}` must be a number from 0 to 1; got {value!r}.")


def require_name(name: str, value: Any) -> None:
    """Raises unless `value` is a text that is not empty."""
    if not isinstance(value, str) or not value:
        raise ValueError(f"`{name}` must be a text that is not empty; got {value!r}.")


def require_names(name: str, values: Any) -> None:
    """Raises if `values` is one text, whose letters would pass for names, or holds an empty one."""
    if isinstance(values, str):
        raise ValueError(f"`{name}` must be a collection of names, not one; got {values!r}.")
    for value in values:
        require_name(name, value)


def generator(seed: int, purpose: str) -> np.random.Generator:
    """A stream of its own for every purpose.

    One seed serves a whole workload; were the streams equal, the same draws would choose a
    request's length and its adapter, and the two would be correlated.

    Raises:
      ValueError: If `seed` is negative.
    """
    require_count("seed", seed, at_least=0)
    return np.random.default_rng([seed, zlib.crc32(purpose.encode())])
