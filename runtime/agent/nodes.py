"""The nodes of the agent's graph: retrieve or resume, then act and use_tools alternately; in a team, plan before them
and check after them.

A node takes the state and the episode, and returns the change of the state; LangGraph appends the returned messages.
Invariant: a step is durable in its trajectory before the next one starts.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import structlog
from langgraph.runtime import Runtime

from memory.conversation import restore_messages, show_memory, show_plan, text_of
from memory.errors import StorageError, StoreError
from memory.schema import Split, Step, StepKind, Trajectory, Trust, now
from memory.team import Check, Role, read_check, write_note
from runtime.agent.client_stream import BufferedStream, ClientStream
from runtime.agent.resume import digest, exchanges_of, last_handover
from runtime.agent.state import Episode, EpisodeState, UncheckedAnswer
from runtime.agent.team import MAX_ROLE_TOKENS, check_messages, plan_messages
from runtime.engine.client import Completion, Message, ToolCall
from runtime.engine.model_families import holds_unparsed_call
from runtime.errors import BudgetExceeded, EngineLost, PolicyError
from runtime.tools.base import ToolResult, invalid_call, parse_arguments, run_tool

log = structlog.get_logger()

REPLAYED_FIELDS = ("content", "tool_name", "tool_call_id", "error", "finish_reason")
UNREADABLE = "the check is neither ACCEPT nor REVISE with a note"


async def retrieve(state: EpisodeState, runtime: Runtime[Episode]) -> EpisodeState:
    """Retrieve memories for the task and open the trajectory with them; they stay the same for the whole episode. A
    branch begins with the memories of its origin, and with the steps that were replayed."""
    episode = runtime.context
    request, task, origin = episode.request, episode.request.task, episode.request.origin
    memory_text, memory_ids = await _recall(episode)
    trajectory = Trajectory(
        id=episode.trajectory_id,
        tenant=request.tenant,
        trust=_trust_of_opening(episode, memory_ids) if origin is None else origin.trajectory.trust,
        user_id=request.user_id,
        key_id=request.key_id,
        is_shared=request.is_shared,
        episode_id=episode.episode_id,
        environment=task.environment if task else None,
        task=task.name if task else None,
        kind=task.kind if task else "chat",
        split=task.split if task else Split.LIVE,
        task_text=episode.task_text,
        policy=episode.leased.version,
        opening=episode.opening,
        tools=episode.definitions,
        memory_text=memory_text,
        memory_ids=memory_ids,
        temperature=episode.temperature,
        branch_of=origin.trajectory.id if origin else None,
        branch_position=len(origin.steps) if origin else None,
    )
    # Set before it is durable: a write that began cannot be cancelled, and an open trajectory must be closed.
    episode.trajectory = trajectory
    try:
        await episode.memory.trajectories.open(trajectory)
    except (StoreError, ValueError):
        episode.trajectory = None  # no row was written, so there is nothing to close
        raise
    episode.announce()
    if episode.start_error is not None:
        raise episode.start_error
    if Role.PLANNER in episode.team:
        # The plan belongs into the last of these messages, and LangGraph only appends to them: `plan` returns them.
        return {}
    replayed = origin.steps if origin else ()
    for step in replayed:
        # Without token ids: they were sampled once, in the origin.
        copied = {name: getattr(step, name) for name in REPLAYED_FIELDS}
        await _record(episode, step.kind, tool_calls=step.tool_calls, **copied)
    return {"messages": [*show_memory(episode.opening, memory_text), *restore_messages(replayed)]}


async def _recall(episode: Episode) -> tuple[str, list[str]]:
    """Return the memory segment and the ids of what is in it; empty without memory."""
    request, task = episode.request, episode.request.task
    if request.origin is not None:
        return request.origin.trajectory.memory_text, request.origin.trajectory.memory_ids
    # A task that did not start has no text to search with.
    if not episode.use_memory or episode.start_error is not None:
        return "", []
    segment = await episode.memory.retrieval.retrieve(
        environment=task.environment if task else None,
        kind=task.kind if task else "chat",
        task=task.name if task else None,
        query_text=episode.task_text,
        # A task's own episodes would show it its answer.
        exclude_task=task.name if task else None,
        tenant=request.tenant,
        user_id=episode.reader,
        episode_id=episode.episode_id,
        conversation=episode.opening,
    )
    return segment.text, segment.ids


async def plan(state: EpisodeState, runtime: Runtime[Episode]) -> EpisodeState:
    """Write the plan, once an episode, and show it to the actor."""
    episode = runtime.context
    messages = plan_messages(episode.opening, episode.definitions)
    completion = await _ask_policy(episode, messages, Role.PLANNER)
    episode.budget.spend(completion)
    await _record_call(episode, completion, role=Role.PLANNER)
    shown = show_plan(episode.opening, completion.content)
    return {"messages": show_memory(shown, episode.record.memory_text)}


async def resume(state: EpisodeState, runtime: Runtime[Episode]) -> EpisodeState:
    """Continue the trajectory: record the tool results and user messages that the client sent."""
    episode = runtime.context
    resumption = episode.resumption
    assert resumption is not None
    handover = last_handover(resumption.steps)
    assert handover is not None
    # By id, not by order: clients may send results in any order.
    names = {call["id"]: call["function"]["name"] for call in handover.tool_calls}
    episode.announce()
    calls: Message = {"role": "assistant", "tool_calls": handover.tool_calls}
    # also what is recorded already: an earlier request may not have named the tool
    recorded = any(step.tool_name in episode.request.untrusted_tools for step in resumption.steps)
    if recorded or _holds_untrusted_result(episode, [calls, *resumption.new_messages]):
        await _distrust(episode)
    for message in resumption.new_messages:
        if message["role"] == "user":
            await _record(episode, StepKind.USER, content=text_of(message))
            continue
        await _record(
            episode,
            StepKind.TOOL,
            content=text_of(message),
            tool_name=names.get(message.get("tool_call_id")),
            tool_call_id=message.get("tool_call_id"),
            # With all of the client's own time, restarts of this server included.
            seconds=(now() - handover.created_at).total_seconds(),
        )
    # The recorded reply before these, not the client's copy of it: the prompt must begin with the tokens sampled
    # before.
    return {"messages": list(resumption.new_messages)}


async def act(state: EpisodeState, runtime: Runtime[Episode]) -> EpisodeState:
    """Call the model; its reply ends the turn, calls the server's tools, or hands the episode over to the client."""
    episode = runtime.context
    client_tools = episode.client_tool_names
    completion = await _ask_policy(episode, state.get("messages", []))
    episode.budget.spend(completion)
    is_checked = _is_checked(episode) and not completion.tool_calls
    if not is_checked:
        episode.reply, episode.text = completion, episode.text + completion.content
    client_calls = [call for call in completion.tool_calls if call["function"]["name"] in client_tools]
    server_calls = [call for call in completion.tool_calls if call["function"]["name"] not in client_tools]
    # Recorded before any of its calls runs: after a crash in a tool the trajectory must show the call.
    await _record_call(
        episode,
        completion,
        tool_calls=completion.tool_calls,
        handover_digest=_digest_handover(episode, client_calls) if client_calls else None,
        role=episode.role,
    )
    if is_checked:
        return _await_check(episode, completion)
    if episode.buffered_stream is not None:
        await episode.buffered_stream.release()
    # Although the turn may go on: if its budget ends it, this is the answer that is recorded.
    episode.answer = completion.content
    change: EpisodeState = {"messages": [completion.as_message()], "calls": server_calls, "is_unchecked": False}
    if _ends_task(episode, completion):
        return {**change, "calls": [], "is_over": True}
    if client_calls:
        episode.num_invalid_tool_calls += sum(not _is_well_formed(call) for call in client_calls)
        episode.is_handed_over = True
    elif not server_calls and _is_broken_call(episode, completion):
        episode.num_invalid_tool_calls += 1
    return {**change, "is_over": not server_calls}


async def check(state: EpisodeState, runtime: Runtime[Episode]) -> EpisodeState:
    """Let the checker read an answer: it is accepted, or the actor gets a note and answers again."""
    episode = runtime.context
    assert episode.unchecked is not None
    decision = await _ask_checker(episode, episode.unchecked.reply.content)
    if decision.accepts or not episode.budget.has_capacity:
        await accept_answer(episode)
        return {"is_over": True}
    episode.num_notes_left -= 1
    episode.unchecked = replace(episode.unchecked, stream=None)
    note = write_note(decision.note)
    await _record(episode, StepKind.USER, content=note, role=Role.CHECKER)
    return {"messages": [{"role": "user", "content": note}]}


def _await_check(episode: Episode, completion: Completion) -> EpisodeState:
    episode.unchecked, episode.buffered_stream = UncheckedAnswer(completion, episode.buffered_stream), None
    episode.num_invalid_tool_calls += _is_broken_call(episode, completion)
    return {"messages": [completion.as_message()], "calls": [], "is_unchecked": True}


async def accept_answer(episode: Episode) -> None:
    """Let the environment and the client read the last answer, if they have not yet.

    Also for an answer that was sent back, where a limit ended the episode before the actor gave another one.
    """
    unchecked, episode.unchecked = episode.unchecked, None
    if unchecked is None or (episode.playthrough is not None and episode.playthrough.is_done):
        return
    reply = unchecked.reply
    episode.reply, episode.answer, episode.text = reply, reply.content, episode.text + reply.content
    if unchecked.stream is not None:
        await unchecked.stream.release()
    _read_reply(episode, reply)


def _is_checked(episode: Episode) -> bool:
    """Whether the checker reads the actor's next answer before anybody else does."""
    return Role.CHECKER in episode.team and episode.num_notes_left > 0


async def _ask_checker(episode: Episode, answer: str) -> Check:
    """Return the checker's decision. An answer that it could not read, because the budget was spent or the engine
    failed, or whose check cannot be read, is accepted: a checker must never cost an answer."""
    # The last step is the answer itself.
    messages = check_messages(episode.opening, episode.all_steps[:-1], answer)
    try:
        completion = await _ask_policy(episode, messages, Role.CHECKER)
    except (BudgetExceeded, PolicyError) as error:
        log.warning("an answer is not checked", error=type(error).__name__)
        episode.telemetry.check("skipped")
        return Check(True)
    episode.budget.spend(completion)
    decision = read_check(completion.content)
    await _record_call(episode, completion, role=Role.CHECKER, error=None if decision else UNREADABLE)
    episode.telemetry.check("unreadable" if decision is None else "accepted" if decision.accepts else "sent_back")
    return decision or Check(True)


def _ends_task(episode: Episode, completion: Completion) -> bool:
    """Let the environment's task read the reply; return whether it ends the task, so that none of its calls runs."""
    if not _read_reply(episode, completion):
        return False
    # Counted here, because `use_tools` and its checks come no more.
    calls = completion.tool_calls
    episode.num_invalid_tool_calls += sum(
        not _is_well_formed(call) or call["function"]["name"] not in episode.tools for call in calls
    )
    episode.num_invalid_tool_calls += not calls and _is_broken_call(episode, completion)
    return True


def _read_reply(episode: Episode, completion: Completion) -> bool:
    """Let the environment's task read the reply; return whether the task is over, with its closing text as answer."""
    playthrough = episode.playthrough
    if playthrough is None:
        return False
    playthrough.read_reply(completion.content, completion.tool_calls)
    if playthrough.is_done:
        episode.answer = playthrough.closing_text or completion.content
    return playthrough.is_done


def _is_broken_call(episode: Episode, completion: Completion) -> bool:
    """Whether a reply without calls holds one that the engine could not parse."""
    return bool(episode.definitions) and holds_unparsed_call(completion.content)


async def _ask_policy(episode: Episode, messages: Sequence[Message], role: Role = Role.ACTOR) -> Completion:
    """Return the policy's reply. If the engine dies before the client received a piece, wait for it and call again."""
    stream = _stream_of(episode, role)
    try:
        return await _call_model(episode, messages, stream, role)
    except EngineLost as lost:
        if stream is not None and stream.has_sent:
            raise
        log.warning("waiting for the engine", error=lost.message)
        episode.lost = lost
    await episode.leased.engine.recover()  # limited by the episode's own time
    episode.lost = None
    # Once: a request that kills the engine kills it twice at most.
    return await _call_model(episode, messages, _stream_of(episode, role), role)


async def _call_model(
    episode: Episode, messages: Sequence[Message], stream: ClientStream | BufferedStream | None, role: Role
) -> Completion:
    is_actor, max_tokens = role is Role.ACTOR, episode.budget.require()
    # The request's tools, and its parameters such as a format of the answer, are the actor's alone.
    tools, further = (episode.definitions, episode.sampling) if is_actor else ([], episode.salts)
    max_tokens = max_tokens if is_actor else min(max_tokens, MAX_ROLE_TOKENS)
    sampling = {"temperature": episode.temperature, "max_tokens": max_tokens, "seed": _seed_of(episode)}
    if episode.request.keeps_logprobs:
        sampling["logprobs"] = True
    request = {"model": episode.leased.served_name, **sampling}
    with episode.telemetry.model_call(f"v{episode.leased.version}", episode.episode_id, messages, request) as replied:
        partial = Completion()
        try:
            completion = await episode.leased.complete(
                messages, tools, **sampling, on_delta=stream, partial=partial, **further
            )
        except asyncio.CancelledError:  # what a client that leaves has received was produced, and is charged
            episode.budget.num_tokens += partial.num_tokens
            raise
        replied(completion)
    return completion


def _stream_of(episode: Episode, role: Role) -> ClientStream | BufferedStream | None:
    on_delta = episode.request.on_delta
    if on_delta is None or role is not Role.ACTOR:
        return None
    stream = ClientStream(on_delta, episode.client_tool_names)
    episode.buffered_stream = BufferedStream(stream) if _is_checked(episode) else None
    return episode.buffered_stream or stream


def _seed_of(episode: Episode) -> int | None:
    seed = episode.request.seed
    return None if seed is None else seed + episode.budget.num_steps


def _digest_handover(episode: Episode, calls: Sequence[ToolCall]) -> str:
    """Return the digest of the conversation that the client's next request must begin with."""
    # Must equal what the client received, tool calls of the server left out; resume.py forgives differences of form
    # only.
    answer = {"role": "assistant", "content": episode.visible_text, "tool_calls": calls}
    return digest([*episode.request.messages, answer])


async def use_tools(state: EpisodeState, runtime: Runtime[Episode]) -> EpisodeState:
    """Run the server's calls of the last reply one after the other, because they act on one environment."""
    episode = runtime.context
    messages: list[Message] = []
    for call in state.get("calls", []):
        result, seconds = await run_call(episode, call)
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
        # Calls that follow in the same reply are dropped: the environment takes no more actions.
        if episode.playthrough is not None and episode.playthrough.is_done:
            episode.answer = episode.playthrough.closing_text
            return {"messages": messages, "calls": [], "is_over": True}
    return {"messages": messages, "calls": [], "is_over": episode.is_handed_over}


def _is_well_formed(call: ToolCall) -> bool:
    try:
        parse_arguments(call["function"]["arguments"])
    except ValueError:
        return False
    return True


async def run_call(episode: Episode, call: ToolCall) -> tuple[ToolResult, float]:
    """Run one call of the server's tools; return its result and the seconds it took."""
    started = time.monotonic()
    name = call["function"]["name"]
    tool = episode.tools.get(name)
    with episode.telemetry.tool_call(call, is_known=tool is not None) as ended:
        if tool is None:
            known = ", ".join(repr(definition["function"]["name"]) for definition in episode.definitions) or "none"
            result = invalid_call(f"there is no tool {name!r}; the tools are: {known}")
        else:
            result = await run_tool(tool, call["function"]["arguments"], tenant=episode.request.tenant)
        ended(result)
    return result, time.monotonic() - started if tool is not None else 0.0


def _trust_of_opening(episode: Episode, memory_ids: Sequence[str]) -> Trust:
    """Return the lowest trust of the memories and of the earlier replies that the episode begins with."""
    exchanges, handover = exchanges_of(episode.opening), episode.request.handover
    if _holds_untrusted_result(episode, episode.opening):
        return Trust.UNTRUSTED
    try:
        return episode.memory.trajectories.trust_of(
            memory_ids=memory_ids,
            exchanges=exchanges,
            handover_digest=handover[0] if handover is not None else None,
            tenant=episode.request.tenant,
        )
    except StorageError as error:
        log.warning("trust is unknown, so the episode is untrusted", error=str(error))
        return Trust.UNTRUSTED


def _holds_untrusted_result(episode: Episode, messages: Sequence[Message]) -> bool:
    """Whether one of these messages is the result of a tool that the request calls untrusted."""
    untrusted = episode.request.untrusted_tools
    if not untrusted:  # nearly always: no walk through the conversation
        return False
    # a model may give two calls the same id: then either may be meant
    ids: set[str] = set()
    for message in messages:
        calls = message.get("tool_calls") or ()
        ids |= {call["id"] for call in calls if call["function"]["name"] in untrusted}
        if message["role"] == "tool" and message.get("tool_call_id") in ids:
            return True
    return False


async def _distrust(episode: Episode) -> None:
    """Mark the trajectory as untrusted; before the text is recorded, or a crash in between would leave it trusted."""
    if episode.record.trust is Trust.TRUSTED:
        await episode.memory.trajectories.distrust(episode.record.id)
        episode.record.trust = Trust.UNTRUSTED


async def _record_call(episode: Episode, completion: Completion, **values: Any) -> None:
    """Append a model call to the trajectory; durable when it returns."""
    await _record(
        episode,
        StepKind.MODEL,
        content=completion.content,
        finish_reason=completion.finish_reason,
        prompt_token_ids=completion.prompt_token_ids,
        output_token_ids=completion.output_token_ids,
        output_logprobs=completion.output_logprobs,
        seconds=completion.seconds,
        **values,
    )


async def _record(episode: Episode, kind: StepKind, *, tool_calls: Sequence[ToolCall] = (), **values: Any) -> None:
    """Append a step to the trajectory; durable when it returns."""
    step = Step(
        trajectory_id=episode.record.id,
        position=episode.next_position,
        kind=kind,
        # Given explicitly: SQLModel inspects the signature of each default's factory for every row, which took a tenth
        # of this process's time per episode.
        tool_calls=list(tool_calls),
        created_at=now(),
        **values,
    )
    # If this raises, the step must not be in `steps`: `next_position` counts only durable ones.
    await episode.memory.trajectories.append(step, trajectory=episode.record)
    episode.steps.append(step)
