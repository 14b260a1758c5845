"""Code of paged attention for the CPU: ragged rows in tiles, and one row a sequence."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from pallas_kernels._llvm.builder import Builder, Pointer, Value
from pallas_kernels._llvm.compile import Body
from pallas_kernels._llvm.packing import Rows, panel_columns, tile_rows, transpose
from pallas_kernels._llvm.vector import exp
from pallas_kernels.paged_attention.llvm_blocks import (
    KeyBlock,
    Meeting,
    Pages,
    QueryTile,
    clear_not_finite,
    copy_tokens,
    fill,
    flag_rows,
    multiply,
    pack_transposed,
    store_masked,
    store_same,
)
from pallas_kernels.paged_attention.llvm_shapes import (
    MAX_BYTES,
    Attention,
    ceil_div,
    padded_stride,
    pieces,
    row_tiles,
)
from pallas_kernels.paged_attention.reference import MASKED

_FORWARD_TILES = ((96, 192), (96, 96), (48, 96), (48, 64), (24, 64), (24, 32), (12, 32))
_DECODE_KEYS = 128


@dataclasses.dataclass(frozen=True)
class OnlineSoftmax:
    """Sums of rows over the blocks so far.

    Attributes:
      maximum: Of each row's scores.
      total: Of each row's exponentials.
      decay: What a row's sums before the last block are multiplied with.
    """

    maximum: Pointer
    total: Pointer
    decay: Pointer

    @classmethod
    def create(cls, b: Builder, size: int) -> OnlineSoftmax:
        """Rows that have seen nothing."""
        size = ceil_div(size, b.lanes) * b.lanes
        maximum, total, decay = (b.buffer(size) for _ in range(3))
        fill(b, maximum, size, MASKED)
        fill(b, total, size, 0.0)
        return cls(maximum, total, decay)

    def add(self, b: Builder, row: Value, line: Pointer, start: Value, stop: Value) -> None:
        """Turns a row's scores into exponentials; `start` and `stop` are whole panels.

        What is masked becomes zero, and so does what has overflown to minus infinity.
        """
        full, lanes, old = panel_columns(), b.lanes, self.maximum[row]
        offsets = range(0, full, lanes)
        highest = [b.variable(b.splat(old)) for _ in offsets]
        with b.loop(start, stop, full) as slot:
            for offset, variable in zip(offsets, highest, strict=True):
                variable.set(b.maximum(line.vector(slot + offset, lanes), variable.get()))
        most = highest[0].get()
        for variable in highest[1:]:
            most = b.maximum(most, variable.get())
        new = b.reduce("fmax", most)
        sums = [b.variable(b.splat(0.0)) for _ in offsets]
        with b.loop(start, stop, full) as slot:
            for offset, variable in zip(offsets, sums, strict=True):
                score = line.vector(slot + offset, lanes)
                prob = b.select(score <= MASKED, 0.0, exp(b, score - new))
                line.store(slot + offset, prob)
                variable.set(variable.get() + prob)
        added = sums[0].get()
        for variable in sums[1:]:
            added = added + variable.get()
        decay = exp(b, old - new)
        self.total[row] = b.fma(self.total[row], decay, b.reduce("fadd", added))
        self.maximum[row], self.decay[row] = new, decay

    def saw_nothing(self, b: Builder, row: Value) -> Value:
        """Whether all was masked; not where a score was NaN."""
        total = self.total[row]
        return (self.maximum[row] <= MASKED) & total.equals(total)


def forward_tile(spec: Attention) -> tuple[int, int, int]:
    """Rows of a tile of `ragged_attention`, number of tiles, keys of a block."""
    for rows, keys in _FORWARD_TILES:
        lines = 2 * rows + keys
        size = lines * spec.stride + rows * padded_stride(keys) + spec.head_dim * panel_columns()
        if 4 * size <= MAX_BYTES:
            break
    return *row_tiles(spec.num_rows, rows), keys


def ragged_attention(spec: Attention) -> Body:
    """Code of one tile of rows of one KV head; the tasks are tiles x KV heads."""
    size, count, keys = forward_tile(spec)

    def body(b: Builder, task: Value, *buffers: Pointer) -> None:
        q, k_pool, v_pool, layer, num_pages, entries, segments, starts, *rest = buffers
        row_segments, row_positions, out, lse = rest
        head = task % spec.num_kv_heads
        first = (b.integer(count - 1) - task // spec.num_kv_heads) * size  # long ones first
        pages = Pages(entries, segments, starts, num_pages[0], layer[0])
        pools = [pool.at(head * spec.head_dim) for pool in (k_pool, v_pool)]
        tile = QueryTile(b, spec, size)
        tile.read(row_segments, row_positions, first)
        work = _ForwardTile(b, spec, tile, KeyBlock(b, spec, keys))
        work.read_queries(q, first, head)
        with work.meeting.block.each(pages, tile.ranges(), 0):
            work.add_block(*pools)
        work.finish(out, lse, first, head)

    return body


class _ForwardTile:
    """A tile of rows on its way through the blocks of keys."""

    def __init__(self, b: Builder, spec: Attention, tile: QueryTile, block: KeyBlock):
        self.b, self.spec, self.tile = b, spec, tile
        self.meeting = Meeting.create(b, tile, block)
        self.score_stride = padded_stride(block.size)
        self.queries, self.acc = (b.buffer(tile.size * spec.stride) for _ in range(2))
        self.scores = b.buffer(tile.size * self.score_stride)
        self.values = b.buffer(block.size * spec.stride)
        self.panel = b.buffer(spec.head_dim * panel_columns())
        self.softmax = OnlineSoftmax.create(b, tile.size)
        self.flags, self.key_flags = b.buffer(tile.size + b.lanes), b.buffer(block.size)
        fill(b, self.flags, tile.size, 0.0)
        fill(b, self.acc, tile.size * spec.stride, 0.0)
        fill(b, self.queries, tile.size * spec.stride, 0.0)
        fill(b, self.values, block.size * spec.stride, 0.0)

    def read_queries(self, q: Pointer, first: Value, head: Value) -> None:
        """Copies and scales the rows."""
        b, spec = self.b, self.spec
        count = self.tile.count(first)
        with b.loop(0, count) as n:
            line, target = q.at(spec.row_offset(b, first + n, head)), n * spec.stride
            for offset, lanes in pieces(spec.head_dim, b.lanes):
                self.queries.store(target + offset, line.vector(offset, lanes) * spec.sm_scale)

    def add_block(self, keys: Pointer, values: Pointer) -> None:
        """Adds what the rows see of a block."""
        b, tile, block = self.b, self.tile, self.meeting.block
        self._score(keys)
        with b.loop(0, tile.num_groups.get() * tile_rows()) as row:
            group = row // tile_rows()
            first, behind = self.meeting.first[group], self.meeting.behind[group]
            with b.when(first < behind):
                line = self.scores.at(row * self.score_stride)
                full = panel_columns()
                self.softmax.add(b, row, line, first * full, behind * full)
        flag = copy_tokens(b, self.spec, values, block, self.values, 1.0)
        with b.when(flag.is_nan()):
            clear_not_finite(b, self.spec, block, self.values, self.key_flags)
            flag_rows(b, tile, block, self.key_flags, self.flags)
        self._add_values()

    def _score(self, keys: Pointer) -> None:
        b, spec, meeting = self.b, self.spec, self.meeting
        full, stride = panel_columns(), self.score_stride
        meeting.clear(b)
        with b.loop(0, meeting.block.num_panels) as panel:
            pack_transposed(b, spec, keys, meeting.block.tokens.at(panel * full), self.panel)
            with b.loop(0, self.tile.num_groups.get()) as group:
                row = group * tile_rows()
                place = self.scores.at(row * stride + panel * full)
                with b.either(meeting.is_apart(group, panel)) as (yes, no):
                    with yes:
                        store_same(b, MASKED, place, stride)
                    with no:
                        meeting.note(b, group, panel)
                        rows = Rows(self.queries.at(row * spec.stride), spec.stride)
                        sums = multiply(b, rows, spec.head_dim, self.panel, full)
                        store_masked(b, meeting, (group, panel), sums, place, stride, MASKED)

    def _add_values(self) -> None:
        b, spec, meeting, full = self.b, self.spec, self.meeting, panel_columns()
        with b.loop(0, spec.width, full) as column:
            with b.loop(0, self.tile.num_groups.get()) as group:
                first, behind = meeting.first[group] * full, meeting.behind[group] * full
                with b.when(first < behind):
                    row = group * tile_rows()
                    depth = b.minimum(behind, meeting.block.count.get()) - first
                    rows = Rows(self.scores.at(row * self.score_stride + first), self.score_stride)
                    panel = self.values.at(first * spec.stride + column)
                    sums = multiply(b, rows, depth, panel, spec.stride)
                    for n, line in enumerate(sums):
                        decay = b.splat(self.softmax.decay[row + n])
                        place = self.acc.at((row + n) * spec.stride + column)
                        for m, value in enumerate(line):
                            old = place.vector(m * b.lanes, b.lanes)
                            place.store(m * b.lanes, b.fma(old, decay, value))

    def finish(self, out: Pointer, lse: Pointer, first: Value, head: Value) -> None:
        """Divides by the sums of exponentials and stores the rows."""
        b, spec = self.b, self.spec
        count = self.tile.count(first)
        with b.loop(0, count) as n:
            is_empty = self.softmax.saw_nothing(b, n)
            total = b.select(is_empty, 1.0, self.softmax.total[n])
            place = spec.row_offset(b, first + n, head)
            for offset, lanes in pieces(spec.head_dim, b.lanes):
                value = self.acc.vector(n * spec.stride + offset, lanes) / total
                value = value + b.splat(self.flags[n], lanes)
                zero = b.splat(0.0, lanes)
                out.store(place + offset, b.select(is_empty, zero, value))
            log = b.intrinsic("llvm.log", total)
            lse[place // spec.head_dim] = self.softmax.maximum[n] + log


def decode_heads(spec: Attention, num_threads: int) -> int:
    """KV heads of a task of `decode_attention`.

    All heads of a token lie together, and memory is read fastest where much that lies together is
    wanted, so it is as many as leave every thread two tasks.
    """
    divisors = (n for n in range(spec.num_kv_heads, 0, -1) if spec.num_kv_heads % n == 0)
    wanted = 2 * num_threads
    return next((n for n in divisors if spec.num_tokens * spec.num_kv_heads // n >= wanted), 1)


def decode_attention(spec: Attention, heads: int) -> Body:
    """Code of some KV heads of one sequence; the tasks are sequences x KV heads / `heads`."""
    parts = spec.num_kv_heads // heads

    def body(b: Builder, task: Value, *buffers: Pointer) -> None:
        q, k_pool, v_pool, layer, table, positions, out = buffers
        row, head = task // parts, task % parts * heads
        place = (row * spec.num_heads + head * spec.groups) * spec.head_dim
        pools = [pool.at(head * spec.head_dim) for pool in (k_pool, v_pool)]
        work = _DecodeRow(b, spec, heads, pools)
        work.read_queries(q.at(place))
        limit = spec.list_len * spec.page_size
        behind = b.minimum(positions[row] + 1, b.integer(limit))
        first = b.integer(0)
        if spec.sliding_window is not None:
            first = b.maximum(positions[row] + 1 - spec.sliding_window, first)
        start = first // _DECODE_KEYS * _DECODE_KEYS
        with b.loop(start, behind, _DECODE_KEYS) as block:
            begin = b.maximum(block, first)
            end = b.minimum(block + _DECODE_KEYS, behind)
            work.add_block(table.at(row * spec.list_len), layer[0], begin, end)
        work.finish(out.at(place))

    return body


class _DecodeRow:
    """The query heads of one token and some KV heads on their way through blocks of keys."""

    def __init__(self, b: Builder, spec: Attention, heads: int, pools: Sequence[Pointer]):
        self.b, self.spec, self.heads, (self.keys, self.values) = b, spec, heads, pools
        self.num_queries = heads * spec.groups
        self.size = _DECODE_KEYS + panel_columns()
        self.tokens = b.int_buffer(self.size)
        self.count = b.variable(0)
        self.scores = b.buffer(self.num_queries * self.size)
        self.queries, self.acc = (b.buffer(self.num_queries * spec.stride) for _ in range(2))
        self.softmax = OnlineSoftmax.create(b, self.num_queries)
        fill(b, self.acc, self.num_queries * spec.stride, 0.0)

    def read_queries(self, q: Pointer) -> None:
        """Copies and scales the query heads."""
        b, spec = self.b, self.spec
        with b.loop(0, self.num_queries) as n:
            for offset, lanes in pieces(spec.head_dim, b.lanes):
                value = q.vector(n * spec.head_dim + offset, lanes) * spec.sm_scale
                self.queries.store(n * spec.stride + offset, value)

    def add_block(self, table: Pointer, layer: Value, begin: Value, end: Value) -> None:
        """Adds the keys at positions `begin` to `end`, whose pages the table names."""
        b, spec = self.b, self.spec
        self.count.set(b.integer(0))
        with b.loop(begin, end) as position:
            page = table[position // spec.page_size]
            token = (layer * spec.pool_pages + page) * spec.page_size + position % spec.page_size
            slot = self.count.get()
            self.tokens[slot] = token
            self.count.set(slot + b.select(page >= 0, b.integer(1), 0))
        count = self.count.get()
        with b.when(count > 0):
            full = panel_columns()
            padded = (count + (full - 1)) // full * full
            with b.loop(count, padded) as slot:
                self.tokens[slot] = self.tokens[count - 1]
            self._score(padded)
            with b.loop(0, self.num_queries) as n:
                line = self.scores.at(n * self.size)
                with b.loop(count, padded) as slot:
                    line[slot] = MASKED
                self.softmax.add(b, n, line, b.integer(0), padded)
                for part in _split(pieces(spec.head_dim, b.lanes), 8):
                    self._add_values(n, line, part)

    def _score(self, count: Value) -> None:
        """Scores of as many keys as vectors have lanes at a time."""
        b, spec = self.b, self.spec
        whole = spec.head_dim // b.lanes * b.lanes
        spare = b.buffer(b.lanes)
        with b.loop(0, count, b.lanes) as slot:
            places = [self.tokens[slot + n] * spec.key_stride for n in range(b.lanes)]
            with b.loop(0, self.num_queries) as n:
                start = n // spec.groups * spec.head_dim
                lines = [self.keys.at(place + start) for place in places]
                query = self.queries.at(n * spec.stride)
                sums = b.zeros(b.lanes)
                with b.loop(0, whole, b.lanes) as k:
                    left = query.vector(k, b.lanes)
                    for line, variable in zip(lines, sums, strict=True):
                        variable.set(b.fma(line.vector(k, b.lanes), left, variable.get()))
                score = b.variable(_add_up(transpose(b, [each.get() for each in sums])))
                if whole < spec.head_dim:
                    with b.loop(whole, spec.head_dim) as k:
                        for m, line in enumerate(lines):
                            spare[m] = line[k]
                        right = spare.vector(0, b.lanes)
                        score.set(b.fma(right, b.splat(query[k]), score.get()))
                self.scores.store(n * self.size + slot, score.get())

    def _add_values(self, n: Value, line: Pointer, part: list[tuple[int, int]]) -> None:
        b, spec = self.b, self.spec
        sums = [b.variable(b.splat(0.0, lanes)) for _, lanes in part]
        base = self.values.at(n // spec.groups * spec.head_dim)
        with b.loop(0, self.count.get()) as slot:
            prob = line[slot]
            values = base.at(self.tokens[slot] * spec.key_stride)
            for (offset, lanes), variable in zip(part, sums, strict=True):
                value = values.vector(offset, lanes)
                variable.set(b.fma(value, b.splat(prob, lanes), variable.get()))
        decay = self.softmax.decay[n]
        for (offset, lanes), variable in zip(part, sums, strict=True):
            place = n * spec.stride + offset
            old = self.acc.vector(place, lanes)
            self.acc.store(place, b.fma(old, b.splat(decay, lanes), variable.get()))

    def finish(self, out: Pointer) -> None:
        """Divides by the sums of exponentials and stores the heads."""
        b, spec = self.b, self.spec
        with b.loop(0, self.num_queries) as n:
            total = self.softmax.total[n]
            total = b.select(total.equals(0.0), 1.0, total)
            for offset, lanes in pieces(spec.head_dim, b.lanes):
                value = self.acc.vector(n * spec.stride + offset, lanes) / total
                out.store(n * spec.head_dim + offset, value)


def _add_up(vectors: list[Value]) -> Value:
    """Sum of vectors, in a tree."""
    while len(vectors) > 1:
        half = len(vectors) // 2
        vectors = [a + b for a, b in zip(vectors[:half], vectors[half:], strict=True)]
    return vectors[0]


def _split(items: list, size: int) -> list[list]:
    return [items[start : start + size] for start in range(0, len(items), size)]
