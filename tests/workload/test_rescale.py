"""Rates of traces, and parts of them."""

import collections
import math

import numpy as np
import pytest

from flexjax.workload import (
    Arrival,
    gamma_arrivals,
    mean_rate,
    random_slice,
    resample_rate,
    rescale_rate,
    slice_time,
    uniform_arrivals,
)


def labelled(n=400, length_s=100.0):
    """A bursty trace within [0, length_s) whose requests can be told apart by their prompts."""
    times = [a.arrival_s for a in gamma_arrivals(1.0, n, 0, burstiness=0.3)]
    scale = 0.99 * length_s / times[-1]
    return [Arrival(time_s * scale, index + 1, 7) for index, time_s in enumerate(times)]


def test_mean_rate():
    assert mean_rate(uniform_arrivals(0.25, 9)) == pytest.approx(4.0)
    assert mean_rate([Arrival(1.0), Arrival(1.0), Arrival(5.0)]) == 0.5


def test_rescaling_stretches_every_gap_alike():
    trace = slice_time(labelled(), 0.0, 50.0)[3:]
    scaled = rescale_rate(trace, 2.0)
    assert mean_rate(scaled) == pytest.approx(2.0)
    assert scaled[0] == trace[0]
    old = np.diff([a.arrival_s for a in trace])
    new = np.diff([a.arrival_s for a in scaled])
    np.testing.assert_allclose(new, old * mean_rate(trace) / 2.0, rtol=1e-9, atol=1e-12)
    assert [a.prompt_tokens for a in scaled] == [a.prompt_tokens for a in trace]


def test_resampling_down_leaves_requests_as_they_are():
    trace = labelled()
    fewer = resample_rate(trace, 1.5, 100.0, seed=5)
    assert len(fewer) == 150 == len(set(fewer))
    assert set(fewer) < set(trace)
    assert fewer == sorted(fewer, key=lambda a: a.arrival_s)
    assert resample_rate(trace, 1.5, 100.0, seed=5) == fewer
    assert resample_rate(trace, 1.5, 100.0, seed=6) != fewer


def test_resampling_down_treats_all_alike():
    trace = labelled(20)
    counts = np.zeros(21)
    for seed in range(2000):
        for arrival in resample_rate(trace, 0.05, 100.0, seed):
            counts[arrival.prompt_tokens] += 1
    error = math.sqrt(2000 * 0.25 * 0.75)
    assert counts.sum() == 2000 * 5
    assert np.all(np.abs(counts[1:] - 500) < 4 * error)


@pytest.mark.parametrize(("rate", "jitter_s"), [(4.0, 1.0), (9.0, 1.0), (10.5, 0.2), (8.0, 0.0)])
def test_resampling_up_repeats_near_the_original(rate, jitter_s):
    trace = labelled()
    more = resample_rate(trace, rate, 100.0, seed=5, jitter_s=jitter_s)
    assert len(more) == round(rate * 100)
    assert set(trace) <= set(more)
    counts = collections.Counter(a.prompt_tokens for a in more)
    assert set(counts.values()) <= {len(more) // 400, len(more) // 400 + 1}
    assert more == sorted(more, key=lambda a: a.arrival_s)
    moved = [a.arrival_s - trace[a.prompt_tokens - 1].arrival_s for a in more]
    assert max(map(abs, moved)) <= jitter_s
    assert all(0 <= a.arrival_s <= 100.0 for a in more)
    if jitter_s > 0 and rate > 4:
        assert len(set(a.arrival_s for a in more)) == len(more)
        assert max(map(abs, moved)) > 0.9 * jitter_s


def test_slices():
    trace = uniform_arrivals(1.0, 10)
    assert [a.arrival_s for a in slice_time(trace, 3.0, 2.0)] == [0.0, 1.0]
    assert [a.arrival_s for a in slice_time(trace, 3.5, 2.0)] == [0.5, 1.5]
    assert slice_time(trace, 50.0, 2.0) == []
    assert slice_time(trace, 0.0, 100.0) == trace


def test_random_slices_lie_inside():
    trace = [Arrival(20 + 0.5 * index, index + 1) for index in range(101)]
    starts = set()
    for seed in range(200):
        part = random_slice(trace, 10.0, seed)
        assert len(part) == 20
        assert 0 <= part[0].arrival_s < 0.5 and part[-1].arrival_s < 10.0
        assert random_slice(trace, 10.0, seed) == part
        starts.add(part[0].prompt_tokens)
    assert min(starts) <= 5 and max(starts) >= 77


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mean_rate([Arrival(1.0)]), "two requests that arrive at different times; got 1"),
        (lambda: mean_rate([]), "two requests that arrive at different times; got 0"),
        (lambda: rescale_rate([Arrival(1.0)] * 3, 1.0), "got 3 in 0.0 s"),
        (lambda: rescale_rate(labelled(), 0.0), "`rate` must be a number > 0; got 0.0"),
        (lambda: mean_rate([Arrival(1.0), Arrival(0.5)]), "in order of arrival; got 0.5 after 1"),
        (lambda: resample_rate([], 1.0, 1.0, 0), "`arrivals` must hold at least one request"),
        (lambda: resample_rate(labelled(), 1.0, 50.0, 0), "`length_s` must be more than the last"),
        (lambda: resample_rate(labelled(), 0.001, 100.0, 0), "`rate` . `length_s` must be at leas"),
        (lambda: resample_rate(labelled(), 1.0, 100.0, 0, jitter_s=-1.0), "`jitter_s` must be"),
        (lambda: slice_time([], -1.0, 1.0), "`start_s` must be a number >= 0; got -1.0"),
        (lambda: slice_time([], 0.0, 0.0), "`length_s` must be a number > 0; got 0.0"),
        (lambda: random_slice(labelled(), 101.0, 0), "`length_s` must be at most the trace's 98"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()
