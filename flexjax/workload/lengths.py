"""Lengths of prompts, outputs and finetuning samples, drawn or taken from a trace.

A range is kept by drawing again, never by cutting what was drawn: cutting piles requests up at the
limit. Where a range can hardly be met, that is an error.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from flexjax.workload._checks import generator, require_count, require_number
from flexjax.workload.arrivals import Arrival

Lengths = NDArray[np.int64]

_MIN_SHARE = 0.01
_MAX_DRAWS = 1000


@runtime_checkable
class LengthDistribution(Protocol):
    """Distribution of one length."""

    def draw(self, n: int, draws: np.random.Generator) -> Lengths:
        """Returns `n` lengths in tokens, each at least 1."""
        ...


@runtime_checkable
class RequestLengths(Protocol):
    """Distribution of a request's prompt and output."""

    def draw_pairs(self, n: int, draws: np.random.Generator) -> Lengths:
        """Returns `n` rows (prompt tokens, output tokens), each length at least 1."""
        ...


@dataclasses.dataclass(frozen=True)
class ConstantLength:
    """Always the same length.

    Attributes:
      tokens: The length.

    Raises:
      ValueError: If it is below 1.
    """

    tokens: int

    def __post_init__(self) -> None:
        require_count("tokens", self.tokens)

    def draw(self, n: int, draws: np.random.Generator) -> Lengths:
        """Returns `n` lengths; draws nothing."""
        return np.full(n, self.tokens, np.int64)


@dataclasses.dataclass(frozen=True)
class UniformLength:
    """Every length of a range is equally likely.

    Attributes:
      min_tokens: Shortest length.
      max_tokens: Longest length, itself included.

    Raises:
      ValueError: If `min_tokens` is below 1 or `max_tokens` below `min_tokens`.
    """

    min_tokens: int
    max_tokens: int

    def __post_init__(self) -> None:
        require_count("min_tokens", self.min_tokens)
        require_count("max_tokens", self.max_tokens, at_least=self.min_tokens)

    def draw(self, n: int, draws: np.random.Generator) -> Lengths:
        """Returns `n` independent lengths."""
        return draws.integers(self.min_tokens, self.max_tokens, n, np.int64, endpoint=True)


@dataclasses.dataclass(frozen=True)
class LognormalLength:
    """The rounded exponential of a normal variable, drawn again while outside a range.

    Attributes:
      median_tokens: Median before the range is applied.
      sigma: Standard deviation of the logarithm.
      max_tokens: Longest length, itself included.
      min_tokens: Shortest length.

    Raises:
      ValueError: If a value is out of range, or less than one draw of a hundred would be kept.
    """

    median_tokens: float
    sigma: float
    max_tokens: int
    min_tokens: int = 1

    def __post_init__(self) -> None:
        require_number("median_tokens", self.median_tokens, positive=True)
        require_number("sigma", self.sigma, positive=True)
        require_count("min_tokens", self.min_tokens)
        require_count("max_tokens", self.max_tokens, at_least=self.min_tokens)
        if self.share < _MIN_SHARE:
            raise ValueError(
                f"`min_tokens` to `max_tokens` must hold a share of at least {_MIN_SHARE} of the "
                f"distribution; got {self.min_tokens} to {self.max_tokens}, a share of "
                f"{self.share:.2g}."
            )

    @property
    def share(self) -> float:
        """Share of the draws that the range keeps."""
        return self._below(self.max_tokens + 0.5) - self._below(self.min_tokens - 0.5)

    def draw(self, n: int, draws: np.random.Generator) -> Lengths:
        """Returns `n` independent lengths."""
        kept = np.zeros(0, np.int64)
        mean = math.log(self.median_tokens)
        while len(kept) < n:
            num_drawn = math.ceil((n - len(kept)) / self.share)
            more = np.rint(draws.lognormal(mean, self.sigma, num_drawn))
            is_inside = (more >= self.min_tokens) & (more <= self.max_tokens)
            kept = np.concatenate([kept, more[is_inside].astype(np.int64)])
        return kept[:n]

    def _below(self, tokens: float) -> float:
        z = (math.log(tokens) - math.log(self.median_tokens)) / self.sigma
        return math.erfc(-z / math.sqrt(2)) / 2


@dataclasses.dataclass(frozen=True)
class EmpiricalLength:
    """Lengths that were seen, each as often as it was.

    Attributes:
      lengths: What was seen, in tokens.

    Raises:
      ValueError: If there is none or one is below 1.
    """

    lengths: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.lengths:
            raise ValueError("`lengths` must hold at least one length; got none.")
        for length in self.lengths:
            require_count("lengths", length)

    def draw(self, n: int, draws: np.random.Generator) -> Lengths:
        """Returns `n` lengths drawn with replacement."""
        return draws.choice(np.asarray(self.lengths, np.int64), n)


@dataclasses.dataclass(frozen=True)
class IndependentLengths:
    """Prompt and output that have nothing to do with each other.

    Attributes:
      prompt: Distribution of the prompt's length.
      output: Distribution of the output's length.
    """

    prompt: LengthDistribution
    output: LengthDistribution

    def draw_pairs(self, n: int, draws: np.random.Generator) -> Lengths:
        """Returns `n` rows (prompt tokens, output tokens)."""
        return np.stack([self.prompt.draw(n, draws), self.output.draw(n, draws)], axis=1)


@dataclasses.dataclass(frozen=True)
class TraceLengths:
    """Prompt and output of the same request of a trace, so that what ties them together stays.

    Attributes:
      pairs: (prompt tokens, output tokens) of each request.

    Raises:
      ValueError: If there is none or a length is below 1.
    """

    pairs: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        if not self.pairs:
            raise ValueError("`pairs` must hold at least one request; got none.")
        for pair in self.pairs:
            for length in pair:
                require_count("pairs", length)

    @classmethod
    def of(cls, arrivals: Sequence[Arrival]) -> TraceLengths:
        """Takes the lengths of requests, all of which must have both.

        Raises:
          ValueError: If there is no request or one lacks a length.
        """
        pairs = []
        for index, arrival in enumerate(arrivals):
            if arrival.prompt_tokens is None or arrival.output_tokens is None:
                raise ValueError(f"`arrivals` must all have lengths; got {arrival} at {index}.")
            pairs.append((arrival.prompt_tokens, arrival.output_tokens))
        return cls(tuple(pairs))

    def draw_pairs(self, n: int, draws: np.random.Generator) -> Lengths:
        """Returns `n` rows (prompt tokens, output tokens), drawn with replacement."""
        return draws.choice(np.asarray(self.pairs, np.int64), n, axis=0)


def with_lengths(
    arrivals: Sequence[Arrival],
    distribution: RequestLengths,
    seed: int,
    *,
    max_total_tokens: int | None = None,
) -> list[Arrival]:
    """Gives every request a prompt and an output length; those it had are replaced.

    Args:
      arrivals: Requests.
      distribution: What lengths are drawn from.
      seed: Seed of the draws.
      max_total_tokens: Longest prompt and output together; a longer pair is drawn again. None for
        no limit.

    Raises:
      ValueError: If `seed` is negative, `max_total_tokens` below 2, or pairs that fit are so rare
        that a request got none in 1,000 draws.
    """
    draws = generator(seed, "lengths")
    if max_total_tokens is not None:
        require_count("max_total_tokens", max_total_tokens, at_least=2)
    pairs = distribution.draw_pairs(len(arrivals), draws)
    if max_total_tokens is not None:
        pairs = _redraw_long(pairs, distribution, draws, max_total_tokens)
    return [
        dataclasses.replace(arrival, prompt_tokens=prompt, output_tokens=output)
        for arrival, (prompt, output) in zip(arrivals, pairs.tolist(), strict=True)
    ]


def draw_lengths(distribution: LengthDistribution, n: int, seed: int) -> list[int]:
    """Lengths of a finetuning set of `n` samples, in tokens.

    Args:
      distribution: What lengths are drawn from.
      n: Number of samples.
      seed: Seed of the draws.

    Raises:
      ValueError: If `n` is below 1 or `seed` negative.
    """
    require_count("n", n)
    return distribution.draw(n, generator(seed, "samples")).tolist()


def pick_by_length(
    lengths: Sequence[int], n: int, *, max_tokens: int, min_tokens: int = 1
) -> list[int]:
    """Indices of the first `n` samples whose length lies in a range: a finetuning set by length.

    Args:
      lengths: Length of every sample, in tokens.
      n: Number of samples to pick.
      max_tokens: Longest that is picked.
      min_tokens: Shortest that is picked.

    Raises:
      ValueError: If a limit is below 1, the range is empty, or fewer than `n` samples fit it.
    """
    require_count("n", n)
    require_count("min_tokens", min_tokens)
    require_count("max_tokens", max_tokens, at_least=min_tokens)
    fitting = [i for i, length in enumerate(lengths) if min_tokens <= length <= max_tokens]
    if len(fitting) < n:
        raise ValueError(
            f"`n` must be at most the number of samples of {min_tokens} to {max_tokens} tokens, "
            f"{len(fitting)} of {len(lengths)}; got {n}."
        )
    return fitting[:n]


def _redraw_long(
    pairs: Lengths, distribution: RequestLengths, draws: np.random.Generator, max_total_tokens: int
) -> Lengths:
    """Draws pairs again until all fit."""
    pairs = pairs.copy()
    for _ in range(_MAX_DRAWS):
        long = np.flatnonzero(pairs.sum(axis=1) > max_total_tokens)
        if not len(long):
            return pairs
        pairs[long] = distribution.draw_pairs(len(long), draws)
    raise ValueError(
        f"`max_total_tokens` must leave room for what is drawn; got {max_total_tokens}, and "
        f"{len(long)} of {len(pairs)} requests were longer in each of {_MAX_DRAWS} draws."
    )
