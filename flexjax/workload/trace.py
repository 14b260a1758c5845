"""Traces of arrivals, read from files."""

from __future__ import annotations

import dataclasses
import datetime
import math
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Literal

from flexjax.workload._checks import require_count, require_names
from flexjax.workload.arrivals import Arrival

TraceFormat = Literal["flexjax", "azure", "burstgpt", "plain"]

_TIMESTAMP = re.compile(
    r"(\d{4}-\d\d-\d\d)[ T](\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?(Z|[+-]\d\d:\d\d)?", re.ASCII
)
_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)


@dataclasses.dataclass(frozen=True)
class _Layout:
    """Columns of a format, by their names in the header.

    Attributes:
      format: The format.
      time: Column of the arrival.
      prompt: Column of the prompt's tokens; None where there are only times.
      output: Column of the output's tokens; None where there are only times.
      columns: All columns that a file must have.
      ignored: Columns that a file may have beside them.
    """

    format: TraceFormat
    time: str
    prompt: str | None
    output: str | None
    columns: tuple[str, ...]
    ignored: tuple[str, ...] = ()


_PLAIN = _Layout("plain", "arrival_s", None, None, ("arrival_s",))
_LAYOUTS = (
    _Layout(
        "flexjax",
        "arrival_s",
        "context_tokens",
        "generated_tokens",
        ("arrival_s", "context_tokens", "generated_tokens"),
    ),
    _Layout(
        "azure",
        "TIMESTAMP",
        "ContextTokens",
        "GeneratedTokens",
        ("TIMESTAMP", "ContextTokens", "GeneratedTokens"),
    ),
    _Layout(
        "burstgpt",
        "Timestamp",
        "Request tokens",
        "Response tokens",
        ("Timestamp", "Model", "Request tokens", "Response tokens", "Total tokens", "Log Type"),
        ("Session ID", "Elapsed time"),
    ),
)


@dataclasses.dataclass(frozen=True)
class Trace:
    """What a file held.

    Attributes:
      arrivals: Requests in order of arrival, at least one.
      format: What the header said.
      num_failures: Rows without output that were left out, as asked.
      num_filtered: Rows of other models or log types that were left out, as asked.
    """

    arrivals: tuple[Arrival, ...]
    format: TraceFormat
    num_failures: int
    num_filtered: int


def load_trace(path: str | Path, max_requests: int | None = None) -> list[Arrival]:
    """Reads all requests of a trace; `read_trace` with nothing left out.

    Args:
      path: The file, UTF-8, in any of the formats of `read_trace`.
      max_requests: Read this many requests at most; None for all. What follows is not read.

    Raises:
      FileNotFoundError: If there is no such file.
      ValueError: As `read_trace`.
    """
    return list(read_trace(path, max_requests).arrivals)


def read_trace(
    path: str | Path,
    max_requests: int | None = None,
    *,
    leave_out_failures: bool = False,
    models: Collection[str] | None = None,
    log_types: Collection[str] | None = None,
) -> Trace:
    """Reads a trace in the format that its first line tells.

      flexjax    CSV, `arrival_s,context_tokens,generated_tokens`; seconds
      azure      CSV, `TIMESTAMP,ContextTokens,GeneratedTokens` (Azure LLM inference traces of 2023
                 and 2024); dates and times, of which the first becomes 0
      burstgpt   CSV, `Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type`, in
                 any order and possibly with `Session ID` and `Elapsed time`; seconds
      plain      no header, one arrival time a line; seconds

    Times must not decrease. Blank lines are skipped. Nothing else is left out unless asked for:
    a row without output tokens, which is a failed request, is an error.

    Args:
      path: The file, UTF-8.
      max_requests: Read this many requests at most; None for all. What follows is not read.
      leave_out_failures: Leave out and count rows with 0 output tokens.
      models: BurstGPT only: keep the rows of these models; None for all.
      log_types: BurstGPT only: keep the rows of these log types; None for all.

    Raises:
      FileNotFoundError: If there is no such file.
      ValueError: If `max_requests` is below 1, a filter is a single text or given for a format
        without its column, no request is left, or a line cannot be used: the message names file,
        line and reason.
    """
    path = Path(path)
    if max_requests is not None:
        require_count("max_requests", max_requests)
    for name, kept in (("models", models), ("log_types", log_types)):
        if kept is not None:
            require_names(name, kept)
    if not path.is_file():
        raise FileNotFoundError(f"Trace {str(path)!r} is not a file.")
    reader = _Reader(leave_out_failures, {"Model": models, "Log Type": log_types})
    arrivals: list[Arrival] = []
    for number, line in _lines(path):
        try:
            arrival = reader.read(line)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}.") from error
        if arrival is not None:
            arrivals.append(arrival)
        if len(arrivals) == max_requests:
            break
    if not arrivals:
        raise ValueError(
            f"Trace {str(path)!r} holds no request; {reader.num_failures} failures and "
            f"{reader.num_filtered} rows of other models or log types were left out."
        )
    format_ = (reader.layout or _PLAIN).format
    return Trace(tuple(arrivals), format_, reader.num_failures, reader.num_filtered)


class _Reader:
    """Turns one line after the other into requests."""

    def __init__(
        self, leave_out_failures: bool, filters: dict[str, Collection[str] | None]
    ) -> None:
        self.layout: _Layout | None = None
        self.num_failures = 0
        self.num_filtered = 0
        self._leave_out_failures = leave_out_failures
        self._filters = {name: kept for name, kept in filters.items() if kept is not None}
        self._header: list[str] = []
        self._last: tuple[int | float, str | float] = (-math.inf, "")
        self._first_ns: int | None = None

    def read(self, line: str) -> Arrival | None:
        """Returns the line's request; None for a header and what is left out.

        Raises:
          ValueError: If the line cannot be used.
        """
        fields = [field.strip() for field in line.split(",")]
        if self.layout is None and self._begin(fields):
            return None
        if len(fields) != len(self._header):
            names = ", ".join(self._header)
            raise ValueError(f"expected {len(self._header)} fields ({names}); got {len(fields)}")
        layout = self.layout or _PLAIN
        row = dict(zip(self._header, fields, strict=True))
        time_s = self._time(layout, row[layout.time])
        if any(row[name] not in kept for name, kept in self._filters.items()):
            self.num_filtered += 1
            return None
        if layout.prompt is None or layout.output is None:
            return Arrival(time_s)
        output_tokens = _tokens(layout.output, row[layout.output])
        if output_tokens == 0:
            if not self._leave_out_failures:
                raise ValueError(
                    f"`{layout.output}` must be an integer >= 1; got '0', a failed request "
                    "(`leave_out_failures` leaves such rows out)"
                )
            self.num_failures += 1
            return None
        return Arrival(time_s, _tokens(layout.prompt, row[layout.prompt], 1), output_tokens)

    def _begin(self, fields: list[str]) -> bool:
        """Finds the layout from the first line; whether that line is a header."""
        self.layout = next((layout for layout in _LAYOUTS if _fits(layout, fields)), _PLAIN)
        is_header = self.layout is not _PLAIN
        if not is_header and len(fields) > 1:
            headers = "; ".join(",".join(layout.columns) for layout in _LAYOUTS)
            raise ValueError(
                f"a file of several columns must begin with the header of a known format: {headers}"
            )
        self._header = fields if is_header else list(_PLAIN.columns)
        missing = [name for name in self._filters if name not in self._header]
        if missing:
            raise ValueError(
                f"rows can only be chosen by a column that the file has; got a filter for "
                f"{', '.join(missing)} in a file of the {self.layout.format} format"
            )
        return is_header

    def _time(self, layout: _Layout, text: str) -> float:
        """Seconds, checked not to decrease."""
        if layout.format == "azure":
            moment_ns = _nanoseconds(text)
            self._first_ns = moment_ns if self._first_ns is None else self._first_ns
            self._require_later(moment_ns, text)
            return (moment_ns - self._first_ns) / 1e9
        time_s = _seconds(layout.time, text)
        self._require_later(time_s, time_s)
        return time_s

    def _require_later(self, value: int | float, shown: str | float) -> None:
        last, last_shown = self._last
        if value < last:
            raise ValueError(f"arrival times must not decrease; got {shown} after {last_shown}")
        self._last = (value, shown)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines that are not blank, numbered from 1, read as they are needed: traces can be large."""
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        try:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line
        except UnicodeDecodeError as error:
            raise ValueError(f"Trace {str(path)!r} is not UTF-8: {error}.") from error


def _fits(layout: _Layout, fields: list[str]) -> bool:
    if not layout.ignored:
        return tuple(fields) == layout.columns
    is_complete = set(layout.columns) <= set(fields) <= {*layout.columns, *layout.ignored}
    return is_complete and len(set(fields)) == len(fields)


def _seconds(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"`{name}` must be a number >= 0; got {text!r}")
    return value


def _nanoseconds(text: str) -> int:
    """Nanoseconds since 1970; a time without an offset counts as UTC.

    `datetime` would cut the seventh digit that the trace of 2023 has.
    """
    match = _TIMESTAMP.fullmatch(text)
    try:
        if match is None:
            raise ValueError
        date, clock, fraction, offset = match.groups()
        moment = datetime.datetime.fromisoformat(f"{date}T{clock}{offset or 'Z'}")
    except ValueError:
        raise ValueError(
            f"`TIMESTAMP` must be a date and time such as 2023-11-16 18:15:46.6805900; got {text!r}"
        ) from None
    seconds = (moment - _EPOCH) // datetime.timedelta(seconds=1)
    return seconds * 10**9 + int((fraction or "").ljust(9, "0"))


def _tokens(name: str, text: str, at_least: int = 0) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < at_least:
        raise ValueError(f"`{name}` must be an integer >= {max(1, at_least)}; got {text!r}")
    return int(text)
