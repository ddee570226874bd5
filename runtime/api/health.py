"""The health routes, from cheap to expensive.

`/healthz` shows that the process answers; `/readyz`, that the engine has generated a real token since its last start
and serves the active policy; `/v1/doctor` checks everything and generates another token. None of them repairs anything.
"""

from __future__ import annotations

import asyncio
from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel

from runtime import doctor
from runtime.api.errors import NotReady, error_responses
from runtime.api.services import Server, Services
from runtime.errors import EngineInMaintenance

router = APIRouter(tags=["health"])


class Alive(BaseModel):
    """The process answers; `engine` shows whether turns are answered too, `detail` why not."""

    status: str = "alive"
    engine: Literal["ready", "not_ready", "maintenance"]
    detail: str | None = None


class Ready(BaseModel):
    """The agent answers as `policy`. `refusal`: why a newer active policy is not served."""

    status: str = "ready"
    policy: str
    base_model: str
    refusal: str | None = None


class CheckDetail(BaseModel):
    """One check; `mend` names the remedy if it failed."""

    name: str
    is_ok: bool
    detail: str
    mend: str = ""


class Diagnosis(BaseModel):
    """The result of all checks."""

    is_ok: bool
    checks: list[CheckDetail]


def require_ready(server: Services) -> None:
    """Raise NotReady unless the engine answers, or EngineInMaintenance if it is stopped on purpose."""
    server.require_serving()
    if not server.engine.is_ready:
        raise NotReady("the engine is starting, or being restarted: no token generated yet")
    if server.hotswap.active_version is None:
        # The code's old word stays: codes are part of the API.
        raise NotReady(f"no policy is served yet: {server.hotswap.refusal or 'in a moment'}", code="policy_not_worn")


@router.get("/healthz", summary="Is the process alive?")
async def healthz(server: Server) -> Alive:
    """200 as long as the process answers, whatever the engine's state."""
    try:
        require_ready(server)
    except EngineInMaintenance as error:
        return Alive(engine="maintenance", detail=str(error))
    except NotReady as error:
        return Alive(engine="not_ready", detail=str(error))
    return Alive(engine="ready")


@router.get("/readyz", summary="Does the agent answer?", responses=error_responses(NotReady))
async def readyz(server: Server) -> Ready:
    """200 only after the engine has generated a real token; 503 with Retry-After while it starts, restarts or is in
    maintenance (`engine_in_maintenance`)."""
    require_ready(server)
    assert server.hotswap.active_version is not None  # `require_ready` raises otherwise
    policy = server.memory.policies.get(server.hotswap.active_version)
    return Ready(policy=policy.name, base_model=policy.base_model, refusal=server.hotswap.refusal)


@router.get("/v1/doctor", summary="Check everything")
async def diagnose(server: Server) -> Diagnosis:
    """Checks the rows, the index, the encoder, the engine with a real token, LoRA, disk and GPU."""
    # In a thread: these checks read the whole database and may load an encoder.
    at_rest = await asyncio.to_thread(doctor.check_at_rest, server.memory)
    checks = [*at_rest, *await doctor.check_engine(server.engine)]
    if server.check_training is not None:
        checks.append(await server.check_training())
    return Diagnosis(
        is_ok=all(check.is_ok for check in checks),
        checks=[CheckDetail.model_validate(check, from_attributes=True) for check in checks],
    )
