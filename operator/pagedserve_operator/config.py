"""The operator's settings, from the environment, which nothing else reads."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from math import inf
from typing import Any, Final, get_type_hints

from pagedserve_operator.engine_metrics import Targets
from pagedserve_operator.fields import quantity

TRUE: Final = frozenset({"true", "1", "yes", "on"})
FALSE: Final = frozenset({"false", "0", "no", "off"})
_USUAL: Final = Targets()


class ConfigError(Exception):
    """A setting that can't be; names the variable and the cure."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorConfig:
    """Each field is read from the variable of its name in capitals; an empty variable counts as absent."""

    watch_namespace: str = ""
    """The one namespace to serve; empty: all of them."""
    operator_namespace: str = "pagedserve-system"
    """Where the operator itself runs: its Lease, its certificates, the Service of its metrics API."""
    engine_image: str = "pagedserve/engine:0.1.0"
    """Image of engines whose resource names none; a change rolls no running pod."""
    engine_min_compute_capability: str = "7.5"
    """Lowest compute capability that the default image's torch build runs on."""
    read_nodes: bool = True
    """Whether nodes and pods of the cluster may be read (needs the optional ClusterRole)."""
    fetch_model_config: bool = True
    """Whether config.json is fetched from the hub to size a model."""
    hub_endpoint: str = "https://huggingface.co"
    """Where ``hf://`` models are looked up."""
    hub_timeout_seconds: float = 10.0
    """Longest wait for the hub; then the model's name has to do."""
    workers: int = 8
    """Resources that are reconciled at once."""
    request_seconds: float = 10.0
    """Longest wait for one answer of the API server."""
    gather_seconds: float = 0.2
    """Events of one resource within this time are one look."""
    resync_seconds: float = 300.0
    """Between two looks at a resource that nothing has happened to."""
    secret_resync_seconds: float = 60.0
    """The same for resources that refer to Secrets, which aren't watched."""
    lease_seconds: float = 15.0
    """How long the lease of a leader that has died keeps others waiting."""
    renew_deadline_seconds: float = 10.0
    """After this long without a renewed lease no write begins; shorter than the lease."""
    renew_seconds: float = 2.0
    """Between two renewals."""
    identity: str = ""
    """Who holds the lease; empty: host name and a random part."""
    metrics_host: str = "0.0.0.0"
    """Address of /metrics and the probes."""
    metrics_port: int = 8081
    """Port of /metrics and the probes; 0 takes a free one."""
    metrics_api: str = "auto"
    """Whether the custom metrics API is served, so that autoscalers can use engine metrics: auto (by all operators but
    those of one namespace), true or false; never against an adapter that is there."""
    metrics_api_host: str = "0.0.0.0"
    """Address of the custom metrics API."""
    metrics_api_port: int = 6443
    """Port of the custom metrics API; 0 takes a free one."""
    metrics_api_requests_per_second: float = 100.0
    """Requests that the custom metrics API takes from each caller, twice as many at once."""
    target_queue_wait_seconds: str = _USUAL.queue_wait_seconds
    """Target of spec.autoscaling's queueWaitSeconds where the resource names none; a quantity for each engine."""
    target_cache_use: str = _USUAL.cache_use
    """The same for cacheUse, 0 to 1."""
    target_waiting_requests: str = _USUAL.waiting_requests
    """The same for waitingRequests."""
    target_running_requests: str = _USUAL.running_requests
    """The same for runningRequests."""
    prometheus_url: str = ""
    """Prometheus as KEDA reaches it; needed by resources with spec.autoscaling.backend KEDA and engine metrics."""
    watch_silence_seconds: float = 70.0
    """A watch without event or bookmark for so long is opened again; above the minute between two bookmarks."""
    watch_stale_seconds: float = 180.0
    """A watch without event, bookmark or reconnection for so long is dead; liveness then fails."""
    log_format: str = "text"
    """text or json."""
    log_level: str = "info"
    """debug, info, warning or error."""
    kubeconfig: str = ""
    """Path of a kubeconfig; empty: the Pod's service account, else the default kubeconfig."""

    def __post_init__(self) -> None:
        """Refuse values that can't work together."""
        if not 0 < self.renew_seconds < self.renew_deadline_seconds < self.lease_seconds:
            raise ConfigError(
                "RENEW_SECONDS, RENEW_DEADLINE_SECONDS and LEASE_SECONDS must grow in this order, not "
                f"{self.renew_seconds:g}, {self.renew_deadline_seconds:g}, {self.lease_seconds:g}"
            )
        for name, allowed in (("log_format", ("text", "json")), ("log_level", ("debug", "info", "warning", "error"))):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name.upper()} must be one of {', '.join(allowed)}, not {getattr(self, name)!r}")
        for name in (
            "workers",
            "request_seconds",
            "gather_seconds",
            "resync_seconds",
            "secret_resync_seconds",
            "hub_timeout_seconds",
            "watch_silence_seconds",
            "watch_stale_seconds",
            "lease_seconds",
            "metrics_api_requests_per_second",
        ):
            # Written so that "not a number" is refused too.
            if not 0 < getattr(self, name) < inf:
                raise ConfigError(f"{name.upper()} must be above 0 and finite, not {getattr(self, name)}")
        for name in ("metrics_port", "metrics_api_port"):
            if not 0 <= getattr(self, name) <= 65535:
                raise ConfigError(f"{name.upper()} must be 0 to 65535, not {getattr(self, name)}")
        self._check_compute_capability()
        self._check_metrics_api()
        self._check_autoscaling()

    def _check_compute_capability(self) -> None:
        try:
            _ = self.min_compute_capability
        except ValueError:
            raise ConfigError(
                f"ENGINE_MIN_COMPUTE_CAPABILITY must be like 7.5, not {self.engine_min_compute_capability!r}"
            ) from None

    def _check_metrics_api(self) -> None:
        if self.metrics_api.lower() not in {"auto"} | TRUE | FALSE:
            raise ConfigError(f"METRICS_API must be auto, true or false, not {self.metrics_api!r}")
        if self.watch_namespace and self.metrics_api.lower() in TRUE:
            raise ConfigError(
                "METRICS_API=true needs an operator of all namespaces, since a cluster has one custom metrics API: "
                "leave WATCH_NAMESPACE or METRICS_API out"
            )

    def _check_autoscaling(self) -> None:
        for name in ("queue_wait_seconds", "cache_use", "waiting_requests", "running_requests"):
            given = getattr(self, f"target_{name}")
            try:
                good = quantity(given) > 0
            except ValueError:
                good = False
            if not good:
                variable = f"TARGET_{name.upper()}"
                raise ConfigError(f'{variable} must be a quantity above 0 ("4", "500m"), not {given!r}')
        if self.prometheus_url and not self.prometheus_url.startswith(("http://", "https://")):
            raise ConfigError(
                f"PROMETHEUS_URL must begin with http:// or https://, not {self.prometheus_url!r}: write all of it"
            )

    def derive(self, **changes: Any) -> OperatorConfig:
        """A new value with these fields changed."""
        return replace(self, **changes)

    @property
    def serves_metrics_api(self) -> bool:
        """Whether this operator serves the custom metrics API."""
        return not self.watch_namespace and self.metrics_api.lower() not in FALSE

    @property
    def targets(self) -> Targets:
        """What autoscalers aim at by default."""
        return Targets(
            waiting_requests=self.target_waiting_requests,
            running_requests=self.target_running_requests,
            queue_wait_seconds=self.target_queue_wait_seconds,
            cache_use=self.target_cache_use,
        )

    @property
    def min_compute_capability(self) -> tuple[int, int]:
        """(major, minor)."""
        major, minor = self.engine_min_compute_capability.split(".")
        return int(major), int(minor)


def read_config(environment: Mapping[str, str] | None = None) -> OperatorConfig:
    """The settings from ``environment`` (default: the process's); raises ConfigError by variable."""
    variables = os.environ if environment is None else environment
    types = get_type_hints(OperatorConfig)
    given = {setting.name: variables.get(setting.name.upper(), "") for setting in fields(OperatorConfig)}
    # Without the optional switch, one namespace means: no ClusterRole, so no nodes.
    values = {name: _convert(name, text, types[name]) for name, text in given.items() if text}
    if values.get("watch_namespace") and "read_nodes" not in values:
        values["read_nodes"] = False
    return OperatorConfig(**values)


def _convert(name: str, text: str, kind: Any) -> Any:
    if kind is bool:
        if text.lower() in TRUE | FALSE:
            return text.lower() in TRUE
        raise ConfigError(f"{name.upper()} must be true or false, not {text!r}")
    try:
        return kind(text)
    except ValueError:
        raise ConfigError(f"{name.upper()} must be a {'whole ' if kind is int else ''}number, not {text!r}") from None
