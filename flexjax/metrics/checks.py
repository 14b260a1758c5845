"""The form of every complaint about a value."""

from __future__ import annotations


def require(is_right: bool, name: str, rule: str, value: object) -> None:
    """Refuses a value.

    Raises:
      ValueError: If `is_right` is false: "`name` must be `rule`; got `value`.".
    """
    if not is_right:
        raise ValueError(f"`{name}` must be {rule}; got {value!r}.")
