"""A workload as a run gets it: requests, where they come from, and a file to replay them from."""

from __future__ import annotations

import collections
import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flexjax.workload._checks import require_count, require_name
from flexjax.workload.arrivals import Arrival, require_arrival

_FORMAT = "flexjax-workload"
_VERSION = 1
_HEADER = ("format", "version", "name", "seed", "settings", "description")
_FIELDS = tuple(field.name for field in dataclasses.fields(Arrival))


@dataclasses.dataclass(frozen=True)
class Workload:
    """Requests of a run, in order of arrival.

    Attributes:
      name: What people call it.
      arrivals: The requests, at least one; kept as a tuple.
      seed: Seed that they were drawn with; None where nothing was drawn.
      settings: How they came about, as far as JSON can say it; kept as JSON would give it back.

    Raises:
      ValueError: If the name is empty, there is no request, requests are not in order of arrival,
        `seed` is negative or JSON cannot hold `settings`.
    """

    name: str
    arrivals: Sequence[Arrival]
    seed: int | None = None
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        require_name("name", self.name)
        if self.seed is not None:
            require_count("seed", self.seed, at_least=0)
        if not self.arrivals:
            raise ValueError("`arrivals` must hold at least one request; got none.")
        for before, after in zip(self.arrivals, self.arrivals[1:], strict=False):
            if after.arrival_s < before.arrival_s:
                raise ValueError(
                    "`arrivals` must be in order of arrival; got "
                    f"{after.arrival_s} after {before.arrival_s}."
                )
        try:
            settings = json.loads(json.dumps(dict(self.settings), allow_nan=False))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"`settings` must be what JSON can hold ({error}); got {self.settings!r}."
            ) from error
        object.__setattr__(self, "arrivals", tuple(self.arrivals))
        object.__setattr__(self, "settings", settings)

    @property
    def description(self) -> dict[str, Any]:
        """What was measured on the requests, as a dict that JSON can hold.

        Keys: `name`, `seed`, `num_requests`, `first_s`, `last_s`, `rate` (requests per second, one
        over the mean gap), `gap_cv` (standard deviation of the gaps over their mean: 1 for a
        Poisson process), `prompt_tokens` and `output_tokens` (`num_known`, `mean`, `min`, `max`,
        `total`; only requests that have the length count), `adapters` and `slo_classes` (requests
        of each name, most first), `num_base` (requests of the base model), `num_without_class`. A
        figure that does not exist, such as the rate of one request, is None.
        """
        times = [arrival.arrival_s for arrival in self.arrivals]
        gaps = [after - before for before, after in zip(times, times[1:], strict=False)]
        span_s = times[-1] - times[0]
        rate = gap_cv = None
        if span_s > 0:
            mean = span_s / len(gaps)
            rate = len(gaps) / span_s
            gap_cv = math.sqrt(math.fsum((gap - mean) ** 2 for gap in gaps) / len(gaps)) / mean
        adapters = [arrival.adapter for arrival in self.arrivals]
        classes = [arrival.slo_class for arrival in self.arrivals]
        return {
            "name": self.name,
            "seed": self.seed,
            "num_requests": len(times),
            "first_s": times[0],
            "last_s": times[-1],
            "rate": rate,
            "gap_cv": gap_cv,
            "prompt_tokens": _summary(arrival.prompt_tokens for arrival in self.arrivals),
            "output_tokens": _summary(arrival.output_tokens for arrival in self.arrivals),
            "adapters": _counts(adapters),
            "num_base": adapters.count(None),
            "slo_classes": _counts(classes),
            "num_without_class": classes.count(None),
        }

    def to_jsonl(self, path: str | Path) -> None:
        """Writes one line about the workload and one for each request.

        `from_jsonl` gives back an equal workload: times to the last bit. An existing file is
        replaced.

        Args:
          path: The file, in a directory that exists.

        Raises:
          OSError: If the file cannot be written.
        """
        header = (_FORMAT, _VERSION, self.name, self.seed, self.settings, self.description)
        lines: list[dict[str, Any]] = [dict(zip(_HEADER, header, strict=True))]
        for arrival in self.arrivals:
            values = ((name, getattr(arrival, name)) for name in _FIELDS)
            lines.append({name: value for name, value in values if value is not None})
        text = "".join(json.dumps(line) + "\n" for line in lines)
        Path(path).write_text(text, encoding="utf-8", newline="\n")

    @classmethod
    def from_jsonl(cls, path: str | Path) -> Workload:
        """Reads what `to_jsonl` wrote.

        Raises:
          FileNotFoundError: If there is no such file.
          ValueError: If a line cannot be used, or there are more or fewer requests than the first
            line says; the message names file, line and reason.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"Workload {str(path)!r} is not a file.")
        try:
            lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"Workload {str(path)!r} is not UTF-8: {error}.") from error
        header: dict[str, Any] = {}
        arrivals: list[Arrival] = []
        for number, line in enumerate(lines, start=1):
            try:
                if number == 1:
                    header = _header(line)
                else:
                    arrivals.append(_arrival(line))
            except ValueError as error:
                raise ValueError(f"{path}:{number}: {error}") from error
        num_requests = header["description"]["num_requests"]
        if len(arrivals) != num_requests:
            raise ValueError(
                f"Workload {str(path)!r} must hold {num_requests} requests, as its first line "
                f"says; got {len(arrivals)}."
            )
        try:
            return cls(header["name"], arrivals, header["seed"], header["settings"])
        except ValueError as error:
            raise ValueError(f"Workload {str(path)!r}: {error}") from error


def _summary(values: Iterable[int | None]) -> dict[str, Any] | None:
    known = [value for value in values if value is not None]
    if not known:
        return None
    total = sum(known)
    return {
        "num_known": len(known),
        "mean": total / len(known),
        "min": min(known),
        "max": max(known),
        "total": total,
    }


def _counts(names: list[str | None]) -> dict[str, int]:
    counts = collections.Counter(name for name in names if name is not None)
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _object(line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise ValueError(f"the line must be JSON; {error}.") from error
    if not isinstance(value, dict):
        raise ValueError(f"the line must be a JSON object; got {line[:40]!r}.")
    return value


def _header(line: str) -> dict[str, Any]:
    header = _object(line)
    if header.get("format") != _FORMAT or header.get("version") != _VERSION:
        raise ValueError(
            f'the first line must say "format": "{_FORMAT}" and "version": {_VERSION}; got '
            f"{header.get('format')!r} and {header.get('version')!r}."
        )
    if set(header) != set(_HEADER):
        raise ValueError(f"the first line must have the keys {_HEADER}; got {tuple(header)}.")
    description, settings = header["description"], header["settings"]
    if not isinstance(settings, dict) or not isinstance(description, dict):
        raise ValueError("`settings` and `description` must be JSON objects.")
    require_name("name", header["name"])
    if header["seed"] is not None:
        require_count("seed", header["seed"], at_least=0)
    require_count("num_requests", description.get("num_requests", 0))
    return header


def _arrival(line: str) -> Arrival:
    fields = _object(line)
    unknown = sorted(set(fields) - set(_FIELDS))
    if unknown or "arrival_s" not in fields:
        raise ValueError(
            f"a request must have `arrival_s` and no keys beside {_FIELDS}; got {tuple(fields)}."
        )
    require_arrival(**fields)
    return Arrival(**fields)
