"""Maps every exception to an HTTP status and an error body. No other file uses status codes.

A route raises one of the classes below, or lets an exception of memory or of the runtime propagate;
`add_error_handlers` turns each into OpenAI's `{"error": {"message", "type", "param", "code"}}`, or for a client of
Anthropic's API into its `{"type": "error", "error": {"type", "message", "details"}, "request_id"}`. Two statuses are
neither's:

    502  the episode FAILED: `code` is the class of the error that ended it, `trajectory_id` names its record
    507  memory cannot write (disk full, I/O error): no request is acknowledged that isn't stored

    ApiError
    ├── BadRequest       400
    ├── Unauthorized     401, with WWW-Authenticate
    ├── Forbidden        403
    ├── NotFound         404, also for rows of another tenant
    ├── RequestTimeout   408
    ├── Conflict         409
    ├── TooLarge         413
    ├── UnsupportedMediaType 415
    ├── Misdirected      421
    ├── TooManyRequests  429, with Retry-After
    ├── HeadTooLarge     431
    ├── Gone             410
    ├── ClientLeft       499, in metrics only
    ├── EpisodeFailed    502
    ├── NotReady         503, with Retry-After
    │   └── InMaintenance
    ├── Overloaded       503, with Retry-After; 529 for a client of Anthropic's API
    └── NotStored        507

Invariant: every error answer has one of these shapes.
Hazard: the message of an unexpected exception may quote a user's text; it is sent to the client, and not logged here.
"""

from __future__ import annotations

from traceback import format_tb
from typing import Any, cast

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.types import ExceptionHandler, Scope

from memory.errors import (
    AdapterRefused,
    CycleInProgress,
    DocumentTooLong,
    FeedbackConflict,
    IllegalMove,
    IndexUnavailable,
    LastOperatorKey,
    StorageError,
    UnknownCycle,
    UnknownDocument,
    UnknownExample,
    UnknownInsight,
    UnknownKey,
    UnknownPolicy,
    UnknownResponse,
    UnknownRow,
    UnknownTrajectory,
)
from runtime.errors import (
    AdapterError,
    BudgetExceeded,
    EngineBusy,
    EngineError,
    EngineInMaintenance,
    EngineLost,
    EpisodeBusy,
    EpisodeError,
    GameNotCompiled,
    LinkExpired,
    LinkRefused,
    RequestRefused,
    TaskChanged,
    TaskSealed,
    UnknownEnvironment,
    UnknownTask,
)

OK = 200
CREATED = 201
ACCEPTED = 202
RETRY_AFTER_SECONDS = 30
"""Sent during maintenance. The official OpenAI clients obey values up to 60."""
LOAD_STATUSES = (429, 503)
"""Counted as rejections because of load."""
ANTHROPIC_PATHS = "/v1/messages"
"""Below this path, errors always have Anthropic's shape."""
ANTHROPIC_VERSION = "anthropic-version"
"""The header that every client of Anthropic's API sends; with it, errors of all other paths have that shape too."""
ANTHROPIC_OVERLOADED = 529
ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    409: "conflict_error",
    429: "rate_limit_error",
}
"""Type by status; a status that is missing here is an `invalid_request_error` below 500, otherwise an `api_error`."""

log = structlog.get_logger()


class ApiError(Exception):
    """Base of the errors that a route answers with. `param` names the invalid field, `code` is for programs."""

    status = 500
    type = "server_error"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None, **extra: str | None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code
        self.extra = extra
        self.headers: dict[str, str] = {}


class BadRequest(ApiError):
    """The request is invalid."""

    status = 400
    type = "invalid_request_error"


class Unauthorized(ApiError):
    """The API key is missing or not valid."""

    status = 401
    type = "authentication_error"

    def __init__(self, message: str, *, code: str) -> None:
        super().__init__(message, code=code)
        self.headers = {"WWW-Authenticate": "Bearer"}


class Forbidden(ApiError):
    """The key is valid but does not permit this."""

    status = 403
    type = "permission_error"


class NotFound(ApiError):
    """The request names something that does not exist."""

    status = 404
    type = "invalid_request_error"


class Conflict(ApiError):
    """The request is valid but conflicts with the current state."""

    status = 409
    type = "conflict_error"


class TooLarge(ApiError):
    """The request is larger than this server accepts."""

    status = 413
    type = "invalid_request_error"


class RequestTimeout(ApiError):
    """The request did not arrive in time."""

    status = 408
    type = "invalid_request_error"

    def __init__(self, message: str, *, code: str = "request_timeout") -> None:
        super().__init__(message, code=code)
        self.headers = {"Connection": "close"}


class UnsupportedMediaType(ApiError):
    """The body is not JSON."""

    status = 415
    type = "invalid_request_error"


class Misdirected(ApiError):
    """The request names a host under which this server does not answer."""

    status = 421
    type = "invalid_request_error"


class HeadTooLarge(ApiError):
    """The request's headers are larger than this server accepts."""

    status = 431
    type = "invalid_request_error"


class TooManyRequests(ApiError):
    """The key's quota is used up."""

    status = 429
    type = "rate_limit_error"

    def __init__(self, message: str, *, limited: str, retry_after_seconds: int) -> None:
        super().__init__(message, code="rate_limit_exceeded")
        self.type = limited  # "requests" or "tokens", like OpenAI's errors
        self.headers = {"Retry-After": str(retry_after_seconds)}


class Gone(ApiError):
    """The requested resource has expired."""

    status = 410
    type = "invalid_request_error"


class EpisodeFailed(ApiError):
    """The episode closed FAILED; its record is complete up to that point."""

    status = 502
    type = "episode_error"


class ClientLeft(ApiError):
    """The client closed the connection: only logs and metrics see this answer."""

    status = 499
    type = "client_left"


class NotReady(ApiError):
    """The engine does not answer now; the same request may succeed later."""

    status = 503
    type = "not_ready_error"

    def __init__(self, message: str, *, code: str = "engine_not_ready", retry_after_seconds: int = 5) -> None:
        super().__init__(message, code=code)
        self.headers = {"Retry-After": str(retry_after_seconds)}


class InMaintenance(NotReady):
    """The engine is stopped for maintenance; the same request succeeds after it."""

    def __init__(self, message: str, *, code: str = "engine_in_maintenance") -> None:
        super().__init__(message, code=code, retry_after_seconds=RETRY_AFTER_SECONDS)


class Overloaded(ApiError):
    """The server is at capacity; the same request may succeed in a moment."""

    status = 503
    type = "overloaded_error"

    def __init__(self, message: str, *, code: str = "engine_overloaded", **extra: str | None) -> None:
        super().__init__(message, code=code, **extra)
        self.headers = {"Retry-After": "1"}


class NotStored(ApiError):
    """Memory cannot write: the disk is full or fails. Nothing of the request was stored."""

    status = 507
    type = "storage_error"


class ErrorBody(BaseModel):
    """The fields of an error."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None
    trajectory_id: str | None = None


class ErrorAnswer(BaseModel):
    """The body of every error answer, like the OpenAI API's."""

    error: ErrorBody


class AnthropicErrorDetails(BaseModel):
    """The code of an error, for programs."""

    error_code: str


class AnthropicErrorBody(BaseModel):
    """The fields of an error in Anthropic's API."""

    type: str
    message: str
    details: AnthropicErrorDetails | None = None


class AnthropicErrorAnswer(BaseModel):
    """The body of an error answer to a client of Anthropic's API."""

    type: str = "error"
    error: AnthropicErrorBody
    request_id: str | None


# Exceptions of memory and the runtime. The first class in an exception's MRO decides: the order here does not matter.
KNOWN_EXCEPTIONS: dict[type[Exception], tuple[type[ApiError], str]] = {
    UnknownTrajectory: (NotFound, "trajectory_not_found"),
    UnknownPolicy: (NotFound, "policy_not_found"),
    UnknownDocument: (NotFound, "document_not_found"),
    UnknownExample: (NotFound, "example_not_found"),
    UnknownInsight: (NotFound, "insight_not_found"),
    UnknownCycle: (NotFound, "cycle_not_found"),
    UnknownResponse: (NotFound, "response_not_found"),
    UnknownKey: (NotFound, "key_not_found"),
    UnknownRow: (NotFound, "not_found"),
    UnknownEnvironment: (NotFound, "environment_not_found"),
    UnknownTask: (NotFound, "task_not_found"),
    TaskSealed: (Forbidden, "task_sealed"),
    LinkRefused: (NotFound, "link_not_found"),
    LinkExpired: (Gone, "link_expired"),
    EpisodeBusy: (Conflict, "episode_busy"),
    IllegalMove: (Conflict, "illegal_move"),
    LastOperatorKey: (Conflict, "last_operator_key"),
    CycleInProgress: (Conflict, "cycle_in_progress"),
    FeedbackConflict: (Conflict, "feedback_conflict"),
    DocumentTooLong: (TooLarge, "document_too_long"),
    AdapterRefused: (Conflict, "adapter_refused"),
    AdapterError: (Conflict, "adapter_refused"),
    StorageError: (NotStored, "storage_error"),
    EngineInMaintenance: (InMaintenance, "engine_in_maintenance"),
    EngineError: (NotReady, "engine_not_ready"),
    IndexUnavailable: (NotReady, "encoder_unavailable"),
    # Of an episode these four are recorded and not raised: they come from a call outside of one.
    RequestRefused: (BadRequest, "request_refused"),
    BudgetExceeded: (BadRequest, "context_length_exceeded"),
    EngineBusy: (Overloaded, "engine_overloaded"),
    EngineLost: (NotReady, "engine_not_ready"),
    EpisodeError: (EpisodeFailed, "episode_failed"),
    GameNotCompiled: (EpisodeFailed, "game_not_compiled"),
    TaskChanged: (EpisodeFailed, "task_changed"),
    # Also the ValueError of a bug: it is answered with 400 and is not logged.
    ValueError: (BadRequest, "invalid_value"),
}


def error_body(error: ApiError) -> dict[str, Any]:
    """Return the JSON body that answers with `error`."""
    fields = {"message": str(error), "type": error.type, "param": error.param, "code": error.code, **error.extra}
    return {"error": fields}


def is_anthropic(scope: Scope) -> bool:
    """Return whether a request comes from a client of Anthropic's API."""
    is_below = scope["path"] == ANTHROPIC_PATHS or scope["path"].startswith(f"{ANTHROPIC_PATHS}/")
    return is_below or any(name == ANTHROPIC_VERSION.encode() for name, _ in scope["headers"])


def anthropic_body(error: ApiError) -> dict[str, Any]:
    """Return the JSON body that answers with `error` in Anthropic's shape; `request_id` is the trajectory's id."""
    kind = ANTHROPIC_TYPES.get(error.status, "api_error" if error.status >= ApiError.status else BadRequest.type)
    if isinstance(error, Overloaded):
        kind = "overloaded_error"
    message = str(error)
    if error.code == "context_length_exceeded":
        message = f"prompt is too long: {message}"  # the words by which clients know that they have to shorten it
    fields: dict[str, Any] = {"type": kind, "message": message}
    if error.code is not None:
        fields["details"] = {"error_code": error.code}
    return {"type": "error", "error": fields, "request_id": error.extra.get("trajectory_id")}


def classify(error: Exception) -> ApiError:
    """Return the API error for any exception; an unexpected one becomes a 500 that names its class."""
    if isinstance(error, ApiError):
        return error
    for parent in type(error).__mro__:
        if parent in KNOWN_EXCEPTIONS:
            kind, code = KNOWN_EXCEPTIONS[parent]
            # The table may name only classes whose constructor takes a message and a code.
            return kind(str(error) or parent.__name__, code=code)
    return ApiError(f"{type(error).__name__}: {error}", code="internal_error")


def describe_invalid(error: RequestValidationError) -> ApiError:
    """Return an error for FastAPI's validation: a sentence on the first invalid field, and the number of others."""
    problems = list(error.errors())
    first = problems[0]
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", "it does not parse")
        return BadRequest(
            f"the body is not valid JSON: {reason} at character {first['loc'][-1]}", code="malformed_json"
        )
    field = ".".join(str(part) for part in first["loc"] if part not in ("body", "query", "path", "header"))
    message = first["msg"].removeprefix("Value error, ")  # pydantic's prefix for a validator's ValueError
    value = "" if first["type"] == "missing" or field == "" else f" (got {_shorten(first.get('input'))})"
    more = f"; and {len(problems) - 1} more" if len(problems) > 1 else ""
    return BadRequest(f"{field or 'the body'}: {message}{value}{more}", param=field or None, code="invalid_value")


def _shorten(value: object, limit: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def error_responses(*kinds: type[ApiError], model: type[BaseModel] = ErrorAnswer) -> dict[int | str, dict[str, Any]]:
    """Return the `responses` argument of a route that may answer with these errors, for the OpenAPI document."""
    return {kind.status: {"model": model, "description": (kind.__doc__ or "").split("\n")[0]} for kind in kinds}


def error_response(error: ApiError, scope: Scope) -> JSONResponse:
    """Return the HTTP response for `error` in the shape that the request's client reads, headers included."""
    if not is_anthropic(scope):
        return JSONResponse(error_body(error), status_code=error.status, headers=error.headers)
    status = ANTHROPIC_OVERLOADED if isinstance(error, Overloaded) else error.status
    headers = error.headers | request_id_header(error.extra.get("trajectory_id"))
    return JSONResponse(anthropic_body(error), status_code=status, headers=headers)


def request_id_header(trajectory_id: str | None) -> dict[str, str]:
    """Return the header in which Anthropic's clients find the id to report: the record's, if there is one."""
    return {"request-id": trajectory_id} if trajectory_id else {}


def add_error_handlers(app: FastAPI) -> None:
    """Register handlers with `app` that answer every exception in the shape that its client reads."""

    async def answer_invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return error_response(describe_invalid(error), request.scope)

    async def answer_http(request: Request, error: HTTPException) -> JSONResponse:
        kind = NotFound if error.status_code == NotFound.status else BadRequest
        api_error = kind(f"{error.detail}: {request.method} {request.url.path}", code="no_such_route")
        api_error.status = error.status_code
        api_error.headers = dict(error.headers or {})
        return error_response(api_error, request.scope)

    async def answer_exception(request: Request, error: Exception) -> JSONResponse:
        api_error = classify(error)
        if api_error.status in LOAD_STATUSES:
            request.app.state.services.agent.telemetry.shed(api_error.code or api_error.type)
        if isinstance(api_error, NotStored) or type(api_error) is ApiError:
            # Only the class of an unexpected exception is logged: its message may quote a user's text.
            description = repr(error) if isinstance(error, StorageError) else type(error).__name__
            trace = "".join(format_tb(error.__traceback__))
            # The route, not the path: the path of a feedback link is its token.
            route = getattr(request.scope.get("route"), "path", None)
            log.error("request failed", route=route, error=description, trace=trace)
        return error_response(api_error, request.scope)

    # Starlette types handlers as taking any Exception, although it calls each with its own class only.
    app.add_exception_handler(RequestValidationError, cast(ExceptionHandler, answer_invalid))
    app.add_exception_handler(HTTPException, cast(ExceptionHandler, answer_http))
    # `Exception` alone is handled by Starlette outside of all middleware, and raised again after the answer: such a 500
    # has no CORS headers, and uvicorn 0.54 logs it with a traceback (observability/logs.py leaves its message out).
    for kind in (ApiError, *KNOWN_EXCEPTIONS, Exception):
        app.add_exception_handler(kind, answer_exception)
