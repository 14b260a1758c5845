"""A small engine, a load and jobs that the simulator's tests share."""

from __future__ import annotations

from flexjax.config import FinetuneConfig
from flexjax.layout import StepSizes
from flexjax.scheduler.buckets import BucketLadder
from flexjax.scheduler.latency_profile import LatencyProfile, RooflineCosts, synthetic_profile
from flexjax.simulator import SimulatedEngine, SimulatedJob
from flexjax.workload import (
    IndependentLengths,
    UniformLength,
    Workload,
    poisson_arrivals,
    with_adapters,
    with_lengths,
)

LADDER = BucketLadder((1, 4, 16), (32, 64, 128), (32, 64, 128), 4, 4)
COSTS = RooflineCosts(
    fixed=0.5, forward_floor=4.0, forward_row=0.06, backward_floor=1.0, backward_row=0.015
)


def make_profile(costs: RooflineCosts = COSTS) -> LatencyProfile:
    """A device on which a step of decode rows alone takes about 5 ms."""
    return synthetic_profile(LADDER, costs, context_len=512)


def make_engine(**changes) -> SimulatedEngine:
    """Sixteen requests of 512 tokens and four layers."""
    pages_per_seq = 64
    options = {
        "ladder": LADDER,
        "sizes": StepSizes(pages_per_seq, 4 * pages_per_seq + 128, 128, 8),
        "num_pages": 600,
        "arena_pages": 128,
        "page_size": 8,
        "max_running": 16,
        "max_context_len": 512,
        "num_layers": 4,
        "max_jobs": 2,
    }
    return SimulatedEngine(**{**options, **changes})


def make_workload(
    num_requests: int = 30, rate: float = 8.0, seed: int = 3, adapters=("a", "b"), longest=120
) -> Workload:
    """Poisson arrivals of two adapters and the base model."""
    lengths = IndependentLengths(UniformLength(1, longest), UniformLength(1, 80))
    arrivals = with_lengths(poisson_arrivals(rate, num_requests, seed), lengths, seed)
    if adapters:
        arrivals = with_adapters(arrivals, adapters, "uniform", seed, base_share=0.3)
    return Workload("poisson", arrivals, seed, {"rate": rate})


def make_job(name: str = "job", lengths=(50, 200, 17, 128, 300), **options) -> SimulatedJob:
    """A job of a few sequences, shorter and longer than a window."""
    defaults = {"batch_size": 2, "epochs": 1}
    config = FinetuneConfig(adapter=name, dataset=(), **{**defaults, **options})
    return SimulatedJob(config, lengths)


def endless_job(name: str = "job") -> SimulatedJob:
    """A job that does not end."""
    return make_job(name, max_steps=10**6)
