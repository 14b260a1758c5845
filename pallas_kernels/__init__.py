"""Kernels for serving and token-level finetuning over paged keys and values.

Each op has an `api` (validation, dispatch) and a `reference` (plain jnp with float32 accumulation:
the specification and the CPU path). The package knows nothing of flexjax.
"""

from pallas_kernels.grouped_lora.api import grouped_lora as grouped_lora
from pallas_kernels.linear_cross_entropy.api import linear_cross_entropy as linear_cross_entropy
from pallas_kernels.paged_attention.api import PageList as PageList
from pallas_kernels.paged_attention.api import decode_attention as decode_attention
from pallas_kernels.paged_attention.api import ragged_attention as ragged_attention
from pallas_kernels.window_attention_backward.api import (
    window_attention_backward as window_attention_backward,
)
