"""The HTTPS side: certificates and trusted authorities are replaced while connections come and go.

Each renewal is a TLS context of its own for the connections that come, so that none is ever refused. A connection of
before ends with its next answer, or without one where its client was verified by an authority that isn't trusted any
more: clients then ask again on a new one. Whoever shows no certificate gets no further than the handshake, and costs
no more than a place in a queue of handshakes that the newest always enters.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
import tempfile
from dataclasses import dataclass
from typing import Final
from weakref import WeakKeyDictionary

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from pagedserve_operator.metrics_api.certificates import Pair, to_pem

logger = logging.getLogger(__name__)

MOST_CONNECTIONS: Final = 256
"""Of clients whose certificate has been verified."""
MOST_HANDSHAKES: Final = 64
"""Under way at once, each a quarter of a MiB. One more ends the oldest: the API server's take milliseconds."""
HANDSHAKE_SECONDS: Final = 10.0
ACCEPT_AGAIN_SECONDS: Final = 1.0
"""After the system had no room for a connection."""
LONGEST_LINE: Final = 32_768
"""Bytes of a request's first line, which carries selectors, and of a header, which may carry names of groups."""
MOST_HEADERS: Final = 2_000
"""Each group of a caller is one."""
IDLE_SECONDS: Final = 90.0
"""How long a connection is kept that nobody asks on; as long as API servers keep theirs."""
ENDING_SECONDS: Final = 5.0


class CannotListen(OSError):
    """The address or port can't be had."""


@dataclass(frozen=True, slots=True)
class Identity:
    """What a TLS context is made of: our own certificate, and who signs the clients' (PEM)."""

    serving: Pair
    client_authority: str


class Listener:
    """Serves an application on ``host`` and ``port`` (0: any) from the first identity on."""

    def __init__(self, application: web.Application, *, host: str, port: int) -> None:
        application.middlewares.insert(0, _ending_outdated(self))
        self._runner = web.AppRunner(
            application,
            access_log=None,
            shutdown_timeout=ENDING_SECONDS,
            keepalive_timeout=IDLE_SECONDS,
            max_line_size=LONGEST_LINE,
            max_field_size=LONGEST_LINE,
            max_headers=MOST_HEADERS,
        )
        self._place = (host, port)
        self._socket: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None
        self._handshakes: dict[asyncio.Task[None], None] = {}
        """The oldest first."""
        self._identity: Identity | None = None
        self._context: ssl.SSLContext | None = None
        self._authorities: WeakKeyDictionary[ssl.SSLContext, str] = WeakKeyDictionary()

    @property
    def identity(self) -> Identity | None:
        """As what it serves now; None: not yet."""
        return self._identity

    @property
    def port(self) -> int:
        """Where it listens; 0 before it does."""
        return 0 if self._socket is None else int(self._socket.getsockname()[1])

    async def use(self, identity: Identity) -> None:
        """Serve as this from now on; raises CannotListen, ssl.SSLError for an authority that can't be used, OSError."""
        if identity == self._identity:
            return
        context = _context(identity)
        if self._socket is None:
            self._socket = await self._open()
        self._authorities[context] = identity.client_authority
        self._identity, self._context = identity, context
        if self._accepting is None:
            self._accepting = asyncio.create_task(self._accept(self._socket), name="metrics API")

    async def close(self) -> None:
        """Stop listening; requests under way have a few seconds."""
        if self._accepting is not None:
            self._accepting.cancel()
            # A handshake that never began would leave its connection open: each has begun a turn after it was accepted.
            await asyncio.gather(self._accepting, asyncio.sleep(0), return_exceptions=True)
        handshakes = list(self._handshakes)
        for task in handshakes:
            task.cancel()
        await asyncio.gather(*handshakes, return_exceptions=True)
        if self._socket is not None:
            self._socket.close()
        await self._runner.cleanup()

    async def _open(self) -> socket.socket:
        if self._runner.server is None:
            await self._runner.setup()
        host, port = self._place
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            opened = socket.create_server((host, port), family=family, dualstack_ipv6=host == "::")
        except OSError as error:
            raise CannotListen(error.errno, error.strerror) from error
        opened.setblocking(False)
        return opened

    async def _accept(self, listening: socket.socket) -> None:
        server = self._runner.server
        assert server is not None
        while True:
            try:
                connection, _ = await asyncio.get_running_loop().sock_accept(listening)
            except OSError as error:
                logger.warning("the metrics API can't take a connection: %s", error)
                await asyncio.sleep(ACCEPT_AGAIN_SECONDS)
                continue
            if len(server.connections) >= MOST_CONNECTIONS:
                connection.close()
                continue
            if len(self._handshakes) >= MOST_HANDSHAKES:
                oldest = next(iter(self._handshakes))
                oldest.cancel()
                del self._handshakes[oldest]
            task = asyncio.create_task(self._shake_hands(connection, server))
            self._handshakes[task] = None
            task.add_done_callback(lambda done: self._handshakes.pop(done, None))

    async def _shake_hands(self, connection: socket.socket, server: web.Server) -> None:
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                server, connection, ssl=self._context, ssl_handshake_timeout=HANDSHAKE_SECONDS
            )
        except OSError as error:
            logger.debug("a connection to the metrics API fails: %s", error)

    def outdates(self, transport: asyncio.WriteTransport) -> bool:
        """Whether the connection began under an earlier identity."""
        return transport.get_extra_info("sslcontext") is not self._context

    def distrusts(self, transport: asyncio.WriteTransport) -> bool:
        """Whether its client was verified by an authority that isn't the current one."""
        context = transport.get_extra_info("sslcontext")
        current = None if self._identity is None else self._identity.client_authority
        return context is None or self._authorities.get(context) != current


def _ending_outdated(listener: Listener) -> Middleware:
    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        transport = request.transport
        if not isinstance(transport, asyncio.WriteTransport) or listener.distrusts(transport):
            if isinstance(transport, asyncio.WriteTransport):
                transport.abort()
            raise ConnectionResetError("its client's authority isn't trusted any more")
        response = await handler(request)
        if listener.outdates(transport):
            response.force_close()
        return response

    return middleware


def _context(identity: Identity) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    context.load_verify_locations(cadata=identity.client_authority)
    # Python's ssl reads keys from files only.
    with tempfile.NamedTemporaryFile(prefix="metrics-api-") as both:
        both.write(to_pem([identity.serving.certificate]) + identity.serving.key_pem())
        both.flush()
        context.load_cert_chain(both.name)
    return context
