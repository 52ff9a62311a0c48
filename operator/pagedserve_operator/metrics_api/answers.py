"""Answers that are good for a moment: asked for once, however many wait for one, and never more than so many kept."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass
from math import inf
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Answer = TypeVar("Answer")


@dataclass(eq=False, slots=True)
class _Entry(Generic[Answer]):
    task: asyncio.Task[Answer]
    until: float = inf
    """When it gets too old, in the clock's seconds; infinite while it is on its way."""


class Answers(Generic[Key, Answer]):
    """At most ``most`` answers by key, each kept for ``seconds(answer)``; failures are kept by nobody.

    Whoever stops waiting doesn't stop the answer that others wait for, too.
    """

    def __init__(
        self, *, seconds: Callable[[Answer], float], most: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._seconds = seconds
        self._most = most
        self._clock = clock
        self._entries: dict[Key, _Entry[Answer]] = {}

    def __len__(self) -> int:
        """Answers that are kept or on their way."""
        return len(self._entries)

    async def get(self, key: Key, make: Callable[[], Awaitable[Answer]]) -> Answer:
        """The answer that is kept or on its way, else a new one by ``make``; raises what that raises."""
        entry = self._entries.get(key)
        if entry is None or entry.until <= self._clock():
            entry = self._ask(key, make)
        return await asyncio.shield(entry.task)

    async def close(self) -> None:
        """Stop waiting for what is on its way."""
        tasks = [entry.task for entry in self._entries.values()]
        self._entries.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _ask(self, key: Key, make: Callable[[], Awaitable[Answer]]) -> _Entry[Answer]:
        self._entries.pop(key, None)
        self._make_room()
        entry = _Entry(asyncio.ensure_future(_run(make)))
        self._entries[key] = entry
        entry.task.add_done_callback(lambda task: self._came(key, entry, task))
        return entry

    def _came(self, key: Key, entry: _Entry[Answer], task: asyncio.Task[Answer]) -> None:
        # Asked for the failure here: nobody else may be left to take note of it.
        if task.cancelled() or task.exception() is not None:
            if self._entries.get(key) is entry:
                del self._entries[key]
            return
        entry.until = self._clock() + self._seconds(task.result())

    def _make_room(self) -> None:
        if len(self._entries) < self._most:
            return
        now = self._clock()
        for key in [key for key, entry in self._entries.items() if entry.until <= now]:
            del self._entries[key]
        # In the order in which they were asked for; one that is on its way still reaches those who wait.
        for key in list(self._entries)[: len(self._entries) - self._most + 1]:
            del self._entries[key]


async def _run(make: Callable[[], Awaitable[Answer]]) -> Answer:
    return await make()
