"""Every error that the engine raises on purpose, drawn once as a tree.

Catch the broad bases, act on the leaves. Each class knows the HTTP status and the OpenAI ``type`` and ``code`` under
which a client sees it, so that no route decides them again.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import ClassVar


class PagedServeError(Exception):
    """Base of everything that the engine raises on purpose."""

    status: ClassVar[HTTPStatus] = HTTPStatus.INTERNAL_SERVER_ERROR
    type: ClassVar[str] = "server_error"
    code: ClassVar[str | None] = None

    def __init__(self, message: str, *, param: str | None = None, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        """The request's or the configuration's field at fault."""
        self.retry_after = retry_after
        """Seconds after which trying again is sensible, where it is."""


# --- before serving: these end the process with a termination message ------------------------------------------------


class StartupError(PagedServeError):
    """The engine can't start; the message says which setting to change."""


class ConfigError(StartupError):
    """A setting has an impossible value."""


class ModelLoadError(StartupError):
    """The model can't be found, read or converted."""


class UnsupportedModelError(StartupError):
    """The model's architecture doesn't fit the paged cache; the message says why."""


class MemoryPlanError(StartupError):
    """Weights, or an explicit length, don't fit; the message says what would."""


# --- one request: the client's doing --------------------------------------------------------------------------------


class RequestError(PagedServeError):
    """The request can't be served as it stands."""

    status = HTTPStatus.BAD_REQUEST
    type = "invalid_request_error"


class InvalidParameterError(RequestError):
    """A field is unknown, of the wrong type, or out of range."""

    code = "invalid_value"


class NoChatTemplateError(RequestError):
    """The model has no chat template."""

    code = "no_chat_template"


class ContextLengthError(RequestError):
    """The request can never fit; the message says what would."""

    code = "context_length_exceeded"


class RequestTooLargeError(RequestError):
    """The body is larger than the server reads."""

    status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE


class AuthenticationError(RequestError):
    """No key, or a wrong one."""

    status = HTTPStatus.UNAUTHORIZED
    type = "authentication_error"
    code = "invalid_api_key"


class ModelNotFoundError(RequestError):
    """The named model isn't served here."""

    status = HTTPStatus.NOT_FOUND
    type = "not_found_error"
    code = "model_not_found"


class NotFoundError(RequestError):
    """No such route."""

    status = HTTPStatus.NOT_FOUND
    type = "not_found_error"


class MethodNotAllowedError(RequestError):
    """The route exists, but not with this method."""

    status = HTTPStatus.METHOD_NOT_ALLOWED


# --- one request: the engine's doing --------------------------------------------------------------------------------


class CancelledRequestError(PagedServeError):
    """The request was cancelled before it ended."""

    status = HTTPStatus.BAD_REQUEST
    type = "invalid_request_error"
    code = "cancelled"


class RequestTimeoutError(PagedServeError):
    """The request ran longer than the server's limit."""

    status = HTTPStatus.GATEWAY_TIMEOUT
    type = "timeout_error"
    code = "request_timeout"


class OverloadedError(PagedServeError):
    """Try again later, here or at another replica."""

    type = "overloaded_error"


class QueueFullError(OverloadedError):
    """As many requests wait as may wait."""

    status = HTTPStatus.TOO_MANY_REQUESTS
    code = "queue_full"


class DrainingError(OverloadedError):
    """The engine is about to leave and takes nothing new."""

    status = HTTPStatus.SERVICE_UNAVAILABLE
    code = "draining"


class NotReadyError(OverloadedError):
    """The model is still loading."""

    status = HTTPStatus.SERVICE_UNAVAILABLE
    code = "not_ready"


class EngineError(PagedServeError):
    """The core failed; the client did nothing wrong."""


class StepFailedError(EngineError):
    """The step that computed this request failed; the engine goes on."""

    code = "step_failed"


class OutOfDeviceMemoryError(EngineError):
    """A step did not fit into the device's memory; a smaller one may."""

    code = "out_of_memory"


class DeviceFailedError(EngineError):
    """The device failed for good: nothing that runs on it can be trusted any more."""

    code = "device_failed"


class EngineDeadError(EngineError):
    """The core is dead or the device failed for good; the process ends."""

    status = HTTPStatus.SERVICE_UNAVAILABLE
    code = "engine_dead"
