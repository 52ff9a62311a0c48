"""What can keep an InferenceService from being served, drawn as one tree: broad bases to catch, leaves to act on.

A leaf names the condition that turns False, the condition's reason, and how long until it is worth another look. Its
message names the field and the cure: it is what the user reads.
"""

from __future__ import annotations

from typing import ClassVar, Literal

ConditionType = Literal["Ready", "Progressing", "Degraded", "TuningResolved", "ScalingActive"]


class OperatorError(Exception):
    """Base of everything that this package raises on purpose."""


class UserError(OperatorError):
    """Something that the resource's author or the cluster's admin can cure; becomes a condition, never a traceback."""

    condition: ClassVar[ConditionType] = "Degraded"
    reason: ClassVar[str] = "InvalidSpec"
    retry_seconds: ClassVar[float | None] = None
    """Until the next look; None: only a change (or the resync) can help."""


class SpecError(UserError):
    """A field that the API server let through and that can't be."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field


class UnsupportedModelURI(SpecError):
    """``spec.model.uri`` has a scheme that nothing here reads."""

    reason = "UnsupportedModelURI"


class SecretNotFound(UserError):
    """A Secret, or a key in it, that the spec refers to does not exist."""

    reason = "SecretNotFound"
    retry_seconds = 15.0


class NameTaken(UserError):
    """An object with a child's name exists and belongs to somebody else."""

    reason = "NameTaken"
    retry_seconds = 60.0


class ChildRejected(UserError):
    """The API server refused a child for good (invalid, forbidden, over quota)."""

    reason = "ChildRejected"
    retry_seconds = 60.0


class ChildImmutable(UserError):
    """A child can't become what the spec asks for by now."""

    reason = "ChildImmutable"


class TuningError(UserError):
    """The engine can't be sized; nothing new is made, what runs is left alone."""

    condition = "TuningResolved"


class GPUTypeRequired(TuningError):
    """``gpu.type`` is ``auto`` and nothing tells which GPUs there are."""

    reason = "GPUTypeRequired"
    retry_seconds = 60.0


class GPUUnknown(TuningError):
    """Neither the catalogue nor a memory label knows the GPU."""

    reason = "GPUUnknown"
    retry_seconds = 60.0


class GPUUnsupported(TuningError):
    """The engine image can't run on this GPU."""

    reason = "GPUUnsupported"


class ModelShapeUnknown(TuningError):
    """Nothing tells how big the model is."""

    reason = "ModelShapeUnknown"
    retry_seconds = 60.0


class ModelDoesNotFit(TuningError):
    """Weights, or an explicit ``maxModelLen``, need more memory than the GPUs have."""

    reason = "ModelDoesNotFit"


class ApiError(OperatorError):
    """A call to the API server that failed; ``retry_after`` (seconds) is what the server asked for, if it did."""

    def __init__(self, message: str, *, status: int = 0, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after = retry_after


class Conflict(ApiError):
    """What the write was planned on has changed meanwhile: read and plan again."""


class Rejected(ApiError):
    """The API server says that the same request will never pass (400, 403, 422)."""


class Unavailable(ApiError):
    """Too busy, unreachable, or an answer lost on the way: the write may or may not have happened."""


class NotLeading(OperatorError):
    """The local deadline of the lease has passed: no write may begin."""
