"""Whatever comes of a look, the key is looked at again in time, and one key's trouble is nobody else's."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import cast

import pytest

from pagedserve_operator.config import OperatorConfig
from pagedserve_operator.errors import ApiError, Conflict, NotLeading, Unavailable
from pagedserve_operator.leader import Leader
from pagedserve_operator.metrics import Metrics
from pagedserve_operator.names import Key
from pagedserve_operator.reconcile import Look, Reconciler
from pagedserve_operator.workers import Workers
from pagedserve_operator.workqueue import FIRST_RETRY_SECONDS, LONGEST_RETRY_SECONDS, WorkQueue

CHAT, CODE = Key("models", "chat"), Key("models", "code")
CONFIG = OperatorConfig(workers=1, resync_seconds=300, secret_resync_seconds=60)
FINE = Look(result="unchanged")
_TURNS = 50
"""Of the event loop: more than a worker takes for all that is due."""

Ending = Look | Exception


class Always:
    """Leads as soon as it is asked."""

    async def wait(self) -> None:
        """At once."""


class Looks:
    """Ends each look at a key as told, the last ending for ever; notes the keys."""

    def __init__(self, endings: dict[Key, list[Ending]]) -> None:
        self.endings = endings
        self.seen: list[Key] = []

    async def reconcile(self, key: Key) -> Look:
        self.seen.append(key)
        given = self.endings.get(key, [FINE])
        ending = given.pop(0) if len(given) > 1 else given[0]
        if isinstance(ending, Exception):
            raise ending
        return ending


class Stage:
    """One worker over a clock that only moves when told."""

    def __init__(self, endings: dict[Key, list[Ending]], config: OperatorConfig = CONFIG) -> None:
        self.now = 0.0
        self.queue: WorkQueue[Key] = WorkQueue(clock=lambda: self.now)
        self.looks = Looks(endings)
        self.metrics = Metrics()
        self.workers = Workers(self.queue, cast(Leader, Always()), cast(Reconciler, self.looks), self.metrics, config)

    async def settle(self) -> None:
        """Until nothing is due."""
        # A timer that has come due on this clock wakes nobody by itself.
        self.queue.add(Key("", "tick"))
        for _ in range(_TURNS):
            await asyncio.sleep(0)
        assert self.queue.idle

    async def count_after(self, seconds: float, key: Key = CHAT) -> int:
        """Looks at ``key`` until so much later."""
        self.now += seconds
        await self.settle()
        return self.looks.seen.count(key)

    def results(self) -> dict[str, float]:
        samples = next(iter(self.metrics.reconciles.collect())).samples
        return {row.labels["result"]: row.value for row in samples if row.name.endswith("_total")}


@asynccontextmanager
async def stage(endings: dict[Key, list[Ending]], config: OperatorConfig = CONFIG) -> AsyncIterator[Stage]:
    made = Stage(endings, config)
    tasks = made.workers.start()
    yield made
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


@pytest.mark.parametrize(
    ("look", "seconds"),
    [
        (FINE, 300),
        (Look(result="refused", refers=True), 60),
        (Look(result="changed", again_seconds=20), 20 / 1.1),
    ],
    ids=["nothing happens", "Secrets aren't watched", "time alone changes the verdict"],
)
def test_a_resource_that_nothing_happens_to_is_looked_at_again(look: Look, seconds: float) -> None:
    async def work() -> None:
        async with stage({CHAT: [look]}) as it:
            it.queue.add(CHAT)
            assert await it.count_after(0) == 1
            assert await it.count_after(seconds * 0.89) == 1
            assert await it.count_after(seconds * 0.22) == 2

    asyncio.run(work())


def test_a_resource_that_is_gone_is_left_alone_until_it_comes_back() -> None:
    async def work() -> None:
        async with stage({CHAT: [Look(result="unchanged", gone=True)]}) as it:
            it.queue.add(CHAT)
            assert await it.count_after(10_000) == 1
            it.queue.add(CHAT)
            assert await it.count_after(0) == 2

    asyncio.run(work())


@pytest.mark.parametrize(
    "error", [Conflict("moved", status=409), Unavailable("busy"), ApiError("odd"), TimeoutError(), RuntimeError("bug")]
)
def test_a_look_that_failed_is_tried_again_ever_later(error: Exception) -> None:
    async def work() -> None:
        async with stage({CHAT: [error]}) as it:
            it.queue.add(CHAT)
            assert await it.count_after(0) == 1
            for number in range(1, 30):
                assert await it.count_after(LONGEST_RETRY_SECONDS) == 1 + number
            # By now it waits at least half the longest wait.
            assert await it.count_after(LONGEST_RETRY_SECONDS * 0.49) == 30
            assert it.results()["retry"] == 30

    asyncio.run(work())


def test_a_success_forgets_the_failures_before() -> None:
    async def work() -> None:
        async with stage({CHAT: [*[Unavailable("busy")] * 20, FINE, Unavailable("busy"), FINE]}) as it:
            it.queue.add(CHAT)
            for number in range(21):
                assert await it.count_after(LONGEST_RETRY_SECONDS * min(number, 1)) == number + 1
            # The resync fails, and waits as shortly as a first failure does.
            assert await it.count_after(CONFIG.resync_seconds * 1.1) == 22
            assert await it.count_after(FIRST_RETRY_SECONDS) == 23

    asyncio.run(work())


def test_the_servers_own_wait_is_kept_to() -> None:
    async def work() -> None:
        async with stage({CHAT: [Unavailable("busy", status=429, retry_after=30), FINE]}) as it:
            it.queue.add(CHAT)
            assert await it.count_after(0) == 1
            assert await it.count_after(29) == 1
            assert await it.count_after(2) == 2

    asyncio.run(work())


def test_a_look_that_lost_the_lease_is_made_anew_by_whoever_leads() -> None:
    async def work() -> None:
        async with stage({CHAT: [NotLeading("late"), FINE]}) as it:
            it.queue.add(CHAT)
            assert await it.count_after(0) == 2

    asyncio.run(work())


def test_a_bug_with_one_resource_is_logged_with_its_name_and_the_others_go_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def work() -> None:
        async with stage({CHAT: [KeyError("spec")]}) as it:
            it.queue.add(CHAT)
            it.queue.add(CODE)
            assert await it.count_after(0, CODE) == 1

    with caplog.at_level(logging.ERROR):
        asyncio.run(work())
    assert [record.fields for record in caplog.records] == [{"resource": "models/chat"}]  # type: ignore[attr-defined]


def test_no_look_begins_once_the_end_has_been_announced() -> None:
    async def work() -> None:
        async with stage({}) as it:
            await it.workers.finish()
            it.queue.add(CHAT)
            for _ in range(_TURNS):
                await asyncio.sleep(0)
            assert not it.looks.seen

    asyncio.run(work())
