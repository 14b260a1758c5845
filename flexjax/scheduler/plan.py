"""What one step holds: plain data between the scheduler and the runner."""

from __future__ import annotations

import collections.abc
import dataclasses
from typing import NamedTuple

import numpy as np

from flexjax.scheduler.sequence import Sequence
from flexjax.scheduler.training import Group, TrainingRun


class DecodeRow(NamedTuple):
    """One row of a sequence whose tokens before it are all computed.

    Attributes:
      sequence: Whose row.
      position: Position of the row's token.
      is_fed: Whether the token is still on the device (sampled by the step before).
    """

    sequence: Sequence
    position: int
    is_fed: bool


class DecodeRows(collections.abc.Sequence[DecodeRow]):
    """The decode rows of a step, as arrays.

    Attributes:
      sequences: Whose rows.
      slots: Slots of the sequences.
      positions: Positions of the rows' tokens.
      is_fed: Whether the token is still on the device.
      adapter_slots: Slots of the adapters, -1 for the base model.
    """

    __slots__ = ("sequences", "slots", "positions", "is_fed", "adapter_slots")

    def __init__(
        self,
        sequences: list[Sequence],
        slots: np.ndarray,
        positions: np.ndarray,
        is_fed: np.ndarray,
        adapter_slots: np.ndarray,
    ):
        self.sequences, self.slots, self.positions = sequences, slots, positions
        self.is_fed, self.adapter_slots = is_fed, adapter_slots

    @classmethod
    def of(cls, rows: collections.abc.Iterable[DecodeRow]) -> DecodeRows:
        """Makes arrays of rows that are given one by one."""
        rows = list(rows)
        sequences = [row.sequence for row in rows]
        return cls(
            sequences,
            np.array([sequence.slot for sequence in sequences], np.int64),
            np.array([row.position for row in rows], np.int64),
            np.array([row.is_fed for row in rows], bool),
            np.array([sequence.request.adapter_slot for sequence in sequences], np.int64),
        )

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        position, is_fed = int(self.positions[index]), bool(self.is_fed[index])
        return DecodeRow(self.sequences[index], position, is_fed)


NO_ROWS = DecodeRows.of(())
"""Of a step that decodes nothing."""


@dataclasses.dataclass(frozen=True)
class PrefillChunk:
    """Rows [start, start + length) of a prompt, or of a prompt and output being recomputed."""

    sequence: Sequence
    start: int
    length: int
    is_last: bool


@dataclasses.dataclass(frozen=True)
class ForwardPiece:
    """Rows [start, start + length) of a group's flat stream, to be kept for backward."""

    group: Group
    start: int
    length: int


@dataclasses.dataclass(frozen=True)
class LossWindow:
    """Rows whose loss, and its gradient at the last layer, is computed before the tile runs."""

    group: Group
    start: int
    length: int


@dataclasses.dataclass(frozen=True)
class BackwardTile:
    """Rows [start, start + length) through layers [top - num_layers, top), downwards."""

    group: Group
    start: int
    length: int
    top: int
    num_layers: int


@dataclasses.dataclass(frozen=True)
class OptimizerStep:
    """An optimizer step that is due after this step's tile.

    Attributes:
      run: Whose.
      step: Its number, from 0.
      num_targets: Target tokens of the batch.
      num_tokens: All tokens of the batch.
      learning_rate: After the schedule.
    """

    run: TrainingRun
    step: int
    num_targets: int
    num_tokens: int
    learning_rate: float


@dataclasses.dataclass(frozen=True)
class EvalResult:
    """An evaluation whose last loss this step holds.

    Attributes:
      run: Whose.
      step: Optimizer steps taken before it.
      num_targets: Target tokens of the evaluation set.
    """

    run: TrainingRun
    step: int
    num_targets: int


@dataclasses.dataclass(frozen=True)
class Discard:
    """A group that lost its pages before it was done.

    Attributes:
      group: The group; it starts over, unless its job has ended.
      arena_pages: Arena pages that it had; whatever was accumulated there is void.
      had_sums: Whether the job's partial sums are this group's, and void too.
    """

    group: Group
    arena_pages: list[int]
    had_sums: bool


@dataclasses.dataclass
class StepPlan:
    """The host's decision for one iteration.

    Attributes:
      decode: Decode rows.
      prefill: Prefill chunks.
      forward: Finetuning forward rows.
      losses: Loss heads to run before the step's backward tile.
      tile: The backward tile.
      samples: Sequences that get a token, decode rows first.
      finished_groups: Groups whose last tile this step holds; their sums are added to the batch.
      optimizer_steps: Due after that.
      eval_results: Evaluations that end with this step.
      discarded: Groups that lost their pages; what they left is forgotten before the step.
      resets: Sequences whose token counts must be set before they are sampled.
      decode_kv_tokens: Tokens that the decode rows read, summed over rows.
      slot_pages: KV pages of each running request by its slot, -1 padding: int32 [max_running, M].
        The scheduler's own; valid until it plans again.
    """

    decode: DecodeRows = NO_ROWS
    prefill: list[PrefillChunk] = dataclasses.field(default_factory=list)
    forward: list[ForwardPiece] = dataclasses.field(default_factory=list)
    losses: list[LossWindow] = dataclasses.field(default_factory=list)
    tile: BackwardTile | None = None
    samples: list[Sequence] = dataclasses.field(default_factory=list)
    finished_groups: list[Group] = dataclasses.field(default_factory=list)
    optimizer_steps: list[OptimizerStep] = dataclasses.field(default_factory=list)
    eval_results: list[EvalResult] = dataclasses.field(default_factory=list)
    discarded: list[Discard] = dataclasses.field(default_factory=list)
    resets: list[Sequence] = dataclasses.field(default_factory=list)
    decode_kv_tokens: int = 0
    slot_pages: np.ndarray | None = dataclasses.field(default=None, repr=False)

    @property
    def num_chunk_rows(self) -> int:
        """Prefill and finetuning-forward rows."""
        return sum(c.length for c in self.prefill) + sum(p.length for p in self.forward)

    @property
    def num_finetune_rows(self) -> int:
        """Finetuning rows, forward and backward."""
        return sum(p.length for p in self.forward) + (self.tile.length if self.tile else 0)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to do."""
        work = (self.decode, self.prefill, self.forward, self.losses, self.optimizer_steps)
        return self.tile is None and not any((*work, self.eval_results, self.discarded))
