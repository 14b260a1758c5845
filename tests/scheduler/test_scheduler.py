"""The scheduler without a device: order, budgets, memory, and that nothing starves."""

import dataclasses
from collections import defaultdict

import numpy as np
import pytest

from flexjax.builtin_models import builtin_model_config
from flexjax.config import EngineConfig, FinetuneConfig, SamplingParams
from flexjax.engine.sizing import Sizing
from flexjax.layout import StepSizes
from flexjax.request import GenerationRequest
from flexjax.scheduler.buckets import BucketLadder
from flexjax.scheduler.budget import FinetuneBudget, Load
from flexjax.scheduler.features import features_of
from flexjax.scheduler.page_allocator import PageAllocator
from flexjax.scheduler.policy import CoServe, Turn
from flexjax.scheduler.scheduler import Scheduler
from flexjax.scheduler.sequence import SequenceStatus
from flexjax.scheduler.training import TrainingRun, TrainSequence
from flexjax.scheduler.weighing import choose_mix

LAYERS = 5
CONTEXT = 64


class HandMade:
    """Forward rows cost 0.1 ms, backward rows 0.06 ms per layer of the tile; exact."""

    def predict(self, features):
        b = features.bucket
        return 1 + 0.1 * b.forward + 0.06 * b.window * b.tile_layers

    predict_high = predict

    def tail_factor(self):
        return 1.0


class World:
    """A scheduler whose steps are played by hand, one step behind, as the engine does."""

    def __init__(
        self,
        *,
        pages=40,
        arena=40,
        policy=None,
        order="window_major",
        tile_layers=2,
        deterministic=False,
        chunk=(8, 24),
        window=(8, 16),
    ):
        page_size, max_running = 4, 4
        config = EngineConfig(
            max_running=max_running, decode_buckets=(max_running,), chunk_buckets=chunk,
            window_buckets=window, tile_layers=tile_layers,
        )  # fmt: skip
        self.ladder = BucketLadder.from_config(config, LAYERS)
        per_seq = -(-CONTEXT // page_size)
        sizes = StepSizes(per_seq, 4 * per_seq + chunk[-1], arena, 4)
        self.page_size, self.order, self.group_pages = page_size, order, min(arena, pages)
        self.scheduler = Scheduler(
            ladder=self.ladder, sizes=sizes, pages=PageAllocator(pages, page_size),
            arena=PageAllocator(arena, page_size), policy=policy or CoServe(),
            latency=HandMade(), max_running=max_running, max_context_len=CONTEXT,
            num_layers=LAYERS, tile_order=order, is_deterministic=deterministic,
        )  # fmt: skip
        self.in_flight, self.next_id = None, 0
        self.sequences, self.admitted, self.optimizer_steps = [], [], []
        self.stop_at = {}

    def add(self, prompt_len, max_tokens, stop_at=None):
        request = GenerationRequest(
            self.next_id, tuple(range(1, prompt_len + 1)), SamplingParams(max_tokens=max_tokens),
            -1, 0.0, frozenset(), 0,
        )  # fmt: skip
        self.next_id += 1
        sequence = self.scheduler.add(request)
        self.sequences.append(sequence)
        self.stop_at[request.request_id] = min(stop_at or max_tokens, max_tokens)
        return sequence

    def add_run(self, lengths, batch_size, *, bottom=0, run_id=0, evals=(), **options):
        def sequence(n):
            return TrainSequence(np.arange(n, dtype=np.int32), np.arange(n, dtype=np.int32))

        config = FinetuneConfig(adapter=f"a{run_id}", dataset=[], batch_size=batch_size, **options)
        run = TrainingRun(
            run_id, config, [sequence(n) for n in lengths], [sequence(n) for n in evals], slot=0,
            num_layers=LAYERS, bottom=bottom, group_rows=self.ladder.max_window,
            arena_tokens=self.group_pages * self.page_size, page_size=self.page_size,
        )  # fmt: skip
        self.scheduler.add_run(run)
        return run

    def step(self):
        running = list(self.scheduler.running)
        plan = self.scheduler.schedule()
        self.check_plan(plan)
        self.admitted += [s for s in self.scheduler.running if s not in running]
        self.optimizer_steps += plan.optimizer_steps
        for sequence in self.in_flight or ():
            if sequence.status is SequenceStatus.FINISHED:
                continue
            self.scheduler.record_token(sequence, 7)
            done = len(sequence.output)
            if done >= self.stop_at[sequence.request.request_id] or len(sequence.tokens) >= CONTEXT:
                self.scheduler.finish(sequence)
        self.in_flight = list(plan.samples)
        self.scheduler.check_integrity()
        return plan

    def check_plan(self, plan):
        assert len(plan.decode) <= self.ladder.max_decode
        assert plan.num_chunk_rows <= self.ladder.max_chunk
        for row in plan.decode:
            assert row.position // self.page_size < len(row.sequence.pages)
        for chunk in plan.prefill:
            end = chunk.start + chunk.length
            assert chunk.length > 0 and end <= len(chunk.sequence.pages) * self.page_size
        assert len({id(s) for s in plan.samples}) == len(plan.samples)
        if plan.tile is not None:
            assert 0 < plan.tile.length <= self.ladder.max_window
            assert plan.tile.num_layers in (self.ladder.tile_layers, self.ladder.last_tile_layers)

    @property
    def is_idle(self):
        return not self.scheduler.has_requests and not self.scheduler.finetuning.has_work


class Watcher:
    """Replays plans and asserts that every row goes through every layer once, in a valid order."""

    def __init__(self, bottom=0):
        self.bottom = bottom
        self.forward = defaultdict(int)
        self.backward = {}
        self.losses = defaultdict(set)
        self.finished = []
        self.begun = []

    def see(self, plan):
        for group in (discard.group for discard in plan.discarded):
            for book in (self.forward, self.backward, self.losses):
                book.pop(group, None)
        for window in plan.losses:
            rows = set(range(window.start, window.start + window.length))
            assert not rows & self.losses[window.group], "a row's loss is taken twice"
            assert self.forward[window.group] == window.group.num_rows
            self.losses[window.group] |= rows
        if plan.tile is not None:
            self.see_tile(plan.tile)
        for piece in plan.forward:
            assert piece.start == self.forward[piece.group] and piece.length > 0
            self.forward[piece.group] += piece.length
            if piece.group not in self.begun and not piece.group.is_eval:
                self.begun.append(piece.group)
        for group in plan.finished_groups:
            done = self.backward[group]
            assert (done[:, self.bottom :] == 1).all() and (done <= 1).all()
            assert self.losses[group] == set(range(group.num_rows))
            others = [g for g in self.backward if g.run is group.run and g is not group]
            half = [g for g in others if self.backward[g].any() and g not in self.finished]
            assert not half, "sums of a half finished group would be added to the batch"
            assert self.begun[len(self.finished)] is group, "groups are added up in order"
            self.finished.append(group)

    def see_tile(self, tile):
        group = tile.group
        assert self.forward[group] == group.num_rows, "backward before the forward pass has ended"
        done = self.backward.setdefault(group, np.zeros((group.num_rows, LAYERS), int))
        rows = slice(tile.start, tile.start + tile.length)
        layers = slice(tile.top - tile.num_layers, tile.top)
        assert layers.start >= 0
        assert set(range(rows.start, rows.stop)) <= self.losses[group], "no gradient at the top"
        assert (done[rows, layers] == 0).all(), "a row goes backward twice"
        assert (done[rows, tile.top :] == 1).all(), "higher layers come first"
        # Keys and values: all later rows of the same sequences are done in these layers.
        last = group.segment_of_row[rows.stop - 1]
        later = slice(rows.stop, int(group.offsets[last + 1]))
        assert (done[later, layers] == 1).all(), "later windows come first"
        done[rows, layers] += 1


POLICIES = {
    "none": lambda rng: CoServe(),
    "rows": lambda rng: CoServe(max_rows=int(rng.integers(1, 30))),
    "time": lambda rng: CoServe(max_ms=float(rng.uniform(6.0, 9.0))),
    "both": lambda rng: CoServe(max_rows=int(rng.integers(2, 30)), max_ms=8.0),
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("order", ["window_major", "layer_major"])
@pytest.mark.parametrize("deterministic", [False, True])
def test_random_runs(rng, order, policy, deterministic):
    """2,000 steps of random arrivals and jobs: books, order, and everything ends."""
    world = World(
        order=order,
        policy=POLICIES[policy](rng),
        deterministic=deterministic,
        tile_layers=int(rng.integers(1, LAYERS + 1)),
        pages=int(rng.integers(24, 60)),
    )
    watchers, runs = {}, []
    for index in range(2_000):
        if index < 1_500 and rng.random() < 0.06:
            max_tokens = int(rng.integers(1, 30))
            world.add(int(rng.integers(1, CONTEXT)), max_tokens, int(rng.integers(1, 30)))
        if index < 1_000 and rng.random() < 0.01 and len(world.scheduler.finetuning.runs) < 3:
            lengths = rng.integers(2, CONTEXT + 1, int(rng.integers(1, 12))).tolist()
            bottom = int(rng.integers(0, LAYERS))
            evals = rng.integers(2, CONTEXT, int(rng.integers(0, 4))).tolist()
            options = {"bottom": bottom, "evals": evals, "run_id": len(runs)}
            weight = float(rng.uniform(0.5, 2))
            size = int(rng.integers(1, 6))
            runs.append(world.add_run(lengths, size, epochs=2, weight=weight, **options))
        plan = world.step()
        for run in runs:
            watcher = watchers.setdefault(run, Watcher(run.bottom))
            watcher.see(only(plan, run))
        for run in list(world.scheduler.finetuning.runs):
            if run.is_exhausted:
                world.scheduler.remove_run(run)
    for _ in range(3_000):
        if world.is_idle:
            break
        plan = world.step()
        for run in runs:
            watchers[run].see(only(plan, run))
    assert world.is_idle
    assert all(s.status is SequenceStatus.FINISHED for s in world.sequences)
    for run in runs:
        steps = [s.step for s in world.optimizer_steps if s.run is run]
        assert steps == list(range(run.total_steps))
    assert runs and any(w.finished for w in watchers.values())


def only(plan, run):
    """The part of a plan that belongs to one job."""
    mine = dataclasses.replace(plan)
    mine.forward = [p for p in plan.forward if p.group.run is run]
    mine.losses = [w for w in plan.losses if w.group.run is run]
    mine.tile = plan.tile if plan.tile and plan.tile.group.run is run else None
    mine.finished_groups = [g for g in plan.finished_groups if g.run is run]
    mine.discarded = [d for d in plan.discarded if d.group.run is run]
    return mine


def test_admission_is_first_come_first_served():
    world = World(pages=30)
    sequences = [world.add(n, 5) for n in (60, 3, 50, 2, 33, 7, 1)]
    for _ in range(300):
        world.step()
    first = list(dict.fromkeys(world.admitted))
    assert first == sequences
    assert all(s.status is SequenceStatus.FINISHED for s in sequences)


def test_the_newest_is_preempted_and_everyone_ends():
    world = World(pages=17)
    sequences = [world.add(10, 40) for _ in range(4)]
    order = []
    for _ in range(600):
        before = {s: s.num_preemptions for s in sequences}
        running = list(world.scheduler.running)
        world.step()
        victims = [s for s in sequences if s.num_preemptions > before[s]]
        kept = [s for s in running if s in world.scheduler.running]
        for victim in victims:
            assert all(running.index(victim) > running.index(s) for s in kept if s in running)
        order += victims
    assert order and sequences[0].num_preemptions == 0
    assert all(s.status is SequenceStatus.FINISHED for s in sequences)
    assert all(len(s.output) == 40 for s in sequences)


def test_finetuning_gives_pages_back_before_any_request_does():
    world = World(pages=30)
    run = world.add_run([60, 60, 20], 3)
    for _ in range(4):
        world.step()
    assert world.scheduler.finetuning.num_kv_pages >= 15
    sequences = [world.add(40, 10), world.add(20, 10)]
    num_discarded = 0
    for _ in range(100):
        num_discarded += len(world.step().discarded)
        assert not any(s.num_preemptions for s in sequences)
    assert num_discarded and all(s.status is SequenceStatus.FINISHED for s in sequences)
    assert run.step == 1


@pytest.mark.parametrize("max_ms", [5.0, 7.0, 9.0])
def test_the_time_budget_is_kept(rng, max_ms):
    world = World(policy=CoServe(max_ms=max_ms), pages=200)
    world.add_run([int(n) for n in rng.integers(2, 60, 12)], 3, epochs=20)
    num_shared = 0
    for index in range(400):
        if index % 20 == 0:
            world.add(int(rng.integers(1, 30)), 25)
        plan = world.step()
        if plan.num_finetune_rows and (plan.decode or plan.prefill):
            num_shared += 1
            bucket = world.ladder.bucket(
                len(plan.decode), plan.num_chunk_rows, plan.tile.length if plan.tile else 0,
                plan.tile.num_layers if plan.tile else None,
            )  # fmt: skip
            assert world.scheduler.latency.predict(features_of(plan, bucket)) <= max_ms
    assert num_shared > 0


@pytest.mark.parametrize("max_rows", [1, 2, 7, 16, 24])
def test_a_row_budget_does_not_starve_the_backward_pass(max_rows):
    """Requests are alive all the time; both passes must go on."""
    world = World(policy=CoServe(max_rows=max_rows), pages=100, window=(8, 16))
    run = world.add_run([20, 9, 3, 14], 2, epochs=2)
    for index in range(1_500):
        if index % 10 == 0:
            world.add(5, 12)
        plan = world.step()
        if world.scheduler.has_requests:
            assert plan.num_finetune_rows <= max_rows
    assert run.is_exhausted


def test_a_time_budget_that_fits_a_window_trains():
    """A backward bucket fits beside the requests: training may not wait for their end."""
    world = World(policy=CoServe(max_ms=5.1), pages=100)
    load = Load(decode_rows=4, prefill_rows=8, tile_rows=8)
    assert HandMade().predict(load.features(world.ladder, 0, 8)) <= 5.1
    run = world.add_run([20, 9, 3, 14], 2)
    for index in range(1_500):
        if index % 10 == 0:
            world.add(5, 12)
        world.step()
    assert run.is_exhausted


def test_jobs_share_by_weight():
    world = World(pages=200, arena=100)
    heavy = world.add_run([30] * 8, 2, run_id=0, weight=3.0, epochs=50)
    light = world.add_run([30] * 8, 2, run_id=1, weight=1.0, epochs=50)
    for _ in range(400):
        world.step()
    rows = [run.service_rows * run.config.weight for run in (heavy, light)]
    assert 2.0 <= rows[0] / rows[1] <= 4.0


def test_no_limit_gives_everything_to_finetuning():
    world = World()
    load = Load(decode_rows=2, prefill_rows=5, forward_rows=100, tile_rows=30)
    mix = choose_mix(load, Turn(), world.ladder, HandMade())
    assert mix == FinetuneBudget(24 - 5, 16)
    assert choose_mix(load, Turn(max_ms=0.0), world.ladder, HandMade()) == FinetuneBudget(0, 0)
    assert choose_mix(load, Turn(max_rows=1), world.ladder, HandMade()).rows == 1


def test_a_group_of_short_rows_fits_few_pages():
    """Each row needs a page of its own: a group may not need more pages than there are."""
    model = builtin_model_config("tiny")
    config = EngineConfig(
        max_context_len=24, page_size=4, num_pages=8, window_buckets=(48,), chunk_buckets=(16,)
    )
    sizing = Sizing.derive(model, config, "cpu")
    assert sizing.arena_pages > sizing.num_pages
    row = TrainSequence(np.arange(2, dtype=np.int32), np.arange(2, dtype=np.int32))
    run = TrainingRun(
        0, FinetuneConfig(adapter="a", dataset=[], batch_size=40), [row] * 40, [], slot=0,
        num_layers=2, bottom=0, group_rows=sizing.group_rows, arena_tokens=sizing.arena_tokens,
        page_size=4,
    )  # fmt: skip
    run.refill()
    assert len(run.groups) == 5
    assert all(len(group.sequences) <= sizing.num_pages for group in run.groups)
