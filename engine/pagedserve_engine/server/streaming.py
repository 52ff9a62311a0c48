"""A response that is written as it comes, and ended properly whatever happens on the way."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

from aiohttp import web

from pagedserve_engine.server.bodies import error_body
from pagedserve_engine.server.events import DONE, event
from pagedserve_engine.server.failures import as_error
from pagedserve_engine.server.generation import time_limit
from pagedserve_engine.server.keys import CONFIG, RECORD

FAREWELL_SECONDS = 1.0
"""For the last event to a client that may have stopped reading."""

_HEADERS = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


async def respond(request: web.Request, events: AsyncGenerator[bytes, None]) -> web.StreamResponse:
    """Send ``events`` and the end mark; a failure on the way becomes the last event, without the mark.

    Each write waits while the client is more than the transport's buffer behind.
    """
    record, limit = RECORD.get(), request.app[CONFIG].request_timeout_seconds
    response = web.StreamResponse(headers=_HEADERS)
    await response.prepare(request)
    try:
        async with time_limit(limit, since=record.started), aclosing(events):
            async for data in events:
                await response.write(data)
            await response.write(DONE)
    except ConnectionError:
        raise
    except Exception as failure:
        error = as_error(request, failure)
        record.error_code = error.code or error.type
        await _say_farewell(request, response, event(error_body(error)))
    else:
        await response.write_eof()
    return response


async def _say_farewell(request: web.Request, response: web.StreamResponse, data: bytes) -> None:
    try:
        async with asyncio.timeout(FAREWELL_SECONDS):
            await response.write(data)
            await response.write_eof()
    except TimeoutError:
        if request.transport is not None:
            request.transport.abort()
