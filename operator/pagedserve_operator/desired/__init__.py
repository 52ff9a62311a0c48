"""The children that a resource should have: one pure builder for each kind, from (spec, tuning, facts) to manifests."""

from __future__ import annotations

from pagedserve_operator.desired.autoscaler import horizontal_pod_autoscaler, scaled_object
from pagedserve_operator.desired.deployment import deployment
from pagedserve_operator.desired.facts import Facts
from pagedserve_operator.desired.monitoring import pod_monitor, prometheus_rule, service_monitor
from pagedserve_operator.desired.network import network_policy, pod_disruption_budget, service_of
from pagedserve_operator.desired.pods import pod_template, template_hash
from pagedserve_operator.desired.rollout import decide_rollout, needs_free_gpus
from pagedserve_operator.desired.storage import config_map, persistent_volume_claim
from pagedserve_operator.desired.timing import grace_seconds, startup_budget_seconds
from pagedserve_operator.kinds import CHILDREN, OPTIONAL
from pagedserve_operator.names import chat_template_name, claim_name
from pagedserve_operator.spec import InferenceService, Json
from pagedserve_operator.tuning import Tuning

__all__ = [
    "Facts",
    "child_keys",
    "decide_rollout",
    "desired",
    "grace_seconds",
    "needs_free_gpus",
    "pod_template",
    "startup_budget_seconds",
    "template_hash",
]


def desired(service: InferenceService, tuning: Tuning, facts: Facts) -> tuple[Json, ...]:
    """Every child, in the order in which they are made; raises SpecError for what can't be built."""
    children = (
        config_map(service),
        persistent_volume_claim(service),
        service_of(service),
        deployment(service, tuning, facts),
        horizontal_pod_autoscaler(service, facts),
        scaled_object(service, facts),
        pod_disruption_budget(service),
        network_policy(service, facts),
        pod_monitor(service),
        service_monitor(service),
        prometheus_rule(service),
    )
    unserved = OPTIONAL - facts.served_kinds
    return tuple(child for child in children if child is not None and child["kind"] not in unserved)


def child_keys(name: str, served_kinds: frozenset[str] = OPTIONAL) -> tuple[tuple[str, str], ...]:
    """Kind and name of every child that a resource of that name can have: what to observe, and to prune."""
    names = {"PersistentVolumeClaim": claim_name(name), "ConfigMap": chat_template_name(name)}
    unserved = OPTIONAL - served_kinds
    return tuple((kind, names.get(kind, name)) for kind in CHILDREN if kind not in unserved)
