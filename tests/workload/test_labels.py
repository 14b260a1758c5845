"""Adapters and latency classes of requests."""

import collections
import math

import numpy as np
import pytest

from flexjax.workload import (
    Arrival,
    IndependentLengths,
    UniformLength,
    uniform_arrivals,
    with_adapters,
    with_lengths,
    with_slo_classes,
)

N = 6000
ARRIVALS = uniform_arrivals(0.5, N)
NAMES = ["a", "b", "c", "d"]


def shares_of(arrivals):
    counts = collections.Counter(a.adapter for a in arrivals)
    return {name: count / len(arrivals) for name, count in counts.items()}


def error_of(share):
    return 4 * math.sqrt(share * (1 - share) / N)


def test_distinct_is_round_robin():
    named = with_adapters(ARRIVALS[:6], NAMES, "distinct")
    assert [a.adapter for a in named] == ["a", "b", "c", "d", "a", "b"]


def test_distinct_goes_round_past_requests_of_the_base_model():
    named = with_adapters(ARRIVALS, NAMES, "distinct", 3, base_share=0.3)
    turns = [a.adapter for a in named if a.adapter is not None]
    assert turns == [NAMES[index % 4] for index in range(len(turns))]
    assert shares_of(named)[None] == pytest.approx(0.3, abs=error_of(0.3))


def test_identical():
    assert {a.adapter for a in with_adapters(ARRIVALS, NAMES, "identical")} == {"a"}


def test_uniform():
    shares = shares_of(with_adapters(ARRIVALS, NAMES, "uniform", 1))
    assert set(shares) == set(NAMES)
    for share in shares.values():
        assert share == pytest.approx(0.25, abs=error_of(0.25))


@pytest.mark.parametrize("alpha", [0.0, 1.0, 1.5])
def test_zipf(alpha):
    named = with_adapters(ARRIVALS, NAMES, "zipf", 2, alpha=alpha, base_share=0.2)
    weights = [(rank + 1) ** -alpha for rank in range(4)]
    shares = shares_of(named)
    for name, weight in zip(NAMES, weights, strict=True):
        expected = 0.8 * weight / sum(weights)
        assert shares[name] == pytest.approx(expected, abs=error_of(expected))


def test_seeds_decide_and_only_the_adapter_changes():
    arrivals = [Arrival(float(i), 3, 4, "old", "batch") for i in range(50)]
    named = with_adapters(arrivals, NAMES, "uniform", 1)
    assert with_adapters(arrivals, NAMES, "uniform", 1) == named
    assert with_adapters(arrivals, NAMES, "uniform", 2) != named
    assert {(a.prompt_tokens, a.output_tokens, a.slo_class) for a in named} == {(3, 4, "batch")}
    assert [a.arrival_s for a in named] == [a.arrival_s for a in arrivals]
    base = with_adapters(arrivals, NAMES, "uniform", 1, base_share=1.0)
    assert {a.adapter for a in base} == {None}


def test_one_seed_for_everything_correlates_nothing():
    lengths = IndependentLengths(UniformLength(1, 1000), UniformLength(1, 1000))
    arrivals = with_lengths(ARRIVALS, lengths, seed=0)
    arrivals = with_adapters(arrivals, NAMES, "uniform", 0, base_share=0.5)
    arrivals = with_slo_classes(arrivals, {"interactive": 0.5, "batch": 0.5}, 0)
    columns = np.asarray(
        [
            (
                a.prompt_tokens,
                a.output_tokens,
                a.adapter is None,
                "abcd".find(a.adapter or "a"),
                a.slo_class == "batch",
            )
            for a in arrivals
        ],
        np.float64,
    )
    matrix = np.corrcoef(columns.T)
    matrix[2, 3] = matrix[3, 2] = 0.0  # the base model's requests stand as "a" in this table
    assert np.max(np.abs(matrix - np.eye(5))) < 4.5 / math.sqrt(N)


def test_slo_classes_follow_their_shares():
    shares = {"interactive": 0.7, "batch": 0.3, "never": 0.0}
    classed = with_slo_classes(ARRIVALS, shares, 4)
    counts = collections.Counter(a.slo_class for a in classed)
    assert set(counts) == {"interactive", "batch"}
    assert counts["batch"] / N == pytest.approx(0.3, abs=error_of(0.3))
    assert with_slo_classes(ARRIVALS, shares, 4) == classed
    assert with_slo_classes(ARRIVALS, shares, 5) != classed
    thirds = with_slo_classes(ARRIVALS[:9], {"x": 1 / 3, "y": 1 / 3, "z": 1 / 3}, 0)
    assert {a.slo_class for a in thirds} <= {"x", "y", "z"}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: with_adapters([], [], "uniform"), "`adapters` must hold at least one name"),
        (lambda: with_adapters([], ["a", "a"], "uniform"), "`adapters` must not repeat a name"),
        (lambda: with_adapters([], ["a"], "zipf"), '`alpha` must be given for "zipf"'),
        (lambda: with_adapters([], ["a"], "uniform", alpha=1.0), "for nothing else; got 1.0"),
        (lambda: with_adapters([], ["a"], "zipf", alpha=-1.0), "`alpha` must be a number >= 0"),
        (lambda: with_adapters([], ["a"], "uniform", base_share=1.1), "from 0 to 1; got 1.1"),
        (lambda: with_adapters([], ["a"], "uniform", -1), "`seed` must be an integer >= 0; got -1"),
        (lambda: with_adapters([], "ab", "uniform"), "`adapters` must be a collection of names, n"),
        (lambda: with_slo_classes([], {"": 1.0}, 0), "`shares` must be a text that is not empty"),
        (lambda: with_adapters(ARRIVALS[:1], [""], "uniform"), "`adapters` must be a text that is"),
        (lambda: with_slo_classes([], {}, 0), "`shares` must add up to 1; got {}"),
        (lambda: with_slo_classes([], {"a": 0.5}, 0), "`shares` must add up to 1; got {'a': 0.5}"),
        (
            lambda: with_slo_classes([], {"a": 1.5, "b": -0.5}, 0),
            r"`shares\['a'\]` must be a number from 0 to 1; got 1.5",
        ),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()
