"""The HTTPS side: certificates and trusted authorities are replaced while connections come and go.

Each renewal listens anew on the same socket, with a TLS context of its own, so that no connection is ever refused. A
connection of before ends with its next answer, or without one where its client was verified by an authority that isn't
trusted any more: clients then ask again on a new one. Whoever shows no certificate at all is soon hung up on.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final
from weakref import WeakKeyDictionary

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from pagedserve_operator.metrics_api.certificates import Pair, to_pem

MOST_CONNECTIONS: Final = 256
HANDSHAKE_SECONDS: Final = 10.0
STRANGER_SECONDS: Final = 10.0
"""A connection without a client certificate is closed after so long, and before twice as long."""
LONGEST_LINE: Final = 32_768
"""Bytes of a request's first line, which carries selectors, and of a header, which may carry names of groups."""
MOST_HEADERS: Final = 2_000
"""Each group of a caller is one."""
IDLE_SECONDS: Final = 90.0
"""How long a connection is kept that nobody asks on; as long as API servers keep theirs."""
ENDING_SECONDS: Final = 5.0


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
        self._servers: list[asyncio.Server] = []
        """The newest last; more than one while they are changed over."""
        self._identity: Identity | None = None
        self._context: ssl.SSLContext | None = None
        self._authorities: WeakKeyDictionary[ssl.SSLContext, str] = WeakKeyDictionary()
        self._strangers: set[Any] = set()
        self._sweeping: asyncio.Task[None] | None = None

    @property
    def identity(self) -> Identity | None:
        """As what it serves now; None: not yet."""
        return self._identity

    @property
    def port(self) -> int:
        """Where it listens; 0 before it does."""
        return 0 if self._socket is None else int(self._socket.getsockname()[1])

    async def use(self, identity: Identity) -> None:
        """Serve as this from now on; raises OSError where the port is taken, ssl.SSLError for what can't be used."""
        if identity == self._identity:
            return
        context = _context(identity)
        if self._socket is None:
            await self._open()
        assert self._socket is not None
        server = await asyncio.get_running_loop().create_server(
            self._protocol(),
            sock=self._socket.dup(),
            ssl=context,
            ssl_handshake_timeout=HANDSHAKE_SECONDS,
            start_serving=False,
        )
        # Known to close() from here on, whenever this is cancelled.
        self._servers.append(server)
        self._identity, self._context = identity, context
        self._authorities[context] = identity.client_authority
        await server.start_serving()
        while len(self._servers) > 1:
            await _end(self._servers[0])
            del self._servers[0]

    async def close(self) -> None:
        """Stop listening; requests under way have a few seconds."""
        if self._sweeping is not None:
            self._sweeping.cancel()
            await asyncio.gather(self._sweeping, return_exceptions=True)
        for server in self._servers:
            server.close()
        if self._socket is not None:
            self._socket.close()
        await self._runner.cleanup()

    async def _open(self) -> None:
        host, port = self._place
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        opened = socket.create_server((host, port), family=family, dualstack_ipv6=host == "::")
        opened.setblocking(False)
        self._socket = opened
        await self._runner.setup()
        self._sweeping = asyncio.create_task(self._sweep(), name="strangers")

    def _protocol(self) -> Callable[[], asyncio.Protocol]:
        server = self._runner.server
        assert server is not None

        def accept() -> asyncio.Protocol:
            return _Refused() if len(server.connections) >= MOST_CONNECTIONS else server()

        return accept

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(STRANGER_SECONDS)
            self.sweep()

    def sweep(self) -> None:
        """Hang up on those who were there without a certificate at the last sweep already."""
        nameless = {connection for connection in self._connections() if not _has_certificate(connection)}
        for connection in nameless & self._strangers:
            connection.force_close()
        self._strangers = nameless

    def outdates(self, transport: asyncio.WriteTransport) -> bool:
        """Whether the connection began under an earlier identity."""
        return transport.get_extra_info("sslcontext") is not self._context

    def distrusts(self, transport: asyncio.WriteTransport) -> bool:
        """Whether its client was verified by an authority that isn't the current one."""
        context = transport.get_extra_info("sslcontext")
        current = None if self._identity is None else self._identity.client_authority
        return context is None or self._authorities.get(context) != current

    def _connections(self) -> list[Any]:
        server = self._runner.server
        return [] if server is None else server.connections


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


async def _end(server: asyncio.Server) -> None:
    """Stop accepting; who has been accepted a moment ago is still served."""
    for listening in server.sockets:
        asyncio.get_running_loop().remove_reader(listening.fileno())
    # A connection is attached to its server one turn after it was accepted, which a closed one doesn't take.
    await asyncio.sleep(0)
    server.close()


class _Refused(asyncio.Protocol):
    """One connection too many."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.close()


def _has_certificate(connection: Any) -> bool:
    return connection.transport is not None and bool(connection.transport.get_extra_info("peercert"))


def _context(identity: Identity) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # Whoever shows none is told so in HTTP; whoever shows a bad one doesn't get that far.
    context.verify_mode = ssl.CERT_OPTIONAL
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    context.load_verify_locations(cadata=identity.client_authority)
    # Python's ssl reads keys from files only.
    with tempfile.NamedTemporaryFile(prefix="metrics-api-") as both:
        both.write(to_pem([identity.serving.certificate]) + identity.serving.key_pem())
        both.flush()
        context.load_cert_chain(both.name)
    return context
