"""The work queue loses no event, works each key once at a time, and lets no poisoned key delay another."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagedserve_operator.workqueue import LONGEST_RETRY_SECONDS, WorkQueue


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def queue_at(clock: Clock, jitter: float = 1.0) -> WorkQueue[str]:
    return WorkQueue(clock=clock, jitter=lambda: jitter)


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(work)


async def take_now(queue: WorkQueue[str]) -> str | None:
    """The next key, or None where a worker would wait."""
    task = asyncio.create_task(queue.take())
    for _ in range(3):
        await asyncio.sleep(0)
    if task.done():
        return task.result()
    task.cancel()
    return None


def test_keys_come_in_the_order_of_asking() -> None:
    async def work() -> None:
        queue = queue_at(Clock())
        for key in ("b", "a", "c", "a"):
            queue.add(key)
        assert [await queue.take() for _ in range(3)] == ["b", "a", "c"]
        assert await take_now(queue) is None

    run(work())


def test_a_key_asked_for_while_it_is_worked_is_looked_at_once_more_and_not_at_the_same_time() -> None:
    async def work() -> None:
        queue = queue_at(Clock())
        queue.add("a")
        assert await queue.take() == "a"
        queue.add("a")
        queue.add("a")
        assert await take_now(queue) is None
        queue.done("a")
        assert await take_now(queue) == "a"
        queue.done("a")
        assert await take_now(queue) is None
        assert queue.idle

    run(work())


def test_the_earliest_of_several_timers_wins_and_the_others_wake_nobody() -> None:
    async def work() -> None:
        clock = Clock()
        queue = queue_at(clock)
        queue.add_after("a", 10)
        queue.add_after("a", 3)
        queue.add_after("a", 5)
        clock.now += 2.9
        assert await take_now(queue) is None
        clock.now += 0.2
        assert await take_now(queue) == "a"
        queue.done("a")
        clock.now += 100
        assert await take_now(queue) is None

    run(work())


def test_looking_now_clears_the_timer() -> None:
    async def work() -> None:
        clock = Clock()
        queue = queue_at(clock)
        queue.add_after("a", 5)
        queue.add("a")
        assert await take_now(queue) == "a"
        queue.done("a")
        clock.now += 10
        assert await take_now(queue) is None

    run(work())


def test_a_worker_that_waits_wakes_for_a_new_key_and_for_a_timer() -> None:
    async def work() -> None:
        queue: WorkQueue[str] = WorkQueue(clock=asyncio.get_running_loop().time)
        waiting = asyncio.create_task(queue.take())
        await asyncio.sleep(0)
        queue.add("a")
        assert await waiting == "a"
        waiting = asyncio.create_task(queue.take())
        await asyncio.sleep(0)
        queue.add_after("b", 0.01)
        assert await waiting == "b"

    run(work())


def test_failures_back_off_to_a_limit_and_forgetting_starts_again() -> None:
    clock = Clock()
    queue = queue_at(clock)

    def next_wait() -> float:
        queue.add_after("a", 0)
        return queue.retry("a")

    waits = [next_wait() for _ in range(40)]
    assert waits[:4] == [0.25, 0.5, 1.0, 2.0]
    assert waits[-1] == LONGEST_RETRY_SECONDS
    assert waits == sorted(waits)
    queue.forget("a")
    assert next_wait() == 0.25


def test_the_servers_own_wait_is_kept_to() -> None:
    queue = queue_at(Clock())
    assert queue.retry("a", at_least=7) == 7


def test_jitter_at_most_halves_a_wait() -> None:
    assert queue_at(Clock(), jitter=0.0).retry("a") == 0.125


def test_a_poisoned_key_leaves_the_others_their_turns() -> None:
    async def work() -> None:
        clock = Clock()
        queue = queue_at(clock)
        seen: list[str] = []
        for key in ("bad", "x", "y"):
            queue.add(key)
        for _ in range(6):
            key = await take_now(queue)
            if key is None:
                clock.now += 0.3
                continue
            seen.append(key)
            if key == "bad":
                queue.retry(key)
            queue.done(key)
        assert seen[:3] == ["bad", "x", "y"]
        assert seen.count("x") == seen.count("y") == 1

    run(work())


def test_a_key_that_comes_back_while_it_is_found_gone_is_looked_at_again() -> None:
    async def work() -> None:
        clock = Clock()
        queue = queue_at(clock)
        queue.add("a")
        gone = await take_now(queue)
        queue.add_after("a", 1)
        queue.forget(gone)
        queue.done(gone)
        clock.now += 5
        assert await take_now(queue) == "a"

    run(work())


def test_the_age_of_the_oldest_grows_while_nobody_works() -> None:
    clock = Clock()
    queue = queue_at(clock)
    assert queue.oldest_seconds == 0
    queue.add("a")
    clock.now += 4
    queue.add("b")
    assert (len(queue), queue.oldest_seconds) == (2, 4)


@given(st.lists(st.tuples(st.sampled_from(["add", "after", "take", "done", "pass"]), st.integers(0, 3))))
def test_every_key_asked_for_is_looked_at_after_it_was_asked_for(actions: list[tuple[str, int]]) -> None:
    async def work() -> None:
        clock = Clock()
        queue = queue_at(clock)
        owed: set[str] = set()
        working: list[str] = []
        for action, number in actions:
            key = f"k{number}"
            if action == "add":
                queue.add(key)
                owed.add(key)
            elif action == "after":
                queue.add_after(key, number)
                owed.add(key)
            elif action == "take":
                taken = await take_now(queue)
                assert taken not in working
                if taken is not None:
                    working.append(taken)
                    owed.discard(taken)
            elif action == "done" and working:
                queue.done(working.pop())
            else:
                clock.now += 1
        for key in working:
            queue.done(key)
        clock.now += 10
        while (taken := await take_now(queue)) is not None:
            owed.discard(taken)
            queue.done(taken)
        assert not owed

    run(work())


@pytest.mark.parametrize("failures", [1100])
def test_very_many_failures_overflow_nothing(failures: int) -> None:
    queue = queue_at(Clock())
    for _ in range(failures):
        assert queue.retry("a") <= LONGEST_RETRY_SECONDS
