"""Plans finetuning: which rows go forward, which tile goes backward. Imports no jax."""

from __future__ import annotations

import itertools

from flexjax.layout import StepSizes
from flexjax.optim.schedule import learning_rate
from flexjax.scheduler.buckets import BucketLadder
from flexjax.scheduler.budget import FinetuneBudget, Load
from flexjax.scheduler.page_allocator import PageAllocator
from flexjax.scheduler.plan import (
    BackwardTile,
    Discard,
    EvalResult,
    ForwardPiece,
    LossWindow,
    OptimizerStep,
    StepPlan,
)
from flexjax.scheduler.training import Group, TrainingRun

_GROUPS_UNDER_WAY = 2
"""Groups of one job that hold pages at once: one forward, one backward."""


class FinetunePlanner:
    """Shares iterations among jobs by weight and walks each job's groups.

    The forward pass of one group runs beside the backward pass of another: the next of the same
    job's batch, or another job's.

    Attributes:
      runs: Jobs that are not done.
      finished_groups: Groups that have been through everything, ever.
    """

    def __init__(
        self,
        *,
        ladder: BucketLadder,
        sizes: StepSizes,
        pages: PageAllocator,
        arena: PageAllocator,
        num_layers: int,
        tile_order: str,
        is_deterministic: bool,
    ):
        self.runs: list[TrainingRun] = []
        self.finished_groups = 0
        self._ladder = ladder
        self._sizes = sizes
        self._pages = pages
        self._arena = arena
        self._num_layers = num_layers
        self._is_window_major = tile_order == "window_major"
        self._is_deterministic = is_deterministic
        self._discarded: list[Discard] = []
        self._ended: list[Group] = []

    def add(self, run: TrainingRun) -> None:
        """Starts a job; it begins with the least service of those that run."""
        run.service_rows = min((r.service_rows for r in self.runs), default=0.0)
        self.runs.append(run)

    def remove(self, run: TrainingRun) -> None:
        """Stops a job; what it had in the arena is forgotten."""
        self.runs.remove(run)
        for group in run.active_groups:
            if group.is_placed:
                self._unplace(group)
        run.groups, run.eval_groups = [], []

    @property
    def has_work(self) -> bool:
        """Whether some job has something to plan."""
        return any(run.has_work() for run in self.runs)

    def offer(self, load: Load) -> None:
        """Writes into a load what finetuning could add to it; begins batches that are due."""
        order = sorted(self.runs, key=lambda run: run.service_rows)
        rows = read = 0
        groups = []
        for run in order:
            run.refill()
            for group in run.active_groups[:_GROUPS_UNDER_WAY]:
                left = group.num_rows - group.forward_end
                rows += left
                read += left * group.mean_context
                groups.append(group)
        load.forward_groups = tuple(groups)
        load.forward_rows = rows
        load.forward_kv_tokens = read / rows if rows else 0.0
        load.tile_rows = 0
        for run in order:
            group = run.groups[0] if run.groups else None
            if group is None or not group.is_placed or not group.in_backward:
                continue
            load.tile_rows, load.tile_end, top = self._next_tile(group)
            load.tile_group = group
            load.tile_kv_tokens = group.mean_context
            load.tile_layers = self._ladder.tile_below(top)
            load.has_loss = top == self._num_layers
            return

    def _next_tile(self, group: Group) -> tuple[int, int, int]:
        """Rows of a group's next tile if only buckets limit it, its end, and the layer above it."""
        end, top = group.backward_start or group.num_rows, group.top
        if self._is_window_major:
            if group.window is not None:
                return group.window[1], sum(group.window), top
            top = self._num_layers
        elif group.backward_start == 0:
            top -= self._ladder.tile_below(top)
        rows = min(self._ladder.max_window, end)
        return min(rows, group.run.config.window or rows), end, top

    @property
    def num_kv_pages(self) -> int:
        """KV pages that groups own."""
        return sum(len(pages) for group in self._placed() for pages in group.kv_pages)

    def _placed(self) -> list[Group]:
        return [g for run in self.runs for g in run.active_groups if g.is_placed]

    # Memory.

    def evict(self) -> bool:
        """Takes one group's pages back for requests; it starts over later.

        Groups in their forward pass go first, because they lose the least; within a job the last
        one goes first, so that its groups stay in order.

        Returns:
          Whether there was one.
        """
        last = [[g for g in run.active_groups if g.is_placed][-1:] for run in self.runs]
        placed = [group for groups in last for group in groups]
        if not placed:
            return False
        self._unplace(max(placed, key=lambda g: (g.has_forward, -g.forward_end)))
        return True

    def _unplace(self, group: Group) -> None:
        had_sums = group.has_sums
        kv_pages, arena_pages = group.unplace()
        self._pages.free(kv_pages)
        self._arena.free(arena_pages)
        self._discarded.append(Discard(group, arena_pages, had_sums))

    def take_discarded(self) -> list[Discard]:
        """Groups that lost their pages since the last call."""
        discarded, self._discarded = self._discarded, []
        return discarded

    def _place(self, group: Group, reserve: int) -> bool:
        counts = [self._pages.pages_for(len(s)) for s in group.sequences]
        needed = sum(counts)
        is_short = self._pages.num_free < needed + reserve or self._arena.num_free < needed
        if is_short:
            return False
        kv = [self._pages.allocate(count) for count in counts]
        arena = [self._arena.allocate(count) for count in counts]
        group.place(kv, arena, self._pages.page_size)  # type: ignore[arg-type]
        return True

    # Planning.

    def plan(self, plan: StepPlan, budget: FinetuneBudget, reserve: int) -> None:
        """Adds finetuning to a plan.

        Args:
          plan: Holds the step's inference; extended.
          budget: Rows that finetuning may take.
          reserve: KV pages that must stay free for requests.
        """
        order = sorted(self.runs, key=lambda run: run.service_rows)
        for run in order:
            run.refill()
        if budget.backward_rows > 0:
            for run in order:
                if self._plan_tile(plan, run, budget.backward_rows):
                    break
        room = budget.forward_rows
        for run in order:
            room -= self._plan_forward(plan, run, room, reserve)
            self._plan_eval(plan, run)
        # Only now: the step still reads what it frees, so nothing of this plan may write there.
        for group in self._ended:
            self._pages.free(itertools.chain(*group.kv_pages))
            self._arena.free(itertools.chain(*group.arena_pages))
        self._ended = []

    def _serve(self, run: TrainingRun, rows: int) -> None:
        run.service_rows += rows / run.config.weight

    def _plan_forward(self, plan: StepPlan, run: TrainingRun, room: int, reserve: int) -> int:
        """Plans forward rows of a job's first groups; returns how many."""
        planned = 0
        for group in run.active_groups[:_GROUPS_UNDER_WAY]:
            if room - planned <= 0 or not group.has_forward:
                continue
            if not group.is_placed and not self._place(group, reserve):
                break
            length = min(room - planned, group.num_rows - group.forward_end)
            if run.config.window is not None:
                length = min(length, run.config.window)
            piece = ForwardPiece(group, group.forward_end, length)
            if not self._fits_page_list(plan, piece):
                break
            plan.forward.append(piece)
            group.forward_end += length
            planned += length
            self._serve(run, length)
            if self._is_deterministic:
                return room  # one group a step: sums over keys must not depend on neighbours
        return planned

    def _fits_page_list(self, plan: StepPlan, piece: ForwardPiece) -> bool:
        """Whether the chunk rows' page list has entries left for another piece."""
        page = self._pages.page_size
        entries = sum(-(-(c.start + c.length) // page) for c in plan.prefill)
        entries += sum(_piece_pages(planned) for planned in plan.forward)
        return entries + _piece_pages(piece) <= self._sizes.chunk_pages

    def _plan_tile(self, plan: StepPlan, run: TrainingRun, max_rows: int) -> bool:
        """Plans a tile of a job's first group that is ready for backward, if there is one."""
        # Strictly in order: the job's partial sums belong to one group at a time, and are added up
        # in the same order whoever lost its pages in between.
        group = run.groups[0] if run.groups else None
        if group is None or not group.is_placed or not group.in_backward:
            return False
        rows = min(max_rows, run.config.window or max_rows)
        if self._is_window_major:
            tile = self._window_major_tile(group, rows)
        else:
            tile = self._layer_major_tile(group, rows)
        plan.tile = tile
        if tile.top == self._num_layers:
            plan.losses.append(LossWindow(group, tile.start, tile.length))
        self._serve(run, tile.length)
        if group.is_done:
            self._finish(plan, group)
        return True

    def _window_major_tile(self, group: Group, max_rows: int) -> BackwardTile:
        if group.window is None:
            length = min(max_rows, group.backward_start)
            group.window = (group.backward_start - length, length)
            group.top = self._num_layers
        start, length = group.window
        if length > max_rows:
            # Its last rows go first, through all layers; the others go on from here later.
            rest = length - max_rows
            group.cut_windows.append((start, rest, group.top))
            start, length = group.window = (start + rest, max_rows)
        num_layers = self._ladder.tile_below(group.top)
        tile = BackwardTile(group, start, length, group.top, num_layers)
        group.top -= num_layers
        if group.top <= group.run.bottom:
            group.backward_start, group.window = start, None
            if group.cut_windows:
                start, length, group.top = group.cut_windows.pop()
                group.window = (start, length)
        return tile

    def _layer_major_tile(self, group: Group, max_rows: int) -> BackwardTile:
        if group.backward_start == 0:
            group.backward_start = group.num_rows
            group.top -= self._ladder.tile_below(group.top)
        length = min(max_rows, group.backward_start)
        start = group.backward_start - length
        num_layers = self._ladder.tile_below(group.top)
        tile = BackwardTile(group, start, length, group.top, num_layers)
        group.backward_start = start
        if start == 0 and group.top - num_layers <= group.run.bottom:
            group.top -= num_layers
        return tile

    def _plan_eval(self, plan: StepPlan, run: TrainingRun) -> None:
        """Plans the loss of an evaluation group whose forward pass was planned earlier."""
        planned_now = {piece.group for piece in plan.forward}
        for group in list(run.eval_groups[:_GROUPS_UNDER_WAY]):
            if not group.is_placed or group.has_forward or group in planned_now:
                continue
            while group.backward_start > 0:
                length = min(self._ladder.max_window, group.backward_start)
                group.backward_start -= length
                plan.losses.append(LossWindow(group, group.backward_start, length))
            self._finish(plan, group)

    def _finish(self, plan: StepPlan, group: Group) -> None:
        """Frees a finished group; after a batch's last one comes the optimizer step."""
        run = group.run
        run.remove(group)
        self.finished_groups += 1
        self._ended.append(group)
        if group.is_eval:
            if not run.eval_groups:
                plan.eval_results.append(EvalResult(run, run.step, run.eval_targets))
            return
        plan.finished_groups.append(group)
        if run.groups:
            return
        rate = learning_rate(run.config, run.step, run.total_steps)
        plan.optimizer_steps.append(
            OptimizerStep(run, run.step, run.batch_targets, run.batch_tokens, rate)
        )
        run.step += 1

    def check_integrity(self) -> None:
        """Asserts that arena pages balance."""
        self._arena.check_integrity()
        owned = sum(len(pages) for g in self._placed() for pages in g.arena_pages)
        assert owned + self._arena.num_free == self._arena.num_pages


def _piece_pages(piece: ForwardPiece) -> int:
    """Pages of the sequences that have a row in the piece."""
    group = piece.group
    first = int(group.segment_of_row[piece.start])
    last = int(group.segment_of_row[piece.start + piece.length - 1])
    return sum(len(pages) for pages in group.kv_pages[first : last + 1])
