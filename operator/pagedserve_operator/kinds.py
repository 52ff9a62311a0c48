"""The kinds that the operator reads and writes, with their places in the API; a fixed table needs no discovery."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from pagedserve_operator.names import GROUP, KIND, PLURAL, VERSION


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of object; ``group`` is empty for the core group."""

    name: str
    group: str
    version: str
    plural: str
    namespaced: bool = True

    @property
    def api_version(self) -> str:
        """As in an object's ``apiVersion``."""
        return f"{self.group}/{self.version}" if self.group else self.version


MONITORING_GROUP: Final = "monitoring.coreos.com"
KEDA_GROUP: Final = "keda.sh"

_ALL: Final = (
    Kind(KIND, GROUP, VERSION, PLURAL),
    Kind("Deployment", "apps", "v1", "deployments"),
    Kind("Service", "", "v1", "services"),
    Kind("HorizontalPodAutoscaler", "autoscaling", "v2", "horizontalpodautoscalers"),
    Kind("PodDisruptionBudget", "policy", "v1", "poddisruptionbudgets"),
    Kind("NetworkPolicy", "networking.k8s.io", "v1", "networkpolicies"),
    Kind("PersistentVolumeClaim", "", "v1", "persistentvolumeclaims"),
    Kind("ConfigMap", "", "v1", "configmaps"),
    Kind("PodMonitor", MONITORING_GROUP, "v1", "podmonitors"),
    Kind("ServiceMonitor", MONITORING_GROUP, "v1", "servicemonitors"),
    Kind("PrometheusRule", MONITORING_GROUP, "v1", "prometheusrules"),
    Kind("ScaledObject", KEDA_GROUP, "v1alpha1", "scaledobjects"),
    Kind("Pod", "", "v1", "pods"),
    Kind("Secret", "", "v1", "secrets"),
    Kind("Event", "", "v1", "events"),
    Kind("Node", "", "v1", "nodes", namespaced=False),
    Kind("Lease", "coordination.k8s.io", "v1", "leases"),
    Kind("APIService", "apiregistration.k8s.io", "v1", "apiservices", namespaced=False),
    Kind("ClusterRole", "rbac.authorization.k8s.io", "v1", "clusterroles", namespaced=False),
    Kind("SubjectAccessReview", "authorization.k8s.io", "v1", "subjectaccessreviews", namespaced=False),
)
KINDS: Final[Mapping[str, Kind]] = {kind.name: kind for kind in _ALL}

OPTIONAL: Final = frozenset({"PodMonitor", "ServiceMonitor", "PrometheusRule", "ScaledObject"})
"""Children whose kinds exist only where the Prometheus operator, or KEDA, is installed."""
AUTOSCALER: Final = "HorizontalPodAutoscaler"
KEDA_AUTOSCALER: Final = "ScaledObject"
CHILDREN: Final = (
    "Deployment",
    "Service",
    AUTOSCALER,
    KEDA_AUTOSCALER,
    "PodDisruptionBudget",
    "NetworkPolicy",
    "PersistentVolumeClaim",
    "ConfigMap",
    "PodMonitor",
    "ServiceMonitor",
    "PrometheusRule",
)
