"""The burst load and loads brought to a machine's size."""

import itertools

import numpy as np
import pytest

from flexjax.workload import (
    LOQUETIER_BURST_MINUTES,
    Arrival,
    ConstantLength,
    IndependentLengths,
    UniformLength,
    Workload,
    fit_load,
    loquetier_burst_load,
    loquetier_changing_load,
    loquetier_four_adapters,
)

LENGTHS = IndependentLengths(UniformLength(3, 9), ConstantLength(5))


@pytest.mark.parametrize("seed", [0, 1])
def test_burst_minutes_are_the_published_ones(seed):
    workload = loquetier_burst_load(["a", "b"], LENGTHS, seed=seed, time_scale=0.5)
    minutes, least, median, most, total = LOQUETIER_BURST_MINUTES
    times = np.array([a.arrival_s for a in workload.arrivals])
    counts = np.bincount((times // 30).astype(int), minlength=minutes)
    assert len(counts) == minutes
    assert (counts.min(), np.median(counts), counts.max()) == (least, median, most)
    assert counts.sum() == pytest.approx(total, rel=0.01)
    assert [a.adapter for a in workload.arrivals[:4]] == ["a", "b", "a", "b"]
    assert workload == loquetier_burst_load(["a", "b"], LENGTHS, seed=seed, time_scale=0.5)
    other = loquetier_burst_load(["a", "b"], LENGTHS, seed=seed + 1, time_scale=0.5)
    assert [a.arrival_s for a in other.arrivals] != times.tolist()


def test_burst_load_from_a_trace():
    trace = [Arrival(time_s, 100, 100) for time_s in (1.0, 4.0, 5.0)]
    workload = loquetier_burst_load(["a"], LENGTHS, trace=trace, time_scale=2.0)
    assert [a.arrival_s for a in workload.arrivals] == [2.0, 8.0, 10.0]
    assert {a.output_tokens for a in workload.arrivals} == {5}
    assert {a.adapter for a in workload.arrivals} == {"a"}


@pytest.mark.parametrize("rate", [2.5, 40.0, 700.0])
def test_fixed_intervals_stay_fixed(rate):
    names = ["a", "b", "c", "d"]
    fitted = fit_load(loquetier_four_adapters(names), rate, 4.0)
    times = [a.arrival_s for a in fitted.arrivals]
    assert len(times) == 4 * rate
    assert times == pytest.approx([index / rate for index in range(len(times))])
    assert [a.adapter for a in fitted.arrivals[:6]] == ["a", "b", "c", "d", "a", "b"]
    assert fitted.settings["rate"] == rate and fitted.settings["seconds"] == 4.0


def test_a_fitted_load_keeps_its_shape():
    whole = loquetier_changing_load("x", LENGTHS, seed=1)
    fitted = fit_load(whole, 315.0, 2.0)  # as many requests, 210 times as fast
    assert [a.arrival_s for a in fitted.arrivals] == pytest.approx(
        [a.arrival_s * fitted.arrivals[-1].arrival_s / 419.0 for a in whole.arrivals]
    )
    assert [a.prompt_tokens for a in fitted.arrivals] == [a.prompt_tokens for a in whole.arrivals]
    half = fit_load(whole, 315.0 / 2, 2.0)
    assert [a.prompt_tokens for a in half.arrivals] == [
        a.prompt_tokens for a in itertools.islice(whole.arrivals, 0, None, 2)
    ]
    busy = sum(120 / 420 <= a.arrival_s / 2.0 < 180 / 420 for a in half.arrivals)
    assert busy == pytest.approx(150 / 2, abs=2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: loquetier_burst_load([]), "`adapters` must hold at least one name"),
        (lambda: loquetier_burst_load(["a"], trace=[]), "`trace` must hold at least one request"),
        (lambda: loquetier_burst_load(["a"], time_scale=0.0), "`time_scale` must be a number > 0"),
        (
            lambda: fit_load(loquetier_changing_load("x"), 0.1, 2.0),
            r"`rate` \* `seconds` must be at least 1; got 0.1 \* 2",
        ),
        (lambda: fit_load(loquetier_changing_load("x"), 0.0, 2.0), "`rate` must be a number > 0"),
        (
            lambda: fit_load(Workload("w", [Arrival(1.0), Arrival(1.0)]), 1.0, 2.0),
            "`workload` must take more than 0 s; got 0.0",
        ),
    ],
)
def test_bad_loads(make, message):
    with pytest.raises(ValueError, match=message):
        make()
