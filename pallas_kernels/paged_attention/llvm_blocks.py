"""What the code of attention for the CPU is made of: tiles of query rows and blocks of keys.

A row is one query head of one token; the rows of a KV head are ordered by token. A tile of them
goes through the listed pages, a block of the keys that it may see at a time. Within a block, a
group of rows (as many as registers hold sums for) meets a panel of keys (as many as these registers
are wide): what no row of the group sees is skipped, what all see needs no mask.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
from collections.abc import Iterator, Sequence

from pallas_kernels._llvm.builder import Builder, Number, Pointer, Value
from pallas_kernels._llvm.gemm import multiply_tile
from pallas_kernels._llvm.packing import Rows, panel_columns, tile_rows, transpose
from pallas_kernels.paged_attention.llvm_shapes import Attention, pieces

_NO_KEY = 2**30  # position of a slot of a block that holds no key
_MIXED_ROWS, _MIXED_KEYS = -2, -3  # segment of a group or panel of more than one

Sums = list[list[Value]]
"""Of a group of rows and a panel: vectors by row and place in the panel."""


def fill(b: Builder, target: Pointer, size: int, value: float) -> None:
    """Sets `size` numbers, in whole vectors."""
    with b.loop(0, size, b.lanes) as n:
        target.store(n, b.splat(value))


def flag_not_finite(b: Builder, vectors: Sequence[Value]) -> Value:
    """NaN if any number of the vectors is not finite, else zero."""
    flag = b.number(0.0)
    for vector in vectors:
        flag = flag + b.reduce("fadd", vector * 0.0)
    return flag


class Ranges:
    """Least and greatest positions and segments of sets of rows; padding rows are left out."""

    def __init__(self, b: Builder, spec: Attention, count: int):
        self.b, self.spec = b, spec
        self._low, self._high, self._first, self._last = (b.int_buffer(count) for _ in range(4))
        with b.loop(0, count) as index:
            self._low[index], self._high[index] = _NO_KEY, -1
            self._first[index], self._last[index] = _NO_KEY, -1

    def widen(self, index: Number, position: Value, segment: Value) -> None:
        """Adds a row to a set."""
        b, is_padding = self.b, position < 0
        for table, least in ((self._low, position), (self._first, segment)):
            table[index] = b.minimum(table[index], b.select(is_padding, _NO_KEY, least))
        for table, most in ((self._high, position), (self._last, segment)):
            table[index] = b.maximum(table[index], b.select(is_padding, -1, most))

    def may_see(self, index: Number, segment: Value, low: Value, high: Value) -> Value:
        """Whether a row of a set may see keys of a segment at positions `low` to `high`."""
        found = (segment >= self._first[index]) & (segment <= self._last[index])
        found = found | segment.equals(_MIXED_KEYS)
        found = found & (low <= self._high[index])
        if self.spec.sliding_window is not None:
            found = found & (self._low[index] - high < self.spec.sliding_window)
        return found

    def may_see_block(self, index: Number, block: KeyBlock) -> Value:
        """Whether a row of a set may see a key of a block."""
        found = self.b.variable(0)
        with self.b.loop(0, block.num_panels) as panel:
            places = block.panel_segment[panel], block.panel_low[panel], block.panel_high[panel]
            found.set(self.b.select(self.may_see(index, *places), 1, found.get()))
        return found.get() > 0


class QueryTile:
    """Where the rows of a tile stand, and what is common to groups of them.

    Attributes:
      spec: What the code depends on.
      size: Rows of the tile, in whole groups.
      positions: Of each row; -1 for padding.
      segments: Of each row; -1 for padding.
      num_groups: Groups with a row that exists, a variable.
    """

    def __init__(self, b: Builder, spec: Attention, size: int):
        self.b, self.spec, self.size = b, spec, size
        self.positions, self.segments = b.int_buffer(size), b.int_buffer(size)
        count = size // tile_rows()
        self.group_low, self.group_high, self.group_segment = (
            b.int_buffer(count) for _ in range(3)
        )
        self.num_groups = b.variable(0)

    def read(self, segments: Pointer, positions: Pointer, first: Value) -> None:
        """Reads where the rows from `first` on stand; what is behind the last row is padding."""
        b, spec = self.b, self.spec
        count = self.count(first)
        self.num_groups.set((count + (tile_rows() - 1)) // tile_rows())
        with b.loop(0, self.num_groups.get() * tile_rows()) as n:
            is_row = n < count
            token = (first + b.select(is_row, n, 0)) // spec.groups
            position = b.select(is_row, positions[token], -1)
            self.positions[n] = position
            self.segments[n] = b.select(position >= 0, segments[token], -1)
        with b.loop(0, self.num_groups.get()) as group:
            start = group * tile_rows()
            rows = [start + n for n in range(tile_rows())]
            low, high, segment = summarize(
                b, [self.positions[n] for n in rows], [self.segments[n] for n in rows], _MIXED_ROWS
            )
            self.group_low[group], self.group_high[group] = low, high
            self.group_segment[group] = segment

    def count(self, first: Value) -> Value:
        """Rows that exist, of a tile from `first` on."""
        return self.b.minimum(self.b.integer(self.spec.num_rows) - first, self.b.integer(self.size))

    def ranges(self) -> Ranges:
        """One range, of all rows."""
        ranges = Ranges(self.b, self.spec, 1)
        with self.b.loop(0, self.num_groups.get() * tile_rows()) as n:
            ranges.widen(0, self.positions[n], self.segments[n])
        return ranges

    def sees(self, row: Value, position: Value, segment: Value) -> Value:
        """Whether one row sees one key."""
        own = self.positions[row]
        found = (position <= own) & segment.equals(self.segments[row])
        if self.spec.sliding_window is not None:
            found = found & (own - position < self.spec.sliding_window)
        return found


def summarize(
    b: Builder, positions: Sequence[Value], segments: Sequence[Value], mixed: int
) -> tuple[Value, Value, Value]:
    """Least and greatest position, and the segment, `mixed` if there are several."""
    low = high = positions[0]
    segment = segments[0]
    for other in positions[1:]:
        low, high = b.minimum(low, other), b.maximum(high, other)
    for other in segments[1:]:
        segment = b.select(other.equals(segments[0]), segment, mixed)
    return low, high, segment


@dataclasses.dataclass(frozen=True)
class Pages:
    """The page list, and the layer of the pool that it names pages of."""

    pages: Pointer
    segments: Pointer
    starts: Pointer
    num_pages: Value
    layer: Value


class KeyBlock:
    """Slots for keys that a tile may see, filled from the page list.

    Attributes:
      size: Slots, in whole panels.
      tokens: Token of the pool in each slot: (layer * P + page) * Z + offset.
      positions: Of the key in each slot, `_NO_KEY` where there is none.
      segments: Of the key in each slot.
      entries: Entry of the page list of each slot.
      count: Slots in use, a variable.
    """

    def __init__(self, b: Builder, spec: Attention, size: int):
        self.b, self.spec, self.size = b, spec, size
        self.tokens, self.positions, self.segments, self.entries = (
            b.int_buffer(size) for _ in range(4)
        )
        count = size // panel_columns()
        self.panel_low, self.panel_high, self.panel_segment = (
            b.int_buffer(count) for _ in range(3)
        )
        self.count = b.variable(0)

    @property
    def num_panels(self) -> Value:
        """Panels in use."""
        return (self.count.get() + (panel_columns() - 1)) // panel_columns()

    @contextlib.contextmanager
    def each(self, pages: Pages, ranges: Ranges, index: Number) -> Iterator[None]:
        """Runs what is in the `with` for each block of the keys that rows of a range may see."""
        b, spec = self.b, self.spec
        chunk = min(spec.page_size, panel_columns())
        per_page = spec.page_size // chunk
        total = b.minimum(pages.num_pages, b.integer(spec.list_len)) * per_page
        self.count.set(b.integer(0))
        with b.loop(0, total + 1) as n:
            is_end = n.equals(total)
            with b.when(n < total):
                entry, offset = n // per_page, n % per_page * chunk
                low = pages.starts[entry] + offset
                found = ranges.may_see(index, pages.segments[entry], low, low + (chunk - 1))
                with b.when(found & (pages.pages[entry] >= 0)):
                    self._append(pages, entry, offset, chunk)
            count = self.count.get()
            with b.when((count >= self.size) | (is_end & (count > 0))):
                self._finish()
                yield
                self.count.set(b.integer(0))

    def _append(self, pages: Pages, entry: Value, offset: Value, chunk: int) -> None:
        b, spec, first = self.b, self.spec, self.count.get()
        page = pages.layer * spec.pool_pages + pages.pages[entry]
        token = page * spec.page_size + offset
        position, segment = pages.starts[entry] + offset, pages.segments[entry]
        with b.loop(0, chunk) as n:
            slot, at = first + n, position + n
            self.tokens[slot] = token + n
            self.positions[slot] = b.select(at >= 0, at, _NO_KEY)
            self.segments[slot] = segment
            self.entries[slot] = entry
        self.count.set(first + chunk)

    def _finish(self) -> None:
        """Fills the last panel, and sums panels up."""
        b, count, full = self.b, self.count.get(), panel_columns()
        with b.loop(count, self.num_panels * full) as slot:
            self.tokens[slot] = self.tokens[count - 1]
            self.segments[slot] = self.segments[count - 1]
            self.positions[slot] = _NO_KEY
        with b.loop(0, self.num_panels) as panel:
            low, high = b.variable(_NO_KEY), b.variable(0)
            first = self.segments[panel * full]
            segment = b.variable(first)
            with b.loop(panel * full, panel * full + full) as slot:
                at = self.positions[slot]
                low.set(b.minimum(low.get(), at))
                high.set(b.maximum(high.get(), at))
                is_same = self.segments[slot].equals(first)
                segment.set(b.select(is_same, segment.get(), _MIXED_KEYS))
            self.panel_low[panel], self.panel_high[panel] = low.get(), high.get()
            self.panel_segment[panel] = segment.get()


@dataclasses.dataclass(frozen=True)
class Meeting:
    """Groups of rows of a tile and panels of keys of a block.

    Attributes:
      tile: Rows.
      block: Keys.
      first: For each group, the first panel that some row sees.
      behind: For each group, the panel behind the last one; 0 if there is none.
    """

    tile: QueryTile
    block: KeyBlock
    first: Pointer
    behind: Pointer

    @classmethod
    def create(cls, b: Builder, tile: QueryTile, block: KeyBlock) -> Meeting:
        """Allocates the tables."""
        groups = tile.size // tile_rows()
        return cls(tile, block, b.int_buffer(groups), b.int_buffer(groups))

    def clear(self, b: Builder) -> None:
        """Forgets what was seen."""
        with b.loop(0, self.tile.num_groups.get()) as group:
            self.first[group], self.behind[group] = _NO_KEY, 0

    def note(self, b: Builder, group: Value, panel: Value) -> None:
        """A group sees a panel."""
        self.first[group] = b.minimum(self.first[group], panel)
        self.behind[group] = b.maximum(self.behind[group], panel + 1)

    def _places(self, group: Value, panel: Value) -> tuple[Value, ...]:
        tile, block = self.tile, self.block
        rows = (tile.group_low[group], tile.group_high[group], tile.group_segment[group])
        return (*rows, block.panel_low[panel], block.panel_high[panel], block.panel_segment[panel])

    def is_apart(self, group: Value, panel: Value) -> Value:
        """Whether surely no row of a group sees a key of a panel."""
        row_low, row_high, row_segment, low, high, segment = self._places(group, panel)
        differ = row_segment.differs(segment)
        differ = differ & row_segment.differs(_MIXED_ROWS) & segment.differs(_MIXED_KEYS)
        apart = (row_high < low) | differ
        if (window := self.tile.spec.sliding_window) is not None:
            apart = apart | (row_low - high >= window)
        return apart

    def is_whole(self, group: Value, panel: Value) -> Value:
        """Whether surely every row of a group sees every key of a panel."""
        row_low, row_high, row_segment, low, high, segment = self._places(group, panel)
        whole = (row_low >= high) & row_segment.equals(segment)
        if (window := self.tile.spec.sliding_window) is not None:
            whole = whole & (row_high - low < window)
        return whole

    def mask(self, b: Builder, group: Value, panel: Value, sums: Sums, masked: float) -> Sums:
        """Puts `masked` where a row does not see a key."""
        slot = panel * panel_columns()
        found = []
        for n, line in enumerate(sums):
            row = group * tile_rows() + n
            own, segment = b.int32(self.tile.positions[row]), b.int32(self.tile.segments[row])
            found.append([])
            for m, value in enumerate(line):
                at = self.block.positions.vector(slot + m * b.lanes, b.lanes)
                seen = (at <= own) & self.block.segments.vector(slot + m * b.lanes, b.lanes).equals(
                    segment
                )
                if (window := self.tile.spec.sliding_window) is not None:
                    seen = seen & (own - at < window)
                found[-1].append(b.select(seen, value, masked))
        return found


def multiply(b: Builder, rows: Rows, depth: Number, panel: Pointer, panel_stride: int) -> Sums:
    """A group of rows times a panel."""
    sums = b.zeros(tile_rows(), panel_columns() // b.lanes)
    multiply_tile(b, rows, tile_rows(), depth, panel, sums, panel_stride)
    return [[variable.get() for variable in line] for line in sums]


def store(b: Builder, sums: Sums, place: Pointer, stride: int) -> None:
    """Stores a group of rows and a panel."""
    for n, line in enumerate(sums):
        for m, value in enumerate(line):
            place.store(n * stride + m * b.lanes, value)


def store_same(b: Builder, value: float, place: Pointer, stride: int) -> None:
    """Stores one number everywhere in a group of rows and a panel."""
    store(b, [[b.splat(value)] * (panel_columns() // b.lanes)] * tile_rows(), place, stride)


def copy_tokens(
    b: Builder, spec: Attention, pool: Pointer, block: KeyBlock, target: Pointer, scale: float
) -> Value:
    """Copies the keys or values of a block to [slots, head dim] and scales them.

    Args:
      b: Where the code goes.
      spec: What the code depends on.
      pool: Of the head.
      block: Names the tokens.
      target: Lines `spec.stride` apart.
      scale: Factor.

    Returns:
      NaN if one of them is not finite, else zero.
    """
    parts = pieces(spec.head_dim, b.lanes)
    counts = collections.Counter(lanes for _, lanes in parts)
    checks = {
        lanes: [b.variable(b.splat(0.0, lanes)) for _ in range(min(count, 4))]
        for lanes, count in counts.items()
    }  # several, since a sum waits for the one before
    with b.loop(0, block.count.get()) as slot:
        line = pool.at(block.tokens[slot] * spec.key_stride)
        for n, (offset, lanes) in enumerate(parts):
            value, check = line.vector(offset, lanes), checks[lanes][n % len(checks[lanes])]
            check.set(b.fma(value, b.splat(0.0, lanes), check.get()))
            target.store(slot * spec.stride + offset, value * scale if scale != 1.0 else value)
    return flag_not_finite(b, [check.get() for each in checks.values() for check in each])


def clear_not_finite(
    b: Builder, spec: Attention, block: KeyBlock, lines: Pointer, flags: Pointer
) -> None:
    """Makes copied tokens that are not finite zero, and their flags NaN, others' zero.

    Rows that do not see them meet them with probability zero, and 0 * NaN is NaN.
    """
    with b.loop(0, block.count.get()) as slot:
        line = lines.at(slot * spec.stride)
        parts = pieces(spec.head_dim, b.lanes)
        flag = flag_not_finite(b, [line.vector(offset, lanes) for offset, lanes in parts])
        flags[slot] = flag
        with b.when(flag.is_nan()):
            for offset, lanes in parts:
                line.store(offset, b.splat(0.0, lanes))


def flag_rows(
    b: Builder, tile: QueryTile, block: KeyBlock, key_flags: Pointer, flags: Pointer
) -> None:
    """Makes the flags of rows NaN that see a key whose flag is NaN."""
    with b.loop(0, block.count.get()) as slot, b.when(key_flags[slot].is_nan()):
        with b.loop(0, tile.num_groups.get() * tile_rows()) as row:
            with b.when(tile.sees(row, block.positions[slot], block.segments[slot])):
                flags[row] = key_flags[slot]


def pack_transposed(
    b: Builder, spec: Attention, pool: Pointer, tokens: Pointer, panel: Pointer
) -> None:
    """Copies the keys or values of a panel of tokens to [head dim, panel columns]."""
    full = panel_columns()
    whole = spec.head_dim // b.lanes * b.lanes
    for first in range(0, full, b.lanes):
        lines = [pool.at(tokens[first + n] * spec.key_stride) for n in range(b.lanes)]
        with b.loop(0, whole, b.lanes) as k:
            for n, line in enumerate(transpose(b, [line.vector(k, b.lanes) for line in lines])):
                panel.store((k + n) * full + first, line)
        if whole < spec.head_dim:
            with b.loop(whole, spec.head_dim) as k:
                for n, line in enumerate(lines):
                    panel[k * full + first + n] = line[k]


def store_masked(
    b: Builder,
    meeting: Meeting,
    pair: tuple[Value, Value],
    sums: Sums,
    place: Pointer,
    stride: int,
    masked: float,
) -> None:
    """Stores numbers of a group and a panel, `masked` where a key is not seen."""
    with b.either(meeting.is_whole(*pair)) as (yes, no):
        with yes:
            store(b, sums, place, stride)
        with no:
            store(b, meeting.mask(b, *pair, sums, masked), place, stride)
