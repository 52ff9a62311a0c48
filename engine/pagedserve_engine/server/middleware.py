"""What every request passes: its record (id, log line, count, span), errors in OpenAI's shape, the key."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from typing import Any

from aiohttp import web
from aiohttp.typedefs import Handler

from pagedserve_engine.logs import request_id
from pagedserve_engine.server.bodies import error_response
from pagedserve_engine.server.failures import as_error
from pagedserve_engine.server.keys import API_KEYS, HTTP_METRICS, RECORD, TRACER, Record

logger = logging.getLogger(__name__)

CLIENT_CLOSED = 499
"""The status in logs where the client went away before the response."""

_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_OPEN = re.compile(r"/health/.*|/metrics")
_QUIET = _OPEN
"""Asked for every few seconds by probes and collectors: logged at debug level."""


@web.middleware
async def keep_record(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Give the request its id, and leave one log line, one count and one span of it."""
    given = request.headers.get("X-Request-Id", "")
    record = Record(request_id=given if _ID.fullmatch(given) else uuid.uuid4().hex)
    RECORD.set(record)
    request_id.set(record.request_id)
    status = CLIENT_CLOSED
    try:
        with request.app[TRACER].span(f"{request.method} {route_of(request)}", request.headers) as span:
            record.span = span
            response = await handler(request)
            status = response.status
            _close_span(record, status)
            return response
    finally:
        _log(request, record, status)
        request.app[HTTP_METRICS].count(route_of(request), status)


async def add_request_id(request: web.Request, response: web.StreamResponse) -> None:
    """Name the request, and no software version, in every response's headers."""
    record = RECORD.get(None)
    if record is not None:
        response.headers["X-Request-Id"] = record.request_id
    response.headers["Server"] = "pagedserve"


@web.middleware
async def shape_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer every failure with OpenAI's error object."""
    try:
        return await handler(request)
    except asyncio.CancelledError:
        raise
    except ConnectionError:
        # The client went away while it was being answered: nobody is there to read an error.
        raise asyncio.CancelledError from None
    except Exception as failure:
        error = as_error(request, failure)
        RECORD.get().error_code = error.code or error.type
        response = error_response(error)
        if isinstance(failure, web.HTTPMethodNotAllowed):
            response.headers["Allow"] = failure.headers["Allow"]
        return response


@web.middleware
async def check_key(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Ask for a key, but on the routes of probes and collectors."""
    keys = request.app.get(API_KEYS)
    if keys is not None and not _OPEN.fullmatch(request.path):
        keys.check(request.headers.get("Authorization", ""))
    return await handler(request)


def route_of(request: web.Request) -> str:
    """The route's pattern; one name for all paths that are none."""
    resource = request.match_info.route.resource
    return resource.canonical if resource is not None else "unknown"


def _close_span(record: Record, status: int) -> None:
    record.span.set(
        {
            "http.response.status_code": status,
            "gen_ai.usage.input_tokens": record.num_prompt_tokens,
            "gen_ai.usage.output_tokens": record.num_output_tokens,
            "gen_ai.usage.cache_read.input_tokens": record.num_cached_tokens,
            "gen_ai.response.finish_reasons": list(record.finish_reasons) or None,
            "gen_ai.response.time_to_first_chunk": _ttft(record),
        }
    )
    if record.error_code or status >= 500:
        record.span.fail(record.error_code or str(status))


def _ttft(record: Record) -> float | None:
    return None if record.first_token is None else record.first_token - record.started


def _log(request: web.Request, record: Record, status: int) -> None:
    level = logging.DEBUG if _QUIET.fullmatch(request.path) else logging.INFO
    if not logger.isEnabledFor(level):
        return
    ttft = _ttft(record)
    fields: dict[str, Any] = {
        "method": request.method,
        "route": route_of(request),
        "status": status,
        "prompt_tokens": record.num_prompt_tokens,
        "output_tokens": record.num_output_tokens,
        "cached_tokens": record.num_cached_tokens,
        "ttft_seconds": None if ttft is None else round(ttft, 4),
        "duration_seconds": round(time.monotonic() - record.started, 4),
        "error": record.error_code,
    }
    logger.log(level, "request", extra={"fields": {name: value for name, value in fields.items() if value is not None}})
