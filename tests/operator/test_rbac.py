"""The manifests' rights against a recorded life: what the operator asked for and what it may are the same."""

from __future__ import annotations

import base64
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product

import pytest

from control_audit import AuditEntry
from control_certificates import Authority
from control_cluster import Cluster
from fake_nodes import FakeNodes
from manifest_files import Manifests, built
from metrics_world import client_context
from monitoring_kinds import install_monitoring
from operator_world import JSON, MODEL, World, install_crd, running
from operators import QUICK, OperatorThread
from pagedserve_operator.kinds import CHILDREN, KEDA_AUTOSCALER, KINDS
from pagedserve_operator.metrics_api import MetricsApi
from pagedserve_operator.metrics_api.publishing import SECRET
from pagedserve_operator.metrics_api.registration import NAME
from pagedserve_operator.names import chat_template_name, claim_name

ACCOUNT = "pagedserve-operator"
BUILT_IN = "extension-apiserver-authentication-reader"
"""A Role of Kubernetes' own, to read one ConfigMap in kube-system."""
CHILD_NAMES = {"PersistentVolumeClaim": claim_name("chat"), "ConfigMap": chat_template_name("chat")}

Right = tuple[str, str, str, str]
"""Group, resource (with its subresource), verb, and the one object's name; no name: any."""


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
        metrics_api="auto",
        metrics_api_host="127.0.0.1",
        metrics_api_port=0,
    )
    mark = control_plane.audit.mark()
    world, kubeconfig = World(control_plane.client(), mode.namespace), control_plane.kubeconfig_for(user)
    with OperatorThread(kubeconfig, config) as thread:
        live_through_everything(world)
        if not mode.alone:
            serve_metrics(world, running(thread).metrics_api, control_plane.front_proxy)
    if not mode.alone:
        # Turned off, it takes its registration back.
        with OperatorThread(kubeconfig, config.derive(metrics_api="false")):
            world.client.wait_gone(KINDS["APIService"].api_version, "APIService", NAME)
    # Watches stand in the log only when they have ended.
    asked = [entry for entry in control_plane.audit.since(mark) if entry.user == user]
    # Nothing can be made in a namespace that is going, such as another test's: that is refused to everybody.
    assert not [entry for entry in asked if entry.code == 403 and entry.namespace in ("", mode.namespace)]
    granted = set(rights_of(built(control_plane, mode.overlay)))
    # A right to any object leaves none to the right to one.
    needed = {(*kind, "") if (*kind, "") in granted else (*kind, name) for *kind, name in rights_for(asked)}
    assert needed - granted == set()
    assert granted - needed == set()


def test_secrets_are_read_by_name_and_none_but_the_operators_own_is_written(control_plane: Cluster) -> None:
    for mode in MODES:
        roles = [row for row in built(control_plane, mode.overlay).values() if "rules" in row]
        rules = [rule for role in roles for rule in role["rules"] if "secrets" in rule["resources"]]
        written = [rule["resourceNames"] for rule in rules if set(rule["verbs"]) - {"get"}]
        assert written == ([] if mode.alone else [[SECRET]])


def serve_metrics(world: World, api: MetricsApi, front_proxy: Authority) -> None:
    """The certificate and the registration are made, and whoever asks for a metric is reviewed."""
    world.client.wait(lambda: api.port and api.identity, "the metrics API is served")
    service = world.client.wait(
        lambda: world.client.find(KINDS["APIService"].api_version, "APIService", NAME), "the metrics API is registered"
    )
    context = client_context(base64.b64decode(service["spec"]["caBundle"]), front_proxy.client())
    # Asked at its address, as no Service leads here.
    context.check_hostname = False
    place = f"/apis/custom.metrics.k8s.io/v1beta2/namespaces/{world.namespace}/pods/*/pagedserve_requests_waiting"

    def asked() -> bool:
        url = f"https://127.0.0.1:{api.port}{place}"
        asking = urllib.request.Request(url, headers={"X-Remote-User": "nobody-in-particular"})
        try:
            urllib.request.urlopen(asking, context=context, timeout=30).close()
        except urllib.error.HTTPError as refused:
            with refused:
                return refused.code == 403
        return False

    world.client.wait(asked, "a caller without rights is refused")


def live_through_everything(world: World) -> None:
    """Every kind of child comes, changes by hand and goes, and whatever is referred to is read."""
    world.secret("keys", **{"api-keys": "one"})
    world.secret("hub", token="hf_abc")
    colours = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "colours", "namespace": world.namespace}}
    world.client.apply({**colours, "data": {"colour": "red"}})
    world.create("chat", **ALL)
    for kind in set(CHILDREN) - {KEDA_AUTOSCALER}:
        world.wait_child(kind, CHILD_NAMES.get(kind, "chat"))
    world.wait("chat", "TuningResolved")
    world.edit("chat", autoscaling={"backend": "KEDA"})
    world.wait_child(KEDA_AUTOSCALER, "chat")
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


def rights_for(asked: Iterable[AuditEntry]) -> Iterator[Right]:
    """What requests take; an apply that makes an object takes leave to create it, too."""
    for entry in asked:
        resource = f"{entry.resource}/{entry.subresource}" if entry.subresource else entry.resource
        yield entry.group, resource, entry.verb, entry.name
        if entry.verb == "patch" and entry.code == 201:
            yield entry.group, resource, "create", entry.name


def rights_of(manifests: Manifests) -> Iterable[Right]:
    """What the roles say that are bound to the operator's account."""
    for (kind, _), binding in manifests.items():
        if kind not in ("ClusterRoleBinding", "RoleBinding"):
            continue
        assert [subject["name"] for subject in binding["subjects"]] == [ACCOUNT]
        if binding["roleRef"]["name"] == BUILT_IN:
            continue
        role = manifests[binding["roleRef"]["kind"], binding["roleRef"]["name"]]
        for rule in role["rules"]:
            parts = rule["apiGroups"], rule["resources"], rule["verbs"], rule.get("resourceNames", [""])
            yield from product(*parts)
