"""How long a step of each bucket takes. Imports no jax."""

from __future__ import annotations

from flexjax.layout import Bucket

_SMOOTHING = 0.2


class LatencyTable:
    """Measured milliseconds by bucket, smoothed.

    Filled at start by running every bucket once, and corrected while steps run.
    """

    def __init__(self) -> None:
        self._ms: dict[Bucket, float] = {}

    def observe(self, bucket: Bucket, ms: float) -> None:
        """Takes in one measured step."""
        known = self._ms.get(bucket)
        self._ms[bucket] = ms if known is None else known + _SMOOTHING * (ms - known)

    def predict(self, bucket: Bucket) -> float | None:
        """Expected milliseconds, or None if the bucket was never measured."""
        return self._ms.get(bucket)

    def as_dict(self) -> dict[str, float]:
        """Milliseconds by bucket, for reports."""
        return {
            f"decode={b.decode},chunk={b.chunk},window={b.window},layers={b.tile_layers}": ms
            for b, ms in sorted(self._ms.items())
        }
