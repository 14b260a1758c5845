"""Which adapter answers a request, and which latency class it belongs to."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from flexjax.workload._checks import generator, require_names, require_number, require_share
from flexjax.workload.arrivals import Arrival

Popularity = Literal["distinct", "uniform", "zipf", "identical"]

_POPULARITIES = ("distinct", "uniform", "zipf", "identical")


def with_adapters(
    arrivals: Sequence[Arrival],
    adapters: Sequence[str],
    popularity: Popularity,
    seed: int = 0,
    *,
    alpha: float | None = None,
    base_share: float = 0.0,
) -> list[Arrival]:
    """Names the adapter that answers each request; a name it had is replaced.

    Popularity is one of

      distinct    round robin: no two neighbours share an adapter
      uniform     every adapter is drawn with the same probability
      zipf        the k-th adapter is drawn with a probability proportional to `k ** -alpha`
      identical   all requests go to the first adapter

    Args:
      arrivals: Requests.
      adapters: Names, each once; the most popular first for "zipf".
      popularity: How requests are shared out.
      seed: Seed of the draws.
      alpha: Exponent of "zipf"; None for the others.
      base_share: Probability that a request goes to the base model instead, whatever the
        popularity.

    Raises:
      ValueError: If there is no adapter, a name is empty or repeated, `popularity` is unknown,
        `alpha` is missing, negative or without use, `base_share` is not in 0..1 or `seed` is
        negative.
    """
    require_names("adapters", adapters)
    if not adapters:
        raise ValueError("`adapters` must hold at least one name; got none.")
    if len(set(adapters)) < len(adapters):
        raise ValueError(f"`adapters` must not repeat a name; got {list(adapters)}.")
    if popularity not in _POPULARITIES:
        raise ValueError(f"`popularity` must be one of {_POPULARITIES}; got {popularity!r}.")
    if (popularity == "zipf") != (alpha is not None):
        raise ValueError(
            f'`alpha` must be given for "zipf" and for nothing else; got {alpha!r} for '
            f"{popularity!r}."
        )
    if alpha is not None:
        require_number("alpha", alpha)
    require_share("base_share", base_share)
    draws = generator(seed, "adapters")
    is_base = draws.random(len(arrivals)) < base_share
    chosen = _choose(is_base, len(adapters), popularity, alpha, draws)
    return [
        dataclasses.replace(arrival, adapter=None if base else adapters[index])
        for arrival, base, index in zip(arrivals, is_base.tolist(), chosen.tolist(), strict=True)
    ]


def with_slo_classes(
    arrivals: Sequence[Arrival], shares: Mapping[str, float], seed: int
) -> list[Arrival]:
    """Draws the latency class of each request; one it had is replaced.

    Args:
      arrivals: Requests.
      shares: Probability of each class, such as `{"interactive": 0.8, "batch": 0.2}`.
      seed: Seed of the draws.

    Raises:
      ValueError: If there is no class, a name is empty, a share is not in 0..1, the shares do not
        add up to 1 or `seed` is negative.
    """
    require_names("shares", shares)
    for name, share in shares.items():
        require_share(f"shares[{name!r}]", share)
    if not math.isclose(math.fsum(shares.values()), 1.0, abs_tol=1e-9):
        raise ValueError(f"`shares` must add up to 1; got {dict(shares)}.")
    names = list(shares)
    drawn = _draw(np.asarray(list(shares.values())), len(arrivals), generator(seed, "slo classes"))
    return [
        dataclasses.replace(arrival, slo_class=names[index])
        for arrival, index in zip(arrivals, drawn.tolist(), strict=True)
    ]


def _choose(
    is_base: NDArray[np.bool_],
    num_adapters: int,
    popularity: Popularity,
    alpha: float | None,
    draws: np.random.Generator,
) -> NDArray[np.int64]:
    """Index of each request's adapter; it means nothing for requests of the base model."""
    if popularity == "identical":
        return np.zeros(len(is_base), np.int64)
    if popularity == "distinct":  # the base model's requests take no turn
        return (np.cumsum(~is_base) - 1) % num_adapters
    ranks = np.arange(1, num_adapters + 1)
    weights = np.power(ranks, -float(alpha or 0), dtype=np.float64)
    return _draw(weights, len(is_base), draws)


def _draw(weights: NDArray[np.float64], n: int, draws: np.random.Generator) -> NDArray[np.int64]:
    """Draws indices with probabilities proportional to `weights`."""
    return draws.choice(len(weights), n, p=weights / weights.sum())
