"""Keys that want a look: one worker at a time for each, asked for twice it is looked at once, in order of asking.

A key that is added while it is being worked is looked at again afterwards: no event is lost. Failures back off
exponentially with jitter, per key, so that a poisoned one delays no other.
"""

from __future__ import annotations

import asyncio
import heapq
import random
from collections import OrderedDict
from collections.abc import Callable
from typing import Final, Generic, TypeVar

Item = TypeVar("Item")

FIRST_RETRY_SECONDS: Final = 0.25
LONGEST_RETRY_SECONDS: Final = 120.0


class WorkQueue(Generic[Item]):
    """Owned by one event loop; ``clock`` gives seconds that never run backwards, ``jitter`` a number in [0, 1)."""

    def __init__(self, *, clock: Callable[[], float], jitter: Callable[[], float] = random.random) -> None:
        self._clock = clock
        self._jitter = jitter
        self._waiting: OrderedDict[Item, float] = OrderedDict()
        self._working: set[Item] = set()
        self._again: set[Item] = set()
        self._due: dict[Item, float] = {}
        self._timers: list[tuple[float, int, Item]] = []
        self._count = 0
        self._failures: dict[Item, int] = {}
        self._changed = asyncio.Event()

    def __len__(self) -> int:
        """Keys that are due and wait for a worker."""
        return len(self._waiting)

    @property
    def idle(self) -> bool:
        """Nothing is due and nothing is worked; timers may be set."""
        return not self._waiting and not self._working

    @property
    def oldest_seconds(self) -> float:
        """How long the key at the head has waited."""
        return self._clock() - next(iter(self._waiting.values())) if self._waiting else 0.0

    def add(self, item: Item) -> None:
        """Look at ``item`` as soon as a worker is free."""
        self._due.pop(item, None)
        self._enqueue(item)

    def add_after(self, item: Item, seconds: float) -> None:
        """Look at ``item`` in ``seconds``, or earlier if somebody asks for earlier."""
        due = self._clock() + seconds
        if item in self._waiting or self._due.get(item, due + 1) <= due:
            return
        self._due[item] = due
        self._count += 1
        heapq.heappush(self._timers, (due, self._count, item))
        self._changed.set()

    def retry(self, item: Item, *, at_least: float = 0.0) -> float:
        """Look at ``item`` again after a failure; returns the seconds until then."""
        failures = self._failures.get(item, 0)
        self._failures[item] = failures + 1
        # Beyond 2**30 the power alone would overflow a float some day.
        longest = min(FIRST_RETRY_SECONDS * 2 ** min(failures, 30), LONGEST_RETRY_SECONDS)
        seconds = max(longest * (0.5 + 0.5 * self._jitter()), at_least)
        self.add_after(item, seconds)
        return float(seconds)

    def forget(self, item: Item) -> None:
        """``item`` is well or gone: its next failure starts from the shortest wait; who asked for a look gets it."""
        self._failures.pop(item, None)

    async def take(self) -> Item:
        """The next key; the caller must call ``done`` with it."""
        while True:
            self._move_due()
            if self._waiting:
                item, _ = self._waiting.popitem(last=False)
                self._working.add(item)
                return item
            await self._wait()

    def done(self, item: Item) -> None:
        """The worker has finished with ``item``."""
        self._working.discard(item)
        if item in self._again:
            self._again.discard(item)
            self._enqueue(item)

    def _enqueue(self, item: Item) -> None:
        if item in self._working:
            self._again.add(item)
        elif item not in self._waiting:
            self._waiting[item] = self._clock()
            self._changed.set()

    def _move_due(self) -> None:
        while self._timers and self._timers[0][0] <= self._clock():
            due, _, item = heapq.heappop(self._timers)
            # A timer that an earlier one replaced, or whose key was looked at meanwhile, means nothing any more.
            if self._due.get(item) == due:
                self.add(item)

    async def _wait(self) -> None:
        self._changed.clear()
        pause = self._timers[0][0] - self._clock() if self._timers else None
        try:
            async with asyncio.timeout(pause):
                await self._changed.wait()
        except TimeoutError:
            pass
