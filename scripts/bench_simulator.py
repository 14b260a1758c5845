"""Holds the simulator against the engine on this CPU, with the embedded model.

    python scripts/bench_simulator.py --output STEM [--trace FILE] [--unpaced] [--append]
        [--repeats 3] [--seconds 10] [--quick] [--json]
    python scripts/bench_simulator.py --paper --output STEM [--policies NAME...] [--hours 1]

One engine runs co-serving, turns of finetuning, and inference alone at three rates, with drawn
arrivals or those of a trace, whose lengths are scaled to the model's context. Its steps are paced
to a made-up device that is slower than this CPU, so that the pace is the same whatever else runs
here; with `--unpaced` they take what they take, and some of the runs give the profile on which the
*others* are simulated. Prints the table and writes STEM.md and STEM.json, in some five minutes;
`--quick` takes seconds and shows that the script works; its figures mean nothing. `--paper`
simulates the FlexLLM paper's set-up instead, with no engine. Exit status 0 once all has run,
whatever the verdict, 2 for options that cannot be used.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from flexjax.bench.harness import header
from flexjax.bench.loads import LoadSource, measure_capacity, measure_idle_itl_s
from flexjax.bench.paced import paced
from flexjax.bench.paper_run import measure_paper, save_paper
from flexjax.bench.sim_check import CheckSettings, compare, run_engine
from flexjax.bench.sim_report import Comparison, comparison_report, save_comparisons
from flexjax.config import EngineConfig, FinetuneConfig, LoraConfig
from flexjax.data import demo_dataset, tiny_model_dir
from flexjax.engine.engine import Engine
from flexjax.engine.sizing import Sizing
from flexjax.model_config import load_model_config
from flexjax.scheduler.features import RooflineCosts
from flexjax.scheduler.latency_profile import LatencyProfile, synthetic_profile
from flexjax.scheduler.policy import make_policy
from flexjax.simulator import DeviceTimes
from flexjax.simulator.paper import PAPER_POLICIES
from flexjax.slo import SLO
from flexjax.workload import (
    Arrival,
    IndependentLengths,
    UniformLength,
    read_trace,
    scale_lengths,
)

FULL = EngineConfig(
    max_context_len=384,
    max_running=16,
    decode_buckets=(4, 16),
    chunk_buckets=(32, 256),
    window_buckets=(32, 256),
    max_adapters=3,
    max_lora_rank=8,
)
QUICK = EngineConfig(
    max_context_len=64,
    max_running=4,
    decode_buckets=(4,),
    chunk_buckets=(16,),
    window_buckets=(16,),
    max_adapters=2,
    max_lora_rank=2,
)
PACE = RooflineCosts(
    fixed=3.0,
    forward_floor=4.0,
    forward_row=0.15,
    backward_floor=1.5,
    backward_row=0.03,
    decode_kv=1e-3,
    head_floor=0.5,
    optimizer=5.0,
)
"""The device that steps are paced to: slower than a core or two, so that they keep up."""
POLICIES = ("co_serve", "temporal:16", "inference_only")
SHARES = (0.45, 0.6, 0.75)
"""Offered loads, as shares of what the engine can answer."""
TTFT_MS = 120.0
TPOT_FACTOR = 2.8
"""Target for TPOT, over the time per token of a request that is alone."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the check, or the paper's table.

    Returns:
      The exit status.
    """
    options = _parser().parse_args(arguments)
    config = QUICK if options.quick else FULL
    try:
        _refuse(options)
        source = load_source(options.trace, config)
    except (ValueError, OSError) as error:
        print(f"bench_simulator.py: {error}", file=sys.stderr)
        return 2
    if options.paper:
        return _paper(options)
    profile = None if options.unpaced else pace_profile(config)
    engine = Engine.from_pretrained(tiny_model_dir(), config, profile=profile)
    job = FinetuneConfig(
        adapter="bench-job",
        dataset=demo_dataset(),
        lora=LoraConfig(r=config.max_lora_rank),
        batch_size=2 if options.quick else 8,
        overlong="truncate",
        seed=options.seed,
    )
    result = _check(engine, source, job, options, profile)
    save_comparisons(options.output, [result], append=options.append)
    return 0


def _paper(options: argparse.Namespace) -> int:
    """Simulates the paper's set-up, and saves what there is after each policy."""
    for number, policy in enumerate(options.policies or PAPER_POLICIES):
        found = measure_paper([policy], duration_s=3600.0 * options.hours)
        try:
            save_paper(options.output, found, append=options.append or number > 0)
        except ValueError as error:
            print(f"bench_simulator.py: {error}", file=sys.stderr)
            return 2
    return 0


def _refuse(options: argparse.Namespace) -> None:
    """Refuses now what would only fail after minutes.

    Raises:
      ValueError: If an option is out of range, or names what is not there.
    """
    if not options.output.parent.is_dir():
        raise ValueError(f"`--output` must be in a folder that exists; got {options.output}.")
    if not 0 < options.hours < math.inf:
        raise ValueError(f"`--hours` must be a number > 0; got {options.hours}.")
    for name in options.policies or ():
        make_policy(name)
    _settings(options, 1.0, 1.0)


def _settings(options: argparse.Namespace, idle_s: float, capacity: float) -> CheckSettings:
    seconds, repeats = (0.5, 2) if options.quick else (10.0, 3)
    shares = options.shares or SHARES
    return CheckSettings(
        policies=POLICIES,
        rates=tuple(float(f"{share * capacity:.3g}") for share in shares),
        targets=SLO(ttft_ms=TTFT_MS, tpot_ms=options.tpot_factor * 1e3 * idle_s),
        window_s=seconds if options.seconds is None else options.seconds,
        repeats=repeats if options.repeats is None else options.repeats,
        seed=options.seed,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bench_simulator.py", description=(__doc__ or "").splitlines()[0]
    )
    add = parser.add_argument
    add("--output", type=Path, required=True, help="path of the results, without a suffix")
    add("--trace", type=Path, help="CSV file of arrivals and lengths (default: drawn)")
    add("--unpaced", action="store_true", help="let steps take what they take on this machine")
    add("--append", action="store_true", help="add to the results that are there")
    add("--repeats", type=int, help="seeds of the requests (default: 3)")
    add("--seconds", type=float, help="seconds of a run (default: 10)")
    add("--shares", type=float, nargs="+", help="offered loads, of what the engine can answer")
    add("--tpot-factor", type=float, default=TPOT_FACTOR, help="TPOT target over an idle token's")
    add("--seed", type=int, default=0, help="first seed")
    add("--quick", action="store_true", help="very short runs; takes seconds")
    add("--json", action="store_true", help="print JSON lines")
    add("--paper", action="store_true", help="simulate the paper's set-up instead")
    add("--policies", nargs="+", help="of the paper's set-up (default: all)")
    add("--hours", type=float, default=1.0, help="of each run of the paper's set-up")
    return parser


def pace_profile(config: EngineConfig) -> LatencyProfile:
    """The profile of the device that steps are paced to."""
    sizing = Sizing.derive(load_model_config(tiny_model_dir()), config, "cpu")
    return synthetic_profile(
        sizing.ladder,
        PACE,
        context_len=sizing.max_context_len,
        page_size=sizing.page_size,
        dtype=sizing.dtype,
    )


def load_source(trace: Path | None, config: EngineConfig) -> LoadSource:
    """Drawn requests, or those of a trace, with lengths that fit the context.

    Raises:
      ValueError, OSError: If the trace cannot be used.
    """
    context = config.max_context_len
    assert context is not None
    if trace is not None:
        found = read_trace(trace, leave_out_failures=True).arrivals
        scaled, _ = scale_lengths(
            found, max_prompt_tokens=3 * context // 4, max_output_tokens=context // 4
        )
        return LoadSource(name=trace.stem, trace=scaled)
    prompt, output = context // 4, context // 8
    lengths = IndependentLengths(
        UniformLength(prompt // 3, 5 * prompt // 3), UniformLength(output // 2, 3 * output // 2)
    )
    return LoadSource(name="poisson", lengths=lengths)


def _check(
    engine: Engine,
    source: LoadSource,
    job: FinetuneConfig,
    options: argparse.Namespace,
    profile: LatencyProfile | None,
) -> tuple[dict[str, Any], Comparison]:
    """Measures what the loads are set by, runs both sides, and prints the table."""
    idle_s, capacity = _limits(engine, source, options.seed, profile)
    settings = _settings(options, idle_s, capacity)
    about = {
        **header({"engine": dataclasses.asdict(engine.config)}, options.seed, _command()),
        "model": "tiny",
        "workload": source.name,
        "is_paced": profile is not None,
        "pace": None if profile is None else dataclasses.asdict(PACE),
        "idle_itl_s": idle_s,
        "capacity": capacity,
        "settings": dataclasses.asdict(settings),
    }
    began_s = time.perf_counter()
    cases = run_engine(engine, settings, source, [job], profile=profile, header=about)
    about["engine_s"], began_s = time.perf_counter() - began_s, time.perf_counter()
    comparison = compare(engine, cases, settings, [job], profile=profile)
    about["simulator_s"] = time.perf_counter() - began_s
    if options.json:
        print(json.dumps({**about, **comparison.as_dict()}))
    else:
        print(comparison_report(about, comparison), flush=True)
    return about, comparison


def _limits(
    engine: Engine, source: LoadSource, seed: int, profile: LatencyProfile | None
) -> tuple[float, float]:
    """Seconds per token of a lone request, and requests per second at most."""
    typical = sorted(source.workload(32.0, 1.0, seed).arrivals, key=_output_tokens)[16]
    prompt, output = typical.prompt_tokens or 1, max(8, _output_tokens(typical))
    count = 3 * engine.config.max_running

    def measure() -> tuple[float, float]:
        idle_s = measure_idle_itl_s(engine, prompt_tokens=prompt, output_tokens=output)
        return idle_s, measure_capacity(engine, source, num_requests=count, seed=seed)

    if profile is None:
        return measure()
    with paced(engine, DeviceTimes(profile)):
        return measure()


def _command() -> list[str]:
    """The command line; of paths only the names, for folders are nobody else's."""
    words = ["python", "scripts/bench_simulator.py"]
    return words + [Path(word).name if "/" in word else word for word in sys.argv[1:]]


def _output_tokens(arrival: Arrival) -> int:
    return arrival.output_tokens or 0


if __name__ == "__main__":
    sys.exit(main())
