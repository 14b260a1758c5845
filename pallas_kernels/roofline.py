"""The least time that a computation can take, from the bytes and FLOPs that its shapes ask for."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a device reaches at best.

    Attributes:
      bytes_per_s: To and from its memory, in a large copy.
      flops_per_s: Of a large bfloat16 product.
    """

    bytes_per_s: float
    flops_per_s: float


LIMITS = {
    "h200": Limits(4.3e12, 790e12),
    "h100": Limits(3.0e12, 790e12),
    "a100": Limits(1.83e12, 250e12),
}
"""By device. The H200's are measured; the others are the same share of their data sheets (0.9 of
the bandwidth, 0.8 of the dense bfloat16 rate)."""


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a computation must do.

    Attributes:
      flops: Multiplications and additions.
      num_bytes: Bytes that cross the device's memory.
    """

    flops: float
    num_bytes: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.num_bytes + other.num_bytes)

    def __mul__(self, times: float) -> Cost:
        return Cost(self.flops * times, self.num_bytes * times)


def floor_s(cost: Cost, device: str) -> float:
    """Seconds below which no program can do this: memory and arithmetic at full rate, overlapped.

    Raises:
      ValueError: If nothing is known of the device.
    """
    if device not in LIMITS:
        raise ValueError(f"`device` must be one of {', '.join(sorted(LIMITS))}; got {device!r}.")
    limits = LIMITS[device]
    return max(cost.num_bytes / limits.bytes_per_s, cost.flops / limits.flops_per_s)


def is_memory_bound(cost: Cost, device: str) -> bool:
    """Whether memory, not arithmetic, sets the floor."""
    limits = LIMITS[device]
    return cost.num_bytes / limits.bytes_per_s >= cost.flops / limits.flops_per_s
