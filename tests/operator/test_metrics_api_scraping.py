"""Reading engines that are slow, huge, lying or gone: real connections on loopback."""

from __future__ import annotations

import asyncio
import socket
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import ExitStack, asynccontextmanager, contextmanager

import pytest
from aiohttp import web

from control_processes import free_port
from pagedserve_operator.metrics_api import scraping
from pagedserve_operator.metrics_api.pods import Engine
from pagedserve_operator.metrics_api.scraping import MOST_BYTES, Scraper
from pagedserve_operator.metrics_api.values import Reading

WAITING = "pagedserve_requests_waiting"
Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


def engine(number: int, *, uid: str = "", namespace: str = "models") -> Engine:
    """The pod at 127.0.0.``number``."""
    return Engine(namespace=namespace, name=f"chat-{number}", uid=uid or f"uid-{number}", address=f"127.0.0.{number}")


async def good(_: web.Request) -> web.Response:
    return web.Response(text=f"{WAITING} 3.0\n")


async def hang(_: web.Request) -> web.Response:
    await asyncio.Event().wait()
    raise AssertionError


async def drip(request: web.Request) -> web.StreamResponse:
    """Never ends, a little at a time."""
    response = web.StreamResponse()
    await response.prepare(request)
    while True:
        await response.write(b"# \n")
        await asyncio.sleep(0.01)


async def flood(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    for _ in range(MOST_BYTES // 1024 + 64):
        await response.write(b"#" * 1023 + b"\n")
    return response


async def bomb(_: web.Request) -> web.Response:
    """Compressed, whatever was asked for."""
    response = web.Response(text=f"{WAITING} 3.0\n")
    response.enable_compression(web.ContentCoding.gzip)
    return response


async def elsewhere(_: web.Request) -> web.Response:
    raise web.HTTPFound("/other")


async def broken(_: web.Request) -> web.Response:
    return web.Response(status=500, text=f"{WAITING} 3.0\n")


async def nonsense(_: web.Request) -> web.Response:
    return web.Response(body=b"\xff\xfe" + WAITING.encode() + b" 3\n")


@asynccontextmanager
async def serving(answers: Mapping[int, Answer]) -> AsyncIterator[tuple[Scraper, Counter[str]]]:
    """An engine at 127.0.0.N for each N, and a scraper that counts."""
    port, counts = free_port(), Counter[str]()
    runners = []
    for number, answer in answers.items():
        app = web.Application()
        app.add_routes([web.get("/metrics", answer), web.get("/other", good)])
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, f"127.0.0.{number}", port).start()
        runners.append(runner)
    scraper = Scraper(count=lambda result: counts.update([result]), port=port)
    try:
        yield scraper, counts
    finally:
        await scraper.close()
        for runner in runners:
            await runner.cleanup()


def read(answers: Mapping[int, Answer], *asked: Engine) -> Mapping[str, Reading]:
    async def main() -> Mapping[str, Reading]:
        async with serving(answers) as (scraper, _):
            return await scraper.read(asked or [engine(number) for number in answers])

    return asyncio.run(main())


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scraping, "SCRAPE_SECONDS", 1.0)


def test_engines_are_read() -> None:
    found = read({2: good, 3: good})
    assert {name: dict(reading.numbers) for name, reading in found.items()} == {
        "chat-2": {WAITING: 3.0},
        "chat-3": {WAITING: 3.0},
    }


@pytest.mark.parametrize("bad", [hang, drip, flood, bomb, elsewhere, broken, nonsense], ids=lambda bad: bad.__name__)
def test_a_bad_engine_is_missing_and_hides_no_good_one(bad: Answer) -> None:
    assert set(read({2: bad, 3: good})) == {"chat-3"}


def test_an_engine_that_is_gone_is_missing() -> None:
    assert read({2: good}, engine(2), engine(9)).keys() == {"chat-2"}


def test_an_address_that_is_none_is_missing() -> None:
    assert read({2: good}, Engine(namespace="models", name="odd", uid="odd", address="example.org")) == {}


def test_no_engine_is_no_reading() -> None:
    async def main() -> Mapping[str, Reading]:
        async with serving({}) as (scraper, _):
            return await scraper.read([])

    assert asyncio.run(main()) == {}


def test_an_engine_at_an_ipv6_address_is_read() -> None:
    async def main() -> Mapping[str, Reading]:
        app = web.Application()
        app.add_routes([web.get("/metrics", good)])
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "::1", 0)
        try:
            await site.start()
        except OSError:
            pytest.skip("no IPv6 here")
        scraper = Scraper(port=site.port)
        try:
            return await scraper.read([Engine(namespace="models", name="six", uid="six", address="::1")])
        finally:
            await scraper.close()
            await runner.cleanup()

    assert set(asyncio.run(main())) == {"six"}


def test_a_pod_is_asked_once_in_a_second_however_many_ask() -> None:
    async def main() -> None:
        async with serving({2: good}) as (scraper, counts):
            await asyncio.gather(*(scraper.read([engine(2)]) for _ in range(30)))
            await scraper.read([engine(2)])
            assert counts == {"read": 1}
            # Another pod may have got the address.
            await scraper.read([engine(2, uid="another")])
            assert counts == {"read": 2}

    asyncio.run(main())


def test_a_pod_that_did_not_answer_is_left_alone_for_a_while() -> None:
    async def main() -> None:
        async with serving({2: hang}) as (scraper, counts):
            for _ in range(3):
                assert await scraper.read([engine(2)]) == {}
            assert counts == {"failed": 1}

    asyncio.run(main())


def test_only_so_many_engines_are_read_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scraping, "CONNECTIONS", 4)
    now, most = 0, 0

    async def counted(request: web.Request) -> web.StreamResponse:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0)
        now -= 1
        return await good(request)

    found = read(dict.fromkeys(range(2, 40), counted))
    assert len(found) == 38
    assert most <= 4


def test_who_has_not_answered_in_time_is_missing_from_a_long_list(monkeypatch: pytest.MonkeyPatch) -> None:
    # More hang than are read at once: those behind them don't get their turn in time.
    monkeypatch.setattr(scraping, "CONNECTIONS", 2)
    monkeypatch.setattr(scraping, "ALL_SECONDS", 1.5)
    answers: dict[int, Answer] = {2: good, **dict.fromkeys(range(3, 40), hang)}
    assert set(read(answers)) == {"chat-2"}


def test_a_namespace_of_silent_pods_takes_no_other_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scraping, "CONNECTIONS", 3)
    monkeypatch.setattr(scraping, "CONNECTIONS_OF_NAMESPACE", 2)
    monkeypatch.setattr(scraping, "ALL_SECONDS", 3.0)
    silent = range(3, 40)

    async def main() -> Mapping[str, Reading]:
        async with serving({2: good, **dict.fromkeys(silent, hang)}) as (scraper, _):
            waiting = asyncio.ensure_future(scraper.read([engine(number) for number in silent]))
            await asyncio.sleep(0)
            try:
                return await scraper.read([engine(2, namespace="others")])
            finally:
                waiting.cancel()

    assert set(asyncio.run(main())) == {"chat-2"}


def test_an_address_that_takes_no_connection_is_given_up_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scraping, "SCRAPE_SECONDS", 600.0)
    monkeypatch.setattr(scraping, "CONNECT_SECONDS", 0.05)

    async def main() -> None:
        with black_hole() as port:
            counts = Counter[str]()
            scraper = Scraper(count=lambda result: counts.update([result]), port=port)
            try:
                assert await scraper.read([engine(2)]) == {}
                assert counts == {"failed": 1}, "and not only not waited for"
            finally:
                await scraper.close()

    asyncio.run(main())


@contextmanager
def black_hole() -> Iterator[int]:
    """A port of 127.0.0.2 with a full backlog: the system drops whoever wants to connect."""
    with ExitStack() as opened:
        listening = opened.enter_context(socket.create_server(("127.0.0.2", 0), backlog=0))
        for _ in range(4):
            filling = opened.enter_context(socket.socket())
            filling.setblocking(False)
            filling.connect_ex(listening.getsockname())
        yield listening.getsockname()[1]


def test_a_kept_reading_keeps_the_time_at_which_it_was_made() -> None:
    async def main() -> None:
        async with serving({2: good}) as (scraper, _):
            first, second = [(await scraper.read([engine(2)]))["chat-2"] for _ in range(2)]
            assert first.at == second.at
            assert first.at.tzinfo is not None

    asyncio.run(main())
