"""A finetuning job as the scheduler sees it: batches, groups, windows and tiles.

A group is a few sequences that lie in the arena at once, as one flat stream of rows. Forward takes
the stream from its first row to its last, backward from its last to its first, in pieces of any
size; pieces need not respect the borders of sequences (short ones are packed, long ones cut). Two
groups of a batch can be under way at once: one forward, the one before it backward.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import numpy as np

from flexjax.config import FinetuneConfig


@dataclasses.dataclass(frozen=True, eq=False)
class TrainSequence:
    """One tokenized row of a dataset.

    Attributes:
      tokens: Token ids, int32 [S].
      targets: Token that each position must predict, -1 where none counts, int32 [S].
    """

    tokens: np.ndarray
    targets: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def num_targets(self) -> int:
        """Positions that bear loss."""
        return int((self.targets >= 0).sum())


@dataclasses.dataclass(eq=False)
class Group:
    """Sequences in the arena, as one flat stream of rows.

    Attributes:
      run: The job.
      sequences: In stream order.
      is_eval: Whether only the loss is wanted.
      kv_pages: KV pages of each sequence; empty before the group is placed.
      arena_pages: Arena pages of each sequence.
      forward_end: Rows [0, forward_end) have been through the forward pass.
      backward_start: Rows [backward_start, ...) have been through the backward pass: of all
        layers in window-major order, of the layers from `top` in layer-major order.
      top: Layers [top, L) are done for the current window (or, layer-major, for all rows).
      window: Current window (start, length) in window-major order, None between windows.
      cut_windows: What was cut off from windows that had begun, when a step had room for fewer
        rows: (start, length, top) of rows that go on from layer `top` once later ones are done.
    """

    run: TrainingRun
    sequences: list[TrainSequence]
    is_eval: bool
    kv_pages: list[list[int]] = dataclasses.field(default_factory=list)
    arena_pages: list[list[int]] = dataclasses.field(default_factory=list)
    forward_end: int = 0
    backward_start: int = 0
    top: int = 0
    window: tuple[int, int] | None = None
    cut_windows: list[tuple[int, int, int]] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        lengths = [len(sequence) for sequence in self.sequences]
        self.offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        self.segment_of_row = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
        self.tokens = np.concatenate([s.tokens for s in self.sequences]).astype(np.int32)
        self.targets = np.concatenate([s.targets for s in self.sequences]).astype(np.int32)
        self.positions = np.concatenate([np.arange(n, dtype=np.int32) for n in lengths])
        self._bounds: tuple[int, np.ndarray, np.ndarray] | None = None
        self._mean_context = float(self.positions.mean()) + 1.0
        # Sums over the rows before each, and over all: every step asks for those of some rows.
        self._seen_before = np.concatenate([[0], np.cumsum(self.positions + 1, dtype=np.int64)])
        self._targets_before = np.concatenate([[0], np.cumsum(self.targets >= 0)])
        self.rewind()

    @property
    def num_rows(self) -> int:
        """Rows of the stream."""
        return len(self.tokens)

    @property
    def mean_context(self) -> float:
        """Tokens that a row sees, on average: half its sequence."""
        return self._mean_context

    def num_seen(self, start: int, length: int) -> int:
        """Tokens that rows [start, start + length) see, summed over rows."""
        return int(self._seen_before[start + length] - self._seen_before[start])

    def num_targets(self, start: int, length: int) -> int:
        """Rows of [start, start + length) that bear loss."""
        return int(self._targets_before[start + length] - self._targets_before[start])

    def page_span(self, origin: int, start: int, length: int, page_size: int) -> tuple[int, int]:
        """Which pages rows [start, start + length) see, those before them in their sequences too.

        Args:
          origin: Row whose sequence's first page counts as page 0.
          start: First row.
          length: Rows, at least 1.
          page_size: Tokens of a page.

        Returns:
          Index of the first page and of the one behind the last, among the group's pages.
        """
        begin, end = self._page_bounds(page_size)
        zero = int(begin[origin])
        return int(begin[start]) - zero, int(end[start + length - 1]) - zero

    def _page_bounds(self, page_size: int) -> tuple[np.ndarray, np.ndarray]:
        """For each row: its sequence's first page, and the page behind its own."""
        if self._bounds is None or self._bounds[0] != page_size:
            pages = -(-np.diff(self.offsets) // page_size)
            begin = np.repeat(np.cumsum(pages) - pages, np.diff(self.offsets))
            self._bounds = page_size, begin, begin + self.positions // page_size + 1
        return self._bounds[1:]

    @property
    def is_placed(self) -> bool:
        """Whether the group has pages."""
        return bool(self.arena_pages)

    @property
    def has_forward(self) -> bool:
        """Whether rows are left for the forward pass."""
        return self.forward_end < self.num_rows

    @property
    def in_backward(self) -> bool:
        """Whether the backward pass has begun and not ended."""
        return not self.has_forward and not self.is_done

    @property
    def has_sums(self) -> bool:
        """Whether the job's partial sums hold gradients of this group."""
        is_below = self.backward_start < self.num_rows or self.top < self.run.num_layers
        return not self.is_eval and (is_below or self.window is not None)

    @property
    def is_done(self) -> bool:
        """Whether the last tile has been planned."""
        return not self.has_forward and self.backward_start == 0 and self.top <= self.run.bottom

    def rewind(self) -> None:
        """Starts over: nothing has been computed."""
        self.forward_end = 0
        self.backward_start = self.num_rows
        self.top = self.run.num_layers
        self.window = None
        self.cut_windows = []

    def place(self, kv_pages: list[list[int]], arena_pages: list[list[int]], page: int) -> None:
        """Takes pages and derives each row's slots (page * page size + offset)."""
        self.kv_pages, self.arena_pages = kv_pages, arena_pages
        pages = np.array([*itertools.chain(*kv_pages, *arena_pages)], np.int32)
        slots = pages.reshape(2, -1, 1) * page + np.arange(page, dtype=np.int32)
        slots, start, parts = slots.reshape(2, -1), 0, []
        for owned, sequence in zip(kv_pages, self.sequences, strict=True):
            parts.append(slots[:, start : start + len(sequence)])
            start += len(owned) * page
        self.kv_slots, self.arena_slots = np.concatenate(parts, axis=1)

    def unplace(self) -> tuple[list[int], list[int]]:
        """Gives up its pages and its progress; returns KV pages and arena pages."""
        kv, arena = [*itertools.chain(*self.kv_pages)], [*itertools.chain(*self.arena_pages)]
        self.kv_pages, self.arena_pages = [], []
        self.rewind()
        return kv, arena


class TrainingRun:
    """The batches of one job, in order, and where it is in them.

    Attributes:
      run_id: Number of the job.
      config: The job's configuration.
      slot: Working slot in the bank.
      num_layers: L of the model.
      bottom: Lowest layer with a trainable parameter; backward stops there.
      total_steps: Optimizer steps of the whole job.
      step: Optimizer steps planned so far.
      epoch: Epoch of the current batch, from 0.
      groups: Groups of the current batch that are not done, in order.
      service_rows: Rows that the job has been given, for sharing among jobs.
      is_paused: Whether new groups are held back.
    """

    def __init__(
        self,
        run_id: int,
        config: FinetuneConfig,
        sequences: list[TrainSequence],
        eval_sequences: list[TrainSequence],
        *,
        slot: int,
        num_layers: int,
        bottom: int,
        group_rows: int,
        arena_tokens: int,
        page_size: int,
    ):
        self.run_id = run_id
        self.config = config
        self.slot = slot
        self.num_layers = num_layers
        self.bottom = bottom
        self.is_paused = False
        self.step = 0
        self.epoch = 0
        self.service_rows = 0.0
        self.groups: list[Group] = []
        self.eval_groups: list[Group] = []
        self.eval_targets = sum(s.num_targets for s in eval_sequences)
        self._sequences = sequences
        self._eval_sequences = eval_sequences
        self._group_rows = group_rows
        self._arena_tokens = arena_tokens
        self._page_size = page_size
        full, rest = divmod(len(sequences), config.batch_size)
        self.steps_per_epoch = full + (1 if rest and not config.drop_last else 0)
        total = self.steps_per_epoch * config.epochs
        self.total_steps = total if config.max_steps is None else config.max_steps
        self._batches = self._make_batches()
        self._batch: list[TrainSequence] | None = None
        self._batch_epoch = 0
        self._evals_due = 0
        self._planned_eval_at = -1

    def _make_batches(self) -> Iterator[tuple[int, list[TrainSequence]]]:
        size, epoch = self.config.batch_size, 0
        while True:
            order = np.arange(len(self._sequences))
            if self.config.shuffle:
                np.random.default_rng([self.config.seed, epoch]).shuffle(order)
            for index in range(self.steps_per_epoch):
                chosen = order[index * size : (index + 1) * size]
                yield epoch, [self._sequences[i] for i in chosen]
            epoch += 1

    @property
    def is_exhausted(self) -> bool:
        """Whether every optimizer step, and every evaluation, has been planned."""
        is_trained = self.step >= self.total_steps and not self.groups
        return is_trained and not self.eval_groups and not self._eval_is_due()

    @property
    def batch_targets(self) -> int:
        """Target tokens of the current batch."""
        return sum(s.num_targets for s in self._batch or [])

    @property
    def batch_tokens(self) -> int:
        """Tokens of the current batch."""
        return sum(len(s) for s in self._batch or [])

    def refill(self) -> None:
        """Begins the next batch, or an evaluation that is due, once the one before is done."""
        if self.groups or self.eval_groups or self.is_paused:
            return
        if self._eval_is_due():
            self._planned_eval_at = self.step
            self.eval_groups = self._group(self._eval_sequences, is_eval=True)
        elif self.step < self.total_steps:
            self.epoch, self._batch = next(self._batches)
            self.groups = self._group(self._batch, is_eval=False)

    def _eval_is_due(self) -> bool:
        if not self._eval_sequences or self.step == self._planned_eval_at:
            return False
        if self.step == self.total_steps:
            return True
        every = self.config.eval_every or self.steps_per_epoch
        return self.step > 0 and self.step % every == 0

    def _group(self, sequences: list[TrainSequence], *, is_eval: bool) -> list[Group]:
        """Packs sequences, in order, as long as a group's rows fit into the widest window.

        One row more would be a window of its own, which takes far more than a row's time.
        """
        groups: list[Group] = []
        current: list[TrainSequence] = []
        rows = tokens = 0
        for sequence in sequences:
            needed = -(-len(sequence) // self._page_size) * self._page_size
            is_full = (
                rows + len(sequence) > self._group_rows or tokens + needed > self._arena_tokens
            )
            if current and is_full:
                groups.append(Group(self, current, is_eval))
                current, rows, tokens = [], 0, 0
            current.append(sequence)
            rows += len(sequence)
            tokens += needed
        groups.append(Group(self, current, is_eval))
        return groups

    def has_work(self) -> bool:
        """Whether anything is left to plan that is not held back."""
        return not self.is_exhausted and bool(self.active_groups or not self.is_paused)

    @property
    def active_groups(self) -> list[Group]:
        """Groups of the batch (or evaluation) under way, in order."""
        return self.eval_groups or self.groups

    def remove(self, group: Group) -> None:
        """Takes a finished group off the list."""
        (self.eval_groups if group.is_eval else self.groups).remove(group)
