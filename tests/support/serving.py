"""The server in the test's own event loop, around a fake engine."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import aiohttp
from aiohttp.test_utils import TestClient, TestServer
from prometheus_client import CollectorRegistry

from fake_engine import FakeEngine
from pagedserve_engine.config import EngineConfig
from pagedserve_engine.server.app import create_app

T = TypeVar("T")


@dataclass
class Reply:
    """A whole response."""

    status: int
    headers: Any
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> Any:
        return self.json["error"]

    @property
    def events(self) -> list[Any]:
        """The data of each event; the end mark as text."""
        parts = [part.removeprefix(b"data: ") for part in self.body.split(b"\n\n") if part]
        return [part.decode() if part == b"[DONE]" else json.loads(part) for part in parts]

    @property
    def chunks(self) -> list[Any]:
        """The events before the end mark, which must be there."""
        assert self.events[-1] == "[DONE]"
        return self.events[:-1]


@asynccontextmanager
async def serving(engine: FakeEngine, config: EngineConfig | None = None) -> AsyncIterator[TestClient]:
    """A client of a server around ``engine``, which has had its chance to load."""
    engine.config = config or engine.config
    app = create_app(engine.config, engine, CollectorRegistry())
    async with TestClient(TestServer(app)) as client:
        await asyncio.sleep(0)
        yield client


def drive(
    scenario: Callable[[TestClient], Awaitable[T]], engine: FakeEngine | None = None, config: EngineConfig | None = None
) -> T:
    """Run ``scenario`` with a client of a fresh server."""

    async def run() -> T:
        async with serving(engine or FakeEngine(), config) as client:
            return await scenario(client)

    return asyncio.run(run())


def call(
    method: str, path: str, *, engine: FakeEngine | None = None, config: EngineConfig | None = None, **options: Any
) -> Reply:
    """One request to a fresh server."""

    async def scenario(client: TestClient) -> Reply:
        async with client.request(method, path, **options) as response:
            return await read(response)

    return drive(scenario, engine, config)


async def read(response: aiohttp.ClientResponse) -> Reply:
    """The whole response."""
    return Reply(response.status, response.headers, await response.read())


def complete(engine: FakeEngine | None = None, config: EngineConfig | None = None, **body: Any) -> Reply:
    """POST /v1/completions."""
    return call("POST", "/v1/completions", engine=engine, config=config, json={"prompt": "Hi", **body})


def chat(engine: FakeEngine | None = None, config: EngineConfig | None = None, **body: Any) -> Reply:
    """POST /v1/chat/completions."""
    body = {"messages": [{"role": "user", "content": "Hi"}], **body}
    return call("POST", "/v1/chat/completions", engine=engine, config=config, json=body)
