"""The paper's set-up: the counted device, the sizes, and the table beside the paper's figures."""

import dataclasses

import pytest

from flexjax.bench.simulate import (
    PAPER_CONFIG,
    PAPER_MODEL,
    RooflineDevice,
    RooflineShares,
    h200_profile,
    paper_table,
    simulated_engine,
)
from flexjax.builtin_models import BUILTIN_MODELS
from flexjax.config import EngineConfig
from flexjax.layout import Bucket
from flexjax.scheduler.features import StepFeatures
from flexjax.scheduler.latency_model import LatencyModel
from flexjax.scheduler.latency_profile import LatencyProfile
from flexjax.simulator import paper

MODEL = BUILTIN_MODELS[PAPER_MODEL]
SHARES = RooflineShares(bandwidth=0.5, flops=0.25, overhead_ms=2.0)


@pytest.fixture(scope="module")
def profile():
    return h200_profile()


def test_the_device_is_what_hands_count():
    """Llama-3.1-8B: 6,979,321,856 parameters in linears, 41,943,040 in a rank-16 adapter."""
    device = RooflineDevice(MODEL, PAPER_CONFIG, shares=SHARES)
    params = 6_979_321_856 + 41_943_040
    per_ms_bytes, per_ms_flops = 4.3e9 * 0.5, 790e9 * 0.25
    one = device.ms(StepFeatures(Bucket(1, 0, 0, 0)))
    kv = 32 * 2 * 8 * 128 * 2  # bytes of a token's keys and values
    assert one == pytest.approx(2.0 + (2 * params + kv) / per_ms_bytes)
    many = device.ms(StepFeatures(Bucket(0, 1024, 0, 0)))
    assert many == pytest.approx(2.0 + 2 * 1024 * params / per_ms_flops)
    read = device.ms(StepFeatures(Bucket(1, 0, 0, 0), decode_rows=1, decode_kv_tokens=8000))
    assert read - one == pytest.approx(8000 * kv / per_ms_bytes)
    head = device.ms(StepFeatures(Bucket(1, 0, 0, 0), sample_rows=1)) - one
    assert head == pytest.approx(2 * 128_256 * 4096 / per_ms_bytes)
    tile = device.ms(StepFeatures(Bucket(0, 0, 1024, 32)))
    least = 2 * 1024 * 6_979_321_856 / per_ms_flops  # gradients of the inputs alone
    assert least < tile - 2.0 < 1.1 * least


def test_overlap_hides_a_share_of_the_cheaper_side():
    whole = StepFeatures(Bucket(64, 512, 512, 32))
    sides = [StepFeatures(Bucket(64, 512, 0, 0)), StepFeatures(Bucket(0, 0, 512, 32))]

    def ms(overlap, features):
        shares = dataclasses.replace(SHARES, overlap=overlap)
        return RooflineDevice(MODEL, PAPER_CONFIG, shares=shares).ms(features)

    forward, backward = (ms(0.0, side) - 2.0 for side in sides)
    assert ms(0.0, whole) == pytest.approx(2.0 + forward + backward)
    hidden = 0.5 * min(forward, backward)
    assert ms(0.5, whole) == pytest.approx(2.0 + forward + backward - hidden)


def test_the_profile_fits_its_device_and_says_what_it_is(profile, tmp_path):
    assert profile.source == "roofline" and "not measured" in profile.device
    model, device = LatencyModel.from_profile(profile), RooflineDevice(MODEL, PAPER_CONFIG)
    engine = simulated_engine(PAPER_MODEL, PAPER_CONFIG)
    assert not model.missing(engine.ladder.all_buckets(finetuning=True))
    features = StepFeatures(
        Bucket(64, 512, 512, 32),
        decode_rows=50,
        prefill_rows=100,
        forward_rows=400,
        backward_rows=512,
        decode_kv_tokens=30_000,
        chunk_kv_pairs=900_000,
        tile_kv_pairs=32 * 700_000,
        sample_rows=64,
        num_losses=1,
        loss_rows=512,
    )
    assert model.predict(features) == pytest.approx(device.ms(features), rel=0.05)
    profile.save(tmp_path / "h200.json")
    assert LatencyProfile.load(tmp_path / "h200.json") == profile


def test_sizes_are_those_of_the_engine():
    engine = simulated_engine(PAPER_MODEL, PAPER_CONFIG)
    assert (engine.num_layers, engine.max_context_len, engine.page_size) == (32, 8192, 16)
    assert engine.num_pages * engine.page_size == 458_752
    assert engine.arena_pages * engine.page_size == 16_384
    assert engine.ladder.decode == (1, 4, 16, 64, 256)
    with pytest.raises(ValueError, match="`num_pages` must be at least 512"):
        simulated_engine(PAPER_MODEL, dataclasses.replace(PAPER_CONFIG, num_pages=511))


def test_the_paper_table_has_a_row_for_each_run():
    seen = []
    config = EngineConfig(
        max_context_len=8192,
        max_running=64,
        num_pages=8192,
        decode_buckets=(64,),
        chunk_buckets=(512,),
        window_buckets=(512,),
    )
    rows = paper_table(
        config=config,
        rates=(1.0, 5.0),
        policies=("co_serve", "inference_only"),
        duration_s=6.0,
        drain_s=20.0,
        on_row=seen.append,
    )
    assert tuple(seen) == rows
    assert [(r.policy, r.rate) for r in rows] == [
        ("co_serve", 1.0),
        ("co_serve", 5.0),
        ("inference_only", 1.0),
        ("inference_only", 5.0),
    ]
    light, heavy, *alone = rows
    assert light.retention == 1.0
    assert heavy.retention == heavy.forward_tokens_per_s / light.forward_tokens_per_s
    assert all(r.forward_tokens_per_s == 0 and r.retention is None for r in alone)
    assert all(r.attainment >= 0.9 and 5 < r.tpot_ms < 10 for r in alone)
    assert heavy.num_requests > light.num_requests
    text = paper.paper_markdown(rows)
    assert len(text.splitlines()) == 6 and "(2,352)" in text and "(99.0%)" in text


def test_the_papers_figures_are_per_pipeline():
    figures = paper.paper_figures("co_serve", 5.0)
    assert figures == paper.PaperFigures(7195 / 4, 0.977, 36.7)
    assert paper.paper_figures("inference_only", 2.0) == paper.PaperFigures(tpot_ms=13.0)
    assert paper.paper_figures("co_serve", 2.5) == paper.PaperFigures()
    assert set(paper.PAPER_POLICIES) >= set(paper._FINETUNING)


def test_lengths_have_the_means_that_are_stated():
    workload = paper.paper_workload(5.0, 3600.0)
    about = workload.description
    assert about["output_tokens"]["mean"] == pytest.approx(260, rel=0.05)
    assert about["prompt_tokens"]["mean"] == pytest.approx(210, rel=0.1)
    assert all(a.prompt_tokens + a.output_tokens <= 8192 for a in workload.arrivals)
    lengths = paper.paper_job().lengths
    assert len(lengths) == 1000 and max(lengths) <= 8192
    assert sum(lengths) / 1000 == pytest.approx(3700, rel=0.05)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="`device` must be one of a100, h100, h200; got 'tpu'"):
        RooflineDevice(MODEL, PAPER_CONFIG, "tpu")
    with pytest.raises(ValueError, match="`flops` must be at most 1; got 1.5"):
        RooflineShares(flops=1.5)
    with pytest.raises(ValueError, match="`bandwidth` must be a finite number > 0; got 0"):
        RooflineShares(bandwidth=0)
