"""The scheduler: once an iteration, what the next step holds. Imports no jax.

Decode rows first, then prefill chunks of what runs, then admission, then finetuning in the room
that the budget leaves. Memory that requests need is taken from finetuning first, from the newest
request next (it is recomputed later); nothing is dropped.
"""

from __future__ import annotations

import dataclasses
from collections import deque

from flexjax.layout import StepSizes
from flexjax.request import GenerationRequest
from flexjax.scheduler.buckets import BucketLadder
from flexjax.scheduler.budget import BudgetPolicy, Load
from flexjax.scheduler.finetuning import FinetunePlanner
from flexjax.scheduler.latency import LatencyTable
from flexjax.scheduler.page_allocator import PageAllocator
from flexjax.scheduler.plan import DecodeRow, PrefillChunk, StepPlan
from flexjax.scheduler.sequence import Sequence, SequenceStatus
from flexjax.scheduler.training import TrainingRun


class Scheduler:
    """Queues of requests and jobs, and the pages that they own."""

    def __init__(
        self,
        *,
        ladder: BucketLadder,
        sizes: StepSizes,
        pages: PageAllocator,
        arena: PageAllocator,
        policy: BudgetPolicy,
        latency: LatencyTable,
        max_running: int,
        max_context_len: int,
        num_layers: int,
        tile_order: str,
        is_deterministic: bool,
    ):
        self.ladder = ladder
        self.pages = pages
        self.latency = latency
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.finetuning = FinetunePlanner(
            ladder=ladder,
            sizes=sizes,
            pages=pages,
            arena=arena,
            num_layers=num_layers,
            tile_order=tile_order,
            is_deterministic=is_deterministic,
        )
        self._sizes = sizes
        self._policy = policy
        self._max_running = max_running
        self._max_context_len = max_context_len
        self._is_deterministic = is_deterministic
        self._free_slots = list(range(max_running - 1, -1, -1))
        self._was_inference = False

    # Requests and jobs.

    def add(self, request: GenerationRequest) -> Sequence:
        """Queues a request."""
        sequence = Sequence.from_request(request)
        self.waiting.append(sequence)
        return sequence

    def finish(self, sequence: Sequence) -> None:
        """Ends a request, in whatever state it is, and frees what it owned."""
        if sequence.status is SequenceStatus.RUNNING:
            self.running.remove(sequence)
            self._release(sequence)
        elif sequence.status is SequenceStatus.WAITING:
            self.waiting.remove(sequence)
        sequence.status = SequenceStatus.FINISHED

    def add_run(self, run: TrainingRun) -> None:
        """Starts a job."""
        self.finetuning.add(run)

    def remove_run(self, run: TrainingRun) -> None:
        """Stops a job and frees what it owned."""
        self.finetuning.remove(run)

    @property
    def has_requests(self) -> bool:
        """Whether any request is alive."""
        return bool(self.waiting or self.running)

    # The iteration.

    def schedule(self) -> StepPlan:
        """Decides the next step; empty if there is nothing to do.

        State advances as if the step had run, so that the next one can be decided while this one
        is on the device.
        """
        plan = StepPlan()
        if self._is_deterministic and self._was_inference and self.finetuning.has_work:
            self._was_inference = False
            self._plan_finetuning(plan, Load(0, 0, has_requests=False))
            plan.discarded.extend(self.finetuning.take_discarded())
            if not plan.is_empty:
                return plan
        self._plan_decode(plan)
        self._plan_prefill(plan)
        self._admit(plan)
        self._was_inference = bool(plan.decode or plan.prefill)
        if not (self._is_deterministic and self._was_inference):
            # Deterministic: without inference rows beside it, finetuning has the whole step.
            is_shared = self.has_requests and not self._is_deterministic
            load = Load(len(plan.decode), plan.num_chunk_rows, is_shared)
            self._plan_finetuning(plan, load)
        plan.discarded.extend(self.finetuning.take_discarded())
        return plan

    def _plan_decode(self, plan: StepPlan) -> None:
        for sequence in list(self.running):
            is_ready = not sequence.is_prefilling and sequence.may_sample(self._max_context_len)
            if not is_ready or sequence.status is not SequenceStatus.RUNNING:
                continue
            position = sequence.num_tokens - 1
            if not self._grow(sequence, position + 1):
                continue
            plan.decode.append(DecodeRow(sequence, position, is_fed=sequence.in_flight > 0))
            plan.samples.append(sequence)
            sequence.num_computed += 1
            sequence.in_flight += 1

    def _grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Gives a running sequence pages for `num_tokens`; False if it was preempted instead."""
        missing = self.pages.pages_for(num_tokens) - len(sequence.pages)
        while missing > 0:
            pages = self.pages.allocate(missing)
            if pages is not None:
                sequence.pages.extend(pages)
                return True
            if self.finetuning.evict():
                continue
            victim = self.running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Takes a running sequence's pages; it will be recomputed from its tokens."""
        self.running.remove(sequence)
        self._release(sequence)
        sequence.num_computed = 0
        sequence.num_preemptions += 1
        sequence.status = SequenceStatus.WAITING
        self.waiting.appendleft(sequence)

    def _release(self, sequence: Sequence) -> None:
        self.pages.free(sequence.pages)
        sequence.pages = []
        self._free_slots.append(sequence.slot)
        sequence.slot = -1

    def _plan_prefill(self, plan: StepPlan) -> None:
        for sequence in self.running:
            if sequence.is_prefilling:
                self._add_chunk(plan, sequence)

    def _add_chunk(self, plan: StepPlan, sequence: Sequence) -> None:
        """Plans as much of a prompt as the step has room for."""
        room = self.ladder.max_chunk - plan.num_chunk_rows
        length = min(room, sequence.num_tokens - sequence.num_computed)
        entries = sum(self.pages.pages_for(c.start + c.length) for c in plan.prefill)
        end = sequence.num_computed + length
        if length <= 0 or entries + self.pages.pages_for(end) > self._sizes.chunk_pages:
            return
        is_last = end == sequence.num_tokens
        plan.prefill.append(PrefillChunk(sequence, sequence.num_computed, length, is_last))
        if sequence.num_computed == 0 and sequence.request.params.has_penalties:
            plan.resets.append(sequence)
        sequence.num_computed = end
        if is_last:
            plan.samples.append(sequence)
            sequence.in_flight += 1

    def _admit(self, plan: StepPlan) -> None:
        """Starts waiting requests, first come first served, while memory covers them."""
        while self.waiting and self._free_slots and plan.num_chunk_rows < self.ladder.max_chunk:
            sequence = self.waiting[0]
            if sequence.in_flight:  # preempted; its newest token has not been read yet
                return
            needed = self.pages.pages_for(sequence.num_tokens + 1)
            reserve = len(self.running)  # a page of growth for each that runs
            while self.pages.num_free < needed + reserve and self.finetuning.evict():
                pass
            if self.pages.num_free < needed + reserve:
                return
            pages = self.pages.allocate(needed)
            assert pages is not None
            self.waiting.popleft()
            sequence.pages = pages
            sequence.slot = self._free_slots.pop()
            sequence.status = SequenceStatus.RUNNING
            self.running.append(sequence)
            self._add_chunk(plan, sequence)

    def _plan_finetuning(self, plan: StepPlan, load: Load) -> None:
        load = dataclasses.replace(load, has_tile=self.finetuning.has_tile)
        budget = self._policy.budget(load, self.ladder, self.latency)
        reserve = len(self.running)
        if self.waiting:
            reserve += self.pages.pages_for(self.waiting[0].num_tokens + 1)
        self.finetuning.plan(plan, budget, reserve)

    # Results.

    def record_token(self, sequence: Sequence, token: int) -> None:
        """Takes in a sampled token that the host has read."""
        sequence.tokens.append(token)
        sequence.in_flight -= 1

    def check_integrity(self) -> None:
        """Asserts that pages and slots balance."""
        self.pages.check_integrity()
        owned = sum(len(s.pages) for s in self.running) + self.finetuning.num_kv_pages
        assert owned + self.pages.num_free == self.pages.num_pages
        assert len(self.running) + len(self._free_slots) == self._max_running
        slots = [s.slot for s in self.running]
        assert len(set(slots)) == len(slots) and min(slots, default=0) >= 0
        self.finetuning.check_integrity()
