"""One operator writes at a time: leases, local deadlines, and what happens when a leader stops and comes back."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest

from pagedserve_operator.config import OperatorConfig
from pagedserve_operator.errors import Conflict, NotLeading, Unavailable
from pagedserve_operator.leader import Leader

Json = dict[str, Any]
CONFIG = OperatorConfig()


class LeaseStore:
    """One Lease with the API server's optimistic locking; ``broken`` makes it unreachable."""

    def __init__(self) -> None:
        self.lease: Json | None = None
        self.version = 0
        self.broken = False
        self.writes = 0

    async def get(self, kind: str, namespace: str, name: str) -> Json | None:
        if self.broken:
            raise Unavailable("down")
        return copy.deepcopy(self.lease)

    async def put_lease(self, lease: Json) -> Json:
        if self.broken:
            raise Unavailable("down")
        current = self.lease["metadata"]["resourceVersion"] if self.lease else None
        if lease["metadata"].get("resourceVersion") != current:
            raise Conflict("moved", status=409)
        self.version += 1
        self.writes += 1
        self.lease = copy.deepcopy(lease)
        self.lease["metadata"]["resourceVersion"] = str(self.version)
        return self.lease


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def candidates(number: int) -> tuple[LeaseStore, Clock, list[Leader]]:
    store, clock = LeaseStore(), Clock()
    return store, clock, [Leader(store, replace(CONFIG, identity=f"op-{i}"), clock=clock) for i in range(number)]


def attempt(leader: Leader) -> bool:
    asyncio.run(leader.attempt())
    return leader.leading


def test_the_first_candidate_leads_and_the_second_waits() -> None:
    store, _, (one, other) = candidates(2)
    assert attempt(one)
    assert not attempt(other)
    assert store.lease is not None
    assert store.lease["spec"]["holderIdentity"] == "op-0"
    assert store.lease["spec"]["leaseDurationSeconds"] == 15


def test_no_write_begins_after_the_local_deadline_which_ends_before_the_lease() -> None:
    _, clock, (one,) = candidates(1)
    assert attempt(one)
    one.fence()
    clock.now += CONFIG.renew_deadline_seconds
    assert CONFIG.renew_deadline_seconds < CONFIG.lease_seconds
    with pytest.raises(NotLeading):
        one.fence()


def test_a_leader_that_stopped_is_followed_and_does_not_lead_when_it_comes_back() -> None:
    _, clock, (one, other) = candidates(2)
    assert attempt(one)
    assert not attempt(other)
    clock.now += CONFIG.lease_seconds + 0.1
    assert attempt(other)
    assert not one.leading
    assert not attempt(one)


def test_there_are_never_two_leaders_whatever_the_order_of_attempts() -> None:
    _, clock, leaders = candidates(3)
    for step in range(400):
        attempt(leaders[(step * 7 + step // 11) % 3])
        clock.now += 0.1 + (step % 17)
        assert sum(leader.leading for leader in leaders) <= 1


def test_a_lease_is_judged_by_when_it_was_seen_to_change_not_by_the_time_written_in_it() -> None:
    store, clock, (one, other) = candidates(2)
    assert attempt(one)
    assert store.lease is not None
    store.lease["spec"]["renewTime"] = "1999-01-01T00:00:00.000000Z"
    assert not attempt(other)
    clock.now += CONFIG.lease_seconds - 1
    assert not attempt(other)


def test_renewing_keeps_the_time_of_acquisition_and_counts_no_transition() -> None:
    store, clock, (one, other) = candidates(2)
    attempt(one)
    assert store.lease is not None
    acquired = store.lease["spec"]["acquireTime"]
    clock.now += 2
    attempt(one)
    assert store.lease["spec"]["acquireTime"] == acquired
    assert store.lease["spec"]["leaseTransitions"] == 0
    attempt(other)
    clock.now += 20
    attempt(other)
    assert store.lease["spec"]["leaseTransitions"] == 1


def test_an_unreachable_server_lets_the_deadline_run_out() -> None:
    store, clock, (one,) = candidates(1)
    attempt(one)
    store.broken = True
    clock.now += 5
    assert attempt(one)
    clock.now += 5
    assert not attempt(one)
    store.broken = False
    assert attempt(one)


def test_a_renewal_counts_from_before_it_was_asked_for() -> None:
    store, clock, (one,) = candidates(1)
    slow = store.put_lease

    async def put_slowly(lease: Json) -> Json:
        clock.now += 9
        return await slow(lease)

    store.put_lease = put_slowly  # type: ignore[method-assign]
    assert attempt(one)
    clock.now += 1.5
    assert not one.leading


def test_a_released_lease_is_free_at_once() -> None:
    _, _, (one, other) = candidates(2)
    attempt(one)
    asyncio.run(one.release())
    assert not one.leading
    assert attempt(other)


def test_releasing_leaves_a_lease_alone_that_somebody_else_holds() -> None:
    store, clock, (one, other) = candidates(2)
    attempt(one)
    attempt(other)
    clock.now += 16
    attempt(other)
    writes = store.writes
    asyncio.run(one.release())
    assert store.writes == writes
    assert other.leading


def test_gaining_the_lease_is_told_once_and_wakes_who_waits() -> None:
    async def work() -> None:
        store, clock, gains = LeaseStore(), Clock(), []
        leader = Leader(store, CONFIG, on_gain=lambda: gains.append(clock.now), clock=clock)
        waiting = asyncio.create_task(leader.wait())
        await asyncio.sleep(0)
        assert not waiting.done()
        await leader.attempt()
        await waiting
        await leader.attempt()
        assert len(gains) == 1

    asyncio.run(work())


class HangingStore(LeaseStore):
    """Answers nothing while ``hangs``."""

    hangs = True

    async def get(self, kind: str, namespace: str, name: str) -> Json | None:
        if self.hangs:
            await asyncio.get_running_loop().create_future()
        return await super().get(kind, namespace, name)


def test_an_attempt_that_hangs_leaves_time_for_another() -> None:
    store = HangingStore()
    leader = Leader(store, replace(CONFIG, lease_seconds=0.3, renew_deadline_seconds=0.2, renew_seconds=0.1))

    async def attempts() -> None:
        async with asyncio.timeout(30):
            await leader.attempt()
            store.hangs = False
            await leader.attempt()

    asyncio.run(attempts())
    assert store.writes == 1


class SlowStore(LeaseStore):
    """Renewals take so long that the deadline passes in between: ``slowly`` runs before each write."""

    slowly: Callable[[], Awaitable[None]] | None = None

    async def put_lease(self, lease: Json) -> Json:
        if self.slowly is not None:
            await self.slowly()
        return await super().put_lease(lease)


def test_who_waits_since_the_deadline_passed_goes_on_with_a_renewal_that_was_under_way() -> None:
    async def work() -> None:
        store, clock = SlowStore(), Clock()
        leader = Leader(store, CONFIG, clock=clock)
        await leader.attempt()
        clock.now += CONFIG.renew_deadline_seconds - 1
        waiting: list[asyncio.Task[None]] = []

        async def pass_the_deadline() -> None:
            clock.now += 2
            waiting.append(asyncio.create_task(leader.wait()))
            await asyncio.sleep(0)
            assert not waiting[0].done()

        store.slowly = pass_the_deadline
        await leader.attempt()
        assert leader.leading
        await asyncio.wait_for(waiting[0], 5)

    asyncio.run(work())
