"""The latency model from made-up devices: what it recovers, what it withstands, what it refuses."""

import dataclasses
import itertools
import statistics

import numpy as np
import pytest
from latency_cases import BUCKETS, CONTEXT, DECODE, LADDER, LAYERS, MIXED, PREFILL, with_noise

from flexjax.config import FinetuneConfig, SamplingParams
from flexjax.layout import Bucket
from flexjax.request import GenerationRequest
from flexjax.scheduler.features import (
    EMPTY_BUCKET,
    LatencySample,
    RooflineCosts,
    StepFeatures,
    features_of,
)
from flexjax.scheduler.kv_reads import causal_pairs
from flexjax.scheduler.latency_model import LatencyModel
from flexjax.scheduler.latency_profile import (
    fit_coefficients,
    synthetic_profile,
    synthetic_samples,
)
from flexjax.scheduler.plan import (
    BackwardTile,
    DecodeRow,
    DecodeRows,
    ForwardPiece,
    LossWindow,
    OptimizerStep,
    PrefillChunk,
    StepPlan,
)
from flexjax.scheduler.sequence import Sequence
from flexjax.scheduler.training import Group, TrainingRun, TrainSequence


def random_features(rng, buckets=BUCKETS):
    """A mix as a scheduler would make it, with contexts that no sample has."""
    bucket = buckets[rng.integers(len(buckets))]
    context = rng.integers(1, CONTEXT, 3).tolist()
    return StepFeatures(
        bucket,
        decode_rows=bucket.decode,
        forward_rows=bucket.chunk,
        backward_rows=bucket.window,
        decode_kv_tokens=context[0] * bucket.decode,
        chunk_kv_pairs=causal_pairs(context[1], bucket.chunk),
        tile_kv_pairs=bucket.tile_layers * causal_pairs(context[2], bucket.window),
        sample_rows=bucket.decode,
        num_losses=int(bucket.window > 0),
        loss_rows=bucket.window,
    )


def model_of(samples, **options):
    model = LatencyModel(**options)
    model.fit(samples)
    return model


def errors_of(model, costs, rng, buckets=BUCKETS, count=400):
    """Absolute relative errors of predictions against the device without noise."""
    mixes = [random_features(rng, buckets) for _ in range(count)]
    return [abs(model.predict(mix) / costs.ms(mix) - 1) for mix in mixes]


@pytest.fixture(scope="module")
def profile():
    return synthetic_profile(LADDER, context_len=CONTEXT)


@pytest.fixture
def model(profile):
    return LatencyModel.from_profile(profile)


# Features.


def make_group(lengths):
    sequences = [TrainSequence(np.arange(n, dtype=np.int32), np.full(n, 1)) for n in lengths]
    config = FinetuneConfig(adapter="a", dataset=[])
    run = TrainingRun(
        0, config, sequences, [], slot=0, num_layers=LAYERS, bottom=0, group_rows=64,
        arena_tokens=256, page_size=4,
    )  # fmt: skip
    return Group(run, sequences, False)


def make_sequence(prompt_len):
    params = SamplingParams(max_tokens=8)
    request = GenerationRequest(0, tuple(range(prompt_len)), params, -1, 0.0, frozenset(), 0)
    return Sequence.from_request(request, prompt_len + 8)


def test_features_count_what_a_plan_holds():
    group, sequence = make_group([5, 9, 4]), make_sequence(40)
    tile = BackwardTile(group, 3, 10, 24, 12)
    optimizer = OptimizerStep(group.run, 0, 1, 1, 1e-4)
    plan = StepPlan(
        decode=DecodeRows.of(DecodeRow(sequence, position, False) for position in (7, 0, 31)),
        prefill=[PrefillChunk(sequence, 6, 5, False), PrefillChunk(sequence, 0, 3, True)],
        forward=[ForwardPiece(group, 2, 7)],
        losses=[LossWindow(group, 3, 10), LossWindow(group, 0, 3)],
        tile=tile,
        samples=[sequence] * 5,
        optimizer_steps=[optimizer],
    )
    bucket = Bucket(4, 32, 128, 12)
    positions = [i for n in (5, 9, 4) for i in range(n)]
    chunk = [p + 1 for p in [*range(6, 11), *range(3), *positions[2:9]]]
    expected = StepFeatures(
        bucket, decode_rows=3, prefill_rows=8, forward_rows=7, backward_rows=10,
        decode_kv_tokens=8 + 1 + 32, chunk_kv_pairs=sum(chunk),
        tile_kv_pairs=12 * sum(p + 1 for p in positions[3:13]),
        sample_rows=5, num_losses=2, loss_rows=13, num_optimizer_steps=1,
    )  # fmt: skip
    assert features_of(plan, bucket) == expected
    padded = dataclasses.replace(expected, sample_rows=16, loss_rows=256, decode_kv_tokens=99)
    assert features_of(plan, bucket, decode_kv_tokens=99, ladder=LADDER) == padded
    LatencySample(expected, 1.0)  # plain integers that fit the bucket
    with pytest.raises(ValueError, match=r"`bucket` must hold the plan's \(3, 15, 10\) rows; got"):
        features_of(plan, Bucket(4, 8, 128, 12))


def test_features_of_a_step_without_rows():
    group = make_group([5])
    features = features_of(StepPlan(losses=[LossWindow(group, 0, 5)]), None)
    assert features == StepFeatures(EMPTY_BUCKET, num_losses=1, loss_rows=5)
    assert features.has_finetuning and not StepFeatures(EMPTY_BUCKET).has_finetuning


@pytest.mark.parametrize(
    ("features", "ms", "repeats", "message"),
    [
        (DECODE, 0.0, 1, "`ms` must be a finite number above 0; got 0.0"),
        (DECODE, float("nan"), 1, "`ms` must be a finite number above 0; got nan"),
        (DECODE, 1.0, 0, "`repeats` must be at least 1; got 0"),
        (StepFeatures(DECODE.bucket, sample_rows=-1), 1.0, 1, "`sample_rows` must be an integer"),
        (StepFeatures(Bucket(-4, 0, 0, 0)), 1.0, 1, "`bucket.decode` must be an integer of at"),
        (StepFeatures(DECODE.bucket, decode_rows=65), 1.0, 1, "`bucket` must hold the step's"),
    ],
)
def test_samples_are_checked(features, ms, repeats, message):
    with pytest.raises(ValueError, match=message):
        LatencySample(features, ms, repeats)


# The fit.


@pytest.mark.parametrize("overlap", [0.0, 0.5, 1.0])
def test_exact_samples_give_the_device_back(overlap):
    costs = RooflineCosts(overlap=overlap)
    coefficients = fit_coefficients(synthetic_samples(BUCKETS, costs, context_len=CONTEXT))
    assert coefficients.overlap == overlap
    found = dict(zip(("decode", "chunk", "tile"), coefficients.extra_ms, strict=False))
    expected = {"decode": costs.decode_kv, "chunk": costs.chunk_kv, "tile": costs.tile_kv}
    assert found == pytest.approx(expected, rel=1e-3)
    for bucket in BUCKETS:
        assert coefficients.base_ms(bucket) == pytest.approx(
            costs.ms(StepFeatures(bucket)), rel=0.001
        )


@pytest.mark.parametrize("overlap", [0.0, 0.6, 1.0])
def test_noisy_samples_predict_other_mixes(overlap, rng):
    costs = RooflineCosts(overlap=overlap)
    samples = synthetic_samples(BUCKETS, costs, context_len=CONTEXT)
    model = model_of(with_noise(samples, rng))
    assert statistics.median(errors_of(model, costs, rng)) <= 0.03
    assert model.coefficients.noise == pytest.approx(0.05, rel=0.4)


def test_buckets_that_were_never_measured_are_interpolated(rng):
    costs = RooflineCosts(overlap=0.6)
    order = rng.permutation(len(BUCKETS)).tolist()
    measured = [BUCKETS[i] for i in order[: len(BUCKETS) // 2]]
    rest = [b for b in BUCKETS if b not in measured]
    samples = synthetic_samples(measured, costs, context_len=CONTEXT)
    model = model_of(with_noise(samples, rng, 0.03))
    assert model.missing(BUCKETS) == []
    errors = errors_of(model, costs, rng, rest)
    assert statistics.median(errors) <= 0.05 and max(errors) <= 0.35


def test_outliers_among_the_samples_are_outvoted(rng):
    """A busy neighbour: one sample in twelve takes 2 to 20 times as long."""
    costs = RooflineCosts()
    samples = with_noise(synthetic_samples(BUCKETS, costs, context_len=CONTEXT), rng, 0.02)
    samples += with_noise(synthetic_samples(BUCKETS, costs, context_len=CONTEXT // 2), rng, 0.02)
    slow = rng.choice(len(samples), len(samples) // 12, replace=False)
    for index in slow.tolist():
        factor = float(rng.uniform(2, 20))
        samples[index] = dataclasses.replace(samples[index], ms=samples[index].ms * factor)
    errors = errors_of(model_of(samples), costs, rng)
    assert statistics.median(errors) <= 0.03
    assert float(np.quantile(errors, 0.95)) <= 0.15


def test_a_bucket_that_contradicts_its_neighbours_is_left_to_the_regression():
    costs = RooflineCosts()
    samples = [LatencySample(StepFeatures(b), costs.ms(StepFeatures(b))) for b in BUCKETS]
    wrong = Bucket(16, 32, 128, 8)
    index = [s.features.bucket for s in samples].index(wrong)
    samples[index] = dataclasses.replace(samples[index], ms=10 * samples[index].ms)
    coefficients = fit_coefficients(samples)
    assert wrong not in dict(coefficients.measured_ms)
    for sample in (*samples[:index], *samples[index + 1 :]):
        assert coefficients.base_ms(sample.features.bucket) == pytest.approx(sample.ms, rel=0.01)
    expected = costs.ms(StepFeatures(wrong))
    assert coefficients.base_ms(wrong) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("sigma", [0.05, 0.4])
def test_the_base_rises_with_the_bucket(sigma, rng):
    """Measured and interpolated buckets alike, however noisy the samples."""
    samples = with_noise(synthetic_samples(BUCKETS, RooflineCosts(), context_len=64), rng, sigma)
    kept = rng.choice(len(samples), len(samples) // 3, replace=False).tolist()
    model = model_of([samples[i] for i in kept])
    sizes = itertools.product((0, 1, 4, 64, 300), (0, 20, 32, 400), (0, 100, 128, 600), (8, 12))
    buckets = {Bucket(d, c, w, layers if w else 0) for d, c, w, layers in sizes} | set(BUCKETS)
    bases = {bucket: model.base_ms(bucket) for bucket in buckets}
    checked = 0
    for small, large in itertools.permutations(buckets, 2):
        pairs = list(zip(dataclasses.astuple(small), dataclasses.astuple(large), strict=True))
        if all((a > 0) == (b > 0) and a <= b for a, b in pairs):
            checked += 1
            assert bases[small] <= bases[large], (small, large)
    assert checked > 1000


def test_one_sample_is_enough_for_its_own_bucket():
    model = model_of([LatencySample(StepFeatures(Bucket(4, 0, 0, 0)), 3.0)])
    assert model.base_ms(Bucket(4, 0, 0, 0)) == pytest.approx(3.0)
    assert model.base_ms(Bucket(64, 0, 0, 0)) >= 3.0


def test_steps_that_only_extra_terms_explain_can_be_fitted():
    bucket = Bucket(4, 0, 0, 0)
    steps = [StepFeatures(bucket, decode_kv_tokens=n * 1000) for n in (1, 2, 3)]
    model = model_of([LatencySample(step, step.decode_kv_tokens / 1000) for step in steps])
    for step in steps:
        assert model.predict(step) == pytest.approx(step.decode_kv_tokens / 1000, rel=0.01)


def test_what_was_not_measured_is_named():
    costs = RooflineCosts()
    serving = LADDER.all_buckets(finetuning=False)
    model = model_of(synthetic_samples(serving, costs, context_len=CONTEXT))
    window = Bucket(4, 0, 128, 12)
    assert model.missing([*serving, window, EMPTY_BUCKET]) == [window]
    for ask in (model.predict, model.predict_high, lambda f: model.observe(f, 1.0)):
        with pytest.raises(RuntimeError, match="no measured step like Bucket.*window=128"):
            ask(StepFeatures(window))
    assert model.errors() is None


def test_a_model_without_a_fit_refuses():
    model = LatencyModel()
    assert not model.is_ready
    for ask in (model.predict, model.predict_high, lambda f: model.observe(f, 1.0)):
        with pytest.raises(RuntimeError, match="The latency model has no fit yet"):
            ask(DECODE)
    with pytest.raises(ValueError, match="`samples` must hold at least one measured step"):
        model.fit([])
    assert not model.is_ready
    with pytest.raises(ValueError, match="`quantile` must be above 0 and below 1; got 1"):
        LatencyModel(quantile=1.0)


# Correction while steps run.


def play(model, mixes, costs, rng, steps, *, factor=1.0, sigma=0.0):
    """Observes steps of the mixes in turn on a device that is slower by `factor`."""
    for index in range(steps):
        mix = mixes[index % len(mixes)]
        noise = float(np.exp(sigma * rng.standard_normal()))
        model.observe(mix, factor * costs.ms(mix) * noise)


def ratio(model, mix, ms):
    return model.predict(mix) / ms


@pytest.mark.parametrize("outliers", [1, 2])
@pytest.mark.parametrize("factor", [0.1, 2.0, 50.0])
def test_outliers_move_nothing(outliers, factor, model, rng):
    costs = RooflineCosts()
    for warm_up in (0, 50):
        play(model, [DECODE, MIXED], costs, rng, warm_up, sigma=0.03)
        before = [(model.predict(m), model.predict_high(m)) for m in (DECODE, MIXED)]
        play(model, [DECODE], costs, rng, outliers, factor=factor)
        for mix, (middle, high) in zip((DECODE, MIXED), before, strict=True):
            assert model.predict(mix) == pytest.approx(middle, rel=0.03)
            assert model.predict_high(mix) == pytest.approx(high, rel=0.06)


def test_a_lasting_slow_down_is_learnt_and_forgotten(model, rng):
    costs = RooflineCosts()
    mixes = [DECODE, MIXED, PREFILL]
    for factor in (1.0, 2.0, 1.0, 0.5):
        play(model, [DECODE], costs, rng, 20, factor=factor, sigma=0.02)
        assert ratio(model, DECODE, factor * costs.ms(DECODE)) == pytest.approx(1, rel=0.1)
        play(model, mixes, costs, rng, 30, factor=factor, sigma=0.02)
        for mix in mixes:
            assert ratio(model, mix, factor * costs.ms(mix)) == pytest.approx(1, rel=0.1)


def test_a_slow_machine_is_slow_for_kinds_that_did_not_run(model, rng):
    costs = RooflineCosts()
    play(model, [DECODE], costs, rng, 20, factor=2.0)
    assert ratio(model, MIXED, costs.ms(MIXED)) > 1.4
    play(model, [DECODE], costs, rng, 300, factor=2.0)
    assert ratio(model, MIXED, 2 * costs.ms(MIXED)) == pytest.approx(1, rel=0.1)


def test_a_slow_kind_leaves_the_others_alone(model, rng):
    costs = RooflineCosts()
    for _ in range(100):
        play(model, [DECODE], costs, rng, 1)
        play(model, [MIXED], costs, rng, 1, factor=1.6)
    assert ratio(model, DECODE, costs.ms(DECODE)) == pytest.approx(1, rel=0.03)
    assert ratio(model, MIXED, 1.6 * costs.ms(MIXED)) == pytest.approx(1, rel=0.03)
    play(model, [DECODE], costs, rng, 3000)
    assert ratio(model, MIXED, costs.ms(MIXED)) == pytest.approx(1, rel=0.1)  # another chance


def test_a_bucket_has_a_bias_of_its_own(model, rng):
    costs = RooflineCosts()
    others = [StepFeatures(Bucket(n, 0, 0, 0)) for n in (4, 16, 256)]
    for _ in range(150):
        play(model, [DECODE], costs, rng, 1, factor=1.3)
        play(model, others, costs, rng, 3)
    assert ratio(model, DECODE, 1.3 * costs.ms(DECODE)) == pytest.approx(1, rel=0.05)
    for other in others:
        assert ratio(model, other, costs.ms(other)) == pytest.approx(1, rel=0.05)


@pytest.mark.parametrize("quantile", [0.8, 0.9, 0.95])
def test_the_high_prediction_covers_its_share(quantile, profile, rng):
    """Inference steps and mixed ones have noise of different size; both are covered."""
    model, costs = LatencyModel.from_profile(profile, quantile=quantile), RooflineCosts()
    covered = {DECODE: 0, MIXED: 0}
    play(model, [DECODE, MIXED], costs, rng, 400, sigma=0.1)
    model.reset_errors()
    for _ in range(2000):
        for mix, sigma in ((DECODE, 0.03), (MIXED, 0.15)):
            ms = costs.ms(mix) * float(np.exp(sigma * rng.standard_normal()))
            covered[mix] += ms <= model.predict_high(mix)
            model.observe(mix, ms)
    for mix, count in covered.items():
        assert count / 2000 == pytest.approx(quantile, abs=0.025), mix
    errors = model.errors()
    assert errors is not None and errors.within_high == sum(covered.values()) / 4000
    assert model.predict_high(DECODE) < 1.1 * model.predict(DECODE)


def test_the_tail_is_that_of_mixed_steps(model, rng):
    """One in fifty takes half as long again; steps without requests, or finetuning, do not tell."""
    costs = RooflineCosts()
    alone = dataclasses.replace(MIXED, decode_rows=0, decode_kv_tokens=0)
    within = 0
    for number in range(3000):
        for mix, sigma in ((alone, 0.3), (DECODE, 0.3), (MIXED, 0.05)):
            ms = costs.ms(mix) * float(np.exp(sigma * rng.standard_normal()))
            ms *= 1.5 if mix is MIXED and rng.random() < 0.02 else 1.0
            if mix is MIXED and number >= 1000:
                within += ms <= model.predict_high(mix) * model.tail_factor()
            model.observe(mix, ms)
    assert within / 2000 == pytest.approx(0.99, abs=0.007)
    assert LatencyModel().is_ready is False
    with pytest.raises(RuntimeError, match="no fit yet"):
        LatencyModel().tail_factor()


def test_few_steps_are_taken_at_their_worst(model, rng):
    costs = RooflineCosts()
    before = model.predict_high(MIXED) * model.tail_factor() / model.predict(MIXED)
    assert before > model.predict_high(MIXED) / model.predict(MIXED)
    play(model, [MIXED], costs, rng, 20, sigma=0.0)
    play(model, [MIXED], costs, rng, 1, factor=2.0, sigma=0.0)
    worst = model.predict_high(MIXED) * model.tail_factor() / model.predict(MIXED)
    assert worst == pytest.approx(2.0, rel=0.05)


@pytest.mark.parametrize("ms", [0.0, -1.0, float("inf"), float("nan")])
def test_observed_times_are_checked(model, ms):
    before = model.predict(DECODE)
    with pytest.raises(ValueError, match="`ms` must be a finite number above 0; got"):
        model.observe(DECODE, ms)
    assert model.predict(DECODE) == before and model.errors() is None


def test_errors_are_of_predictions_made_before(model, rng):
    """Computed again from predictions that the test keeps."""
    costs, errors = RooflineCosts(), []
    for index in range(700):
        mix = random_features(rng)
        ms = costs.ms(mix) * float(np.exp(0.1 * rng.standard_normal())) * (1 + (index > 650))
        errors.append(ms / model.predict(mix) - 1)
        model.observe(mix, ms)
    for is_recent, own in ((False, errors), (True, errors[-512:])):
        found, values = model.errors(is_recent=is_recent), np.asarray(own)
        assert found is not None and found.count == len(own)
        assert found.bias == pytest.approx(values.mean(), abs=0.005)
        assert found.median_abs == pytest.approx(np.median(abs(values)), abs=0.005)
        assert found.p95_abs == pytest.approx(np.quantile(abs(values), 0.95), abs=0.02)
        assert found.p95_under == pytest.approx(np.quantile(np.maximum(values, 0), 0.95), abs=0.02)
    middle = model.predict(MIXED)
    model.reset_errors()
    assert model.errors() is None and model.predict(MIXED) == middle
