"""Which transitions are worth an event: what changed between two statuses, each told once.

The first status of a resource tells only what was decided and what is wrong: that a new resource isn't ready yet is no
news.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

from pagedserve_operator.spec import Json
from pagedserve_operator.status.conditions import Condition, bounded, read_conditions
from pagedserve_operator.status.observed import table
from pagedserve_operator.tuning import Tuning

_ROLLOUT: Final = frozenset({"RollingOut", "RolloutBlocked", "StartupTimeout"})
_DECIDED: Final = ("dtype", "kvCacheDtype", "numBlocks", "maxBatchTokens", "maxModelLen", "useCudaGraph")
_GAP: Final = (
    "there is one replica and no free GPU beside it: nothing answers from the end of the old pod until the new one has "
    "loaded the model; with 2 replicas one always answers"
)

Conditions = Mapping[str, Condition]


@dataclass(frozen=True, slots=True)
class EventNote:
    """An event to be written on the resource."""

    type: Literal["Normal", "Warning"]
    reason: str
    message: str


def transitions(old: Json, new: Json, *, tuning: Tuning | None, gap: bool) -> tuple[EventNote, ...]:
    """The events that lead from one status to the next; none where they say the same."""
    before, after = read_conditions(old), read_conditions(new)
    found = [
        *_of_tuning(old, new, before, after, tuning=tuning),
        *_of_rollout(before, after, gap=gap),
        *_of_trouble(before, after),
        *_of_readiness(before, after),
        *_of_scaling(before, after),
    ]
    # One reason is told once, whichever conditions carry it.
    told = {note.reason: EventNote(note.type, note.reason, bounded(note.message)) for note in reversed(found)}
    return tuple(reversed(told.values()))


def _of_tuning(
    old: Json, new: Json, before: Conditions, after: Conditions, *, tuning: Tuning | None
) -> list[EventNote]:
    if tuning is None or after["TuningResolved"].status != "True":
        return []
    was = before.get("TuningResolved")
    if was is not None and was.status == "True" and _decided(old) == _decided(new):
        return []
    return [EventNote("Normal", "TuningResolved", f"{after['TuningResolved'].message} {_memory(tuning)}")]


def _decided(status: Json) -> tuple[object, ...]:
    # A newer operator may say more about the same decision; only the decision itself is news.
    numbers, gpu = table(status, "tuning"), table(status, "tuning", "gpu")
    return (gpu.get("product"), gpu.get("count"), *(numbers.get(name) for name in _DECIDED))


def _memory(tuning: Tuning) -> str:
    parts = tuning.sizing.breakdown
    return (
        f"Of {parts.total} MiB: weights {parts.weights}, runtime {parts.runtime}, activations {parts.activations}, "
        f"graphs {parts.graphs}, cache {parts.cache}, left over {parts.left_over}."
    )


def _of_rollout(before: Conditions, after: Conditions, *, gap: bool) -> list[EventNote]:
    was, now = before.get("Progressing"), after["Progressing"]
    if was is None or was.reason == now.reason:
        return []
    notes = []
    if now.reason == "Suspended":
        notes.append(EventNote("Normal", "Suspended", now.message))
    if was.reason == "Suspended":
        notes.append(EventNote("Normal", "Resumed", "spec.suspend is false: changes are made again"))
    if now.reason in ("RollingOut", "RolloutBlocked") and was.reason not in _ROLLOUT:
        notes.append(EventNote("Normal", "RolloutStarted", now.message))
        notes += [EventNote("Warning", "RolloutGap", _GAP)] if gap else []
    if now.reason == "Complete" and was.reason in ("RollingOut", "RolloutBlocked"):
        notes.append(EventNote("Normal", "RolloutFinished", now.message))
    return notes


def _of_trouble(before: Conditions, after: Conditions) -> list[EventNote]:
    was, now = before.get("Degraded"), after["Degraded"]
    if now.status == "True" and (was is None or was.status != "True" or was.reason != now.reason):
        return [EventNote("Warning", now.reason, now.message)]
    if now.status == "False" and was is not None and was.status == "True" and not _became_ready(before, after):
        return [EventNote("Normal", "Recovered", f"{was.reason} is over")]
    return []


def _of_readiness(before: Conditions, after: Conditions) -> list[EventNote]:
    was, now = before.get("Ready"), after["Ready"]
    if was is None or was.status == now.status:
        return []
    if now.status == "True":
        return [EventNote("Normal", now.reason, now.message)]
    return [EventNote("Normal" if now.reason == "ScaledToZero" else "Warning", now.reason, now.message)]


def _became_ready(before: Conditions, after: Conditions) -> bool:
    was = before.get("Ready")
    return after["Ready"].status == "True" and was is not None and was.status != "True"


def _of_scaling(before: Conditions, after: Conditions) -> list[EventNote]:
    was, now = before.get("ScalingActive"), after.get("ScalingActive")
    if now is None or (was is not None and (was.status, was.reason) == (now.status, now.reason)):
        return []
    if now.status == "False":
        return [EventNote("Warning", now.reason, now.message)]
    if now.status == "True" and was is not None and was.status == "False":
        return [EventNote("Normal", "ScalingActive", now.message)]
    return []
