"""Replicas behind a router: totals, clocks of their own, and where requests go."""

import pytest
from simulator_cases import (
    endless_job,
    make_engine,
    make_job,
    make_profile,
    make_workload,
)

from flexjax.metrics import summarize_run
from flexjax.simulator import DeviceTimes, SimulationOptions, simulate, simulate_replicas
from flexjax.workload import Arrival, Workload


@pytest.fixture(scope="module")
def profile():
    return make_profile()


def ids(run):
    return [r.request_id for r in run.requests]


@pytest.mark.parametrize("router", ["round_robin", "least_loaded", "adapter_affinity"])
def test_every_request_goes_to_one_replica(profile, router):
    workload, job = make_workload(45, rate=24.0), make_job(epochs=2)
    runs = simulate_replicas(workload, 3, router, profile, make_engine(), "co_serve", [job])
    assert ids(runs.merged) == list(range(45))
    assert sorted(i for run in runs.replicas for i in ids(run)) == list(range(45))
    assert {r.status for r in runs.merged.requests} == {"finished"}
    assert len(runs.merged.steps) == sum(len(run.steps) for run in runs.replicas)
    assert sum(r.tokens for r in runs.merged.training) == 3 * 2 * 695
    assert {r.job for r in runs.merged.training} == {"job@0", "job@1", "job@2"}
    merged = summarize_run(runs.merged)
    parts = [summarize_run(run) for run in runs.replicas]
    tokens = merged.output_tokens_per_s * merged.duration_s
    assert tokens == pytest.approx(sum(p.requests.output_tokens for p in parts))
    assert merged.requests.num_requests == 45


def test_one_replica_is_the_plain_simulation(profile):
    workload, engine = make_workload(), make_engine()
    options = SimulationOptions(device=DeviceTimes(profile, noise=0.1, seed=4))
    jobs = [endless_job()]
    plain = simulate(workload, profile, engine, "temporal:8", jobs, options=options, measure_s=1.5)
    for router in ("round_robin", "least_loaded"):
        runs = simulate_replicas(
            workload,
            1,
            router,
            profile,
            engine,
            "temporal:8",
            jobs,
            devices=[DeviceTimes(profile, noise=0.1, seed=4)],
            measure_s=1.5,
        )
        (replica,) = runs.replicas
        assert replica.requests == plain.requests and replica.steps == plain.steps


def test_routers_send_where_they_say(profile):
    engine, workload = make_engine(), make_workload()

    def runs(router):
        return simulate_replicas(workload, 2, router, profile, engine, "inference_only").replicas

    assert ids(runs("round_robin")[1]) == list(range(1, 30, 2))
    owners = {}
    for index, run in enumerate(runs("adapter_affinity")):
        for request in run.requests:
            if request.adapter is not None:
                owners.setdefault(request.adapter, set()).add(index)
    assert set(owners) == {"a", "b"} and all(len(where) == 1 for where in owners.values())


def test_least_loaded_avoids_the_busy_replica(profile):
    """One long request, then short ones that are over before the next comes."""
    short = [Arrival(1.0 + i, 4, 2) for i in range(6)]
    workload = Workload("uneven", [Arrival(0.0, 10, 500), *short])
    engine = make_engine()
    options = SimulationOptions(device=None)
    slow = [DeviceTimes(profile, factor=5.0), DeviceTimes(profile)]
    runs = simulate_replicas(
        workload,
        2,
        "least_loaded",
        profile,
        engine,
        "inference_only",
        options=options,
        devices=slow,
    )
    assert [ids(run) for run in runs.replicas] == [[0], [1, 2, 3, 4, 5, 6]]
    turns = simulate_replicas(workload, 2, "round_robin", profile, engine, "inference_only")
    assert [ids(run) for run in turns.replicas] == [[0, 2, 4, 6], [1, 3, 5]]


def test_stateful_policies_are_not_shared(profile):
    """Replicas with equal requests do the same, whatever the others have done."""
    pairs = [Arrival(0.3 * i, 20, 30) for i in range(10) for _ in range(2)]
    jobs = [endless_job()]
    runs = simulate_replicas(
        Workload("pairs", pairs),
        2,
        "round_robin",
        profile,
        make_engine(),
        "temporal:5",
        jobs,
        measure_s=4.0,
    )
    first, second = runs.replicas
    assert first.steps == second.steps and len(first.training) > 0


def test_an_idle_replica_has_a_record(profile):
    workload = Workload("one", [Arrival(0.0, 5, 5)])
    runs = simulate_replicas(workload, 2, "round_robin", profile, make_engine())
    assert [len(run.requests) for run in runs.replicas] == [1, 0]
    assert runs.replicas[1].end_s == runs.merged.end_s


def test_bad_input_is_refused(profile):
    workload, engine = make_workload(5), make_engine()
    with pytest.raises(ValueError, match="`num_replicas` must be an integer >= 1; got 0"):
        simulate_replicas(workload, 0, "round_robin", profile, engine)
    with pytest.raises(ValueError, match="`router` must be one of round_robin"):
        simulate_replicas(workload, 2, "random", profile, engine)
    with pytest.raises(ValueError, match="`devices` must be one for each of 2 replicas; got 1"):
        devices = [DeviceTimes(profile)]
        simulate_replicas(workload, 2, "round_robin", profile, engine, devices=devices)
    with pytest.raises(ValueError, match="`options.device` must be None"):
        options = SimulationOptions(device=DeviceTimes(profile))
        simulate_replicas(workload, 2, "round_robin", profile, engine, options=options)
