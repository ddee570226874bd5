"""Where tasks can be played again, and which tasks there are.

Refuses to play: that is a chat completion with `metadata={"environment": ..., "task": ...}`.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, Field

from memory.schema import Split
from runtime.api.errors import NotFound, TooManyRequests, error_responses
from runtime.api.gateway.disconnects import cancel_on_disconnect
from runtime.api.gateway.permissions import RequestCaller
from runtime.api.services import Server

MAX_TASKS = 10_000
MAX_PREPARED = 1_000
"""Games of one call that prepares; a game takes about a second to compile."""

router = APIRouter(prefix="/v1/environments", tags=["environments"])


class EnvironmentDetail(BaseModel):
    """An environment and what the model is told in it."""

    name: str
    system_prompt: str


class EnvironmentList(BaseModel):
    """All environments of this server."""

    object: str = "list"
    data: list[EnvironmentDetail]


class TaskDetail(BaseModel):
    """Something to play. Held-out tasks measure: nothing is ever learned from them."""

    environment: str
    name: str
    kind: str
    split: Split


class TaskList(BaseModel):
    """The same tasks for the same question, always."""

    object: str = "list"
    data: list[TaskDetail]


class PrepareRequest(BaseModel, extra="forbid"):
    """Which tasks are about to be played."""

    tasks: list[str] = Field(min_length=1, max_length=MAX_PREPARED)


class Prepared(BaseModel):
    """How many tasks start without delay now."""

    num_tasks: int


@router.get("", summary="List the environments")
async def list_environments(server: Server) -> EnvironmentList:
    return EnvironmentList(
        data=[EnvironmentDetail(name=one.name, system_prompt=one.system_prompt) for one in server.environments.values()]
    )


@router.get("/{environment}/tasks", summary="List tasks of a split", responses=error_responses(NotFound))
async def list_tasks(
    environment: str,
    server: Server,
    split: Split = Split.HELD_OUT,
    num_tasks: Annotated[int, Query(ge=1, le=MAX_TASKS)] = 64,
    offset: Annotated[int, Query(ge=0)] = 0,
) -> TaskList:
    tasks = server.environment(environment).tasks(split, num_tasks, offset=offset)
    return TaskList(data=[TaskDetail.model_validate(task, from_attributes=True) for task in tasks])


@router.post(
    "/{environment}/prepare",
    summary="Do ahead of time what starting tasks would wait for",
    responses=error_responses(NotFound, TooManyRequests),
)
async def prepare_tasks(
    environment: str, server: Server, caller: RequestCaller, request: Request, body: PrepareRequest
) -> Prepared:
    """A key may have two calls under way, a tenant four. A client that leaves ends its call."""
    world = server.environment(environment)
    tasks = [world.task(name) for name in body.tasks]
    with server.preparations.admit(caller):
        await cancel_on_disconnect(request, world.prepare(tasks))
    return Prepared(num_tasks=len(body.tasks))
