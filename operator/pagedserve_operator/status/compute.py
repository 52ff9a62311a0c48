"""The status of a resource, from what was observed: gathered once, then judged by small checks in order.

No message holds an age or a time, so that an unchanged world gives an unchanged status.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime

from pagedserve_operator.errors import UserError
from pagedserve_operator.names import selector_labels
from pagedserve_operator.spec import InferenceService, Json
from pagedserve_operator.status.conditions import Condition, read_conditions, write_conditions
from pagedserve_operator.status.events import EventNote, transitions
from pagedserve_operator.status.observed import number, table, text
from pagedserve_operator.status.pods import survey
from pagedserve_operator.status.scaling import MEASURED, Means, scaling_active
from pagedserve_operator.status.verdicts import Facts, degraded, progressing, ready, tuning_resolved
from pagedserve_operator.status.workload import read_workload
from pagedserve_operator.tuning import Tuning, status_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """What was read from the API server beside the resource itself."""

    deployment: Json | None
    pods: tuple[Json, ...]
    """All that carry the two selector labels."""
    hpa: Json | None
    """Ours, or what KEDA has made of our ScaledObject."""
    foreign_hpas: tuple[str, ...]
    """Names of other autoscalers that target the Deployment."""
    service: Json | None
    scaled_object: Json | None = None
    means: Means = field(default_factory=Means)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What to write and to tell."""

    status: Json
    """The whole of ``.status``, without what is no longer so."""
    events: tuple[EventNote, ...]
    look_again_seconds: float | None
    """Until time alone may change the verdict; None: never."""


def compute(
    raw: Json,
    *,
    service: InferenceService | None,
    tuning: Tuning | None,
    problem: UserError | None,
    observation: Observation,
    now: datetime,
) -> Outcome:
    """The status that the resource should have, and the events that its change calls for; never raises."""
    old = table(raw, "status")
    workload = read_workload(observation.deployment)
    gpu = tuning.gpu if tuning is not None else None
    updated = workload.updated if workload.rolling else None
    pods = survey(observation.pods, wanted=workload.wanted, updated=updated, gpu=gpu, now=now)
    facts = Facts(
        service=service, tuning=tuning, problem=problem, workload=workload, pods=pods, old=read_conditions(old)
    )
    generation = number(raw, "metadata", "generation", default=1)
    conditions = [ready(facts), progressing(facts), degraded(facts), tuning_resolved(facts)]
    scaling = _scaling(facts, observation, now)
    if scaling is not None:
        conditions.append(scaling)
    new: Json = {
        "observedGeneration": generation,
        **_numbers(raw, facts),
        **_place(raw, service, observation, old),
        **_tuning_rows(tuning, observation, old),
        "conditions": write_conditions(conditions, old=old, generation=generation, now=now),
    }
    times = [*pods.rechecks(), *([pods.ready_since + MEASURED] if scaling is not None and pods.ready_since else [])]
    waits = [(time - now).total_seconds() for time in times if time > now]
    return Outcome(
        status=new,
        events=transitions(old, new, tuning=tuning, gap=workload.gap),
        look_again_seconds=max(1.0, min(waits)) if waits else None,
    )


def differs(old_status: Json | None, new_status: Json) -> bool:
    """Whether the new status says anything that the old one doesn't, by value; the order of conditions says nothing."""
    return _comparable(old_status or {}) != _comparable(new_status)


def _comparable(status: Json) -> Json:
    rows = status.get("conditions")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        return status
    return {**status, "conditions": sorted(rows, key=lambda row: str(row.get("type")))}


def _scaling(facts: Facts, observation: Observation, now: datetime) -> Condition | None:
    if facts.service is None:
        return facts.old.get("ScalingActive") if observation.hpa is not None else None
    since = facts.pods.ready_since
    return scaling_active(
        facts.service.spec,
        hpa=observation.hpa,
        scaled_object=observation.scaled_object,
        foreign=observation.foreign_hpas,
        measurable=since is not None and now >= since + MEASURED,
        means=observation.means,
    )


def _numbers(raw: Json, facts: Facts) -> Json:
    labels = selector_labels(text(raw, "metadata", "name"))
    return {
        "replicas": facts.workload.replicas,
        "readyReplicas": facts.pods.ready,
        "updatedReplicas": facts.workload.updated,
        "selector": ",".join(f"{label}={value}" for label, value in sorted(labels.items())),
    }


def _place(raw: Json, service: InferenceService | None, observation: Observation, old: Json) -> Json:
    if observation.service is None:
        return {}
    if service is None:
        return {"url": url} if (url := text(old, "url")) else {}
    port = f":{service.spec.service.port}" if service.spec.service.port != 80 else ""
    return {"url": f"http://{text(raw, 'metadata', 'name')}.{service.key.namespace}.svc{port}"}


def _tuning_rows(tuning: Tuning | None, observation: Observation, old: Json) -> Json:
    if tuning is not None:
        return {"image": tuning.image, "tuning": status_of(tuning)}
    # What runs was decided before, even where the newest spec can't be read.
    kept = {"image": text(old, "image"), "tuning": table(old, "tuning")} if observation.deployment is not None else {}
    return {name: value for name, value in kept.items() if value}
