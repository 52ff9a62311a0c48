"""The chart through the real helm: against what kustomize builds, object by object, and what its values do."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

import helm_settings
from helm_program import Helm, find_helm, find_kubectl
from helm_templates import CHART
from manifest_files import MANIFESTS, Manifests, by_place, container
from pagedserve_operator.config import OperatorConfig, read_config

DEPLOYMENT = ("Deployment", "pagedserve-operator")
CRD = ("CustomResourceDefinition", "inferenceservices.pagedserve.dev")
NODES = ("ClusterRole", "pagedserve-operator-nodes")


@pytest.fixture(scope="module")
def helm(tmp_path_factory: pytest.TempPathFactory) -> Helm:
    return Helm(find_helm(), tmp_path_factory.mktemp("helm"))


def kustomized(overlay: str) -> Manifests:
    command = [str(find_kubectl()), "kustomize", str(MANIFESTS / "overlays" / overlay)]
    return by_place(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def environment(manifests: Manifests) -> dict[str, str]:
    return {row["name"]: row["value"] for row in container(manifests)["env"] if "value" in row}


def test_the_chart_is_clean(helm: Helm) -> None:
    told = helm.run("lint", "--strict", str(CHART)).stdout
    assert "[ERROR]" not in told
    assert "[WARNING]" not in told
    assert "1 chart(s) linted, 0 chart(s) failed" in told


OVERLAYS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "cluster-wide": ("cluster-wide", "pagedserve-system", ()),
    "monitoring": ("monitoring", "pagedserve-system", ("monitoring.enabled=true",)),
    "one-namespace": ("one-namespace", "models", ("watchNamespace=models",)),
}


@pytest.mark.parametrize(("overlay", "namespace", "given"), OVERLAYS.values(), ids=OVERLAYS)
def test_helm_and_kustomize_make_the_same_objects(
    helm: Helm, overlay: str, namespace: str, given: tuple[str, ...]
) -> None:
    expected, found = kustomized(overlay), helm.template(*sets(given), namespace=namespace)
    # The release's namespace is there before the release; and Helm alone knows of keeping an object.
    expected.pop(("Namespace", "pagedserve-system"), None)
    if CRD in found:
        assert found[CRD]["metadata"].pop("annotations") == {"helm.sh/resource-policy": "keep"}
    for manifests in (expected, found):
        name_variables(manifests)
    assert set(found) == set(expected)
    for place, manifest in expected.items():
        assert found[place] == manifest, place


def sets(given: tuple[str, ...]) -> list[str]:
    return [argument for value in given for argument in ("--set", value)]


def name_variables(manifests: Manifests) -> None:
    """Variables by name, in which the pod's namespace stands for where it is asked for: their order says nothing."""
    deployment = manifests[DEPLOYMENT]
    here = {"fieldRef": {"fieldPath": "metadata.namespace"}}
    namespace = deployment["metadata"]["namespace"]
    rows = container(manifests)["env"]
    container(manifests)["env"] = {
        row["name"]: namespace if row.get("valueFrom") == here else row["value"] for row in rows
    }
    assert len(container(manifests)["env"]) == len(rows)


def test_every_setting_reaches_the_operator_under_its_name(helm: Helm, tmp_path: Path) -> None:
    given = {value: getattr(OperatorConfig(), name) for name, value in helm_settings.names().items()}
    file = tmp_path / "values.yaml"
    file.write_text(yaml.safe_dump({"settings": given}), encoding="utf-8")
    read = environment(helm.template("--values", str(file)))
    assert set(read) == {name.upper() for name in helm_settings.names()} | {"ENGINE_IMAGE"}
    assert read_config(read) == OperatorConfig()


POD = "spec.template.spec"
DIGEST = f"sha256:{'0' * 64}"
EFFECTS: dict[str, tuple[tuple[str, ...], str, Any]] = {
    "tag": (("image.repository=example/op", "image.tag=2.0"), f"{POD}.containers.0.image", "example/op:2.0"),
    "digest": ((f"image.digest={DIGEST}",), f"{POD}.containers.0.image", f"pagedserve/operator@{DIGEST}"),
    "pull-policy": (("image.pullPolicy=Always",), f"{POD}.containers.0.imagePullPolicy", "Always"),
    "pull-secrets": (("image.pullSecrets={a,b}",), f"{POD}.imagePullSecrets", [{"name": "a"}, {"name": "b"}]),
    "replicas": (("replicas=3",), "spec.replicas", 3),
    "cpu": (("resources.requests.cpu=2",), f"{POD}.containers.0.resources.requests.cpu", 2),
    "node-selector": (("nodeSelector.pool=system",), f"{POD}.nodeSelector", {"pool": "system"}),
    "tolerations": (("tolerations[0].operator=Exists",), f"{POD}.tolerations", [{"operator": "Exists"}]),
    "affinity": (("affinity.nodeAffinity.a=b",), f"{POD}.affinity", {"nodeAffinity": {"a": "b"}}),
    "priority": (("priorityClassName=high",), f"{POD}.priorityClassName", "high"),
    "pod-labels": (("podLabels.team=a",), "spec.template.metadata.labels.team", "a"),
    "pod-annotations": (("podAnnotations.note=b",), "spec.template.metadata.annotations", {"note": "b"}),
    "account": (("serviceAccount.name=mine", "serviceAccount.create=false"), f"{POD}.serviceAccountName", "mine"),
    "port": (("settings.metricsPort=9000",), f"{POD}.containers.0.ports.0.containerPort", 9000),
    "api-port": (("settings.metricsApiPort=9001",), f"{POD}.containers.0.ports.1.containerPort", 9001),
}


@pytest.mark.parametrize(("given", "path", "expected"), EFFECTS.values(), ids=EFFECTS)
def test_a_value_reaches_its_place_and_no_other(helm: Helm, given: tuple[str, ...], path: str, expected: Any) -> None:
    found: Any = helm.template(*sets(given))[DEPLOYMENT]
    for part in path.split("."):
        found = found[int(part) if part.isdigit() else part]
    assert found == expected


def test_variables_take_whole_and_broken_numbers_and_others_come_beside_them(helm: Helm) -> None:
    given = (
        "settings.gatherSeconds=0.5",
        "settings.targetCacheUse=0.7",
        "settings.workers=16",
        "env[0].name=HTTPS_PROXY",
        "env[0].value=http://proxy",
    )
    read = environment(helm.template(*sets((*given, "engineImage=example/engine:1"))))
    assert read == {
        "ENGINE_IMAGE": "example/engine:1",
        "GATHER_SECONDS": "0.5",
        "HTTPS_PROXY": "http://proxy",
        "LOG_FORMAT": "json",
        "TARGET_CACHE_USE": "0.7",
        "WORKERS": "16",
    }


def test_whoever_brings_account_roles_and_crd_gets_none(helm: Helm) -> None:
    given = ("rbac.create=false", "serviceAccount.create=false", "serviceAccount.name=mine", "crds.install=false")
    assert {kind for kind, _ in helm.template(*sets(given))} == {"Deployment", "PodDisruptionBudget", "Service"}


def test_every_binding_names_the_account_and_the_release(helm: Helm) -> None:
    found = helm.template(*sets(("serviceAccount.name=mine",)), namespace="elsewhere")
    subjects = [subject for manifest in found.values() for subject in manifest.get("subjects", ())]
    assert subjects == len(subjects) * [{"kind": "ServiceAccount", "name": "mine", "namespace": "elsewhere"}]
    assert ("ServiceAccount", "mine") in found
    assert "pagedserve-system" not in yaml.safe_dump_all(found.values())


def test_nodes_are_read_where_the_operator_is_told_so(helm: Helm) -> None:
    alone = ("watchNamespace=models", "settings.readNodes=true")
    found = helm.template(*sets(alone), namespace="models")
    # Two such operators in one cluster don't take each other's rights.
    assert ("ClusterRole", "pagedserve-operator-nodes-models") in found
    assert found["ClusterRoleBinding", "pagedserve-operator-nodes-models"]["roleRef"]["name"].endswith("-models")
    assert environment(found)["READ_NODES"] == "true"
    assert NODES not in helm.template(*sets(("settings.readNodes=false",)))


def test_the_metrics_api_comes_only_where_it_is_served(helm: Helm) -> None:
    service, role = ("Service", "pagedserve-metrics-api"), ("ClusterRole", "pagedserve-operator-metrics-api")
    assert {service, role} <= set(helm.template(*sets(("settings.metricsApi=true",))))
    found = helm.template(*sets(("settings.metricsApi=false",)))
    assert not {service, role} & set(found)
    assert environment(found)["METRICS_API"] == "false"


def test_an_operator_may_live_beside_the_namespace_that_it_serves(helm: Helm) -> None:
    found = helm.template(*sets(("watchNamespace=models",)), namespace="platform")
    places = {place: manifest["metadata"]["namespace"] for place, manifest in found.items()}
    served = {("Role", "pagedserve-operator"), ("RoleBinding", "pagedserve-operator")}
    assert {place for place, namespace in places.items() if namespace == "models"} == served
    assert set(places.values()) == {"models", "platform"}
    assert environment(found)["WATCH_NAMESPACE"] == "models"


def test_prometheus_finds_what_it_selects_by_labels(helm: Helm) -> None:
    found = helm.template(*sets(("monitoring.enabled=true", "monitoring.labels.release=prometheus")))
    for kind in ("PodMonitor", "PrometheusRule"):
        assert found[kind, "pagedserve-operator"]["metadata"]["labels"]["release"] == "prometheus"


REFUSED: dict[str, tuple[str, tuple[str, ...]]] = {
    "unknown": ("replica=3", ("replica",)),
    "unknown-below": ("image.name=a", ("/image", "name")),
    "unknown-setting": ("settings.resyncMinutes=5", ("/settings", "resyncMinutes")),
    "unknown-in-a-list": ("tolerations[0].keys=a", ("/tolerations/0", "keys")),
    "count": ("replicas=two", ("/replicas", "integer")),
    "flag": ("monitoring.enabled=yes", ("/monitoring/enabled", "boolean")),
    "choice": ("settings.logFormat=xml", ("/settings/logFormat",)),
    "number": ("settings.resyncSeconds=soon", ("/settings/resyncSeconds",)),
    "zero": ("settings.resyncSeconds=0", ("/settings/resyncSeconds", "0")),
    "zero-as-text": ("settings.resyncSeconds=0.0", ("/settings/resyncSeconds", "0.0")),
    "digest": ("image.digest=latest", ("/image/digest",)),
    "quantity": ("resources.limits.memory=much", ("/resources/limits/memory",)),
    "namespace": ("watchNamespace=My_Models", ("/watchNamespace",)),
    "own-variable": ("env[0].name=WORKERS", ("/env/0/name",)),
    "selector": (r"podLabels.app\.kubernetes\.io/name=mine", ("app.kubernetes.io/name",)),
    "target": ("settings.targetCacheUse=0", ("/settings/targetCacheUse",)),
    "one-namespace-with-api": ("watchNamespace=models,settings.metricsApi=true", ("/settings/metricsApi",)),
    "no-account": ("serviceAccount.create=false", ("/serviceAccount/name",)),
}


@pytest.mark.parametrize(("given", "words"), REFUSED.values(), ids=REFUSED)
def test_a_bad_value_is_refused_by_name(helm: Helm, given: str, words: tuple[str, ...]) -> None:
    done = helm.run("template", "pagedserve", str(CHART), "--set", given, check=False)
    assert done.returncode != 0
    assert "values don't meet the specifications of the schema" in done.stderr
    assert all(word in done.stderr for word in words), done.stderr


def test_the_chart_is_packed_whole(helm: Helm, tmp_path: Path) -> None:
    helm.run("package", str(CHART), "--destination", str(tmp_path))
    (packed,) = tmp_path.glob("pagedserve-*.tgz")
    assert helm.template(chart=packed) == helm.template()
