"""Whatever is done to the children by hand: what the operator owns is put back, what it doesn't is left alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from control_client import JSON, Client
from control_cluster import Cluster
from fake_nodes import FakeNodes
from live_children import LiveServer, edit, edits
from operator_world import MODEL, World, install_crd, look_at_everything, settle
from operators import QUICK, OperatorThread
from owned_leaves import Pointer, owned_leaves, values_of
from pagedserve_operator.drift import Owned, owned_fields
from pagedserve_operator.kinds import CHILDREN, KEDA_AUTOSCALER, KINDS, OPTIONAL
from pagedserve_operator.names import MANAGER, chat_template_name, claim_name

MONITORING = Path(__file__).parents[1] / "golden/operator/monitoring_crds.yaml"
MADE = tuple(kind for kind in CHILDREN if kind != KEDA_AUTOSCALER)
"""Of a resource that no KEDA scales."""
FLOCK = 20
"""Resources that are edited at once, each at another leaf."""

FULL: JSON = {
    "model": {**MODEL, "servedName": "chat", "chatTemplate": "{{ messages }}"},
    "gpu": {"type": "NVIDIA-L4", "nodeSelector": {"pool": "none"}, "tolerations": [{"key": "gpu"}]},
    "autoscaling": {
        "minReplicas": 1,
        "maxReplicas": 2,
        "metrics": [{"name": "cpu"}, {"name": "queueWaitSeconds", "averageValue": "1.5"}],
    },
    "cache": {"newClaim": {"size": "1Gi", "storageClassName": "none", "accessMode": "ReadWriteMany"}},
    "env": [{"name": "LOG_LEVEL", "value": "debug"}],
    "image": {"pullPolicy": "IfNotPresent", "pullSecrets": ["registry"]},
    "resources": {"requests": {"cpu": "0.5", "memory": "1.5Gi"}, "limits": {"memory": "2048Mi"}},
    "podTemplate": {
        "labels": {"team": "a"},
        "annotations": {"note": "b"},
        "sidecars": [{"name": "proxy", "image": "example/proxy:1", "args": ["--port", "9000"]}],
        "topologySpread": [{"topologyKey": "topology.kubernetes.io/zone", "whenUnsatisfiable": "ScheduleAnyway"}],
    },
    "service": {"annotations": {"a": "b"}},
    "networkPolicy": {"enabled": True, "allowFrom": [{"ipBlock": {"cidr": "10.0.0.0/8"}}]},
    "monitoring": {"serviceMonitor": True, "labels": {"release": "prometheus"}},
}


@pytest.fixture(scope="module")
def operator(control_plane: Cluster) -> Iterator[OperatorThread]:
    install_crd(control_plane)
    client = control_plane.client()
    for document in yaml.safe_load_all(MONITORING.read_text()):
        client.apply(document)
    for kind in sorted(OPTIONAL):
        client.wait(lambda kind=kind: client.list(KINDS[kind].api_version, kind) is not None, f"{kind} is served")
    with OperatorThread(control_plane.kubeconfig, QUICK) as thread:
        yield thread


@pytest.fixture
def world(control_plane: Cluster, namespace: str, operator: OperatorThread) -> World:
    return World(control_plane.client(), namespace)


@dataclass(frozen=True)
class Child:
    """A child as the operator made it, and what of it is the operator's."""

    kind: str
    name: str
    tree: Owned
    values: Any

    def is_as_it_was(self, world: World) -> bool:
        return not self.differences(world)

    def differences(self, world: World) -> list[str]:
        found = world.find(self.kind, self.name)
        return list(_differences(self.values, None if found is None else values_of(self.tree, found)))


def test_every_field_of_every_child_is_put_back(world: World) -> None:
    flock = [f"chat-{index:02d}" for index in range(FLOCK)]
    for owner in flock:
        world.create(owner, **FULL)
    golden = {(kind, owner): _child(world, kind, owner) for owner in flock for kind in MADE}
    for owner in flock:
        # Its controller would roll out each edit and each repair, which is no concern of this test.
        world.client.patch(world.child("Deployment", owner), {"spec": {"paused": True}}, manager="somebody")
    todo = [
        (kind, at, number % 2 == 0)
        for kind in MADE
        for number, at in enumerate(owned_leaves(world.child(kind, golden[kind, flock[0]].name), MANAGER))
    ]
    edited: Counter[str] = Counter()
    while todo:
        batch, todo = todo[:FLOCK], todo[FLOCK:]
        watched = []
        for owner, (kind, at, changes) in zip(flock, batch, strict=False):
            if _edit(world, golden[kind, owner], at, changes=changes):
                watched.append((golden[kind, owner], at))
                edited[kind] += 1
        for child, at in watched:
            _wait_as_it_was(world, child, at)
    assert set(edited) == set(MADE), edited
    assert edited.total() > 150, edited


def test_every_deleted_child_is_made_again(world: World) -> None:
    world.create("chat", **FULL)
    before = {kind: world.wait_child(kind, _name_of(kind, "chat")) for kind in MADE}
    for kind, child in before.items():
        world.client.delete(KINDS[kind].api_version, kind, child["metadata"]["name"], namespace=world.namespace)
    for kind, child in before.items():
        old = child["metadata"]["uid"]
        world.wait_child(
            kind, child["metadata"]["name"], lambda found, old=old: found["metadata"]["uid"] != old, "is made again"
        )


def test_a_reference_or_label_that_is_taken_away_comes_back(world: World, operator: OperatorThread) -> None:
    """Neither the label selector of the watch nor the owner reference may be the only way to find a child."""
    world.create("chat")
    for kind in ("Deployment", "Service", "PodDisruptionBudget"):
        child = world.wait_child(kind, "chat")
        stripped = {"metadata": {"labels": None, "ownerReferences": None}}
        world.client.patch(child, stripped, manager="somebody")
    look_at_everything(operator, world.client)
    for kind in ("Deployment", "Service", "PodDisruptionBudget"):
        world.wait_child(kind, "chat", lambda found: found["metadata"].get("ownerReferences"), "has its owner again")
        assert world.child(kind, "chat")["metadata"]["labels"]["app.kubernetes.io/instance"] == "chat"


def test_what_others_add_survives(
    control_plane: Cluster, world: World, operator: OperatorThread, fake_nodes: FakeNodes
) -> None:
    fake_nodes.add_node("drift-cpu")
    world.create("chat", autoscaling={"minReplicas": 1, "maxReplicas": 5}, networkPolicy={"enabled": True})
    world.wait_rolled("chat")
    kinds = ("Deployment", "Service", "HorizontalPodAutoscaler", "PodDisruptionBudget", "NetworkPolicy")
    for kind in kinds:
        theirs = {"metadata": {"labels": {"team": "blue"}, "annotations": {"note": "keep"}}}
        world.client.patch(world.child(kind, "chat"), theirs, manager="somebody")
    _inject_sidecar(world.client, world.child("Deployment", "chat"))
    control_plane.kubectl("-n", world.namespace, "rollout", "restart", "deployment/chat")
    control_plane.kubectl("-n", world.namespace, "scale", "deployment/chat", "--replicas=3")
    world.wait_rolled("chat")
    settle(operator, control_plane, world)
    # A change of the spec applies everything again, and takes nothing of theirs along.
    world.edit("chat", limits={"maxQueue": 9}, autoscaling={"maxReplicas": 4}, service={"annotations": {"c": "d"}})
    world.wait_rolled("chat")
    settle(operator, control_plane, world)
    for kind in kinds:
        metadata = world.child(kind, "chat")["metadata"]
        assert (metadata["labels"]["team"], metadata["annotations"]["note"]) == ("blue", "keep"), kind
    deployment = world.child("Deployment", "chat")
    template = deployment["spec"]["template"]
    assert [container["name"] for container in template["spec"]["containers"]] == ["engine", "mesh"]
    assert "kubectl.kubernetes.io/restartedAt" in template["metadata"]["annotations"]
    assert deployment["spec"]["replicas"] == 3
    assert {"name": "MAX_QUEUE", "value": "9"} in template["spec"]["containers"][0]["env"]


def test_a_fixed_count_that_is_scaled_by_hand_is_put_back(control_plane: Cluster, world: World) -> None:
    world.create("chat", replicas=2)
    world.wait_child("Deployment", "chat", lambda child: child["spec"]["replicas"] == 2, "has two replicas")
    control_plane.kubectl("-n", world.namespace, "scale", "deployment/chat", "--replicas=5")
    world.wait_child("Deployment", "chat", lambda child: child["spec"]["replicas"] == 2, "has two replicas again")


def test_an_open_count_that_is_scaled_by_hand_stays(
    control_plane: Cluster, world: World, operator: OperatorThread
) -> None:
    world.create("chat")
    world.wait_child("Deployment", "chat")
    control_plane.kubectl("-n", world.namespace, "scale", "deployment/chat", "--replicas=3")
    settle(operator, control_plane, world)
    world.edit("chat", limits={"maxQueue": 9})
    settle(operator, control_plane, world)
    assert world.replicas("chat") == 3


def _child(world: World, kind: str, owner: str) -> Child:
    name = _name_of(kind, owner)
    found = world.wait_child(kind, name)
    tree = owned_fields(found, MANAGER)
    return Child(kind, name, tree, values_of(tree, found))


def _edit(world: World, child: Child, at: Pointer, *, changes: bool) -> bool:
    """Change the value there, or remove it; where the server refuses one, the other."""
    server, found = LiveServer(world.client, world.namespace), world.child(child.kind, child.name)
    patches = sorted(edits(found, at), key=lambda patch: (patch[0]["op"] == "remove") == changes)
    return any(edit(server, found, patch) is not None for patch in patches)


def _wait_as_it_was(world: World, child: Child, at: Pointer) -> None:
    try:
        world.client.wait(lambda: child.is_as_it_was(world), "it is put back", seconds=30)
    except TimeoutError:
        pytest.fail(f"{child.kind} {child.name} edited at {at} isn't put back: {child.differences(world)}")


def _differences(was: Any, now: Any, at: str = "") -> Iterator[str]:
    if isinstance(was, dict) and isinstance(now, dict):
        for name, value in was.items():
            yield from _differences(value, now.get(name), f"{at}/{name}")
    elif was != now:
        yield f"{at}: {was!r} is {now!r}"


def _name_of(kind: str, owner: str) -> str:
    return {"PersistentVolumeClaim": claim_name(owner), "ConfigMap": chat_template_name(owner)}.get(kind, owner)


def _inject_sidecar(client: Client, deployment: JSON) -> None:
    container = {"name": "mesh", "image": "example/mesh:1"}
    head = {name: deployment["metadata"][name] for name in ("name", "namespace")}
    template = {"spec": {"containers": [container]}}
    manifest = {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": head, "spec": {"template": template}}
    client.apply(manifest, manager="mesh-injector")
