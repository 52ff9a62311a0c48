"""What the custom metrics API answers: discovery, values and errors, as the JSON that Kubernetes' clients read."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from decimal import ROUND_CEILING, Decimal
from typing import Final

from pagedserve_operator.engine_metrics import ENGINE_METRICS
from pagedserve_operator.metrics_api.values import Value
from pagedserve_operator.spec import Json

GROUP: Final = "custom.metrics.k8s.io"
VERSION: Final = "v1beta2"
GROUP_VERSION: Final = f"{GROUP}/{VERSION}"
SERIES: Final = tuple(sorted(ENGINE_METRICS.values()))
"""Names of the metrics that are served."""
_THOUSANDTH: Final = Decimal("0.001")


def group_list() -> Json:
    """``/apis``."""
    return {"kind": "APIGroupList", "apiVersion": "v1", "groups": [_group()]}


def group() -> Json:
    """``/apis/custom.metrics.k8s.io``."""
    return {"kind": "APIGroup", "apiVersion": "v1", **_group()}


def resource_list() -> Json:
    """``/apis/custom.metrics.k8s.io/v1beta2``: a subresource of pods for each metric."""
    resources = [
        {"name": f"pods/{name}", "singularName": "", "namespaced": True, "kind": "MetricValueList", "verbs": ["get"]}
        for name in SERIES
    ]
    return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": GROUP_VERSION, "resources": resources}


def value_list(namespace: str, metric: str, values: Iterable[Value]) -> Json:
    """The values of a metric, each with its pod and the time at which it was read."""
    items = [
        {
            "describedObject": {"kind": "Pod", "namespace": namespace, "name": value.pod, "apiVersion": "v1"},
            "metric": {"name": metric, "selector": None},
            "timestamp": _rfc3339(value.at),
            "value": quantity_of(value.number),
        }
        for value in values
    ]
    return {"kind": "MetricValueList", "apiVersion": GROUP_VERSION, "metadata": {}, "items": items}


def failure(code: int, reason: str, message: str, *, retry_after: int | None = None) -> Json:
    """A Status object; ``retry_after`` in whole seconds."""
    details = {} if retry_after is None else {"details": {"retryAfterSeconds": retry_after}}
    return {
        "kind": "Status",
        "apiVersion": "v1",
        "metadata": {},
        "status": "Failure",
        "message": message,
        "reason": reason,
        "code": code,
        **details,
    }


def quantity_of(number: float) -> str:
    """A finite number as a Kubernetes quantity, rounded up to thousandths as Kubernetes rounds."""
    thousandths = int(Decimal(repr(number)).quantize(_THOUSANDTH, rounding=ROUND_CEILING) * 1000)
    whole, rest = divmod(thousandths, 1000)
    return str(whole) if rest == 0 else f"{thousandths}m"


def _group() -> Json:
    version = {"groupVersion": GROUP_VERSION, "version": VERSION}
    return {"name": GROUP, "versions": [version], "preferredVersion": version}


def _rfc3339(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
