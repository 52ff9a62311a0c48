"""Which InferenceServices a changed object belongs to; what a watch tells is only ever a hint to look again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from pagedserve_operator.gpus.labels import read_node
from pagedserve_operator.names import API_VERSION, KIND, LABEL_INSTANCE, LABEL_MANAGED_BY, MANAGER, Key
from pagedserve_operator.spec import Json


def key_of_resource(resource: Mapping[str, Any]) -> Key:
    """The InferenceService's own key."""
    metadata = resource["metadata"]
    return Key(metadata["namespace"], metadata["name"])


def keys_of_child(child: Mapping[str, Any]) -> set[Key]:
    """Owners by reference and by label: somebody may have edited either."""
    metadata = child["metadata"]
    labels = metadata.get("labels") or {}
    owners = {
        reference["name"]
        for reference in metadata.get("ownerReferences") or ()
        if reference.get("kind") == KIND and reference.get("apiVersion") == API_VERSION
    }
    if labels.get(LABEL_MANAGED_BY) == MANAGER and labels.get(LABEL_INSTANCE):
        owners.add(labels[LABEL_INSTANCE])
    return {Key(metadata["namespace"], name) for name in owners}


def keys_of_autoscaler(autoscaler: Mapping[str, Any]) -> set[Key]:
    """Owners, and the resource whose Deployment (of the same name) it scales, whoever wrote it."""
    target = (autoscaler.get("spec") or {}).get("scaleTargetRef") or {}
    found = keys_of_child(autoscaler)
    if target.get("kind") == "Deployment" and target.get("name"):
        found.add(Key(autoscaler["metadata"]["namespace"], target["name"]))
    return found


class Changes:
    """What verdicts see of autoscalers of one kind, as watched: not the numbers that they measure all the time."""

    def __init__(self) -> None:
        self._signatures: dict[tuple[str, str], str] = {}

    def saw(self, autoscaler: Mapping[str, Any], deleted: bool) -> bool:
        """One came, changed or went: whether any verdict may change with it."""
        place = (autoscaler["metadata"]["namespace"], autoscaler["metadata"]["name"])
        before, now = self._signatures.pop(place, None), None if deleted else signature_of_autoscaler(autoscaler)
        if now is not None:
            self._signatures[place] = now
        return deleted or now != before


class Autoscalers:
    """Names of autoscalers by the resource whose Deployment they scale, as watched: a hint, not what is there."""

    def __init__(self) -> None:
        self._names: dict[Key, set[str]] = {}
        self._changes = Changes()

    def saw(self, autoscaler: Mapping[str, Any], deleted: bool) -> bool:
        """An autoscaler came, changed or went: whether any verdict may change with it.

        One that changed its target stays a hint for the old one.
        """
        name = autoscaler["metadata"]["name"]
        for key in keys_of_autoscaler(autoscaler):
            names = self._names.setdefault(key, set())
            (names.discard if deleted else names.add)(name)
            if not names:
                del self._names[key]
        return self._changes.saw(autoscaler, deleted)

    def near(self, key: Key) -> frozenset[str]:
        """Names worth reading for this resource, its own among them."""
        return frozenset({key.name, *self._names.get(key, ())})


class Nodes:
    """Signatures of the nodes that are there, as watched."""

    def __init__(self) -> None:
        self._signatures: dict[str, str] = {}

    def __len__(self) -> int:
        """Nodes that are known."""
        return len(self._signatures)

    def saw(self, node: Mapping[str, Any], deleted: bool) -> bool:
        """A node came, changed or went: whether its GPUs are others than before."""
        name, signature = node["metadata"]["name"], None if deleted else signature_of_node(dict(node))
        before = self._signatures.pop(name, None)
        if signature is not None:
            self._signatures[name] = signature
        return signature != before


def signature_of_autoscaler(autoscaler: Mapping[str, Any]) -> str:
    """What plan and status see of an autoscaler; the metrics that it measures every 15 s leave it as it is."""
    metadata, status = autoscaler["metadata"], autoscaler.get("status") or {}
    seen = {name: value for name, value in metadata.items() if name not in ("resourceVersion", "managedFields")}
    owners = [entry for entry in metadata.get("managedFields") or () if not entry.get("subresource")]
    parts = [seen, owners, autoscaler.get("spec"), status.get("conditions")]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=dict).encode()).hexdigest()


def signature_of_node(node: Json) -> str:
    """What sizing and surging see of a node; heartbeats leave it as it is."""
    return json.dumps([repr(gpu) for gpu in read_node(node)])
