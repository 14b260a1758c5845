"""Requests that wait: by deadline within an adapter, by service among adapters. Imports no jax.

Adapters stand for tenants. Each has a counter of the tokens that it was served, and the one with
the least is next (the virtual token counters of Sheng et al., arXiv 2401.00588), so that the flood
of one delays its own requests and nobody else's. Within an adapter the earliest first token due is
next: first come, first served among requests of one class. Every request has a finite deadline, so
none waits for ever behind more urgent ones.

Nothing here grows with the number of waiting requests but the heaps' logarithms.
"""

from __future__ import annotations

import heapq
import itertools
import math

import numpy as np

from flexjax.scheduler.sequence import Sequence, SequenceStatus, Tenant

_FIRST = -math.inf


class WaitingQueue:
    """The requests that have no pages.

    Attributes:
      num_tokens: Tokens of all waiting requests that are still to be computed.
    """

    def __init__(self) -> None:
        self.num_tokens = 0
        self._tenants: dict[int, Tenant] = {}
        self._queued: dict[Tenant, None] = {}  # all whose heaps are not empty
        self._order = itertools.count()
        self._num_waiting = 0

    def __len__(self) -> int:
        return self._num_waiting

    def add(self, sequence: Sequence) -> None:
        """Queues a request that has just arrived."""
        tenant = self._tenants.get(sequence.request.adapter_slot)
        if tenant is None:
            tenant = Tenant(number=len(self._tenants))
            self._tenants[sequence.request.adapter_slot] = tenant
        sequence.tenant = tenant
        if not tenant.num_alive:
            # A tenant that was away has no claim on the service that it did not ask for.
            tenant.served = max(tenant.served, self._least_served())
        tenant.num_alive += 1
        request = sequence.request
        self._push(tenant, sequence, request.slo.queue_deadline_s(request.arrival_s))

    def put_back(self, sequence: Sequence) -> None:
        """Queues a request that lost its pages, before all others of its adapter."""
        self._push(sequence.tenant, sequence, _FIRST)

    def _push(self, tenant: Tenant, sequence: Sequence, deadline_s: float) -> None:
        # The order of arrival breaks ties; among requests put back, the last one goes first, since
        # the newest is preempted first.
        number = next(self._order)
        number = -number if deadline_s == _FIRST else number
        heapq.heappush(tenant.heap, (deadline_s, number, sequence))
        self._queued[tenant] = None
        self._num_waiting += 1
        self.num_tokens += sequence.num_tokens

    def head(self) -> Sequence | None:
        """The request that is next, or None."""
        tenant = self._next_tenant()
        return None if tenant is None else tenant.heap[0][2]

    def take(self, sequence: Sequence) -> None:
        """Takes the request that is next."""
        entry = heapq.heappop(sequence.tenant.heap)
        assert entry[2] is sequence
        self._forget(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Takes a request out that has ended while it waited; its status must say so."""
        assert sequence.status is SequenceStatus.FINISHED
        self._forget(sequence)  # its entry is dropped when it comes up

    def _forget(self, sequence: Sequence) -> None:
        self._num_waiting -= 1
        self.num_tokens -= sequence.num_tokens

    def note_served(self, adapter_slots: np.ndarray, tokens: float) -> None:
        """Counts so many tokens for each of some requests, which are given by their adapters."""
        counts = np.bincount(adapter_slots + 1).tolist()
        for adapter_slot, count in enumerate(counts, start=-1):
            if count:
                self._tenants[adapter_slot].served += tokens * count

    def heads(self) -> list[Sequence]:
        """The next request of each adapter that has one."""
        return [tenant.heap[0][2] for tenant in self._waiting()]

    def _least_served(self) -> float:
        return min((t.served for t in self._tenants.values() if t.num_alive), default=0.0)

    def _waiting(self) -> list[Tenant]:
        """Tenants with requests that wait; the next of those is then first in the heap."""
        for tenant in list(self._queued):
            heap = tenant.heap
            while heap and heap[0][2].status is not SequenceStatus.WAITING:
                heapq.heappop(heap)
            if not heap:
                del self._queued[tenant]
        return list(self._queued)

    def _next_tenant(self) -> Tenant | None:
        def rank(tenant: Tenant) -> tuple[bool, float, int]:
            return tenant.heap[0][0] != _FIRST, tenant.served, tenant.number

        return min(self._waiting(), key=rank, default=None)

    def check_integrity(self) -> None:
        """Asserts that the counts fit the queues."""
        waiting = [
            s
            for tenant in self._tenants.values()
            for _, _, s in tenant.heap
            if s.status is SequenceStatus.WAITING
        ]
        assert len(waiting) == len({id(s) for s in waiting}) == self._num_waiting
        assert self.num_tokens == sum(s.num_tokens for s in waiting)
        assert set(self._queued) >= {tenant for tenant in self._tenants.values() if tenant.heap}
        assert all(tenant.num_alive >= 0 for tenant in self._tenants.values())
