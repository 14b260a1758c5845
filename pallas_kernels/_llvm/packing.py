"""The operands of matrix products, and how they are packed for the innermost loop.

That loop reads one line of a packed panel (columns of the right side) and one of a packed tile
(rows of the left side) for each step of the contracted axis.
"""

from __future__ import annotations

import dataclasses

from pallas_kernels._llvm.builder import Builder, Number, Pointer, Value
from pallas_kernels._llvm.compile import num_vector_registers, vector_lanes

VECTORS = 2
"""Vectors of a line of a panel."""


def tile_rows() -> int:
    """Rows of the innermost loop: as many as registers can hold sums for."""
    return 6 if num_vector_registers() == 16 else 12


def panel_columns() -> int:
    """Columns of a panel."""
    return VECTORS * vector_lanes()


def split_evenly(size: int, at_most: int, multiple: int = 1) -> list[int]:
    """Cuts `size` into pieces of about equal size, all but the last a multiple of `multiple`."""
    count = -(-size // at_most)
    piece = -(-size // count)
    piece = -(-piece // multiple) * multiple
    return [min(piece, size - start) for start in range(0, size, piece)]


@dataclasses.dataclass(frozen=True)
class Rows:
    """The left side: element (row, k) is at `base[row * row_stride + k * k_stride]`.

    With a `tile_stride`, these are the strides in a tile of rows, as `pack_rows` makes them, and
    the next tile is so many elements further on.
    """

    base: Pointer
    row_stride: int
    k_stride: int = 1
    tile_stride: int | None = None

    @classmethod
    def packed(cls, base: Pointer, depth: int) -> Rows:
        """Rows of that many elements, packed."""
        return cls(base, 1, tile_rows(), tile_stride(depth))

    def from_row(self, row: Value) -> Rows:
        """The rows from one on; from the first of a tile, if packed."""
        if self.tile_stride is None:
            return dataclasses.replace(self, base=self.base.at(row * self.row_stride))
        return dataclasses.replace(self, base=self.base.at(row // tile_rows() * self.tile_stride))

    def from_k(self, k: Number) -> Rows:
        """The rows without their first `k` elements."""
        return dataclasses.replace(
            self, base=self.base.at(self.base.builder.integer(k) * self.k_stride)
        )


@dataclasses.dataclass(frozen=True)
class Columns:
    """The right side: element (k, column), one of its strides being 1."""

    base: Pointer
    k_stride: int
    column_stride: int = 1

    def from_column(self, column: Value) -> Columns:
        """The columns from one on."""
        return dataclasses.replace(self, base=self.base.at(column * self.column_stride))

    def from_k(self, k: Value) -> Columns:
        """The columns without their first `k` elements."""
        return dataclasses.replace(self, base=self.base.at(k * self.k_stride))


@dataclasses.dataclass(frozen=True)
class Output:
    """Where products go: element (row, column) is at `base[row * row_stride + column]`.

    Attributes:
      base: Address.
      row_stride: Elements from a row to the next.
      is_added: Whether the products are added to what is there.
    """

    base: Pointer
    row_stride: int
    is_added: bool = False


def transpose(b: Builder, rows: list[Value]) -> list[Value]:
    """Transposes as many vectors as they have lanes."""
    lanes = len(rows)
    half = 1
    while half < lanes:
        turned = list(rows)
        for i in range(lanes):
            if i & half:
                continue
            low, high = rows[i], rows[i | half]
            pick_low = [n ^ half | lanes if n & half else n for n in range(lanes)]
            pick_high = [n | lanes if n & half else n ^ half for n in range(lanes)]
            turned[i] = b.shuffle(low, high, pick_low)
            turned[i | half] = b.shuffle(low, high, pick_high)
        rows, half = turned, 2 * half
    return rows


def pack(
    b: Builder, columns: Columns, start: Number, depth: Number, width: int, panel: Pointer
) -> None:
    """Copies `depth` x `width` elements from `start` on to [depth, panel columns]; rest zero."""
    full = panel_columns()
    if columns.column_stride == 1:
        source = columns.base.at(b.integer(start) * columns.k_stride)
        with b.loop(0, depth) as k:
            line = source.at(k * columns.k_stride)
            if width == full:
                for n in range(0, full, b.lanes):
                    panel.store(k * full + n, line.vector(n, b.lanes))
            else:
                _copy_padded(b, line, 1, width, panel.at(k * full))
        return
    source = columns.base.at(start)
    whole = b.integer(depth) // b.lanes * b.lanes if width == full else 0
    if width == full:
        with b.loop(0, whole, b.lanes) as k:
            for n in range(0, full, b.lanes):
                lines = [
                    source.at(k + (n + i) * columns.column_stride).vector(0, b.lanes)
                    for i in range(b.lanes)
                ]
                for i, line in enumerate(transpose(b, lines)):
                    panel.store((k + i) * full + n, line)
    with b.loop(whole, depth) as k:
        _copy_padded(b, source.at(k), columns.column_stride, width, panel.at(k * full))


def _copy_padded(b: Builder, source: Pointer, stride: int, width: int, target: Pointer) -> None:
    with b.loop(0, width) as n:
        target[n] = source[n * stride]
    with b.loop(width, panel_columns()) as n:
        target[n] = 0.0


def tile_stride(depth: int) -> int:
    """Elements from a packed tile of rows to the next: packing also writes behind a tile."""
    return depth * tile_rows() + 16


def pack_rows(
    b: Builder, rows: Rows, num_rows: Number, rest: int, depth: Number, target: Pointer, stride: int
) -> None:
    """Copies rows to tiles [depth, tile rows], of which the innermost loop reads one line.

    It keeps up with that, where it does not with as many lines as rows. `multiply_tile` takes a
    tile as `Rows(tile, 1, tile_rows())`.

    Args:
      b: Where the code goes.
      rows: The rows.
      num_rows: How many they are: whole tiles, or whole tiles and `rest` more.
      rest: Rows of the last tile if it is not whole; its other rows are filled with zeros.
      depth: Length of the contracted axis.
      target: Where the tiles go.
      stride: Elements from a tile to the next, at least `tile_stride(depth)`.
    """
    tile = tile_rows()
    whole = b.integer(num_rows) // tile

    def tile_at(index: Value) -> Rows:
        base = rows.base.at(index * (tile * rows.row_stride))
        return Rows(base, rows.row_stride, rows.k_stride)

    if rows.row_stride == 1:
        _copy_tiles(b, rows, whole, depth, target, stride)
    else:
        with b.loop(0, whole) as index:
            _turn_tile(b, tile_at(index), tile, depth, target.at(index * stride))
    if rest:
        with b.when(b.integer(num_rows) > whole * tile):
            _turn_tile(b, tile_at(whole), rest, depth, target.at(whole * stride))


def _copy_tiles(
    b: Builder, rows: Rows, num_tiles: Value, depth: Number, target: Pointer, stride: int
) -> None:
    """Packs tiles of rows that lie side by side, in whole vectors.

    What such a vector holds of the next tile, the next line overwrites; the last line has none.
    """
    tile = tile_rows()
    last = b.integer(depth) - 1
    with b.loop(0, last) as k:
        line = rows.base.at(k * rows.k_stride)
        with b.loop(0, num_tiles) as index:
            for n in range(0, tile, b.lanes):
                found = line.vector(index * tile + n, b.lanes)
                target.store(index * stride + k * tile + n, found)
    line = rows.base.at(last * rows.k_stride)
    with b.loop(0, num_tiles) as index:
        for n in range(tile):
            target[index * stride + last * tile + n] = line[index * tile + n]


def _turn_tile(b: Builder, rows: Rows, num_rows: int, depth: Number, target: Pointer) -> None:
    """Packs a tile of rows of which each lies in one line, or of less than a tile's rows."""
    tile = tile_rows()
    groups = range(0, tile, b.lanes)
    whole = b.integer(depth) // b.lanes * b.lanes if rows.k_stride == 1 else b.integer(0)
    if rows.k_stride == 1:
        with b.loop(0, whole, b.lanes) as k:
            turned = []
            for start in groups:
                lines = [
                    rows.base.at(k + n * rows.row_stride).vector(0, b.lanes)
                    if n < num_rows
                    else b.splat(0.0)
                    for n in range(start, start + b.lanes)
                ]
                turned.append(transpose(b, lines))
            for i in range(b.lanes):
                for start, lines in zip(groups, turned, strict=True):
                    target.store((k + i) * tile + start, lines[i])
    with b.loop(whole, depth) as k:
        for n in range(tile):
            found = rows.base[n * rows.row_stride + k * rows.k_stride] if n < num_rows else 0.0
            target[k * tile + n] = found
