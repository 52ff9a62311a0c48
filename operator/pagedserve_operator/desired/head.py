"""The part that all children share: kind, name, labels and the owner whose end is theirs too."""

from __future__ import annotations

from collections.abc import Mapping

from pagedserve_operator.kinds import KINDS
from pagedserve_operator.names import child_labels
from pagedserve_operator.spec import InferenceService, Json


def head(
    service: InferenceService,
    kind: str,
    name: str | None = None,
    *,
    labels: Mapping[str, str] | None = None,
    annotations: Mapping[str, str] | None = None,
) -> Json:
    """``apiVersion``, ``kind`` and ``metadata`` of a child; ``name`` is the resource's where it isn't given."""
    key = service.key
    metadata: Json = {
        "name": name or key.name,
        "namespace": key.namespace,
        "labels": {**(labels or {}), **child_labels(key.name)},
        "ownerReferences": [service.owner.reference()],
    }
    if annotations:
        metadata["annotations"] = dict(annotations)
    return {"apiVersion": KINDS[kind].api_version, "kind": kind, "metadata": metadata}
