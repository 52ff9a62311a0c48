"""Two operators, of which one writes: leaders that stop, come back, leave in order, or whose writes arrive late."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from control_cluster import Cluster
from fault_calls import Call
from fault_proxy import FaultProxy
from fault_rules import Fault, When
from operator_world import MODEL, World, install_crd
from operators import QUICK, OperatorProcess, OperatorThread
from pagedserve_operator.names import LEASE_NAME

JSON = dict[str, Any]

SHORT = {"LEASE_SECONDS": "3", "RENEW_DEADLINE_SECONDS": "2", "RENEW_SECONDS": "0.5", "REQUEST_SECONDS": "60"}
LONG = {"LEASE_SECONDS": "300", "RENEW_DEADLINE_SECONDS": "200", "RENEW_SECONDS": "0.5"}
"""Nobody waits for the end of such a lease in a test."""


@pytest.fixture(scope="module")
def proxy(control_plane: Cluster) -> Iterator[FaultProxy]:
    install_crd(control_plane)
    with FaultProxy(control_plane.url, ca=control_plane.ca, token=control_plane.token) as proxy:
        yield proxy


@pytest.fixture
def world(control_plane: Cluster, namespace: str) -> World:
    return World(control_plane.client(), namespace)


class Pair:
    """Two operators with a lease of their own; the first leads."""

    def __init__(self, proxy: FaultProxy, world: World, folder: Path, settings: JSON) -> None:
        self.proxy, self.world = proxy, world
        # Names of this test alone: the proxy's ledger outlives it.
        self.first_name, self.second_name = f"first-{world.namespace}", f"second-{world.namespace}"
        place = {"OPERATOR_NAMESPACE": world.namespace, "WATCH_NAMESPACE": world.namespace, **settings}
        self.first = OperatorProcess(proxy.kubeconfig(client=self.first_name), folder, **place, IDENTITY="first")
        self.second = OperatorProcess(proxy.kubeconfig(client=self.second_name), folder, **place, IDENTITY="second")
        self._stack = ExitStack()

    def __enter__(self) -> Pair:
        with ExitStack() as entered:
            entered.enter_context(self.first)
            self.wait_leader("first")
            entered.enter_context(self.second)
            self._stack = entered.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self.proxy.heal()
        self._stack.close()

    def wait_leader(self, identity: str) -> None:
        """Until the lease says so."""
        self.world.client.wait(lambda: self.holder() == identity, f"{identity} leads")

    def holder(self) -> str | None:
        lease = self.world.client.get("coordination.k8s.io/v1", "Lease", LEASE_NAME, namespace=self.world.namespace)
        found: str | None = lease["spec"].get("holderIdentity")
        return found

    def writes(self, client: str, since: int) -> list[Call]:
        """Writes that this one has asked for, Leases excepted."""

        def its(call: Call) -> bool:
            return call.client == client and call.writes and call.resource != "leases"

        return self.proxy.since(since, its)

    def wait_length(self, name: str, tokens: int) -> JSON:
        """Until the Deployment's engine serves requests of so many tokens."""
        return self.world.wait_child("Deployment", name, lambda child: _length(child) == str(tokens), f"has {tokens}")


@pytest.fixture
def pair(proxy: FaultProxy, world: World, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Pair]:
    with Pair(proxy, world, tmp_path, request.param) as pair:
        yield pair


@pytest.mark.parametrize("pair", [LONG], indirect=True, ids=["long lease"])
def test_a_leader_that_ends_in_order_hands_over_at_once(pair: Pair) -> None:
    mark = pair.proxy.mark()
    pair.world.create("handed", model=_model(512))
    pair.wait_length("handed", 512)
    assert pair.writes(pair.second_name, mark) == []
    assert pair.first.stop() == 0
    # The lease that the first one held would last for minutes.
    pair.wait_leader("second")
    mark = pair.proxy.mark()
    pair.world.edit("handed", model=_model(1024))
    pair.wait_length("handed", 1024)
    assert pair.writes(pair.first_name, mark) == []


@pytest.mark.parametrize("pair", [SHORT], indirect=True, ids=["short lease"])
def test_a_leader_that_was_stopped_past_its_lease_changes_nothing_when_it_comes_back(pair: Pair) -> None:
    pair.world.create("stopped", model=_model(512))
    pair.wait_length("stopped", 512)
    pair.first.signal(signal.SIGSTOP)
    pair.wait_leader("second")
    pair.world.edit("stopped", model=_model(1024))
    pair.wait_length("stopped", 1024)
    mark = pair.proxy.mark()
    pair.first.signal(signal.SIGCONT)
    # It has asked for the lease, and seen the events of the meantime.
    pair.proxy.wait_for(_reads_of_lease(pair.first_name), since=mark)
    pair.world.edit("stopped", model=_model(2048))
    pair.wait_length("stopped", 2048)
    again = pair.proxy.mark()
    for _ in range(3):
        again = pair.proxy.wait_for(_reads_of_lease(pair.first_name), since=again).number + 1
    assert pair.holder() == "second"
    # One that was on its way already when the process was stopped is refused.
    assert [call for call in pair.writes(pair.first_name, mark) if call.code != 409] == []
    pair.wait_length("stopped", 2048)


@pytest.mark.parametrize("pair", [SHORT], indirect=True, ids=["short lease"])
@pytest.mark.parametrize("creation", [False, True], ids=["of a change", "of a creation"])
def test_a_write_that_arrives_after_the_next_leader_is_refused(pair: Pair, creation: bool) -> None:
    if not creation:
        pair.world.create("late", model=_model(512))
        pair.wait_length("late", 512)
    mark = pair.proxy.mark()
    with pair.proxy.hold(_applies_deployment(pair.first_name)) as gate:
        if creation:
            pair.world.create("late", model=_model(1024))
        else:
            pair.world.edit("late", model=_model(1024))
        (held,) = gate.wait_for_held()
        pair.first.signal(signal.SIGSTOP)
        pair.wait_leader("second")
        pair.world.edit("late", model=_model(2048))
        made = pair.wait_length("late", 2048)
    pair.proxy.wait_for(lambda call: call is held and call.code is not None, since=mark)
    assert held.code == 409
    after = pair.proxy.mark()
    pair.first.signal(signal.SIGCONT)
    pair.proxy.wait_for(_reads_of_lease(pair.first_name), since=after)
    pair.world.edit("late", model=_model(4096))
    found = pair.wait_length("late", 4096)
    assert found["metadata"]["uid"] == made["metadata"]["uid"]
    assert pair.writes(pair.first_name, after) == []


def test_a_renewal_that_hangs_costs_no_leadership(proxy: FaultProxy, world: World) -> None:
    client = f"renewing-{world.namespace}"
    config = replace(
        QUICK,
        operator_namespace=world.namespace,
        watch_namespace=world.namespace,
        read_nodes=False,
        lease_seconds=9.0,
        renew_deadline_seconds=6.0,
        renew_seconds=0.5,
    )
    with OperatorThread(proxy.kubeconfig(client=client), config):
        world.create("renewed")
        world.wait_child("Deployment", "renewed")
        mark = proxy.mark()
        proxy.inject(Fault.hang(), lambda call: call.client == client and call.resource == "leases")
        hung = proxy.wait_for(lambda call: bool(call.fault), since=mark)
        proxy.wait_for(lambda call: call.resource == "leases" and call.code == 200, since=hung.number + 1)
        # Whoever gains the lead lists all resources.
        assert proxy.since(mark, lambda call: call.client == client and _lists_resources(call)) == []
        world.edit("renewed", model=_model(1024))
        world.wait_child("Deployment", "renewed", lambda child: _length(child) == "1024", "is changed")


def _model(tokens: int) -> JSON:
    return {**MODEL, "maxModelLen": tokens}


def _length(deployment: JSON) -> str | None:
    containers = deployment["spec"]["template"]["spec"]["containers"]
    return next((row.get("value") for row in containers[0]["env"] if row["name"] == "MAX_MODEL_LEN"), None)


def _reads_of_lease(client: str) -> When:
    return lambda call: (call.client, call.verb, call.resource, call.code) == (client, "get", "leases", 200)


def _applies_deployment(client: str) -> When:
    return lambda call: (call.client, call.verb, call.resource) == (client, "apply", "deployments")


def _lists_resources(call: Call) -> bool:
    return (call.verb, call.resource) == ("list", "inferenceservices")
