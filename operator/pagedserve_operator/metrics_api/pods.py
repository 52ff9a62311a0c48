"""Which pods count: engines of InferenceServices that are alive and ready; the dying and the loading never do."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from pagedserve_operator.names import ENGINE_NAME, LABEL_INSTANCE, LABEL_MANAGED_BY, LABEL_NAME, MANAGER
from pagedserve_operator.spec import Json
from pagedserve_operator.status.observed import condition, rows, table, text

ENGINES: Final = f"{LABEL_NAME}={ENGINE_NAME},{LABEL_MANAGED_BY}={MANAGER}"
"""Selects the engines of all InferenceServices."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """A pod to read from; ``uid`` tells it from others that had its name or address."""

    namespace: str
    name: str
    uid: str
    address: str


def live_engines(pods: Iterable[Json]) -> tuple[Engine, ...]:
    """Those that count, in the order of their names."""
    found = (
        Engine(
            namespace=text(pod, "metadata", "namespace"),
            name=text(pod, "metadata", "name"),
            uid=text(pod, "metadata", "uid"),
            address=text(pod, "status", "podIP"),
        )
        for pod in pods
        if _is_live(pod) and _is_an_engines(pod)
    )
    return tuple(sorted((engine for engine in found if engine.address), key=lambda engine: engine.name))


def _is_live(pod: Json) -> bool:
    if "deletionTimestamp" in table(pod, "metadata") or text(pod, "status", "phase") != "Running":
        return False
    return condition(pod, "Ready").get("status") == "True"


def _is_an_engines(pod: Json) -> bool:
    """Whether a ReplicaSet of the resource's Deployment made it: a pod made by hand may have a copy of the labels."""
    resource = text(pod, "metadata", "labels", LABEL_INSTANCE)
    owners = rows(pod, "metadata", "ownerReferences")
    return bool(resource) and any(
        owner.get("controller") and owner.get("kind") == "ReplicaSet" and text(owner, "name").startswith(f"{resource}-")
        for owner in owners
    )
