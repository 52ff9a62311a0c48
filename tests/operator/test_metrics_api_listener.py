"""Certificates that change while requests run, and connections that shouldn't stay."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from control_certificates import Authority, Signed
from control_processes import free_port
from metrics_world import client_context
from pagedserve_operator.metrics_api import listener as module
from pagedserve_operator.metrics_api.certificates import Certificates, read_certificates, renewed, to_pem
from pagedserve_operator.metrics_api.listener import Identity, Listener

NAME = "metrics.ops.svc"
QUESTION = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
OLD, NEW = Authority.new("old"), Authority.new("new")


def certificates() -> Certificates:
    return renewed(None, names=(NAME,), published=(), now=datetime.now(UTC))


class World:
    """A listener whose one page waits until it is let go where ``held``, and clients of it."""

    def __init__(self) -> None:
        self.going = asyncio.Event()
        self.going.set()
        self.entered = asyncio.Event()
        app = web.Application()
        app.router.add_get("/", self._page)
        self.listener = Listener(app, host="127.0.0.1", port=0)

    async def _page(self, _: web.Request) -> web.Response:
        self.entered.set()
        await self.going.wait()
        return web.Response(text="ok")

    async def use(self, held: Certificates, authority: Authority = OLD) -> None:
        await self.listener.use(Identity(held.serving, authority.pem.decode()))

    def session(
        self, trusted: bytes, authority: Authority | None = OLD, *, reuse: bool = True
    ) -> aiohttp.ClientSession:
        context = client_context(trusted, None if authority is None else authority.client())
        connector = aiohttp.TCPConnector(ssl=context, force_close=not reuse)
        return aiohttp.ClientSession(f"https://127.0.0.1:{self.listener.port}", connector=connector)


async def get(session: aiohttp.ClientSession) -> int:
    async with session.get("/", server_hostname=NAME) as answer:
        await answer.read()
        return answer.status


async def connect(
    world: World, held: Certificates, shown: Signed | None
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection of its own, which lasts until one side ends it."""
    context = client_context(to_pem(held.trusted), shown)
    return await asyncio.open_connection("127.0.0.1", world.listener.port, ssl=context, server_hostname=NAME)


async def open_connection(
    world: World, held: Certificates, shown: Signed | None
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """One on which a question has been answered: the handshake is over for the client before it is for the server."""
    reader, writer = await connect(world, held, shown)
    writer.write(QUESTION)
    assert (await reader.readuntil(b"ok")).startswith(b"HTTP/1.1 200")
    return reader, writer


def run(story: Callable[[World], Awaitable[None]]) -> None:
    async def main() -> None:
        world = World()
        try:
            await story(world)
        finally:
            world.going.set()
            await world.listener.close()

    asyncio.run(main())


def test_it_listens_once_it_has_an_identity() -> None:
    async def story(world: World) -> None:
        assert (world.listener.port, world.listener.identity) == (0, None)
        await world.use(certificates())
        assert world.listener.port
        assert world.listener.identity is not None

    run(story)


def test_no_connection_is_refused_while_certificates_change() -> None:
    async def story(world: World) -> None:
        all_held = [certificates() for _ in range(8)]
        trusted = b"".join(to_pem(held.trusted) for held in all_held)
        await world.use(all_held[0])
        statuses: list[int] = []
        over = asyncio.Event()

        async def ask(*, reuse: bool) -> None:
            async with world.session(trusted, reuse=reuse) as session:
                while not over.is_set():
                    statuses.append(await get(session))

        askers = [asyncio.ensure_future(ask(reuse=number % 2 == 0)) for number in range(6)]
        async with world.session(trusted) as session:
            for held in all_held[1:]:
                await world.use(held)
                statuses += [await get(session) for _ in range(10)]
        over.set()
        await asyncio.gather(*askers)
        assert set(statuses) == {200}

    run(story)


def test_new_connections_see_the_new_certificate() -> None:
    async def story(world: World) -> None:
        one, other = certificates(), certificates()
        await world.use(one)
        port = world.listener.port
        await world.use(other)
        assert world.listener.port == port
        async with world.session(to_pem(other.trusted)) as session:
            assert await get(session) == 200
        async with world.session(to_pem(one.trusted)) as session:
            with pytest.raises(aiohttp.ClientConnectorCertificateError):
                await get(session)

    run(story)


def test_a_request_under_way_ends_and_its_connection_with_it() -> None:
    async def story(world: World) -> None:
        held = certificates()
        await world.use(held)
        world.going.clear()
        reader, writer = await connect(world, held, OLD.client())
        writer.write(QUESTION)
        await world.entered.wait()
        await world.use(certificates())
        world.going.set()
        assert (await reader.read()).endswith(b"ok")
        writer.close()

    run(story)


def test_an_idle_connection_of_before_ends_with_its_next_answer() -> None:
    async def story(world: World) -> None:
        held = certificates()
        await world.use(held)
        reader, writer = await open_connection(world, held, OLD.client())
        await world.use(certificates())
        writer.write(QUESTION)
        assert (await reader.read()).endswith(b"ok")
        writer.close()

    run(story)


def test_a_client_of_an_authority_that_is_trusted_no_more_gets_no_answer() -> None:
    async def story(world: World) -> None:
        held = certificates()
        await world.use(held)
        reader, writer = await open_connection(world, held, OLD.client())
        await world.use(held, NEW)
        world.entered.clear()
        writer.write(QUESTION)
        with suppress(ConnectionError):
            assert await reader.read() == b""
        assert not world.entered.is_set()
        writer.close()
        async with world.session(to_pem(held.trusted), NEW) as session:
            assert await get(session) == 200

    run(story)


def test_the_same_identity_changes_nothing() -> None:
    async def story(world: World) -> None:
        held = certificates()
        await world.use(held)
        async with world.session(to_pem(held.trusted)) as session:
            assert await get(session) == 200
            before = world.listener._context
            await world.use(read_certificates(held.data()))
            assert world.listener._context is before
            assert await get(session) == 200

    run(story)


def test_who_shows_no_certificate_is_not_heard() -> None:
    async def story(world: World) -> None:
        held = certificates()
        await world.use(held)
        async with world.session(to_pem(held.trusted), None) as session:
            with pytest.raises((aiohttp.ClientError, OSError)):
                await get(session)
        assert not world.entered.is_set()

    run(story)


def test_who_never_shakes_hands_makes_room_for_whoever_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_HANDSHAKES", 2)

    async def story(world: World) -> None:
        held = certificates()
        await world.use(held)
        silent = [await asyncio.open_connection("127.0.0.1", world.listener.port) for _ in range(8)]
        async with world.session(to_pem(held.trusted)) as session:
            assert await get(session) == 200
        # One more is the place that the client had.
        for reader, _ in silent[:-2]:
            assert await reader.read() == b""
        assert len(world.listener._handshakes) <= 2
        for _, writer in silent:
            writer.close()

    run(story)


def test_a_handshake_that_lasts_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HANDSHAKE_SECONDS", 0.05)

    async def story(world: World) -> None:
        await world.use(certificates())
        reader, writer = await asyncio.open_connection("127.0.0.1", world.listener.port)
        assert await reader.read() == b""
        writer.close()

    run(story)


def test_a_system_without_room_is_waited_out(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(module, "ACCEPT_AGAIN_SECONDS", 0.01)

    async def story(world: World) -> None:
        held, loop = certificates(), asyncio.get_running_loop()
        accept, refusals = loop.sock_accept, [OSError(24, "Too many open files")]

        async def accepting(listening: socket.socket) -> tuple[socket.socket, Any]:
            if refusals:
                raise refusals.pop()
            return await accept(listening)

        monkeypatch.setattr(loop, "sock_accept", accepting)
        await world.use(held)
        async with world.session(to_pem(held.trusted)) as session:
            assert await get(session) == 200

    run(story)
    assert "Too many open files" in caplog.text


def test_only_so_many_connections_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_CONNECTIONS", 2)

    async def story(world: World) -> None:
        held = certificates()
        await world.use(held)
        taken = [await open_connection(world, held, OLD.client()) for _ in range(2)]
        with pytest.raises((OSError, asyncio.IncompleteReadError)):
            await open_connection(world, held, OLD.client())
        for _, writer in taken:
            writer.close()

    run(story)


def test_a_port_that_is_taken_is_told_and_tried_again() -> None:
    async def story(world: World) -> None:
        port = free_port()
        holder = await asyncio.start_server(lambda *_: None, "127.0.0.1", port)
        listener = Listener(web.Application(), host="127.0.0.1", port=port)
        held = certificates()
        identity = Identity(held.serving, OLD.pem.decode())
        with pytest.raises(OSError, match="in use"):
            await listener.use(identity)
        assert listener.identity is None
        holder.close()
        await holder.wait_closed()
        await listener.use(identity)
        assert listener.port == port
        await listener.close()

    run(story)


async def no_room(_: web.AppRunner) -> None:
    raise OSError("no room")


def test_it_opens_as_a_whole_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(world: World) -> None:
        held = certificates()
        with monkeypatch.context() as patched:
            patched.setattr(web.AppRunner, "setup", no_room)
            with pytest.raises(OSError, match="no room"):
                await world.use(held)
        assert (world.listener.port, world.listener.identity) == (0, None)
        await world.use(held)
        async with world.session(to_pem(held.trusted)) as session:
            assert await get(session) == 200

    run(story)


def test_an_authority_that_is_none_is_refused() -> None:
    async def story(world: World) -> None:
        with pytest.raises(OSError, match=r"."):
            await world.listener.use(Identity(certificates().serving, "-----BEGIN CERTIFICATE-----\nnonsense"))

    run(story)


def test_what_never_listened_can_be_closed() -> None:
    async def story(world: World) -> None:
        await world.listener.close()

    run(story)
