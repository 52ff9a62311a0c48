"""The bundle on a real control plane: its rights, its upgrade, and how it goes without a trace."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import yaml

from bundle import BUNDLE
from control_client import ApiError, Client
from control_cluster import Cluster
from controlplane import find_control_plane
from crd import JSON, wait_until_served
from manifest_files import MANIFESTS, bundle, by_place, container
from pagedserve_operator.kinds import CHILDREN, KINDS, OPTIONAL
from pagedserve_operator.names import API_VERSION, KIND, Key, Owner

ACCOUNT = "system:serviceaccount:pagedserve-system:pagedserve-operator"


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
    wait_until_served(own_cluster)
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
        if kind not in OPTIONAL:
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


def test_the_operators_pods_are_admitted_to_a_restricted_namespace(installed: Cluster) -> None:
    client = installed.client()

    def pods() -> bool:
        return len(client.list("v1", "Pod", namespace="pagedserve-system")) == 2

    client.wait(pods, "two pods of the operator")


def test_an_operator_of_one_namespace_sees_no_other(installed: Cluster) -> None:
    client = installed.client()
    client.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "models"}})
    installed.kubectl("apply", "-k", str(MANIFESTS / "overlays" / "one-namespace"))
    account = installed.client(installed.kubeconfig_for("system:serviceaccount:models:pagedserve-operator"))
    for kind in (KIND, "Pod", "Deployment"):
        account.list(KINDS[kind].api_version, kind, namespace="models")
        with pytest.raises(ApiError, match="forbidden"):
            account.list(KINDS[kind].api_version, kind, namespace="default")
    with pytest.raises(ApiError, match="forbidden"):
        account.list("v1", "Node")


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
    installed.kubectl("apply", "-f", str(BUNDLE))
    wait_until_served(installed)
    assert client.list(API_VERSION, KIND) == []
