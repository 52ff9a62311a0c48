"""What the application holds, by typed key."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from aiohttp import web
from prometheus_client import CollectorRegistry

from pagedserve_engine.config import EngineConfig
from pagedserve_engine.server.auth import ApiKeys
from pagedserve_engine.server.traffic import HttpMetrics
from pagedserve_engine.tracing import SilentSpan, Span, Tracer

if TYPE_CHECKING:
    import asyncio

    from pagedserve_engine.frontend import AsyncEngine

CONFIG = web.AppKey("CONFIG", EngineConfig)
ENGINE: web.AppKey[AsyncEngine] = web.AppKey("ENGINE")
LOADING: web.AppKey[asyncio.Future[Any]] = web.AppKey("LOADING")
"""Ends when the engine is ready, or with the reason why it can't be."""
REGISTRY = web.AppKey("REGISTRY", CollectorRegistry)
API_KEYS = web.AppKey("API_KEYS", ApiKeys)
"""Absent: no key is asked for."""
TRACER: web.AppKey[Tracer] = web.AppKey("TRACER")
HTTP_METRICS = web.AppKey("HTTP_METRICS", HttpMetrics)
FINGERPRINT = web.AppKey("FINGERPRINT", str)
"""Of the configuration that serves: OpenAI's system_fingerprint."""
OPENAPI = web.AppKey("OPENAPI", bytes)


@dataclass(slots=True, kw_only=True)
class Record:
    """What the one log line and the span of a request say."""

    request_id: str
    started: float = field(default_factory=time.monotonic)
    span: Span = field(default_factory=SilentSpan)
    num_prompt_tokens: int | None = None
    num_output_tokens: int | None = None
    num_cached_tokens: int | None = None
    first_token: float | None = None
    """Monotonic seconds."""
    error_code: str | None = None
    finish_reasons: Sequence[str] = ()

    def count(self, num_tokens: int) -> None:
        """Note tokens that came."""
        if self.first_token is None:
            self.first_token = time.monotonic()
        self.num_output_tokens = (self.num_output_tokens or 0) + num_tokens


RECORD: ContextVar[Record] = ContextVar("RECORD")
"""Of the request being served: aiohttp handles each in a task of its own."""
