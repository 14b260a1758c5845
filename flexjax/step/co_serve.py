"""The co-serving step: inference and finetuning rows in one jitted program.

Forward rows of every kind stand side by side in each matrix product. The layers are walked once, in
counter-flow: while the forward rows go through layer i, the rows of the backward tile go through
layer top-1-i. The two have no data dependency.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from flexjax.autodiff.arena import INPUT, Arena, KVGrads, drop_padding, keep
from flexjax.autodiff.tile import TileRows, backward_layer, sm_scale
from flexjax.cache.pages import KVPool, write_tokens
from flexjax.layout import Bucket, StepSizes, step_fields, unpack
from flexjax.lora.bank import AdapterBank, LoraTree, read_slot_layer
from flexjax.lora.linear import AdapterRows, bank_linear
from flexjax.model_config import ModelConfig
from flexjax.models.layers import LayerWeights, embed, post_attention, pre_attention
from flexjax.models.weights import DecoderWeights
from flexjax.optim.sums import GradSums
from flexjax.step.state import EngineState
from pallas_kernels import PageList, decode_attention, ragged_attention


class _Forward(NamedTuple):
    """Forward rows between layers."""

    x: Float[Array, "T D"]
    pool: KVPool
    kept: dict[str, Array]


class _Backward(NamedTuple):
    """Backward rows between layers."""

    dy: Float[Array, "W D"]
    kv_grads: KVGrads
    sums: GradSums


def co_serve_step(
    config: ModelConfig,
    bucket: Bucket,
    sizes: StepSizes,
    weights: DecoderWeights,
    bank: AdapterBank,
    state: EngineState,
    sums: GradSums | None,
    packed: Int[Array, "n"],
) -> tuple[EngineState, GradSums | None, Int[Array, ""]]:
    """Runs one step.

    Args:
      config: Architecture; static.
      bucket: Row counts; static.
      sizes: Sizes that all buckets share; static.
      weights: Frozen base.
      bank: Adapters.
      state: Pool, arena and sampling state; donated.
      sums: Gradient sums of the tile's job; donated. None without a tile.
      packed: The batch, as `layout.step_fields` describes it.

    Returns:
      The new state and sums, and a scalar that is ready when the step is done (the rest is donated
      to the next step, so the host cannot wait for it). Rows with a sample slot have left their
      last hidden state in `state.sample.hidden`, for the sampling head.
    """
    batch = unpack(packed, step_fields(bucket, sizes))
    forward = _enter_forward(config, bucket, weights, state, batch) if bucket.forward else None
    backward = _enter_backward(state.arena, sums, batch) if bucket.window else None

    def body(carry, index):
        forward, backward = carry
        if forward is not None:
            forward = _forward_one(config, bucket, weights, bank, forward, batch, index)
        if backward is not None:
            # Reads what the forward rows have just been written to (never the same rows): with an
            # order between the two, XLA updates pool and arena in place; without, it copies both.
            pool, kept = (state.pool, state.arena.kept) if forward is None else forward[1:]
            backward = _backward_one(config, weights, bank, pool, kept, backward, batch, index)
        return (forward, backward), None

    carry = (forward, backward)
    carry, _ = lax.scan(body, carry, jnp.arange(bucket.tile_layers))
    if forward is not None and bucket.tile_layers < config.num_layers:
        forward, backward = carry
        rest = jnp.arange(bucket.tile_layers, config.num_layers)

        def forward_only(forward, index):
            return _forward_one(config, bucket, weights, bank, forward, batch, index), None

        forward, _ = lax.scan(forward_only, forward, rest)
        carry = (forward, backward)
    state, sums = _leave(config, bucket, state, carry, batch)
    return state, sums, jnp.zeros((), jnp.int32)


def _layer_weights(weights: DecoderWeights, layer: Array) -> LayerWeights:
    return {
        name: lax.dynamic_index_in_dim(array, layer, keepdims=False)
        for name, array in weights.layers.items()
    }


def _enter_forward(
    config: ModelConfig, bucket: Bucket, weights: DecoderWeights, state: EngineState, batch: dict
) -> _Forward:
    tokens = batch["tokens"]
    if bucket.decode:
        feed = batch["feed_slots"]
        fed = jnp.where(
            feed >= 0, state.sample.next_tokens[jnp.maximum(feed, 0)], tokens[: bucket.decode]
        )
        tokens = jnp.concatenate([fed, tokens[bucket.decode :]])
    return _Forward(embed(weights, tokens), state.pool, state.arena.kept)


def _chunk_pages(batch: dict) -> PageList:
    return PageList(
        batch["chunk_pages"],
        batch["chunk_page_segments"],
        batch["chunk_page_starts"],
        batch["num_chunk_pages"],
    )


def _forward_one(
    config: ModelConfig,
    bucket: Bucket,
    weights: DecoderWeights,
    bank: AdapterBank,
    forward: _Forward,
    batch: dict,
    layer: Array,
) -> _Forward:
    """Takes the forward rows through one layer."""
    layer_weights = _layer_weights(weights, layer)
    rows = AdapterRows(batch["adapter_slots"], batch["active_slots"], batch["num_active"])
    plain = bank_linear(layer_weights, bank, layer, rows)
    recorded: dict[str, Array] = {INPUT: forward.x}

    def linear(name: str, x: Array) -> Array:
        recorded[name] = plain(name, x)
        return recorded[name]

    q, k, v = pre_attention(config, layer_weights, linear, forward.x, batch["positions"])
    pool = write_tokens(forward.pool, layer, batch["kv_slots"], k, v)
    attn, lse = _forward_attention(config, bucket, q, pool, batch, layer)
    x = post_attention(config, layer_weights, linear, forward.x, attn)
    kept = forward.kept
    if bucket.chunk:
        chunk = {name: rows[bucket.decode :] for name, rows in recorded.items()}
        assert lse is not None
        chunk |= {"attn": attn[bucket.decode :], "lse": lse}
        kept = keep(kept, layer, batch["chunk_arena_slots"], chunk)
    return _Forward(x, pool, kept)


def _forward_attention(
    config: ModelConfig, bucket: Bucket, q: Array, pool: KVPool, batch: dict, layer: Array
) -> tuple[Array, Array | None]:
    """Attention of decode rows and of chunk rows; log-sum-exp of the latter."""
    parts, lse = [], None
    options = {"sm_scale": sm_scale(config), "sliding_window": config.sliding_window}
    positions = batch["positions"]
    if bucket.decode:
        with jax.named_scope("decode_attention"):
            rows = q[: bucket.decode]
            table = batch["decode_pages"]
            at = positions[: bucket.decode]
            parts.append(decode_attention(rows, pool.k, pool.v, layer, table, at, **options))
    if bucket.chunk:
        with jax.named_scope("chunk_attention"):
            attn, lse = ragged_attention(
                q[bucket.decode :],
                pool.k,
                pool.v,
                layer,
                _chunk_pages(batch),
                batch["chunk_segments"],
                positions[bucket.decode :],
                **options,
            )
            parts.append(attn)
    return (parts[0] if len(parts) == 1 else jnp.concatenate(parts)), lse


def _enter_backward(arena: Arena, sums: GradSums | None, batch: dict) -> _Backward:
    assert sums is not None, "a step with a backward tile needs gradient sums"
    slots = batch["tile_arena_slots"]
    dy = jnp.where((slots >= 0)[:, None], arena.d_hidden[jnp.maximum(slots, 0)], 0.0)
    return _Backward(dy, arena.kv_grads, sums)


def _backward_one(
    config: ModelConfig,
    weights: DecoderWeights,
    bank: AdapterBank,
    pool: KVPool,
    kept: dict[str, Array],
    backward: _Backward,
    batch: dict,
    index: Array,
) -> _Backward:
    """Takes the rows of the backward tile down through one layer."""
    layer = batch["tile_top"] - 1 - index
    slot = batch["tile_slot"]
    rows = TileRows(
        batch["tile_positions"],
        batch["tile_segments"],
        batch["tile_arena_slots"],
        PageList(
            batch["tile_pages"],
            batch["tile_page_segments"],
            batch["tile_page_starts"],
            batch["num_tile_pages"],
        ),
        batch["tile_acc_pages"],
    )
    dy, d_lora, kv_grads = backward_layer(
        config,
        _layer_weights(weights, layer),
        read_slot_layer(bank, slot, layer),
        bank.scale[slot],
        pool,
        kept,
        backward.kv_grads,
        layer,
        layer % backward.kv_grads.k.shape[0],
        rows,
        backward.dy,
    )
    sums = backward.sums
    added = LoraTree(
        *(
            {name: stack[name].at[layer].add(rows_sum[name]) for name in stack}
            for stack, rows_sum in zip(sums.lora, d_lora, strict=True)
        )
    )
    return _Backward(dy, kv_grads, sums._replace(lora=added))


def _leave(
    config: ModelConfig, bucket: Bucket, state: EngineState, carry: tuple, batch: dict
) -> tuple[EngineState, GradSums | None]:
    forward, backward = carry
    pool, arena, sample = state
    sums = None
    if forward is not None:
        where = drop_padding(batch["sample_slots"], sample.hidden.shape[0])
        sample = sample._replace(hidden=sample.hidden.at[where].set(forward.x, mode="drop"))
        kept = forward.kept
        if bucket.chunk:
            last = {INPUT: forward.x[bucket.decode :]}
            kept = keep(kept, config.num_layers, batch["chunk_arena_slots"], last)
        pool, arena = forward.pool, arena._replace(kept=kept)
    if backward is not None:
        where = drop_padding(batch["tile_arena_slots"], arena.d_hidden.shape[0])
        d_hidden = arena.d_hidden.at[where].set(backward.dy, mode="drop")
        arena = arena._replace(d_hidden=d_hidden, kv_grads=backward.kv_grads)
        sums = backward.sums
    return EngineState(pool, arena, sample), sums
