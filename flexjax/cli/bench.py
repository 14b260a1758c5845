"""`flexjax bench`: policies over loads on one engine, with records, a table and checks."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from flexjax.bench.checks import Check, attained_rates, check_burst, check_sweep
from flexjax.bench.harness import header
from flexjax.bench.loads import Burst, LoadSource, measure_capacity, measure_idle_itl_s
from flexjax.bench.policies import (
    DEFAULT_POLICIES,
    DEFAULT_SHARES,
    TIER,
    SweepSettings,
    median_rows,
    run_burst,
    run_capped,
    run_sweep,
    save_run,
)
from flexjax.cli.bench_options import _GENERATED_OUTPUT, _GENERATED_PROMPT, BenchOptions
from flexjax.cli.common import check_output, make_console, print_json, running
from flexjax.cli.profile import Measured, find_measured, read_profile, size_fields
from flexjax.config import EngineConfig, FinetuneConfig, LoraConfig
from flexjax.data import demo_dataset
from flexjax.engine.engine import Engine
from flexjax.engine.profiling import Profiler
from flexjax.engine.sizing import Sizing
from flexjax.io.dataset import load_dataset
from flexjax.io.peft_adapter import LoraAdapter, save_peft_adapter
from flexjax.lora.bank import init_lora
from flexjax.metrics import RunRecord, RunSummary, compare_table, markdown_table
from flexjax.scheduler.latency_profile import LatencyProfile
from flexjax.scheduler.policy import make_policy
from flexjax.slo import SLO
from flexjax.workload import IndependentLengths, UniformLength, read_trace, scale_lengths

RUNS_FILE, CAPPED_FILE, BURST_FILE = "runs.jsonl", "capped.jsonl", "burst.jsonl"
CHECKS_FILE, TABLE_FILE = "checks.json", "table.md"

_BURST_FACTOR = 10.0
_PROFILE_REPEATS = 7
_PROFILE_CONTEXTS = (0.25, 1.0)


def run(options: BenchOptions) -> None:
    """Runs the command.

    Raises:
      ValueError: If an option is out of range, or a file cannot be used.
      ModelNotFoundError: If there is no such model.
    """
    check_output(options.output, CHECKS_FILE, can_replace=options.overwrite)
    _check(options)
    measured = find_measured(options.model)
    config = EngineConfig(max_adapters=options.adapters + 1, max_jobs=1, **size_fields(options))
    source = _source(options, Sizing.derive(measured.model, config, jax.default_backend()))
    job = _job(options, measured, config)
    path = options.profile
    profile = None if path is None else read_profile(path, measured, config)
    console = make_console(is_json=options.json)
    with running():
        engine = _start(measured, config, profile, console)
        _load_adapters(engine, source.adapters, options.rank)
        bench = _Bench(options, engine, source, job, measured.name, console)
        bench.run()


def _check(options: BenchOptions) -> None:
    """Refuses now what would only fail after the engine has started."""
    for name in ("ttft_ms", "tpot_factor", "seconds", "burst_seconds", "burst_tpot_ms"):
        value = getattr(options, name)
        if value is not None and value <= 0:
            flag = name.replace("_", "-")
            raise ValueError(f"`--{flag}` must be above 0; got {value}.")
    for name, least in (("adapters", 0), ("prompt_tokens", 1), ("output_tokens", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            flag = name.replace("_", "-")
            raise ValueError(f"`--{flag}` must be at least {least}; got {value}.")
    if options.itl_factor < 1:
        raise ValueError(f"`--itl-factor` must be at least 1; got {options.itl_factor}.")
    for name in options.policies or ():
        make_policy(name)
    tpot_ms = 1.0 if options.tpot_ms is None else options.tpot_ms
    targets = SLO(ttft_ms=options.ttft_ms, tpot_ms=tpot_ms)
    _settings(options, tuple(options.rates or (1.0,)), targets)


def _targets(options: BenchOptions, tpot_ms: float) -> SLO:
    itl_ms = options.itl_factor * tpot_ms
    return SLO(ttft_ms=options.ttft_ms, tpot_ms=tpot_ms, itl_ms=itl_ms)


def _settings(options: BenchOptions, rates: tuple[float, ...], targets: SLO) -> SweepSettings:
    return SweepSettings(
        policies=tuple(options.policies or DEFAULT_POLICIES),
        rates=rates,
        targets=targets,
        window_s=options.seconds,
        tail_s=options.tail_seconds,
        drain_s=options.drain_seconds,
        repeats=options.repeats,
        least_gaps=options.least_gaps,
        seed=options.seed,
    )


def _source(options: BenchOptions, sizing: Sizing) -> LoadSource:
    """Where requests come from, with lengths that fit the context."""
    context = sizing.max_context_len
    fields: dict[str, Any] = {"popularity": options.popularity}
    fields["adapters"] = [f"adapter-{number}" for number in range(options.adapters)]
    if options.trace is not None:
        trace = read_trace(options.trace, leave_out_failures=True).arrivals
        fields |= {"name": options.trace.stem, "trace": trace}
        if trace[0].prompt_tokens is not None:
            output = options.output_tokens or context // 4
            prompt = options.prompt_tokens or context - output
            scaled, _ = scale_lengths(trace, max_prompt_tokens=prompt, max_output_tokens=output)
            return LoadSource(**{**fields, "trace": scaled})
    else:
        kind = "poisson" if options.burstiness == 1.0 else f"gamma-{options.burstiness:g}"
        fields |= {"name": kind, "burstiness": options.burstiness}
    prompt = options.prompt_tokens or _GENERATED_PROMPT
    output = options.output_tokens or _GENERATED_OUTPUT
    if 3 * (prompt + output) // 2 > context:
        raise ValueError(
            "`--prompt-tokens` and `--output-tokens` must fit the context, "
            f"{context} tokens, one and a half times; got {prompt} and {output}."
        )
    lengths = IndependentLengths(_around(prompt), _around(output))
    return LoadSource(lengths=lengths, **fields)


def _around(mean: int) -> UniformLength:
    half = mean // 2
    return UniformLength(mean - half, mean + half)


def _job(options: BenchOptions, measured: Measured, config: EngineConfig) -> FinetuneConfig:
    """The job; its rows are read once, so that mistakes show before the engine starts."""
    job = FinetuneConfig(
        adapter="bench-job",
        dataset=demo_dataset() if options.data is None else options.data,
        lora=LoraConfig(r=options.rank),
        batch_size=options.batch_size,
        max_seq_len=options.max_seq_len,
        overlong=options.overlong,
        seed=options.seed,
    )
    sizing = Sizing.derive(measured.model, config, jax.default_backend())
    load_dataset(
        job.dataset,
        measured.tokenizer(),
        max_seq_len=job.max_seq_len or sizing.max_context_len,
        overlong=job.overlong,
        vocab_size=measured.model.vocab_size,
    )
    return job


def _start(
    measured: Measured, config: EngineConfig, profile: LatencyProfile | None, console: Console
) -> Engine:
    parts = (measured.model, measured.weights(config), measured.tokenizer(), config)
    with console.status("Starting the engine"):
        engine = Engine(*parts, model_name=measured.name, profile=profile)
        if profile is None:  # what runs are judged by is worth more than the engine's own few runs
            profiler = Profiler(engine._runner, repeats=_PROFILE_REPEATS)
            engine.latency.fit(profiler.measure(contexts=_PROFILE_CONTEXTS))
    return engine


def _load_adapters(engine: Engine, names: Any, rank: int) -> None:
    """Loads random adapters, which cost what trained ones do."""
    config = LoraConfig(r=rank)
    for number, name in enumerate(names):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "adapter"
            adapter = LoraAdapter(config, init_lora(engine.model, config, number))
            save_peft_adapter(path, adapter, engine.model)
            engine.load_adapter(name, path)


class _Bench:
    """A bench on an engine that has started."""

    def __init__(
        self,
        options: BenchOptions,
        engine: Engine,
        source: LoadSource,
        job: FinetuneConfig,
        model_name: str,
        console: Console,
    ):
        self._options = options
        self._engine = engine
        self._source = source
        self._jobs = (job,)
        self._console = console
        values = {"engine": dataclasses.asdict(engine.config), "bench": _plain(options)}
        self._header = {**header(values, options.seed), "model": model_name}
        self._summaries: list[RunSummary] = []

    def run(self) -> None:
        """Measures what the sweep is set by, sweeps, judges and writes."""
        options, folder = self._options, self._options.output
        settings = self._measured_settings()
        folder.mkdir(parents=True, exist_ok=True)
        for name in (RUNS_FILE, CAPPED_FILE, BURST_FILE, CHECKS_FILE, TABLE_FILE):
            (folder / name).unlink(missing_ok=True)
        runs = run_sweep(
            self._engine,
            settings,
            self._source,
            self._jobs,
            header=self._header,
            on_run=lambda run: self._take(run, settings),
        )
        checks: tuple[Check, ...] = ()
        if "co_serve" in settings.policies:
            capped = self._capped(settings, runs) if options.gaps else []
            checks = check_sweep(runs, settings.tier, capped)
        if options.burst:
            checks += (self._burst(settings, runs),)
        rows = median_rows(self._summaries)
        (folder / TABLE_FILE).write_text(markdown_table(rows), encoding="utf-8")
        listed = [check.as_dict() for check in checks]
        (folder / CHECKS_FILE).write_text(json.dumps(listed, indent=1) + "\n", encoding="utf-8")
        if options.json:
            print_json({"kind": "checks", "output": str(folder), "checks": listed})
            return
        print(markdown_table(rows))
        for check in checks:
            verdict = {True: "yes", False: "NO", None: "cannot tell"}[check.passed]
            print(f"{check.name}: {verdict} {json.dumps(check.figures)}")

    def _measured_settings(self) -> SweepSettings:
        """Targets and rates, relative to what this machine does."""
        options, engine = self._options, self._engine
        tpot_ms, rates = options.tpot_ms, tuple(options.rates or ())
        typical = self._source.workload(32.0, 1.0, options.seed).arrivals
        prompt = sorted(a.prompt_tokens or 1 for a in typical)[len(typical) // 2]
        output = max(8, sorted(a.output_tokens or 1 for a in typical)[len(typical) // 2])
        idle_s = measure_idle_itl_s(engine, prompt_tokens=prompt, output_tokens=output)
        if tpot_ms is None:
            tpot_ms = options.tpot_factor * 1e3 * idle_s
        capacity = None
        if not rates:
            count = 3 * engine.config.max_running
            capacity = measure_capacity(engine, self._source, num_requests=count, seed=options.seed)
            rates = tuple(float(f"{share * capacity:.3g}") for share in DEFAULT_SHARES)
        targets = _targets(options, tpot_ms)
        found = {"idle_itl_s": idle_s, "capacity": capacity}
        self._header = {**self._header, "measured": found}
        if options.json:
            row = {**found, "targets": dataclasses.asdict(targets), "rates": rates}
            print_json({"kind": "start", **row})
        else:
            more = "" if capacity is None else f", {capacity:.1f} requests/s at most"
            print(
                f"Alone, a token takes {1e3 * idle_s:.2f} ms{more}; targets: TTFT "
                f"{targets.ttft_ms:g} ms, TPOT {tpot_ms:.2f} ms."
            )
        return _settings(options, rates, targets)

    def _take(self, run: RunRecord, settings: SweepSettings) -> None:
        """Saves a run and shows its row."""
        summary = save_run(self._options.output / RUNS_FILE, run, settings.tier)
        self._summaries.append(summary)
        row = compare_table([summary], TIER)[0]
        if self._options.json:
            print_json({"kind": "run", **dataclasses.asdict(row)})
        else:
            met = "-" if row.attainment is None else f"{row.attainment:.1%}"
            load = "no requests" if row.rate is None else f"{row.rate:g}/s"
            print(
                f"{row.policy:>18} {load:>12}: {row.num_requests} requests, {met} in time, "
                f"{summary.finetuning.throughput:.0f} finetuning tokens/s",
                flush=True,
            )

    def _capped(self, settings: SweepSettings, alone: list[RunRecord]) -> list[RunRecord]:
        """Runs of which the gaps between tokens are compared."""
        parts = (self._engine, settings, self._source, self._jobs)
        runs = run_capped(*parts, alone=alone, header=self._header)
        for run in runs:
            save_run(self._options.output / CAPPED_FILE, run, settings.tier)
        return runs

    def _burst(self, settings: SweepSettings, runs: list[RunRecord]) -> Check:
        """A burst up to the highest load that inference alone answers in time."""
        highest = max(attained_rates(runs, settings.tier), default=settings.rates[0])
        tpot_ms = self._options.burst_tpot_ms
        if tpot_ms is not None:
            settings = dataclasses.replace(settings, targets=_targets(self._options, tpot_ms))
        tier = settings.tier
        seconds = self._options.burst_seconds
        burst = Burst(highest / _BURST_FACTOR, _BURST_FACTOR, seconds / 4, seconds)
        parts = (self._engine, settings, self._source, self._jobs, burst)
        found = {}
        for policy in ("inference_only", "co_serve"):
            found[policy] = run = run_burst(*parts, policy=policy, header=self._header)
            save_run(self._options.output / BURST_FILE, run, tier)
        return check_burst(
            found["co_serve"],
            tier,
            start_s=burst.start_s,
            length_s=burst.length_s,
            baseline=found["inference_only"],
        )


def _plain(options: BenchOptions) -> dict[str, Any]:
    values = dataclasses.asdict(options)
    return {name: str(v) if isinstance(v, Path) else v for name, v in values.items()}
