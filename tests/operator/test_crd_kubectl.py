"""What a user sees of the resource through kubectl."""

from __future__ import annotations

import pytest

from control_client import Client
from control_cluster import Cluster
from crd import JSON, install
from engine_world import NOW, TUNING, deployment, ready_pod
from pagedserve_operator.parsing import parse
from pagedserve_operator.status import Observation, compute

API = "pagedserve.dev/v1alpha1"
KIND = "InferenceService"


@pytest.fixture
def client(control_plane: Cluster) -> Client:
    install(control_plane)
    return control_plane.client()


def create(client: Client, namespace: str, **spec: object) -> JSON:
    manifest: JSON = {
        "apiVersion": API,
        "kind": KIND,
        "metadata": {"name": "llama", "namespace": namespace},
        "spec": {"model": {"uri": "hf://a/b"}, **spec},
    }
    return client.create(manifest)


def reported(client: Client, raw: JSON) -> JSON:
    """The resource with a status that the operator computed, as the server stores it."""
    observation = Observation(
        deployment=deployment(1), pods=(ready_pod("a"),), hpa=None, foreign_hpas=(), service={"spec": {}}
    )
    outcome = compute(raw, service=parse(raw), tuning=TUNING, problem=None, observation=observation, now=NOW)
    stored = client.patch(raw, {"status": outcome.status}, subresource="status")
    assert stored["status"] == outcome.status, "the schema drops what it doesn't know"
    return stored


def test_explain_reads_like_documentation(client: Client, control_plane: Cluster) -> None:
    explained = " ".join(control_plane.kubectl("explain", "psvc.spec.tuning").stdout.split())
    assert "A number given here wins" in explained or "a number given here wins" in explained
    assert "maxBatchTokens <integer> Query tokens of one step (MAX_BATCH_TOKENS); default is computed" in explained
    assert "safetyMargin <number> Share of the blocks (0 to 0.99)" in explained
    below = control_plane.kubectl("explain", "inferenceservice.spec.podTemplate.sidecars.env.valueFrom.fieldRef").stdout
    assert "A field of the pod." in below


def test_a_status_of_the_operator_is_stored_whole(client: Client, namespace: str) -> None:
    reported(client, create(client, namespace, replicas=1))


def test_get_shows_what_matters(client: Client, control_plane: Cluster, namespace: str) -> None:
    stored = reported(client, create(client, namespace, replicas=1))
    header, row = control_plane.kubectl("-n", namespace, "get", "psvc").stdout.splitlines()
    assert header.split() == ["NAME", "READY", "REASON", "REPLICAS", "GPU", "BLOCKS", "URL", "AGE"]
    tuning = stored["status"]["tuning"]
    product, blocks = tuning["gpu"]["product"], str(tuning["numBlocks"])
    assert row.split()[:-1] == ["llama", "True", "Available", "1", product, blocks, stored["status"]["url"]]
    wide = control_plane.kubectl("-n", namespace, "get", "psvc", "-o", "wide").stdout
    assert "hf://a/b" in wide
    assert stored["status"]["image"] in wide


def test_get_all_and_the_category_list_it(client: Client, control_plane: Cluster, namespace: str) -> None:
    create(client, namespace)
    for category in ("all", "llm"):
        listed = control_plane.kubectl("-n", namespace, "get", category, "-o", "name").stdout
        assert "inferenceservice.pagedserve.dev/llama" in listed


def test_scale_sets_replicas(client: Client, control_plane: Cluster, namespace: str) -> None:
    create(client, namespace, replicas=1)
    control_plane.kubectl("-n", namespace, "scale", "psvc/llama", "--replicas=3")
    assert client.get(API, KIND, "llama", namespace=namespace)["spec"]["replicas"] == 3


def test_scale_is_refused_while_autoscaling_is_on(client: Client, control_plane: Cluster, namespace: str) -> None:
    create(client, namespace, autoscaling={"maxReplicas": 4})
    refused = control_plane.kubectl("-n", namespace, "scale", "psvc/llama", "--replicas=3", check=False)
    assert refused.returncode == 1
    assert "replicas can't be set (nor scaled by kubectl) while autoscaling is on" in refused.stderr
    assert "change autoscaling.minReplicas and autoscaling.maxReplicas" in refused.stderr
    assert "replicas" not in client.get(API, KIND, "llama", namespace=namespace)["spec"]


def test_the_scale_subresource_tells_counts_and_selector(client: Client, namespace: str) -> None:
    stored = reported(client, create(client, namespace, replicas=1))
    scale = client.request("GET", client.path(API, KIND, "llama", "scale", namespace=namespace))
    assert scale["spec"] == {"replicas": 1}
    assert scale["status"] == {"replicas": 1, "selector": stored["status"]["selector"]}
    assert "app.kubernetes.io/instance=llama" in stored["status"]["selector"]


def test_switching_between_replicas_and_autoscaling_takes_one_patch(client: Client, namespace: str) -> None:
    raw = create(client, namespace, replicas=2)
    assert "replicas" not in client.patch(raw, {"spec": {"replicas": None, "autoscaling": {}}})["spec"]
    assert "autoscaling" not in client.patch(raw, {"spec": {"replicas": 3, "autoscaling": None}})["spec"]


def test_an_unknown_field_is_named(client: Client, control_plane: Cluster, namespace: str) -> None:
    create(client, namespace)
    manifest = (
        "apiVersion: pagedserve.dev/v1alpha1\nkind: InferenceService\nmetadata: {name: b}\nspec: {model: {url: a}}"
    )
    refused = control_plane.kubectl("-n", namespace, "apply", "-f", "-", stdin=manifest, check=False)
    assert 'unknown field "spec.model.url"' in refused.stderr
