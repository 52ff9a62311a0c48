"""What is kept of a scenario that failed: objects, events, logs, the audit's tail, in a folder that is named."""

from __future__ import annotations

import os
import re
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from e2e.installation import NAMESPACE
from e2e.providers.provider import Provider

from control_cluster import Cluster

KINDS = (
    "inferenceservices.pagedserve.dev,deployments,replicasets,pods,services,endpointslices,"
    "horizontalpodautoscalers,poddisruptionbudgets,leases,configmaps"
)
PREFIX = "e2e-"
"""Of every scenario's namespace."""


def collect(provider: Provider, test: str) -> Path:
    """The folder, below E2E_EVIDENCE or the temporary folder; what can't be read now is said in its place."""
    root = Path(os.environ.get("E2E_EVIDENCE") or Path(tempfile.gettempdir()) / "pagedserve-e2e")
    root.mkdir(parents=True, exist_ok=True)
    # A scenario may have two clusters, each with its own pods of the same names.
    name = f"{time.strftime('%H%M%S')}-{re.sub(r'[^A-Za-z0-9_]+', '-', test)[:80]}-{provider.name}-"
    folder = Path(tempfile.mkdtemp(prefix=name, dir=root))
    try:
        namespaces = _namespaces(provider.cluster)
        for namespace in namespaces:
            _write_objects(provider.cluster, namespace, folder)
        told = provider.cluster.kubectl("get", "nodes,apiservices", "-o", "wide", check=False)
        (folder / "cluster.txt").write_text(told.stdout + told.stderr)
        provider.write_logs(folder, namespaces)
    except Exception as error:
        # The scenario's own failure is what counts: this one must not hide it.
        (folder / "incomplete.txt").write_text(repr(error))
    return folder


def _namespaces(cluster: Cluster) -> Sequence[str]:
    names = [row["metadata"]["name"] for row in cluster.client().list("v1", "Namespace")]
    return [name for name in names if name.startswith(PREFIX) or name == NAMESPACE]


def _write_objects(cluster: Cluster, namespace: str, folder: Path) -> None:
    objects = cluster.kubectl("-n", namespace, "get", KINDS, "-o", "yaml", check=False)
    (folder / f"{namespace}_objects.yaml").write_text(objects.stdout + objects.stderr)
    events = cluster.kubectl("-n", namespace, "get", "events", "--sort-by=.metadata.creationTimestamp", check=False)
    (folder / f"{namespace}_events.txt").write_text(events.stdout + events.stderr)
