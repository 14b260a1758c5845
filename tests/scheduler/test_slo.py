"""Latency targets kept, nothing starved: the scheduler on a clock, from a hand-made profile."""

import math

import numpy as np
import pytest

from flexjax.config import EngineConfig, FinetuneConfig, SamplingParams
from flexjax.layout import StepSizes
from flexjax.request import GenerationRequest
from flexjax.scheduler.buckets import BucketLadder
from flexjax.scheduler.features import features_of
from flexjax.scheduler.page_allocator import PageAllocator
from flexjax.scheduler.policy import POLICIES, CoServe, StepView, Temporal, make_policy
from flexjax.scheduler.scheduler import Scheduler
from flexjax.scheduler.sequence import SequenceStatus
from flexjax.scheduler.training import TrainingRun, TrainSequence
from flexjax.slo import NO_SLO, SLO, resolve_slo

LAYERS, CONTEXT, PAGE = 4, 128, 8


class HandMade:
    """1 ms, 0.1 ms a decode row, 0.05 ms a chunk row, 0.15 ms a backward row: exact."""

    def predict(self, features):
        b = features.bucket
        return 1 + 0.1 * b.decode + 0.05 * b.chunk + 0.15 * b.window

    predict_high = predict

    def tail_factor(self):
        return 1.0


class Clock:
    """Plays steps on a virtual clock, one ahead, as the engine does."""

    def __init__(self, *, policy=None, pages=200, max_running=8, chunk=(16, 64), window=(16, 64)):
        config = EngineConfig(
            max_running=max_running, decode_buckets=(2, max_running), chunk_buckets=chunk,
            window_buckets=window,
        )  # fmt: skip
        self.ladder = BucketLadder.from_config(config, LAYERS)
        per_seq = CONTEXT // PAGE
        self.latency = HandMade()
        self.scheduler = Scheduler(
            ladder=self.ladder, sizes=StepSizes(per_seq, 4 * per_seq + chunk[-1], 100, 8),
            pages=PageAllocator(pages, PAGE), arena=PageAllocator(100, PAGE),
            policy=policy or CoServe(), latency=self.latency, max_running=max_running,
            max_context_len=CONTEXT, num_layers=LAYERS, tile_order="window_major",
            is_deterministic=False,
        )  # fmt: skip
        self.now_s = 0.0
        self.in_flight = None  # (plan, end_s)
        self.times, self.steps, self.sequences = {}, [], []

    def add(self, prompt_len, max_tokens, slo=NO_SLO, adapter=-1):
        number = len(self.sequences)
        request = GenerationRequest(
            number, tuple(range(1, prompt_len + 1)), SamplingParams(max_tokens=max_tokens),
            adapter, self.now_s, frozenset(), 0, slo,
        )  # fmt: skip
        sequence = self.scheduler.add(request)
        self.sequences.append(sequence)
        self.times[sequence] = []
        return sequence

    def add_run(self, lengths, *, run_id=0, **options):
        rows = [TrainSequence(*(np.arange(n, dtype=np.int32) for _ in range(2))) for n in lengths]
        config = FinetuneConfig(adapter=f"a{run_id}", dataset=[], batch_size=4, **options)
        run = TrainingRun(
            run_id, config, rows, [], slot=0, num_layers=LAYERS, bottom=0,
            group_rows=self.ladder.max_window, arena_tokens=100 * PAGE, page_size=PAGE,
        )  # fmt: skip
        self.scheduler.add_run(run)
        return run

    def step(self):
        previous = self.in_flight
        begin_s = self.now_s if previous is None else max(self.now_s, previous[1])
        plan = self.scheduler.schedule(self.now_s, begin_s)
        self.in_flight = None
        if not plan.is_empty:
            tile = plan.tile
            bucket = self.ladder.bucket(
                len(plan.decode), plan.num_chunk_rows, tile.length if tile else 0,
                tile.num_layers if tile else None,
            )  # fmt: skip
            ms = self.latency.predict(features_of(plan, bucket, ladder=self.ladder))
            self.in_flight = (plan, begin_s + ms / 1e3)
            self.steps.append((begin_s, begin_s + ms / 1e3, plan))
        if previous is not None:
            self.now_s = max(self.now_s, previous[1])
            for sequence in previous[0].samples:
                if sequence.status is SequenceStatus.FINISHED:
                    continue
                self.scheduler.record_token(sequence, 7, self.now_s)
                self.times[sequence].append(self.now_s)
                if len(sequence.tokens) >= sequence.max_tokens:
                    self.scheduler.finish(sequence)
        elif self.in_flight is None:
            self.now_s += 1e-3
        self.scheduler.check_integrity()
        return plan

    def until(self, end_s):
        while self.now_s < end_s:
            self.step()

    def finetune_rows(self, begin_s, end_s):
        return sum(p.num_finetune_rows for b, _, p in self.steps if begin_s <= b < end_s)


def gaps_ms(times):
    return [1e3 * (b - a) for a, b in zip(times, times[1:], strict=False)]


@pytest.mark.parametrize("tpot_ms", [4.0, 6.0, 9.0, 14.0])
def test_every_gap_stays_within_the_target(tpot_ms, rng):
    world = Clock()
    world.add_run([int(n) for n in rng.integers(20, 100, 16)], epochs=1000)
    slo = SLO(ttft_ms=500.0, tpot_ms=tpot_ms)
    for _ in range(60):
        world.add(int(rng.integers(1, 60)), int(rng.integers(2, 50)), slo)
        world.until(world.now_s + float(rng.exponential(0.05)))
    world.until(world.now_s + 1.0)
    finished = [s for s in world.sequences if s.status is SequenceStatus.FINISHED]
    assert len(finished) == 60
    for sequence in finished:
        times = world.times[sequence]
        assert max(gaps_ms(times), default=0.0) <= tpot_ms + 1e-6
        assert 1e3 * (times[0] - sequence.request.arrival_s) <= 500.0
    shared = [p for _, _, p in world.steps if p.decode and p.num_finetune_rows]
    assert shared, "finetuning got nothing beside the requests"


def test_the_room_is_used():
    """With 14 ms a token, a mix that takes more than 9 ms fits beside two decode rows."""
    world = Clock()
    world.add_run([90] * 16, epochs=1000)
    for _ in range(2):
        world.add(4, 100, SLO(tpot_ms=14.0))
    world.until(0.5)
    took = [1e3 * (e - b) for b, e, p in world.steps if len(p.decode) == 2]
    assert max(took) <= 14.0 + 1e-6
    assert np.median(took) > 9.0


class Steep(HandMade):
    """5 ms for any step: the larger it is, the less a row costs."""

    def predict(self, features):
        return 5 + 0.02 * features.bucket.chunk + 0.05 * features.bucket.window

    predict_high = predict


def answer_beside_finetuning(latency, slo):
    """Gaps of a request of 100 tokens, ms, and the finetuning rows a second beside it."""
    world = Clock()
    world.latency = world.scheduler.latency = latency
    world.add_run([90] * 16, epochs=1000)
    sequence = world.add(4, 100, slo)
    world.until(1.0)
    times = world.times[sequence]
    assert sequence.status is SequenceStatus.FINISHED
    rows = world.finetune_rows(times[0], times[-1])
    return gaps_ms(times), rows / (times[-1] - times[0])


def test_a_longer_gap_buys_larger_steps():
    """With the mean kept: 8 ms a token, gaps of up to 10 ms."""
    rows = []
    for itl_ms in (None, 10.0):
        gaps, rows_per_s = answer_beside_finetuning(Steep(), SLO(tpot_ms=8.0, itl_ms=itl_ms))
        assert max(gaps) <= (itl_ms or 8.0) + 1e-6
        assert np.mean(gaps) <= 8.0 + 1e-6
        rows.append(rows_per_s)
    assert rows[1] > 1.05 * rows[0]


class Unsteady(Steep):
    """One mixed step in a hundred takes half as long again."""

    def tail_factor(self):
        return 1.5


@pytest.mark.parametrize("itl_ms, longest_ms", [(None, 12.0), (12.0, 8.0), (18.0, 12.0)])
def test_a_longest_gap_that_was_asked_for_is_kept_in_the_tail_too(itl_ms, longest_ms):
    """Steps leave room for it; where the TPOT alone limits gaps, the budget's quantile does."""
    gaps, _ = answer_beside_finetuning(Unsteady(), SLO(tpot_ms=12.0, itl_ms=itl_ms))
    assert 0.75 * longest_ms < max(gaps) <= longest_ms + 1e-6


def test_finetuning_yields_within_one_iteration_and_comes_back():
    world = Clock()
    world.add_run([90] * 16, epochs=10_000)
    world.until(1.0)
    quiet = world.finetune_rows(0.5, 1.0) / 0.5
    begin_s, begin = world.now_s, len(world.steps)
    slo = SLO(ttft_ms=60.0, tpot_ms=3.0)
    burst = [world.add(40, 30, slo) for _ in range(8)]
    while any(s.status is not SequenceStatus.FINISHED for s in burst):
        world.step()
    end_s = world.now_s
    inside = [p for b, _, p in world.steps[begin + 1 :] if b < end_s]
    assert inside[0].num_finetune_rows < 128, "the first step planned after the burst yields"
    busy = world.finetune_rows(begin_s, end_s) / (end_s - begin_s)
    assert busy < 0.5 * quiet
    world.until(end_s + 0.5)
    assert world.finetune_rows(end_s, end_s + 0.5) / 0.5 > 0.95 * quiet
    late = [g for s in burst for g in gaps_ms(world.times[s]) if g > 3.0 + 1e-6]
    assert not late


class Counting(HandMade):
    """Counts what it is asked."""

    def __init__(self):
        self.asked = 0

    def predict(self, features):
        self.asked += 1
        return super().predict(features)

    predict_high = predict


@pytest.mark.parametrize("tpot_ms", [1.5, 2.5, 4.0])
def test_what_does_not_fit_yet_is_not_weighed_in_each_step(tpot_ms, monkeypatch, rng):
    """Planning asks for less then, and decides the same, under targets that change all the time."""
    arrivals = [(int(rng.integers(1, 40)), int(rng.integers(2, 50))) for _ in range(30)]
    targets = rng.choice([tpot_ms, 20.0, math.inf], len(arrivals), p=[0.8, 0.1, 0.1]).tolist()
    plans, asked = [], []
    for steps in (0, 16):
        monkeypatch.setattr("flexjax.scheduler.mixing._TRUST_STEPS", steps)
        world = Clock()
        world.latency = world.scheduler.latency = latency = Counting()
        world.add_run([90] * 16, epochs=1000)
        for (prompt, output), target_ms in zip(arrivals, targets, strict=True):
            world.add(prompt, output, SLO(tpot_ms=None if target_ms == math.inf else target_ms))
            world.until(world.now_s + 0.04)
        plans.append(
            [(len(p.decode), p.num_chunk_rows, p.num_finetune_rows) for *_, p in world.steps]
        )
        asked.append(latency.asked)
    assert plans[0] == plans[1]
    assert any(decode and finetune for decode, _, finetune in plans[0])
    if tpot_ms < 4.0:
        assert asked[1] < 0.8 * asked[0]


def test_an_impossible_target_starves_nobody():
    """0.5 ms a token cannot be met: what is lost keeps its pace, and finetuning goes on."""
    world = Clock()
    run = world.add_run([60] * 8, epochs=1)
    sequences = [world.add(10, 100, SLO(ttft_ms=1.0, tpot_ms=0.5)) for _ in range(3)]
    other = world.add(10, 20)
    world.until(3.0)
    assert run.is_exhausted
    assert all(s.status is SequenceStatus.FINISHED for s in (*sequences, other))


def test_the_flood_of_one_adapter_does_not_starve_another():
    world = Clock(max_running=4)
    flood = [world.add(20, 20, adapter=1) for _ in range(200)]
    world.until(0.05)
    others = [world.add(20, 20, adapter=2) for _ in range(3)]
    waits = []
    for sequence in others:
        while not world.times[sequence]:
            world.step()
        waits.append(world.now_s)
    ended = sum(s.status is SequenceStatus.FINISHED for s in flood)
    assert ended < 20, "three requests of another adapter wait for a few of the flood at most"


def test_adapters_share_by_tokens():
    world = Clock(max_running=3)
    for _ in range(300):
        world.add(30, 2, adapter=0)
        world.add(10, 2, adapter=1)
    world.until(0.6)
    served = {slot: 0 for slot in (0, 1)}
    for sequence in world.sequences:
        if world.times[sequence]:
            served[sequence.request.adapter_slot] += sequence.prompt_len + 2 * 2
    assert served[0] and served[1]
    assert 0.8 < served[0] / served[1] < 1.25


def test_classes_are_served_by_deadline_and_none_waits_for_ever():
    world = Clock(max_running=3)
    patient = world.add(10, 4)  # no target: due after a minute
    world.now_s = 59.0
    urgent = [world.add(10, 4, SLO(ttft_ms=5_000.0)) for _ in range(40)]
    while not world.times[patient]:
        world.step()
    assert sum(bool(world.times[s]) for s in urgent) < 4
    order = [world.add(10, 4), world.add(10, 4, SLO(ttft_ms=100.0))]
    while not all(world.times[s] for s in order):
        world.step()
    assert world.times[order[1]][0] <= world.times[order[0]][0]


@pytest.mark.parametrize("policy", POLICIES)
def test_long_random_runs_starve_nothing(policy):
    """10,000 steps each; pages, slots and queues are checked after every one."""
    rng = np.random.default_rng([11, len(policy)])
    name = {"temporal": "temporal:8"}.get(policy, policy)
    world = Clock(policy=make_policy(name, full_load=8), pages=60)
    world.add_run([int(n) for n in rng.integers(4, 100, 20)], run_id=0, epochs=10**6)
    world.add_run([int(n) for n in rng.integers(4, 100, 5)], run_id=1, epochs=10**6, weight=2.0)
    slos = [NO_SLO, SLO(ttft_ms=200.0, tpot_ms=8.0), SLO(tpot_ms=20.0), SLO(ttft_ms=50.0)]
    while len(world.steps) < 10_000:
        if rng.random() < 0.05 and len(world.scheduler.waiting) < 30:
            slo = slos[rng.integers(len(slos))]
            length = int(rng.integers(1, 100))
            world.add(length, int(rng.integers(1, 30)), slo, int(rng.integers(-1, 5)))
        world.step()
    rows = sum(p.num_finetune_rows for _, _, p in world.steps)
    waited = [s for s in world.sequences if s.status is not SequenceStatus.FINISHED]
    if policy == "finetune_only":
        assert len(waited) == len(world.sequences) and rows
        return
    assert (rows == 0) == (policy == "inference_only")
    oldest_s = min((s.request.arrival_s for s in waited), default=world.now_s)
    assert world.now_s - oldest_s < 10.0
    assert len(world.sequences) - len(waited) > 50


def test_preempted_requests_go_first_and_newest_first():
    world = Clock(pages=20, max_running=4)
    sequences = [world.add(20, 90) for _ in range(4)]
    order = []
    while any(s.status is not SequenceStatus.FINISHED for s in sequences):
        before = {s: s.num_preemptions for s in sequences}
        running = list(world.scheduler.running)
        world.step()
        for victim in (s for s in sequences if s.num_preemptions > before[s]):
            kept = [s for s in running if s.status is SequenceStatus.RUNNING]
            assert all(running.index(victim) > running.index(s) for s in kept)
            order.append(victim)
    assert order and sequences[0].num_preemptions == 0


def test_temporal_takes_turns():
    policy = Temporal(3)
    busy = StepView(num_running=1, has_finetuning=True)
    turns = [policy.turn(busy) for _ in range(4)]
    assert [t.inference for t in turns] == [True, True, True, False]
    assert not policy.turn(busy).inference  # until a group is done
    assert policy.turn(StepView(num_running=1, has_finetuning=True, finished_groups=1)).inference


def test_bad_input():
    with pytest.raises(ValueError, match="`tpot_ms` must be a number > 0 or None; got -1"):
        SLO(tpot_ms=-1)
    with pytest.raises(ValueError, match="`ttft_ms` must be a number > 0 or None; got nan"):
        SLO(ttft_ms=math.nan)
    with pytest.raises(ValueError, match="`itl_ms` needs `tpot_ms`; got 10.0 without"):
        SLO(itl_ms=10.0)
    with pytest.raises(ValueError, match="`slo` must be an SLO or one of interactive, batch"):
        resolve_slo("urgent", "batch")
    with pytest.raises(ValueError, match="`slo` must be an SLO or one of interactive, batch"):
        EngineConfig(slo_class="gold")
    with pytest.raises(ValueError, match="`policy` must be one of co_serve, temporal.*; got 'x'"):
        make_policy("x")
    with pytest.raises(ValueError, match="`interval` must be an integer >= 1; got 0"):
        make_policy("temporal:0")
    with pytest.raises(ValueError, match=r"`share` must be in \(0, 1\); got 1.0"):
        make_policy("spatial:1")
    with pytest.raises(ValueError, match="`step_time_budget_ms` must be None unless `policy`"):
        EngineConfig(policy="temporal:4", step_time_budget_ms=3.0)
