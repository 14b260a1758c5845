"""Latency targets, policies and profiles in a running engine."""

import pytest
from helpers import drain, draw_tokens, make_engine, tiny_config, tiny_weights

from flexjax.config import FinetuneConfig, LoraConfig, SamplingParams
from flexjax.engine.profiling import Profiler
from flexjax.scheduler.latency_profile import LatencyProfile
from flexjax.scheduler.policy import CoServe, InferenceOnly
from flexjax.slo import SLO

PARAMS = SamplingParams(max_tokens=5, ignore_eos=True)


@pytest.fixture(scope="module")
def model():
    config = tiny_config("llama", num_layers=2)
    return config, tiny_weights(config, seed=4)


@pytest.fixture(scope="module")
def engine(model):
    return make_engine(*model)


def start_job(engine, name, **options):
    rows = [{"text": " ".join(f"t{token}" for token in range(3, 23))}] * 4
    lora = LoraConfig(r=4, alpha=8.0)
    return engine.finetune(
        FinetuneConfig(adapter=name, dataset=rows, lora=lora, batch_size=2, **options)
    )


def test_a_job_waits_while_the_policy_says_so(engine, rng):
    engine.set_policy(InferenceOnly())
    job = start_job(engine, "waits")
    outputs = [engine.add_request(draw_tokens(rng, n), PARAMS) for n in (4, 19)]
    drain(engine)
    assert all(output.finished.is_set() for output in outputs)
    assert engine.stats().finetune_forward_tokens == 0 and not job.metrics().steps
    engine.set_policy(CoServe())
    job.wait(timeout=120)
    assert len(job.metrics().steps) == 2


def test_every_policy_answers_and_trains(engine, rng):
    from flexjax.scheduler.policy import POLICIES, make_policy

    for index, name in enumerate(POLICIES):
        engine.set_policy(make_policy("temporal:2" if name == "temporal" else name))
        job = None if name == "inference_only" else start_job(engine, f"job{index}")
        output = engine.add_request(draw_tokens(rng, 9), PARAMS)
        drain(engine)
        assert output.finished.is_set() and len(output.result().token_ids) == 5
        assert job is None or job.status == "succeeded"
        engine.check_integrity()
        if job is not None:
            engine.unload_adapter(f"job{index}")
    engine.set_policy(CoServe())


def test_targets_reach_the_scheduler(engine, rng):
    strict = engine.add_request(draw_tokens(rng, 4), PARAMS, slo=SLO(ttft_ms=900.0, tpot_ms=30.0))
    named = engine.add_request(draw_tokens(rng, 4), PARAMS, slo="interactive")
    default = engine.add_request(draw_tokens(rng, 4), PARAMS)
    found = [output.sequence.request.slo for output in (strict, named, default)]
    assert [slo.tpot_ms for slo in found] == [30.0, 75.0, None]
    drain(engine)
    assert strict.sequence.admitted_s is not None


def test_an_unknown_class_disturbs_nobody(engine, rng):
    prompt = draw_tokens(rng, 4)
    with pytest.raises(ValueError, match="`slo` must be an SLO or one of interactive, batch"):
        engine.add_request(prompt, PARAMS, slo="gold")
    assert engine.stats().num_waiting == 0
    assert len(engine.generate(prompt, PARAMS)[0].token_ids) == 5


def test_an_unknown_policy_is_refused_before_anything_compiles(model):
    with pytest.raises(ValueError, match="`policy` must be one of co_serve.*; got 'greedy'"):
        make_engine(*model, policy="greedy")


def test_steps_are_told(engine, rng):
    events = []
    engine.on_step = events.append
    start_job(engine, "told")
    engine.generate([draw_tokens(rng, 9)], PARAMS)
    drain(engine)
    engine.on_step = None
    assert sum(len(event.plan.decode) for event in events) >= 4
    assert any(event.features.has_finetuning for event in events)
    for event in events:
        assert event.end_s > event.begin_s and event.predicted_ms > 0
        assert event.host_ms >= event.schedule_ms > 0
    assert engine.latency.errors() is not None


def test_a_profile_is_used_if_it_covers_the_buckets(engine, model, tmp_path):
    from flexjax.engine.engine import Engine

    samples = Profiler(engine._runner, repeats=1).measure()
    fields = {"device": "cpu", "model": "m", "versions": {}, "sizes": {}}
    profile = LatencyProfile.from_samples(samples, **fields)
    path = tmp_path / "profile.json"
    profile.save(path)
    loaded = LatencyProfile.load(path)
    again = Engine(*model, None, engine.config, profile=loaded)
    bucket = engine._runner.buckets[-1]
    assert again.latency.base_ms(bucket) == profile.coefficients.base_ms(bucket)
    only_decode = [s for s in samples if not s.features.bucket.window]
    partial = LatencyProfile.from_samples(only_decode, **fields)
    with pytest.raises(ValueError, match="`profile` must cover every bucket; it cannot predict"):
        Engine(*model, None, engine.config, profile=partial)
