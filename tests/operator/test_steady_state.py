"""Where nothing happens, nothing is written: counted by the API server's audit log, refused requests included."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from control_client import JSON
from control_cluster import Cluster
from fake_nodes import FakeNodes
from operator_world import MODEL, World, install_crd, look_at_everything, own_writes, settle
from operators import QUICK, OperatorThread

POD_TEMPLATE: JSON = {
    "labels": {"team": "a"},
    "annotations": {"note": "b"},
    "sidecars": [{"name": "proxy", "image": "example/proxy:1", "args": ["--port", "9000"]}],
    "topologySpread": [{"topologyKey": "topology.kubernetes.io/zone", "whenUnsatisfiable": "ScheduleAnyway"}],
}
L4: JSON = {"type": "NVIDIA-L4"}
VARIED: dict[str, JSON] = {
    "plain": {},
    "two": {"replicas": 2},
    "none": {"replicas": 0},
    "scaled": {"autoscaling": {}},
    "scaled-by-cpu": {"autoscaling": {"minReplicas": 1, "maxReplicas": 1, "metrics": [{"name": "cpu"}]}},
    "scaled-by-queue": {"autoscaling": {"minReplicas": 1, "metrics": [{"name": "waitingRequests"}]}},
    "gpu": {"gpu": L4},
    "gpus": {"gpu": {**L4, "count": 2}},
    "unpinned": {"gpu": {**L4, "pin": False}},
    "bounded": {"cache": {"emptyDir": {"sizeLimit": "1.5Gi"}}, "limits": {"maxQueue": 5, "maxNumSeqs": 8}},
    "quantities": {"resources": {"requests": {"cpu": "0.5", "memory": "2560Mi"}, "limits": {"memory": "2.5Gi"}}},
    "templated": {"model": {**MODEL, "chatTemplate": "{{ messages }}\n\n"}},
    "quiet": {"disruption": {"enabled": False}, "monitoring": {"podMonitor": False, "prometheusRule": False}},
    "guarded": {"networkPolicy": {"enabled": True}},
    "public": {"service": {"type": "LoadBalancer", "port": 8000}},
    "nodeport": {"service": {"type": "NodePort"}},
    "in-place": {"rollout": {"strategy": "InPlace"}},
    "at-once": {"rollout": {"strategy": "Recreate"}},
    "hasty": {"lifecycle": {"preStopSeconds": 0, "drainSeconds": 0, "startupTimeoutSeconds": 37}},
    "empty-values": {"env": [{"name": "EMPTY", "value": ""}], "podTemplate": {"labels": {}, "annotations": {"a": ""}}},
    "sidecar": {"podTemplate": POD_TEMPLATE},
    "unknown-gpu": {"gpu": {"type": "Voodoo-2"}},
    "too-long": {"model": {**MODEL, "maxModelLen": 16_000_000}},
    "asleep": {"suspend": True},
}


@pytest.fixture(scope="module")
def operator(control_plane: Cluster) -> Iterator[OperatorThread]:
    install_crd(control_plane)
    with OperatorThread(control_plane.kubeconfig, QUICK) as thread:
        yield thread


@pytest.fixture
def world(control_plane: Cluster, namespace: str, operator: OperatorThread) -> World:
    return World(control_plane.client(), namespace)


def test_twenty_forced_looks_at_everything_write_nothing(
    control_plane: Cluster, world: World, operator: OperatorThread, fake_nodes: FakeNodes
) -> None:
    fake_nodes.add_gpu_node("steady", product="NVIDIA-L4", gpus=64)
    for name, spec in VARIED.items():
        world.create(name, **spec)
    for name in VARIED:
        if name not in ("none", "unknown-gpu", "too-long", "asleep"):
            world.wait_rolled(name)
    world.wait("unknown-gpu", "TuningResolved", "False", reason="GPUUnknown")
    world.wait("too-long", "Ready", "False", reason="InvalidSpec")
    settle(operator, control_plane, world)
    mark = control_plane.audit.mark()
    look_at_everything(operator, world.client, times=20)
    assert own_writes(control_plane, world, mark) == []
