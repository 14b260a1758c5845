"""The compiled step updates the pool in place: no second copy of it exists."""

import math

import jax
import pytest
from helpers import tiny_config, tiny_weights

from flexjax.autodiff.arena import init_arena
from flexjax.cache.pages import init_pool, pool_bytes
from flexjax.config import EngineConfig
from flexjax.engine.programs import Programs
from flexjax.engine.sizing import Sizing
from flexjax.layout import Bucket
from flexjax.lora.bank import init_bank
from flexjax.step.state import EngineState, init_sample_state

PAGES, PAGE = 4_096, 8
CONFIG = tiny_config("llama", num_layers=4)
BUCKETS = {
    "decode": Bucket(4, 0, 0, 0),
    "chunk": Bucket(0, 16, 0, 0),
    "decode and chunk": Bucket(4, 16, 0, 0),
    "window": Bucket(0, 0, 16, 4),
    "all": Bucket(4, 16, 16, 4),
    "all, half the layers": Bucket(4, 16, 16, 2),
}


def abstract_state(order):
    """Shapes of an engine's state whose pool is far larger than everything else."""
    options = EngineConfig(
        num_pages=PAGES, page_size=PAGE, max_context_len=64, chunk_buckets=(16,), max_running=4,
        decode_buckets=(4,), window_buckets=(16,), tile_order=order, finetune_tokens=64 * 64,
        max_lora_rank=4, max_adapters=2,
    )  # fmt: skip
    sizing = Sizing.derive(CONFIG, options, "cpu")

    def build():
        pool = init_pool(CONFIG, PAGES, PAGE, "float32")
        arena = init_arena(
            CONFIG, num_pages=sizing.arena_pages, page_size=PAGE, dtype="float32", policy="full",
            acc_layers=sizing.acc_layers,
        )  # fmt: skip
        return EngineState(pool, arena, init_sample_state(CONFIG, 4, "float32"))

    bank = jax.eval_shape(lambda: init_bank(CONFIG, 2, 4, "float32"))
    return sizing, jax.eval_shape(build), bank


def size_of(tree):
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("order", ["window_major", "layer_major"])
@pytest.mark.parametrize("name", BUCKETS)
def test_no_second_pool(name, order):
    sizing, state, bank = abstract_state(order)
    programs = Programs(CONFIG, sizing.step, tiny_weights(CONFIG), bank, state, 64)
    programs.compile_all([BUCKETS[name]], (4,), ())
    (stats,) = [s for key, s in programs.memory().items() if key.startswith("step")]
    pool = pool_bytes(CONFIG, PAGES, PAGE, "float32")
    arena = size_of(state.arena)
    print(f"{name}, {order}: pool {pool}, arena {arena}, {stats}")
    assert pool > 5e6 and arena > 5e5
    assert stats["temporaries"] < 0.1 * pool
    passed = state._replace(arena=None) if BUCKETS[name].only_decodes else state
    assert stats["aliased"] >= size_of(passed)
