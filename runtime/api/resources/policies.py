"""Routes for policies: list and read them, decide on a candidate, promote and roll back.

A decision is a row; `HotSwap.follow` activates the policy, and the request waits until this replica has reached it.
Invariant: a policy is leased, which loads it, before it is promoted, so that an adapter which the engine cannot serve
never becomes the active one.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path
from pydantic import BaseModel

from memory.schema import Policy, PolicyStage
from runtime.api.errors import Conflict, NotFound, NotReady, error_responses
from runtime.api.health import require_ready
from runtime.api.services import Server, Services

router = APIRouter(prefix="/v1/policies", tags=["policies"])

DECIDABLE_STAGES = frozenset({PolicyStage.CANDIDATE, PolicyStage.REJECTED})

Version = Annotated[str, Path(description="`v3` or `3`.", examples=["v3"])]


class PolicyDetail(BaseModel):
    """A base model with an adapter or none and a system prompt or the default one."""

    name: str
    version: int
    stage: PolicyStage
    base_model: str
    adapter_path: str | None
    adapter_digest: str | None
    system_prompt: str | None
    parent: str | None
    cycle_id: str | None
    note: str
    verdict: dict[str, Any] | None
    use_memory: bool | None
    """Whether it uses memory unless the request says otherwise; null: the server's setting."""
    created_at: datetime


class PolicyList(BaseModel):
    """Oldest first."""

    object: str = "list"
    active: str
    data: list[PolicyDetail]


class PolicyWithLineage(PolicyDetail):
    """A policy with the names of its ancestors, nearest first."""

    lineage: list[str]


class Judgement(BaseModel):
    """The release gate's decision on a candidate, and the policy that is active after it."""

    policy: str
    decision: Literal["promote", "reject", "uninformative"]
    reason: str
    active: str
    cycle: str
    verdict: dict[str, Any]


@router.get("", summary="List all policies")
async def list_policies(server: Server) -> PolicyList:
    policies = server.memory.policies
    return PolicyList(active=policies.active().name, data=[describe_policy(policy) for policy in policies.select()])


@router.get("/{version}", summary="Read one policy", responses=error_responses(NotFound))
async def get_policy(version: Version, server: Server) -> PolicyWithLineage:
    policy, *ancestors = server.memory.policies.lineage(version_name(version))
    return PolicyWithLineage(**describe_policy(policy).model_dump(), lineage=[ancestor.name for ancestor in ancestors])


@router.post("/rollback", summary="Reactivate the previous policy", responses=error_responses(Conflict))
async def rollback(server: Server) -> PolicyDetail:
    return await roll_back(server)


@router.post("/{version}/promote", summary="Activate a policy", responses=error_responses(NotFound, Conflict, NotReady))
async def promote(version: Version, server: Server) -> PolicyDetail:
    """Loads and probes it, then activates it. Episodes under way keep the policy they started with."""
    wanted = server.memory.policies.get(version_name(version)).version
    require_ready(server)
    # The lease keeps the adapter loaded until it is active; without it another activation could unload it meanwhile.
    async with server.hotswap.lease(wanted):
        # The row first: if this process dies now, the next start activates what the row says.
        promoted = await server.memory.policies.promote(wanted)
        await server.hotswap.wait_for(wanted)
    return describe_policy(promoted)


@router.post("/{version}/judge", summary="Decide on a candidate", responses=error_responses(NotFound, Conflict))
async def judge(version: Version, server: Server) -> Judgement:
    """Compares a candidate or a rejected policy with the active one by the release gate's test, on held-out tasks that
    no earlier decision on it used. If its cycle learned from an environment, new tasks of it are played, which takes
    minutes. Otherwise the tasks count that clients let both policies play (`model="agent@v3"`, `metadata` with `task`
    and `split`) and gave feedback on; only the first try of each. A better policy is activated, a worse one rejected.
    Without enough evidence it stays a candidate, and `reason` names what is missing. Each comparison spends some of the
    active policy's error budget."""
    wanted = server.memory.policies.get(version_name(version))
    if wanted.stage not in DECIDABLE_STAGES or wanted.cycle_id is None:
        raise Conflict(
            f"policy {wanted.name} is {wanted.stage.value!r}: only a cycle's candidate can be judged",
            code="no_candidate",
        )
    verdict = await server.cycles.decide_again(wanted)
    active = server.memory.policies.active()
    if active.version == wanted.version and server.engine.is_ready:
        await server.hotswap.wait_for(active.version)
    return Judgement(
        policy=wanted.name,
        decision=verdict["decision"],
        reason=verdict["reason"],
        active=active.name,
        cycle=wanted.cycle_id,
        verdict=verdict,
    )


@router.post(
    "/{version}/rollback",
    summary="Roll back from a policy, if it is active",
    responses=error_responses(NotFound, Conflict),
)
async def rollback_from(version: Version, server: Server) -> PolicyDetail:
    """Like `/rollback`, but safe to retry: rejected if another policy is active by now."""
    policies = server.memory.policies
    wanted, active = policies.get(version_name(version)), policies.active()
    # For retries, not for races: a promotion between this check and the write is rolled back instead.
    if wanted.version != active.version:
        raise Conflict(f"policy {wanted.name} does not act, {active.name} does", param="version", code="not_active")
    return await roll_back(server)


async def roll_back(server: Services) -> PolicyDetail:
    """Write the row; wait until this replica has activated it, if the engine answers now."""
    policy = await server.memory.policies.rollback()
    if server.engine.is_ready:
        await server.hotswap.wait_for(policy.version)
    return describe_policy(policy)


def version_name(text: str) -> str:
    """Return `v3` for `3` and for `v3`; anything else unchanged, so that the error quotes it."""
    return f"v{text}" if text.isdecimal() else text


def describe_policy(policy: Policy) -> PolicyDetail:
    copied = PolicyDetail.model_fields.keys() - {"name", "parent"}
    return PolicyDetail(
        **{name: getattr(policy, name) for name in copied},
        name=policy.name,
        parent=None if policy.parent is None else f"v{policy.parent}",
    )
