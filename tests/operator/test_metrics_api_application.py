"""The custom metrics API as its callers meet it: over real TLS, with real certificates, by whoever they are."""

from __future__ import annotations

import asyncio
import ssl
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import aiohttp
import pytest
from multidict import CIMultiDict

from control_certificates import Authority, Signed
from metrics_world import FakeServer, authentication, client_context
from pagedserve_operator.metrics_api import application as module
from pagedserve_operator.metrics_api.application import Parts, application
from pagedserve_operator.metrics_api.authentication import FrontProxy, read_front_proxy
from pagedserve_operator.metrics_api.authorization import Authorizer
from pagedserve_operator.metrics_api.certificates import Certificates, renewed, to_pem
from pagedserve_operator.metrics_api.listener import Identity, Listener
from pagedserve_operator.metrics_api.rates import Rates
from pagedserve_operator.metrics_api.refusals import BadRequest
from pagedserve_operator.metrics_api.values import Value

JSON = dict[str, Any]
NAME = "metrics.ops.svc"
ROOT = "/apis/custom.metrics.k8s.io/v1beta2"
WAITING = f"{ROOT}/namespaces/models/pods/*/pagedserve_requests_waiting"
ALICE = {"X-Remote-User": "alice"}
FRONT_PROXY = Authority.new()


def certificates() -> Certificates:
    return renewed(None, names=(NAME,), published=(), now=datetime.now(UTC))


class Reader:
    """Every engine waits for two requests; ``answer`` may be another."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, str, str]] = []
        self.answer: Callable[[], Awaitable[tuple[Value, ...]]] = self._values

    async def values(self, namespace: str, pod: str, metric: str, *, selector: str) -> tuple[Value, ...]:
        self.asked.append((namespace, pod, metric, selector))
        return await self.answer()

    async def _values(self) -> tuple[Value, ...]:
        return (Value(pod="chat-1", number=2.0, at=datetime.now(UTC)),)


@dataclass
class World:
    """A served API, and requests to it as the front proxy unless said otherwise."""

    server: FakeServer = field(default_factory=FakeServer)
    reader: Reader = field(default_factory=Reader)
    codes: Counter[int] = field(default_factory=Counter)
    front_proxy: FrontProxy | None = field(default_factory=lambda: read_front_proxy(authentication(FRONT_PROXY)))
    rates: Rates = field(default_factory=lambda: Rates(1000))
    held: Certificates = field(default_factory=certificates)

    def __post_init__(self) -> None:
        parts = Parts(
            trusts=self,
            rates=self.rates,
            authorizer=Authorizer(self.server),
            reader=self.reader,  # type: ignore[arg-type]
            count=lambda code: self.codes.update([code]),
        )
        self.listener = Listener(application(parts), host="127.0.0.1", port=0)

    async def use(self, held: Certificates, authority: Authority = FRONT_PROXY) -> None:
        self.held = held
        await self.listener.use(Identity(held.serving, authority.pem.decode()))

    @asynccontextmanager
    async def caller(self, shown: Signed | None, *, reuse: bool = False) -> AsyncIterator[aiohttp.ClientSession]:
        """Connections that show this certificate; by default a new one for each request."""
        context = client_context(to_pem(self.held.trusted), shown)
        connector = aiohttp.TCPConnector(ssl=context, force_close=not reuse)
        base = f"https://127.0.0.1:{self.listener.port}"
        async with aiohttp.ClientSession(base, connector=connector) as session:
            yield session

    async def ask(
        self,
        path: str = WAITING,
        *,
        shown: Signed | None = None,
        headers: Mapping[str, str] = ALICE,
        method: str = "GET",
    ) -> tuple[int, JSON, Any]:
        """Status, JSON and headers."""
        async with self.caller(shown or FRONT_PROXY.client()) as session:
            return await asked(session, path, headers=headers, method=method)


async def asked(
    session: aiohttp.ClientSession, path: str = WAITING, *, headers: Mapping[str, str] = ALICE, method: str = "GET"
) -> tuple[int, JSON, Any]:
    async with session.request(method, path, headers=headers, server_hostname=NAME) as answer:
        return answer.status, await answer.json(content_type=None), answer.headers


def run(story: Callable[[World], Awaitable[None]], **parts: Any) -> None:
    async def main() -> None:
        world = World(**parts)
        try:
            await world.use(world.held)
            await story(world)
        finally:
            await world.listener.close()

    asyncio.run(main())


def test_who_may_gets_the_values() -> None:
    async def story(world: World) -> None:
        status, found, _ = await world.ask(f"{WAITING}?labelSelector=app%3Dchat")
        assert status == 200
        assert [item["value"] for item in found["items"]] == ["2"]
        assert world.reader.asked == [("models", "*", "pagedserve_requests_waiting", "app=chat")]
        assert (await world.ask(WAITING.replace("*", "%2A")))[0] == 200
        assert world.codes == {200: 2}

    run(story)


@pytest.mark.parametrize("path", ["/apis", "/apis/custom.metrics.k8s.io", ROOT])
def test_whoever_is_known_may_discover(path: str) -> None:
    async def story(world: World) -> None:
        world.server.allowed = False
        status, found, _ = await world.ask(path)
        assert status == 200
        assert found["kind"].startswith("API")

    run(story)


@pytest.mark.parametrize("path", [ROOT, WAITING, "/openapi/v2", "/elsewhere"])
def test_without_a_certificate_nothing_is_answered(path: str) -> None:
    async def story(world: World) -> None:
        async with world.caller(None) as session:
            with pytest.raises((aiohttp.ClientError, OSError)):
                await asked(session, path)
        assert (world.reader.asked, world.codes) == ([], {})

    run(story)


def test_a_certificate_of_another_name_is_refused() -> None:
    async def story(world: World) -> None:
        status, told, _ = await world.ask(shown=FRONT_PROXY.client("kubelet"))
        assert (status, told["reason"]) == (401, "Unauthorized")
        assert "kubelet" in told["message"]

    run(story)


def test_a_certificate_of_another_authority_gets_no_connection() -> None:
    async def story(world: World) -> None:
        stranger = Authority.new("somebody").client()
        with pytest.raises((aiohttp.ClientError, ssl.SSLError, ConnectionError)):
            await world.ask(shown=stranger)
        assert not world.codes

    run(story)


def test_a_front_proxy_that_names_nobody_is_refused() -> None:
    async def story(world: World) -> None:
        assert (await world.ask(headers={"X-Remote-Group": "system:masters"}))[0] == 401

    run(story)


def test_before_the_front_proxy_is_known_nobody_is() -> None:
    async def story(world: World) -> None:
        world.front_proxy = None
        status, told, headers = await world.ask()
        assert (status, told["reason"], headers["Retry-After"]) == (503, "ServiceUnavailable", "1")

    run(story)


def test_who_may_not_is_forbidden_and_no_engine_is_read() -> None:
    async def story(world: World) -> None:
        world.server.allowed = False
        status, told, _ = await world.ask()
        assert (status, told["reason"]) == (403, "Forbidden")
        assert "alice" in told["message"]
        assert world.reader.asked == []

    run(story)


def test_an_unknown_metric_is_told_with_the_known_ones() -> None:
    async def story(world: World) -> None:
        status, told, _ = await world.ask(f"{ROOT}/namespaces/models/pods/*/cpu")
        assert (status, told["reason"]) == (404, "NotFound")
        assert "pagedserve_queue_wait_seconds" in told["message"]

    run(story)


@pytest.mark.parametrize(
    "path", [f"{ROOT}/namespaces/models/services/*/x", f"{ROOT}/nodes/*/x", "/openapi/v2", "/openapi/v3", "/"]
)
def test_there_is_nothing_else(path: str) -> None:
    async def story(world: World) -> None:
        status, told, _ = await world.ask(path)
        assert (status, told["kind"], told["reason"], told["code"]) == (404, "Status", "NotFound", 404)

    run(story)


def test_nothing_can_be_changed() -> None:
    async def story(world: World) -> None:
        status, told, _ = await world.ask(method="POST")
        assert (status, told["reason"]) == (405, "MethodNotAllowed")

    run(story)


def test_selectors_of_series_are_refused_as_there_are_no_labels() -> None:
    async def story(world: World) -> None:
        status, told, _ = await world.ask(f"{WAITING}?metricLabelSelector=a%3Db")
        assert status == 400
        assert "metricLabelSelector" in told["message"]
        assert (await world.ask(f"{WAITING}?metricLabelSelector="))[0] == 200

    run(story)


def test_a_refusal_from_within_reaches_the_caller() -> None:
    async def story(world: World) -> None:
        async def refused() -> tuple[Value, ...]:
            raise BadRequest("labelSelector 'a in': no")

        world.reader.answer = refused
        status, told, _ = await world.ask()
        assert (status, told["reason"], told["message"]) == (400, "BadRequest", "labelSelector 'a in': no")

    run(story)


def test_a_bug_is_logged_and_told_without_its_words(caplog: pytest.LogCaptureFixture) -> None:
    async def story(world: World) -> None:
        async def fails() -> tuple[Value, ...]:
            raise KeyError("a secret")

        world.reader.answer = fails
        status, told, _ = await world.ask()
        assert (status, told["reason"]) == (500, "InternalError")
        assert "secret" not in told["message"]

    run(story)
    assert "a secret" in caplog.text


def test_an_answer_that_takes_too_long_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REQUEST_SECONDS", 0.1)

    async def story(world: World) -> None:
        async def slow() -> tuple[Value, ...]:
            await asyncio.Event().wait()
            raise AssertionError

        world.reader.answer = slow
        status, told, _ = await world.ask()
        assert (status, told["reason"]) == (504, "Timeout")

    run(story)


def test_a_caller_that_asks_too_often_is_told_when_to_come_back() -> None:
    async def story(world: World) -> None:
        answers = [await world.ask() for _ in range(3)]
        assert [status for status, _, _ in answers] == [200, 200, 429]
        _, told, headers = answers[-1]
        assert told["reason"] == "TooManyRequests"
        assert int(headers["Retry-After"]) == told["details"]["retryAfterSeconds"] >= 1
        assert (await world.ask(headers={"X-Remote-User": "bob"}))[0] == 200

    run(story, rates=Rates(1, clock=lambda: 0.0))


def test_a_long_selector_and_many_groups_fit() -> None:
    async def story(world: World) -> None:
        selector = ",".join(f"label-{number}%3Dvalue" for number in range(900))
        assert len(selector) > 16_000
        groups = [("X-Remote-Group", f"group-{number}") for number in range(1000)]
        headers = CIMultiDict([*ALICE.items(), *groups])
        assert (await world.ask(f"{WAITING}?labelSelector={selector}", headers=headers))[0] == 200

    run(story)
