"""Composes the HTTP application: all routers and middleware on one FastAPI app, and its OpenAPI document.

Invariant: every answer, errors included, has OpenAI's shape, or Anthropic's for a client of that API.
Hazard: the order of the middleware is a matter of security; see `create_app`.
"""

from __future__ import annotations

from functools import partial
from types import ModuleType
from typing import Any

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware

from runtime.api import docs_page, errors, health, metrics
from runtime.api.anthropic import messages
from runtime.api.datasets import examples, export
from runtime.api.errors import (
    AnthropicErrorAnswer,
    ApiError,
    BadRequest,
    ErrorAnswer,
    Forbidden,
    Misdirected,
    RequestTimeout,
    TooLarge,
    TooManyRequests,
    Unauthorized,
    UnsupportedMediaType,
    error_responses,
)
from runtime.api.gateway.auth import AuthMiddleware
from runtime.api.gateway.origins import OriginCheck
from runtime.api.gateway.permissions import is_open
from runtime.api.gateway.request_metrics import RequestMetrics
from runtime.api.openai import chat, embeddings, models, responses
from runtime.api.resources import (
    cycles,
    documents,
    environments,
    exemplars,
    feedback,
    feedback_links,
    index,
    insights,
    keys,
    policies,
    trajectories,
)
from runtime.api.services import Services

DESCRIPTION = """
An agent that answers, remembers, learns from its episodes, and serves what it learned only after a release gate.

* **Answer**: `POST /v1/chat/completions`, compatible with OpenAI's clients. `model="agent"` is the active policy,
  `agent@v3` pins one. `metadata={"environment": "textworld", "task": "900000"}` plays that task on the server.
  `POST /v1/responses` offers the same through the Responses API, `POST /v1/messages` through Anthropic's.
* **Embed**: `POST /v1/embeddings` returns vectors of texts by the encoder that searches memory.
* **Give feedback**: `POST /v1/feedback` with the `id` of the answer; `POST /v1/feedback/links` makes a link for
  a person without a key.
* **Learn**: `POST /v1/cycles`, then watch `GET /v1/cycles/{id}` and read `GET /v1/cycles/{id}/report`.
* **Decide**: `POST /v1/policies/{version}/promote` and `POST /v1/policies/rollback`.

Once a key exists (`POST /v1/keys`), every request except health checks needs `Authorization: Bearer <key>` (or
Anthropic's `x-api-key: <key>`).

Every error is `{"error": {"message", "type", "param", "code"}}`; for clients of Anthropic's API,
`{"type": "error", "error": {"type", "message", "details": {"error_code"}}, "request_id"}`.
"""

TAGS = [
    {"name": "chat", "description": "Send messages to the agent, or let it play a task."},
    {"name": "responses", "description": "The same through the Responses API."},
    {"name": "messages", "description": "The same through Anthropic's Messages API."},
    {"name": "embeddings", "description": "Vectors of texts."},
    {"name": "models", "description": "The names under which the agent answers."},
    {"name": "feedback", "description": "Feedback on episodes."},
    {"name": "trajectories", "description": "Recorded episodes, step by step."},
    {"name": "policies", "description": "Versions of what acts: base model, adapter and prompt."},
    {"name": "cycles", "description": "Learning cycles: collect, train, evaluate, promote or reject."},
    {"name": "insights", "description": "Lessons as text, learned across tasks."},
    {"name": "exemplars", "description": "Past successes that are shown in prompts."},
    {"name": "documents", "description": "Texts that the agent can search."},
    {"name": "examples", "description": "Training data in and out: imported rows, and exports in the forms of others."},
    {"name": "environments", "description": "Tasks that can be played again."},
    {"name": "keys", "description": "API keys: scopes and quotas."},
    {"name": "index", "description": "The search index over memories; it can be rebuilt from the rows at any time."},
    {"name": "health", "description": "Liveness, readiness, diagnosis and metrics."},
]

ROUTERS = (
    chat,
    responses,
    messages,
    embeddings,
    models,
    feedback,
    feedback_links,
    trajectories,
    policies,
    cycles,
    insights,
    exemplars,
    documents,
    examples,
    export,
    environments,
    keys,
    index,
    health,
    metrics,
    docs_page,
)
COMMON_ERRORS: tuple[type[ApiError], ...] = (
    BadRequest,
    Unauthorized,
    Forbidden,
    RequestTimeout,
    TooLarge,
    UnsupportedMediaType,
    Misdirected,
    TooManyRequests,
)
READABLE_HEADERS = ("X-Trajectory-Id", "X-Episode-Id", "X-Policy", "Retry-After", "request-id")
"""Headers that scripts of other origins may read."""


def create_app(services: Services) -> FastAPI:
    """Return the application that serves `services`."""
    app = FastAPI(
        title="Ratchet",
        version="0.1.0",
        summary="An agent runtime with self-improving memory.",
        description=DESCRIPTION,
        openapi_tags=TAGS,
        # All three are served by docs_page: off the event loop, without a network.
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        license_info={"name": "Apache-2.0", "identifier": "Apache-2.0"},
    )
    app.state.services = services
    errors.add_error_handlers(app)
    for module in ROUTERS:
        app.include_router(module.router, responses=_common_errors(module))
    # Starlette runs the middleware added last first: metrics, origin check, CORS, authentication, routes.
    app.add_middleware(AuthMiddleware, services=services, routes=app.router.routes)
    if services.server.cors_origins:
        app.add_middleware(  # outside authentication: preflights have no key, and pages must be able to read errors
            CORSMiddleware,
            allow_origins=services.server.cors_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=READABLE_HEADERS,
        )
    # Outside CORS, which answers preflights itself: a request under a foreign host name must not reach even that.
    app.add_middleware(OriginCheck, config=services.server)
    app.add_middleware(RequestMetrics, telemetry=services.agent.telemetry)
    app.state.description = docs_page.ApiDescription(partial(describe_api, app))
    return app


def _common_errors(module: ModuleType) -> dict[int | str, dict[str, Any]]:
    """Return the errors that every route of a module may answer with, for the OpenAPI document."""
    if module is health:
        return {}
    return error_responses(*COMMON_ERRORS, model=AnthropicErrorAnswer if module is messages else ErrorAnswer)


def describe_api(app: FastAPI) -> dict[str, Any]:
    """Return the OpenAPI document, with each route's security and without FastAPI's 422, which no route returns."""
    document = FastAPI.openapi(app)
    # FastAPI declares its own validation errors; `errors.py` answers 400 instead.
    for unused in ("HTTPValidationError", "ValidationError"):
        document["components"]["schemas"].pop(unused, None)
    document.setdefault("components", {})["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, methods in document["paths"].items():
        for route in methods.values():
            route["security"] = [] if is_open(path) else [{"key": []}]
            route["responses"].pop("422", None)
    return document
