"""The manifests' rights against a recorded life: what the operator asked for and what it may are the same."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import pytest

from control_audit import AuditEntry
from control_cluster import Cluster
from fake_nodes import FakeNodes
from manifest_files import Manifests, built
from monitoring_kinds import install_monitoring
from operator_world import JSON, MODEL, World, install_crd
from operators import QUICK, OperatorThread
from pagedserve_operator.kinds import CHILDREN
from pagedserve_operator.names import chat_template_name, claim_name

ACCOUNT = "pagedserve-operator"
CHILD_NAMES = {"PersistentVolumeClaim": claim_name("chat"), "ConfigMap": chat_template_name("chat")}

Right = tuple[str, str, str]
"""Group, resource (with its subresource), verb."""


@dataclass(frozen=True)
class Mode:
    """An overlay, where its operator lives, and whether that is the one namespace it serves."""

    overlay: str
    namespace: str
    alone: bool


MODES = [Mode("cluster-wide", "pagedserve-system", False), Mode("one-namespace", "models", True)]

ALL: JSON = {
    "model": {**MODEL, "chatTemplate": "{{ messages }}"},
    "gpu": {"type": "L4"},
    "autoscaling": {"minReplicas": 1, "maxReplicas": 2},
    "cache": {"newClaim": {"size": "1Gi"}},
    "auth": {"apiKeysSecretRef": {"name": "keys"}, "hfTokenSecretRef": {"name": "hub"}},
    "env": [{"name": "COLOUR", "valueFrom": {"configMapKeyRef": {"name": "colours", "key": "colour"}}}],
    "networkPolicy": {"enabled": True},
    "monitoring": {"serviceMonitor": True},
}
NOTHING: JSON = {
    "model": {**MODEL, "chatTemplate": None},
    "autoscaling": None,
    "replicas": 1,
    "cache": None,
    "networkPolicy": None,
    "monitoring": {"podMonitor": False, "serviceMonitor": False, "prometheusRule": False},
    "disruption": {"enabled": False},
}
KEPT = ("Deployment", "Service")


@pytest.fixture(params=MODES, ids=lambda mode: mode.overlay)
def mode(request: pytest.FixtureRequest, control_plane: Cluster) -> Iterator[Mode]:
    """Its rights installed, and nothing else of the overlay: the operator runs in the test."""
    chosen: Mode = request.param
    client = control_plane.client()
    install_crd(control_plane)
    install_monitoring(control_plane)
    client.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": chosen.namespace}})
    rights = [row for row in built(control_plane, chosen.overlay).values() if is_right(row)]
    for manifest in rights:
        client.apply(manifest)
    yield chosen
    for manifest in rights:
        metadata = manifest["metadata"]
        client.delete(manifest["apiVersion"], manifest["kind"], metadata["name"], namespace=metadata.get("namespace"))
    client.delete("v1", "Namespace", chosen.namespace)


def is_right(manifest: JSON) -> bool:
    return manifest["apiVersion"] == "rbac.authorization.k8s.io/v1"


def test_the_operator_may_do_exactly_what_it_does(control_plane: Cluster, fake_nodes: FakeNodes, mode: Mode) -> None:
    fake_nodes.add_gpu_node("l4-rbac", product="NVIDIA-L4")
    user = f"system:serviceaccount:{mode.namespace}:{ACCOUNT}"
    config = QUICK.derive(
        operator_namespace=mode.namespace,
        watch_namespace=mode.namespace if mode.alone else "",
        read_nodes=not mode.alone,
    )
    mark = control_plane.audit.mark()
    with OperatorThread(control_plane.kubeconfig_for(user), config):
        live_through_everything(World(control_plane.client(), mode.namespace))
    # Watches stand in the log only when they have ended.
    asked = [entry for entry in control_plane.audit.since(mark) if entry.user == user]
    # Nothing can be made in a namespace that is going, such as another test's: that is refused to everybody.
    assert not [entry for entry in asked if entry.code == 403 and entry.namespace in ("", mode.namespace)]
    needed = {right for entry in asked for right in rights_for(entry)}
    granted = set(rights_of(built(control_plane, mode.overlay)))
    assert needed - granted == set()
    assert granted - needed == set()


def test_secrets_are_read_by_name_and_never_written(control_plane: Cluster) -> None:
    for mode in MODES:
        verbs = {
            verb for group, resource, verb in rights_of(built(control_plane, mode.overlay)) if resource == "secrets"
        }
        assert verbs == {"get"}


def live_through_everything(world: World) -> None:
    """Every kind of child comes, changes by hand and goes, and whatever is referred to is read."""
    world.secret("keys", **{"api-keys": "one"})
    world.secret("hub", token="hf_abc")
    colours = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "colours", "namespace": world.namespace}}
    world.client.apply({**colours, "data": {"colour": "red"}})
    world.create("chat", **ALL)
    for kind in CHILDREN:
        world.wait_child(kind, CHILD_NAMES.get(kind, "chat"))
    world.wait("chat", "TuningResolved")
    service = world.child("Service", "chat")
    # Its number is a port's key: the Service is made anew.
    world.client.patch(service, [{"op": "replace", "path": "/spec/ports/0/port", "value": 81}], type="json")
    world.wait_child("Service", "chat", lambda found: found["spec"]["ports"][0]["port"] == 80, "has its port again")
    world.edit("chat", **NOTHING)
    for kind in set(CHILDREN) - set(KEPT):
        world.wait_gone(kind, CHILD_NAMES.get(kind, "chat"))
    world.wait_ready("chat")
    world.delete("chat")
    for kind in KEPT:
        world.wait_gone(kind, "chat")


def rights_for(entry: AuditEntry) -> Iterator[Right]:
    """What a request takes; an apply that makes an object takes leave to create it, too."""
    resource = f"{entry.resource}/{entry.subresource}" if entry.subresource else entry.resource
    yield entry.group, resource, entry.verb
    if entry.verb == "patch" and entry.code == 201:
        yield entry.group, resource, "create"


def rights_of(manifests: Manifests) -> Iterable[Right]:
    """What the roles say that are bound to the operator's account."""
    for (kind, _), binding in manifests.items():
        if kind not in ("ClusterRoleBinding", "RoleBinding"):
            continue
        assert [subject["name"] for subject in binding["subjects"]] == [ACCOUNT]
        role = manifests[binding["roleRef"]["kind"], binding["roleRef"]["name"]]
        for rule in role["rules"]:
            for group in rule["apiGroups"]:
                for resource in rule["resources"]:
                    yield from ((group, resource, verb) for verb in rule["verbs"])
