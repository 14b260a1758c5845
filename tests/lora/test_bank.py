"""The adapter bank: padding, slots, and first values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import draw_lora, relative, tiny_config, tiny_weights

from flexjax.config import LORA_TARGETS, LoraConfig
from flexjax.lora.bank import copy_slot, init_bank, init_lora, pad_lora, read_slot_layer, write_slot
from flexjax.lora.linear import AdapterRows, bank_linear, tile_linear
from flexjax.models.decoder import lora_linear

CONFIG = tiny_config("qwen2")
TARGETS = ("q_proj", "down_proj")
LORA = LoraConfig(r=3, alpha=4.5, target_modules=TARGETS, layers_to_transform=(0, 2))
RANK, SLOTS = 5, 4


def slot(number):
    return jnp.int32(number)


def put(bank, number, arrays, scale):
    tree = jax.tree.map(jnp.asarray, pad_lora(CONFIG, arrays, RANK))
    return write_slot(bank, slot(number), tree, jnp.float32(scale))


def test_writing_and_copying_touch_one_slot(rng):
    bank = init_bank(CONFIG, SLOTS, RANK, "float32")
    bank = put(bank, 1, draw_lora(rng, CONFIG, LoraConfig(r=5)), 2.0)
    before = bank
    arrays = draw_lora(rng, CONFIG, LORA)
    bank = copy_slot(put(bank, 3, arrays, LORA.scale), slot(3), slot(0))
    assert bank.scale.tolist() == [1.5, 2.0, 0.0, 1.5]
    for name in LORA_TARGETS:
        for new, old, part in ((bank.a, before.a, "A"), (bank.b, before.b, "B")):
            np.testing.assert_array_equal(new[name][1:3], old[name][1:3])
            np.testing.assert_array_equal(new[name][0], new[name][3])
            stored = new[name][0][..., :3] if part == "A" else new[name][0][:, :3]
            expected = arrays[name][part] if name in arrays else np.zeros_like(stored)
            np.testing.assert_array_equal(stored, expected)
            rest = new[name][0][..., 3:] if part == "A" else new[name][0][:, 3:]
            assert not np.asarray(rest).any()


@pytest.mark.parametrize("name", LORA_TARGETS)
def test_three_ways_to_apply_an_adapter_agree(rng, name):
    """Rows of the bank, the backward tile's linear, and the dense definition."""
    lora = LoraConfig(r=4, alpha=6.0)
    arrays, other = draw_lora(rng, CONFIG, lora), draw_lora(rng, CONFIG, LoraConfig(r=2))
    bank = put(put(init_bank(CONFIG, SLOTS, RANK, "float32"), 2, arrays, 1.5), 0, other, 9.0)
    layer, slots = 1, [2, 2, -1, 0, 2, -1]
    weights = {n: stack[layer] for n, stack in tiny_weights(CONFIG).layers.items()}
    x = jnp.asarray(rng.standard_normal((6, CONFIG.projection_dims()[name][0])), jnp.float32)
    rows = AdapterRows(jnp.asarray(slots), jnp.asarray([0, 2, -1, -1]), jnp.int32(2))
    mixed = np.asarray(bank_linear(weights, bank, jnp.int32(layer), rows)((name,), x)[0])
    pairs = {n: {m: jnp.asarray(p[m][layer]) for m in "AB"} for n, p in arrays.items()}
    dense = np.asarray(lora_linear(weights, pairs, 1.5)((name,), x)[0])
    plain = np.asarray(lora_linear(weights, {}, 0.0)((name,), x)[0])
    tree = read_slot_layer(bank, slot(2), jnp.int32(layer))
    tile = np.asarray(tile_linear(weights, tree, jnp.float32(1.5), {})((name,), x)[0])
    assert relative(tile, dense) <= 1e-6
    for index, number in enumerate(slots):
        if number == 2:
            assert relative(mixed[index], dense[index]) <= 1e-6
        elif number == -1:
            np.testing.assert_array_equal(mixed[index], plain[index])
        else:
            assert relative(mixed[index], dense[index]) > 1e-2


@pytest.mark.parametrize("num_decode", [1, 3, 5, 6])
def test_decode_rows_with_products_of_their_own_get_the_same(rng, num_decode):
    bank = init_bank(CONFIG, SLOTS, RANK, "float32")
    for number in (0, 1, 2):
        bank = put(bank, number, draw_lora(rng, CONFIG, LoraConfig(r=4)), 1.0 + number)
    layer, name = 1, "down_proj"
    weights = {n: stack[layer] for n, stack in tiny_weights(CONFIG).layers.items()}
    x = jnp.asarray(rng.standard_normal((6, CONFIG.projection_dims()[name][0])), jnp.float32)
    slots = jnp.asarray(rng.permutation([2, 1, -1, 0, 2, 2]))
    rows = AdapterRows(slots, jnp.asarray([0, 2, 1, -1]), jnp.int32(3))
    args = (weights, bank, jnp.int32(layer), rows)
    together = np.asarray(bank_linear(*args)((name,), x)[0])
    apart = np.asarray(bank_linear(*args, num_decode=num_decode)((name,), x)[0])
    assert relative(apart, together) <= 1e-6


def test_first_values():
    first, same = (init_lora(CONFIG, LORA, seed=3) for _ in range(2))
    other = init_lora(CONFIG, LORA, seed=4)
    dims = CONFIG.projection_dims()
    assert set(first) == {"q_proj", "down_proj"}
    for name, pair in first.items():
        bound = 1 / np.sqrt(dims[name][0])
        assert not pair["B"].any() and not pair["A"][1].any()
        assert np.abs(pair["A"]).max() <= bound and np.abs(pair["A"][[0, 2]]).max() > 0.8 * bound
        np.testing.assert_array_equal(pair["A"], same[name]["A"])
        assert (pair["A"][0] != other[name]["A"][0]).any()
    with pytest.raises(ValueError, match="must be below 3"):
        init_lora(CONFIG, LoraConfig(layers_to_transform=(3,)), seed=0)
