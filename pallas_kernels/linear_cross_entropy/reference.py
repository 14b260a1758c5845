"""lm_head and summed token loss in plain jnp, a block of rows at a time."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

_BLOCK_ROWS = 256


def linear_cross_entropy(
    hidden: Float[Array, "W D"],
    lm_head: Float[Array, "_ _"],
    targets: Int[Array, "W"],
    *,
    transposed_head: bool = False,
    block_rows: int = _BLOCK_ROWS,
) -> tuple[Float[Array, ""], Float[Array, "W D"]]:
    """Summed loss and its gradient at the hidden rows; see `api.linear_cross_entropy`."""
    num_rows, dim = hidden.shape
    block_rows = min(block_rows, num_rows)
    padding = -num_rows % block_rows
    rows = jnp.pad(hidden, ((0, padding), (0, 0))).reshape(-1, block_rows, dim)
    wanted = jnp.pad(targets, (0, padding), constant_values=-1).reshape(-1, block_rows)

    def block(loss_sum, inputs):
        x, target = inputs
        logits = _product(x, lm_head, transposed_head)
        maximum = lax.stop_gradient(logits.max(-1, keepdims=True))
        exps = jnp.exp(logits - maximum)
        total = exps.sum(-1, keepdims=True)
        is_target = (jnp.arange(logits.shape[1])[None, :] == target[:, None]) & (target >= 0)[
            :, None
        ]
        picked = jnp.where(is_target, logits, 0.0).sum(-1)
        lse = (maximum + jnp.log(total))[:, 0]
        loss = jnp.where(target >= 0, lse - picked, 0.0).sum()
        d_logits = jnp.where((target >= 0)[:, None], exps / total - is_target, 0.0)
        d_logits = d_logits.astype(lm_head.dtype)
        return loss_sum + loss, _product(d_logits, lm_head, not transposed_head)

    loss_sum, d_hidden = lax.scan(block, jnp.zeros((), jnp.float32), (rows, wanted))
    return loss_sum, d_hidden.reshape(-1, dim)[:num_rows]


def _product(x: Array, kernel: Array, transposed: bool) -> Array:
    """Returns x @ kernel, or x @ kernel.T if `transposed`, in float32."""
    dims = (((1,), (1 if transposed else 0,)), ((), ()))
    return lax.dot_general(x, kernel, dims, preferred_element_type=jnp.float32)
