"""A stand-in for the API server, for the tests of the proxy alone."""

from __future__ import annotations

import asyncio
import ssl
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Self

from aiohttp import web


class Upstream:
    """Stands in for the API server, with TLS: keeps what is written and streams the events that it is told."""

    def __init__(self, certificate: Path, key: Path, *, port: int = 0) -> None:
        self.port = port
        self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._tls.load_cert_chain(certificate, key)
        self.committed: list[str] = []
        self.headers: list[dict[str, str]] = []
        self._streams: list[web.StreamResponse] = []
        self._news = threading.Condition()

    def __enter__(self) -> Self:
        started: Future[None] = Future()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve(started)), daemon=True)
        self._thread.start()
        started.result(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join(10)

    def send(self, event: bytes) -> None:
        """Send a piece of a stream to every watch, once there is one."""
        with self._news:
            assert self._news.wait_for(lambda: self._streams, 10)
        for stream in self._streams:
            asyncio.run_coroutine_threadsafe(stream.write(event), self._loop).result(10)

    def wait_for_commits(self, count: int) -> list[str]:
        with self._news:
            assert self._news.wait_for(lambda: len(self.committed) >= count, 10)
            return self.committed

    async def _serve(self, started: Future[None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._over = asyncio.Event()
        self._transports: set[asyncio.BaseTransport] = set()
        runner = web.ServerRunner(web.Server(self._handle, handler_cancellation=True), shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", self.port, ssl_context=self._tls)
        await site.start()
        self.port = runner.addresses[0][1]
        started.set_result(None)
        await self._over.wait()
        await runner.cleanup()
        # TLS's farewell would outlast the loop.
        for transport in self._transports:
            assert isinstance(transport, asyncio.Transport)
            transport.abort()
        await asyncio.sleep(0.01)

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        assert request.transport is not None
        self._transports.add(request.transport)
        self.headers.append(dict(request.headers))
        if "watch" in request.query:
            return await self._watch(request)
        body = (await request.content.read()).decode()
        if request.method != "GET":
            with self._news:
                self.committed.append(body)
                self._news.notify_all()
        return web.json_response({"echo": body, "path": request.raw_path}, headers={"Audit-Id": "7"})

    async def _watch(self, request: web.BaseRequest) -> web.StreamResponse:
        stream = web.StreamResponse(headers={"Content-Type": "application/json"})
        await stream.prepare(request)
        with self._news:
            self._streams.append(stream)
            self._news.notify_all()
        try:
            await self._loop.create_future()
        finally:
            self._streams.remove(stream)
        return stream
