"""Learning-rate schedules, on the host. Imports no jax."""

from __future__ import annotations

import math

from flexjax.config import FinetuneConfig


def learning_rate(config: FinetuneConfig, step: int, total_steps: int) -> float:
    """Learning rate of optimizer step `step`, counted from 0.

    Rises linearly from zero over ceil(warmup_ratio * total_steps) steps (none for "constant"
    without warm-up), then stays, or falls to zero linearly or along half a cosine. The numbers are
    those of `transformers.get_scheduler`.

    Args:
      config: Peak, schedule and warm-up.
      step: Steps taken before this one.
      total_steps: Steps of the whole job.
    """
    warmup = math.ceil(config.warmup_ratio * total_steps)
    if config.schedule == "constant":
        warmup = 0
    if step < warmup:
        return config.learning_rate * step / max(1, warmup)
    if config.schedule == "constant":
        return config.learning_rate
    progress = (step - warmup) / max(1, total_steps - warmup)
    if config.schedule == "linear":
        return config.learning_rate * max(0.0, 1.0 - progress)
    return config.learning_rate * max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))
