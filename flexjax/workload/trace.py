"""Traces of arrivals, read from files."""

from __future__ import annotations

import math
from pathlib import Path

from flexjax.workload.arrivals import Arrival

_COLUMNS = ("arrival_s", "context_tokens", "generated_tokens")


def load_trace(path: str | Path, max_requests: int | None = None) -> list[Arrival]:
    """Reads a trace.

    Either a CSV file with the header `arrival_s,context_tokens,generated_tokens`, or a plain file
    with one arrival time (seconds) a line. Times must not decrease. Blank lines are skipped.

    Args:
      path: The file, UTF-8.
      max_requests: Read this many requests at most; None for all. What follows is not read.

    Raises:
      FileNotFoundError: If there is no such file.
      ValueError: If `max_requests` is below 1, the file holds no request, or a line cannot be
        used: the message names file, line and reason.
    """
    path = Path(path)
    if max_requests is not None and max_requests < 1:
        raise ValueError(f"`max_requests` must be an integer >= 1; got {max_requests!r}.")
    if not path.is_file():
        raise FileNotFoundError(f"Trace {str(path)!r} is not a file.")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"Trace {str(path)!r} is not UTF-8: {error}.") from error
    arrivals: list[Arrival] = []
    has_columns = False
    is_first = True
    for number, line in enumerate(lines, start=1):
        fields = [field.strip() for field in line.split(",")]
        if fields == [""]:
            continue
        if is_first and tuple(fields) == _COLUMNS:
            is_first, has_columns = False, True
            continue
        is_first = False
        try:
            arrival = _parse(fields, has_columns)
            if arrivals and arrival.arrival_s < arrivals[-1].arrival_s:
                raise ValueError(
                    f"arrival times must not decrease; got {arrival.arrival_s} after "
                    f"{arrivals[-1].arrival_s}"
                )
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}.") from error
        arrivals.append(arrival)
        if len(arrivals) == max_requests:
            break
    if not arrivals:
        raise ValueError(f"Trace {str(path)!r} holds no request.")
    return arrivals


def _parse(fields: list[str], has_columns: bool) -> Arrival:
    if not has_columns and len(fields) > 1:
        raise ValueError(
            f"a file of several columns must begin with the header {','.join(_COLUMNS)}"
        )
    if has_columns and len(fields) != len(_COLUMNS):
        raise ValueError(
            f"expected {len(_COLUMNS)} fields ({', '.join(_COLUMNS)}); got {len(fields)}"
        )
    time_s = _number(fields[0])
    if not has_columns:
        return Arrival(time_s)
    return Arrival(time_s, *(_count(n, v) for n, v in zip(_COLUMNS[1:], fields[1:], strict=True)))


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"`arrival_s` must be a number >= 0; got {text!r}")
    return value


def _count(name: str, text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise ValueError(f"`{name}` must be an integer >= 1; got {text!r}")
    return int(text)
