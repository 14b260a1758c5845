"""Bytes and FLOPs that one step must spend, counted from its shapes; the floor of its time."""

from __future__ import annotations

from typing import Any

from flexjax.autodiff.arena import kept_dim
from flexjax.autodiff.kept import kept_names
from flexjax.layout import Bucket
from flexjax.model_config import ModelConfig
from pallas_kernels.roofline import Cost

_ITEM = 2
"""Bytes of a bfloat16: of weights, pages and activations."""


def step_cost(
    model: ModelConfig,
    bucket: Bucket,
    *,
    context_len: int,
    saved_activations: str = "full",
    lora_rank: int = 0,
) -> Cost:
    """Counts a step whose rows are all in use.

    Weights are read once for the forward rows and once for the backward tile: the two are at
    different layers. Sampling and loss heads are not counted; see `program_cost`.

    Args:
      model: Architecture.
      bucket: Row counts.
      context_len: Keys that each row sees. Every decode row is a sequence of its own; chunk rows
        belong to one sequence, and so do the backward rows.
      saved_activations: As in `EngineConfig`: with "inputs" the backward pass repeats the layer's
        products.
      lora_rank: Rank of the adapters of all rows; 0 for none.
    """
    total = Cost(0.0, 0.0)
    if bucket.forward:
        total += _forward_layer(model, bucket, context_len, lora_rank) * model.num_layers
    if bucket.window:
        layer = _backward_layer(model, bucket.window, context_len, saved_activations, lora_rank)
        total += layer * bucket.tile_layers
    return total


def head_cost(model: ModelConfig, rows: int) -> Cost:
    """Counts a head over the vocabulary: its product, and its weights read once."""
    size = model.vocab_size * model.hidden_size
    return Cost(2.0 * rows * size, float(_ITEM * size))


def program_cost(model: ModelConfig, bucket: Bucket, **options: Any) -> Cost:
    """Counts all that a bucket's program does: decode rows alone are sampled in it.

    Args:
      model: Architecture.
      bucket: Row counts.
      **options: Of `step_cost`.
    """
    cost = step_cost(model, bucket, **options)
    return cost + head_cost(model, bucket.decode) if bucket.only_decodes else cost


def _linears(model: ModelConfig, rank: int) -> tuple[int, int]:
    """Parameters of a layer's linears, and of one adapter of them."""
    dims = model.projection_dims().values()
    return sum(i * o for i, o in dims), rank * sum(i + o for i, o in dims)


def _kv_bytes(model: ModelConfig) -> int:
    """Of a token's keys and values in one layer."""
    return 2 * model.num_kv_heads * model.head_dim * _ITEM


def _keys(model: ModelConfig, context_len: int) -> int:
    return min(context_len, model.sliding_window or context_len)


def _forward_layer(model: ModelConfig, bucket: Bucket, context_len: int, rank: int) -> Cost:
    params, lora = _linears(model, rank)
    rows, keys = bucket.forward, _keys(model, context_len)
    products = 2 * rows * (params + lora)
    # Scores, and their product with the values.
    attention = 4 * rows * keys * model.num_heads * model.head_dim
    sequences = bucket.decode + (1 if bucket.chunk else 0)
    kv = (sequences * keys + rows) * _kv_bytes(model)
    return Cost(products + attention, (params + lora) * _ITEM + kv)


def _backward_layer(
    model: ModelConfig, rows: int, context_len: int, saved_activations: str, rank: int
) -> Cost:
    params, lora = _linears(model, rank)
    keys = _keys(model, context_len)
    # Gradients of the inputs; those of A and B beside the adapter's own product and its gradient.
    products = 2 * rows * params + 6 * rows * lora
    if saved_activations == "inputs":
        products += 2 * rows * (params + lora)
    # Scores again, d_out V^T, and the gradients of queries, keys and values.
    attention = 10 * rows * keys * model.num_heads * model.head_dim
    # The float32 accumulators of keys and values are read and written.
    kv = keys * _kv_bytes(model) * (1 + 2 * 4 // _ITEM)
    names = ("x", *kept_names(model, saved_activations))
    kept = rows * sum(kept_dim(model, name) for name in names) * _ITEM
    lora_sums = 2 * 4 * lora
    return Cost(products + attention, (params + lora) * _ITEM + kv + kept + lora_sums)
