"""Why a container of a pod doesn't run, told the same way whichever moment of a crash loop it is seen in.

The kubelet alternates between running, terminated and waiting while a container fails again and again. Verdicts depend
on what stays: the exit code, the termination message, and the restarts in steps.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from pagedserve_operator.names import ENGINE_CONTAINER
from pagedserve_operator.spec import Json
from pagedserve_operator.status.observed import moment, number, rows, table, text

IMAGE_REASONS: Final = frozenset(
    {
        "ErrImagePull",
        "ImagePullBackOff",
        "InvalidImageName",
        "ErrImageNeverPull",
        "ImageInspectError",
        "RegistryUnavailable",
        "SignatureValidationFailed",
    }
)
CONFIG_REASONS: Final = frozenset({"CreateContainerConfigError", "CreateContainerError", "PreStartHookError"})
RESTART_STEPS: Final = (100, 50, 20, 10, 5, 2)
KILLED: Final = frozenset({0, 137, 143})
"""Exit codes of an engine that was told to stop, or killed: 0 after its drain, SIGKILL, SIGTERM."""
SLACK: Final = timedelta(seconds=60)
"""How late the kubelet may act on a probe's last failure."""

# The engine's own words where memory is short; a test asks the engine for them.
_DOES_NOT_FIT: Final = re.compile(
    r"don't fit into the memory|the engine may use|one sequence of that length takes \d+ blocks"
)
_BACK_OFF: Final = re.compile(r'^Back-off pulling image "[^"]*"(: (ErrImagePull: )?)?')
_LOCAL_PORT: Final = re.compile(r":\d+->")


@dataclass(frozen=True, slots=True)
class Cause:
    """One thing that keeps a pod from being ready: a condition's reason and what to say about the pod."""

    reason: str
    detail: str
    recheck: datetime | None = None
    """When time alone may change the verdict."""


def examine_container(status: Json, *, pod: Json, now: datetime, initial: bool = False) -> Cause | None:
    """What is wrong with the container, or what it waits for; None where it is ready, or an init container is done."""
    if status.get("ready") is True:
        return None
    waiting = table(status, "state", "waiting")
    reason = text(waiting, "reason")
    if reason in IMAGE_REASONS:
        return Cause("ImagePullFailed", _pull_failure(status, waiting))
    if reason in CONFIG_REASONS:
        return Cause("ContainerConfigError", f"{_who(status)} can't be created: {text(waiting, 'message') or reason}")
    if initial and table(status, "state", "terminated") and _exit_code(table(status, "state", "terminated")) == 0:
        return None
    if status.get("started") is True and table(status, "state", "running"):
        return _examine_started(status, pod=pod, now=now)
    ended = table(status, "state", "terminated") or table(status, "lastState", "terminated")
    if ended or reason in ("CrashLoopBackOff", "RunContainerError"):
        return _crash(status, ended or waiting, pod=pod)
    if table(status, "state", "running") and not initial:
        return _loading(status, pod=pod, now=now)
    return Cause("PodsStarting", "its image is pulled and its volumes are mounted")


def startup_budget(pod: Json, container: str) -> timedelta | None:
    """How long the container's startup probe may fail; None without one."""
    probe = table(_spec_of(pod, container), "startupProbe")
    if not probe:
        return None
    tries, period = number(probe, "failureThreshold", default=3), number(probe, "periodSeconds", default=10)
    # Whatever the numbers, the sum must stay a time that the clock can hold.
    return timedelta(seconds=min(max(number(probe, "initialDelaySeconds") + tries * period, 1), 10**7))


def _spec_of(pod: Json, container: str) -> Json:
    return next((row for row in rows(pod, "spec", "containers") if row.get("name") == container), {})


def _who(status: Json) -> str:
    name = text(status, "name")
    return "the engine" if name == ENGINE_CONTAINER else f"container {name or 'without a name'}"


def _pull_failure(status: Json, waiting: Json) -> str:
    detail = _LOCAL_PORT.sub("->", _BACK_OFF.sub("", text(waiting, "message")))
    image = text(status, "image") or "without a name"
    return f"image {image} can't be pulled" + (f": {detail}" if detail else "")


def _examine_started(status: Json, *, pod: Json, now: datetime) -> Cause:
    started = moment(status, "state", "running", "startedAt")
    ready = next((row for row in rows(pod, "status", "conditions") if row.get("type") == "Ready"), {})
    unready_since = moment(ready, "lastTransitionTime")
    if started and unready_since and unready_since > started + timedelta(seconds=1):
        return Cause("NotReady", f"{_who(status)} runs and was ready, but its readiness probe fails now: see its logs")
    # The startup probe is through and readiness is about to be asked for the first time.
    return _loading(status, pod=pod, now=now)


def _loading(status: Json, *, pod: Json, now: datetime) -> Cause:
    budget = startup_budget(pod, text(status, "name"))
    if budget is None:
        return Cause("ModelLoading", f"{_who(status)} has started and isn't ready yet")
    seconds = round(budget.total_seconds())
    started = moment(status, "state", "running", "startedAt")
    late = started + budget + SLACK if started else None
    if late and now >= late:
        return Cause("StartupTimeout", _too_slow(status, seconds))
    return Cause("ModelLoading", f"{_who(status)} loads the model, for which it has {seconds} s", late)


def _too_slow(status: Json, seconds: int) -> str:
    return (
        f"{_who(status)} wasn't ready within its {seconds} s: raise spec.lifecycle.startupTimeoutSeconds, or see in "
        "its logs what takes so long"
    )


def _exit_code(ended: Json) -> int:
    return number(ended, "exitCode", default=-1)


def _crash(status: Json, ended: Json, *, pod: Json) -> Cause:
    message, code, kind = text(ended, "message"), _exit_code(ended), text(ended, "reason")
    if _DOES_NOT_FIT.search(message):
        return Cause("ModelDoesNotFit", f"{_who(status)} ended: {message}")
    budget = startup_budget(pod, text(status, "name"))
    if budget is not None and not message and kind != "OOMKilled" and code in KILLED and _ran_for(ended, budget, pod):
        return Cause("StartupTimeout", _too_slow(status, round(budget.total_seconds())))
    how = "can't be started" if code < 0 else f"ended with exit code {code}"
    name = f" ({kind})" if kind not in ("", "Error", "Completed", "CrashLoopBackOff") else ""
    return Cause("CrashLoop", f"{_who(status)} {how}{name}: {_why(status, message, code, kind)}{_restarts(status)}")


def _ran_for(ended: Json, budget: timedelta, pod: Json) -> bool:
    """Whether the container lived as long as one does that never got through its startup probe."""
    begin, end = moment(ended, "startedAt"), moment(ended, "finishedAt")
    if begin is None or end is None:
        return False
    grace = timedelta(seconds=min(max(number(pod, "spec", "terminationGracePeriodSeconds", default=30), 0), 10**7))
    return budget * 0.9 <= end - begin <= budget + grace + SLACK


def _why(status: Json, message: str, code: int, kind: str) -> str:
    # A container in back-off has no word of its own before its first end; the kubelet's changes with every retry.
    if message and kind != "CrashLoopBackOff":
        return message.rstrip(".")
    if kind == "OOMKilled":
        return f"it took more memory than its limit: raise {_limit_of(status)}"
    if code in KILLED:
        return "it was stopped, as a failed liveness probe does: see its logs"
    return "it left no termination message: see its logs"


def _limit_of(status: Json) -> str:
    return (
        "spec.resources.limits.memory" if text(status, "name") == ENGINE_CONTAINER else "the container's memory limit"
    )


def _restarts(status: Json) -> str:
    count = number(status, "restartCount")
    if count < 2:
        return ""
    return f"; restarted at least {next(step for step in RESTART_STEPS if count >= step)} times"
