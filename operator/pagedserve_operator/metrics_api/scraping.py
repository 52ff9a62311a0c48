"""Reading engines: so many connections, so long, so many bytes, and each pod at most once in a second."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from functools import partial
from ipaddress import ip_address
from typing import Final
from weakref import WeakValueDictionary

import aiohttp

from pagedserve_operator.metrics_api.answers import Answers
from pagedserve_operator.metrics_api.documents import SERIES
from pagedserve_operator.metrics_api.pods import Engine
from pagedserve_operator.metrics_api.values import Reading, read_numbers
from pagedserve_operator.names import ENGINE_PORT

logger = logging.getLogger(__name__)

CONNECTIONS: Final = 64
"""Engines that are read at once."""
CONNECTIONS_OF_NAMESPACE: Final = 16
"""The same of one namespace: others get their turn however many of its pods don't answer."""
CONNECT_SECONDS: Final = 0.5
"""Longest wait for a connection, which an engine that is only busy takes at once."""
SCRAPE_SECONDS: Final = 2.0
"""Longest wait for one engine, once it is its turn."""
ALL_SECONDS: Final = 5.0
"""Longest wait for all engines that one request asks for; who hasn't answered by then is missing."""
MOST_BYTES: Final = 1 << 20
KEPT_SECONDS: Final = 1.0
MISSING_SECONDS: Final = 5.0
"""One that doesn't answer is left alone for so long: it would hold up each metric of an autoscaler anew."""
MOST_PODS: Final = 20_000


class Scraper:
    """Owns its connections; ``count`` is told the result of each read: read, failed."""

    def __init__(
        self,
        *,
        count: Callable[[str], None] = lambda _: None,
        port: int = ENGINE_PORT,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._count = count
        self._port = port
        self._now = now
        self._session: aiohttp.ClientSession | None = None
        self._turn = asyncio.Semaphore(CONNECTIONS)
        self._turn_of: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()
        """By namespace, while somebody waits or has the turn."""
        self._readings: Answers[str, Reading] = Answers(seconds=_lasts, most=MOST_PODS)

    async def close(self) -> None:
        """Stop reading and close the connections."""
        await self._readings.close()
        if self._session is not None:
            await self._session.close()

    async def read(self, engines: Iterable[Engine]) -> Mapping[str, Reading]:
        """Readings by pod's name, at most a second old; pods that don't answer in time aren't among them."""
        asked = {
            engine.name: asyncio.ensure_future(self._readings.get(engine.uid, partial(self._scrape, engine)))
            for engine in engines
        }
        if not asked:
            return {}
        done, late = await asyncio.wait(asked.values(), timeout=ALL_SECONDS)
        for task in late:
            task.cancel()
        readings = {name: task.result() for name, task in asked.items() if task in done}
        return {name: reading for name, reading in readings.items() if not reading.missing}

    async def _scrape(self, engine: Engine) -> Reading:
        turn = self._turn_of.setdefault(engine.namespace, asyncio.Semaphore(CONNECTIONS_OF_NAMESPACE))
        async with turn, self._turn:
            try:
                async with asyncio.timeout(SCRAPE_SECONDS):
                    numbers = read_numbers(await self._fetch(engine.address), SERIES)
            except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
                why = str(error) or type(error).__name__
                logger.info("engine %s at %s can't be read: %s", engine.name, engine.address, why)
                numbers = {}
        self._count("read" if numbers else "failed")
        return Reading(numbers, self._now())

    async def _fetch(self, address: str) -> str:
        host = f"[{address}]" if ip_address(address).version == 6 else address
        # Neither redirects nor compression: what a pod answers decides neither whom we ask nor how much we hold.
        asked = self._connections().get(f"http://{host}:{self._port}/metrics", allow_redirects=False)
        async with asked as answer:
            if answer.status != 200:
                raise ValueError(f"it answers {answer.status}")
            return (await _read(answer.content)).decode()

    def _connections(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=CONNECTIONS),
                timeout=aiohttp.ClientTimeout(total=SCRAPE_SECONDS, sock_connect=CONNECT_SECONDS),
                headers={"Accept": "text/plain", "Accept-Encoding": "identity"},
                auto_decompress=False,
            )
        return self._session


async def _read(content: aiohttp.StreamReader) -> bytes:
    body = bytearray()
    async for chunk in content.iter_chunked(1 << 16):
        body += chunk
        if len(body) > MOST_BYTES:
            raise ValueError(f"it answers with more than {MOST_BYTES} bytes")
    return bytes(body)


def _lasts(reading: Reading) -> float:
    return MISSING_SECONDS if reading.missing else KEPT_SECONDS
