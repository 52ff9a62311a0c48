"""The operator on a cluster, as its manifests install it: in pods, with its own account and its rights alone."""

from __future__ import annotations

import http.client
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from e2e.providers.provider import Images

from control_client import ApiError
from control_cluster import Cluster
from crd import wait_until_served

JSON = dict[str, Any]

ROOT = Path(__file__).parents[1]
BUNDLE = ROOT / "manifests" / "install.yaml"
NAMESPACE = "pagedserve-system"
NAME = "pagedserve-operator"
METRICS_PORT = 8081
QUICK: Mapping[str, str] = {"LEASE_SECONDS": "3", "RENEW_DEADLINE_SECONDS": "2", "RENEW_SECONDS": "0.5"}
"""A leader that was killed is followed soon, so that one dies every few seconds and work still gets done."""
OFFLINE: Mapping[str, str] = {"FETCH_MODEL_CONFIG": "false"}
_SECONDS = 240.0
_LEADING = r"^pagedserve_operator_leading 1"


def with_settings(manifests: str, *, operator: str, engine: str, settings: Mapping[str, str]) -> str:
    """The manifests with these images and variables of the operator's Deployment."""
    documents = [document for document in yaml.safe_load_all(manifests) if document]
    for document in documents:
        if document["kind"] == "Deployment":
            (container,) = document["spec"]["template"]["spec"]["containers"]
            container["image"] = operator
            given = {"ENGINE_IMAGE": engine, **settings}
            kept = [row for row in container["env"] if row["name"] not in given]
            container["env"] = [*kept, *({"name": name, "value": value} for name, value in given.items())]
    return yaml.safe_dump_all(documents, sort_keys=False)


class Installation:
    """The operator that runs in ``namespace`` of a cluster."""

    def __init__(self, cluster: Cluster, *, namespace: str = NAMESPACE) -> None:
        self.namespace = namespace
        self._cluster = cluster
        self._client = cluster.client()
        self._applied = ""

    def apply(self, manifests: str, images: Images, *, operator: str = "", settings: Mapping[str, str]) -> None:
        """Apply the manifests with these settings, and wait until every pod of the operator is a new one and ready."""
        told = with_settings(
            manifests, operator=operator or images.operator, engine=images.engine, settings={**OFFLINE, **settings}
        )
        self._applied = told
        self._cluster.kubectl("apply", "--server-side", "--force-conflicts", "-f", "-", stdin=told)
        wait_until_served(self._cluster)
        self.wait_available()

    def remove(self) -> None:
        """Delete what was applied last, the CRD with all resources included; nothing where nothing was."""
        if self._applied:
            self._cluster.kubectl("delete", "--ignore-not-found", "--timeout=110s", "-f", "-", stdin=self._applied)

    def wait_available(self) -> None:
        """Until the Deployment is rolled out and somebody leads."""

        def rolled_out() -> bool:
            found = self._client.get("apps/v1", "Deployment", NAME, namespace=self.namespace)
            status, wanted = found.get("status", {}), found["spec"]["replicas"]
            counts = [status.get(name, 0) for name in ("replicas", "updatedReplicas", "availableReplicas")]
            return status.get("observedGeneration") == found["metadata"]["generation"] and counts == [wanted] * 3

        self._client.wait(rolled_out, "the operator is rolled out", seconds=_SECONDS)
        self._client.wait(self.leader, "an operator leads", seconds=_SECONDS)

    def pods(self) -> list[JSON]:
        """The operator's pods, those being deleted left out."""
        return [pod for pod in self._every_pod() if "deletionTimestamp" not in pod["metadata"]]

    def _every_pod(self) -> list[JSON]:
        return self._client.list("v1", "Pod", namespace=self.namespace, labels=f"app.kubernetes.io/name={NAME}")

    def leader(self) -> str | None:
        """The name of the pod that leads, by its own word; None where none says so."""
        return next((name for name, told in self._metrics() if re.search(_LEADING, told, re.MULTILINE)), None)

    def _metrics(self) -> Iterator[tuple[str, str]]:
        """Each pod's name with its /metrics, by way of the API server; pods that don't answer are left out."""
        for pod in self.pods():
            name = pod["metadata"]["name"]
            path = f"/api/v1/namespaces/{self.namespace}/pods/{name}:{METRICS_PORT}/proxy/metrics"
            try:
                yield str(name), str(self._client.request("GET", path))
            except (ApiError, OSError, http.client.HTTPException):
                continue

    @contextmanager
    def held(self) -> Iterator[None]:
        """No operator runs here meanwhile."""
        deployment = self._client.get("apps/v1", "Deployment", NAME, namespace=self.namespace)
        replicas = deployment["spec"]["replicas"]
        self._scale(deployment, 0)
        # Also one that is on its way out works on.
        self._client.wait(lambda: not self._every_pod(), "no operator runs", every=0.25)
        try:
            yield
        finally:
            self._scale(deployment, replicas)
            self.wait_available()

    def _scale(self, deployment: JSON, replicas: int) -> None:
        self._client.patch(deployment, {"spec": {"replicas": replicas}}, subresource="scale")
