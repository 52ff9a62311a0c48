"""Objects for the Prometheus operator: where to scrape, and when to wake somebody."""

from __future__ import annotations

from typing import Final

from pagedserve_operator.desired.head import head
from pagedserve_operator.names import LABEL_INSTANCE, selector_labels
from pagedserve_operator.spec import InferenceService, Json

INSTANCE_LABEL: Final = "app_kubernetes_io_instance"
"""What Prometheus makes of LABEL_INSTANCE, which both monitors put on every series."""


def pod_monitor(service: InferenceService) -> Json | None:
    """Every engine pod is scraped."""
    monitoring = service.spec.monitoring
    if not monitoring.pod_monitor:
        return None
    return {
        **head(service, "PodMonitor", labels=monitoring.labels),
        "spec": {
            "selector": {"matchLabels": selector_labels(service.key.name)},
            "podTargetLabels": [LABEL_INSTANCE],
            "podMetricsEndpoints": [{"port": "http", "path": "/metrics", "interval": monitoring.interval}],
        },
    }


def service_monitor(service: InferenceService) -> Json | None:
    """The same through the Service, for a Prometheus that knows only those."""
    monitoring = service.spec.monitoring
    if not monitoring.service_monitor:
        return None
    return {
        **head(service, "ServiceMonitor", labels=monitoring.labels),
        "spec": {
            "selector": {"matchLabels": selector_labels(service.key.name)},
            "targetLabels": [LABEL_INSTANCE],
            "endpoints": [{"port": "http", "path": "/metrics", "interval": monitoring.interval}],
        },
    }


def prometheus_rule(service: InferenceService) -> Json | None:
    """Alerts on what users feel."""
    monitoring = service.spec.monitoring
    if not monitoring.prometheus_rule:
        return None
    key = service.key
    group = {"name": f"pagedserve.{key.namespace}.{key.name}", "rules": _rules(service)}
    return {**head(service, "PrometheusRule", labels=monitoring.labels), "spec": {"groups": [group]}}


def _rules(service: InferenceService) -> list[Json]:
    where = f'namespace="{service.key.namespace}",{INSTANCE_LABEL}="{service.key.name}"'
    failed = f'sum(rate(pagedserve_requests_total{{{where},outcome=~"error|timeout"}}[5m]))'
    ended = f"sum(rate(pagedserve_requests_total{{{where}}}[5m]))"
    return [
        _alert(
            "PagedserveDown",
            f"absent(up{{{where}}} == 1)",
            minutes=10,
            severity="critical",
            says="no engine of {name} has answered for 10 minutes",
            service=service,
        ),
        _alert(
            "PagedserveEngineDown",
            f"up{{{where}}} == 0",
            minutes=10,
            severity="warning",
            says="an engine of {name} has not answered for 10 minutes",
            service=service,
        ),
        _alert(
            "PagedserveQueueWait",
            f"avg(pagedserve_queue_wait_seconds{{{where}}}) > 5",
            minutes=5,
            severity="warning",
            says="requests to {name} wait more than 5 s for their first step: add replicas or raise maxReplicas",
            service=service,
        ),
        _alert(
            "PagedserveCachePressure",
            f"avg(pagedserve_cache_usage_ratio{{{where}}}) > 0.95 and "
            f"sum(rate(pagedserve_preemptions_total{{{where}}}[5m])) > 0",
            minutes=10,
            severity="warning",
            says="the cache of {name} is full and requests are computed again: add replicas or memory",
            service=service,
        ),
        _alert(
            "PagedserveRequestsFail",
            f"{failed} / {ended} > 0.05",
            minutes=5,
            severity="critical",
            says="more than 5 % of the requests to {name} fail or time out",
            service=service,
        ),
    ]


def _alert(name: str, expression: str, *, minutes: int, severity: str, says: str, service: InferenceService) -> Json:
    return {
        "alert": name,
        "expr": expression,
        "for": f"{minutes}m",
        "labels": {"severity": severity, "inference_service": service.key.name},
        "annotations": {"summary": says.format(name=str(service.key))},
    }
