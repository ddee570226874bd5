"""The agent: a graph of nodes, and `rollout`, which plays one turn through it and records every step.

    retrieve ─┬> act ─> use_tools
      resume ─┘  │ ^       │ │
                 │ └───────┘ │      until an answer, the end of the environment's task, a spent budget, or a call that
                 v           v      the client has to run
                end         end

A team has two nodes more: retrieve ─> plan ─> act, and act ─> check ─> end, or back to act with a note. All its roles
are calls of one policy.

A user's request, a practice episode and an evaluation take this same path: find the episode, lease the policy, play,
reward, close the trajectory. Where a reply calls tools of the client, the trajectory stays open for its next request.

Invariants: the policy is pinned from before the trajectory opens until it closes. An opened trajectory is closed in all
cases, or waits for its client. Nothing of one tenant or person reaches an episode of another. A failure within an
episode is data on its trajectory, not an exception, and its message stays out of the log. A practice or held-out
episode has no tool with side effects.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial

import structlog
from langchain_core.runnables import RunnableConfig
from langgraph.graph import END, START, StateGraph
from langgraph.graph.state import CompiledStateGraph

from memory.conversation import last_user_text, restore_messages, show_memory, show_plan
from memory.errors import describe_error
from memory.records.trajectories import measure
from memory.schema import RewardSource, Split, Trajectory, TrajectoryStage, Trust, new_id
from memory.store import Memory
from memory.team import Role, find_plan, is_note
from runtime.agent.nodes import accept_answer, act, check, plan, resume, retrieve, use_tools
from runtime.agent.open_episodes import OpenEpisode, OpenEpisodes
from runtime.agent.replay import replay
from runtime.agent.resume import identify_reply
from runtime.agent.state import Budget, Episode, EpisodeState
from runtime.agent.turn import BranchOrigin, Turn, TurnRequest
from runtime.config import AgentConfig
from runtime.engine.cache_salts import CacheSalts
from runtime.engine.client import Message, ToolDefinition
from runtime.engine.process import NO_TOOLS
from runtime.environments.base import Environment, Outcome, Playthrough, find_environment
from runtime.errors import BudgetExceeded, EnvironmentRefused
from runtime.observability.telemetry import Telemetry
from runtime.serving.hotswap import HotSwap
from runtime.serving.policy import LeasedPolicy
from runtime.tools.base import Tool
from runtime.tools.recorded import tools_for

log = structlog.get_logger()


class Agent:
    """Plays turns. It keeps no state of any one of them; `open_episodes` lists those under way."""

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
        """Whether memory is shown where neither the request nor the policy decides."""
        self._tools = tools
        """The server's tools in requests without an environment; the caller may fill the list later."""
        self.telemetry = telemetry or Telemetry()
        self.open_episodes = OpenEpisodes(memory, idle_seconds=self._config.client_idle_seconds)
        self._salts = CacheSalts()
        self._graph = build_graph()
        self._team_graph = build_graph(self._config.team)

    def environment(self, name: str) -> Environment:
        """Return the environment called `name`. Raises: UnknownEnvironment."""
        return find_environment(self._environments, name)

    def temperature_of(self, environment: Environment | None) -> float:
        """Return the sampling temperature where the request gives none."""
        declared = environment.temperature if environment is not None else None
        configured = self._config.temperature if declared is None else declared
        return self._hotswap.model_temperature if configured is None else configured

    def output_tokens_of(self, environment: Environment | None) -> int:
        """Return the token limit of one model call where the request gives none."""
        config = self._config
        ordinary = config.default_output_tokens if environment is None else environment.max_output_tokens
        return ordinary if config.max_output_tokens is None else min(ordinary, config.max_output_tokens)

    def require_allowed(self, max_tokens: int | None) -> None:
        """Raise ValueError with the setting's name if a request asks for more tokens than the server allows."""
        limits = {name: getattr(self._config, name) for name in ("max_output_tokens", "max_total_tokens")}
        for name, limit in limits.items():
            if max_tokens is not None and limit is not None and max_tokens > limit:
                raise ValueError(
                    f"{max_tokens} tokens are asked for, and this server allows {limit} (agent.{name}): ask for fewer"
                )

    async def rollout(self, request: TurnRequest) -> Turn:
        """Play one turn, a request and its answer; its steps, stage and reward are durable when it returns.

        An episode is one or more turns, and a trajectory is its record. If the messages continue an open episode, the
        turn's steps are appended to that episode's trajectory. Policy and memories are those that the episode began
        with. A turn that ends in calls of the client's tools leaves the trajectory RUNNING: the client is expected
        back.

        Raises:
            ValueError: there is neither a task of an environment nor a message, or two tools have the same name.
            EpisodeBusy: another request of the episode is being answered.
            UnknownEnvironment, UnknownPolicy, AdapterError, EngineError: the episode could not be opened.
            ReplayMismatch: the turn branches off a recorded episode, and the environment did not answer as it did
                there; nothing was recorded.
            EnvironmentRefused: the environment cannot start a task, or its tools are not in the model's chat template.
        """
        environment = self.environment(request.environment) if request.environment is not None else None
        self._check(request, environment)
        # Entered before the lease: a busy episode is rejected without waiting for the engine.
        with self.open_episodes.enter(request) as open_episode:
            resumption = open_episode.resumption
            version = request.policy if resumption is None else resumption.trajectory.policy
            # Leased before the record opens and until it is closed: a leased policy is never unloaded.
            async with self._hotswap.lease(version) as leased:
                episode = await self._start_episode(request, open_episode, leased, environment)
                # No `await` between here and `_play_traced`, which closes the task that `_start_episode` has opened,
                # whatever happens: a cancellation in between would leave it open.
                try:
                    trajectory = await self._play_traced(episode)
                finally:
                    if request.on_usage is not None:
                        request.on_usage(episode.budget.num_tokens)
                return self._make_turn(episode, trajectory)

    async def branch(self, origin: Trajectory, *, position: int, temperature: float, seed: int) -> Trajectory:
        """Play a branch: start the task of a recorded episode again, replay its steps before `position`, and have its
        policy play on from there. The branch belongs to whom the episode does.

        Raises: as `rollout`.
        """
        steps = await asyncio.to_thread(self._memory.trajectories.steps, origin.id)
        environment = self.environment(origin.environment or "")
        request = TurnRequest(
            task=environment.task(origin.task or ""),
            origin=BranchOrigin(origin, steps[:position]),
            tenant=origin.tenant,
            user_id=origin.user_id,
            key_id=origin.key_id,
            is_shared=origin.is_shared,
            policy=origin.policy,
            temperature=temperature,
            seed=seed,
        )
        return (await self.rollout(request)).trajectory

    def _check(self, request: TurnRequest, environment: Environment | None) -> None:
        if environment is not None and request.tools:
            raise ValueError(f"a task of {environment.name!r} brings its own tools: send none with it")
        if request.origin is not None and (environment is None or not environment.can_replay):
            raise ValueError(
                f"trajectory {request.origin.trajectory.id!r} cannot be replayed: "
                f"{request.environment or 'live traffic'!r} does not start again in the same state"
            )
        if request.origin is not None and any(step.role is not None for step in request.origin.steps):
            raise ValueError(
                f"trajectory {request.origin.trajectory.id!r} was played by a team, which is not replayed: branch from "
                'an episode of a single agent (agent.team = ["actor"])'
            )
        if environment is None and not request.messages:
            raise ValueError("nothing was asked: give a task of an environment, or at least one message")
        _require_distinct_names(() if environment is not None else self._tools, request.tools)

    async def _start_episode(
        self, request: TurnRequest, open_episode: OpenEpisode, leased: LeasedPolicy, environment: Environment | None
    ) -> Episode:
        """Start the task, if there is one, and return its episode. Of a task that does not start, it is an episode that
        fails as soon as it is recorded: one broken task must not end whatever plays many of them."""
        if environment is None or request.task is None:
            return self._make_episode(request, open_episode, leased, environment, None)
        try:
            playthrough = await environment.start(request.task)
        # The environment can start no task.
        except EnvironmentRefused:
            raise
        except Exception as error:
            return self._make_episode(request, open_episode, leased, environment, None, start_error=error)
        try:
            if playthrough.tools and not leased.engine.takes_tools:
                names = ", ".join(repr(tool.name) for tool in playthrough.tools)
                raise EnvironmentRefused(
                    f"task {request.task.name!r} of {environment.name!r} has the tools {names}, and {NO_TOOLS}"
                )
            episode = self._make_episode(request, open_episode, leased, environment, playthrough)
            if request.origin is not None:
                await replay(episode, request.origin)
            return episode
        # A plug-in's playthrough may fail to give its opening or its tools, and a replay may be cancelled.
        except BaseException:
            await playthrough.close()
            raise

    def _make_episode(
        self,
        request: TurnRequest,
        open_episode: OpenEpisode,
        leased: LeasedPolicy,
        environment: Environment | None,
        playthrough: Playthrough | None,
        start_error: Exception | None = None,
    ) -> Episode:
        """Return the episode at its opening, or where its client continues it."""
        config, task, resumption = self._config, request.task, open_episode.resumption
        # Memories of a shared or practised episode are shown to all, so no person's own may enter it.
        reader = "" if request.is_shared or environment is not None else request.user_id
        if resumption is not None:
            split = resumption.trajectory.split
        else:
            split = task.split if task is not None else Split.LIVE
        if resumption is not None:
            opening, task_text = resumption.trajectory.opening, resumption.trajectory.task_text
        else:
            messages = _first_messages(request, playthrough)
            opening, task_text = self._with_system_prompt(messages, leased, environment), last_user_text(messages)
        episode = Episode(
            request=request,
            memory=self._memory,
            telemetry=self.telemetry,
            leased=leased,
            reader=reader,
            episode_id=open_episode.episode_id,
            # Drawn here and not when the row is written: spans and logs carry it from the first node on.
            trajectory_id=resumption.trajectory.id if resumption is not None else new_id("trj"),
            playthrough=playthrough,
            start_error=start_error,
            opening=opening,
            task_text=task_text,
            tools={tool.name: tool for tool in self._tools_for(split, playthrough, request.tenant, reader)},
            budget=Budget(
                max_steps=config.max_steps,
                max_total_tokens=config.max_total_tokens,
                max_output_tokens=request.max_tokens or self.output_tokens_of(environment),
            ),
            use_memory=self._uses_memory(leased) if request.use_memory is None else request.use_memory,
            temperature=self.temperature_of(environment) if request.temperature is None else request.temperature,
            # The salt comes last: a client must not choose another tenant's part of the prefix cache.
            sampling={**request.sampling, **self._salts.for_tenant(request.tenant)},
            salts=self._salts.for_tenant(request.tenant),
            # A branch goes on as its origin began: with a single agent.
            team=() if request.origin is not None else self._team_for(split),
            num_notes_left=config.max_notes,
        )
        if resumption is not None:
            episode.resumption = resumption
            episode.trajectory = resumption.trajectory
            # `resumption.steps` have no token ids (`OpenEpisodes._find`): nothing here may measure or store them again.
            episode.first_position = len(resumption.steps)
            episode.num_invalid_tool_calls = resumption.trajectory.num_invalid_tool_calls
            episode.num_notes_left -= sum(map(is_note, resumption.steps))
        return episode

    def _team_for(self, split: Split) -> Sequence[Role]:
        """Return the roles of a team; none where a single agent plays."""
        plays = self._config.team_plays == "all" or split is Split.PRACTICE
        return self._config.team if plays and len(self._config.team) > 1 else ()

    def _make_turn(self, episode: Episode, trajectory: Trajectory) -> Turn:
        """Return the turn that is over."""
        size = measure(episode.steps)
        is_first = episode.first_position == 0
        view = self._memory.trajectories.with_reward(trajectory)
        return Turn(
            trajectory=trajectory,
            first_position=episode.first_position,
            steps=episode.steps,
            size=size,
            episode_size=size if is_first else self._memory.trajectories.measure(trajectory.id),
            reward=view.reward,
            is_success=view.is_success,
            logprobs=episode.reply.logprobs if episode.reply is not None else [],
            stop_sequence=episode.reply.stop_sequence if episode.reply is not None else None,
        )

    def _uses_memory(self, leased: LeasedPolicy) -> bool:
        return self.serve_with_memory if leased.policy.use_memory is None else leased.policy.use_memory

    def _tools_for(self, split: Split, playthrough: Playthrough | None, tenant: str, reader: str) -> list[Tool]:
        tools = playthrough.tools if playthrough else self._tools
        recorded_result = self._memory.trajectories.recorded_result
        return tools_for(split, tools, partial(recorded_result, tenant=tenant, user_id=reader))

    def _with_system_prompt(
        self, opening: list[Message], leased: LeasedPolicy, environment: Environment | None
    ) -> list[Message]:
        if not opening or opening[0].get("role") in ("system", "developer"):
            return opening
        prompt = leased.policy.system_prompt
        # An empty prompt of a policy is a decision too, and sends none.
        if prompt is None:
            prompt = environment.system_prompt if environment is not None else self._config.system_prompt
        return [{"role": "system", "content": prompt}, *opening] if prompt else opening

    async def _play_traced(self, episode: Episode) -> Trajectory:
        """Play the turn with its ids bound to logs and spans."""
        names = {"trajectory_id": episode.trajectory_id, "episode_id": episode.episode_id}
        policy = f"v{episode.leased.version}"
        with (
            structlog.contextvars.bound_contextvars(**names),
            self.telemetry.tracing.invoke_agent(**names, policy=policy) as note,
        ):
            trajectory = await self._play(episode)
            note(trajectory)
            return trajectory

    async def _play(self, episode: Episode) -> Trajectory:
        """Run the graph, reward, close the trajectory. Here, at the episode's edge, a failure becomes data."""
        stage, error = TrajectoryStage.FINISHED, None
        try:
            error = await self._run(episode)
            if error is None and episode.is_handed_over:
                return await _leave_open(episode)
            await _reward(episode)
        except asyncio.CancelledError:
            # Shielded: a second cancellation must not leave the record open.
            await asyncio.shield(_close(episode, TrajectoryStage.CANCELLED, "CancelledError: nobody waits any more"))
            raise
        except Exception as raised:
            if episode.trajectory is None:  # no record could be opened, so the error cannot be recorded
                await _leave(episode)
                raise
            stage, error = TrajectoryStage.FAILED, describe_error(raised)
            # Only the class: the message may contain a person's text.
            log.warning("episode failed", error=type(raised).__name__)
        closed = await _close(episode, stage, error)
        assert closed is not None
        return closed

    async def _run(self, episode: Episode) -> str | None:
        """Run the graph to its end or to the end of the budget; return a description of the limit that ended it."""
        limit = asyncio.timeout(self._config.max_seconds)
        # Two nodes a step and some to spare: the budget has to end an episode, never LangGraph's own limit.
        config: RunnableConfig = {"recursion_limit": 2 * self._config.max_steps + 10}
        graph = self._team_graph if episode.team else self._graph
        try:
            async with limit:
                await graph.ainvoke(_begin_state(episode), context=episode, config=config)
        except BudgetExceeded as exceeded:
            await accept_answer(episode)
            return describe_error(exceeded)
        except TimeoutError:
            # A tool's or a client's own TimeoutError is a failure of the episode, not its budget.
            if not limit.expired():
                raise
            if episode.lost is not None:  # the engine's failure; as the policy's it would teach something false
                raise episode.lost from None
            await accept_answer(episode)
            return describe_error(BudgetExceeded(f"no answer within {self._config.max_seconds:g} seconds"))
        return None


def _first_messages(request: TurnRequest, playthrough: Playthrough | None) -> list[Message]:
    return list(playthrough.opening if playthrough is not None else request.messages)


async def _reward(episode: Episode) -> None:
    """Store the environment's reward, if there is an environment; durable when it returns."""
    outcome = await _leave(episode)
    if outcome is not None:
        await episode.memory.trajectories.reward(
            episode.record.id, outcome.value, RewardSource.ENVIRONMENT, outcome.reason
        )


async def _leave_open(episode: Episode) -> Trajectory:
    """Leave the trajectory open for its client. All of it is stored by now but what the steps do not hold."""
    trajectory, num_invalid = episode.record, episode.num_invalid_tool_calls
    if trajectory.trust is Trust.UNTRUSTED or num_invalid != trajectory.num_invalid_tool_calls:
        reply = identify_reply(episode.visible_text, episode.client_calls)
        await episode.memory.trajectories.note_handover(trajectory.id, reply=reply, num_invalid_tool_calls=num_invalid)
        trajectory.num_invalid_tool_calls = num_invalid
    return trajectory


async def _leave(episode: Episode) -> Outcome | None:
    """Close the playthrough, once."""
    # Cleared before the `await`: a cancellation during `close` must not lead to a second one.
    playthrough, episode.playthrough = episode.playthrough, None
    return await playthrough.close() if playthrough is not None else None


async def _close(episode: Episode, stage: TrajectoryStage, error: str | None) -> Trajectory | None:
    """Close a playthrough that is still open, then the trajectory, if there is one; durable when it returns."""
    # `return_exceptions` also catches a CancelledError of the environment: the trajectory is closed in any case.
    (problem,) = await asyncio.gather(_leave(episode), return_exceptions=True)
    if isinstance(problem, Exception):  # the episode ended for another reason, and that one is recorded
        log.warning("environment did not close", error=type(problem).__name__)
    if episode.trajectory is None:
        return None
    return await episode.memory.trajectories.close(
        episode.trajectory.id,
        stage=stage,
        answer=episode.answer,
        error=error,
        num_invalid_tool_calls=episode.num_invalid_tool_calls,
        reply=episode.visible_text,
    )


def build_graph(team: Sequence[Role] = ()) -> CompiledStateGraph[EpisodeState, Episode, EpisodeState, EpisodeState]:
    """Return the compiled graph of a single agent, or of a team with these roles."""
    graph = StateGraph(EpisodeState, context_schema=Episode)
    graph.add_node("retrieve", retrieve)
    graph.add_node("resume", resume)
    graph.add_node("act", act)
    graph.add_node("use_tools", use_tools)
    graph.add_conditional_edges(START, _begin, ["resume", "retrieve"])
    graph.add_edge("resume", "act")
    if Role.PLANNER in team:
        graph.add_node("plan", plan)
        graph.add_edge("retrieve", "plan")
        graph.add_edge("plan", "act")
    else:
        graph.add_edge("retrieve", "act")
    if Role.CHECKER in team:
        graph.add_node("check", check)
        graph.add_conditional_edges("act", _after_team_act, ["use_tools", "check", END])
        graph.add_conditional_edges("check", _end_or("act"), ["act", END])
    else:
        graph.add_conditional_edges("act", _end_or("use_tools"), ["use_tools", END])
    graph.add_conditional_edges("use_tools", _end_or("act"), ["act", END])
    return graph.compile()


# These are asynchronous although they await nothing: LangGraph runs a plain function in a thread, which costs as much
# as all other overhead of a model call.


async def _begin(state: EpisodeState) -> str:
    """Return the first node: a resumed episode begins with messages, a new one without."""
    return "resume" if state.get("messages") else "retrieve"


async def _after_team_act(state: EpisodeState) -> str:
    if state.get("is_unchecked"):
        return "check"
    return END if state.get("is_over") else "use_tools"


def _end_or(node: str) -> Callable[[EpisodeState], Awaitable[str]]:
    async def choose(state: EpisodeState) -> str:
        return END if state.get("is_over") else node

    return choose


def _begin_state(episode: Episode) -> EpisodeState:
    """Return the messages that the model was shown before this turn: none where the episode only opens."""
    if episode.resumption is None:
        return {"messages": []}
    # Must equal what `retrieve` returned in the first turn, or the prefix cache and the stitching of token ids miss.
    steps = episode.resumption.steps
    opening = show_memory(show_plan(episode.opening, find_plan(steps)), episode.record.memory_text)
    return {"messages": [*opening, *restore_messages(steps)]}


def _require_distinct_names(server_tools: Sequence[Tool], definitions: Sequence[ToolDefinition]) -> None:
    # `act` tells the client's calls from the server's by their names alone.
    sources: dict[str, str] = {}
    named = [(tool.name, tool.source) for tool in server_tools]
    for name, source in [*named, *((tool["function"]["name"], "the request") for tool in definitions)]:
        if name in sources:
            raise ValueError(f"two tools are called {name!r}: one of {sources[name]}, one of {source}; rename one")
        sources[name] = source
