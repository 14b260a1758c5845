"""A measured run with all its records, and the files that hold runs.

A file holds one JSON object a line: a header, then the records, then a summary where there is one;
several runs may follow one another.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flexjax.metrics import json_lines
from flexjax.metrics.checks import require
from flexjax.metrics.records import RequestRecord, StepRecord, TrainRecord

HEADER_KEYS = (
    "command",
    "device",
    "versions",
    "commit",
    "seed",
    "policy",
    "rate",
    "workload",
    "model",
    "config",
)
"""What the header of a run must say."""

_FORMAT = 1
_TIMES = ("begin_s", "end_s", "measured_until_s")
_RESERVED = ("format", *_TIMES)


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """A run of one policy under one load.

    Attributes:
      header: JSON values under `HEADER_KEYS` at least. `policy`, `workload` and `model` are names
        (the workload's without the rate); `rate` is the offered load in requests per second, or
        None where there is none; `device` is a name, or fields with `kind` in them.
      begin_s: When the first request could be due.
      end_s: When recording ended.
      requests: Every request that was due.
      steps: Steps of the engine, in order; may be empty.
      training: Optimizer steps, in order; may be empty.
      measured_until_s: End of the time that rates are averaged over; None for the rule of
        `report.measured_window`.
      summary: Figures that were saved beside the records, or None.

    Raises:
      ValueError: If the header lacks a key or is not JSON, times run back, or a request's number
        occurs twice.
    """

    header: dict[str, Any]
    begin_s: float
    end_s: float
    requests: tuple[RequestRecord, ...] = ()
    steps: tuple[StepRecord, ...] = ()
    training: tuple[TrainRecord, ...] = ()
    measured_until_s: float | None = None
    summary: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        # As JSON holds them, so that a file gives back what was saved.
        object.__setattr__(self, "header", _checked_header(self.header))
        if self.summary is not None:
            object.__setattr__(self, "summary", _as_json("summary", self.summary))
        is_right = -math.inf < self.begin_s < self.end_s < math.inf
        require(is_right, "end_s", f"finite and > `begin_s`={self.begin_s!r}", self.end_s)
        until = self.measured_until_s
        if until is not None:
            rule = f"in (`begin_s`={self.begin_s!r}, `end_s`={self.end_s!r}]"
            require(self.begin_s < until <= self.end_s, "measured_until_s", rule, until)
        seen: set[int] = set()
        for request in self.requests:
            is_right = request.request_id not in seen
            require(is_right, "request_id", "unique in a run", request.request_id)
            seen.add(request.request_id)

    @property
    def policy(self) -> str:
        """Name of the sharing policy."""
        return self.header["policy"]

    @property
    def rate(self) -> float | None:
        """Offered load, requests per second."""
        return self.header["rate"]

    @property
    def device_name(self) -> str:
        """Name of the device, for people."""
        device = self.header["device"]
        if not isinstance(device, dict):
            return str(device)
        is_cpu = device.get("platform") == "cpu" and device.get("cpu")
        return str(device["cpu"] if is_cpu else device["kind"])

    def save(self, path: Path | str, *, append: bool = False) -> None:
        """Writes the run as JSON lines.

        Args:
          path: File; its folder must be there.
          append: Whether to add to the runs of the file, rather than to replace them.
        """
        with Path(path).open("a" if append else "w", encoding="utf-8") as file:
            times = {name: getattr(self, name) for name in _TIMES}
            row = {"kind": "header", "format": _FORMAT, **times, **self.header}
            file.write(json.dumps(row, allow_nan=False) + "\n")
            for kind, (name, _) in _KINDS.items():
                file.writelines(json_lines.encode(kind, r) + "\n" for r in getattr(self, name))
            if self.summary is not None:
                row = {"kind": "summary", "figures": self.summary}
                file.write(json.dumps(row, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: Path | str) -> RunRecord:
        """Reads a file of one run.

        Raises:
          OSError: If the file cannot be read.
          ValueError: If a line cannot be used (the message names it), or the file does not hold
            exactly one run.
        """
        runs = load_runs(path)
        if len(runs) != 1:
            raise ValueError(f"{path} must hold one run; got {len(runs)}.")
        return runs[0]


_KINDS = {
    "request": ("requests", RequestRecord),
    "step": ("steps", StepRecord),
    "train": ("training", TrainRecord),
}


def load_runs(path: Path | str) -> tuple[RunRecord, ...]:
    """Reads the runs of a file, in its order.

    Raises:
      OSError: If the file cannot be read.
      ValueError: If a line cannot be used; the message names it.
    """
    started: list[tuple[int, dict[str, Any]]] = []
    with Path(path).open("rb") as file:
        for number, line in enumerate(file, start=1):
            with _at(path, number):
                _add_line(started, number, json_lines.parse(line.decode()))
    with _at(path, 1):
        require(bool(started), "kind", "'header'", "an empty file")
    runs = []
    for number, fields in started:
        with _at(path, number):
            runs.append(_build(fields))
    return tuple(runs)


@contextlib.contextmanager
def _at(path: Path | str, number: int) -> Iterator[None]:
    """Puts the place before what was wrong there."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}, line {number}: {error}") from error


def _add_line(started: list[tuple[int, dict[str, Any]]], number: int, row: dict[str, Any]) -> None:
    """Adds a line to the last run, or begins a run with it."""
    kind = row.pop("kind", None)
    kinds = ("header", *_KINDS, "summary")
    require(kind in kinds, "kind", f"one of {', '.join(kinds)}", kind)
    if kind == "header":
        found = row.pop("format", None)
        require(found == _FORMAT, "format", str(_FORMAT), found)
        for name in _TIMES:
            value = row.get(name)
            is_right = type(value) in (int, float) or (name == _TIMES[-1] and value is None)
            require(is_right, name, "a number", value)
        fields = {name: row.pop(name, None) for name in _TIMES}
        _checked_header(row)
        fields |= {"header": row, **{name: [] for name, _ in _KINDS.values()}}
        started.append((number, fields))
        return
    require(bool(started), "kind", "'header' on the first line", kind)
    if kind == "summary":
        is_right = isinstance(row.get("figures"), dict)
        require(is_right, "figures", "an object", row.get("figures"))
        started[-1][1]["summary"] = row["figures"]
        return
    name, cls = _KINDS[str(kind)]
    started[-1][1][name].append(json_lines.decode(cls, row))


def _build(fields: Mapping[str, Any]) -> RunRecord:
    records = {name: tuple(fields[name]) for name, _ in _KINDS.values()}
    return RunRecord(**{**fields, **records})


def _as_json(name: str, value: object) -> Any:
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"`{name}` must hold finite JSON values only; {error}.") from None


def _checked_header(header: Mapping[str, Any]) -> dict[str, Any]:
    """The header as JSON holds it, without the kind of its line."""
    copied = _as_json("header", {key: header[key] for key in header if key != "kind"})
    missing = [key for key in HEADER_KEYS if key not in copied]
    require(not missing, "header", f"a mapping with {', '.join(HEADER_KEYS)}", sorted(copied))
    taken = [key for key in _RESERVED if key in copied]
    require(not taken, "header", f"without the keys {', '.join(_RESERVED)}", taken)
    for key in ("policy", "workload", "model"):
        is_right = isinstance(copied[key], str) and bool(copied[key])
        require(is_right, key, "a name", copied[key])
    rate = copied["rate"]
    is_right = rate is None or (type(rate) in (int, float) and rate > 0)
    require(is_right, "rate", "a number > 0 or None", rate)
    device = copied["device"]
    is_named = isinstance(device, str) or (isinstance(device, dict) and "kind" in device)
    require(is_named, "device", "a name, or fields with `kind`", device)
    return copied
