"""The model names of the agent: `agent` for the active policy, `agent@v3` for a fixed one."""

from __future__ import annotations

from fastapi import APIRouter
from pydantic import BaseModel

from memory.errors import UnknownPolicy
from memory.records.policies import Policies
from memory.schema import Policy
from runtime.api.errors import NotFound, error_responses
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


@router.get("", summary="List the names under which the agent answers")
async def list_models(server: Server) -> ModelList:
    policies = server.memory.policies
    listed = [_describe(ALIAS, policies.active())]
    return ModelList(data=listed + [_describe(pin(policy), policy) for policy in policies.select()])


@router.get("/{model}", summary="Look one name up", responses=error_responses(NotFound))
async def get_model(model: str, server: Server) -> Model:
    policies = server.memory.policies
    version = resolve(model, policies)
    return _describe(model, policies.active() if version is None else policies.get(version))
