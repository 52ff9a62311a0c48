"""How engines are reached: the Service, who may use it, and how many may be missing at once."""

from __future__ import annotations

from ipaddress import ip_network

from pagedserve_operator.desired.facts import Facts
from pagedserve_operator.desired.head import head
from pagedserve_operator.errors import SpecError
from pagedserve_operator.names import LABEL_NAME, MANAGER, selector_labels
from pagedserve_operator.spec import InferenceService, Json


def service_of(service: InferenceService) -> Json:
    """The Service in front of the engines."""
    port = {"name": "http", "port": service.spec.service.port, "targetPort": "http", "protocol": "TCP"}
    return {
        **head(service, "Service", annotations=service.spec.service.annotations),
        "spec": {
            "type": service.spec.service.type,
            "selector": selector_labels(service.key.name),
            "ports": [port],
        },
    }


def pod_disruption_budget(service: InferenceService) -> Json | None:
    """One engine at a time may be drained from its node; one that isn't ready never holds a drain up."""
    if not service.spec.disruption_budget:
        return None
    return {
        **head(service, "PodDisruptionBudget"),
        "spec": {
            "maxUnavailable": 1,
            "unhealthyPodEvictionPolicy": "AlwaysAllow",
            "selector": {"matchLabels": selector_labels(service.key.name)},
        },
    }


def network_policy(service: InferenceService, facts: Facts) -> Json | None:
    """Who may connect: the peers that the user names, else the pods of the own namespace; and who reads metrics."""
    policy = service.spec.network_policy
    if not policy.enabled:
        return None
    peers = [_peer(row) for row in policy.allow_from] or [{"podSelector": {}}]
    if facts.metrics_reader:
        peers = [*peers, _operator_in(facts.metrics_reader)]
    return {
        **head(service, "NetworkPolicy"),
        "spec": {
            "podSelector": {"matchLabels": selector_labels(service.key.name)},
            "policyTypes": ["Ingress"],
            "ingress": [{"from": peers, "ports": [{"port": "http", "protocol": "TCP"}]}],
        },
    }


def _operator_in(namespace: str) -> Json:
    return {
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": namespace}},
        "podSelector": {"matchLabels": {LABEL_NAME: MANAGER}},
    }


def _peer(row: Json) -> Json:
    # The server refuses 10.1.2.3/8, which everybody reads as 10.0.0.0/8.
    if "ipBlock" not in row:
        return row
    try:
        network = ip_network(row["ipBlock"]["cidr"], strict=False)
    except (KeyError, TypeError, ValueError) as error:
        raise SpecError("spec.networkPolicy.allowFrom", "an ipBlock has no range: write cidr: 10.0.0.0/8") from error
    return {"ipBlock": {**row["ipBlock"], "cidr": str(network)}}
