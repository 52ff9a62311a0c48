"""Every name that stands on an object: labels, annotations, field managers, children's names, owner references.

The two selector labels can never change: a Deployment's selector is immutable, and pods of all versions must match.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

GROUP: Final = "pagedserve.dev"
VERSION: Final = "v1alpha1"
API_VERSION: Final = f"{GROUP}/{VERSION}"
KIND: Final = "InferenceService"
PLURAL: Final = "inferenceservices"

MANAGER: Final = "pagedserve-operator"
"""Field manager of everything but replicas."""
REPLICAS_MANAGER: Final = "pagedserve-operator-replicas"
"""Owns ``spec.replicas`` alone, and only where no autoscaler does."""

LABEL_NAME: Final = "app.kubernetes.io/name"
LABEL_INSTANCE: Final = "app.kubernetes.io/instance"
LABEL_MANAGED_BY: Final = "app.kubernetes.io/managed-by"
ENGINE_NAME: Final = "pagedserve-engine"

ANNOTATION_TUNING: Final = f"{GROUP}/tuning"
"""On the Deployment: what was decided, as JSON; see tuning.py."""
ANNOTATION_INPUTS: Final = f"{GROUP}/inputs"
"""On the Deployment: hash of what the decision depends on and the user can see."""
ANNOTATION_ROLLOUT: Final = f"{GROUP}/rollout"
"""On the Deployment: the surge that was chosen, and for which pod template."""
ANNOTATION_SECRETS: Final = f"{GROUP}/secrets"
"""On the pod template: hash of the Secrets whose change must roll the pods."""
ANNOTATION_CHAT_TEMPLATE: Final = f"{GROUP}/chat-template"
"""On the pod template: hash of the inline chat template."""

ENGINE_CONTAINER: Final = "engine"
ENGINE_PORT: Final = 8080
LEASE_NAME: Final = "pagedserve-operator"


@dataclass(frozen=True, slots=True, order=True)
class Key:
    """An InferenceService by name; what the work queue holds."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


@dataclass(frozen=True, slots=True)
class Owner:
    """The InferenceService that children belong to."""

    key: Key
    uid: str

    def reference(self) -> dict[str, Any]:
        """The controller's owner reference; the garbage collector deletes the children with their owner."""
        return {
            "apiVersion": API_VERSION,
            "kind": KIND,
            "name": self.key.name,
            "uid": self.uid,
            "controller": True,
            "blockOwnerDeletion": False,
        }

    def owns(self, child: Mapping[str, Any]) -> bool:
        """Whether the child's owner references name exactly this resource, by UID."""
        references = child.get("metadata", {}).get("ownerReferences") or ()
        return any(reference.get("uid") == self.uid for reference in references)


def selector_labels(name: str) -> dict[str, str]:
    """The two labels that select a resource's pods, for ever."""
    return {LABEL_NAME: ENGINE_NAME, LABEL_INSTANCE: name}


def child_labels(name: str) -> dict[str, str]:
    """Labels of every child and pod; labels of the resource itself are never copied."""
    return {**selector_labels(name), LABEL_MANAGED_BY: MANAGER}


def claim_name(name: str) -> str:
    """The model cache's PersistentVolumeClaim."""
    return f"{name}-model-cache"


def chat_template_name(name: str) -> str:
    """The ConfigMap with the inline chat template."""
    return f"{name}-chat-template"
