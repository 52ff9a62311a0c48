"""What `kubectl apply -k` and `kubectl apply -f` install."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

from bundle import BUNDLE, files, render
from control_cluster import Cluster
from crd import ROOT
from manifest_files import MANIFESTS, Manifests, built, bundle, container
from pagedserve_operator.assembly import WATCHES_END_SECONDS
from pagedserve_operator.config import OperatorConfig, read_config
from pagedserve_operator.kinds import KINDS
from pagedserve_operator.metrics import Metrics
from pagedserve_operator.metrics_api import authentication, listener, publishing, registration
from pagedserve_operator.names import LEASE_NAME
from pagedserve_operator.workqueue import WorkQueue


def environment(manifests: Manifests) -> dict[str, Any]:
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
    version = version_of(ROOT / "operator" / "pyproject.toml")
    assert container(bundle())["image"] == f"pagedserve/operator:{version}"
    assert environment(bundle())["ENGINE_IMAGE"] == OperatorConfig().engine_image


def version_of(file: Path) -> str:
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
    ports = {row["name"]: row["containerPort"] for row in operator["ports"]}
    assert ports["metrics"] == OperatorConfig().metrics_port
    asked = {probe: operator[probe]["httpGet"] for probe in ("livenessProbe", "readinessProbe")}
    assert {probe: (get["path"], get["port"]) for probe, get in asked.items()} == {
        "livenessProbe": ("/healthz", "metrics"),
        "readinessProbe": ("/readyz", "metrics"),
    }


def test_a_pod_that_goes_serves_until_proxies_know_and_has_time_to_end_afterwards() -> None:
    pod = bundle()["Deployment", "pagedserve-operator"]["spec"]["template"]["spec"]
    waits = container(bundle())["lifecycle"]["preStop"]["sleep"]["seconds"]
    grace = pod.get("terminationGracePeriodSeconds", 30)
    assert waits >= 5
    assert grace - waits > listener.ENDING_SECONDS + WATCHES_END_SECONDS


def test_the_metrics_api_is_where_its_registration_says() -> None:
    service = bundle()["Service", registration.SERVICE]
    deployment = bundle()["Deployment", "pagedserve-operator"]
    (port,) = service["spec"]["ports"]
    assert port["port"] == registration.PORT
    ports = {row["name"]: row["containerPort"] for row in container(bundle())["ports"]}
    assert ports[port["targetPort"]] == OperatorConfig().metrics_api_port
    assert service["spec"]["selector"] == deployment["spec"]["selector"]["matchLabels"]
    assert service["metadata"]["namespace"] == deployment["metadata"]["namespace"]


def test_the_operator_may_write_its_own_registration_and_its_own_secret_alone() -> None:
    role = bundle()["ClusterRole", publishing.ROLE]["rules"]
    written = {name for rule in role for name in rule.get("resourceNames", ()) if "patch" in rule["verbs"]}
    assert written == {registration.NAME}
    read = {name for rule in role for name in rule.get("resourceNames", ()) if "apiservices" in rule["resources"]}
    assert read == {registration.NAME, *registration.OTHER_NAMES}
    (secrets,) = bundle()["Role", "pagedserve-operator-metrics-api"]["rules"]
    assert secrets["resourceNames"] == [publishing.SECRET]
    binding = bundle()["RoleBinding", "pagedserve-operator-authentication-reader"]
    assert binding["metadata"]["namespace"] == authentication.NAMESPACE
    assert binding["roleRef"]["name"] == "extension-apiserver-authentication-reader"


def test_rights_name_every_kind_and_no_wildcard() -> None:
    rules = [rule for (kind, _), role in bundle().items() if kind in ("ClusterRole", "Role") for rule in role["rules"]]
    for rule in rules:
        assert "*" not in [*rule["apiGroups"], *rule["resources"], *rule["verbs"]]
    written = {(group, resource) for rule in rules for group in rule["apiGroups"] for resource in rule["resources"]}
    assert {(KINDS[kind].group, KINDS[kind].plural) for kind in KINDS} <= written


def test_alerts_ask_for_metrics_that_the_operator_has() -> None:
    metrics = Metrics()
    metrics.show(queue=WorkQueue(clock=lambda: 0.0), ages=lambda: {"Pod": 1.0}, leading=lambda: True)
    families = list(metrics.registry.collect())
    known = {family.name for family in families} | {f"{family.name}_total" for family in families}
    asked = re.findall(r"pagedserve_operator_\w+", (MANIFESTS / "components/monitoring/rules.yaml").read_text())
    assert asked
    assert set(asked) <= known


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
    assert ("Service", registration.SERVICE) not in manifests
    assert environment(manifests)["WATCH_NAMESPACE"] == {"fieldRef": {"fieldPath": "metadata.namespace"}}
    assert environment(manifests)["READ_NODES"] == "false"


def test_monitoring_adds_to_the_cluster_wide_overlay(control_plane: Cluster) -> None:
    manifests, plain = built(control_plane, "monitoring"), built(control_plane, "cluster-wide")
    assert set(manifests) - set(plain) == {
        ("PodMonitor", "pagedserve-operator"),
        ("PrometheusRule", "pagedserve-operator"),
    }
