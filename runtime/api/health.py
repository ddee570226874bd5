"""Alive, ready, sound: three questions of growing price.

`/healthz` says that the process answers; `/readyz` that the engine has generated a real token since its last start and
that the active policy is worn; `/v1/doctor` looks at everything and generates another token. Refuses to mend anything.
"""

from __future__ import annotations

import asyncio
from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel

from runtime import doctor
from runtime.api.errors import NotReady, refusals
from runtime.api.services import Server, Services
from runtime.errors import EngineInMaintenance

router = APIRouter(tags=["health"])


class Alive(BaseModel):
    """The process answers; `engine` says whether turns are answered too, `detail` why not."""

    status: str = "alive"
    engine: Literal["ready", "not_ready", "maintenance"]
    detail: str | None = None


class Ready(BaseModel):
    """The agent answers, as `policy`. `refusal`: why a newer active policy is not what is worn."""

    status: str = "ready"
    policy: str
    base_model: str
    refusal: str | None = None


class CheckDetail(BaseModel):
    """One thing looked at; `mend` says what to do where it isn't well."""

    name: str
    is_ok: bool
    detail: str
    mend: str = ""


class Diagnosis(BaseModel):
    """Everything looked at."""

    is_ok: bool
    checks: list[CheckDetail]


def require_ready(server: Services) -> None:
    """Raise NotReady unless the engine answers, or EngineInMaintenance if it is stopped on purpose."""
    server.require_serving()
    if not server.engine.is_ready:
        raise NotReady("the engine is starting, or being restarted: no token generated yet")
    if server.hotswap.active_version is None:
        raise NotReady(f"no policy is worn yet: {server.hotswap.refusal or 'in a moment'}", code="policy_not_worn")


@router.get("/healthz", summary="Is the process alive?")
async def healthz(server: Server) -> Alive:
    """200 as long as the process answers, whatever the engine does."""
    try:
        require_ready(server)
    except EngineInMaintenance as closed:
        return Alive(engine="maintenance", detail=str(closed))
    except NotReady as missing:
        return Alive(engine="not_ready", detail=str(missing))
    return Alive(engine="ready")


@router.get("/readyz", summary="Does the agent answer?", responses=refusals(NotReady))
async def readyz(server: Server) -> Ready:
    """200 only after one really generated token; 503 with Retry-After while the engine starts or restarts, or is
    stopped for a while (`engine_in_maintenance`)."""
    require_ready(server)
    policy = server.memory.policies.get(server.hotswap.active_version)
    return Ready(policy=policy.name, base_model=policy.base_model, refusal=server.hotswap.refusal)


@router.get("/v1/doctor", summary="Is everything sound?")
async def diagnose(server: Server) -> Diagnosis:
    """Check the rows, the index, the encoder, the engine by a real token, LoRA, disk and GPU."""
    at_rest = await asyncio.to_thread(doctor.check_at_rest, server.memory)
    checks = [*at_rest, *await doctor.check_engine(server.engine)]
    if server.check_training is not None:
        checks.append(await server.check_training())
    return Diagnosis(
        is_ok=all(check.is_ok for check in checks),
        checks=[CheckDetail.model_validate(check, from_attributes=True) for check in checks],
    )
