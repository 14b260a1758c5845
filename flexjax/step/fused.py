"""One layer of forward rows beside one layer of the backward tile, sharing launches.

The same mathematics as the two sides apart (`step.co_serve`, `autodiff.tile`), with the linears'
products and the attention taken out of the layer's halves, so that work of both sides which is
ready at the same time goes into one launch:

    forward rows, layer i        backward tile, layer j
    X Wq, X Wk, X Wv        |    dY Wdown^T
                            |    dGate Wgate^T + dUp Wup^T;  dMid Wo^T
    attention               |    attention backward
    attn Wo                 |    dQ Wq^T + dK Wk^T + dV Wv^T
    gate, up, down          |

The tile reads what the forward pass kept (`saved_activations="full"`) and repeats no product.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from flexjax.autodiff.arena import INPUT, KVGrads, keep, recall
from flexjax.autodiff.tile import TileRows, take_tokens
from flexjax.cache.pages import KVPool, write_tokens
from flexjax.lora.bank import AdapterBank, LoraTree, read_slot_layer
from flexjax.lora.linear import AdapterRows, linear_gradients
from flexjax.model_config import ModelConfig
from flexjax.models.layers import LayerWeights, add_bias, split_heads
from flexjax.step.rows import Backward, Forward, Walk, add_layer
from pallas_kernels import (
    ChunkRows,
    DecodeRows,
    WindowRows,
    co_serve_attention,
    dual_matmul,
    grouped_lora_many,
    rms_norm,
    stacked_matmul,
    stacked_matmul_transposed,
    swiglu,
)

_QKV = ("q_proj", "k_proj", "v_proj")
_GATE_UP = ("gate_proj", "up_proj")


class _Side:
    """What one side of a fused layer knows: its layer's small arrays, and the stacked kernels."""

    def __init__(self, stacks: Mapping[str, Array], layer: Int[Array, ""]):
        self.layer = layer
        self.small: LayerWeights = {
            name: lax.dynamic_index_in_dim(stack, layer, keepdims=False)
            for name, stack in stacks.items()
            if not name.endswith(".kernel")
        }
        self._stacks = stacks

    def kernels(self, names: Sequence[str]) -> tuple[Array, ...]:
        return tuple(self._stacks[f"{name}.kernel"] for name in names)


class _ForwardSide(_Side):
    """Forward rows: turns plain products into the outputs of linears."""

    def __init__(self, stacks, layer, bank: AdapterBank, rows: AdapterRows, implementation):
        super().__init__(stacks, layer)
        self._bank, self._rows, self._implementation = bank, rows, implementation
        self.recorded: dict[str, Array] = {}

    def outputs(self, names: Sequence[str], x: Array, accs: Sequence[Array]) -> list[Array]:
        """Adds biases and adapters, casts, and notes what may be kept."""
        biases = [self.small.get(f"{name}.bias") for name in names]
        accs = [add_bias(acc, bias) for acc, bias in zip(accs, biases, strict=True)]
        bank, rows = self._bank, self._rows
        summed = grouped_lora_many(
            x,
            accs,
            [bank.a[name] for name in names],
            [bank.b[name] for name in names],
            bank.scale,
            self.layer,
            rows.slots,
            rows.active,
            rows.num_active,
            groups=rows.groups,
            implementation=self._implementation,
        )
        found = [y.astype(x.dtype) for y in summed]
        self.recorded |= dict(zip(names, found, strict=True))
        return found


class _TileSide(_Side):
    """The backward tile: gathers the adapter's gradients."""

    def __init__(self, stacks, layer, bank: AdapterBank, slot: Array):
        super().__init__(stacks, layer)
        self._lora = read_slot_layer(bank, slot, layer)
        self._scale = bank.scale[slot]
        self.d_lora = LoraTree({}, {})

    def through_adapters(self, names: Sequence[str], x: Array, d_ys: Sequence[Array]) -> Array:
        """Gradient at x through the adapters of linears that read x, float32."""
        total = None
        for name, d_y in zip(names, d_ys, strict=True):
            a, b = self._lora.a[name], self._lora.b[name]
            d_x, self.d_lora.a[name], self.d_lora.b[name] = linear_gradients(
                x, d_y, a, b, self._scale
            )
            total = d_x if total is None else total + d_x
        assert total is not None
        return total


def fused_layer(
    walk: Walk, forward: Forward, backward: Backward, index: Int[Array, ""]
) -> tuple[Forward, Backward]:
    """Takes the forward rows up through one layer and the tile's rows down through another.

    Args:
      walk: What the step's layers share. Both sides have rows.
      forward: Forward rows.
      backward: Backward rows.
      index: Layers that both sides have done.
    """
    assert walk.adapters is not None and walk.tile is not None
    config, batch, rows = walk.config, walk.batch, walk.tile
    implementation = walk.sizes.implementation
    stacks, bank = walk.weights.layers, walk.bank
    up = _ForwardSide(stacks, index, bank, walk.adapters, implementation)
    down = _TileSide(stacks, batch["tile_top"] - 1 - index, bank, batch["tile_slot"])
    dtype = forward.x.dtype

    # The tile's own part until its first product.
    saved = recall(forward.kept, down.layer, rows.slots)
    x_tile = saved[INPUT]
    mid_tile = x_tile + saved["o_proj"]
    hidden_tile, mid_norm_vjp = jax.vjp(_norm(config, down.small, "post_attention_norm"), mid_tile)
    gated_tile, gate_vjp = jax.vjp(_gate, saved["gate_proj"], saved["up_proj"])
    dy = backward.dy.astype(dtype)

    # Launch 1: q, k and v of the forward rows, dY Wdown^T of the tile.
    hidden = _norm(config, up.small, "input_norm")(forward.x)
    accs, d_gated = dual_matmul(
        hidden,
        up.kernels(_QKV),
        up.layer,
        (dy,),
        down.kernels(("down_proj",)),
        down.layer,
        d_acc=down.through_adapters(("down_proj",), gated_tile, (dy,)),
        implementation=implementation,
    )
    assert d_gated is not None
    q, k, v = up.outputs(_QKV, hidden, accs)
    q, k, v = split_heads(config, up.small, q, k, v, batch["positions"])
    pool = write_tokens(forward.pool, up.layer, batch["kv_slots"], k, v)

    # The tile alone, down to the gradient of its attention output.
    d_gate_up = gate_vjp(d_gated.astype(dtype))
    d_hidden = stacked_matmul_transposed(
        d_gate_up,
        down.kernels(_GATE_UP),
        down.layer,
        acc=down.through_adapters(_GATE_UP, hidden_tile, d_gate_up),
        implementation=implementation,
    )
    (d_mid,) = mid_norm_vjp(d_hidden.astype(dtype))
    d_mid = backward.dy + d_mid.astype(jnp.float32)
    d_out = d_mid.astype(dtype)
    d_attn = stacked_matmul_transposed(
        (d_out,),
        down.kernels(("o_proj",)),
        down.layer,
        acc=down.through_adapters(("o_proj",), saved["attn"], (d_out,)),
        implementation=implementation,
    )

    # Launch 2: attention of both.
    tile_heads, heads_vjp = _tile_heads(config, down.small, saved, rows)
    tile = _TileAttention(tile_heads, saved["attn"], saved["lse"], d_attn, down.layer)
    attn, lse, dq, kv_grads = _attention(walk, q, pool, up.layer, tile, backward.kv_grads)
    acc_layer = down.layer % kv_grads.k.shape[0]
    kv_grads, (dk, dv) = take_tokens(kv_grads, acc_layer, rows.slots)
    d_qkv = heads_vjp((dq.astype(dtype), dk.astype(dtype), dv.astype(dtype)))

    # Launch 3: the output projection of the forward rows, dQ, dK and dV of the tile.
    hidden_tile, norm_vjp = jax.vjp(_norm(config, down.small, "input_norm"), x_tile)
    flat = attn.reshape(attn.shape[0], -1)
    accs, d_hidden = dual_matmul(
        flat,
        up.kernels(("o_proj",)),
        up.layer,
        d_qkv,
        down.kernels(_QKV),
        down.layer,
        d_acc=down.through_adapters(_QKV, hidden_tile, d_qkv),
        implementation=implementation,
    )
    assert d_hidden is not None
    (d_x,) = norm_vjp(d_hidden.astype(dtype))
    sums = add_layer(backward.sums, down.layer, down.d_lora)
    backward = Backward(d_mid + d_x.astype(jnp.float32), kv_grads, sums)

    # The forward rows alone, to the end of the layer.
    (projected,) = up.outputs(("o_proj",), flat, accs)
    mid = forward.x + projected
    hidden = _norm(config, up.small, "post_attention_norm")(mid)
    accs = stacked_matmul(hidden, up.kernels(_GATE_UP), up.layer, implementation=implementation)
    gated = _gate(*up.outputs(_GATE_UP, hidden, accs))
    accs = stacked_matmul(
        gated, up.kernels(("down_proj",)), up.layer, implementation=implementation
    )
    (out,) = up.outputs(("down_proj",), gated, accs)
    kept = forward.kept
    if walk.bucket.chunk:
        assert lse is not None
        recorded = {INPUT: forward.x, **up.recorded, "attn": flat}
        chunk = {name: value[walk.bucket.decode :] for name, value in recorded.items()}
        kept = keep(kept, up.layer, batch["chunk_arena_slots"], {**chunk, "lse": lse})
    return Forward(mid + out, pool, kept), backward


def _norm(config: ModelConfig, small: LayerWeights, name: str) -> Callable[[Array], Array]:
    eps = config.rms_norm_eps
    return lambda x: rms_norm(x, small[name], eps, implementation="reference")


def _gate(gate: Array, up: Array) -> Array:
    return swiglu(gate, up, implementation="reference")


def _tile_heads(config: ModelConfig, small: LayerWeights, saved: dict[str, Array], rows: TileRows):
    """The tile's q (k and v come from the pool), and the vjp from heads to linears' outputs."""
    width = config.num_kv_heads * config.head_dim
    unread = jnp.zeros((saved["q_proj"].shape[0], width), saved["q_proj"].dtype)

    def heads(q: Array, k: Array, v: Array) -> tuple[Array, Array, Array]:
        return split_heads(config, small, q, k, v, rows.positions)

    # Rotary embeddings are linear: only head norms read the value of k, and then it was kept.
    inputs = (saved["q_proj"], saved.get("k_proj", unread), saved.get("v_proj", unread))
    (q, _, _), vjp = jax.vjp(heads, *inputs)
    return q, vjp


class _TileAttention(NamedTuple):
    """What the attention backward of the tile reads, beside its rows' places."""

    q: Float[Array, "W N H"]
    out: Float[Array, "W _"]
    lse: Float[Array, "W N"]
    d_out: Float[Array, "W _"]
    layer: Int[Array, ""]


def _attention(
    walk: Walk,
    q: Float[Array, "T N H"],
    pool: KVPool,
    layer: Int[Array, ""],
    tile: _TileAttention,
    kv_grads: KVGrads,
) -> tuple[Float[Array, "T N H"], Array | None, Float[Array, "W N H"], KVGrads]:
    """Attention of both sides in one launch; log-sum-exp of the chunk rows."""
    assert walk.tile is not None
    batch, rows, num_decode = walk.batch, walk.tile, walk.bucket.decode
    positions, heads = batch["positions"], tile.q.shape
    decode = chunk = None
    if num_decode:
        decode = DecodeRows(q[:num_decode], batch["decode_pages"], positions[:num_decode])
    if walk.chunk_pages is not None:
        chunk_positions = positions[num_decode:]
        segments = batch["chunk_segments"]
        chunk = ChunkRows(q[num_decode:], walk.chunk_pages, segments, chunk_positions)
    window = WindowRows(
        tile.q,
        tile.out.reshape(heads),
        tile.lse,
        tile.d_out.astype(tile.q.dtype).reshape(heads),
        tile.layer,
        rows.page_list,
        rows.segments,
        rows.positions,
        kv_grads.k,
        kv_grads.v,
        tile.layer % kv_grads.k.shape[0],
        rows.acc_pages,
    )
    served = co_serve_attention(
        pool.k,
        pool.v,
        layer,
        decode,
        chunk,
        window,
        sm_scale=walk.sm_scale,
        sliding_window=walk.config.sliding_window,
        implementation=walk.sizes.implementation,
    )
    outs = [out for out in (served.decode_out, served.chunk_out) if out is not None]
    assert served.dq is not None and served.dk_acc is not None and served.dv_acc is not None
    kv_grads = KVGrads(served.dk_acc, served.dv_acc)
    return jnp.concatenate(outs), served.chunk_lse, served.dq, kv_grads
