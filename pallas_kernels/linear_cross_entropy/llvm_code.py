"""Code of `llvm`: both products and the softmax, a block of the vocabulary at a time, in the cache.

Each task passes over its part of the vocabulary once, for all rows, and keeps for every row a
running maximum m, s = sum of exp(logit - m) and g = sum of exp(logit - m) head[:, token], over all
tokens but the target. `combine` adds the tasks' parts up in a fixed order. With p = exp(logit - m)
of the target,

    loss     = m + log(s + p) - logit[target]
    d_hidden = (g - s head[:, target]) / (s + p)

in which nothing cancels where the softmax is near one at the target.

Only rows that have a target are computed. They are the columns of both products, logits^T =
head^T rows^T and g^T = head exponentials^T, in panels [k, rows]: a panel's exponentials are made
where its logits were, and are the panel of the second product. A block of the head is packed twice,
once for each product, in tiles [k, tile rows], and multiplied with all panels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from pallas_kernels._llvm import vector
from pallas_kernels._llvm.builder import Builder, Number, Pointer, Value
from pallas_kernels._llvm.gemm import DEPTH, each_piece, multiply_tile, store_tile
from pallas_kernels._llvm.packing import (
    Rows,
    pack_rows,
    panel_columns,
    split_evenly,
    tile_rows,
    tile_stride,
)

_SPLITS = 8
_SCRATCH_BYTES = 2**26

_LOWEST = -3.4e38
"""The maximum of no logits; finite, so that its difference from -inf is not NaN."""

_NOTHING = -87.0
"""Logits further below the maximum count as nothing."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Shapes of a call, and what follows from them.

    Attributes:
      num_rows: Rows, of which those with a target count.
      dim: D.
      vocab: V.
      transposed_head: Whether the head is [V, D].
    """

    num_rows: int
    dim: int
    vocab: int
    transposed_head: bool

    @property
    def padded_rows(self) -> int:
        """Rows in whole panels."""
        return -(-self.num_rows // panel_columns()) * panel_columns()

    @property
    def num_panels(self) -> int:
        """Panels of rows."""
        return self.padded_rows // panel_columns()

    @property
    def dim_tiles(self) -> int:
        """Tiles of D."""
        return -(-self.dim // tile_rows())

    @property
    def padded_dim(self) -> int:
        """D in whole tiles."""
        return self.dim_tiles * tile_rows()

    @property
    def pieces(self) -> list[int]:
        """D in pieces, the depths of panels."""
        return split_evenly(self.dim, DEPTH, 8)

    @property
    def split_tiles(self) -> int:
        """Tiles of the vocabulary of a task."""
        tiles = -(-self.vocab // tile_rows())
        blocks = -(-self.vocab // DEPTH)
        bytes_per_split = 4 * (self.padded_rows * self.padded_dim + 2 * DEPTH * self.padded_dim)
        affordable = max(_SCRATCH_BYTES // bytes_per_split, 4)
        return -(-tiles // min(_SPLITS, affordable, blocks))

    @property
    def num_splits(self) -> int:
        """Tasks that the vocabulary is split into."""
        return -(-self.vocab // (self.split_tiles * tile_rows()))

    @property
    def block_tiles(self) -> int:
        """Tiles of a block of the vocabulary."""
        return split_evenly(self.split_tiles, DEPTH // tile_rows())[0]

    @property
    def block_tokens(self) -> int:
        """Tokens of a block of the vocabulary."""
        return self.block_tiles * tile_rows()

    @property
    def token_stride(self) -> int:
        """Elements of a packed tile of tokens, [D, tile rows]."""
        return tile_stride(self.dim)

    @property
    def dim_stride(self) -> int:
        """Elements of a packed tile of D, [tokens, tile rows]."""
        return tile_stride(self.block_tokens)

    @property
    def packed_size(self) -> int:
        """Elements of a block of the head, packed twice."""
        return self.block_tiles * self.token_stride + self.dim_tiles * self.dim_stride


def gather_rows(sizes: Sizes) -> Callable[..., None]:
    """Orders the rows, those with a target first, and packs these: a panel [D, rows] per task."""
    full = panel_columns()

    def body(
        b: Builder,
        task: Value,
        hidden: Pointer,
        targets: Pointer,
        packed: Pointer,
        order: Pointer,
        wanted: Pointer,
        count: Pointer,
    ) -> None:
        first = task * full
        placed = b.variable(0)

        def place_rows(*, is_counted: bool) -> Value:
            with b.loop(0, sizes.num_rows) as row:
                target, place = targets[row], placed.get()
                with b.when(target >= 0 if is_counted else target < 0):
                    with b.when((place >= first) & (place < first + full)):
                        order[place] = row
                    placed.set(place + 1)
            return placed.get()

        num_counted = place_rows(is_counted=True)
        place_rows(is_counted=False)
        with b.when(task.equals(0)):
            count[0] = num_counted
        with b.when(first < num_counted), b.loop(0, full) as n:
            panel = packed.at(first * sizes.dim + n)
            with b.either(first + n < num_counted) as (yes, no):
                with yes:
                    row = order[first + n]
                    wanted[first + n] = targets[row]
                    line = hidden.at(row * sizes.dim)
                    with b.loop(0, sizes.dim) as k:
                        panel[k * full] = line[k]
                with no:
                    wanted[first + n] = -1
                    with b.loop(0, sizes.dim) as k:
                        panel[k * full] = 0.0

    return body


def sweep_vocabulary(sizes: Sizes) -> Callable[..., None]:
    """One task's part of the vocabulary."""

    def body(
        b: Builder,
        task: Value,
        packed: Pointer,
        wanted: Pointer,
        count: Pointer,
        head: Pointer,
        maxima: Pointer,
        sums: Pointer,
        picked: Pointer,
        d_rows: Pointer,
        target_columns: Pointer,
        packed_head: Pointer,
    ) -> None:
        rows, full = sizes.padded_rows, panel_columns()
        tokens = packed_head.at(task * sizes.packed_size)
        part = _Part(
            sizes=sizes,
            num_panels=(count[0] + (full - 1)) // full,
            packed=packed,
            wanted=wanted,
            head=head,
            maxima=maxima.at(task * rows),
            sums=sums.at(task * rows),
            picked=picked,
            d_rows=d_rows.at(task * (rows * sizes.padded_dim)),
            target_columns=target_columns,
            tokens=tokens,
            dims=tokens.at(sizes.block_tiles * sizes.token_stride),
            logits=b.buffer(sizes.block_tokens * full),
        )
        with b.when(part.num_panels > 0):
            first = task * (sizes.split_tiles * tile_rows())
            behind = b.minimum(first + sizes.split_tiles * tile_rows(), b.integer(sizes.vocab))
            _begin(b, part)
            with b.loop(first, behind, sizes.block_tokens) as start:
                width = b.minimum(b.integer(sizes.block_tokens), behind - start)
                _pack_head(b, part, start, width)
                with b.loop(0, part.num_panels) as panel:
                    _logits(b, part, panel, width)
                    _softmax(b, part, panel, start, width)
                    _gradient(b, part, panel, width)

    return body


@dataclasses.dataclass(frozen=True)
class _Part:
    """What a task works on.

    Attributes:
      sizes: Shapes.
      num_panels: Panels of counted rows.
      packed: Counted rows, [panels][D, panel columns].
      wanted: Their targets; -1 fills the last panel.
      head: The head.
      maxima: Running maximum per row.
      sums: Running sum of exponentials per row, without the target's.
      picked: Logit of the target per row.
      d_rows: Running sum of exponentials times head, [panels][padded dim, panel columns].
      target_columns: Head at the target, [padded rows, padded dim].
      tokens: Block of the head for the logits, [tiles of tokens][D, tile rows].
      dims: Block of the head for the gradient, [tiles of D][tokens, tile rows].
      logits: A panel's logits, then their exponentials, [tokens, panel columns].
    """

    sizes: Sizes
    num_panels: Value
    packed: Pointer
    wanted: Pointer
    head: Pointer
    maxima: Pointer
    sums: Pointer
    picked: Pointer
    d_rows: Pointer
    target_columns: Pointer
    tokens: Pointer
    dims: Pointer
    logits: Pointer


def _begin(b: Builder, part: _Part) -> None:
    """No logits yet."""
    full = panel_columns()
    rows = part.num_panels * full
    with b.loop(0, rows, b.lanes) as row:
        part.maxima.store(row, b.splat(_LOWEST))
        part.sums.store(row, b.splat(0.0))
    with b.loop(0, rows * part.sizes.padded_dim, b.lanes) as n:
        part.d_rows.store(n, b.splat(0.0))


def _pack_head(b: Builder, part: _Part, start: Value, width: Value) -> None:
    """Packs tokens from `start` on for both products."""
    sizes, tile = part.sizes, tile_rows()
    if sizes.transposed_head:
        block = Rows(part.head.at(start * sizes.dim), sizes.dim, 1)
    else:
        block = Rows(part.head.at(start), 1, sizes.vocab)

    dims = Rows(block.base, block.k_stride, block.row_stride)
    rest, depth = sizes.vocab % tile, sizes.dim
    pack_rows(b, block, width, rest, depth, part.tokens, sizes.token_stride)
    rest, depth = sizes.dim % tile, width
    pack_rows(b, dims, sizes.dim, rest, depth, part.dims, sizes.dim_stride)


@dataclasses.dataclass(frozen=True)
class _Tiles:
    """Packed tiles: where the first one is, elements from one to the next, and how many."""

    base: Pointer
    stride: int
    count: Number


def _sweep(
    b: Builder, tiles: _Tiles, depth: Number, panel: Pointer, output: Pointer, *, is_added: bool
) -> None:
    """Multiplies packed tiles with a panel, to [tiles, tile rows, panel columns]."""
    full, tile = panel_columns(), tile_rows()
    with b.loop(0, tiles.count) as index:
        sums = b.zeros(tile, full // b.lanes)
        rows = Rows(tiles.base.at(index * tiles.stride), 1, tile)
        multiply_tile(b, rows, tile, depth, panel, sums)
        store_tile(b, sums, output.at(index * (tile * full)), full, full, is_added)


def _logits(b: Builder, part: _Part, panel: Value, width: Value) -> None:
    """logits^T = head^T rows^T; -inf behind the last token of the last tile."""
    sizes, full, tile = part.sizes, panel_columns(), tile_rows()
    num_tiles = (width + (tile - 1)) // tile
    rows = part.packed.at(panel * (full * sizes.dim))

    def piece(first: Number, size: int, is_first: bool) -> None:
        first = b.integer(first)
        tiles = _Tiles(part.tokens.at(first * tile), sizes.token_stride, num_tiles)
        _sweep(b, tiles, size, rows.at(first * full), part.logits, is_added=not is_first)

    each_piece(b, sizes.pieces, piece)
    with b.loop(width * full, num_tiles * (tile * full), b.lanes) as n:
        part.logits.store(n, b.splat(float("-inf")))


def _softmax(b: Builder, part: _Part, panel: Value, start: Value, width: Value) -> None:
    """Turns logits to exponentials, zero at the target; the running sums follow the maximum."""
    sizes, full = part.sizes, panel_columns()
    vectors = range(0, full, b.lanes)
    row = panel * full
    old = [part.maxima.vector(row + n, b.lanes) for n in vectors]
    maxima = [b.variable(vector) for vector in old]
    with b.loop(0, width) as token:
        for n, variable in zip(vectors, maxima, strict=True):
            logits = part.logits.vector(token * full + n, b.lanes)
            variable.set(b.maximum(logits, variable.get()))
    for n, before, variable in zip(vectors, old, maxima, strict=True):
        now = variable.get()
        with b.when(b.reduce("fmax", now - before) > 0.0):
            scale = _exp(b, before - now)
            part.maxima.store(row + n, now)
            part.sums.store(row + n, part.sums.vector(row + n, b.lanes) * scale)
            d_rows = part.d_rows.at(row * sizes.padded_dim + n)
            with b.loop(0, sizes.padded_dim) as k:
                d_rows.store(k * full, d_rows.vector(k * full, b.lanes) * scale)
    _pick_targets(b, part, row, start, width)
    sums = [b.variable(part.sums.vector(row + n, b.lanes)) for n in vectors]
    with b.loop(0, width) as token:
        for n, variable, maximum in zip(vectors, sums, maxima, strict=True):
            at = token * full + n
            value = _exp(b, part.logits.vector(at, b.lanes) - maximum.get())
            part.logits.store(at, value)
            variable.set(variable.get() + value)
    for n, variable in zip(vectors, sums, strict=True):
        part.sums.store(row + n, variable.get())


def _exp(b: Builder, x: Value) -> Value:
    """exp(x) for x <= 0, zero where that is next to nothing."""
    return b.select(x < _NOTHING, 0.0, vector.exp(b, x))


def _pick_targets(b: Builder, part: _Part, first: Value, start: Value, width: Value) -> None:
    """Takes the logits and columns of the panel's targets in the block, and hides the logits."""
    sizes, full, tile = part.sizes, panel_columns(), tile_rows()
    with b.loop(0, full) as n:
        row = first + n
        token = part.wanted[row] - start
        with b.when((token >= 0) & (token < width)):
            place = token * full + n
            part.picked[row] = part.logits[place]
            part.logits[place] = float("-inf")
            column = part.target_columns.at(row * sizes.padded_dim)
            with b.loop(0, sizes.dim_tiles) as index:
                line = part.dims.at(index * sizes.dim_stride + token * tile)
                for k in range(tile):
                    column[index * tile + k] = line[k]


def _gradient(b: Builder, part: _Part, panel: Value, width: Value) -> None:
    """d_rows^T += head exponentials^T."""
    sizes = part.sizes
    tiles = _Tiles(part.dims, sizes.dim_stride, sizes.dim_tiles)
    output = part.d_rows.at(panel * (panel_columns() * sizes.padded_dim))
    _sweep(b, tiles, width, part.logits, output, is_added=True)


def combine(sizes: Sizes) -> Callable[..., None]:
    """Adds up what the tasks found for a panel of rows.

    Rows without a target get zero, and a loss of log(1) + 0.
    """

    def body(
        b: Builder,
        task: Value,
        order: Pointer,
        wanted: Pointer,
        count: Pointer,
        maxima: Pointer,
        sums: Pointer,
        picked: Pointer,
        d_rows: Pointer,
        target_columns: Pointer,
        d_hidden: Pointer,
        totals: Pointer,
        shifts: Pointer,
    ) -> None:
        full = panel_columns()
        first = task * full
        behind = b.minimum(first + full, b.integer(sizes.num_rows))
        with b.loop(first, behind) as place:
            row = order[place]
            output = d_hidden.at(row * sizes.dim)
            with b.either(place < count[0]) as (yes, no):
                with no:
                    totals[row] = 1.0
                    shifts[row] = 0.0
                    with b.loop(0, sizes.dim) as k:
                        output[k] = 0.0
                with yes:
                    weights, maximum, others = _weights(b, sizes, place, maxima, sums)
                    # Where the target is no token, neither its logit nor its column is there.
                    is_token = wanted[place] < sizes.vocab
                    logit = b.select(is_token, picked[place], 0.0)
                    total = others + b.select(is_token, _exp(b, logit - maximum), 0.0)
                    totals[row] = total
                    shifts[row] = maximum - logit
                    weights = [weight / total for weight in weights]
                    share = others / total
                    found = d_rows.at(first * sizes.padded_dim + place % full)
                    columns = target_columns.at(place * sizes.padded_dim)
                    with b.loop(0, sizes.dim) as k:
                        column = b.select(is_token, columns[k], 0.0)
                        value = column * (0.0 - share)
                        for n, weight in enumerate(weights):
                            at = k * full + n * sizes.padded_rows * sizes.padded_dim
                            value = b.fma(weight, found[at], value)
                        output[k] = value

    return body


def _weights(
    b: Builder, sizes: Sizes, place: Value, maxima: Pointer, sums: Pointer
) -> tuple[list[Value], Value, Value]:
    """exp(task's maximum - maximum), the maximum, and the sum of exponentials of a row."""
    at = [place + n * sizes.padded_rows for n in range(sizes.num_splits)]
    maximum = maxima[at[0]]
    for n in at[1:]:
        maximum = b.maximum(maxima[n], maximum)
    weights = [_exp(b, maxima[n] - maximum) for n in at]
    total = b.number(0.0)
    for n, weight in zip(at, weights, strict=True):
        total = b.fma(weight, sums[n], total)
    return weights, maximum, total
