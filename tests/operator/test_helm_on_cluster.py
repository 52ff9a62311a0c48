"""The chart on a real control plane: it comes, changes and goes by helm, and takes nothing along that it must not."""

from __future__ import annotations

import re
import shutil
import sys
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from control_cluster import Cluster
from controlplane import find_control_plane
from crd import wait_until_served
from helm_program import Helm, find_helm
from helm_site import OPERATOR, Site, everything
from helm_templates import CHART
from loopback import claimed_subnet
from manifest_files import MANIFESTS
from missing import skip_without
from monitoring_kinds import install_monitoring
from node_stand_in import NodeStandIn, why_not
from node_volumes import why_no_account
from operator_world import World
from pagedserve_operator.names import API_VERSION, KIND

CRD = "inferenceservices.pagedserve.dev"
METRICS_API = "v1beta2.custom.metrics.k8s.io"
LABEL = "app.kubernetes.io/part-of=pagedserve"
OF_THE_CRD = {f"CustomResourceDefinition <none> {CRD}", "APIService <none> v1alpha1.pagedserve.dev"}
"""What stays with it: the API server registers every kind."""


@pytest.fixture(scope="module")
def own_cluster() -> Iterator[Cluster]:
    """A control plane that may lose its CRD and its namespaces."""
    found = find_control_plane()
    if not found.started_here:
        pytest.skip("it would take the CRD from your cluster: leave KUBECONFIG unset to run this test")
    with found:
        yield found


@pytest.fixture
def site(control_plane: Cluster, own_cluster: Cluster, tmp_path: Path) -> Iterator[Site]:
    """A namespace in which nothing is installed yet; afterwards all of the project's is gone."""
    del control_plane  # without any, the test is skipped
    namespace = f"operator-{uuid.uuid4().hex[:8]}"
    site = Site(own_cluster, Helm(find_helm(), tmp_path, own_cluster.kubeconfig), namespace)
    own_cluster.kubectl("create", "namespace", namespace)
    site.client.wait(
        lambda: site.client.find("v1", "ServiceAccount", "default", namespace=namespace), "the namespace can be used"
    )
    yield site
    site.uninstall()
    own_cluster.kubectl("delete", "crd", CRD, "--ignore-not-found", "--timeout=60s")
    own_cluster.kubectl("delete", "clusterrole,clusterrolebinding", "-l", LABEL)
    own_cluster.kubectl("delete", "rolebinding", "-n", "kube-system", "-l", LABEL)
    own_cluster.kubectl("delete", "namespace", namespace, "pagedserve-system", "--ignore-not-found", "--wait=false")


@pytest.fixture
def newer(tmp_path: Path) -> Path:
    """The chart of a later version, whose resources have a field more."""
    chart = tmp_path / "newer"
    shutil.copytree(CHART, chart)
    for name, pattern, put in (
        ("Chart.yaml", r"(?<=ersion: )0\..*", "0.99.0"),
        (
            "templates/inferenceservices.yaml",
            r"^( +)suspend: ",
            r'\1novel: {type: boolean, description: "New."}\n\g<0>',
        ),
    ):
        text, places = re.subn(pattern, put, (chart / name).read_text(), flags=re.MULTILINE)
        assert places
        (chart / name).write_text(text)
    return chart


def test_an_upgrade_applies_the_crd_and_touches_no_resource(site: Site, newer: Path) -> None:
    assert "NOTES:" in site.install("--set", "podAnnotations.note=kept")
    wait_until_served(site.cluster)
    resource, child = site.serve("upgraded")
    site.upgrade("--set", "replicas=3", chart=newer)
    novel = {"spec": {"novel": True}}
    site.client.wait(lambda: "novel" in site.client.patch(resource, novel)["spec"], "the new field is known")
    site.client.patch(resource, {"spec": {"novel": None}})
    after, child_after = site.found(resource)
    assert (after["metadata"]["uid"], after["spec"]) == (resource["metadata"]["uid"], resource["spec"])
    assert child_after == child
    deployment = site.deployment()
    template = deployment["spec"]["template"]
    assert deployment["spec"]["replicas"] == 3
    assert template["spec"]["containers"][0]["image"] == "pagedserve/operator:0.99.0"
    assert template["metadata"]["annotations"] == {"note": "kept"}


def test_an_upgrade_to_the_same_writes_nothing_that_matters(site: Site) -> None:
    site.install()
    before = site.deployment()
    site.upgrade()
    assert site.deployment()["metadata"]["generation"] == before["metadata"]["generation"]


def test_uninstalling_leaves_the_crd_and_the_resources_and_nothing_else(site: Site) -> None:
    before = everything(site.cluster)
    site.install()
    wait_until_served(site.cluster)
    served = site.serve("kept")
    site.uninstall()
    expected = {
        f"CustomResourceDefinition <none> {CRD}",
        "APIService <none> v1alpha1.pagedserve.dev",  # made of the CRD by the API server
        "InferenceService default kept",
        "ConfigMap default kept",
    }

    site.wait_left(expected, before=before)
    assert site.found(served[0]) == served


def test_the_installed_operator_works_and_takes_its_own_along_when_it_goes(site: Site) -> None:
    if reason := why_not() or why_no_account():
        skip_without(reason)
    images = {f"pagedserve/operator:{app_version()}": [sys.executable, "-m", "pagedserve_operator"]}
    with claimed_subnet() as subnet, NodeStandIn(site.client, "charted", images=images, subnet=subnet):
        before = everything(site.cluster)
        # Helm itself waits until both pods are ready.
        site.install("--wait", "--timeout", "110s", "--set", "settings.fetchModelConfig=false")
        world = World(site.client, "default")
        world.create("chat")
        world.wait_child("Deployment", "chat")
        api = ("apiregistration.k8s.io/v1", "APIService", METRICS_API)
        site.client.wait(lambda: site.client.find(*api), "the operator serves the metrics API")
        world.delete_all()
        site.uninstall()
        certificates = f"Secret {site.namespace} pagedserve-metrics-api-certificates"
        site.wait_left(OF_THE_CRD | {certificates}, before=before)


def app_version() -> str:
    """The tag of the operator's image, where no value names one."""
    found: str = yaml.safe_load((CHART / "Chart.yaml").read_text(encoding="utf-8"))["appVersion"]
    return found


def test_what_an_earlier_release_left_is_taken_up_again_and_by_no_other(site: Site) -> None:
    site.install()
    site.uninstall()
    elsewhere = replace(site, namespace="default")
    told = elsewhere.install(check=False)
    assert f'CustomResourceDefinition "{CRD}"' in told
    assert "cannot be imported into the current release" in told
    elsewhere.install("--set", "crds.install=false")
    elsewhere.uninstall()
    site.install()
    wait_until_served(site.cluster)


def test_an_installation_by_kustomize_is_refused_unless_it_is_taken_over(site: Site) -> None:
    site.cluster.kubectl("apply", "--server-side", "-k", str(MANIFESTS / "overlays" / "cluster-wide"))
    wait_until_served(site.cluster)
    resource, child = site.serve("inherited")
    theirs = replace(site, namespace="pagedserve-system")
    before = theirs.deployment()
    told = theirs.install(check=False)
    assert "cannot be imported into the current release" in told
    assert "pagedserve" in told
    theirs.install("--take-ownership", "--force-conflicts")
    after = theirs.deployment()
    # Not a pod is made anew: what the chart says is what is there.
    assert (after["metadata"]["uid"], after["spec"]) == (before["metadata"]["uid"], before["spec"])
    # Kubectl still holds what it applied, so that the first change of it takes a word.
    assert "conflict" in theirs.upgrade("--set", "image.tag=0.2.0", check=False)
    theirs.upgrade("--set", "image.tag=0.2.0", "--force-conflicts")
    theirs.upgrade("--set", "image.tag=0.3.0")
    assert theirs.deployment()["spec"]["template"]["spec"]["containers"][0]["image"] == "pagedserve/operator:0.3.0"
    theirs.uninstall()
    assert theirs.client.find("apps/v1", "Deployment", OPERATOR, namespace="pagedserve-system") is None
    assert site.found(resource) == (resource, child)


def test_one_namespace_takes_all_rights_there_and_none_beyond(site: Site) -> None:
    site.cluster.kubectl("apply", "--server-side", "-k", str(MANIFESTS.parent / "crds"))
    wait_until_served(site.cluster)
    given = ("--set", f"watchNamespace={site.namespace}")
    # Nobody may grant what he hasn't himself.
    assert "is attempting to grant RBAC permissions not currently held" in bound(site, "admin").install(
        *given, check=False
    )
    site.uninstall()
    owner = bound(site, "cluster-admin")
    before = everything(site.cluster)
    assert "--show-only templates/inferenceservices.yaml | kubectl apply" in owner.install(*given)
    account = site.cluster.client(site.cluster.kubeconfig_for(f"system:serviceaccount:{site.namespace}:{OPERATOR}"))
    assert account.list(API_VERSION, KIND, namespace=site.namespace) == []
    made = everything(site.cluster) - before
    assert {row.split()[1] for row in made} == {site.namespace}
    owner.uninstall()
    site.wait_left(set(), before=before)


def bound(site: Site, role: str) -> Site:
    """The site as seen by a user who has the ClusterRole in its namespace alone."""
    site.cluster.kubectl("-n", site.namespace, "create", "rolebinding", role, f"--clusterrole={role}", f"--user={role}")
    return replace(site, helm=replace(site.helm, kubeconfig=site.cluster.kubeconfig_for(role)))


def test_monitoring_is_refused_before_its_kinds_are_there_and_comes_with_an_upgrade(site: Site) -> None:
    told = site.install("--set", "monitoring.enabled=true", check=False)
    assert 'no matches for kind "PodMonitor"' in told
    site.install()
    install_monitoring(site.cluster)
    site.upgrade("--set", "monitoring.enabled=true")
    for kind in ("PodMonitor", "PrometheusRule"):
        assert site.client.get("monitoring.coreos.com/v1", kind, OPERATOR, namespace=site.namespace)
    site.upgrade("--set", "monitoring.enabled=false")
    assert site.client.list("monitoring.coreos.com/v1", "PodMonitor", namespace=site.namespace) == []
