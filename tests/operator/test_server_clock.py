from __future__ import annotations

import asyncio
import logging
from datetime import UTC, datetime, timedelta

import aiohttp
import pytest
from aiohttp import web

from pagedserve_operator.server_clock import ServerClock, reading

NOON = datetime(2026, 6, 1, 12, tzinfo=UTC)


def test_it_is_our_time_until_the_server_has_said_its() -> None:
    assert ServerClock(lambda: NOON).now() == NOON


@pytest.mark.parametrize(
    ("date", "ahead"),
    [
        ("Mon, 01 Jun 2026 13:00:00 GMT", 3600),
        ("Mon, 01 Jun 2026 11:59:58 GMT", -2),
        ("Mon, 01 Jun 2026 14:00:00 +0200", 0),
    ],
)
def test_the_servers_date_puts_our_clock_right(date: str, ahead: float) -> None:
    clock = ServerClock(lambda: NOON)
    clock.saw(date)
    assert clock.ahead_seconds == ahead
    assert clock.now() == NOON + timedelta(seconds=ahead)


def test_what_is_no_date_changes_nothing() -> None:
    clock = ServerClock(lambda: NOON)
    clock.saw("yesterday")
    assert clock.now() == NOON


def test_a_wrong_clock_is_told_once_until_it_is_right_again(caplog: pytest.LogCaptureFixture) -> None:
    clock = ServerClock(lambda: NOON)
    with caplog.at_level(logging.WARNING):
        for date in ("13:00:00", "13:00:01", "12:00:00", "11:00:00"):
            clock.saw(f"Mon, 01 Jun 2026 {date} GMT")
    assert [record.message.split(" by ")[1].split(" ")[0] for record in caplog.records] == ["3600", "3600"]
    assert "set the wrong one right" in caplog.text


def test_seconds_on_the_way_are_no_wrong_clock(caplog: pytest.LogCaptureFixture) -> None:
    ServerClock(lambda: NOON).saw("Mon, 01 Jun 2026 12:00:05 GMT")
    assert not caplog.records


def test_the_date_is_read_from_each_answer() -> None:
    clock = ServerClock(lambda: NOON)

    async def dated(_: web.Request) -> web.Response:
        return web.Response(headers={"Date": "Mon, 01 Jun 2026 13:00:00 GMT"})

    async def talk() -> None:
        app = web.Application()
        app.router.add_get("/", dated)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        session = aiohttp.ClientSession(middlewares=(reading(clock),))
        async with session, session.get(f"http://127.0.0.1:{site.port}/") as answer:
            assert answer.status == 200
        await runner.cleanup()

    asyncio.run(talk())
    assert clock.ahead_seconds == 3600
