"""``/metrics``, ``/healthz`` and ``/readyz`` of the operator itself."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from aiohttp import web
from prometheus_client import CollectorRegistry, generate_latest

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Problems = Callable[[], list[str]]
"""Why not, in words; empty: all is well."""


@asynccontextmanager
async def serving(
    registry: CollectorRegistry, *, unhealthy: Problems, unready: Problems, host: str, port: int
) -> AsyncIterator[int]:
    """Serve until left; yields the port listened on."""
    app = web.Application()
    app.add_routes(
        [
            web.get("/metrics", _metrics(registry)),
            web.get("/healthz", _probe(unhealthy)),
            web.get("/readyz", _probe(unready)),
        ]
    )
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        site = web.TCPSite(runner, host, port)
        await site.start()
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()


def _metrics(registry: CollectorRegistry) -> Handler:
    async def handler(_: web.Request) -> web.Response:
        return web.Response(body=generate_latest(registry), content_type="text/plain", charset="utf-8")

    return handler


def _probe(problems: Problems) -> Handler:
    async def handler(_: web.Request) -> web.Response:
        found = problems()
        return web.Response(text="\n".join(found) or "ok", status=503 if found else 200)

    return handler
