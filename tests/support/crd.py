"""The CRD as tests see it: its schema, what the API server makes of a resource, and how to install it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from control_cluster import Cluster

ROOT = Path(__file__).parents[2]
FILE = ROOT / "crds" / "inferenceservices.yaml"

JSON = dict[str, Any]


def crd() -> JSON:
    """The manifest."""
    document: JSON = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    return document


def version() -> JSON:
    """The one version that it has."""
    (only,) = crd()["spec"]["versions"]
    found: JSON = only
    return found


def schema() -> JSON:
    """The schema of a whole resource."""
    found: JSON = version()["schema"]["openAPIV3Schema"]
    return found


def strict(node: JSON) -> JSON:
    """The schema with unknown fields refused, as kubectl's validation does."""
    node = copy.deepcopy(node)
    for _, below in fields(node):
        if "properties" in below:
            below["additionalProperties"] = False
    return node


def fields(node: JSON, path: str = "") -> Iterator[tuple[str, JSON]]:
    """Every node of a schema with its path, such as ``.spec.env[].name`` and ``.spec.gpu.nodeSelector{}``."""
    yield path, node
    for name, below in node.get("properties", {}).items():
        yield from fields(below, f"{path}.{name}")
    if "items" in node:
        yield from fields(node["items"], f"{path}[]")
    if isinstance(node.get("additionalProperties"), dict):
        yield from fields(node["additionalProperties"], f"{path}{{}}")


def with_defaults(node: JSON, value: Any) -> Any:
    """The value with the schema's defaults, as the API server stores it."""
    if isinstance(value, dict):
        known = node.get("properties", {})
        filled = {name: copy.deepcopy(below["default"]) for name, below in known.items() if "default" in below}
        return {**filled, **{name: with_defaults(known.get(name, {}), below) for name, below in value.items()}}
    if isinstance(value, list):
        return [with_defaults(node.get("items", {}), row) for row in value]
    return value


def install(cluster: Cluster) -> None:
    """Apply the CRD and wait until its resources are served."""
    cluster.client().apply(crd())
    wait_until_served(cluster)


def wait_until_served(cluster: Cluster) -> None:
    """Until resources of a CRD that has been applied can be created."""
    client, manifest = cluster.client(), crd()

    def established() -> bool:
        found = client.get(manifest["apiVersion"], manifest["kind"], manifest["metadata"]["name"])
        conditions = found.get("status", {}).get("conditions") or ()
        return any(row["type"] == "Established" and row["status"] == "True" for row in conditions)

    client.wait(established, "the CRD is established")
    client.wait(lambda: client.list("pagedserve.dev/v1alpha1", "InferenceService") is not None, "resources are served")
    # What kubectl goes by comes a little later than the resources themselves.
    documented = "apis/pagedserve.dev/v1alpha1"
    client.wait(lambda: documented in str(client.request("GET", "/openapi/v3")), "the schema is published")
