"""Whole simulated runs: a workload on one engine, or on replicas behind a router."""

from __future__ import annotations

import copy
import dataclasses
import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from flexjax.metrics.run import RunRecord
from flexjax.scheduler.latency_profile import LatencyProfile
from flexjax.scheduler.policy import SharingPolicy
from flexjax.simulator.setup import (
    DeviceTimes,
    SimulatedEngine,
    SimulatedJob,
    SimulationOptions,
    require,
    require_int,
)
from flexjax.simulator.simulator import Simulator
from flexjax.workload.arrivals import Arrival
from flexjax.workload.workload import Workload

ROUTERS = ("round_robin", "least_loaded", "adapter_affinity")
"""How replicas share requests: in turn; to the one with the fewest that have not ended; or all of
an adapter to one replica, those of the base model in turn."""


def simulate(
    workload: Workload,
    profile: LatencyProfile,
    engine: SimulatedEngine,
    policy: SharingPolicy | str = "co_serve",
    jobs: Sequence[SimulatedJob] = (),
    *,
    options: SimulationOptions | None = None,
    measure_s: float | None = None,
    drain_s: float = math.inf,
    header: Mapping[str, Any] | None = None,
) -> RunRecord:
    """Simulates a workload beside finetuning jobs on one engine.

    Args:
      workload: Requests, all with lengths.
      profile: Where the scheduler's latency model starts; the device's truth too, unless `options`
        gives another.
      engine: Sizes.
      policy: How requests and jobs share the steps, or its name.
      jobs: Finetuning jobs.
      options: None for the defaults.
      measure_s: See `Simulator.run`; needed with jobs that outlast the requests by hours.
      drain_s: See `Simulator.run`.
      header: Replaces or adds to what the record's header says.

    Raises:
      ValueError: See `Simulator`, `Simulator.submit` and `Simulator.run`.
    """
    simulator = Simulator(profile, engine, policy, jobs, options)
    for request_id, arrival in enumerate(workload.arrivals):
        simulator.submit(request_id, arrival)
    simulator.run(measure_s, drain_s)
    return simulator.run_record(make_header(workload, profile, engine, policy) | dict(header or {}))


def make_header(
    workload: Workload,
    profile: LatencyProfile,
    engine: SimulatedEngine,
    policy: SharingPolicy | str,
) -> dict[str, Any]:
    """What a simulated run says of itself: a device that is named as simulated."""
    rate = workload.settings.get("rate", workload.description["rate"])
    return {
        "command": "simulate",
        "device": {"kind": f"{profile.device} (simulated)", "profile_source": profile.source},
        "versions": dict(profile.versions),
        "commit": None,
        "seed": workload.seed,
        "policy": policy if isinstance(policy, str) else type(policy).__name__,
        "rate": rate,
        "workload": workload.name,
        "model": profile.model,
        "config": dataclasses.asdict(engine),
    }


@dataclasses.dataclass(frozen=True)
class ReplicaRuns:
    """A workload on several replicas.

    Attributes:
      merged: All of them as one run; jobs are named "name@replica", steps run side by side.
      replicas: Each alone; requests keep the numbers that they have in the workload.
    """

    merged: RunRecord
    replicas: tuple[RunRecord, ...]


def simulate_replicas(
    workload: Workload,
    num_replicas: int,
    router: str,
    profile: LatencyProfile,
    engine: SimulatedEngine,
    policy: SharingPolicy | str = "co_serve",
    jobs: Sequence[SimulatedJob] = (),
    *,
    options: SimulationOptions | None = None,
    devices: Sequence[DeviceTimes] | None = None,
    measure_s: float | None = None,
    drain_s: float = math.inf,
    header: Mapping[str, Any] | None = None,
) -> ReplicaRuns:
    """Simulates identical engines behind a router, each with a scheduler and a clock of its own.

    Args:
      workload: Requests, all with lengths.
      num_replicas: Engines.
      router: One of `ROUTERS`.
      profile: See `simulate`.
      engine: Sizes of each.
      policy: See `simulate`; each engine gets its own.
      jobs: Finetuning jobs that every engine runs.
      options: None for the defaults; without `device`, whose noise replicas cannot share.
      devices: The device of each engine; None for what the profile says, without noise.
      measure_s: See `Simulator.run`.
      drain_s: See `Simulator.run`.
      header: See `simulate`.

    Raises:
      ValueError: If `num_replicas` is below 1, the router unknown, there is not one device a
        replica, or see `simulate`.
    """
    require_int("num_replicas", num_replicas, 1)
    require(router in ROUTERS, "router", f"one of {', '.join(ROUTERS)}", router)
    options = options or SimulationOptions()
    require(options.device is None, "options.device", "None; see `devices`", options.device)
    if devices is None:
        devices = [DeviceTimes(profile) for _ in range(num_replicas)]
    rule = f"one for each of {num_replicas} replicas"
    require(len(devices) == num_replicas, "devices", rule, len(devices))
    replicas = []
    for device in devices:
        own = dataclasses.replace(options, device=device)
        replicas.append(Simulator(profile, engine, copy.deepcopy(policy), jobs, own))
    _share_out(workload, router, replicas)
    for replica in replicas:
        replica.run(measure_s, drain_s)
    end_s = max(replica.now_s for replica in replicas)
    for replica in replicas:
        replica.now_s = end_s  # idle since
    about = make_header(workload, profile, engine, policy)
    about |= {"num_replicas": num_replicas, "router": router, **(header or {})}
    runs = tuple(r.run_record({**about, "replica": i}) for i, r in enumerate(replicas))
    return ReplicaRuns(_merge(runs, about), runs)


def _share_out(workload: Workload, router: str, replicas: Sequence[Simulator]) -> None:
    for request_id, arrival in enumerate(workload.arrivals):
        if router == "least_loaded":  # the others need not know how far each has come
            for replica in replicas:
                replica.advance(arrival.arrival_s)
        replicas[_route(router, request_id, arrival, replicas)].submit(request_id, arrival)


def _route(router: str, number: int, arrival: Arrival, replicas: Sequence[Simulator]) -> int:
    if router == "least_loaded":
        return min(range(len(replicas)), key=lambda i: replicas[i].num_alive)
    if router == "adapter_affinity" and arrival.adapter is not None:
        return zlib.crc32(arrival.adapter.encode()) % len(replicas)
    return number % len(replicas)


def _merge(runs: Sequence[RunRecord], header: Mapping[str, Any]) -> RunRecord:
    training = [
        dataclasses.replace(record, job=f"{record.job}@{index}")
        for index, run in enumerate(runs)
        for record in run.training
    ]
    return RunRecord(
        header=dict(header),
        begin_s=0.0,
        end_s=max(run.end_s for run in runs),
        requests=tuple(sorted((r for x in runs for r in x.requests), key=lambda r: r.request_id)),
        steps=tuple(sorted((s for run in runs for s in run.steps), key=lambda s: s.begin_s)),
        training=tuple(sorted(training, key=lambda record: record.time_s)),
        measured_until_s=runs[0].measured_until_s,
    )
