"""The HTTP session that kopf watches through: counted, freshly authorised, and stamped.

A watch can die silently. A stamp is an event, a bookmark or a reconnection. The API server sends a bookmark about once
a minute, and kopf opens a watch again after 70 silent seconds: a quiet but healthy watch always has a young stamp.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from typing import Any, Final

import aiohttp
import kopf
from kubernetes.aio.client import ApiClient, Configuration

from pagedserve_operator import __version__
from pagedserve_operator.kinds import KINDS, OPTIONAL
from pagedserve_operator.metrics import Metrics
from pagedserve_operator.names import MANAGER

_BY_PLURAL: Final[Mapping[str, str]] = {kind.plural: kind.name for kind in KINDS.values()}
_VERBS: Final[Mapping[str, str]] = {"POST": "create", "PUT": "update", "DELETE": "delete"}


class WatchAges:
    """When each kind's watch last gave a sign of life; ``clock`` gives seconds that never run backwards."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._stamps: dict[str, float] = {}
        self._seen: set[str] = set()

    def expect(self, kinds: Iterable[str]) -> None:
        """These will be watched: one whose first watch never opens is as dead as one that has died."""
        for kind in kinds:
            self._stamps.setdefault(kind, self._clock())

    def stamp(self, kind: str) -> None:
        """The kind's watch is alive now."""
        self._stamps[kind] = self._clock()
        self._seen.add(kind)

    def seen(self, kind: str) -> bool:
        """Whether the kind's watch has ever been alive."""
        return kind in self._seen

    def ages(self) -> Mapping[str, float]:
        """Seconds since the last sign of life, by kind."""
        now = self._clock()
        return {kind: now - at for kind, at in self._stamps.items()}

    def stale(self, seconds: float) -> tuple[str, ...]:
        """Kinds without a sign of life for so long; an optional kind's watch may end with its CRD."""
        return tuple(kind for kind, age in self.ages().items() if age > seconds and kind not in OPTIONAL)


class _Stamped:
    """A response's content that stamps each chunk; everything else is the content's own."""

    def __init__(self, content: Any, stamp: Callable[[], None]) -> None:
        self._content = content
        self._stamp = stamp

    def __getattr__(self, name: str) -> Any:
        return getattr(self._content, name)

    async def iter_chunked(self, size: int) -> AsyncIterator[bytes]:
        async for chunk in self._content.iter_chunked(size):
            self._stamp()
            yield chunk


def stamping(ages: WatchAges) -> Any:
    """A client middleware that stamps watches."""

    async def middleware(request: aiohttp.ClientRequest, handler: Any) -> aiohttp.ClientResponse:
        response: Any = await handler(request)
        kind = _BY_PLURAL.get(request.url.path.rsplit("/", 1)[-1])
        if "watch" in request.url.query and kind is not None and response.status == 200:
            ages.stamp(kind)
            response.content = _Stamped(response.content, lambda: ages.stamp(kind))
        return response  # type: ignore[no-any-return]

    return middleware


def noticing_gaps(begun_anew: Callable[[str], None]) -> Any:
    """A client middleware that tells when a kind is listed once more: what went meanwhile was never told."""
    listed: set[str] = set()

    async def middleware(request: aiohttp.ClientRequest, handler: Any) -> aiohttp.ClientResponse:
        kind = _BY_PLURAL.get(request.url.path.rsplit("/", 1)[-1])
        response: aiohttp.ClientResponse = await handler(request)
        if kind is not None and response.status == 200 and not {"watch", "continue"} & set(request.url.query):
            if kind in listed:
                begun_anew(kind)
            listed.add(kind)
        return response

    return middleware


def counting(metrics: Metrics) -> Any:
    """A client middleware that counts answers by verb and code."""

    async def middleware(request: aiohttp.ClientRequest, handler: Any) -> aiohttp.ClientResponse:
        code = 0
        try:
            response: aiohttp.ClientResponse = await handler(request)
            code = response.status
            return response
        finally:
            metrics.api_calls.labels(_verb(request), str(code)).inc()

    return middleware


def _verb(request: aiohttp.ClientRequest) -> str:
    if request.method == "GET":
        return "watch" if "watch" in request.url.query else "get"
    if request.method == "PATCH":
        applies = request.headers.get("Content-Type", "").startswith("application/apply-patch")
        return "apply" if applies else "patch"
    return _VERBS.get(request.method, request.method.lower())


def authorising(configuration: Configuration) -> Any:
    """A client middleware that sets the token of this moment: a Pod's token is replaced about every hour."""

    async def middleware(request: aiohttp.ClientRequest, handler: Any) -> aiohttp.ClientResponse:
        settings = await configuration.auth_settings()
        if "BearerToken" in settings:
            request.headers["Authorization"] = str(settings["BearerToken"]["value"])
        return await handler(request)  # type: ignore[no-any-return]

    return middleware


def kopf_session(configuration: Configuration, middlewares: tuple[Any, ...]) -> kopf.AiohttpSession:
    """Credentials for kopf; its session outlives every watch and is closed by kopf."""
    connector = aiohttp.TCPConnector(limit=0, ssl=ApiClient(configuration).rest_client.ssl_context)
    session = aiohttp.ClientSession(
        connector=connector,
        headers={"User-Agent": f"{MANAGER}-watches/{__version__}"},
        middlewares=(authorising(configuration), *middlewares),
    )
    return kopf.AiohttpSession(server=configuration.host, aiohttp_session=session)
