"""Procedural memory: all policies, their stages, and the history of activations.

A policy goes live through a row: `promote` writes it, and `wait_for_change` returns in each replica, in this process at
once, in another within a second.

Invariants: once a base is registered, exactly one policy is ACTIVE; versions are never reused; only the stage, the
verdict and `use_memory` of a policy change; a rollback adds an activation and deletes nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

from sqlalchemy import func, insert
from sqlmodel import Session, col, select

from memory.errors import IllegalMove, NothingToRollBackTo, OtherBaseModel, StorageError, UnknownPolicy
from memory.schema import LEGAL_MOVES, Activation, Policy, PolicyStage
from memory.storage.database import Database

POLL_SECONDS = 1.0
BASE_VERSION = 0


class Policies:
    """All policies, of which one is active."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._waiters: set[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = set()

    async def register_base(self, base_model: str) -> Policy:
        """Return v0, the bare base model; the first call creates and activates it.

        Raises: OtherBaseModel when the directory's policies are made for another base model.
        """

        def write(session: Session) -> Policy:
            base = session.get(Policy, BASE_VERSION)
            if base is not None and base.base_model != base_model:
                raise OtherBaseModel(
                    f"this data directory's policies are made for {base.base_model!r}, not for {base_model!r}: "
                    "serve that base, or choose another data directory"
                )
            if base is None:
                values = {"version": BASE_VERSION, "stage": PolicyStage.DRAFT, "base_model": base_model}
                session.execute(insert(Policy).values(**Policy(**values, note="the bare base").model_dump()))
                base = session.get_one(Policy, BASE_VERSION)
            if _active(session) is None:
                _activate(session, base, previous=None)
            return base

        return await self._write_and_notify(write)

    def find_base_model(self) -> str | None:
        """Return the base model that this data directory's policies are made for; None before `register_base`."""
        with self._database.read() as session:
            base = session.get(Policy, BASE_VERSION)
        return None if base is None else base.base_model

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
        """Create the next version as a DRAFT. Without a `base_model` it has its parent's, or v0's.

        Raises: UnknownPolicy for an unknown parent, or when no base was registered.
        """

        def write(session: Session) -> Policy:
            origin = _require(session, BASE_VERSION if parent is None else parent)
            policy = Policy(
                # no race: one writer at a time. Policies are never deleted, so no version comes again
                version=session.exec(select(func.max(Policy.version))).one() + 1,
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
        """Move a policy to `stage` and store the verdict behind the move. A move to ACTIVE retires the active policy.

        `use_memory` is the policy's default for requests that do not say. Raises: UnknownPolicy; IllegalMove, also for
        a move of the active policy, which only another activation replaces.
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

        return await self._write_and_notify(write)

    async def note_verdict(self, version: int, verdict: dict[str, Any]) -> Policy:
        """Store a new verdict on a policy that stays at its stage. Raises: UnknownPolicy."""

        def write(session: Session) -> Policy:
            policy = _require(session, version)
            policy.verdict = verdict
            session.add(policy)
            return policy

        return await self._database.write(write)

    async def promote(self, version: int) -> Policy:
        """Activate a policy and retire the active one in the same transaction. The active one stays as it is.

        Raises: UnknownPolicy, IllegalMove.
        """

        def write(session: Session) -> Policy:
            policy = _require(session, version)
            if policy.stage is not PolicyStage.ACTIVE:
                _require_legal(policy, PolicyStage.ACTIVE)
                _replace_active(session, policy)
            return policy

        return await self._write_and_notify(write)

    async def rollback(self) -> Policy:
        """Activate the policy that was active before the present one; repeated, the one before that.

        Raises: NothingToRollBackTo.
        """

        def write(session: Session) -> Policy:
            here = _newest_activation(session)
            if here is None or here.previous is None:
                raise NothingToRollBackTo("no policy was active before this one: promote another one instead")
            # `previous` is the target's own predecessor, so that repeated rollbacks go further back, never forth.
            target = session.get_one(Activation, here.previous)
            _retire(session, _require(session, here.version))
            policy = _require(session, target.version)
            _activate(session, policy, previous=target.previous, is_rollback=True)
            return policy

        return await self._write_and_notify(write)

    async def wait_for_change(self, last_seen: int) -> int:
        """Wait until the active version differs from `last_seen`, and return it; -1 waits for any active version.

        An unavailable database is retried every `POLL_SECONDS`.
        """
        waiter = (asyncio.get_running_loop(), asyncio.Event())
        self._waiters.add(waiter)
        try:
            while True:
                waiter[1].clear()  # before the read: a change after it sets the event again
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
        """Return the active policy. Raises: UnknownPolicy when no base was registered."""
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
        """Return the policy and its ancestors, newest first. Raises: UnknownPolicy."""
        with self._database.read() as session:
            policies = [_require(session, _version_of(version))]
            while policies[-1].parent is not None:
                policies.append(_require(session, policies[-1].parent))
        return policies

    def root(self) -> int:
        """Return the version that the active policy descends from and that no cycle made: the bare base, or the adapter
        that came with an embedded model."""
        return next(policy.version for policy in self.lineage(self.active().version) if policy.cycle_id is None)

    def activations(self) -> list[Activation]:
        """Return all activations, oldest first."""
        with self._database.read() as session:
            return list(session.exec(select(Activation).order_by(col(Activation.id))))

    def select(self) -> list[Policy]:
        """Return all policies, oldest first."""
        with self._database.read() as session:
            return list(session.exec(select(Policy).order_by(col(Policy.version))))

    def _active_version(self) -> int | None:
        with self._database.read() as session:
            return session.scalar(select(Policy.version).where(Policy.stage == PolicyStage.ACTIVE))

    async def _write_and_notify(self, write: Callable[[Session], Policy]) -> Policy:
        """Write, then wake all tasks in `wait_for_change`, on their own event loops."""
        policy = await self._database.write(write)
        # after the commit, or a waiter would read the old version and sleep again
        for loop, event in list(self._waiters):
            with contextlib.suppress(RuntimeError):  # that loop is closed
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
    policy = session.get(Policy, version) if version < 2**31 else None  # PostgreSQL raises for larger integers
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
    session.flush()  # before another row becomes ACTIVE: a unique index allows one at every moment


def _activate(session: Session, policy: Policy, *, previous: int | None, is_rollback: bool = False) -> None:
    policy.stage = PolicyStage.ACTIVE
    session.add(policy)
    session.add(Activation(version=policy.version, previous=previous, is_rollback=is_rollback))
