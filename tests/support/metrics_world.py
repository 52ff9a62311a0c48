"""The parts around the custom metrics API that its tests play: pods, an API server's objects, the front proxy."""

from __future__ import annotations

import asyncio
import base64
import copy
import json
import ssl
import tempfile
from collections import Counter
from collections.abc import Callable
from typing import Any

from children import field_tree
from control_certificates import FRONT_PROXY, Authority, Signed
from pagedserve_operator.drift import owned_fields
from pagedserve_operator.errors import ApiError, Conflict
from pagedserve_operator.metrics_api.authentication import CONFIG_MAP, NAMESPACE
from pagedserve_operator.names import child_labels

JSON = dict[str, Any]


def engine_pod(name: str = "chat-6d-x", *, metadata: JSON | None = None, status: JSON | None = None) -> JSON:
    """A live, ready engine of ``chat``, but for these fields."""
    owner = {"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "chat-6d", "controller": True, "uid": "r"}
    return {
        "metadata": {
            "namespace": "models",
            "name": name,
            "uid": f"uid-{name}",
            "labels": child_labels("chat"),
            "ownerReferences": [owner],
            **(metadata or {}),
        },
        "status": {
            "phase": "Running",
            "podIP": "10.0.0.1",
            "conditions": [{"type": "Ready", "status": "True"}],
            **(status or {}),
        },
    }


def adapter(version: str = "v1beta1", *, service: JSON | None = None) -> JSON:
    """Somebody else's APIService."""
    spec = {"group": "custom.metrics.k8s.io", "version": version, "versionPriority": 100}
    place = service or {"namespace": "monitoring", "name": "prometheus-adapter"}
    return {
        "apiVersion": "apiregistration.k8s.io/v1",
        "kind": "APIService",
        "metadata": {"name": f"{version}.custom.metrics.k8s.io", "uid": "theirs", "resourceVersion": "7"},
        "spec": {**spec, "service": place},
    }


def authentication(authority: Authority, names: tuple[str, ...] = (FRONT_PROXY,)) -> JSON:
    """The ConfigMap in which the API server says how it is known."""
    data = {
        "requestheader-client-ca-file": authority.pem.decode(),
        "requestheader-allowed-names": json.dumps(list(names)),
        "requestheader-username-headers": '["X-Remote-User"]',
        "requestheader-group-headers": '["X-Remote-Group"]',
        "requestheader-extra-headers-prefix": '["X-Remote-Extra-"]',
    }
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": CONFIG_MAP, "namespace": NAMESPACE},
        "data": data,
    }


class FakeServer:
    """An API server for the metrics API: objects with field owners and versions, lists of pods, rights.

    ``refusals`` maps a kind to the error that reading it meets; ``writes`` counts what was written.
    """

    def __init__(self, *objects: JSON) -> None:
        self.objects = {self._place(row): copy.deepcopy(row) for row in objects}
        self.pods: list[JSON] = []
        self.allowed = True
        self.refusals: dict[str, ApiError] = {}
        self.writes: Counter[str] = Counter()
        self.reads = 0
        self._written = asyncio.Event()
        self._version = 100

    async def get(self, kind: str, namespace: str, name: str) -> JSON | None:
        self.reads += 1
        if kind in self.refusals:
            raise self.refusals[kind]
        return copy.deepcopy(self.objects.get((kind, namespace, name)))

    async def list(self, kind: str, namespace: str | None = None, *, selector: str | None = None) -> list[JSON]:
        return copy.deepcopy(self.pods)

    async def review_access(self, spec: JSON) -> JSON:
        return {"allowed": self.allowed}

    async def apply(self, manifest: JSON, *, manager: str, planned_on: JSON | None) -> JSON:
        place = self._place(manifest)
        existing = self.objects.get(place)
        if (existing is None) != (planned_on is None):
            raise Conflict("planned on something else", status=409)
        if existing is not None and planned_on is not None:
            versions = [row["metadata"]["resourceVersion"] for row in (existing, planned_on)]
            if versions[0] != versions[1]:
                raise Conflict("planned on another version", status=409)
        self._version += 1
        self.writes[f"apply {manifest['kind']}"] += 1
        fields = {name: value for name, value in manifest.items() if name not in ("apiVersion", "kind", "metadata")}
        metadata = {name: value for name, value in manifest["metadata"].items() if name not in ("name", "namespace")}
        entry = {
            "manager": manager,
            "operation": "Apply",
            "fieldsV1": field_tree({**fields, "metadata": metadata}, manifest["kind"]),
        }
        uid = f"uid-{self._version}" if existing is None else existing["metadata"]["uid"]
        own = {"uid": uid, "resourceVersion": str(self._version), "managedFields": [entry]}
        self.objects[place] = copy.deepcopy({**(existing or {}), **manifest})
        if existing is not None and manifest["kind"] == "Secret":
            owned = owned_fields(existing, manager).get("f:data", {})
            kept = {name: row for name, row in (existing["data"] or {}).items() if f"f:{name}" not in owned}
            self.objects[place]["data"] = {**kept, **manifest["data"]}
        self.objects[place]["metadata"].update(own)
        self._written.set()
        return copy.deepcopy(self.objects[place])

    async def delete(self, kind: str, namespace: str, name: str, *, uid: str) -> None:
        assert self.objects[kind, namespace, name]["metadata"]["uid"] == uid
        self.writes[f"delete {kind}"] += 1
        del self.objects[kind, namespace, name]

    async def until(self, holds: Callable[[], bool]) -> None:
        """Wait for an apply after which this is true."""
        while not holds():
            self._written.clear()
            await self._written.wait()

    def put(self, row: JSON) -> None:
        """Somebody else writes an object."""
        self._version += 1
        written = copy.deepcopy(row)
        written["metadata"] = {"uid": f"uid-{self._version}", **row["metadata"], "resourceVersion": str(self._version)}
        self.objects[self._place(row)] = written

    def secret_rows(self, name: str, namespace: str) -> dict[str, bytes]:
        """What a Secret holds."""
        return {key: base64.b64decode(row) for key, row in self.objects["Secret", namespace, name]["data"].items()}

    @staticmethod
    def _place(row: JSON) -> tuple[str, str, str]:
        return row["kind"], row["metadata"].get("namespace", ""), row["metadata"]["name"]


def client_context(trusted: bytes, shown: Signed | None = None) -> ssl.SSLContext:
    """TLS of a client that trusts these authorities (PEM) and shows this certificate."""
    context = ssl.create_default_context(cadata=trusted.decode())
    if shown is not None:
        with tempfile.NamedTemporaryFile() as both:
            both.write(shown.certificate + shown.key)
            both.flush()
            context.load_cert_chain(both.name)
    return context
