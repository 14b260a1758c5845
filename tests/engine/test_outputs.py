"""Outputs of requests do not depend on anything but the request."""

import threading

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    EOS,
    FAMILIES,
    LOGPROB_TOLERANCE,
    Recorder,
    check_greedy,
    dense_logprobs,
    drain,
    draw_lora,
    draw_rows,
    draw_tokens,
    logprob_gap,
    make_engine,
    tiny_config,
    tiny_weights,
    torch_model,
    write_adapter,
    write_model,
)

from flexjax.config import FinetuneConfig, LoraConfig, SamplingParams
from flexjax.errors import CapacityError

GREEDY = SamplingParams(max_tokens=40, ignore_eos=True, logprobs=0)
LENGTHS = (1, 9, 30, 17, 55, 3, 24, 40)
_gaps: dict[str, float] = {}


@pytest.fixture(scope="module", autouse=True)
def report(request):
    yield
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        for name, gap in _gaps.items():
            print(f"\nmax |logprob difference|, {name}: {gap:.2e}", end="")


@pytest.fixture(scope="module")
def model():
    config = tiny_config("llama", num_layers=2)
    return config, tiny_weights(config, seed=9)


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(21)
    return [draw_tokens(rng, n) for n in LENGTHS]


@pytest.fixture(scope="module")
def engine(model):
    return make_engine(*model, max_jobs=0, max_context_len=128)


@pytest.fixture(scope="module")
def alone(engine, prompts):
    """Each prompt by itself."""
    return [engine.generate(prompt, GREEDY)[0] for prompt in prompts]


def compare(name, outputs, expected):
    gap = max(logprob_gap(a, b) for a, b in zip(outputs, expected, strict=True))
    _gaps[name] = max(gap, _gaps.get(name, 0.0))
    assert gap <= LOGPROB_TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_matches_transformers(family, tmp_path):
    torch = pytest.importorskip("torch", reason="the oracle (transformers) needs torch")
    config = tiny_config(family)
    weights = tiny_weights(config, seed=4)
    engine = make_engine(config, weights, max_jobs=0, max_context_len=128)
    rng = np.random.default_rng(5)
    prompts = [draw_tokens(rng, n) for n in (13, 2, 41)]
    params = SamplingParams(max_tokens=64, ignore_eos=True, logprobs=0)
    outputs = engine.generate(prompts, params)
    theirs = torch_model(write_model(tmp_path, config, weights))
    for prompt, output in zip(prompts, outputs, strict=True):
        with torch.no_grad():
            full = theirs.generate(
                torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), do_sample=False,
                max_new_tokens=64, min_new_tokens=64, eos_token_id=None, pad_token_id=0,
            )  # fmt: skip
        assert list(output.token_ids) == full[0, len(prompt) :].tolist()
        gap = check_greedy(config, weights, output)
        _gaps[f"{family} against dense"] = max(gap, _gaps.get(f"{family} against dense", 0.0))


def test_alone_matches_dense(model, alone):
    for output in alone:
        assert output.finish_reason == "length" and output.usage.completion_tokens == 40
        check_greedy(*model, output)


def test_batched(engine, prompts, alone):
    compare("batched", engine.generate(prompts, GREEDY), alone)
    engine.check_integrity()


def test_staggered_arrivals(engine, prompts, alone):
    outputs = []
    for prompt in prompts:
        outputs.append(engine.add_request(prompt, GREEDY))
        for _ in range(3):
            engine.step()
    drain(engine)
    compare("staggered", [output.result() for output in outputs], alone)


@pytest.mark.parametrize(
    "options",
    [
        {"chunk_buckets": (3,), "page_size": 4},
        {"chunk_buckets": (5, 64), "page_size": 16, "decode_buckets": (1, 4)},
        {"page_size": 4, "num_pages": 32},
        {"page_size": 16, "num_pages": 10, "chunk_buckets": (7,)},
    ],
    ids=["chunks-of-3", "pages-of-16", "few-pages", "few-large-pages"],
)
def test_chunks_pages_and_preemption(request, model, prompts, alone, options):
    engine = make_engine(*model, max_jobs=0, max_context_len=128, **options)
    outputs = [engine.add_request(prompt, GREEDY) for prompt in prompts]
    drain(engine)
    outputs = [output.result() for output in outputs]
    compare(request.node.callspec.id, outputs, alone)
    preempted = sum(output.num_preemptions for output in outputs)
    assert (preempted > 0) == ("num_pages" in options)


def test_draws_survive_batching_and_preemption(model, engine, prompts):
    """With a seed, sampled tokens are the same alone, in a batch, and after a preemption."""
    crowded = make_engine(*model, max_jobs=0, max_context_len=128, page_size=4, num_pages=32)
    penalties = {"repetition_penalty": 1.2, "frequency_penalty": 0.3, "presence_penalty": 0.2}
    params = [
        SamplingParams(
            max_tokens=40, ignore_eos=True, temperature=1.3, seed=100 + i,
            top_p=0.9 if i % 3 == 0 else 1.0, top_k=12 if i % 3 == 1 else 0, min_p=0.01 * i,
            **(penalties if i % 2 else {}),
        )
        for i in range(len(prompts))
    ]  # fmt: skip
    alone = [engine.generate(p, q)[0].token_ids for p, q in zip(prompts, params, strict=True)]
    together = engine.generate(prompts, params)
    assert [output.token_ids for output in together] == alone
    outputs = crowded.generate(prompts, params)
    assert sum(output.num_preemptions for output in outputs) > 0
    assert [output.token_ids for output in outputs] == alone
    other = engine.generate(prompts[3], SamplingParams(max_tokens=40, temperature=1.3, seed=5))
    assert other[0].token_ids != alone[3]


# Stopping.


def stop_params(**options):
    return SamplingParams(**{"max_tokens": 40, "ignore_eos": True, **options})


def stream(engine, prompt, params):
    pieces = list(engine.stream(prompt, params))
    return pieces, "".join(piece.text for piece in pieces)


@pytest.mark.parametrize("start", [0, 3, 11, 30])
def test_stop_text_across_token_borders(engine, prompts, alone, start):
    text = alone[2].text
    stop = text[start : start + 9]
    assert " " in stop
    params = stop_params(stop=["never", stop])
    output = engine.generate(prompts[2], params)[0]
    assert output.text == text[: text.find(stop)] and output.finish_reason == "stop"
    assert output.token_ids == alone[2].token_ids[: len(output.token_ids)]
    pieces, streamed = stream(engine, prompts[2], params)
    assert streamed == output.text
    assert pieces[-1].finish_reason == "stop" and not any(p.finish_reason for p in pieces[:-1])
    assert tuple(t for p in pieces for t in p.token_ids) == output.token_ids


def test_a_stop_text_that_only_begins_is_given_out_at_last(engine, prompts, alone):
    text = alone[1].text
    params = stop_params(stop=[text[-4:] + "x", text[10:14] + "x"])
    pieces, streamed = stream(engine, prompts[1], params)
    assert streamed == text == engine.generate(prompts[1], params)[0].text
    assert pieces[-1].finish_reason == "length"


def test_streamed_text_equals_generated_text(engine, prompts, alone):
    for prompt, output in zip(prompts, alone, strict=True):
        pieces, streamed = stream(engine, prompt, GREEDY)
        assert streamed == output.text
        assert sum(len(piece.logprobs) for piece in pieces) == 40


def test_stop_tokens_and_the_end_token(engine, prompts, alone):
    tokens = alone[4].token_ids
    stop = tokens[6]
    first = tokens.index(stop)
    output = engine.generate(prompts[4], stop_params(stop_token_ids=[stop]))[0]
    assert output.token_ids == tokens[: first + 1] and output.finish_reason == "stop"
    assert output.text.split() == alone[4].text.split()[:first]


def test_the_end_token_ends_unless_ignored(model, prompts):
    config, weights = model
    head = np.array(weights.lm_head)
    head[:, EOS] = 3 * head[:, 7]  # the end token wins wherever token 7 is liked
    weights = weights._replace(lm_head=jnp.asarray(head))
    engine = make_engine(config, weights, max_jobs=0, max_context_len=128)
    ended = [engine.generate(prompt, stop_params(ignore_eos=False))[0] for prompt in prompts]
    whole = [engine.generate(prompt, stop_params())[0] for prompt in prompts]
    assert any(output.finish_reason == "stop" for output in ended)
    for short, full in zip(ended, whole, strict=True):
        assert full.finish_reason == "length" and len(full.token_ids) == 40
        assert short.token_ids == full.token_ids[: len(short.token_ids)]
        if short.finish_reason == "stop":
            assert short.token_ids[-1] == EOS and EOS not in short.token_ids[:-1]
            assert "<eos>" not in short.text


def test_lengths(engine, prompts):
    one = engine.generate(prompts[2], stop_params(max_tokens=1))[0]
    assert len(one.token_ids) == 1 and one.finish_reason == "length" and one.tpot_s is None
    full = engine.generate(list(range(50)) + list(range(50)), stop_params(max_tokens=1_000))[0]
    assert full.usage.total_tokens == 128 and full.finish_reason == "length"
    last = engine.generate([5] * 127, stop_params())[0]
    assert len(last.token_ids) == 1
    with pytest.raises(CapacityError, match="shorter than the context, 128 tokens; got 128"):
        engine.generate([5] * 128, stop_params())
    with pytest.raises(ValueError, match="at least one token"):
        engine.generate([[]], stop_params())
    with pytest.raises(ValueError, match=r"integers in \[0, 61\); got 61"):
        engine.generate([[3, 61]], stop_params())
    engine.check_integrity()


def test_top_logprobs(model, engine, prompts):
    output = engine.generate(prompts[3], stop_params(logprobs=5, max_tokens=12))[0]
    tokens = [*output.prompt_token_ids, *output.token_ids]
    table = dense_logprobs(*model, tokens)[len(prompts[3]) - 1 : -1]
    for row, entry in zip(table, output.logprobs, strict=True):
        order = np.argsort(-row)[:5]
        assert [token for token, _ in entry.top] == order.tolist()
        ours = [value for _, value in entry.top]
        np.testing.assert_allclose(ours, row[order], atol=LOGPROB_TOLERANCE)
        assert entry.logprob == ours[0] and entry.token_id == order[0]


def test_abort(engine, prompts, alone):
    kept = engine.add_request(prompts[1], GREEDY)
    running = engine.add_request(prompts[2], GREEDY)
    waiting = [engine.add_request(prompts[3], GREEDY) for _ in range(4)]
    for _ in range(9):
        engine.step()
    for output in (running, waiting[-1]):
        engine.abort(output)
        assert output.result().finish_reason == "abort"
    engine.check_integrity()
    drain(engine)
    compare("beside an abort", [kept.result(), waiting[0].result()], [alone[1], alone[3]])
    part = running.result().token_ids
    assert 0 < len(part) < 40 and part == alone[2].token_ids[: len(part)]
    pieces = engine.stream(prompts[5], GREEDY)
    next(pieces)
    pieces.close()
    assert engine.stats().num_running == 0
    engine.check_integrity()


def test_threads(engine, prompts, alone):
    """Callers in several threads, with the loop in one of its own."""
    results = [None] * len(prompts)

    def call(index):
        results[index] = engine.generate(prompts[index], GREEDY)[0]

    with engine:
        threads = [threading.Thread(target=call, args=(i,)) for i in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    compare("threads", results, alone)


# Training beside requests.


def train(engine, adapter_dir, rows, prompts=()):
    config = FinetuneConfig(
        adapter="job", dataset=[row.source for row in rows], init_adapter=adapter_dir,
        batch_size=3, epochs=2, learning_rate=3e-3, schedule="constant", shuffle=False,
    )  # fmt: skip
    with Recorder(engine) as recorder:
        job = engine.finetune(config)
        outputs = []
        for prompt in prompts:  # arriving one by one, they take pages from groups under way
            for _ in range(15):
                engine.step()
            outputs.append(engine.add_request(prompt, GREEDY))
        drain(engine)
    assert job.status == "succeeded" and job.metrics().total_steps == 6
    arrays = engine._jobs.adapters["job"].arrays
    flat = np.concatenate([arrays[n][m].ravel() for n in sorted(arrays) for m in "AB"])
    engine.unload_adapter("job")
    return flat, recorder, [output.result() for output in outputs]


@pytest.mark.parametrize("deterministic", [False, True])
def test_training_with_and_without_requests(model, prompts, alone, tmp_path, deterministic):
    config, _ = model
    rng = np.random.default_rng(8)
    lora = LoraConfig(r=4, alpha=8.0)
    path = write_adapter(tmp_path / "a", config, lora, draw_lora(rng, config, lora))
    # Longer than a block of keys: where a sequence stands in a list of pages changes its sums.
    rows = draw_rows(rng, (150, 7, 90, 160, 40, 120, 31, 18), is_masked=True)
    engine = make_engine(
        *model, max_context_len=192, page_size=16, num_pages=20, finetune_token_budget=9,
        window_buckets=(16, 32), chunk_buckets=(48,), deterministic_finetuning=deterministic,
    )  # fmt: skip
    quiet, _, _ = train(engine, path, rows)
    again, _, _ = train(engine, path, rows)
    np.testing.assert_array_equal(quiet, again)
    busy, recorder, outputs = train(engine, path, rows, prompts)
    compare("with a job in the same steps", outputs, alone)
    gap = np.abs(quiet - busy).max()
    assert recorder.num_discarded > 0
    kind = "deterministic" if deterministic else "mixed"
    _gaps[f"(adapter, not logprobs) trained with requests, {kind}"] = float(gap)
    if deterministic:
        assert gap == 0.0
        assert not any((s.decode or s.prefill) and s.forward for s in recorder.steps)
        assert sum(bool(s.decode or s.prefill) for s in recorder.steps) > 3
    else:
        assert recorder.num_mixed > 3 and gap <= 1e-4
