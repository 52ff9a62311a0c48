"""Scaling by KEDA on a real control plane; KEDA itself is played, by what it is known to write."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from control_client import JSON
from control_cluster import Cluster
from fake_nodes import FakeNodes
from monitoring_kinds import install_monitoring
from operator_world import World, condition_of, install_crd, own_writes, settle
from operators import QUICK, OperatorThread
from pagedserve_operator.kinds import AUTOSCALER, KEDA_AUTOSCALER

PROMETHEUS = "http://prometheus.monitoring.svc:9090"
SCALED: JSON = {"minReplicas": 2, "maxReplicas": 8, "metrics": [{"name": "waitingRequests"}]}
BY_KEDA: JSON = {**SCALED, "backend": "KEDA"}
FINALIZER = "finalizer.keda.sh"


@pytest.fixture(scope="module")
def operator(control_plane: Cluster) -> Iterator[OperatorThread]:
    install_crd(control_plane)
    install_monitoring(control_plane)
    with OperatorThread(control_plane.kubeconfig, QUICK.derive(prometheus_url=PROMETHEUS)) as thread:
        yield thread


@pytest.fixture
def world(control_plane: Cluster, namespace: str, operator: OperatorThread, fake_nodes: FakeNodes) -> World:
    fake_nodes.add_node("keda")
    return World(control_plane.client(), namespace)


def keda_takes(world: World, name: str) -> JSON:
    """What KEDA does with a new ScaledObject: its finalizer, an autoscaler of its own, and a verdict."""
    found = world.wait_child(KEDA_AUTOSCALER, name)
    world.client.patch(found, {"metadata": {"finalizers": [FINALIZER]}}, manager="keda")
    owner = {
        "apiVersion": found["apiVersion"],
        "kind": found["kind"],
        "name": name,
        "uid": found["metadata"]["uid"],
        "controller": True,
        "blockOwnerDeletion": True,
    }
    metadata = {"name": f"keda-hpa-{name}", "namespace": world.namespace, "ownerReferences": [owner]}
    source = {"metric": {"name": "s0-prometheus"}, "target": {"type": "AverageValue", "averageValue": "4"}}
    spec = {
        "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": name},
        "minReplicas": found["spec"]["minReplicaCount"],
        "maxReplicas": found["spec"]["maxReplicaCount"],
        "metrics": [{"type": "External", "external": source}],
    }
    world.client.create({"apiVersion": "autoscaling/v2", "kind": AUTOSCALER, "metadata": metadata, "spec": spec})
    ready = [{"type": "Ready", "status": "True", "reason": "ScaledObjectReady", "message": "ready for scaling"}]
    world.client.patch(found, {"status": {"conditions": ready}}, subresource="status", manager="keda")
    return found


def keda_lets_go(world: World, name: str) -> None:
    """What KEDA does once the ScaledObject is to go."""
    found = world.wait_child(KEDA_AUTOSCALER, name, lambda child: "deletionTimestamp" in child["metadata"], "is to go")
    world.client.patch(found, {"metadata": {"finalizers": None}}, manager="keda")


def test_keda_scales_and_its_autoscaler_is_no_stranger(
    control_plane: Cluster, world: World, operator: OperatorThread
) -> None:
    world.create("chat", autoscaling=BY_KEDA)
    keda_takes(world, "chat")
    world.wait_rolled("chat")
    assert world.replicas("chat") == 2
    assert world.find(AUTOSCALER, "chat") is None
    # Nobody serves external metrics here, which is KEDA's autoscaler's trouble and is told as such.
    told = world.wait("chat", "ScalingActive", "False", reason="MetricsUnavailable")
    assert "Prometheus" in condition_of(told, "ScalingActive")["message"]
    assert "AutoscalerConflict" not in world.events("chat")
    settle(operator, control_plane, world)
    mark = control_plane.audit.mark()
    settle(operator, control_plane, world)
    assert own_writes(control_plane, world, mark) == []


def test_switching_there_and_back_keeps_the_count_and_never_leaves_both(
    control_plane: Cluster, world: World, operator: OperatorThread
) -> None:
    world.create("chat", autoscaling=SCALED)
    world.wait_rolled("chat")
    world.client.patch(
        {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "chat", "namespace": world.namespace}},
        {"spec": {"replicas": 6}},
        subresource="scale",
        manager="autoscaler",
    )
    settle(operator, control_plane, world)
    begin = world.child("Deployment", "chat")
    world.edit("chat", autoscaling={"backend": "KEDA"})
    keda_takes(world, "chat")
    assert world.find(AUTOSCALER, "chat") is None
    world.edit("chat", autoscaling={"backend": None})
    # KEDA's finalizer still holds it.
    told = world.wait("chat", "ScalingActive", "Unknown", reason="WaitingForKEDA")
    assert "KEDA" in condition_of(told, "ScalingActive")["message"]
    assert world.find(AUTOSCALER, "chat") is None
    keda_lets_go(world, "chat")
    world.wait_child(AUTOSCALER, "chat")
    assert world.find(KEDA_AUTOSCALER, "chat") is None
    settle(operator, control_plane, world)
    assert {child["spec"]["replicas"] for child in world.history(begin)} <= {6}
    assert world.replicas("chat") == 6


def test_a_verdict_of_kedas_is_told(world: World) -> None:
    world.create("chat", autoscaling=BY_KEDA)
    found = world.wait_child(KEDA_AUTOSCALER, "chat")
    refused = [{"type": "Ready", "status": "False", "reason": "Failed", "message": "the trigger is invalid"}]
    world.client.patch(found, {"status": {"conditions": refused}}, subresource="status", manager="keda")
    told = world.wait("chat", "ScalingActive", "False", reason="ScalingFailed")
    assert "the trigger is invalid" in condition_of(told, "ScalingActive")["message"]
