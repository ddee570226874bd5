"""The HTTP application: every router on one FastAPI app, with one description for whoever opens /docs.

Refuses to know what a route does and how the services were made.
Invariant: everything answers in OpenAI's shapes, errors too.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware

from runtime.api import docs_page, errors, health, metrics
from runtime.api.errors import (
    BadRequest,
    Forbidden,
    Misdirected,
    RequestTimeout,
    TooLarge,
    TooManyRequests,
    Unauthorized,
    UnsupportedMediaType,
    refusals,
)
from runtime.api.gateway.auth import AuthMiddleware
from runtime.api.gateway.origins import OriginCheck
from runtime.api.gateway.permissions import is_open
from runtime.api.gateway.request_metrics import RequestMetrics
from runtime.api.openai import chat, models, responses
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
An agent that answers, remembers, learns, proves that it learned, and only then swaps.

* **Answer**: `POST /v1/chat/completions`, as any OpenAI client speaks it. `model="agent"` is the active policy,
  `agent@v3` pins one. `metadata={"environment": "textworld", "task": "900000"}` plays that task on the server.
  `POST /v1/responses` is the same in the words of the Responses API.
* **Say how it went**: `POST /v1/feedback` with the `id` of the answer; `POST /v1/feedback/links` makes a
  link for somebody without a key.
* **Learn**: `POST /v1/cycles`, then watch `GET /v1/cycles/{id}` and read `GET /v1/cycles/{id}/report`.
* **Decide**: `POST /v1/policies/{version}/promote` and `POST /v1/policies/rollback`.

Once a key was made (`POST /v1/keys`), every request but those for health needs `Authorization: Bearer <key>`.

Every error is `{"error": {"message", "type", "param", "code"}}`.
"""

TAGS = [
    {"name": "chat", "description": "Ask the agent, or have it play a task."},
    {"name": "responses", "description": "The same, in the words of the Responses API."},
    {"name": "models", "description": "The names under which the agent answers."},
    {"name": "feedback", "description": "Say how an episode went."},
    {"name": "trajectories", "description": "What was lived, step by step."},
    {"name": "policies", "description": "Who acts, who acted, who may."},
    {"name": "cycles", "description": "Turns of the loop: collect, learn, prove, swap or reject."},
    {"name": "insights", "description": "Lessons in words."},
    {"name": "exemplars", "description": "Past successes that are shown again."},
    {"name": "documents", "description": "What the agent was given to read."},
    {"name": "environments", "description": "Where tasks can be played again."},
    {"name": "keys", "description": "Who may ask, for what, and how much."},
    {"name": "index", "description": "What finds memories; rebuilt from the rows at any time."},
    {"name": "health", "description": "Alive, ready, sound; and counted."},
]

ROUTERS = (
    chat,
    responses,
    models,
    feedback,
    feedback_links,
    trajectories,
    policies,
    cycles,
    insights,
    exemplars,
    documents,
    environments,
    keys,
    index,
    health,
    metrics,
    docs_page,
)
READABLE_HEADERS = ("X-Trajectory-Id", "X-Episode-Id", "X-Policy", "Retry-After")
"""What a web page's scripts may read of an answer besides its body."""


def create_app(services: Services) -> FastAPI:
    """Return the application that serves `services`."""
    app = FastAPI(
        title="Ratchet",
        version="0.1.0",
        summary="An agent runtime with self-improving memory.",
        description=DESCRIPTION,
        openapi_tags=TAGS,
        docs_url=None,  # docs_page has both
        redoc_url=None,
        license_info={"name": "Apache-2.0", "identifier": "Apache-2.0"},
    )
    app.state.services = services
    errors.add_error_handlers(app)
    refused = refusals(
        BadRequest,
        Unauthorized,
        Forbidden,
        RequestTimeout,
        TooLarge,
        UnsupportedMediaType,
        Misdirected,
        TooManyRequests,
    )
    for module in ROUTERS:
        app.include_router(module.router, responses={} if module is health else refused)
    app.add_middleware(AuthMiddleware, services=services, routes=app.router.routes)
    if services.server.cors_origins:
        app.add_middleware(  # outside the gate: a preflight brings no key, and refusals must be readable too
            CORSMiddleware,
            allow_origins=services.server.cors_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=READABLE_HEADERS,
        )
    app.add_middleware(OriginCheck, config=services.server)
    app.add_middleware(RequestMetrics, telemetry=services.agent.telemetry)  # the last is the outermost
    app.openapi = partial(describe_api, app)
    return app


def describe_api(app: FastAPI) -> dict[str, Any]:
    """Return the OpenAPI page: with the key that every closed route asks for, without the 422 that none answers."""
    page = FastAPI.openapi(app)
    for unused in ("HTTPValidationError", "ValidationError"):
        page["components"]["schemas"].pop(unused, None)
    page.setdefault("components", {})["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, methods in page["paths"].items():
        for route in methods.values():
            route["security"] = [] if is_open(path) else [{"key": []}]
            route["responses"].pop("422", None)
    return page
