"""The scheduler: once an iteration, what the next step holds. Imports no jax.

Decode rows first, then prefill chunks of what runs, then admission, then finetuning in the room
that the sharing policy leaves. Memory that requests need is taken from finetuning first, from the
newest request next (it is recomputed later); nothing is dropped.

An iteration costs time in proportion to the requests that run, whatever the number that wait.
"""

from __future__ import annotations

import math

from flexjax.layout import StepSizes
from flexjax.request import GenerationRequest
from flexjax.scheduler.buckets import BucketLadder
from flexjax.scheduler.budget import Load, StepPredictor, chunk_limit, decode_ms, prefill_row_ms
from flexjax.scheduler.finetuning import FinetunePlanner
from flexjax.scheduler.kv_reads import SequenceRows, causal_pairs, decode_kv
from flexjax.scheduler.mixing import MixChooser
from flexjax.scheduler.page_allocator import PageAllocator
from flexjax.scheduler.plan import DecodeRows, PrefillChunk, StepPlan
from flexjax.scheduler.policy import SharingPolicy, StepView, Turn
from flexjax.scheduler.running import RunningRequests
from flexjax.scheduler.sequence import Sequence, SequenceStatus
from flexjax.scheduler.survey import first_token_is_urgent, survey
from flexjax.scheduler.training import TrainingRun
from flexjax.scheduler.waiting import WaitingQueue

_OUTPUT_WEIGHT = 2.0
"""What an output token costs an adapter beside a prompt token, when adapters share."""


class Scheduler:
    """Queues of requests and jobs, and the pages that they own.

    Attributes:
      ladder: Buckets.
      pages: KV pages.
      latency: Predicts how long steps take.
      waiting: Requests without pages.
      finetuning: Jobs.
    """

    def __init__(
        self,
        *,
        ladder: BucketLadder,
        sizes: StepSizes,
        pages: PageAllocator,
        arena: PageAllocator,
        policy: SharingPolicy,
        latency: StepPredictor,
        max_running: int,
        max_context_len: int,
        num_layers: int,
        tile_order: str,
        is_deterministic: bool,
    ):
        self.ladder = ladder
        self.pages = pages
        self.latency = latency
        self.policy = policy
        self.waiting = WaitingQueue()
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
        self._max_context_len = max_context_len
        self._is_deterministic = is_deterministic
        self._running = RunningRequests(max_running, sizes.pages_per_seq, pages.page_size)
        self._was_inference = False
        self._is_blocked = False
        self._mixes = MixChooser(ladder, self.finetuning.offer)
        self._counted: tuple[DecodeRows | None, int] = None, 0
        self._survey = survey(self._running, 0.0, 0.0)

    # Requests and jobs.

    def add(self, request: GenerationRequest) -> Sequence:
        """Queues a request."""
        sequence = Sequence.from_request(request, self._max_context_len)
        self.waiting.add(sequence)
        return sequence

    def finish(self, sequence: Sequence) -> None:
        """Ends a request, in whatever state it is, and frees what it owned."""
        status, sequence.status = sequence.status, SequenceStatus.FINISHED
        if status is SequenceStatus.RUNNING:
            self.pages.free(self._running.remove(sequence))
        elif status is SequenceStatus.WAITING:
            self.waiting.remove(sequence)
        if status is not SequenceStatus.FINISHED:
            sequence.tenant.num_alive -= 1

    def add_run(self, run: TrainingRun) -> None:
        """Starts a job."""
        self.finetuning.add(run)
        self._mixes.forget()

    def remove_run(self, run: TrainingRun) -> None:
        """Stops a job and frees what it owned."""
        self.finetuning.remove(run)
        self._mixes.forget()

    @property
    def running(self) -> list[Sequence]:
        """Requests with pages, in order of admission."""
        return self._running.sequences

    @property
    def has_requests(self) -> bool:
        """Whether any request is alive."""
        return len(self._running) > 0 or len(self.waiting) > 0

    # The iteration.

    def schedule(self, now_s: float = 0.0, begin_s: float | None = None) -> StepPlan:
        """Decides the next step; empty if there is nothing to do.

        State advances as if the step had run, so that the next one can be decided while this one
        is on the device.

        Args:
          now_s: Clock, on which arrivals and tokens are timed too.
          begin_s: When the device is expected to begin the step: once the one before is done. None
            for now.
        """
        begin_s = now_s if begin_s is None else max(begin_s, now_s)
        turn = self.policy.turn(self._view(begin_s))
        plan = self._plan(turn, now_s)
        if plan.is_empty and not turn.inference and self.has_requests:
            # It was finetuning's turn, and it could do nothing: no pages, or its jobs are paused.
            plan = self._plan(Turn(finetuning=False), now_s)
        return plan

    def _plan(self, turn: Turn, now_s: float) -> StepPlan:
        plan = StepPlan(slot_pages=self._running.pages)
        can_alternate = self._is_deterministic and turn.finetuning and self.finetuning.has_work
        if can_alternate and self._was_inference:
            self._was_inference = False
            # Sized by nothing: the same rows in the same steps, whatever else is going on.
            self._plan_finetuning(plan, Load(), Turn())
            self._take_discarded(plan)
            if not plan.is_empty:
                return plan
        if self._plan_alone(plan, turn):
            self._was_inference = False
            return plan
        load = Load()
        if turn.inference:
            self._plan_decode(plan, load)
            limit = self._chunk_limit(load, turn)
            self._plan_prefill(plan, load, limit)
            self._admit(plan, load, limit, now_s)
            load.prefill_rows = plan.num_chunk_rows
            load.prefill = tuple(SequenceRows(one.start, one.length) for one in plan.prefill)
            load.sample_rows = len(plan.samples)
        self._was_inference = bool(plan.decode or plan.prefill)
        if turn.finetuning and not (self._is_deterministic and self._was_inference):
            # Deterministic: without inference rows beside it, finetuning has the whole step.
            self._plan_finetuning(plan, load, turn)
        self._take_discarded(plan)
        return plan

    def _plan_alone(self, plan: StepPlan, turn: Turn) -> bool:
        """Plans finetuning for a step of its own, where decode rows can wait and that is quicker.

        Returns:
          Whether the plan has rows now.
        """
        rows = self._survey.decoding
        can_wait = turn.reach_ms is not None and turn.max_ms < math.inf and rows
        is_shared = turn.inference and turn.finetuning and self.finetuning.runs
        has_prompts = self._survey.prefilling or len(self.waiting)
        if self._is_deterministic or not (can_wait and is_shared) or has_prompts:
            self._mixes.forget()
            return False
        budget = self._mixes.choose_alone(
            len(rows), lambda: self._decode_kv_tokens(rows), turn, self.latency
        )
        if budget is None:
            return False
        self.finetuning.plan(plan, budget, len(rows))
        self._take_discarded(plan)
        return plan.num_finetune_rows > 0

    def _take_discarded(self, plan: StepPlan) -> None:
        discarded = self.finetuning.take_discarded()
        if discarded:
            plan.discarded += discarded
            self._mixes.forget()

    def _view(self, begin_s: float) -> StepView:
        """What the policy is told: slack of the running, urgency of the waiting."""
        num_running = len(self._running)
        pace_ms = decode_ms(num_running, self.ladder, self.latency)
        itl_share = 1.0 / self.latency.tail_factor() if num_running else 1.0
        found = self._survey = survey(self._running, begin_s, pace_ms / 1e3, itl_share)
        is_urgent = first_token_is_urgent(
            found.prefilling,
            self.waiting,
            begin_s,
            pace_ms=pace_ms,
            row_ms=lambda: prefill_row_ms(self.ladder, self.latency),
            is_blocked=self._is_blocked,
        )
        return StepView(
            slack_ms=found.slack_ms,
            reach_ms=found.reach_ms,
            mean_ms=found.mean_ms,
            is_urgent=is_urgent,
            num_running=num_running,
            num_waiting=len(self.waiting),
            has_finetuning=self.finetuning.has_work,
            finished_groups=self.finetuning.finished_groups,
        )

    def _decode_kv_tokens(self, rows: DecodeRows) -> int:
        if rows is not self._counted[0]:  # the rows are asked for twice where finetuning is weighed
            padded = self.ladder.padded_decode(len(rows))
            self._counted = rows, decode_kv(rows.positions, padded, self.ladder.reads)
        return self._counted[1]

    def _plan_decode(self, plan: StepPlan, load: Load) -> None:
        if not self._survey.decoding:
            return
        rows = self._give_pages(self._survey.decoding)
        self._running.take_rows(rows)
        self.waiting.note_served(rows.adapter_slots, _OUTPUT_WEIGHT)
        plan.decode = rows
        plan.samples += rows.sequences
        load.decode_rows = len(rows)
        load.decode_kv_tokens = plan.decode_kv_tokens = self._decode_kv_tokens(rows)

    def _give_pages(self, rows: DecodeRows) -> DecodeRows:
        """Gives rows the pages that they lack; returns those that were not preempted for that."""
        short = self._running.short_of_pages(rows)
        pages = self.pages.allocate(len(short))  # a row is one token: no request lacks two
        if pages is not None:
            self._running.grow_rows(rows, short, pages)
            return rows
        for index in short.tolist():
            self._grow(rows.sequences[index])
        return self._running.decode_rows()

    def _grow(self, sequence: Sequence) -> None:
        """Gives a sequence a page, unless it is preempted: now, or before for an older one."""
        while sequence.status is SequenceStatus.RUNNING:
            pages = self.pages.allocate(1)
            if pages is not None:
                self._running.grow(sequence, pages)
                return
            if not self.finetuning.evict():
                self._preempt(self.running[-1])

    def _preempt(self, sequence: Sequence) -> None:
        """Takes a running sequence's pages; it will be recomputed from its tokens."""
        self.pages.free(self._running.remove(sequence))
        sequence.num_computed = 0
        sequence.num_preemptions += 1
        sequence.status = SequenceStatus.WAITING
        self.waiting.put_back(sequence)

    def _chunk_limit(self, load: Load, turn: Turn) -> int:
        """Prefill rows that the step may hold."""
        prefilling = self._survey.prefilling
        if not prefilling and not len(self.waiting):
            return 0
        if turn.max_ms < math.inf and prefilling:
            computed = [s.num_computed for s in prefilling]
            load.forward_kv_tokens = float(max(computed))
        return chunk_limit(load, turn, self.ladder, self.latency)

    def _plan_prefill(self, plan: StepPlan, load: Load, limit: int) -> None:
        for sequence in self._survey.prefilling:
            if sequence.status is SequenceStatus.RUNNING:  # not preempted by a decode row's need
                self._add_chunk(plan, load, sequence, limit)

    def _add_chunk(self, plan: StepPlan, load: Load, sequence: Sequence, limit: int) -> None:
        """Plans as much of a prompt as the step has room for."""
        start = sequence.num_computed
        length = min(limit - plan.num_chunk_rows, sequence.num_tokens - start)
        entries = sum(self.pages.pages_for(c.start + c.length) for c in plan.prefill)
        end = start + length
        if length <= 0 or entries + self.pages.pages_for(end) > self._sizes.chunk_pages:
            return
        is_last = self._running.take_chunk(sequence, length)
        plan.prefill.append(PrefillChunk(sequence, start, length, is_last))
        if start == 0 and sequence.request.params.has_penalties:
            plan.resets.append(sequence)
        load.prefill_kv_pairs += causal_pairs(start, length)
        sequence.tenant.served += length
        if is_last:
            plan.samples.append(sequence)

    def _admit(self, plan: StepPlan, load: Load, limit: int, now_s: float) -> None:
        """Starts waiting requests in the queue's order, while memory covers them."""
        self._is_blocked = False
        while len(self.waiting) and plan.num_chunk_rows < limit:
            sequence = self.waiting.head()
            assert sequence is not None
            if sequence.in_flight:  # preempted; its newest token has not been read yet
                return
            needed = self.pages.pages_for(sequence.num_tokens + 1)
            reserve = len(self._running)  # a page of growth for each that runs
            has_slot = self._running.has_free_slot
            if has_slot:
                while self.pages.num_free < needed + reserve and self.finetuning.evict():
                    pass
            if not has_slot or self.pages.num_free < needed + reserve:
                self._is_blocked = True
                return
            pages = self.pages.allocate(needed)
            assert pages is not None
            self.waiting.take(sequence)
            if sequence.admitted_s is None:
                sequence.admitted_s = now_s
            self._running.add(sequence, pages)
            self._add_chunk(plan, load, sequence, limit)

    def _plan_finetuning(self, plan: StepPlan, load: Load, turn: Turn) -> None:
        if not self.finetuning.runs:
            return
        reserve = len(self._running)
        head = self.waiting.head()
        if head is not None:
            reserve += self.pages.pages_for(head.num_tokens + 1)
        budget = self._mixes.choose(plan, load, turn, self.latency)
        self.finetuning.plan(plan, budget, reserve)

    # Results.

    def record_token(self, sequence: Sequence, token: int, now_s: float = 0.0) -> None:
        """Takes in a sampled token that the host has read."""
        sequence.tokens.append(token)
        sequence.last_token_s = now_s
        is_first = sequence.first_token_s is None
        if is_first:
            sequence.first_token_s = now_s
        if is_first or len(sequence.tokens) == sequence.num_tokens:
            self._running.note_read(sequence)

    def check_integrity(self) -> None:
        """Asserts that pages, slots and queues balance."""
        self.pages.check_integrity()
        owned = sum(len(s.pages) for s in self.running) + self.finetuning.num_kv_pages
        assert owned + self.pages.num_free == self.pages.num_pages
        self._running.check_integrity()
        self.waiting.check_integrity()
        self.finetuning.check_integrity()
