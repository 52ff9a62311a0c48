"""What a namespace holds once a resource has settled, without what no two runs have in common."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Iterable
from typing import Any

from control_client import Client
from pagedserve_operator.kinds import CHILDREN, KINDS, OPTIONAL
from pagedserve_operator.names import API_VERSION, KIND, MANAGER, REPLICAS_MANAGER

JSON = dict[str, Any]

_OWNED = [(KINDS[kind].api_version, kind) for kind in CHILDREN if kind not in OPTIONAL]
_KINDS = [(API_VERSION, KIND), *_OWNED, ("apps/v1", "ReplicaSet"), ("v1", "Pod")]
_METADATA = ("name", "labels", "annotations", "finalizers", "deletionTimestamp")
_GENERATED = frozenset({"clusterIP", "clusterIPs", "lastTransitionTime", "pod-template-hash"})
# What the Deployment's controller noted of its own way there.
_PASSING = frozenset({"deployment.kubernetes.io/desired-replicas", "deployment.kubernetes.io/max-replicas"})
_PUBLISHED = "kube-root-ca.crt"


def states(client: Client, namespaces: Collection[str], *, whole: bool = True) -> dict[str, JSON]:
    """By namespace, what each object is (the resource alone, unless ``whole``).

    Three lists of a thousand cost less than a thousand lists of three.
    """
    found: defaultdict[str, defaultdict[str, list[JSON]]] = defaultdict(lambda: defaultdict(list))
    for api_version, kind in _KINDS if whole else _KINDS[:1]:
        for item in client.list(api_version, kind):
            if item["metadata"]["namespace"] in namespaces and item["metadata"]["name"] != _PUBLISHED:
                found[item["metadata"]["namespace"]][kind].append(item)
    return {namespace: _state(namespace, found[namespace]) for namespace in namespaces}


def resource_of(state: JSON) -> JSON:
    """The part of a state that is the resource."""
    return {KIND: state[KIND]} if KIND in state else {}


def difference(wanted: Any, found: Any, path: str = "") -> Iterable[str]:
    """Where the two differ, a line each."""
    if isinstance(wanted, dict) and isinstance(found, dict):
        for name in sorted({*wanted, *found}):
            yield from difference(wanted.get(name), found.get(name), f"{path}.{name}")
    elif isinstance(wanted, list) and isinstance(found, list) and len(wanted) == len(found):
        for index, (one, other) in enumerate(zip(wanted, found, strict=True)):
            yield from difference(one, other, f"{path}[{index}]")
    elif wanted != found:
        yield f"{path}: {json.dumps(found)[:300]} where the golden run has {json.dumps(wanted)[:300]}"


def _state(namespace: str, objects: dict[str, list[JSON]]) -> JSON:
    kinds: JSON = {kind: [_object(item) for item in items] for kind, items in objects.items()}
    # Pods and ReplicaSets have generated names.
    kinds["ReplicaSet"] = sorted((_replicaset(item) for item in objects["ReplicaSet"]), key=json.dumps)
    kinds["Pod"] = sorted(_pod(item) for item in objects["Pod"])
    text = json.dumps(kinds).replace(namespace, "NAMESPACE")
    for owner in objects[KIND]:
        text = text.replace(owner["metadata"]["uid"], "OWNER")
    document: JSON = json.loads(text)
    return {kind: items for kind, items in document.items() if items}


def _object(item: JSON) -> JSON:
    metadata = {name: item["metadata"][name] for name in _METADATA if name in item["metadata"]}
    if item["kind"] in CHILDREN:
        metadata["owners"] = item["metadata"].get("ownerReferences", [])
    metadata["managers"] = sorted(_managed(item), key=json.dumps)
    content = {name: item[name] for name in ("spec", "data") if name in item}
    if item["kind"] == KIND:
        content["status"] = item.get("status")
    if item["kind"] == "Deployment":
        counts = ("replicas", "readyReplicas", "updatedReplicas", "unavailableReplicas")
        content["status"] = {count: item.get("status", {}).get(count, 0) for count in counts}
    cleaned: JSON = _without_generated({"metadata": metadata, **content})
    return cleaned


def _managed(item: JSON) -> list[JSON]:
    """What our managers own: that is the operator's memory, too."""
    return [
        {name: row.get(name) for name in ("manager", "operation", "subresource", "fieldsV1")}
        for row in item["metadata"].get("managedFields", ())
        if row["manager"] in (MANAGER, REPLICAS_MANAGER)
    ]


def _replicaset(item: JSON) -> JSON:
    """With its revision: one roll-out too many would show."""
    kept = _object(item)
    del kept["metadata"]["name"]
    return kept


def _pod(item: JSON) -> str:
    ready = [row["status"] for row in item.get("status", {}).get("conditions", ()) if row["type"] == "Ready"]
    leaving = "deletionTimestamp" in item["metadata"]
    return f"ready {ready} leaving {leaving}"


def _without_generated(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_generated(below) for name, below in value.items() if name not in _GENERATED | _PASSING}
    return [_without_generated(row) for row in value] if isinstance(value, list) else value
