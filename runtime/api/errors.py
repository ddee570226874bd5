"""What went wrong, as an OpenAI client understands it. The only file of the project that knows HTTP status codes.

Refuses to know where an error came from or how to avoid it: an exception's own message names the offender and the mend.
Flow: a route raises one of the classes below, or lets an exception of memory or of the runtime pass;
`add_error_handlers` turns each into `{"error": {"message", "type", "param", "code"}}`. Two statuses are ours:

    502  the episode FAILED: `code` is the class of the error that ended it, `trajectory_id` leads to its record
    507  memory cannot write (disk full, I/O error): nothing is acknowledged that isn't stored

    ApiError
    ├── BadRequest       400
    ├── Unauthorized     401, with WWW-Authenticate
    ├── Forbidden        403
    ├── NotFound         404, also for what is another tenant's
    ├── Conflict         409
    ├── TooLarge         413
    ├── TooManyRequests  429, with Retry-After
    ├── Gone             410
    ├── ClientLeft       499, read by nobody
    ├── EpisodeFailed    502
    ├── NotReady         503, with Retry-After
    │   └── InMaintenance
    ├── Overloaded       503, with Retry-After
    └── NotStored        507

Invariant: no answer, however unlucky, is of any other shape.
"""

from __future__ import annotations

from collections.abc import Mapping
from traceback import format_tb
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from memory.errors import (
    AdapterRefused,
    CycleInProgress,
    DocumentTooLong,
    FeedbackConflict,
    IllegalMove,
    LastOperatorKey,
    StorageError,
    UnknownCycle,
    UnknownDocument,
    UnknownInsight,
    UnknownKey,
    UnknownPolicy,
    UnknownResponse,
    UnknownRow,
    UnknownTrajectory,
)
from runtime.errors import (
    AdapterError,
    EngineError,
    EngineInMaintenance,
    EpisodeBusy,
    EpisodeError,
    GameNotCompiled,
    LinkExpired,
    LinkRefused,
    UnknownEnvironment,
    UnknownTask,
)

OK = 200
CREATED = 201
ACCEPTED = 202
RETRY_AFTER_SECONDS = 30
"""What is told to whom comes during maintenance; the official clients heed up to 60."""
SHED = (429, 503)
"""What is counted as turned away for the load's sake."""

log = structlog.get_logger()


class ApiError(Exception):
    """Something a route says no with. `param` names the field at fault, `code` is for programs."""

    status = 500
    type = "server_error"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None, **extra: Any) -> None:
        super().__init__(message)
        self.param = param
        self.code = code
        self.extra = extra
        self.headers: dict[str, str] = {}


class BadRequest(ApiError):
    """The request itself is at fault."""

    status = 400
    type = "invalid_request_error"


class Unauthorized(ApiError):
    """No key, or none that is known here."""

    status = 401
    type = "authentication_error"

    def __init__(self, message: str, *, code: str) -> None:
        super().__init__(message, code=code)
        self.headers = {"WWW-Authenticate": "Bearer"}


class Forbidden(ApiError):
    """The key is known, but this is not for it."""

    status = 403
    type = "permission_error"


class NotFound(ApiError):
    """The request names something that is not there."""

    status = 404
    type = "invalid_request_error"


class Conflict(ApiError):
    """The request is sound, but something else stands in its way."""

    status = 409
    type = "conflict_error"


class TooLarge(ApiError):
    """The request is longer than this server takes."""

    status = 413
    type = "invalid_request_error"


class TooManyRequests(ApiError):
    """The key's quota is used up for now."""

    status = 429
    type = "rate_limit_error"

    def __init__(self, message: str, *, limited: str, retry_after_seconds: int) -> None:
        super().__init__(message, code="rate_limit_exceeded")
        self.type = limited  # "requests" or "tokens", as OpenAI has it
        self.headers = {"Retry-After": str(retry_after_seconds)}


class Gone(ApiError):
    """What was asked for was there, and its time is over."""

    status = 410
    type = "invalid_request_error"


class EpisodeFailed(ApiError):
    """The episode closed FAILED; its record is complete up to that point."""

    status = 502
    type = "episode_error"


class ClientLeft(ApiError):
    """The client closed the connection; nobody reads this."""

    status = 499
    type = "client_left"


class NotReady(ApiError):
    """The engine does not answer yet, or not now; the same request may succeed later."""

    status = 503
    type = "not_ready_error"

    def __init__(self, message: str, *, code: str = "engine_not_ready", retry_after_seconds: int = 5) -> None:
        super().__init__(message, code=code)
        self.headers = {"Retry-After": str(retry_after_seconds)}


class InMaintenance(NotReady):
    """The engine is stopped on purpose and comes back by itself; the same request succeeds then."""

    def __init__(self, message: str, *, code: str = "engine_in_maintenance") -> None:
        super().__init__(message, code=code, retry_after_seconds=RETRY_AFTER_SECONDS)


class Overloaded(ApiError):
    """There is more to do than the engine holds; the same request may be taken in a moment."""

    status = 503
    type = "overloaded_error"

    def __init__(self, message: str, *, code: str = "engine_overloaded", **extra: Any) -> None:
        super().__init__(message, code=code, **extra)
        self.headers = {"Retry-After": "1"}


class NotStored(ApiError):
    """Memory cannot write: the disk is full or fails. Nothing of the request was kept."""

    status = 507
    type = "storage_error"


class ErrorBody(BaseModel):
    """The inside of an error answer."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None
    trajectory_id: str | None = None


class ErrorAnswer(BaseModel):
    """The shape of every error, as the OpenAI API has it."""

    error: ErrorBody


# What memory and the runtime raise, and what each becomes. The nearest class counts.
KNOWN_EXCEPTIONS: dict[type[Exception], tuple[type[ApiError], str]] = {
    UnknownTrajectory: (NotFound, "trajectory_not_found"),
    UnknownPolicy: (NotFound, "policy_not_found"),
    UnknownDocument: (NotFound, "document_not_found"),
    UnknownInsight: (NotFound, "insight_not_found"),
    UnknownCycle: (NotFound, "cycle_not_found"),
    UnknownResponse: (NotFound, "response_not_found"),
    UnknownKey: (NotFound, "key_not_found"),
    UnknownRow: (NotFound, "not_found"),
    UnknownEnvironment: (NotFound, "environment_not_found"),
    UnknownTask: (NotFound, "task_not_found"),
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
    EpisodeError: (EpisodeFailed, "episode_failed"),
    GameNotCompiled: (EpisodeFailed, "game_not_compiled"),
    ValueError: (BadRequest, "invalid_value"),
}


def error_body(error: ApiError) -> dict[str, Any]:
    """Return the body of the answer that `error` becomes."""
    inside = {"message": str(error), "type": error.type, "param": error.param, "code": error.code, **error.extra}
    return {"error": inside}


def classify(error: Exception) -> ApiError:
    """Return the API error that `error` becomes; what nobody foresaw becomes a 500 that names its class."""
    if isinstance(error, ApiError):
        return error
    for parent in type(error).__mro__:
        if parent in KNOWN_EXCEPTIONS:
            kind, code = KNOWN_EXCEPTIONS[parent]
            return kind(str(error) or parent.__name__, code=code)
    return ApiError(f"{type(error).__name__}: {error}", code="internal_error")


def describe_invalid(error: RequestValidationError) -> ApiError:
    """Return one sentence for what FastAPI found wrong with a request: the first field at fault, and how many more."""
    problems = list(error.errors())
    first = problems[0]
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", "it does not parse")
        return BadRequest(
            f"the body is not valid JSON: {reason} at character {first['loc'][-1]}", code="malformed_json"
        )
    place = ".".join(str(part) for part in first["loc"] if part not in ("body", "query", "path", "header"))
    message = first["msg"].removeprefix("Value error, ")
    offender = "" if first["type"] == "missing" or place == "" else f" (got {_shorten(first.get('input'))})"
    more = f"; and {len(problems) - 1} more" if len(problems) > 1 else ""
    return BadRequest(f"{place or 'the body'}: {message}{offender}{more}", param=place or None, code="invalid_value")


def _shorten(value: Any, limit: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def refusals(*kinds: type[ApiError]) -> Mapping[int | str, dict[str, Any]]:
    """Return the `responses` of a route that may refuse in these ways, for the OpenAPI page."""
    return {kind.status: {"model": ErrorAnswer, "description": (kind.__doc__ or "").split("\n")[0]} for kind in kinds}


def respond(error: ApiError) -> JSONResponse:
    return JSONResponse(error_body(error), status_code=error.status, headers=error.headers)


def add_error_handlers(app: FastAPI) -> None:
    """Teach `app` to answer every error in the one shape."""

    async def answer_invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        return respond(describe_invalid(error))

    async def answer_http(request: Request, error: HTTPException) -> JSONResponse:
        kind = NotFound if error.status_code == NotFound.status else BadRequest
        refusal = kind(f"{error.detail}: {request.method} {request.url.path}", code="no_such_route")
        refusal.status = error.status_code
        refusal.headers = dict(error.headers or {})
        return respond(refusal)

    async def answer_known(request: Request, error: Exception) -> JSONResponse:
        refusal = classify(error)
        if refusal.status in SHED:
            request.app.state.services.agent.telemetry.shed(refusal.code or refusal.type)
        if isinstance(refusal, NotStored) or type(refusal) is ApiError:
            # Without the message of what nobody foresaw: it may hold a person's words.
            said = repr(error) if isinstance(error, StorageError) else type(error).__name__
            log.error(
                "request failed", path=request.url.path, error=said, trace="".join(format_tb(error.__traceback__))
            )
        return respond(refusal)

    app.add_exception_handler(RequestValidationError, answer_invalid)
    app.add_exception_handler(HTTPException, answer_http)
    for kind in (ApiError, *KNOWN_EXCEPTIONS, Exception):
        app.add_exception_handler(kind, answer_known)
