"""Token-level backpropagation as a standalone function, for research code.

Runs the same layer functions as the co-serving step, one window after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from flexjax.autodiff.arena import INPUT, Arena, init_arena, keep
from flexjax.autodiff.loss import loss_head
from flexjax.autodiff.tile import TileRows, backward_layer, sm_scale
from flexjax.cache.pages import KVPool, init_pool, write_tokens
from flexjax.config import LORA_TARGETS
from flexjax.lora.bank import LoraTree
from flexjax.lora.linear import tile_linear
from flexjax.model_config import ModelConfig
from flexjax.models.decoder import Decoder, LoraParams
from flexjax.models.layers import embed, post_attention, pre_attention, recording
from flexjax.models.weights import DecoderWeights
from pallas_kernels import PageList, can_run_triton, ragged_attention

_PAGE_SIZE = 16


def _implementation() -> str | None:
    """Of the ops: not the CPU's kernels, which every window's length would compile anew."""
    return None if can_run_triton() else "reference"


class _Problem(NamedTuple):
    """What stays the same over all windows."""

    config: ModelConfig
    weights: DecoderWeights
    lora: LoraTree
    scale: Float[Array, ""]


def windowed_value_and_grad(
    model: Decoder | tuple[ModelConfig, DecoderWeights],
    lora: LoraParams,
    tokens: Int[Array, "*B S"],
    targets: Int[Array, "*B S"],
    *,
    window: int | Sequence[int],
    lora_scale: float | Array = 1.0,
    tile_order: str = "window_major",
    saved_activations: str = "inputs",
    reduction: str = "sum",
) -> tuple[Float[Array, ""], dict[str, dict[str, Array]]]:
    """Loss and its gradient with respect to a LoRA, window by window.

    Equal to `jax.value_and_grad` of the whole sequences' loss for every split (FlexLLM's
    token-level finetuning, arXiv 2402.18789, section 6.1), with attention maps and MLP activations
    of one window at a time. Differentiates nothing but `lora`. May be called under `jax.jit`, with
    every keyword but `lora_scale` static.

    Args:
      model: A decoder, or its configuration and weights.
      lora: {"q_proj": {"A": [L, in, r], "B": [L, r, out]}, ...}; any of the seven linears.
      tokens: Token ids of one sequence or several of equal length, all valid.
      targets: Token that each position must predict, negative where none counts. Shift them over
        the whole sequence: a window's last row predicts the next window's first token.
      window: Tokens of a window, or the sizes of all windows, which must add up to the number of
        tokens. Windows cut the concatenation of all sequences, wherever their borders fall.
      lora_scale: Multiplies x A B.
      tile_order: "window_major" or "layer_major"; the result is the same, the memory differs.
      saved_activations: "inputs" or "full"; see `EngineConfig.saved_activations`.
      reduction: "sum" over targets, or "mean".

    Returns:
      The loss in nats, float32, and gradients shaped like `lora`, in its dtypes.

    Raises:
      ValueError: If the sizes do not add up, shapes differ, or an option is unknown.
    """
    config, weights = (model.config, model.weights()) if isinstance(model, Decoder) else model
    if tokens.shape != targets.shape:
        raise ValueError(f"`targets` must have shape {tokens.shape}; got {targets.shape}.")
    if tile_order not in ("window_major", "layer_major"):
        raise ValueError(
            f"`tile_order` must be 'window_major' or 'layer_major'; got {tile_order!r}."
        )
    if reduction not in ("sum", "mean"):
        raise ValueError(f"`reduction` must be 'sum' or 'mean'; got {reduction!r}.")
    unknown = set(lora) - set(LORA_TARGETS)
    if unknown:
        raise ValueError(f"`lora` must name linears out of {LORA_TARGETS}; got {sorted(unknown)}.")
    seq_len = tokens.shape[-1]
    num_tokens = int(np.prod(tokens.shape))
    windows = _windows(num_tokens, seq_len, window)
    problem = _Problem(
        config, weights, _full_lora(config, lora), jnp.asarray(lora_scale, jnp.float32)
    )

    flat_tokens, flat_targets = tokens.reshape(-1), targets.reshape(-1)
    pages = (num_tokens // seq_len) * -(-seq_len // _PAGE_SIZE)
    dtype = str(weights.embed.dtype)
    pool = init_pool(config, pages, _PAGE_SIZE, dtype)
    arena = init_arena(
        config,
        num_pages=pages,
        page_size=_PAGE_SIZE,
        dtype=dtype,
        policy=saved_activations,
        acc_layers=config.num_layers if tile_order == "window_major" else 1,
    )
    loss = jnp.zeros((), jnp.float32)
    for start, rows in windows:
        part = slice(start, start + rows.slots.shape[0])
        pool, arena = _forward_window(problem, pool, arena, rows, flat_tokens[part])
        window_loss, arena = loss_head(
            config,
            weights,
            arena,
            rows.slots,
            flat_targets[part],
            implementation=_implementation(),
        )
        loss = loss + window_loss
    backward = _window_major if tile_order == "window_major" else _layer_major
    d_lora = backward(problem, pool, arena, [rows for _, rows in reversed(windows)])
    factor = jnp.float32(1.0)
    if reduction == "mean":
        factor = 1.0 / jnp.maximum((flat_targets >= 0).sum(), 1).astype(jnp.float32)
    grads = {
        name: {
            "A": (d_lora.a[name] * factor).astype(pair["A"].dtype),
            "B": (d_lora.b[name] * factor).astype(pair["B"].dtype),
        }
        for name, pair in lora.items()
    }
    return loss * factor, grads


def _windows(
    num_tokens: int, seq_len: int, window: int | Sequence[int]
) -> list[tuple[int, TileRows]]:
    """Cuts the flat stream of tokens; each window with the pages that its rows may see."""
    if isinstance(window, int):
        if window < 1:
            raise ValueError(f"`window` must be positive; got {window}.")
        sizes = [min(window, num_tokens - s) for s in range(0, num_tokens, window)]
    else:
        sizes = list(window)
        if sum(sizes) != num_tokens or min(sizes) < 1:
            raise ValueError(
                f"`window` sizes must be positive and add up to {num_tokens}; got {sizes}."
            )
    pages_per_seq = -(-seq_len // _PAGE_SIZE)
    windows, start = [], 0
    for size in sizes:
        index = np.arange(start, start + size)
        segments, positions = index // seq_len, index % seq_len
        slots = segments * pages_per_seq * _PAGE_SIZE + positions
        seen = [
            (segment * pages_per_seq + page, segment, page * _PAGE_SIZE)
            for segment in np.unique(segments)
            for page in range(int(positions[segments == segment].max()) // _PAGE_SIZE + 1)
        ]
        pages, owners, starts = (
            jnp.asarray(column, jnp.int32) for column in zip(*seen, strict=True)
        )
        rows = TileRows(
            positions=jnp.asarray(positions, jnp.int32),
            segments=jnp.asarray(segments, jnp.int32),
            slots=jnp.asarray(slots, jnp.int32),
            page_list=PageList(pages, owners, starts, jnp.int32(len(seen))),
            acc_pages=pages,
        )
        windows.append((start, rows))
        start += size
    return windows


def _full_lora(config: ModelConfig, lora: LoraParams) -> LoraTree:
    """Completes the adapter with zeros, float32; ranks may differ between linears."""
    a, b = {}, {}
    for name, (num_in, num_out) in config.projection_dims().items():
        if name in lora:
            a[name] = jnp.asarray(lora[name]["A"], jnp.float32)
            b[name] = jnp.asarray(lora[name]["B"], jnp.float32)
        else:
            a[name] = jnp.zeros((config.num_layers, num_in, 1))
            b[name] = jnp.zeros((config.num_layers, 1, num_out))
    return LoraTree(a, b)


def _forward_window(
    problem: _Problem, pool: KVPool, arena: Arena, rows: TileRows, tokens: Array
) -> tuple[KVPool, Arena]:
    """Takes one window through all layers; keeps what the backward pass reads."""
    config = problem.config

    def body(carry, inputs):
        x, pool, kept = carry
        layer, layer_weights, layer_lora = inputs
        recorded = {INPUT: x}
        plain = tile_linear(layer_weights, layer_lora, problem.scale, {}, _implementation())
        linear = recording(plain, recorded)

        q, k, v = pre_attention(config, layer_weights, linear, x, rows.positions)
        pool = write_tokens(pool, layer, rows.slots, k, v)
        recorded["attn"], recorded["lse"] = ragged_attention(
            q,
            pool.k,
            pool.v,
            layer,
            rows.page_list,
            rows.segments,
            rows.positions,
            sm_scale=sm_scale(config),
            sliding_window=config.sliding_window,
            implementation=_implementation(),
        )
        y = post_attention(config, layer_weights, linear, x, recorded["attn"])
        return (y, pool, keep(kept, layer, rows.slots, recorded)), None

    layers = jnp.arange(config.num_layers)
    init = (embed(problem.weights, tokens), pool, arena.kept)
    (x, pool, kept), _ = lax.scan(body, init, (layers, problem.weights.layers, problem.lora))
    kept = keep(kept, config.num_layers, rows.slots, {INPUT: x})
    return pool, arena._replace(kept=kept)


def _window_major(
    problem: _Problem, pool: KVPool, arena: Arena, windows: list[TileRows]
) -> LoraTree:
    """Each window through all layers, last window first."""
    config = problem.config
    total = jax.tree.map(jnp.zeros_like, problem.lora)
    kv_grads = arena.kv_grads
    for rows in windows:

        def body(carry, inputs, rows=rows):
            dy, kv_grads = carry
            layer, layer_weights, layer_lora = inputs
            dy, d_lora, kv_grads = backward_layer(
                config,
                layer_weights,
                layer_lora,
                problem.scale,
                pool,
                arena.kept,
                kv_grads,
                layer,
                layer,
                rows,
                dy,
                implementation=_implementation(),
            )
            return (dy, kv_grads), d_lora

        layers = jnp.arange(config.num_layers)
        (_, kv_grads), d_lora = lax.scan(
            body,
            (arena.d_hidden[rows.slots], kv_grads),
            (layers, problem.weights.layers, problem.lora),
            reverse=True,
        )
        total = jax.tree.map(jnp.add, total, d_lora)
    return total


def _layer_major(
    problem: _Problem, pool: KVPool, arena: Arena, windows: list[TileRows]
) -> LoraTree:
    """All windows of a layer, last window first, then the layer below."""
    config = problem.config

    def body(carry, inputs):
        d_hidden, kv_grads = carry
        layer, layer_weights, layer_lora = inputs
        total = jax.tree.map(jnp.zeros_like, layer_lora)
        for rows in windows:
            dy, d_lora, kv_grads = backward_layer(
                config,
                layer_weights,
                layer_lora,
                problem.scale,
                pool,
                arena.kept,
                kv_grads,
                layer,
                jnp.int32(0),
                rows,
                d_hidden[rows.slots],
                implementation=_implementation(),
            )
            d_hidden = d_hidden.at[rows.slots].set(dy)
            total = jax.tree.map(jnp.add, total, d_lora)
        return (d_hidden, kv_grads), total

    layers = jnp.arange(config.num_layers)
    _, d_lora = lax.scan(
        body,
        (arena.d_hidden, arena.kv_grads),
        (layers, problem.weights.layers, problem.lora),
        reverse=True,
    )
    return d_lora
