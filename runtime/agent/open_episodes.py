"""Which episodes are open: what is being played here, and what waits for a client to come back.

Refuses to know how an episode is played. What waits is nowhere but in the rows: its last reply bears the digest that a
client's next request begins with (handover.py), so a restarted server takes it up as if nothing had been. In memory
there is only who is being answered now, which a restart rightly forgets.

Flow: `enter` finds the episode that a request goes on with, or begins one, and holds it until the request is answered
-> `sweep` closes what nobody came back to.
Invariants: at most one request of an episode is being answered; a tenant's episodes are its own, whatever their ids.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta

import structlog

from memory.errors import StoreError
from memory.schema import Task, Trajectory, TrajectoryStage, new_id, now
from memory.store import Memory
from runtime.agent.resume import Resumption, digest, last_handover, split_at_answer
from runtime.engine.client import Message
from runtime.errors import EpisodeBusy

SWEEP_SECONDS = 15.0

log = structlog.get_logger()


Place = tuple[str, str]
"""(tenant, episode): the ids of episodes are the clients' to choose."""


@dataclass(frozen=True)
class Entry:
    """What a request belongs to: an episode, and where it is one under way, what the client comes back to."""

    episode_id: str
    resumption: Resumption | None = None


class OpenEpisodes:
    """The open episodes of one server."""

    def __init__(self, memory: Memory, *, idle_seconds: float) -> None:
        self._memory = memory
        self._idle_seconds = idle_seconds
        self._under_way: set[Place] = set()
        self._is_held = False
        self._sweeps_from = now()

    @contextlib.contextmanager
    def enter(
        self,
        messages: Sequence[Message] | None,
        *,
        episode_id: str | None = None,
        policy: int | None = None,
        task: Task | None = None,
        tenant: str = "",
        user_id: str = "",
        is_shared: bool = False,
    ) -> Iterator[Entry]:
        """Take up the episode that `messages` go on with, or begin one; nobody else has it meanwhile.

        A request that names another policy than the one that is pinned begins a new trajectory, and so does one that
        names another task or person: none of them ever changes within one, and the memory shown in it is the person's.

        Raises:
            EpisodeBusy: a request for it is being answered already.
        """
        # No await in here: between looking and taking nobody may come.
        if (tenant, episode_id) in self._under_way:
            raise EpisodeBusy(f"episode {episode_id!r} is answering another request: wait for that answer")
        whose = (tenant, user_id, is_shared)
        resumption = None if messages is None else self._find(messages, episode_id, policy, task, whose)
        if resumption is not None:
            entry = Entry(resumption.trajectory.episode_id, resumption)
        else:
            entry = Entry(episode_id or new_id("eps"))
        place = (tenant, entry.episode_id)
        self._under_way.add(place)
        try:
            yield entry
        finally:
            self._under_way.discard(place)

    def _find(
        self,
        messages: Sequence[Message],
        episode_id: str | None,
        policy: int | None,
        task: Task | None,
        whose: tuple[str, str, bool],
    ) -> Resumption | None:
        """Return what these messages go on with, exactly; of several that look the same, the oldest that is free."""
        parts = split_at_answer(messages)
        if parts is None:
            return None
        said, tail = parts
        is_busy = False
        waiting = self._memory.trajectories.waiting
        for trajectory in waiting(handover_digest=digest(said), episode_id=episode_id, tenant=whose[0]):
            if (trajectory.tenant, trajectory.user_id, trajectory.is_shared) != whose:
                continue
            if policy not in (None, trajectory.policy):
                continue
            if task is not None and (task.name, task.split) != (trajectory.task, trajectory.split):
                continue
            if _place(trajectory) in self._under_way:
                is_busy = True
                continue
            steps = self._memory.trajectories.steps(trajectory.id, with_token_ids=False)
            resumption = Resumption(trajectory, steps, tail)
            if resumption.is_sound:
                return resumption
        if is_busy:
            raise EpisodeBusy("the episode that these messages go on with is answering another request: wait for that")
        return None

    async def close(self, trajectory: Trajectory, note: str | None) -> Trajectory:
        """Close what waits for a client, noting why if it was cut short.

        It is FINISHED: whatever it was worth, its feedback says.

        Raises:
            IllegalMove: it is closed already.
            EpisodeBusy: its client has just come back.
        """
        if _place(trajectory) in self._under_way:
            raise EpisodeBusy(f"trajectory {trajectory.id!r} is being played: wait for the answer")
        self._under_way.add(_place(trajectory))  # nobody takes it up while it closes
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
            self._under_way.discard(_place(trajectory))

    def hold(self) -> None:
        """Close nothing as idle until `release`: clients cannot come back now."""
        self._is_held = True

    def release(self, *, within_seconds: float) -> None:
        """Clients can come back again within so many seconds, and each has the whole time for it from then on."""
        self._is_held = False
        self._sweeps_from = now() + timedelta(seconds=within_seconds + self._idle_seconds)

    async def sweep(self) -> int:
        """Close what no client came back to in time; return how many."""
        if self._is_held or now() < self._sweeps_from:
            return 0
        before = now() - timedelta(seconds=self._idle_seconds)
        trajectories = self._memory.trajectories
        num_closed = 0
        # In a thread, because there may be thousands; by the time one is closed its client may be back, or gone again.
        for idle in await asyncio.to_thread(trajectories.waiting, handed_over_before=before):
            still = trajectories.waiting(episode_id=idle.episode_id, handed_over_before=before, tenant=idle.tenant)
            if _place(idle) in self._under_way or idle.id not in {trajectory.id for trajectory in still}:
                continue
            await self.close(idle, f"Idle: the client did not come back within {self._idle_seconds:g} seconds")
            num_closed += 1
        return num_closed

    async def tend(self) -> None:
        """Sweep for as long as this runs. Never returns."""
        while True:
            try:
                if num_closed := await self.sweep():
                    log.info("closed idle episodes", num_closed=num_closed)
            except StoreError as error:  # a full disk must not end the server; what is idle stays so
                log.warning("idle episodes were not closed", error=str(error))
            await asyncio.sleep(min(SWEEP_SECONDS, self._idle_seconds / 2))


def _place(trajectory: Trajectory) -> Place:
    return (trajectory.tenant, trajectory.episode_id)
