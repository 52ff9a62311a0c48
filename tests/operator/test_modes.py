"""Operators of their own for a test: paused resources, one namespace without a ClusterRole, restarts and upgrades."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from control_cluster import Cluster
from fake_nodes import FakeNodes
from operator_world import ARCHITECTURE, MODEL, World, condition_of, install_crd, look_at_everything, own_writes, settle
from operators import QUICK, OperatorThread
from pagedserve_operator.config import OperatorConfig

ROLES = Path(__file__).parents[2] / "manifests"


@pytest.fixture
def world(control_plane: Cluster, namespace: str) -> World:
    install_crd(control_plane)
    return World(control_plane.client(), namespace)


@contextmanager
def an_operator(control_plane: Cluster, world: World, **settings: Any) -> Iterator[OperatorThread]:
    """An operator of this namespace alone, as the administrator, who may read nodes."""
    with OperatorThread(control_plane.kubeconfig, _config(world, **settings)) as thread:
        yield thread


def test_a_suspended_resource_is_left_exactly_as_it_is(
    control_plane: Cluster, world: World, fake_nodes: FakeNodes
) -> None:
    fake_nodes.add_node("suspended")
    with an_operator(control_plane, world) as thread:
        world.create("chat", replicas=1)
        world.wait_rolled("chat")
        world.edit("chat", suspend=True)
        world.wait("chat", "Progressing", "False", reason="Suspended")
        by_hand = {"spec": {"template": {"spec": {"terminationGracePeriodSeconds": 99}}, "replicas": 2}}
        world.client.patch(world.child("Deployment", "chat"), by_hand, manager="somebody")
        world.client.delete("v1", "Service", "chat", namespace=world.namespace)
        world.edit("chat", limits={"maxQueue": 5}, service={"port": 8000})
        settle(thread, control_plane, world)
        edited = world.child("Deployment", "chat")
        template = edited["spec"]["template"]["spec"]
        assert (edited["spec"]["replicas"], template["terminationGracePeriodSeconds"]) == (2, 99)
        assert {row["name"] for row in template["containers"][0]["env"]}.isdisjoint({"MAX_QUEUE"})
        assert world.find("Service", "chat") is None
        assert condition_of(world.get("chat"), "Ready")["status"] == "True"
        world.edit("chat", suspend=False)
        world.wait_rolled("chat")
        mended = world.child("Deployment", "chat")
        assert (mended["spec"]["replicas"], world.child("Service", "chat")["spec"]["ports"][0]["port"]) == (1, 8000)
        assert mended["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] != 99
    told = world.events("chat")
    assert (told.count("Suspended"), told.count("Resumed")) == (1, 1)


def test_a_resource_that_is_born_suspended_gets_nothing_before_it_is_resumed(
    control_plane: Cluster, world: World, fake_nodes: FakeNodes
) -> None:
    fake_nodes.add_node("born")
    with an_operator(control_plane, world) as thread:
        world.create("chat", suspend=True)
        told = world.wait("chat", "Ready", "False", reason="Suspended")
        assert "spec.suspend" in condition_of(told, "Ready")["message"]
        settle(thread, control_plane, world)
        assert world.find("Deployment", "chat") is None
        world.edit("chat", suspend=False)
        world.wait_rolled("chat")


def test_one_namespace_needs_no_cluster_role(control_plane: Cluster, world: World, fake_nodes: FakeNodes) -> None:
    fake_nodes.add_gpu_node("alone", gpus=4)
    kubeconfig = _as_service_account(control_plane, world)
    elsewhere = World(world.client, f"other-{uuid.uuid4().hex[:8]}")
    world.client.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": elsewhere.namespace}})
    elsewhere.create("foreign")
    with OperatorThread(kubeconfig, _config(world, read_nodes=False)) as thread:
        world.secret("keys", **{"api-keys": "one"})
        world.create("chat", gpu={"type": "NVIDIA-L4"}, auth={"apiKeysSecretRef": {"name": "keys"}})
        world.create("scaled", autoscaling={"minReplicas": 1, "maxReplicas": 2}, networkPolicy={"enabled": True})
        world.create("lost", gpu={"type": "auto"})
        world.wait_rolled("chat")
        world.wait_rolled("scaled")
        told = world.wait("lost", "TuningResolved", "False", reason="GPUTypeRequired")
        assert "spec.gpu.type" in condition_of(told, "TuningResolved")["message"]
        # Nobody sees a free GPU here, so nothing surges.
        world.edit("chat", limits={"maxQueue": 5})
        world.wait_rolled("chat")
        strategy = world.child("Deployment", "chat")["spec"]["strategy"]
        assert strategy["rollingUpdate"] == {"maxSurge": 0, "maxUnavailable": 1}
        world.edit("scaled", autoscaling=None)
        world.wait_gone("HorizontalPodAutoscaler", "scaled")
        assert world.events("chat").count("TuningResolved") == 1
        assert "status" not in elsewhere.get("foreign")
        assert thread.failure is None
    world.client.delete("v1", "Namespace", elsewhere.namespace)


def test_nodes_that_come_later_heal_what_waited_for_them(
    control_plane: Cluster, world: World, fake_nodes: FakeNodes
) -> None:
    with an_operator(control_plane, world):
        world.create("chat", gpu={"type": "auto"})
        told = world.wait("chat", "TuningResolved", "False", reason="GPUTypeRequired")
        assert "spec.gpu.type" in condition_of(told, "TuningResolved")["message"]
        assert world.find("Deployment", "chat") is None
        fake_nodes.add_gpu_node("late", product="NVIDIA-A10G", gpus=1, memory_mib=23028)
        assert world.wait_rolled("chat")["status"]["tuning"]["gpu"]["product"] == "NVIDIA-A10G"


@pytest.mark.parametrize("propagation", ["Background", "Foreground"])
def test_deletion_needs_no_operator(
    control_plane: Cluster, world: World, fake_nodes: FakeNodes, propagation: str
) -> None:
    fake_nodes.add_node("deletion")
    with an_operator(control_plane, world):
        world.create("chat", autoscaling={}, networkPolicy={"enabled": True})
        world.wait_rolled("chat")
    api = ("pagedserve.dev/v1alpha1", "InferenceService", "chat")
    world.client.delete(*api, namespace=world.namespace, propagation=propagation)
    world.client.wait_gone(*api, namespace=world.namespace)
    for kind in ("Deployment", "Service", "HorizontalPodAutoscaler", "PodDisruptionBudget", "NetworkPolicy"):
        world.wait_gone(kind, "chat")
    world.client.wait(lambda: not world.pods("chat"), "no pod is left")


def test_the_autoscalers_count_survives_a_restart_of_the_operator(
    control_plane: Cluster, world: World, fake_nodes: FakeNodes
) -> None:
    fake_nodes.add_node("restarted")
    with an_operator(control_plane, world):
        world.create("chat", autoscaling={"minReplicas": 2, "maxReplicas": 10})
        world.wait_rolled("chat")
    begin = world.child("Deployment", "chat")
    control_plane.kubectl("-n", world.namespace, "scale", "deployment/chat", "--replicas=6")
    with an_operator(control_plane, world) as again:
        settle(again, control_plane, world)
    counts = [child["spec"]["replicas"] for child in world.history(begin)]
    assert set(counts[counts.index(6) :]) == {6}


def test_a_new_operator_rolls_no_running_pod(
    control_plane: Cluster, world: World, fake_nodes: FakeNodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_nodes.add_gpu_node("upgraded", gpus=2)
    with an_operator(control_plane, world, engine_image="example/engine:1"):
        world.create("chat", gpu={"type": "NVIDIA-L4"})
        world.wait_rolled("chat")
    before = world.child("Deployment", "chat")
    # The new one's table doesn't even know the card any more, and it would size everything otherwise.
    monkeypatch.setattr("pagedserve_operator.tuner.resolve", _never)
    monkeypatch.setattr("pagedserve_operator.tuner.decide", _never)
    with an_operator(control_plane, world, engine_image="example/engine:2") as thread:
        settle(thread, control_plane, world)
        after = world.child("Deployment", "chat")
        assert after["metadata"]["generation"] == before["metadata"]["generation"]
        assert after["spec"] == before["spec"]
        assert len(world.replicasets("chat")) == 1
        monkeypatch.undo()
        # What the user changes decides anew, and takes the new default along.
        world.edit("chat", tuning={"numBlocks": 512})
        assert world.wait_rolled("chat")["status"]["image"] == "example/engine:2"
    pod = world.child("Deployment", "chat")["spec"]["template"]["spec"]
    assert pod["containers"][0]["image"] == "example/engine:2"


BIG = {**MODEL, "architecture": {**ARCHITECTURE, "parameters": 70_000_000_000}}
BAD: dict[str, tuple[dict[str, Any], str, tuple[str, ...]]] = {
    "unknown-gpu": ({"gpu": {"type": "Voodoo-2"}}, "GPUUnknown", ("spec.gpu.type", "Voodoo-2", "memoryMiB")),
    "too-long": ({"model": {**MODEL, "maxModelLen": 16_000_000}}, "InvalidSpec", ("spec.model.maxModelLen", "8192")),
    "too-big": ({"model": BIG, "gpu": {"type": "NVIDIA-L4"}}, "ModelDoesNotFit", ("GiB short", "spec.gpu.count")),
    "scheme": ({"model": {**MODEL, "uri": "s3://bucket/model"}}, "UnsupportedModelURI", ("spec.model.uri", "hf://")),
    "reserved": ({"env": [{"name": "NUM_BLOCKS", "value": "1"}]}, "InvalidSpec", ("env", "spec.tuning.numBlocks")),
    "secret": ({"auth": {"hfTokenSecretRef": {"name": "none"}}}, "SecretNotFound", ("hfTokenSecretRef", "'none'")),
}


def test_bad_input_is_told_once_with_its_field_and_cure(
    control_plane: Cluster, world: World, caplog: pytest.LogCaptureFixture
) -> None:
    refused = {}
    with an_operator(control_plane, world) as thread:
        for name, (spec, _, _) in BAD.items():
            try:
                world.create(name, **spec)
            except Exception as error:
                refused[name] = str(error)
        for name, (_, reason, words) in BAD.items():
            if name in refused:
                assert all(word in refused[name] for word in words), refused[name]
                continue
            told = world.wait(name, "Ready", "False", reason=reason)
            message = condition_of(told, "Ready")["message"]
            assert all(word in message for word in words), message
            assert "status" not in told["status"].get("tuning", {})
        settle(thread, control_plane, world)
        mark = control_plane.audit.mark()
        look_at_everything(thread, world.client, times=5)
        assert own_writes(control_plane, world, mark) == []
        for name in BAD:
            for kind in ("Deployment", "Service", "PodDisruptionBudget"):
                assert world.find(kind, name) is None, f"{name} has a half-made {kind}"
            if name not in refused:
                told = world.events(name)
                assert told == sorted(set(told)), told
    assert not [record for record in caplog.records if record.exc_info]


def test_a_name_that_is_taken_is_told_and_nothing_of_the_owner_is_touched(
    control_plane: Cluster, world: World, fake_nodes: FakeNodes
) -> None:
    fake_nodes.add_node("taken")
    theirs = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "chat", "namespace": world.namespace},
        "spec": {"ports": [{"port": 1}], "selector": {"app": "theirs"}},
    }
    before = world.client.create(theirs)
    with an_operator(control_plane, world) as thread:
        world.create("chat")
        told = world.wait("chat", "Degraded", reason="NameTaken")
        assert "Service chat" in condition_of(told, "Degraded")["message"]
        settle(thread, control_plane, world)
        assert world.child("Service", "chat") == before
        assert world.find("Deployment", "chat") is None
        world.client.delete("v1", "Service", "chat", namespace=world.namespace)
        look_at_everything(thread, world.client)
        world.wait_rolled("chat")


def test_pods_over_quota_and_children_over_quota_are_told(
    control_plane: Cluster, world: World, fake_nodes: FakeNodes
) -> None:
    fake_nodes.add_node("quota")
    _quota(world, "services", **{"count/services": "0"})
    with an_operator(control_plane, world) as thread:
        world.create("chat")
        told = world.wait("chat", "Degraded", reason="ChildRejected")
        assert "quota" in condition_of(told, "Degraded")["message"]
        world.wait("chat", "Ready")
        look_at_everything(thread, world.client)
        settled = control_plane.audit.mark()
        look_at_everything(thread, world.client, times=3)
        # A look tries again what was refused, and nothing else; on its own it looks again after a minute.
        assert set(own_writes(control_plane, world, settled)) == {f"patch {world.namespace}/services/chat  403"}
        world.client.delete("v1", "ResourceQuota", "services", namespace=world.namespace)

        def mended() -> bool:
            look_at_everything(thread, world.client)
            return world.find("Service", "chat") is not None

        world.client.wait(mended, "the Service is made")
        world.wait_rolled("chat")
        _quota(world, "pods", pods="1")
        world.edit("chat", replicas=2)
        told = world.wait("chat", "Degraded", reason="PodsRejected")
        assert "quota" in condition_of(told, "Degraded")["message"]
        assert condition_of(told, "Ready")["status"] == "True"


def _config(world: World, **settings: Any) -> OperatorConfig:
    return QUICK.derive(watch_namespace=world.namespace, operator_namespace=world.namespace, **settings)


def _never(*_: object, **__: object) -> None:
    raise AssertionError("nothing is decided again")


def _quota(world: World, name: str, **hard: str) -> None:
    metadata = {"name": name, "namespace": world.namespace}
    world.client.create({"apiVersion": "v1", "kind": "ResourceQuota", "metadata": metadata, "spec": {"hard": hard}})

    def counted() -> bool:
        found = world.client.get("v1", "ResourceQuota", name, namespace=world.namespace)
        return found.get("status", {}).get("hard") == hard

    world.client.wait(counted, "the quota is counted")


def _as_service_account(control_plane: Cluster, world: World) -> Path:
    """A user with the rights of the one-namespace overlay: the Role of manifests/, and no ClusterRole."""
    rules = next(
        document["rules"]
        for document in yaml.safe_load_all((ROLES / "rbac/role.yaml").read_text())
        if document["kind"] == "ClusterRole"
    )
    rules = [
        *rules,
        {"apiGroups": ["coordination.k8s.io"], "resources": ["leases"], "verbs": ["get", "create", "update"]},
    ]
    group, namespace = "rbac.authorization.k8s.io", world.namespace
    metadata = {"name": "operator", "namespace": namespace}
    world.client.create({"apiVersion": f"{group}/v1", "kind": "Role", "metadata": metadata, "rules": rules})
    subject = {"kind": "ServiceAccount", "name": "operator", "namespace": namespace}
    reference = {"apiGroup": group, "kind": "Role", "name": "operator"}
    binding = {"apiVersion": f"{group}/v1", "kind": "RoleBinding", "metadata": metadata}
    world.client.create({**binding, "roleRef": reference, "subjects": [subject]})
    return control_plane.kubeconfig_for(f"system:serviceaccount:{namespace}:operator")
