"""Why a request of the custom metrics API isn't answered with values: each leaf has its status code and reason."""

from __future__ import annotations

from typing import ClassVar

from pagedserve_operator.errors import OperatorError


class Refusal(OperatorError):
    """Becomes a Status object; the message is what the caller reads."""

    code: ClassVar[int] = 500
    reason: ClassVar[str] = "InternalError"
    retry_after: int | None = None
    """Whole seconds after which it may pass."""


class BadRequest(Refusal):
    """The request can't be understood."""

    code = 400
    reason = "BadRequest"


class Unauthenticated(Refusal):
    """Nobody that is trusted says who asks."""

    code = 401
    reason = "Unauthorized"


class Forbidden(Refusal):
    """Whoever asks may not."""

    code = 403
    reason = "Forbidden"


class NotFound(Refusal):
    """There is no such metric, pod or path."""

    code = 404
    reason = "NotFound"


class TooManyRequests(Refusal):
    """The caller asks more often than it may."""

    code = 429
    reason = "TooManyRequests"

    def __init__(self, message: str, *, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class NotAvailable(Refusal):
    """The API server doesn't answer what is needed to answer."""

    code = 503
    reason = "ServiceUnavailable"
    retry_after = 1
