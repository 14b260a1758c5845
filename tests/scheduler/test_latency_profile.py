"""Profiles of latency: their files, what they refuse, and what they are compared with."""

import dataclasses
import json

import pytest
from latency_cases import BUCKETS, CONTEXT, LADDER, MIXED, with_noise

from flexjax.layout import Bucket
from flexjax.scheduler.features import (
    RooflineCosts,
    StepFeatures,
)
from flexjax.scheduler.latency_model import LatencyModel
from flexjax.scheduler.latency_profile import (
    LatencyProfile,
    fit_coefficients,
    profile_sizes,
    synthetic_profile,
    synthetic_samples,
)


@pytest.fixture(scope="module")
def profile():
    return synthetic_profile(LADDER, context_len=CONTEXT)


def test_a_saved_profile_comes_back_to_the_bit(tmp_path, rng):
    samples = with_noise(synthetic_samples(BUCKETS[::3], RooflineCosts(), context_len=99), rng)
    sizes = profile_sizes(LADDER, page_size=16, kernels=None, dtype="bfloat16")
    saved = LatencyProfile.from_samples(
        samples, device="made up", model="tiny", versions={"jax": "0.10.2"}, sizes=sizes
    )
    saved.save(tmp_path / "a.json")
    loaded = LatencyProfile.load(tmp_path / "a.json")
    loaded.save(tmp_path / "b.json")
    assert loaded == saved
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    ours, theirs = (LatencyModel.from_profile(p) for p in (saved, loaded))
    assert ours.predict(MIXED) == theirs.predict(MIXED)
    assert fit_coefficients(loaded.samples) == saved.coefficients
    assert saved.matches(device="made up", model="tiny", sizes=sizes)


def test_a_profile_says_why_it_does_not_match(profile):
    sizes = profile_sizes(LADDER, page_size=32, kernels="fused", dtype="bfloat16")
    match = profile.matches(device="synthetic", model="tiny", sizes=sizes)
    assert not match
    assert match.reasons == (
        "`model` is 'synthetic' in the profile and 'tiny' in the engine.",
        "`sizes.page_size` is 16 in the profile and 32 in the engine.",
        "`sizes.kernels` is None in the profile and 'fused' in the engine.",
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(format_version=7), "`format_version` must be 1; got 7"),
        (lambda c: c.pop("format_version"), "`format_version` must be 1; got None"),
        (lambda c: [c.pop("date"), c.pop("model")], "Missing keys: `model`, `date`"),
        (lambda c: c["samples"][0].pop("loss_rows"), "Missing keys: `samples.loss_rows`"),
        (lambda c: c["coefficients"].pop("noise"), "Missing keys: `coefficients.noise`"),
        (lambda c: c["samples"][0].update(ms=-1.0), "`ms` must be a finite number above 0"),
        (lambda c: c["coefficients"].update(overlap=2.0), "`overlap` must be at most 1; got 2"),
        (lambda c: c["coefficients"].update(fixed_ms=-1.0), "`fixed_ms` must be finite and at"),
        (lambda c: c["coefficients"]["extra_ms"].pop(), "`extra_ms` must have 8 values"),
        (lambda c: c["coefficients"].update(measured_ms=[]), "`measured_ms` must have at least"),
        (lambda c: c.update(source="guessed"), "`source` must be one of .*; got 'guessed'"),
        (lambda c: c.update(date="yesterday"), "`date` must be ISO 8601; got 'yesterday'"),
    ],
)
def test_a_damaged_profile_is_refused(tmp_path, profile, change, message):
    path = tmp_path / "profile.json"
    profile.save(path)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"`path` must be a latency profile; got .*{message}"):
        LatencyProfile.load(path)


@pytest.mark.parametrize("text", ["", "[]", "{", '"profile"'])
def test_another_file_is_no_profile(tmp_path, text):
    path = tmp_path / "profile.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="`path` must be a latency profile; got"):
        LatencyProfile.load(path)
    with pytest.raises(FileNotFoundError):
        LatencyProfile.load(tmp_path / "none.json")


def test_synthetic_profiles_are_the_same_each_time(profile):
    assert synthetic_profile(LADDER, context_len=CONTEXT) == profile
    assert {s.features.bucket for s in profile.samples} == set(BUCKETS)
    costs = RooflineCosts()
    assert all(s.ms == costs.ms(s.features) for s in profile.samples)
    with pytest.raises(ValueError, match="`context_len` must be at least 1; got 0"):
        synthetic_profile(LADDER, context_len=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fixed": 0.0}, "`fixed` must be above 0; got 0"),
        ({"overlap": 1.5}, "`overlap` must be at most 1; got 1.5"),
        ({"head_row": -1.0}, "`head_row` must be finite and at least 0; got -1.0"),
    ],
)
def test_costs_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        RooflineCosts(**options)


def test_costs_follow_the_roofline():
    costs = RooflineCosts(fixed=1.0, forward_floor=4.0, forward_row=0.1, overlap=0.5)
    backward = 12 * max(costs.backward_floor, costs.backward_row * 512)
    assert costs.ms(StepFeatures(Bucket(4, 0, 0, 0))) == 5.0
    assert costs.ms(StepFeatures(Bucket(4, 128, 0, 0))) == pytest.approx(1 + 13.2)
    mixed = costs.ms(StepFeatures(Bucket(4, 0, 512, 12)))
    assert mixed == pytest.approx(1 + 4 + backward - 0.5 * min(4, backward))


def test_other_versions_of_a_compiler_are_told(tmp_path, profile):
    old = dataclasses.replace(profile, versions={"jax": "0.9.0", "jaxlib": "0.9.0", "numpy": "1"})
    old.save(tmp_path / "old.json")
    found = LatencyProfile.load(tmp_path / "old.json").other_versions(
        {"jax": "0.10.2", "jaxlib": "0.9.0", "flax": "0.12.8"}
    )
    assert found == ("`versions.jax` is '0.9.0' in the profile and '0.10.2' here.",)
