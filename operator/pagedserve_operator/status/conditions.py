"""Conditions as values: bounded messages, and a transition time that moves with the status alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Final, Literal

from pagedserve_operator.errors import ConditionType
from pagedserve_operator.spec import Json
from pagedserve_operator.status.observed import number, rows, text

ConditionStatus = Literal["True", "False", "Unknown"]
LONGEST_MESSAGE: Final = 1024
ORDER: Final[tuple[ConditionType, ...]] = ("Ready", "Progressing", "Degraded", "TuningResolved", "ScalingActive")


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """One row of ``status.conditions`` but for its time."""

    type: ConditionType
    status: ConditionStatus
    reason: str
    message: str
    observed_generation: int = 0
    """Of the resource that the verdict is about; 0: the current one."""


def bounded(message: str, longest: int = LONGEST_MESSAGE) -> str:
    """``message`` on one line of at most ``longest`` characters."""
    line = " ".join(message.split())
    return line if len(line) <= longest else line[: longest - 1].rstrip() + "…"


def read_conditions(status: Json) -> dict[str, Condition]:
    """By type, the conditions that an earlier status holds."""
    found: dict[str, Condition] = {}
    for row in rows(status, "conditions"):
        kind, verdict = text(row, "type"), text(row, "status")
        for known in ORDER:
            if kind == known:
                found[kind] = Condition(
                    type=known,
                    status="True" if verdict == "True" else "False" if verdict == "False" else "Unknown",
                    reason=text(row, "reason"),
                    message=text(row, "message"),
                    observed_generation=number(row, "observedGeneration"),
                )
    return found


def write_conditions(conditions: Sequence[Condition], *, old: Json, generation: int, now: datetime) -> list[Json]:
    """The rows for ``status.conditions``; the time of a row whose status stays is the old row's."""
    times = {
        (text(row, "type"), text(row, "status")): text(row, "lastTransitionTime") for row in rows(old, "conditions")
    }
    fresh = now.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    ordered = sorted(conditions, key=lambda condition: ORDER.index(condition.type))
    return [
        {
            "type": condition.type,
            "status": condition.status,
            "reason": condition.reason,
            "message": bounded(condition.message),
            "observedGeneration": condition.observed_generation or generation,
            "lastTransitionTime": times.get((condition.type, condition.status)) or fresh,
        }
        for condition in ordered
    ]


def keep_detail(new: Condition, old: Condition | None) -> Condition:
    """``new`` with the old message where that says the same and more: a kubelet in back-off may name no cause."""
    if new.reason != "ImagePullFailed":
        return new
    if old is not None and (old.status, old.reason) == (new.status, new.reason) and old.message.startswith(new.message):
        return replace(new, message=old.message)
    return new
