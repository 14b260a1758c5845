"""The co-serving step: inference and finetuning rows in one jitted program.

Forward rows of every kind stand side by side in each matrix product. The layers are walked once, in
counter-flow: while the forward rows go through layer i, the rows of the backward tile go through
layer top-1-i. The two have no data dependency.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from flexjax.autodiff.arena import INPUT, Arena, drop_padding, keep
from flexjax.autodiff.tile import backward_layer
from flexjax.cache.pages import KVPool, write_tokens
from flexjax.layout import Bucket, StepSizes
from flexjax.lora.bank import AdapterBank, read_slot_layer
from flexjax.lora.linear import bank_linear
from flexjax.model_config import ModelConfig
from flexjax.models.layers import (
    LayerWeights,
    StackedLayer,
    embed,
    post_attention,
    pre_attention,
    recording,
)
from flexjax.models.weights import DecoderWeights, has_split_kernels
from flexjax.optim.sums import GradSums
from flexjax.step.fused import fused_layer
from flexjax.step.rows import Backward, Forward, Walk, add_layer
from flexjax.step.state import EngineState
from pallas_kernels import can_run_llvm, can_run_triton, decode_attention, ragged_attention


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
    # Unrolled layers take long to compile, and only steps of few rows gain by it.
    is_unrolled = has_split_kernels(weights) and not (bucket.chunk or bucket.window)
    walk = Walk.begin(config, bucket, sizes, weights, bank, packed)
    forward = _enter_forward(walk, state) if bucket.forward else None
    backward = _enter_backward(walk, state.arena, sums) if bucket.window else None

    def both(carry, index):
        forward, backward = carry
        if forward is not None and backward is not None and sizes.is_fused:
            return fused_layer(walk, forward, backward, index), None
        if forward is not None:
            forward = _forward_one(walk, forward, index)
        if backward is not None:
            # Reads what the forward rows have just been written to (never the same rows): with an
            # order between the two, XLA updates pool and arena in place; without, it copies both.
            pool, kept = (state.pool, state.arena.kept) if forward is None else forward[1:]
            backward = _backward_one(walk, pool, kept, backward, index)
        return (forward, backward), None

    def forward_only(forward, index):
        return _forward_one(walk, forward, index), None

    if is_unrolled:
        assert forward is not None
        for index in range(config.num_layers):
            forward = _forward_one(walk, forward, index)
    else:
        layers = jnp.arange(bucket.tile_layers)
        (forward, backward), _ = lax.scan(both, (forward, backward), layers)
        if forward is not None and bucket.tile_layers < config.num_layers:
            rest = jnp.arange(bucket.tile_layers, config.num_layers)
            forward, _ = lax.scan(forward_only, forward, rest)
    state, sums = _leave(walk, state, forward, backward)
    return state, sums, jnp.zeros((), jnp.int32)


def _layer_weights(walk: Walk, layer: Array | int) -> LayerWeights:
    layers = walk.weights.layers
    if isinstance(layer, int):
        return {name: array[layer] for name, array in layers.items()}
    if has_split_kernels(walk.weights):
        return StackedLayer(layers, jnp.asarray(layer, jnp.int32))
    if walk.sizes.kernels == "reference" or not (can_run_triton() or can_run_llvm()):
        return {
            name: lax.dynamic_index_in_dim(array, jnp.asarray(layer), keepdims=False)
            for name, array in layers.items()
        }
    return StackedLayer(layers, jnp.asarray(layer, jnp.int32), walk.sizes.implementation)


def _enter_forward(walk: Walk, state: EngineState) -> Forward:
    tokens, num_decode = walk.batch["tokens"], walk.bucket.decode
    if num_decode:
        feed = walk.batch["feed_slots"]
        sampled = state.sample.next_tokens[jnp.maximum(feed, 0)]
        fed = jnp.where(feed >= 0, sampled, tokens[:num_decode])
        tokens = jnp.concatenate([fed, tokens[num_decode:]])
    return Forward(embed(walk.weights, tokens), state.pool, state.arena.kept)


def _forward_one(walk: Walk, forward: Forward, index: Array | int) -> Forward:
    """Takes the forward rows through one layer."""
    assert walk.adapters is not None
    config, batch, num_decode = walk.config, walk.batch, walk.bucket.decode
    layer_weights, layer = _layer_weights(walk, index), jnp.asarray(index, jnp.int32)
    implementation = walk.sizes.implementation
    plain = bank_linear(
        layer_weights, walk.bank, layer, walk.adapters, implementation, num_decode=num_decode
    )
    recorded: dict[str, Array] = {INPUT: forward.x}

    linear = recording(plain, recorded)

    positions = batch["positions"]
    q, k, v = pre_attention(config, layer_weights, linear, forward.x, positions, implementation)
    pool = write_tokens(forward.pool, layer, batch["kv_slots"], k, v, implementation)
    attn, lse = _forward_attention(walk, q, pool, layer)
    x = post_attention(config, layer_weights, linear, forward.x, attn, implementation)
    kept = forward.kept
    if walk.bucket.chunk:
        chunk = {name: rows[num_decode:] for name, rows in recorded.items()}
        assert lse is not None
        chunk |= {"attn": attn[num_decode:], "lse": lse}
        kept = keep(kept, layer, batch["chunk_arena_slots"], chunk, implementation)
    return Forward(x, pool, kept)


def _forward_attention(
    walk: Walk, q: Array, pool: KVPool, layer: Array
) -> tuple[Array, Array | None]:
    """Attention of decode rows and of chunk rows; log-sum-exp of the latter."""
    parts, lse = [], None
    batch, num_decode = walk.batch, walk.bucket.decode
    options: dict[str, Any] = {
        "sm_scale": walk.sm_scale,
        "sliding_window": walk.config.sliding_window,
        "implementation": walk.sizes.implementation,
    }
    positions = batch["positions"]
    if num_decode:
        with jax.named_scope("decode_attention"):
            table, at = batch["decode_pages"], positions[:num_decode]
            rows = q[:num_decode]
            parts.append(decode_attention(rows, pool.k, pool.v, layer, table, at, **options))
    if walk.chunk_pages is not None:
        with jax.named_scope("chunk_attention"):
            attn, lse = ragged_attention(
                q[num_decode:],
                pool.k,
                pool.v,
                layer,
                walk.chunk_pages,
                batch["chunk_segments"],
                positions[num_decode:],
                **options,
            )
            parts.append(attn)
    return (parts[0] if len(parts) == 1 else jnp.concatenate(parts)), lse


def _enter_backward(walk: Walk, arena: Arena, sums: GradSums | None) -> Backward:
    assert sums is not None, "a step with a backward tile needs gradient sums"
    slots = walk.batch["tile_arena_slots"]
    dy = jnp.where((slots >= 0)[:, None], arena.d_hidden[jnp.maximum(slots, 0)], 0.0)
    return Backward(dy, arena.kv_grads, sums)


def _backward_one(
    walk: Walk, pool: KVPool, kept: dict[str, Array], backward: Backward, index: Array
) -> Backward:
    """Takes the rows of the backward tile down through one layer."""
    assert walk.tile is not None
    layer, slot = walk.batch["tile_top"] - 1 - index, walk.batch["tile_slot"]
    dy, d_lora, kv_grads = backward_layer(
        walk.config,
        _layer_weights(walk, layer),
        read_slot_layer(walk.bank, slot, layer),
        walk.bank.scale[slot],
        pool,
        kept,
        backward.kv_grads,
        layer,
        layer % backward.kv_grads.k.shape[0],
        walk.tile,
        backward.dy,
        implementation=walk.sizes.implementation,
    )
    return Backward(dy, kv_grads, add_layer(backward.sums, layer, d_lora))


def _leave(
    walk: Walk, state: EngineState, forward: Forward | None, backward: Backward | None
) -> tuple[EngineState, GradSums | None]:
    pool, arena, sample = state
    batch, bucket, sums = walk.batch, walk.bucket, None
    if forward is not None:
        where = drop_padding(batch["sample_slots"], sample.hidden.shape[0])
        sample = sample._replace(hidden=sample.hidden.at[where].set(forward.x, mode="drop"))
        kept = forward.kept
        if bucket.chunk:
            last = {INPUT: forward.x[bucket.decode :]}
            top, slots = walk.config.num_layers, batch["chunk_arena_slots"]
            kept = keep(kept, top, slots, last, walk.sizes.implementation)
        pool, arena = forward.pool, arena._replace(kept=kept)
    if backward is not None:
        where = drop_padding(batch["tile_arena_slots"], arena.d_hidden.shape[0])
        d_hidden = arena.d_hidden.at[where].set(backward.dy, mode="drop")
        arena = arena._replace(d_hidden=d_hidden, kv_grads=backward.kv_grads)
        sums = backward.sums
    return EngineState(pool, arena, sample), sums
