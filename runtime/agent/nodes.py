"""What the agent does, one node each: retrieve or resume, act, use_tools.

Refuses to know how an episode is closed, and by whom it was asked for (agent.py). A node takes the state and the
episode, and returns what changed.
Invariant: a step is durable in its trajectory before the next one starts.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import structlog
from langgraph.runtime import Runtime

from memory.conversation import show_memory
from memory.errors import StorageError, StoreError
from memory.schema import Split, Step, StepKind, Trajectory, Trust, now
from runtime.agent.client_stream import ClientStream
from runtime.agent.resume import digest, exchanges_of, last_handover, text_of
from runtime.agent.state import Episode, EpisodeState
from runtime.engine.client import Completion, Message
from runtime.engine.model_families import holds_unparsed_call
from runtime.errors import EngineLost
from runtime.tools.base import ToolResult, invalid_call, parse_arguments, run_tool

log = structlog.get_logger()


async def retrieve(state: EpisodeState, runtime: Runtime[Episode]) -> EpisodeState:
    """Find what memory has for the task, and open the trajectory with it: fixed from here on."""
    episode = runtime.context
    task = episode.task
    environment, kind = (task.environment, task.kind) if task else (None, "chat")
    memory_text, memory_ids = "", []
    if episode.use_memory:
        recollection = await episode.memory.retrieval.retrieve(
            environment=environment,
            kind=kind,
            task=task.name if task else None,
            query_text=episode.task_text,
            exclude_task=task.name if task else None,
            tenant=episode.tenant,
            user_id=episode.reader,
            episode_id=episode.episode_id,
            conversation=episode.opening,
        )
        memory_text, memory_ids = recollection.text, recollection.ids
    trajectory = Trajectory(
        id=episode.trajectory_id,
        tenant=episode.tenant,
        trust=_trust_of_opening(episode, memory_ids),
        user_id=episode.user_id,
        key_id=episode.key_id,
        is_shared=episode.is_shared,
        episode_id=episode.episode_id,
        environment=environment,
        task=task.name if task else None,
        kind=kind,
        split=task.split if task else Split.LIVE,
        task_text=episode.task_text,
        policy=episode.actor.version,
        opening=episode.opening,
        tools=episode.definitions,
        memory_text=memory_text,
        memory_ids=memory_ids,
        temperature=episode.temperature,
    )
    # Before it is durable: a write that was begun cannot be cancelled, and what is open must be closed.
    episode.trajectory = trajectory
    try:
        await episode.memory.trajectories.open(trajectory)
    except (StoreError, ValueError):
        episode.trajectory = None  # refused: there is no record to note that on
        raise
    episode.announce()
    return {"messages": show_memory(episode.opening, memory_text)}


async def resume(state: EpisodeState, runtime: Runtime[Episode]) -> EpisodeState:
    """Take the trajectory up where the client left it, and record what it brings."""
    episode = runtime.context
    handover = last_handover(episode.resumption.steps)
    names = {call["id"]: call["function"]["name"] for call in handover.tool_calls}
    episode.announce()
    for message in episode.resumption.news:
        if message["role"] == "user":
            await _record(episode, StepKind.USER, content=text_of(message))
            continue
        await _record(
            episode,
            StepKind.TOOL,
            content=text_of(message),
            tool_name=names.get(message.get("tool_call_id")),
            tool_call_id=message.get("tool_call_id"),
            seconds=(now() - handover.created_at).total_seconds(),
        )
    return {"messages": list(episode.resumption.news)}


async def act(state: EpisodeState, runtime: Runtime[Episode]) -> EpisodeState:
    """Let the policy reply; find out whether that ends the episode, or hands it over to the client."""
    episode = runtime.context
    client_tools = episode.client_tool_names
    completion = await _ask_policy(episode, state["messages"])
    episode.budget.spend(completion)
    episode.reply, episode.said = completion, episode.said + completion.content
    theirs = [call for call in completion.tool_calls if call["function"]["name"] in client_tools]
    ours = [call for call in completion.tool_calls if call["function"]["name"] not in client_tools]
    await _record(
        episode,
        StepKind.MODEL,
        content=completion.content,
        tool_calls=completion.tool_calls,
        finish_reason=completion.finish_reason,
        prompt_token_ids=completion.prompt_token_ids,
        output_token_ids=completion.output_token_ids,
        seconds=completion.seconds,
        handover_digest=_digest_handover(episode, theirs) if theirs else None,
    )
    episode.answer = completion.content
    change: EpisodeState = {"messages": [completion.as_message()], "calls": ours}
    if theirs:
        episode.num_invalid_tool_calls += sum(not _is_well_formed(call) for call in theirs)
        change["is_handed_over"] = True
    elif not ours and episode.definitions and holds_unparsed_call(completion.content):
        episode.num_invalid_tool_calls += 1
    if not ours:
        change["answer"] = completion.content
    return change


async def _ask_policy(episode: Episode, messages: Sequence[Message]) -> Completion:
    """Return the policy's reply. An engine that died before a word was heard is waited for, and asked once more."""
    ear = _stream_of(episode)
    try:
        return await _call_model(episode, messages, ear)
    except EngineLost as lost:
        if ear is not None and ear.has_heard:
            raise
        log.warning("waiting for the engine", error=str(lost))
        episode.lost = lost
    await episode.actor.engine.recover()  # the episode's own time limits it
    episode.lost = None
    return await _call_model(episode, messages, _stream_of(episode))


async def _call_model(episode: Episode, messages: Sequence[Message], ear: ClientStream | None) -> Completion:
    sampling = {"temperature": episode.temperature, "max_tokens": episode.budget.require(), "seed": _seed_of(episode)}
    request = {"model": episode.actor.served_name, **sampling}
    with episode.telemetry.model_call(f"v{episode.actor.version}", episode.episode_id, messages, request) as replied:
        completion = await episode.actor.complete(
            messages, episode.definitions, **sampling, on_delta=ear, **episode.sampling
        )
        replied(completion)
    return completion


def _stream_of(episode: Episode) -> ClientStream | None:
    return None if episode.on_delta is None else ClientStream(episode.on_delta, episode.client_tool_names)


def _seed_of(episode: Episode) -> int | None:
    return None if episode.seed is None else episode.seed + episode.budget.num_steps


def _digest_handover(episode: Episode, calls: Sequence[dict[str, Any]]) -> str:
    """Return what the client's next request must begin with: what it sent, and what it reads as the answer."""
    answer = {"role": "assistant", "content": episode.words_shown, "tool_calls": calls}
    return digest([*episode.heard, answer])


async def use_tools(state: EpisodeState, runtime: Runtime[Episode]) -> EpisodeState:
    """Run the calls of the last reply, one after the other: they act on one world."""
    episode = runtime.context
    messages: list[Message] = []
    for call in state["calls"]:
        result, seconds = await _run_call(episode, call)
        episode.num_invalid_tool_calls += result.is_invalid
        if not result.is_trusted:
            await _distrust(episode)
        await _record(
            episode,
            StepKind.TOOL,
            content=result.content,
            tool_name=call["function"]["name"],
            tool_call_id=call["id"],
            error=result.error,
            seconds=seconds,
        )
        messages.append({"role": "tool", "tool_call_id": call["id"], "content": result.content})
        if episode.is_played_out:
            return {"messages": messages, "calls": [], "answer": episode.playthrough.closing_text}
    if state.get("is_handed_over"):
        return {"messages": messages, "calls": [], "answer": episode.answer}
    return {"messages": messages, "calls": []}


def _is_well_formed(call: dict[str, Any]) -> bool:
    try:
        parse_arguments(call["function"]["arguments"])
    except ValueError:
        return False
    return True


async def _run_call(episode: Episode, call: dict[str, Any]) -> tuple[ToolResult, float]:
    started = time.monotonic()
    name = call["function"]["name"]
    tool = episode.tools.get(name)
    with episode.telemetry.tool_call(call, is_known=tool is not None) as ended:
        if tool is None:
            known = ", ".join(repr(definition["function"]["name"]) for definition in episode.definitions) or "none"
            result = invalid_call(f"there is no tool {name!r}; the tools are: {known}")
        else:
            result = await run_tool(tool, call["function"]["arguments"], tenant=episode.tenant)
        ended(result)
    return result, time.monotonic() - started if tool is not None else 0.0


def _trust_of_opening(episode: Episode, memory_ids: Sequence[str]) -> Trust:
    """Return the least trust among what the episode begins with: its memories, and earlier replies in its messages."""
    exchanges = exchanges_of(episode.opening)
    try:
        return episode.memory.trajectories.trust_of(memory_ids=memory_ids, exchanges=exchanges, tenant=episode.tenant)
    except StorageError as error:
        log.warning("trust is unknown, so the episode is untrusted", error=str(error))
        return Trust.UNTRUSTED


async def _distrust(episode: Episode) -> None:
    """Mark the trajectory before untrusted text is recorded: a crash in between must not leave the text trusted."""
    if episode.trajectory.trust is Trust.TRUSTED:
        await episode.memory.trajectories.distrust(episode.trajectory.id)
        episode.trajectory.trust = Trust.UNTRUSTED


async def _record(episode: Episode, kind: StepKind, *, tool_calls: Sequence[dict[str, Any]] = (), **said: Any) -> None:
    """Append a step to the trajectory; durable when it returns."""
    step = Step(
        trajectory_id=episode.trajectory.id,
        position=episode.num_recorded,
        kind=kind,
        # Named here because SQLModel inspects the signature of every default's factory anew for every row: a tenth
        # of what an episode costs this process.
        tool_calls=list(tool_calls),
        created_at=now(),
        **said,
    )
    await episode.memory.trajectories.append(step, trajectory=episode.trajectory)
    episode.steps.append(step)
    episode.num_recorded += 1
