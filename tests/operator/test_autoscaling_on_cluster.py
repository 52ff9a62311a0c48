"""Nobody fights over replicas: not while autoscaling, not while it is turned on or off, not with strangers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from control_client import JSON
from control_cluster import Cluster
from fake_nodes import FakeNodes
from operator_world import World, condition_of, install_crd, own_writes, settle
from operators import QUICK, OperatorThread

SCALED = {"minReplicas": 2, "maxReplicas": 10}


@pytest.fixture(scope="module")
def operator(control_plane: Cluster) -> Iterator[OperatorThread]:
    install_crd(control_plane)
    with OperatorThread(control_plane.kubeconfig, QUICK) as thread:
        yield thread


@pytest.fixture
def world(control_plane: Cluster, namespace: str, operator: OperatorThread, fake_nodes: FakeNodes) -> World:
    fake_nodes.add_node("autoscaling")
    return World(control_plane.client(), namespace)


def test_it_starts_with_the_fewest_replicas(world: World) -> None:
    world.create("chat", autoscaling=SCALED)
    world.wait_rolled("chat")
    assert world.replicas("chat") == 2
    spec = world.child("HorizontalPodAutoscaler", "chat")["spec"]
    assert (spec["minReplicas"], spec["maxReplicas"]) == (2, 10)


def test_turning_it_off_and_on_again_never_resets_the_replicas(
    control_plane: Cluster, world: World, operator: OperatorThread
) -> None:
    world.create("chat", autoscaling=SCALED)
    world.wait_rolled("chat")
    autoscale(world, "chat", 6)
    settle(operator, control_plane, world)
    with watching(world, "chat") as counts:
        world.edit("chat", autoscaling=None)
        world.wait_gone("HorizontalPodAutoscaler", "chat")
        settle(operator, control_plane, world)
        world.edit("chat", autoscaling={**SCALED, "maxReplicas": 8})
        world.wait_child("HorizontalPodAutoscaler", "chat")
        settle(operator, control_plane, world)
        world.edit("chat", autoscaling=None)
        world.edit("chat", limits={"maxQueue": 3})
        world.wait_gone("HorizontalPodAutoscaler", "chat")
        settle(operator, control_plane, world)
    assert counts == {6}


def test_turning_it_on_keeps_what_the_user_had_scaled_to(
    control_plane: Cluster, world: World, operator: OperatorThread
) -> None:
    world.create("chat", replicas=5)
    world.wait_rolled("chat")
    with watching(world, "chat") as counts:
        world.edit("chat", replicas=None, autoscaling=SCALED)
        world.wait_child("HorizontalPodAutoscaler", "chat")
        settle(operator, control_plane, world)
        # Whoever stops naming a number keeps the one that is there, too.
        world.edit("chat", autoscaling=None)
        settle(operator, control_plane, world)
    assert counts == {5}


def test_a_late_write_of_the_autoscaler_pins_no_wrong_count(
    control_plane: Cluster, world: World, operator: OperatorThread
) -> None:
    world.create("chat", autoscaling=SCALED)
    world.wait_rolled("chat")
    autoscale(world, "chat", 6)
    world.edit("chat", autoscaling=None)
    world.wait_gone("HorizontalPodAutoscaler", "chat")
    # Its controller had decided before it saw the deletion.
    autoscale(world, "chat", 4)
    settle(operator, control_plane, world)
    assert world.replicas("chat") == 4
    world.edit("chat", replicas=3)
    settle(operator, control_plane, world)
    autoscale(world, "chat", 7)
    world.wait_child("Deployment", "chat", lambda child: child["spec"]["replicas"] == 3, "has the user's number again")


def test_a_named_number_replaces_the_autoscalers(
    control_plane: Cluster, world: World, operator: OperatorThread
) -> None:
    world.create("chat", autoscaling=SCALED)
    world.wait_rolled("chat")
    autoscale(world, "chat", 6)
    world.edit("chat", autoscaling=None, replicas=3)
    world.wait_child("Deployment", "chat", lambda child: child["spec"]["replicas"] == 3, "has the number")
    world.wait_gone("HorizontalPodAutoscaler", "chat")


def test_a_change_of_the_template_keeps_the_autoscalers_count(world: World) -> None:
    world.create("chat", autoscaling=SCALED)
    world.wait_rolled("chat")
    autoscale(world, "chat", 6)
    with watching(world, "chat") as counts:
        world.edit("chat", limits={"maxQueue": 3}, service={"port": 8000}, autoscaling={"maxReplicas": 12})
        world.wait_rolled("chat")
    assert counts == {6}
    assert world.child("HorizontalPodAutoscaler", "chat")["spec"]["maxReplicas"] == 12


def test_another_autoscaler_on_the_same_target_is_told_and_not_fought(
    control_plane: Cluster, world: World, operator: OperatorThread
) -> None:
    world.create("chat", autoscaling=SCALED)
    world.wait_rolled("chat")
    theirs = foreign_autoscaler(world, "theirs", target="chat", low=4)
    told = world.wait("chat", "ScalingActive", "False", reason="AutoscalerConflict")
    assert "HorizontalPodAutoscaler theirs" in condition_of(told, "ScalingActive")["message"]
    settle(operator, control_plane, world)
    mark = control_plane.audit.mark()
    settle(operator, control_plane, world)
    assert own_writes(control_plane, world, mark) == []
    # Ours stays as the spec asks for, theirs as they wrote it: which one goes is the user's to say.
    assert world.child("HorizontalPodAutoscaler", "chat")["spec"]["minReplicas"] == 2
    assert world.child("HorizontalPodAutoscaler", "theirs")["spec"] == theirs["spec"]
    assert world.events("chat").count("AutoscalerConflict") == 1
    world.client.delete("autoscaling/v2", "HorizontalPodAutoscaler", "theirs", namespace=world.namespace)

    def over() -> bool:
        return condition_of(world.get("chat"), "ScalingActive").get("reason") != "AutoscalerConflict"

    world.client.wait(over, "the conflict is over")


def test_somebodys_own_autoscaler_is_a_way_to_run(
    control_plane: Cluster, world: World, operator: OperatorThread
) -> None:
    world.create("chat")
    world.wait_rolled("chat")
    foreign_autoscaler(world, "theirs", target="chat", low=4)
    world.wait_child("Deployment", "chat", lambda child: child["spec"]["replicas"] == 4, "has their number")
    settle(operator, control_plane, world)
    assert world.replicas("chat") == 4
    assert condition_of(world.get("chat"), "ScalingActive") == {}


def test_a_number_beside_somebodys_autoscaler_is_a_conflict(world: World) -> None:
    world.create("chat", replicas=3)
    world.wait_rolled("chat")
    foreign_autoscaler(world, "theirs", target="chat", low=1)
    told = world.wait("chat", "ScalingActive", "False", reason="AutoscalerConflict")
    assert "spec.replicas" in condition_of(told, "ScalingActive")["message"]


def autoscale(world: World, name: str, count: int) -> None:
    """What the autoscaler's controller does: a write of the scale subresource."""
    metadata = {"name": name, "namespace": world.namespace}
    target = {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": metadata}
    world.client.patch(target, {"spec": {"replicas": count}}, subresource="scale", manager="autoscaler")


def foreign_autoscaler(world: World, name: str, *, target: str, low: int) -> JSON:
    reference = {"apiVersion": "apps/v1", "kind": "Deployment", "name": target}
    return world.client.create(
        {
            "apiVersion": "autoscaling/v2",
            "kind": "HorizontalPodAutoscaler",
            "metadata": {"name": name, "namespace": world.namespace},
            "spec": {"scaleTargetRef": reference, "minReplicas": low, "maxReplicas": 9},
        }
    )


@contextmanager
def watching(world: World, name: str) -> Iterator[set[int]]:
    """Every number of replicas that the Deployment asks for while the block runs."""
    begin = world.child("Deployment", name)
    counts: set[int] = {begin["spec"]["replicas"]}
    yield counts
    counts.update(child["spec"]["replicas"] for child in world.history(begin))
