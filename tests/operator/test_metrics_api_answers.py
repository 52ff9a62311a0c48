from __future__ import annotations

import asyncio
import gc
from collections.abc import Awaitable, Callable

import pytest

from pagedserve_operator.metrics_api.answers import Answers


class Source:
    """Makes the answers 1, 2, 3… and holds each until it is let go."""

    def __init__(self) -> None:
        self.asked = 0
        self.going = asyncio.Event()
        self.failure: Exception | None = None
        self.now = 0.0
        self.answers: Answers[str, int] = Answers(seconds=lambda _: 1.0, most=3, clock=lambda: self.now)

    async def make(self) -> int:
        self.asked += 1
        number = self.asked
        await self.going.wait()
        if self.failure is not None:
            raise self.failure
        return number

    def get(self, key: str = "a") -> asyncio.Task[int]:
        return asyncio.ensure_future(self.answers.get(key, self.make))


async def settle() -> None:
    """Let every task that can go on go on."""
    for _ in range(5):
        await asyncio.sleep(0)


def run(story: Callable[[Source], Awaitable[None]]) -> None:
    async def main() -> None:
        source = Source()
        await story(source)
        await source.answers.close()

    asyncio.run(main())


def test_all_who_wait_share_one_question() -> None:
    async def story(source: Source) -> None:
        waiting = [source.get() for _ in range(50)]
        await settle()
        source.going.set()
        assert set(await asyncio.gather(*waiting)) == {1}
        assert source.asked == 1

    run(story)


def test_an_answer_is_good_for_its_time_and_not_longer() -> None:
    async def story(source: Source) -> None:
        source.going.set()
        assert await source.get() == 1
        source.now = 0.99
        assert await source.get() == 1
        source.now = 1.0
        assert await source.get() == 2

    run(story)


def test_its_time_begins_when_it_comes() -> None:
    async def story(source: Source) -> None:
        slow = source.get()
        await settle()
        source.now = 5.0
        source.going.set()
        assert await slow == 1
        source.now = 5.9
        assert await source.get() == 1

    run(story)


def test_who_stops_waiting_stops_nobody_else() -> None:
    async def story(source: Source) -> None:
        impatient, patient = source.get(), source.get()
        await settle()
        impatient.cancel()
        await settle()
        source.going.set()
        assert await patient == 1

    run(story)


def test_a_failure_reaches_all_who_wait_and_is_asked_anew() -> None:
    async def story(source: Source) -> None:
        source.failure = ValueError("no")
        waiting = [source.get(), source.get()]
        await settle()
        source.going.set()
        failures = await asyncio.gather(*waiting, return_exceptions=True)
        assert [str(failure) for failure in failures] == ["no", "no"]
        assert len(source.answers) == 0
        source.failure = None
        assert await source.get() == 2

    run(story)


def test_a_failure_that_nobody_waits_for_is_no_news() -> None:
    async def story(source: Source) -> None:
        told: list[object] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
        source.failure = ValueError("no")
        lonely = source.get()
        await settle()
        lonely.cancel()
        source.going.set()
        await settle()
        gc.collect()
        assert told == []

    run(story)


def test_no_more_are_kept_than_allowed_and_the_old_go_first() -> None:
    async def story(source: Source) -> None:
        source.going.set()
        for key in "abcd":
            await source.get(key)
        assert len(source.answers) == 3
        asked = source.asked
        await source.get("d")
        assert source.asked == asked
        await source.get("a")
        assert source.asked == asked + 1
        assert len(source.answers) == 3

    run(story)


def test_one_that_had_to_make_room_still_reaches_those_who_wait() -> None:
    async def story(source: Source) -> None:
        waiting = {key: source.get(key) for key in "abcdef"}
        await settle()
        assert len(source.answers) == 3
        source.going.set()
        assert [await task for task in waiting.values()] == [1, 2, 3, 4, 5, 6]

    run(story)


def test_closing_ends_what_is_on_its_way() -> None:
    async def story(source: Source) -> None:
        waiting = source.get()
        await settle()
        await source.answers.close()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    run(story)
