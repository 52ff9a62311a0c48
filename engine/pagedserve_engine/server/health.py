"""Probes and metrics: answered while the model loads, while the engine drains, and after the core has died."""

from __future__ import annotations

import orjson
from aiohttp import web
from prometheus_client.exposition import choose_encoder

from pagedserve_engine.server.bodies import json_response
from pagedserve_engine.server.keys import ENGINE, REGISTRY


async def live(request: web.Request) -> web.Response:
    """200 while the process makes progress, loading included; 503 tells to restart it."""
    return _answer(request, healthy=request.app[ENGINE].alive)


async def ready(request: web.Request) -> web.Response:
    """200 where new requests are welcome."""
    return _answer(request, healthy=request.app[ENGINE].ready)


async def metrics(request: web.Request) -> web.Response:
    """What the registry holds, in the format that the collector asks for."""
    encode, content_type = choose_encoder(request.headers.get("Accept", ""))
    return web.Response(body=encode(request.app[REGISTRY]), headers={"Content-Type": content_type})


def _answer(request: web.Request, *, healthy: bool) -> web.Response:
    engine = request.app[ENGINE]
    if not engine.alive:
        status = "dead"
    elif engine.draining:
        status = "draining"
    else:
        status = "ok" if engine.ready else "loading"
    body = orjson.dumps({"status": status, "reason": engine.reason})
    response = json_response(body, status=200 if healthy else 503)
    response.headers["Cache-Control"] = "no-store"
    return response
