"""Fake nodes take pods as real ones do: by their GPUs, with a delay, one at a time."""

from __future__ import annotations

from typing import Any

from control_cluster import Cluster
from fake_nodes import GONE_AFTER, READY_AFTER, FakeNodes

NEVER = "1000h"


def test_a_deployments_pods_get_ready_on_a_fake_gpu_node(
    control_plane: Cluster, namespace: str, fake_nodes: FakeNodes
) -> None:
    node = fake_nodes.add_gpu_node("l4-a", product="NVIDIA-L4", gpus=2, memory_mib=23034)
    assert node["status"]["allocatable"]["nvidia.com/gpu"] == "2"
    assert node["metadata"]["labels"]["nvidia.com/gpu.product"] == "NVIDIA-L4"
    control_plane.client().create(_deployment("model", namespace, replicas=2))
    control_plane.kubectl("-n", namespace, "rollout", "status", "deployment/model", "--timeout=60s")
    pods = control_plane.client().list("v1", "Pod", namespace=namespace)
    assert {pod["spec"]["nodeName"] for pod in pods} == {"l4-a"}
    assert len({pod["status"]["podIP"] for pod in pods}) == 2


def test_a_pod_stays_pending_while_every_gpu_is_taken(
    control_plane: Cluster, namespace: str, fake_nodes: FakeNodes
) -> None:
    fake_nodes.add_gpu_node("l4-b", gpus=1)
    client = control_plane.client()
    client.create(_deployment("model", namespace, replicas=2))
    client.wait(lambda: _phases(control_plane, namespace) == ["Pending", "Running"], "one of two pods runs")
    waiting = next(p for p in client.list("v1", "Pod", namespace=namespace) if p["status"]["phase"] == "Pending")
    client.wait(lambda: _is_unschedulable(control_plane, waiting), "the other is found unschedulable")
    fake_nodes.add_gpu_node("l4-c", gpus=1)
    client.wait(lambda: _phases(control_plane, namespace) == ["Running", "Running"], "both run")


def test_a_pod_loads_for_as_long_as_its_annotation_says(
    control_plane: Cluster, namespace: str, fake_nodes: FakeNodes
) -> None:
    fake_nodes.add_gpu_node("l4-d")
    client = control_plane.client()
    client.create(_deployment("slow", namespace, annotations={READY_AFTER: NEVER}))
    client.create(_deployment("quick", namespace, annotations={READY_AFTER: "10ms"}))
    control_plane.kubectl("-n", namespace, "rollout", "status", "deployment/quick", "--timeout=60s")
    client.wait(lambda: _phases(control_plane, namespace) == ["Running", "Running"], "both run")
    slow = client.get("apps/v1", "Deployment", "slow", namespace=namespace)
    assert slow["status"].get("readyReplicas", 0) == 0


def test_a_deleted_pod_is_gone_at_once_or_drains_as_its_annotation_says(
    control_plane: Cluster, namespace: str, fake_nodes: FakeNodes
) -> None:
    fake_nodes.add_gpu_node("l4-e")
    client = control_plane.client()
    client.create(_deployment("quick", namespace))
    client.create(_deployment("draining", namespace, annotations={GONE_AFTER: NEVER}))
    client.wait(lambda: _phases(control_plane, namespace) == ["Running", "Running"], "both run")
    for name in ("quick", "draining"):
        client.delete("apps/v1", "Deployment", name, namespace=namespace)
    client.wait(lambda: _apps(control_plane, namespace) == ["draining"], "the quick pod is gone")
    left = client.wait(lambda: _deleting(control_plane, namespace), "the other is being deleted")
    assert [pod["metadata"]["labels"]["app"] for pod in left] == ["draining"]


def test_a_node_that_is_removed_takes_its_pods_along(
    control_plane: Cluster, namespace: str, fake_nodes: FakeNodes
) -> None:
    fake_nodes.add_gpu_node("l4-f")
    client = control_plane.client()
    client.create(_deployment("model", namespace))
    client.wait(lambda: _phases(control_plane, namespace) == ["Running"], "the pod runs")
    fake_nodes.remove("l4-f")
    client.wait(lambda: _phases(control_plane, namespace) == ["Pending"], "its successor finds no node")


def test_fake_nodes_outlive_a_restart_of_the_api_server(
    control_plane: Cluster, namespace: str, fake_nodes: FakeNodes
) -> None:
    fake_nodes.add_gpu_node("l4-g")
    control_plane.restart_apiserver(kill=True)
    control_plane.client().create(_deployment("model", namespace))
    control_plane.kubectl("-n", namespace, "rollout", "status", "deployment/model", "--timeout=60s")


def _deployment(
    name: str, namespace: str, *, replicas: int = 1, annotations: dict[str, str] | None = None
) -> dict[str, Any]:
    labels, metadata = {"app": name}, {"name": name, "namespace": namespace}
    container = {"name": "engine", "image": "engine", "resources": {"limits": {"nvidia.com/gpu": "1"}}}
    pod = {"metadata": {"labels": labels, "annotations": annotations or {}}, "spec": {"containers": [container]}}
    spec = {"replicas": replicas, "selector": {"matchLabels": labels}, "template": pod}
    return {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": metadata, "spec": spec}


def _phases(control_plane: Cluster, namespace: str) -> list[str]:
    return sorted(pod["status"]["phase"] for pod in control_plane.client().list("v1", "Pod", namespace=namespace))


def _apps(control_plane: Cluster, namespace: str) -> list[str]:
    return [pod["metadata"]["labels"]["app"] for pod in control_plane.client().list("v1", "Pod", namespace=namespace)]


def _deleting(control_plane: Cluster, namespace: str) -> list[dict[str, Any]]:
    pods = control_plane.client().list("v1", "Pod", namespace=namespace)
    return [pod for pod in pods if "deletionTimestamp" in pod["metadata"]]


def _is_unschedulable(control_plane: Cluster, pod: dict[str, Any]) -> bool:
    name, namespace = pod["metadata"]["name"], pod["metadata"]["namespace"]
    status = control_plane.client().get("v1", "Pod", name, namespace=namespace)["status"]
    return any(condition.get("reason") == "Unschedulable" for condition in status.get("conditions", ()))
