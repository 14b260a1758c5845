"""Code of the attention backward for the CPU: blocks of keys against tiles of query rows.

A task is one KV head, so that no two tasks add to the same key. What it holds of a tile and a block
is one matrix, which is P = exp(scores - lse) first and then dS = P (dP - delta) in its place.
"""

from __future__ import annotations

from collections.abc import Callable

from pallas_kernels._llvm.builder import Builder, Pointer, Value
from pallas_kernels._llvm.compile import Body
from pallas_kernels._llvm.packing import Rows, panel_columns, tile_rows
from pallas_kernels._llvm.vector import exp
from pallas_kernels.paged_attention.llvm_blocks import (
    KeyBlock,
    Meeting,
    Pages,
    QueryTile,
    Ranges,
    clear_not_finite,
    copy_tokens,
    fill,
    flag_not_finite,
    flag_rows,
    multiply,
    pack_transposed,
    store,
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

_TILES = ((96, 96), (48, 96), (48, 64), (24, 64), (24, 32), (12, 32))
_MIN_TASKS = 4


def backward_tile(spec: Attention) -> tuple[int, int, int]:
    """Rows of a tile, number of tiles, keys of a block."""
    for rows, keys in _TILES:
        lines = 2 * rows + 3 * keys
        size = lines * spec.stride + 2 * keys * spec.head_dim + rows * padded_stride(keys)
        if 4 * size <= MAX_BYTES:
            break
    return *row_tiles(spec.num_rows, rows), keys


def num_splits(spec: Attention) -> int:
    """Tasks of a KV head: each takes every so many-th block of keys, and has dQ of its own."""
    return ceil_div(_MIN_TASKS, spec.num_kv_heads)


def window_attention_backward(spec: Attention, acc_pages: int) -> Body:
    """Code of one KV head and one of its splits; the tasks are splits x KV heads.

    Args:
      spec: What the code depends on.
      acc_pages: Pages of the accumulators.
    """

    def body(b: Builder, task: Value, *buffers: Pointer) -> None:
        q, out, lse, d_out, k_pool, v_pool, layer, num_pages, *rest = buffers
        entries, segments, starts, row_segments, row_positions, *rest = rest
        acc_layer, acc_list, _, _, dq, dk, dv = rest
        splits, size = num_splits(spec), spec.num_tokens * spec.num_heads * spec.head_dim
        head, split = task % spec.num_kv_heads, task // spec.num_kv_heads
        pages = Pages(entries, segments, starts, num_pages[0], layer[0])
        work = _HeadBackward(b, spec, head, dq.at(split * size))
        work.read_places(row_segments, row_positions)
        work.clear_dq()
        number = b.variable(0)
        with work.block.each(pages, work.ranges, work.num_tiles):
            with b.when((number.get() % splits).equals(split)):
                work.read_keys(*(pool.at(head * spec.head_dim) for pool in (k_pool, v_pool)))
                work.add_tiles(q, out, lse, d_out)
                for acc, sums in ((dk, work.dk), (dv, work.dv)):
                    target = acc.at(head * spec.head_dim)
                    work.add_to(target, sums, acc_list, acc_layer[0] * acc_pages)
            number.set(number.get() + 1)

    return body


class _HeadBackward:
    """The rows and keys of one KV head."""

    def __init__(self, b: Builder, spec: Attention, head: Value, dq: Pointer):
        self.b, self.spec, self.head, self.dq = b, spec, head, dq
        size, self.num_tiles, keys = backward_tile(spec)
        self.tile, self.block = QueryTile(b, spec, size), KeyBlock(b, spec, keys)
        self.meeting = Meeting.create(b, self.tile, self.block)
        self.ranges = Ranges(b, spec, self.num_tiles + 1)
        panels = keys // panel_columns()
        self.panel_first, self.panel_behind = b.int_buffer(panels), b.int_buffer(panels)
        self.queries, self.d_heads = (b.buffer(size * spec.stride) for _ in range(2))
        self.lse, self.delta, self.flags = (b.buffer(size + b.lanes) for _ in range(3))
        self.keys_turned, self.values_turned = (b.buffer(keys * spec.head_dim) for _ in range(2))
        self.keys, self.key_flags = b.buffer(keys * spec.stride), b.buffer(keys)
        self.key_flag = b.variable(0.0)
        self.num_lines = ceil_div(keys, tile_rows()) * tile_rows()
        self.dk, self.dv = (b.buffer(self.num_lines * spec.stride) for _ in range(2))
        self.score_stride = padded_stride(keys)
        self.scores = b.buffer(size * self.score_stride)
        for buffer in (self.queries, self.d_heads):
            fill(b, buffer, size * spec.stride, 0.0)
        fill(b, self.keys, keys * spec.stride, 0.0)

    def read_places(self, segments: Pointer, positions: Pointer) -> None:
        """Reads what tiles may see; the last range is that of all."""
        self.segments, self.positions = segments, positions
        b, spec = self.b, self.spec
        with b.loop(0, spec.num_rows) as row:
            token = row // spec.groups
            for index in (row // self.tile.size, b.integer(self.num_tiles)):
                self.ranges.widen(index, positions[token], segments[token])

    def clear_dq(self) -> None:
        """Makes dQ of the head zero."""
        b, spec = self.b, self.spec
        with b.loop(0, spec.num_rows) as row:
            line = self.dq.at(spec.row_offset(b, row, self.head))
            for offset, lanes in pieces(spec.head_dim, b.lanes):
                line.store(offset, b.splat(0.0, lanes))

    def read_keys(self, keys: Pointer, values: Pointer) -> None:
        """Copies a block of keys and values; dK and dV of the block are zero."""
        b, spec, full = self.b, self.spec, panel_columns()
        with b.loop(0, self.block.num_panels) as panel:
            tokens, place = self.block.tokens.at(panel * full), panel * (spec.head_dim * full)
            pack_transposed(b, spec, keys, tokens, self.keys_turned.at(place))
            pack_transposed(b, spec, values, tokens, self.values_turned.at(place))
        self.key_flag.set(copy_tokens(b, spec, keys, self.block, self.keys, spec.sm_scale))
        with b.when(self.key_flag.get().is_nan()):
            clear_not_finite(b, spec, self.block, self.keys, self.key_flags)
        for buffer in (self.dk, self.dv):
            fill(b, buffer, self.num_lines * spec.stride, 0.0)

    def add_tiles(self, q: Pointer, out: Pointer, lse: Pointer, d_out: Pointer) -> None:
        """Adds what every tile and the block give each other."""
        b = self.b
        with b.loop(0, self.num_tiles) as index:
            with b.when(self.ranges.may_see_block(index, self.block)):
                first = index * self.tile.size
                self.tile.read(self.segments, self.positions, first)
                self._read_rows(q, out, lse, d_out, first)
                self._probs()
                self._add_by_key(self.d_heads, self.dv)
                self._d_scores()
                self._add_by_key(self.queries, self.dk)
                self._each_column(lambda column, width: self._add_dq(column, width, first))
                with b.when(self.key_flag.get().is_nan()):
                    self._show_keys_not_finite(first)

    def _read_rows(
        self, q: Pointer, out: Pointer, lse: Pointer, d_out: Pointer, first: Value
    ) -> None:
        """Copies the rows; those that are not finite become zero, and their lse NaN.

        So NaN comes to the keys that such a row sees, and to no others.
        """
        b, spec = self.b, self.spec
        count, parts = self.tile.count(first), pieces(spec.head_dim, b.lanes)
        with b.loop(0, self.tile.num_groups.get() * tile_rows()) as n:
            # Behind the last row stands that row again: what it gives is masked.
            row = first + b.minimum(n, count - 1)
            place, target = spec.row_offset(b, row, self.head), n * spec.stride
            checks, deltas = [], []
            for offset, lanes in parts:
                query, d_head = (each.vector(place + offset, lanes) for each in (q, d_out))
                self.queries.store(target + offset, query * spec.sm_scale)
                self.d_heads.store(target + offset, d_head)
                checks.append(b.fma(query, b.splat(0.0, lanes), d_head * 0.0))
                deltas.append(out.vector(place + offset, lanes) * d_head)
            flag = flag_not_finite(b, _add_equal(parts, checks))
            self.lse[n] = lse[place // spec.head_dim] + flag
            delta = b.number(0.0)
            for vector in _add_equal(parts, deltas):
                delta = delta + b.reduce("fadd", vector)
            self.delta[n] = delta
            with b.when(flag.is_nan()):
                for offset, lanes in parts:
                    for buffer in (self.queries, self.d_heads):
                        buffer.store(target + offset, b.splat(0.0, lanes))

    def _probs(self) -> None:
        """P of the tile and the block."""
        b, spec, meeting, full = self.b, self.spec, self.meeting, panel_columns()
        meeting.clear(b)
        with b.loop(0, self.block.num_panels) as panel:
            self.panel_first[panel], self.panel_behind[panel] = self.tile.size, 0
            keys = self.keys_turned.at(panel * (spec.head_dim * full))
            with b.loop(0, self.tile.num_groups.get()) as group:
                row = group * tile_rows()
                place = self.scores.at(row * self.score_stride + panel * full)
                with b.either(meeting.is_apart(group, panel)) as (yes, no):
                    with yes:
                        store_same(b, 0.0, place, self.score_stride)
                    with no:
                        meeting.note(b, group, panel)
                        least = b.minimum(self.panel_first[panel], group)
                        self.panel_first[panel], self.panel_behind[panel] = least, group + 1
                        rows = Rows(self.queries.at(row * spec.stride), spec.stride)
                        sums = multiply(b, rows, spec.head_dim, keys, full)
                        probs = []
                        for n, line in enumerate(sums):
                            lse = b.splat(self.lse[row + n])
                            probs.append([exp(b, score - lse) for score in line])
                        pair = (group, panel)
                        store_masked(b, meeting, pair, probs, place, self.score_stride, 0.0)

    def _d_scores(self) -> None:
        """P becomes dS."""
        b, spec, full = self.b, self.spec, panel_columns()
        with b.loop(0, self.block.num_panels) as panel:
            values = self.values_turned.at(panel * (spec.head_dim * full))
            with b.loop(self.panel_first[panel], self.panel_behind[panel]) as group:
                row = group * tile_rows()
                place = self.scores.at(row * self.score_stride + panel * full)
                rows = Rows(self.d_heads.at(row * spec.stride), spec.stride)
                sums = multiply(b, rows, spec.head_dim, values, full)
                for n, line in enumerate(sums):
                    delta = b.splat(self.delta[row + n])
                    for m, d_prob in enumerate(line):
                        at = n * self.score_stride + m * b.lanes
                        prob = place.vector(at, b.lanes)
                        # Not seen is zero, whatever values are there.
                        place.store(at, b.select(prob.equals(0.0), 0.0, prob * (d_prob - delta)))

    def _add_by_key(self, rows: Pointer, target: Pointer) -> None:
        """Adds the matrix, transposed, times the rows to dK or dV."""
        b, spec, full, size = self.b, self.spec, panel_columns(), tile_rows()
        count = self.block.count.get()
        with b.loop(0, spec.width, full) as column:
            with b.loop(0, count, size) as key:
                panel = key // full
                other = b.minimum(key + (size - 1), count - 1) // full
                first = b.minimum(self.panel_first[panel], self.panel_first[other])
                behind = b.maximum(self.panel_behind[panel], self.panel_behind[other])
                with b.when(first < behind):
                    start = first * size
                    left = Rows(
                        self.scores.at(start * self.score_stride + key), 1, self.score_stride
                    )
                    right = rows.at(start * spec.stride + column)
                    sums = multiply(b, left, (behind - first) * size, right, spec.stride)
                    place = target.at(key * spec.stride + column)
                    for n, line in enumerate(sums):
                        for m, value in enumerate(line):
                            at = n * spec.stride + m * b.lanes
                            line[m] = place.vector(at, b.lanes) + value
                    store(b, sums, place, spec.stride)

    def _each_column(self, emit: Callable[[Value, int], None]) -> None:
        """Panels of the head dim: first column and number of columns."""
        b, full = self.b, panel_columns()
        whole = self.spec.head_dim // full * full
        if whole:
            with b.loop(0, whole, full) as column:
                emit(column, full)
        if whole < self.spec.head_dim:
            emit(b.integer(whole), self.spec.head_dim - whole)

    def _add_dq(self, column: Value, width: int, first: Value) -> None:
        """Adds dS times the keys to a panel of dQ."""
        b, spec, full, meeting = self.b, self.spec, panel_columns(), self.meeting
        count = self.tile.count(first)
        with b.loop(0, self.tile.num_groups.get()) as group:
            start, behind = meeting.first[group] * full, meeting.behind[group] * full
            with b.when(start < behind):
                row = group * tile_rows()
                depth = b.minimum(behind, self.block.count.get()) - start
                left = Rows(self.scores.at(row * self.score_stride + start), self.score_stride)
                right = self.keys.at(start * spec.stride + column)
                sums = multiply(b, left, depth, right, spec.stride)
                for n, line in enumerate(sums):
                    with b.when(row + n < count):
                        place = spec.row_offset(b, first + row + n, self.head) + column
                        _add_line(b, self.dq.at(place), line, width)

    def _show_keys_not_finite(self, first: Value) -> None:
        """Makes dQ of rows NaN that see a key that is not finite."""
        b, spec = self.b, self.spec
        fill(b, self.flags, self.tile.size, 0.0)
        flag_rows(b, self.tile, self.block, self.key_flags, self.flags)
        with b.loop(0, self.tile.count(first)) as n:
            with b.when(self.flags[n].is_nan()):
                line = self.dq.at(spec.row_offset(b, first + n, self.head))
                for offset, lanes in pieces(spec.head_dim, b.lanes):
                    line.store(offset, b.splat(self.flags[n], lanes))

    def add_to(self, acc: Pointer, sums: Pointer, acc_list: Pointer, acc_start: Value) -> None:
        """Adds dK or dV of the block to the accumulator's pages that are named."""
        b, spec, block = self.b, self.spec, self.block
        with b.loop(0, block.count.get()) as slot:
            page = acc_list[block.entries[slot]]
            with b.when(page >= 0):
                offset = block.tokens[slot] % spec.page_size
                token = (acc_start + page) * spec.page_size + offset
                line, added = acc.at(token * spec.key_stride), sums.at(slot * spec.stride)
                for start, lanes in pieces(spec.head_dim, b.lanes):
                    line.store(start, line.vector(start, lanes) + added.vector(start, lanes))


def _add_line(b: Builder, place: Pointer, line: list[Value], width: int) -> None:
    """Adds the first `width` numbers of a line of vectors."""
    for offset, lanes in pieces(width, b.lanes):
        value = line[offset // b.lanes]
        if lanes < b.lanes:
            start = offset % b.lanes
            value = b.shuffle(value, value, range(start, start + lanes))
        place.store(offset, place.vector(offset, lanes) + value)


def _add_equal(parts: list[tuple[int, int]], vectors: list[Value]) -> list[Value]:
    """Adds up vectors of the same number of lanes."""
    found: dict[int, Value] = {}
    for (_, lanes), vector in zip(parts, vectors, strict=True):
        found[lanes] = found[lanes] + vector if lanes in found else vector
    return list(found.values())
