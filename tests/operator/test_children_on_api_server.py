from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import yaml

from children import cpu_tuning, gpu_tuning, resource
from control_client import ApiError
from control_cluster import Cluster
from live_children import LiveServer, Pointer, edit, edits, leaves, read
from pagedserve_operator.desired import Facts, child_keys, desired
from pagedserve_operator.kinds import AUTOSCALER, CHILDREN, KEDA_AUTOSCALER, KINDS, OPTIONAL
from pagedserve_operator.parsing import parse
from pagedserve_operator.plan import Apply, ChildKey, Plan, plan
from pagedserve_operator.spec import InferenceService, Json
from pagedserve_operator.tuning import Tuning

ROOT = Path(__file__).parents[2]
KEYS = child_keys("chat")
HUB = {"uri": "hf://example/model-8b"}

EVERYTHING: Json = {
    "model": {
        **HUB,
        "revision": "main",
        "servedName": "chat",
        "maxModelLen": 4096,
        "chatTemplate": "{{ messages }}\n",
    },
    "gpu": {
        "type": "NVIDIA-L4",
        "count": 2,
        "nodeSelector": {"pool": "gpu"},
        "tolerations": [{"key": "gpu", "operator": "Equal", "value": "yes", "effect": "NoSchedule"}],
    },
    "autoscaling": {
        "minReplicas": 1,
        "maxReplicas": 4,
        "metrics": [
            {"name": "cpu", "averageUtilization": 65},
            {"name": "queueWaitSeconds", "averageValue": "1.5"},
            {"name": "cacheUse", "averageValue": "0.75"},
        ],
        "behavior": {"scaleDown": {"stabilizationWindowSeconds": 600}},
    },
    "cache": {"newClaim": {"size": "1024Mi", "storageClassName": "shared", "accessMode": "ReadWriteMany"}},
    "auth": {"apiKeysSecretRef": {"name": "keys"}, "hfTokenSecretRef": {"name": "hub", "key": "value"}},
    "image": {"pullPolicy": "IfNotPresent", "pullSecrets": ["registry"]},
    "resources": {"requests": {"cpu": "0.5", "memory": "1.5Gi"}, "limits": {"cpu": "4000m", "memory": "2048Mi"}},
    "env": [
        {"name": "LOG_LEVEL", "value": "debug"},
        {"name": "EMPTY", "value": ""},
        {"name": "PASSWORD", "valueFrom": {"secretKeyRef": {"name": "other", "key": "password", "optional": False}}},
    ],
    "podTemplate": {
        "labels": {"team": "a"},
        "annotations": {"note": "b"},
        "volumes": [
            {"name": "scratch", "emptyDir": {"sizeLimit": "1024Mi"}},
            {"name": "settings", "configMap": {"name": "settings", "optional": True}},
        ],
        "volumeMounts": [{"name": "scratch", "mountPath": "/scratch", "readOnly": False}],
        "sidecars": [
            {
                "name": "proxy",
                "image": "example/proxy:1",
                "args": ["--port", "9000"],
                "env": [{"name": "A", "value": "1"}],
                "resources": {"requests": {"cpu": "0.1"}},
                "volumeMounts": [{"name": "settings", "mountPath": "/settings", "readOnly": True}],
            }
        ],
        "serviceAccountName": "default",
        "runtimeClassName": "nvidia",
        "topologySpread": [{"topologyKey": "topology.kubernetes.io/zone", "whenUnsatisfiable": "ScheduleAnyway"}],
    },
    "service": {"type": "NodePort", "port": 8000, "annotations": {"a": "b"}},
    "networkPolicy": {
        "enabled": True,
        "allowFrom": [
            {"namespaceSelector": {"matchLabels": {"team": "a"}}, "podSelector": {}},
            {"ipBlock": {"cidr": "10.0.0.0/8"}},
        ],
    },
    "monitoring": {"serviceMonitor": True, "interval": "15s", "labels": {"release": "prometheus"}},
}
BY_KEDA: Json = {**EVERYTHING, "autoscaling": {**EVERYTHING["autoscaling"], "backend": "KEDA"}}
SPECS: dict[str, Json] = {
    "nothing but a model": {"model": HUB},
    "everything": EVERYTHING,
    "everything, scaled by KEDA": BY_KEDA,
    "on a CPU": {"model": HUB, "gpu": {"type": "cpu"}, "replicas": 2},
    "autoscaled by default": {"model": HUB, "autoscaling": {}},
    "a fixed count": {"model": HUB, "replicas": 3, "disruption": {"enabled": False}},
    "a model on a claim": {"model": {"uri": "pvc://weights/models/llama"}, "cache": {"existingClaim": "hub"}},
    "all pods at once": {"model": HUB, "rollout": {"strategy": "Recreate"}},
    "no pre-stop": {"model": HUB, "lifecycle": {"preStopSeconds": 0, "drainSeconds": 0, "startupTimeoutSeconds": 37}},
    "a load balancer": {"model": HUB, "service": {"type": "LoadBalancer"}, "networkPolicy": {"enabled": True}},
    "a bounded cache": {"model": HUB, "cache": {"emptyDir": {"sizeLimit": "0.5Gi"}}, "limits": {"maxQueue": 5}},
}


@pytest.fixture(scope="module")
def kinds(control_plane: Cluster) -> None:
    """The custom kinds: the resource's own, which the garbage collector must know, and those of others' operators."""
    client = control_plane.client()
    files = (ROOT / "crds/inferenceservices.yaml", ROOT / "tests/golden/operator/monitoring_crds.yaml")
    for document in (document for file in files for document in yaml.safe_load_all(file.read_text())):
        client.apply(document)
    for kind in ("InferenceService", *sorted(OPTIONAL)):
        served = KINDS[kind]
        client.wait(
            lambda served=served: client.request("GET", f"/apis/{served.api_version}/{served.plural}"),
            f"{kind} is served",
        )


@pytest.fixture
def server(control_plane: Cluster, namespace: str, kinds: None) -> LiveServer:
    return LiveServer(control_plane.client(), namespace)


def created(server: LiveServer, spec: Json) -> InferenceService:
    """The resource as the API server returns it: with its defaults and the UID that keeps its children alive."""
    raw = resource(spec, namespace=server.namespace)
    del raw["metadata"]["uid"], raw["metadata"]["generation"]
    return parse(server.client.create(raw))


def changed(server: LiveServer, owner: InferenceService, spec: Json) -> InferenceService:
    raw = server.client.get("pagedserve.dev/v1alpha1", "InferenceService", "chat", namespace=server.namespace)
    return parse(server.client.replace({**raw, "spec": spec}))


def tuning_of(owner: InferenceService) -> Tuning:
    return cpu_tuning() if owner.spec.gpu.type == "cpu" else gpu_tuning(count=owner.spec.gpu.count)


def surge_of(owner: InferenceService) -> int | None:
    return None if owner.spec.strategy == "Recreate" else 0


def manifests(owner: InferenceService) -> tuple[Json, ...]:
    facts = Facts(
        surge=surge_of(owner),
        served_kinds=OPTIONAL,
        secrets_hash="0123",
        prometheus_url="http://prometheus.monitoring.svc:9090",
        metrics_reader="pagedserve-system",
    )
    return desired(owner, tuning_of(owner), facts)


def planned(server: LiveServer, owner: InferenceService) -> Plan:
    return plan(owner, manifests(owner), server.observe(KEYS))


def settle(server: LiveServer, owner: InferenceService) -> None:
    """Plan and execute until nothing is left to do; controllers write too, so a conflict means another look."""

    def settled() -> bool:
        following = planned(server, owner)
        if not following.empty:
            server.execute(following)
        return following.empty and not following.waiting

    server.client.wait(settled, "nothing is left to do", seconds=20)


@pytest.mark.parametrize("name", SPECS)
def test_children_are_accepted_and_a_second_plan_is_empty(server: LiveServer, name: str):
    owner = created(server, SPECS[name])
    first = planned(server, owner)
    server.execute(first)
    again = planned(server, owner)
    assert again.empty, again.summary
    settled = {key: found and found["metadata"]["uid"] for key, found in server.observe(KEYS).items()}
    assert {key for key, uid in settled.items() if uid} == {apply.key for apply in first.applies}


def test_every_spec_can_become_every_other(server: LiveServer):
    owner = created(server, SPECS["nothing but a model"])
    for spec in SPECS.values():
        owner = changed(server, owner, spec)
        settle(server, owner)
        for key in {(child["kind"], child["metadata"]["name"]) for child in manifests(owner)}:
            assert server.find(key) is not None


@pytest.mark.parametrize("kind", CHILDREN)
def test_every_field_that_is_edited_by_hand_is_put_back(server: LiveServer, kind: str):
    owner = created(server, BY_KEDA if kind == KEDA_AUTOSCALER else EVERYTHING)
    settle(server, owner)
    key = next(key for key in KEYS if key[0] == kind)
    manifest = next(child for child in manifests(owner) if child["kind"] == kind)
    edited: set[Pointer] = set()
    if kind == "Deployment":
        # A field of another's, which survives: or each edit would be rolled out.
        server.client.patch(server.get(key), {"spec": {"paused": True}})
    for at in distinct(leaves(manifest, server.get(key))):
        for patch in edits(server.get(key), at):
            before = server.get(key)
            if patch[0]["op"] == "replace" and at in edited:
                continue
            if edit(server, before, patch) is not None:
                assert put_back(server, owner, key), patch
                assert read(server.get(key), at) == read(before, at)
                edited.add(at)
    assert len(edited) >= 5


def test_what_others_add_survives(server: LiveServer):
    owner = created(server, EVERYTHING)
    settle(server, owner)
    key = ("Deployment", "chat")
    for path, value in {
        "/metadata/annotations/who": "me",
        "/metadata/labels/who": "me",
        "/spec/template/metadata/annotations/kubectl.kubernetes.io~1restartedAt": "2026-01-01T00:00:00Z",
        "/spec/template/spec/containers/0/env/-": {"name": "THEIRS", "value": "1"},
        "/spec/template/spec/containers/-": {"name": "injected", "image": "example/mesh:1"},
        "/spec/minReadySeconds": 3,
    }.items():
        server.client.patch(server.get(key), [{"op": "add", "path": path, "value": value}], type="json")
        assert planned(server, owner).empty, path
    owner = changed(server, owner, {**EVERYTHING, "limits": {"maxQueue": 9}})
    settle(server, owner)
    found = server.get(key)
    pods = found["spec"]["template"]
    assert found["metadata"]["annotations"]["who"] == found["metadata"]["labels"]["who"] == "me"
    assert "kubectl.kubernetes.io/restartedAt" in pods["metadata"]["annotations"]
    assert [container["name"] for container in pods["spec"]["containers"]] == ["engine", "injected"]
    names = {row["name"] for row in pods["spec"]["containers"][0]["env"]}
    assert {"THEIRS", "MAX_QUEUE"} <= names
    assert found["spec"]["minReadySeconds"] == 3


def test_an_apply_that_was_planned_on_absence_overwrites_nothing(server: LiveServer):
    owner = created(server, EVERYTHING)
    first = planned(server, owner)
    settle(server, owner)
    made = [apply for apply in first.applies if not apply.follows]
    assert {apply.key for apply in made} == set(KEYS) - {(KEDA_AUTOSCALER, "chat")}
    for apply in made:
        server.client.patch(server.get(apply.key), {"metadata": {"labels": {"app.kubernetes.io/name": "x"}}})
    answers = {apply.key[0]: answer_to(server, apply) for apply in made}
    assert answers == dict.fromkeys(set(CHILDREN) - {KEDA_AUTOSCALER}, 409)
    settle(server, owner)


def test_no_two_autoscalers_ever_hold_the_same_deployment(server: LiveServer):
    owner = created(server, EVERYTHING)
    settle(server, owner)
    for spec, old, new in ((BY_KEDA, AUTOSCALER, KEDA_AUTOSCALER), (EVERYTHING, KEDA_AUTOSCALER, AUTOSCALER)):
        owner = changed(server, owner, spec)
        first = planned(server, owner)
        assert [delete.kind for delete in first.deletes] == [old]
        assert new not in {apply.key[0] for apply in first.applies}
        assert first.waiting == (f"{old} chat",)
        settle(server, owner)
        assert (server.find((old, "chat")), server.find((new, "chat")) is not None) == (None, True)


def answer_to(server: LiveServer, apply: Apply) -> int:
    try:
        server.execute(Plan(applies=(apply,)), on_absence=True)
    except ApiError as error:
        return error.code
    return 200


@pytest.mark.parametrize(
    ("kind", "at"),
    [
        ("Service", ("spec", "ports", 0, "port")),
        ("Deployment", ("spec", "template", "spec", "containers", 0, "env", 0, "name")),
        ("Deployment", ("spec", "template", "spec", "containers", 0, "volumeMounts", 1, "mountPath")),
        ("Deployment", ("spec", "template", "spec", "containers", 0, "ports", 0, "containerPort")),
        ("Deployment", ("spec", "template", "spec", "containers", 0, "name")),
        ("Deployment", ("spec", "template", "spec", "initContainers", 0, "name")),
        ("PrometheusRule", ("spec", "groups", 0, "name")),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(str(step) for step in value[-3:]),
)
def test_an_item_whose_key_is_edited_by_hand_comes_back(server: LiveServer, kind: str, at: Pointer):
    # The item under its new key is somebody else's from then on, and stays where the API server lets both stand.
    owner = created(server, EVERYTHING)
    settle(server, owner)
    key = next(key for key in KEYS if key[0] == kind)
    before = server.get(key)
    patch = next(patch for patch in edits(before, at) if edit(server, server.get(key), patch) is not None)
    assert put_back(server, owner, key), patch
    rows = read(server.get(key), at[:-2])
    assert read(before, at) in [row[at[-1]] for row in rows]


def distinct(pointers: Iterable[Pointer]) -> Iterator[Pointer]:
    """One of those that differ only in the index of a list's item, without an object's place and the keys of items."""
    seen = set()
    for at in pointers:
        pattern = tuple(step for step in at if isinstance(step, str))
        is_key = len(at) > 1 and isinstance(at[-2], int) and at[-1] in _KEYS
        if pattern not in seen and pattern not in _FIXED and not is_key:
            seen.add(pattern)
            yield at


_FIXED = (("apiVersion",), ("kind",), ("metadata", "name"), ("metadata", "namespace"))
_KEYS = ("name", "uid", "mountPath", "containerPort", "port", "protocol", "topologyKey", "whenUnsatisfiable")


def put_back(server: LiveServer, owner: InferenceService, key: ChildKey) -> bool:
    """Whether looks at this child alone have seen an edit and now see none."""

    def settled() -> bool:
        nonlocal looks
        found = plan(owner, manifests(owner), server.observe((key,)))
        mine = Plan(
            deletes=tuple(delete for delete in found.deletes if (delete.kind, delete.name) == key),
            applies=tuple(apply for apply in found.applies if apply.key == key),
        )
        server.execute(mine)
        looks += 1
        return mine.empty

    looks = 0
    server.client.wait(settled, "the edit is put back", seconds=20)
    return looks > 1
