"""Nodes with GPUs that exist only in the API: KWOK plays their kubelets, and pods on them get ready after a delay."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import TracebackType
from typing import Any, Self

import yaml

from control_client import JSON
from control_cluster import Cluster
from control_processes import Program

READY_AFTER = "fake-nodes.test/ready-after"
"""Annotation of a pod, a Go duration: it runs but is not ready for so long, as an engine that loads its model."""
GONE_AFTER = "fake-nodes.test/gone-after"
"""Annotation of a pod, a Go duration: its deletion takes so long, as an engine that drains; otherwise it is instant."""
_FAKE = {"kwok.x-k8s.io/node": "fake"}
_READY = '.status.conditions.[] | select( .type == "Ready" ) | .status'
_PRODUCT_LABELS = {"nvidia.com/gpu.present": "true", "nvidia.com/gpu.replicas": "1"}

_NODE_STATUS = """
phase: Running
conditions:
{{ range NodeConditions }}
- lastHeartbeatTime: {{ Now | Quote }}
  lastTransitionTime: {{ Now | Quote }}
  message: {{ .message | Quote }}
  reason: {{ .reason | Quote }}
  status: {{ .status | Quote }}
  type: {{ .type | Quote }}
{{ end }}
addresses:
- address: {{ NodeIP | Quote }}
  type: InternalIP
"""
_POD_STATUS = """
{{ $now := Now }}
phase: Running
startTime: {{ $now | Quote }}
conditions:
- {type: Initialized, status: "True", lastTransitionTime: {{ $now | Quote }}}
- {type: Ready, status: "%(ready)s", lastTransitionTime: {{ $now | Quote }}}
- {type: ContainersReady, status: "%(ready)s", lastTransitionTime: {{ $now | Quote }}}
containerStatuses:
{{ range .spec.containers }}
- image: {{ .image | Quote }}
  name: {{ .name | Quote }}
  ready: %(started)s
  started: %(started)s
  restartCount: 0
  state: {running: {startedAt: {{ $now | Quote }}}}
{{ end }}
initContainerStatuses:
{{ range .spec.initContainers }}
- image: {{ .image | Quote }}
  name: {{ .name | Quote }}
  ready: true
  restartCount: 0
  {{ if eq .restartPolicy "Always" }}
  started: true
  state: {running: {startedAt: {{ $now | Quote }}}}
  {{ else }}
  state: {terminated: {exitCode: 0, reason: Completed, startedAt: {{ $now | Quote }}, finishedAt: {{ $now | Quote }}}}
  {{ end }}
{{ end }}
hostIP: {{ NodeIPWith .spec.nodeName | Quote }}
{{ $pod := .metadata }}
podIP: {{ PodIPWith .spec.nodeName false $pod.uid $pod.name $pod.namespace | Quote }}
"""


class FakeNodes:
    """Fake nodes on a control plane that the tests started; entered, their pods live, and left, the nodes are gone.

    A pod is ready ``ready_after`` seconds after it was scheduled, unless an annotation of it says otherwise. One at a
    time on a control plane.
    """

    def __init__(self, control_plane: Cluster, *, ready_after: float = 0.3) -> None:
        self._control_plane = control_plane
        self._client = control_plane.client()
        self._ready_after = ready_after
        self._program: Program | None = None
        self._names: list[str] = []

    def __enter__(self) -> Self:
        plane = self._control_plane
        config = plane.kubeconfig.with_name("fake-nodes.yaml")
        config.write_text(yaml.safe_dump_all(_stages(self._ready_after)))
        self._program = plane.start_program(
            "kwok",
            f"--kubeconfig={plane.kubeconfig_for('system:kwok', ['system:masters'])}",
            f"--config={config}",
            "--manage-all-nodes=false",
            "--manage-nodes-with-annotation-selector=kwok.x-k8s.io/node=fake",
            "--node-ip=10.250.0.1",
            "--cidr=10.251.0.1/16",
            # The controllers judge these nodes by their conditions alone.
            "--node-lease-duration-seconds=0",
        )
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.clear()
        if self._program is not None:
            self._program.stop(kill=True)

    def add_gpu_node(
        self,
        name: str,
        *,
        product: str = "NVIDIA-L4",
        gpus: int = 8,
        memory_mib: int = 23034,
        labels: Mapping[str, str] | None = None,
        taints: list[JSON] | None = None,
        cpu: str = "192",
        memory: str = "2Ti",
        pods: int = 2000,
    ) -> JSON:
        """A ready node with ``gpus`` GPUs, labelled as feature discovery does; ``labels`` add to that or replace it."""
        discovered = {
            "nvidia.com/gpu.product": product,
            "nvidia.com/gpu.memory": str(memory_mib),
            "nvidia.com/gpu.count": str(gpus),
            **_PRODUCT_LABELS,
        }
        capacity = {"cpu": cpu, "memory": memory, "pods": str(pods), "nvidia.com/gpu": str(gpus)}
        return self.add_node(name, labels={**discovered, **(labels or {})}, capacity=capacity, taints=taints)

    def add_node(
        self,
        name: str,
        *,
        labels: Mapping[str, str] | None = None,
        capacity: Mapping[str, str] | None = None,
        taints: list[JSON] | None = None,
    ) -> JSON:
        """A ready node with exactly these labels beside its host name; no GPU unless ``capacity`` names one."""
        resources = {"cpu": "192", "memory": "2Ti", "pods": "2000", "ephemeral-storage": "1Ti", **(capacity or {})}
        metadata = {
            "name": name,
            "annotations": _FAKE,
            "labels": {"kubernetes.io/hostname": name, "kubernetes.io/os": "linux", **(labels or {})},
        }
        status = {"capacity": resources, "allocatable": resources}
        node = {"apiVersion": "v1", "kind": "Node", "metadata": metadata, "spec": {"taints": taints or []}}
        self._client.create({**node, "status": status})
        self._names.append(name)
        return self._client.wait(partial(self._if_ready, name), f"fake node {name} is ready")

    def remove(self, name: str) -> None:
        """The node and what runs on it are gone, at once, as when its machine is taken away."""
        self._names.remove(name)
        self._client.delete("v1", "Node", name)
        for pod in self._client.list("v1", "Pod"):
            if pod["spec"].get("nodeName") == name:
                namespace = pod["metadata"]["namespace"]
                self._client.delete("v1", "Pod", pod["metadata"]["name"], namespace=namespace, grace_seconds=0)

    def clear(self) -> None:
        """Remove every node."""
        for name in list(self._names):
            self.remove(name)

    def _if_ready(self, name: str) -> JSON | None:
        node = self._client.get("v1", "Node", name)
        told = {condition["type"]: condition["status"] for condition in node["status"].get("conditions", ())}
        # The taint goes a moment after the condition came; before, no pod is scheduled.
        held = any(taint["key"].startswith("node.kubernetes.io/") for taint in node["spec"].get("taints", ()))
        return node if told.get("Ready") == "True" and not held else None


def _stages(ready_after: float) -> list[JSON]:
    alive = {"key": ".metadata.deletionTimestamp", "operator": "DoesNotExist"}
    dying = {"key": ".metadata.deletionTimestamp", "operator": "Exists"}
    pending = {"key": ".status.phase", "operator": "In", "values": ["Pending"]}
    unready = {"key": _READY, "operator": "NotIn", "values": ["True"]}
    loading = {"key": _READY, "operator": "In", "values": ["False"]}
    running = {"key": ".status.phase", "operator": "In", "values": ["Running"]}
    annotated = {"key": _annotation(READY_AFTER), "operator": "Exists"}
    plain = {"key": _annotation(READY_AFTER), "operator": "DoesNotExist"}
    default = {"durationMilliseconds": round(ready_after * 1000)}
    load = {"durationMilliseconds": 0, "durationFrom": {"expressionFrom": _annotation(READY_AFTER)}}
    drain = {"durationMilliseconds": 0, "durationFrom": {"expressionFrom": _annotation(GONE_AFTER)}}
    ready = {"statusTemplate": _POD_STATUS % {"ready": "True", "started": "true"}}
    not_yet = {"statusTemplate": _POD_STATUS % {"ready": "False", "started": "false"}}
    return [
        _stage("node-ready", "Node", [unready], {"statusTemplate": _NODE_STATUS}),
        _stage("pod-ready", "Pod", [alive, pending, plain], ready, default),
        _stage("pod-loading", "Pod", [alive, pending, annotated], not_yet),
        _stage("pod-loaded", "Pod", [alive, running, loading, annotated], ready, load),
        _stage("pod-gone", "Pod", [dying], {"delete": True}, drain),
    ]


def _stage(name: str, kind: str, when: list[JSON], then: JSON, delay: JSON | None = None) -> dict[str, Any]:
    spec = {"resourceRef": {"apiGroup": "v1", "kind": kind}, "selector": {"matchExpressions": when}, "next": then}
    if delay is not None:
        spec["delay"] = delay
    return {"apiVersion": "kwok.x-k8s.io/v1alpha1", "kind": "Stage", "metadata": {"name": name}, "spec": spec}


def _annotation(name: str) -> str:
    return f'.metadata.annotations["{name}"]'
