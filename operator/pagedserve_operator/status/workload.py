"""What a Deployment says about itself: how many pods it wants, whether it rolls, and what it complains about."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from pagedserve_operator.spec import Json
from pagedserve_operator.status.observed import condition, number, table, text

_REVISION: Final = "deployment.kubernetes.io/revision"
_UNDER_WAY: Final = frozenset(
    {"NewReplicaSetCreated", "FoundNewReplicaSet", "ReplicaSetUpdated", "ProgressDeadlineExceeded"}
)
_GENERATED_NAME: Final = re.compile(r'pods? "[^"]*"')


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """The engine's Deployment at a glance; all counts are of pods."""

    exists: bool
    wanted: int
    replicas: int
    updated: int
    current: bool
    """Whether its controller has seen the newest generation; else the counts are of the one before."""
    rolling: bool
    """Whether a template follows another one; the first template's pods are a start, no rollout."""
    late: bool
    """Whether the progress deadline has passed."""
    deadline_seconds: int
    refusal: str
    """Why pods can't be made at all, or ""; without generated names, which change with every try."""
    gap: bool
    """Whether a rollout leaves nothing to answer for a while: one pod and none beside it."""

    @property
    def needed(self) -> int:
        """Ready pods from which on the resource counts as ready."""
        return max(1, self.wanted - 1)


def read_workload(deployment: Json | None) -> Workload:
    """The facts of a Deployment; of one that does not exist, those of nothing."""
    wanted = max(0, number(deployment, "spec", "replicas", default=1))
    replicas, updated = number(deployment, "status", "replicas"), number(deployment, "status", "updatedReplicas")
    progress = condition(deployment, "Progressing")
    failure = condition(deployment, "ReplicaFailure")
    under_way = text(progress, "reason") in _UNDER_WAY if progress else updated < replicas
    return Workload(
        exists=bool(deployment),
        wanted=wanted,
        replicas=replicas,
        updated=updated,
        current=_is_current(deployment),
        rolling=under_way and text(deployment, "metadata", "annotations", _REVISION) not in ("", "1"),
        late=text(progress, "reason") == "ProgressDeadlineExceeded",
        deadline_seconds=number(deployment, "spec", "progressDeadlineSeconds", default=600),
        refusal=_GENERATED_NAME.sub("pods", text(failure, "message")) if failure.get("status") == "True" else "",
        gap=wanted == 1 and not _surges(deployment),
    )


def _is_current(deployment: Json | None) -> bool:
    seen = number(deployment, "status", "observedGeneration")
    return seen > 0 and seen >= number(deployment, "metadata", "generation", default=1)


def _surges(deployment: Json | None) -> bool:
    strategy = table(deployment, "spec", "strategy")
    surge = table(strategy, "rollingUpdate").get("maxSurge", "25%")
    return strategy.get("type") != "Recreate" and surge not in (0, "0", "0%")
