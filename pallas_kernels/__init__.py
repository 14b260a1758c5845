"""Kernels for serving and token-level finetuning over paged keys and values.

Each op has an `api` (validation, dispatch), a `reference` (plain jnp with float32 accumulation: the
specification) and kernels for GPUs; most have one for the CPU, too (`llvm`). The package knows
nothing of flexjax.
"""

from pallas_kernels._llvm import can_run_llvm as can_run_llvm
from pallas_kernels._llvm import cpu_implementation as cpu_implementation
from pallas_kernels._llvm import prefers_llvm as prefers_llvm
from pallas_kernels._platform import can_run_triton as can_run_triton
from pallas_kernels.co_serve_attention.api import ChunkRows as ChunkRows
from pallas_kernels.co_serve_attention.api import CoServed as CoServed
from pallas_kernels.co_serve_attention.api import DecodeRows as DecodeRows
from pallas_kernels.co_serve_attention.api import WindowRows as WindowRows
from pallas_kernels.co_serve_attention.api import co_serve_attention as co_serve_attention
from pallas_kernels.dual_matmul.api import dual_matmul as dual_matmul
from pallas_kernels.dual_matmul.api import stacked_matmul as stacked_matmul
from pallas_kernels.dual_matmul.api import stacked_matmul_transposed as stacked_matmul_transposed
from pallas_kernels.elementwise.api import add_rms_norm as add_rms_norm
from pallas_kernels.elementwise.api import rms_norm as rms_norm
from pallas_kernels.elementwise.api import swiglu as swiglu
from pallas_kernels.grouped_lora.api import grouped_lora as grouped_lora
from pallas_kernels.grouped_lora.api import grouped_lora_backward as grouped_lora_backward
from pallas_kernels.grouped_lora.api import grouped_lora_many as grouped_lora_many
from pallas_kernels.grouped_lora.groups import RowGroups as RowGroups
from pallas_kernels.grouped_lora.groups import group_rows as group_rows
from pallas_kernels.linear_cross_entropy.api import linear_cross_entropy as linear_cross_entropy
from pallas_kernels.paged_attention.api import PageList as PageList
from pallas_kernels.paged_attention.api import decode_attention as decode_attention
from pallas_kernels.paged_attention.api import ragged_attention as ragged_attention
from pallas_kernels.slot_rows.api import load_rows as load_rows
from pallas_kernels.slot_rows.api import store_rows as store_rows
from pallas_kernels.slot_rows.api import take_rows as take_rows
from pallas_kernels.window_attention_backward.api import (
    window_attention_backward as window_attention_backward,
)
