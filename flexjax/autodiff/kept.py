"""Which activations the backward pass of a layer reads: derived from its jaxpr, not listed by hand.

The candidates are the outputs of the seven linears, the attention output and its log-sum-exp. The
backward pass of one layer is traced with all of them given, and those that the trace never reads
are dropped (the idea of FlexLLM's graph pruning, arXiv 2402.18789, section 5: with a frozen base
most activations of an ordinary backward pass are never needed).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.extend import core as jax_core
from jaxtyping import Array

from flexjax.config import LORA_TARGETS
from flexjax.lora.bank import LoraTree
from flexjax.lora.linear import tile_linear
from flexjax.model_config import ModelConfig
from flexjax.models.layers import post_attention, pre_attention
from flexjax.models.weights import weight_specs

_ATTENTION = ("attn", "lse")
_CALLS = {"jit": "jaxpr", "custom_vjp_call": "call_jaxpr", "custom_jvp_call": "call_jaxpr"}


@functools.cache
def kept_names(config: ModelConfig, policy: str) -> tuple[str, ...]:
    """Names of what the forward pass keeps per layer, beside the layer's input, K and V.

    Args:
      config: Architecture.
      policy: "inputs" keeps nothing more and recomputes; "full" keeps whatever the backward pass
        reads, so that no matrix product of the forward pass is repeated.

    Raises:
      ValueError: If `policy` is neither.
    """
    if policy == "inputs":
        return ()
    if policy != "full":
        raise ValueError(f"`policy` must be 'inputs' or 'full'; got {policy!r}.")
    candidates = _candidates(config)
    used = _used_inputs(functools.partial(_layer_backward, config), candidates)
    return tuple(name for name in (*LORA_TARGETS, *_ATTENTION) if name in used)


def _candidates(config: ModelConfig) -> dict[str, jax.ShapeDtypeStruct]:
    rows = 2
    shapes = {name: (rows, dims[1]) for name, dims in config.projection_dims().items()}
    shapes["attn"] = (rows, config.num_heads * config.head_dim)
    shapes["lse"] = (rows, config.num_heads)
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}


def _layer_backward(config: ModelConfig, kept: dict[str, Array]) -> list[Array]:
    """The backward pass of one layer as the tile runs it, attention's own reads included."""
    rows = kept["lse"].shape[0]
    weights = {
        name: jnp.ones(spec.shape[1:], jnp.float32)  # type: ignore[attr-defined]
        for name, spec in weight_specs(config).layers.items()
    }
    dims = config.projection_dims()
    lora = LoraTree(
        a={name: jnp.ones((dims[name][0], 1)) for name in LORA_TARGETS},
        b={name: jnp.ones((1, dims[name][1])) for name in LORA_TARGETS},
    )
    x = jnp.ones((rows, config.hidden_size))
    positions = jnp.arange(rows)
    attn = kept["attn"].reshape(rows, config.num_heads, config.head_dim)

    def before(x: Array, lora: LoraTree) -> tuple[Array, Array, Array]:
        linear = tile_linear(weights, lora, jnp.float32(1), kept, "reference")
        return pre_attention(config, weights, linear, x, positions)

    def after(x: Array, attn: Array, lora: LoraTree) -> Array:
        linear = tile_linear(weights, lora, jnp.float32(1), kept, "reference")
        return post_attention(config, weights, linear, x, attn)

    (q, k, v), before_vjp = jax.vjp(before, x, lora)
    _, after_vjp = jax.vjp(after, x, attn, lora)
    d_x, d_attn, d_lora = after_vjp(jnp.ones_like(x))
    # The attention backward reads q, the output, its log-sum-exp and d_attn; K and V come from the
    # pool, so the values of k and v computed here are not read.
    dq = q * d_attn * attn * kept["lse"][:, :, None]
    return jax.tree.leaves((d_x, d_lora, before_vjp((dq, jnp.ones_like(k), jnp.ones_like(v)))))


def _used_inputs(function, inputs: dict[str, jax.ShapeDtypeStruct]) -> set[str]:
    """Names of the inputs that some output of `function` depends on."""
    jaxpr = jax.make_jaxpr(function)(inputs).jaxpr
    names = sorted(inputs)  # dicts flatten in key order
    used = _used_by(jaxpr, [True] * len(jaxpr.outvars))
    return {name for name, is_used in zip(names, used, strict=True) if is_used}


def _used_by(jaxpr: jax_core.Jaxpr, are_wanted: Sequence[bool]) -> list[bool]:
    """Which inputs of a jaxpr the wanted ones of its outputs depend on."""
    wanted = zip(jaxpr.outvars, are_wanted, strict=True)
    needed = {v for v, is_wanted in wanted if is_wanted and not _is_literal(v)}
    for equation in reversed(jaxpr.eqns):
        outputs = [v in needed for v in equation.outvars]
        if any(outputs):
            called = _called(equation)
            used = [True] * len(equation.invars) if called is None else _used_by(called, outputs)
            pairs = zip(equation.invars, used, strict=True)
            needed.update(v for v, is_used in pairs if is_used and not _is_literal(v))
    return [v in needed for v in jaxpr.invars]


def _called(equation: jax_core.JaxprEqn) -> jax_core.Jaxpr | None:
    """What an equation calls once with its inputs; None for those that are no mere calls."""
    name = _CALLS.get(equation.primitive.name)
    if name is None:
        return None
    found = equation.params[name]
    return getattr(found, "jaxpr", found)


def _is_literal(variable) -> bool:
    return isinstance(variable, jax_core.Literal)
