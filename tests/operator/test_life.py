"""A resource from its creation to its end, as the people see it who work with kubectl."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest

from control_cluster import Cluster
from fake_nodes import FakeNodes
from operator_world import World, condition_of, install_crd, refusal, settle
from operators import QUICK, OperatorThread
from pagedserve_operator.kinds import CHILDREN, OPTIONAL

CLAIM = {"newClaim": {"size": "1Gi", "accessMode": "ReadWriteMany"}}
TEMPLATED = {"uri": "hf://example/small-135M", "chatTemplate": "{{ messages }}"}


@pytest.fixture(scope="module")
def operator(control_plane: Cluster) -> Iterator[OperatorThread]:
    install_crd(control_plane)
    with OperatorThread(control_plane.kubeconfig, QUICK) as thread:
        yield thread


@pytest.fixture
def nodes(fake_nodes: FakeNodes) -> FakeNodes:
    fake_nodes.add_gpu_node("life-gpu", product="NVIDIA-L4", gpus=8)
    return fake_nodes


@pytest.fixture
def world(control_plane: Cluster, namespace: str, operator: OperatorThread, nodes: FakeNodes) -> World:
    return World(control_plane.client(), namespace)


def test_a_resource_gets_its_children_and_ready(control_plane: Cluster, world: World) -> None:
    control_plane.kubectl("apply", "-f=-", stdin=_minimal(world.namespace))
    wait = ["wait", "--for=condition=Ready", "psvc/chat", "--timeout=60s"]
    assert "condition met" in control_plane.kubectl("-n", world.namespace, *wait).stdout
    resource = world.wait_rolled("chat")
    assert _kinds(world, "chat") == {"Deployment", "Service", "PodDisruptionBudget"}
    status = resource["status"]
    assert (status["replicas"], status["readyReplicas"], status["tuning"]["gpu"]["product"]) == (1, 1, "NVIDIA-L4")
    assert status["url"] == f"http://chat.{world.namespace}.svc"
    container = world.child("Deployment", "chat")["spec"]["template"]["spec"]["containers"][0]
    environment = {row["name"]: row.get("value") for row in container["env"]}
    assert environment["NUM_BLOCKS"] == str(status["tuning"]["numBlocks"])
    assert environment["MAX_BATCH_TOKENS"] == str(status["tuning"]["maxBatchTokens"])


def test_get_shows_what_people_ask_first(control_plane: Cluster, world: World) -> None:
    world.create("chat", gpu={"type": "NVIDIA-L4"})
    world.create("lost", gpu={"type": "Voodoo-2"})
    blocks = world.wait_rolled("chat")["status"]["tuning"]["numBlocks"]
    world.wait("lost", "TuningResolved", "False")
    head, *rows = control_plane.kubectl("-n", world.namespace, "get", "psvc").stdout.splitlines()
    assert head.split() == ["NAME", "READY", "REASON", "REPLICAS", "GPU", "BLOCKS", "URL", "AGE"]
    served, unknown = (row.split() for row in rows)
    url = f"http://chat.{world.namespace}.svc"
    assert served[:-1] == ["chat", "True", "Available", "1", "NVIDIA-L4", str(blocks), url]
    assert unknown[:3] == ["lost", "False", "GPUUnknown"]


def test_the_resource_is_listed_with_all_and_with_llm(control_plane: Cluster, world: World) -> None:
    world.create("chat")
    for category in ("all", "llm"):
        listed = control_plane.kubectl("-n", world.namespace, "get", category, "-o=name").stdout
        assert "inferenceservice.pagedserve.dev/chat" in listed


def test_explain_reads_like_documentation(control_plane: Cluster, world: World) -> None:
    told = control_plane.kubectl("explain", "psvc.spec.tuning").stdout
    for field in ("numBlocks", "maxBatchTokens", "safetyMargin", "kvCacheDtype"):
        assert field in told
    assert "<no description>" not in control_plane.kubectl("explain", "psvc.spec", "--recursive=false").stdout


def test_scale_changes_the_replicas(control_plane: Cluster, world: World) -> None:
    world.create("chat", replicas=1)
    world.wait_rolled("chat")
    control_plane.kubectl("-n", world.namespace, "scale", "psvc/chat", "--replicas=3")
    world.wait_child("Deployment", "chat", lambda child: child["status"].get("readyReplicas") == 3, "has three pods")
    world.wait_rolled("chat")
    scale = world.client.request("GET", _scale_path(world, "chat"))
    assert scale["status"] == {"replicas": 3, "selector": _selector("chat")}


def test_scale_is_refused_under_autoscaling_with_what_to_do_instead(control_plane: Cluster, world: World) -> None:
    world.create("chat", autoscaling={"minReplicas": 1, "maxReplicas": 3})
    world.wait_ready("chat")
    done = control_plane.kubectl("-n", world.namespace, "scale", "psvc/chat", "--replicas=3", check=False)
    assert done.returncode != 0
    assert "autoscaling.minReplicas" in done.stderr
    assert world.replicas("chat") == 1


def test_deletion_leaves_nothing(control_plane: Cluster, world: World, operator: OperatorThread) -> None:
    _create_everything(world, "chat")
    world.wait_ready("chat")
    assert "finalizers" not in world.get("chat")["metadata"]
    delete = control_plane.kubectl("-n", world.namespace, "delete", "psvc/chat", "--timeout=20s")
    assert "deleted" in delete.stdout
    _wait_nothing_left(world, "chat")
    settle(operator, control_plane, world)


def test_a_resource_made_anew_under_its_old_name_gets_children_of_its_own(world: World) -> None:
    _create_everything(world, "chat")
    world.wait_ready("chat")
    old = world.child("Deployment", "chat")["metadata"]["uid"]
    world.delete("chat")
    world.wait_gone("InferenceService", "chat")
    _create_everything(world, "chat")
    world.wait_ready("chat")
    child = world.wait_child("Deployment", "chat", lambda child: child["metadata"]["uid"] != old, "is another")
    assert child["metadata"]["ownerReferences"][0]["uid"] == world.get("chat")["metadata"]["uid"]
    world.wait_rolled("chat")


def test_orphaned_children_are_taken_back(world: World) -> None:
    world.create("chat", replicas=2)
    world.wait_rolled("chat")
    pods = {pod["metadata"]["uid"] for pod in world.pods("chat")}
    api = ("pagedserve.dev/v1alpha1", "InferenceService", "chat")
    world.client.delete(*api, namespace=world.namespace, propagation="Orphan")
    world.client.wait_gone(*api, namespace=world.namespace)
    assert world.find("Deployment", "chat") is not None
    world.create("chat", replicas=2)
    world.wait_rolled("chat")
    assert {pod["metadata"]["uid"] for pod in world.pods("chat")} == pods
    world.delete("chat")
    _wait_nothing_left(world, "chat")


def test_events_tell_a_life_once(world: World, operator: OperatorThread, control_plane: Cluster) -> None:
    world.create("chat")
    world.wait_rolled("chat")
    settle(operator, control_plane, world)
    assert world.events("chat") == ["Available", "TuningResolved"]
    settle(operator, control_plane, world)
    assert world.events("chat") == ["Available", "TuningResolved"]


def test_a_deleted_namespace_leaves_the_operator_well(
    control_plane: Cluster, world: World, operator: OperatorThread
) -> None:
    doomed = World(world.client, f"doomed-{uuid.uuid4().hex[:8]}")
    space = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": doomed.namespace}}
    doomed.client.create(space)
    for index in range(5):
        _create_everything(doomed, f"chat-{index}")
    doomed.wait_child("Deployment", "chat-0")
    doomed.client.delete("v1", "Namespace", doomed.namespace)
    doomed.client.wait_gone("v1", "Namespace", doomed.namespace)
    world.create("after")
    world.wait_ready("after")
    settle(operator, control_plane, world)
    assert operator.failure is None


def test_the_newest_generation_is_what_the_status_speaks_of(world: World) -> None:
    world.create("chat")
    world.wait_ready("chat")
    generation = world.edit("chat", limits={"maxQueue": 7})["metadata"]["generation"]
    resource = world.wait_rolled("chat")
    assert resource["status"]["observedGeneration"] == generation
    assert condition_of(resource, "Ready")["observedGeneration"] == generation


def test_a_stale_status_written_by_somebody_is_put_right(
    world: World, operator: OperatorThread, control_plane: Cluster
) -> None:
    world.create("chat")
    resource = world.wait_rolled("chat")
    wrong = {"status": {"url": "http://elsewhere", "readyReplicas": 9, "conditions": []}}
    world.client.patch(resource, wrong, subresource="status", manager="somebody")
    world.wait_ready("chat")
    settle(operator, control_plane, world)
    assert world.get("chat")["status"]["url"] == resource["status"]["url"]
    assert world.get("chat")["status"]["readyReplicas"] == 1


def test_a_resource_without_a_model_is_refused_by_the_api_server(world: World) -> None:
    told = refusal(lambda: world.create("chat", model={}))
    assert "spec.model.uri" in told


def _create_everything(world: World, name: str) -> None:
    world.create(
        name,
        model=TEMPLATED,
        cache=CLAIM,
        autoscaling={"minReplicas": 1, "maxReplicas": 2},
        networkPolicy={"enabled": True},
    )
    # Nobody provisions volumes here; a claim that is pending holds the pods back, so it is bound by hand.
    volume = {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": f"{name}-{uuid.uuid4().hex[:8]}"},
        "spec": {
            "capacity": {"storage": "1Gi"},
            "accessModes": ["ReadWriteMany"],
            "hostPath": {"path": "/tmp"},
            "persistentVolumeReclaimPolicy": "Delete",
            "claimRef": {"namespace": world.namespace, "name": f"{name}-model-cache"},
        },
    }
    world.client.create(volume)


def _kinds(world: World, name: str) -> set[str]:
    names = {"PersistentVolumeClaim": f"{name}-model-cache", "ConfigMap": f"{name}-chat-template"}
    core = [kind for kind in CHILDREN if kind not in OPTIONAL]
    return {kind for kind in core if world.find(kind, names.get(kind, name)) is not None}


def _wait_nothing_left(world: World, name: str) -> None:
    world.client.wait(lambda: not _kinds(world, name), "no child is left")
    world.client.wait(lambda: not world.pods(name) and not world.replicasets(name), "no pod is left")
    world.wait_gone("InferenceService", name)


def _minimal(namespace: str) -> str:
    return f"""
apiVersion: pagedserve.dev/v1alpha1
kind: InferenceService
metadata: {{name: chat, namespace: {namespace}}}
spec:
  model: {{uri: hf://example/small-135M}}
"""


def _selector(name: str) -> str:
    return f"app.kubernetes.io/instance={name},app.kubernetes.io/name=pagedserve-engine"


def _scale_path(world: World, name: str) -> str:
    return world.client.path("pagedserve.dev/v1alpha1", "InferenceService", name, "scale", namespace=world.namespace)
