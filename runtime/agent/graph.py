"""The agent: a graph of three nodes, and `rollout`, which plays one episode through it and records every step.

    retrieve ─┬> act ─> use_tools
      resume ─┘  │ ^       │ │
                 │ └───────┘ │      until an answer, the environment's last words, a spent budget, or the client's turn
                 v           v
                end         end

Refuses to know who asks: a user's request, a practice episode and an evaluation take this same path.
Flow: find the episode -> lease the policy -> play -> judge (reward) -> close the trajectory -> return it. Where the
reply calls tools that the client runs, the trajectory stays open, and the client's next request goes on with it.

Invariants: the policy is pinned before the trajectory opens and until it is closed; an opened trajectory is closed in
all cases, or waits for its client; nothing of one tenant or person reaches an episode of another; what goes wrong
within an episode is data on its trajectory, not an exception, and its message stays out of the log; a rehearsal
(practice, held out) holds no tool that acts on the outside.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any

import structlog
from langgraph.graph import END, START, StateGraph

from memory.conversation import show_memory
from memory.schema import RewardSource, Split, Task, Trajectory, TrajectoryStage, new_id
from memory.store import Memory
from runtime.agent.nodes import act, resume, retrieve, use_tools
from runtime.agent.open_episodes import Entry, OpenEpisodes
from runtime.agent.resume import restore_messages
from runtime.agent.state import Budget, Episode, EpisodeState, OnOpen
from runtime.config import AgentConfig
from runtime.engine.cache_salts import CacheSalts
from runtime.engine.client import Message, OnDelta
from runtime.environments.base import Environment, Outcome, Playthrough, find_environment
from runtime.errors import BudgetExceeded
from runtime.observability.telemetry import Telemetry
from runtime.serving.hotswap import HotSwap
from runtime.serving.policy import Actor
from runtime.tools.base import Tool
from runtime.tools.recorded import tools_for

log = structlog.get_logger()


class Agent:
    """Plays episodes. Holds nothing of any one of them."""

    def __init__(
        self,
        memory: Memory,
        hotswap: HotSwap,
        environments: Mapping[str, Environment],
        config: AgentConfig | None = None,
        *,
        tools: Sequence[Tool] = (),
        telemetry: Telemetry | None = None,
        serve_with_memory: bool = True,
    ) -> None:
        self._memory = memory
        self._hotswap = hotswap
        self._environments = environments
        self._config = config or AgentConfig()
        self.serve_with_memory = serve_with_memory
        """Whether memory is shown where neither the request nor the policy says."""
        self._tools = tools
        """Run by the server in requests that name no environment; whoever made the list may fill it later."""
        self.telemetry = telemetry or Telemetry()
        self.book = OpenEpisodes(memory, idle_seconds=self._config.client_idle_seconds)
        self._salts = CacheSalts()
        self._graph = build_graph()

    def environment(self, name: str) -> Environment:
        """Return the environment called `name`. Raises: UnknownEnvironment."""
        return find_environment(self._environments, name)

    def temperature_of(self, environment: Environment | None) -> float:
        """Return how replies are sampled where the request does not say."""
        declared = environment.temperature if environment is not None else None
        return self._config.temperature if declared is None else declared

    def output_tokens_of(self, environment: Environment | None) -> int:
        """Return how many tokens one model call may write where the request does not say."""
        config = self._config
        ordinary = config.default_output_tokens if environment is None else environment.max_output_tokens
        return ordinary if config.max_output_tokens is None else min(ordinary, config.max_output_tokens)

    def require_allowed(self, max_tokens: int | None) -> None:
        """Raise ValueError, with the name of the setting, if a request asks for more tokens than may be written."""
        limits = {name: getattr(self._config, name) for name in ("max_output_tokens", "max_total_tokens")}
        for name, limit in limits.items():
            if max_tokens is not None and limit is not None and max_tokens > limit:
                raise ValueError(
                    f"{max_tokens} tokens are asked for, and this server allows {limit} (agent.{name}): ask for fewer"
                )

    async def rollout(
        self,
        task: Task | None,
        *,
        messages: Sequence[Message] | None = None,
        policy: int | None = None,
        use_memory: bool | None = None,
        temperature: float | None = None,
        seed: int | None = None,
        max_tokens: int | None = None,
        tools: Sequence[dict[str, Any]] = (),
        sampling: Mapping[str, Any] | None = None,
        episode_id: str | None = None,
        tenant: str = "",
        user_id: str = "",
        key_id: str | None = None,
        is_shared: bool = False,
        on_open: OnOpen | None = None,
        on_delta: OnDelta | None = None,
    ) -> Trajectory:
        """Play one episode and return its closed trajectory; its record and reward are durable by then.

        Either a `task` of an environment (which speaks first) or `messages` (a client does; a `task` beside them is its
        own, and says what the record is about). `tools` are definitions of tools that the client runs: a reply that
        calls one ends this turn, and the trajectory is returned RUNNING. Messages that begin with all of that and bring
        the results go on with it: same policy, same memory, same trajectory.
        `user_id` is the person it is asked for, `key_id` the API key; `is_shared`: no person is behind it.
        `use_memory` of None is as the policy serves. `sampling` goes to the engine as it is; `max_tokens` bounds one
        model call; `on_open` is called when the record is open, `on_delta` is awaited with each piece the model writes
        for the client.

        Raises:
            ValueError: nothing was asked, or tools that cannot be.
            EpisodeBusy: the episode is answering another request.
            UnknownEnvironment, UnknownPolicy, AdapterError, EngineError: the episode could not even open.
        """
        environment = self.environment(task.environment) if task and task.environment is not None else None
        if environment is not None and tools:
            raise ValueError(f"a task of {environment.name!r} brings its own tools: send none with it")
        if environment is None and not messages:
            raise ValueError("nothing was asked: give a task of an environment, or at least one message")
        _refuse_namesakes(() if environment is not None else self._tools, tools)
        config = self._config
        asked = None if environment is not None else messages
        whose = {"tenant": tenant, "user_id": user_id, "is_shared": is_shared}
        # What is remembered of a shared or practised episode is shown to all: nothing of one person's may be in it.
        reader = "" if is_shared or environment is not None else user_id
        with self.book.enter(asked, episode_id=episode_id, policy=policy, task=task, **whose) as entry:
            pinned = entry.resumption.trajectory.policy if entry.resumption is not None else policy
            async with self._hotswap.lease(pinned) as actor:
                playthrough = await environment.start(task) if environment is not None else None
                split = entry.resumption.trajectory.split if entry.resumption else task.split if task else Split.LIVE
                episode = Episode(
                    memory=self._memory,
                    telemetry=self.telemetry,
                    actor=actor,
                    **whose,
                    key_id=key_id,
                    reader=reader,
                    episode_id=entry.episode_id,
                    task=task,
                    playthrough=playthrough,
                    tools={tool.name: tool for tool in self._tools_for(split, playthrough, tenant, reader)},
                    client_tools=list(tools),
                    budget=Budget(
                        max_steps=config.max_steps,
                        max_total_tokens=config.max_total_tokens,
                        max_output_tokens=max_tokens or self.output_tokens_of(environment),
                    ),
                    use_memory=self._uses_memory(actor) if use_memory is None else use_memory,
                    temperature=self.temperature_of(environment) if temperature is None else temperature,
                    seed=seed,
                    sampling={**(sampling or {}), **self._salts.for_tenant(tenant)},
                    on_delta=on_delta,
                    on_open=on_open,
                    heard=list(messages or ()),
                    **self._begin(entry, actor, environment, playthrough, messages or ()),
                )
                return await self._watch(episode)

    def _uses_memory(self, actor: Actor) -> bool:
        return self.serve_with_memory if actor.policy.use_memory is None else actor.policy.use_memory

    def _begin(
        self,
        entry: Entry,
        actor: Actor,
        environment: Environment | None,
        playthrough: Playthrough | None,
        messages: Sequence[Message],
    ) -> dict[str, Any]:
        """Return where the episode begins: at its opening, or where the client left it."""
        if entry.resumption is not None:
            trajectory = entry.resumption.trajectory
            return {
                "opening": trajectory.opening,
                "task_text": trajectory.task_text,
                "resumption": entry.resumption,
                "trajectory_id": trajectory.id,
                "trajectory": trajectory,
                "num_recorded": len(entry.resumption.steps),
                "num_invalid_tool_calls": trajectory.num_invalid_tool_calls,
            }
        opening = [{"role": "user", "content": playthrough.task_text}] if playthrough else list(messages)
        return {
            "opening": self._with_system_prompt(opening, actor, environment),
            "task_text": _last_user_text(opening),
            "trajectory_id": new_id("trj"),
        }

    def _tools_for(self, split: Split, playthrough: Playthrough | None, tenant: str, reader: str) -> list[Tool]:
        tools = playthrough.tools if playthrough else self._tools
        recorded_result = self._memory.trajectories.recorded_result
        return tools_for(split, tools, partial(recorded_result, tenant=tenant, user_id=reader))

    def _with_system_prompt(
        self, opening: list[Message], actor: Actor, environment: Environment | None
    ) -> list[Message]:
        if opening[0].get("role") in ("system", "developer"):
            return opening
        prompt = actor.policy.system_prompt
        if prompt is None:
            prompt = environment.system_prompt if environment is not None else self._config.system_prompt
        return [{"role": "system", "content": prompt}, *opening] if prompt else opening

    async def _watch(self, episode: Episode) -> Trajectory:
        """Play, while logs and spans know of what."""
        names = {"trajectory_id": episode.trajectory_id, "episode_id": episode.episode_id}
        policy = f"v{episode.actor.version}"
        with (
            structlog.contextvars.bound_contextvars(**names),
            self.telemetry.tracing.invoke_agent(**names, policy=policy) as note,
        ):
            trajectory = await self._play(episode)
            note(trajectory)
            return trajectory

    async def _play(self, episode: Episode) -> Trajectory:
        """Run the graph, judge, close the trajectory. The episode's edge: here a failure becomes data."""
        stage, error = TrajectoryStage.FINISHED, None
        try:
            error = await self._run(episode)
            if error is None and episode.is_handed_over:
                return await _leave_open(episode)
            await _judge(episode)
        except asyncio.CancelledError:
            # Shielded: who cancels once may cancel again, and the record must be closed all the same.
            await asyncio.shield(_close(episode, TrajectoryStage.CANCELLED, "CancelledError: nobody waits any more"))
            raise
        except Exception as raised:
            if episode.trajectory is None:  # memory could not even open a record to note this on
                await _leave(episode)
                raise
            stage, error = TrajectoryStage.FAILED, _describe(raised)
            log.warning("episode failed", error=type(raised).__name__)  # the message may hold a person's words
        return await _close(episode, stage, error)

    async def _run(self, episode: Episode) -> str | None:
        """Run the graph to its end, or to the end of the budget; return what was exceeded, if anything."""
        limit = asyncio.timeout(self._config.max_seconds)
        # Two nodes a step, and room for the rest: the budget ends an episode, never the graph.
        config = {"recursion_limit": 2 * self._config.max_steps + 10}
        try:
            async with limit:
                state = await self._graph.ainvoke(_begin_state(episode), context=episode, config=config)
        except BudgetExceeded as exceeded:
            return _describe(exceeded)
        except TimeoutError:
            if not limit.expired():
                raise
            if episode.lost is not None:  # not the policy's fault, and nothing to be learned from
                raise episode.lost from None
            return _describe(BudgetExceeded(f"no answer within {self._config.max_seconds:g} seconds"))
        episode.answer = state["answer"]
        episode.is_handed_over = state.get("is_handed_over", False)
        return None


async def _judge(episode: Episode) -> None:
    """Have the environment, if there is one, say what the episode was worth; durable when it returns."""
    outcome = await _leave(episode)
    if outcome is not None:
        await episode.memory.trajectories.reward(
            episode.trajectory.id, outcome.value, RewardSource.ENVIRONMENT, outcome.reason
        )


async def _leave_open(episode: Episode) -> Trajectory:
    """Leave the trajectory to its client. Everything is in the rows already, but for a count that is seldom news."""
    trajectory, num_invalid = episode.trajectory, episode.num_invalid_tool_calls
    if num_invalid != trajectory.num_invalid_tool_calls:
        await episode.memory.trajectories.note_invalid_calls(trajectory.id, num_invalid)
        trajectory.num_invalid_tool_calls = num_invalid
    return trajectory


async def _leave(episode: Episode) -> Outcome | None:
    """Close the playthrough, once."""
    playthrough, episode.playthrough = episode.playthrough, None
    return await playthrough.close() if playthrough is not None else None


async def _close(episode: Episode, stage: TrajectoryStage, error: str | None) -> Trajectory | None:
    """Leave a playthrough that nobody judged, then close the trajectory, if there is one; durable when it returns."""
    (problem,) = await asyncio.gather(_leave(episode), return_exceptions=True)
    if isinstance(problem, Exception):  # the episode ended for another reason, which is the one to record
        log.warning("environment did not close", error=type(problem).__name__)
    if episode.trajectory is None:
        return None
    return await episode.memory.trajectories.close(
        episode.trajectory.id,
        stage=stage,
        answer=episode.answer,
        error=error,
        num_invalid_tool_calls=episode.num_invalid_tool_calls,
        reply=episode.words_shown,
    )


def build_graph():
    """Return the compiled graph."""
    graph = StateGraph(EpisodeState, context_schema=Episode)
    graph.add_node("retrieve", retrieve)
    graph.add_node("resume", resume)
    graph.add_node("act", act)
    graph.add_node("use_tools", use_tools)
    graph.add_conditional_edges(START, _begin, ["resume", "retrieve"])
    graph.add_edge("retrieve", "act")
    graph.add_edge("resume", "act")
    graph.add_conditional_edges("act", _end_or("use_tools"), ["use_tools", END])
    graph.add_conditional_edges("use_tools", _end_or("act"), ["act", END])
    return graph.compile()


# Asynchronous, though nothing is awaited: LangGraph asks a plain function in a thread, at the price of a model call's
# whole overhead.


async def _begin(state: EpisodeState) -> str:
    """What is resumed has been said already; what is retrieved for has not begun."""
    return "resume" if state["messages"] else "retrieve"


def _end_or(node: str) -> Callable[[EpisodeState], Awaitable[str]]:
    async def choose(state: EpisodeState) -> str:
        return node if state.get("answer") is None else END

    return choose


def _begin_state(episode: Episode) -> EpisodeState:
    """Return what the model was shown before this turn: nothing, where the episode only opens."""
    if episode.resumption is None:
        return {"messages": []}
    opening = show_memory(episode.opening, episode.trajectory.memory_text)
    return {"messages": [*opening, *restore_messages(episode.resumption.steps)]}


def _refuse_namesakes(server_tools: Sequence[Tool], definitions: Sequence[dict[str, Any]]) -> None:
    sources: dict[str, str] = {}
    named = [(tool.name, tool.source) for tool in server_tools]
    for name, source in [*named, *((tool["function"]["name"], "the request") for tool in definitions)]:
        if name in sources:
            raise ValueError(f"two tools are called {name!r}: one of {sources[name]}, one of {source}; rename one")
        sources[name] = source


def _last_user_text(messages: Sequence[Message]) -> str:
    """Return the text of the last user message: what memory is asked about."""
    for message in reversed(messages):
        if message.get("role") == "user":
            content = message.get("content") or ""
            if isinstance(content, str):
                return content
            return "\n".join(part.get("text", "") for part in content if part.get("type") == "text")
    return ""


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
