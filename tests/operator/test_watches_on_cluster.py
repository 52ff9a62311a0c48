"""Watches that are cut, go silent or die, and an API server that goes away: nothing stays unseen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest

from control_cluster import Cluster
from fake_nodes import FakeNodes
from fault_calls import Call
from fault_proxy import FaultProxy
from fault_rules import Fault, When
from operator_world import World, install_crd, look_at_everything, running
from operators import QUICK, OperatorThread
from pagedserve_operator.handlers import watched
from pagedserve_operator.kinds import KINDS

CONFIG = replace(QUICK, request_seconds=5.0, watch_silence_seconds=2.0, watch_stale_seconds=8.0)


@pytest.fixture(scope="module")
def proxy(control_plane: Cluster, _kubelets: FakeNodes) -> Iterator[FaultProxy]:
    install_crd(control_plane)
    _kubelets.add_node("watches")
    with FaultProxy(control_plane.url, ca=control_plane.ca, token=control_plane.token) as proxy:
        yield proxy
    _kubelets.clear()


@pytest.fixture(scope="module")
def _operator(proxy: FaultProxy) -> Iterator[OperatorThread]:
    with OperatorThread(proxy.kubeconfig(), CONFIG) as thread:
        for kind in watched(nodes=True):
            proxy.wait_for(_watch_of(KINDS[kind].plural))
        yield thread


@pytest.fixture
def operator(_operator: OperatorThread, proxy: FaultProxy) -> Iterator[OperatorThread]:
    """Whatever a test did to its proxy ends with it."""
    yield _operator
    proxy.heal()


@pytest.fixture
def world(control_plane: Cluster, namespace: str) -> World:
    return World(control_plane.client(), namespace)


def test_a_child_deleted_while_its_watch_was_cut_comes_back(
    operator: OperatorThread, proxy: FaultProxy, world: World
) -> None:
    world.create("gap")
    world.wait_rolled("gap")
    with _blind(proxy, "services"):
        before = world.child("Service", "gap")["metadata"]["uid"]
        world.client.delete("v1", "Service", "gap", namespace=world.namespace)
        world.wait_gone("Service", "gap")
    world.wait_child("Service", "gap", lambda child: child["metadata"]["uid"] != before, "has come back")


def test_a_resource_deleted_while_its_watch_was_cut_leaves_no_ghost(
    operator: OperatorThread, proxy: FaultProxy, world: World
) -> None:
    world.create("ghost")
    world.wait_rolled("ghost")
    known = running(operator).resources
    assert f"{world.namespace}/ghost" in map(str, known.keys())
    with _blind(proxy, *_plurals(proxy)):
        world.delete("ghost")
        world.wait_gone("Deployment", "ghost")
        world.wait_gone("Service", "ghost")
    world.client.wait(lambda: f"{world.namespace}/ghost" not in map(str, known.keys()), "the ghost is forgotten")


def test_a_watch_that_hangs_is_opened_again_and_catches_up(
    operator: OperatorThread, proxy: FaultProxy, world: World
) -> None:
    world.create("silent")
    world.wait_rolled("silent")
    world.client.wait(lambda: proxy.disturb(Fault.hang(), _watch_of("deployments")), "an open watch hangs")
    deployment = world.child("Deployment", "silent")
    world.client.patch(deployment, {"spec": {"progressDeadlineSeconds": 7}}, manager="somebody")
    wanted = deployment["spec"]["progressDeadlineSeconds"]
    world.wait_child(
        "Deployment", "silent", lambda child: child["spec"]["progressDeadlineSeconds"] == wanted, "is put back"
    )


def test_a_quiet_watch_is_healthy(operator: OperatorThread, proxy: FaultProxy, world: World) -> None:
    mark, opened = proxy.mark(), _watch_of("networkpolicies")
    unhealthy: list[str] = []

    def seen_to_outlive_the_limit() -> bool:
        unhealthy.extend(_unhealthy(operator))
        # Each is opened after two silent seconds: this is twice the limit.
        return len(proxy.since(mark, opened)) > 8

    world.client.wait(seen_to_outlive_the_limit, "the watch was opened again and again")
    assert unhealthy == []


def test_a_watch_that_is_dead_for_good_fails_the_probe_by_its_kind(
    operator: OperatorThread, proxy: FaultProxy, world: World
) -> None:
    with proxy.hold(_opening({"pods"})):
        proxy.disturb(Fault.hang(), _watch_of("pods"))
        world.client.wait(lambda: _unhealthy(operator), "the probe says so")
        assert _unhealthy(operator) == ["no sign of life from the watch of Pod"]
    world.client.wait(lambda: not _unhealthy(operator), "the probe says so")


def test_a_kind_whose_first_watch_never_opens_fails_the_probe(proxy: FaultProxy, world: World) -> None:
    config = replace(CONFIG, identity="another", operator_namespace="kube-public")
    with proxy.hold(_opening({"pods"}, client="late")), OperatorThread(proxy.kubeconfig(client="late"), config) as late:
        world.client.wait(lambda: _unhealthy(late), "the probe says so")
        assert _unhealthy(late) == ["no sign of life from the watch of Pod"]


@pytest.mark.parametrize("kill", [False, True], ids=["in order", "killed"])
def test_an_api_server_that_restarts_in_the_midst_delays_and_loses_nothing(
    operator: OperatorThread, control_plane: Cluster, world: World, kill: bool
) -> None:
    names = [f"midst-{index}" for index in range(6)]
    for name in names:
        world.create(name, replicas=1)
    world.wait_child("Deployment", names[0])
    control_plane.restart_apiserver(kill=kill)
    world.wait_ready(*names)
    # Watches see again, too.
    world.client.delete("v1", "Service", names[0], namespace=world.namespace)
    world.edit(names[1], replicas=2)
    world.wait_child("Service", names[0])
    world.wait_child("Deployment", names[1], lambda child: child["spec"]["replicas"] == 2, "has two replicas")
    look_at_everything(operator, world.client)


@contextmanager
def _blind(proxy: FaultProxy, *plurals: str) -> Iterator[None]:
    """The watches of these end with a 410 and begin anew only afterwards: what is deleted meanwhile is never told."""
    with proxy.hold(_opening(set(plurals))):
        # One that was just being opened again is held.
        proxy.disturb(Fault.gone(), lambda call: call.resource in plurals)
        yield


def _opening(plurals: set[str], *, client: str = "client") -> When:
    """Kopf's requests for these, no look's."""

    def opens(call: Call) -> bool:
        return (
            call.client == client
            and call.resource in plurals
            and call.verb in ("list", "watch")
            and call.user_agent.startswith("pagedserve-operator-watches/")
        )

    return opens


def _plurals(proxy: FaultProxy) -> list[str]:
    """Resources that are watched, each once."""
    return sorted({call.resource for call in proxy.watches} - {"customresourcedefinitions", "namespaces"})


def _watch_of(plural: str) -> When:
    return lambda call: call.verb == "watch" and call.resource == plural


def _unhealthy(thread: OperatorThread) -> list[str]:
    found: list[str] = running(thread)._unhealthy()
    return found
