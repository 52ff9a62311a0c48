"""The Service proxy leads each new connection to a ready endpoint and cuts none that stands."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import pytest

from control_client import Client
from control_cluster import Cluster
from loopback import add_address, address_in, claimed_subnet, remove_address, why_not
from missing import skip_without
from service_proxy import ServiceProxy, routes

JSON = dict[str, Any]


def service(name: str = "chat", **spec: Any) -> JSON:
    ports = [{"name": "http", "port": 80, "targetPort": 8080}]
    metadata = {"name": name, "namespace": "models"}
    return {"metadata": metadata, "spec": {"clusterIP": "10.96.1.2", "selector": {"a": "b"}, "ports": ports, **spec}}


def slice_of(*endpoints: JSON, name: str = "chat") -> JSON:
    metadata = {"name": f"{name}-1", "namespace": "models", "labels": {"kubernetes.io/service-name": name}}
    return {"metadata": metadata, "ports": [{"name": "http", "port": 8080}], "endpoints": list(endpoints)}


def endpoint(ip: str, **conditions: bool) -> JSON:
    return {"addresses": [ip], "conditions": conditions}


CASES: dict[str, tuple[list[JSON], tuple[str, ...]]] = {
    "ready ones only": ([endpoint("10.0.0.1", ready=True), endpoint("10.0.0.2", ready=False)], ("10.0.0.1",)),
    "not those that leave": (
        [endpoint("10.0.0.1", ready=True), endpoint("10.0.0.2", ready=False, serving=True, terminating=True)],
        ("10.0.0.1",),
    ),
    "those that leave where no other is": (
        [endpoint("10.0.0.2", ready=False, serving=True, terminating=True), endpoint("10.0.0.3", ready=False)],
        ("10.0.0.2",),
    ),
    "none where none serves": ([endpoint("10.0.0.3", ready=False, serving=False, terminating=True)], ()),
}


@pytest.mark.parametrize("case", CASES)
def test_a_port_leads_to(case: str) -> None:
    endpoints, wanted = CASES[case]
    found = routes([service()], [slice_of(*endpoints), slice_of(endpoint("10.0.0.9", ready=True), name="other")])
    assert found == {("10.96.1.2", 80): tuple((ip, 8080) for ip in wanted)}


@pytest.mark.parametrize("spec", [{"clusterIP": "None"}, {"selector": None}, {"clusterIP": ""}])
def test_a_service_without_address_or_selector_has_no_route(spec: JSON) -> None:
    assert routes([service(**spec)], [slice_of(endpoint("10.0.0.1", ready=True))]) == {}


class Echo:
    """Says its name to whoever connects, then repeats what it hears; ``cut`` resets who is there."""

    def __init__(self, ip: str) -> None:
        self.ip = ip
        self._server = socket.create_server((ip, 8080))
        self._there: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        for each in (self._server, *self._there):
            # One that is being read from ends only so.
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError:
                return
            self._there.append(connection)
            threading.Thread(target=self._repeat, args=(connection,), daemon=True).start()

    def _repeat(self, connection: socket.socket) -> None:
        try:
            connection.sendall(f"{self.ip}\n".encode())
            while heard := connection.recv(4096):
                connection.sendall(heard)
            connection.sendall(b"bye")
            connection.shutdown(socket.SHUT_WR)
        except OSError:
            return


@pytest.fixture
def echoes() -> Iterator[tuple[Echo, Echo]]:
    if reason := why_not():
        skip_without(reason)
    with ExitStack() as stack:
        subnet = stack.enter_context(claimed_subnet())
        found = []
        for number in (1, 2):
            ip = address_in(subnet, 1 + number)
            add_address(ip)
            stack.callback(remove_address, ip)
            found.append(Echo(ip))
            stack.callback(found[-1].close)
        yield found[0], found[1]


class Chat:
    """A Service on the control plane whose endpoints the test writes."""

    def __init__(self, client: Client, namespace: str) -> None:
        self.client, self.namespace = client, namespace
        ports = [{"name": "http", "port": 80, "targetPort": 8080}]
        # A selector that finds no pod: nobody else writes endpoints that count.
        spec = {"selector": {"app": "nobody"}, "ports": ports}
        metadata = {"name": "chat", "namespace": namespace}
        made = client.create({"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": spec})
        self.ip = made["spec"]["clusterIP"]

    def endpoints(self, *ips: str) -> None:
        labels = {"kubernetes.io/service-name": "chat"}
        self.client.apply(
            {
                "apiVersion": "discovery.k8s.io/v1",
                "kind": "EndpointSlice",
                "metadata": {"name": "chat-test", "namespace": self.namespace, "labels": labels},
                "addressType": "IPv4",
                "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
                "endpoints": [endpoint(ip, ready=True) for ip in ips],
            }
        )

    @contextmanager
    def connected(self) -> Iterator[tuple[socket.socket, str]]:
        """A connection, and who answers it; raises OSError where nobody does."""
        with socket.create_connection((self.ip, 80), 10) as connection:
            said = b""
            while not said.endswith(b"\n"):
                part = connection.recv(4096)
                if not part:
                    raise ConnectionResetError("it ended at once")
                said += part
            yield connection, said.decode().strip()

    def wait_answered_by(self, *ips: str) -> None:
        """Until new connections are answered by exactly these."""

        def answered() -> bool:
            seen = set()
            for _ in range(12):
                with self.connected() as (_, who):
                    seen.add(who)
            return seen == set(ips)

        self.client.wait(answered, f"{ips} answer")

    def refuses(self) -> bool:
        try:
            with self.connected():
                return False
        except ConnectionRefusedError:
            return True


@pytest.fixture
def chat(control_plane: Cluster, namespace: str) -> Chat:
    return Chat(control_plane.client(), namespace)


def test_new_connections_follow_the_endpoints_and_old_ones_stay(
    control_plane: Cluster, chat: Chat, echoes: tuple[Echo, Echo]
) -> None:
    first, second = echoes
    with ServiceProxy(control_plane.client()):
        chat.endpoints(first.ip)
        chat.wait_answered_by(first.ip)
        with chat.connected() as (old, _):
            chat.endpoints(second.ip)
            chat.wait_answered_by(second.ip)
            old.sendall(b"still there?")
            assert old.recv(4096) == b"still there?"
            old.shutdown(socket.SHUT_WR)
            assert old.recv(4096) == b"bye", "the end of one direction isn't the end of the other"
            assert old.recv(4096) == b""
        chat.endpoints(first.ip, second.ip)
        chat.wait_answered_by(first.ip, second.ip)


def test_a_service_without_endpoints_refuses_and_one_that_is_deleted_is_gone(
    control_plane: Cluster, chat: Chat, echoes: tuple[Echo, Echo]
) -> None:
    with ServiceProxy(control_plane.client()):
        chat.endpoints(echoes[0].ip)
        chat.wait_answered_by(echoes[0].ip)
        chat.endpoints()
        chat.client.wait(chat.refuses, "it refuses")
        chat.endpoints(echoes[0].ip)
        chat.wait_answered_by(echoes[0].ip)
        chat.client.delete("v1", "Service", "chat", namespace=chat.namespace)
        # Its address is nobody's again.
        chat.client.wait(lambda: _taken(chat.ip), "the address can be taken")
        remove_address(chat.ip)


def test_an_endpoint_that_breaks_off_breaks_the_clients_connection(
    control_plane: Cluster, chat: Chat, echoes: tuple[Echo, Echo]
) -> None:
    with ServiceProxy(control_plane.client()):
        chat.endpoints(echoes[0].ip)
        chat.wait_answered_by(echoes[0].ip)
        with chat.connected() as (connection, _):
            echoes[0].close()
            assert connection.recv(4096) == b""


def _taken(address: str) -> bool:
    return add_address(address)


def test_a_port_that_cannot_be_opened_is_told_once_and_holds_up_no_other(capsys: pytest.CaptureFixture[str]) -> None:
    if reason := why_not():
        skip_without(reason)
    with socket.create_server(("127.0.0.1", 0)) as taken, socket.create_server(("127.0.0.1", 0)) as freed:
        busy, free = taken.getsockname(), freed.getsockname()
        freed.close()
        proxy = ServiceProxy(Nobody())
        proxy._ips.add("127.0.0.1")
        wanted = dict.fromkeys((busy, free), (("127.0.0.1", 9),))

        async def follow() -> set[tuple[str, int]]:
            for _ in range(2):
                await proxy._follow(wanted)
            opened = set(proxy._servers)
            for server in proxy._servers.values():
                server.close()
            return opened

        assert asyncio.run(follow()) == {free}
    told = capsys.readouterr().err.splitlines()
    assert [f":{busy[1]} can't be opened" in line for line in told] == [True]


class Nobody(Client):
    def __init__(self) -> None:
        """No API server is asked."""
