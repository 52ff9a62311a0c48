"""What keeps the pods of one resource from being ready, the most telling cause first and always in the same order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Final

from pagedserve_operator.gpus.resolve import ResolvedGpu
from pagedserve_operator.names import ENGINE_CONTAINER
from pagedserve_operator.spec import Json
from pagedserve_operator.status.containers import SLACK, Cause, examine_container
from pagedserve_operator.status.observed import condition, moment, rows, table, text
from pagedserve_operator.status.scheduling import causes, missing_gpu

TROUBLES: Final = (
    "ModelDoesNotFit",
    "ImagePullFailed",
    "ContainerConfigError",
    "CrashLoop",
    "StartupTimeout",
    "RolloutBlocked",
    "InsufficientGPU",
    "Unschedulable",
    "PodFailed",
    "NotReady",
)
"""Reasons that somebody must act on, the most telling first."""
WAITS: Final = ("ModelLoading", "WaitingForDrain", "PodsStarting")
"""Reasons that pass by themselves."""
NAMED: Final = 3
"""Pods that a message names."""
STUCK: Final = timedelta(seconds=900)
"""After this long without a started container a pod isn't about to start any more."""
FORGOTTEN: Final = timedelta(seconds=3600)
"""After this long a failed pod explains nothing any more; the API server keeps it for days."""

_RANKS: Final = {reason: rank for rank, reason in enumerate((*TROUBLES, *WAITS))}


@dataclass(frozen=True, slots=True)
class Finding:
    """One pod and the cause that tells most about it."""

    pod: str
    cause: Cause

    @property
    def rank(self) -> int:
        """Place among all reasons; lower tells more."""
        return _RANKS[self.cause.reason]


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """All pods at a glance."""

    ready: int
    ready_since: datetime | None
    """When the first of the pods that are ready became so; None where none is."""
    findings: tuple[Finding, ...]
    """Of the pods that aren't ready, in the order of telling."""

    @property
    def trouble(self) -> str:
        """The most telling reason that somebody must act on, or ""."""
        first = self.findings[0].cause.reason if self.findings else ""
        return first if first in TROUBLES else ""

    @property
    def wait(self) -> str:
        """The first reason that passes by itself, or ""."""
        return next((found.cause.reason for found in self.findings if found.cause.reason in WAITS), "")

    def story(self, reason: str) -> str:
        """Which pods have that reason, and why; one detail, that of the pod with the longest."""
        concerned = [found for found in self.findings if found.cause.reason == reason]
        if not concerned:
            return ""
        names = [found.pod for found in concerned]
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        detail = max((found.cause.detail for found in concerned), key=lambda text: (len(text), text))
        return f"{'pod' if len(names) == 1 else 'pods'} {', '.join(names[:NAMED])}{more}: {detail}"

    def rechecks(self) -> tuple[datetime, ...]:
        """When time alone may change a verdict."""
        return tuple(found.cause.recheck for found in self.findings if found.cause.recheck is not None)


def survey(pods: Sequence[Json], *, wanted: int, updated: int | None, gpu: ResolvedGpu | None, now: datetime) -> Survey:
    """Diagnose the pods; those being deleted are no trouble, nor, during a rollout, is what the old template does.

    ``updated`` counts the newest template's pods as the Deployment does; None where nothing rolls.
    """
    live = [pod for pod in pods if not _leaving(pod)]
    ready = sum(_ready(pod) for pod in live)
    times = [moment(condition(pod, "Ready"), "lastTransitionTime") for pod in live if _ready(pod)]
    newest = _newest_template(pods, live, updated) if updated is not None else ""
    judged = [pod for pod in live if _template(pod) == newest] if newest else live
    findings = [
        Finding(text(pod, "metadata", "name") or "without a name", cause)
        for pod in judged or live
        if (cause := examine(pod, gpu=gpu, now=now)) is not None and (cause.reason != "PodFailed" or ready < wanted)
    ]
    findings = _excuse_drains(findings, pods, now)
    if updated is not None and any(_template(pod) != newest for pod in live):
        findings = [_blocked(found) for found in findings]
    return Survey(
        ready=ready,
        ready_since=min((time or now for time in times), default=None),
        findings=tuple(sorted(findings, key=lambda found: (found.rank, found.pod))),
    )


def examine(pod: Json, *, gpu: ResolvedGpu | None, now: datetime) -> Cause | None:
    """What keeps one pod from being ready; None where nothing does, or where it has failed too long ago to matter."""
    if text(pod, "status", "phase") in ("Failed", "Succeeded"):
        return _failed(pod, now)
    if _ready(pod):
        return None
    scheduled = condition(pod, "PodScheduled")
    if scheduled.get("status") == "False":
        return _unscheduled(scheduled, gpu)
    found = [*_container_causes(pod, now)]
    if not found and rows(pod, "status", "containerStatuses"):
        return Cause("NotReady", "its containers are ready and the pod isn't: does its node still report?")
    if not found:
        return _stuck(pod, Cause("PodsStarting", "it is about to start"), now)
    worst = min(found, key=lambda cause: _RANKS[cause.reason])
    return _stuck(pod, worst, now) if worst.reason == "PodsStarting" else worst


def _container_causes(pod: Json, now: datetime) -> list[Cause]:
    found = [
        examine_container(status, pod=pod, now=now, initial=True)
        for status in rows(pod, "status", "initContainerStatuses")
    ]
    # The engine comes first among equals.
    statuses = sorted(rows(pod, "status", "containerStatuses"), key=lambda row: row.get("name") != ENGINE_CONTAINER)
    found += [examine_container(status, pod=pod, now=now) for status in statuses]
    return [cause for cause in found if cause is not None]


def _stuck(pod: Json, cause: Cause, now: datetime) -> Cause:
    since = moment(condition(pod, "PodScheduled"), "lastTransitionTime") or moment(pod, "metadata", "creationTimestamp")
    if since is None:
        return cause
    if now < since + STUCK:
        return replace(cause, recheck=since + STUCK)
    minutes = round(STUCK.total_seconds() / 60)
    detail = (
        f"no container has started for more than {minutes} minutes; `kubectl describe pod` shows which volume or image"
    )
    return Cause("StartupTimeout", detail)


def _failed(pod: Json, now: datetime) -> Cause | None:
    began = moment(pod, "status", "startTime") or moment(pod, "metadata", "creationTimestamp")
    times = [moment(row, "lastTransitionTime") for row in rows(pod, "status", "conditions")]
    last = max((time for time in [began, *times] if time is not None), default=None)
    if last is not None and now >= last + FORGOTTEN:
        return None
    reason, message = text(pod, "status", "reason"), text(pod, "status", "message")
    why = ": ".join(part for part in (reason or text(pod, "status", "phase"), message) if part)
    return Cause("PodFailed", f"it ended for good ({why}) and is being replaced", last + FORGOTTEN if last else None)


def _unscheduled(scheduled: Json, gpu: ResolvedGpu | None) -> Cause:
    message = text(scheduled, "message")
    said = "; ".join(causes(message)) or text(scheduled, "reason") or "nothing yet"
    resource = missing_gpu(message)
    if not resource:
        pinned = gpu is not None and bool(gpu.pin) and "node affinity" in message
        hint = f" (spec.gpu pins the pods to {gpu.product})" if pinned and gpu is not None else ""
        return Cause("Unschedulable", f"no node takes it{hint}; the scheduler says: {said}")
    needed = f"{gpu.count} free {gpu.product} ({resource})" if gpu is not None else f"free {resource}"
    detail = f"no node has {needed}; the scheduler says: {said}. Free GPUs, add nodes, or ask for fewer replicas"
    return Cause("InsufficientGPU", detail)


def _excuse_drains(findings: list[Finding], pods: Sequence[Json], now: datetime) -> list[Finding]:
    """Each pod that still drains excuses one that waits for its resources: that is how rollouts in place go."""
    ends = sorted(end for pod in pods if (end := _drain_end(pod)) is not None and now < end)
    excused = []
    for found in sorted(findings, key=lambda found: found.pod):
        if ends and _lacks_room(found.cause):
            cause = Cause("WaitingForDrain", "it takes the place of a pod that still drains", ends.pop())
            excused.append(Finding(found.pod, cause))
        else:
            excused.append(found)
    return excused


def _drain_end(pod: Json) -> datetime | None:
    """When a pod that is being deleted must have left its node; None for one that stays or has ended."""
    if text(pod, "status", "phase") in ("Failed", "Succeeded"):
        return None
    due = moment(pod, "metadata", "deletionTimestamp")
    return due + SLACK if due else None


def _blocked(found: Finding) -> Finding:
    if not _lacks_room(found.cause):
        return found
    what = "a GPU" if found.cause.reason == "InsufficientGPU" else "room"
    detail = f"the rollout waits for {what} while the old pods hold theirs: {found.cause.detail}"
    return Finding(found.pod, replace(found.cause, reason="RolloutBlocked", detail=detail))


def _lacks_room(cause: Cause) -> bool:
    """Whether the end of another pod would help."""
    return cause.reason in ("InsufficientGPU", "Unschedulable") and "Insufficient " in cause.detail


def _leaving(pod: Json) -> bool:
    return bool(table(pod, "metadata").get("deletionTimestamp"))


def _ready(pod: Json) -> bool:
    return condition(pod, "Ready").get("status") == "True" and text(pod, "status", "phase") not in (
        "Failed",
        "Succeeded",
    )


def _template(pod: Json) -> str:
    return text(pod, "metadata", "labels", "pod-template-hash")


def _newest_template(pods: Sequence[Json], live: Sequence[Json], updated: int) -> str:
    """The one template with as many pods as the Deployment calls updated; else the one whose first pod is the youngest.

    Youth alone would miss a rollback, whose template is the older one, and the pods' number alone a look between two
    counts. An old template's pods may be replaced meanwhile, so that the youngest pod says nothing.
    """
    counted = Counter(map(_template, live))
    alike = [template for template, count in counted.items() if count == updated]
    if len(alike) == 1:
        return alike[0]
    births: dict[str, str] = {}
    for pod in pods:
        born, template = text(pod, "metadata", "creationTimestamp"), _template(pod)
        births[template] = min(births.get(template, born), born)
    return max(births, key=lambda template: (births[template], template), default="")
