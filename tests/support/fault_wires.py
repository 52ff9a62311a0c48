"""What the proxy does to one connection, and to the bytes that go over it."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Mapping
from typing import Any, NoReturn, TypeVar

import aiohttp
from aiohttp import web

from fault_rules import Fault

T = TypeVar("T")
_HOP_BY_HOP = frozenset({"connection", "keep-alive", "transfer-encoding", "upgrade", "te", "trailer", "content-length"})
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


async def pump(source: aiohttp.StreamReader, outgoing: web.StreamResponse, disturbed: asyncio.Future[Fault]) -> None:
    """Pass on what comes, as it comes, until its end or the disturbance, which waits for the end of an event."""
    whole = True
    while True:
        read = asyncio.ensure_future(source.readany())
        try:
            awaited: set[asyncio.Future[Any]] = {read, disturbed} if whole else {read}
            await asyncio.wait(awaited, return_when=asyncio.FIRST_COMPLETED)
            if whole and disturbed.done():
                return
            chunk = await read
        finally:
            read.cancel()
        if not chunk:
            return
        await outgoing.write(chunk)
        whole = chunk.endswith(b"\n")


async def cancelling(task: asyncio.Task[T]) -> T:
    """The result of ``task``, which ends when its client leaves."""
    try:
        return await task
    finally:
        task.cancel()


def abort(response: aiohttp.ClientResponse) -> None:
    """End a stream from the API server at once: TLS's own farewell would outlast the loop."""
    if response.connection is not None and response.connection.transport is not None:
        response.connection.transport.abort()


def passing(headers: Mapping[str, str], *besides: str) -> dict[str, str]:
    """The headers that go on from one connection to the next; ``besides`` names others that do not, in lower case."""
    return {name: value for name, value in headers.items() if name.lower() not in _HOP_BY_HOP.union(besides)}


async def reset(incoming: web.BaseRequest) -> NoReturn:
    """Close with RST, so that the client sees a connection reset."""
    if incoming.transport is not None:
        incoming.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        incoming.transport.abort()
    await never()


async def hang_up(incoming: web.BaseRequest) -> NoReturn:
    """Close without an answer."""
    if incoming.transport is not None:
        incoming.transport.close()
    await never()


async def never() -> NoReturn:
    """Wait for the cancellation that the client's leaving, or the proxy's end, brings."""
    await asyncio.get_running_loop().create_future()
    raise AssertionError("nobody answers this")
