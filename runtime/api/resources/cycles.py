"""Routes for cycles: check, start, watch and cancel them, and read their reports.

A cycle runs in the background: starting one answers 202 at once with its id.
"""

from __future__ import annotations

from datetime import datetime
from pathlib import Path as FilePath
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Body, Query, Response
from fastapi.openapi.models import Example
from fastapi.responses import FileResponse
from pydantic import BaseModel

from memory.names import path_below
from memory.records.cycles import FINAL_STAGES
from memory.schema import Cycle, CycleStage, Scope
from runtime.api.errors import ACCEPTED, Conflict, NotFound, NotReady, error_responses
from runtime.api.gateway.permissions import RequestCaller
from runtime.api.health import require_ready
from runtime.api.services import Server, Services
from runtime.errors import EngineInMaintenance

REPORT_FILES = {"json": "report.json", "markdown": "report.md", "plot": "success.png"}
REPORT_TYPES = {"json": "application/json", "markdown": "text/markdown", "plot": "image/png"}

router = APIRouter(prefix="/v1/cycles", tags=["cycles"])

CycleStatus = Literal["running", "completed", "error"]


class CycleRequest(BaseModel, extra="forbid"):
    """Settings of the optimizer that replace the server's own for this cycle."""

    settings: dict[str, Any] = {}


class CycleDetail(BaseModel):
    """The state or outcome of a cycle. `progress` belongs to the current stage."""

    id: str
    status: CycleStatus
    stage: str
    progress: dict[str, Any]
    settings: dict[str, Any]
    artifacts: dict[str, Any]
    verdict: dict[str, Any] | None
    error: str | None
    report_url: str | None
    created_at: datetime
    closed_at: datetime | None


class CycleList(BaseModel):
    """Newest first."""

    object: str = "list"
    data: list[CycleDetail]


EXAMPLES: dict[str, Example] = {
    "as configured": {"value": {}},
    "a small one": {"value": {"settings": {"practice_episodes": 64, "evaluation": {"num_tasks": 50}}}},
}


@router.post(
    "",
    status_code=ACCEPTED,
    summary="Start a cycle in the background",
    responses=error_responses(Conflict, NotReady),
)
async def start_cycle(
    server: Server,
    caller: RequestCaller,
    response: Response,
    body: Annotated[CycleRequest | None, Body(openapi_examples=EXAMPLES)] = None,
) -> CycleDetail:
    """Rejected while another cycle runs, for invalid settings, if the engine does not answer, and if there could not be
    enough data to train on (`POST /v1/cycles/check` lists what is missing). The settings of `evaluation` are the
    release gate's thresholds: a key without the scope `admin` may only make them stricter than the server's
    configuration, and may not replace the environment that it names."""
    require_ready(server)
    settings = body.settings if body else {}
    cycle = await server.cycles.start(settings, may_loosen_bars=Scope.ADMIN in caller.scopes)
    response.headers["Location"] = f"{router.prefix}/{cycle.id}"
    return describe_cycle(cycle, server)


class NeedDetail(BaseModel):
    """One need of a cycle: the amount `available` now, and `playable`, the most that playing can add."""

    name: str
    needed: int
    available: int
    playable: int
    num_missing: int
    is_required: bool
    detail: str
    mend: str


class NeedList(BaseModel):
    """The needs of a cycle. `is_ready`: no required need has anything missing."""

    object: str = "list"
    is_ready: bool
    data: list[NeedDetail]


@router.post("/check", summary="Check the needs of a cycle")
async def check_cycle(
    server: Server, body: Annotated[CycleRequest | None, Body(openapi_examples=EXAMPLES)] = None
) -> NeedList:
    """Counts the rows of each method and the held-out tasks, and checks the training hardware and the engine. Starts
    nothing."""
    needs = [NeedDetail(**need) for need in await server.cycles.check(body.settings if body else {})]
    needs.append(_check_engine(server))
    return NeedList(is_ready=not any(need.is_required and need.num_missing for need in needs), data=needs)


def _check_engine(server: Services) -> NeedDetail:
    try:
        require_ready(server)
    except (NotReady, EngineInMaintenance) as error:
        is_ready, detail = False, str(error)
    else:
        is_ready, detail = True, f"policy v{server.hotswap.active_version} answers"
    return NeedDetail(
        name="engine",
        needed=1,
        available=int(is_ready),
        playable=0,
        num_missing=int(not is_ready),
        is_required=True,
        detail=detail,
        mend="wait until the engine is back, or look at `serve.py doctor`",
    )


@router.get("", summary="List cycles, newest first")
async def list_cycles(server: Server, limit: Annotated[int, Query(ge=1, le=500)] = 50) -> CycleList:
    return CycleList(data=[describe_cycle(cycle, server) for cycle in server.memory.cycles.select(limit=limit)])


@router.get("/{cycle_id}", summary="Read the state of a cycle", responses=error_responses(NotFound))
async def get_cycle(cycle_id: str, server: Server) -> CycleDetail:
    return describe_cycle(server.memory.cycles.get(cycle_id), server)


@router.post("/{cycle_id}/cancel", summary="Stop a cycle", responses=error_responses(NotFound, Conflict))
async def cancel_cycle(cycle_id: str, server: Server) -> CycleDetail:
    """Its records stay: trajectories, rewards, insights, drafts."""
    cycle = server.memory.cycles.get(cycle_id)
    if cycle.stage in FINAL_STAGES:
        raise Conflict(f"cycle {cycle_id!r} has ended: {cycle.stage}", code="cycle_ended")
    return describe_cycle(await server.cycles.cancel(cycle_id), server)


@router.get(
    "/{cycle_id}/report",
    summary="Read the release report of a cycle",
    response_class=FileResponse,
    responses={
        200: {"content": {media_type: {} for media_type in REPORT_TYPES.values()}, "description": "The report."},
        **error_responses(NotFound),
    },
)
async def get_report(
    cycle_id: str, server: Server, format: Annotated[Literal["json", "markdown", "plot"], Query()] = "json"
) -> FileResponse:
    """Episodes, policies, success rates and the verdict: as JSON, Markdown or a plot."""
    cycle = server.memory.cycles.get(cycle_id)
    name = REPORT_FILES[format]
    # The id was found in the database, and `path_below` rejects paths outside of the directory.
    path = report_dir(cycle, server) / name
    if not path.exists():
        state = f"it is at {cycle.stage!r}" if cycle.stage not in FINAL_STAGES else f"it ended: {cycle.error}"
        missing = f"report: {state}"
        if format == "plot" and cycle.verdict is not None:
            missing = "plot, because nothing was played"
        raise NotFound(f"cycle {cycle_id!r} has no {missing}", code="report_not_found")
    return FileResponse(path, media_type=REPORT_TYPES[format])


def report_dir(cycle: Cycle, server: Services) -> FilePath:
    """Return the directory of a cycle's report files; it may not exist yet."""
    return path_below(server.memory.data_dir, "reports", cycle.id)


def describe_cycle(cycle: Cycle, server: Services) -> CycleDetail:
    final_status: dict[str, CycleStatus] = {CycleStage.COMPLETED: "completed", CycleStage.ERROR: "error"}
    has_report = (report_dir(cycle, server) / REPORT_FILES["json"]).exists()
    copied = CycleDetail.model_fields.keys() & Cycle.model_fields.keys()
    return CycleDetail(
        **{name: getattr(cycle, name) for name in copied},
        status=final_status.get(cycle.stage, "running"),
        report_url=f"{router.prefix}/{cycle.id}/report" if has_report else None,
    )
