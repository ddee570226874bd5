"""Routes for environments: list them and their tasks, and prepare tasks ahead of time.

Playing a task is a chat completion with `metadata={"environment": ..., "task": ...}`.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, Field

from memory.schema import Split
from runtime.api.errors import NotFound, TooManyRequests, error_responses
from runtime.api.gateway.disconnects import cancel_on_disconnect
from runtime.api.gateway.permissions import RequestCaller
from runtime.api.read_answers import Offset
from runtime.api.services import Server

MAX_TASKS = 10_000
MAX_PREPARED = 1_000
"""Tasks of one request that prepares them; a game takes about a second to compile."""

router = APIRouter(prefix="/v1/environments", tags=["environments"])


class EnvironmentDetail(BaseModel):
    """An environment with its system prompt."""

    name: str
    system_prompt: str


class EnvironmentList(BaseModel):
    """All environments of this server."""

    object: str = "list"
    data: list[EnvironmentDetail]


class TaskDetail(BaseModel):
    """One task. Held-out tasks only measure: no cycle learns from them."""

    environment: str
    name: str
    kind: str
    split: Split


class TaskList(BaseModel):
    """Tasks; the same query always returns the same ones."""

    object: str = "list"
    data: list[TaskDetail]


class PrepareRequest(BaseModel, extra="forbid"):
    """The tasks to prepare."""

    tasks: list[str] = Field(min_length=1, max_length=MAX_PREPARED)


class PreparedTasks(BaseModel):
    """The number of tasks that now start without delay."""

    num_tasks: int


@router.get("", summary="List the environments")
async def list_environments(server: Server) -> EnvironmentList:
    return EnvironmentList(
        data=[EnvironmentDetail(name=it.name, system_prompt=it.system_prompt) for it in server.environments.values()]
    )


@router.get("/{environment}/tasks", summary="List tasks of a split", responses=error_responses(NotFound))
async def list_tasks(
    environment: str,
    server: Server,
    split: Split = Split.HELD_OUT,
    num_tasks: Annotated[int, Query(ge=1, le=MAX_TASKS)] = 64,
    offset: Offset = 0,
) -> TaskList:
    tasks = server.environment(environment).tasks(split, num_tasks, offset=offset)
    return TaskList(data=[TaskDetail.model_validate(task, from_attributes=True) for task in tasks])


@router.post(
    "/{environment}/prepare",
    summary="Prepare tasks, so that they start without delay",
    responses=error_responses(NotFound, TooManyRequests),
)
async def prepare_tasks(
    environment: str, server: Server, caller: RequestCaller, request: Request, body: PrepareRequest
) -> PreparedTasks:
    """A key may have two such requests under way, a tenant four. Disconnecting cancels the preparation."""
    played = server.environment(environment)
    # Before admission: unknown names must not occupy the limit.
    tasks = [played.open_task(name) for name in body.tasks]
    with server.preparations.admit(caller):
        await cancel_on_disconnect(request, played.prepare(tasks))
    return PreparedTasks(num_tasks=len(body.tasks))
