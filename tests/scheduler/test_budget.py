"""What finetuning gets of a step: waiting for large mixes, reserves, and what attention reads."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest

from flexjax.config import FinetuneConfig, SamplingParams
from flexjax.engine.batch import build_step
from flexjax.layout import Bucket, StepSizes, step_fields, unpack
from flexjax.request import GenerationRequest
from flexjax.scheduler import weighing
from flexjax.scheduler.buckets import BucketLadder
from flexjax.scheduler.budget import FinetuneBudget, Load
from flexjax.scheduler.features import features_of
from flexjax.scheduler.kv_reads import SequenceRows, TiledReads
from flexjax.scheduler.plan import (
    BackwardTile,
    DecodeRow,
    DecodeRows,
    ForwardPiece,
    PrefillChunk,
    StepPlan,
)
from flexjax.scheduler.policy import Turn
from flexjax.scheduler.running import RunningRequests
from flexjax.scheduler.sequence import Sequence
from flexjax.scheduler.survey import (
    RESERVE_SHARE,
    RESERVE_START,
    RESERVE_TOKENS,
    due_and_reach_s,
)
from flexjax.scheduler.training import Group, TrainingRun, TrainSequence
from flexjax.scheduler.weighing import choose_mix, weigh_mixes
from flexjax.slo import SLO
from pallas_kernels import PageList
from pallas_kernels.paged_attention.reference import RowTiles, pages_per_block, tile_shape

PAGE, LAYERS = 4, 3
READS = TiledReads(PAGE)
LADDER = BucketLadder((4,), (8, 32), (8, 32), LAYERS, LAYERS)
TILED = dataclasses.replace(LADDER, reads=READS)


class Device:
    """Each kind of finetuning rows costs `fixed` ms, and 0.1 ms (forward) or 0.2 ms a row."""

    def __init__(self, fixed):
        self.fixed = fixed

    def predict(self, features):
        rows = (features.bucket.chunk, features.bucket.window)
        return 1.0 + sum(self.fixed * (n > 0) for n in rows) + 0.1 * rows[0] + 0.2 * rows[1]

    predict_high = predict

    def tail_factor(self):
        return 1.0


def load(**fields):
    return Load(**{"decode_rows": 2, "forward_rows": 100, "tile_rows": 32, **fields})


LARGEST, SMALL = FinetuneBudget(32, 32), FinetuneBudget(8, 8)


@pytest.mark.parametrize(
    "turn, expected",
    [
        (Turn(max_ms=100.0, reach_ms=100.0), LARGEST),
        (Turn(max_ms=8.0, reach_ms=None), SMALL),  # 1 + 2 * 2 + 0.8 + 1.6 = 7.4 ms
        (Turn(max_ms=8.0, reach_ms=100.0, mean_ms=6.0), FinetuneBudget(0, 0)),
        (Turn(max_ms=8.0, reach_ms=8.0, mean_ms=6.0), SMALL),  # it will not get better
        (Turn(max_ms=8.0, reach_ms=14.0, mean_ms=6.0), FinetuneBudget(0, 0)),
        (Turn(max_ms=8.0, reach_ms=9.0, mean_ms=8.5), SMALL),  # no whole tile will ever fit
        (Turn(max_ms=7.0, reach_ms=100.0, mean_ms=6.0), FinetuneBudget(0, 0)),
    ],
)
def test_finetuning_waits_where_a_larger_mix_gets_more_done(turn, expected):
    """The largest mix takes 14.6 ms: 4.7 rows a millisecond, where the small one has 2.5."""
    assert choose_mix(load(), turn, LADDER, Device(2.0)) == expected


@pytest.mark.parametrize("max_ms, expected", [(5.0, 0), (6.5, 32)])
def test_what_fits_only_later_is_waited_for_though_steps_have_time_for_it(max_ms, expected):
    """8 forward rows take 3.8 ms and 32 of them 6.2 ms, both less than steps may on average."""
    turn = Turn(max_ms=max_ms, reach_ms=100.0, mean_ms=9.0)
    budget = choose_mix(load(tile_rows=0), turn, LADDER, Device(2.0))
    assert budget == FinetuneBudget(expected, 0)


def test_it_does_not_wait_where_small_mixes_are_as_good():
    turn = Turn(max_ms=10.0, reach_ms=100.0, mean_ms=3.0)
    assert choose_mix(load(), turn, LADDER, Device(0.0)).rows > 0


def test_forward_rows_alone_are_taken_only_where_no_tile_could_ever_fit():
    turn = Turn(max_ms=4.5, reach_ms=5.5, mean_ms=3.0)  # a tile of 8 rows takes 4.6 ms
    assert choose_mix(load(), turn, LADDER, Device(2.0)).backward_rows == 0
    assert choose_mix(load(), turn, LADDER, Device(2.0)).forward_rows == 0
    turn = Turn(max_ms=4.5, reach_ms=4.55, mean_ms=3.0)
    assert choose_mix(load(), turn, LADDER, Device(2.0)) == FinetuneBudget(8, 0)


class Quarrel(Device):
    """Decode rows beside finetuning cost `penalty` ms more."""

    def __init__(self, penalty):
        super().__init__(2.0)
        self.penalty = penalty

    def predict(self, features):
        bucket = features.bucket
        is_shared = bucket.decode > 0 and bucket.chunk + bucket.window > 0
        return super().predict(features) + self.penalty * is_shared

    predict_high = predict


@pytest.mark.parametrize("max_ms, expected", [(100.0, True), (8.0, False)])
def test_finetuning_goes_alone_where_sharing_a_step_costs_more(max_ms, expected):
    """Alone and then the decode rows: 14.6 + 1 ms; both together 17.6 ms."""
    turn = Turn(max_ms=max_ms, reach_ms=100.0, mean_ms=3.0)
    options = {"can_be_alone": True}
    choice = weigh_mixes(load(), turn, LADDER, Quarrel(3.0), **options)
    assert choice.is_alone is expected
    if expected:
        assert choice.budget == LARGEST
    assert not weigh_mixes(load(), turn, LADDER, Quarrel(3.0)).is_alone
    # One program in place of two saves a millisecond.
    assert not weigh_mixes(load(), turn, LADDER, Quarrel(0.0), **options).is_alone


class Counting(Quarrel):
    """Notes what it is asked."""

    def __init__(self, penalty):
        super().__init__(penalty)
        self.asked = []

    def predict(self, features):
        self.asked.append(features.bucket)
        return super().predict(features)

    predict_high = predict


def test_it_is_soon_known_that_nothing_fits():
    turn = Turn(max_ms=1.5, reach_ms=1.5, mean_ms=1.2)
    device = Counting(0.0)
    choice = weigh_mixes(load(), turn, LADDER, device, can_be_alone=True)
    asked = device.asked
    assert choice.budget.rows == 0 and not choice.is_alone
    # The step as it is, its median and quantile, the most and the least that could be added.
    tiles = [Bucket(4, 32, 32, LAYERS), Bucket(4, 0, 32, LAYERS), Bucket(4, 0, 8, LAYERS)]
    rows = [Bucket(4, 32, 0, 0), Bucket(4, 8, 0, 0)]
    assert asked == [Bucket(4, 0, 0, 0)] * 2 + tiles + rows


@pytest.mark.parametrize("seed", range(5))
def test_the_most_that_fits_is_found_without_weighing_all(seed, monkeypatch):
    """Where no time is saved up: the same choice, after fewer questions."""
    rng = np.random.default_rng(seed)
    ladder = BucketLadder((4,), (8, 16, 32, 64, 128), (8, 32, 64), LAYERS, LAYERS)
    cases = []
    for _ in range(200):
        max_ms = float(rng.uniform(1.0, 45.0))
        reach_ms = (None, max_ms, 1.005 * max_ms)[int(rng.integers(3))]
        turn = Turn(max_ms=max_ms, reach_ms=reach_ms, mean_ms=float(rng.uniform(0.5, 1.0)) * max_ms)
        fields = {"forward_rows": int(rng.integers(0, 150)), "tile_rows": int(rng.integers(0, 80))}
        cases.append((load(**fields), turn, float(rng.uniform(0.0, 4.0)), bool(rng.random() < 0.5)))
    found, asked = [], []
    for name in ("_largest", "_fitting"):
        monkeypatch.setattr(weighing, "_largest", getattr(weighing, name))
        count, choices = 0, []
        for case, turn, penalty, can_be_alone in cases:
            device = Counting(penalty)
            choice = weigh_mixes(case, turn, ladder, device, can_be_alone=can_be_alone)
            choices.append((choice.budget, choice.is_alone, choice.can_fit))
            count += len(device.asked)
        found.append(choices)
        asked.append(count)
    assert found[0] == found[1]
    assert len({budget for budget, *_ in found[0]}) > 20
    assert any(is_alone for _, is_alone, _ in found[0])
    assert asked[0] < 0.8 * asked[1]


# Deadlines.


def due_and_reach(num_output, *, previous_s, first_s, slo):
    """Of a request with so many output tokens, the last at `previous_s`, in steps of 4 ms."""
    request = GenerationRequest(
        0, (1, 2, 3), SamplingParams(max_tokens=100), -1, 0.0, frozenset(), 0, slo
    )
    sequence = Sequence.from_request(request, 1000)
    sequence.tokens += [7] * num_output
    sequence.num_tokens += num_output
    sequence.first_token_s, sequence.last_token_s = first_s, previous_s
    running = RunningRequests(4, 100, PAGE)
    running.add(sequence, list(range(100)))
    due_s, reach_s = due_and_reach_s(running, np.array([sequence.slot]), math.nan, 0.004)
    return due_s.item(), reach_s.item()


@pytest.mark.parametrize("number", [1, 5, 20, 60])
def test_time_that_was_saved_is_kept_but_for_a_reserve(number):
    slo = SLO(tpot_ms=10.0, itl_ms=10_000.0)
    previous_s = 2.0 + (number - 1) * 0.004
    due_s, reach_s = due_and_reach(number, previous_s=previous_s, first_s=2.0, slo=slo)
    reserve = min(RESERVE_START + RESERVE_SHARE * number, RESERVE_TOKENS)
    assert due_s == pytest.approx(2.0 + 0.01 * (number - reserve))
    left = 100 - number
    assert reach_s == pytest.approx(due_s - previous_s + left * 0.006)


def test_no_gap_is_longer_than_the_longest():
    slo = SLO(tpot_ms=10.0, itl_ms=25.0)
    found = due_and_reach(50, previous_s=0.1, first_s=0.0, slo=slo)
    assert found == pytest.approx((0.125, 0.025))
    capped = due_and_reach(50, previous_s=0.1, first_s=0.0, slo=SLO(tpot_ms=10.0))
    assert capped == pytest.approx((0.11, 0.01))


def test_a_late_request_goes_first_and_a_lost_one_keeps_the_pace():
    slo = SLO(tpot_ms=10.0)
    late = due_and_reach(10, previous_s=0.11, first_s=0.0, slo=slo)
    assert late == pytest.approx((0.11, 0.01))
    lost = due_and_reach(99, previous_s=5.0, first_s=0.0, slo=slo)
    assert lost == pytest.approx((5.01, 0.01))


# What attention reads.


def make_group(lengths):
    rows = [TrainSequence(np.arange(n, dtype=np.int32), np.zeros(n, np.int32)) for n in lengths]
    run = TrainingRun(
        0, FinetuneConfig(adapter="a", dataset=[]), rows, [], slot=0, num_layers=LAYERS, bottom=0,
        group_rows=sum(lengths), arena_tokens=10_000, page_size=PAGE,
    )  # fmt: skip
    group = Group(run, rows, False)
    pages, at = [], 0
    for n in lengths:
        count = -(-n // PAGE)
        pages.append(list(range(at, at + count)))
        at += count
    group.place(pages, pages, PAGE)
    return group


def make_sequence(length):
    request = GenerationRequest(0, (1,) * length, SamplingParams(), -1, 0.0, frozenset(), 0)
    sequence = Sequence.from_request(request, 1000)
    sequence.slot = 0
    sequence.pages = list(range(-(-length // PAGE)))
    return sequence


@pytest.mark.parametrize("page_size", [4, 16, 48, 256])
@pytest.mark.parametrize("rows", [1, 40, 64, 65, 160, 256, 300, 512, 1000])
def test_tiles_are_those_of_the_reference(page_size, rows):
    reads, (size, keys) = TiledReads(page_size), tile_shape(rows)
    assert reads.tile(rows) == (size, pages_per_block(page_size, keys))
    assert reads.decode_keys(1) == pages_per_block(page_size) * page_size


def met_pairs(fields, kind, rows):
    """Rows times keys that the reference implementation goes through for a batch."""
    positions = fields["tile_positions"] if kind == "tile" else fields["positions"][-rows:]
    names = [f"{kind}_pages", f"{kind}_page_segments", f"{kind}_page_starts", f"num_{kind}_pages"]
    pages = PageList(*(jnp.asarray(fields[name]) for name in names))
    rows = jnp.asarray(fields[f"{kind}_segments"]), jnp.asarray(positions)
    tiles = RowTiles(*rows, pages, PAGE, None)
    met = 0
    for block in range(int(tiles.num_blocks)):
        first, behind = tiles.meeting(jnp.int32(block))
        met += max(0, int(behind) - int(first))
    return met * tiles.size * tiles.block_pages * PAGE


@pytest.mark.parametrize("repeat", range(16))
def test_pairs_are_those_that_a_step_goes_through(rng, repeat):
    longest = 13 if repeat % 2 else 200
    group = make_group([int(n) for n in rng.integers(1, longest, 900 // longest)])
    start = int(rng.integers(0, group.num_rows))
    piece = ForwardPiece(group, start, int(rng.integers(1, min(400, group.num_rows - start) + 1)))
    end = int(rng.integers(1, group.num_rows + 1))
    length = int(rng.integers(1, min(end, 512) + 1))
    tile = BackwardTile(group, end - length, length, LAYERS, LAYERS)
    prompt = make_sequence(int(rng.integers(8, 60)))
    chunk = PrefillChunk(prompt, int(rng.integers(0, 4)), 4, False)
    asked = make_sequence(int(rng.integers(1, 60)))
    decode = DecodeRows.of([DecodeRow(asked, asked.num_tokens - 1, False)])
    plan = StepPlan(decode=decode, prefill=[chunk], forward=[piece], tile=tile)
    plan.slot_pages = np.zeros((4, 20), np.int32)
    ladder = BucketLadder((4,), (8, 32, 512), (8, 32, 512), LAYERS, LAYERS, READS)
    bucket = ladder.bucket(1, plan.num_chunk_rows, length)
    sizes = StepSizes(20, 1000, 1000, 4)
    fields = unpack(build_step(plan, bucket, sizes, PAGE), step_fields(bucket, sizes))
    found = features_of(plan, bucket, ladder=ladder)
    assert found.chunk_kv_pairs == met_pairs(fields, "chunk", bucket.chunk)
    assert found.tile_kv_pairs == LAYERS * met_pairs(fields, "tile", bucket.window)
    assert found.decode_kv_tokens == 4 * READS.decode_keys(asked.num_tokens)


def test_short_sequences_in_a_window_meet_few_keys():
    packed = READS.pairs(256, [SequenceRows(0, 16)] * 16)
    assert READS.pairs(256, [SequenceRows(0, 256)]) == 10 * 64 * 64
    assert packed == 4 * 64 * 64
    assert READS.pairs(0, []) == 0
    assert READS.pairs(32, []) == 0


@pytest.mark.parametrize("repeat", range(8))
def test_a_mix_is_weighed_by_what_its_step_will_read(rng, repeat):
    groups = [make_group([int(n) for n in rng.integers(1, 13, 4)]) for _ in range(2)]
    groups[0].forward_end = int(rng.integers(0, groups[0].num_rows + 1))
    rows = sum(g.num_rows - g.forward_end for g in groups)
    forward_rows = int(rng.integers(1, min(rows, 32) + 1))
    end = int(rng.integers(1, groups[1].num_rows + 1))
    tile_rows = int(rng.integers(1, min(end, 32) + 1))
    weighed = Load(
        forward_rows=rows, forward_groups=tuple(groups), tile_rows=tile_rows,
        tile_group=groups[1], tile_end=end, tile_layers=LAYERS,
    ).features(TILED, forward_rows, tile_rows)  # fmt: skip
    pieces, left = [], forward_rows
    for group in groups:
        length = min(left, group.num_rows - group.forward_end)
        if length:
            pieces.append(ForwardPiece(group, group.forward_end, length))
        left -= length
    tile = BackwardTile(groups[1], end - tile_rows, tile_rows, LAYERS, LAYERS)
    plan = StepPlan(forward=pieces, tile=tile)
    bucket = TILED.bucket(0, forward_rows, tile_rows)
    assert weighed.bucket == bucket != Bucket(0, 0, 0, 0)
    done = features_of(plan, bucket, ladder=TILED)
    assert weighed.chunk_kv_pairs == done.chunk_kv_pairs
    assert weighed.tile_kv_pairs == done.tile_kv_pairs
