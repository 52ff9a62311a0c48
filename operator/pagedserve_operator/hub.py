"""config.json of ``hf://`` models, so that they are sized by their shape and not by their name.

A hub that is slow, closed or away is never an error: sizing falls back on the name, and the reason is told.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final
from urllib.parse import quote

import aiohttp

from pagedserve_operator.errors import Unavailable
from pagedserve_operator.spec import Json

LARGEST_CONFIG: Final = 1 << 20
"""Bytes; the largest configurations in use have tens of thousands."""
KEEP_FAILURE_SECONDS: Final = 60.0
MOST_CONFIGS: Final = 256

_HUB_URI: Final = re.compile(r"hf://(\w[\w.-]*/\w[\w.-]*)/?")
_STATUSES: Final = {
    401: "the hub wants a token that may read it: set spec.auth.hfTokenSecretRef",
    403: "the token may not read it: accept the model's terms, or set spec.auth.hfTokenSecretRef to another token",
    404: "the hub has no such model or revision, or no config.json in it",
    429: "the hub is asked too often",
}


@dataclass(frozen=True, slots=True)
class Fetched:
    """A model's configuration, or (None) why there is none."""

    config: Json | None
    reason: str
    """A clause to log and to tell; empty with a configuration."""


@dataclass(slots=True)
class _Entry:
    lock: asyncio.Lock
    fetched: Fetched | None = None
    until: float = 0.0
    """When to ask again; monotonic seconds."""


class Hub:
    """Asks one hub, once for each model, revision and token; a failure is kept for a minute.

    A hub that can't be reached at all is left alone for a minute, whatever the model. No more than ``most_waiting``
    wait for it at a time: whoever would is sent away, so that a slow hub never holds every worker.
    """

    def __init__(
        self,
        *,
        endpoint: str,
        timeout_seconds: float,
        most_waiting: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._most_waiting = most_waiting
        self._waiting = 0
        self._endpoint = endpoint.rstrip("/")
        self._timeout = aiohttp.ClientTimeout(total=timeout_seconds, sock_connect=timeout_seconds / 2)
        self._clock = clock
        self._entries: OrderedDict[tuple[str, str, str], _Entry] = OrderedDict()
        self._away_until = 0.0
        self._away = ""

    async def fetch_config(self, uri: str, revision: str | None, token: str | None) -> Fetched:
        """config.json of the model, from the cache where it has been fetched; never raises for the hub's trouble.

        Raises Unavailable where too many wait for the hub already.
        """
        match = _HUB_URI.fullmatch(uri)
        if match is None:
            return Fetched(None, f"{uri} is on no hub")
        # With the token in the key nobody is told about a model that only another may read.
        key = (match[1], revision or "main", hashlib.sha256((token or "").encode()).hexdigest())
        entry = self._entry(key)
        if entry.fetched is not None and self._clock() < entry.until:
            return entry.fetched
        if self._waiting >= self._most_waiting:
            raise Unavailable("as many looks as may wait for the hub do so already")
        self._waiting += 1
        try:
            return await self._fetch(entry, match[1], revision or "main", token)
        finally:
            self._waiting -= 1

    async def _fetch(self, entry: _Entry, repository: str, revision: str, token: str | None) -> Fetched:
        async with entry.lock:
            if entry.fetched is None or self._clock() >= entry.until:
                entry.fetched = await self._ask(repository, revision, token)
                kept = float("inf") if entry.fetched.config is not None else KEEP_FAILURE_SECONDS
                entry.until = self._clock() + kept
            return entry.fetched

    def _entry(self, key: tuple[str, str, str]) -> _Entry:
        entry = self._entries.setdefault(key, _Entry(asyncio.Lock()))
        self._entries.move_to_end(key)
        if len(self._entries) > MOST_CONFIGS:
            self._entries.popitem(last=False)
        return entry

    async def _ask(self, repository: str, revision: str, token: str | None) -> Fetched:
        if self._clock() < self._away_until:
            return Fetched(None, self._away)
        url = f"{self._endpoint}/{repository}/resolve/{quote(revision, safe='')}/config.json"
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        try:
            async with (
                aiohttp.ClientSession(timeout=self._timeout, trust_env=True) as session,
                session.get(url, headers=headers) as response,
            ):
                return await _read(response)
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            self._away = f"the hub {self._endpoint} can't be reached ({error or type(error).__name__})"
            self._away_until = self._clock() + KEEP_FAILURE_SECONDS
            return Fetched(None, self._away)
        except TimeoutError:
            return Fetched(None, f"the hub took longer than {self._timeout.total:g} s")
        except (aiohttp.ClientError, ValueError, RecursionError) as error:
            return Fetched(None, f"the hub's answer can't be read ({error or type(error).__name__})")


async def _read(response: aiohttp.ClientResponse) -> Fetched:
    if response.status != 200:
        return Fetched(None, _STATUSES.get(response.status, f"the hub answered {response.status}"))
    body = b""
    async for chunk in response.content.iter_chunked(1 << 16):
        body += chunk
        if len(body) > LARGEST_CONFIG:
            return Fetched(None, f"its config.json has more than {LARGEST_CONFIG >> 10} KiB")
    config = json.loads(body)
    return Fetched(config, "") if isinstance(config, dict) else Fetched(None, "its config.json is no object")
