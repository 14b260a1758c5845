"""The program of a step that only decodes does what its two parts do, one after the other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import draw_lora, tiny_config, tiny_weights

from flexjax.autodiff.arena import init_arena
from flexjax.cache.pages import KVPool
from flexjax.config import LoraConfig
from flexjax.layout import (
    SAMPLE_FLOATS,
    Bucket,
    StepSizes,
    packed_size,
    program_fields,
    step_fields,
    unpack,
)
from flexjax.lora.bank import init_bank, pad_lora, write_slot
from flexjax.step.co_serve import co_serve_step
from flexjax.step.decode import decode_step
from flexjax.step.sampling import sample_step
from flexjax.step.state import EngineState, init_sample_state

PAGE, PAGES, PER_SEQ, SLOTS = 4, 24, 5, 6
ROWS, LORA = 4, LoraConfig(r=3, target_modules="all-linear")
SIZES = StepSizes(pages_per_seq=PER_SEQ, chunk_pages=8, tile_pages=8, num_slots=2)
BUCKET = Bucket(ROWS, 0, 0, 0)


def draw_state(config, rng):
    shape = (config.num_layers, PAGES, PAGE, config.num_kv_heads, config.head_dim)
    pool = KVPool(*(jnp.asarray(rng.standard_normal(shape), jnp.float32) for _ in range(2)))
    arena = init_arena(
        config, num_pages=2, page_size=PAGE, dtype="float32", policy="full",
        acc_layers=config.num_layers,
    )  # fmt: skip
    sample = init_sample_state(config, SLOTS, "float32")
    tokens = rng.integers(0, config.vocab_size, SLOTS)
    return EngineState(pool, arena, sample._replace(next_tokens=jnp.asarray(tokens, jnp.int32)))


def draw_batch(config, rng, num_rows):
    """Some rows are fed the token sampled last, some their own; the last are padding."""
    packed = np.full(packed_size(program_fields(BUCKET, SIZES)), -1, np.int32)
    fields = unpack(packed, program_fields(BUCKET, SIZES))
    slots = rng.permutation(SLOTS)[:num_rows]
    pages = rng.permutation(PAGES)[: num_rows * PER_SEQ].reshape(num_rows, PER_SEQ)
    positions = rng.integers(0, PER_SEQ * PAGE, num_rows)
    part = slice(num_rows)
    fields["tokens"][part] = rng.integers(0, config.vocab_size, num_rows)
    fields["feed_slots"][part] = np.where(rng.random(num_rows) < 0.5, slots, -1)
    fields["positions"][part] = positions
    owned = pages[np.arange(num_rows), positions // PAGE]
    fields["kv_slots"][part] = owned * PAGE + positions % PAGE
    fields["decode_pages"][part] = pages
    fields["adapter_slots"][part] = rng.integers(-1, 2, num_rows)
    fields["sample_slots"][part] = fields["slots"][part] = slots
    fields["active_slots"][:] = (0, 1)
    fields["num_active"][...] = 2
    for name, most in (("top_k", 9), ("seeds", 99), ("output_index", 9), ("wants", 4)):
        fields[name][part] = rng.integers(0, most, num_rows)
    floats = fields["floats"].view(np.float32)
    floats[:] = 0.0
    for name, low, high in (("temperature", 0, 2), ("top_p", 0.5, 1), ("min_p", 0, 0.1)):
        floats[SAMPLE_FLOATS.index(name)] = rng.uniform(low, high, ROWS)
    floats[SAMPLE_FLOATS.index("temperature")] *= rng.random(ROWS) < 0.5
    floats[SAMPLE_FLOATS.index("repetition_penalty")] = rng.uniform(1, 2, ROWS)
    floats[SAMPLE_FLOATS.index("presence_penalty")] = rng.uniform(-1, 1, ROWS)
    return jnp.asarray(packed)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("num_rows", [1, 3, ROWS])
def test_one_program_is_the_two_in_turn(family, num_rows, rng):
    config = tiny_config(family)
    weights, bank = tiny_weights(config), init_bank(config, 2, LORA.r, "float32")
    for slot in range(2):
        arrays = draw_lora(rng, config, LORA)
        tree = jax.tree.map(jnp.asarray, pad_lora(config, arrays, LORA.r))
        bank = write_slot(bank, jnp.int32(slot), tree, jnp.float32(LORA.scale))
    state = draw_state(config, rng)
    packed = draw_batch(config, rng, num_rows)
    end = packed_size(step_fields(BUCKET, SIZES))
    step = jax.jit(functools.partial(co_serve_step, config, BUCKET, SIZES))
    head = jax.jit(functools.partial(sample_step, config))
    both = jax.jit(functools.partial(decode_step, config, BUCKET, SIZES))
    (pool, _, sample), sums, _ = step(weights, bank, state, None, packed[:end])
    sample, output = head(weights, sample, packed[end:])
    found_pool, found_sample, found = both(weights, bank, state.pool, state.sample, packed)
    assert sums is None
    compare = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    jax.tree.map(compare, found_pool, pool)
    jax.tree.map(compare, found_sample, sample)
    jax.tree.map(lambda x, y: compare(x[:num_rows], y[:num_rows]), found, output)
    changed = np.flatnonzero(np.abs(found_pool.k - state.pool.k).max((0, 2, 3, 4)))
    assert len(changed) == num_rows
