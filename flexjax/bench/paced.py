"""An engine whose steps last as long as those of a device that is not there.

Everything else is real: requests, host work, batches, tokens. The CPU computes each step ahead of
the time at which the device would have it, and the engine is told no sooner. So the pace does not
depend on what else runs on the machine, as long as the device is slow enough for it to keep up.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from typing import Any

from flexjax.engine.engine import Engine
from flexjax.engine.runner import Handle
from flexjax.scheduler.plan import StepPlan
from flexjax.simulator import DeviceTimes


@dataclasses.dataclass
class Pace:
    """What came of the pacing.

    Attributes:
      num_steps: Steps that ran.
      num_late: Of those, steps that this machine had not computed when the device would have.
    """

    num_steps: int = 0
    num_late: int = 0

    @property
    def late_share(self) -> float:
        """Share of the steps that were late."""
        return self.num_late / self.num_steps if self.num_steps else 0.0


class _Stats:
    """Statistics of an optimizer step that cannot be read before it is done."""

    def __init__(self, stats: Any, free_s: float):
        self._stats = stats
        self._free_s = free_s

    def __getattr__(self, name: str) -> Any:
        _sleep_until(self._free_s)
        return getattr(self._stats, name)


class _PacedHandle(Handle):
    """A step that is done no sooner than `end_s`."""

    end_s: float
    pace: Pace

    @property
    def is_done(self) -> bool:
        """See `Handle.is_done`."""
        return time.perf_counter() >= self.end_s and super().is_done

    def wait(self) -> None:
        """See `Handle.wait`."""
        asked_s = time.perf_counter()
        super().wait()
        self.pace.num_steps += 1
        self.pace.num_late += time.perf_counter() > max(asked_s, self.end_s) + 1e-3
        _sleep_until(self.end_s)


def _sleep_until(time_s: float) -> None:
    left_s = time_s - time.perf_counter()
    if left_s > 0:
        time.sleep(left_s)


@contextlib.contextmanager
def paced(engine: Engine, device: DeviceTimes) -> Iterator[Pace]:
    """Makes an engine's steps last as long as a device's, until the context ends.

    Args:
      engine: Idle, and not driven by a thread.
      device: How long steps take.

    Yields:
      The account of the pacing, kept up while it lasts.
    """
    runner, pace, free_s = engine._runner, Pace(), 0.0
    launch = runner.launch

    def launch_paced(plan: StepPlan) -> Handle:
        nonlocal free_s
        handle = launch(plan)
        ms, tail_ms = device.ms(handle.features), device.tail_ms(handle.features)
        begin_s = max(time.perf_counter(), free_s)
        free_s = begin_s + ms / 1e3
        fields = {f.name: getattr(handle, f.name) for f in dataclasses.fields(Handle)}
        made = _PacedHandle(**fields)
        made.end_s, made.pace = free_s - min(ms, tail_ms) / 1e3, pace
        late: Any = [(step, _Stats(stats, free_s)) for step, stats in handle.optimizer_stats]
        made.optimizer_stats = late
        return made

    runner.launch = launch_paced  # type: ignore[method-assign]
    try:
        yield pace
    finally:
        runner.launch = launch  # type: ignore[method-assign]
