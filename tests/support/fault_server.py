"""The proxy's event loop: what becomes of each request, faulted or not."""

from __future__ import annotations

import asyncio
import io
import socket
import ssl
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, NoReturn

import aiohttp
from aiohttp import web
from yarl import URL

from fault_calls import Call, Ledger
from fault_rules import Fault, Gate, Kind, Rules, When, gone_event
from fault_wires import abort, cancelling, hang_up, never, passing, pump, reset


@dataclass(frozen=True)
class Request:
    """A client's request, read whole."""

    incoming: web.BaseRequest
    call: Call
    body: bytes


@dataclass(frozen=True)
class Answer:
    """The API server's response, read whole."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class FaultServer:
    """Forwards to ``upstream`` what no rule strikes; all of it but ``started`` is used in its own loop alone."""

    def __init__(self, upstream: str, *, tls: ssl.SSLContext | None, token: str | None, ledger: Ledger) -> None:
        self._upstream = upstream.rstrip("/")
        self._tls = tls
        self._token = token
        self._ledger = ledger
        self._forwards: set[asyncio.Task[Answer]] = set()
        self._clients: dict[str, int] = {}
        self._watches: dict[int, tuple[Call, asyncio.Future[Fault]]] = {}
        self.rules = Rules()
        self.gates: list[tuple[Gate, asyncio.Event]] = []
        self.counts: Counter[str] = Counter()
        self.errors: list[BaseException] = []

    async def serve(self, started: Future[None]) -> None:
        """Answer until ``over`` is set; ``started`` is resolved as soon as there is a loop to ask."""
        self.loop = asyncio.get_running_loop()
        self.over = asyncio.Event()
        connector = aiohttp.TCPConnector(limit=0, ssl=self._tls or True)
        timeout = aiohttp.ClientTimeout(total=None)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout, auto_decompress=False) as self._session:
            server = web.Server(self._handle, handler_cancellation=True, access_log=None)
            self._runner = web.ServerRunner(server, shutdown_timeout=0.1)
            await self._runner.setup()
            started.set_result(None)
            await self.over.wait()
            await self._runner.cleanup()
            for forward in self._forwards:
                forward.cancel()
            await asyncio.gather(*self._forwards, return_exceptions=True)
        # What was aborted on the way out is closed by the loop's next turns.
        await asyncio.sleep(0.01)

    async def port_of(self, client: str) -> int:
        """The port of the client of that name; opened when first asked for."""
        if client not in self._clients:
            listener = socket.create_server(("127.0.0.1", 0), backlog=512)
            self._clients[client] = listener.getsockname()[1]
            await web.SockSite(self._runner, listener).start()
        return self._clients[client]

    def _client_of(self, incoming: web.BaseRequest) -> str:
        assert incoming.transport is not None
        port = incoming.transport.get_extra_info("sockname")[1]
        return next(client for client, its_port in self._clients.items() if its_port == port)

    def watches(self) -> list[Call]:
        """The watches that are open and pass events on."""
        return [call for call, disturbed in self._watches.values() if not disturbed.done()]

    def disturb(self, fault: Fault, when: When) -> int:
        """Strike the open watches for which ``when`` holds; how many there were."""
        found = [(call, future) for call, future in self._watches.values() if when(call) and not future.done()]
        for call, future in found:
            self._count(fault, call)
            future.set_result(fault)
        return len(found)

    async def _handle(self, incoming: web.BaseRequest) -> web.StreamResponse:
        body = await incoming.content.read()
        call = self._ledger.open(self._client_of(incoming), incoming.method, incoming.raw_path, incoming.headers)
        request = Request(incoming, call, body)
        fault = self.rules.choose(call)
        try:
            if fault is None:
                return await self._pass_on(request)
            self._count(fault, call)
            return await self._strike(request, fault)
        except aiohttp.ClientError:
            # The API server is away: the client sees what the proxy saw, a lost connection.
            await hang_up(incoming)

    async def _pass_on(self, request: Request) -> web.StreamResponse:
        if request.call.verb == "watch":
            return await self._stream(request)
        answer = await self._forward(request)
        self._ledger.close(request.call, answer.status)
        return web.Response(status=answer.status, headers=answer.headers, body=answer.body)

    async def _strike(self, request: Request, fault: Fault) -> web.StreamResponse:
        match fault.kind:
            case Kind.STATUS:
                self._ledger.close(request.call, fault.code)
                headers = {} if fault.retry_after is None else {"Retry-After": str(fault.retry_after)}
                return web.Response(
                    status=fault.code, headers=headers, body=fault.body, content_type="application/json"
                )
            case Kind.TIMEOUT_AFTER_COMMIT:
                await self._forward(request)
                await asyncio.sleep(fault.seconds) if fault.seconds is not None else await never()
                await hang_up(request.incoming)
            case Kind.CRASH_BEFORE:
                await self._call_back(fault, request.call)
            case Kind.CRASH_AFTER:
                await self._forward(request)
                await self._call_back(fault, request.call)
            case Kind.HANG if request.call.verb != "watch":
                await never()
            case Kind.RESET:
                await reset(request.incoming)
        return await self._end(await self._begin(request, 200, {"Content-Type": "application/json"}), request, fault)

    async def _call_back(self, fault: Fault, call: Call) -> NoReturn:
        await asyncio.to_thread(self._called_back, fault, call)
        await never()

    def _called_back(self, fault: Fault, call: Call) -> None:
        assert fault.callback is not None
        try:
            fault.callback(call)
        except Exception as error:
            self.errors.append(error)

    async def _forward(self, request: Request) -> Answer:
        """Reach the API server; a write that was sent gets there also when its client has left meanwhile."""
        forward = asyncio.create_task(self._exchange(request))
        if not request.call.writes:
            return await cancelling(forward)
        self._forwards.add(forward)
        forward.add_done_callback(self._forwarded)
        return await asyncio.shield(forward)

    def _forwarded(self, forward: asyncio.Task[Answer]) -> None:
        self._forwards.discard(forward)
        if not forward.cancelled():
            # Looked at here, since nobody else does where the client has left.
            forward.exception()

    async def _exchange(self, request: Request) -> Answer:
        await self._pass_gates(request.call)
        async with self._send(request) as response:
            return Answer(response.status, passing(response.headers), await response.read())

    async def _pass_gates(self, call: Call) -> None:
        for gate, opened in self.gates:
            if not gate.is_open and gate.when(call):
                gate.admit(call)
                await opened.wait()

    def _send(self, request: Request) -> Any:
        headers = passing(request.incoming.headers, "host")
        if self._token is not None:
            headers.setdefault("Authorization", f"Bearer {self._token}")
        return self._session.request(
            request.incoming.method,
            URL(self._upstream + request.incoming.raw_path, encoded=True),
            headers=headers,
            # aiohttp warns of bytes above one MiB.
            data=(io.BytesIO(request.body) if len(request.body) > 2**20 else request.body) or None,
            allow_redirects=False,
            skip_auto_headers=("Accept", "Accept-Encoding", "Content-Type", "User-Agent"),
        )

    async def _stream(self, request: Request) -> web.StreamResponse:
        await self._pass_gates(request.call)
        disturbed: asyncio.Future[Fault] = self.loop.create_future()
        async with self._send(request) as response:
            outgoing = await self._begin(request, response.status, passing(response.headers))
            self._watches[request.call.number] = (request.call, disturbed)
            try:
                await pump(response.content, outgoing, disturbed)
            finally:
                del self._watches[request.call.number]
                abort(response)
        if disturbed.done():
            return await self._end(outgoing, request, disturbed.result())
        await outgoing.write_eof()
        return outgoing

    async def _begin(self, request: Request, status: int, headers: Mapping[str, str]) -> web.StreamResponse:
        outgoing = web.StreamResponse(status=status, headers=headers)
        outgoing.enable_chunked_encoding()
        await outgoing.prepare(request.incoming)
        self._ledger.close(request.call, status)
        return outgoing

    async def _end(self, outgoing: web.StreamResponse, request: Request, fault: Fault) -> web.StreamResponse:
        if fault.kind is Kind.HANG:
            await never()
        if fault.kind is Kind.RESET:
            await reset(request.incoming)
        await outgoing.write_eof(gone_event() if fault.kind is Kind.GONE else b"")
        return outgoing

    def _count(self, fault: Fault, call: Call) -> None:
        call.fault = fault.label
        self.counts[fault.label] += 1
