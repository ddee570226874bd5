"""The model names of the agent: `agent` for the active policy, `agent@v3` for a fixed one.

A request of an Anthropic client, which is known by its header, is answered in the form of Anthropic's API.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel

from memory.errors import UnknownPolicy
from memory.records.policies import Policies
from memory.schema import Policy
from runtime.api.errors import NotFound, error_responses, is_anthropic
from runtime.api.services import Server

ALIAS = "agent"

router = APIRouter(prefix="/v1/models", tags=["models"])


class Model(BaseModel):
    """One name in OpenAI's format of models; `root` is the base model, `stage` the policy's."""

    id: str
    object: str = "model"
    created: int
    owned_by: str = "ratchet"
    root: str
    stage: str


class ModelList(BaseModel):
    """All names."""

    object: str = "list"
    data: list[Model]


class AnthropicModel(BaseModel):
    """One name in Anthropic's format of models."""

    id: str
    type: Literal["model"] = "model"
    display_name: str
    created_at: str
    lifecycle: Literal["active"] = "active"
    max_input_tokens: int | None


class AnthropicModelPage(BaseModel):
    """A page of names in Anthropic's format."""

    data: list[AnthropicModel]
    has_more: bool
    first_id: str | None
    last_id: str | None


def pin(policy: Policy | int) -> str:
    """Return the model name that pins a policy: `agent@v3`."""
    version = policy if isinstance(policy, int) else policy.version
    return f"{ALIAS}@v{version}"


def resolve(name: str, policies: Policies) -> int | None:
    """Return the version that `name` pins; None for the alias, which is resolved when the episode opens.

    Raises:
        NotFound: no policy has that name; the message lists the existing names.
    """
    # Not resolved here: between this and the lease another policy may become active.
    if name == ALIAS:
        return None
    prefix, at, version = name.partition("@")
    if prefix == ALIAS and at:
        try:
            return policies.get(version if version.startswith("v") else f"v{version}").version
        except UnknownPolicy:
            pass
    known = [ALIAS, *(pin(policy) for policy in policies.select())]
    shown = ", ".join(known if len(known) <= 8 else [*known[:4], "...", *known[-3:]])
    raise NotFound(f"the model {name!r} does not exist; there is: {shown}", param="model", code="model_not_found")


def _describe(name: str, policy: Policy) -> Model:
    return Model(id=name, created=int(policy.created_at.timestamp()), root=policy.base_model, stage=policy.stage)


def _describe_for_anthropic(model: Model, max_input_tokens: int | None) -> AnthropicModel:
    created = datetime.fromtimestamp(model.created, UTC).isoformat().replace("+00:00", "Z")
    return AnthropicModel(
        id=model.id, display_name=f"{model.id} ({model.stage})", created_at=created, max_input_tokens=max_input_tokens
    )


def _page(models: list[AnthropicModel], limit: int, after_id: str | None, before_id: str | None) -> AnthropicModelPage:
    """Return the page behind `after_id`, or the one before `before_id`. Raises NotFound for an unknown id."""
    ids = [model.id for model in models]
    for name, given in (("after_id", after_id), ("before_id", before_id)):
        if given is not None and given not in ids:
            raise NotFound(f"{name} {given!r} is no model: take one from the page before", param=name, code="not_found")
    if before_id is not None:
        before = models[: ids.index(before_id)]
        page, has_more = before[-limit:], len(before) > limit
    else:
        after = models if after_id is None else models[ids.index(after_id) + 1 :]
        page, has_more = after[:limit], len(after) > limit
    first, last = (page[0].id, page[-1].id) if page else (None, None)
    return AnthropicModelPage(data=page, has_more=has_more, first_id=first, last_id=last)


@router.get("", summary="List the names under which the agent answers", responses=error_responses(NotFound))
async def list_models(
    server: Server,
    request: Request,
    limit: Annotated[int, Query(ge=1, le=1000, description="Of Anthropic's clients, as the next two.")] = 20,
    after_id: str | None = None,
    before_id: str | None = None,
) -> ModelList | AnthropicModelPage:
    policies = server.memory.policies
    models = [_describe(ALIAS, policies.active()), *(_describe(pin(policy), policy) for policy in policies.select())]
    if not is_anthropic(request.scope):
        return ModelList(data=models)
    capacity = server.engine.max_model_len
    return _page([_describe_for_anthropic(model, capacity) for model in models], limit, after_id, before_id)


@router.get("/{model}", summary="Look one name up", responses=error_responses(NotFound))
async def get_model(model: str, server: Server, request: Request) -> Model | AnthropicModel:
    policies = server.memory.policies
    version = resolve(model, policies)
    found = _describe(model, policies.active() if version is None else policies.get(version))
    return _describe_for_anthropic(found, server.engine.max_model_len) if is_anthropic(request.scope) else found
