"""The application's wiring, and the process's life around it: listen, load, serve, drain, leave."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import orjson
from aiohttp import web
from prometheus_client import CollectorRegistry

from pagedserve_engine.config import EngineConfig
from pagedserve_engine.server.auth import ApiKeys
from pagedserve_engine.server.keys import (
    API_KEYS,
    CONFIG,
    ENGINE,
    FINGERPRINT,
    HTTP_METRICS,
    LOADING,
    OPENAPI,
    REGISTRY,
    TRACER,
)
from pagedserve_engine.server.middleware import add_request_id, check_key, keep_record, shape_errors
from pagedserve_engine.server.openapi import build_document
from pagedserve_engine.server.routes import add_routes
from pagedserve_engine.server.traffic import HttpMetrics
from pagedserve_engine.tracing import create_tracer

if TYPE_CHECKING:
    from pagedserve_engine.frontend import AsyncEngine

logger = logging.getLogger(__name__)

BACKLOG = 2048
KEEP_ALIVE_SECONDS = 75.0
FLUSH_SECONDS = 5.0
"""For responses to reach their clients after the engine has drained."""


def create_app(config: EngineConfig, engine: AsyncEngine, registry: CollectorRegistry) -> web.Application:
    """The application around ``engine``, which it starts and closes.

    Run it with ``handler_cancellation``, so that a client that goes away ends its handler at once. Raises ConfigError
    where the API keys can't be read.
    """
    app = web.Application(middlewares=[keep_record, shape_errors, check_key], client_max_size=config.max_request_bytes)
    app[CONFIG] = config
    app[ENGINE] = engine
    app[REGISTRY] = registry
    app[HTTP_METRICS] = HttpMetrics(registry)
    if config.api_key_file is not None:
        app[API_KEYS] = ApiKeys(config.api_key_file)
    app[FINGERPRINT] = _fingerprint(config)
    app[OPENAPI] = orjson.dumps(build_document(_version(), keys=config.api_key_file is not None))
    app.on_response_prepare.append(add_request_id)
    app.cleanup_ctx.extend([_tracing, _engine])
    add_routes(app)
    return app


async def _tracing(app: web.Application) -> AsyncIterator[None]:
    app[TRACER] = create_tracer(app[CONFIG].otel_exporter_otlp_endpoint)
    yield
    await asyncio.to_thread(app[TRACER].close)


async def _engine(app: web.Application) -> AsyncIterator[None]:
    """The server listens while the model loads; requests are told to wait meanwhile."""
    app[LOADING] = asyncio.create_task(app[ENGINE].start())
    yield
    app[LOADING].cancel()
    with suppress(asyncio.CancelledError, Exception):
        await app[LOADING]
    await app[ENGINE].close()


def serve(config: EngineConfig, engine: AsyncEngine, registry: CollectorRegistry) -> None:
    """Serve until SIGTERM or SIGINT, then drain; a second signal ends the process at once.

    Raises StartupError where the model can't be loaded, and EngineDeadError where the core dies, after every request
    has been answered with the cause.
    """
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(_serve(config, engine, registry))


async def _serve(config: EngineConfig, engine: AsyncEngine, registry: CollectorRegistry) -> None:
    app = create_app(config, engine, registry)
    leave = asyncio.Event()
    _listen_to_signals(leave)
    runner = web.AppRunner(
        app,
        handler_cancellation=True,
        access_log=None,
        keepalive_timeout=KEEP_ALIVE_SECONDS,
        shutdown_timeout=FLUSH_SECONDS,
    )
    await runner.setup()
    try:
        site = web.TCPSite(runner, config.host, config.port, backlog=BACKLOG)
        await site.start()
        logger.info("listening on http://%s:%d", *runner.addresses[0][:2])
        await _until_over(app, leave, port=runner.addresses[0][1])
    finally:
        abandoned = not app[LOADING].done()
        await runner.cleanup()
        if abandoned:
            # Loading can't be interrupted, and its thread would hold the process until it is done.
            _leave_at_once(0)


async def _until_over(app: web.Application, leave: asyncio.Event, *, port: int) -> None:
    """Wait for the order to leave, and drain; raises what ends the process before."""
    engine, config = app[ENGINE], app[CONFIG]
    leaving: asyncio.Future[Any] = asyncio.create_task(leave.wait())
    try:
        await asyncio.wait((leaving, app[LOADING]), return_when=asyncio.FIRST_COMPLETED)
        if not leaving.done():
            app[LOADING].result()
            logger.info("serving %s; try it:\n%s", engine.name, _example(app[CONFIG], engine, port))
            assert engine.died is not None
            await asyncio.wait((leaving, engine.died), return_when=asyncio.FIRST_COMPLETED)
            if not leaving.done():
                raise engine.died.result()
    finally:
        leaving.cancel()
    logger.info("draining: running requests may take %g seconds", config.drain_seconds)
    await engine.drain(config.drain_seconds)
    logger.info("drained")


def _example(config: EngineConfig, engine: AsyncEngine, port: int) -> str:
    """A command that a newcomer can paste."""
    host = "localhost" if config.host in ("0.0.0.0", "::") else config.host
    key = " -H 'Authorization: Bearer YOUR_KEY'" if config.api_key_file is not None else ""
    chats = engine.tokenizer is not None and engine.tokenizer.has_chat_template
    path, asked = (
        ("chat/completions", '"messages": [{"role": "user", "content": "What is the capital of France?"}]')
        if chats
        else ("completions", '"prompt": "The capital of France is"' if engine.tokenizer else '"prompt": [1, 2, 3]')
    )
    body = f'{{"model": "{engine.name}", {asked}, "max_tokens": 64}}'
    return f"  curl http://{host}:{port}/v1/{path}{key} -H 'Content-Type: application/json' -d '{body}'"


def _listen_to_signals(leave: asyncio.Event) -> None:
    def on_signal(number: int) -> None:
        if leave.is_set():
            logger.warning("second signal: leaving at once")
            _leave_at_once(128 + number)
        leave.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)


def _leave_at_once(status: int) -> None:
    logging.shutdown()
    os._exit(status)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


def _fingerprint(config: EngineConfig) -> str:
    """The same for the same version, model and arithmetic."""
    served = (_version(), config.model, config.model_revision, config.dtype, config.kv_cache_dtype, config.quantization)
    return "fp_" + hashlib.sha256(repr(served).encode()).hexdigest()[:12]


def _version() -> str:
    try:
        return version("pagedserve-engine")
    except PackageNotFoundError:
        return "unknown"
