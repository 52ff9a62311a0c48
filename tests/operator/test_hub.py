import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
from aiohttp import web

from pagedserve_operator.errors import Unavailable
from pagedserve_operator.hub import KEEP_FAILURE_SECONDS, LARGEST_CONFIG, MOST_CONFIGS, Hub

CONFIG = {"hidden_size": 64}
TOKEN = "hf_secret"


@dataclass
class FakeHub:
    """Answers as the hub does; ``asked`` is what it was asked, by path."""

    asked: list[str] = field(default_factory=list)
    answers: dict[str, Callable[[web.Request], web.StreamResponse]] = field(default_factory=dict)
    tokens: list[str | None] = field(default_factory=list)
    released: asyncio.Event = field(default_factory=asyncio.Event)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        repository = "/".join(request.path.split("/")[1:3])
        self.asked.append(request.raw_path)
        self.tokens.append(request.headers.get("Authorization"))
        if repository == "org/slow":
            await self.released.wait()
        answer = self.answers.get(repository)
        return web.json_response(CONFIG) if answer is None else answer(request)


@asynccontextmanager
async def serving(fake: FakeHub) -> AsyncIterator[str]:
    app = web.Application()
    app.router.add_get("/{path:.*}", fake.handle)
    runner = web.AppRunner(app, shutdown_timeout=0)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        fake.released.set()
        await runner.cleanup()


@dataclass
class Clock:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


def hub_at(endpoint: str, clock: Clock | None = None, *, timeout: float = 30.0, most_waiting: int = 100) -> Hub:
    return Hub(endpoint=endpoint, timeout_seconds=timeout, most_waiting=most_waiting, clock=clock or Clock())


def test_a_configuration_is_fetched_once() -> None:
    async def scenario() -> None:
        fake = FakeHub()
        async with serving(fake) as endpoint:
            hub = hub_at(endpoint + "/")
            for _ in range(3):
                assert (await hub.fetch_config("hf://org/model", None, None)).config == CONFIG
        assert fake.asked == ["/org/model/resolve/main/config.json"]
        assert fake.tokens == [None]

    asyncio.run(scenario())


def test_many_that_want_one_model_ask_once() -> None:
    async def scenario() -> None:
        fake = FakeHub()
        async with serving(fake) as endpoint:
            hub = hub_at(endpoint)
            found = await asyncio.gather(*(hub.fetch_config("hf://org/model", "v1", None) for _ in range(20)))
        assert all(one.config == CONFIG for one in found)
        assert fake.asked == ["/org/model/resolve/v1/config.json"]

    asyncio.run(scenario())


def test_a_revision_is_no_path() -> None:
    async def scenario() -> None:
        fake = FakeHub()
        async with serving(fake) as endpoint:
            await hub_at(endpoint).fetch_config("hf://org/model", "refs/pr/1?x", None)
        assert fake.asked == ["/org/model/resolve/refs%2Fpr%2F1%3Fx/config.json"]

    asyncio.run(scenario())


def test_a_closed_model_opens_with_the_token_and_stays_closed_to_others() -> None:
    def gate(request: web.Request) -> web.Response:
        if request.headers.get("Authorization") == f"Bearer {TOKEN}":
            return web.json_response(CONFIG)
        return web.Response(status=401)

    async def scenario() -> None:
        fake = FakeHub(answers={"org/closed": gate})
        async with serving(fake) as endpoint:
            hub = hub_at(endpoint)
            assert (await hub.fetch_config("hf://org/closed", None, TOKEN)).config == CONFIG
            refused = await hub.fetch_config("hf://org/closed", None, None)
            assert refused.config is None
            assert "spec.auth.hfTokenSecretRef" in refused.reason
            assert (await hub.fetch_config("hf://org/closed", None, "hf_other")).config is None

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("status", "reason"),
    [(403, "accept the model's terms"), (404, "no such model"), (429, "too often"), (500, "answered 500")],
)
def test_a_refusal_tells_why_and_is_kept_for_a_minute(status: int, reason: str) -> None:
    async def scenario() -> None:
        fake, clock = FakeHub(answers={"org/model": lambda request: web.Response(status=status)}), Clock()
        async with serving(fake) as endpoint:
            hub = hub_at(endpoint, clock)
            for _ in range(2):
                found = await hub.fetch_config("hf://org/model", None, None)
                assert found.config is None
                assert reason in found.reason
            assert len(fake.asked) == 1
            fake.answers.clear()
            clock.now += KEEP_FAILURE_SECONDS
            assert (await hub.fetch_config("hf://org/model", None, None)).config == CONFIG

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"x" * (LARGEST_CONFIG + 1), "more than 1024 KiB"),
        (b"not json", "can't be read"),
        (b"[1]", "no object"),
        (b"[" * 100_000, "can't be read"),
        (b"\xff\xfe", "can't be read"),
    ],
)
def test_an_answer_that_is_no_configuration_is_a_reason(body: bytes, reason: str) -> None:
    async def scenario() -> None:
        fake = FakeHub(answers={"org/model": lambda request: web.Response(body=body)})
        async with serving(fake) as endpoint:
            found = await hub_at(endpoint).fetch_config("hf://org/model", None, None)
        assert found.config is None
        assert reason in found.reason

    asyncio.run(scenario())


def test_a_slow_hub_is_given_up_on_and_others_are_not() -> None:
    async def scenario() -> None:
        fake = FakeHub()
        async with serving(fake) as endpoint:
            hub = hub_at(endpoint, timeout=0.2)
            found = await hub.fetch_config("hf://org/slow", None, None)
            assert found.config is None
            assert "longer than 0.2 s" in found.reason
            assert (await hub.fetch_config("hf://org/model", None, None)).config == CONFIG

    asyncio.run(scenario())


def test_no_more_than_so_many_wait_for_it_and_what_is_known_waits_for_nobody() -> None:
    async def scenario() -> None:
        fake = FakeHub()
        async with serving(fake) as endpoint:
            hub = hub_at(endpoint, most_waiting=1)
            await hub.fetch_config("hf://org/known", None, None)
            waiting = asyncio.create_task(hub.fetch_config("hf://org/slow", None, None))
            await asyncio.sleep(0)
            with pytest.raises(Unavailable, match="wait for the hub"):
                await hub.fetch_config("hf://org/other", None, None)
            await hub.fetch_config("hf://org/known", None, None)
            fake.released.set()
            assert (await waiting).config == CONFIG
            await hub.fetch_config("hf://org/other", None, None)

    asyncio.run(scenario())


def test_a_hub_that_is_away_is_left_alone_for_a_minute() -> None:
    async def scenario() -> None:
        clock, fake = Clock(), FakeHub()
        async with serving(fake) as endpoint:
            pass
        hub = hub_at(endpoint, clock)
        first = await hub.fetch_config("hf://org/a", None, None)
        assert "can't be reached" in first.reason
        assert await hub.fetch_config("hf://org/b", None, None) == first

    asyncio.run(scenario())


def test_a_redirect_is_followed_and_the_token_stays_with_the_hub() -> None:
    async def scenario() -> None:
        storage, fake = FakeHub(), FakeHub()
        async with serving(storage) as elsewhere, serving(fake) as endpoint:

            def redirect(request: web.Request) -> web.Response:
                return web.Response(status=302, headers={"Location": elsewhere + "/blob"})

            fake.answers["org/model"] = redirect
            found = await hub_at(endpoint).fetch_config("hf://org/model", None, TOKEN)
        assert found.config == CONFIG
        assert fake.tokens == [f"Bearer {TOKEN}"]
        assert storage.tokens == [None]

    asyncio.run(scenario())


def test_a_redirect_that_never_ends_is_a_reason() -> None:
    async def scenario() -> None:
        def loop(request: web.Request) -> web.Response:
            return web.Response(status=302, headers={"Location": str(request.url)})

        fake = FakeHub(answers={"org/model": loop})
        async with serving(fake) as endpoint:
            found = await hub_at(endpoint).fetch_config("hf://org/model", None, None)
        assert found.config is None
        assert found.reason

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "uri", ["pvc://claim/model", "/models/x", "hf://model", "hf://a/b/c", "hf://../b", "hf://a/b?c", "random://x.json"]
)
def test_what_is_on_no_hub_is_not_asked_for(uri: str) -> None:
    async def scenario() -> None:
        fake = FakeHub()
        async with serving(fake) as endpoint:
            found = await hub_at(endpoint).fetch_config(uri, None, None)
        assert found.config is None
        assert fake.asked == []

    asyncio.run(scenario())


def test_the_cache_is_bounded_and_keeps_what_was_used_last() -> None:
    async def scenario() -> None:
        fake = FakeHub()
        async with serving(fake) as endpoint:
            hub = hub_at(endpoint)
            for number in range(MOST_CONFIGS):
                await hub.fetch_config(f"hf://org/m{number}", None, None)
            await hub.fetch_config("hf://org/m0", None, None)
            await hub.fetch_config("hf://org/new", None, None)
            fake.asked.clear()
            await hub.fetch_config("hf://org/m0", None, None)
            assert fake.asked == []
            await hub.fetch_config("hf://org/m1", None, None)
            assert len(fake.asked) == 1

    asyncio.run(scenario())


def test_nobody_can_read_the_token_from_what_is_kept() -> None:
    async def scenario() -> None:
        fake = FakeHub()
        async with serving(fake) as endpoint:
            hub = hub_at(endpoint)
            found = await hub.fetch_config("hf://org/model", None, TOKEN)
            assert TOKEN not in json.dumps(found.config)
            assert TOKEN not in repr(vars(hub))

    asyncio.run(scenario())
