"""How long an engine may take to come and to go, and the probes and deadlines that follow from it."""

from __future__ import annotations

from math import ceil
from typing import Final

from pagedserve_operator.spec import Json, Lifecycle

DOWNLOAD_MIB_PER_SECOND: Final = 40
"""Of weights from the hub, on a line that several pods share."""
LOAD_MIB_PER_SECOND: Final = 200
"""Of weights from the volume into the device's memory: a network disk's pace."""
WARM_UP_SECONDS: Final = 120
"""Imports, warm-up, compilation, graph capture."""
MIN_STARTUP_SECONDS: Final = 300
PULL_SECONDS: Final = 600
"""Scheduling, volumes and an image of several GiB, before the startup probe's budget begins."""
EXIT_SECONDS: Final = 15
"""From the last answer to the end of the process."""

_STARTUP_PERIOD: Final = 5
_DEAD_GRACE: Final = 30
"""An engine that a probe gives up has nothing to drain."""


def startup_budget_seconds(weights_mib: int, lifecycle: Lifecycle) -> int:
    """From the start of the process until it is ready at the latest: what the user says, else by the weights' size."""
    if lifecycle.startup_timeout_seconds is not None:
        return lifecycle.startup_timeout_seconds
    moving = weights_mib / DOWNLOAD_MIB_PER_SECOND + weights_mib / LOAD_MIB_PER_SECOND
    return max(MIN_STARTUP_SECONDS, _STARTUP_PERIOD * ceil((moving + WARM_UP_SECONDS) / _STARTUP_PERIOD))


def progress_deadline_seconds(weights_mib: int, lifecycle: Lifecycle) -> int:
    """After this long without a new ready pod a rollout counts as failed; later than any pod that still may load."""
    return startup_budget_seconds(weights_mib, lifecycle) + PULL_SECONDS


def grace_seconds(lifecycle: Lifecycle) -> int:
    """From a pod's deletion to SIGKILL: endpoints forget it, running requests end, the process exits."""
    return lifecycle.pre_stop_seconds + lifecycle.drain_seconds + EXIT_SECONDS


def probes(weights_mib: int, lifecycle: Lifecycle) -> Json:
    """Startup, liveness and readiness probes.

    Startup asks for readiness, since the engine is alive long before its model is loaded; until it passes, neither
    of the others is asked, so that liveness never kills a model that loads.
    """
    budget = startup_budget_seconds(weights_mib, lifecycle)
    return {
        "startupProbe": {
            **_get("/health/ready", period=_STARTUP_PERIOD, failures=ceil(budget / _STARTUP_PERIOD)),
            "terminationGracePeriodSeconds": _DEAD_GRACE,
        },
        "livenessProbe": {
            **_get("/health/live", period=10, failures=6),
            "terminationGracePeriodSeconds": _DEAD_GRACE,
        },
        "readinessProbe": _get("/health/ready", period=5, failures=2),
    }


def pre_stop(lifecycle: Lifecycle) -> Json:
    """The handler that waits until the pod has left all endpoints; none for 0 s, which Kubernetes 1.30 refuses."""
    if lifecycle.pre_stop_seconds == 0:
        return {}
    return {"lifecycle": {"preStop": {"sleep": {"seconds": lifecycle.pre_stop_seconds}}}}


def _get(path: str, *, period: int, failures: int) -> Json:
    return {
        "httpGet": {"path": path, "port": "http", "scheme": "HTTP"},
        "periodSeconds": period,
        "timeoutSeconds": 5,
        "failureThreshold": failures,
    }
