"""The HTTP side of the custom metrics API: who asks, how often, whether they may, and what they get."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from pagedserve_operator.metrics_api import documents
from pagedserve_operator.metrics_api.authentication import Caller, FrontProxy, identify
from pagedserve_operator.metrics_api.authorization import Authorizer
from pagedserve_operator.metrics_api.documents import GROUP, GROUP_VERSION, SERIES
from pagedserve_operator.metrics_api.rates import Rates
from pagedserve_operator.metrics_api.reader import Reader
from pagedserve_operator.metrics_api.refusals import BadRequest, NotAvailable, NotFound, Refusal
from pagedserve_operator.spec import Json

logger = logging.getLogger(__name__)

REQUEST_SECONDS: Final = 15.0
"""Longest answer, lists of pods and rights included."""
_REASONS: Final = {405: "MethodNotAllowed", 400: "BadRequest", 404: "NotFound", 413: "RequestEntityTooLarge"}
_CALLER: Final = web.RequestKey("caller", Caller)


class Trusts(Protocol):
    """Who knows the front proxy."""

    @property
    def front_proxy(self) -> FrontProxy | None:
        """Whom to trust now; None: not known yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What requests are answered with; ``count`` is told each answer's status code."""

    trusts: Trusts
    rates: Rates
    authorizer: Authorizer
    reader: Reader
    count: Callable[[int], None]


def application(parts: Parts) -> web.Application:
    """The whole API; whoever the API server doesn't vouch for gets 401, whatever the path."""
    app = web.Application(middlewares=[_answering(parts), _identifying(parts)], client_max_size=1024)
    app.add_routes(
        [
            web.get("/apis", _document(documents.group_list())),
            web.get(f"/apis/{GROUP}", _document(documents.group())),
            web.get(f"/apis/{GROUP_VERSION}", _document(documents.resource_list())),
            web.get(f"/apis/{GROUP_VERSION}/namespaces/{{namespace}}/pods/{{pod}}/{{metric}}", _values(parts)),
        ]
    )
    return app


def _answering(parts: Parts) -> Middleware:
    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            async with asyncio.timeout(REQUEST_SECONDS):
                response = await handler(request)
        except Refusal as refusal:
            response = _refused(refusal.code, refusal.reason, str(refusal), retry_after=refusal.retry_after)
        except TimeoutError:
            response = _refused(504, "Timeout", f"no answer within {REQUEST_SECONDS:g} s")
        except web.HTTPException as error:
            reason = _REASONS.get(error.status, "InternalError")
            response = _refused(error.status, reason, f"{request.method} {request.path}: {error.reason}")
        except Exception:
            logger.exception("%s %s failed", request.method, request.path)
            response = _refused(500, "InternalError", "the operator's log says why")
        parts.count(response.status)
        return response

    return middleware


def _identifying(parts: Parts) -> Middleware:
    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        request[_CALLER] = caller = _caller(parts, request)
        parts.rates.take(caller.user)
        return await handler(request)

    return middleware


def _caller(parts: Parts, request: web.Request) -> Caller:
    front_proxy = parts.trusts.front_proxy
    if front_proxy is None:
        raise NotAvailable("nobody can be identified yet: the API server's authority isn't known")
    certificate = None if request.transport is None else request.transport.get_extra_info("peercert")
    return identify(front_proxy, certificate, tuple(request.headers.items()))


def _values(parts: Parts) -> Handler:
    async def handler(request: web.Request) -> web.Response:
        namespace, pod, metric = (request.match_info[part] for part in ("namespace", "pod", "metric"))
        await parts.authorizer.require(request[_CALLER], namespace=namespace, pod=pod, metric=metric)
        if metric not in SERIES:
            raise NotFound(f"there is no metric {metric} of pods: ask for one of {', '.join(SERIES)}")
        if request.query.get("metricLabelSelector"):
            raise BadRequest("metricLabelSelector: the engines' metrics have no labels: leave it out")
        selector = request.query.get("labelSelector", "")
        values = await parts.reader.values(namespace, pod, metric, selector=selector)
        return web.json_response(documents.value_list(namespace, metric, values))

    return handler


def _document(document: Json) -> Handler:
    async def handler(_: web.Request) -> web.Response:
        return web.json_response(document)

    return handler


def _refused(code: int, reason: str, message: str, *, retry_after: int | None = None) -> web.Response:
    headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
    return web.json_response(
        documents.failure(code, reason, message, retry_after=retry_after), status=code, headers=headers
    )
