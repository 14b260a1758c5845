"""Loquetier's three settings (arXiv 2511.00101): what is run, in which order, and by what limits.

Inference only, finetuning only, and both at once, with one adapter and with four: as many are
trained as are served, and they are not the same. FlexJAX and PEFT run in turns; rates and limits
follow from what the two can do on the machine at hand. What the runs are worth is
`loquetier_table`'s. Needs torch.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flexjax.bench.loquetier_sides import MICRO_BATCH, Sides, require, served
from flexjax.bench.loquetier_table import (
    AT_ONCE,
    FINETUNING,
    FLEXJAX,
    INFERENCE,
    PEFT,
    PEFT_DROPS,
    UNIFIED,
    Measured,
)
from flexjax.bench.peft_model import FORMS
from flexjax.metrics import RunRecord, measured_window, percentile, summarize_run
from flexjax.slo import NO_SLO, SLO, SLO_CLASSES
from flexjax.workload import (
    Arrival,
    IndependentLengths,
    UniformLength,
    Workload,
    fit_load,
    loquetier_burst_load,
    loquetier_changing_load,
    loquetier_four_adapters,
    loquetier_one_adapter,
    slice_time,
    with_adapters,
    with_lengths,
)

LOW, HIGH, CHANGING, BURST = "low", "high", "changing", "burst"

RATES = {LOW: (PEFT, 0.25), HIGH: (FLEXJAX, 0.75), CHANGING: (FLEXJAX, 0.6), BURST: (FLEXJAX, 0.5)}
"""Mean rate of a load, as a share of what a side answers of requests that come all at once."""

ADMISSION_LIMIT_S = 6.0
"""Loquetier's limit of the wait for admission."""

_ONE_BATCH = 3
"""Batches of requests that come all at once."""
_BURST_PART_S = 480.0
_ENOUGH = 0.95
"""Shorter training passes let requests wait less: the shortest that train this fast are chosen."""
_TPOT_FACTOR = 3.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured.

    Attributes:
      adapters: Numbers of adapters, out of Loquetier's, 1 and 4.
      window_s: Seconds of a run over which rates are averaged.
      drain_s: Seconds that answers may take after it.
      repeats: Times that everything is run, each with requests of its own.
      seed: Seed of loads and prompts.
      burst: Arrivals of the burst load, seconds; None for drawn ones.
      num_threads: Most threads that the peer may use.

    Raises:
      ValueError: If a number is out of range.
    """

    adapters: Sequence[int] = (1, 4)
    window_s: float = 3.0
    drain_s: float = 1.0
    repeats: int = 2
    seed: int = 0
    burst: Sequence[float] | None = None
    num_threads: int = 2

    def __post_init__(self) -> None:
        is_right = set(self.adapters) in ({1}, {4}, {1, 4})
        require(is_right, "adapters", "out of 1 and 4, Loquetier's numbers", self.adapters)
        for name in ("repeats", "num_threads"):
            require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        is_right = math.isfinite(self.window_s) and self.window_s > 0
        require(is_right, "window_s", "a number > 0", self.window_s)
        is_right = math.isfinite(self.drain_s) and self.drain_s >= 0
        require(is_right, "drain_s", "a number >= 0", self.drain_s)


@dataclasses.dataclass(frozen=True)
class Limits:
    """Latency limits: those of the class "interactive" and Loquetier's, all times one factor.

    Attributes:
      factor: Such that the TPOT target is 3 times the slower side's gap between two tokens of a
        request that has the machine to itself.
      idle_gap_s: That gap, by side.
    """

    factor: float
    idle_gap_s: dict[str, float]

    @property
    def targets(self) -> SLO:
        """TTFT and TPOT; time saved on early tokens may stretch a gap to four times the TPOT."""
        base = SLO_CLASSES["interactive"]
        tpot_ms = self.factor * 1e3 * base.tpot_s
        return SLO(ttft_ms=self.factor * 1e3 * base.ttft_s, tpot_ms=tpot_ms, itl_ms=4 * tpot_ms)

    @property
    def admission_s(self) -> float:
        """Longest wait for admission."""
        return self.factor * ADMISSION_LIMIT_S


@dataclasses.dataclass(frozen=True)
class PeerChoice:
    """The peer's best form.

    Attributes:
      forms: Form of a batch, by the number of adapters.
      generate_threads: torch's threads while it generates.
      train_threads: torch's threads while it trains.
      micro_batch: Samples of a training pass.
      tried: Tokens per second of everything that was tried, by name.
    """

    forms: dict[int, str]
    generate_threads: int
    train_threads: int
    micro_batch: int
    tried: dict[str, float]


class Bench:
    """All runs on both sides.

    Attributes:
      sides: Loaded, checked by `Sides.check`.
      settings: What is measured.
      choice: The peer's form.
      limits: Latency limits.
      capacity: Requests per second that are answered of those that come all at once, by number of
        adapters and side; there once `run` has measured it.
    """

    def __init__(self, sides: Sides, settings: Settings, header: Mapping[str, Any]):
        require(
            max(settings.adapters) <= sides.sizes.num_adapters,
            "adapters",
            f"at most the {sides.sizes.num_adapters} that are loaded",
            settings.adapters,
        )
        self.sides = sides
        self.settings = settings
        self.capacity: dict[int, dict[str, float]] = {}
        self._header = {**header, "model": "tiny"}
        sizes = sides.sizes
        self._lengths = IndependentLengths(
            UniformLength(*sizes.prompt_tokens), UniformLength(*sizes.output_tokens)
        )
        self.choice = self._choose_peer()
        self.limits = self._measure_limits()

    def run(self, on_run: Callable[[Measured], None] = lambda measured: None) -> list[Measured]:
        """Runs everything; `on_run` gets each run as soon as it is there."""
        found: list[Measured] = []

        def add(measured: Measured) -> None:
            found.append(measured)
            on_run(measured)

        for count in self.settings.adapters:
            self._run_all_at_once(count, add)
        for repeat, count in itertools.product(
            range(self.settings.repeats), self.settings.adapters
        ):
            for load in (LOW, HIGH):
                self._run_pair(count, INFERENCE, load, repeat, add)
            self._run_pair(count, FINETUNING, "", repeat, add)
            for load in RATES:
                self._run_pair(count, UNIFIED, load, repeat, add)
        return found

    def load(self, count: int, name: str, seed: int) -> Workload:
        """A load of `RATES` at its rate, as long as a run's window.

        Steady loads are Loquetier's for one and four adapters; those of one adapter go to four in
        turns.
        """
        names = [served(number) for number in range(count)]
        if name == BURST:
            trace = None if self.settings.burst is None else list(map(Arrival, self.settings.burst))
            whole = loquetier_burst_load(names, self._lengths, trace=trace, seed=seed)
            arrivals = _busiest(whole.arrivals, _BURST_PART_S)
            whole = Workload(whole.name, arrivals, seed, {"part_s": _BURST_PART_S})
        elif name == CHANGING:
            whole = loquetier_changing_load(names[0], self._lengths, seed=seed)
        elif count == 1:
            whole = loquetier_one_adapter(names[0], self._lengths, seed=seed)
        else:
            whole = loquetier_four_adapters(names, self._lengths, seed=seed)
        fitted = fit_load(whole, self.rate(count, name), self.settings.window_s)
        arrivals = with_adapters(fitted.arrivals, names, "distinct")
        return dataclasses.replace(fitted, arrivals=arrivals)

    def rate(self, count: int, load: str) -> float:
        """Mean requests per second of a load."""
        side, share = RATES[load]
        return share * self.capacity[count][side]

    # What is measured first.

    def _all_at_once(self, count: int, seed: int) -> Workload:
        requests = [Arrival(0.0)] * (_ONE_BATCH * self.sides.sizes.engine.max_running)
        names = [served(number) for number in range(count)]
        requests = with_adapters(with_lengths(requests, self._lengths, seed), names, "distinct")
        return Workload("all-at-once", requests, seed)

    def _choose_peer(self) -> PeerChoice:
        """Tries every form of the peer, each once, after a first run that is not measured."""
        sides, settings = self.sides, self.settings
        threads = sorted({1, settings.num_threads})
        tried: dict[str, float] = {}
        speed: dict[tuple[int, int, str], float] = {}
        self._serve(self._all_at_once(1, settings.seed), 0, form=FORMS[0])
        for count in settings.adapters:
            workload = self._all_at_once(count, settings.seed)
            for form in FORMS[: 2 if count == 1 else 3]:
                for number in threads:
                    sides.peer.generate_threads = number
                    run = self._serve(workload, 0, form=form)
                    found = summarize_run(run).output_tokens_per_s
                    speed[count, number, form] = found
                    tried[f"generate, {count} adapters, {form}, {number} threads"] = found
        best = max(speed, key=lambda key: speed[key])
        sides.peer.generate_threads = best[1]
        forms = {}
        for count in settings.adapters:
            of_count = [key for key in speed if key[:2] == (count, best[1])]
            forms[count] = max(of_count, key=lambda key: speed[key])[2]
        passes: dict[tuple[int, int], float] = {}
        whole = sides.sizes.batch_size
        for size in sorted({math.gcd(MICRO_BATCH, whole), whole}):
            for number in threads:
                passes[size, number] = found = self._train_speed(number, size)
                tried[f"train, {size} samples a pass, {number} threads"] = found
        enough = _ENOUGH * max(passes.values())
        least = min(size for size, number in passes if passes[size, number] >= enough)
        of_size = [key for key in passes if key[0] == least]
        sides.micro_batch, sides.peer.train_threads = max(of_size, key=lambda key: passes[key])
        chosen = (best[1], sides.peer.train_threads, sides.micro_batch)
        return PeerChoice(forms, *chosen, tried)

    def _train_speed(self, threads: int, micro_batch: int) -> float:
        """Loss-bearing tokens per second of two batches, after one that is not measured."""
        self.sides.peer.train_threads, self.sides.micro_batch = threads, micro_batch
        job = self.sides.peer_jobs(1)[0]
        while len(job.records) < 3:
            job.run_pass()
        first, *others = job.records
        tokens = sum(record.target_tokens for record in others)
        return tokens / (others[-1].time_s - first.time_s)

    def _measure_limits(self) -> Limits:
        prompt, output = (
            (low + high) // 2
            for low, high in (self.sides.sizes.prompt_tokens, self.sides.sizes.output_tokens)
        )
        count = self.settings.adapters[0]
        alone = Workload("alone", [Arrival(0.0, prompt, max(2, output), adapter=served(0))])
        options: dict[str, Any] = {"form": self.choice.forms[count]}
        runs = {
            FLEXJAX: [self._serve(alone, 0) for _ in range(3)],
            PEFT: [self._serve(alone, 0, **options) for _ in range(3)],
        }
        gaps = {
            side: statistics.median(percentile(run.requests[0].itl_s, 50) for run in found)
            for side, found in runs.items()
        }
        slowest = max(gaps.values())
        return Limits(_TPOT_FACTOR * slowest / SLO_CLASSES["interactive"].tpot_s, gaps)

    # Runs.

    def _serve(
        self,
        workload: Workload | None,
        jobs: int,
        *,
        form: str | None = None,
        seed: int = 0,
        targets: SLO = NO_SLO,
        **options: Any,
    ) -> RunRecord:
        """One run: of the peer where a form is given."""
        options |= {"header": self._header, "targets": targets}
        if form is None:
            return self.sides.run_flexjax(workload, jobs, seed, **options)
        return self.sides.run_peer(workload, jobs, seed, form=form, **options)

    def _run_all_at_once(self, count: int, add: Callable[[Measured], None]) -> None:
        """Requests that come all at once, and the capacities that follow."""
        rates: dict[str, list[float]] = {FLEXJAX: [], PEFT: []}
        self._serve(self._all_at_once(count, self.settings.seed), 0)
        for repeat in range(max(3, self.settings.repeats)):
            seed = self.settings.seed + repeat
            workload = self._all_at_once(count, seed)
            for side in rates:
                form = self.choice.forms[count] if side == PEFT else None
                options: dict[str, Any] = {"form": form, "targets": self.limits.targets}
                run = self._serve(workload, 0, seed=seed, **options)
                begin_s, end_s = measured_window(run)
                rates[side].append(len(run.requests) / (end_s - begin_s))
                add(Measured(count, INFERENCE, AT_ONCE, side, run))
        self.capacity[count] = {side: statistics.median(found) for side, found in rates.items()}

    def _run_pair(
        self,
        count: int,
        setting: str,
        load: str,
        repeat: int,
        add: Callable[[Measured], None],
    ) -> None:
        """The same load on every side; who begins changes with the repeat."""
        seed = self.settings.seed + repeat
        workload = self.load(count, load, seed) if load else None
        jobs = 0 if setting == INFERENCE else count
        options: dict[str, Any] = {
            "horizon_s": self.settings.window_s,
            "drain_s": self.settings.drain_s,
            "targets": self.limits.targets,
            "seed": seed,
        }
        options |= {"rate": self.rate(count, load)} if load else {}
        drops = {"patience_s": self.limits.admission_s}
        form = {"form": self.choice.forms[count]}
        sides: dict[str, dict[str, Any]] = {FLEXJAX: {}, PEFT: form, PEFT_DROPS: {**form, **drops}}
        if setting != UNIFIED or load == LOW:
            del sides[PEFT_DROPS]
        order = list(sides) if repeat % 2 == 0 else list(reversed(sides))
        for side in order:
            run = self._serve(workload, jobs, **options, **sides[side])
            add(Measured(count, setting, load, side, run))


def _busiest(arrivals: Sequence[Arrival], length_s: float) -> list[Arrival]:
    """The stretch of whole minutes that holds most requests, from its first request on."""
    last_s = arrivals[-1].arrival_s
    starts = range(0, max(1, int(last_s - length_s) + 1), 60)
    return max((slice_time(arrivals, start, length_s) for start in starts), key=len)
