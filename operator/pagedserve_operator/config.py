"""The operator's settings, from the environment, which nothing else reads."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from math import inf
from typing import Any, Final, get_type_hints

TRUE: Final = frozenset({"true", "1", "yes", "on"})
FALSE: Final = frozenset({"false", "0", "no", "off"})


class ConfigError(Exception):
    """A setting that can't be; names the variable and the cure."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorConfig:
    """Each field is read from the variable of its name in capitals; an empty variable counts as absent."""

    watch_namespace: str = ""
    """The one namespace to serve; empty: all of them."""
    operator_namespace: str = "pagedserve-system"
    """Where the Lease lives."""
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
        ):
            # Written so that "not a number" is refused too.
            if not 0 < getattr(self, name) < inf:
                raise ConfigError(f"{name.upper()} must be above 0 and finite, not {getattr(self, name)}")
        if not 0 <= self.metrics_port <= 65535:
            raise ConfigError(f"METRICS_PORT must be 0 to 65535, not {self.metrics_port}")
        self._check_compute_capability()

    def _check_compute_capability(self) -> None:
        try:
            _ = self.min_compute_capability
        except ValueError:
            raise ConfigError(
                f"ENGINE_MIN_COMPUTE_CAPABILITY must be like 7.5, not {self.engine_min_compute_capability!r}"
            ) from None

    def derive(self, **changes: Any) -> OperatorConfig:
        """A new value with these fields changed."""
        return replace(self, **changes)

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
