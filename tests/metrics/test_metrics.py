"""Percentiles, summaries and rates."""

import numpy as np
import pytest

from flexjax.metrics import (
    Distribution,
    percentile,
    rate_of_events,
    rate_of_spans,
    slo_attainment,
    summarize,
)
from flexjax.request import GenerationOutput, Usage


def output(ttft_s, gaps, reason="stop"):
    tokens = tuple(range(len(gaps) + (ttft_s is not None)))
    return GenerationOutput(
        request_id=0,
        adapter=None,
        adapter_version=0,
        prompt_token_ids=(1, 2, 3),
        text="",
        token_ids=tokens,
        logprobs=None,
        finish_reason=reason,
        usage=Usage(3, len(tokens)),
        ttft_s=ttft_s,
        tpot_s=sum(gaps) / len(gaps) if gaps else None,
        itl_s=tuple(gaps),
        e2e_s=None if ttft_s is None else ttft_s + sum(gaps),
    )


@pytest.mark.parametrize("count", [1, 2, 5, 100])
def test_percentiles_are_numpys(rng, count):
    values = rng.normal(size=count).tolist()
    for q in (0, 1, 37.5, 50, 99, 100):
        assert percentile(values, q) == pytest.approx(float(np.percentile(values, q)))


def test_percentile_refuses():
    with pytest.raises(ValueError, match="at least one value"):
        percentile([], 50)
    with pytest.raises(ValueError, match=r"`q` must be in \[0, 100\]; got 101"):
        percentile([1.0], 101)


def test_distribution():
    found = Distribution.of([3.0, 1.0, 2.0])
    assert found is not None
    assert (found.count, found.mean, found.p50, found.max) == (3, 2.0, 2.0, 3.0)
    assert Distribution.of([]) is None


def test_summary_weighs_gaps_by_token_and_counts_the_delay():
    outputs = [output(0.5, [0.1] * 9), output(1.0, [1.0], "length"), output(2.0, [])]
    found = summarize(outputs, [0.0, 0.25, 1.0])
    assert found.num_requests == 3
    assert (found.prompt_tokens, found.output_tokens) == (9, 13)
    assert found.finish_reasons == {"length": 1, "stop": 2}
    assert found.ttft_s and found.ttft_s.p50 == 1.25 and found.ttft_s.max == 3.0
    assert found.tpot_s and found.tpot_s.count == 2
    assert found.tpot_s.p50 == pytest.approx(0.55)
    assert found.itl_s and found.itl_s.count == 10
    assert found.itl_s.p50 == pytest.approx(0.1) and found.itl_s.max == 1.0
    with pytest.raises(ValueError, match="one value a request, 3; got 1"):
        summarize(outputs, [0.0])


def test_slo_attainment():
    outputs = [output(0.5, [0.1]), output(0.5, [0.3]), output(0.9, []), output(None, [], "abort")]
    assert slo_attainment(outputs, ttft_s=1.0, tpot_s=0.2) == 0.5
    assert slo_attainment(outputs, ttft_s=1.0, tpot_s=0.2, delays_s=[0, 0, 0.2, 0]) == 0.25
    with pytest.raises(ValueError, match="at least one request"):
        slo_attainment([], ttft_s=1.0, tpot_s=1.0)


def test_rate_of_events_counts_everything():
    curve = rate_of_events([0.0, 0.5, 1.5, 2.4, 2.5], end_s=2.5, bin_s=1.0)
    assert curve.edges_s == (0.0, 1.0, 2.0, 2.5)
    assert curve.rates == (2.0, 1.0, 4.0)


def test_rate_of_spans_spreads_and_conserves(rng):
    begins = rng.uniform(0, 9, size=50)
    spans = [
        (b, b + d, a) for b, d, a in zip(begins, rng.uniform(0, 1, 50), range(50), strict=True)
    ]
    curve = rate_of_spans(spans, end_s=10.0, bin_s=0.3)
    widths = np.diff(curve.edges_s)
    assert float(np.dot(curve.rates, widths)) == pytest.approx(sum(range(50)))
    even = rate_of_spans([(0.0, 4.0, 8.0)], end_s=4.0, bin_s=1.0)
    assert even.rates == pytest.approx((2.0, 2.0, 2.0, 2.0))
    with pytest.raises(ValueError, match="`bin_s` must be positive; got 0"):
        rate_of_spans([], end_s=1.0, bin_s=0)
