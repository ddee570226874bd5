"""Ask the agent, or have it play a task: one request is one episode, and the answer's id is its trajectory's.

Refuses to know how an episode is played; `Agent.rollout` does.
Flow: check the request -> resolve who answers -> play -> answer, at once or as server-sent events.
Invariants: an answer leaves only after its trajectory is closed and durable; a client that leaves cancels its
episode, whose trajectory closes CANCELLED.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Annotated, Any

from fastapi import APIRouter, Body, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from memory.schema import Trajectory, TrajectoryStage, new_id
from memory.store import Memory
from runtime.api.chat_answer import DONE, ChatCompletion, Episode, chunk, event
from runtime.api.chat_request import EXAMPLES, ChatRequest, Extensions, check_request, read_extensions
from runtime.api.errors import (
    KNOWN_EXCEPTIONS,
    ApiError,
    BadRequest,
    ClientLeft,
    EpisodeFailed,
    NotFound,
    NotReady,
    classify,
    error_body,
    refusals,
)
from runtime.api.health import require_ready
from runtime.api.models import resolve
from runtime.api.services import Server, Services
from runtime.api.trajectories import find_of_episode

router = APIRouter(prefix="/v1/chat", tags=["chat"])

Play = Callable[..., Coroutine[Any, Any, Trajectory]]


@router.post(
    "/completions",
    summary="Ask the agent, or have it play a task",
    response_model=ChatCompletion,
    responses=refusals(BadRequest, NotFound, EpisodeFailed, NotReady),
)
async def create_completion(
    server: Server, request: Request, body: Annotated[ChatRequest, Body(openapi_examples=EXAMPLES)]
) -> Response:
    """OpenAI's chat completions, with the agent behind the model's name. The answer's `id` (and the header
    `X-Trajectory-Id`) is the target for feedback; `X-Policy` says who acted; the object `ratchet`, what became of it.

    An episode that fails answers 502: `code` is the class of the error, `trajectory_id` leads to everything recorded.
    """
    extensions = read_extensions(body.metadata)
    check_request(body, extensions)
    play = prepare_play(server, body, extensions)
    require_ready(server)
    if body.stream:
        wants_usage = bool(body.stream_options and body.stream_options.include_usage)
        episode_id = extensions.episode_id or new_id("eps")
        return await start_stream(request, server.memory, play, episode_id, include_usage=wants_usage)
    closed = await finish_unless_left(request, play(episode_id=extensions.episode_id))
    episode = read_episode(server.memory, closed)
    if episode.trajectory.stage is not TrajectoryStage.FINISHED:
        raise failure(episode.trajectory)
    return JSONResponse(episode.completion().model_dump(mode="json"), headers=headers_for(episode.trajectory))


def prepare_play(server: Services, body: ChatRequest, extensions: Extensions) -> Play:
    """Return what plays the episode when called; everything that can be refused is refused here.

    Raises:
        NotFound, UnknownEnvironment, UnknownTask: the request names something that is not there.
    """
    version = resolve(body.model, server.memory.policies)
    task = None
    if extensions.environment is not None and extensions.task is not None:
        task = server.environment(extensions.environment).task(extensions.task)
        if extensions.split not in (None, task.split):
            raise BadRequest(
                f"task {task.name!r} is {task.split.value!r}, not {extensions.split!r}", param="metadata.split"
            )
    messages = [message.plain() for message in body.messages]

    def play(**more: Any) -> Coroutine[Any, Any, Trajectory]:
        return server.agent.rollout(
            task,
            messages=None if task else messages,  # an environment speaks first
            policy=version,
            use_memory=extensions.use_memory,
            temperature=body.temperature,
            seed=body.seed if body.seed is not None else extensions.seed,
            max_tokens=body.max_completion_tokens or body.max_tokens,
            tools=body.tools or (),
            sampling=body.sampling(),
            **more,
        )

    return play


async def finish_unless_left(request: Request, playing: Coroutine[Any, Any, Trajectory]) -> Trajectory:
    """Play to the end; cancel if the client leaves first.

    Raises:
        ClientLeft: nobody waits for the answer any more.
    """
    episode = asyncio.ensure_future(playing)
    left = asyncio.ensure_future(_wait_until_left(request))
    try:
        await asyncio.wait({episode, left}, return_when=asyncio.FIRST_COMPLETED)
        if not episode.done():
            raise ClientLeft("the client left before the answer")
        return episode.result()
    finally:
        left.cancel()
        cancel(episode)


async def _wait_until_left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def start_stream(
    request: Request, memory: Memory, play: Play, episode_id: str, *, include_usage: bool
) -> Response:
    """Set the episode going; answer with its first word, so that what fails before it still gets a status of its own.

    Raises:
        ClientLeft, EpisodeFailed, and whatever the rollout raised before it opened a trajectory.
    """
    said: asyncio.Queue[str | None] = asyncio.Queue()
    episode = asyncio.ensure_future(play(episode_id=episode_id, on_delta=said.put))
    episode.add_done_callback(lambda _: said.put_nowait(None))
    left = asyncio.ensure_future(_wait_until_left(request))
    first = asyncio.ensure_future(said.get())
    try:
        await asyncio.wait({first, left}, return_when=asyncio.FIRST_COMPLETED)
        if not first.done():
            raise ClientLeft("the client left before the answer")
        opened = _find_opened(memory, episode_id) or await episode
    except BaseException:
        cancel(episode)
        raise
    finally:
        left.cancel()
        first.cancel()
    if opened.stage not in (TrajectoryStage.RUNNING, TrajectoryStage.FINISHED):
        raise failure(opened)
    events = stream_events(memory, opened, episode, first.result(), said, include_usage=include_usage)
    return StreamingResponse(events, media_type="text/event-stream", headers=headers_for(opened))


def _find_opened(memory: Memory, episode_id: str) -> Trajectory | None:
    """Return the episode's running trajectory; None if it has ended, or if several calls share the episode."""
    running = find_of_episode(memory, episode_id, stage=TrajectoryStage.RUNNING)
    return running[0] if len(running) == 1 else None


async def stream_events(
    memory: Memory,
    opened: Trajectory,
    episode: asyncio.Future[Trajectory],
    text: str | None,
    said: asyncio.Queue[str | None],
    *,
    include_usage: bool,
) -> AsyncIterator[str]:
    """Yield the answer as it is made, `text` first; its last events only when the trajectory is closed."""
    try:
        yield chunk(opened, {"role": "assistant", "content": ""})
        streamed = ""
        while text is not None:
            streamed += text
            yield chunk(opened, {"content": text})
            text = await said.get()
        closed = read_episode(memory, episode.result())
        if closed.trajectory.stage is not TrajectoryStage.FINISHED:
            yield event(error_body(failure(closed.trajectory)))
        else:
            for ending in end_stream(closed, streamed, include_usage=include_usage):
                yield ending
        yield DONE
    except (ApiError, *KNOWN_EXCEPTIONS) as error:
        yield event(error_body(classify(error)))
        yield DONE
    finally:
        cancel(episode)


def end_stream(closed: Episode, streamed: str, *, include_usage: bool) -> list[str]:
    """Return the last events: what was not said yet, the client's tool calls, how it ended, what it cost."""
    trajectory, answer, calls = closed.trajectory, closed.trajectory.answer or "", closed.tool_calls()
    endings = []
    if answer and not streamed.endswith(answer):
        # The environment's last words are nobody's tokens.
        endings.append(chunk(trajectory, {"content": f"\n{answer}" if streamed else answer}))
    if calls:
        numbered = [{"index": index, **call.model_dump()} for index, call in enumerate(calls)]
        endings.append(chunk(trajectory, {"tool_calls": numbered}))
    endings.append(chunk(trajectory, {}, finish=closed.finish_reason, ratchet=closed.played().model_dump(mode="json")))
    if include_usage:
        endings.append(chunk(trajectory, None, usage=closed.usage().model_dump()))
    return endings


def read_episode(memory: Memory, trajectory: Trajectory) -> Episode:
    """Return a closed trajectory with its steps and the reward that counts."""
    trajectories = memory.trajectories
    reward = trajectories.effective_reward(trajectory.id)
    success = None if reward is None else reward >= trajectories.success_reward
    return Episode(trajectory, trajectories.steps(trajectory.id), reward, success)


def failure(trajectory: Trajectory) -> EpisodeFailed:
    """Return the error that a trajectory's own error becomes."""
    kind, _, message = (trajectory.error or trajectory.stage.value).partition(": ")
    failed = EpisodeFailed(
        f"the episode failed: {kind}: {message}" if message else f"the episode ended {kind}",
        code=kind,
        trajectory_id=trajectory.id,
    )
    failed.headers = headers_for(trajectory)
    return failed


def headers_for(trajectory: Trajectory) -> dict[str, str]:
    return {"X-Trajectory-Id": trajectory.id, "X-Policy": f"v{trajectory.policy}"}


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
