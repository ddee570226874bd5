"""Turns of the loop, as seen from outside: started, watched, cancelled, and their reports read.

Refuses to know what a stage does. A cycle runs in the background: starting one answers at once, 202, with its id.
"""

from __future__ import annotations

from datetime import datetime
from pathlib import Path as FilePath
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Body, Query, Response
from fastapi.responses import FileResponse
from pydantic import BaseModel

from memory.names import path_below
from memory.records.cycles import FINAL_STAGES
from memory.schema import Cycle, CycleStage, Scope
from runtime.api.errors import ACCEPTED, Conflict, NotFound, NotReady, refusals
from runtime.api.gateway.permissions import Asker
from runtime.api.health import require_ready
from runtime.api.services import Server, Services
from runtime.errors import EngineInMaintenance

REPORT_FILES = {"json": "report.json", "markdown": "report.md", "plot": "success.png"}
REPORT_TYPES = {"json": "application/json", "markdown": "text/markdown", "plot": "image/png"}

router = APIRouter(prefix="/v1/cycles", tags=["cycles"])


class CycleRequest(BaseModel, extra="forbid"):
    """Departures from the server's own settings for learning, for this one cycle."""

    settings: dict[str, Any] = {}


class CycleDetail(BaseModel):
    """Where a cycle is, or how it ended. `progress` belongs to the stage under way."""

    id: str
    status: Literal["running", "completed", "error"]
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


EXAMPLES = {
    "as configured": {"value": {}},
    "a small one": {"value": {"settings": {"practice_episodes": 64, "evaluation": {"num_tasks": 50}}}},
}


@router.post(
    "", status_code=ACCEPTED, summary="Turn the loop once, in the background", responses=refusals(Conflict, NotReady)
)
async def start_cycle(
    server: Server,
    caller: Asker,
    response: Response,
    body: Annotated[CycleRequest | None, Body(openapi_examples=EXAMPLES)] = None,
) -> CycleDetail:
    """Refused while another cycle runs, for settings that cannot be, and before anything is played where there could
    not be enough to train on (`POST /v1/cycles/check` says what is missing) or the engine does not answer. The settings
    of `evaluation` are the bars of a promotion: a key without the scope `admin` may only make them tighter than the
    server's configuration."""
    require_ready(server)
    settings = body.settings if body else {}
    cycle = await server.cycles.start(settings, may_loosen_bars=Scope.ADMIN in caller.scopes)
    response.headers["Location"] = f"{router.prefix}/{cycle.id}"
    return describe(cycle, server)


class NeedDetail(BaseModel):
    """One thing that a cycle needs: `available` now, and `playable`, which playing can add at the most."""

    name: str
    needed: int
    available: int
    playable: int
    num_missing: int
    is_required: bool
    detail: str
    mend: str


class NeedList(BaseModel):
    """What a cycle would need. `is_ready`: nothing that is required is missing."""

    object: str = "list"
    is_ready: bool
    data: list[NeedDetail]


@router.post("/check", summary="See what a cycle would need")
async def check_cycle(
    server: Server, body: Annotated[CycleRequest | None, Body(openapi_examples=EXAMPLES)] = None
) -> NeedList:
    """Counts demonstrations, preferences, held-out tasks and the room to train, and asks for the engine. Starts
    nothing."""
    needs = [NeedDetail(**need) for need in await server.cycles.check(body.settings if body else {})]
    needs.append(_need_engine(server))
    return NeedList(is_ready=not any(need.is_required and need.num_missing for need in needs), data=needs)


def _need_engine(server: Services) -> NeedDetail:
    try:
        require_ready(server)
    except (NotReady, EngineInMaintenance) as missing:
        is_ready, detail = False, str(missing)
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
    return CycleList(data=[describe(cycle, server) for cycle in server.memory.cycles.select(limit=limit)])


@router.get("/{cycle_id}", summary="See where a cycle is, or how it ended", responses=refusals(NotFound))
async def get_cycle(cycle_id: str, server: Server) -> CycleDetail:
    return describe(server.memory.cycles.get(cycle_id), server)


@router.post("/{cycle_id}/cancel", summary="Stop a cycle", responses=refusals(NotFound, Conflict))
async def cancel_cycle(cycle_id: str, server: Server) -> CycleDetail:
    """What it has recorded stays: trajectories, rewards, insights, drafts."""
    cycle = server.memory.cycles.get(cycle_id)
    if cycle.stage in FINAL_STAGES:
        raise Conflict(f"cycle {cycle_id!r} has ended: {cycle.stage}", code="cycle_ended")
    return describe(await server.cycles.cancel(cycle_id), server)


@router.get(
    "/{cycle_id}/report",
    summary="Read the release report of a cycle",
    response_class=FileResponse,
    responses={
        200: {"content": {media_type: {} for media_type in REPORT_TYPES.values()}, "description": "The report."},
        **refusals(NotFound),
    },
)
async def get_report(
    cycle_id: str, server: Server, format: Annotated[Literal["json", "markdown", "plot"], Query()] = "json"
) -> FileResponse:
    """What was played, by whom, with which success, and the verdict: as JSON, as Markdown to read, or as a plot."""
    cycle = server.memory.cycles.get(cycle_id)
    name = REPORT_FILES[format]
    path = reports_of(cycle, server) / name
    if not path.exists():
        state = f"it is at {cycle.stage!r}" if cycle.stage not in FINAL_STAGES else f"it ended: {cycle.error}"
        what = (
            "plot, because nothing was played" if format == "plot" and cycle.verdict is not None else f"report: {state}"
        )
        raise NotFound(f"cycle {cycle_id!r} has no {what}", code="report_not_found")
    return FileResponse(path, media_type=REPORT_TYPES[format])


def reports_of(cycle: Cycle, server: Services) -> FilePath:
    return path_below(server.memory.data_dir, "reports", cycle.id)


def describe(cycle: Cycle, server: Services) -> CycleDetail:
    ends: dict[str, Literal["completed", "error"]] = {CycleStage.COMPLETED: "completed", CycleStage.ERROR: "error"}
    has_report = (reports_of(cycle, server) / REPORT_FILES["json"]).exists()
    as_they_are = CycleDetail.model_fields.keys() & Cycle.model_fields.keys()
    return CycleDetail(
        **{name: getattr(cycle, name) for name in as_they_are},
        status=ends.get(cycle.stage, "running"),
        report_url=f"{router.prefix}/{cycle.id}/report" if has_report else None,
    )
