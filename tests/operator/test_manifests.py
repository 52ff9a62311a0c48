"""What `kubectl apply -k` and `kubectl apply -f` install: no more rights than needed, and gone without a trace."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from bundle import BUNDLE, files, render
from control_client import ApiError, Client
from control_cluster import Cluster
from controlplane import find_control_plane
from crd import JSON, ROOT, install
from pagedserve_operator.config import OperatorConfig, read_config
from pagedserve_operator.kinds import CHILDREN, KINDS
from pagedserve_operator.names import API_VERSION, KIND, LEASE_NAME, Key, Owner

MANIFESTS = ROOT / "manifests"
OVERLAYS = ("cluster-wide", "one-namespace", "monitoring")
ACCOUNT = "system:serviceaccount:pagedserve-system:pagedserve-operator"


def documents(text: str) -> list[JSON]:
    return [document for document in yaml.safe_load_all(text) if document]


def by_place(text: str) -> dict[tuple[str, str], JSON]:
    found = documents(text)
    # kubectl prints several objects as one list.
    rows = found[0]["items"] if found[0]["kind"] == "List" else found
    return {(row["kind"], row["metadata"]["name"]): row for row in rows}


def built(cluster: Cluster, overlay: str) -> dict[tuple[str, str], JSON]:
    """What kustomize makes of an overlay."""
    return by_place(cluster.kubectl("kustomize", str(MANIFESTS / "overlays" / overlay)).stdout)


def bundle() -> dict[tuple[str, str], JSON]:
    return by_place(BUNDLE.read_text(encoding="utf-8"))


def container(manifests: dict[tuple[str, str], JSON]) -> JSON:
    (found,) = manifests["Deployment", "pagedserve-operator"]["spec"]["template"]["spec"]["containers"]
    operator: JSON = found
    return operator


def environment(manifests: dict[tuple[str, str], JSON]) -> dict[str, Any]:
    return {row["name"]: row.get("value", row.get("valueFrom")) for row in container(manifests)["env"]}


def test_the_bundle_is_up_to_date() -> None:
    assert BUNDLE.read_text(encoding="utf-8") == render(), "run `make manifests` and commit what it writes"


def test_every_manifest_is_gathered_by_an_overlay() -> None:
    gathered = {*files(MANIFESTS / "overlays" / "cluster-wide"), *files(MANIFESTS / "components" / "monitoring")}
    folders = [MANIFESTS / name for name in ("base", "rbac", "components", "overlays")]
    written = {path for folder in folders for path in folder.rglob("*.yaml") if path.name != "kustomization.yaml"}
    assert written <= gathered


def test_the_operators_variables_are_settings_that_it_reads() -> None:
    given = environment(bundle())
    assert set(given) <= {field.name.upper() for field in dataclasses.fields(OperatorConfig)}
    read_config({name: value for name, value in given.items() if isinstance(value, str)})


def test_the_images_are_of_the_version_that_is_built() -> None:
    version = yaml_version(ROOT / "operator" / "pyproject.toml")
    assert container(bundle())["image"] == f"pagedserve/operator:{version}"
    assert environment(bundle())["ENGINE_IMAGE"] == OperatorConfig().engine_image


def yaml_version(file: Path) -> str:
    (line,) = [line for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("version = ")]
    return line.split('"')[1]


def test_the_operator_runs_without_privileges() -> None:
    pod = bundle()["Deployment", "pagedserve-operator"]["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"]
    assert container(bundle())["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def test_the_probes_ask_the_port_that_is_served() -> None:
    operator = container(bundle())
    (port,) = operator["ports"]
    assert port["containerPort"] == OperatorConfig().metrics_port
    asked = {probe: operator[probe]["httpGet"] for probe in ("livenessProbe", "readinessProbe")}
    assert {probe: (get["path"], get["port"]) for probe, get in asked.items()} == {
        "livenessProbe": ("/healthz", port["name"]),
        "readinessProbe": ("/readyz", port["name"]),
    }


def test_rights_name_every_kind_and_no_wildcard() -> None:
    rules = [rule for (kind, _), role in bundle().items() if kind in ("ClusterRole", "Role") for rule in role["rules"]]
    for rule in rules:
        assert "*" not in [*rule["apiGroups"], *rule["resources"], *rule["verbs"]]
    written = {(group, resource) for rule in rules for group in rule["apiGroups"] for resource in rule["resources"]}
    assert {(KINDS[kind].group, KINDS[kind].plural) for kind in KINDS} <= written


def test_the_lease_is_the_one_that_is_taken() -> None:
    named = [rule["resourceNames"] for rule in bundle()["Role", "pagedserve-operator-lease"]["rules"][1:]]
    assert named == [[LEASE_NAME]]


def test_the_bundle_is_what_kustomize_builds(control_plane: Cluster) -> None:
    assert built(control_plane, "cluster-wide") == bundle()


def test_one_namespace_needs_nothing_of_the_cluster(control_plane: Cluster) -> None:
    manifests = built(control_plane, "one-namespace")
    assert {document["metadata"].get("namespace") for document in manifests.values()} == {"models"}
    assert not {kind for kind, _ in manifests} & {"ClusterRole", "ClusterRoleBinding", "CustomResourceDefinition"}
    assert manifests["RoleBinding", "pagedserve-operator"]["roleRef"]["kind"] == "Role"
    assert environment(manifests)["WATCH_NAMESPACE"] == {"fieldRef": {"fieldPath": "metadata.namespace"}}
    assert environment(manifests)["READ_NODES"] == "false"


def test_monitoring_adds_to_the_cluster_wide_overlay(control_plane: Cluster) -> None:
    manifests, plain = built(control_plane, "monitoring"), built(control_plane, "cluster-wide")
    assert set(manifests) - set(plain) == {
        ("PodMonitor", "pagedserve-operator"),
        ("PrometheusRule", "pagedserve-operator"),
    }


@pytest.fixture(scope="module")
def own_cluster() -> Iterator[Cluster]:
    """A control plane that may lose its CRD and its namespaces."""
    found = find_control_plane()
    if not found.started_here:
        pytest.skip("it would take the CRD from your cluster: leave KUBECONFIG unset to run this test")
    with found:
        yield found


@pytest.fixture
def installed(control_plane: Cluster, own_cluster: Cluster) -> Cluster:
    """The cluster with the bundle applied, client-side as in its documentation's shortest form."""
    own_cluster.kubectl("apply", "-f", str(BUNDLE))
    install(own_cluster)
    return own_cluster


def resource(name: str) -> JSON:
    return {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "metadata": {"name": name, "namespace": "default"},
        "spec": {"model": {"uri": "hf://a/b"}, "replicas": 1},
    }


def served(client: Client, name: str) -> JSON:
    """A resource and a child of it, as the operator would have made them."""
    owner = client.create(resource(name))
    reference = Owner(Key("default", name), owner["metadata"]["uid"]).reference()
    metadata = {"name": name, "namespace": "default", "ownerReferences": [reference]}
    return client.create({"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata})


def test_the_operators_account_may_do_its_work_and_no_more(installed: Cluster) -> None:
    kubeconfig = installed.kubeconfig_for(ACCOUNT, ["system:serviceaccounts", "system:authenticated"])
    client = installed.client(kubeconfig)
    for kind in CHILDREN:
        if KINDS[kind].group != "monitoring.coreos.com":
            client.list(KINDS[kind].api_version, kind)
    client.list("v1", "Node")
    assert client.find("v1", "Secret", "missing", namespace="default") is None
    for refused in (
        lambda: client.list("v1", "Secret", namespace="default"),
        lambda: client.create(resource("by-the-operator")),
        lambda: client.delete("v1", "Pod", "any", namespace="default"),
        lambda: client.create(
            {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "a", "namespace": "default"}}
        ),
    ):
        with pytest.raises(ApiError, match="forbidden"):
            refused()


def test_applying_the_bundle_again_changes_nothing(installed: Cluster) -> None:
    def state() -> dict[tuple[str, str], JSON]:
        found = installed.kubectl("get", "-f", str(BUNDLE), "-o", "json").stdout
        return {place: {**document, "metadata": 0, "status": 0} for place, document in by_place(found).items()}

    before = state()
    installed.kubectl("apply", "-f", str(BUNDLE))
    assert len(before) == len(bundle())
    assert state() == before


def test_an_upgrade_keeps_resources_and_children(installed: Cluster) -> None:
    """A CRD with a field more and a new image touch no stored object."""
    client = installed.client()
    child = served(client, "upgraded")
    before = client.get(API_VERSION, KIND, "upgraded", namespace="default")
    newer = bundle()
    (schema,) = newer["CustomResourceDefinition", "inferenceservices.pagedserve.dev"]["spec"]["versions"]
    spec = schema["schema"]["openAPIV3Schema"]["properties"]["spec"]
    spec["properties"]["novel"] = {"type": "boolean", "description": "Of a later version."}
    container(newer)["image"] = "pagedserve/operator:0.2.0"
    installed.kubectl(
        "apply", "--server-side", "--force-conflicts", "-f", "-", stdin=yaml.safe_dump_all(newer.values())
    )
    client.wait(lambda: client.patch(before, {"spec": {"novel": True}})["spec"].get("novel"), "the new field is known")
    client.patch(before, {"spec": {"novel": None}})
    after = client.get(API_VERSION, KIND, "upgraded", namespace="default")
    assert (after["metadata"]["uid"], after["spec"]) == (before["metadata"]["uid"], before["spec"])
    assert client.get("v1", "ConfigMap", "upgraded", namespace="default") == child


def test_engines_outlive_the_operator(installed: Cluster) -> None:
    client = installed.client()
    child = served(client, "outliving")
    installed.kubectl("delete", "namespace", "pagedserve-system", "--wait=false")
    label = "app.kubernetes.io/part-of=pagedserve"
    installed.kubectl("delete", "clusterrole,clusterrolebinding", "-l", label)
    client.wait_gone("v1", "Namespace", "pagedserve-system")
    assert client.get("v1", "ConfigMap", "outliving", namespace="default") == child
    assert client.get(API_VERSION, KIND, "outliving", namespace="default")["spec"]["replicas"] == 1


def test_uninstalling_takes_resources_and_children(installed: Cluster) -> None:
    client = installed.client()
    served(client, "going")
    installed.kubectl("delete", "psvc", "--all", "--all-namespaces", "--timeout=60s")
    client.wait_gone("v1", "ConfigMap", "going", namespace="default")
    installed.kubectl("delete", "-f", str(BUNDLE), "--timeout=60s")
    left = installed.kubectl("get", "crd,clusterrole,clusterrolebinding", "-l", "app.kubernetes.io/part-of=pagedserve")
    assert left.stdout == ""


def test_deleting_the_crd_deletes_the_resources(installed: Cluster) -> None:
    """No finalizer of ours is in the way, operator or not."""
    client = installed.client()
    client.create(resource("without-crd"))
    installed.kubectl("delete", "crd", "inferenceservices.pagedserve.dev", "--timeout=60s")
    install(installed)
    assert client.list(API_VERSION, KIND) == []
