"""Runs of which the gaps between tokens are compared: how long they last, and what caps them.

The runs are made up: alone every gap is 20 ms, and co-serving makes the most of its cap.
"""

import math

import pytest
from helpers import make_engine, tiny_config, tiny_weights

from flexjax.bench.loads import LoadSource, constant_lengths
from flexjax.bench.policies import SweepSettings, run_capped
from flexjax.metrics import RequestRecord, RunRecord, all_gaps_s
from flexjax.slo import SLO
from flexjax.workload import Arrival

HEADER = {
    "command": "test", "device": "none", "versions": {}, "commit": "none", "seed": 0,
    "workload": "made-up", "model": "none", "config": {},
}  # fmt: skip
TARGETS = SLO(ttft_ms=60_000.0, tpot_ms=60_000.0)


def made_up(policy, rate, arrivals, gap_s):
    done = [
        RequestRecord(
            number, None, None, one.arrival_s, one.prompt_tokens, one.output_tokens,
            tuple(one.arrival_s + 0.1 + gap_s * k for k in range(one.output_tokens)),
            "finished", "length",
        )
        for number, one in enumerate(arrivals)
    ]  # fmt: skip
    header = {**HEADER, "policy": policy, "rate": rate}
    return RunRecord(header, 0.0, 1000.0, tuple(done), measured_until_s=900.0)


@pytest.fixture(scope="module")
def engine():
    config = tiny_config()
    return make_engine(config, tiny_weights(config))


@pytest.fixture
def played(monkeypatch):
    """What was run: rate, seed, horizon and seconds of arrivals."""
    ran = []

    def play(engine, workload, *, policy, rate, targets, horizon_s, seed, **_):
        ran.append((rate, seed, horizon_s, workload.settings["seconds"]))
        gap_s = 0.02 if policy == "inference_only" else (targets.itl_ms or 0.0) / 1e3
        return made_up(policy, rate, workload.arrivals, gap_s)

    monkeypatch.setattr("flexjax.bench.policies.run_workload", play)
    return ran


@pytest.mark.parametrize(
    "repeats, least_gaps, trace_len", [(1, 100, None), (3, 100, None), (1, 500, 30), (2, 1, 30)]
)
def test_capped_runs_last_until_they_have_their_gaps(
    engine, played, repeats, least_gaps, trace_len
):
    trace = trace_len and [Arrival(0.5 * n, 4, 3) for n in range(trace_len)]
    lengths = None if trace else constant_lengths(4, 3)
    settings = SweepSettings(
        rates=(2.0, 8.0), targets=TARGETS, window_s=2.0, tail_s=1.0, repeats=repeats,
        least_gaps=least_gaps,
    )  # fmt: skip
    runs = run_capped(engine, settings, LoadSource(name="load", trace=trace, lengths=lengths), [])
    assert [run.policy for run in runs] == ["inference_only", "co_serve"] * 2 * repeats
    assert [r[0] for r in played] == [2.0] * 2 * repeats + [8.0] * 2 * repeats
    assert [r[1] for r in played[::2]] == list(range(repeats)) * 2
    for rate in settings.rates:
        gaps = all_gaps_s(r for r in runs if (r.policy, r.rate) == ("co_serve", rate))
        of_sweep = 2 * round(rate * settings.arrivals_s) * repeats
        wanted = max(least_gaps, of_sweep)
        most = 2 * (trace_len - 1) * repeats if trace_len else math.inf
        assert min(wanted, most) <= len(gaps) <= 1.5 * wanted
    assert all(horizon_s == pytest.approx(seconds + 1.0) for *_, horizon_s, seconds in played)


def test_the_cap_is_of_all_gaps_that_inference_alone_had(engine, played):
    """Those of the sweep at the same rate too: 2 of 50 ms are more than one of a hundred."""
    del played
    settings = SweepSettings(rates=(2.0, 8.0), targets=TARGETS, window_s=2.0, least_gaps=50)
    source = LoadSource(name="load", lengths=constant_lengths(4, 3))
    sweep = [
        made_up("inference_only", 2.0, [Arrival(0.0, 4, 3)], 0.05),
        made_up("co_serve", 8.0, [Arrival(0.0, 4, 3)], 9.0),
    ]
    runs = run_capped(engine, settings, source, [], alone=sweep)
    longest = {rate: max(all_gaps_s(r for r in runs if r.rate == rate)) for rate in (2.0, 8.0)}
    assert longest == pytest.approx({2.0: 0.05, 8.0: 0.02})


def test_answers_of_one_token_have_no_gaps_to_wait_for(engine, played):
    settings = SweepSettings(rates=(2.0,), targets=TARGETS, window_s=2.0)
    run_capped(engine, settings, LoadSource(name="load", lengths=constant_lengths(4, 1)), [])
    assert [seconds for *_, seconds in played] == [2.0, 2.0]
