"""Plays a turn for a client that waits on a connection, for all HTTP APIs.

    make_request    check the client's request against this server and make the `TurnRequest`
    finish          play to the end, or
    StreamedTurn    play while the client receives the pieces, which `write_events` makes the events of one API

Invariants: an answer leaves only when it is durable; a client that leaves cancels its episode, whose trajectory closes
as CANCELLED. Hazard: once a stream has begun its HTTP status is sent, so a later failure can only be an event.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from fastapi import Request

from memory.errors import SpentBudget, find_spent_budget, read_error
from memory.schema import Split, Task, Trajectory, TrajectoryStage
from runtime.agent.graph import Agent
from runtime.agent.turn import Turn, TurnRequest, TurnStart
from runtime.api.errors import (
    KNOWN_EXCEPTIONS,
    ApiError,
    BadRequest,
    ClientLeft,
    EpisodeFailed,
    Overloaded,
    classify,
)
from runtime.api.gateway.disconnects import wait_for_disconnect
from runtime.api.gateway.permissions import Caller
from runtime.api.openai.chat_request import Extensions
from runtime.api.openai.models import resolve
from runtime.api.services import Services
from runtime.engine.client import Delta, Message, ToolDefinition
from runtime.engine.process import NO_TOOLS
from runtime.errors import EngineBusy, RequestRefused


def limit_messages(server: Services, num_messages: int, field_of_messages: str) -> None:
    """Raise BadRequest for a conversation of too many messages. Call it before the messages are looked at."""
    if num_messages > server.limits.max_messages:
        raise BadRequest(
            f"the conversation has {num_messages} messages, {server.limits.max_messages} are allowed",
            param=field_of_messages,
            code="too_many_messages",
        )


def make_request(
    server: Services,
    caller: Caller,
    extensions: Extensions,
    *,
    model: str,
    messages: Sequence[Message],
    temperature: float | None = None,
    seed: int | None = None,
    max_tokens: int | None = None,
    field_of_max_tokens: str = "max_tokens",
    tools: Sequence[ToolDefinition] = (),
    sampling: Mapping[str, Any],
) -> TurnRequest:
    """Return the request to the agent; everything that can be rejected before the turn starts is rejected here.

    Raises:
        NotFound, UnknownEnvironment, UnknownTask: the request names something that does not exist.
        TaskSealed: it names a task that nobody may ask for.
        BadRequest: more tokens than are allowed, tools for a model whose template has none, or a task of another split.
    """
    try:
        server.agent.require_allowed(max_tokens)
    except ValueError as problem:
        raise BadRequest(str(problem), param=field_of_max_tokens, code="too_many_tokens") from None
    if tools and not server.engine.takes_tools:
        raise BadRequest(NO_TOOLS, param="tools", code="unsupported_parameter")
    version = resolve(model, server.memory.policies)
    return TurnRequest(
        task=_find_task(server, extensions),
        messages=() if extensions.environment else messages,  # the environment opens the episode
        tools=tools,
        tenant=caller.tenant,
        user_id=extensions.user_id,
        key_id=caller.key_id,
        is_shared=extensions.is_shared,
        untrusted_tools=extensions.untrusted_tools,
        episode_id=extensions.episode_id,
        policy=version,
        use_memory=extensions.use_memory,
        temperature=temperature,
        seed=seed if seed is not None else extensions.seed,
        max_tokens=max_tokens,
        sampling=sampling,
        on_usage=caller.quota.spend_tokens,
    )


def _find_task(server: Services, extensions: Extensions) -> Task | None:
    if not extensions.task:
        return None
    if extensions.environment is None:
        return Task(None, extensions.task, "chat", extensions.split or Split.LIVE)
    task = server.environment(extensions.environment).open_task(extensions.task)
    if extensions.split not in (None, task.split):
        raise BadRequest(
            f"task {task.name!r} is {task.split.value!r}, not {extensions.split!r}", param="metadata.split"
        )
    return task


async def finish(request: Request, agent: Agent, turn_request: TurnRequest) -> Turn:
    """Play the turn to its end.

    Raises:
        ClientLeft: the client left before the answer.
        EpisodeFailed, BadRequest, Overloaded: the turn failed.
    """
    playing = asyncio.ensure_future(agent.rollout(turn_request))
    left = asyncio.ensure_future(wait_for_disconnect(request))
    try:
        await asyncio.wait({playing, left}, return_when=asyncio.FIRST_COMPLETED)
        if not playing.done():
            raise ClientLeft("the client left before the answer")
        # Both may have ended: then the answer counts.
        turn = playing.result()
    finally:
        left.cancel()
        cancel(playing)
    raise_failure(turn)
    return turn


class StreamedTurn:
    """A turn whose pieces are read while it is played: `wait_for_start`, then `deltas`, then `end`."""

    def __init__(self, agent: Agent, turn_request: TurnRequest) -> None:
        # Unbounded: a slow client must not slow down the engine. The limit of output tokens bounds it.
        self._deltas: asyncio.Queue[Delta | None] = asyncio.Queue()
        """None follows the last delta."""
        self._first: Delta | None = None
        self._start: TurnStart | None = None
        streamed = replace(turn_request, on_start=self._begin, on_delta=self._deltas.put)
        self._playing = asyncio.ensure_future(agent.rollout(streamed))
        # Also after a failure and a cancellation: otherwise `deltas` waits for ever.
        self._playing.add_done_callback(lambda _: self._deltas.put_nowait(None))

    def _begin(self, start: TurnStart) -> None:
        self._start = start

    async def wait_for_start(self, request: Request) -> TurnStart:
        """Wait for the first piece and return the turn's record. A failure before it still gets an HTTP status.

        Raises:
            ClientLeft, EpisodeFailed, BadRequest, Overloaded, and all that the rollout raises before it opens a
            trajectory.
        """
        left = asyncio.ensure_future(wait_for_disconnect(request))
        first = asyncio.ensure_future(self._deltas.get())
        try:
            await asyncio.wait({first, left}, return_when=asyncio.FIRST_COMPLETED)
            if not first.done():
                raise ClientLeft("the client left before the answer")
            self._first = first.result()
            if self._first is None:
                raise_failure(self.end())
        except BaseException:
            self.cancel()
            raise
        finally:
            left.cancel()
            first.cancel()
        assert self._start is not None  # `on_start` precedes the first delta
        return self._start

    async def deltas(self) -> AsyncIterator[Delta]:
        """Yield the pieces as they are written, to the last."""
        delta = self._first
        while delta is not None:
            yield delta
            delta = await self._deltas.get()

    def end(self) -> Turn:
        """Return the turn after its last piece. Raises all that the rollout raises."""
        return self._playing.result()

    def cancel(self) -> None:
        """Stop playing, if the turn is not over."""
        cancel(self._playing)


class EventWriter(Protocol):
    """Writes one turn as the server-sent events of an API."""

    def begin(self) -> Iterable[str]: ...

    def write(self, delta: Delta) -> Iterable[str]:
        """Return the events for a piece of the reply."""
        ...

    def end(self, turn: Turn) -> AsyncIterator[str]:
        """Yield the last events, after all of the answer was written: its end, and its usage."""
        ...

    def fail(self, error: ApiError) -> Iterable[str]:
        """Return the events that end a stream with an error."""
        ...


async def write_events(streamed: StreamedTurn, writer: EventWriter) -> AsyncIterator[str]:
    """Yield the events of an answer as it is written; the last ones only when everything is durable."""
    sent_text, num_sent_calls = "", 0
    try:
        for event in writer.begin():
            yield event
        async for delta in streamed.deltas():
            sent_text += delta.text
            num_sent_calls = max([num_sent_calls, *(piece["index"] + 1 for piece in delta.calls)])
            for event in writer.write(delta):
                yield event
        turn = streamed.end()
        raise_failure(turn)
        for event in writer.write(_find_rest(turn, sent_text, num_sent_calls)):
            yield event
        async for event in writer.end(turn):
            yield event
    except (ApiError, *KNOWN_EXCEPTIONS) as error:
        for event in writer.fail(classify(error)):
            yield event
    finally:
        # Also when the client has left: Starlette then cancels this generator. After the end it does nothing.
        streamed.cancel()


def _find_rest(turn: Turn, sent_text: str, num_sent_calls: int) -> Delta:
    """Return the part of an answer that no delta contained."""
    answer = turn.answer or ""
    # an environment's closing text is written by no model call
    rest = "" if sent_text.endswith(answer) else f"\n{answer}" if sent_text else answer
    calls = [{"index": index, **call} for index, call in enumerate(turn.open_tool_calls)]
    return Delta(text=rest, calls=calls[num_sent_calls:])


def raise_failure(turn: Turn) -> None:
    """Raise the API error that corresponds to a failed turn's recorded error.

    Raises:
        BadRequest: the engine rejected the request, or its context had no capacity for a single reply.
        Overloaded: the engine was busy.
        EpisodeFailed: the episode failed otherwise.
    """
    trajectory = turn.trajectory
    kind, message = read_error(trajectory.error or trajectory.stage.value)
    spent = find_spent_budget(trajectory.error)
    extra = {"trajectory_id": trajectory.id}
    refusal: ApiError | None = None
    if trajectory.stage not in (TrajectoryStage.RUNNING, TrajectoryStage.FINISHED):
        if kind == RequestRefused.__name__:
            refusal = BadRequest(message, code="request_refused", **extra)
        elif kind == EngineBusy.__name__:
            refusal = Overloaded(message, **extra)
        else:
            text = f"the episode failed: {kind}: {message}" if message else f"the episode ended {kind}"
            refusal = EpisodeFailed(text, code=kind, **extra)
    elif turn.last_call is None and trajectory.environment is None and spent is SpentBudget.CONTEXT:
        refusal = BadRequest(message, param="messages", code="context_length_exceeded", **extra)
    if refusal is not None:
        refusal.headers |= headers_for(trajectory)
        raise refusal


def headers_for(trajectory: Trajectory) -> dict[str, str]:
    """Return the response headers that name the record and the policy."""
    return {
        "X-Trajectory-Id": trajectory.id,
        "X-Episode-Id": trajectory.episode_id,
        "X-Policy": f"v{trajectory.policy}",
    }


_cancelled: set[asyncio.Future[Turn]] = set()
"""Turns that were cancelled and still close their trajectories; the event loop itself holds tasks only weakly."""


def cancel(playing: asyncio.Future[Turn]) -> None:
    """Cancel a turn whose client has left. It closes its trajectory by itself; a turn that is over stays as it is."""
    if playing.done():
        if not playing.cancelled():
            playing.exception()  # retrieved, or asyncio would log it as never retrieved
        return
    _cancelled.add(playing)
    playing.add_done_callback(_forget)
    playing.cancel()


def _forget(playing: asyncio.Future[Turn]) -> None:
    _cancelled.discard(playing)
    if not playing.cancelled():
        playing.exception()
