"""One episode: recorded step by step, rewarded, closed in all cases."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace

import pytest

from memory.errors import SpentBudget, UnknownPolicy, describe_error, find_spent_budget, read_error
from memory.schema import PolicyStage, RewardSource, Split, StepKind, Task, Trajectory, TrajectoryStage, Trust
from memory.store import Memory
from runtime.agent.graph import Agent
from runtime.agent.turn import TurnRequest
from runtime.config import AgentConfig
from runtime.engine.client import Delta
from runtime.engine.model_families import DEFAULT_TEMPERATURE
from runtime.engine.process import Engine
from runtime.errors import EnvironmentRefused, RequestRefused, ToolRefused, UnknownEnvironment
from runtime.serving.hotswap import HotSwap
from runtime.tools.functions import tool_from_function
from tests.runtime.fake_engine import FakeEngine, Reply, call, ids_of, say
from tests.runtime.levers import LeverGame, Levers
from tests.support.rollouts import play


def pulls(*levers: str):
    """A policy that pulls these levers, whatever its prompt."""
    rest = iter(levers)
    return lambda request: call("pull", lever=next(rest))


async def test_a_won_game_is_recorded_step_by_step_with_its_tokens_and_reward(
    agent: Agent, memory: Memory, fake: FakeEngine, levers: Levers
):
    fake.script = pulls("left", "right", "left")
    trajectory = await play(agent, levers.task("left-right-left"), temperature=0.0)

    assert (trajectory.stage, trajectory.answer, trajectory.error) == ("finished", "The door opens.", None)
    assert (trajectory.environment, trajectory.kind, trajectory.split) == ("levers", "pulling", Split.PRACTICE)
    steps = memory.trajectories.steps(trajectory.id)
    assert [step.kind for step in steps] == [StepKind.MODEL, StepKind.TOOL] * 3
    assert [step.content for step in steps if step.kind is StepKind.TOOL] == ["Click.", "Click.", "The door opens."]
    assert steps[0].output_token_ids == ids_of('pull{"lever": "left"}')
    assert steps[0].prompt_token_ids == ids_of("system: You pull levers.\nuser: Three levers are before you.")
    assert trajectory.output_tokens == sum(len(step.output_token_ids or []) for step in steps)
    rewards = memory.trajectories.rewards(trajectory.id)
    assert [(reward.value, reward.source) for reward in rewards] == [(1.0, RewardSource.ENVIRONMENT)]


async def test_a_finished_episode_ends_without_another_model_call(agent: Agent, fake: FakeEngine, levers: Levers):
    fake.script = pulls("right")
    trajectory = await play(agent, levers.task("left-right-left"))
    assert trajectory.answer == "The floor opens."
    assert len(fake.requests) == 1
    assert levers.started[0].num_closed == 1


async def test_a_task_whose_tools_the_chat_template_would_drop_is_refused_by_their_names(
    agent: Agent, engine: Engine, memory: Memory, fake: FakeEngine, levers: Levers
):
    engine.takes_tools = False
    with pytest.raises(EnvironmentRefused, match=r"'left' of 'levers' .*'pull'.*--chat-template"):
        await play(agent, levers.task("left"))
    assert levers.started[0].num_closed == 1
    assert fake.requests == [] and memory.trajectories.select() == []
    assert (await play(agent, messages=[{"role": "user", "content": "hi"}])).stage is TrajectoryStage.FINISHED


async def test_every_step_is_durable_before_the_next_model_call(
    agent: Agent, memory: Memory, fake: FakeEngine, levers: Levers
):
    seen = []

    def script(request):
        running = memory.trajectories.select(stage=TrajectoryStage.RUNNING)[0].trajectory
        seen.append(len(memory.trajectories.steps(running.id)))
        return call("pull", lever=["left", "right", "left"][len(seen) - 1])

    fake.script = script
    await play(agent, levers.task("left-right-left"))
    assert seen == [0, 2, 4]


async def test_a_plain_question_gets_the_reply_and_its_record(agent: Agent, memory: Memory, fake: FakeEngine):
    trajectory = await play(agent, messages=[{"role": "user", "content": "hi"}], episode_id="mine")
    assert (trajectory.answer, trajectory.episode_id, trajectory.split) == ("hello", "mine", Split.LIVE)
    assert trajectory.opening == [{"role": "user", "content": "hi"}]
    assert "tools" not in fake.requests[0]


async def test_deltas_arrive_as_the_model_writes_and_add_up_to_the_answer(agent: Agent, memory: Memory):
    heard = []

    async def on_delta(delta: Delta) -> None:
        heard.append(delta.text)

    trajectory = await play(agent, messages=[{"role": "user", "content": "hi"}], on_delta=on_delta)
    assert heard == list("hello")
    assert memory.trajectories.steps(trajectory.id)[0].output_token_ids == ids_of("hello")
    assert trajectory.answer == "hello"


@pytest.mark.parametrize("streams", [True, False])
async def test_the_record_keeps_the_log_probs_of_sampled_tokens_where_the_request_says_so(
    agent: Agent, memory: Memory, streams: bool
):
    async def ignore(delta: Delta) -> None:
        pass

    for keeps, kept in ((True, [-0.5] * len("hello")), (False, None)):
        messages = [{"role": "user", "content": "hi"}]
        played = await play(agent, messages=messages, keeps_logprobs=keeps, on_delta=ignore if streams else None)
        assert memory.trajectories.steps(played.id)[0].output_logprobs == kept


async def test_a_streamed_tool_call_is_put_together_from_its_pieces(agent: Agent, fake: FakeEngine, levers: Levers):
    async def ignore(delta: Delta) -> None:
        pass

    fake.script = pulls("left", "right", "left")
    trajectory = await play(agent, levers.task("left-right-left"), on_delta=ignore)
    assert trajectory.answer == "The door opens."


async def test_a_broken_call_is_counted_and_told_to_the_model(
    agent: Agent, memory: Memory, fake: FakeEngine, levers: Levers
):
    replies = iter(
        [
            Reply(calls=[("pull", "{left}")]),
            call("pull", lever="up"),
            call("push", lever="left"),
            Reply("<tool_call>{broken</tool_call>"),
        ]
    )
    fake.script = lambda request: next(replies)
    trajectory = await play(agent, levers.task("left-right-left"))

    errors = [step.error for step in memory.trajectories.steps(trajectory.id) if step.kind is StepKind.TOOL]
    assert errors[0] == "the arguments '{left}' are not valid JSON"
    assert "'up' is not one of ['left', 'right']" in errors[1]
    assert errors[2] == "there is no tool 'push'; the tools are: 'pull'"
    assert fake.requests[1]["messages"][-1]["content"] == f"Error: {errors[0]}"
    assert (trajectory.stage, trajectory.num_invalid_tool_calls) == ("finished", 4)
    assert memory.trajectories.effective_reward(trajectory.id) == 0.0


async def test_spent_steps_close_the_episode_finished_with_the_limit_noted(
    agent: Agent, memory: Memory, fake: FakeEngine, levers: Levers
):
    fake.script = lambda request: call("pull", lever="left")
    trajectory = await play(agent, levers.task("-".join(["left"] * 20)))
    assert (trajectory.stage, trajectory.error) == ("finished", "BudgetExceeded: no answer within 6 steps")
    assert find_spent_budget(trajectory.error) is SpentBudget.CALLS
    assert memory.trajectories.effective_reward(trajectory.id) == 0.0
    assert len(fake.requests) == 6


async def test_spent_tokens_and_spent_time_close_the_episode_finished(
    memory: Memory, hotswap: HotSwap, fake: FakeEngine, levers: Levers
):
    fake.script = lambda request: call("pull", lever="left")
    task = levers.task("left-left-left")
    by_tokens = Agent(memory, hotswap, {"levers": levers}, AgentConfig(max_total_tokens=100))
    error = (await play(by_tokens, task)).error
    assert error == "BudgetExceeded: no answer within 100 tokens"
    assert find_spent_budget(error) is SpentBudget.CALLS

    async def never(request):
        await asyncio.sleep(3600)

    fake.script = never
    by_time = Agent(memory, hotswap, {"levers": levers}, AgentConfig(max_seconds=0.3))
    trajectory = await play(by_time, task)
    assert (trajectory.stage, trajectory.error) == ("finished", "BudgetExceeded: no answer within 0.3 seconds")
    assert find_spent_budget(trajectory.error) is SpentBudget.TIME
    assert [game.num_closed for game in levers.started] == [1, 1]


async def test_a_full_context_is_a_spent_budget(agent: Agent, fake: FakeEngine, levers: Levers):
    fake.script = lambda request: Reply(status=400, error="This model's maximum context length is 2048 tokens.")
    trajectory = await play(agent, levers.task("left"))
    assert trajectory.stage == "finished"
    assert trajectory.error.startswith("BudgetExceeded: the conversation fills the model's context")
    assert find_spent_budget(trajectory.error) is SpentBudget.CONTEXT


def test_an_error_that_is_no_spent_budget_is_read_as_it_was_described():
    stored = describe_error(RequestRefused("no answer within 5 seconds: the context is full"))

    assert read_error(stored) == ("RequestRefused", "no answer within 5 seconds: the context is full")
    assert find_spent_budget(stored) is find_spent_budget(None) is None


async def test_an_engine_that_fails_ends_the_episode_failed_and_unrewarded(
    agent: Agent, memory: Memory, fake: FakeEngine, levers: Levers
):
    fake.script = lambda request: Reply(status=500, error="out of luck")
    trajectory = await play(agent, levers.task("left"))
    assert (trajectory.stage, trajectory.error) == ("failed", "EngineLost: the engine answered 500: out of luck")
    assert memory.trajectories.rewards(trajectory.id) == []
    assert levers.started[0].num_closed == 1


@pytest.mark.parametrize("is_heard", [False, True])
async def test_a_call_that_lost_the_engine_is_made_once_more_if_nobody_heard_a_word_of_it(
    agent: Agent, memory: Memory, fake: FakeEngine, is_heard: bool
):
    fake.breaks_off_after = 3 if is_heard else 0
    heard = []

    async def on_delta(delta: Delta) -> None:
        heard.append(delta.text)

    def script(request):
        if len(fake.requests) == 2:
            fake.breaks_off_after = None
        return Reply("hello")

    fake.script = script
    trajectory = await play(agent, messages=[{"role": "user", "content": "hi"}], on_delta=on_delta)
    if is_heard:
        assert trajectory.stage == "failed" and trajectory.error.startswith("EngineLost: the engine broke off")
        assert len(fake.requests) == 1 and "".join(heard) == "hel"
    else:
        assert (trajectory.stage, trajectory.answer, "".join(heard)) == ("finished", "hello", "hello")
        assert len(fake.requests) == 2 and len(memory.trajectories.steps(trajectory.id)) == 1


async def test_an_engine_that_does_not_come_back_in_time_fails_the_episode(
    memory: Memory, hotswap: HotSwap, engine: Engine, fake: FakeEngine, monkeypatch: pytest.MonkeyPatch
):
    agent = Agent(memory, hotswap, {}, AgentConfig(max_seconds=0.5))
    fake.script = lambda request: Reply(status=500, error="dead")

    async def stays_dead(*_) -> bool:
        return False

    monkeypatch.setattr(engine.client, "probe", stays_dead)
    trajectory = await play(agent, messages=[{"role": "user", "content": "hi"}])
    assert (trajectory.stage, trajectory.error) == ("failed", "EngineLost: the engine answered 500: dead")
    assert len(fake.requests) == 1


async def test_who_leaves_frees_the_engine_and_the_record_is_closed_cancelled(
    agent: Agent, memory: Memory, fake: FakeEngine, levers: Levers
):
    async def never(request):
        await asyncio.sleep(3600)

    fake.script = never
    task = asyncio.create_task(play(agent, levers.task("left")))
    while not fake.requests:
        await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    for _ in range(100):
        if fake.num_broken_off:
            break
        await asyncio.sleep(0.01)
    assert (fake.num_broken_off, fake.num_under_way) == (1, 0)
    (view,) = memory.trajectories.select()
    assert view.trajectory.stage == "cancelled"
    assert levers.started[0].num_closed == 1


async def test_an_environment_that_cannot_close_fails_its_episode(agent: Agent, fake: FakeEngine, levers: Levers):
    def script(request):
        levers.started[0].close_error = OSError("the levers are stuck")
        return Reply("I give up")

    fake.script = script
    trajectory = await play(agent, levers.task("left"))
    assert (trajectory.stage, trajectory.error) == ("failed", "OSError: the levers are stuck")


async def test_tools_of_the_client_are_handed_back_as_the_answer(agent: Agent, memory: Memory, fake: FakeEngine):
    weather = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
    fake.script = lambda request: call("weather", city="Oslo")
    trajectory = await play(agent, messages=[{"role": "user", "content": "Oslo?"}], tools=[weather])
    assert trajectory.stage == "running"
    (step,) = memory.trajectories.steps(trajectory.id)
    assert json.loads(step.tool_calls[0]["function"]["arguments"]) == {"city": "Oslo"}
    assert trajectory.tools == [weather]


async def test_tools_of_the_server_run_in_the_loop(memory: Memory, hotswap: HotSwap, fake: FakeEngine):
    def add(left: int, right: int) -> int:
        """Add two numbers."""
        return left + right

    def script(request):
        last = request["messages"][-1]
        return call("add", left=2, right=3) if last["role"] == "user" else Reply(f"It is {last['content']}.")

    fake.script = script
    agent = Agent(memory, hotswap, {}, tools=[tool_from_function(add)])
    trajectory = await play(agent, messages=[{"role": "user", "content": "2 + 3?"}])
    assert trajectory.answer == "It is 5."


async def test_a_clients_tool_with_the_name_of_a_servers_is_refused_with_both_sources(memory: Memory, hotswap: HotSwap):
    def weather(city: str) -> str:
        """Say what the weather is."""
        return "rain"

    theirs = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
    agent = Agent(memory, hotswap, {}, tools=[tool_from_function(weather, source="tools.functions 'sky'")])
    with pytest.raises(ValueError, match=r"'weather': one of tools.functions 'sky', one of the request; rename one"):
        await play(agent, messages=[{"role": "user", "content": "Oslo?"}], tools=[theirs])


async def test_memory_is_shown_ahead_of_the_task_and_kept_out_of_the_opening(
    agent: Agent, memory: Memory, fake: FakeEngine, levers: Levers
):
    fake.script = pulls("left", "right", "left")
    await play(agent, levers.task("left-right-left"))
    await memory.index.drain()
    fake.script = pulls("right")
    trajectory = await play(agent, levers.task("right"))

    assert "Solved before:" in trajectory.memory_text and trajectory.memory_ids
    shown = fake.requests[-1]["messages"][-1]["content"]
    assert shown == f"{trajectory.memory_text}\n\nThree levers are before you."
    assert trajectory.opening[-1]["content"] == "Three levers are before you."

    fake.script = pulls("right")
    without = await play(agent, levers.task("right"), use_memory=False)
    assert (without.memory_text, without.memory_ids) == ("", [])
    assert fake.requests[-1]["messages"][-1]["content"] == "Three levers are before you."


async def teach(agent: Agent, memory: Memory, fake: FakeEngine, levers: Levers) -> None:
    fake.script = pulls("left", "right", "left")
    await play(agent, levers.task("left-right-left"), use_memory=False)
    await memory.index.drain()
    fake.script = pulls("right")


async def test_one_switch_turns_memory_off_for_users_too(
    memory: Memory, hotswap: HotSwap, fake: FakeEngine, levers: Levers
):
    agent = Agent(memory, hotswap, {"levers": levers}, AgentConfig(max_steps=6), serve_with_memory=False)
    await teach(agent, memory, fake, levers)

    assert (await play(agent, levers.task("right"))).memory_text == ""
    fake.script = pulls("right")
    assert (await play(agent, levers.task("right"), use_memory=True)).memory_text != ""


async def test_a_policy_that_was_proved_without_memory_is_served_without_it(
    agent: Agent, memory: Memory, fake: FakeEngine, hotswap: HotSwap, levers: Levers
):
    await teach(agent, memory, fake, levers)
    lean = await memory.policies.draft(parent=0)
    async with hotswap.lease(lean.version):  # a candidate's rollouts, before its verdict
        pass
    await memory.policies.move(lean.version, PolicyStage.ACTIVE, use_memory=False)
    await hotswap.activate(lean.version)

    assert (await play(agent, levers.task("right"))).memory_text == ""
    fake.script = pulls("right")
    assert (await play(agent, levers.task("right"), policy=0)).memory_text != ""


async def test_an_environment_may_say_how_its_replies_are_sampled(agent: Agent, fake: FakeEngine, levers: Levers):
    async def temperature(**how) -> float:
        fake.script = pulls("right")
        played = await play(agent, levers.task("right"), **how)
        return played.temperature

    assert await temperature() == DEFAULT_TEMPERATURE
    levers.temperature = 0.0
    assert await temperature() == 0.0 and await temperature(temperature=1.0) == 1.0


async def test_the_policys_own_prompt_goes_before_the_environments(
    agent: Agent, memory: Memory, fake: FakeEngine, levers: Levers
):
    policy = await memory.policies.draft(system_prompt="Pull well.", parent=0)
    fake.script = pulls("left")
    trajectory = await play(agent, levers.task("left"), policy=policy.version)
    assert trajectory.opening[0] == {"role": "system", "content": "Pull well."}
    assert trajectory.policy == policy.version


async def test_a_task_whose_opening_fails_is_closed_and_keeps_no_policy(
    agent: Agent, memory: Memory, hotswap: HotSwap, levers: Levers, monkeypatch: pytest.MonkeyPatch
):
    def fail(game: LeverGame) -> None:
        raise KeyError("planted")

    monkeypatch.setattr(LeverGame, "opening", property(fail))
    with pytest.raises(KeyError, match="planted"):
        await play(agent, levers.task("left"))
    assert [game.num_closed for game in levers.started] == [1]
    assert hotswap.num_leases == 0 and memory.trajectories.select() == []


async def test_a_task_that_does_not_start_is_an_episode_that_failed(
    agent: Agent, memory: Memory, fake: FakeEngine, hotswap: HotSwap, levers: Levers, monkeypatch: pytest.MonkeyPatch
):
    start = levers.start

    async def refuse(task: Task) -> LeverGame:
        if task.name == "right":
            raise ToolRefused("the machine cannot be set up: no such user")
        return await start(task)

    monkeypatch.setattr(levers, "start", refuse)
    fake.script = pulls("left")
    broken, played = await asyncio.gather(play(agent, levers.task("right")), play(agent, levers.task("left")))
    assert (broken.stage, played.stage) == (TrajectoryStage.FAILED, TrajectoryStage.FINISHED)
    assert broken.error == "ToolRefused: the machine cannot be set up: no such user"
    assert (broken.environment, broken.task, broken.opening) == ("levers", "right", [])
    assert memory.trajectories.steps(broken.id) == [] and hotswap.num_leases == 0
    assert memory.trajectories.with_reward(broken).reward is None


async def test_what_cannot_open_is_refused_by_name_and_leaves_no_record(agent: Agent, memory: Memory, levers: Levers):
    with pytest.raises(UnknownPolicy, match="99"):
        await play(agent, levers.task("left"), policy=99)
    with pytest.raises(UnknownEnvironment, match="'chess'; there is: levers"):
        agent.environment("chess")
    with pytest.raises(ValueError, match="nothing was asked"):
        await play(agent, messages=[])
    assert memory.trajectories.select() == []


async def test_many_episodes_at_once_do_not_mix(agent: Agent, memory: Memory, fake: FakeEngine, levers: Levers):
    async def script(request):
        await asyncio.sleep(0)
        return Reply(request["messages"][-1]["content"].upper())

    fake.script = script
    asked = [f"question {number}" for number in range(50)]
    trajectories = await asyncio.gather(*(play(agent, messages=[{"role": "user", "content": text}]) for text in asked))
    assert [trajectory.answer for trajectory in trajectories] == [text.upper() for text in asked]


async def test_the_same_seed_asks_for_other_luck_at_each_step(agent: Agent, fake: FakeEngine, levers: Levers):
    fake.script = pulls("left", "right")
    await play(agent, levers.task("left-right"), seed=40)
    assert [request["seed"] for request in fake.requests] == [40, 41]


def test_the_reply_of_a_script_is_plain():
    assert say("x")({}).content == "x"


NEWS = "Buy gold now."


def read_news() -> str:
    """Read the news."""
    return NEWS


def reads_the_news(request):
    """A policy that reads once, then repeats the result."""
    last = request["messages"][-1]
    return call("read_news") if last["role"] == "user" else Reply(f"They say: {last['content']}")


def ask_of(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


@pytest.mark.parametrize("is_trusted", [True, False])
async def test_an_episode_is_as_trusted_as_the_tools_it_read(
    memory: Memory, hotswap: HotSwap, fake: FakeEngine, is_trusted: bool
):
    fake.script = reads_the_news
    agent = Agent(memory, hotswap, {}, tools=[replace(tool_from_function(read_news), is_trusted=is_trusted)])
    trajectory = await play(agent, messages=ask_of("What is new?"))

    assert trajectory.answer == f"They say: {NEWS}"
    expected = Trust.TRUSTED if is_trusted else Trust.UNTRUSTED
    assert memory.trajectories.get(trajectory.id).trust is expected


async def test_a_malformed_call_of_an_untrusted_tool_brings_no_text_of_it(
    memory: Memory, hotswap: HotSwap, fake: FakeEngine
):
    rest = iter([call("read_news", page=1), Reply("I give up.")])
    fake.script = lambda request: next(rest)
    agent = Agent(memory, hotswap, {}, tools=[replace(tool_from_function(read_news), is_trusted=False)])
    trajectory = await play(agent, messages=ask_of("What is new?"))
    assert trajectory.trust is Trust.TRUSTED and trajectory.num_invalid_tool_calls == 1


@pytest.mark.parametrize("is_streamed", [False, True])
async def test_a_conversation_that_goes_on_from_an_untrusted_answer_is_untrusted(
    memory: Memory, hotswap: HotSwap, fake: FakeEngine, is_streamed: bool
):
    heard: list[str] = []

    async def hear(delta: Delta) -> None:
        heard.append(delta.text)

    agent = Agent(memory, hotswap, {}, tools=[replace(tool_from_function(read_news), is_trusted=False)])
    fake.script = reads_the_news
    first = await play(agent, messages=ask_of("What is new?"), on_delta=hear if is_streamed else None)
    told = {"role": "assistant", "content": "".join(heard) if is_streamed else first.answer}

    fake.script = say("Gold, they say.")
    second = await play(agent, messages=[*ask_of("What is new?"), told, *ask_of("In short?")])
    third = await play(agent, messages=ask_of("In short?"))
    assert memory.trajectories.get(second.id).trust is Trust.UNTRUSTED
    assert memory.trajectories.get(third.id).trust is Trust.TRUSTED

    await memory.trajectories.approve(first.id)
    fourth = await play(agent, messages=[*ask_of("What is new?"), told, *ask_of("In short?")])
    assert fourth.trust is Trust.TRUSTED


LOOK_UP = {"type": "function", "function": {"name": "look_up", "description": "Look up.", "parameters": {}}}


def reads_the_news_and_looks_up(request):
    """A policy that reads, answers with a call of the client's tool, and then repeats the result."""
    messages = request["messages"]
    last = messages[-1]["content"]
    if messages[-1]["role"] == "tool" and last == NEWS:
        return Reply("Let me see.", calls=[("look_up", "{}")])
    return call("read_news") if last == "What is new?" else Reply(f"It is so: {last}")


async def hand_over(agent: Agent) -> tuple[Trajectory, list[dict]]:
    """Return the waiting trajectory of an agent that read the news, and its client's copy of the conversation."""
    turn = await agent.rollout(TurnRequest(messages=ask_of("What is new?"), tools=[LOOK_UP]))
    assert turn.trajectory.stage is TrajectoryStage.RUNNING
    said = {"role": "assistant", "content": turn.answer, "tool_calls": turn.open_tool_calls}
    result = {"role": "tool", "tool_call_id": turn.open_tool_calls[0]["id"], "content": "It was found."}
    return turn.trajectory, [*ask_of("What is new?"), said, result]


@pytest.mark.parametrize("is_trusted", [True, False])
async def test_an_untrusted_answer_to_words_beside_tool_results_stays_untrusted(
    memory: Memory, hotswap: HotSwap, fake: FakeEngine, is_trusted: bool
):
    agent = Agent(memory, hotswap, {}, tools=[replace(tool_from_function(read_news), is_trusted=is_trusted)])
    fake.script = reads_the_news_and_looks_up
    waiting, told = await hand_over(agent)
    told += ask_of("And in short?")
    closed = await play(agent, messages=told, tools=[LOOK_UP])
    assert (closed.id, closed.stage) == (waiting.id, TrajectoryStage.FINISHED)

    # only the last messages: a client may shorten a conversation
    later = [*ask_of("And in short?"), {"role": "assistant", "content": closed.answer}, *ask_of("Thanks.")]
    expected = Trust.TRUSTED if is_trusted else Trust.UNTRUSTED
    assert (await play(agent, messages=later)).trust is expected


@pytest.mark.parametrize(
    ("happened", "system"), [("waits", ""), ("waits", "It is ten."), ("closed", "It is ten."), ("answered", "")]
)
async def test_a_conversation_that_goes_on_elsewhere_from_an_untrusted_handover_is_untrusted(
    memory: Memory, hotswap: HotSwap, fake: FakeEngine, happened: str, system: str
):
    agent = Agent(memory, hotswap, {}, tools=[replace(tool_from_function(read_news), is_trusted=False)])
    fake.script = reads_the_news_and_looks_up
    waiting, told = await hand_over(agent)
    if happened == "closed":
        await agent.open_episodes.close(waiting, None)
    if happened == "answered":
        await play(agent, messages=told, tools=[LOOK_UP])
    told = [{"role": "system", "content": system}, *told] if system else told
    # a named task, other than that of the waiting trajectory
    task = Task(environment=None, name="other", split=Split.LIVE, kind="chat")
    other = await play(agent, task, messages=told, tools=[LOOK_UP])
    assert other.id != waiting.id and other.trust is Trust.UNTRUSTED


async def test_untrusted_text_is_never_recorded_in_an_episode_that_is_still_trusted(
    memory: Memory, hotswap: HotSwap, fake: FakeEngine
):
    seen: list[tuple[int, Trust]] = []

    def script(request):
        (running,) = memory.trajectories.select(stage=TrajectoryStage.RUNNING)
        seen.append((len(memory.trajectories.steps(running.trajectory.id)), running.trajectory.trust))
        return reads_the_news(request)

    fake.script = script
    agent = Agent(memory, hotswap, {}, tools=[replace(tool_from_function(read_news), is_trusted=False)])
    await play(agent, messages=ask_of("What is new?"))
    assert seen == [(0, Trust.TRUSTED), (2, Trust.UNTRUSTED)]


async def test_a_turn_that_its_client_leaves_is_charged_with_the_tokens_it_received(agent: Agent, fake: FakeEngine):
    fake.script = lambda request: Reply("a long answer", pause_seconds=0.01)
    charged: list[int] = []
    has_some = asyncio.Event()

    async def hear(delta: Delta) -> None:
        has_some.set()

    turn = asyncio.create_task(
        agent.rollout(TurnRequest(messages=ask_of("hi"), on_delta=hear, on_usage=charged.append))
    )
    await has_some.wait()
    turn.cancel()
    with pytest.raises(asyncio.CancelledError):
        await turn
    (num_tokens,) = charged
    assert num_tokens > len(fake.render_prompt(fake.requests[0]))
