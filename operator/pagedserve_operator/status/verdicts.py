"""The verdicts about one resource: small checks in order, each a condition with its reason and what to do about it.

Facts and wishes are kept apart: pods that answer keep ``Ready`` true whatever is wrong with the newest spec, and
``observedGeneration`` of a condition says which generation it is about.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

from pagedserve_operator.errors import TuningError, UserError
from pagedserve_operator.spec import InferenceService
from pagedserve_operator.status.conditions import Condition, ConditionStatus, keep_detail
from pagedserve_operator.status.pods import Survey
from pagedserve_operator.status.workload import Workload
from pagedserve_operator.tuning import Tuning

_WAITING: Final[Mapping[str, str]] = {
    "ModelLoading": "the model is being loaded",
    "WaitingForDrain": "a new pod takes the place of one that still drains",
    "PodsStarting": "pods are starting",
}
_CARRIED: Final = frozenset({"Complete", "RollingOut", *_WAITING})


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """Everything that the checks look at."""

    service: InferenceService | None
    tuning: Tuning | None
    problem: UserError | None
    workload: Workload
    pods: Survey
    old: Mapping[str, Condition]

    @property
    def suspended(self) -> bool:
        """Whether the children are left as they are."""
        return self.service is not None and self.service.spec.suspend

    @property
    def enough(self) -> bool:
        """Whether as many pods are ready as must be."""
        return self.workload.exists and self.workload.wanted > 0 and self.pods.ready >= self.workload.needed

    @property
    def tally(self) -> str:
        """How many replicas of how many, as the beginning of a sentence."""
        return f"{self.pods.ready} of {self.workload.wanted} {'replica is' if self.pods.ready == 1 else 'replicas are'}"

    @property
    def late_message(self) -> str:
        """What to do about a progress deadline that has passed."""
        return (
            f"not all replicas were ready within {self.workload.deadline_seconds} s: see the pods' logs, or raise "
            "spec.lifecycle.startupTimeoutSeconds"
        )


def ready(facts: Facts) -> Condition:
    """``Ready``: enough pods answer, for the generation that it names."""
    old = facts.old.get("Ready")
    unseen = not facts.workload.current or facts.problem is not None or facts.suspended
    # What runs, well or not, still is the generation that was judged last.
    about = old.observed_generation if unseen and old is not None and facts.workload.exists else 0
    if facts.enough and (facts.workload.current or (old is not None and old.status == "True")):
        message = f"{facts.tally} ready"
        return Condition(type="Ready", status="True", reason="Available", message=message, observed_generation=about)
    reason, message = _unready(facts)
    new = Condition(type="Ready", status="False", reason=reason, message=message, observed_generation=about)
    return keep_detail(new, old)


def _unready(facts: Facts) -> tuple[str, str]:
    """The most telling reason, and the message."""
    if facts.workload.exists and facts.workload.wanted == 0:
        return "ScaledToZero", "the Deployment is scaled to 0: set spec.replicas to 1 or more"
    short = f"{facts.tally} ready and {facts.workload.needed} must be"
    cause = _cause(facts)
    if cause is not None:
        return cause[0], f"{short}: {cause[1]}" if facts.workload.exists else cause[1]
    if facts.suspended and not facts.workload.exists:
        return "Suspended", "spec.suspend is true: nothing is made until it is false"
    wait = facts.pods.wait or "PodsStarting"
    return wait, f"{short}; {_WAITING[wait]}"


def _cause(facts: Facts) -> tuple[str, str] | None:
    """What somebody must act on: what keeps pods from running first, then what keeps the newest spec from them."""
    if facts.pods.trouble:
        return facts.pods.trouble, facts.pods.story(facts.pods.trouble)
    if facts.workload.refusal:
        return "PodsRejected", f"pods can't be made: {facts.workload.refusal}"
    if facts.problem is not None:
        return facts.problem.reason, str(facts.problem)
    if facts.workload.late:
        return "StartupTimeout", facts.late_message
    return None


def progressing(facts: Facts) -> Condition:
    """``Progressing``: pods start, load or roll, and nobody has to do anything about it."""
    if facts.suspended:
        return _progress("False", "Suspended", "spec.suspend is true: nothing is changed until it is false")
    if not facts.workload.current and facts.problem is None:
        old = facts.old.get("Progressing")
        return (
            old if old is not None and old.reason in _CARRIED else _progress("True", "PodsStarting", _starting(facts))
        )
    if facts.pods.trouble == "RolloutBlocked" or facts.workload.late:
        reason, message = _cause(facts) or ("StartupTimeout", facts.late_message)
        return _progress("False", reason, message)
    if facts.workload.rolling:
        message = f"{facts.workload.updated} of {facts.workload.wanted} replicas have the newest template"
        return _progress("True", "RollingOut", message)
    if facts.pods.wait:
        return _progress("True", facts.pods.wait, f"{facts.tally} ready; {_WAITING[facts.pods.wait]}")
    cause = _cause(facts)
    if cause is not None:
        return keep_detail(_progress("False", *cause), facts.old.get("Progressing"))
    if facts.pods.ready < facts.workload.wanted:
        return _progress("True", "PodsStarting", _starting(facts))
    return _progress("False", "Complete", f"{facts.tally} ready, with the newest template")


def _progress(status: ConditionStatus, reason: str, message: str) -> Condition:
    return Condition(type="Progressing", status=status, reason=reason, message=message)


def _starting(facts: Facts) -> str:
    return f"{facts.tally} ready; {_WAITING['PodsStarting']}"


def degraded(facts: Facts) -> Condition:
    """``Degraded``: somebody must act, even where enough pods answer."""
    cause = _cause(facts)
    if facts.problem is not None and cause is not None and cause[0] != facts.problem.reason:
        cause = facts.problem.reason, f"{facts.problem}; besides, {cause[0]}: {cause[1]}"
    if cause is None:
        return Condition(type="Degraded", status="False", reason="AsExpected", message="nothing needs a hand")
    new = Condition(type="Degraded", status="True", reason=cause[0], message=cause[1])
    return keep_detail(new, facts.old.get("Degraded"))


def tuning_resolved(facts: Facts) -> Condition:
    """``TuningResolved``: the GPU is known and the engine is sized for it."""
    if isinstance(facts.problem, TuningError):
        return Condition(type="TuningResolved", status="False", reason=facts.problem.reason, message=str(facts.problem))
    old = facts.old.get("TuningResolved")
    if facts.tuning is None:
        reason = facts.problem.reason if facts.problem is not None else "Suspended" if facts.suspended else "Pending"
        message = (
            "nothing is sized before the spec's other trouble is cured" if facts.problem else "nothing is sized yet"
        )
        return Condition(type="TuningResolved", status="Unknown", reason=reason, message=message)
    new = Condition(type="TuningResolved", status="True", reason="Resolved", message=describe(facts.tuning))
    behind = facts.problem is not None or facts.suspended
    return replace(new, observed_generation=old.observed_generation) if behind and old is not None else new


def describe(tuning: Tuning) -> str:
    """The numbers in one line, and why this GPU."""
    sizing, gpu = tuning.sizing, tuning.gpu
    where = gpu.product if gpu.resource is None else f"{gpu.count} {gpu.product}"
    return (
        f"{where}, {sizing.dtype}: {sizing.num_blocks} blocks of {sizing.block_size} tokens, {sizing.max_batch_tokens} "
        f"tokens a step, {sizing.max_model_len} tokens a request. {gpu.reason}"
    )
