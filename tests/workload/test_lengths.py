"""Length distributions against theory, at fixed seeds; bounds of four standard errors."""

import math

import numpy as np
import pytest

from flexjax.workload import (
    Arrival,
    ConstantLength,
    EmpiricalLength,
    IndependentLengths,
    LognormalLength,
    TraceLengths,
    UniformLength,
    draw_lengths,
    pick_by_length,
    uniform_arrivals,
    with_lengths,
)

N = 6000


def normal_cdf(z):
    return 0.5 * math.erfc(-z / math.sqrt(2))


def test_constant_and_uniform():
    assert draw_lengths(ConstantLength(9), 3, 0) == [9, 9, 9]
    lengths = np.asarray(draw_lengths(UniformLength(3, 7), N, 1))
    assert sorted(set(lengths.tolist())) == [3, 4, 5, 6, 7]
    for value in range(3, 8):
        share = np.mean(lengths == value)
        assert share == pytest.approx(0.2, abs=4 * math.sqrt(0.16 / N))


@pytest.mark.parametrize(("low", "high"), [(1, 100_000), (50, 400), (1, 120)])
def test_lognormal_follows_its_distribution_inside_the_range(low, high):
    distribution = LognormalLength(median_tokens=150, sigma=0.9, min_tokens=low, max_tokens=high)

    def below(tokens):
        return normal_cdf(math.log(tokens / 150) / 0.9)

    first, last = below(low - 0.5), below(high + 0.5)
    assert distribution.share == pytest.approx(last - first)
    lengths = np.asarray(draw_lengths(distribution, N, 2))
    assert len(lengths) == N and lengths.min() >= low and lengths.max() <= high
    for value in (low, 60, 80, 100, 115, high - 1):
        expected = (below(value + 0.5) - first) / (last - first)
        error = math.sqrt(max(expected * (1 - expected), 1 / N) / N)
        assert np.mean(lengths <= value) == pytest.approx(expected, abs=4 * error)


def test_lengths_do_not_pile_up_at_the_limit():
    """What clamping would show: 60 % of the draws exceed the limit."""
    lengths = np.asarray(draw_lengths(LognormalLength(150, 0.9, max_tokens=120), N, 3))
    assert np.mean(lengths == 120) < 2 * np.mean(lengths == 119)


def test_empirical():
    lengths = np.asarray(draw_lengths(EmpiricalLength((5, 5, 5, 80)), N, 4))
    assert set(lengths.tolist()) == {5, 80}
    assert np.mean(lengths == 5) == pytest.approx(0.75, abs=4 * math.sqrt(0.1875 / N))


def test_trace_lengths_keep_prompt_and_output_together():
    seen = TraceLengths.of([Arrival(0.0, 10, 100), Arrival(1.0, 20, 200), Arrival(2.0, 10, 100)])
    arrivals = with_lengths(uniform_arrivals(1.0, N), seen, seed=0)
    pairs = [(a.prompt_tokens, a.output_tokens) for a in arrivals]
    assert set(pairs) == {(10, 100), (20, 200)}
    error = math.sqrt(2 / 9 / N)
    assert pairs.count((10, 100)) / N == pytest.approx(2 / 3, abs=4 * error)


def test_independent_lengths_are_not_correlated():
    both = IndependentLengths(UniformLength(1, 100), UniformLength(1, 100))
    arrivals = with_lengths(uniform_arrivals(1.0, N), both, seed=0)
    prompts = [a.prompt_tokens for a in arrivals]
    outputs = [a.output_tokens for a in arrivals]
    assert abs(np.corrcoef(prompts, outputs)[0, 1]) < 4 / math.sqrt(N)


def test_with_lengths_changes_lengths_only_and_follows_its_seed():
    arrivals = [Arrival(0.5, 1, 1, "a", "batch"), Arrival(2.0, adapter="b")]
    lengths = IndependentLengths(UniformLength(10, 1000), UniformLength(10, 1000))
    first = with_lengths(arrivals, lengths, seed=1)
    assert [(a.arrival_s, a.adapter, a.slo_class) for a in first] == [
        (0.5, "a", "batch"),
        (2.0, "b", None),
    ]
    assert with_lengths(arrivals, lengths, seed=1) == first
    assert with_lengths(arrivals, lengths, seed=2) != first
    assert all(type(a.prompt_tokens) is int for a in first)
    assert with_lengths([], lengths, seed=1) == []


def test_pairs_over_the_total_are_drawn_again():
    """The pairs that fit are all equally likely, as they are without the limit."""
    lengths = IndependentLengths(UniformLength(1, 4), UniformLength(1, 4))
    arrivals = with_lengths(uniform_arrivals(1.0, N), lengths, 5, max_total_tokens=4)
    pairs = [(a.prompt_tokens, a.output_tokens) for a in arrivals]
    fitting = {(1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (3, 1)}
    assert set(pairs) == fitting
    error = math.sqrt(5 / 36 / N)
    for pair in fitting:
        assert pairs.count(pair) / N == pytest.approx(1 / 6, abs=4 * error)


def test_pick_by_length():
    lengths = [5, 900, 12, 8192, 8193, 40]
    assert pick_by_length(lengths, 4, max_tokens=8192) == [0, 1, 2, 3]
    assert pick_by_length(lengths, 2, max_tokens=100, min_tokens=10) == [2, 5]
    with pytest.raises(ValueError, match="samples of 10 to 100 tokens, 2 of 6; got 3"):
        pick_by_length(lengths, 3, max_tokens=100, min_tokens=10)


ONE = uniform_arrivals(1.0, 1)
TEN = IndependentLengths(ConstantLength(5), ConstantLength(5))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ConstantLength(0), "`tokens` must be an integer >= 1; got 0"),
        (lambda: UniformLength(0, 5), "`min_tokens` must be an integer >= 1; got 0"),
        (lambda: UniformLength(6, 5), "`max_tokens` must be an integer >= 6; got 5"),
        (lambda: LognormalLength(0.0, 1.0, 5), "`median_tokens` must be a number > 0; got 0.0"),
        (lambda: LognormalLength(5.0, 0.0, 5), "`sigma` must be a number > 0; got 0.0"),
        (lambda: LognormalLength(5.0, 1.0, 5, 6), "`max_tokens` must be an integer >= 6; got 5"),
        (
            lambda: LognormalLength(1000.0, 0.5, 100),
            "must hold a share of at least 0.01 of the distribution; got 1 to 100, a share of",
        ),
        (lambda: EmpiricalLength(()), "`lengths` must hold at least one length"),
        (lambda: EmpiricalLength((3, 0)), "`lengths` must be an integer >= 1; got 0"),
        (lambda: TraceLengths(()), "`pairs` must hold at least one request"),
        (lambda: TraceLengths(((1, 0),)), "`pairs` must be an integer >= 1; got 0"),
        (lambda: TraceLengths.of([Arrival(0.0, 3)]), "`arrivals` must all have lengths; got Arriv"),
        (lambda: with_lengths(ONE, TEN, -1), "`seed` must be an integer >= 0; got -1"),
        (lambda: with_lengths(ONE, TEN, 0, max_total_tokens=1), "must be an integer >= 2; got 1"),
        (
            lambda: with_lengths(ONE, TEN, 0, max_total_tokens=9),
            "`max_total_tokens` must leave room for what is drawn; got 9, and 1 of 1",
        ),
        (lambda: draw_lengths(ConstantLength(1), 0, 0), "`n` must be an integer >= 1; got 0"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()
