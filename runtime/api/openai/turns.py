"""Playing a turn for whoever waits at the other end of a connection, whichever API it speaks.

Refuses to know how an episode is played; `Agent.rollout` does. Knows no answer's shape.
Flow: `prepare` refuses what can be refused -> `finish` plays to the end, or `listen` plays while its pieces are heard.
Invariants: what is answered is durable; a client that leaves cancels its episode, whose trajectory closes CANCELLED.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request

from memory.schema import Split, Task, Trajectory, TrajectoryStage
from memory.store import Memory
from runtime.api.errors import ApiError, BadRequest, ClientLeft, EpisodeFailed, Overloaded
from runtime.api.gateway.disconnects import wait_for_disconnect
from runtime.api.gateway.permissions import Caller
from runtime.api.openai.chat_request import Extensions
from runtime.api.openai.models import resolve
from runtime.api.openai.turn import Opened, Turn, read_turn
from runtime.api.services import Services
from runtime.engine.client import Delta
from runtime.engine.process import NO_TOOLS

Play = Callable[..., Coroutine[Any, Any, Trajectory]]


@dataclass(frozen=True)
class TurnRequest:
    """What a client asks of the agent."""

    model: str
    messages: list[dict[str, Any]]
    extensions: Extensions
    caller: Caller
    temperature: float | None = None
    seed: int | None = None
    max_tokens: int | None = None
    tools: Sequence[dict[str, Any]] = ()
    sampling: dict[str, Any] = field(default_factory=dict)
    field_of_max_tokens: str = "max_tokens"


def limit_messages(server: Services, num_messages: int, field_of_messages: str) -> None:
    """Raise BadRequest for a conversation of more messages than are taken; call it before looking at any of them."""
    if num_messages > server.limits.max_messages:
        raise BadRequest(
            f"the conversation has {num_messages} messages, {server.limits.max_messages} are allowed",
            param=field_of_messages,
            code="too_many_messages",
        )


def prepare(server: Services, asked: TurnRequest) -> Play:
    """Return what plays the turn when called; everything that can be refused is refused here.

    Raises:
        NotFound, UnknownEnvironment, UnknownTask: the request names something that is not there.
        BadRequest: more tokens than are allowed, tools for a model whose template has none, or a task of another split.
    """
    try:
        server.agent.require_allowed(asked.max_tokens)
    except ValueError as problem:
        raise BadRequest(str(problem), param=asked.field_of_max_tokens, code="too_many_tokens") from None
    if asked.tools and not server.engine.takes_tools:
        raise BadRequest(NO_TOOLS, param="tools", code="unsupported_parameter")
    version = resolve(asked.model, server.memory.policies)
    extensions, task = asked.extensions, _task_of(server, asked.extensions)

    async def play(*, on_open: Opened, **more: Any) -> Trajectory:
        try:
            return await server.agent.rollout(
                task,
                messages=None if extensions.environment else asked.messages,  # an environment speaks first
                policy=version,
                use_memory=extensions.use_memory,
                temperature=asked.temperature,
                seed=asked.seed if asked.seed is not None else extensions.seed,
                max_tokens=asked.max_tokens,
                tools=asked.tools,
                sampling=asked.sampling,
                episode_id=extensions.episode_id,
                tenant=asked.caller.tenant,
                user_id=extensions.user_id,
                key_id=asked.caller.key_id,
                is_shared=extensions.is_shared,
                on_open=on_open,
                **more,
            )
        finally:  # what was used was used, however it ended
            asked.caller.quota.spend_tokens(on_open.num_tokens)

    return play


def _task_of(server: Services, extensions: Extensions) -> Task | None:
    if not extensions.task:
        return None
    if extensions.environment is None:
        return Task(None, extensions.task, "chat", extensions.split or Split.LIVE)
    task = server.environment(extensions.environment).task(extensions.task)
    if extensions.split not in (None, task.split):
        raise BadRequest(
            f"task {task.name!r} is {task.split.value!r}, not {extensions.split!r}", param="metadata.split"
        )
    return task


async def finish(request: Request, memory: Memory, play: Play) -> Turn:
    """Play the turn to its end.

    Raises:
        ClientLeft: nobody waits for the answer any more.
        EpisodeFailed, BadRequest: nothing came of it.
    """
    opened = Opened()
    episode = asyncio.ensure_future(play(on_open=opened))
    left = asyncio.ensure_future(wait_for_disconnect(request))
    try:
        await asyncio.wait({episode, left}, return_when=asyncio.FIRST_COMPLETED)
        if not episode.done():
            raise ClientLeft("the client left before the answer")
        turn = read_turn(memory, episode.result(), opened)
    finally:
        left.cancel()
        cancel(episode)
    refuse_failed(turn)
    return turn


class StreamedTurn:
    """A turn that is heard while it is played. `trajectory` and `first_position` say where it is recorded."""

    def __init__(self, memory: Memory, play: Play) -> None:
        self._memory = memory
        self._opened = Opened()
        self._said: asyncio.Queue[Delta | None] = asyncio.Queue()
        self._first: Delta | None = None
        self._episode = asyncio.ensure_future(play(on_open=self._opened, on_delta=self._said.put))
        self._episode.add_done_callback(lambda _: self._said.put_nowait(None))

    @property
    def trajectory(self) -> Trajectory:
        assert self._opened.trajectory is not None
        return self._opened.trajectory

    @property
    def first_position(self) -> int:
        return self._opened.first_position

    async def start(self, request: Request) -> None:
        """Wait for the first word, so that what fails before it still gets a status of its own.

        Raises:
            ClientLeft, EpisodeFailed, BadRequest, and whatever the rollout raised before it opened a trajectory.
        """
        left = asyncio.ensure_future(wait_for_disconnect(request))
        first = asyncio.ensure_future(self._said.get())
        try:
            await asyncio.wait({first, left}, return_when=asyncio.FIRST_COMPLETED)
            if not first.done():
                raise ClientLeft("the client left before the answer")
            self._first = first.result()
            if self._first is None:
                refuse_failed(self.end())
        except BaseException:
            self.cancel()
            raise
        finally:
            left.cancel()
            first.cancel()

    async def deltas(self) -> AsyncIterator[Delta]:
        """Yield the pieces as they are made, until there are no more."""
        delta = self._first
        while delta is not None:
            yield delta
            delta = await self._said.get()

    def end(self) -> Turn:
        """Return the turn, once its pieces have ended. Raises whatever the rollout raised."""
        return read_turn(self._memory, self._episode.result(), self._opened)

    def cancel(self) -> None:
        """Stop playing, if it still goes on: nobody hears it."""
        cancel(self._episode)


def refuse_failed(turn: Turn) -> None:
    """Raise what a failed turn's own error becomes.

    Raises:
        BadRequest: the engine refused what was asked, or there was no room for a single reply.
        Overloaded: the engine had too much to do.
        EpisodeFailed: the episode failed.
    """
    trajectory = turn.trajectory
    kind, _, message = (trajectory.error or trajectory.stage.value).partition(": ")
    extra = {"trajectory_id": trajectory.id}
    refusal: ApiError | None = None
    if trajectory.stage not in (TrajectoryStage.RUNNING, TrajectoryStage.FINISHED):
        if kind == "RequestRefused":
            refusal = BadRequest(message, code="request_refused", **extra)
        elif kind == "EngineBusy":
            refusal = Overloaded(message, **extra)
        else:
            said = f"the episode failed: {kind}: {message}" if message else f"the episode ended {kind}"
            refusal = EpisodeFailed(said, code=kind, **extra)
    elif turn.last_call is None and trajectory.environment is None and "context" in message:
        refusal = BadRequest(message, param="messages", code="context_length_exceeded", **extra)
    if refusal is not None:
        refusal.headers |= headers_for(trajectory)
        raise refusal


def headers_for(trajectory: Trajectory) -> dict[str, str]:
    return {
        "X-Trajectory-Id": trajectory.id,
        "X-Episode-Id": trajectory.episode_id,
        "X-Policy": f"v{trajectory.policy}",
    }


_leaving: set[asyncio.Future[Any]] = set()


def cancel(episode: asyncio.Future[Any]) -> None:
    """Cancel an episode that nobody waits for; it closes its trajectory by itself."""
    if episode.done():
        if not episode.cancelled():
            episode.exception()  # seen, so that asyncio does not complain of it
        return
    _leaving.add(episode)  # asyncio itself holds tasks only weakly
    episode.add_done_callback(_forget)
    episode.cancel()


def _forget(episode: asyncio.Future[Any]) -> None:
    _leaving.discard(episode)
    if not episode.cancelled():
        episode.exception()
