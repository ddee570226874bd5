"""The open episodes of one server: those being played now, and those that wait for their client.

    enter      find the episode that a request continues, or begin one, and lock it until the request is answered
    sweep      close the episodes whose client did not come back in time

An episode that waits exists only in the rows: its last reply holds the digest that the client's next request begins
with (resume.py), so a restarted server continues it. Only the locks are in memory.

Invariants: at most one request of an episode is being answered; a tenant reaches only its own episodes.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import structlog

from memory.errors import StoreError
from memory.schema import Trajectory, TrajectoryStage, new_id, now
from memory.store import Memory
from runtime.agent.resume import Resumption, last_handover
from runtime.agent.turn import TurnRequest
from runtime.errors import EpisodeBusy

SWEEP_SECONDS = 15.0

log = structlog.get_logger()


EpisodeKey = tuple[str, str]
"""(tenant, episode id): clients choose episode ids, so two tenants may choose the same one."""


@dataclass(frozen=True)
class OpenEpisode:
    """The episode of a request, locked for it."""

    episode_id: str
    resumption: Resumption | None = None
    """None where the episode begins with this request."""


class OpenEpisodes:
    """The open episodes of one server."""

    def __init__(self, memory: Memory, *, idle_seconds: float) -> None:
        self._memory = memory
        self._idle_seconds = idle_seconds
        # In this process alone: between replicas, the guard on positions in `Trajectories.append` decides.
        self._locked: set[EpisodeKey] = set()
        self._is_paused = False
        self._sweeps_from = now()

    @contextlib.contextmanager
    def enter(self, request: TurnRequest) -> Iterator[OpenEpisode]:
        """Lock the episode that the request continues, or a new one, for as long as the context is open.

        A request begins a new trajectory if it names another policy, task or person than the open one: those never
        change within a trajectory, and the memory shown in it is the person's.

        Raises:
            EpisodeBusy: another request of the episode is being answered.
        """
        # No `await` between the look-up and the lock: another request could take the same episode.
        if (request.tenant, request.episode_id) in self._locked:
            raise EpisodeBusy(f"episode {request.episode_id!r} is answering another request: wait for that answer")
        resumption = None if request.environment is not None else self._find(request)
        if resumption is not None:
            episode = OpenEpisode(resumption.trajectory.episode_id, resumption)
        else:
            episode = OpenEpisode(request.episode_id or new_id("eps"))
        key = (request.tenant, episode.episode_id)
        self._locked.add(key)
        try:
            yield episode
        finally:
            self._locked.discard(key)

    def _find(self, request: TurnRequest) -> Resumption | None:
        """Return the trajectory that the messages continue; the oldest free one if several have equal messages."""
        if request.handover is None:
            return None
        handover_digest, tail = request.handover
        is_busy = False
        waiting = self._memory.trajectories.waiting
        for trajectory in waiting(
            handover_digest=handover_digest, episode_id=request.episode_id, tenant=request.tenant
        ):
            if not _may_continue(trajectory, request):
                continue
            if _key(trajectory) in self._locked:
                is_busy = True
                continue
            # Token ids are most of a step's bytes and are not needed to continue.
            steps = self._memory.trajectories.steps(trajectory.id, with_token_ids=False)
            resumption = Resumption(trajectory, steps, tail)
            if resumption.is_sound:
                return resumption
        if is_busy:
            raise EpisodeBusy("the episode that these messages go on with is answering another request: wait for that")
        return None

    async def close(self, trajectory: Trajectory, note: str | None) -> Trajectory:
        """Close a trajectory that waits for its client as FINISHED; `note` says why it was cut short.

        Raises:
            IllegalMove: it is closed already.
            EpisodeBusy: a request of its client is being answered.
        """
        if _key(trajectory) in self._locked:
            raise EpisodeBusy(f"trajectory {trajectory.id!r} is being played: wait for the answer")
        self._locked.add(_key(trajectory))
        try:
            reply = last_handover(self._memory.trajectories.steps(trajectory.id, with_token_ids=False))
            return await self._memory.trajectories.close(
                trajectory.id,
                stage=TrajectoryStage.FINISHED,
                answer=reply.content if reply is not None else None,
                error=note,
                num_invalid_tool_calls=trajectory.num_invalid_tool_calls,
            )
        finally:
            self._locked.discard(_key(trajectory))

    def pause_sweeps(self) -> None:
        """Close nothing as idle until `resume_sweeps`: clients cannot come back while the engine is stopped."""
        self._is_paused = True

    def resume_sweeps(self, *, within_seconds: float) -> None:
        """Clients can come back within so many seconds; from then on each has the whole idle time again."""
        self._is_paused = False
        self._sweeps_from = now() + timedelta(seconds=within_seconds + self._idle_seconds)

    async def sweep(self) -> int:
        """Close the trajectories whose client did not come back in time; return their number."""
        if self._is_paused or now() < self._sweeps_from:
            return 0
        before = now() - timedelta(seconds=self._idle_seconds)
        trajectories = self._memory.trajectories
        num_closed = 0
        # In a thread, because there may be thousands. Each is looked up again before it is closed: its client may
        # have come back, or have left again, in the meantime.
        for idle in await asyncio.to_thread(trajectories.waiting, handed_over_before=before):
            still = trajectories.waiting(episode_id=idle.episode_id, handed_over_before=before, tenant=idle.tenant)
            if _key(idle) in self._locked or idle.id not in {trajectory.id for trajectory in still}:
                continue
            await self.close(idle, f"Idle: the client did not come back within {self._idle_seconds:g} seconds")
            num_closed += 1
        return num_closed

    async def sweep_regularly(self) -> None:
        """Sweep until cancelled."""
        while True:
            try:
                if num_closed := await self.sweep():
                    log.info("closed idle episodes", num_closed=num_closed)
            except StoreError as error:  # a full disk must not end the server; the next sweep tries again
                log.warning("idle episodes were not closed", error=str(error))
            await asyncio.sleep(min(SWEEP_SECONDS, self._idle_seconds / 2))


def _may_continue(trajectory: Trajectory, request: TurnRequest) -> bool:
    asker = (request.tenant, request.user_id, request.is_shared)
    if (trajectory.tenant, trajectory.user_id, trajectory.is_shared) != asker:
        return False
    if request.policy not in (None, trajectory.policy):
        return False
    task = request.task
    return task is None or (task.name, task.split) == (trajectory.task, trajectory.split)


def _key(trajectory: Trajectory) -> EpisodeKey:
    return (trajectory.tenant, trajectory.episode_id)
