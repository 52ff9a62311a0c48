"""Who waits and who runs: every request is in exactly one place, and whoever leaves its slot gives its blocks back.

Blocks go back at once, even while a step in flight still reads or writes them: whoever gets them next uses them in a
later step, and a device runs its steps in order. What must wait is a request that lost its slot to another: it is not
admitted again before every step that names it has been read, because its tokens are not all known until then.
"""

from __future__ import annotations

from collections import deque

import numpy as np
import numpy.typing as npt

from pagedserve_engine.batch import Batch
from pagedserve_engine.cache.manager import CacheManager
from pagedserve_engine.request import RequestState, RequestStatus
from pagedserve_engine.scheduler.table import SequenceTable


class Queues:
    """Waiting and running requests, their blocks, and the steps in flight that name them."""

    def __init__(self, cache: CacheManager, table: SequenceTable) -> None:
        self.cache = cache
        self.table = table
        self.waiting: deque[RequestState] = deque()
        """In order of arrival."""
        self.by_id: dict[str, RequestState] = {}
        self.in_flight: deque[Batch] = deque()
        """Steps scheduled and not yet committed, failed or taken back, the oldest first."""
        self.num_preemptions = 0
        self._block_size = cache.layout.block_size

    def in_step(self, request: RequestState) -> bool:
        """Whether a step in flight names ``request``."""
        return any(request in batch.requests for batch in self.in_flight)

    def live(self, batch: Batch) -> npt.NDArray[np.bool_]:
        """[R] rows whose request still is where it was when the step was scheduled."""
        found: npt.NDArray[np.bool_] = self.table.stays[batch.slots] == batch.stays
        return found

    def enter(self, request: RequestState, *, computed: int) -> int:
        """Give the first waiting ``request`` a slot, with a hit of ``computed`` tokens; returns the slot."""
        first = self.waiting.popleft()
        assert first is request, "requests are admitted in their order"
        request.move_to(RequestStatus.RUNNING)
        if not request.output_ids:
            # What an earlier stay scored is scored again.
            request.prompt_logprobs.clear()
        slot = self.table.enter(request, computed=computed)
        self.cache.admit(slot, request.block_hashes, computed)
        return slot

    def preempt(self, slot: int) -> None:
        """Take a request's blocks and queue it again in its order of arrival; its tokens stay known."""
        request = self.table.request(slot)
        self._leave(slot)
        request.move_to(RequestStatus.WAITING)
        request.num_preemptions += 1
        self.num_preemptions += 1
        place = next((i for i, other in enumerate(self.waiting) if other.arrival_time > request.arrival_time), None)
        self.waiting.append(request) if place is None else self.waiting.insert(place, request)

    def finish(self, request: RequestState) -> None:
        """End ``request`` wherever it stands."""
        if request.status is RequestStatus.RUNNING:
            self._leave(request.slot)
        else:
            self.waiting.remove(request)
        request.move_to(RequestStatus.FINISHED)
        del self.by_id[request.request_id]

    def seal(self, slot: int, start: int, stop: int) -> None:
        """Let others find the blocks that the tokens from ``start`` to ``stop``, all of them read, fill.

        What writes their keys and values must be launched before whoever finds them.
        """
        first, full = start // self._block_size, stop // self._block_size
        if full <= first or not self.cache.finds_prefixes:
            return
        request = self.table.request(slot)
        if len(request.block_hashes) < full:
            known = self.table.tokens[slot, : full * self._block_size]
            self.cache.hash_blocks(known, request.block_hashes, request.salt)
        self.cache.seal(slot, request.block_hashes, first, full)

    def check(self) -> None:
        """Prove that no request is lost and that what is unread is in flight; AssertionError if not."""
        running = [request.request_id for request in self.table]
        waiting = [request.request_id for request in self.waiting]
        assert sorted(running + waiting) == sorted(self.by_id), "a request is lost or stands in two places"
        assert len(set(running)) == len(running)
        unread = np.zeros_like(self.table.unread)
        for batch in self.in_flight:
            unread[batch.slots[batch.sampled & self.live(batch)]] += 1
        slots = self.table.running
        assert np.array_equal(unread[slots], self.table.unread[slots]), "a token is awaited that no step brings"
        assert (self.table.computed[slots] < self.table.known[slots]).all(), "a request runs with nothing to compute"
        assert (self.table.known[slots] <= self.table.limit[slots]).all(), "a request runs beyond its length"
        self.cache.check()

    def _leave(self, slot: int) -> None:
        self.cache.release(slot)
        self.table.leave(slot)
