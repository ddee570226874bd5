"""Procedural memory: who acts. Every policy ever made, its stage, and the moments at which one went live.

This module refuses to know how a policy is trained, judged or worn. The handover to whoever wears it is a row:
promoting writes one, and `wait_for_change` notices, in this process at once, from another within a second.

Invariants: once a base is registered exactly one policy is ACTIVE; versions are never reused; a policy is immutable
but for its stage and verdict; a rollback is a new activation, never an erasure.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

from sqlalchemy import func, insert
from sqlmodel import Session, col, select

from memory.errors import IllegalMove, NothingToRollBackTo, OtherBaseModel, StorageError, UnknownPolicy
from memory.schema import LEGAL_MOVES, Activation, Policy, PolicyStage
from memory.storage.database import Database

POLL_SECONDS = 1.0
BASE_VERSION = 0


class Policies:
    """All policies, of which one acts."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._waiters: set[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = set()

    async def register_base(self, base_model: str) -> Policy:
        """Return v0, the bare base; the first time, make it and let it act.

        Raises: OtherBaseModel when this directory's policies stand on another base.
        """

        def write(session: Session) -> Policy:
            base = session.get(Policy, BASE_VERSION)
            if base is not None and base.base_model != base_model:
                raise OtherBaseModel(
                    f"this data directory's policies stand on {base.base_model!r}, not on {base_model!r}: "
                    "serve that base, or choose another data directory"
                )
            if base is None:
                values = {"version": BASE_VERSION, "stage": PolicyStage.DRAFT, "base_model": base_model}
                session.execute(insert(Policy).values(**Policy(**values, note="the bare base").model_dump()))
                base = session.get_one(Policy, BASE_VERSION)
            if _active(session) is None:
                _activate(session, base, previous=None)
            return base

        return await self._announced(write)

    async def draft(
        self,
        *,
        base_model: str | None = None,
        adapter_path: str | None = None,
        adapter_digest: str | None = None,
        system_prompt: str | None = None,
        parent: int | None = None,
        cycle_id: str | None = None,
        note: str = "",
    ) -> Policy:
        """Make the next version, as a DRAFT. Without a `base_model` it stands on its parent's, or on v0's.

        Raises: UnknownPolicy for a parent that isn't there, or when no base was registered.
        """

        def write(session: Session) -> Policy:
            origin = _require(session, BASE_VERSION if parent is None else parent)
            policy = Policy(
                version=session.scalar(select(func.max(Policy.version))) + 1,
                stage=PolicyStage.DRAFT,
                base_model=base_model or origin.base_model,
                adapter_path=adapter_path,
                adapter_digest=adapter_digest,
                system_prompt=system_prompt,
                parent=parent,
                cycle_id=cycle_id,
                note=note,
            )
            session.add(policy)
            return policy

        return await self._database.write(write)

    async def move(
        self,
        version: int,
        stage: PolicyStage,
        verdict: dict[str, Any] | None = None,
        *,
        use_memory: bool | None = None,
    ) -> Policy:
        """Move a policy to `stage`, keeping the verdict that moved it. To ACTIVE, the one that acted retires.
        With `use_memory`, keep how it serves where a request does not say.

        Raises: UnknownPolicy; IllegalMove, above all for retiring the active policy with nothing in its place.
        """
        stage = PolicyStage(stage)

        def write(session: Session) -> Policy:
            policy = _require(session, version)
            _require_legal(policy, stage)
            if policy.stage is PolicyStage.ACTIVE:
                raise IllegalMove(f"policy {policy.name} is active: promote another, or roll back, and it retires")
            if verdict is not None:
                policy.verdict = verdict
            if use_memory is not None:
                policy.use_memory = use_memory
            if stage is PolicyStage.ACTIVE:
                _replace_active(session, policy)
            else:
                policy.stage = stage
            session.add(policy)
            return policy

        return await self._announced(write)

    async def note_verdict(self, version: int, verdict: dict[str, Any]) -> Policy:
        """Keep the newest verdict on a policy that stays at its stage. Raises: UnknownPolicy."""

        def write(session: Session) -> Policy:
            policy = _require(session, version)
            policy.verdict = verdict
            session.add(policy)
            return policy

        return await self._database.write(write)

    async def promote(self, version: int) -> Policy:
        """Let a policy act; the one that acted retires in the same transaction. For the active one nothing changes.

        Raises: UnknownPolicy, IllegalMove.
        """

        def write(session: Session) -> Policy:
            policy = _require(session, version)
            if policy.stage is not PolicyStage.ACTIVE:
                _require_legal(policy, PolicyStage.ACTIVE)
                _replace_active(session, policy)
            return policy

        return await self._announced(write)

    async def rollback(self) -> Policy:
        """Let the policy act that acted before the active one went live; again, the one before that.

        Raises: NothingToRollBackTo.
        """

        def write(session: Session) -> Policy:
            here = _newest_activation(session)
            if here is None or here.previous is None:
                raise NothingToRollBackTo("no policy was active before this one: promote the one that should act")
            # What was before the target is where the next rollback leads: back in history, not forth again.
            target = session.get_one(Activation, here.previous)
            _retire(session, _require(session, here.version))
            policy = _require(session, target.version)
            _activate(session, policy, previous=target.previous, is_rollback=True)
            return policy

        return await self._announced(write)

    async def wait_for_change(self, last_seen: int) -> int:
        """Wait until the active version isn't `last_seen`, and return it; for -1, as soon as there is one.

        A database that can't be asked for a while is waited for.
        """
        waiter = (asyncio.get_running_loop(), asyncio.Event())
        self._waiters.add(waiter)
        try:
            while True:
                waiter[1].clear()
                with contextlib.suppress(StorageError):
                    version = self._active_version()
                    if version is not None and version != last_seen:
                        return version
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(POLL_SECONDS):
                        await waiter[1].wait()
        finally:
            self._waiters.discard(waiter)

    def active(self) -> Policy:
        """Return the policy that acts. Raises: UnknownPolicy when no base was registered."""
        with self._database.read() as session:
            policy = _active(session)
        if policy is None:
            raise UnknownPolicy("no policy is active: register a base first")
        return policy

    def get(self, version: int | str) -> Policy:
        """Return a policy by its version or its name, `3` or `"v3"`. Raises: UnknownPolicy."""
        with self._database.read() as session:
            return _require(session, _version_of(version))

    def lineage(self, version: int | str) -> list[Policy]:
        """Return the policy and those it grew from, newest first. Raises: UnknownPolicy."""
        with self._database.read() as session:
            policies = [_require(session, _version_of(version))]
            while policies[-1].parent is not None:
                policies.append(_require(session, policies[-1].parent))
        return policies

    def activations(self) -> list[Activation]:
        """Return every moment at which a policy went live, oldest first."""
        with self._database.read() as session:
            return list(session.exec(select(Activation).order_by(col(Activation.id))))

    def select(self) -> list[Policy]:
        """Return all policies, oldest first."""
        with self._database.read() as session:
            return list(session.exec(select(Policy).order_by(col(Policy.version))))

    def _active_version(self) -> int | None:
        with self._database.read() as session:
            return session.scalar(select(Policy.version).where(Policy.stage == PolicyStage.ACTIVE))

    async def _announced(self, write) -> Policy:
        """Write, then wake whoever waits for a change, on whatever loop."""
        policy = await self._database.write(write)
        for loop, event in list(self._waiters):
            with contextlib.suppress(RuntimeError):  # its loop is closed
                loop.call_soon_threadsafe(event.set)
        return policy


def _version_of(version: int | str) -> int:
    if isinstance(version, int):
        return version
    digits = version.removeprefix("v")
    if not (digits.isascii() and digits.isdigit()):
        raise UnknownPolicy(f"{version!r} is not a policy: versions look like 'v3'")
    return int(digits)


def _require(session: Session, version: int) -> Policy:
    policy = session.get(Policy, version) if version < 2**31 else None
    if policy is None:
        raise UnknownPolicy(f"no policy has version {version!r}: list them to see which exist")
    return policy


def _require_legal(policy: Policy, stage: PolicyStage) -> None:
    if stage not in LEGAL_MOVES[policy.stage]:
        raise IllegalMove(f"policy {policy.name} cannot go from {policy.stage.value!r} to {stage.value!r}")


def _active(session: Session) -> Policy | None:
    return session.exec(select(Policy).where(Policy.stage == PolicyStage.ACTIVE)).one_or_none()


def _newest_activation(session: Session) -> Activation | None:
    return session.exec(select(Activation).order_by(col(Activation.id).desc()).limit(1)).first()


def _replace_active(session: Session, policy: Policy) -> None:
    incumbent = _active(session)
    if incumbent is not None:
        _retire(session, incumbent)
    here = _newest_activation(session)
    _activate(session, policy, previous=here.id if here else None)


def _retire(session: Session, policy: Policy) -> None:
    policy.stage = PolicyStage.RETIRED
    session.add(policy)
    session.flush()  # never two active rows, not even inside the transaction: a unique index would refuse them


def _activate(session: Session, policy: Policy, *, previous: int | None, is_rollback: bool = False) -> None:
    policy.stage = PolicyStage.ACTIVE
    session.add(policy)
    session.add(Activation(version=policy.version, previous=previous, is_rollback=is_rollback))
