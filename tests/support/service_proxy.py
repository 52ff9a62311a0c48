"""Services at their cluster IPs on this machine: what kube-proxy does in a cluster, for pods that are processes here.

Each cluster IP is added to the loopback interface, and a connection to one of its ports goes to one ready endpoint,
chosen anew for every connection. One that stands is left alone, whatever becomes of its endpoint in the API: whether
it is cut is for the endpoint to decide.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from http.client import HTTPException
from typing import Any, Self

from control_client import ApiError, Client
from loopback import add_address, remove_address

JSON = dict[str, Any]
Address = tuple[str, int]
"""IP and port."""
Routes = Mapping[Address, Sequence[Address]]
"""Where connections to each port of a Service may go."""

POLL_SECONDS = 0.3
_CHUNK = 1 << 16
_RESET = struct.pack("ii", 1, 0)
"""Linger for no time: the peer sees a reset and not an end."""


def routes(services: Sequence[JSON], slices: Sequence[JSON]) -> dict[Address, tuple[Address, ...]]:
    """The endpoints of each TCP port: those that are ready; where none is, those that leave and still serve.

    Services without a selector are left out: that of the API server has the same address in every cluster.
    """
    found: dict[Address, tuple[Address, ...]] = {}
    for service in services:
        spec, metadata = service["spec"], service["metadata"]
        if not spec.get("selector") or spec.get("clusterIP") in (None, "", "None"):
            continue
        own = [part for part in slices if _belongs(part, metadata)]
        for port in spec.get("ports", ()):
            if port.get("protocol", "TCP") == "TCP":
                found[spec["clusterIP"], port["port"]] = _endpoints(own, port.get("name") or "")
    return found


class ServiceProxy:
    """Entered, the Services of a cluster answer on this machine; left, their addresses are gone.

    What was read last stays in force while the API server is away.
    """

    def __init__(self, client: Client) -> None:
        self._client = client
        self._routes: Routes = {}
        self._servers: dict[Address, asyncio.Server] = {}
        self._ips: set[str] = set()
        self._complained: set[Address] = set()
        # The loop itself holds tasks weakly, and nothing else would hold one whose client has gone.
        self._serving: set[asyncio.Task[None] | None] = set()
        self._over = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="service-proxy", daemon=True)

    def __enter__(self) -> Self:
        self._loop = asyncio.new_event_loop()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join()
        for ip in self._ips:
            remove_address(ip)

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._main())

    async def _main(self) -> None:
        while not self._over.is_set():
            # An API server that is away changes nothing for Services that are known.
            with contextlib.suppress(ApiError, OSError, HTTPException):
                await self._follow(await asyncio.to_thread(self._read))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._over.wait(), POLL_SECONDS)
        for server in self._servers.values():
            server.close()

    def _read(self) -> dict[Address, tuple[Address, ...]]:
        services = self._client.list("v1", "Service")
        return routes(services, self._client.list("discovery.k8s.io/v1", "EndpointSlice"))

    async def _follow(self, wanted: Routes) -> None:
        self._routes = wanted
        served = {address for address, targets in wanted.items() if targets}
        for address in self._servers.keys() - served:
            # A port without endpoints refuses, as kube-proxy's does.
            self._servers.pop(address).close()
        for address in served - self._servers.keys():
            try:
                await self._open(address)
            except OSError as error:
                # The others are served all the same; this one is tried again.
                self._complain(address, error)
        for ip in self._ips - {ip for ip, _ in wanted}:
            remove_address(ip)
            self._ips.remove(ip)

    async def _open(self, address: Address) -> None:
        ip, port = address
        if ip not in self._ips:
            add_address(ip)
            self._ips.add(ip)
        self._servers[address] = await asyncio.start_server(partial(self._serve, address), ip, port)

    def _complain(self, address: Address, error: OSError) -> None:
        if address not in self._complained:
            self._complained.add(address)
            print(f"service proxy: {address[0]}:{address[1]} can't be opened: {error}", file=sys.stderr)

    async def _serve(self, address: Address, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task: asyncio.Task[None] | None = asyncio.current_task()
        self._serving.add(task)
        try:
            await self._lead(self._routes.get(address, ()), reader, writer)
        finally:
            self._serving.discard(task)

    async def _lead(
        self, targets: Sequence[Address], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        try:
            there, back = await asyncio.open_connection(*random.choice(targets))
        except (OSError, IndexError):
            return _reset(writer)
        try:
            await asyncio.gather(_carry(reader, back), _carry(there, writer))
        except asyncio.CancelledError:
            # Only the proxy's own end cancels; raised again, it would be logged as a fault.
            for each in (writer, back):
                each.transport.abort()
            return
        for each in (writer, back):
            each.close()


async def _carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Everything from one side to the other, its end included; a broken side breaks the other."""
    try:
        while data := await reader.read(_CHUNK):
            writer.write(data)
            await writer.drain()
        writer.write_eof()
    except OSError:
        _reset(writer)


def _reset(writer: asyncio.StreamWriter) -> None:
    peer: socket.socket = writer.get_extra_info("socket")
    with contextlib.suppress(OSError):
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    writer.transport.abort()


def _belongs(part: JSON, service: JSON) -> bool:
    """Whether an EndpointSlice is of the Service with that metadata."""
    metadata = part["metadata"]
    named = (metadata.get("labels") or {}).get("kubernetes.io/service-name")
    return (metadata["namespace"], named) == (service["namespace"], service["name"])


def _endpoints(slices: Sequence[JSON], port_name: str) -> tuple[Address, ...]:
    every = list(_conditions(slices, port_name))
    ready = tuple(address for address, conditions in every if conditions.get("ready", True))
    leaving = (address for address, conditions in every if conditions.get("serving") and conditions.get("terminating"))
    return ready or tuple(leaving)


def _conditions(slices: Sequence[JSON], port_name: str) -> Iterator[tuple[Address, JSON]]:
    for part in slices:
        ports = [port["port"] for port in part.get("ports") or () if (port.get("name") or "") == port_name]
        for endpoint in part.get("endpoints") or ():
            for ip in endpoint["addresses"]:
                yield from (((ip, port), endpoint.get("conditions") or {}) for port in ports)
