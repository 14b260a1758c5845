"""Which implementation of an op runs.

`implementation=None` takes the first one that can run on this device; a named one never falls
back. A backend that cannot run what it is given raises `NotImplementedError`; only this file
catches it, and only for None.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


def dispatch(
    op: str,
    implementations: Mapping[str, Callable[..., Any]],
    implementation: str | None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Calls one of `implementations`, ordered by preference, with the arguments given.

    Raises:
      ValueError: If `implementation` names none of them.
      NotImplementedError: If a named implementation, or every one, cannot run this.
    """
    if implementation is not None:
        if implementation not in implementations:
            names = ", ".join(implementations)
            raise ValueError(
                f"`implementation` of {op} must be None or one of {names}; got {implementation!r}."
            )
        return implementations[implementation](*args, **kwargs)
    reasons = []
    for name, function in implementations.items():
        try:
            return function(*args, **kwargs)
        except NotImplementedError as error:
            reasons.append(f"{name}: {error}")
    raise NotImplementedError(f"No implementation of {op} can run this ({'; '.join(reasons)}).")
