"""Measures what the host does in an iteration, in milliseconds, beside a device that costs nothing.

    python scripts/bench_overhead.py [--output FILE.json] [--iterations 300] [--quick] [--no-engine]

Two parts. "host" runs the scheduler, the building of batches and the taking in of tokens for an
8B model on a GPU that is left out: 64, 256 and 1,024 running requests of 32 adapters, with up to
100,000 waiting, and a finetuning job. "engine" runs the whole loop with the embedded model on this
CPU, 256 requests at once; there, dispatch includes what the CPU's runtime does in the caller's
thread, and the device is idle from the end of a step to the launch of the next, if that comes
later. Medians and p99; JSON lines with every sample.
"""

from __future__ import annotations

import argparse
import collections
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np

from flexjax.bench.harness import Timing, header, table, write_jsonl
from flexjax.builtin_models import builtin_model_config
from flexjax.config import EngineConfig, FinetuneConfig, LoraConfig, SamplingParams
from flexjax.data import demo_dataset, tiny_model_dir
from flexjax.engine.batch import SampleTable, build_loss, build_step
from flexjax.engine.engine import Engine
from flexjax.engine.output import RequestOutput
from flexjax.engine.pipeline import StepEvent
from flexjax.engine.sizing import Sizing
from flexjax.layout import Bucket
from flexjax.request import GenerationRequest
from flexjax.scheduler.features import features_of
from flexjax.scheduler.latency_model import LatencyModel
from flexjax.scheduler.latency_profile import synthetic_profile
from flexjax.scheduler.page_allocator import PageAllocator
from flexjax.scheduler.plan import StepPlan
from flexjax.scheduler.policy import CoServe
from flexjax.scheduler.scheduler import Scheduler
from flexjax.scheduler.training import TrainingRun, TrainSequence
from flexjax.slo import SLO

MODEL = "llama-3.1-8b"
NUM_ADAPTERS = 32
PROMPT, OUTPUT = 64, 256
"""Short prompts: a step can admit more than end in it, so that all slots stay taken."""
STEP_S = 0.02
"""Seconds that a step is made to take, on the made-up clock."""
CASES = ((64, 0), (256, 0), (1024, 0), (64, 100_000), (1024, 100_000))
QUICK_CASES = ((8, 0), (8, 100))


class HostLoop:
    """The host's side of an engine whose device is done at once.

    Requests that end are replaced, so that as many run and wait all the time.
    """

    def __init__(self, num_running: int, num_waiting: int):
        model = builtin_model_config(MODEL)
        config = EngineConfig(
            max_running=num_running,
            max_context_len=2048,
            max_adapters=NUM_ADAPTERS + 1,
            chunk_buckets=(64, 256, 1024),
            window_buckets=(128, 512),
        )
        self._sizing = sizing = Sizing.derive(model, config, "gpu")
        self.samples: dict[str, list[float]] = collections.defaultdict(list)
        self._scheduler = Scheduler(
            ladder=sizing.ladder,
            sizes=sizing.step,
            pages=PageAllocator(sizing.num_pages, config.page_size),
            arena=PageAllocator(sizing.arena_pages, config.page_size),
            policy=CoServe(),
            latency=LatencyModel.from_profile(synthetic_profile(sizing.ladder)),
            max_running=num_running,
            max_context_len=sizing.max_context_len,
            num_layers=model.num_layers,
            tile_order=config.tile_order,
            is_deterministic=False,
        )
        self._scheduler.add_run(self._training_run(model.num_layers))
        self._max_running = num_running
        self._sampling = SampleTable(num_running)
        self._outputs: dict[int, RequestOutput] = {}
        self._draws = np.random.default_rng(0)
        self._prompt = tuple(range(PROMPT))
        self._num_requests = 0
        self._now_s = 0.0
        self._previous: StepPlan | None = None
        for _ in range(num_running + num_waiting):
            self._add()

    def _training_run(self, num_layers: int) -> TrainingRun:
        tokens = np.arange(512, dtype=np.int32)
        sizing = self._sizing
        return TrainingRun(
            0,
            FinetuneConfig(adapter="job", dataset=[], max_steps=10**9, batch_size=8),
            [TrainSequence(tokens, tokens)] * 64,
            [],
            slot=NUM_ADAPTERS,
            num_layers=num_layers,
            bottom=0,
            group_rows=sizing.group_rows,
            arena_tokens=sizing.arena_tokens,
            page_size=sizing.page_size,
        )

    def _add(self) -> None:
        number, self._num_requests = self._num_requests, self._num_requests + 1
        # Of different lengths, so that they do not all end at once.
        length = OUTPUT // 2 + int(self._draws.integers(OUTPUT))
        request = GenerationRequest(
            request_id=number,
            prompt_token_ids=self._prompt,
            params=SamplingParams(max_tokens=length, ignore_eos=True),
            adapter_slot=number % NUM_ADAPTERS,
            arrival_s=self._now_s,
            eos_token_ids=frozenset(),
            seed=number,
            slo=SLO(ttft_ms=5_000.0, tpot_ms=75.0),
        )
        self._outputs[number] = RequestOutput(
            self._scheduler.add(request),
            None,
            adapter=None,
            adapter_version=0,
            max_context_len=self._sizing.max_context_len,
        )

    def fill(self, limit: int = 5_000) -> None:
        """Runs until every slot is taken, or nothing is left that waits; not measured."""
        scheduler = self._scheduler
        for _ in range(limit):
            self.step()
            if len(scheduler.running) >= self._max_running or not len(scheduler.waiting):
                break
        self.samples.clear()

    def step(self) -> None:
        """Runs one iteration, in the order in which the engine does."""
        started = time.perf_counter()
        plan = self._scheduler.schedule(self._now_s, self._now_s)
        planned = time.perf_counter()
        self._build(plan)
        built = time.perf_counter()
        self._now_s += STEP_S
        ended = self._take_in(self._previous) if self._previous else 0
        taken = time.perf_counter()
        self._previous = plan
        spans = (planned - started, built - planned, taken - built, taken - started)
        for name, seconds in zip(("schedule", "build", "take in", "all"), spans, strict=True):
            self.samples[name].append(1e3 * seconds)
        for _ in range(ended):
            self._add()

    def _build(self, plan: StepPlan) -> None:
        sizing, tile = self._sizing, plan.tile
        bucket: Bucket | None = None
        if plan.decode or plan.num_chunk_rows or tile:
            bucket = sizing.ladder.bucket(
                len(plan.decode),
                plan.num_chunk_rows,
                tile.length if tile else 0,
                tile.num_layers if tile else None,
            )
            build_step(plan, bucket, sizing.step, sizing.page_size)
        if plan.samples:
            self._sampling.build(plan.samples, sizing.ladder.padded_decode(len(plan.samples)))
        for window in plan.losses:
            rows = next(size for size in sizing.ladder.window if size >= window.length)
            build_loss(window, rows)
        features_of(plan, bucket, decode_kv_tokens=plan.decode_kv_tokens, ladder=sizing.ladder)

    def _take_in(self, plan: StepPlan) -> int:
        """Takes in a token of each sample; returns how many requests ended."""
        ended = 0
        for sequence in plan.samples:
            output = self._outputs.get(sequence.request.request_id)
            if output is None:
                continue  # ended by the token before
            self._scheduler.record_token(sequence, 7, self._now_s)
            if output.push(7, None, self._now_s) is not None:
                self._scheduler.finish(sequence)
                del self._outputs[sequence.request.request_id]
                ended += 1
        return ended

    @property
    def state(self) -> dict[str, int]:
        """What runs and waits, to be recorded beside the times."""
        scheduler = self._scheduler
        return {"running": len(scheduler.running), "waiting": len(scheduler.waiting)}


def measure_host(num_running: int, num_waiting: int, iterations: int) -> list[dict]:
    """Records of one case of the first part."""
    loop = HostLoop(num_running, num_waiting)
    loop.fill()
    for _ in range(iterations):
        loop.step()
    more = {"part": "host", **loop.state}
    return [
        Timing(name, "ms", tuple(samples)).record(**more) for name, samples in loop.samples.items()
    ]


def measure_engine(num_running: int, iterations: int) -> list[dict]:
    """Records of the second part: a whole engine with the embedded model."""
    config = EngineConfig(
        max_running=num_running,
        max_context_len=128,
        max_adapters=2,
        max_jobs=1,
        max_lora_rank=4,
        decode_buckets=(num_running,),
        chunk_buckets=(64,),
        window_buckets=(64,),
    )
    engine = Engine.from_pretrained(tiny_model_dir(), config)
    launched: list[float] = []
    launch = engine._runner.launch

    def timed_launch(plan: StepPlan):
        started = time.perf_counter()
        handle = launch(plan)
        launched.append(1e3 * (time.perf_counter() - started))
        return handle

    engine._runner.launch = timed_launch  # type: ignore[method-assign]
    events: list[StepEvent] = []
    engine.finetune(
        FinetuneConfig(adapter="job", dataset=demo_dataset(), lora=LoraConfig(r=4), max_steps=10**9)
    )
    params = SamplingParams(max_tokens=120, ignore_eos=True)
    for number in range(num_running):
        engine.add_request([number % 500 + 2] * 4, params)
    while engine.stats().num_waiting:
        engine.step()
    launched.clear()
    engine.on_step = events.append
    for _ in range(min(iterations, 60)):
        engine.step()
    found: Mapping[str, Sequence[float]] = {
        "schedule": [event.schedule_ms for event in events],
        "build and dispatch": launched,
        "all": [event.host_ms for event in events],
        "device idle": [event.idle_ms for event in events],
        "step": [1e3 * (event.end_s - event.begin_s) for event in events],
    }
    more = {"part": "engine", "running": engine.stats().num_running, "waiting": 0}
    records = [Timing(name, "ms", tuple(values)).record(**more) for name, values in found.items()]
    share = sum(found["device idle"]) / sum(found["step"])
    print(f"device idle: {share:.1%} of {sum(found['step']) / 1e3:.1f} s of steps")
    return [{**record, "idle_share": share} for record in records]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Returns:
      The exit status.
    """
    parser = argparse.ArgumentParser(
        prog="bench_overhead.py", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--output", type=Path, help="JSON lines with every sample")
    parser.add_argument("--iterations", type=int, default=300, help="measured iterations")
    parser.add_argument("--quick", action="store_true", help="small cases; takes seconds")
    parser.add_argument("--no-engine", action="store_true", help="leave the second part out")
    options = parser.parse_args(arguments)
    if options.iterations < 1:
        parser.error(f"--iterations must be at least 1; got {options.iterations}")
    cases = QUICK_CASES if options.quick else CASES
    settings = {"model": MODEL, "cases": cases, "iterations": options.iterations}
    records = [header({**settings, "adapters": NUM_ADAPTERS}, 0)]
    for num_running, num_waiting in cases:
        records += measure_host(num_running, num_waiting, options.iterations)
    if not options.no_engine:
        records += measure_engine(8 if options.quick else 256, options.iterations)
    if options.output is not None:
        write_jsonl(options.output, records)
    rows = [("part", "running", "waiting", "what", "median ms", "p99 ms")]
    rows += [
        (
            record["part"],
            f"{record['running']:,}",
            f"{record['waiting']:,}",
            record["name"],
            f"{record['median']:.3f}",
            f"{record['p99']:.3f}",
        )
        for record in records[1:]
    ]
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
