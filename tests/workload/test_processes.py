"""Arrival processes: rates and spread against theory, at fixed seeds.

Bounds are four standard errors, or the 0.1 % point of the Kolmogorov-Smirnov distance.
"""

import math

import numpy as np
import pytest

from flexjax.workload import (
    Arrival,
    Phase,
    burst_arrivals,
    gamma_arrivals,
    merge_arrivals,
    phased_arrivals,
    poisson_arrivals,
    ramp_arrivals,
    uniform_arrivals,
)


def times_of(arrivals):
    return np.asarray([arrival.arrival_s for arrival in arrivals])


def ks_distance(sample, cdf):
    """Largest distance between the sample's distribution and `cdf`, both sides of each step."""
    expected = cdf(np.sort(sample))
    n = len(sample)
    above = np.max(np.arange(1, n + 1) / n - expected)
    below = np.max(expected - np.arange(n) / n)
    return max(above, below)


@pytest.mark.parametrize("burstiness", [0.25, 0.5, 1.0, 4.0])
def test_gamma_gaps_have_the_asked_mean_and_spread(burstiness):
    n, rate = 20_000, 5.0
    gaps = np.diff(times_of(gamma_arrivals(rate, n, 7, burstiness=burstiness)), prepend=0.0)
    cv = burstiness**-0.5
    assert gaps.mean() == pytest.approx(1 / rate, rel=4 * cv / math.sqrt(n))
    error = math.sqrt((burstiness + 1) / (2 * burstiness**2 * n))
    assert gaps.std() / gaps.mean() == pytest.approx(cv, abs=4 * error)


def test_gamma_of_burstiness_one_is_a_poisson_process():
    n = 20_000
    gaps = np.diff(times_of(gamma_arrivals(3.0, n, 1)), prepend=0.0)
    assert ks_distance(gaps, lambda gap: -np.expm1(-3.0 * gap)) < 1.95 / math.sqrt(n)
    other = np.diff(times_of(gamma_arrivals(3.0, n, 1, burstiness=0.5)), prepend=0.0)
    assert ks_distance(other, lambda gap: -np.expm1(-3.0 * gap)) > 0.1


def test_seeds_decide():
    for make in (
        lambda seed: gamma_arrivals(2.0, 50, seed, burstiness=0.3),
        lambda seed: phased_arrivals([Phase(2.0, num_requests=50)], seed),
        lambda seed: phased_arrivals([Phase(2.0, duration_s=25.0)], seed),
        lambda seed: ramp_arrivals(1.0, 3.0, 25.0, seed),
    ):
        assert make(3) == make(3)
        assert make(3) != make(4)


def test_uniform():
    assert times_of(uniform_arrivals(4.0, 3, offset_s=1.0)).tolist() == [1.0, 5.0, 9.0]
    assert times_of(uniform_arrivals(0.1, 4))[-1] == pytest.approx(0.3)


def test_fixed_phases_follow_one_another():
    phases = [Phase(1.0, num_requests=2), Phase(0.0, duration_s=3.0), Phase(2.0, duration_s=1.5)]
    times = times_of(phased_arrivals(phases, spacing="fixed"))
    assert times.tolist() == [0.0, 1.0, 5.0, 5.5, 6.0]


def test_fixed_phases_may_overlap():
    phases = [
        Phase(0.5, num_requests=3, start_s=0.0),
        Phase(1.0, num_requests=2, start_s=1.0),
        Phase(1.0, num_requests=1),
    ]
    times = times_of(phased_arrivals(phases, spacing="fixed"))
    assert times.tolist() == [0.0, 1.0, 2.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize(("rate", "duration_s", "n"), [(10.0, 0.7, 7), (3.0, 1.1, 4), (0.5, 1, 1)])
def test_fixed_phase_by_duration_excludes_its_end(rate, duration_s, n):
    phase = Phase(rate, duration_s=duration_s)
    times = times_of(phased_arrivals([phase], spacing="fixed"))
    assert len(times) == n
    assert times[-1] < duration_s <= n / rate + 1e-9


def test_poisson_phases_have_their_rates():
    phases = [Phase(20.0, duration_s=100.0), Phase(0, duration_s=50.0), Phase(5.0, duration_s=200)]
    times = times_of(phased_arrivals(phases, 11))
    assert np.all(np.diff(times) >= 0)
    assert np.sum(times < 100) == pytest.approx(2000, abs=4 * math.sqrt(2000))
    assert np.sum((times >= 100) & (times < 150)) == 0
    last = times[times >= 150]
    assert len(last) == pytest.approx(1000, abs=4 * math.sqrt(1000))
    uniform = ks_distance(last, lambda time_s: (time_s - 150) / 200)
    assert uniform < 1.95 / math.sqrt(len(last))


def test_poisson_phase_by_requests():
    arrivals = phased_arrivals([Phase(4.0, num_requests=5000), Phase(40.0, num_requests=5000)], 2)
    gaps = np.diff(times_of(arrivals), prepend=0.0)
    assert len(gaps) == 10_000
    assert gaps[:5000].mean() == pytest.approx(1 / 4, rel=4 / math.sqrt(5000))
    assert gaps[5000:].mean() == pytest.approx(1 / 40, rel=4 / math.sqrt(5000))


@pytest.mark.parametrize(("start", "end"), [(0.0, 40.0), (40.0, 0.0), (10.0, 30.0), (20.0, 20.0)])
def test_ramp_has_the_rate_at_every_time(start, end):
    duration_s = 250.0
    times = times_of(ramp_arrivals(start, end, duration_s, 5))
    expected = duration_s * (start + end) / 2
    assert len(times) == pytest.approx(expected, abs=4 * math.sqrt(expected))
    assert np.all(np.diff(times) >= 0) and times[0] >= 0 and times[-1] <= duration_s

    def share_before(time_s):
        return (start * time_s + (end - start) * time_s**2 / (2 * duration_s)) / expected

    assert ks_distance(times, share_before) < 1.95 / math.sqrt(len(times))


def test_burst():
    settings = {"burst_factor": 5.0, "burst_start_s": 100.0, "burst_length_s": 50.0}
    times = times_of(burst_arrivals(10.0, 300.0, 3, **settings))
    in_burst = np.sum((times >= 100) & (times < 150))
    assert in_burst == pytest.approx(2500, abs=4 * math.sqrt(2500))
    assert len(times) - in_burst == pytest.approx(2500, abs=4 * math.sqrt(2500))
    fixed = times_of(burst_arrivals(1.0, 300.0, spacing="fixed", **settings))
    assert len(fixed) == 100 + 250 + 150
    silent = burst_arrivals(
        1.0, 10.0, spacing="fixed", burst_factor=0.0, burst_start_s=0.0, burst_length_s=8.0
    )
    assert times_of(silent).tolist() == [8.0, 9.0]


def test_merge_keeps_the_order_of_parts_at_equal_times():
    first = [Arrival(0.0, adapter="a"), Arrival(2.0, adapter="a")]
    second = [Arrival(0.0, adapter="b"), Arrival(1.0, adapter="b")]
    merged = merge_arrivals(first, second)
    assert [(a.arrival_s, a.adapter) for a in merged] == [(0, "a"), (0, "b"), (1, "b"), (2, "a")]
    assert merge_arrivals() == []


BURST = {"burst_factor": 2.0, "burst_start_s": 0.0, "burst_length_s": 1.0}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: gamma_arrivals(0.0, 1, 0), "`rate` must be a number > 0; got 0.0"),
        (lambda: gamma_arrivals(1.0, 0, 0), "`n` must be an integer >= 1; got 0"),
        (lambda: gamma_arrivals(1.0, 1, 0, burstiness=0.0), "`burstiness` must be a number > 0"),
        (lambda: gamma_arrivals(1.0, 1, -1), "`seed` must be an integer >= 0; got -1"),
        (lambda: uniform_arrivals(math.inf, 1), "`interval_s` must be a number > 0; got inf"),
        (lambda: uniform_arrivals(1.0, 1, offset_s=-1.0), "`offset_s` must be a number >= 0"),
        (lambda: Phase(1.0), "exactly one of `num_requests` and `duration_s` must be given"),
        (lambda: Phase(1.0, 1, 1.0), "exactly one of `num_requests` and `duration_s`"),
        (lambda: Phase(0.0, 1), "`rate` must be a number > 0; got 0.0"),
        (lambda: Phase(-1.0, duration_s=1.0), "`rate` must be a number >= 0; got -1.0"),
        (lambda: Phase(1.0, 0), "`num_requests` must be an integer >= 1; got 0"),
        (lambda: Phase(1.0, duration_s=0.0), "`duration_s` must be a number > 0; got 0.0"),
        (lambda: Phase(1.0, 1, start_s=-2.0), "`start_s` must be a number >= 0; got -2.0"),
        (lambda: phased_arrivals([]), "`phases` must hold at least one phase"),
        (lambda: ramp_arrivals(0.0, 0.0, 1.0, 0), "must not both be 0"),
        (lambda: ramp_arrivals(1.0, -1.0, 1.0, 0), "`end_rate` must be a number >= 0; got -1.0"),
        (lambda: ramp_arrivals(1.0, 1.0, 0.0, 0), "`duration_s` must be a number > 0; got 0.0"),
        (lambda: burst_arrivals(0.0, 1.0, **BURST), "`base_rate` must be a number > 0; got 0.0"),
        (
            lambda: burst_arrivals(1.0, 0.5, **BURST),
            r"`burst_start_s` \+ `burst_length_s` must be at most `duration_s`, 0.5; got 0.0 \+ 1",
        ),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_poisson_stays_what_it_was():
    """Runs that were measured before the other processes came must stay reproducible."""
    times = times_of(poisson_arrivals(2.0, 3, seed=0))
    assert times == pytest.approx([0.9303036, 1.6396181, 1.9124747], abs=1e-6)
