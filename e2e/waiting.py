"""What scenarios wait for: a resource that is served, a Service that answers, and namespaces of their own."""

from __future__ import annotations

import http.client
import urllib.parse
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from e2e.evidence import PREFIX
from e2e.providers.provider import Provider

from control_client import ApiError, Client
from operator_world import World, condition_of

JSON = dict[str, Any]
SECONDS = 300.0
"""Several engines that start together share two cores."""


@contextmanager
def namespaced(provider: Provider, word: str) -> Iterator[World]:
    """A new namespace in which pods can be created; left, it and all that is in it are going."""
    client, name = provider.cluster.client(), f"{PREFIX}{word}-{uuid.uuid4().hex[:6]}"
    client.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
    try:
        client.wait(lambda: client.find("v1", "ServiceAccount", "default", namespace=name), "its service account")
        yield World(client, name)
    finally:
        client.delete("v1", "Namespace", name)


def wait_served(world: World, name: str, *, seconds: float = SECONDS) -> JSON:
    """The resource, once its newest generation is ready and every replica has the newest template."""

    def served() -> JSON | None:
        resource = world.get(name)
        told = [condition_of(resource, kind) for kind in ("Ready", "Progressing")]
        seen = [(row.get("reason"), row.get("observedGeneration")) for row in told]
        generation = resource["metadata"]["generation"]
        return resource if seen == [("Available", generation), ("Complete", generation)] else None

    try:
        return world.client.wait(served, f"{name} is served", seconds=seconds, every=0.25)
    except TimeoutError as error:
        raise TimeoutError(f"{error}; its status is {world.get(name).get('status')}") from error


def wait_answers(client: Client, address: str) -> str:
    """The address, once an engine answers there.

    A connection says little: before the Service's address is known here, a gateway may take it for the world outside.
    """
    place = urllib.parse.urlsplit(f"//{address}")

    def is_ready() -> bool:
        connection = http.client.HTTPConnection(str(place.hostname), place.port, timeout=5)
        try:
            connection.request("GET", "/health/ready")
            return connection.getresponse().status == 200
        finally:
            connection.close()

    client.wait(is_ready, f"an engine answers at {address}", every=0.25)
    return address


def staying(pods: Sequence[JSON]) -> list[JSON]:
    """Those that aren't being deleted."""
    return [pod for pod in pods if "deletionTimestamp" not in pod["metadata"]]


def uids(pods: Sequence[JSON]) -> set[str]:
    """Whether pods are the same ones."""
    return {pod["metadata"]["uid"] for pod in pods}


def restarts(pods: Sequence[JSON]) -> int:
    """How often containers of these pods were started again."""
    return sum(row["restartCount"] for pod in pods for row in pod.get("status", {}).get("containerStatuses", ()))


def objects_in(client: Client, namespace: str) -> set[tuple[str, str]]:
    """Every object of the namespace by kind and name, whatever kinds the server offers; events and leases left out."""
    groups = client.request("GET", "/apis")["groups"]
    versions = ["v1", *(group["preferredVersion"]["groupVersion"] for group in groups)]
    found: set[tuple[str, str]] = set()
    for version in versions:
        if version.startswith(("events.", "metrics.", "custom.metrics.", "coordination.")):
            continue
        root = f"/apis/{version}" if "/" in version else f"/api/{version}"
        for resource in client.request("GET", root)["resources"]:
            listed = "list" in resource["verbs"] and resource["namespaced"] and resource["kind"] != "Event"
            if listed and "/" not in resource["name"]:
                found |= _listed(client, f"{root}/namespaces/{namespace}/{resource['name']}", resource["kind"])
    return found


def _listed(client: Client, path: str, kind: str) -> set[tuple[str, str]]:
    try:
        return {(kind, row["metadata"]["name"]) for row in client.request("GET", path)["items"]}
    except ApiError as error:
        # A kind whose server is away or takes no list.
        if error.code not in (404, 405, 503):
            raise
        return set()
