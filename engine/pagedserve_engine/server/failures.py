"""Whatever goes wrong while a request is served, as one error of the tree that the client may see."""

from __future__ import annotations

import logging

from aiohttp import web

from pagedserve_engine.errors import (
    InvalidParameterError,
    MethodNotAllowedError,
    NotFoundError,
    PagedServeError,
    RequestTooLargeError,
)
from pagedserve_engine.logs import describe_exception
from pagedserve_engine.server.keys import CONFIG

logger = logging.getLogger(__name__)


def as_error(request: web.Request, failure: Exception) -> PagedServeError:
    """The error to answer with; what nobody expected is logged and told without detail."""
    if isinstance(failure, PagedServeError):
        return failure
    if isinstance(failure, web.HTTPRequestEntityTooLarge):
        limit = request.app[CONFIG].max_request_bytes
        return RequestTooLargeError(f"the body is larger than {limit} bytes: send less, or raise MAX_REQUEST_BYTES")
    if isinstance(failure, web.HTTPNotFound):
        return NotFoundError(f"there is no {request.method} {request.path[:200]}: see /openapi.json")
    if isinstance(failure, web.HTTPMethodNotAllowed):
        allowed = ", ".join(sorted(failure.allowed_methods))
        return MethodNotAllowedError(f"{request.path[:200]} takes {allowed}, not {failure.method}")
    if isinstance(failure, web.HTTPException | web.RequestPayloadError):
        return InvalidParameterError(
            "the body can't be read: send JSON with the length and encoding that its headers name"
        )
    logger.error("request failed: %s", describe_exception(failure))
    return PagedServeError("the server failed; the client did nothing wrong")
