"""The grouped LoRA kernels in Triton; `triton.py` launches them. Importing this needs Triton.

The kernels use only what `triton.language.core` defines, which the interpreter can run, too.
Offsets into a bank of adapters may pass 2^31: those of a slot's layer are 64 bits wide. Those into
rows are 32 bits wide, which takes fewer registers.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def grouped_lora_shrink(
    layer_ptr,  # [1] int32
    rows_ptr,  # [blocks, BLOCK_ROWS] int32
    slots_ptr,  # [blocks] int32
    ranks_ptr,  # [A] int32; read if HAS_RANKS
    x_ptr,  # [T, COLUMNS]
    w0_ptr,  # [A, LAYERS, COLUMNS, RANK], or [A, LAYERS, RANK, COLUMNS] if TRANSPOSED
    w1_ptr,  # the same; read if NUM_LINEARS > 1
    w2_ptr,  # the same; read if NUM_LINEARS > 2
    out_ptr,  # [NUM_LINEARS, splits, blocks, BLOCK_ROWS, PADDED_RANK] float32
    NUM_LINEARS: tl.constexpr,
    LAYERS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
    PADDED_RANK: tl.constexpr,
    HAS_RANKS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Partial bottlenecks of one block of rows over one split of the columns."""
    block = tl.program_id(0)
    split = tl.program_id(1)
    slot = tl.load(slots_ptr + block)
    if slot < 0:
        return
    weights = (slot.to(tl.int64) * LAYERS + tl.load(layer_ptr)) * (COLUMNS * RANK)
    lanes = tl.arange(0, BLOCK_ROWS)
    rows = tl.load(rows_ptr + block * BLOCK_ROWS + lanes)
    cols = tl.arange(0, PADDED_RANK)
    bound = RANK
    if HAS_RANKS:  # in steps of 16, so that loads stay wide
        bound = (tl.load(ranks_ptr + slot) + 15) // 16 * 16
    x_rows = x_ptr + rows[:, None] * COLUMNS
    sum0 = tl.full((BLOCK_ROWS, PADDED_RANK), 0.0, tl.float32)
    sum1 = sum0
    sum2 = sum0
    for step in range(STEPS):
        ks = (split * STEPS + step) * BLOCK_K + tl.arange(0, BLOCK_K)
        x = tl.load(
            x_rows + ks[None, :], mask=(rows[:, None] >= 0) & (ks[None, :] < COLUMNS), other=0.0
        )
        x = x.to(w0_ptr.dtype.element_ty)
        if TRANSPOSED:
            at = weights + cols[:, None] * COLUMNS + ks[None, :]
            mask = (cols[:, None] < bound) & (ks[None, :] < COLUMNS)
            w = tl.load(w0_ptr + at, mask=mask, other=0.0)
            sum0 = tl.dot(x, tl.trans(w), sum0, input_precision="ieee")
        else:
            at = weights + ks[:, None] * RANK + cols[None, :]
            mask = (cols[None, :] < bound) & (ks[:, None] < COLUMNS)
            w = tl.load(w0_ptr + at, mask=mask, other=0.0)
            sum0 = tl.dot(x, w, sum0, input_precision="ieee")
            if NUM_LINEARS > 1:
                w = tl.load(w1_ptr + at, mask=mask, other=0.0)
                sum1 = tl.dot(x, w, sum1, input_precision="ieee")
            if NUM_LINEARS > 2:
                w = tl.load(w2_ptr + at, mask=mask, other=0.0)
                sum2 = tl.dot(x, w, sum2, input_precision="ieee")
    tile = BLOCK_ROWS * PADDED_RANK
    out = out_ptr + (split * tl.num_programs(0) + block) * tile
    out += lanes[:, None] * PADDED_RANK + cols[None, :]
    linear = tl.num_programs(1) * tl.num_programs(0) * tile
    mask = (rows[:, None] >= 0) & (cols[None, :] < PADDED_RANK)
    tl.store(out, sum0, mask=mask)
    if NUM_LINEARS > 1:
        tl.store(out + linear, sum1, mask=mask)
    if NUM_LINEARS > 2:
        tl.store(out + 2 * linear, sum2, mask=mask)


@triton.jit
@no_type_check
def grouped_lora_expand(
    layer_ptr,  # [1] int32
    rows_ptr,  # [blocks, BLOCK_ROWS] int32
    slots_ptr,  # [blocks] int32
    ranks_ptr,  # [A] int32; read if HAS_RANKS
    scale_ptr,  # [A] float32
    partials_ptr,  # [linears, SPLITS, blocks, BLOCK_ROWS, PADDED_RANK] float32
    w0_ptr,  # [A, LAYERS, RANK, WIDTH0], or [A, LAYERS, WIDTH0, RANK] if TRANSPOSED
    w1_ptr,  # the same with WIDTH1; read if WIDTH1 > 0
    w2_ptr,  # the same with WIDTH2; read if WIDTH2 > 0
    acc0_ptr,  # [T, WIDTH0] float32, the memory of out0_ptr
    acc1_ptr,  # [T, WIDTH1]
    acc2_ptr,  # [T, WIDTH2]
    out0_ptr,  # [T, WIDTH0]
    out1_ptr,  # [T, WIDTH1]
    out2_ptr,  # [T, WIDTH2]
    WIDTH0: tl.constexpr,
    WIDTH1: tl.constexpr,
    WIDTH2: tl.constexpr,
    LAYERS: tl.constexpr,
    RANK: tl.constexpr,
    PADDED_RANK: tl.constexpr,
    HAS_RANKS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """Adds one block's rows times one tile of the columns of B, of the linear they belong to."""
    tile = tl.program_id(0)
    block = tl.program_id(1)
    slot = tl.load(slots_ptr + block)
    if slot < 0:
        return
    bank_row = slot.to(tl.int64) * LAYERS + tl.load(layer_ptr)
    lanes = tl.arange(0, BLOCK_ROWS)
    rows = tl.load(rows_ptr + block * BLOCK_ROWS + lanes)
    cols = tl.arange(0, PADDED_RANK)
    bound = RANK
    if HAS_RANKS:
        bound = (tl.load(ranks_ptr + slot) + 15) // 16 * 16
    scale = tl.load(scale_ptr + slot)
    w_ptrs = (w0_ptr, w1_ptr, w2_ptr)
    acc_ptrs = (acc0_ptr, acc1_ptr, acc2_ptr)
    out_ptrs = (out0_ptr, out1_ptr, out2_ptr)
    widths: tl.constexpr = (WIDTH0, WIDTH1, WIDTH2)
    first = 0
    for index in tl.static_range(3):
        width = widths[index]
        num_tiles = (width + BLOCK_O - 1) // BLOCK_O
        if (tile >= first) & (tile < first + num_tiles):
            outs = (tile - first) * BLOCK_O + tl.arange(0, BLOCK_O)
            weights = w_ptrs[index] + bank_row * (width * RANK)
            if TRANSPOSED:
                at = weights + outs[:, None] * RANK + cols[None, :]
                w_mask = (cols[None, :] < bound) & (outs[:, None] < width)
                w = tl.trans(tl.load(at, mask=w_mask, other=0.0))
            else:
                at = weights + cols[:, None] * width + outs[None, :]
                w = tl.load(at, mask=(cols[:, None] < bound) & (outs[None, :] < width), other=0.0)
            tile_size = BLOCK_ROWS * PADDED_RANK
            part = partials_ptr + (index * SPLITS * tl.num_programs(1) + block) * tile_size
            part += lanes[:, None] * PADDED_RANK + cols[None, :]
            h_mask = (rows[:, None] >= 0) & (cols[None, :] < PADDED_RANK)
            h = tl.load(part, mask=h_mask, other=0.0)
            for _ in tl.static_range(1, SPLITS):
                part += tl.num_programs(1) * tile_size
                h += tl.load(part, mask=h_mask, other=0.0)
            delta = tl.dot((h * scale).to(w.dtype), w, input_precision="ieee")
            mask = (rows[:, None] >= 0) & (outs[None, :] < width)
            at = rows[:, None] * width + outs[None, :]
            acc = tl.load(acc_ptrs[index] + at, mask=mask, other=0.0)
            tl.store(out_ptrs[index] + at, acc + delta, mask=mask)
        first += num_tiles


@triton.jit
@no_type_check
def grouped_lora_outer(
    rows_ptr,  # [blocks, BLOCK_ROWS] int32
    starts_ptr,  # [A + 1] int32
    scale_ptr,  # [A] float32
    active_ptr,  # [n] int32
    x_ptr,  # [T, COLUMNS]
    partials_ptr,  # [1, SPLITS, NUM_BLOCKS, BLOCK_ROWS, PADDED_RANK] float32
    like_ptr,  # any array of the dtype that the factors are rounded to
    out_ptr,  # [n, COLUMNS, RANK] float32, or [n, RANK, COLUMNS] if TRANSPOSED
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
    PADDED_RANK: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    SPLITS: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Sums row times scaled bottleneck over one slot's blocks, for one tile of the columns."""
    index = tl.program_id(1)
    slot = tl.load(active_ptr + index)
    first = 0
    last = 0
    scale = 0.0
    if slot >= 0:
        first = tl.load(starts_ptr + slot)
        last = tl.load(starts_ptr + slot + 1)
        scale = tl.load(scale_ptr + slot)
    dtype = like_ptr.dtype.element_ty
    lanes = tl.arange(0, BLOCK_ROWS)
    cols = tl.arange(0, PADDED_RANK)
    ks = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    total = tl.full((BLOCK_K, PADDED_RANK), 0.0, tl.float32)
    for block in range(first, last):
        rows = tl.load(rows_ptr + block * BLOCK_ROWS + lanes)
        at = rows[:, None] * COLUMNS + ks[None, :]
        x = tl.load(x_ptr + at, mask=(rows[:, None] >= 0) & (ks[None, :] < COLUMNS), other=0.0)
        part = partials_ptr + block * (BLOCK_ROWS * PADDED_RANK)
        part += lanes[:, None] * PADDED_RANK + cols[None, :]
        h_mask = (rows[:, None] >= 0) & (cols[None, :] < PADDED_RANK)
        h = tl.load(part, mask=h_mask, other=0.0)
        for _ in tl.static_range(1, SPLITS):
            part += NUM_BLOCKS * BLOCK_ROWS * PADDED_RANK
            h += tl.load(part, mask=h_mask, other=0.0)
        h = (h * scale).to(dtype)
        total = tl.dot(tl.trans(x.to(dtype)), h, total, input_precision="ieee")
    if TRANSPOSED:
        at = cols[None, :] * COLUMNS + ks[:, None]
    else:
        at = ks[:, None] * RANK + cols[None, :]
    out = out_ptr + index.to(tl.int64) * (COLUMNS * RANK) + at
    tl.store(out, total, mask=(ks[:, None] < COLUMNS) & (cols[None, :] < RANK))
