"""Manifests by kind and name, as files hold them and as kustomize builds them."""

from __future__ import annotations

import yaml

from bundle import BUNDLE
from control_cluster import Cluster
from crd import JSON, ROOT

MANIFESTS = ROOT / "manifests"

Manifests = dict[tuple[str, str], JSON]


def by_place(text: str) -> Manifests:
    """What a file holds."""
    found = [document for document in yaml.safe_load_all(text) if document]
    # kubectl prints several objects as one list.
    rows = found[0]["items"] if found[0]["kind"] == "List" else found
    return {(row["kind"], row["metadata"]["name"]): row for row in rows}


def built(cluster: Cluster, overlay: str) -> Manifests:
    """What kustomize makes of an overlay."""
    return by_place(cluster.kubectl("kustomize", str(MANIFESTS / "overlays" / overlay)).stdout)


def bundle() -> Manifests:
    """What ``manifests/install.yaml`` holds."""
    return by_place(BUNDLE.read_text(encoding="utf-8"))


def container(manifests: Manifests) -> JSON:
    """The operator's container."""
    (found,) = manifests["Deployment", "pagedserve-operator"]["spec"]["template"]["spec"]["containers"]
    operator: JSON = found
    return operator
