"""Error bodies, as OpenAI shapes them."""

from __future__ import annotations

import math

import orjson
from aiohttp import web

from pagedserve_engine.errors import DrainingError, PagedServeError


def error_body(error: PagedServeError) -> bytes:
    """``{"error": {"message", "type", "param", "code"}}``."""
    fields = {"message": error.message, "type": error.type, "param": error.param, "code": error.code}
    return orjson.dumps({"error": fields})


def error_response(error: PagedServeError) -> web.Response:
    """The response with the error's status, and when to try again."""
    response = json_response(error_body(error), status=int(error.status))
    if error.retry_after is not None:
        response.headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
    if int(error.status) == 401:
        response.headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, DrainingError):
        response.force_close()
    return response


def json_response(body: bytes, *, status: int = 200) -> web.Response:
    """A JSON response."""
    return web.Response(body=body, status=status, content_type="application/json")
