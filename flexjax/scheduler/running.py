"""The requests with pages: their slots, and their numbers as arrays. Imports no jax.

Every step asks the same few things of every running request. They are asked of arrays by slot, of
all requests at once; a `Sequence` has the same numbers for whoever asks about one. What changes
them while a request runs is here, and changes both.
"""

from __future__ import annotations

import itertools
import math

import numpy as np

from flexjax.scheduler.plan import NO_ROWS, DecodeRows
from flexjax.scheduler.sequence import Sequence, SequenceStatus


class RunningRequests:
    """The running requests.

    Arrays are by slot; but for `pages`, what they hold of a free slot means nothing.

    Attributes:
      sequences: The requests, in order of admission.
      prefilling: Those whose prompts are not computed yet, in the same order.
      pages: KV pages, -1 padding, int32 [max_running, M].
      num_tokens: Tokens that exist, those that the host has not read included.
      prompt_len: Tokens of the prompt.
      max_tokens: Tokens at most.
      adapter_slots: Slots of their adapters, -1 for the base model.
      room: Tokens that the pages hold.
      first_token_s: Clock when the host read the first token, nan before.
      last_token_s: The same for the newest token; nan while the host has not read it.
      tpot_s: Target, infinite without one.
      itl_s: Longest gap between two tokens.
      has_itl: Whether that is a target of its own.
    """

    def __init__(self, max_running: int, pages_per_seq: int, page_size: int):
        self.sequences: list[Sequence] = []
        self.prefilling: list[Sequence] = []
        self.pages = np.full((max_running, pages_per_seq), -1, np.int32)
        self.num_tokens, self.prompt_len, self.max_tokens, self.adapter_slots, self.room = np.zeros(
            (5, max_running), np.int64
        )
        self.first_token_s, self.last_token_s, self.tpot_s, self.itl_s = np.zeros((4, max_running))
        self.has_itl = np.zeros(max_running, bool)
        self._page_size = page_size
        self._free_slots = list(range(max_running - 1, -1, -1))
        self._order = np.zeros(max_running, np.int64)  # slots of `sequences`
        self._is_decoding = np.zeros(max_running, bool)

    def __len__(self) -> int:
        return len(self.sequences)

    @property
    def has_free_slot(self) -> bool:
        """Whether another request can run."""
        return bool(self._free_slots)

    def add(self, sequence: Sequence, pages: list[int]) -> None:
        """Starts a request that waited."""
        slot = sequence.slot = self._free_slots.pop()
        sequence.status = SequenceStatus.RUNNING
        self._order[len(self.sequences)] = slot
        self.sequences.append(sequence)
        self.prefilling.append(sequence)
        self.num_tokens[slot] = sequence.num_tokens
        self.prompt_len[slot] = sequence.prompt_len
        self.max_tokens[slot] = sequence.max_tokens
        self.adapter_slots[slot] = sequence.request.adapter_slot
        self.tpot_s[slot], self.itl_s[slot] = sequence.tpot_s, sequence.itl_s
        self.has_itl[slot] = sequence.has_itl
        first_s, last_s = sequence.first_token_s, sequence.last_token_s
        self.first_token_s[slot] = math.nan if first_s is None else first_s
        self.last_token_s[slot] = math.nan if last_s is None else last_s
        self.grow(sequence, pages)

    def grow(self, sequence: Sequence, pages: list[int]) -> None:
        """Gives a request more pages."""
        count = len(sequence.pages)
        sequence.pages += pages
        self.pages[sequence.slot, count : len(sequence.pages)] = pages
        self.room[sequence.slot] = len(sequence.pages) * self._page_size

    def grow_rows(self, rows: DecodeRows, short: np.ndarray, pages: list[int]) -> None:
        """Gives requests one more page each: those of the rows that `short` lists."""
        slots = rows.slots[short]
        self.pages[slots, self.room[slots] // self._page_size] = pages
        self.room[slots] += self._page_size
        for index, page in zip(short.tolist(), pages, strict=True):
            rows.sequences[index].pages.append(page)

    def remove(self, sequence: Sequence) -> list[int]:
        """Stops a request, for good or to be recomputed; returns the pages that it had."""
        index, slot, pages = self.sequences.index(sequence), sequence.slot, sequence.pages
        del self.sequences[index]
        count = len(self.sequences)
        self._order[index:count] = self._order[index + 1 : count + 1]
        if sequence in self.prefilling:
            self.prefilling.remove(sequence)
        # The step on the device has its own copy of the pages.
        self.pages[slot] = -1
        self._is_decoding[slot] = False
        self._free_slots.append(slot)
        sequence.slot, sequence.pages = -1, []
        return pages

    def take_chunk(self, sequence: Sequence, length: int) -> bool:
        """Notes that a step computes some more of a prompt; the last piece samples a token.

        Returns:
          Whether it is the last piece.
        """
        sequence.num_computed += length
        slot, is_last = sequence.slot, sequence.num_computed == sequence.num_tokens
        if is_last:
            sequence.num_tokens += 1
            self.num_tokens[slot] = sequence.num_tokens
            self.last_token_s[slot] = math.nan
        if _is_prefilled(sequence):
            self.prefilling.remove(sequence)
            self._is_decoding[slot] = sequence.num_tokens < sequence.max_tokens
        return is_last

    def decode_rows(self) -> DecodeRows:
        """Rows of the requests that are not prefilled any more and have tokens to come."""
        order = self._order[: len(self.sequences)]
        is_decoding = self._is_decoding[order]
        slots = order[is_decoding]
        if not len(slots):
            return NO_ROWS
        return DecodeRows(
            list(itertools.compress(self.sequences, is_decoding.tolist())),
            slots,
            self.num_tokens[slots] - 1,
            np.isnan(self.last_token_s[slots]),
            self.adapter_slots[slots],
        )

    def short_of_pages(self, rows: DecodeRows) -> np.ndarray:
        """Indices of the rows that the pages of their requests do not hold."""
        return (rows.positions >= self.room[rows.slots]).nonzero()[0]

    def take_rows(self, rows: DecodeRows) -> None:
        """Notes that a step decodes rows; each samples a token."""
        for sequence in rows.sequences:
            sequence.num_computed = sequence.num_tokens
            sequence.num_tokens += 1
        slots, num_tokens = rows.slots, rows.positions + 2
        self.num_tokens[slots] = num_tokens
        self.last_token_s[slots] = math.nan
        self._is_decoding[slots] = num_tokens < self.max_tokens[slots]

    def note_read(self, sequence: Sequence) -> None:
        """Notes the clock of a request's first token, or of its newest where none is in flight."""
        slot = sequence.slot
        if slot < 0:
            return  # preempted since
        self.first_token_s[slot] = sequence.first_token_s
        if not sequence.in_flight:
            self.last_token_s[slot] = sequence.last_token_s

    def check_integrity(self) -> None:
        """Asserts that slots balance and that arrays and sequences agree."""
        slots = [s.slot for s in self.sequences]
        assert slots == self._order[: len(slots)].tolist()
        assert sorted(slots + self._free_slots) == list(range(len(self.pages)))
        assert (self.pages[self._free_slots] == -1).all()
        for slot, sequence in zip(slots, self.sequences, strict=True):
            row = self.pages[slot]
            assert row[row >= 0].tolist() == sequence.pages
            assert self.room[slot] == len(sequence.pages) * self._page_size
            assert self.num_tokens[slot] == sequence.num_tokens > sequence.num_computed
            is_decoding = _is_prefilled(sequence) and sequence.num_tokens < sequence.max_tokens
            assert self._is_decoding[slot] == is_decoding
            self._check_clocks(sequence)
        assert self.prefilling == [s for s in self.sequences if not _is_prefilled(s)]

    def _check_clocks(self, sequence: Sequence) -> None:
        last_s = None if sequence.in_flight else sequence.last_token_s
        clocks = (self.first_token_s, sequence.first_token_s), (self.last_token_s, last_s)
        for by_slot, clock_s in clocks:
            found_s = by_slot[sequence.slot]
            assert np.isnan(found_s) if clock_s is None else found_s == clock_s


def _is_prefilled(sequence: Sequence) -> bool:
    """Whether all is computed but the newest output token."""
    # In recomputation, that token may be one that was sampled before: the next row decodes it.
    return sequence.num_computed == sequence.num_tokens - 1 and sequence.num_sampled > 0
